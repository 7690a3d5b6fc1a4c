"""Lanes: query heads that run together, and how their score lets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from attndsl.attention import Attention, HeadGroup
from attndsl.execution.torch_eval import strained
from attndsl.expr import Expr
from attndsl.scores import by_distance, scale_and_bias
from attndsl.tiles.blockmask import BlockMask, TileGrid
from attndsl.tiles.lowering import head_groups

from .chunks import Cut
from .slabs import Chosen

LANES = 16
"""Heads that run together."""
FORWARD_UNIT, BACKWARD_UNIT, FORMED_UNIT = 32, 128, 64
"""Query rows of one problem in a band: what ran fastest on CPU (benchmarks/attention.py)."""


@dataclass(frozen=True, eq=False)
class Lane:
    """Query heads of one batch row that share a grid and read the same key heads, or one each; of those with
    one key head, which blocks of keys all of them chose beside what is in the grid."""

    group: HeadGroup
    grid: TileGrid
    batch: int
    heads: slice
    kv_heads: slice
    chosen: Chosen | None = None

    def queries(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads]

    def keys(self, x: Tensor) -> Tensor:
        return x[self.batch, self.kv_heads]

    def strained(self, lse: Tensor) -> bool:
        """Whether parts are neither merged nor differentiated well by this log-sum-exp."""
        return self.group.norm.kind == "softmax" and strained(lse)


def lanes(
    attention: Attention, block_mask: BlockMask, batch: int, heads: int, kv_heads: int
) -> Iterator[Lane]:
    """Every (batch row, query head) once."""
    share = heads // kv_heads
    index = block_mask.index
    groups = head_groups(attention, heads)
    for b in range(batch):
        row = index[b % len(index)]
        place = [(groups[h], int(row[h % len(row)])) for h in range(heads)]
        start = 0
        for h in range(1, heads + 1):
            new_key_head = share > 1 and h % share == 0
            if h == heads or place[h] != place[start] or new_key_head or h - start == LANES:
                group, grid = place[start]
                kv = slice(start, h) if share == 1 else slice(start // share, start // share + 1)
                yield Lane(attention.groups[group], block_mask.grids[grid], b, slice(start, h), kv)
                start = h


@dataclass(frozen=True)
class Simple:
    """A softmax of Q @ K * scale + bias, which torch's fused kernel can do."""

    scale: float
    bias: Expr | None
    by_distance: bool

    @staticmethod
    def of(group: HeadGroup, head_dim: int) -> Simple | None:
        found = scale_and_bias(group.score, head_dim)
        if group.norm.kind != "softmax" or group.decay is not None or isinstance(found, str):
            return None
        scale, bias = found
        return Simple(scale, bias, bias is None or by_distance(bias) is not None)


def all_simple(attention: Attention, head_dim: int) -> tuple[Simple, ...] | None:
    """Of the groups; None if one is not."""
    found = [Simple.of(group, head_dim) for group in attention.groups]
    return None if None in found else tuple([simple for simple in found if simple is not None])


def cut_of(simple: Simple | None, heads: int, width: int, gradient: bool) -> Cut:
    """`simple` is None where torch's fused kernel does not run; `width` of a query or value."""
    formed = simple is None or gradient
    biased = simple is not None and simple.bias is not None
    return Cut(
        unit=BACKWARD_UNIT if gradient else FORMED_UNIT if formed else FORWARD_UNIT,
        formed=formed,
        gradient=gradient,
        per_token=heads * width,
        per_pair=heads if formed or biased else 0,
        by_distance=simple is not None and biased and simple.by_distance,
    )
