"""Expressions evaluated with torch, and the arithmetic that backends share.

The axes of a pair tensor are the caller's choice: positions, heads and vectors only have to broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.axis import Axis
from attndsl.backend import Call, Features
from attndsl.errors import AttnError, fail
from attndsl.expr import Expr, IntSet, Table
from attndsl.meaning import pointwise
from attndsl.scores import by_head, by_pair, linear_in_tables
from attndsl.selection import Offered

SAME = frozenset({"n", "nq", "b", "H", "D"})
"""Variables that no mask tells apart."""
WIDTH = 64
"""Numbers of a vector whose width is not in the text, in estimates."""


@dataclass(frozen=True, eq=False)
class Env:
    """What the names of an expression stand for.

    values  variables: int64 tensors of positions, batch rows, heads and sizes that broadcast to the pairs;
            `s` as well, a real. Vectors: `Q` [..., nq, D] and `K` [..., n, D] with the leading axes of the
            pairs, and what blocks of them are summed up to, as `mean(K)`, likewise.
    tables  by name, with the axes of the Table
    dtype   of real results
    device  of all tensors
    """

    values: Mapping[str, Tensor]
    tables: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device


HERE = {"cpu"}


def at_hand(x: Tensor) -> bool:
    """Whether its numbers may be looked at: elsewhere that is to wait for all that a device was asked for."""
    return x.device.type in HERE


def environment(call: Call | Offered) -> Env:
    """Every pair of a call, but without s, Q and K: axes [B, H, nq, n], reals in at least float32."""
    asked = call.q_at, call.k_at, call.n, tuple(call.q.shape), call.q.device
    values = (_variables if at_hand(call.q) else _kept_variables)(*asked)
    return Env(values, call.tables, torch.promote_types(call.q.dtype, torch.float32), call.q.device)


def _variables(
    q_at: Axis, k_at: Axis, n: tuple[int, ...], shape: tuple[int, ...], device: torch.device
) -> Mapping[str, Tensor]:
    batch, heads, nq, width = shape
    q, k = (np.stack([axis.positions(b) for b in range(len(axis.rows))]) for axis in (q_at, k_at))
    # what is kept serves calls of which some are differentiated
    with torch.inference_mode(False):
        values = {
            "q": torch.from_numpy(q)[:, None, :, None],
            "k": torch.from_numpy(k)[:, None, None, :],
            "n": torch.tensor(n).view(-1, 1, 1, 1),
            "b": torch.arange(batch).view(-1, 1, 1, 1),
            "h": torch.arange(heads).view(1, -1, 1, 1),
            "H": torch.tensor(heads),
            "D": torch.tensor(width),
            "nq": torch.tensor(nq),
        }
        return {name: x.to(device) for name, x in values.items()}


_kept_variables = lru_cache(maxsize=16)(_variables)
"""To send them to a device is to wait for it."""


def listed(table: Table, device: torch.device) -> Tensor:
    """The entries of a list of the text."""
    assert table.known is not None
    return torch.from_numpy(table.known) if device.type == "cpu" else _sent(table, device)


@lru_cache(maxsize=64)
def _sent(table: Table, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(table.known).to(device)


@lru_cache(maxsize=64)
def _intervals(members: IntSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ends of each."""
    with torch.inference_mode(False):
        lo, hi = torch.tensor(members.intervals).to(device).unbind(1)
        return lo.contiguous(), hi


def of_heads(call: Call, batch: int, heads: Sequence[int], axes: int) -> Env:
    """Of some heads of one batch row, without q, k, s, Q and K: `axes` axes, the first of heads."""
    device, one = call.q.device, (1,) * (axes - 1)
    numbers = {
        "n": call.n[batch % len(call.n)],
        "nq": call.q.shape[2],
        "H": call.q.shape[1],
        "D": call.q.shape[3],
        "b": batch,
    }
    values = {name: torch.tensor(value, device=device).view(1, *one) for name, value in numbers.items()}
    values["h"] = torch.tensor(heads, device=device).view(-1, *one)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    return Env(values, call.tables, wide, device)


def positions(axis: Axis, batch: int, entries: Tensor) -> Tensor:
    """Of some entries of one batch row."""
    if len(axis.row(batch)) == 1:
        return entries + axis.row(batch)[0][1]
    return torch.from_numpy(axis.positions(batch)).to(entries.device)[entries]


