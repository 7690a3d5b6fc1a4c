"""What a stack costs and sees, layer by layer, without weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attndsl.analysis.report import analyze
from attndsl.analysis.text import line, table
from attndsl.analysis.units import scaled
from attndsl.attention import Attention
from attndsl.backend import DTYPES
from attndsl.errors import AttnError
from attndsl.expr import TRUE, Expr, const, substitute
from attndsl.keywords import by_name, checked_dtype
from attndsl.layers.reach import through
from attndsl.meaning.pointwise import evaluate
from attndsl.stacks.sizes import check_tables, head_dim_of, plugin_of, words
from attndsl.stacks.tree import FeedForward, Stack, Sublayer


@dataclass(frozen=True)
class Level:
    """One layer or turn.

    pairs: live pairs, over all heads; None where they depend on tables or on content.
    flops: of a forward pass, an addition and a multiplication each; None likewise.
    kept:  keys that decoding has to keep, and `bytes` of them, with their values.
    sees:  keys of the input that the last query sees after it; None where it is not known.
    """

    names: str
    pairs: int | None
    flops: int | None
    kept: int
    bytes: int
    sees: int | None


@dataclass(frozen=True)
class Depth:
    """A stack at one length, of one batch row. `str` of it is a table.

    levels:     its layers and turns, from the input on; of a loop that halts all turns, the most.
    parameters: numbers that are learned, those that turns share counted once; norms as nn.LayerNorm has them.
    halts:      whether tokens may leave before the last turn.
    """

    name: str
    length: int
    levels: tuple[Level, ...]
    parameters: int
    halts: bool = False

    @property
    def flops(self) -> int | None:
        """Of a forward pass; None where a layer's are not known."""
        each = [level.flops for level in self.levels]
        return None if None in each else sum(flops for flops in each if flops is not None)

    @property
    def bytes(self) -> int:
        """Of keys and values that decoding keeps."""
        return sum(level.bytes for level in self.levels)

    def __str__(self) -> str:
        """For a terminal."""
        rows = [
            (
                f"{i}  {level.names}", _known(level.pairs, "{:,}"), _scaled(level.flops), f"{level.kept:,}",
                scaled(level.bytes, "B"), _known(level.sees, "{:,}"),
            )
            for i, level in enumerate(self.levels)
        ]  # fmt: skip
        headers = ["layer", "live pairs", "FLOP", "keys kept", "KV cache", "sees"]
        return "\n".join(
            [
                f"{self.name}: {len(self.levels)} layers at {self.length:,} tokens",
                line("parameters", f"{self.parameters:,}"),
                line("FLOP", f"{_scaled(self.flops)} forward{', at most: tokens may halt' * self.halts}"),
                line("KV cache", f"{scaled(self.bytes, 'B')} of a sequence"),
                line("sees", "keys of the input that the last query has seen after a layer"),
                "",
                table(headers, rows),
            ]
        )


def _known(value: int | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _scaled(value: int | None) -> str:
    return "-" if value is None else scaled(value)


@by_name
def depth(
    stack: Stack,
    *,
    length: int,
    width: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    dtype: str = "float32",
    **inputs: Any,
) -> Depth:
    """What a stack costs and sees at `length` tokens, as `attndsl.build` would make it.

    stack     one of a program, its parameters bound
    length    tokens of a sequence
    width     numbers of a position
    heads     query heads of every attention
    kv_heads  heads of keys and values; as many if not given
    head_dim  numbers of a head; width / heads if not given
    dtype     float16, bfloat16, float32 or float64: bytes go by it
    inputs    tables; what depends on one that is missing stays unknown

    Raises AttnError for sizes that do not fit, and an input that no attention has.
    """
    check_tables(stack, inputs)
    dtype = checked_dtype(dtype)
    of: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "head_dim": head_dim_of(width, heads, head_dim),
    }
    projections = width * of["head_dim"] * 2 * (of["heads"] + of["kv_heads"])
    known: dict[Attention, tuple[int | None, int]] = {}
    levels, masks = [], list[Expr]()
    of_turn = [stage for stage in stack.layers for _ in stage.turns]
    for turn, stage in zip(stack.turns, of_turn, strict=True):
        pairs: int | None = 0
        kept, weights = 0, width * (stage.halting is not None)
        for sublayer in turn:
            what = sublayer.what
            if isinstance(what, FeedForward):
                weights += 2 * width * round(what.times * width)
                continue
            if what not in known:
                names = {table.name for table in what.inputs}
                given = {name: value for name, value in inputs.items() if name in names}
                report = analyze(what, length=length, dtype=dtype, parts=("nnz", "kv_cache"), **of, **given)
                nnz, cache = report.findings.get("nnz"), report.findings.get("kv_cache")
                known[what] = nnz and nnz.nnz.value, cache.minimum if cache else length
            live, keys = known[what]
            pairs = None if pairs is None or live is None else pairs + live
            kept, weights = kept + keys, weights + projections
            masks.append(what.any_head())
        if stage.exit is not None and plugin_of(stage.exit.rule).leaving(stage.exit.rule).whole:
            masks.append(TRUE)
        flops = None if pairs is None else 2 * length * weights + 4 * of["head_dim"] * pairs
        held = 2 * kept * of["kv_heads"] * of["head_dim"] * DTYPES[dtype]
        named = " ".join(sublayer.name for sublayer in turn)
        levels.append(Level(named, pairs, flops, kept, held, _sees(masks, length)))
    sizes = {"H": heads, "D": of["head_dim"], "n": length}
    parameters = _parameters(stack, width, projections, sizes)
    return Depth(stack.name, length, tuple(levels), parameters, any(stage.leaves for stage in stack.layers))


def _sees(masks: list[Expr], length: int) -> int | None:
    """How many keys the last query sees through these, from the input on."""
    if not masks:
        return 1
    try:
        reached = through([(mask, 1) for mask in masks])
    except AttnError:
        return None
    if reached.tables or reached.free - {"q", "k", "n"}:
        return None
    last = np.full(1, length - 1)
    return int(evaluate(substitute(reached, {"n": const(length)}), last, np.arange(length)).sum())


def _parameters(stack: Stack, width: int, projections: int, sizes: Mapping[str, int]) -> int:
    norms = {"pre": 1, "post": 1, "sandwich": 2}
    total = sum(int(plugin_of(word).parameters(word, width, *of)) for _, word, of in words(stack))
    total += 0 if stack.layers[-1].norm == "post" else 2 * width
    for stage, sublayer in stack.sublayers:
        total += norms[stage.norm] * 2 * width + _own(sublayer, width, projections, sizes)
    return total


def _own(sublayer: Sublayer, width: int, projections: int, sizes: Mapping[str, int]) -> int:
    if isinstance(what := sublayer.what, FeedForward):
        inner = round(what.times * width)
        return 2 * width * inner + inner + width
    tables = (table for one in (what, *(part.attention for part in what.parts)) for table in one.learned)
    shapes = ([sizes[dim] if isinstance(dim, str) else dim for dim in t.dims] for t in tables if t.learned)
    return projections + sum(map(math.prod, shapes))
