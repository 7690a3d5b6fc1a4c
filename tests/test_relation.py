from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress

import islpy as isl
import numpy as np
import pytest
from random_masks import DOC, Masks, truths

from attndsl import expr as x
from attndsl.errors import AttnError
from attndsl.expr import Expr, Table, all_of, any_of, const, eq, le, lt, negate, sub, var
from attndsl.relations import relation
from attndsl.relations.relation import bounds, domain, eliminate, is_affine, to_set

Q, K, N = var("q"), var("k"), var("n")
CAUSAL = le(K, Q)
SELF = domain("n", "q", "k")


def product(upper: Expr, lower: Expr, m: str = "m0") -> Expr:
    inside = all_of(x.substitute(upper, {"k": var(m)}), x.substitute(lower, {"q": var(m)}))
    return x.exists(m, x.ZERO, N, inside)


def strides(divisors: list[int]) -> Expr:
    """The product of dilated causal patterns."""
    total = x.TRUE
    for i, c in enumerate(divisors):
        step = all_of(CAUSAL, eq(x.mod(sub(Q, K), const(c)), x.ZERO))
        total = product(total, step, f"m{i}") if i else step
    return total


def primes(count: int) -> list[int]:
    found: list[int] = []
    candidate = 2
    while len(found) < count:
        if all(candidate % p for p in found):
            found.append(candidate)
        candidate += 1
    return found


def matrix(s: isl.Set, point: dict[str, int]) -> np.ndarray:
    for name, value in point.items():
        index = s.find_dim_by_name(isl.dim_type.param, name)
        if index >= 0:
            s = s.fix_val(isl.dim_type.param, index, isl.Val(str(value)))
    result = np.zeros((point["n"], point["n"]), bool)

    def mark(p: isl.Point) -> None:
        q, k = (int(p.get_coordinate_val(isl.dim_type.set, i).to_str()) for i in range(2))
        result[q, k] = True

    s.project_out(isl.dim_type.param, 0, s.dim(isl.dim_type.param)).foreach_point(mark)
    return result


def drawn(seeds: range, unknown: float) -> Iterator[Expr]:
    for seed in seeds:
        mask = Masks(seed, unknown).mask()
        if mask.op != "const":
            yield mask


@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_bounds_enclose_the_mask(unknown: float) -> None:
    exact = bounded = tight = 0
    for mask in drawn(range(90), unknown):
        under, over = bounds(mask)
        affine = is_affine(mask)
        exact, bounded = exact + affine, bounded + (not affine)
        assert not affine or under.is_equal(over), mask
        tight += not affine and not under.is_empty()
        for point, truth in truths(mask, range(6)):
            low, high = matrix(under, point), matrix(over, point)
            assert (low <= truth).all(), (mask, point)
            assert (truth <= high).all(), (mask, point)
    assert exact > 60 if unknown == 0 else bounded > 40 and tight > 5


def test_elimination_keeps_the_meaning() -> None:
    changed = 0
    for seed in range(150):
        mask = Masks(seed, 0.05).mask()
        plain = eliminate(mask, domain("n", "q", "k", "h", "H"))
        changed += plain is not mask
        for point, differs in truths(
            any_of(all_of(mask, negate(plain)), all_of(plain, negate(mask))), range(6)
        ):
            assert not differs.any(), (mask, plain, point)
    assert changed > 25


def test_products_of_published_patterns_lose_their_bound_variable() -> None:
    strided = all_of(CAUSAL, any_of(lt(sub(Q, K), const(128)), eq(x.mod(sub(Q, K), const(128)), x.ZERO)))
    assert eliminate(product(strided, strided), SELF) is le(x.ZERO, sub(Q, K))
    documents = eq(x.lookup(DOC, Q), x.lookup(DOC, K))
    assert eliminate(product(documents, documents)).op == "exists"


def test_a_table_may_hold_anything_but_one_entry_is_one_value() -> None:
    documents = eq(x.lookup(DOC, Q), x.lookup(DOC, K))
    under, over = bounds(documents)
    assert under.is_equal(to_set(eq(Q, K)))
    assert over.is_equal(to_set(x.TRUE))
    under, over = bounds(all_of(CAUSAL, negate(documents)))
    assert under.is_empty()
    assert over.is_equal(to_set(lt(K, Q)))
    with pytest.raises(AttnError):
        to_set(documents)


