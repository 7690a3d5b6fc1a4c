"""`exit(classifier, threshold = 0.9)`: a learned guess whether a state has what the last one will say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from attndsl.stage import Exit, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Classifier(Exit):
    """Registered as `classifier`: the sigmoid of a linear map of the state, one for all layers (Schuster et
    al. 2022, section 3.5); trained on a stack that is frozen, to say whether the likeliest token is that of
    the last layer."""

    def parameters(self, word: Word, width: int, turns: int) -> int:
        return width + 1

    def learned(self, word: Word, width: int, turns: int) -> nn.Module | None:
        from torch import nn

        return nn.Linear(width, 1)

    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        return cast("Tensor", learned(seen.x)[..., 0].sigmoid()), {}


stage = Classifier()
