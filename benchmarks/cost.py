"""Cost truth: what the backends' cost models predict beside what their forward passes take.

    python -m benchmarks.cost measure FILE [--minutes M] [--only NAME] [--threads T]   appends JSON lines
    python -m benchmarks.cost fit FILE                           constants from every second example
    python -m benchmarks.cost judge FILE [--fitted] [--worst N]  the plugins' constants on the others

Every example (its first attention or pattern, tables drawn at random, 8 heads of 64 or as many as it
needs, float32) at 64, 256, and 1k to 64k tokens with every backend that has counts, where the prediction is
at most `LIMIT` seconds and the memory fits. A timing is the median of three calls after one to warm up, or
one call where that takes over half a second; with `--threads 1` seconds are those of the thread, which other
processes hardly disturb. What is measured already in FILE is not measured again. `fit`
and `judge` count anew, so a changed cost model needs no new timings.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

import attndsl
from attndsl.attention import Attention
from attndsl.backend import Counting, Problem, weighed
from attndsl.bound import Bound
from attndsl.execution import choice, registry
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

PATHS = sorted((Path(__file__).parent.parent / "examples").glob("*.attn"))
TRAINING = {path.stem for path in PATHS[::2]}
LENGTHS = (2**6, 2**8, *(2**i for i in range(10, 17)))
LIMIT, JUDGED, LONG = 7.0, 5.0, 0.5
"""Seconds: of a prediction that is still measured and that is judged, of a call that is not repeated."""
MEMORY = 12 * 2**30
PULL = 0.1
"""How much a constant that is off by all of itself counts, beside timings that are."""
APART = 1.15
"""Two measured times whose order is to be predicted."""

Rng = np.random.Generator


def documents(rng: Rng, n: int) -> np.ndarray[Any, Any]:
    """About 500 tokens in each."""
    return np.sort(rng.integers(0, max(1, n // 500), n))


def spans(rng: Rng, n: int) -> dict[str, Any]:
    """Every image of 64 tokens is seen by the text up to the next."""
    starts = np.sort(rng.integers(0, n, n // 64))
    return {"lo": starts, "hi": np.append(starts[1:], n)}


TABLES: dict[str, Callable[[Rng, int, int], dict[str, Any]]] = {
    "alphafold": lambda rng, n, h: {"z": rng.standard_normal((1, h, n, n), np.float32)},
    "flamingo": lambda rng, n, h: spans(rng, n),
    "graphormer": lambda rng, n, h: {
        "bias": rng.standard_normal((h, 20), np.float32),
        "path": rng.integers(0, 20, (1, n, n)),
    },
    "left_padding": lambda rng, n, h: {"pad": rng.integers(0, n // 4, 1)},
    "packed": lambda rng, n, h: {"doc": documents(rng, n)},
    "paligemma": lambda rng, n, h: {"prompt": rng.integers(0, n // 4, 1)},
    "prefix_lm": lambda rng, n, h: {"prefix": rng.integers(0, n // 2, 1)},
    "shared_prefix": lambda rng, n, h: {
        "doc": documents(rng, n),
        "parent": rng.integers(0, max(1, n // 500), max(1, n // 500)),
    },
    "vsa": lambda rng, n, h: {"chosen": rng.integers(0, n // 64, (1, h, n // 64, 8))},
}
QUADRATIC = {"alphafold": 4 * 8, "graphormer": 8}
"""Bytes of the tables for each pair."""
PARAMETERS: dict[str, Callable[[int], dict[str, int]]] = {
    "natten2d": lambda n: {"side": int(n**0.5)},
    "blockbert": lambda n: {"length": n},
}


@dataclass(frozen=True, eq=False)
class Case:
    """An example at one length; `known` are the tiles that `compile` has before tables are bound."""

    example: str
    attention: Attention
    problem: Problem
    tables: Mapping[str, Any]
    blocks: BlockMask
    known: BlockMask | None

    def counts(self, backend: str) -> Mapping[str, float]:
        return plugin(backend).counts(self.attention, self.problem, self.blocks)

    def supported(self, backend: str) -> bool:
        return choice.declined(plugin(backend), self.attention, self.problem) is None


def plugin(name: str) -> Any:
    return registry.plugin("backends", name)


def backends() -> list[str]:
    return [name for name in registry.names("backends") if isinstance(plugin(name), Counting)]


def first(program: attndsl.Program) -> Bound:
    """Its first attention or pattern that needs no parameters."""
    found = map(program.__getitem__, (*program.attentions, *program.names))
    return next(bound for bound in found if isinstance(bound, Bound))


def alone(path: Path) -> bool:
    """Whether its attention has tiles of its own: no sum, no memory and no choice of keys."""
    attention = first(attndsl.load(path)).attention
    return not (attention.parts or attention.held or attention.selected)


@functools.cache
def case_of(example: str, n: int) -> Case:
    bound = first(attndsl.load(PATHS[0].parent / f"{example}.attn"))
    if example in PARAMETERS:
        bound = bound(**PARAMETERS[example](n))
    attention = bound.attention
    heads = max(8, attention.enough_heads())
    tables = TABLES[example](np.random.default_rng(0), n, heads) if example in TABLES else {}
    sizes = lowering.sizes(attention, n, n, heads)
    arrays = lowering.checked_tables(attention, tables, sizes, head_dim=64)
    blocks = lowering.block_mask(attention, sizes, arrays, 128)
    tabled = any(group.relation.mask.tables for group in attention.groups)
    kept = {} if example in QUADRATIC else tables
    return Case(example, attention, Problem(n, n, 1, heads, heads), kept, blocks, None if tabled else blocks)


def peak(case: Case, backend: str) -> float:
    """Bytes at most, roughly."""
    n, counts = case.problem.length, case.counts(backend)
    dense = {
        "reference": 24 * counts["pairs"],
        "sdpa": 9 * counts["written"] + 32 * n * n * bool(counts.get("cheap")),
    }
    return dense.get(backend, 0.0) + 2 * QUADRATIC.get(case.example, 0) * n * n


def seconds(case: Case, backend: str) -> float:
    p = case.problem
    plan = attndsl.compile(
        case.attention, length=p.length, heads=p.heads, head_dim=p.head_dim, backend=backend
    )
    tables = case.tables
    if case.example in QUADRATIC:
        tables = TABLES[case.example](np.random.default_rng(0), p.length, p.heads)
    plan = plan.bind(**tables)
    q, k, v = (torch.randn(1, p.heads, p.length, p.head_dim) for _ in range(3))

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def once() -> float:
        start = clock()
        plan(q, k, v)
        return clock() - start

    with torch.no_grad():
        warm = once()
        return once() if warm > LONG else statistics.median(once() for _ in range(3))


Row = dict[str, Any]


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(path: Path, minutes: float, only: str | None) -> None:
    done = {(row["example"], row["n"], row["backend"]) for row in rows_of(path)}
    end = time.monotonic() + 60 * minutes
    names = [path.stem for path in PATHS if only in (None, path.stem) and alone(path)]
    for n, example in itertools.product(LENGTHS, names):
        if n * n * QUADRATIC.get(example, 0) > MEMORY / 2:
            continue
        case = case_of(example, n)
        for backend in backends():
            if time.monotonic() > end:
                print("out of time: run again to go on")
                return
            if (example, n, backend) in done or not case.supported(backend):
                continue
            predicted = weighed(plugin(backend).seconds["cpu"], case.counts(backend))
            if predicted > LIMIT or peak(case, backend) > MEMORY:
                continue
            row = {"example": example, "n": n, "backend": backend, "seconds": seconds(case, backend)}
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{example:18} {n:6} {backend:10} {row['seconds']:.4g} s, {predicted:.4g} s predicted")


Constants = dict[str, dict[str, float]]


def fitted(rows: list[Row]) -> Constants:
    """By backend, from the training half: nonnegative constants with the least absolute relative errors, by
    least squares reweighted ten times. What hardly shows in the timings stays near what the plugin has."""
    result: Constants = {}
    for backend in backends():
        present = {name: max(second, 1e-13) for name, second in plugin(backend).seconds["cpu"].items()}
        mine = [row for row in rows if row["backend"] == backend and row["example"] in TRAINING]
        counts = [case_of(row["example"], row["n"]).counts(backend) for row in mine]
        shares = np.array(
            [
                [c[name] * second / row["seconds"] for name, second in present.items()]
                for c, row in zip(counts, mine, strict=True)
            ]
        )
        pull = PULL * np.eye(len(present))
        weight = np.ones(len(mine))
        for _ in range(10):
            found, _ = nnls(np.concatenate([shares * weight[:, None], pull]), np.r_[weight, np.diag(pull)])
            weight = 1 / np.sqrt(np.maximum(np.abs(shares @ found - 1), 0.02))
        result[backend] = dict(zip(present, (found * [*present.values()]).tolist(), strict=True))
    return result


def errors(rows: list[Row], constants: Constants) -> Iterator[tuple[Row, float]]:
    """Each row with its prediction."""
    for row in rows:
        counts = case_of(row["example"], row["n"]).counts(row["backend"])
        yield row, weighed(constants[row["backend"]], counts)


def median_error(pairs: list[tuple[Row, float]]) -> float:
    return statistics.median(abs(p / row["seconds"] - 1) for row, p in pairs) if pairs else float("nan")


def fit(path: Path) -> None:
    rows = rows_of(path)
    constants = fitted(rows)
    for backend, found in constants.items():
        print(backend, {name: float(f"{second:.3g}") for name, second in found.items()})
        mine = list(errors([row for row in rows if row["backend"] == backend], constants))
        for training in (True, False):
            some = [(row, p) for row, p in mine if (row["example"] in TRAINING) == training]
            print(f"  {'fitted' if training else 'others'}: {len(some)}, median {median_error(some):.1%}")


def judge(path: Path, use_fitted: bool, worst: int) -> None:
    rows = rows_of(path)
    constants = fitted(rows) if use_fitted else {name: plugin(name).seconds["cpu"] for name in backends()}
    judged = [(row, p) for row, p in errors(rows, constants) if row["example"] not in TRAINING and p < JUDGED]
    print(f"median relative error: {median_error(judged):.1%} of {len(judged)} predictions under {JUDGED} s")
    for backend in backends():
        mine = [(row, p) for row, p in judged if row["backend"] == backend]
        print(f"  {backend:10} {median_error(mine):.1%} of {len(mine)}")
    places: dict[tuple[str, int], list[tuple[float, float, str]]] = {}
    for row, p in judged:
        places.setdefault((row["example"], row["n"]), []).append((row["seconds"], p, row["backend"]))
    right = [
        (a[0] < b[0]) == (a[1] < b[1])
        for some in places.values()
        for a, b in itertools.combinations(some, 2)
        if max(a[0], b[0]) > APART * min(a[0], b[0])
    ]
    print(f"order: {sum(right)} of {len(right)} right, {sum(right) / max(1, len(right)):.1%}")
    several = {place: some for place, some in places.items() if len(some) > 1}
    best = sum(min(some)[0] for some in several.values())
    taken = sum(min(some, key=lambda x: x[1])[0] for some in several.values())
    print(f"choice with tiles: {taken:.2f} s where the best takes {best:.2f} s, {taken / best - 1:+.1%}")
    taken = sum(before_tables(place, some, constants) for place, some in several.items())
    print(f"choice as compile makes it: {taken:.2f} s, {taken / best - 1:+.1%}")
    ranked = sorted(judged, key=lambda x: -abs(np.log(x[1] / x[0]["seconds"])))
    for row, p in ranked[:worst]:
        print(f"  {row['example']:18} {row['n']:6} {row['backend']:10} {row['seconds']:.4g} s, {p:.4g} said")
    for (example, n), some in several.items():
        if min(some, key=lambda x: x[1])[0] > APART * min(some)[0] and worst:
            print(f"  {example} {n}: {min(some, key=lambda x: x[1])} chosen, {min(some)} best")


def before_tables(
    place: tuple[str, int], some: list[tuple[float, float, str]], constants: Constants
) -> float:
    """Measured seconds of the backend that is cheapest by what `compile` knows."""
    case = case_of(*place)

    def cost(backend: str) -> float:
        return weighed(constants[backend], plugin(backend).counts(case.attention, case.problem, case.known))

    return min(some, key=lambda x: cost(x[2]))[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("measure", "fit", "judge"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", help="one example, by the name of its file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fitted", action="store_true", help="with what fits the training half of FILE")
    parser.add_argument("--worst", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "measure":
        measure(options.file, options.minutes, options.only)
    elif options.what == "fit":
        fit(options.file)
    else:
        judge(options.file, options.fitted, options.worst)


if __name__ == "__main__":
    main()
