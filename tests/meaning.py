"""The meaning of an attention once more, straight from the syntax tree: relations as dense matrices.

Small and slow, and written from the language's description alone: it shares the parser and the hash of
`random` with attndsl, and nothing else. A pattern is a function of a space, the number of positions in it,
that gives a matrix of multiplicities; a set a function of a space and of integers; a score a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.meaning.links import sample
from attndsl.program import prelude
from attndsl.syntax import nodes as ast

Array = NDArray[Any]
Matrix = Callable[[int], Array]
Members = Callable[[int, Array], Array]
Canvas = Callable[[int, tuple[Array, ...], tuple[Array, ...]], Array]


class AbsentError(Exception):
    """An int table is read outside it."""


@dataclass(frozen=True)
class Table:
    """`vectors`: the last axis is the head dimension."""

    data: Array
    vectors: bool = False


@dataclass(frozen=True, eq=False)
class Vector(np.lib.mixins.NDArrayOperatorsMixin):
    """What numpy does to numbers it does entry by entry, along the last axis."""

    data: Array

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *args: Any) -> Vector:
        return Vector(ufunc(*(x.data if isinstance(x, Vector) else np.asarray(x)[..., None] for x in args)))


@dataclass(frozen=True)
class Kind:
    """A pattern, a set or a pattern of coordinates, with the function that it is."""

    noun: str
    at: Any
    entries: tuple[Any, ...] | None = None
    """Of a list, in their order."""


@dataclass(frozen=True)
class Meaning:
    """Names in sight; `n` is the space's, `tokens` the number of tokens; `learned` by the name bound to."""

    definitions: Mapping[str, ast.Definition | ast.AttentionDef]
    names: Mapping[str, Any]
    tokens: int
    n: int
    learned: Mapping[str, Any] = field(default_factory=dict)

    def bind(self, **names: Any) -> Meaning:
        return replace(self, names={**self.names, **names})

    def __call__(self, e: ast.Expression) -> Any:
        return getattr(self, type(e).__name__.lower())(e)

    def name(self, e: ast.Name) -> Any:
        if e.id in self.names:
            return self.names[e.id]
        return self.n if e.id == "n" else self.apply(e.id, ())

    def apply(self, name: str, args: tuple[ast.Argument, ...], **extra: Any) -> Any:
        if name in self.learned:
            return self.learned[name]
        definition = self.definitions[name]
        params = definition.params
        given = {arg.name or params[i].name: self(arg.value) for i, arg in enumerate(args)}
        sizes = {name: self.names[name] for name in ("nq", "h", "H", "D")}
        inner = replace(self, names=sizes, n=self.tokens)
        for param in params:
            value = given[param.name] if param.name in given else inner(param.default)  # type: ignore[arg-type]
            inner = inner.bind(**{param.name: value})
        return inner.bind(**extra)(definition.body)  # type: ignore[union-attr]

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
        return Kind(
            "set", lambda n, p: combine.reduce(np.broadcast_arrays(*(value.at(n, p) for value in values)))
        )

    def conjunction(self, args: tuple[ast.Expression, ...]) -> Any:
        """What a guard excludes may lie outside a table."""
        result: Any = np.asarray(True)
        for arg in args:
            try:
                result = result & self(arg)
            except AbsentError:
                if np.any(result):
                    raise
        return result

    def binary(self, e: ast.Binary) -> Any:
        a, b = self(e.left), self.as_set(self(e.right))
        if isinstance(a, Table) and isinstance(b, Vector):
            return Vector((a.data * b.data[..., None, :]).sum(-1))
        a = self.as_set(a)
        if isinstance(a, Kind) and e.op == "-":
            if a.noun == "pattern":
                return Kind("pattern", lambda n: a.at(n) * (b.at(n) == 0))
            return Kind("set", lambda n, p: a.at(n, p) & ~b.at(n, p))
        if e.op == "@" and isinstance(a, Vector):
            return (a.data * b.data).sum(-1)
        if e.op == "@":
            return Kind("pattern", lambda n: ((a.at(n) > 0).astype(int) @ (b.at(n) > 0) > 0).astype(int))
        operations: dict[str, Callable[[Any, Any], Any]] = {
            "-": lambda a, b: a - b,
            "*": lambda a, b: a * b,
            "/": lambda a, b: np.true_divide(a, b),
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
        return parts[0] if len(parts) == 1 else np.logical_and.reduce(np.broadcast_arrays(*parts))

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

        entries: list[Any] = []
        for item in e.items:
            entries += (
                range(self(item.lo), self(item.hi) + 1) if isinstance(item, ast.Range) else [self(item)]
            )
        return Kind("set", members, tuple(entries))

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
        if isinstance(base, Kind) and base.noun == "set":
            return look_up(np.array(base.entries), indices)
        if isinstance(base, Kind):
            return look_up(base.at(self.n), indices) > 0
        data: Array = base.data
        if len(indices) == data.ndim:
            return look_up(data, indices)
        if base.vectors:
            return Vector(data[tuple(indices)])
        rows = Table(np.moveaxis(data, -1, 0))
        return Kind("set", lambda n, p: entries(rows.data, indices, p))

    def as_set(self, value: Any) -> Any:
        if isinstance(value, Table):
            return Kind("set", lambda n, p: look_up(value.data, [p]))
        return value

    def learn(self, e: ast.Index, init: float) -> Any:
        """A parameter that no score reads in the end, at its initial value."""
        sizes = [i for i in e.indices if not (isinstance(i, ast.Name) and i.id == "H")]
        vectors = bool(sizes) and isinstance(sizes[-1], ast.Name)
        return Table(np.full([int(self(size)) for size in sizes], init), vectors) if sizes else init

    def call(self, e: ast.Call) -> Any:
        if isinstance(e.func, ast.Index):
            return self.learn(e.func, self(e.args[0].value))
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
                found[np.ix_(members, members)] = self.within_space(args["1"], size)[
                    : len(members), : len(members)
                ]
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
    "where": lambda cond, a, b: _chosen(cond, a, b),
    "sum": lambda x: x.data.sum(-1),
    "concat": lambda *args: _joined(
        [x.data if isinstance(x, Vector) else np.asarray(x)[..., None] for x in args]
    ),
    "isqrt": np.vectorize(math.isqrt, otypes=[int]),
    "log2": np.vectorize(lambda x: int(x).bit_length() - 1, otypes=[int]),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    **{name: getattr(np, name) for name in ("exp", "log", "tanh", "sin", "cos")},
    "floor": lambda x: np.floor(x).astype(int),
    "sqrt": np.sqrt,
}


