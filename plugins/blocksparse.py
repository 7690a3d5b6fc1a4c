"""The `torch` backend: block sparse attention from torch's own operators, forward and backward.

A mask is taken apart (`take_apart`) into batches of equal problems. Stretches of rows that look the
same run on strided views of k and v, which overlap and are never copied; the rest on gathered tiles. Each
part gives an output and a log-sum-exp; two parts of a row merge exactly:
L = logaddexp(L1, L2), o = exp(L1 - L) o1 + exp(L2 - L) o2 (Dao et al., FlashAttention, 2022).
Memory grows with the entries of the BlockMask and the tokens, never with their square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Kernel, Problem
from attndsl.execution.operator import Runner, attend, register, vjp
from attndsl.execution.parts import Gathered, Part, Strided, take_apart
from attndsl.execution.torch_eval import Env, affine_in_s, by_distance, constant_scale, decay_factor, evaluate
from attndsl.expr import Expr
from attndsl.tiles.blockmask import BlockMask, TileGrid

flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)

DTYPES = ("float32", "float64", "bfloat16", "float16")
FORWARD_UNIT, BACKWARD_UNIT, FORMED_UNIT = 32, 128, 64
"""Query rows of one problem in a band: what ran fastest on CPU (benchmarks/attention.py)."""
TRANSIENT, FORMED = 2**22, 3 * 2**18
"""Numbers that one step may copy, and weights that it may form: the latter pay off while in cache."""
KEPT = 2**20
"""Numbers of a chunk's addend up to which it stays in memory between calls."""
LANES = 16
"""Heads that run together."""
FLOPS, SECONDS_PER_WEIGHT, SECONDS_PER_CALL, SECONDS_PER_LANE = 110e9, 6e-9, 2e-4, 4e-3
"""Of two cores with AVX-512: the rate over the pairs that are computed, a weight that is formed, a call of
a kernel, what a lane takes in any case."""
BACKWARD = 3.0
"""Backward beside forward: 5 matrix products to 2, and wider windows."""
Q_MAX, K_MAX = 256, 2048
"""Queries and keys of one problem where the weights are formed."""


def windows(x: Tensor, start: int, step: int, length: int, count: int) -> Tensor:
    """[X, n, ...] -> [X, count, length, ...]: the c-th window starts at start + c * step. A view."""
    x = x[:, start:]
    strides = (x.stride(0), step * x.stride(1), *x.stride()[1:])
    return x.as_strided((x.shape[0], count, length, *x.shape[2:]), strides)


