"""The clause `keys`: streams of keys, and what masks and scores may ask of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from attndsl import expr as ir
from attndsl.attention import HeadGroup, Relation
from attndsl.errors import Span, fail, suggest
from attndsl.expr import Expr, Table
from attndsl.language.arguments import bind_arguments_of
from attndsl.language.mistakes import expected, quoted
from attndsl.language.values import TOKENS, Scope, TableOf, as_table, is_whole
from attndsl.language.vocabulary import FUNCTIONS
from attndsl.relations.proofs import follows
from attndsl.streams import Pool, Projection, Stream, Streams, Stretch, memory, numbered, over
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.language.elaborate import Elaborator

USAGE = {
    "mem": "mem(m)",
    "pool": "pool(b, stride = b, by = mean, of = tokens)",
    "proj": "proj(E, F = E)",
}
MEMORY_LIMIT = 2**24
"""Keys of memory."""


def streams_of(el: Elaborator, clause: ast.Keys, env: Scope) -> Streams:
    """What the clause says; tokens alone are none."""
    env = replace(env, clause=clause, binding="")
    found = [_stream(el, e, env) for e in clause.streams]
    seen: list[ast.Expression] = [e for e, s in zip(clause.streams, found, strict=True) if s == Stretch()]
    if len(seen) > 1:
        raise fail("`tokens` is given twice", seen[1].span)
    placed = _placed(found)
    if memory(placed) > MEMORY_LIMIT:
        raise fail(f"{memory(placed):,} keys of memory, and the limit is {MEMORY_LIMIT:,}", clause.span)
    return () if placed == (Stretch(),) else placed


def _placed(streams: list[Stream]) -> Streams:
    """With memories one after the other, the last one ending before position 0."""
    end, found = 0, []
    for stream in reversed(streams):
        of = stream.of if isinstance(stream, Pool) else stream
        if isinstance(of, Stretch) and of.length is not None:
            end -= of.length
            of = replace(of, first=end)
            stream = replace(stream, of=of) if isinstance(stream, Pool) else of
        found.append(stream)
    return tuple(found[::-1])


def _stream(el: Elaborator, e: ast.Expression, env: Scope) -> Stream:
    match e:
        case ast.Name("tokens"):
            return Stretch()
        case ast.Call(ast.Name("mem")):
            return _mem(el, e, env)
        case ast.Call(ast.Name("pool")):
            return _pool(el, e, env)
        case ast.Call(ast.Name("proj")):
            return _proj(el, e, env)
        case ast.Name("mem" | "pool" | "proj" as word):
            raise fail(f"`{word}` needs its arguments", e.span, f"write `{USAGE[word]}`")
    raise fail("a stream of keys is `tokens`, `mem(m)`, `pool(b)` or `proj(E)`", e.span, _meant(e))


MEMORIES = frozenset(
    "memory memories mem_tokens persistent prefix prompt cache past learned registers".split()
)
POOLS = frozenset("compress compressed mean avg_pool mean_pool max_pool pooled downsample".split())


def _meant(e: ast.Expression) -> str:
    """A stream that goes by another name elsewhere."""
    func, args = (e.func, e.args) if isinstance(e, ast.Call) else (e, ())
    word = func.id.lower() if isinstance(func, ast.Name) else ""
    size = quoted(args[0].value) if len(args) == 1 else ""
    if word in MEMORIES:
        return f"write `mem({size or 32}) ++ tokens`: keys before the tokens, given at each call"
    if word in POOLS:
        return f"write `pool({size or 16})`: means of so many tokens each"
    if isinstance(e, ast.Nary | ast.Binary):
        return "join them by `++`, as `mem(32) ++ tokens`"
    if word in ("q", "k", "v", "x", "keys", "full", "causal", "all", "context"):
        return "write `keys tokens`, or leave it out: keys are the tokens"
    return suggest(word, (*USAGE, "tokens")) or "join them by `++`"


def _mem(el: Elaborator, e: ast.Call, env: Scope) -> Stretch:
    given = bind_arguments_of("mem", ("m",), (), e, USAGE["mem"])
    return Stretch(0, _size(el, given["m"], env, "the length of a memory"))


def _pool(el: Elaborator, e: ast.Call, env: Scope) -> Pool:
    first = e.args[0].value if e.args else None
    if isinstance(first, ast.Name) and first.id in ("mean", "max"):
        raise fail(
            "the number of keys in a slot comes first", first.span, f"write `pool(4, by = {first.id})`"
        )
    given = bind_arguments_of("pool", ("b",), ("stride", "by", "of", "values"), e, USAGE["pool"])
    size = _size(el, given["b"], env, "the length of a pool")
    stride = _size(el, given["stride"], env, "the stride of a pool") if "stride" in given else size
    if stride > size:
        raise fail(
            f"keys between pools of {size} would be in none: the stride is {stride}",
            given["stride"].span,
            f"write `{size}` or less",
        )
    of = _stream(el, given["of"], env) if "of" in given else Stretch()
    if not isinstance(of, Stretch):
        raise fail("a pool is of `tokens` or of `mem(m)`", given["of"].span)
    if of.length is not None and of.length < size:
        raise fail(f"a pool of {size} keys, and the memory has {of.length}", given["of"].span)
    by = _by(el, given["by"], env, size, "by") if "by" in given else "mean"
    values = _by(el, given["values"], env, size, "values") if "values" in given else by
    return Pool(of, size, stride, by, values)


def _by(
    el: Elaborator, e: ast.Expression, env: Scope, size: int, name: str
) -> Literal["mean", "max"] | Table:
    match e:
        case ast.Name("mean"):
            return "mean"
        case ast.Name("max"):
            return "max"
        case ast.Name(word) if word in FUNCTIONS:
            raise fail(f"a pool is by `mean`, by `max` or by a table of numbers, not by `{word}`", e.span)
    table = _table(el, e, env, name, "`mean`, `max` or a table of numbers")
    shape = table.explicit
    if not (len(shape) <= 3 and shape[:1] == (size,) and all(axis == "D" for axis in shape[1:])):
        wanted = f"[{size}], [{size}, D] or [{size}, D, D]"
        raise fail(f"`{table.name}` is {_shape(table)}, and must be {wanted}", e.span)
    return table


def _proj(el: Elaborator, e: ast.Call, env: Scope) -> Projection:
    given = bind_arguments_of("proj", ("E",), ("F",), e, USAGE["proj"])
    tables = [_projection(el, given[name], env, name) for name in ("E", "F") if name in given]
    keys, values = tables[0], tables[-1]
    if keys.explicit[0] != values.explicit[0]:
        raise fail(
            f"keys are projected to {keys.explicit[0]} slots, and values to {values.explicit[0]}",
            given["F"].span,
        )
    return Projection(keys, values)


def _projection(el: Elaborator, e: ast.Expression, env: Scope, name: str) -> Table:
    table = _table(el, e, env, name, "a table of [slots, n]")
    shape = table.explicit
    if len(shape) != 2 or not isinstance(shape[0], int) or shape[1] == "D":
        raise fail(
            f"`{table.name}` is {_shape(table)}, and a projection is [slots, n], with a number of slots",
            e.span,
        )
    return table


def _table(el: Elaborator, e: ast.Expression, env: Scope, name: str, noun: str) -> Table:
    value = as_table(el.value(e, replace(env, binding=name), TOKENS))
    if not isinstance(value, TableOf) or not is_whole(value):
        raise expected(noun, value, e)
    if value.table.dtype != "float":
        raise fail(f"`{value.table.name}` is {value.table.dtype}, and keys are made by real numbers", e.span)
    return value.table


def _size(el: Elaborator, e: ast.Expression, env: Scope, what: str) -> int:
    size = el.constant(e, env, TOKENS, what)
    if size <= 0:
        raise fail(f"{what} is {size}, and must be positive", e.span)
    return size


def _shape(table: Table) -> str:
    return f"[{', '.join(map(str, table.dims))}]"


def over_entries(streams: Streams, group: HeadGroup, clauses: Sequence[ast.Clause]) -> HeadGroup:
    """The group with `k` the number of an entry. Raises AttnError where it asks for a position of slots that
    have none, or chooses among keys that stand where others do."""
    if not streams:
        return group
    relation = group.relation
    parts = (
        ("mask", relation.mask),
        ("mask", relation.count),
        ("score", group.score),
        ("decay", group.decay),
    )
    for word, e in parts:
        written = [clause.value for clause in clauses if clause.word == word]
        if e is not None and written:
            _check(streams, e, written[0].span.to(written[-1].span))
            _check_look_ups(streams, e, relation.mask if word != "mask" else ir.TRUE, written)

    def at(e: Expr | None) -> Expr | None:
        return None if e is None else numbered(streams, e)

    mask, score = numbered(streams, relation.mask), numbered(streams, group.score)
    return replace(group, relation=Relation(mask, at(relation.count)), score=score, decay=at(group.decay))


def _check(streams: Streams, e: Expr, span: Span) -> None:
    for i, (stream, here) in enumerate(zip(streams, over(streams, e), strict=True)):
        if isinstance(stream, Projection) and "k" in here.free:
            help = "" if len(streams) == 1 else f"ask other keys alone: `stream != {i} and ...`"
            raise fail(
                f"`{stream.keys.name}` makes slots of all tokens, later ones too: they stand nowhere, and "
                "this asks for `k`",
                span,
                help,
            )
    chosen = sorted({t.name.partition("#")[0] for t in e.tables if isinstance(t.origin, ir.Selected)})
    if chosen and numbered(streams, ir.var("k")) is not ir.var("k"):
        raise fail(
            f"`{chosen[0]}` chooses among keys at places of their own: tokens, and memory before them",
            span,
            "choose in an attention without pools and projections",
        )
    for table in e.tables:
        origin = table.origin
        if isinstance(origin, ir.Selected) and origin.of is not None and "stream" in origin.of.free:
            raise fail("`of` says by position among which keys is chosen", span, "write `k < 0` for memory")


def _check_look_ups(streams: Streams, e: Expr, live: Expr, written: Sequence[ast.Expression]) -> None:
    """Raises AttnError where a table of tokens is looked up at the place of a memory, of pairs that are
    `live`: at the end of a stretch, unless what stands before the look-up keeps all queries from it."""
    for i, stream in enumerate(streams):
        if isinstance(stream, Projection) or not memory((stream,)):
            continue
        last = ir.sub(stream.many, ir.ONE)
        for place in {stream.position(slot) for slot in (ir.ZERO, last)}:
            here, guarded = (ir.substitute(x, {"stream": ir.const(i), "k": place}) for x in (e, live))
            for table, guard in _look_ups(here, guarded, {}):
                if not guard.tables and not follows(guard, ir.FALSE):
                    said = f"`{table.name}` has an entry for each token, and none for memory"
                    form = "stream == {} or ..." if e.type == "bool" else "where(stream == {}, 0.0, ...)"
                    help = f"leave memory out of it: `{form.format(i)}`"
                    raise fail(said, _look_up_span(table, written), help)


def _look_ups(e: Expr, guard: Expr, done: dict[tuple[Expr, Expr], None]) -> Iterator[tuple[Table, Expr]]:
    """The tables that are read before their first entry, each with what holds where it is."""
    if guard is ir.FALSE or (e, guard) in done or not e.tables:
        return
    done[e, guard] = None
    table, guards = e.value, [guard] * len(e.args)
    if isinstance(table, Table) and table.dtype != "bool":
        indices = e.args[(e.op == "intable") + len(table.implicit) :]
        places = [ir.number(x) for x, axis in zip(indices, table.explicit, strict=False) if axis == "n"]
        if any(place is not None and place < 0 for place in places):
            yield table, guard
    if e.op == "and":
        guards = [ir.all_of(guard, *e.args[:j]) for j in range(len(e.args))]
    if e.op == "where":
        guards[1:] = ir.all_of(guard, e.args[0]), ir.all_of(guard, ir.negate(e.args[0]))
    for arg, known in zip(e.args, guards, strict=True):
        yield from _look_ups(arg, known, done)


def _look_up_span(table: Table, written: Sequence[ast.Expression]) -> Span:
    """Where it is looked up, if that is written once, else all that is written."""
    inside = [
        node.span
        for e in written
        for node in ast.walk(e)
        if isinstance(node, ast.Index) and isinstance(node.base, ast.Name) and node.base.id == table.name
    ]
    return inside[0] if len(inside) == 1 else written[0].span.to(written[-1].span)
