"""The `linear` backend: weights that are inner products of features, without forming a weight.

With w_ij = exp(a_i + b_j) phi(q_i) . psi(k_j) a row is phi(q_i) . S_i, where S_i is the sum of exp(a_i +
b_j) psi(k_j) v_j (Katharopoulos et al., 2020, section 3.2). Keys are taken a chunk at a time: inside a
chunk weights are formed, and what came before is a state [m, Dv + 1] of values and, in the last column, of
weights. A state is kept relative to the last key of its chunk, so that no factor of a decay leaves the
range of a float, and of features that are exponentials relative to the greatest exponent so far, which
cancels exactly. Nothing of a backward pass is kept: it walks forward for the queries and backward for the
keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Kernel, Problem, predicted
from attndsl.execution.torch_eval import FEATURES, Env, environment, evaluate
from attndsl.expr import Expr
from attndsl.scores import by_distance, feature_form
from attndsl.tiles.blockmask import BlockMask

CHUNK = 64
SLAB = 512
"""Keys of which features are made at once: few enough to stay in a cache."""
Q, K = ir.var("q"), ir.var("k")
CAUSAL = ir.le(K, Q)
SECONDS = {"cpu": {"calls": 4e-4, "chunks": 9e-5, "products": 2.6e-11, "features": 1.2e-9}}
"""Of one core with AVX-512, by benchmarks/linear.py."""
TRAINING = 3.4
"""Forward and backward beside forward."""


@dataclass(frozen=True)
class Form:
    """What a group of heads asks for.

    query, key      features, or their logarithms where `powers` holds
    log_q, log_k    of the decay, or None
    causal          whether a query sees keys up to itself, else all
    segments        pairs of integers of the query and of the key that are equal for what is related
    queries, keys   truths that hold for queries and keys that take part
    """

    query: Expr
    key: Expr
    powers: tuple[bool, bool]
    log_q: Expr | None
    log_k: Expr | None
    causal: bool
    segments: tuple[tuple[Expr, Expr], ...]
    queries: Expr
    keys: Expr


@lru_cache(maxsize=256)
def form_of(attention: Attention) -> Form | str:
    """Or why there is none."""
    if len(attention.groups) != 1:
        return "its groups of heads differ"
    (group,) = attention.groups
    if group.norm.kind not in ("linear", "none"):
        return f"its norm is {group.norm.kind}"
    found = feature_form(group.score, group.decay)
    if isinstance(found, str):
        return found
    if (found.log_q is not None and "Q" in found.log_q.free) or (
        found.log_k is not None and "K" in found.log_k.free
    ):
        return "its decay is of what is in q and k"
    mask = group.relation.mask
    parts = mask.args if mask.op == "and" else (mask,) if mask is not ir.TRUE else ()
    rest = [part for part in parts if part is not CAUSAL]
    segments, queries, keys = [], [], []
    for part in rest:
        if "q" not in part.free:
            keys.append(part)
        elif "k" not in part.free:
            queries.append(part)
        elif (pair := _segment(part)) is not None:
            segments.append(pair)
        else:
            return "its mask is neither full nor causal, nor that in segments"
    if any("h" in part.free for part in rest) or group.relation.count is not None:
        return "its mask differs from head to head"
    powers = (found.phi_q.op == "exp", found.phi_k.op == "exp")
    query, key = (
        phi.args[0] if of else phi for phi, of in zip((found.phi_q, found.phi_k), powers, strict=True)
    )
    return Form(
        query, key, powers, found.log_q, found.log_k, len(rest) < len(parts), tuple(segments),
        ir.all_of(*queries), ir.all_of(*keys),
    )  # fmt: skip


def _segment(part: Expr) -> tuple[Expr, Expr] | None:
    if part.op != "eq" or any(arg.type != "int" for arg in part.args):
        return None
    for mine, other in (part.args, part.args[::-1]):
        if "k" not in mine.free and ir.substitute(mine, {"q": K}) is other:
            return mine, other
    return None


class Linear:
    """Registered as `linear`."""

    features = replace(FEATURES, clauses={"score", "decay"}, norms={"linear", "none"})
    seconds = SECONDS

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        found = form_of(attention)
        return found if isinstance(found, str) else None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        found, width = form_of(attention), problem.head_dim
        assert isinstance(found, Form)
        m = _width(found.key, width)
        rows = problem.batch * problem.heads
        tokens = float(rows * (problem.length + problem.q_length))
        pairs = float(rows * problem.length * CHUNK if found.causal else 0)
        return {
            "calls": 1,
            "pairs": pairs,
            "chunks": problem.length / CHUNK,
            "products": tokens * m * (width + 1) + pairs * (m + width + 1),
            "features": tokens * m,
            "written": tokens * (m + width),
        }

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        found = form_of(attention)
        assert isinstance(found, Form)
        return LinearKernel(attention.groups[0], found)


def _width(phi: Expr, head_dim: int) -> int:
    assert phi.width is not None
    found = ir.number(ir.substitute(phi.width, {"D": ir.const(head_dim)}))
    return head_dim if found is None else int(found)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some batch rows, all heads: X of them together.

    q, k     entries that take part, in the order of their positions; None: all as they are
    counts   of each query, how many of the keys it sees
    """

    batch: slice
    q: Tensor | None
    k: Tensor | None
    counts: NDArray[np.int64]

    @property
    def in_step(self) -> bool:
        """Whether each query sees one key more than the one before."""
        return self.q is None and self.k is None and bool((np.diff(self.counts) == 1).all())


