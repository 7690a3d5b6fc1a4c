"""Sums of attentions: `attention nsa = gate[0] * compressed + gate[1] * selected`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

from attndsl import expr as ir
from attndsl.attention import Attention, Summand
from attndsl.errors import Span, fail
from attndsl.expr import Expr, Given, Table
from attndsl.language.mistakes import expected, number_of
from attndsl.language.values import TOKENS, AttentionOf, K, Num, Q, Scope, Value
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.language.elaborate import Elaborator

GATE = frozenset({"q", "n", "nq", "b", "h", "H", "D"})
"""What a gate may depend on, beside tables."""

Written = tuple[Summand, Span]


def sum_of(el: Elaborator, definition: ast.AttentionDef, env: Scope, inputs: tuple[Table, ...]) -> Attention:
    """The sum that a definition is; `env` holds its parameters and its own inputs.

    Norms may differ: what is added are outputs. Groups of heads may too, as long as some number of heads fits
    all of them.
    """
    assert definition.sum is not None
    if not inputs and (one := _another(el, definition.sum, env)) is not None:
        return replace(one, name=definition.name)
    terms: dict[str, Written] = {}
    for part, span in _terms(el, definition.sum, env.bind(q=Num(Q), k=Num(K)), None):
        name = part.attention.name
        if name in terms:
            known, _ = terms[name]
            if known.attention != part.attention:
                help = f"give one a name of its own: `attention other = {name}(...)`, and add `other`"
                raise fail(f"two parts are named `{name}`", span, help)
            part = Summand(known.attention, ir.add(known.gate, part.gate))
        terms[name] = part, span
    _check_heads(list(terms.values()))
    tables = {table.name: (table, definition.name) for table in inputs}
    for part, span in terms.values():
        first, _ = next(iter(terms.values()))
        if part.attention.offset is not first.attention.offset:
            said = f"`{part.attention.name}` and `{first.attention.name}` have queries at other positions"
            raise fail(said, span, "give all parts the same `offset`")
        gated = sorted((t for t in part.gate.tables if t.origin == Given()), key=lambda table: table.name)
        for table in (*gated, *part.attention.inputs):
            other, where = tables.setdefault(table.name, (table, part.attention.name))
            if other != table:
                raise fail(f"`{table.name}` is another table in `{where}`", span, "rename one")
    for name, (_, span) in terms.items():
        if name in tables:
            raise fail(f"`{name}` is a part and a table", span, "rename one")
    learned: dict[str, Table] = {}
    for part, span in terms.values():
        for table in sorted(part.gate.tables, key=lambda table: table.name):
            if table.parameter and learned.setdefault(table.name, table) != table:
                help = "bind them to different names, or share one through a `let`"
                raise fail(f"two learned parameters are named `{table.name}`", span, help)
    parts = tuple(part for part, _ in terms.values())
    joined = tuple(table for table, _ in tables.values())
    return Attention.of_sum(definition.name, parts, joined, tuple(learned.values()))


def _another(el: Elaborator, e: ast.Expression, env: Scope) -> Attention | None:
    """The attention that `e` names, where it adds and multiplies nothing: then the definition is that, with
    its parameters bound and what it learns its own, under another name."""
    if not isinstance(e, ast.Name | ast.Call) or not _speaks(el, e, env):
        return None
    value = el.value(e, env, TOKENS)
    return value.attention if isinstance(value, AttentionOf) else None


def _terms(el: Elaborator, e: ast.Expression, env: Scope, gate: Expr | None) -> Iterator[Written]:
    """The attentions that `e` adds, each with its gate, a factor of which is `gate`, and where it stands."""
    match e:
        case ast.Nary("+", args):
            for arg in args:
                yield from _terms(el, arg, env, gate)
            return
        case ast.Binary("-", left, right):
            yield from _terms(el, left, env, gate)
            yield from _terms(el, right, env, _times(gate, ir.const(-1.0)))
            return
        case ast.Unary("-", arg):
            yield from _terms(el, arg, env, _times(gate, ir.const(-1.0)))
            return
        case ast.Binary("*", left, right) if _speaks(el, left, env) and _speaks(el, right, env):
            raise fail("attentions are added, and not multiplied with one another", e.span)
        case ast.Binary("*", left, right) if _speaks(el, right, env):
            yield from _terms(el, right, env, _times(gate, _gate(el, left, env)))
            return
        case ast.Binary("*", left, right) if _speaks(el, left, env):
            yield from _terms(el, left, env, _times(gate, _gate(el, right, env)))
            return
        case ast.Binary("/", left, right) if _speaks(el, left, env) and not _speaks(el, right, env):
            share = ir.div(ir.const(1.0), _gate(el, right, env))
            yield from _terms(el, left, env, _times(gate, share))
            return
    value = _named(el, e, env)
    if not isinstance(value, AttentionOf):
        raise expected("an attention", value, e)
    attention = value.attention
    for part in attention.parts or (Summand(attention, ir.const(1.0)),):
        yield Summand(part.attention, _times(gate, part.gate)), e.span


def _named(el: Elaborator, e: ast.Expression, env: Scope) -> Value:
    """An attention that is named without arguments is one part, with one set of parameters, in all sums."""
    if not isinstance(e, ast.Name) or e.id in env.names:
        return el.value(e, env, TOKENS)
    key = ("part", e.id)
    if key not in el.known:
        el.known[key] = el.value(e, env, TOKENS)
    return el.known[key]


def _times(gate: Expr | None, factor: Expr) -> Expr:
    if gate is None or ir.number(gate) == 1:
        return factor
    return gate if ir.number(factor) == 1 else ir.mul(gate, factor)


def _speaks(el: Elaborator, e: ast.Expression, env: Scope) -> bool:
    """Whether an attention is named in it."""
    return any(
        isinstance(env.names.get(name.id), AttentionOf)
        or (name.id not in env.names and isinstance(el.definitions.get(name.id), ast.AttentionDef))
        for name in ast.walk(e)
        if isinstance(name, ast.Name)
    )


def _gate(el: Elaborator, e: ast.Expression, env: Scope) -> Expr:
    gate = number_of(el.no_vector(e, env, TOKENS), e)
    if not gate.free <= GATE:
        named = " and ".join(f"`{name}`" for name in sorted(gate.free - GATE))
        raise fail(f"a gate is a number for each query and head, and may not depend on {named}", e.span)
    return ir.mul(ir.const(1.0), gate) if gate.type == "int" else gate


def _check_heads(terms: list[Written]) -> None:
    """Raises AttnError where no number of heads fits two parts."""
    for (one, _), (other, span) in combinations(terms, 2):
        fewer, more = sorted((one.attention, other.attention), key=lambda part: part.least_heads)
        if fewer.least_heads < more.least_heads and _closed(fewer):
            said = f"`{fewer.name}` has {fewer.least_heads} heads, and `{more.name}` {more.least_heads}"
            help = f"add `else {{ ... }}` to the heads of `{fewer.name}`"
            raise fail(said, span, help)


def _closed(attention: Attention) -> bool:
    """Whether it serves no heads beyond those that it names."""
    beyond = {"h": ir.const(attention.least_heads), "H": ir.const(attention.least_heads + 1)}
    return all(ir.substitute(group.heads, beyond) is ir.FALSE for group in attention.groups)
