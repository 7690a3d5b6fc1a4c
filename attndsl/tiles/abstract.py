"""A mask over many boxes at once: is each empty, full or partial, and what decides its content.

A box is S x S positions. Every integer node takes the value

    base + qi * i + kj * j + rest(i, j)        lo <= rest <= hi

at offset (i, j) of a box, where `rest` is a function of the offsets that `key`, a list of columns, fixes:
two boxes of one size with equal keys have equal rests, whatever their bases. A truth is empty, partial
or full; its key fixes its content and is zero where it is decided. A base enters a key only where it
matters, so a window has a handful of keys whatever n is. Bounds need only be sound: what they leave
undecided, smaller boxes decide, and at last the single positions.

Thus `k - q <= 0`, over boxes of 8 x 8 that begin at (q, k), has the number k - q = base - i + j:

    (16, 0)                 base -16, so -23..-9      full
    (8, 8), (16, 16), ...   base 0, so -7..7          partial, and one key for all of them
    (0, 16)                 base 16, so 9..23         empty
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attndsl.expr import Expr, IntSet, Table, all_of, const, eq, le, lt, neg, nodes, number, rebuild
from attndsl.meaning.pointwise import segments

Array = NDArray[Any]


class Column(NamedTuple):
    """A column of a key: `values` where all of `masks` hold, else 0. Few of its rows are ever needed.

    Every mask is known from the columns: whoever masks a key adds to it a column of new values, never 0,
    under the same mask (`choose`: the status). Of three boxes of which the first is decided:

        values 5 5 9, mask 0 1 1   gives   0 5 9
        added  3 1 1, mask 0 1 1   gives   0 1 1: it tells a 0 that is masked from a value 0
    """

    values: Array
    masks: tuple[Array, ...] = ()


Key = Sequence[Column]


EMPTY, PARTIAL, FULL = 0, 1, 2
KEY_LIMIT = 24
"""Columns of one key; more become one column of numbers, or shared parts would double them at every step."""
KNOWN_LIMIT = 2**22
"""Entries of the keys that are remembered with their numbers, for one node and one size of boxes."""
LARGEST = 2**58
"""A node whose values could be larger is not followed, so that no bound overflows int64."""


@dataclass(frozen=True)
class Frame:
    """The matrix: how many rows and columns."""

    q: int
    k: int


class Boxes(NamedTuple):
    """Boxes of `size` x `size` with their first positions, and their last offsets inside the matrix.

    Arrays along q and along k broadcast against each other, and so do all that are computed from them:
    what depends on q alone is computed once for all boxes beside each other.
    """

    q: Array
    k: Array
    size: int
    q_last: Array
    k_last: Array


def boxes_at(frame: Frame, q: Array, k: Array, size: int) -> Boxes:
    return Boxes(q, k, size, within(frame.q - 1 - q, size - 1), within(frame.k - 1 - k, size - 1))


def within(x: Array, most: int) -> Array:
    """x, but at least 0 and at most `most`. (np.clip takes three times as long where there are few.)"""
    return np.minimum(np.maximum(x, 0), most)


class Truths(NamedTuple):
    status: Any
    key: Key


class Ints(NamedTuple):
    """`wild`: a look-up below may be out of its range, so nothing that depends on it may be decided."""

    base: Any
    qi: Any = 0
    kj: Any = 0
    lo: Any = 0
    hi: Any = 0
    key: Key = ()
    wild: Any = False


Leaves = Mapping[Expr, Callable[[Boxes], Truths]]


class Signatures:
    """A mask, or an integer, over boxes.

    `leaves` answers for nodes that tiling treats itself, such as sets of links.
    """

    def __init__(
        self,
        mask: Expr,
        frame: Frame,
        tables: Mapping[str, Array],
        leaves: Leaves,
    ) -> None:
        self.mask, self.frame, self.tables, self.leaves = mask, frame, tables, leaves
        self.order = followed(mask, leaves)
        self.magnitude: dict[Expr, float] = {}
        for node in self.order:
            self.magnitude[node] = self.largest(node)
        self.parts: dict[Expr, _Part] = {}
        self.numbers: dict[tuple[Expr, int], Numbers] = {}

    def __call__(self, q: Array, k: Array, size: int) -> tuple[Array, list[Array]]:
        """Status int8 of the boxes at (q, k), broadcast against each other, and the key columns of the
        partial ones, in their order. A box that sticks out of the matrix is partial at most.
        """
        boxes = boxes_at(self.frame, q, k, size)
        rows, cols = within(self.frame.q - q, size), within(self.frame.k - k, size)
        inside = np.minimum(rows, cols)
        truth: Truths = self.root(boxes)
        status = np.minimum(status_of(inside == size, inside > 0), truth.status)
        return status, rows_of((Column(rows), Column(cols), *truth.key), status == PARTIAL)

    def root(self, boxes: Boxes) -> Any:
        values: dict[Expr, Any] = {}
        for node in self.order:
            value = self.value(node, boxes, [values.get(arg) for arg in node.args])
            if len(value.key) > KEY_LIMIT:
                numbers = self.numbers.setdefault((node, boxes.size), Numbers())
                value = value._replace(key=numbers(value.key, node.type != "bool" or value.status == PARTIAL))
            values[node] = value
        return values[self.mask]

    def bounds(self) -> tuple[int, int] | None:
        """Least and greatest value of an integer over the matrix, if known."""
        origin = np.array([0])
        boxes = boxes_at(self.frame, origin, origin, max(self.frame.q, self.frame.k))
        value: Ints = self.root(boxes)
        if np.any(value.wild):
            return None
        lo, hi = span(value, boxes)
        return int(np.min(lo)), int(np.max(hi))

    def largest(self, node: Expr) -> float:
        """A bound of |node| over the matrix; infinite where it is not followed."""
        args = [self.magnitude.get(arg, math.inf) for arg in node.args]
        match node.op:
            case _ if node.type != "int" or _opaque(node):
                bound = math.inf if node.op != "const" else abs(float(node.value))  # type: ignore[arg-type]
            case "const":
                bound = abs(node.value)  # type: ignore[arg-type]
            case "var":
                # boxes stick out of the matrix
                bound = 32 * (self.frame.q + self.frame.k) + 2**16
            case "add":
                bound = sum(args)
            case "mul":
                bound = args[0] * args[1]
            case "mod":
                bound = args[1] if args[0] < LARGEST else math.inf
            case "where":
                bound = args[1] + args[2]
            case "pow":
                bound = max(args[0], 1) ** args[1] if args[1] < 64 and args[0] < LARGEST else math.inf
            case "log2":
                bound = math.log2(max(args[0], 1))
            case "lookup":
                data = _table(node).content(self.tables)
                bound = 2 * max(-int(data.min()), int(data.max()), 0) if data.size else 0
            case "rank_of" | "count_of":
                bound = 2 * _table(node).content(self.tables).size
            case _:
                bound = sum(args)
        return bound if bound < LARGEST else math.inf

    def value(self, node: Expr, boxes: Boxes, args: list[Any]) -> Any:
        if node in self.leaves:
            return self.leaves[node](boxes)
        if node.type == "bool":
            return self.truth(node, boxes, args)
        if node.type != "int" or math.isinf(self.magnitude[node]):
            return Ints(0, key=_position(node, boxes), wild=True)
        match node.op:
            case "const":
                return Ints(node.value)
            case "var":
                return Ints(boxes.q, qi=1) if node.value == "q" else Ints(boxes.k, kj=1)
            case "add":
                return linear([(1, arg) for arg in args])
            case "mul" if node.args[0].op == "const":
                return linear([(integer(node.args[0]), args[1])])
            case "mul":
                return product(args[0], args[1], boxes)
            case "mod":
                return remainder(args[0], integer(node.args[1]), boxes)
            case "floordiv":
                return quotient(args[0], integer(node.args[1]), boxes)
            case "min":
                return extreme(args[0], args[1], 1, boxes)
            case "max":
                return extreme(args[0], args[1], -1, boxes)
            case "abs":
                return absolute(args[0], boxes)
            case "where":
                return choose(args[0], args[1], args[2], boxes, shift=True)
            case "pow":
                return power(args[0], args[1], boxes)
            case "isqrt":
                return monotone(args[0], isqrt, 0, boxes)
            case "log2":
                return monotone(args[0], log2, 1, boxes)
            case _:
                return self.look_up(node, boxes, args)

    def truth(self, node: Expr, boxes: Boxes, args: list[Any]) -> Truths:
        match node.op:
            case "const":
                return Truths(np.int8(FULL if node.value else EMPTY), ())
            case "and":
                return connect(args, np.minimum)
            case "or":
                return connect(args, np.maximum)
            case "not":
                return Truths(FULL - args[0].status, args[0].key)
            case "le" | "lt" | "eq":
                return self.compare(node, boxes, args)
            case "inset":
                return member(args[0], node.value, boxes)  # type: ignore[arg-type]
            case "lookup":
                found: Ints = self.look_up(node, boxes, args)
                # the look-up is 0 or 1, or lies between them
                one = found.base == 1
                return undecided(status_of(one, one | (found.lo != found.hi)), found)
            case _:
                return Truths(np.int8(PARTIAL), _position(node, boxes))

    def compare(self, node: Expr, boxes: Boxes, args: list[Any]) -> Truths:
        difference = linear([(1, args[0]), (-1, args[1])])
        lo, hi = span(difference, boxes)
        if node.op == "eq":
            status = status_of((lo == 0) & (hi == 0), (lo <= 0) & (hi >= 0))
        else:
            most = 0 if node.op == "le" else -1
            status = status_of(hi <= most, lo <= most)
        return undecided(status, difference)

    def look_up(self, node: Expr, boxes: Boxes, args: list[Any]) -> Ints:
        """A look-up (also `rank_of`, `count_of`): constant indices first select a part of the table."""
        table = _table(node)
        part = self.parts.get(node)
        if part is None:
            part = self.parts[node] = _part(node, table.content(self.tables))
        indices = [arg for arg, index in zip(args, node.args, strict=True) if index.op != "const"]
        key = [column for index in indices for column in _open(index)]
        wild: Any = False
        for index in indices:
            wild = wild | index.wild
        if part.data is None:
            return Ints(0, key=key, wild=True)
        spans = [span(index, boxes) for index in indices]
        out: Any = False
        missed: Any = False
        for (start, end), size in zip(spans, part.data.shape, strict=True):
            out = out | (start < 0) | (end >= size)
            missed = missed | (end < 0) | (start >= size)
        inside = [
            (np.clip(start, 0, size - 1), np.clip(end, 0, size - 1))
            for (start, end), size in zip(spans, part.data.shape, strict=True)
        ]
        least, most = part.bounds(inside) if part.data.size else (np.int64(0), np.int64(0))
        if table.dtype == "bool":
            return between(np.where(out, 0, least), np.where(missed, 0, most), key, wild)
        return between(least, most, key, wild | out)


class Extremes:
    """Least and greatest value of any stretch of a one-axis table, by a sparse table."""

    def __init__(self, values: Array) -> None:
        small = values.size == 0 or max(-int(values.min()), int(values.max())) < 2**31
        values = values.astype(np.int32 if small else np.int64)
        self.levels = [(values, values)]
        while 2 ** len(self.levels) <= len(values):
            half = 2 ** (len(self.levels) - 1)
            least, most = self.levels[-1]
            self.levels.append(
                (np.minimum(least[:-half], least[half:]), np.maximum(most[:-half], most[half:]))
            )

    def __call__(self, start: Array, end: Array) -> tuple[Array, Array]:
        """Over start..end inclusive, both inside the table."""
        level = np.frexp(end - start + 1)[1] - 1
        least, most = np.empty(level.shape, np.int64), np.empty(level.shape, np.int64)
        for power in np.unique(level):
            at = level == power
            low, high = self.levels[power]
            first, second = start[at], end[at] - 2 ** int(power) + 1
            least[at] = np.minimum(low[first], low[second])
            most[at] = np.maximum(high[first], high[second])
        return least, most


class Rectangles:
    """Whether all, and whether some entries of a rectangle of a bool table hold, by sums of what is above and
    left of its corners."""

    def __init__(self, data: Array) -> None:
        self.data = data
        self.all_corners: Array | None = None

    def __call__(self, top: Array, bottom: Array, left: Array, right: Array) -> tuple[Array, Array]:
        """Least and greatest entry; bottom and right are inside."""
        b, r = bottom + 1, right + 1
        rows, cols = np.unique(np.append(top, b)), np.unique(np.append(left, r))
        if self.all_corners is None and SPARSE * len(rows) * len(cols) < self.data.size:
            sums = _corners(self.data, rows, cols)
            at = [np.searchsorted(*pair) for pair in ((rows, top), (rows, b), (cols, left), (cols, r))]
        else:
            if self.all_corners is None:
                self.all_corners = _corners(self.data, *(np.arange(size + 1) for size in self.data.shape))
            sums, at = self.all_corners, [top, b, left, r]
        above, below, before, behind = at
        live = sums[below, behind] - sums[above, behind] - sums[below, before] + sums[above, before]
        return (live == (b - top) * (r - left)).astype(np.int64), (live > 0).astype(np.int64)


SPARSE = 16
"""Entries for each corner from which on only what lies between corners is added up."""


def _corners(data: Array, rows: Array, cols: Array) -> Array:
    """How many entries hold from the first of these rows and columns to before each."""
    sums = np.zeros((len(rows), len(cols)), np.int64)
    if len(rows) > 1 and len(cols) > 1:
        # bools are added fast along the axis in which they are adjacent, and fastest in bytes
        narrow = np.uint8 if np.diff(cols).max() < 256 else np.int32
        by_row = np.add.reduceat(data[: rows[-1], : cols[-1]], cols[:-1], axis=1, dtype=narrow)
        cells = np.add.reduceat(by_row, rows[:-1], axis=0, dtype=np.int32)
        sums[1:, 1:] = cells.cumsum(0, dtype=np.int64).cumsum(1)
    return sums


@dataclass(frozen=True, eq=False)
class _Part:
    """A table with some axes fixed (None: fixed outside of it), and bounds of its values over boxes."""

    data: Array | None
    bounds: Callable[[list[tuple[Array, Array]]], tuple[Array, Array]]


def selected(data: Array, indices: Sequence[Expr]) -> tuple[Array, bool]:
    """The part of a table that its constant indices leave, and whether they are in its range."""
    fixed = [(axis, integer(index)) for axis, index in enumerate(indices) if index.op == "const"]
    if any(not 0 <= index < data.shape[axis] for axis, index in fixed):
        return data, False
    at: list[Any] = [slice(None)] * data.ndim
    for axis, index in fixed:
        at[axis] = index
    return np.asarray(data[tuple(at)]), True


def integer(e: Expr) -> int:
    """The value of a constant."""
    assert isinstance(e.value, int)
    return e.value


def _part(node: Expr, data: Array) -> _Part:
    if node.op != "lookup":
        data = segments(data)[0 if node.op == "rank_of" else 1]
    data, inside = selected(data, node.args)
    if not inside:
        return _Part(None, lambda spans: (np.zeros(0), np.zeros(0)))
    if data.ndim == 1:
        extremes = Extremes(data)
        return _Part(data, lambda spans: extremes(*spans[0]))
    if data.ndim == 2 and data.dtype == bool:
        rectangles = Rectangles(data)
        return _Part(data, lambda spans: rectangles(*spans[0], *spans[1]))
    return _Part(data, lambda spans: _coarse(data, spans))


def _coarse(data: Array, spans: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The value itself at single entries, the extremes of the whole table elsewhere."""
    single: Any = True
    for start, end in spans:
        single = single & (start == end)
    found = np.asarray(data[tuple(start for start, _ in spans)], np.int64)
    return np.where(single, found, int(data.min())), np.where(single, found, int(data.max()))


