"""`memory(xl(m))`: the last m states of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attndsl.errors import fail
from attndsl.stage import Held, Memory, Read, Word, joined, last

if TYPE_CHECKING:
    from torch import Tensor


class Recurrence(Memory):
    """Registered as `xl`: the last `m` states of each layer are keys of the next segment (Dai et al. 2019,
    section 3.2)."""

    def signature(self, m: int) -> None: ...

    def check(self, word: Word) -> None:
        if word["m"] < 1:
            raise fail(f"a memory of {word['m']} states", help="one or more")

    def reach(self, word: Word, behind: int) -> tuple[int, int]:
        return word["m"], behind + word["m"]

    def remember(
        self, word: Word, learned: None, held: Held | None, new: Held, read: Read
    ) -> tuple[Held | None, Held | None, Mapping[str, Tensor]]:
        kept, gone = last(word["m"], joined(held, new))
        return kept, gone, {}


stage = Recurrence()
