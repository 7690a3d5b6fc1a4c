"""Two streams whose sublayers are undone one by one, so that a backward pass keeps none of what they made.

Gomez et al. 2017, section 3.2; with attention and feed-forward layers in turn, Kitaev et al. 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call

from attndsl.errors import fail
from attndsl.execution.choosing import keeping, remaking
from attndsl.stacks.layers import Near, Residual


@dataclass(frozen=True, eq=False)
class Step:
    """A sublayer, and what it has beside its input."""

    part: Residual
    near: Near

    def made(self, x: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What is added to one stream, of the other; by `weights` in place of those that it has."""
        if weights is None:
            return cast(Tensor, self.part(x, self.near, alone=True))
        return cast(Tensor, functional_call(self.part, dict(weights), (x, self.near), {"alone": True}))

    @property
    def weights(self) -> dict[str, Tensor]:
        """By their names in the sublayer; those that gradients go to."""
        return {name: weight for name, weight in self.part.named_parameters() if weight.requires_grad}

    @property
    def tables(self) -> list[Tensor]:
        """Those that gradients go to."""
        given = (table for table in self.near.tables.values() if isinstance(table, Tensor))
        return [table for table in given if table.requires_grad]


@dataclass(frozen=True, eq=False)
class Kept:
    """Of one sublayer, what its second run needs to be the first again: choices by content, and the states of
    generators that it drew from, by device."""

    choices: list[list[Tensor]]
    generators: dict[torch.device, Tensor]


def run(steps: Sequence[Step], x: Tensor, entering: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both streams behind the steps, which begin as x [B, n, width], and where asked what entered each step.

    Where no gradient is asked for, and where torch traces or transforms the call, they are plain sums.
    """
    every = (tensor for step in steps for tensor in (*step.weights.values(), *step.tables))
    unique = {id(tensor): tensor for tensor in every}
    asked = torch.is_grad_enabled() and (x.requires_grad or bool(unique))
    entered: list[Tensor] = []
    if asked and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        one, other = _Undone.apply(steps, entered if entering else None, x, x, *unique.values())  # type: ignore[no-untyped-call]
        return one, other, entered
    one, other = x, x
    for step in steps:
        if entering:
            entered.append(other)
        one, other = other, one + step.made(other)
    return one, other, entered


class _Undone(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        steps: Sequence[Step],
        entered: list[Tensor] | None,
        one: Tensor,
        other: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.steps, ctx.kept = steps, []
        ctx.training = [step.part.training for step in steps]
        ctx.named = [step.weights for step in steps]
        ctx.order = [*map(id, weights)]
        device = one.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        for step in steps:
            if entered is not None:
                entered.append(other)
            before = _generators(one.device)
            with keeping() as choices:
                made = step.made(other)
            drew = {d: state for d, state in before.items() if not torch.equal(state, _generators(d)[d])}
            ctx.kept.append(Kept(choices, drew))
            one, other = other, one + made
        ctx.save_for_backward(one, other, *weights)
        return one, other

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_one: Tensor, d_other: Tensor) -> Any:
        # those of the weights are of no use but to notice what was changed in place
        one, other, *_ = ctx.saved_tensors
        found: dict[int, Tensor] = {}
        for step, kept, training, weights in zip(
            *map(reversed, (ctx.steps, ctx.kept, ctx.training, ctx.named)), strict=True
        ):
            if step.part.training != training:
                raise fail(
                    "the module changed between train() and eval() before the backward pass",
                    help="a reversible stack runs again there: change it afterwards",
                )
            with torch.enable_grad(), _again(kept, ctx.autocast):
                entering = one.detach().requires_grad_()
                same = all(weight is weights.get(name) for name, weight in step.weights.items())
                made = step.made(entering, None if same else weights)
            own = [*weights.values(), *step.tables]
            grads = torch.autograd.grad(made, [entering, *own], d_other.to(made.dtype), allow_unused=True)
            for tensor, grad in zip(own, grads[1:], strict=True):
                if grad is not None:
                    before = found.get(id(tensor))
                    found[id(tensor)] = grad if before is None else before + grad
            one, other = other - made.detach(), one
            back = d_one if grads[0] is None else d_one + grads[0]
            d_one, d_other = d_other, back
        return None, None, d_one, d_other, *(found.get(name) for name in ctx.order)


def _generators(device: torch.device) -> dict[torch.device, Tensor]:
    """The states of the global generators that work on a device draws from."""
    cpu = {torch.device("cpu"): torch.get_rng_state()}
    return (
        cpu if device.type == "cpu" else cpu | {device: torch.get_device_module(device).get_rng_state(device)}
    )


@contextmanager
def _again(kept: Kept, autocast: tuple[str, torch.dtype, bool]) -> Iterator[None]:
    """As the first run was; generators are then as they were before."""
    device, dtype, enabled = autocast
    others = [d for d in kept.generators if d.type != "cpu"]
    kind = device if others else "cuda"
    with (
        remaking(kept.choices),
        torch.autocast(device, dtype, enabled=enabled),
        torch.random.fork_rng(others, enabled=bool(kept.generators), device_type=kind),
    ):
        for d, state in kept.generators.items():
            torch.set_rng_state(state) if d.type == "cpu" else torch.get_device_module(d).set_rng_state(
                state, d
            )
        yield
