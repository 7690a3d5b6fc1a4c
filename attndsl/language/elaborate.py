"""From syntax to meaning: names resolved, definitions written out with their parameters bound.

What an expression denotes, and how it is evaluated, say expressions.py and combinators.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from attndsl import expr as ir
from attndsl.attention import Relation
from attndsl.errors import AttnError, Span, fail, suggest
from attndsl.expr import Expr, Selected
from attndsl.language import expressions
from attndsl.language.arguments import bind_arguments, meaning, signature, with_usage
from attndsl.language.clauses import attention_of
from attndsl.language.leaves import usage
from attndsl.language.mistakes import (
    SHOWN,
    blame,
    chosen,
    expected,
    not_integer,
    number_of,
    out_of_place,
    quantity_of,
    quoted,
    truth_of,
)
from attndsl.language.unknown import argument_around, condition_around, fitting, habit, remedy, wanted
from attndsl.language.values import (
    TOKENS,
    AttentionOf,
    GridPattern,
    Num,
    Pattern,
    Scope,
    SetOf,
    Space,
    TableOf,
    Value,
    Vec,
    as_number,
)
from attndsl.language.vocabulary import BUILT_IN, POSITIONS, RESERVED, SIGNATURES
from attndsl.selection import Selection
from attndsl.syntax import nodes as ast
from attndsl.syntax.format import render
from attndsl.syntax.habits import LEARN
from attndsl.syntax.prelude import prelude_words

CALL_DEPTH = 64
NUMBERED = {"q": ("position", "n"), "k": ("position", "n"), "h": ("head", "H")}
"""What is counted from 0, and what says how many there are."""
STEP_LIMIT = 200_000


class Elaborator:
    """The definitions of one program, and what has been learned of them so far; `registered` gives the
    selection of a name, `selections` are their names.

    `definitions` maps a name to its syntax, a file's own before the prelude's; `broken` holds those whose
    error was reported already: their users stay silent. `whole` is False where a file that is used was not
    found, which was reported: any unknown name may be there. `stacks` are names of stacks, and `layers_of`
    gives the masks of the layers of one whose `reach` is asked for, None of what is none.
    """

    def __init__(
        self,
        definitions: Mapping[str, ast.Definition | ast.AttentionDef],
        registered: Callable[[str], Selection | None],
        selections: Callable[[], Iterable[str]],
    ) -> None:
        self.definitions, self.registered, self.selections = definitions, registered, selections
        self.broken: set[str] = set()
        self.whole = True
        self.known: dict[tuple[object, ...], Value] = {}
        self.steps = 0
        self.serials: dict[tuple[object, ...], int] = {}
        self.leaves: dict[Selected, tuple[int, Span]] = {}
        self.stacks: Collection[str] = ()
        self.layers_of: Callable[[ast.Call], tuple[Expr, ...] | None] = lambda e: None

    # names

    def selection(self, name: ast.Name) -> Selection | None:
        """Raises AttnError where it cannot be used."""
        try:
            return self.registered(name.id)
        except AttnError as error:
            raise AttnError(*(replace(d, span=name.span) for d in error.diagnostics)) from None

    def lookup(self, name: ast.Name, env: Scope, space: Space) -> Value:
        if name.id == "stream":
            if name.id not in env.names:
                raise AttnError() if "stream" in self.broken else out_of_place(name)
            if space.n is not TOKENS.n:
                raise fail("`stream` is of a key, and this is text of another space", name.span)
        if name.id in env.names:
            return env.names[name.id]
        if name.id == "n":
            return Num(space.n)
        if name.id in POSITIONS or name.id == "layer" or (name.id == "D" and env.integral):
            inside = self.definitions.get(env.calls[-1]) if env.calls else None
            around = condition_around(name, inside) if inside else None
            given = argument_around(name, inside, self.definitions, self.registered) if inside else ""
            raise out_of_place(name, env.units, around, given)
        if name.id in ("nq", "h", "H", "D"):
            return Num(ir.var(name.id))
        if name.id in self.definitions:
            return self.apply(name, (), env, space)
        selection = self.selection(name)
        if (name.id in BUILT_IN and name.id != "learn") or selection:
            written = usage(name.id, selection) if selection else SIGNATURES[name.id]
            raise fail(f"`{name.id}` needs its arguments", name.span, help=f"write `{written}`")
        raise self.unknown(name, env)

    def unknown(self, name: ast.Name, env: Scope, looked_up: bool = False) -> AttnError:
        """For a name without a meaning; `looked_up` as a table is."""
        if name.id in self.broken or not self.whole:
            return AttnError()
        if name.id in self.stacks:
            help = "it is made of attentions, and part of none: `attndsl.build` makes a module of it"
            help = f"of a stack there is the reach: `reach({name.id})`" if env.claims else help
            return fail(f"`{name.id}` is a stack, and no pattern", name.span, help)
        if (comment := _comment_before(name.span)) is not None:
            return fail("unexpected `//`", comment, "a comment begins with `#`")
        if name.id == "learn":
            return fail("`learn` has its axes in brackets", name.span, LEARN)
        inside = self.definitions.get(env.calls[-1]) if env.calls else None
        kind = wanted(name, inside, self.definitions, self.registered) if inside else ""
        known = {*env.names, *self.definitions, *BUILT_IN, *self.selections(), "n", "nq", "h", "H", "D"}
        help = ""
        if inside is not None and name.id in {param.name for param in inside.params}:
            help = "a default sees only the parameters before its own"
        if not (help or looked_up or kind == "attention"):
            help = habit(name.id)
        help = help or suggest(name.id, filter(fitting(kind, self.definitions), known))
        if not help and env.claims and any(name.id in inputs_of(item) for item in self.definitions.values()):
            help = "a claim is about every table: it cannot name one"
        if not help and inside is not None:
            help = remedy(name.id, kind, inside)
        return fail(f"unknown name `{name.id}`", name.span, help)

    def means(self, name: str, env: Scope) -> bool:
        return name in env.names or name in self.definitions or name in RESERVED or name in BUILT_IN

    @functools.cached_property
    def remembers(self) -> bool:
        """Whether some keys are memory, which has negative positions."""
        attentions = [item for item in self.definitions.values() if isinstance(item, ast.AttentionDef)]
        keys = [clause for item in attentions for clause in item.clauses if isinstance(clause, ast.Keys)]
        return any(isinstance(node, ast.Name) and node.id == "mem" for node in ast.walk(tuple(keys)))

    def demand_position(self, p: Expr, lo: Expr, hi: Expr, span: Span | None = None) -> None:
        """Refuses a range of negative numbers in which a position or a head is looked for."""
        first, last = ir.number(lo), ir.number(hi)
        if p.op != "var" or p.value not in NUMBERED or last is None or last >= 0:
            return
        if first is not None and first > last:
            return  # an empty range asks for nothing
        what, count = NUMBERED[p.value]
        if what == "position" and self.remembers:
            return
        ends = [f"{count} - {-int(end)}" for end in dict.fromkeys((first, last)) if end is not None]
        raise fail(f"a {what} is never negative", span, f"from the end it is `{'..'.join(ends)}`")

    # definitions

    def apply(self, name: ast.Name, args: tuple[ast.Argument, ...], env: Scope, space: Space) -> Value:
        definition = self.definitions[name.id]
        if isinstance(definition, ast.Definition) and definition.word == "score":
            help = f"give it a clause of its own: `score {name.id}`"
            if (
                isinstance(env.clause, ast.Clause)
                and env.clause.word == "score"
                and len(body := render(definition.body)) <= SHOWN
            ):
                help += f", or write it out: `{body}`"
            raise fail(f"the score `{name.id}` may stand only as a whole `score` clause", name.span, help)
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
        env: Scope,
        space: Space,
    ) -> dict[str, Value]:
        """Parameters bound by position or name, evaluated where they are written."""
        bound = bind_arguments(definition, args)
        return {name: self.value(value, replace(env, binding=name), space) for name, value in bound.items()}

    def instance(
        self,
        definition: ast.Definition | ast.AttentionDef,
        values: Mapping[str, Value],
        env: Scope,
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
            hidden = prelude_words().get(definition.name)
            help = f"it hides the {hidden} `{definition.name}` of the prelude: give it another name"
            raise fail(f"`{definition.name}` is defined by itself: {cycle}", span, help if hidden else "")
        if len(env.calls) >= CALL_DEPTH:
            self.broken.update(env.calls)
            raise fail(f"definitions use each other more than {CALL_DEPTH} deep", span)
        whole = isinstance(definition, ast.AttentionDef)
        integral, claims = env.integral and not whole, env.claims and not whole
        calls = (*env.calls, definition.name)
        inner = Scope({}, integral, calls=calls, claims=claims, clause=env.clause)
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
        key = (id(definition), integral, claims, *inner.names.values())
        if key not in self.known:
            self.step(span)
            try:
                if isinstance(definition, ast.AttentionDef):
                    self.known[key] = AttentionOf(attention_of(self, definition, inner))
                else:
                    read = self.no_vector if definition.word == "score" else self.value
                    result = read(definition.body, replace(inner, binding=definition.name), TOKENS)
                    self.known[key] = self.typed(definition, result)
            except AttnError as error:
                blamed = AttnError(*(blame(d, definition, given or {}, span) for d in error.diagnostics))
                raise with_usage(blamed, span, (given or {}).values(), meaning(definition)) from None
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

    def value(self, e: ast.Expression, env: Scope, space: Space) -> Value:
        self.step(e.span)
        try:
            denoted = getattr(expressions, f"on_{type(e).__name__.lower()}")
            return denoted(self, e, env, space)  # type: ignore[no-any-return]
        except AttnError as error:
            # the constructors of expr.py know what is wrong, but not where
            raise AttnError(*(d if d.span else replace(d, span=e.span) for d in error.diagnostics)) from None

    def num(self, e: ast.Expression, env: Scope, space: Space, help: str = "") -> Expr:
        """A number; `help` is for where a set stands."""
        value = self.value(e, env, space)
        return number_of(value, e, chosen(value, e, env) or (help if isinstance(value, SetOf) else ""))

    def quantity(self, e: ast.Expression, env: Scope, space: Space) -> Expr:
        """A number or a vector."""
        value = self.value(e, env, space)
        return quantity_of(value, e, env, chosen(value, e, env))

    def no_vector(self, e: ast.Expression, env: Scope, space: Space, help: str = "") -> Value:
        """The value of what is to be a number: a vector is told where it comes in; `help` is for a table."""
        value = self.value(e, env, space)
        inside: ast.Expression | None = e
        while inside is not None and isinstance(as_number(value), Vec):
            e, inside = inside, None
            if isinstance(e, ast.Binary) and e.op == "*":
                sides = [self.value(side, env, space) for side in (e.left, e.right)]
                if all(isinstance(as_number(side), Vec) for side in sides):
                    product = f"{quoted(e.left, tight=True)} @ {quoted(e.right, tight=True)}"
                    raise expected("a number", value, e, f"the inner product is `{product}`")
            for part in operands(e):
                if inside is None and isinstance(as_number(found := self.value(part, env, space)), Vec):
                    inside, value = part, found
            if inside is None:
                of_table = isinstance(value, TableOf) and value.table.dims[-1] != "D"
                raise expected("a number", value, e, help if of_table else "")
        return value

    def integer(self, e: ast.Expression, env: Scope, space: Space, help: str = "") -> Expr:
        number = self.num(e, env, space, help)
        if number.type != "int":
            raise not_integer(number, e)
        return number

    def positive(self, e: ast.Expression, env: Scope, space: Space, what: str) -> Expr:
        number = self.integer(e, env, space)
        value = ir.number(number)
        if value is not None and value <= 0:
            raise fail(f"{what} is {value}, and must be positive", e.span)
        if number.free & {"q", "k"}:
            raise fail(f"{what} must be the same for all positions", e.span)
        return number

    def constant(self, e: ast.Expression, env: Scope, space: Space, what: str) -> int:
        value = ir.number(self.integer(e, env, space))
        if value is None:
            raise fail(f"{what} must be a constant", e.span)
        return int(value)

    def truth(self, e: ast.Expression, env: Scope, space: Space) -> Expr:
        return truth_of(self.value(e, env, space), e, env)

    def pattern(self, e: ast.Expression, env: Scope, space: Space) -> Pattern:
        value = self.value(e, env, space)
        if isinstance(value, Pattern):
            return value
        raise expected("a pattern", value, e)


def operands(e: ast.Expression) -> tuple[ast.Expression, ...]:
    """What the entries of a vector are made of."""
    match e:
        case ast.Nary("+", args):
            return args
        case ast.Binary("-" | "*" | "/", left, right):
            return left, right
        case ast.Call(ast.Name(name), args) if name in ir.FUNCTIONS:
            return tuple(arg.value for arg in args)
    return ()


def _comment_before(span: Span) -> Span | None:
    """The `//` before a name that ends its line: a comment of one word, as other languages write it."""
    line, column = span.source.position(span.start)
    text = span.source.line(line)
    before = text[: column - 1].rstrip()
    if not before.endswith("//") or text[column - 1 + span.end - span.start :].strip():
        return None
    start = span.start - (column - 1) + len(before) - 2
    return Span(span.source, start, start + 2)


def inputs_of(definition: ast.Definition | ast.AttentionDef) -> set[str]:
    """The names of its tables."""
    clauses = definition.clauses if isinstance(definition, ast.AttentionDef) else ()
    return {decl.name for clause in clauses if isinstance(clause, ast.Inputs) for decl in clause.decls}
