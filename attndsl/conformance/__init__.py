"""The conformance suite: what every backend, ours or a third party's, must compute.

    import pytest
    from attndsl.conformance import CASES, check, supported

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_mine(case):
        if reason := check("mine", case):
            pytest.skip(reason)

    def test_mine_does_something():
        assert supported("mine")

`check` compares output, log-sum-exp and gradients with formulas that are written by hand beside each
mechanism and evaluated in float64 pair by pair; gradients only where the backend has them: one that
declines to train is held to the rest. The error may be twice that of SDPA in the same dtype on the same q,
k and v, plus a few roundings of the result and one of the largest logit. Tensors lie in memory in many
ways, and memory that a kernel does not write is NaN while it runs.

NaN and infinities that no live pair reaches touch nothing. A NaN that a live pair reaches stays: it is in
the row's output where the formula has it, and in gradients of what the row reaches and of nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attndsl
from attndsl.backend import Problem
from attndsl.conformance.cases import (
    CASES,
    Case,
    Named,
    attention_of,
    given_of,
    inputs_of,
    keys_reached,
    leaves_of,
    make_odd,
)
from attndsl.conformance.formula import Inputs, attend, related
from attndsl.conformance.mechanisms import MECHANISMS, Mechanism
from attndsl.execution import choice, registry

__all__ = ["CASES", "MECHANISMS", "Case", "Mechanism", "check", "declined", "supported"]

ROUNDINGS, GRAD_ROUNDINGS = 2, 4
"""Error allowed beside that of SDPA, in units of the dtype's epsilon; the latter for gradients."""
FAR = -1000
"""The log-sum-exp of a row that a large number masks wholly is less."""


def check(backend: str, case: Case, device: str = "cpu") -> str | None:
    """None where the backend of this name agrees on a `case`, one of CASES, or the reason that it gave for
    declining. Raises AssertionError where it does not agree. `device` is torch's name of where it runs."""
    training = declined(backend, case, True, device) is None
    if not training and (reason := declined(backend, case, False, device)):
        return reason
    exact = _exact(case)
    with _poisoned_memory():
        found = _run(backend, case, exact.inputs, training, device)
    for name, result in found.items():
        _compare(name, result.double(), exact)
    return None


def _compare(name: str, mine: Tensor, exact: Exact) -> None:
    """Raises AssertionError where the result of this name is not the exact one.

    Rows that are wholly masked by a large number have a log-sum-exp of that size, and are off by roundings
    of it.
    """
    value = exact.results[name]
    assert mine.shape == value.shape, f"{name}: shape {tuple(mine.shape)}, not {tuple(value.shape)}"
    assert mine[value.isnan()].isnan().all(), f"{name} hides a NaN"
    either = exact.reached[name] & mine.isnan()
    mine, value = mine.masked_fill(either, 0.0), value.masked_fill(either, 0.0)
    assert not mine.isnan().any(), f"{name} is NaN in {int(mine.isnan().sum())} places, {_at(mine.isnan())}"
    assert torch.equal(mine == -torch.inf, value == -torch.inf), f"{name}: other rows are -inf"
    if name == "lse":
        far = exact.masked
        off = _relative(mine[far] / value[far], torch.ones_like(value[far]))
        assert off <= exact.far, f"{name} of masked rows: error {off:.2e}, allowed {exact.far:.2e}"
        mine, value = mine.masked_fill(far, 0.0), value.masked_fill(far, 0.0)
    error, bound = _relative(mine, value), exact.allowed.get(name, exact.allowed["gradient"])
    assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}, {_worst(mine, value)}"


def supported(backend: str) -> list[Case]:
    """The cases that the backend does not decline; none, and `check` shows nothing."""
    return [case for case in CASES if declined(backend, case) is None]


def declined(backend: str, case: Case, training: bool = False, device: str = "cpu") -> str | None:
    """The reason that the backend gives for declining the case, with gradients if `training`, or None;
    `device` as of `check`."""
    problem = _problem(case, training, device)
    plugin = registry.plugin("backends", backend)
    attention = _attention(case.mechanism)
    reason: object = choice.declined(plugin, attention.attended, problem.attended(attention))
    assert reason is None or (isinstance(reason, str) and reason), f"neither None nor a reason: {reason!r}"
    return reason


