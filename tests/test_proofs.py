from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from random_masks import CHOSEN, DOC, FLAG, Masks, truths

import attndsl
from attndsl import expr as x
from attndsl.expr import Expr, Table, all_of, any_of, const, eq, le, lt, negate, sub, var
from attndsl.layers.reach import product
from attndsl.meaning.pointwise import evaluate
from attndsl.relations.proofs import Verdict, equal, every_row, subset
from attndsl.relations.relation import domain, eliminate

Q, K, N, H = var("q"), var("k"), var("n"), var("h")
CAUSAL = le(K, Q)
DOCUMENTS = eq(x.lookup(DOC, Q), x.lookup(DOC, K))


def band(low: int, high: int) -> Expr:
    return all_of(le(const(low), sub(K, Q)), le(sub(K, Q), const(high)))


def transposed(mask: Expr) -> Expr:
    return x.substitute(mask, {"q": K, "k": Q})


def check(formula: Expr, verdict: Verdict) -> None:
    """The verdict on "`formula` never holds" agrees with all small n, and its counter-example is one."""
    if verdict.counter_example is not None:
        point = verdict.counter_example
        closed = x.substitute(
            formula, {name: const(value) for name, value in point.items() if name not in "qk"}
        )
        position = np.array([point["q"]]), np.array([point.get("k", 0)])
        assert evaluate(closed, *position, verdict.tables).all(), (formula, verdict)
    smallest = next((point for point, truth in truths(formula) if truth.any()), None)
    if smallest is not None:
        assert verdict.status != "proved", (formula, smallest)
        if verdict.counter_example is not None and not formula.tables:
            assert verdict.counter_example["n"] <= smallest["n"]


def claims(seed: int, unknown: float) -> list[tuple[Expr, Expr]]:
    source = Masks(seed, unknown)
    a, b, c = (source.mask(2) for _ in range(3))
    return [
        (a, b),
        (c, all_of(a, c)),
        (any_of(a, b), b),
        (all_of(a, b), a),
        (all_of(a, c), any_of(b, c)),
        (all_of(a, any_of(b, c)), any_of(all_of(a, b), all_of(a, c))),
        (negate(any_of(a, b)), all_of(negate(a), negate(c))),
        (a, eliminate(a, domain("n", "q", "k", "h", "H"))),
    ]


@pytest.mark.parametrize("unknown", [0.0, 0.5])
def test_no_verdict_contradicts_small_n(unknown: float) -> None:
    statuses: Counter[str] = Counter()
    for seed in range(30):
        for left, right in claims(seed, unknown):
            verdict = subset(left, right)
            statuses[verdict.status] += 1
            check(all_of(left, negate(right)), verdict)
    assert statuses["proved"] > 50, statuses
    assert statuses["refuted"] > 40, statuses
    assert statuses["undecided"] < 40, statuses


@pytest.mark.parametrize("unknown", [0.0, 0.5])
def test_no_verdict_on_rows_contradicts_small_n(unknown: float) -> None:
    statuses: Counter[str] = Counter()
    for seed in range(40):
        mask = any_of(Masks(seed, unknown).mask(2), band(-2, -1 + seed % 3))
        verdict = every_row(mask)
        statuses[verdict.status] += 1
        some = x.exists("key", x.ZERO, N, x.substitute(mask, {"k": var("key")}))
        check(negate(some), verdict)
    assert statuses["proved"] > 20, statuses
    assert statuses["refuted"] > 5, statuses


def stride(c: int) -> Expr:
    return eq(x.mod(sub(Q, K), const(c)), x.ZERO)


STRIDED = all_of(CAUSAL, any_of(lt(sub(Q, K), const(128)), stride(128)))
FIXED = all_of(
    CAUSAL,
    any_of(eq(x.floordiv(Q, const(128)), x.floordiv(K, const(128))), le(const(96), x.mod(K, const(128)))),
)
LINKS = x.random_keys(Q, K, N, x.ZERO, x.TRUE, 3, "row", "col")
PAST_LINKS = x.random_keys(Q, K, N, x.ZERO, le(var("col"), var("row")), 3, "row", "col")
WITHIN = all_of(DOCUMENTS, le(x.rank_of(DOC, K), x.rank_of(DOC, Q)))

PROVED = {
    "strided is causal": (STRIDED, CAUSAL),
    "two strided hops": (product(STRIDED, STRIDED), CAUSAL, "both"),
    "two fixed hops": (product(FIXED, FIXED), CAUSAL, "both"),
    "causal documents": (all_of(CAUSAL, DOCUMENTS), CAUSAL),
    "part of documents": (all_of(CAUSAL, DOCUMENTS), DOCUMENTS),
    "documents are symmetric": (any_of(DOCUMENTS, transposed(DOCUMENTS)), DOCUMENTS, "both"),
    "documents are transitive": (product(DOCUMENTS, DOCUMENTS), DOCUMENTS, "both"),
    "each position is in its own document": (eq(Q, K), DOCUMENTS),
    "one bool entry": (eq(Q, K), eq(x.lookup(FLAG, Q), x.lookup(FLAG, K))),
    "chosen keys": (all_of(CAUSAL, x.intable(K, CHOSEN, Q)), CAUSAL),
    "causal in each document": (WITHIN, all_of(CAUSAL, DOCUMENTS), "both"),
    "position below the length of the document": (x.TRUE, lt(x.rank_of(DOC, Q), x.count_of(DOC, Q))),
    "links to the past": (PAST_LINKS, CAUSAL),
    "a product commutes": (lt(x.mul(Q, K), N), lt(x.mul(K, Q), N)),
    "heads": (eq(x.mod(Q, const(2)), x.mod(H, const(2))), lt(H, var("H"))),
    "self attention": (x.TRUE, lt(Q, var("nq"))),
}


