"""What the live pairs alone cost in FLOPs and bytes: no lowering can avoid it.

FLOPs are those of the matrix products, a multiplication and an addition each, as FlashAttention counts them
(Dao, FlashAttention-2, 2023, section 4.1): forward Q Kᵀ and P V, 2 (D + Dv) for each pair; backward five
products to the forward's two, so 2.5 times that, the logits being formed again. Dv = D here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attndsl.backend import DTYPES, Problem
from attndsl.tiles.blockmask import BlockMask, TileGrid

BACKWARD = 2.5
"""Backward FLOPs beside forward."""


@dataclass(frozen=True)
class Passes:
    """Of one forward pass, and of one backward pass alone; over all heads and batch rows."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Steps(Passes):
    """And of one decoding step: the last query alone, with the keys and values that it reads."""

    decode: int


@dataclass(frozen=True)
class Ideal:
    """What no lowering can avoid."""

    flops: Steps
    bytes: Steps


def pair_flops(head_dim: int) -> int:
    """2 (D + Dv) with Dv = D: products of one pair in the forward pass."""
    return 4 * head_dim


def ideal(block_mask: BlockMask, problem: Problem) -> Ideal:
    """Live pairs only, everything read or written once.

    Bytes forward: q, out, and the keys and values that some query reads. Backward: these, the gradient of
    out, and the gradients of q, k and v.
    Decode: the query and its output, and of each key head the keys and values that some of its query heads
    relates to the last row. Log-sum-exps are left out.
    """
    p, item = problem, DTYPES[problem.dtype]
    per_row = p.head_dim * item
    q = p.batch * p.heads * p.q_length * per_row
    k = _keys_read(problem, block_mask, read_keys) * per_row
    forward = pair_flops(p.head_dim) * over_all(block_mask, problem, [grid.nnz for grid in block_mask.grids])
    last, read = _decode(block_mask, problem)
    return Ideal(
        Steps(forward, round(BACKWARD * forward), pair_flops(p.head_dim) * last),
        Steps(
            2 * q + 2 * k,
            4 * q + 4 * k,
            per_row * (2 * read + (2 * p.batch * p.heads if p.q_length else 0)),
        ),
    )


def over_all(block_mask: BlockMask, problem: Problem, counts: list[int]) -> int:
    """The sum over all batch rows and heads of what is counted for each grid."""
    uses = np.bincount(block_mask.index.ravel(), minlength=len(counts))
    times = problem.batch * problem.heads // max(1, block_mask.index.size)
    return times * sum(int(u) * count for u, count in zip(uses, counts, strict=True))


def _decode(block_mask: BlockMask, problem: Problem) -> tuple[int, int]:
    """Live pairs of the last row over all heads, and the keys that it reads over all key heads."""
    if not problem.q_length:
        return 0, 0
    pairs = over_all(block_mask, problem, [int(last_keys(grid).sum()) for grid in block_mask.grids])
    return pairs, _keys_read(problem, block_mask, last_keys)


def _keys_read(problem: Problem, block_mask: BlockMask, read: Callable[[TileGrid], NDArray[np.bool_]]) -> int:
    """The keys that are read over all key heads, where `read` says it of one mask."""
    p, index = problem, block_mask.index
    live = [read(grid) for grid in block_mask.grids]
    heads = np.broadcast_to(index, (len(index), p.heads))
    groups = heads.reshape(len(index), p.kv_heads, p.heads // p.kv_heads)
    sets = {frozenset(group.tolist()) for row in groups for group in row}
    union = {s: int(np.logical_or.reduce([live[g] for g in s]).sum()) for s in sets}
    found = sum(union[frozenset(group.tolist())] for row in groups for group in row)
    return found * (p.batch // len(index))


def read_keys(grid: TileGrid) -> NDArray[np.bool_]:
    """Whether some query relates to each key, bool [n]."""
    cols, size = grid.shape[1], grid.block_size
    edges = np.zeros(cols + 1, np.int64)
    np.add.at(edges, grid.run_start, 1)
    np.add.at(edges, grid.run_end, -1)
    live = np.zeros((cols, size), bool)
    live[np.cumsum(edges)[:cols] > 0] = True
    seen = np.unpackbits(np.bitwise_or.reduce(grid.masks, axis=1), axis=1, bitorder="little").astype(bool)
    col, content = np.unique(np.stack([grid.part_col, grid.part_mask]), axis=1)
    np.logical_or.at(live, col, seen[content])
    return live.ravel()[: grid.n]


def last_keys(grid: TileGrid) -> NDArray[np.bool_]:
    """Whether the last query row relates to each key, bool [n]."""
    (rows, cols), size = grid.shape, grid.block_size
    runs, parts = (slice(p[rows - 1], p[rows]) for p in (grid.run_ptr, grid.part_ptr))
    live = np.zeros((cols, size), bool)
    for start, end in zip(grid.run_start[runs].tolist(), grid.run_end[runs].tolist(), strict=True):
        live[start:end] = True
    contents = grid.masks[grid.part_mask[parts], (grid.nq - 1) % size]
    live[grid.part_col[parts]] = np.unpackbits(contents, axis=1, bitorder="little")
    return live.ravel()[: grid.n]
