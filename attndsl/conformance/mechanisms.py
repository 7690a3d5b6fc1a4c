"""The mechanisms of the suite: each in the language, and beside it by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
Made = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Mechanism:
    """A mask and clauses beside it, and their `formulas`, one for each group of heads.

    tables  how inputs are drawn that are not standard normal: from a generator, their shape and the case
    sizes   of named axes that tensors bind, at n positions
    start   the position of query row 0 where the call gives none, from n and nq
    exact   logits that float32 holds, in whatever order they are summed, for rows that are masked by
            adding a large number: their logits are what that leaves of them
    memory  how many of the keys stand before position 0
    streams, made  what else the keys are, in the language, and by hand: of keys and values that are given
            [B, Hkv, n, D and Dv], where they stand [B, n], and tables, those that are attended to
    """

    name: str
    clauses: str
    formulas: tuple[Formula, ...]
    params: str = ""
    tables: Mapping[str, Draw] = field(default_factory=dict)
    sizes: Callable[[int], dict[str, int]] = lambda n: {}
    start: Callable[[int, int], int] = at_the_end
    exact: bool = False
    memory: int = 0
    streams: str = ""
    made: Made | None = None

    @property
    def text(self) -> str:
        keys = f"keys mem({self.memory}) ++ tokens  " if self.memory else ""
        keys = f"keys {self.streams}  " if self.streams else keys
        return f"attention a{self.params} {{ {keys}{self.clauses} }}"


def full(p: Pairs) -> Tensor:
    return torch.tensor(True)


def causal(p: Pairs) -> Tensor:
    return p.k <= p.q


def listed(keys: Tensor, p: Pairs) -> Tensor:
    return (keys == p.k[..., None]).any(-1)


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
    return torch.relu(torch.minimum((width + span - x) / width, torch.tensor(1.0)))


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


def sandwich(p: Pairs) -> Tensor:
    waves = torch.cos((p.q - p.k)[:, None] / 10000 ** (torch.arange(64) / 64)).sum(-1)
    return p.s + waves * p.H / (8 * (p.h + 1))


def ranks(ids: Tensor) -> Tensor:
    """How many of its equals stand before each entry, on the last axis."""
    return (ids[..., :, None] == ids[..., None, :]).tril(-1).sum(-1)


def within_documents(p: Pairs) -> Tensor:
    rank, size = ranks(p.doc), torch.bincount(p.doc)[p.doc]
    behind = rank[p.q] - rank[p.k]
    return (p.doc[p.q] == p.doc[p.k]) & ((0 <= behind) & (behind < 3) | (rank[p.k] == size[p.k] - 1))


def within_documents_of_heads(p: Pairs) -> Tensor:
    rank = ranks(p.doc)
    behind = rank[p.b, p.h, p.q] - rank[p.b, p.h, p.k]
    return (p.doc[p.b, p.h, p.q] == p.doc[p.b, p.h, p.k]) & (0 <= behind) & (behind < 5)


def product_of_tables(p: Pairs) -> Tensor:
    """last(2) joins position m to the keys m and m - 1."""
    found = torch.tensor(False)
    for m in (p.k, p.k + 1):
        place = m.clamp_max(len(p.doc) - 1)
        found = found | (m < p.n) & p.keep[place] & (p.doc[p.q] == p.doc[place])
    return found


def normal(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return rng.standard_normal(shape)


def integers(lo: int, hi: int) -> Draw:
    return lambda rng, shape, case: rng.integers(lo, hi, shape)


def ordered(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return np.sort(rng.integers(0, 4, shape), axis=-1)


def likely(share: float) -> Draw:
    return lambda rng, shape, case: rng.random(shape) < share


def around(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    """Positions, some twice in a row, and numbers beyond them."""
    found = rng.integers(-3, case.longest + 3, shape)
    found[..., -1] = found[..., 0]
    return found


def positions(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return rng.integers(0, case.longest + 1, shape)


def positive(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return 0.1 + np.abs(rng.standard_normal(shape))


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
    mechanism(
        "log-sparse",
        "mask { q, k : q == k or q > k and 2 ** log2(q - k) == q - k } score s - 2 ** (|q - k| mod 6) / 32",
        Formula(
            lambda p: (p.q >= p.k) & ((p.q - p.k) & (p.q - p.k - 1) == 0),
            lambda p: p.s - 2.0 ** ((p.q - p.k).abs() % 6) / 32,
        ),
    ),
    mechanism(
        "in-order",
        "mask blocks(16, { q, k : [3, 0, 4, 1, 2][(q + h) mod 5] == k mod 5 }) "
        "score s + [0.5, -1.0][q mod 2]",
        Formula(
            lambda p: torch.tensor([3, 0, 4, 1, 2])[(p.q // 16 + p.h) % 5] == p.k // 16 % 5,
            lambda p: p.s + torch.where(p.q % 2 == 0, 0.5, -1.0),
        ),
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
    mechanism(
        "listed",
        "inputs keys : int[n, 9] mask causal & { q, k : k in keys[q] } score alibi",
        Formula(lambda p: causal(p) & listed(p.keys[p.q], p), alibi),
        tables={"keys": around},
    ),
    mechanism(
        "listed-by-head",
        "inputs keys : int[B, H, n, 6] mask { q, k : k in keys[q] } score t5(table)",
        Formula(lambda p: listed(p.keys[p.b, p.h, p.q], p), t5),
        params="(table = learn[H, 32](0.1))",
        tables={"keys": around},
    ),
    mechanism(
        "listed-by-row",
        "inputs keys : int[B, n, 7]  doc : int[n] mask documents(doc) & { q, k : k in keys[q] }"
        " score Q @ K / 3 decay g ** |q - k|",
        Formula(
            lambda p: (p.doc[p.q] == p.doc[p.k]) & listed(p.keys[p.b, p.q], p),
            lambda p: dot(p.Q, p.K) / 3,
            lambda p: p.g[p.h] ** (p.q - p.k).abs(),
        ),
        params="(g = learn[H](0.9))",
        tables={"keys": around, "doc": ordered},
    ),
    mechanism(
        "listed-sigmoid",
        "inputs keys : int[H, n, 5] mask causal & { q, k : k in keys[q] } norm sigmoid",
        Formula(lambda p: causal(p) & listed(p.keys[p.h, p.q], p), norm="sigmoid"),
        tables={"keys": around},
    ),
    mechanism(
        "listed-sink",
        "inputs keys : int[n, 3] mask { q, k : k in keys[q] } norm softmax(sink = z)",
        Formula(lambda p: listed(p.keys[p.q], p), sink=lambda p: p.z[p.h]),
        params="(z = learn[H](0.3))",
        tables={"keys": around},
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


def scored(name: str, text: str, score: Function, mask: str = "causal", **others: Any) -> Mechanism:
    """A score over a mask that is named here."""
    where = {"causal": causal, "full": full, "last(20)": last(20), "radius(9)": radius(9)}[mask]
    return mechanism(name, f"mask {mask} score {text}", Formula(where, score), **others)


def with_inputs(inputs: str, of: Mechanism) -> Mechanism:
    return replace(of, clauses=f"inputs {inputs} {of.clauses}")


VECTORS = (
    scored(
        "u-D", "s + K @ u / sqrt(D)", lambda p: p.s + dot(p.K, p.u) / p.D**0.5, params="(u = learn[D](0.1))"
    ),
    scored(
        "u-D-indexed", "s + u[2] * u[D - 1]", lambda p: p.s + p.u[2] * p.u[-1], params="(u = learn[D](0.1))"
    ),
    scored(
        "u-HD-twice",
        "s + (K @ u + Q @ w) / sqrt(D)",
        lambda p: p.s + (dot(p.K, p.u[p.h]) + dot(p.Q, p.w[p.h])) / p.D**0.5,
        params="(u = learn[H, D](0.1), w = learn[H, D])",
    ),
    scored(
        "transformer-xl",
        "s + (K @ u + Q @ r[min(q - k, 12)] + w @ r[min(q - k, 12)]) / sqrt(D)",
        lambda p: (
            p.s + (dot(p.K, p.u[p.h]) + dot(p.Q + p.w[p.h], p.r[p.h, (p.q - p.k).clamp_max(12)])) / p.D**0.5
        ),
        params="(u = learn[H, D], w = learn[H, D], r = learn[H, 13, D](0.1))",
    ),
    with_inputs(
        "x : float[D]  y : float[B, D]",
        scored(
            "x-D-y-BD",
            "s + 0.2 * (Q @ x + K @ y)",
            lambda p: p.s + 0.2 * (dot(p.Q, p.x) + dot(p.K, p.y[p.b])),
        ),
    ),
    with_inputs(
        "x : float[B, H, D]  y : float[H, D]",
        scored(
            "x-BHD-y-HD",
            "s + (K @ x + y @ x) / 8",
            lambda p: p.s + (dot(p.K, p.x[p.b, p.h]) + dot(p.y[p.h], p.x[p.b, p.h])) / 8,
        ),
    ),
    with_inputs(
        "x : float[n, D]",
        scored("x-nD", "s + Q @ x[k] / sqrt(D)", lambda p: p.s + dot(p.Q, p.x[p.k]) / p.D**0.5, "last(20)"),
    ),
    with_inputs(
        "x : float[B, n, D]",
        scored("x-BnD", "x[q] @ K / sqrt(D)", lambda p: dot(p.x[p.b, p.q], p.K) / p.D**0.5),
    ),
    with_inputs(
        "x : float[H, n, D]",
        scored("x-HnD", "s + x[k] @ x[q] / D", lambda p: p.s + dot(p.x[p.h, p.k], p.x[p.h, p.q]) / p.D),
    ),
    with_inputs(
        "x : float[B, H, n, D]",
        scored(
            "x-BHnD",
            "s + (x[k] @ Q + x[q] @ K) / sqrt(D)",
            lambda p: p.s + (dot(p.x[p.b, p.h, p.k], p.Q) + dot(p.x[p.b, p.h, p.q], p.K)) / p.D**0.5,
            "radius(9)",
        ),
    ),
    with_inputs(
        "x : float[B, 3, 5, D]",
        scored(
            "x-B35D",
            "s + K @ x[q mod 3, k mod 5] / sqrt(D)",
            lambda p: p.s + dot(p.K, p.x[p.b, p.q % 3, p.k % 5]) / p.D**0.5,
        ),
    ),
    with_inputs(
        "x : float[n, D]",
        scored("x-nD-indexed", "s + x[k, 0] - x[q, D - 1]", lambda p: p.s + p.x[p.k, 0] - p.x[p.q, -1]),
    ),
    scored(
        "norms-of-vectors",
        "(Q @ K - Q @ Q / 2 - K @ K / 2) / sqrt(D)",
        lambda p: -((p.Q - p.K) ** 2).sum(-1) / 2 / p.D**0.5,
    ),
)


def elu1(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def through(w: Tensor, x: Tensor) -> Tensor:
    """The product of a matrix with each vector."""
    return (w * x[..., None, :]).sum(-1)


FEATURES = (
    scored(
        "elu-of-vectors",
        "where(Q > 0, Q + 1, exp(Q)) @ where(K > 0, K + 1, exp(K)) / D",
        lambda p: dot(elu1(p.Q), elu1(p.K)) / p.D,
    ),
    with_inputs(
        "w : float[m, D]",
        scored(
            "waves-of-a-matrix",
            "s + concat(sin(w @ Q), cos(w @ Q)) @ concat(sin(w @ K), cos(w @ K)) / sqrt(Q @ Q + 1)",
            lambda p: (
                p.s + (through(p.w, p.Q) - through(p.w, p.K)).cos().sum(-1) / (dot(p.Q, p.Q) + 1) ** 0.5
            ),
            "last(20)",
            sizes=lambda n: {"m": 5},
        ),
    ),
    scored(
        "learned-matrix",
        "max(w @ Q, 0.1) @ (u * (w @ K)) / D",
        lambda p: dot(through(p.w[p.h], p.Q).clamp_min(0.1), p.u * through(p.w[p.h], p.K)) / p.D,
        "radius(9)",
        params="(w = learn[H, 6, D](0.1), u = learn[6](0.4))",
    ),
    with_inputs(
        "x : float[B, n, 4, e]  y : float[n, e]  z : float[B, H, n, 4]",
        scored(
            "indexer",
            "s / 4 + z[q] @ max(x[q] @ y[k], 0) / 4",
            lambda p: p.s / 4 + dot(p.z[p.b, p.h, p.q], torch.relu(through(p.x[p.b, p.q], p.y[p.k]))) / 4,
            sizes=lambda n: {"e": 3},
        ),
    ),
    scored(
        "larger-products",
        "sum(max(Q * K, |Q| - K)) / D",
        lambda p: torch.maximum(p.Q * p.K, p.Q.abs() - p.K).sum(-1) / p.D,
        "last(20)",
    ),
)


def elus(p: Pairs) -> Tensor:
    return dot(elu1(p.Q), elu1(p.K))


ELUS = "score where(Q > 0, Q + 1, exp(Q)) @ where(K > 0, K + 1, exp(K))"
LINEAR = (
    mechanism("linear", f"mask causal {ELUS} norm linear", Formula(causal, elus, norm="linear")),
    mechanism(
        "linear-windowed",
        "mask causal & (last(20) | sinks(3)) & { q, k : k < q - 2 } "
        f"{ELUS} / D decay g ** (q - k) norm linear",
        Formula(
            lambda p: (last(20)(p) | (p.k < 3)) & (p.k < p.q - 2),
            lambda p: elus(p) / p.D,
            lambda p: p.g[p.h] ** (p.q - p.k),
            norm="linear",
        ),
        params="(g = learn[H](0.9))",
    ),
    mechanism(
        "linear-listed",
        "inputs keys : int[H, n, 5] mask causal & { q, k : k in keys[q] } score s * s + 0.1 norm linear",
        Formula(lambda p: causal(p) & listed(p.keys[p.h, p.q], p), lambda p: p.s * p.s + 0.1, norm="linear"),
        tables={"keys": around},
    ),
    mechanism(
        "linear-drawn",
        "mask causal & last(30) score trig(Q, orthogonal(5)) @ trig(K, orthogonal(5)) + 6 norm linear",
        Formula(
            last(30),
            lambda p: (through(p.orthogonal_5_0, p.Q) - through(p.orthogonal_5_0, p.K)).cos().sum(-1) + 6,
            norm="linear",
        ),
    ),
    mechanism(
        "retention",
        f"mask causal {ELUS} / D decay 0.97 ** (q - k) norm none",
        Formula(causal, lambda p: elus(p) / p.D, lambda p: 0.97 ** (p.q - p.k), norm="none"),
    ),
    mechanism(
        "retention-of-some",
        "mask radius(9) & { q, k : k mod 3 < 2 and q mod 5 < 4 } score s * s norm none",
        Formula(lambda p: radius(9)(p) & (p.k % 3 < 2) & (p.q % 5 < 4), lambda p: p.s * p.s, norm="none"),
    ),
)

TABLES = (
    with_inputs("t : float[B]", scored("t-B", "s * exp(t / 3)", lambda p: p.s * (p.t[p.b] / 3).exp())),
    with_inputs(
        "t : float[B, H]",
        scored("t-BH", "s * t + 1.0", lambda p: p.s * p.t[p.b, p.h] + 1, "last(20)"),
    ),
    with_inputs("t : float[H]", scored("t-H", "s + t * (k mod 3)", lambda p: p.s + p.t[p.h] * (p.k % 3))),
    scored("t-H-learned", "s * t", lambda p: p.s * p.t[p.h], params="(t = learn[H](0.7))"),
    scored(
        "t-5-and-32",
        "s + x[(q + k) mod 5] * y[q mod 3, k mod 2]",
        lambda p: p.s + p.x[(p.q + p.k) % 5] * p.y[p.q % 3, p.k % 2],
        params="(x = learn[5](0.5), y = learn[3, 2](1.0))",
    ),
    with_inputs("y : float[n]", scored("y-n", "s + y[k]", lambda p: p.s + p.y[p.k])),
    with_inputs(
        "y : float[B, n]", scored("y-Bn", "s + y[k] * y[q]", lambda p: p.s + p.y[p.b, p.k] * p.y[p.b, p.q])
    ),
    with_inputs(
        "y : float[H, n]",
        scored("y-Hn", "s - |y[q] - y[k]|", lambda p: p.s - (p.y[p.h, p.q] - p.y[p.h, p.k]).abs()),
    ),
    with_inputs(
        "t : float[H, m]",
        scored(
            "t-Hm",
            "s + t[(q - k) mod 7]",
            lambda p: p.s + p.t[p.h, (p.q - p.k) % 7],
            sizes=lambda n: {"m": 9},
        ),
    ),
    with_inputs(
        "t : float[B, m]  w : float[m]",
        scored(
            "t-Bm-w-m",
            "s + t[k mod 4] * w[q mod 4]",
            lambda p: p.s + p.t[p.b, p.k % 4] * p.w[p.q % 4],
            sizes=lambda n: {"m": 4},
        ),
    ),
    with_inputs("z : float[n, n]", scored("z-nn", "s + z[k, q]", lambda p: p.s + p.z[p.k, p.q], "radius(9)")),
    with_inputs("z : float[H, n, n]", scored("z-Hnn", "z[q, k]", lambda p: p.z[p.h, p.q, p.k])),
    with_inputs(
        "z : float[B, n, n]", scored("z-Bnn", "s * z[q, k]", lambda p: p.s * p.z[p.b, p.q, p.k], "full")
    ),
    with_inputs(
        "t : int[n]",
        scored(
            "int-n",
            "s + 0.1 * t[k] - where(t[q] == t[k], 0, 1)",
            lambda p: p.s + 0.1 * p.t[p.k] - (p.t[p.q] != p.t[p.k]).long(),
            tables={"t": integers(0, 4)},
        ),
    ),
    with_inputs(
        "t : int[B, n]  z : float[H, 4, 4]",
        scored(
            "int-Bn",
            "s + z[t[q], t[k]]",
            lambda p: p.s + p.z[p.h, p.t[p.b, p.q], p.t[p.b, p.k]],
            tables={"t": integers(0, 4)},
        ),
    ),
    mechanism(
        "int-Hn",
        "inputs t : int[H, n] mask causal & { q, k : (t[q] + t[k]) mod 3 != 1 }",
        lambda p: (p.k <= p.q) & ((p.t[p.h, p.q] + p.t[p.h, p.k]) % 3 != 1),
        tables={"t": integers(-5, 5)},
    ),
    mechanism(
        "int-BH",
        "inputs t : int[B, H] mask { q, k : |q - k| <= t }",
        lambda p: (p.q - p.k).abs() <= p.t[p.b, p.h],
        tables={"t": integers(-2, 30)},
    ),
    mechanism(
        "int-H-7",
        "inputs t : int[H, 7] mask { q, k : 0 <= q - k < 7 and t[q - k] == 1 }",
        lambda p: (p.k <= p.q) & (p.q - p.k < 7) & (p.t[p.h, (p.q - p.k).clamp(0, 6)] == 1),
        tables={"t": integers(0, 2)},
    ),
    mechanism(
        "int-n-top",
        "inputs near : int[n, top] mask { q, k : k in near[q] }",
        lambda p: (p.near[p.q] == p.k[..., None]).any(-1),
        sizes=lambda n: {"top": 4},
        tables={"near": lambda rng, shape, case: rng.integers(0, max(case.longest, 1), shape)},
    ),
    with_inputs(
        "near : int[B, H, n, top]",
        scored(
            "int-BHn-top-in-a-score",
            "where(k in near[q], s, s / 2)",
            lambda p: torch.where((p.near[p.b, p.h, p.q] == p.k[:, None]).any(-1), p.s, p.s / 2),
            sizes=lambda n: {"top": 5},
            tables={"near": lambda rng, shape, case: rng.integers(0, max(case.longest, 1), shape)},
        ),
    ),
    mechanism(
        "bool-n",
        "inputs keep : bool[n] mask causal & columns(keep)",
        lambda p: (p.k <= p.q) & p.keep[p.k],
        tables={"keep": likely(0.3)},
    ),
    mechanism(
        "bool-Bn",
        "inputs keep : bool[B, n] mask causal & columns(keep) | radius(0)",
        lambda p: (p.k <= p.q) & p.keep[p.b, p.k] | (p.q == p.k),
        tables={"keep": likely(0.3)},
    ),
    mechanism(
        "bool-BHn",
        "inputs keep : bool[B, H, n] mask { q, k : keep[q] and not keep[k] }",
        lambda p: p.keep[p.b, p.h, p.q] & ~p.keep[p.b, p.h, p.k],
        tables={"keep": likely(0.6)},
    ),
    mechanism(
        "bool-nn",
        "inputs seen : bool[n, n] mask { q, k : seen[q, k] or q == k }",
        lambda p: p.seen[p.q, p.k] | (p.q == p.k),
        tables={"seen": likely(0.2)},
    ),
    mechanism(
        "bool-Hm-outside",
        "inputs far : bool[H, m] mask { q, k : far[q - k] }",
        lambda p: (0 <= p.q - p.k) & (p.q - p.k < 12) & p.far[p.h, (p.q - p.k).clamp(0, 11)],
        sizes=lambda n: {"m": 12},
        tables={"far": likely(0.5)},
    ),
    with_inputs(
        "on : bool[B]  odd : bool[H]",
        scored(
            "bool-B-bool-H",
            "where(on and odd, s, where(on or odd, 2 * s, -s))",
            lambda p: p.s * torch.tensor([-1, 2, 1])[p.on[p.b].long() + p.odd[p.h].long()],
            tables={"on": likely(0.5), "odd": likely(0.5)},
        ),
    ),
)

OPERATORS = (
    scored(
        "functions",
        "s + sin(q) * cos(k) + tanh(s) + sigmoid(q - k) + exp(-|s|) + log(1 + q - k) + sqrt(s * s + 1) "
        "+ log2(1.5 + k)",
        lambda p: (
            p.s
            + p.q.sin() * p.k.cos()
            + p.s.tanh()
            + (p.q - p.k).sigmoid()
            + (-p.s.abs()).exp()
            + (1 + p.q - p.k).log()
            + (p.s**2 + 1).sqrt()
            + (1.5 + p.k).log2()
        ),
    ),
    scored(
        "integers",
        "s + 0.125 * (q // 4 - k // 4 + (k - q) mod 5 + isqrt(k) + log2(q + 1) + (q - k) ** 2 // 100 "
        "+ floor(k / 8))",
        lambda p: (
            p.s
            + 0.125
            * (
                p.q // 4
                - p.k // 4
                + (p.k - p.q) % 5
                + p.k.sqrt().floor()
                + (p.q + 1).log2().floor()
                + (p.q - p.k) ** 2 // 100
                + p.k // 8
            )
        ),
        "last(20)",
    ),
    scored(
        "reals-divided",
        "s + (0.25 * (q - k)) mod 1.5 - (0.5 * k) // 3.0",
        lambda p: p.s + (p.q - p.k) / 4 % 1.5 - p.k / 2 // 3,
        "radius(9)",
    ),
    scored(
        "powers",
        "(1 + |s|) ** 1.5 - (1.0 + |q - k|) ** e + 0.5 ** (q - k)",
        lambda p: (1 + p.s.abs()) ** 1.5 - (1 + (p.q - p.k).abs()) ** p.e[p.h] + 0.5 ** (p.q - p.k),
        params="(e = learn[H](0.6))",
    ),
    scored(
        "extremes",
        "min(max(s, -1.0), 1.5) + max(min(q, 5), k, 20) / 50 - min(s, 0)",
        lambda p: (
            torch.minimum(torch.maximum(p.s, torch.tensor(-1.0)), torch.tensor(1.5))
            + torch.maximum(p.q.clamp_max(5), p.k).clamp_min(20) / 50
            - torch.minimum(p.s, torch.tensor(0.0))
        ),
        "radius(9)",
    ),
    scored(
        "conditions",
        "where(q mod 2 == 0 and not k in [1, 3, 5, 9, 20..25, 60] or 3 <= q - k <= 6, s, "
        "where(k != q, s / 2, 0.0))",
        lambda p: torch.where(
            (p.q % 2 == 0) & ~torch.isin(p.k, torch.tensor([1, 3, 5, 9, *range(20, 26), 60]))
            | (p.q - p.k >= 3) & (p.q - p.k <= 6),
            p.s,
            torch.where(p.k != p.q, p.s / 2, 0.0),
        ),
    ),
    scored(
        "sizes",
        "s * log(n + 1) / 4 + (h + 1) * k / (H * n) - nq / (n + D)",
        lambda p: p.s * (p.n + 1).log() / 4 + (p.h + 1) * p.k / (p.H * p.n) - p.nq / (p.n + p.D),
    ),
    mechanism(
        "several-clauses",
        "mask causal score s / 2 mask last(30) score softcap(2.0) score s * s - s",
        Formula(last(30), lambda p: (2 * (p.s / 4).tanh()) ** 2 - 2 * (p.s / 4).tanh()),
    ),
    scored("sandwich", "sandwich", sandwich),
    scored("t5-causal", "t5_causal(table)", t5_causal, params="(table = learn[H, 32](0.1))"),
    scored(
        "relative",
        "relative(table, 6)",
        lambda p: p.s + p.table[p.h, clipped(p, 6)],
        "full",
        params="(table = learn[H, 13])",
    ),
    scored(
        "kerple",
        "kerple_log(a, c)",
        lambda p: p.s - p.a[p.h] * (1 + p.c[p.h] * (p.q - p.k).abs()).log(),
        params="(a = learn[H](0.5), c = learn[H](0.7))",
    ),
    scored(
        "condition-on-content",
        "where(s > 0 and k < q, s, s / 4)",
        lambda p: torch.where((p.s > 0) & (p.k < p.q), p.s, p.s / 4),
    ),
    scored(
        "look-up-in-a-part",
        "where(q - k < 6, s + t[q - k], s)",
        lambda p: torch.where(p.q - p.k < 6, p.s + p.t[(p.q - p.k).clamp_max(5)], p.s),
        params="(t = learn[6](1.0))",
    ),
)

DECAYS = (
    mechanism(
        "decay-power",
        "mask causal decay g ** (q - k)",
        Formula(causal, decay=lambda p: p.g[p.h] ** (p.q - p.k)),
        params="(g = learn[H](0.9))",
    ),
    mechanism(
        "decay-table",
        "inputs y : float[B, H, n] mask causal decay y[k]",
        Formula(causal, decay=lambda p: p.y[p.b, p.h, p.k]),
        tables={"y": positive},
    ),
    mechanism(
        "decay-of-vectors",
        "inputs x : float[n, D] mask radius(9) decay exp(-(x[k] @ x[q]) / D) + (x[k] @ u) ** 2",
        Formula(
            radius(9),
            decay=lambda p: (-dot(p.x[p.k], p.x[p.q]) / p.D).exp() + dot(p.x[p.k], p.u[p.h]) ** 2,
        ),
        params="(u = learn[H, D](0.1))",
    ),
    mechanism(
        "decay-twice",
        "mask causal score alibi decay max(1.0 - (q - k) / 40, 0.0) decay 0.5 + sigmoid(t[k mod 5]) "
        "norm softmax(sink = 0.3)",
        Formula(
            causal,
            alibi,
            lambda p: (1 - (p.q - p.k) / 40).clamp_min(0) * (0.5 + p.t[p.h, p.k % 5].sigmoid()),
            sink=lambda p: torch.tensor(0.3),
        ),
        params="(t = learn[H, 5])",
    ),
    mechanism(
        "decay-to-nothing",
        "mask causal decay where(q mod 4 == 1, 0.0, 1.0 / (1 + q - k))",
        Formula(causal, decay=lambda p: torch.where(p.q % 4 == 1, 0.0, 1 / (1 + p.q - p.k))),
    ),
    mechanism(
        "decay-sigmoid",
        "mask last(20) decay g norm sigmoid",
        Formula(last(20), decay=lambda p: p.g[p.h], norm="sigmoid"),
        params="(g = learn[H](0.9))",
    ),
    mechanism(
        "decay-relu",
        "mask radius(9) score |s| + 0.5 decay exp(-0.1 * |q - k|) norm relu",
        Formula(
            radius(9), lambda p: p.s.abs() + 0.5, lambda p: (-0.1 * (p.q - p.k).abs()).exp(), norm="relu"
        ),
    ),
)

SINKS = (
    mechanism(
        "sink-number",
        "mask last(20) norm softmax(sink = 0.5)",
        Formula(last(20), sink=lambda p: torch.tensor(0.5)),
    ),
    mechanism(
        "sink-H",
        "inputs z : float[H] mask causal norm softmax(sink = z)",
        Formula(causal, sink=lambda p: p.z[p.h]),
    ),
    mechanism(
        "sink-BH",
        "inputs z : float[B, H] mask { q, k : k < q - 2 } norm softmax(sink = 2 * z + h)",
        Formula(lambda p: p.k < p.q - 2, sink=lambda p: 2 * p.z[p.b, p.h] + p.h),
    ),
    mechanism(
        "sink-B-multiset",
        "inputs z : float[B] mask causal + last(3) norm softmax(sink = z * log(n + 1))",
        Formula(causal, count=lambda p: 1 + last(3)(p).long(), sink=lambda p: p.z[p.b] * (p.n + 1).log()),
    ),
)

MULTISETS = (
    mechanism(
        "threefold",
        "mask causal + last(20) + last(2)",
        Formula(causal, count=lambda p: 1 + last(20)(p).long() + last(2)(p).long()),
    ),
    mechanism(
        "multisets-met",
        "mask causal + last(9) mask (radius(20) + radius(3)) - { q, k : q - k == 5 }",
        Formula(
            lambda p: (p.k <= p.q) & (p.q - p.k <= 20) & (p.q - p.k != 5),
            count=lambda p: torch.minimum(1 + last(9)(p).long(), 1 + radius(3)(p).long()),
        ),
    ),
    mechanism(
        "multiset-sigmoid",
        "mask (last(4) + last(2)) | radius(9) norm sigmoid",
        Formula(radius(9), count=lambda p: 1 + last(2)(p).long(), norm="sigmoid"),
    ),
    mechanism(
        "multiset-of-tables",
        "inputs doc : int[B, n] mask causal & (documents(doc) + last(5)) decay 0.5 score s / 2",
        Formula(
            lambda p: (p.k <= p.q) & ((p.doc[p.b, p.q] == p.doc[p.b, p.k]) | last(5)(p)),
            lambda p: p.s / 2,
            lambda p: torch.tensor(0.5),
        ),
        tables={"doc": ordered},
    ),
)

SPACES = (
    mechanism(
        "within-12",
        "mask within(12, last(4)) | within(12, { q, k : k == n - 1 })",
        lambda p: (p.q // 12 == p.k // 12) & (last(4)(p) | (p.k % 12 == 11) | (p.k == p.n - 1)),
    ),
    mechanism(
        "within-documents",
        "inputs doc : int[n] mask within(doc, last(3)) | within(doc, { q, k : k == n - 1 })",
        within_documents,
        tables={"doc": integers(0, 4)},
    ),
    mechanism(
        "within-by-head",
        "inputs doc : int[B, H, n] mask within(doc, causal & last(5))",
        within_documents_of_heads,
        tables={"doc": integers(0, 4)},
    ),
    mechanism(
        "grid",
        "mask grid(8, 16, { (y, x), (v, u) : |y - v| <= 1 and |x - u| <= 2 }) | radius(0)",
        lambda p: (
            ((p.q // 16 - p.k // 16).abs() <= 1)
            & ((p.q % 16 - p.k % 16).abs() <= 2)
            & (p.q < 128)
            & (p.k < 128)
            | (p.q == p.k)
        ),
    ),
    mechanism(
        "product-of-tables",
        "inputs doc : int[n] keep : bool[n] mask (documents(doc) & columns(keep)) @ last(2)",
        product_of_tables,
        tables={"doc": integers(0, 6), "keep": likely(0.4)},
    ),
    mechanism(
        "roots",
        "mask { q, k : isqrt(q) == isqrt(k) or log2(q + 1) == k }",
        lambda p: (
            (p.q.double().sqrt().floor() == p.k.double().sqrt().floor())
            | ((p.q + 1).double().log2().floor() == p.k)
        ),
    ),
    mechanism(
        "listed",
        "mask columns([0, 3, 7, 20..25, 50, 90..92]) | radius(2)",
        lambda p: torch.isin(p.k, torch.tensor([0, 3, 7, *range(20, 26), 50, 90, 91, 92])) | radius(2)(p),
    ),
    mechanism(
        "shifted",
        "mask shift(3, T(last(5))) & { q, k : q * k mod 7 != 3 }",
        lambda p: (p.k - p.q >= 0) & (p.k - p.q < 5) & (p.q * p.k % 7 != 3) & (p.q >= 3) & (p.k >= 3),
    ),
    mechanism(
        "random-of-a-table",
        "inputs keep : bool[n] mask random(2, seed = h, of = columns(keep)) | radius(0)",
        lambda p: (
            p.drawn(
                "inputs keep : bool[n] mask random(2, seed = h, of = columns(keep))",
                p.q,
                p.k,
                p.n,
                keep=p.keep,
            )
            | (p.q == p.k)
        ),
        tables={"keep": likely(0.3)},
    ),
    mechanism(
        "random-decay",
        "mask causal decay where(random(4, of = causal)[q, k], 2.0, 0.5)",
        Formula(
            causal,
            decay=lambda p: torch.where(p.drawn("mask random(4, of = causal)", p.q, p.k, p.n), 2.0, 0.5),
        ),
    ),
)

HEADS = (
    mechanism(
        "groups-of-all-kinds",
        "inputs y : float[H, n] mask causal heads 0 { score s + y[k] } "
        "[1] { mask last(9) decay 0.9 ** (q - k) norm sigmoid } "
        "else { mask last(20) norm softmax(sink = z) }",
        Formula(causal, lambda p: p.s + p.y[p.h, p.k], heads=first(0)),
        Formula(last(9), decay=lambda p: 0.9 ** (p.q - p.k), norm="sigmoid", heads=first(1)),
        Formula(last(20), sink=lambda p: p.z[p.h], heads=others(0, 1)),
        params="(z = learn[H](0.2))",
    ),
    mechanism(
        "odd-heads",
        "heads { p : p mod 2 == 1 } { mask radius(5) norm relu } else { score Q @ u }",
        Formula(radius(5), norm="relu", heads=lambda h, H: h % 2 == 1),
        Formula(full, lambda p: dot(p.Q, p.u[p.h]), heads=lambda h, H: h % 2 == 0),
        params="(u = learn[H, D](0.1))",
    ),
    mechanism(
        "last-head",
        "heads H - 1 { mask none } else { mask causal score alibi }",
        Formula(lambda p: torch.tensor(False), heads=lambda h, H: h == H - 1),
        Formula(causal, alibi, heads=lambda h, H: h < H - 1),
    ),
)

OFFSETS = (
    mechanism(
        "cross",
        "offset 0 mask { q, k : |q - 2 * k| < 40 } score s - 0.1 * |q - k|",
        Formula(lambda p: (p.q - 2 * p.k).abs() < 40, lambda p: p.s - 0.1 * (p.q - p.k).abs()),
        start=lambda n, nq: 0,
    ),
    mechanism(
        "cross-tables",
        "offset 0 inputs y : float[B, nq] z : float[H, nq, n] "
        "mask { q, k : q < nq and q mod 3 == k mod 3 } score s * y[q] + z[q, k]",
        Formula(
            lambda p: (p.q < p.nq) & (p.q % 3 == p.k % 3), lambda p: p.s * p.y[p.b, p.q] + p.z[p.h, p.q, p.k]
        ),
        start=lambda n, nq: 0,
    ),
    mechanism("halfway", "offset n // 2 mask causal & last(30)", last(30), start=lambda n, nq: n // 2),
)


def padded(value: float | None) -> Draw:
    """0, and before the place in a row where its text begins a large number below, by default the least."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
        least = torch.finfo(getattr(torch, case.dtype)).min if value is None else value
        return np.where(np.arange(shape[1]) < rng.integers(0, shape[1] + 1, (shape[0], 1)), least, 0.0)

    return draw


