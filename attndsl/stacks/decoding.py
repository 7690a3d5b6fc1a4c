"""Token by token: what a step gives is what the module gives for the last tokens of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attndsl.errors import fail
from attndsl.execution.session import Session
from attndsl.stacks import leaving
from attndsl.stacks.layers import Mixer
from attndsl.stacks.run import Place, Run
from attndsl.stacks.sizes import plugin_of
from attndsl.stacks.tree import Layers, Reversible, Sublayer

if TYPE_CHECKING:
    from attndsl.stacks.module import StackModule


class StackSession:
    """Keys and values of sequences that grow, one a batch row, of every layer and turn of a stack.

    batch:    rows.
    capacity: the most tokens of a row.
    length:   tokens of a row.

    Made by `module.session(batch, capacity)`; refused where the session of an attention is: where tokens to
    come may change what earlier ones gave.
    """

    def __init__(self, module: StackModule, batch: int, capacity: int) -> None:
        if module.stack.remembers:
            raise fail("a stack that remembers steps by its state", help="give `state=record.state` to calls")
        for stage in module.stack.layers:
            if stage.exit is not None and plugin_of(rule := stage.exit.rule).leaving(rule).whole:
                said = f"`{rule.name}` reads all tokens of a row, those to come too"
                raise fail(said, rule.written, "a stack with it takes whole rows")
        self.module, self.batch = module, batch
        self.length = 0
        self.sessions: dict[Place, Session] = {
            (i, t, s): inner.attention.session(batch, capacity)
            for i, stage in enumerate(module.stack.layers)
            for t, turn in enumerate(stage.turns)
            for s, sublayer in enumerate(turn)
            if isinstance(inner := module.part(sublayer).inner, Mixer)
        }

    def __repr__(self) -> str:
        return f"<session of {self.module.stack!r}: {self.length:,} tokens in {self.batch} rows>"

    @torch.no_grad()
    def step(self, x: Tensor, **tables: Any) -> Tensor:
        """The output [B, m, width] of `x` [B, m, width], the next tokens of every row; `tables` by name."""
        if x.ndim != 3 or x.shape[0] != self.batch or x.shape[2] != self.module.width:
            raise fail(f"x is [{self.batch}, m, {self.module.width}], not {[*x.shape]}")
        number, run = 0, Run(self.module, tables, x.shape[1], self.length, sessions=self.sessions)
        for each in self.module.stack.stages:
            if isinstance(each, Reversible):
                x = self._reversible(run, number, each, x)
                number += len(each.stages)
                continue
            x = self._leaving(run, number, each, x) if each.leaves else self._turns(run, number, each, x)
            number += 1
        self.length += x.shape[1]
        return cast(Tensor, self.module.last(x))

    def _turns(self, run: Run, i: int, stage: Layers, x: Tensor) -> Tensor:
        for t, turn in enumerate(stage.turns):
            x = run.entered(i, t, x)
            for s, sublayer in enumerate(turn):
                x = run.part(sublayer).added(x, self._made(run, (i, t, s), sublayer, x))
        return x

    def _reversible(self, run: Run, i: int, of: Reversible, x: Tensor) -> Tensor:
        streams = [x, x]
        for place, sublayer in of.sublayers(i):
            streams = [streams[1], streams[0] + self._made(run, place, sublayer, streams[1])]
        return (streams[0] + streams[1]) / 2

    def _leaving(self, run: Run, i: int, stage: Layers, x: Tensor) -> Tensor:
        """A token that has left is attended to in later turns too: they all get keys of its last state."""
        decide = run.halting(i, stage.halting) if stage.halting else run.exit(i, stage)
        return leaving.run(run, i, stage, decide, x).y

    def _made(self, run: Run, place: Place, sublayer: Sublayer, x: Tensor) -> Tensor:
        residual = run.part(sublayer)
        inner, normed = residual.inner, residual.before(x)
        if not isinstance(inner, Mixer):
            return cast(Tensor, residual.behind(inner(normed)))
        return run.mixed(place, sublayer, inner.queries(normed), inner.keys(normed), None)


def greedy(logits: Tensor) -> Tensor:
    """The likeliest, [B], of logits [B, tokens]."""
    return logits.argmax(-1)


def generate(
    module: StackModule,
    tokens: Tensor,
    steps: int,
    *,
    embed: Callable[[Tensor], Tensor],
    readout: Callable[[Tensor], Tensor],
    choose: Callable[[Tensor], Tensor] = greedy,
    **tables: Any,
) -> Tensor:
    """`tokens` [B, n] and `steps` more, [B, n + steps], each chosen of what `module` makes of those before.

    embed:   tokens [B, m] to x [B, m, width].
    readout: y [B, width] to logits [B, tokens].
    choose:  of logits [B, tokens] the next token, [B]; the likeliest if not given.
    tables:  run-time inputs that do not grow with the tokens.

    Raises AttnError where a session of an attention is refused, and for more tokens than it was built for.
    """
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise fail(f"tokens are [B, n] with n from 1 on, not {[*tokens.shape]}")
    session = module.session(tokens.shape[0], tokens.shape[1] + steps)
    parts: Sequence[Tensor] = [tokens]
    for _ in range(steps):
        y = session.step(embed(parts[-1]), **tables)
        parts = [*parts, choose(readout(y[:, -1]))[:, None]]
    return torch.cat([*parts], 1)
