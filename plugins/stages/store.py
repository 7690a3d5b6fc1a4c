"""`memory(store(n))`: keys and values as they were made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attndsl.errors import fail
from attndsl.stage import Held, Memory, Read, Word, joined, last

if TYPE_CHECKING:
    from torch import Tensor


class Store(Memory):
    """Registered as `store`: the last `n` keys and values of each attention, as they were made when their
    tokens were read, and not of states by the weights of today (Wu et al. 2022, section 3.1)."""

    pairs = True

    def signature(self, n: int) -> None: ...

    def check(self, word: Word) -> None:
        if word["n"] < 1:
            raise fail(f"a memory of {word['n']} keys", help="one or more")

    def reach(self, word: Word, behind: int) -> tuple[int, int]:
        return word["n"], behind + word["n"]

    def remember(
        self, word: Word, learned: None, held: Held | None, new: Held, read: Read
    ) -> tuple[Held | None, Held | None, Mapping[str, Tensor]]:
        kept, gone = last(word["n"], joined(held, new))
        return kept, gone, {}


stage = Store()
