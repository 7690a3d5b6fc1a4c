"""`exit(state, threshold = 0.9)`: how alike a state is to the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attndsl.stage import Exit, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor


class State(Exit):
    """Registered as `state`: the cosine between the states of a token after the layer and before it (Schuster
    et al. 2022, section 3.5)."""

    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        from torch.nn.functional import cosine_similarity

        return cosine_similarity(seen.x, seen.before, -1), {}


stage = State()
