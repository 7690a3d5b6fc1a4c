"""The kernel: results, gradients, and steps from one state to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from attndsl.attention import HeadGroup
from attndsl.backend import Call, State
from attndsl.execution.spoiled import finite
from attndsl.execution.torch_eval import Env, environment
from attndsl.features import LinearForm

from .slabs import CHUNK, Rows, rows_of
from .walk import Sums, Walk, taken

WIDE = 256
"""From so many features on gradients take parts twice as long."""


@dataclass(frozen=True, eq=False)
class LinearKernel:
    group: HeadGroup
    form: LinearForm

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        env = environment(call)
        for careful in (False, True):
            out, lse = _empty(call)
            for rows in rows_of(self.form, call, env):
                self._attend(self._walk(call, env, rows, CHUNK, careful), rows, out, lse)
            # features that overflow may be those of keys that a row does not see
            if finite([out]):
                break
        return out, lse

    def _walk(self, call: Call, env: Env, rows: Rows, chunk: int, careful: bool) -> Walk:
        return Walk.of(self.group, self.form, call, env, rows, chunk, careful)

    def _attend(self, walk: Walk, rows: Rows, out: Tensor, lse: Tensor) -> None:
        for some, found, totals, unit in walk.forward():
            log = totals.log() if unit is None else (totals.log() + unit).to(totals.dtype)
            if self.group.norm.kind == "linear":
                found = found / totals.masked_fill(totals == 0, torch.inf)[..., None]
            elif unit is not None:
                found = found * unit.exp().to(found.dtype)[..., None]
            _put(out, rows, some, found)
            _put(lse, rows, some, log)

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        if call.q.dtype != torch.float64 and not self.rates.isdisjoint(wanted):
            return self._doubled(call, wanted, (out, lse, grad_out), grad_lse)
        found = self._gradient(call, wanted, out, lse, grad_out, grad_lse, careful=False)
        if self.form.segments and not finite([*found[:3], *found[3].values()]):
            # one segment may have spoiled another
            found = self._gradient(call, wanted, out, lse, grad_out, grad_lse, careful=True)
        return found

    @cached_property
    def rates(self) -> frozenset[str]:
        """Tables that the decay reads whatever the position, such as the g of g ** (q - k)."""
        logs = [e for e in (self.form.log_q, self.form.log_k) if e is not None]
        return frozenset(t.name for e in logs for t in e.tables if not {"n", "nq"} & {*t.dims})

    def _doubled(
        self, call: Call, wanted: Sequence[str], results: tuple[Tensor, ...], grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """In float64: the gradient of a rate is a difference of sums over positions, in which float32 loses a
        digit for every tenfold of n."""
        tables = {name: x.double() if x.is_floating_point() else x for name, x in call.tables.items()}
        wide = replace(call, q=call.q.double(), k=call.k.double(), v=call.v.double(), tables=tables)
        out, lse, grad_out = (x.double() for x in results)
        back = None if grad_lse is None else grad_lse.double()
        *grads, by_name = self.gradient(wide, wanted, out, lse, grad_out, back)
        gq, gk, gv = (grad.to(call.q.dtype) for grad in grads)
        return gq, gk, gv, {name: x.to(call.tables[name].dtype) for name, x in by_name.items()}

    def _gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        careful: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        grads = {
            side: torch.zeros(x.shape, dtype=wide, device=x.device)
            for side, x in zip("qkv", (call.q, call.k, call.v), strict=True)
        }
        tables = {name: torch.zeros_like(call.tables[name], dtype=wide) for name in wanted}
        env = environment(call)
        chunk = 2 * CHUNK if (self.form.width(call.q.shape[3]) or 0) >= WIDE else CHUNK
        for rows in rows_of(self.form, call, env):
            o, log, g = (taken(x, rows.batch, rows.q) for x in (out, lse, grad_out))
            g_log = None if grad_lse is None else taken(grad_lse, rows.batch, rows.q)
            back = _Back(self.group.norm.kind == "linear", o, log, g, g_log)
            if back.unknown:
                walk = self._walk(call, env, rows, chunk, careful)
                back = replace(back, totals=torch.cat([totals for _, _, totals, _ in walk.forward()], 1))
            walk = self._walk(call, env, rows, chunk, careful)
            walk.backward(back.slopes, tables, partial(_add, grads, rows))
        gq, gk, gv = (x.to(call.q.dtype) for x in grads.values())
        return gq, gk, gv, {name: x.to(call.tables[name].dtype) for name, x in tables.items()}


@dataclass(frozen=True, eq=False)
class _Back:
    """What comes back to some batch rows [B, H, nq, ..]; `totals` are sums of weights in their units, where
    the log-sum-exp does not tell them."""

    linear: bool
    out: Tensor
    lse: Tensor
    grad: Tensor
    grad_lse: Tensor | None
    totals: Tensor | None = None

    @property
    def unknown(self) -> bool:
        """Of a sum below 0 there is no logarithm."""
        return (self.linear or self.grad_lse is not None) and bool(self.lse.isnan().any())

    def slopes(self, some: slice, unit: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of weighed sums [X, L, Dv] and of sums of weights [X, L] in this unit."""
        out, grad, lse = (
            x[:, :, some].flatten(0, 1).to(self.lse.dtype) for x in (self.out, self.grad, self.lse)
        )
        totals = (lse if unit is None else lse - unit).exp() if self.totals is None else self.totals[:, some]
        totals = totals.to(lse.dtype)
        whole = totals.masked_fill(totals == 0, torch.inf)
        of_log: Tensor | float = 0.0
        if self.grad_lse is not None:
            of_log = self.grad_lse[:, :, some].flatten(0, 1).masked_fill(totals == 0, 0.0)
        if self.linear:
            return grad / whole[..., None], (of_log - (grad * out).sum(-1)) / whole
        # without a gradient of its own a sum is not looked at: it may be one that has no logarithm
        slope = torch.zeros_like(whole) if self.grad_lse is None else of_log / whole
        return grad if unit is None else grad * unit.exp().to(grad.dtype)[..., None], slope


