"""Token by token: what a step gives is what the module gives for the last tokens of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from attndsl.analysis.lasting import kept
from attndsl.errors import fail
from attndsl.execution.session import Session
from attndsl.stacks.layers import Mixer, Near, Pair, Residual, flat, shared, signalled
from attndsl.stacks.leaving import Progress
from attndsl.stacks.run import Place, Run, State
from attndsl.stacks.sizes import attentions, plugin_of
from attndsl.stacks.tree import Layers, Reversible, Sublayer
from attndsl.stage import Held, Seen, joined

if TYPE_CHECKING:
    from attndsl.execution.plan import Plan
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
        if state is not None:
            weight = next(module.parameters())
            module.check_state(state, batch, weight.dtype, weight.device)
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
            plans = {inner.attention.plan for inner in mixers.values()}
            found = {plan: _needs(plan) for plan in plans}
            needs = {place: found[inner.attention.plan] for place, inner in mixers.items()}
            before = {} if state is None else state.held
            self.segment = Segment(self.length, module.length, before, needs)
        else:
            self.sessions = {at: inner.attention.session(batch, capacity) for at, inner in mixers.items()}

    def __repr__(self) -> str:
        return f"<session of {self.module.stack!r}: {self.length:,} tokens in {self.batch} rows>"

    @property
    def keys(self) -> int:
        """How many keys it holds now, of all layers and turns; what has room for others not counted."""
        if self.segment is not None:
            return sum(held.many for held in self.segment.caches.values())
        return sum(min(self.length, session.slots) for session in self.sessions.values())

    @torch.no_grad()
    def step(self, x: Tensor, **tables: Any) -> Tensor:
        """The output [B, m, width] of `x` [B, m, width] or tokens [B, m], the next of every row; `tables` by
        name."""
        x = self.module.embedded(x)
        self.module.check_tokens(x, tables)
        if x.shape[0] != self.batch:
            raise fail(f"x is [{self.batch}, m, {self.module.width}], not {[*x.shape]}")
        if self.segment is None:
            y = self._step(Step(self.module, tables, x.shape[1], self.length), x)
            self.length += x.shape[1]
            return y
        segment, parts, done = self.segment.copy(), list[Tensor](), 0
        while not parts or done < x.shape[1]:
            first = self.length + done
            piece = x[:, done : done + segment.begun + segment.length - first]
            count = piece.shape[1]
            of_piece = tables if count == x.shape[1] else self._cut(tables, first + count)
            parts.append(self._step(Step(self.module, of_piece, count, first, segment=segment), piece))
            done += count
            if self.length + done == segment.begun + segment.length:
                segment = segment.after(self.module)
        self.length, self.segment = self.length + done, segment
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _cut(self, tables: Mapping[str, Any], end: int) -> dict[str, Any]:
        """Of tables the entries for the tokens before the position `end`."""
        of = {table.name: table.dims for _, what in attentions(self.module.stack) for table in what.inputs}
        found = {}
        for name, table in tables.items():
            whole: Any = table if isinstance(table, Tensor) else np.asarray(table)
            upto = tuple(slice(end) if dim == "n" else slice(None) for dim in of[name])
            found[name] = whole[upto] if whole.ndim == len(upto) else table
        return found

    def _step(self, run: Step, x: Tensor) -> Tensor:
        number = 0
        for each in self.module.stack.stages:
            if isinstance(each, Reversible):
                x = self._reversible(run, number, each, x)
                number += len(each.stages)
                continue
            x = self._leaving(run, number, each, x) if each.leaves else self._turns(run, number, each, x)
            number += 1
        return cast(Tensor, self.module.last(x))

    def _turns(self, run: Step, i: int, stage: Layers, x: Tensor) -> Tensor:
        for t, turn in enumerate(stage.turns):
            x = signalled(stage, x, run.first, t)
            for s, sublayer in enumerate(turn):
                residual = self.module.part(sublayer)
                x = residual.added(x, self._made(run, (i, t, s), sublayer, x))
        return x

    def _reversible(self, run: Step, i: int, of: Reversible, x: Tensor) -> Tensor:
        streams = [x, x]
        for place, sublayer in of.sublayers(i):
            streams = [streams[1], streams[0] + self._made(run, place, sublayer, streams[1])]
        return (streams[0] + streams[1]) / 2

    def _leaving(self, run: Step, i: int, stage: Layers, x: Tensor) -> Tensor:
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

    def _made(self, run: Step, place: Place, sublayer: Sublayer, x: Tensor) -> Tensor:
        residual = self.module.part(sublayer)
        inner, normed = residual.inner, residual.before(x)
        if not isinstance(inner, Mixer):
            return cast(Tensor, residual.behind(inner(normed)))
        if run.segment is not None:
            return run.segment.mixed(run, place, residual, x)
        at = run.first
        q = inner.queries(normed, at)
        q, k, v = (made.transpose(1, 2) for made in (q, *inner.pair(normed, at, q)))
        beside = inner.beside(normed, at, run.tables, None)
        beside |= {name: self._grown(place, name, inner, beside[name]) for name in inner.made}
        out = self.sessions[place].prefill(q, k, v, **shared(beside, v))
        return cast(Tensor, residual.behind(inner.o(out.transpose(1, 2).flatten(2))))

    def _held(self, run: Step, place: Place, residual: Residual, x: Tensor) -> None:
        """Keys and values of tokens that have left; no more of these is computed."""
        inner = residual.inner
        if not isinstance(inner, Mixer):
            return
        if run.segment is not None:
            run.segment.hold(run, place, residual, x)
        elif type(session := self.sessions[place]) is Session and not inner.made:
            k, v = (made.transpose(1, 2) for made in inner.pair(residual.before(x), run.first))
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


Needs = Mapping[Place, tuple[int, int] | None]
"""Of the attention at a place, how many of the first keys and of the last any query reads; None where all."""


@dataclass(frozen=True, eq=False)
class Segment:
    """The tokens since the last ones went to memory.

    begun:   position of the first.
    length:  how many there will be.
    before:  what memories hold of those before.
    needs:   which keys are read.
    entered: of each place that remembers, states of its tokens, a piece each step.
    caches:  of every place, what tokens to come read: keys and values, or states where parts have keys of
             their own.
    """

    begun: int
    length: int
    before: Mapping[Place, tuple[Held | None, ...]]
    needs: Needs
    entered: dict[Place, tuple[Tensor, ...]] = field(default_factory=dict)
    caches: dict[Place, Held] = field(default_factory=dict)

    def copy(self) -> Segment:
        """One to which a step adds, or fails to."""
        return replace(self, entered={**self.entered}, caches={**self.caches})

    def mixed(self, run: Run, place: Place, residual: Residual, x: Tensor) -> Tensor:
        """What the attention at a place makes of the next tokens x [B, m, width]."""
        inner, normed = residual.inner, residual.before(x)
        assert isinstance(inner, Mixer)
        q = inner.queries(normed, run.first)
        pair = inner.pair(normed, run.first, q)
        behind = self._behind(run, place, residual)
        near = Near(run.tables, run.first, (behind,) if behind is not None and behind.many else ())
        made = residual.mixed(q, pair, near, normed)
        self._add(run, place, residual, pair, x)
        return made

    def hold(self, run: Run, place: Place, residual: Residual, x: Tensor) -> None:
        """The next tokens x [B, m, width] have entered a place, and ask nothing themselves."""
        assert isinstance(residual.inner, Mixer)
        self._add(run, place, residual, residual.inner.pair(residual.before(x), run.first), x)

    def _add(self, run: Run, place: Place, residual: Residual, pair: Pair, x: Tensor) -> None:
        inner, end = residual.inner, run.first + x.shape[1]
        assert isinstance(inner, Mixer)
        at = torch.arange(run.first, end, device=x.device)
        new = Held(x if inner.own else flat(pair), at, run.first, pairs=not inner.own)
        whole = joined(self._behind(run, place, residual), new)
        self.caches[place] = needed(whole, self.needs[place], end)
        if run.module.stack.layers[place[0]].memory:
            self.entered[place] = (*self.entered.get(place, ()), x)

    def _behind(self, run: Run, place: Place, residual: Residual) -> Held | None:
        """What the next tokens read beside themselves; the first of a segment what memories hold."""
        if place in self.caches:
            return self.caches[place]
        inner, found = residual.inner, None
        assert isinstance(inner, Mixer)
        for one in replace(run, before=self.before).near(place).held:
            as_read = one.pairs or inner.own
            made = one if as_read else replace(one, x=residual.paired(one.x, one.at), pairs=True)
            found = joined(found, made)
        return found

    def after(self, module: StackModule) -> Segment:
        """The segment behind this one."""
        run = Run(module, {}, self.length, self.begun, self.before)
        for place, pieces in self.entered.items():
            run.enter(place, module.stack.sublayer(place), torch.cat(pieces, 1))
        return Segment(self.begun + self.length, self.length, run.held, self.needs)


def needed(held: Held, needs: tuple[int, int] | None, end: int) -> Held:
    """Those that tokens from the position `end` on may read."""
    if needs is None or held.many < sum(needs):
        return held
    stays = (held.at < needs[0]) | (held.at > end - needs[1])
    first = None if held.first is None or needs[0] else end - needs[1] + 1
    return replace(held, x=held.x[:, stays], at=held.at[stays], first=first)


@dataclass(eq=False)
class Step(Run):
    """Of a session: in `segment`, where its stack remembers."""

    segment: Segment | None = None


def _needs(plan: Plan) -> tuple[int, int] | None:
    """Raises AttnError where later tokens may change what earlier ones gave."""
    each = [kept(one.attention, one.problem) for one in getattr(plan, "parts", {"": plan}).values()]
    known = [numbers for numbers in each if numbers is not None]
    if len(known) < len(each):
        return None
    return max(first for first, _ in known), max(last for _, last in known)


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
