"""The mechanisms of the suite: each in the language, and beside it by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.conformance.formula import Formula, Function, Pairs, at_the_end, dot

if TYPE_CHECKING:
    from attndsl.conformance.cases import Case

Array = NDArray[Any]
Draw = Callable[[np.random.Generator, tuple[int, ...], "Case"], Array]


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A mask and clauses beside it, and their `formulas`, one for each group of heads.

    tables  how inputs are drawn that are not standard normal: from a generator, their shape and the case
    sizes   of named axes that tensors bind, at n positions
    start   the position of query row 0 where the call gives none, from n and nq
    exact   logits that float32 holds, in whatever order they are summed
    """

    name: str
    clauses: str
    formulas: tuple[Formula, ...]
    definitions: str = ""
    params: str = ""
    tables: Mapping[str, Draw] = field(default_factory=dict)
    sizes: Callable[[int], dict[str, int]] = lambda n: {}
    start: Callable[[int, int], int] = at_the_end
    exact: bool = False

    @property
    def text(self) -> str:
        return f"{self.definitions}\nattention a{self.params} {{ {self.clauses} }}"


def full(p: Pairs) -> Tensor:
    return torch.tensor(True)


def causal(p: Pairs) -> Tensor:
    return p.k <= p.q


def last(w: int) -> Function:
    return lambda p: (p.k <= p.q) & (p.k > p.q - w)


def radius(r: int) -> Function:
    return lambda p: (p.q - p.k).abs() <= r


def alibi(p: Pairs) -> Tensor:
    """Press et al. 2022: heads beyond the largest power of two have every second slope of twice as many."""
    base = 2 ** (p.H.bit_length() - 1)
    h = p.h.double()
    slope = torch.where(p.h < base, 2 ** (-8 * (h + 1) / base), 2 ** (-4 * (2 * (h - base) + 1) / base))
    return p.s - slope * (p.q - p.k).abs()


def capped(c: float) -> Function:
    return lambda p: c * torch.tanh(p.s / c)


def half_bucket(x: Tensor, buckets: int, far: int) -> Tensor:
    """Raffel et al. 2020, without logarithms: step i is passed where (x / m) ** m reaches (far / m) ** i."""
    m = buckets // 2
    steps = torch.tensor([float(m) ** (m - i) * float(far) ** i for i in range(1, m)])
    return torch.where(x < m, x, m + (x.double()[..., None] ** m >= steps).sum(-1))


def t5(p: Pairs) -> Tensor:
    x = p.k - p.q
    return dot(p.Q, p.K) + p.table[p.h, 16 * (x > 0) + half_bucket(x.abs(), 16, 128)]


def clipped(p: Pairs, r: int) -> Tensor:
    return (p.k - p.q).clamp(-r, r) + r


def ramp(x: Tensor, span: Tensor, width: float) -> Tensor:
    return torch.relu(torch.minimum((width + span - x) / width, torch.tensor(1.0, dtype=torch.float64)))


def t5_causal(p: Pairs) -> Tensor:
    return dot(p.Q, p.K) + p.table[p.h, half_bucket((p.q - p.k).clamp_min(0), 32, 128)]


def da(p: Pairs) -> Tensor:
    a, b = p.a[p.h], p.shift[p.h]
    return (
        torch.relu(dot(p.Q, p.K)) * (1 + b.exp()) / (1 + (b - a * (p.q - p.k).abs()).exp()) / math.sqrt(p.D)
    )


def bigbird(p: Pairs) -> Tensor:
    i, j, blocks = p.q // 16, p.k // 16, (p.n + 15) // 16
    ends = (i == 0) | (i == blocks - 1) | (j == 0) | (j == blocks - 1)
    return ((i - j).abs() <= 1) | ends | p.drawn("mask random(2, seed = h)", i, j, blocks)


def holds(table: Tensor, *index: Tensor) -> Tensor:
    """A look-up in a truth table, false outside its last axis."""
    *first, i = index
    size = table.shape[-1]
    return table[(*first, i.clamp(0, size - 1))] & (0 <= i) & (i < size)


def rank(ids: Tensor) -> Tensor:
    """How many of its equals stand before each entry."""
    return (ids[:, None] == ids).tril(-1).sum(-1)


