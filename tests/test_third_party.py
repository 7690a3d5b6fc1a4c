"""A backend of another party: built, installed, and held to the conformance suite by its name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "examples" / "numpy-backend"


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
    path = os.pathsep.join([str(home / "installed"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_it_is_listed_with_its_owner(environment):
    command = [sys.executable, "-m", "attndsl", "plugins", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (row,) = (row for row in json.loads(done.stdout)["plugins"] if row["name"] == "numpy")
    assert (row["group"], row["owner"], row["error"]) == ("backends", "attndsl-numpy", "")


def test_it_conforms(environment, tmp_path):
    (suite,) = re.findall(r"```python\n(.*?)```", (SOURCE / "README.md").read_text(), re.DOTALL)
    file = tmp_path / "test_numpy.py"
    file.write_text(suite)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80
