"""What an attention costs: FLOPs and bytes, ideal and per lowering, block sizes, time on named machines.

FLOPs are those of the matrix products, a multiplication and an addition each, as FlashAttention counts them
(Dao, FlashAttention-2, 2023, section 4.1): forward Q Kᵀ and P V, 2 (D + Dv) for each pair; backward five
products to the forward's two, so 2.5 times that, the logits being formed again. Dv = D here.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attndsl.attention import Attention
from attndsl.backend import DTYPES, Counting, Problem
from attndsl.execution import choice, registry
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask, TileGrid

BACKWARD = 2.5
"""Backward FLOPs beside forward."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
ENTRIES = 2**21
"""Runs and partial tiles that a block size may take to be looked at."""
PAIRS_PER_TILE = 64**2
"""What a tile costs beside its pairs, in pairs: at a side of 64 half of the time."""


@dataclass(frozen=True)
class Passes:
    """Of one forward pass, and of one backward pass alone; over all heads and batch rows."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Steps(Passes):
    """And of one decoding step: the last query alone, with the keys and values that it reads."""

    decode: int


@dataclass(frozen=True)
class Ideal:
    """What no lowering can avoid."""

    flops: Steps
    bytes: Steps


@dataclass(frozen=True)
class Lowering:
    """What one backend makes of it: predicted seconds of a forward pass (of both where the problem is
    training), or the reason why there are none: it declines, or its cost is unknown; FLOPs and bytes where it
    tells them (`Counting`)."""

    seconds_estimate: float | None
    reason: str | None
    flops: Passes | None
    bytes: Passes | None


def pair_flops(head_dim: int) -> int:
    """2 (D + Dv) with Dv = D: products of one pair in the forward pass."""
    return 4 * head_dim


def ideal(block_mask: BlockMask, problem: Problem) -> Ideal:
    """Live pairs only, everything read or written once.

    Bytes forward: q, out, and the keys and values that some query reads. Backward: these, the gradient of
    out, and the gradients of q, k and v.
    Decode: the query and its output, and of each key head the keys and values that some of its query heads
    relates to the last row. Log-sum-exps are left out.
    """
    p, item = problem, DTYPES[problem.dtype]
    per_row = p.head_dim * item
    q = p.batch * p.heads * p.q_length * per_row
    k = _keys_read(problem, block_mask, read_keys) * per_row
    forward = pair_flops(p.head_dim) * _all(block_mask, problem, [grid.nnz for grid in block_mask.grids])
    last, read = _decode(block_mask, problem)
    return Ideal(
        Steps(forward, round(BACKWARD * forward), pair_flops(p.head_dim) * last),
        Steps(
            2 * q + 2 * k,
            4 * q + 4 * k,
            per_row * (2 * read + (2 * p.batch * p.heads if p.q_length else 0)),
        ),
    )


def _all(block_mask: BlockMask, problem: Problem, counts: list[int]) -> int:
    """The sum over all batch rows and heads of what is counted for each grid."""
    uses = np.bincount(block_mask.index.ravel(), minlength=len(counts))
    times = problem.batch * problem.heads // max(1, block_mask.index.size)
    return times * sum(int(u) * count for u, count in zip(uses, counts, strict=True))


def _decode(block_mask: BlockMask, problem: Problem) -> tuple[int, int]:
    """Live pairs of the last row over all heads, and the keys that it reads over all key heads."""
    if not problem.q_length:
        return 0, 0
    pairs = _all(block_mask, problem, [int(last_keys(grid).sum()) for grid in block_mask.grids])
    return pairs, _keys_read(problem, block_mask, last_keys)


def _keys_read(problem: Problem, block_mask: BlockMask, read: Callable[[TileGrid], NDArray[np.bool_]]) -> int:
    """The keys that are read over all key heads, where `read` says it of one mask."""
    p, index = problem, block_mask.index
    live = [read(grid) for grid in block_mask.grids]
    heads = np.broadcast_to(index, (len(index), p.heads))
    groups = heads.reshape(len(index), p.kv_heads, p.heads // p.kv_heads)
    sets = {frozenset(group.tolist()) for row in groups for group in row}
    union = {s: int(np.logical_or.reduce([live[g] for g in s]).sum()) for s in sets}
    found = sum(union[frozenset(group.tolist())] for row in groups for group in row)
    return found * (p.batch // len(index))


def read_keys(grid: TileGrid) -> NDArray[np.bool_]:
    """Whether some query relates to each key, bool [n]."""
    cols, size = grid.shape[1], grid.block_size
    edges = np.zeros(cols + 1, np.int64)
    np.add.at(edges, grid.run_start, 1)
    np.add.at(edges, grid.run_end, -1)
    live = np.zeros((cols, size), bool)
    live[np.cumsum(edges)[:cols] > 0] = True
    seen = np.unpackbits(np.bitwise_or.reduce(grid.masks, axis=1), axis=1, bitorder="little").astype(bool)
    col, content = np.unique(np.stack([grid.part_col, grid.part_mask]), axis=1)
    np.logical_or.at(live, col, seen[content])
    return live.ravel()[: grid.n]


def last_keys(grid: TileGrid) -> NDArray[np.bool_]:
    """Whether the last query row relates to each key, bool [n]."""
    (rows, cols), size = grid.shape, grid.block_size
    runs, parts = (slice(p[rows - 1], p[rows]) for p in (grid.run_ptr, grid.part_ptr))
    live = np.zeros((cols, size), bool)
    for start, end in zip(grid.run_start[runs].tolist(), grid.run_end[runs].tolist(), strict=True):
        live[start:end] = True
    contents = grid.masks[grid.part_mask[parts], (grid.nq - 1) % size]
    live[grid.part_col[parts]] = np.unpackbits(contents, axis=1, bitorder="little")
    return live.ravel()[: grid.n]


def lowerings(attention: Attention, problem: Problem, block_mask: BlockMask | None) -> dict[str, Lowering]:
    """Every registered backend on this problem.

    FLOPs are those of the pairs that it computes, live or not. Bytes: q, out and their gradients once, keys
    and values once for every `block_size` queries that meet them, and twice what it writes in between; in the
    backward pass what it writes has a gradient of its own.
    """
    found = {}
    for name in registry.names("backends"):
        verdict = choice.judged(name, attention, problem, block_mask)
        if isinstance(verdict, str):
            found[name] = Lowering(None, verdict, None, None)
            continue
        backend = registry.plugin("backends", name)
        work = None
        if isinstance(backend, Counting):
            work = _work(backend.counts(attention, problem, block_mask), problem)
        unknown = choice.UNKNOWN if verdict is None else None
        found[name] = Lowering(verdict, unknown, *(work or (None, None)))
    return found


def _work(counts: Mapping[str, float], problem: Problem) -> tuple[Passes, Passes]:
    p, item = problem, DTYPES[problem.dtype]
    forward = round(pair_flops(p.head_dim) * counts["pairs"])
    rows = p.batch * p.heads * p.q_length * p.head_dim * item
    keys = p.batch * p.kv_heads * p.length * p.head_dim * item
    reloads = round(counts["pairs"] / max(1, min(p.block_size, p.q_length)) * 2 * p.head_dim * item)
    written = round(2 * item * counts["written"])
    moved = Passes(2 * rows + reloads + written, 4 * rows + 2 * keys + reloads + 2 * written)
    return Passes(forward, round(BACKWARD * forward)), moved


@dataclass(frozen=True)
class TileCounts:
    full: int
    partial: int


@dataclass(frozen=True)
class BlockSize:
    """Tiles that are computed over all heads and batch rows, the pairs in them, and these beside the live
    ones; a waste of 1.0 is none."""

    block_size: int
    tiles: TileCounts
    pairs: int
    waste: float


def block_sizes(
    attention: Attention,
    problem: Problem,
    tables: Mapping[str, NDArray[Any]] | None = None,
    candidates: tuple[int, ...] = BLOCK_SIZES,
) -> tuple[BlockSize, ...]:
    """By rising block size. `tables` as `lowering.checked_tables` gives them.

    A size that could have more than `ENTRIES` runs and partial tiles is left out, with all smaller ones.
    """
    p = problem
    sizes = lowering.sizes(attention, p.length, p.q_length, p.heads)
    found: list[BlockSize] = []
    known: BlockMask | None = None
    for size in sorted(candidates, reverse=True):
        if known is not None:
            times = known.block_size / size
            runs, parts = (sum(len(a) for a in x) for x in zip(*map(_entries, known.grids), strict=True))
            if times * runs + times**2 * parts > ENTRIES:
                break
        known = lowering.block_mask(attention, sizes, tables or {}, size)
        full, partial = (_all(known, p, [g.tiles[i] for g in known.grids]) for i in (0, 1))
        pairs, live = (full + partial) * size**2, _all(known, p, [g.nnz for g in known.grids])
        found.append(BlockSize(size, TileCounts(full, partial), pairs, pairs / live if live else 1.0))
    return tuple(reversed(found))


def _entries(grid: TileGrid) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    return grid.run_start, grid.part_col


def best_block_size(rows: tuple[BlockSize, ...]) -> int | None:
    """The cheapest, the largest of equals; None of none.

    A tile costs its pairs and `PAIRS_PER_TILE` more, for finding it, starting the loads of its keys and
    values, and rescaling the output: with D = 64 a megaflop, 0.14 us of one of the H100's 132 processors.
    So small tiles pay where they leave out more dead pairs than that.
    """

    def cost(row: BlockSize) -> tuple[int, int]:
        return row.pairs + PAIRS_PER_TILE * (row.tiles.full + row.tiles.partial), -row.block_size

    return min(rows, key=cost).block_size if rows else None


@dataclass(frozen=True)
class Machine:
    """Peak FLOP/s by dtype, and bytes per second to and from memory."""

    name: str
    flops: Mapping[str, float]
    bandwidth: float


def _machine(name: str, half: float, single: float, double: float, bandwidth: float) -> Machine:
    peaks = {"float16": half, "bfloat16": half, "float32": single, "float64": double}
    return Machine(name, MappingProxyType(peaks), bandwidth)


MACHINES = (
    # NVIDIA A100 80GB SXM data sheet (2022): 312, 156 (TF32), 19.5 (FP64 tensor core) TFLOPS; 2,039 GB/s
    _machine("A100", 312e12, 156e12, 19.5e12, 2.039e12),
    # NVIDIA H100 SXM data sheet (2023): 1,979, 989 (TF32), both with sparsity, which doubles them, and 67
    # (FP64 tensor core) TFLOPS; 3.35 TB/s
    _machine("H100", 989.5e12, 494.5e12, 67e12, 3.35e12),
    # NVIDIA H200 SXM data sheet (2024): as H100; 4.8 TB/s
    _machine("H200", 989.5e12, 494.5e12, 67e12, 4.8e12),
)
"""SXM modules: dense peaks of the tensor cores, float32 as TF32."""


@dataclass(frozen=True)
class Seconds:
    forward: float
    backward: float
    decode: float


@dataclass(frozen=True)
class Roofline:
    """FLOPs per byte and what bounds the forward pass; the least seconds of each pass
    (Williams, Waterman, Patterson, Roofline, 2009)."""

    intensity: float
    bound: Literal["compute", "memory"]
    seconds: Seconds


def roofline(machine: Machine, cost: Ideal, dtype: str) -> Roofline:
    """max(FLOPs / peak, bytes / bandwidth)"""
    peak = machine.flops[dtype]

    def seconds(flops: int, moved: int) -> float:
        return max(flops / peak, moved / machine.bandwidth)

    f, b = cost.flops, cost.bytes
    intensity = f.forward / b.forward if b.forward else 0.0
    return Roofline(
        intensity,
        "compute" if intensity > peak / machine.bandwidth else "memory",
        Seconds(seconds(f.forward, b.forward), seconds(f.backward, b.backward), seconds(f.decode, b.decode)),
    )


SIDE, STREAMED = 512, 2**24
"""Of the matrices and the numbers that the micro-benchmark multiplies and copies."""


def this_machine(cache: Path | None = None) -> Machine:
    """This CPU with torch's number of threads, measured in under a second the first time and kept in `cache`
    (the user's cache folder)."""
    import platformdirs
    import torch

    path = cache or Path(platformdirs.user_cache_dir("attndsl")) / "machines.json"
    key = f"{_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    kept = _kept(path)
    if key not in kept:
        kept[key] = measured()
        # where the folder cannot be written to it is measured in every process
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(kept), encoding="utf-8")
            draft.replace(path)
    found = dict(kept[key])
    bandwidth = found.pop("bandwidth")
    return Machine("this CPU", MappingProxyType(found), bandwidth)


def _kept(path: Path) -> dict[str, dict[str, float]]:
    """What the file holds of the right form: a file of another version or a broken one is measured anew."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    wanted = {*DTYPES, "bandwidth"}
    return {
        key: rates
        for key, rates in (kept.items() if isinstance(kept, dict) else ())
        if isinstance(rates, dict)
        and rates.keys() == wanted
        and all(isinstance(rate, float) and rate > 0 for rate in rates.values())
    }


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def measured() -> dict[str, float]:
    """FLOP/s of a matrix product by dtype, and bytes per second of a copy as `bandwidth`."""
    import torch

    def rate(dtype: str, side: int) -> float:
        a, b = (torch.randn(side, side).to(getattr(torch, dtype)) for _ in range(2))
        return 2.0 * side**3 / _best(lambda: a @ b)

    # a dtype without instructions of its own can be 100 times slower
    rates = {d: rate(d, SIDE if d in ("float32", "float64") else SIDE // 4) for d in DTYPES}
    source = torch.zeros(STREAMED)
    target = torch.empty_like(source)
    rates["bandwidth"] = 2.0 * source.nbytes / _best(lambda: target.copy_(source))
    return rates


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of four calls after one to warm up."""
    work()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
