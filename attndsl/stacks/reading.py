"""From syntax to stages: words, names and numbers of a stack resolved, each layer with its `layer` bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, cast, get_args

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import AttnError, Diagnostic, fail, suggest
from attndsl.language.arguments import bind_arguments, bind_arguments_of
from attndsl.language.elaborate import Elaborator
from attndsl.language.values import TOKENS, Num, Scope, Value, attention_named
from attndsl.stacks.tree import FeedForward, Halting, Layers, Norm, Sublayer
from attndsl.syntax import nodes as ast

LAYER_LIMIT = 1024
TURN = {"layers": "layer", "loop": "turn"}
"""What the stages have so many of."""

USAGE = {
    "layers": "layers(N) { ... }",
    "loop": "loop(N) { ... }",
    "act": "loop(act(eps = 0.01), max = N) { ... }",
    "cycle": "cycle { a  a  b }",
    "share": "share { ... }",
    "ffn": "ffn(4)",
}
"""How the words of stages are written."""

YOURS = "a stack has neither embedding nor readout: they stand around the module, and are yours"
CLAUSE = "a layer names attentions: write `attention NAME { mask ... }` before the stack, and `NAME` here"
NORMS = "norms are there already: `layers(N, norm = pre)` says where they stand"
HABITS = {
    **dict.fromkeys(("mlp", "ff", "feedforward", "feed_forward", "dense", "linear"), "write `ffn(4)`"),
    **dict.fromkeys(("embed", "embedding", "embeddings", "readout", "unembed", "lm_head", "head"), YOURS),
    **dict.fromkeys(("mask", "score", "decay", "keys", "inputs"), CLAUSE),
    **dict.fromkeys(("norm", "layernorm", "layer_norm", "rmsnorm", "rms_norm"), NORMS),
    "dropout": "leave it out: a stack drops nothing",
    "repeat": "write `layers(N) { ... }`, or `loop(N) { ... }`",
}
"""Words of other tools, and what is written here."""
WIDEST = 64
"""Times that a feed-forward layer may be as wide inside: more is meant to be a number of units."""


@dataclass(frozen=True)
class Reading:
    """A stack being read: `weights` numbers sets of weights, and `known` holds those that turns share."""

    elaborator: Elaborator
    env: Scope
    weights: Callable[[], int]
    known: dict[int, int]


def read(elaborator: Elaborator, item: ast.StackDef, env: Scope) -> tuple[Layers, ...]:
    """The stages of a stack with its parameters in `env`. Raises AttnError."""
    reading = Reading(elaborator, replace(env, integral=False), count().__next__, {})
    return tuple(stage(reading, each) for each in item.stages)


def stage(reading: Reading, e: ast.Stage) -> Layers:
    """What stands in the braces of a stack."""
    word = e.name.id
    if word not in ("layers", "loop"):
        inside = word in USAGE or word in reading.elaborator.definitions
        help = (
            f"write `layers(1) {{ {e.span.text} }}`"
            if inside and e.body is None
            else "it stands in `layers(N) { ... }`"
        )
        if not inside:
            raise unknown(reading, e, ("layers", "loop"))
        raise fail(f"`{word}` is no stage of a stack", e.name.span, help)
    optional = ("max", "norm") if word == "loop" else ("norm",)
    given = bind_arguments_of(word, ("N",), optional, call(e), USAGE[word])
    halts = halting(reading, given["N"]) if word == "loop" else None
    counted = given["N"] if halts is None else given.get("max")
    if counted is None:
        raise fail("a loop that halts has a last turn", given["N"].span, f"write `{USAGE['act']}`")
    if halts is None and "max" in given:
        raise fail("`max` is of a loop that halts", given["max"].span, f"write `{USAGE['act']}`")
    turns = reading.elaborator.constant(counted, reading.env, TOKENS, "the number of layers")
    if not 1 <= turns <= LAYER_LIMIT:
        raise fail(f"{turns} {TURN[word]}s", counted.span, f"from 1 to {LAYER_LIMIT:,}")
    body = braces(e)
    layers = []
    for layer in range(turns):
        env = reading.env.bind(layer=Num(ir.const(layer)))
        inner = replace(reading, env=env)
        layers.append(tuple(sub for part in body for sub in sublayers(inner, part, layer, False)))
    return Layers(cast("Literal['layers', 'loop']", word), tuple(layers), norm(given.get("norm")), halts)


def halting(reading: Reading, e: ast.Expression) -> Halting | None:
    """How tokens leave a loop, None of a number of turns."""
    made = e if isinstance(e, ast.Call) else ast.Call(e, (), span=e.span)
    if not isinstance(made.func, ast.Name) or made.func.id != "act":
        return None
    given = bind_arguments_of("act", (), ("eps",), made, USAGE["act"])
    if "eps" not in given:
        return Halting(0.01)
    eps = ir.number(reading.elaborator.num(given["eps"], reading.env, TOKENS))
    if eps is None or not 0 < eps < 1:
        raise fail("`eps` is what may be left of the sum of 1: between 0 and 1", given["eps"].span)
    return Halting(float(eps))


def norm(e: ast.Expression | None) -> Norm:
    if e is None:
        return "pre"
    words = get_args(Norm)
    if isinstance(e, ast.Name) and e.id in words:
        return cast("Norm", e.id)
    raise fail(
        f"expected one of {', '.join(words)}",
        e.span,
        "norms stand before each sublayer, or after it, or both",
    )


def sublayers(reading: Reading, e: ast.Stage, layer: int, shared: bool) -> tuple[Sublayer, ...]:
    """What a layer is made of; `shared`: its weights are those of every turn."""
    word = e.name.id
    if word in ("cycle", "share"):
        bind_arguments_of(word, (), (), call(e), USAGE[word])
        parts = braces(e)
        if word == "cycle":
            return sublayers(reading, parts[layer % len(parts)], layer, shared)
        if shared:
            raise fail("`share` stands in `share`", e.name.span)
        return tuple(sub for part in parts for sub in sublayers(reading, part, layer, True))
    if e.body is not None:
        if word in USAGE:
            raise fail(f"`{word}` stands in the braces of a stack, not of a layer", e.name.span)
        raise fail(f"`{word}` takes no braces", e.body[0].span)
    if word == "ffn":
        return (weighted(reading, feed_forward(reading, e), e, shared),)
    definition = reading.elaborator.definitions.get(word)
    if definition is None:
        raise unknown(reading, e, ("cycle", "share", "ffn"))
    if isinstance(definition, ast.Definition) and definition.word != "pattern":
        raise fail(f"`{word}` is a {definition.word}, and a layer is made of attentions", e.name.span)
    values = reading.elaborator.arguments(definition, e.args, reading.env, TOKENS)
    given = bind_arguments(definition, e.args)
    for name, argument in given.items():
        beyond(values[name], argument, layer)
    value = reading.elaborator.instance(definition, values, reading.env, e.span, given=given)
    return (weighted(reading, Sublayer(word, attention_named(word, value), -1), e, shared),)


def beyond(value: Value, e: ast.Expression, layer: int) -> None:
    """Refuses a list that has no entry for a layer."""
    for node in ir.nodes(value.expr) if isinstance(value, Num) else ():
        if node.op == "lookup" and (index := ir.number(node.args[0])) is not None:
            raise fail(
                f"{node.value} has no entry {index}, which layer {layer} reads", e.span, "layers count from 0"
            )


def weighted(reading: Reading, made: Sublayer, e: ast.Stage, shared: bool) -> Sublayer:
    if not shared:
        return replace(made, weights=reading.weights(), written=e.span)
    if id(e) not in reading.known:
        reading.known[id(e)] = reading.weights()
    return replace(made, weights=reading.known[id(e)], written=e.span)


def feed_forward(reading: Reading, e: ast.Stage) -> Sublayer:
    given = bind_arguments_of("ffn", (), ("times", "chunks"), call(e), "ffn(4, chunks = 1)")
    times = 4.0
    if "times" in given:
        number = ir.number(reading.elaborator.num(given["times"], reading.env, TOKENS))
        if number is None or number <= 0:
            raise fail("how many times as wide it is inside is a positive number", given["times"].span)
        if number > WIDEST:
            raise fail(
                f"{number} times as wide inside", given["times"].span, "it is a factor: write `ffn(4)`"
            )
        times = float(number)
    chunks = 1
    if "chunks" in given:
        chunks = reading.elaborator.constant(given["chunks"], reading.env, TOKENS, "the number of chunks")
        if chunks < 1:
            raise fail(f"{chunks} chunks", given["chunks"].span, "one or more")
    return Sublayer("ffn", FeedForward(times, chunks), -1)


def call(e: ast.Stage) -> ast.Call:
    return ast.Call(e.name, e.args, span=e.span)


def braces(e: ast.Stage) -> tuple[ast.Stage, ...]:
    if e.body is None:
        raise fail(f"`{e.name.id}` has its layers in braces", e.span, f"write `{USAGE[e.name.id]}`")
    return e.body


def unknown(reading: Reading, e: ast.Stage, words: tuple[str, ...]) -> AttnError:
    if e.name.id in reading.elaborator.broken or not reading.elaborator.whole:
        return AttnError()
    if e.name.id in reading.elaborator.stacks:
        raise fail(f"`{e.name.id}` is a stack, and stands in no other", e.name.span)
    known = [*words, *(name for name, item in reading.elaborator.definitions.items() if is_attention(item))]
    help = HABITS.get(e.name.id.lower()) or suggest(e.name.id, known)
    return fail(f"unknown name `{e.name.id}`", e.name.span, help)


def warnings(item: ast.StackDef, stages: tuple[Layers, ...]) -> Iterator[Diagnostic]:
    """Parts of a cycle that no layer takes, and attentions that relate nothing in one."""
    from attndsl.language.idle import relates_nothing

    for written, made in zip(item.stages, stages, strict=True):
        count = len(made.turns)
        cycles = (e for e in ast.walk(written) if isinstance(e, ast.Stage) and e.name.id == "cycle")
        for part in (part for e in cycles for part in (e.body or ())[count:]):
            many = f"there {'are' if count > 1 else 'is'} {count}"
            yield Diagnostic(f"no {TURN[made.word]} takes this: {many}", part.span, "", "warning")
        every = {sub.what for turn in made.turns for sub in turn if isinstance(sub.what, Attention)}
        empty = {what for what in every if relates_nothing(what)}
        at = ((i, sub.written) for i, turn in enumerate(made.turns) for sub in turn if sub.what in empty)
        first = {span: i for i, span in reversed([*at])}
        for span, layer in first.items():
            said = f"in {TURN[made.word]} {layer} no query has a key"
            yield Diagnostic(said, span, f"{TURN[made.word]}s count from 0", "warning")


def is_attention(item: ast.Definition | ast.AttentionDef) -> bool:
    return isinstance(item, ast.AttentionDef) or item.word == "pattern"


def masks(stages: tuple[Layers, ...]) -> tuple[ir.Expr, ...]:
    """What some head of each attention relates, from the input on."""
    every = (sub.what for stage in stages for turn in stage.turns for sub in turn)
    return tuple(what.any_head() for what in every if isinstance(what, Attention))
