"""One call of a module: what it reads of earlier segments, what it tells, and what it leaves to later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attndsl.execution.session import Session
from attndsl.stacks.layers import Mixer, Near, Pair, Residual
from attndsl.stacks.places import Flat, Places
from attndsl.stacks.signal import sinusoids
from attndsl.stacks.sizes import exit_key, plugin_of
from attndsl.stacks.tree import Exit, Layers, Stack, Sublayer
from attndsl.stage import Decision, Held, Seen, Word

if TYPE_CHECKING:
    from attndsl.stacks.module import StackModule

Place = tuple[int, int, int]
"""Of a sublayer: which stage, which turn of it, and where in that."""

Decide = Callable[[Seen], Decision]


@dataclass(frozen=True)
class State:
    """What a stack leaves of the tokens that it has seen, for the segment behind them.

    stack: which one.
    seen:  how many tokens there were of each row.
    held:  of each place of an attention that remembers, what each word of its memory holds, the nearest
           first.
    """

    stack: Stack
    seen: int
    held: Mapping[Place, tuple[Held | None, ...]] = field(repr=False)


@dataclass(frozen=True)
class Exits:
    """What a stage with an exit tells.

    states: in training, where tokens leave only at depths that are given: after each layer, [B, n, width].
    sure:   after each layer what its exit goes by, [B, n], as far as tokens ran; of `geometric` and
            `multinomial` the chance to leave of a token that has not.
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
    """Of `module`, on `count` tokens of each row with `tables`, the first of which stands at `first`.

    before:   what memories hold of those before.
    sessions: of each attention, what holds keys and values of those before; empty where a run has no such.
    depths:   of stages with an exit, by their number among those: after how many layers tokens leave.
    signal:   of the positions of its tokens, once a loop has asked.
    """

    module: StackModule
    tables: Mapping[str, Any]
    count: int
    first: int = 0
    before: Mapping[Place, tuple[Held | None, ...]] = field(default_factory=dict)
    sessions: Mapping[Place, Session] = field(default_factory=dict)
    depths: Mapping[int, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    turns: dict[int, Tensor] = field(default_factory=dict)
    exits: dict[int, Exits] = field(default_factory=dict)
    held: dict[Place, tuple[Held | None, ...]] = field(default_factory=dict)
    signal: Tensor | None = None

    def part(self, sublayer: Sublayer) -> Residual:
        return self.module.part(sublayer)

    def near(self, place: Place) -> Near:
        """What the sublayer at a place has beside its input."""
        held = tuple(one for one in reversed(self.before.get(place, ())) if one is not None and len(one.at))
        return Near(self.tables, self.first, held)

    def entered(self, i: int, turn: int, x: Tensor) -> Tensor:
        """What states x [B, n, width] are as they enter a turn of the i-th stage: with its signal."""
        if self.module.stack.layers[i].signal is None:
            return x
        dtype = torch.promote_types(x.dtype, torch.float32)
        at = torch.arange(self.first + 1, self.first + 1 + self.count, device=x.device, dtype=dtype)
        if self.signal is None:
            self.signal = sinusoids(at, x.shape[2])
        now = sinusoids(at.new_full((1,), turn + 1), x.shape[2])
        return x + (self.signal + now).to(x.dtype)

    def mixed(
        self, place: Place, sublayer: Sublayer, q: Tensor, keys: Pair, places: Places | Flat | None
    ) -> Tensor:
        """What an attention makes of queries of the tokens at `places`, or of all, among keys of all."""
        residual = self.part(sublayer)
        if place not in self.sessions:
            at = None if places is None else cast(Places, places).index
            return residual.mixed(q, keys, self.near(place), at)
        inner = cast(Mixer, residual.inner)
        if places is not None:  # a session takes the queries of all tokens
            q = places.put(q.new_zeros(*keys[0].shape[:2], *q.shape[2:]), q)
        heads = (made.transpose(1, 2) for made in (q, *keys))
        out = self.sessions[place].prefill(*heads, **inner.given(self.tables)).transpose(1, 2)
        out = (out if places is None else places.taken(out)).flatten(2)
        return cast(Tensor, residual.behind(inner.o(out)))

    def passed(self, place: Place, sublayer: Sublayer, x: Tensor, keys: Pair | None) -> None:
        """An attention is passed by: all tokens have left, in the states x. Those to come read `keys`, which
        are made where there are none yet."""
        self.enter(place, sublayer, x)
        if place not in self.sessions:
            return
        residual = self.part(sublayer)
        made = keys or cast(Mixer, residual.inner).keys(residual.before(x))
        tables = cast(Mixer, residual.inner).given(self.tables)
        self.sessions[place].add(*(each.transpose(1, 2) for each in made), **tables)

    def enter(self, place: Place, sublayer: Sublayer, x: Tensor) -> None:
        """x [B, n, width] enters an attention, which may remember it."""
        words = self.module.stack.layers[place[0]].memory
        if not words or not isinstance(self.part(sublayer).inner, Mixer):
            return
        before = self.before.get(place, (None,) * len(words))
        new: Held | None = Held(x.detach(), range(self.first, self.first + self.count))
        now: list[Held | None] = []
        for i, (word, held) in enumerate(zip(words, before, strict=True)):
            if new is None:
                now.append(held)
                continue
            learned = self.module.word(f"m.{sublayer.weights}.{i}")
            kept, new, losses = plugin_of(word).remember(word, learned, held, new)
            for name, loss in losses.items():
                self.losses[name] = self.losses.get(name, 0) + loss
            now.append(None if kept is None else Held(kept.x.detach(), kept.at))
        self.held[place] = tuple(now)

    def halting(self, i: int, word: Word) -> Decide:
        """What the word of the i-th stage decides after each turn."""
        learned, plugin = self.module.word(f"{i}"), plugin_of(word)
        return lambda seen: cast(Decision, plugin.decide(word, learned, seen))

    def exit(self, i: int, of: Layers) -> Decide:
        """Which tokens leave the i-th stage after each turn: of their own accord, or at depths that are
        given; in training they leave at those alone."""
        exit = of.exit
        assert exit is not None
        word, plugin = exit.rule, plugin_of(exit.rule)
        number = sum(before.exit is not None for before in self.module.stack.layers[:i])
        depths = self.depths.get(number)

        def decide(seen: Seen) -> Decision:
            learned = self.module.word(exit_key(i, of, seen.turn))
            made: Decision = plugin.decide(word, learned, seen, self._threshold(exit, seen.x))
            halts = made.halts
            if depths is not None:
                halts = depths <= seen.turn + 1
            elif self.module.training:
                halts = torch.zeros_like(seen.running)
            elif exit.batch == "min":
                halts = (halts | ~seen.running).all(0, keepdim=True).expand_as(halts)
            return Decision(halts, None, made.carry, made.sure)

        return decide

    def _threshold(self, exit: Exit, x: Tensor) -> Tensor | None:
        """Of each token [n]; N of one that decays is the length that the module was built for."""
        if exit.threshold is None:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        at = torch.arange(self.first, self.first + self.count, device=x.device, dtype=dtype)
        if exit.decay is None:
            return torch.full_like(at, exit.threshold)
        falling = 0.1 * torch.exp(-exit.decay * at / self.module.length)
        least = exit.threshold * falling if exit.form == "code" else falling
        return (0.9 * exit.threshold + least).clamp(0, 1)

    def record(self) -> Record:
        stack = self.module.stack
        state = State(stack, self.first + self.count, self.held) if stack.remembers else None
        return Record(self.losses, self.turns, self.exits, state)
