"""From an attention and the sizes of a call to one closed mask per batch row and head, and their tiles."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.axis import Axis
from attndsl.errors import AttnError, fail, quantity
from attndsl.expr import Expr, Selected, Table
from attndsl.keywords import instead
from attndsl.meaning.intervals import check_range
from attndsl.meaning.pointwise import evaluate
from attndsl.streams import Numbers
from attndsl.tiles.blockmask import BlockMask, Rows, Spans, intervals
from attndsl.tiles.rows import HIGH, LOW, Keys, entries, keys_of

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[Any]
NO_TABLES: Mapping[str, Any] = MappingProxyType({})
LENGTH_LIMIT = 2**31 - 1
HEAD_DIM_LIMIT = 2**16
DENSE_LIMIT = 2**30
ENTRY = "?entry"
"""The place of a query among the queries; a name that no text has."""
QUERY = ir.var("q")
FEW_ROWS = 16
"""Queries up to which keys are found row by row."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, and where its queries and keys stand; n for all batch rows, or one each."""

    heads: int
    q: Axis
    k: Axis
    n: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Batch rows that differ, tables aside."""
        return max(len(self.q.rows), len(self.k.rows))


def checked_length(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        whole = (isinstance(value, float) and value.is_integer()) or str(value).isdecimal()
        help = f"write `{int(value)}`" if whole and isinstance(value, float | str) else ""
        raise fail(f"`{name}` is an integer, not {type(value).__name__}", help=help)
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
    q: Axis | None = None,
    k: Axis | None = None,
    n: int | None = None,
    inside: bool = False,
) -> Sizes:
    """What is not given filled in: keys from position 0 on, n the greatest position of a key + 1, queries
    where the attention says. Of streams `n_keys` are the tokens, and keys are entries by their numbers.
    Raises AttnError for a key that is not below n, for an n beyond the keys where nothing is placed, for the
    first query of an offset that is not, with `inside` for any query, for a default position below 0, and
    where streams are placed elsewhere."""
    numbered, entries = attention.numbered, n_keys
    each: tuple[int, ...]
    if attention.streams:
        if k is not None or n not in (None, n_keys):
            raise fail(
                f"the keys of `{attention.name}` are streams of all tokens, which stand from position 0 on",
                help="leave `k_offset`, `k_positions` and `n` out",
            )
        numbered, n = Numbers.of(attention.streams), n_keys
        entries = numbered.at(n)[1]
    if numbered is not None:
        n = numbered.tokens(entries, nq) if n is None else n
        each, k = (n,), Axis.starting(entries, (numbered.at(n)[0],))
    else:
        if n is not None and n > n_keys and q is None and k is None and attention.offset is None:
            raise fail(
                f"`n` is {n}, and {quantity(n_keys, 'key')} would stand from position 0 on",
                help=f"say where they stand: `k_offset={n - n_keys}` if they are the last",
            )
        k = k or Axis.starting(n_keys, (0,))
        each = tuple([k.span(row)[1] + 1 for row in range(len(k.rows))])
        if n is not None:
            if checked_length("n", n) < max(each):
                raise fail(f"`n` is {n}, and a key stands at {max(each) - 1}")
            each = (n,)
    found = Sizes(heads, q or Axis.starting(nq, (_first_row(attention, n, nq) for n in each)), k, each)
    if numbered is None:
        check_places(attention, nq == n_keys and all(found.q.row(b) == k.row(b) for b in range(found.rows)))
    for row in range(found.rows if inside or q is not None else 0):
        span, end = found.q.span(row), each[row % len(each)]
        # those of cross attention begin among the keys, and may be more
        at = span[1] if inside else min(span)
        if at >= max(end, 1):
            help = "" if numbered is not None else "give `n=`, the number of all positions"
            raise fail(f"a query stands at {at}, and n is {end}", help=help)
    return found


def check_places(attention: Attention, same: bool) -> None:
    """Raises AttnError where queries and keys have to stand at the same positions and do not."""
    if not same and attention.approx is not None and attention.approx.kind == "nystrom":
        raise fail(
            "`nystrom` takes as many queries as keys, at the same positions: its landmarks are of both"
        )


def _first_row(attention: Attention, n: int, nq: int) -> int:
    if attention.offset is not None:
        row = ir.number(ir.substitute(attention.offset, {"n": ir.const(n), "nq": ir.const(nq)}))
        assert row is not None
        if row < 0:
            raise fail(f"`offset` is {row} at n = {n}, nq = {nq}, and must not be negative")
        return int(row)
    if n < nq:
        raise fail(
            f"{nq} queries at the end of {n} keys would start before position 0",
            help="cross attention: write `offset 0`",
        )
    return n - nq


def axis(side: str, length: int, offset: object, positions: ArrayLike | None) -> Axis | None:
    """Of the queries (`side` is q) or keys (k): an offset for all batch rows or one each, or positions
    [length] or [B, length]; None where neither is given. Raises AttnError for what is none of these."""
    if positions is None:
        return None if offset is None else Axis.starting(length, offsets(f"{side}_offset", offset))
    if offset is not None:
        raise fail(f"`{side}_offset` and `{side}_positions` are given: one says it all")
    name, found = f"{side}_positions", np.asarray(positions)
    check_positions(name, str(found.dtype), found.shape, length)
    if found.size:
        checked_length(name, int(found.min()))
        checked_length(name, int(found.max()))
    return Axis.of(np.atleast_2d(found).astype(np.int64, copy=False))


def check_positions(name: str, dtype: str, shape: Sequence[int], length: int) -> None:
    """Raises AttnError for positions that are no integers, or of another number than there are entries."""
    dtype = dtype.removeprefix("torch.")
    if not dtype.startswith(("int", "uint")):
        raise fail(f"`{name}` are integers, and were given as {dtype}")
    if len(shape) not in (1, 2) or shape[-1] != length:
        raise fail(f"`{name}` is [{length}] or [B, {length}], and was given as {list(shape)}")


def offsets(name: str, value: object) -> tuple[int, ...]:
    """One for all batch rows, or one each. Raises AttnError for what is no position."""
    # an integer first: torch.compile cannot tell whether one of its own has a `tolist`
    listed = value.tolist() if not isinstance(value, int) and hasattr(value, "tolist") else value
    listed = listed if isinstance(listed, list | tuple) else [listed]
    if not listed:
        raise fail(f"`{name}` is empty", help="leave it out, or give one position per batch row")
    return tuple([checked_length(name, item) for item in listed])


@functools.lru_cache(maxsize=4096)
def closed(e: Expr, n: int, nq: int, b: int, h: int, heads: int) -> Expr:
    """The expression at one length, batch row and head: only q, k and tables are left in it."""
    constants = {"n": n, "nq": nq, "b": b, "h": h, "H": heads}
    return ir.substitute(e, {name: ir.const(value) for name, value in constants.items() if name in e.free})


@functools.lru_cache(maxsize=1024)
def head_groups(attention: Attention, heads: int) -> tuple[int, ...]:
    """For each head the index of its group. Raises AttnError where a head has none or two, or is missing."""
    if heads < attention.least_heads:
        there = f"there {'is' if heads == 1 else 'are'} {quantity(heads, 'head')}"
        said = f"`{attention.name}` speaks of head {attention.least_heads - 1}, and {there}"
        raise fail(said, help=f"give `heads={attention.least_heads}` or more")
    found = []
    for h in range(heads):
        here = [
            i for i, group in enumerate(attention.groups) if closed(group.heads, 0, 0, 0, h, heads) is ir.TRUE
        ]
        if len(here) != 1:
            which = "no group" if not here else f"{len(here)} groups"
            raise fail(
                f"head {h} of {heads} is in {which} of `{attention.name}`",
                help="`heads` and `else` together hold each head exactly once",
            )
        found.append(here[0])
    return tuple(found)


def grouped(attention: Attention, heads: int) -> str:
    """`5 + 3` heads in the groups of an attention, in their order; nothing where there is one for all."""
    found = head_groups(attention, heads)
    many = range(len(attention.groups))
    return " + ".join(str(found.count(group)) for group in many) if len(many) > 1 else ""


def any_of_heads(
    attention: Attention, sizes: Sizes, tables: Mapping[str, Array], heads: Sequence[int]
) -> Expr:
    """What some of these heads relates in batch row 0, closed.

    Raises AttnError where an integer could leave the 64-bit range.
    """
    masks = [quantifier_free(group.relation.mask) for group in attention.groups]
    groups, n, nq = head_groups(attention, sizes.heads), sizes.n[0], sizes.q.length
    joined = ir.any_of(*(closed(masks[groups[head]], n, nq, 0, head, sizes.heads) for head in heads))
    check_range(joined, ranges(sizes, 0), tables)
    return joined


def heads_of(attention: Attention, given: Mapping[str, ArrayLike]) -> int:
    """As many heads as the attention and the given tables speak of."""
    shapes: list[tuple[int, ...]] = [
        np.shape(given[t.name])[t.batched :] for t in attention.inputs if "H" in t.dims and t.name in given
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
    given: Mapping[str, Any],
    sizes: Sizes,
    batch: int | None = None,
    head_dim: int | None = None,
    needed: Sequence[Table] | None = None,
) -> dict[str, Any]:
    """The given inputs with the axes of their tables; one batch row may serve all. Those that masks read are
    arrays; the others, which may be tensors, stay where they are.

    Raises AttnError for a table that is unknown, of another type or shape, or missing: one of `needed`, or
    where that is None of those that masks read.
    """
    read = mask_tables(attention, counts=True)
    check_names(attention, given, mask_tables(attention) if needed is None else needed, SIZES)
    bound: dict[str, int] = {"nq": sizes.q.length, "H": sizes.heads}
    if len(set(sizes.n)) == 1:
        bound["n"] = sizes.n[0]
    if head_dim is not None:
        bound["D"] = head_dim
    if batch is not None:
        bound["B"] = batch
    found = {}
    for table in (*attention.inputs, *attention.selected):
        if table.name in given:
            value = given[table.name]
            value = value if hasattr(value, "detach") else np.asarray(value)
            _check(table, value, bound)
            found[table.name] = as_array(value) if table in read else value
    return found


def as_array(value: Any) -> Array:
    """A tensor, or whatever numpy reads, as an array, integers as int64."""
    found = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    return found.astype(np.int64, copy=False) if found.dtype.kind in "iu" else found


def mask_tables(attention: Attention, counts: bool = False) -> tuple[Table, ...]:
    """The inputs and choices that masks read, with `counts` those of multiplicities too."""
    relations = [group.relation for group in attention.groups]
    read = {t for r in relations for e in (r.mask, r.count if counts else None) if e for t in e.tables}
    return tuple(table for table in (*attention.inputs, *attention.selected) if table in read)


PLACES = "q_offset k_offset q_positions k_positions n".split()
ARGUMENTS = [*PLACES, "memory", "learned", "return_lse", "return_weights"]
"""Beside which calls of a plan take tables."""
SIZES = ["length", "q_length", "heads", "block_size", *PLACES]
"""Beside which masks do."""


def check_names(
    attention: Attention,
    given: Mapping[str, object],
    needed: Sequence[Table] = (),
    beside: Sequence[str] = ARGUMENTS,
) -> None:
    """Raises AttnError for a table that the attention does not have, or a needed one that is missing; other
    arguments are those of `beside`."""
    known = [table.name for table in (*attention.inputs, *attention.selected)]
    for name, value in given.items():
        if name not in known:
            near = instead(name, {*known, *beside})
            if not near and name in attention.parameters:
                near = f"a parameter is bound before: `attention({name}={value!r})`"
            inputs = ", ".join(table.name for table in attention.inputs)
            help = near or f"its inputs: {inputs or 'none'}"
            raise fail(f"`{attention.name}` has no input `{name}`", help=help)
    for table in needed:
        if table.name not in given and isinstance(table.origin, Selected):
            raise fail(
                f"`{attention.name}` chooses keys by what is in q and k",
                help="give a choice: `plan.choices(q, k)` are such tables",
            )
        if table.name not in given:
            raise fail(
                f"`{attention.name}` needs its input `{table.name}`, {_shape_text(table)}",
                help=f"pass {table.name} = ..., on the command line --input {table.name}=FILE.npy",
            )


KINDS = {"int": ("int", "uint"), "bool": ("bool",), "float": ("float16", "float32", "float64", "bfloat16")}
"""How the names of dtypes begin, by kind of table."""


CASTS = {
    "int": (".astype(int)", ".long()"),
    "bool": (".astype(bool)", ".bool()"),
    "float": (".astype(float)", ".float()"),
}
"""From another kind to that of a table: of an array, of a tensor."""


def _wider(table: Table, shape: Sequence[int], bound: Mapping[str, int]) -> str:
    """How a table with rows for the batch or for heads, which come first, is declared."""
    more, heads = len(shape) - len(table.dims), bound.get("H")
    by_head = "H" not in table.dims and heads != 1 and shape[more - 1] == heads
    if more > 2 or (more == 2 and not by_head and shape[1] != 1):
        return ""
    added = ("B", "H")[2 - more :] if by_head else ("B",)
    said = " and ".join({"B": "of the batch", "H": "head"}[axis] for axis in added)
    wider = replace(table, dims=(*added, *table.dims))
    help = f"with a row for each {said} it is declared `{table.name} : {_shape_text(wider)}`"
    return help if len(added) == more else f"{help}: pass `{table.name}[:, 0]`"


def _numbered(table: Table, array: Any, bound: Mapping[str, int]) -> str:
    """How a number for each token is made of the ends of documents, `[0, 50, 80, 128]`."""
    if table.dtype != "int" or table.dims[-1] != "n" or array.ndim != 1 or len(array) < 2:
        return ""
    ends = as_array(array)
    if ends[0] != 0 or ends[-1] != bound.get("n") or (np.diff(ends) < 0).any():
        return ""
    many, name = len(ends) - 1, table.name
    made = f"numpy.arange({many}).repeat(numpy.diff({name}))"
    if hasattr(array, "detach"):
        made = f"torch.arange({many}).repeat_interleave({name}.diff())"
    return f"these are ends of documents; a number for each token is `{made}`"


def _turned(table: Table, shape: Sequence[int], bound: Mapping[str, int]) -> str:
    """That the axes are the other way round, as those of a layer's weight, where that fits."""
    if len(shape) != 2 or shape[0] == shape[1]:
        return ""
    wanted = zip((bound.get(str(axis), axis) for axis in table.dims), reversed(shape), strict=True)
    fits = all(isinstance(size, str) or size == turned for size, turned in wanted)
    return f"its axes are the other way round: pass `{table.name}.T`" if fits else ""


