"""The conformance suite: what every backend, ours or a third party's, must compute.

    import pytest
    from attndsl.conformance import CASES, check, supported

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_mine(case):
        if reason := check("mine", case):
            pytest.skip(reason)

    def test_mine_does_something():
        assert supported("mine")

`check` compares output, log-sum-exp and gradients with the backend `reference` in float64; gradients only
where the backend has them: one that declines to train is held to the rest. The error may
be twice that of SDPA's math path in the same dtype on the same q, k and v, plus a few roundings of the
result and one of the largest logit. Memory that a kernel does not write is NaN while it runs.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import attndsl
from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.execution import registry
from attndsl.execution.plan import Plan

Named = dict[str, Tensor]
LENGTHS = (0, 1, 3, 127, 300)
ROUNDINGS, GRAD_ROUNDINGS = 2, 4
"""Error allowed beside the yardstick, in units of the dtype's epsilon; the latter for gradients."""


@dataclass(frozen=True)
class Mechanism:
    """A mask, and clauses beside it. `table` draws the inputs for (rng, batch, heads, nq, n)."""

    name: str
    clauses: str
    definitions: str = ""
    params: str = ""
    tables: Callable[[np.random.Generator, int, int, int, int], dict[str, object]] | None = None

    @property
    def text(self) -> str:
        return f"{self.definitions}\nattention a{self.params} {{ {self.clauses} }}"


@dataclass(frozen=True)
class Case:
    """One mechanism on one draw of sizes."""

    mechanism: Mechanism
    dtype: str
    nq: int
    n: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    q_offset: tuple[int, ...] | None
    loud: bool
    block_size: int

    def __str__(self) -> str:
        sizes = f"{self.nq}x{self.n}-b{self.batch}h{self.heads}-{self.kv_heads}d{self.head_dim}-{self.v_dim}"
        extras = (
            "-loud" * self.loud + (f"-at{self.q_offset}" if self.q_offset else "") + f"-B{self.block_size}"
        )
        return f"{self.mechanism.name}-{self.dtype}-{sizes}{extras}"


def _documents(rng: np.random.Generator, batch: int, heads: int, nq: int, n: int) -> dict[str, object]:
    return {"doc": np.sort(rng.integers(0, 4, n))}


def _padding(rng: np.random.Generator, batch: int, heads: int, nq: int, n: int) -> dict[str, object]:
    return {"pad": rng.integers(0, n + 1, batch)}


def _bias(rng: np.random.Generator, batch: int, heads: int, nq: int, n: int) -> dict[str, object]:
    return {"z": rng.standard_normal((batch, heads, n, n))}


