"""Lists of keys that are new at every call, beside dense SDPA that makes its mask of the same lists.

    python -m benchmarks.lists [--training]

Lists of 64 distinct keys for each query; 8 heads of 64, float32, one thread. Runs alternate, and SDPA runs
twice, which tells what a ratio is worth; medians of nine, after a gate: nothing is timed that differs.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attndsl

HEADS, HEAD_DIM, ENTRIES, RUNS = 8, 64, 64, 9
LENGTHS = 512, 1024, 2048
PATTERNS = {
    "for all heads": "inputs keys : int[n, 64] mask { q, k : k in keys[q] }",
    "and causal": "inputs keys : int[n, 64] mask causal & { q, k : k in keys[q] }",
    "for each head": "inputs keys : int[B, H, n, 64] mask { q, k : k in keys[q] }",
}
ALLOWED = {512: 1.3, 1024: 1.0, 2048: 1.0}
"""Beside SDPA, forward."""


def lists(name: str, n: int) -> Tensor:
    lead = (1, HEADS) if name == "for each head" else ()
    return torch.rand(*lead, n, n).topk(ENTRIES).indices


def dense(name: str, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    mask = torch.zeros((*keys.shape[:-1], k.shape[2]), dtype=torch.bool).scatter_(-1, keys, True)
    if name == "and causal":
        mask = mask.tril()
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def contest(name: str, n: int, training: bool) -> tuple[list[float], list[float], list[float]]:
    """Seconds of ours, of SDPA, and of SDPA again."""
    attention = attndsl.parse(f"attention a {{ {PATTERNS[name]} }}")["a"]
    plan = attndsl.compile(attention, length=n, heads=HEADS, head_dim=HEAD_DIM, training=training)
    q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM, requires_grad=training) for _ in range(3))
    grad = torch.randn(1, HEADS, n, HEAD_DIM)

    def ours(keys: Tensor) -> Tensor:
        out: Tensor = plan(q, k, v, keys=keys)
        return out

    def theirs(keys: Tensor) -> Tensor:
        return dense(name, q, k, v, keys)

    def seconds(attend: Callable[[Tensor], Tensor], keys: Tensor) -> float:
        start = time.perf_counter()
        out = attend(keys)
        if training:
            out.backward(grad)
        return time.perf_counter() - start

    keys = lists(name, n)
    error = float((ours(keys) - theirs(keys)).detach().nan_to_num().abs().max())
    assert error < 1e-4, f"{name}: off by {error}; nothing is timed"
    rows = [[seconds(attend, keys) for attend in (ours, theirs, theirs)] for keys in fresh(name, n)]
    mine, once, again = ([row[i] for row in rows] for i in range(3))
    return mine, once, again


def fresh(name: str, n: int) -> Iterator[Tensor]:
    for _ in range(RUNS):
        yield lists(name, n)


def ratio(these: list[float], those: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(these, those, strict=True))


def main(training: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'lists':14} {'n':>5} {'ms':>7} {'SDPA ms':>8} {'ratio':>6} {'SDPA twice':>11}")
    for name, n in itertools.product(PATTERNS, LENGTHS):
        mine, once, again = contest(name, n, training)
        late = "  TOO SLOW" * (not training and ratio(mine, once) > ALLOWED[n])
        ms = [1e3 * statistics.median(side) for side in (mine, once)]
        print(
            f"{name:14} {n:5} {ms[0]:7.2f} {ms[1]:8.2f} {ratio(mine, once):6.2f} "
            f"{ratio(again, once):11.2f}{late}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--training", action="store_true")
    main(parser.parse_args().training)