def crossed_out(value: float | None) -> Draw:
    """Likewise in random places, and over whole rows."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
        least = torch.finfo(getattr(torch, case.dtype)).min if value is None else value
        return np.where((rng.random(shape) < 0.4) | (rng.random((shape[0], 1)) < 0.3), least, 0.0)

    return draw


FLOORS = (
    *(
        replace(
            with_inputs(
                "m : float[n, n]",
                scored(f"added-{name}-qk", "s + m[q, k]", lambda p: p.rounded(p.s + p.m[p.q, p.k])),
            ),
            tables={"m": crossed_out(value)},
            exact=True,
        )
        for name, value in (("1e4", -1e4), ("1e9", -1e9), ("least", None))
    ),
    *(
        replace(
            with_inputs(
                "m : float[B, n]",
                scored(f"added-{name}-k", "s + m[k]", lambda p: p.rounded(p.s + p.m[p.b, p.k])),
            ),
            tables={"m": padded(value)},
            exact=True,
        )
        for name, value in (("1e4", -1e4), ("1e9", -1e9), ("least", None))
    ),
    replace(
        with_inputs(
            "pad : bool[B, n]",
            scored(
                "replaced-1e9", "where(pad[k], -1e9, s)", lambda p: torch.where(p.pad[p.b, p.k], -1e9, p.s)
            ),
        ),
        tables={"pad": lambda rng, shape, case: padded(-1.0)(rng, shape, case) < 0},
        exact=True,
    ),
)


def slots(x: Tensor, size: int, stride: int, weights: Tensor) -> Tensor:
    """Sums of every `stride`-th `size` vectors of x [B, H, n, D] with weights [size, D or 1]."""
    starts = range(0, x.shape[2] - size + 1, stride)
    made = [(x[:, :, start : start + size] * weights).sum(2) for start in starts]
    return torch.stack(made, 2) if made else x[:, :, :0]


def means(k: Tensor, v: Tensor, at: Tensor, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    quarter = torch.full((4, 1), 0.25, dtype=k.dtype)
    return slots(k, 4, 2, quarter), slots(v, 4, 2, quarter), at[:, 3::2]


def beside_means(
    k: Tensor, v: Tensor, at: Tensor, tables: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    more_k, more_v, more_at = means(k, v, at, tables)
    return torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), torch.cat([at, more_at], 1)


def weighed(k: Tensor, v: Tensor, at: Tensor, tables: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return slots(k, 3, 3, tables["w"]), slots(v, 3, 3, tables["u"][:, None]), at[:, 2::3]


def projected(
    k: Tensor, v: Tensor, at: Tensor, tables: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Behind what is projected for all heads alike, which every query reads, the tokens."""
    made = (torch.stack([(row[:, None] * x).sum(2) for row in tables["E"]], 2) for x in (k, v))
    more_k, more_v = made
    before = at.new_full((len(at), len(tables["E"])), -1)
    return torch.cat([more_k, k], 2), torch.cat([more_v, v], 2), torch.cat([before, at], 1)


