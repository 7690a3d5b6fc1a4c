"""Sinks: one more key of each row that has any, with a logit of its own and a value of zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import environment, evaluate, singles
from attndsl.tiles.lowering import head_groups

Groups = Sequence[tuple[HeadGroup, NDArray[np.bool_]]]
"""Groups of heads, and bool [H] which they are."""


def without_sinks(attention: Attention) -> Attention:
    """The same with no sink in any row."""
    groups = (replace(group, norm=replace(group.norm, sink=None)) for group in attention.groups)
    return replace(attention, groups=tuple(groups))


def groups_of(attention: Attention, heads: int) -> Groups:
    """Those of so many heads that have a sink."""
    which = np.array(head_groups(attention, heads))
    found = ((group, which == i) for i, group in enumerate(attention.groups) if group.norm.sink is not None)
    return [(group, here) for group, here in found if here.any()]


@lru_cache(maxsize=64)
def truths(of: tuple[bool, ...], device: torch.device) -> Tensor:
    """On a device, where they stay: to send them there is to wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(of).to(device)


def logits(groups: Groups, call: Call) -> Tensor:
    """[B, H, 1] in at least float32, -inf for heads of other groups."""
    env = environment(call)
    total = torch.full((*call.q.shape[:2], 1), -torch.inf, dtype=env.dtype, device=env.device)
    for group, heads in groups:
        assert group.norm.sink is not None
        value = evaluate(group.norm.sink, env).to(env.dtype).expand(*total.shape, 1).squeeze(-1)
        total = torch.where(truths(tuple(heads.tolist()), env.device)[:, None], value, total)
    return total


def merge(groups: Groups, call: Call, out: Tensor, lse: Tensor) -> Tensor:
    """The log-sum-exp [B, H, nq] with the sinks, which was without; the output [B, H, nq, Dv] is scaled in
    place. A row without a key has no sink."""
    empty = lse == -torch.inf
    total = torch.logaddexp(lse, logits(groups, call)).masked_fill(empty, -torch.inf)
    out.mul_(torch.exp(lse - total.masked_fill(empty, torch.inf))[..., None])
    return total


def as_part(groups: Groups, call: Call, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, top and sum of weights of the sinks alone, beside `total` [B, H, nq] of the keys: none where
    that is 0."""
    beside = total != 0
    top = logits(groups, call).double().expand(total.shape).masked_fill(~beside, -torch.inf)
    own = beside & (top != -torch.inf)
    return total.new_zeros(()).expand(*total.shape, 1), top, own.to(total.dtype)


def add_gradients(
    groups: Groups, call: Call, lse: Tensor, delta: Tensor, tables: Mapping[str, Tensor]
) -> None:
    """Adds those of `tables` that come through the sinks.

    lse    [B, H, nq], the sinks included
    delta  [B, H, nq], what is subtracted from what comes back to weights
    """
    if not groups or not tables:
        return

    def values(more: Mapping[str, Tensor]) -> Tensor:
        return logits(groups, replace(call, tables={**call.tables, **more}))

    value, pull = vjp(values, singles(call.tables, tables))
    weight = torch.exp(value - lse.masked_fill(lse == -torch.inf, torch.inf))
    (found,) = pull(-(weight * delta).sum(-1, keepdim=True))
    for name, g in found.items():
        tables[name].add_(g)
