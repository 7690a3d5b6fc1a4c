"""Norms `linear` and `none`, whose weights may be negative, and the constants that features are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shipped import example
from torch import Tensor

import attndsl
from attndsl.expr import Drawn
from attndsl.features import FeatureForm, feature_form
from attndsl.meaning.draws import drawn as constants

SIGNED = (
    "mask causal & (last(9) | sinks(2)) & {{ q, k : q != 5 }} "
    "score (Q @ K + u @ sin(W @ K)) / D decay g ** (q - k) norm {}"
)


def compiled(clauses: str, backend: str, length: int = 24) -> attndsl.Plan:
    text = f"attention a(u = learn[3](0.4), g = learn[H](0.9)) {{ inputs W : float[3, D]  {clauses} }}"
    return attndsl.compile(
        attndsl.parse(text)["a"],
        length=length,
        heads=2,
        head_dim=4,
        dtype="float64",
        backend=backend,
        training=True,
        block_size=8,
    )


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 2, 24, 4)] * 3 + [(3, 4), (3,), (2,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[-1] = 0.8 + 0.1 * tensors[-1].tanh()
    return [x.requires_grad_() for x in tensors]


def by_hand(norm: str, q: Tensor, k: Tensor, v: Tensor, W: Tensor, u: Tensor, g: Tensor) -> Tensor:
    i, j = torch.arange(24)[:, None], torch.arange(24)
    mask = (j <= i) & ((i - j < 9) | (j < 2)) & (i != 5)
    weight = (q @ k.mT + ((k @ W.T).sin() @ u)[..., None, :]) / 4 * g[:, None, None] ** (i - j).clamp_min(0)
    weight = torch.where(mask, weight, 0.0)
    if norm == "linear":
        total = weight.sum(-1, keepdim=True)
        assert (total < 0).any()
        weight = weight / torch.where(total == 0, 1.0, total)
    return weight @ v


@pytest.mark.parametrize("norm", ["linear", "none"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_weights_of_both_signs(norm: str, backend: str) -> None:
    plan, given = compiled(SIGNED.format(norm), backend), drawn()

    def run(q: Tensor, k: Tensor, v: Tensor, W: Tensor, u: Tensor, g: Tensor) -> Tensor:
        return plan(q, k, v, W=W, learned={"u": u, "g": g})

    mine, hand = run(*given), by_hand(norm, *given)
    torch.testing.assert_close(mine, hand, rtol=1e-10, atol=1e-10)
    slope = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2), dtype=mine.dtype)
    found, expected = (torch.autograd.grad(x, given, slope) for x in (mine, hand))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if norm == "none":
        assert torch.autograd.gradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_logarithm_of_a_sum(backend: str) -> None:
    """NaN of a negative one, -inf of none; its gradient is that of the sum all the same."""
    plan = compiled(SIGNED.format("none"), backend)
    q, k, v, W, u, g = drawn()
    out, lse = plan(q, k, v, W=W, learned={"u": u, "g": g}, return_lse=True)
    sums = by_hand("none", q, k, torch.ones_like(v), W, u, g)[..., 0]
    assert (lse[..., 5] == -torch.inf).all()
    assert torch.equal(lse.isnan(), sums < 0)
    positive = sums > 0
    torch.testing.assert_close(lse[positive], sums[positive].log())
    found = torch.autograd.grad(lse[positive].sum(), (q, k, W, u, g))
    for one, other in zip(
        found, torch.autograd.grad(sums[positive].log().sum(), (q, k, W, u, g)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert out.isfinite().all()


def test_constants_are_the_same_everywhere() -> None:
    plain, turned = (constants(Drawn(kind, 7), 5, 3) for kind in ("gaussian_rows", "orthogonal"))
    np.testing.assert_allclose(
        plain[[0, 4], 0], [-0.2939012603531111, 0.07771920920539453], rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(
        turned[[0, 4], 0], [-0.34557982281212424, 0.5394707290296149], rtol=0, atol=1e-12
    )
    for block in (turned[:3], turned[3:]):
        products = block @ block.T
        np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-14)
    # more rows are further rows
    np.testing.assert_allclose(constants(Drawn("orthogonal", 7), 9, 3)[:5], turned, atol=1e-14)
    assert not np.isclose(constants(Drawn("orthogonal", 8), 5, 3), turned).any()


def test_constants_are_standard_normals() -> None:
    x = constants(Drawn("gaussian_rows", 0), 1024, 64)
    assert abs(x.mean()) < 4 / math.sqrt(x.size)
    assert abs((x**2).mean() - 1) < 4 * math.sqrt(2 / x.size)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / x.size)
    lengths = (constants(Drawn("orthogonal", 0), 1024, 64) ** 2).sum(1)
    assert abs(lengths.mean() - 64) < 4 * math.sqrt(128 / 1024)
    assert abs(lengths.var() - 128) < 0.25 * 128


DRAWS, WIDTH, ROWS = 4000, 16, 32
KINDS: tuple[Any, ...] = ("gaussian_rows", "orthogonal")


@pytest.mark.parametrize("features", ["favor", "trig"])
def test_features_have_the_published_variances(features: str) -> None:
    """Choromanski et al. 2021, lemma 2 and theorem 2: of exp(x @ y), and orthogonal rows are better."""
    rng = np.random.default_rng(3)
    x, y = 0.45 * rng.standard_normal((2, WIDTH)) / math.sqrt(WIDTH) * 2
    kernel, both, apart = math.exp(x @ y), ((x + y) ** 2).sum(), ((x - y) ** 2).sum()
    size = math.exp((x @ x + y @ y) / 2)

    def positive(w: NDArray[Any]) -> Any:
        return np.exp(w @ (x + y)).mean(-1) / size

    def waves(w: NDArray[Any]) -> Any:
        return size * np.cos(w @ (x - y)).mean(-1)

    of, variance = (
        (positive, math.exp(both) * kernel**2 * (1 - math.exp(-both)) / ROWS)
        if features == "favor"
        else (waves, math.exp(both) / kernel**2 * (1 - math.exp(-apart)) ** 2 / (2 * ROWS))
    )
    squares = {}
    for kind in KINDS:
        # blocks of rows are independent
        found = of(constants(Drawn(kind, 0), DRAWS * ROWS, WIDTH).reshape(DRAWS, ROWS, WIDTH))
        assert abs(found.mean() - kernel) < 4 * found.std() / math.sqrt(DRAWS)
        squares[kind] = (found - kernel) ** 2
    plain, turned = squares["gaussian_rows"], squares["orthogonal"]
    assert abs(plain.mean() - variance) < 4 * plain.std() / math.sqrt(DRAWS)
    assert turned.mean() + 2 * turned.std() / math.sqrt(DRAWS) < plain.mean()


def test_a_module_owns_its_constants() -> None:
    text = (
        "attention a(W = orthogonal(5, seed = 3)) { mask causal score favor(Q, W) @ favor(K, W) norm linear }"
    )
    plan = attndsl.compile(attndsl.parse(text)["a"], length=9, heads=2, head_dim=4, training=True)
    module = plan.module()
    assert [*module.state_dict()] == ["orthogonal_5_3"]
    assert not [*module.parameters()]
    expected = constants(Drawn("orthogonal", 3), 5, 4)
    np.testing.assert_allclose(module.state_dict()["orthogonal_5_3"], expected, rtol=1e-6)
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    torch.testing.assert_close(module(q, k, v), plan(q, k, v))
    module.orthogonal_5_3.mul_(0.5)
    assert not torch.allclose(module(q, k, v), plan(q, k, v))
    np.testing.assert_allclose(plan.module().orthogonal_5_3, expected, rtol=1e-6)


N, WIDE = 40, 8
ROW, COLUMN = torch.arange(N)[:, None], torch.arange(N)


def elu1(x: Tensor) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def favor(x: Tensor) -> Tensor:
    """With the factor that the text leaves out."""
    w = torch.tensor(constants(Drawn("orthogonal", 0), 256, WIDE))
    x = x / WIDE**0.25
    return torch.exp(x @ w.T - (x * x).sum(-1, keepdim=True) / 2) / 16


def trig(x: Tensor) -> Tensor:
    w = torch.tensor(constants(Drawn("gaussian_rows", 0), 64, WIDE))
    x = torch.nn.functional.normalize(x, dim=-1) @ w.T
    return torch.cat([x.sin(), x.cos()], -1) / 8


def products(of: Any) -> Any:
    return lambda q, k, g: of(q) @ of(k).mT


def cosines(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Qin et al. 2022, equation 9; their positions begin with 1."""
    return torch.relu(q) @ torch.relu(k).mT * torch.cos(math.pi / 2 * (ROW - COLUMN).double() / N)


