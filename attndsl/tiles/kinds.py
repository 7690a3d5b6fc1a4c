"""Which tiles are empty, full or partial, where nobody asks what is in them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.expr import Expr, nodes
from attndsl.meaning import pointwise
from attndsl.tiles.abstract import EMPTY, FULL, PARTIAL, Frame, pack, unique
from attndsl.tiles.blockmask import tile_codes
from attndsl.tiles.tiling import CHUNK, QUERY, Evaluator, Tables, tile

Array = NDArray[Any]
LINKED = frozenset(("intable", "random", "exists"))
"""What boxes say nothing of."""
TRIED = (2, 8)
"""Positions on a side of a tile that are asked before all are: most tiles are partial, and these show it."""


def kinds(
    mask: Expr, nq: int, n_keys: int, block_size: int, *, n: int, query: Expr = QUERY, tables: Tables
) -> NDArray[np.int8]:
    """EMPTY, FULL or PARTIAL of the tiles of `tiling.tile`, [rows, columns], in a time that grows with them.

    Takes and raises what that does, but for its limits.
    """
    if any(node.op in LINKED for node in nodes(mask)) or not (nq and n_keys):
        grid = tile(mask, nq, n_keys, block_size, n=n, query=query, tables=tables)
        return np.array([EMPTY, FULL, PARTIAL], np.int8)[np.minimum(tile_codes(grid, 0), 2)]
    source = Evaluator(mask, Frame(nq, n_keys), tables)
    rows, cols = (np.arange(0, length, block_size) for length in (nq, n_keys))
    step = max(1, CHUNK // len(cols))
    parts = [
        _row(source, rows[at : at + step, None], cols[None], block_size) for at in range(0, len(rows), step)
    ]
    return np.concatenate(parts)


def _row(source: Evaluator, q: Array, k: Array, size: int) -> NDArray[np.int8]:
    """Of the boxes at q [r, 1], k [1, c]."""
    status, key = source.signatures(q, k, size)
    found = np.array(np.broadcast_to(status, (q.shape[0], k.shape[1])), np.int8)
    at = np.nonzero(found == PARTIAL)
    first, number = unique(pack(key, len(at[0])))
    found[at] = _told(source, q[at[0][first], 0], k[0, at[1][first]], size)[number]
    return found


def _told(source: Evaluator, q: Array, k: Array, size: int) -> NDArray[np.int8]:
    """Of boxes at q [u], k [u] that bounds leave open: first by some of their positions, at last by all."""
    frame = source.frame
    live = np.zeros(len(q), bool)
    dead = (q + size > frame.q) | (k + size > frame.k)
    for side in (*TRIED, size):
        open_ = np.flatnonzero(~(live & dead))
        offsets = np.linspace(0, size - 1, side).astype(np.int64)
        for some in np.array_split(open_, 1 + len(open_) * side**2 // CHUNK):
            rows = np.minimum(q[some, None] + offsets, frame.q - 1)[:, :, None]
            cols = np.minimum(k[some, None] + offsets, frame.k - 1)[:, None, :]
            inside = pointwise.evaluate(source.mask, rows, cols, source.tables)
            live[some] |= inside.any(axis=(1, 2))
            dead[some] |= ~inside.all(axis=(1, 2))
    return np.where(live, np.where(dead, PARTIAL, FULL), EMPTY).astype(np.int8)
