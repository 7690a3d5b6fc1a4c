"""The backend `linear` beside `reference`: the same weights without forming them."""

from __future__ import annotations

import pytest
import torch
from thin import thin
from torch import Tensor

import attndsl
from attndsl.execution import registry

PLANS = {
    "causal": "mask causal  score elu1(Q) @ elu1(K)  norm linear",
    "full": "score elu1(Q) @ elu1(K)  norm linear",
    "retnet": "mask causal  score Q @ K  decay 0.97 ** (q - k)  norm none",
    "favor": "mask causal  score favor(Q, W) @ favor(K, W)  norm linear",
    "favor_wide": "mask causal  score favor(Q, orthogonal(256)) @ favor(K, orthogonal(256))  norm linear",
    "favor_full": "score favor(Q, W) @ favor(K, W)  norm linear",
    "gated": "inputs g : float[B, H, n]  c : float[B, H, n]  mask causal"
    "  score trig(unit(Q), W) @ trig(unit(K), W)  decay (1 - g[k]) * exp(c[q] - c[k])  norm linear",
    "documents": "inputs ids : int[B, n]  mask causal & documents(ids)  score elu1(Q) @ elu1(K)  norm linear",
    "documents_full": "inputs ids : int[B, n]  mask documents(ids)  score elu1(Q) @ elu1(K)  norm linear",
    "documents_favor": "inputs ids : int[B, n]  mask causal & documents(ids)  score favor(Q, W) @ favor(K, W)"
    "  norm linear",
    "documents_gated": "inputs ids : int[B, n]  c : float[B, H, n]  mask causal & documents(ids)"
    "  score elu1(Q) @ elu1(K)  decay exp(c[q] - c[k])  norm none",
    "documents_retnet": "inputs ids : int[n]  mask causal & documents(ids)  score Q @ K"
    "  decay 0.97 ** (q - k)  norm none",
    "padded": "inputs pad : int[B]  mask causal & { q, k : k >= pad }  score elu1(Q) @ elu1(K)"
    "  decay 0.9 ** (q - k)  norm linear",
    "forgetting": "mask causal  score Q @ K  decay 0.000001 ** (q - k)  norm none",
    "growing": "mask causal  score elu1(Q) @ elu1(K)  decay 1.01 ** (q - k)  norm linear",
    "steep": "mask causal  score exp(3 * Q) @ exp(3 * K)  decay 0.5 ** (q - k)  norm linear",
    "learned": "mask causal  score elu1(w * Q) @ elu1(K)  decay sigmoid(slope) ** (q - k)  norm linear",
}
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": "float64", "batch": 2, "training": True}


def bound(name: str) -> attndsl.Bound:
    text = f"attention a(W = orthogonal(24)) {{ {PLANS[name]} }}"
    return attndsl.parse(f"let slope = learn[H](0.5)\nlet w = learn[D](1.0)\n{text}")["a"]


def results(
    backend: str, name: str, nq: int, n: int, with_lse: bool = True, ids: Tensor | None = None
) -> list[Tensor]:
    """Output, log-sum-exp, and gradients of all that has some."""
    attention = bound(name)
    module = attndsl.compile(attention, length=n, q_length=nq, **SIZES, backend=backend).module()
    generator = torch.Generator().manual_seed(n)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = drawn(2, 4, nq, 16), drawn(2, 2, n, 16), drawn(2, 2, n, 16)
    tables = {
        "g": torch.rand(2, 4, n, generator=generator, dtype=torch.float64).requires_grad_(),
        "c": (-torch.rand(2, 4, n, generator=generator, dtype=torch.float64)).cumsum(-1).requires_grad_(),
        "ids": torch.randint(0, 4, (2, n), generator=generator) if ids is None else ids,
        "pad": torch.tensor([0, min(5, n - 1)]),
    }
    given = {table.name: tables[table.name] for table in attention.inputs}
    out, lse = module(q, k, v, return_lse=True, **given)
    slopes = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ends = (out * slopes).sum()
    if with_lse:
        ends = ends + 0.3 * torch.where(lse.isfinite(), lse, 0.0).sum()
    leaves = [q, k, v, *(x for x in given.values() if x.requires_grad), *module.parameters()]
    return [out, lse, *torch.autograd.grad(ends, leaves, materialize_grads=True)]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("sizes", thin([(150, 150), (1, 1), (64, 64), (40, 150), (151, 151), (600, 600)], 3))
