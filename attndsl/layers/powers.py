"""Powers of relations over the positions 0..n-1 of one sequence, each with radius(0) in it: exact.

A relation is held in the first of several forms that can hold it: as a tree of boxes (trees.py), as sets of
distances, as tiles with a position through which all others are joined, as rows of bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import AttnError, fail
from attndsl.expr import Expr, any_of, const, sub, substitute, var
from attndsl.layers.reach import SAME, SELF, matrix_product, over_heads, packed, sums, walkable
from attndsl.layers.trees import Trees
from attndsl.meaning.pointwise import evaluate
from attndsl.relations.relation import distances, eliminate
from attndsl.scores import by_distance
from attndsl.tiles.blockmask import TileGrid
from attndsl.tiles.queries import keys_read_by
from attndsl.tiles.tiling import tile

Bits = NDArray[Any]
Counts = NDArray[np.int64]
Step = tuple[Expr, Mapping[str, Bits]]
"""A mask over q and k, everything else in it constant, which holds where q == k, and its tables."""
Result = TypeVar("Result")

Tiled: TypeAlias = 'Counted | Literal["same", "all"]'
DENSE_LENGTH = 8192
"""Longest sequence whose relation is written out: 8 MB of bits."""
TILE = 128


class Form(Protocol):
    """A way to hold relations; `steps` are those that it was made of."""

    @property
    def steps(self) -> Sequence[Any]: ...

    @property
    def same(self) -> Any:
        """The relation of each position to itself."""

    def product(self, upper: Any, lower: Any) -> Any:
        """The pairs (q, k) with q, m related by `upper` and m, k by `lower`."""

    def equal(self, a: Any, b: Any) -> bool: ...

    def counts(self, a: Any) -> Counts:
        """Keys of each query, int64 [n]."""

    def row(self, a: Any, q: int) -> Bits:
        """Which keys query q has, bool [n]."""


def computed(n: int, steps: Sequence[Step], job: Callable[[Form], Result]) -> Result:
    """What `job` finds with the first form that holds the steps, and what it makes of them, within limits."""
    reasons = []
    for form in FORMS:
        try:
            return job(form(n, steps))
        except AttnError as error:
            reasons.append(error)
    raise reasons[0]


def settled(form: Form, step: Any) -> tuple[int, Any]:
    """The least power of `step` that equals all higher ones, and that relation.

    Squares find the last relation, then the powers of two are added that do not reach it. Of last(2), n = 8:

        1, 2, 4, 8 and 16, which equals 8   the last relation is causal
        4, then 4 + 2 reach less; 4 + 2 + 1 all of it   so the power is 6 + 1
    """
    powers = [step]
    while not form.equal(square := form.product(powers[-1], powers[-1]), powers[-1]):
        powers.append(square)
    closure, reached, count = powers.pop(), form.same, 0
    if form.equal(closure, reached):
        return 0, closure
    for i, power in reversed(list(enumerate(powers))):
        more = form.product(reached, power)
        if not form.equal(more, closure):
            reached, count = more, count + 2**i
    return count + 1, closure


def diameter(mask: Expr, n: int, heads: int | None = None) -> int:
    """The number of layers after which `reach` stops growing, at n positions (and H = heads); exact.

    Raises AttnError for a mask that depends on tables, and beyond the limits of every form.
    """
    values = {"n": const(n), "nq": const(n)} | ({} if heads is None else {"H": const(heads)})
    mask = substitute(over_heads(mask), values)
    if mask.tables:
        raise fail(f"the diameter depends on the table `{min(t.name for t in mask.tables)}`")
    if "H" in mask.free:
        raise fail("the diameter depends on the number of heads H")
    step = any_of(eliminate(mask, substitute(SELF, values)), SAME)
    return computed(n, [(step, {})], lambda form: settled(form, form.steps[0])[0])


class Shifts:
    """Pairs of sets of distances, bool [n] each: to keys before the query and to keys after it."""

    def __init__(self, n: int, steps: Sequence[Step]) -> None:
        """Every step depends on k - q alone, and sums of steps can be walked inside 0..n-1."""
        self.n = n
        self.steps = [self.sides(*step) for step in steps]
        if not walkable(self.steps):
            raise fail("sums of distances to both sides may leave the sequence on the way")
        self.same = (np.arange(n) == 0,) * 2

    def sides(self, mask: Expr, tables: Mapping[str, Bits]) -> tuple[Bits, Bits]:
        if by_distance(mask) is None:
            held = distances(mask, substitute(SELF, {"n": const(self.n)}))
            if held is None:
                raise fail("the pattern depends on more than k - q")
            mask = substitute(held, {"d": sub(var("k"), var("q"))})
        d, first = np.arange(self.n), np.zeros(self.n, np.int64)
        return evaluate(mask, d, first, tables), evaluate(mask, first, d, tables)

    def product(self, upper: tuple[Bits, Bits], lower: tuple[Bits, Bits]) -> tuple[Bits, Bits]:
        before, after = (sums(a, b) for a, b in zip(upper, lower, strict=True))
        return before, after

    def equal(self, a: tuple[Bits, Bits], b: tuple[Bits, Bits]) -> bool:
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))

    def counts(self, a: tuple[Bits, Bits]) -> Counts:
        before, after = (np.cumsum(side, dtype=np.int64) for side in a)
        return before + after[::-1] - 1

    def row(self, a: tuple[Bits, Bits], q: int) -> Bits:
        before, after = a
        return cast(Bits, np.r_[before[: q + 1][::-1], after[1 : self.n - q]])


@dataclass(frozen=True, eq=False)
class Counted:
    """Tiles, with the keys of each query and the queries of each key."""

    grid: TileGrid
    rows: Counts
    columns: Counts


class Hubs:
    """Tiles, of which a product is known where one key of all queries sees every key: all pairs."""

    same: Tiled = "same"

    def __init__(self, n: int, steps: Sequence[Step]) -> None:
        self.n = n
        self.steps = [self.counted(tile(mask, n, n, TILE, n=n, tables=tables)) for mask, tables in steps]

    def counted(self, grid: TileGrid) -> Tiled:
        if grid.nnz in (self.n, self.n**2):
            return "same" if grid.nnz == self.n else "all"
        return Counted(grid, grid.row_counts(), column_counts(grid))

    def product(self, upper: Tiled, lower: Tiled) -> Tiled:
        if upper == "same" or lower == "same":
            return lower if upper == "same" else upper
        if isinstance(upper, Counted) and isinstance(lower, Counted):
            hubs = (upper.columns == self.n) & (lower.rows == self.n)
            if not hubs.any():
                raise fail("no position sees every key and is seen by every query")
        return "all"

    def equal(self, a: Tiled, b: Tiled) -> bool:
        return a is b

    def counts(self, a: Tiled) -> Counts:
        return a.rows if isinstance(a, Counted) else np.full(self.n, self.n if a == "all" else 1)

    def row(self, a: Tiled, q: int) -> Bits:
        one = np.arange(self.n) == q
        return keys_read_by(a.grid, one) if isinstance(a, Counted) else one | (a == "all")


class Dense:
    """Matrices packed by rows, up to DENSE_LENGTH positions."""

    def __init__(self, n: int, steps: Sequence[Step]) -> None:
        if n > DENSE_LENGTH:
            raise fail(f"relations are written out up to n = {DENSE_LENGTH}")
        self.n = n
        self.same = packed(np.eye(n, dtype=bool))
        self.steps = [packed(tile(mask, n, n, TILE, n=n, tables=tables).to_dense()) for mask, tables in steps]

    def product(self, upper: Bits, lower: Bits) -> Bits:
        return matrix_product(upper, lower)

    def equal(self, a: Bits, b: Bits) -> bool:
        return np.array_equal(a, b)

    def counts(self, a: Bits) -> Counts:
        return np.asarray(np.bitwise_count(a).sum(axis=1, dtype=np.int64))

    def row(self, a: Bits, q: int) -> Bits:
        return np.unpackbits(a[q].view(np.uint8), count=self.n, bitorder="little").astype(bool)


FORMS: tuple[Callable[[int, Sequence[Step]], Form], ...] = (Trees, Shifts, Hubs, Dense)


def column_counts(grid: TileGrid) -> Counts:
    """Queries of each key, int64 [n]."""
    size, columns = grid.block_size, grid.shape[1]
    steps = np.zeros(columns + 1, np.int64)
    row = grid.run_row
    height = np.minimum(grid.nq - row * size, size)
    np.add.at(steps, grid.run_start, height)
    np.add.at(steps, grid.run_end, -height)
    counts = np.repeat(np.cumsum(steps)[:columns, None], size, axis=1)
    pair, uses = np.unique(
        grid.part_col.astype(np.int64) * len(grid.masks) + grid.part_mask, return_counts=True
    )
    if len(pair):
        live = np.unpackbits(grid.masks, axis=2, bitorder="little").sum(axis=1, dtype=np.int64)
        np.add.at(counts, pair // len(grid.masks), live[pair % len(grid.masks)] * uses[:, None])
    return counts.ravel()[: grid.n]
