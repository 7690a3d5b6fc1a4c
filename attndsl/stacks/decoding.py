"""Token by token: what a step gives is what the module gives for the last tokens of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attndsl.errors import fail
from attndsl.execution.session import Session
from attndsl.stacks.layers import Mixer, shared
from attndsl.stacks.leaving import Progress
from attndsl.stacks.run import Place, Run
from attndsl.stacks.tree import Layers, Reversible, Sublayer
from attndsl.stage import Seen

if TYPE_CHECKING:
    from attndsl.stacks.module import StackModule


class StackSession:
    """Keys and values of sequences that grow, one a batch row, of every layer and turn of a stack.

    batch:    rows.
    capacity: the most tokens of a row.

    Made by `module.session(batch, capacity)`; refused where the session of an attention is: where tokens to
    come may change what earlier ones gave.
    """

    def __init__(self, module: StackModule, batch: int, capacity: int) -> None:
        if module.stack.remembers:
            raise fail("a stack that remembers steps by its state", help="give `state=record.state` to calls")
        self.module, self.batch = module, batch
        self.made: dict[tuple[Place, str], Tensor] = {}
        self.sessions: dict[Place, Session] = {
            (i, t, s): inner.attention.session(batch, capacity)
            for i, stage in enumerate(module.stack.layers)
            for t, turn in enumerate(stage.turns)
            for s, sublayer in enumerate(turn)
            if isinstance(inner := module.part(sublayer).inner, Mixer)
        }

    def __repr__(self) -> str:
        return f"<session of {self.module.stack!r}: {self.length:,} tokens in {self.batch} rows>"

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max((max(session.lengths) for session in self.sessions.values()), default=0)

    @torch.no_grad()
    def step(self, x: Tensor, **tables: Any) -> Tensor:
        """The output [B, m, width] of `x` [B, m, width] or tokens [B, m], the next of every row; `tables` by
        name."""
        x = self.module.embedded(x)
        if x.ndim != 3 or x.shape[0] != self.batch or x.shape[2] != self.module.width:
            raise fail(f"x is [{self.batch}, m, {self.module.width}], not {[*x.shape]}")
        number, run = 0, Run(self.module, tables, x.shape[1], self.length)
        for each in self.module.stack.stages:
            if isinstance(each, Reversible):
                x = self._reversible(run, number, each, x)
                number += len(each.stages)
                continue
            x = self._leaving(run, number, each, x) if each.leaves else self._turns(run, number, each, x)
            number += 1
        return cast(Tensor, self.module.last(x))

    def _turns(self, run: Run, i: int, stage: Layers, x: Tensor) -> Tensor:
        for t, turn in enumerate(stage.turns):
            for s, sublayer in enumerate(turn):
                residual = self.module.part(sublayer)
                x = residual.added(x, self._made(run, (i, t, s), sublayer, x))
        return x

    def _reversible(self, run: Run, i: int, of: Reversible, x: Tensor) -> Tensor:
        streams = [x, x]
        for place, sublayer in of.sublayers(i):
            streams = [streams[1], streams[0] + self._made(run, place, sublayer, streams[1])]
        return (streams[0] + streams[1]) / 2

    def _leaving(self, run: Run, i: int, stage: Layers, x: Tensor) -> Tensor:
        """A token that has left is attended to in later turns too: they all get keys of its last state."""
        decide = run.halting(i, stage.halting) if stage.halting else run.exit(i, stage)
        found = Progress.begun(x)
        for t, turn in enumerate(stage.turns):
            before = x
            for s, sublayer in enumerate(turn):
                residual = self.module.part(sublayer)
                new = residual.added(x, self._made(run, (i, t, s), sublayer, x))
                x = torch.where(found.running[..., None], new, x)
            seen = Seen(
                x, before, found.running, t, len(stage.turns), run.first, found.carry, self.module.logits
            )
            found = found.after(x, decide(seen), seen.last)
        return found.y

    def _made(self, run: Run, place: Place, sublayer: Sublayer, x: Tensor) -> Tensor:
        residual = self.module.part(sublayer)
        inner, normed = residual.inner, residual.before(x)
        if not isinstance(inner, Mixer):
            return cast(Tensor, residual.behind(inner(normed)))
        at = range(run.first, run.first + x.shape[1])
        q, k, v = (made.transpose(1, 2) for made in (inner.queries(normed, at), *inner.pair(normed, at)))
        beside = inner.beside(normed, at, run.tables, None)
        beside |= {name: self._grown(place, name, inner, beside[name]) for name in inner.made}
        out = self.sessions[place].prefill(q, k, v, **shared(beside, v))
        return cast(Tensor, residual.behind(inner.o(out.transpose(1, 2).flatten(2))))

    def _grown(self, place: Place, name: str, inner: Mixer, made: Tensor) -> Tensor:
        """A table that is made of x, for all tokens so far."""
        dims = next(table.dims for table in inner.attention.plan.attention.inputs if table.name == name)
        if dims.count("n") != 1:
            return made
        before = self.made.get((place, name))
        whole = made if before is None else torch.cat([before, made], dims.index("n"))
        self.made[place, name] = whole
        return whole


def greedy(logits: Tensor) -> Tensor:
    """The likeliest, [B], of logits [B, tokens]."""
    return logits.argmax(-1)


def generate(
    module: StackModule,
    tokens: Tensor,
    steps: int,
    *,
    choose: Callable[[Tensor], Tensor] = greedy,
    **tables: Any,
) -> Tensor:
    """`tokens` [B, n] and `steps` more, [B, n + steps], each chosen of what `module`, built with `embed` and
    `readout`, makes of those before.

    choose:  of logits [B, tokens] the next token, [B]; the likeliest if not given.
    tables:  run-time inputs that do not grow with the tokens.

    Raises AttnError where a session of an attention is refused, and for more tokens than it was built for.
    """
    for name in ("embed", "readout"):
        if getattr(module, name) is None:
            raise fail(f"the module has no `{name}`", help=f"give `{name}=` to `build`")
    assert module.readout is not None
    if tokens.ndim != 2 or not tokens.shape[1]:
        raise fail(f"tokens are [B, n] with n from 1 on, not {[*tokens.shape]}")
    session = module.session(tokens.shape[0], tokens.shape[1] + steps)
    parts: Sequence[Tensor] = [tokens]
    for _ in range(steps):
        y = session.step(parts[-1], **tables)
        parts = [*parts, choose(module.readout(y[:, -1:])[:, 0])[:, None]]
    return torch.cat([*parts], 1)
