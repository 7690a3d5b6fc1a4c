"""attndsl: a compiler for attention mechanisms."""

import os.path
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not os.path.isdir(os.path.join(__path__[0], "grammar")):
    # in a clone, grammar and plugins lie beside this folder, not in it as where they are installed
    __path__.append(os.path.dirname(__path__[0]))

from attndsl import examples
from attndsl.attention import Attention
from attndsl.bound import Bound
from attndsl.errors import AttnError
from attndsl.language.assertions import Assertion, prove
from attndsl.program import Program, load, parse

if TYPE_CHECKING:
    from attndsl.analysis.report import Report, analyze
    from attndsl.execution.plan import Plan, compile

__all__ = [
    "Assertion",
    "Attention",
    "AttnError",
    "Bound",
    "Plan",
    "Program",
    "Report",
    "__version__",
    "analyze",
    "compile",
    "examples",
    "load",
    "parse",
    "prove",
]
LAZY = {
    "Plan": "attndsl.execution.plan",
    "Report": "attndsl.analysis.report",
    "analyze": "attndsl.analysis.report",
    "compile": "attndsl.execution.plan",
}
"""What checking a file does not need is imported on first use: a check is to feel instant."""


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module 'attndsl' has no attribute '{name}'")
    return getattr(import_module(LAZY[name]), name)
