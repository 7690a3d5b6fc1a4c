"""`exit(state, threshold = 0.9)`: how alike a state is to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attndsl.stage import Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class State:
    """Registered as `state`: the cosine between the states of a token after the layer and before it (Schuster
    et al. 2022, section 3.5)."""

    role: Literal["exit"] = "exit"
    needs_logits = False
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
        from torch.nn.functional import cosine_similarity

        return cosine_similarity(seen.x, seen.before, -1), {}


stage = State()
