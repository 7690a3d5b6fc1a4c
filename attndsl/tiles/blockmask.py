"""BlockMask: the mask in tiles, as runs of full tiles and partial tiles with a dictionary of contents; of few
rows as intervals of keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail
from attndsl.keywords import missing

if TYPE_CHECKING:
    import torch
    from torch.nn.attention import flex_attention

    from attndsl.expr import Expr

Spans = tuple[tuple[int, int], ...]


class Tiles(NamedTuple):
    """Numbers of tiles; `unique_partial` counts distinct contents."""

    full: int
    partial: int
    empty: int
    unique_partial: int


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The tiles of one nq x n mask, B = `block_size` tokens on a side, R = ceil(nq / B) rows of tiles.

    run_ptr    int32 [R + 1]   the runs of row i are run_ptr[i] .. run_ptr[i + 1] - 1
    run_start  int32 [runs]    first tile column of a run of full tiles
    run_end    int32 [runs]    one past its last
    part_ptr   int32 [R + 1]   likewise for partial tiles, by rising column
    part_col   int32 [parts]   tile column
    part_mask  int32 [parts]   index into `masks`
    masks      uint8 [U, B, B / 8]  distinct contents, bits little-endian along the keys (numpy packbits
                               with bitorder="little"); positions outside the matrix are 0

    A tile that sticks out of the matrix is partial even if all that is inside is live, as in torch.
    """

    nq: int
    n: int
    block_size: int
    run_ptr: NDArray[np.int32]
    run_start: NDArray[np.int32]
    run_end: NDArray[np.int32]
    part_ptr: NDArray[np.int32]
    part_col: NDArray[np.int32]
    part_mask: NDArray[np.int32]
    masks: NDArray[np.uint8]

    def __repr__(self) -> str:
        tiles = f"{self.tiles.full:,} full, {self.tiles.partial:,} partial ({len(self.masks):,} distinct)"
        return f"<tile grid {self.nq:,} x {self.n:,}; tiles of {self.block_size:,}: {tiles}>"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.nq // self.block_size), -(-self.n // self.block_size)

    @cached_property
    def run_row(self) -> NDArray[np.int64]:
        """The row of tiles of each run."""
        return np.repeat(np.arange(len(self.run_ptr) - 1), np.diff(self.run_ptr))

    @cached_property
    def part_row(self) -> NDArray[np.int64]:
        """The row of tiles of each partial tile."""
        return np.repeat(np.arange(len(self.part_ptr) - 1), np.diff(self.part_ptr))

    @property
    def entries(self) -> int:
        """Runs and partial tiles."""
        return len(self.run_start) + len(self.part_col)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        arrays = (self.run_ptr, self.run_start, self.run_end, self.part_ptr, self.part_col, self.part_mask)
        return sum(array.nbytes for array in (*arrays, self.masks))

    @cached_property
    def tiles(self) -> Tiles:
        """How many there are of each kind."""
        full = int((self.run_end.astype(np.int64) - self.run_start).sum())
        rows, cols = self.shape
        return Tiles(full, len(self.part_col), rows * cols - full - len(self.part_col), len(self.masks))

    @cached_property
    def is_causal(self) -> bool:
        """Exactly k <= q on a square."""
        rows, _ = self.shape
        diagonal = np.arange(rows)
        if self.nq != self.n or self.nnz != self.n * (self.n + 1) // 2 or self.run_start.any():
            return False
        ends = np.zeros(rows, np.int64)
        ends[self.run_row] = self.run_end
        if not np.array_equal(ends, diagonal) or not np.array_equal(self.part_col, diagonal):
            return False
        inside = np.unpackbits(self.masks, axis=2, bitorder="little").astype(bool)
        return not np.triu(inside, 1).any()

    @cached_property
    def live(self) -> NDArray[np.int64]:
        """Live pairs in each row of each content, int64 [U, B]."""
        return np.asarray(np.bitwise_count(self.masks).sum(axis=2, dtype=np.int64))

    @cached_property
    def nnz(self) -> int:
        """Live (q, k) pairs; a run counts as a whole."""
        uses = np.bincount(self.part_mask, minlength=len(self.masks))
        return self.tiles.full * self.block_size**2 + int((uses * self.live.sum(axis=1)).sum())

    def row_counts(self) -> NDArray[np.int64]:
        """Live keys of each query row, int64 [nq]."""
        width = np.concatenate([[0], np.cumsum(self.run_end.astype(np.int64) - self.run_start)])
        full = width[self.run_ptr[1:]] - width[self.run_ptr[:-1]]
        counts = np.repeat(full[:, None] * self.block_size, self.block_size, axis=1)
        row = self.part_row
        pair, uses = np.unique(row * len(self.masks) + self.part_mask, return_counts=True)
        if len(pair):
            row, content = pair // len(self.masks), pair % len(self.masks)
            starts = np.flatnonzero(np.diff(row, prepend=-1))
            counts[row[starts]] += np.add.reduceat(self.live[content] * uses[:, None], starts, axis=0)
        return counts.ravel()[: self.nq]

    def select(self, row: NDArray[np.int64], rank: NDArray[np.int64]) -> NDArray[np.int64]:
        """The column of the live key of `rank` (from 0) in `row`, for each of the pairs given."""
        size = self.block_size
        tile_row = np.concatenate([self.run_row, self.part_row])
        first = np.concatenate([self.run_start, self.part_col])
        length = np.concatenate([self.run_end - self.run_start, np.zeros_like(self.part_col)])
        content = np.concatenate([np.zeros_like(self.run_start), self.part_mask])
        order = np.lexsort((first, tile_row))
        tile_row, first, length, content = (a[order] for a in (tile_row, first, length, content))
        live = np.repeat(length[:, None].astype(np.int64) * size, size, axis=1)
        live[length == 0] = self.live[content[length == 0]]
        before = np.concatenate([np.zeros((1, size), np.int64), np.cumsum(live, axis=0)])
        place = row % size
        low, high = (np.searchsorted(tile_row, row // size, side=side) for side in ("left", "right"))
        rank = rank + before[low, place]
        while (high - low > 1).any():
            middle = (low + high) // 2
            right = before[middle, place] <= rank
            low, high = np.where(right, middle, low), np.where(right, high, middle)
        rank -= before[low, place]
        inside = np.flatnonzero(length[low] == 0)
        for part in np.array_split(inside, 1 + len(inside) // 2**16):
            bits = np.unpackbits(self.masks[content[low[part]], place[part]], axis=1, bitorder="little")
            rank[part] = (np.cumsum(bits, axis=1) == rank[part, None] + 1).argmax(axis=1)
        return first[low].astype(np.int64) * size + rank

    def to_dense(self, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """The mask itself, or its rows from `start` to before `stop`: bool [rows, n]."""
        size, cols, stop = self.block_size, self.shape[1], self.nq if stop is None else stop
        dense = np.zeros((stop - start, cols, size), bool)
        for row in range(start // size, -(-stop // size)):
            top, low = max(start, row * size), min(stop, row * size + size)
            here = dense[top - start : low - start]
            for run in range(self.run_ptr[row], self.run_ptr[row + 1]):
                here[:, self.run_start[run] : self.run_end[run]] = True
            part = slice(self.part_ptr[row], self.part_ptr[row + 1])
            contents = self.masks[self.part_mask[part], top - row * size : low - row * size]
            bits = np.unpackbits(contents, axis=2, bitorder="little")
            here[:, self.part_col[part]] = bits.swapaxes(0, 1)
        return dense.reshape(stop - start, cols * size)[:, : self.n]


class Run(NamedTuple):
    """Keys from `start` to before `stop`, at each of which some row is live; `mask` [nq, keys] says which,
    None where all are."""

    start: int
    stop: int
    mask: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Rows:
    """A mask of few rows: `spans` are each row's live keys, rising intervals (start, stop) that do not touch.

    Tiles are made of it where somebody asks for them.
    """

    n: int
    block_size: int
    spans: tuple[Spans, ...]

    def __repr__(self) -> str:
        return f"<rows {len(self.spans):,} x {self.n:,}, {self.nnz:,} live>"

    @staticmethod
    def of_dense(live: NDArray[np.bool_], block_size: int) -> Rows:
        """live bool [nq, n]; block_size is that of the tiles that may be made of it."""
        return Rows(live.shape[1], block_size, tuple([intervals(row) for row in live]))

    @property
    def nnz(self) -> int:
        """Live (q, k) pairs."""
        return sum([stop - start for spans in self.spans for start, stop in spans])

    @property
    def reads_all(self) -> bool:
        """Whether each key is live in some row."""
        return sum([run.stop - run.start for run in self.runs]) == self.n

    @cached_property
    def runs(self) -> list[Run]:
        """The live pairs, each in one run, by rising key."""
        if len(self.spans) == 1:
            return [Run(start, stop, None) for start, stop in self.spans[0]]
        change: dict[int, int] = {}
        for start, stop in (span for spans in self.spans for span in spans):
            change[start] = change.get(start, 0) + 1
            change[stop] = change.get(stop, 0) - 1
        found: list[tuple[int, int, bool]] = []
        rows, before = 0, 0
        for at in sorted(change):
            whole = rows == len(self.spans)
            if rows and found and found[-1][1] == before and found[-1][2] == whole:
                found[-1] = (found[-1][0], at, whole)
            elif rows:
                found.append((before, at, whole))
            rows, before = rows + change[at], at
        return [Run(a, b, None if whole else self._between(a, b)) for a, b, whole in found]

    def _between(self, first: int, last: int) -> NDArray[np.bool_]:
        """The mask at the keys from `first` to before `last`."""
        live = np.zeros((len(self.spans), last - first), bool)
        for row, spans in zip(live, self.spans, strict=True):
            for start, stop in spans:
                row[max(start - first, 0) : max(stop - first, 0)] = True
        return live

    @cached_property
    def grid(self) -> TileGrid:
        """The same in tiles."""
        nq, size = len(self.spans), self.block_size
        rows, cols = -(-nq // size), -(-self.n // size)
        bits = np.zeros((rows * size, cols * size // 8), np.uint8)
        for row, spans in zip(bits, self.spans, strict=False):
            edges = np.zeros(cols * size + 1, np.int8)
            for start, stop in spans:
                edges[start], edges[stop] = edges[start] + 1, edges[stop] - 1
            row[:] = np.packbits(np.cumsum(edges[:-1], dtype=np.int8), bitorder="little")
        contents = bits.reshape(rows, size, cols, size // 8).swapaxes(1, 2).reshape(rows * cols, -1)
        full = (contents == 255).all(1)
        partial = np.flatnonzero(contents.any(1) & ~full)
        words = contents[partial].view(np.dtype((np.void, size * size // 8)))[:, 0]
        _, first, what = np.unique(words, return_index=True, return_inverse=True)
        edges = np.zeros((rows, cols + 2), np.int8)
        edges[:, 1:-1] = full.reshape(rows, cols)
        steps = np.diff(edges, axis=1)
        (run_row, run_start), run_end = np.nonzero(steps == 1), np.nonzero(steps == -1)[1]
        bounds = np.arange(rows + 1)
        return TileGrid(
            nq, self.n, size,
            np.searchsorted(run_row, bounds).astype(np.int32),
            run_start.astype(np.int32),
            run_end.astype(np.int32),
            np.searchsorted(partial // cols, bounds).astype(np.int32),
            (partial % cols).astype(np.int32),
            what.astype(np.int32),
            contents[partial[first]].reshape(-1, size, size // 8),
        )  # fmt: skip


def intervals(row: NDArray[np.bool_]) -> Spans:
    """Where a row of truths holds."""
    edges = np.flatnonzero(np.diff(np.r_[False, row, False].view(np.int8)))
    return tuple((start, stop) for start, stop in edges.reshape(-1, 2).tolist())


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The tiles of an attention for one problem.

    masks   the distinct masks; heads and batch rows with equal masks share one
    index   int32 [B or 1, H or 1]: which mask a (batch row, query head) uses
    closed  each of `masks` as a truth over the numbers of row and column, where tiles were made of one
    """

    nq: int
    n: int
    block_size: int
    masks: tuple[TileGrid, ...] | tuple[Rows, ...]
    index: NDArray[np.int32]
    closed: tuple[Expr, ...] = ()

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            raise missing("a block mask", name, dir(BlockMask))

    @property
    def rows(self) -> tuple[Rows, ...] | None:
        """The distinct masks as intervals of keys, if they are so."""
        return tuple([mask for mask in self.masks if isinstance(mask, Rows)]) or None

    @cached_property
    def grids(self) -> tuple[TileGrid, ...]:
        """The distinct masks in tiles."""
        return tuple([mask.grid if isinstance(mask, Rows) else mask for mask in self.masks])

    def uses(self) -> Iterator[TileGrid]:
        """The grid of each (batch row, head) of `index`."""
        return (self.grids[i] for i in self.index.ravel())

    @property
    def nnz(self) -> int:
        """Live (q, k) pairs, summed over the batch rows and heads of `index`."""
        return sum([self.masks[i].nnz for i in self.index.ravel()])

    @cached_property
    def is_full(self) -> bool:
        """Whether every pair is live."""
        return all(mask.nnz == self.nq * self.n for mask in self.masks)

    @property
    def tiles(self) -> Tiles:
        """Summed over `index`; `unique_partial` over the grids that are stored."""
        full, partial, empty, _ = (sum(count) for count in zip(*(g.tiles for g in self.uses()), strict=True))
        return Tiles(full, partial, empty, sum(len(grid.masks) for grid in self.grids))

    @property
    def density(self) -> float:
        """Share of the pairs that is live; 0 for a matrix without pairs."""
        pairs = self.nq * self.n * self.index.size
        return self.nnz / pairs if pairs else 0.0

    @property
    def entries(self) -> int:
        """Runs and partial tiles that are stored."""
        return sum(grid.entries for grid in self.grids)

    @property
    def nbytes(self) -> int:
        """Bytes that are stored, contents included."""
        return self.index.nbytes + sum(grid.nbytes for grid in self.grids)

    def row_counts(self) -> NDArray[np.int64]:
        """Live keys of each query row, int64 [B or 1, H or 1, nq]."""
        return np.stack([grid.row_counts() for grid in self.grids])[self.index]

    def empty_rows(self) -> NDArray[np.bool_]:
        """Which query rows have no key, bool [B or 1, H or 1, nq]."""
        return np.equal(self.row_counts(), 0)

    def to_dense(self, start: int = 0, stop: int | None = None) -> NDArray[np.bool_]:
        """The mask itself, or its rows from `start` to before `stop`: bool [B or 1, H or 1, rows, n]."""
        return np.stack([grid.to_dense(start, stop) for grid in self.grids])[self.index]

    def to_flex(self, device: str = "cpu") -> flex_attention.BlockMask:
        """The same mask for FlexAttention, on `device`: lists of tiles, and a mask_mod that reads the tile
        bits.

        Takes 8 bytes for each of the ceil(nq / B) * ceil(n / B) tiles, live or not, as torch's does.
        """
        import torch
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        if not isinstance(device, str | torch.device):
            raise fail(f"`device` is the name of one, not {type(device).__name__}", help='such as "cuda:0"')
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            raise fail(f"no device `{device}`", help="cpu, or cuda where there is one") from None

        contents = np.concatenate([grid.masks for grid in self.grids])
        first = np.cumsum([0, *(len(grid.masks) for grid in self.grids)])
        each = [tile_codes(grid, int(i)) for grid, i in zip(self.grids, first[:-1], strict=True)]
        codes = np.stack(each)[self.index]
        lists = [
            torch.from_numpy(array).to(device)
            for live in (codes >= 2, codes == 1)
            for array in (live.sum(-1, dtype=np.int32), columns(live))
        ]
        by_batch, by_head = (extent > 1 for extent in self.index.shape)
        codes = codes if by_head else codes[:, 0]
        codes, size = codes if by_batch else codes[0], self.block_size
        code, bits = torch.from_numpy(codes).to(device), torch.from_numpy(contents).to(device)

        def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            # what differs along no axis is not asked for it: numbers here would be of one graph
            lead = (*((b,) if by_batch else ()), *((h,) if by_head else ()))
            tile = code[(*lead, q // size, k // size)]
            byte = bits[(tile - 2).clamp(min=0), q % size, k % size // 8]
            return (tile == 1) | ((tile > 1) & (((byte.int() << (7 - k % 8)) & 128) == 128))

        if len(contents) < 2:
            # one alone would be a graph of its own
            bits = torch.cat([bits, torch.zeros((2, size, size // 8), dtype=torch.uint8, device=device)])
        part, part_cols, full, full_cols = lists
        return FlexBlockMask.from_kv_blocks(
            part,
            part_cols,
            full,
            full_cols,
            BLOCK_SIZE=size,
            mask_mod=mask_mod,
            seq_lengths=(self.nq, self.n),
        )

    def __repr__(self) -> str:
        return f"<block mask {self}>"

    def __str__(self) -> str:
        """Sizes, density, tiles and bytes."""
        full, partial, empty, unique = self.tiles
        return (
            f"{self.nq:,} x {self.n:,}, density {100 * self.density:.3g} %; tiles of {self.block_size:,}: "
            f"{full:,} full, {partial:,} partial ({unique:,} distinct), {empty:,} empty; "
            f"{self.nbytes:,} bytes"
        )


def tile_codes(grid: TileGrid, first: int) -> NDArray[np.int32]:
    """0 for an empty tile, 1 for a full one, first + 2 + content for a partial one: int32 [rows, cols]."""
    rows, cols = grid.shape
    edges = np.zeros((rows, cols + 1), np.int32)
    row = grid.run_row
    edges[row, grid.run_start] += 1
    edges[row, grid.run_end] -= 1
    codes: NDArray[np.int32] = np.cumsum(edges, axis=1, dtype=np.int32)[:, :cols]
    codes[grid.part_row, grid.part_col] = grid.part_mask + first + 2
    return codes


def columns(live: NDArray[np.bool_]) -> NDArray[np.int32]:
    """For each row the columns of live tiles first, by rising column, then the others."""
    return np.argsort(~live, axis=-1, kind="stable").astype(np.int32)