def _narrower(table: Table, shape: Sequence[int]) -> str:
    """The sizes without axes of one, as a mask of a batch has them elsewhere, where as many are left."""
    more = len(shape) - len(table.dims)
    ones = [i for i, size in enumerate(shape) if size == 1 and i > 0][: max(more, 0)]
    return (
        ", ".join(str(size) for i, size in enumerate(shape) if i not in ones) if more == len(ones) > 0 else ""
    )


def _check(table: Table, array: Any, bound: dict[str, int]) -> None:
    check_kind(table, array)
    if array.ndim != len(table.dims):
        help = _numbered(table, array, bound)
        if not help and array.ndim == len(table.dims) - 1 and table.batched:
            help = f"one row for the batch: pass `{table.name}[None]`"
        elif array.ndim > len(table.dims) and not table.batched:
            help = _wider(table, array.shape, bound)
        elif array.ndim == len(table.dims) - 1 and "H" in table.dims and not help:
            axes = ", ".join(str(axis) for axis in table.dims if axis != "H")
            help = f"one for all heads is declared `{table.name} : {table.dtype}[{axes}]`"
        elif kept := _narrower(table, array.shape):
            help = f"pass `{table.name}.reshape({kept})`"
        raise fail(
            f"`{table.name}` is {_shape_text(table)}, and was given with "
            f"{quantity(array.ndim, 'axis', 'axes')}: {list(array.shape)}",
            help=help,
        )
    listed = isinstance(table.origin, Selected) and table.origin.of is not None
    turned = _turned(table, array.shape, bound)
    for at, (axis, size) in enumerate(zip(table.dims, array.shape, strict=True)):
        # of fewer units a list has fewer entries
        if (axis == "B" and size == 1) or (listed and isinstance(axis, int) and size < axis):
            continue
        wanted = axis if isinstance(axis, int) else bound.setdefault(axis, size)
        if size != wanted:
            shared = f"one for all heads: leave `H` out of `{table.name}`, and the axis out of the tensor"
            has = f"`{table.name}` has {quantity(size, 'entry', 'entries')}"
            cut = f"pass `{table.name}[{':, ' * at}:{wanted}]`" if axis == "n" and size > wanted else ""
            raise fail(
                f"{has} on its axis `{axis}`, and there `{axis}` is {wanted}"
                if isinstance(axis, str)
                else f"{has} on an axis of {axis}",
                help=shared if axis == "H" and size == 1 else turned or _numbered(table, array, bound) or cut,
            )


