"""The backend `triton` on a GPU, beside compiled FlexAttention and torch's dense attention, in bfloat16.

    python -m benchmarks.gpu middle | short | long [--results FILE]     a part: 20 minutes together
    python -m benchmarks.gpu table [--results FILE]                     what was found, as a table
    TRITON_INTERPRET=1 python -m benchmarks.gpu short --dry             all of it in numpy, tiny

A part begins with cases of the conformance suite, others for each part, and times nothing where one is red; a
cell whose results are not FlexAttention's is red and not timed. It stops by its own clock; run it again, and
it does what is missing in FILE (gpu.jsonl), which has a line for each cell and device. Dense attention is
timed before and after as a control: a part whose controls differ was disturbed.

Milliseconds are medians of runs that alternate; for `both` passes the forward one is done anew. FlexAttention
gets the same tiles and a mask written for it. It has not been run yet: there are no figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import attndsl
from attndsl.conformance import CASES, check


@dataclass(frozen=True)
class Sizes:
    """shorter   what lengths are divided by
    steps     batch rows and heads of keys of a step of decoding
    suite     cases of the conformance suite at most, their seconds, and processes
    runs      that are not timed, and most that are
    close     how near results must be to FlexAttention's, beside the greatest
    """

    device: str
    dtype: str
    heads: int
    kv_heads: tuple[int, ...]
    head_dims: tuple[int, ...]
    shorter: int
    steps: tuple[int, int]
    suite: tuple[int, float, int]
    close: float
    runs: tuple[int, int]


GPU = Sizes("cuda", "bfloat16", 16, (16, 4), (128, 64), 1, (32, 4), (500, 45.0, 8), 2e-2, (2, 20))
DRY = Sizes("cpu", "float32", 2, (2, 1), (16,), 128, (2, 1), (4, 60.0, 1), 1e-4, (0, 1))


@dataclass(frozen=True)
class Part:
    n: int
    seconds: float


PARTS = {"middle": Part(32_768, 480.0), "short": Part(4_096, 330.0), "long": Part(131_072, 390.0)}
"""Of at most 9 minutes each, and 20 together."""
CACHE, STEP = 131_072, "mask causal & (last(4096) | sinks(4))"
NEW = "mask causal & last({})"
SPARSE = "radius(1) | global([0, n - 1])"
MASKS = {
    "causal": "mask causal",
    "window 1024": "mask causal & last(1024)",
    "Longformer 513 + 2": "mask radius(256) | global([0, 1])",
    "Big Bird 64": f"mask blocks(64, {SPARSE} | random(3, of = ~({SPARSE})))",
    "documents 2048": "inputs doc : int[n] mask causal & documents(doc)",
    "strided 128": "mask causal & (last(128) | { q, k : (q - k) mod 128 == 0 })",
}


@dataclass(frozen=True)
class Cell:
    """What one line of the results is about. `tuned`: FlexAttention may look for its best tiles."""

    mask: str
    n: int
    d: int
    kv_heads: int
    tuned: bool = False

    @property
    def name(self) -> str:
        return f"{self.mask}, n {self.n}, d {self.d}, Hkv {self.kv_heads}" + ", max-autotune" * self.tuned

    @property
    def reserve(self) -> float:
        """Seconds that must be left for it to begin."""
        return 150.0 if self.tuned else 45.0


def cells(part: str, sizes: Sizes) -> Iterator[Cell]:
    n = PARTS[part].n // sizes.shorter
    for d in sizes.head_dims:
        for kv_heads in sizes.kv_heads:
            for mask in MASKS:
                yield Cell(mask, n, d, kv_heads)
            if part == "middle" and (d, kv_heads) == (sizes.head_dims[0], sizes.kv_heads[0]):
                yield from (
                    Cell(mask, n, d, kv_heads, tuned=True) for mask in ("window 1024", "documents 2048")
                )


def mod(mask: str, tokens: Tensor, links: Tensor) -> Callable[..., Tensor]:
    """The mask as FlexAttention takes it; `tokens` are the documents of tokens, `links` the blocks of Big
    Bird."""
    return {
        "causal": lambda b, h, q, k: q >= k,
        "window 1024": lambda b, h, q, k: (q >= k) & (q - k < 1024),
        "Longformer 513 + 2": lambda b, h, q, k: ((q - k).abs() <= 256) | (q < 2) | (k < 2),
        "Big Bird 64": lambda b, h, q, k: links[q // 64, k // 64],
        "documents 2048": lambda b, h, q, k: (q >= k) & (tokens[q] == tokens[k]),
        "strided 128": lambda b, h, q, k: (q >= k) & ((q - k < 128) | ((q - k) % 128 == 0)),
    }[mask]


def verdict(number: int, device: str, end: float) -> str:
    """`agrees`, `declined` or what is red of a case; `late` after the end of the time."""
    if time.time() > end:
        return "late"
    try:
        reason = check("triton", CASES[number], device)
    except (AssertionError, attndsl.AttnError) as error:
        return f"red: {CASES[number]}: {error}"
    return "agrees" if reason is None else "declined"


def conforms(part: str, sizes: Sizes) -> bool:
    most, seconds, jobs = sizes.suite
    some = [i for i, case in enumerate(CASES) if case.dtype != "float64"]
    some = random.Random(part).sample(some, min(most, len(some)))
    tried = partial(verdict, device=sizes.device, end=time.time() + seconds)
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        said = Counter(pool.map(tried, some, chunksize=4))
    red = [x for x in said if x.startswith("red")]
    print(*red, f"{said['agrees']} cases of {len(some)} agree, {len(red)} do not", sep="\n")
    return said["agrees"] > 0 and not red


def alternate(sides: dict[str, Callable[[], object]], sizes: Sizes, seconds: float = 3.0) -> dict[str, float]:
    """Median milliseconds of each, in turn, of at least three runs and at most those that fit."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    first, most = sizes.runs
    for side in sides.values():
        for _ in range(first):
            side()
    end = time.monotonic() + seconds
    for i in range(most):
        if i >= 3 and time.monotonic() > end:
            break
        for name, side in sides.items():
            spent[name].append(elapsed(side, sizes))
    return {name: round(statistics.median(times), 4) for name, times in spent.items()}


