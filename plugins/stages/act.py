"""`loop(act(eps = 0.01), max = N)`: adaptive computation time of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from attndsl.errors import fail
from attndsl.stage import Decision, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Act:
    """Registered as `act`: a token runs until its chances to halt sum up to 1 - eps. It becomes the sum of
    its states weighted by them, the last by what remains, so that weights sum up to 1 (Graves 2016, section
    2.1; of each token: Dehghani et al. 2019, section 2.2).

    eps     what may be left of the sum
    basic   as `basic` of tensor2tensor: with a weight w the output y becomes w x + (1 - w) y, so that
            weights are those of no sum: of chances .3, .3 and .5 they are .126, .18 and .4
    onward  as in tensor2tensor: tokens that have left are computed on, and others attend to that; as
            published they stay what they were
    rest    whether a token that the last turn ends has what remains for its weight; not in tensor2tensor,
            where weights then sum up to less than 1
    """

    role: Literal["halting"] = "halting"

    def signature(
        self, eps: float = 0.01, basic: bool = False, onward: bool = False, rest: bool = True
    ) -> None: ...

    def check(self, word: Word) -> None:
        if not 0 < word["eps"] < 1:
            raise fail("`eps` is what may be left of the sum of 1: between 0 and 1")

    def parameters(self, word: Word, width: int) -> int:
        return width + 1

    def learned(self, word: Word, width: int) -> nn.Module:
        """What makes the probability to halt of a state; it begins near 0.73, a bias of 1 as in
        tensor2tensor."""
        from torch import nn

        chance = nn.Linear(width, 1)
        nn.init.zeros_(chance.weight)
        nn.init.ones_(chance.bias)
        return chance

    def decide(self, word: Word, learned: nn.Module, seen: Seen) -> Decision:
        import torch

        left = seen.carry.get("left")
        left = seen.x.new_ones(seen.x.shape[:2]) if left is None else left
        now = torch.where(seen.running, learned(seen.x)[..., 0].sigmoid(), 0)
        full = left - now <= word["eps"]
        halts = full | seen.last
        weight = torch.where(halts if word["rest"] else full, left, now)
        goes = seen.running & ~halts
        unpaid = seen.running & halts & ~full & (not word["rest"])
        after = torch.where(goes, left - now, left.masked_fill(unpaid, 0))
        kept = 1 - weight if word["basic"] else None
        return Decision(halts, weight, {"left": after}, kept=kept, onward=word["onward"])

    def losses(self, word: Word, turns: Tensor, carry: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`ponder`, the mean of the turns that a token takes and of what remained for the last of them."""
        return {"ponder": (turns + carry["left"]).mean()}


stage = Act()