def check_kind(table: Table, array: Any) -> None:
    """Raises AttnError where an array or a tensor is of another kind than the table."""
    dtype = str(array.dtype).removeprefix("torch.")
    kind = next((kind for kind, names in KINDS.items() if dtype.startswith(names)), dtype)
    if kind not in KINDS and hasattr(array, "item") and dtype.startswith(("<U", "object")):
        raise fail(f"`{table.name}` is no array of numbers or truths", help="a file is read by `numpy.load`")
    if kind != table.dtype:
        cast = CASTS[table.dtype][hasattr(array, "detach")]
        help = f"pass `{table.name}{cast}`" if kind in KINDS else ""
        if (table.dtype, kind) == ("bool", "float") and not bool((array > 0).any()):
            help = f"these are added to logits elsewhere, and 0 keeps a key: pass `{table.name} == 0`"
        raise fail(f"`{table.name}` is {_shape_text(table)}, and was given as {dtype}", help=help)
    if dtype == "uint64":
        raise fail(f"`{table.name}` is uint64, and integers have 63 bits and a sign", help="give it as int64")


def _shape_text(table: Table) -> str:
    return f"{table.dtype}[{', '.join(map(str, table.dims))}]"


@dataclass(frozen=True, eq=False)
class ClosedMask:
    """One batch row and head: its closed mask and multiplicity, `q` and `k` being the entries, not their
    positions (`query` is the one of a query); tables without the axes B and H."""

    row: int
    head: int
    mask: Expr
    count: Expr
    n: int
    query: Expr
    tables: Mapping[str, Array]


