"""Leaves that choose by content: `topk(...)`, `hash(...)` and those of plugins, as written in a mask."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from attndsl import expr as ir
from attndsl.attention import Relation
from attndsl.errors import AttnError, asking, fail
from attndsl.expr import Argument, Expr, Selected
from attndsl.language.arguments import bind_arguments_of
from attndsl.language.mistakes import expected, number_of, quoted
from attndsl.language.values import K, Num, Pattern, Q, Scope, Space, TableOf, Value, Vec, is_whole
from attndsl.selection import Chunks, First, Selection, listed, ordered, table
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.language.elaborate import Elaborator


def usage(name: str, selection: Selection) -> str:
    """How a leaf is written."""
    written = []
    for parameter in inspect.signature(selection.signature).parameters.values():
        default = parameter.default
        if default is None:
            default = "..."
        elif isinstance(default, bool):
            default = str(default).lower()
        bare = default is inspect.Parameter.empty
        written.append(parameter.name if bare else f"{parameter.name} = {default}")
    written += ["of = full"] * (selection.kind == "list")
    return f"{name}({', '.join(written)})"


def leaf(el: Elaborator, name: str, selection: Selection, e: ast.Call, env: Scope, space: Space) -> Value:
    if env.claims and not env.calls:
        help = "claim it of the pattern or the attention that chooses"
        raise fail(f"a claim is about every choice: it cannot name `{name}`", e.span, help)
    if not env.integral and not env.claims:
        help = f"write `mask {quoted(e)}`"
        raise fail(f"`{name}` chooses keys, and stands in a mask alone", e.span, help)
    parameters = inspect.signature(selection.signature).parameters
    required = tuple(p.name for p in parameters.values() if p.default is inspect.Parameter.empty)
    optional = tuple(p for p in parameters if p not in required) + ("of",) * (selection.kind == "list")
    given = bind_arguments_of(name, required, optional, e, usage(name, selection))
    if selection.kind == "list":
        return _list(el, name, selection, e, given, env, space)
    arguments = _arguments(el, selection, given, env, space, Space(space.n))
    origin = Selected(name, arguments)
    choices = _table(el, origin, selection, e)
    if selection.kind == "labels":
        return TableOf(choices)
    with asking(f"the selection `{name}`"):
        how = selection.relates(origin)
    if not isinstance(how, Chunks | First):
        said = f"`relates` of the selection `{name}` gives {how!r}, not how ranks relate"
        raise fail(said, e.span, help="return `Chunks(...)` or `First(...)` of attndsl.selection")

    def at(q: Expr, k: Expr, sp: Space) -> Relation:
        if (q, k, sp.unit) != (Q, K, 1):
            raise _elsewhere(name, e)
        return ordered(choices, how, q, k, sp.n)

    return el.memoised(at)


def _list(
    el: Elaborator, name: str, selection: Selection, e: ast.Call,
    given: Mapping[str, ast.Expression], env: Scope, space: Space,
) -> Value:  # fmt: skip
    def of_at(sp: Space) -> Pattern:
        if "of" not in given:
            return el.relation(lambda q, k, sp: ir.TRUE)
        return el.pattern(given["of"], env, sp)

    def at(q: Expr, k: Expr, sp: Space) -> Relation:
        if sp.unit is None or (q, k) != (_unit(Q, sp.unit), _unit(K, sp.unit)):
            raise _elsewhere(name, e)
        of, rows, unit, places = of_at(sp), sp.unit, sp.unit, (Q, K)
        candidates = of
        if of.blocks is not None:
            if rows > 1:
                raise fail("the keys inside `blocks` are blocks already", given["of"].span)
            b, candidates = of.blocks
            size = ir.number(b)
            if size is None:
                raise fail("blocks that are chosen have a constant length", given["of"].span)
            unit, places = int(size), (ir.floordiv(Q, b), K)
            inside = replace(sp, n=ir.floordiv(ir.add(sp.n, b, ir.const(-1)), b))
        else:
            inside = sp
        held = candidates.at(*places, replace(inside, unit=None)).mask
        if any(isinstance(t.origin, Selected) for t in held.tables):
            raise fail("keys are chosen among those that positions say, not among chosen ones", e.span)
        arguments = _arguments(el, selection, given, env, space, replace(sp, unit=rows), unit)
        origin = Selected(name, arguments, held, rows, unit)
        choices = _table(el, origin, selection, e)
        key = k if rows > 1 or unit == 1 else ir.floordiv(k, ir.const(unit))
        return listed(choices, q, key, of.at(q, k, replace(sp, unit=None)).mask)

    return el.memoised(at)


def _unit(p: Expr, unit: int) -> Expr:
    return ir.floordiv(p, ir.const(unit))


def _elsewhere(name: str, e: ast.Call) -> AttnError:
    return fail(
        f"`{name}` chooses keys for a query, and may not stand here",
        e.span,
        help="it stands under `|`, `&`, `+`, `where`, left of `-` and inside `blocks`; "
        "not in `~`, right of `-`, in `of =`, `within`, `grid`, `random`, `@` or `R[i, j]`",
    )


def _table(el: Elaborator, origin: Selected, selection: Selection, e: ast.Call) -> ir.Table:
    try:
        with asking(f"the selection `{origin.selection}`"):
            selection.check(origin)
            rounds = selection.rounds(origin)
    except AttnError as error:
        raise AttnError(*(replace(d, span=d.span or e.span) for d in error.diagnostics)) from None
    if not isinstance(rounds, int) or rounds < 1:
        said = f"`rounds` of the selection `{origin.selection}` gives {rounds!r}, not a number from 1 on"
        raise fail(said, e.span)
    earlier = (other for other in el.leaves if other.selection == origin.selection)
    number, _ = el.leaves.setdefault(origin, (sum(1 for _ in earlier), e.span))
    # no text can say this name
    return table(f"{origin.selection}#{number}", origin, selection.kind, rounds)


def _arguments(
    el: Elaborator,
    selection: Selection,
    given: Mapping[str, ast.Expression],
    env: Scope,
    space: Space,
    inside: Space,
    unit: int = 1,
) -> tuple[tuple[str, Argument], ...]:
    found: list[tuple[str, Argument]] = []
    for name, parameter in inspect.signature(selection.signature).parameters.items():
        kind, value = str(parameter.annotation).split(" |")[0], parameter.default
        if name in given:
            value = _argument(el, kind, given[name], env, space, inside, unit)
        elif kind == "Score":
            value = ir.inner(*_vectors(inside, unit))
        found.append((name, value))
    return tuple(found)


def _argument(
    el: Elaborator, kind: str, e: ast.Expression, env: Scope, space: Space, inside: Space, unit: int
) -> Argument:
    if kind == "bool":
        if isinstance(e, ast.Name) and e.id in ("true", "false"):
            return e.id == "true"
        raise fail("this is `true` or `false`", e.span)
    if kind == "str":
        if isinstance(e, ast.Name):
            return e.id
        raise fail("this is a word", e.span)
    if kind == "Table":
        value = el.value(e, env, space)
        if not isinstance(value, TableOf) or not is_whole(value) or value.table.learned:
            raise expected("an input", value, e)
        return value.table
    if kind == "Score":
        return _score(el, e, env, inside, unit)
    return el.constant(e, env, space, "this")


def _vectors(space: Space, unit: int) -> tuple[Expr, Expr]:
    """The vectors of a row and of what it chooses among."""
    row = ir.var("Q") if space.unit == 1 else ir.var("mean(Q)")
    return row, ir.var("K") if unit == 1 else ir.var("mean(K)")


def _score(el: Elaborator, e: ast.Expression, env: Scope, space: Space, unit: int) -> Expr:
    names: dict[str, Value] = {}
    for vector, size in (("Q", space.unit), ("K", unit)):
        if size == 1:
            names[vector] = Vec(ir.var(vector))
        else:
            names |= {f"{mean}({vector})": Vec(ir.var(f"{mean}({vector})")) for mean in ir.AGGREGATES}
    if space.unit == unit == 1:
        names |= {"q": Num(Q), "k": Num(K)}
    scored = replace(env, integral=False, binding="", units=(space.unit or 1, unit)).bind(**names)
    value = el.no_vector(e, scored, Space(space.n))
    help = f"what may be chosen is named: `of = {quoted(e)}`" if isinstance(value, Pattern) else ""
    score = number_of(value, e, help)
    for learned in sorted(t.name for t in score.tables if t.learned):
        raise fail(
            f"`{learned}` is learned, and nothing comes back through a choice: it would never train",
            e.span,
            help="make it an input: `inputs w : float[H, D]`",
        )
    return score
