"""What a stack costs and sees, layer by layer, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attndsl.analysis.text import line, table
from attndsl.analysis.units import scaled
from attndsl.attention import Attention
from attndsl.backend import DTYPES
from attndsl.errors import AttnError
from attndsl.expr import Expr, const, nodes, substitute
from attndsl.keywords import by_name, checked_dtype
from attndsl.layers.reach import through
from attndsl.meaning.pointwise import evaluate
from attndsl.relations.relation import around
from attndsl.stacks import costs
from attndsl.stacks.costs import NOTHING, Passes, Seen, Sizes
from attndsl.stacks.sizes import check_tables, head_dim_of, plugin_of, remembered, words
from attndsl.stacks.tree import FeedForward, Layers, Reversible, Stack, Sublayer, layers_of
from attndsl.stage import Word

SEARCHED = 256
"""Longest sequence of which pairs are searched for where they are not made of sets of distances."""
TOKENS = 2048
"""Of how many it is followed one by one what memories have seen."""


@dataclass(frozen=True)
class Level:
    """One layer or turn.

    pairs: live pairs, over all heads; None where they depend on tables or on content.
    flops: an addition and a multiplication each, of linear maps and live pairs; None likewise.
    moved: bytes that these must read and write once, with keys and values of the cache in decoding.
    held:  FLOPs of a forward pass for tokens that have left before it: their keys and values.
    kept:  keys that decoding has to keep, and `bytes` of them, with their values.
    sees:  tokens of the input that the last query sees after it, at least and at most, where content decides
           or tokens may have left before; None where it is not known. Of segments it is the last query of
           one, and tokens of those before count.
    saved: bytes that a forward pass keeps for ordinary autograd.
    """

    names: str
    pairs: int | None
    flops: Passes | None
    moved: Passes | None
    held: int
    kept: int
    bytes: int
    sees: tuple[int, int] | None
    saved: int

    @property
    def run_again(self) -> Level:
        """The same where its backward pass begins with a forward pass."""
        flops, moved = (of and of + Passes(0, of.forward, 0) for of in (self.flops, self.moved))
        return replace(self, flops=flops, moved=moved)


@dataclass(frozen=True)
class Activations:
    """Bytes that training keeps of activations, one batch row.

    plain:        by ordinary autograd.
    checkpointed: of each layer its input, and all of one while it is run again.
    reversible:   of two streams, and all of one sublayer while it is undone.
    """

    plain: int
    checkpointed: int
    reversible: int


@dataclass(frozen=True)
class Leaving:
    """A stage that tokens may leave.

    first:  the number of its first level, and how many `turns` there are.
    rows:   whether rows of a batch leave together: they then depend on each other.
    """

    first: int
    turns: int
    rows: bool


@dataclass(frozen=True)
class Depth:
    """A stack at one length, of one batch row. `str` of it is a table.

    levels:      its layers and turns, from the input on; where tokens may leave, as if none did.
    parameters:  numbers that are learned, those that turns share counted once; norms as nn.LayerNorm has
                 them, and without what is given to `build`.
    activations: of training.
    leaving:     stages that tokens may leave before the last turn.
    memory:      keys that attentions read of earlier segments, the most of one.
    formulas:    `parameters` and forward `flops` for other sizes, as sympy reads them: in `n`, `width`, and
                 `depth`, the mean turns of stages that tokens may leave. What has none is missing.
    """

    name: str
    length: int
    levels: tuple[Level, ...]
    parameters: int
    activations: Activations
    leaving: tuple[Leaving, ...] = ()
    memory: int = 0
    formulas: Mapping[str, str] | None = None

    @property
    def flops(self) -> Passes | None:
        """Of all levels; None where one's are not known."""
        return _total(level.flops for level in self.levels)

    @property
    def moved(self) -> Passes | None:
        """Bytes of all levels, likewise."""
        return _total(level.moved for level in self.levels)

    @property
    def bytes(self) -> int:
        """Of keys and values that decoding keeps."""
        return sum(level.bytes for level in self.levels)

    def flops_at(self, depth: float) -> float | None:
        """Of a forward pass whose tokens take `depth` turns on average of each stage that they may leave, all
        of one that has fewer: those that leave are taken to be spread evenly over the sequence."""
        if self.flops is None:
            return None
        total = float(self.flops.forward)
        for stage in self.leaving:
            run = min(depth / stage.turns, 1.0)
            for level in self.levels[stage.first : stage.first + stage.turns]:
                assert level.flops is not None
                total -= (1 - run) * (level.flops.forward - level.held)
        return total

    def __str__(self) -> str:
        """For a terminal."""
        headers = ["layer", "live pairs", "FLOP", "keys kept", "KV cache", "sees"]
        count, shown = len(self.levels), [*rows(self.levels)]
        of_training, formulas = self.activations, self.formulas or {}
        by_width = [formulas[name] for name in ("parameters",) if name in formulas]
        lines = [
            f"{self.name}: {count} layer{'s' * (count != 1)} at {self.length:,} tokens",
            line("parameters", " = ".join([f"{self.parameters:,}", *by_width])),
            line("FLOP", _passes(self.flops, "")),
            line("bytes moved", _passes(self.moved, "B")),
            line("KV cache", f"{scaled(self.bytes, 'B')} of a sequence"),
            line(
                "activations",
                f"{scaled(of_training.plain, 'B')} in training, {scaled(of_training.checkpointed, 'B')} with "
                f"each layer checkpointed, {scaled(of_training.reversible, 'B')} reversible",
            ),
        ]
        if self.memory:
            lines.append(line("memory", f"{self.memory:,} keys before the segment, all of them there"))
        if self.leaving:
            lines.append(line("leaving", self._curve()))
        if any(stage.rows for stage in self.leaving):
            lines.append(line("rows", "those of a batch leave together, and depend on each other"))
        if "flops" in formulas:
            lines.append(line("forward FLOP", formulas["flops"]))
        lines.append(line("sees", "tokens of the input that the last query has seen after a layer"))
        return "\n".join([*lines, "", table(headers, shown)])

    def _curve(self) -> str:
        """FLOPs by mean depth."""
        most = max(stage.turns for stage in self.leaving)
        depths = sorted({1, *(round(most * part / 4) for part in (1, 2, 3)), most} - {0})
        found = [(depth, self.flops_at(depth)) for depth in depths]
        each = ", ".join(f"{_scaled(flops)} of {depth}" for depth, flops in found)
        return f"forward by mean turns: {each}"


