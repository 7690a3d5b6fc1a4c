"""benchmarks/gpu.py: what it asks, that it goes on where it stopped, and that it runs to its end."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import attndsl

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.gpu")


def test_its_parts_have_all_that_is_asked_and_little_time(gpu: Any) -> None:
    asked = {x for part in gpu.PARTS for x in gpu.cells(part, gpu.GPU)}
    plain = itertools.product(gpu.MASKS, (4096, 32_768, 131_072), (64, 128), (16, 4))
    tuned = {gpu.Cell(mask, 32_768, 128, 16, True) for mask in ("window 1024", "documents 2048")}
    assert asked == {gpu.Cell(*x) for x in plain} | tuned
    assert len(gpu.MASKS) == 6
    assert all(part.seconds <= 9 * 60 for part in gpu.PARTS.values())
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 20 * 60


def test_its_masks_are_those_that_the_other_side_gets(gpu: Any) -> None:
    n = 1536
    q, k = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    tokens = torch.arange(n) // 200
    for name, text in gpu.MASKS.items():
        attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
        given = {"doc": tokens.numpy()} if "doc" in text else {}
        mine = attention.block_mask(n, **given)
        theirs = gpu.mod(name, tokens, gpu.linked(mine))(0, 0, q, k)
        assert np.array_equal(mine.to_dense()[0, 0], theirs.numpy()), name


@pytest.fixture
def part(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes `short` have these cells: names, seconds to reserve and what they find; gives what was done."""

    def install(*cells: tuple[str, float, Callable[[], dict[str, Any]]]) -> list[str]:
        done: list[str] = []

        def todo(part: str, sizes: Any) -> Iterator[tuple[str, float, Callable[[], dict[str, Any]]]]:
            for name, reserve, figures in cells:
                yield name, reserve, lambda name=name, figures=figures: done.append(name) or figures()

        monkeypatch.setattr(gpu, "todo", todo)
        monkeypatch.setattr(gpu, "conforms", lambda part, sizes: done.append("conforms") or True)
        monkeypatch.setattr(gpu, "control", lambda sizes: done.append("control") or {})
        return done

    return install


def test_a_part_goes_on_where_it_stopped(
    gpu: Any, part: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def red() -> dict[str, Any]:
        raise AssertionError("far off")

    results = tmp_path / "gpu.jsonl"
    times = {"triton": 2.0, "flex": 3.0, "dense": 8.0}
    cells = [("a", 1.0, lambda: {"forward": times}), ("b", 1e9, dict), ("c", 1.0, red)]
    done = part(*cells)
    assert not gpu.run("short", gpu.DRY, results)
    assert done == ["conforms", "control", "a", "c", "control"]
    assert "1 cells of short are left" in capsys.readouterr().out
    done = part(*((name, 1.0, figures) for name, _, figures in cells))
    assert gpu.run("short", gpu.DRY, results)
    assert done == ["conforms", "control", "b", "control"]
    done = part(*cells)
    assert gpu.run("short", gpu.DRY, results)
    assert done == []
    rows = list(gpu.table(gpu.read(results)))
    assert "| cpu | a | forward | 2 | 3 | 8 | 1.50 | 4.00 |  |" in rows
    assert "| cpu | c | red | | | | | | far off |" in rows


def test_nothing_is_timed_where_a_case_is_red(
    gpu: Any, part: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = part(("a", 1.0, dict))
    monkeypatch.setattr(gpu, "conforms", lambda part, sizes: False)
    with pytest.raises(SystemExit, match="nothing is timed"):
        gpu.run("short", gpu.DRY, tmp_path / "gpu.jsonl")
    assert done == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_it_runs_to_its_end_in_numpy(gpu: Any, tmp_path: Path) -> None:
    results = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "short", "--dry", "--results", str(results)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    rows = gpu.read(results)
    names = {name for name, _, _ in gpu.todo("short", gpu.DRY)} | {"control of short"}
    assert {row["cell"] for row in rows} == names
    assert len(rows) == len(names) + 1
    assert [row for row in rows if "red" in row] == []
    sides = [row["forward"].keys() for row in rows if "both" in row]
    assert sides == [{"triton", "flex", "dense"}] * len(list(gpu.cells("short", gpu.DRY)))
