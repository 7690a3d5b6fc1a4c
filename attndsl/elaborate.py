"""From syntax to meaning: names resolved, types checked, definitions written out, parameters bound.

Numbers are evaluated where they are written. Sets and patterns are evaluated where they are used: they
become functions of a position, or of a query and a key, in a space (values.py). The argument of a
combinator that opens a new space (`blocks within grid`) is text of that space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup, Norm, Relation
from attndsl.errors import AttnError, Diagnostic, Span, fail, suggest
from attndsl.expr import Expr, IntSet, Table
from attndsl.pointwise import evaluate
from attndsl.syntax import nodes as ast
from attndsl.syntax.format import render
from attndsl.values import (
    AttentionOf,
    GridPattern,
    Num,
    Pattern,
    SetOf,
    Space,
    TableOf,
    Truth,
    Value,
    Vec,
    intersection,
    restrict,
    total,
    union,
)

RESERVED = frozenset("q k n nq h H D s Q K layer".split())
POSITIONS = frozenset("q k s Q K".split())
COMBINATORS = frozenset("blocks within grid random".split())
FUNCTIONS = frozenset(("min", "max", "where", "isqrt", "floor", *ir.FUNCTIONS))
CLAIMS = frozenset("every_row density nnz diameter reach".split())
BUILT_IN = COMBINATORS | FUNCTIONS | CLAIMS | {"learn"}
CALL_DEPTH = 64
HEAD_LIMIT = 4096
STEP_LIMIT = 320_000
TOKENS = Space(ir.var("n"))
Q, K = ir.var("q"), ir.var("k")


@dataclass(frozen=True)
class Env:
    """The names in sight besides definitions.

    integral: real numbers are refused: the text of a mask.
    binding:  the name that a `learn` met here is bound to.
    calls:    the definitions being written out, outermost first.
    claims:   the text of an assertion: an attention stands for the union of its heads.
    """

    names: Mapping[str, Value]
    integral: bool = True
    binding: str = ""
    calls: tuple[str, ...] = ()
    claims: bool = False

    def bind(self, **names: Value) -> Env:
        return replace(self, names={**self.names, **names})


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
        self.clause: ast.Clause | None = None
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
        candidates = {*env.names, *self.definitions, *BUILT_IN, "n", "nq", "h", "H", "D"}
        near = RETIRED.get(name.id) or RETIRED.get(name.id.lower()) or suggest(name.id, candidates)
        if env.calls and name.id in {param.name for param in self.definitions[env.calls[-1]].params}:
            help = "a default sees only the parameters before its own"
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
        values = self.arguments(definition, args, env, space, name.span)
        given = bind_arguments(definition, args, name.span)
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
        span: Span,
    ) -> dict[str, Value]:
        """Parameters bound by position or name, evaluated where they are written."""
        bound = bind_arguments(definition, args, span)
        return {
            name: self.value(value, replace(env, binding=name), space) for name, value in bound.items()
        }

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
        inner = Env({}, integral, calls=(*env.calls, definition.name))
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
        key = (id(definition), env.integral, *inner.names.values())
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
            raise _expected("a pattern", result, definition.body)
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
            raise AttnError(
                *(d if d.span else replace(d, span=e.span) for d in error.diagnostics)
            ) from None

    def num(self, e: ast.Expression, env: Env, space: Space) -> Expr:
        value = self.value(e, env, space)
        return number_of(value, e, chosen(value, e, env))

    def integer(self, e: ast.Expression, env: Env, space: Space) -> Expr:
        number = self.num(e, env, space)
        if number.type != "int":
            raise _real(number, e)
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
        raise _expected("a pattern", value, e)

    def on_name(self, e: ast.Name, env: Env, space: Space) -> Value:
        value = self.lookup(e, env, space)
        if isinstance(value, TableOf) and value.table.learned and env.integral:
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
                    help=f"between truths write `{word}`",
                )
        raise self.mixed(e, written)

    def mixed(self, e: ast.Nary, values: list[Value]) -> AttnError:
        """For sets among patterns and the like: what the first operand is, all must be."""
        first = as_set(values[0])
        if not isinstance(first, Pattern | SetOf):
            return _expected("a pattern", values[0], e.args[0])
        for arg, value in zip(e.args, values, strict=True):
            if as_set(value).noun != first.noun:
                return _expected(first.noun, value, arg)
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
            raise _expected(left.noun, right, e.right)
        both = isinstance(left, Pattern) and isinstance(right, Pattern)
        help = "between patterns write `&`" if both else ""
        a = number_of(left, e.left, help or chosen(left, e.left, env))
        b = number_of(right, e.right, help or chosen(right, e.right, env))
        if e.op == "-":
            return Num(ir.sub(a, b))
        if e.op == "*":
            return Num(ir.mul(a, b))
        if e.op == "**":
            return Num(ir.power(a, b))
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
            raise _real(number, e)
        return number

    def member(self, e: ast.Expression, of: ast.Expression, env: Env, space: Space) -> Expr:
        position = self.operand("in", e, env, space)
        members = as_set(self.value(of, env, space))
        if not isinstance(members, SetOf):
            help = f"look it up: `{quoted(of, tight=True)}[q, k]`" if isinstance(members, Pattern) else ""
            raise _expected("a set", members, of, help)
        return members.contains(position, space)

    def on_range(self, e: ast.Range, env: Env, space: Space) -> Value:
        def contains(p: Expr, sp: Space) -> Expr:
            lo, hi = self.integer(e.lo, env, sp), self.integer(e.hi, env, sp)
            return ir.all_of(ir.le(lo, p), ir.le(p, hi))

        contains(Q, space)
        return self.members(contains)

    def on_setlist(self, e: ast.SetList, env: Env, space: Space) -> Value:
        def contains(p: Expr, sp: Space) -> Expr:
            constant: list[tuple[int, int]] = []
            rest: list[Expr] = []
            for item in e.items:
                ends = (item.lo, item.hi) if isinstance(item, ast.Range) else (item, item)
                lo, hi = (self.integer(end, env, sp) for end in ends)
                if lo.op == hi.op == "const":
                    constant.append((int(lo.value), int(hi.value)))  # type: ignore[call-overload]
                else:
                    rest.append(ir.eq(p, lo) if lo is hi else ir.all_of(ir.le(lo, p), ir.le(p, hi)))
            return ir.any_of(ir.inset(p, IntSet.of(constant)), *rest)

        contains(Q, space)
        return self.members(contains)

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
        base = self.value(e.base, env, space)
        if isinstance(base, Pattern):
            if len(e.indices) != 2:
                help = f"write `{quoted(e.base, tight=True)}[q, k]`"
                raise fail(f"a pattern is looked up at 2 positions, not {len(e.indices)}", e.span, help)
            q, k = (self.integer(i, env, space) for i in e.indices)
            inside = (ir.all_of(ir.le(ir.ZERO, p), ir.lt(p, space.n)) for p in (q, k) if p not in (Q, K))
            return Truth(ir.all_of(*inside, base.at(q, k, space).mask))
        if not isinstance(base, TableOf):
            raise fail(f"only tables and patterns are looked up, and this is {base.noun}", e.base.span)
        table = base.table
        for i in e.indices:
            if isinstance(i, ast.Name) and i.id in "BH" and i.id not in env.names:
                raise fail(f"the axis `{i.id}` of `{table.name}` is implicit", i.span, help="leave it out")
        indices = (*base.indices, *(self.integer(i, env, space) for i in e.indices))
        if len(indices) > len(table.dims):
            implicit = table.batched or table.headed
            help = "the axes `B` and `H` are implicit: leave them out" if implicit else ""
            rank = len(table.dims)
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
        headed = False
        for i, size in enumerate(e.indices):
            if isinstance(size, ast.Name) and size.id == "H" and i == 0:
                headed = True
            elif isinstance(size, ast.Name) and size.id == "D":
                dims.append("D")
            else:
                dims.append(self.constant(size, env, space, "a size of `learn`"))
                if int(dims[-1]) <= 0:
                    raise fail("a size of `learn` must be positive", size.span)
        # one parameter per evaluation: a clause that several head groups share is still one
        serial = self.serials.setdefault((id(e), env.calls, id(self.clause)), len(self.serials))
        return as_number(
            TableOf(Table(env.binding, "float", tuple(dims), headed=headed, init=float(start), serial=serial))
        )

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
            raise _real(numbers[0], args[0])
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
        x = self.value(args["x"], env, space)
        if isinstance(x, TableOf):
            if x.table.dtype != "int" or len(x.table.dims) != 1 or x.indices:
                raise fail("`within` takes an int table of one axis or a length", args["x"].span)
            table = x.table

            def segment(p: Expr, sp: Space) -> tuple[Expr, Expr, Expr]:
                return ir.lookup(table, p), ir.rank_of(table, p), ir.count_of(table, p)
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
            raise fail("`grid` takes the sizes of a canvas and a pattern of coordinates", e.span)
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
                help = "write `{ (y, x), (v, u) : ... }`" if len(sizes) == 2 else ""
                raise _expected("a pattern of coordinates", body, last, help)
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
        return _AttentionBuilder(self, definition, env).build(tuple(inputs.values()))


class _AttentionBuilder:
    """The clauses of one attention, put together group by group."""

    def __init__(self, elaborator: Elaborator, definition: ast.AttentionDef, env: Env) -> None:
        self.elaborator, self.definition = elaborator, definition
        self.mask_env = replace(env, integral=True, binding="")
        self.env = replace(env, integral=False, binding="")
        # where positions have no meaning they are in sight all the same: the clause says what it depends on
        self.placed = self.mask_env.bind(q=Num(Q), k=Num(K))
        self.learned: dict[str, Table] = {}
        self.failed: list[AttnError] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """A mistake in one clause does not hide those in others."""
        try:
            yield
        except AttnError as error:
            self.failed.append(error)

    def build(self, inputs: tuple[Table, ...]) -> Attention:
        clauses = self.definition.clauses
        heads = [clause for clause in clauses if isinstance(clause, ast.Heads)]
        if len(heads) > 1:
            raise fail("an attention has one `heads` clause", heads[1].span)
        offset = None
        with self.going_on():
            self.once("offset", [c for c in clauses if isinstance(c, ast.Clause)])
        for clause in clauses:
            if isinstance(clause, ast.Clause) and clause.word == "offset":
                with self.going_on():
                    offset = self.elaborator.integer(clause.value, self.placed, TOKENS)
                    if not offset.free <= {"n", "nq"} or offset.tables:
                        raise fail("`offset` depends on n and nq alone", clause.value.span)
        groups = self.groups(heads[0]) if heads else [(ir.TRUE, ())]
        built = tuple(self.group(which, own) for which, own in groups)
        if self.failed:
            raise AttnError(*dict.fromkeys(d for error in self.failed for d in error.diagnostics))
        return Attention(self.definition.name, built, inputs, tuple(self.learned.values()), offset)

    def groups(self, heads: ast.Heads) -> list[tuple[Expr, tuple[ast.Clause, ...]]]:
        h = ir.var("h")
        found: list[tuple[Expr, tuple[ast.Clause, ...]]] = []
        taken: set[int] = set()
        for i, group in enumerate(heads.groups):
            if group.which is None:
                if i != len(heads.groups) - 1:
                    raise fail("`else` comes last", group.span)
                which = ir.negate(ir.any_of(*(earlier for earlier, _ in found)))
            else:
                which = ir.FALSE
                with self.going_on():
                    which = self.head_set(group.which, h)
                    listed = listed_heads(which)
                    if taken & listed:
                        raise fail(f"head {min(taken & listed)} is in two groups", group.which.span)
                    taken |= listed
            found.append((which, group.clauses))
        return found

    def head_set(self, e: ast.Expression, h: Expr) -> Expr:
        value = as_set(as_number(self.elaborator.value(e, self.placed, TOKENS)))
        if isinstance(value, SetOf):
            which = value.contains(h, TOKENS)
        elif isinstance(value, Num) and value.expr.type == "int":
            which = ir.eq(h, value.expr)
        else:
            raise _expected("a set of heads", value, e, "write `0..5` or `[0, 2]`")
        if not which.free <= {"h", "H"} or which.tables:
            raise fail("a set of heads depends on h and H alone", e.span)
        if "H" not in which.free and not listed_heads(which):
            raise fail("this set of heads is empty", e.span)
        return which

    def once(self, word: str, clauses: list[ast.Clause]) -> None:
        found = [clause for clause in clauses if clause.word == word]
        if len(found) > 1:
            raise fail(f"`{word}` is given twice", found[1].span)

    def group(self, heads: Expr, own: tuple[ast.Clause, ...]) -> HeadGroup:
        clauses: list[ast.Clause] = []
        for clause in self.definition.clauses:
            if isinstance(clause, ast.Clause):
                clauses.append(clause)
            elif isinstance(clause, ast.Heads):
                clauses.extend(own)
        for clause in own:
            if clause.word not in ("mask", "score", "decay", "norm"):
                raise fail(f"`{clause.word}` cannot stand inside `heads`", clause.span)
        with self.going_on():
            self.once("norm", clauses)
        relations: list[Relation] = []
        score, norm = ir.var("s"), Norm()
        decays: list[Expr] = []
        for clause in clauses:
            self.elaborator.clause = clause
            with self.going_on():
                if clause.word == "mask":
                    pattern = self.mask(clause.value)
                    relations.append(pattern.at(Q, K, TOKENS))
                elif clause.word == "score":
                    score = self.score(clause.value, score)
                elif clause.word == "decay":
                    decays.append(self.real(clause.value, self.positions()))
                elif clause.word == "norm":
                    norm = self.norm(clause.value)
        joined = intersection(relations) if relations else Relation(ir.TRUE)
        if joined.count is not None:
            decays.append(ir.mul(ir.const(1.0), joined.count))
        decay = None
        for factor in decays:
            decay = factor if decay is None else ir.mul(decay, factor)
        return HeadGroup(joined, score, decay, norm, heads)

    def mask(self, e: ast.Expression) -> Pattern:
        if isinstance(e, ast.Name) and e.id in self.elaborator.definitions:
            definition = self.elaborator.definitions[e.id]
            if isinstance(definition, ast.Definition) and definition.word == "score":
                raise fail(f"expected a pattern, and `{e.id}` is a score", e.span, f"write `score {e.id}`")
        return self.elaborator.pattern(e, self.mask_env, TOKENS)

    def positions(self) -> Env:
        return self.env.bind(q=Num(Q), k=Num(K))

    def score(self, e: ast.Expression, current: Expr) -> Expr:
        named: dict[str, Value] = {
            "s": Num(current),
            "q": Num(Q),
            "k": Num(K),
            "Q": Vec(ir.var("Q")),
            "K": Vec(ir.var("K")),
        }
        if "s" in self.env.names:
            for node in ast.walk(e):
                if isinstance(node, ast.Name) and node.id == "s":
                    what = f"`s` is a parameter of `{self.definition.name}`, and the logit in a score"
                    raise fail(what, node.span, help="give the parameter another name")
        env = self.env.bind(**named)
        call = score_call(e, self.elaborator.definitions, env)
        if call is None:
            return self.real(e, env)
        definition, name, args = call
        values = self.elaborator.arguments(definition, args, env, TOKENS, name.span)
        given = bind_arguments(definition, args, name.span)
        result = self.elaborator.instance(definition, values, env, name.span, named, given)
        return self.number(result, definition.body)

    def real(self, e: ast.Expression, env: Env) -> Expr:
        return self.number(self.elaborator.value(e, env, TOKENS), e)

    def number(self, value: Value, e: ast.Expression) -> Expr:
        help = ""
        if isinstance(value, Pattern):
            help = f"a pattern goes into `mask`; look it up: `where({quoted(e, tight=True)}[q, k], a, b)`"
        result = number_of(value, e, help)
        for table in sorted(result.tables, key=lambda table: table.name):
            if table.learned:
                self.declare(table, e)
        return result

    def declare(self, table: Table, e: ast.Expression) -> None:
        known = self.learned.setdefault(table.name, table)
        if known != table:
            raise fail(
                f"two learned parameters are named `{table.name}`",
                e.span,
                help="bind them to different names, or share one through a `let`",
            )

    def norm(self, e: ast.Expression) -> Norm:
        func, args = (e.func, e.args) if isinstance(e, ast.Call) else (e, ())
        if not isinstance(func, ast.Name) or func.id not in ("softmax", "sigmoid", "relu"):
            raise fail("a norm is `softmax`, `softmax(sink = ...)`, `sigmoid` or `relu`", e.span)
        for arg in args:
            if func.id != "softmax":
                raise fail(f"`{func.id}` takes no arguments", arg.span, help="only `softmax` has a sink")
            if arg.name != "sink" or len(args) > 1:
                raise fail("`softmax` takes one argument, `sink = ...`", arg.span)
            sink = self.real(arg.value, replace(self.positions(), binding="sink"))
            if not sink.free <= {"h", "H", "n", "nq", "D"}:
                raise fail("a sink is one logit per head", arg.value.span)
            return Norm("softmax", sink)
        return Norm(func.id)  # type: ignore[arg-type]


def as_number(value: Value) -> Value:
    """A table with all axes indexed is a number or a truth, one with the axis D left over a vector."""
    if not isinstance(value, TableOf):
        return value
    left = len(value.table.dims) - len(value.indices)
    if left == 0:
        found = ir.lookup(value.table, *value.indices)
        return Truth(found) if found.type == "bool" else Num(found)
    if left == 1 and value.table.dims[-1] == "D" and value.table.dtype == "float":
        return Vec(ir.lookup(value.table, *value.indices))
    return value


def as_set(value: Value) -> Value:
    """A table that one axis is left of is a set: of the true positions, or of the integers listed."""
    if not isinstance(value, TableOf) or len(value.table.dims) - len(value.indices) != 1:
        return value
    table, indices = value.table, value.indices
    if table.dtype == "bool":
        return SetOf(lambda p, sp: ir.lookup(table, *indices, p))
    if table.dtype == "int":
        return SetOf(lambda p, sp: ir.intable(p, table, *indices))
    return value


def is_whole(value: Value) -> bool:
    return isinstance(value, TableOf) and not value.indices


def number_of(value: Value, e: ast.Expression, help: str = "") -> Expr:
    number = as_number(value)
    if isinstance(number, Num):
        return number.expr
    raise _expected("a number", number, e, help)


def chosen(value: Value, e: ast.Expression, env: Env) -> str:
    """The help where a score or a `let` takes a pattern for a number."""
    if env.integral or not isinstance(value, Pattern):
        return ""
    return f"look it up: `where({quoted(e, tight=True)}[q, k], a, b)`"


def truth_of(value: Value, e: ast.Expression, env: Env) -> Expr:
    truth = as_number(value)
    if isinstance(truth, Truth):
        return truth.expr
    position = "k" if "k" in env.names else next(reversed(list(env.names)), "q")
    help = f"ask for a member: `{position} in {quoted(e)}`" if isinstance(as_set(truth), SetOf) else ""
    raise _expected("a truth", truth, e, help)


def _expected(noun: str, value: Value, e: ast.Expression, help: str = "") -> AttnError:
    value = as_number(value)
    if isinstance(value, TableOf):
        listed = isinstance(as_set(value), SetOf)
        if listed and (value.indices or noun == "a truth" or value.table.dtype == "bool"):
            value = as_set(value)
        elif listed and noun == "a pattern":
            name = quoted(e)
            help = help or f"write `documents({name})`, or `columns({name})` for the keys it lists"
    if isinstance(value, TableOf):
        left = len(value.table.dims) - len(value.indices)
        more = f"{quoted(e)}[{('q', 'q, k')[left - 1] if left <= 2 else '...'}]"
        if value.indices:
            help = help or f"it takes {left} more ind{'ex' if left == 1 else 'ices'}"
        elif noun == "a pattern":
            help = help or f"look it up: `{{ q, k : {more} }}`"
        help = help or f"look it up: `{more}`"
    remedy = REMEDIES.get((noun, value.noun), "")
    other = "K" if quoted(e) in ("Q", "K") else quoted(e)
    help = help or remedy.format(x=quoted(e), r=quoted(e, tight=True), v=other)
    return fail(f"expected {noun}, and this is {value.noun}", e.span, help)


def quoted(e: ast.Expression, tight: bool = False, most: int = 40) -> str:
    """What was written, for a help line: without the parentheses around it, unless it is to stand `tight`."""
    text = e.span.text
    if len(text) > most or "\n" in text:
        return "..."
    loose = isinstance(e, ast.Nary | ast.Binary | ast.Unary | ast.Compare | ast.Range)
    bare = text[1:-1].strip() if loose and _enclosed(text) else text
    return f"({bare})" if loose and tight else bare


def _enclosed(text: str) -> bool:
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i == len(text) - 1 and text[0] == "("
    return False


def blame(
    d: Diagnostic,
    definition: ast.Definition | ast.AttentionDef,
    given: Mapping[str, ast.Expression],
    span: Span,
) -> Diagnostic:
    """A mistake found in a definition that arguments were given to.

    In the prelude it is the caller's: told at the argument that the prelude stumbled over, if there is just
    one, else at the call. In a program's own definition it is told where it is, with the call as a help.
    """
    inside = definition.span
    if d.span is None or d.span.source is not inside.source or not inside.start <= d.span.start < inside.end:
        return d
    if inside.source.name != PRELUDE:
        line, column = span.source.position(span.start)
        place = f"`{definition.name}` is given its arguments at {span.source.name}:{line}:{column}"
        return replace(d, help=place) if given and not d.help else d
    text, help = d.span.text, d.help
    if isinstance(definition, ast.Definition) and definition.word != "score" and re.search(r"\[[qk]\b", help):
        help = ""  # there are no positions where the call stands
    used = [e for name, e in given.items() if re.search(rf"\b{name}\b", text)]
    message = f"in `{definition.name}`: " + re.sub(r"^in `\w+`: ", "", d.message)
    if len(used) != 1:
        return replace(d, message=message, span=span, help="" if text in help else help)
    inner = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
    parts = help.split("`")
    parts[1::2] = [inner.sub(lambda _: quoted(used[0]), code) for code in parts[1::2]]
    return replace(d, message=message, span=used[0].span, help="`".join(parts))


def _real(number: Expr, e: ast.Expression) -> AttnError:
    for table in sorted(number.tables, key=lambda table: table.name):
        if table.learned:
            return fail(f"`{table.name}` is learned, and a mask may not depend on it", e.span, IN_SCORES)
        if table.dtype == "float":
            help = f"declare it `int`, or round it: `floor({quoted(e)})`"
            return fail(f"expected an integer, and `{table.name}` is a float table", e.span, help)
    if isinstance(e, ast.Binary) and e.op == "/":
        return fail("`/` is real where an integer is needed", e.span, "write `//` to round down")
    help = f"round it down: `floor({quoted(e)})`"
    return fail("expected an integer, and this is a real number", e.span, help)


def out_of_place(name: ast.Name) -> AttnError:
    if name.id in ("q", "k"):
        help = "write `{ q, k : ... }` around it"
        return fail(f"`{name.id}` has no meaning outside a pattern or a score", name.span, help)
    if name.id == "layer":
        return fail("`layer` has no meaning outside a stack of layers", name.span)
    what = {"s": "the logit", "Q": "the query's vector", "K": "the key's vector", "D": "the head dimension"}
    return fail(f"`{name.id}` is {what[name.id]}, and stands in a score alone", name.span)


def bind_arguments(
    definition: ast.Definition | ast.AttentionDef, args: tuple[ast.Argument, ...], span: Span
) -> dict[str, ast.Expression]:
    names = [param.name for param in definition.params]
    bound: dict[str, ast.Expression] = {}
    for i, arg in enumerate(args):
        if not arg.name and i >= len(names):
            takes = f"{len(names)} argument{'s' * (len(names) > 1)}, not {len(args)}"
            takes = takes if names else "no arguments"
            raise fail(f"`{definition.name}` takes {takes}", arg.span, f"write `{signature(definition)}`")
        name = arg.name or names[i]
        if name not in names:
            help = suggest(name, names) or f"write `{signature(definition)}`"
            raise fail(f"`{definition.name}` has no parameter `{name}`", name_span(arg), help)
        if name in bound:
            raise fail(f"`{name}` is given twice", arg.span)
        bound[name] = arg.value
    return bound


def bind_built_in(
    name: str, required: tuple[str, ...], optional: tuple[str, ...], e: ast.Call
) -> dict[str, ast.Expression]:
    return bind_arguments_of(name, required, optional, e, SIGNATURES[name])


def bind_arguments_of(
    name: str, required: tuple[str, ...], optional: tuple[str, ...], e: ast.Call, usage: str
) -> dict[str, ast.Expression]:
    """Arguments of something built in, by parameter; `usage` shows how it is written."""
    names = (*required, *optional)
    bound: dict[str, ast.Expression] = {}
    for i, arg in enumerate(e.args):
        if not arg.name and i >= len(names):
            takes = f"{len(names)} argument{'s' * (len(names) > 1)}"
            raise fail(f"`{name}` takes {takes}, not {len(e.args)}", arg.span, f"write `{usage}`")
        key = arg.name or names[i]
        if key not in names:
            help = suggest(key, names) or f"write `{usage}`"
            raise fail(f"`{name}` has no parameter `{key}`", name_span(arg), help)
        if key in bound:
            raise fail(f"`{key}` is given twice", arg.span)
        bound[key] = arg.value
    for key in required:
        if key not in bound:
            raise fail(f"`{name}` needs its argument `{key}`", e.span, f"write `{usage}`")
    return bound


def name_span(node: ast.Argument | ast.Param | ast.InputDecl) -> Span:
    """Where the name stands that the node begins with."""
    return replace(node.span, end=node.span.start + len(node.name))


def signature(definition: ast.Definition | ast.AttentionDef) -> str:
    params = (p.name if p.default is None else f"{p.name} = {render(p.default)}" for p in definition.params)
    return f"{definition.name}({', '.join(params)})" if definition.params else definition.name


def score_call(
    e: ast.Expression, definitions: Mapping[str, ast.Definition | ast.AttentionDef], env: Env
) -> tuple[ast.Definition, ast.Name, tuple[ast.Argument, ...]] | None:
    """The named score that a whole clause is, if it is one."""
    func, args = (e.func, e.args) if isinstance(e, ast.Call) else (e, ())
    if not isinstance(func, ast.Name) or func.id in env.names:
        return None
    definition = definitions.get(func.id)
    if isinstance(definition, ast.Definition) and definition.word == "score":
        return definition, func, args
    return None


def check_builder(e: ast.Builder) -> None:
    if len(e.vars) > 2:
        raise fail("a pattern relates two positions, a query and a key", e.vars[2][0].span)
    if len({len(group) for group in e.vars}) > 1:
        first, second = map(len, e.vars)
        here = e.vars[1][0].span.to(e.vars[1][-1].span)
        raise fail(f"the query has {first} coordinate{'s' * (first > 1)}, and the key {second}", here)
    if [name.id for group in e.vars for name in group] == ["k", "q"]:
        raise fail("the query comes first", e.vars[0][0].span.to(e.vars[1][0].span), "write `{ q, k : ... }`")
    seen: set[str] = set()
    for i, group in enumerate(e.vars):
        for name in group:
            if name.id in seen:
                raise fail(f"`{name.id}` is bound twice", name.span)
            seen.add(name.id)
            if name.id in RESERVED and not (len(e.vars) == 2 and len(group) == 1 and name.id == "qk"[i]):
                help = "name it otherwise: `{ p : ... }`" if len(e.vars) == 1 else "choose another name"
                raise fail(f"`{name.id}` is reserved", name.span, help)


def input_table(decl: ast.InputDecl) -> Table:
    if decl.dtype not in ("int", "bool", "float"):
        raise fail(f"unknown type `{decl.dtype}`", decl.span, help="a table is int, bool or float")
    dims: list[str | int] = []
    batched = headed = False
    for i, dim in enumerate(decl.dims):
        if isinstance(dim, ast.Name) and dim.id == "B" and i == 0:
            batched = True
        elif isinstance(dim, ast.Name) and dim.id == "H" and i == int(batched):
            headed = True
        elif isinstance(dim, ast.Name):
            if dim.id in ("B", "H"):
                raise fail("the axes `B` and `H` come first, in this order", dim.span)
            dims.append(dim.id)
        elif isinstance(dim, ast.Number) and isinstance(dim.value, int) and dim.value > 0:
            dims.append(dim.value)
        else:
            raise fail("a size is a name or a positive integer", dim.span)
    return Table(decl.name, decl.dtype, tuple(dims), batched, headed)  # type: ignore[arg-type]


def listed_heads(which: Expr) -> set[int]:
    """The heads below HEAD_LIMIT in a set; none where it depends on H."""
    if "H" in which.free:
        return set()
    heads = np.arange(HEAD_LIMIT)
    held = evaluate(ir.substitute(which, {"h": Q}), heads[:, None], np.zeros((1, 1), np.int64))
    return {*heads[held[:, 0]].tolist()}


COMPARISONS: dict[str, Callable[[Expr, Expr], Expr]] = {
    "==": ir.eq,
    "!=": lambda a, b: ir.negate(ir.eq(a, b)),
    "<": ir.lt,
    "<=": ir.le,
    ">": lambda a, b: ir.lt(b, a),
    ">=": lambda a, b: ir.le(b, a),
}

SIGNATURES = {
    "blocks": "blocks(b, R)",
    "within": "within(x, R)",
    "grid": "grid(height, width, { (y, x), (v, u) : ... })",
    "random": "random(r, seed = 0, of = full)",
    "learn": "learn[SHAPE](init)",
    "where": "where(cond, a, b)",
    "min": "min(a, b)",
    "max": "max(a, b)",
} | {name: f"{name}(x)" for name in ("isqrt", "floor", *ir.FUNCTIONS)} | {
    name: f"assert {name}(...)" for name in CLAIMS
}

REMEDIES = {
    ("a number", "a truth"): "write `where({x}, 1, 0)`",
    ("a number", "a vector"): "an inner product is a number: `Q @ {v}`",
    ("a truth", "a number"): "compare it, as in `{x} == 0`",
    ("a truth", "a pattern"): "look it up: `{r}[q, k]`",
    ("a set", "a number"): "write `[{x}]`",
    ("a pattern", "a truth"): "write `{{ q, k : {x} }}`",
    ("a pattern", "a set"): "write `columns({x})`, `rows({x})` or `global({x})`",
    ("a pattern", "a pattern of coordinates"): "write `grid(height, width, {x})`",
    ("a pattern", "an attention"): "name its mask as a `pattern` and use that",
}
"""What to write where one kind of value is expected and another found."""

PRELUDE = "prelude.attn"
IN_SCORES = "`score`, `decay` and a sink may"

RETIRED = {
    "window": "write `last(w)` for w keys up to the query, `radius(r)` for r on each side, or `band(a..b)`",
    "abs": "write `|x|`",
    "B": "the batch stands only in the axes of `inputs`, first",
    "true": "write `0 == 0`, or the pattern `full`",
    "false": "write `0 == 1`, or the pattern `none`",
}
