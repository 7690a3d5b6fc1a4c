"""The backend `triton`: kernels that are interpreted and compiled ahead, and their layouts."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import interpreted
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import attndsl
from attndsl import conformance
from attndsl import expr as ir
from attndsl.backend import Problem
from attndsl.emit.leaves import Leaf
from attndsl.errors import AttnError
from attndsl.execution import operator
from attndsl.execution.leaf_values import LeafValues
from attndsl.plugins import triton as plugin
from attndsl.plugins.triton import ahead, configs, kernel, launch
from attndsl.plugins.triton.layout import Layout, Stack, Units
from attndsl.tiles import residues
from attndsl.tiles.blockmask import Rows, TileGrid

INSTALLED = find_spec("triton") is not None
installed = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
FAST = ("causal", "distances", "look-up", "steps", "pages: window", "elsewhere sorted shifted")
"""Probes of `make test`: forward and backward, full tiles and partial ones, all kinds of leaves, pages, and
sorted entries on a device that nobody waits for."""
SORTED = ("strided", "dilated", "longnet", "shifted", "strided sink", "strided far")
PARTS = 8
"""Processes for the conformance suite."""
CASES = [str(case) for case in interpreted.small_cases(24)]


def ran(kind: str, *names: str) -> dict[str, str | None]:
    """What a process of its own says of each; that it died where it says nothing more."""
    command = [sys.executable, interpreted.__file__, kind, *names]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    said = dict(json.loads(line) for line in done.stdout.splitlines())
    return {name: said.get(name, "it died: " + done.stderr[-2000:]) for name in names}


@installed
def test_kernels_are_right_interpreted() -> None:
    assert ran("probes", *FAST) == dict.fromkeys(FAST)


@installed
@pytest.mark.slow
def test_kernels_are_right_interpreted_on_all_else() -> None:
    rest = [name for name in (*interpreted.PROBES, *interpreted.PAGED) if name not in FAST]
    rest += [f"sorted {name}" for name in SORTED]
    rest += [
        f"elsewhere {name}" for name in ("distances", "decay", "groups", "negative sums", "far with a sink")
    ]
    rest += [f"elsewhere sorted {name}" for name in ("strided", "strided far")]
    assert ran("probes", *rest) == dict.fromkeys(rest)


@installed
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("unread", "distances", "sink"), marks=pytest.mark.slow),
        pytest.param(
            ("causal", "alibi", "groups", "look-up", "vectors", "per head"), marks=pytest.mark.whole
        ),
    ],
    ids=["some", "others"],
)
def test_what_is_not_finite_is_nowhere_hidden(names: tuple[str, ...]) -> None:
    """Where nobody looks at results it goes where kernels take it."""
    assert ran("spread", *names) == dict.fromkeys(names)


def conform(cases: list[str]) -> None:
    found = ran("conformance", *cases)
    wrong = {name: said for name, said in found.items() if said}
    # what at each pair is no number of its own
    declined = {name for name, said in wrong.items() if said.startswith("declined: the score computes")}
    assert {name: said for name, said in wrong.items() if name not in declined} == {}
    assert len(declined) < len(cases) / 5


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_conforms_interpreted() -> None:
    conform(CASES)


@installed
@pytest.mark.whole
@pytest.mark.timeout(0)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("part", range(PARTS))
def test_conforms_interpreted_as_a_whole(dtype: str, part: int) -> None:
    """Numbers of 16 bits are cut by the interpreter, and not rounded."""
    conform([str(case) for case in conformance.CASES if case.dtype == dtype][part::PARTS])


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_changes_of_one_token_are_seen() -> None:
    script = str(Path(interpreted.__file__).with_name("triton_mutations.py"))
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) > 12, done.stderr
    assert [number for number, what in said if what is None] == []


@installed
@pytest.mark.slow
def test_batch_rows_may_lie_far_apart() -> None:
    assert ran("apart", "rectangle") == {"rectangle": None}


@installed
@pytest.mark.slow
def test_halves() -> None:
    assert ran("halves", "float16", "bfloat16") == {"float16": None, "bfloat16": None}


@installed
@pytest.mark.slow
def test_a_pair_without_a_value_is_an_error() -> None:
    beyond, negative = "mask causal score s + z[q - k]", "mask causal & last(30) decay 0.5 - z[0]"
    found = ran("refused", beyond, negative)
    assert "entry" in str(found[beyond])
    assert found[negative] == "a decay is negative at a related pair"


MASKS = (
    "causal", "radius(37)", "radius(10) | global([0, 77])", "none", "full", "strided(16)", "block(32)",
    "band(-90 .. -40) | band(-30 .. 60)", "{ q, k : q * k mod 7 == 3 }",
)  # fmt: skip


def grid_of(mask: str, nq: int, n: int, block: int) -> TileGrid:
    return attndsl.parse(f"attention a {{ mask {mask} }}")["a"].block_mask(n, block, q_length=nq).grids[0]


def times(layout: Layout, height: int) -> NDArray[np.int64]:
    """How often each pair is in a tile of the layout."""
    found = np.zeros((layout.lines * height, layout.across * layout.width), np.int64)
    for i in range(layout.lines):
        here = found[i * height : (i + 1) * height]
        for run in range(layout.run_ptr[i], layout.run_ptr[i + 1]):
            assert layout.run_start[run] < layout.run_end[run]
            here[:, layout.run_start[run] * layout.width : layout.run_end[run] * layout.width] += 1
        for part in range(layout.part_ptr[i], layout.part_ptr[i + 1]):
            bits = layout.words[layout.part_content[part]].view(np.uint8)
            inside = np.unpackbits(bits, axis=1, count=layout.width, bitorder="little")
            assert 0 < inside.sum() < inside.size
            at = layout.part_at[part] * layout.width
            here[:, at : at + layout.width] += inside
    return found


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(MASKS), st.sampled_from([(300, 300), (256, 256), (70, 133), (1, 90)]), st.data())
def test_layouts_hold_each_live_pair_once(mask: str, sizes: tuple[int, int], data: st.DataObject) -> None:
    """By rows and by columns; no full tile sticks out of the matrix."""
    (nq, n), block = sizes, data.draw(st.sampled_from([32, 64, 128]))
    rows, columns = (data.draw(st.sampled_from([x for x in (16, 32, 64, 128) if x <= block])) for _ in "rc")
    grid = grid_of(mask, nq, n, block)
    layout = Layout.of(grid, rows, columns)
    found = times(layout, rows)
    assert np.array_equal(found[:nq, :n], grid.to_dense())
    assert found.sum() == grid.nnz
    turned = layout.transposed()
    assert np.array_equal(times(turned, columns), found.T)
    back = turned.transposed()
    for name in ("run_ptr", "run_start", "run_end", "part_ptr", "part_at", "part_content", "words"):
        assert np.array_equal(getattr(back, name), getattr(layout, name)), name
    assert (layout.lines, layout.width) == (back.lines, back.width)


def test_runs_that_touch_are_one() -> None:
    layout = Layout.of(grid_of("full", 128, 256, 64), 32, 16)
    assert layout.run_start.tolist() == [0] * 4
    assert layout.run_end.tolist() == [16] * 4
    assert not len(layout.part_at)


def test_long_lines_come_first() -> None:
    layout = Layout.of(grid_of("causal", 256, 256, 64), 64, 64)
    assert layout.order.tolist() == [3, 2, 1, 0]
    assert sorted(layout.transposed().order.tolist()) == [0, 1, 2, 3]
    assert layout.work.tolist() == [1, 2, 3, 4]


def test_a_stack_is_its_layouts_end_to_end() -> None:
    layouts = [Layout.of(grid_of(mask, 128, 128, 64), 32, 32) for mask in ("causal", "none", "radius(20)")]
    stack = Stack.of(layouts)
    for j, layout in enumerate(layouts):
        for i in range(layout.lines):
            line = j * 4 + i
            here, there = slice(*layout.run_ptr[i : i + 2]), slice(*stack.run_ptr[line : line + 2])
            assert np.array_equal(layout.run_end[here], stack.run_end[there])
            here, there = slice(*layout.part_ptr[i : i + 2]), slice(*stack.part_ptr[line : line + 2])
            contents = stack.words[stack.part_content[there]]
            assert np.array_equal(layout.words[layout.part_content[here]], contents)
    assert stack.order.tolist() == [x for layout in layouts for x in layout.order.tolist()]


@pytest.mark.parametrize("nq", [1, 3])
def test_units_hold_each_live_pair_once(nq: int) -> None:
    masks: list[Rows] = []
    for mask in ("causal", "causal & last(70) | global([0..3])", "none", "band(-20 .. 5, step = 4)"):
        rows = attndsl.parse(f"attention a {{ mask {mask} }}")["a"].block_mask(200, 64, q_length=nq).rows
        assert rows
        masks += rows
    units = Units.of(masks, 32)
    for mask, (first, full, many, content) in zip(masks, units.heads.tolist(), strict=True):
        found = np.zeros((nq, 224), np.int64)
        for i in range(many):
            at = units.at[first + i] * 32
            if i < full:
                found[:, at : at + 32] += 1
            else:
                bits = units.words[content + i - full].view(np.uint8)
                inside = np.unpackbits(bits, axis=1, bitorder="little")
                assert 0 < inside.sum() < inside.size
                found[:, at : at + 32] += inside
        assert np.array_equal(found[:, :200], mask.grid.to_dense())


P = Problem(256, 256, heads=4, kv_heads=2, head_dim=64, dtype="bfloat16", device="cuda", training=True)
LM = attndsl.parse("attention a { mask causal & last(100) }")["a"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As if there were one with this capability: plans are made, and nothing can run."""

    def install(capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3") -> None:
        monkeypatch.setattr(configs, "installed", lambda: True)
        monkeypatch.setattr(configs, "interpreted", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)

    return install


def test_plans_on_a_gpu_take_it(gpu: Any) -> None:
    """By the peak of its data sheet, of pairs of tiles: two products forward, and seven backward."""
    gpu()
    plan = attndsl.compile(LM, **{**vars(P), "length": 4096, "q_length": 4096})
    assert plan.backend == "triton"
    # every row of tiles has two, but the first
    seconds = 4 * (2 * 32 - 1) * 128**2 * 9 * 2 * 64 / 989.5e12
    assert plan.considered["triton"] == pytest.approx(seconds)
    said = (
        f"-> triton     {seconds:.3g} s predicted, not fitted; compiled and interpreted, not yet run on a GPU"
    )
    assert said in str(plan)


def test_all_pairs_on_a_gpu_are_for_its_own_library(gpu: Any) -> None:
    gpu()
    full = attndsl.parse("attention a { mask full }")["a"]
    assert attndsl.compile(full, **{**vars(P), "training": False}).backend == "sdpa"


def test_without_a_data_sheet_no_seconds_are_told(gpu: Any) -> None:
    gpu(name="NVIDIA L4")
    plan = attndsl.compile(LM, **vars(P))
    assert plan.backend == "triton"
    assert "-> triton     cost unknown; compiled and interpreted" in str(plan)


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        ({"dtype": "float64"}, (9, 0), "float64"),
        ({"dtype": "float32"}, (8, 6), "nothing was compiled for vectors of 64 numbers of float32 on sm_86"),
        ({"head_dim": 512}, (9, 0), "nothing was compiled for vectors of 512 numbers on sm_90"),
        ({"block_size": 24}, (9, 0), "tiles of 24 tokens"),
        ({}, (7, 5), "nothing was compiled for sm_75"),
        ({"device": "cpu"}, (9, 0), "its kernels run on GPUs"),
    ],
)
def test_what_it_has_no_kernels_for_is_declined(
    change: Mapping[str, Any], capability: tuple[int, int], reason: str, gpu: Any
) -> None:
    gpu(capability)
    asked = {**vars(P), **change}
    with pytest.raises(AttnError, match="the backend `triton` declines") as error:
        attndsl.compile(LM, **asked, backend="triton")
    assert reason in str(error.value)
    assert attndsl.compile(LM, **asked).backend != "triton"