def cases(
    attention: Attention, sizes: Sizes, tables: Mapping[str, Array], counts: bool = False
) -> Iterator[ClosedMask]:
    """Every batch row and head whose mask (with `counts`, also multiplicities) may differ: one row (head)
    stands for all where nothing depends on it."""
    groups = head_groups(attention, sizes.heads)
    masks = [quantifier_free(group.relation.mask) for group in attention.groups]
    multiplicities = [group.relation.count or ir.ONE if counts else ir.ONE for group in attention.groups]
    read = [*masks, *multiplicities]
    used = sorted({table for e in read for table in e.tables}, key=lambda table: table.name)
    rows = max(sizes.rows, *(len(tables[table.name]) for table in used if table.batched), 1)
    by_head = len(set(groups)) > 1 or any("h" in e.free for e in read)
    empty = not (sizes.q.length and sizes.k.length)
    for row in range(rows):
        n = sizes.n[row % len(sizes.n)]
        (q, at_q), (k, at_k) = sizes.q.expression("q", row), sizes.k.expression("k", row)
        for head in range(sizes.heads if by_head else min(1, sizes.heads)):
            mask, count = ir.FALSE, ir.ONE
            if not empty:
                mask, count = (
                    alone(closed(e[groups[head]], n, sizes.q.length, row, head, sizes.heads))
                    for e in (masks, multiplicities)
                )
            names = {table.name for table in mask.tables | count.tables}
            here = {t.name: _entries(t, tables[t.name], row, head) for t in used if t.name in names}
            here |= at_q | at_k
            mask, count = (
                ir.substitute(_by_entry(e), {"q": q, "k": k, ENTRY: ir.var("q")}) for e in (mask, count)
            )
            for e in (mask, count):
                check_range(e, _entry_ranges(sizes), here)
            yield ClosedMask(row, head, mask, count, n, q, here)


