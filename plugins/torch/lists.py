"""Keys listed for each query, `k in chosen[q]`: products over the lists, as of embedding bags.

Lists that are new at every call are scattered over all tiles: to find these takes longer than to attend. So
nothing is tiled: each row multiplies the keys of its list, and what else the mask says is decided there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.axis import Axis
from attndsl.backend import Call
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import (
    FEATURES,
    Env,
    decay_factor,
    evaluate,
    gain,
    gained,
    of_heads,
    positions,
    singles,
    softmax,
)
from attndsl.expr import Expr, Table
from attndsl.meaning import pointwise
from attndsl.meaning.intervals import check_range
from attndsl.tiles.lowering import Sizes, head_groups, ranges
from attndsl.tiles.tiling import replaced

Q, K = ir.var("Q"), ir.var("K")
PLACES = ir.var("q"), ir.var("k")
DECIDED = FEATURES.operations - {"exists", "random", "intable"} | {"const", "var"}
"""Operations of what is decided pair by pair: the others search."""
SPARSE = 4
"""Keys for each entry of a list from which on products over lists take less than those of whole tiles."""
FORMED, SEEN = 2**18, 2**19
"""Weights of several heads that are formed at once; places that tell entries of lists apart at once."""


@dataclass(frozen=True)
class Listed:
    """A mask `k in table[q]` and `rest`, with the score over `s` alone."""

    table: Table
    rest: Expr
    score: Expr

    @staticmethod
    def of(group: HeadGroup) -> Listed | None:
        """None where the mask is no such, or scores read vectors beyond Q @ K."""
        product = ir.mul(ir.call("sqrt", ir.var("D")), ir.var("s"))
        score = replaced(group.score, {ir.inner(Q, K): product, ir.inner(K, Q): product})
        scored = [e for e in (score, group.decay, group.norm.sink) if e is not None]
        if any(e.free & {"Q", "K"} for e in scored):
            return None
        mask = group.relation.mask
        parts = mask.args if mask.op == "and" else (mask,)
        for part in parts:
            table = part.value
            if part.op != "intable" or not isinstance(table, Table) or table.known is not None:
                continue
            if (part.args[-1], part.args[0], len(table.explicit)) == (*PLACES, 2):
                rest = ir.all_of(*(other for other in parts if other is not part))
                return Listed(table, rest, score) if decided(rest) else None
        return None

    def fits(self, call: Call) -> bool:
        """Whether every query has a list, short beside the keys, which stand side by side, and what else
        decides looks up nothing outside of its tables."""
        rows, entries = call.tables[self.table.name].shape[-2:]
        sizes = [] if self.table.by_entry else [(PLACES[0], rows)]
        for _, table, indices in _by_place(self.rest):
            sizes += zip(indices, call.tables[table.name].shape[-len(indices) :], strict=False)
        ends = {place: _ends(axis) for place, axis in zip(PLACES, (call.q_at, call.k_at), strict=True)}
        inside = all(0 <= ends[place][0] and ends[place][1] < size for place, size in sizes)
        beside = call.k_at.starts is not None and call.q.device.type == "cpu"
        return inside and beside and sparse(entries, call.k.shape[2])

    @property
    def entries(self) -> int | None:
        """Of each list, where the text says it."""
        size = self.table.dims[-1]
        return size if isinstance(size, int) else None


def decided(rest: Expr) -> bool:
    """Whether each pair tells by integers alone, without a search, and has a value where tables have one."""
    found = ir.var("found")
    values = {e: ir.lt(found, ir.ZERO) if e.type == "bool" else found for e, _, _ in _by_place(rest)}
    plain = all(node.op in DECIDED and node.type != "real" for node in ir.nodes(rest))
    return plain and not pointwise.partial(replaced(rest, values))


def _by_place(rest: Expr) -> Iterator[tuple[Expr, Table, tuple[Expr, ...]]]:
    """What is looked up where queries and keys stand, in which tables, and at which places."""
    for node in ir.nodes(rest):
        if isinstance(node.value, Table) and node.value.known is None:
            indices = node.args[len(node.value.implicit) :]
            if all(index in PLACES for index in indices):
                yield node, node.value, indices


def _ends(axis: Axis) -> tuple[int, int]:
    """The least and the greatest position of all rows."""
    firsts, lasts = zip(*(axis.span(row) for row in range(len(axis.rows))), strict=True)
    return min(firsts), max(lasts)


def sparse(entries: int, n: int) -> bool:
    return 0 < entries * SPARSE <= n


def listed_of(attention: Attention) -> tuple[Listed, ...] | None:
    """That of each group of heads; None where one has none."""
    found = [Listed.of(group) for group in attention.groups]
    return None if None in found else tuple(some for some in found if some is not None)


@dataclass(frozen=True, eq=False)
class Lists:
    """Some query heads of one batch row, with the lists of their queries.

    keys, live  int64 and bool [X or 1, nq, r]: entries of k, each of a row once; 0 where not live
    """

    call: Call
    group: HeadGroup
    listed: Listed
    batch: int
    heads: range
    keys: Tensor
    live: Tensor

    def few(self, count: int) -> Iterator[Lists]:
        """The same, so many heads at a time."""
        for start in range(0, len(self.heads), count):
            some = slice(start, start + count)
            if len(self.keys) == 1:
                yield replace(self, heads=self.heads[some])
            else:
                yield replace(self, heads=self.heads[some], keys=self.keys[some], live=self.live[some])

    def each(self) -> Iterator[tuple[int, int, int, int]]:
        """The place of each head among these, the head, its key head, and the place of its list."""
        share = self.call.q.shape[1] // self.call.k.shape[1]
        for i, head in enumerate(self.heads):
            yield i, head, head // share, i % len(self.keys)

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        """Of each row of x [B, H, nq, D] with the rows of y [B, Hkv, n, D] at its keys: [X, nq, r]."""
        _, nq, r = self.keys.shape
        found = x.new_zeros((len(self.heads), nq * r))
        starts = torch.arange(0, nq * r + 1, r)
        for i, head, kv_head, place in self.each():
            rows, columns = x[self.batch, head], y[self.batch, kv_head].T
            matrix = _matrix(starts, self.keys[place].flatten(), found[i], (nq, columns.shape[1]))
            torch.sparse.sampled_addmm(matrix, rows, columns, beta=0.0, out=matrix)
        return found.view(len(found), nq, r)

    def sums(self, weights: Tensor, y: Tensor, into: Tensor) -> None:
        """Rows of y at the keys, weighted [X, nq, r], into [B, H, nq, D]."""
        for i, head, kv_head, place in self.each():
            y_rows = y[self.batch, kv_head]
            into[self.batch, head] = embedding_bag(
                self.keys[place], y_rows, mode="sum", per_sample_weights=weights[i]
            )

    def spread(self, weights: Tensor, x: Tensor, onto: Tensor) -> None:
        """Rows of x [B, H, nq, D], weighted, added to [B, Hkv, n, D] at their keys."""
        for i, head, kv_head, place in self.each():
            order, rows, starts = self.by_key[place]
            rows_of_x, weight = x[self.batch, head], weights[i].flatten()[order]
            onto[self.batch, kv_head] += embedding_bag(
                rows, rows_of_x, starts, mode="sum", per_sample_weights=weight
            )

    @cached_property
    def by_key(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The entries of a list in the order of their keys, whose they are, and where each key begins."""
        found, n = [], self.call.k.shape[2]
        for keys in self.keys.flatten(1):
            order = keys.argsort(stable=True)
            counts = torch.bincount(keys, minlength=n)
            found.append((order, order // self.keys.shape[2], counts.cumsum(0) - counts))
        return found

    def env(self, tables: Mapping[str, Tensor]) -> Env:
        """Axes [X, nq, r]; `tables` take the place of the call's."""
        call, b = self.call, self.batch
        queries = torch.arange(self.keys.shape[1])[None, :, None]
        at = {"q": positions(call.q_at, b, queries), "k": positions(call.k_at, b, self.keys)}
        env = of_heads(call, b, self.heads, axes=3)
        return replace(env, values={**env.values, **at}, tables={**call.tables, **tables})

    def weights(self, products: Tensor, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What each value is multiplied with [X, nq, r], of Q @ K, and the log-sum-exp [X, nq]."""
        env, norm, live = self.env(tables), self.group.norm, self.live
        env = replace(env, values={**env.values, "s": products / self.call.q.shape[3] ** 0.5})
        logit = evaluate(self.listed.score, env, live).to(env.dtype)
        logit = torch.where(live, logit, -torch.inf).expand(products.shape)
        factor = None if self.group.decay is None else decay_factor(self.group.decay, env, live)
        if norm.kind == "softmax":
            sink = None if norm.sink is None else evaluate(norm.sink, env).to(env.dtype)
            weight, lse = softmax(logit, factor, sink)
            return weight, lse.squeeze(-1)
        weight = gain(norm.kind, logit)
        weight, lse = gained(norm.kind, weight if factor is None else weight * factor)
        return weight, lse.squeeze(-1)


def _matrix(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sparse matrix of these values, which it shares; columns in any order, and more than once."""
    return torch.sparse_csr_tensor(starts, columns, values, shape, check_invariants=False)


with warnings.catch_warnings():
    # torch says once in a process that such matrices are new
    warnings.simplefilter("ignore")
    _matrix(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), (1, 1))


def lists_of(attention: Attention, listed: Sequence[Listed], call: Call) -> Iterator[Lists]:
    """Every (batch row, query head) once, as many heads at a time as is fast."""
    (batch, heads, nq, _), groups = call.q.shape, head_groups(attention, call.q.shape[1])
    for b in range(batch):
        for group, members in groupby(range(heads), groups.__getitem__):
            here, table = list(members), listed[group].table
            entries = nq * call.tables[table.name].shape[-1]
            count, stop = max(1, FORMED // max(1, entries)), here[-1] + 1
            lists_at_once = count if "H" in table.dims else len(here)
            for first in range(here[0], stop, lists_at_once):
                some = range(first, min(first + lists_at_once, stop))
                yield from _lists(call, attention.groups[group], listed[group], b, some).few(count)


def _lists(call: Call, group: HeadGroup, listed: Listed, batch: int, heads: range) -> Lists:
    table, device, n = listed.table, call.q.device, call.k.shape[2]
    lists = call.tables[table.name]
    lists = lists[min(batch, len(lists) - 1)] if table.batched else lists
    lists = lists[heads.start : heads.stop] if "H" in table.dims else lists[None]
    (_, first), *_ = call.k_at.row(batch)
    rows = torch.arange(call.q.shape[2], device=device)
    entries = (lists if table.by_entry else lists[:, positions(call.q_at, batch, rows)]) - first
    live = (entries >= 0) & (entries < n)
    live &= _alone(torch.where(live, entries, n), n)
    keys = torch.where(live, entries, 0)
    found = Lists(call, group, listed, batch, heads, keys, live)
    if listed.rest is not ir.TRUE:
        check_range(
            listed.rest, ranges(Sizes(call.q.shape[1], call.q_at, call.k_at, call.n), batch), call.tables
        )
        live = live & evaluate(listed.rest, found.env({}), live)
        found = replace(found, keys=torch.where(live, keys, 0), live=live)
    return found


def _alone(keys: Tensor, n: int) -> Tensor:
    """One entry of each value 0..n in each list [X, nq, r]: the one that is last written at its place."""
    lists = keys.flatten(0, 1)
    count = max(1, SEEN // (n + 1))
    seen = torch.empty((min(count, len(lists)), n + 1), dtype=torch.int32, device=keys.device)
    slots = torch.arange(lists.shape[1], dtype=seen.dtype, device=keys.device)
    found = torch.empty(lists.shape, dtype=torch.bool, device=keys.device)
    for start in range(0, len(lists), count):
        some = lists[start : start + count]
        # places that are not written now are not read
        places = seen[: len(some)].scatter_(1, some, slots.expand(some.shape)).gather(1, some)
        torch.eq(places, slots, out=found[start : start + count])
    return found.view(keys.shape)


def attend(attention: Attention, listed: Sequence[Listed], call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as in `Kernel`, of a call with vectors of at least float32."""
    out, lse = call.q.new_empty((*call.q.shape[:3], call.v.shape[3])), call.q.new_empty(call.q.shape[:3])
    for some in lists_of(attention, listed, call):
        weight, lse[some.batch, some.heads.start : some.heads.stop] = some.weights(
            some.products(call.q, call.k), {}
        )
        some.sums(weight, call.v, out)
    return out, lse


def gradient(
    attention: Attention,
    listed: Sequence[Listed],
    call: Call,
    wanted: Sequence[str],
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Gradients as in `Differentiable`, of a call with vectors of at least float32."""
    gq, gk, gv = torch.empty_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
    tables = {name: torch.zeros_like(x) for name, x in singles(call.tables, wanted).items()}
    grad_out = grad_out.to(gq.dtype)
    slopes = torch.zeros_like(lse) if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0.0)
    for some in lists_of(attention, listed, call):
        (weight, _), pull = vjp(some.weights, some.products(call.q, call.k), singles(call.tables, wanted))
        here = slopes[some.batch, some.heads.start : some.heads.stop]
        slope, more = pull((some.products(grad_out, call.v), here))
        some.sums(slope, call.k, gq)
        some.spread(slope, call.q, gk)
        some.spread(weight, grad_out, gv)
        for name, grad in more.items():
            tables[name] += grad
    return gq, gk, gv, tables
