"""How torch sees a plan: a plain call as an autograd.Function, any other as one operator, `attndsl::attend`.

In the operator everything that is no tensor or size travels as one text, the identity of a `Lowered`: equal
ones give one graph, and a saved program finds its attention in any process (`lowered.find`). What it costs to
dispatch is several times what a small call takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from attndsl.analysis.work import products
from attndsl.axis import Axis
from attndsl.backend import Call, Gradients, Paged, Pages, State, Stateful
from attndsl.errors import AttnError, asking, fail
from attndsl.execution import lowered, spoiled
from attndsl.execution.choosing import chosen
from attndsl.execution.lowered import At, Lowered, Places
from attndsl.language.lookups import placed
from attndsl.tiles.lowering import Sizes

Again = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""What a `Repeatable` kernel prepared."""
RECORDING = torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """As torch.func.vjp, without an auxiliary output; primals and results are tensors, and tuples or dicts
    of them.

    Below the dispatcher, where autograd would record nothing, it is let in again.
    """
    given, shape = pytree.tree_flatten(primals)
    with torch.enable_grad(), ExitStack() as recording:
        for key in RECORDING:
            recording.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        leaves = [x.detach().requires_grad_() for x in given]
        found, found_shape = pytree.tree_flatten(function(*pytree.tree_unflatten(leaves, shape)))

    def pull(slopes: Any) -> tuple[Any, ...]:
        ends = [
            end for end in zip(found, found_shape.flatten_up_to(slopes), strict=True) if end[0].requires_grad
        ]
        if not ends or not leaves:
            return pytree.tree_unflatten([torch.zeros_like(x) for x in given], shape)  # type: ignore[no-any-return]
        outputs, towards = zip(*ends, strict=True)
        grads = torch.autograd.grad(outputs, leaves, towards, allow_unused=True, materialize_grads=True)
        return pytree.tree_unflatten(grads, shape)  # type: ignore[no-any-return]

    return pytree.tree_unflatten([x.detach() for x in found], found_shape), pull


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast would round what kernels compute in float32 on purpose."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@torch.library.custom_op("attndsl::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    q_offset: list[int] | None,
    q_at: Tensor | None,
    k_offset: list[int] | None,
    k_at: Tensor | None,
    n: int | None,
    identity: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output [B, H, nq, Dv] and log-sum-exp [B, H, nq] as in `Kernel`, and what the backward pass keeps.

    `tensors` as in `Lowered.tensors`, `q_offset` to `n` as in `lowered.Places`.
    """
    found, places = lowered.find(identity, tensors), (q_offset, q_at, k_offset, k_at, n)
    out, lse, kept = _attend(found, q, k, v, tensors, found.sizes(q, k, places))
    # as a graph expects them
    return out.contiguous(), lse.contiguous(), [x.contiguous() for x in kept]


def _attend(
    found: Lowered,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sizes,
    again: Again | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`again`, if it is given, takes no halves and what is in memory, and what it returns has been checked
    before."""
    if again is not None:
        out, lse = again(q, k, v)
        if spoiled.finite([out]):
            return out, lse, []
    if not len(q):
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        return out, q.new_zeros(q.shape[:3], dtype=wide), [out.to(wide)] if _rounds(q) else []
    out, lse = attended(found, _call_of(found, q, k, v, tensors, sizes))
    return (out.to(q.dtype), lse, [out.to(lse.dtype)]) if _rounds(q) else (out, lse, [])


