"""How many pairs are live, whatever is chosen by content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.analysis.part import Subject
from attndsl.attention import Relation
from attndsl.expr import Expr, Selected, Table
from attndsl.meaning.pointwise import evaluate
from attndsl.selection import narrowest, widest
from attndsl.tiles import lowering

POINTS = 2**26
"""Rows times units of a choice up to which candidates are counted row by row."""


def live_bounds(subject: Subject) -> tuple[int, int] | None:
    """The least and the greatest number over all heads and batch rows, equal where it is known exactly; None
    where that takes long or a table is missing."""
    attention, n = subject.attention, subject.problem.length
    read = {*lowering.mask_tables(attention)} - {*attention.selected}
    if n * n > POINTS or any(table.name not in subject.inputs for table in read):
        return None
    always, ever = _count(subject, narrowest), _count(subject, widest)
    lists = {leaf for group in attention.groups for leaf in _lists(group.relation.mask)}
    if any(table not in {leaf.value for leaf in lists} for table in attention.selected):
        return always, ever
    if any({"h", "b"} & (_origin(leaf).of or ir.TRUE).free for leaf in lists):
        return always, ever
    groups = lowering.head_groups(attention, subject.problem.heads)
    chosen = sum(
        subject.problem.batch * groups.count(i) * _chosen(leaf, subject)
        for i, group in enumerate(attention.groups)
        for leaf in _lists(group.relation.mask)
    )
    most = min(ever, always + chosen)
    # of one leaf in a mask, of whose candidates the rest cuts nothing off and the fixed part holds none
    exact = (
        all(len(_lists(group.relation.mask)) <= 1 for group in attention.groups)
        and all(_units_are_whole(leaf, subject) for leaf in lists)
        and not _count(subject, _misplaced)
    )
    return (most, most) if exact else (always, most)


def _misplaced(mask: Expr) -> Expr:
    """Candidates that are live without being chosen, or are not when they are."""
    found = []
    for leaf in _lists(mask):
        origin = _origin(leaf)
        at = {
            name: ir.floordiv(ir.var(name), ir.const(size))
            for name, size in zip("qk", (origin.rows, origin.unit), strict=True)
        }
        of = ir.substitute(origin.of or ir.TRUE, at)
        found.append(ir.all_of(of, ir.any_of(narrowest(mask), ir.negate(widest(mask)))))
    return ir.any_of(*found)


def _lists(mask: Expr) -> list[Expr]:
    """The leaves of a mask that read a list of choices."""
    found = (node for node in ir.nodes(mask) if node.op == "intable" and isinstance(node.value, Table))
    return [
        node for node in found if isinstance(node.value, Table) and isinstance(node.value.origin, Selected)
    ]


def _origin(leaf: Expr) -> Selected:
    assert isinstance(leaf.value, Table)
    assert isinstance(leaf.value.origin, Selected)
    return leaf.value.origin


def _count(subject: Subject, of: Callable[[Expr], Expr]) -> int:
    """Pairs of what this makes of the masks, over all heads and batch rows."""
    groups = (replace(g, relation=Relation(of(g.relation.mask))) for g in subject.attention.groups)
    attention, p = replace(subject.attention, groups=tuple(groups)), subject.problem
    tables = {t.name: subject.inputs[t.name] for t in lowering.mask_tables(attention)}
    checked = lowering.checked_tables(attention, tables, subject.sizes, p.batch)
    blocks = lowering.block_mask(attention, subject.sizes, checked, p.block_size)
    return blocks.nnz * (p.batch * p.heads // blocks.index.size)


def _candidates(leaf: Expr, subject: Subject) -> NDArray[np.bool_]:
    """Truths [rows, units]."""
    origin, n = _origin(leaf), subject.problem.length
    of = ir.substitute(origin.of or ir.TRUE, {"n": ir.const(n), "nq": ir.const(n)})
    rows, units = -(-n // origin.rows), -(-n // origin.unit)
    tables = {table.name: lowering.as_array(subject.inputs[table.name]) for table in of.tables}
    live = evaluate(of, np.arange(rows)[:, None], np.arange(units)[None, :], tables)
    return np.broadcast_to(live, (rows, units))


def _chosen(leaf: Expr, subject: Subject) -> int:
    """Pairs of a query and a key of a unit that is chosen for it, as many as there can be."""
    origin, table, n = _origin(leaf), leaf.value, subject.problem.length
    assert isinstance(table, Table)
    r = table.dims[-1]
    assert isinstance(r, int)
    degrees = np.minimum(_candidates(leaf, subject).sum(1), r)
    sizes = np.minimum(origin.rows, n - origin.rows * np.arange(len(degrees)))
    return int((degrees * sizes).sum()) * origin.unit


def _units_are_whole(leaf: Expr, subject: Subject) -> bool:
    """Whether no row may choose a last block that is shorter."""
    n, unit = subject.problem.length, _origin(leaf).unit
    return n % unit == 0 or not _candidates(leaf, subject)[:, -1].any()
