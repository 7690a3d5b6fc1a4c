"""Top-k by a few channels alone: Yang et al. 2024, Double Sparsity, section 3.

Which channels are heavy is found beforehand, on other text, and comes as an input. A score over `c` channels
of `D` reads c / D of the keys.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.execution.torch_eval import environment, evaluate
from attndsl.expr import Selected, Table
from attndsl.selection import Offered


class Heavy:
    """Registered as `heavy`: `heavy(r, channels, of = R)`, `channels` an input `int[H, c]` of key heads.

    For each query the r keys that `of` holds with the greatest products over these channels.
    """

    kind: Literal["list"] = "list"

    def signature(self, r: int, channels: Table) -> None: ...

    def check(self, origin: Selected) -> None:
        channels: Table = origin["channels"]
        if channels.dtype != "int" or len(channels.explicit) != 1:
            raise fail(
                "the channels of `heavy` are integers", help="declare them: `inputs channels : int[H, c]`"
            )
        if (origin.rows, origin.unit) != (1, 1):
            raise fail("`heavy` chooses keys for each query, not blocks of them")
        if self.rounds(origin) <= 0:
            raise fail(f"`heavy` chooses {origin['r']}, and at least 1 must be chosen")

    def rounds(self, origin: Selected) -> int:
        return int(origin["r"])

    def relates(self, origin: Selected) -> None:
        return None

    def reads(self, origin: Selected) -> Literal["of"]:
        return "of"

    def counts(self, origin: Selected, problem: Problem) -> dict[str, float]:
        channels: Table = origin["channels"]
        width = channels.dims[-1] if isinstance(channels.dims[-1], int) else problem.head_dim / 4
        scores = float(problem.batch * problem.heads * problem.q_length * problem.length)
        return {"products": scores * width, "sorted": scores}

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        scores, r = self._scores(origin, offered), self.rounds(origin)
        # of equal scores the first: a stable sort, of NaN as of the greatest
        order = torch.sort(scores, dim=-1, descending=True, stable=True)
        return torch.where(order.values == -torch.inf, -1, order.indices)[..., :r]

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        """One row after the other."""
        scores = self._scores(origin, offered)
        r = min(self.rounds(origin), scores.shape[-1])
        found = torch.full((*scores.shape[:-1], r), -1)
        for row, out in zip(scores.flatten(0, -2), found.view(-1, r), strict=True):
            live = [key for key in range(len(row)) if row[key] != -torch.inf]
            best = sorted(live, key=lambda key: (-row[key].item(), key))[:r]
            out[: len(best)] = torch.tensor(best, dtype=torch.int64)
        return found

    def _scores(self, origin: Selected, offered: Offered) -> Tensor:
        """[B, H, nq, n], -inf for what `of` does not hold."""
        channels: Table = origin["channels"]
        assert origin.of is not None
        q, share = offered.q, offered.q.shape[1] // offered.k.shape[1]
        k = offered.k.repeat_interleave(share, 1)
        at = offered.tables[channels.name][..., None, :].expand(*q.shape[:-1], -1)
        at_k = offered.tables[channels.name][..., None, :].expand(*k.shape[:-1], -1)
        products = q.gather(-1, at) @ k.gather(-1, at_k).transpose(-1, -2)
        live = evaluate(origin.of, environment(offered)).expand(products.shape)
        return torch.where(live, products, -torch.inf)


selection = Heavy()
