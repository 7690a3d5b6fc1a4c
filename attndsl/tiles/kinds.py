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
"""Positions on a side of a tile that are asked first: most tiles are partial, and these show it."""
PARTS = 8
"""Boxes on a side of a tile that is still open."""


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
    """Of boxes at q [u], k [u] that bounds leave open: by some of their positions, by the bounds of smaller
    boxes in them, and at last by all positions of those that are open too."""
    frame = source.frame
    live = np.zeros(len(q), bool)
    dead = (q + size > frame.q) | (k + size > frame.k)
    for side in TRIED:
        open_ = np.flatnonzero(~(live & dead))
        offsets = np.linspace(0, size - 1, side).astype(np.int64)
        some, whole = _seen(source, q[open_], k[open_], offsets)
        live[open_] |= some
        dead[open_] |= ~whole
    open_, part = np.flatnonzero(~(live & dead)), size // PARTS
    for some in np.array_split(open_, 1 + len(open_) * PARTS**2 // CHUNK):
        offsets = np.arange(PARTS) * part
        rows, cols = (q[some, None] + offsets)[:, :, None], (k[some, None] + offsets)[:, None, :]
        status, key = source.signatures(rows, cols, part)
        status = np.broadcast_to(status, (len(some), PARTS, PARTS))
        live[some] |= (status == FULL).any(axis=(1, 2))
        dead[some] |= (status == EMPTY).any(axis=(1, 2))
        at = np.nonzero(status == PARTIAL)
        first, number = unique(pack(key, len(at[0])))
        corner = [np.broadcast_to(x, status.shape)[tuple(i[first] for i in at)] for x in (rows, cols)]
        has, whole = _seen(source, corner[0], corner[1], np.arange(part))
        np.logical_or.at(live, some[at[0]], has[number])
        np.logical_or.at(dead, some[at[0]], ~whole[number])
    return np.where(live, np.where(dead, PARTIAL, FULL), EMPTY).astype(np.int8)


def _seen(source: Evaluator, q: Array, k: Array, offsets: Array) -> tuple[Array, Array]:
    """Whether some, and whether all of the positions at these offsets from q [u], k [u] are live; those
    outside of the matrix are left out."""
    frame, some, all_ = source.frame, np.zeros(len(q), bool), np.ones(len(q), bool)
    for part in np.array_split(np.arange(len(q)), 1 + len(q) * len(offsets) ** 2 // CHUNK):
        rows = np.minimum(q[part, None] + offsets, frame.q - 1)[:, :, None]
        cols = np.minimum(k[part, None] + offsets, frame.k - 1)[:, None, :]
        inside = pointwise.evaluate(source.mask, rows, cols, source.tables)
        some[part], all_[part] = inside.any(axis=(1, 2)), inside.all(axis=(1, 2))
    return some, all_
