"""Expressions: what each form of the syntax denotes. `el` evaluates its parts and knows the definitions.

Numbers are evaluated where they are written. Sets and patterns are evaluated where they are used: they
become functions of a position, or of a query and a key, in a space (values.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from attndsl import expr as ir
from attndsl.errors import AttnError, fail
from attndsl.expr import Expr, IntSet, Table
from attndsl.language import combinators, leaves
from attndsl.language.arguments import bind_built_in, check_builder, with_usage
from attndsl.language.mistakes import (
    IN_SCORES,
    PRELUDE,
    chosen,
    expected,
    not_integer,
    number_of,
    other_unit,
    quantity_of,
    quoted,
    truth_of,
    vector_of,
)
from attndsl.language.values import (
    AttentionOf,
    GridPattern,
    K,
    Num,
    Pattern,
    Q,
    Scope,
    SetOf,
    Space,
    TableOf,
    Truth,
    Truths,
    Value,
    Vec,
    as_matrix,
    as_number,
    as_set,
    as_table,
    intersection,
    is_whole,
    of_expr,
    restrict,
    tables_of,
    total,
    union,
)
from attndsl.language.vocabulary import CLAIMS, COMBINATORS, CONSTANTS, FUNCTIONS, SIGNATURES
from attndsl.meaning.intervals import never_negative
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.language.elaborate import Elaborator


ROWS_LIMIT = 2**14
"""Of constants that are drawn."""


def on_name(el: Elaborator, e: ast.Name, env: Scope, space: Space) -> Value:
    value = el.lookup(e, env, space)
    for table in tables_of(value):
        if env.integral and table.parameter:
            what = "learned" if table.learned else "drawn"
            raise fail(f"`{e.id}` is {what}, and a mask may not depend on it", e.span, IN_SCORES)
    return value


def on_number(el: Elaborator, e: ast.Number, env: Scope, space: Space) -> Value:
    return Num(ir.const(e.value))


def on_text(el: Elaborator, e: ast.Text, env: Scope, space: Space) -> Value:
    raise fail("a string has no meaning here", e.span, "leave the quotes out")


def on_abs(el: Elaborator, e: ast.Abs, env: Scope, space: Space) -> Value:
    return of_expr(ir.absolute(el.quantity(e.arg, env, space)))


def on_unary(el: Elaborator, e: ast.Unary, env: Scope, space: Space) -> Value:
    if e.op == "not":
        value = el.value(e.arg, env, space)
        if isinstance(value, Pattern | SetOf):
            raise fail(f"`not` is for truths, and this is {value.noun}", e.arg.span, help="write `~`")
        if isinstance(value, Truths):
            return Truths(ir.negate(value.expr))
        return Truth(ir.negate(truth_of(value, e.arg, env)))
    if e.op == "-":
        value = el.value(e.arg, env, space)
        help = "`~` is the complement" if isinstance(value, Pattern | SetOf) else ""
        return of_expr(ir.neg(quantity_of(value, e.arg, env, help)))
    value = as_set(el.value(e.arg, env, space))
    if isinstance(value, Pattern):
        # what is not chosen has no bound from below
        return el.relation(lambda q, k, sp: ir.negate(value.at(q, k, replace(sp, unit=None)).mask))
    if isinstance(value, SetOf):
        return el.members(lambda p, sp: ir.negate(value.contains(p, sp)))
    help = "write `not`" if isinstance(value, Truth) else ""
    raise fail(f"`~` is for patterns and sets, and this is {value.noun}", e.arg.span, help)


def on_nary(el: Elaborator, e: ast.Nary, env: Scope, space: Space) -> Value:
    if e.op in ("and", "or"):
        return connective(el, e, env, space)
    written = [el.value(arg, env, space) for arg in e.args]
    values = [as_set(value) for value in written]
    if all(isinstance(v, Pattern) for v in values):
        join = {"|": union, "&": intersection, "+": total}[e.op]
        parts = [v for v in values if isinstance(v, Pattern)]
        return el.memoised(lambda q, k, sp: join([p.at(q, k, sp) for p in parts]))
    if e.op == "+":
        return summed(e, written, env)
    if all(isinstance(v, SetOf) for v in values):
        combine = ir.any_of if e.op == "|" else ir.all_of
        sets = [v for v in values if isinstance(v, SetOf)]
        return el.members(lambda p, sp: combine(*(s.contains(p, sp) for s in sets)))
    word = "or" if e.op == "|" else "and"
    for arg, value in zip(e.args, values, strict=True):
        if isinstance(as_number(value), Truth | Num):
            raise fail(
                f"`{e.op}` joins patterns or sets, and this is {as_number(value).noun}",
                arg.span,
                help=f"a set is written in brackets: `[{arg.span.text}]`"
                if any(isinstance(v, SetOf) for v in values)
                else f"between truths write `{word}`",
            )
    raise mixed(e, written)


def mixed(e: ast.Nary, values: list[Value]) -> AttnError:
    """For sets among patterns and the like: what the first operand is, all must be."""
    first = as_set(values[0])
    if not isinstance(first, Pattern | SetOf):
        return expected("a pattern", values[0], e.args[0])
    for arg, value in zip(e.args, values, strict=True):
        if as_set(value).noun != first.noun:
            return expected(first.noun, value, arg)
    raise AssertionError


def summed(e: ast.Nary, values: list[Value], env: Scope) -> Value:
    if isinstance(values[0], Pattern):
        raise mixed(e, values)
    if all(isinstance(value, AttentionOf) for value in values):
        raise fail("attentions are added by a definition", e.span, f"write `attention NAME = {quoted(e)}`")
    joined = all(isinstance(as_set(value), SetOf) for value in values)
    help = "for the union write `|`" if joined and env.integral else ""
    pairs = zip(e.args, values, strict=True)
    return of_expr(ir.add(*(quantity_of(v, arg, env, help or chosen(v, arg, env)) for arg, v in pairs)))


def connective(el: Elaborator, e: ast.Nary, env: Scope, space: Space) -> Value:
    truths = []
    for before, arg in zip((None, *e.args), e.args, strict=False):
        value = el.value(arg, env, space)
        if isinstance(value, Pattern | SetOf):
            symbol = "&" if e.op == "and" else "|"
            raise fail(
                f"`{e.op}` joins truths, and this is {value.noun}",
                arg.span,
                help=f"between {value.noun[2:]}s write `{symbol}`",
            )
        if isinstance(before, ast.Compare) and isinstance(arg, ast.Number):
            sign = "==" if before.ops[-1] == "in" else before.ops[-1]
            written = f"{quoted(before.args[-2])} {sign} {quoted(arg)}"
            raise fail(f"`{e.op}` joins truths, and this is a number", arg.span, f"write `{written}`")
        truths.append(truth_of(value, arg, env))
    return Truth(ir.all_of(*truths) if e.op == "and" else ir.any_of(*truths))


def on_binary(el: Elaborator, e: ast.Binary, env: Scope, space: Space) -> Value:
    left, right = el.value(e.left, env, space), el.value(e.right, env, space)
    if e.op in ("-", "@"):
        combined = difference(el, left, right) if e.op == "-" else product(el, e, left, right, env)
        if combined is not None:
            return combined
    if e.op == "@":
        left, right = as_number(left), as_number(right)
        help = "between numbers write `*`" if isinstance(left, Num) and isinstance(right, Num) else ""
        if {quoted(e.left), quoted(e.right)} == {"q", "k"}:
            help = "`q` and `k` are positions: the vectors are `Q @ K`"
        if isinstance(left, Vec) and as_matrix(right):
            help = f"a matrix stands left: `{quoted(e.right, tight=True)} @ {quoted(e.left, tight=True)}`"
        found = f"{left.noun} and {right.noun}"
        raise fail(f"`@` multiplies two patterns or two vectors, not {found}", e.span, help)
    if e.op == "-" and isinstance(left, Pattern | SetOf):
        of_query = isinstance(left, Pattern) and isinstance(right, Num)
        help = f"without the query itself it is `{quoted(e.left)} - radius(0)`" if of_query else ""
        raise expected(left.noun, right, e.right, help)
    if e.op == "-" and isinstance(right, Pattern | SetOf) and _is_one(e.left):
        help = (
            "" if e.span.source.name == PRELUDE else f"what is not in it is `~{quoted(e.right, tight=True)}`"
        )
        raise expected("a number", right, e.right, help)
    both = isinstance(left, Pattern) and isinstance(right, Pattern)
    help = "between patterns write `&`" if both else ""
    if isinstance(left, Pattern) and isinstance(as_set(right), SetOf):
        help = f"write `{quoted(e.left, tight=True)} & columns({quoted(e.right)})`"
    if isinstance(left, Pattern) and e.op == "**":
        help = f"the product of patterns is `{quoted(e.left, tight=True)} @ {quoted(e.left, tight=True)}`"
    a, b = (
        number_of(value, side, help or chosen(value, side, env))
        if e.op in ("//", "mod")
        else quantity_of(value, side, env, help or chosen(value, side, env))
        for value, side in ((left, e.left), (right, e.right))
    )
    if e.op == "-":
        return of_expr(ir.sub(a, b))
    if e.op == "*":
        return of_expr(ir.mul(a, b))
    if e.op == "**":
        return of_expr(ir.power(a, b, a.type == b.type == "int" and never_negative(b)))
    if e.op == "/":
        if env.integral:
            raise fail("`/` is real where an integer is needed", e.span, help="write `//` to round down")
        return of_expr(ir.div(a, b))
    if b.free & {"q", "k"} or b.tables:
        raise fail(
            f"the divisor of `{e.op}` must be the same for all positions",
            e.right.span,
            help="divide by a constant",
        )
    value = ir.number(b)
    if value is not None and value <= 0:
        raise fail(f"the divisor of `{e.op}` is {value}, and must be positive", e.right.span)
    return Num(ir.floordiv(a, b) if e.op == "//" else ir.mod(a, b))


def _is_one(e: ast.Expression) -> bool:
    return isinstance(e, ast.Number) and e.value == 1


def difference(el: Elaborator, left: Value, right: Value) -> Value | None:
    a, b = as_set(left), as_set(right)
    if isinstance(a, Pattern) and isinstance(b, Pattern):
        return el.memoised(
            lambda q, k, sp: restrict(a.at(q, k, sp), ir.negate(b.at(q, k, replace(sp, unit=None)).mask))
        )
    if isinstance(a, SetOf) and isinstance(b, SetOf):
        return el.members(lambda p, sp: ir.all_of(a.contains(p, sp), ir.negate(b.contains(p, sp))))
    return None


def product(el: Elaborator, e: ast.Binary, left: Value, right: Value, env: Scope) -> Value | None:
    """Of patterns the Boolean matrix product, of vectors the inner product, of matrix and vector a vector."""
    if isinstance(left, Pattern) and isinstance(right, Pattern):

        def holds(q: Expr, k: Expr, space: Space) -> Expr:
            m, within = ir.var(f"m{space.depth}"), replace(space, depth=space.depth + 1, unit=None)
            both = ir.all_of(left.at(q, m, within).mask, right.at(m, k, within).mask)
            return ir.exists(str(m.value), ir.ZERO, space.n, both)

        return el.relation(holds)
    a, b = as_number(left), as_number(right)
    matrix = as_matrix(a)
    if not isinstance(b, Vec) or not (matrix or isinstance(a, Vec)):
        return None
    vector = vector_of(b, e.right, env)
    return Vec(ir.matvec(matrix, vector)) if matrix else Num(ir.inner(vector_of(a, e.left, env), vector))


def on_compare(el: Elaborator, e: ast.Compare, env: Scope, space: Space) -> Value:
    parts = []
    for op, left, right in zip(e.ops, e.args, e.args[1:], strict=False):
        if op == "in":
            parts.append(member(el, left, right, env, space))
            continue
        a, b = (operand(el, op, side, env, space) for side in (left, right))
        if op == "==":
            el.demand_position(a, b, b, right.span)
            el.demand_position(b, a, a, left.span)
        parts.append(COMPARISONS[op](a, b))
        if parts[-1].type == "truths" and len(e.ops) > 1:
            raise fail("a vector is compared once", e.span, "for two bounds put one `where` into another")
    return of_expr(parts[0]) if len(parts) == 1 else Truth(ir.all_of(*parts))


def operand(el: Elaborator, op: str, e: ast.Expression, env: Scope, space: Space) -> Expr:
    value = el.value(e, env, space)
    help = ""
    if isinstance(as_set(value), SetOf) and op == "==" and not is_whole(value):
        help = "for a member write `in`"
    if isinstance(value, Pattern):
        help = f"patterns are compared in an `assert` alone; look one up: `{quoted(e, tight=True)}[q, k]`"
    number = quantity_of(value, e, env, help)
    if env.integral and number.type == "real":
        raise not_integer(number, e)
    return number


def member(el: Elaborator, e: ast.Expression, of: ast.Expression, env: Scope, space: Space) -> Expr:
    position = operand(el, "in", e, env, space)
    members = as_set(el.value(of, env, space))
    if not isinstance(members, SetOf):
        help = f"look it up: `{quoted(of, tight=True)}[q, k]`" if isinstance(members, Pattern) else ""
        raise expected("a set", members, of, help)
    return members.contains(position, space)


ANYTHING = ir.neg(Q)
"""What a set is asked for to see that it is well typed: a number that is no position."""


def on_range(el: Elaborator, e: ast.Range, env: Scope, space: Space) -> Value:
    def contains(p: Expr, sp: Space) -> Expr:
        lo, hi = el.integer(e.lo, env, sp), el.integer(e.hi, env, sp)
        el.demand_position(p, lo, hi, e.span)
        return ir.all_of(ir.le(lo, p), ir.le(p, hi))

    contains(ANYTHING, space)
    return el.members(contains)


def on_setlist(el: Elaborator, e: ast.SetList, env: Scope, space: Space) -> Value:
    @functools.cache
    def items(sp: Space) -> list[tuple[Expr, Expr]]:
        """First and last of what each item lists; real numbers are for a list that is looked up."""
        found = []
        for item in e.items:
            if isinstance(item, ast.Range):
                found.append((el.integer(item.lo, env, sp), el.integer(item.hi, env, sp)))
            else:
                found.append((member_of_list(el, item, env, sp),) * 2)
        return found

    def contains(p: Expr, sp: Space) -> Expr:
        constant: list[tuple[int, int]] = []
        rest: list[Expr] = []
        for item, (lo, hi) in zip(e.items, items(sp), strict=True):
            if lo.type == "real":
                raise not_integer(lo, item, "a list with a real entry is for scores alone")
            el.demand_position(p, lo, hi, item.span)
            if lo.op == hi.op == "const":
                constant.append((int(lo.value), int(hi.value)))  # type: ignore[call-overload]
            else:
                rest.append(ir.eq(p, lo) if lo is hi else ir.all_of(ir.le(lo, p), ir.le(p, hi)))
        return ir.any_of(ir.inset(p, IntSet.of(constant)), *rest)

    @functools.cache
    def listed() -> Table:
        parts: list[Sequence[int | float]] = []
        for item, ends in zip(e.items, items(space), strict=True):
            first, last = map(ir.number, ends)
            if first is None or last is None:
                raise fail("an entry of a list that is looked up must be a constant", item.span)
            parts.append(range(int(first), int(last) + 1) if isinstance(item, ast.Range) else (first,))
        return Table.listed(*parts)

    if env.integral:
        contains(ANYTHING, space)
    else:
        items(space)
    return replace(el.members(contains), listed=listed)


def member_of_list(el: Elaborator, item: ast.Expression, env: Scope, space: Space) -> Expr:
    value = el.value(item, env, space)
    if isinstance(value, Pattern):
        raise expected("a number", value, item, "patterns are joined with `|` or `&`")
    axes = "lists have one axis, and " if isinstance(item, ast.SetList) else ""
    return number_of(value, item, f"{axes}sets are joined with `|`" if isinstance(value, SetOf) else "")


def on_builder(el: Elaborator, e: ast.Builder, env: Scope, space: Space) -> Value:
    check_builder(e)
    inside = replace(env, integral=True)

    def holds(names: list[str], positions: tuple[Expr, ...], sp: Space) -> Expr:
        bound = {name: Num(p) for name, p in zip(names, positions, strict=True)}
        return el.truth(e.pred, inside.bind(**bound), sp)

    names = [name.id for group in e.vars for name in group]
    if len(e.vars) == 1:
        holds(names, (ANYTHING,), space)
        return el.members(lambda p, sp: holds(names, (p,), sp))
    holds(names, tuple(ir.var("q" if i % 2 == 0 else "k") for i in range(len(names))), space)
    if all(len(group) == 1 for group in e.vars):
        return el.relation(lambda q, k, sp: holds(names, (q, k), sp))
    return GridPattern(len(e.vars[0]), lambda qs, ks, sp: holds(names, (*qs, *ks), sp))


def on_index(el: Elaborator, e: ast.Index, env: Scope, space: Space) -> Value:
    if isinstance(e.base, ast.Name) and e.base.id == "learn":
        return learn(el, e, None, env, space)
    if isinstance(e.base, ast.Name) and not el.means(e.base.id, env):
        raise el.unknown(e.base, env, looked_up=True)
    base = as_table(el.value(e.base, env, space))
    if isinstance(base, Pattern):
        if len(e.indices) != 2:
            help = f"write `{quoted(e.base, tight=True)}[q, k]`"
            raise fail(f"a pattern is looked up at 2 positions, not {len(e.indices)}", e.span, help)
        q, k = (el.integer(i, env, space) for i in e.indices)
        inside = (ir.all_of(ir.le(ir.ZERO, p), ir.lt(p, space.n)) for p in (q, k) if p not in (Q, K))
        return Truth(
            ir.all_of(*inside, base.at(q, k, space if env.integral else replace(space, unit=None)).mask)
        )
    if not isinstance(base, TableOf):
        help = "a set has no order: give a list" if isinstance(base, SetOf) else ""
        help = f"write `[{quoted(e.base)}]`" if isinstance(e.base, ast.Range) else help
        if isinstance(e.base, ast.Index):
            help = "all indices stand in one pair of brackets, those of `B` and `H` left out: `table[q, k]`"
        if isinstance(base, Vec):
            help = "of vectors there is the inner product alone: `Q @ K`"
        raise fail(
            f"only tables, lists and patterns are looked up, and this is {base.noun}", e.base.span, help
        )
    table = base.table
    for i in e.indices:
        if table.known is None and isinstance(i, ast.Name) and i.id in "BH" and i.id not in env.names:
            raise fail(f"the axis `{i.id}` of `{table.name}` is implicit", i.span, help="leave it out")
    indices = (*base.indices, *(el.integer(i, env, space) for i in e.indices))
    rank = len(table.explicit)
    if len(indices) > rank:
        kept = ", ".join(quoted(i) for i in e.indices[len(e.indices) - rank :])
        written = f"{quoted(e.base)}[{kept}]" if kept else quoted(e.base)
        help = f"the axes `B` and `H` are implicit: write `{written}`" if table.implicit else ""
        takes = f"{rank} ind{'ex' if rank == 1 else 'ices'}, not {len(indices)}" if rank else "no index"
        raise fail(f"`{table.name}` takes {takes}", e.span, help)
    found = TableOf(table, indices)
    return found if found.left else as_number(found)


def learn(el: Elaborator, e: ast.Index, call: ast.Call | None, env: Scope, space: Space) -> Value:
    span = (call or e).span
    if env.integral:
        raise fail("a mask may not depend on a learned parameter", span, IN_SCORES)
    if not env.binding:
        raise fail(
            "a learned parameter needs a name",
            span,
            help=f"bind it: `let NAME = {quoted(call or e)}`, or make it a parameter's value",
        )
    if call is not None and len(call.args) != 1:
        raise fail(f"`learn` takes one initial value, not {len(call.args)}", span)
    env = env.bind(q=Num(Q), k=Num(K))
    init = el.num(call.args[0].value, env, space) if call is not None else ir.const(0.0)
    start = ir.number(init)
    if start is None:
        raise fail("the initial value of `learn` must be a constant", span)
    dims: list[int | str] = []
    for i, size in enumerate(e.indices):
        if isinstance(size, ast.Name) and (size.id in ("D", "n") or (size.id == "H" and i == 0)):
            dims.append(size.id)
        else:
            dims.append(el.constant(size, env, space, "a size of `learn`"))
            if int(dims[-1]) <= 0:
                raise fail("a size of `learn` must be positive", size.span)
    # one parameter per evaluation: a clause that several head groups share is still one
    serial = el.serials.setdefault((id(e), env.calls, id(env.clause)), len(el.serials))
    return TableOf(Table(env.binding, "float", tuple(dims), ir.Learned(float(start), serial)))


def constants(el: Elaborator, name: Any, e: ast.Call, env: Scope, space: Space) -> Value:
    if env.integral:
        raise fail("a mask may not depend on constants that are drawn", e.span, "`score` and `decay` may")
    given = bind_built_in(name, ("m",), ("seed",), e)
    rows = el.constant(given["m"], env, space, "a number of rows")
    if not 0 < rows <= ROWS_LIMIT:
        raise fail(f"there are {rows} rows, and must be 1 to {ROWS_LIMIT:,}", given["m"].span)
    seed = el.constant(given["seed"], env, space, "a seed") if "seed" in given else 0
    # equal constants are one, whatever they are bound to
    return TableOf(
        Table(f"{name}_{rows}_{seed}".replace("-", "m"), "float", (rows, "D"), ir.Drawn(name, seed))
    )


def on_call(el: Elaborator, e: ast.Call, env: Scope, space: Space) -> Value:
    if isinstance(e.func, ast.Index):
        base = e.func.base
        if isinstance(base, ast.Name) and base.id == "learn":
            return learn(el, e.func, e, env, space)
    if not isinstance(e.func, ast.Name):
        raise fail("only a name can be called", e.func.span)
    name = e.func.id
    if name in env.names:
        help = f"look it up: `{name}[...]`" if isinstance(env.names[name], TableOf | Pattern) else ""
        raise fail(f"`{name}` is {env.names[name].noun} and takes no arguments", e.func.span, help)
    if name in el.definitions:
        return el.apply(e.func, e.args, env, space)
    if name in FUNCTIONS:
        return function(el, name, e, env, space)
    if name in CONSTANTS:
        return constants(el, name, e, env, space)
    if name == "every_row" and env.claims:
        help = f"write `assert {quoted(e)}`, with nothing beside it"
        raise fail("`every_row` is a claim of its own, and no number", e.func.span, help)
    if name in CLAIMS:
        raise fail(f"`{name}` stands in an `assert` alone", e.func.span)
    if name in COMBINATORS:
        try:
            return getattr(combinators, name)(el, e, env, space)  # type: ignore[no-any-return]
        except AttnError as error:
            raise with_usage(
                error, e.span, (arg.value for arg in e.args), f"write `{SIGNATURES[name]}`"
            ) from None
    selection = el.selection(e.func)
    if selection is not None:
        return leaves.leaf(el, name, selection, e, env, space)
    raise el.unknown(e.func, env)


def function(el: Elaborator, name: str, e: ast.Call, env: Scope, space: Space) -> Value:
    for arg in e.args:
        if arg.name:
            raise fail(f"`{name}` takes no named arguments", arg.span)
    args = [arg.value for arg in e.args]
    aggregate = f"{name}({args[0].id})" if len(args) == 1 and isinstance(args[0], ast.Name) else ""
    if aggregate in ir.QUERY_VECTORS | ir.KEY_VECTORS:
        if aggregate not in env.names:
            if env.units:
                raise other_unit(aggregate, e.span, env.units)
            raise fail(f"`{aggregate}` stands in the `by` of a choice among blocks alone", e.span)
        return env.names[aggregate]
    counts = {"where": (3, 3), "min": (2, 99), "max": (2, 99), "concat": (2, 99)}
    least, most = counts.get(name, (1, 1))
    if not least <= len(e.args) <= most:
        wanted = f"{least} argument{'s' * (least > 1)}" + (" or more" if most > least else "")
        extra = e.args[most].span if len(e.args) > most else e.span
        raise fail(f"`{name}` takes {wanted}, not {len(e.args)}", extra, f"write `{SIGNATURES[name]}`")
    if name == "where":
        return choice(el, args, env, space)
    if name == "sum":
        return of_expr(ir.total(vector_of(el.value(args[0], env, space), args[0], env)))
    if name == "mean":
        raise fail("`mean` is of the vectors of a block", args[0].span, "write `mean(K)` or `mean(Q)`")
    if name in ("isqrt", "floor"):
        number = el.num(args[0], env, space)
        if name == "isqrt" and number.type != "int":
            raise not_integer(number, args[0])
        return Num(ir.call(name, number))
    numbers = [el.quantity(arg, env, space) for arg in args]
    if name == "concat":
        if not any(number.width for number in numbers):
            raise fail("`concat` joins vectors, and none is among these", e.span)
        return of_expr(ir.concat(*numbers))
    if name in ("min", "max"):
        return of_expr(functools.reduce(ir.minimum if name == "min" else ir.maximum, numbers))
    return of_expr(ir.call(name, numbers[0]))


def choice(el: Elaborator, args: list[ast.Expression], env: Scope, space: Space) -> Value:
    """`where(cond, a, b)`: of numbers and vectors, of truths, of sets or of patterns. Of the last three it is
    what `cond and a or not cond and b` says, so that the condition guards `a`."""
    cond = el.value(args[0], env, space)
    if isinstance(cond, Truths):
        return of_expr(ir.where(cond.expr, *(el.quantity(arg, env, space) for arg in args[1:])))
    holds = truth_of(cond, args[0], env)
    otherwise = ir.negate(holds)
    one, other = values = [el.value(arg, env, space) for arg in args[1:]]
    if isinstance(one, Pattern) and isinstance(other, Pattern):
        return el.memoised(
            lambda q, k, sp: union(
                [restrict(one.at(q, k, sp), holds), restrict(other.at(q, k, sp), otherwise)]
            )
        )
    if all(isinstance(as_number(value), Truth) for value in values):
        yes, no = (truth_of(value, arg, env) for value, arg in zip(values, args[1:], strict=True))
        return Truth(ir.any_of(ir.all_of(holds, yes), ir.all_of(otherwise, no)))
    some, rest = map(as_set, values)
    if isinstance(some, SetOf) and isinstance(rest, SetOf):
        return el.members(
            lambda p, sp: ir.any_of(
                ir.all_of(holds, some.contains(p, sp)), ir.all_of(otherwise, rest.contains(p, sp))
            )
        )
    if env.integral and (isinstance(one, Pattern | SetOf) or isinstance(as_number(one), Truth)):
        raise expected(as_number(one).noun, other, args[2])
    return of_expr(ir.where(holds, *(el.quantity(arg, env, space) for arg in args[1:])))


COMPARISONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "==": ir.eq,
    "!=": lambda a, b: ir.negate(ir.eq(a, b)),
    "<": ir.lt,
    "<=": ir.le,
    ">": lambda a, b: ir.lt(b, a),
    ">=": lambda a, b: ir.le(b, a),
}
