"""Dense attention in numpy's extended precision, with gradients: the backend `numpy`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Features, Kernel, Problem
from attndsl.expr import Expr
from attndsl.meaning.pointwise import OPERATIONS, evaluate
from attndsl.scores import affine_in_s
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

Array = NDArray[Any]
SECONDS_PER_PRODUCT = 5e-9
ROWS = 256
"""Query rows at a time."""


class Numpy:
    features = Features(
        clauses={"score", "decay", "count", "sink", "heads"},
        norms={"softmax", "sigmoid", "relu"},
        operations={*OPERATIONS, "add", "and", "or", "inset", "exists", "random", "inner"}
        | {"lookup", "intable", "rank_of", "count_of"},
        tables={"given", "learned", "known", "int", "bool", "float"},
        modes={"training"},
        dtypes={"float16", "bfloat16", "float32", "float64"},
    )

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if problem.training and (attention.learned or any(t.dtype == "float" for t in attention.inputs)):
            return "it has gradients of q, k and v alone"
        for group in attention.groups:
            split = affine_in_s(group.score)
            if split is None:
                return "it takes scores of the form A * s + B alone"
            if group.decay is not None and group.decay.free & {"s", "Q", "K"}:
                return "it takes decays without s, Q and K alone"
            for e in (*split, group.decay or ir.ONE):
                for node in ir.nodes(e):
                    if node.op == "inner":
                        return "it multiplies no vectors of tables"
                    if node.op == "where" and any(arg.tables for arg in node.args[1:]):
                        return "it looks nothing up under a condition"
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float:
        p = problem
        passes = 3 if p.training else 1
        return passes * p.batch * p.heads * p.q_length * p.length * p.head_dim * SECONDS_PER_PRODUCT

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        return Attend(attention)


backend = Numpy()


@dataclass(frozen=True)
class Attend:
    """The kernel. By `gradient` attndsl's operator knows one that brings its gradients."""

    attention: Attention

    @np.errstate(divide="ignore", invalid="ignore")
    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        out = np.zeros((*call.q.shape[:3], call.v.shape[3]), np.longdouble)
        lse = np.zeros(call.q.shape[:3], np.longdouble)
        for part in parts(self.attention, call):
            weight, total, top = part.weights()
            place = (part.b, part.h, part.rows)
            out[place] = weight @ part.v
            lse[place] = np.log(total) + top
        return rounded(out, call.q.dtype), rounded(lse, torch.promote_types(call.q.dtype, torch.float32))

    @np.errstate(invalid="ignore")
    def gradient(
        self,
        call: Call,
        needing: list[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """With w the weight of a pair before and p after division by Z, L the loss and l the logit:
        dL/dl = p (dL/do . (v - o) + dL/dlse) for softmax, g'(l) m (dL/do . v + dL/dlse / sum w) else."""
        gq, gk, gv = (np.zeros(x.shape, np.longdouble) for x in (call.q, call.k, call.v))
        go = extended(grad_out)
        gl = np.zeros(lse.shape, np.longdouble) if grad_lse is None else extended(grad_lse)
        for part in parts(self.attention, call):
            place = (part.b, part.h, part.rows)
            weight, total, _ = part.weights()
            towards = go[place] @ part.v.T
            if part.group.norm.kind == "softmax":
                o = weight @ part.v
                slope = weight * (towards - (go[place] * o).sum(-1, keepdims=True) + gl[place][:, None])
            else:
                share = np.divide(gl[place], total, out=np.zeros_like(total), where=total > 0)
                slope = part.steepness() * (towards + share[:, None])
            gs = slope * part.scale / np.sqrt(np.longdouble(part.q.shape[1]))
            gq[place] = gs @ part.k
            gk[part.b, part.shared] += gs.T @ part.q
            gv[part.b, part.shared] += weight.T @ go[place]
        return *(rounded(g, call.q.dtype) for g in (gq, gk, gv)), {}


@dataclass(frozen=True)
class Part:
    """Some query rows of one batch row and head: q [r, D], k [n, D], v [n, Dv], and for each pair whether it
    is `live`, the logit scale * s + `bias`, and the `factor` of the weight; 0 where not live."""

    group: HeadGroup
    b: int
    h: int
    shared: int
    rows: slice
    q: Array
    k: Array
    v: Array
    live: Array
    scale: Array
    bias: Array
    factor: Array
    sink: Any
    arithmetic: type[np.floating[Any]]

    def logits(self) -> Array:
        """As the language rounds them: a bias may be a large number in place of minus infinity."""
        s = self.q @ self.k.T / np.sqrt(np.longdouble(self.q.shape[1]))
        return (self.scale * s + self.bias).astype(self.arithmetic).astype(np.longdouble)

    def weights(self) -> tuple[Array, Array, Array]:
        """Weights [r, n] divided by Z; Z / exp(top) or, without a norm's sum, their sum [r]; top [r]."""
        logit = self.logits()
        if self.group.norm.kind != "softmax":
            g = 1 / (1 + np.exp(-logit)) if self.group.norm.kind == "sigmoid" else np.maximum(logit, 0)
            weight = self.factor * g
            return weight, weight.sum(-1), np.zeros(len(logit))
        top = np.where(self.live & (self.factor != 0), logit, -np.inf).max(-1, initial=-np.inf)
        # a row without a key is empty, whatever its sink: its output is 0 and its log-sum-exp -inf
        empty = top == -np.inf
        top = np.maximum(np.where(empty, 0, top), self.sink)
        # what is above the top has factor 0
        power = np.minimum(logit - top[:, None], 0)
        weight = np.where(empty[:, None], 0, self.factor * np.exp(np.where(self.live, power, -np.inf)))
        total = np.where(empty, 0, weight.sum(-1) + np.exp(self.sink - top))
        return weight / np.where(total == 0, 1, total)[:, None], total, top

    def steepness(self) -> Array:
        """factor * g'(logit) of `sigmoid` and `relu`."""
        logit = self.logits()
        if self.group.norm.kind == "relu":
            return self.factor * (logit > 0)
        g = 1 / (1 + np.exp(-logit))
        return self.factor * g * (1 - g)


def parts(attention: Attention, call: Call) -> Iterator[Part]:
    q, k, v = (extended(tensor) for tensor in (call.q, call.k, call.v))
    batch, heads, nq, _ = q.shape
    groups = lowering.head_groups(attention, heads)
    mask = call.block_mask.to_dense()
    for b in range(batch):
        for h in range(heads):
            group, shared = attention.groups[groups[h]], h // (heads // k.shape[1])
            at = Positions(call, b, h)
            slope, rest = affine_in_s(group.score) or (ir.ONE, ir.ZERO)
            sink = -np.inf
            if group.norm.sink is not None:
                sink = at.at(group.norm.sink, np.int64(0), np.int64(0))[()]
            for start in range(0, nq, ROWS):
                rows = slice(start, min(start + ROWS, nq))
                live = mask[b % len(mask), h % mask.shape[1], rows]
                factor = live if group.decay is None else at.of(group.decay, live, start)
                yield Part(
                    group, b, h, shared, rows, q[b, h, rows], k[b, shared], v[b, shared], live,
                    at.of(slope, live, start), at.of(rest, live, start), factor, sink,
                    np.float64 if call.q.dtype == torch.float64 else np.float32,
                )  # fmt: skip


@dataclass(frozen=True)
class Positions:
    call: Call
    b: int
    h: int

    def of(self, e: Expr, live: Array, start: int) -> Array:
        """An expression without s, Q and K where `live`, 0 elsewhere: there tables may not reach."""
        found = np.zeros(live.shape, np.longdouble)
        rows, columns = np.nonzero(live)
        q, k = self.call.q_at.positions(self.b), self.call.k_at.positions(self.b)
        found[rows, columns] = self.at(e, q[start + rows], k[columns])
        return found

    def at(self, e: Expr, q: Array, k: Array) -> Array:
        call = self.call
        n = call.n[self.b % len(call.n)]
        closed = lowering.closed(e, n, call.q.shape[2], self.b, self.h, call.q.shape[1])
        closed = ir.substitute(closed, {"D": ir.const(call.q.shape[3])})
        tables = {}
        for table in closed.tables:
            array = call.tables[table.name].detach()
            tables[table.name] = array.double().numpy() if array.is_floating_point() else array.numpy()
        return evaluate(closed, q, k, tables)


def extended(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().astype(np.longdouble)


def rounded(array: Array, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array.astype(np.float64)).to(dtype)
