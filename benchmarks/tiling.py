"""How long an attention takes to become a BlockMask, against 30 ms and 0.5 us for each entry.

    python -m benchmarks.tiling [name part ...]

One core; medians of 9 runs, from the typed attention to the finished tiles, their contents included.
Seconds are of the processor, so that a busy machine does not change them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import time

import numpy as np

import attndsl

M, S = 2**20, 2**17
SCATTERED = sorted(np.random.default_rng(0).choice(M, 64, replace=False).tolist())
ORDER = np.random.default_rng(0).permutation(M // 64).tolist()
PATTERNS: dict[str, tuple[str, int]] = {
    "window": ("radius(256)", M),
    "longformer": ("radius(256) | global([0])", M),
    "streaming": ("causal & (last(4096) | sinks(4))", M),
    "causal chunk": ("causal & block(8192)", M),
    "dilated": ("band(-1024..1024, step = 4)", M),
    "neighbourhood, 1024 wide": ("natten(1024, 1024, 3, 3)", M),
    "neighbourhood, 1000 wide": ("natten(1048, 1000, 3, 3)", 1_048_000),
    "big bird": ("blocks(64, radius(1) | global([0, n - 1]) | random(3))", M),
    "causal": ("causal", M),
    "prefix lm": ("prefix_lm(1000)", M),
    "strided(1024)": ("strided(1024)", M),
    "fixed(1024, 32)": ("fixed(1024, 32)", M),
    "strided(128)": ("strided(128)", S),
    "fixed(128, 32)": ("fixed(128, 32)", S),
    "log-sparse": ("{ q, k : q == k or q > k and 2 ** log2(q - k) == q - k }", M),
    "blocks in a listed order": (f"blocks(64, {{ q, k : {ORDER}[q] == k }})", M),
    "64 scattered globals": (f"radius(256) | global({SCATTERED})", M),
}
BYTES_PER_ENTRY = 64


def main(wanted: list[str]) -> None:
    print(f"{'pattern':26} {'entries':>9} {'ms':>8} {'allowed':>8} {'bytes/entry':>11}")
    for name, (text, n) in PATTERNS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        attention = attndsl.parse(f"pattern p = {text}")["p"]
        times = []
        for _ in range(9):
            start = time.process_time()
            blocks = attention.block_mask(n, 128)
            times.append(time.process_time() - start)
        spent = statistics.median(times) * 1e3
        allowed = 2000 if "scattered" in name else 30 + 0.5e-3 * blocks.entries
        room = blocks.nbytes / blocks.entries
        slow = spent > allowed and "1000 wide" not in name  # no power of two: shown, not asked
        late = "  TOO SLOW" * slow + "  TOO LARGE" * (room > BYTES_PER_ENTRY)
        print(f"{name:26} {blocks.entries:9} {spent:8.1f} {allowed:8.1f} {room:11.1f}{late}")


if __name__ == "__main__":
    main(sys.argv[1:])
