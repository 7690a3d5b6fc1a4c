"""The draw of `random`: which keys a row links to, the same on every machine and backend."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail

KEYS_LIMIT = 2**12
DRAWN_LIMIT = 2**26
GAMMA = np.uint64(0x9E3779B97F4A7C15)


def absorb(state: NDArray[np.uint64], word: NDArray[Any]) -> NDArray[np.uint64]:
    """One SplitMix64 step (Steele, Lea, Flood, OOPSLA 2014) with a word of input xored into the state.

    `absorb(0, 0)` is the first output of the published generator seeded with 0.
    """
    z = (state ^ word.astype(np.uint64)) + GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(seed: NDArray[Any], q: NDArray[Any], c: NDArray[Any], r: int) -> NDArray[np.int64]:
    """min(r, c) distinct numbers of 0..c-1 for each row, rising, padded with -1.

    seed, q, c: int64 [rows]; the result: int64 [rows, min(r, max(c))]. Raises AttnError beyond a limit.
    Floyd's algorithm (Bentley, Floyd, CACM 30(9), 1987): slot s draws one of 0..j, j = c - r + s, by the
    hash of (seed, q, s) modulo j + 1, and takes j where that is taken already.
    """
    seed, q, c = (np.atleast_1d(a).astype(np.int64) for a in (seed, q, c))
    most = int(c.max(initial=0))
    if len(q) * min(r, most) > DRAWN_LIMIT or (KEYS_LIMIT < r < most):
        raise fail(
            f"random draws {min(r, most):,} keys for each of {len(q):,} rows",
            help=f"the limits are {KEYS_LIMIT:,} keys a row and {DRAWN_LIMIT:,} together",
        )
    if r >= most:
        every = np.arange(most)
        return np.where(every < c[:, None], every, -1)
    state = absorb(absorb(np.zeros(len(q), np.uint64), seed), q)
    taken = np.full((len(q), r), np.iinfo(np.int64).max)
    for slot in range(r):
        last = c - r + slot
        drawn = absorb(state, np.full(len(q), slot)) % np.maximum(last + 1, 1).astype(np.uint64)
        fresh = drawn.astype(np.int64)
        fresh = np.where((taken[:, :slot] == fresh[:, None]).any(1), last, fresh)
        taken[:, slot] = np.where(c > r, fresh, np.where(slot < c, slot, taken[:, slot]))
    taken.sort(axis=1)
    return np.where(taken == np.iinfo(np.int64).max, -1, taken)
