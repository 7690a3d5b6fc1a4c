"""`exit(geometric)`: after each layer a chance to leave, learned of the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from attndsl.stage import Exit, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Geometric(Exit):
    """Registered as `geometric`: the chance to leave after a layer, the sigmoid of a map of the state, one
    for each layer (Elbayad et al. 2020, section 3.2). Without a threshold tokens leave where it is a half."""

    needs_threshold = False
    each = True

    def parameters(self, word: Word, width: int, turns: int) -> int:
        return width + 1

    def learned(self, word: Word, width: int, turns: int) -> nn.Module:
        from torch import nn

        return nn.Linear(width, 1)

    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        return cast("Tensor", learned(seen.x)[..., 0].sigmoid()), {}


stage = Geometric()
