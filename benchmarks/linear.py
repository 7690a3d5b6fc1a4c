"""Weights that are inner products of features, beside dense causal SDPA.

    python -m benchmarks.linear [--length 4096] [--only NAME ...]

8 heads of 64, float32, one thread; CPU seconds, runs alternate, medians of five. Nothing is timed that
differs from `reference`. Memory is that of training, as in benchmarks/selections.py. Then the median step of
a session that holds so many tokens, beside one of 4,096.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import attndsl
from attndsl.execution.session import Session
from benchmarks.selections import GATE, HEAD_DIM, HEADS, RUNS, dense, peak, sdpa, seconds, tensors

STEPS, SHORT = 64, 4096


@dataclass(frozen=True)
class Contest:
    """`faster`: how many times than SDPA, forward and with backward, by length. `memory`: how many times
    what SDPA takes, at 4,096."""

    clauses: str
    faster: dict[int, tuple[float, float]]
    memory: float


CONTESTS = {
    "elu + 1": Contest(
        "mask causal  score elu1(Q) @ elu1(K)  norm linear", {4096: (6.5, 8), 16384: (15, 20)}, 1.6
    ),
    "RetNet": Contest(
        "mask causal  score Q @ K  decay (1 - 2 ** (-5.0 - h)) ** (q - k)  norm none",
        {4096: (9, 9), 16384: (30, 30)}, 1.6,
    ),
    "FAVOR+ 256": Contest(
        "mask causal  score favor(Q, orthogonal(256)) @ favor(K, orthogonal(256))  norm linear",
        {4096: (1.8, 1.3), 16384: (4, 3.5)}, 5.0,
    ),
}  # fmt: skip


def plan_of(clauses: str, n: int, backend: str = "linear", training: bool = True) -> attndsl.Plan:
    bound = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    return attndsl.compile(
        bound, length=n, heads=HEADS, head_dim=HEAD_DIM, backend=backend, training=training
    )


def gate(clauses: str) -> None:
    """Raises AssertionError where it is not what `reference` gives."""
    given = tensors(GATE)
    found, exact = (plan_of(clauses, GATE, name, False)(*given) for name in ("linear", "reference"))
    error = float((found - exact).abs().max() / exact.abs().max())
    assert error < 1e-5, f"off by {error}; nothing is timed"


def medians(clauses: str, n: int) -> list[float]:
    """SDPA's and ours, forward; the same with backward."""
    plan, trained, given = plan_of(clauses, n, training=False), plan_of(clauses, n), tensors(n)
    grad = torch.randn_like(given[0])
    runs = (dense, None), (plan, None), (dense, grad), (trained, grad)
    rows = [[seconds(run, given, more) for run, more in runs] for _ in range(RUNS + 1)]
    return [statistics.median(column) for column in zip(*rows[1:], strict=True)]


def steps(clauses: str, lengths: tuple[int, int]) -> list[float]:
    """Seconds of a step of sessions that hold so many tokens."""
    plan = plan_of(clauses, max(lengths) + STEPS * (RUNS + 2), training=False)
    sessions = [plan.session(1, plan.problem.length) for _ in lengths]
    for session, n in zip(sessions, lengths, strict=True):
        session.prefill(*tensors(n))
    new = tensors(1)

    def run(session: Session, *new: Tensor) -> Tensor:
        for _ in range(STEPS):
            out: Tensor = session.step(*new)
        return out

    rows = [[seconds(partial(run, s), new) / STEPS for s in sessions] for _ in range(RUNS)]
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def main(n: int, only: list[str]) -> None:
    torch.set_num_threads(1)
    floor = peak(None, n)
    theirs = peak(sdpa, n) - floor
    print(f"n = {n:,}; SDPA trains in {theirs:,.0f} MiB")
    print(f"{'':12} {'forward':>8} {'SDPA':>6} {'times':>6} {'both':>7} {'SDPA':>6} {'times':>6} "
          f"{'MiB':>6} {'step':>8} {'beside':>7}")  # fmt: skip
    for name in only or CONTESTS:
        contest = CONTESTS[name]
        gate(contest.clauses)
        forward, ours, both, ours_both = medians(contest.clauses, n)
        times = forward / ours, both / ours_both
        memory = peak(partial(plan_of, contest.clauses, n), n) - floor
        short, long = steps(contest.clauses, (SHORT, n))
        slow = any(a < b for a, b in zip(times, contest.faster.get(n, (0, 0)), strict=True))
        slow |= long > 1.15 * short or (n == SHORT and memory > contest.memory * theirs)
        print(
            f"{name:12} {ours:8.3f} {forward:6.2f} {times[0]:6.2f} "
            f"{ours_both:7.2f} {both:6.2f} {times[1]:6.2f} "
            f"{memory:6,.0f} {1e6 * long:5,.0f} us {long / short:6.2f}x{'  TOO SLOW' * slow}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--only", nargs="*", choices=list(CONTESTS), default=[])
    options = parser.parse_args()
    main(options.length, options.only)
