"""block_sizes: how many tiles there are by their size, and which size is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line, table
from attndsl.analysis.work import over_all
from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask, TileGrid

BLOCK_SIZES = (16, 32, 64, 128, 256)
ENTRIES = 2**21
"""Runs and partial tiles that a block size may take to be looked at."""
PAIRS_PER_TILE = 64**2
"""What a tile costs beside its pairs, in pairs: at a side of 64 half of the time."""


WHY = f"fewest pairs, where starting a tile costs as much as {PAIRS_PER_TILE:,} of them"
"""What is best about the best size."""


@dataclass(frozen=True)
class TileCounts:
    full: int
    partial: int


@dataclass(frozen=True)
class BlockSize:
    """Tiles that are computed over all heads and batch rows, the pairs in them, and these beside the live
    ones; a waste of 1.0 is none."""

    block_size: int
    tiles: TileCounts
    pairs: int
    waste: float


def block_sizes(
    attention: Attention,
    problem: Problem,
    tables: Mapping[str, NDArray[Any]] | None = None,
    candidates: tuple[int, ...] = BLOCK_SIZES,
) -> tuple[BlockSize, ...]:
    """By rising block size. `tables` as `lowering.checked_tables` gives them.

    A size that could have more than `ENTRIES` runs and partial tiles is left out, with all smaller ones.
    """
    p = problem
    sizes = lowering.sizes(attention, p.length, p.q_length, p.heads)
    found: list[BlockSize] = []
    known: BlockMask | None = None
    for size in sorted(candidates, reverse=True):
        if known is not None:
            times = known.block_size / size
            runs, parts = (sum(len(a) for a in x) for x in zip(*map(_entries, known.grids), strict=True))
            if times * runs + times**2 * parts > ENTRIES:
                break
        known = lowering.block_mask(attention, sizes, tables or {}, size)
        full, partial = (over_all(known, p, [g.tiles[i] for g in known.grids]) for i in (0, 1))
        pairs, live = (full + partial) * size**2, over_all(known, p, [g.nnz for g in known.grids])
        found.append(BlockSize(size, TileCounts(full, partial), pairs, pairs / live if live else 1.0))
    return tuple(reversed(found))


def _entries(grid: TileGrid) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return grid.run_start, grid.part_col


def best_block_size(rows: tuple[BlockSize, ...]) -> int | None:
    """The cheapest, the largest of equals; None of none.

    A tile costs its pairs and `PAIRS_PER_TILE` more, for finding it, starting the loads of its keys and
    values, and rescaling the output: with D = 64 a megaflop, 0.14 us of one of the H100's 132 processors.
    So small tiles pay where they leave out more dead pairs than that.
    """

    def cost(row: BlockSize) -> tuple[int, int]:
        return row.pairs + PAIRS_PER_TILE * (row.tiles.full + row.tiles.partial), -row.block_size

    return min(rows, key=cost).block_size if rows else None


@dataclass(frozen=True)
class BlockSizes:
    """By rising size; none where all have too many tiles."""

    block_sizes: tuple[BlockSize, ...]
    best_block_size: int | None


def _added(parts: Sequence[BlockSize]) -> BlockSize:
    """Of all parts of a sum at one block size."""
    pairs = sum(part.pairs for part in parts)
    live = sum(part.pairs / part.waste for part in parts)
    tiles = TileCounts(sum(part.tiles.full for part in parts), sum(part.tiles.partial for part in parts))
    return parts[0] if len(parts) == 1 else BlockSize(parts[0].block_size, tiles, pairs, pairs / live)


def _find(subject: Subject) -> BlockSizes:
    each = [block_sizes(part.attention, part.problem, part.tables) for part in subject.parts.values()]
    found = tuple(_added(rows) for rows in zip(*(reversed(rows) for rows in each), strict=False))[::-1]
    return BlockSizes(found, best_block_size(found))


def _text(found: BlockSizes) -> Iterator[str]:
    if not found.block_sizes:
        return
    yield "\ntiles that a kernel would compute whole, by block size"
    yield table(
        ["", "full tiles", "partial", "pairs in them", "of live", ""],
        [
            [
                str(row.block_size),
                f"{row.tiles.full:,}",
                f"{row.tiles.partial:,}",
                f"{row.pairs:,}",
                f"{row.waste:.3g} x",
                "*" if row.block_size == found.best_block_size else "",
            ]
            for row in found.block_sizes
        ],
    )
    yield line("recommended", f"{found.best_block_size}: {WHY}")
    least = found.block_sizes[0].block_size
    if least > min(BLOCK_SIZES):
        yield f"  not counted: below {least}, where there may be more than {ENTRIES:,} entries"


CARDS = """
{% if at("best_block_size") %}
{% call card("best block size") %}
{{ fact("best_block_size") }}<small>fewest pairs and tiles to start</small>
{% endcall %}
{% endif %}
"""

SECTION = (
    """
{% call table("Block sizes") %}
{{ heads(["tokens", "full tiles", "partial tiles", "pairs computed", "of the live"]) }}
<tbody>
{% for it in report.block_sizes %}
{% set i, best = loop.index0, it.block_size == report.best_block_size %}
<tr{% if best %} class="best"{% endif %}>
<th scope="row">{{ fact("block_sizes", i, "block_size") }}
{%- if best %} <em class="mark">best</em>{% endif %}</th>
{% for kind in ("full", "partial") %}<td>{{ fact("block_sizes", i, "tiles", kind) }}</td>{% endfor %}
<td>{{ fact("block_sizes", i, "pairs") }}</td><td>{{ fact("block_sizes", i, "waste", unit="times") }}</td>
</tr>
{% endfor %}
</tbody>
{% endcall %}
"""
    + f"""<p class="hint">Best is what has the {WHY}.</p>
"""
)

part = Part(
    _find, _text, ("block_sizes", "best_block_size"), place=50, title="Cost", section=SECTION, cards=CARDS,
    streams=True,
)  # fmt: skip
