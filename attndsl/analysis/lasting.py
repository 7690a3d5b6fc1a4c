"""Whether what a token gets lasts as more tokens come, and which keys those can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from attndsl.analysis.eviction import eviction
from attndsl.analysis.part import masks_of
from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.execution.leaks import stable
from attndsl.execution.selecting import parts as scores_of
from attndsl.expr import ONE, Expr, Selected, Table, add, all_of, any_of, le, make, nodes, substitute, var
from attndsl.relations.proofs import follows
from attndsl.tiles.tiling import replaced

Q, K, N, LATER = var("q"), var("k"), var("n"), var("?n")
CAUSAL = le(K, Q)


def kept(attention: Attention, problem: Problem) -> tuple[int, int] | None:
    """Numbers a and b such that no query reads other keys than the first a and the last b of those up to it,
    proved for every length and table; None where there are no such numbers.

    Raises AttnError where more tokens could change what one gets: then a cache does not do.
    """
    for reason in _changes(attention, problem):
        raise fail(f"`{attention.name}` has no sessions: {reason}")
    read = _read(attention)
    if read is None:
        return None
    found = [eviction(mask, 0).enough for mask in masks_of(read, problem)]
    known = [numbers for numbers in found if numbers is not None]
    if len(known) < len(found):
        return None
    return max(first for first, _ in known), max(last for _, last in known)


def over_length(attention: Attention) -> bool:
    """Whether tables tell of every token."""
    return any("n" in table.dims for table in (*attention.inputs, *attention.learned))


def _read(attention: Attention) -> Attention | None:
    """With masks that hold all keys whose absence would change anything: a key that is not chosen took part
    in the choice. None where that is every key, or blocks of them are numbered from the first on."""
    origins = [table.origin for table in attention.selected if isinstance(table.origin, Selected)]
    of = [origin.of for origin in origins if origin.of is not None and origin.rows == origin.unit == 1]
    if len(of) < len(origins):
        return None
    groups = (
        replace(group, relation=replace(group.relation, mask=any_of(group.relation.mask, *of)))
        for group in attention.groups
    )
    return replace(attention, groups=tuple(groups))


def _changes(attention: Attention, problem: Problem) -> Iterator[str]:
    """Why more tokens could change what one gets."""
    weights = [
        e for group in attention.groups for e in (group.score, group.decay, group.norm.sink) if e is not None
    ]
    weights += [e for table in attention.selected for e in scores_of(table)]
    parts = [*(group.relation.mask for group in attention.groups), *weights]
    if attention.streams:
        yield "its keys are streams, which are made of all tokens at every call"
        return
    if attention.approx is not None:
        yield f"`{attention.approx.kind}` is computed of all tokens at once"
    if attention.offset is not None:
        yield "its `offset` says that queries are not the last positions"
    if any("nq" in e.free for e in parts) or any("nq" in table.dims for table in attention.inputs):
        yield "it depends on `nq`, and every step has queries of its own"
    if any(node.op == "count_of" for e in parts for node in nodes(e)):
        yield "it depends on how many entries of a table are equal"
    for table in attention.selected:
        if not stable(table, attention):
            yield f"what `{table.name.partition('#')[0]}` chooses may change with later tokens"
    for table in (table for e in parts for table in _read_ahead(e)):
        yield f"an entry of `{table.name}` is read that may come later"
    for mask in map(_drawn_once, masks_of(attention, problem)):
        if not follows(mask, CAUSAL):
            yield "it is not proved that no query reads a key after it"
        grown = substitute(mask, {"n": LATER})
        if grown is not mask and not (_same(mask, grown) and _same(grown, mask)):
            yield "it is not proved that its mask stays as it is while `n` grows"
    if any("n" in _drawn_once(e).free for e in weights):
        yield "its scores depend on `n`"


def _same(mask: Expr, other: Expr) -> bool:
    return follows(all_of(le(N, LATER), mask), other)


def _drawn_once(e: Expr) -> Expr:
    """With `random` among no keys after the query, where that is the same."""
    drawn: dict[Expr, Expr] = {}
    for node in nodes(e):
        if node.op == "random":
            q, k, _, seed, of = node.args
            _, row, col = cast("tuple[int, str, str]", node.value)
            if follows(substitute(of, {row: Q, col: K}), CAUSAL):
                drawn[node] = make("random", (q, k, add(q, ONE), seed, of), node.value, "bool")
    return replaced(e, drawn)


def _read_ahead(e: Expr) -> Iterator[Table]:
    """Tables where an entry beyond the end is false, maybe at positions after the query."""
    for node in nodes(e):
        table = node.value
        if isinstance(table, Table) and (table.dtype == "bool" or node.op == "intable"):
            indices = node.args[int(node.op == "intable") + len(table.implicit) :]
            for index, axis in zip(indices, table.explicit, strict=False):
                if axis == "n" and not follows(CAUSAL, le(index, Q)):
                    yield table
