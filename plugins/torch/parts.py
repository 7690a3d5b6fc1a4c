"""A TileGrid taken apart into batches of equal problems that run on views or gathers of the keys.

Every live pair lies in exactly one part; the parts of a query row are merged by log-sum-exp.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import Rows, TileGrid
from attndsl.tiles.lowering import FEW_ROWS

FULL = -1
STRETCH = 4
"""Rows of tiles that must agree before a stretch is worth a call of its own."""
LONG = 32
"""Tiles of a full run from which it becomes a part without a mask."""
WIDE = 64
"""Tiles of the widest shared mask."""
GATHER = 16
"""Tiles gathered at most for one row at a time."""
PADDING = 8
"""Tiles of padding for which two batches of gathered rows become one."""
RUNS = 16
"""Runs of keys of few rows up to which each is a part."""
FINEST = 32
"""Tokens of a side below which tiles are not cut further."""

Bool = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Strided:
    """`count` problems: the c-th pairs `q_len` queries from q0 + c * q_step with `k_len` keys from
    k0 + c * k_step, under one mask (None: all live)."""

    q0: int
    q_len: int
    q_step: int
    k0: int
    k_len: int
    k_step: int
    count: int
    mask: Bool | None


@dataclass(frozen=True, eq=False)
class Gathered:
    """Problems of `q_len` queries from rows[c], in tokens, with the tiles cols[c] of the keys.

    contents [M, T] indexes `masks` [U, block, block]; None where every tile is full.
    """

    rows: NDArray[np.int64]
    q_len: int
    block: int
    cols: NDArray[np.int64]
    contents: NDArray[np.int64] | None
    masks: Bool


Part = Strided | Gathered


def take_apart(grid: TileGrid, unit: int) -> tuple[Part, ...]:
    """The parts; masks of stretches are cut into pieces of `unit` query rows with trimmed keys."""
    if grid.nq <= FEW_ROWS:
        runs = Rows.of_dense(grid.to_dense(), grid.block_size).runs
        if len(runs) <= RUNS:
            return tuple([Strided(0, grid.nq, 0, a, b - a, 0, 1, mask) for a, b, mask in runs])
    masks = np.unpackbits(grid.masks, axis=-1, bitorder="little").astype(bool)
    entries, block = _entries(grid), grid.block_size
    while block >= 2 * FINEST and (finer := _halved(entries, masks)) is not None:
        (entries, masks), block = finer, block // 2
    parts: list[Part] = []
    entries, level = _level_rows(entries, masks, block)
    parts.extend(level)
    entries, stairs = _staircases(entries, block)
    parts.extend(stairs)
    regular, long, rest = _sort_out(grid, block, entries)
    for stretch in regular:
        parts.extend(_cut(stretch, masks, block, unit if block % unit == 0 else block))
    parts.extend(_long_parts(long, block))
    parts.extend(_gather(rest, masks, block, grid.nq, grid.n))
    return tuple(parts)


def _halved(entries: NDArray[np.int64], masks: Bool) -> tuple[NDArray[np.int64], Bool] | None:
    """The same in tiles of half the side, if that leaves few of them partial: a mask of smaller blocks."""
    count, half = len(masks), masks.shape[1] // 2
    quarters = masks.reshape(count, 2, half, 2, half).swapaxes(2, 3)
    full, live = (np.asarray(x) for x in (quarters.all((3, 4)), quarters.any((3, 4))))
    mixed = live & ~full
    contents = np.where(full, FULL, np.arange(4 * count).reshape(count, 2, 2))
    runs, partial = entries[entries[:, 3] == FULL], entries[entries[:, 3] != FULL]
    if not len(partial) or mixed[partial[:, 3]].mean() > 1 / 8:
        return None
    finer = [runs * (2, 2, 2, 1), runs * (2, 2, 2, 1) + (1, 0, 0, 0)]
    for r, c in np.ndindex(2, 2):
        row, col, _, m = partial[live[partial[:, 3], r, c]].T
        finer.append(np.stack([2 * row + r, 2 * col + c, 2 * col + c + 1, contents[m, r, c]], axis=1))
    found = np.concatenate(finer)
    found = found[np.lexsort((found[:, 1], found[:, 0]))]
    before, after = found[:-1], found[1:]
    joined = (before[:, 0] == after[:, 0]) & (before[:, 2] == after[:, 1])
    joined &= (before[:, 3] == FULL) & (after[:, 3] == FULL)
    first = np.flatnonzero(np.r_[True, ~joined])
    result = found[first]
    result[:, 2] = found[np.r_[first[1:] - 1, len(found) - 1], 2]
    return result, quarters.reshape(-1, half, half)


def _level_rows(entries: NDArray[np.int64], masks: Bool, block: int) -> tuple[NDArray[np.int64], list[Part]]:
    """Rows that keep the same few queries over many tiles, such as global queries, and the entries left."""
    row, start, end, contents = entries.T
    level = np.r_[(masks == masks[:, :, :1]).all((1, 2)), False][contents]
    joined = (row[1:] == row[:-1]) & (start[1:] == end[:-1]) & (contents[1:] == contents[:-1])
    first = np.flatnonzero(np.r_[True, ~joined][: len(entries)])
    tiles = np.diff(np.r_[first, len(entries)])
    long = level[first] & (tiles >= STRETCH)
    parts: list[Part] = []
    chosen = np.stack([row[first], start[first], contents[first], tiles], axis=1)[long]
    for i, a, m, count in chosen.tolist():
        for lo, hi in _intervals(masks[m][:, 0]):
            parts.append(Strided(i * block + lo, hi - lo, 0, a * block, count * block, 0, 1, None))
    taken = np.repeat(long, tiles)
    return entries[~taken], parts


def _staircases(entries: NDArray[np.int64], block: int) -> tuple[NDArray[np.int64], list[Part]]:
    """Runs that begin at one column and grow by a tile a row, as those of causal masks, and the entries left.

    A triangle of tiles is squares of h tiles a side for h = 1, 2, 4 ...: row i has the columns below i, those
    of a square for each digit 1 of i. So there are few parts, all on views."""
    row, start, end, contents = entries.T
    order = np.lexsort((row, start, contents))
    order = order[: int((contents == FULL).sum())]
    row, start, end = row[order], start[order], end[order]
    breaks = (np.diff(row) != 1) | (np.diff(start) != 0) | (np.diff(end) != 1)
    edges = np.flatnonzero(np.r_[True, breaks, True]) if len(row) else np.zeros(1, np.int64)
    taken = np.zeros(len(entries), bool)
    parts: list[Part] = []
    for first, last in pairwise(edges.tolist()):
        rows = last - first
        if rows < STRETCH:
            continue
        taken[order[first:last]] = True
        top, a, b = row[first].item(), start[first].item(), end[first].item()
        parts.append(Strided(top * block, rows * block, 0, a * block, (b - a) * block, 0, 1, None))
        h = 1
        while h < rows:
            whole, left = divmod(rows, 2 * h)
            for j, count, height in ((0, whole, h), (whole, int(left > h), left - h)):
                if count:
                    q0, k0, step = top + (2 * j + 1) * h, b + 2 * j * h, 2 * h * block if count > 1 else 0
                    q_len, k_len = height * block, h * block
                    parts.append(Strided(q0 * block, q_len, step, k0 * block, k_len, step, count, None))
            h *= 2
    return entries[~taken], parts


def _entries(grid: TileGrid) -> NDArray[np.int64]:
    """[E, 4]: tile row, first column, one past the last, contents (FULL of a run); by row and column."""
    runs = np.stack(
        [
            grid.run_row,
            grid.run_start,
            grid.run_end,
            np.full(len(grid.run_start), FULL),
        ],
        axis=1,
    )
    partial = np.stack([grid.part_row, grid.part_col, grid.part_col + 1, grid.part_mask], axis=1)
    both = np.concatenate([runs, partial]).astype(np.int64)
    return both[np.lexsort((both[:, 1], both[:, 0]))]


def _repeats(keys: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each entry the number of consecutive rows around it that hold an entry of the same key."""
    if not len(keys):
        return np.zeros(0, np.int64)
    order = np.lexsort((rows, *keys.T))
    sorted_keys, sorted_rows = keys[order], rows[order]
    breaks = np.any(sorted_keys[1:] != sorted_keys[:-1], axis=1) | (np.diff(sorted_rows) != 1)
    group = np.cumsum(np.r_[0, breaks])
    length = np.bincount(group)[group]
    result = np.empty(len(keys), np.int64)
    result[order] = length
    return result


