"""Tiles as the kernels read them: of each block of 64 rows the stretches of keys, and of each partial tile a
word of 64 bits for each key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles.blockmask import Rows, TileGrid

ROWS = 64


@dataclass(frozen=True, eq=False)
class Layout:
    """first int64 [blocks + 1], start and end int32 [E]: the keys of each entry; words int64 [E]: where in
    `masks` those of the entry begin, -1 where all pairs are live; masks uint64: of a key bit i for row i of
    the block."""

    first: NDArray[np.int64]
    start: NDArray[np.int32]
    end: NDArray[np.int32]
    words: NDArray[np.int64]
    masks: NDArray[np.uint64]

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        return tuple([x.ctypes.data for x in (self.first, self.start, self.end, self.words, self.masks)])

    @staticmethod
    def of_rows(rows: Rows) -> Layout:
        """Of a mask of few rows, in one block."""
        starts, ends, words, masks, count = [], [], [], [], 0
        for start, stop, mask in rows.runs:
            starts.append(start)
            ends.append(stop)
            words.append(-1 if mask is None else count)
            if mask is not None:
                bits = np.zeros((stop - start, ROWS), np.uint8)
                bits[:, : len(mask)] = mask.T
                masks.append(np.packbits(bits, axis=1, bitorder="little").view(np.uint64).reshape(-1))
                count += stop - start
        return Layout(
            np.array([0, len(starts)], np.int64),
            np.array(starts, np.int32),
            np.array(ends, np.int32),
            np.array(words, np.int64),
            np.concatenate(masks) if masks else np.zeros(0, np.uint64),
        )

    @staticmethod
    def of(grid: TileGrid) -> Layout:
        size = grid.block_size
        per = size // ROWS
        row = np.concatenate([grid.run_row, grid.part_row])
        start = np.concatenate([grid.run_start, grid.part_col]) * np.int64(size)
        end = np.concatenate([grid.run_end, grid.part_col + 1]) * np.int64(size)
        content = np.concatenate([np.full(len(grid.run_start), -1), grid.part_mask])
        order = np.lexsort((start, row))
        row, start, end, content = (x[order] for x in (row, start, end, content))
        # each block of rows of a tile has its own words
        counts = np.bincount(row, minlength=grid.shape[0])
        entries = np.concatenate([[0], counts.cumsum()])
        inside = np.concatenate(
            [np.arange(a, b) for a, b in _blocks(entries, per)] or [np.zeros(0, np.int64)]
        )
        block = np.concatenate(
            [np.full(b - a, i % per) for i, (a, b) in enumerate(_blocks(entries, per))]
            or [np.zeros(0, np.int64)]
        )
        words = np.where(content[inside] < 0, -1, (content[inside] * per + block) * size)
        masks = np.zeros((len(grid.masks), per, size, 1), np.uint64)
        for content, bits in zip(masks, grid.masks, strict=True):
            rows = np.unpackbits(bits, axis=1, bitorder="little").reshape(per, ROWS, size).swapaxes(1, 2)
            content[:] = np.packbits(np.ascontiguousarray(rows), axis=2, bitorder="little").view(np.uint64)
        # beyond the last key that is live there may be none
        live = masks[..., 0] != 0
        lasts = np.where(live.any(2), size - live[..., ::-1].argmax(2), 0).reshape(-1)
        ends = np.minimum(end[inside], grid.n)
        if len(lasts):
            ends = np.where(words < 0, ends, start[inside] + lasts[words // size])
        return Layout(
            np.concatenate([[0], np.repeat(counts, per).cumsum()]).astype(np.int64),
            start[inside].astype(np.int32),
            ends.astype(np.int32),
            words.astype(np.int64),
            masks.reshape(-1),
        )


def _blocks(entries: NDArray[np.int64], per: int) -> list[tuple[int, int]]:
    """The entries of each block of rows, `per` of them to a row of tiles."""
    return [
        (a, b) for a, b in zip(entries[:-1].tolist(), entries[1:].tolist(), strict=True) for _ in range(per)
    ]


Layouts = WeakKeyDictionary[TileGrid | Rows, Layout]
