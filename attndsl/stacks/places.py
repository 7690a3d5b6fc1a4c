"""Some tokens of a batch, gathered and put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Tokens [B, m] of each batch row; beyond those that are `real` stand others, to fill the row. None where
    all are."""

    index: Tensor
    real: Tensor | None

    @staticmethod
    def of(chosen: Tensor) -> Places:
        """Of chosen [B, n], in their order."""
        counts = chosen.sum(1)
        most = int(counts.max())
        index = chosen.logical_not().to(torch.uint8).argsort(stable=True, dim=1)[:, :most]
        real = torch.arange(most, device=chosen.device) < counts[:, None]
        return Places(index, None if bool(real.all()) else real)

    def taken(self, x: Tensor) -> Tensor:
        """Of x [B, n, ...] the tokens, [B, m, ...]."""
        return x.gather(1, self._wide(self.index, x).expand(-1, -1, *x.shape[2:]))

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` [B, m, ...] for them."""
        if self.real is not None:
            new = torch.where(self._wide(self.real, x), new, self.taken(x))
        return x.scatter(1, self._wide(self.index, x).expand_as(new), new)

    @staticmethod
    def _wide(index: Tensor, x: Tensor) -> Tensor:
        return index.reshape(*index.shape, *(1 for _ in x.shape[2:]))


@dataclass(frozen=True)
class Flat:
    """Tokens of all rows side by side, by their numbers [m] among those of all rows."""

    index: Tensor

    @staticmethod
    def of(chosen: Tensor) -> Flat:
        """Of chosen [B, n], row by row."""
        return Flat(chosen.flatten().nonzero()[:, 0])

    def taken(self, x: Tensor) -> Tensor:
        """Of x [B, n, ...] the tokens, [1, m, ...]."""
        return x.flatten(0, 1)[self.index][None]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` [1, m, ...] for them."""
        return x.flatten(0, 1).index_copy(0, self.index, new[0]).reshape(x.shape)
