"""Whether what is chosen for a query depends on tokens after it.

A choice is stable where every key that its score reads stands at or before the query: that is a question
about positions, which the prover answers. Where it is not, an edit of the last token shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import asking
from attndsl.execution import registry
from attndsl.execution.selecting import choices
from attndsl.expr import Selected, Table
from attndsl.relations.proofs import follows
from attndsl.selection import Selection
from attndsl.tiles import lowering

if TYPE_CHECKING:
    from torch import Generator, Tensor

CAUSAL = ir.le(ir.var("k"), ir.var("q"))
LENGTHS = (48, 192, 768, 3072)
"""At which an edit is tried."""
EDITS = 20
WIDTH = 16


@dataclass(frozen=True)
class Witness:
    """With `n` tokens an edit of the one at `edited` changes which keys the query at `row` sees."""

    n: int
    edited: int
    row: int


def unstable(attention: Attention) -> tuple[Table, ...]:
    """The choices of a causal attention that later tokens may change; none where it is not causal."""
    if not attention.selected or not follows(attention.any_head(), CAUSAL):
        return ()
    return tuple(table for table in attention.selected if not stable(table, attention))


def stable(table: Table, attention: Attention) -> bool:
    """Proved for every n."""
    origin = table.origin
    assert isinstance(origin, Selected)
    selection: Selection = registry.plugin("selections", origin.selection)
    with asking(f"the selection `{origin.selection}`"):
        read = selection.reads(origin)
    if read != "of" or origin.of is None:
        # the number of tokens in a bucket is that of later ones too
        masks = (group.relation.mask for group in attention.groups)
        counted = any(node.op == "count_of" and node.value == table for e in masks for node in ir.nodes(e))
        return read == "past" and not counted
    # the mean of a block of queries reads those to its end
    tokens = ir.substitute(origin.of, {"k": ir.floordiv(ir.var("k"), ir.const(origin.unit))})
    return origin.rows == 1 and follows(tokens, CAUSAL)


def witness(attention: Attention) -> Witness | None:
    """Made by trying; None where no edit shows anything."""
    for n in LENGTHS:
        heads = attention.enough_heads()
        sizes = lowering.sizes(attention, n, n, heads)
        for seed in range(EDITS):
            for found in changed(attention, sizes, seed):
                return Witness(n, n - 1, found)
    return None


def changed(attention: Attention, sizes: lowering.Sizes, seed: int) -> Iterator[int]:
    """Rows before the last whose keys change with the last token."""
    import torch

    n, generator = sizes.k.length, torch.Generator().manual_seed(seed)
    q, k = (torch.randn((1, sizes.heads, n, WIDTH), generator=generator) for _ in range(2))
    tables = {table.name: _drawn(table, n, sizes.heads, generator) for table in attention.inputs}
    seen = []
    for _ in range(2):
        made = {name: x.numpy() for name, x in choices(attention, q, k, tables, sizes).items()}
        given = {name: x.numpy() for name, x in tables.items()} | made
        seen.append(lowering.dense(attention, sizes, given))
        q, k = q.clone(), k.clone()
        q[:, :, -1], k[:, :, -1] = (4 * torch.randn((WIDTH,), generator=generator) for _ in range(2))
    differ: NDArray[np.bool_] = (seen[0] != seen[1]).any((0, 1, 3))[:-1]
    yield from np.flatnonzero(differ).tolist()


def _drawn(table: Table, n: int, heads: int, generator: Generator) -> Tensor:
    import torch

    sizes = {"B": 1, "H": heads, "n": n, "nq": n, "D": WIDTH}
    shape = [sizes.get(axis, 4) if isinstance(axis, str) else axis for axis in table.dims]
    if table.dtype == "float":
        return torch.randn(shape, generator=generator)
    return (
        torch.zeros(shape, dtype=torch.int64) if table.dtype == "int" else torch.ones(shape, dtype=torch.bool)
    )