def elapsed(side: Callable[[], object], sizes: Sizes) -> float:
    if sizes.device == "cpu":
        start = time.perf_counter()
        side()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    side()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def drawn(*shape: int, sizes: Sizes) -> Tensor:
    return torch.randn(shape, dtype=getattr(torch, sizes.dtype), device=sizes.device)


def planned(text: str, n: int, d: int, kv_heads: int, sizes: Sizes, **more: Any) -> Any:
    heads = {"heads": sizes.heads, "kv_heads": kv_heads, "head_dim": d} | more
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    return attndsl.compile(
        attention, length=n, dtype=sizes.dtype, device=sizes.device, backend="triton", **heads
    )


def far(a: Tensor, b: Tensor) -> float:
    """How far apart, beside the greatest number."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1.0))


def passes(attend: Callable[..., Tensor], leaves: list[Tensor], slope: Tensor) -> tuple[Tensor, ...]:
    """The output, and gradients of leaves that want some."""
    out = attend(*leaves)
    return out, *(torch.autograd.grad(out, leaves, slope) if out.requires_grad else ())


def linked(tiles: Any) -> Tensor:
    """The first pair of each two blocks of 64 tokens."""
    rows = [tiles.to_dense(i, i + 1)[0, 0, :, ::64] for i in range(0, tiles.nq, 64)]
    return torch.from_numpy(np.concatenate(rows))


def timed(cell: Cell, sizes: Sizes) -> dict[str, Any]:
    """Both passes and the forward one of all sides. Raises AssertionError where they differ."""
    n, d, gpu = cell.n, cell.d, sizes.device != "cpu"
    tokens = torch.arange(n, device=sizes.device) // (2048 // sizes.shorter)
    given = {"doc": tokens} if "doc" in MASKS[cell.mask] else {}
    plans = [
        planned(MASKS[cell.mask], n, d, cell.kv_heads, sizes, training=x).bind(**given) for x in (False, True)
    ]
    tiles = plans[0].block_masks
    links = linked(tiles) if "Big" in cell.mask else tokens
    theirs = tiles.to_flex(sizes.device)
    theirs = BlockMask.from_kv_blocks(
        theirs.kv_num_blocks, theirs.kv_indices, theirs.full_kv_num_blocks, theirs.full_kv_indices,
        BLOCK_SIZE=tiles.block_size, mask_mod=mod(cell.mask, tokens, links.to(sizes.device)),
        seq_lengths=(n, n),
    )  # fmt: skip
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs" if cell.tuned else None
    attend: Any = torch.compile(flex_attention, dynamic=False, mode=mode) if gpu else flex_attention
    flex = partial(attend, block_mask=theirs, enable_gqa=True)
    causal = "causal" in MASKS[cell.mask]
    dense = partial(scaled_dot_product_attention, is_causal=causal, enable_gqa=True)

    q, slope = drawn(2, 1, sizes.heads, n, d, sizes=sizes).unbind()
    k, v = drawn(2, 1, cell.kv_heads, n, d, sizes=sizes).unbind()
    leaves = [q, k, v] if not gpu else [x.requires_grad_() for x in (q, k, v)]
    error = max(map(far, passes(plans[1], leaves, slope), passes(flex, leaves, slope)))
    assert error <= sizes.close, f"it differs from FlexAttention by {error:.2g}"
    # of the same compiled code: what the backward pass needs is kept
    forward = alternate(
        {"triton": lambda: plans[0](q.detach(), k.detach(), v.detach()), "flex": lambda: flex(*leaves),
         "dense": lambda: dense(*leaves)}, sizes,
    )  # fmt: skip
    sides = {"triton": plans[1], "flex": flex, "dense": dense}
    if not gpu:
        # FlexAttention has no backward pass there
        del sides["flex"]
        leaves = [x.requires_grad_() for x in leaves]
    both = alternate({x: partial(passes, f, leaves, slope) for x, f in sides.items()}, sizes)
    flops = 4 * d * sizes.heads * tiles.nnz // tiles.index.size
    rates = {"forward": flops / forward["triton"] / 1e9, "both": 3.5 * flops / both["triton"] / 1e9}
    return {"forward": forward, "both": both, "tflops": {x: round(rate, 2) for x, rate in rates.items()}}


def control(sizes: Sizes) -> dict[str, Any]:
    """Dense attention beside itself, forward."""
    q, k, v = drawn(3, 1, sizes.heads, 8192 // sizes.shorter, 128, sizes=sizes).unbind()
    dense = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
    return {"torch": torch.__version__, "forward": alternate({"dense": dense, "again": dense}, sizes)}


def decoding(sizes: Sizes) -> dict[str, Any]:
    """A step over long caches beside SDPA on the live keys, and bytes of those per second."""
    (batch, kv_heads), n, d = sizes.steps, CACHE // sizes.shorter, sizes.head_dims[0]
    heads = 8 * kv_heads
    plan = planned(STEP, n, d, kv_heads, sizes, heads=heads, q_length=1, batch=batch)
    q = drawn(batch, heads, 1, d, sizes=sizes)
    k, v = drawn(2, batch, kv_heads, n, d, sizes=sizes).unbind()
    live = torch.from_numpy(plan.block_masks.to_dense()[0, 0, 0]).to(sizes.device)
    few = [x[:, :, live].contiguous() for x in (k, v)]
    dense = partial(scaled_dot_product_attention, enable_gqa=True)
    error = far(plan(q, k, v), dense(q, *few))
    assert error <= sizes.close, f"it differs from SDPA by {error:.2g}"
    found = alternate({"triton": lambda: plan(q, k, v), "dense": lambda: dense(q, *few)}, sizes)
    moved = 2 * few[0].numel() * few[0].element_size()
    return {"forward": found, "gigabytes per second": round(moved / found["triton"] / 1e6, 1)}


def new_masks(sizes: Sizes) -> dict[str, Any]:
    """Milliseconds from the text of a mask to its output, and kernels that were compiled for it."""
    from triton.knobs import runtime

    n, d = 32_768 // sizes.shorter, sizes.head_dims[0]
    q, k, v = drawn(3, 1, sizes.heads, n, d, sizes=sizes).unbind()
    compiled: list[object] = []
    runtime.jit_post_compile_hook = lambda **kernel: compiled.append(kernel) or None

    def first(window: int) -> object:
        return planned(NEW.format(window), n, d, sizes.heads, sizes)(q, k, v)

    first(1000)
    anew = len(compiled)
    spent = [elapsed(partial(first, window), sizes) for window in (900, 1100, 700, 1300, 500)]
    runtime.jit_post_compile_hook = None
    return {"forward": {"triton": round(statistics.median(spent), 2)}, "recompiled": len(compiled) - anew}


def todo(part: str, sizes: Sizes) -> Iterator[tuple[str, float, Callable[[], dict[str, Any]]]]:
    """Names, seconds to reserve, and what gives the figures."""
    if part == "short":
        yield "a new mask at 32k", 30.0, partial(new_masks, sizes)
        yield "a step of decoding, caches of 128k", 30.0, partial(decoding, sizes)
    for cell in cells(part, sizes):
        yield cell.name, cell.reserve, partial(timed, cell, sizes)


def machine(sizes: Sizes) -> str:
    return torch.cuda.get_device_name() if sizes.device == "cuda" else sizes.device


def read(results: Path) -> list[dict[str, Any]]:
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return [json.loads(line) for line in lines]


def run(part: str, sizes: Sizes, results: Path) -> bool:
    """Whether everything of the part is done."""
    end, device = time.monotonic() + PARTS[part].seconds, machine(sizes)
    known = {row["cell"] for row in read(results) if row["device"] == device}
    missing = [x for x in todo(part, sizes) if x[0] not in known]
    if not missing:
        return True
    if not conforms(part, sizes):
        sys.exit("nothing is timed")

    def note(cell: str, found: dict[str, Any]) -> None:
        row = {"device": device, "part": part, "cell": cell, **found}
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    note(f"control of {part}", control(sizes))
    left = 0
    for name, reserve, figures in missing:
        if time.monotonic() + reserve > end:
            left += 1
            continue
        try:
            note(name, figures())
        except AssertionError as error:
            note(name, {"red": str(error)})
    note(f"control of {part}", control(sizes))
    if left:
        print(f"{left} cells of {part} are left: run it again")
    return not left


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """In Markdown: milliseconds, how often as fast as the others, and what else was found."""
    yield "| device | cell | pass | triton | flex | dense | flex / triton | dense / triton | |"
    yield "|" + "---|" * 9
    for row in rows:
        for kind in ("forward", "both"):
            if (times := row.get(kind)) is None:
                continue
            sides = [times.get(side) for side in ("triton", "flex", "dense")]
            mine = sides[0]
            ratios = [f"{x / mine:.2f}" if x and mine else "" for x in sides[1:]]
            more = [f"{row['tflops'][kind]} TFLOP/s"] if "tflops" in row else []
            more += [f"{x} {row[x]}" for x in ("gigabytes per second", "recompiled") if x in row]
            more += [f"again {times['again']}"] if "again" in times else []
            said = ["" if x is None else f"{x:.4g}" for x in sides]
            yield (
                "| " + " | ".join([row["device"], row["cell"], kind, *said, *ratios, ", ".join(more)]) + " |"
            )
        if "red" in row:
            yield f"| {row['device']} | {row['cell']} | red | | | | | | {row['red']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "table"])
    parser.add_argument("--results", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args()
    sizes = DRY if asked.dry else GPU
    if asked.part == "table":
        print(*table(read(asked.results)), sep="\n")
    elif sizes is GPU and not torch.cuda.is_available():
        print("there is no GPU")
    elif asked.part is None:
        parser.error("which part?")
    else:
        run(asked.part, sizes, asked.results)


if __name__ == "__main__":
    main()
