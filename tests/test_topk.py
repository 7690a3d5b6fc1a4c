"""The fast choice of the greatest scores is that of a stable sort."""

from __future__ import annotations

import pytest
import torch

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