def gated(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """The sum that Peng et al. 2021, equation 7, write as a recurrence."""
    sums = g.log().cumsum(-1)
    kept = torch.exp(sums[..., :, None] - sums[..., None, :])
    return products(trig)(q, k, g) * (1 - g)[..., None, :] * kept


def retained(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    kept = 1 - 2.0 ** (-5 - torch.arange(2.0, dtype=torch.float64))
    return q @ k.mT * kept[:, None, None] ** (ROW - COLUMN).clamp_min(0)


PUBLISHED = {
    ("linear_attention", "linear_attention"): products(elu1),
    ("performer", "performer"): products(favor),
    ("performer", "performer_relu"): products(lambda x: torch.relu(x) + 0.001),
    ("rfa", "rfa"): products(trig),
    ("rfa", "gated_rfa"): gated,
    ("retnet", "retnet"): retained,
    ("cosformer", "cosformer"): cosines,
}


@pytest.mark.parametrize(("file", "name"), PUBLISHED)
def test_examples_are_what_their_papers_say(file: str, name: str) -> None:
    attention = example(file)[name]
    sizes = {"length": N, "heads": 2, "head_dim": WIDE, "dtype": "float64"}
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, N, WIDE, generator=generator, dtype=torch.float64) for _ in range(3))
    g = torch.rand(1, 2, N, generator=generator, dtype=torch.float64) * 0.5 + 0.4
    weight = PUBLISHED[file, name](q, k, g).masked_fill(COLUMN > ROW, 0.0)
    total = weight.sum(-1, keepdim=True)
    expected = weight @ v if name == "retnet" else weight @ v / torch.where(total == 0, 1.0, total)
    inputs = {"g": g, "c": g.log().cumsum(-1)} if name == "gated_rfa" else {}
    for backend in ("reference", "torch"):
        found = attndsl.compile(attention, **sizes, backend=backend)(q, k, v, **inputs)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (group,) = attention.attention.groups
    form = feature_form(group.score, group.decay)
    assert isinstance(form, FeatureForm)
    assert not form.phi_q.free & {"k", "K"}
    assert not form.phi_k.free & {"q", "Q"}


