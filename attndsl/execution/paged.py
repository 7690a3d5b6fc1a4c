"""Attention to keys and values in pages of a pool, as servers of language models keep them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.attention import Attention
from attndsl.axis import Axis
from attndsl.backend import Call, Pages, Problem
from attndsl.errors import fail, quantity
from attndsl.execution.lowered import Lowered, find
from attndsl.execution.operator import as_operator, attended, attended_in_pages, check_tangents, in_memory
from attndsl.tiles.blockmask import BlockMask, Rows, Spans
from attndsl.tiles.lowering import FEW_ROWS, Sizes
from attndsl.tiles.rows import both, either

Array = NDArray[np.int64]
POOL = "k_pool", "v_pool"


def attend(
    found: Lowered, q: Tensor, pages: Pages, lens: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of q [B, H, m, D], the last tokens of rows of these lengths; `tensors` as in
    `Lowered.tensors`."""
    check_tangents(q, pages.k, pages.v, *tensors)
    given = q, pages.k, pages.v, pages.table, lens
    if as_operator(*given, *tensors):
        # AOTInductor passes no empty list on
        out, lse = attend_paged(*given, [*tensors] or [q.new_empty(0)], found.identity)
        return out, lse
    return _attend(found, q, pages, lens, tensors)


@torch.library.custom_op("attndsl::attend_paged", mutates_args=())
def attend_paged(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, tensors: list[Tensor], identity: str
) -> tuple[Tensor, Tensor]:
    """The same as one operator, with what is in `Pages`; `identity` is that of a Lowered."""
    return _attend(find(identity, tensors), q, Pages(k, v, table), lens, tensors)


@attend_paged.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