def _table(node: Expr) -> Table:
    assert isinstance(node.value, Table)
    return node.value


def _opaque(node: Expr) -> bool:
    """Known by position only: nothing below it is looked at."""
    match node.op:
        case "floordiv" | "mod":
            divisor = node.args[1]
            return node.type != "int" or divisor.op != "const" or divisor.value < 1  # type: ignore[operator]
        case "floor" | "exists" | "intable" | "random":
            return True
        case _:
            return node.type not in ("int", "bool")


def odd(values: Any) -> Column:
    """A new column that is nowhere 0 and tells the values."""
    return Column(np.asarray(2 * values + 1))


def _position(node: Expr, boxes: Boxes) -> Key:
    key = [odd(boxes.q)] if "q" in node.free else []
    return [*key, odd(boxes.k)] if "k" in node.free or not key else key


def prepared(mask: Expr) -> Expr:
    """An equal mask that boxes decide better: a comparison with a real constant is one of integers, and
    |x| <= y is two comparisons.
    """
    done: dict[Expr, Expr] = {}
    for node in nodes(mask):
        args = tuple(done[arg] for arg in node.args)
        done[node] = rebuild(node, args)
        if node.op in ("le", "lt") and args[0].op == "abs" and args[0].type == args[1].type == "int":
            inner, compare = args[0].args[0], le if node.op == "le" else lt
            done[node] = all_of(compare(inner, args[1]), compare(neg(inner), args[1]))
        if node.op in ("le", "lt", "eq") and {arg.type for arg in args} == {"int", "real"}:
            a, b = args
            x = number(a) if a.type == "real" else number(b)
            if x is None or not abs(x) < 2**53:
                continue
            down, up = const(math.floor(x)), const(math.ceil(x))
            if node.op == "eq":
                done[node] = eq(a if a.type == "int" else b, down) if down is up else const(False)
            elif node.op == "le":
                done[node] = le(up, b) if a.type == "real" else le(a, down)
            else:
                done[node] = lt(down, b) if a.type == "real" else lt(a, up)
    return done[mask]


