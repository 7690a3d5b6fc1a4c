"""`memory(xl(m))`: the last m states of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from attndsl.errors import fail
from attndsl.stage import Held, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Recurrence:
    """Registered as `xl`: the last `m` states of each layer are keys of the next segment (Dai et al. 2019,
    section 3.2)."""

    role: Literal["memory"] = "memory"

    def signature(self, m: int) -> None: ...

    def check(self, word: Word) -> None:
        if word["m"] < 1:
            raise fail(f"a memory of {word['m']} states", help="one or more")

    def parameters(self, word: Word, width: int) -> int:
        return 0

    def learned(self, word: Word, width: int) -> nn.Module | None:
        return None

    def reach(self, word: Word, behind: int) -> tuple[int, int]:
        return word["m"], behind + word["m"]

    def remember(
        self, word: Word, learned: None, held: Held | None, new: Held
    ) -> tuple[Held | None, Held | None, Mapping[str, Tensor]]:
        import torch

        x = new.x if held is None else torch.cat([held.x, new.x], 1)
        at = [*new.at] if held is None else [*held.at, *new.at]
        goes = max(len(at) - word["m"], 0)
        gone = Held(x[:, :goes], at[:goes]) if goes else None
        return Held(x[:, goes:], at[goes:]), gone, {}


stage = Recurrence()
