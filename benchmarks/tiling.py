"""CPU time of tiling, on one core, against an allowance of 30 ms and 0.5 us for each entry.

python benchmarks/tiling.py [name part ...]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import sys
import time

import numpy as np

from attndsl.expr import (
    TRUE,
    Expr,
    IntSet,
    absolute,
    all_of,
    any_of,
    const,
    eq,
    floordiv,
    inset,
    le,
    lt,
    maximum,
    minimum,
    mod,
    random_keys,
    sub,
    var,
)
from attndsl.tiling import tile

Q, K = var("q"), var("k")
CAUSAL = le(K, Q)


def between(lo: int, e: Expr, hi: int) -> Expr:
    return all_of(le(const(lo), e), le(e, const(hi)))


def band(lo: int, hi: int) -> Expr:
    return between(lo, sub(K, Q), hi)


def block(b: int) -> Expr:
    return eq(floordiv(Q, const(b)), floordiv(K, const(b)))


def comb(b: int) -> Expr:
    return eq(mod(sub(Q, K), const(b)), const(0))


def grid(height: int, width: int, r: int) -> Expr:
    def near(q: Expr, k: Expr, size: int) -> Expr:
        return le(absolute(sub(k, minimum(maximum(q, const(r)), const(size - 1 - r)))), const(r))

    w = const(width)
    rows = near(floordiv(Q, w), floordiv(K, w), height)
    columns = near(mod(Q, w), mod(K, w), width)
    inside = (between(0, x, height * width - 1) for x in (Q, K))
    return all_of(*inside, rows, columns)


def big_bird(b: int, r: int, n: int) -> Expr:
    q, k, blocks = floordiv(Q, const(b)), floordiv(K, const(b)), n // b
    ends = [eq(x, const(y)) for x in (q, k) for y in (0, blocks - 1)]
    random = random_keys(q, k, const(blocks), const(0), TRUE, r, "i", "j")
    return any_of(between(-1, sub(k, q), 1), *ends, random)


def scattered(r: int, count: int, n: int) -> Expr:
    points = IntSet.of((int(p), int(p)) for p in np.random.default_rng(0).choice(n, count, replace=False))
    return any_of(band(-r, r), inset(Q, points), inset(K, points))


M = 2**20
S = 2**17
PATTERNS: dict[str, tuple[Expr, int]] = {
    "window radius(256)": (band(-256, 256), M),
    "longformer radius(256), global [0]": (any_of(band(-256, 256), eq(Q, const(0)), eq(K, const(0))), M),
    "streaming last(4096) | sinks(4)": (all_of(CAUSAL, any_of(band(-4095, 0), lt(K, const(4)))), M),
    "causal chunk 8192": (all_of(CAUSAL, block(8192)), M),
    "dilated 1024, step 4": (all_of(band(-1024, 1024), comb(4)), M),
    "neighbourhood 1024 x 1024, r = 3": (grid(1024, 1024, 3), M),
    "neighbourhood 1048 x 1000, r = 3": (grid(1048, 1000, 3), 1_048_000),
    "big bird, blocks of 64, r = 3": (big_bird(64, 3, M), M),
    "causal": (CAUSAL, M),
    "prefix lm 1000": (any_of(CAUSAL, lt(K, const(1000))), M),
    "strided(1024)": (all_of(CAUSAL, any_of(band(-1023, 0), comb(1024))), M),
    "fixed(1024, 32)": (all_of(CAUSAL, any_of(block(1024), le(const(992), mod(K, const(1024))))), M),
    "strided(128)": (all_of(CAUSAL, any_of(band(-127, 0), comb(128))), S),
    "fixed(128, 32)": (all_of(CAUSAL, any_of(block(128), le(const(96), mod(K, const(128))))), S),
    "longformer, 64 scattered globals": (scattered(256, 64, M), M),
}


def main(wanted: list[str]) -> None:
    print(f"{'pattern':36} {'entries':>9} {'ms':>8} {'allowed':>8} {'bytes/entry':>11}  tiles")
    for name, (mask, n) in PATTERNS.items():
        if wanted and not any(part in name for part in wanted):
            continue
        times = []
        for _ in range(9):
            start = time.process_time()
            result = tile(mask, n, n, 128, n=n)
            times.append(time.process_time() - start)
        spent, allowed = statistics.median(times) * 1e3, 30 + 0.5e-3 * result.entries
        full, partial, _, unique = result.tiles
        print(
            f"{name:36} {result.entries:9} {spent:8.1f} {allowed:8.1f} {result.nbytes / result.entries:11.1f}"
            f"  {full} full, {partial} partial, {unique} distinct{'' if spent <= allowed else '  TOO SLOW'}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
