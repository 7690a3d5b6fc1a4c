"""How many pairs are live, whatever is chosen by content."""

from __future__ import annotations

from typing import Any

import numpy as np

from attndsl import expr as ir
from attndsl.analysis.part import Subject
from attndsl.expr import Expr, Selected, Table
from attndsl.meaning.pointwise import evaluate
from attndsl.selection import narrowest, widest
from attndsl.tiles import lowering
from attndsl.tiles.tiling import tile

POINTS = 2**26
"""Rows times units of a choice up to which candidates are counted row by row."""
Q, K = ir.var("q"), ir.var("k")


def live_bounds(subject: Subject) -> tuple[int, int] | None:
    """The least and the greatest number over all heads and batch rows, equal where it is known exactly; None
    where that takes long or a table is missing."""
    n, low, high = subject.problem.length, 0, 0
    read = {*lowering.mask_tables(subject.attention)} - {*subject.attention.selected}
    if n * n > POINTS or any(table.name not in subject.inputs for table in read):
        return None
    for mask, times in subject.masks.items():
        least, most = _bounds(ir.substitute(mask, {"n": ir.const(n)}), n, subject)
        low, high = low + times * least, high + times * most
    return low, high


def _bounds(mask: Expr, n: int, subject: Subject) -> tuple[int, int]:
    always, ever = (_count(bound(mask), n, subject) for bound in (narrowest, widest))
    leaves = [node for node in ir.nodes(mask) if node.op == "intable" and _origin(node) is not None]
    others = (node for node in ir.nodes(mask) if node.op != "intable")
    if any(_origin(node) is not None for node in others):
        return always, ever
    chosen = {leaf: _chosen(leaf, n, subject) for leaf in leaves}
    most = min(ever, always + sum(chosen.values()))
    if len(leaves) != 1:
        return always, most
    # one leaf, of whose candidates the rest of the mask cuts nothing off and the fixed part holds none
    (leaf,) = leaves
    of = widest(_beside(mask, leaf))
    apart = not _count(ir.all_of(of, narrowest(mask)), n, subject)
    whole = not _count(ir.all_of(of, ir.negate(widest(mask))), n, subject)
    exact = apart and whole and _units_are_whole(leaf, n, subject)
    return (most, most) if exact else (always, most)


def _origin(leaf: Expr) -> Selected | None:
    table = leaf.value
    return table.origin if isinstance(table, Table) and isinstance(table.origin, Selected) else None


def _beside(mask: Expr, leaf: Expr) -> Expr:
    """The conjunction that a leaf stands in: its candidates."""
    return next((node for node in ir.nodes(mask) if node.op == "and" and leaf in node.args), leaf)


def _count(e: Expr, n: int, subject: Subject) -> int:
    return tile(e, n, n, 128, n=n, tables=_tables(subject)).nnz


def _tables(subject: Subject) -> dict[str, Any]:
    """Without choices, which nothing here reads."""
    read = {*lowering.mask_tables(subject.attention)} - {*subject.attention.selected}
    return lowering.checked_tables(subject.attention, subject.inputs, subject.sizes, needed=[*read])


def _candidates(leaf: Expr, n: int, subject: Subject) -> np.ndarray:
    """Truths [rows, units]."""
    origin = _origin(leaf)
    assert origin is not None
    assert origin.of is not None
    of = ir.substitute(origin.of, {"n": ir.const(n), "b": ir.ZERO})
    rows, units = -(-n // origin.rows), -(-n // origin.unit)
    live = evaluate(of, np.arange(rows)[:, None], np.arange(units)[None, :], _tables(subject))
    return np.broadcast_to(live, (rows, units))


def _chosen(leaf: Expr, n: int, subject: Subject) -> int:
    """Pairs of a query and a key of a unit that is chosen for it, as many as there can be."""
    origin, table = _origin(leaf), leaf.value
    assert origin is not None
    assert isinstance(table, Table)
    r = table.dims[-1]
    assert isinstance(r, int)
    degrees = np.minimum(_candidates(leaf, n, subject).sum(1), r)
    sizes = np.minimum(origin.rows, n - origin.rows * np.arange(len(degrees)))
    return int((degrees * sizes).sum()) * origin.unit


def _units_are_whole(leaf: Expr, n: int, subject: Subject) -> bool:
    """Whether no row may choose a last block that is shorter."""
    origin = _origin(leaf)
    assert origin is not None
    return n % origin.unit == 0 or not _candidates(leaf, n, subject)[:, -1].any()
