"""What a stack is: its stages, every layer of them written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from attndsl.attention import Attention
from attndsl.errors import Span
from attndsl.keywords import missing

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
    written: where it stands in the stack.
    """

    name: str
    what: Attention | FeedForward
    weights: int
    written: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Halting:
    """`act(eps = 0.01)`: a token runs until its chances to halt sum up to 1 - eps. It becomes the sum of its
    states weighted by them, the last by what remains (Graves 2016, section 2.1).
    """

    eps: float


@dataclass(frozen=True)
class Layers:
    """`layers(N) { ... }` or `loop(N) { ... }`: the sublayers of each layer, or turn.

    halting: how tokens leave a loop before its last turn.

    norm: where norms stand: before each sublayer (pre), after each sum (post), or on both sides of each
    sublayer (sandwich).
    """

    word: Literal["layers", "loop"]
    turns: tuple[tuple[Sublayer, ...], ...]
    norm: Norm = "pre"
    halting: Halting | None = None


@dataclass(frozen=True)
class Stack:
    """A stack with its parameters bound.

    written:    where it is defined.
    parameters: the names that it takes, each with its value as it is written.
    rebind:     gives it with other parameters: what `stack(w=256)` calls.
    """

    name: str
    stages: tuple[Layers, ...]
    written: Span
    parameters: Mapping[str, str] = field(default_factory=dict, compare=False)
    rebind: Callable[..., Stack] | None = field(default=None, compare=False)

    def __call__(self, *args: Any, **params: Any) -> Stack:
        """With parameters in place of the ones it has: `args` in their order, `params` by name."""
        assert self.rebind is not None, "a stack of a program"
        return self.rebind(*args, **params)

    @property
    def turns(self) -> tuple[tuple[Sublayer, ...], ...]:
        """The sublayers of every layer and turn, from the input on."""
        return tuple(turn for stage in self.stages for turn in stage.turns)

    @property
    def sublayers(self) -> Iterator[tuple[Layers, Sublayer]]:
        """One of each set of weights and its stage, in the order of their first use."""
        seen: set[int] = set()
        for stage in self.stages:
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
