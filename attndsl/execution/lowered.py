"""Lowered: an attention with the kernel that one backend made of it, found again by its content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl import portable
from attndsl.attention import Attention
from attndsl.axis import Axis
from attndsl.backend import Backend, Call, Differentiable, Kernel, Problem, Spreading
from attndsl.errors import AttnError, asking, fail
from attndsl.execution import choice, registry
from attndsl.execution.torch_eval import at_hand
from attndsl.expr import Drawn, Table
from attndsl.meaning.draws import drawn
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

KEPT = 8
"""Calls of which sizes and tiles are kept."""

At = Tensor | Axis | None
Places = tuple[Sequence[int] | None, At, Sequence[int] | None, At, int | None]
"""Where queries and keys stand, as the operator takes it: offsets of queries, as numbers or as a tensor [1 or
B], which may be positions [1 or B, nq] instead; the same of keys; n. None where nothing is said. A caller of
ours may give positions as an Axis, which the operator does not take."""


T = TypeVar("T")


class Recent(Generic[T]):
    """What was made for the last few calls, by what it was made of."""

    def __init__(self) -> None:
        self.values: dict[tuple[object, ...], T] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        found = self.values.get(key)
        if found is None:
            found = self.values[key] = make()
            # another thread may drop the same
            for oldest in [*self.values][:-KEPT]:
                self.values.pop(oldest, None)
        return found


def once(make: Callable[[], T]) -> Callable[[], T]:
    """As functools.cache, which takes as long to set up as all else of a call."""
    made: list[T] = []

    def get() -> T:
        if not made:
            made.append(make())
        return made[0]

    return get


@dataclass(frozen=True, eq=False)
class Lowered:
    """What the operator runs.

    identity   the attention, the problem and the backend as text: all that another process needs beside
    constants  the long sets and lists of the attention, as `portable` gives them
    tables     inputs, then what is learned, then choices, by name
    selected   the choices
    drawn      constants, by name
    """

    attention: Attention
    problem: Problem
    backend: str
    kernel: Kernel | Differentiable
    identity: str
    constants: tuple[Tensor, ...]
    tables: Mapping[str, Table]
    selected: tuple[Table, ...]
    drawn: Mapping[str, Tensor]
    masks: Recent[BlockMask] = field(default_factory=Recent)
    known_sizes: Recent[lowering.Sizes] = field(default_factory=Recent)

    @cached_property
    def mask_tables(self) -> tuple[Table, ...]:
        return lowering.mask_tables(self.attention)

    def tensors(self, tables: Mapping[str, Tensor]) -> list[Tensor]:
        """What the operator takes beside q, k and v: constants, then inputs, then what is learned; choices
        come last."""
        return [*self.constants, *(tables[name] for name in self.tables if name in tables)]

    def named(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """Of `tensors`, or of something for each of them, what belongs to tables, by name."""
        start = len(self.constants)
        return dict(zip(self.tables, tensors[start:], strict=False))

    @cached_property
    def ranged(self) -> bool:
        """Whether scores compute with given integers, whose range is looked at in every call."""
        parts = (e for g in self.attention.groups for e in (g.score, g.decay, g.norm.sink) if e is not None)
        return any(table.dtype == "int" for e in parts for table in e.tables)

    def looks(self, call: Call) -> bool:
        """Whether results of the call are looked at for what is not finite."""
        if at_hand(call.q) or self.mask_tables:
            return True
        backend, rows = registry.plugin("backends", self.backend), call.block_mask.rows
        if not (isinstance(backend, Spreading) and backend.spreads):
            return True
        # of few queries it would take as long to clear the keys that none of them reads
        return rows is not None and not all(some.reads_all for some in rows)

    @cached_property
    def differentiable(self) -> bool:
        """Whether the kernel gives its own gradients."""
        return isinstance(self.kernel, Differentiable)

    @cached_property
    def untrainable(self) -> str | None:
        """Why the backend has no gradients, or None."""
        if self.problem.training:
            return None
        backend: Backend = registry.plugin("backends", self.backend)
        return choice.declined(backend, self.attention, replace(self.problem, training=True))

    def sizes(self, q: Tensor, k: Tensor, places: Places) -> lowering.Sizes:
        """Of a call, with what tensors of positions hold: read here alone, for a device waits for it."""
        q_offset, q_at, k_offset, k_at, n = places
        seen = _seen(q_offset, q_at), _seen(k_offset, k_at)
        key = (q.shape[0], q.shape[2], k.shape[2], *seen, n)
        return self.known_sizes.get(key, lambda: self._sizes(*key))

    def _sizes(
        self, batch: int, nq: int, keys: int, q_seen: Seen, k_seen: Seen, n: int | None
    ) -> lowering.Sizes:
        at_q, at_k = (
            places
            if isinstance(places, Axis)
            else lowering.axis(side, size, offset, None if places is None else np.array(places, np.int64))
            for side, size, (offset, places) in (("q", nq, q_seen), ("k", keys, k_seen))
        )
        inside = q_seen[1] is not None or n is not None
        sizes = lowering.sizes(self.attention, keys, nq, self.problem.heads, at_q, at_k, n, inside)
        for side, axis in (("q", sizes.q), ("k", sizes.k)):
            if len(axis.rows) not in (1, batch):
                raise fail(f"`{side}_offset` has {len(axis.rows)} entries for {batch} batch rows")
        return sizes

    def call_of(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Mapping[str, Tensor], sizes: lowering.Sizes
    ) -> Call:
        """The checked call. The tables of what chooses were checked before it chose."""
        given: Mapping[str, Any] = {t.name: tables[t.name] for t in self.attention.inputs}
        if given and not self.selected:
            given = self.checked(q, given, sizes)
        if self.ranged:
            lowering.check_scores(self.attention, sizes, given)

        def tiles() -> BlockMask:
            read = (t.name for t in self.mask_tables)
            arrays = {x: lowering.as_array(given[x] if x in given else tables[x]) for x in read}
            return self.tiles(sizes, {**given, **arrays})

        return Call(q, k, v, once(tiles), tables, sizes.q, sizes.k, sizes.n)

    def checked(self, q: Tensor, given: Mapping[str, Any], sizes: lowering.Sizes) -> dict[str, Any]:
        """The inputs of a call, as `lowering.checked_tables` gives them."""
        return lowering.checked_tables(self.attention, given, sizes, len(q), self.problem.head_dim, ())

    def tiles(self, sizes: lowering.Sizes, tables: Mapping[str, Any]) -> BlockMask:
        """The tiles of one call, kept for the last few."""
        used = (tables[table.name] for table in self.mask_tables)
        key = (sizes, *((array.shape, array.tobytes()) for array in used))
        block_size = self.problem.block_size
        return self.masks.get(key, lambda: lowering.block_mask(self.attention, sizes, tables, block_size))


Seen = tuple[Sequence[int] | None, Sequence[Sequence[int]] | Axis | None]
"""Offsets, or positions of each batch row or of all."""


def _seen(offset: Sequence[int] | None, at: At) -> Seen:
    if at is None or isinstance(at, Axis):
        return None if offset is None else tuple(offset), at
    listed = at.tolist()
    return (tuple(listed), None) if at.dim() == 1 else (None, tuple(map(tuple, listed)))


_alive: WeakValueDictionary[str, Lowered] = WeakValueDictionary()
_loaded: dict[str, Lowered] = {}
"""Those of programs that came without a plan: nothing else holds them."""


def taken(
    attention: Attention, problem: Problem, considered: Mapping[str, choice.Verdict], backend: str | None
) -> tuple[Lowered, Mapping[str, choice.Verdict]]:
    """What runs by `backend` or, where that is None, by the first that neither declines nor fails to make its
    kernel; and what was considered, with the reasons of those that failed."""
    name = choice.chosen(considered, backend)
    try:
        return lower(attention, problem, name), considered
    except AttnError as error:
        if backend is not None:
            raise
        failed = {**considered, name: error.diagnostics[0].message}
    return taken(attention, problem, failed, None)


def lower(attention: Attention, problem: Problem, backend: str) -> Lowered:
    """By this backend, which must not decline; equal ones are one as long as somebody holds it."""
    written = portable.write(attention, problem=vars(problem), backend=backend)
    found = _alive.get(written.text)
    if found is not None:
        return found
    with asking(f"the backend `{backend}`"):
        kernel = registry.plugin("backends", backend).lower(attention, problem)
    if not callable(kernel):
        raise fail(f"the backend `{backend}` returned no kernel: its `lower` gave {type(kernel).__name__}")
    constants = tuple(map(torch.from_numpy, written.constants))
    selected = attention.selected
    read = (*attention.inputs, *attention.learned, *selected)
    tables = {table.name: table for table in read}
    constant = {
        table.name: torch.tensor(
            drawn(table.origin, int(table.dims[0]), problem.head_dim), device=problem.device
        )
        for table in attention.learned
        if isinstance(table.origin, Drawn)
    }
    lowered = Lowered(
        attention, problem, backend, kernel, written.text, constants, tables, selected, constant
    )
    return _alive.setdefault(written.text, lowered)


def find(identity: str, tensors: Sequence[Tensor]) -> Lowered:
    """The one with this identity, lowered now if no plan of this process has it; see `Lowered.tensors`.

    Raises AttnError where its backend is not installed, declines, or the text has another format.
    """
    found = _alive.get(identity)
    if found is None:
        attention, beside = portable.read(identity, tensors)
        problem, backend = Problem(**beside["problem"]), beside["backend"]
        if backend not in registry.names("backends"):
            installed = ", ".join(registry.names("backends"))
            raise fail(
                f"this program needs the backend `{backend}`, which is not installed",
                help=f"install what provides it; there are {installed}",
            )
        reason = choice.declined(registry.plugin("backends", backend), attention, problem)
        if reason is not None:
            raise fail(f"this program needs the backend `{backend}`, which declines here: {reason}")
        found = _loaded[identity] = lower(attention, problem, backend)
    return found


def alive(identity: str) -> Lowered | None:
    """The one with this identity, if somebody holds it."""
    return _alive.get(identity)
