"""Attention by formulas written by hand, over the flat list of its live pairs.

The yardstick of the suite. It shares no code with the evaluators of expressions, tiles or relations; the
keys that `random` draws alone come from `Bound.mask`. A pair that is not live is not in the list, so
that nothing which stands there can reach a result or a gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

import attndsl
from attndsl.bound import Bound


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a query and a key: each field has an entry for every pair, or broadcasts to them.

    b, h, q, k   batch row, query head and positions; n, nq, H, D as in the language
    Q, K         the vectors of query and key [P, D]; a mask has none
    tables       by name, all axes in place: `p.z[p.b, p.h, p.q, p.k]`
    arithmetic   the dtype in which backends add and multiply
    """

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor
    n: Tensor
    nq: int
    H: int
    D: int
    tables: Mapping[str, Tensor]
    arithmetic: torch.dtype
    Q: Tensor = field(default_factory=lambda: torch.empty(0))
    K: Tensor = field(default_factory=lambda: torch.empty(0))

    def __getattr__(self, name: str) -> Tensor:
        if name not in self.tables:
            raise AttributeError(name)
        return self.tables[name]

    @functools.cached_property
    def s(self) -> Tensor:
        return dot(self.Q, self.K) / math.sqrt(self.D)

    def rounded(self, x: Tensor) -> Tensor:
        """As a backend's arithmetic stores it; the gradient passes."""
        return x + (x.detach().to(self.arithmetic).double() - x.detach())

    def drawn(self, pattern: str, q: Tensor, k: Tensor, n: Tensor, **inputs: Tensor) -> Tensor:
        """Whether a pattern made with `random`, a named hash, holds at (q, k) of n positions."""
        found = torch.zeros(q.shape, dtype=torch.bool)
        if not q.numel():
            return found
        for size in sorted({*n.flatten().tolist()}):
            here: dict[str, Any] = {name: table[..., :size] for name, table in inputs.items()}
            mask = _pattern(pattern).mask(size, int(q.max()) + 1, q_offset=0, heads=self.H, **here)
            bits = torch.from_numpy(mask).view(-1, *mask.shape[-2:])
            found = torch.where(n == size, bits[self.h % len(bits), q, k.clamp_max(size - 1)], found)
        return found


Function = Callable[[Pairs], Tensor]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of vectors on the last axis."""
    return (a * b).sum(-1)


@functools.cache
def _pattern(text: str) -> Bound:
    found = attndsl.parse(f"attention a {{ {text} }}")["a"]
    assert isinstance(found, Bound)
    return found


@dataclass(frozen=True, eq=False)
class Formula:
    """What the query heads for which `heads(h, H)` holds do: the clauses of an attention, written in torch.

    `count` is the multiplicity; a sink is a number for each (b, h).
    """

    mask: Function
    score: Function = lambda p: p.s
    decay: Function | None = None
    count: Function | None = None
    sink: Function | None = None
    norm: Literal["softmax", "sigmoid", "relu", "linear", "none"] = "softmax"
    heads: Callable[[int, int], bool] = lambda h, H: True


def at_the_end(n: int, nq: int) -> int:
    return n - nq


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an attention is given: q [B, H, nq, D], k and v [B, Hkv, n, D and Dv], tables as in `Pairs`,
    and where queries [B, nq] and keys [B, n] stand, and what n is [B]."""

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Mapping[str, Tensor]
    q_at: Tensor
    k_at: Tensor
    n: Tensor
    arithmetic: torch.dtype = torch.float64


@contextmanager
def doubles() -> Iterator[None]:
    """A position times a real is a float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@doubles()
def related(formulas: Sequence[Formula], given: Inputs) -> Tensor:
    """The mask [B, H, nq, n]."""
    (B, H, nq, D), n = given.q.shape, given.k.shape[2]
    found = torch.zeros(B, H, nq, n, dtype=torch.bool)
    if not found.numel():
        return found
    b, h = torch.arange(B).view(-1, 1, 1, 1), torch.arange(H).view(-1, 1, 1)
    q, k, end = given.q_at[:, None, :, None], given.k_at[:, None, None, :], given.n.view(-1, 1, 1, 1)
    everywhere = Pairs(b, h, q, k, end, nq, H, D, given.tables, given.arithmetic)
    for formula in formulas:
        here = torch.tensor([formula.heads(head, H) for head in range(H)]).view(-1, 1, 1)
        found = found | here & formula.mask(everywhere)
    return found


@doubles()
def attend(formulas: Sequence[Formula], given: Inputs, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over the pairs of the mask: output [B, H, nq, Dv] and log-sum-exp [B, H, nq], differentiable, and how
    large logits are in the mean, by their weights [B, H, nq]."""
    B, H, nq, D = given.q.shape
    share = H // given.k.shape[1]
    rows = []
    for b in range(B):
        for h in range(H):
            (formula,) = (f for f in formulas if f.heads(h, H))
            i, j = mask[b, h].nonzero(as_tuple=True)
            p = Pairs(
                torch.tensor(b),
                torch.tensor(h),
                given.q_at[b, i],
                given.k_at[b, j],
                given.n[b],
                nq,
                H,
                D,
                given.tables,
                given.arithmetic,
                given.q[b, h].index_select(0, i),
                given.k[b, h // share].index_select(0, j),
            )
            rows.append(_rows(formula, p, given.v[b, h // share].index_select(0, j), i))
    out, lse, size = (torch.stack(part) for part in zip(*rows, strict=True))
    return out.view(B, H, *out.shape[1:]), lse.view(B, H, nq), size.view(B, H, nq)


def _rows(formula: Formula, p: Pairs, v: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same of one head, whose pairs stand in rows i."""

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(p.nq, *x.shape[1:]).index_add(0, i, x)

    logit = formula.score(p).double().expand(i.shape)
    factor = torch.ones_like(logit)
    for more in (formula.decay, formula.count):
        factor = factor if more is None else factor * more(p)
    top, rest = torch.zeros(p.nq), torch.tensor(0.0)
    if formula.norm == "softmax":
        sink = torch.tensor(-torch.inf) if formula.sink is None else formula.sink(p).double()
        top = sink.detach().repeat(p.nq).scatter_reduce(0, i, logit.detach(), "amax")
        top = torch.where(top.isinf(), 0.0, top)
        weight, rest = factor * torch.exp(logit - top[i]), torch.exp(sink - top)
    else:
        of = {"sigmoid": torch.sigmoid, "relu": torch.relu}.get(formula.norm, lambda x: x)
        weight = factor * of(logit)
    empty = total(weight) == 0
    divided = formula.norm in ("softmax", "linear")
    weight = torch.where(empty[i], 0.0, weight) if divided else weight
    z = torch.where(empty, 1.0, total(weight) + rest)
    lse = torch.where(empty, -torch.inf, torch.log(z) + top)
    size = total(weight.abs() * logit.abs()).detach() / torch.where(empty, 1.0, total(weight.abs())).detach()
    out = total(weight[:, None] * v)
    return out / z[:, None] if divided else out, lse, size