def linear(parts: list[tuple[int, Ints]]) -> Ints:
    """The sum of c * x."""
    first, *rest = (x if c == 1 else scaled(c, x) for c, x in parts)
    base, qi, kj, lo, hi, key, wild = first
    for x in rest:
        base, qi, kj, lo, hi = base + x.base, qi + x.qi, kj + x.kj, plus(lo, x.lo), plus(hi, x.hi)
        key, wild = [*key, *x.key], wild | x.wild
    return Ints(base, qi, kj, lo, hi, key, wild)


def _varies(value: Any) -> bool:
    """Whether it is more than a plain 0, which need not be spread over the boxes."""
    return not (isinstance(value, int) and value == 0)


def plus(a: Any, b: Any) -> Any:
    """a + b, which costs nothing where one is a plain 0."""
    if not _varies(a):
        return b
    return a + b if _varies(b) else a


def scaled(c: int, x: Ints) -> Ints:
    lo, hi = (x.lo, x.hi) if c > 0 else (x.hi, x.lo)
    return Ints(c * x.base, c * x.qi, c * x.kj, c * lo, c * hi, x.key, x.wild)


def unless(where: Array, value: Any) -> Any:
    return np.where(where, 0, value) if _varies(value) else 0


def reach(x: Ints, boxes: Boxes) -> tuple[Any, Any]:
    """Least and greatest value less the base."""
    lo, hi = x.lo, x.hi
    for slope, last in ((x.qi, boxes.q_last), (x.kj, boxes.k_last)):
        along = slope * last
        if not isinstance(slope, int):
            lo, hi = lo + np.minimum(along, 0), hi + np.maximum(along, 0)
        elif slope < 0:
            lo = plus(lo, along)
        elif slope > 0:
            hi = plus(hi, along)
    return lo, hi


