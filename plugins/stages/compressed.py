"""`memory(xl(m), compressed(n, rate = 3))`: slots of older states, each made of so many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from attndsl.errors import fail
from attndsl.stage import Held, Memory, Read, Word, joined, last

if TYPE_CHECKING:
    from torch import Tensor, nn

WAYS = ("mean", "max", "conv")


class Compressed(Memory):
    """Registered as `compressed`: the last `n` slots of what the memory before it lets go (Rae et al. 2020,
    section 3.1). A slot stands at the last of its tokens; fewer than fill one stand as they are.

    n     slots
    rate  states of a slot
    by    their mean, their greatest numbers (max), or what a convolution learns that is as wide as its stride
    """

    def signature(self, n: int, rate: int = 3, by: str = "mean") -> None: ...

    def check(self, word: Word) -> None:
        for name, least in (("n", 1), ("rate", 2)):
            if word[name] < least:
                raise fail(f"`{name}` is {word[name]}", help=f"{least} or more")
        if word["by"] not in WAYS:
            raise fail(f"`{word['by']}` is no way to compress", help=f"there are {', '.join(WAYS)}")

    def parameters(self, word: Word, width: int, turns: int) -> int:
        return width * width * word["rate"] + width if word["by"] == "conv" else 0

    def learned(self, word: Word, width: int, turns: int) -> nn.Module | None:
        from torch import nn

        return nn.Conv1d(width, width, word["rate"], stride=word["rate"]) if word["by"] == "conv" else None

    def reach(self, word: Word, behind: int) -> tuple[int, int]:
        return word["n"] + word["rate"] - 1, behind + word["n"] * word["rate"] + word["rate"] - 1

    def remember(
        self, word: Word, learned: nn.Module | None, held: Held | None, new: Held, read: Read
    ) -> tuple[Held | None, Held | None, Mapping[str, Tensor]]:
        """`reconstruction`, of a convolution: how far what queries read of its slots is from what they read
        of the states, the mean of squares (Rae et al. 2020, section 3.2, algorithm 2)."""
        import torch
        from torch import nn

        rate = word["rate"]
        slots, loose = (None, None) if held is None else last(held.loose, held)[::-1]
        raw = new if loose is None or not loose.many else joined(loose, new)
        rest, whole = last(raw.many % rate, raw)
        if whole is None:
            kept = rest if slots is None else joined(slots, rest)
            return replace(kept, loose=rest.many), None, {}
        states = whole.x
        pieces = states.reshape(len(states), whole.many // rate, rate, states.shape[2])
        match word["by"]:
            case "mean":
                made = pieces.mean(2)
            case "max":
                made = pieces.amax(2)
            case _:
                assert learned is not None
                made = learned(states.transpose(1, 2)).transpose(1, 2)
        losses = {}
        if word["by"] == "conv" and torch.is_grad_enabled():
            losses["reconstruction"] = nn.functional.mse_loss(read(made), read(states).detach())
        kept, gone = last(word["n"], joined(slots, Held(made, whole.at[rate - 1 :: rate])))
        return replace(joined(kept, rest), loose=rest.many), gone, losses


stage = Compressed()