_attention = functools.cache(attention_of)


@dataclass(frozen=True, eq=False)
class Exact:
    """What a case gives: the inputs and, by name, the results and the places that a row which is NaN reaches
    by a live pair. masked are the rows that a large number masks wholly. allowed and far are the errors
    allowed."""

    inputs: Named
    results: Named
    reached: Named
    masked: Tensor
    allowed: dict[str, float]
    far: float


@functools.lru_cache(maxsize=1)
def _exact(case: Case) -> Exact:
    """Shared by the backends that run a case in turn."""
    attention, formulas = _attention(case.mechanism), case.mechanism.formulas
    inputs = inputs_of(attention, case)
    plain = given_of(attention, case, inputs)
    mask = related(formulas, plain)
    masked = torch.zeros(mask.shape[:3], dtype=torch.bool)
    if case.mechanism.exact:
        _, lse, _ = attend(formulas, plain, mask)
        masked = (lse < FAR) & lse.isfinite()
    if case.left_out:
        inputs = _without(masked, inputs, 0.0)

    def results(inputs: Named) -> tuple[Named, Tensor]:
        leaves = leaves_of(inputs, case, torch.float64)
        out, lse, sizes = attend(formulas, given_of(attention, case, leaves), mask)
        return _results(out, lse, leaves, case.with_lse), sizes

    odd, (exact, sizes) = inputs, results(inputs)
    if case.odd:
        tables = (table.name for table in (*attention.inputs, *attention.learned) if table.dtype == "float")
        odd = make_odd(inputs, case, mask, {name: exact[f"gradient of {name}"] for name in tables})
        exact, sizes = results(odd)
    rows = exact["out"].isnan().any(-1)
    reached = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in exact.items()}
    if rows.any():
        # gradients that are NaN on arrival come to whatever in tables these rows read
        through, _ = results(_without(rows, odd, torch.nan))
        reached = {name: x.isnan() for name, x in through.items()} | {"lse": rows}
        keys = keys_reached(case, mask & rows[..., None])
        places = {"out": rows, "gradient of q": rows, "gradient of k": keys, "gradient of v": keys}
        reached |= {name: x[..., None].expand_as(exact[name]) for name, x in places.items()}
    far = ROUNDINGS * torch.finfo(torch.promote_types(getattr(torch, case.dtype), torch.float32)).eps
    return Exact(odd, exact, reached, masked, _allowed(case, plain, inputs["grad_out"], mask, sizes), far)


def _without(rows: Tensor, inputs: Named, value: float) -> Named:
    """The inputs, and this value for the gradients of some rows of the results."""
    grads = {"grad_out": rows[..., None], "grad_lse": rows}
    return inputs | {name: inputs[name].masked_fill(which, value) for name, which in grads.items()}


def _at(where: Tensor) -> str:
    return f"first at {where.nonzero()[0].tolist()}"


def _worst(mine: Tensor, value: Tensor) -> str:
    """Where a result is off the most: [b, h, q, d] of the output, [b, h, q] of the log-sum-exp, and so on."""
    gap = (mine.nan_to_num(neginf=0.0) - value.nan_to_num(neginf=0.0)).abs()
    place = tuple(int(i[0]) for i in torch.nonzero(gap == gap.max(), as_tuple=True))
    return f"worst at {[*place]}: {float(mine[place]):.6g}, not {float(value[place]):.6g}"


def _relative(a: Tensor, b: Tensor) -> float:
    if not b.numel():
        return 0.0
    a, b = a.nan_to_num(neginf=0.0), b.nan_to_num(neginf=0.0)
    return float((a - b).abs().max() / b.abs().max().clamp_min(1.0))


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _problem(case: Case, training: bool, device: str) -> Problem:
    return Problem(
        length=case.tokens,
        q_length=case.nq,
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        device=device,
        block_size=case.block_size,
        training=training,
    )