def span(x: Ints, boxes: Boxes) -> tuple[Any, Any]:
    """Least and greatest value."""
    lo, hi = reach(x, boxes)
    return x.base + lo, x.base + hi


def masked(where: Array, key: Key) -> Key:
    return [Column(column.values, (*column.masks, where)) for column in key]


def rows_of(key: Key, wanted: Array) -> list[Array]:
    """The rows of each different column where `wanted`.

    Columns of the same values become one, masked where all of them are. That loses nothing: what a mask
    tells, the column added with it tells too.
    """
    places = {wanted.shape: np.flatnonzero(wanted)}
    known: dict[tuple[int, ...], Array] = {}

    def gather(values: Any) -> Array:
        array: Array = np.asarray(values)
        if array.shape not in places:
            index = np.arange(array.size).reshape(array.shape)
            places[array.shape] = np.broadcast_to(index, wanted.shape).take(places[wanted.shape])
        return array.take(places[array.shape])

    def live(masks: tuple[Array, ...]) -> Array:
        names = tuple(map(id, masks))
        if names not in known:
            first = gather(masks[0])
            known[names] = first & live(masks[1:]) if masks[1:] else first
        return known[names]

    groups: dict[int, list[Column]] = {}
    for column in key:
        groups.setdefault(id(column.values), []).append(column)
    result = []
    for columns in groups.values():
        values = gather(columns[0].values)
        if all(column.masks for column in columns):
            chains = {tuple(map(id, column.masks)): column.masks for column in columns}
            values = values * functools.reduce(np.logical_or, map(live, chains.values()))
        result.append(values)
    return result


