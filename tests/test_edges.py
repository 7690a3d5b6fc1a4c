"""What lies at the edge of a domain: non-positive scales, heads of another group, huge sinks and logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attndsl


def run(text: str, backend: str, n: int, heads: int = 1, **tables: Any) -> list[torch.Tensor]:
    """Output, log-sum-exp, and gradients of q, k and v."""
    attention = attndsl.parse(text)["a"]
    plan = attndsl.compile(attention, length=n, heads=heads, head_dim=8, dtype="float64", backend=backend)
    rng = torch.Generator().manual_seed(n)
    q, k, v = (
        torch.randn(1, heads, n, 8, dtype=torch.float64, generator=rng, requires_grad=True) for _ in "qkv"
    )
    out, lse = plan(q, k, v, return_lse=True, **tables)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out.sin().sum(), (q, k, v))]


@pytest.mark.parametrize("score", ["-s", "0", "s * 0", "-2 * s"])
@pytest.mark.parametrize("backend", ["sdpa", "torch"])
def test_scales_that_are_not_positive(score: str, backend: str) -> None:
    text = f"attention a {{ mask causal score {score} }}"
    for mine, value in zip(run(text, backend, 33), run(text, "reference", 33), strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "score"),
    [("inputs b : float[4]", "s + b[h - 4]"), ("", "s + log(h - 3)"), ("", "s * sqrt(h - 4)")],
)
def test_a_score_is_evaluated_for_the_heads_of_its_group_alone(inputs: str, score: str) -> None:
    text = f"attention a {{ {inputs} heads 0..3 {{ mask causal }} 4..7 {{ mask causal score {score} }} }}"
    tables = {"b": np.arange(4.0)} if inputs else {}
    for mine, value in zip(
        run(text, "torch", 16, 8, **tables), run(text, "reference", 16, 8, **tables), strict=True
    ):
        assert not value.isnan().any()
        torch.testing.assert_close(mine, value)


NO_ENTRIES = {
    "bool[m]": "where(t[k], 1.0, 0.0)",
    "bool[m, n]": "where(t[q mod 3, k], 1.0, 0.0)",
    "int[n, m]": "where(k in t[q], 1.0, 0.0)",
    "int[m]": "where(k < 0, t[k], 0)",
    "float[m]": "where(k < 0, t[k], 0.0)",
    "float[m, D]": "where(k < 0, Q @ t[k], 0.0)",
}


@pytest.mark.parametrize("declared", NO_ENTRIES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_table_without_entries_counts_for_no_pair(declared: str, backend: str) -> None:
    """A truth is false beyond it, and numbers that no pair asks for are not read."""
    kind, _, dims = declared.rstrip("]").partition("[")
    table = np.zeros([{"n": 9, "m": 0, "D": 8}[dim] for dim in dims.split(", ")], kind)
    text = f"attention a {{ inputs t : {declared}  mask causal  score s + {NO_ENTRIES[declared]} }}"
    plain = run("attention a { mask causal }", "reference", 9)
    for mine, value in zip(run(text, backend, 9, t=table), plain, strict=True):
        torch.testing.assert_close(mine, value)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_sink_that_takes_all(backend: str) -> None:
    _, lse, *_ = run("attention a { mask causal norm softmax(sink = 2000.0) }", backend, 16)
    torch.testing.assert_close(lse, torch.full_like(lse, 2000.0))


@pytest.mark.parametrize(
    "text", ["{ q, k : k < 3 }", "rows([3]) | radius(1)", "prefix_lm(3) & columns(0..2)"]
)
def test_diameters_at_every_length(text: str) -> None:
    for n in range(1, 34):
        program = attndsl.parse(f"pattern a = {text} assert diameter(a, n = {n}) <= 100")
        step = (program["a"].mask(n)[0] | np.eye(n, dtype=bool)).astype(int)
        power, layers = np.eye(n, dtype=int), 0
        while ((more := power @ step > 0) != (power > 0)).any():
            power, layers = more.astype(int), layers + 1
        assert attndsl.prove(program.assertions[0]).reason == f"diameter is {layers} at n = {n}"


@pytest.mark.parametrize(
    "text",
    [
        "inputs pad : bool[n] mask radius(70) score where(pad[k], s, -1000000000.0)",
        "inputs pad : bool[n] mask radius(70) | columns(0..3) score where(pad[q], -1000000000.0, s)",
        "inputs pad : bool[n] mask causal & last(90) score s + 5.0 * k",
    ],
)
def test_logits_so_large_that_their_sum_says_nothing_of_its_terms(text: str) -> None:
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 8, generator=rng) for _ in "qkv")
    pad = np.arange(512) > 300
    found = []
    for backend, dtype in (("torch", "float32"), ("reference", "float64")):
        plan = attndsl.compile(
            attention, length=512, heads=2, head_dim=8, dtype=dtype, backend=backend, block_size=32
        )
        leaves = [x.to(getattr(torch, dtype)).requires_grad_() for x in (q, k, v)]
        out = plan(*leaves, pad=pad)
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)])
    # -1e9 + s is rounded to 64 in float32, so that the weights inside such a row are equal
    for mine, value in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_weight_is_not_negative(backend: str) -> None:
    with pytest.raises(attndsl.AttnError, match="a decay is negative"):
        run("attention a { mask causal decay sin(q - k) }", backend, 16)


def test_tiles_of_a_canvas_of_tiles() -> None:
    """So many conditions on four coordinates that keys are numbered, some of them of no axis at all."""
    near = "let near(v, y, side, a) = where(|v - clamp(y, a, side - 1 - a)| <= a, 1, 0)"
    text = f"""{near} pattern a = grid(4, 2, 2, 3, {{ (Y, X, y, x), (V, U, v, u) :
        near(V * 2 + v, Y * 2 + y, 8, 1) == 1 and near(U * 3 + u, X * 3 + x, 6, 2) == 1 }})"""
    attention = attndsl.parse(text)["a"]
    for n in (48, 37):
        assert (attention.block_mask(n, 8).to_dense() == attention.mask(n)).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("distance", [70, 93, 126, 148])
def test_a_key_whose_weight_is_tiny_is_still_the_only_one(backend: str, distance: int) -> None:
    text = f"attention a {{ mask {{ q, k : q - k == {distance} }} decay 0.5 ** (q - k) }}"
    n = distance + 3
    plan = attndsl.compile(
        attndsl.parse(text)["a"], length=n, head_dim=8, backend=backend, training=True, block_size=32
    )
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in "qkv")
    out = plan(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(out[0, 0, distance:], v[0, 0, :3])
    torch.testing.assert_close(grads[2][0, 0, :3], torch.ones(3, 8), rtol=1e-4, atol=1e-4)
    assert max(g.abs().max() for g in grads[:2]) < 1e-4


@pytest.mark.parametrize("norm", ["sigmoid", "relu"])
def test_sums_of_weights_without_a_reciprocal(norm: str) -> None:
    text = f"attention a {{ mask {{ q, k : q - k >= 129 }} decay 0.5 ** (q - k) norm {norm} }}"
    plan = attndsl.compile(attndsl.parse(text)["a"], length=140, head_dim=8, backend="torch", training=True)
    q, k, v = (torch.randn(1, 1, 140, 8, requires_grad=True) for _ in "qkv")
    for grad in torch.autograd.grad(plan(q, k, v).sum(), (q, k, v)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("clauses", ["norm softmax(sink = learn[H])", "score s + b * tanh(k - q)"])
def test_gradients_of_parameters_in_bfloat16_are_summed_in_float32(clauses: str) -> None:
    text = f"attention a(b = learn[H](0.1)) {{ mask causal {clauses} }}"
    found = []
    for backend in ("reference", "torch"):
        plan = attndsl.compile(
            attndsl.parse(text)["a"], length=16, head_dim=8, batch=500, backend=backend, training=True
        )
        module = plan.module().to(torch.bfloat16)
        torch.manual_seed(0)
        q, k, v = (torch.randn(500, 1, 16, 8) for _ in "qkv")
        module(q, k, v + 1).sum().backward()
        found.append([float(x.grad) for x in module.parameters() if x.grad is not None])
    assert found[1] == pytest.approx(found[0], rel=2e-2)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("nq", [300, 1])
@pytest.mark.parametrize(
    "mask",
    [
        "causal & last(20)",
        "causal & last(3) | { q, k : (q - k) mod 48 == 5 }",
        "causal & (last(9) | sinks(4))",
    ],
)
def test_logits_of_infinite_keys(mask: str, nq: int, backend: str) -> None:
    """A row all of whose logits are -inf has no weights, alone and merged with other parts."""
    q, k, v = (torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(i)).abs() for i in range(3))
    k[:, :, :100] = -torch.inf
    mine, exact = (
        attndsl.compile(
            attndsl.parse(f"attention a {{ mask {mask} }}")["a"],
            length=300, q_length=nq, heads=2, head_dim=16, backend=each, block_size=64,
        )(q[:, :, :nq], k, v, q_offset=0 if nq == 300 else 60, return_lse=True)
        for each in (backend, "reference")
    )  # fmt: skip
    for x, y in zip(mine, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
