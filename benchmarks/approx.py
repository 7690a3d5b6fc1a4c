"""What has no weights of pairs, beside full SDPA.

    python -m benchmarks.approx [--length 4096] [--only NAME ...]

8 heads of 64, float32, one thread; CPU seconds, runs alternate, medians of five. Nothing is timed that
differs from `reference` in float64 at a shorter length.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attndsl

HEADS, HEAD_DIM, RUNS, GATE = 8, 64, 5, 1000
CONTESTS = {"nystrom 64": ("approx nystrom(64)", (15.0, 15.0)), "shen": ("approx shen", (15.0, 15.0))}
"""Clauses, and how many times faster they are to be than SDPA at 4,096, forward and with backward."""


def tensors(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, n, HEAD_DIM) for _ in range(3)]


def plan_of(clauses: str, n: int, **options: str) -> attndsl.Plan:
    bound = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    return attndsl.compile(bound, length=n, heads=HEADS, head_dim=HEAD_DIM, training=True, **options)


def gate(clauses: str) -> None:
    q, k, v = tensors(GATE)
    exact = plan_of(clauses, GATE, dtype="float64", backend="reference")(q.double(), k.double(), v.double())
    error = (plan_of(clauses, GATE)(q, k, v) - exact).abs().max().item()
    if not error < 1e-5:
        raise SystemExit(f"`{clauses}` is off by {error:.2g}: no times")


def passes(attend: Callable[..., Tensor], n: int) -> list[Callable[[], object]]:
    """Forward, and forward with backward."""
    q, k, v = tensors(n)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    slope = torch.randn(1, HEADS, n, HEAD_DIM)
    return [lambda: attend(q, k, v), lambda: torch.autograd.grad(attend(*leaves), leaves, slope)]


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=CONTESTS, default=list(CONTESTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    below = []
    for name in options.only:
        clauses, wanted = CONTESTS[name]
        gate(clauses)
        sides = zip(
            passes(plan_of(clauses, options.length), options.length),
            passes(scaled_dot_product_attention, options.length),
            ("forward", "forward and backward"),
            wanted,
            strict=True,
        )
        for mine, dense, what, least in sides:
            for run in (mine, dense):
                run()
            rows = [(seconds(mine), seconds(dense)) for _ in range(RUNS)]
            ours, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{name:12} {what:22} {ours:.4f} s  SDPA {theirs:.4f} s  {theirs / ours:.1f} x")
            if options.length == 4096 and theirs < least * ours:
                below.append(f"{name}, {what}: {theirs / ours:.1f} x, and {least} x is asked")
    if below:
        raise SystemExit("\n".join(below))


if __name__ == "__main__":
    main()
