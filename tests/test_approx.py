"""`approx`: what stands in place of weights of pairs, against formulas written out for each head."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attndsl
from attndsl import portable
from attndsl.attention import Approx
from attndsl.conformance.approximations import CASES, TEXTS, Case, by_hand, check, nystrom
from attndsl.plugins import lowrank

BACKENDS = ("reference", "lowrank")
HEADS, KV_HEADS, WIDTH, V_WIDTH = 4, 2, 8, 6
PADDED = "inputs length : int[B]  mask { q, k : k < length }"
SCATTERED = "mask { q, k : k mod 3 != 1 }"


def bound(name: str, mask: str = "") -> attndsl.Bound:
    found = attndsl.parse(f"attention a {{ {mask} {TEXTS[name]} }}")["a"]
    assert isinstance(found, attndsl.Bound)
    return found


def planned(name: str, n: int, mask: str = "", **other: Any) -> attndsl.Plan:
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float64", "training": True}
    return attndsl.compile(bound(name, mask), **{"length": n, **sizes, **other})


def drawn(n: int, batch: int = 2, nq: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = (HEADS, n if nq is None else nq, WIDTH), (KV_HEADS, n, WIDTH), (KV_HEADS, n, V_WIDTH)
    return [
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def agree(got: Tensor, wanted: Tensor, leaves: list[Tensor], exact: float = 1e-11) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=exact)
    slope = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0), dtype=wanted.dtype)
    mine, theirs = (
        torch.autograd.grad(out, leaves, slope, retain_graph=True, allow_unused=True, materialize_grads=True)
        for out in (got, wanted)
    )
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_its_formula(case: Case, backend: str) -> None:
    assert check(backend, case) is None


def test_a_backend_that_knows_nothing_of_it_declines() -> None:
    assert {check(name, case) for name in ("sdpa", "torch") for case in CASES} == {
        f"it knows nothing of the approx `{kind}`" for kind in TEXTS
    }


@pytest.mark.parametrize(("name", "fault"), [("out", 1e-9), ("gradient", 1e-9), ("hidden", torch.nan)])
def test_a_fault_is_seen(name: str, fault: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what the fast one gives: of a row, of a gradient, of what is left out."""
    if name == "gradient":
        right = lowrank.nystrom_gradient
        wrong = lambda *given: (right(*given)[0] + fault, *right(*given)[1:])  # noqa: E731
        monkeypatch.setattr(lowrank, "nystrom_gradient", wrong)
    else:
        among = lowrank.among
        monkeypatch.setattr(lowrank, "among", lambda *given: among(*given) + fault)
    with pytest.raises(AssertionError, match="gradient of q" if name == "gradient" else "output"):
        check("lowrank", Case("nystrom", "padded", 31, 2, "float64"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_padding_is_what_the_tokens_alone_give(name: str, backend: str) -> None:
    """NaN behind the tokens too; a row without tokens is 0, and so are its gradients."""
    lengths, n = [19, 0, 29, 4, 19], 29
    q, k, v = leaves = drawn(n, 5)
    kept = [[*range(length)] for length in lengths]
    plan = planned(name, n, PADDED, batch=5, backend=backend)
    got = plan(q, k, v, length=torch.tensor(lengths))
    agree(got, by_hand(name, q, k, v, kept), leaves)
    assert not got[1].any()
    with torch.no_grad():
        alone = planned(name, 19, backend=backend)(*(x[:1, :, :19] for x in leaves))
        torch.testing.assert_close(got[:1, :, :19], alone, rtol=0, atol=1e-12)
        for row, length in enumerate(lengths):
            for x in (k, v):
                x[row, :, length:] = torch.nan
        torch.testing.assert_close(plan(q, k, v, length=torch.tensor(lengths)), got, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_keys_that_are_left_out_anywhere(name: str, backend: str) -> None:
    q, k, v = leaves = drawn(40)
    got = planned(name, 40, SCATTERED, backend=backend)(q, k, v)
    agree(got, by_hand(name, q, k, v, [[i for i in range(40) if i % 3 != 1]] * 2), leaves)


def test_heads_may_leave_out_other_keys() -> None:
    text = f"attention a {{ mask {{ q, k : k >= 3 * h }} {TEXTS['nystrom']} }}"
    plan = attndsl.compile(
        attndsl.parse(text)["a"], length=33, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH, dtype="float64"
    )
    assert plan.backend == "reference"
    assert plan.considered["lowrank"] == "its mask differs from head to head"
    q, k, v = drawn(33)
    for h, got in enumerate(plan(q, k, v).unbind(1)):
        for b in range(2):
            wanted = nystrom(q[b, h], k[b, h // 2], v[b, h // 2], left=[*range(3 * h, 33)])
            torch.testing.assert_close(got[b], wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shen_takes_queries_of_another_sequence(backend: str) -> None:
    text = "attention a { offset 0  approx shen }"
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float64", "training": True}
    plan = attndsl.compile(attndsl.parse(text)["a"], length=12, q_length=30, backend=backend, **sizes)
    for nq, n in ((30, 12), (7, 12), (30, 1), (0, 12), (30, 0)):
        q, k, v = leaves = drawn(n, nq=nq)
        agree(plan(q, k, v), by_hand("shen", q, k, v, [[*range(n)]] * 2), leaves)


def test_nystrom_takes_queries_and_keys_of_the_same_positions() -> None:
    said = "as many queries as keys, at the same positions"
    with pytest.raises(attndsl.AttnError, match=said):
        planned("nystrom", 12, q_length=5)
    plan = planned("nystrom", 12)
    q, k, v = drawn(12)
    for call in (
        {"q": q[:, :, :5]},
        {"q": q, "q_offset": 3, "n": 15},
        {"q": q, "q_positions": range(12)[::-1]},
    ):
        with pytest.raises(attndsl.AttnError, match=said):
            plan(call.pop("q"), k, v, **call)
    moved = plan(q, k, v, q_offset=7, k_offset=7)
    assert torch.equal(moved, plan(q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("mask", ["", PADDED])
def test_gradcheck(name: str, backend: str, mask: str) -> None:
    plan = planned(name, 9, mask, backend=backend)
    given = {"length": torch.tensor([9, 8])} if mask else {}
    assert torch.autograd.gradcheck(lambda q, k, v: plan(q, k, v, **given), drawn(9), fast_mode=True)


def test_as_many_landmarks_as_tokens_are_softmax_attention() -> None:
    q, k, v = drawn(6)
    full = attndsl.compile(
        attndsl.parse("attention a { mask full }")["a"], length=6, heads=HEADS, kv_heads=KV_HEADS,
        head_dim=WIDTH, dtype="float64", backend="reference",
    )  # fmt: skip
    for backend in BACKENDS:
        torch.testing.assert_close(
            planned("nystrom", 6, backend=backend)(q, k, v), full(q, k, v), rtol=0, atol=1e-14
        )


def test_more_iterations_are_nearer_to_the_pseudo_inverse() -> None:
    """And a full pseudo-inverse is nearer to the attention that is approximated, on keys in clusters."""
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(8, WIDTH, generator=generator, dtype=torch.float64).repeat_interleave(8, 0)
    noise = torch.randn(1, 1, 64, WIDTH, generator=generator, dtype=torch.float64)
    x = centre + 0.01 * noise
    v = torch.randn(1, 1, 64, WIDTH, generator=generator, dtype=torch.float64)
    exact = (x @ x.mT / WIDTH**0.5).softmax(3) @ v
    errors = []
    for iterations in (1, 4, 10, 20):
        text = f"attention a {{ approx nystrom(8, {iterations}) }}"
        plan = attndsl.compile(attndsl.parse(text)["a"], length=64, head_dim=WIDTH, dtype="float64")
        errors.append(float((plan(x, x, v) - exact).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("name", TEXTS)
def test_the_fast_one_is_taken(name: str) -> None:
    plan = planned(name, 512, dtype="float32")
    assert plan.backend == "lowrank"
    said = f"it knows nothing of the approx `{name}`"
    assert {plan.considered[other] for other in ("sdpa", "torch")} == {said}


@pytest.mark.parametrize("name", TEXTS)
def test_a_number_that_is_not_finite_is_not_hidden(name: str) -> None:
    for backend in BACKENDS:
        plan = planned(name, 20, backend=backend)
        for place in range(3):
            q, k, v = (x.detach().clone() for x in drawn(20))
            (q, k, v)[place][0, 0, 3, 1] = torch.nan
            lost = plan(q, k, v).isnan()
            assert not lost[1].any()
            assert not lost[0, 2:].any()
            if name == "nystrom":
                assert lost[0, 0].any(1).all()
            else:
                assert lost[0, 0].any(1).sum() == (1 if place == 0 else 20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_weights_are_what_each_value_is_multiplied_by(name: str, backend: str) -> None:
    q, k, v = leaves = drawn(20)
    plan = planned(name, 20, backend=backend)
    out, weights = plan(q, k, v, return_weights=True)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(out, plan(q, k, v), rtol=0, atol=1e-12)
    agree(out, by_hand(name, q, k, v, [[*range(20)]] * 2), leaves)
    if name == "nystrom":
        assert weights.min() < 0


@pytest.mark.parametrize("name", TEXTS)
def test_what_has_no_meaning_is_refused(name: str) -> None:
    plan = planned(name, 12)
    q, k, v = drawn(12)
    with pytest.raises(attndsl.AttnError, match=f"`{name}` has no log-sum-exp"):
        plan(q, k, v, return_lse=True)
    with pytest.raises(attndsl.AttnError, match=f"no sessions: `{name}` is computed of all tokens at once"):
        plan.session(1, 12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_graphs(name: str, backend: str) -> None:
    n = 25
    plan, lengths = planned(name, n, PADDED, backend=backend), torch.tensor([25, 11])
    leaves = drawn(n)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plan(q, k, v, length=lengths)

    eager, graph = run(*leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(eager, graph)
    grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (eager, graph))
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-14)


def test_export_and_other_ways_of_carrying_it(tmp_path: Any) -> None:
    plan = planned("nystrom", 25, training=False, backend="lowrank")
    inputs = tuple(x.detach() for x in drawn(25))
    wanted = plan(*inputs)
    path = tmp_path / "saved.pt2"
    torch.export.save(torch.export.export(plan.module(), inputs), path)
    assert torch.equal(torch.export.load(path).module()(*inputs), wanted)
    for again in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert torch.equal(again(*inputs), wanted)
    written = portable.write(plan.attention)
    assert portable.read(written.text, written.constants)[0] == plan.attention


def test_training_goes_down() -> None:
    torch.manual_seed(0)
    plan = planned("nystrom", 40, dtype="float32", kv_heads=HEADS)
    project = torch.nn.Linear(16, 3 * HEADS * WIDTH)
    optimiser = torch.optim.Adam(project.parameters(), 0.01)
    x, target = torch.randn(2, 40, 16), torch.randn(2, HEADS, 40, WIDTH)
    losses = []
    for _ in range(30):
        q, k, v = project(x).view(2, 40, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        loss = (plan(q, k, v) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_every_part_of_the_attention_travels() -> None:
    assert bound("nystrom").attention.approx == Approx("nystrom", 6, 4)
    assert bound("nystrom") != bound("shen")


def test_flops_are_those_of_its_products() -> None:
    n, half = 1000, 2 * (2 * 1000 + 6) * 6 * WIDTH
    plan = planned("nystrom", n, kv_heads=HEADS)
    q, k, v = (torch.randn(1, HEADS, n, WIDTH).double().requires_grad_() for _ in range(3))
    inverse = 2 * 4 * 4 * 6**3
    with FlopCounterMode(display=False) as counted:
        plan(q, k, v)
    assert counted.get_total_flops() == HEADS * (2 * half + inverse)


def test_nothing_is_told_of_pairs() -> None:
    found = attndsl.analyze(bound("nystrom"), length=1000, heads=2, head_dim=8)
    assert found.flops.forward == 2 * 2 * ((2 * 1000 + 6) * 6 * 16 + 4 * 4 * 6**3)
    assert set(found.reasons.values()) == {"`nystrom` has no weights of pairs"}
    assert "products alone" in str(found)
    assert "decode" not in str(found)
    plan = planned("nystrom", 1000)
    assert "tiles     none: `nystrom` has no weights of pairs" in str(plan)
    assert plan.block_masks is None
    with pytest.raises(attndsl.AttnError, match="no weights of pairs"):
        bound("shen").graph(8)
    # what is told of masks is which keys they leave
    assert bound("shen", SCATTERED).mask(9)[0, 0].tolist() == [k % 3 != 1 for k in range(9)]


@pytest.mark.parametrize("tokens", [lowrank.ALL, slice(0, 13), torch.tensor([0, 2, 3, 7, 9, 12, 14, 15, 19])])
def test_its_own_gradients_are_those_of_torch(tokens: slice | Tensor) -> None:
    """Which other devices than a CPU use."""
    approx, (q, k, v) = Approx("nystrom", 6, 4), drawn(20)
    out = lowrank.among(approx, tokens, q, k, v)
    back = torch.randn_like(out)
    with torch.no_grad():
        mine = lowrank.nystrom_gradient(approx, tokens, q, k, v, out, back)
    for x, y in zip(mine, torch.autograd.grad(out, (q, k, v), back), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_bound_tables_make_no_tiles() -> None:
    plan = planned("shen", 12, PADDED)
    lengths, (q, k, v) = torch.tensor([12, 5]), drawn(12)
    bound_plan = plan.bind(length=lengths)
    assert bound_plan.block_masks is None
    assert torch.equal(bound_plan(q, k, v), plan(q, k, v, length=lengths))
