"""Constants that are drawn, rows of random features: the same on every machine, up to the last digits."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from attndsl.expr import Drawn
from attndsl.meaning.links import absorb

FRACTION = 53
"""Bits of a uniform number."""


def normals(*key: int, rows: int, columns: int) -> NDArray[np.float64]:
    """Independent standard normals [rows, columns], told by the key, the row and the column alone.

    Box, Muller, Annals of Mathematical Statistics 29(2), 1958, of two hashes each.
    """
    state = np.zeros(1, np.uint64)
    for word in key:
        state = absorb(state, np.array([word]))
    by_row = absorb(state, np.arange(rows))[:, None]
    one, other = (absorb(by_row, 2 * np.arange(columns) + i) >> np.uint64(64 - FRACTION) for i in range(2))
    radius = np.sqrt(-2 * np.log((one.astype(np.float64) + 1) / 2**FRACTION))
    found: NDArray[np.float64] = radius * np.cos(2 * np.pi * (other.astype(np.float64) / 2**FRACTION))
    return found


@functools.lru_cache(maxsize=64)
def drawn(origin: Drawn, rows: int, width: int) -> NDArray[np.float64]:
    """Its content [rows, width]: rows of independent standard normals or, with the kind `orthogonal`, such
    that those of each block of `width` rows are at right angles."""
    if origin.kind == "gaussian_rows":
        return normals(origin.seed, 0, rows=rows, columns=width)
    blocks = normals(origin.seed, 0, rows=-(-rows // width) * width, columns=width).reshape(-1, width, width)
    turned, corner = np.linalg.qr(blocks)
    turned = turned * np.where(np.diagonal(corner, axis1=1, axis2=2) < 0, -1, 1)[:, None, :]
    lengths = np.linalg.norm(normals(origin.seed, 1, rows=rows, columns=width), axis=1)
    # the columns of a turned block are as random as its rows
    found: NDArray[np.float64] = turned.transpose(0, 2, 1).reshape(-1, width)[:rows] * lengths[:, None]
    return found
