"""The conformance suite of `approx`, for backends that know some of it.

    import pytest
    from attndsl.conformance.approximations import CASES, check

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_mine(case):
        if reason := check("mine", case):
            pytest.skip(reason)

`check` compares output and gradients with formulas that are written by hand, in float64, head by head, of the
tokens that a mask leaves; gradients only where the backend has them. Keys and values that are left out are
NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attndsl
from attndsl.backend import Problem
from attndsl.execution import choice, registry
from attndsl.program import bound_of

BATCH, HEADS, WIDTH, V_WIDTH = 2, 4, 8, 6
LANDMARKS, ITERATIONS = 6, 4
ROUNDINGS = {"float64": 1000, "float32": 50, "bfloat16": 2, "float16": 2}
"""Error allowed, in units of the dtype's epsilon and of the largest number. What is computed is at least in
float32, and its own roundings are more."""
TEXTS = {
    "nystrom": f"approx nystrom(landmarks = {LANDMARKS}, iterations = {ITERATIONS})",
    "shen": "approx shen",
}
MASKS: dict[str, tuple[str, Callable[[int, int], list[list[int]]]]] = {
    "full": ("", lambda b, n: [[*range(n)]] * b),
    "padded": (
        "inputs lengths : int[B]  mask { q, k : k < lengths }",
        lambda b, n: [[*range(length)] for length in lengths_of(b, n)],
    ),
    "scattered": ("mask { q, k : k mod 3 != 1 }", lambda b, n: [[i for i in range(n) if i % 3 != 1]] * b),
    "none": ("mask none", lambda b, n: [[]] * b),
}
"""Clauses, and the tokens that they leave in each batch row."""


@dataclass(frozen=True)
class Case:
    kind: str
    mask: str
    n: int
    kv_heads: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.mask}-{self.n}-h{HEADS}-{self.kv_heads}-{self.dtype}"

    @property
    def text(self) -> str:
        return f"attention checked {{ {MASKS[self.mask][0]} {TEXTS[self.kind]} }}"


CASES = tuple(
    Case(kind, mask, n, kv_heads, dtype)
    for kind, (mask, n, kv_heads, dtype) in itertools.product(
        TEXTS,
        [
            *itertools.product(["full"], [1, 5, 6, 7, 12, 31, 48], [2], ["float64"]),
            *itertools.product(["padded", "scattered"], [1, 9, 40], [1, 4], ["float64"]),
            *itertools.product(["full", "padded"], [50], [2], ["float32", "bfloat16", "float16"]),
            ("full", 0, 2, "float32"),
            ("none", 9, 2, "float64"),
        ],
    )
)


def lengths_of(batch: int, n: int) -> list[int]:
    """All tokens, and fewer and fewer."""
    return [n * (batch - b) // batch for b in range(batch)]


def segment_means(x: Tensor, m: int) -> Tensor:
    """[m, D]: position i of n is of segment floor(i m / n)."""
    n = len(x)
    return torch.stack([x[[i for i in range(n) if i * m // n == j]].mean(0) for j in range(m)])


def nystrom(
    q: Tensor, k: Tensor, v: Tensor, m: int = LANDMARKS, iterations: int = ITERATIONS, *, left: Sequence[int]
) -> Tensor:
    """Xiong et al. 2021, algorithm 1 and equation 14, of the tokens that are left; each query has a row."""
    own, k, v = q[left], k[left], v[left]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        weights = torch.exp(a @ b.T / math.sqrt(q.shape[1]))
        return weights / weights.sum(1, keepdim=True)

    if len(left) <= m:
        return kernel(q, k) @ v
    own, short = segment_means(own, m), segment_means(k, m)
    a = kernel(own, short)
    z, one = a.T / (a.sum(1).max() * a.sum(0).max()), torch.eye(m, dtype=a.dtype)
    for _ in range(iterations):
        z = 0.25 * z @ (13 * one - a @ z @ (15 * one - a @ z @ (7 * one - a @ z)))
    return kernel(q, short) @ (z @ (kernel(own, k) @ v))


def shen(q: Tensor, k: Tensor, v: Tensor, *, left: Sequence[int]) -> Tensor:
    """Shen et al. 2021, section 3.2: E(Q, K, V) = rho_q(Q) (rho_k(K)^T V)."""
    of_q, of_k = torch.exp(q), torch.exp(k[left])
    return (of_q / of_q.sum(1, keepdim=True)) @ ((of_k / of_k.sum(0)).T @ v[left])


def by_hand(kind: str, q: Tensor, k: Tensor, v: Tensor, left: Sequence[Sequence[int]]) -> Tensor:
    """[B, H, nq, Dv], with the tokens that are left in each batch row."""
    formula: Callable[..., Tensor] = {"nystrom": nystrom, "shen": shen}[kind]
    share, rows = q.shape[1] // k.shape[1], []
    for b, tokens in enumerate(left):
        for h in range(q.shape[1]):
            one = q[b, h], k[b, h // share], v[b, h // share]
            nothing = 0.0 * one[0].sum() + one[0].new_zeros(q.shape[2], v.shape[3])
            rows.append(formula(*one, left=tokens) if tokens else nothing)
    return torch.stack(rows).view(*q.shape[:3], v.shape[3])


def check(backend: str, case: Case) -> str | None:
    """None where the backend agrees, or the reason that it gave for declining. Raises AssertionError."""
    attention = bound_of(attndsl.parse(case.text)["checked"]).attention
    problem = Problem.of(
        attention, length=case.n, batch=BATCH, heads=HEADS, kv_heads=case.kv_heads, head_dim=WIDTH,
        dtype=case.dtype, training=True,
    )  # fmt: skip
    plugin = registry.plugin("backends", backend)
    training = choice.declined(plugin, attention, problem) is None
    problem = problem if training else Problem(**{**vars(problem), "training": False})
    if reason := choice.declined(plugin, attention, problem):
        return reason
    generator, dtype = torch.Generator().manual_seed(case.n), getattr(torch, case.dtype)
    shapes = (HEADS, WIDTH), (case.kv_heads, WIDTH), (case.kv_heads, V_WIDTH), (HEADS, V_WIDTH)
    drawn = [torch.randn(BATCH, h, case.n, d, generator=generator).to(dtype) for h, d in shapes]
    left = MASKS[case.mask][1](BATCH, case.n)
    for row, tokens in enumerate(left):
        out_of_mask = [i for i in range(case.n) if i not in tokens]
        for x in drawn[1:3]:
            x[row, :, out_of_mask] = torch.nan
    slope = drawn.pop()
    mine = [x.clone().requires_grad_(training) for x in drawn]
    exact = [x.double().requires_grad_() for x in drawn]
    tables: dict[str, Any] = {t.name: torch.tensor(lengths_of(BATCH, case.n)) for t in attention.inputs}
    plan = attndsl.compile(attention, **vars(problem), backend=backend)
    out = plan(mine[0], mine[1], mine[2], **tables)
    wanted = by_hand(case.kind, exact[0], exact[1], exact[2], left)
    pairs = [("output", out, wanted)]
    if training:
        grads = (
            torch.autograd.grad(x, leaves, slope.to(x.dtype), allow_unused=True, materialize_grads=True)
            for x, leaves in ((out, mine), (wanted, exact))
        )
        pairs += zip((f"gradient of {side}" for side in "qkv"), *grads, strict=True)
    for name, x, y in pairs:
        _compare(name, x.detach(), y.detach(), ROUNDINGS[case.dtype] * torch.finfo(dtype).eps)
    return None


def _compare(name: str, mine: Tensor, exact: Tensor, allowed: float) -> None:
    assert mine.shape == exact.shape, f"{name}: shape {tuple(mine.shape)}, not {tuple(exact.shape)}"
    if exact.numel():
        error = float((mine.double() - exact).abs().max() / exact.abs().max().clamp_min(1.0))
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
