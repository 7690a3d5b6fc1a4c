"""What an attention costs: against masks written out, against the calls that a kernel makes, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from shipped import example

import attndsl
from attndsl import expr as ir
from attndsl.analysis import block_sizes, cost, machines
from attndsl.analysis import work as analysis
from attndsl.analysis.block_sizes import BlockSize, TileCounts
from attndsl.attention import Attention
from attndsl.backend import Counting, Problem, predicted, weighed
from attndsl.bound import Bound
from attndsl.execution import registry
from attndsl.execution.torch_eval import elements
from attndsl.plugins.torch import cost as sampling
from attndsl.plugins.torch import work
from attndsl.sheets import Machine
from attndsl.tiles import lowering

OURS = ("reference", "sdpa", "torch")


def attention_of(clauses: str) -> Attention:
    found = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    assert isinstance(found, Bound)
    return found.attention


def problem_of(n: int, nq: int | None = None, heads: int = 4, **options: Any) -> Problem:
    options = {"kv_heads": heads, "head_dim": 16} | options
    return Problem(n, n if nq is None else nq, heads=heads, **options)


def blocks_of(attention: Attention, p: Problem, tables: dict[str, Any] | None = None) -> Any:
    sizes = lowering.sizes(attention, p.length, p.q_length, p.heads)
    return lowering.block_mask(attention, sizes, tables or {}, p.block_size)


MIXED = "heads 0..0 { mask causal } 1..2 { mask causal & last(20) } else { mask random(3, seed = h) }"
PATTERNS = [
    "mask causal",
    "mask radius(9) | global([0])",
    "mask causal & last(30) & { q, k : k > 500 }",
    "mask { q, k : (q + k + h) mod 3 == 0 }",
    MIXED,
]


@pytest.mark.parametrize("clauses", PATTERNS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("nq", "n"), [(97, 97), (40, 97), (1, 97), (128, 128)])
def test_ideal_flops_and_bytes_are_those_of_the_live_pairs(
    clauses: str, kv_heads: int, nq: int, n: int
) -> None:
    attention = attention_of(clauses)
    p = problem_of(n, nq, kv_heads=kv_heads, batch=3, dtype="bfloat16", block_size=32)
    mask = np.broadcast_to(Bound(attention).mask(n, nq, heads=4), (4, nq, n))
    live = 3 * int(mask.sum())
    last = mask[:, -1]
    read = 3 * int(last.reshape(kv_heads, 4 // kv_heads, n).any(1).sum())
    found = analysis.ideal(blocks_of(attention, p), p)
    assert found.flops == analysis.Steps(
        2 * (16 + 16) * live, round(2.5 * 64 * live), 64 * 3 * int(last.sum())
    )
    seen = 3 * int(mask.any(1).reshape(kv_heads, 4 // kv_heads, n).any(1).sum())
    q, k = 3 * 4 * nq * 16 * 2, seen * 16 * 2
    assert found.bytes == analysis.Steps(2 * (q + k), 4 * (q + k), (2 * 3 * 4 + 2 * read) * 16 * 2)


def test_batch_rows_with_masks_of_their_own_are_added() -> None:
    attention = example("left_padding")["left_padding"].attention
    sizes = lowering.sizes(attention, 50, 50, 4)
    tables = lowering.checked_tables(attention, {"pad": np.array([0, 30])}, sizes)
    p = problem_of(50, kv_heads=2, batch=2, block_size=16)
    found = analysis.ideal(blocks_of(attention, p, tables), p)
    mask = Bound(attention).mask(50, heads=4, pad=np.array([0, 30]))
    assert found.flops.forward == 64 * 4 * mask.sum()
    assert found.flops.decode == 64 * 4 * (50 + 20)
    assert found.bytes.decode == (2 * 2 * 4 + 2 * 2 * (50 + 20)) * 16 * 4


@pytest.mark.parametrize("nq", [0, 5])
def test_no_keys_and_no_queries_cost_nothing(nq: int) -> None:
    p = problem_of(nq and 0, nq and 0)
    found = analysis.ideal(blocks_of(attention_of("mask causal"), p), p)
    assert found.flops == found.bytes == analysis.Steps(0, 0, 0)
    assert machines.roofline(machines.MACHINES[0], found, "float32").seconds.forward == 0


@pytest.mark.parametrize("clauses", PATTERNS)
@pytest.mark.parametrize("n", [64, 200])
def test_tiles_of_every_block_size_are_those_of_the_mask(clauses: str, n: int) -> None:
    attention, p = attention_of(clauses), problem_of(n, batch=2)
    mask = np.broadcast_to(Bound(attention).mask(n, heads=4), (4, n, n))
    rows = block_sizes.block_sizes(attention, p, candidates=(16, 32, 64))
    assert [row.block_size for row in rows] == [16, 32, 64]
    for row in rows:
        size = row.block_size
        tiles = -(-n // size)
        padded = np.zeros((4, tiles * size, tiles * size), bool)
        padded[:, :n, :n] = mask
        held = padded.reshape(4, tiles, size, tiles, size).sum((2, 4))
        full, live = 2 * int((held == size**2).sum()), 2 * int((held > 0).sum())
        assert row.tiles == TileCounts(full, live - full)
        assert row.pairs == live * size**2
        assert row.waste == (row.pairs / (2 * mask.sum()) if mask.any() else 1.0)


def test_the_best_block_size_leaves_out_dead_pairs_where_that_pays() -> None:
    def best(clauses: str, n: int = 4096) -> int | None:
        return block_sizes.best_block_size(block_sizes.block_sizes(attention_of(clauses), problem_of(n)))

    assert best("") == 256
    assert best("mask blocks(64, { q, k : q == k })") == 64
    assert best("mask blocks(32, { q, k : (q + k) mod 5 == 0 })") == 32
    assert best("mask causal & last(64)") < best("mask causal & last(2048)")  # type: ignore[operator]
    assert block_sizes.best_block_size(()) is None
    even = [BlockSize(size, TileCounts(0, 0), 0, 1.0) for size in (16, 32)]
    assert block_sizes.best_block_size(tuple(even)) == 32


def test_a_tile_costs_its_pairs_and_4096_more() -> None:
    small, large = BlockSize(16, TileCounts(3, 7), 2560, 1.0), BlockSize(64, TileCounts(1, 2), 31233, 2.0)
    assert 2560 + 10 * 4096 == 31232 + 3 * 4096
    assert block_sizes.best_block_size((small, large)) == 16
    assert block_sizes.best_block_size((small, BlockSize(64, TileCounts(1, 2), 31232, 2.0))) == 64


def test_block_sizes_with_too_many_tiles_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, p = attention_of("mask { q, k : (q - k) mod 16 == 0 }"), problem_of(1024)
    monkeypatch.setattr(block_sizes, "ENTRIES", 16**2)
    assert [row.block_size for row in block_sizes.block_sizes(attention, p)] == [64, 128, 256]


def counts(backend: str, attention: Attention, p: Problem, blocks: Any = None) -> dict[str, float]:
    plugin = registry.plugin("backends", backend)
    return dict(plugin.counts(attention, p, blocks_of(attention, p) if blocks is None else blocks))


@pytest.mark.parametrize("backend", OURS)
def test_a_cost_is_its_counts_weighed(backend: str) -> None:
    plugin, attention, p = (
        registry.plugin("backends", backend),
        attention_of("mask radius(9)"),
        problem_of(97),
    )
    assert isinstance(plugin, Counting)
    blocks = blocks_of(attention, p)
    assert plugin.cost(attention, p, blocks) == weighed(
        plugin.seconds["cpu"], plugin.counts(attention, p, blocks)
    )
    assert plugin.cost(attention, p, None) >= plugin.cost(attention, p, blocks) > 0


def test_dense_lowerings_compute_every_pair_and_causal_ones_half() -> None:
    p = problem_of(2048, batch=2)
    everything = 2 * 4 * 2048**2
    for clauses, sdpa in (("", 1.0), ("mask causal", 0.5), ("mask radius(9)", 1.0)):
        assert counts("reference", attention_of(clauses), p)["pairs"] == everything
        assert counts("sdpa", attention_of(clauses), p)["pairs"] / everything == pytest.approx(sdpa, abs=0.1)


KERNELS = [
    *PATTERNS[:2],
    PATTERNS[3],
    MIXED,
    "mask causal score alibi",
    "mask radius(50) | global([0, 7]) score alibi",
    "mask causal & last(70) score softcap(3.0)",
    "mask { q, k : q * k mod 7 == 1 } norm sigmoid",
]


@pytest.mark.parametrize("clauses", KERNELS)
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("n", [128, 1000])
def test_the_torch_backend_computes_the_pairs_that_it_counts(
    clauses: str, kv_heads: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = attention_of(clauses)
    plan = attndsl.compile(
        attention, length=n, heads=4, kv_heads=kv_heads, head_dim=16, batch=2, backend="torch"
    )
    made: list[tuple[int, int]] = []

    def fused(q: Any, k: Any, v: Any, **options: Any) -> Any:
        made.append((q.shape[:3].numel() * k.shape[2], 1))
        return flash(q, k, v, **options)

    def formed(logit: Any, *rest: Any) -> Any:
        made.append((logit.numel(), 1))
        return normalise(logit, *rest)

    flash, normalise = work.flash, work.normalise
    monkeypatch.setattr(work, "flash", fused)
    monkeypatch.setattr(work, "normalise", formed)
    plan(*(torch.randn(2, heads, n, 16) for heads in (4, kv_heads, kv_heads)))
    pairs, calls = map(sum, zip(*made, strict=True))
    found = counts("torch", attention, plan.problem, plan.block_masks)
    assert (found["pairs"], found["calls"]) == (pairs, calls)
    assert found["pairs"] >= 2 * np.broadcast_to(Bound(attention).mask(n, heads=4), (4, n, n)).sum()


@pytest.mark.parametrize("clauses", ["mask radius(300) | global([0])", "mask causal", "mask fixed(128)"])
def test_a_sample_of_a_large_mask_tells_nearly_as_much(clauses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, p = attention_of(clauses), problem_of(2**15)
    blocks = blocks_of(attention, p)
    whole = counts("torch", attention, p, blocks)
    monkeypatch.setattr(sampling, "SAMPLED", blocks.entries // 3)
    some = counts("torch", attention, p, blocks)
    assert some != whole
    assert some["pairs"] == pytest.approx(whole["pairs"], rel=0.15)


def test_numbers_that_an_expression_makes() -> None:
    q, k, s = (ir.var(name) for name in "qks")
    for nothing in (None, s, q, ir.add(q, ir.const(3))):
        assert elements(nothing, 100, 8) == (0, 0)
    assert elements(ir.add(q, k), 100, 8) == (200, 0)
    assert elements(ir.le(q, k), 100, 8) == (25, 0)
    assert elements(ir.mul(s, s), 100, 8) == (800, 0)
    assert elements(ir.call("exp", s), 100, 8) == (1600, 1200)
    assert elements(ir.mul(ir.add(q, k), ir.var("h")), 100, 8) == (200 + 1600, 0)


def test_lowerings_of_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem_of(256, dtype="float32", block_size=64)
    attention = attention_of("mask causal norm sigmoid")
    blocks = blocks_of(attention, p)
    found = cost.lowerings(attention, p, blocks)
    assert found["sdpa"] == cost.Lowering(None, "it knows nothing of the norm `sigmoid`", None, None)
    dense = found["reference"]
    assert dense.flops == analysis.Passes(64 * 4 * 256**2, 160 * 4 * 256**2)
    written = counts("reference", attention, p)["written"]
    rows = 4 * 256 * 16 * 4
    assert dense.bytes is not None
    assert dense.bytes.forward == 2 * rows + 4 * (256 // 64) * 256 * 2 * 16 * 4 + round(2 * 4 * written)
    features = registry.plugin("backends", "reference").features
    answers = {"supports": lambda a, p: None, "cost": lambda a, p, b: 2.0, "lower": None}
    silent = SimpleNamespace(features=features, **answers)
    monkeypatch.setattr(registry, "names", lambda group: ["silent"])
    monkeypatch.setattr(registry, "plugin", lambda group, name: silent)
    assert cost.lowerings(attention, p, None) == {"silent": cost.Lowering(2.0, None, None, None)}


def test_roofline_by_hand() -> None:
    live = analysis.Ideal(analysis.Steps(1000, 2500, 10), analysis.Steps(100, 50, 40))
    machine = Machine("toy", {"float32": 500.0}, 20.0)
    found = machines.roofline(machine, live, "float32")
    assert (found.intensity, found.bound) == (10.0, "memory")
    assert found.seconds == machines.Seconds(5.0, 5.0, 2.0)
    assert machines.roofline(Machine("toy", {"float32": 100.0}, 20.0), live, "float32").bound == "compute"


def test_machines_are_those_of_the_data_sheets() -> None:
    peaks = {m.name: (m.flops["bfloat16"] / 1e12, m.bandwidth / 1e12) for m in machines.MACHINES}
    assert peaks == {"A100": (312, 2.039), "H100": (989.5, 3.35), "H200": (989.5, 4.8)}


def test_seconds_that_nobody_fitted_are_told_from_a_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"cuda:0": "NVIDIA L4", "cuda:1": "NVIDIA A100-SXM4-80GB"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    p = Problem(64, 64, head_dim=8, dtype="bfloat16", device="cuda:1")
    counts = {"pairs": 10.0, "written": 5.0}
    by_sheet = 4 * 10 * 8 / 312e12 + 2 * 5 * 2 / 2.039e12
    assert predicted({"cpu": {"pairs": 1.0}}, counts, p, 3.0) == pytest.approx(by_sheet)
    assert predicted({}, counts, replace(p, training=True), 3.0) == pytest.approx(3 * by_sheet)
    assert predicted({"cuda": {"pairs": 1.0}}, counts, p, 3.0) == 10.0
    assert predicted({}, counts, replace(p, device="cuda:0"), 3.0) is None


RATES = {"float16": 1.0, "bfloat16": 2.0, "float32": 3.0, "float64": 4.0, "bandwidth": 5.0}


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every measurement."""
    made: list[int] = []
    monkeypatch.setattr(machines, "benchmarked", lambda: made.append(1) or dict(RATES))
    return made


