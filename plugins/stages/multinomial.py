"""`exit(multinomial)`: after the first layer, how many layers there are to be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attndsl.errors import fail
from attndsl.stage import Decision, Leaving, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn

LEVELS = ("token", "sequence")


class Multinomial:
    """Registered as `multinomial`: a distribution over the layers to leave after, a softmax of a map of the
    state after the first (Elbayad et al. 2020, section 3.2). Tokens leave at the likeliest.

    level  whose state: each token's own, or the mean of all tokens of a row, which then leave together
    """

    role: Literal["exit"] = "exit"

    def signature(self, level: str = "token") -> None: ...

    def check(self, word: Word) -> None:
        if word["level"] not in LEVELS:
            raise fail(f"`level` is {word['level']}", help="write `token` or `sequence`")

    def leaving(self, word: Word) -> Leaving:
        return Leaving(threshold="no", once=True, whole=word["level"] == "sequence")

    def parameters(self, word: Word, width: int, turns: int = 1) -> int:
        return (width + 1) * turns

    def learned(self, word: Word, width: int, turns: int = 1) -> nn.Module:
        from torch import nn

        return nn.Linear(width, turns)

    def decide(self, word: Word, learned: Any, seen: Seen, threshold: Tensor | None) -> Decision:
        """How sure it is, is the probability of this layer among those that are left."""
        logits = seen.carry.get("logits")
        if logits is None:
            x = seen.x if word["level"] == "token" else seen.x.mean(1, keepdim=True)
            logits = learned(x).expand(*seen.x.shape[:2], seen.turns)
        sure = (logits[..., seen.turn] - logits[..., seen.turn :].logsumexp(-1)).exp()
        return Decision(logits.argmax(-1) <= seen.turn, carry={"logits": logits}, sure=sure)


stage = Multinomial()
