"""How torch sees the choices of a call, which are made before any backend runs.

To torch a plain call is a function, any other an operator, `attndsl::choose`: what it gives are integers, so
that a backward pass keeps them as it keeps any other tensor, and nothing is chosen twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from attndsl.execution import lowered
from attndsl.execution.lowered import Lowered, Places
from attndsl.execution.selecting import choices, shape

KEPT: ContextVar[list[list[Tensor]] | None] = ContextVar("KEPT", default=None)
"""Where the choices of calls are kept, one after the other, as int32: they are places, ranks or labels."""
REMADE: ContextVar[Iterator[list[Tensor]] | None] = ContextVar("REMADE", default=None)
"""Those of calls that are made again."""


@contextmanager
def keeping() -> Iterator[list[list[Tensor]]]:
    """What calls within it choose, call by call."""
    kept: list[list[Tensor]] = []
    token = KEPT.set(kept)
    try:
        yield kept
    finally:
        KEPT.reset(token)


@contextmanager
def remaking(kept: Sequence[list[Tensor]]) -> Iterator[None]:
    """Calls within it choose what was kept: keys and queries that are recomputed are rounded otherwise, and
    what is nearly a tie must not change."""
    token = REMADE.set(iter(kept))
    try:
        yield
    finally:
        REMADE.reset(token)


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
    sizes, tables = found.sizes(q, k, places), found.named(tensors)
    given = {table.name: tables[table.name] for table in found.attention.inputs}
    found.checked(q, given, sizes)
    return [*choices(found.attention, q, k, tables, sizes).values()]


@choose.register_fake
def _(q: Tensor, k: Tensor, tensors: list[Tensor], *places: Any) -> list[Tensor]:
    found = lowered.find(places[-1], tensors)
    return [q.new_empty(shape(table, q, k), dtype=torch.int64) for table in found.selected]


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
    if torch.compiler.is_compiling():  # where nothing is remade
        return _made(found, q, k, tensors, places, watched)
    if (remade := REMADE.get()) is not None:
        return [choice.long() for choice in next(remade)]
    made = _made(found, q, k, tensors, places, watched)
    if (kept := KEPT.get()) is not None:
        kept.append([choice.int() for choice in made])
    return made


def _made(
    found: Lowered, q: Tensor, k: Tensor, tensors: Sequence[Tensor], places: Places, watched: bool
) -> list[Tensor]:
    if watched or torch._C._are_functorch_transforms_active():
        made: list[Tensor] = choose(
            q.detach(), k.detach(), [x.detach() for x in tensors] or [q.new_empty(0)], *places, found.identity
        )
        return made
    return _chosen(found, q, k, tensors, places)
