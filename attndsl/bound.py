"""Bound: what a program gives out, an attention with its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.expr import Table

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
        """Trainable parameters, in the order of their first use."""
        return self.attention.learned

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
        heads: int = 1,
        **inputs: ArrayLike,
    ) -> NDArray[np.bool_]:
        """The meaning, pointwise: bool [H or 1, nq, n], or [B, H or 1, nq, n] with batched tables."""
        from attndsl.tiles import lowering

        return lowering.written_out(
            self.attention, False, length, q_length, q_offset, k_offset, heads, inputs
        )

    def counts(
        self,
        length: int,
        q_length: int | None = None,
        *,
        q_offset: int | None = None,
        k_offset: int | None = None,
        heads: int = 1,
        **inputs: ArrayLike,
    ) -> NDArray[np.int64]:
        """Multiplicities, int64, with the axes of `mask`."""
        from attndsl.tiles import lowering

        return lowering.written_out(self.attention, True, length, q_length, q_offset, k_offset, heads, inputs)

    def block_mask(
        self,
        length: int,
        block_size: int = 128,
        q_length: int | None = None,
        *,
        q_offset: int | None = None,
        k_offset: int | None = None,
        heads: int = 1,
        **inputs: ArrayLike,
    ) -> BlockMask:
        """The tiles of `block_size` (a multiple of 8) tokens on a side."""
        from attndsl.tiles import lowering

        return lowering.tiles_of(
            self.attention, length, block_size, q_length, q_offset, k_offset, heads, inputs
        )

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
        from attndsl.analysis.graph import graph, pairs_of

        return graph(pairs_of(self.attention, length, by, block_size, heads, head, inputs), by, self.name)


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
