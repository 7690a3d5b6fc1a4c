"""Which keys decoding still needs, for every n and in words: from the mask as an integer relation.

A key is held at step q >= k if some query at q or later reads it. Keys that are read for ever are held for
ever; what is left is compared with the last keys and the last blocks, and named so only if isl finds the two
sets equal. Tables and draws bound the relation from both sides (relations/relation.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import islpy as isl

from attndsl.errors import AttnError
from attndsl.expr import Expr, const, nodes, substitute
from attndsl.relations.proofs import said
from attndsl.relations.relation import Abstraction, bounds, quota, whole

INTERVALS = 4
"""Intervals of keys that a rule lists."""
PERIOD = 2**20
"""Longest common period of the divisors of a mask that is looked at."""

CAUSAL = "{ [q, k] : 0 <= k <= q }"
READS_ALL = "[n] -> { [q, k] : q = n - 1 and 0 <= k <= q }"
POSITIONS = "[n] -> { [q, k] : 0 <= q < n and 0 <= k < n }"
UNTIL_LAST = "{ [p, k] -> [q, k] : 0 <= k <= q <= p }"
DISTANCE = "{ [q, k] -> [q - k] }"
WAIT = "{ [[q, k] -> [p]] -> [p - q] }"
FROM_ITS_START = "{ [k] -> [q, k] : q >= k }"


@dataclass(frozen=True)
class Eviction:
    """How long keys are held, whatever the tables.

    rule        which keys are held, in words
    bounded     whether their number stays bounded as n grows; None where that was not decided
    everything  the last query reads every key, for every n, so that all n are held there
    enough      numbers a and b such that the first a keys and the last b hold all, where there are such
    horizon     a length at which the peak is that of all longer sequences, where one was found
    """

    rule: str
    bounded: bool | None
    everything: bool = False
    enough: tuple[int, int] | None = None
    horizon: int | None = None


@lru_cache(maxsize=256)
def eviction(mask: Expr, n: int) -> Eviction:
    """Of a mask over q, k and n; its value `n` is used only where n does more than bound the positions."""
    try:
        with quota():
            inner, outer = bounds(mask)
            if isl.Set(READS_ALL).is_subset(inner):
                return Eviction("keep everything", False, everything=True)
            by_n = any("n" in term.free and term.op != "random" for term in _unknowns(mask))
            if not by_n and _same_for_all(inner) and _same_for_all(outer):
                return _derived(mask, inner, outer)
            return _derived_at(substitute(mask, {"n": const(n)}), n)
    except AttnError as error:
        return Eviction(f"keep each key until its last reader ({error.diagnostics[0].message})", None)


def _derived(mask: Expr, inner: isl.Set, outer: isl.Set) -> Eviction:
    pairs, least, most = _everywhere(inner), _held(inner), _held(outer)
    enough = _enough(most)
    bounded = True if enough is not None else False if _enough(least) is None else None
    horizon = None
    if bounded and most.is_subset(least) and not mask.tables:
        horizon = _horizon(pairs, least, _divisors(mask))
    return Eviction(_rule(mask, least, most), bounded, enough=enough, horizon=horizon)


def _derived_at(mask: Expr, n: int) -> Eviction:
    """Of a mask that holds for one length: of its growth nothing is known."""
    inside = isl.Set(f"{{ [q, k] : 0 <= q < {n} and 0 <= k < {n} }}")
    steps = isl.Set(f"{{ [q, k] : 0 <= k <= q < {n} }}")
    pairs = bounds(mask)
    least, most = (_held(s) for s in pairs)
    ended = [_held(s.intersect(inside)) for s in pairs]
    # readers that would come after the end are left out where that makes a difference before it
    if not all(held.intersect(steps).is_subset(end) for held, end in zip((least, most), ended, strict=True)):
        least, most = ended
    rule = "keep everything" if steps.is_subset(least) else _rule(mask, least, most)
    return Eviction(f"at n = {n}: {rule}", None)


def _everywhere(pairs: isl.Set) -> isl.Set:
    """The pairs { [q, k] } of sequences of any length."""
    return pairs.project_out(isl.dim_type.param, 0, pairs.dim(isl.dim_type.param)).coalesce()


def _same_for_all(pairs: isl.Set) -> bool:
    """Whether n does no more than bound the positions."""
    return _everywhere(pairs).intersect(isl.Set(POSITIONS)).is_subset(pairs)


def _held(pairs: isl.Set) -> isl.Set:
    """Keys held at step q, { [q, k] }, in sequences that go on for ever."""
    return _everywhere(pairs).apply(isl.Map(UNTIL_LAST)).coalesce()


def _unknowns(mask: Expr) -> list[Expr]:
    """What in it is no integer relation."""
    abstraction = Abstraction()
    return [abstraction.terms[name].expr for name in abstraction.scope(abstraction(mask))]


def _split(held: isl.Set) -> tuple[isl.Set, isl.Set]:
    """Keys { [k] } that are held for ever, and what is held of the others, { [q, k] }."""
    dropped = isl.Set(CAUSAL).subtract(held).project_out(isl.dim_type.set, 0, 1)
    forever = isl.Set("{ [k] : k >= 0 }").subtract(dropped).coalesce()
    return forever, held.subtract(forever.apply(isl.Map(FROM_ITS_START))).coalesce()


def _enough(held: isl.Set) -> tuple[int, int] | None:
    """How many first and last keys hold all, None where their number has no bound.

    A key's last reader is linear in k on each residue: what is no bounded distance off is ever farther.
    """
    forever, rest = _split(held)
    first, distance = _greatest(forever), _greatest(rest.apply(isl.Map(DISTANCE)))
    return None if first is None or distance is None else (first + 1, distance + 1)


def _greatest(numbers: isl.Set) -> int | None:
    """The greatest of numbers { [x] }, none negative; -1 if there is none, None if they have no end."""
    if numbers.is_empty():
        return -1
    value = numbers.dim_max_val(0)
    return None if value.is_infty() else whole(value)


def _divisors(mask: Expr) -> list[int]:
    """What positions are divided by, and 1, and their least common multiple."""
    divided = (e.args[1] for e in nodes(mask) if e.op in ("floordiv", "mod"))
    found = {1, *(int(d.value) for d in divided if d.op == "const")}  # type: ignore[call-overload]
    return sorted({*found, math.lcm(*found)})


def _rule(mask: Expr, inner: isl.Set, outer: isl.Set) -> str:
    most = _words(outer, _divisors(mask))
    if outer.is_subset(inner):
        return f"keep {most}"
    terms = sorted({said(term) for term in _unknowns(mask)})
    least = "" if inner.is_empty() else f"at least {_words(inner, _divisors(mask))} and "
    return f"keep {least}at most {most}: it depends on {' and '.join(terms)}"


def _words(held: isl.Set, divisors: list[int]) -> str:
    forever, rest = _split(held)
    parts = [] if forever.is_empty() else [_keys(forever, divisors)]
    if not rest.is_empty():
        parts.append(_recent(held, forever, rest, divisors))
    return " and ".join(parts) or "nothing"


def _keys(keys: isl.Set, divisors: list[int]) -> str:
    """A set { [k] } as residues that it holds throughout, and intervals."""
    others = isl.Set("{ [k] : k >= 0 }").subtract(keys)
    for d in divisors:
        residue = isl.Map(f"{{ [k] -> [k mod {d}] }}")
        whole_residues = isl.Set(f"{{ [r] : 0 <= r < {d} }}").subtract(others.apply(residue))
        rest = keys.subtract(whole_residues.apply(residue.reverse()))
        residues, intervals = _intervals(whole_residues), _intervals(rest)
        if residues is not None and intervals is not None:
            texts = [_interval(*interval) for interval in intervals]
            if residues:
                texts.append(_residues(d, residues))
            return " and ".join(texts)
    return "the keys that are read for ever"


def _intervals(numbers: isl.Set) -> list[tuple[int, int | None]] | None:
    """The intervals of a set { [x] }, the last one maybe without an end; None if they are too many."""
    found: list[tuple[int, int | None]] = []
    while not numbers.is_empty():
        if len(found) == INTERVALS:
            return None
        low = whole(numbers.dim_min_val(0))
        gap = isl.Set(f"{{ [x] : x >= {low} }}").subtract(numbers)
        if gap.is_empty():
            return [*found, (low, None)]
        high = whole(gap.dim_min_val(0)) - 1
        found.append((low, high))
        numbers = numbers.intersect(isl.Set(f"{{ [x] : x > {high} }}"))
    return found


def _interval(low: int, high: int | None) -> str:
    if high is None:
        return f"all keys from {low} on" if low else "everything"
    if low == 0:
        return f"the first {high + 1} keys" if high else "the first key"
    return f"keys {low}..{high}" if low < high else f"key {low}"


def _residues(divisor: int, residues: list[tuple[int, int | None]]) -> str:
    if divisor == 1:
        return "everything"
    x = f"k mod {divisor}"
    texts = []
    for low, high in residues:
        if low == high:
            texts.append(f"{x} == {low}")
        elif high == divisor - 1:
            texts.append(f"{x} >= {low}")
        else:
            texts.append(f"{x} <= {high}" if low == 0 else f"{low} <= {x} <= {high}")
    return f"keys with {' or '.join(texts)}"


def _recent(held: isl.Set, forever: isl.Set, rest: isl.Set, divisors: list[int]) -> str:
    """The last keys or the last blocks, if `held` holds just them beside `forever`."""
    prefix = _greatest(forever)
    for d in divisors:
        for origin in sorted({0, 0 if prefix is None or d == 1 else prefix + 1}):
            back = f"floor((q - {origin})/{d}) - floor((k - {origin})/{d})"
            most = _greatest(rest.apply(isl.Map(f"{{ [q, k] -> [{back}] }}")))
            if most is None:
                continue
            if isl.Set(f"{{ [q, k] : {origin} <= k <= q and {back} <= {most} }}").is_subset(held):
                where = f"from key {origin} on " if origin else ""
                return where + _blocks(d, most, forever.is_empty())
    distance = _greatest(rest.apply(isl.Map(DISTANCE)))
    if distance is not None:
        return (
            f"those of the last {distance + 1} keys that are still read"
            if distance
            else "the current key if it is read"
        )
    steps = rest.apply(isl.Map("{ [q, k] -> [[k] -> [q]] }")).unwrap()
    until = steps.set_dim_name(isl.dim_type.in_, 0, "k").lexmax_pw_multi_aff()
    if until.n_piece() == 1 and len(text := str(until).split("-> [(")[-1].split(")]")[0]) <= 40:
        return f"each key k until step {text}"
    return (
        "each other key until its last reader" if not forever.is_empty() else "each key until its last reader"
    )


def _blocks(size: int, back: int, alone: bool) -> str:
    """The positions up to the current one, of the current block and `back` blocks before it."""
    if size == 1:
        return f"the last {back + 1} keys" if back else "the current key"
    if not back:
        return f"the current block of {size}" + f", restarting every {size} tokens" * alone
    before = "the one before it" if back == 1 else f"the {back} before it"
    return f"the current block of {size} and {before}"


def _horizon(pairs: isl.Set, held: isl.Set, divisors: list[int]) -> int | None:
    """A length at which the peak of a bounded number of keys is the peak for ever.

    From step `start` on the keys of a step are those of the step a period before, moved by the period: isl
    shows that the difference of the two sets ends. Each step up to there sees all its later readers.
    """
    forever, rest = _split(held)
    distance, last = _greatest(rest.apply(isl.Map(DISTANCE))), _greatest(forever)
    wait = _greatest(_next_reader(pairs, forever))
    if distance is None or last is None or wait is None:
        return None
    for period in _periods(divisors):
        moved = rest.apply(isl.Map(f"{{ [q, k] -> [q + {period}, k + {period}] }}"))
        there = rest.intersect(isl.Set(f"{{ [q, k] : k >= {period} }}"))
        differ = moved.subtract(there).union(there.subtract(moved))
        end = _greatest(differ.project_out(isl.dim_type.set, 1, 1))
        if end is not None:
            start = max(distance, last, end - period) + 1
            return start + period + max(distance, wait) + 1
    return None


def _periods(divisors: list[int]) -> Iterator[int]:
    """Of roundings side by side, and of roundings of one another."""
    for period in (divisors[-1], math.prod(divisors[:-1])):
        if period <= PERIOD:
            yield period


def _next_reader(pairs: isl.Set, keys: isl.Set) -> isl.Set:
    """Steps { [x] } from where one of `keys` is there to its next reader."""
    readers = pairs.apply(isl.Map("{ [p, k] -> [[q, k] -> [p]] : 0 <= k <= q <= p }")).unwrap()
    there = keys.apply(isl.Map(FROM_ITS_START))
    return readers.intersect_domain(there).lexmin().wrap().apply(isl.Map(WAIT))
