"""What sublayers of a stack cost and keep, by their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attndsl.analysis.report import analyze
from attndsl.attention import Attention
from attndsl.backend import DTYPES
from attndsl.stacks.sizes import remembered
from attndsl.stacks.tree import FeedForward, Layers, Stack, Sublayer
from attndsl.stage import Word

NORMS = {"pre": 1, "post": 1, "sandwich": 2}
STATISTICS = 4
"""Bytes of the mean of a norm, of its deviation, and of the sum of a softmax."""


@dataclass(frozen=True)
class Sizes:
    """What a stack is asked about with: heads of an attention, numbers of a head and of a position, tokens of
    a sequence."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    length: int
    dtype: str

    @property
    def named(self) -> dict[str, int]:
        """By the names of axes."""
        return {"H": self.heads, "D": self.head_dim, "n": self.length}


@dataclass(frozen=True)
class Passes:
    """Of a forward pass, of a backward pass, and of a step of decoding."""

    forward: int
    backward: int
    decode: int

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward, self.backward + other.backward, self.decode + other.decode
        )

    @property
    def of_calls(self) -> Passes:
        """Without decoding, which has done it before."""
        return replace(self, decode=0)


NOTHING = Passes(0, 0, 0)


@dataclass(frozen=True)
class Seen:
    """Of an attention: live pairs over all heads, and the formula of them in n; FLOPs and bytes of its own;
    keys that decoding keeps. None where tables or content decide."""

    pairs: int | None
    formula: str | None
    flops: Passes | None
    bytes: Passes | None
    kept: int


def seen(what: Attention, memory: tuple[Word, ...], of: Sizes, inputs: Mapping[str, Any]) -> Seen:
    """At the length, behind a memory that is full; its keys as if they stood side by side, where they do not,
    which is the most."""
    names = {table.name for table in what.inputs}
    given = {name: value for name, value in inputs.items() if name in names}
    behind = remembered(memory)
    report = analyze(
        what, length=of.length + behind, q_length=of.length, heads=of.heads, kv_heads=of.kv_heads,
        head_dim=of.head_dim, dtype=of.dtype, parts=("nnz", "kv_cache", "cost"), **given,
    )  # fmt: skip
    nnz, cost, cache = (report.findings.get(name) for name in ("nnz", "cost", "kv_cache"))
    kept = of.length + behind if cache is None or behind else cache.minimum
    if nnz is None or nnz.nnz.value is None or cost is None:
        return Seen(None, None, None, None, kept)
    flops, moved = (Passes(x.forward, x.backward, x.decode) for x in (cost.flops, cost.bytes))
    return Seen(nnz.nnz.value, None if behind else nnz.nnz.formula, flops, moved, kept)


def maps(sublayer: Sublayer, of: Sizes) -> list[tuple[int, int]]:
    """Its linear maps, each from so many numbers to so many."""
    if isinstance(what := sublayer.what, FeedForward):
        inner = round(what.times * of.width)
        return [(of.width, inner), (inner, of.width)]
    q, k = of.heads * of.head_dim, of.kv_heads * of.head_dim
    own = [(of.width, size) for _, values in sublayer.own for size in (q, k, *[k] * values)]
    return [(of.width, q), *[(of.width, k)] * (2 - sublayer.tied), (q, of.width), *own]


def again(sublayer: Sublayer, of: Sizes) -> list[tuple[int, int]]:
    """The linear maps that a backward pass applies again: of a feed-forward layer in pieces the first."""
    what = sublayer.what
    return maps(sublayer, of)[:1] if isinstance(what, FeedForward) and what.chunks > 1 else []


def keys(sublayer: Sublayer, of: Sizes) -> list[tuple[int, int]]:
    """The linear maps that make its keys and values."""
    k = (of.width, of.kv_heads * of.head_dim)
    return [k] * (2 + sum(1 + values for _, values in sublayer.own))


def linear_flops(each: Iterable[tuple[int, int]], tokens: int) -> Passes:
    """Two for each weight and token; twice as many backward."""
    weights = sum(2 * a * b for a, b in each)
    return Passes(tokens * weights, 2 * tokens * weights, weights)


def linear_bytes(each: Iterable[tuple[int, int]], tokens: int, dtype: str) -> Passes:
    """What must be read and written once: input, weights and output; backward both gradients too."""
    size, found = DTYPES[dtype], NOTHING
    for a, b in each:
        forward, backward = tokens * (a + b) + a * b, tokens * (2 * a + b) + 2 * a * b
        found += Passes(size * forward, size * backward, size * (a + b + a * b))
    return found


def saved(stage: Layers, sublayer: Sublayer, of: Sizes) -> int:
    """Bytes that a forward pass keeps of it for ordinary autograd."""
    size, tokens = DTYPES[of.dtype], of.length
    statistics = 2 * STATISTICS * NORMS[stage.norm]
    numbers = of.width * (1 + NORMS[stage.norm])
    if isinstance(what := sublayer.what, FeedForward):
        numbers += 2 * round(what.times * of.width) if what.chunks == 1 else 0
    else:
        q, k = of.heads * of.head_dim, of.kv_heads * of.head_dim
        parts = max(len(what.parts), 1)
        own = sum(q + k + k * values for _, values in sublayer.own)
        numbers += (2 + parts) * q + (2 - sublayer.tied) * k + own
        statistics += STATISTICS * of.heads * parts
    return tokens * (size * numbers + statistics)


def undone(stage: Layers, sublayer: Sublayer, of: Sizes) -> int:
    """Bytes of what `saved` counts, and of the inside of one piece where there are pieces: the most that its
    own backward pass needs."""
    inside = sum(inner for _, inner in again(sublayer, of))
    if not inside:
        return saved(stage, sublayer, of)
    assert isinstance(sublayer.what, FeedForward)
    piece = math.ceil(of.length / sublayer.what.chunks)
    return saved(stage, sublayer, of) + 2 * piece * inside * DTYPES[of.dtype]


def learned(sublayer: Sublayer, of: Sizes) -> int:
    """Numbers of its weights, norms apart."""
    found = sum(a * b for a, b in maps(sublayer, of))
    if isinstance(what := sublayer.what, FeedForward):
        return found + round(what.times * of.width) + of.width
    return found + sum(math.prod(shape) for shape in _shapes(what, of.named))


def _shapes(what: Attention, sizes: Mapping[str, int]) -> Iterator[list[int]]:
    tables = (table for one in (what, *(part.attention for part in what.parts)) for table in one.learned)
    return ([sizes[dim] if isinstance(dim, str) else dim for dim in t.dims] for t in tables if t.learned)


def norms(stack: Stack, width: int) -> int:
    """Numbers of all norms."""
    last = 0 if stack.layers[-1].norm == "post" else 1
    return 2 * width * (last + sum(NORMS[stage.norm] for stage, _ in stack.sublayers))
