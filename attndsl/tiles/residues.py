"""Masks that ask for k = q mod l: of positions sorted by their remainders the same pairs are dense.

A tile of 64 x 64 positions side by side holds 64 of 4,096 pairs of `(q - k) mod 64 == 0`; sorted by
(q mod 64, q // 64) the pairs of each remainder are a square of their own, which is a smaller mask of the same
kind. What a mask is beside such pairs stays in the order it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.axis import Axis
from attndsl.expr import Expr
from attndsl.tiles.blockmask import BlockMask, TileGrid
from attndsl.tiles.tiling import distinct, tile

Q, K = ir.var("q"), ir.var("k")
LARGEST = 512
"""Modulus."""
WORTH = 0.6
"""Of the pairs of all tiles, those that may be left where positions are sorted."""
FEW = 2**20
"""Pairs of tiles up to which the search takes longer than they do."""


@dataclass(frozen=True, order=True)
class Congruence:
    """(q - k + shift) mod `step` == 0, of entries."""

    step: int
    shift: int

    @property
    def holds(self) -> Expr:
        return ir.eq(ir.mod(ir.add(Q, ir.neg(K), ir.const(self.shift)), ir.const(self.step)), ir.ZERO)

    def firsts(self, remainder: int) -> tuple[int, int]:
        """The first query and the first key of a class."""
        return remainder, (remainder + self.shift) % self.step


class Steps(NamedTuple):
    """Where classes have tiles of their own: place i is that of entry i // width + step * (i % width), and of
    keys the class `shift` comes first."""

    step: int
    shift: int
    q_width: int
    k_width: int


@dataclass(frozen=True, eq=False)
class Sorted:
    """The tiles of sorted entries. q_order, k_order int64: which entry stands at each place, -1 for none: the
    classes have places for as many entries each. q_place int64 [nq], k_place [n]: where each entry stands."""

    block_mask: BlockMask
    q_order: NDArray[np.int64]
    k_order: NDArray[np.int64]
    q_place: NDArray[np.int64]
    k_place: NDArray[np.int64]
    steps: Steps | None

    def at(self, axis: Axis, order: NDArray[np.int64]) -> Axis:
        """The positions of the sorted entries; at places of none that of the first entry."""
        rows = range(len(axis.rows))
        return Axis.of(np.stack([axis.positions(row)[np.maximum(order, 0)] for row in rows]))


@dataclass(frozen=True, eq=False)
class Apart:
    """A mask in parts that are disjoint: `rest` in the order that it has, None where it is empty."""

    rest: BlockMask | None
    classes: tuple[Sorted, ...]


_known: WeakKeyDictionary[BlockMask, Apart | None] = WeakKeyDictionary()


def possible(mask: Expr) -> bool:
    """Whether the mask may be taken apart at some length."""
    plain = not mask.tables and all(node.op not in ("random", "exists", "intable") for node in ir.nodes(mask))
    return plain and any(node.op == "mod" for node in ir.nodes(mask))


def apart(block_mask: BlockMask) -> Apart | None:
    """With fewer pairs in tiles, where there are such; found once for each mask."""
    if block_mask not in _known:
        _known[block_mask] = None if block_mask.rows or not block_mask.closed else _found(block_mask)
    return _known[block_mask]


def _found(block_mask: BlockMask) -> Apart | None:
    grids, size, index = block_mask.grids, block_mask.block_size, block_mask.index
    masks = zip(block_mask.closed, grids, strict=True)
    found = [_apart(mask, grid) if possible(mask) else None for mask, grid in masks]
    classes = []
    for congruence in sorted({one.congruence for one in found if one is not None}):
        q, k = (_Places.of(congruence, size, (block_mask.nq, block_mask.n), side) for side in (0, 1))
        nothing = tile(ir.FALSE, q.length, k.length, size, n=k.length)
        own = (one.sorted if one is not None and one.congruence == congruence else nothing for one in found)
        tiles = BlockMask(q.length, k.length, size, tuple(own), index)
        steps = Steps(congruence.step, congruence.shift, q.width, k.width) if q.together == 1 else None
        classes.append(Sorted(tiles, q.order, k.order, q.inverse, k.inverse, steps))
    if not classes:
        return None
    rest = tuple([grid if one is None else one.rest for one, grid in zip(found, grids, strict=True)])
    left = BlockMask(block_mask.nq, block_mask.n, size, rest, index)
    return Apart(left if any(grid.entries for grid in rest) else None, tuple(classes))


@dataclass(frozen=True, eq=False)
class _Grids:
    """One mask apart."""

    congruence: Congruence
    rest: TileGrid
    sorted: TileGrid


def _apart(mask: Expr, grid: TileGrid) -> _Grids | None:
    best, least = None, WORTH * _pairs(grid)
    if _pairs(grid) < FEW or grid.nnz > least:
        return None
    for congruence in _congruences(mask):
        rest = _without(mask, congruence)
        left = tile(rest, grid.nq, grid.n, grid.block_size, n=grid.n)
        # before classes are made: they hold at least what is live
        if _pairs(left) + grid.nnz - left.nnz > least:
            continue
        inside = _classes(ir.all_of(mask, congruence.holds, ir.negate(rest)), congruence, grid)
        if (area := _pairs(left) + _pairs(inside)) < least:
            best, least = _Grids(congruence, left, inside), area
    return best


def _pairs(grid: TileGrid) -> int:
    return (grid.tiles.full + grid.tiles.partial) * grid.block_size**2


def _congruences(mask: Expr) -> list[Congruence]:
    """Those that it asks for, and for each other modulus that of equal remainders."""
    asked = {found for node in ir.nodes(mask) if (found := _congruence(node)) is not None}
    steps = {int(ir.number(m) or 0) for node in ir.nodes(mask) if node.op == "mod" for m in node.args[1:]}
    asked |= {Congruence(step, 0) for step in steps - {one.step for one in asked}}
    return sorted(one for one in asked if 1 < one.step <= LARGEST)


def _congruence(node: Expr) -> Congruence | None:
    """The one that a comparison is."""
    if node.op != "eq":
        return None
    a, b = node.args
    if a.op == b.op == "mod" and a.args[1] is b.args[1]:
        difference, step, of = ir.sub(a.args[0], b.args[0]), ir.number(a.args[1]), 0
    elif a.op == "mod" and (number := ir.number(b)) is not None:
        difference, step, of = a.args[0], ir.number(a.args[1]), int(number)
    else:
        return None
    if step is None or difference.free != {"q", "k"}:
        return None
    for sign in (1, -1):
        shift = ir.number(ir.sub(ir.mul(ir.const(sign), difference), ir.sub(Q, K)))
        if shift is not None:
            return Congruence(int(step), (int(shift) - sign * of) % int(step))
    return None


def _without(mask: Expr, congruence: Congruence) -> Expr:
    """A part of the mask that holds all its pairs beside the congruence: what it is where the congruence is
    nowhere, if less of it never means more."""
    if _rises(mask, congruence):
        done: dict[Expr, Expr] = {}
        for node in ir.nodes(mask):
            args = tuple([done[arg] for arg in node.args])
            done[node] = ir.FALSE if _congruence(node) == congruence else ir.rebuild(node, args)
        return done[mask]
    return ir.all_of(mask, ir.negate(congruence.holds))


def _rises(mask: Expr, congruence: Congruence) -> bool:
    """Whether the congruence stands under `and` and `or` alone, and there is one."""
    open_, found = [mask], False
    while open_:
        node = open_.pop()
        if node.op in ("and", "or"):
            open_ += node.args
        elif _congruence(node) == congruence:
            found = True
        elif any(_congruence(below) == congruence for below in ir.nodes(node)):
            return False
    return found


@dataclass(frozen=True)
class _Places:
    """Where the entries of each class stand: `together` classes in one tile of `size`, or each in tiles of
    its own, enough for `most` entries. `firsts` are the first entries of classes, of `entries` in all."""

    step: int
    together: int
    size: int
    most: int
    firsts: tuple[int, ...]
    entries: int

    @staticmethod
    def of(congruence: Congruence, size: int, lengths: tuple[int, int], side: int) -> _Places:
        """Those of queries (`side` is 0) or keys (1)."""
        step = congruence.step
        most = tuple([-(-length // step) for length in lengths])
        firsts = tuple([congruence.firsts(remainder)[side] for remainder in range(step)])
        return _Places(step, max(1, size // max(*most, 1)), size, most[side], firsts, lengths[side])

    @property
    def width(self) -> int:
        """Of the tiles that belong together."""
        return -(-self.most // self.size) * self.size

    @property
    def length(self) -> int:
        return -(-self.step // self.together) * self.width

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """Which entry stands at each place, -1 for none."""
        found = np.full(self.length, -1, np.int64)
        for i, first in enumerate(self.firsts):
            own = np.arange(first, self.entries, self.step)
            start = i // self.together * self.width + i % self.together * (self.width // self.together)
            found[start : start + len(own)] = own
        return found

    @cached_property
    def inverse(self) -> NDArray[np.int64]:
        """Where each entry stands."""
        found = np.empty(self.entries, np.int64)
        found[self.order[self.order >= 0]] = np.flatnonzero(self.order >= 0)
        return found

    def count(self, first: int) -> int:
        """The entries of a class."""
        return max(0, -((first - self.entries) // self.step))


def _classes(mask: Expr, congruence: Congruence, of: TileGrid) -> TileGrid:
    """The tiles of a mask that holds nowhere but in classes, sorted."""
    size = of.block_size
    q, k = (_Places.of(congruence, size, (of.nq, of.n), side) for side in (0, 1))
    known: dict[tuple[Expr, int, int], TileGrid] = {}
    each = []
    for first_q, first_k in zip(q.firsts, k.firsts, strict=True):
        own = _of_class(mask, congruence.step, first_q, first_k), q.count(first_q), k.count(first_k)
        if own not in known:
            known[own] = tile(*own, size, n=of.n)
        each.append(known[own])
    if q.together > 1:
        return _together(each, (q.length, k.length), q.together)
    return _beside(each, (q.length, k.length), q.width // size, k.width // size)


def _beside(grids: Sequence[TileGrid], sides: tuple[int, int], rows: int, cols: int) -> TileGrid:
    """Each in its own rows and columns of tiles, so many of them."""
    own = dict.fromkeys(grids)
    counts = np.cumsum([0, *(len(grid.masks) for grid in own)])
    first = dict(zip(own, counts.tolist(), strict=False))

    def joined(each: Iterable[NDArray[Any]]) -> NDArray[np.int32]:
        return np.concatenate([*each], dtype=np.int32)

    def pointers(each: Iterable[NDArray[np.int32]]) -> NDArray[np.int32]:
        inside = (np.pad(np.diff(one), (0, rows + 1 - len(one))) for one in each)
        return np.cumsum([0, *np.concatenate([*inside])], dtype=np.int32)

    numbered = [(i * cols, grid) for i, grid in enumerate(grids)]
    return TileGrid(
        *sides,
        grids[0].block_size,
        pointers(grid.run_ptr for grid in grids),
        joined(grid.run_start + at for at, grid in numbered),
        joined(grid.run_end + at for at, grid in numbered),
        pointers(grid.part_ptr for grid in grids),
        joined(grid.part_col + at for at, grid in numbered),
        joined(grid.part_mask + first[grid] for grid in grids),
        np.concatenate([grid.masks for grid in own]),
    )


def _together(grids: Sequence[TileGrid], sides: tuple[int, int], together: int) -> TileGrid:
    """Several in each tile of the diagonal."""
    size = grids[0].block_size
    bits = np.zeros((-(-len(grids) // together), size, size), bool)
    dense = {grid: grid.to_dense() for grid in set(grids)}
    for i, grid in enumerate(grids):
        start = i % together * (size // together)
        bits[i // together, start : start + grid.nq, start : start + grid.n] = dense[grid]
    masks, numbers = distinct(np.packbits(bits, axis=2, bitorder="little"))
    live = np.flatnonzero(numbers[2:])
    rows = np.arange(len(bits) + 1)
    nothing = np.zeros(0, np.int32)
    return TileGrid(
        *sides,
        size,
        np.zeros(len(rows), np.int32),
        nothing,
        nothing,
        np.searchsorted(live, rows).astype(np.int32),
        live.astype(np.int32),
        (numbers[2:][live] - 2).astype(np.int32),
        masks,
    )


def _of_class(mask: Expr, step: int, q: int, k: int) -> Expr:
    """The mask over the entries of one class, simplified so that equal ones are found to be so."""
    steps = ir.const(step)
    done: dict[Expr, Expr] = {
        side: ir.add(ir.mul(steps, side), ir.const(first)) for side, first in ((Q, q), (K, k))
    }
    for node in ir.nodes(mask):
        if node in done:
            continue
        args = tuple([done[arg] for arg in node.args])
        if node.op in ("mod", "floordiv") and args[0].type == args[1].type == "int":
            done[node] = _divided(node.op, *args)
        elif node.op in ("le", "lt", "eq") and args[0].type == args[1].type == "int":
            done[node] = _compared(node.op, *args)
        else:
            done[node] = ir.rebuild(node, args)
    return done[mask]


def _terms(e: Expr) -> tuple[dict[Expr, int], int]:
    """Coefficients and the constant of a sum."""
    coefficients: dict[Expr, int] = {}
    constant = 0
    for part in e.args if e.op == "add" else (e,):
        if part.op == "const":
            constant += int(ir.number(part) or 0)
        elif part.op == "mul" and part.args[0].op == "const":
            coefficients[part.args[1]] = int(ir.number(part.args[0]) or 0)
        else:
            coefficients[part] = 1
    return coefficients, constant


def _sum(coefficients: Iterable[tuple[Expr, int]], constant: int) -> Expr:
    return ir.add(*(ir.mul(ir.const(c), e) for e, c in coefficients), ir.const(constant))


def _divided(op: str, a: Expr, b: Expr) -> Expr:
    """A remainder or a quotient without the terms that the divisor divides."""
    divisor = ir.number(b)
    if divisor is None:
        return ir.REBUILD[op](a, b)
    step = int(divisor)
    coefficients, constant = _terms(a)
    left = _sum(((e, c) for e, c in coefficients.items() if c % step), constant % step)
    whole = _sum(((e, c // step) for e, c in coefficients.items() if c % step == 0), constant // step)
    return ir.mod(left, b) if op == "mod" else ir.add(ir.floordiv(left, b), whole)


def _compared(op: str, a: Expr, b: Expr) -> Expr:
    """0 <= b - a, 0 < b - a or 0 == b - a, divided by what divides all coefficients."""
    coefficients, constant = _terms(ir.sub(b, a))
    common = gcd(*coefficients.values())
    if common == 0:
        return ir.REBUILD[op](a, b)
    left = _sum(((e, c // common) for e, c in coefficients.items()), 0)
    if op == "eq":
        return ir.eq(left, ir.const(-constant // common)) if constant % common == 0 else ir.FALSE
    least = -((constant - (op == "lt")) // common)
    return ir.le(ir.const(least), left)
