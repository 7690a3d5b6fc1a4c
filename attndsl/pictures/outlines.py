"""Cells as polygons: regions of a picture without a seam between the cells of one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def outlines(cells: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Around the cells [rows, columns] that are set: closed polygons [m, 2] of corners (x, y).

    Outer ones run clockwise, those of holes the other way round. Sides are level and upright by turns: along
    a line of the grid, corners are the ends of one side and of the next.
    """
    around = np.pad(cells, 1)
    turns = [around[i : i + len(cells) + 1, j : j + cells.shape[1] + 1] for i in (0, 1) for j in (0, 1)]
    north_west, north_east, south_west, south_east = turns
    odd = north_west ^ north_east ^ south_west ^ south_east
    saddle = (north_west == south_east) & (north_east == south_west) & (north_west != north_east)
    y, x = np.nonzero(odd | saddle)
    times = 1 + saddle[y, x]
    corners = np.stack([x.repeat(times), y.repeat(times)], axis=1)
    level, upright = np.arange(len(corners)) ^ 1, np.empty(len(corners), np.int64)
    by_column = np.lexsort((corners[:, 1], corners[:, 0]))
    upright[by_column] = by_column[np.arange(len(corners)) ^ 1]
    filled = south_east[corners[:, 1], corners[:, 0]].tolist()
    steps = level.tolist(), upright.tolist()
    found, seen = [], [False] * len(corners)
    for first, done in enumerate(seen):
        if done:
            continue
        loop, at, turn = [], first, 0 if filled[first] else 1
        while not seen[at]:
            seen[at] = True
            loop.append(at)
            at, turn = steps[turn][at], 1 - turn
        found.append(corners[loop])
    return found


def path(cells: NDArray[np.bool_]) -> str:
    """The same as the path of an SVG, a unit to a cell."""
    drawn = []
    for corners in outlines(cells):
        (x, y), sides = corners[0], np.diff(corners, axis=0)
        steps = (f"h{across}" if across else f"v{down}" for across, down in sides.tolist())
        drawn.append(f"M{x} {y}{''.join(steps)}z")
    return "".join(drawn)
