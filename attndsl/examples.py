"""The examples, each a Program: `attndsl.examples.longformer`. `dir(attndsl.examples)` lists their names."""

from __future__ import annotations

import sys

from attndsl import shipped
from attndsl.keywords import NoCall
from attndsl.program import Program, load


def __dir__() -> list[str]:
    return shipped.names()


def __getattr__(name: str) -> Program:
    if name not in shipped.names():
        raise AttributeError(shipped.missing(name))
    return load(shipped.PREFIX + name)


sys.modules[__name__].__class__ = NoCall