def evaluate(expr: Expr, env: Env, live: Tensor | None = None) -> Tensor:
    """The value at every pair, int64, bool or `env.dtype`, broadcasting to the pairs.

    Where `live` (a truth per pair) does not hold the value is arbitrary, but neither it nor its
    gradient poisons anything: functions see a harmless argument there, look-ups are clamped. Elsewhere a
    look-up outside an int or float table is an error. Of `log(q - k) + z[q - k]` under `k < q`,

        q = 0, k = 0   gives log(1) + z[0]: its gradient times 0 is 0, and that of log(0) times 0 NaN
        q = 1, k = 0   gives log(1) + z[1], an error if z has one entry
    """
    return _Evaluation(env).of(expr, live)


@dataclass(frozen=True, eq=False)
class Linear:
    """An expression that `linear_in_tables` finds, for calls with tables of one shape each: all but what the
    tables hold is computed.

    rest   what reads none, None for 0
    terms  name of a table, entries of the flat table, and factors, None for 1
    """

    rest: Tensor | None
    terms: tuple[tuple[str, Tensor, Tensor | None], ...]

    @staticmethod
    def of(e: Expr, env: Env, live: Tensor) -> Linear:
        """Raises AttnError as `evaluate` does."""
        found = linear_in_tables(e)
        assert found is not None
        evaluation, terms = _Evaluation(env), []
        for factor, read in found[1]:
            table = read.value
            assert isinstance(table, Table)
            values = evaluation.content(table)
            index, _ = evaluation.index(table, values, read.args, live)
            entries = torch.zeros((), dtype=torch.int64, device=env.device)
            for i, size in zip(index, values.shape, strict=True):
                entries = entries * size + i
            scale = None
            if ir.number(factor) != 1:
                scale = torch.where(live, evaluation.real(factor, live), 0.0)
            terms.append((table.name, entries, scale))
        rest = None if ir.number(found[0]) == 0 else evaluation.real(found[0], live)
        return Linear(rest, tuple(terms))

    def values(self, tables: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        total = self.rest
        for name, entries, scale in self.terms:
            read = tables[name].to(dtype).take(entries)
            if total is None:
                total = read if scale is None else read * scale
            else:
                total = total + read if scale is None else torch.addcmul(total, read, scale)
        assert total is not None
        return total

    def add_gradients(self, slopes: Tensor, grads: Mapping[str, Tensor]) -> None:
        """Adds what the slopes of the values give to those of the named tables, which are contiguous."""
        for name, entries, scale in self.terms:
            if name in grads:
                moved = (slopes if scale is None else slopes * scale).sum_to_size(entries.shape)
                flat = grads[name].view(-1)
                flat.index_add_(0, entries.flatten(), moved.flatten().to(flat.dtype))


broadcast_tensors: Callable[..., tuple[Tensor, ...]] = torch.broadcast_tensors
broadcast_shapes: Callable[..., torch.Size] = torch.broadcast_shapes


def decay_factor(decay: Expr, env: Env, live: Tensor) -> Tensor:
    """The factor of each pair's weight, 0 where it is not live.

    Raises AttnError for a negative one: a weight below 0 has no logarithm.
    """
    found = torch.where(live, evaluate(decay, env, live).to(env.dtype), 0.0)
    if (found < 0).any():
        raise negative_decay()
    return found


def negative_decay() -> AttnError:
    return fail("a decay is negative at a related pair", help="bound it from below: `max(..., 0.0)`")


def singles(tables: Mapping[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
    """The wanted tables as their gradients are summed: over many pairs, so in float32 or wider."""
    return {name: tables[name].to(torch.promote_types(tables[name].dtype, torch.float32)) for name in wanted}


def peak(logit: Tensor, factor: Tensor | None = None) -> Tensor:
    """The greatest logarithm of a weight in each row [.., 1]; -inf for a row without one."""
    if not logit.shape[-1]:
        return logit.new_full((*logit.shape[:-1], 1), -torch.inf)
    if factor is not None:
        logit = torch.where(factor == 0, -torch.inf, logit + _size(factor))
    return logit.detach().amax(-1, keepdim=True)


def weigh(logit: Tensor, base: Tensor, factor: Tensor | None) -> Tensor:
    """factor * exp(logit - base), for a base that the logarithm of no weight exceeds by much."""
    if factor is None:
        return torch.exp(logit - base)
    # the size of a factor goes into the exponent: of a tiny one and a huge exponential one would overflow
    size = _size(factor)
    # and 0 times infinity would be NaN
    return factor * torch.exp(-size) * torch.exp((logit - base + size).clamp_max(64.0))


def _size(factor: Tensor) -> Tensor:
    """Its logarithm, within what has an inverse; 0 for a factor of 0."""
    return torch.where(factor == 0, 1.0, factor).detach().log().clamp(-80.0, 80.0)


def softmax(logit: Tensor, factor: Tensor | None = None, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights of rows, which sum to 1 together with the sink's, and the log-sum-exp [.., 1]; 0 and -inf for a
    row of which nothing is left. Exact for logits of any size: equal ones have a difference of 0."""
    top = peak(logit, factor)
    empty = top == -torch.inf
    top = torch.where(empty, 0.0, top)
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    weight = weigh(logit, top, factor)
    if factor is not None:
        # of keys that all have the factor 0 nothing goes back
        weight = torch.where(empty, 0.0, weight)
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    total = torch.where(empty, 1.0, total)
    return weight / total, torch.where(empty, -torch.inf, torch.log(total) + top)


def gain(kind: str, logit: Tensor) -> Tensor:
    """What a norm other than softmax makes of a logit; 0 of -inf."""
    if kind == "sigmoid":
        return torch.sigmoid(logit)
    return torch.relu(logit) if kind == "relu" else logit.masked_fill(logit == -torch.inf, 0.0)


def gained(kind: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """From what `gain` and the decay make of whole rows: the final weights, under `linear` none of a row with
    the sum 0, and the logarithm of the sum [.., 1]."""
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    if kind == "linear":
        weight = torch.where(empty, 0.0, weight) / total
    return weight, torch.where(empty, -torch.inf, torch.log(total))


STRAIN = 2.0**10
"""A log-sum-exp beyond this says less and less of how many keys it is of: nothing where -1e9 is a mask."""


def widened(call: Call) -> Call:
    """The call with vectors of at least float32."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    if call.q.dtype == wide:
        return call
    return replace(call, q=call.q.to(wide), k=call.k.to(wide), v=call.v.to(wide))


def within(lse: Tensor, most: float) -> bool:
    """Whether all are numbers of at most this size; of rows without keys it says no."""
    if not lse.numel():
        return True
    low, high = (float(x) for x in torch.aminmax(lse))
    return -most <= low and high <= most


def strained(lse: Tensor) -> bool:
    """Whether in some row exp(logit - lse) is not the weight to all digits."""
    # what else takes six steps is asked of rows without keys alone
    return not within(lse, STRAIN) and bool(((lse.abs() > STRAIN) & (lse != -torch.inf)).any())


UNARY: dict[str, tuple[Callable[[Tensor], Tensor], float | None]] = {
    "exp": (torch.exp, 0.0),
    "log": (torch.log, 1.0),
    "log2": (torch.log2, 1.0),
    "sqrt": (torch.sqrt, 1.0),
    "tanh": (torch.tanh, None),
    "sigmoid": (torch.sigmoid, None),
    "sin": (torch.sin, None),
    "cos": (torch.cos, None),
}
"""Real functions, and a harmless argument for those with a singular or overflowing derivative."""

NUMPY = {"int": np.int64, "bool": np.bool_, "float": np.float64}


def in_numpy(tensor: Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    """By way of lists, because under torch.func a tensor has no memory to share with numpy."""
    return np.array(tensor.tolist(), dtype).reshape(tensor.shape)


COMPARE = {"le": torch.le, "lt": torch.lt, "eq": torch.eq}


def by_side(name: str, vectors: Tensor) -> Tensor:
    """Those of queries or of keys, with both axes of the pairs."""
    return vectors.unsqueeze(-2 if "Q" in name else -3)


class _Extreme(torch.autograd.Function):
    """max and min with the gradients that torch gives them, halves where both are equal: its own way, which
    chooses entry by entry, takes twenty times as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, sign: int) -> Tensor:
        return torch.maximum(a, b) if sign > 0 else torch.minimum(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.sign = inputs[2]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        ahead = (a - b if ctx.sign > 0 else b - a).nan_to_num_(nan=0.0)
        mine, other = ctx.needs_input_grad[:2]
        return (
            _shared(slope, ahead).sum_to_size(a.shape) if mine else None,
            _shared(slope, -ahead).sum_to_size(b.shape) if other else None,
            None,
        )


def _shared(slope: Tensor, ahead: Tensor) -> Tensor:
    """All of the slope, even an infinite one, where this is positive, half where it is 0, else nothing: the
    gradient of relu says so quickly."""
    least = -torch.finfo(ahead.dtype).smallest_normal
    found, other = (torch.ops.aten.threshold_backward(slope, ahead, end) for end in (0.0, least))
    found.add_(other).mul_(0.5)
    return found  # type: ignore[no-any-return]


def _entries(values: Tensor, index: tuple[Tensor, ...]) -> Tensor:
    """Of a table; nought where it has none at all, which counts for no pair."""
    if 0 not in values.shape[: len(index)]:
        return values[index]
    return values.new_zeros((*broadcast_tensors(*index)[0].shape, *values.shape[len(index) :]))


def extreme(a: Tensor, b: Tensor, sign: int) -> Tensor:
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return _Extreme.forward(a, b, sign)
    found: Tensor = _Extreme.apply(a, b, sign)  # type: ignore[no-untyped-call]
    return found


def whole_power(a: Tensor, b: Tensor) -> Tensor:
    """Of integers, the exponent not negative where it has a value."""
    return torch.pow(a, b.clamp_min(0))


def whole_log2(x: Tensor) -> Tensor:
    """Of an integer, rounded down: the exponent, less one where float64 rounded the number up."""
    x = x.clamp_min(1)
    exponent = torch.frexp(x.double()).exponent.to(torch.int64) - 1
    exponent = exponent.clamp_max(62)
    return exponent - (torch.ones_like(x) << exponent > x).to(torch.int64)


def whole_root(x: Tensor) -> Tensor:
    """The square root of an integer, rounded down."""
    x = x.clamp_min(0)
    root = x.double().sqrt().to(torch.int64)
    root = root - (root * root > x).to(torch.int64)
    return root + ((root + 1) * (root + 1) <= x).to(torch.int64)


class _Evaluation:
    """One evaluation: the memo, by node and by the pairs that are live there.

    A vector has one axis more than a number, the last one, and so has what is live of it.
    """

    def __init__(self, env: Env) -> None:
        self.env = env
        self.memo: dict[tuple[Expr, int], Tensor] = {}
        self.lives: list[Tensor] = []
        self.derived: dict[tuple[int, object], Tensor] = {}
        self.device = env.device

    def of(self, node: Expr, live: Tensor | None) -> Tensor:
        key = (node, id(live))
        found = self.memo.get(key)
        if found is None:
            found = self.memo[key] = self.compute(node, live)
        return found

    def refine(self, live: Tensor | None, cond: Tensor) -> Tensor:
        refined = cond if live is None else live & cond
        self.lives.append(refined)
        return refined

    def derive(self, live: Tensor, what: object, make: Callable[[], Tensor]) -> Tensor:
        if (id(live), what) not in self.derived:
            self.derived[id(live), what] = make()
        return self.derived[id(live), what]

    def real(self, node: Expr, live: Tensor | None, safe: float | None = None) -> Tensor:
        value = self.of(node, live).to(self.env.dtype)
        if safe is None or live is None or (node.free <= SAME and not node.tables):
            return value
        return torch.where(self.around(node, live), value, safe)

    def entries(self, node: Expr, live: Tensor | None, safe: float | None = None) -> Tensor:
        """Of a vector; a number gets its axis."""
        if node.type == "vec":
            return self.real(node, live, safe)
        return self.real(node, self.of_pairs(live), safe).unsqueeze(-1)

    def around(self, node: Expr, live: Tensor) -> Tensor:
        """`live`, or whether any is of the pairs at which the node is the same."""
        entries = node.type in ("vec", "truths")
        shape = (*broadcast_shapes(*map(self.extent, node.free)), *live.shape[live.dim() - entries :])
        missing = live.dim() - len(shape)
        axes = tuple(i for i in range(live.dim()) if i < missing or shape[i - missing] == 1 < live.shape[i])
        return self.derive(live, axes, lambda: live.any(axes, keepdim=True)) if axes else live

    def extent(self, name: str) -> Sequence[int]:
        """The axes of the pairs along which a variable differs."""
        value = self.env.values[name]
        return by_side(name, value).shape[:-1] if ir.variable_type(name) == "vec" else value.shape

    def of_pairs(self, live: Tensor | None) -> Tensor | None:
        """Where any entry is live, of what is live of a vector."""
        return None if live is None else self.derive(live, "pairs", lambda: live.any(-1))

    def vector(self, node: Expr, live: Tensor | None) -> Tensor:
        """What a number at each pair is made of, [.., nq, n, D] with axes of size 1 where it is the same."""
        if live is None or node.op == "var":
            return self.of(node, None)
        wide = self.derive(live, "entries", lambda: live.unsqueeze(-1))
        return self.of(node, self.around(node, wide))

    def compute(self, node: Expr, live: Tensor | None) -> Tensor:
        op, args = node.op, node.args
        if op == "const":
            dtype = {"bool": torch.bool, "int": torch.int64}.get(node.type, self.env.dtype)
            return torch.full((), cast(Any, node.value), dtype=dtype, device=self.device)
        if op == "var":
            value = self.env.values[str(node.value)]
            return by_side(str(node.value), value) if node.type == "vec" else value
        if op in ("and", "or"):
            return self.connective(node, live)
        if op == "not":
            return ~self.of(args[0], live)
        if op == "where":
            if node.type == "vec" and args[0].type == "bool":
                cond = self.of(args[0], self.of_pairs(live)).unsqueeze(-1)
            else:
                cond = self.of(args[0], live)
            a = self.typed(args[1], node, self.refine(live, cond))
            b = self.typed(args[2], node, self.refine(live, ~cond))
            return torch.where(cond, a, b)
        if op in UNARY and node.type != "int":
            function, safe = UNARY[op]
            return function(self.real(args[0], live, safe))
        if op in COMPARE:
            joint = next((a for kind in ("vec", "real") for a in args if a.type == kind), args[0])
            return COMPARE[op](self.typed(args[0], joint, live), self.typed(args[1], joint, live))
        return getattr(self, f"on_{op}")(node, live)  # type: ignore[no-any-return]

    def typed(self, node: Expr, like: Expr, live: Tensor | None, safe: float | None = None) -> Tensor:
        if like.type == "vec":
            return self.entries(node, live, safe)
        return self.real(node, live, safe) if like.type == "real" else self.of(node, live)

    def connective(self, node: Expr, live: Tensor | None) -> Tensor:
        """Left to right: what stands right is looked at only where the left leaves it open."""
        result = self.of(node.args[0], live)
        for arg in node.args[1:]:
            if node.op == "and":
                result = result & self.of(arg, self.refine(live, result))
            else:
                result = result | self.of(arg, self.refine(live, ~result))
        return result

    def on_add(self, node: Expr, live: Tensor | None) -> Tensor:
        result = self.typed(node.args[0], node, live)
        for arg in node.args[1:]:
            result = result + self.typed(arg, node, live)
        return result

    def on_mul(self, node: Expr, live: Tensor | None) -> Tensor:
        return self.typed(node.args[0], node, live) * self.typed(node.args[1], node, live)

    def on_div(self, node: Expr, live: Tensor | None) -> Tensor:
        return self.typed(node.args[0], node, live) / self.typed(node.args[1], node, live, 1.0)

    def on_floordiv(self, node: Expr, live: Tensor | None) -> Tensor:
        a, b = (self.typed(arg, node, live) for arg in node.args)
        return torch.div(a, b, rounding_mode="floor")

    def on_mod(self, node: Expr, live: Tensor | None) -> Tensor:
        return torch.remainder(*(self.typed(arg, node, live) for arg in node.args))

    def on_pow(self, node: Expr, live: Tensor | None) -> Tensor:
        if node.type == "int":
            return whole_power(self.of(node.args[0], live), self.of(node.args[1], live))
        return torch.pow(*(self.typed(arg, node, live, 1.0) for arg in node.args))

    def on_min(self, node: Expr, live: Tensor | None) -> Tensor:
        a, b = (self.typed(arg, node, live) for arg in node.args)
        return extreme(a, b, -1)

    def on_max(self, node: Expr, live: Tensor | None) -> Tensor:
        a, b = (self.typed(arg, node, live) for arg in node.args)
        return extreme(a, b, 1)

    def on_abs(self, node: Expr, live: Tensor | None) -> Tensor:
        return self.of(node.args[0], live).abs()

    def on_floor(self, node: Expr, live: Tensor | None) -> Tensor:
        return self.real(node.args[0], live, 0.0).floor().to(torch.int64)

    def on_log2(self, node: Expr, live: Tensor | None) -> Tensor:
        return whole_log2(self.of(node.args[0], live))

    def on_isqrt(self, node: Expr, live: Tensor | None) -> Tensor:
        return whole_root(self.of(node.args[0], live))

    def on_inset(self, node: Expr, live: Tensor | None) -> Tensor:
        members = node.value
        assert isinstance(members, IntSet)
        e = self.of(node.args[0], live)
        lo, hi = _intervals(members, self.device)
        i = torch.searchsorted(lo, e.contiguous(), right=True) - 1
        return (i >= 0) & (e <= hi[i.clamp_min(0)])

    def on_exists(self, node: Expr, live: Tensor | None) -> Tensor:
        lo, hi, body = self.of(node.args[0], live), self.of(node.args[1], live), node.args[2]
        result = torch.zeros((), dtype=torch.bool, device=self.device)
        for m in range(int(lo.min()), int(hi.max())):
            value = torch.tensor(m, device=self.device)
            env = replace(self.env, values={**self.env.values, str(node.value): value})
            inside = (lo <= m) & (m < hi)
            result = result | inside & evaluate(body, env, self.refine(live, inside))
        return result

    def on_random(self, node: Expr, live: Tensor | None) -> Tensor:
        """Drawn by the evaluator that defines the meaning, once for every setting of what it depends on."""
        q, k, n, seed, of = node.args
        bound: tuple[int, str, str] = node.value  # type: ignore[assignment]
        names = sorted(of.free - set(bound[1:]))
        nought = torch.zeros((), dtype=torch.int64, device=self.device)
        tensors = [
            torch.ones_like(nought, dtype=torch.bool) if live is None else live,
            *(self.of(arg, live) for arg in (q, k, n, seed)),
            *(self.env.values[name] for name in names),
        ]
        asked, *arrays = (in_numpy(tensor, np.int64) for tensor in broadcast_tensors(*tensors))
        settings, which = np.unique(np.stack([a.ravel() for a in arrays[2:]]), axis=1, return_inverse=True)
        drawn = np.zeros(asked.shape, bool)
        tables = {t.name: in_numpy(self.env.tables[t.name], NUMPY[t.dtype]) for t in of.tables}
        for i, (length, state, *others) in enumerate(settings.T.tolist()):
            fixed_of = ir.substitute(of, dict(zip(names, map(ir.const, others), strict=True)))
            args = ir.var("q"), ir.var("k"), ir.const(length), ir.const(state), fixed_of
            chosen = ir.make("random", args, node.value, "bool")
            here = (which.reshape(drawn.shape) == i) & (asked != 0)
            drawn[here] = pointwise.evaluate(chosen, arrays[0][here], arrays[1][here], tables)
        return torch.from_numpy(drawn).to(self.device)

    def on_lookup(self, node: Expr, live: Tensor | None) -> Tensor:
        table = node.value
        assert isinstance(table, Table)
        values = self.content(table)
        if node.type in ("vec", "mat"):
            at = self.of_pairs(live) if node.type == "vec" else live
            return _entries(values.to(self.env.dtype), self.index(table, values, node.args, at)[0])
        index, inside = self.index(table, values, node.args, live)
        # converted before the look-up, so that its gradient is summed in the wider dtype
        found = _entries(values.to(self.env.dtype) if table.dtype == "float" else values, index)
        if table.dtype == "bool":
            return found & inside
        if table.dtype == "int":
            return found.to(torch.int64)
        return found if live is None else torch.where(self.around(node, live), found, 0.0)

    def content(self, table: Table) -> Tensor:
        return self.env.tables[table.name] if table.known is None else listed(table, self.device)

    def index(
        self, table: Table, values: Tensor, args: tuple[Expr, ...], live: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Indices clamped into the table, and where they were inside."""
        lead = len(table.implicit)
        found = [self.of(arg, live) for arg in args]
        explicit = found[lead:]
        inside = torch.ones((), dtype=torch.bool, device=self.device)
        sizes = values.shape[lead:]
        for i, size in zip(explicit, sizes, strict=False):
            inside = inside & (i >= 0) & (i < size)
        if explicit and table.dtype != "bool":
            outside = ~inside if live is None else live & ~inside
            if not at_hand(outside):
                torch._assert_async(
                    ~outside.any(), f"a look-up in `{table.name}` asks for an entry beyond it"
                )
            elif bool(outside.any()):
                read = [i.numpy() for i in explicit]
                raise pointwise.outside(table, args, read, sizes, outside.numpy())
        clamped = [i.clamp(0, max(size - 1, 0)) for i, size in zip(explicit, sizes, strict=False)]
        return (*found[:lead], *clamped), inside

    def on_intable(self, node: Expr, live: Tensor | None) -> Tensor:
        table = node.value
        assert isinstance(table, Table)
        values = self.content(table)
        index, inside = self.index(table, values, node.args[1:], live)
        return (_entries(values, index) == self.of(node.args[0], live).unsqueeze(-1)).any(-1) & inside

    def on_rank_of(self, node: Expr, live: Tensor | None) -> Tensor:
        return self.segment(node, live, rank=True)

    def on_count_of(self, node: Expr, live: Tensor | None) -> Tensor:
        return self.segment(node, live, rank=False)

    def segment(self, node: Expr, live: Tensor | None, rank: bool) -> Tensor:
        table = node.value
        assert isinstance(table, Table)
        values = self.content(table)
        ordered, order = values.sort(dim=-1, stable=True)
        first = torch.searchsorted(ordered, values)
        if rank:
            places = torch.arange(values.shape[-1], device=self.device).expand_as(order)
            derived = torch.empty_like(order).scatter_(-1, order, places) - first
        else:
            derived = torch.searchsorted(ordered, values, right=True) - first
        index, _ = self.index(table, values, node.args, live)
        return derived[index]

    def on_inner(self, node: Expr, live: Tensor | None) -> Tensor:
        a, b = node.args
        for vector, row in ((a, b), (b, a)):
            if vector.op == "var" and row.op == "lookup" and by_pair(row):
                return self.rows_of_table(str(vector.value), row, live)
        # axes of size 1 for pairs that see the same vector, of which einsum makes matrix products
        return torch.einsum("...d,...d->...", self.vector(a, live), self.vector(b, live))

    def on_matvec(self, node: Expr, live: Tensor | None) -> Tensor:
        live = self.of_pairs(live)
        matrix, x = self.of(node.args[0], live), self.vector(node.args[1], live)
        if matrix.dim() > 3 and x.shape[-3] == matrix.shape[-3] == 1 != matrix.shape[-4]:
            # one of each query with one of each key: a matrix product, of which einsum makes many
            found = matrix.squeeze(-3).flatten(-3, -2) @ x.squeeze(-3).mT
            return found.view(*found.shape[:-2], -1, matrix.shape[-2], found.shape[-1]).transpose(-1, -2)
        return torch.einsum("...md,...d->...m", matrix, x)

    def on_sum(self, node: Expr, live: Tensor | None) -> Tensor:
        return self.vector(node.args[0], live).sum(-1)

    def on_concat(self, node: Expr, live: Tensor | None) -> Tensor:
        pairs = self.of_pairs(live)
        parts = [
            self.vector(arg, pairs) if arg.type == "vec" else self.real(arg, pairs).unsqueeze(-1)
            for arg in node.args
        ]
        shape = broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], -1)

    def rows_of_table(self, side: str, row: Expr, live: Tensor | None) -> Tensor:
        """Products of Q (or K) with a row for each pair: one matrix product with the table, then a gather."""
        table = row.value
        assert isinstance(table, Table)
        values = self.content(table).to(self.env.dtype)
        index, _ = self.index(table, values, row.args, live)
        lead = len(table.implicit)
        rows = values[tuple(i.squeeze((-1, -2)) for i in index[:lead])] if lead else values
        products = self.env.values[side] @ rows.flatten(-len(table.explicit), -2).transpose(-1, -2)
        place = torch.zeros((), dtype=torch.int64, device=self.device)
        for i, size in zip(index[lead:], values.shape[lead:-1], strict=True):
            place = place * size + i
        # [.., nq, rows] of the table for Q, [.., rows, n] for K
        products, axis = (products, -1) if "Q" in side else (products.transpose(-1, -2), -2)
        shape = [*products.shape]
        shape[axis] = place.shape[axis]
        found = products.gather(axis, place.expand(shape))
        return found if live is None else torch.where(live, found, 0.0)


FEATURES = Features(
    operations={"and", "or", "not", "where", *UNARY, *COMPARE}
    | {name.removeprefix("on_") for name in vars(_Evaluation) if name.startswith("on_")},
    tables={"given", "learned", "drawn", "known", "selected", "int", "bool", "float"},
    modes={"training"},
    dtypes={"float16", "bfloat16", "float32", "float64"},
    devices={"cpu", "cuda"},
)
"""What `evaluate` knows; a backend adds the clauses and norms that it does."""

PASSES: dict[str, tuple[float, float]] = {
    "where": (2, 3), "div": (2, 1.5), "pow": (3, 3), "floordiv": (1, 2), "mod": (1, 2), "floor": (2, 1),
    "exp": (2, 1.5), "log": (2, 1.5), "sqrt": (2, 1), "log2": (6, 6), "isqrt": (10, 8),
    "tanh": (1, 2.5), "sigmoid": (1, 0.5), "sin": (1, 1.5), "cos": (1, 1.5),
    "lookup": (3, 6), "inner": (3, 6), "sum": (0, 0.1), "matvec": (2, 20), "concat": (1, 1),
    "intable": (3, 10), "rank_of": (3, 6), "count_of": (3, 6),
    "inset": (3, 10), "random": (4, 50), "exists": (8, 8),
}  # fmt: skip
"""Arrays that an operation writes, what guards its arguments included, and nanoseconds for each number beside
that, of one core with AVX-512; 1 and none for the others."""


def elements(e: Expr | None, pairs: float, heads: float) -> tuple[float, float]:
    """Numbers of 4 bytes that `evaluate` writes at so many pairs of so many heads, and nanoseconds of
    computing beside. What depends on a query or a key alone is next to nothing.
    """
    numbers = nanoseconds = 0.0
    for node in ir.nodes(e) if e is not None else ():
        if node.op in ("const", "var") or not by_pair(node):
            continue
        passes, more = PASSES.get(node.op, (1, 0))
        if node.op == "div" and not by_pair(node.args[1]):
            passes, more = 1, 1
        if node.op == "inner" and not any(map(by_pair, node.args)):
            # beyond what the logit itself would take
            passes, more = 1 + 0.6 * max(0.0, width(node.args[0]) / WIDTH - 1), width(node.args[0]) / WIDTH
        size = pairs * (heads if by_head(node) else 1) * (width(node) if node.type == "vec" else 1)
        numbers += size * passes * {"bool": 0.25, "int": 2}.get(node.type, 1)
        nanoseconds += size * more
    return numbers, nanoseconds


def width(vector: Expr) -> int:
    """How many numbers a vector has, or some such number."""
    assert vector.width is not None
    found = ir.number(ir.substitute(vector.width, dict.fromkeys(vector.width.free, ir.const(WIDTH))))
    assert found is not None
    return int(found)


def of_distances(e: Expr, env: Env, distances: Tensor, live: Tensor) -> Tensor:
    """An expression that `by_distance` finds, at each q - k [.., L] of which some pair is `live`: [.., L]."""
    origin = torch.zeros((), dtype=torch.int64, device=distances.device)
    values = {**env.values, "q": distances[..., None], "k": origin}
    found = evaluate(e, replace(env, values=values), live[..., None]).to(env.dtype)
    return broadcast_tensors(found, distances[..., None])[0].squeeze(-1)


def from_diagonals(x: Tensor, columns: int) -> Tensor:
    """[.., R + K - 1] -> [.., R, K], x[.., j - i + R - 1] at (i, j)."""
    return x.unfold(-1, columns, 1).flip(-2)


def along_diagonals(x: Tensor) -> Tensor:
    """[.., R, K] -> [.., R, R + K - 1], the entry of (i, j) at (i, j - i + R - 1), beside it zeros."""
    (rows, columns), count = x.shape[-2:], math.prod(x.shape[:-2])
    width = rows + columns - 1
    found = x.new_zeros((*x.shape[:-1], width))
    sheared = found.as_strided((count, rows, columns), (rows * width, width - 1, 1), rows - 1)
    sheared.copy_(x.reshape(count, rows, columns))
    return found


def fused_rows(x: Tensor, width: int) -> Tensor:
    """x [..., D] as torch's fused kernels read it, whatever its strides: rows of adjacent numbers that do not
    overlap, zeros from D to `width`. A copy only where x is not so already."""
    if x.shape[-1] < width:
        x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 and x.stride(-2) >= width else x.contiguous()
