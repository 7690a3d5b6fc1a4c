"""The meaning of a mask once more, straight from the syntax tree: relations as dense matrices.

Small and slow, and written from the language's description alone: it shares the parser and the hash of
`random` with attndsl, and nothing else. A pattern is a function of a space, the number of positions in it,
that gives a matrix of multiplicities; a set a function of a space and of integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.links import sample
from attndsl.program import prelude
from attndsl.syntax import nodes as ast

Array = NDArray[Any]
Matrix = Callable[[int], Array]
Members = Callable[[int, Array], Array]
Canvas = Callable[[int, tuple[Array, ...], tuple[Array, ...]], Array]


class Absent(Exception):
    """An int table is read outside it."""


@dataclass(frozen=True)
class Table:
    data: Array


@dataclass(frozen=True)
class Kind:
    """A pattern, a set or a pattern of coordinates, with the function that it is."""

    noun: str
    at: Any


@dataclass(frozen=True)
class Meaning:
    """Names in sight; `n` is the space's, `tokens` the number of tokens."""

    definitions: Mapping[str, ast.Definition | ast.AttentionDef]
    names: Mapping[str, Any]
    tokens: int
    n: int

    def bind(self, **names: Any) -> Meaning:
        return replace(self, names={**self.names, **names})

    def __call__(self, e: ast.Expression) -> Any:
        return getattr(self, type(e).__name__.lower())(e)

    def name(self, e: ast.Name) -> Any:
        if e.id in self.names:
            return self.names[e.id]
        return self.n if e.id == "n" else self.apply(e.id, ())

    def apply(self, name: str, args: tuple[ast.Argument, ...]) -> Any:
        definition = self.definitions[name]
        params = definition.params
        given = {arg.name or params[i].name: self(arg.value) for i, arg in enumerate(args)}
        sizes = {name: self.names[name] for name in ("nq", "h", "H")}
        inner = Meaning(self.definitions, sizes, self.tokens, self.tokens)
        for param in params:
            value = given[param.name] if param.name in given else inner(param.default)  # type: ignore[arg-type]
            inner = inner.bind(**{param.name: value})
        return inner(definition.body)  # type: ignore[union-attr]

    def number(self, e: ast.Number) -> Any:
        return e.value

    def abs(self, e: ast.Abs) -> Any:
        return np.abs(self(e.arg))

    def unary(self, e: ast.Unary) -> Any:
        value = self.as_set(self(e.arg))
        if e.op == "-":
            return -value
        if e.op == "not":
            return np.logical_not(value)
        if value.noun == "pattern":
            return Kind("pattern", lambda n: (value.at(n) == 0).astype(int))
        return Kind("set", lambda n, p: ~value.at(n, p))

    def nary(self, e: ast.Nary) -> Any:
        if e.op == "and":
            return self.conjunction(e.args)
        values = [self.as_set(self(arg)) for arg in e.args]
        if e.op == "or":
            return np.logical_or.reduce(np.broadcast_arrays(*values))
        if not isinstance(values[0], Kind):
            return sum(values[1:], start=values[0])
        if values[0].noun == "pattern":
            join = {"|": np.maximum, "&": np.minimum, "+": np.add}[e.op]
            return Kind("pattern", lambda n: join.reduce([value.at(n) for value in values]))
        combine = np.logical_or if e.op == "|" else np.logical_and
        return Kind("set", lambda n, p: combine.reduce(np.broadcast_arrays(*(value.at(n, p) for value in values))))

    def conjunction(self, args: tuple[ast.Expression, ...]) -> Any:
        """What a guard excludes may lie outside a table."""
        result: Any = np.asarray(True)
        for arg in args:
            try:
                result = result & self(arg)
            except Absent:
                if np.any(result):
                    raise
        return result

    def binary(self, e: ast.Binary) -> Any:
        a, b = self.as_set(self(e.left)), self.as_set(self(e.right))
        if isinstance(a, Kind) and e.op == "-":
            if a.noun == "pattern":
                return Kind("pattern", lambda n: a.at(n) * (b.at(n) == 0))
            return Kind("set", lambda n, p: a.at(n, p) & ~b.at(n, p))
        if e.op == "@":
            return Kind("pattern", lambda n: ((a.at(n) > 0).astype(int) @ (b.at(n) > 0) > 0).astype(int))
        operations: dict[str, Callable[[Any, Any], Any]] = {
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "//": lambda a, b: a // b,
            "mod": lambda a, b: a % b,
            "**": lambda a, b: a**b,
        }
        return operations[e.op](a, b)

    def compare(self, e: ast.Compare) -> Any:
        operations: dict[str, Callable[[Any, Any], Any]] = {
            "==": lambda a, b: np.equal(a, b),
            "!=": lambda a, b: np.not_equal(a, b),
            "<": lambda a, b: np.less(a, b),
            "<=": lambda a, b: np.less_equal(a, b),
            ">": lambda a, b: np.greater(a, b),
            ">=": lambda a, b: np.greater_equal(a, b),
            "in": lambda a, s: s.at(self.n, np.asarray(a)),
        }
        values = [self.as_set(self(arg)) for arg in e.args]
        parts = [operations[op](a, b) for op, a, b in zip(e.ops, values, values[1:], strict=False)]
        return np.logical_and.reduce(np.broadcast_arrays(*parts))

    def range(self, e: ast.Range) -> Any:
        def members(n: int, p: Array) -> Array:
            here = replace(self, n=n)
            return (here(e.lo) <= p) & (p <= here(e.hi))

        return Kind("set", members)

    def setlist(self, e: ast.SetList) -> Any:
        def members(n: int, p: Array) -> Array:
            here = replace(self, n=n)
            found = np.zeros(p.shape, bool)
            for item in e.items:
                lo, hi = (item.lo, item.hi) if isinstance(item, ast.Range) else (item, item)
                found = found | ((here(lo) <= p) & (p <= here(hi)))
            return found

        return Kind("set", members)

    def builder(self, e: ast.Builder) -> Any:
        names = [[name.id for name in group] for group in e.vars]
        if len(names) == 1:
            return Kind("set", lambda n, p: np.asarray(replace(self, n=n).bind(**{names[0][0]: p})(e.pred)))

        def canvas(n: int, q: tuple[Array, ...], k: tuple[Array, ...]) -> Array:
            bound = dict(zip(names[0] + names[1], (*q, *k), strict=True))
            found = replace(self, n=n).bind(**bound)(e.pred)
            return np.broadcast_to(found, np.broadcast_shapes(q[0].shape, k[0].shape)).astype(int)

        if len(names[0]) > 1:
            return Kind("canvas", canvas)
        return Kind("pattern", lambda n: canvas(n, (np.arange(n)[:, None],), (np.arange(n)[None, :],)))

    def index(self, e: ast.Index) -> Any:
        base, indices = self(e.base), [np.asarray(self(i)) for i in e.indices]
        if isinstance(base, Kind):
            return look_up(base.at(self.n), indices) > 0
        data: Array = base.data
        if len(indices) == data.ndim:
            return look_up(data, indices)
        rows = Table(np.moveaxis(data, -1, 0))
        return Kind("set", lambda n, p: entries(rows.data, indices, p))

    def as_set(self, value: Any) -> Any:
        if isinstance(value, Table):
            return Kind("set", lambda n, p: look_up(value.data, [p]))
        return value

    def call(self, e: ast.Call) -> Any:
        assert isinstance(e.func, ast.Name)
        name = e.func.id
        if name in self.definitions:
            return self.apply(name, e.args)
        values = {arg.name or str(i): arg.value for i, arg in enumerate(e.args)}
        if name in FUNCTIONS:
            return FUNCTIONS[name](*(self(value) for value in values.values()))
        return getattr(self, f"{name}_of")(values)

    def within_space(self, e: ast.Expression, n: int) -> Array:
        """The matrix of a pattern whose text belongs to a space of n positions."""
        return replace(self, n=n)(e).at(n)  # type: ignore[no-any-return]

    def blocks_of(self, args: dict[str, ast.Expression]) -> Kind:
        b = int(self(args["0"]))

        def matrix(n: int) -> Array:
            count = -(-n // b)
            coarse = self.within_space(args["1"], count)
            return np.kron(coarse, np.ones((b, b), int))[:n, :n]

        return Kind("pattern", matrix)

    def within_of(self, args: dict[str, ast.Expression]) -> Kind:
        x = self(args["0"])

        def matrix(n: int) -> Array:
            labels = x.data[:n] if isinstance(x, Table) else np.arange(n) // x
            found = np.zeros((n, n), int)
            for label in np.unique(labels):
                members = np.flatnonzero(labels == label)
                # an inner space may be a part of the tokens alone: ranks count all of the segment
                size = int((x.data == label).sum()) if isinstance(x, Table) else len(members)
                found[np.ix_(members, members)] = self.within_space(args["1"], size)[: len(members), : len(members)]
            return found

        return Kind("pattern", matrix)

    def grid_of(self, args: dict[str, ast.Expression]) -> Kind:
        *shape, body = args.values()
        sizes = [int(self(size)) for size in shape]
        area = math.prod(sizes)

        def matrix(n: int) -> Array:
            inside = np.arange(min(n, area))
            q = tuple(c[:, None] for c in np.unravel_index(inside, sizes))
            k = tuple(c[None, :] for c in np.unravel_index(inside, sizes))
            found = np.zeros((n, n), int)
            found[: len(inside), : len(inside)] = replace(self, n=area)(body).at(area, q, k)
            return found

        return Kind("pattern", matrix)

    def random_of(self, args: dict[str, ast.Expression]) -> Kind:
        r = self(args["0"])

        def matrix(n: int) -> Array:
            seed = replace(self, n=n)(args["seed"]) if "seed" in args else 0
            of = self.within_space(args["of"], n) > 0 if "of" in args else np.ones((n, n), bool)
            found = np.zeros((n, n), int)
            for q in range(n):
                eligible = np.flatnonzero(of[q])
                ranks = sample(np.array([seed]), np.array([q]), np.array([len(eligible)]), r)[0]
                found[q, eligible[ranks[ranks >= 0]]] = 1
            return found

        return Kind("pattern", matrix)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": lambda *args: _reduce(np.minimum, args),
    "max": lambda *args: _reduce(np.maximum, args),
    "where": lambda cond, a, b: np.where(cond, a, b),
    "isqrt": np.vectorize(math.isqrt, otypes=[int]),
    "log2": np.vectorize(lambda x: int(x).bit_length() - 1, otypes=[int]),
    "floor": lambda x: np.floor(x).astype(int),
    "sqrt": np.sqrt,
}


