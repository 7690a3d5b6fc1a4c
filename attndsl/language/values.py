"""What an expression of the language can denote, while definitions are being written out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from attndsl import expr as ir
from attndsl.attention import Attention, Relation
from attndsl.errors import fail
from attndsl.expr import Expr, Table
from attndsl.syntax import nodes as ast


@dataclass(frozen=True)
class Space:
    """Where positions live: `n` is their number, `depth` counts the bound variables in use around it.

    unit: how many tokens a position stands for, None where that is not the same for all.
    """

    n: Expr
    depth: int = 0
    unit: int | None = 1


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
    expr: Expr
    noun = "a vector"


@dataclass(frozen=True)
class Truths:
    """What comparing a vector gives, entry by entry."""

    expr: Expr
    noun = "a vector of truths"


@dataclass(frozen=True, eq=False)
class SetOf:
    """A set of positions: is `e` in it, in a space? Evaluated where it is used.

    `listed` gives the entries, in order, of what can be looked up as well: a list.
    """

    contains: Callable[[Expr, Space], Expr]
    listed: Callable[[], Table] | None = None
    noun = "a set"


@dataclass(frozen=True, eq=False)
class Pattern:
    """A relation: what holds between `q` and `k`, in a space? Evaluated where it is used.

    blocks: the length of blocks and the pattern between them, where that is all it says.
    """

    at: Callable[[Expr, Expr, Space], Relation]
    blocks: tuple[Expr, Pattern] | None = None
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
    def left(self) -> int:
        """Axes that are not indexed yet."""
        return len(self.table.explicit) - len(self.indices)

    @property
    def full(self) -> tuple[Expr, ...]:
        """The indices, with those that a text leaves out."""
        return (*self.table.implicit, *self.indices)

    @property
    def noun(self) -> str:
        left = self.left
        return f"a table of {left} ax{'is' if left == 1 else 'es'}"


@dataclass(frozen=True, eq=False)
class AttentionOf:
    attention: Attention
    noun = "an attention"


Value = Num | Truth | Vec | Truths | SetOf | Pattern | GridPattern | TableOf | AttentionOf


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


TOKENS = Space(ir.var("n"))


Q, K = ir.var("q"), ir.var("k")


@dataclass(frozen=True)
class Scope:
    """The names in sight besides definitions.

    integral: real numbers are refused: the text of a mask.
    binding:  the name that a `learn` met here is bound to.
    calls:    the definitions being written out, outermost first.
    claims:   the text of an assertion: an attention stands for the union of its heads.
    clause:   the clause of an attention that is being read.
    units:    tokens of a row and of what it chooses among: the text of the score that a choice goes by.
    """

    names: Mapping[str, Value]
    integral: bool = True
    binding: str = ""
    calls: tuple[str, ...] = ()
    claims: bool = False
    clause: ast.Clause | ast.Keys | None = None
    units: tuple[int, int] | None = None

    def bind(self, **names: Value) -> Scope:
        return replace(self, names={**self.names, **names})


def tables_of(value: Value) -> frozenset[Table]:
    """The tables that a number, a truth, a vector or a look-up reads."""
    if isinstance(value, Num | Truth | Vec | Truths):
        return value.expr.tables
    return frozenset({value.table}) if isinstance(value, TableOf) else frozenset()


def of_expr(e: Expr) -> Num | Vec | Truth | Truths:
    match e.type:
        case "vec":
            return Vec(e)
        case "truths":
            return Truths(e)
        case "bool":
            return Truth(e)
    return Num(e)


def as_matrix(value: Value) -> Expr | None:
    """A table of reals that two axes are left of."""
    if isinstance(value, TableOf) and value.left == 2 and value.table.dtype == "float":
        return ir.lookup(value.table, *value.full)
    return None


def as_number(value: Value) -> Value:
    """A table with all axes indexed is a number or a truth; one of reals with one left a vector, unless that
    is `n`: an index was forgotten there."""
    if not isinstance(value, TableOf):
        return value
    if value.left == 0:
        return of_expr(ir.lookup(value.table, *value.full))
    if value.left == 1 and value.table.dims[-1] != "n" and value.table.dtype == "float":
        return Vec(ir.lookup(value.table, *value.full))
    return value


def as_table(value: Value) -> Value:
    """A list is a table of its entries too."""
    listed = isinstance(value, SetOf) and value.listed
    return TableOf(listed()) if listed else value


def as_set(value: Value) -> Value:
    """A table that one axis is left of is a set: of the true positions, or of the integers listed."""
    if not isinstance(value, TableOf) or value.left != 1:
        return value
    table, indices = value.table, value.full
    if table.dtype == "bool":
        return SetOf(lambda p, sp: ir.lookup(table, *indices, p))
    if table.dtype == "int":
        return SetOf(lambda p, sp: ir.intable(p, table, *indices))
    return value


def is_whole(value: Value) -> bool:
    return isinstance(value, TableOf) and not value.indices


def attention_named(name: str, value: Value) -> Attention:
    """An attention, or a pattern as one of its own."""
    if isinstance(value, AttentionOf):
        return value.attention
    if isinstance(value, Pattern):
        return Attention.of_pattern(name, value.at(Q, K, TOKENS))
    raise fail(
        f"`{name}` is {value.noun}, which cannot stand alone", help="give it to grid(height, width, ...)"
    )
