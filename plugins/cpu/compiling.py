"""A library of a score by the system's compiler. Where a wheel is built this file is loaded alone, before
anything is installed: it imports Python's own modules and nothing else."""

from __future__ import annotations

import hashlib
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("vectors.h", "functions.h", "pairs.h", "kernel.cpp")]
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fwrapv",
    "-Wno-psabi",
)
"""But for the processor."""
LEVELS = {
    "x86_64": {
        "x86-64-v2": "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3",
        "x86-64-v3": "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave",
        "x86-64-v4": "avx512bw avx512cd avx512dq avx512f avx512vl",
    },
    "aarch64": {"armv8-a": ""},
}
"""Of each machine the processors that there are packaged libraries for, as -march names them, and what each
has more than those before, as Linux names it."""
PACKAGED = Path(__file__).with_name("packaged")
"""The headers of common scores and, in a wheel that was built where there was a compiler, their libraries."""
SECONDS = 120
"""That a compiler may take."""


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def compiled(command: Sequence[str], name: str, score: str, made: Path) -> str | None:
    """Writes the library with one function, by a command without its files, or says why not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "score.h").write_text(score)
        files = (f"-D{name.upper()}", f"-I{folder}", str(SOURCES[-1]), "-o", str(made))
        result = ran([*command, *files])
    if isinstance(result, str):
        return result
    return None if _whole(made.read_bytes()) else f"{command[0]} left half of a library"


def ran(command: Sequence[str]) -> bytes | str:
    """What it prints, or why it failed."""
    try:
        result = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {SECONDS} seconds"
    except OSError as error:
        return f"{command[0]} cannot be run: {error.strerror}"
    if result.returncode:
        lines = result.stderr.decode(errors="replace").splitlines() or [f"exit status {result.returncode}"]
        return f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}"
    return result.stdout


def _whole(library: bytes) -> bool:
    """Whether all that is loaded of a library is there: a process that touches the rest ends. Of formats
    other than ELF of 64 bits nothing is known."""
    if library[:5] != b"\x7fELF\x02":
        return True
    if len(library) < 64:
        return False
    (table,), (size, count) = struct.unpack_from("Q", library, 32), struct.unpack_from("HH", library, 54)
    if table + size * count > len(library):
        return False
    segments = [struct.unpack_from("IIQQQQ", library, table + i * size) for i in range(count)]
    return all(start + stored <= len(library) for _, _, start, _, _, stored in segments)


def packaged() -> Iterator[tuple[str, str]]:
    """Of each packaged library the name of its function and the header of its score."""
    for header in sorted(PACKAGED.glob("*.h")):
        passes = ("backward",) if "backward" in header.name else ("forward", "decode")
        yield from ((name, header.read_text()) for name in passes)


def place(name: str, score: str, level: str) -> Path:
    """Where such a library is: its name says of what sources."""
    parts = (name.encode(), score.encode(), *sources())
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return PACKAGED / f"{key[:32]}-{level}.so"


@cache
def sources() -> tuple[bytes, ...]:
    return tuple(source.read_bytes() for source in SOURCES)
