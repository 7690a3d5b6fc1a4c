"""Keys that are made or remembered, beside dense SDPA, attention to as many keys, and scores alone.

    python -m benchmarks.streams [--only NAME ...]

8 heads of 64, float32, one thread; CPU seconds, runs alternate, medians. Nothing is timed whose output
differs from `reference` in float64 at a shorter length.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attndsl
from attndsl.execution.selecting import choices

HEADS, HEAD_DIM, RUNS, GATE, SLAB = 8, 64, 5, 300, 64
EXAMPLES = Path(__file__).parent.parent / "examples"
POOLS = ("pool(16)", "pool(32, stride = 16)", "pool(16, by = learn[16, D])", "pool(16, by = learn[16, D, D])")
Run = Callable[[], object]


def normal(n: int, heads: int = HEADS) -> Tensor:
    return torch.randn(1, heads, n, HEAD_DIM)


def compiled(bound: Any, n: int, **options: Any) -> Any:
    sizes: dict[str, Any] = {"length": n, "heads": HEADS, "head_dim": HEAD_DIM, "training": True, **options}
    return attndsl.compile(bound, **sizes)


def example(file: str, name: str) -> Any:
    return attndsl.load(EXAMPLES / f"{file}.attn")[name]


def anonymous(clauses: str) -> Any:
    return attndsl.parse(f"attention a {{ {clauses} }}")["a"]


def gate(name: str, bound: Any, kv_heads: int = HEADS, **inputs: Tensor) -> None:
    """Exits where the chosen backend is wrong."""
    q, k, v = normal(GATE), normal(GATE, kv_heads), normal(GATE, kv_heads)
    mine = compiled(bound, GATE, kv_heads=kv_heads).module()
    exact = compiled(bound, GATE, kv_heads=kv_heads, dtype="float64", backend="reference").module()
    exact.load_state_dict(mine.state_dict())
    wide = {name: x.double() for name, x in inputs.items()}
    error = (mine(q, k, v, **inputs) - exact(q.double(), k.double(), v.double(), **wide)).abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"{name} is off by {error:.2g}: no times")


def passes(
    attend: Callable[..., Tensor], given: Sequence[Tensor], learned: Sequence[Tensor] = ()
) -> list[Run]:
    """Forward, and forward with backward."""
    leaves = [x.clone().requires_grad_() for x in given]
    slope = normal(given[0].shape[2])
    wanted = [*leaves, *learned]

    def forward() -> None:
        with torch.no_grad():
            attend(*given)

    return [forward, lambda: torch.autograd.grad(attend(*leaves), wanted, slope)]


def seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def medians(*sides: Run, runs: int = RUNS) -> list[float]:
    for side in sides:
        side()
    return [
        statistics.median(column)
        for column in zip(*([seconds(x) for x in sides] for _ in range(runs)), strict=True)
    ]


def compare(name: str, mine: Sequence[Run], other: Sequence[Run], beside: str, faster: bool) -> None:
    for what, a, b in zip(("forward", "both"), mine, other, strict=True):
        ours, theirs = medians(a, b)
        ratio = theirs / ours if faster else ours / theirs
        said = f"{ratio:.2f} x as fast" if faster else f"{ratio:.2f} of its time"
        print(f"{name:32} {what:8} {ours:.4f} s  {beside} {theirs:.4f} s  {said}", flush=True)


def memory(nq: int = 512, many: int = 65_536) -> None:
    """Choosing 32 of a memory of 65,536 for 512 queries, and the products of all of them."""
    bound = example("memorizing", "memorizing")
    q, k, held = normal(nq), normal(nq), normal(many)
    lowered = compiled(bound, nq).lowered
    keys = torch.cat([held, k], 2)
    sizes = lowered.sizes(q, keys, (None, None, None, None, nq))

    def scores() -> None:
        for head in range(HEADS):
            for row in range(0, nq, SLAB):
                q[0, head, row : row + SLAB] @ held[0, head].T

    found = choices(lowered.attention, q, keys, {}, sizes)["topk#0"]
    best = (q[0, 0] @ held[0, 0].T).topk(32).indices - many
    if not torch.equal(found[0, 0].sort().values, best.sort().values):
        raise SystemExit("others are chosen than the best: no times")
    mine, alone = medians(lambda: choices(lowered.attention, q, keys, {}, sizes), scores)
    print(
        f"{'32 of a memory of 65,536':32} choice   {mine:.4f} s  scores {alone:.4f} s  {mine / alone:.2f} x"
    )


def linformer(n: int = 4096) -> None:
    q, k, v = normal(n), normal(n), normal(n)
    for name in ("linformer", "linformer_headwise", "linformer_kv"):
        bound = example("linformer", name)
        gate(name, bound)
        module = compiled(bound, n).module()
        dense = passes(scaled_dot_product_attention, (q, k, v))
        compare(name, passes(module, (q, k, v), [*module.parameters()]), dense, "SDPA", True)
        compare(f"{name}, fixed", passes(module, (q, k, v)), dense, "SDPA", True)


def pools(n: int = 4096) -> None:
    """Beside attention to as many keys that are given."""
    q, k, v = normal(n), normal(n), normal(n)
    for text in POOLS:
        bound = anonymous(f"keys {text}")
        gate(text, bound)
        module = compiled(bound, n).module()
        slots = n // 16 - ("stride" in text)
        few = compiled(anonymous("mask full  offset 0"), slots, q_length=n)
        keys = [normal(slots), normal(slots)]
        mine = passes(module, (q, k, v), [*module.parameters()])
        compare(text, mine, passes(few, (q, *keys)), "given", False)


def nsa(n: int = 16_384, kv_heads: int = 2) -> None:
    bound = example("nsa", "nsa")
    gate("nsa", bound, kv_heads, gate=torch.rand(1, HEADS, 3, GATE))
    q, k, v = normal(n), normal(n, kv_heads), normal(n, kv_heads)
    attend = partial(compiled(bound, n, kv_heads=kv_heads), gate=torch.rand(1, HEADS, 3, n))
    dense = partial(scaled_dot_product_attention, is_causal=True)
    wide = [x.repeat_interleave(HEADS // kv_heads, 1) for x in (k, v)]
    compare("nsa, 2 key heads", passes(attend, (q, k, v)), passes(dense, (q, *wide)), "SDPA", True)


CONTESTS: dict[str, Callable[[], None]] = {
    "memory": memory,
    "linformer": linformer,
    "pools": pools,
    "nsa": nsa,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in options.only:
        CONTESTS[name]()


if __name__ == "__main__":
    main()
