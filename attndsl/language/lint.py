"""Warnings: what is legal and probably not meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.errors import AttnError, Diagnostic, Span
from attndsl.expr import Expr, Selected, Table
from attndsl.features import FeatureForm, feature_form
from attndsl.language.arguments import input_table, name_span
from attndsl.language.elaborate import Elaborator
from attndsl.language.idle import SLOT, Looked, idle_parts, looked, never, relates_nothing
from attndsl.language.logits import (
    decays,
    exponential,
    far_first,
    masked_by_score,
    names_in,
    no_numbers,
    saturated,
    scaled_twice,
)
from attndsl.language.lookups import at_lookup, lookups_of
from attndsl.language.loose import ahead, loosened, named
from attndsl.language.mistakes import quoted
from attndsl.language.unknown import LENGTH, habit
from attndsl.language.values import TOKENS, AttentionOf, K, Pattern, Q, Scope
from attndsl.scores import never_negative
from attndsl.selection import lists_of, origin_of
from attndsl.streams import at_slots, read_by_each
from attndsl.syntax import nodes as ast

Definition = ast.Definition | ast.AttentionDef

_POSITION = re.compile(r"[qkij]|[qk]_?idx|kv_idx")
_LENGTHS = re.compile(r"(?:^|_)(?:seq)?(?:len|lens|length|lengths)$")
"""What positions and numbers of positions are called."""


def warnings(definitions: list[Definition], elaborator: Elaborator) -> list[Diagnostic]:
    """Of definitions that are right: by their text first, then by what their masks relate."""
    found: list[Diagnostic] = []
    used = {name.id for item in definitions for name in ast.walk(item) if isinstance(name, ast.Name)}
    sums = [item.sum for item in definitions if isinstance(item, ast.AttentionDef) and item.sum is not None]
    added = {name.id for e in sums for name in ast.walk(e) if isinstance(name, ast.Name)}
    placed, moved = _placed(definitions), _moved(definitions)
    for item in definitions:
        found += [*_of_text(item, placed), *_unread(item), *_loosened(item, elaborator)]
        if not all(param.default is not None for param in item.params):
            continue
        if isinstance(item, ast.AttentionDef):
            found += _of_attention(item, elaborator, item.name in added, definitions)
        elif item.word == "pattern":
            # queries and memory may stand beyond the keys
            if item.name not in moved and not (placed or elaborator.remembers):
                found += idle_parts(item.body, looked(elaborator, item.params))
            if item.name in used:
                continue
            value = elaborator.instance(item, {}, Scope({}), item.name_span)
            if isinstance(value, Pattern):
                alone = Attention.of_pattern(item.name, value.at(Q, K, TOKENS))
                found += _undefined(alone, [item.body], item.name_span)
    return found


def _loosened(item: Definition, elaborator: Elaborator) -> Iterator[Diagnostic]:
    """Of tokens: keys of streams are numbered from the first of each."""
    if isinstance(item, ast.Definition):
        if item.word == "pattern":
            yield from loosened(item.body, named(elaborator, item.params))
    elif not any(isinstance(clause, ast.Keys) for clause in item.clauses):
        inside = named(elaborator, item.params, item.clauses)
        masks = [
            node for node in ast.walk(item.clauses) if isinstance(node, ast.Clause) and node.word == "mask"
        ]
        for clause in masks:
            yield from loosened(clause.value, inside)


def _moved(definitions: list[Definition]) -> set[str]:
    """The names of what may be asked for elsewhere than at positions: arguments, and what is looked up."""
    nodes = [node for item in definitions for node in ast.walk(item)]
    parts: list[ast.Node] = [node.base for node in nodes if isinstance(node, ast.Index)]
    parts += [arg for node in nodes if isinstance(node, ast.Call) for arg in node.args]
    return {name.id for part in parts for name in ast.walk(part) if isinstance(name, ast.Name)}


def _placed(definitions: list[Definition]) -> set[str]:
    """The attentions with a clause `offset`, and what they alone use."""
    users: dict[str, set[str]] = {item.name: set() for item in definitions}
    for item in definitions:
        for name in ast.walk(item):
            if isinstance(name, ast.Name) and name.id in users:
                users[name.id].add(item.name)
    found = {
        item.name
        for item in definitions
        if isinstance(item, ast.AttentionDef)
        and any(isinstance(clause, ast.Clause) and clause.word == "offset" for clause in item.clauses)
    }
    while more := {name for name, by in users.items() if by and by <= found} - found:
        found |= more
    return found


def _warning(message: str, span: Span, help: str = "") -> Diagnostic:
    return Diagnostic(message, span, help, "warning")


def _unread(item: Definition) -> Iterator[Diagnostic]:
    """Parameters and tables that are declared, and not named again."""
    read = {node.id for node in ast.walk(item) if isinstance(node, ast.Name)}
    for param in item.params:
        if param.name not in read:
            yield _warning(
                f"parameter `{param.name}` is not used", name_span(param), "leave it out, or read it"
            )
    for decl in (node for node in ast.walk(item) if isinstance(node, ast.InputDecl)):
        if decl.name not in read:
            table = input_table(decl)
            help = {
                "int": f"documents are kept apart by `mask documents({decl.name})`",
                "bool": f"keys are left out by `mask columns({decl.name})`",
            }.get(table.dtype, "")
            by_position = table.explicit == ("n",)
            yield _warning(f"nothing reads `{decl.name}`", name_span(decl), help if by_position else "")


def _of_text(item: Definition, placed: Set[str]) -> Iterator[Diagnostic]:
    """`placed` are names of attentions that say where their queries stand, and of what they use."""
    read = [
        name
        for builder in ast.walk(item)
        if isinstance(builder, ast.Builder)
        for name in ast.walk(builder.pred)
        if isinstance(name, ast.Name) and name.id == "nq"
    ]
    if read and item.name not in placed:
        yield _warning(
            "`nq` in a pattern: its meaning changes with the number of queries",
            read[0].span,
            "positions are absolute, from `offset` on; an attention that writes `offset` may read `nq`",
        )
    for node in ast.walk(item):
        match node:
            case ast.Range(lo=ast.Number(value=lo), hi=ast.Number(value=hi)) if lo > hi:
                yield _warning(f"the range {lo}..{hi} is empty", node.span, f"write `{hi}..{lo}`")
            case ast.Binary("-", ast.Name(id=a), ast.Binary("mod" | "//" as op, ast.Name(id=b)) as cut):
                bare = cut.span.start == cut.left.span.start
                if bare and _POSITION.fullmatch(a) and _POSITION.fullmatch(b):
                    yield _warning(
                        f"`{op}` binds closer than `-`: this is `{a} - ({quoted(cut)})`",
                        node.span,
                        f"write `({a} - {b}) {op} {quoted(cut.right)}`, or those brackets if it is meant",
                    )
            case ast.Compare(("<=",), (ast.Name(id="q" | "k" as x), ast.Name(id=size))):
                if _LENGTHS.search(size):
                    message = f"positions begin at 0: `{x} <= {size}` holds at one more than `{size}`"
                    yield _warning(message, node.span, f"write `{x} < {size}`")
            case ast.Binary("//", ast.Unary("-", half), ast.Number() as divisor) if not isinstance(
                half, ast.Number
            ):
                width, by = half.span.text, divisor.span.text
                yield _warning(
                    f"`-{width} // {by}` rounds down: the left side is longer for odd `{width}`",
                    node.span,
                    f"write `-({width} // {by})`",
                )


def _of_attention(
    item: ast.AttentionDef, elaborator: Elaborator, added: bool, definitions: list[Definition]
) -> Iterator[Diagnostic]:
    """`added`: to others, which may have the rows that are empty here; `definitions` are all of the text."""
    value = elaborator.instance(item, {}, Scope({}), item.name_span)
    assert isinstance(value, AttentionOf)
    masks = [c for c in item.clauses if isinstance(c, ast.Clause) and c.word == "mask"]
    seen = looked(elaborator, item.params, value.attention.streams)
    each = [clause for i in range(len(value.attention.groups)) for clause in _clauses_of(item, i)]
    parts = dict.fromkeys(c for c in each if c.word == "mask" and value.attention.offset is None)
    empty = [told for clause in parts for told in idle_parts(clause.value, seen)]
    yield from empty
    span = masks[0].value.span if len(masks) == 1 else item.name_span
    if len(parts) == len(masks) > 1 and not empty and relates_nothing(value.attention):
        help = "several masks intersect: for what one of them relates write `mask a | b`"
        empty = [
            _warning("no pair satisfies these masks", masks[0].value.span.to(masks[-1].value.span), help)
        ]
        yield from empty
    keyed = value.attention.keyed()
    for i, (group, (some, heads)) in enumerate(zip(value.attention.groups, keyed, strict=True)):
        if not (some.tables or empty or added) and value.attention.offset is None:
            yield from _empty_rows(some, heads, span)
        yield from _shift_variance(group, item)
        yield from _vanishing(group, [c for c in _clauses_of(item, i) if c.word == "norm"])
        scores = [c for c in _clauses_of(item, i) if c.word == "score"]
        yield from _weights(group, scores)
        yield from _alike(group, scores, elaborator)
        yield from _blindness(group, scores, elaborator)
        yield from scaled_twice(group, scores, elaborator)
        yield from exponential(group, scores)
        yield from saturated(group, scores)
        told = [*far_first(value.attention, group, [*_clauses_of(item, i)])]
        yield from told or decays(value.attention, group, [*_clauses_of(item, i)])
        yield from masked_by_score(value.attention, group, scores)
        yield from no_numbers(value.attention, group, scores, elaborator)
        yield from _crowded(group, [clause.value for clause in masks], span)
    yield from _lengths(value.attention, item)
    yield from _listed_keys(value.attention, item)
    if not added:
        yield from _backward(value.attention, masks, span)
    yield from _beyond(value.attention, item, elaborator)
    yield from _constant(value.attention, item, definitions)
    yield from _leaking(value.attention, item)
    yield from _dead_keys(value.attention, item)
    yield from _equal_heads(item)
    yield from _missing_heads(value.attention, item)
    yield from _miscounted_heads(value.attention, item)
    yield from _inexact(value.attention, masks, elaborator)
    if not any(group.relation.mask.tables for group in value.attention.groups) and not empty:
        yield from _holes(value.attention.any_head(), span)
    if len(masks) == 1 and not (value.attention.offset or value.attention.streams):
        yield from ahead(masks[0].value, seen)
    for clause in parts:
        yield from _lost(clause.value, seen)
    for clause in masks:
        yield from _block_causality(clause.value, elaborator)
    undefined = list(_undefined(value.attention, [clause.value for clause in masks], item.name_span))
    # without pairs there are none to scatter
    yield from undefined or (() if value.attention.approx else _scattered(value.attention, span))


TRIED = 4096
"""The length at which tiles are looked at."""
LONGER = 40
"""And one at which entries of tables are."""
SHORT = (1, 16)
"""And those at which it is cheap to look whether a mask has a value."""
MOST, FEW = 0.9, 0.3


def _undefined(attention: Attention, parts: list[ast.Expression], name: Span) -> Iterator[Diagnostic]:
    """A mask of these parts is refused at a length: a list is read beyond its end, a number has no log2."""
    from attndsl.meaning.pointwise import partial
    from attndsl.tiles.lowering import sizes_of, tiles_of, written_out

    masks = [group.relation.mask for group in attention.groups]
    read = {table for mask in masks for table in mask.tables}
    told_later = (
        attention.offset is not None or (read and attention.of_streams) or not read <= {*attention.inputs}
    )
    if told_later or not (read or any(map(partial, masks))):
        return
    heads = attention.enough_heads()
    for n in SHORT if read else (*SHORT, TRIED):
        try:
            if n in SHORT:
                tables = {table.name: _blank(table, n, heads) for table in read}
                written_out(attention, sizes_of(attention, n, None, heads), tables, counts=False)
            else:
                tiles_of(attention, n, heads=heads)
        except AttnError as error:
            told = at_lookup(error.diagnostics[0], parts)
            message = f"refused at n = {n}: {told.message}"
            spans = [node.span for part in parts for node in ast.walk(part) if _reads(node, told.message)]
            span = spans[0] if len(spans) == 1 else parts[0].span if len(parts) == 1 else name
            yield _warning(message, told.span or span, told.help)
            return


def _blank(table: Table, n: int, heads: int) -> NDArray[Any]:
    """Zeros, of axes with a name of their own more than positions can ask for."""
    sizes = {"n": n, "nq": n, "B": 1, "H": heads}
    shape = [axis if isinstance(axis, int) else sizes.get(axis, 4 * n + 64) for axis in table.dims]
    return np.zeros(shape, {"int": np.int64, "bool": np.bool_, "float": np.float32}[table.dtype])


def _reads(node: ast.Node, message: str) -> bool:
    """Whether a message about a number without a value may be about this."""
    match node:
        case ast.Call(func=ast.Name(id=("log2" | "isqrt") as function)):
            return message.startswith(function)
        case ast.Binary("**"):
            return message.startswith("a power")
        case ast.Index():
            return " on axis " in message
    return False


def _lengths(attention: Attention, item: ast.AttentionDef) -> Iterator[Diagnostic]:
    """A table of a position each whose axis is called as others call the number of positions."""
    if attention.offset is not None or attention.of_streams:
        return
    parts = (e for group in attention.groups for e in (group.relation.mask, group.score, group.decay) if e)
    lookups = (node for e in parts for node in ir.nodes(e) if node.op == "lookup")
    read = {(node.value, axis) for node in lookups for axis in _read_at_positions(node)}
    for decl in (decl for c in item.clauses if isinstance(c, ast.Inputs) for decl in c.decls):
        table = input_table(decl)
        for axis in dict.fromkeys(axis for axis in table.dims if (table, axis) in read):
            axes = ", ".join("n" if other == axis else str(other) for other in table.dims)
            yield _warning(
                f"`{axis}` is a size that `{table.name}` brings along, and it is read at positions",
                decl.span,
                f"{LENGTH}: write `{table.name} : {table.dtype}[{axes}]`",
            )


def _listed_keys(attention: Attention, item: ast.AttentionDef) -> Iterator[Diagnostic]:
    """A table with an integer for each position that is read as a list of keys: 0 and 1 are none."""
    nodes = (node for group in attention.groups for node in ir.nodes(group.relation.mask))
    listing = {node.value for node in nodes if node.op == "intable" and node.args[0] is K}
    for decl in (decl for c in item.clauses if isinstance(c, ast.Inputs) for decl in c.decls):
        table = input_table(decl)
        if table in listing and table.dims[-1] == "n":
            axes = ", ".join(map(str, table.dims))
            yield _warning(
                f"`{table.name}` lists keys here: one of zeros and ones lists keys 0 and 1",
                decl.span,
                f"a mask of keys is `{table.name} : bool[{axes}]`",
            )


def _backward(attention: Attention, masks: list[ast.Clause], span: Span) -> Iterator[Diagnostic]:
    """Keys from the query on alone, with no word that says so."""
    from attndsl.relations.proofs import follows

    named = {name.id for clause in masks for name in ast.walk(clause) if isinstance(name, ast.Name)}
    mask = ir.any_of(*(group.relation.mask for group in attention.groups))
    told_elsewhere = attention.offset is not None or attention.of_streams or mask.tables
    if told_elsewhere or "T" in named or not mask.free <= {*"qkn"}:
        return
    if follows(mask, ir.le(Q, K)) and not follows(mask, ir.eq(Q, K)):
        help = "keys before the query have `k <= q`; where it is meant write `T(causal)`"
        yield _warning("no query sees a key before it", span, help)


def _read_at_positions(lookup: Expr) -> Iterator[str]:
    """The axes that are read at a query or key itself, and are called as others call their number."""
    assert isinstance(lookup.value, Table)
    for axis, index in zip(lookup.value.dims, lookup.args, strict=False):
        if index in (Q, K) and isinstance(axis, str) and (axis in {*"NSTL"} or habit(axis) == LENGTH):
            yield axis


def _beyond(attention: Attention, item: ast.AttentionDef, elaborator: Elaborator) -> Iterator[Diagnostic]:
    """A score or decay of a live pair reads beyond a table that is as long as the text says."""
    from attndsl.relations.proofs import subset

    if attention.offset is not None or attention.of_streams:
        return  # positions are others there than those that a claim is about
    told: set[Table] = set()
    for group in attention.groups:
        read = [found for e in (group.score, group.decay) if e is not None for found in _guarded_lookups(e)]
        for lookup, guard in dict.fromkeys(read):
            table = lookup.value
            assert isinstance(table, Table)
            for axis, (index, size) in enumerate(zip(lookup.args, table.dims, strict=False)):
                # how many heads there are is said at the call
                if table in told or not isinstance(size, int) or not {*index.free, *guard.free} <= {*"qkn"}:
                    continue
                inside = ir.all_of(ir.le(ir.ZERO, index), ir.lt(index, ir.const(size)))
                verdict = subset(ir.all_of(group.relation.mask, guard), inside, group.heads)
                if (at := verdict.counter_example) is None:
                    continue
                told.add(table)
                entry = ir.number(ir.substitute(index, {x: ir.const(value) for x, value in at.items()}))
                message = (
                    f"`{table.name}` has {size} entr{'y' if size == 1 else 'ies'} on axis {axis}, but entry "
                    f"{entry} is read at n = {at['n']} by query {at['q']} of key {at['k']}"
                )
                half = (size - 1) // 2
                kept = (
                    f"clamp(x, -{half}, {half}) + {half}" if (entry or 0) < 0 else f"clamp(x, 0, {size - 1})"
                )
                help = f"keep the index inside by `{kept}`, or the pair out of the mask"
                found = at_lookup(Diagnostic(message, None, help, "warning"), [item])
                found = at_lookup(found, [*elaborator.definitions.values()])
                yield found if found.span else replace(found, span=item.name_span)


def _constant(attention: Attention, item: ast.AttentionDef, own: list[Definition]) -> Iterator[Diagnostic]:
    """A score or decay reads one entry alone by an index that is written of q and k."""
    from attndsl.meaning.pointwise import partial
    from attndsl.relations.proofs import follows

    if attention.offset is not None or attention.of_streams:
        return
    told: set[Table] = set()
    used = {name.id for name in ast.walk(item) if isinstance(name, ast.Name)}
    called = [each for each in own if isinstance(each, ast.Definition) and each.name in used]
    for group in attention.groups:
        read = [found for e in (group.score, group.decay) if e is not None for found in _guarded_lookups(e)]
        # what tables say only leaves fewer pairs
        parts = group.relation.mask.args if group.relation.mask.op == "and" else (group.relation.mask,)
        mask = ir.all_of(*(part for part in parts if not part.tables))
        for lookup in dict.fromkeys(lookup for lookup, guard in read if guard is ir.TRUE):
            table = lookup.value
            assert isinstance(table, Table)
            for index, size in zip(lookup.args[len(table.implicit) :], table.explicit, strict=False):
                if table in told or size == 1 or not index.free & {"q", "k"} or index.tables:
                    continue
                if not {*index.free, *mask.free} <= {*"qkn"} or partial(index) or partial(mask):
                    continue
                found = _entries(mask, index)
                if len(found) != 1 or not follows(mask, ir.eq(index, ir.const(found[0]))):
                    continue
                told.add(table)
                message = f"entry {found[0]} of `{table.name}` is read at every pair, and no other"
                places = [*lookups_of(table.name, [item]), *lookups_of(table.name, [*called, item])]
                if not places:
                    yield _warning(message, item.name_span)
                    continue
                turned = _entries(mask, ir.substitute(index, {"q": K, "k": Q}))
                help = "exchange `q` and `k` in its index" if len(turned) > 1 else ""
                yield _warning(message, places[0][0].span, help)


def _entries(mask: Expr, index: Expr) -> list[int]:
    """What an index is at the pairs of a short sequence other than a query with itself."""
    from attndsl.meaning.pointwise import evaluate

    at = {"n": ir.const(LONGER)}
    q, k = np.indices((LONGER, LONGER)).reshape(2, -1)
    live = evaluate(ir.substitute(mask, at), q, k) & (q != k)
    return [int(entry) for entry in np.unique(evaluate(ir.substitute(index, at), q[live], k[live]))]


def _guarded_lookups(root: Expr) -> Iterator[tuple[Expr, Expr]]:
    """The look-ups of a score, each with the conditions under which it is read."""
    seen = set[tuple[Expr, Expr]]()
    left = [(root, ir.TRUE)]
    while left:
        e, guard = left.pop()
        if (e, guard) in seen:
            continue
        seen.add((e, guard))
        if e.op == "lookup":
            yield e, guard
        for arg, condition in zip(e.args, _conditions(e), strict=True):
            left.append((arg, ir.all_of(guard, condition)))


def _conditions(e: Expr) -> Iterator[Expr]:
    """What holds where each argument is read."""
    if e.op == "where":
        yield from (ir.TRUE, e.args[0], ir.negate(e.args[0]))
        return
    before = ir.TRUE
    for arg in e.args:
        yield before
        if e.op in ("and", "or"):
            before = ir.all_of(before, arg if e.op == "and" else ir.negate(arg))


def _scattered(attention: Attention, span: Span) -> Iterator[Diagnostic]:
    """Nearly every tile of the causal half, or of the whole, is live for a few live pairs in each."""
    from attndsl.relations.proofs import subset
    from attndsl.tiles.lowering import tiles_of

    masks = [group.relation.mask for group in attention.groups]
    if any(mask.tables for mask in masks):
        return
    try:
        blocks = tiles_of(attention, TRIED, heads=attention.enough_heads())
    except AttnError:
        return  # a mask that is refused at this length says nothing about tiles
    full, partial, empty, _ = blocks.tiles
    half = all(subset(mask, ir.le(K, Q)).status == "proved" for mask in masks)
    side = TRIED // blocks.block_size
    area = (side + 1) / (2 * side) if half else 1.0
    live, kept = (full + partial) / (full + partial + empty) / area, blocks.density / area
    if live >= MOST and kept <= FEW:
        yield _warning(
            f"at n = {TRIED} {live:.0%} of the tiles are live for {kept:.0%} of the pairs: "
            "dense attention costs the same",
            span,
            "gather what is related into blocks, as `blocks(64, ...)` does",
        )


def _leaking(attention: Attention, item: ast.AttentionDef) -> Iterator[Diagnostic]:
    """Keys of a stream that are made of tokens after a query which sees none after it otherwise."""
    from attndsl.relations.proofs import subset

    clauses = [clause for clause in item.clauses if isinstance(clause, ast.Keys)]
    if not attention.streams:
        return
    for group in attention.groups:
        causal = [
            subset(read, ir.le(K, Q)) if read is not ir.FALSE else None
            for read in read_by_each(attention.streams, group.relation.mask)
        ]
        if not any(verdict is not None and verdict.status == "proved" for verdict in causal):
            continue
        for part, verdict in zip(clauses[0].streams, causal, strict=True):
            if verdict is not None and verdict.status == "refuted" and verdict.counter_example is not None:
                at = verdict.counter_example
                yield _warning(
                    f"made of later tokens: at n = {at['n']} query {at['q']} reads token {at['k']} by it, "
                    "and by other keys none after it",
                    part.span,
                )


def _dead_keys(attention: Attention, item: ast.AttentionDef) -> Iterator[Diagnostic]:
    """A stream beside others that the mask leaves no key of."""
    masks = [ir.all_of(group.heads, group.relation.mask) for group in attention.groups]
    if any(mask.tables for mask in masks) or len(attention.streams) < 2:
        return
    (clause,) = (clause for clause in item.clauses if isinstance(clause, ast.Keys))
    each = zip(*(at_slots(attention.streams, mask) for mask in masks), strict=True)
    for part, slots in zip(clause.streams, each, strict=True):
        inside = ir.all_of(ir.le(ir.ZERO, SLOT), ir.lt(SLOT, slots[0][0].many))
        if all(never(ir.all_of(inside, here)) for _, here in slots):
            yield _warning("no query has a key of this", part.span, "leave it out, or let the mask have it")


def _equal_heads(item: ast.AttentionDef) -> Iterator[Diagnostic]:
    """Two groups of heads of the same clauses."""
    for clause in (clause for clause in item.clauses if isinstance(clause, ast.Heads)):
        for i, group in enumerate(clause.groups):
            if any(group.clauses == other.clauses for other in clause.groups[:i]):
                said = "these heads have the clauses of others: both groups do the same"
                yield _warning(said, group.span, "write one group, or leave `heads` out")


def _lost(e: ast.Expression, looked: Looked) -> Iterator[Diagnostic]:
    """A choice at random or by content among more than the mask leaves: what it takes beyond is lost."""
    from attndsl.relations.proofs import follows

    joined = [node.args for node in ast.walk(e) if isinstance(node, ast.Nary) and node.op == "&"]
    for call, args in ((arg, together) for together in joined for arg in together):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            continue
        at_random = call.func.id == "random"
        if not (at_random or looked.elaborator.selection(call.func)):
            continue
        among = next((arg.value for arg in call.args if arg.name == "of"), None)
        if among is not None and any(isinstance(x, ast.Name) and x.id == "blocks" for x in ast.walk(among)):
            continue  # blocks are cut after the choice
        chosen = looked.mask(among) if among is not None else ir.TRUE if at_random else None
        beside = [(arg, looked.mask(arg)) for arg in args if arg is not call]
        left = ir.all_of(*(mask for _, mask in beside if mask is not None))
        if chosen is not None and not follows(chosen, left):
            said = f"keys that the mask cuts off take places of `{call.func.id}`"
            yield _warning(said, call.span, _among(call, [arg for arg, _ in beside]))


def _missing_heads(attention: Attention, item: ast.AttentionDef) -> Iterator[Diagnostic]:
    some = ir.any_of(*(group.heads for group in attention.groups))
    last = attention.least_heads
    numbers = (last, last + 1, *(heads for heads in HEADS if heads > last))
    first = [next((h for h in range(H) if not _holds(some, ir.TRUE, h, H)), None) for H in numbers]
    if None not in first:
        said = f"head {first[0]} is in no group: it serves no number of heads"
        yield _warning(said, item.name_span, "add `else { ... }`")
    elif not _holds(some, ir.TRUE, last, last + 1):
        said = f"heads from {last} on are in no group: it serves {last} heads alone"
        yield _warning(said, item.name_span, "add `else { ... }`")


HEADS = (8, 12, 16, 32, 64)
"""Numbers of heads at which groups are looked at."""


def _miscounted_heads(attention: Attention, item: ast.AttentionDef) -> Iterator[Diagnostic]:
    """Ranges of heads with one more than is meant, and a number that may be meant to be how many."""
    for clause in (c for c in item.clauses if isinstance(c, ast.Heads)):
        written = list(zip(clause.groups, attention.groups, strict=True))
        for i, (group, held) in enumerate(written):
            others = ir.any_of(*(other.heads for _, other in written[i + 1 :]))
            shared = [
                heads for heads in HEADS if any(_holds(held.heads, others, h, heads) for h in range(heads))
            ]
            match group.which:
                case ast.Range(lo, hi) if len(shared) == len(HEADS):
                    help = f"both ends of a range are in it: write `{quoted(lo)}..{quoted(hi)} - 1`"
                    head = next(h for h in range(HEADS[0]) if _holds(held.heads, others, h, HEADS[0]))
                    message = (
                        f"head {head} of {HEADS[0]} is in two groups, and so with other numbers of heads"
                    )
                    yield _warning(message, group.which.span, help)
                case ast.Range(ast.Number(0), ast.Binary("//", ast.Name("H"), ast.Number()) as hi):
                    half = quoted(hi)
                    help = f"both ends of a range are in it: write `0..{half} - 1`"
                    yield _warning(f"these are {half} + 1 heads", group.which.span, help)
                case ast.Number(value) if value > 0 and len(written) == 2 and clause.groups[1].which is None:
                    first = f"the first {value} are `0..{value - 1}`" if value > 1 else "the first is `0`"
                    yield Diagnostic(f"head {value} alone: {first}", group.which.span, severity="note")


def _holds(one: Expr, other: Expr, h: int, heads: int) -> bool:
    at = {"h": ir.const(h), "H": ir.const(heads)}
    return ir.substitute(ir.all_of(one, other), at) is ir.TRUE


def _inexact(attention: Attention, masks: list[ast.Clause], elaborator: Elaborator) -> Iterator[Diagnostic]:
    """What is no integer relation is bounded from both sides: right, but verdicts may stay open."""
    from attndsl.relations.relation import is_affine

    if attention.selected or all(is_affine(group.relation.mask) for group in attention.groups):
        return
    tables = {table.name for table in attention.inputs}
    for clause in masks:
        for part in _operands(clause.value):
            names = {name.id for name in ast.walk(part) if isinstance(name, ast.Name)}
            mask = looked(elaborator, ()).relation(part)
            if names & tables or (not is_affine(mask) if mask is not None else not tables):
                message = "no integer relation: right, but found tile by tile, and proofs may stay open"
                yield Diagnostic(message, part.span, severity="note")
                return


def _operands(e: ast.Expression) -> tuple[ast.Expression, ...]:
    return e.args if isinstance(e, ast.Nary) and e.op == "&" else (e,)


def _empty_rows(mask: Expr, heads: Expr, span: Span) -> Iterator[Diagnostic]:
    from attndsl.relations.proofs import every_row, follows

    verdict = every_row(mask, heads)
    if verdict.status == "refuted" and verdict.counter_example is not None:
        at = verdict.counter_example
        head = f", head {at['h']}" if "h" in at else ""
        yield _warning(f"query {at['q']} has no key at n = {at['n']}{head}", span, "its output is 0")
        inside = ir.all_of(ir.lt(Q, ir.const(at["q"])), ir.lt(K, ir.const(at["q"])))
        if at["q"] > 1 and mask.free <= {*"qkn"} and follows(inside, mask):
            yield _warning(f"at n = {at['q']} every query sees every key", span)


def _holes(mask: Expr, span: Span) -> Iterator[Diagnostic]:
    """All distances share a divisor: the residues modulo it never meet."""
    from attndsl.layers.reach import common_divisor

    divisor = common_divisor(mask)
    if divisor > 1:
        yield _warning(
            f"every distance is a multiple of {divisor}: positions of other residues never meet, "
            "however many layers",
            span,
            "add what joins them, such as `| radius(1)`",
        )


def _block_causality(e: ast.Expression, elaborator: Elaborator) -> Iterator[Diagnostic]:
    """`blocks(b, R)` with a causal R is causal over blocks alone."""
    from attndsl.relations.proofs import subset

    causal = ir.le(K, Q)
    if not (isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id == "blocks"):
        return
    over_tokens = looked(elaborator, ()).relation(e)
    if over_tokens is None:
        return
    over_blocks = elaborator.pattern(e.args[-1].value, Scope({}), TOKENS).at(Q, K, TOKENS).mask
    if subset(over_blocks, causal).status != "proved":
        return
    verdict = subset(over_tokens, causal)
    if verdict.status == "refuted" and verdict.counter_example is not None:
        at = verdict.counter_example
        yield _warning(
            f"causal over blocks, not over tokens: query {at['q']} sees key {at['k']}",
            e.span,
            "write `causal & ...`",
        )


def _shift_variance(group: HeadGroup, item: ast.AttentionDef) -> Iterator[Diagnostic]:
    """A bias of the key alone means a bias of the distance only where a shift of a row changes nothing."""
    key_only = _key_only_bias(group.score)
    if not key_only or (group.norm.kind == "softmax" and group.norm.sink is None):
        return
    score = next((c for c in item.clauses if isinstance(c, ast.Clause) and c.word == "score"), None)
    what = "a sink" if group.norm.kind == "softmax" else group.norm.kind
    yield _warning(
        f"a bias of the key alone equals one of the distance under plain softmax only, not with {what}",
        item.name_span if score is None else score.value.span,
        "write the distance: q - k",
    )


def _vanishing(group: HeadGroup, norms: list[ast.Clause]) -> Iterator[Diagnostic]:
    if group.norm.kind == "linear" and not never_negative(group.score):
        yield _warning(
            "the denominator may vanish: weights of both signs are divided by their sum",
            norms[0].value.span,
            "use features that are never negative, such as `elu1` and `favor`, or `norm none`",
        )


def _weights(group: HeadGroup, scores: list[ast.Clause]) -> Iterator[Diagnostic]:
    """Inner products of features that are never negative are made to be weights, not logits."""
    form = feature_form(group.score, None)
    if (
        group.norm.kind == "softmax"
        and isinstance(form, FeatureForm)
        and never_negative(form.phi_q)
        and never_negative(form.phi_k)
    ):
        yield _warning(
            "a softmax of what is a weight already: the features are never negative",
            scores[-1].value.span,
            "write `norm linear`, which divides by the sum",
        )


def _crowded(group: HeadGroup, masks: list[ast.Expression], span: Span) -> Iterator[Diagnostic]:
    """Keys that a table cuts off take places of a choice: other documents, padding."""
    from attndsl.relations.proofs import follows

    mask = group.relation.mask
    cut = ir.all_of(*(part for part in mask.args if _of_inputs(part)) if mask.op == "and" else ())
    if "k" not in cut.free:
        return
    for leaf in lists_of(mask):
        origin = origin_of(leaf)
        # documents are of tokens, and blocks are cut by them after the choice
        if origin.rows > 1 or origin.unit > 1 or follows(origin.of or ir.TRUE, cut):
            continue
        named = [node for e in masks for node in ast.walk(e) if _names_it(node, origin)]
        message = f"keys that the mask cuts off take places of `{origin.selection}`"
        if len(named) == 1 and isinstance(named[0], ast.Call):
            yield _warning(message, named[0].span, _among(named[0], masks))
        else:
            yield _warning(message, span, "say in `of` what the mask says beside it")


def _names_it(e: ast.Node, origin: Selected) -> bool:
    return isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and e.func.id == origin.selection


def _of_inputs(part: Expr) -> bool:
    given = [table for table in part.tables if table.known is None]
    return bool(given) and not any(isinstance(table.origin, Selected) for table in given)


def _among(call: ast.Call, masks: list[ast.Expression]) -> str:
    """How a choice is written among what stands beside it."""
    beside = [
        part.span.text
        for e in masks
        for part in _operands(e)
        if all(node is not call for node in ast.walk(part))
    ]
    of = [arg.value.span.text for arg in call.args if arg.name == "of"]
    return f"choose among what is seen: `of = {' & '.join(dict.fromkeys([*of, *beside]))}`"


def _alike(group: HeadGroup, scores: list[ast.Clause], elaborator: Elaborator) -> Iterator[Diagnostic]:
    """Features by a learned matrix, all of one number, with nothing beside that tells its rows apart. Of D
    features that may be Q and K."""
    if not all(table.learned for table in group.score.tables):
        return
    matrices = {node.args[0].value for node in ir.nodes(group.score) if node.op == "matvec"}
    for matrix in sorted(group.score.tables & matrices, key=lambda table: table.name):
        rows = matrix.dims[-2]
        if rows in ("D", 1):
            continue
        clause = next((c for c in scores if matrix.name in names_in(c, elaborator)), scores[-1])
        yield _warning(
            f"the {rows} rows of `{matrix.name}` begin alike, and equal gradients keep them so",
            clause.value.span,
            f"write `orthogonal({rows})` or `gaussian_rows({rows})`, or fill it in the module first",
        )


def _key_only_bias(score: Expr) -> bool:
    if score.op != "add" or ir.var("s") not in score.args:
        return False
    return any("k" in part.free and not part.free & {"q", "s", "Q", "K"} for part in score.args)


CONTENT = frozenset({"s", "Q", "K"})


def _blindness(group: HeadGroup, scores: list[ast.Clause], elaborator: Elaborator) -> Iterator[Diagnostic]:
    """Nothing of q and k reaches the weights. What a decay is given at each call may stand for them."""
    gated = group.decay is not None and not all(table.learned for table in group.decay.tables)
    if gated or group.score.free & CONTENT:
        return
    # a cap that follows reads `s`, and is not what lost it
    losing = [clause for clause in scores if not names_in(clause, elaborator) & CONTENT]
    yield _warning(
        "no `s`, `Q` or `K` in this score: what is in the keys changes no weight",
        (losing or scores)[-1].value.span,
        "add it to the logit: `s + ...`",
    )


def _clauses_of(item: ast.AttentionDef, group: int) -> Iterator[ast.Clause]:
    """Those that a group of heads has, from top to bottom."""
    for clause in item.clauses:
        if isinstance(clause, ast.Heads):
            yield from clause.groups[group].clauses
        elif isinstance(clause, ast.Clause):
            yield clause
