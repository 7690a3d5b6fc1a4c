"""From an attention and the sizes of a call to one closed mask per batch row and head, and their tiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.expr import Expr, Table
from attndsl.meaning.intervals import check_range
from attndsl.meaning.pointwise import evaluate
from attndsl.tiles.blockmask import BlockMask, TileGrid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[Any]
NO_TABLES: Mapping[str, Any] = MappingProxyType({})
LENGTH_LIMIT = 2**31 - 1
HEAD_DIM_LIMIT = 2**16
DENSE_LIMIT = 2**30


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call.

    n counts tokens: `k_offset` plus the number of keys. Offsets hold one entry for all batch rows, or one
    each.
    """

    nq: int
    n_keys: int
    heads: int
    q_offset: tuple[int, ...]
    k_offset: tuple[int, ...] = (0,)

    @property
    def n(self) -> tuple[int, ...]:
        return tuple(start + self.n_keys for start in self.k_offset)


def checked_length(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise fail(f"`{name}` is an integer, not {type(value).__name__}")
    if value < 0:
        raise fail(f"`{name}` is {value}, and must not be negative")
    if value > LENGTH_LIMIT:
        raise fail(f"`{name}` is {value}, and lengths end at {LENGTH_LIMIT}")
    return int(value)


def checked_block_size(value: int) -> int:
    if checked_length("block_size", value) == 0 or value % 8:
        raise fail(f"`block_size` is {value}, and must be a positive multiple of 8")
    return value


def sizes(
    attention: Attention,
    n_keys: int,
    nq: int,
    heads: int,
    q_offset: int | tuple[int, ...] | None = None,
    k_offset: int | tuple[int, ...] | None = None,
) -> Sizes:
    """Offsets filled in. Raises AttnError for a default offset that is negative."""
    starts = _offsets("k_offset", k_offset) if k_offset is not None else (0,)
    if q_offset is not None:
        return Sizes(nq, n_keys, heads, _offsets("q_offset", q_offset), starts)
    found = []
    for start in starts:
        n = start + n_keys
        if attention.offset is not None:
            row = ir.number(ir.substitute(attention.offset, {"n": ir.const(n), "nq": ir.const(nq)}))
            assert row is not None
            if row < 0:
                raise fail(f"`offset` is {row} at n = {n}, nq = {nq}, and must not be negative")
            found.append(int(row))
        elif n < nq:
            raise fail(
                f"{nq} queries at the end of {n} keys would start before position 0",
                help="cross attention: write `offset 0`",
            )
        else:
            found.append(n - nq)
    return Sizes(nq, n_keys, heads, tuple(found), starts)


def _offsets(name: str, value: object) -> tuple[int, ...]:
    listed = np.asarray(value).reshape(-1).tolist()
    return tuple(checked_length(name, item) for item in listed)


@functools.lru_cache(maxsize=4096)
def closed(e: Expr, n: int, nq: int, h: int, heads: int) -> Expr:
    """The expression at one length and head: only q, k and tables are left in it."""
    constants = {"n": n, "nq": nq, "h": h, "H": heads}
    return ir.substitute(e, {name: ir.const(value) for name, value in constants.items() if name in e.free})


def head_groups(attention: Attention, heads: int) -> tuple[int, ...]:
    """For each head the index of its group. Raises AttnError where a head has none or two, or is missing."""
    if heads < attention.least_heads:
        last = attention.least_heads - 1
        there = f"there {'is' if heads == 1 else 'are'} {heads} head{'s' * (heads != 1)}"
        raise fail(f"`{attention.name}` speaks of head {last}, and {there}")
    found = []
    for h in range(heads):
        here = [
            i for i, group in enumerate(attention.groups) if closed(group.heads, 0, 0, h, heads) is ir.TRUE
        ]
        if len(here) != 1:
            which = "no group" if not here else f"{len(here)} groups"
            raise fail(
                f"head {h} of {heads} is in {which} of `{attention.name}`",
                help="`heads` and `else` together hold each head exactly once",
            )
        found.append(here[0])
    return tuple(found)


def heads_of(attention: Attention, given: Mapping[str, ArrayLike]) -> int:
    """As many heads as the attention and the given tables speak of."""
    shapes: list[tuple[int, ...]] = [
        np.shape(given[t.name])[t.batched :] for t in attention.inputs if t.headed and t.name in given
    ]
    return max([attention.enough_heads(), *(shape[0] for shape in shapes if shape)])


@functools.lru_cache(maxsize=1024)
def quantifier_free(mask: Expr) -> Expr:
    """The mask without `exists`, where the integer set library can remove it."""
    if not any(node.op == "exists" for node in ir.nodes(mask)):
        return mask
    from attndsl.relations.relation import eliminate

    return eliminate(mask)


def checked_tables(
    attention: Attention,
    given: Mapping[str, ArrayLike],
    sizes: Sizes,
    batch: int | None = None,
    head_dim: int | None = None,
    needed: Sequence[Table] | None = None,
) -> dict[str, Array]:
    """The given inputs as arrays [B or 1] [H or 1] then the explicit axes, both leading axes always there.

    Raises AttnError for a table that is unknown, of another type or shape, or missing: one of `needed`, or
    where that is None of those that masks read.
    """
    check_names(attention, given, mask_tables(attention) if needed is None else needed)
    bound: dict[str, int] = {"nq": sizes.nq, "H": sizes.heads}
    if len(set(sizes.n)) == 1:
        bound["n"] = sizes.n[0]
    if head_dim is not None:
        bound["D"] = head_dim
    if batch is not None:
        bound["B"] = batch
    return {
        table.name: _checked(table, np.asarray(given[table.name]), bound)
        for table in attention.inputs
        if table.name in given
    }


def mask_tables(attention: Attention, counts: bool = False) -> tuple[Table, ...]:
    """The inputs that masks read, with `counts` those of multiplicities too."""
    relations = [group.relation for group in attention.groups]
    read = {t for r in relations for e in (r.mask, r.count if counts else None) if e for t in e.tables}
    return tuple(table for table in attention.inputs if table in read)


def check_names(attention: Attention, given: Mapping[str, object], needed: Sequence[Table] = ()) -> None:
    """Raises AttnError for a table that the attention does not have, or a needed one that is missing."""
    known = [table.name for table in attention.inputs]
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise fail(f"`{attention.name}` has no input `{name}`", help=f"its inputs: {listed}")
    for table in needed:
        if table.name not in given:
            raise fail(
                f"`{attention.name}` needs its input `{table.name}`, {_shape_text(table)}",
                help=f"pass {table.name} = ..., on the command line --input {table.name}=FILE.npy",
            )


KINDS = {"int": ("int", "uint"), "bool": ("bool",), "float": ("float16", "float32", "float64", "bfloat16")}
"""How the names of dtypes begin, by kind of table."""


def _checked(table: Table, array: Array, bound: dict[str, int]) -> Array:
    check_kind(table, array)
    axes = [*(["B"] if table.batched else []), *(["H"] if table.headed else []), *table.dims]
    if array.ndim != len(axes):
        raise fail(
            f"`{table.name}` is {_shape_text(table)}, and was given with {array.ndim} axes: {array.shape}"
        )
    for axis, size in zip(axes, array.shape, strict=True):
        if axis == "B" and size == 1:
            continue
        wanted = axis if isinstance(axis, int) else bound.setdefault(axis, size)
        if size != wanted:
            shared = f"one for all heads: leave `H` out of `{table.name}`, and the axis out of the tensor"
            raise fail(
                f"`{table.name}` has {size} entries on its axis `{axis}`, and there `{axis}` is {wanted}"
                if isinstance(axis, str)
                else f"`{table.name}` has {size} entries on an axis of {axis}",
                help=shared if axis == "H" and size == 1 else "",
            )
    if not table.batched:
        array = array[None]
    if not table.headed:
        array = array[:, None]
    if table.dtype == "int":
        array = array.astype(np.int64, copy=False)
    return array


def check_kind(table: Table, array: Any) -> None:
    """Raises AttnError where an array or a tensor is of another kind than the table."""
    dtype = str(array.dtype).removeprefix("torch.")
    kind = next((kind for kind, names in KINDS.items() if dtype.startswith(names)), dtype)
    if kind != table.dtype:
        raise fail(f"`{table.name}` is {_shape_text(table)}, and was given as {dtype}")
    if dtype == "uint64":
        raise fail(f"`{table.name}` is uint64, and integers have 63 bits and a sign", help="give it as int64")


def _shape_text(table: Table) -> str:
    axes = [*(["B"] if table.batched else []), *(["H"] if table.headed else []), *map(str, table.dims)]
    return f"{table.dtype}[{', '.join(axes)}]"


@dataclass(frozen=True, eq=False)
class Case:
    """One batch row and head: its closed mask and where it stands."""

    row: int
    head: int
    group: int
    mask: Expr
    n: int
    q_offset: int
    k_offset: int
    tables: Mapping[str, Array]


def cases(
    attention: Attention, sizes: Sizes, tables: Mapping[str, Array], counts: bool = False
) -> Iterator[Case]:
    """Every batch row and head whose mask (with `counts`, also multiplicities) may differ: one row (head)
    stands for all where nothing depends on it."""
    groups = head_groups(attention, sizes.heads)
    masks = [quantifier_free(group.relation.mask) for group in attention.groups]
    multiplicities = [group.relation.count or ir.ONE if counts else ir.ONE for group in attention.groups]
    read = [*masks, *multiplicities]
    used = {table for e in read for table in e.tables}
    rows = max(len(sizes.q_offset), len(sizes.k_offset), *(len(tables[t.name]) for t in used), 1)
    by_head = len(set(groups)) > 1 or any("h" in e.free for e in read) or any(t.headed for t in used)
    for row in range(rows):
        start, keys_start = (o[row % len(o)] for o in (sizes.q_offset, sizes.k_offset))
        n = keys_start + sizes.n_keys
        for head in range(sizes.heads if by_head else min(1, sizes.heads)):
            mask = ir.FALSE
            if sizes.nq and sizes.n_keys:
                mask = closed(masks[groups[head]], n, sizes.nq, head, sizes.heads)
            here = {
                t.name: tables[t.name][row % len(tables[t.name]), head % tables[t.name].shape[1]]
                for t in sorted(mask.tables | multiplicities[groups[head]].tables, key=lambda t: t.name)
            }
            check_range(mask, _ranges(sizes, row), here)
            yield Case(row, head, groups[head], mask, n, start, keys_start, here)


def _ranges(sizes: Sizes, row: int) -> dict[str, tuple[int, int]]:
    """Least and greatest value of each variable in a batch row."""
    q, k = (offsets[row % len(offsets)] for offsets in (sizes.q_offset, sizes.k_offset))
    n, heads = k + sizes.n_keys, sizes.heads
    return {
        "q": (q, q + sizes.nq - 1), "k": (k, n - 1), "n": (n, n), "nq": (sizes.nq, sizes.nq),
        "h": (0, heads - 1), "H": (heads, heads), "D": (1, HEAD_DIM_LIMIT),
    }  # fmt: skip


def check_scores(attention: Attention, sizes: Sizes, tables: Mapping[str, Array]) -> None:
    """Raises AttnError where an integer of a score, decay or sink could leave the 64-bit range; those that
    read a table wait until it is given."""
    if not (sizes.nq and sizes.n_keys):
        return
    known = {table for table in attention.inputs if table.name in tables} | set(attention.learned)
    for row in range(max(len(sizes.q_offset), len(sizes.k_offset))):
        for group in attention.groups:
            for e in (group.score, group.decay, group.norm.sink):
                if e is not None and e.tables <= known:
                    check_range(e, _ranges(sizes, row), tables)


def dense(attention: Attention, sizes: Sizes, tables: Mapping[str, Array], counts: bool = False) -> Array:
    """The mask [B or 1, H or 1, nq, n_keys], pointwise; with `counts` the multiplicities instead."""
    grid: dict[tuple[int, int], Array] = {}
    for case in cases(attention, sizes, tables, counts):
        q = case.q_offset + np.arange(sizes.nq)[:, None]
        k = case.k_offset + np.arange(sizes.n_keys)[None, :]
        live = evaluate(case.mask, q, k, case.tables)
        if counts:
            count = attention.groups[case.group].relation.count
            if count is not None and live.size:
                at = closed(count, case.n, sizes.nq, case.head, sizes.heads)
                check_range(at, _ranges(sizes, case.row), case.tables)
                live = np.where(live, evaluate(at, q, k, case.tables), 0)
            live = live.astype(np.int64)
        grid[case.row, case.head] = live
    rows, heads = (1 + max((key[axis] for key in grid), default=0) for axis in (0, 1))
    kind = np.int64 if counts else bool
    empty = np.zeros((rows, 0, sizes.nq, sizes.n_keys), kind)
    if not grid:
        return empty
    return np.stack([np.stack([grid[row, head] for head in range(heads)]) for row in range(rows)])


def written_out(
    attention: Attention,
    counts: bool,
    length: int,
    q_length: int | None,
    q_offset: int | None,
    k_offset: int | None,
    heads: int,
    inputs: Mapping[str, ArrayLike],
) -> Array:
    """`dense` of a call, without an axis B where no input is batched. Raises AttnError beyond DENSE_LIMIT."""
    found = _sizes_of(attention, length, q_length, q_offset, k_offset, heads)
    if found.nq * found.n_keys > DENSE_LIMIT:
        raise fail(
            f"a mask of {found.nq:,} x {found.n_keys:,} is not written out: "
            f"the limit is {DENSE_LIMIT:,} pairs",
            help="`block_mask` gives its tiles",
        )
    tables = checked_tables(attention, inputs, found, needed=mask_tables(attention, counts))
    pairs = dense(attention, found, tables, counts)
    return pairs if any(t.batched for t in attention.inputs) or len(pairs) > 1 else pairs[0]


def tiles_of(
    attention: Attention,
    length: int,
    block_size: int = 128,
    q_length: int | None = None,
    q_offset: int | None = None,
    k_offset: int | None = None,
    heads: int = 1,
    inputs: Mapping[str, ArrayLike] = NO_TABLES,
) -> BlockMask:
    """`block_mask` of a call."""
    checked_block_size(block_size)
    found = _sizes_of(attention, length, q_length, q_offset, k_offset, heads)
    return block_mask(attention, found, checked_tables(attention, inputs, found), block_size)


def _sizes_of(
    attention: Attention,
    length: int,
    q_length: int | None,
    q_offset: int | None,
    k_offset: int | None,
    heads: int,
) -> Sizes:
    keys = checked_length("length", length)
    nq = keys if q_length is None else checked_length("q_length", q_length)
    return sizes(attention, keys, nq, checked_length("heads", heads), q_offset, k_offset)


def block_mask(attention: Attention, sizes: Sizes, tables: Mapping[str, Array], block_size: int) -> BlockMask:
    """The tiles; equal masks are tiled once."""
    from attndsl.tiles.tiling import tile

    check_scores(attention, sizes, tables)
    grids: list[TileGrid] = []
    known: dict[tuple[object, ...], int] = {}
    index: dict[tuple[int, int], int] = {}
    for case in cases(attention, sizes, tables):
        contents = tuple((name, a.shape, a.tobytes()) for name, a in case.tables.items())
        key = (case.mask, case.q_offset, case.k_offset, contents)
        if key not in known:
            known[key] = len(grids)
            grids.append(
                tile(
                    case.mask,
                    sizes.nq,
                    sizes.n_keys,
                    block_size,
                    n=case.n,
                    q_offset=case.q_offset,
                    k_offset=case.k_offset,
                    tables=case.tables,
                )
            )
        index[case.row, case.head] = known[key]
    shape = tuple(1 + max((key[axis] for key in index), default=0) for axis in (0, 1))
    places = np.zeros(shape, np.int32)
    for place, grid in index.items():
        places[place] = grid
    return BlockMask(sizes.nq, sizes.n_keys, block_size, tuple(grids), places)