def test_plans_tell_the_reason_of_the_table(gpu: Any) -> None:
    _, declined = ahead.read()
    reason = declined[ahead.Cell("sm_90", "forward", "every", "float32", "tf32x3", 256)]
    assert reason == (
        "vectors of 256 numbers of float32 do not fit its registers on sm_90 to full precision: "
        "torch.set_float32_matmul_precision('high') asks for less"
    )
    gpu()
    plan = attndsl.compile(LM, **{**vars(P), "dtype": "float32", "head_dim": 256})
    assert plan.rejected["triton"] == reason
    assert reason in str(plan)


def test_float32_follows_the_precision_of_torch(gpu: Any) -> None:
    gpu()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        asked = {**vars(P), "dtype": "float32", "head_dim": 256}
        assert attndsl.compile(LM, **asked).backend == "triton"
    finally:
        torch.set_float32_matmul_precision(before)


def test_without_triton_or_a_gpu_others_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "installed", lambda: False)
    assert plugin.backend.supports(LM.attention, P) == "triton is not installed"
    monkeypatch.setattr(configs, "installed", lambda: True)
    monkeypatch.setattr(configs, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plugin.backend.supports(LM.attention, P) == "there is no GPU"


def test_weights_that_halves_may_not_hold_are_declined(gpu: Any) -> None:
    gpu()
    attention = attndsl.parse("attention a { mask causal norm relu }")["a"]
    with pytest.raises(AttnError, match="weights of the norm `relu` may exceed what float16 holds"):
        attndsl.compile(attention, **{**vars(P), "dtype": "float16"}, backend="triton")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What kernels are started with, which are not."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def start(kernel: Any, programs: Any, device: Any, **arguments: Any) -> None:
        found.append((kernel, arguments))
        for name in ("OUT", "LSE", "GQ", "GK", "GV"):
            if name in arguments:
                arguments[name].zero_()

    for module in (launch, kernel):
        monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(plugin, "declined", lambda problem: None)
    return found


def keys_of(launches: list[tuple[Any, dict[str, Any]]]) -> list[str]:
    """What Triton compiles a kernel anew for."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import compute_cache_key, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    keys = []
    for function, arguments in launches:
        bind = create_function_from_signature(function.signature, function.params, backend)
        _, specialization, options = bind(**arguments, debug=False, instrumentation_mode="")
        keys.append(function.__name__ + compute_cache_key({}, specialization, options))
    return keys


def planned(text: str, n: int, heads: int = 2) -> Any:
    return attndsl.compile(
        attndsl.parse(text)["a"], length=n, heads=heads, head_dim=64, dtype="bfloat16", training=True,
        backend="triton",
    )  # fmt: skip


def backward(plan: Any, batch: int = 1, **tables: Any) -> None:
    shape = batch, plan.problem.heads, plan.problem.length, 64
    q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    plan(q, k, v, **tables).sum().backward()


def decoded_in_pages(text: str, size: int) -> None:
    plan = attndsl.compile(
        attndsl.parse(text)["a"], length=256, heads=8, kv_heads=2, head_dim=64, dtype="bfloat16",
        backend="triton",
    )  # fmt: skip
    q, pool = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((1, 8, 1, 64), (2, 16, size, 2, 64)))
    plan.paged(q, pool.unbind(), torch.arange(16, dtype=torch.int32)[None], torch.tensor([250]))


def trained(text: str, n: int, heads: int = 2, batch: int = 1) -> None:
    backward(planned(text, n, heads), batch)


@installed
def test_masks_lengths_and_constants_are_data(launches: list[tuple[Any, dict[str, Any]]]) -> None:
    """Another compiles nothing anew."""
    text = "attention a {{ mask {} score {} * tanh(s / {}) - {} * |q - k| }}"
    trained(text.format("causal", 2.5, 2.5, 0.25), 256)
    first = keys_of(launches)
    launches.clear()
    for mask, n, heads, batch in (
        ("radius(30)", 256, 2, 1),
        ("causal & last(9)", 200, 4, 3),
        ("none", 77, 2, 2),
    ):
        trained(text.format(mask, 3.5, 3.5, 0.75), n, heads, batch)
        assert keys_of(launches) == first, mask
        launches.clear()
    trained(text.format("causal", 2.5, 2.5, 0.25).replace("tanh", "sin"), 256)
    assert keys_of(launches) != first


@installed
def test_what_is_compiled_ahead_is_what_runs(launches: list[tuple[Any, dict[str, Any]]], gpu: Any) -> None:
    """The same arguments, with the same types."""
    trained(ahead.SCORES["alibi"], 256)
    decoded_in_pages(ahead.SCORES["alibi"], ahead.PAGE)
    seen = ["forward", "backward_queries", "backward_keys", "decode_paged"]
    # parts of a row are merged in another dtype where a backward pass follows
    ran = [launch for launch in launches if launch[0].__name__ != "merge"]
    assert [function.__name__ for function, _ in ran] == [name.removesuffix("_paged") for name in seen]
    for name, (function, arguments) in zip(seen, ran, strict=True):
        cell = ahead.Cell("sm_90", name, "alibi", "bfloat16", "half", 64)
        signature, constants, _ = ahead.signature(cell, function)
        assert set(signature) == {name for name in arguments if name in function.arg_names}
        for name, kind in signature.items():
            value = arguments[name]
            if kind == "constexpr":
                same = (
                    value.__name__ == constants[name].__name__
                    if callable(value)
                    else value == constants[name]
                )
                assert same or name in ("BM", "BN"), name
            elif kind[0] == "*":
                dtype = {
                    "*bf16": torch.bfloat16,
                    "*fp32": torch.float32,
                    "*i64": torch.int64,
                    "*i32": torch.int32,
                }
                assert value.dtype == dtype[kind], name


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("score", "ordered"),
    [("s + t[clamp(q - k, 0, 5)]", False), ("s + t[q mod 3 + k mod 3]", False), ("s + t[q mod 6]", True),
     ("s - slope * |q - k|", True)],
)  # fmt: skip
def test_what_has_no_order_is_declined_where_torch_asks_for_one(
    score: str, ordered: bool, gpu: Any, deterministic: None
) -> None:
    """In training, and of tables that are learned or given."""
    gpu()
    text = f"attention a(t = learn[H, 6](0.1), slope = learn[H](0.1)) {{ mask causal score {score} }}"
    attention = attndsl.parse(text)["a"].attention
    reason = plugin.backend.supports(attention, P)
    assert (reason is None) == ordered
    assert ordered or "no fixed order, and torch.use_deterministic_algorithms" in str(reason)
    assert plugin.backend.supports(attention, replace(P, training=False)) is None


@installed
def test_a_backward_pass_without_an_order_is_refused_or_told(
    launches: list[tuple[Any, dict[str, Any]]], gpu: Any, request: pytest.FixtureRequest
) -> None:
    gpu()
    text = "attention a {{ inputs t : float[6] mask causal score s + t[{}] }}"
    plans = [planned(text.format(at), 64) for at in ("clamp(q - k, 0, 5)", "q mod 6")]
    request.getfixturevalue("deterministic")
    t = torch.ones(6, requires_grad=True)
    with pytest.raises(AttnError, match="no fixed order"):
        backward(plans[0], t=t)
    backward(plans[0], t=t.detach())
    backward(plans[1], t=t)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="no fixed order"):
        backward(plans[0], t=t)


class Sent(TorchDispatchMode):
    """What goes from the CPU to another device, but for single numbers, which go with the command."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = isinstance(result, torch.Tensor) and result.is_meta
        if there and any(not x.is_meta and (x.dim() or "copy" in str(func)) for x in tensors):
            self.found.append(str(func))
        return result


WAITING = {
    "plain": "mask causal",
    "scores": "mask causal score alibi score softcap(3.0)",
    "integers": "mask causal score s + [1, 2, 3][k mod 3] * (|q - k| mod 7)",
    "sink": "mask causal norm softmax(sink = x)",
    "distances": "mask causal & last(9) score s + y[clamp(q - k, -5, 5) + 5] * q",
    "no sum of tables": "mask causal score s + where(q in [3, 5..9], exp(x), 0.0) + exp(y[q mod 11])",
    "vectors": "mask causal score s + (K @ u + Q @ u) / 4",
    "decay": "mask radius(40) decay max(3 * x - |q - k| / 30, 0.0)",
    "linear": "mask causal norm linear",
    "groups": "heads 0 { mask causal } else { mask radius(9) norm sigmoid }",
    "unread": "mask { q, k : k <= q and k mod 3 == 0 }",
    "sorted": "mask strided(16)",
    "sorted scores": "mask dilate(4, causal & last(20)) score s - x * |q - k|",
}


@installed
@pytest.mark.parametrize("name", WAITING)
def test_nobody_waits_for_a_device(
    name: str, launches: list[tuple[Any, dict[str, Any]]], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device `meta` has no numbers to be looked at: what would wait for them fails. What a plan needs
    there is sent in the first call."""
    gpu()
    monkeypatch.setattr(operator, "_full_precision", lambda device: nullcontext())
    for limit, value in (("FEW", 0), ("WORTH", 1.0)):
        monkeypatch.setattr(residues, limit, value)
    parameters = "x = learn[H](0.3), y = learn[H, 11](0.1), u = learn[H, D](0.1)"
    attention = attndsl.parse(f"attention a({parameters}) {{ {WAITING[name]} }}")["a"]
    lowered = attndsl.compile(
        attention, length=180, heads=2, head_dim=64, dtype="bfloat16", block_size=32, training=True,
        backend="triton",
    ).lowered  # fmt: skip
    q, k, v = torch.empty(3, 2, 2, 180, 64, dtype=torch.bfloat16, device="meta").unbind()
    sizes = {"x": (2,), "y": (2, 11), "u": (2, 64)}
    tables = {t.name: torch.empty(sizes[t.name], device="meta") for t in attention.attention.learned}
    tensors, wanted = lowered.tensors(tables), [True] * len(tables)

    def call() -> list[torch.Tensor]:
        places = lowered.sizes(q, k, (None,) * 5)
        out, lse, (kept,) = operator._attend(lowered, q, k, v, tensors, places)
        return operator._gradients(lowered, (out, lse), (kept, lse), q, k, v, tensors, wanted, places)

    with torch.no_grad():
        call()
        (blocks,) = lowered.masks.values.values()
        assert (residues.apart(blocks) is not None) == name.startswith("sorted")
        # the forward pass, what is behind log-sum-exps far from 0, and both backward passes
        assert len(launches) == {"groups": 8, "sorted": 7}.get(name, 4)
        monkeypatch.delattr(torch, "tensor")
        with Sent() as sent:
            found = call()
        assert [x.shape for x in found] == [x.shape for x in (q, k, v, *tensors)]
    assert sent.found == []


def test_what_is_sent_is_seen() -> None:
    with Sent() as sent:
        for x in (torch.ones(2), torch.ones(())):
            x.to("meta")
        torch.ones(2, device="meta") * torch.ones(())
    assert len(sent.found) == 2


@pytest.mark.parametrize("kind", ["number", "query", "key", "distance"])
def test_leaves_are_made_on_the_device_of_the_call(kind: Any) -> None:
    """`meta` does not mix with another."""
    lowered = attndsl.compile(LM, length=64, heads=2, head_dim=16, backend="reference").lowered
    q, k, v = torch.empty(3, 1, 2, 64, 16, device="meta").unbind()
    call = lowered.call_of(q, k, v, {}, lowered.sizes(q, k, (None,) * 5))
    at = {"query": "q", "key": "k", "distance": "q", "number": "h"}[kind]
    of = ir.call("sqrt", ir.add(ir.const(0.5), ir.absolute(ir.var(at))))
    assert LeafValues(call).of(Leaf(kind, of), call).device.type == "meta"


def test_what_is_compiled_ahead_is_of_this_text() -> None:
    """`make aot` renews compiled.csv."""
    found, declined = ahead.read()
    assert list(found) == [cell for cell in ahead.matrix() if cell in found]
    assert [cell for cell, (_, digest) in found.items() if digest != cell.digest] == []
    assert {cell for cell in ahead.matrix() if cell not in found} == set()
    assert declined == ahead.declined()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_kernels_are_compiled_ahead_or_declined_with_a_reason(architecture: str) -> None:
    compiled, declined = ahead.read()
    for arithmetic in configs.arithmetics(architecture):
        kernels = "forward", "backward_queries", "backward_keys", "backward_shared", "decode"
        dtypes = ("bfloat16", "float16") if arithmetic == "half" else ("float32",)
        scores = "plain", "alibi", "softcap", "distances"
        for name, score, dtype, width in itertools.product(kernels, scores, dtypes, (64, 128, 256)):
            cell = ahead.Cell(architecture, name, score, dtype, arithmetic, width)
            assert (cell in compiled) != (replace(cell, score="every") in declined), cell


def test_all_kernels_are_compiled_for_the_same_widths() -> None:
    """A call may need any of them."""
    for of, kernels in configs.CONFIGS.items():
        assert kernels.keys() == set(configs.KERNELS), of
        assert len({frozenset(widths) for widths in kernels.values()}) == 1, of


def test_a_digest_is_of_what_a_kernel_uses() -> None:
    forward, merge = (
        ahead.Cell("sm_90", name, "plain", "bfloat16", "half", 64) for name in ("forward", "merge")
    )
    ahead._definitions.cache_clear()
    before, known = (forward.digest, merge.digest), ahead._definitions()
    known["vectors"] = known["keep"]
    after = forward.digest, merge.digest
    ahead._definitions.cache_clear()
    assert after[0] != before[0]
    assert after[1] == before[1] == merge.digest


def test_kernels_fit_their_processors() -> None:
    compiled, _ = ahead.read()
    assert len(compiled) > 700
    for cell, (figures, _) in compiled.items():
        assert figures.shared <= configs.SHARED[cell.architecture], cell
        assert figures.tensor_core or cell.kernel == "merge", cell
        assert figures.spills == 0, cell


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "cell",
    [
        ahead.Cell("sm_90", "forward", "plain", "bfloat16", "half", 64),
        ahead.Cell("sm_90", "backward_queries", "distances", "bfloat16", "half", 64),
        ahead.Cell("sm_90", "backward_keys", "alibi", "bfloat16", "half", 64),
        ahead.Cell("sm_90", "decode", "softcap", "bfloat16", "half", 64),
        ahead.Cell("sm_80", "forward", "alibi", "float16", "half", 256),
        ahead.Cell("gfx942", "forward", "softcap", "float32", "ieee", 64),
        ahead.Cell("sm_100", "forward", "plain", "bfloat16", "half", 128),
        ahead.Cell("sm_90", "decode_paged", "alibi", "bfloat16", "half", 64),
    ],
    ids=str,
)
def test_kernels_compile_ahead_as_recorded(cell: ahead.Cell) -> None:
    assert ahead.compiled(cell) == ahead.read()[0][cell][0]