@dataclass(frozen=True, eq=False)
class StatefulLinear(LinearKernel):
    """Of forms whose sums over the keys so far are all that later queries need."""

    def step(self, call: Call, state: State | None) -> tuple[Tensor, Tensor, State]:
        """The state: sums of values [B, H, m, Dv] and of weights [B, H, m], in units of exp(unit) [B, H]."""
        found = self._step(call, state, careful=False)
        return found if finite([found[0]]) else self._step(call, state, careful=True)

    def _step(self, call: Call, state: State | None, careful: bool) -> tuple[Tensor, Tensor, State]:
        out, lse = _empty(call)
        env, after = environment(call), []
        for rows in rows_of(self.form, call, env, state=True):
            before = None if state is None else [x[rows.batch].flatten(0, 1).clone() for x in state]
            given = (None, None) if before is None else (Sums(*before[:2]), before[2])
            walk = Walk.of(self.group, self.form, call, env, rows, CHUNK, careful, *given)
            self._attend(walk, rows, out, lse)
            assert walk.state is not None
            unit = walk.units[:, rows.counts[-1]] if walk.units is not None else out.new_zeros(walk.rows)
            shape = (-1, call.q.shape[1])
            after.append(
                [x.view(*shape, *x.shape[1:]) for x in (walk.state.values, walk.state.weights, unit)]
            )
        return out, lse, tuple(torch.cat(parts) for parts in zip(*after, strict=True))


def _empty(call: Call) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(call.q.dtype, torch.float32)
    out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[3]), dtype=wide)
    return out, call.q.new_full(call.q.shape[:3], -torch.inf, dtype=wide)


def _put(into: Tensor, rows: Rows, some: slice, found: Tensor) -> None:
    found = found.view(-1, into.shape[1], *found.shape[1:])
    if rows.q is None:
        into[rows.batch, :, some] = found
    else:
        into[rows.batch][:, :, rows.q[some]] = found


def _add(into: Mapping[str, Tensor], rows: Rows, side: str, some: slice, found: Tensor) -> None:
    """Gradients of what heads share are summed."""
    whole, entries = into[side], rows.q if side == "q" else rows.k
    shared = found.shape[1] // whole.shape[1]
    found = found if shared == 1 else found.view(len(found), -1, shared, *found.shape[2:]).sum(2)
    if entries is None:
        whole[rows.batch, :, some] = found
    else:
        whole[rows.batch][:, :, entries[some]] = found
