"""Tiles as the kernels read them: of a size of their own, by rows or by columns, several masks end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import Rows, TileGrid

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Layout:
    """The tiles of one mask in `lines`, which are its rows of tiles or, where transposed, its columns.

    run_ptr    [lines + 1]  the runs of line i are run_ptr[i] .. run_ptr[i + 1] - 1
    run_start, run_end      of each run of full tiles the first along the line, and one past the last
    part_ptr   [lines + 1]  likewise for partial tiles
    part_at, part_content   where along the line one stands, and its content
    width      of tiles, along the lines
    words      [contents, height, ceil(width / 32)]  bits of distinct contents, little-endian along the lines

    A full tile lies inside the matrix as a whole: kernels look at no bounds there.
    """

    across: int
    width: int
    run_ptr: Ints
    run_start: Ints
    run_end: Ints
    part_ptr: Ints
    part_at: Ints
    part_content: Ints
    words: Ints

    @property
    def lines(self) -> int:
        return len(self.run_ptr) - 1

    @staticmethod
    def of(grid: TileGrid, rows: int, columns: int) -> Layout:
        """In tiles of rows x columns, which divide those of the grid."""
        size, (high, wide) = grid.block_size, grid.shape
        down, along = size // rows, size // columns
        bits = np.unpackbits(grid.masks, axis=2, bitorder="little").reshape(-1, down, rows, along, columns)
        cells = bits.swapaxes(2, 3).reshape(-1, down, along, rows * columns)
        # 0 is an empty one, 2 a full one
        kinds = np.add(cells.any(3), cells.all(3), dtype=np.int8)
        # runs reach over all rows of the tiles that they are of
        line = (grid.run_row[:, None] * down + np.arange(down)).ravel()
        starts, ends = (np.repeat(x.astype(np.int64) * along, down) for x in (grid.run_start, grid.run_end))
        tile, i, j = np.nonzero(kinds[grid.part_mask])
        own = grid.part_row[tile] * down + i, grid.part_col[tile].astype(np.int64) * along + j
        full = kinds[grid.part_mask[tile], i, j] == 2
        runs = _joined(
            np.concatenate([line, own[0][full]]),
            np.concatenate([starts, own[1][full]]),
            np.concatenate([ends, own[1][full] + 1]),
        )
        part = ~full
        content = np.unique((grid.part_mask[tile[part]] * down + i[part]) * along + j[part])
        which = np.searchsorted(content, (grid.part_mask[tile[part]] * down + i[part]) * along + j[part])
        packed = _words(cells.reshape(-1, rows, columns)[content])
        kept, same = np.unique(
            packed.reshape(len(packed), rows * packed.shape[2]), axis=0, return_inverse=True
        )
        words = kept.reshape(-1, *packed.shape[1:])
        parts = own[0][part], own[1][part], same[which]
        return Layout(wide * along, columns, words=words, **_ordered(high * down, runs, parts))

    @cached_property
    def work(self) -> NDArray[np.int64]:
        """Tiles of each line."""
        full = np.concatenate([[0], np.cumsum(self.run_end.astype(np.int64) - self.run_start)])
        found = full[self.run_ptr[1:]] - full[self.run_ptr[:-1]] + np.diff(self.part_ptr)
        return np.asarray(found, np.int64)

    @cached_property
    def order(self) -> Ints:
        """The lines, those with the most tiles first."""
        return np.argsort(-self.work, kind="stable").astype(np.int32)

    def transposed(self) -> Layout:
        """The same with columns for lines."""
        lines = np.repeat(np.arange(self.lines), np.diff(self.run_ptr))
        # along each line the runs that the line before does not have begin, and those that only it has end
        row = np.concatenate([lines, lines, lines + 1, lines + 1])
        col = np.concatenate([self.run_start, self.run_end, self.run_start, self.run_end]).astype(np.int64)
        step = np.repeat([1, -1, -1, 1], len(lines))
        order = np.lexsort((col, row))
        row, col, level = row[order], col[order], step[order].cumsum()
        length = np.where(level != 0, np.diff(col, append=0), 0)
        first = np.repeat(col - np.concatenate([[0], length.cumsum()[:-1]]), length)
        column, at, sign = first + np.arange(length.sum()), np.repeat(row, length), np.repeat(level, length)
        ends = []
        for kind in (1, -1):
            mine = sign == kind
            ends.append(np.array([column[mine], at[mine]])[:, np.lexsort((at[mine], column[mine]))])
        runs = ends[0][0], ends[0][1], ends[1][1]
        parts = self.part_at.astype(np.int64), np.repeat(np.arange(self.lines), np.diff(self.part_ptr))
        bits = np.unpackbits(self.words.view(np.uint8), axis=2, count=self.width, bitorder="little")
        ordered = _ordered(self.across, runs, (*parts, self.part_content))
        return Layout(self.lines, self.words.shape[1], words=_words(bits.swapaxes(1, 2)), **ordered)


Columns = tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer]]


def _joined(line: NDArray[np.integer], start: NDArray[np.integer], end: NDArray[np.integer]) -> Columns:
    """By line and start, runs that touch as one."""
    order = np.lexsort((start, line))
    line, start, end = line[order], start[order], end[order]
    fresh = np.ones(len(line), bool)
    fresh[1:] = (line[1:] != line[:-1]) | (start[1:] != end[:-1])
    last = np.roll(fresh, -1)
    return line[fresh], start[fresh], end[last]


def _ordered(lines: int, runs: Columns, parts: Columns) -> dict[str, Ints]:
    """The arrays of a Layout, of runs (line, start, end) and partial tiles (line, place, content)."""
    found: dict[str, NDArray[Any]] = {}
    for names, (line, *others) in ((("run", "start", "end"), runs), (("part", "at", "content"), parts)):
        order, kind = np.lexsort((others[0], line)), names[0]
        found[f"{kind}_ptr"] = np.searchsorted(line[order], np.arange(lines + 1))
        found |= {f"{kind}_{name}": x[order] for name, x in zip(names[1:], others, strict=True)}
    return {name: x.astype(np.int32) for name, x in found.items()}


def _words(bits: NDArray[np.uint8]) -> Ints:
    """[.., columns] as [.., words]."""
    spare = -bits.shape[-1] % 32
    padded = np.pad(bits, [*[(0, 0)] * (bits.ndim - 1), (0, spare)])
    return np.ascontiguousarray(np.packbits(padded, axis=-1, bitorder="little")).view(np.int32)


@dataclass(frozen=True, eq=False)
class Stack:
    """Layouts of equally many lines end to end: line i of the j-th is line j * lines + i; pointers and
    contents count on. `order` has the lines of each, from 0."""

    lines: int
    order: Ints
    run_ptr: Ints
    run_start: Ints
    run_end: Ints
    part_ptr: Ints
    part_at: Ints
    part_content: Ints
    words: Ints

    @staticmethod
    def of(layouts: Sequence[Layout]) -> Stack:
        def joined(name: str, after: str = "") -> Ints:
            before = np.cumsum([0, *(len(getattr(y, after)) if after else 0 for y in layouts)])
            cut = slice(None, -1 if name.endswith("ptr") else None)
            parts = [getattr(y, name)[cut] + base for y, base in zip(layouts, before, strict=False)]
            if name.endswith("ptr"):
                parts.append(before[-1:])
            return np.concatenate(parts).astype(np.int32)

        return Stack(
            layouts[0].lines, joined("order"), joined("run_ptr", "run_start"), joined("run_start"),
            joined("run_end"), joined("part_ptr", "part_at"), joined("part_at"),
            joined("part_content", "words"), joined("words"),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Units:
    """Masks of few rows in units of so many keys, those of all masks end to end, of each the full ones first.

    heads    [masks, 4]: the first unit, how many are full, how many there are, the first content
    at       [units]: which keys
    words    [contents, rows, ceil(keys / 32)]: the bits of those that are not full
    """

    heads: Ints
    at: Ints
    words: Ints

    @staticmethod
    def of(masks: Sequence[Rows], keys: int) -> Units:
        heads: list[tuple[int, ...]] = []
        at: list[NDArray[np.int64]] = []
        words: list[Ints] = []
        first = contents = 0
        for mask in masks:
            runs = [run for run in mask.runs if run.start < run.stop]
            live = [np.arange(run.start // keys, -(-run.stop // keys)) for run in runs]
            units = np.unique(np.concatenate([*live, np.zeros(0, np.int64)]))
            flat = np.zeros((len(mask.spans), len(units) * keys), np.uint8)
            for run in runs:
                begin = np.searchsorted(units, run.start // keys) * keys + run.start % keys
                flat[:, begin : begin + run.stop - run.start] = True if run.mask is None else run.mask
            bits = flat.reshape(len(flat), len(units), keys).swapaxes(0, 1)
            full = bits.all((1, 2))
            heads.append((first, int(full.sum()), len(units), contents))
            at.append(np.concatenate([units[full], units[~full]]))
            words.append(_words(bits[~full]))
            first, contents = first + len(units), contents + len(words[-1])
        return Units(np.array(heads, np.int32), np.concatenate(at).astype(np.int32), np.concatenate(words))
