"""Bound: what a program gives out, an attention with its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Never

import numpy as np

from attndsl.attention import Attention
from attndsl.errors import AttnError, fail
from attndsl.expr import Selected, Table, nodes, number
from attndsl.keywords import by_name, checked_dtype, missing
from attndsl.language.lookups import placed
from attndsl.pictures import notebook

if TYPE_CHECKING:
    import networkx as nx
    from numpy.typing import ArrayLike, NDArray

    from attndsl.execution.flexing import Flex
    from attndsl.tiles.blockmask import BlockMask


DRAWN_WIDTH = 64
"""Features of the q and k that a choice is drawn of for a picture."""


class Parameters(dict[str, str]):
    """What a definition takes, by name, each as it is written."""

    if not TYPE_CHECKING:  # a type checker is to tell that it is no method

        def __call__(self):
            help = "what is learned is in `attndsl.compile(attention, length=...).module().parameters()`"
            raise fail("`parameters` is no method, but a dictionary of what the text takes", help=help)


@dataclass(frozen=True)
class Bound:
    """An attention, or a pattern standing alone, with its parameters bound.

    attention:  its meaning, all that plans and analyses read.
    parameters: the names that it takes, each with its value as it is written.
    rebind:     gives it with other parameters: what `bound(w=256)` calls.
    tables:     run-time tables that it comes with, by name; a call may give another in place of one.
    """

    attention: Attention
    parameters: Mapping[str, str] = field(default_factory=Parameters, compare=False)
    rebind: Callable[..., Bound] | None = field(default=None, compare=False)
    tables: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def carrying(self, tables: Mapping[str, Any]) -> Bound:
        """The same with these `tables`."""
        rebind = self.rebind
        again = None if rebind is None else lambda *args, **params: rebind(*args, **params).carrying(tables)
        return replace(self, tables=tables, rebind=again)

    @property
    def name(self) -> str:
        """Under which the program defines it."""
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

    @property
    def written(self) -> str:
        """`longformer(w = 512)`."""
        values = ", ".join(f"{name} = {value}" for name, value in self.parameters.items())
        return f"{self.name}({values})" if values else self.name

    def __repr__(self) -> str:
        return f"<attention {self.written}{self.attention.described}>"

    def __str__(self) -> str:
        """Its definition as it is written."""
        written = self.attention.written
        return repr(self) if written is None else written.text

    def _repr_html_(self) -> str:
        return notebook.shown([self.pictured()])

    def pictured(self) -> str:
        """Its mask for a notebook, at a length that shows its parts; or why there is no picture."""
        try:
            n = _telling(self.attention)
            blocks = _example(self, n)
            rows = np.flatnonzero(blocks.row_counts().any((0, 1)))
            if len(rows) and 2 * rows[-1] < n:
                blocks = _example(self, int(rows[-1]) + 1)
        except AttnError as error:
            return notebook.text(f"{self!r}\nno picture: {error.diagnostics[0].message}")
        return notebook.figures(blocks, self.written, ", one drawn choice" if self.attention.selected else "")

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            if name in vars(self).get("parameters", ()):
                help = f'write `attention.parameters["{name}"]`'
                raise AttributeError(f"an attention has no attribute `{name}`: {help}")
            raise missing("an attention", name, dir(Bound))

        def _of_texts(self, *other):
            help = "write it there: `pattern both = a & b`, or a claim, `assert a <= b`"
            raise fail("patterns are put together and compared in the text", help=help)

        __and__ = __rand__ = __or__ = __ror__ = __sub__ = __add__ = __invert__ = _of_texts
        __le__ = __lt__ = __ge__ = __gt__ = _of_texts

    def __call__(self, *args: Any, **params: Any) -> Bound:
        """The same with other parameters; those that are not given keep their values.

        params  numbers, lists or ranges of integers, or texts of the language: `bound(w=256)`,
                `bound(globals=[0, 8])`, `bound(w="2 * 128")`. By place too, in the order of the text

        Raises AttnError for a parameter that it does not take, or with which the definition means nothing.
        """
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

    @by_name
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

        length       keys, in tokens
        q_length     queries; as many as keys if not given
        q_offset     position of the first query, below n; if not given what the text says, or n - nq
        k_offset     position of the first key, 0 if not given
        q_positions  where each query stands, [nq] or [B, nq], in place of an offset
        k_positions  where each key stands, [length] or [B, length], likewise
        n            what `n` means in the text; the greatest position of a key + 1 if not given
        heads        query heads H
        inputs       run-time tables by name, with the axes that they are declared with; choices too, as
                     `Plan.choices` gives them

        Raises AttnError for sizes, positions and tables that do not fit.
        """
        from attndsl.tiles import lowering

        places = q_offset, k_offset, q_positions, k_positions, n
        sizes = lowering.sizes_of(self.attention, length, q_length, heads, *places)
        with placed(self.attention, heads):
            return lowering.written_out(self.attention, sizes, {**self.tables, **inputs}, counts=False)

    @by_name
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
        """How many times a pair is related: int64 of the shape of `mask`, positive where that holds.

        length       keys, in tokens
        q_length     queries; as many as keys if not given
        q_offset     position of the first query, below n; if not given what the text says, or n - nq
        k_offset     position of the first key, 0 if not given
        q_positions  where each query stands, [nq] or [B, nq], in place of an offset
        k_positions  where each key stands, [length] or [B, length], likewise
        n            what `n` means in the text; the greatest position of a key + 1 if not given
        heads        query heads H
        inputs       run-time tables by name, with the axes that they are declared with; choices too, as
                     `Plan.choices` gives them

        Raises AttnError as `mask`.
        """
        from attndsl.tiles import lowering

        places = q_offset, k_offset, q_positions, k_positions, n
        sizes = lowering.sizes_of(self.attention, length, q_length, heads, *places)
        with placed(self.attention, heads):
            return lowering.written_out(self.attention, sizes, {**self.tables, **inputs}, counts=True)

    @by_name
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
        """The mask in tiles, made without its n x n pairs.

        block_size   tokens on a side of a tile, a multiple of 8
        length       keys, in tokens
        q_length     queries; as many as keys if not given
        q_offset     position of the first query, below n; if not given what the text says, or n - nq
        k_offset     position of the first key, 0 if not given
        q_positions  where each query stands, [nq] or [B, nq], in place of an offset
        k_positions  where each key stands, [length] or [B, length], likewise
        n            what `n` means in the text; the greatest position of a key + 1 if not given
        heads        query heads H
        inputs       run-time tables by name, with the axes that they are declared with; choices too, as
                     `Plan.choices` gives them

        Raises AttnError as `mask`, and for a block size that is none.
        """
        from attndsl.tiles import lowering

        places = q_offset, k_offset, q_positions, k_positions, n
        sizes = lowering.sizes_of(self.attention, length, q_length, heads, *places)
        lowering.checked_block_size(block_size)
        tables = lowering.checked_tables(self.attention, {**self.tables, **inputs}, sizes)
        with placed(self.attention, heads):
            return lowering.block_mask(self.attention, sizes, tables, block_size)

    @by_name
    def to_flex(
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
        head_dim: int | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        **inputs: ArrayLike,
    ) -> Flex:
        """The attention for FlexAttention: `flex_attention(q, k, v, *attention.to_flex(4096))`, with its own
        scale and, where there are fewer key heads, `enable_gqa=True`.

        block_size   tokens on a side of a tile, a multiple of 8
        length       keys, in tokens
        q_length     queries; as many as keys if not given
        q_offset     position of the first query, below n; if not given what the text says, or n - nq
        k_offset     position of the first key, 0 if not given
        q_positions  where each query stands, [nq] or [B, nq], in place of an offset
        k_positions  where each key stands, [length] or [B, length], likewise
        n            what `n` means in the text; the greatest position of a key + 1 if not given
        heads        query heads H
        head_dim     features of queries and keys; needed where the score reads their number
        dtype        of q, k and v; scores are float32, and float64 for that alone
        device       where the tensors are that are read
        inputs       run-time tables by name, with the axes that they are declared with; choices too, as
                     `Plan.choices` gives them. Gradients pass through tensors

        Raises AttnError as `block_mask`, and for an attention that FlexAttention does not compute.
        """
        import torch

        from attndsl.execution.flexing import check_clauses, flex_of
        from attndsl.tiles import lowering

        attention, places = self.attention, (q_offset, k_offset, q_positions, k_positions, n)
        check_clauses(attention)
        sizes = lowering.sizes_of(attention, length, q_length, heads, *places)
        lowering.checked_block_size(block_size)
        own = getattr(torch, checked_dtype(dtype))
        read = [table for table in (*attention.inputs, *attention.selected) if table in attention.read]
        given = {**self.tables, **inputs}
        tables = lowering.checked_tables(attention, given, sizes, None, head_dim, read)
        for table in attention.learned:
            help = "a plan has its first values, and takes others: `plan.to_flex(learned=...)`"
            raise fail(f"`{table.name}` is learned, and has no values here", help=help)
        with placed(attention, heads):
            blocks = lowering.block_mask(attention, sizes, tables, block_size)
            return flex_of(attention, sizes, blocks, tables, head_dim, own, device)

    @by_name
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
        """The graph with an edge from each key to each query that sees it.

        length      tokens; by token up to 8192
        by          what a node is: a `token`, 0 .. n - 1, or a `block` of them with its `first` and `last`;
                    an edge between blocks has its live `pairs` and whether it is `full`
        block_size  tokens of a block, a multiple of 8; if not given as few as leave a graph of a good size
        heads       query heads H
        head        the one that it is about; if not given a query sees what it does in some head
        inputs      run-time tables by name

        Raises AttnError for more nodes than there may be, for tables of several batch rows, and for queries
        that do not begin at position 0.
        """
        from attndsl.analysis.graph import graph, tiles_of

        given = {**self.tables, **inputs}
        return graph(tiles_of(self.attention, length, by, block_size, heads, head, given), by, self.name)


