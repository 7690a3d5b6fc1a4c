"""Every registered backend of ours through the conformance suite, and what it relies on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import attndsl
from attndsl import conformance
from attndsl import expr as ir
from attndsl.conformance import CASES, MECHANISMS, Case, check, declined, supported
from attndsl.meaning.pointwise import evaluate
from attndsl.plugins.torch import chunks, work
from attndsl.plugins.torch.parts import Strided, take_apart
from attndsl.scores import affine_in_s, by_distance, linear_in_tables
from attndsl.tiles.blockmask import TileGrid

s, q, k, h = map(ir.var, "sqkh")


NOTHING = "it knows nothing of the "
GAPS = {
    NOTHING + "clause `heads`": "head-groups odd-heads last-head",
    NOTHING + "clause `sink`": "sink sink-number sink-H sink-BH listed-sink",
    NOTHING + "clause `decay`": (
        "adaptive decay-power decay-table decay-of-vectors decay-to-nothing decay-sigmoid decay-relu "
        "multiset-of-tables random-decay listed-by-row linear-windowed retention"
    ),
    NOTHING + "clauses `count`, `decay`": "multiset threefold multisets-met multiset-sigmoid",
    NOTHING + "clauses `decay`, `sink`": "decay-twice",
    NOTHING + "clauses `count`, `decay`, `sink`": "sink-B-multiset",
    NOTHING + "clauses `decay`, `heads`, `sink`": "groups-of-all-kinds",
    NOTHING + "norm `sigmoid`": "sigmoid listed-sigmoid",
    NOTHING + "norm `relu`": "relu",
    NOTHING + "norm `linear`": "linear linear-listed linear-drawn",
    NOTHING + "norm `none`": "retention-of-some",
    "the score is not s * number + bias": (
        "softcap shaw da u-D u-HD-twice transformer-xl x-D-y-BD x-BHD-y-HD x-nD x-BnD x-BHnD "
        "x-B35D norms-of-vectors functions powers extremes several-clauses condition-on-content "
        "elu-of-vectors waves-of-a-matrix learned-matrix larger-products"
    ),
    "the score scales s by something that varies": (
        "in-a-part t-B t-BH t-H-learned z-Bnn int-BHn-top-in-a-score bool-B-bool-H conditions "
        "sizes cross-tables replaced-1e9"
    ),
}
"""Mechanisms that `sdpa` declines, by the reason that it gives."""
DECLINED: dict[str, dict[str, str]] = {
    "reference": {},
    "torch": {},
    "sdpa": {name: reason for reason, names in GAPS.items() for name in names.split()},
}
"""What each backend of ours declines, trained or not, and why. It does all else but for `linear`, which is of
few mechanisms."""


TRIED = [
    (backend, case)
    for i, case in enumerate(CASES)
    for backend in ("torch", ("reference", "sdpa")[(i + i // 4) % 2])
]
"""All draws of a mechanism where most is done, and on the others each in turn."""


def test_each_backend_meets_each_mechanism() -> None:
    assert {(backend, case.mechanism.name) for backend, case in TRIED} == {
        (backend, case.mechanism.name) for backend in DECLINED for case in CASES
    }


@pytest.mark.parametrize(("backend", "case"), TRIED, ids=str)
def test_conforms(backend: str, case: Case) -> None:
    known = DECLINED[backend].get(case.mechanism.name)
    assert {declined(backend, case, training) for training in (False, True)} == {known}
    assert check(backend, case) == known


@pytest.mark.parametrize("case", supported("linear"), ids=str)
def test_linear_conforms(case: Case) -> None:
    assert check("linear", case) is None


def test_linear_takes_what_is_in_features() -> None:
    assert {case.mechanism.name for case in supported("linear")} == {"linear", "retention"}


OPERATIONS = (
    "lookup count_of rank_of intable inset random exists add mul div floordiv mod pow min max abs where "
    "log2 isqrt floor exp log sqrt tanh sigmoid sin cos inner matvec sum concat and or not le lt eq"
)


def test_the_mechanisms_use_every_operation_and_shape_of_table() -> None:
    attentions = [attndsl.parse(mechanism.text)["a"].attention for mechanism in MECHANISMS]
    groups = [group for attention in attentions for group in attention.groups]
    whole = [e for g in groups for e in (g.relation.mask, g.score, g.decay, g.norm.sink) if e is not None]
    assert {node.op for e in whole for node in ir.nodes(e)} >= set(OPERATIONS.split())
    leads = {
        (table.dtype, table.learned, table.dims[-1:] == ("D",), "B" in table.dims, "H" in table.dims)
        for e in whole
        for table in e.tables
    }
    either = (False, True)
    assert leads >= {("float", False, vector, b, h) for vector in either for b in either for h in either}
    assert leads >= {("float", True, vector, False, h) for vector in either for h in either}
    assert leads >= {(dtype, False, False, b, h) for dtype in ("int", "bool") for b in either for h in either}


@pytest.mark.parametrize(
    ("odd", "name", "fault", "message"),
    [
        ("k", "out", torch.nan_to_num, "hides a NaN"),
        ("k", "gradient of k", torch.nan_to_num, "hides a NaN"),
        ("k", "gradient of q", lambda x: x * torch.nan, "is NaN in"),
        ("unreached", "gradient of v", lambda x: x + torch.nan, "is NaN in"),
        ("", "out", lambda x: x * (1 + 1e-4), "error"),
        ("", "lse", lambda x: x + 1e-4, "error"),
        ("", "gradient of q", lambda x: x * (1 + 1e-4), "error"),
    ],
)
def test_a_fault_is_seen(
    odd: str, name: str, fault: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = conformance._run
    monkeypatch.setattr(conformance, "_run", lambda *args: (found := run(*args)) | {name: fault(found[name])})
    case = next(
        c
        for c in CASES
        if (c.mechanism.name, c.dtype, c.odd) == ("window", "bfloat16" if odd == "k" else "float32", odd)
    )
    with pytest.raises(AssertionError, match=message):
        check("reference", case)


def test_what_is_declined_is_a_mechanism() -> None:
    names = {mechanism.name for mechanism in MECHANISMS}
    assert all(names >= set(known) for known in DECLINED.values())


@pytest.mark.parametrize("case", CASES[::15], ids=str)
def test_conforms_in_small_steps(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences are cut as often as long ones."""
    for name, most in {"Q_MAX": 8, "K_MAX": 12, "FORMED": 2**10, "TRANSIENT": 2**12}.items():
        monkeypatch.setattr(chunks, name, most)
    monkeypatch.setattr(work, "KEPT", 2**8)
    assert check("torch", case) is None


