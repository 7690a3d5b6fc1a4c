"""What a stack means, obvious and slow: every layer in float64 by dense attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from attndsl.execution.plan import compile
from attndsl.stacks.layers import FFN, Mixer
from attndsl.stacks.module import StackModule
from attndsl.stacks.tree import Layers, Sublayer


def reference(module: StackModule, x: Tensor, **tables: Any) -> Tensor:
    """What `module` makes of x [B, n, width], in float64; `tables` as it takes them."""
    x = x.double()
    for i, stage in enumerate(module.stack.stages):
        if stage.halting is not None:
            chance = cast(nn.Linear, module.chances[str(i)])
            x = _halting(module, stage, stage.halting.eps, chance, x, tables)
            continue
        for turn in stage.turns:
            for sublayer in turn:
                x = _sublayer(module, stage, sublayer, x, tables)
    return _normed(module.last, x)


def _sublayer(module: StackModule, stage: Layers, of: Sublayer, x: Tensor, tables: dict[str, Any]) -> Tensor:
    part = module.part(of)
    match stage.norm:
        case "pre":
            return x + _inner(part.inner, _normed(part.before, x), tables)
        case "post":
            return _normed(part.after, x + _inner(part.inner, x, tables))
        case "sandwich":
            return x + _normed(part.behind, _inner(part.inner, _normed(part.before, x), tables))


def _halting(
    module: StackModule, stage: Layers, eps: float, chance: nn.Linear, x: Tensor, tables: dict[str, Any]
) -> Tensor:
    """Every token is computed in every turn; one that has halted keeps its state."""
    running = torch.ones(x.shape[:2], dtype=torch.bool)
    total, y = torch.zeros(x.shape[:2], dtype=torch.float64), torch.zeros_like(x)
    for number, turn in enumerate(stage.turns):
        for sublayer in turn:
            x = torch.where(running[..., None], _sublayer(module, stage, sublayer, x, tables), x)
        p = torch.sigmoid(linear(x, chance.weight.double(), chance.bias.double()))[..., 0]
        halts = running & ((total + p >= 1 - eps) | (number == len(stage.turns) - 1))
        weight = torch.where(halts, 1 - total, torch.where(running, p, 0))
        y = y + weight[..., None] * x
        total = total + torch.where(running, p, 0)
        running = running & ~halts
    return y


def _headed(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    weights = {name: value.double() for name, value in norm.state_dict(keep_vars=True).items()}
    return cast(Tensor, torch.func.functional_call(norm, weights, x))


def _inner(inner: nn.Module, x: Tensor, tables: dict[str, Any]) -> Tensor:
    if isinstance(inner, FFN):
        up, down = inner.up, inner.down
        wide = gelu(linear(x, up.weight.double(), up.bias.double()))
        return linear(wide, down.weight.double(), down.bias.double())
    assert isinstance(inner, Mixer)
    plan = inner.attention.plan
    dense = compile(
        plan.attention, length=x.shape[1], heads=inner.heads, kv_heads=inner.kv_heads,
        head_dim=plan.problem.head_dim, dtype="float64", backend="reference", training=True,
    )  # fmt: skip
    q, k, v = (
        _headed(linear(x, made.weight.double()), heads)
        for made, heads in ((inner.q, inner.heads), (inner.k, inner.kv_heads), (inner.v, inner.kv_heads))
    )
    names = {table.name for table in plan.attention.inputs}
    learned = {name: value.double() for name, value in inner.attention.named_parameters()}
    given = {name: table for name, table in tables.items() if name in names}
    mixed = dense(q, k, v, learned=learned or None, **given)
    return linear(mixed.transpose(1, 2).flatten(2), inner.o.weight.double())
