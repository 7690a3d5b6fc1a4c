"""The backend `triton` on a GPU: the conformance suite first, and nothing is timed where it is red.

    python -m benchmarks.gpu [SECONDS of the suite, 300 if not given]

Then forward passes, and both passes, beside torch's own attention over all pairs: milliseconds, medians of
RUNS that alternate, in bfloat16. It has not been run yet: there are no figures.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import attndsl
from attndsl.conformance import CASES, check

RUNS = 20
MASKS = {
    "causal": ("mask causal", 8192),
    "window": ("mask causal & last(1024)", 32768),
    "longformer": ("mask radius(256) | global([0, 1])", 32768),
    "alibi": ("mask causal & last(1024) score alibi", 32768),
    "softcap": ("mask causal & last(1024) score softcap(30.0)", 32768),
}


def conforms(seconds: float) -> bool:
    """As many cases as there is time for, in an order of chance that is the same every time."""
    end, done, red = time.monotonic() + seconds, 0, 0
    cases = [case for case in CASES if case.dtype != "float64"]
    for case in random.Random(0).sample(cases, len(cases)):
        if time.monotonic() > end:
            break
        try:
            done += check("triton", case, "cuda") is None
        except (AssertionError, attndsl.AttnError) as error:
            red += 1
            print(f"red: {case}: {error}")
    print(f"{done} cases of {len(cases)} agree, {red} do not")
    return not red


def alternate(sides: list[Callable[[], object]]) -> list[float]:
    """Median milliseconds of each, in turn."""
    spent: list[list[float]] = [[] for _ in sides]
    for _ in range(RUNS + 3):
        for side, times in zip(sides, spent, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            side()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    return [statistics.median(times[3:]) for times in spent]


def timed(name: str, d: int, training: bool) -> None:
    text, n = MASKS[name]
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    sizes: Any = {"length": n, "heads": 8, "head_dim": d, "dtype": "bfloat16", "device": "cuda"}
    plan = attndsl.compile(attention, training=training, backend="triton", **sizes)
    q, k, v, slope = torch.randn(4, 1, 8, n, d, dtype=torch.bfloat16, device="cuda").unbind()
    leaves = [x.requires_grad_(training) for x in (q, k, v)]

    def run(attend: Callable[..., torch.Tensor]) -> object:
        out = attend(*leaves)
        return torch.autograd.grad(out, leaves, slope) if training else out

    dense: Any = lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)  # noqa: E731
    mine, full = alternate([lambda: run(plan), lambda: run(dense)])
    pairs = plan.block_masks.nnz * 8 // plan.block_masks.index.size
    rate = (14 if training else 4) * pairs * d / mine / 1e9
    what = "both passes" if training else "forward"
    print(
        f"{name:10} n {n:6} d {d:3} {what:11} {mine:8.3f} ms, causal SDPA {full:8.3f} ms, {rate:6.1f} TFLOP/s"
    )


def main() -> None:
    if not torch.cuda.is_available():
        print("there is no GPU")
        return
    if not conforms(float(sys.argv[1]) if len(sys.argv) > 1 else 300.0):
        sys.exit("nothing is timed")
    for name in MASKS:
        for d in (64, 128):
            for training in (False, True):
                timed(name, d, training)


if __name__ == "__main__":
    main()
