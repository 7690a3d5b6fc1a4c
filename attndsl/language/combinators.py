"""The combinators that open a new space, whose argument is text of that space, and `random`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from attndsl import expr as ir
from attndsl.attention import Relation
from attndsl.errors import fail
from attndsl.expr import Expr
from attndsl.language.arguments import bind_built_in
from attndsl.language.mistakes import expected, quoted
from attndsl.language.values import GridPattern, K, Num, Q, Scope, Space, TableOf, Value, as_table, restrict
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.language.elaborate import Elaborator

SEGMENTS = "write `within(64, R)`, or `within(doc, R)` with `inputs doc : int[n]`"
COORDINATES = "{ (y, x), (v, u) : ... }"


def blocks(el: Elaborator, e: ast.Call, env: Scope, space: Space) -> Value:
    args = bind_built_in("blocks", ("b", "R"), (), e)
    b = el.positive(args["b"], env, space, "the block length")

    size = ir.number(b)

    def opened(sp: Space) -> Space:
        unit = None if size is None or sp.unit is None else sp.unit * int(size)
        return replace(sp, n=ir.floordiv(ir.add(sp.n, b, ir.const(-1)), b), unit=unit)

    inner = el.pattern(args["R"], env, opened(space))

    def at(q: Expr, k: Expr, sp: Space) -> Relation:
        inside = opened(sp)
        return el.pattern(args["R"], env, inside).at(ir.floordiv(q, b), ir.floordiv(k, b), inside)

    return replace(el.memoised(at), blocks=(b, inner))


def within(el: Elaborator, e: ast.Call, env: Scope, space: Space) -> Value:
    args = bind_built_in("within", ("x", "R"), (), e)
    x = as_table(el.value(args["x"], env, space))
    if isinstance(x, TableOf):
        if x.table.dtype != "int" or len(x.table.explicit) != 1 or x.indices:
            raise fail("`within` takes an int table of one axis or a length", args["x"].span, SEGMENTS)
        table = x.table

        def segment(p: Expr, sp: Space) -> tuple[Expr, Expr, Expr]:
            at = (*table.implicit, p)
            return ir.lookup(table, *at), ir.rank_of(table, *at), ir.count_of(table, *at)
    elif not isinstance(x, Num):
        raise fail("`within` takes an int table of one axis or a length", args["x"].span, SEGMENTS)
    elif isinstance(args["x"], ast.Index) and x.expr.free & {"q", "k"}:
        base = quoted(args["x"].base)
        raise fail("`within` takes a table without its index", args["x"].span, f"write `{base}`")
    else:
        b = el.positive(args["x"], env, space, "the length of a piece")

        def segment(p: Expr, sp: Space) -> tuple[Expr, Expr, Expr]:
            piece = ir.floordiv(p, b)
            return piece, ir.mod(p, b), ir.minimum(b, ir.sub(sp.n, ir.mul(b, piece)))

    def at(q: Expr, k: Expr, sp: Space) -> Relation:
        piece, rank, size = segment(q, sp)
        other, other_rank, _ = segment(k, sp)
        inside = replace(sp, n=size, unit=None)
        inner = el.pattern(args["R"], env, inside).at(rank, other_rank, inside)
        return restrict(inner, ir.eq(piece, other))

    at(Q, K, space)
    return el.memoised(at)


def grid(el: Elaborator, e: ast.Call, env: Scope, space: Space) -> Value:
    if len(e.args) < 2:
        help = f"write `grid(height, width, {COORDINATES})`"
        raise fail("`grid` takes the sizes of a canvas and a pattern of coordinates", e.span, help)
    for arg in e.args:
        if arg.name:
            raise fail("`grid` takes no named arguments", arg.span)
    *shape, last = (arg.value for arg in e.args)
    sizes = [el.positive(size, env, space, "a size of the canvas") for size in shape]
    area = ir.ONE
    for size in sizes:
        area = ir.mul(area, size)

    def coordinates(p: Expr) -> tuple[Expr, ...]:
        rest, found = p, []
        for size in reversed(sizes[1:]):
            found.append(ir.mod(rest, size))
            rest = ir.floordiv(rest, size)
        return (rest, *reversed(found))

    def at(q: Expr, k: Expr, sp: Space) -> Relation:
        inside = replace(sp, n=area, unit=None)
        body = el.value(last, env, inside)
        if not isinstance(body, GridPattern):
            if isinstance(body, Num):
                help = f"after the sizes write it: `grid({e.args[0].value.span.text}, ..., {COORDINATES})`"
            else:
                help = f"write `{COORDINATES}`" if len(sizes) == 2 else ""
            raise expected("a pattern of coordinates", body, last, help)
        if body.rank != len(sizes):
            raise fail(
                f"the canvas has {len(sizes)} sizes, and the pattern {body.rank} coordinates", last.span
            )
        canvas = (ir.all_of(ir.le(ir.ZERO, p), ir.lt(p, area)) for p in (q, k))
        return Relation(ir.all_of(*canvas, body.holds(coordinates(q), coordinates(k), inside)))

    at(Q, K, space)
    return el.memoised(at)


def random(el: Elaborator, e: ast.Call, env: Scope, space: Space) -> Value:
    args = bind_built_in("random", ("r",), ("seed", "of"), e)
    r = el.constant(args["r"], env, space, "the number of random keys")
    if r < 0:
        raise fail(f"the number of random keys is {r}, and must not be negative", args["r"].span)
    seed = el.integer(args["seed"], env, space) if "seed" in args else ir.ZERO
    if seed.free & {"q", "k"}:
        raise fail("the seed must be the same for all positions", args["seed"].span)

    def holds(q: Expr, k: Expr, sp: Space) -> Expr:
        row, col = ir.var(f"row{sp.depth}"), ir.var(f"col{sp.depth}")
        body = ir.TRUE
        if "of" in args:
            inside = replace(sp, depth=sp.depth + 1, unit=None)
            body = el.pattern(args["of"], env, inside).at(row, col, inside).mask
        if body.free & {"q", "k"}:
            raise fail("`of` may not depend on positions outside it", args["of"].span)
        return ir.random_keys(q, k, sp.n, seed, body, r, str(row.value), str(col.value))

    holds(Q, K, space)
    return el.relation(holds)
