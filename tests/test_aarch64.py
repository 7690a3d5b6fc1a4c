"""The kernels of the backend `cpu` for aarch64, run by an emulator, against those of this machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_cpu import FIRST

from attndsl.conformance.cases import attention_of
from attndsl.emit.score import Score, score_of
from attndsl.plugins.cpu import build, compiling
from attndsl.plugins.cpu.score import code

CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
missing = [tool for tool in (CROSS, EMULATOR) if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} cannot be found"),
    pytest.mark.skipif(build.compiler() is None, reason=build.MISSING),
]
SCORES = {
    case.mechanism.name: score
    for case in FIRST
    for group in attention_of(case.mechanism).attended.groups
    if isinstance(score := score_of(group, case.head_dim, True), Score)
}


def written(
    score: Score, name: str, compiler: list[str], runner: list[str], folder: Path
) -> dict[str, NDArray[np.float64]]:
    """What a pass writes on operands drawn by a rule."""
    folder.mkdir()
    gradients = frozenset(leaf for leaf, node in score.leaves.items() if node.type == "real")
    (folder / "score.h").write_text(code(score, gradients if name == "backward" else None))
    kinds = {
        "INTEGERS": [node.type != "real" for node in score.leaves.values()],
        "TRUTHS": [node.type == "bool" for node in score.leaves.values()],
        "NUMBERS": [leaf.kind == "number" for leaf in score.leaves],
        "TABLES": [leaf.kind == "table" for leaf in score.leaves],
    }
    defined = {name.upper(): 1} | {
        kind: sum(held << i for i, held in enumerate(bits)) for kind, bits in kinds.items()
    }
    flags = [flag for flag in build.FLAGS if flag not in ("-march=native", "-shared")]
    here = Path(__file__).with_name("kernel_driver.cpp")
    command = [*compiler, *flags, *(f"-D{macro}={value}" for macro, value in defined.items())]
    command += [f"-I{folder}", f"-I{compiling.SOURCES[-1].parent}", str(here), "-o", str(folder / "made")]
    subprocess.run(command, check=True)
    printed = subprocess.run(
        [*runner, str(folder / "made")], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, list[float]] = {}
    for line in printed.splitlines():
        what, number = line.split()
        found.setdefault(what, []).append(float(number))
    return {what: np.array(numbers) for what, numbers in found.items()}


@pytest.mark.parametrize("name", ["forward", "backward", "decode"])
@pytest.mark.parametrize("score", [*SCORES][::9])
def test_the_results_are_those_of_this_machine(score: str, name: str, tmp_path: Path) -> None:
    here = written(SCORES[score], name, [str(build.compiler()), "-march=native"], [], tmp_path / "here")
    there = written(SCORES[score], name, [CROSS, "-static"], [EMULATOR], tmp_path / "there")
    assert here.keys() == there.keys()
    for what, wanted in here.items():
        finite = np.abs(wanted[np.isfinite(wanted)])
        assert not np.isnan(wanted).any()
        assert finite.any() or what not in ("out", "gv")
        np.testing.assert_allclose(there[what], wanted, rtol=1e-4, atol=1e-5 * finite.max(), err_msg=what)
