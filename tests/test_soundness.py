"""No verdict on random assertions contradicts brute force, and one of a prover with a flaw does.

Here a part of them at few lengths; `python -m benchmarks.soundness` tries all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, islice

import pytest
from soundness import FEW, BeyondError, Pair, contradiction, pairs
from thin import thin

import attndsl
from attndsl.errors import AttnError
from attndsl.expr import Expr, all_of, eq, le, var
from attndsl.layers import reach
from attndsl.relations import proofs, relation
from attndsl.relations.relation import Abstraction, Translation, domain

PAIRS = 600
TRIED = 100
PARTS = 4


def contradictions(found: Iterator[Pair]) -> Iterator[tuple[Pair, str, str]]:
    """Each pair with the status of its verdict and how brute force disagrees."""
    for pair in found:
        verdict = attndsl.prove(pair.assertion)
        try:
            yield pair, verdict.status, contradiction(pair, verdict, FEW)
        except BeyondError:
            continue


@pytest.mark.parametrize("part", thin(range(PARTS), PARTS))
def test_no_verdict_contradicts_brute_force(part: int) -> None:
    statuses: Counter[str] = Counter()
    seeds = range(part * PAIRS, (part + 1) * PAIRS)
    for pair, status, wrong in contradictions(islice(pairs(seeds), TRIED)):
        assert not wrong, (*pair.key, wrong)
        statuses[status] += 1
    assert statuses["proved"] > 0.32 * TRIED, statuses
    assert statuses["refuted"] > 0.2 * TRIED, statuses
    assert statuses["undecided"] < 0.16 * TRIED, statuses


HEADS = """
attention two { mask sinks(h + 1)  heads 0 { mask causal } else { mask full } }
attention by_table { inputs keep : bool[H, n]  mask { q, k : k in keep } }
attention routed { inputs chosen : int[B, tiles, top]  mask blocks(4, { q, k : k in chosen[q] }) }
"""
FOUND = {
    "a union holds with a head in each group": ("two | none <= {q, k : H > 1}", "proved"),
    "so do layers": ("reach(two, layers = 2) <= {q, k : H > 1}", "proved"),
    "heads that a table tells apart": ("by_table | none <= by_table", "refuted"),
    "looked up at h, heads that a table tells apart": ("{q, k : by_table[h, k]} <= causal", "refuted"),
    "a union is the same at every head": ("{q, k : by_table[h, k] and h == q} <= by_table | none", "proved"),
    "in layers too": ("reach(by_table, layers = 1) <= radius(0) | by_table", "undecided"),
    "a head bound within one that is free": ("two | columns(0..h) <= sinks(2)", "refuted"),
    "a look-up at h is of no other head": (
        "full <= {q, k : two[q, k - h] or k >= 2 * H - 1 or k < h}", "refuted"
    ),
    "tables as long as the whole pattern reads": ("columns([19]) - routed <= none", "refuted"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_wrong(name: str) -> None:
    text, status = FOUND[name]
    (assertion,) = attndsl.parse(f"{HEADS}assert {text}").assertions
    verdict = attndsl.prove(assertion)
    assert verdict.status == status, verdict
    if "routed" in text:
        assert verdict.counter_example is not None
        assert verdict.tables is not None
        n, chosen = verdict.counter_example["n"], verdict.tables["chosen"]
        assert attndsl.parse(HEADS)["routed"].mask(n, chosen=chosen).shape == (1, 1, n, n)


def test_numbers_of_too_few_heads_are_refused() -> None:
    for call in ("nnz(two | none, n = 8, heads = 1)", "diameter(two, n = 8, heads = 1)"):
        with pytest.raises(AttnError, match="2 heads or more"):
            attndsl.parse(f"{HEADS}assert {call} == 3")


def positions_without_end(*names: str) -> Expr:
    if "k" not in names:
        return domain(*names)
    return all_of(domain(*(name for name in names if name != "k")), le(relation.ZERO, var("k")))


BREAKAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def breakage(break_: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    BREAKAGES[break_.__name__.replace("_", " ")] = break_
    return break_


@breakage
def keys_without_an_upper_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(proofs, "domain", positions_without_end)


@breakage
def from_above_where_from_below_is_meant(patch: pytest.MonkeyPatch) -> None:
    projection = Translation.projection
    patch.setattr(Translation, "projection", lambda self, e, upper: projection(self, e, True))


@breakage
def different_entries_of_a_table_taken_as_equal(patch: pytest.MonkeyPatch) -> None:
    facts = Abstraction.facts

    def more(self: Abstraction, names: set[str]) -> Iterator[Expr]:
        yield from facts(self, names)
        for a, b in combinations(sorted(names), 2):
            if self.terms[a].function == self.terms[b].function:
                yield eq(var(a), var(b))

    patch.setattr(Abstraction, "facts", more)


@breakage
def sums_of_distances_that_leave_the_sequence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reach, "walkable", lambda steps: True)


@breakage
def strict_comparisons_taken_as_not_strict(patch: pytest.MonkeyPatch) -> None:
    comparison = Translation.comparison

    def loose(self: Translation, e: Expr, positive: bool) -> object:
        return comparison(self, le(*e.args) if e.op == "lt" and not positive else e, positive)

    patch.setattr(Translation, "comparison", loose)


@pytest.mark.parametrize("name", thin(BREAKAGES, 3))
def test_a_prover_with_a_flaw_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKAGES[name](monkeypatch)
    assert first_contradiction() is not None


def first_contradiction() -> int | None:
    """How many pairs are tried until one contradicts."""
    for tried, pair in enumerate(islice(pairs(range(PAIRS)), PAIRS), 1):
        try:
            verdict = attndsl.prove(pair.assertion)
            if contradiction(pair, verdict, FEW):
                return tried
        except (AttnError, BeyondError):
            continue
    return None
