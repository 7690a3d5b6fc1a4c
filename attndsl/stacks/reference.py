"""What a stack means, obvious and slow: every layer in float64 by dense attention."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from attndsl.execution.plan import compile
from attndsl.stacks.layers import FFN, Mixer, Near, Residual
from attndsl.stacks.module import Depths, StackModule, depths_of
from attndsl.stacks.run import Place, Run, State
from attndsl.stacks.tree import Layers, Reversible, Sublayer
from attndsl.stage import Seen


def reference(
    module: StackModule,
    x: Tensor,
    state: State | None = None,
    depths: Depths | None = None,
    **tables: Any,
) -> Tensor:
    """What `module` makes of x [B, n, width] behind the tokens of `state`, in float64; `tables` and `depths`
    as it takes them. Exits are taken as it takes them: in training only where `depths` say so."""
    x = x.double()
    first, before = (state.seen, state.held) if state else (0, {})
    run = Run(module, tables, x.shape[1], first, before, depths=depths_of(module.stack, depths, x))
    number = 0
    for each in module.stack.stages:
        if isinstance(each, Reversible):
            x = _reversible(run, number, each, x)
            number += len(each.stages)
            continue
        x = _leaving(run, number, each, x) if each.leaves else _layers(run, number, each, x)
        number += 1
    return _normed(module.last, x)


def _layers(run: Run, i: int, of: Layers, x: Tensor) -> Tensor:
    for t, turn in enumerate(of.turns):
        x = _entering(run, of, t, x)
        for s, sublayer in enumerate(turn):
            x = _sublayer(run, of, (i, t, s), sublayer, x)
    return x


def _entering(run: Run, of: Layers, turn: int, x: Tensor) -> Tensor:
    """With the signal of a loop: a sine and a cosine of each frequency, of position and turn from 1 on."""
    if of.signal is None:
        return x
    width = x.shape[2]
    added = [
        [
            sum(
                (math.cos if j % 2 else math.sin)(at / 10_000 ** ((j - j % 2) / width))
                for at in (i, turn + 1)
            )
            for j in range(width)
        ]
        for i in range(run.first + 1, run.first + run.count + 1)
    ]
    return x + torch.tensor(added, dtype=x.dtype).reshape(run.count, width)


def _reversible(run: Run, i: int, of: Reversible, x: Tensor) -> Tensor:
    """Each sublayer is added to one stream and made of the other."""
    one, other = x, x
    for n, (place, sublayer) in enumerate(of.sublayers(i)):
        if n % 2 == 0:
            one = one + _sublayer(run, of.stages[place[0] - i], place, sublayer, other) - other
        else:
            other = other + _sublayer(run, of.stages[place[0] - i], place, sublayer, one) - one
    return (one + other) / 2


def _sublayer(run: Run, stage: Layers, place: Place, of: Sublayer, x: Tensor) -> Tensor:
    part, near = run.part(of), run.near(place)
    match stage.norm:
        case "pre":
            return x + _inner(part, x, near)
        case "post":
            return _normed(part.after, x + _inner(part, x, near))
        case "sandwich":
            return x + _normed(part.behind, _inner(part, x, near))


def _leaving(run: Run, i: int, of: Layers, x: Tensor) -> Tensor:
    """Every token is computed in every turn; one that has left keeps its state, or its output alone where
    its word computes on."""
    running = torch.ones(x.shape[:2], dtype=torch.bool)
    y, carry, onward = torch.zeros_like(x), dict[str, Tensor](), False
    decide = run.halting(i, of.halting) if of.halting else run.exit(i, of)
    for t, turn in enumerate(of.turns):
        moves = running | onward
        before, now = x, _entering(run, of, t, x)
        state = now
        for s, sublayer in enumerate(turn):
            state = torch.where(moves[..., None], _sublayer(run, of, (i, t, s), sublayer, state), now)
        x = torch.where(moves[..., None], state, x)
        seen = Seen(x, before, running, t, len(of.turns), run.first, carry, run.module.logits)
        decision = decide(seen)
        halts = running & (decision.halts | seen.last)
        if decision.weight is None:
            y = torch.where(halts[..., None], x, y)
        else:
            kept = 1 if decision.kept is None else torch.where(running, decision.kept, 1)[..., None]
            y = kept * y + torch.where(running, decision.weight, 0)[..., None] * x
        carry, running, onward = dict(decision.carry), running & ~halts, decision.onward
    return y


def _headed(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    weights = {name: value.double() for name, value in norm.state_dict(keep_vars=True).items()}
    return cast(Tensor, torch.func.functional_call(norm, weights, x))


def _inner(part: Residual, x: Tensor, near: Near) -> Tensor:
    inner, normed = part.inner, _normed(part.before, x)
    if isinstance(inner, FFN):
        up, down = inner.up, inner.down
        wide = gelu(linear(normed, up.weight.double(), up.bias.double()))
        return linear(wide, down.weight.double(), down.bias.double())
    assert isinstance(inner, Mixer)
    plan, count = inner.attention.plan, x.shape[1]
    keys = torch.cat([*(_normed(part.before, held.x.double()) for held in near.held), normed], 1)
    dense = compile(
        plan.attention, length=keys.shape[1], q_length=count, heads=inner.heads, kv_heads=inner.kv_heads,
        head_dim=plan.problem.head_dim, dtype="float64", backend="reference", training=True,
    )  # fmt: skip
    q = _headed(linear(normed, inner.q.weight.double()), inner.heads)
    k, v = (_headed(linear(keys, made.weight.double()), inner.kv_heads) for made in (inner.k, inner.v))
    names = {table.name for table in plan.attention.inputs}
    learned = {name: value.double() for name, value in inner.attention.named_parameters()}
    given = {name: table for name, table in near.tables.items() if name in names}
    mixed = dense(q, k, v, learned=learned or None, **near.places(count), **given)
    return linear(mixed.transpose(1, 2).flatten(2), inner.o.weight.double())
