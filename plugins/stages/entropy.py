"""`exit(entropy, threshold = 0.2)`: how spread the probabilities of tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from attndsl.stage import Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Entropy:
    """Registered as `entropy`: that of the probabilities of the next token, in nats; tokens leave where it
    is at most the threshold (Teerapittayanon et al. 2016, section III)."""

    role: Literal["exit"] = "exit"
    needs_logits = True
    needs_threshold = True
    falls = True
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
        import torch

        assert seen.logits is not None
        chances = seen.logits(seen.x).softmax(-1)
        return -torch.xlogy(chances, chances).sum(-1), {}


stage = Entropy()
