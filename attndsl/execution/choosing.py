"""Choices: what selections choose of q and k, made before any backend runs.

To torch a plain call is a function, any other an operator, `attndsl::choose`: what it gives are integers, so
that a backward pass keeps them as it keeps any other tensor, and nothing is chosen twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.execution import lowered, registry
from attndsl.execution.lowered import Lowered, Places
from attndsl.expr import Selected, Table
from attndsl.selection import Offered, Selection
from attndsl.tiles.lowering import Sizes


def choices(
    attention: Attention, q: Tensor, k: Tensor, tables: Mapping[str, Tensor], sizes: Sizes
) -> dict[str, Tensor]:
    """What is chosen for q [B, H, nq, D] of k [B, Hkv, n, D], by name of the table.

    Raises AttnError where positions are not such as the kind of a choice needs.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    offered = Offered(q.detach().to(wide), k.detach().to(wide), tables, sizes.q, sizes.k, sizes.n)
    with torch.no_grad():
        return {table.name: _choice(table, offered) for table in attention.selected}


def _choice(table: Table, offered: Offered) -> Tensor:
    origin = table.origin
    assert isinstance(origin, Selected)
    selection: Selection = registry.plugin("selections", origin.selection)
    if selection.kind != "list":
        _check_keys(origin.selection, offered)
    elif origin.rows > 1 and not (offered.q_at.starts == offered.k_at.starts == (0,)):
        raise fail(f"`{origin.selection}` chooses for whole blocks of queries, which begin at position 0")
    found = selection.choose(dict(origin.arguments), origin, offered)
    wanted = _shape(table, offered.q, offered.k)
    if found.dtype.is_floating_point or [*found.shape] != wanted:
        given = f"{found.dtype}{[*found.shape]}"
        raise fail(f"the selection `{origin.selection}` returned {given}, not integers {wanted}")
    return found.long()


def _check_keys(name: str, offered: Offered) -> None:
    """Raises AttnError where keys are not all there from position 0 on, or a query has none at its place."""
    batch = range(max(len(offered.q_at.rows), len(offered.k_at.rows)))
    if offered.k_at.length and offered.k_at.starts != (0,):
        raise fail(f"`{name}` sorts all keys, and these are not those from position 0 on")
    if offered.q_at.length and any(offered.q_at.span(row)[1] >= offered.k_at.length for row in batch):
        raise fail(
            f"`{name}` needs a key at the place of each query",
            help="for cross attention choose by `topk`",
        )


def _shape(table: Table, q: Tensor, k: Tensor) -> list[int]:
    """Of a choice; sizes may be symbols."""
    origin = table.origin
    assert isinstance(origin, Selected)
    sizes: dict[str | int, Any] = {
        "B": q.shape[0],
        "H": q.shape[1],
        "nq": q.shape[2],
        "n": k.shape[2],
        "rows": (q.shape[2] + origin.rows - 1) // origin.rows,
    }
    return [sizes.get(axis, axis) for axis in table.dims]


@torch.library.custom_op("attndsl::choose", mutates_args=())
def choose(
    q: Tensor,
    k: Tensor,
    tensors: list[Tensor],
    q_offset: list[int] | None,
    q_at: Tensor | None,
    k_offset: list[int] | None,
    k_at: Tensor | None,
    n: int | None,
    identity: str,
) -> list[Tensor]:
    """The choices of an attention, in the order of their names; arguments as of `attndsl::attend`."""
    found = lowered.find(identity, tensors)
    return _chosen(found, q, k, tensors, (q_offset, q_at, k_offset, k_at, n))


def _chosen(found: Lowered, q: Tensor, k: Tensor, tensors: Sequence[Tensor], places: Places) -> list[Tensor]:
    sizes = found.sizes(q, k, places)
    return [*choices(found.attention, q, k, found.named(tensors), sizes).values()]


@choose.register_fake
def _(q: Tensor, k: Tensor, tensors: list[Tensor], *places: Any) -> list[Tensor]:
    found = lowered.find(places[-1], tensors)
    return [q.new_empty(_shape(table, q, k), dtype=torch.int64) for table in found.selected]


@choose.register_vmap
def _(info: Any, in_dims: Any, q: Tensor, k: Tensor, tensors: list[Tensor], *places: Any) -> Any:
    """One call after the other."""

    def at(x: Any, d: Any, i: int) -> Any:
        return x.select(d, i) if isinstance(d, int) else x

    rows = [
        choose(
            at(q, in_dims[0], i),
            at(k, in_dims[1], i),
            [at(x, d, i) for x, d in zip(tensors, in_dims[2] or [None] * len(tensors), strict=True)],
            *(at(x, d, i) for x, d in zip(places, in_dims[3:], strict=True)),
        )
        for i in range(info.batch_size)
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)], [0] * len(rows[0])


def chosen(
    found: Lowered, q: Tensor, k: Tensor, tensors: Sequence[Tensor], places: Places, watched: bool
) -> list[Tensor]:
    """The choices of a call, by whichever way in is right for what watches it."""
    if watched or torch._C._are_functorch_transforms_active():
        made: list[Tensor] = choose(
            q.detach(), k.detach(), [x.detach() for x in tensors], *places, found.identity
        )
        return made
    return _chosen(found, q, k, tensors, places)
