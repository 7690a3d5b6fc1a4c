"""Where a token stands and which turn it is, as numbers that are added to its state."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(at: Tensor, width: int) -> Tensor:
    """[n, width] of n real numbers `at`: sines at even places and cosines at odd ones, of at / 10000^(2j /
    width) at the places 2j and 2j + 1 (Vaswani et al. 2017, section 3.5)."""
    place = torch.arange(width, device=at.device)
    exponents = (place - place % 2).to(at.dtype) / width
    angles = at[:, None] / 10_000**exponents
    return torch.where(place % 2 == 0, angles.sin(), angles.cos())
