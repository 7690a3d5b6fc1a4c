"""Distributions of another party, built and installed: a backend, held to the conformance suite by its name,
an analysis, and a library of patterns."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SOURCES = [path.parent for path in sorted((ROOT / "examples").glob("*/pyproject.toml"))]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which their wheels are installed, in a folder of its own."""
    home = tmp_path_factory.mktemp("third_party")
    copies = [home / "source" / source.name for source in SOURCES]
    for source, copy in zip(SOURCES, copies, strict=True):
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", home, *copies]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", home / "installed"]
    subprocess.run([*pip, *install, *home.glob("*.whl")], check=True, capture_output=True)
    return environment_with(home / "installed")


def environment_with(folder):
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


THIRD = """
def pytest_collection_modifyitems(items):
    if len(items) > 100:
        items[:] = items[::3]
"""
"""Of many cases each mechanism is still met."""


def suite_of(name, text, folder, environment):
    """How many cases pass of the suite that a README shows for a backend or a selection: of a long one, of
    every third case."""
    (folder / "conftest.py").write_text(THIRD)
    (suite,) = (block for block in python_of(text) if re.search(rf"check\(.*\b{name}\b", block))
    file = folder / f"test_{name}.py"
    file.write_text(suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def python_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def attn(environment, *arguments):
    command = [sys.executable, "-m", "attndsl", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_are_listed_with_their_owners(environment):
    rows = json.loads(attn(environment, "plugins", "--json"))["plugins"]
    theirs = {
        (row["group"], row["name"], row["owner"], row["error"]) for row in rows if row["owner"] != "attndsl"
    }
    assert theirs == {
        ("backends", "numpy", "attndsl-numpy", ""),
        ("analyses", "spread", "attndsl-spread", ""),
        ("libraries", "dilated", "attndsl-dilated", ""),
        ("selections", "heavy", "attndsl-double-sparsity", ""),
    }


def test_the_backend_conforms(environment, tmp_path):
    text = (ROOT / "examples" / "numpy-backend" / "README.md").read_text()
    assert suite_of("numpy", text, tmp_path, environment) > 116


def test_the_selection_conforms(environment, tmp_path):
    text = (ROOT / "examples" / "double-sparsity" / "README.md").read_text()
    assert suite_of("heavy", text, tmp_path, environment) == 8


def test_the_analysis_is_in_the_report_its_help_and_the_page(environment, tmp_path):
    file, page = ROOT / "examples" / "mistral.attn", tmp_path / "page.html"
    sizes = ("--length", 100, "--set", "w=8")
    found = json.loads(attn(environment, "analyze", file, *sizes, "--json"))
    assert found["spread"] == {"fewest": 1, "median": 8.0, "most": 8}
    assert (found["nnz"]["value"], found["reasons"]) == (8 * 100 - 28, {})
    said = "  spread        a query sees 1 to 8 keys, 8 in the middle"
    assert attn(environment, "analyze", file, *sizes, "--only", "spread").splitlines()[1:] == [said]
    assert "shards, spread" in " ".join(attn(environment, "analyze", "--help").split())
    attn(environment, "report", file, *sizes, "-o", page)
    assert '<h2 id="spread">Keys of a query</h2>' in page.read_text()
    assert '<data value="8.0" data-field="/spread/median">8</data>' in page.read_text()


def test_the_library_is_read_where_it_is_used(environment, tmp_path):
    file = tmp_path / "lm.attn"
    text = (ROOT / "examples" / "dilated-library" / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```attn\n(.*?)```", text, re.DOTALL)
    file.write_text(program + "assert lm == causal & (block(64) | dilated(256, 2) | dilated(1024, 4))\n")
    *theirs, mine = attn(environment, "check", file).splitlines()
    assert [line.partition(": ")[0] for line in theirs] == ["dilated:dilated.attn:4"]
    assert ": proved: " in mine


@pytest.mark.parametrize(
    ("file", "name", "shown", "passing"),
    [
        ("docs/plugins.md", "tiny", "backend = Tiny", 40),
        ("docs/plugins.md", "tiny", "backend = Scored", 66),
        ("docs/selections.md", "longest", "longest, alike = Longest(), Alike", 15),
    ],
)
def test_a_plugin_that_is_shown_conforms(file, name, shown, passing, tmp_path):
    text = (ROOT / file).read_text(encoding="utf-8")
    (source,) = (block for block in python_of(text) if block.endswith(f"{shown}()\n"))
    (points,) = (block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if name in block)
    (tmp_path / "my_package.py").write_text(source)
    info = tmp_path / "tiny-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 0.1\n")
    ((group, rows),) = tomllib.loads(points)["project"]["entry-points"].items()
    lines = [f"{name} = {target}" for name, target in rows.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    assert suite_of(name, text, tmp_path, environment_with(tmp_path)) > passing


WORD = """
import torch, attndsl
from attndsl.stacks.reference import reference
text = "attention a { mask causal } stack kept { memory(sinks(4)) { layers(2) { a  ffn(1) } } }"
program = attndsl.parse(text)
module = attndsl.build(program["kept"], width=8, heads=2, length=6, dtype="float64")
x, state, found = torch.randn(1, 20, 8, dtype=torch.float64), None, []
for segment in x.split(6, 1):
    meant = reference(module, segment, state)
    y, record = module(segment, state=state)
    torch.testing.assert_close(y, meant)
    found.append(y)
    state = record.state
assert [held.many for kept in state.held.values() for held in kept] == [4, 4]
session = module.session(1, 20)
steps = torch.cat([session.step(piece) for piece in x.split([3, 1, 9, 7], 1)], 1)
torch.testing.assert_close(steps, torch.cat(found, 1))
assert attndsl.depth(program["kept"], length=6, width=8, heads=2).memory == 4
"""


def test_a_word_of_stacks_that_is_shown_is_one_like_ours(tmp_path):
    text = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    (source,) = (block for block in python_of(text) if "class Sinks" in block)
    (tmp_path / "my_package.py").write_text(source)
    info = tmp_path / "sinks-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sinks\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[attndsl.stages]\nsinks = my_package:stage\n")
    done = subprocess.run(
        [sys.executable, "-c", WORD],
        env=environment_with(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