def projected_by_head(
    k: Tensor, v: Tensor, at: Tensor, tables: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    E, F = tables["E"], tables["F"]
    k, v = (x.repeat_interleave(len(E) // x.shape[1], 1) for x in (k, v))
    made_k = torch.stack([(E[:, i, :, None] * k).sum(2) for i in range(4)], 2)
    made_v = torch.stack([(F[:, None, i, :, None] * v).sum(2) for i in range(4)], 2)
    return made_k, made_v, at.new_zeros((len(at), 4))


def small(rng: np.random.Generator, shape: tuple[int, ...], case: Case) -> Array:
    return normal(rng, shape, case) / math.sqrt(max(1, shape[-1]))


STREAMS = (
    replace(mechanism("pools", "mask causal", causal), streams="pool(4, stride = 2)", made=means),
    replace(
        mechanism("tokens-and-pools", "mask causal", causal),
        streams="tokens ++ pool(4, stride = 2)",
        made=beside_means,
    ),
    replace(
        with_inputs("w : float[3, D]  u : float[3]", mechanism("weighed", "mask causal", causal)),
        streams="pool(3, by = w, values = u)",
        made=weighed,
    ),
    replace(
        with_inputs(
            "E : float[4, n]", mechanism("projected", "mask { q, k : stream == 0 or k <= q }", causal)
        ),
        tables={"E": small},
        streams="proj(E) ++ tokens",
        made=projected,
    ),
    replace(
        with_inputs("E : float[H, 4, n]  F : float[B, 4, n]", mechanism("projected-by-head", "", full)),
        tables={"E": small, "F": small},
        streams="proj(E, F)",
        made=projected_by_head,
    ),
)
"""Keys that are made of those given; of slots that stand nowhere the formula reads all."""

WIDE = (
    *VECTORS,
    *FEATURES,
    *LINEAR,
    *TABLES,
    *OPERATORS,
    *DECAYS,
    *SINKS,
    *MULTISETS,
    *SPACES,
    *HEADS,
    *OFFSETS,
    *FLOORS,
)
"""Further mechanisms, for all shapes of tables, operations and clauses."""
MECHANISMS = (*PLAIN, *WIDE)
