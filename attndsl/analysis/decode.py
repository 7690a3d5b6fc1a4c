"""kv_cache: how long decoding reads each key, and the smallest cache that holds what is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.eviction import Eviction, eviction
from attndsl.analysis.holding import (
    BLOCK_SIZE,
    Cache,
    by_head_of,
    first_most,
    last_reads,
    mask_tiles,
    masks_by_head,
    peak,
)
from attndsl.analysis.lasting import over_length
from attndsl.analysis.part import Part, Subject
from attndsl.analysis.streamcache import cache_of_streams
from attndsl.analysis.text import line
from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.expr import Expr, const, substitute
from attndsl.features import form_of
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import TileGrid
from attndsl.tiles.tiling import tile

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[Any]

HORIZON = 2**20
"""Most tokens that are tiled to find where a peak stops growing."""


WITHOUT = "if no query read a key after it, as decoding cannot"
"""What is assumed of a pattern that is not causal."""


def kv_cache(
    attention: Attention, length: int, *, heads: int = 1, inputs: Mapping[str, ArrayLike] = lowering.NO_TABLES
) -> Cache:
    """What decoding `length` tokens keeps; of the inputs those that the mask reads are needed.

    Raises AttnError as `attention.block_mask` does, and for streams that are not proved to be causal.
    """
    if attention.of_streams:
        return cache_of_streams(attention, length, heads, inputs)
    tiles = mask_tiles(attention, length, heads, inputs)
    last = np.stack([last_reads(grid) for grid in tiles.grids])
    peaks = [peak(np.arange(len(row)), row) for row in last]
    by_head = [max((peaks[i] for i in column), key=first_most) for column in tiles.index.T]
    widest = max(by_head, key=first_most)
    unions = {tuple(set(row.tolist())) for row in tiles.index}
    key = np.arange(length)
    union = max((peak(key, last[list(i)].max(axis=0)) if len(i) > 1 else peaks[i[0]])[0] for i in unions)
    evictions = _evictions(attention, length, heads)
    bounded, formula, valid_for = _growth(list(dict(evictions).items()))
    return Cache(
        widest[0],
        length,
        widest[1] if widest[0] else None,
        by_head_of([found.rule for _, found in evictions]),
        tuple(peak for peak, _ in by_head),
        union,
        not any(reads_ahead(grid) for grid in tiles.grids),
        bounded,
        formula,
        valid_for,
    )


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

    def peak_at(n: int) -> tuple[int, int]:
        at = substitute(mask, {"n": const(n)})
        return peak(np.arange(n), last_reads(tile(at, n, n, BLOCK_SIZE, n=n)))

    most, at = peak_at(horizon)
    low, high = at + 1 if most else 0, horizon
    while low < high:
        # mostly the query at the peak reads all that is held
        middle = low if low == at + 1 else (low + high) // 2
        if peak_at(middle)[0] == most:
            high = middle
        else:
            low = middle + 1
    return most, low


def _evictions(attention: Attention, n: int, heads: int) -> list[tuple[Expr, Eviction]]:
    """The mask of each head, over q, k and maybe n, and how long it holds keys."""
    return [(mask, eviction(mask, n if "n" in mask.free else 0)) for mask in masks_by_head(attention, heads)]


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
    if found.by_stream is not None:
        yield line("of these", ", ".join(f"{keys:,} {name}" for name, keys in found.by_stream.items()))
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
{%- if it.by_stream %} (
{%- for name in it.by_stream %}{{ fact("kv_cache", "by_stream", name) }} {{ name }}{{ ", " if not loop.last }}
{%- endfor %})
{%- endif %}
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

part = Part(
    _find, _text, settled=False, place=80, title="Decoding", section=SECTION, cards=CARDS, streams=True
)
