"""Arguments meet parameters, and the checks that need syntax alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from attndsl.errors import AttnError, Span, fail, suggest
from attndsl.expr import Table
from attndsl.language.values import Scope
from attndsl.language.vocabulary import RESERVED, SIGNATURES
from attndsl.syntax import nodes as ast
from attndsl.syntax.format import render


def bind_arguments(
    definition: ast.Definition | ast.AttentionDef | ast.StackDef, args: tuple[ast.Argument, ...]
) -> dict[str, ast.Expression]:
    """Arguments of a definition, by parameter; those left out are not in it."""
    names = tuple(param.name for param in definition.params)
    return _matched(definition.name, names, args, signature(definition))


def bind_built_in(
    name: str, required: tuple[str, ...], optional: tuple[str, ...], e: ast.Call
) -> dict[str, ast.Expression]:
    return bind_arguments_of(name, required, optional, e, SIGNATURES[name])


def bind_arguments_of(
    name: str, required: tuple[str, ...], optional: tuple[str, ...], e: ast.Call, usage: str
) -> dict[str, ast.Expression]:
    """Arguments of something built in, by parameter; `usage` shows how it is written."""
    bound = _matched(name, (*required, *optional), e.args, usage)
    for key in required:
        if key not in bound:
            raise fail(f"`{name}` needs its argument `{key}`", e.span, f"write `{usage}`")
    return bound


def _matched(
    name: str, names: tuple[str, ...], args: tuple[ast.Argument, ...], usage: str
) -> dict[str, ast.Expression]:
    bound: dict[str, ast.Expression] = {}
    for i, arg in enumerate(args):
        if not arg.name and i >= len(names):
            takes = f"{len(names)} argument{'s' * (len(names) > 1)}, not {len(args)}"
            takes = takes if names else "no arguments"
            if [a.value.span.text for a in args[-2:]] == ["q", "k"]:
                here = name if len(args) == 2 else f"{name}(...)"
                raise fail(f"`{name}` takes {takes}", arg.span, f"look it up at a pair: `{here}[q, k]`")
            raise fail(f"`{name}` takes {takes}", arg.span, f"write `{usage}`")
        key = arg.name or names[i]
        if key not in names:
            help = suggest(key, names) or f"write `{usage}`"
            raise fail(f"`{name}` has no parameter `{key}`", name_span(arg), help)
        if key in bound:
            raise fail(f"`{key}` is given twice", arg.span)
        bound[key] = arg.value
    return bound


def with_usage(error: AttnError, call: Span, args: Iterable[ast.Expression], usage: str) -> AttnError:
    """With `usage`, a help line, where a value of the wrong kind was given that has no other."""
    given = [call, *(arg.span for arg in args)]
    wrong = re.compile(r"(in `\w+`: )?(expected|only tables)")
    return AttnError(
        *(
            replace(d, help=usage) if not d.help and d.span in given and wrong.match(d.message) else d
            for d in error.diagnostics
        )
    )


def name_span(node: ast.Argument | ast.Param | ast.InputDecl) -> Span:
    """Where the name stands that the node begins with."""
    return replace(node.span, end=node.span.start + len(node.name))


def signature(definition: ast.Definition | ast.AttentionDef | ast.StackDef) -> str:
    params = (p.name if p.default is None else f"{p.name} = {render(p.default)}" for p in definition.params)
    return f"{definition.name}({', '.join(params)})" if definition.params else definition.name


def meaning(definition: ast.Definition | ast.AttentionDef) -> str:
    """What a definition says that it is; without a comment, how it is called."""
    said = " ".join((definition.doc or "").split())
    return f"`{signature(definition)}` is {said}" if said else f"write `{signature(definition)}`"


def score_call(
    e: ast.Expression, definitions: Mapping[str, ast.Definition | ast.AttentionDef], env: Scope
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
    if len(e.vars) == 1 and len(e.vars[0]) > 1:
        here = e.vars[0][0].span.to(e.vars[0][-1].span)
        names = ", ".join(name.id for name in e.vars[0])
        help = "write `{ q, k : ... }`" if len(e.vars[0]) == 2 else ""
        raise fail(f"one position, and it has {len(e.vars[0])} coordinates: `({names})`", here, help)
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


AXES = {
    **dict.fromkeys(("b", "batch", "batch_size", "bsz"), ("the batch", "B")),
    **dict.fromkeys(("h", "heads", "num_heads", "n_heads", "nheads"), ("query heads", "H")),
}
"""What others call the axes whose index is never written."""


def input_table(decl: ast.InputDecl) -> Table:
    if decl.dtype not in ("int", "bool", "float"):
        raise fail(f"unknown type `{decl.dtype}`", decl.span, help="a table is int, bool or float")
    dims: list[str | int] = []
    for dim in decl.dims:
        if isinstance(dim, ast.Name):
            if dim.id not in ("B", "H") and (axis := AXES.get(dim.id.lower())):
                raise fail(f"the axis of {axis[0]} is `{axis[1]}`", dim.span, "its index is left out")
            if dim.id in ("B", "H") and (*dims, dim.id) not in (("B",), ("H",), ("B", "H")):
                names = [other.id for other in decl.dims if isinstance(other, ast.Name)]
                first = [axis for axis in "BH" if axis in names]
                rest = [other.span.text for other in decl.dims if other.span.text not in first]
                help = f"write `{decl.name} : {decl.dtype}[{', '.join([*first, *rest])}]`"
                raise fail("the axes `B` and `H` come first, in this order", dim.span, help)
            dims.append(dim.id)
        elif isinstance(dim, ast.Number) and isinstance(dim.value, int) and dim.value > 0:
            dims.append(dim.value)
        else:
            raise fail("a size is a name or a positive integer", dim.span)
    if dims == ["B", 1, "n", "n"]:
        here = decl.dims[1].span
        help = f"leave it out: `{decl.name} : {decl.dtype}[B, n, n]`, and pass `{decl.name}[:, 0]`"
        raise fail("an axis of one entry for all heads", here, help)
    return Table(decl.name, decl.dtype, tuple(dims))  # type: ignore[arg-type]