@dataclass(frozen=True)
class _Stretch:
    """Rows row .. row + count - 1 hold `tiles` (offset from the first column, width, contents) from
    column col + c * step, c counting the rows; step is 0 or 1."""

    row: int
    count: int
    col: int
    step: int
    tiles: tuple[tuple[int, int, int], ...]

    @property
    def width(self) -> int:
        return self.tiles[-1][0] + self.tiles[-1][1]


def _sort_out(
    grid: TileGrid, block: int, entries: NDArray[np.int64]
) -> tuple[list[_Stretch], list[_Stretch], dict[int, list[tuple[int, int, int]]]]:
    """Stretches that repeat from row to row, long full runs, and what is left of each row."""
    row, start, end, contents = entries.T
    below, beyond = (row + 1) * block > grid.nq, end * block > grid.n
    ragged, each = below | beyond, np.arange(1, len(row) + 1)
    along = _repeats(np.stack([start - row, end - row, contents, np.where(ragged, each, 0)], axis=1), row)
    # the same columns below one another are cut to those that are live
    down = _repeats(np.stack([start, end, contents, np.where(below, each, 0)], axis=1), row)
    kind = np.where(np.maximum(along, down) < STRETCH, 2, np.where(along >= down, 1, 0))
    is_long = (end - start >= LONG) & ~ragged
    segments: dict[tuple[int, int], list[list[tuple[int, int, int]]]] = defaultdict(list)
    rest: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    long: list[tuple[int, int, int, int]] = []
    for i, a, b, m, step, lengthy in zip(
        *(x.tolist() for x in (row, start, end, contents, kind, is_long)), strict=True
    ):
        if lengthy:
            long.append((i, a, b, step % 2))
        elif step == 2:
            rest[i].append((a, b, m))
        else:
            pieces = segments[i, step]
            if pieces and pieces[-1][-1][1] == a and b - pieces[-1][0][0] <= WIDE:
                pieces[-1].append((a, b, m))
            else:
                pieces.append([(a, b, m)])
    found = _stretches(
        (i, piece[0][0], step, tuple((a - piece[0][0], b - a, m) for a, b, m in piece))
        for (i, step), pieces in segments.items()
        for piece in pieces
    )
    regular = [s for s in found if s.count >= STRETCH]
    for s in found:
        if s.count < STRETCH:
            for c in range(s.count):
                col = s.col + c * s.step
                rest[s.row + c].extend((col + a, col + a + w, m) for a, w, m in s.tiles)
    return regular, _stretches((i, a, step, ((0, b - a, FULL),)) for i, a, b, step in long), rest


