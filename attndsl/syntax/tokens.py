"""What the terminals of grammar/attn.lark are to each other."""

from __future__ import annotations

from collections.abc import Sequence

from lark import Token

OPENERS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}
OPERANDS = frozenset(["NAME", "INT", "FLOAT", "PERCENT", "STRING"])
ENDS = OPERANDS | frozenset(OPENERS.values())
"""What an operand ends with."""
STARTS = OPERANDS | frozenset([*OPENERS, "BAR", "MINUS", "TILDE", "NOT"])
"""What an expression begins with."""
LOOSE = frozenset(["_OR", "_AND", "COMPARE", "DOTS", "AMP"])
"""Operators that `|x|` cannot hold without parentheses."""
OPERATORS = LOOSE | frozenset(["BAR", "PLUS", "MINUS", "MULTIPLY", "POW", "CONCAT"])
DEFINITIONS = ("pattern", "score", "let", "attention", "stack", "assert", "use")
DTYPES = ("int", "bool", "float")
CLAUSES = ("inputs", "mask", "score", "decay", "norm", "offset", "heads", "keys", "approx")


def extent(token: Token) -> tuple[int, int]:
    """Where a token stands in the text that was lexed."""
    assert token.start_pos is not None
    assert token.end_pos is not None
    return token.start_pos, token.end_pos


def absolute_bars(tokens: Sequence[Token]) -> tuple[dict[int, bool], int | None]:
    """The bars of absolute values, position -> whether it opens one; and the innermost that is left open.

    A `|` opens one where an operand is due. The inside of `|x|` is a sum, so the next `|` after an operand on
    the same level of brackets closes it.
    """
    bars: dict[int, bool] = {}
    enclosing: list[int | None] = []
    operand_due = True
    for position, token in enumerate(tokens):
        if token.type == "BAR" and operand_due:
            bars[position] = True
            enclosing.append(position)
        elif token.type == "BAR" and enclosing and enclosing[-1] is not None:
            bars[position] = False
            enclosing.pop()
            continue
        elif token.type in OPENERS:
            enclosing.append(None)
        elif token.type in OPENERS.values():
            enclosing.pop()
        operand_due = token.type not in ENDS
    return bars, enclosing[-1] if enclosing else None
