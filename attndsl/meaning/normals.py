"""Normal numbers by a hash of where they stand: the same on every machine to the last digits."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from attndsl.meaning.links import absorb


@functools.lru_cache(maxsize=64)
def normals(seed: int, *shape: int) -> NDArray[np.float64]:
    """Independent standard normals of this shape, read only.

    Each is made of two uniforms of 53 bits (Box, Muller, 1958), the hashes of (seed, its indices, 0 or 1).
    """
    state = absorb(np.zeros((1,) * len(shape), np.uint64), np.array([seed]))
    for axis, size in enumerate(shape):
        index = np.arange(size).reshape(-1, *(1,) * (len(shape) - 1 - axis))
        state = absorb(state, index)
    radius, angle = ((absorb(state, i) >> np.uint64(11)) * 2.0**-53 for i in (np.array([0]), np.array([1])))
    found: NDArray[np.float64] = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
    found.flags.writeable = False
    return found
