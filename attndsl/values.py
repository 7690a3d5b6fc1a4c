"""What an expression of the language can denote, while definitions are being written out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from attndsl import expr as ir
from attndsl.attention import Attention, Relation
from attndsl.expr import Expr, Table


@dataclass(frozen=True)
class Space:
    """Where positions live: `n` is their number, `depth` counts the bound variables in use around it."""

    n: Expr
    depth: int = 0


@dataclass(frozen=True)
class Num:
    expr: Expr
    noun = "a number"


@dataclass(frozen=True)
class Truth:
    expr: Expr
    noun = "a truth"


@dataclass(frozen=True)
class Vec:
    """A vector of head_dim numbers."""

    expr: Expr
    noun = "a vector"


@dataclass(frozen=True, eq=False)
class SetOf:
    """A set of positions: is `e` in it, in a space? Evaluated where it is used."""

    contains: Callable[[Expr, Space], Expr]
    noun = "a set"


@dataclass(frozen=True, eq=False)
class Pattern:
    """A relation: what holds between `q` and `k`, in a space? Evaluated where it is used."""

    at: Callable[[Expr, Expr, Space], Relation]
    noun = "a pattern"


@dataclass(frozen=True, eq=False)
class GridPattern:
    """A relation between coordinates, the argument of `grid`."""

    rank: int
    holds: Callable[[tuple[Expr, ...], tuple[Expr, ...], Space], Expr]
    noun = "a pattern of coordinates"


@dataclass(frozen=True, eq=False)
class TableOf:
    """A table with its first axes indexed."""

    table: Table
    indices: tuple[Expr, ...] = ()

    @property
    def noun(self) -> str:
        left = len(self.table.dims) - len(self.indices)
        return f"a table of {left} ax{'is' if left == 1 else 'es'}"


@dataclass(frozen=True, eq=False)
class AttentionOf:
    attention: Attention
    noun = "an attention"


Value = Num | Truth | Vec | SetOf | Pattern | GridPattern | TableOf | AttentionOf


def multiplicity(r: Relation) -> Expr:
    return ir.where(r.mask, ir.ONE, ir.ZERO) if r.count is None else r.count


def union(relations: list[Relation]) -> Relation:
    """Multiplicities: the largest."""
    mask = ir.any_of(*(r.mask for r in relations))
    if all(r.count is None for r in relations):
        return Relation(mask)
    count = multiplicity(relations[0])
    for r in relations[1:]:
        count = ir.maximum(count, multiplicity(r))
    return Relation(mask, count)


def intersection(relations: list[Relation]) -> Relation:
    """Multiplicities: the smallest."""
    mask = ir.all_of(*(r.mask for r in relations))
    counts = [r.count for r in relations if r.count is not None]
    if len(counts) < len(relations):
        return Relation(mask)
    return Relation(mask, functools.reduce(ir.minimum, counts))


def total(relations: list[Relation]) -> Relation:
    """Multiplicities add: `A + B`."""
    mask = ir.any_of(*(r.mask for r in relations))
    return Relation(mask, ir.add(*(multiplicity(r) for r in relations)))


def restrict(r: Relation, guard: Expr) -> Relation:
    count = None if r.count is None else ir.where(guard, r.count, ir.ZERO)
    return Relation(ir.all_of(guard, r.mask), count)
