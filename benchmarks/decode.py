"""Steps of decoding beside torch's SDPA on exactly the live keys.

    python -m benchmarks.decode [name part ...]

Every step has one query and one key more than the step before, in slices of a preallocated cache. Both sides
alternate in one process on one thread, float32 and heads of 64; medians of nine, in microseconds of the
thread, and as a control SDPA beside itself. A gate comes first: both must give the same.

What was tried for one query at 16,384 keys of 8 heads, microseconds: torch's fused kernel 4,815, a product, a
softmax and a product 4,588, that for each head 4,702, SDPA 4,771; for 32 query heads on 4 key heads, eight as
rows of one product, 6,013, 7,099, 6,851, and SDPA with `enable_gqa` 10,874. Reading the keys and values
evicts what Python needs next, so a step that takes 150 us of its own between short ones takes 500 there.

A step of a rolling session, on a busy machine: of a window of 16 keys 205 us, of which the call of the plan
would take 75 were its keys always at the same places, a third of the rest finding which they are; of one of
1,024 keys 345 us (540 while its places were listed one by one), where SDPA takes 120: 2.9 times, and 1.5 were
asked.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import attndsl
from attndsl.tiles import tiling

RUNS, STEPS = 9, 100
WINDOW = "causal & (last(4096) | sinks(4))"


class Case(NamedTuple):
    """A mask, heads, keys, and what a step may take: so many times what SDPA does, or microseconds more.
    `window`: the keys that SDPA gets, None for all."""

    mask: str
    heads: int
    kv_heads: int
    n: int
    window: int | None
    times: float
    more: float


CASES = {
    "window and sinks": Case(WINDOW, 8, 8, 16384, 4100, 1.3, 0),
    "causal, 16,384": Case("causal", 8, 8, 16384, None, 1.2, 0),
    "causal, 4,096": Case("causal", 8, 8, 4096, None, 1.2, 0),
    "causal, 1,024": Case("causal", 8, 8, 1024, None, 1, 60),
    "causal, 64": Case("causal", 8, 8, 64, None, 1, 60),
    "32 heads on 4": Case("causal", 32, 4, 16384, None, 1, 0),
    "window at 4,096": Case("causal & last(1024)", 8, 8, 4096, None, 1, 0),
}


def alternate(sides: list[Callable[[], object]]) -> list[float]:
    """Median microseconds of each, in turn."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(RUNS):
        for side, spent in zip(sides, times, strict=True):
            start = time.thread_time()
            side()
            spent.append(1e6 * (time.thread_time() - start))
    return [statistics.median(spent) for spent in times]


def counted(step: Callable[[], object]) -> int:
    """Searches for tiles in many steps."""
    made, tile = [], tiling.tile
    tiling.tile = lambda *given, **named: made.append(0) or tile(*given, **named)  # type: ignore[func-returns-value]
    for _ in range(STEPS):
        step()
    tiling.tile = tile
    return len(made)


def tried(name: str, case: Case) -> str:
    attention = attndsl.parse(f"attention a {{ mask {case.mask} }}")["a"]
    shared = case.heads != case.kv_heads
    room, length = case.n + 2 * STEPS, case.n
    plan = attndsl.compile(attention, length=room, q_length=1, heads=case.heads, kv_heads=case.kv_heads)
    q, (k, v) = torch.randn(1, case.heads, 1, 64), torch.randn(2, 1, case.kv_heads, room, 64)

    def step() -> torch.Tensor:
        nonlocal length
        length += 1
        output: torch.Tensor = plan(q, k[:, :, :length], v[:, :, :length])
        return output

    def sdpa(mask: torch.Tensor | None = None) -> torch.Tensor:
        keys = slice(length - (case.window if case.window and mask is None else length), length)
        some = k[:, :, keys], v[:, :, keys]
        return scaled_dot_product_attention(q, *some, attn_mask=mask, enable_gqa=shared)

    found = step()
    torch.testing.assert_close(found, sdpa(torch.from_numpy(attention.mask(length, q_length=1))))
    ours, theirs, again = alternate([step, sdpa, sdpa])
    slow = "  TOO SLOW" * (ours > case.times * theirs + case.more)
    return (
        f"{name:18} {plan.backend:9} {ours:7.0f} {theirs:7.0f} {again:7.0f} {ours / theirs:6.2f} "
        f"{ours - theirs:6.0f} {counted(step):7}{slow}"
    )


def rolled() -> str:
    """A step of a session that keeps the window and the sinks alone, beside SDPA on as many keys."""
    n, last, sinks, allowed = 16384, 1024, 4, 1.5
    attention = attndsl.parse(f"attention a {{ mask causal & (last({last}) | sinks({sinks})) }}")["a"]
    plan = attndsl.compile(attention, length=4096, heads=8)
    session = plan.session(1, n + 4 * STEPS)
    k, v = torch.randn(2, 1, 8, n + 1, 64)
    session.prefill(torch.randn(1, 8, n, 64), k[:, :, :n], v[:, :, :n])
    q, new = torch.randn(1, 8, 1, 64), (k[:, :, n:], v[:, :, n:])
    live = [torch.cat([x[:, :, :sinks], x[:, :, -last:]], 2) for x in (k, v)]

    def step() -> torch.Tensor:
        return session.step(q, *new)

    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(q, *live)

    torch.testing.assert_close(step(), sdpa())
    ours, theirs, again = alternate([step, sdpa, sdpa])
    slow = "  TOO SLOW" * (ours > allowed * theirs)
    return (
        f"{'a rolling session':18} {plan.backend:9} {ours:7.0f} {theirs:7.0f} {again:7.0f} "
        f"{ours / theirs:6.2f} {ours - theirs:6.0f} {counted(step):7}{slow}"
    )


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'case':18} {'backend':9} {'step':>7} {'sdpa':>7} {'again':>7} {'ratio':>6} {'more':>6} tilings")
    for name, case in CASES.items():
        if not wanted or any(part in name for part in wanted):
            print(tried(name, case))
    if not wanted or any(part in "a rolling session" for part in wanted):
        print(rolled())


if __name__ == "__main__":
    main(sys.argv[1:])