def rows(levels: Sequence[Level]) -> Iterator[tuple[str, ...]]:
    """What is shown of `levels`: layer, live pairs, FLOPs, keys kept, their bytes, and what is seen; those
    alike are one."""
    alike: list[tuple[int, int, Level]] = []
    for i, level in enumerate(levels):
        if alike and replace(alike[-1][2], sees=level.sees) == level and alike[-1][2].sees == level.sees:
            alike[-1] = (alike[-1][0], i, level)
        else:
            alike.append((i, i, level))
    for first, last, level in alike:
        number = f"{first}" if first == last else f"{first}-{last}"
        seen = "-" if level.sees is None else "-".join(f"{x:,}" for x in dict.fromkeys(level.sees))
        forward = None if level.flops is None else level.flops.forward
        yield (
            f"{number}  {level.names}", "-" if level.pairs is None else f"{level.pairs:,}", _scaled(forward),
            f"{level.kept:,}", scaled(level.bytes, "B"), seen,
        )  # fmt: skip


def _scaled(value: float | None) -> str:
    return "-" if value is None else scaled(value)


def _passes(found: Passes | None, unit: str) -> str:
    if found is None:
        return "-"
    forward, backward, decode = (scaled(x, unit) for x in (found.forward, found.backward, found.decode))
    return f"{forward} forward, {backward} backward, {decode} for a step of decoding"


