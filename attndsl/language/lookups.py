"""Where a look-up is written that left its table, and what would have guarded it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import AttnError, Diagnostic, Span, quantity
from attndsl.expr import Table
from attndsl.language.mistakes import quoted
from attndsl.syntax import nodes as ast
from attndsl.syntax import parse_partial

LEFT = re.compile(r"`(.+)` has [\d,]+ entr(?:y|ies) on axis \d+, but entry (-?\d+) is read")
OPPOSITE = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}


@contextmanager
def placed(attention: Attention, heads: int) -> Iterator[None]:
    """A look-up that leaves a table is told where it is written in the program that the attention is of."""
    try:
        yield
    except AttnError as error:
        told = (told_at_its_place(d, attention.written, heads) for d in error.diagnostics)
        raise AttnError(*told) from None


def told_at_its_place(told: Diagnostic, written: Span | None, heads: int) -> Diagnostic:
    if told.span is not None or written is None or not LEFT.match(told.message):
        return told
    module, _ = parse_partial(written.source)
    own = [item for item in module.items if item.span == written]
    return _by_head(at_lookup(at_lookup(told, own), module.items), heads)


def _by_head(told: Diagnostic, heads: int) -> Diagnostic:
    """A list that is shorter than there are heads, where it is looked up at the head itself."""
    if told.span is None or not told.span.text.endswith("[h]"):
        return told
    name = told.span.text.removesuffix("[h]")
    has, _, _ = told.message.partition(" on axis")
    many = has.split()[-2].replace(",", "")
    help = f"give one for each head, or repeat them: `{name}[h mod {many}]`"
    return replace(told, message=f"{has} for {heads} heads", help=help)


def beyond_heads(attention: Attention, heads: int) -> Iterator[str]:
    """Of lists and tables whose length the text says and that are read by the head: what is said of those
    with entries that no head reads."""
    told: set[Table] = set()
    for group in attention.groups:
        read = (group.relation.mask, group.relation.count, group.score, group.decay, group.norm.sink)
        for node in (node for e in read if e is not None for node in ir.nodes(e) if node.op == "lookup"):
            table = node.value
            assert isinstance(table, Table)
            for index, size in zip(node.args, table.dims, strict=False):
                by_head = "h" in index.free and index.free <= {"h", "H"} and not index.tables
                if table in told or not isinstance(size, int) or not by_head:
                    continue
                at = ({"h": ir.const(h), "H": ir.const(heads)} for h in range(heads))
                entries = [ir.number(ir.substitute(index, each)) for each in at]
                if all(isinstance(entry, int) and entry < size - 1 for entry in entries):
                    told.add(table)
                    last = max(entry for entry in entries if entry is not None)
                    yield (
                        f"`{table.name}` has {size} entries, and those behind entry {last} are read by none "
                        f"of {quantity(heads, 'head')}"
                    )


def at_lookup(told: Diagnostic, parts: Sequence[ast.Node]) -> Diagnostic:
    """What is told of a look-up that leaves a table, at the one in these parts that may. A list is called
    by the name that it has there."""
    found = LEFT.match(told.message)
    if told.span is not None or found is None:
        return told
    for node, parents in lookups_of(found[1], parts):
        message = told.message
        if found[1].startswith("[") and isinstance(node.base, ast.Name):
            message = f"`{node.base.id}`{message.removeprefix(f'`{found[1]}`')}"
        return replace(told, message=message, span=node.span, help=_guarded(node, parents) or told.help)
    return told


def lookups_of(table: str, parts: Sequence[ast.Node]) -> Iterator[tuple[ast.Index, tuple[ast.Node, ...]]]:
    """Where it is looked up in these parts, at what is no position itself if there is such a place, each
    with what it stands in."""
    names = _names(table, parts)
    found = [
        (node, parents)
        for part in parts
        for node, parents in _below(part, ())
        if isinstance(node, ast.Index) and _called(node.base) in names
    ]
    # at a position itself nothing can be outside of a table of positions
    moved = [one for one in found if not all(isinstance(i, ast.Name) for i in one[0].indices)]
    yield from moved or found


def _names(table: str, parts: Sequence[ast.Node]) -> set[str]:
    """What a table is called in these parts: its own name, and parameters that it is given to; a list that
    none of them writes came from Python, and may be any parameter that is a list."""
    nodes = list(ast.walk(tuple(parts)))
    definitions = {node.name: node for node in nodes if isinstance(node, ast.Definition | ast.AttentionDef)}
    names = {table}
    while True:
        more = {param.name for param in _params(nodes) if param.default and _called(param.default) in names}
        more |= {
            x.name for x in definitions.values() if isinstance(x, ast.Definition) and _called(x.body) in names
        }
        for call in nodes:
            if isinstance(call, ast.Call) and (called := definitions.get(quoted(call.func))):
                params = [param.name for param in called.params]
                for position, arg in enumerate(call.args[: len(params)]):
                    if _called(arg.value) in names:
                        more.add(arg.name or params[position])
        if more <= names:
            break
        names |= more
    if names == {table} and table.startswith("["):
        names |= {param.name for param in _params(nodes) if isinstance(param.default, ast.SetList)}
    return names


def _called(e: ast.Expression) -> str:
    """The name of the table that it is: of a list, as `Table.listed` has it."""
    if not isinstance(e, ast.SetList):
        return quoted(e)
    entries = [quoted(item) for item in e.items]
    return f"[{', '.join([*entries[:4], *['...'] * (len(entries) > 4)])}]"


def _params(nodes: Iterable[ast.Node]) -> Iterator[ast.Param]:
    return (node for node in nodes if isinstance(node, ast.Param))


def _below(node: ast.Node, parents: tuple[ast.Node, ...]) -> Iterator[tuple[ast.Node, tuple[ast.Node, ...]]]:
    yield node, parents
    for child in ast.children(node):
        yield from _below(child, (*parents, node))


def _guarded(node: ast.Node, parents: tuple[ast.Node, ...]) -> str:
    """How a condition left of it in an `or`, which guards nothing, is made one that does."""
    for parent, inside in zip(reversed(parents), reversed((*parents[1:], node)), strict=True):
        if not (isinstance(parent, ast.Nary) and parent.op == "or") or parent.args[0] is inside:
            continue
        before = parent.args[[arg is inside for arg in parent.args].index(True) - 1]
        if isinstance(before, ast.Compare) and len(before.ops) == 1 and before.ops[0] in OPPOSITE:
            left, right = map(quoted, before.args)
            guard = f"{left} {OPPOSITE[before.ops[0]]} {right}"
            return f"`or` guards nothing: write `{quoted(before)} or {guard} and {quoted(inside)}`"  # type: ignore[arg-type]
    return ""
