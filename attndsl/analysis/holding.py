"""How long decoding holds keys: until their last readers, which tiles tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.expr import ZERO, Expr, const, nodes, substitute, var
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask, TileGrid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[Any]

BLOCK_SIZE, LARGE_BLOCK_SIZE = 128, 1024
LARGE = 2**16
"""From so many tokens on, masks without tables and draws are read off larger tiles, which are fewer."""


@dataclass(frozen=True)
class Cache:
    """The smallest KV cache that decoding needs: counts are of keys, of one layer, head and batch row.

    While the query at position q is computed the keys 0 .. q exist, and key k is held if some query at
    q .. n - 1 reads it. `n` in a mask is the final one.

    minimum     most keys held at one step, by the head and batch row that hold most
    full        keys of a cache that drops nothing: n
    at          first step at which `minimum` keys are held; None where no key ever is
    rule        which keys are kept, derived from the relation for every n, or for that said first in it
    per_head    the peak of each head, a single entry where all heads are alike
    union       the peak of the keys that at least one head holds: what heads sharing their keys need
    causal      False where a query reads a key after it, which decoding cannot: such reads do not count
    bounded     whether `minimum` stops growing with n, proved for every n and table; None is undecided
    formula     `minimum` in n where that is a constant or n itself, as sympy reads it
    valid_for   the lengths for which it holds
    state       numbers, of all heads, that stand for all keys in a session; None where keys are kept
    by_stream   of an attention with `keys` what `minimum` is made of, in words. There memory is held from the
                first step on, a slot from the last of its tokens on, and a token until all slots of it are
                made too; `full` are tokens, memory and slots
    """

    minimum: int
    full: int
    at: int | None
    rule: str
    per_head: tuple[int, ...]
    union: int
    causal: bool
    bounded: bool | None
    formula: str | None = None
    valid_for: str | None = None
    state: int | None = None
    by_stream: Mapping[str, int] | None = None


def mask_tiles(attention: Attention, length: int, heads: int, inputs: Mapping[str, ArrayLike]) -> BlockMask:
    """The tiles of self attention, of streams those of entries; tables that no mask reads may be missing.

    Raises AttnError where queries stand at other positions than keys.
    """
    length, heads = (lowering.checked_length(*given) for given in (("length", length), ("heads", heads)))
    sizes = lowering.sizes(attention, length, length, heads)
    if sizes.q.starts != (0,):
        raise fail(f"queries of `{attention.name}` start at position {sizes.q.span(0)[0]}, and keys at 0")
    tables = lowering.checked_tables(attention, inputs, sizes)
    masks = [group.relation.mask for group in attention.groups]
    drawn = any(node.op == "random" for mask in masks for node in nodes(mask))
    scattered = drawn or lowering.mask_tables(attention)
    size = BLOCK_SIZE if scattered or length < LARGE else LARGE_BLOCK_SIZE
    return lowering.block_mask(attention, sizes, tables, size)


def last_reads(grid: TileGrid) -> Array:
    """The last row that reads each key, -1 where none does: int64 [n]."""
    size, cols = grid.block_size, grid.shape[1]
    found = np.full((cols, size), -1, np.int64)
    row = grid.run_row
    found[:] = (_last_over(grid.run_start, grid.run_end, row, cols) + 1)[:, None] * size - 1
    row = grid.part_row
    # rows rise, so that of equal pairs the first from behind is the last
    pair, at = np.unique(
        (grid.part_col.astype(np.int64) * max(len(grid.masks), 1) + grid.part_mask)[::-1], return_index=True
    )
    if len(pair):
        col, content = pair // len(grid.masks), pair % len(grid.masks)
        inside = _last_rows(grid.masks)[content]
        reads = np.where(inside < 0, -1, row[::-1][at][:, None] * size + inside)
        starts = np.flatnonzero(np.diff(col, prepend=-1))
        col = col[starts]
        found[col] = np.maximum(found[col], np.maximum.reduceat(reads, starts, axis=0))
    return found.ravel()[: grid.n]


def _last_over(start: Array, end: Array, row: Array, cols: int) -> Array:
    """The greatest `row` of the intervals [start, end) over each of `cols` places, -1 where there is none.

    Row 5 over [0, 3) and row 1 over [2, 4):  5 5 5 1
    An interval is two overlapping ones of 2^i places; they are spread to halves from the longest down.
    """
    level = np.frexp(end - start)[1] - 1
    spread = np.full(cols, -1, np.int64)
    for i in range(int(level.max(initial=0)), -1, -1):
        half = 2**i
        spread[half:] = np.maximum(spread[half:], spread[: cols - half])
        chosen = level == i
        for first in (start[chosen], end[chosen] - 2**i):
            np.maximum.at(spread, first, row[chosen])
    return spread


def _last_rows(masks: Array) -> Array:
    """The last row of each content that reads each of its keys, -1 where none does: int64 [U, B]."""
    count, size, _ = masks.shape
    last = np.full((count, size), -1)
    for row in range(size):
        bits = np.unpackbits(masks[:, row], axis=1, bitorder="little").view(bool)
        np.copyto(last, row, where=bits)
    return last


def peak(start: Array, last: Array) -> tuple[int, int]:
    """Most keys held at one step, and the first such step, given the step from which on each can be held and
    its last reader."""
    held = start <= last
    steps = int(last.max(initial=0)) + 2
    counts = np.cumsum(
        np.bincount(start[held], minlength=steps) - np.bincount(last[held] + 1, minlength=steps)
    )
    step = int(counts.argmax())
    return int(counts[step]), step


def first_most(peak: tuple[int, int]) -> tuple[int, int]:
    """More keys first, then sooner."""
    return peak[0], -peak[1]


def by_head_of(rules: list[str]) -> str:
    """Rules with the heads that follow them, unless all follow one."""
    if len(set(rules)) == 1:
        return rules[0]
    parts = []
    for rule in dict.fromkeys(rules):
        at = np.array([h for h, other in enumerate(rules) if other == rule])
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        listed = ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
        parts.append(f"head{'s' * (len(at) > 1)} {listed}: {rule}")
    return "; ".join(parts)


def masks_by_head(attention: Attention, heads: int) -> Iterator[Expr]:
    """Over q, k and maybe n."""
    masks = [lowering.quantifier_free(group.relation.mask) for group in attention.groups]
    for head, group in enumerate(lowering.head_groups(attention, heads)):
        constants = {"b": ZERO, "h": const(head), "H": const(heads), "nq": var("n")}
        yield lowering.alone(substitute(masks[group], constants))
