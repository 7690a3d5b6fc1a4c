"""The fast choice of the greatest scores is that of a stable sort."""

from __future__ import annotations

import pytest
import torch

import attndsl
from attndsl.execution.choice import choices
from attndsl.plugins.selections.topk import best, greatest, span

ODD = torch.nan, torch.inf, -torch.inf


@pytest.mark.parametrize("distinct", [2, 9, 1000, None])
@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("width", [1, 2, 16, 17, 50, 300, 1023])
def test_the_greatest(width: int, r: int, distinct: int | None) -> None:
    generator = torch.Generator().manual_seed(width)
    scores = torch.randn(3, 20, width, generator=generator)
    if distinct is not None:
        scores = torch.randint(distinct, scores.shape, generator=generator).float()
    for i, odd in enumerate(ODD):
        scores[:, 3 * i : 3 * i + 4, i :: i + 2] = odd
    for live in (
        torch.ones(1, 20, width, dtype=torch.bool),
        torch.ones(1, 20, width, dtype=torch.bool).tril(width // 2),
        torch.rand(3, 20, width, generator=generator) < 0.3,
    ):
        wanted = best(scores, live.expand_as(scores), r)
        found = greatest(scores.clone(), live, span(~live), r)
        assert torch.equal(found.sort(-1).values, wanted.sort(-1).values)


N, PAIRS = 1024, 1024**2
COUNTS = {
    "topk(8)": 4 * PAIRS * 16,
    "topk(8, of = causal)": 4 * PAIRS * 16 * 0.53,
    "topk(8, of = last(64))": 4 * N * 127 * 16,
    "topk(2, of = blocks(64, causal))": 4 * PAIRS / 64 * 16 * 0.53,
    "blocks(64, topk(2))": 4 * (N / 64) ** 2 * 16,
    "topk(2, of = blocks(16, full), by = sum(max(Q * min(K), Q * max(K))))": 4 * PAIRS / 16 * 16 * 2,
    "topk(8, by = w[q] @ max(iq[q] @ ik[k], 0.0))": PAIRS * (3 * 5 + 3),
    "topk(8, of = documents(ids) & causal)": 4 * PAIRS * 16 * 0.53,
}
"""Products that a choice takes of 4 heads of 16: of what `of` holds, for heads that choose alike once."""


@pytest.mark.parametrize("mask", COUNTS)
def test_what_choosing_takes(mask: str) -> None:
    text = "inputs iq : float[B, n, 3, 5]  ik : float[B, n, 5]  w : float[B, n, 3]  ids : int[B, n]"
    bound = attndsl.parse(f"attention a {{ {text}  mask {mask} }}")["a"]
    plan = attndsl.compile(bound, length=N, heads=4, head_dim=16, backend="reference")
    ((_, counts),) = choices(plan.attention, plan.problem)
    assert counts["products"] == pytest.approx(COUNTS[mask], rel=0.1)
    assert 0 < counts["sorted"] <= counts["products"] / 5
