"""Which rows and keys the live pairs of a grid join."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import TileGrid

Bool = NDArray[np.bool_]
AT_ONCE = 2**26
"""Bytes of tile contents looked at together."""


def rows_that_read(grid: TileGrid, keys: Bool) -> Bool:
    """The rows [nq] with a live pair at one of the keys [n]."""
    (rows, cols), size = grid.shape, grid.block_size
    wanted = _tiles(keys, cols, size)
    found = np.zeros((rows, size), bool)
    upto = np.r_[0, np.cumsum(wanted.any(1))]
    full = upto[grid.run_end] > upto[grid.run_start]
    found[np.repeat(np.arange(rows), np.diff(grid.run_ptr))[full]] = True
    bits = np.packbits(wanted, axis=1, bitorder="little")
    for row, col, masks in _partial(grid):
        np.logical_or.at(found, row, (masks & bits[col][:, None]).any(2))
    return found.ravel()[: grid.nq]


def keys_read_by(grid: TileGrid, rows: Bool) -> Bool:
    """The keys [n] with a live pair at one of the rows [nq]."""
    (count, cols), size = grid.shape, grid.block_size
    wanted = _tiles(rows, count, size)
    full = np.repeat(wanted.any(1), np.diff(grid.run_ptr))
    edges = np.zeros(cols + 1, np.int64)
    np.add.at(edges, grid.run_start[full], 1)
    np.add.at(edges, grid.run_end[full], -1)
    bits = np.zeros((cols, size // 8), np.uint8)
    for row, col, masks in _partial(grid):
        read = np.bitwise_or.reduce(np.where(wanted[row][:, :, None], masks, 0), axis=1)
        np.bitwise_or.at(bits, col, read)
    found = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
    found[np.cumsum(edges)[:-1] > 0] = True
    return found.ravel()[: grid.n]


def _tiles(members: Bool, count: int, size: int) -> Bool:
    padded = np.zeros(count * size, bool)
    padded[: len(members)] = members
    return padded.reshape(count, size)


def _partial(grid: TileGrid) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.uint8]]]:
    """Tile row, tile column and contents [m, B, B / 8] of the partial tiles, some at a time."""
    row = np.repeat(np.arange(len(grid.part_ptr) - 1), np.diff(grid.part_ptr))
    step = max(1, AT_ONCE // (grid.block_size**2 // 8))
    for first in range(0, len(row), step):
        some = slice(first, first + step)
        yield row[some], grid.part_col[some], grid.masks[grid.part_mask[some]]
