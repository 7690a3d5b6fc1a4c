"""Whether what is chosen for a query depends on tokens after it.

A choice is stable where every key that its score reads stands at or before the query: that is a question
about positions, which the prover answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import asking
from attndsl.execution import registry
from attndsl.execution.selecting import choices
from attndsl.expr import Selected, Table
from attndsl.relations.proofs import follows, subset
from attndsl.selection import Selection
from attndsl.tiles import lowering

if TYPE_CHECKING:
    from torch import Generator, Tensor

CAUSAL = ir.le(ir.var("k"), ir.var("q"))
LENGTH, TRIED = 48, 20
"""Of choices that are tried where no proof says whether a mask is causal, and how many."""
WIDTH = 16


def unstable(attention: Attention) -> tuple[Table, ...]:
    """The choices of a causal attention that later tokens may change; none where it is not causal."""
    if not attention.selected or not causal(attention):
        return ()
    return tuple(table for table in attention.selected if not stable(table, attention))


def causal(attention: Attention) -> bool:
    """Proved for every n, or where that is undecided seen of every choice that is tried."""
    verdict = subset(attention.any_head(), CAUSAL)
    if verdict.status != "undecided" or attention.streams:
        return verdict.status == "proved"
    import torch

    sizes = lowering.sizes(attention, LENGTH, LENGTH, attention.enough_heads())
    generators = (torch.Generator().manual_seed(seed) for seed in range(TRIED))
    given = (random_call(attention, sizes, generator) for generator in generators)
    return not any(np.triu(seen(attention, sizes, *each), 1).any() for each in given)


def stable(table: Table, attention: Attention) -> bool:
    """Proved for every n."""
    origin = table.origin
    assert isinstance(origin, Selected)
    selection: Selection = registry.plugin("selections", origin.selection)
    with asking(f"the selection `{origin.selection}`"):
        read = selection.reads(origin)
    if read != "of" or origin.of is None:
        return read == "past" and not counted(table, attention)
    # the mean of a block of queries reads those to its end
    tokens = ir.substitute(origin.of, {"k": ir.floordiv(ir.var("k"), ir.const(origin.unit))})
    return origin.rows == 1 and follows(tokens, CAUSAL)


def counted(table: Table, attention: Attention) -> bool:
    """Whether masks read how many tokens are in a bucket, which are later ones too."""
    masks = (group.relation.mask for group in attention.groups)
    return any(node.op == "count_of" and node.value == table for e in masks for node in ir.nodes(e))


Given: TypeAlias = "tuple[Tensor, Tensor, dict[str, Tensor]]"


def random_call(attention: Attention, sizes: lowering.Sizes, generator: Generator) -> Given:
    """Random q, k and inputs."""
    import torch

    n, heads = sizes.k.length, sizes.heads
    q, k = (torch.randn((1, heads, n, WIDTH), generator=generator) for _ in range(2))
    return q, k, {table.name: _drawn(table, n, heads, generator) for table in attention.inputs}


def seen(
    attention: Attention, sizes: lowering.Sizes, q: Tensor, k: Tensor, tables: Mapping[str, Tensor]
) -> NDArray[np.bool_]:
    """The mask with what is chosen of these."""
    made = {**tables, **choices(attention, q, k, tables, sizes)}
    return lowering.dense(attention, sizes, {name: x.numpy() for name, x in made.items()})


def _drawn(table: Table, n: int, heads: int, generator: Generator) -> Tensor:
    import torch

    sizes = {"B": 1, "H": heads, "n": n, "nq": n, "D": WIDTH}
    shape = [sizes.get(axis, 4) if isinstance(axis, str) else axis for axis in table.dims]
    if table.dtype == "float":
        return torch.randn(shape, generator=generator)
    return (
        torch.zeros(shape, dtype=torch.int64) if table.dtype == "int" else torch.ones(shape, dtype=torch.bool)
    )