def rows_of(form: Form, call: Call, env: Env) -> Iterator[Rows]:
    """Problems that are full or causal in themselves; queries that none has see nothing."""
    (batch, _, nq, _), n = call.q.shape, call.k.shape[2]
    alike = len(call.q_at.rows) == len(call.k_at.rows) == 1 and not form.segments
    for start in range(0, batch, batch if alike else 1) if batch else ():
        some = slice(start, batch if alike else start + 1)
        at_q, at_k = call.q_at.positions(start), call.k_at.positions(start)
        label = np.zeros(nq, np.int64), np.zeros(n, np.int64)
        for mine, other in form.segments:
            sides = (evaluate(mine, env), evaluate(other, env))
            rows = [_row(x, start).flatten().numpy() for x in sides]
            found = [np.broadcast_to(row, size) for row, size in zip(rows, (nq, n), strict=True)]
            both = np.stack([np.concatenate(label), np.concatenate(found)])
            joined = np.unique(both, axis=1, return_inverse=True)[1].reshape(-1)
            label = joined[:nq], joined[nq:]
        order_q, order_k = (np.lexsort((at, of)) for at, of in zip((at_q, at_k), label, strict=True))
        for segment in np.unique(label[0]):
            mine, other = (o[of[o] == segment] for o, of in zip((order_q, order_k), label, strict=True))
            counts = np.full(len(mine), len(other))
            if form.causal:
                counts = np.searchsorted(at_k[other], at_q[mine], side="right")
            yield Rows(some, _some(mine, nq), _some(other, n), counts)


def _some(entries: NDArray[np.int64], size: int) -> Tensor | None:
    return None if np.array_equal(entries, np.arange(size)) else torch.from_numpy(entries)


def _row(x: Tensor, b: int) -> Tensor:
    return x[b % len(x)] if x.dim() == 4 else x


