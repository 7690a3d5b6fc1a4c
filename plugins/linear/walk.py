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
from attndsl.execution.torch_eval import Env, evaluate, negative_decay
from attndsl.expr import ONE, Expr
from attndsl.features import LinearForm
from attndsl.scores import by_distance

from .slabs import Piece, Rows, Slab, slabs_of

STEEP = 16.0
"""An exponent beyond this is rounded in float32 to no less than a millionth: it is told in float64."""

SlopesOf = Callable[[slice, "Tensor | None"], "tuple[Tensor, Tensor]"]
Put = Callable[[str, slice, Tensor], None]


@dataclass(eq=False)
class Sums:
    """Sums over keys, in units of exp(unit): of features times values [X, m, Dv], and of features [X, m]."""

    values: Tensor
    weights: Tensor

    def carry(self, onward: Tensor | None, fresh: bool) -> None:
        """In place: times `onward` [X], or nothing."""
        if fresh:
            self.values.zero_()
            self.weights.zero_()
        elif onward is not None:
            self.values *= onward[:, None, None]
            self.weights *= onward[:, None]


@dataclass(frozen=True, eq=False)
class Part:
    """A piece: features of queries [X, L, m] and keys [X, C, m], values [X, C, Dv], and factors, None for 1.

    Factors are in units of the greatest exponent among the keys that a query, or a state, has seen, so that
    none is above 1 and none is of later keys.

    inside   of the weights [X or none, L, C]
    enter    of what each query that looks there finds in the state before [X, entering]
    leave    of each key in the state after [X, leaving]
    onward   of the state before in that after [X]
    dead     pairs whose products may be anything [L, C], None where all are finite
    """

    piece: Piece
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

    def _first(self, x: Tensor) -> Tensor:
        """Of the queries that look at the state before; a view of nothing less takes time too."""
        few = self.piece.entering
        return x if few == x.shape[1] else x[:, :few]

    def _last(self, x: Tensor) -> Tensor:
        """Of the keys that are in the state after."""
        return x[:, self.piece.leaving :] if self.piece.leaving else x

    def entering(self, x: Tensor) -> Tensor:
        """Of the queries that look at the state before."""
        x = self._first(x)
        return x if self.enter is None else x * _wide(self.enter, x)

    def leaving(self, x: Tensor) -> Tensor:
        """Of the keys that are in the state after."""
        x = self._last(x)
        return x if self.leave is None else x * _wide(self.leave, x)

    def sums(self, state: Sums) -> tuple[Tensor, Tensor]:
        """Weighed sums [X, L, Dv] and sums of weights [X, L]."""
        weights = self.weights()
        found, totals = torch.bmm(weights, self.values), weights.sum(-1)
        query, some, few = (self._first(x) for x in (self.query, found, totals))
        before = (query * state.weights[:, None]).sum(-1)
        if self.enter is None:
            some.baddbmm_(query, state.values)
            few.add_(before)
        else:
            some.addcmul_(torch.bmm(query, state.values), self.enter[..., None])
            few.addcmul_(before, self.enter)
        return found, totals

    def pull_queries(self, state: Sums, of_sums: Tensor, of_weights: Tensor) -> Tensor:
        """Gradients of the features of queries."""
        found = torch.bmm(self.products(of_sums, of_weights), self.key)
        some, slope = self._first(found), self.entering(of_weights)
        some.baddbmm_(self.entering(of_sums), state.values.mT)
        some.addcmul_(slope[..., None], state.weights[:, None])
        return found

    def pull_keys(self, later: Sums, of_sums: Tensor, of_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the features of keys and of values."""
        found = torch.bmm(self.products(of_sums, of_weights).mT, self.query)
        found_v = torch.bmm(self.weights().mT, of_sums)
        key, some, some_v = (self._last(x) for x in (self.key, found, found_v))
        some.baddbmm_(self.leaving(self.values), later.values.mT)
        if self.leave is None:
            some.add_(later.weights[:, None])
            some_v.baddbmm_(key, later.values)
        else:
            some.addcmul_(self.leave[..., None], later.weights[:, None])
            some_v.addcmul_(torch.bmm(key, later.values), self.leave[..., None])
        return found, found_v

    def absorb(self, state: Sums) -> None:
        key = self._last(self.key)
        state.carry(self.onward, self.piece.fresh)
        state.values.baddbmm_(key.mT, self.leaving(self.values))
        state.weights += key.sum(1) if self.leave is None else torch.bmm(self.leave[:, None], key)[:, 0]

    def absorb_slopes(self, later: Sums, of_sums: Tensor, of_weights: Tensor) -> None:
        """As `absorb`, from the last part to the first, what comes back to the queries."""
        query = self._first(self.query)
        later.carry(self.onward, self.piece.fresh)
        later.values.baddbmm_(query.mT, self.entering(of_sums))
        later.weights += torch.bmm(self.entering(of_weights)[:, None], query)[:, 0]


def _wide(factor: Tensor, x: Tensor) -> Tensor:
    return factor if x.dim() == 2 else factor[..., None]


@dataclass(eq=False)
class Walk:
    """One problem; axes [B, H] are one, X.

    at       values of variables at the entries of the problem
    starts   of each key how many stand before its segment, None for one segment
    logs     of the decay in float64, of queries [X, nq] and of keys [X, n]
    units    the greatest exponent in the segment of the last of the first keys, so many, float64 [X, n + 1];
             they are found on the way
    even     whether factors inside one part are those inside another, where each query sees a key more than
             the last
    like     those, by the number of keys
    state    after the last slab
    careful  whether products of features may be infinite
    """

    form: LinearForm
    env: Env
    q: Tensor
    k: Tensor
    v: Tensor
    at: dict[str, Tensor]
    slabs: list[Slab]
    starts: Tensor | None
    logs: tuple[Tensor, Tensor] | None
    units: Tensor | None
    even: bool
    like: dict[int, Tensor | None]
    state: Sums | None
    careful: bool

    @staticmethod
    def of(
        group: HeadGroup,
        form: LinearForm,
        call: Call,
        env: Env,
        rows: Rows,
        chunk: int,
        careful: bool,
        state: Sums | None = None,
        unit: Tensor | None = None,
    ) -> Walk:
        """Raises AttnError for a decay without a logarithm, and for a negative one."""
        q, k, v = (
            taken(x, rows.batch, entries).to(env.dtype)
            for x, entries in ((call.q, rows.q), (call.k, rows.k), (call.v, rows.k))
        )
        at = {name: _cut(name, x, rows) for name, x in env.values.items()}
        slabs = [*slabs_of(rows, chunk, form.width(q.shape[3]) or q.shape[3])]
        starts = None if rows.starts is None else torch.from_numpy(rows.starts)
        walk = Walk(form, env, q, k, v, at, slabs, starts, None, None, False, {}, state, careful)
        walk.check_signs(rows, state is not None)
        walk.logs = walk.logarithms({})
        if walk.logs is None and not form.powers[1]:
            walk.even = True
            return walk
        walk.units = q.new_full((walk.rows, k.shape[2] + 1), -torch.inf, dtype=torch.float64)
        if unit is not None:
            walk.units[:, 0] = unit
        decay, apart = group.decay, rows.q is not None or rows.k is not None or form.powers[1]
        if walk.logs is not None and decay is not None and call.adjacent and not apart:
            walk.even = by_distance(decay) is not None and bool((walk.logs[1].diff() >= 0).all())
        return walk

    @property
    def rows(self) -> int:
        return self.q.shape[0] * self.q.shape[1]

    def check_signs(self, rows: Rows, begun: bool) -> None:
        """Raises AttnError where a decay is negative; of the keys of a state none is taken for negative."""
        if self.form.signs == (ONE, ONE):
            return
        query, key = (
            self._numbers(e, side, slice(0, x.shape[2]), x, {}, self.env.dtype).sign()
            for e, side, x in zip(self.form.signs, "qk", (self.q, _shared(self.k, self.q)), strict=True)
        )
        last = torch.from_numpy(rows.counts)
        first = torch.zeros_like(last) if self.starts is None else self.starts[last - 1]
        found = []
        for sign in (1, -1):
            seen = torch.nn.functional.pad((key == -sign).cumsum(1), (1, 0))
            found.append((query == sign) & (seen[:, last] > seen[:, first]))
        if begun:
            found.append(query < 0)
        if any(x.any() for x in found):
            raise negative_decay()

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
            query, own = self._features("q", slab.queries, self._queries(slab), {}, exact=True)
            key, top = self._features("k", slab.keys, self._keys(slab), {}, exact=True)
            parts, unit = self._parts(slab, query, own, key, top)
            state = self._state(key)
            for part in parts:
                here = part.piece.queries
                if here.stop > here.start:
                    some = slice(slab.queries.start + here.start, slab.queries.start + here.stop)
                    yield some, *part.sums(state), None if unit is None else unit[:, here]
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
        self, side: str, some: slice, x: Tensor, tables: Mapping[str, Tensor], exact: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """[X, L, m] of some queries or keys x [B, H, L, D], and the logarithm of what each row of them is
        divided by, float64."""
        of, form = "qk".index(side), self.form
        phi, power, apart = form.features[of], form.powers[of], form.apart[of]
        found, wide = self._numbers(phi, side, some, x, tables, self.env.dtype), torch.float64
        if not power:
            return found, None
        top = found.detach().amax(-1)
        beside = self._numbers(apart, side, some, x, tables, self.env.dtype)
        found, own = found - _finite(top)[..., None], top.to(wide) + beside
        if exact and found.dtype != wide:
            steep = torch.maximum(top, beside.abs()) > STEEP
            if steep.any():
                precise, beside = (self._numbers(e, side, some, x, tables, wide) for e in (phi, apart))
                top = precise.amax(-1)
                own = torch.where(steep, top + beside, own)
                found = torch.where(steep[..., None], (precise - _finite(top)[..., None]).to(found), found)
        return found.exp_(), own

    def _numbers(
        self, e: Expr, side: str, some: slice, x: Tensor, tables: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """A vector [X, L, m] or a number [X, L] of some queries or keys x [B, H, L, D]."""
        axis, place = -1 if side == "k" else -2, self.at[side]
        place = place.narrow(axis, some.start, some.stop - some.start) if place.shape[axis] > 1 else place
        env = self._env(tables, {side.upper(): x.to(dtype), side: place})
        found = evaluate(e, replace(env, dtype=dtype)).to(dtype)
        if e.type != "vec":
            found = found.unsqueeze(-1)
        found = found[(None,) * (5 - found.dim())].squeeze(-3 if side == "k" else -2)
        found = found.expand(*x.shape[:3], found.shape[-1]).flatten(0, 1)
        return found if e.type == "vec" else found.squeeze(-1)

    def _pulled(
        self, side: str, some: slice, x: Tensor, leaves: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, Tensor | None], Callable[[Tensor, dict[str, Tensor]], Tensor]]:
        """Features, and what gives the gradient of x and adds those of tables."""

        def features(x: Tensor, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found, own = self._features(side, some, x, tables)
            return {"features": found} if own is None else {"features": found, "own": own}

        found, pull = vjp(features, x, leaves)

        def back(slope: Tensor, tables: dict[str, Tensor]) -> Tensor:
            slopes = {"features": slope}
            if "own" in found:
                slopes["own"] = (found["features"] * slope).sum(-1).to(found["own"].dtype)
            grad: Tensor
            grad, others = pull(slopes)
            for name, other in others.items():
                tables[name] += other
            return grad

        return (found["features"], found.get("own")), back

    def _parts(
        self, slab: Slab, query: Tensor, own: Tensor | None, key: Tensor, top: Tensor | None
    ) -> tuple[list[Part], Tensor | None]:
        """And the logarithm of the unit of each query, float64 [X, queries]."""
        values, careful = _shared(self.v[:, :, slab.keys], self.q).flatten(0, 1), self.careful
        log = top
        if self.logs is not None:
            log = self.logs[1][:, slab.keys] + (0 if top is None else top)
        found, dtype, first = [], self.env.dtype, slab.keys.start
        if self.units is not None and log is not None:
            before = self.units[:, first, None]
            self.units[:, first + 1 : slab.keys.stop + 1] = self._running(slab.keys, log, before)
            unit = _finite(self.units[:, slab.counts])
            edges = self.units[:, slab.edges]
            starts, ends = edges[:, :-1], _finite(edges[:, 1:])
            mine, other = slab.places
            enter = (starts[:, mine] - unit).to(dtype).exp()
            leave = (log - ends[:, other]).to(dtype).exp()
            onward = (starts - ends).to(dtype).exp()
        for i, piece in enumerate(slab.pieces):
            q, (k, v) = query[:, piece.queries], (x[:, piece.keys] for x in (key, values))
            live = piece.live
            dead = ~live if careful and live is not None else None
            if self.units is None or log is None:
                inside = self._inside(piece, None, None)
                found.append(Part(piece, q, k, v, inside, None, None, None, dead))
                continue
            inside = self._inside(piece, log[:, piece.keys], unit[:, piece.queries])
            few = slice(piece.queries.start, piece.queries.start + piece.entering)
            last = slice(piece.keys.start + piece.leaving, piece.keys.stop)
            factors = enter[:, few], leave[:, last], onward[:, i]
            found.append(Part(piece, q, k, v, inside, *factors, dead))
        if self.units is None or log is None:
            return found, own
        if self.logs is not None:
            unit = unit + self.logs[0][:, slab.queries]
        return found, unit if own is None else unit + own

    def _running(self, some: slice, log: Tensor, before: Tensor) -> Tensor:
        """The greatest so far in its segment, at each of some keys; `before` is that of the key before."""
        if self.starts is None:
            return torch.maximum(log.cummax(1)[0], before) if log.shape[1] else log
        place = torch.arange(some.start, some.stop)
        behind, step = place - self.starts[some], 1
        while step <= behind.clamp_max(place - some.start).max():
            reaching = behind[step:] >= step
            log = torch.cat(
                [
                    log[:, :step],
                    torch.where(reaching, torch.maximum(log[:, step:], log[:, :-step]), log[:, step:]),
                ],
                1,
            )
            step *= 2
        return torch.where(behind > place - some.start, torch.maximum(log, before), log)

    def _inside(self, piece: Piece, log: Tensor | None, unit: Tensor | None) -> Tensor | None:
        if not (self.even and piece.square):
            return self._factors(log, unit, piece.live)
        size = piece.keys.stop - piece.keys.start
        if size not in self.like:
            live = torch.ones(size, size, dtype=torch.bool).tril()
            self.like[size] = self._factors(log, unit, live)
        found = self.like[size]
        return found if found is None or piece.live is None or piece.entering == size else found * piece.live

    def _factors(self, log: Tensor | None, unit: Tensor | None, live: Tensor | None) -> Tensor | None:
        """Of keys [X, C] in the unit of queries [X, L], 0 where not `live`."""
        if log is None or unit is None:
            return None if live is None else live.to(self.env.dtype)
        found = log[:, None] - unit[..., None]
        if live is not None:
            # cheaper than to choose entry by entry
            found += torch.where(live, 0.0, -torch.inf)
        return found.to(self.env.dtype).exp_()

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
            of_sums, of_weights = self._slopes(slopes_of(some, unit))
            for part in parts:
                here = part.piece.queries
                slope[:, here] = part.pull_queries(state, of_sums[:, here], of_weights[:, here])
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
                state = self._state(key)
                later = Sums(torch.zeros_like(state.values), torch.zeros_like(state.weights))
            of_sums, of_weights = self._slopes(slopes_of(slab.queries, unit))
            for part in reversed(parts):
                back = of_sums[:, part.piece.queries], of_weights[:, part.piece.queries]
                here = part.piece.keys
                slope[:, here], slope_v[:, here] = part.pull_keys(later, *back)
                part.absorb_slopes(later, *back)
            if some.stop > some.start:
                if decaying:
                    slope_k[:, some] = (key * slope).sum(-1)
                put("v", some, slope_v.view(*self.q.shape[:2], *slope_v.shape[1:]))
                put("k", some, pull(slope, tables))
        if decaying:
            self._pull_logs((slope_q, slope_k), decaying, leaves, tables)

    def _slopes(self, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Where `careful`, infinite ones would make NaN of weights of 0."""
        if not self.careful:
            return found
        most = torch.finfo(self.env.dtype).max
        return found[0].clamp(-most, most), found[1].clamp(-most, most)

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