@pytest.mark.parametrize("name", PROVED)
def test_proved_for_every_n_and_table(name: str) -> None:
    left, right, *both = PROVED[name]
    verdict = (equal if both else subset)(left, right)
    assert verdict.status == "proved", verdict


REFUTED = {
    "one hop": (CAUSAL, STRIDED, {"n": 130, "q": 129, "k": 0}),
    "a shorter window": (band(-1023, 0), band(-999, 0), {"n": 1001, "q": 1000, "k": 0}),
    "documents of both windows": (all_of(DOCUMENTS, band(-40, 0)), band(-30, 0), {"n": 32, "q": 31, "k": 0}),
    "heads": (eq(x.mod(Q, const(4)), H), lt(H, const(3)), {"n": 4, "H": 4, "h": 3, "q": 3, "k": 0}),
    "documents": (DOCUMENTS, CAUSAL, {"n": 2, "q": 0, "k": 1}),
    "links": (LINKS, CAUSAL, {"n": 2, "q": 0, "k": 1}),
    "a product": (lt(x.mul(Q, K), N), CAUSAL, {"n": 2, "q": 0, "k": 1}),
}


@pytest.mark.parametrize("name", REFUTED)
def test_refuted_at_the_smallest_point(name: str) -> None:
    left, right, point = REFUTED[name]
    verdict = subset(left, right)
    assert (verdict.status, verdict.counter_example) == ("refuted", point)


def test_a_table_with_a_row_per_head_differs_between_heads() -> None:
    chosen = x.lookup(Table("chosen", "bool", ("H", "n")), var("h"), K)
    some, some_not = (x.exists("h", x.ZERO, var("H"), e) for e in (chosen, negate(chosen)))
    assert subset(all_of(some, some_not), x.FALSE).status != "proved"
    assert subset(x.exists("h", x.ZERO, var("H"), all_of(chosen, negate(chosen))), x.FALSE).status == "proved"


def test_a_number_that_hangs_on_an_unknown_search_is_unknown() -> None:
    some = x.exists("m", x.ZERO, N, eq(x.lookup(DOC, var("m")), x.lookup(DOC, x.add(Q, K))))
    flag = x.where(all_of(some, x.lookup(FLAG, Q)), x.ONE, x.ZERO)
    assert subset(eq(flag, x.ZERO), x.FALSE).status != "proved"
    assert subset(eq(flag, x.ONE), x.FALSE).status != "proved"
    assert subset(le(flag, x.ZERO), eq(flag, x.ONE)).status != "proved"
    other = x.where(x.exists("m", x.ZERO, N, eq(x.lookup(DOC, var("m")), x.ONE)), x.ONE, x.ZERO)
    assert subset(eq(other, x.ZERO), x.FALSE).status == "refuted"


def test_rows() -> None:
    assert every_row(all_of(CAUSAL, DOCUMENTS)).status == "proved"
    assert every_row(all_of(PAST_LINKS, lt(K, Q))).status == "refuted"
    assert every_row(lt(K, Q)).counter_example == {"n": 1, "q": 0}
    odd = eq(x.mod(Q, const(2)), x.ONE)
    assert every_row(all_of(odd, CAUSAL)).counter_example == {"n": 1, "q": 0}
    assert every_row(all_of(odd, CAUSAL), assuming=odd).status == "proved"


def test_at_given_parameters() -> None:
    near = all_of(CAUSAL, lt(sub(Q, K), x.call("isqrt", N)))
    proved, refuted = (subset(near, band(1 - w, 0), given={"n": 4096}) for w in (64, 63))
    assert proved == Verdict("proved", at="at n = 4096")
    assert refuted.at == "at n = 4096"
    assert refuted.counter_example == {"n": 4096, "q": 63, "k": 0}
    assert subset(eq(H, const(7)), lt(K, Q), given={"H": 7}).status == "proved"


def test_what_cannot_be_decided_is_undecided() -> None:
    squares = le(x.mul(Q, Q), x.mul(K, K))
    verdict = subset(all_of(squares, le(x.ZERO, Q)), le(Q, K))
    assert verdict.status == "undecided"
    assert "depends on" in verdict.reason
    unequal = all_of(*(negate(eq(x.mod(Q, const(p)), x.ZERO)) for p in range(2, 80)), band(-3, 0))
    verdict = subset(unequal, band(-2, 0))
    assert verdict.status in ("undecided", "refuted")
    assert "limit" in verdict.reason or verdict.counter_example


def test_a_power_of_a_head_is_undecided_and_says_what_is_not() -> None:
    doubled = x.power(const(2), x.floordiv(H, const(4)), integral=True)
    verdict = subset(
        all_of(CAUSAL, lt(sub(Q, K), doubled)), lt(sub(Q, K), const(4)), assuming=lt(H, const(8))
    )
    assert verdict.reason == "it depends on a power; a list of its values can be proved: `[1, 2, 4][h // 4]`"


def test_a_table_without_axes_is_searched() -> None:
    start = x.lookup(Table("start", "int", ("B",)), var("b"))
    verdict = subset(CAUSAL, le(start, K))
    assert verdict.status == "refuted"
    assert verdict.tables is not None


def test_a_refutation_says_what_stands_for_all_heads_together() -> None:
    text = """
    attention b(w) { heads 0 { mask last(3) } else { mask last(w) } }
    attention c { mask causal }
    assert T(b(5)) <= causal
    assert every_row(b(4) - radius(0))
    assert b(4) <= last(3)
    assert T(c) <= causal
    """
    reasons = [verdict.reason for _, verdict in attndsl.parse(text).check()]
    assert reasons == [*["`b` stands for all heads together"] * 2, "", ""]