def test_it_is_what_forming_the_weights_gives(name: str, sizes: tuple[int, int]) -> None:
    with_lse = sizes[0] % 2 == 0
    ids = torch.arange(sizes[1]) // 50 if name == "documents_retnet" else None
    found, exact = (results(backend, name, *sizes, with_lse, ids) for backend in ("linear", "reference"))
    assert_same(found, exact)


def assert_same(found: list[Tensor], exact: list[Tensor]) -> None:
    for mine, wanted in zip(found, exact, strict=True):
        assert torch.equal(mine.isnan(), wanted.isnan())
        scale = wanted.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12 * max(1.0, scale), equal_nan=True)


@pytest.mark.parametrize("name", [name for name in PLANS if "documents" in name])
@pytest.mark.parametrize("sizes", [(300, 300), (70, 300)])
def test_documents_of_all_lengths_are_one_walk(name: str, sizes: tuple[int, int]) -> None:
    """Of one token, of less than a part, of one that begins and one that ends with a part, of several."""
    lengths = torch.tensor([1, 1, 5, 17, 40, 64, 63, 1, 80, 28])
    ids = torch.repeat_interleave(torch.arange(10), lengths)
    if "retnet" not in name:
        ids = torch.stack([ids, ids.flip(0)])
    assert_same(*(results(backend, name, *sizes, ids=ids) for backend in ("linear", "reference")))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in PLANS if "documents" in name])
def test_other_documents_change_nothing(name: str, dtype: str) -> None:
    attention = bound(name)
    plan = attndsl.compile(attention, length=200, **{**SIZES, "dtype": dtype}, backend="linear")
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([30, 50, 3, 90, 27]))
    c = torch.zeros(2, 4, 200, dtype=getattr(torch, dtype))
    tables = {"ids": ids if name == "documents_retnet" else ids.expand(2, 200), "c": c}
    given = {table.name: tables[table.name] for table in attention.inputs}
    vectors = [torch.randn(2, h, 200, 16, dtype=getattr(torch, dtype)) for h in (4, 2, 2)]
    slope = torch.randn(2, 4, 200, 16, dtype=getattr(torch, dtype))

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in vectors]
        out = plan(*leaves, **given)
        return [out, *torch.autograd.grad(out, leaves, slope)]

    before = run()
    for changed in (ids == 1, ids == 3):
        for x in vectors:
            x[:, :, changed] *= 20
        for mine, wanted in zip(run(), before, strict=True):
            assert torch.equal(mine[:, :, (ids != 1) & (ids != 3)], wanted[:, :, (ids != 1) & (ids != 3)])


@pytest.mark.parametrize("name", ["favor", "gated", "padded", "documents_favor"])
def test_gradients_in_float32_are_near_those_in_float64(name: str) -> None:
    found = {}
    for dtype in (torch.float32, torch.float64):
        attention = bound(name)
        plan = attndsl.compile(attention, length=150, **{**SIZES, "dtype": dtype}, backend="linear")
        given = {
            "g": torch.full((2, 4, 150), 0.1),
            "c": -torch.arange(150.0).expand(2, 4, 150) / 20,
            "ids": torch.arange(150).expand(2, 150) // 40,
            "pad": torch.tensor([0, 5]),
        }
        given = {table.name: given[table.name] for table in attention.inputs}
        given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
        vectors = [
            torch.randn(2, h, 150, 16, generator=torch.Generator().manual_seed(h)).to(dtype).requires_grad_()
            for h in (4, 2, 2)
        ]
        found[dtype] = torch.autograd.grad(plan(*vectors, **given).square().sum(), vectors)
    for mine, exact in zip(found[torch.float32], found[torch.float64], strict=True):
        assert (mine - exact).abs().max() < 1e-5 * exact.abs().max()


