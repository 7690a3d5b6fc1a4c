"""Sets of links, the leaves that are scattered: `e in table[i]` and `table[i] == e`, where e and i follow one
axis each.

`random` becomes such a leaf as soon as the matrix is known: its keys are drawn for every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attndsl.expr import Expr, Table, sub
from attndsl.tiles.abstract import (
    EMPTY,
    FULL,
    PARTIAL,
    Boxes,
    Column,
    Frame,
    Truths,
    integer,
    masked,
    odd,
    selected,
)

Array = NDArray[Any]

PATTERN_BITS = 60
"""Links possible in one box for their pattern to be its key; with more, the box is known by position."""
ROW = np.int64(1) << 32
"""Tile positions are row * ROW + column: sums and multiples of positions act on both."""


class Stripe(NamedTuple):
    """The value (x + shift) // width along an axis `q` or `k`."""

    axis: str
    shift: int
    width: int

    def at(self, x: Any) -> Any:
        return (x + self.shift) // self.width

    def per_box(self, size: int) -> int:
        """How many values meet a box of `size` at most."""
        if self.width % size == 0 and self.shift % size == 0:
            return 1
        if size % self.width == 0 and self.shift % self.width == 0:
            return size // self.width
        return (size - 1) // self.width + 2


def stripe(e: Expr) -> Stripe | None:
    if e.op == "var" and e.value in ("q", "k"):
        return Stripe(str(e.value), 0, 1)
    if e.op == "add" and len(e.args) == 2 and e.args[1].op == "const":
        inner = stripe(e.args[0])
        return inner and inner._replace(shift=inner.shift + integer(e.args[1]) * inner.width)
    if e.op == "floordiv" and e.type == "int" and e.args[1].op == "const":
        inner = stripe(e.args[0])
        return inner and inner._replace(width=inner.width * integer(e.args[1]))
    return None


@dataclass(frozen=True, eq=False)
class Links:
    """The pairs (value of `row`, value of `col`) that are linked, both stripes of different axes."""

    frame: Frame
    row: Stripe
    col: Stripe
    pairs: Array
    """int64 [2, links]"""
    known: dict[int, Array] = field(default_factory=dict)
    """What `boxes` gave, by size."""

    def meetings(self, size: int) -> int:
        """Boxes of `size` that meet a link at most, counted for each link."""
        count: int = self.pairs.shape[1] * (self.row.width // size + 2) * (self.col.width // size + 2)
        return count

    @cached_property
    def codes(self) -> Array:
        """Sorted row * span + col, both relative to the least."""
        return sorted_set(self.code(*self.pairs))

    @cached_property
    def least(self) -> tuple[int, int, int]:
        rows, cols = self.pairs
        return int(rows.min()), int(cols.min()), int(cols.max() - cols.min()) + 1

    def code(self, rows: Array, cols: Array) -> Array:
        row, col, span = self.least
        inside = (cols >= col) & (cols < col + span)
        return np.where(inside, (rows - row) * span + cols - col, -1)

    def boxes(self, size: int) -> Array:
        """The boxes of `size` that meet a link, row * ROW + column of each, rising."""
        spans = {}
        for axis, values in ((self.row, self.pairs[0]), (self.col, self.pairs[1])):
            end = self.frame.q if axis.axis == "q" else self.frame.k
            first = values * axis.width - axis.shift
            last = np.minimum(first + axis.width - 1, end - 1) // size
            spans[axis.axis] = np.maximum(first, 0) // size, last
        (q_first, q_last), (k_first, k_last) = spans["q"], spans["k"]
        high, wide = np.maximum(q_last - q_first + 1, 0), np.maximum(k_last - k_first + 1, 0)
        link, place = spread(high * wide)
        q, k = q_first[link] + place // wide[link], k_first[link] + place % wide[link]
        return sorted_set(q * ROW + k)

    def __call__(self, boxes: Boxes) -> Truths:
        size = boxes.size
        rows, cols = (axis.per_box(size) for axis in (self.row, self.col))
        if rows * cols > PATTERN_BITS:
            if size not in self.known:
                self.known[size] = self.boxes(size)
            live = contains(self.known[size], boxes.q // size * ROW + boxes.k // size)
            return Truths(
                np.where(live, PARTIAL, EMPTY).astype(np.int8),
                masked(live, [odd(boxes.q), odd(boxes.k)]),
            )
        starts, ends, phases = {}, {}, {}
        for axis in (self.row, self.col):
            x, last = (boxes.q, boxes.q_last) if axis.axis == "q" else (boxes.k, boxes.k_last)
            starts[axis], ends[axis] = axis.at(x), axis.at(x + last)
            phases[axis] = (x + axis.shift) % axis.width
        pattern: Any = np.int64(0)
        every: Any = True
        for bit in range(rows * cols):
            row, col = starts[self.row] + bit // cols, starts[self.col] + bit % cols
            inside = (row <= ends[self.row]) & (col <= ends[self.col])
            hit = inside & contains(self.codes, self.code(row, col))
            pattern = pattern | hit.astype(np.int64) << bit
            every = every & (hit | ~inside)
        status = np.where(every, FULL, np.where(pattern == 0, EMPTY, PARTIAL)).astype(np.int8)
        partial = status == PARTIAL
        return Truths(status, masked(partial, [Column(values) for values in (pattern, *phases.values())]))


def spread(counts: Array) -> tuple[Array, Array]:
    """For counts [c0, c1, ..]: the owner of each of the sum(counts) items, and its place there."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)


def sorted_set(values: Array) -> Array:
    """As np.unique, which hashes and is several times slower here."""
    values = np.sort(values)
    return np.compress(np.concatenate([[True], values[1:] != values[:-1]]), values)


def contains(known: Array, wanted: Array) -> Array:
    """Which of `wanted` occur in `known`, sorted and not empty."""
    return np.equal(known[np.minimum(np.searchsorted(known, wanted), len(known) - 1)], wanted)


def entry_of(node: Expr) -> tuple[Expr, Table, tuple[Expr, ...]] | None:
    """What is compared, with which entries: of `intable`, or of an equation with an integer of a table."""
    if isinstance(node.value, Table) and node.op == "intable":
        return node.args[0], node.value, node.args[1:]
    for entry, other in (node.args, node.args[::-1]) if node.op == "eq" else ():
        if entry.op == "add" and len(entry.args) == 2 and entry.args[1].op == "const":
            entry, other = entry.args[0], sub(other, entry.args[1])
        if isinstance(entry.value, Table) and entry.op == "lookup" and entry.type == "int":
            return other, entry.value, entry.args
    return None


def links_of(node: Expr, frame: Frame, tables: Mapping[str, Array]) -> Links | None:
    """The links of a node, or None where it has none, does not follow the axes or may be out of range."""
    found = entry_of(node)
    if found is None:
        return None
    compared, table, indices = found
    free = [index for index in indices if index.op != "const"]
    data = table.content(tables)
    col, row = stripe(compared), stripe(free[0]) if len(free) == 1 else None
    if row is None or col is None or row.axis == col.axis:
        return None
    data, inside = selected(data, indices)
    if node.op == "eq":
        data = data[..., None]
    (first, last), (least, most) = (
        (axis.at(np.int64(0)), axis.at(np.int64((frame.q if axis.axis == "q" else frame.k) - 1)))
        for axis in (row, col)
    )
    if not inside or first < 0 or last >= len(data):
        return None
    data = data[first : last + 1]
    row_at, slot = np.nonzero((data >= least) & (data <= most))
    return Links(frame, row, col, np.stack([row_at + first, data[row_at, slot].astype(np.int64)]))
