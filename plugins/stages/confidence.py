"""`exit(confidence, threshold = 0.9)`: the probability of the likeliest token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attndsl.stage import Decision, Leaving, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Confidence:
    """Registered as `confidence`: the probability of the likeliest token (Elbayad et al. 2020, section
    3.2)."""

    role: Literal["exit"] = "exit"

    def signature(self) -> None: ...

    def check(self, word: Word) -> None: ...

    def leaving(self, word: Word) -> Leaving:
        return Leaving(logits=True)

    def parameters(self, word: Word, width: int, turns: int = 1) -> int:
        return 0

    def learned(self, word: Word, width: int, turns: int = 1) -> nn.Module | None:
        return None

    def decide(self, word: Word, learned: None, seen: Seen, threshold: Tensor | None) -> Decision:
        assert seen.logits is not None
        assert threshold is not None
        sure = seen.logits(seen.x).softmax(-1).amax(-1)
        return Decision(sure >= threshold, sure=sure)


stage = Confidence()