def test_great_exponents_are_told_in_float64() -> None:
    """Their sums of 64 products, of up to 150, are rounded in float32 to 1e-5."""
    attention, n = bound("favor_wide"), 4096
    q, k, v = (torch.randn(1, 1, n, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    found, exact = (
        attndsl.compile(attention, length=n, dtype=dtype, backend="linear")(
            *(x.to(dtype) for x in (6 * q, 6 * k, v))
        )
        for dtype in (torch.float32, torch.float64)
    )
    assert (found - exact).abs().max() < 3e-6 * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "scale", "bound_"),
    [("causal", 1, 1e-6), ("retnet", 1, 1e-6), ("favor", 1, 3e-6), ("favor", 6, 1e-5)],
)
def test_float32_is_near_float64_at_16_384(name: str, scale: float, bound_: float) -> None:
    """The largest error over the largest output."""
    attention, n = bound(name), 16_384
    q, k, v = (torch.randn(1, 1, n, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    q, k = q * scale, k * scale
    plans = {
        kind: attndsl.compile(attention, length=n, head_dim=16, dtype=kind, backend="linear")
        for kind in ("float32", "float64")
    }
    found, exact = plans["float32"](q, k, v).double(), plans["float64"](q.double(), k.double(), v.double())
    assert ((found - exact).abs().max() / exact.abs().max()).item() < bound_


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["favor", "steep", "causal"])
def test_a_later_key_changes_nothing_before_it(name: str, dtype: str) -> None:
    """The greatest exponent is that of what came before, also inside one part."""
    plan = attndsl.compile(bound(name), length=200, head_dim=16, dtype=dtype, backend="linear")
    q, k, v = (torch.randn(1, 1, 200, 16, dtype=getattr(torch, dtype)) for _ in range(3))
    before = plan(q, k, v)
    for last in (199, 130, 20):
        k[:, :, last] *= 20
        assert torch.equal(plan(q, k, v)[:, :, :last], before[:, :, :last])


@pytest.mark.parametrize(
    "text",
    [
        "mask causal & { q, k : k >= 2 }  score (t[q - 2] * elu1(Q)) @ elu1(K)",
        "mask causal & { q, k : k >= 2 }  score elu1(Q) @ elu1(K)  decay exp(sqrt(k - 2.0) - sqrt(q - 2.0))",
        "mask { q, k : k <= q and k >= 3 and q >= 3 and t[q - 3] == t[k - 3] }  score elu1(Q) @ elu1(K)",
        "mask causal & { q, k : k >= 1 }  score (log(q) * elu1(Q)) @ elu1(K)",
    ],
)
def test_what_the_mask_guards_is_not_looked_at(text: str) -> None:
    kind = "int" if "==" in text else "float"
    bound = attndsl.parse(f"attention a {{ inputs t : {kind}[n]  {text}  norm none }}")["a"]
    t = torch.arange(40) // 9 if kind == "int" else torch.rand(40, dtype=torch.float64)
    vectors = [torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = []
    for backend in ("linear", "reference"):
        sizes = {"length": 40, "heads": 2, "head_dim": 8, "dtype": "float64", "training": True}
        out = attndsl.compile(bound, **sizes, backend=backend)(*vectors, t=t)
        found.append([out, *torch.autograd.grad(out.square().sum(), vectors)])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)


def test_a_key_whose_features_overflow_spoils_no_row_before_it() -> None:
    text = "mask causal score concat(exp(Q), exp(-Q)) @ concat(exp(K), exp(-K)) norm linear"
    q, k, v = (torch.randn(1, 1, 80, 4) for _ in range(3))
    k[:, :, 70] = 100
    bound = attndsl.parse(f"attention a {{ {text} }}")["a"]
    linear, reference = (
        attndsl.compile(bound, length=80, head_dim=4, backend=backend)(q, k, v)
        for backend in ("linear", "reference")
    )
    assert linear[:, :, 70:].isnan().all()
    torch.testing.assert_close(linear, reference, equal_nan=True)


def test_segments_cost_what_one_walk_costs() -> None:
    bound = attndsl.parse(
        "attention a { inputs d : int[n]  mask causal & documents(d)  score elu1(Q) @ elu1(K)  norm linear }"
    )["a"]
    backend = registry.plugin("backends", "linear")
    seconds = []
    for size in (4, 2048):
        masks = bound.block_mask(2048, d=torch.arange(2048) // size)
        seconds.append(backend.cost(bound.attention, attndsl.backend.Problem(2048, 2048), masks))
    assert seconds[0] == seconds[1]


def test_gradients_are_those_of_a_graph() -> None:
    """Where the dispatcher excludes autograd nothing is recorded in the plain way."""
    for name in ("causal", "retnet", "gated"):
        attention = bound(name)
        plan = attndsl.compile(attention, length=100, **SIZES, backend="linear")
        given = {"g": torch.rand(2, 4, 100).double(), "c": torch.rand(2, 4, 100).double().cumsum(-1)}
        given = {table.name: given[table.name].requires_grad_() for table in attention.inputs}
        q, k, v = (torch.randn(2, h, 100, 16).double().requires_grad_() for h in (4, 2, 2))

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return plan(q, k, v, **given).square().sum()  # noqa: B023

        graph = torch.compile(run, fullgraph=True, backend="aot_eager")
        leaves = [q, k, v, *given.values()]
        for mine, plain in zip(
            torch.autograd.grad(graph(q, k, v), leaves),
            torch.autograd.grad(run(q, k, v), leaves),
            strict=True,
        ):
            torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, -0.5, float("nan")])
