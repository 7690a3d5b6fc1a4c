"""Token by token: what a step gives is what the module gives for the last tokens of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attndsl.errors import fail
from attndsl.execution.session import Session
from attndsl.stacks.halting import Progress
from attndsl.stacks.layers import Mixer
from attndsl.stacks.tree import Layers, Sublayer

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
        self.module, self.batch = module, batch
        self.sessions: dict[tuple[int, int, int], Session] = {
            (i, t, s): inner.attention.session(batch, capacity)
            for i, stage in enumerate(module.stack.stages)
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
        """The output [B, m, width] of `x` [B, m, width], the next tokens of every row; `tables` by name."""
        if x.ndim != 3 or x.shape[0] != self.batch or x.shape[2] != self.module.width:
            raise fail(f"x is [{self.batch}, m, {self.module.width}], not {[*x.shape]}")
        for i, stage in enumerate(self.module.stack.stages):
            x = self._halting(i, stage, x, tables) if stage.halting else self._turns(i, stage, x, tables)
        return cast(Tensor, self.module.last(x))

    def _turns(self, i: int, stage: Layers, x: Tensor, tables: dict[str, Any]) -> Tensor:
        for t, turn in enumerate(stage.turns):
            for s, sublayer in enumerate(turn):
                x = self._added((i, t, s), sublayer, x, tables)
        return x

    def _halting(self, i: int, stage: Layers, x: Tensor, tables: dict[str, Any]) -> Tensor:
        """A token that has left is attended to in later turns too: they all get keys of its last state."""
        assert stage.halting is not None
        chance, found = self.module.chances[str(i)], Progress.begun(x)
        for t, turn in enumerate(stage.turns):
            for s, sublayer in enumerate(turn):
                x = torch.where(found.running[..., None], self._added((i, t, s), sublayer, x, tables), x)
            found = found.after(x, chance, stage.halting.eps, t == len(stage.turns) - 1)
        return found.y

    def _added(
        self, at: tuple[int, int, int], sublayer: Sublayer, x: Tensor, tables: dict[str, Any]
    ) -> Tensor:
        residual = self.module.part(sublayer)
        inner, normed = residual.inner, residual.before(x)
        if not isinstance(inner, Mixer):
            return residual.added(x, inner(normed, tables))
        q, k, v = (made.transpose(1, 2) for made in (inner.queries(normed), *inner.keys(normed)))
        out = self.sessions[at].prefill(q, k, v, **inner.given(tables))
        return residual.added(x, inner.o(out.transpose(1, 2).flatten(2)))


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
