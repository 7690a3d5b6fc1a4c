"""The syntax tree is built while the parser reduces: one method per rule of grammar/attn.lark."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from lark import Token, Transformer

from attndsl.errors import Source, Span, fail
from attndsl.syntax import habits, nodes
from attndsl.syntax.nodes import (
    Abs,
    Argument,
    Assert,
    AttentionDef,
    Binary,
    Builder,
    Call,
    Clause,
    Compare,
    Definition,
    Expression,
    HeadClauses,
    Heads,
    Index,
    InputDecl,
    Inputs,
    Keys,
    Module,
    Name,
    Nary,
    Number,
    Param,
    Range,
    SetList,
    StackDef,
    Stage,
    Text,
    Unary,
    Use,
)
from attndsl.syntax.tokens import DTYPES, extent

INTEGER_LIMIT = 2**63 - 1

place: ContextVar[tuple[Source, int]] = ContextVar("place")
"""The source being parsed and the offset in it that tokens count from."""


def span_of(item: Token | nodes.Node) -> Span:
    if isinstance(item, nodes.Node):
        return item.span
    source, offset = place.get()
    start, end = extent(item)
    return Span(source, offset + start, offset + end)


def around(first: Token | nodes.Node, last: Token | nodes.Node) -> Span:
    return span_of(first).to(span_of(last))


def name_of(token: Token) -> Name:
    return Name(str(token), span=span_of(token))


def fold(children: list[Any]) -> Expression:
    """`a op b op c`, left to right; a run of `+` is one flat node."""
    result: Expression = children[0]
    position = 1
    while position < len(children):
        op = str(children[position])
        if op == "+":
            end = position
            while end < len(children) and children[end] == "+":
                end += 2
            parts = (result, *children[position + 1 : end : 2])
            result = Nary("+", parts, span=result.span.to(parts[-1].span))
            position = end
        else:
            right = children[position + 1]
            result = Binary(op, result, right, span=result.span.to(right.span))
            position += 2
    return result


def nary(op: str, args: list[Any]) -> Nary:
    return Nary(op, tuple(args), span=args[0].span.to(args[-1].span))


class Build(Transformer[Token, Any]):
    """Children in, node out. Only tokens that the grammar names are among the children."""

    def module(self, items: list[Any]) -> Module:
        return Module(tuple(items), source=place.get()[0])

    def definition(self, children: list[Any]) -> Definition:
        word, name, params, body = children
        return Definition(
            str(word), str(name), params, body, span=around(word, body), name_span=span_of(name)
        )

    def attention(self, children: list[Any]) -> AttentionDef:
        word, name, params, *clauses, end = children
        return AttentionDef(
            str(name), params, tuple(clauses), span=around(word, end), name_span=span_of(name)
        )

    def combination(self, children: list[Any]) -> AttentionDef:
        word, name, params, *block, value = children
        clauses = tuple(block[:-1])
        for clause in clauses:
            if not isinstance(clause, Inputs):
                said = clause.word if isinstance(clause, Clause) else "heads"
                help = f"`{said}` goes into the attentions that are added"
                raise fail("a sum has no clauses but `inputs`", clause.span, help)
        return AttentionDef(
            str(name), params, clauses, sum=value, span=around(word, value), name_span=span_of(name)
        )

    def stack(self, children: list[Any]) -> StackDef:
        word, name, params, *stages, end = children
        return StackDef(str(name), params, tuple(stages), span=around(word, end), name_span=span_of(name))

    def stage(self, children: list[Any]) -> Stage:
        name, *rest = children
        stages = tuple(part for part in rest if isinstance(part, Stage))
        args = tuple(part for part in rest if isinstance(part, Argument))
        return Stage(name_of(name), args, stages or None, span=around(name, children[-1]))

    def assertion(self, children: list[Any]) -> Assert:
        return Assert(children[1], span=around(*children))

    def use(self, children: list[Any]) -> Use:
        return Use(children[1][1:-1], span=around(*children))

    def params(self, children: list[Any]) -> tuple[Param, ...]:
        return tuple(children)

    def param(self, children: list[Any]) -> Param:
        return Param(
            str(children[0]),
            children[1] if len(children) > 1 else None,
            span=around(children[0], children[-1]),
        )

    def clause(self, children: list[Any]) -> Clause:
        return Clause(str(children[0]), children[1], span=around(*children))

    def inputs(self, children: list[Any]) -> Inputs:
        return Inputs(tuple(children[1:]), span=around(children[0], children[-1]))

    def heads(self, children: list[Any]) -> Heads:
        return Heads(tuple(children[1:]), span=around(children[0], children[-1]))

    def keys(self, children: list[Any]) -> Keys:
        return Keys(tuple(children[1::2]), span=around(children[0], children[-1]))

    def input(self, children: list[Any]) -> InputDecl:
        name, dtype, *sizes, end = children
        if dtype not in DTYPES:
            known = habits.TYPES.get(dtype)
            help = f"write `{known}`" if known else "an input is `int`, `bool` or `float`"
            raise fail(f"unknown type `{dtype}`", span_of(dtype), help)
        return InputDecl(str(name), str(dtype), tuple(sizes), span=around(name, end))

    def group(self, children: list[Any]) -> HeadClauses:
        which, *clauses, end = children
        return HeadClauses(
            None if isinstance(which, Token) else which, tuple(clauses), span=around(which, end)
        )

    def or_(self, args: list[Any]) -> Nary:
        return nary("or", args)

    def and_(self, args: list[Any]) -> Nary:
        return nary("and", args)

    def union(self, args: list[Any]) -> Nary:
        return nary("|", args)

    def intersection(self, args: list[Any]) -> Nary:
        return nary("&", args)

    def compare(self, children: list[Any]) -> Compare:
        return Compare(
            tuple(map(str, children[1::2])),
            tuple(children[::2]),
            span=children[0].span.to(children[-1].span),
        )

    def range(self, children: list[Any]) -> Range:
        lo, hi = children
        return Range(lo, hi, span=lo.span.to(hi.span))

    def sum(self, children: list[Any]) -> Expression:
        return fold(children)

    def product(self, children: list[Any]) -> Expression:
        return fold(children)

    def power(self, children: list[Any]) -> Expression:
        return fold(children)

    def unary(self, children: list[Any]) -> Unary:
        op, arg = children
        return Unary(str(op), arg, span=around(op, arg))

    def call(self, children: list[Any]) -> Call:
        func, *args, end = children
        return Call(func, tuple(args), span=around(func, end))

    def index(self, children: list[Any]) -> Index:
        base, *indices, end = children
        return Index(base, tuple(indices), span=around(base, end))

    def argument(self, children: list[Any]) -> Argument:
        value = children[-1]
        if len(children) == 1:
            return Argument("", value, span=value.span)
        return Argument(str(children[0]), value, span=around(children[0], value))

    def name(self, children: list[Any]) -> Name:
        return name_of(children[0])

    def integer(self, children: list[Any]) -> Number:
        digits = children[0].lstrip("0") or "0"
        if len(digits) > len(str(INTEGER_LIMIT)) or int(digits) > INTEGER_LIMIT:
            raise fail(f"integer beyond 64 bits, the limit is {INTEGER_LIMIT}", span_of(children[0]))
        return Number(int(digits), span=span_of(children[0]))

    def real(self, children: list[Any]) -> Number:
        return finite(float(children[0]), children[0])

    def percent(self, children: list[Any]) -> Number:
        return finite(float(children[0][:-1] + "e-2"), children[0], percent=True)

    def string(self, children: list[Any]) -> Text:
        return Text(children[0][1:-1], span=span_of(children[0]))

    def parenthesised(self, children: list[Any]) -> Expression:
        start, inner, end = children
        return with_span(inner, around(start, end))

    def absolute(self, children: list[Any]) -> Abs:
        start, inner, end = children
        return Abs(inner, span=around(start, end))

    def set_list(self, children: list[Any]) -> SetList:
        return SetList(tuple(children[1:-1]), span=around(children[0], children[-1]))

    def builder(self, children: list[Any]) -> Builder:
        start, *binders, pred, end = children
        return Builder(tuple(binders), pred, span=around(start, end))

    def binder(self, children: list[Any]) -> tuple[Name, ...]:
        return tuple(map(name_of, children))


def finite(value: float, token: Token, percent: bool = False) -> Number:
    if value == float("inf"):
        raise fail("number too large for a real, the limit is 1.8e308", span_of(token))
    return Number(value, percent, span=span_of(token))


def with_span(node: Expression, span: Span) -> Expression:
    """The same node where it stands with its parentheses, so that a larger span never cuts one off."""
    values = {key: value for key, value in vars(node).items() if key != "span"}
    return type(node)(**values, span=span)
