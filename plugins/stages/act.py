"""`loop(act(eps = 0.01), max = N)`: adaptive computation time of each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attndsl.errors import fail
from attndsl.stage import Decision, Halting, Seen, Word

if TYPE_CHECKING:
    from torch import Tensor, nn


class Act(Halting):
    """Registered as `act`: a token runs until its chances to halt sum up to 1 - eps. It becomes the sum of
    its states weighted by them, the last by what remains, so that weights sum up to 1 (Graves 2016, section
    2.1; of each token: Dehghani et al. 2019, section 2.2).

    eps     what may be left of the sum
    basic   the state so far fades by as much as a new one adds, as in tensor2tensor: x p + y (1 - p), of
            which the weights do not sum up to 1
    onward  states of tokens that have left change on, as in tensor2tensor
    unpaid  where the last turn comes first, what remains is not paid, as in tensor2tensor
    """

    def signature(
        self, eps: float = 0.01, basic: bool = False, onward: bool = False, unpaid: bool = False
    ) -> None: ...

    def check(self, word: Word) -> None:
        if not 0 < word["eps"] < 1:
            raise fail("`eps` is what may be left of the sum of 1: between 0 and 1")

    def parameters(self, word: Word, width: int, turns: int) -> int:
        return width + 1

    def learned(self, word: Word, width: int, turns: int) -> nn.Module:
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
        ends = left - now <= word["eps"]
        halts = ends | seen.last
        weight = torch.where(ends if word["unpaid"] else halts, left, now)
        goes = seen.running & ~halts
        unpaid = seen.running & halts & ~ends & word["unpaid"]
        return Decision(
            halts,
            weight,
            keeps=1 - weight if word["basic"] else None,
            onward=word["onward"],
            carry={"left": torch.where(goes, left - now, left.masked_fill(unpaid, 0))},
        )

    def losses(self, word: Word, turns: Tensor, carry: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`ponder`, the mean of the turns that a token takes and of what remained for the last of them."""
        return {"ponder": (turns + carry["left"]).mean()}


stage = Act()
