"""Thirty mods of other kinds than those that the reader was made with, written when it was done: what is read
is exact, and nearly all are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import attndsl
from attndsl.errors import AttnError

B, H, Q, N = 2, 4, 45, 45
drawn = torch.Generator().manual_seed(7)
cu_seqlens = torch.tensor([0, 7, 19, 20, 33, 45], dtype=torch.int32)
tokens = torch.randint(0, 12, (B, N), generator=drawn)
zigzag = torch.cat([torch.arange(0, 12), torch.arange(33, 45), torch.arange(12, 33)])
parents = torch.tensor([0] + [int(torch.randint(0, i, (), generator=drawn)) for i in range(1, N)])
depth = torch.zeros(N, dtype=torch.int64)
for _node in range(1, N):
    depth[_node] = depth[parents[_node]] + 1
modality = torch.tensor([0] * 10 + [1] * 8 + [0] * 15 + [2] * 12)
features = torch.randint(-2, 3, (N, 6), generator=drawn)
salience = torch.rand(B, H, N, generator=drawn, dtype=torch.float64)
expert = torch.randint(0, 3, (B, H, N), generator=drawn, dtype=torch.int16)
hf_mask = torch.zeros(B, 1, N, N).masked_fill(
    torch.rand(B, 1, N, N, generator=drawn) < 0.3, torch.finfo().min
)
adjacency = torch.rand(N, N, generator=drawn, dtype=torch.float16)
clock = torch.rand(N, generator=drawn).cumsum(0)
landmarks = torch.tensor([3, 11, 29])


class Schedule:
    """Windows that widen with the head, of a config."""

    def __init__(self, first: int, growth: int) -> None:
        self.widths = torch.tensor([first * growth**head for head in range(H)])
        self.first = first

    def mask(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q.sub(k)
        return distance.ge(0).logical_and(distance.lt(self.widths[h]))


SCHEDULE = Schedule(2, 3)


def keeps(strides: tuple[int, ...]) -> Callable[..., Any]:
    """A loop that builds the mask."""

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Any:
        found = q == k
        for i, stride in enumerate(strides):
            found = found | ((q - k) % stride == 0) & (q - k < stride * 4) & (q >= k) & (h != i)
        return found

    return mod


def chess_knight(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    row, column = (q // 9 - k // 9).abs(), (q % 9 - k % 9).abs()
    return (row * column == 2) | (q == k)


def sudoku(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    boxes = [x // 27 * 3 + x % 9 // 3 for x in (q, k)]
    return (q // 9 == k // 9) | (q % 9 == k % 9) | (boxes[0] == boxes[1])


def level(x: Tensor) -> Tensor:
    """How often 2 divides it."""
    return torch.log2((x & -x).float()).long()


def skip_list(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & ((q - k) < 2 ** (level(k + 1) + 1))


@functools.lru_cache
def blend(share: float) -> Callable[..., Any]:
    return lambda b, h, q, k: torch.lt(k.mul(share).ceil(), q.to(torch.float64) + 1)


OTHERS: dict[str, Callable[..., Any]] = {
    "varlen by search": lambda b, h, q, k: torch.searchsorted(cu_seqlens, q, right=True)
    == torch.searchsorted(cu_seqlens, k, right=True),
    "zigzag shards": lambda b, h, q, k: zigzag[q] >= zigzag[k],
    "same token before": lambda b, h, q, k: tokens[b, q].eq(tokens[b, k]) & torch.gt(q, k),
    "induction head": lambda b, h, q, k: (tokens[b, (k - 1).clamp(0)] == tokens[b, q]) & (k > 0) & (k <= q),
    "knight": chess_knight,
    "sudoku": sudoku,
    "torus": lambda b, h, q, k: torch.minimum((q - k) % N, (k - q) % N) <= 4,
    "parent, siblings, self": lambda b, h, q, k: (parents[q] == k) | (parents[q] == parents[k]) | (q == k),
    "ancestors by depth": lambda b, h, q, k: (depth[k] < depth[q]) & (parents[parents[q]] <= k),
    "images see all of themselves": lambda b, h, q, k: torch.where(
        (modality[q] == modality[k]) & (modality[q] > 0), modality[q].bool(), q >= k
    ),
    "hashed": lambda b, h, q, k: ((q * 1103515245 + k * 12345 + h) & 0x7FFFFFFF) % 7 < 2,
    "products of features": lambda b, h, q, k: (features[q] * features[k]).sum(-1) >= 0,
    "most alike feature": lambda b, h, q, k: (features[q] - features[k]).abs().amax() <= 3,
    "salience": lambda b, h, q, k: salience[b, h, k] >= salience[b, h, q] * 0.5,
    "experts": lambda b, h, q, k: (expert[b, h, q] + 1) % 3 != expert[b, h, k],
    "additive mask of transformers": lambda b, h, q, k: hf_mask[b, 0, q, k] == 0,
    "soft adjacency": lambda b, h, q, k: adjacency[q, k].sqrt() + adjacency[q, k] > 0.7,
    "time": lambda b, h, q, k: (clock[q] - 3.0 < clock[k]) & (clock[k] <= clock[q]),
    "landmarks": lambda b, h, q, k: (k[None] == landmarks).any(0) | (q.unsqueeze(0) == landmarks).any(0),
    "nearest landmark": lambda b, h, q, k: (q - landmarks).abs().argmin() == (k - landmarks).abs().argmin(),
    "by kind of head": lambda b, h, q, k: torch.stack([q >= k, (q - k).abs() < 4, k < 6, q % 5 == k % 5])[h],
    "schedule": lambda b, h, q, k: SCHEDULE.mask(b, h, q, k),
    "loop": keeps((1, 3, 7)),
    "skip list": skip_list,
    "blend": blend(0.75),
    "square root": lambda b, h, q, k: ((q - k).clamp(min=0).double().sqrt() % 1 == 0) & (q >= k),
    "tril of ones": lambda b, h, q, k: torch.ones(N, N).tril(3).bool()[q, k] ^ torch.eye(N)[q, k].bool(),
    "prime distance": lambda b, h, q, k: torch.isin((q - k).abs(), torch.tensor([2, 3, 5, 7, 11, 13, 17])),
    "butterfly": lambda b, h, q, k: (q ^ k) == (1 << h),
    "angle": lambda b, h, q, k: torch.atan2(q.float() + 1, k.float() + 1) > math.pi / 5,
}  # fmt: skip


def read(mod: Callable[..., Any]) -> attndsl.Bound | None:
    try:
        return attndsl.from_mask_mod(mod, length=N, q_length=Q, batch=B, heads=H)
    except AttnError:
        return None


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OTHERS)
def test_it_is_exact_if_it_is_read(name: str) -> None:
    if bound := read(OTHERS[name]):
        theirs = create_mask(OTHERS[name], B, H, Q, N, "cpu").numpy()
        ours = bound.mask(N, Q, heads=H)
        assert (np.broadcast_to(ours if ours.ndim == 4 else ours[None], theirs.shape) == theirs).all()
        assert attndsl.parse(str(bound))[bound.name].attention == bound.attention


def test_nearly_all_are_read() -> None:
    assert len(OTHERS) == 30
    assert [name for name, mod in OTHERS.items() if read(mod) is None] == ["butterfly", "angle"]