def _stretches(pieces: Iterator[tuple[int, int, int, tuple[tuple[int, int, int], ...]]]) -> list[_Stretch]:
    """(row, column, step, tiles) joined where the next row continues the same."""
    Chain = tuple[int, int, tuple[tuple[int, int, int], ...]]
    chains: dict[Chain, list[tuple[int, int]]] = defaultdict(list)
    for row, col, step, tiles in pieces:
        chains[step, col - row * step, tiles].append((row, col))
    result = []
    for (step, _, tiles), places in chains.items():
        places.sort()
        first = 0
        for j in range(1, len(places) + 1):
            if j == len(places) or places[j][0] != places[j - 1][0] + 1:
                row, col = places[first]
                result.append(_Stretch(row, j - first, col, step, tiles))
                first = j
    return sorted(result, key=lambda s: (s.row, s.col))


def _cut(stretch: _Stretch, masks: Bool, block: int, unit: int) -> list[Part]:
    """The stretch in pieces of `unit` rows, joined again where they differ by a shift only."""
    dense = np.zeros((block, stretch.width * block), bool)
    for offset, width, contents in stretch.tiles:
        columns = slice(offset * block, (offset + width) * block)
        dense[:, columns] = True if contents == FULL else masks[contents]
    q0, k0, step = stretch.row * block, stretch.col * block, stretch.step * block
    if stretch.step == 0 and (dense == dense[0]).all():
        return [
            Strided(q0, stretch.count * block, 0, k0 + lo, hi - lo, 0, 1, None)
            for lo, hi in _intervals(dense[0])
        ]
    if dense.all():
        return [Strided(q0, block, block, k0, stretch.width * block, step, stretch.count, None)]
    pieces: list[Strided] = []
    for top in range(0, block, unit):
        rows = dense[top : top + unit]
        used = np.flatnonzero(rows.any(0))
        if len(used):
            lo, hi = int(used[0]), int(used[-1]) + 1
            mask = rows[:, lo:hi]
            shape = (unit, block, k0 + lo, hi - lo, step, stretch.count)
            pieces.append(Strided(q0 + top, *shape, None if mask.all() else mask))
    return list(_join(pieces, unit, block // unit if stretch.step else 0))


def _intervals(row: Bool) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.r_[False, row, False].astype(np.int8)))
    return [(int(lo), int(hi)) for lo, hi in edges.reshape(-1, 2)]


