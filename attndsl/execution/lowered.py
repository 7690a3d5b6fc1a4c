"""Lowered: an attention with the kernel that one backend made of it, found again by its content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl import portable
from attndsl.attention import Attention
from attndsl.backend import Backend, Call, Differentiable, Kernel, Problem
from attndsl.errors import fail
from attndsl.execution import choice, registry
from attndsl.expr import Table
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

MASKS_KEPT = 8

Places = tuple[Sequence[int] | None, Tensor | None, Sequence[int] | None, Tensor | None, int | None]
"""Where queries and keys stand, as the operator takes it: offsets of queries, as numbers or as a tensor [1 or
B], which may be positions [1 or B, nq] instead; the same of keys; n. None where nothing is said."""


class Recent:
    """The tiles of the last few calls, by what they were made of."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.masks: dict[tuple[object, ...], BlockMask] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], BlockMask]) -> BlockMask:
        if key not in self.masks:
            made = make()
            while len(self.masks) >= self.size:
                self.masks.pop(next(iter(self.masks)))
            self.masks[key] = made
        return self.masks[key]


@dataclass(frozen=True, eq=False)
class Lowered:
    """What the operator runs.

    identity   the attention, the problem and the backend as text: all that another process needs beside
    constants  the long sets and lists of the attention, as `portable` gives them
    """

    attention: Attention
    problem: Problem
    backend: str
    kernel: Kernel | Differentiable
    identity: str
    constants: tuple[Tensor, ...]
    recent: Recent = field(default_factory=lambda: Recent(MASKS_KEPT))

    @property
    def tables(self) -> dict[str, Table]:
        """Inputs, then what is learned, by name."""
        return {table.name: table for table in (*self.attention.inputs, *self.attention.learned)}

    def tensors(self, q: Tensor, tables: Mapping[str, Tensor]) -> list[Tensor]:
        """What the operator takes beside q, k and v: constants, then inputs, then what is learned."""
        # AOTInductor passes no empty list on
        return [*self.constants, *(tables[name] for name in self.tables)] or [q.new_empty(0)]

    def named(self, tensors: Sequence[Any]) -> dict[str, Any]:
        """Of `tensors`, or of something for each of them, what belongs to tables, by name."""
        start = len(self.constants)
        return dict(zip(self.tables, tensors[start : start + len(self.tables)], strict=True))

    @cached_property
    def ranged(self) -> bool:
        """Whether scores compute with given integers, whose range is looked at in every call."""
        parts = (e for g in self.attention.groups for e in (g.score, g.decay, g.norm.sink) if e is not None)
        return any(table.dtype == "int" for e in parts for table in e.tables)

    def untrainable(self) -> str | None:
        """Why the backend has no gradients, or None."""
        backend: Backend = registry.plugin("backends", self.backend)
        return choice.declined(backend, self.attention, replace(self.problem, training=True))

    def call_of(self, q: Tensor, k: Tensor, v: Tensor, tables: Mapping[str, Tensor], places: Places) -> Call:
        """The checked call with its tiles."""
        found, n = [], places[-1]
        for side, x, offset, at in (("q", q, *places[:2]), ("k", k, *places[2:4])):
            # the one place where what a tensor holds is read: a device waits for it
            listed = offset if at is None else at.tolist()
            if at is None or at.dim() == 1:
                found.append(lowering.axis(side, x.shape[2], listed, None))
            else:
                positions = np.array(listed, np.int64).reshape(at.shape)
                found.append(lowering.axis(side, x.shape[2], None, positions))
        inside = places[1] is not None and places[1].dim() == 2
        heads, (at_q, at_k) = self.problem.heads, found
        sizes = lowering.sizes(self.attention, k.shape[2], q.shape[2], heads, at_q, at_k, n, inside)
        for side, axis in (("q", sizes.q), ("k", sizes.k)):
            if len(axis.rows) not in (1, len(q)):
                raise fail(f"`{side}_offset` has {len(axis.rows)} entries for {len(q)} batch rows")
        blocks = self.tiles(sizes, {t.name: tables[t.name] for t in self.attention.inputs}, len(q))
        return Call(q, k, v, blocks, tables, sizes.q, sizes.k, sizes.n)

    def tiles(self, sizes: lowering.Sizes, given: Mapping[str, Tensor], batch: int) -> BlockMask:
        """The tiles of one call, kept for the last few."""
        tables = lowering.checked_tables(self.attention, given, sizes, batch, self.problem.head_dim)
        used = (tables[table.name] for table in lowering.mask_tables(self.attention))
        key = (sizes, *((array.shape, array.tobytes()) for array in used))
        if self.ranged:
            lowering.check_scores(self.attention, sizes, tables)
        block_size = self.problem.block_size
        return self.recent.get(key, lambda: lowering.block_mask(self.attention, sizes, tables, block_size))


_alive: WeakValueDictionary[str, Lowered] = WeakValueDictionary()
_loaded: dict[str, Lowered] = {}
"""Those of programs that came without a plan: nothing else holds them."""


def lower(attention: Attention, problem: Problem, backend: str) -> Lowered:
    """By this backend, which must not decline; equal ones are one as long as somebody holds it."""
    written = portable.write(attention, problem=vars(problem), backend=backend)
    found = _alive.get(written.text)
    if found is not None:
        return found
    kernel = registry.plugin("backends", backend).lower(attention, problem)
    if not callable(kernel):
        raise fail(f"the backend `{backend}` returned no kernel: its `lower` gave {type(kernel).__name__}")
    constants = tuple(map(torch.from_numpy, written.constants))
    return _alive.setdefault(
        written.text, Lowered(attention, problem, backend, kernel, written.text, constants)
    )


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
