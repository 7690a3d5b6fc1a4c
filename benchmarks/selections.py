"""Keys chosen by content, beside dense causal SDPA.

    python -m benchmarks.selections [--length 16384] [--only NAME ...] [--reformer]

8 heads of 64, float32, one thread; CPU seconds, choices included, runs alternate, medians of five. Nothing is
timed that differs from SDPA with the mask of what was chosen, or, with `--reformer`, from what transformers
makes of the same pieces (tests/oracle/test_reformer.py). Peak memory is that of a process of its own
that runs forward and backward, over that of one that holds q, k and v.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
ORDERS = {
    "lsh, multiset": Contest("mask lsh(rounds = 4, chunk = 64, count = true) - ~causal", (3.5, 4.5)),
    "lsh": Contest("mask causal & lsh(rounds = 4, chunk = 64)", (2.5, 3.2)),
    "labels 64": Contest("mask causal & within(hash(64), last(64))", (3.5, 4.5)),
    "routing 256": Contest("inputs mu : float[H, CLUSTERS, D]  mask causal & cluster(mu, 256)", (3.5, 0.0)),
}
"""CLUSTERS are as many as hold each key once."""
CONTESTS = {**LISTS, **ORDERS}
REFORMER = """mask lsh(rounds = 4, chunk = 64, count = true, wrap = true) - ~causal
    score where(q == k, -100000.0, Q @ K / sqrt(K @ K + D * 0.000001))"""
BESIDE_REFORMER = {4096: (3.0, 3.0), 16384: (3.5, 3.0)}


def tensors(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, n, HEAD_DIM) for _ in range(3)]


def attention_of(clauses: str, n: int) -> attndsl.Bound:
    text = clauses.replace("CLUSTERS", str(n // 256))
    return attndsl.parse(f"attention a {{ {text} }}")["a"]()


def plan_of(clauses: str, n: int) -> attndsl.Plan:
    plan = attndsl.compile(
        attention_of(clauses, n), length=n, heads=HEADS, head_dim=HEAD_DIM, backend="torch", training=True
    )
    return plan.bind(mu=torch.randn(HEADS, n // 256, HEAD_DIM)) if "inputs mu" in clauses else plan


def gate(clauses: str) -> None:
    """Raises AssertionError where it is not what SDPA makes of the same choice."""
    plan, (q, k, v) = plan_of(clauses, GATE), tensors(GATE)
    chosen = {**plan.tables, **plan.choices(q, k)}
    counts = torch.from_numpy(attention_of(clauses, GATE).counts(GATE, heads=HEADS, **chosen))
    # a row without keys, of which SDPA makes NaN, is 0
    wanted = scaled_dot_product_attention(q, k, v, attn_mask=counts.float().log()).nan_to_num(0.0)
    error = float((plan(q, k, v) - wanted).abs().max())
    assert error < 1e-5, f"off by {error}; nothing is timed"


def seconds(run: Callable[..., Tensor], given: list[Tensor], grad: Tensor | None = None) -> float:
    leaves = [x.clone().requires_grad_(grad is not None) for x in given]
    start = time.process_time()
    out = run(*leaves)
    if grad is not None:
        out.backward(grad)
    return time.process_time() - start


dense = partial(scaled_dot_product_attention, is_causal=True)


def reformer(n: int) -> Callable[..., Tensor]:
    """Transformers' attention without its projections, of q and v as here; it hashes for itself."""
    from transformers.models.reformer.configuration_reformer import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        attention_head_size=HEAD_DIM, num_attention_heads=HEADS, hidden_size=HEADS * HEAD_DIM,
        lsh_attn_chunk_length=64, lsh_attention_probs_dropout_prob=0.0, num_hashes=4, num_buckets=None,
        max_position_embeddings=n, is_decoder=True, hash_seed=0,
    )  # fmt: skip
    attention = LSHSelfAttention(config)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention.query_key, attention.value = (lambda _: merged(q)), (lambda _: merged(v))
        found: Tensor = attention(merged(q)).hidden_states
        return found.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)

    del attention.query_key, attention.value
    return run


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def beside_reformer(n: int) -> None:
    plan, theirs, given = plan_of(REFORMER, n), reformer(n), tensors(n)
    grad = torch.randn_like(given[0])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = plan(q, q, v)
        return out

    runs = [
        [seconds(run, given, more) for more in (None, grad) for run in (ours, theirs)]
        for _ in range(RUNS + 1)
    ]
    mine, hf, mine_both, hf_both = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    floor = peak(None, n)
    memory = [peak(make, n) - floor for make in (partial(plan_of, REFORMER, n), partial(reformer, n))]
    times = hf / mine, hf_both / mine_both
    slow = any(a < b for a, b in zip(times, BESIDE_REFORMER.get(n, (0.0, 0.0)), strict=True))
    slow |= n == 4096 and memory[0] > memory[1] / 4
    print(
        f"transformers {hf:.2f} / {hf_both:.2f}, ours {mine:.2f} / {mine_both:.2f}: {times[0]:.2f} and "
        f"{times[1]:.2f} times as fast; {memory[1]:,.0f} and {memory[0]:,.0f} MiB{'  TOO SLOW' * slow}"
    )


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


def peak(make: Callable[[], Callable[..., Tensor]] | None, n: int) -> float:
    """MiB of a process that holds q, k and v and trains what is made; None trains nothing."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: float = pool.apply(_peak, (make, n))
        return found


def _peak(make: Callable[[], Callable[..., Tensor]] | None, n: int) -> float:
    torch.set_num_threads(1)
    given = tensors(n)
    grad = torch.randn_like(given[0])
    if make is not None:
        seconds(make(), given, grad)
    # that of getrusage begins with what the process that started this one had
    (found,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(found.split()[1]) / 1024


def sdpa() -> Callable[..., Tensor]:
    return dense


def main(n: int, only: list[str]) -> None:
    torch.set_num_threads(1)
    floor = peak(None, n)
    print(f"n = {n:,}; SDPA trains in {peak(sdpa, n) - floor:,.0f} MiB")
    print(f"{'chosen':14} {'forward':>8} {'SDPA':>6} {'times':>6} {'both':>7} {'SDPA':>6} {'times':>6} "
          f"{'choice':>7} {'rest / SDPA':>12} {'MiB':>6}")  # fmt: skip
    for name in only or CONTESTS:
        contest = CONTESTS[name]
        gate(contest.clauses)
        theirs, ours, theirs_both, ours_both, choice = medians(contest.clauses, n)
        times, rest = (theirs / ours, theirs_both / ours_both), (ours - choice) / theirs
        memory = peak(partial(plan_of, contest.clauses, n), n) - floor
        slow = n == 16384 and any(found < asked for found, asked in zip(times, contest.faster, strict=True))
        slow |= any(n == length and rest > allowed for length, allowed in contest.attending)
        print(
            f"{name:14} {ours:8.2f} {theirs:6.2f} {times[0]:6.2f} {ours_both:7.2f} {theirs_both:6.2f} "
            f"{times[1]:6.2f} {choice:7.2f} {rest:12.2f} {memory:6,.0f}"
            f"{'  TOO SLOW' * slow}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--only", nargs="*", choices=list(CONTESTS), default=[])
    parser.add_argument("--reformer", action="store_true")
    options = parser.parse_args()
    if options.reformer:
        beside_reformer(options.length)
    else:
        main(options.length, options.only)