def _join(pieces: list[Strided], unit: int, per_block: int) -> list[Strided]:
    """All pieces of a block of rows as one part if each is the one above it, shifted by `unit`."""
    first = pieces[0]
    same = len(pieces) == per_block and all(
        p.k_len == first.k_len and p.k0 - first.k0 == j * unit and _same(p.mask, first.mask)
        for j, p in enumerate(pieces)
    )
    if not same:
        return pieces
    return [replace(first, q_step=unit, k_step=unit, count=first.count * per_block)]


def _same(a: Bool | None, b: Bool | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _long_parts(stretches: list[_Stretch], block: int) -> list[Part]:
    parts: list[Part] = []
    for s in stretches:
        q0, k0, k_len = s.row * block, s.col * block, s.width * block
        if s.step == 0 or s.count == 1:
            parts.append(Strided(q0, s.count * block, 0, k0, k_len, 0, 1, None))
        else:
            parts.append(Strided(q0, block, block, k0, k_len, block, s.count, None))
    return parts


def _gather(
    rest: dict[int, list[tuple[int, int, int]]], masks: Bool, block: int, nq: int, n: int
) -> list[Part]:
    """Rows with about equally many tiles left, together; padding is a tile without contents. Tiles side by
    side are a view instead: what is gathered is copied."""
    empty, full = len(masks), len(masks) + 1
    known = np.concatenate([masks, np.zeros((1, block, block), bool), np.ones((1, block, block), bool)])
    groups: dict[tuple[int, int], list[tuple[int, list[int], list[int]]]] = defaultdict(list)
    parts: list[Part] = []
    for row in sorted(rest):
        cols: list[int] = []
        contents: list[int] = []
        for a, b, m in sorted(rest[row]):
            cols.extend(range(a, b))
            contents.extend([full if m == FULL else m] * (b - a))
        q_len = min(block, nq - row * block)
        if 1 < len(cols) <= GATHER and cols[-1] - cols[0] == len(cols) - 1:
            parts.append(_side_by_side(row, cols[0], known[contents], q_len, n))
            continue
        for turn, i in enumerate(range(0, len(cols), GATHER)):
            groups[turn, q_len].append((row * block, cols[i : i + GATHER], contents[i : i + GATHER]))
    for (_, q_len), problems in groups.items():
        for size, batch in _batches(problems):
            rows = np.array([row for row, _, _ in batch], np.int64)
            tiles = np.array([c + [0] * (size - len(c)) for _, c, _ in batch], np.int64)
            kinds = np.array([m + [empty] * (size - len(m)) for _, _, m in batch], np.int64)
            contents_or_none = None if (kinds == full).all() else kinds
            parts.append(Gathered(rows, q_len, block, tiles, contents_or_none, known))
    return parts


def _side_by_side(row: int, col: int, tiles: Bool, q_len: int, n: int) -> Strided:
    """One row of tiles [T, block, block] that begin at column `col`: a view, of which nothing is copied."""
    block = tiles.shape[1]
    k_len = min(len(tiles) * block, n - col * block)
    mask = tiles.swapaxes(0, 1).reshape(block, -1)[:q_len, :k_len]
    return Strided(row * block, q_len, 0, col * block, k_len, 0, 1, None if mask.all() else mask)


def _batches(
    problems: list[tuple[int, list[int], list[int]]],
) -> list[tuple[int, list[tuple[int, list[int], list[int]]]]]:
    """Problems of the same number of tiles, and few of fewer with the next."""
    by_size: dict[int, list[tuple[int, list[int], list[int]]]] = defaultdict(list)
    for problem in problems:
        by_size[len(problem[1])].append(problem)
    batches: list[tuple[int, list[tuple[int, list[int], list[int]]]]] = []
    for size in sorted(by_size):
        some = by_size[size]
        if batches:
            smaller = sum(size - len(cols) for _, cols, _ in batches[-1][1])
            if smaller <= PADDING:
                some = batches.pop()[1] + some
        batches.append((size, some))
    return batches
