"""A backend of another party: built, installed, and held to the conformance suite by its name."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "numpy-backend"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment in which the wheel is installed, in a folder of its own."""
    home = tmp_path_factory.mktemp("third_party")
    shutil.copytree(SOURCE, home / "source", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", home, home / "source"]
    subprocess.run([*pip, *build], check=True, capture_output=True)
    (wheel,) = home.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--target", home / "installed", wheel]
    subprocess.run([*pip, *install], check=True, capture_output=True)
    return environment_with(home / "installed")


def environment_with(folder):
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def suite_of(name, text, folder, environment):
    """How many cases pass of the suite that a README shows for a backend."""
    (suite,) = (block for block in python_of(text) if f'check("{name}", case)' in block)
    file = folder / f"test_{name}.py"
    file.write_text(suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def python_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_it_is_listed_with_its_owner(environment):
    command = [sys.executable, "-m", "attndsl", "plugins", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (row,) = (row for row in json.loads(done.stdout)["plugins"] if row["name"] == "numpy")
    assert (row["group"], row["owner"], row["error"]) == ("backends", "attndsl-numpy", "")


def test_it_conforms(environment, tmp_path):
    assert suite_of("numpy", (SOURCE / "README.md").read_text(), tmp_path, environment) > 350


def test_the_backend_in_the_readme_conforms(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (source,) = (block for block in python_of(text) if block.endswith("backend = Tiny()\n"))
    (points,) = (block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "tiny" in block)
    (tmp_path / "my_package.py").write_text(source)
    info = tmp_path / "tiny-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 0.1\n")
    ((group, rows),) = tomllib.loads(points)["project"]["entry-points"].items()
    lines = [f"{name} = {target}" for name, target in rows.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    assert suite_of("tiny", text, tmp_path, environment_with(tmp_path)) > 120
