"""The typed, immutable attention that elaboration produces and everything else reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from attndsl.errors import fail
from attndsl.expr import (
    TRUE,
    ZERO,
    Expr,
    Table,
    all_of,
    any_of,
    const,
    exists,
    maximum,
    mul,
    nodes,
    substitute,
    var,
)

if TYPE_CHECKING:
    import networkx as nx
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from attndsl.tiles.blockmask import BlockMask
    from attndsl.tiles.lowering import Sizes

HEADS_TRIED = 256
DENSE_LIMIT = 2**30


@dataclass(frozen=True)
class Relation:
    """A pattern: which (q, k) are related and, where `+` was used, how many times.

    `mask` is a truth over q, k, n, nq, h, H and tables; `count` an integer that is positive exactly where
    the mask holds, or None where every multiplicity is one.
    """

    mask: Expr
    count: Expr | None = None


@dataclass(frozen=True)
class Norm:
    """`softmax` (with an optional sink logit per head), `sigmoid` or `relu`."""

    kind: Literal["softmax", "sigmoid", "relu"] = "softmax"
    sink: Expr | None = None


@dataclass(frozen=True)
class HeadGroup:
    """What one set of query heads does.

    score:  the logit, a real over s (= Q @ K / sqrt(D)), Q, K, q, k, n, h, H, D and tables; `var("s")` itself
            where no score was given. `Q @ K` written out appears as inner(Q, K).
    decay:  a real factor of the weight with the multiplicity already in it, or None.
    heads:  a truth over h and H; the groups of one attention hold each head exactly once.
    """

    relation: Relation
    score: Expr
    decay: Expr | None = None
    norm: Norm = Norm()
    heads: Expr = TRUE


@dataclass(frozen=True)
class Attention:
    """The meaning of one attention, or of a pattern standing alone, with its parameters bound.

    inputs:   run-time tables, in the order of their declaration.
    learned:  trainable parameters, in the order of their first use.
    offset:   position of query row 0 over n and nq; None means n - nq, which must not be negative.
    least_heads: how many heads there are at least: one more than the last that a range or list names.
    rebind:   gives the attention with other parameters: what `attention(w=256)` calls.
    parameters: the names that it takes.
    """

    name: str
    groups: tuple[HeadGroup, ...]
    inputs: tuple[Table, ...] = ()
    learned: tuple[Table, ...] = ()
    offset: Expr | None = None
    least_heads: int = 1
    rebind: Callable[..., Attention] | None = field(default=None, compare=False, repr=False)
    parameters: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def of_pattern(
        name: str, relation: Relation, rebind: Callable[..., Attention] | None = None
    ) -> Attention:
        """A pattern as an attention of its own: no score, one group of heads."""
        decay = None if relation.count is None else mul(const(1.0), relation.count)
        return Attention(name, (HeadGroup(relation, var("s"), decay),), rebind=rebind)

    def enough_heads(self) -> int:
        """The least number of heads at which every group holds one; claims are about that many or more."""
        heads = self.least_heads
        while not all(self._holds_one(group, heads) for group in self.groups):
            heads += 1
            if heads > self.least_heads + HEADS_TRIED:
                raise fail(f"a group of heads of `{self.name}` holds no head")
        return heads

    def _holds_one(self, group: HeadGroup, heads: int) -> bool:
        return any(substitute(group.heads, {"h": const(h), "H": const(heads)}) is TRUE for h in range(heads))

    def any_head(self) -> Expr:
        """What some head relates, where every group holds a head.

        The head is bound under a name that no text has, but as h where a table has entries for each head.
        """
        heads = maximum(var("H"), const(self.enough_heads()))
        found = []
        for group in self.groups:
            mask, which = group.relation.mask, all_of(group.heads, group.relation.mask)
            name = "h" if any(table.headed for table in mask.tables) else "?h"
            bound = exists(name, ZERO, heads, substitute(which, {"h": var(name)}))
            found.append(bound if by_head(mask) else mask)
        return any_of(*found)

    def __call__(self, *args: Any, **params: Any) -> Attention:
        if self.rebind is None:
            raise fail(
                f"`{self.name}` is a copy that cannot be bound anew",
                help="load the program again, and bind it",
            )
        return self.rebind(*args, **params)

    def __getstate__(self) -> dict[str, Any]:
        """All but `rebind`, which holds the whole program."""
        return {**vars(self), "rebind": None}

    def __deepcopy__(self, memo: object) -> Attention:
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
        return self._dense(False, length, q_length, q_offset, k_offset, heads, inputs)

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
        return self._dense(True, length, q_length, q_offset, k_offset, heads, inputs)

    def _dense(
        self,
        counts: bool,
        length: int,
        q_length: int | None,
        q_offset: int | None,
        k_offset: int | None,
        heads: int,
        inputs: Mapping[str, ArrayLike],
    ) -> NDArray[Any]:
        from attndsl.tiles import lowering

        sizes = self._sizes(length, q_length, q_offset, k_offset, heads)
        if sizes.nq * sizes.n_keys > DENSE_LIMIT:
            raise fail(
                f"a mask of {sizes.nq:,} x {sizes.n_keys:,} is not written out: "
                f"the limit is {DENSE_LIMIT:,} pairs",
                help="`block_mask` gives its tiles",
            )
        tables = lowering.checked_tables(self, inputs, sizes, needed=lowering.mask_tables(self, counts))
        found = lowering.dense(self, sizes, tables, counts)
        return found if any(t.batched for t in self.inputs) or len(found) > 1 else found[0]

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

        lowering.checked_block_size(block_size)
        sizes = self._sizes(length, q_length, q_offset, k_offset, heads)
        tables = lowering.checked_tables(self, inputs, sizes)
        return lowering.block_mask(self, sizes, tables, block_size)

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

        return graph(pairs_of(self, length, by, block_size, heads, head, inputs), by, self.name)

    def _sizes(
        self, length: int, q_length: int | None, q_offset: int | None, k_offset: int | None, heads: int
    ) -> Sizes:
        from attndsl.tiles import lowering

        keys = lowering.checked_length("length", length)
        nq = keys if q_length is None else lowering.checked_length("q_length", q_length)
        return lowering.sizes(self, keys, nq, lowering.checked_length("heads", heads), q_offset, k_offset)


def over_heads(mask: Expr) -> Expr:
    """What some head relates."""
    return exists("h", ZERO, var("H"), mask) if by_head(mask) else mask


def by_head(mask: Expr) -> bool:
    """Whether heads may differ: it reads h, or a table with entries for each head, outside a union over h."""
    found: set[Expr] = set()
    for e in nodes(mask):
        reads = e is var("h") or (isinstance(e.value, Table) and e.value.headed)
        bound = e.op == "exists" and e.value == "h"
        if reads or (not bound and any(arg in found for arg in e.args)):
            found.add(e)
    return mask in found
