"""CPU time of a cold `attndsl check` of each example beside the imports that it needs: 1.8 x at most.

    python -m benchmarks.start [name part ...]

Medians of 9 runs, alternating with a process that imports the same libraries and nothing else. lark imports
`interegular` and `regex` where they are installed, as for the tests: 50 to 100 ms that only they pay.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

from attndsl import examples

LIBRARIES = "import click, islpy, lark, numpy"
RUNS = 9
# a first run leaves the compiled modules for the others
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def seconds(*arguments: str) -> float:
    """Of CPU time, that of its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(wanted: list[str]) -> None:
    print(f"{'example':20} {'ms':>5} {'imports':>8} {'ratio':>6}")
    for name in dir(examples):
        if wanted and not any(part in name for part in wanted):
            continue
        check, imports = ("-m", "attndsl", "check", f"example:{name}"), ("-c", LIBRARIES)
        seconds(*check)
        pairs = [(seconds(*check), seconds(*imports)) for _ in range(RUNS)]
        ratio = statistics.median(a / b for a, b in pairs)
        ours, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:20} {ours:5.0f} {theirs:8.0f} {ratio:6.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
