"""Keys chosen by content, beside dense causal SDPA.

    python -m benchmarks.selections [--length 16384] [--only NAME ...]

8 heads of 64, float32, one thread; CPU seconds, choices included, runs alternate, medians of five. Nothing is
timed that differs from SDPA with the mask of what was chosen. Peak memory is that of a process of its own
that runs forward and backward, over that of one that holds q, k and v.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attndsl

HEADS, HEAD_DIM, RUNS, GATE = 8, 64, 5, 1024


@dataclass(frozen=True)
class Contest:
    """`faster`: how many times than SDPA at 16,384, forward and with backward. `attending`: the part of the
    forward pass of SDPA that is allowed to what follows the choice, by length."""

    clauses: str
    faster: tuple[float, float] = (0.0, 0.0)
    attending: tuple[tuple[int, float], ...] = ()


LISTS = {
    "blocks 512, 3": Contest(
        "mask causal & (block(512) | topk(3, of = blocks(512, causal - radius(0)), by = Q @ mean(K)))",
        (2.8, 3.3),
    ),
    "blocks 64, 16": Contest(
        "mask causal & (block(64) | topk(16, of = blocks(64, causal - radius(0)), by = Q @ mean(K)))",
        (1.5, 2.3),
    ),
    "tiles 64, 16": Contest("mask causal & blocks(64, radius(0) | topk(16, of = causal - radius(0)))"),
    "tokens 64": Contest("mask topk(64, of = causal)", (0.0, 0.9), ((4096, 0.35), (16384, 0.25))),
}
CONTESTS = {**LISTS}


def tensors(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, n, HEAD_DIM) for _ in range(3)]


def plan_of(clauses: str, n: int) -> attndsl.Plan:
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    return attndsl.compile(
        attention, length=n, heads=HEADS, head_dim=HEAD_DIM, backend="torch", training=True
    )


def gate(clauses: str) -> None:
    """Raises AssertionError where it is not what SDPA makes of the same choice."""
    plan, (q, k, v) = plan_of(clauses, GATE), tensors(GATE)
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    mask = torch.from_numpy(attention.mask(GATE, heads=HEADS, **plan.choices(q, k)))
    error = float((plan(q, k, v) - scaled_dot_product_attention(q, k, v, attn_mask=mask)).abs().max())
    assert error < 1e-5, f"off by {error}; nothing is timed"


def seconds(run: Callable[..., Tensor], given: list[Tensor], grad: Tensor | None = None) -> float:
    leaves = [x.clone().requires_grad_(grad is not None) for x in given]
    start = time.process_time()
    out = run(*leaves)
    if grad is not None:
        out.backward(grad)
    return time.process_time() - start


dense = partial(scaled_dot_product_attention, is_causal=True)


def medians(clauses: str, n: int) -> tuple[float, ...]:
    """SDPA's and ours, forward; the same with backward; and what the choice takes."""
    plan, given = plan_of(clauses, n), tensors(n)
    grad = torch.randn_like(given[0])

    def choose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan.choices(q, k)
        return q

    seconds(plan, given)
    rows = [
        (
            seconds(dense, given), seconds(plan, given),
            seconds(dense, given, grad), seconds(plan, given, grad), seconds(choose, given),
        )
        for _ in range(RUNS)
    ]  # fmt: skip
    return tuple(statistics.median(column) for column in zip(*rows, strict=True))


def peak(clauses: str | None, n: int) -> float:
    """MiB of a process that holds q, k and v and trains; `dense` is SDPA, None trains nothing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: float = pool.apply(_peak, (clauses, n))
        return found


def _peak(clauses: str | None, n: int) -> float:
    torch.set_num_threads(1)
    given = tensors(n)
    grad = torch.randn_like(given[0])
    if clauses is not None:
        seconds(dense if clauses == "dense" else plan_of(clauses, n), given, grad)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(n: int, only: list[str]) -> None:
    torch.set_num_threads(1)
    floor = peak(None, n)
    print(f"n = {n:,}; SDPA trains in {peak('dense', n) - floor:,.0f} MiB")
    print(f"{'chosen':14} {'forward':>8} {'SDPA':>6} {'times':>6} {'both':>7} {'SDPA':>6} {'times':>6} "
          f"{'choice':>7} {'rest / SDPA':>12} {'MiB':>6}")  # fmt: skip
    for name in only or CONTESTS:
        contest = CONTESTS[name]
        gate(contest.clauses)
        theirs, ours, theirs_both, ours_both, choice = medians(contest.clauses, n)
        times, rest = (theirs / ours, theirs_both / ours_both), (ours - choice) / theirs
        slow = n == 16384 and any(found < asked for found, asked in zip(times, contest.faster, strict=True))
        slow |= any(n == length and rest > allowed for length, allowed in contest.attending)
        print(
            f"{name:14} {ours:8.2f} {theirs:6.2f} {times[0]:6.2f} {ours_both:7.2f} {theirs_both:6.2f} "
            f"{times[1]:6.2f} {choice:7.2f} {rest:12.2f} {peak(contest.clauses, n) - floor:6,.0f}"
            f"{'  TOO SLOW' * slow}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--only", nargs="*", choices=list(CONTESTS), default=[])
    options = parser.parse_args()
    main(options.length, options.only)
