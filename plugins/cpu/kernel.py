"""The kernel of one attention: what its libraries are called with."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Gradients
from attndsl.emit.leaves import Leaf
from attndsl.errors import fail
from attndsl.execution.leaf_values import LeafValues, pair_environment, passes_gradients, sizes_of
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import decay_factor, environment, evaluate, singles
from attndsl.expr import Table
from attndsl.tiles.blockmask import TileGrid
from attndsl.tiles.lowering import head_groups

from .build import library
from .layout import ROWS, Layout, Layouts
from .score import Score

PIECES = 8
"""Tasks of a backward pass at least, whatever the number of threads, so that sums have one order."""
LANES = 16
AXES = 4
"""Of a table that pairs index, at most."""
FAR = 32.0
"""Beyond this a log-sum-exp in float32 moves weights by more than two roundings of their own."""

score_of = lru_cache(maxsize=256)(Score.of)


class _Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("first", "start", "end", "words", "masks")]


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Call(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "q k v out lse grids index"),
        *_fields(ctypes.c_int64, "batch heads kv_heads nq n d dv"),
        *_fields(ctypes.c_int64 * 3, "qs ks vs"),
        ("packed", ctypes.c_double),
        ("threads", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "leaves sizes"),
        ("origin", ctypes.c_int64),
        *_fields(ctypes.c_void_p, "wrong sink top sum grad_out delta gq gk gv grads"),
        ("unit", ctypes.c_double),
        *_fields(ctypes.c_int64, "pieces dp dvp"),
    ]


@dataclass(frozen=True, eq=False)
class Compiled:
    """The kernel of one attention over tiles."""

    attention: Attention
    layouts: Layouts = field(default_factory=Layouts)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        call = _widened(call)
        q, v = call.q, call.v
        out, lse = q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -torch.inf)
        if out.numel() and v.shape[2]:
            for part in self.parts(call):
                part.run("forward", part.score.code(None), {"out": out, "lse": lse})
        return out, lse

    def parts(self, call: Call) -> list[Part]:
        """One for each group of heads."""
        found = []
        groups = np.array(head_groups(self.attention, call.q.shape[1]))
        for i, group in enumerate(self.attention.groups):
            if (heads := groups == i).any():
                score = score_of(group, call.q.shape[3], call.adjacent)
                assert not isinstance(score, str)
                found.append(Part(call, group, score, heads, self.layouts))
        return found

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        given, call = call, _widened(call)
        gq, gk, gv = (torch.zeros(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
        tables = {name: torch.zeros_like(x) for name, x in singles(call.tables, wanted).items()}
        if gq.numel() and gk.numel():
            for part in self.parts(call):
                part.gradient(out, lse, grad_out.to(gq.dtype), grad_lse, (gq, gk, gv), tables)
        gq, gk, gv = (g.to(x.dtype) for g, x in zip((gq, gk, gv), (given.q, given.k, given.v), strict=True))
        return gq, gk, gv, {name: g.to(given.tables[name].dtype) for name, g in tables.items()}


def _widened(call: Call) -> Call:
    """With vectors of at least float32, each of adjacent numbers."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        for x in (x.to(wide) for x in (call.q, call.k, call.v))
    )
    return replace(call, q=q, k=k, v=v)


