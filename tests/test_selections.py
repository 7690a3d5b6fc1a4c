"""Choices by content: what they mean, that they are kept, and that they say where they may stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.conformance.selections import LENGTHS as SIZES
from attndsl.conformance.selections import check

TEXT = """
attention moba { mask causal & (block(16) | topk(2, of = blocks(16, causal - radius(0)), by = Q @ mean(K))) }
attention knn(r = 4) { mask topk(r, of = causal) }
attention tiles { mask causal & blocks(8, radius(0) | topk(2, of = causal - radius(0))) }
"""
LENGTHS = (1, 7, 16, 17, 48, 75)


def vectors(n: int, seed: int, nq: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, n if nq is None else nq, 8), (2, 2, n, 8), (2, 2, n, 8)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ v


def greatest(scores: Tensor, live: Tensor, r: int) -> Tensor:
    """Truths [.., rows, units] by sorting pairs in Python: greater score first, then lower place."""
    found = torch.zeros_like(live)
    rows = zip(scores.flatten(0, -2), live.flatten(0, -2), found.view(-1, live.shape[-1]), strict=True)
    for row, there, out in rows:
        places = [place for place in range(len(row)) if there[place]]
        places.sort(key=lambda place: (-row[place].item(), place))
        out[places[:r]] = True
    return found


def mean_of_blocks(x: Tensor, b: int) -> Tensor:
    return torch.stack([piece.mean(-2) for piece in x.split(b, -2)], -2)


def knn(q: Tensor, k: Tensor) -> Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    return greatest(scores, causal.expand(scores.shape), 4)


def moba(q: Tensor, k: Tensor) -> Tensor:
    n = k.shape[2]
    place = torch.arange(n)
    own, block = place[:, None] // 16, torch.arange((n + 15) // 16)
    scores = q @ mean_of_blocks(k.repeat_interleave(2, 1), 16).transpose(-1, -2)
    chosen = greatest(scores, (block < own).expand(scores.shape), 2)[..., place // 16]
    return (place[:, None] >= place) & ((own == place // 16) | chosen)


def tiles(q: Tensor, k: Tensor) -> Tensor:
    n = k.shape[2]
    place = torch.arange(n)
    block = torch.arange((n + 7) // 8)
    scores = mean_of_blocks(q, 8) @ mean_of_blocks(k.repeat_interleave(2, 1), 8).transpose(-1, -2)
    chosen = greatest(scores, (block < block[:, None]).expand(scores.shape), 2)
    chosen = (chosen | (block == block[:, None]))[..., place // 8, :][..., place // 8]
    return (place[:, None] >= place) & chosen


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("naive", [knn, moba, tiles], ids=lambda naive: naive.__name__)
@pytest.mark.parametrize("n", LENGTHS)
def test_a_choice_is_what_sorting_gives(naive, backend: str, n: int) -> None:
    plan = attndsl.compile(
        attndsl.parse(TEXT)[naive.__name__], length=80, heads=4, kv_heads=2, head_dim=8, dtype="float64",
        batch=2, backend=backend, training=True,
    )  # fmt: skip
    q, k, v = (x.requires_grad_() for x in vectors(n, seed=n))
    mask = naive(q.detach(), k.detach())
    wanted, got = dense(q, k, v, mask), plan(q, k, v)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    slope = torch.randn_like(wanted)
    grads = (torch.autograd.grad(out, (q, k, v), slope) for out in (got, wanted))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_row_is_chosen_for_where_it_stands(backend: str) -> None:
    """The last rows alone, and keys in a cache, choose as among all."""
    plan = attndsl.compile(
        attndsl.parse(TEXT)["knn"],
        length=64,
        heads=4,
        kv_heads=2,
        head_dim=8,
        dtype="float64",
        backend=backend,
    )
    q, k, v = vectors(64, seed=1)
    whole = plan(q, k, v)
    for rows in (1, 3, 20):
        torch.testing.assert_close(plan(q[:, :, -rows:], k, v), whole[:, :, -rows:], rtol=0, atol=1e-12)
    some = plan(q[:, :, 10:12], k[:, :, :40], v[:, :, :40], q_offset=10)
    torch.testing.assert_close(some, whole[:, :, 10:12], rtol=0, atol=1e-12)


def test_of_equal_scores_the_first_key_is_chosen() -> None:
    plan = attndsl.compile(attndsl.parse(TEXT)["knn"], length=12, head_dim=8, dtype="float64")
    q, k, v = (torch.ones(1, 1, 12, 8, dtype=torch.float64) for _ in range(3))
    v = torch.arange(12.0, dtype=torch.float64).view(1, 1, 12, 1).expand(1, 1, 12, 8)
    wanted = [sum(range(min(4, row + 1))) / min(4, row + 1) for row in range(12)]
    torch.testing.assert_close(plan(q, k, v)[0, 0, :, 0], torch.tensor(wanted, dtype=torch.float64))


LEAVES = [
    "mask topk(4, of = causal)",
    "mask topk(4, of = causal, share = kv)",
    "mask causal & topk(2, of = blocks(4, causal - radius(0)), by = Q @ mean(K))",
    "mask causal & blocks(4, radius(0) | topk(2, of = causal - radius(0)))",
    "inputs ids : int[B, n]  mask topk(4, of = documents(ids))",
]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("clauses", LEAVES)
def test_a_selection_conforms(clauses: str, n: int) -> None:
    check(clauses, n)


MISTAKES = {
    "mask topk(0, of = causal)": "`topk` chooses 0, and at least 1 must be chosen",
    "mask within(8, topk(2))": "stands here for others",
    "mask topk(2) @ causal": "stands here for others",
    "mask ~topk(2)": "stands here for others",
    "mask causal - topk(2)": "stands here for others",
    "mask T(topk(2))": "stands here for others",
    "mask grid(4, 4, { (y, x), (v, u) : topk(2)[y, v] })": "stands here for others",
    "score s + where(topk(2)[q, k], 1.0, 0.0)": "stands in a mask alone",
    "mask topk(2, by = learn[D] @ K)": "needs a name",
    "mask topk(2, of = topk(3))": "stands here for others",
    "mask topk(2, share = heads)": "`share` is heads",
    "mask topk(2, by = Q @ mean(K))": "`mean` is of the keys of a block",
    "mask topk(2, off = causal)": "`topk` has no parameter `off`",
    "mask topk(of = causal)": "`topk` needs its argument `r`",
}


@pytest.mark.parametrize(("clauses", "said"), MISTAKES.items())
def test_a_choice_where_none_may_be_is_refused(clauses: str, said: str) -> None:
    with pytest.raises(attndsl.AttnError) as found:
        attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    assert said in str(found.value)
    assert "<text>:1:" in str(found.value)