def _reduce(join: Callable[[Any, Any], Any], args: tuple[Any, ...]) -> Any:
    result = args[0]
    for arg in args[1:]:
        result = join(result, arg)
    return result


def _chosen(cond: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Kind) and a.noun == "pattern":
        return Kind("pattern", lambda n: np.where(cond, a.at(n), b.at(n)))
    if isinstance(a, Kind) or isinstance(b, Kind):
        one, other = (
            Kind("set", lambda n, p, x=x: look_up(x.data, [p])) if isinstance(x, Table) else x for x in (a, b)
        )
        return Kind("set", lambda n, p: np.where(cond, one.at(n, p), other.at(n, p)))
    if not any(isinstance(x, Vector) for x in (cond, a, b)):
        return np.where(cond, a, b)
    return Vector(
        np.where(*(x.data if isinstance(x, Vector) else np.asarray(x)[..., None] for x in (cond, a, b)))
    )


def _joined(parts: list[Array]) -> Vector:
    lead = np.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return Vector(np.concatenate([np.broadcast_to(x, (*lead, x.shape[-1])) for x in parts], -1))


def look_up(data: Array, indices: list[Array]) -> Array:
    """Outside a table of truths or a matrix nothing holds; outside a table of integers is an error."""
    indices = [np.asarray(i) for i in np.broadcast_arrays(*indices)] if indices else []
    inside = np.ones(np.shape(indices[0]) if indices else (), bool)
    for i, size in zip(indices, data.shape, strict=True):
        inside = inside & (i >= 0) & (i < size)
    if data.dtype != bool and not inside.all() and data.dtype.name == "int64" and data.ndim != 2:
        raise AbsentError
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
        raise AbsentError
    return np.any([part[tuple(indices)] == p for part in rows], axis=0)


