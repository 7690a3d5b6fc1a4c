"""Turns that tokens leave one by one: what has left is computed no more, and still attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attndsl.stacks.layers import Mixer, Near, Pair, signalled
from attndsl.stacks.run import Decide, Run
from attndsl.stacks.tree import Layers, Sublayer
from attndsl.stage import Decision, Seen

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
    onward:  whether states of those that have left change on.
    carry:   what their word carries.
    """

    y: Tensor
    running: Tensor
    halted: Tensor
    turns: Tensor
    onward: bool = False
    carry: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def begun(x: Tensor) -> Progress:
        """Before the first turn, of x [B, n, width]."""
        none = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        return Progress(torch.zeros_like(x), none == 0, none != 0, none)

    def after(self, x: Tensor, decision: Decision, last: bool) -> Progress:
        """After a turn that left the states x."""
        halted = self.running & (decision.halts | last)
        y = self.y
        if decision.weight is None:
            y = torch.where(halted[..., None], x, y)
        else:
            if decision.keeps is not None:
                y = torch.where(self.running, decision.keeps, 1)[..., None] * y
            y = y + torch.where(self.running, decision.weight, 0)[..., None] * x
        running, turns = self.running & ~halted, self.turns + self.running
        return Progress(y, running, halted, turns, decision.onward, decision.carry)


@dataclass(frozen=True)
class Places:
    """Tokens [B, m] of each batch row, and `numbers` [B * m] of them among those of all rows; beyond those
    that are `real` [B * m] stand others, to fill the row. None where all are."""

    index: Tensor
    numbers: Tensor
    real: Tensor | None

    @staticmethod
    def of(chosen: Tensor) -> Places:
        """Of chosen [B, n], in their order."""
        counts, (rows, n) = chosen.sum(1), chosen.shape
        most = int(counts.max())
        index = chosen.logical_not().to(torch.uint8).argsort(stable=True, dim=1)[:, :most]
        numbers = (index + n * torch.arange(rows, device=chosen.device)[:, None]).flatten()
        real = (torch.arange(most, device=chosen.device) < counts[:, None]).flatten()
        return Places(index, numbers, None if bool(real.all()) else real)

    def taken(self, x: Tensor) -> Tensor:
        """Of x [B, n, ...] the tokens, [B, m, ...]."""
        # rows of numbers are copied whole: a tenth of the time of `gather`, a third of that of `scatter`
        return x.flatten(0, 1).index_select(0, self.numbers).reshape(*self.index.shape, *x.shape[2:])

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` [B, m, ...] for them."""
        numbers, made = self.numbers, new.flatten(0, 1)
        if self.real is not None:
            numbers, made = numbers[self.real], made[self.real]
        return x.flatten(0, 1).index_copy(0, numbers, made).reshape(x.shape)


def run(run: Run, i: int, stage: Layers, decide: Decide, x: Tensor) -> Progress:
    """What the turns of a stage, the i-th, make of x [B, n, width]. Later turns of others attend to the last
    state of a token that has left."""
    found, keys = Progress.begun(x), Keys()
    for t, turn in enumerate(stage.turns):
        entering = signalled(stage, x, run.first, t)
        if t and not bool(found.running.any()) and not (found.onward and stage.memory):
            for s, sublayer in enumerate(turn):
                run.enter((i, t, s), sublayer, entering)
            continue
        places = None if found.onward or bool(found.running.all()) else Places.of(found.running)
        # what is added in each turn changes keys of those that have left too
        known = {} if stage.signal else keys
        keys = {} if places is None else _kept(run, turn, known, entering, found.halted)
        made = _turn(run, stage, (i, t), keys, entering, places)
        stays = places is not None and stage.signal
        before, x = x, torch.where(found.running[..., None], made, x) if stays else made
        seen = Seen(x, before, found.running, t, len(stage.turns), run.first, found.carry, run.module.logits)
        found = found.after(x, decide(seen), seen.last)
    return found


def _kept(run: Run, turn: Sequence[Sublayer], before: Keys, x: Tensor, halted: Tensor) -> Keys:
    """Those of the last states of tokens that have left, for a turn that has weights of the turn `before`, in
    which the tokens `halted` left."""
    left, near, found = Places.of(halted), Near(run.tables, run.first), {}
    for i, sublayer in enumerate(turn):
        residual = run.part(sublayer)
        if not isinstance(residual.inner, Mixer):
            continue
        weights, pair = before.get(i, (None, None))
        if pair is None or weights != sublayer.weights:
            continue
        if left.index.shape[1]:
            states = residual.before(left.taken(x))
            pair = _put(left, pair, residual.inner.pair(states, near.where(left.index)))
        found[i] = sublayer.weights, pair
    return found


def _put(places: Places, pair: Pair, made: Pair) -> Pair:
    return places.put(pair[0], made[0]), places.put(pair[1], made[1])


def _turn(
    run: Run, stage: Layers, at: tuple[int, int], keys: Keys, x: Tensor, places: Places | None
) -> Tensor:
    """x with the states of the tokens at `places`, or of all, after the turn `at` of a stage."""
    state = x if places is None else places.taken(x)
    for s, sublayer in enumerate(stage.turns[at[1]]):
        residual, near = run.part(sublayer), run.near((*at, s))
        inner = residual.inner
        if not isinstance(inner, Mixer):
            state = residual(state, near)
            continue
        if stage.memory:
            run.enter((*at, s), sublayer, state if places is None else places.put(x, state))
        normed = residual.before(state)
        index = None if places is None else places.index
        where = near.where(index)
        q = inner.queries(normed, where)
        if places is not None and s not in keys:
            pair = inner.pair(residual.before(places.put(x, state)), near.where())
        else:
            pair = inner.pair(normed, where, q)
            pair = pair if places is None else _put(places, keys[s][1], pair)
        keys[s] = sublayer.weights, pair
        if places is None or inner.placed:
            mixed = residual.mixed(q, pair, near, normed, index)
        else:
            whole, where = residual.before(places.put(x, state)), near.where()
            mixed = places.taken(residual.mixed(inner.queries(whole, where), pair, near, whole))
        state = residual.added(state, mixed)
    return state if places is None else places.put(x, state)