def alone(e: Expr) -> Expr:
    """A closed expression over tables without the axes B and H, whose indices are constants in it."""
    done: dict[Expr, Expr] = {}
    for node in ir.nodes(e):
        args, table = tuple([done[arg] for arg in node.args]), node.value
        if isinstance(table, Table) and table.implicit:
            first = int(node.op == "intable")
            args = (*args[:first], *args[first + len(table.implicit) :])
            done[node] = ir.make(node.op, args, replace(table, dims=table.explicit), node.type)
        else:
            done[node] = ir.rebuild(node, args)
    return done[e]


def _by_entry(e: Expr) -> Expr:
    """With the rows of choices, which are those of the queries, looked up by entry."""
    if not any(table.by_entry for table in e.tables):
        return e
    done: dict[Expr, Expr] = {}
    for node in ir.nodes(e):
        args, table = tuple([done[arg] for arg in node.args]), node.value
        if isinstance(table, Table) and table.by_entry:
            args = tuple([ir.var(ENTRY) if arg is QUERY else arg for arg in args])
        done[node] = ir.rebuild(node, args)
    return done[e]


def _entries(table: Table, array: Array, row: int, head: int) -> Array:
    """Those of one batch row and head."""
    for axis, at in (("B", row), ("H", head)):
        if axis in table.dims:
            array = array[at % len(array)]
    return array


