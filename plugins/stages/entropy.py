"""`exit(entropy, threshold = 0.2)`: how far the next token is from being certain."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from attndsl.stage import Decision, Leaving, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Entropy:
    """Registered as `entropy`: the entropy of the next token in nats, from 0 to the logarithm of how many
    tokens there are. Tokens leave where it is at most the threshold (Teerapittayanon et al. 2016, section
    III)."""

    role: Literal["exit"] = "exit"

    def signature(self) -> None: ...

    def check(self, word: Word) -> None: ...

    def leaving(self, word: Word) -> Leaving:
        return Leaving(logits=True, between=(0.0, math.inf), falls=False)

    def parameters(self, word: Word, width: int, turns: int = 1) -> int:
        return 0

    def learned(self, word: Word, width: int, turns: int = 1) -> nn.Module | None:
        return None

    def decide(self, word: Word, learned: None, seen: Seen, threshold: Tensor | None) -> Decision:
        assert seen.logits is not None
        assert threshold is not None
        logs = seen.logits(seen.x).log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        return Decision(entropy <= threshold, sure=entropy)


stage = Entropy()