class Numbers:
    """Different keys, numbered as they come."""

    def __init__(self) -> None:
        self.rows: list[Array] = []
        self.ids = np.zeros(0, np.int64)
        self.count = 0

    def __call__(self, key: Key, wanted: Any) -> Key:
        """One column that is equal where the rows of the key are, and 0 where they are not `wanted`."""
        shapes = {np.shape(array) for column in key for array in (column.values, *column.masks)}
        wanted = np.broadcast_to(wanted, np.broadcast_shapes((1,), np.shape(wanted), *shapes))
        column, count = np.zeros(wanted.shape, np.int64), int(np.count_nonzero(wanted))
        if count <= 8 * len(key):
            # so few are told apart for less than it takes to compare them
            column[wanted] = self.new(count)
            return [Column(column)]
        rows = rows_of(key, wanted)
        if not self.rows or len(rows) * len(self.ids) > KNOWN_LIMIT:
            # what is forgotten gets new numbers: boxes are told apart that are equal, which costs time alone
            self.rows, self.ids = [np.zeros(0, np.int64)] * len(rows), np.zeros(0, np.int64)
        known = len(self.ids)
        self.rows = [np.concatenate(pair) for pair in zip(self.rows, rows, strict=True)]
        some, which = unique(pack(self.rows, known + len(rows[0])))
        ids = np.zeros(len(some), np.int64)
        ids[which[:known]] = self.ids
        new = np.flatnonzero(ids == 0)
        ids[new] = self.new(len(new))
        kept = np.concatenate([np.arange(known), some[new]])
        self.rows, self.ids = [values[kept] for values in self.rows], np.concatenate([self.ids, ids[new]])
        column[wanted] = ids[which[known:]]
        return [Column(column)]

    def new(self, count: int) -> Array:
        self.count += count
        return np.arange(self.count - count, self.count) + 1


