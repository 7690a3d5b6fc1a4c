"""The syntax tree: what was written, with spans, before names mean anything.

Every node is a frozen value; `span` takes no part in equality, so `parse(format(p)) == p`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from attndsl.errors import Source, Span


@dataclass(frozen=True)
class Node:
    span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Name(Node):
    id: str


@dataclass(frozen=True)
class Number(Node):
    """`12`, `0.5`, or `1%`, whose value is 0.01."""

    value: int | float
    percent: bool = False


@dataclass(frozen=True)
class Text(Node):
    """A string in double quotes."""

    value: str


@dataclass(frozen=True)
class Unary(Node):
    """`-x`, `~x`, `not x`."""

    op: str
    arg: Expression


@dataclass(frozen=True)
class Binary(Node):
    """`- * / // mod @ ** in` and, in combinations of sets and patterns, `-`."""

    op: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Nary(Node):
    """`| & + and or`: flat, because a union of 10,000 parts must not nest."""

    op: str
    args: tuple[Expression, ...]


@dataclass(frozen=True)
class Compare(Node):
    """`a < b <= c`: a chain; `ops[i]` (`== != < <= > >= in`) stands between `args[i]` and `args[i + 1]`."""

    ops: tuple[str, ...]
    args: tuple[Expression, ...]


@dataclass(frozen=True)
class Range(Node):
    """`lo..hi`, both ends included."""

    lo: Expression
    hi: Expression


@dataclass(frozen=True)
class Abs(Node):
    """`|x|`."""

    arg: Expression


@dataclass(frozen=True)
class SetList(Node):
    """`[0, 5..9, n - 1]`; an item is a number or a range."""

    items: tuple[Expression, ...]


@dataclass(frozen=True)
class Argument(Node):
    """One argument of a call; `name` is empty where it is bound by position."""

    name: str
    value: Expression


@dataclass(frozen=True)
class Call(Node):
    func: Expression
    args: tuple[Argument, ...]


@dataclass(frozen=True)
class Index(Node):
    """`base[i, j]`."""

    base: Expression
    indices: tuple[Expression, ...]


@dataclass(frozen=True)
class Builder(Node):
    """`{ p : PRED }` a set, `{ q, k : PRED }` a pattern, `{ (y, x), (v, u) : PRED }` a pattern of a grid.

    `vars` holds one tuple of names per bound position; a bare name is a tuple of one.
    """

    vars: tuple[tuple[Name, ...], ...]
    pred: Expression


Expression = (
    Name | Number | Text | Unary | Binary | Nary | Compare | Range | Abs | SetList | Call | Index | Builder
)


@dataclass(frozen=True)
class Param(Node):
    name: str
    default: Expression | None


@dataclass(frozen=True)
class InputDecl(Node):
    """`doc : int[n]`; `dtype` is one of `int bool float`, `dims` are names or numbers."""

    name: str
    dtype: str
    dims: tuple[Expression, ...]


@dataclass(frozen=True)
class Inputs(Node):
    decls: tuple[InputDecl, ...]


@dataclass(frozen=True)
class Clause(Node):
    """`mask`, `score`, `decay`, `norm`, `offset` or `approx`, each with one expression."""

    word: str
    value: Expression


@dataclass(frozen=True)
class HeadClauses(Node):
    """`0..5 { ... }`; `which` is None for `else`."""

    which: Expression | None
    clauses: tuple[Clause, ...]


@dataclass(frozen=True)
class Heads(Node):
    groups: tuple[HeadClauses, ...]


@dataclass(frozen=True)
class Keys(Node):
    """`keys mem(512) ++ tokens`: the streams, one after the other."""

    streams: tuple[Expression, ...]


@dataclass(frozen=True)
class Definition(Node):
    """`pattern`, `score` or `let`: a name, parameters and one expression. `doc` is its `##` text."""

    word: str
    name: str
    params: tuple[Param, ...]
    body: Expression
    doc: str = ""
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class AttentionDef(Node):
    """`sum` is what stands right of `=`; there are no clauses but `inputs` then."""

    name: str
    params: tuple[Param, ...]
    clauses: tuple[Inputs | Clause | Heads | Keys, ...]
    doc: str = ""
    sum: Expression | None = None
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Stage(Node):
    """`layers(12) { ... }`, `cycle { a  a  b }`, or an attention; without braces `body` is None."""

    name: Name
    args: tuple[Argument, ...] = ()
    body: tuple[Stage, ...] | None = None


@dataclass(frozen=True)
class StackDef(Node):
    """Layers of attentions."""

    name: str
    params: tuple[Param, ...]
    stages: tuple[Stage, ...]
    doc: str = ""
    name_span: Span = field(compare=False, repr=False, kw_only=True)


@dataclass(frozen=True)
class Assert(Node):
    expr: Expression


@dataclass(frozen=True)
class Use(Node):
    path: str


Item = Definition | AttentionDef | StackDef | Assert | Use


@dataclass(frozen=True)
class Module:
    """One parsed text, its items in order; `unread` names definitions that could not be read."""

    items: tuple[Item, ...]
    unread: tuple[str, ...] = ()
    source: Source = field(compare=False, repr=False, kw_only=True)


def walk(node: object) -> Iterator[Node]:
    """Every node below and including this one, or the members of a tuple."""
    if isinstance(node, tuple):
        for part in node:
            yield from walk(part)
    if isinstance(node, Node):
        yield node
        for child in fields(node):
            yield from walk(getattr(node, child.name))


def children(node: Node) -> Iterator[Node]:
    """The nodes straight below, members of tuples too."""
    values = [getattr(node, child.name) for child in reversed(fields(node))]
    while values:
        value = values.pop()
        if isinstance(value, Node):
            yield value
        elif isinstance(value, tuple):
            values.extend(reversed(value))