@pytest.mark.parametrize("axes", ["", "B", "H", "BH"])
def test_ranks_follow_positions_in_one_document_alone(axes: str) -> None:
    """Also where there are rows and heads, whose documents are their own."""
    doc = Table("doc", "int", (*axes, "n"))
    (of_q, rank), (of_k, other) = (
        (x.lookup(doc, *doc.implicit, p), x.rank_of(doc, *doc.implicit, p)) for p in (Q, K)
    )
    documents = eq(of_q, of_k)
    forwards, backwards = all_of(lt(Q, K), lt(rank, other)), all_of(lt(Q, K), lt(other, rank))
    assert bounds(all_of(backwards, documents))[1].is_empty()
    assert not bounds(all_of(backwards, negate(documents)))[1].is_empty()
    assert not bounds(all_of(forwards, documents))[1].is_empty()


def test_a_drawn_link_is_among_the_eligible_keys() -> None:
    link = x.random_keys(Q, K, N, x.ZERO, le(var("col"), var("row")), 3, "row", "col")
    under, over = bounds(link)
    assert under.is_empty()
    assert over.is_equal(to_set(CAUSAL))


def test_parameters_other_than_n_stay_symbolic() -> None:
    s = to_set(eq(x.mod(Q, const(4)), var("h")))
    assert set(s.get_var_names(isl.dim_type.param)) == {"n", "h", "H"}
    assert matrix(s, {"n": 8, "H": 8, "h": 2})[:, 0].nonzero()[0].tolist() == [2, 6]


def bombs() -> Iterator[tuple[str, Expr]]:
    for count in (64, 1000):
        unequal = all_of(*(negate(eq(x.mod(Q, const(p)), x.ZERO)) for p in primes(count)))
        yield f"{count} moduli", unequal
        yield f"not {count} moduli", negate(unequal)
        yield f"not {count} zeros", negate(all_of(*(eq(x.mod(Q, const(p)), x.ZERO) for p in primes(count))))
    for count in (128, 3_000):
        columns = any_of(*(eq(K, const(7 * i)) for i in range(count)))
        crosses = any_of(columns, *(eq(Q, const(11 * i)) for i in range(count)))
        yield f"{count} columns", columns
        yield f"not {count} crosses", negate(crosses)
        yield (
            f"{count} diagonals twice",
            product(any_of(*(eq(sub(Q, K), const(i * i)) for i in range(count))), crosses),
        )
    yield "20 strides", strides(primes(20))
    high = absolute = x.ZERO
    for i in range(120):
        high = x.maximum(
            high, x.add(x.mul(const(i * 7 % 13 - 5), Q), x.mul(const(i * 11 % 17 - 8), K), const(i))
        )
        absolute = x.absolute(sub(absolute, x.add(K, const(i))))
    yield "pieces", le(high, const(50))
    yield "nested absolute values", le(absolute, const(5))
    yield (
        "large moduli",
        all_of(
            *(
                lt(x.mod(x.add(Q, x.mul(const(i), K)), const(10**9 + 7 + 2 * i)), const(10**8))
                for i in range(10)
            )
        ),
    )
    tables = [Table(f"t{i}", "int", ("n",)) for i in range(40)]
    yield "many tables", all_of(*(eq(x.lookup(t, Q), x.lookup(t, K)) for t in tables))


def test_every_question_ends_soon() -> None:
    """One test: they take seconds to write, which those who collect this file would all pay."""
    for name, bomb in bombs():
        for ask in (bounds, eliminate):
            start = time.process_time()
            with suppress(AttnError):
                ask(bomb)
            assert time.process_time() - start < 5, name


def test_the_quota_is_lifted_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relation, "OPERATIONS", 10)
    with pytest.raises(AttnError, match="too large to decide for every n"):
        to_set(strides([3, 5, 7]))
    monkeypatch.undo()
    assert isl.DEFAULT_CONTEXT.get_max_operations() == 0
    assert not to_set(CAUSAL).is_empty()


def test_wherever_the_quota_ends_a_product_stays_or_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    window = all_of(CAUSAL, le(sub(Q, K), const(30)))
    dilated = all_of(CAUSAL, eq(x.mod(sub(Q, K), const(3)), x.ZERO))
    mask = product(window, dilated)
    kept = 0
    for operations in range(1000, 8000, 37):
        monkeypatch.setattr(relation, "OPERATIONS", operations)
        kept += eliminate(mask) is mask
    assert 0 < kept < 190
