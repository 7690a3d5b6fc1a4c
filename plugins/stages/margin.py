"""`exit(margin, threshold = 0.9)`: by how much the likeliest token is ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attndsl.stage import Decision, Leaving, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Margin:
    """Registered as `margin`: the probability of the likeliest token less that of the next (Schuster et al.
    2022, section 3.5)."""

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
        first, second = seen.logits(seen.x).softmax(-1).topk(2).values.unbind(-1)
        return Decision(first - second >= threshold, sure=first - second)


stage = Margin()