def pack(columns: Any, length: int) -> Array:
    """One int64 per row, equal exactly where the rows are."""
    code, radix = np.zeros(length, np.int64), 1
    if length == 0:
        return code
    for column in columns:
        low = int(column.min())
        width = int(column.max()) - low + 1
        if width == 1:
            continue
        if radix * width >= 2**62:
            first, code = unique(code)
            radix = len(first)
        if radix * width >= 2**62:
            first, column = unique(column)
            low, width = 0, len(first)
        code, radix = code * width + (column - low), radix * width
    return code


def unique(code: Array) -> tuple[Array, Array]:
    """An index of each distinct value, and for each element the number of its value."""
    if len(code) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    low, high = int(code.min()), int(code.max())
    if high - low > 4 * len(code) + 1024:
        _, first, index = np.unique(code, return_index=True, return_inverse=True)
        return first, index
    seat = np.full(high - low + 1, -1)
    seat[code - low] = np.arange(len(code))
    present = seat >= 0
    return seat[present], (np.cumsum(present) - 1)[code - low]


def followed(root: Expr, leaves: Leaves) -> list[Expr]:
    """The nodes that are evaluated for root, arguments first."""
    inside: list[Expr] = []
    needed = {root}
    for node in reversed(list(nodes(root))):
        if node in needed:
            inside.append(node)
            needed.update(() if node in leaves or _opaque(node) else node.args)
    return inside[::-1]


