"""Fixtures that more than one file needs."""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# before torch starts: small tensors are slower on many threads, and much slower beside other work
os.environ.setdefault("OMP_NUM_THREADS", "1")

NUMBER = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--programs", type=int, default=36, help="random programs that the backend `cpu` runs")
    parser.addoption("--sanitized", type=int, default=23, help="one case in so many, under sanitizers")


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Installs a backend with this source, as pip would leave it, under a new name: for this process and
    those that it starts. Or an object of another group, or the module itself. `install.folder` holds it."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def install(source: str, group: str = "backends", target: str = ":backend", name: str = "") -> str:
        name = name or f"mine{next(NUMBER)}"
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[attndsl.{group}]\n{name} = {name}{target}\n")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    install.folder = tmp_path  # type: ignore[attr-defined]
    return install


@pytest.fixture(autouse=True, scope="session")
def _compiled_in_less_time() -> Iterator[None]:
    """Kernels of the backend `cpu`, which most plans take, with half of what the compiler takes for users."""
    from attndsl.plugins.cpu import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Kernels that are compiled in half of that again, for small sizes."""
    from cpu_builds import QUICK, built_with

    with built_with(*QUICK):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What `make test` may take is said in CONTRIBUTING.md."""
    terminalreporter.write_line(f"{sum(os.times()[:4]):.0f} seconds of a core, children included")
