"""Puts kernels of common scores, for machines without a compiler, into wheels built where there is one."""

from __future__ import annotations

import os
import platform
import re
import runpy
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import cache_from_source
from itertools import product
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# hatchling imports this file, and Python keeps what it compiled: a clone is left as it was
KEPT = Path(cache_from_source(__file__))
KEPT.unlink(missing_ok=True)
if KEPT.parent.exists() and not any(KEPT.parent.iterdir()):
    KEPT.parent.rmdir()


class Kernels(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self.folder = tempfile.TemporaryDirectory()
        made = libraries(Path(self.root), Path(self.folder.name))
        if isinstance(made, str):
            self.app.display_warning(f"without packaged kernels: {made}")
            return
        build_data["force_include"].update(made)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{re.sub('[-.]', '_', sysconfig.get_platform())}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if version != "editable":
            self.folder.cleanup()


def libraries(root: Path, folder: Path) -> dict[str, str] | str:
    """Made in a folder, and where each belongs; or why there are none."""
    cpu = runpy.run_path(str(root / "plugins" / "cpu" / "compiling.py"))
    levels = cpu["LEVELS"].get(platform.machine()) if sys.platform == "linux" else None
    if levels is None:
        return f"there are none for {platform.machine()} with {sys.platform}"
    compiler = cpu["compiler"]()
    if compiler is None:
        return "there is no C++ compiler"

    def made(asked: tuple[tuple[str, str], str]) -> tuple[Path, str | None]:
        (name, score), level = asked
        place = folder / cpu["place"](name, score, level).name
        command = [compiler, *cpu["FLAGS"], f"-march={level}", "-fopenmp", "-s"]
        return place, cpu["compiled"](command, name, score, place)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(pool.map(made, product(cpu["packaged"](), levels)))
    reason = next(filter(None, found.values()), None)
    return reason or {str(place): f"attndsl/plugins/cpu/packaged/{place.name}" for place in found}
