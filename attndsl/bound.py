"""Bound: what a program gives out, an attention with its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.expr import Table
from attndsl.language.lookups import placed

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from attndsl.tiles.blockmask import BlockMask


@dataclass(frozen=True)
class Bound:
    """An attention, or a pattern standing alone, with its parameters bound.

    attention:  its meaning, all that plans and analyses read.
    parameters: the names that it takes.
    rebind:     gives it with other parameters: what `bound(w=256)` calls.
    """

    attention: Attention
    parameters: tuple[str, ...] = field(default=(), compare=False, repr=False)
    rebind: Callable[..., Bound] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.attention.name

    @property
    def inputs(self) -> tuple[Table, ...]:
        """Run-time tables, in the order of their declaration."""
        return self.attention.inputs

    @property
    def learned(self) -> tuple[Table, ...]:
        """Trainable parameters, in the order of their first use; of a sum its gates' and then its parts'."""
        each = (self.attention, *(part.attention for part in self.attention.parts))
        return tuple(table for attention in each for table in attention.learned if table.learned)

    def __call__(self, *args: Any, **params: Any) -> Bound:
        if self.rebind is None:
            raise fail(
                f"`{self.name}` is a copy that cannot be bound anew",
                help="load the program again, and bind it",
            )
        return self.rebind(*args, **params)

    def __getstate__(self) -> dict[str, Any]:
        """All but `rebind`, which holds the whole program."""
        return {**vars(self), "rebind": None}

    def __deepcopy__(self, memo: object) -> Bound:
        return self

    def mask(
        self,
        length: int,
        q_length: int | None = None,
        *,
        q_offset: int | None = None,
        k_offset: int | None = None,
        q_positions: ArrayLike | None = None,
        k_positions: ArrayLike | None = None,
        n: int | None = None,
        heads: int = 1,
        **inputs: ArrayLike,
    ) -> NDArray[np.bool_]:
        """The meaning, pointwise: bool [H or 1, nq, n], or [B, H or 1, nq, n] with batched tables.

        Queries and keys stand where offsets or positions ([nq], [length], or one row for each batch row) say;
        n is the greatest position of a key + 1. Raises AttnError for sizes, positions and tables that do not
        fit.
        """
        from attndsl.tiles import lowering

        places = q_offset, k_offset, q_positions, k_positions, n
        sizes = lowering.sizes_of(self.attention, length, q_length, heads, *places)
        with placed(self.attention):
            return lowering.written_out(self.attention, sizes, inputs, counts=False)

    def counts(
        self,
        length: int,
        q_length: int | None = None,
        *,
        q_offset: int | None = None,
        k_offset: int | None = None,
        q_positions: ArrayLike | None = None,
        k_positions: ArrayLike | None = None,
        n: int | None = None,
        heads: int = 1,
        **inputs: ArrayLike,
    ) -> NDArray[np.int64]:
        """Multiplicities, int64, as `mask`."""
        from attndsl.tiles import lowering

        places = q_offset, k_offset, q_positions, k_positions, n
        sizes = lowering.sizes_of(self.attention, length, q_length, heads, *places)
        with placed(self.attention):
            return lowering.written_out(self.attention, sizes, inputs, counts=True)

    def block_mask(
        self,
        length: int,
        block_size: int = 128,
        q_length: int | None = None,
        *,
        q_offset: int | None = None,
        k_offset: int | None = None,
        q_positions: ArrayLike | None = None,
        k_positions: ArrayLike | None = None,
        n: int | None = None,
        heads: int = 1,
        **inputs: ArrayLike,
    ) -> BlockMask:
        """The tiles of `block_size` (a multiple of 8) tokens on a side, of what `mask` takes."""
        from attndsl.tiles import lowering

        places = q_offset, k_offset, q_positions, k_positions, n
        sizes = lowering.sizes_of(self.attention, length, q_length, heads, *places)
        lowering.checked_block_size(block_size)
        tables = lowering.checked_tables(self.attention, inputs, sizes)
        with placed(self.attention):
            return lowering.block_mask(self.attention, sizes, tables, block_size)

    def graph(
        self,
        length: int,
        by: Literal["token", "block"] = "token",
        *,
        block_size: int | None = None,
        heads: int = 1,
        head: int | None = None,
        **inputs: ArrayLike,
    ) -> nx.DiGraph:
        """The graph with an edge from each key to each query that sees it, in `head` or in some head.

        A node is a token (0 .. n - 1, up to 8192) or a block of tokens, with its `first` and `last`; an edge
        between blocks has its live `pairs` and whether it is `full`.
        """
        from attndsl.analysis.graph import graph, tiles_of

        return graph(tiles_of(self.attention, length, by, block_size, heads, head, inputs), by, self.name)


@dataclass(frozen=True)
class Unbound:
    """An attention or pattern that needs parameters: call it with them.

    written:  how a call is written.
    """

    name: str
    written: str
    bind: Callable[..., Bound] = field(compare=False, repr=False)

    def __call__(self, *args: Any, **params: Any) -> Bound:
        return self.bind(*args, **params)

    def __repr__(self) -> str:
        return f"<{self.name} needs parameters: {self.written}>"
