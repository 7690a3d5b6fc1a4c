"""Norms `linear` and `none`, whose weights may be negative, and the constants that features are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl

SIGNED = (
    "mask causal & (last(9) | sinks(2)) & {{ q, k : q != 5 }} "
    "score (Q @ K + u @ sin(W @ K)) / D decay g ** (q - k) norm {}"
)


def compiled(clauses: str, backend: str, length: int = 24) -> attndsl.Plan:
    text = f"attention a(u = learn[3](0.4), g = learn[H](0.9)) {{ inputs W : float[3, D]  {clauses} }}"
    return attndsl.compile(
        attndsl.parse(text)["a"],
        length=length,
        heads=2,
        head_dim=4,
        dtype="float64",
        backend=backend,
        training=True,
        block_size=8,
    )


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 2, 24, 4)] * 3 + [(3, 4), (3,), (2,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[-1] = 0.8 + 0.1 * tensors[-1].tanh()
    return [x.requires_grad_() for x in tensors]


def by_hand(norm: str, q: Tensor, k: Tensor, v: Tensor, W: Tensor, u: Tensor, g: Tensor) -> Tensor:
    i, j = torch.arange(24)[:, None], torch.arange(24)
    mask = (j <= i) & ((i - j < 9) | (j < 2)) & (i != 5)
    weight = (q @ k.mT + ((k @ W.T).sin() @ u)[..., None, :]) / 4 * g[:, None, None] ** (i - j).clamp_min(0)
    weight = torch.where(mask, weight, 0.0)
    if norm == "linear":
        total = weight.sum(-1, keepdim=True)
        assert (total < 0).any()
        weight = weight / torch.where(total == 0, 1.0, total)
    return weight @ v


@pytest.mark.parametrize("norm", ["linear", "none"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_weights_of_both_signs(norm: str, backend: str) -> None:
    plan, given = compiled(SIGNED.format(norm), backend), drawn()

    def run(q: Tensor, k: Tensor, v: Tensor, W: Tensor, u: Tensor, g: Tensor) -> Tensor:
        return plan(q, k, v, W=W, learned={"u": u, "g": g})

    mine, hand = run(*given), by_hand(norm, *given)
    torch.testing.assert_close(mine, hand, rtol=1e-10, atol=1e-10)
    slope = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2), dtype=mine.dtype)
    found, expected = (torch.autograd.grad(x, given, slope) for x in (mine, hand))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if norm == "none":
        assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_logarithm_of_a_sum(backend: str) -> None:
    """NaN of a negative one, -inf of none; its gradient is that of the sum all the same."""
    plan = compiled(SIGNED.format("none"), backend)
    q, k, v, W, u, g = drawn()
    out, lse = plan(q, k, v, W=W, learned={"u": u, "g": g}, return_lse=True)
    sums = by_hand("none", q, k, torch.ones_like(v), W, u, g)[..., 0]
    assert (lse[..., 5] == -torch.inf).all()
    assert torch.equal(lse.isnan(), sums < 0)
    positive = sums > 0
    torch.testing.assert_close(lse[positive], sums[positive].log())
    found = torch.autograd.grad(lse[positive].sum(), (q, k, W, u, g))
    for one, other in zip(
        found, torch.autograd.grad(sums[positive].log().sum(), (q, k, W, u, g)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert out.isfinite().all()
