"""One call of a module: what it reads of earlier segments, what it tells, and what it leaves to later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attndsl.stacks.layers import Mixer, Near, Residual
from attndsl.stacks.sizes import key_of, plugin_of
from attndsl.stacks.tree import Layers, Sublayer
from attndsl.stage import Decision, Held, Seen, Word

if TYPE_CHECKING:
    from attndsl.stacks.module import StackModule

Place = tuple[int, int, int]
"""Of a sublayer: which stage, which turn of it, and where in that."""

Decide = Callable[[Seen], Decision]
HALF = 0.5
"""As sure as a chance to leave has to be where a text names no threshold."""


@dataclass(frozen=True)
class State:
    """What a stack leaves of the tokens that it has seen, for the segment behind them.

    stack: which one: what `identity` says of it.
    seen:  how many tokens there were of each row.
    held:  of each place of an attention that remembers, what each word of its memory holds, the nearest
           first.

    A value: no call writes to it, and none keeps what it reads. `torch.save` writes it, and `torch.load`
    reads it back.
    """

    stack: str
    seen: int
    held: Mapping[Place, tuple[Held | None, ...]] = field(repr=False)

    def to(self, *like: Any, **options: Any) -> State:
        """With tensors as `x.to(*like, **options)` makes them: of another device or dtype."""

        def moved(held: Held) -> Held:
            x = held.x.to(*like, **options)
            return replace(held, x=x, at=held.at.to(x.device))

        held = {place: tuple(one and moved(one) for one in kept) for place, kept in self.held.items()}
        return replace(self, held=held)


torch.serialization.add_safe_globals([State, Held])


@dataclass(frozen=True)
class Exits:
    """What a stage with an exit tells.

    states: where all layers ran, as they do in training: of each layer, [B, n, width].
    sure:   of each layer, how sure it was, [B, n].
    turns:  how many layers each token took, [B, n].
    """

    states: tuple[Tensor, ...]
    sure: tuple[Tensor, ...]
    turns: Tensor


@dataclass(frozen=True)
class Record:
    """What a run of a stack tells besides its output.

    losses: what may be added to the loss, with a weight: `ponder.I` of the I-th loop that halts, counted
            from 0, the mean of the turns that a token takes and of what remained for the last of them.
    turns:  by that number, how many each token took, [B, n].
    exits:  of the I-th stage with an exit, counted from 0.
    state:  for the segment behind this one; None where nothing is remembered.
    """

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    turns: Mapping[int, Tensor] = field(default_factory=dict)
    exits: Mapping[int, Exits] = field(default_factory=dict)
    state: State | None = None


@dataclass(eq=False)
class Run:
    """Of `module`, on `count` tokens of each row with `tables`, the first of which stands at `first`;
    `before` is what memories hold of those before, `depths` [B, n] at which layer tokens leave, by exit."""

    module: StackModule
    tables: Mapping[str, Any]
    count: int
    first: int = 0
    before: Mapping[Place, tuple[Held | None, ...]] = field(default_factory=dict)
    depths: Mapping[int, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    turns: dict[int, Tensor] = field(default_factory=dict)
    exits: dict[int, Exits] = field(default_factory=dict)
    held: dict[Place, tuple[Held | None, ...]] = field(default_factory=dict)

    def part(self, sublayer: Sublayer) -> Residual:
        return self.module.part(sublayer)

    def near(self, place: Place) -> Near:
        """What the sublayer at a place has beside its input."""
        held = tuple(one for one in reversed(self.before.get(place, ())) if one is not None and one.many)
        return Near(self.tables, self.first, held)

    def enter(self, place: Place, sublayer: Sublayer, x: Tensor) -> None:
        """x [B, n, width] enters an attention, which may remember it."""
        words = self.module.stack.layers[place[0]].memory
        if not words or not isinstance(self.part(sublayer).inner, Mixer):
            return
        self.held[place] = self.remembered(place, sublayer, x)

    def remembered(self, place: Place, sublayer: Sublayer, x: Tensor) -> tuple[Held | None, ...]:
        """What the words of a place hold once the states x [B, n, width] have entered it."""
        words, part = self.module.stack.layers[place[0]].memory, self.part(sublayer)
        before = self.before.get(place, (None,) * len(words))
        at = torch.arange(self.first, self.first + x.shape[1], device=x.device)
        keys = [f"m.{sublayer.weights}.{i}" for i in range(len(words))]
        pairs = any(self.module.memories[key].pairs for key in keys)
        states = part.paired(x, at) if pairs else x.detach()
        new: Held | None = Held(states, at, self.first, pairs=pairs)
        now: list[Held | None] = []
        for key, word, held in zip(keys, words, before, strict=True):
            if new is None:
                now.append(held)
                continue
            learned, read = self.module.word(key), partial(part.read, x)
            kept, new, losses = self.module.memories[key].remember(word, learned, held, new, read)
            for name, loss in losses.items():
                self.losses[name] = self.losses.get(name, 0) + loss
            new = new and replace(new, x=new.x.detach())
            # a copy: x is the caller's, and of a slice of it all would stay
            now.append(kept and replace(kept, x=kept.x.detach().clone(), at=kept.at.clone()))
        return tuple(now)

    def halting(self, i: int, word: Word) -> Decide:
        """What the word of the i-th stage decides after each turn."""
        learned, plugin = self.module.word(f"{i}"), plugin_of(word)
        return lambda seen: cast(Decision, plugin.decide(word, learned, seen))

    def exit(self, i: int, of: Layers) -> Decide:
        """Which tokens leave the i-th stage after each turn: where depths are given those at theirs, else
        those that are sure enough. In training all layers run."""
        assert of.exit is not None
        word, plugin, threshold = of.exit.rule, plugin_of(of.exit.rule), of.exit.threshold
        depths = self.depths.get(len(self.exits))

        def decide(seen: Seen) -> Decision:
            learned = self.module.word(key_of(i, of, seen.turn))
            sure, carry = plugin.confidence(word, learned, seen)
            if depths is not None:
                leaves = depths <= seen.turn + 1
            else:
                by = carry.get("leaves") if threshold is None else None
                by = sure if by is None else by.to(sure.dtype)
                leaves = self._leaves(of, by, seen) & (not self.module.training)
            return Decision(leaves, carry=carry, sure=sure)

        return decide

    def _leaves(self, of: Layers, sure: Tensor, seen: Seen) -> Tensor:
        """Which tokens are sure enough, bool [B, n]. With a decay the threshold is 0.9 of itself and 0.1 of
        what falls from 1, exp(-decay t / length) (Schuster et al. 2022, section 5.1); in their code from
        itself."""
        assert of.exit is not None
        falls = plugin_of(of.exit.rule).falls
        if of.exit.batch == "min":
            others = torch.where(seen.running, sure, -torch.inf if falls else torch.inf)
            if len(others):
                sure = (others.amax if falls else others.amin)(0, keepdim=True).expand_as(sure)
        least = HALF if of.exit.threshold is None else of.exit.threshold
        if falls:
            return sure <= least
        if of.exit.decay is None:
            return sure >= least
        at = torch.arange(self.first, self.first + sure.shape[1], device=sure.device).to(sure.dtype)
        falling = torch.exp(-of.exit.decay * at / self.module.length)
        scale = least if of.exit.scaled else 1.0
        return sure >= (0.9 * least + 0.1 * scale * falling).clamp(0, 1)

    def record(self) -> Record:
        stack = self.module.stack
        state = State(self.module.identity, self.first + self.count, self.held) if stack.remembers else None
        return Record(self.losses, self.turns, self.exits, state)