def _reduce(join: Callable[[Any, Any], Any], args: tuple[Any, ...]) -> Any:
    result = args[0]
    for arg in args[1:]:
        result = join(result, arg)
    return result


def look_up(data: Array, indices: list[Array]) -> Array:
    """Outside a table of truths or a matrix nothing holds; outside a table of integers is an error."""
    indices = [np.asarray(i) for i in np.broadcast_arrays(*indices)] if indices else []
    inside = np.ones(np.shape(indices[0]) if indices else (), bool)
    for i, size in zip(indices, data.shape, strict=True):
        inside = inside & (i >= 0) & (i < size)
    if data.dtype != bool and not inside.all() and data.dtype.name == "int64" and data.ndim != 2:
        raise Absent
    if 0 in data.shape:
        return np.zeros(inside.shape, data.dtype)
    found = data[tuple(np.where(inside, i, 0) for i in indices)]
    return np.where(inside, found, np.zeros((), data.dtype))


def entries(rows: Array, indices: list[Array], p: Array) -> Array:
    """Is p a true position, or one of the integers, of the row of a table at `indices`?"""
    if rows.dtype == bool:
        return look_up(np.moveaxis(rows, 0, -1), [*indices, p])
    inside = np.ones((), bool)
    for i, size in zip(indices, rows.shape[1:], strict=True):
        inside = inside & (i >= 0) & (i < size)
    if not np.all(inside):
        raise Absent
    return np.any([part[tuple(indices)] == p for part in rows], axis=0)


