"""The `cpu` backend beside torch's dense attention: rates per live pair, on one thread.

    python -m benchmarks.kernels [forward training scores threads flex]

Contestants alternate in one process; medians of seven of the thread's seconds, float32, 8 heads of 64. Dense
attention is torch's own at 4,096, forward without a mask and in training with one; a rate above 1 says that a
live pair takes less time than a pair takes there, a training time below 1 less than density times dense.
`flex` compiles FlexAttention, which takes minutes, and takes medians of five.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attndsl
from attndsl import Plan

HEADS, WIDTH, RUNS, DENSE = 8, 64, 7, 4096
FORWARD = {
    "window": "mask radius(256)",
    "bigbird": "mask blocks(64, radius(1) | global([0, n - 1]) | random(3))",
    "longformer": "mask radius(256) | global([0])",
    "causal": "mask causal",
    "dilated": "mask band(-1024 .. 1024, step = 4)",
    "strided": "mask strided(128)",
}
SCORES = {
    "plain": "mask causal & last(1024)",
    "alibi": "mask causal & last(1024) score alibi",
    "t5": "mask causal & last(1024) score t5_causal(z)",
    "softcap": "mask causal & last(1024) score softcap(30.0)",
    "look-up": "mask causal & last(1024) score s + z[(q + k) mod 32]",
}


def alternate(contestants: Mapping[str, Callable[[], object]], runs: int = RUNS) -> dict[str, float]:
    """Median seconds of this thread."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(runs):
        for name, run in contestants.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def tensors(n: int, heads: int = HEADS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, n, WIDTH, generator=generator) for _ in range(4)]


def plan_of(text: str, n: int, backend: str, training: bool = False, heads: int = HEADS) -> Plan:
    attention = attndsl.parse(f"attention a(z = learn[H, 32]) {{ {text} }}")["a"]
    return attndsl.compile(
        attention, length=n, heads=heads, head_dim=WIDTH, backend=backend, training=training
    )


def pairs(plan: Plan) -> int:
    assert plan.block_masks is not None
    return plan.block_masks.nnz * HEADS // plan.block_masks.index.size


def train(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, back: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    attend(*leaves).backward(back)


def forward(n: int = 16_384) -> None:
    q, k, v, _ = tensors(n)
    dense = tensors(DENSE)[:3]
    plans = {
        (name, side): plan_of(text, n, side) for name, text in FORWARD.items() for side in ("cpu", "torch")
    }
    with torch.no_grad():
        found = alternate(
            {"dense": lambda: scaled_dot_product_attention(*dense)}
            | {f"{name} {side}": lambda plan=plan: plan(q, k, v) for (name, side), plan in plans.items()}
            | {"is_causal": lambda: scaled_dot_product_attention(q, k, v, is_causal=True)}
        )
    pair = found["dense"] / (HEADS * DENSE**2)
    for name in FORWARD:
        live = pairs(plans[name, "cpu"])
        rates = {side: live * pair / found[f"{name} {side}"] for side in ("cpu", "torch")}
        more = f"  SDPA is_causal takes {found['is_causal'] / found['causal cpu']:.2f} x" * (name == "causal")
        print(f"forward {name:11} rate over dense: cpu {rates['cpu']:.2f}, torch {rates['torch']:.2f}{more}")


def training() -> None:
    dense, mask = tensors(DENSE), torch.zeros(DENSE, DENSE)
    texts = FORWARD | {name: SCORES[name] for name in ("alibi", "t5", "softcap")}
    for n in (4096, 16_384):
        given = tensors(n)
        plans = {name: plan_of(text, n, "cpu", True) for name, text in texts.items()}
        modules = {name: plan.module() for name, plan in plans.items()}
        runs: dict[str, Callable[[], object]] = {
            name: partial(train, module, *given) for name, module in modules.items()
        }
        runs["dense"] = partial(train, partial(scaled_dot_product_attention, attn_mask=mask), *dense)
        found = alternate(runs)
        pair = found["dense"] / (HEADS * DENSE**2)
        for name, plan in plans.items():
            print(f"training {name:11} at {n:,}: {found[name] / (pairs(plan) * pair):.2f} of density x dense")


def scores(n: int = 8192) -> None:
    q, k, v, _ = tensors(n)
    modules = {name: plan_of(text, n, "cpu").module() for name, text in SCORES.items()}
    with torch.no_grad():
        found = alternate({name: partial(module, q, k, v) for name, module in modules.items()})
    for name in SCORES:
        print(f"score {name:9} {found[name] / found['plain']:.2f} x plain")


def threads() -> None:
    """One head on two threads beside one, by the wall; and 2^20 tokens beside a matrix product."""
    for n, text in ((16_384, "mask causal"), (2**20, "mask radius(256)")):
        q, k, v, back = tensors(n, 1)
        plan = plan_of(text, n, "cpu", True, heads=1)
        wall = {}
        for count in (1, 2):
            torch.set_num_threads(count)
            each = []
            for _ in range(3):
                start = time.perf_counter()
                train(plan, q, k, v, back)
                each.append(time.perf_counter() - start)
            wall[count] = min(each)
        print(f"threads {text} at {n:,}: two take 1/{wall[1] / wall[2]:.2f} of one, forward and backward")
    a = torch.randn(2048, 2048)
    with torch.no_grad():
        plan, each = plan_of("mask radius(256)", 2**20, "cpu", heads=1), {"plan": [], "sgemm": []}
        for _ in range(3):
            for name, run in (("plan", lambda: plan(q, k, v)), ("sgemm", lambda: [a @ a for _ in range(10)])):
                start = time.perf_counter()
                run()
                each[name].append(time.perf_counter() - start)
    assert plan.block_masks is not None
    rates = 4 * WIDTH * plan.block_masks.nnz / min(each["plan"]), 10 * 2 * 2048**3 / min(each["sgemm"])
    print(
        f"2^20 tokens, window, two threads: {rates[0] / rates[1]:.2f} of sgemm ({rates[1] / 1e9:.0f} GFLOP/s)"
    )


def flex(n: int = 16_384) -> None:
    """Beside compiled FlexAttention: with tiles and bits of `to_flex`, and with the same lists and a mod."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, _ = tensors(n)
    plan, attend = plan_of(FORWARD["window"], n, "cpu"), torch.compile(flex_attention)
    tiles = plan.to_flex().block_mask
    mods = attndsl.create_block_mask(lambda b, h, q, k: (q - k).abs() <= 256, None, None, n, n, device="cpu")
    with torch.no_grad():
        out = plan(q, k, v)
        for mask in (tiles, mods):
            torch.testing.assert_close(attend(q, k, v, block_mask=mask), out, atol=1e-4, rtol=1e-4)
        found = alternate(
            {
                "cpu": lambda: plan(q, k, v),
                "tiles": lambda: attend(q, k, v, block_mask=tiles),
                "mod": lambda: attend(q, k, v, block_mask=mods),
            },
            runs=5,
        )
    rates = ", ".join(f"{found[name] / found['cpu']:.2f} x with its {name}" for name in ("tiles", "mod"))
    print(f"window at {n:,}: cpu {found['cpu']:.3f} s; compiled FlexAttention takes {rates}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("forward", "training", "scores", "threads", "flex"):
        globals()[name]()
