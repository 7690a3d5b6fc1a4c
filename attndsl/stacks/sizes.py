"""What a stack is built with, and what its width and length are asked of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from typing import Any

from attndsl import portable
from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.execution import registry
from attndsl.keywords import instead
from attndsl.stacks.tree import Exit, FeedForward, Layers, Reversible, Stack, Sublayer
from attndsl.stage import Word
from attndsl.streams import described
from attndsl.tiles import lowering


def head_dim_of(width: int, heads: int, head_dim: int | None) -> int:
    """The numbers of a head, whether they are given or not. Raises AttnError for what is no size, and where
    they are no whole number."""
    for name, size in (("width", width), ("heads", heads)):
        if lowering.checked_length(name, size) == 0:
            raise fail(f"`{name}` is 0, and must be positive")
    if head_dim is not None:
        return head_dim
    if width % heads:
        raise fail(f"a width of {width} is no multiple of {heads} heads", help="give `head_dim`")
    return width // heads


def attentions(stack: Stack) -> Iterator[tuple[tuple[Word, ...], Attention]]:
    """Every attention of a stack with what it remembers, each once."""
    found = {
        (stage.memory, sub.what): None
        for stage in stack.layers
        for turn in stage.turns
        for sub in turn
        if isinstance(sub.what, Attention)
    }
    return iter(found)


def plugin_of(word: Word) -> Any:
    """What is registered as a word."""
    return registry.plugin("stages", word.name)


def remembered(memory: tuple[Word, ...]) -> int:
    """How many keys there are at most of earlier tokens."""
    behind = total = 0
    for word in memory:
        many, behind = plugin_of(word).reach(word, behind)
        total += many
    return total


def identity(stack: Stack) -> str:
    """Its name, and a digest of what its stages are made of: equal for equal ones, wherever they stand."""
    made = json.dumps(_plain(stack.stages))
    return f"{stack!r} {hashlib.sha256(made.encode()).hexdigest()[:16]}"


def _plain(value: Any) -> Any:
    """Lists, numbers and texts."""
    match value:
        case Attention():
            return portable.write(replace(value, streams=())).text + described(value.streams)
        case tuple():
            return [*map(_plain, value)]
        case Layers() | Reversible() | Sublayer() | FeedForward() | Exit() | Word():
            parts = (getattr(value, field.name) for field in fields(value) if field.compare)
            return [type(value).__name__, *map(_plain, parts)]
    return value


def words(stack: Stack) -> Iterator[tuple[str, Word, int]]:
    """The words of a stack and the turns of their stages, once for each set of what they learn, by its key:
    `stage` or `stage.turn` of those by which tokens leave, `m.weights.number` of memories."""
    for i, stage in enumerate(stack.layers):
        count = len(stage.turns)
        if stage.halting is not None:
            yield f"{i}", stage.halting, count
        if stage.exit is not None:
            for turn in range(count) if apart(stage) else (0,):
                yield key_of(i, stage, turn), stage.exit.rule, count
    for stage, sublayer in stack.sublayers:
        if isinstance(sublayer.what, Attention):
            for i, word in enumerate(stage.memory):
                yield f"m.{sublayer.weights}.{i}", word, len(stage.turns)


def apart(stage: Layers) -> bool:
    """Whether every layer of it learns on its own how sure it is."""
    return stage.exit is not None and stage.word == "layers" and plugin_of(stage.exit.rule).each


def key_of(i: int, stage: Layers, turn: int) -> str:
    """In `words`, of the exit of the i-th stage after a turn."""
    return f"{i}.{turn}" if apart(stage) else f"{i}"


def check_tables(stack: Stack, given: Collection[str]) -> None:
    """Raises AttnError for a name that is no input of any of its attentions."""
    if not given:
        return
    known = {table.name for _, what in attentions(stack) for table in what.inputs}
    for name in given:
        if name not in known:
            help = instead(name, known)
            raise fail(f"no attention of `{stack.name}` has an input `{name}`", help=help)
