"""A block mask as text for a terminal.

Where one token fits a column the picture is exact, two rows of tokens to a line. Above that a character
stands for a rectangle of tokens and its shade says how much of it is live; any live pair leaves a mark,
so a narrow window stays visible at any length. Nothing of size n x n is made unless that is small.
"""

from __future__ import annotations

import math
import re
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import BlockMask, TileGrid

DENSE_LIMIT = 2**24
"""Pairs up to which a mask is expanded, so that a character need not cover whole tiles."""
PANELS = 4
HALVES = np.array([" ", "▄", "▀", "█"])
SHADES = np.array([" ", "░", "▒", "▓", "█"])
LEGEND = "░ under 10 %  ▒ under 50 %  ▓ not all  █ all live"


def picture(block_mask: BlockMask, width: int = 80, first: int = 0) -> str:
    """The distinct masks of batch row 0, each under the heads that use it, two beside each other.

    Queries run down from position `first`, keys to the right; the last lines say what a character
    stands for.
    """
    users = block_mask.index[0]
    distinct = list(dict.fromkeys(users.tolist()))
    shown = [block_mask.grids[i] for i in distinct[:PANELS]]
    alone = len(shown) == 1
    room = width - 2 if alone else (width - 2) // 2 - 2
    queries, keys = cell(block_mask, room)
    exact = queries == keys == 1
    frames = [framed(_exact(grid.to_dense()) if exact else _shaded(grid, queries, keys)) for grid in shown]
    if alone:
        lines = frames[0]
    else:
        named = [
            [heads(np.flatnonzero(users == grid))[: room + 2], *frame]
            for grid, frame in zip(distinct, frames, strict=False)
        ]
        pairs = zip_longest(named[::2], named[1::2], fillvalue=list[str]())
        rows = [row for pair in pairs for row in zip_longest(*pair, fillvalue="")]
        lines = [f"{left:{room + 2}}  {right}".rstrip() for left, right in rows]
    if len(distinct) > PANELS:
        lines.append(f"and {len(distinct) - PANELS:,} more: `show --head` shows one")
    down, across = span("query", "queries", first, block_mask.nq), span("key", "keys", 0, block_mask.n)
    lines.append(f"{down} down, {across} across")
    if exact:
        lines.append("one character = 1 key x 2 queries")
    else:
        size = f"{counted(keys, 'key')} x {counted(queries, 'query', 'queries')}"
        lines += [f"one character = {size}", LEGEND]
    return "\n".join(lines)


def counted(number: int, one: str, many: str = "") -> str:
    """`1 key`, `2,048 keys`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def span(one: str, many: str, first: int, count: int) -> str:
    """`key 0`, `keys 0..2,047`."""
    return f"{one} {first:,}" if count == 1 else f"{many} {first:,}..{first + count - 1:,}"


def heads(numbers: NDArray[np.int64]) -> str:
    return f"head{'s' * (len(numbers) > 1)} {ranges(numbers)}"


def coloured(text: str) -> str:
    """Full characters in cyan, partial ones in magenta."""
    return re.sub("[░▒▓]+", "\x1b[35m\\g<0>\x1b[0m", re.sub("[█▀▄]+", "\x1b[36m\\g<0>\x1b[0m", text))


def cell(block_mask: BlockMask, room: int) -> tuple[int, int]:
    """Queries and keys that one character stands for, (1, 1) where the picture is exact.

    A character is about twice as high as wide. Where the mask is too large to expand, both are
    multiples of the block size.
    """
    nq, n = block_mask.nq, block_mask.n
    unit = 1 if nq * n <= DENSE_LIMIT else block_mask.block_size
    keys = unit * _power_of_two(n / unit / room)
    if keys == 1 and nq <= room:
        return 1, 1
    queries = max(2 * keys, unit * _power_of_two(nq / unit / room))
    while queries > unit and nq < 8 * queries:
        queries //= 2
    return queries, keys


def framed(body: list[str]) -> list[str]:
    rule = "─" * len(body[0])
    return [f"┌{rule}┐", *(f"│{line}│" for line in body), f"└{rule}┘"]


def ranges(numbers: NDArray[np.int64]) -> str:
    """Rising numbers as `0..5, 8`."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _power_of_two(x: float) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(0, math.ceil(math.log2(x)))


def _sums(mask: NDArray[np.generic], queries: int, keys: int) -> NDArray[np.int64]:
    """Sums over rectangles of `queries` x `keys` entries; the last ones may be smaller."""
    rows = np.add.reduceat(mask, np.arange(0, mask.shape[0], queries), axis=0, dtype=np.int64)
    sums: NDArray[np.int64] = np.add.reduceat(rows, np.arange(0, mask.shape[1], keys), axis=1)
    return sums


def _tile_sums(grid: TileGrid, queries: int, keys: int) -> NDArray[np.int64]:
    """Live pairs in every rectangle of `queries` x `keys` tokens, both multiples of the block size."""
    size = grid.block_size
    columns = -(-grid.n // size)
    tile_row = np.arange(len(grid.run_ptr) - 1) * size // queries
    edges = np.zeros((tile_row[-1] + 1, columns + 1), np.int64)
    run_row = np.repeat(tile_row, np.diff(grid.run_ptr))
    np.add.at(edges, (run_row, grid.run_start), size * size)
    np.add.at(edges, (run_row, grid.run_end), -size * size)
    live = edges.cumsum(axis=1)[:, :columns]
    part_row = np.repeat(tile_row, np.diff(grid.part_ptr))
    np.add.at(live, (part_row, grid.part_col), grid.live.sum(axis=1)[grid.part_mask])
    return _sums(live, 1, keys // size)


def _exact(mask: NDArray[np.bool_]) -> list[str]:
    padded = np.pad(mask, ((0, len(mask) % 2), (0, 0))).astype(np.int8)
    return ["".join(row) for row in HALVES[2 * padded[::2] + padded[1::2]]]


def _shaded(grid: TileGrid, queries: int, keys: int) -> list[str]:
    small = grid.nq * grid.n <= DENSE_LIMIT
    live = _sums(grid.to_dense(), queries, keys) if small else _tile_sums(grid, queries, keys)
    heights = np.minimum(queries, grid.nq - queries * np.arange(live.shape[0]))
    widths = np.minimum(keys, grid.n - keys * np.arange(live.shape[1]))
    share = live / np.outer(heights, widths)
    level = (share > 0).astype(np.int8) + (share >= 0.1) + (share >= 0.5) + (share >= 1)
    return ["".join(row) for row in SHADES[level]]
