"""Libraries of the backend `cpu` with other flags than the product's, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from attndsl.plugins.cpu import build, kernel

QUICK = ("-O0",)
"""What takes a third of the time to compile. The last of flags that exclude each other counts."""


@contextmanager
def built_with(*flags: str, compiler: str | None = None) -> Iterator[None]:
    known = (build.library, build._machine, kernel._function)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, *flags))
        if compiler is not None:
            patch.setattr(build, "compiler", lambda: compiler)
        for cached in known:
            cached.cache_clear()
        try:
            yield
        finally:
            for cached in known:
                cached.cache_clear()
