"""kv_cache: how long decoding reads each key, and the smallest cache that holds what is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.eviction import Eviction, eviction
from attndsl.analysis.lasting import over_length
from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line
from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.expr import ZERO, Expr, const, nodes, substitute, var
from attndsl.features import form_of
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask, TileGrid
from attndsl.tiles.tiling import tile

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[Any]

BLOCK_SIZE, LARGE_BLOCK_SIZE = 128, 1024
LARGE = 2**16
"""From so many tokens on, masks without tables and draws are read off larger tiles, which are fewer."""
HORIZON = 2**20
"""Most tokens that are tiled to find where a peak stops growing."""


WITHOUT = "if no query read a key after it, as decoding cannot"
"""What is assumed of a pattern that is not causal."""


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


def kv_cache(
    attention: Attention, length: int, *, heads: int = 1, inputs: Mapping[str, ArrayLike] = lowering.NO_TABLES
) -> Cache:
    """What decoding `length` tokens keeps; of the inputs those that the mask reads are needed.

    Raises AttnError as `attention.block_mask` does.
    """
    tiles = mask_tiles(attention, length, heads, inputs)
    last = np.stack([last_reads(grid) for grid in tiles.grids])
    peaks = [_peak(row) for row in last]
    by_head = [max((peaks[i] for i in column), key=_size) for column in tiles.index.T]
    widest = max(by_head, key=_size)
    unions = {tuple(set(row.tolist())) for row in tiles.index}
    union = max((_peak(last[list(i)].max(axis=0)) if len(i) > 1 else peaks[i[0]])[0] for i in unions)
    evictions = _evictions(attention, length, heads)
    bounded, formula, valid_for = _growth(list(dict(evictions).items()))
    return Cache(
        widest[0],
        length,
        widest[1] if widest[0] else None,
        _by_head([found.rule for _, found in evictions]),
        tuple(peak for peak, _ in by_head),
        union,
        not any(reads_ahead(grid) for grid in tiles.grids),
        bounded,
        formula,
        valid_for,
    )


def mask_tiles(attention: Attention, length: int, heads: int, inputs: Mapping[str, ArrayLike]) -> BlockMask:
    """The tiles of self attention; tables that no mask reads may be missing.

    Raises AttnError where queries stand at other positions than keys.
    """
    length, heads = (lowering.checked_length(*given) for given in (("length", length), ("heads", heads)))
    if attention.of_streams:
        raise fail(f"a cache is of tokens, and the keys of `{attention.name}` are streams")
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


def reads_ahead(grid: TileGrid) -> bool:
    """Whether a query reads a key after it."""
    row = grid.run_row
    if (grid.run_end > row).any():
        return True
    row = grid.part_row
    if (grid.part_col > row).any():
        return True
    inside = np.arange(grid.block_size)
    later = np.packbits(inside > inside[:, None], axis=1, bitorder="little")
    on_diagonal = np.unique(grid.part_mask[grid.part_col == row])
    return bool((grid.masks[on_diagonal] & later).any())


def _peak(last: Array) -> tuple[int, int]:
    """Most keys held at one step, and the first such step, given the last reader of each key."""
    key = np.arange(len(last))
    held = key <= last
    ends = np.bincount(last[held] + 1, minlength=len(last) + 1)
    counts = np.cumsum(held - ends[:-1])
    step = int(counts.argmax()) if len(counts) else 0
    return int(counts[step]) if len(counts) else 0, step


def _size(peak: tuple[int, int]) -> tuple[int, int]:
    """More keys first, then sooner."""
    return peak[0], -peak[1]


def _growth(masks: Sequence[tuple[Expr, Eviction]]) -> tuple[bool | None, str | None, str | None]:
    """Whether the greatest peak stops growing with n; it as a formula, and the lengths that are meant."""
    if any(found.everything for _, found in masks):
        return False, "n", "every n"
    bounded = [found.bounded for _, found in masks]
    if False in bounded or None in bounded:
        return (False if False in bounded else None), None, None
    limits = [_limit(mask, found.horizon) for mask, found in masks]
    known = [limit for limit in limits if limit is not None]
    if len(known) < len(limits):
        return True, None, None
    most = max(limit for limit, _ in known)
    start = min(n for limit, n in known if limit == most)
    return True, str(most), f"n >= {start}" if start else "every n"


@lru_cache(maxsize=256)
def _limit(mask: Expr, horizon: int | None) -> tuple[int, int] | None:
    """The peak at length `horizon`, and the least length that has it.

    In `mask` n only bounds the positions: a longer sequence has more readers, so peaks never fall.
    """
    if horizon is None or horizon > HORIZON:
        return None

    def peak(n: int) -> tuple[int, int]:
        at = substitute(mask, {"n": const(n)})
        return _peak(last_reads(tile(at, n, n, BLOCK_SIZE, n=n)))

    most, at = peak(horizon)
    low, high = at + 1 if most else 0, horizon
    while low < high:
        # mostly the query at the peak reads all that is held
        middle = low if low == at + 1 else (low + high) // 2
        if peak(middle)[0] == most:
            high = middle
        else:
            low = middle + 1
    return most, low


def _by_head(rules: list[str]) -> str:
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


def _evictions(attention: Attention, n: int, heads: int) -> list[tuple[Expr, Eviction]]:
    """The mask of each head, over q, k and maybe n, and how long it holds keys."""
    masks = [lowering.quantifier_free(group.relation.mask) for group in attention.groups]
    found = []
    for head, group in enumerate(lowering.head_groups(attention, heads)):
        constants = {"b": ZERO, "h": const(head), "H": const(heads), "nq": var("n")}
        mask = lowering.alone(substitute(masks[group], constants))
        found.append((mask, eviction(mask, n if "n" in mask.free else 0)))
    return found


def state_of(attention: Attention, problem: Problem) -> int | None:
    """Of features times values and of features: H m (D + 1), for values as wide as keys."""
    form = form_of(attention)
    if isinstance(form, str) or not form.constant_state or over_length(attention) or attention.streams:
        return None
    width = form.width(problem.head_dim)
    return None if width is None else problem.heads * width * (problem.head_dim + 1)


def _find(subject: Subject) -> Cache:
    p = subject.one_sequence
    found = kv_cache(subject.attention, p.length, heads=p.heads, inputs=subject.inputs)
    return replace(found, state=state_of(subject.attention, p))


def _text(found: Cache) -> Iterator[str]:
    yield "\nKV cache when decoding"
    if not found.causal:
        yield line("not causal", f"this is what would be kept {WITHOUT}")
    yield line("keys", f"{found.minimum:,} at most, of {found.full:,}")
    yield line("rule", found.rule)
    if found.bounded is not None:
        yield line("bounded", "yes, for every n" if found.bounded else "no, it grows with n")
    if len(found.per_head) > 1:
        yield line("by head", ", ".join(f"{keys:,}" for keys in found.per_head))
    if found.state is not None:
        yield line("state", f"{found.state:,} numbers of all heads in place of keys, whatever n")


CARDS = """
{% call card("keys kept to decode") %}
{{ fact("kv_cache", "minimum") }}<small>of {{ fact("kv_cache", "full") }}
{%- if not report.kv_cache.causal %}, if no query read a key after it{% endif %}</small>
{% endcall %}
"""

SECTION = (
    """
{% set it = report.kv_cache %}
<p>The smallest key-value cache holds {{ fact("kv_cache", "minimum") }} of {{ fact("kv_cache", "full") }} keys
{%- if it.at is not none %}, first at position {{ fact("kv_cache", "at") }}{% endif %}
{%- if it.formula %}; for {{ it.valid_for | relation }} it is
<span data-field="/kv_cache/formula">{{ it.formula | math }}</span>{% endif %}.
{% if it.bounded is not none %}
{{ "It stops growing with n." if it.bounded else "It grows with n." }}
{% endif %}
{% if it.state is not none %}
In place of keys {{ fact("kv_cache", "state") }} numbers of all heads do, whatever n.
{% endif %}
{% if not it.causal %}The pattern is not causal: this is what would be kept
"""
    + f"""{WITHOUT}.{{% endif %}}</p>
"""
    + """<p class="rule" data-field="/kv_cache/rule">{{ it.rule }}</p>
"""
)

part = Part(_find, _text, settled=False, place=80, title="Decoding", section=SECTION, cards=CARDS)
