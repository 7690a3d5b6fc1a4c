"""Every registered backend of ours through the conformance suite, and what it relies on."""

from __future__ import annotations

import pytest

from attndsl.conformance import CASES, Case, check

BACKENDS = ("reference", "sdpa", "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(backend: str, case: Case) -> None:
    reason = check(backend, case)
    if reason is not None:
        pytest.skip(reason)
