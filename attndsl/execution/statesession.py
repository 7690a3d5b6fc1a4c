"""StateSession: a session whose kernel keeps a state in place of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.analysis.lasting import kept, over_length
from attndsl.axis import Axis
from attndsl.backend import State, Stateful
from attndsl.execution.session import Session, following, picked

if TYPE_CHECKING:
    from attndsl.execution.plan import Plan

HELD = 32
"""Keys that the state takes at once: one at a time they would need as many calls."""


def stateful(plan: Plan, rewind: int) -> bool:
    """Whether a state serves sessions of this plan; a table over n tells of keys that are gone."""
    fits = rewind + HELD < plan.problem.length and not plan.attention.streams
    return fits and isinstance(plan.lowered.kernel, Stateful) and not over_length(plan.attention)


class StateSession(Session):
    """A session whose memory does not grow: sequences have no end.

    k, v     [B, Hkv, .., D and Dv], the last keys of each row: the one at position p is entry p - taken
    state    what the kernel keeps of those before; None: no row has any
    taken    how many those are, of each row
    """

    def __init__(self, plan: Plan, batch: int, capacity: int, **more: Any) -> None:
        super().__init__(plan, batch, capacity, **more)
        self.state: State | None = None
        self.taken = self.lengths
        self.k, self.v = self.k[:, :, :0], self.v[:, :, :0]
        self.at_once = min(plan.problem.q_length, plan.problem.length - self.slots)

    def _places(self, capacity: int) -> tuple[int, int]:
        kept(self.plan.attention, self.plan.problem)
        return 0, self.rewind + HELD

    def _room(self) -> str:
        return "a state in place of keys"

    def _take(self, rows: Sequence[int], at: Tensor) -> None:
        super()._take(rows, at)
        self.taken = tuple([self.taken[row] for row in rows])
        if self.state is not None:
            self.state = tuple([x[at] for x in self.state])

    def truncate(self, lengths: Any) -> None:
        """As of a Session: `lengths` are left. A row goes back to where its state ends, `rewind` tokens or
        more. Raises AttnError beyond that."""
        super().truncate(lengths)
        self.taken = tuple(map(min, self.taken, self.lengths))

    def _back(self, row: int) -> int:
        return self.taken[row]

    def _append(
        self, q: Tensor, k: Tensor, v: Tensor, counts: tuple[int, ...], n: int, **call: Any
    ) -> Tensor:
        size, held = k.shape[2], self.k.shape[2]
        starts, taken = np.array(self.lengths), np.array(self.taken)
        grown = starts + counts
        keys, values = (torch.cat([old, new], 2) for old, new in ((self.k, k), (self.v, v)))
        # what stands behind the tokens of a row no query sees
        old = following(self.taken, held)
        at = np.concatenate(
            [np.where(old < starts[:, None], old, grown[:, None]), following(starts, size)], 1
        )
        if self.state is not None and not taken.all():
            first = self._after(keys, values, at, np.zeros_like(taken), None, **call)
            none = torch.from_numpy(taken == 0).to(k.device)
            self.state = tuple(
                [
                    x.where(~none.view(-1, *(1,) * (x.dim() - 1)), y)
                    for x, y in zip(self.state, first, strict=True)
                ]
            )
        at_q = Axis.of(np.minimum(following(starts, size), np.maximum(grown - 1, 0)[:, None]))
        out, _ = self.plan._step(q, keys, values, at_q, Axis.of(at), self.state, **call)
        if max(grown - taken) > self.slots:
            taken = np.maximum(taken, grown - self.rewind)
            self.state = self._after(keys, values, at, taken, self.state, **call)
        entries = following(taken, int(max(grown - taken)))
        entries = np.where(
            entries < starts[:, None],
            entries - np.array(self.taken)[:, None],
            entries - starts[:, None] + held,
        )
        self.k, self.v = (picked(x, entries) for x in (keys, values))
        self.lengths, self.taken = tuple(grown.tolist()), tuple(taken.tolist())
        self.reached = tuple(map(max, self.reached, self.lengths))
        behind = torch.tensor(counts)[:, None] <= torch.arange(size)
        return out.masked_fill(behind.to(out.device)[:, None, :, None], 0.0) if behind.any() else out

    def _after(
        self,
        keys: Tensor,
        values: Tensor,
        at: NDArray[np.int64],
        ends: NDArray[np.int64],
        state: State | None,
        **call: Any,
    ) -> State:
        """The state after all keys before `ends`, one of each row: that a query there would see."""
        query = keys.new_zeros(len(keys), self.plan.problem.heads, 1, keys.shape[3])
        _, found = self.plan._step(
            query, keys, values, Axis.of(ends[:, None] - 1), Axis.of(at), state, **call
        )
        return found
