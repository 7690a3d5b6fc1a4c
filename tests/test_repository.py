"""What holds of the repository as a whole: who imports what, what the README shows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import attndsl

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "sympy", "networkx", "scipy", "matplotlib"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```attn.*\n((?:.*\n)*?)```", README)


def imported(*arguments):
    """Modules that a fresh interpreter loads, those of its child processes included."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.fixture
def readme_file(tmp_path):
    file = tmp_path / "sparse.attn"
    file.write_text(PROGRAMS[0], encoding="utf-8")
    return file


@pytest.mark.parametrize("command", ["check", "fmt"])
def test_commands_that_only_read_text_load_nothing_heavy(command, readme_file):
    found = imported("-m", "attndsl", command, readme_file)
    assert "attndsl.syntax.parse" in found
    assert not found & HEAVY
    assert not [name for name in found if name.startswith(("attndsl.analysis", "attndsl.html"))]


def test_what_a_selection_is_takes_nothing_heavy():
    found = imported("-m", "attndsl", "check", "example:nsa")
    assert "attndsl.execution.registry" in found
    assert not found & HEAVY


def test_importing_attndsl_loads_nothing_heavy():
    assert not imported("-c", "import attndsl") & HEAVY


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("attndsl/x.py", "from attndsl.plugins import reference", "TID251"),
        ("attndsl/x.py", "import attndsl.plugins.reference", "TID251"),
        ("plugins/x.py", "from attndsl.plugins.reference import backend", "TID251"),
        ("plugins/x.py", "from . import reference", "TID252"),
        ("attndsl/x.py", "import torch", "TID253"),
        ("attndsl/command/cli.py", "from sympy import sympify", "TID253"),
    ],
)
def test_the_linter_holds_the_architecture(file, line, rule):
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--stdin-filename",
        file,
        "--output-format",
        "concise",
        "-",
    ]
    done = subprocess.run(command, input=line + "\n", capture_output=True, text=True, check=False, cwd=ROOT)
    assert f" {rule} " in done.stdout


def test_what_attndsl_gives_is_seen_and_nothing_else():
    assert dir(attndsl) == sorted([*attndsl.__all__, "spans"])
    assert {"analyze", "compile", "load", "parse"} <= {*dir(attndsl)}
    held = [getattr(attndsl, name) for name in attndsl.__all__ if name not in ("__version__", "examples")]
    assert {value.__module__.partition(".")[0] for value in held} == {"attndsl"}
    assert set(re.findall(r"\battndsl\.(\w+)\(", README)) <= {*attndsl.__all__}


def test_the_code_of_the_readme_runs_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    codes = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert codes
    for code in codes:
        exec(code, {})
    assert "lm" in capsys.readouterr().out


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git is asked what belongs to the project")
def test_what_belongs_to_the_project_is_in_the_sdist():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"][
        "sdist"
    ]
    always = {".gitignore", "LICENSE", "pyproject.toml"}
    assert {line.partition("/")[0] for line in tracked.splitlines()} == {*listed["only-include"], *always}
