"""Expressions of the core as a text of the language."""

from __future__ import annotations

from typing import cast

from attndsl import expr as ir
from attndsl.errors import Source, Span, fail
from attndsl.expr import Expr, IntSet, Table
from attndsl.syntax import nodes as ast
from attndsl.syntax.format import format
from attndsl.syntax.render import render

NOWHERE = Span(Source("", ""), 0, 0)
LONGEST = 20_000
"""Operations of one text; shared ones are written out."""


def attention_text(name: str, tables: tuple[Table, ...], mask: Expr, score: Expr, offset: int | None) -> str:
    """An attention of these clauses, as `attndsl.parse` reads it."""
    clauses = [] if offset is None else [f"offset {offset}"]
    if tables:
        clauses.append(f"inputs {'  '.join(map(str, tables))}")
    if mask is not ir.TRUE:
        clauses.append(f"mask {{ q, k : {written(mask)} }}")
    if score is not ir.var("s"):
        clauses.append(f"score {written(score)}")
    return format(f"attention {name} {{ {'  '.join(clauses)} }}")


def written(e: Expr) -> str:
    """Raises AttnError for what takes a text beyond all measure."""
    size: dict[Expr, int] = {}
    for node in ir.nodes(e):
        size[node] = 1 + sum(size[arg] for arg in node.args)
    if size[e] > LONGEST:
        raise fail(f"written out it has {size[e]:,} operations, and a text has at most {LONGEST:,}")
    nodes: dict[Expr, ast.Expression] = {}
    for node in ir.nodes(e):
        nodes[node] = tree(node, [nodes[arg] for arg in node.args])
    return render(nodes[e])


def number(value: int | float) -> ast.Expression:
    if value < 0:
        return ast.Unary("-", ast.Number(-value, span=NOWHERE), span=NOWHERE)
    return ast.Number(value, span=NOWHERE)


def tree(e: Expr, args: list[ast.Expression]) -> ast.Expression:
    """A node over the trees of its arguments."""
    match e.op:
        case "const" if isinstance(e.value, bool):
            return compare("==", number(0), number(0 if e.value else 1))
        case "const":
            return number(cast(float, e.value))
        case "var":
            return ast.Name(str(e.value), span=NOWHERE)
        case "add":
            return summed(e, args)
        case "and" | "or":
            return ast.Nary(e.op, tuple(args), span=NOWHERE)
        case "mul" if e.args[0].op == "const" and e.args[0].value in (-1, -1.0):
            return ast.Unary("-", args[1], span=NOWHERE)
        case "mul" | "div" | "floordiv" | "mod" | "pow" | "inner":
            return ast.Binary(ir.SYMBOLS[e.op].strip(), args[0], args[1], span=NOWHERE)
        case "not" if e.args[0].op == "eq":
            equal = cast(ast.Compare, args[0])
            return compare("!=", *equal.args)
        case "not":
            return ast.Unary("not", args[0], span=NOWHERE)
        case "le" | "lt" | "eq":
            return compare(ir.SYMBOLS[e.op].strip(), *args)
        case "abs":
            return ast.Abs(args[0], span=NOWHERE)
        case "inset":
            return compare(
                "in", args[0], ast.SetList(tuple(map(item, cast(IntSet, e.value).intervals)), span=NOWHERE)
            )
        case "lookup":
            return looked_up(e, args)
        case "intable":
            return compare("in", args[0], looked_up(e, args[1:]))
        case _:
            return ast.Call(
                ast.Name(e.op, span=NOWHERE),
                tuple([ast.Argument("", arg, span=NOWHERE) for arg in args]),
                span=NOWHERE,
            )


def compare(op: str, *args: ast.Expression) -> ast.Compare:
    return ast.Compare((op,), args, span=NOWHERE)


def item(interval: tuple[int, int]) -> ast.Expression:
    low, high = interval
    return number(low) if low == high else ast.Range(number(low), number(high), span=NOWHERE)


def looked_up(e: Expr, indices: list[ast.Expression]) -> ast.Expression:
    table = cast(Table, e.value)
    explicit = tuple(indices[len(table.implicit) :])
    base = ast.Name(table.name, span=NOWHERE)
    return ast.Index(base, explicit, span=NOWHERE) if explicit else base


def summed(e: Expr, args: list[ast.Expression]) -> ast.Expression:
    """`a - b + c`, what is added first."""
    plus, minus = list[ast.Expression](), list[ast.Expression]()
    for part, text in zip(e.args, args, strict=True):
        if part.op == "const" and cast(float, part.value) < 0:
            minus.append(number(-cast(float, part.value)))
        elif isinstance(text, ast.Unary) and text.op == "-":
            minus.append(text.arg)
        elif part.op in ("mul", "div") and isinstance(text, ast.Binary) and isinstance(text.left, ast.Unary):
            minus.append(ast.Binary(text.op, text.left.arg, text.right, span=NOWHERE))
        else:
            plus.append(text)
    if not plus:
        plus = [ast.Unary("-", minus.pop(0), span=NOWHERE)] if minus else [number(0)]
    found: ast.Expression = plus[0] if len(plus) == 1 else ast.Nary("+", tuple(plus), span=NOWHERE)
    if e.type == "real" and len(e.args) == 1:
        found = ast.Nary("+", (found, number(0.0)), span=NOWHERE)
    for text in minus:
        found = ast.Binary("-", found, text, span=NOWHERE)
    return found
