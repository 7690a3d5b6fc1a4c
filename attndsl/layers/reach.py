"""Where information gets in several layers: the union over heads, with radius(0), to that power."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail
from attndsl.expr import (
    TRUE,
    ZERO,
    Expr,
    IntSet,
    all_of,
    any_of,
    const,
    eq,
    exists,
    inset,
    le,
    lt,
    mod,
    mul,
    nodes,
    sub,
    substitute,
    var,
)
from attndsl.meaning.pointwise import evaluate
from attndsl.relations.proofs import subset
from attndsl.relations.relation import distances, domain, eliminate

Bits = NDArray[Any]

SELF = domain("n", "q", "k")
SAME = eq(var("q"), var("k"))
PERIOD = 1 << 16
LONGEST = 1 << 24
"""Largest period of a set of distances, and most positions written out before it repeats."""
RUNS = 2048
"""Runs of distances up to which sums are taken by shifts; of more, by a Fourier transform."""


def product(upper: Expr, lower: Expr) -> Expr:
    """The Boolean matrix product of two masks over positions 0..n-1."""
    used = {x.value for e in (upper, lower) for x in nodes(e) if x.op in ("var", "exists")}
    m = next(name for name in (f"m{i}" for i in range(len(used) + 1)) if name not in used)
    body = all_of(substitute(upper, {"k": var(m)}), substitute(lower, {"q": var(m)}))
    return eliminate(exists(m, ZERO, var("n"), body), SELF)


def over_heads(mask: Expr) -> Expr:
    """What some head relates."""
    return exists("h", ZERO, var("H"), mask) if "h" in mask.free else mask


def joined(mask: Expr) -> Expr:
    """What one layer joins: what some head relates, and each position with itself."""
    return any_of(eliminate(over_heads(mask), SELF), SAME)


def through(steps: Sequence[tuple[Expr, int]]) -> Expr:
    """The pairs joined through masks, from the input on, each of so many layers of some head, for every n;
    the residual stream counts."""
    apart = [_apart(mask) for mask, _ in steps]
    both = [pair for pair in apart if pair is not None]
    if len(both) == len(steps) > 1:
        period = math.lcm(*(side.period for pair in both for side in pair))
        shown = [tuple(side.unrolled(len(side.bits) + period) for side in pair) for pair in both]
        if period <= PERIOD and walkable(cast("list[tuple[Bits, Bits]]", shown)):
            totals = []
            for lower, *others in zip(*both, strict=True):
                sums = [
                    side.over(period).times(layers)
                    for side, (_, layers) in zip((lower, *others), steps, strict=True)
                ]
                totals.append(functools.reduce(Distances.plus, sums))
            return any_of(*(total.mask() for total in totals))
    result = SAME
    for mask, layers in steps:
        step = reach(mask, layers)
        result = step if result is SAME else product(step, result)
    return result


@functools.lru_cache(maxsize=256)
def _apart(mask: Expr) -> tuple[Distances, Distances] | None:
    """Of one layer; those of a stack are few, and asked of each of its prefixes."""
    return sides(joined(mask))


def reach(mask: Expr, layers: int) -> Expr:
    """The pairs joined through `layers` layers of some head, for every n; the residual stream counts."""
    if layers == 0:
        return SAME
    step = joined(mask)
    pair = sides(step)
    if pair is not None:
        return any_of(*(side.times(layers).mask() for side in pair))
    result = step
    for digit in f"{layers:b}"[1:]:
        result = product(result, result)
        result = product(step, result) if digit == "1" else result
    return result


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances d >= 0, where k - q = sign * d: those with `bits[d]`, whose last `period` repeat for ever.

    `last(2) | { q, k : k <= q and (q - k) mod 3 == 0 }` has the distances 0, 1, 3, 6, 9, ...:

        bits 1 1 0 1 0, period 3, sign -1   so 1 1, then 0 1 0 for ever
    """

    bits: Bits
    period: int
    sign: Literal[-1, 1]

    @property
    def start(self) -> int:
        """Where the periodic part begins."""
        return len(self.bits) - self.period

    def unrolled(self, length: int) -> Bits:
        times = max(-(-(length - len(self.bits)) // self.period), 0)
        return cast(Bits, np.r_[self.bits, np.tile(self.bits[self.start :], times)][:length])

    def plus(self, other: Distances) -> Distances:
        """All sums a + b, both sets of one period p.

        If a + b is 2p past both starts together, a or b is p past its own: from p before that, sums repeat.
        """
        length = self.start + other.start + 3 * self.period
        if length > LONGEST:
            raise fail(f"the distances reached exceed the limit of {LONGEST} positions")
        bits = sums(self.unrolled(length), other.unrolled(length))
        return Distances(bits, self.period, self.sign).shortened()

    def shortened(self) -> Distances:
        differ = np.flatnonzero(self.bits[: self.start] != self.bits[self.period : self.start + self.period])
        return Distances(
            self.bits[: (differ[-1] + 1 if len(differ) else 0) + self.period], self.period, self.sign
        )

    def over(self, period: int) -> Distances:
        """The same, written with a multiple of its period."""
        return Distances(self.unrolled(self.start + period), period, self.sign)

    def times(self, count: int) -> Distances:
        """All sums of `count` members."""
        result = self
        for digit in f"{count:b}"[1:]:
            result = result.plus(result)
            result = result.plus(self) if digit == "1" else result
        return result

    def mask(self) -> Expr:
        d = mul(const(self.sign), sub(var("k"), var("q")))
        start, residues = self.start, np.roll(self.bits[self.start :], self.start % self.period)
        early = _member(d, self.bits[:start])
        late = TRUE if residues.all() else inset(mod(d, const(self.period)), _intervals(residues))
        return any_of(early, all_of(le(const(start), d), late))


FEW = 8
"""Runs that are listed; of more, the longest stretch that repeats is written with a residue."""


def _member(d: Expr, bits: Bits) -> Expr:
    """Whether bits[d] is set."""
    starts, _ = runs(bits)
    if len(starts) <= FEW:
        return inset(d, _intervals(bits))
    gaps, counts = np.unique(np.diff(starts), return_counts=True)
    period = int(gaps[counts.argmax()])
    firsts, lasts = runs(bits[period:] == bits[:-period])
    longest = int((lasts - firsts).argmax())
    start, end = int(firsts[longest]), int(lasts[longest]) + period
    residues = np.roll(bits[start : start + period], start % period)
    inside = all_of(
        le(const(start), d), lt(d, const(end)), inset(mod(d, const(period)), _intervals(residues))
    )
    rest = bits.copy()
    rest[start:end] = False
    return any_of(inside, inset(d, _intervals(rest)))


def _intervals(bits: Bits) -> IntSet:
    starts, ends = runs(bits)
    return IntSet.of(zip(starts.tolist(), (ends - 1).tolist(), strict=True))


def runs(bits: Bits) -> tuple[Bits, Bits]:
    """Starts and ends, exclusive, of the runs of set bits of one row."""
    steps = np.diff(np.r_[False, bits, False].astype(np.int8))
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)


def sums(a: Bits, b: Bits) -> Bits:
    """Which numbers below their common length are sums of a member of each."""
    length, total = len(a), 0
    divisor = int(np.gcd.reduce(np.flatnonzero(a | b), initial=0))
    if divisor > 1:
        spaced = np.zeros(length, bool)
        spaced[::divisor] = sums(a[::divisor], b[::divisor])
        return spaced
    if len(runs(a)[0]) > len(runs(b)[0]):
        a, b = b, a
    if len(runs(a)[0]) > RUNS:
        # counts below 2^31 in floats of 53 bits: the error is far below one half
        found = np.fft.irfft(np.fft.rfft(a, 2 * length) * np.fft.rfft(b, 2 * length), 2 * length)
        return cast(Bits, found[:length] > 0.5)
    number = int.from_bytes(np.packbits(b, bitorder="little").tobytes(), "little")
    widths: dict[int, list[int]] = {}
    for start, end in zip(*runs(a), strict=True):
        widths.setdefault(int(end - start), []).append(int(start))
    for width, starts in widths.items():
        smeared, done = number, 1
        while done < width:
            shift = min(done, width - done)
            smeared |= smeared << shift
            done += shift
        for start in starts:
            total |= smeared << start
    data = (total & ((1 << length) - 1)).to_bytes((length + 7) // 8, "little")
    return np.unpackbits(np.frombuffer(data, np.uint8), count=length, bitorder="little").astype(bool)


def sides(step: Expr) -> tuple[Distances, Distances] | None:
    """The distances to keys before and after the query where `step` holds, if it depends on k - q alone.

    None too unless sums of them can be walked inside the sequence.
    """
    held = distances(step, SELF)
    if held is None:
        return None
    before, after = _periodic(held, -1), _periodic(held, 1)
    if before is None or after is None:
        return None
    # two periods, so that what repeats shows as more than one run
    shown = [side.unrolled(len(side.bits) + side.period) for side in (before, after)]
    return (before, after) if walkable([(shown[0], shown[1])]) else None


def walkable(steps: Iterable[tuple[Bits, Bits]]) -> bool:
    """Whether sums of steps, one from each pair of sets of distances, can be walked between their two ends.

    So can steps all of one sign, and steps of every length up to a width to either side: there the partial
    sums can be kept between 0 and the total.
    """
    steps = list(steps)
    return (
        not any(before[1:].any() for before, _ in steps)
        or not any(after[1:].any() for _, after in steps)
        or all(len(runs(side)[0]) <= 1 for pair in steps for side in pair)
    )


def _periodic(held: Expr, sign: Literal[-1, 1]) -> Distances | None:
    """The multiples d of `sign`, not negative, with `held`, a truth over d made of linear comparisons.

    With the period p of its roundings, d = p * y + r, a comparison a * y + b(r) <= 0 is settled once y passes
    all |b / a|. So `d mod 3 == 0 or 2 * d <= 11` repeats from y = 2 on: p = 3, a = 6, and b is -11, -9 or -7.
    """
    held = substitute(held, {"d": mul(const(sign), var("q"))})
    period = _period(held)
    if period > PERIOD:
        return None
    first = np.arange(period)
    turns = 0
    for e in nodes(held):
        if e.op in ("le", "lt", "eq"):
            difference = sub(e.args[0], e.args[1])
            here, next_ = (evaluate(difference, q, q) for q in (first, first + period))
            slope = int(next_[0] - here[0])
            turns = max(turns, int(np.abs(here).max()) // abs(slope) + 1 if slope else 0)
    if (turns + 1) * period > LONGEST:
        return None
    positions = np.arange((turns + 1) * period)
    return Distances(evaluate(held, positions, positions), period, sign).shortened()


def _period(held: Expr) -> int:
    """A p such that q -> q + p changes every number in `held` by a constant."""
    period: dict[Expr, int] = {}
    for e in nodes(held):
        period[e] = math.lcm(*(period[arg] for arg in e.args))
        if e.op in ("floordiv", "mod"):
            period[e] *= int(e.args[1].value)  # type: ignore[call-overload]
    return period[held]


def common_divisor(mask: Expr) -> int:
    """The largest number that divides every k - q, whatever n, head and table; 1 where none is found.

    Each counter-example to a divisor leaves a smaller one to try.
    """
    apart = sub(var("k"), var("q"))
    divisor, verdict = 0, subset(mask, eq(apart, ZERO))
    while verdict.counter_example is not None:
        divisor = math.gcd(divisor, verdict.counter_example["k"] - verdict.counter_example["q"])
        verdict = subset(mask, eq(mod(apart, const(divisor)), ZERO))
    return divisor if divisor and verdict.status == "proved" else 1


def packed(matrix: Bits) -> Bits:
    """Rows of bits as rows of 64-bit words."""
    data = np.packbits(matrix, axis=1, bitorder="little")
    return np.pad(data, ((0, 0), (0, -data.shape[1] % 8))).view(np.uint64)


def matrix_product(a: Bits, b: Bits) -> Bits:
    """The Boolean product of two square matrices packed by rows."""
    return times(a)(b)


def times(a: Bits) -> Callable[[Bits], Bits]:
    """The Boolean product of one square matrix with others, all packed by rows.

    Each row of the result is a union of rows of the other over runs of consecutive ones in a row of `a`; a
    run is two overlapping blocks of 2^i rows. Where runs are many, over bytes of `a`, by a table of 256
    unions.
    """
    n = len(a)
    ones = np.unpackbits(a.view(np.uint8), axis=1, count=n, bitorder="little").view(np.int8)
    steps = np.diff(ones, axis=1, prepend=np.int8(0), append=np.int8(0))
    (row, start), end = np.nonzero(steps == 1), np.nonzero(steps == -1)[1]

    def by_bytes(b: Bits) -> Bits:
        result = np.zeros_like(b)
        for byte, column in enumerate(a.view(np.uint8).T[: (n + 7) // 8]):
            unions = np.zeros((256, b.shape[1]), np.uint64)
            for i, line in enumerate(b[8 * byte : 8 * byte + 8]):
                unions[2**i : 2 ** (i + 1)] = unions[: 2**i] | line
            result |= unions[column]
        return result

    if len(row) > 64 * n:
        return by_bytes
    level = np.frexp(end - start)[1] - 1
    passes: list[list[tuple[Bits, Bits, Bits]]] = []
    for i in range(int(level.max(initial=-1)) + 1):
        passes.append([])
        chosen = np.flatnonzero(level == i)
        while len(chosen):
            # one run of each row at a time: an indexed |= forgets repeated rows
            first = np.r_[True, np.diff(row[chosen]) != 0]
            now, chosen = chosen[first], chosen[~first]
            passes[-1].append((row[now], start[now], end[now] - 2**i))

    def by_runs(b: Bits) -> Bits:
        result = np.zeros_like(b)
        blocks = b
        for i, here in enumerate(passes):
            if i:
                half = 2 ** (i - 1)
                blocks = blocks[:-half] | blocks[half:]
            for rows, low, high in here:
                result[rows] |= blocks[low] | blocks[high]
        return result

    return by_runs
