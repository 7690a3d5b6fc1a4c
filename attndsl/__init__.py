"""attndsl: a compiler for attention mechanisms."""

from importlib import import_module
from typing import TYPE_CHECKING

from attndsl.attention import Attention as Attention
from attndsl.bound import Bound as Bound
from attndsl.errors import AttnError as AttnError
from attndsl.language.assertions import Assertion as Assertion
from attndsl.language.assertions import prove as prove
from attndsl.program import Program as Program
from attndsl.program import load as load
from attndsl.program import parse as parse

if TYPE_CHECKING:
    from attndsl.analysis.report import Report as Report
    from attndsl.analysis.report import analyze as analyze
    from attndsl.execution.plan import Plan as Plan
    from attndsl.execution.plan import compile as compile

LAZY = {
    "Plan": "attndsl.execution.plan",
    "Report": "attndsl.analysis.report",
    "analyze": "attndsl.analysis.report",
    "compile": "attndsl.execution.plan",
}
"""What checking a file does not need is imported on first use: a check is to feel instant."""


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise AttributeError(f"module 'attndsl' has no attribute '{name}'")
    return getattr(import_module(LAZY[name]), name)
