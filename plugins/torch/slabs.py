"""What queries chose: for each block of keys the queries that chose it, as chunks of the kernel.

Transposed so, keys are plain slices. What a block gives its queries stands in the order of these lists, and
is summed by query as an embedding bag: nothing is gathered by query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from attndsl.tiles.blockmask import TileGrid

from .chunks import FORMED, Gathers

PAIRS = 2**16
"""Queries that have chosen a block, counted for each block, whose results are held at once for each head."""


@dataclass(frozen=True, eq=False)
class Openings:
    """Which keys of a block of `unit` a query may choose, known by positions.

    tile    int64 [R, C] of a grid: its contents, the last two being none and all
    masks   uint8 [U, B, B / 8] as those of the grid
    counts  int32 [U, B, B / unit] of each content how many keys of the blocks in it
    """

    unit: int
    tile: Tensor
    masks: Tensor
    counts: Tensor

    @staticmethod
    def of(grid: TileGrid, unit: int) -> Openings:
        size, known = grid.block_size, len(grid.masks)
        ends = np.zeros((2, size, size // 8), np.uint8)
        ends[1] = 255
        masks = torch.from_numpy(np.concatenate([grid.masks, ends]))
        full = np.zeros((grid.shape[0], grid.shape[1] + 1), np.int64)
        np.add.at(full, (grid.run_row, grid.run_start), 1)
        np.add.at(full, (grid.run_row, grid.run_end), -1)
        tile = np.where(full.cumsum(1)[:, :-1] > 0, known + 1, known)
        tile[grid.part_row, grid.part_col] = grid.part_mask
        counts = [_unpacked(mask).view(size, -1, unit).sum(-1, dtype=torch.int32) for mask in masks]
        return Openings(unit, torch.from_numpy(tile), masks, torch.stack(counts))

    def count(self, queries: Tensor, blocks: Tensor) -> Tensor:
        """How many keys of each block each query may choose."""
        size, inside = self.counts.shape[1:]
        return self.counts[self.tile[queries // size, blocks // inside], queries % size, blocks % inside]

    def keys(self, queries: Tensor, block: int) -> Tensor:
        """And which, bool [queries, unit]."""
        size, inside = self.counts.shape[1:]
        rows = self.masks[self.tile[queries // size, block // inside], queries % size]
        return _unpacked(rows).view(len(rows), inside, self.unit)[:, block % inside]


def _unpacked(masks: Tensor) -> Tensor:
    return torch.from_numpy(np.unpackbits(masks.numpy(), axis=-1, bitorder="little")).bool()


@dataclass(frozen=True, eq=False)
class Slab:
    """Some rows. `chunks` have the queries of one block each; `places` [rows, r] say where the results for
    each entry of a list stand among those of all chunks, one past their end where there are none."""

    rows: slice
    chunks: Sequence[Gathers]
    places: Tensor

    @property
    def results(self) -> int:
        """One for each query of each chunk, and one for none."""
        return sum(chunk.q_len for chunk in self.chunks) + 1

    def pieces(self) -> Iterator[tuple[Gathers, slice]]:
        """The chunks, and where their results stand."""
        start = 0
        for chunk in self.chunks:
            yield chunk, slice(start, start + chunk.q_len)
            start += chunk.q_len

    def sums(self, results: Tensor, weights: Tensor | None = None) -> Tensor:
        """Of each row [X, rows, D]; weights [X, rows, r]."""
        found = results.new_empty((len(results), len(self.places), results.shape[-1]))
        for head, mine in enumerate(results):
            weight = None if weights is None else weights[head]
            found[head] = embedding_bag(self.places, mine, mode="sum", per_sample_weights=weight)
        return found


def rooms(slabs: Sequence[Slab], x: Tensor) -> Iterator[tuple[Slab, Tensor]]:
    """Each with room for its results [X, results, D], as x [X, .., D], the last of them 0: the same for all,
    for memory that is new costs more than what is done in it."""
    room = x.new_empty((x.shape[0], max((slab.results for slab in slabs), default=0), x.shape[-1]))
    for slab in slabs:
        found = room[:, : slab.results]
        found[:, -1] = 0.0
        yield slab, found


@dataclass(frozen=True, eq=False)
class Chosen:
    """The blocks [nq, r] that the queries of so many heads chose of n keys."""

    blocks: Tensor
    openings: Openings
    n: int
    heads: int

    def slabs(self) -> Iterator[Slab]:
        nq, r = self.blocks.shape
        size = max(1, PAIRS // r)
        return (self.slab(slice(start, min(start + size, nq))) for start in range(0, nq, size))

    def slab(self, some: slice) -> Slab:
        blocks, unit, count = self.blocks[some], self.openings.unit, -(-self.n // self.openings.unit)
        queries = torch.arange(some.start, some.stop)
        there = (blocks >= 0) & (blocks < count)
        found = self.openings.count(queries[:, None], torch.where(there, blocks, 0))
        # of each block first the queries that may choose all of it, then those that may choose some
        partial = found < (self.n - blocks * unit).clamp_max(unit)
        dead = 2 * count
        turns = torch.where(there & (found > 0), 2 * blocks + partial, dead).flatten()
        order, again = _sorted(turns, blocks.shape[1], dead)
        if len(again):
            turns[again] = dead
            order, _ = _sorted(turns, blocks.shape[1], dead)
        ends = torch.bincount(turns, minlength=dead + 1).cumsum(0).tolist()
        rows = some.start + order // blocks.shape[1]
        chunks = []
        for turn, (start, stop) in enumerate(pairwise([0, *ends[:-1]])):
            block = turn // 2
            keys = torch.arange(block * unit, min((block + 1) * unit, self.n))
            size = keys.shape[0]
            step = max(1, FORMED // (size * self.heads))
            for first in range(start, stop, step):
                those = rows[first : min(first + step, stop)]
                mask = self.openings.keys(those, block)[None, :, :size] if turn % 2 else None
                chunks.append(Gathers(those[None], keys[None], size, mask, False, block * unit))
        places, pairs = torch.full_like(turns, ends[-2]), order[: ends[-2]]
        places[pairs] = torch.arange(len(pairs))
        return Slab(some, chunks, places.view(blocks.shape))


def _sorted(turns: Tensor, r: int, dead: int) -> tuple[Tensor, Tensor]:
    """The stable order of entries of lists of r, and those that say again what their list says before."""
    order = turns.to(torch.int16 if dead < 2**15 else torch.int32).argsort(stable=True)
    found, rows = turns[order], order // r
    same = (found[1:] == found[:-1]) & (rows[1:] == rows[:-1]) & (found[1:] < dead)
    return order, order[1:][same]
