"""Blocks of keys chosen for each query, `k // b in chosen[q]`, beside a mask that is known by positions.

Choices are new at every call, and nothing is searched for: the tiles of what is known by positions, and of
what may be chosen at all, are found once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from weakref import WeakKeyDictionary

import torch

from attndsl import expr as ir
from attndsl.attention import Attention, Relation
from attndsl.backend import BLOCK_SIZE, Call
from attndsl.execution.lowered import Recent
from attndsl.expr import Expr, Selected, Table
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask, TileGrid
from attndsl.tiles.lowering import FEW_ROWS, Sizes, head_groups

from .lanes import Lane
from .lists import Listed, sparse
from .slabs import Chosen, Openings

Q, K = ir.var("q"), ir.var("k")


@dataclass(frozen=True)
class Split:
    """A mask that holds where `static` does, or where `chosen` does and the block of k is in the table; never
    both. No table: `static` is all."""

    static: Expr
    chosen: Expr
    table: Table | None
    unit: int = 1
    rows: int = 1

    @property
    def entries(self) -> int:
        """Of each list."""
        entries = self.table.dims[-1] if self.table is not None else 0
        assert isinstance(entries, int)
        return entries

    @staticmethod
    def of(mask: Expr) -> Split | None:
        """None where a mask reads choices in another way."""
        if not _selected(mask):
            return Split(mask, ir.FALSE, None)
        beside, part = _apart(mask, "and")
        static, leaf = _apart(part, "or")
        of, member = _apart(leaf, "and")
        if member.op != "intable":
            return None
        table = member.value
        assert isinstance(table, Table)
        assert isinstance(table.origin, Selected)
        unit, rows = table.origin.unit, table.origin.rows
        at = ir.floordiv(K, ir.const(unit)), ir.floordiv(Q, ir.const(rows))
        if (member.args[0], member.args[-1]) != at:
            return None
        always, instead = ir.all_of(*beside), ir.any_of(*static)
        if any(map(_selected, (*beside, *static, *of))):
            return None
        return Split(
            ir.all_of(always, instead), ir.all_of(always, *of, ir.negate(instead)), table, unit, rows
        )


def _selected(e: Expr) -> bool:
    return any(isinstance(table.origin, Selected) for table in e.tables)


def _apart(e: Expr, op: str) -> tuple[list[Expr], Expr]:
    """What e joins by `op`: all but the first part that reads a choice, and that part."""
    parts = list(e.args) if e.op == op else [e]
    place = next(i for i, part in enumerate(parts) if _selected(part))
    return parts[:place] + parts[place + 1 :], parts[place]


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The splits of the groups of an attention; `beside` those whose choices are lists of single keys."""

    attention: Attention
    splits: Sequence[Split]
    beside: Sequence[Listed | None]
    known: Recent[tuple[BlockMask, BlockMask]] = field(default_factory=Recent)
    openings: WeakKeyDictionary[TileGrid, Openings] = field(default_factory=WeakKeyDictionary)

    @staticmethod
    def of(attention: Attention) -> BlockLists | None:
        """None where no group has a table, or one is not to be split."""
        splits = [Split.of(group.relation.mask) for group in attention.groups]
        found = [split for split in splits if split is not None]
        if len(found) < len(splits) or all(split.table is None for split in found):
            return None
        beside = []
        for split, group in zip(found, attention.groups, strict=True):
            single = split.table is not None and split.unit == 1
            listed = Listed.by(split.table, split.chosen, group) if split.table and single else None
            if single and (listed is None or group.norm.kind != "softmax" or group.norm.sink is not None):
                return None
            beside.append(listed)
        return BlockLists(attention, found, beside)

    @property
    def merged(self) -> bool:
        """Whether there are lists of single keys."""
        return any(listed is not None for listed in self.beside)

    def sparse(self, n: int) -> bool:
        """Whether those lists are short beside the keys."""
        return all(listed is None or sparse(listed.entries or n, n) for listed in self.beside)

    def fits(self, call: Call) -> bool:
        """Whether rows are many, and keys stand from position 0 on."""
        some = call.q.is_cpu and call.q.shape[2] > FEW_ROWS and call.k.shape[2] > 0
        fitting = all(listed is None or listed.fits(call) for listed in self.beside)
        return some and call.k_at.starts == (0,) and fitting

    def lanes(self, call: Call) -> Iterator[Lane]:
        """Every (batch row, query head) once, with what it chose; heads that chose alike of one key head
        together."""
        (batch, heads, nq, _), n = call.q.shape, call.k.shape[2]
        static, chosen = self.tiles(call)
        groups, share = head_groups(self.attention, heads), heads // call.k.shape[1]
        for b, kv_head in product(range(batch), range(heads // share)):
            first, stop = kv_head * share, (kv_head + 1) * share
            while first < stop:
                group = groups[first]
                split = self.splits[group]
                places = [
                    [x.index[b % len(x.index), head % x.index.shape[1]] for x in (static, chosen)]
                    for head in range(first, stop)
                ]
                blocks = None
                if split.table is not None and split.unit > 1:
                    blocks = call.tables[split.table.name][b, first:stop]
                alike = 1
                while (
                    first + alike < stop
                    and groups[first + alike] == group
                    and places[alike] == places[0]
                    and (blocks is None or torch.equal(blocks[alike], blocks[0]))
                ):
                    alike += 1
                grid, opened = (x.grids[i] for x, i in zip((static, chosen), places[0], strict=True))
                some = slice(first, first + alike), slice(kv_head, kv_head + 1)
                lane = Lane(self.attention.groups[group], grid, b, *some)
                if blocks is not None:
                    if opened not in self.openings:
                        self.openings[opened] = Openings.of(opened, split.unit)
                    each = blocks[0].repeat_interleave(split.rows, 0)[:nq]
                    lane = replace(lane, chosen=Chosen(each, self.openings[opened], n, alike))
                yield lane
                first += alike

    def tiles(self, call: Call) -> tuple[BlockMask, BlockMask]:
        """Those of what is static, and of what may be chosen."""
        sizes = Sizes(call.q.shape[1], call.q_at, call.k_at, call.n)
        parts = [self.related([split.static for split in self.splits])]
        parts += [self.related([split.chosen for split in self.splits])]
        read = {table for part in parts for table in lowering.mask_tables(part)}
        tables = {table.name: lowering.as_array(call.tables[table.name]) for table in read}
        key = (sizes, *((name, x.shape, x.tobytes()) for name, x in sorted(tables.items())))

        def make() -> tuple[BlockMask, BlockMask]:
            static, chosen = (lowering.block_mask(part, sizes, tables, self.block_size) for part in parts)
            return static, chosen

        return self.known.get(key, make)

    @property
    def block_size(self) -> int:
        """Of tiles that hold whole blocks of all groups."""
        step = math.lcm(8, *(split.unit for split in self.splits))
        return step * -(-BLOCK_SIZE // step)

    def related(self, masks: Sequence[Expr]) -> Attention:
        """The attention with these masks."""
        groups = zip(self.attention.groups, masks, strict=True)
        return replace(
            self.attention, groups=tuple(replace(group, relation=Relation(mask)) for group, mask in groups)
        )