def _entry_ranges(sizes: Sizes) -> dict[str, tuple[int, int]]:
    return {"q": (0, sizes.q.length - 1), "k": (0, sizes.k.length - 1)}


def ranges(sizes: Sizes, row: int) -> dict[str, tuple[int, int]]:
    """Least and greatest value of each variable in a batch row."""
    n, heads, nq = sizes.n[row % len(sizes.n)], sizes.heads, sizes.q.length
    return {
        "q": sizes.q.span(row), "k": sizes.k.span(row), "n": (n, n), "nq": (nq, nq), "b": (row, row),
        "h": (0, heads - 1), "H": (heads, heads), "D": (1, HEAD_DIM_LIMIT),
    }  # fmt: skip


def check_scores(attention: Attention, sizes: Sizes, tables: Mapping[str, Array]) -> None:
    """Raises AttnError where an integer of a score, decay or sink could leave the 64-bit range; those that
    read a table wait until it is given."""
    if not (sizes.q.length and sizes.k.length):
        return
    ends = [sizes.q.length, *sizes.n, *(sizes.q.span(row)[1] for row in range(len(sizes.q.rows)))]
    if _scores_fit(attention, max(ends).bit_length(), sizes.heads):
        return
    known = {table for table in attention.inputs if table.name in tables} | set(attention.learned)
    for row in range(sizes.rows):
        for group in attention.groups:
            for e in (group.score, group.decay, group.norm.sink):
                if e is not None and e.tables <= known:
                    check_range(e, ranges(sizes, row), tables)


