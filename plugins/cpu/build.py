"""The kernels as libraries: packaged with attndsl for common scores, or compiled once by the compiler of this
machine and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import stat
import tempfile
from collections.abc import Iterable
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import platformdirs
import torch

from . import compiling
from .compiling import LEVELS, PACKAGED, compiled, ran

compiler = compiling.compiler
FLAGS = (*compiling.FLAGS, "-march=native")
MISSING = "there is no C++ compiler (c++, g++ or clang++)"


@cache
def library(score: str, name: str, defined: tuple[str, ...] = ()) -> Any:
    """The function `forward`, `backward` or `decode` for a score (a header, as `code` of score.py has it),
    with `DOUBLE` or `NARROW` defined, or why there is none."""
    there = packaged(score, name, defined)
    found = None if there is None else _loaded(there, name)
    if found is None or (isinstance(found, str) and compiler()):
        made = _made(score, name, defined)
        found = made if isinstance(made, str) else _loaded(made, name)
    return found


def lacking(asked: Iterable[tuple[str, str, tuple[str, ...]]]) -> str | None:
    """Why one of these cannot be had where there is no compiler."""
    if all(packaged(*one) for one in asked):
        return None
    some = any(PACKAGED.glob("*.so"))
    return f"{MISSING}, and of the packaged kernels none has this score" if some else MISSING


def packaged(score: str, name: str, defined: tuple[str, ...]) -> Path | None:
    """The best that this processor runs."""
    places = [] if defined else [compiling.place(name, score, level) for level in levels()]
    return next(filter(Path.exists, places), None)


@cache
def levels() -> list[str]:
    """Of LEVELS what this processor is, the best first."""
    about, known = Path("/proc/cpuinfo"), LEVELS.get(platform.machine(), {})
    has = {*about.read_text().split()} if about.exists() else set()
    return [*takewhile(lambda level: {*known[level].split()} <= has, known)][::-1]


def _loaded(path: Path, name: str) -> Any:
    """Its function, or why there is none."""
    _forked_children_run_alone()
    try:
        return getattr(ctypes.CDLL(str(path)), name)
    except OSError as error:
        path.with_suffix(".sha256").unlink(missing_ok=True)
        return f"what was compiled cannot be loaded: {error}"


def _made(score: str, name: str, defined: tuple[str, ...]) -> Path | str:
    """Compiled by the compiler of this machine, once."""
    made_by = compiler()
    if made_by is None:
        return MISSING
    known = _machine(made_by)
    if isinstance(known, str):
        return known
    kept = _kept()
    if isinstance(kept, str):
        return kept
    command = [made_by, *FLAGS, *(f"-D{macro}" for macro in defined)]
    parts = (*compiling.sources(), score.encode(), " ".join([*command, name]).encode(), known)
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    found, digest = kept / f"{key}.so", kept / f"{key}.sha256"
    if found.exists() and digest.exists() and digest.read_bytes() == _digest(found):
        return found
    return _compiled(command, name, score, found, digest) or found


@cache
def _machine(made_by: str) -> bytes | str:
    """What -march=native stands for here, and the compiler's version."""
    return ran([made_by, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])


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


def _compiled(command: list[str], name: str, score: str, found: Path, digest: Path) -> str | None:
    """Writes both, or says why not. Whoever else compiles the same at the same time writes the same."""
    try:
        with tempfile.TemporaryDirectory(dir=found.parent) as folder:
            made, said = Path(folder, found.name), Path(folder, digest.name)
            reason = compiled([*command, "-fopenmp"], name, score, made)
            if reason is not None:
                # without threads
                reason = compiled(command, name, score, made)
            if reason is not None:
                return reason
            said.write_bytes(_digest(made))
            made.replace(found)
            said.replace(digest)
    except OSError as error:
        return f"{found.parent} cannot be written: {error.strerror}"
    return None


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()
