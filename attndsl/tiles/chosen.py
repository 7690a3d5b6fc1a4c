"""How many pairs are live, whatever is chosen by content."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Attention, Relation
from attndsl.expr import Expr, Table
from attndsl.meaning.pointwise import evaluate
from attndsl.selection import lists_of, narrowest, origin_of, widest
from attndsl.tiles import lowering
from attndsl.tiles.lowering import Sizes

POINTS = 2**26
"""Rows times units of a choice up to which candidates are counted row by row."""
TILE = 128


def live_bounds(
    attention: Attention, sizes: Sizes, inputs: Mapping[str, Any], batch: int = 1
) -> tuple[int, int] | None:
    """The least and the greatest number over all heads and batch rows where queries and keys are the same
    positions, equal where it is known exactly; None where that takes long or an input is missing."""
    n = sizes.k.length
    read = {*lowering.mask_tables(attention)} - {*attention.selected}
    if n * n > POINTS or any(table.name not in inputs for table in read):
        return None

    def count(of: Callable[[Expr], Expr]) -> int:
        """Pairs of what this makes of the masks."""
        groups = (replace(g, relation=Relation(of(g.relation.mask))) for g in attention.groups)
        made = replace(attention, groups=tuple(groups))
        tables = {t.name: inputs[t.name] for t in lowering.mask_tables(made)}
        blocks = lowering.block_mask(made, sizes, lowering.checked_tables(made, tables, sizes, batch), TILE)
        return blocks.nnz * (batch * sizes.heads // max(1, blocks.index.size))

    always, ever = count(narrowest), count(widest)
    lists = {leaf for group in attention.groups for leaf in lists_of(group.relation.mask)}
    if any(table not in {leaf.value for leaf in lists} for table in attention.selected):
        return always, ever
    if any({"h", "b"} & (origin_of(leaf).of or ir.TRUE).free for leaf in lists):
        return always, ever
    groups = lowering.head_groups(attention, sizes.heads)
    chosen = sum(
        batch * groups.count(i) * _chosen(leaf, n, inputs)
        for i, group in enumerate(attention.groups)
        for leaf in lists_of(group.relation.mask)
    )
    most = min(ever, always + chosen)
    # of one leaf in a mask, of whose candidates the rest cuts nothing off and the fixed part holds none
    exact = (
        all(len(lists_of(group.relation.mask)) <= 1 for group in attention.groups)
        and all(_units_are_whole(leaf, n, inputs) for leaf in lists)
        and not count(_misplaced)
    )
    return (most, most) if exact else (always, most)


def _misplaced(mask: Expr) -> Expr:
    """Candidates that are live without being chosen, or are not when they are."""
    found = []
    for leaf in lists_of(mask):
        origin = origin_of(leaf)
        at = {
            name: ir.floordiv(ir.var(name), ir.const(size))
            for name, size in zip("qk", (origin.rows, origin.unit), strict=True)
        }
        of = ir.substitute(origin.of or ir.TRUE, at)
        found.append(ir.all_of(of, ir.any_of(narrowest(mask), ir.negate(widest(mask)))))
    return ir.any_of(*found)


def _candidates(leaf: Expr, n: int, inputs: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Truths [rows, units]."""
    origin = origin_of(leaf)
    of = ir.substitute(origin.of or ir.TRUE, {"n": ir.const(n), "nq": ir.const(n)})
    rows, units = -(-n // origin.rows), -(-n // origin.unit)
    tables = {table.name: lowering.as_array(inputs[table.name]) for table in of.tables}
    live = evaluate(of, np.arange(rows)[:, None], np.arange(units)[None, :], tables)
    return np.broadcast_to(live, (rows, units))


def _chosen(leaf: Expr, n: int, inputs: Mapping[str, Any]) -> int:
    """Pairs of a query and a key of a unit that is chosen for it, as many as there can be."""
    origin, table = origin_of(leaf), leaf.value
    assert isinstance(table, Table)
    r = table.dims[-1]
    assert isinstance(r, int)
    degrees = np.minimum(_candidates(leaf, n, inputs).sum(1), r)
    sizes = np.minimum(origin.rows, n - origin.rows * np.arange(len(degrees)))
    return int((degrees * sizes).sum()) * origin.unit


def _units_are_whole(leaf: Expr, n: int, inputs: Mapping[str, Any]) -> bool:
    """Whether no row may choose a last block that is shorter."""
    unit = origin_of(leaf).unit
    return n % unit == 0 or not _candidates(leaf, n, inputs)[:, -1].any()
