"""What a stack is: its stages, every layer of them written out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from attndsl.attention import Attention
from attndsl.errors import Span
from attndsl.keywords import missing
from attndsl.stage import Word

Norm = Literal["pre", "post", "sandwich"]


@dataclass(frozen=True)
class FeedForward:
    """Two linear maps with a GELU between them, `times` as wide inside.

    chunks: pieces of the positions that are done one after the other: the same in less memory (Kitaev et al.
    2020, section 3).
    """

    times: float
    chunks: int = 1


@dataclass(frozen=True)
class Sublayer:
    """What is added to the residual stream.

    weights: sublayers of one number have the same.
    tied:    whether keys are the queries of their tokens.
    own:     parts of a sum whose queries and keys are made by projections of their own, and whether their
             values are.
    written: where it stands in the stack.
    """

    name: str
    what: Attention | FeedForward
    weights: int
    tied: bool = False
    own: tuple[tuple[str, bool], ...] = ()
    written: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Exit:
    """Tokens leave after the turn in which `rule` is as sure as the threshold.

    threshold: None where the rule says itself where tokens leave.
    decay:     the threshold falls from position to position by this (Schuster et al. 2022, section 5.1).
    scaled:    whether what falls is a part of the threshold, as in their code, or of 1, as in the paper.
    batch:     whether rows leave each on its own, or together with the least sure.
    """

    rule: Word
    threshold: float | None = None
    decay: float | None = None
    scaled: bool = False
    batch: Literal["each", "min"] = "each"


@dataclass(frozen=True)
class Layers:
    """`layers(N) { ... }` or `loop(N) { ... }`: the sublayers of each layer, or turn.

    norm: where norms stand: before each sublayer (pre), after each sum (post), or on both sides of each
    sublayer (sandwich).
    halting: how tokens leave a loop before its last turn, and become a sum of their states.
    exit: how they leave in the state that they have.
    memory: what its attentions remember of segments before, the nearest first.
    signal: whether sines and cosines of position and turn are added before each turn.
    """

    word: Literal["layers", "loop"]
    turns: tuple[tuple[Sublayer, ...], ...]
    norm: Norm = "pre"
    halting: Word | None = None
    exit: Exit | None = None
    memory: tuple[Word, ...] = ()
    signal: bool = False

    @property
    def leaves(self) -> bool:
        """Whether tokens may leave before the last turn."""
        return self.halting is not None or self.exit is not None


@dataclass(frozen=True)
class Reversible:
    """`reversible { ... }`: two streams, each of whose sublayers is added to one and made of the other, in
    turn (Gomez et al. 2017). Both begin as the input; the output is their mean.
    """

    stages: tuple[Layers, ...]

    def sublayers(self, number: int) -> Iterator[tuple[tuple[int, int, int], Sublayer]]:
        """Each with its place: which stage, the first being of this number, which turn, and where in that."""
        for i, stage in enumerate(self.stages, number):
            for t, turn in enumerate(stage.turns):
                for s, sublayer in enumerate(turn):
                    yield (i, t, s), sublayer


def layers_of(stages: Iterable[Layers | Reversible]) -> tuple[Layers, ...]:
    """Of these, and inside reversible ones, from the input on."""
    each = (stage.stages if isinstance(stage, Reversible) else (stage,) for stage in stages)
    return tuple(layers for inner in each for layers in inner)


@dataclass(frozen=True)
class Stack:
    """A stack with its parameters bound.

    written:    where it is defined.
    parameters: the names that it takes, each with its value as it is written.
    rebind:     gives it with other parameters: what `stack(w=256)` calls.
    """

    name: str
    stages: tuple[Layers | Reversible, ...]
    written: Span
    parameters: Mapping[str, str] = field(default_factory=dict, compare=False)
    rebind: Callable[..., Stack] | None = field(default=None, compare=False)

    def __call__(self, *args: Any, **params: Any) -> Stack:
        """With parameters in place of the ones it has: `args` in their order, `params` by name."""
        assert self.rebind is not None, "a stack of a program"
        return self.rebind(*args, **params)

    @property
    def layers(self) -> tuple[Layers, ...]:
        """Its stages, and those inside reversible ones, from the input on."""
        return layers_of(self.stages)

    def sublayer(self, place: tuple[int, int, int]) -> Sublayer:
        """At a place: which stage, which turn of it, and where in that."""
        stage, turn, number = place
        return self.layers[stage].turns[turn][number]

    @property
    def remembers(self) -> bool:
        """Whether a call reads what an earlier one has left."""
        return any(stage.memory for stage in self.layers)

    @property
    def turns(self) -> tuple[tuple[Sublayer, ...], ...]:
        """The sublayers of every layer and turn, from the input on."""
        return tuple(turn for stage in self.layers for turn in stage.turns)

    @property
    def sublayers(self) -> Iterator[tuple[Layers, Sublayer]]:
        """One of each set of weights and its stage, in the order of their first use."""
        seen: set[int] = set()
        for stage in self.layers:
            for sublayer in (sub for turn in stage.turns for sub in turn):
                if sublayer.weights not in seen:
                    seen.add(sublayer.weights)
                    yield stage, sublayer

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            raise missing("a stack", name, dir(Stack))

    def __repr__(self) -> str:
        given = ", ".join(f"{name} = {value}" for name, value in self.parameters.items())
        count = len(self.turns)
        return f"<stack {self.name}{f'({given})' * bool(given)}: {count} layer{'s' * (count != 1)}>"

    def __str__(self) -> str:
        return self.written.text
