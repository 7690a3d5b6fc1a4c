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
declines to train is held to the rest. The error may be twice that of SDPA's math path in the same dtype on
the same q, k and v, plus a few roundings of the result and one of the largest logit. Memory that a kernel
does not write is NaN while it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import attndsl
from attndsl.backend import Problem
from attndsl.conformance.cases import CASES, Case, Named, attention_of, call_of, inputs_of, leaves_of
from attndsl.conformance.formula import attend, related
from attndsl.conformance.mechanisms import MECHANISMS, Mechanism
from attndsl.execution import registry

__all__ = ["CASES", "MECHANISMS", "Case", "Mechanism", "check", "declined", "supported"]

ROUNDINGS, GRAD_ROUNDINGS = 2, 4
"""Error allowed beside the yardstick, in units of the dtype's epsilon; the latter for gradients."""


def check(backend: str, case: Case) -> str | None:
    """None where the backend agrees, or the reason that it gave for declining. Raises AssertionError."""
    training = declined(backend, case, training=True) is None
    if not training and (reason := declined(backend, case)):
        return reason
    inputs, exact, allowed = _expected(case)
    with _poisoned_memory():
        found = _run(backend, case, inputs, training)
    for name, result in found.items():
        mine, value = result.double(), exact[name]
        assert mine.shape == value.shape, f"{name}: shape {tuple(mine.shape)}, not {tuple(value.shape)}"
        assert not mine.isnan().any(), f"{name} is NaN in {int(mine.isnan().sum())} places"
        assert torch.equal(mine == -torch.inf, value == -torch.inf), f"{name}: other rows are -inf"
        error = _relative(mine, value)
        bound = allowed.get(name, allowed["gradient"])
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"
    return None


def supported(backend: str) -> list[Case]:
    """The cases that the backend does not decline; none, and `check` shows nothing."""
    return [case for case in CASES if declined(backend, case) is None]


def declined(backend: str, case: Case, training: bool = False) -> str | None:
    """The reason that the backend gives for declining the case, or None."""
    problem = _problem(case, training)
    reason: object = registry.plugin("backends", backend).supports(_attention(case.mechanism), problem)
    assert reason is None or (isinstance(reason, str) and reason), f"neither None nor a reason: {reason!r}"
    return reason


_attention = functools.cache(attention_of)


@functools.lru_cache(maxsize=1)
def _expected(case: Case) -> tuple[Named, Named, dict[str, float]]:
    """Inputs, exact results and the errors allowed; shared by the backends that run a case in turn."""
    attention = _attention(case.mechanism)
    inputs = inputs_of(attention, case)
    leaves = leaves_of(inputs, case, torch.float64)
    call = call_of(attention, case, leaves, torch.promote_types(getattr(torch, case.dtype), torch.float32))
    mask = related(case.mechanism.formulas, call)
    out, lse, sizes = attend(case.mechanism.formulas, call, mask)
    exact = _results(out, lse, leaves, case.with_lse)
    return inputs, exact, _allowed(case, inputs, mask, sizes)


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


def _problem(case: Case, training: bool) -> Problem:
    return Problem(
        length=case.n,
        q_length=case.nq,
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=case.dtype,
        block_size=case.block_size,
        training=training,
    )


def _run(backend: str, case: Case, inputs: Named, training: bool) -> Named:
    """What the backend makes of the case."""
    attention = _attention(case.mechanism)
    plan = attndsl.compile(attention, **vars(_problem(case, training)), backend=backend)
    leaves = leaves_of(inputs, case, getattr(torch, case.dtype))
    learned = {table.name: leaves[table.name] for table in attention.learned}
    tables = {table.name: leaves[table.name] for table in attention.inputs}
    out, lse = plan.run(
        leaves["q"], leaves["k"], leaves["v"], case.q_offset, case.k_offset, True, tables, learned
    )
    if not training:
        return {"out": out.detach(), "lse": lse.detach()}
    return _results(out, lse, leaves, case.with_lse)


def _results(out: Tensor, lse: Tensor, leaves: Named, with_lse: bool) -> Named:
    """Output, log-sum-exp, and gradients of both with respect to all reals."""
    wanted = {name: x for name, x in leaves.items() if x.requires_grad and not name.startswith("grad_")}
    ends, slopes = [out], [leaves["grad_out"].detach()]
    if with_lse:
        ends.append(torch.where(lse == -torch.inf, 0.0, lse))
        slopes.append(leaves["grad_lse"].detach().to(lse.dtype))
    grads = torch.autograd.grad(
        ends, list(wanted.values()), slopes, allow_unused=True, materialize_grads=True
    )
    named = {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | named


def _allowed(case: Case, inputs: Named, mask: Tensor, sizes: Tensor) -> dict[str, float]:
    """Twice the error of SDPA's math path, forward and backward, over the same mask without the score."""
    share = case.heads // case.kv_heads
    results = []
    # in float64 both sides would be the same: there float32's error stands for it, in units of epsilon
    measured = torch.float32 if case.dtype == "float64" else getattr(torch, case.dtype)
    for kind in (torch.float64, measured):
        q, k, v = (inputs[name].to(kind).requires_grad_() for name in ("q", "k", "v"))
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q, k.repeat_interleave(share, 1), v.repeat_interleave(share, 1), mask
        )
        out = torch.where(mask.any(-1, keepdim=True), out, 0.0)
        grads = torch.autograd.grad(out, (q, k, v), inputs["grad_out"].to(kind))
        results.append([out.detach().double(), *(g.double().nan_to_num() for g in grads)])
    errors = [_relative(mine, value) for value, mine in zip(*results, strict=True)]
    eps, measured_eps = (torch.finfo(kind).eps for kind in (getattr(torch, case.dtype), measured))
    # the exact results of float64 are off by as much again
    factor = (4 if case.dtype == "float64" else 2) * eps / measured_eps
    # a logit of size S is off by S roundings of the arithmetic, and its weight in proportion
    logits = inputs["q"] @ inputs["k"].repeat_interleave(share, 1).transpose(-1, -2) / case.head_dim**0.5
    size = max(float(x.abs().max()) if x.numel() else 0.0 for x in (logits.detach(), sizes))
    off = size * torch.finfo(torch.promote_types(getattr(torch, case.dtype), torch.float32)).eps
    out = factor * errors[0] + ROUNDINGS * eps + off
    grad = factor * max(errors[1:]) + GRAD_ROUNDINGS * eps + 2 * off
    return {"out": out, "lse": out, "gradient": grad}
