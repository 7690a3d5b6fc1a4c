"""The examples that come with attndsl: `example:longformer` stands for the path of one."""

from __future__ import annotations

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


def missing(name: str) -> str:
    """What is said of a name that no example has."""
    known = names()
    near = suggest(name, known) or f"there are {', '.join(known)}"
    return f"no example `{name}`: {near}"