MASKS = (
    "radius(37)",
    "causal",
    "causal & last(50)",
    "radius(20) | global([0, 133])",
    "band(-60 .. 60, step = 4)",
    "block(32)",
    "strided(16)",
    "fixed(16, 4)",
    "full",
    "none",
    "{ q, k : q * k mod 7 == 3 }",
    "{ q, k : |q + k - 299| < 20 }",
    "blocks(32, radius(1) | global([0]) | random(1))",
)


def pairs_of(grid: TileGrid, unit: int) -> NDArray[np.int64]:
    """How many parts hold each pair."""
    times = np.zeros((grid.nq, grid.n), np.int64)
    for part in take_apart(grid, unit):
        if isinstance(part, Strided):
            for c in range(part.count):
                top, left = part.q0 + c * part.q_step, part.k0 + c * part.k_step
                assert top + part.q_len <= grid.nq
                assert left + part.k_len <= grid.n
                here = times[top : top + part.q_len, left : left + part.k_len]
                here += 1 if part.mask is None else part.mask
            continue
        full = np.full(part.cols.shape, len(part.masks) - 1)
        contents = full if part.contents is None else part.contents
        for row, cols, kinds in zip(part.rows, part.cols, contents, strict=True):
            for col, kind in zip(cols, kinds, strict=True):
                here = times[row : row + part.q_len, col * part.block : (col + 1) * part.block]
                assert not part.masks[kind][:, here.shape[1] :].any()
                here += part.masks[kind][: part.q_len, : here.shape[1]]
    return times


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MASKS), st.sampled_from([(300, 300), (256, 256), (13, 300), (0, 7), (1, 90)]), st.data()
)
def test_parts_hold_each_live_pair_once(mask: str, sizes: tuple[int, int], data: st.DataObject) -> None:
    nq, n = sizes
    block = data.draw(st.sampled_from([8, 16, 64, 128]))
    unit = data.draw(st.sampled_from([8, block]))
    attention = attndsl.parse(f"attention a {{ mask {mask} }}")["a"]
    grid = attention.block_mask(n, block, q_length=nq).grids[0]
    assert np.array_equal(pairs_of(grid, unit), grid.to_dense())


def test_a_band_is_one_part_on_views() -> None:
    grid = attndsl.parse("attention a { mask radius(37) }")["a"].block_mask(1024, 16).grids[0]
    shared = [part for part in take_apart(grid, 8) if isinstance(part, Strided) and part.count > 1]
    assert [(part.q_step, part.k_step, part.k_len) for part in shared] == [(8, 8, 82)]


def test_a_triangle_is_squares_on_views() -> None:
    grid = attndsl.parse("attention a { mask causal }")["a"].block_mask(160, 16).grids[0]
    found = [part for part in take_apart(grid, 16) if isinstance(part, Strided) and part.mask is None]
    squares = sorted((part.k_len, part.q_len, part.count) for part in found)
    # below the first, row i of 0 .. 8 has i more columns: a square for each digit 1 of i
    assert squares == [(16, 16, 4), (16, 144, 1), (32, 32, 2), (64, 64, 1), (128, 16, 1)]