def test_a_gate_is_a_recurrence() -> None:
    """Peng et al. 2021, equation 7."""
    attention = example("rfa")["gated_rfa"]
    plan = attndsl.compile(attention, length=N, heads=1, head_dim=WIDE, dtype="float64")
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 1, N, WIDE, generator=generator, dtype=torch.float64) for _ in range(3))
    g = torch.rand(1, 1, N, generator=generator, dtype=torch.float64) * 0.5 + 0.4
    state, total, rows = 0.0, 0.0, []
    for i in range(N):
        gate, one = g[0, 0, i], trig(k[0, 0, i])
        state = gate * state + (1 - gate) * one[:, None] * v[0, 0, i]
        total = gate * total + (1 - gate) * one
        rows.append(trig(q[0, 0, i]) @ state / (trig(q[0, 0, i]) @ total))
    found = plan(q, k, v, g=g, c=g.log().cumsum(-1))
    torch.testing.assert_close(found[0, 0], torch.stack(rows), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch", "linear"])
def test_a_number_is_one_entry_beside_vectors(backend: str) -> None:
    text = "mask causal score concat(1, Q, 0.5 * h) @ concat(k + 1, K, 2) norm none"
    plan = attndsl.compile(
        attndsl.parse(f"attention a {{ {text} }}")["a"], length=5, heads=2, head_dim=3, dtype="float64",
        backend=backend, training=True,
    )  # fmt: skip
    given = [x.requires_grad_() for x in torch.randn(3, 1, 2, 5, 3, dtype=torch.float64).unbind()]
    weight = given[0] @ given[1].mT + torch.arange(1, 6) + torch.arange(2)[:, None, None]
    expected = weight.tril() @ given[2]
    found = plan(*given)
    torch.testing.assert_close(found, expected)
    for mine, hand in zip(
        *(torch.autograd.grad(x.square().sum(), given) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, hand)


NO_FORM = {
    "a sum": ("score s + 1", None),
    "an exponential": ("score exp(s)", None),
    "a feature of both": ("score (Q * sin(K)) @ K", None),
    "a wave of the distance": ("score (Q @ K) * cos((q - k) / 8)", None),
    "a ramp": ("score Q @ K decay ramp(q - k, 4, 4)", None),
    "multiplicities": ("mask causal + last(3) score Q @ K", None),
    "a power of nothing": ("score Q @ K decay 0.0 ** (q - k)", None),
    "factors of both sides": (
        "score K @ (k * Q) / (q + 2) decay exp((k - q) / 8) decay 0.5",
        ("(0.5 * ((1.0 / (q + 2)) * Q))", "(k * K)", "((-1 * q) / 8)", "(k / 8)"),
    ),
    "a sum of products": (
        "score sum((q + 1) * Q * K / D)",
        ("((1.0 / D) * ((q + 1) * Q))", "K", "", ""),
    ),
    "the logit": ("decay 0.5 ** (q - k)", ("((1.0 / sqrt(D)) * Q)", "K", "", "")),
}


@pytest.mark.parametrize("name", NO_FORM)
def test_what_is_an_inner_product_of_features(name: str) -> None:
    clauses, expected = NO_FORM[name]
    group = attndsl.parse(f"attention a {{ {clauses} norm none }}")["a"].attention.groups[0]
    form = feature_form(group.score, group.decay)
    if expected is None:
        assert isinstance(form, str)
        return
    assert isinstance(form, FeatureForm)
    found = form.phi_q, form.phi_k, form.log_q, form.log_k
    assert all(repr(mine) == hand for mine, hand in zip(found, expected, strict=True) if hand)


def test_shared_vectors_see_themselves_only_where_there_is_nothing_else() -> None:
    """Kitaev et al. 2020, section 2, with the number of their code."""
    attention = attndsl.parse("attention a { mask causal & last(7) score shared_qk }")["a"]
    generator = torch.Generator().manual_seed(6)
    x, v = (torch.randn(1, 2, N, WIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    logit = x @ torch.nn.functional.normalize(x, dim=-1).mT
    logit = logit.masked_fill(ROW == COLUMN, -1e5).masked_fill(
        (COLUMN > ROW) | (ROW - COLUMN >= 7), -torch.inf
    )
    for backend in ("reference", "torch"):
        plan = attndsl.compile(attention, length=N, heads=2, head_dim=WIDE, dtype="float64", backend=backend)
        found = plan(x, x, v)
        torch.testing.assert_close(found, logit.softmax(-1) @ v, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_row_whose_weights_cancel_is_empty(backend: str) -> None:
    attention = attndsl.parse("attention a { mask causal score Q @ K norm linear }")["a"]
    plan = attndsl.compile(attention, length=2, heads=1, head_dim=1, backend=backend, training=True)
    q, k, v = (
        torch.tensor(x).view(1, 1, 2, 1).requires_grad_() for x in ([2.0, 1.0], [1.0, -1.0], [3.0, 5.0])
    )
    out, lse = plan(q, k, v, return_lse=True)
    assert out.flatten().tolist() == [3.0, 0.0]
    assert lse.flatten().tolist() == [pytest.approx(math.log(2)), -math.inf]
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [grad.flatten().tolist() for grad in grads] == [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_a_where_leaves_out_spoils_no_gradient(backend: str) -> None:
    """exp(300) is infinite in float32, and stands in no entry that is positive."""
    attention = attndsl.parse("attention a { mask causal score elu1(Q) @ elu1(K) norm linear }")["a"]
    plan = attndsl.compile(attention, length=5, heads=1, head_dim=4, backend=backend, training=True)
    q, k, v = (torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    given = [(300 * q).requires_grad_(), (300 * k).requires_grad_(), v.requires_grad_()]
    out = plan(*given)
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), given)))