def _total(each: Iterator[Passes | None]) -> Passes | None:
    total = NOTHING
    for found in each:
        if found is None:
            return None
        total += found
    return total


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
    length    tokens of a sequence, or of a segment of a stack that remembers
    width     numbers of a position
    heads     query heads of every attention
    kv_heads  heads of keys and values; as many if not given
    head_dim  numbers of a head; width / heads if not given
    dtype     float16, bfloat16, float32 or float64: bytes go by it
    inputs    tables; what depends on one that is missing stays unknown

    Raises AttnError for sizes that do not fit, and an input that no attention has.
    """
    check_tables(stack, inputs)
    of = Sizes(
        heads, kv_heads or heads, head_dim_of(width, heads, head_dim), width, length, checked_dtype(dtype)
    )
    known: dict[tuple[Attention, tuple[Word, ...]], Seen] = {}
    levels, most, least, leaving = list[Level](), list[Step](), list[Step](), list[Leaving]()
    formulas: list[str | None] = []
    undoes = [isinstance(each, Reversible) for each in stack.stages for _ in layers_of([each])]
    for stage, twice in zip(stack.layers, undoes, strict=True):
        if stage.leaves:
            rows = stage.exit is not None and stage.exit.batch == "min"
            leaving.append(Leaving(len(levels), len(stage.turns), rows))
        for t, turn in enumerate(stage.turns):
            found = [
                known.setdefault((sub.what, stage.memory), costs.seen(sub.what, stage.memory, of, inputs))
                if (sub.what, stage.memory) not in known
                else known[sub.what, stage.memory]
                for sub in turn
                if isinstance(sub.what, Attention)
            ]
            bounds = [
                around(substitute(sub.what.any_head(), {"H": const(heads)}))
                for sub in turn
                if isinstance(sub.what, Attention)
            ]
            most += [Step(over, stage.memory) for _, over in bounds]
            if not (stage.leaves and t):
                least += [Step(under, stage.memory) for under, _ in bounds]
            sees = _between(_sees(least, length, False), _sees(most, length, True))
            level = _level(stage, turn, found, of, sees, new=t == 0 or not _shared(stage, t))
            levels.append(level.run_again if twice else level)
            formulas.append(_formula(stage, turn, found, of))
    turns = [(stage, turn) for stage in stack.layers for turn in stage.turns]
    saves, undone = (
        [[count(stage, sub, of) for sub in turn] for stage, turn in turns]
        for count in (costs.saved, costs.undone)
    )
    row = width * length * DTYPES[of.dtype]
    last = 0 if stack.layers[-1].norm == "post" else row + 2 * costs.STATISTICS * length
    activations = Activations(
        sum(map(sum, saves)) + last,
        row * len(saves) + max(map(sum, undone)) + last,
        2 * row + max((one for turn in undone for one in turn), default=0) + last,
    )
    told = Depth(
        stack.name, length, tuple(levels), _parameters(stack, of), activations, tuple(leaving),
        max((remembered(stage.memory) for stage in stack.layers), default=0),
    )  # fmt: skip
    return replace(
        told, formulas=_formulas(stack, of, told, formulas) if of.head_dim * heads == width else None
    )


def _between(least: int | None, most: int | None) -> tuple[int, int] | None:
    return None if least is None or most is None else (least, most)


def _shared(stage: Layers, t: int) -> bool:
    """Whether the weights of a turn are those of the turn before."""
    return [sub.weights for sub in stage.turns[t]] == [sub.weights for sub in stage.turns[t - 1]]


def _level(
    stage: Layers,
    turn: Sequence[Sublayer],
    found: Sequence[Seen],
    of: Sizes,
    sees: tuple[int, int] | None,
    new: bool,
) -> Level:
    every = [linear for sub in turn for linear in costs.maps(sub, of)]
    decided = [(of.width, 1)] * (stage.halting is not None)
    pairs = None if any(one.pairs is None for one in found) else sum(one.pairs or 0 for one in found)
    flops, moved = (
        _total(iter(each)) for each in ([one.flops for one in found], [one.bytes for one in found])
    )
    behind = 0 if any(plugin_of(word).pairs for word in stage.memory) else remembered(stage.memory)
    again = [linear for sub in turn for linear in costs.again(sub, of)]
    anew = [linear for sub in turn if isinstance(sub.what, Attention) for linear in costs.keys(sub, of)]
    if flops is not None:
        flops += costs.linear_flops(anew, behind).of_calls
        flops += costs.linear_flops([*every, *decided], of.length)
        flops += Passes(0, costs.linear_flops(again, of.length).forward, 0)
    if moved is not None:
        moved += costs.linear_bytes([*every, *decided], of.length, of.dtype)
        moved += Passes(0, costs.linear_bytes(again, of.length, of.dtype).forward, 0)
    held = costs.linear_flops(anew, of.length).forward if new or stage.signal else 0
    kept = sum(one.kept for one in found)
    return Level(
        " ".join(sub.name for sub in turn), pairs, flops, moved, held, kept,
        2 * kept * of.kv_heads * of.head_dim * DTYPES[of.dtype], sees,
        sum(costs.saved(stage, sub, of) for sub in turn),
    )  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What an attention relates, and what it remembers."""

    mask: Expr
    memory: tuple[Word, ...]


