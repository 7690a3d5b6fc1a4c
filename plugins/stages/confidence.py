"""`exit(confidence, threshold = 0.9)`: how likely the likeliest token is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attndsl.stage import Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Confidence:
    """Registered as `confidence`: the probability of the likeliest token (Elbayad et al. 2020, section
    3.2)."""

    role: Literal["exit"] = "exit"
    needs_logits = True
    needs_threshold = True
    falls = False
    each = False

    def signature(self) -> None: ...

    def check(self, word: Word) -> None: ...

    def causal(self, word: Word) -> bool:
        return True

    def parameters(self, word: Word, width: int, turns: int) -> int:
        return 0

    def learned(self, word: Word, width: int, turns: int) -> nn.Module | None:
        return None

    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert seen.logits is not None
        return seen.logits(seen.x).softmax(-1).amax(-1), {}


stage = Confidence()
