"""What a stack means, obvious and slow: every layer in float64 by dense attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from attndsl.execution.plan import compile
from attndsl.stacks.layers import FFN, Mixer, Near, Projections, Residual
from attndsl.stacks.module import StackModule
from attndsl.stacks.run import Exits, Place, Run, State
from attndsl.stacks.tree import Layers, Reversible, Sublayer
from attndsl.stage import Seen


def reference(
    module: StackModule,
    x: Tensor,
    state: State | None = None,
    depths: Mapping[int, Tensor] | None = None,
    **tables: Any,
) -> Tensor:
    """What `module` makes of x [B, n, width] behind the tokens of `state`, in float64; `tables` as it takes
    them, `depths` by the number of the exit. Exits are taken as it takes them: not in training."""
    x = module.embedded(x).double()
    seen, held = (state.seen, state.held) if state else (0, {})
    run = Run(module, tables, x.shape[1], seen, held, depths or {})
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
        x = _signalled(of, x, run.first, t)
        for s, sublayer in enumerate(turn):
            x = _sublayer(run, of, (i, t, s), sublayer, x)
    return x


def _signalled(of: Layers, x: Tensor, first: int, turn: int) -> Tensor:
    """Number by number."""
    if not of.signal:
        return x
    added, width = torch.zeros_like(x[0]), x.shape[2]
    for i in range(x.shape[1]):
        for j in range(width):
            wave = math.cos if j % 2 else math.sin
            rate = 10000 ** ((j - j % 2) / width)
            added[i, j] = wave((first + i) / rate) + wave((turn + 1) / rate)
    return x + added


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
    """Every token is computed in every turn; one that has left keeps its state."""
    running = torch.ones(x.shape[:2], dtype=torch.bool)
    y, carry, onward = torch.zeros_like(x), dict[str, Tensor](), False
    decide = run.halting(i, of.halting) if of.halting else run.exit(i, of)
    for t, turn in enumerate(of.turns):
        made = _signalled(of, x, run.first, t)
        for s, sublayer in enumerate(turn):
            goes = running[..., None] | onward
            made = torch.where(goes, _sublayer(run, of, (i, t, s), sublayer, made), made)
        before, x = x, torch.where(running[..., None] | onward, made, x)
        seen = Seen(x, before, running, t, len(of.turns), run.first, carry, run.module.logits)
        decision = decide(seen)
        halts = running & (decision.halts | seen.last)
        if decision.weight is None:
            y = torch.where(halts[..., None], x, y)
        else:
            kept = 1 if decision.keeps is None else torch.where(running, decision.keeps, 1)[..., None]
            y = kept * y + torch.where(running, decision.weight, 0)[..., None] * x
        carry, running, onward = dict(decision.carry), running & ~halts, decision.onward
    if of.exit is not None:
        run.exits[len(run.exits)] = Exits((), (), running)
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
    plan, count, sizes = inner.attention.plan, x.shape[1], inner.sizes
    states = [held for held in near.held if not held.pairs]
    keys = torch.cat([*(_normed(part.before, held.x.double()) for held in states), normed], 1)
    stored = [held for held in near.held if held.pairs]
    every = sum(held.many for held in near.held) + count
    dense = compile(
        plan.attention, length=every, q_length=count, heads=sizes.heads, kv_heads=sizes.kv_heads,
        head_dim=plan.problem.head_dim, dtype="float64", backend="reference", training=True,
    )  # fmt: skip
    at = [*range(near.first, near.first + count)]
    places = [place for held in states for place in held.at.tolist()] + at
    (q, k, v), given = _projected(inner, normed, at, keys, places), dict[str, Any]()
    for made in (x.double().chunk(2, 2) for x in (held.x for held in stored)):
        old = [_headed(one, sizes.kv_heads) for one in made]
        k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
    for name, own in inner.own.items():
        given[name] = _projected(cast(Projections, own), normed, at, keys, places)
        given[name] = (*given[name], v)[:3]
    names = {table.name for table in plan.attention.inputs}
    given |= {name: table for name, table in near.tables.items() if name in names}
    given |= {name: _normed(maker, normed) for name, maker in inner.made.items()}
    learned = {name: value.double() for name, value in inner.attention.named_parameters()}
    mixed = dense(q, k, v, learned=learned or None, **near.places(count), **given)
    return linear(mixed.transpose(1, 2).flatten(2), inner.o.weight.double())


def _projected(
    of: Projections, x: Tensor, at: list[int], keys: Tensor, places: list[int]
) -> tuple[Tensor, ...]:
    """Queries of x `at` positions, keys and values of `keys` at `places`."""
    made = of.k or of.q
    q = _headed(linear(x, of.q.weight.double()), of.sizes.heads)
    k = _headed(linear(keys, made.weight.double()), of.sizes.kv_heads)
    if of.rotary is not None:
        q, k = _turned(q, at, of.rotary), _turned(k, places, of.rotary)
    if of.v is None:
        return q, k
    return q, k, _headed(linear(keys, of.v.weight.double()), of.sizes.kv_heads)


def _turned(x: Tensor, at: list[int], base: float) -> Tensor:
    """As complex numbers, each multiplied by e^(i angle)."""
    half = x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.tensor(at, dtype=torch.float64)[:, None] * rates
    found = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([found.real, found.imag], -1)
