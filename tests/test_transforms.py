"""What torch does to functions and modules, done to plans."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_docs import DOCS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attndsl
from attndsl.execution.operator import attend

TEXTS = {
    "window": "attention a { mask causal & last(5) }",
    "alibi": "attention a { mask causal score s - 0.1 * (q - k) }",
    "learned": "attention a(b = learn[H](0.3)) { mask causal score s - b * (q - k) }",
    "documents": "attention a { inputs doc : int[B, n] mask { q, k : doc[q] == doc[k] } }",
}
N, WIDTH = 12, 4


def plan_of(name: str, backend: str | None = None, **sizes: Any) -> attndsl.Plan:
    found = attndsl.parse(TEXTS[name])["a"]
    problem = {"length": N, "batch": 2, "heads": 2, "head_dim": WIDTH, "dtype": "float64", "block_size": 8}
    return attndsl.compile(found, **(problem | sizes), backend=backend, training=True)


def tensors(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*lead, 2, 2, N, WIDTH, dtype=torch.float64) for _ in range(3))
    return q, k, v


def arguments(name: str) -> dict[str, Any]:
    return {
        "documents": {"doc": torch.arange(N).div(5, rounding_mode="floor").expand(2, N)},
        "learned": {"learned": {"b": torch.tensor([0.3, -0.2], dtype=torch.float64)}},
    }.get(name, {})


@pytest.mark.parametrize("backend", ["reference", "torch", "sdpa"])
@pytest.mark.parametrize("name", TEXTS)
def test_gradients_of_torch_func_are_those_of_autograd(name: str, backend: str) -> None:
    plan, qkv, given = plan_of(name, backend), tensors(), arguments(name)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plan(q, k, v, **given).square().sum()  # type: ignore[no-any-return]

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*qkv)
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    value, pull = torch.func.vjp(lambda q: plan(q, *qkv[1:], **given), qkv[0])
    torch.testing.assert_close(pull(2 * value)[0], expected[0])


def test_jacobians_and_gradients_of_parameters() -> None:
    plan, (q, k, v) = plan_of("learned"), tensors()

    def row(b: Tensor) -> Tensor:
        return plan(q, k, v, learned={"b": b})[0, :, -1, 0]  # type: ignore[no-any-return]

    b = torch.tensor([0.3, -0.2], dtype=torch.float64)
    found = torch.func.jacrev(row)(b)
    torch.testing.assert_close(found, torch.autograd.functional.jacobian(row, b))


@pytest.mark.parametrize("name", TEXTS)
def test_vmap_is_one_call_after_the_other(name: str) -> None:
    plan, qkv, given = plan_of(name), tensors(3), arguments(name)
    found = torch.func.vmap(lambda q, k, v: plan(q, k, v, **given))(*qkv)
    expected = torch.stack([plan(*each, **given) for each in zip(*qkv, strict=True)])
    torch.testing.assert_close(found, expected)
    shared = torch.func.vmap(lambda q: plan(q, qkv[1][0], qkv[2][0], **given), in_dims=1, out_dims=2)(
        qkv[0].movedim(0, 1)
    )
    torch.testing.assert_close(shared[:, :, 1], plan(qkv[0][1], qkv[1][0], qkv[2][0], **given))


def test_gradients_of_each_sample() -> None:
    plan, (q, k, v) = plan_of("learned"), tensors(3)
    b = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def loss(b: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plan(q, k, v, learned={"b": b}).sum()  # type: ignore[no-any-return]

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(b, q, k, v)
    for i in range(3):
        torch.testing.assert_close(found[i], torch.func.grad(loss)(b, q[i], k[i], v[i]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_what_is_refused() -> None:
    plan, (q, k, v) = plan_of("alibi"), tensors()

    def loss(q: Tensor) -> Tensor:
        return plan(q, k, v).square().sum()  # type: ignore[no-any-return]

    with pytest.raises(attndsl.AttnError, match="no forward-mode derivatives"):
        torch.func.jvp(loss, (q,), (q,))
    with pytest.raises(attndsl.AttnError, match="no second derivatives"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(q)
    with pytest.raises(attndsl.AttnError, match="no forward-mode derivatives"):
        torch.func.hessian(loss)(q)
    q = q.requires_grad_()
    (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        first.sum().backward()
    (first,) = torch.autograd.grad(loss(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss(q) + first.square().sum(), q)


@pytest.mark.filterwarnings("ignore:.*`?torch.jit.script`? is ")
def test_scripts_are_refused_in_one_line() -> None:
    text = "attention a { mask causal }  attention b(g = learn[H](1.0)) = a + g * a"
    program = attndsl.parse(text)
    for name in ("a", "b"):
        plan = attndsl.compile(program[name], length=8, heads=2, head_dim=8)
        for given in (plan, plan.module(), torch.nn.Sequential(plan.module())):
            with pytest.raises(attndsl.AttnError, match="TorchScript knows nothing of plans"):
                torch.jit.script(given)


def test_functional_call_and_parametrizations() -> None:
    plan, (q, k, v) = plan_of("learned"), tensors()
    module = plan.module()
    b = torch.tensor([0.1, 0.2], dtype=torch.float64)
    found = torch.func.functional_call(module, {"b": b}, (q, k, v))
    torch.testing.assert_close(found, plan(q, k, v, learned={"b": b}))
    grad = torch.func.grad(lambda b: torch.func.functional_call(module, {"b": b}, (q, k, v)).sum())(b)
    leaf = b.clone().requires_grad_()
    (expected,) = torch.autograd.grad(plan(q, k, v, learned={"b": leaf}).sum(), leaf)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", TEXTS)
def test_one_plan_serves_every_dtype(name: str) -> None:
    plan, (q, k, v), given = plan_of(name, dtype="float32"), tensors(), arguments(name)
    expected = plan_of(name)(q, k, v, **given)
    torch.testing.assert_close(plan(q, k, v, **given), expected)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 3e-3)):
        found = plan(*(x.to(dtype) for x in (q, k, v)), **given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    assert set(plan.others) == {(name, plan.backend) for name in ("float64", "bfloat16", "float16")}


def test_autocast_converts_as_for_the_attention_of_torch() -> None:
    plan, qkv = plan_of("window", dtype="float32"), [x.float() for x in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        found = plan(qkv[0], qkv[1].bfloat16(), qkv[2])
        expected = torch.nn.functional.scaled_dot_product_attention(*qkv)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, plan(*(x.bfloat16() for x in qkv)))


def test_a_module_built_on_meta_and_moved() -> None:
    plan = plan_of("learned", dtype="float32")
    with torch.device("meta"):
        module = plan.module()
        q, k, v = (torch.empty(2, 2, N, WIDTH) for _ in range(3))
    module = module.to("meta")
    out = module(q, k, v)
    assert (out.is_meta, out.shape) == (True, (2, 2, N, WIDTH))
    module = module.to_empty(device="cpu")
    torch.nn.init.constant_(module.b, 0.3)  # type: ignore[arg-type]
    qkv = [x.float() for x in tensors()]
    value = {"b": torch.full((2,), 0.3)}
    torch.testing.assert_close(module(*qkv), plan(*qkv, learned=value))
    half = module.bfloat16()(*(x.bfloat16() for x in qkv))
    torch.testing.assert_close(half.float(), plan(*qkv, learned=value), atol=3e-2, rtol=3e-2)


def test_dtypes_that_do_not_fit_one_another() -> None:
    plan, (q, k, v) = plan_of("window"), tensors()
    with pytest.raises(attndsl.AttnError, match=r"(?s)`k` is float32.*`q` is float64"):
        plan(q, k.float(), v)
    with pytest.raises(attndsl.AttnError, match="`q` is int64, and must be one of"):
        plan(q.long(), k, v)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="AttnError"):
        torch.compile(plan, backend="eager", fullgraph=True)(q.float(), k.float(), v.float())


@pytest.mark.parametrize("name", TEXTS)
def test_flops_are_those_of_live_pairs(name: str) -> None:
    plan, qkv, given = plan_of(name), [x.requires_grad_() for x in tensors()], arguments(name)
    tables = {key: value for key, value in given.items() if key != "learned"}
    mask = attndsl.parse(TEXTS[name])["a"].mask(N, heads=2, **tables)
    pairs = int(mask.sum()) * 4 // (mask.size // N**2)
    with FlopCounterMode(display=False) as counter:
        out = plan(*qkv, **given)
    assert counter.get_total_flops() == 4 * pairs * WIDTH
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * pairs * WIDTH


@pytest.mark.parametrize("backend", ["reference", "torch", "linear"])
def test_flops_of_gradients_below_the_dispatcher_are_told(backend: str) -> None:
    """Where they are found by differentiating what the kernel does."""
    text = "attention a { mask causal  score elu1(Q) @ elu1(K)  norm linear }"
    plan = attndsl.compile(attndsl.parse(text)["a"], length=N, head_dim=WIDTH, backend=backend, training=True)
    qkv = [torch.randn(1, 1, N, WIDTH, requires_grad=True) for _ in range(3)]
    with FlopCounterMode(display=False) as counter:
        out = plan(*qkv)
        found = torch.autograd.grad(out.sum(), qkv)
    assert counter.get_total_flops() == 14 * (N * (N + 1) // 2) * WIDTH
    for mine, plain in zip(found, torch.autograd.grad(plan(*qkv).sum(), qkv), strict=True):
        torch.testing.assert_close(mine, plain)


def test_the_profiler_sees_the_operator() -> None:
    plan, qkv = plan_of("window"), tensors()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        plan(*qkv)
    assert "attndsl::attend" in {event.name for event in profiler.events()}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_jagged_tensors_are_refused_and_go_the_way_of_the_page() -> None:
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", DOCS["torch.md"], re.S) if "jagged" in x)
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    offsets, of = torch.tensor([0, 5, 6, 15]), torch.nested.nested_tensor_from_jagged
    values = [torch.randn(15, 2, 8, requires_grad=True) for _ in range(3)]
    qkv = [of(x, offsets).transpose(1, 2) for x in values]
    for q in (qkv[0], torch.nested.nested_tensor([torch.zeros(2, 5, 8)])):
        with pytest.raises(
            attndsl.AttnError, match=r"(?s)`q` is a nested tensor.*`q\.values\(\)` as one row"
        ):
            names["plan"](q, *qkv[1:], doc=torch.zeros(15, dtype=torch.int64))
    out = names["attend"](*qkv)
    assert out.shape == qkv[0].shape
    window = attndsl.parse("attention a { mask causal & last(4) }")["a"]
    one = attndsl.compile(window, length=9, heads=2, head_dim=8, training=True)
    alone = [one(*(x[i:j].transpose(0, 1)[None] for x in values))[0] for i, j in pairwise(offsets.tolist())]
    for found, right in zip(out.unbind(), alone, strict=True):
        torch.testing.assert_close(found, right)
    ours, theirs = (
        torch.autograd.grad(sum(x.square().sum() for x in found), values) for found in (out.unbind(), alone)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "torch"])
@pytest.mark.parametrize("trained", [False, True])
def test_results_lie_as_a_graph_expects_them(backend: str, trained: bool) -> None:
    """Inductor holds an operator to the strides that it told: rows one after the other."""
    plan = plan_of("alibi", backend, dtype="float32", length=64)
    # [B, n, H, D] transposed, as layers make them
    q, k, v = (torch.randn(2, 50, 2, WIDTH).transpose(1, 2).requires_grad_(trained) for _ in range(3))
    lowered = plan.lowered
    given = [*lowered.tensors({}), q.new_empty(0)]
    out, lse, kept = attend(q, k, v, given, None, None, None, None, None, lowered.identity)
    assert all(x.is_contiguous() for x in (out, lse, *kept))
    if trained:
        torch.testing.assert_close(out, plan(q, k, v))
    grads = torch.autograd.grad(out.sum(), (q, k, v)) if trained else ()
    assert all(x.is_contiguous() for x in grads)
