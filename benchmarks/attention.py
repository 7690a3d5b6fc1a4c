"""Block sparse attention beside torch's own: python benchmarks/attention.py [--length N] [--only NAME].

Every pair of contestants alternates within one run; medians of nine and the spread between quartiles are
reported, after a gate: on sampled rows the outputs must agree with dense attention, or nothing is timed.
Peak memory is measured in a process of its own. With `--threads 1` seconds are those of the thread, which
other processes on the machine hardly disturb.

What was tried for the window (8 heads of 64, float32, two cores with AVX-512; seconds of one thread):
forward in bands of 16, 32, 64, 128, 256 rows at n = 16384: 0.276, 0.264, 0.268, 0.319, 0.345;
backward at n = 4096 by torch's fused kernel, all at once, in bands of 32, 64, 128, 256 rows: 0.270, 0.208,
0.188, 0.203; by eight problems, which reuse memory: 0.164, 0.167 (64, 128 rows). From matrix products that
keep the weights: 0.190 where each chunk takes fresh memory, less than by the fused kernel (7 to 20 %) where
all use the same, with exp2 in place of exp (0.17 ns a weight beside 0.6, and 2 to 5 where it vanishes) and
bands of 128 rows (64 and 96 rows 5 to 10 % slower). Every parallel region ends in a barrier, which on a
busy machine costs a time slice, so few large calls matter more than the work they do: masks are made once,
a merge is one `lerp`, and every m-th window together gives keys' gradients that are added without overlap.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import attndsl

MECHANISMS = {
    "window": "mask radius(256)",
    "longformer": "mask radius(256) | global([0])",
    "bigbird": "mask blocks(64, radius(1) | global([0, n - 1]) | random(3))",
    "dilated": "mask band(-1024 .. 1024, step = 4)",
    "alibi": "mask causal & last(512) score alibi",
    "softcap": "mask causal & last(512) score softcap(30.0)",
}
FLEX = ("window", "longformer", "bigbird", "dilated")
HEADS, HEAD_DIM, RUNS = 8, 64, 9
Thunk = Callable[[], object]


def alternate(contestants: dict[str, Thunk]) -> dict[str, list[float]]:
    """Seconds of each, in turn, after one run to warm up."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(RUNS):
        for name, run in contestants.items():
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return seconds


def plan_of(name: str, length: int, training: bool) -> attndsl.Plan:
    attention = attndsl.parse(f"attention a {{ {MECHANISMS[name]} }}")["a"]
    return attndsl.compile(
        attention, length=length, heads=HEADS, head_dim=HEAD_DIM, backend="torch", training=training
    )


def tensors(length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, HEAD_DIM) for _ in range(4)]


def gate(name: str, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Sixteen rows against `reference`, each as a single query at its own position."""
    attention = attndsl.parse(f"attention a {{ {MECHANISMS[name]} }}")["a"]
    n = k.shape[2]
    plan = attndsl.compile(
        attention, length=n, q_length=1, heads=HEADS, head_dim=HEAD_DIM, backend="reference"
    )
    for row in torch.linspace(0, n - 1, 16).long().tolist():
        expected = plan(q[:, :, row : row + 1], k, v, q_offset=row)
        error = float((expected - out[:, :, row : row + 1]).abs().max())
        assert error < 1e-4, f"{name}: row {row} is off by {error}; nothing is timed"


def summary(seconds: list[float]) -> str:
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{statistics.median(seconds):8.4f} s [{low:.4f} .. {high:.4f}]"


def forward(name: str, length: int) -> None:
    """Forward of a mechanism, beside compiled FlexAttention where the score is plain."""
    q, k, v, _ = tensors(length)
    plan = plan_of(name, length, training=False)
    gate(name, plan(q, k, v), q, k, v)
    contestants: dict[str, Thunk] = {"attndsl": lambda: plan(q, k, v)}
    assert plan.block_masks is not None
    if name in FLEX:
        if name == "window":
            mask = create_block_mask(
                lambda b, h, i, j: (i - j).abs() <= 256, None, None, length, length, device="cpu"
            )
        else:
            mask = plan.block_masks.to_flex()
        compiled = torch.compile(flex_attention)
        contestants["flex"] = lambda: compiled(q, k, v, block_mask=mask)
    with torch.no_grad():
        seconds = alternate(contestants)
    live = plan.block_masks.nnz * HEADS // plan.block_masks.index.size
    for side, values in seconds.items():
        rate = 4 * live * HEAD_DIM / statistics.median(values) / 1e9
        print(f"{name:11} forward  {side:8} {summary(values)} {rate:6.1f} GFLOP/s of live pairs")
    if "flex" in seconds:
        ratios = [b / a for a, b in zip(seconds["attndsl"], seconds["flex"], strict=True)]
        print(f"{name:11} flex / attndsl, run by run: median {statistics.median(ratios):.2f}")


def backward(name: str, length: int) -> None:
    """Forward and backward beside dense SDPA with the mask, scaled by the mask's density."""
    q, k, v, grad = tensors(length)
    plan = plan_of(name, length, training=True)
    assert plan.block_masks is not None
    mask = torch.from_numpy(plan.block_masks.to_dense())
    addend = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def train(attend: Callable[..., torch.Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        attend(*leaves).backward(grad)

    seconds = alternate(
        {
            "attndsl": lambda: train(plan),
            "dense": lambda: train(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=addend)),
        }
    )
    density = plan.block_masks.density
    for side, values in seconds.items():
        print(f"{name:11} training {side:8} {summary(values)}")
    ratios = [a / (b * density) for a, b in zip(seconds["attndsl"], seconds["dense"], strict=True)]
    print(f"{name:11} attndsl / (dense * density), run by run: median {statistics.median(ratios):.2f}")


def peak() -> float:
    """MiB that this process has held at most; unlike ru_maxrss it starts afresh with the program."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory(length: int) -> None:
    """Prints the peak of forward and backward above what the inputs and the plan took."""
    q, k, v, grad = tensors(length)
    plan = plan_of("window", length, training=True)
    before = peak()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plan(*leaves).backward(grad)
    print(peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--train-length", type=int, default=4096)
    parser.add_argument("--only", choices=MECHANISMS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        memory(options.memory)
        return
    names = [options.only] if options.only else list(MECHANISMS)
    # training first: what FlexAttention's compiler leaves in the process slows it down by a tenth
    for name in names:
        backward(name, options.train_length)
    for name in names:
        forward(name, options.length)
    for length in (4096, 16384, 65536):
        child = subprocess.run(
            [sys.executable, __file__, "--memory", str(length)], capture_output=True, text=True, check=True
        )
        print(
            f"window      training peak at {length:6}: {float(child.stdout):8.1f} MiB beyond inputs and plan"
        )


if __name__ == "__main__":
    main()
