"""Verdicts beside brute force: distinct (program, assertion) pairs, their verdicts and contradictions.

    python -m benchmarks.soundness [pairs, 10,000 if not given]

Programs are random (tests/assertion_programs.py). Proved assertions are tried at 31 lengths up to 64, up to
three numbers of heads and three draws of the tables; every counter-example is checked. Exits 1 on a
contradiction.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

import attndsl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from soundness import LENGTHS, BeyondError, contradiction, pairs

PAIRS = 10_000
SEEDS = 10
"""Programs that one process is given at a time."""
Found = tuple[tuple[str, str], str, bool, bool, str, float]


def judged(first: int) -> list[Found]:
    """Of each pair: itself, its verdict, is it affine, is it over all lengths, how it is wrong, seconds."""
    found = []
    for pair in pairs(range(first, first + SEEDS)):
        start = time.process_time()
        verdict = attndsl.prove(pair.assertion)
        spent = time.process_time() - start
        try:
            wrong = contradiction(pair, verdict, LENGTHS)
        except BeyondError:
            wrong = "beyond"
        found.append((pair.key, verdict.status, pair.claims.affine, pair.quantified, wrong, spent))
    return found


def main(wanted: int) -> int:
    start, proving = time.perf_counter(), 0.0
    seen: set[tuple[str, str]] = set()
    verdicts: Counter[tuple[str, bool, bool]] = Counter()
    wrongs: Counter[str] = Counter()
    with Pool(os.cpu_count()) as pool:
        # a program gives one pair at least, mostly eight
        for found in pool.imap(judged, range(0, wanted, SEEDS)):
            for key, status, affine, quantified, wrong, spent in found:
                if key in seen or len(seen) >= wanted:
                    continue
                seen.add(key)
                verdicts[status, affine, quantified] += 1
                proving += spent
                if wrong:
                    wrongs["beyond" if wrong == "beyond" else "wrong"] += 1
                if wrong and wrong != "beyond":
                    print("CONTRADICTION", *key, status, wrong, sep="\n", flush=True)
            if len(seen) >= wanted:
                break
        pool.terminate()
    print(
        f"{len(seen):,} pairs, {wrongs['wrong']} contradictions, {time.perf_counter() - start:.0f} s; ",
        end="",
    )
    print(f"{proving:.0f} s to prove; {wrongs['beyond']} counter-examples too long to check")
    parts = {"all": (None, None), "affine, every n": (True, True), "not affine, every n": (False, True)}
    parts |= {"numbers at one n": (None, False)}
    for name, (affine, quantified) in parts.items():
        counts = Counter[str]()
        for (status, a, q), number in verdicts.items():
            if affine in (None, a) and quantified in (None, q):
                counts[status] += number
        row = ", ".join(f"{counts[status]:,} {status}" for status in ("proved", "refuted", "undecided"))
        print(f"{name:20} {row} ({100 * counts['undecided'] / max(1, counts.total()):.2f} %)")
    return 1 if wrongs["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS))
