"""Attention over live pairs alone, in numpy's extended precision. Registered as the backend `numpy`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl import lowering
from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Kernel, Problem
from attndsl.blockmask import BlockMask, TileGrid
from attndsl.expr import Expr
from attndsl.pointwise import evaluate
from attndsl.torch_eval import affine_in_s

Array = NDArray[Any]
SECONDS_PER_PRODUCT = 2e-8
PAIRS_AT_ONCE = 2**16


class Numpy:
    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if problem.device != "cpu":
            return "it runs on the CPU alone"
        if problem.training:
            return "it has no backward pass"
        for group in attention.groups:
            if affine_in_s(group.score) is None:
                return "it takes scores of the form A * s + B alone"
            if group.decay is not None and group.decay.free & {"s", "Q", "K"}:
                return "it takes decays without s, Q and K alone"
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float:
        p = problem
        share = 1.0 if block_mask is None else block_mask.density
        return p.batch * p.heads * p.q_length * p.length * share * p.head_dim * SECONDS_PER_PRODUCT

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        return lambda call: attend(attention, call)


backend = Numpy()


def attend(attention: Attention, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    heads = call.q.shape[1]
    groups = lowering.head_groups(attention, heads)
    q, k, v = (extended(tensor) for tensor in (call.q, call.k, call.v))
    out = np.zeros((*q.shape[:3], v.shape[3]), np.longdouble)
    lse = np.full(q.shape[:3], -np.inf, np.longdouble)
    for b in range(q.shape[0]):
        for h in range(heads):
            shared = h // (heads // k.shape[1])
            row = Row(attention.groups[groups[h]], call, b, h)
            out[b, h], lse[b, h] = row.attend(q[b, h], k[b, shared], v[b, shared])
    kept = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    return torch.from_numpy(out.astype(np.float64)).to(call.q.dtype), torch.from_numpy(
        lse.astype(np.float64)
    ).to(kept)


def extended(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy().astype(np.longdouble)


def rounded(array: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64)).to(dtype)


@dataclass(frozen=True)
class Row:
    """One batch row and head."""

    group: HeadGroup
    call: Call
    b: int
    h: int

    def attend(self, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
        """o [nq, Dv] and lse [nq] of q [nq, D], k [n, D], v [n, Dv]."""
        kind = self.group.norm.kind
        top = np.full(len(q), -np.inf, np.longdouble)
        if kind == "softmax":
            for rows, columns in self.pairs():
                np.maximum.at(top, rows, self.logits(q, k, rows, columns))
            if self.group.norm.sink is not None:
                top = np.maximum(top, self.values(self.group.norm.sink, np.zeros(1, int), np.zeros(1, int)))
        top = np.where(np.isfinite(top), top, 0)
        out = np.zeros((len(q), v.shape[1]), np.longdouble)
        total = np.zeros(len(q), np.longdouble)
        for rows, columns in self.pairs():
            logit = self.logits(q, k, rows, columns)
            if kind == "softmax":
                weight = np.exp(logit - top[rows])
            else:
                weight = 1 / (1 + np.exp(-logit)) if kind == "sigmoid" else np.maximum(logit, 0)
            if self.group.decay is not None:
                weight = weight * self.values(self.group.decay, rows, columns)
            np.add.at(total, rows, weight)
            np.add.at(out, rows, weight[:, None] * v[columns])
        empty = total == 0
        if kind == "softmax":
            if self.group.norm.sink is not None:
                sink = self.values(self.group.norm.sink, np.zeros(1, int), np.zeros(1, int))
                total = total + np.exp(sink - top)
            out = out / np.where(empty, 1, total)[:, None]
        return out, np.where(empty, -np.inf, np.log(np.where(empty, 1, total)) + top)

    @property
    def grid(self) -> TileGrid:
        index = self.call.block_mask.index
        return self.call.block_mask.grids[index[self.b % index.shape[0], self.h % index.shape[1]]]

    def pairs(self) -> Iterator[tuple[Array, Array]]:
        """Rows and columns of the live pairs, some rows at a time."""
        live = self.grid.to_dense()
        step = max(1, PAIRS_AT_ONCE // max(1, live.shape[1]))
        for start in range(0, len(live), step):
            rows, columns = np.nonzero(live[start : start + step])
            yield rows + start, columns

    def logits(self, q: Array, k: Array, rows: Array, columns: Array) -> Array:
        split = affine_in_s(self.group.score)
        assert split is not None
        slope, rest = (self.values(part, rows, columns) for part in split)
        s = np.einsum("id,id->i", q[rows], k[columns]) / np.sqrt(np.longdouble(q.shape[1]))
        return slope * s + rest

    def values(self, e: Expr, rows: Array, columns: Array) -> Array:
        """An expression without s, Q and K at live pairs, where tables may be read."""
        call, b = self.call, self.b
        sizes = {"n": call.n, "q": call.q_offset, "k": call.k_offset}
        here = {name: values[b % len(values)] for name, values in sizes.items()}
        closed = lowering.closed(e, here["n"], call.q.shape[2], self.h, call.q.shape[1])
        closed = ir.substitute(closed, {"D": ir.const(call.q.shape[3])})
        tables = {}
        for table in closed.tables:
            array = call.tables[table.name].detach()
            array = array.double().numpy() if array.is_floating_point() else array.numpy()
            tables[table.name] = array[(b,) * table.batched + (self.h,) * table.headed]
        return evaluate(closed, here["q"] + rows, here["k"] + columns, tables)
