"""Many cases of one law: `make test` tries some of them, `make slow` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thin(cases: Iterable[Any], step: int) -> list[Any]:
    """All cases; but for every step-th, they are slow."""
    return [pytest.param(case, marks=pytest.mark.slow) if i % step else case for i, case in enumerate(cases)]
