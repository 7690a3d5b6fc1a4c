"""The backward pass of one lane.

Each function adds the gradients of tables, or the `slopes` of a bias by distance, in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import along_diagonals, gain, singles, weigh

from .chunks import Addend, Chunk, by_run
from .work import Work

LOG2_E = 1 / math.log(2.0)


@dataclass(frozen=True, eq=False)
class Rows:
    """Of every query row of a lane, in at least float32: [X, nq, Dv] gradient and output, [X, nq]
    log-sum-exp (beyond the work's `top` if it has one) or, without a softmax, sum of the weights, inf for an
    empty row, and the gradient of the log-sum-exp if there is one."""

    grad_out: Tensor
    out: Tensor
    total: Tensor
    grad_lse: Tensor | None

    @cached_property
    def delta(self) -> Tensor:
        """sum(grad_out * out) - grad_lse [X, nq]"""
        delta = (self.grad_out * self.out).sum(-1)
        return delta if self.grad_lse is None else delta - self.grad_lse


def room_of(work: Work) -> Tensor:
    """Where `simple_gradient` forms the weights of one chunk and their slopes: fresh memory for each
    would cost a third more time."""
    sizes = [c.count * c.q_len * c.k_len for c in work.chunks] if work.simple else []
    most = max(sizes, default=0)
    return work.q.new_empty((2, len(work.q) * most), dtype=work.wide)


def slopes_of(work: Work, wanted: Sequence[str]) -> Tensor | None:
    """Where to sum the gradients of a bias by distance, if it has any [X, L]."""
    simple = work.simple
    if simple is None or simple.bias is None or not simple.by_distance:
        return None
    asked = not {table.name for table in simple.bias.tables}.isdisjoint(wanted)
    shape = (len(work.q), len(work.near().live))
    return torch.zeros(shape, dtype=work.wide, device=work.q.device) if asked else None


@dataclass(frozen=True, eq=False)
class Back:
    """What comes back to rows, and what the gradients of a lane's keys, values and tables are added to, or of
    a bias by distance the `slopes`; `room` as `room_of` gives it."""

    rows: Rows
    keys: Tensor
    values: Tensor
    tables: dict[str, Tensor]
    room: Tensor
    slopes: Tensor | None


def part_gradient(work: Work, chunk: Chunk, addend: Addend | None, back: Back) -> Tensor:
    """The gradient of these queries; the others are added in place.

    With the L of the whole row, exp(l - L) is the final weight, so the parts need no merging.
    """
    if work.simple is not None:
        addend = work.additive(chunk) if addend is None else addend
        gq, gk, gv = simple_gradient(work, chunk, addend, back.rows, back.room, back.slopes)
    else:
        gq, gk, gv = general_gradient(work, chunk, back.rows, back.tables)
    for total, g in ((back.keys, gk), (back.values, gv)):
        chunk.add_keys(total, g.sum(0, keepdim=True) if total.shape[0] < g.shape[0] else g)
    return gq


def general_gradient(
    work: Work, chunk: Chunk, rows: Rows, tables: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values; those of tables are added in place."""
    kind = work.lane.group.norm.kind
    q, k, v = work.sources(chunk)
    grad_out, delta = chunk.queries(rows.grad_out), chunk.queries(rows.delta)
    over = chunk.queries(rows.total)[..., None]

    def weights(q: Tensor, k: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        logit, factor = work.weights(chunk, q, k, tables)
        if kind == "softmax":
            return weigh(logit, over, factor)
        weight = gain(kind, logit) if factor is None else factor * gain(kind, logit)
        return weight / over if kind == "linear" else weight

    weight, pull = vjp(weights, q, k, singles(work.call.tables, tables))
    if kind not in ("softmax", "linear"):
        # no sum is divided by: of what delta is for, only the gradient of its logarithm is left
        delta = torch.zeros_like(delta)
        if rows.grad_lse is not None:
            delta = -chunk.queries(rows.grad_lse) / over.squeeze(-1)
    gq, gk, grads = pull(grad_out @ v.transpose(-1, -2) - delta[..., None])
    for name, g in grads.items():
        tables[name] += g
    return gq, gk, weight.transpose(-1, -2) @ grad_out


def simple_gradient(
    work: Work, chunk: Chunk, addend: Addend, rows: Rows, room: Tensor, slopes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Five matrix products, in base 2: torch's exp2 takes a third of the time of its exp, and no longer
    where a weight vanishes. Query heads that share a key head are rows of one product."""
    assert work.simple is not None
    q, k, v = work.sources(chunk)
    shape, groups, scale = (*q.shape[:3], k.shape[2]), k.shape[0], work.simple.scale
    q, grad_out = (folded(x, groups) for x in (q * scale, chunk.queries(rows.grad_out)))
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    weight, slope = (x[: math.prod(shape)].view(-1, q.shape[1], shape[3]) for x in room)
    start, base = unfolded(weight, shape), chunk.queries(rows.total)[..., None] * -LOG2_E
    if addend[0] is None:
        start.copy_(base)
    else:
        torch.add(base, addend[0], alpha=LOG2_E, out=start)
    weight.baddbmm_(q, k.transpose(1, 2), alpha=LOG2_E).exp2_()
    unfolded(slope, shape).copy_(-chunk.queries(rows.delta)[..., None])
    slope.baddbmm_(grad_out, v.transpose(1, 2)).mul_(weight)
    if slopes is not None:
        sums = along_diagonals(by_run(unfolded(slope, shape), chunk.run)).sum(-2)
        slopes.index_add_(1, work.near().places(chunk).flatten(), sums.flatten(1))
    gq = unfolded(torch.bmm(slope, k).mul_(scale), (*shape[:3], k.shape[2]))
    gk, gv = torch.bmm(slope.transpose(1, 2), q), torch.bmm(weight.transpose(1, 2), grad_out)
    gk, gv = (x.view(groups, shape[1], *x.shape[1:]) for x in (gk, gv))
    return gq, gk, gv


def bias_gradient(work: Work, slopes: Tensor | None, tables: dict[str, Tensor]) -> None:
    if slopes is None:
        return
    _, pull = vjp(lambda tables: work.along(tables).expand_as(slopes), singles(work.call.tables, tables))
    (grads,) = pull(slopes)
    for name, g in grads.items():
        tables[name] += g


def sink_gradient(work: Work, rows: Rows, tables: dict[str, Tensor]) -> None:
    """The sink's weight exp(sink - L) has value vector 0, so its logit's gradient is -weight * delta."""
    sink = work.lane.group.norm.sink
    if sink is None or not tables:
        return
    value, pull = vjp(work.sink, singles(work.call.tables, tables))
    assert value is not None
    weight = torch.exp(value - rows.total)
    (grads,) = pull(-weight * rows.delta)
    for name, g in grads.items():
        tables[name] += g


def folded(x: Tensor, groups: int) -> Tensor:
    """[X, C, R, D] -> [groups * C, X / groups * R, D]"""
    return x.view(groups, x.shape[0] // groups, *x.shape[1:]).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def unfolded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The other way round, `shape` being the one of the result."""
    heads, count, rows, width = shape
    groups = x.shape[0] // count
    return x.view(groups, count, heads // groups, rows, width).transpose(1, 2).flatten(0, 1)