def between(least: Any, most: Any, key: Key, wild: Any) -> Ints:
    """What is known by its bounds alone: a base where they meet, otherwise fixed by the key."""
    open_ = (least != most) | wild
    return Ints(
        np.where(open_, 0, least), 0, 0, np.where(open_, least, 0), np.where(open_, most, 0),
        masked(open_, key), wild,
    )  # fmt: skip


def remainder(x: Ints, m: int, boxes: Boxes) -> Ints:
    start = x.base % m
    lo, hi = reach(x, boxes)
    turn = (start + lo) // m
    wraps = (turn != (start + hi) // m) | x.wild
    return Ints(
        np.where(wraps, 0, start - turn * m),
        unless(wraps, x.qi),
        unless(wraps, x.kj),
        unless(wraps, x.lo),
        np.where(wraps, m - 1, x.hi),
        [*masked(wraps, [odd(start)]), *x.key],
        x.wild,
    )


def quotient(x: Ints, m: int, boxes: Boxes) -> Ints:
    start = x.base % m
    lo, hi = reach(x, boxes)
    first, last = (start + lo) // m, (start + hi) // m
    moves = (first != last) | x.wild
    return Ints(
        x.base // m + np.where(moves, 0, first), 0, 0, np.where(moves, first, 0), np.where(moves, last, 0),
        masked(moves, [odd(start), *x.key]), x.wild,
    )  # fmt: skip


def choose(cond: Truths, x: Ints, y: Ints, boxes: Boxes, *, shift: bool) -> Ints:
    """x where cond is full, y where it is empty. `shift`: cond's key does not fix y.base - x.base."""
    first, second, both = cond.status == FULL, cond.status == EMPTY, cond.status == PARTIAL
    x_lo, x_hi = reach(x, boxes)
    y_lo, y_hi = reach(y, boxes)
    apart = y.base - x.base

    def pick(a: Any, b: Any, c: Any) -> Any:
        return np.where(first, a, np.where(second, b, c))

    key = [Column(cond.status), *cond.key, *masked(~second, x.key), *masked(~first, y.key)]
    return Ints(
        pick(x.base, y.base, x.base),
        pick(x.qi, y.qi, 0) if _varies(x.qi) or _varies(y.qi) else 0,
        pick(x.kj, y.kj, 0) if _varies(x.kj) or _varies(y.kj) else 0,
        pick(x.lo, y.lo, np.minimum(x_lo, apart + y_lo)),
        pick(x.hi, y.hi, np.maximum(x_hi, apart + y_hi)),
        [*key, Column(apart, (both,))] if shift else key,
        pick(x.wild, y.wild, x.wild | y.wild),
    )


def extreme(x: Ints, y: Ints, sign: int, boxes: Boxes) -> Ints:
    """min for sign 1, max for sign -1."""
    difference = linear([(sign, x), (-sign, y)])
    lo, hi = span(difference, boxes)
    cond = undecided(status_of(hi <= 0, lo <= 0), difference)
    chosen = choose(cond, x, y, boxes, shift=False)
    x_lo, x_hi = reach(x, boxes)
    y_lo, y_hi = reach(y, boxes)
    both, apart = cond.status == PARTIAL, y.base - x.base
    if sign == 1:
        return chosen._replace(hi=np.where(both, np.minimum(x_hi, apart + y_hi), chosen.hi))
    return chosen._replace(lo=np.where(both, np.maximum(x_lo, apart + y_lo), chosen.lo))


def absolute(x: Ints, boxes: Boxes) -> Ints:
    return extreme(x, linear([(-1, x)]), -1, boxes)


def product(x: Ints, y: Ints, boxes: Boxes) -> Ints:
    corners = np.stack([a * b for a in span(x, boxes) for b in span(y, boxes)])
    key = [*_open(x), *_open(y)]
    return between(corners.min(0), corners.max(0), key, x.wild | y.wild)


def monotone(x: Ints, function: Callable[[Array], Array], least: int, boxes: Boxes) -> Ints:
    """A rising function, defined from `least` on."""
    lo, hi = span(x, boxes)
    wild = x.wild | (lo < least)
    return between(function(np.maximum(lo, least)), function(np.maximum(hi, least)), _open(x), wild)


def power(x: Ints, y: Ints, boxes: Boxes) -> Ints:
    (lo, hi), (first, last) = span(x, boxes), span(y, boxes)
    wild = x.wild | y.wild | (first < 0)
    first, last = np.maximum(first, 0), np.maximum(last, 0)
    fixed = first == last
    even = fixed & (last % 2 == 0)
    lo, hi = (
        np.where(even, np.maximum(np.maximum(lo, -hi), 0), lo),
        np.where(even, np.maximum(-lo, hi), hi),
    )
    # with a negative base the sign may change with the exponent: only the size is followed
    rises, size = fixed | (lo >= 1), np.maximum(np.maximum(-lo, hi), 1) ** last
    least = np.where(rises, lo**first, np.where(lo < 0, -size, 0))
    return between(least, np.where(rises, hi**last, size), [*_open(x), *_open(y)], wild)


def isqrt(x: Array) -> Array:
    root = np.sqrt(x.astype(np.float64)).astype(np.int64)
    root -= root * root > x
    return np.asarray(root + ((root + 1) * (root + 1) <= x))


def log2(x: Array) -> Array:
    return np.asarray(np.searchsorted(1 << np.arange(62), x, side="right") - 1)


def _open(x: Ints) -> Key:
    """The key of a function of x that does not commute with shifts."""
    return [odd(x.base), *x.key]


def status_of(full: Any, live: Any) -> Array:
    """The status of boxes that are full where `full`, which implies `live`, and empty where not `live`."""
    status: Array = np.add(full, live, dtype=np.int8)
    return status


def undecided(status: Array, x: Ints) -> Truths:
    """A truth that a shift of x would change: where it is partial, x.base joins the key."""
    if x.wild is not False:
        status = np.where(x.wild, np.int8(PARTIAL), status)
    partial = status == PARTIAL
    return Truths(status, masked(partial, _open(x)))


def connect(parts: list[Truths], join: Callable[[Array, Array], Array]) -> Truths:
    """`and` (join = minimum) or `or` (maximum)."""
    status = parts[0].status
    for part in parts[1:]:
        status = join(status, part.status)
    partial = status == PARTIAL
    return Truths(
        status, masked(partial, [Column(partial), *(column for part in parts for column in part.key)])
    )


def member(x: Ints, members: IntSet, boxes: Boxes) -> Truths:
    """x in a constant set. One or two edges of the set within reach fix the content by their distances."""
    edges = np.array([edge for lo, hi in members.intervals for edge in (lo, hi + 1)], np.int64)
    lo, hi = span(x, boxes)
    first, last = np.searchsorted(edges, lo, side="right"), np.searchsorted(edges, hi, side="right")
    within = last - first
    status = np.where(within > 0, PARTIAL, np.where(first % 2 == 1, FULL, EMPTY))
    status = np.where(x.wild, PARTIAL, status).astype(np.int8)
    partial = status == PARTIAL
    few = (within == 1) | (within == 2)
    top = max(len(edges) - 1, 0)
    key = [
        Column(np.where(few, 1 + 2 * within + first % 2, 1)),
        Column(np.where(few, edges[np.minimum(first, top)] - x.base, x.base)),
        Column(edges[np.clip(last - 1, 0, top)] - x.base, (few,)),
    ]
    return Truths(status, masked(partial, [*key, *x.key]))
