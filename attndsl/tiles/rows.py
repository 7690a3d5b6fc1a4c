"""Few rows of a mask as intervals of keys, in time that does not grow with the keys.

A truth that compares quasi-affine integers is, for one query, a set of intervals of k:

    floor((a * k + c) / m) >= 0   is   k >= ceil(-c / a) for a > 0, and k <= floor(c / -a) for a < 0

where a and m are constants and c depends on q, n and what else is fixed. So a mask is taken apart once, into
functions of these, and evaluated anew for every row, in Python's integers, which have no range to leave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from attndsl import expr as ir
from attndsl.axis import PIECES, Axis
from attndsl.expr import Expr, IntSet
from attndsl.tiles.blockmask import Spans, intervals

Fixed = Mapping[str, int]
"""All variables but k, and LOW and HIGH: the first position of keys, and the one behind the last."""
LOW, HIGH = "?low", "?high"
Number = Callable[[Fixed], int]
Keys = Callable[[Fixed], Spans]
MEMBERS = 64
"""Intervals of a set up to which it is looked at one by one."""


@functools.lru_cache(maxsize=1024)
def keys_of(mask: Expr) -> Keys | None:
    """The live positions of keys, from LOW to before HIGH, as a function of what is fixed; None for a mask
    with operations that this knows nothing of."""
    args = mask.args
    if mask.op == "const":
        return (lambda at: ((at[LOW], at[HIGH]),)) if mask.value else (lambda at: ())
    if mask.op in ("and", "or", "not"):
        parts = [keys_of(arg) for arg in args]
        if None in parts:
            return None
        of = [part for part in parts if part is not None]
        if mask.op == "and":
            return lambda at: functools.reduce(both, (part(at) for part in of))
        if mask.op == "or":
            return lambda at: either([part(at) for part in of])
        return lambda at: beside(of[0](at), at[LOW], at[HIGH])
    if any(arg.type != "int" for arg in args):
        return None
    if mask.op in ("le", "lt", "eq"):
        low = {"le": 0, "lt": 1, "eq": 0}[mask.op]
        return within(ir.sub(args[1], args[0]), ((low, 0 if mask.op == "eq" else None),))
    if mask.op == "inset" and isinstance(mask.value, IntSet) and len(mask.value.intervals) <= MEMBERS:
        return within(args[0], mask.value.intervals)
    return None


def within(e: Expr, members: Sequence[tuple[int, int | None]]) -> Keys | None:
    """The keys at which an integer lies in one of the intervals, both ends included."""
    found = stepping(e)
    if found is None:
        return None
    a, c, m = found

    def part(at: Fixed, low: int, high: int | None) -> tuple[int, int]:
        # a * k + c >= least, and <= most
        first, end, start = at[LOW], at[HIGH], c(at)
        least = m * low - start
        most = None if high is None else m * high + m - 1 - start
        if a == 0:
            return (first, end) if least <= 0 and (most is None or most >= 0) else (0, 0)
        if a < 0:
            last = (-least) // -a
            return (first if most is None else max(first, -(most // -a))), min(end, last + 1)
        return max(first, -(-least // a)), end if most is None else min(end, most // a + 1)

    if len(members) == 1:
        ((low, high),) = members

        def one(at: Fixed) -> Spans:
            found = part(at, low, high)
            return (found,) if found[0] < found[1] else ()

        return one
    return lambda at: either([(found,) for ends in members if (found := part(at, *ends))[0] < found[1]])


class Stepping(NamedTuple):
    """floor((a * k + c) / m), m positive."""

    a: int
    c: Number
    m: int


def stepping(e: Expr) -> Stepping | None:
    if "k" not in e.free:
        number = fixed(e)
        return None if number is None else Stepping(0, number, 1)
    if e.op == "var":
        return Stepping(1, lambda at: 0, 1)
    if e.op == "add":
        return _sum(e)
    first, second = e.args if len(e.args) == 2 else (e, e)
    factor, divisor = ir.number(first), ir.number(second)
    if e.op == "mul" and isinstance(factor, int) and (found := stepping(second)) is not None:
        a, c, m = found
        if m == 1:
            return Stepping(factor * a, lambda at: factor * c(at), 1)
        if factor == -1:
            return Stepping(-a, lambda at: m - 1 - c(at), m)
    if e.op == "floordiv" and isinstance(divisor, int) and (found := stepping(first)) is not None:
        return found._replace(m=found.m * divisor)
    return None


def _sum(e: Expr) -> Stepping | None:
    """One part alone may step by more than 1: floor(x) + floor(y) is no floor of a sum."""
    moving = [stepping(arg) for arg in e.args if "k" in arg.free]
    rest = fixed(ir.add(ir.ZERO, *(arg for arg in e.args if "k" not in arg.free)))
    if rest is None or len(moving) != 1 or moving[0] is None:
        return None
    a, c, m = moving[0]
    return Stepping(a, lambda at: c(at) + m * rest(at), m)


def fixed(e: Expr) -> Number | None:
    """An integer that no key is in."""
    if e.op == "const" and isinstance(e.value, int):
        value = e.value
        return lambda at: value
    if e.op == "var":
        name = str(e.value)
        return lambda at: at[name]
    parts = [fixed(arg) for arg in e.args]
    if e.type != "int" or None in parts:
        return None
    of = [part for part in parts if part is not None]
    if e.op == "add":
        return lambda at: sum([part(at) for part in of])
    if len(of) != 2:
        return None
    x, y = of
    if e.op == "mul":
        return lambda at: x(at) * y(at)
    if e.op in ("min", "max"):
        pick = min if e.op == "min" else max
        return lambda at: pick(x(at), y(at))
    if e.op in ("floordiv", "mod") and ir.number(e.args[1]) is not None:
        return (lambda at: x(at) // y(at)) if e.op == "floordiv" else (lambda at: x(at) % y(at))
    return None


def both(a: Spans, b: Spans) -> Spans:
    if len(a) == len(b) == 1:
        start, stop = max(a[0][0], b[0][0]), min(a[0][1], b[0][1])
        return ((start, stop),) if start < stop else ()
    found = ((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b)
    return tuple([span for span in found if span[0] < span[1]])


def either(parts: Sequence[Spans]) -> Spans:
    found: list[tuple[int, int]] = []
    for start, stop in sorted([span for part in parts for span in part]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def beside(spans: Spans, low: int, high: int) -> Spans:
    edges = [low, *(edge for span in spans for edge in span), high]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)


def entries(spans: Spans, axis: Axis, batch: int) -> Spans:
    """The keys of a batch row that stand at positions in the intervals."""
    row, length = axis.row(batch), axis.length
    if len(row) > PIECES:
        positions, live = axis.positions(batch), np.zeros(length, bool)
        for start, stop in spans:
            live |= (start <= positions) & (positions < stop)
        return intervals(live)
    if row == ((0, 0),):
        return both(spans, ((0, length),))
    found = []
    for (first, at), end in zip(row, [*(first for first, _ in row[1:]), length], strict=True):
        there = both(spans, ((at, at + end - first),))
        found.append(tuple([(first + a - at, first + b - at) for a, b in there]))
    return either(found)
