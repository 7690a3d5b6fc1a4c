"""The `cpu` backend: kernels in C++ over tiles, forward and backward, compiled once by the system's compiler."""

from attndsl.attention import Attention
from attndsl.backend import Features, Kernel, Problem
from attndsl.errors import fail
from attndsl.scores import scale_and_bias
from attndsl.tiles.blockmask import BlockMask

from .build import library
from .kernel import Compiled
from .layout import ROWS


class Cpu:
    """Registered as `cpu`."""

    features = Features(
        clauses={"score", "heads"},
        operations={"add", "mul", "div", "inner", "sqrt", "where", "var", "const"},
        modes={"training"},
    )

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if problem.block_size % ROWS:
            return f"tiles of {problem.block_size} tokens are no multiple of {ROWS}"
        found = _scale(attention, problem)
        if isinstance(found, str):
            return found
        made = library()
        return made if isinstance(made, str) else None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return None

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        scale, made = _scale(attention, problem), library()
        if isinstance(scale, str) or isinstance(made, str):
            raise fail(str(scale if isinstance(scale, str) else made))
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
