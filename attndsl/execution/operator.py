"""The one torch operator of attndsl, `attndsl::attend`: what torch.compile and torch.export see of a plan.

Everything that is no tensor or integer stays behind it. A `Runner` is named by an integer handle; the
table of handles holds it weakly, so it lives as long as the plan (or, in eager mode, the graph of the
backward pass) that owns it. A compiled module keeps its plan alive and so its handle valid.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attndsl.backend import Call, Kernel
from attndsl.errors import fail


@runtime_checkable
class Differentiable(Protocol):
    """A kernel that gives its own gradients; any other is differentiated by running it again."""

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """As `Kernel`."""

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """As `Kernel`, without recording anything for autograd."""

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """Gradients of q, k, v and, by name, of the wanted tables."""


@dataclass(frozen=True, eq=False)
class Runner:
    """A kernel, the names of the tables in the order they are passed, and how tensors become a Call.

    call_of(q, k, v, tables, q_offset, k_offset) -> Call; it may build or look up the BlockMask.
    backend is the name of who made the kernel, untrainable() why that has no gradients, or None.
    """

    kernel: Kernel | Differentiable
    names: tuple[str, ...]
    call_of: Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor], list[int], list[int]], Call]
    backend: str = ""
    untrainable: Callable[[], str | None] = lambda: None


vjp: Callable[..., tuple[Any, Callable[..., Any]]] = torch.func.vjp  # type: ignore[assignment]
"""Autograd records nothing inside an operator; torch.func does."""

_runners: WeakValueDictionary[int, Runner] = WeakValueDictionary()
_handles = itertools.count()


def register(runner: Runner) -> int:
    """The runner's handle, valid as long as the runner is alive."""
    handle = next(_handles)
    _runners[handle] = runner
    return handle


@torch.library.custom_op("attndsl::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    q_offset: list[int],
    k_offset: list[int],
    handle: int,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, nq, Dv] and log-sum-exp [B, H, nq] of the runner; see `Kernel`."""
    runner = _runners[handle]
    named = dict(zip(runner.names, tables, strict=True))
    call = runner.call_of(q, k, v, named, list(q_offset), list(k_offset))
    if isinstance(runner.kernel, Differentiable):
        return _checked(runner.backend, call, runner.kernel.forward(call))
    with torch.no_grad():
        return _checked(runner.backend, call, runner.kernel(call))


def _checked(backend: str, call: Call, result: object) -> tuple[Tensor, Tensor]:
    """The result, if it is what `Kernel` promises."""
    if not isinstance(result, tuple) or [isinstance(part, Tensor) for part in result] != [True, True]:
        raise fail(f"the backend `{backend}` returned {_described(result)}, not (output, log-sum-exp)")
    out, lse = result
    q, v = call.q, call.v
    wanted = {
        "output": (out, [*q.shape[:3], v.shape[3]], q.dtype),
        "log-sum-exp": (lse, [*q.shape[:3]], torch.promote_types(q.dtype, torch.float32)),
    }
    for name, (part, shape, dtype) in wanted.items():
        if (list(part.shape), part.dtype, part.device) != (shape, dtype, q.device):
            raise fail(
                f"the backend `{backend}` returned the {name} as {_described(part)}, "
                f"not {_tensor(dtype, shape, q.device)}"
            )
    return out, lse


def _tensor(dtype: torch.dtype, shape: list[int], device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')}{shape} on {device}"


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return _tensor(value.dtype, [*value.shape], value.device)
    if isinstance(value, tuple):
        return f"({', '.join(map(_described, value))})"
    return type(value).__name__


@torch.library.custom_op("attndsl::attend_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    wanted: list[bool],
    q_offset: list[int],
    k_offset: list[int],
    handle: int,
) -> list[Tensor]:
    """Gradients of q, k, v and of the wanted tables."""
    runner = _runners[handle]
    if reason := runner.untrainable():
        raise fail(
            f"the backend `{runner.backend}` has no gradients for this: {reason}",
            help="compile with `training=True` to choose among those that have",
        )
    named = dict(zip(runner.names, tables, strict=True))
    needing = [name for name, w in zip(runner.names, wanted, strict=True) if w]
    call = runner.call_of(q, k, v, named, list(q_offset), list(k_offset))
    if isinstance(runner.kernel, Differentiable):
        gq, gk, gv, by_name = runner.kernel.gradient(call, needing, out, lse, grad_out, grad_lse)
        return [gq, gk, gv, *(by_name[name] for name in needing)]

    def again(q: Tensor, k: Tensor, v: Tensor, learned: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return runner.kernel(replace(call, q=q, k=k, v=v, tables={**named, **learned}))

    _, pull = vjp(again, q, k, v, {name: named[name] for name in needing})
    gq, gk, gv, by_name = pull((grad_out, torch.zeros_like(lse) if grad_lse is None else grad_lse))
    # the fake kernel promises contiguous tensors
    return [grad.contiguous() for grad in (gq, gk, gv, *(by_name[name] for name in needing))]


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    q_offset: list[int],
    k_offset: list[int],
    handle: int,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@attend_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[Tensor],
    wanted: list[bool],
    q_offset: list[int],
    k_offset: list[int],
    handle: int,
) -> list[Tensor]:
    needing = [t for t, w in zip(tables, wanted, strict=True) if w]
    return [x.new_empty(x.shape) for x in (q, k, v, *needing)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, tables, ctx.q_offset, ctx.k_offset, ctx.handle = inputs
    ctx.set_materialize_grads(False)
    ctx.wanted = [t.requires_grad for t in tables]
    ctx.runner = _runners[ctx.handle]
    ctx.save_for_backward(*output, q, k, v, *tables)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, q, k, v, *tables = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = iter(
        attend_backward(
            grad_out,
            grad_lse,
            out,
            lse,
            q,
            k,
            v,
            tables,
            ctx.wanted,
            ctx.q_offset,
            ctx.k_offset,
            ctx.handle,
        )
    )
    dense = [next(grads) for _ in range(3)]
    learned = [next(grads) if w else None for w in ctx.wanted]
    # torch takes an empty list for a list of tensors, whose gradient is a list as well
    offsets: list[list[None] | None] = [None if offset else [] for offset in (ctx.q_offset, ctx.k_offset)]
    return *dense, learned, *offsets, None


attend.register_autograd(_backward, setup_context=_setup_context)