@dataclass(frozen=True, eq=False)
class Views:
    """Some problems of a Strided part; mask [1, q_len, k_len]; `fresh`: no earlier chunk has these rows."""

    part: Strided
    first: int
    count: int
    mask: Tensor | None
    fresh: bool

    def query_tokens(self, device: torch.device) -> Tensor:
        return _tokens(self.part.q0, self.part.q_step, self.part.q_len, self.first, self.count, device)

    def key_tokens(self, device: torch.device) -> Tensor:
        return _tokens(self.part.k0, self.part.k_step, self.part.k_len, self.first, self.count, device)

    def queries(self, x: Tensor) -> Tensor:
        p = self.part
        return windows(x, p.q0 + self.first * p.q_step, p.q_step, p.q_len, self.count)

    def keys(self, x: Tensor) -> Tensor:
        p = self.part
        return windows(x, p.k0 + self.first * p.k_step, p.k_step, p.k_len, self.count)

    def put_queries(self, x: Tensor, value: Tensor) -> None:
        self.queries(x).copy_(value)

    def blend_queries(self, x: Tensor, value: Tensor, share: Tensor) -> None:
        """x + share * (value - x)"""
        self.queries(x).lerp_(value, share)

    def add_queries(self, x: Tensor, value: Tensor) -> None:
        self.queries(x).add_(value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """The windows are the same or do not overlap."""
        p, start = self.part, self.part.k0 + self.first * self.part.k_step
        if self.count == 1 or p.k_step == 0:
            x[:, start : start + p.k_len] += value.sum(1)
        else:
            self.keys(x).add_(value)


@dataclass(frozen=True, eq=False)
class Gathers:
    """Some problems of a Gathered part: tokens [C, q_len] of the queries, [C, k_len] of the keys; mask
    [C, q_len, k_len]."""

    rows: Tensor
    cols: Tensor
    mask: Tensor | None
    fresh: bool

    @property
    def count(self) -> int:
        return len(self.rows)

    def query_tokens(self, device: torch.device) -> Tensor:
        return self.rows

    def key_tokens(self, device: torch.device) -> Tensor:
        return self.cols

    def queries(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.rows.flatten()).view(len(x), *self.rows.shape, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.cols.flatten()).view(len(x), *self.cols.shape, *x.shape[2:])

    def put_queries(self, x: Tensor, value: Tensor) -> None:
        x.index_copy_(1, self.rows.flatten(), value.flatten(1, 2).to(x.dtype))

    def blend_queries(self, x: Tensor, value: Tensor, share: Tensor) -> None:
        self.put_queries(x, torch.lerp(self.queries(x), value.to(x.dtype), share))

    def add_queries(self, x: Tensor, value: Tensor) -> None:
        self.put_queries(x, self.queries(x) + value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        x.index_add_(1, self.cols.flatten(), value.flatten(1, 2).to(x.dtype))


Chunk = Views | Gathers
Addend = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Chunks:
    """In the order in which they run, each with what to add to its logits where that is the same in every
    call and small; and the rows of no fresh chunk, which start as empty."""

    chunks: list[tuple[Chunk, Addend | None]]
    empty: Tensor


Kept = WeakKeyDictionary[TileGrid, dict[tuple[object, ...], Chunks]]


def _tokens(start: int, step: int, length: int, first: int, count: int, device: torch.device) -> Tensor:
    c = torch.arange(first, first + count, device=device)
    return start + c[:, None] * step + torch.arange(length, device=device)


@dataclass(frozen=True)
class Cut:
    """How a grid is cut into chunks: rows of one problem in a band; whether parts that would form many
    weights are cut; whether keys have gradients; numbers copied per token; numbers formed per pair."""

    unit: int
    bounded: bool
    gradient: bool
    per_token: int
    per_pair: int

    def problems(self, q_len: int, k_len: int, copied: int) -> int:
        """How many at a time."""
        size = TRANSIENT // (self.per_token * copied)
        return max(1, min(size, FORMED // (q_len * k_len * self.per_pair)) if self.per_pair else size)


def chunks_of(grid: TileGrid, cut: Cut, device: torch.device) -> tuple[list[Chunk], Tensor]:
    """What to run for this mask, in this order, and the rows of no fresh chunk."""
    parts = list(take_apart(grid, cut.unit))
    if cut.bounded:
        parts = [piece for part in parts for piece in _bound(part)]
    if cut.gradient:
        parts = [piece for part in parts for piece in _disjoint(part)]
    parts.sort(key=lambda p: -p.count * p.q_len if isinstance(p, Strided) else 1)
    touched, started = torch.zeros((2, grid.nq), dtype=torch.bool)
    chunks: list[Chunk] = []
    for part in parts:
        if isinstance(part, Strided):
            rows = _tokens(part.q0, part.q_step, part.q_len, 0, part.count, touched.device).flatten()
        else:
            rows = (torch.from_numpy(part.rows)[:, None] + torch.arange(part.q_len)).flatten()
        fresh = not bool(touched[rows].any())
        touched[rows] = True
        started[rows] |= fresh
        if isinstance(part, Strided):
            chunks.extend(_views(part, fresh, cut, device))
        else:
            chunks.extend(_gathers(part, fresh, grid.n, cut, device))
    return chunks, torch.nonzero(~started).squeeze(1).to(device)


def _views(part: Strided, fresh: bool, cut: Cut, device: torch.device) -> Iterator[Views]:
    size = cut.problems(part.q_len, part.k_len, max(part.q_len, part.k_len if cut.gradient else 1))
    mask = None if part.mask is None else torch.from_numpy(part.mask).to(device)[None]
    for first in range(0, part.count, size):
        yield Views(part, first, min(size, part.count - first), mask, fresh)


def _gathers(part: Gathered, fresh: bool, n: int, cut: Cut, device: torch.device) -> Iterator[Gathers]:
    k_len = part.cols.shape[1] * part.block
    size = cut.problems(part.q_len, k_len, part.q_len + k_len)
    inside = torch.arange(part.block, device=device)
    masks = torch.from_numpy(part.masks).to(device)
    for first in range(0, len(part.rows), size):
        some = slice(first, first + size)
        rows = torch.from_numpy(part.rows[some]).to(device)
        cols = torch.from_numpy(part.cols[some]).to(device)
        mask = None
        if part.contents is not None:
            mask = masks[torch.from_numpy(part.contents[some]).to(device)]
            mask = mask[:, :, : part.q_len].transpose(1, 2).flatten(2)
        tokens = (cols[:, :, None] * part.block + inside).flatten(1).clamp_max(n - 1)
        yield Gathers(rows[:, None] + inside[: part.q_len], tokens, mask, fresh)


def _disjoint(part: Part) -> Iterator[Part]:
    """Every m-th problem together, so that their keys, to which gradients are added, do not overlap."""
    if not isinstance(part, Strided) or part.k_step == 0:
        yield part
        return
    turns = min(part.count, -(-part.k_len // part.k_step))
    for turn in range(turns):
        yield replace(
            part,
            q0=part.q0 + turn * part.q_step,
            q_step=part.q_step * turns,
            k0=part.k0 + turn * part.k_step,
            k_step=part.k_step * turns,
            count=len(range(turn, part.count, turns)),
        )


def _bound(part: Part) -> Iterator[Part]:
    if not isinstance(part, Strided) or part.mask is not None or part.count > 1:
        yield part
        return
    for q in range(0, part.q_len, Q_MAX):
        for k in range(0, part.k_len, K_MAX):
            yield replace(
                part,
                q0=part.q0 + q,
                q_len=min(Q_MAX, part.q_len - q),
                k0=part.k0 + k,
                k_len=min(K_MAX, part.k_len - k),
            )


@dataclass(frozen=True, eq=False)
class Lane:
    """Query heads of one batch row that share a grid and read the same key heads, or one each."""

    group: HeadGroup
    grid: TileGrid
    batch: int
    heads: slice
    kv_heads: slice

    def queries(self, x: Tensor) -> Tensor:
        return x[self.batch, self.heads]

    def keys(self, x: Tensor) -> Tensor:
        return x[self.batch, self.kv_heads]


STRAIN = 2.0**10
"""Beyond this a log-sum-exp of 32 bits says little of how many keys it is of: -1e9 as a mask, say."""


def strained(lse: Tensor) -> bool:
    """Whether some row needs its log-sum-exp in float64 to be merged and differentiated."""
    if lse.dtype == torch.float64 or not lse.numel():
        return False
    return bool(torch.where(lse == -torch.inf, 0.0, lse).abs().max() > STRAIN)


def widened(call: Call) -> Call:
    """The call in float64."""
    tables = {name: x.double() if x.is_floating_point() else x for name, x in call.tables.items()}
    return replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double(), tables=tables)


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """The kernel of one attention."""

    attention: Attention
    chunks: Kept

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        names = tuple(call.tables)
        runner = Runner(self, names, lambda q, k, v, tables, *_: replace(call, q=q, k=k, v=v, tables=tables))
        tables = [call.tables[name] for name in names]
        out, lse = attend(
            call.q, call.k, call.v, tables, list(call.q_offset), list(call.k_offset), register(runner)
        )
        return out, lse

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        out, lse = self.merged(call)
        if strained(lse):
            exact, total = self.merged(widened(call))
            return exact.to(out.dtype), total.to(lse.dtype)
        return out, lse

    def merged(self, call: Call) -> tuple[Tensor, Tensor]:
        q = call.q
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty((*q.shape[:3], call.v.shape[3]), dtype=wide)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        for lane in lanes(self.attention, call):
            work = self.work(call, lane, recorded=False)
            o, total = lane.queries(out), lane.queries(lse)
            chunks = work.chunks(self.chunks, gradient=False)
            o[:, chunks.empty] = 0.0
            total[:, chunks.empty] = -torch.inf
            for chunk, addend in chunks.chunks:
                work.merge(chunk, o, total, *work.part(chunk, addend))
            work.add_sink(o, total)
        return out.to(q.dtype), lse

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        if not strained(lse):
            return self.pulled(call, wanted, out, lse, grad_out, grad_lse)
        wide = widened(call)
        grads = self.pulled(
            wide,
            wanted,
            *self.merged(wide),
            grad_out.double(),
            None if grad_lse is None else grad_lse.double(),
        )
        gq, gk, gv = (g.to(x.dtype) for g, x in zip(grads[:3], (call.q, call.k, call.v), strict=True))
        return gq, gk, gv, {name: g.to(call.tables[name].dtype) for name, g in grads[3].items()}

    def pulled(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        totals = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (call.q, call.k, call.v)]
        tables = {name: torch.zeros_like(call.tables[name]) for name in wanted}
        delta = (grad_out.to(wide) * out).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse.masked_fill(lse == -torch.inf, 0.0)
        over = lse.masked_fill(lse == -torch.inf, torch.inf)
        for lane in lanes(self.attention, call):
            work = self.work(call, lane, recorded=bool(tables) or grad_lse is not None)
            rows = Rows(*(lane.queries(x) for x in (grad_out.to(wide), out.to(wide), over, delta)))
            dq, dk, dv = lane.queries(totals[0]), lane.keys(totals[1]), lane.keys(totals[2])
            for chunk, addend in work.chunks(self.chunks, gradient=True).chunks:
                gq, gk, gv = work.part_gradient(chunk, addend, rows, tables)
                chunk.add_queries(dq, gq)
                for total, g in ((dk, gk), (dv, gv)):
                    chunk.add_keys(total, g.sum(0, keepdim=True) if len(total) < len(g) else g)
            work.sink_gradient(rows, tables)
        gq, gk, gv = (total.to(x.dtype) for total, x in zip(totals, (call.q, call.k, call.v), strict=True))
        return gq, gk, gv, tables

    def work(self, call: Call, lane: Lane, recorded: bool) -> Work:
        return Work(call, lane, Simple.of(lane.group, call, recorded))


@dataclass(frozen=True, eq=False)
class Rows:
    """Of every query row of a lane, in at least float32: [X, nq, Dv] gradient and output, [X, nq]
    log-sum-exp, inf for an empty row, and delta = sum(grad_out * out) - grad_lse."""

    grad_out: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor


@dataclass(frozen=True)
class Simple:
    """A softmax of Q @ K * scale + bias, which torch's fused kernel can do."""

    scale: float
    bias: Expr | None
    by_distance: bool

    @staticmethod
    def of(group: HeadGroup, call: Call, recorded: bool) -> Simple | None:
        """`recorded`: the gradient of some table is wanted."""
        if recorded or not is_simple(group, call.q.shape[3]):
            return None
        split = affine_in_s(group.score)
        assert split is not None
        scale = constant_scale(split[0], call.q.shape[3])
        assert scale is not None
        bias = None if ir.number(split[1]) == 0 else split[1]
        return Simple(scale / call.q.shape[3] ** 0.5, bias, bias is None or by_distance(bias) is not None)


@dataclass(frozen=True, eq=False)
class Work:
    """One lane of one call."""

    call: Call
    lane: Lane
    simple: Simple | None

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

    def chunks(self, kept: Kept, gradient: bool) -> Chunks:
        grid, simple, heads = self.lane.grid, self.simple if self.fused else None, len(self.q)
        unit = FORMED_UNIT if simple is None else BACKWARD_UNIT if gradient else FORWARD_UNIT
        by_position = simple is None or not simple.by_distance
        cut = Cut(
            unit=unit,
            bounded=simple is None,
            gradient=gradient,
            per_token=heads * max(self.q.shape[2], self.v.shape[2]),
            per_pair=heads if by_position else 0,
        )
        constant = simple is not None and simple.bias is None
        known = kept.setdefault(grid, {})
        key = (cut, constant, self.wide, self.q.device)
        if key not in known:
            chunks, empty = chunks_of(grid, cut, self.q.device)
            small = [constant and (c.mask is None or c.mask.numel() <= KEPT) for c in chunks]
            addends = [closing(c.mask, self.zero) if s else None for c, s in zip(chunks, small, strict=True)]
            known[key] = Chunks(list(zip(chunks, addends, strict=True)), empty)
        return known[key]

    @cached_property
    def zero(self) -> Tensor:
        return torch.zeros((), dtype=self.wide, device=self.q.device)

    @property
    def fused(self) -> bool:
        return self.simple is not None and self.q.device.type == "cpu"

    def env(self, chunk: Chunk | None, tables: Mapping[str, Tensor]) -> Env:
        """Axes [X, C, q_len, k_len]."""
        call, b, device = self.call, self.lane.batch, self.q.device
        heads = torch.arange(self.lane.heads.start, self.lane.heads.stop, device=device).view(-1, 1, 1, 1)
        numbers = {
            "n": call.n[b % len(call.n)],
            "nq": call.q.shape[2],
            "H": call.q.shape[1],
            "D": call.q.shape[3],
        }
        values = {name: torch.tensor(value, device=device) for name, value in numbers.items()} | {"h": heads}
        if chunk is not None:
            q_offset = call.q_offset[b % len(call.q_offset)]
            k_offset = call.k_offset[b % len(call.k_offset)]
            values["q"] = chunk.query_tokens(device)[None, :, :, None] + q_offset
            values["k"] = chunk.key_tokens(device)[None, :, None, :] + k_offset
        batch = torch.full((1, 1, 1, 1), b, device=device)
        return Env(values, {**call.tables, **tables}, batch, heads, self.wide)

    def additive(self, chunk: Chunk) -> Addend:
        """Mask and bias as one addend [X or 1, C or 1, q_len, k_len], and which rows it kills."""
        assert self.simple is not None
        if self.simple.bias is None:
            return closing(chunk.mask, self.zero)
        env = self.env(chunk, {})
        if isinstance(chunk, Views) and chunk.part.q_step == chunk.part.k_step and self.simple.by_distance:
            env = self.env(replace(chunk, count=1), {})
        mask = None if chunk.mask is None else chunk.mask[None]
        bias = evaluate(self.simple.bias, env, mask).to(self.wide)
        return closing(
            chunk.mask,
            bias.expand(
                *bias.shape[:-2], *(x.shape[i] for x, i in ((env.values["q"], 2), (env.values["k"], 3)))
            ),
        )

    def fused_inputs(self, q: Tensor, k: Tensor, v: Tensor, *like_v: Tensor) -> list[Tensor]:
        """As many key heads as query heads and equal head dimensions, which the fused kernel wants: the
        narrower are padded with zeros."""
        width = max(q.shape[3], v.shape[3])
        wide = (
            x if x.shape[3] == width else torch.nn.functional.pad(x, (0, width - x.shape[3]))
            for x in (q, k, v, *like_v)
        )
        return [(x if x.stride(-1) == 1 else x.contiguous()).expand(len(q), -1, -1, -1) for x in wide]

    def part(self, chunk: Chunk, addend: Addend | None) -> tuple[Tensor, Tensor]:
        """Output [X, C, q_len, Dv] and log-sum-exp [X, C, q_len] of these pairs alone."""
        if not self.fused:
            q, k, v = self.sources(chunk)
            return normalise(*self.weights(chunk, q, k, {}), v, self.lane.group.norm.kind)
        assert self.simple is not None
        mask, dead = self.additive(chunk) if addend is None else addend
        q, k, v = self.fused_inputs(chunk.queries(self.q), chunk.keys(self.k), chunk.keys(self.v))
        out, lse = flash(q, k, v, attn_mask=mask, scale=self.simple.scale)
        if dead is not None:
            lse = lse.masked_fill(dead, -torch.inf)
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
        s = q @ k.transpose(-1, -2) / self.call.q.shape[3] ** 0.5
        env = replace(env, values={**env.values, "s": s, "Q": q, "K": k})
        mask = torch.ones((), dtype=torch.bool, device=q.device) if chunk.mask is None else chunk.mask
        live = mask.expand(1, *s.shape[1:])
        logit = torch.where(live, evaluate(group.score, env, live).to(self.wide), -torch.inf).expand(s.shape)
        if group.decay is None:
            return logit, None
        return logit, decay_factor(group.decay, env, live).to(self.wide)

    def merge(self, chunk: Chunk, out: Tensor, lse: Tensor, o: Tensor, more: Tensor) -> None:
        """One more part of some rows: exactly what the pairs of both give together."""
        if chunk.fresh:
            chunk.put_queries(out, o)
            chunk.put_queries(lse, more)
            return
        both = torch.logaddexp(chunk.queries(lse), more)
        if self.lane.group.norm.kind == "softmax":
            share = torch.exp(more - both.masked_fill(both == -torch.inf, 0.0))
            chunk.blend_queries(out, o.to(out.dtype), share[..., None])
        else:
            chunk.add_queries(out, o)
        chunk.put_queries(lse, both)

    def sink(self, tables: Mapping[str, Tensor]) -> Tensor | None:
        """The sink's logit [X, 1]; `tables` take the place of the call's."""
        sink = self.lane.group.norm.sink
        if sink is None:
            return None
        return evaluate(sink, self.env(None, tables)).to(self.wide).expand(len(self.q), 1, 1, 1).view(-1, 1)

    def add_sink(self, out: Tensor, lse: Tensor) -> None:
        sink = self.sink({})
        if sink is not None:
            total = torch.logaddexp(lse, sink).masked_fill(lse == -torch.inf, -torch.inf)
            out *= torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))[..., None]
            lse.copy_(total)

    def sink_gradient(self, rows: Rows, tables: dict[str, Tensor]) -> None:
        """The sink's weight exp(sink - L) has value vector 0, so its logit's gradient is -weight * delta."""
        sink = self.lane.group.norm.sink
        if sink is None or not tables:
            return
        value, pull = vjp(self.sink, {name: self.call.tables[name] for name in tables})
        assert value is not None
        weight = torch.exp(value - rows.lse)
        (grads,) = pull(-(weight * rows.delta).sum(1, keepdim=True))
        for name, g in grads.items():
            tables[name] += g

    def part_gradient(
        self, chunk: Chunk, addend: Addend | None, rows: Rows, tables: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of these queries, keys and values; those of `tables` are added in place.

        With the L of the whole row, exp(l - L) is the final weight, so the parts need no merging.
        """
        if self.fused:
            return self.fused_gradient(chunk, self.additive(chunk) if addend is None else addend, rows)
        kind = self.lane.group.norm.kind
        q, k, v = self.sources(chunk)
        grad_out, delta = chunk.queries(rows.grad_out), chunk.queries(rows.delta)
        over = chunk.queries(rows.lse)[..., None]

        def weights(q: Tensor, k: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
            logit, factor = self.weights(chunk, q, k, tables)
            weight = {
                "softmax": lambda: torch.exp(logit - over),
                "sigmoid": lambda: torch.sigmoid(logit),
                "relu": lambda: torch.relu(logit),
            }[kind]()
            return weight if factor is None else factor * weight

        weight, pull = vjp(weights, q, k, {name: self.call.tables[name] for name in tables})
        if kind != "softmax":
            delta = (delta - (grad_out * chunk.queries(rows.out)).sum(-1)) * torch.exp(-over).squeeze(-1)
        gq, gk, grads = pull(grad_out @ v.transpose(-1, -2) - delta[..., None])
        for name, g in grads.items():
            tables[name] += g
        return gq, gk, weight.transpose(-1, -2) @ grad_out

    def fused_gradient(self, chunk: Chunk, addend: Addend, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        assert self.simple is not None
        q, k, v, out, grad_out = self.fused_inputs(
            *self.sources(chunk), chunk.queries(rows.out), chunk.queries(rows.grad_out)
        )
        gq, gk, gv = flash_backward(
            grad_out,
            q,
            k,
            v,
            out,
            chunk.queries(rows.lse),
            0.0,
            False,
            attn_mask=addend[0],
            scale=self.simple.scale,
        )
        d, dv = self.q.shape[2], self.v.shape[2]
        return gq[..., :d], gk[..., :d], gv[..., :dv]


def closing(mask: Tensor | None, bias: Tensor) -> Addend:
    """-inf where the mask [C, q_len, k_len] does not hold, and which rows have nothing else."""
    if mask is None and bias.dim() == 0:
        return None, None
    addend = bias if mask is None else torch.where(mask[None], bias, -torch.inf)
    dead = (addend == -torch.inf).all(-1)
    return addend, dead if bool(dead.any()) else None


def normalise(logit: Tensor, factor: Tensor | None, v: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one part."""
    if kind == "softmax":
        top = logit.amax(-1, keepdim=True)
        top = top.masked_fill(top.isinf(), 0.0)
        weight = torch.exp(logit - top)
    else:
        top = torch.zeros_like(logit[..., :1])
        weight = torch.sigmoid(logit) if kind == "sigmoid" else torch.relu(logit)
    weight = weight if factor is None else weight * factor
    total = weight.sum(-1)
    lse = torch.log(total) + top.squeeze(-1)
    out = weight @ v
    return (out / total.masked_fill(total == 0, 1.0)[..., None] if kind == "softmax" else out), lse


def lanes(attention: Attention, call: Call) -> Iterator[Lane]:
    """Every (batch row, query head) once."""
    batch, heads = call.q.shape[:2]
    share = heads // call.k.shape[1]
    index = call.block_mask.index
    axis = torch.arange(heads)
    numbers = Env({"h": axis, "H": torch.tensor(heads)}, {}, axis, axis, torch.float32)
    mine = [evaluate(group.heads, numbers).expand(heads).tolist() for group in attention.groups]
    for b in range(batch):
        row = index[b % len(index)]
        place = [(next(g for g, m in enumerate(mine) if m[h]), int(row[h % len(row)])) for h in range(heads)]
        start = 0
        for h in range(1, heads + 1):
            new_key_head = share > 1 and h % share == 0
            if h == heads or place[h] != place[start] or new_key_head or h - start == LANES:
                group, grid = place[start]
                kv = slice(start, h) if share == 1 else slice(start // share, start // share + 1)
                yield Lane(attention.groups[group], call.block_mask.grids[grid], b, slice(start, h), kv)
                start = h


def is_simple(group: HeadGroup, head_dim: int) -> bool:
    """A softmax of s * number + bias."""
    split = affine_in_s(group.score)
    plain = group.norm.kind == "softmax" and group.decay is None
    return plain and split is not None and constant_scale(split[0], head_dim) is not None


def computed(grid: TileGrid) -> float:
    """Pairs that are computed, live or not: of a partial tile what lies between the first and the last live
    column of each strip of rows, or the live rows where those are the same in every column."""
    block = grid.block_size
    masks = np.unpackbits(grid.masks, axis=-1, bitorder="little").astype(bool)
    height = FORWARD_UNIT if block % FORWARD_UNIT == 0 else block
    strips = np.asarray(masks.reshape(len(masks), block // height, height, block).any(2))
    width = block - strips.argmax(-1) - strips[..., ::-1].argmax(-1)
    share = np.where(strips.any(-1), width, 0).mean(-1) / block
    level = np.asarray((masks == masks[:, :, :1]).all((1, 2)))
    share[level] = masks[level, :, 0].mean(-1)
    uses = np.bincount(grid.part_mask, minlength=len(masks))
    return float(grid.tiles.full + uses @ share) * block**2


class Torch:
    """Registered as `torch`."""

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if problem.dtype not in DTYPES:
            return f"dtype {problem.dtype}: it takes {', '.join(DTYPES)}"
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float:
        every = problem.batch * problem.heads
        if block_mask is None:
            pairs, calls = float(problem.length * problem.q_length), 1.0
        else:
            uses = (
                np.bincount(block_mask.index.ravel(), minlength=len(block_mask.grids)) / block_mask.index.size
            )
            pairs = float(sum(u * computed(g) for u, g in zip(uses, block_mask.grids, strict=True)))
            calls = 1 + block_mask.entries / max(1, len(block_mask.grids)) / 32
        simple = all(is_simple(group, problem.head_dim) for group in attention.groups)
        flops = 4 * pairs * every * problem.head_dim * (1 + BACKWARD * problem.training)
        formed = pairs * every * (0.0 if simple else SECONDS_PER_WEIGHT) * (3 if problem.training else 1)
        lanes_ = problem.batch * max(
            problem.kv_heads if problem.kv_heads < problem.heads else 1, every / LANES
        )
        return flops / FLOPS + formed + lanes_ * (SECONDS_PER_LANE + calls * SECONDS_PER_CALL)

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        return BlockSparse(attention, WeakKeyDictionary())


backend = Torch()
