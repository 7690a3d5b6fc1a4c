"""A mask reduced to the cells of a picture: rectangles of tokens, and the share of each that is live.

A cell side divides the block size or is a multiple of it, so that nothing of size n x n is made: full tiles
are counted by runs, partial ones by their distinct contents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import BlockMask, TileGrid

LEVELS = ("under 1 %", "under 10 %", "under 50 %", "not all", "all live")
"""What the levels 1 to 5 of a cell mean; any live pair lifts it to the first."""
FULL = len(LEVELS)


def distinct(block_mask: BlockMask) -> list[tuple[NDArray[np.int64], TileGrid]]:
    """The distinct masks of batch row 0, each with the heads that use it."""
    users = block_mask.index[0]
    return [(np.flatnonzero(users == i), block_mask.grids[i]) for i in dict.fromkeys(users.tolist())]


def heads(numbers: NDArray[np.int64]) -> str:
    """Rising numbers of heads as `heads 0..5, 8`."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    listed = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return f"head{'s' * (len(numbers) > 1)} {listed}"


def sides(block_size: int, most: int) -> list[int]:
    """Sides that a cell may have, rising, each about double the one before; the last is at least `most`."""
    found = [1 << i for i in range((block_size & -block_size).bit_length()) if 1 << i < block_size]
    found.append(block_size)
    while found[-1] < most:
        found.append(2 * found[-1])
    return found


def side(length: int, room: float, block_size: int) -> int:
    """The smallest side with which `room` cells cover `length` tokens."""
    return next(side for side in sides(block_size, length) if length <= side * room)


def shares(grid: TileGrid, queries: int, keys: int) -> NDArray[np.float64]:
    """The live share of each cell, [ceil(nq / queries), ceil(n / keys)].

    1 exactly where all pairs in the matrix are live, 0 exactly where none is. Cells at the lower and right
    edge may be smaller.
    """
    live = sums(grid, queries, keys)
    heights = np.minimum(queries, grid.nq - queries * np.arange(live.shape[0]))
    widths = np.minimum(keys, grid.n - keys * np.arange(live.shape[1]))
    share: NDArray[np.float64] = live / np.outer(heights, widths)
    return share


def levels(share: NDArray[np.float64]) -> NDArray[np.int8]:
    """0 for an empty cell, 1 to 5 as in LEVELS."""
    return (share > 0).astype(np.int8) + (share >= 0.01) + (share >= 0.1) + (share >= 0.5) + (share >= 1)


def sums(grid: TileGrid, queries: int, keys: int) -> NDArray[np.int64]:
    """Live pairs in each cell of `queries` x `keys` tokens, each one of `sides`."""
    size, (rows, columns) = grid.block_size, grid.shape
    down, across = max(size // queries, 1), max(size // keys, 1)
    cell_row = np.arange(rows) // max(queries // size, 1)
    full = np.zeros((cell_row[-1] + 1, columns + 1), np.int64)
    run_row = cell_row[grid.run_row]
    np.add.at(full, (run_row, grid.run_start), size * size // (down * across))
    np.add.at(full, (run_row, grid.run_end), -(size * size // (down * across)))
    live = np.tile(full.cumsum(axis=1)[:, :columns, None, None], (1, 1, down, across))
    part_row = cell_row[grid.part_row]
    np.add.at(live, (part_row, grid.part_col), _content_sums(grid, down, across)[grid.part_mask])
    laid = live.transpose(0, 2, 1, 3).reshape(len(live) * down, columns * across)
    starts = np.arange(0, laid.shape[1], max(keys // size, 1))
    whole: NDArray[np.int64] = np.add.reduceat(laid, starts, axis=1)
    return whole[: -(-grid.nq // queries), : -(-grid.n // keys)]


def _content_sums(grid: TileGrid, down: int, across: int) -> NDArray[np.int64]:
    """Live pairs of each distinct content in `down` x `across` equal parts."""
    count, size, _ = grid.masks.shape
    if size // across % 8:
        bits = np.unpackbits(grid.masks, axis=2, bitorder="little")
    else:
        bits = np.bitwise_count(grid.masks)
    parts = bits.reshape(count, down, size // down, across, bits.shape[2] // across)
    found: NDArray[np.int64] = parts.sum(axis=(2, 4), dtype=np.int64)
    return found
