"""Parts as the kernel runs them: some problems at a time, on views or gathers of the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl.tiles.blockmask import TileGrid
from attndsl.tiles.shadows import live_distances

from .parts import Gathered, Part, Strided, take_apart

TRANSIENT, FORMED = 2**22, 3 * 2**18
"""Numbers that one step may copy, and weights that it may form: the latter pay off while in cache."""
Q_MAX, K_MAX = 256, 1024
"""Queries and keys of one problem where the weights are formed."""


def windows(x: Tensor, start: int, step: int, length: int, count: int) -> Tensor:
    """[X, n, ...] -> [X, count, length, ...]: the c-th window starts at start + c * step. A view."""
    x = x[:, start:]
    strides = (x.stride(0), step * x.stride(1), *x.stride()[1:])
    return x.as_strided((x.shape[0], count, length, *x.shape[2:]), strides)


@dataclass(frozen=True, eq=False)
class Views:
    """Some problems of a Strided part; mask [1, q_len, k_len]; `fresh`: no earlier chunk has these rows."""

    part: Strided
    first: int
    count: int
    mask: Tensor | None
    fresh: bool

    @property
    def q_len(self) -> int:
        return self.part.q_len

    @property
    def k_len(self) -> int:
        return self.part.k_len

    @property
    def run(self) -> int:
        """Keys that stand side by side: what depends on the distance alone is equal along their diagonals."""
        return self.part.k_len

    def query_tokens(self, device: torch.device) -> Tensor:
        return _tokens(self.part.q0, self.part.q_step, self.part.q_len, self.first, self.count, device)

    def key_tokens(self, device: torch.device) -> Tensor:
        return _tokens(self.part.k0, self.part.k_step, self.part.k_len, self.first, self.count, device)

    def queries(self, x: Tensor) -> Tensor:
        p = self.part
        return windows(x, p.q0 + self.first * p.q_step, p.q_step, p.q_len, self.count)

    def keys(self, x: Tensor) -> Tensor:
        p = self.part
        return windows(x, p.k0 + self.first * p.k_step, p.k_step, p.k_len, self.count)

    def put_queries(self, x: Tensor, value: Tensor) -> None:
        self.queries(x).copy_(value)

    def blend_queries(self, x: Tensor, value: Tensor, share: Tensor) -> None:
        """x + share * (value - x)"""
        self.queries(x).lerp_(value, share)

    def add_queries(self, x: Tensor, value: Tensor) -> None:
        self.queries(x).add_(value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """The windows are the same or do not overlap."""
        p, start = self.part, self.part.k0 + self.first * self.part.k_step
        if self.count == 1 or p.k_step == 0:
            x[:, start : start + p.k_len] += value[:, 0] if self.count == 1 else value.sum(1)
        else:
            self.keys(x).add_(value)


@dataclass(frozen=True, eq=False)
class Gathers:
    """Some problems of a Gathered part: tokens [C, q_len] of the queries, [C, k_len] of the keys, `run` side
    by side; mask [C, q_len, k_len]. All keys of a single problem may stand side by side, from `first` on."""

    rows: Tensor
    cols: Tensor
    run: int
    mask: Tensor | None
    fresh: bool
    first: int | None = None

    @property
    def count(self) -> int:
        # of a tensor `len` takes twenty times as long
        return self.rows.shape[0]

    @property
    def q_len(self) -> int:
        return self.rows.shape[1]

    @property
    def k_len(self) -> int:
        return self.cols.shape[1]

    def query_tokens(self, device: torch.device) -> Tensor:
        return self.rows

    def key_tokens(self, device: torch.device) -> Tensor:
        return self.cols

    def queries(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.rows.flatten()).view(x.shape[0], *self.rows.shape, *x.shape[2:])

    def keys(self, x: Tensor) -> Tensor:
        if self.first is not None:
            return x[:, None, self.first : self.first + self.k_len]
        return x.index_select(1, self.cols.flatten()).view(x.shape[0], *self.cols.shape, *x.shape[2:])

    def put_queries(self, x: Tensor, value: Tensor) -> None:
        x.index_copy_(1, self.rows.flatten(), value.flatten(1, 2).to(x.dtype))

    def blend_queries(self, x: Tensor, value: Tensor, share: Tensor) -> None:
        self.put_queries(x, torch.lerp(self.queries(x), value.to(x.dtype), share))

    def add_queries(self, x: Tensor, value: Tensor) -> None:
        self.put_queries(x, self.queries(x) + value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        if self.first is not None:
            x[:, self.first : self.first + self.k_len] += value[:, 0]
            return
        x.index_add_(1, self.cols.flatten(), value.flatten(1, 2).to(x.dtype))


Chunk = Views | Gathers
Addend = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Diagonals:
    """Key minus query, in tokens, from `first` on: whether some pair is live there [L]."""

    first: int
    live: Tensor

    @staticmethod
    def of(grid: TileGrid, device: torch.device) -> Diagonals:
        found = live_distances(grid)[::-1]
        live = np.flatnonzero(found)
        first, last = (int(live[0]), int(live[-1])) if len(live) else (0, -1)
        kept = torch.from_numpy(found[first : last + 1].copy()).to(device)
        return Diagonals(first + 1 - grid.nq, kept)

    def places(self, chunk: Chunk) -> Tensor:
        """Where in `live` the `diagonals` of a chunk stand; somewhere if no pair is live."""
        return (diagonals(chunk, self.live.device) - self.first).clamp(0, len(self.live) - 1)


def diagonals(chunk: Chunk, device: torch.device) -> Tensor:
    """Key minus query on the diagonals of each run, from the last query and the first key on: [C, T,
    q_len + run - 1]."""
    starts = chunk.key_tokens(device)[:, :: chunk.run] - chunk.query_tokens(device)[:, :1]
    return starts[..., None] + torch.arange(1 - chunk.q_len, chunk.run, device=device)


def by_run(x: Tensor, run: int) -> Tensor:
    """[.., q_len, T * run] -> [.., T, q_len, run]"""
    return x.view(*x.shape[:-1], x.shape[-1] // run, run).transpose(-3, -2)


@dataclass(frozen=True, eq=False)
class Schedule:
    """In the order in which they run, each with what to add to its logits where that is the same in every
    call and small; the rows of no fresh chunk, which start as empty; what `by_distance` is asked for."""

    chunks: list[tuple[Chunk, Addend | None]]
    empty: Tensor
    diagonals: Diagonals | None


Kept = WeakKeyDictionary[TileGrid, dict[tuple[object, ...], Schedule]]


def _tokens(start: int, step: int, length: int, first: int, count: int, device: torch.device) -> Tensor:
    c = torch.arange(first, first + count, device=device)
    return start + c[:, None] * step + torch.arange(length, device=device)


@dataclass(frozen=True)
class Cut:
    """How a grid is cut into chunks: rows of one problem in a band; whether weights are formed; whether keys
    have gradients; numbers copied per token; numbers formed per pair, such as weights or a bias; whether the
    bias depends on the distance alone."""

    unit: int
    formed: bool
    gradient: bool
    per_token: int
    per_pair: int
    by_distance: bool

    def problems(self, part: Part) -> int:
        """How many at a time."""
        if isinstance(part, Strided):
            k_len, copied = part.k_len, max(part.q_len, part.k_len if self.gradient else 1)
        else:
            k_len = part.cols.shape[1] * part.block
            copied = part.q_len + k_len
        size = TRANSIENT // (self.per_token * copied)
        if self.per_pair and not (self.by_distance and not self.formed and equidistant(part)):
            size = min(size, FORMED // (part.q_len * k_len * self.per_pair))
        return max(1, size)

    def parts(self, grid: TileGrid) -> list[Part]:
        """In the order in which they run: those of one distance, which share a bias, in turn."""
        parts = list(take_apart(grid, self.unit))
        if self.per_pair:
            keys = K_MAX if self.formed else max(K_MAX, TRANSIENT // (Q_MAX * self.per_pair))
            most = 0 if self.formed else TRANSIENT // self.per_pair
            parts = [piece for part in parts for piece in _bound(part, keys, most)]
        if self.gradient:
            parts = [piece for part in parts for piece in _disjoint(part)]
        return sorted(parts, key=self._turn)

    def _turn(self, part: Part) -> tuple[int, int]:
        if not isinstance(part, Strided):
            return 1, 0
        return -part.count * part.q_len, part.k0 - part.q0 if self.by_distance else 0


def equidistant(part: Part) -> bool:
    """Whether key minus query is the same in each of its problems."""
    return isinstance(part, Strided) and part.q_step == part.k_step


def chunks_of(grid: TileGrid, cut: Cut, device: torch.device) -> tuple[list[Chunk], Tensor]:
    """What to run for this mask, in this order, and the rows of no fresh chunk."""
    touched, started = torch.zeros((2, grid.nq), dtype=torch.bool)
    chunks: list[Chunk] = []
    masks: dict[int, Tensor] = {}
    for part in cut.parts(grid):
        if isinstance(part, Strided):
            rows = _tokens(part.q0, part.q_step, part.q_len, 0, part.count, touched.device).flatten()
        else:
            rows = (torch.from_numpy(part.rows)[:, None] + torch.arange(part.q_len)).flatten()
        fresh = not bool(touched[rows].any())
        touched[rows] = True
        started[rows] |= fresh
        if isinstance(part, Strided):
            mask = part.mask
            if mask is not None and id(mask) not in masks:
                masks[id(mask)] = torch.from_numpy(mask).to(device)[None]
            chunks.extend(_views(part, None if mask is None else masks[id(mask)], fresh, cut))
        else:
            chunks.extend(_gathers(part, fresh, grid.n, cut, device))
    return chunks, torch.nonzero(~started).squeeze(1).to(device)


def _views(part: Strided, mask: Tensor | None, fresh: bool, cut: Cut) -> Iterator[Views]:
    size = cut.problems(part)
    for first in range(0, part.count, size):
        yield Views(part, first, min(size, part.count - first), mask, fresh)


def _gathers(part: Gathered, fresh: bool, n: int, cut: Cut, device: torch.device) -> Iterator[Gathers]:
    size = cut.problems(part)
    inside = torch.arange(part.block, device=device)
    masks = torch.from_numpy(part.masks).to(device)
    for first in range(0, len(part.rows), size):
        some = slice(first, first + size)
        rows = torch.from_numpy(part.rows[some]).to(device)
        cols = torch.from_numpy(part.cols[some]).to(device)
        mask = None
        if part.contents is not None:
            mask = masks[torch.from_numpy(part.contents[some]).to(device)]
            mask = mask[:, :, : part.q_len].transpose(1, 2).flatten(2)
        tokens = (cols[:, :, None] * part.block + inside).flatten(1).clamp_max(n - 1)
        yield Gathers(rows[:, None] + inside[: part.q_len], tokens, part.block, mask, fresh)


def _disjoint(part: Part) -> Iterator[Part]:
    """Every m-th problem together, so that their keys, to which gradients are added, do not overlap."""
    if not isinstance(part, Strided) or part.k_step == 0:
        yield part
        return
    turns = min(part.count, -(-part.k_len // part.k_step))
    for turn in range(turns):
        yield replace(
            part,
            q0=part.q0 + turn * part.q_step,
            q_step=part.q_step * turns,
            k0=part.k0 + turn * part.k_step,
            k_step=part.k_step * turns,
            count=len(range(turn, part.count, turns)),
        )


def _bound(part: Part, keys: int, most: int) -> Iterator[Part]:
    """In pieces of Q_MAX queries and so many keys, if a problem has more than `most` pairs."""
    if not isinstance(part, Strided) or part.q_len * part.k_len <= most:
        yield part
        return
    for q in range(0, part.q_len, Q_MAX):
        for k in range(0, part.k_len, keys):
            mask = None if part.mask is None else part.mask[q : q + Q_MAX, k : k + keys]
            if mask is not None and not mask.any():
                continue
            yield replace(
                part,
                q0=part.q0 + q,
                q_len=min(Q_MAX, part.q_len - q),
                k0=part.k0 + k,
                k_len=min(keys, part.k_len - k),
                mask=None if mask is None or mask.all() else mask,
            )
