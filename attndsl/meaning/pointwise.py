"""The meaning of a mask: a direct recursion over numpy arrays of positions.

Slow and plain on purpose: every other evaluation is checked against this one, so it shares no code with
them but the hash of `random`, which is part of the meaning (links.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import AttnError, fail
from attndsl.expr import Expr, IntSet, Table, nodes
from attndsl.meaning.links import sample

Array = NDArray[Any]
Tables = Mapping[str, Array]

LEAST = {"isqrt": (0, 0), "log2": (0, 1), "pow": (1, 0)}
"""Of integers, which argument must be at least which number."""
LARGEST_ROOT = 3_037_000_499
"""isqrt(2**63 - 1)"""
AT_ONCE = 2**16
"""Positions times members of a bound variable that are evaluated together."""
GUARD = "guard it: write the condition that keeps it inside left of it, with `and`"


def evaluate(expr: Expr, q: Array, k: Array, tables: Tables | None = None) -> Array:
    """`expr` at positions `q` and `k` (int64, broadcast against each other).

    Every other variable has been replaced by a constant. `tables` maps a name to its entries, with the axes
    of the table. Raises AttnError where an int or float table is read out of its range.
    """
    result = _Evaluation({"q": q, "k": k}, tables or {}, expr, {}).value(expr, None)
    return np.broadcast_to(result, np.broadcast_shapes(np.shape(result), q.shape, k.shape))


def segments(values: Array) -> tuple[Array, Array]:
    """For each entry: its rank among equal values along the last axis, and how many are equal."""
    rank, size = np.empty(values.shape, np.int64), np.empty(values.shape, np.int64)
    if values.ndim > 1:
        for row in np.ndindex(values.shape[:-1]):
            rank[row], size[row] = segments(values[row])
        return rank, size
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0]) if len(values) else np.zeros(0, int)
    lengths = np.diff(np.r_[starts, len(values)])
    rank[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    size[order] = np.repeat(lengths, lengths)
    return rank, size


@functools.lru_cache(maxsize=256)
def partial(root: Expr) -> frozenset[Expr]:
    """The nodes that have no value everywhere."""
    found: set[Expr] = set()
    for e in nodes(root):
        limited = e.type == "int" and e.op in LEAST and e.args[LEAST[e.op][0]].op != "const"
        undefined = limited or isinstance(e.value, Table)
        if undefined or any(arg in found for arg in e.args):
            found.add(e)
    return frozenset(found)


class _Evaluation:
    """One recursion: variables, tables, and what was already computed; `draws` are those of all that stand
    inside one another."""

    def __init__(
        self, variables: dict[str, Array], tables: Tables, root: Expr, draws: dict[tuple[object, ...], Array]
    ) -> None:
        self.variables, self.tables, self.draws = variables, tables, draws
        self.partial = partial(root)
        self.memo: dict[tuple[Expr, int], tuple[Array, Array | None]] = {}

    def value(self, e: Expr, active: Array | None) -> Array:
        """`active` says where the value matters: a look-up elsewhere may lie out of range."""
        if e not in self.partial:
            active = None
        known = self.memo.get((e, id(active)))
        if known is None:
            # the memo keeps `active` alive: its id must not be used again
            known = self.memo[e, id(active)] = (self.compute(e, active), active)
        return known[0]

    def compute(self, e: Expr, active: Array | None) -> Array:
        if e.op == "const":
            return np.asarray(e.value)
        if e.op == "var":
            return self.variables[str(e.value)]
        if e.op == "and":
            result = self.value(e.args[0], active)
            for arg in e.args[1:]:
                guard = result if active is None else result & active
                result = result & self.value(arg, guard)
            return result
        if e.op == "exists":
            return self.exists(e, active)
        if e.op == "random":
            return self.random(e, active)
        args = [self.value(arg, active) for arg in e.args]
        if isinstance(e.value, Table):
            return self.look_up(e, e.value, args, active)
        if e.op == "inset":
            assert isinstance(e.value, IntSet)
            return _any([(lo <= args[0]) & (args[0] <= hi) for lo, hi in e.value.intervals])
        if e.type == "int" and e.op in LEAST:
            which, least = LEAST[e.op]
            needed = args[which] < least if active is None else (args[which] < least) & active
            if needed.any():
                bad = np.broadcast_to(args[which], needed.shape)[needed][0]
                undefined = f"{e.op}({bad}) is not a number"
                raise fail(f"a power to {bad} is no integer" if e.op == "pow" else undefined, help=GUARD)
        if e.op == "add":
            return sum(args[1:], start=args[0])
        if e.op == "or":
            return _any(args)
        if e.op == "pow" and e.type == "int":
            return np.asarray(np.power(args[0], np.maximum(args[1], 0)))
        return np.asarray(OPERATIONS[e.op](*args))

    def look_up(self, e: Expr, table: Table, args: list[Array], active: Array | None) -> Array:
        data = table.content(self.tables)
        if e.op in ("rank_of", "count_of"):
            data = segments(data)[0 if e.op == "rank_of" else 1]
        indices = args[1:] if e.op == "intable" else args
        shape = np.broadcast_shapes(*(np.shape(i) for i in indices)) if indices else ()
        inside = np.ones(shape, bool)
        for index, size in zip(indices, data.shape, strict=False):
            inside = inside & (0 <= index) & (index < size)
        if table.dtype != "bool":
            needed = ~inside if active is None else ~inside & active
            if needed.any():
                raise outside(table, e.args, indices, data.shape, needed)
        safe = tuple(
            np.clip(index, 0, max(size - 1, 0)) for index, size in zip(indices, data.shape, strict=False)
        )
        if 0 in data.shape[: len(indices)]:
            return np.zeros(shape, bool)
        found: Array = data[safe]
        if e.op == "intable":
            return inside & _any([found[..., t] == args[0] for t in range(data.shape[-1])])
        return inside & found if table.dtype == "bool" else found

    def exists(self, e: Expr, active: Array | None) -> Array:
        lo, hi = self.value(e.args[0], active), self.value(e.args[1], active)
        name, variables = str(e.value), {x: self.variables[x] for x in e.free}
        shapes = [np.shape(x) for x in (*variables.values(), lo, hi, 0 if active is None else active)]
        step = max(1, AT_ONCE // max(1, math.prod(np.broadcast_shapes(*shapes))))
        shape: tuple[int, ...] = (-1, *[1] * max(map(len, shapes)))
        axis: tuple[int, ...] = (0,)
        if any(x.op == "random" and name in x.args[4].free for x in nodes(e.args[2])):
            # what may be drawn from is evaluated for one row at a time, and one head
            step, shape, axis = 1, (), ()
        found: Array = np.zeros((), bool)
        first, last = int(np.min(lo, initial=0)), int(np.max(hi, initial=0))
        for start in range(first, last, step):
            member = np.arange(start, min(start + step, last)).reshape(shape)
            inner = _Evaluation(variables | {name: member}, self.tables, e.args[2], self.draws)
            holds = (lo <= member) & (member < hi) & inner.value(e.args[2], active)
            found = found | holds.any(axis)
        return found

    def random(self, e: Expr, active: Array | None) -> Array:
        r, row, col = cast(tuple[int, str, str], e.value)
        q, k, n, seed = (self.value(arg, active) for arg in e.args[:4])
        if active is not None:
            q, n = (np.where(active, a, 0) for a in (q, n))
        rows, inverse = np.unique(
            np.stack([a.ravel() for a in np.broadcast_arrays(q, n, seed)]), axis=1, return_inverse=True
        )
        drawn = []
        for position, length, s in rows.T:
            key = (e.value, e.args[4], position, length, s)
            if key not in self.draws or not e.args[4].free <= {row, col}:
                columns = np.arange(length)
                variables = self.variables | {row: np.asarray(position), col: columns}
                inner = _Evaluation(variables, self.tables, e.args[4], self.draws)
                live = columns[np.broadcast_to(inner.value(e.args[4], None), columns.shape)]
                ranks = sample(np.asarray([s]), np.asarray([position]), np.asarray([len(live)]), r)[0]
                self.draws[key] = live[ranks[ranks >= 0]]
            drawn.append(self.draws[key])
        at = inverse.reshape(np.broadcast_shapes(q.shape, n.shape, seed.shape))
        found = np.zeros(np.broadcast_shapes(at.shape, k.shape), bool)
        for slot in range(max(map(len, drawn), default=0)):
            keys = np.array([keys[slot] if slot < len(keys) else -1 for keys in drawn])
            found |= (keys[at] == k) & (k >= 0)
        return found


def outside(
    table: Table, args: Sequence[Expr], indices: Sequence[Array], sizes: Sequence[int], needed: Array
) -> AttnError:
    """The error where an entry is `needed` that is not in the table; it names the first."""
    help = "guard the look-up: write the condition that keeps it inside left of it, with `and`"
    sources = sorted({source.name for arg in args for source in arg.tables})
    if sources:
        help += f"; or mend {', '.join(f'`{name}`' for name in sources)}, where the entry comes from"
    for axis, (index, size) in enumerate(zip(indices, sizes, strict=False)):
        bad = needed & ~((0 <= index) & (index < size))
        if bad.any():
            entry = np.broadcast_to(index, bad.shape)[bad][0]
            return fail(
                f"`{table.name}` has {size} entr{'y' if size == 1 else 'ies'} on axis {axis}, "
                f"but entry {entry} is read",
                help=help,
            )
    raise AssertionError


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _any(truths: Sequence[Array]) -> Array:
    return functools.reduce(np.logical_or, truths, np.zeros((), bool))


def _log2(x: Array) -> Array:
    if not np.issubdtype(x.dtype, np.integer):
        return np.log2(x)
    x = np.maximum(x, 1).astype(np.uint64)
    exponent: Array = np.frexp(x.astype(np.float64))[1] - 1
    # beyond 2**53 the conversion may have rounded up to the next power
    return exponent - (np.uint64(1) << exponent.astype(np.uint64) > x)


def _isqrt(x: Array) -> Array:
    x = np.maximum(x, 0)
    root = np.minimum(np.sqrt(x.astype(np.float64)).astype(np.int64), LARGEST_ROOT)
    root -= root * root > x
    after = np.minimum(root + 1, LARGEST_ROOT)
    return np.where(after * after <= x, after, root)


OPERATIONS: dict[str, Any] = {
    "mul": np.multiply,
    "div": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "pow": np.float_power,
    "min": np.minimum,
    "max": np.maximum,
    "abs": np.abs,
    "where": np.where,
    "log2": _log2,
    "isqrt": _isqrt,
    "floor": lambda x: np.floor(x).astype(np.int64),
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "sin": np.sin,
    "cos": np.cos,
    "not": np.logical_not,
    "le": np.less_equal,
    "lt": np.less,
    "eq": np.equal,
}
