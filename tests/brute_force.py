"""Assertions by brute force: dense matrices of meaning.py at one length, number of heads and set of tables.

It shares the parser and the hash of `random` with attndsl, and nothing with what proves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from meaning import Array, Kind, Meaning, Problem

from attndsl.syntax import nodes as ast

COMPARE = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


@dataclass(frozen=True)
class Stated(Meaning):
    """The meaning in an assertion: in an expression, an attention is what some head relates."""

    point: Point | None = None

    def apply(self, name: str, args: tuple[ast.Argument, ...], **extra: Any) -> Any:
        assert self.point is not None
        definition, known = self.definitions[name], self.point.known
        if isinstance(definition, ast.AttentionDef):
            return Kind("pattern", lambda n: np.any(self.point.attention(name), axis=0).astype(int))
        value = super().apply(name, args, **extra)
        if definition.params or not isinstance(value, Kind) or value.noun != "pattern":
            return value

        def matrix(n: int) -> Array:
            key = name, self.names["h"], n
            if key not in known:
                known[key] = value.at(n)
            return known[key]

        return Kind("pattern", matrix)


@dataclass(frozen=True)
class Point:
    """One length, number of heads, and tables with leading axes [H] where `axes` says so."""

    definitions: Mapping[str, ast.Definition | ast.AttentionDef]
    n: int
    heads: int
    tables: Mapping[str, Array]
    axes: Mapping[str, tuple[str, ...]]
    known: dict[Any, Any] = field(default_factory=dict)
    """Matrices of definitions, by name, and of patterns by head and space."""

    def attention(self, name: str) -> list[Array]:
        """The mask of each head."""
        if name not in self.known:
            self.known[name] = self.masks(name)
        return self.known[name]

    def masks(self, name: str) -> list[Array]:
        main = {**self.definitions, "main": self.definitions[name]}
        problem = Problem(main, self.n, self.n, self.heads, self.tables, self.axes)
        return [problem.counts(problem.at(0, h)) > 0 for h in range(self.heads)]

    def relations(self, e: ast.Expression) -> list[Array]:
        """The matrix of each head."""
        if isinstance(e, ast.Name) and isinstance(self.definitions.get(e.id), ast.AttentionDef):
            return self.attention(e.id)
        if called(e) == "reach":
            of, layers = arguments(e)
            step = np.any(self.relations(of), axis=0) if self.heads else np.zeros((self.n, self.n), bool)
            return [power(step | np.eye(self.n, dtype=bool), self.number(layers))] * self.heads
        # as the attention `main` of a program: with its tables, for each head
        problem = Problem(self.definitions, self.n, self.n, self.heads, self.tables, self.axes)
        found = []
        for h in range(self.heads):
            at = problem.at(0, h)
            meaning = Stated(at.definitions, at.names, at.tokens, at.n, at.learned, self)
            found.append(meaning(e).at(self.n) > 0)
        return found

    def number(self, e: ast.Expression) -> Any:
        at = Problem(self.definitions, self.n, self.n, self.heads, {}, {}).at(0, 0)
        return at(e)

    def quantity(self, e: ast.Expression) -> Any:
        """A number at the length and the heads that it names itself."""
        if called(e) not in ("density", "nnz", "diameter"):
            return self.number(e)
        of, n, heads = arguments(e)
        at = replace(self, n=self.number(n), heads=self.number(heads), known={})
        return at.measured(called(e), of)

    def measured(self, kind: str, of: ast.Expression) -> float:
        found = self.relations(of)
        if kind == "diameter":
            step = np.any(found, axis=0) | np.eye(self.n, dtype=bool)
            layers, reached = 0, np.eye(self.n, dtype=bool)
            while (more := product(reached, step)).sum() > reached.sum():
                layers, reached = layers + 1, more
            return layers
        pairs = int(np.sum(found))
        return pairs if kind == "nnz" else pairs / max(1, self.heads * self.n**2)

    def counter_examples(self, e: ast.Expression) -> Array:
        """[H, n, n], or [H, n, 1] of rows without a key."""
        if isinstance(e, ast.Nary):
            return np.logical_or.reduce(
                np.broadcast_arrays(
                    *(self.counter_examples(arg) for arg in e.args), np.zeros((1, self.n, 1), bool)
                )
            )
        if called(e) == "every_row":
            (of,) = arguments(e)
            return np.array([~m.any(1, keepdims=True) for m in self.relations(of)])
        assert isinstance(e, ast.Compare)
        found = np.zeros((self.heads, self.n, self.n), bool)
        for op, left, right in zip(e.ops, e.args, e.args[1:], strict=False):
            a, b = np.array(self.relations(left)), np.array(self.relations(right))
            found |= a & ~b if op == "<=" else a != b
        return found

    def compared(self, e: ast.Compare) -> bool:
        values = [self.quantity(arg) for arg in e.args]
        return all(COMPARE[op](a, b) for op, a, b in zip(e.ops, values, values[1:], strict=False))


def called(e: ast.Expression) -> str:
    return e.func.id if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) else ""


def arguments(e: ast.Expression) -> list[ast.Expression]:
    assert isinstance(e, ast.Call)
    return [arg.value for arg in e.args]


def product(a: Array, b: Array) -> Array:
    return a.astype(np.float32) @ b.astype(np.float32) > 0


def power(step: Array, layers: int) -> Array:
    result = np.eye(len(step), dtype=bool)
    for _ in range(layers):
        result = product(result, step)
    return result