def _attend(
    found: Lowered, q: Tensor, pages: Pages, lens: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    lengths = _checked_lengths(found.problem, q, pages, lens)
    out = q.new_zeros(*q.shape[:3], pages.v.shape[3])
    lse = out.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    attention, given, most = found.attention, found.named(tensors), max(lengths, default=0)
    for rows in _together(attention, lengths) if q.shape[2] else ():
        here = slice(None) if len(rows) == len(q) else torch.tensor(rows, device=q.device)
        some = [lengths[row] for row in rows]
        out[here], lse[here] = _attended(
            found,
            q[here],
            replace(pages, table=pages.table[here]),
            some,
            _tables(attention, given, here, most, max(some)),
        )
    return out, lse


def check_attention(attention: Attention) -> None:
    """Raises AttnError for one whose keys are more than what stands at their positions."""
    name, session = attention.name, "hold the keys in a session: `plan.session(batch, capacity)`"
    for table in (*attention.inputs, *attention.learned):
        if table.name in ("pool", "block_table", "lens"):
            raise fail(f"the table `{table.name}` has the name of an argument of `paged`", help="rename it")
    if attention.streams:
        raise fail(f"the keys of `{name}` are made of tokens, and are not those of pages", help=session)
    if attention.selected:
        raise fail(
            f"`{name}` chooses keys by what all of them hold, and pages are not searched", help=session
        )
    if attention.approx is not None:
        raise fail(f"`{attention.approx.kind}` is computed of all tokens at once, and takes no pages")


def checked_pages(problem: Problem, q: Tensor, pool: Any, block_table: Any, lens: Any) -> Pages:
    """The pages of queries that fit the problem. Raises AttnError for what does not fit them."""
    _check_integers("lens", lens)
    if lens.shape != q.shape[:1]:
        raise fail(f"`lens` is {[*lens.shape]}, and there are {quantity(len(q), 'batch row')}")
    if q.shape[2] > FEW_ROWS:
        raise fail(
            f"`q` has {q.shape[2]} tokens of a row, and pages are read by {FEW_ROWS} at most",
            help="call the plan for a prompt: its keys are at hand before they are in pages",
        )
    if not isinstance(pool, tuple | list) or len(pool) != 2:
        given, help = type(pool).__name__, ""
        if isinstance(pool, Tensor):
            given = f"{[*pool.shape]}"
            help = f"pass `pool.unbind({int(len(pool) != 2)})`" if pool.dim() == 5 else ""
        raise fail(f"`pool` is two tensors, of keys and of values, and was given as {given}", help=help)
    for name, x, width in zip(POOL, pool, (problem.head_dim, None), strict=True):
        if not isinstance(x, Tensor):
            raise fail(f"`{name}` must be a torch tensor, and is of type {type(x).__name__}")
        fits = x.dim() == 4 and x.shape[2] == problem.kv_heads and width in (None, x.shape[3])
        if not fits:
            wanted = f"[pages, page_size, {problem.kv_heads}, {width or 'features'}]"
            turned = x.dim() == 4 and x.shape[1] == problem.kv_heads
            help = f"pass `{name}.transpose(1, 2)`, which copies nothing" if turned else ""
            raise fail(f"`{name}` is {[*x.shape]}, and must be {wanted}", help=help)
        if (x.dtype, x.device) != (q.dtype, q.device):
            mine, other = (f"{str(y.dtype).removeprefix('torch.')} on {y.device}" for y in (x, q))
            raise fail(f"`{name}` is {mine}, and `q` is {other}")
    k, v = pool
    if k.shape[:2] != v.shape[:2] or k.shape[1] == 0:
        raise fail(
            f"`k_pool` is {[*k.shape]} and `v_pool` {[*v.shape]}: pages of keys and of values are alike"
        )
    _check_integers("block_table", block_table)
    if block_table.dim() != 2 or len(block_table) != len(q):
        raise fail(f"`block_table` is {[*block_table.shape]}, and must be [{len(q)}, pages of a row]")
    if block_table.device != q.device:
        raise fail(f"`block_table` is on {block_table.device}, and `q` is on {q.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise fail("attention to pages has no gradients", help="decode under `torch.no_grad()`")
    return Pages(k, v, block_table)


def _check_integers(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise fail(f"`{name}` must be a torch tensor, and is of type {type(x).__name__}")
    if x.dtype not in (torch.int32, torch.int64):
        raise fail(f"`{name}` is {str(x.dtype).removeprefix('torch.')}, and must be int32 or int64")


def _checked_lengths(problem: Problem, q: Tensor, pages: Pages, lens: Tensor) -> list[int]:
    """The tokens of each row, read here alone: a device waits for it."""
    lengths: list[int] = lens.tolist()
    new, room = q.shape[2], pages.size * pages.table.shape[1]
    for row, length in enumerate(lengths):
        if length < 0 or 0 < length < new:
            has = quantity(length, "token")
            raise fail(
                f"row {row} has {has} in `lens`, and {quantity(new, 'query', 'queries')} in `q`",
                help="`lens` counts the new tokens too",
            )
        if length > room:
            there = quantity(pages.table.shape[1], "page")
            raise fail(f"row {row} has {length} tokens, and its {there} hold {room}")
        if length > problem.length:
            raise fail(
                f"row {row} has {length} tokens, and the plan serves up to {problem.length}",
                help=f"compile with `length={length}`",
            )
    return lengths


def _together(attention: Attention, lengths: Sequence[int]) -> Iterator[list[int]]:
    """The rows that have tokens, in sets that one call serves: of a table over n each length is another."""
    by_length = any("n" in table.dims for table in attention.inputs)
    sets: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            sets.setdefault(length if by_length else 1, []).append(row)
    yield from sets.values()


def _tables(
    attention: Attention, given: Mapping[str, Tensor], rows: Any, most: int, n: int
) -> dict[str, Tensor]:
    """Those of some rows of n tokens; `most` is what the longest row has, and tables over n."""
    found = dict(given)
    for table in attention.inputs:
        x = found[table.name]
        if table.batched and len(x) > 1:
            x = x[rows]
        if x.dim() == len(table.dims):
            for axis, size in enumerate(table.dims):
                x = x.narrow(axis, 0, n) if size == "n" and x.shape[axis] == most else x
        found[table.name] = x
    return found


def _attended(
    found: Lowered, q: Tensor, pages: Pages, lengths: Sequence[int], given: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of rows that have tokens, in one call."""
    q, given = in_memory(q), {name: in_memory(x) for name, x in given.items()}
    pages = replace(pages, k=in_memory(pages.k), v=in_memory(pages.v))
    longest, new = max(lengths), q.shape[2]
    each = tuple(lengths[:1]) if len(set(lengths)) == 1 else tuple(lengths)
    starts = [length - new for length in each]
    sizes = Sizes(q.shape[1], Axis.starting(new, starts), Axis.starting(longest, (0,)), each)
    k, v = (x.new_empty(len(q), x.shape[2], longest, x.shape[3], device="meta") for x in (pages.k, pages.v))
    call = found.call_of(q, k, v, given, sizes)
    read = _read(call.block_mask, each)
    if not read.keys.length:
        empty = q.new_zeros(*q.shape[:3], v.shape[3])
        return empty, torch.full_like(empty[..., 0], -torch.inf)
    at = _places(read, pages)
    in_pages = attended_in_pages(found, replace(call, tiles=lambda: read.at_positions), pages)
    return in_pages or attended(found, _gathered(call, read, pages, at))


def _places(read: Read, pages: Pages) -> tuple[Tensor, Tensor]:
    """The page and the place in it of each entry, int64 [B, entries]; of a row that reads nothing any. Raises
    AttnError for a page that there is not."""
    entries = torch.from_numpy(read.entries).to(pages.table.device)
    there = (entries.clamp(min=0) // pages.size).expand(len(pages.table), -1)
    page = pages.table.long().gather(1, there).masked_fill(entries < 0, 0)
    wrong = (page < 0) | (page >= len(pages.k))
    if wrong.any():
        row, entry = wrong.nonzero()[0].tolist()
        at = int(read.entries[row % len(read.entries), entry])
        raise fail(
            f"`block_table[{row}, {at // pages.size}]` is {int(page[row, entry])}, and the pool has "
            f"{quantity(len(pages.k), 'page')}",
            help=f"a query reads position {at} of this row",
        )
    return page, entries % pages.size


def _gathered(call: Call, read: Read, pages: Pages, at: tuple[Tensor, Tensor]) -> Call:
    """With the keys and values that are read side by side."""
    k, v = (x[at].transpose(1, 2) for x in (pages.k, pages.v))
    return replace(call, k=k, v=v, k_at=read.keys, tiles=lambda: read.at_entries)


_known: WeakKeyDictionary[BlockMask, Read] = WeakKeyDictionary()
"""Of the masks of the last few calls: all layers of a step have one."""


def _read(blocks: BlockMask, lengths: Sequence[int]) -> Read:
    found = _known.get(blocks)
    if found is None:
        found = _known[blocks] = Read.of(blocks, lengths)
    return found


@dataclass(frozen=True, eq=False)
class Read:
    """Which keys of a call some query reads, of each row of its mask.

    at_positions  the mask over positions, none of which is behind the tokens of a row
    entries       int64 [rows, most keys]: the positions that are read, and behind them the last of them
                  again; -1 where there is none
    keys          where these keys stand. Those behind them go on from there, for adjacent keys are less work
    at_entries    the mask over entries
    """

    at_positions: BlockMask
    entries: Array
    keys: Axis
    at_entries: BlockMask

    @staticmethod
    def of(blocks: BlockMask, lengths: Sequence[int]) -> Read:
        """Of the mask of rows of these lengths over positions from 0 on."""
        rows, size = blocks.rows or (), blocks.block_size
        many = max(len(blocks.index), len(lengths))
        index, each = (np.broadcast_to(x, (many, *np.shape(x)[1:])).tolist() for x in (blocks.index, lengths))
        inside = [
            [tuple([both(spans, ((0, length),)) for spans in rows[i].spans]) for i in masks]
            for masks, length in zip(index, each, strict=True)
        ]
        read = [either([span for mask in masks for span in mask]) for masks in inside]
        most = max(sum(stop - start for start, stop in spans) for spans in read)
        listed = [_listed(spans, most) for spans in read]
        places = tuple([_pieces(spans) for spans in read])
        moved = [
            [tuple([_moved(spans, there) for spans in mask]) for mask in masks]
            for masks, there in zip(inside, read, strict=True)
        ]
        return Read(
            _mask(inside, blocks.n, size),
            np.stack(listed),
            Axis(most, places[:1] if len(set(places)) == 1 else places),
            _mask(moved, most, size),
        )


def _mask(masks: Sequence[Sequence[tuple[Spans, ...]]], n: int, block_size: int) -> BlockMask:
    """Of the keys of each query, [row][head][query]."""
    known: dict[tuple[Spans, ...], int] = {}
    index = [[known.setdefault(mask, len(known)) for mask in heads] for heads in masks]
    found = tuple([Rows(n, block_size, spans) for spans in known])
    return BlockMask(len(masks[0][0]), n, block_size, found, np.array(index, np.int32))


def _listed(spans: Spans, most: int) -> Array:
    """What is in them, and the last of it again up to so many; -1 where there is nothing."""
    if not spans:
        return np.full(most, -1)
    found = np.concatenate([np.arange(*span) for span in spans])
    return np.pad(found, (0, most - len(found)), mode="edge")


def _pieces(spans: Spans) -> tuple[tuple[int, int], ...]:
    """Where what is in them stands, as the row of an Axis."""
    if not spans:
        return ((0, 0),)
    sizes = [stop - start for start, stop in spans]
    return tuple(zip(np.cumsum([0, *sizes[:-1]]).tolist(), [start for start, _ in spans], strict=True))


def _moved(spans: Spans, there: Spans) -> Spans:
    """Positions, which lie in the intervals `there`, as entries of what those list."""
    first, starts = np.array(_pieces(there), np.int64).reshape(-1, 2).T
    which = np.searchsorted(starts, [start for start, _ in spans], side="right") - 1
    shift = (first - starts)[which].tolist()
    return either([tuple([(a + by, b + by) for (a, b), by in zip(spans, shift, strict=True)])])