def attended(found: Lowered, call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call, as in `Kernel`."""
    with _full_precision(call.q.device):
        if found.attention.approx is not None:
            # one number that is not finite reaches all rows, and no pair tells which
            return _forward(found, call)
        if found.looks(call):
            return spoiled.forward(call, lambda call: _forward(found, call))
        return _forward(found, spoiled.cleared(call))


def attended_in_pages(found: Lowered, call: Call, pages: Pages) -> tuple[Tensor, Tensor] | None:
    """The same by a kernel that finds keys in pages; None where it cannot, and where the output is not
    finite: which rows have read what is not then takes the keys themselves."""
    kernel = found.kernel
    if not isinstance(kernel, Paged):
        return None
    heads, backend = call.q.shape[1], f"the backend `{found.backend}`"
    with _full_precision(call.q.device), placed(found.attention, heads), asking(backend):
        result = kernel.paged(call, pages)
    if result is None:
        return None
    out, lse = _checked(found.backend, call, result)
    return (out, lse) if spoiled.finite([out]) else None


def _call_of(
    found: Lowered, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], sizes: Sizes
) -> Call:
    q, k, v, *tables = map(in_memory, (q, k, v, *tensors))
    return found.call_of(q, k, v, found.named(tables), sizes)


def in_memory(x: Tensor) -> Tensor:
    """With its numbers where it says that they stand: those of a view that negates are others, and those of
    what autograd knows to be zeros nowhere."""
    return x.clone() if x.is_neg() or x._is_zerotensor() else x


def step(
    found: Lowered,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sizes: Sizes,
    state: State | None,
) -> tuple[Tensor, State]:
    """The output, and the state after it; see `Stateful`."""
    kernel, after = found.kernel, []
    assert isinstance(kernel, Stateful)

    def run(call: Call) -> tuple[Tensor, Tensor]:
        *results, new = kernel.step(call, state)
        after.append(new)
        return results[0], results[1]

    out, _, _ = _attend(replace(found, kernel=run), q, k, v, tensors, sizes)
    return out, after[0]


def _rounds(q: Tensor) -> bool:
    """Whether the output loses digits in q's dtype that the backward pass needs: there its products with what
    comes back are differences of large sums, so it is kept as it was."""
    return q.dtype.itemsize < 4


def _forward(found: Lowered, call: Call) -> tuple[Tensor, Tensor]:
    try:
        result = found.kernel(call)
    except Exception:
        # here alone: to enter both takes as long as to build the call
        with placed(found.attention, call.q.shape[1]), asking(f"the backend `{found.backend}`"):
            raise
    return _checked(found.backend, call, result)


def _checked(backend: str, call: Call, result: object) -> tuple[Tensor, Tensor]:
    """The result, if it is what `Kernel` promises."""
    if not (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], Tensor)
        and isinstance(result[1], Tensor)
    ):
        raise fail(f"the backend `{backend}` returned {_described(result)}, not (output, log-sum-exp)")
    out, lse = result
    q, k, v = call.q, call.k, call.v
    if out is q or out is k or out is v or lse is q or lse is k or lse is v:
        raise fail(f"the backend `{backend}` returned one of its arguments: it must return new tensors")
    wide = torch.promote_types(q.dtype, torch.float32)
    wanted = (
        ("output", out, [*q.shape[:3], v.shape[3]], out.dtype if out.dtype == wide else q.dtype),
        ("log-sum-exp", lse, [*q.shape[:3]], wide),
    )
    for name, part, shape, dtype in wanted:
        if part.dtype != dtype or [*part.shape] != shape or part.device != q.device:
            raise fail(
                f"the backend `{backend}` returned the {name} as {_described(part)}, "
                f"not {_tensor(dtype, shape, q.device)}"
            )
    return out, lse


def _checked_gradients(backend: str, call: Call, wanted: Sequence[str], result: object) -> Gradients:
    """The gradients, if they are what `Differentiable` promises."""
    if not isinstance(result, tuple) or len(result) != 4 or not isinstance(result[3], Mapping):
        raise fail(
            f"the backend `{backend}` returned {_described(result)} as gradients of q, k, v and tables"
        )
    named = dict(zip("qkv", result, strict=False)) | {name: result[3].get(name) for name in wanted}
    for name, grad in named.items():
        x = getattr(call, name) if name in "qkv" else call.tables[name]
        if not isinstance(grad, Tensor) or grad.shape != x.shape:
            raise fail(
                f"the backend `{backend}` returned {_described(grad)} as the gradient of `{name}`, "
                f"which is {_described(x)}"
            )
    return result


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
    kept: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: list[Tensor],
    wanted: list[bool],
    q_offset: list[int] | None,
    q_at: Tensor | None,
    k_offset: list[int] | None,
    k_at: Tensor | None,
    n: int | None,
    identity: str,
) -> list[Tensor]:
    """Gradients of q, k, v and of the wanted among `tensors`, contiguous."""
    found, places = lowered.find(identity, tensors), (q_offset, q_at, k_offset, k_at, n)
    slopes, results = (grad_out, grad_lse), (kept[0] if kept else out, lse)
    grads = _gradients(found, slopes, results, q, k, v, tensors, wanted, found.sizes(q, k, places))
    return [grad.contiguous() for grad in grads]


def _gradients(
    found: Lowered,
    slopes: tuple[Tensor, Tensor | None],
    results: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    sizes: Sizes,
) -> list[Tensor]:
    if reason := found.untrainable:
        raise fail(
            f"the backend `{found.backend}` has no gradients for this: {reason}",
            help="compile with `training=True` to choose among those that have",
        )
    needing = [name for name, w in found.named(wanted).items() if w]
    if not len(q):
        tables = found.named(tensors)
        return [torch.zeros_like(x) for x in (q, k, v, *(tables[name] for name in needing))]
    with _full_precision(q.device):
        call = _call_of(found, q, k, v, tensors, sizes)
        slopes = in_memory(slopes[0]), slopes[1] if slopes[1] is None else in_memory(slopes[1])
        if found.attention.approx is not None:
            return [*_gradient(found, call, needing, results, slopes)[:3]]
        if found.looks(call):
            gq, gk, gv, by_name = spoiled.gradient(
                call,
                found.tables,
                results,
                slopes,
                lambda call: _forward(found, call),
                lambda call, results, slopes: _gradient(found, call, needing, results, slopes),
            )
        else:
            gq, gk, gv, by_name = _gradient(found, spoiled.cleared(call), needing, results, slopes)
    return [gq, gk, gv, *(by_name[name] for name in needing)]


def _gradient(
    found: Lowered,
    call: Call,
    wanted: Sequence[str],
    results: tuple[Tensor, Tensor],
    slopes: tuple[Tensor, Tensor | None],
) -> Gradients:
    kernel: Any = found.kernel
    if found.differentiable:
        with asking(f"the backend `{found.backend}`"):
            gradients = kernel.gradient(call, wanted, *results, *slopes)
        return _checked_gradients(found.backend, call, wanted, gradients)

    def again(q: Tensor, k: Tensor, v: Tensor, learned: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = kernel(replace(call, q=q, k=k, v=v, tables={**call.tables, **learned}))
        return found

    grad_out, grad_lse = slopes
    if found.selected:
        # while a function is differentiated no tensor can be read
        call.tiles()
    _, pull = vjp(again, call.q, call.k, call.v, {name: call.tables[name] for name in wanted})
    grads: Gradients = pull((grad_out, torch.zeros_like(results[1]) if grad_lse is None else grad_lse))
    return grads


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    shape, wide = (*q.shape[:3], v.shape[3]), torch.promote_types(q.dtype, torch.float32)
    kept = [q.new_empty(shape, dtype=wide)] if _rounds(q) else []
    return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=wide), kept


@attend_backward.register_fake
def _(*given: Any) -> list[Tensor]:
    q, k, v, tensors, wanted = given[5:10]
    return [x.new_empty(x.shape) for x in (q, k, v, *(t for t, w in zip(tensors, wanted, strict=True) if w))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    q, k, v, tensors, ctx.q_offset, q_at, ctx.k_offset, k_at, ctx.n, ctx.identity = inputs
    out, lse, kept = output
    ctx.set_materialize_grads(False)
    ctx.wanted = [t.requires_grad for t in tensors]
    ctx.kept = len(kept)
    ctx.found = lowered.alive(ctx.identity)  # until the backward pass
    ctx.save_for_backward(out, lse, q, k, v, q_at, k_at, *kept, *tensors)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Any) -> tuple[Any, ...]:
    out, lse, q, k, v, q_at, k_at, *others = ctx.saved_tensors
    kept, tensors = others[: ctx.kept], others[ctx.kept :]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    places = ctx.q_offset, q_at, ctx.k_offset, k_at, ctx.n, ctx.identity
    grads = iter(attend_backward(grad_out, grad_lse, out, lse, kept, q, k, v, tensors, ctx.wanted, *places))
    dense = [next(grads) for _ in range(3)]
    learned = [next(grads) if w else None for w in ctx.wanted]
    return *dense, learned, None, None, None, None, None, None


attend.register_autograd(_backward, setup_context=_setup_context)


def _flops(
    places: tuple[Any, ...], identity: str, tensors: Sequence[Tensor], *qkv: Tensor
) -> tuple[int, int]:
    """Of the products with a query or key and with a value, over the live pairs; halves of what stands in
    their place."""
    found, (q, k, v) = lowered.find(identity, tensors), qkv
    if found.attention.approx is not None:
        (batch, heads, nq, width), (n, v_width) = q.shape, v.shape[2:]
        half = products(found.attention.approx, batch * heads, nq, n, width, v_width)
        return half, half
    call = found.call_of(q, k, v, found.named(tensors), found.sizes(q, k, places))
    blocks = call.block_mask
    pairs = sum(blocks.grids[i].nnz for i in blocks.index.ravel()) * len(q) * q.shape[1] // blocks.index.size
    return 2 * pairs * q.shape[3], 2 * pairs * v.shape[3]


@register_flop_formula(torch.ops.attndsl.attend, get_raw=True)
def _(q: Tensor, k: Tensor, v: Tensor, tensors: list[Tensor], *more: Any, **_: Any) -> int:
    return sum(_flops(more[:-1], more[-1], tensors, q, k, v))


@register_flop_formula(torch.ops.attndsl.attend_backward, get_raw=True)
def _(*given: Any, **_: Any) -> int:
    q, k, v, tensors, _, *places, identity = given[5:]
    vectors, values = _flops(tuple(places), identity, tensors, q, k, v)
    return 3 * vectors + 2 * values


def _once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Gradients that refuse to be differentiated. Those of torch's once_differentiable are constants where no
    gradient comes in that has one itself: a penalty on them would be dropped without a word."""

    def wrapper(ctx: Any, *slopes: Tensor | None) -> tuple[Any, ...]:
        with torch.no_grad():
            found = backward(ctx, *slopes)
        if not torch.is_grad_enabled():
            return found
        given = [x for x in found if x is not None]
        # the node that refuses stands between these gradients and what they are of
        sources = [x for x in ctx.saved_tensors if x.requires_grad]
        refusing = torch._C._functions.DelayedError(TWICE, len(given) + len(sources))
        refused = iter(refusing(*given, *sources))
        return tuple([None if x is None else next(refused) for x in found])

    return wrapper


TWICE = b"a plan is differentiated once: its gradients have no gradients"


class _Function(torch.autograd.Function):
    """What `attend` is to autograd, without the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        found: Lowered,
        sizes: Sizes,
        again: Again | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse, kept = _attend(found, q, k, v, others, sizes, again)
        ctx.set_materialize_grads(False)
        ctx.found, ctx.sizes = found, sizes
        ctx.save_for_backward(kept[0] if kept else out, lse, q, k, v, *others)
        return out, lse

    @staticmethod
    @_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        out, lse, q, k, v, *others = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out, dtype=q.dtype)
        wanted = ctx.needs_input_grad[6:]
        results, slopes = (out, lse), (grad_out, grad_lse)
        grads = iter(_gradients(ctx.found, slopes, results, q, k, v, others, wanted, ctx.sizes))
        dense = [next(grads) for _ in range(3)]
        return None, None, None, *dense, *(next(grads) if w else None for w in wanted)


def _looped(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The rule of vmap: one call after the other, for tables may differ in what kernels share."""

    def vmap(info: Any, in_dims: tuple[Any, ...], *given: Any) -> tuple[Any, Any]:
        found = []
        for i in range(info.batch_size):
            here = (x.select(d, i) if isinstance(d, int) else x for x, d in zip(given, in_dims, strict=True))
            found.append(function.apply(*here))  # type: ignore[no-untyped-call]
        stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)

    return vmap


