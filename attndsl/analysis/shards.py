"""shards: a sequence divided among ranks, the keys that each lacks, what sending them costs, the balance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.holding import mask_tiles
from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import table
from attndsl.analysis.units import scaled
from attndsl.attention import Attention
from attndsl.backend import DTYPES, Problem
from attndsl.errors import fail
from attndsl.tiles.blockmask import BlockMask, TileGrid
from attndsl.tiles.lowering import NO_TABLES, checked_length, mask_tables

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[Any]

BITS_LIMIT = 2**32
"""Ranks times keys."""
BYTES = 2**26
"""Bytes of tiles that are taken apart at once."""


@dataclass(frozen=True)
class Shard:
    """What one way of dividing n tokens among P ranks costs; a rank holds queries, keys and values of its
    tokens. Bytes are of keys and values, over all ranks and key heads; heads and batch rows with one mask
    count as the attention's masks do: a batch row stands for all unless a table differs by row.

    keys        for each rank the distinct keys of others that some query and head of it reads, summed over
                batch rows
    bytes       sent if each rank gets just what each of its key heads lacks
    all_gather  sent if each rank gets all keys of all others: (P - 1) n keys, (P - 1) / P n by rank
    ring        sent by passing the shards on from rank to rank, each hop moving all n keys, until the last
                hop that brings a rank something it reads (Liu, Zaharia and Abbeel 2023, ring attention)
    ring_hops   hops until then, at most P - 1
    balance     most live pairs of a rank / their mean over the ranks; 1 where there are none
    """

    scheme: str
    ranks: int
    keys: tuple[int, ...]
    bytes: int
    all_gather: int
    ring: int
    ring_hops: int
    balance: float

    def times(self, rows: int) -> Shard:
        """For `rows` batch rows alike."""
        return replace(
            self,
            keys=tuple([rows * keys for keys in self.keys]),
            bytes=rows * self.bytes,
            all_gather=rows * self.all_gather,
            ring=rows * self.ring,
        )


def contiguous(n: int, ranks: int, block: int) -> Array:
    """Rank r holds the r-th piece of ceil(n / P) tokens; the last pieces are shorter, or empty."""
    return np.arange(n) // max(-(-n // ranks), 1)


def striped(n: int, ranks: int, block: int) -> Array:
    """Token t is on rank t mod P: Brandon et al. 2023, striped attention."""
    return np.arange(n) % ranks


def block_striped(n: int, ranks: int, block: int) -> Array:
    """Blocks of `block` tokens in turn."""
    return np.arange(n) // block % ranks


def zigzag(n: int, ranks: int, block: int) -> Array:
    """Of 2P pieces of ceil(n / 2P) tokens rank r holds r and 2P - 1 - r: Llama 3 report 2024, 3.3.2."""
    piece = np.arange(n) // max(-(-n // (2 * ranks)), 1)
    return np.minimum(piece, 2 * ranks - 1 - piece)


SCHEMES: dict[str, Callable[[int, int, int], Array]] = {
    "contiguous": contiguous,
    "striped": striped,
    "block-striped": block_striped,
    "zigzag": zigzag,
}
"""The rank of each of n tokens, int64 [n]."""


def shards(
    attention: Attention,
    length: int,
    ranks: int,
    *,
    heads: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    block_size: int = 128,
    inputs: Mapping[str, ArrayLike] = NO_TABLES,
) -> tuple[Shard, ...]:
    """One for each of SCHEMES; `block_size` is the tokens of a block that block-striping keeps together.

    Of the inputs those that the masks read are needed. There may be more ranks than tokens.
    Raises AttnError for no rank, sizes that do not fit, and as `attention.block_mask` does.
    """
    problem = Problem.of(
        attention,
        length=length,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        block_size=block_size,
    )
    if checked_length("ranks", ranks) == 0:
        raise fail("`ranks` is 0, and must be positive")
    if ranks * length > BITS_LIMIT:
        raise fail(f"{ranks:,} ranks times {length:,} keys; the limit is {BITS_LIMIT:,}")
    if attention.of_streams:
        raise fail(f"ranks hold tokens, and the keys of `{attention.name}` are streams")
    tiles = mask_tiles(attention, length, heads, inputs)
    pairs = [grid.row_counts() for grid in tiles.grids]
    live = np.sum([pairs[i] for i in tiles.index.ravel()], axis=0)
    number = 2 * head_dim * DTYPES[dtype]
    found = []
    for scheme, owner_of in SCHEMES.items():
        owner = owner_of(length, ranks, block_size)
        moved, sent = _traffic(tiles, owner, ranks, problem.kv_heads)
        to, source = np.nonzero(moved)
        hops = int(((to - source) % ranks).max(initial=0))
        everything = length * problem.kv_heads * len(tiles.index) * number
        work = np.bincount(owner, live, ranks)
        balance = float(work.max() / work.mean()) if work.any() else 1.0
        keys = tuple(moved.sum(axis=1).tolist())
        found.append(
            Shard(
                scheme, ranks, keys, sent * number, (ranks - 1) * everything, hops * everything, hops, balance
            )
        )
    return tuple(found)


def _traffic(tiles: BlockMask, owner: Array, ranks: int, kv_heads: int) -> tuple[Array, int]:
    """How many keys of rank s rank r lacks for some head, int64 [r, s], summed over batch rows; and how many
    keys of one head are sent if each key head gets what its query heads read."""
    needed = [needed_keys(grid, owner, ranks) for grid in tiles.grids]

    @cache
    def lacked(grids: frozenset[int]) -> Array:
        counts = np.zeros((ranks, ranks), np.int64)
        for rank, bits in enumerate(np.bitwise_or.reduce([needed[i] for i in grids], axis=0)):
            read = np.unpackbits(bits, count=len(owner), bitorder="little").view(bool)
            counts[rank] = np.bincount(owner[read], minlength=ranks)
        np.fill_diagonal(counts, 0)
        return counts

    moved, sent = np.zeros((ranks, ranks), np.int64), 0
    for row in tiles.index:
        moved += lacked(frozenset(row.tolist()))
        groups = row.reshape(kv_heads, -1) if len(row) > 1 else [row] * kv_heads
        sent += sum(int(lacked(frozenset(group.tolist())).sum()) for group in groups)
    return moved, sent


def needed_keys(grid: TileGrid, owner: Array, ranks: int) -> Array:
    """The keys that some row of each rank reads: packed bits uint8 [ranks, n rounded up to tiles / 8].

    owner: the rank of each row and key, int64 [n].
    """
    size, (rows, cols) = grid.block_size, grid.shape
    padded = np.full((rows, size), -1)
    padded.flat[: grid.nq] = owner
    numbers: dict[bytes, int] = {}
    seen = [numbers.setdefault(row.tobytes(), len(numbers)) for row in padded]
    pattern_of = np.array(seen, np.int64)
    patterns = padded[np.unique(pattern_of, return_index=True)[1]]
    needed = np.zeros((ranks, cols, size // 8), np.uint8)
    row = pattern_of[grid.run_row]
    part_row = pattern_of[grid.part_row]
    contents = max(len(grid.masks), 1)
    parts = np.unique(part_row * contents * cols + grid.part_col.astype(np.int64) * contents + grid.part_mask)
    starts = np.searchsorted(parts, np.arange(len(patterns) + 1) * contents * cols)
    for i, pattern in enumerate(patterns):
        order = np.argsort(pattern, kind="stable")
        here, first = np.unique(pattern[order], return_index=True)
        here, first = here[here >= 0], first[here >= 0]
        edges = np.bincount(grid.run_start[row == i], minlength=cols + 1)
        edges -= np.bincount(grid.run_end[row == i], minlength=cols + 1)
        needed[np.ix_(here, np.cumsum(edges[:-1]) > 0)] = 255
        col, content = np.divmod(parts[starts[i] : starts[i + 1]] - i * contents * cols, contents)
        used, content = np.unique(content, return_inverse=True)
        for chunk in np.array_split(np.arange(len(used)), 1 + len(used) * size**2 // 8 // BYTES):
            unions = np.bitwise_or.reduceat(grid.masks[used[chunk]][:, order], first, axis=1)
            here_too = np.isin(content, chunk)
            _spread(needed, here, col[here_too], unions, content[here_too] - chunk[:1])
    return needed.reshape(ranks, cols * size // 8)


def _spread(needed: Array, here: Array, col: Array, unions: Array, content: Array) -> None:
    """Adds what these ranks read in tiles of rising columns: unions uint8 [contents, ranks here, B / 8]."""
    step = max(1, BYTES // max(unions[:1].nbytes, 1))
    for begin in range(0, len(col), step):
        part = col[begin : begin + step]
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        read = np.bitwise_or.reduceat(unions[content[begin : begin + step]], starts, axis=0)
        needed[np.ix_(here, part[starts])] |= read.transpose(1, 0, 2)


def _find(subject: Subject) -> tuple[Shard, ...]:
    p = subject.one_sequence
    found = shards(
        subject.attention, p.length, subject.ranks, heads=p.heads, kv_heads=p.kv_heads, head_dim=p.head_dim,
        dtype=p.dtype, block_size=p.block_size, inputs=subject.inputs,
    )  # fmt: skip
    # batch rows with one mask are counted once
    alike = not any(table.batched for table in mask_tables(subject.attention))
    return tuple([shard.times(p.batch if alike else 1) for shard in found])


def _text(found: tuple[Shard, ...]) -> Iterator[str]:
    yield f"\n{found[0].ranks} ranks"
    yield table(
        ["", "fetched", "sent", "all-gather", "ring", "load max/mean"],
        [
            [s.scheme, f"{max(s.keys):,}", *(scaled(b, "B") for b in (s.bytes, s.all_gather, s.ring)),
             f"{s.balance:.3g}"]
            for s in found
        ],
    )  # fmt: skip


SECTION = """
{% call table("Keys, values and work divided among ranks") %}
{{ heads(["", "ranks", "keys fetched at most", "sent", "by all-gather", "by a ring", "hops", "balance"]) }}
<tbody>
{% for it in report.shards %}
{% set i = loop.index0 %}
{% set most = it["keys"].index(it["keys"] | max) %}
<tr><th scope="row">{{ it.scheme }}</th>
<td>{{ fact("shards", i, "ranks") }}</td><td>{{ fact("shards", i, "keys", most) }}</td>
{% for name in ("bytes", "all_gather", "ring") %}
<td>{{ fact("shards", i, name, unit="bytes") }}</td>
{% endfor %}
<td>{{ fact("shards", i, "ring_hops") }}</td><td>{{ fact("shards", i, "balance", unit="ratio") }}</td></tr>
{% endfor %}
</tbody>
{% endcall %}
<p class="hint">Balance is the largest number of live pairs of a rank over the mean: 1 is even.</p>
"""

part = Part(_find, _text, settled=False, place=90, title="Sharding", section=SECTION, streams=True)