def _example(bound: Bound, n: int) -> BlockMask:
    """The tiles of n tokens, of a choice that is drawn where keys are chosen by content."""
    from attndsl.execution.selecting import drawn
    from attndsl.tiles import lowering

    attention = bound.attention
    attention.require_pairs()
    heads = lowering.heads_of(attention, bound.tables)
    sizes = lowering.sizes(attention, n, n, heads)
    chosen = drawn(attention, sizes, heads, DRAWN_WIDTH, {}) if attention.selected else {}
    tables = lowering.checked_tables(attention, {**bound.tables, **chosen}, sizes)
    return lowering.block_mask(attention, sizes, tables, 8 if n < 1024 else 128)


def _telling(attention: Attention) -> int:
    """A power of two: four times the greatest number in a mask, of divisors sixteen times; less where masks
    cost their area."""
    from attndsl.relations.relation import is_affine

    masks = [node for group in attention.groups for node in nodes(group.relation.mask)]
    divisors = {node.args[1] for node in masks if node.op in ("floordiv", "mod")}
    numbers = [
        abs(value) * (4 if node in divisors else 1)
        for node in masks
        if isinstance(value := number(node), int)
    ]
    chosen = [t.origin for t in attention.selected if isinstance(t.origin, Selected)]
    numbers += [value for one in chosen for _, value in one.arguments if isinstance(value, int)]
    affine = not attention.selected and all(is_affine(group.relation.mask) for group in attention.groups)
    longest = 2**15 if affine else 2**10
    return min(max(64, 1 << (4 * max(numbers, default=1) - 1).bit_length()), longest)


@dataclass(frozen=True)
class Unbound:
    """An attention or pattern that needs parameters: call it with them. Nothing else is known of it, and
    whatever is asked of it as of a Bound raises AttnError.

    written:  how a call is written.
    """

    name: str
    written: str
    bind: Callable[..., Bound] = field(compare=False, repr=False)

    def __call__(self, *args: Any, **params: Any) -> Bound:
        """With these `params`, as of `Bound.__call__`; those without a default are needed."""
        return self.bind(*args, **params)

    def __getattr__(self, name: str) -> Never:
        if name.startswith("_") or name not in dir(Bound):
            raise AttributeError(f"`{self.name}` needs parameters, and has no attribute `{name}`")
        raise self.refusal

    @property
    def refusal(self) -> AttnError:
        """What is raised where its parameters are needed."""
        return fail(f"`{self.name}` needs parameters", help=f"call it with them: `{self.written}`")

    def __repr__(self) -> str:
        return f"<{self.name} needs parameters: {self.written}>"
