"""How many pairs are live, whatever is chosen by content: of lists, of one order, and of one bucket a key."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from attndsl import expr as ir
from attndsl.analysis import counting
from attndsl.analysis.part import Subject
from attndsl.execution import registry
from attndsl.expr import Expr, Selected, Table
from attndsl.selection import Chunks, First, Selection, ordered
from attndsl.tiles import chosen, lowering
from attndsl.tiles.tiling import replaced

Q, K, N = ir.var("q"), ir.var("k"), ir.var("n")
CAUSAL = ir.le(K, Q)
Bounds = tuple[int, int]


def live_bounds(subject: Subject) -> Bounds | None:
    """As those of `tiles.chosen`, and tighter where every mask is of one order or of one kind of labels."""
    attention, p = subject.attention, subject.problem
    found = chosen.live_bounds(attention, subject.sizes, subject.inputs, p.batch)
    if found is None:
        return None
    groups, low, high = lowering.head_groups(attention, p.heads), 0, 0
    for i, group in enumerate(attention.groups):
        each = _alone(group.relation.mask, p.length)
        if each is None:
            return found
        times = p.batch * groups.count(i)
        low, high = low + times * each[0], high + times * each[1]
    return max(low, found[0]), min(high, found[1])


def _alone(mask: Expr, n: int) -> Bounds | None:
    """Of one head."""
    if not mask.tables and mask.free <= {"q", "k", "n"}:
        count = counting.count_at(mask, n)
        return count, count
    if len(mask.tables) != 1:
        return None
    (table,) = mask.tables
    if not isinstance(table.origin, Selected):
        return None
    selection: Selection = registry.plugin("selections", table.origin.selection)
    parts = mask.args if mask.op == "and" else (mask,)
    if selection.kind == "order":
        how = selection.relates(table.origin)
        assert how is not None
        rest = ir.all_of(*(part for part in parts if part is not CAUSAL))
        if ordered(table, how, Q, K, N).mask is not rest:
            return None
        return _of_order(table, how, n, CAUSAL in parts)
    if selection.kind == "labels":
        return _of_labels(table, parts, n, selection.rounds(table.origin))
    return None


def _of_order(table: Table, how: Chunks | First, n: int, causal: bool) -> Bounds:
    """Ranks are those of all tokens, so one round relates as many pairs whatever they are; of two tokens of a
    piece, which see one another, one is later."""
    rounds = table.explicit[0]
    assert isinstance(rounds, int)
    if isinstance(how, First):
        pairs = min(how.width, n) ** 2
        return 0 if causal else pairs, rounds // 2 * pairs
    sizes = [min(how.size, n - start) for start in range(0, n, how.size)]
    own = sum(m * (m + 1) // 2 if causal else m * m for m in sizes)
    before = sum(a * b for a, b in pairwise(sizes))
    wrapped = sizes[0] * sizes[-1] if how.wrap and sizes else 0
    return own if causal else own + before, rounds * (own + before + wrapped)


def _of_labels(table: Table, parts: tuple[Expr, ...], n: int, buckets: int) -> Bounds | None:
    """Pairs of a bucket of c tokens are f(c), by their ranks. Where f is convex, buckets of like sizes have
    the fewest, and one of all tokens the most."""
    same = ir.eq(ir.lookup(table, *table.implicit, Q), ir.lookup(table, *table.implicit, K))
    if same not in parts:
        return None
    i, j = ir.var("?i"), ir.var("?j")
    ranks = {same: ir.TRUE, CAUSAL: ir.le(j, i)}
    ranks |= {ir.rank_of(table, *table.implicit, p): rank for p, rank in ((Q, i), (K, j))}
    inside = replaced(ir.all_of(*parts), ranks)
    if not inside.free <= {"?i", "?j"} or inside.tables:
        return None
    inside = ir.substitute(inside, {"?i": Q, "?j": K})
    f = counting.counts_below(inside, n)
    if (np.diff(f, 2) < 0).any():
        return None
    size, larger = divmod(n, buckets)
    fewest = larger * int(f[min(size + 1, n)]) + (buckets - larger) * int(f[size])
    return fewest, int(f[n])
