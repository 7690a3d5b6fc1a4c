"""FlexAttention: the backend that hands tiles and scores to it, and `to_flex`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from shipped import NAMES, example
from thin import thin
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

import attndsl
from attndsl import conformance
from attndsl import expr as ir
from attndsl.bound import Bound
from attndsl.conformance import CASES, Case, check, declined
from attndsl.plugins import flex

PAIR = "the score computes `{}` at each pair"
DECLINED = {
    "it knows nothing of the clause `decay`": (
        "listed-by-row adaptive linear-windowed retention decay-power decay-table decay-of-vectors "
        "decay-to-nothing decay-sigmoid decay-relu multiset-of-tables random-decay"
    ),
    "it knows nothing of the clause `sink`": "listed-sink sink sink-number sink-H sink-BH",
    "it knows nothing of the clauses `count`, `decay`": "multiset threefold multisets-met multiset-sigmoid",
    "it knows nothing of the clauses `decay`, `sink`": "decay-twice groups-of-all-kinds",
    "it knows nothing of the clauses `count`, `decay`, `sink`": "sink-B-multiset",
    "it knows nothing of the norm `sigmoid`": "listed-sigmoid sigmoid",
    "it knows nothing of the norm `relu`": "relu odd-heads",
    "it knows nothing of the norm `linear`": "linear linear-listed linear-drawn",
    "it knows nothing of the norm `none`": "retention-of-some",
    PAIR.format("inner"): "elu-of-vectors waves-of-a-matrix learned-matrix indexer",
    PAIR.format("random"): "random-part",
    PAIR.format("sum"): "larger-products",
    PAIR.format("intable"): "int-BHn-top-in-a-score",
}


def test_what_the_backend_declines() -> None:
    found: dict[str, set[str]] = {}
    for case in {case.mechanism.name: case for case in CASES}.values():
        if reason := declined("flex", case):
            found.setdefault(reason, set()).add(case.mechanism.name)
        assert declined("flex", case, training=True) == (
            reason or "FlexAttention has no gradients on the CPU"
        )
    assert found == {reason: set(names.split()) for reason, names in DECLINED.items()}


TAKEN = [case for case in CASES if case.mechanism.name not in " ".join(DECLINED.values()).split()]


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch has for looking into mods: the same formula, and no tracing, which takes half a second."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flex._attend.cache_clear()
    yield
    flex._attend.cache_clear()


@pytest.mark.parametrize("case", thin(TAKEN[::2], 20), ids=str)
def test_the_backend_conforms(untraced: None, case: Case) -> None:
    assert check("flex", case) is None


@pytest.mark.slow
@pytest.mark.parametrize("case", TAKEN[7::40], ids=str)
def test_traced_it_conforms_too(case: Case) -> None:
    assert check("flex", case) is None


BY_GRADIENT = "alibi t5 u-HD-twice bias relative causal head-groups softcap shaw documents z-nn x-nD".split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which torch asks for, and hides
@pytest.mark.parametrize("name", BY_GRADIENT)
def test_gradients_are_those_of_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's formula has gradients on the CPU, and refuses them at its door."""
    supports = flex.Flex.supports
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex.Flex, "supports", lambda *args: supports(*args[:2], args[2].__class__(8, 8)))
    # the backward pass makes its memory inside vmap, where torch cannot fill it
    monkeypatch.setattr(conformance, "_poisoned_memory", nullcontext)
    case = next(case for case in TAKEN if case.mechanism.name == name and case.nq > 1)
    assert declined("flex", case, training=True) is None
    assert check("flex", case) is None


P = attndsl.backend.Problem(4096, 4096, heads=8, head_dim=64)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cuda", "training": True, "dtype": "bfloat16"}, None),
        ({"device": "cuda", "dtype": "float64"}, "compiled FlexAttention takes no float64"),
        ({"device": "cuda", "head_dim": 8}, "compiled FlexAttention takes 16 features or more"),
        (
            {"device": "cuda", "block_size": 64},
            "compiled FlexAttention takes tiles of a multiple of 128 tokens",
        ),
        ({"training": True}, "FlexAttention has no gradients on the CPU"),
    ],
)
def test_what_depends_on_the_problem(changes: dict[str, Any], reason: str | None) -> None:
    from dataclasses import replace

    attention = only("mask causal score alibi").attention
    assert flex.backend.supports(attention, replace(P, **changes)) == reason