@functools.lru_cache(maxsize=256)
def _scores_fit(attention: Attention, bits: int, heads: int) -> bool:
    """Whether no integer leaves the 64-bit range wherever the sizes and positions have so many bits; only of
    scores that read no tables."""
    sides = dict.fromkeys(("q", "k", "n", "nq"), (0, 2**bits))
    limits = {"h": (0, heads - 1), "H": (heads, heads), "D": (1, HEAD_DIM_LIMIT)}
    parts = [e for g in attention.groups for e in (g.score, g.decay, g.norm.sink) if e is not None]
    if any(e.tables for e in parts):
        return False
    try:
        for e in parts:
            check_range(e, sides | limits, {})
    except AttnError:
        return False
    return True


def dense(attention: Attention, sizes: Sizes, tables: Mapping[str, Array], counts: bool = False) -> Array:
    """The mask [B or 1, H or 1, nq, n_keys], pointwise; with `counts` the multiplicities instead."""
    grid: dict[tuple[int, int], Array] = {}
    q, k = np.arange(sizes.q.length)[:, None], np.arange(sizes.k.length)[None, :]
    for case in cases(attention, sizes, tables, counts):
        live = evaluate(case.mask, q, k, case.tables)
        if counts:
            live = np.where(live, evaluate(case.count, q, k, case.tables), 0).astype(np.int64)
        grid[case.row, case.head] = live
    rows, heads = (1 + max((key[axis] for key in grid), default=0) for axis in (0, 1))
    if not grid:
        return np.zeros((rows, 0, sizes.q.length, sizes.k.length), np.int64 if counts else bool)
    return np.stack([np.stack([grid[row, head] for head in range(heads)]) for row in range(rows)])


def written_out(attention: Attention, sizes: Sizes, inputs: Mapping[str, ArrayLike], counts: bool) -> Array:
    """`dense` of a call, without an axis B where no input is batched. Raises AttnError beyond DENSE_LIMIT."""
    if sizes.q.length * sizes.k.length > DENSE_LIMIT:
        raise fail(
            f"a mask of {sizes.q.length:,} x {sizes.k.length:,} is not written out: "
            f"the limit is {DENSE_LIMIT:,} pairs",
            help="`block_mask` gives its tiles",
        )
    tables = checked_tables(attention, inputs, sizes, needed=mask_tables(attention, counts))
    pairs = dense(attention, sizes, tables, counts)
    return pairs if any(t.batched for t in attention.inputs) or len(pairs) > 1 else pairs[0]


def tiles_of(
    attention: Attention,
    length: int,
    block_size: int = 128,
    q_length: int | None = None,
    heads: int = 1,
    inputs: Mapping[str, ArrayLike] = NO_TABLES,
) -> BlockMask:
    """`block_mask` of a call whose queries and keys stand at their places."""
    found = sizes_of(attention, length, q_length, heads)
    checked_block_size(block_size)
    return block_mask(attention, found, checked_tables(attention, inputs, found), block_size)


def sizes_of(
    attention: Attention,
    length: int,
    q_length: int | None,
    heads: int,
    q_offset: object = None,
    k_offset: object = None,
    q_positions: ArrayLike | None = None,
    k_positions: ArrayLike | None = None,
    n: int | None = None,
) -> Sizes:
    """The sizes of a call as users write it. Raises AttnError for what fits none."""
    keys = checked_length("length", length)
    nq = keys if q_length is None else checked_length("q_length", q_length)
    if checked_length("heads", heads) == 0:
        raise fail("`heads` is 0, and must be positive")
    q, k = axis("q", nq, q_offset, q_positions), axis("k", keys, k_offset, k_positions)
    inside = q_positions is not None or n is not None
    return sizes(attention, keys, nq, heads, q, k, n, inside)


