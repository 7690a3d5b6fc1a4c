"""Constants that are drawn: rows of random features."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from attndsl.expr import Drawn
from attndsl.meaning.normals import normals


@functools.lru_cache(maxsize=64)
def drawn(origin: Drawn, rows: int, width: int) -> NDArray[np.float64]:
    """Its content [rows, width]: rows of independent standard normals or, with the kind `orthogonal`, such
    that those of each block of `width` rows are at right angles."""
    padded = -(-rows // width) * width
    plain: NDArray[np.float64]
    plain, lengths = normals(origin.seed, 2, padded, width)
    if origin.kind == "gaussian_rows":
        return plain[:rows]
    turned, corner = np.linalg.qr(plain.reshape(-1, width, width))
    turned = turned * np.where(np.diagonal(corner, axis1=1, axis2=2) < 0, -1, 1)[:, None, :]
    # the columns of a turned block are as random as its rows
    blocks = turned.transpose(0, 2, 1).reshape(padded, width)
    found: NDArray[np.float64] = (blocks * np.linalg.norm(lengths, axis=1, keepdims=True))[:rows]
    return found
