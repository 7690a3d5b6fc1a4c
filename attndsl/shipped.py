"""The examples that come with attndsl: `example:longformer` stands for the path of one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from attndsl.errors import fail, suggest

PREFIX = "example:"


def folder() -> Path:
    """Where the examples lie: in the package, in a clone beside it."""
    inside, *beside = (Path(place, "examples") for place in sys.modules["attndsl"].__path__)
    return beside[0] if beside else inside


def names() -> list[str]:
    """The names of all examples, sorted."""
    return sorted(path.stem for path in folder().glob("*.attn"))


def located(file: str) -> Path:
    """The path that a user means by `file`. Raises AttnError for an example that there is not."""
    if not file.startswith(PREFIX):
        return Path(file)
    name = file.removeprefix(PREFIX)
    if name not in names():
        raise fail(missing(name))
    return folder() / f"{name}.attn"


def elsewhere(file: str) -> str:
    """The help for a file that there is not: what a user means by it, or "" where that is not known."""
    defined = re.match(r"(attention|pattern|score|mask|let|assert|use)\s", file)
    if defined or re.search(r"[&|{}~]|\w\(", file):
        text = "..." if len(file) > 60 or not {*"\n'"}.isdisjoint(file) else file
        text = text if defined else f"pattern p = {text}"
        return (
            f"a text is read by attndsl.parse, and by a command from stdin: `echo '{text}' | attndsl show -`"
        )
    path, named = Path(file), re.fullmatch(r"(.+\.attn)\W+(\w+)", file)
    if path.is_dir():
        return f"name the files in it: `{path / '*.attn'}`"
    if named and Path(named[1]).is_file():
        return f"did you mean `{named[1]}:{named[2]}`?"
    if near := nearby(file, path.parent):
        return near
    if path.stem in names():
        return f"an example is `{PREFIX}{path.stem}`"
    return f"a name stands behind its file: `FILE.attn:{file}`" if file.isidentifier() else ""


def nearby(file: str, folder: Path) -> str:
    """The help with a file in `folder` that is nearly called so, or "" where there is none; `file` is how it
    was written."""
    path, there = Path(file), [other.name for other in folder.glob("*.attn")]
    near = suggest(path.name, there) or suggest(f"{path.name}.attn", there)
    return f"did you mean `{path.parent / near.split('`')[1]}`?" if near else ""


def missing(name: str) -> str:
    """What is said of a name that no example has."""
    known = names()
    near = suggest(name, known) or f"there are {', '.join(known)}"
    return f"no example `{name}`: {near}"