def block_mask(attention: Attention, sizes: Sizes, tables: Mapping[str, Array], block_size: int) -> BlockMask:
    """The tiles, or the keys of few rows; equal masks are tiled once."""
    check_scores(attention, sizes, tables)
    nq, n_keys = sizes.q.length, sizes.k.length
    few = 0 < nq <= FEW_ROWS and n_keys > 0
    if few and (found := by_rows(attention, sizes, block_size)) is not None:
        return found
    from attndsl.tiles.tiling import tile

    different, index = told_apart(attention, sizes, tables)
    grids = [
        tile(case.mask, nq, n_keys, block_size, n=case.n, query=case.query, tables=case.tables)
        for case in different
    ]
    rows = tuple([Rows.of_dense(grid.to_dense(), block_size) for grid in grids]) if few else ()
    return BlockMask(
        nq, n_keys, block_size, rows or tuple(grids), index, tuple([case.mask for case in different])
    )


def told_apart(
    attention: Attention, sizes: Sizes, tables: Mapping[str, Array]
) -> tuple[list[ClosedMask], NDArray[np.int32]]:
    """The masks that differ, and which one each batch row and head has, as `BlockMask.index`."""
    every = list(cases(attention, sizes, tables))
    known: dict[tuple[object, ...], int] = {}
    different: list[ClosedMask] = []
    index: dict[tuple[int, int], int] = {}
    for case in every:
        contents = (
            tuple((name, a.shape, a.tobytes()) for name, a in case.tables.items()) if len(every) > 1 else ()
        )
        if (case.mask, contents) not in known:
            known[case.mask, contents] = len(different)
            different.append(case)
        index[case.row, case.head] = known[case.mask, contents]
    return different, _places(index)


def _places(index: Mapping[tuple[int, int], int]) -> NDArray[np.int32]:
    """[rows, heads] of what is given for each."""
    row, head = max(index, default=(0, 0))
    return np.array([[index.get((b, h), 0) for h in range(head + 1)] for b in range(row + 1)], np.int32)


def by_rows(attention: Attention, sizes: Sizes, block_size: int) -> BlockMask | None:
    """The live keys of each query where there are few, without a search for tiles; None for masks that read
    tables, draw or search."""
    functions = _row_functions(attention, sizes.heads)
    if functions is None:
        return None
    nq, n_keys = sizes.q.length, sizes.k.length
    known: dict[tuple[Spans, ...], int] = {}
    index: dict[tuple[int, int], int] = {}
    for row in range(sizes.rows if functions else 0):
        low, last = sizes.k.span(row)
        at = {
            "n": sizes.n[row % len(sizes.n)],
            "nq": nq,
            "b": row,
            "H": sizes.heads,
            LOW: low,
            HIGH: last + 1,
        }
        queries = sizes.q.positions(row).tolist()
        for head, keys in enumerate(functions):
            spans = tuple([entries(keys({**at, "h": head, "q": q}), sizes.k, row) for q in queries])
            index[row, head] = known.setdefault(spans, len(known))
    if not functions:
        q, k = np.arange(nq)[:, None], np.arange(n_keys)[None, :]
        for case in cases(attention, sizes, {}):
            live = np.broadcast_to(evaluate(case.mask, q, k, case.tables), (nq, n_keys))
            spans = tuple([intervals(row) for row in live])
            index[case.row, case.head] = known.setdefault(spans, len(known))
    masks = tuple([Rows(n_keys, block_size, spans) for spans in known])
    return BlockMask(nq, n_keys, block_size, masks, _places(index))


@functools.lru_cache(maxsize=256)
def _row_functions(attention: Attention, heads: int) -> tuple[Keys, ...] | None:
    """What gives the keys of a row, for each head or one for all; none where rows are evaluated key by key,
    None where not even that."""
    masks = [quantifier_free(group.relation.mask) for group in attention.groups]
    found = [keys for keys in map(keys_of, masks) if keys is not None]
    if len(found) == len(masks):
        by_head = len(found) > 1 or "h" in masks[0].free
        return tuple([found[group] for group in head_groups(attention, heads)[: None if by_head else 1]])
    return None if any(_searched(node) for mask in masks for node in ir.nodes(mask)) else ()


def _searched(node: Expr) -> bool:
    return node.op in ("random", "exists") or isinstance(node.value, Table)
