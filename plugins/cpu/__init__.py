"""The `cpu` backend: kernels in C++ over tiles, forward and backward, compiled once by the system's compiler.

Scores are a number times s, in float32; all masks. Its cost is unknown so far: it runs where it is named.
"""

import os
from dataclasses import replace

from attndsl.attention import Attention
from attndsl.backend import Kernel, Problem
from attndsl.errors import fail
from attndsl.execution.torch_eval import FEATURES
from attndsl.scores import scale_and_bias
from attndsl.tiles.blockmask import BlockMask

from .build import MISSING, compiler, library
from .kernel import Compiled
from .layout import ROWS


class Cpu:
    """Registered as `cpu`."""

    # of a score all that is left is a number, and what is more is declined: so any operation may stand in it
    features = replace(FEATURES, clauses={"score", "heads"}, dtypes={"float32"}, devices={"cpu"})

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if problem.block_size % ROWS:
            return f"tiles of {problem.block_size} tokens are no multiple of {ROWS}"
        found = _scale(attention, problem)
        if isinstance(found, str):
            return found
        if os.name != "posix":
            return "its library is built on POSIX systems alone"
        # it is compiled by whoever takes it, not by everybody who asks
        return None if compiler() else MISSING

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return None

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        scale, made = _scale(attention, problem), library()
        assert not isinstance(scale, str)
        if isinstance(made, str):
            raise fail(f"the backend `cpu` cannot be compiled: {made}")
        return Compiled(made, scale)


def _scale(attention: Attention, problem: Problem) -> float | str:
    """Of all heads, or why there is none."""
    scales = set()
    for group in attention.groups:
        found = scale_and_bias(group.score, problem.head_dim)
        if isinstance(found, str):
            return found
        if found[1] is not None:
            return "the score has a bias"
        scales.add(found[0])
    return scales.pop() if len(scales) == 1 else "the scales of heads differ"


backend = Cpu()