def _chosen(rng: np.random.Generator, batch: int, heads: int, nq: int, n: int) -> dict[str, object]:
    tiles = -(-n // 16)
    return {"chosen": rng.integers(0, max(tiles, 1), (batch, heads, tiles, 2))}


MECHANISMS = (
    Mechanism("full", "mask full"),
    Mechanism("causal", "mask causal"),
    Mechanism("window", "mask radius(20)"),
    Mechanism("causal-window", "mask causal & last(70)"),
    Mechanism("empty-rows", "mask { q, k : q mod 3 == 0 and k < q }"),
    Mechanism("none", "mask none"),
    Mechanism("dilated", "mask band(-40 .. 40, step = 4)"),
    Mechanism("longformer", "mask radius(10) | global([0, 77])"),
    Mechanism("bigbird", "mask blocks(16, radius(1) | global([0, n - 1]) | random(2, seed = h))"),
    Mechanism("strided", "mask strided(16)"),
    Mechanism("fixed", "mask fixed(16, 4)"),
    Mechanism("blocks", "mask block(32)"),
    Mechanism("per-head", "mask { q, k : q - k <= 8 * h and k <= q }"),
    Mechanism("head-groups", "heads 0 { mask causal } else { mask radius(9) score softcap(2.0) }"),
    Mechanism("documents", "inputs doc : int[n] mask causal & documents(doc)", tables=_documents),
    Mechanism("padding", "inputs pad : int[B] mask causal & { q, k : k >= pad }", tables=_padding),
    Mechanism(
        "chosen",
        "inputs chosen : int[B, H, tiles, top] mask blocks(16, { q, k : k in chosen[q] })",
        tables=_chosen,
    ),
    Mechanism("alibi", "mask causal score alibi"),
    Mechanism("softcap", "mask causal & last(50) score softcap(3.0)"),
    Mechanism("infinite-outside", "mask { q, k : k < q } score s + log(q - k)"),
    Mechanism("scaled", "mask radius(30) score Q @ K / 7 - 0.01 * |q - k|"),
    Mechanism("in-a-part", "mask causal score where(last(8)[q, k], s + 1.5, s / 2)"),
    Mechanism("random-part", "mask causal score where(random(3)[q, k], s, s - 1.0)"),
    Mechanism("t5", "mask full score t5(table)", params="(table = learn[H, 32](0.1))"),
    Mechanism("shaw", "mask radius(12) score shaw(table, 6)", params="(table = learn[13, D](0.05))"),
    Mechanism("da", "mask causal score da(a, b)", params="(a = learn[H](0.2), b = learn[H](0.1))"),
    Mechanism(
        "gauss", "mask radius(25) score s + gaussian(|q - k|, sigma)", params="(sigma = learn[H](9.0))"
    ),
    Mechanism("bias", "inputs z : float[B, H, n, n] mask causal score s + z[q, k]", tables=_bias),
    Mechanism("adaptive", "mask band(-60 .. -1) decay ramp(q - k, z, 16)", params="(z = learn[H](20.3))"),
    Mechanism("multiset", "mask radius(8) + last(4)"),
    Mechanism("sink", "mask causal & last(30) norm softmax(sink = z)", params="(z = learn[H](0.4))"),
    Mechanism("sigmoid", "mask causal score s - 1.0 norm sigmoid"),
    Mechanism("relu", "mask radius(40) norm relu"),
)


def _draw(mechanism: Mechanism, dtype: str, turn: int) -> Case:
    """Sizes that differ from case to case and from run to run never."""
    rng = random.Random(zlib.crc32(f"{mechanism.name} {dtype} {turn}".encode()))
    n = 127 if turn == 0 else rng.choice(LENGTHS)
    square = mechanism.name in ("documents", "chosen") or rng.random() < 0.5
    nq = n if square else rng.choice([size for size in LENGTHS if size <= n])
    heads, kv_heads = rng.choice([(2, 2), (4, 2), (3, 1), (4, 4)])
    batch = rng.choice([1, 2, 3])
    offset = None
    if not square and rng.random() < 0.5:
        offset = tuple(rng.randint(0, n - nq) for _ in range(rng.choice([1, batch])))
    return Case(
        mechanism,
        dtype,
        nq,
        n,
        batch,
        heads,
        kv_heads,
        head_dim=rng.choice([8, 16, 24]),
        v_dim=rng.choice([8, 16, 24]),
        q_offset=offset,
        loud=rng.random() < 0.25,
        block_size=rng.choice([16, 32, 64]),
    )


CASES = tuple(
    _draw(mechanism, dtype, turn)
    for mechanism in MECHANISMS
    for dtype, turns in (("float32", 2), ("float64", 1), ("bfloat16", 1))
    for turn in range(turns)
)


def check(backend: str, case: Case) -> str | None:
    """None where the backend agrees, or the reason that it gave for declining. Raises AssertionError."""
    training, reason = True, _reason(backend, case, training=True)
    if reason is not None:
        training, reason = False, _reason(backend, case, training=False)
    if reason is not None:
        return reason
    attention = _attention(case.mechanism)
    inputs, exact, allowed = _expected(attention, case)
    with _poisoned_memory():
        plan = _plan(attention, case, backend, case.dtype, training)
        found = _run(plan, case, inputs, case.dtype)
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
    return [case for case in CASES if _reason(backend, case, training=False) is None]


def _reason(backend: str, case: Case, training: bool) -> str | None:
    problem = _problem(case, case.dtype, training)
    reason: object = registry.plugin("backends", backend).supports(_attention(case.mechanism), problem)
    assert reason is None or (isinstance(reason, str) and reason), f"neither None nor a reason: {reason!r}"
    return reason


@functools.cache
def _attention(mechanism: Mechanism) -> Attention:
    attention = attndsl.parse(mechanism.text)["a"]
    assert isinstance(attention, Attention)
    return attention


@functools.lru_cache(maxsize=1)
def _expected(attention: Attention, case: Case) -> tuple[Named, Named, dict[str, float]]:
    """Inputs, exact results and the errors allowed; shared by the backends that run a case in turn."""
    inputs = _inputs(attention, case)
    exact = _run(_plan(attention, case, "reference", "float64"), case, inputs, "float64")
    return inputs, exact, _yardstick(attention, case, inputs)


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


def _problem(case: Case, dtype: str, training: bool) -> Problem:
    return Problem(
        length=case.n,
        q_length=case.nq,
        batch=case.batch,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        dtype=dtype,
        block_size=case.block_size,
        training=training,
    )


def _plan(attention: Attention, case: Case, backend: str, dtype: str, training: bool = True) -> Plan:
    return attndsl.compile(attention, **vars(_problem(case, dtype, training)), backend=backend)


def _inputs(attention: Attention, case: Case) -> Named:
    """q, k, v, gradients of the results, tables and parameters: float64, rounded to the case's dtype."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    c, dtype = case, getattr(torch, case.dtype)
    shapes = {
        "q": (c.batch, c.heads, c.nq, c.head_dim),
        "k": (c.batch, c.kv_heads, c.n, c.head_dim),
        "v": (c.batch, c.kv_heads, c.n, c.v_dim),
        "grad_out": (c.batch, c.heads, c.nq, c.v_dim),
        "grad_lse": (c.batch, c.heads, c.nq),
    }
    drawn = {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()}
    if case.loud:
        drawn["q"] *= 20
    tables = case.mechanism.tables
    given = {} if tables is None else tables(rng, c.batch, c.heads, c.nq, c.n)
    drawn |= {name: torch.as_tensor(value) for name, value in given.items()}
    plan = _plan(attention, case, "reference", "float64")
    for table in attention.learned:
        initial = plan.initial(table)
        drawn[table.name] = initial + 0.1 * torch.from_numpy(rng.standard_normal(tuple(initial.shape)))
    return {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in drawn.items()}


def _run(plan: Plan, case: Case, inputs: Named, dtype: str) -> Named:
    """Output, log-sum-exp and, if the plan is for training, gradients of both with respect to all reals."""
    kind = getattr(torch, dtype)
    leaves = {name: x.to(kind).requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    learned = {table.name: leaves[table.name] for table in plan.attention.learned}
    tables = {table.name: leaves[table.name] for table in plan.attention.inputs}
    out, lse = plan.run(leaves["q"], leaves["k"], leaves["v"], case.q_offset, None, True, tables, learned)
    results = {"out": out.detach(), "lse": lse.detach()}
    if not plan.problem.training:
        return results
    wanted = [name for name, x in leaves.items() if x.requires_grad and not name.startswith("grad_")]
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out * leaves["grad_out"].detach()).sum() + (finite * leaves["grad_lse"].detach()).sum()
    grads = torch.autograd.grad(
        loss, [leaves[name] for name in wanted], allow_unused=True, materialize_grads=True
    )
    named = {f"gradient of {name}": g for name, g in zip(wanted, grads, strict=True)}
    return results | named


def _yardstick(attention: Attention, case: Case, inputs: Named) -> dict[str, float]:
    """Twice the error of SDPA's math path, forward and backward, over the same mask without the score."""
    plan = _plan(attention, case, "reference", "float64")
    share = case.heads // case.kv_heads
    offsets = [] if case.q_offset is None else list(case.q_offset)
    tables = {table.name: inputs[table.name] for table in (*attention.inputs, *attention.learned)}
    call = plan.call_of(inputs["q"], inputs["k"], inputs["v"], tables, offsets, [])
    mask = torch.from_numpy(call.block_mask.to_dense())
    results = []
    # in float64 both sides would be the same: there float32's error stands for it, in units of epsilon
    measured = torch.float32 if case.dtype == "float64" else getattr(torch, case.dtype)
    for kind in (torch.float64, measured):
        q, k, v = (inputs[name].to(kind).requires_grad_() for name in ("q", "k", "v"))
        out, _ = torch.ops.aten._scaled_dot_product_attention_math(
            q,
            k.repeat_interleave(share, 1),
            v.repeat_interleave(share, 1),
            mask.expand(case.batch, case.heads, -1, -1),
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
    size = float(logits.detach().abs().max()) if logits.numel() else 0.0
    off = size * torch.finfo(torch.promote_types(getattr(torch, case.dtype), torch.float32)).eps
    out = factor * errors[0] + ROUNDINGS * eps + off
    grad = factor * max(errors[1:]) + GRAD_ROUNDINGS * eps + 2 * off
    return {"out": out, "lse": out, "gradient": grad}
