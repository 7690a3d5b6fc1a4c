"""Turns that tokens leave one by one: what has left is computed no more, and still attended to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attndsl.stacks.layers import Mixer, Residual
from attndsl.stacks.tree import Sublayer

Pair = tuple[Tensor, Tensor]
Keys = dict[int, tuple[int, Pair]]
"""Of the attentions of one turn, by their places in it: which weights they have, and keys and values of all
tokens."""


@dataclass(frozen=True)
class Progress:
    """Tokens after so many turns of adaptive computation time (Graves 2016, section 2.1; of each token:
    Dehghani et al. 2019, section 2.2).

    y:       [B, n, width], states weighted so far.
    left:    [B, n], what is left for the weights of later turns; of a token that has halted, its last weight.
    running: bool [B, n].
    halted:  bool [B, n], those that the last turn was the last of.
    turns:   int64 [B, n], how many each took.
    """

    y: Tensor
    left: Tensor
    running: Tensor
    halted: Tensor
    turns: Tensor

    @staticmethod
    def begun(x: Tensor) -> Progress:
        """Before the first turn, of x [B, n, width]."""
        none = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        return Progress(torch.zeros_like(x), x.new_ones(x.shape[:2]), none == 0, none != 0, none)

    def after(self, x: Tensor, chance: nn.Module, eps: float, last: bool) -> Progress:
        """After a turn that left the states x. A token halts with the probability that `chance` makes of its
        state; where these sum up to 1 - eps, or at the last turn, its weight is what is left."""
        now = torch.where(self.running, chance(x)[..., 0].sigmoid(), 0)
        halted = self.running & ((self.left - now <= eps) | last)
        going = self.running & ~halted
        weight = torch.where(halted, self.left, now)
        left = torch.where(going, self.left - now, self.left)
        return Progress(self.y + weight[..., None] * x, left, going, halted, self.turns + self.running)


@dataclass(frozen=True)
class Places:
    """Tokens [B, m] of each batch row; beyond those that are `real` stand others, to fill the row. None where
    all are."""

    index: Tensor
    real: Tensor | None

    @staticmethod
    def of(chosen: Tensor) -> Places:
        """Of chosen [B, n], in their order."""
        counts = chosen.sum(1)
        most = int(counts.max())
        index = chosen.logical_not().to(torch.uint8).argsort(stable=True, dim=1)[:, :most]
        real = torch.arange(most, device=chosen.device) < counts[:, None]
        return Places(index, None if bool(real.all()) else real)

    def taken(self, x: Tensor) -> Tensor:
        """Of x [B, n, ...] the tokens, [B, m, ...]."""
        return x.gather(1, self._wide(self.index, x).expand(-1, -1, *x.shape[2:]))

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x with `new` [B, m, ...] for them."""
        if self.real is not None:
            new = torch.where(self._wide(self.real, x), new, self.taken(x))
        return x.scatter(1, self._wide(self.index, x).expand_as(new), new)

    @staticmethod
    def _wide(index: Tensor, x: Tensor) -> Tensor:
        return index.reshape(*index.shape, *(1 for _ in x.shape[2:]))


def run(
    turns: Sequence[Sequence[Sublayer]],
    part: Callable[[Sublayer], Residual],
    chance: nn.Linear,
    eps: float,
    x: Tensor,
    tables: Mapping[str, Any],
) -> Progress:
    """What turns make of x [B, n, width]. Later turns of others attend to the last state of a token that has
    halted."""
    found, keys = Progress.begun(x), Keys()
    for number, turn in enumerate(turns):
        places = None if bool(found.running.all()) else Places.of(found.running)
        keys = {} if places is None else _kept(turn, part, keys, x, found.halted)
        x = _turn(turn, part, keys, x, places, tables)
        found = found.after(x, chance, eps, number == len(turns) - 1)
        if not bool(found.running.any()):
            break
    return found


def _kept(
    turn: Sequence[Sublayer],
    part: Callable[[Sublayer], Residual],
    before: Keys,
    x: Tensor,
    halted: Tensor,
) -> Keys:
    """Those of the last states of tokens that have left, for a turn; `before` is of the turn before, in which
    the tokens `halted` left. Where that had other weights they are made of all tokens."""
    left, found = Places.of(halted), {}
    for i, sublayer in enumerate(turn):
        residual = part(sublayer)
        if not isinstance(residual.inner, Mixer):
            continue
        weights, pair = before.get(i, (None, None))
        if pair is None or weights != sublayer.weights:
            pair = residual.inner.keys(residual.before(x))
        elif left.index.shape[1]:
            pair = _put(left, pair, residual.inner.keys(residual.before(left.taken(x))))
        found[i] = sublayer.weights, pair
    return found


def _put(places: Places, pair: Pair, made: Pair) -> Pair:
    return places.put(pair[0], made[0]), places.put(pair[1], made[1])


def _turn(
    turn: Sequence[Sublayer],
    part: Callable[[Sublayer], Residual],
    keys: Keys,
    x: Tensor,
    places: Places | None,
    tables: Mapping[str, Any],
) -> Tensor:
    """x with the states of the tokens at `places`, or of all, after a turn."""
    state = x if places is None else places.taken(x)
    for i, sublayer in enumerate(turn):
        residual = part(sublayer)
        inner, normed = residual.inner, residual.before(state)
        if not isinstance(inner, Mixer):
            state = residual.added(state, inner(normed, tables))
            continue
        made = inner.keys(normed)
        if places is not None:
            made = _put(places, keys[i][1], made)
        keys[i] = sublayer.weights, made
        if places is None or inner.placed:
            at = None if places is None else places.index
            mixed = inner.mixed(inner.queries(normed), *made, tables, at)
        else:
            whole = residual.before(places.put(x, state))
            mixed = places.taken(inner.mixed(inner.queries(whole), *made, tables, None))
        state = residual.added(state, mixed)
    return state if places is None else places.put(x, state)


def initial(width: int) -> nn.Linear:
    """What makes the probability to halt of a state; it begins near 0.73, a bias of 1 as in tensor2tensor."""
    chance = nn.Linear(width, 1)
    nn.init.zeros_(chance.weight)
    nn.init.ones_(chance.bias)
    return chance
