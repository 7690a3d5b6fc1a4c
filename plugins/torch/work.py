"""One lane of one call: its logits, and what each of its parts gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attndsl.backend import Call
from attndsl.execution.torch_eval import (
    Env,
    decay_factor,
    evaluate,
    from_diagonals,
    fused_rows,
    gain,
    of_distances,
    of_heads,
    peak,
    positions,
    weigh,
)

from .chunks import Addend, Chunk, Diagonals, Kept, Schedule, Views, chunks_of, equidistant
from .lanes import Lane, Simple, cut_of
from .slabs import Slab

flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def without_weights(lse: Tensor, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """What `flash` gave of these, with -inf where all logits are: it says 0, as of one logit of 0."""
    if not bool((lse == 0).any()):
        return lse
    logit = q @ k.transpose(-1, -2) * scale
    most = (logit if mask is None else logit + mask).amax(-1).view(lse.shape)
    return lse.masked_fill((lse == 0) & (most == -torch.inf), -torch.inf)


KEPT = 2**20
"""Numbers of a chunk's addend up to which it stays in memory between calls."""


@dataclass(frozen=True, eq=False)
class Work:
    """One lane of one call.

    simple    how torch's fused kernel does it, None where it does not
    gradient  whether it is the backward pass
    top       what is subtracted from all logits of a row, the sink's too [X, nq]
    """

    call: Call
    lane: Lane
    simple: Simple | None
    kept: Kept
    gradient: bool
    top: Tensor | None = None
    last: dict[tuple[int, ...], Addend] = field(default_factory=dict)
    """What a bias by distance was the last time, by what it depends on."""

    @cached_property
    def q(self) -> Tensor:
        return self.lane.queries(self.call.q)

    @cached_property
    def k(self) -> Tensor:
        return self.lane.keys(self.call.k)

    @cached_property
    def v(self) -> Tensor:
        return self.lane.keys(self.call.v)

    @cached_property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.call.q.dtype, torch.float32)

    @cached_property
    def schedule(self) -> Schedule:
        grid, simple = self.lane.grid, self.simple if self.fused else None
        cut = cut_of(simple, len(self.q), max(self.q.shape[2], self.v.shape[2]), self.gradient)
        constant = self.simple is not None and self.simple.bias is None
        known = self.kept.setdefault(grid, {})
        key = (cut, constant, self.wide, self.q.device)
        if key not in known:
            chunks, empty = chunks_of(grid, cut, self.q.device)
            masks = {id(c.mask): c.mask for c in chunks if c.mask is None or c.mask.numel() <= KEPT}
            closed = {name: closing(mask, self.zero) for name, mask in masks.items() if constant}
            near = Diagonals.of(grid, self.q.device) if cut.by_distance else None
            known[key] = Schedule([(c, closed.get(id(c.mask))) for c in chunks], empty, near)
        return known[key]

    @cached_property
    def zero(self) -> Tensor:
        return torch.zeros((), dtype=self.wide, device=self.q.device)

    @cached_property
    def slabs(self) -> Sequence[Slab]:
        return () if self.lane.chosen is None else tuple(self.lane.chosen.slabs())

    @property
    def chunks(self) -> Iterator[Chunk]:
        """All: every live pair is in one."""
        yield from (chunk for chunk, _ in self.schedule.chunks)
        for slab in self.slabs:
            yield from slab.chunks

    @property
    def fused(self) -> bool:
        return self.simple is not None and self.q.device.type == "cpu"

    def env(self, chunk: Chunk | None, tables: Mapping[str, Tensor]) -> Env:
        """Axes [X, C, q_len, k_len]."""
        call, b, heads = self.call, self.lane.batch, self.lane.heads
        env = of_heads(call, b, range(heads.start, heads.stop), axes=4)
        at = {}
        if chunk is not None:
            at["q"] = positions(call.q_at, b, chunk.query_tokens(env.device)[None, :, :, None])
            at["k"] = positions(call.k_at, b, chunk.key_tokens(env.device)[None, :, None, :])
        return replace(env, values={**env.values, **at}, tables={**call.tables, **tables})

    def additive(self, chunk: Chunk) -> Addend:
        """Mask and bias as one addend [X or 1, C or 1, q_len, k_len], and which rows it kills."""
        assert self.simple is not None
        if self.simple.bias is None:
            return closing(chunk.mask, self.zero)
        if not self.simple.by_distance:
            env = self.env(chunk, {})
            value = evaluate(self.simple.bias, env, None if chunk.mask is None else chunk.mask[None])
            value = value.to(self.wide)
            return closing(chunk.mask, value.expand(*value.shape[:-2], chunk.q_len, chunk.k_len))
        if not isinstance(chunk, Views) or not equidistant(chunk.part):
            return closing(chunk.mask, self.spread(chunk))
        part = chunk.part
        alike = (part.k0 - part.q0, part.q_len, part.k_len, id(part.mask))
        if alike not in self.last:
            self.last.clear()
            self.last[alike] = closing(chunk.mask, self.spread(replace(chunk, count=1)))
        return self.last[alike]

    def near(self) -> Diagonals:
        assert self.schedule.diagonals is not None
        return self.schedule.diagonals

    def along(self, tables: Mapping[str, Tensor]) -> Tensor:
        """The bias by distance on each diagonal [X or 1, L]; `tables` take the place of the call's."""
        assert self.simple is not None
        assert self.simple.bias is not None
        near, call, b = self.near(), self.call, self.lane.batch
        (_, first_q), (_, first_k) = call.q_at.row(b)[0], call.k_at.row(b)[0]
        beyond = torch.arange(near.first, near.first + len(near.live), device=self.q.device)
        env = self.env(None, tables)
        return of_distances(
            self.simple.bias, env, (first_q - first_k - beyond)[None, None], near.live[None, None]
        )[:, 0]

    @cached_property
    def alongside(self) -> Tensor:
        return self.along({})

    def spread(self, chunk: Chunk) -> Tensor:
        """The bias by distance [X or 1, C, q_len, k_len]."""
        found = from_diagonals(self.alongside[:, self.near().places(chunk)], chunk.run)
        return found.transpose(2, 3).flatten(3)

    def fused_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """As many key heads as query heads and equal head dimensions, which the fused kernel wants: the
        narrower are padded with zeros."""
        width = max(q.shape[3], v.shape[3])
        return [fused_rows(x, width).expand(q.shape[0], -1, -1, -1) for x in (q, k, v)]

    def part(self, chunk: Chunk, addend: Addend | None) -> tuple[Tensor, Tensor]:
        """Output [X, C, q_len, Dv] and log-sum-exp [X, C, q_len] of these pairs alone; without a softmax the
        sums of the weighed values and of the weights."""
        if not self.fused:
            q, k, v = self.sources(chunk)
            return normalise(*self.weights(chunk, q, k, {}), v, self.lane.group.norm.kind)
        assert self.simple is not None
        mask, dead = self.additive(chunk) if addend is None else addend
        q, k, v = chunk.queries(self.q), chunk.keys(self.k), chunk.keys(self.v)
        shape = q.shape[:3]
        if shape[1] == k.shape[0] == 1 and q.is_contiguous():
            # heads that share keys are rows of one product
            q = q.view(1, 1, -1, q.shape[3])
            mask = mask if mask is None else mask.expand(*shape, -1).reshape(1, 1, q.shape[2], -1)
        q, k, v = self.fused_inputs(q, k, v)
        out, lse = flash(q, k, v, attn_mask=mask, scale=self.simple.scale)
        out, lse = out.view(*shape, -1), lse.view(shape)
        if dead is not None:
            lse = lse.masked_fill(dead, -torch.inf)
        lse = without_weights(lse, q, k, mask, self.simple.scale)
        return out[..., : self.v.shape[2]], lse

    def sources(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the chunk in at least float32."""
        q, k, v = chunk.queries(self.q), chunk.keys(self.k), chunk.keys(self.v)
        return q.to(self.wide), k.to(self.wide), v.to(self.wide)

    def weights(
        self, chunk: Chunk, q: Tensor, k: Tensor, tables: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits with -inf outside the relation, and the factor of the weights; [X, C, q_len, k_len]."""
        group = self.lane.group
        env = self.env(chunk, tables)
        shape = (*q.shape[:3], k.shape[2])
        values = {**env.values, "Q": q, "K": k}
        if any("s" in e.free for e in (group.score, group.decay) if e is not None):
            values["s"] = q @ k.transpose(-1, -2) / self.call.q.shape[3] ** 0.5
        env = replace(env, values=values)
        mask = torch.ones((), dtype=torch.bool, device=q.device) if chunk.mask is None else chunk.mask
        live = mask.expand(1, *shape[1:])
        logit = torch.where(live, evaluate(group.score, env, live).to(self.wide), -torch.inf).expand(shape)
        if self.top is not None:
            logit = logit - chunk.queries(self.top)[..., None]
        if group.decay is None:
            return logit, None
        return logit, decay_factor(group.decay, env, live).to(self.wide)

    def merge(self, chunk: Chunk, out: Tensor, lse: Tensor, o: Tensor, more: Tensor) -> None:
        """One more part of some rows: exactly what the pairs of both give together."""
        if chunk.fresh:
            chunk.put_queries(out, o)
            chunk.put_queries(lse, more)
            return
        if self.lane.group.norm.kind != "softmax":
            chunk.add_queries(out, o)
            chunk.add_queries(lse, more)
            return
        both = torch.logaddexp(chunk.queries(lse), more)
        share = torch.exp(more - both.masked_fill(both == -torch.inf, 0.0))
        chunk.blend_queries(out, o.to(out.dtype), share[..., None])
        chunk.put_queries(lse, both)

    def merge_slab(self, slab: Slab, found: Tensor, out: Tensor, lse: Tensor) -> None:
        """The parts of a slab, in the room for them."""
        totals = lse.new_empty(found.shape[:2])
        softmax = self.lane.group.norm.kind == "softmax"
        totals[:, -1] = -torch.inf if softmax else 0.0
        for chunk, some in slab.pieces():
            o, more = self.part(chunk, None)
            found[:, some], totals[:, some] = o[:, 0], more[:, 0]
        parts, out, lse = totals[:, slab.places], out[:, slab.rows], lse[:, slab.rows]
        if not softmax:
            out += slab.sums(found)
            lse += parts.sum(-1)
            return
        both = torch.logaddexp(lse, parts.logsumexp(-1))
        base = both.masked_fill(both == -torch.inf, 0.0)
        out *= torch.exp(lse - base)[..., None]
        out += slab.sums(found, torch.exp(parts - base[..., None]))
        lse.copy_(both)

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """The results, of all parts of every row."""
        if self.lane.group.norm.kind == "softmax":
            self.add_sink(out, lse)
            return
        if self.lane.group.norm.kind == "linear":
            out.div_(lse.masked_fill(lse == 0, torch.inf)[..., None])
        lse.log_()

    def sink(self, tables: Mapping[str, Tensor]) -> Tensor | None:
        """The sink's logit of every row [X, nq]; `tables` take the place of the call's."""
        if self.lane.group.norm.sink is None:
            return None
        found = evaluate(self.lane.group.norm.sink, self.env(None, tables)).to(self.wide)
        sink = found.expand(len(self.q), 1, 1, 1).view(-1, 1).expand(self.q.shape[:2])
        return sink if self.top is None else sink - self.top

    def add_sink(self, out: Tensor, lse: Tensor) -> None:
        sink = self.sink({})
        if sink is not None:
            total = torch.logaddexp(lse, sink).masked_fill(lse == -torch.inf, -torch.inf)
            out *= torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))[..., None]
            lse.copy_(total)


def closing(mask: Tensor | None, bias: Tensor) -> Addend:
    """-inf where the mask [C, q_len, k_len] does not hold, and which rows have nothing else."""
    if mask is None and bias.dim() == 0:
        return None, None
    addend = bias if mask is None else torch.where(mask[None], bias, -torch.inf)
    dead = (addend == -torch.inf).all(-1)
    return addend, dead if bool(dead.any()) else None


def normalise(logit: Tensor, factor: Tensor | None, v: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What one part gives, as in `Work.part`."""
    if kind != "softmax":
        weight = gain(kind, logit)
        weight = weight if factor is None else weight * factor
        return weight @ v, weight.sum(-1)
    top = peak(logit, factor)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight = weigh(logit, top, factor)
    total = weight.sum(-1)
    return weight @ v / total.masked_fill(total == 0, 1.0)[..., None], torch.log(total) + top.squeeze(-1)