class _Transformed(torch.autograd.Function):
    """`attend` under torch.func."""

    @staticmethod
    def forward(
        found: Lowered, sizes: Sizes, q: Tensor, k: Tensor, v: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        out, lse, kept = _attend(found, q, k, v, others, sizes)
        return out, lse, kept[0] if kept else out.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.found, ctx.sizes, *given = inputs
        _, lse, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(kept, lse, *given)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor, _: Any) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[5:]
        grads = iter(_Slopes.apply(ctx.found, ctx.sizes, wanted, grad_out, grad_lse, *ctx.saved_tensors))  # type: ignore[no-untyped-call]
        dense = [next(grads) for _ in range(3)]
        return None, None, *dense, *(next(grads) if w else None for w in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode()


class _Slopes(torch.autograd.Function):
    """The gradients of `_Transformed`."""

    @staticmethod
    def forward(
        found: Lowered, sizes: Sizes, wanted: Sequence[bool], grad_out: Tensor, grad_lse: Tensor,
        out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return tuple(_gradients(found, (grad_out, grad_lse), (out, lse), q, k, v, others, wanted, sizes))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        raise fail("attndsl has no second derivatives", help="for small n write the formula with torch")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _no_forward_mode()


_Transformed.vmap = staticmethod(_looped(_Transformed))  # type: ignore[method-assign]
_Slopes.vmap = staticmethod(_looped(_Slopes))  # type: ignore[method-assign]


def _no_forward_mode() -> AttnError:
    return fail(
        "attndsl has no forward-mode derivatives",
        help="use reverse mode: torch.autograd.grad or .backward()",
    )


def refuse_script(plan: Any) -> NoReturn:
    """Raises AttnError: what torch.jit.script asks of an object first."""
    raise fail("TorchScript knows nothing of plans", help="torch.compile and torch.export take them")


def check_tangents(*tensors: Tensor) -> None:
    """Raises AttnError where one carries a tangent: the operator would drop it without a word."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
        for x in tensors
    ):
        raise _no_forward_mode()


def _tensor_of(at: At) -> Tensor | None:
    """The positions as the operator takes them."""
    if not isinstance(at, Axis):
        return at
    return torch.from_numpy(np.stack([at.positions(row) for row in range(len(at.rows))]))


PLAIN = (Tensor, torch.nn.Parameter)


def watched(q: Tensor) -> bool:
    """Whether something is to see one operator in place of what it does."""
    return bool(
        torch.compiler.is_compiling()
        or q.is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def as_operator(q: Tensor, *more: Tensor) -> bool:
    """Whether a call of these tensors is to be one operator. Raises AttnError for a DTensor."""
    others = [type(x) for x in (q, *more) if type(x) not in PLAIN]
    # by name: to import the class takes as long as to import torch
    if any((x.__module__, x.__name__) == ("torch.distributed.tensor", "DTensor") for x in others):
        raise fail(
            "a plan takes no DTensor: how it may be sharded depends on the attention",
            help="call it inside `local_map`, on the parts of each rank: docs/torch.md shows how",
        )
    return watched(q) or bool(others)


def run(
    found: Lowered, q: Tensor, k: Tensor, v: Tensor, tensors: Sequence[Tensor], places: Places
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, by whichever way in is right for what watches the call."""
    whole = as_operator(q, k, v, *tensors)
    if whole:
        q_offset, q_at, k_offset, k_at, n = places
        places = q_offset, _tensor_of(q_at), k_offset, _tensor_of(k_at), n
    if found.selected:
        tensors = [*tensors, *chosen(found, q, k, tensors, places, whole)]
    if whole:
        # AOTInductor passes no empty list on
        out, lse, _ = attend(q, k, v, list(tensors) or [q.new_empty(0)], *places, found.identity)
        return out, lse
    sizes = found.sizes(q, k, places)
    if torch._C._are_functorch_transforms_active():
        out, lse, _ = _Transformed.apply(found, sizes, q, k, v, *tensors)  # type: ignore[no-untyped-call]
    elif torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *tensors)):
        out, lse = _Function.apply(found, sizes, None, q, k, v, *tensors)  # type: ignore[no-untyped-call]
    else:
        out, lse, _ = _attend(found, q, k, v, tensors, sizes)
    return out, lse


def repeat(
    found: Lowered, sizes: Sizes, again: Again, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """As `run`, of a call that nothing watches and that is like the one which `again` was prepared by."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _Function.apply(found, sizes, again, q, k, v)  # type: ignore[no-untyped-call]
    else:
        out, lse, _ = _attend(found, q, k, v, (), sizes, again)
    return out, lse
