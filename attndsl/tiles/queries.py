"""Which rows and keys the live pairs of a grid join."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import BlockMask, TileGrid

Bool = NDArray[np.bool_]
AT_ONCE = 2**14
"""Partial tiles looked at together."""


def rows_that_read(grid: TileGrid, keys: Bool) -> Bool:
    """The rows [nq] with a live pair at one of the keys [n]."""
    (rows, cols), size = grid.shape, grid.block_size
    wanted = _tiles(keys, cols, size)
    some = np.any(wanted, axis=1)
    found = np.zeros((rows, size), bool)
    upto = np.r_[0, np.cumsum(some)]
    found[grid.run_row[upto[grid.run_end] > upto[grid.run_start]]] = True
    bits = np.packbits(wanted, axis=1, bitorder="little")
    for part in _pieces(some[grid.part_col]):
        read = grid.masks[grid.part_mask[part]] & bits[grid.part_col[part]][:, None]
        np.logical_or.at(found, grid.part_row[part], read.any(axis=2))
    return found.ravel()[: grid.nq]


def keys_read_by(grid: TileGrid, rows: Bool) -> Bool:
    """The keys [n] with a live pair at one of the rows [nq]."""
    (count, cols), size = grid.shape, grid.block_size
    wanted = _tiles(rows, count, size)
    some = np.any(wanted, axis=1)
    steps, full = np.zeros(cols + 1, np.int64), some[grid.run_row]
    np.add.at(steps, grid.run_start[full], 1)
    np.add.at(steps, grid.run_end[full], -1)
    bits = np.zeros((cols, size // 8), np.uint8)
    for part in _pieces(some[grid.part_row]):
        lines = np.where(wanted[grid.part_row[part]][:, :, None], grid.masks[grid.part_mask[part]], 0)
        np.bitwise_or.at(bits, grid.part_col[part], np.bitwise_or.reduce(lines, axis=1))
    bits[np.cumsum(steps)[:cols] > 0] = 255
    return np.unpackbits(bits.ravel(), count=grid.n, bitorder="little").astype(bool)


def keys_read(block_mask: BlockMask) -> Bool:
    """The keys that some query reads, [rows, heads, n] as the index of the mask has them."""
    every = np.ones(block_mask.nq, bool)
    found: Bool = np.stack([keys_read_by(grid, every) for grid in block_mask.grids])[block_mask.index]
    return found


def column_counts(grid: TileGrid) -> NDArray[np.int64]:
    """Live queries of each key, int64 [n]."""
    cols, size = grid.shape[1], grid.block_size
    steps = np.zeros((cols + 1, 1), np.int64)
    np.add.at(steps, grid.run_start, size)
    np.add.at(steps, grid.run_end, -size)
    counts = np.repeat(np.cumsum(steps, axis=0)[:cols], size, axis=1)
    contents = [
        np.unpackbits(part, axis=2, bitorder="little").sum(axis=1, dtype=np.int64)
        for part in np.array_split(grid.masks, 1 + grid.masks.nbytes // 2**20)
    ]
    where = grid.part_col.astype(np.int64) * len(grid.masks) + grid.part_mask
    pair, uses = np.unique(where, return_counts=True)
    col, content = np.divmod(pair, max(len(grid.masks), 1))
    np.add.at(counts, col, np.concatenate(contents)[content] * uses[:, None])
    return counts.ravel()[: grid.n]


def _pieces(chosen: Bool) -> list[NDArray[np.int64]]:
    """The numbers of the partial tiles that are chosen, some at a time."""
    parts = np.flatnonzero(chosen)
    return np.array_split(parts, 1 + len(parts) // AT_ONCE)


def _tiles(members: Bool, count: int, size: int) -> Bool:
    padded = np.zeros(count * size, bool)
    padded[: len(members)] = members
    return padded.reshape(count, size)