@pytest.mark.parametrize("backend", ["reference", "sdpa", "torch"])
def test_a_compiled_module_equals_the_eager_one(backend: str) -> None:
    attention = attndsl.parse(
        "attention a(t = learn[13](0.1)) { mask causal & last(20) score relative(t, 6) }"
    )["a"]
    plan = attndsl.compile(attention, length=50, heads=2, head_dim=8, backend=backend, training=True)
    module = plan.module()
    inputs = [torch.randn(1, 2, 50, 8, requires_grad=True) for _ in range(3)]
    leaves = [*inputs, *module.parameters()]
    results = []
    for run in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        out = run(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_an_out_of_range_look_up_in_a_score_is_an_error() -> None:
    attention = attndsl.parse("attention a { inputs z : float[m] mask causal score s + z[q - k] }")["a"]
    plan = attndsl.compile(attention, length=8, heads=1, head_dim=4, backend="torch")
    x = torch.randn(1, 1, 8, 4)
    with pytest.raises(attndsl.AttnError, match="but entry 7 is read"):
        plan(x, x, x, z=torch.zeros(7))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_draw_over_a_table_is_counted(backend: str) -> None:
    text = "attention a { inputs keep : bool[B, n]  mask causal + shift(2, random(1, of = columns(keep))) }"
    attention = attndsl.parse(text)["a"]
    rng = np.random.default_rng(0)
    keep = rng.random((2, 12)) < 0.5
    queries, keys, values = (torch.from_numpy(rng.normal(size=(2, 2, 12, 4))) for _ in range(3))
    plan = attndsl.compile(
        attention, batch=2, length=12, heads=2, head_dim=4, dtype="float64", backend=backend
    )
    count = attention.attention.groups[0].relation.count
    assert count is not None
    position = np.arange(12)
    rows = [ir.substitute(count, {"n": ir.const(12), "b": ir.const(b)}) for b in range(2)]
    times = torch.from_numpy(
        np.stack([evaluate(row, position[:, None], position, {"keep": keep}) for row in rows])
    )
    assert times.max() == 2
    weight = times[:, None] * torch.exp(queries @ keys.transpose(-1, -2) / 2)
    expected = weight / weight.sum(-1, keepdim=True) @ values
    torch.testing.assert_close(plan(queries, keys, values, keep=torch.from_numpy(keep)), expected)


@pytest.mark.parametrize(
    ("score", "slope", "rest"),
    [
        (s, ir.const(1.0), ir.const(0.0)),
        (ir.sub(s, ir.absolute(ir.sub(q, k))), ir.const(1.0), ir.neg(ir.absolute(ir.sub(q, k)))),
        (ir.mul(ir.const(2.0), ir.add(s, h)), ir.const(2.0), ir.mul(ir.const(2.0), h)),
    ],
)
def test_affine_scores_are_recognised(score: ir.Expr, slope: ir.Expr, rest: ir.Expr) -> None:
    found = affine_in_s(score)
    assert found is not None
    assert ir.number(found[0]) == ir.number(slope)
    assert repr(found[1]) == repr(rest) or ir.number(found[1]) == ir.number(rest) == 0


def test_other_scores_are_not_affine() -> None:
    assert affine_in_s(ir.call("tanh", s)) is None
    assert affine_in_s(ir.mul(s, s)) is None


def test_what_depends_on_the_distance_alone() -> None:
    assert by_distance(ir.where(ir.lt(k, q), ir.absolute(ir.sub(q, k)), ir.ZERO)) is not None
    assert by_distance(ir.add(q, k)) is None


def test_linear_in_tables() -> None:
    q, k, h = ir.var("q"), ir.var("k"), ir.var("h")
    b, path = ir.Table("b", "float", ("H", 8)), ir.Table("path", "int", ("n",))
    read = ir.lookup(b, h, ir.sub(q, k))
    score = ir.add(ir.mul(ir.const(0.5), ir.mul(read, ir.sub(k, q))), ir.div(read, ir.const(2.0)), k)
    found = linear_in_tables(score)
    assert found is not None
    rest, terms = found
    assert rest is k
    assert [of for _, of in terms] == [read, read]
    values = {"q": ir.const(9), "k": ir.const(3), "h": ir.ZERO}
    assert [ir.number(ir.substitute(factor, values)) for factor, _ in terms] == [-3.0, 0.5]
    for other in (
        ir.mul(read, read),
        ir.call("tanh", read),
        ir.lookup(b, h, ir.lookup(path, k)),
        ir.mul(q, ir.mul(k, read)),
    ):
        assert linear_in_tables(other) is None
