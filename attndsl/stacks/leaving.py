"""Turns that tokens leave one by one: what has left is computed no more, and still attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from attndsl.stacks.layers import Mixer, Pair
from attndsl.stacks.places import Flat, Places
from attndsl.stacks.run import Decide, Run
from attndsl.stacks.tree import Layers, Sublayer
from attndsl.stage import Decision, Logits, Seen

Keys = dict[int, tuple[int, Pair]]
"""Of the attentions of one turn, by their places in it: which weights they have, and keys and values of all
tokens."""


@dataclass(frozen=True)
class Progress:
    """Tokens after so many turns.

    y:       [B, n, width], what those that have left are, and sums of states of the others where they are
             weighted.
    running: bool [B, n].
    halted:  bool [B, n], those that the last turn was the last of.
    turns:   int64 [B, n], how many each took.
    carry:   what their word carries.
    onward:  whether those that have left are computed on.
    """

    y: Tensor
    running: Tensor
    halted: Tensor
    turns: Tensor
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    onward: bool = False

    @staticmethod
    def begun(x: Tensor) -> Progress:
        """Before the first turn, of x [B, n, width]."""
        none = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        return Progress(torch.zeros_like(x), none == 0, none != 0, none)

    def after(self, x: Tensor, decision: Decision, last: bool) -> Progress:
        """After a turn that left the states x."""
        halted = self.running & (decision.halts | last)
        if decision.weight is None:
            y = torch.where(halted[..., None], x, self.y)
        else:
            y = self.y
            if decision.kept is not None:
                y = y * torch.where(self.running, decision.kept, 1)[..., None]
            y = y + torch.where(self.running, decision.weight, 0)[..., None] * x
        running, turns = self.running & ~halted, self.turns + self.running
        return Progress(y, running, halted, turns, decision.carry, decision.onward)


def run(run: Run, i: int, stage: Layers, decide: Decide, x: Tensor) -> Progress:
    """What the turns of a stage, the i-th, make of x [B, n, width]. Later turns of others attend to the last
    state of a token that has left."""
    found, keys = Progress.begun(x), Keys()
    for t, turn in enumerate(stage.turns):
        if stage.signal is not None:
            keys = {}  # a token that has left has others in each turn
        now = run.entered(i, t, x)
        if t and not (found.onward and (stage.memory or run.sessions)) and not bool(found.running.any()):
            keys = _kept(run, turn, keys, now, found.halted) if run.sessions else {}
            for s, sublayer in enumerate(turn):
                run.passed((i, t, s), sublayer, now, keys[s][1] if s in keys else None)
            found = replace(found, halted=torch.zeros_like(found.halted))
            continue
        places: Places | Flat | None = None
        if not (found.onward or bool(found.running.all())):
            places = (Flat if run.sessions else Places).of(found.running)
        keys = {} if places is None else _kept(run, turn, keys, now, found.halted)
        made = _turn(run, stage, (i, t), keys, now, places)
        before, x = x, made if places is None else places.put(x, made)
        logits = _of(places, run.module.logits)
        seen = Seen(x, before, found.running, t, len(stage.turns), run.first, found.carry, logits)
        found = found.after(x, decide(seen), seen.last)
    return found


def _of(places: Places | Flat | None, logits: Logits) -> Logits:
    """Logits of the tokens at `places`, or of all; of others they are 0."""
    if places is None:
        return logits

    def found(x: Tensor) -> Tensor:
        made = logits(places.taken(x))
        return places.put(made.new_zeros(*x.shape[:2], made.shape[-1]), made)

    return found


def _kept(run: Run, turn: Sequence[Sublayer], before: Keys, x: Tensor, halted: Tensor) -> Keys:
    """Those of the turn `before` that had the weights of this one, with the last states of the tokens that
    `halted` in it, as x has them."""
    just, found = Places.of(halted), Keys()
    for i, sublayer in enumerate(turn):
        weights, pair = before.get(i, (None, None))
        if pair is None or weights != sublayer.weights:
            continue
        if just.index.shape[1]:
            residual = run.part(sublayer)
            pair = _put(just, pair, cast(Mixer, residual.inner).keys(residual.before(just.taken(x))))
        found[i] = sublayer.weights, pair
    return found


def _put(places: Places | Flat, pair: Pair, made: Pair) -> Pair:
    return places.put(pair[0], made[0]), places.put(pair[1], made[1])


def _turn(
    run: Run, stage: Layers, at: tuple[int, int], keys: Keys, x: Tensor, places: Places | Flat | None
) -> Tensor:
    """States of the tokens at `places`, or of all, after the turn `at` of a stage that x enters."""
    state = x if places is None else places.taken(x)
    for s, sublayer in enumerate(stage.turns[at[1]]):
        residual, place = run.part(sublayer), (*at, s)
        inner = residual.inner
        if not isinstance(inner, Mixer):
            state = residual(state, run.near(place))
            continue
        if stage.memory:
            run.enter(place, sublayer, state if places is None else places.put(x, state))
        normed = residual.before(state)
        if places is None:
            made = inner.keys(normed)
        elif s in keys:
            made = _put(places, keys[s][1], inner.keys(normed))
        else:
            made = inner.keys(residual.before(places.put(x, state)))
        keys[s] = sublayer.weights, made
        if places is None or inner.placed or run.sessions:
            mixed = run.mixed(place, sublayer, inner.queries(normed), made, places)
        else:
            every = inner.queries(residual.before(places.put(x, state)))
            mixed = places.taken(run.mixed(place, sublayer, every, made, None))
        state = residual.added(state, mixed)
    return state
