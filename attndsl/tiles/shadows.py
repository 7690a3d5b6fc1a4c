"""Which queries, keys and distances of a mask have a live pair."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import TileGrid


def live_rows(grid: TileGrid) -> NDArray[np.bool_]:
    """bool [nq]"""
    return grid.row_counts() > 0


def live_keys(grid: TileGrid) -> NDArray[np.bool_]:
    """bool [n]"""
    size, columns = grid.block_size, grid.shape[1]
    steps = np.zeros(columns + 1, np.int64)
    np.add.at(steps, grid.run_start, 1)
    np.add.at(steps, grid.run_end, -1)
    found = np.repeat((steps[:-1].cumsum() > 0)[:, None], size, axis=1)
    contents = np.unpackbits(np.bitwise_or.reduce(grid.masks, axis=1), axis=1, bitorder="little").astype(bool)
    pairs = np.unique(np.stack([grid.part_col, grid.part_mask]), axis=1)
    np.logical_or.at(found, pairs[0], contents[pairs[1]])
    return found.ravel()[: grid.n]


def live_distances(grid: TileGrid) -> NDArray[np.bool_]:
    """bool [nq + n - 1]: of rows minus columns, from 1 - n on."""
    size, origin = grid.block_size, grid.n - 1
    steps = np.zeros(grid.nq + grid.n, np.int64)
    low = np.maximum(grid.run_row * size - np.minimum(grid.run_end * size, grid.n) + 1 + origin, 0)
    high = np.minimum((grid.run_row + 1) * size, grid.nq) - grid.run_start.astype(np.int64) * size + origin
    np.add.at(steps, low, 1)
    np.add.at(steps, high, -1)
    found = steps.cumsum()[:-1] > 0
    pairs = np.unique(np.stack([grid.part_mask, grid.part_row - grid.part_col]), axis=1)
    for content in range(len(grid.masks)):
        inside = np.unpackbits(grid.masks[content], axis=1, bitorder="little")
        rows, columns = np.nonzero(inside)
        near = np.unique(rows - columns)
        apart = pairs[1][pairs[0] == content]
        found[(apart[:, None] * size + near + origin).ravel()] = True
    return found
