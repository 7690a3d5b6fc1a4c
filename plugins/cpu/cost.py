"""What a forward pass does and how long that takes: the cost of the `cpu` backend."""

from __future__ import annotations

import numpy as np

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.backend import DTYPES, Problem
from attndsl.emit.leaves import READS
from attndsl.emit.score import Score, score_of
from attndsl.tiles.blockmask import BlockMask, Rows, TileGrid
from attndsl.tiles.lowering import head_groups
from attndsl.tiles.residues import Sorted

from .kernel import FEW, stands
from .layout import ROWS

SECONDS = {
    "cpu": {
        "runs": 1.0e-4,
        "leaves": 2.2e-4,
        "blocks": 2e-6,
        "products": 3.4e-11,
        "operations": 1.9e-11,
        "read": 2.2e-10,
        "sorted": 7e-10,
    }
}
"""Beside those of `torch`: of one core with AVX-512 from causal masks and windows of 16 to 1,024 tokens, told
to 15 %, and from steps of decoding; leaves and operations by `python -m benchmarks.cost` on one with
AVX2, scaled as `torch` is slower there."""
TRAINING = 3.8
"""Forward and backward beside forward: 5 matrix products more to 2."""
GROUP = 16
"""Queries and keys of a partial tile that are computed together."""
SAMPLED = 256
"""Contents of partial tiles that are looked at."""
FUNCTIONS = {
    "exp",
    "log",
    "log2",
    "tanh",
    "sigmoid",
    "sin",
    "cos",
    "pow",
    "sqrt",
    "div",
    "floordiv",
    "mod",
}
"""Operations that take some ten of the others."""


def counts(attention: Attention, problem: Problem, block_mask: BlockMask | None) -> dict[str, float]:
    """Without tiles of every pair."""
    heads, width = problem.heads, problem.head_dim
    which = head_groups(attention, heads)
    scores = [score_of(group, width, True) for group in attention.groups]
    total = dict.fromkeys((*SECONDS["cpu"], "pairs", "written"), 0.0)
    total["runs"] = float(len({*which}))
    each = (
        None
        if block_mask is None
        else np.array([computed(mask) for mask in block_mask.masks])[block_mask.index]
    )
    for h, group in enumerate(which):
        score = scores[group]
        assert isinstance(score, Score)
        area = problem.q_length * problem.length if each is None else each[:, h % each.shape[1]].mean()
        pairs = problem.batch * float(area)
        rows = problem.q_length * (heads // problem.kv_heads)
        total["pairs"] += pairs
        total["products"] += pairs * width
        total["operations"] += pairs * operations(score)
        if rows <= FEW:
            size = max(1.0, DTYPES[problem.dtype] / 4)
            total["read"] += pairs / max(1, problem.q_length) * problem.kv_heads / heads * 2 * width * size
        else:
            total["blocks"] += problem.batch * -(-problem.q_length // ROWS)
    if DTYPES[problem.dtype] < 4:
        # all keys and values are widened first, those that no query sees too
        total["read"] += problem.batch * problem.kv_heads * problem.length * 2.0 * width
    total["leaves"] = float(sum([len(score.leaves) for score in scores if isinstance(score, Score)]))
    return total


def in_place(attention: Attention, problem: Problem, one: Sorted) -> bool:
    """Whether the kernel reads sorted entries where they stand."""
    used = {*head_groups(attention, problem.heads)}
    scores = [score_of(attention.groups[i], problem.head_dim, True) for i in used]
    return stands([score for score in scores if isinstance(score, Score)], one)


def operations(score: Score) -> float:
    """At each pair, beside those of a plain score."""
    if score.plain:
        return 0.0
    nodes = {node for root in score.roots for node in ir.nodes(root) if node.op not in ("const", "var")}
    return float(sum(10 if node.op in FUNCTIONS else 1 for node in nodes if node.op not in READS)) + len(
        score.leaves
    )


def computed(mask: TileGrid | Rows) -> float:
    """Pairs of tiles, of partial ones those of groups with a live pair."""
    if isinstance(mask, Rows):
        return float(mask.nnz)
    size = mask.block_size
    some = mask.masks[:SAMPLED]
    found = mask.tiles.full * float(size**2)
    if not len(some):
        return found
    bits = some.reshape(len(some), size // GROUP, GROUP, size // GROUP, GROUP // 8)
    areas = bits.any(axis=(2, 4)).sum(axis=(1, 2)) * float(GROUP**2)
    uses = np.bincount(mask.part_mask, minlength=len(mask.masks))[:SAMPLED]
    return found + float((areas * uses).sum() / uses.sum() * len(mask.part_mask))
