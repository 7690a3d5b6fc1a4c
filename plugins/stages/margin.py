"""`exit(margin, threshold = 0.9)`: by how much the likeliest token is ahead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attndsl.stage import Exit, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor


class Margin(Exit):
    """Registered as `margin`: the probability of the likeliest token less that of the next (Schuster et al.
    2022, section 3.5)."""

    needs_logits = True

    def confidence(self, word: Word, learned: None, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert seen.logits is not None
        first, second = seen.logits(seen.x).softmax(-1).topk(2).values.unbind(-1)
        return first - second, {}


stage = Margin()
