"""`exit(classifier, threshold = 0.9)`: how likely a layer is to say what the last one will, learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attndsl.stage import Decision, Leaving, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Classifier:
    """Registered as `classifier`: the sigmoid of a map of the state, one for each layer of `layers`, and of
    a loop one (Schuster et al. 2022, section 3.5). `attndsl.stacks.exits` has what it is trained to say."""

    role: Literal["exit"] = "exit"

    def signature(self) -> None: ...

    def check(self, word: Word) -> None: ...

    def leaving(self, word: Word) -> Leaving:
        return Leaving()

    def parameters(self, word: Word, width: int, turns: int = 1) -> int:
        return width + 1

    def learned(self, word: Word, width: int, turns: int = 1) -> nn.Module:
        from torch import nn

        return nn.Linear(width, 1)

    def decide(self, word: Word, learned: Any, seen: Seen, threshold: Tensor | None) -> Decision:
        sure = learned(seen.x)[..., 0].sigmoid()
        return Decision(sure >= threshold, sure=sure)


stage = Classifier()
