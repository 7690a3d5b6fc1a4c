"""Every registered backend of ours through the conformance suite, and what it relies on."""

from __future__ import annotations

import pytest

from attndsl.conformance import CASES, Case, check

BACKENDS = ("sdpa", "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(backend: str, case: Case) -> None:
    reason = check(backend, case)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_the_reference_agrees_with_itself_in_other_dtypes(case: Case) -> None:
    assert check("reference", case) is None
