"""The words that mean something without a definition, and how they are written."""

from __future__ import annotations

from attndsl import expr as ir

RESERVED = frozenset("q k n nq h H D s Q K layer stream".split())
POSITIONS = frozenset("q k s Q K".split())
COMBINATORS = frozenset("blocks within grid random".split())
FUNCTIONS = frozenset((*ir.AGGREGATES, "sum", "concat", "where", "isqrt", "floor", *ir.FUNCTIONS))
CLAIMS = frozenset("every_row density nnz diameter reach".split())
CONSTANTS = frozenset("orthogonal gaussian_rows".split())
BUILT_IN = COMBINATORS | FUNCTIONS | CONSTANTS | CLAIMS | {"learn"}
SIGNATURES = (
    {
        "blocks": "blocks(b, R)",
        "within": "within(x, R)",
        "grid": "grid(height, width, { (y, x), (v, u) : ... })",
        "random": "random(r, seed = 0, of = full)",
        "orthogonal": "orthogonal(m, seed = 0)",
        "gaussian_rows": "gaussian_rows(m, seed = 0)",
        "where": "where(cond, a, b)",
        "min": "min(a, b)",
        "max": "max(a, b)",
        "mean": "mean(K)",
        "sum": "sum(x)",
        "concat": "concat(x, y, ...)",
    }
    | {name: f"{name}(x)" for name in ("isqrt", "floor", *ir.FUNCTIONS)}
    | {name: f"assert {name}(...)" for name in CLAIMS}
)
