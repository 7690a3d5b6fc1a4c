"""What the live pairs alone cost in FLOPs and bytes, or what stands in their place: no lowering can avoid it.

FLOPs are those of the matrix products, a multiplication and an addition each, as FlashAttention counts them
(Dao, FlashAttention-2, 2023, section 4.1): forward Q Kᵀ and P V, 2 (D + Dv) for each pair; backward five
products to the forward's two, so 2.5 times that, the logits being formed again. Dv = D here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from attndsl.attention import Approx
from attndsl.backend import DTYPES, Problem
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.queries import column_counts, keys_read_by

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


def total(costs: Sequence[Ideal]) -> Ideal:
    """Of several attentions, one after the other."""

    def added(steps: Sequence[Steps]) -> Steps:
        return Steps(*(sum(getattr(s, field.name) for s in steps) for field in fields(Steps)))

    return Ideal(added([cost.flops for cost in costs]), added([cost.bytes for cost in costs]))


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
    k = _over_key_heads(problem, block_mask, [column_counts(grid) > 0 for grid in block_mask.grids]) * per_row
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


def thin(approx: Approx, problem: Problem) -> tuple[Passes, Passes]:
    """FLOPs and bytes where `approx` stands in place of pairs, of all tokens; there are no decoding steps."""
    p, item = problem, DTYPES[problem.dtype]
    forward = 2 * products(approx, p.batch * p.heads, p.q_length, p.length, p.head_dim, p.head_dim)
    moved = p.batch * p.head_dim * item * (2 * p.heads * p.q_length + 2 * p.kv_heads * p.length)
    return Passes(forward, round(BACKWARD * forward)), Passes(moved, 2 * moved)


def products(approx: Approx, heads: int, nq: int, n: int, head_dim: int, v_dim: int) -> int:
    """Multiplications of the products of matrices, over all heads and batch rows."""
    if approx.kind == "shen":
        return heads * (n + nq) * head_dim * v_dim
    m = approx.landmarks
    if n <= m:
        return heads * n * nq * (head_dim + v_dim)
    # of each iteration four products of m x m x m
    return heads * ((n + nq + m) * m * (head_dim + v_dim) + 4 * approx.iterations * m**3)


def over_all(block_mask: BlockMask, problem: Problem, counts: list[int]) -> int:
    """The sum over all batch rows and heads of what is counted for each grid."""
    uses = np.bincount(block_mask.index.ravel(), minlength=len(counts))
    times = problem.batch * problem.heads // max(1, block_mask.index.size)
    return times * sum(int(u) * count for u, count in zip(uses, counts, strict=True))


def _decode(block_mask: BlockMask, problem: Problem) -> tuple[int, int]:
    """Live pairs of the last row over all heads, and the keys that it reads over all key heads."""
    if not problem.q_length:
        return 0, 0
    last = np.arange(problem.q_length) == problem.q_length - 1
    read = [keys_read_by(grid, last) for grid in block_mask.grids]
    pairs = over_all(block_mask, problem, [int(keys.sum()) for keys in read])
    return pairs, _over_key_heads(problem, block_mask, read)


def _over_key_heads(problem: Problem, block_mask: BlockMask, read: list[NDArray[np.bool_]]) -> int:
    """The keys that are read over all key heads, given those of each grid."""
    p, index = problem, block_mask.index
    heads = np.broadcast_to(index, (len(index), p.heads))
    groups = heads.reshape(len(index), p.kv_heads, p.heads // p.kv_heads)
    sets = {frozenset(group.tolist()) for row in groups for group in row}
    union = {s: int(np.logical_or.reduce([read[g] for g in s]).sum()) for s in sets}
    found = sum(union[frozenset(group.tolist())] for row in groups for group in row)
    return found * (p.batch // len(index))
