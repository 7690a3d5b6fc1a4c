"""Fewer cases of one law, where there are many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def thin(cases: Iterable[Any], step: int) -> list[Any]:
    """All cases; but for every step-th, they are slow: `make test` tries some, `make slow` the others."""
    return [pytest.param(case, marks=pytest.mark.slow) if i % step else case for i, case in enumerate(cases)]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Some of the product of axes that know nothing of each other: each value meets each of another axis."""
    meetings = {
        row: {*combinations(enumerate(row), 2)} for row in product(*(range(len(axis)) for axis in axes))
    }
    left, kept = set().union(*meetings.values()), []
    while left:
        row = max(meetings, key=lambda row: len(meetings[row] & left))
        left -= meetings[row]
        kept.append(tuple(axis[i] for axis, i in zip(axes, row, strict=True)))
    return kept
