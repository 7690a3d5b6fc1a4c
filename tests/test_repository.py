"""What holds of the repository as a whole: who imports what, what a wheel holds, what the README shows."""

import re
import shutil
import subprocess
import sys
import zipfile
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


@pytest.mark.slow
def test_a_wheel_holds_the_grammar_and_the_plugins(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("attndsl", "grammar", "plugins"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", source]
    subprocess.run([*command, "--wheel-dir", tmp_path], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(Path("attndsl", *(path.parts if path.parts[0] != "attndsl" else path.parts[1:])))
        for folder in ("attndsl", "grammar", "plugins")
        for path in (file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file())
        if path.suffix in (".py", ".lark", ".attn", ".typed", ".jinja", ".css", ".js")
    }
    assert wanted <= held


def test_what_attndsl_gives_is_seen_and_nothing_else():
    assert dir(attndsl) == sorted([*attndsl.__all__, "__version__", "spans"])
    assert {"analyze", "compile", "load", "parse"} <= {*dir(attndsl)}
    assert {getattr(attndsl, name).__module__.partition(".")[0] for name in attndsl.__all__} == {"attndsl"}
    assert set(re.findall(r"\battndsl\.(\w+)\(", README)) <= {*attndsl.__all__}
