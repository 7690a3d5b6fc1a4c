"""The `torch` backend: block sparse attention from torch's own operators, forward and backward.

A mask is taken apart (`take_apart`) into batches of equal problems. Stretches of rows that look the
same run on strided views of k and v, which overlap and are never copied; the rest on gathered tiles. Each
part gives an output and a log-sum-exp; two parts of a row merge exactly:
L = logaddexp(L1, L2), o = exp(L1 - L) o1 + exp(L2 - L) o2 (Dao et al., FlashAttention, 2022). Without
a softmax weights may be negative: sums of weights and of weighed values add up, and `linear` divides last.
Memory grows with the entries of the BlockMask and the tokens, never with their square.
"""

from dataclasses import replace

from attndsl.attention import Attention
from attndsl.backend import Kernel, Problem, predicted
from attndsl.execution.apart import counted, in_parts
from attndsl.execution.torch_eval import FEATURES
from attndsl.tiles.blockmask import BlockMask

from .cost import SECONDS, TRAINING, counts
from .kernel import BlockSparse
from .lanes import all_simple


class Torch:
    """Registered as `torch`."""

    features = replace(
        FEATURES,
        clauses={"score", "decay", "count", "sink", "heads"},
        norms={"softmax", "sigmoid", "relu", "linear", "none"},
    )
    seconds = SECONDS
    counts = staticmethod(counted(counts))

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        def kernel(of: Attention) -> BlockSparse:
            return BlockSparse(of, problem.training, all_simple(of, problem.head_dim))

        return in_parts(attention, kernel(attention), kernel)


backend = Torch()