@dataclass(frozen=True, eq=False)
class Part:
    """What one group of heads does in one call; `heads` bool [H] says which they are."""

    call: Call
    group: HeadGroup
    score: Score
    heads: NDArray[np.bool_]
    layouts: Layouts

    @cached_property
    def leaves(self) -> dict[Leaf, Tensor]:
        """What each holds, [B or 1, H or 1, entries] as the kernels read it."""
        made = LeafValues(self.call)
        return {leaf: self.filled(leaf, made.of(leaf, self.call)) for leaf in self.score.leaves}

    def filled(self, leaf: Leaf, x: Tensor) -> Tensor:
        """Real or int64, with entries of the queries that a block has beyond the last."""
        wide = self.call.q.dtype
        x = x.to(wide if self.score.leaves[leaf].type == "real" else torch.int64)
        if leaf.kind in ("query", "distance"):
            x = torch.nn.functional.pad(x, (0, self.room(leaf, x) - x.shape[2]))
        elif not x.shape[2]:
            x = x.new_zeros((*x.shape[:2], 1))
        return x.contiguous()

    def room(self, leaf: Leaf, x: Tensor) -> int:
        """Entries of a leaf with those that no pair asks for."""
        more = -self.call.q.shape[2] % ROWS if leaf.kind in ("query", "distance") else 0
        return max(x.shape[2] + more, 1)

    @cached_property
    def sink(self) -> Tensor | None:
        """Of each batch row and head [B, H] the natural logarithm of a weight."""
        if self.group.norm.sink is None:
            return None
        return self.sink_of(self.call)

    def sink_of(self, call: Call) -> Tensor:
        assert self.group.norm.sink is not None
        env = replace(environment(self.call), tables=call.tables)
        found = evaluate(self.group.norm.sink, env).to(self.call.q.dtype)
        return found.expand(*call.q.shape[:2], 1, 1).flatten(1)

    def gradient(
        self,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        grads: tuple[Tensor, Tensor, Tensor],
        tables: Mapping[str, Tensor],
    ) -> None:
        """Adds to those of q, k and v and of tables."""
        call, score, kind = self.call, self.score, self.group.norm.kind
        (batch, _, _, d), (_, kv_heads, n, dv) = call.q.shape, call.v.shape
        delta = (grad_out * out).sum(-1) if kind in ("softmax", "linear") else torch.zeros_like(lse)
        if score.softmax and _far(lse):
            # beside its greatest logit the log-sum-exp of a row has lost what tells weights apart
            top, total, again = (lse.new_empty(lse.shape) for _ in range(3))
            unread = {"out": out.new_empty(out.shape), "lse": again}
            self.run("forward", score.code(None), {"top": top, "sum": total, **unread})
        elif score.softmax:
            top, total = lse / score.unit, lse.new_ones(lse.shape)
        else:
            top, total = torch.zeros_like(lse), lse.exp()
        if grad_lse is not None:
            shift = grad_lse.masked_fill(lse == -torch.inf, 0.0)
            delta = delta - (shift if kind in ("softmax", "linear") else shift / total)
        if not score.softmax:
            total = total.masked_fill(total == 0, torch.inf) if kind == "linear" else torch.ones_like(lse)
        pieces = -(-PIECES // (batch * kv_heads))
        gk, gv = (call.k.new_zeros((batch, kv_heads, pieces, n, -(-w // LANES) * LANES)) for w in (d, dv))
        names = frozenset(tables)
        asked = {leaf: self.slope(leaf, pieces) for leaf in score.leaves if self.asks(leaf, names)}
        rows = {"top": top, "sum": total, "delta": delta, "grad_out": grad_out}
        rows = {name: x.contiguous() for name, x in rows.items()}
        gq = torch.zeros_like(grads[0]) if len(self.heads) > self.heads.sum() else grads[0]
        sizes = {"pieces": pieces, "dp": gk.shape[4], "dvp": gv.shape[4]}
        self.run("backward", score.code(asked), {**rows, "gq": gq, "gk": gk, "gv": gv}, asked, **sizes)
        gk, gv = (x[:, :, 0] if pieces == 1 else x.sum(2) for x in (gk, gv))
        if gq is not grads[0]:
            grads[0].add_(gq)
        grads[1].add_(gk[..., :d], alpha=score.packed * score.unit)
        grads[2].add_(gv[..., :dv])
        self.pull({leaf: x.sum(2) for leaf, x in asked.items()}, grads, tables)
        if tables and self.group.norm.sink is not None:
            # of a key with the logit of the sink and a value of zeros
            value, pull = vjp(lambda more: self.sink_of(_with(call, more)), singles(call.tables, names))
            weight = torch.exp(value[..., None] - lse.masked_fill(lse == -torch.inf, torch.inf))
            (found,) = pull(-(weight * delta).sum(-1) * torch.from_numpy(self.heads))
            for name, g in found.items():
                tables[name].add_(g)

    def asks(self, leaf: Leaf, names: frozenset[str]) -> bool:
        """Whether a gradient goes from it to anything."""
        return self.score.leaves[leaf].type == "real" and passes_gradients(leaf, names)

    def slope(self, leaf: Leaf, pieces: int) -> Tensor:
        """Where the kernels add up the gradient of a leaf, [B, H, pieces, entries]."""
        x = self.leaves[leaf]
        # the queries of pieces are others
        return x.new_zeros((*self.call.q.shape[:2], 1 if leaf.kind == "query" else pieces, x.shape[2]))

    def pull(
        self,
        slopes: Mapping[Leaf, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
        tables: Mapping[str, Tensor],
    ) -> None:
        """Adds what those of leaves give to those of q, k and tables."""
        if not slopes:
            return
        call, made = self.call, LeafValues(self.call)
        own = torch.from_numpy(self.heads).view(-1, 1)

        def values(q: Tensor, k: Tensor, more: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            there = _with(replace(call, q=q, k=k), more)
            return tuple([made.of(leaf, there) for leaf in slopes])

        found, pull = vjp(values, call.q, call.k, singles(call.tables, tables))
        back = tuple(
            [
                (x[..., : value.shape[2]] * own).sum_to_size(value.shape)
                for x, value in zip(slopes.values(), found, strict=True)
            ]
        )
        gq, gk, more = pull(back)
        grads[0].add_(gq)
        grads[1].add_(gk)
        for name, g in more.items():
            tables[name].add_(g)

    def run(
        self,
        name: str,
        code: str,
        tensors: Mapping[str, Tensor],
        slopes: Mapping[Leaf, Tensor] | None = None,
        **sizes: int,
    ) -> None:
        """A pass; beside q, k and v all tensors are contiguous."""
        call = self.call
        q, k, v, blocks = call.q, call.k, call.v, call.block_mask
        batch, heads = q.shape[:2]
        layouts = [self._layout(grid) for grid in blocks.grids]
        grids = (_Grid * len(layouts))(
            *(_Grid(*(x.ctypes.data for x in (y.first, y.start, y.end, y.words, y.masks))) for y in layouts)
        )
        index = np.broadcast_to(_over_heads(blocks.index, heads), (batch, heads))
        index = np.ascontiguousarray(np.where(self.heads, index, -1), np.int32)
        leaves = _pointers(list(self.leaves.values()), batch, heads)
        table_sizes = np.array([self.sizes(leaf) for leaf in self.leaves] or [(0,) * AXES], np.int64)
        wrong = np.array(-1, np.int64)
        pointers = {name: x.data_ptr() for name, x in {"q": q, "k": k, "v": v, **tensors}.items()}
        if slopes is not None:
            there = [slopes.get(leaf) for leaf in self.leaves]
            grads = _pointers_of_pieces(there, batch, heads, sizes["pieces"])
            pointers["grads"] = grads.ctypes.data
        if self.sink is not None:
            sink = (self.sink / self.score.unit).contiguous()
            pointers["sink"] = sink.data_ptr()
        asked = _Call(
            grids=ctypes.cast(grids, ctypes.c_void_p),
            index=index.ctypes.data,
            batch=batch, heads=heads, kv_heads=k.shape[1],
            nq=q.shape[2], n=k.shape[2], d=q.shape[3], dv=v.shape[3],
            packed=self.score.packed, unit=self.score.unit,
            threads=torch.get_num_threads(),
            leaves=leaves.ctypes.data, sizes=table_sizes.ctypes.data, origin=k.shape[2] - 1,
            wrong=wrong.ctypes.data,
            **pointers, **sizes,
        )  # fmt: skip
        for side, x in (("qs", q), ("ks", k), ("vs", v)):
            setattr(asked, side, (ctypes.c_int64 * 3)(*x.stride()[:3]))
        made = library(code, name, q.dtype == torch.float64)
        if isinstance(made, str):
            raise fail(f"the backend `cpu` cannot be compiled: {made}")
        if made(ctypes.byref(asked)):
            raise MemoryError(f"the {name} pass found no room for a block of queries")
        if wrong >= 0:
            self.refuse(int(wrong))

    def refuse(self, pair: int) -> None:
        """Raises AttnError for a pair that has no value."""
        (batch, heads, nq, _), n = self.call.q.shape, self.call.k.shape[2]
        env = pair_environment(self.call, *map(int, np.unravel_index(pair, (batch, heads, nq, n))))
        live = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        evaluate(self.group.score, env, live)
        assert self.group.decay is not None
        decay_factor(self.group.decay, env, live)

    def sizes(self, leaf: Leaf) -> tuple[int, ...]:
        """Of the axes of a table; of a number -1, for its gradient is a sum over all pairs."""
        if isinstance(leaf.of, Table):
            sizes = sizes_of(leaf.of, self.call)
            return (*sizes, *(1,) * (AXES - len(sizes)))
        return (-1 if leaf.kind == "number" else 0,) * AXES

    def _layout(self, grid: TileGrid) -> Layout:
        found = self.layouts.get(grid)
        if found is None:
            found = self.layouts[grid] = Layout.of(grid)
        return found


def _with(call: Call, tables: Mapping[str, Tensor]) -> Call:
    return replace(call, tables={**call.tables, **tables})


def _pointers(tensors: Sequence[Tensor], batch: int, heads: int) -> NDArray[np.int64]:
    """Of each [B or 1, H or 1, entries] where those of a batch row and head begin: [B, H, tensors]"""
    found = np.zeros((batch, heads, max(len(tensors), 1)), np.int64)
    for i, x in enumerate(tensors):
        rows, columns, entries = x.shape
        each = np.arange(rows * columns).reshape(rows, columns) * entries * x.element_size()
        found[:, :, i] = x.data_ptr() + each
    return found


def _pointers_of_pieces(
    tensors: Sequence[Tensor | None], batch: int, heads: int, pieces: int
) -> NDArray[np.int64]:
    """[B, H, pieces, tensors], 0 where there is no tensor."""
    found = np.zeros((batch, heads, pieces, max(len(tensors), 1)), np.int64)
    for i, x in enumerate(tensors):
        if x is not None:
            each = np.arange(math.prod(x.shape[:3])).reshape(x.shape[:3]) * x.shape[3] * x.element_size()
            found[..., i] = x.data_ptr() + each
    return found


def _far(lse: Tensor) -> bool:
    """Whether the log-sum-exp of some row has lost digits that its weights need."""
    return bool(((lse.abs() > FAR) & (lse > -torch.inf)).any())


def _over_heads(index: NDArray[np.int32], heads: int) -> NDArray[np.int32]:
    """index [B or 1, H'] of head h mod H'."""
    return index[:, np.arange(heads) % index.shape[1]]
