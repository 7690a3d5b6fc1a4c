"""Walk: one problem slab by slab, with the sums of what came before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attndsl.attention import HeadGroup
from attndsl.backend import Call
from attndsl.errors import fail
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import Env, evaluate
from attndsl.features import LinearForm
from attndsl.scores import by_distance

from .slabs import Rows, Slab, slabs_of

SlopesOf = Callable[[slice, "Tensor | None"], "tuple[Tensor, Tensor]"]
Put = Callable[[str, slice, Tensor], None]


@dataclass(eq=False)
class Sums:
    """Sums over keys, in units of exp(unit): of features times values [X, m, Dv], and of features [X, m]."""

    values: Tensor
    weights: Tensor

    def add(self, onward: Tensor | None, left: Tensor, right: Tensor, more: Tensor) -> None:
        """In place: what was times `onward` [X], and left.T @ right and `more`."""
        if onward is not None:
            self.values *= onward[:, None, None]
            self.weights *= onward[:, None]
        self.values.baddbmm_(left.mT, right)
        self.weights += more


@dataclass(frozen=True, eq=False)
class Part:
    """Keys and the queries whose last key is among them: features of queries [X, L, m] and of keys [X, C, m],
    values [X, C, Dv], and factors, None for 1.

    Factors are in units of the greatest exponent among the keys that a query, or a state, has seen, so that
    none is above 1 and none is of later keys.

    inside   of the weights [X or none, L, C]
    enter    of what each query finds in the state before [X, L]
    leave    of each key in the state after [X, C]
    onward   of the state before in that after [X]
    dead     pairs whose products may be anything [L, C], None where all are finite
    """

    query: Tensor
    key: Tensor
    values: Tensor
    inside: Tensor | None
    enter: Tensor | None
    leave: Tensor | None
    onward: Tensor | None
    dead: Tensor | None = None

    def weighed(self, pairs: Tensor) -> Tensor:
        """Pairs [X, L, C] times their factors, in place."""
        if self.dead is not None:
            pairs.masked_fill_(self.dead, 0.0)
        return pairs if self.inside is None else pairs.mul_(self.inside)

    def weights(self) -> Tensor:
        return self.weighed(torch.bmm(self.query, self.key.mT))

    def products(self, of_sums: Tensor, of_weights: Tensor) -> Tensor:
        """Gradients of the products of features."""
        found = torch.bmm(of_sums, self.values.mT)
        return self.weighed(found.add_(of_weights[..., None]))

    def entering(self, x: Tensor) -> Tensor:
        return x if self.enter is None else x * self.enter[..., None]

    def leaving(self, x: Tensor) -> Tensor:
        return x if self.leave is None else x * self.leave[..., None]

    def absorb(self, state: Sums) -> None:
        leaving = self.leaving(self.key)
        state.add(self.onward, leaving, self.values, leaving.sum(1))


@dataclass(eq=False)
class Walk:
    """One problem; axes [B, H] are one, X.

    at       values of variables at the entries of the problem
    logs     of the decay in float64, of queries [X, nq] and of keys [X, n]
    units    the greatest exponent among the first keys, so many [X, n + 1]; they are found on the way
    even     whether factors inside one part are those inside another, where each query sees a key more than
             the last
    like     those, by the numbers of queries and of keys
    careful  whether products of features may be infinite
    state    after the last slab
    """

    form: LinearForm
    env: Env
    q: Tensor
    k: Tensor
    v: Tensor
    at: dict[str, Tensor]
    slabs: list[Slab]
    logs: tuple[Tensor, Tensor] | None
    units: Tensor | None
    even: bool
    like: dict[tuple[int, int], Tensor]
    state: Sums | None
    careful: bool = False

    @staticmethod
    def of(
        group: HeadGroup,
        form: LinearForm,
        call: Call,
        env: Env,
        rows: Rows,
        chunk: int,
        state: Sums | None = None,
        unit: Tensor | None = None,
    ) -> Walk:
        """Raises AttnError for a decay without a logarithm."""
        q, k, v = (
            taken(x, rows.batch, entries).to(env.dtype)
            for x, entries in ((call.q, rows.q), (call.k, rows.k), (call.v, rows.k))
        )
        at = {name: _cut(name, x, rows) for name, x in env.values.items()}
        slabs = [*slabs_of(rows.counts, chunk, form.width(q.shape[3]) or q.shape[3])]
        walk = Walk(form, env, q, k, v, at, slabs, None, None, False, {}, state)
        walk.logs = walk.logarithms({})
        if walk.logs is None and not form.powers[1]:
            return walk
        dtype = env.dtype if walk.logs is None else torch.float64
        walk.units = q.new_full((walk.rows, k.shape[2] + 1), -torch.inf, dtype=dtype)
        if unit is not None:
            walk.units[:, 0] = unit
        decay, apart = group.decay, rows.q is not None or rows.k is not None or form.powers[1]
        if walk.logs is not None and decay is not None and call.adjacent and not apart:
            walk.even = by_distance(decay) is not None and bool((walk.logs[1].diff() >= 0).all())
        return walk

    @property
    def rows(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    def logarithms(self, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Of the decay; `tables` stand for those of the call."""
        if self.form.log_q is None or self.form.log_k is None:
            return None
        env, (batch, heads) = replace(self._env(tables, {}), dtype=torch.float64), self.q.shape[:2]
        query, key = (evaluate(e, env).to(torch.float64) for e in (self.form.log_q, self.form.log_k))
        found = (
            query.expand(batch, heads, self.q.shape[2], 1).reshape(self.rows, -1),
            key.expand(batch, heads, 1, self.k.shape[2]).reshape(self.rows, -1),
        )
        if not all(log.isfinite().all() for log in found):
            raise fail(
                "the backend `linear` needs the logarithm of the decay, which is not finite here",
                help='give factors above 0, or compile with `backend="torch"`',
            )
        return found

    def _env(self, tables: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Env:
        return replace(self.env, values={**self.at, **values}, tables={**self.env.tables, **tables})

    def forward(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Of some queries [X, L]: weighed sums [X, L, Dv], sums of weights, and the logarithm of the unit of
        both."""
        for slab in self.slabs:
            query, own = self._features("q", slab.queries, self._queries(slab), {})
            key, top = self._features("k", slab.keys, self._keys(slab), {})
            parts, unit = self._parts(slab, query, own, key, top)
            state = self._state(key)
            for i, part in enumerate(parts):
                size = part.query.shape[1]
                if size:
                    entering = part.entering(part.query)
                    totals = (entering * state.weights[:, None]).sum(-1)
                    found = torch.bmm(entering, state.values)
                    if part.key.shape[1]:
                        weights = part.weights()
                        totals += weights.sum(-1)
                        found.baddbmm_(weights, part.values)
                    here = slice(i * size, i * size + size)
                    some = slice(slab.queries.start + here.start, slab.queries.start + here.stop)
                    yield some, found, totals, None if unit is None else unit[:, here]
                part.absorb(state)

    def _state(self, key: Tensor) -> Sums:
        if self.state is None:
            sums = key.new_zeros(self.rows, key.shape[2], self.v.shape[3])
            self.state = Sums(sums, sums.new_zeros(sums.shape[:2]))
        return self.state

    def _queries(self, slab: Slab) -> Tensor:
        return self.q[:, :, slab.queries]

    def _keys(self, slab: Slab) -> Tensor:
        return _shared(self.k[:, :, slab.keys], self.q)

    def _features(
        self, side: str, some: slice, x: Tensor, tables: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """[X, L, m] of some queries or keys x [B, H, L, D], and the logarithm of what each row of them is
        divided by."""
        axis, phi = (-2, self.form.query) if side == "q" else (-1, self.form.key)
        place = self.at[side]
        place = place.narrow(axis, some.start, some.stop - some.start) if place.shape[axis] > 1 else place
        found = evaluate(phi, self._env(tables, {side.upper(): x, side: place}))
        found = found.squeeze(-2 if side == "q" else -3)
        found = found.expand(*x.shape[:3], found.shape[-1]).flatten(0, 1)
        if not self.form.powers[side == "k"]:
            return found, None
        top = found.detach().amax(-1)
        return (found - _finite(top)[..., None]).exp_(), top

    def _pulled(
        self, side: str, some: slice, x: Tensor, leaves: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor | None], Callable[[Tensor, dict[str, Tensor]], Tensor]]:
        """Features, and what gives the gradient of x and adds those of tables."""

        def features(x: Tensor, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found, own = self._features(side, some, x, tables)
            return {"features": found} if own is None else {"features": found, "own": own}

        found, pull = vjp(features, x, leaves)

        def back(slope: Tensor, tables: dict[str, Tensor]) -> Tensor:
            zeros = {name: torch.zeros_like(x) for name, x in found.items() if name == "own"}
            grad: Tensor
            grad, others = pull({"features": slope, **zeros})
            for name, other in others.items():
                tables[name] += other
            return grad

        return (found["features"], found.get("own")), back

    def _parts(
        self, slab: Slab, query: Tensor, own: Tensor | None, key: Tensor, top: Tensor | None
    ) -> tuple[list[Part], Tensor | None]:
        """And the logarithm of the unit of each query [X, queries]."""
        values = _shared(self.v[:, :, slab.keys], self.q).flatten(0, 1)
        sides = [*zip(*(x.tensor_split(slab.parts, 1) for x in (query, key, values)), strict=True)]
        dead = ~slab.live if self.careful and slab.live is not None else None
        log = top
        if self.logs is not None:
            log = self.logs[1][:, slab.keys] + (0 if top is None else top)
        if self.units is None or log is None:
            inside = None if slab.live is None else slab.live.to(self.env.dtype)
            return [Part(q, k, v, inside, None, None, None, dead) for q, k, v in sides], own
        dtype, start, stop = self.env.dtype, slab.keys.start, slab.keys.stop
        before, after = self.units[:, start, None], self.units[:, start + 1 : stop + 1]
        if stop > start:
            after.copy_(torch.maximum(log.cummax(1)[0], before))
        ends = torch.stack(
            [x[:, -1] if stop > start else before[:, 0] for x in after.tensor_split(slab.parts, 1)], 1
        )
        starts, unit = torch.cat([before, ends[:, :-1]], 1), _finite(self.units[:, slab.counts])
        ends = _finite(ends)
        onward = (starts - ends).to(dtype).exp()
        found = []
        for i, ((q, k, v), log_i, unit_i) in enumerate(
            zip(sides, log.tensor_split(slab.parts, 1), unit.tensor_split(slab.parts, 1), strict=True)
        ):
            enter = (starts[:, i, None] - unit_i).to(dtype).exp()
            leave = (log_i - ends[:, i, None]).to(dtype).exp()
            found.append(Part(q, k, v, self._inside(slab, log_i, unit_i), enter, leave, onward[:, i], dead))
        if self.logs is not None:
            unit = unit + self.logs[0][:, slab.queries]
        unit = unit.to(dtype)
        return found, unit if own is None else unit + own

    def _inside(self, slab: Slab, log: Tensor, unit: Tensor) -> Tensor:
        even, sizes = self.even and isinstance(slab.counts, slice), (unit.shape[1], log.shape[1])
        if even and sizes in self.like:
            return self.like[sizes]
        between = log[:, None] - unit[..., None]
        if slab.live is not None:
            # cheaper than to choose entry by entry
            between += torch.where(slab.live, 0.0, -torch.inf)
        found = between.to(self.env.dtype).exp_()
        if even:
            self.like[sizes] = found
        return found

    def backward(self, slopes_of: SlopesOf, tables: dict[str, Tensor], put: Put) -> None:
        """Gives gradients of q, k [B, H, .., D] and v to `put`, slab by slab, and adds those of tables.

        `slopes_of` gives the gradients of weighed sums and of sums of weights, in the unit that it is told.
        """
        leaves = {name: self.env.tables[name].detach().to(self.env.dtype) for name in tables}
        logs = (self.form.log_q, self.form.log_k)
        decaying = {t.name for e in logs if e is not None for t in e.tables} & leaves.keys()
        slope_q, slope_k = (x.new_zeros(self.rows, x.shape[2]) for x in (self.q, self.k))
        kept = []
        for slab in self.slabs:
            some = slab.queries
            (query, own), pull = self._pulled("q", some, self._queries(slab), leaves)
            key, top = self._features("k", slab.keys, self._keys(slab), {})
            parts, unit = self._parts(slab, query, own, key, top)
            kept.append((query, own))
            state, slope = self._state(key), torch.empty_like(query)
            sides = zip(
                *(x.tensor_split(slab.parts, 1) for x in (*slopes_of(some, unit), slope)), strict=True
            )
            for part, (of_sums, of_weights, into) in zip(parts, sides, strict=True):
                if into.shape[1]:
                    found = torch.bmm(of_sums, state.values.mT)
                    found = part.entering(found.add_(of_weights[..., None] * state.weights[:, None]))
                    if part.key.shape[1]:
                        found = found.baddbmm_(part.products(of_sums, of_weights), part.key)
                    into.copy_(found)
                part.absorb(state)
            if some.stop > some.start:
                if decaying:
                    slope_q[:, some] = (query * slope).sum(-1)
                put("q", some, pull(slope, tables))
        later: Sums | None = None
        for slab in reversed(self.slabs):
            some = slab.keys
            (key, top), pull = self._pulled("k", some, self._keys(slab), leaves)
            query, own = kept.pop()
            parts, unit = self._parts(slab, query, own, key, top)
            slope, slope_v = torch.empty_like(key), self.v.new_empty(self.rows, key.shape[1], self.v.shape[3])
            if later is None:
                later = Sums(
                    torch.zeros_like(self._state(key).values), torch.zeros_like(self._state(key).weights)
                )
            more = (*slopes_of(slab.queries, unit), slope, slope_v)
            ends = [*zip(*(x.tensor_split(slab.parts, 1) for x in more), strict=True)]
            for part, (of_sums, of_weights, into, into_v) in zip(
                reversed(parts), reversed(ends), strict=True
            ):
                if into.shape[1]:
                    found_v = torch.bmm(part.leaving(part.key), later.values)
                    found = torch.bmm(part.values, later.values.mT).add_(later.weights[:, None])
                    found = part.leaving(found)
                    if of_sums.shape[1]:
                        found_v.baddbmm_(part.weights().mT, of_sums)
                        found = found.baddbmm_(part.products(of_sums, of_weights).mT, part.query)
                    into.copy_(found)
                    into_v.copy_(found_v)
                entering = part.entering(part.query)
                later.add(part.onward, entering, of_sums, (entering * of_weights[..., None]).sum(1))
            if some.stop > some.start:
                if decaying:
                    slope_k[:, some] = (key * slope).sum(-1)
                put("v", some, slope_v.view(*self.q.shape[:2], *slope_v.shape[1:]))
                put("k", some, pull(slope, tables))
        if decaying:
            self._pull_logs((slope_q, slope_k), decaying, leaves, tables)

    def _pull_logs(
        self,
        slopes: tuple[Tensor, Tensor],
        read: set[str],
        leaves: Mapping[str, Tensor],
        tables: dict[str, Tensor],
    ) -> None:
        """Gradients of tables that the decay reads."""
        logs, pull = vjp(self.logarithms, {name: leaves[name] for name in read})
        (found,) = pull(tuple(slope.to(log.dtype) for log, slope in zip(logs, slopes, strict=True)))
        for name, grad in found.items():
            tables[name] += grad.to(tables[name].dtype)


def taken(x: Tensor, batch: slice, entries: Tensor | None) -> Tensor:
    return x[batch] if entries is None else x[batch][:, :, entries]


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """Of key heads [B, Hkv, ...], for each query head."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x == -torch.inf, 0.0, x)


def _cut(name: str, x: Tensor, rows: Rows) -> Tensor:
    """A variable of a call [B or 1, 1, nq or 1, n or 1] at the entries of a problem."""
    if x.dim() != 4:
        return x
    x = x[rows.batch] if len(x) > 1 else x
    if name == "q" and rows.q is not None:
        return x[:, :, rows.q]
    return x[..., rows.k] if name == "k" and rows.k is not None else x