def _run(backend: str, case: Case, inputs: Named, training: bool, device: str) -> Named:
    """What the backend makes of the case."""
    attention = _attention(case.mechanism)
    plan = attndsl.compile(attention, **vars(_problem(case, training, device)), backend=backend)
    leaves = leaves_of(inputs, case, getattr(torch, case.dtype))
    there = {name: x.to(device) for name, x in leaves.items()}
    learned = {table.name: there[table.name] for table in attention.learned}
    tables: dict[str, Any] = {table.name: there[table.name] for table in attention.inputs}
    places = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.places.items()}
    q, k, v = there["q"], there["k"], there["v"]
    with _Watched() if training and case.n % 2 else nullcontext():  # type: ignore[no-untyped-call]
        if m := case.mechanism.memory:
            tables["memory"] = k[:, :, :m], v[:, :, :m]
            k, v = k[:, :, m:], v[:, :, m:]
        out, lse = plan(q, k, v, learned=learned, **places, return_lse=True, **tables)
        out, lse = out.cpu(), lse.cpu()
    if not training:
        return {"out": out.detach(), "lse": lse.detach()}
    return _results(out, lse, leaves, case.with_lse)


class _Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls go through the operator, as in a graph: below the dispatcher autograd records nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def _results(out: Tensor, lse: Tensor, leaves: Named, with_lse: bool) -> Named:
    """Output, log-sum-exp, and gradients of both with respect to all reals."""
    wanted = {name: x for name, x in leaves.items() if x.requires_grad and not name.startswith("grad_")}
    ends = [(out, leaves["grad_out"].detach())]
    # weights of positions alone depend on nothing that has a gradient
    if with_lse and lse.requires_grad:
        ends.append((torch.where(lse == -torch.inf, 0.0, lse), leaves["grad_lse"].detach().to(lse.dtype)))
    results, slopes = zip(*ends, strict=True)
    grads = torch.autograd.grad(
        results, list(wanted.values()), slopes, allow_unused=True, materialize_grads=True
    )
    named = {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | named


@torch.no_grad()
def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, grad_out: Tensor) -> list[Tensor]:
    """Gradients of q and, for each query head, of k as fused kernels form them: from the log-sum-exp and
    grad_out @ out. The math path has no error at all where a row has one key."""
    logit = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -torch.inf)
    weight = torch.exp(logit - logit.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0))
    slope = weight * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) / q.shape[3] ** 0.5
    return [(slope @ k).double(), (slope.mT @ q).double()]


def _allowed(case: Case, given: Inputs, grad_out: Tensor, mask: Tensor, sizes: Tensor) -> dict[str, float]:
    """Twice the error of SDPA over the same mask without the score: of its math path and, but for 16 bits,
    of the backward pass of fused kernels."""
    share = case.heads // given.k.shape[1]
    results = []
    # in float64 both sides would be the same: there float32's error stands for it, in units of epsilon
    measured = torch.float32 if case.dtype == "float64" else getattr(torch, case.dtype)
    for kind in (torch.float64, measured):
        q, k, v = (x.to(kind).requires_grad_() for x in (given.q, given.k, given.v))
        many_k, many_v = (x.repeat_interleave(share, 1) for x in (k, v))
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(q, many_k, many_v, mask)
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
        slope = grad_out.to(kind)
        grads = torch.autograd.grad(out, (q, k, v), slope)
        results.append([out.detach().double(), *(g.double().nan_to_num() for g in grads)])
        if case.dtype != "bfloat16":
            results[-1] += _fused(q, many_k, many_v, mask, out, slope)
    errors = [_relative(mine, value) for value, mine in zip(*results, strict=True)]
    eps, measured_eps = (torch.finfo(kind).eps for kind in (getattr(torch, case.dtype), measured))
    # the exact results of float64 are off by as much again
    factor = (4 if case.dtype == "float64" else 2) * eps / measured_eps
    # a logit of size S is off by S roundings of the arithmetic, and its weight in proportion
    logits = given.q @ given.k.repeat_interleave(share, 1).transpose(-1, -2) / case.head_dim**0.5
    known = [logits] if case.mechanism.exact else [logits, sizes]
    size = max(float(x.detach().nan_to_num().abs().max()) if x.numel() else 0.0 for x in known)
    off = size * torch.finfo(torch.promote_types(getattr(torch, case.dtype), torch.float32)).eps
    out = factor * errors[0] + ROUNDINGS * eps + off
    grad = factor * max(errors[1:]) + GRAD_ROUNDINGS * eps + 2 * off
    return {"out": out, "lse": out, "gradient": grad}
