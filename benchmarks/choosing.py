"""What choosing keys by content takes, and attending to them, beside what is predicted.

    python -m benchmarks.choosing [--lengths 256 1024 4096] [--only NAME ...] [--runs 5]

8 heads of 64, float32, one thread; CPU seconds, medians over runs that go round all cases of a length.
Attending is what a call of the backend `torch` takes beyond its choice. Of `none`, which chooses nothing, it
tells how much slower than predicted the machine is: beside other work constants come out as much too large.
Prints each prediction beside what was measured, and the constants that fit: of `CHOOSING` in
attndsl/execution/choice.py, and those of plugins/torch/cost.py that tell of lists, orders and blocks, the
others as they are.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

import attndsl
from attndsl.backend import weighed
from attndsl.execution import choice, registry

HEADS, HEAD_DIM = 8, 64
LENGTHS = (256, 512, 1024, 2048, 4096)
INDEXER = "inputs iq : float[B, n, 8, 32]  ik : float[B, n, 32]  w : float[B, n, 8]"
PAGES = "sum(max(Q * min(K), Q * max(K)))"
OVER = "causal - radius(0)"
CASES = {
    "none": "mask causal",
    "tokens 16": "mask topk(16, of = causal)",
    "tokens 64": "mask topk(64, of = causal)",
    "tokens 256": "mask topk(256, of = causal)",
    "tokens kv": "mask topk(64, of = causal, share = kv)",
    "tokens near": "mask topk(32, of = last(256))",
    "tokens full": "mask topk(32)",
    "indexer": f"{INDEXER}  mask topk(64, of = causal, by = w[q] @ max(iq[q] @ ik[k], 0.0))",
    "blocks 16": f"mask causal & (block(16) | topk(16, of = blocks(16, {OVER}), by = Q @ mean(K)))",
    "blocks 64": f"mask causal & (block(64) | topk(4, of = blocks(64, {OVER}), by = Q @ mean(K)))",
    "blocks 256": f"mask causal & (block(256) | topk(3, of = blocks(256, {OVER}), by = Q @ mean(K)))",
    "pages": f"mask causal & (block(16) | topk(16, of = blocks(16, causal - radius(0)), by = {PAGES}))",
    "tiles 64": "mask causal & blocks(64, radius(0) | topk(4, of = causal - radius(0)))",
    "hash 8": "mask causal & within(hash(8), last(64))",
    "hash 64": "mask causal & within(hash(64), last(64))",
    "hash 1024": "mask causal & within(hash(1024), last(64))",
    "nearest 16": "inputs mu : float[H, 16, D]  mask causal & within(nearest(mu), last(64))",
    "nearest 128": "inputs mu : float[H, 128, D]  mask causal & within(nearest(mu), last(64))",
    "lsh 1": "mask causal & lsh(rounds = 1, chunk = 64)",
    "lsh 4": "mask causal & lsh(rounds = 4, chunk = 64)",
    "lsh 4, counted": "mask lsh(rounds = 4, chunk = 64, count = true) - ~causal",
    "cluster 8": "inputs mu : float[H, 8, D]  mask causal & cluster(mu, 128)",
    "cluster 32": "inputs mu : float[H, 32, D]  mask causal & cluster(mu, 32)",
}
ATTENDING = ("merged", "listed", "blocks", "ordered", "scored")
"""Constants of `torch` that are about choices."""
PULL = 0.1
"""How much a constant that is off by all of itself counts, beside timings that are."""

Counts = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One case at one length: seconds and counts of choosing and of attending."""

    name: str
    n: int
    seconds: tuple[float, float]
    counts: tuple[Counts, Counts]