def test_this_machine_is_measured_once(tmp_path: Path, timings: list[int]) -> None:
    file = tmp_path / "deep" / "machines.json"
    first, second = machines.this_machine(file), machines.this_machine(file)
    assert first == second == Machine("this CPU", {k: v for k, v in RATES.items() if k != "bandwidth"}, 5.0)
    assert len(timings) == 1
    (key,) = json.loads(file.read_text())
    assert torch.__version__ in key
    assert f"{torch.get_num_threads()} threads" in key
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", b"\xff\xfe", "{KEY: 3}", '{KEY: {"bandwidth": 1.0}}', "{KEY: BAD}"]
)
def test_a_broken_cache_is_measured_anew(tmp_path: Path, timings: list[int], text: str | bytes) -> None:
    file = tmp_path / "machines.json"
    machines.this_machine(file)
    (key,) = json.loads(file.read_text())
    bad = json.dumps(RATES | {"float32": "fast"})
    filled = (
        text if isinstance(text, bytes) else text.replace("KEY", json.dumps(key)).replace("BAD", bad).encode()
    )
    file.write_bytes(filled)
    assert machines.this_machine(file).flops["float32"] == 3.0
    assert len(timings) == 2
    assert json.loads(file.read_text()) == {key: RATES}


def test_machines_of_others_stay_in_the_cache(tmp_path: Path, timings: list[int]) -> None:
    file = tmp_path / "machines.json"
    file.write_text(json.dumps({"another": RATES}))
    machines.this_machine(file)
    assert len(json.loads(file.read_text())) == 2


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, timings: list[int]) -> None:
    (tmp_path / "file").write_text("")
    assert machines.this_machine(tmp_path / "file" / "machines.json").bandwidth == 5.0


def test_the_micro_benchmark_gives_plausible_rates() -> None:
    rates = machines.benchmarked()
    assert rates.keys() == RATES.keys()
    assert 1e8 < rates["float32"] < 1e14
    assert 1e8 < rates["bandwidth"] < 1e13
