"""The examples, read once for all tests: programs are values."""

from __future__ import annotations

import functools
from pathlib import Path

import attndsl

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = tuple(sorted(path.stem for path in EXAMPLES.glob("*.attn")))


@functools.cache
def example(name: str) -> attndsl.Program:
    return attndsl.load(EXAMPLES / f"{name}.attn")