def _sees(steps: Sequence[Step], length: int, most: bool) -> int | None:
    """How many tokens of the input the last query sees through these, from the input on, or at most."""
    if not steps:
        return 1
    if any(step.memory for step in steps):
        return _remembers(steps, length, most)
    try:
        reached = through([(step.mask, 1) for step in steps])
    except AttnError:
        return None
    if reached.tables or reached.free - {"q", "k", "n"}:
        return None
    if length > SEARCHED and any(node.op == "exists" for node in nodes(reached)):
        return None
    last = np.full(1, length - 1)
    return int(evaluate(substitute(reached, {"n": const(length)}), last, np.arange(length)).sum())


def _remembers(steps: Sequence[Step], length: int, most: bool) -> int | None:
    """Likewise of the last query of a segment behind as many as memories reach back; None beyond `TOKENS`.

    Memories whose keys stand apart are of all tokens between at most, and of none at least.
    """
    behind = [_behind(step.memory) for step in steps]
    segments = 1 + sum(-(-far // length) for _, far in behind)
    tokens = segments * length
    if tokens > TOKENS or any(step.mask.tables or step.mask.free - {"q", "k", "n"} for step in steps):
        return None
    at = np.arange(tokens)
    seen = at == tokens - 1
    for step, (near, far) in reversed([*zip(steps, behind, strict=True)]):
        q, k = at[seen][:, None], at[None]
        begins = q // length * length
        mask = substitute(step.mask, {"n": const(tokens)})
        read = evaluate(mask, q + 0 * k, k + 0 * q) & (k >= begins - near) & (k < begins + length)
        if most:
            read |= (k >= begins - far) & (k < begins - near)
        seen = seen | read.any(0)
    return int(seen.sum())


def _behind(memory: tuple[Word, ...]) -> tuple[int, int]:
    """How far back the keys of a memory stand side by side, and how far it reaches."""
    near = far = 0
    for word in memory:
        many, reach = plugin_of(word).reach(word, far)
        if near == far and reach == far + many:
            near = reach
        far = reach
    return near, far


def _parameters(stack: Stack, of: Sizes) -> int:
    total = sum(int(plugin_of(word).parameters(word, of.width, turns)) for _, word, turns in words(stack))
    return total + costs.norms(stack, of.width) + sum(costs.learned(sub, of) for _, sub in stack.sublayers)


def _formula(stage: Layers, turn: Sequence[Sublayer], found: Sequence[Seen], of: Sizes) -> str | None:
    """FLOPs of a forward pass of a layer, in n and width, heads being as wide as width / heads."""
    total = ["2*n*width" if stage.halting else "0"]
    for sub in turn:
        per = _squares(sub, of)
        total.append(f"2*n*({per})*width**2")
    for one in found:
        if one.formula is None:
            return None
        total.append(f"4*width/{of.heads}*({one.formula})")
    return " + ".join(total)


def _squares(sub: Sublayer, of: Sizes) -> str:
    """Weights of its linear maps in width^2."""
    if isinstance(sub.what, FeedForward):
        return f"2*Rational('{sub.what.times}')"
    ratio = f"Rational({of.kv_heads}, {of.heads})"
    own = sum(1 for _ in sub.own)
    keys = 2 - sub.tied + sum(1 + values for _, values in sub.own)
    return f"2 + {own} + {keys}*{ratio}"


def _formulas(stack: Stack, of: Sizes, found: Depth, each: Sequence[str | None]) -> Mapping[str, str]:
    """Those of a whole stack."""
    import sympy

    n, width, mean = sympy.symbols("n width depth", positive=True)
    told: dict[str, str] = {}
    widths = [of.heads * i for i in range(1, 5)]
    counts = [_parameters(stack, replace(of, width=w, head_dim=w // of.heads)) for w in widths]
    fitted = sympy.interpolate([*zip(widths[:3], counts[:3], strict=True)], width)
    if fitted.subs(width, widths[3]) == counts[3]:
        told["parameters"] = str(sympy.expand(fitted))
    if None not in each:
        names = {"n": n, "width": width, "Rational": sympy.Rational}
        of_level = [sympy.sympify(text, names) for text in each if text is not None]
        apart = {i for stage in found.leaving for i in range(stage.first, stage.first + stage.turns)}
        total = sum((e for i, e in enumerate(of_level) if i not in apart), sympy.Integer(0))
        for stage in found.leaving:
            inside = sum(of_level[stage.first : stage.first + stage.turns], sympy.Integer(0))
            total += mean / stage.turns * inside
        told["flops"] = str(sympy.expand(total))
    return told
