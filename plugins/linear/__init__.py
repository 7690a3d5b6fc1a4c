"""The `linear` backend: weights that are inner products of features, without forming them.

With w_ij = exp(a_i + b_j) phi(q_i) . psi(k_j) a row is phi(q_i) . S_i, where S_i is the sum of exp(a_i +
b_j) psi(k_j) v_j (Katharopoulos et al., 2020, section 3.2). Keys are taken in parts: inside a part weights
are formed, and what came before is a state [m, Dv] of values and [m] of weights. Segments follow one another
in one walk, and the state is of the last. Exponents, those of features that are exponentials too, are taken
relative to the greatest that a query has seen, which cancels exactly and does not know of later keys. Nothing
is kept for the backward pass, which walks forward for the queries and backward for the keys.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

from attndsl.attention import Attention
from attndsl.backend import Kernel, Problem, predicted
from attndsl.execution.torch_eval import FEATURES
from attndsl.expr import nodes
from attndsl.features import LinearForm, form_of
from attndsl.scores import by_distance
from attndsl.tiles.blockmask import BlockMask

from .kernel import LinearKernel, StatefulLinear
from .slabs import CHUNK

SECONDS = {"cpu": {"calls": 8e-4, "parts": 2e-5, "products": 4.2e-11, "features": 2e-9, "exponents": 1.4e-8}}
"""Of one core with AVX2, of the examples at 64 to 16,384."""
TRAINING = 4.0
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
        """`products` multiply and add; `features` and `exponents` are numbers made one by one."""
        found, p = form_of(attention), problem
        assert isinstance(found, LinearForm)
        m = found.width(p.head_dim) or p.head_dim
        heads = p.batch * p.heads
        queries, keys = float(heads * p.q_length), float(heads * p.length)
        formed = min(queries, keys) * min(CHUNK, p.length) if found.causal or found.segments else 0.0
        mapped = sum(node.op == "matvec" for phi in found.features for node in nodes(phi)) / 2
        decay = attention.groups[0].decay
        apart = found.powers[1] or (decay is not None and by_distance(decay) is None)
        products = (queries + keys) * m * (p.head_dim * (1 + mapped)) + formed * (m + p.head_dim)
        read = {t for e in (*itertools.chain(*found.segments), found.queries, found.keys) for t in e.tables}
        walks = p.batch if any(table.batched for table in read) else 1
        return {
            "calls": walks,
            # as many as take these products
            "pairs": products / (2 * p.head_dim),
            "parts": walks * (1 + (p.length + p.q_length) / CHUNK),
            "products": products,
            "features": (queries + keys) * m,
            "exponents": formed * apart,
            "written": (queries + keys) * (m + p.head_dim),
        }

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        found = form_of(attention)
        assert isinstance(found, LinearForm)
        kind = StatefulLinear if found.constant_state else LinearKernel
        return kind(attention.groups[0], found)


backend = Linear()
