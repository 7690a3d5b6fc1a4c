"""Which nodes an expression may have: what the elaborator promises, and every evaluator relies on."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any

from attndsl.expr import Expr, IntSet, Table, nodes, variable_type


@dataclass(frozen=True)
class Rule:
    """args    types of the arguments; `number` is int or real, `entries` a number or vec, `truth` bool or
            truths
    result  a type; `joint` is vec if an argument is, else real if one is, else int; `each` is joint, but real
            for int; `compared` is truths if an argument has entries, else bool; `own` is what `value` says
    value   of which class
    more    the type of any further arguments
    """

    args: tuple[str, ...]
    result: str
    value: type | tuple[type, ...] = NoneType
    more: str = ""


NUMBERS = ("number", "number")
ENTRY, ENTRIES = ("entries",), ("entries", "entries")
LEGAL = {
    "const": Rule((), "own", (bool, int, float)),
    # int: q k n b h H D nq and bound variables; real: s; vec: Q K, mean(K) and the like
    "var": Rule((), "own", str),
    # all axes indexed: an entry; of a float table with the last left a vector, with the last two a matrix
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
    "add": Rule(ENTRIES, "joint", more="entries"),
    "mul": Rule(ENTRIES, "joint"),
    "floordiv": Rule(NUMBERS, "joint"),
    "mod": Rule(NUMBERS, "joint"),
    "min": Rule(ENTRIES, "joint"),
    "max": Rule(ENTRIES, "joint"),
    "abs": Rule(ENTRY, "joint"),
    "div": Rule(ENTRIES, "each"),
    # of integers an integer, where the exponent is proved not to be negative
    "pow": Rule(ENTRIES, "own"),
    "where": Rule(("truth", *ENTRIES), "joint"),
    # of an integer rounded down
    "log2": Rule(ENTRY, "joint"),
    "isqrt": Rule(("int",), "int"),
    "floor": Rule(("real",), "int"),
    **dict.fromkeys(("exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos"), Rule(ENTRY, "each")),
    "inner": Rule(("vec", "vec"), "real"),
    "matvec": Rule(("mat", "vec"), "vec"),
    "sum": Rule(("vec",), "real"),
    "concat": Rule(("entries",), "vec", more="entries"),
    "and": Rule(("bool", "bool"), "bool", more="bool"),
    "or": Rule(("bool", "bool"), "bool", more="bool"),
    "not": Rule(("truth",), "compared"),
    "le": Rule(ENTRIES, "compared"),
    "lt": Rule(ENTRIES, "compared"),
    "eq": Rule(ENTRIES, "compared"),
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
        if len(e.value.dims) - indices != {"vec": 1, "mat": 2}.get(e.type, e.op == "intable"):
            return f"{indices} indices of {e.value.dims}"
    widths = {arg.width for arg in e.args if arg.width}
    if len(widths) > 1 and e.op != "concat":
        return f"its arguments have {' and '.join(sorted(map(str, widths)))} entries"
    joint = "vec" if "vec" in types or "truths" in types else "real" if "real" in types else "int"
    results = {"own": _own(e), "joint": joint, "each": joint.replace("int", "real")}
    results["compared"] = "truths" if joint == "vec" else "bool"
    result = results.get(rule.result, rule.result)
    return "" if e.type in result.split() else f"its type is {e.type}"


FITTING = {"number": ("int", "real"), "entries": ("int", "real", "vec"), "truth": ("bool", "truths")}


def _fits(given: str, wanted: str) -> bool:
    return given in FITTING.get(wanted, (wanted,))


def _own(e: Expr) -> str:
    value: Any = e.value
    if e.op == "const":
        return {bool: "bool", int: "int"}.get(type(value), "real")
    if e.op == "var":
        return variable_type(value)
    if e.op == "pow":
        types = [arg.type for arg in e.args]
        return "vec" if "vec" in types else "real" if "real" in types else "int real"
    if isinstance(value, Table):
        left = len(value.dims) - len(e.args) if value.dtype == "float" else 0
        return ("vec", "mat")[left - 1] if left else {"float": "real"}.get(value.dtype, value.dtype)
    return e.type
