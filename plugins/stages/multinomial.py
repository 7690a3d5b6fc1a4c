"""`exit(multinomial)`: after the first layer, the chances of all layers to be the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from attndsl.errors import fail
from attndsl.stage import Exit, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Multinomial(Exit):
    """Registered as `multinomial`: the softmax of a map of what the first layer gave is the chance of each
    layer to be the last (Elbayad et al. 2020, section 3.2). How sure a layer is, is that chance beside the
    chances of those from it on. Without a threshold tokens leave after the likeliest.

    of  `token`, the state of each token; `sequence`, the mean of all, which then leave together
    """

    needs_threshold = False

    def signature(self, of: str = "token") -> None: ...

    def check(self, word: Word) -> None:
        if word["of"] not in ("token", "sequence"):
            raise fail(f"`{word['of']}` has no state", help="write `token` or `sequence`")

    def causal(self, word: Word) -> bool:
        return cast("bool", word["of"] == "token")

    def parameters(self, word: Word, width: int, turns: int) -> int:
        return (width + 1) * turns

    def learned(self, word: Word, width: int, turns: int) -> nn.Module:
        from torch import nn

        return nn.Linear(width, turns)

    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        if seen.turn:
            scores = seen.carry["scores"]
        elif word["of"] == "token":
            scores = learned(seen.x)
        else:
            scores = learned(seen.x.mean(1, keepdim=True)).expand(*seen.x.shape[:2], -1)
        later = scores[..., seen.turn :]
        carry = {"scores": scores, "leaves": scores.argmax(-1) <= seen.turn}
        return later.softmax(-1)[..., 0], carry


stage = Multinomial()
