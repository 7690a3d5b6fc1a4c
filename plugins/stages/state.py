"""`exit(state, threshold = 0.98)`: how alike the states before and after a layer are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attndsl.stage import Decision, Leaving, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Unchanged:
    """Registered as `state`: the cosine of the angle between a token's states before and after a layer
    (Schuster et al. 2022, section 3.5)."""

    role: Literal["exit"] = "exit"

    def signature(self) -> None: ...

    def check(self, word: Word) -> None: ...

    def leaving(self, word: Word) -> Leaving:
        return Leaving(between=(-1.0, 1.0))

    def parameters(self, word: Word, width: int, turns: int = 1) -> int:
        return 0

    def learned(self, word: Word, width: int, turns: int = 1) -> nn.Module | None:
        return None

    def decide(self, word: Word, learned: None, seen: Seen, threshold: Tensor | None) -> Decision:
        from torch.nn.functional import cosine_similarity

        assert threshold is not None
        sure = cosine_similarity(seen.x, seen.before, dim=-1)
        return Decision(sure >= threshold, sure=sure)


stage = Unchanged()
