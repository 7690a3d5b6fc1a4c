"""An expression of the syntax tree back to text."""

from __future__ import annotations

from decimal import Decimal

from attndsl.syntax.nodes import (
    Abs,
    Binary,
    Builder,
    Call,
    Compare,
    Expression,
    Index,
    Name,
    Nary,
    Number,
    Range,
    SetList,
    Text,
    Unary,
)

OR, AND, NOT, COMPARE, RANGE, UNION, INTERSECTION, SUM, PRODUCT, SIGNED, POWER, POSTFIX, ATOM = range(13)
"""The levels of grammar/attn.lark, loosest first."""

LEVEL = {"or": OR, "and": AND, "|": UNION, "&": INTERSECTION, "+": SUM, "-": SUM, "**": POWER}


def render(expression: Expression) -> str:
    """An expression on one line with as few parentheses as the grammar allows: `parse(render(e)) == e`."""
    return write(expression)[0]


def operand(expression: Expression, level: int) -> str:
    text, own = write(expression)
    return text if own >= level else f"({text})"


def listed(expressions: tuple[Expression, ...]) -> str:
    return ", ".join(map(render, expressions))


def write(node: Expression) -> tuple[str, int]:
    """The text of an expression and the level of its outermost operator."""
    match node:
        case Name(id):
            return id, ATOM
        case Number(value, percent):
            digits = f"{Decimal(repr(value)).scaleb(2):f}%" if percent else repr(value)
            return digits, SIGNED if value < 0 else ATOM
        case Text(value):
            return f'"{value}"', ATOM
        case Unary("not", arg):
            return f"not {operand(arg, NOT)}", NOT
        case Unary(op, arg):
            return f"{op}{operand(arg, SIGNED)}", SIGNED
        case Binary("**", left, right):
            return f"{operand(left, POSTFIX)} ** {operand(right, SIGNED)}", POWER
        case Binary(op, left, right):
            level = LEVEL.get(op, PRODUCT)
            return f"{operand(left, level)} {op} {operand(right, level + 1)}", level
        case Nary(op, (first, *rest)):
            level = LEVEL[op]
            # `a - b + c` continues the sum on its left, but `(a + b) + c` is not the flat `a + b + c`.
            start = operand(first, level if op == "+" and isinstance(first, Binary) else level + 1)
            return f" {op} ".join([start, *(operand(arg, level + 1) for arg in rest)]), level
        case Compare(ops, args):
            parts = [operand(arg, COMPARE + 1) for arg in args]
            return parts[0] + "".join(
                f" {op} {part}" for op, part in zip(ops, parts[1:], strict=True)
            ), COMPARE
        case Range(lo, hi):
            return f"{operand(lo, UNION)}..{operand(hi, UNION)}", RANGE
        case Abs(arg):
            return f"|{operand(arg, SUM)}|", ATOM
        case SetList(items):
            return f"[{listed(items)}]", ATOM
        case Call(func, args):
            texts = [f"{arg.name} = {render(arg.value)}" if arg.name else render(arg.value) for arg in args]
            return f"{operand(func, POSTFIX)}({', '.join(texts)})", POSTFIX
        case Index(base, indices):
            return f"{operand(base, POSTFIX)}[{listed(indices)}]", POSTFIX
        case Builder(binders, pred):
            bound = [names[0].id if len(names) == 1 else f"({listed(names)})" for names in binders]
            return f"{{ {', '.join(bound)} : {render(pred)} }}", ATOM
    raise TypeError(node)
