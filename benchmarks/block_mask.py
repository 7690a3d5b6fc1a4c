"""BlockMask against torch's `create_block_mask`: eager at n = 16,384, compiled at n = 65,536.

    python -m benchmarks.block_mask [name part ...]

Both sides make the same tiles, which is checked first; runs alternate and medians of the ratio are
reported. Torch's compilation is not counted. Torch takes seconds and gigabytes, so its first run, which is
checked, counts where nothing is compiled.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

import attndsl

EAGER, COMPILED, RUNS = 16_384, 65_536, 2
REQUIRED = {EAGER: 1000, COMPILED: 100}
MaskMod = Callable[[Any, Any, Any, Any], Any]

LENGTH = [0]
"""The length of the run, for the mask_mods that need it."""
BLOCKS = "radius(1) | global([0, n - 1]) | random(3, of = ~(radius(1) | global([0, n - 1])))"


@functools.cache
def blocks(count: int) -> torch.Tensor:
    return torch.from_numpy(attndsl.parse(f"pattern p = {BLOCKS}")["p"].mask(count)[0])


PATTERNS: dict[str, tuple[str, MaskMod]] = {
    "window": ("radius(256)", lambda b, h, q, k: (q - k).abs() <= 256),
    "longformer": (
        "radius(256) | global([0])",
        lambda b, h, q, k: ((q - k).abs() <= 256) | (q == 0) | (k == 0),
    ),
    "streaming": (
        "causal & (last(4096) | sinks(4))",
        lambda b, h, q, k: (k <= q) & ((q - k < 4096) | (k < 4)),
    ),
    "causal chunk": ("causal & block(8192)", lambda b, h, q, k: (k <= q) & (q // 8192 == k // 8192)),
    "dilated": (
        "band(-1024..1024, step = 4)",
        lambda b, h, q, k: ((q - k).abs() <= 1024) & ((q - k) % 4 == 0),
    ),
    "neighbourhood": (
        "natten(n // 128, 128, 3, 3)",
        lambda b, h, q, k: (
            ((k % 128 - (q % 128).clamp(3, 124)).abs() <= 3)
            & ((k // 128 - (q // 128).clamp(min=3).minimum(torch.tensor(LENGTH[0] // 128 - 4))).abs() <= 3)
        ),
    ),
    "causal": ("causal", lambda b, h, q, k: k <= q),
    "prefix lm": ("prefix_lm(1000)", lambda b, h, q, k: (k <= q) | (k < 1000)),
    "strided": (
        "strided(128)",
        lambda b, h, q, k: (k <= q) & ((q - k < 128) | ((q - k) % 128 == 0)),
    ),
    "fixed": (
        "fixed(128, 32)",
        lambda b, h, q, k: (k <= q) & ((q // 128 == k // 128) | (k % 128 >= 96)),
    ),
    "big bird": (f"blocks(64, {BLOCKS})", lambda b, h, q, k: blocks(LENGTH[0] // 64)[q // 64, k // 64]),
}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare(name: str, n: int, compiled: bool) -> None:
    text, mask_mod = PATTERNS[name]
    LENGTH[0] = n
    attention = attndsl.parse(f"pattern p = {text}")["p"]
    make = torch.compile(create_block_mask) if compiled else create_block_mask

    def theirs() -> Any:
        return make(mask_mod, None, None, n, n, device="cpu", BLOCK_SIZE=128)

    def ours() -> Any:
        return attention.block_mask(n, 128)

    mine = ours()
    first, torchs = seconds(theirs)
    full = int(torchs.full_kv_num_blocks.sum())
    partial = int(torchs.kv_num_blocks.sum())
    assert (mine.tiles.full, mine.tiles.partial) == (full, partial), name
    times = [] if compiled else [first]
    while len(times) < RUNS:
        times.append(seconds(theirs)[0])
    pairs = [(spent, statistics.median(seconds(ours)[0] for _ in range(9))) for spent in times]
    ratios = sorted(a / b for a, b in pairs)
    verdict = "" if ratios[len(ratios) // 2] >= REQUIRED[n] else f"  BELOW {REQUIRED[n]}"
    print(
        f"{name:16} n = {n:6} {'compiled' if compiled else 'eager':8}"
        f" torch {pairs[0][0]:8.3f} s, attndsl {pairs[0][1] * 1e3:7.2f} ms,"
        f" ratio {statistics.median(ratios):8.0f} ({ratios[0]:.0f} to {ratios[-1]:.0f}){verdict}"
    )


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    for n, compiled in ((EAGER, False), (COMPILED, True)):
        for name in PATTERNS:
            if not wanted or any(part in name for part in wanted):
                torch._dynamo.reset()
                compare(name, n, compiled)


if __name__ == "__main__":
    main(sys.argv[1:])