def only(text: str) -> Bound:
    found = attndsl.parse(f"attention a {{ {text} }}")["a"]
    assert isinstance(found, Bound)
    return found


@pytest.mark.parametrize("n", [64, 4096])
@pytest.mark.parametrize("text", ["mask causal", "mask causal & last(64) score alibi score softcap(30.0)"])
def test_on_the_cpu_it_is_taken_by_its_name_alone(text: str, n: int) -> None:
    plan = attndsl.compile(only(text), length=n, heads=8)
    assert plan.backend != "flex"
    assert isinstance(plan.considered["flex"], float)
    assert list(plan.considered).index("flex") > 1


def qkv(n: int, heads: int = 2, width: int = 16) -> list[Tensor]:
    return [torch.randn(1, heads, n, width) for _ in range(3)]


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_it_is_compiled_where_a_graph_calls_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the dense formula, which torch falls back to where it may not trace."""
    counter, compiled = CompileCounter(), torch.compile  # type: ignore[no-untyped-call]
    monkeypatch.setattr(
        flex.torch, "compile", lambda f, backend, **more: compiled(f, backend=counter, **more)
    )
    flex._attend.cache_clear()
    attention = only("mask causal & last(9) score alibi")
    plan, wanted = (
        attndsl.compile(attention, length=48, heads=2, head_dim=16, backend=x) for x in ("flex", "reference")
    )
    q, k, v = qkv(48)
    torch.testing.assert_close(
        compiled(lambda *x: plan(*x) + 1, backend="eager", fullgraph=True)(q, k, v), wanted(q, k, v) + 1
    )
    assert counter.frame_count == 1
    with Watching():  # type: ignore[no-untyped-call]
        torch.testing.assert_close(plan(q, k, v), wanted(q, k, v))
    flex._attend.cache_clear()


def test_graphs_are_of_scores_and_shapes_alone() -> None:
    """Another constant or table is none, another mask none after the first, and lengths but few."""
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(flex_attention, backend=counting, fullgraph=True)

    def made(attention: Bound, n: int, **tables: Any) -> int:
        before, x = len(graphs), qkv(n)
        mods = attention.to_flex(n, 16, heads=2, **tables)
        plan = attndsl.compile(attention, length=n, heads=2, head_dim=16, backend="reference")
        torch.testing.assert_close(run(*x, *mods), plan(*x, **tables))
        return len(graphs) - before

    torch._dynamo.reset()
    program = attndsl.parse(
        "attention a(w = 20, c = 30.0) { inputs z : float[n]  mask causal & last(w)  score s + z[k]"
        "  score softcap(c) }"
    )
    attention = program["a"]
    rng = np.random.default_rng(0)
    z = {n: rng.standard_normal(n, np.float32) for n in range(64, 200, 8)}
    assert made(attention, 64, z=z[64]) == 1
    assert [made(attention(c=c), 64, z=-z[64]) for c in (5.0, 7.0, 50.0)] == [0, 0, 0]
    # another number of different tiles
    assert made(attention(w=3), 64, z=z[64]) == 1
    assert [made(attention(w=w, c=9.0), 64, z=z[64]) for w in (40, 64)] == [0, 0]
    assert made(attention, 96, z=z[96]) == 1
    # one at most of lengths that tiles do not divide
    later = [made(attention(w=w), n, z=z[n]) for n, w in ((104, 20), (128, 5), (160, 30), (136, 6))]
    assert later[0] <= 1
    assert later[1:] == [0, 0, 0]


N = 64


def drawn_tables(bound: Bound, heads: int) -> dict[str, Any]:
    """Its inputs at random; integers from 0 to 3, which every table has an entry for."""
    rng = np.random.default_rng(0)
    sizes = {"B": 2, "H": heads, "n": N, "nq": N, "D": 16}
    shapes = {t: [x if isinstance(x, int) else sizes.get(x, 20) for x in t.dims] for t in bound.inputs}
    drawn = {
        "float": lambda shape: rng.standard_normal(shape, np.float32),
        "bool": lambda shape: rng.random(shape) < 0.7,
        "int": lambda shape: np.sort(rng.integers(0, 4, shape)),
    }
    return {table.name: drawn[table.dtype](shape) for table, shape in shapes.items()}


def by_flex(bound: Bound) -> bool:
    """Whether FlexAttention computes it, from tables that come before q and k."""
    attention = bound.attention
    if attention.parts or attention.of_streams or attention.approximations or attention.selected:
        return False
    plain = all(g.norm.kind == "softmax" and (g.decay, g.norm.sink) == (None, None) for g in attention.groups)
    return plain and not any(
        {"Q", "K"} & g.score.free - {"inner"} for g in attention.groups if vectors(g.score)
    )


def vectors(score: ir.Expr) -> bool:
    return any(node.op == "inner" and {x.value for x in node.args} != {"Q", "K"} for node in ir.nodes(score))


SHIPPED = [
    (name, attention)
    for name in NAMES
    for attention in example(name).attentions
    if isinstance(found := example(name)[attention], Bound) and by_flex(found)
]


def test_the_law_is_about_scores_of_many_kinds() -> None:
    scored = {name for name, a in SHIPPED if example(name)[a].attention.groups[0].score is not ir.var("s")}
    assert len(SHIPPED) > 30
    assert scored >= {"alibi", "alphafold", "gemma2", "graphormer", "kerple", "sandwich", "t5"}


@pytest.mark.parametrize("name", thin(SHIPPED, 8), ids=".".join)
def test_what_is_written_reads_as_it_was(untraced: None, name: tuple[str, str]) -> None:
    """And FlexAttention gives of it what the attention does."""
    bound = example(name[0])[name[1]]
    heads = max(4, bound.attention.enough_heads())
    tables, sizes = drawn_tables(bound, heads), {"length": N, "heads": heads}
    plan = attndsl.compile(bound, **sizes, head_dim=16, block_size=16, backend="reference")
    learned = {t.name: plan.initial(t) + torch.rand_like(plan.initial(t)) for t in bound.learned}
    mods = plan.to_flex(learned=learned, **tables)
    if not learned:
        own = bound.to_flex(N, 16, heads=heads, head_dim=16, **tables)
        assert (own.score_mod and source(own)) == (mods.score_mod and source(mods))
    if mods.score_mod is None:
        again = attndsl.from_mask_mod(mods.block_mask.mask_mod, **sizes, batch=2)
    else:
        again = attndsl.from_score_mod(mods.score_mod, mask_mod=mods.block_mask.mask_mod, **sizes, batch=2)
    mine, read = bound.mask(N, heads=heads, **tables), again.mask(N, heads=heads)
    assert np.array_equal(*np.broadcast_arrays(mine, read))
    q, k, v = (torch.randn(2, heads, N, 16) for _ in range(3))
    wanted = plan(q, k, v, learned=learned, **tables)
    found = attndsl.compile(again, **sizes, head_dim=16, backend="reference")(q, k, v)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(flex_attention(q, k, v, *mods), wanted)


def source(mods: Any) -> str:
    return inspect.getsource(mods.score_mod)


def test_a_score_mod_can_be_read() -> None:
    mods = only("mask causal score alibi").to_flex(64, heads=2)
    assert source(mods) == (
        "    def score_mod(score, b, h, q_idx, kv_idx):\n"
        "        s = score.to(torch.float32)\n"
        "        t0 = number0[h]\n"
        "        t1 = query1[q_idx]\n"
        "        t2 = key2[kv_idx]\n"
        "        t3 = (t1 + t2)\n"
        "        t4 = torch.abs(t3)\n"
        "        t5 = (t0 * t4.to(torch.float32))\n"
        "        t6 = ((-1.0) * t5)\n"
        "        t7 = (s + t6)\n"
        "        return t7\n"
    )


def test_gradients_pass_through_a_score_mod() -> None:
    """To tables and parameters, as FlexAttention trains them on a GPU."""
    attention = only("inputs z : float[n] mask causal score s + z[k] * z[q]")
    z = torch.randn(8, requires_grad=True)
    mods = attention.to_flex(8, 8, z=z)
    assert mods.score_mod is not None
    places = [torch.tensor(i) for i in (0, 0, 3, 5)]
    mods.score_mod(torch.tensor(0.5), *places).backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad[[3, 5]], z.detach()[[5, 3]])


def test_each_look_up_has_a_tensor_of_its_own() -> None:
    """FlexAttention has one gradient for each, and refuses two look-ups."""
    attention = only("inputs z : float[5] mask causal score s + z[q * k mod 5] + z[q * q * k mod 5]")
    mods = attention.to_flex(8, 8, z=torch.randn(5, requires_grad=True))
    assert mods.score_mod is not None
    cells = inspect.getclosurevars(mods.score_mod).nonlocals
    tables = [x.data_ptr() for name, x in cells.items() if name.startswith("table")]
    assert len(tables) == len({*tables}) == 2


def test_a_parameter_of_a_module_is_trained_through_a_plan() -> None:
    text = "attention a(c = learn[H](1.0)) { mask causal score s * c }"
    module = attndsl.compile(attndsl.parse(text)["a"], length=8, heads=2, head_dim=8).module()
    mods = module.plan.to_flex(learned=dict(module.named_parameters()))
    assert mods.score_mod is not None
    mods.score_mod(torch.tensor(0.5), *(torch.tensor(i) for i in (0, 1, 3, 3))).backward()
    assert module.c.grad.tolist() == [0.0, 0.5]


FAR = """
attention a {
    inputs z : float[m]
    mask causal
    score where(q - k < 5, s + z[(q - k) * 1 + (q * k) mod 2], s)
}
"""


def test_a_look_up_that_no_pair_needs_may_be_beyond_its_table(untraced: None) -> None:
    attention, z = attndsl.parse(FAR)["a"], np.arange(6, dtype=np.float32)
    q, k, v = qkv(32, 1)
    plans = {x: attndsl.compile(attention, length=32, head_dim=16, backend=x) for x in ("flex", "reference")}
    torch.testing.assert_close(plans["flex"](q, k, v, z=z), plans["reference"](q, k, v, z=z))
    mods = attention.to_flex(32, 16, z=z)
    torch.testing.assert_close(flex_attention(q, k, v, *mods), plans["reference"](q, k, v, z=z))
    for refused in (lambda: plans["flex"](q, k, v, z=z[:4]), lambda: attention.to_flex(32, 16, z=z[:4])):
        with pytest.raises(attndsl.AttnError, match="`z` has 4 entries on axis 0, but entry 4 is read"):
            refused()


def test_groups_of_heads_have_their_own_masks_and_scores(untraced: None) -> None:
    text = "heads 0..1 { mask causal score alibi } else { mask causal & last(4) score softcap(2.0) }"
    q, k, v = qkv(24, 4)
    plan = attndsl.compile(only(text), length=24, heads=4, head_dim=16, backend="reference")
    torch.testing.assert_close(flex_attention(q, k, v, *plan.to_flex()), plan(q, k, v))


def test_a_truth_beyond_its_table_is_false(untraced: None) -> None:
    attention = only("inputs keep : bool[n, n] mask causal score where(keep[q - 3, k + 1], s, 2 * s)")
    keep, (q, k, v) = torch.ones(16, 16, dtype=torch.bool), qkv(16)
    plan = attndsl.compile(attention, length=16, heads=2, head_dim=16, backend="reference")
    mods = attention.to_flex(16, 16, heads=2, keep=keep)
    torch.testing.assert_close(flex_attention(q, k, v, *mods), plan(q, k, v, keep=keep))


def test_a_row_of_the_least_numbers_keeps_its_sum(untraced: None) -> None:
    """FlexAttention counts in powers of 2, and such a number by log2(e) is -inf."""
    attention = only("inputs z : float[n] mask causal score s + z[k]")
    z = torch.full((16,), torch.finfo(torch.float32).min)
    z[8:] = -torch.inf
    results = [
        attndsl.compile(attention, length=16, heads=2, head_dim=16, backend=x)(*qkv16, z=z, return_lse=True)
        for qkv16 in [qkv(16)]
        for x in ("flex", "reference")
    ]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert results[0][1].isfinite().all()
