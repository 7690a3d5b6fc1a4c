"""From syntax to meaning: names resolved, types checked, definitions written out, parameters bound.

Numbers are evaluated where they are written. Sets and patterns are evaluated where they are used: they
become functions of a position, or of a query and a key, in a space (values.py). The argument of a
combinator that opens a new space (`blocks within grid`) is text of that space.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from attndsl import expr as ir
from attndsl.attention import Attention, Relation
from attndsl.errors import AttnError, Span, fail, suggest
from attndsl.expr import Expr, IntSet, Table
from attndsl.language.arguments import (
    bind_arguments,
    bind_built_in,
    check_builder,
    input_table,
    name_span,
    signature,
)
from attndsl.language.clauses import AttentionBuilder
from attndsl.language.mistakes import (
    IN_SCORES,
    blame,
    chosen,
    expected,
    not_integer,
    number_of,
    out_of_place,
    quoted,
    truth_of,
)
from attndsl.language.values import (
    TOKENS,
    AttentionOf,
    Env,
    GridPattern,
    K,
    Num,
    Pattern,
    Q,
    SetOf,
    Space,
    TableOf,
    Truth,
    Value,
    Vec,
    as_number,
    as_set,
    as_table,
    intersection,
    is_whole,
    restrict,
    tables_of,
    total,
    union,
)
from attndsl.language.vocabulary import (
    BUILT_IN,
    CLAIMS,
    COMBINATORS,
    FUNCTIONS,
    POSITIONS,
    RESERVED,
    RETIRED,
    SIGNATURES,
)
from attndsl.meaning.intervals import never_negative
from attndsl.syntax import nodes as ast

CALL_DEPTH = 64
STEP_LIMIT = 200_000


class Elaborator:
    """The definitions of one program, and what has been learned of them so far.

    `definitions` maps a name to its syntax, a file's own before the prelude's; `broken` holds those whose
    error was reported already: their users stay silent.
    """

    def __init__(self, definitions: Mapping[str, ast.Definition | ast.AttentionDef]) -> None:
        self.definitions = definitions
        self.broken: set[str] = set()
        self.known: dict[tuple[object, ...], Value] = {}
        self.steps = 0
        self.serials: dict[tuple[object, ...], int] = {}

    # names

    def lookup(self, name: ast.Name, env: Env, space: Space) -> Value:
        if name.id in env.names:
            return env.names[name.id]
        if name.id == "n":
            return Num(space.n)
        if name.id in POSITIONS or name.id == "layer" or (name.id == "D" and env.integral):
            raise out_of_place(name)
        if name.id in ("nq", "h", "H", "D"):
            return Num(ir.var(name.id))
        if name.id in self.definitions:
            return self.apply(name, (), env, space)
        if name.id in BUILT_IN:
            raise fail(f"`{name.id}` needs its arguments", name.span, help=f"write `{SIGNATURES[name.id]}`")
        raise self.unknown(name, env)

    def unknown(self, name: ast.Name, env: Env, help: str = "") -> AttnError:
        if name.id in self.broken:
            return AttnError()
        candidates = {*env.names, *self.definitions, *BUILT_IN, "n", "nq", "h", "H", "D"}
        near = RETIRED.get(name.id) or RETIRED.get(name.id.lower()) or suggest(name.id, candidates)
        if env.calls and name.id in {param.name for param in self.definitions[env.calls[-1]].params}:
            help = "a default sees only the parameters before its own"
        inside = self.definitions.get(env.calls[-1]) if env.calls else None
        if isinstance(inside, ast.AttentionDef):
            help = help or f"a table is declared: `inputs {name.id} : int[n]`"
        if env.claims and any(name.id in _inputs(item) for item in self.definitions.values()):
            help = "a claim is about every table: it cannot name one"
        return fail(f"unknown name `{name.id}`", name.span, near or help)

    def undeclared(self, name: ast.Name, env: Env) -> AttnError:
        """For an unknown name that is looked up as a table is."""
        inside = self.definitions.get(env.calls[-1]) if env.calls else None
        if isinstance(inside, ast.Definition):
            written = f"{inside.word} {inside.name}({name.id}) = ..."
            return self.unknown(name, env, f"make it a parameter: `{written}`")
        return self.unknown(name, env, f"declare the table: `inputs {name.id} : int[n]`")

    def means(self, name: str, env: Env) -> bool:
        return name in env.names or name in self.definitions or name in RESERVED or name in BUILT_IN

    # definitions

    def apply(self, name: ast.Name, args: tuple[ast.Argument, ...], env: Env, space: Space) -> Value:
        definition = self.definitions[name.id]
        if isinstance(definition, ast.Definition) and definition.word == "score":
            raise fail(
                f"the score `{name.id}` may stand only as a whole `score` clause",
                name.span,
                help=f"give it a clause of its own: `score {name.id}`",
            )
        values = self.arguments(definition, args, env, space)
        given = bind_arguments(definition, args)
        found = self.instance(definition, values, env, name.span, given=given)
        if env.claims and isinstance(found, AttentionOf):
            union = found.attention.any_head()
            return self.relation(lambda q, k, sp: ir.substitute(union, {"q": q, "k": k}))
        return found

    def arguments(
        self,
        definition: ast.Definition | ast.AttentionDef,
        args: tuple[ast.Argument, ...],
        env: Env,
        space: Space,
    ) -> dict[str, Value]:
        """Parameters bound by position or name, evaluated where they are written."""
        bound = bind_arguments(definition, args)
        return {name: self.value(value, replace(env, binding=name), space) for name, value in bound.items()}

    def instance(
        self,
        definition: ast.Definition | ast.AttentionDef,
        values: Mapping[str, Value],
        env: Env,
        span: Span,
        extra: Mapping[str, Value] | None = None,
        given: Mapping[str, ast.Expression] | None = None,
    ) -> Value:
        """The definition with parameters bound; once per distinct arguments.

        `extra` names are in sight of the body without being parameters: `s`, `q`, `k`, `Q`, `K` of a score.
        `given` is what the values were written as.
        """
        if definition.name in self.broken:
            raise AttnError()
        if definition.name in env.calls:
            cycle = " -> ".join((*env.calls[env.calls.index(definition.name) :], definition.name))
            raise fail(f"`{definition.name}` is defined by itself: {cycle}", span)
        if len(env.calls) >= CALL_DEPTH:
            self.broken.update(env.calls)
            raise fail(f"definitions use each other more than {CALL_DEPTH} deep", span)
        integral = env.integral and not isinstance(definition, ast.AttentionDef)
        inner = Env({}, integral, calls=(*env.calls, definition.name), clause=env.clause)
        for param in definition.params:
            if param.name in values:
                value = values[param.name]
            elif param.default is not None:
                at = replace(inner, binding=param.name)
                value = self.value(param.default, at, TOKENS)
            else:
                raise fail(
                    f"`{definition.name}` needs its parameter `{param.name}`",
                    span,
                    help=f"write `{signature(definition)}`",
                )
            inner = inner.bind(**{param.name: value})
        inner = inner.bind(**(extra or {}))
        key = (id(definition), integral, *inner.names.values())
        if key not in self.known:
            self.step(span)
            try:
                if isinstance(definition, ast.AttentionDef):
                    self.known[key] = AttentionOf(self.attention(definition, inner))
                else:
                    result = self.value(definition.body, replace(inner, binding=definition.name), TOKENS)
                    self.known[key] = self.typed(definition, result)
            except AttnError as error:
                blamed = (blame(d, definition, given or {}, span) for d in error.diagnostics)
                raise AttnError(*blamed) from None
        return self.known[key]

    def typed(self, definition: ast.Definition, result: Value) -> Value:
        if definition.word == "pattern" and not isinstance(result, Pattern | GridPattern):
            raise expected("a pattern", result, definition.body)
        if definition.word == "let" and isinstance(result, Pattern | GridPattern):
            raise fail(
                f"`let {definition.name}` denotes a pattern",
                definition.body.span,
                help=f"write `pattern {definition.name}`",
            )
        return result

    def step(self, span: Span | None = None, weight: int = 1) -> None:
        self.steps += weight
        if self.steps > STEP_LIMIT:
            raise fail(f"the program takes more than {STEP_LIMIT:,} steps to write out", span)

    def memoised(self, at: Callable[[Expr, Expr, Space], Relation]) -> Pattern:
        """A pattern that remembers what it was at each place: one that is used twice stays cheap."""
        known: dict[tuple[Expr, Expr, Space], Relation] = {}

        def lookup(q: Expr, k: Expr, space: Space) -> Relation:
            key = (q, k, space)
            if key not in known:
                known[key] = at(q, k, space)
                self.step(weight=1 + len(known[key].mask.args))
            return known[key]

        return Pattern(lookup)

    def relation(self, holds: Callable[[Expr, Expr, Space], Expr]) -> Pattern:
        return self.memoised(lambda q, k, space: Relation(holds(q, k, space)))

    def members(self, contains: Callable[[Expr, Space], Expr]) -> SetOf:
        """A set that remembers, likewise."""
        known: dict[tuple[Expr, Space], Expr] = {}

        def lookup(p: Expr, space: Space) -> Expr:
            if (p, space) not in known:
                self.step()
                known[p, space] = contains(p, space)
            return known[p, space]

        return SetOf(lookup)

    # expressions

    def value(self, e: ast.Expression, env: Env, space: Space) -> Value:
        self.step(e.span)
        try:
            return getattr(self, f"on_{type(e).__name__.lower()}")(e, env, space)  # type: ignore[no-any-return]
        except AttnError as error:
            # the constructors of expr.py know what is wrong, but not where
            raise AttnError(*(d if d.span else replace(d, span=e.span) for d in error.diagnostics)) from None

    def num(self, e: ast.Expression, env: Env, space: Space, help: str = "") -> Expr:
        """A number; `help` is for where a set stands."""
        value = self.value(e, env, space)
        return number_of(value, e, chosen(value, e, env) or (help if isinstance(value, SetOf) else ""))

    def integer(self, e: ast.Expression, env: Env, space: Space, help: str = "") -> Expr:
        number = self.num(e, env, space, help)
        if number.type != "int":
            raise not_integer(number, e)
        return number

    def positive(self, e: ast.Expression, env: Env, space: Space, what: str) -> Expr:
        number = self.integer(e, env, space)
        value = ir.number(number)
        if value is not None and value <= 0:
            raise fail(f"{what} is {value}, and must be positive", e.span)
        if number.free & {"q", "k"}:
            raise fail(f"{what} must be the same for all positions", e.span)
        return number

    def constant(self, e: ast.Expression, env: Env, space: Space, what: str) -> int:
        value = ir.number(self.integer(e, env, space))
        if value is None:
            raise fail(f"{what} must be a constant", e.span)
        return int(value)

    def truth(self, e: ast.Expression, env: Env, space: Space) -> Expr:
        return truth_of(self.value(e, env, space), e, env)

    def pattern(self, e: ast.Expression, env: Env, space: Space) -> Pattern:
        value = self.value(e, env, space)
        if isinstance(value, Pattern):
            return value
        raise expected("a pattern", value, e)

    def on_name(self, e: ast.Name, env: Env, space: Space) -> Value:
        value = self.lookup(e, env, space)
        if env.integral and any(table.learned for table in tables_of(value)):
            raise fail(f"`{e.id}` is learned, and a mask may not depend on it", e.span, IN_SCORES)
        return value

    def on_number(self, e: ast.Number, env: Env, space: Space) -> Value:
        return Num(ir.const(e.value))

    def on_text(self, e: ast.Text, env: Env, space: Space) -> Value:
        raise fail("a string has no meaning here", e.span)

    def on_abs(self, e: ast.Abs, env: Env, space: Space) -> Value:
        return Num(ir.absolute(self.num(e.arg, env, space)))

    def on_unary(self, e: ast.Unary, env: Env, space: Space) -> Value:
        if e.op == "not":
            value = self.value(e.arg, env, space)
            if isinstance(value, Pattern | SetOf):
                raise fail(f"`not` is for truths, and this is {value.noun}", e.arg.span, help="write `~`")
            return Truth(ir.negate(truth_of(value, e.arg, env)))
        if e.op == "-":
            value = self.value(e.arg, env, space)
            help = "`~` is the complement" if isinstance(value, Pattern | SetOf) else ""
            return Num(ir.neg(number_of(value, e.arg, help)))
        value = as_set(self.value(e.arg, env, space))
        if isinstance(value, Pattern):
            return self.relation(lambda q, k, sp: ir.negate(value.at(q, k, sp).mask))
        if isinstance(value, SetOf):
            return self.members(lambda p, sp: ir.negate(value.contains(p, sp)))
        help = "write `not`" if isinstance(value, Truth) else ""
        raise fail(f"`~` is for patterns and sets, and this is {value.noun}", e.arg.span, help)

    def on_nary(self, e: ast.Nary, env: Env, space: Space) -> Value:
        if e.op in ("and", "or"):
            return self.connective(e, env, space)
        written = [self.value(arg, env, space) for arg in e.args]
        values = [as_set(value) for value in written]
        if all(isinstance(v, Pattern) for v in values):
            join = {"|": union, "&": intersection, "+": total}[e.op]
            parts = [v for v in values if isinstance(v, Pattern)]
            return self.memoised(lambda q, k, sp: join([p.at(q, k, sp) for p in parts]))
        if e.op == "+":
            return self.sum(e, written, env)
        if all(isinstance(v, SetOf) for v in values):
            combine = ir.any_of if e.op == "|" else ir.all_of
            sets = [v for v in values if isinstance(v, SetOf)]
            return self.members(lambda p, sp: combine(*(s.contains(p, sp) for s in sets)))
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
        raise self.mixed(e, written)

    def mixed(self, e: ast.Nary, values: list[Value]) -> AttnError:
        """For sets among patterns and the like: what the first operand is, all must be."""
        first = as_set(values[0])
        if not isinstance(first, Pattern | SetOf):
            return expected("a pattern", values[0], e.args[0])
        for arg, value in zip(e.args, values, strict=True):
            if as_set(value).noun != first.noun:
                return expected(first.noun, value, arg)
        raise AssertionError

    def sum(self, e: ast.Nary, values: list[Value], env: Env) -> Value:
        if isinstance(values[0], Pattern):
            raise self.mixed(e, values)
        help = "for the union write `|`" if any(isinstance(value, SetOf) for value in values) else ""
        pairs = zip(e.args, values, strict=True)
        return Num(ir.add(*(number_of(v, arg, help or chosen(v, arg, env)) for arg, v in pairs)))

    def connective(self, e: ast.Nary, env: Env, space: Space) -> Value:
        truths = []
        for arg in e.args:
            value = self.value(arg, env, space)
            if isinstance(value, Pattern | SetOf):
                symbol = "&" if e.op == "and" else "|"
                raise fail(
                    f"`{e.op}` joins truths, and this is {value.noun}",
                    arg.span,
                    help=f"between {value.noun[2:]}s write `{symbol}`",
                )
            truths.append(truth_of(value, arg, env))
        return Truth(ir.all_of(*truths) if e.op == "and" else ir.any_of(*truths))

    def on_binary(self, e: ast.Binary, env: Env, space: Space) -> Value:
        left, right = self.value(e.left, env, space), self.value(e.right, env, space)
        if e.op in ("-", "@"):
            combined = self.difference(left, right) if e.op == "-" else self.product(left, right)
            if combined is not None:
                return combined
        if e.op == "@":
            left, right = as_number(left), as_number(right)
            help = "between numbers write `*`" if isinstance(left, Num) and isinstance(right, Num) else ""
            if isinstance(left, TableOf) or isinstance(right, TableOf):
                help = "the last axis of a table of vectors is `D`"
            found = f"{left.noun} and {right.noun}"
            raise fail(f"`@` multiplies two patterns or two vectors, not {found}", e.span, help)
        if e.op == "-" and isinstance(left, Pattern | SetOf):
            raise expected(left.noun, right, e.right)
        both = isinstance(left, Pattern) and isinstance(right, Pattern)
        help = "between patterns write `&`" if both else ""
        a = number_of(left, e.left, help or chosen(left, e.left, env))
        b = number_of(right, e.right, help or chosen(right, e.right, env))
        if e.op == "-":
            return Num(ir.sub(a, b))
        if e.op == "*":
            return Num(ir.mul(a, b))
        if e.op == "**":
            return Num(ir.power(a, b, a.type == b.type == "int" and never_negative(b)))
        if e.op == "/":
            if env.integral:
                raise fail("`/` is real where an integer is needed", e.span, help="write `//` to round down")
            return Num(ir.div(a, b))
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

    def difference(self, left: Value, right: Value) -> Value | None:
        a, b = as_set(left), as_set(right)
        if isinstance(a, Pattern) and isinstance(b, Pattern):
            return self.memoised(lambda q, k, sp: restrict(a.at(q, k, sp), ir.negate(b.at(q, k, sp).mask)))
        if isinstance(a, SetOf) and isinstance(b, SetOf):
            return self.members(lambda p, sp: ir.all_of(a.contains(p, sp), ir.negate(b.contains(p, sp))))
        return None

    def product(self, left: Value, right: Value) -> Value | None:
        """The Boolean matrix product of patterns, or the inner product of vectors."""
        if isinstance(left, Pattern) and isinstance(right, Pattern):

            def holds(q: Expr, k: Expr, space: Space) -> Expr:
                m, within = ir.var(f"m{space.depth}"), replace(space, depth=space.depth + 1)
                both = ir.all_of(left.at(q, m, within).mask, right.at(m, k, within).mask)
                return ir.exists(str(m.value), ir.ZERO, space.n, both)

            return self.relation(holds)
        a, b = as_number(left), as_number(right)
        if isinstance(a, Vec) and isinstance(b, Vec):
            return Num(ir.inner(a.expr, b.expr))
        return None

    def on_compare(self, e: ast.Compare, env: Env, space: Space) -> Value:
        parts = []
        for op, left, right in zip(e.ops, e.args, e.args[1:], strict=False):
            if op == "in":
                parts.append(self.member(left, right, env, space))
                continue
            a, b = (self.operand(op, side, env, space) for side in (left, right))
            parts.append(COMPARISONS[op](a, b))
        return Truth(ir.all_of(*parts))

    def operand(self, op: str, e: ast.Expression, env: Env, space: Space) -> Expr:
        value = self.value(e, env, space)
        help = ""
        if isinstance(as_set(value), SetOf) and op == "==" and not is_whole(value):
            help = "for a member write `in`"
        if isinstance(value, Pattern):
            help = f"patterns are compared in an `assert` alone; look one up: `{quoted(e, tight=True)}[q, k]`"
        number = number_of(value, e, help)
        if env.integral and number.type == "real":
            raise not_integer(number, e)
        return number

    def member(self, e: ast.Expression, of: ast.Expression, env: Env, space: Space) -> Expr:
        position = self.operand("in", e, env, space)
        members = as_set(self.value(of, env, space))
        if not isinstance(members, SetOf):
            help = f"look it up: `{quoted(of, tight=True)}[q, k]`" if isinstance(members, Pattern) else ""
            raise expected("a set", members, of, help)
        return members.contains(position, space)

    def on_range(self, e: ast.Range, env: Env, space: Space) -> Value:
        def contains(p: Expr, sp: Space) -> Expr:
            lo, hi = self.integer(e.lo, env, sp), self.integer(e.hi, env, sp)
            return ir.all_of(ir.le(lo, p), ir.le(p, hi))

        contains(Q, space)
        return self.members(contains)

    def on_setlist(self, e: ast.SetList, env: Env, space: Space) -> Value:
        @functools.cache
        def items(sp: Space) -> list[tuple[Expr, Expr]]:
            """First and last of what each item lists; real numbers are for a list that is looked up."""
            found = []
            for item in e.items:
                if isinstance(item, ast.Range):
                    found.append((self.integer(item.lo, env, sp), self.integer(item.hi, env, sp)))
                else:
                    found.append((self.num(item, env, sp, "sets are joined with `|`"),) * 2)
            return found

        def contains(p: Expr, sp: Space) -> Expr:
            constant: list[tuple[int, int]] = []
            rest: list[Expr] = []
            for item, (lo, hi) in zip(e.items, items(sp), strict=True):
                if lo.type == "real":
                    raise not_integer(lo, item)
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
            contains(Q, space)
        else:
            items(space)
        return replace(self.members(contains), listed=listed)

    def on_builder(self, e: ast.Builder, env: Env, space: Space) -> Value:
        check_builder(e)
        inside = replace(env, integral=True)

        def holds(names: list[str], positions: tuple[Expr, ...], sp: Space) -> Expr:
            bound = {name: Num(p) for name, p in zip(names, positions, strict=True)}
            return self.truth(e.pred, inside.bind(**bound), sp)

        names = [name.id for group in e.vars for name in group]
        holds(names, tuple(ir.var("q" if i % 2 == 0 else "k") for i in range(len(names))), space)
        if len(e.vars) == 1:
            return self.members(lambda p, sp: holds(names, (p,), sp))
        if all(len(group) == 1 for group in e.vars):
            return self.relation(lambda q, k, sp: holds(names, (q, k), sp))
        return GridPattern(len(e.vars[0]), lambda qs, ks, sp: holds(names, (*qs, *ks), sp))

    def on_index(self, e: ast.Index, env: Env, space: Space) -> Value:
        if isinstance(e.base, ast.Name) and e.base.id == "learn":
            return self.learn(e, None, env, space)
        if isinstance(e.base, ast.Name) and not self.means(e.base.id, env):
            raise self.undeclared(e.base, env)
        base = as_table(self.value(e.base, env, space))
        if isinstance(base, Pattern):
            if len(e.indices) != 2:
                help = f"write `{quoted(e.base, tight=True)}[q, k]`"
                raise fail(f"a pattern is looked up at 2 positions, not {len(e.indices)}", e.span, help)
            q, k = (self.integer(i, env, space) for i in e.indices)
            inside = (ir.all_of(ir.le(ir.ZERO, p), ir.lt(p, space.n)) for p in (q, k) if p not in (Q, K))
            return Truth(ir.all_of(*inside, base.at(q, k, space).mask))
        if not isinstance(base, TableOf):
            help = f"write `[{quoted(e.base)}]`" if isinstance(e.base, ast.Range) else ""
            raise fail(
                f"only tables, lists and patterns are looked up, and this is {base.noun}", e.base.span, help
            )
        table = base.table
        for i in e.indices:
            if isinstance(i, ast.Name) and i.id in "BH" and i.id not in env.names:
                raise fail(f"the axis `{i.id}` of `{table.name}` is implicit", i.span, help="leave it out")
        indices = (*base.indices, *(self.integer(i, env, space) for i in e.indices))
        rank = len(table.explicit)
        if len(indices) > rank:
            help = "the axes `B` and `H` are implicit: leave them out" if table.implicit else ""
            takes = f"{rank} ind{'ex' if rank == 1 else 'ices'}, not {len(indices)}" if rank else "no index"
            raise fail(f"`{table.name}` takes {takes}", e.span, help)
        return as_number(TableOf(table, indices))

    def learn(self, e: ast.Index, call: ast.Call | None, env: Env, space: Space) -> Value:
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
        init = self.num(call.args[0].value, env, space) if call is not None else ir.const(0.0)
        start = ir.number(init)
        if start is None:
            raise fail("the initial value of `learn` must be a constant", span)
        dims: list[int | str] = []
        for i, size in enumerate(e.indices):
            if isinstance(size, ast.Name) and (size.id == "D" or (size.id == "H" and i == 0)):
                dims.append(size.id)
            else:
                dims.append(self.constant(size, env, space, "a size of `learn`"))
                if int(dims[-1]) <= 0:
                    raise fail("a size of `learn` must be positive", size.span)
        # one parameter per evaluation: a clause that several head groups share is still one
        serial = self.serials.setdefault((id(e), env.calls, id(env.clause)), len(self.serials))
        return TableOf(Table(env.binding, "float", tuple(dims), ir.Learned(float(start), serial)))

    def on_call(self, e: ast.Call, env: Env, space: Space) -> Value:
        if isinstance(e.func, ast.Index):
            base = e.func.base
            if isinstance(base, ast.Name) and base.id == "learn":
                return self.learn(e.func, e, env, space)
        if not isinstance(e.func, ast.Name):
            raise fail("only a name can be called", e.func.span)
        name = e.func.id
        if name in env.names:
            help = f"look it up: `{name}[...]`" if isinstance(env.names[name], TableOf | Pattern) else ""
            raise fail(f"`{name}` is {env.names[name].noun} and takes no arguments", e.func.span, help)
        if name in self.definitions:
            return self.apply(e.func, e.args, env, space)
        if name in FUNCTIONS:
            return self.function(name, e, env, space)
        if name in CLAIMS:
            raise fail(f"`{name}` stands in an `assert` alone", e.func.span)
        if name in COMBINATORS:
            return getattr(self, f"{name}_of")(e, env, space)  # type: ignore[no-any-return]
        raise self.unknown(e.func, env)

    def function(self, name: str, e: ast.Call, env: Env, space: Space) -> Value:
        for arg in e.args:
            if arg.name:
                raise fail(f"`{name}` takes no named arguments", arg.span)
        counts = {"where": (3, 3), "min": (2, 99), "max": (2, 99)}
        least, most = counts.get(name, (1, 1))
        if not least <= len(e.args) <= most:
            wanted = f"{least} argument{'s' * (least > 1)}" + (" or more" if most > least else "")
            extra = e.args[most].span if len(e.args) > most else e.span
            raise fail(f"`{name}` takes {wanted}, not {len(e.args)}", extra, f"write `{SIGNATURES[name]}`")
        args = [arg.value for arg in e.args]
        if name == "where":
            cond = self.truth(args[0], env, space)
            return Num(ir.where(cond, self.num(args[1], env, space), self.num(args[2], env, space)))
        numbers = [self.num(arg, env, space) for arg in args]
        if name in ("min", "max"):
            join = ir.minimum if name == "min" else ir.maximum
            result = numbers[0]
            for other in numbers[1:]:
                result = join(result, other)
            return Num(result)
        if name == "isqrt" and numbers[0].type != "int":
            raise not_integer(numbers[0], args[0])
        return Num(ir.call(name, numbers[0]))

    # combinators

    def blocks_of(self, e: ast.Call, env: Env, space: Space) -> Value:
        args = bind_built_in("blocks", ("b", "R"), (), e)
        b = self.positive(args["b"], env, space, "the block length")

        def opened(sp: Space) -> Space:
            return replace(sp, n=ir.floordiv(ir.add(sp.n, b, ir.const(-1)), b))

        self.pattern(args["R"], env, opened(space))

        def at(q: Expr, k: Expr, sp: Space) -> Relation:
            inside = opened(sp)
            return self.pattern(args["R"], env, inside).at(ir.floordiv(q, b), ir.floordiv(k, b), inside)

        return self.memoised(at)

    def within_of(self, e: ast.Call, env: Env, space: Space) -> Value:
        args = bind_built_in("within", ("x", "R"), (), e)
        x = as_table(self.value(args["x"], env, space))
        if isinstance(x, TableOf):
            if x.table.dtype != "int" or len(x.table.explicit) != 1 or x.indices:
                raise fail("`within` takes an int table of one axis or a length", args["x"].span)
            table = x.table

            def segment(p: Expr, sp: Space) -> tuple[Expr, Expr, Expr]:
                at = (*table.implicit, p)
                return ir.lookup(table, *at), ir.rank_of(table, *at), ir.count_of(table, *at)
        elif not isinstance(x, Num):
            raise fail("`within` takes an int table of one axis or a length", args["x"].span)
        elif isinstance(args["x"], ast.Index) and x.expr.free & {"q", "k"}:
            base = quoted(args["x"].base)
            raise fail("`within` takes a table without its index", args["x"].span, f"write `{base}`")
        else:
            b = self.positive(args["x"], env, space, "the length of a piece")

            def segment(p: Expr, sp: Space) -> tuple[Expr, Expr, Expr]:
                piece = ir.floordiv(p, b)
                return piece, ir.mod(p, b), ir.minimum(b, ir.sub(sp.n, ir.mul(b, piece)))

        def at(q: Expr, k: Expr, sp: Space) -> Relation:
            piece, rank, size = segment(q, sp)
            other, other_rank, _ = segment(k, sp)
            inside = replace(sp, n=size)
            inner = self.pattern(args["R"], env, inside).at(rank, other_rank, inside)
            return restrict(inner, ir.eq(piece, other))

        at(Q, K, space)
        return self.memoised(at)

    def grid_of(self, e: ast.Call, env: Env, space: Space) -> Value:
        if len(e.args) < 2:
            help = f"write `grid(height, width, {COORDINATES})`"
            raise fail("`grid` takes the sizes of a canvas and a pattern of coordinates", e.span, help)
        for arg in e.args:
            if arg.name:
                raise fail("`grid` takes no named arguments", arg.span)
        *shape, last = (arg.value for arg in e.args)
        sizes = [self.positive(size, env, space, "a size of the canvas") for size in shape]
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
            inside = replace(sp, n=area)
            body = self.value(last, env, inside)
            if not isinstance(body, GridPattern):
                if isinstance(body, Num):
                    help = (
                        f"after the sizes write it: `grid({e.args[0].value.span.text}, ..., {COORDINATES})`"
                    )
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
        return self.memoised(at)

    def random_of(self, e: ast.Call, env: Env, space: Space) -> Value:
        args = bind_built_in("random", ("r",), ("seed", "of"), e)
        r = self.constant(args["r"], env, space, "the number of random keys")
        if r < 0:
            raise fail(f"the number of random keys is {r}, and must not be negative", args["r"].span)
        seed = self.integer(args["seed"], env, space) if "seed" in args else ir.ZERO
        if seed.free & {"q", "k"}:
            raise fail("the seed must be the same for all positions", args["seed"].span)

        def holds(q: Expr, k: Expr, sp: Space) -> Expr:
            row, col = ir.var(f"row{sp.depth}"), ir.var(f"col{sp.depth}")
            body = ir.TRUE
            if "of" in args:
                inside = replace(sp, depth=sp.depth + 1)
                body = self.pattern(args["of"], env, inside).at(row, col, inside).mask
            if body.free & {"q", "k"}:
                raise fail("`of` may not depend on positions outside it", args["of"].span)
            return ir.random_keys(q, k, sp.n, seed, body, r, str(row.value), str(col.value))

        holds(Q, K, space)
        return self.relation(holds)

    # attentions

    def attention(self, definition: ast.AttentionDef, env: Env) -> Attention:
        inputs: dict[str, Table] = {}
        for clause in definition.clauses:
            if isinstance(clause, ast.Inputs):
                for decl in clause.decls:
                    if decl.name in inputs:
                        raise fail(f"`{decl.name}` is declared twice", name_span(decl))
                    if decl.name in env.names:
                        raise fail(f"`{decl.name}` is a parameter and a table", name_span(decl), "rename one")
                    if decl.name in RESERVED or decl.name in BUILT_IN:
                        what = "reserved" if decl.name in RESERVED else "built in"
                        raise fail(f"`{decl.name}` is {what}", name_span(decl), "choose another name")
                    inputs[decl.name] = input_table(decl)
        env = env.bind(**{name: TableOf(table) for name, table in inputs.items()})
        return AttentionBuilder(self, definition, env).build(tuple(inputs.values()))


def _inputs(definition: ast.Definition | ast.AttentionDef) -> set[str]:
    clauses = definition.clauses if isinstance(definition, ast.AttentionDef) else ()
    return {decl.name for clause in clauses if isinstance(clause, ast.Inputs) for decl in clause.decls}


COORDINATES = "{ (y, x), (v, u) : ... }"
COMPARISONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "==": ir.eq,
    "!=": lambda a, b: ir.negate(ir.eq(a, b)),
    "<": ir.lt,
    "<=": ir.le,
    ">": lambda a, b: ir.lt(b, a),
    ">=": lambda a, b: ir.le(b, a),
}
