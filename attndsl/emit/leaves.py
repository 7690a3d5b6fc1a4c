"""What of an expression is known before its pairs are, and what is left of it for each pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, cast

from attndsl import expr as ir
from attndsl.expr import TRUE, Expr, IntSet, Table
from attndsl.scores import by_distance

Kind: TypeAlias = Literal["number", "query", "key", "distance", "table"]
LITERALS = (-1, 0, 1, 2, 0.5)
"""Constants that stand in the code, which is the same for all others."""
INTERVALS = 16
"""Of a set of integers, written out in the code."""


@dataclass(frozen=True)
class Products:
    """A table of inner products of `vector` with the rows of `table`, its first axis that of what the vector
    is of, if it is of each query or key."""

    vector: Expr
    table: Table
    of: Literal["query", "key", "number"]


@dataclass(frozen=True)
class Leaf:
    """An array that the code reads.

    kind  what it has an entry for: each batch row and head and, but for a number, each query, key or distance
          q - k; or a table, indexed by what each pair says
    of    the expression that it holds, or the table
    """

    kind: Kind
    of: Expr | Table | Products


READS = ("leaf", "read")
"""Nodes that read one, which is their value."""


def leaf_of(e: Expr) -> Leaf:
    """What a node of READS reads."""
    return cast(Leaf, e.value)


def leaves(roots: Iterable[Expr]) -> dict[Leaf, Expr]:
    """All that these read, with the type of an entry told by a node."""
    return {leaf_of(node): node for root in roots for node in ir.nodes(root) if node.op in READS}


def left_over(root: Expr, adjacent: bool) -> Expr | str:
    """The expression over `s` and leaves, or why there is none.

    `leaf` has no arguments. `read` looks a table up: its first argument says where it matters, the others are
    the indices. `entry` is the place of the query or the key. Where a condition leaves a function aside its
    argument is a harmless one, so that no derivative is 0 times infinity.

    adjacent  whether queries stand beside one another, and keys too
    """
    try:
        return _LeftOver(adjacent).of(root, TRUE)
    except _BeyondError as beyond:
        return str(beyond)


class _BeyondError(Exception):
    """Why an expression has no code."""


SAFE = {"exp": 0.0, "log": 1.0, "log2": 1.0, "sqrt": 1.0, "isqrt": 0, "floor": 0.0}
"""Harmless arguments."""
PAIRWISE = frozenset(
    {*SAFE, "tanh", "sigmoid", "sin", "cos"}
    | {"add", "mul", "div", "floordiv", "mod", "min", "max", "abs", "pow", "where", "inset"}
    | {"and", "or", "not", "le", "lt", "eq"}
)
"""What there is code for."""


SIDES = {"query": {"q", *ir.QUERY_VECTORS}, "key": {"k", *ir.KEY_VECTORS}}


class _LeftOver:
    """By node and by the condition under which its value matters."""

    def __init__(self, adjacent: bool) -> None:
        self.adjacent = adjacent
        self.of: Callable[[Expr, Expr], Expr] = cache(self.compute)
        self.kind: Callable[[Expr], Kind | None] = cache(self.classify)

    def classify(self, e: Expr) -> Kind | None:
        if "s" in e.free or e.type in ("vec", "mat", "truths"):
            return None
        queries, keys = (e.free & names for names in SIDES.values())
        if not keys:
            return "query" if queries else "number"
        if not queries:
            return "key"
        vectors = e.free & (ir.QUERY_VECTORS | ir.KEY_VECTORS)
        return "distance" if self.adjacent and not vectors and by_distance(e) is not None else None

    def compute(self, e: Expr, where: Expr) -> Expr:
        if e.op == "const" and e.value in LITERALS:
            return e
        kind = self.kind(e)
        if kind is not None and (where is TRUE or not _fragile(e)):
            return _leaf(kind, e)
        if kind is not None and all(self.kind(part) in ("number", kind) for part in _conjuncts(where)):
            return _leaf(kind, _only_where(where, e))
        if e.op == "var":
            return e
        e = _of_reals(e)
        if e.op == "add":
            parts = self.gathered(e)
            # a sum that no leaf may hold here is one of its terms
            return ir.add(*(self.of(part, where) for part in (e.args if parts == [e] else parts)))
        if e.op == "where":
            cond, a, b = e.args
            a, b = self.of(a, ir.all_of(where, cond)), self.of(b, ir.all_of(where, _not(cond)))
            return ir.where(self.of(cond, where), a, b)
        if e.op in ("and", "or"):
            found, refined = [], where
            for arg in e.args:
                found.append(self.of(arg, refined))
                refined = ir.all_of(refined, arg if e.op == "and" else _not(arg))
            return ir.rebuild(e, tuple(found))
        if e.op == "not":
            return _not(self.of(e.args[0], where))
        if e.op == "lookup" and e.type != "vec":
            return self.read(Leaf("table", cast(Table, e.value)), e, where)
        if e.op == "inner":
            return self.products(e, where)
        if e.op not in PAIRWISE or e.type == "vec":
            raise _BeyondError(f"the score computes `{e.op}` at each pair")
        if e.op == "inset" and len(cast(IntSet, e.value).intervals) > INTERVALS:
            raise _BeyondError("the score compares with a long list at each pair")
        args = [self.of(arg, where) for arg in e.args]
        if where is not TRUE:
            safe = dict.fromkeys(range(len(args)), SAFE.get(e.op))
            if e.type == "real":
                safe |= {"div": {1: 1.0}, "pow": {0: 1.0, 1: 1.0}}.get(e.op, {})
            asked = self.of(where, TRUE)
            args = [arg if (x := safe[i]) is None else _guarded(asked, arg, x) for i, arg in enumerate(args)]
        return ir.rebuild(e, tuple(args))

    def read(self, leaf: Leaf, e: Expr, where: Expr, *first: Expr) -> Expr:
        indices = (self.of(arg, where) for arg in e.args[len(cast(Table, e.value).implicit) :])
        return ir.make(
            "read", (self.of(where, TRUE), *first, *indices), leaf, "real" if e.type == "vec" else e.type
        )

    def products(self, e: Expr, where: Expr) -> Expr:
        for vector, row in (e.args, e.args[::-1]):
            sides = [side for side, names in SIDES.items() if vector.free & names]
            if row.op != "lookup" or len(sides) == len(SIDES):
                continue
            first = [ir.make("entry", (), side, "int") for side in sides]
            of = Products(vector, cast(Table, row.value), cast(Any, sides[0] if sides else "number"))
            return self.read(Leaf("table", of), row, where, *first)
        raise _BeyondError("the score computes `inner` at each pair")

    def gathered(self, e: Expr) -> list[Expr]:
        """The terms of a sum, those together that one leaf can hold."""
        terms: dict[Kind | None, list[Expr]] = {}
        for arg in e.args:
            terms.setdefault(self.kind(arg), []).append(arg)
        others, numbers = terms.pop(None, []), terms.pop("number", [])
        if numbers:
            # beside the first of the others they cost nothing
            terms.setdefault(next(iter(terms), "number"), []).extend(numbers)
        return [*others, *(ir.add(*some) for some in terms.values())]


def _of_reals(e: Expr) -> Expr:
    """With constants beside reals as reals, as `softcap(30)` means `softcap(30.0)`: they have one code."""
    if e.op == "lookup" or "real" not in (e.type, *(arg.type for arg in e.args)):
        return e
    whole = [arg.op == "const" and arg.type == "int" for arg in e.args]
    args = (ir.const(float(cast(int, arg.value))) if w else arg for w, arg in zip(whole, e.args, strict=True))
    return ir.rebuild(e, tuple(args)) if any(whole) else e


def _leaf(kind: Kind, e: Expr) -> Expr:
    return ir.make("leaf", (), Leaf(kind, e), e.type)


def _guarded(where: Expr, e: Expr, safe: float) -> Expr:
    return ir.where(where, e, ir.const(int(safe) if e.type == "int" else safe))


def _fragile(e: Expr) -> bool:
    """Whether it matters where it is not asked for: look-ups fail beyond a table, slopes may be infinite."""
    sloped = bool(e.tables or e.free & (ir.QUERY_VECTORS | ir.KEY_VECTORS))
    steep = {*SAFE, "div", "pow"} if sloped else ()
    return any(node.op in steep or _may_fail(node) for node in ir.nodes(e))


def _may_fail(e: Expr) -> bool:
    table = e.value
    return isinstance(table, Table) and table.dtype != "bool" and len(e.args) > len(table.implicit)


def _conjuncts(where: Expr) -> tuple[Expr, ...]:
    return where.args if where.op == "and" else (where,)


def _only_where(where: Expr, e: Expr) -> Expr:
    if e.type == "bool":
        return ir.all_of(where, e)
    return ir.where(where, e, ir.const(0 if e.type == "int" else 0.0))


def _not(e: Expr) -> Expr:
    """Also of a comparison with NaN, which `<` and `<=` both deny."""
    return ir.negate(e) if e.op in ("const", "not") else ir.make("not", (e,), None, "bool")
