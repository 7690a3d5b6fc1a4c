"""Token by token: what a step gives is what the module gives for the last tokens of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from attndsl.analysis.lasting import kept
from attndsl.errors import fail
from attndsl.execution.session import Session
from attndsl.stacks.layers import Mixer, Near, Residual, shared, signalled
from attndsl.stacks.leaving import Progress
from attndsl.stacks.run import Place, Run, State
from attndsl.stacks.sizes import plugin_of
from attndsl.stacks.tree import Layers, Reversible, Sublayer
from attndsl.stage import Held, Seen

if TYPE_CHECKING:
    from attndsl.stacks.module import StackModule


class StackSession:
    """Keys and values of sequences that grow, one a batch row, of every layer and turn of a stack.

    batch:    rows.
    capacity: the most tokens of a row; of no use where the stack remembers.
    state:    of a stack that remembers, what a call on earlier tokens left.

    Made by `module.session(batch, capacity)`; refused where the session of an attention is: where tokens to
    come may change what earlier ones gave. With memory the tokens are segments of as many as the module is
    built for: when so many have come, they go to memory.
    """

    def __init__(self, module: StackModule, batch: int, capacity: int, state: State | None = None) -> None:
        self.module, self.batch = module, batch
        self.length = 0 if state is None else state.seen
        self.made: dict[tuple[Place, str], Tensor] = {}
        self.sessions: dict[Place, Session] = {}
        self.segment: Segment | None = None
        for exit in (stage.exit for stage in module.stack.layers if stage.exit is not None):
            if not plugin_of(exit.rule).causal(exit.rule):
                said = f"`{exit.rule.name}` is sure by later tokens too, and has no sessions"
                raise fail(said, exit.rule.written)
        mixers = {
            (i, t, s): inner
            for i, stage in enumerate(module.stack.layers)
            for t, turn in enumerate(stage.turns)
            for s, sublayer in enumerate(turn)
            if isinstance(inner := module.part(sublayer).inner, Mixer)
        }
        if module.stack.remembers:
            for plan in {inner.attention.plan for inner in mixers.values()}:
                for one in getattr(plan, "parts", {"": plan}).values():
                    kept(one.attention, one.problem)
            self.segment = Segment(self.length, {} if state is None else state.held)
        else:
            self.sessions = {at: inner.attention.session(batch, capacity) for at, inner in mixers.items()}

    def __repr__(self) -> str:
        return f"<session of {self.module.stack!r}: {self.length:,} tokens in {self.batch} rows>"

    @property
    def keys(self) -> int:
        """How many keys it holds now, of all layers and turns; what has room for others not counted."""
        if self.segment is not None:
            return sum(len(one.at) for held in self.segment.pairs.values() for one in held)
        return sum(min(self.length, session.slots) for session in self.sessions.values())

    @torch.no_grad()
    def step(self, x: Tensor, **tables: Any) -> Tensor:
        """The output [B, m, width] of `x` [B, m, width] or tokens [B, m], the next of every row; `tables` by
        name."""
        x = self.module.embedded(x)
        if x.ndim != 3 or x.shape[0] != self.batch or x.shape[2] != self.module.width:
            raise fail(f"x is [{self.batch}, m, {self.module.width}], not {[*x.shape]}")
        if self.segment is None:
            return self._step(x, tables)
        parts, size = list[Tensor](), self.module.length
        while x.shape[1]:
            fits = self.segment.begun + size - self.length
            parts.append(self._step(x[:, :fits], tables))
            x = x[:, fits:]
            if self.length == self.segment.begun + size:
                self.segment = self.segment.after(self.module, tables)
        return torch.cat(parts, 1) if parts else x

    def _step(self, x: Tensor, tables: dict[str, Any]) -> Tensor:
        number, run = 0, Run(self.module, tables, x.shape[1], self.length)
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
            x = signalled(stage, x, run.first, t)
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
            before, made = x, signalled(stage, x, run.first, t)
            alive = found.running | found.onward
            runs, idle = alive[..., None], not bool(alive.any())
            for s, sublayer in enumerate(turn):
                residual = self.module.part(sublayer)
                if idle:
                    self._held(run, (i, t, s), residual, made)
                    continue
                if not isinstance(residual.inner, Mixer):
                    some = made[alive]
                    near = run.near((i, t, s))
                    made = made.index_put((alive,), residual(some[None], near)[0].to(made.dtype))
                    continue
                new = residual.added(made, self._made(run, (i, t, s), sublayer, made))
                made = torch.where(runs, new, made)
            x = torch.where(runs, made, x)
            seen = Seen(
                x, before, found.running, t, len(stage.turns), run.first, found.carry, self.module.logits
            )
            found = found if idle else found.after(x, decide(seen), seen.last)
        return found.y

    def _made(self, run: Run, place: Place, sublayer: Sublayer, x: Tensor) -> Tensor:
        residual = self.module.part(sublayer)
        inner, normed = residual.inner, residual.before(x)
        if not isinstance(inner, Mixer):
            return cast(Tensor, residual.behind(inner(normed)))
        if self.segment is not None:
            return self.segment.mixed(run, place, residual, x)
        at = range(run.first, run.first + x.shape[1])
        q = inner.queries(normed, at)
        q, k, v = (made.transpose(1, 2) for made in (q, *inner.pair(normed, at, q)))
        beside = inner.beside(normed, at, run.tables, None)
        beside |= {name: self._grown(place, name, inner, beside[name]) for name in inner.made}
        out = self.sessions[place].prefill(q, k, v, **shared(beside, v))
        return cast(Tensor, residual.behind(inner.o(out.transpose(1, 2).flatten(2))))

    def _held(self, run: Run, place: Place, residual: Residual, x: Tensor) -> None:
        """Keys and values of tokens that have left; no more of these is computed."""
        inner, at = residual.inner, range(run.first, run.first + x.shape[1])
        if not isinstance(inner, Mixer):
            return
        if self.segment is not None:
            self.segment.hold(run, place, residual, x)
        elif type(session := self.sessions[place]) is Session and not inner.made:
            k, v = (made.transpose(1, 2) for made in inner.pair(residual.before(x), at))
            session.hold(k, v)
        else:
            self._made(run, place, self.module.stack.sublayer(place), x)

    def _grown(self, place: Place, name: str, inner: Mixer, made: Tensor) -> Tensor:
        """A table that is made of x, for all tokens so far."""
        dims = next(table.dims for table in inner.attention.plan.attention.inputs if table.name == name)
        if dims.count("n") != 1:
            return made
        before = self.made.get((place, name))
        whole = made if before is None else torch.cat([before, made], dims.index("n"))
        self.made[place, name] = whole
        return whole


@dataclass(eq=False)
class Segment:
    """The tokens since the last ones went to memory.

    begun:   position of the first.
    before:  what memories hold of those before.
    entered: the states of its tokens at each place, a piece each step.
    pairs:   keys and values of what is held and of its tokens; states, where parts have keys of their own.
    """

    begun: int
    before: Mapping[Place, tuple[Held | None, ...]]
    entered: dict[Place, list[Tensor]] = field(default_factory=dict)
    pairs: dict[Place, list[Held]] = field(default_factory=dict)

    def mixed(self, run: Run, place: Place, residual: Residual, x: Tensor) -> Tensor:
        """What the attention at a place makes of the next tokens x [B, m, width]."""
        behind = Near(run.tables, run.first, tuple(self._behind(run, place, residual)))
        made = residual.made(x, behind)
        self.hold(run, place, residual, x)
        return made

    def hold(self, run: Run, place: Place, residual: Residual, x: Tensor) -> None:
        """The next tokens x [B, m, width] have entered a place."""
        at = range(run.first, run.first + x.shape[1])
        self._behind(run, place, residual).append(self._held(residual, Held(x, at)))
        self.entered.setdefault(place, []).append(x)

    def _behind(self, run: Run, place: Place, residual: Residual) -> list[Held]:
        if place not in self.pairs:
            held = replace(run, before=self.before).near(place).held
            self.pairs[place] = [self._held(residual, one) for one in held]
        return self.pairs[place]

    @staticmethod
    def _held(residual: Residual, held: Held) -> Held:
        inner = residual.inner
        assert isinstance(inner, Mixer)
        if held.pairs or inner.own:
            return held
        at = torch.tensor([*held.at], device=held.x.device)
        return replace(held, x=residual.paired(held.x, at), pairs=True)

    def after(self, module: StackModule, tables: dict[str, Any]) -> Segment:
        """The segment behind this one."""
        entered = {place: torch.cat(pieces, 1) for place, pieces in self.entered.items()}
        count = next(iter(entered.values())).shape[1] if entered else module.length
        run = Run(module, tables, count, self.begun, self.before)
        for place, x in entered.items():
            run.enter(place, module.stack.sublayer(place), x)
        return Segment(self.begun + count, run.held)


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
