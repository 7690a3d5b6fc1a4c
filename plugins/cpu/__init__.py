"""The `cpu` backend: kernels in C++ over tiles, forward and backward, with the score generated from its
expression, compiled once by the system's compiler.
"""

import os
from dataclasses import replace
from functools import partial

from attndsl.attention import Attention
from attndsl.backend import Kernel, Problem, predicted
from attndsl.emit.score import score_of
from attndsl.errors import fail
from attndsl.execution.apart import counted, in_parts
from attndsl.execution.torch_eval import FEATURES
from attndsl.tiles.blockmask import BlockMask

from .build import compiler, lacking, library
from .cost import SECONDS, TRAINING, counts, in_place
from .kernel import Compiled, asked
from .layout import ROWS
from .score import code


class Cpu:
    """Registered as `cpu`."""

    # of a query, a key or a distance alone any operation is evaluated; which of a pair are, `supports` says
    features = replace(
        FEATURES,
        clauses={"score", "decay", "count", "sink", "heads"},
        norms={"softmax", "sigmoid", "relu", "linear", "none"},
        tables={"given", "learned", "drawn", "known", "int", "bool", "float"},
        devices={"cpu"},
    )

    seconds = SECONDS
    counts = staticmethod(counted(counts, in_place))

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if problem.block_size % ROWS:
            return f"tiles of {problem.block_size} tokens are no multiple of {ROWS}"
        for group in attention.groups:
            for adjacent in (True, False):
                if isinstance(score := score_of(group, problem.head_dim, adjacent), str):
                    return score
        if os.name != "posix":
            return "its library is built on POSIX systems alone"
        # it is compiled by whoever takes it, not by everybody who asks
        return None if compiler() else lacking(asked(attention, problem))

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        for group in attention.groups:
            score = score_of(group, problem.head_dim, True)
            assert not isinstance(score, str)
            made = library(code(score, None), "forward", ("DOUBLE",) if problem.dtype == "float64" else ())
            if isinstance(made, str):
                raise fail(f"the backend `cpu` cannot be compiled: {made}")
        return in_parts(attention, Compiled(attention), partial(Compiled, alone=False))


backend = Cpu()
