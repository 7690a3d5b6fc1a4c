"""`exit(margin, threshold = 0.9)`: by how much the likeliest token is ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from attndsl.stage import Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Margin:
    """Registered as `margin`: the probability of the likeliest token less that of the next (Schuster et al.
    2022, section 3.5)."""

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

    def confidence(self, word: Word, learned: None, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert seen.logits is not None
        first, second = seen.logits(seen.x).softmax(-1).topk(2).values.unbind(-1)
        return first - second, {}


stage = Margin()
