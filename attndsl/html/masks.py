"""Masks as the page draws them: rectangles of tokens, each with its number of live pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attndsl.tiles import cells
from attndsl.tiles.blockmask import BlockMask

SIDES = {1: 96, 2: 64, 3: 48, 4: 48}
"""Cells on a side at most, by how many masks stand beside each other: a page of them stays small."""
COARSE = 24
"""With fewer tiles on a side than this, cells are parts of tiles."""


@dataclass(frozen=True, eq=False)
class Mask:
    """Cells of `queries` x `keys` tokens over an nq x n mask whose queries start at `first`.

    live int64 [ceil(nq / queries), ceil(n / keys)]: live pairs of one head. Cells at the lower and right
    edge may be smaller. `label` names the heads.
    """

    label: str
    first: int
    nq: int
    n: int
    block_size: int
    queries: int
    keys: int
    live: NDArray[np.int64]

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """The pairs that each cell holds, live or not."""
        rows, columns = (np.arange(count) for count in self.live.shape)
        heights = np.minimum(self.queries, self.nq - self.queries * rows)
        widths = np.minimum(self.keys, self.n - self.keys * columns)
        return np.outer(heights, widths)

    @cached_property
    def levels(self) -> NDArray[np.int8]:
        """As in `cells.LEVELS`."""
        return cells.levels(self.live / self.pairs)

    @property
    def unit(self) -> str:
        """What a cell is, in words."""
        size, sides = self.block_size, (self.queries, self.keys)
        if sides == (1, 1):
            return "one query and one key"
        if sides == (size, size):
            return f"one tile of {size:,} × {size:,} tokens"
        if all(side % size == 0 for side in sides):
            rows, columns = (side // size for side in sides)
            return f"{rows:,} × {columns:,} tiles of {size:,} × {size:,} tokens"
        return f"{self.queries:,} × {self.keys:,} tokens, a part of a tile of {size:,} × {size:,}"


def masks(block_mask: BlockMask, first: int = 0) -> list[Mask]:
    """The distinct masks of batch row 0, the first four of them; queries start at position `first`."""
    distinct = cells.distinct(block_mask)
    shown = distinct[: max(SIDES)]
    nq, n, size = block_mask.nq, block_mask.n, block_mask.block_size
    queries, keys = extents(nq, n, size, SIDES[len(shown)])
    return [
        Mask(
            "every head" if len(distinct) == 1 else cells.heads(heads),
            first, nq, n, size, queries, keys, cells.sums(grid, queries, keys),
        )
        for heads, grid in shown
    ]  # fmt: skip


def extents(nq: int, n: int, block_size: int, room: int) -> tuple[int, int]:
    """Queries and keys of a cell: a tile where these are neither too few nor too many.

    Cells are square, but for masks with far fewer queries than keys.
    """

    def along(length: int) -> int:
        tiles = -(-length // block_size)
        return block_size if COARSE <= tiles <= room else cells.side(length, room, block_size)

    keys = along(n)
    square = max(keys, along(nq))
    queries = (side for side in cells.sides(block_size, square) if side == square or nq < 16 * side)
    return next(queries), keys
