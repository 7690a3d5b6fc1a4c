"""`exit(confidence, threshold = 0.9)`: how likely the likeliest token is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attndsl.stage import Exit, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor


class Confidence(Exit):
    """Registered as `confidence`: the probability of the likeliest token (Elbayad et al. 2020, section
    3.2)."""

    needs_logits = True

    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert seen.logits is not None
        return seen.logits(seen.x).softmax(-1).amax(-1), {}


stage = Confidence()
