"""What a stack means, obvious and slow: every layer in float64 by dense attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from attndsl.execution.plan import compile
from attndsl.stacks.module import FFN, Mixer, Residual, StackModule, key


def reference(module: StackModule, x: Tensor, **tables: Any) -> Tensor:
    """What `module` makes of x [B, n, width], in float64; `tables` as it takes them."""
    x = x.double()
    for stage in module.stack.stages:
        for turn in stage.turns:
            for sublayer in turn:
                part = cast(Residual, module.parts[key(sublayer)])
                match stage.norm:
                    case "pre":
                        x = x + _inner(part.inner, _normed(part.before, x), tables)
                    case "post":
                        x = _normed(part.after, x + _inner(part.inner, x, tables))
                    case "sandwich":
                        x = x + _normed(part.behind, _inner(part.inner, _normed(part.before, x), tables))
    return _normed(module.last, x)


def _headed(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


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
