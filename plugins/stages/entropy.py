"""`exit(entropy, threshold = 0.2)`: how spread the probabilities of tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attndsl.stage import Exit, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor


class Entropy(Exit):
    """Registered as `entropy`: that of the probabilities of the next token, in nats; tokens leave where it
    is at most the threshold (Teerapittayanon et al. 2016, section III)."""

    needs_logits = True
    falls = True

    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        import torch

        assert seen.logits is not None
        chances = seen.logits(seen.x).softmax(-1)
        return -torch.xlogy(chances, chances).sum(-1), {}


stage = Entropy()