@dataclass(frozen=True)
class Problem:
    """An attention `main` among definitions, and what it is computed for.

    tables, learned   arrays, and for each name its axes, [B] [H] before the explicit ones
    """

    definitions: Mapping[str, ast.Definition | ast.AttentionDef]
    n: int
    nq: int
    heads: int
    tables: Mapping[str, Array]
    axes: Mapping[str, tuple[str, ...]]
    learned: Mapping[str, Array] = field(default_factory=dict)
    head_dim: int = 0

    @property
    def attention(self) -> ast.AttentionDef:
        definition = self.definitions["main"]
        assert isinstance(definition, ast.AttentionDef)
        return definition

    def at(self, b: int, h: int) -> Meaning:
        """One batch row and head."""

        def here(name: str, data: Array) -> Any:
            axes = self.axes[name]
            part = data[tuple({"B": b, "H": h}[axis] for axis in axes if axis in "BH")]
            return part[()] if part.ndim == 0 else Table(np.asarray(part), axes[-1] == "D")

        names = {"nq": self.nq, "h": h, "H": self.heads, "D": self.head_dim}
        names |= {name: here(name, data) for name, data in self.tables.items()}
        learned = {name: here(name, data) for name, data in self.learned.items()}
        return Meaning({**prelude(), **self.definitions}, names, self.n, self.n, learned)

    def counts(self, meaning: Meaning) -> Array:
        """Multiplicities [n, n]."""
        patterns = [clause.value for clause in self.clauses(meaning) if clause.word == "mask"]
        return np.minimum.reduce([meaning(pattern).at(self.n) for pattern in patterns])

    def clauses(self, meaning: Meaning) -> list[ast.Clause]:
        """Those that the head obeys."""
        found: list[ast.Clause] = []
        for clause in self.attention.clauses:
            if isinstance(clause, ast.Clause):
                found.append(clause)
            elif isinstance(clause, ast.Heads):
                found += next(g.clauses for g in clause.groups if g.which is None or _has(meaning, g.which))
        return found

    def mask(self) -> Array:
        """Multiplicities [B, H, nq, n]; the rows are the last nq positions."""
        batch = max([len(data) for name, data in self.tables.items() if self.axes[name][0] == "B"], default=1)
        found = [
            [self.counts(self.at(b, h))[self.n - self.nq :] for h in range(self.heads)] for b in range(batch)
        ]
        return np.array(found, int).reshape(batch, self.heads, self.nq, self.n)

    def output(self, q: Array, k: Array, v: Array) -> Array:
        """Attention of q [B, H, nq, D], k and v [B, H, n, D]."""
        result = np.zeros((*q.shape[:3], v.shape[3]))
        for b in range(len(q)):
            for h in range(self.heads):
                meaning = self.at(b, h)
                rows = np.concatenate([np.zeros((self.n - self.nq, q.shape[3])), q[b, h]])
                weights = self.weights(meaning, Vector(rows[:, None]), Vector(k[b, h][None]))
                result[b, h] = (weights @ v[b, h])[self.n - self.nq :]
        return result

    def weights(self, meaning: Meaning, queries: Vector, keys: Vector) -> Array:
        """What each value is multiplied with, [n, n]."""
        logit = (queries.data * keys.data).sum(-1) / np.sqrt(self.head_dim)
        factor, norm, sink = self.counts(meaning).astype(float), "softmax", -np.inf
        positions = {"q": np.arange(self.n)[:, None], "k": np.arange(self.n)[None, :]}
        for clause in self.clauses(meaning):
            e = clause.value
            func, args = (e.func, e.args) if isinstance(e, ast.Call) else (e, ())
            name = func.id if isinstance(func, ast.Name) else ""
            if clause.word == "score":
                named = {"s": logit, "Q": queries, "K": keys, **positions}
                inside = meaning.bind(**named)
                scored = (
                    isinstance(meaning.definitions.get(name), ast.Definition) and name not in meaning.learned
                )
                if scored and meaning.definitions[name].word == "score":  # type: ignore[union-attr]
                    logit = inside.apply(name, args, **named)
                else:
                    logit = inside(e)
            elif clause.word == "decay":
                factor = factor * meaning.bind(**positions)(e)
            elif clause.word == "norm":
                norm = name
                for arg in args:
                    sink = meaning(arg.value)
        logit = np.broadcast_to(logit, factor.shape)
        if norm in ("linear", "none"):
            weights = np.where(factor != 0, factor * logit, 0)
            total = weights.sum(1, keepdims=True)
            return (
                weights
                if norm == "none"
                else np.where(total == 0, 0, weights) / np.where(total == 0, 1, total)
            )
        if norm != "softmax":
            gain = 1 / (1 + np.exp(-logit)) if norm == "sigmoid" else np.maximum(logit, 0)
            return np.where(factor != 0, factor * gain, 0)
        weights = np.where(factor != 0, factor * np.exp(np.where(factor != 0, logit, 0)), 0)
        total = weights.sum(1, keepdims=True) + np.exp(sink)
        return weights / np.where(total > 0, total, 1)


def _has(meaning: Meaning, which: ast.Expression) -> bool:
    value, h = meaning(which), meaning.names["h"]
    return bool(value.at(0, np.asarray(h))) if isinstance(value, Kind) else value == h
