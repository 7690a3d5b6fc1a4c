"""How long a cold `attndsl check` of each example takes, beside the imports that it cannot do without.

    python -m benchmarks.start [name part ...]

Medians of 9 runs, alternating with a process that imports the same libraries and nothing else. lark imports
`interegular` and `regex` where they are installed, as for the tests: 50 to 100 ms that only they pay.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
LIBRARIES = "import click, islpy, lark, numpy, platformdirs"
RUNS = 9
# a first run leaves the compiled modules for the others
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, check=True)
    return time.perf_counter() - start


def main(wanted: list[str]) -> None:
    print(f"{'example':20} {'ms':>5} {'imports':>8} {'ratio':>6}")
    for path in sorted(EXAMPLES.glob("*.attn")):
        if wanted and not any(part in path.stem for part in wanted):
            continue
        check, imports = ("-m", "attndsl", "check", str(path)), ("-c", LIBRARIES)
        seconds(*check)
        pairs = [(seconds(*check), seconds(*imports)) for _ in range(RUNS)]
        ratio = statistics.median(a / b for a, b in pairs)
        ours, theirs = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{path.stem:20} {ours:5.0f} {theirs:8.0f} {ratio:6.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
