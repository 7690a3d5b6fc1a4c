"""Two streams whose sublayers are undone one by one, so that a backward pass keeps none of what they made.

Gomez et al. 2017, section 3.2; with attention and feed-forward layers in turn, Kitaev et al. 2020, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call

from attndsl.errors import fail
from attndsl.execution.choosing import keeping, remaking
from attndsl.stacks.layers import Near, Residual, traced


@dataclass(frozen=True, eq=False)
class Step:
    """A sublayer, and what it has beside its input."""

    part: Residual
    near: Near

    def made(self, x: Tensor) -> Tensor:
        """What is added to one stream, of the other."""
        return cast(Tensor, self.part(x, self.near, alone=True))

    def made_by(self, weights: Mapping[str, Tensor], tables: Mapping[str, Any], x: Tensor) -> Tensor:
        """The same by these in place of its own."""
        near = replace(self.near, tables=tables)
        return cast(Tensor, functional_call(self.part, dict(weights), (x, near), {"alone": True}))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the sublayer."""
        return {**dict(self.part.named_parameters()), **dict(self.part.named_buffers())}

    @property
    def modes(self) -> list[bool]:
        """Whether it trains, module by module."""
        return [module.training for module in self.part.modules()]

    def read(self) -> list[Tensor]:
        """All tensors that it is made by, beside x."""
        tables = [table for table in self.near.tables.values() if isinstance(table, Tensor)]
        return [*self.weights.values(), *tables]


@dataclass(frozen=True, eq=False)
class Kept:
    """Of one sublayer, what its second run needs to be the first again.

    modes, weights: as in `Step`.
    choices:        by content, call by call.
    generators:     by device, the states of those that it drew from.
    """

    modes: list[bool]
    weights: dict[str, Tensor]
    choices: list[list[Tensor]]
    generators: dict[torch.device, Tensor]

    @classmethod
    def of(cls, step: Step, x: Tensor) -> tuple[Tensor, Kept]:
        """What a step makes of x, and what is kept. Raises AttnError where it changes a buffer."""
        weights, before = step.weights, _generators(x.device)
        versions = {name: buffer._version for name, buffer in step.part.named_buffers()}
        with keeping() as choices:
            made = step.made(x)
        for name, buffer in step.part.named_buffers():
            if buffer is not weights[name] or buffer._version != versions[name]:
                raise fail(
                    f"a call of `{name}` changes it, and a reversible stack calls each layer twice",
                    help="take a norm without running statistics: nn.LayerNorm, nn.RMSNorm",
                )
        drew = {d: state for d, state in before.items() if not torch.equal(state, _generators(d)[d])}
        return made, cls(step.modes, weights, choices, drew)


def run(steps: Sequence[Step], x: Tensor, entering: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Both streams behind the steps, which begin as x [B, n, width], and where asked what entered each step.

    Where no gradient is asked for, and where torch traces or transforms the call, they are plain sums.
    """
    every = {id(tensor): tensor for step in steps for tensor in step.read()}
    wanted = [tensor for tensor in every.values() if tensor.requires_grad]
    entered: list[Tensor] = []
    if torch.is_grad_enabled() and (x.requires_grad or wanted) and not traced():
        others = [tensor for tensor in every.values() if not tensor.requires_grad]
        one, other = _Undone.apply(steps, entered if entering else None, others, x, x, *wanted)  # type: ignore[no-untyped-call]
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
        others: Sequence[Tensor],
        one: Tensor,
        other: Tensor,
        *wanted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """`wanted` are all that gradients go to beside the streams, `others` what they do not go to."""
        ctx.steps, ctx.kept, ctx.wanted = steps, [], wanted
        device = one.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        for step in steps:
            if entered is not None:
                entered.append(other)
            made, kept = Kept.of(step, other)
            ctx.kept.append(kept)
            one, other = other, one + made
        # all but the streams is saved to notice what is changed in place
        ctx.save_for_backward(one, other, *wanted, *others)
        return one, other

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_one: Tensor, d_other: Tensor) -> Any:
        one, other = ctx.saved_tensors[:2]
        # of their own: hooks of tensors are not called twice, and tables may be made of weights
        own = {id(tensor): tensor.detach().requires_grad_() for tensor in ctx.wanted}
        found: dict[int, Tensor] = {}
        for step, kept in zip(reversed(ctx.steps), reversed(ctx.kept), strict=True):
            if step.modes != kept.modes:
                raise fail(
                    "the module changed between train() and eval() before the backward pass",
                    help="a reversible stack runs again there: change it afterwards",
                )
            weights = {name: own.get(id(weight), weight) for name, weight in kept.weights.items()}
            tables = {name: own.get(id(table), table) for name, table in step.near.tables.items()}
            with torch.enable_grad(), _again(kept, ctx.autocast):
                entering = one.detach().requires_grad_()
                # a view: hooks on several gradients, as FlopCounterMode has, take no leaf here
                made = step.made_by(weights, tables, entering.view_as(entering))
            read = (*kept.weights.values(), *step.near.tables.values())
            keys = [key for key in dict.fromkeys(map(id, read)) if key in own]
            leaves = [entering, *(own[key] for key in keys)]
            grads = torch.autograd.grad(made, leaves, d_other.to(made.dtype), allow_unused=True)
            for key, grad in zip(keys, grads[1:], strict=True):
                if grad is not None:
                    found[key] = found[key] + grad if key in found else grad
            one, other = other - made.detach(), one
            back = d_one if grads[0] is None else d_one + grads[0]
            d_one, d_other = d_other, back
        return None, None, None, d_one, d_other, *(found.get(id(tensor)) for tensor in ctx.wanted)


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
