"""The `linear` backend: weights that are inner products of features, without forming them.

With w_ij = exp(a_i + b_j) phi(q_i) . psi(k_j) a row is phi(q_i) . S_i, where S_i is the sum of exp(a_i +
b_j) psi(k_j) v_j (Katharopoulos et al., 2020, section 3.2). Keys are taken in parts: inside a part weights
are formed, and what came before is a state [m, Dv] of values and [m] of weights. Exponents, those of features
that are exponentials too, are taken relative to the greatest that a query has seen, which cancels exactly and
does not know of later keys. Nothing of a backward pass is kept: it walks forward for the queries and backward
for the keys.
"""

from __future__ import annotations

from dataclasses import replace

from attndsl.attention import Attention
from attndsl.backend import Kernel, Problem, predicted
from attndsl.execution.torch_eval import FEATURES
from attndsl.features import LinearForm, form_of
from attndsl.tiles.blockmask import BlockMask

from .kernel import LinearKernel, StatefulLinear
from .slabs import CHUNK

SECONDS = {"cpu": {"calls": 4e-4, "chunks": 9e-5, "products": 2.6e-11, "features": 1.2e-9}}
"""Of one core with AVX-512, by benchmarks/linear.py."""
TRAINING = 3.4
"""Forward and backward beside forward."""


class Linear:
    """Registered as `linear`."""

    features = replace(FEATURES, clauses={"score", "decay"}, norms={"linear", "none"})
    seconds = SECONDS

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        found = form_of(attention)
        return found if isinstance(found, str) else None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        found, width = form_of(attention), problem.head_dim
        assert isinstance(found, LinearForm)
        m = found.width(width) or width
        rows = problem.batch * problem.heads
        tokens = float(rows * (problem.length + problem.q_length))
        pairs = float(rows * problem.length * CHUNK if found.causal else 0)
        return {
            "calls": 1,
            "pairs": pairs,
            "chunks": problem.length / CHUNK,
            "products": tokens * m * (width + 1) + pairs * (m + width + 1),
            "features": tokens * m,
            "written": tokens * (m + width),
        }

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        found = form_of(attention)
        assert isinstance(found, LinearForm)
        kind = StatefulLinear if found.constant_state else LinearKernel
        return kind(attention.groups[0], found)


backend = Linear()
