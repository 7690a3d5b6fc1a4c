"""Axis: where the queries or the keys of a call stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from attndsl.expr import Expr, Table, add, const, lookup, lt, var, where

PIECES = 16
"""Stretches of adjacent positions up to which a position is written out as a case for each."""


@dataclass(frozen=True)
class Axis:
    """The position of each entry, one row for all batch rows or one each.

    A row lists the stretches of adjacent positions, the first entry of each and its position: 5, 6, 7, 20, 21
    are ((0, 5), (3, 20)). There is one at least, also without entries.
    """

    length: int
    rows: tuple[tuple[tuple[int, int], ...], ...]

    @staticmethod
    def starting(length: int, starts: Iterable[int]) -> Axis:
        """Adjacent positions, from one start for all batch rows or one each."""
        return Axis(length, tuple(((0, start),) for start in starts))

    @staticmethod
    def of(positions: NDArray[np.int64]) -> Axis:
        """positions [rows, length]"""
        if not positions.shape[1]:
            return Axis.starting(0, (0,) * len(positions))
        rows = []
        for row in positions:
            firsts = np.flatnonzero(np.diff(row, prepend=row[:1] - 2) != 1)
            rows.append(tuple(zip(firsts.tolist(), row[firsts].tolist(), strict=True)))
        return Axis(positions.shape[1], tuple(rows))

    def row(self, batch: int) -> tuple[tuple[int, int], ...]:
        return self.rows[batch % len(self.rows)]

    @cached_property
    def starts(self) -> tuple[int, ...] | None:
        """The position of entry 0 in each row, where all positions are adjacent; else None."""
        if any(len(row) != 1 for row in self.rows):
            return None
        return tuple(row[0][1] for row in self.rows)

    def positions(self, batch: int) -> NDArray[np.int64]:
        """int64 [length]"""
        if len(self.row(batch)) == 1:
            start = self.row(batch)[0][1]
            return np.arange(start, start + self.length)
        firsts, values = np.array(self.row(batch), np.int64).reshape(-1, 2).T
        lengths = np.diff(firsts, append=self.length)
        return np.arange(self.length) + np.repeat(values - firsts, lengths)

    def span(self, batch: int) -> tuple[int, int]:
        """The least and the greatest position; the greatest below the least where there is none."""
        row = self.row(batch)
        if len(row) == 1:
            return row[0][1], row[0][1] + self.length - 1
        ends = (*(first for first, _ in row[1:]), self.length)
        last = (value + end - first - 1 for (first, value), end in zip(row, ends, strict=True))
        return min(value for _, value in row), max(last)

    def expression(self, name: str, batch: int) -> tuple[Expr, dict[str, NDArray[np.int64]]]:
        """The position as an expression of the entry, which is `var(name)`, and the table that it reads."""
        entry, row = var(name), self.row(batch)
        if len(row) > PIECES:
            table = Table(f"positions of {name}", "int", (self.length,))
            return lookup(table, entry), {table.name: self.positions(batch)}
        pieces = [add(entry, const(value - first)) for first, value in row]
        found = pieces[-1]
        for piece, (first, _) in zip(pieces[-2::-1], row[:0:-1], strict=True):
            found = where(lt(entry, const(first)), piece, found)
        return found, {}


def joined(pieces: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """A row of these stretches, of which one that goes on from the one before is no other."""
    apart = [pieces[0]]
    for first, value in pieces[1:]:
        if value - first != apart[-1][1] - apart[-1][0]:
            apart.append((first, value))
    return tuple(apart)
