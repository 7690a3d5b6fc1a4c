"""Tensors as people have them: NaN in slots that nobody reads, buffers filled anew, few bits, tangents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import attndsl
from attndsl.tiles import queries

BACKENDS = ("reference", "sdpa", "torch")
N, HEADS, KV_HEADS, DIM = 40, 4, 2, 8


def plan_of(clauses: str, params: str = "", **options: Any) -> attndsl.Plan:
    attention = attndsl.parse(f"attention a{params} {{ {clauses} }}")["a"]
    sizes = {"length": N, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "block_size": 16}
    return attndsl.compile(attention, **(sizes | options))


def qkv(dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, N, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def results(plan: attndsl.Plan, given: list[Tensor], slope: Tensor, **tables: Tensor) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in zip("qkv", given, strict=True)}
    learned = {name: x.clone().requires_grad_() for name, x in tables.items()}
    out, lse = plan(*leaves.values(), return_lse=True, **learned)
    grads = torch.autograd.grad(out, [*leaves.values(), *learned.values()], slope)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip([*leaves, *learned], grads, strict=True))}


MASKS = (
    "causal & last(9)",
    "radius(3) | columns(0..2)",
    "blocks(8, radius(0))",
    "{ q, k : k < q and k mod 3 == 0 }",
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", [(N, N), (13, N), (13, 13), (N, 0), (0, 5)])
def test_which_rows_and_keys_live_pairs_join(mask: str, size: tuple[int, int]) -> None:
    nq, n = size
    attention = attndsl.parse(f"attention a {{ offset 0 mask {mask} }}")["a"]
    blocks = attention.block_mask(n, 8, q_length=nq)
    grid = blocks.grids[0]
    dense, rng = attention.mask(n, q_length=nq)[0], np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        keys, rows = rng.random(n) < share, rng.random(nq) < share
        assert np.array_equal(queries.rows_that_read(grid, keys), (dense & keys).any(1))
        assert np.array_equal(queries.keys_read_by(grid, rows), (dense & rows[:, None]).any(0))
    assert blocks.rows is None or blocks.rows[0].reads_all == dense.any(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e308])
@pytest.mark.parametrize("clauses", [
    "mask causal & { q, k : k >= 7 }",
    "mask causal & { q, k : k >= 7 } score alibi",
    "inputs z : float[n] mask radius(4) & columns(7..39) & rows(7..39) score z[k] * tanh(s) norm sigmoid",
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_pair_reads_touches_nothing(backend: str, clauses: str, value: float) -> None:
    if backend == "sdpa" and "norm" in clauses:
        return
    plan = plan_of(clauses, dtype="float64", backend=backend, training=True)
    given, tables = qkv(), {"z": torch.linspace(0, 1, N, dtype=torch.float64)} if "inputs" in clauses else {}
    slope = torch.randn(2, HEADS, N, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = results(plan, given, slope, **tables)
    for x in given[1:]:
        x[:, :, :7] = value
    given[0][:, :, :7] = torch.nan
    slope[:, :, :7] = torch.nan
    for name, mine in results(plan, given, slope, **tables).items():
        torch.testing.assert_close(mine, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_pair_reads_is_not_hidden(backend: str) -> None:
    plan = plan_of("mask causal & last(5)", dtype="float64", backend=backend, training=True)
    given, slope = qkv(), torch.ones(2, HEADS, N, DIM, dtype=torch.float64)
    expected = results(plan, given, slope)
    q, k, v = given
    q[0, 3, 2, 0], k[1, 0, 7, 1], v[0, 1, 20, 3], v[0, 0, 30] = torch.nan, torch.nan, torch.nan, torch.inf
    found = results(plan, given, slope)
    spoiled = {name: torch.zeros_like(x, dtype=torch.bool) for name, x in expected.items()}
    whole = [
        (0, [3], range(2, 3)),
        (1, [0, 1], range(7, 12)),
    ]  # batch row, heads, rows of weights that are lost
    for b, heads, rows in [*whole, (0, [2, 3], range(20, 25)), (0, [0, 1], range(30, 35))]:
        for h in heads:
            reads = sorted({key for row in rows for key in range(max(0, row - 4), row + 1)})
            spoiled["q"][b, h, list(rows)] = spoiled["k"][b, h // 2, reads] = True
            if (b, heads, rows) in whole:
                spoiled["out"][b, h, list(rows)] = spoiled["lse"][b, h, list(rows)] = True
                spoiled["v"][b, h // 2, reads] = True
    spoiled["out"][0, 2:, 20:25, 3] = spoiled["out"][0, :2, 30:35] = True
    assert (found["out"][0, :2, 30:35] == torch.inf).all()
    for name, mine in found.items():
        assert torch.equal(~mine.isfinite(), spoiled[name]), name
        torch.testing.assert_close(mine[~spoiled[name]], expected[name][~spoiled[name]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_finite_stays_in_the_rows_it_is_of(backend: str) -> None:
    plan = plan_of("mask causal & last(5)", dtype="float64", backend=backend, training=True)
    given, slope = qkv(), torch.ones(2, HEADS, N, DIM, dtype=torch.float64)
    expected = results(plan, given, slope)
    slope[0, 2, 9, 4] = torch.inf
    found = results(plan, given, slope)
    rows, keys = torch.zeros(2, HEADS, N, dtype=torch.bool), torch.zeros(2, KV_HEADS, N, dtype=torch.bool)
    rows[0, 2, 9] = keys[0, 1, 5:10] = True
    for name, lost in (("q", rows), ("k", keys), ("v", keys)):
        assert torch.equal(~found[name].isfinite().all(-1), lost), name
        torch.testing.assert_close(found[name][~lost], expected[name][~lost])


def test_finite_results_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from attndsl.execution import spoiled

    monkeypatch.setattr(spoiled, "_sound", lambda call: pytest.fail("a second pass"))
    plan = plan_of("mask causal", dtype="float64", training=True)
    results(plan, qkv(), torch.ones(2, HEADS, N, DIM, dtype=torch.float64))


def test_a_numpy_table_filled_anew_before_the_backward_pass() -> None:
    plan = plan_of("inputs z : float[n] mask causal score s * z[k]", dtype="float64", training=True)
    given = [x.requires_grad_() for x in qkv()]
    for dtype in (np.float32, np.float64):
        z = np.linspace(1, 2, N).astype(dtype)
        (expected,) = torch.autograd.grad(plan(*given, z=z.copy()).sum(), given[0])
        out = plan(*given, z=z)
        z[:] = 0
        (found,) = torch.autograd.grad(out.sum(), given[0])
        torch.testing.assert_close(found, expected)


def test_a_tensor_filled_anew_before_the_backward_pass_raises() -> None:
    plan = plan_of("inputs z : float[n] mask causal score s * z[k]", dtype="float64", training=True)
    given, z = [x.requires_grad_() for x in qkv()], torch.linspace(1, 2, N, dtype=torch.float64)
    out = plan(*given, z=z)
    z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), given[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    plan = plan_of("mask causal")
    q, k, v = qkv(torch.float32)
    with pytest.raises(attndsl.AttnError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda x: plan(q, k, x), (v,), (torch.ones_like(v),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(attndsl.AttnError, match="no forward-mode derivatives"):
            plan(dual, k, v)
        torch.testing.assert_close(plan(q, k, v), plan(q, k, v))


def test_learned_parameters_are_as_precise_as_scores() -> None:
    params, clauses = "(b = learn[H](0.1), u = learn[D](0.3))", "mask causal score s + b * |q - k| + Q @ u"
    for dtype, wide in (("bfloat16", torch.float32), ("float16", torch.float32), ("float64", torch.float64)):
        module = plan_of(clauses, params, dtype=dtype, training=True).module()
        assert {x.dtype for x in module.parameters()} == {wide}
        given = [x.requires_grad_() for x in qkv(getattr(torch, dtype))]
        module(*given).float().sum().backward()
        assert {x.grad.dtype for x in module.parameters() if x.grad is not None} == {wide}
        # as in any module
        assert {x.dtype for x in module.to(torch.bfloat16).parameters()} == {torch.bfloat16}
        module(*given)


def test_a_table_of_a_plan_in_bfloat16_is_not_rounded() -> None:
    """Positions beyond 256 are not numbers of bfloat16."""
    plan = plan_of("inputs z : float[n] mask causal score s - z[q - k]", dtype="bfloat16", batch=1)
    given = qkv(torch.bfloat16, batch=1)
    z = 300.0 + np.arange(N)
    exact = plan_of("inputs z : float[n] mask causal score s - z[q - k]", dtype="float64")
    expected = exact(*(x.double() for x in given), z=z)
    torch.testing.assert_close(plan(*given, z=z).double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_converts_vectors_alone(backend: str, kind: torch.dtype) -> None:
    clauses, params = (
        "mask causal score s + b * tanh(q - k) + Q @ u",
        "(b = learn[H](0.1), u = learn[D](0.3))",
    )
    if backend == "sdpa":
        clauses, params = "mask causal & last(9) score s + b * |q - k|", "(b = learn[H](0.1))"
    module = plan_of(clauses, params, backend=backend, training=True).module()
    given = [x.requires_grad_() for x in qkv(torch.float32)]
    leaves, found = [*given, *module.parameters()], []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=kind, enabled=enabled):
            out = module(*(given if enabled else [x.to(kind) for x in given]))
            found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_parameters_are_what_the_module_shows() -> None:
    """functional_call and parametrizations put tensors in the place of parameters."""
    module = plan_of("mask causal score s * b", "(b = learn[H](2.0))", dtype="float64").module()
    given, half = qkv(), torch.full((HEADS,), 1.0, dtype=torch.float64)
    found = torch.func.functional_call(module, {"b": half}, tuple(given))
    torch.testing.assert_close(found, plan_of("mask causal", dtype="float64")(*given))
    torch.nn.utils.parametrize.register_parametrization(module, "b", torch.nn.Softplus())
    torch.testing.assert_close(
        module(*given), plan_of(f"mask causal score s * {np.log1p(np.exp(2.0))}", dtype="float64")(*given)
    )


def test_a_mistake_under_torch_compile_names_itself() -> None:
    module = plan_of("inputs doc : int[n] mask causal & documents(doc)", kv_heads=HEADS).module()
    x = torch.randn(1, HEADS, N, DIM)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="AttnError"):
        compiled(x, x, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finite_row_does_not_depend_on_what_others_read(backend: str) -> None:
    """A key of -inf has weight 0 where queries are positive, whatever another batch row holds."""
    plan = plan_of("mask causal", backend=backend, batch=2)
    q, k, v = (torch.ones_like(x) for x in qkv(torch.float32))
    k[0, 0, 1, 0] = -torch.inf
    expected = plan(q, k, v)[0, 0]
    assert expected.isfinite().all()
    k[1, 0, 0, 0] = torch.nan
    assert torch.equal(plan(q, k, v)[0, 0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinity_in_a_table_stays_in_the_rows_that_read_it(backend: str) -> None:
    plan = plan_of("inputs m : float[n] mask causal & last(2) score s + m[k]", backend=backend, training=True)
    given = [x.requires_grad_() for x in qkv(torch.float32)]
    m = torch.zeros(N)
    m[5] = torch.inf
    out = plan(*given, m=m.requires_grad_())
    assert out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == [5, 6]
    grads = torch.autograd.grad(out, [*given, m], torch.ones_like(out))
    for grad, lost in zip(grads[:3], ([5, 6], [4, 5, 6], [4, 5, 6]), strict=True):
        assert grad.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == lost
    assert grads[3].isnan().nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize("kind", ["reversed", "fortran", "sliced", "list", "float16"])
def test_tables_of_numpy_lie_in_memory_as_they_like(kind: str) -> None:
    z = np.random.default_rng(0).normal(size=(N, N)).astype(np.float16)
    kinds = {
        "reversed": lambda: z[::-1, ::-1].copy()[::-1, ::-1],
        "fortran": lambda: np.asfortranarray(z),
        "sliced": lambda: np.pad(z, 3)[3:-3, 3:-3],
        "list": lambda: z.tolist(),
        "float16": lambda: z,
    }
    plan = plan_of("inputs z : float[n, n] mask causal score s + z[q, k]", dtype="float64")
    assert torch.equal(plan(*qkv(), z=kinds[kind]()), plan(*qkv(), z=torch.from_numpy(z).double()))


def test_the_range_of_integers_in_scores_is_looked_at_in_every_call() -> None:
    clauses = "inputs t : int[n] mask causal score where(t[k] * 1000 > 0, s, s - 100.0)"
    plan, t = plan_of(clauses, dtype="float64"), np.ones(N, np.int64)
    plan(*qkv(), t=t)
    with pytest.raises(attndsl.AttnError, match="overflow"):
        plan(*qkv(), t=t * 2**62)


@pytest.mark.parametrize("backend", ["sdpa", "torch", "reference"])
def test_the_operator_gives_the_strides_that_it_told(backend):
    """torch's own attention gives the log-sum-exp of a causal mask with queries before heads."""
    causal = attndsl.parse("attention a { mask causal }")["a"]
    plan = attndsl.compile(causal, length=6, heads=2, head_dim=8, backend=backend)
    q = torch.zeros(2, 2, 6, 8)
    found = torch.ops.attndsl.attend(q, q, q, [q], None, None, None, None, None, plan.lowered.identity)
    assert [x.is_contiguous() for x in found[:2]] == [True, True]
