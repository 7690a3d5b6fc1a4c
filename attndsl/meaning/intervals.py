"""Bounds of the numbers below an expression: integers that could leave 64 bits are refused, not wrapped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from attndsl.errors import fail
from attndsl.expr import INT64, Expr, Table, nodes, render

Interval = tuple[float, float]
"""Least and greatest value; Python integers, so exact, for an integer."""

ANYTHING: Interval = (-math.inf, math.inf)
BOUND_VARIABLE: Interval = (0, 2**31)
SIZE: Interval = (1, 2**31)
NOTHING_FOUND: Mapping[Expr, Interval] = MappingProxyType({})


def check_range(root: Expr, variables: Mapping[str, Interval], tables: Mapping[str, Any]) -> None:
    """Raises AttnError where an integer could leave the 64-bit range.

    The bounds see no guards: `q < 4 and q ** 20 > k` is refused for a long sequence. `variables` gives the
    ranges of the free ones; bound ones are positions. `tables`, arrays or tensors, needs those of integers.
    """
    known: dict[Expr, Interval] = {}
    for node in nodes(root):
        if node.type not in ("int", "real"):
            continue
        known[node] = interval = _interval(node, known, variables, tables)
        if node.type == "int" and not (INT64[0] <= interval[0] and interval[1] <= INT64[1]):
            raise fail(
                f"integer overflow: {render(node)} can leave the 64-bit range",
                help="bound it with min(...) and max(...)",
            )


def stays_within(root: Expr, size: int, found: Mapping[Expr, Interval]) -> bool:
    """Whether no integer at or below it is beyond `size` or its negative; `found` are the ranges of nodes of
    other making."""
    known: dict[Expr, Interval] = {}
    for node in nodes(root):
        known[node] = found.get(node) or _interval(node, known, {}, {})
    whole = (known[node] for node in known if node.type == "int")
    return all(-size <= low and high <= size for low, high in whole)


def bounds(
    root: Expr,
    variables: Mapping[str, Interval],
    tables: Mapping[str, Any],
    found: Mapping[Expr, Interval] = NOTHING_FOUND,
) -> Interval:
    """Least and greatest value, with `variables` and `tables` as of `check_range` and `found` as of
    `stays_within`."""
    known: dict[Expr, Interval] = {}
    for node in nodes(root):
        known[node] = found.get(node) or _interval(node, known, variables, tables)
    return known[root]


def never_negative(e: Expr) -> bool:
    """Whether an integer is at least 0 at all positions, at every length, whatever is given."""
    known: dict[Expr, Interval] = {}
    for node in nodes(e):
        known[node] = _interval(node, known, {"n": SIZE, "nq": SIZE, "H": SIZE, "D": SIZE}, {})
    return known[e][0] >= 0


def _interval(
    e: Expr,
    known: Mapping[Expr, Interval],
    variables: Mapping[str, Interval],
    tables: Mapping[str, Any],
) -> Interval:
    args = [known[arg] for arg in e.args if arg in known]
    if e.op == "const":
        return e.value, e.value  # type: ignore[return-value]
    if e.op == "var":
        return variables.get(str(e.value), BOUND_VARIABLE if e.type == "int" else ANYTHING)
    if isinstance(e.value, Table):
        return _entries(e, e.value, tables)
    if e.op == "where":
        return _hull(args[-2:])
    if e.op in ("min", "max"):
        join = min if e.op == "min" else max
        return join(a[0] for a in args), join(a[1] for a in args)
    if e.op == "add":
        return sum(a[0] for a in args), sum(a[1] for a in args)
    rule = (WHOLE.get(e.op) if e.type == "int" else None) or RULES.get(e.op)
    return rule(*args) if rule else ANYTHING


def _entries(e: Expr, table: Table, tables: Mapping[str, Any]) -> Interval:
    data = table.content(tables)
    if e.op in ("rank_of", "count_of"):
        return 0, 2**31 if data is None else data.shape[-1]
    if data is None:
        return ANYTHING
    if 0 in data.shape:
        return 0, 0
    return data.min().item(), data.max().item()


def _hull(intervals: list[Interval]) -> Interval:
    return min(a[0] for a in intervals), max(a[1] for a in intervals)


def _corners(operation: Callable[[float, float], float]) -> Callable[[Interval, Interval], Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        ends = [operation(x, y) for x in a for y in b]
        return ANYTHING if any(map(math.isnan, ends)) else (min(ends), max(ends))

    return rule


def _times(x: float, y: float) -> float:
    return 0 if x == 0 or y == 0 else x * y


def _quotient(operation: Callable[[float, float], float]) -> Callable[[Interval, Interval], Interval]:
    return lambda a, b: ANYTHING if b[0] <= 0 <= b[1] else _corners(operation)(a, b)


def _absolute(a: Interval) -> Interval:
    return (0 if a[0] <= 0 <= a[1] else min(map(abs, a))), max(map(abs, a))


def _power(a: Interval, b: Interval) -> Interval:
    if b[0] == b[1] and b[0] == int(b[0]) >= 0:
        exponent = int(b[0])
        if max(map(abs, a)) > 1 and exponent * math.log2(max(map(abs, a))) > 1000:
            return ANYTHING
        ends = [x**exponent for x in a]
        return (0 if exponent % 2 == 0 and a[0] <= 0 <= a[1] else min(ends)), max(ends)
    if a[0] <= 0 or max(abs(y * math.log2(x)) for x in a for y in b) > 1000:
        return ANYTHING
    return _corners(lambda x, y: x**y)(a, b)


def _whole_power(a: Interval, b: Interval) -> Interval:
    """Of an integer power, whose exponent is at least 0 wherever it has a value."""
    first, last = max(b[0], 0), max(b[1], 0)
    if first == last:
        return _power(a, (first, first))
    size = max(map(abs, a))
    if size > 1 and last * math.log2(size) > 1000:
        return ANYTHING
    if a[0] >= 1:
        return a[0] ** first, a[1] ** last
    return (-(size**last) if a[0] < 0 else 0), max(1, size**last)


def _monotone(
    function: Callable[[float], float], least: float, most: float
) -> Callable[[Interval], Interval]:
    def rule(a: Interval) -> Interval:
        """A rising function; outside least..most it is not a number."""
        return ANYTHING if a[0] < least or a[1] > most else (function(a[0]), function(a[1]))

    return rule


def _floor(a: Interval) -> Interval:
    return ANYTHING if math.isinf(a[1] - a[0]) else (math.floor(a[0]), math.floor(a[1]))


def _rising(function: Callable[[int], int]) -> Callable[[Interval], Interval]:
    """A rising function of integers that is never negative where it has a value."""
    return lambda a: (0, function(max(int(a[1]), 1)) if math.isfinite(a[1]) else math.inf)


WHOLE: dict[str, Callable[..., Interval]] = {
    "mod": lambda a, b: (0, max(b[1] - 1, 0)),
    "pow": _whole_power,
    "isqrt": _rising(math.isqrt),
    "log2": _rising(lambda x: x.bit_length() - 1),
}
"""Operations that give an integer of integers, and are others of real numbers."""
RULES: dict[str, Callable[..., Interval]] = {
    "mul": _corners(_times),
    "div": _quotient(lambda x, y: x / y),
    "floordiv": _quotient(lambda x, y: x // y),
    "mod": lambda a, b: (0, max(b[1], 0)),
    "abs": _absolute,
    "pow": _power,
    "floor": _floor,
    "exp": _monotone(math.exp, -math.inf, 700.0),
    "log": _monotone(math.log, 5e-324, math.inf),
    "sqrt": _monotone(math.sqrt, 0.0, math.inf),
    "tanh": lambda a: (-1.0, 1.0),
    "sigmoid": lambda a: (0.0, 1.0),
    "sin": lambda a: (-1.0, 1.0),
    "cos": lambda a: (-1.0, 1.0),
}