def case(name: str, n: int) -> tuple[list[Callable[[], object]], tuple[Counts, Counts]]:
    """What chooses, and what chooses and attends; their counts."""
    bound = attndsl.parse(f"attention a {{ {CASES[name]} }}")["a"]()
    plan = attndsl.compile(bound, length=n, heads=HEADS, head_dim=HEAD_DIM, backend="torch")
    generator = torch.Generator().manual_seed(n)
    sizes = {"B": 1, "H": HEADS, "n": n, "D": HEAD_DIM}

    def drawn(*axes: str | int) -> Tensor:
        return torch.randn([sizes.get(axis, axis) for axis in axes], generator=generator)  # type: ignore[arg-type]

    plan = plan.bind(**{table.name: drawn(*table.dims) for table in bound.inputs})
    q, k, v = (drawn("B", "H", "n", "D") for _ in range(3))
    chosen: Counter[str] = Counter()
    for _, counts in choice.choices(plan.attention, plan.problem):
        chosen.update({"calls": 1.0, **counts})
    attended = registry.plugin("backends", "torch").counts(plan.attention, plan.problem, None)
    return [lambda: plan.choices(q, k), lambda: plan(q, k, v)], (chosen, attended)


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(names: list[str], n: int, runs: int) -> list[Row]:
    cases = {name: case(name, n) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with torch.no_grad():
        for _ in range(runs + 1):
            for name, (calls, _) in cases.items():
                times[name].append((seconds(calls[0]), seconds(calls[1])))
    rows = []
    for name, (_, counts) in cases.items():
        chosen, whole = (statistics.median(column) for column in zip(*times[name][1:], strict=True))
        rows.append(Row(name, n, (chosen, max(whole - chosen, 1e-6)), counts))
    return rows


def fitted(rows: list[Row], which: int, present: Counts, free: tuple[str, ...]) -> dict[str, float]:
    """Nonnegative constants with the least absolute relative errors, by least squares reweighted ten times;
    what hardly shows in the timings stays near what it is."""
    scale = np.array([max(present[name], 1e-13) for name in free])
    took = np.array([row.seconds[which] for row in rows])
    rest = [weighed({k: s for k, s in present.items() if k not in free}, row.counts[which]) for row in rows]
    counts = np.array([[row.counts[which].get(name, 0.0) for name in free] for row in rows])
    shares, wanted = counts * scale / took[:, None], 1 - np.array(rest) / took
    pull, weight = PULL * np.eye(len(free)), np.ones(len(rows))
    for _ in range(10):
        found, _ = nnls(
            np.concatenate([shares * weight[:, None], pull]), np.r_[wanted * weight, np.diag(pull)]
        )
        weight = 1 / np.sqrt(np.maximum(np.abs(shares @ found - wanted), 0.02))
    return {**present, **dict(zip(free, (found * scale).tolist(), strict=True))}


def told(rows: list[Row], which: int, constants: Counts) -> str:
    ratios = [weighed(constants, row.counts[which]) / row.seconds[which] for row in rows]
    error = statistics.median(abs(ratio - 1) for ratio in ratios)
    worst = max(max(ratio, 1 / ratio) for ratio in ratios)
    return f"median error {error:.0%}, the worst off by {worst:.1f} times"


def main(lengths: list[int], names: list[str], runs: int) -> None:
    torch.set_num_threads(1)
    rows = [row for n in lengths for row in measured(names, n, runs)]
    known = choice.CHOOSING, registry.plugin("backends", "torch").seconds["cpu"]
    for i, (what, free) in enumerate((("choosing", tuple(choice.CHOOSING)), ("attending", ATTENDING))):
        of_choices = [row for row in rows if row.name != "none"]
        found = fitted(of_choices, i, known[i], free)
        print(f"{what:16} {'n':>5} {'ms':>9} {'said':>9} {'fitted':>9}")
        for row in sorted(of_choices if i == 0 else rows, key=lambda row: names.index(row.name)):
            said = (weighed(constants, row.counts[i]) for constants in (known[i], found))
            figures = " ".join(f"{1e3 * x:9.2f}" for x in (row.seconds[i], *said))
            print(f"{row.name:16} {row.n:5} {figures}")
        print(f"{what}: {told(of_choices, i, known[i])}; fitted: {told(of_choices, i, found)}")
        print("   ", {name: float(f"{found[name]:.3g}") for name in free})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="*", default=[*LENGTHS])
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=[])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    main(options.lengths, options.only or [*CASES], options.runs)