def test_a_decay_without_a_logarithm_is_refused(decay: float) -> None:
    text = "attention a { inputs g : float[H]  mask causal  score Q @ K  decay g ** (q - k)  norm none }"
    plan = attndsl.compile(attndsl.parse(text)["a"], length=9, backend="linear", head_dim=4)
    q = torch.randn(1, 1, 9, 4)
    with pytest.raises(attndsl.AttnError, match="needs the logarithm of the decay"):
        plan(q, q, q, g=[decay])


@pytest.mark.parametrize(
    ("decay", "g", "refused"),
    [
        ("g[k]", [1, 1, -1, 1], True),
        ("g[k] * 0.9 ** (q - k)", [1, 1, 1, -1], True),
        ("(0.5 - n) * g[2]", [1, 1, 1, 1], True),
        ("g[q]", [1, -1, 1, 1], True),
        ("g[q] * g[k]", [-1, -1, -1, -1], False),
        ("g[q] * g[k]", [1, 1, -1, 1], True),
        ("g[q] * g[k]", [0, 0, -1, 0], False),
        ("max(g[k], 0.0)", [1, -1, 1, 1], False),
    ],
)
@pytest.mark.parametrize("mask", ["causal", "causal & { q, k : k >= 3 }", "documents(ids)"])
def test_a_negative_decay_is_refused(decay: str, g: list[int], refused: bool, mask: str) -> None:
    """As elsewhere."""
    text = f"inputs g : float[n]  ids : int[n]  mask {mask}  score elu1(Q) @ elu1(K)  decay {decay}"
    bound = attndsl.parse(f"attention a {{ {text}  norm none }}")["a"]
    given = {"g": torch.tensor(g).double(), "ids": torch.tensor([0, 0, 1, 2])}
    given = {table.name: given[table.name] for table in bound.inputs}
    q, k, v = torch.randn(3, 1, 1, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    found = []
    for backend in ("reference", "linear"):
        plan = attndsl.compile(bound, length=4, head_dim=8, dtype="float64", backend=backend)
        try:
            found.append(plan(q, k, v, **given))
        except attndsl.AttnError as error:
            found.append(str(error).splitlines()[0])
    if isinstance(found[0], str):
        assert found[0] == found[1]
    else:
        torch.testing.assert_close(*found)
    if mask == "causal":
        assert isinstance(found[0], str) == refused


def test_what_it_declines_goes_by_tiles() -> None:
    for clauses, said in {
        "mask last(9)  score elu1(Q) @ elu1(K)  norm linear": "its mask is neither full nor causal",
        "mask causal  score max(Q @ K, 0.0)  norm linear": "the score is no inner product",
        "mask causal  score elu1(Q) @ elu1(K)  decay ramp(q - k, 4, 8)  norm linear": "the decay is",
        "mask causal": "norm",
    }.items():
        plan = attndsl.compile(attndsl.parse(f"attention a {{ {clauses} }}")["a"], length=64, head_dim=16)
        reason = plan.considered["linear"]
        assert isinstance(reason, str)
        assert said in reason
        assert plan.backend != "linear"


def test_the_gradient_of_a_rate_keeps_its_digits_in_float32() -> None:
    """It is a difference of sums over positions, which are thousands of times as large."""
    clauses = "mask causal  score elu1(Q) @ elu1(K)  decay g ** (q - k)  norm none"
    attention = attndsl.parse(f"attention a(g = learn[H](0.5)) {{ {clauses} }}")["a"]
    plan = attndsl.compile(attention, length=4096, head_dim=8, training=True, backend="linear")
    generator, found = torch.Generator().manual_seed(0), []
    numbers = [torch.randn(1, 1, 4096, 8, generator=generator) for _ in range(4)]
    for dtype in (torch.float64, torch.float32):
        q, k, v, slope = (x.to(dtype) for x in numbers)
        rate = torch.full((1,), 0.5, dtype=dtype, requires_grad=True)
        (plan(q, k, v, learned={"g": rate}) * slope).sum().backward()
        assert rate.grad is not None
        found.append(rate.grad.item())
    assert found[1] == pytest.approx(found[0], rel=1e-5)