def mask(
    items: Mapping[str, ast.Definition | ast.AttentionDef], name: str, n: int, nq: int, heads: int,
    tables: Mapping[str, Array], axes: Mapping[str, tuple[str, ...]],
) -> Array:  # fmt: skip
    """Multiplicities [B, H, nq, n] of the attention `name`, its rows the last nq positions."""
    definitions = {**prelude(), **items}
    attention = definitions[name]
    assert isinstance(attention, ast.AttentionDef)
    batch = max([len(tables[t]) for t in tables if axes[t][0] == "B"], default=1)
    result = np.zeros((batch, heads, nq, n), int)
    for b in range(batch):
        for h in range(heads):
            bound: dict[str, Any] = {"nq": nq, "h": h, "H": heads}
            for table, data in tables.items():
                at = tuple({"B": b, "H": h}[axis] for axis in axes[table] if axis in "BH")
                bound[table] = data[at][()] if data[at].ndim == 0 else Table(np.asarray(data[at]))
            meaning = Meaning(definitions, bound, n, n)
            parts = [meaning(pattern).at(n) for pattern in clauses(attention, meaning, h)]
            result[b, h] = np.minimum.reduce(parts)[n - nq :]
    return result


def clauses(attention: ast.AttentionDef, meaning: Meaning, h: int) -> list[ast.Expression]:
    """The mask clauses that head h obeys."""
    found = []
    for clause in attention.clauses:
        own: tuple[ast.Clause, ...] = (clause,) if isinstance(clause, ast.Clause) else ()
        if isinstance(clause, ast.Heads):
            own = next(g.clauses for g in clause.groups if g.which is None or _has(meaning(g.which), h))
        found += [c.value for c in own if c.word == "mask"]
    return found


def _has(which: Any, h: int) -> bool:
    return bool(which.at(0, np.asarray(h))) if isinstance(which, Kind) else which == h
