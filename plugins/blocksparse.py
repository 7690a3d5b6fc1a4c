"""The `torch` backend: block sparse attention from torch's own operators, forward and backward.

A mask is taken apart (`take_apart`) into batches of equal problems. Stretches of rows that look the
same run on strided views of k and v, which overlap and are never copied; the rest on gathered tiles. Each
part gives an output and a log-sum-exp; two parts of a row merge exactly:
L = logaddexp(L1, L2), o = exp(L1 - L) o1 + exp(L2 - L) o2 (Dao et al., FlashAttention, 2022).
Memory grows with the entries of the BlockMask and the tokens, never with their square.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Kernel, Problem, weighed
from attndsl.execution.operator import vjp
from attndsl.execution.parts import Gathered, Part, Strided, take_apart
from attndsl.execution.torch_eval import (
    Env,
    affine_in_s,
    along_diagonals,
    by_distance,
    by_head,
    constant_scale,
    decay_factor,
    elements,
    evaluate,
    from_diagonals,
    fused_rows,
    of_distances,
    peak,
    singles,
    strained,
    weigh,
)
from attndsl.expr import Expr
from attndsl.tiles.blockmask import BlockMask, TileGrid
from attndsl.tiles.tiling import tile

flash: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

DTYPES = ("float32", "float64", "bfloat16", "float16")
FORWARD_UNIT, BACKWARD_UNIT, FORMED_UNIT = 32, 128, 64
"""Query rows of one problem in a band: what ran fastest on CPU (benchmarks/attention.py)."""
TRANSIENT, FORMED = 2**22, 3 * 2**18
"""Numbers that one step may copy, and weights that it may form: the latter pay off while in cache."""
KEPT = 2**20
"""Numbers of a chunk's addend up to which it stays in memory between calls."""
LOG2_E = 1 / math.log(2.0)
LANES = 16
"""Heads that run together."""
SECONDS = {
    "runs": 0.000726,
    "lanes": 0.000254,
    "nodes": 4.46e-05,
    "tokens": 2.03e-09,
    "products": 3.2e-11,
    "narrow": 1.08e-11,
    "steps": 1.03e-06,
    "addends": 3.4e-10,
    "numbers": 1.7e-09,
    "copied": 7.2e-10,
    "merged": 3.49e-09,
}
"""Of two cores with AVX-512, by `python -m benchmarks.cost fit`."""
TRAINING = 4.0
"""Forward and backward beside forward: 5 matrix products more to 2, and wider windows."""
SAMPLED = 2**14
"""Entries of a BlockMask that are taken apart to predict what all take."""
FUSED_K = 512
"""Keys at a time in torch's fused kernel."""
Q_MAX, K_MAX = 256, 1024
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

    @property
    def q_len(self) -> int:
        return self.part.q_len

    @property
    def k_len(self) -> int:
        return self.part.k_len

    @property
    def run(self) -> int:
        """Keys that stand side by side: what depends on the distance alone is equal along their diagonals."""
        return self.part.k_len

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
            x[:, start : start + p.k_len] += value[:, 0] if self.count == 1 else value.sum(1)
        else:
            self.keys(x).add_(value)


@dataclass(frozen=True, eq=False)
class Gathers:
    """Some problems of a Gathered part: tokens [C, q_len] of the queries, [C, k_len] of the keys, `run` side
    by side; mask [C, q_len, k_len]."""

    rows: Tensor
    cols: Tensor
    run: int
    mask: Tensor | None
    fresh: bool

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def q_len(self) -> int:
        return self.rows.shape[1]

    @property
    def k_len(self) -> int:
        return self.cols.shape[1]

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
class Diagonals:
    """Key minus query, in tokens, from `first` on: whether some pair is live there [L]."""

    first: int
    live: Tensor

    @staticmethod
    def of(chunks: list[Chunk], grid: TileGrid, device: torch.device) -> Diagonals:
        found = torch.zeros(grid.nq + grid.n, dtype=torch.bool, device=device)
        least = 1 - grid.nq
        for chunk in chunks:
            places = diagonals(chunk, device) - least
            if chunk.mask is not None:
                live = along_diagonals(by_run(chunk.mask, chunk.run)).any(-2)
                places = places[live.expand(places.shape)]
            found[places] = True
        live = torch.nonzero(found).flatten()
        first, last = (int(live[0]), int(live[-1])) if len(live) else (0, -1)
        return Diagonals(first + least, found[first : last + 1])

    def places(self, chunk: Chunk) -> Tensor:
        """Where in `live` the `diagonals` of a chunk stand; somewhere if no pair is live."""
        return (diagonals(chunk, self.live.device) - self.first).clamp(0, len(self.live) - 1)


