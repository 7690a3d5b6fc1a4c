"""Whether what a token gets lasts as more tokens come, and which keys those can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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
from attndsl.streams import Pool, Projection, Stretch, memory, of_stream
from attndsl.tiles.tiling import replaced

Q, K, N, LATER = var("q"), var("k"), var("n"), var("?n")
CAUSAL = le(K, Q)


AHEAD = "it is not proved that no query reads a key after it"


def kept(attention: Attention, problem: Problem) -> tuple[int, int] | None:
    """Numbers a and b such that no query reads other keys than the first a and the last b of those up to it,
    proved for every length and table; None where there are no such numbers, and where keys are streams.

    Raises AttnError where more tokens could change what one gets: then a cache does not do.
    """
    for reason in _changes(attention, problem):
        help = "write `mask causal & ...`" if reason == AHEAD else ""
        raise fail(f"`{attention.name}` has no sessions: {reason}", help=help)
    read = None if attention.streams else _read(attention)
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
    for stream in attention.streams:
        if isinstance(stream, Projection):
            yield f"`{stream.keys.name}` makes keys of all tokens, later ones too"
    if attention.approx is not None:
        yield f"`{attention.approx.kind}` is computed of all tokens at once"
    if attention.offset is not None:
        yield "its `offset` says that queries are not the last positions"
    if attention.counts_queries or any("nq" in e.free for e in weights):
        yield "it depends on `nq`, and every step has queries of its own"
    if any(node.op == "count_of" for e in parts for node in nodes(e)):
        yield "it depends on how many entries of a table are equal"
    for table in attention.selected:
        if not stable(table, attention):
            yield f"what `{table.name.partition('#')[0]}` chooses may change with later tokens"
    masks = [_drawn_once(mask) for mask in masks_of(attention, problem)]
    for stream, here in _by_stream(attention):
        # a key stands where the last token of it does, and memory before them all
        seen = le(stream.position(K), Q)
        for table in (table for e in parts for table in _read_ahead(here(e), seen)):
            yield f"an entry of `{table.name}` is read that may come later"
        for mask in map(here, masks):
            if not (memory((stream,)) or follows(mask, seen)):
                yield AHEAD
            grown = substitute(mask, {"n": LATER})
            if grown is not mask and not (_same(mask, grown) and _same(grown, mask)):
                yield "it is not proved that its mask stays as it is while `n` grows"
        if any("n" in here(_drawn_once(e)).free for e in weights):
            yield "its scores depend on `n`"


def _by_stream(attention: Attention) -> Iterator[tuple[Stretch | Pool, Callable[[Expr], Expr]]]:
    """Each stream that has places, and of an expression what it is for its keys, over `k` as their number."""
    if not attention.streams:
        yield Stretch(), lambda e: e
    for i, stream in enumerate(attention.streams):
        if not isinstance(stream, Projection):
            yield stream, partial(lambda i, e: of_stream(attention.streams, e, i), i)


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


def _read_ahead(e: Expr, seen: Expr) -> Iterator[Table]:
    """Tables where an entry beyond the end is false, maybe at positions after the query, of keys that are
    `seen`."""
    for node in nodes(e):
        table = node.value
        if isinstance(table, Table) and (table.dtype == "bool" or node.op == "intable"):
            indices = node.args[int(node.op == "intable") + len(table.implicit) :]
            for index, axis in zip(indices, table.explicit, strict=False):
                if axis == "n" and not follows(seen, le(index, Q)):
                    yield table