def normal(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return rng.standard_normal(shape)


def integers(lo: int, hi: int) -> Draw:
    return lambda rng, shape, case: rng.integers(lo, hi, shape)


def ordered(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return np.sort(rng.integers(0, 4, shape), axis=-1)


def likely(share: float) -> Draw:
    return lambda rng, shape, case: rng.random(shape) < share


def positions(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return rng.integers(0, case.longest + 1, shape)


def positive(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return np.abs(rng.standard_normal(shape))


def first(*heads: int) -> Callable[[int, int], bool]:
    return lambda h, H: h in heads


def others(*heads: int) -> Callable[[int, int], bool]:
    return lambda h, H: h not in heads


def mechanism(name: str, clauses: str, *formulas: Formula | Function, **others: Any) -> Mechanism:
    """A formula that is a mask and nothing else is written as that."""
    made = tuple(f if isinstance(f, Formula) else Formula(f) for f in formulas)
    return Mechanism(name, clauses, made, **others)


PLAIN = (
    mechanism("full", "mask full", full),
    mechanism("causal", "mask causal", causal),
    mechanism("window", "mask radius(20)", radius(20)),
    mechanism("causal-window", "mask causal & last(70)", last(70)),
    mechanism("empty-rows", "mask { q, k : q mod 3 == 0 and k < q }", lambda p: (p.q % 3 == 0) & (p.k < p.q)),
    mechanism("none", "mask none", lambda p: torch.tensor(False)),
    mechanism(
        "dilated",
        "mask band(-40 .. 40, step = 4)",
        lambda p: ((p.k - p.q).abs() <= 40) & ((p.k - p.q) % 4 == 0),
    ),
    mechanism(
        "longformer",
        "mask radius(10) | global([0, 77])",
        lambda p: ((p.q - p.k).abs() <= 10) | (p.q == 0) | (p.q == 77) | (p.k == 0) | (p.k == 77),
    ),
    mechanism("bigbird", "mask blocks(16, radius(1) | global([0, n - 1]) | random(2, seed = h))", bigbird),
    mechanism(
        "strided",
        "mask strided(16)",
        lambda p: (p.k <= p.q) & ((p.q - p.k < 16) | ((p.q - p.k) % 16 == 0)),
    ),
    mechanism(
        "fixed",
        "mask fixed(16, 4)",
        lambda p: (p.k <= p.q) & ((p.q // 16 == p.k // 16) | (p.k % 16 >= 12)),
    ),
    mechanism("blocks", "mask block(32)", lambda p: p.q // 32 == p.k // 32),
    mechanism(
        "per-head",
        "mask { q, k : q - k <= 8 * h and k <= q }",
        lambda p: (p.q - p.k <= 8 * p.h) & (p.k <= p.q),
    ),
    mechanism(
        "head-groups",
        "heads 0 { mask causal } else { mask radius(9) score softcap(2.0) }",
        Formula(causal, heads=first(0)),
        Formula(radius(9), capped(2.0), heads=others(0)),
    ),
    mechanism(
        "documents",
        "inputs doc : int[n] mask causal & documents(doc)",
        lambda p: (p.k <= p.q) & (p.doc[p.q] == p.doc[p.k]),
        tables={"doc": ordered},
    ),
    mechanism(
        "padding",
        "inputs pad : int[B] mask causal & { q, k : k >= pad }",
        lambda p: (p.k <= p.q) & (p.k >= p.pad[p.b]),
        tables={"pad": positions},
    ),
    mechanism(
        "chosen",
        "inputs chosen : int[B, H, tiles, top] mask blocks(16, { q, k : k in chosen[q] })",
        lambda p: (p.chosen[p.b, p.h, p.q // 16] == (p.k // 16)[..., None]).any(-1),
        tables={"chosen": lambda rng, shape, case: rng.integers(0, max(shape[2], 1), shape)},
        sizes=lambda n: {"tiles": -(-n // 16), "top": 2},
    ),
    mechanism("alibi", "mask causal score alibi", Formula(causal, alibi)),
    mechanism("softcap", "mask causal & last(50) score softcap(3.0)", Formula(last(50), capped(3.0))),
    mechanism(
        "infinite-outside",
        "mask { q, k : k < q } score s + log(q - k)",
        Formula(lambda p: p.k < p.q, lambda p: p.s + (p.q - p.k).double().log()),
    ),
    mechanism(
        "scaled",
        "mask radius(30) score Q @ K / 7 - 0.01 * |q - k|",
        Formula(radius(30), lambda p: dot(p.Q, p.K) / 7 - 0.01 * (p.q - p.k).abs()),
    ),
    mechanism(
        "in-a-part",
        "mask causal score where(last(8)[q, k], s + 1.5, s / 2)",
        Formula(causal, lambda p: torch.where(p.q - p.k < 8, p.s + 1.5, p.s / 2)),
    ),
    mechanism(
        "random-part",
        "mask causal score where(random(3)[q, k], s, s - 1.0)",
        Formula(causal, lambda p: torch.where(p.drawn("mask random(3)", p.q, p.k, p.n), p.s, p.s - 1)),
    ),
    mechanism("t5", "mask full score t5(table)", Formula(full, t5), params="(table = learn[H, 32](0.1))"),
    mechanism(
        "shaw",
        "mask radius(12) score shaw(table, 6)",
        Formula(radius(12), lambda p: p.s + dot(p.Q, p.table[clipped(p, 6)]) / math.sqrt(p.D)),
        params="(table = learn[13, D](0.05))",
    ),
    mechanism(
        "da",
        "mask causal score da(a, shift)",
        Formula(causal, da),
        params="(a = learn[H](0.2), shift = learn[H](0.1))",
    ),
    mechanism(
        "gauss",
        "mask radius(25) score s + gaussian(|q - k|, sigma)",
        Formula(radius(25), lambda p: p.s + (-((p.q - p.k) ** 2) / (2 * p.sigma[p.h] ** 2)).exp()),
        params="(sigma = learn[H](9.0))",
    ),
    mechanism(
        "bias",
        "inputs z : float[B, H, n, n] mask causal score s + z[q, k]",
        Formula(causal, lambda p: p.s + p.z[p.b, p.h, p.q, p.k]),
    ),
    mechanism(
        "adaptive",
        "mask band(-60 .. -1) decay ramp(q - k, z, 16)",
        Formula(lambda p: (p.k < p.q) & (p.q - p.k <= 60), decay=lambda p: ramp(p.q - p.k, p.z[p.h], 16)),
        params="(z = learn[H](20.3))",
    ),
    mechanism(
        "multiset",
        "mask radius(8) + last(4)",
        Formula(radius(8), count=lambda p: 1 + last(4)(p).long()),
    ),
    mechanism(
        "sink",
        "mask causal & last(30) norm softmax(sink = z)",
        Formula(last(30), sink=lambda p: p.z[p.h]),
        params="(z = learn[H](0.4))",
    ),
    mechanism(
        "sigmoid",
        "mask causal score s - 1.0 norm sigmoid",
        Formula(causal, lambda p: p.s - 1, norm="sigmoid"),
    ),
    mechanism("relu", "mask radius(40) norm relu", Formula(radius(40), norm="relu")),
)

MECHANISMS = PLAIN
