"""Calls like an earlier one: what was checked, looked up and laid out for that holds for them too. To do it
again would take as long as a kernel of 100 us."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attndsl.backend import Repeatable
from attndsl.execution.lowered import Lowered, Places, Recent
from attndsl.execution.operator import PLAIN, Again, in_memory, repeat, watched
from attndsl.tiles.lowering import Sizes

Likeness = tuple[object, ...]
NOWHERE: Places = (None, None, None, None, None)
"""Said of where queries and keys stand."""


def likeness(q: Tensor, k: Tensor, v: Tensor) -> Likeness | None:
    """What is equal of calls that differ in nothing but the numbers of their vectors; None where something
    watches or transforms the call, and where these are no plain tensors of a CPU."""
    if not (_plain(q) and _plain(k) and _plain(v)) or watched(q) or torch.is_autocast_enabled("cpu"):
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    sizes = q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()
    return *sizes, q.dtype, k.dtype, v.dtype, torch.get_num_threads()


def _plain(x: Tensor) -> bool:
    strided = type(x) in PLAIN and x.is_cpu and not x.is_nested and x.layout is torch.strided
    return strided and in_memory(x) is x


@dataclass(frozen=True, eq=False)
class Repeats:
    """The last kinds of calls of a plan that takes nothing but q, k and v: None where nothing is prepared."""

    known: Recent[tuple[Lowered, Sizes, Again] | None] = field(default_factory=Recent)

    def results(self, like: Likeness, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """Output and log-sum-exp; None where no such call is known."""
        found = self.known.values.get(like)
        return None if found is None else repeat(*found, q, k, v)

    def keep(self, like: Likeness, lowered: Lowered, q: Tensor, k: Tensor, v: Tensor) -> None:
        """What serves calls like this one, which went well."""
        if like not in self.known.values:
            self.known.get(like, lambda: _prepared(lowered, q, k, v))


def _prepared(lowered: Lowered, q: Tensor, k: Tensor, v: Tensor) -> tuple[Lowered, Sizes, Again] | None:
    sizes = lowered.sizes(q, k, NOWHERE)
    call = lowered.call_of(q, k, v, {}, sizes)
    again = lowered.kernel.repeated(call) if isinstance(lowered.kernel, Repeatable) else None
    return None if again is None else (lowered, sizes, again)
