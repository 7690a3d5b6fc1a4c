"""From syntax to stages: words, names and numbers of a stack resolved, each layer with its `layer` bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, cast, get_args

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import AttnError, Diagnostic, fail, suggest
from attndsl.language.arguments import bind_arguments, bind_arguments_of
from attndsl.language.elaborate import Elaborator
from attndsl.language.values import TOKENS, Num, Scope, Value, attention_named
from attndsl.stacks.tree import Exit, FeedForward, Layers, Norm, Reversible, Sublayer, layers_of
from attndsl.stage import Argument, Memory, Role, Stage, Word
from attndsl.stage import Exit as Leaving
from attndsl.syntax import nodes as ast

LAYER_LIMIT = 1024
TURN = {"layers": "layer", "loop": "turn"}
"""What the stages have so many of."""

USAGE = {
    "layers": "layers(N) { ... }",
    "loop": "loop(N) { ... }",
    "reversible": "reversible { layers(N) { ... } }",
    "memory": "memory(xl(512)) { layers(N) { ... } }",
    "cycle": "cycle { a  a  b }",
    "share": "share { ... }",
    "tied": "tied { ATTENTION }",
    "own": "own(PART, PART = qk) { SUM }",
    "ffn": "ffn(4)",
    "exit": "exit(margin, threshold = 0.9)",
}
"""How the words of stages are written."""
HALTS = "loop({}, max = N) {{ ... }}"
STAGES = ("layers", "loop", "reversible", "memory")
"""What stands in the braces of a stack."""
EXIT = ("threshold", "decay", "scaled", "batch")
AT_END = ir.sub(ir.var("n"), ir.var("nq"))
"""Where queries are if nothing is said."""
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
    """A stack being read: `weights` numbers sets of weights, and `known` holds those that turns share.

    memory, reversible: what the braces around say.
    """

    elaborator: Elaborator
    env: Scope
    weights: Callable[[], int]
    known: dict[int, int]
    memory: tuple[Word, ...] = ()
    reversible: bool = False


def read(elaborator: Elaborator, item: ast.StackDef, env: Scope) -> tuple[Layers | Reversible, ...]:
    """The stages of a stack with its parameters in `env`. Raises AttnError."""
    reading = Reading(elaborator, replace(env, integral=False), count().__next__, {})
    return tuple(made for each in item.stages for made in stage(reading, each))


def stage(reading: Reading, e: ast.Stage) -> tuple[Layers | Reversible, ...]:
    """What stands in the braces of a stack."""
    match e.name.id:
        case "layers" | "loop":
            return (layers(reading, e),)
        case "reversible":
            return (reversible(reading, e),)
        case "memory":
            inner = remembering(reading, e)
            return tuple(made for each in braces(e) for made in stage(inner, each))
    word = e.name.id
    if not (word in USAGE or word in reading.elaborator.definitions):
        raise unknown(reading, e, STAGES)
    own = e.body is None and word != "exit"
    help = f"write `layers(1) {{ {e.span.text} }}`" if own else "it stands in `layers(N) { ... }`"
    raise fail(f"`{word}` is no stage of a stack", e.name.span, help)


def layers(reading: Reading, e: ast.Stage) -> Layers:
    word = e.name.id
    optional = ("max", "norm", "signal") if word == "loop" else ("norm",)
    given = bind_arguments_of(word, ("N",), optional, call(e), USAGE[word])
    halts = halting(reading, given["N"], "max" in given) if word == "loop" else None
    counted = given["N"] if halts is None else given.get("max")
    if counted is None:
        assert halts is not None
        help = f"write `{HALTS.format(given['N'].span.text)}`"
        raise fail("a loop that halts has a last turn", given["N"].span, help)
    if halts is None and "max" in given:
        raise fail("`max` is of a loop that halts", given["max"].span, f"write `{HALTS.format('act')}`")
    if halts and reading.reversible:
        raise fail(
            "tokens that halt cannot be undone", given["N"].span, "inside `reversible` all run as long"
        )
    turns = reading.elaborator.constant(counted, reading.env, TOKENS, "the number of layers")
    if not 1 <= turns <= LAYER_LIMIT:
        raise fail(f"{turns} {TURN[word]}s", counted.span, f"from 1 to {LAYER_LIMIT:,}")
    *body, last = braces(e)
    exits = leaving(reading, last) if last.name.id == "exit" else None
    if exits and halts:
        raise fail("a loop that halts has no exit", last.span, "tokens leave it where they halt")
    if exits and not body:
        raise fail("nothing stands before the exit", last.span)
    body = body if exits else [*body, last]
    made = []
    for layer in range(turns):
        env = reading.env.bind(layer=Num(ir.const(layer)))
        inner = replace(reading, env=env)
        made.append(tuple(sub for part in body for sub in sublayers(inner, part, layer, False)))
    found = Layers(
        cast("Literal['layers', 'loop']", word), tuple(made), norm(given.get("norm")), halts, exits,
        reading.memory, signal(reading, given.get("signal")),
    )  # fmt: skip
    for sub in (sub for turn in made for sub in turn):
        if reading.memory and isinstance(sub.what, Attention):
            for one in (sub.what, *(part.attention for part in sub.what.parts)):
                behind_memory(sub, one)
        if sub.own and any(of_memory(word).pairs for word in reading.memory):
            said = f"`{sub.name}` has keys of its own beside those that the memory holds"
            raise fail(said, sub.written, "write `xl(m)`, of whose states all keys are made")
    if reading.reversible and found.norm == "post":
        raise fail("what is normed after the sum cannot be undone", given["norm"].span, "write `norm = pre`")
    return found


def behind_memory(sub: Sublayer, of: Attention) -> None:
    """Raises AttnError for an attention, or a part of one, whose keys cannot be those of a memory: any of
    those before the queries."""
    from attndsl.execution import registry

    take_out = "take it out of the braces"
    if of.streams:
        said = f"`{sub.name}` says what its keys are, and so does the memory around it"
        raise fail(said, sub.written, f"leave out its `keys`, or {take_out}")
    if of.offset not in (None, AT_END):
        said = f"`{sub.name}` says where its queries are, and so does the memory around it"
        raise fail(said, sub.written, f"leave out its `offset`, or {take_out}")
    if of.approx is not None and of.approx.kind == "nystrom":
        said = (
            f"`{sub.name}` has landmarks of as many queries as keys, and behind a memory there are more keys"
        )
        raise fail(said, sub.written, take_out)
    for origin in (table.origin for table in of.selected):
        assert isinstance(origin, ir.Selected)
        if registry.plugin("selections", origin.selection).kind != "list":
            said = f"`{origin.selection}` of `{sub.name}` sorts all keys, and a memory has but some"
            raise fail(said, sub.written, f"choose by `topk`, or {take_out}")
        if (origin.rows, origin.unit) != (1, 1):
            said = f"`{origin.selection}` of `{sub.name}` chooses among blocks, of which a memory has pieces"
            raise fail(said, sub.written, f"choose keys: `of = causal`, or {take_out}")


def reversible(reading: Reading, e: ast.Stage) -> Reversible:
    bind_arguments_of("reversible", (), (), call(e), USAGE["reversible"])
    inner = replace(reading, reversible=True)
    made = []
    for each in braces(e):
        if each.name.id in ("memory", "reversible"):
            help = "memory stands around it: `memory(xl(512)) { reversible { ... } }`"
            raise fail(
                f"`{each.name.id}` stands in `reversible`", each.name.span, help * (each.name.id == "memory")
            )
        made += [found for found in stage(inner, each) if isinstance(found, Layers)]
    return Reversible(tuple(made))


def remembering(reading: Reading, e: ast.Stage) -> Reading:
    """Inside the braces of a memory."""
    if reading.memory:
        raise fail("`memory` stands in `memory`", e.name.span, "name both in one: `memory(xl(512), ...)`")
    if not e.args:
        raise fail("`memory` needs what it remembers by", e.span, f"write `{USAGE['memory']}`")
    for argument in e.args:
        if argument.name:
            raise fail("`memory` takes words, the nearest memory first", argument.span, USAGE["memory"])
    words = tuple(registered(reading, argument.value, "memory") for argument in e.args)
    pairs = {of_memory(word).pairs for word in words}
    if len(pairs) > 1:
        said = " and ".join(f"`{word.name}`" for word in words)
        raise fail(
            f"{said} are in one memory", e.span, "one holds states, the other keys and values as they were"
        )
    return replace(reading, memory=words)


def halting(reading: Reading, e: ast.Expression, limited: bool) -> Word | None:
    """How tokens leave a loop, None of a number of turns; `limited`: whether there is a last turn."""
    func = e.func if isinstance(e, ast.Call) else e
    if not isinstance(func, ast.Name) or func.id in reading.env.names:
        return None
    if func.id not in of_role("halting") and not limited:
        return None
    return registered(reading, e, "halting")


def leaving(reading: Reading, e: ast.Stage) -> Exit:
    """`exit(rule, threshold = ...)`."""
    if e.body is not None:
        raise fail("`exit` takes no braces", e.body[0].span, f"write `{USAGE['exit']}`, last in a layer")
    if reading.reversible:
        raise fail("tokens that leave cannot be undone", e.span, "inside `reversible` there is no exit")
    given = bind_arguments_of("exit", ("rule",), EXIT, call(e), USAGE["exit"])
    rule = registered(reading, given["rule"], "exit")
    plugin = cast("Leaving", of_role("exit")[rule.name])
    if plugin.needs_threshold and "threshold" not in given:
        raise fail(f"`{rule.name}` has no threshold", e.span, f"write `exit({rule.name}, threshold = 0.9)`")
    numbers: dict[str, float | None] = {"threshold": None, "decay": None}
    for name, value in ((name, given[name]) for name in numbers if name in given):
        number = ir.number(reading.elaborator.num(value, reading.env, TOKENS))
        if number is None or number < 0 or (name == "threshold" and not plugin.falls and number > 1):
            size = "from 0 to 1" if name == "threshold" and not plugin.falls else "of 0 or more"
            raise fail(f"the {name} is a number {size}", value.span)
        numbers[name] = float(number)
    if "decay" in given and (plugin.falls or "threshold" not in given):
        why = "less of it is surer" if plugin.falls else "there is none"
        raise fail(
            "a threshold that falls makes tokens leave sooner", given["decay"].span, f"{why}: leave it out"
        )
    scaled = "scaled" in given and bool(argument(reading, given["scaled"], "bool"))
    if scaled and "decay" not in given:
        raise fail("`scaled` is of a decay", given["scaled"].span, "write `decay = 4` too")
    batch = given.get("batch")
    if batch is not None and not (isinstance(batch, ast.Name) and batch.id in ("each", "min")):
        raise fail("expected `each` or `min`", batch.span, "with `min` rows leave together")
    coupled: Literal["each", "min"] = "min" if isinstance(batch, ast.Name) and batch.id == "min" else "each"
    return Exit(rule, numbers["threshold"], numbers["decay"], scaled, coupled)


def of_memory(word: Word) -> Memory:
    return cast("Memory", of_role("memory")[word.name])


def of_role(role: Role) -> Mapping[str, Stage]:
    """The words that may stand for it."""
    from attndsl.execution import registry

    found: dict[str, Stage] = registry.usable("stages")
    return {name: plugin for name, plugin in found.items() if plugin.role == role}


def registered(reading: Reading, e: ast.Expression, role: Role) -> Word:
    """A word with its arguments, those that are left out by their defaults."""
    made = e if isinstance(e, ast.Call) else ast.Call(e, (), span=e.span)
    words = of_role(role)
    if not isinstance(made.func, ast.Name):
        raise fail("expected a word", e.span, _one_of(words))
    name = made.func.id
    if name not in words:
        from attndsl.execution import registry

        if name in registry.names("stages"):
            registry.plugin("stages", name)  # which says why it cannot be used
        help = suggest(name, words) or _one_of(words)
        raise fail(f"`{name}` is no word of {ROLES[role]}", made.func.span, help)
    parameters = parameters_of(words[name])
    needed = tuple(n for n, p in parameters.items() if p.default is p.empty)
    optional = tuple(n for n in parameters if n not in needed)
    given = bind_arguments_of(name, needed, optional, made, usage(name, words[name]))
    arguments = tuple(
        (
            n,
            argument(reading, given[n], getattr(p.annotation, "__name__", p.annotation))
            if n in given
            else p.default,
        )
        for n, p in parameters.items()
    )
    word = Word(name, arguments, e.span)
    try:
        words[name].check(word)
    except AttnError as error:
        raise AttnError(*(replace(d, span=d.span or e.span) for d in error.diagnostics)) from None
    return word


ROLES = {"halting": "halting", "exit": "an exit", "memory": "a memory"}


def parameters_of(stage: Stage) -> dict[str, inspect.Parameter]:
    """What a text may give a word."""
    found = inspect.signature(stage.signature).parameters
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _one_of(words: Iterable[str]) -> str:
    return "write " + " or ".join(f"`{word}`" for word in sorted(words))


def usage(name: str, stage: Stage) -> str:
    """How a word is written."""
    parameters = parameters_of(stage).values()
    listed = ", ".join(
        p.name if p.default is p.empty else f"{p.name} = {_told(p.default)}" for p in parameters
    )
    return f"{name}({listed})" if listed else name


def _told(value: Argument) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def argument(reading: Reading, e: ast.Expression, kind: str) -> Argument:
    """A value of what the plugin says that it is."""
    match kind:
        case "str" | "bool":
            if not isinstance(e, ast.Name) or (kind == "bool" and e.id not in ("true", "false")):
                raise fail("expected a word" if kind == "str" else "expected `true` or `false`", e.span)
            return e.id if kind == "str" else e.id == "true"
        case "int":
            return reading.elaborator.constant(e, reading.env, TOKENS, "this")
    number = ir.number(reading.elaborator.num(e, reading.env, TOKENS))
    if number is None:
        raise fail("expected a number", e.span)
    return float(number)


def signal(reading: Reading, e: ast.Expression | None) -> bool:
    """Whether turns begin with one."""
    if e is None:
        return False
    if not (isinstance(e, ast.Name) and e.id == "sinusoid"):
        raise fail("expected `sinusoid`", e.span, "it is added to all tokens before each turn")
    if reading.reversible:
        raise fail(
            "`signal` stands in `reversible`", e.span, "leave it out: streams have no turns of their own"
        )
    return True


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
    if word in ("tied", "own"):
        made = (sub for part in braces(e) for sub in sublayers(reading, part, layer, shared))
        return tuple(projected(e, sub) for sub in made)
    if word == "exit":
        raise fail("`exit` stands last in a layer", e.name.span)
    if word in STAGES:
        raise fail(f"`{word}` stands in the braces of a stack, not of a layer", e.name.span)
    if e.body is not None:
        raise fail(f"`{word}` takes no braces", e.body[0].span)
    if word == "ffn":
        return (weighted(reading, feed_forward(reading, e), e, shared),)
    definition = reading.elaborator.definitions.get(word)
    if definition is None:
        raise unknown(reading, e, ("cycle", "share", "tied", "own", "ffn"))
    if isinstance(definition, ast.Definition) and definition.word != "pattern":
        raise fail(f"`{word}` is a {definition.word}, and a layer is made of attentions", e.name.span)
    values = reading.elaborator.arguments(definition, e.args, reading.env, TOKENS)
    given = bind_arguments(definition, e.args)
    for name, argument in given.items():
        beyond(values[name], argument, layer)
    value = reading.elaborator.instance(definition, values, reading.env, e.span, given=given)
    return (weighted(reading, Sublayer(word, attention_named(word, value), -1), e, shared),)


def projected(e: ast.Stage, made: Sublayer) -> Sublayer:
    """`tied { ... }` or `own(...) { ... }` of one sublayer."""
    word, what = e.name.id, made.what
    if not isinstance(what, Attention):
        raise fail(f"`{made.name}` has no queries and keys", made.written, f"take it out of `{word}`")
    if word == "tied":
        bind_arguments_of(word, (), (), call(e), USAGE[word])
        return replace(made, tied=True)
    names = [part.attention.name for part in what.parts]
    if not names:
        raise fail(f"`{made.name}` is no sum, and has no parts", made.written, f"take it out of `{word}`")
    if not e.args:
        raise fail("`own` needs a part", e.span, f"write `own({names[-1]})`")
    own = dict[str, bool]()
    for argument in e.args:
        value = argument.value.id if isinstance(argument.value, ast.Name) else ""
        name, what_of_it = (argument.name, value) if argument.name else (value, "qkv")
        if name not in names:
            help = suggest(name, names) or f"its parts: {', '.join(names)}"
            raise fail(f"`{made.name}` has no part `{name or argument.span.text}`", argument.span, help)
        if what_of_it not in ("qk", "qkv"):
            raise fail("expected `qk` or `qkv`", argument.value.span, "with `qk` its values are those of all")
        own[name] = what_of_it == "qkv"
    return replace(made, own=tuple(own.items()))


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


def warnings(item: ast.StackDef, stages: tuple[Layers | Reversible, ...]) -> Iterator[Diagnostic]:
    """Parts of a cycle that no layer takes, and attentions that relate nothing in one."""
    from attndsl.language.idle import relates_nothing

    every = [e for e in ast.walk(item) if isinstance(e, ast.Stage) and e.name.id in TURN]
    for written, made in zip(every, layers_of(stages), strict=True):
        count = len(made.turns)
        cycles = (e for e in ast.walk(written) if isinstance(e, ast.Stage) and e.name.id == "cycle")
        for part in (part for e in cycles for part in (e.body or ())[count:]):
            many = f"there {'are' if count > 1 else 'is'} {count}"
            yield Diagnostic(f"no {TURN[made.word]} takes this: {many}", part.span, "", "warning")
        used = {sub.what for turn in made.turns for sub in turn if isinstance(sub.what, Attention)}
        empty = {what for what in used if relates_nothing(what)}
        at = ((i, sub.written) for i, turn in enumerate(made.turns) for sub in turn if sub.what in empty)
        first = {span: i for i, span in reversed([*at])}
        for span, layer in first.items():
            said = f"in {TURN[made.word]} {layer} no query has a key"
            yield Diagnostic(said, span, f"{TURN[made.word]}s count from 0", "warning")


def is_attention(item: ast.Definition | ast.AttentionDef) -> bool:
    return isinstance(item, ast.AttentionDef) or item.word == "pattern"


def masks(stages: tuple[Layers | Reversible, ...]) -> tuple[ir.Expr, ...]:
    """What some head of each attention relates, from the input on; all pairs where how sure an exit is goes
    by all tokens of a row."""
    found = list[ir.Expr]()
    for stage in layers_of(stages):
        rule = stage.exit.rule if stage.exit else None
        whole = rule is not None and not cast("Leaving", of_role("exit")[rule.name]).causal(rule)
        for turn in stage.turns:
            found += [sub.what.any_head() for sub in turn if isinstance(sub.what, Attention)]
            found += [ir.TRUE] * whole
    return tuple(found)