def diagonals(chunk: Chunk, device: torch.device) -> Tensor:
    """Key minus query on the diagonals of each run, from the last query and the first key on: [C, T,
    q_len + run - 1]."""
    starts = chunk.key_tokens(device)[:, :: chunk.run] - chunk.query_tokens(device)[:, :1]
    return starts[..., None] + torch.arange(1 - chunk.q_len, chunk.run, device=device)


def by_run(x: Tensor, run: int) -> Tensor:
    """[.., q_len, T * run] -> [.., T, q_len, run]"""
    return x.view(*x.shape[:-1], x.shape[-1] // run, run).transpose(-3, -2)


@dataclass(frozen=True, eq=False)
class Chunks:
    """In the order in which they run, each with what to add to its logits where that is the same in every
    call and small; the rows of no fresh chunk, which start as empty; what `by_distance` is asked for."""

    chunks: list[tuple[Chunk, Addend | None]]
    empty: Tensor
    diagonals: Diagonals | None


Kept = WeakKeyDictionary[TileGrid, dict[tuple[object, ...], Chunks]]


def _tokens(start: int, step: int, length: int, first: int, count: int, device: torch.device) -> Tensor:
    c = torch.arange(first, first + count, device=device)
    return start + c[:, None] * step + torch.arange(length, device=device)


@dataclass(frozen=True)
class Cut:
    """How a grid is cut into chunks: rows of one problem in a band; whether weights are formed; whether keys
    have gradients; numbers copied per token; numbers formed per pair, such as weights or a bias; whether the
    bias depends on the distance alone."""

    unit: int
    formed: bool
    gradient: bool
    per_token: int
    per_pair: int
    by_distance: bool

    def problems(self, part: Part) -> int:
        """How many at a time."""
        if isinstance(part, Strided):
            k_len, copied = part.k_len, max(part.q_len, part.k_len if self.gradient else 1)
        else:
            k_len = part.cols.shape[1] * part.block
            copied = part.q_len + k_len
        size = TRANSIENT // (self.per_token * copied)
        if self.per_pair and not (self.by_distance and not self.formed and equidistant(part)):
            size = min(size, FORMED // (part.q_len * k_len * self.per_pair))
        return max(1, size)

    def parts(self, grid: TileGrid) -> list[Part]:
        """In the order in which they run: those of one distance, which share a bias, in turn."""
        parts = list(take_apart(grid, self.unit))
        if self.per_pair:
            keys = K_MAX if self.formed else max(K_MAX, TRANSIENT // (Q_MAX * self.per_pair))
            most = 0 if self.formed else TRANSIENT // self.per_pair
            parts = [piece for part in parts for piece in _bound(part, keys, most)]
        if self.gradient:
            parts = [piece for part in parts for piece in _disjoint(part)]
        return sorted(parts, key=self._turn)

    def _turn(self, part: Part) -> tuple[int, int]:
        if not isinstance(part, Strided):
            return 1, 0
        return -part.count * part.q_len, part.k0 - part.q0 if self.by_distance else 0


def equidistant(part: Part) -> bool:
    """Whether key minus query is the same in each of its problems."""
    return isinstance(part, Strided) and part.q_step == part.k_step


def cut_of(simple: Simple | None, heads: int, width: int, gradient: bool) -> Cut:
    """`simple` is None where torch's fused kernel does not run; `width` of a query or value."""
    formed = simple is None or gradient
    biased = simple is not None and simple.bias is not None
    return Cut(
        unit=BACKWARD_UNIT if gradient else FORMED_UNIT if formed else FORWARD_UNIT,
        formed=formed,
        gradient=gradient,
        per_token=heads * width,
        per_pair=heads if formed or biased else 0,
        by_distance=simple is not None and biased and simple.by_distance,
    )


def chunks_of(grid: TileGrid, cut: Cut, device: torch.device) -> tuple[list[Chunk], Tensor]:
    """What to run for this mask, in this order, and the rows of no fresh chunk."""
    touched, started = torch.zeros((2, grid.nq), dtype=torch.bool)
    chunks: list[Chunk] = []
    masks: dict[int, Tensor] = {}
    for part in cut.parts(grid):
        if isinstance(part, Strided):
            rows = _tokens(part.q0, part.q_step, part.q_len, 0, part.count, touched.device).flatten()
        else:
            rows = (torch.from_numpy(part.rows)[:, None] + torch.arange(part.q_len)).flatten()
        fresh = not bool(touched[rows].any())
        touched[rows] = True
        started[rows] |= fresh
        if isinstance(part, Strided):
            mask = part.mask
            if mask is not None and id(mask) not in masks:
                masks[id(mask)] = torch.from_numpy(mask).to(device)[None]
            chunks.extend(_views(part, None if mask is None else masks[id(mask)], fresh, cut))
        else:
            chunks.extend(_gathers(part, fresh, grid.n, cut, device))
    return chunks, torch.nonzero(~started).squeeze(1).to(device)


def _views(part: Strided, mask: Tensor | None, fresh: bool, cut: Cut) -> Iterator[Views]:
    size = cut.problems(part)
    for first in range(0, part.count, size):
        yield Views(part, first, min(size, part.count - first), mask, fresh)


def _gathers(part: Gathered, fresh: bool, n: int, cut: Cut, device: torch.device) -> Iterator[Gathers]:
    size = cut.problems(part)
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
        yield Gathers(rows[:, None] + inside[: part.q_len], tokens, part.block, mask, fresh)


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


def _bound(part: Part, keys: int, most: int) -> Iterator[Part]:
    """In pieces of Q_MAX queries and so many keys, if a problem has more than `most` pairs."""
    if not isinstance(part, Strided) or part.q_len * part.k_len <= most:
        yield part
        return
    for q in range(0, part.q_len, Q_MAX):
        for k in range(0, part.k_len, keys):
            mask = None if part.mask is None else part.mask[q : q + Q_MAX, k : k + keys]
            if mask is not None and not mask.any():
                continue
            yield replace(
                part,
                q0=part.q0 + q,
                q_len=min(Q_MAX, part.q_len - q),
                k0=part.k0 + k,
                k_len=min(keys, part.k_len - k),
                mask=None if mask is None or mask.all() else mask,
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

    def strained(self, lse: Tensor) -> bool:
        """Whether parts are neither merged nor differentiated well by this log-sum-exp."""
        return self.group.norm.kind == "softmax" and strained(lse)


def widened(call: Call) -> Call:
    """The call with vectors of at least float32."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    return replace(call, q=call.q.to(wide), k=call.k.to(wide), v=call.v.to(wide))


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """The kernel of one attention; `exact` says that outputs are not rounded to 16 bits, for the sake of the
    backward pass, where their products with what comes back are differences of large sums."""

    attention: Attention
    exact: bool
    chunks: Kept

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        return self.forward(call)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        call, wide = widened(call) if self.exact else call, torch.promote_types(call.q.dtype, torch.float32)
        q = call.q
        out = q.new_empty((*q.shape[:3], call.v.shape[3]), dtype=wide)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        for lane in _lanes_of(self.attention, call):
            o, total = lane.queries(out), lane.queries(lse)
            self.run(self.work(call, lane, gradient=False), o, total)
            if lane.strained(total):
                _, top, exact, beyond = self.careful(call, lane)
                o.copy_(exact)
                torch.add(beyond, top, out=total)
        return out, lse

    def run(self, work: Work, out: Tensor, lse: Tensor) -> None:
        """Writes output and log-sum-exp of a lane."""
        out[:, work.chunks.empty] = 0.0
        lse[:, work.chunks.empty] = -torch.inf
        for chunk, addend in work.chunks.chunks:
            work.merge(chunk, out, lse, *work.part(chunk, addend))
        work.add_sink(out, lse)

    def careful(self, call: Call, lane: Lane) -> tuple[Work, Tensor, Tensor, Tensor]:
        """Work whose logits are differences from the greatest of their row, which are exact; that greatest;
        its output; and its log-sum-exp, which says how many keys there are, however large they are."""
        # the chunks of the backward pass, which must round its logits as they are rounded here
        work = Work(call, lane, None, self.chunks, gradient=True)
        top = torch.full(work.q.shape[:2], -torch.inf, dtype=work.wide, device=call.q.device)
        for chunk, _ in work.chunks.chunks:
            q, k, _ = work.sources(chunk)
            found = peak(*work.weights(chunk, q, k, {})).squeeze(-1)
            chunk.put_queries(top, torch.maximum(chunk.queries(top), found))
        top.masked_fill_(top == -torch.inf, 0.0)
        if (sink := work.sink({})) is not None:
            torch.maximum(top, sink, out=top)
        work = replace(work, top=top)
        out, beyond = top.new_empty((*top.shape, call.v.shape[3])), torch.empty_like(top)
        self.run(work, out, beyond)
        return work, top, out, beyond

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        given, call = (call.q, call.k, call.v), widened(call)
        wide = call.q.dtype
        totals = [call.q.new_empty(call.q.shape), *(x.new_zeros(x.shape) for x in (call.k, call.v))]
        tables = {name: x.new_zeros(x.shape) for name, x in singles(call.tables, wanted).items()}
        shift = None if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0.0)
        for lane in _lanes_of(self.attention, call):
            work, over = self.work(call, lane, True, wanted), lane.queries(lse)
            if lane.strained(over):
                work, _, _, over = self.careful(call, lane)
            rows = Rows(
                lane.queries(grad_out.to(wide)),
                lane.queries(out.to(wide)),
                over.masked_fill(over == -torch.inf, torch.inf),
                None if shift is None else lane.queries(shift),
            )
            dq, dk, dv = lane.queries(totals[0]), lane.keys(totals[1]), lane.keys(totals[2])
            dq[:, work.chunks.empty] = 0.0
            room, slopes = work.room(), work.slopes(wanted)
            for chunk, addend in work.chunks.chunks:
                gq, gk, gv = work.part_gradient(chunk, addend, rows, tables, room, slopes)
                (chunk.put_queries if chunk.fresh else chunk.add_queries)(dq, gq)
                for total, g in ((dk, gk), (dv, gv)):
                    chunk.add_keys(total, g.sum(0, keepdim=True) if len(total) < len(g) else g)
            work.bias_gradient(slopes, tables)
            work.sink_gradient(rows, tables)
        gq, gk, gv = (total.to(x.dtype) for total, x in zip(totals, given, strict=True))
        return gq, gk, gv, {name: total.to(call.tables[name].dtype) for name, total in tables.items()}

    def work(self, call: Call, lane: Lane, gradient: bool, wanted: Sequence[str] = ()) -> Work:
        """Not simple where tables ask for gradients that differ from pair to pair."""
        simple = Simple.of(lane.group, call.q.shape[3])
        if simple is not None and simple.bias is not None and not simple.by_distance:
            asked = not {table.name for table in simple.bias.tables}.isdisjoint(wanted)
            simple = None if asked else simple
        return Work(call, lane, simple, self.chunks, gradient)


@dataclass(frozen=True, eq=False)
class Rows:
    """Of every query row of a lane, in at least float32: [X, nq, Dv] gradient and output, [X, nq]
    log-sum-exp (beyond the work's `top` if it has one), inf for an empty row, and the gradient of the
    log-sum-exp if there is one."""

    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor | None

    @cached_property
    def delta(self) -> Tensor:
        """sum(grad_out * out) - grad_lse [X, nq]"""
        delta = (self.grad_out * self.out).sum(-1)
        return delta if self.grad_lse is None else delta - self.grad_lse


@dataclass(frozen=True)
class Simple:
    """A softmax of Q @ K * scale + bias, which torch's fused kernel can do."""

    scale: float
    bias: Expr | None
    by_distance: bool

    @staticmethod
    def of(group: HeadGroup, head_dim: int) -> Simple | None:
        split = affine_in_s(group.score)
        if group.norm.kind != "softmax" or group.decay is not None or split is None:
            return None
        scale = constant_scale(split[0], head_dim)
        if scale is None:
            return None
        bias = None if ir.number(split[1]) == 0 else split[1]
        return Simple(scale / head_dim**0.5, bias, bias is None or by_distance(bias) is not None)


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
    def chunks(self) -> Chunks:
        grid, simple = self.lane.grid, self.simple if self.fused else None
        cut = cut_of(simple, len(self.q), max(self.q.shape[2], self.v.shape[2]), self.gradient)
        constant = self.simple is not None and self.simple.bias is None
        known = self.kept.setdefault(grid, {})
        key = (cut, constant, self.wide, self.q.device)
        if key not in known:
            chunks, empty = chunks_of(grid, cut, self.q.device)
            masks = {id(c.mask): c.mask for c in chunks if c.mask is None or c.mask.numel() <= KEPT}
            closed = {name: closing(mask, self.zero) for name, mask in masks.items() if constant}
            near = Diagonals.of(chunks, grid, self.q.device) if cut.by_distance else None
            known[key] = Chunks([(c, closed.get(id(c.mask))) for c in chunks], empty, near)
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
        assert self.chunks.diagonals is not None
        return self.chunks.diagonals

    def along(self, tables: Mapping[str, Tensor]) -> Tensor:
        """The bias by distance on each diagonal [X or 1, L]; `tables` take the place of the call's."""
        assert self.simple is not None
        assert self.simple.bias is not None
        near, call, b = self.near(), self.call, self.lane.batch
        offset = call.q_offset[b % len(call.q_offset)] - call.k_offset[b % len(call.k_offset)]
        beyond = torch.arange(near.first, near.first + len(near.live), device=self.q.device)
        env = self.env(None, tables)
        return of_distances(self.simple.bias, env, (offset - beyond)[None, None], near.live[None, None])[:, 0]

    @cached_property
    def alongside(self) -> Tensor:
        return self.along({})

    def spread(self, chunk: Chunk) -> Tensor:
        """The bias by distance [X or 1, C, q_len, k_len]."""
        found = from_diagonals(self.alongside[:, self.near().places(chunk)], chunk.run)
        return found.transpose(2, 3).flatten(3)

    def slopes(self, wanted: Sequence[str]) -> Tensor | None:
        """Where to sum the gradients of a bias by distance, if it has any [X, L]."""
        simple = self.simple
        if simple is None or simple.bias is None or not simple.by_distance:
            return None
        asked = not {table.name for table in simple.bias.tables}.isdisjoint(wanted)
        shape = (len(self.q), len(self.near().live))
        return torch.zeros(shape, dtype=self.wide, device=self.q.device) if asked else None

    def bias_gradient(self, slopes: Tensor | None, tables: dict[str, Tensor]) -> None:
        if slopes is None:
            return
        _, pull = vjp(lambda tables: self.along(tables).expand_as(slopes), singles(self.call.tables, tables))
        (grads,) = pull(slopes)
        for name, g in grads.items():
            tables[name] += g

    def fused_inputs(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """As many key heads as query heads and equal head dimensions, which the fused kernel wants: the
        narrower are padded with zeros."""
        width = max(q.shape[3], v.shape[3])
        return [fused_rows(x, width).expand(len(q), -1, -1, -1) for x in (q, k, v)]

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
        both = torch.logaddexp(chunk.queries(lse), more)
        if self.lane.group.norm.kind == "softmax":
            share = torch.exp(more - both.masked_fill(both == -torch.inf, 0.0))
            chunk.blend_queries(out, o.to(out.dtype), share[..., None])
        else:
            chunk.add_queries(out, o)
        chunk.put_queries(lse, both)

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

    def sink_gradient(self, rows: Rows, tables: dict[str, Tensor]) -> None:
        """The sink's weight exp(sink - L) has value vector 0, so its logit's gradient is -weight * delta."""
        sink = self.lane.group.norm.sink
        if sink is None or not tables:
            return
        value, pull = vjp(self.sink, singles(self.call.tables, tables))
        assert value is not None
        weight = torch.exp(value - rows.lse)
        (grads,) = pull(-weight * rows.delta)
        for name, g in grads.items():
            tables[name] += g

    def part_gradient(
        self,
        chunk: Chunk,
        addend: Addend | None,
        rows: Rows,
        tables: dict[str, Tensor],
        room: Tensor,
        slopes: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of these queries, keys and values; those of `tables` or, of a bias by distance, `slopes`
        are added in place.

        With the L of the whole row, exp(l - L) is the final weight, so the parts need no merging.
        """
        if self.simple is not None:
            addend = self.additive(chunk) if addend is None else addend
            return self.simple_gradient(chunk, addend, rows, room, slopes)
        kind = self.lane.group.norm.kind
        q, k, v = self.sources(chunk)
        grad_out, delta = chunk.queries(rows.grad_out), chunk.queries(rows.delta)
        over = chunk.queries(rows.lse)[..., None]

        def weights(q: Tensor, k: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
            logit, factor = self.weights(chunk, q, k, tables)
            if kind == "softmax":
                return weigh(logit, over, factor)
            weight = torch.sigmoid(logit) if kind == "sigmoid" else torch.relu(logit)
            return weight if factor is None else factor * weight

        weight, pull = vjp(weights, q, k, singles(self.call.tables, tables))
        if kind != "softmax":
            # no sum is divided by: of what delta is for, only the gradient of its logarithm is left
            delta = torch.zeros_like(delta)
            if rows.grad_lse is not None:
                delta = -chunk.queries(rows.grad_lse) * torch.exp(-over).squeeze(-1)
        gq, gk, grads = pull(grad_out @ v.transpose(-1, -2) - delta[..., None])
        for name, g in grads.items():
            tables[name] += g
        return gq, gk, weight.transpose(-1, -2) @ grad_out

    def room(self) -> Tensor:
        """Where `simple_gradient` forms the weights of one chunk and their slopes: fresh memory for each
        would cost a third more time."""
        sizes = [c.count * c.q_len * c.k_len for c, _ in self.chunks.chunks] if self.simple else []
        most = max(sizes, default=0)
        return self.q.new_empty((2, len(self.q) * most), dtype=self.wide)

    def simple_gradient(
        self, chunk: Chunk, addend: Addend, rows: Rows, room: Tensor, slopes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Five matrix products, in base 2: torch's exp2 takes a third of the time of its exp, and no longer
        where a weight vanishes. Query heads that share a key head are rows of one product."""
        assert self.simple is not None
        q, k, v = self.sources(chunk)
        shape, groups, scale = (*q.shape[:3], k.shape[2]), len(k), self.simple.scale
        q, grad_out = (folded(x, groups) for x in (q * scale, chunk.queries(rows.grad_out)))
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        weight, slope = (x[: math.prod(shape)].view(-1, q.shape[1], shape[3]) for x in room)
        start, base = unfolded(weight, shape), chunk.queries(rows.lse)[..., None] * -LOG2_E
        if addend[0] is None:
            start.copy_(base)
        else:
            torch.add(base, addend[0], alpha=LOG2_E, out=start)
        weight.baddbmm_(q, k.transpose(1, 2), alpha=LOG2_E).exp2_()
        unfolded(slope, shape).copy_(-chunk.queries(rows.delta)[..., None])
        slope.baddbmm_(grad_out, v.transpose(1, 2)).mul_(weight)
        if slopes is not None:
            sums = along_diagonals(by_run(unfolded(slope, shape), chunk.run)).sum(-2)
            slopes.index_add_(1, self.near().places(chunk).flatten(), sums.flatten(1))
        gq = unfolded(torch.bmm(slope, k).mul_(scale), (*shape[:3], k.shape[2]))
        gk, gv = torch.bmm(slope.transpose(1, 2), q), torch.bmm(weight.transpose(1, 2), grad_out)
        gk, gv = (x.view(groups, shape[1], *x.shape[1:]) for x in (gk, gv))
        return gq, gk, gv


def folded(x: Tensor, groups: int) -> Tensor:
    """[X, C, R, D] -> [groups * C, X / groups * R, D]"""
    return x.view(groups, len(x) // groups, *x.shape[1:]).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def unfolded(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The other way round, `shape` being the one of the result."""
    heads, count, rows, width = shape
    groups = len(x) // count
    return x.view(groups, count, heads // groups, rows, width).transpose(1, 2).flatten(0, 1)


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
        top = peak(logit, factor)
        top = top.masked_fill(top == -torch.inf, 0.0)
        weight = weigh(logit, top, factor)
    else:
        top = torch.zeros_like(logit[..., :1])
        weight = torch.sigmoid(logit) if kind == "sigmoid" else torch.relu(logit)
        weight = weight if factor is None else weight * factor
    total = weight.sum(-1)
    lse = torch.log(total) + top.squeeze(-1)
    out = weight @ v
    return (out / total.masked_fill(total == 0, 1.0)[..., None] if kind == "softmax" else out), lse


def _lanes_of(attention: Attention, call: Call) -> Iterator[Lane]:
    batch, heads = call.q.shape[:2]
    return lanes(attention, call.block_mask, batch, heads, call.k.shape[1])


def lanes(
    attention: Attention, block_mask: BlockMask, batch: int, heads: int, kv_heads: int
) -> Iterator[Lane]:
    """Every (batch row, query head) once."""
    share = heads // kv_heads
    index = block_mask.index
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
                yield Lane(attention.groups[group], block_mask.grids[grid], b, slice(start, h), kv)
                start = h


def sampled(grid: TileGrid, entries: int) -> tuple[TileGrid, float]:
    """Rows of tiles from the middle that hold about so many entries, and how many times all that is."""
    (rows, _), block = grid.shape, grid.block_size
    if grid.entries <= entries:
        return grid, 1.0
    count = max(1, rows * entries // grid.entries)
    first = (rows - count) // 2
    runs, parts = (p[first : first + count + 1] for p in (grid.run_ptr, grid.part_ptr))
    run, part = slice(runs[0], runs[-1]), slice(parts[0], parts[-1])
    some = replace(
        grid,
        nq=count * block,
        run_ptr=runs - runs[0],
        run_start=grid.run_start[run],
        run_end=grid.run_end[run],
        part_ptr=parts - parts[0],
        part_col=grid.part_col[part],
        part_mask=grid.part_mask[part],
    )
    return some, rows / count


def lane_counts(group: HeadGroup, grid: TileGrid, heads: int, problem: Problem, entries: int) -> Counter[str]:
    """What the forward pass of a lane of so many heads does, `entries` of the grid being looked at."""
    width = problem.head_dim
    simple = Simple.of(group, width) if problem.device.startswith("cpu") else None
    cut = cut_of(simple, heads, width, gradient=False)
    some, times = sampled(grid, entries)
    counts: Counter[str] = Counter()
    rows = 0
    for part in cut.parts(some):
        rows += len(part.rows) * part.q_len if isinstance(part, Gathered) else part.count * part.q_len
        counts.update(_part_counts(part, cut, simple, group, heads, width))
    counts["merged"] = heads * width * max(0, rows - some.nq)
    if simple is not None and simple.bias is not None and simple.by_distance:
        numbers, computed = elements(simple.bias, grid.nq + grid.n, heads)
        more = {"numbers": numbers, "nanoseconds": computed, "nodes": size(simple.bias)}
        counts.update({name: count / times for name, count in more.items()})
    return Counter(
        {
            "lanes": 1,
            "tokens": heads * grid.nq * width,
            **{name: times * count for name, count in counts.items()},
        }
    )


def size(e: Expr | None) -> int:
    """Nodes."""
    return 0 if e is None else sum(1 for _ in ir.nodes(e))


def _part_counts(
    part: Part, cut: Cut, simple: Simple | None, group: HeadGroup, heads: int, width: int
) -> dict[str, float]:
    if isinstance(part, Strided):
        count, k_len, masked, strided = part.count, part.k_len, part.mask is not None, True
        alike = simple is not None and simple.by_distance and equidistant(part)
    else:
        count, k_len, masked = len(part.rows), part.cols.shape[1] * part.block, part.contents is not None
        alike = strided = False
    calls = -(-count // cut.problems(part))
    area = float(count * part.q_len * k_len)
    moved = heads * width * count * (part.q_len + 2 * k_len)
    counts = {"calls": calls, "pairs": heads * area, "products": heads * area * width}
    if simple is None:
        made = [elements(e, area, heads) for e in (group.score, group.decay)]
        numbers, computed = (sum(column) for column in zip(*made, strict=True))
        nodes = calls * (size(group.score) + size(group.decay))
        made_here = {"numbers": numbers, "nanoseconds": computed, "nodes": nodes}
        return counts | made_here | {"formed": heads * area, "copied": moved}
    step = 256 if part.q_len >= 768 else 64 if part.q_len >= 192 else 32
    biased = area * calls / count if alike else area
    numbers, computed = (0.0, 0.0) if simple.by_distance else elements(simple.bias, biased, heads)
    addends = (area * calls / count if strided else area) if masked else 0.0
    if simple.bias is not None:
        addends = max(addends, biased) * (heads if by_head(simple.bias) else 1)
    elif addends / calls <= KEPT:
        addends = 0.0
    return counts | {
        "narrow": counts["products"] if step == 32 else 0.0,
        "steps": heads * count * -(-part.q_len // step) * -(-k_len // FUSED_K),
        "masked": heads * area if masked or simple.bias is not None else 0.0,
        "addends": addends,
        "numbers": numbers,
        "nanoseconds": computed,
        "nodes": 0.0 if simple.by_distance else calls * size(simple.bias),
        "copied": 0.0 if strided else moved,
    }


class Torch:
    """Registered as `torch`."""

    seconds = SECONDS

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if problem.dtype not in DTYPES:
            return f"dtype {problem.dtype}: it takes {', '.join(DTYPES)}"
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float:
        seconds = weighed(SECONDS, self.counts(attention, problem, block_mask))
        return seconds * (TRAINING if problem.training else 1)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        """Of a large mask by a sample of its rows; without tiles every pair."""
        if block_mask is None:
            grid = tile(ir.TRUE, problem.q_length, problem.length, problem.block_size, n=problem.length)
            index = np.zeros((1, 1), np.int32)
            block_mask = BlockMask(problem.q_length, problem.length, problem.block_size, (grid,), index)
        batch = len(block_mask.index)
        alike = Counter(
            (lane.group, lane.grid, lane.heads.stop - lane.heads.start)
            for lane in lanes(attention, block_mask, batch, problem.heads, problem.kv_heads)
        )
        total = Counter(dict.fromkeys((*SECONDS, "pairs"), 0.0))
        for (group, grid, heads), times in alike.items():
            counts = lane_counts(group, grid, heads, problem, max(256, SAMPLED // len(alike)))
            total.update({name: times * problem.batch / batch * count for name, count in counts.items()})
        return {**total, "runs": 1.0, "written": total["copied"] + total["addends"]}

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        return BlockSparse(attention, problem.training, WeakKeyDictionary())


backend = Torch()
