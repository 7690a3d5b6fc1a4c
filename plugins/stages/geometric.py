"""`exit(geometric)`: after each layer a chance to leave, learned of the state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from attndsl.stage import Decision, Leaving, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn

HALF = 0.5
"""Where a text names no threshold."""


class Geometric:
    """Registered as `geometric`: the chance to leave after a layer, the sigmoid of a map of the state, one
    for each layer (Elbayad et al. 2020, section 3.2). Without a threshold tokens leave where it is a half."""

    role: Literal["exit"] = "exit"

    def signature(self) -> None: ...

    def check(self, word: Word) -> None: ...

    def leaving(self, word: Word) -> Leaving:
        return Leaving(threshold="maybe")

    def parameters(self, word: Word, width: int, turns: int = 1) -> int:
        return width + 1

    def learned(self, word: Word, width: int, turns: int = 1) -> nn.Module:
        from torch import nn

        return nn.Linear(width, 1)

    def decide(self, word: Word, learned: Any, seen: Seen, threshold: Tensor | None) -> Decision:
        chance = learned(seen.x)[..., 0].sigmoid()
        return Decision(chance >= (HALF if threshold is None else threshold), sure=chance)


stage = Geometric()
