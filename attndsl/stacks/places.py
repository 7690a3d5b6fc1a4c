"""Some tokens of a batch, gathered and put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """Tokens of all rows side by side, by their numbers [m] among those of all rows."""

    numbers: Tensor

    @staticmethod
    def of(chosen: Tensor) -> Flat:
        """Of chosen [B, n], row by row."""
        return Flat(chosen.flatten().nonzero()[:, 0])

    def taken(self, x: Tensor) -> Tensor:
        """Of x [B, n, ...] the tokens, [1, m, ...]."""
        return x.flatten(0, 1).index_select(0, self.numbers)[None]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` [1, m, ...] for them."""
        return x.flatten(0, 1).index_copy(0, self.numbers, new[0]).reshape(x.shape)


@dataclass(frozen=True)
class Places:
    """Tokens [B, m] of each batch row, and `numbers` [B * m] of them among those of all rows; beyond those
    that are `real` [B * m] stand others, to fill the row. None where all are."""

    index: Tensor
    numbers: Tensor
    real: Tensor | None

    @staticmethod
    def of(chosen: Tensor) -> Places:
        """Of chosen [B, n], in their order."""
        counts, (rows, n) = chosen.sum(1), chosen.shape
        most = int(counts.max())
        index = chosen.logical_not().to(torch.uint8).argsort(stable=True, dim=1)[:, :most]
        numbers = (index + n * torch.arange(rows, device=chosen.device)[:, None]).flatten()
        real = (torch.arange(most, device=chosen.device) < counts[:, None]).flatten()
        return Places(index, numbers, None if bool(real.all()) else real)

    def taken(self, x: Tensor) -> Tensor:
        """Of x [B, n, ...] the tokens, [B, m, ...]."""
        return x.flatten(0, 1).index_select(0, self.numbers).reshape(*self.index.shape, *x.shape[2:])

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` [B, m, ...] for them."""
        numbers, made = self.numbers, new.flatten(0, 1)
        if self.real is not None:
            numbers, made = numbers[self.real], made[self.real]
        return x.flatten(0, 1).index_copy(0, numbers, made).reshape(x.shape)
