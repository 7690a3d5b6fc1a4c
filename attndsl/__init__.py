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
from attndsl.keywords import missing
from attndsl.language.assertions import Assertion, prove
from attndsl.program import Program, load, parse
from attndsl.stacks.tree import Stack

if TYPE_CHECKING:
    from attndsl import spans as spans
    from attndsl.analysis.report import Report, analyze
    from attndsl.execution.plan import Plan, PlanModule, compile
    from attndsl.execution.session import Session
    from attndsl.execution.sums import SumPlan
    from attndsl.interop.blocks import create_block_mask
    from attndsl.interop.flex import from_mask_mod, from_score_mod
    from attndsl.relations.proofs import Verdict
    from attndsl.stacks.decoding import StackSession, generate
    from attndsl.stacks.depth import Depth, depth
    from attndsl.stacks.module import StackModule, build
    from attndsl.tiles.blockmask import BlockMask


__all__ = [
    "Assertion",
    "Attention",
    "AttnError",
    "BlockMask",
    "Bound",
    "Depth",
    "Plan",
    "PlanModule",
    "Program",
    "Report",
    "Session",
    "Stack",
    "StackModule",
    "StackSession",
    "SumPlan",
    "Verdict",
    "__version__",
    "analyze",
    "build",
    "compile",
    "create_block_mask",
    "depth",
    "examples",
    "from_mask_mod",
    "from_score_mod",
    "generate",
    "load",
    "parse",
    "prove",
]
LAZY = {
    "BlockMask": "attndsl.tiles.blockmask",
    "Depth": "attndsl.stacks.depth",
    "Plan": "attndsl.execution.plan",
    "PlanModule": "attndsl.execution.plan",
    "Report": "attndsl.analysis.report",
    "Session": "attndsl.execution.session",
    "StackModule": "attndsl.stacks.module",
    "StackSession": "attndsl.stacks.decoding",
    "SumPlan": "attndsl.execution.sums",
    "Verdict": "attndsl.relations.proofs",
    "analyze": "attndsl.analysis.report",
    "build": "attndsl.stacks.module",
    "compile": "attndsl.execution.plan",
    "create_block_mask": "attndsl.interop.blocks",
    "depth": "attndsl.stacks.depth",
    "from_mask_mod": "attndsl.interop.flex",
    "from_score_mod": "attndsl.interop.flex",
    "generate": "attndsl.stacks.decoding",
    "spans": "attndsl.spans",
}
"""What checking a file does not need is imported on first use: a check is to feel instant."""


def __dir__() -> list[str]:
    return [*__all__, "spans"]


def __getattr__(name: str) -> object:
    if name not in LAZY:
        raise missing("attndsl", name, __dir__())
    module = import_module(LAZY[name])
    return module if LAZY[name] == f"attndsl.{name}" else getattr(module, name)
