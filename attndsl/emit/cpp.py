"""The spelling of C++ with vectors of pairs: `vec` of reals, `whole` of integers, `ivec` of truths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import cast

from attndsl.emit.code import Target
from attndsl.emit.leaves import Leaf, leaf_of
from attndsl.expr import Expr, IntSet

INDEX = {"number": "", "query": ", row", "key": ", key", "distance": ", row, key"}
"""What entries of leaves are chosen by."""
TYPES = {"real": "vec", "int": "whole", "bool": "ivec"}
Spelling = Callable[[Expr, list[str]], str]


def _joined(sign: str) -> Spelling:
    return lambda e, args: f"({f' {sign} '.join(args)})"


def _called(name: str) -> Spelling:
    return lambda e, args: f"{name}({', '.join(args)})"


def _compared(sign: str) -> Spelling:
    return lambda e, args: f"truth({args[0]} {sign} {args[1]})"


def _const(e: Expr, args: list[str]) -> str:
    if e.type == "bool":
        return "truths(true)" if e.value else "truths(false)"
    if e.type == "int":
        return f"wholes({e.value})"
    value = cast(float, e.value)
    return f"all((real){value.hex()})" if math.isfinite(value) else f"all({'-' if value < 0 else ''}INFINITY)"


def _inset(e: Expr, args: list[str]) -> str:
    parts = [f"((wholes({low}) <= {args[0]}) & ({args[0]} <= wholes({high})))"
             for low, high in cast(IntSet, e.value).intervals]  # fmt: skip
    return f"truth({' | '.join(parts)})"


def _pow(e: Expr, args: list[str]) -> str:
    if e.type == "int":
        return f"power({', '.join(args)})"
    if e.args[1].op == "const" and e.args[1].value == 2:
        return f"({args[0]} * {args[0]})"
    return f"powv({', '.join(args)})"


def spelling(places: Mapping[Leaf, int]) -> Target:
    """Of code that reads these leaves, by number."""

    def read(e: Expr, args: list[str]) -> str:
        found = leaf_of(e)
        place = places[found]
        if found.kind == "table":
            where, *indices = args
            return f"{e.type}_of_table(at, {place}, row, key, live & {where}, {', '.join(indices)})"
        return f"{e.type}_of_{found.kind}(at, {place}{INDEX[found.kind]})"

    spell: dict[str, Spelling] = {
        "const": _const, "leaf": read, "read": read,
        "entry": lambda e, args: "entry_of_query(row)" if e.value == "query" else "entry_of_key(key)",
        "add": _joined("+"), "mul": _joined("*"), "div": _joined("/"),
        "and": _joined("&"), "or": _joined("|"), "not": lambda e, args: f"~{args[0]}",
        "le": _compared("<="), "lt": _compared("<"), "eq": _compared("=="),
        "where": _called("select"), "min": _called("least"), "max": _called("greatest"),
        "abs": _called("size"), "floordiv": _called("quotient"), "mod": _called("remainder"),
        "floor": _called("rounded"), "isqrt": _called("root"), "inset": _inset, "pow": _pow,
        "log2": lambda e, args: f"{'bits' if e.type == 'int' else 'log2v'}({args[0]})",
        **{name: _called(f"{name}v") for name in ("exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos")},
    }  # fmt: skip
    return Target(
        spell, lambda e, name, text: f"{TYPES[e.type]} {name} = {text};", lambda text: f"reals({text})"
    )


def added(e: Expr, places: Mapping[Leaf, int], names: Mapping[Expr, str], slope: str) -> str:
    """The statement that adds a slope by a node of READS to the gradient of its leaf."""
    found = leaf_of(e)
    if found.kind == "table":
        return f"add_table(at, {places[found]}, {slope}, {', '.join(names[arg] for arg in e.args[1:])});"
    return f"add_{found.kind}(at, {places[found]}{INDEX[found.kind]}, {slope});"
