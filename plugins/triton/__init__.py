"""The `triton` backend: kernels for GPUs over tiles, forward and backward, with the score generated from its
expression. They are compiled ahead and run by Triton's interpreter in tests, and have not run on a GPU yet.
"""

from dataclasses import replace

import torch

from attndsl.attention import Attention
from attndsl.backend import Kernel, Problem, predicted
from attndsl.execution.apart import counted, in_parts
from attndsl.execution.torch_eval import FEATURES
from attndsl.tiles.blockmask import BlockMask

from .configs import declined
from .kernel import Compiled
from .source import score_of_pairs, unordered

SECONDS: dict[str, dict[str, float]] = {}
"""None are measured."""
TRAINING = 4.5
"""Forward and backward beside forward: 7 matrix products more to 2, for two kernels form the scores."""


def counts(attention: Attention, problem: Problem, block_mask: BlockMask | None) -> dict[str, float]:
    """Pairs of tiles; weights are never written."""
    area = float(problem.q_length * problem.length)
    if block_mask is not None:
        size, tiles = problem.block_size**2, block_mask.tiles
        area = size * (tiles.full + tiles.partial) / block_mask.index.size
    return {"pairs": problem.batch * problem.heads * area, "written": 0.0}


class Triton:
    """Registered as `triton`."""

    # of a query, a key or a distance alone any operation is evaluated; which of a pair are, `supports` says
    features = replace(
        FEATURES,
        clauses={"score", "decay", "count", "sink", "heads"},
        norms={"softmax", "sigmoid", "relu", "linear", "none"},
        tables={"given", "learned", "drawn", "known", "int", "bool", "float"},
    )
    seconds = SECONDS
    counts = staticmethod(counted(counts))
    spreads = True
    remark = "compiled and interpreted, not yet run on a GPU"

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        forbidden = problem.training and not torch.is_deterministic_algorithms_warn_only_enabled()
        tables = {t.name for t in (*attention.inputs, *attention.learned) if t.dtype == "float"}
        for group in attention.groups:
            for adjacent in (True, False):
                if isinstance(score := score_of_pairs(group, problem.head_dim, adjacent), str):
                    return score
                if forbidden and (reason := unordered(score, tables)):
                    return reason
            if problem.dtype == "float16" and group.norm.kind not in ("softmax", "sigmoid"):
                return f"weights of the norm `{group.norm.kind}` may exceed what float16 holds"
        return declined(problem)

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        whole = Compiled(attention, problem, alone=True)
        return in_parts(attention, whole, lambda left: Compiled(left, problem, alone=False))


backend = Triton()
