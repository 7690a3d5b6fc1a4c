"""Which nodes an expression may have: what the elaborator promises, and every evaluator relies on."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any

from attndsl.expr import VECTORS, Expr, IntSet, Table, nodes


@dataclass(frozen=True)
class Rule:
    """args    types of the arguments; `number` is int or real
    result  a type; `joint` is real if a number among the arguments is, else int; `own` is what `value` says
    value   of which class
    more    the type of any further arguments
    """

    args: tuple[str, ...]
    result: str
    value: type | tuple[type, ...] = NoneType
    more: str = ""


NUMBER, NUMBERS = ("number",), ("number", "number")
LEGAL = {
    "const": Rule((), "own", (bool, int, float)),
    # int: q k n b h H D nq and bound variables; real: s; vec: Q K
    "var": Rule((), "own", str),
    # all axes indexed: an entry; with the last axis `D` left: a vector
    "lookup": Rule((), "own", Table, more="int"),
    # along the last axis, how many entries equal this one, and its rank among them
    "count_of": Rule(("int",), "int", Table, more="int"),
    "rank_of": Rule(("int",), "int", Table, more="int"),
    # e, i, ...: some entry along the last axis, which is not indexed, equals e
    "intable": Rule(("int",), "bool", Table, more="int"),
    "inset": Rule(("int",), "bool", IntSet),
    # q, k, n, seed, of; the value is (r, row, col): k is one of r distinct keys drawn among the keys `col` in
    # 0..n-1 for which `of` holds at row = q; row and col are bound in `of`
    "random": Rule(("int", "int", "int", "int", "bool"), "bool", tuple),
    # lo, hi, body; the value is a variable m: some m in lo..hi-1 satisfies the body
    "exists": Rule(("int", "int", "bool"), "bool", str),
    "add": Rule(NUMBERS, "joint", more="number"),
    "mul": Rule(NUMBERS, "joint"),
    "floordiv": Rule(NUMBERS, "joint"),
    "mod": Rule(NUMBERS, "joint"),
    "min": Rule(NUMBERS, "joint"),
    "max": Rule(NUMBERS, "joint"),
    "abs": Rule(NUMBER, "joint"),
    "div": Rule(NUMBERS, "real"),
    # of integers an integer, where the exponent is proved not to be negative
    "pow": Rule(NUMBERS, "own"),
    "where": Rule(("bool", *NUMBERS), "joint"),
    # of an integer rounded down
    "log2": Rule(NUMBER, "joint"),
    "isqrt": Rule(("int",), "int"),
    "floor": Rule(("real",), "int"),
    **dict.fromkeys(("exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos"), Rule(NUMBER, "real")),
    "inner": Rule(("vec", "vec"), "real"),
    "and": Rule(("bool", "bool"), "bool", more="bool"),
    "or": Rule(("bool", "bool"), "bool", more="bool"),
    "not": Rule(("bool",), "bool"),
    "le": Rule(NUMBERS, "bool"),
    "lt": Rule(NUMBERS, "bool"),
    "eq": Rule(NUMBERS, "bool"),
}
"""By op."""


def flaws(root: Expr) -> list[str]:
    """What is not legal in an expression."""
    return [f"{node}: {flaw}" for node in nodes(root) for flaw in [_flaw(node)] if flaw]


def _flaw(e: Expr) -> str:
    rule = LEGAL.get(e.op)
    if rule is None:
        return f"no such op: {e.op}"
    if not isinstance(e.value, rule.value):
        return f"its value is {e.value!r}"
    types = [arg.type for arg in e.args]
    wanted = [*rule.args, *[rule.more] * (len(types) - len(rule.args))]
    if len(types) != len(wanted) or not all(map(_fits, types, wanted)):
        return f"its arguments are {types}"
    if isinstance(e.value, Table):
        indices = len(e.args) - (e.op == "intable")
        left = len(e.value.dims) - indices
        if left != (e.op == "intable" or e.type == "vec") or (e.type == "vec" and e.value.dims[-1] != "D"):
            return f"{indices} indices of {e.value.dims}"
    result = {"own": _own(e), "joint": "real" if "real" in types else "int"}.get(rule.result, rule.result)
    return "" if e.type in result.split() else f"its type is {e.type}"


def _fits(given: str, wanted: str) -> bool:
    return given == wanted or (wanted == "number" and given in ("int", "real"))


def _own(e: Expr) -> str:
    value: Any = e.value
    if e.op == "const":
        return {bool: "bool", int: "int"}.get(type(value), "real")
    if e.op == "var":
        return "vec" if value in VECTORS else "real" if value == "s" else "int"
    if e.op == "pow":
        return "real" if "real" in (arg.type for arg in e.args) else "int real"
    if isinstance(value, Table):
        return "vec" if len(e.args) < len(value.dims) else {"float": "real"}.get(value.dtype, value.dtype)
    return e.type