@dataclass(frozen=True, eq=False)
class LinearKernel:
    group: HeadGroup
    form: Form

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[3]), dtype=wide)
        lse = call.q.new_full(call.q.shape[:3], -torch.inf, dtype=wide)
        env = environment(call)
        for rows in rows_of(self.form, call, env):
            work = Walk.of(self, call, env, rows, {})
            found, totals, base = work.forward()
            o, log = self._results(found, totals, base)
            _put(out, rows.batch, rows.q, o)
            _put(lse, rows.batch, rows.q, log)
        return out, lse

    def _results(self, found: Tensor, totals: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of weighed sums and sums of weights, in units of exp(base)."""
        log = totals.log()
        if base is not None:
            log = log + base
        if self.group.norm.kind == "linear":
            return found / totals.masked_fill(totals == 0, torch.inf)[..., None], log
        return found if base is None else found * base.exp()[..., None], log

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (call.q, call.k, call.v)]
        tables = {name: torch.zeros(call.tables[name].shape, dtype=wide) for name in wanted}
        env = environment(call)
        for rows in rows_of(self.form, call, env):
            work = Walk.of(self, call, env, rows, tables)
            o, log, g = (_take(x, rows.batch, rows.q).to(wide) for x in (out, lse, grad_out))
            g_lse = None if grad_lse is None else _take(grad_lse, rows.batch, rows.q).to(wide)
            for into, entries, found in zip(
                grads, (rows.q, rows.k, rows.k), work.backward(o, log, g, g_lse), strict=True
            ):
                _add(into, rows.batch, entries, found)
        gq, gk, gv = (x.to(y.dtype) for x, y in zip(grads, (call.q, call.k, call.v), strict=True))
        return gq, gk, gv, {name: x.to(call.tables[name].dtype) for name, x in tables.items()}


def _take(x: Tensor, batch: slice, entries: Tensor | None) -> Tensor:
    return x[batch] if entries is None else x[batch][:, :, entries]


def _put(into: Tensor, batch: slice, entries: Tensor | None, found: Tensor) -> None:
    if entries is None:
        into[batch] = found
    else:
        into[batch, :, entries] = found


def _add(into: Tensor, batch: slice, entries: Tensor | None, found: Tensor) -> None:
    heads = into.shape[1]
    found = found.unflatten(1, (heads, -1)).sum(2)  # type: ignore[no-untyped-call]
    if entries is None:
        into[batch] += found
    else:
        into[batch].index_add_(2, entries, found)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Keys, the queries whose last key is among them, and which of these keys each sees; None: all."""

    index: int
    keys: slice
    queries: slice
    live: Tensor | None


@dataclass(eq=False)
class Walk:
    """One problem on its way through the chunks; axes [B, H] are one, X.

    tables  gradients to add to
    """

    kernel: LinearKernel
    call: Call
    env: Env
    q: Tensor
    k: Tensor
    values: Tensor
    at: dict[str, Tensor]
    slabs: list[list[Chunk]]
    shape: tuple[int, int]
    logs: tuple[Tensor, Tensor, Tensor] | None
    tables: dict[str, Tensor]
    rows: Rows
    factors: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]]

    @cached_property
    def even(self) -> bool:
        """Whether the decay is of the distance alone and chunks are like one another."""
        decay = self.kernel.group.decay
        even = decay is not None and by_distance(decay) is not None
        return even and self.rows.in_step and self.call.adjacent

    @staticmethod
    def of(kernel: LinearKernel, call: Call, env: Env, rows: Rows, tables: dict[str, Tensor]) -> Walk:
        form, heads = kernel.form, call.q.shape[1]
        q, k, v = (
            _take(x, rows.batch, entries).to(env.dtype)
            for x, entries in ((call.q, rows.q), (call.k, rows.k), (call.v, rows.k))
        )
        share = heads // call.k.shape[1]
        values = torch.cat([v, v.new_ones((*v.shape[:3], 1))], -1).repeat_interleave(share, 1).flatten(0, 1)
        at = {name: _cut(name, x, rows) for name, x in env.values.items()}
        slabs = _slabs(form, rows.counts, k.shape[2])
        k = k.repeat_interleave(share, 1)
        walk = Walk(kernel, call, env, q, k, values, at, slabs, (len(q), heads), None, tables, rows, {})
        walk.logs = walk._logs({})
        return walk

    def _env(self, tables: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Env:
        return replace(self.env, values={**self.at, **values}, tables={**self.env.tables, **tables})

    def _logs(self, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Of the decay, in float64: of queries [X, nq], of keys, and of queries where keys stand [X, n]."""
        form = self.kernel.form
        if form.log_q is None or form.log_k is None:
            return None
        env, (batch, heads) = replace(self._env(tables, {}), dtype=torch.float64), self.shape
        nq, n = self.q.shape[2], self.k.shape[2]
        query, key, there = (
            evaluate(e, env).to(torch.float64)
            for e in (form.log_q, form.log_k, ir.substitute(form.log_q, {"q": K}))
        )
        return (
            query.expand(batch, heads, nq, 1).reshape(-1, nq),
            key.expand(batch, heads, 1, n).reshape(-1, n),
            there.expand(batch, heads, 1, n).reshape(-1, n),
        )

    def features(self, side: str, some: slice, x: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """[X, L, m] of some queries or keys x [B, H, L, D], or their logarithms."""
        form, axis = self.kernel.form, -2 if side == "q" else -1
        phi, taking = (form.query, form.queries) if side == "q" else (form.key, form.keys)
        place = self.at[side]
        place = place.narrow(axis, some.start, some.stop - some.start) if place.shape[axis] > 1 else place
        env = self._env(tables, {side.upper(): x, side: place})
        found = evaluate(phi, env).squeeze(-2 if side == "q" else -3)
        found = found.expand(*x.shape[:3], found.shape[-1])
        if taking is not ir.TRUE:
            live = evaluate(taking, env).squeeze(-1 if side == "q" else -2)[..., None]
            found = torch.where(live, found, -torch.inf if form.powers[side == "k"] else 0.0)
        return found.flatten(0, 1)

    def query_features(
        self, some: slice, x: Tensor, tables: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """And the logarithm of what each row is divided by [X, L]."""
        found = self.features("q", some, x, tables)
        if not self.kernel.form.powers[0]:
            return found, None
        top = _finite(found.detach().amax(-1))
        return (found - top[..., None]).exp(), top

    def steps(self, slab: list[Chunk], keys: Tensor, greatest: Tensor | None) -> Iterator[Step]:
        """The chunks of a slab, whose features or their logarithms are `keys`, with what makes states of one
        chunk those of the next; `greatest` is the greatest logarithm before them [X]."""
        first = slab[0].keys.start
        for chunk in slab:
            psi = keys[:, chunk.keys.start - first : chunk.keys.stop - first]
            top = None
            scale: Tensor | None = None
            if self.kernel.form.powers[1]:
                top = psi.detach().amax((-1, -2))
                if greatest is not None:
                    top = torch.maximum(top, greatest)
                    scale = (_finite(greatest) - _finite(top)).exp().where(greatest != -torch.inf, 0.0)
                greatest = top
                psi = (psi - _finite(top)[:, None, None]).exp()
            yield self._step(chunk, psi, top, scale)

    def _step(self, chunk: Chunk, psi: Tensor, top: Tensor | None, scale: Tensor | None) -> Step:
        inside = enter = leave = None
        onward = scale
        if self.logs is not None:
            query, key, there = self.logs
            a, b = query[:, chunk.queries], key[:, chunk.keys]
            here = there[:, chunk.keys.stop - 1]
            before = there[:, chunk.keys.start - 1] if chunk.keys.start else here
            like = (len(a[0]), len(b[0])) if self.even else None
            if like is not None and like in self.factors:
                inside, enter, leave, decay = self.factors[like]
                onward = decay if scale is None else decay * scale
                return Step(chunk, psi, top, scale, inside, enter, leave, onward)
            between = a[..., None] + b[:, None]
            if chunk.live is not None:
                between = between.where(chunk.live, -torch.inf)
            dtype = psi.dtype
            inside = between.exp().to(dtype)
            enter = (a - before[:, None]).exp().to(dtype)
            leave = (b + here[:, None]).exp().to(dtype)
            decay = (here - before).exp().to(dtype)
            onward = decay if scale is None else decay * scale
            # before the first chunk there is nothing, whatever its factor
            if like is not None and chunk.index:
                self.factors[like] = (inside, enter, leave, decay)
        elif chunk.live is not None:
            inside = chunk.live.to(psi.dtype)
        return Step(chunk, psi, top, scale, inside, enter, leave, onward)

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weighed sums [B, H, nq, Dv], sums of weights [B, H, nq], and the logarithm of their unit."""
        nq, powers = self.q.shape[2], self.kernel.form.powers
        found = self.values.new_zeros((len(self.values), nq, self.values.shape[2]))
        base = self.values.new_zeros(found.shape[:2]) if any(powers) else None
        state, greatest = None, None
        for slab in self.slabs:
            keys = self.features("k", *self._of_keys(slab), {})
            some, x = self._of_queries(slab)
            queries, own = self.query_features(some, x, {})
            for step in self.steps(slab, keys, greatest):
                values = self.values[:, step.chunk.keys]
                if state is None:
                    state = values.new_zeros((len(values), keys.shape[2], values.shape[2]))
                here = step.chunk.queries
                if here.stop > here.start:
                    phi = queries[:, here.start - some.start : here.stop - some.start]
                    weights = phi @ step.psi.mT
                    if step.inside is not None:
                        weights *= step.inside
                    into = found[:, here]
                    torch.bmm(weights, values, out=into) if into.is_contiguous() else into.copy_(
                        weights @ values
                    )
                    into += step.entering(phi) @ step.scaled(state)
                    if base is not None and step.top is not None:
                        base[:, here] += _finite(step.top)[:, None]
                step.add(state, step.leaving().mT, values)
                greatest = step.top
            if base is not None and own is not None:
                base[:, some] += own
        found = found.view(*self.shape, nq, -1)
        return found[..., :-1], found[..., -1], None if base is None else base.view(*self.shape, nq)

    def _of_keys(self, slab: list[Chunk]) -> tuple[slice, Tensor]:
        some = slice(slab[0].keys.start, slab[-1].keys.stop)
        return some, self.k[:, :, some]

    def _of_queries(self, slab: list[Chunk]) -> tuple[slice, Tensor]:
        some = slice(slab[0].queries.start, slab[-1].queries.stop)
        return some, self.q[:, :, some]

    def backward(
        self, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k [B, H, .., D] and v; those of tables are added to `tables`."""
        slopes, tops = self._slopes(out, lse, grad, grad_lse)
        leaves = {name: self.call.tables[name].detach().to(self.env.dtype) for name in self.tables}
        logs = (self.kernel.form.log_q, self.kernel.form.log_k)
        decaying = {t.name for e in logs if e is not None for t in e.tables} & leaves.keys()
        gq, gk = torch.zeros_like(self.q), torch.zeros_like(self.k)
        gv = torch.zeros_like(self.values)
        slope_q, slope_k = (
            self.values.new_zeros(x.shape[0] * x.shape[1], x.shape[2]) for x in (self.q, self.k)
        )
        state, before = None, None
        for slab in self.slabs:
            some, x = self._of_queries(slab)
            keys = self.features("k", *self._of_keys(slab), {})
            with _Pulled(x, leaves) as pulled:
                queries, _ = self.query_features(some, pulled.x, pulled.tables)
            towards = torch.zeros_like(queries)
            for step in self.steps(slab, keys, before):
                values = self.values[:, step.chunk.keys]
                if state is None:
                    state = values.new_zeros((len(values), keys.shape[2], values.shape[2]))
                here, g = step.chunk.queries, slopes[:, step.chunk.queries]
                products = g @ values.mT
                if step.inside is not None:
                    products *= step.inside
                slope = products @ step.psi + step.entering(g @ step.scaled(state).mT)
                towards[:, here.start - some.start : here.stop - some.start] = slope
                step.add(state, step.leaving().mT, values)
                before = step.top
            if decaying:
                slope_q[:, some] = (queries.detach() * towards).sum(-1)
            pulled.back(queries, towards, gq[:, :, some], self.tables)
        later = None
        for i, slab in reversed([*enumerate(self.slabs)]):
            some, x = self._of_keys(slab)
            queries, _ = self.query_features(*self._of_queries(slab), {})
            first = slab[0].queries.start
            with _Pulled(x, leaves) as pulled:
                keys = self.features("k", some, pulled.x, pulled.tables)
                made = [*self.steps(slab, keys, tops[i])]
                features = torch.cat([step.psi for step in made], 1)
            back = [torch.empty(0)] * len(made)
            for place, step in reversed([*enumerate(made)]):
                values, here = self.values[:, step.chunk.keys], step.chunk.queries
                phi, g = queries[:, here.start - first : here.stop - first], slopes[:, here]
                psi = step.psi.detach()
                weights, products = psi @ phi.mT, values @ g.mT
                if step.inside is not None:
                    inside = step.inside.mT
                    weights, products = weights * inside, products * inside
                slope_v, slope = weights @ g, products @ phi
                if later is not None:
                    slope_v += step.leaving() @ later
                    slope += step.left(values @ later.mT)
                gv[:, step.chunk.keys] = slope_v
                back[place] = slope
                if decaying:
                    slope_k[:, step.chunk.keys] = (psi * slope).sum(-1)
                more = step.entering(phi).mT @ g
                later = more if later is None else step.carried(later, more)
                if step.scale is not None and later is more:
                    later = later * step.scale[:, None, None]
            pulled.back(features, torch.cat(back, 1), gk[:, :, some], self.tables)
        if decaying:
            self._pull_logs(slope_q, slope_k, decaying, leaves)
        return gq, gk, gv[..., :-1].view(*self.shape, *gv.shape[1:-1], -1)

    def _slopes(
        self, out: Tensor, lse: Tensor, grad: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of weighed sums and, in the last column, of sums of weights [X, nq, Dv + 1]; the greatest
        logarithm before each slab."""
        # of a sum below 0 there is no logarithm, and of powers none in the units of a chunk
        linear, powers = self.kernel.group.norm.kind == "linear", any(self.kernel.form.powers)
        if powers or (lse.isnan().any() and (linear or grad_lse is not None)):
            _, totals, base = self.forward()
        else:
            totals, base = lse.exp(), None
        safe = totals.masked_fill(totals == 0, torch.inf)[..., None]
        of_log = 0.0 if grad_lse is None else grad_lse.masked_fill(totals == 0, 0.0)[..., None]
        if linear:
            slopes = torch.cat([grad, of_log - (grad * out).sum(-1, keepdim=True)], -1) / safe
        else:
            grown = grad if base is None else grad * base.exp()[..., None]
            slopes = torch.cat([grown, torch.zeros_like(safe) if grad_lse is None else of_log / safe], -1)
        tops: list[Tensor | None] = []
        top: Tensor | None = None
        for slab in self.slabs if self.kernel.form.powers[1] else ():
            tops.append(top)
            found = self.features("k", *self._of_keys(slab), {}).amax((-1, -2))
            top = found if top is None else torch.maximum(top, found)
        return slopes.flatten(0, 1), tops or [None] * len(self.slabs)

    def _pull_logs(
        self, slope_q: Tensor, slope_k: Tensor, read: set[str], leaves: Mapping[str, Tensor]
    ) -> None:
        """Gradients of tables that the decay reads."""
        with torch.enable_grad():
            tables = {name: leaves[name].detach().requires_grad_() for name in read}
            logs = self._logs(tables)
            assert logs is not None
            ends = [*zip(logs, (slope_q, slope_k), strict=False)]
            found = torch.autograd.grad(
                [log for log, _ in ends if log.requires_grad],
                [*tables.values()],
                [slope.to(log.dtype) for log, slope in ends if log.requires_grad],
                allow_unused=True,
            )
        for name, grad in zip(tables, found, strict=True):
            if grad is not None:
                self.tables[name] += grad.to(self.tables[name].dtype)


@dataclass(frozen=True, eq=False)
class Step:
    """A chunk with the features psi of its keys [X, C, m], in units of exp(top).

    inside   factors of the weights in the chunk [X or none, queries, keys]
    enter, leave, onward   factors of the state before at each query [X, queries], of each key in the state
             after [X, keys], of the state itself [X]; None: 1
    scale    what of `onward` is of units alone
    """

    chunk: Chunk
    psi: Tensor
    top: Tensor | None
    scale: Tensor | None
    inside: Tensor | None
    enter: Tensor | None
    leave: Tensor | None
    onward: Tensor | None

    def scaled(self, state: Tensor) -> Tensor:
        return state if self.scale is None else state * self.scale[:, None, None]

    def entering(self, phi: Tensor) -> Tensor:
        return phi if self.enter is None else phi * self.enter[..., None]

    def leaving(self) -> Tensor:
        psi = self.psi.detach()
        return psi if self.leave is None else psi * self.leave[..., None]

    def left(self, x: Tensor) -> Tensor:
        return x if self.leave is None else x * self.leave[..., None]

    def add(self, state: Tensor, psi: Tensor, values: Tensor) -> None:
        if self.onward is not None:
            state *= self.onward[:, None, None]
        state.baddbmm_(psi, values)

    def carried(self, later: Tensor, more: Tensor) -> Tensor:
        """What later queries give back, in terms of the chunk before."""
        if self.onward is not None:
            later = later * self.onward[:, None, None]
        return later + (more if self.scale is None else more * self.scale[:, None, None])


class _Pulled:
    """Features that are made with a record, and what comes back through it."""

    def __init__(self, x: Tensor, tables: Mapping[str, Tensor]) -> None:
        self.x = x.detach().requires_grad_()
        self.tables = {name: table.detach().requires_grad_() for name, table in tables.items()}
        self.recording = torch.enable_grad()

    def __enter__(self) -> _Pulled:
        self.recording.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.recording.__exit__(None, None, None)

    def back(self, made: Tensor, slope: Tensor, into: Tensor, tables: Mapping[str, Tensor]) -> None:
        if not made.requires_grad:
            return
        leaves = [self.x, *self.tables.values()]
        found = torch.autograd.grad(made, leaves, slope, allow_unused=True)
        for place, grad in zip((into, *(tables[name] for name in self.tables)), found, strict=True):
            if grad is not None:
                place += grad


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0.0, x)


def _slabs(form: Form, counts: NDArray[np.int64], n: int) -> list[list[Chunk]]:
    """The chunks of n keys; queries are in the order of how many they see."""
    size = CHUNK if form.causal else SLAB
    found, nq = [], len(counts)
    for index, start in enumerate(range(0, n, size)):
        stop = min(n, start + size)
        first, last = np.searchsorted(counts, (start, stop), side="right").tolist()
        seen = counts[first:last, None] > np.arange(start, stop)
        live = None if seen.all() else torch.from_numpy(seen)
        found.append(Chunk(index, slice(start, stop), slice(first, last), live))
    assert not found or found[-1].queries.stop == nq
    each = max(1, SLAB // size)
    return [found[i : i + each] for i in range(0, len(found), each)]


def _cut(name: str, x: Tensor, rows: Rows) -> Tensor:
    """A variable of a call [B or 1, 1, nq or 1, n or 1] at the entries of a problem."""
    if x.dim() != 4:
        return x
    x = x[rows.batch] if len(x) > 1 else x
    if name == "q" and rows.q is not None:
        return x[:, :, rows.q]
    return x[..., rows.k] if name == "k" and rows.k is not None else x


backend = Linear()
