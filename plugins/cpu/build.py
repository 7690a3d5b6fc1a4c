"""The kernels as a library of this machine: compiled once by its compiler, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import torch

SOURCES = [Path(__file__).with_name(name) for name in ("vectors.h", "functions.h", "pairs.h", "kernel.cpp")]
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fwrapv",
    "-Wno-psabi",
)
SECONDS = 120
"""That a compiler may take."""
MISSING = "there is no C++ compiler (c++, g++ or clang++)"


def compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


@cache
def library(score: str, name: str, defined: tuple[str, ...] = ()) -> Any:
    """The function `forward`, `backward` or `decode` for a score (header of Score.code) and with `DOUBLE` or
    `NARROW` defined, or why there is none."""
    made_by = compiler()
    if made_by is None:
        return MISSING
    known = _machine(made_by)
    if isinstance(known, str):
        return known
    kept = _kept()
    if isinstance(kept, str):
        return kept
    command = [made_by, *FLAGS, *(f"-D{macro}" for macro in (name.upper(), *defined))]
    parts = (*(source.read_bytes() for source in SOURCES), score.encode(), " ".join(command).encode(), known)
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    found, digest = kept / f"{key}.so", kept / f"{key}.sha256"
    if not (found.exists() and digest.exists() and digest.read_bytes() == _digest(found)):
        reason = _compiled(command, score, found, digest)
        if reason is not None:
            return reason
    _forked_children_run_alone()
    try:
        return getattr(ctypes.CDLL(str(found)), name)
    except OSError as error:
        digest.unlink(missing_ok=True)
        return f"what {made_by} made cannot be loaded: {error}"


@cache
def _machine(made_by: str) -> bytes | str:
    """What -march=native stands for here, and the compiler's version."""
    return _run([made_by, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])


@cache
def _forked_children_run_alone() -> None:
    """They would wait for ever for the threads that they do not have, in torch's operators as in ours."""
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def _kept() -> Path | str:
    """The folder of the libraries, which nobody else can write to, or why there is none."""
    folder = platformdirs.user_cache_path("attndsl") / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder} cannot be made: {error.strerror}"
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{folder} can be written to by others"
    return folder


def _compiled(command: list[str], score: str, found: Path, digest: Path) -> str | None:
    """Writes both, or says why not. Whoever else compiles the same at the same time writes the same."""
    try:
        with tempfile.TemporaryDirectory(dir=found.parent) as folder:
            made, said = Path(folder, found.name), Path(folder, digest.name)
            Path(folder, "score.h").write_text(score)
            asked = [*command, "-fopenmp", f"-I{folder}", str(SOURCES[-1]), "-o", str(made)]
            result = _run(asked)
            if isinstance(result, str):
                # without threads
                result = _run([part for part in asked if part != "-fopenmp"])
            if isinstance(result, str):
                return result
            said.write_bytes(_digest(made))
            made.replace(found)
            said.replace(digest)
    except OSError as error:
        return f"{found.parent} cannot be written: {error.strerror}"
    return None


def _run(command: list[str]) -> bytes | str:
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


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()
