"""Installed in each way, attndsl is found from each folder, however it is started; what is built is whole."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from itertools import product
from pathlib import Path

import pytest

from attndsl.plugins.cpu import build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
packaging = pytest.mark.skipif(
    not (build.compiler() and build.levels()),
    reason="there is no compiler, or no packaged kernels for this machine",
)
ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
WAYS = ("install .", "editable", "wheel")
PLACES = ("root", "parent", "elsewhere")
STARTS = ("import", "module", "notebook")
FOUND = [*product(PLACES, STARTS), ("root", "script")]
"""A script looks in its own folder, wherever it is started."""
CODE = """
import attndsl, attndsl.grammar, importlib.metadata, importlib.util
assert attndsl.parse("pattern p = causal")["p"].mask(2).sum() == 3
assert attndsl.examples.mistral.names == ("mistral",)
for group in ("backends", "selections", "analyses"):
    points = importlib.metadata.entry_points(group=f"attndsl.{group}")
    assert points and all(importlib.util.find_spec(point.module) for point in points)
print("found")
"""
KERNEL = "import sys; sys.path[0] = ''; exec(sys.stdin.read())"
"""What a notebook's kernel does: it starts elsewhere and looks in the current folder first."""


def ran(*command, cwd, text=None, **variables):
    """What a command prints, with no settings of Python's but these."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)],
        env=plain | variables,
        cwd=cwd,
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


WITHOUT_COMPILER = """
import attndsl, torch
from attndsl.plugins.cpu import build

assert build.compiler() is None
text = '''
attention window { mask causal & last(40) }
attention sunk { mask causal & last(40)  norm softmax(sink = 0.5) }
attention positions { mask causal  score alibi }
attention learned(table = learn[H, 21](0.1)) { mask radius(30)  score relative(table, 10) }
attention capped { mask causal  score alibi  score softcap(30.0) }
attention beyond { mask causal  score s * s }
'''

def results(attention, backend, nq):
    torch.manual_seed(0)
    sizes = dict(length=100, q_length=nq, heads=4, kv_heads=2, head_dim=24, training=nq > 1)
    plan = attndsl.compile(attention, backend=backend, **sizes)
    given = [torch.randn(1, h, n, 24, requires_grad=nq > 1) for h, n in ((4, nq), (2, 100), (2, 100))]
    tables = {t.name: torch.randn(4, 21, requires_grad=nq > 1) for t in attention.learned}
    out = plan(*given, learned=tables)
    found = [out]
    if nq > 1:
        found += torch.autograd.grad((out * torch.randn_like(out)).sum(), [*given, *tables.values()])
    return found

program = attndsl.parse(text)
for name in program.names:
    if name == "beyond":
        continue
    for nq in (100, 1):
        for mine, wanted in zip(*(results(program[name], backend, nq) for backend in ("cpu", "reference"))):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
assert attndsl.compile(program["window"], length=4096, heads=8).backend == "cpu"
for name, dtype in (("beyond", "float32"), ("window", "float64")):
    try:
        attndsl.compile(program[name], length=100, backend="cpu", dtype=dtype)
    except attndsl.AttnError as error:
        print(error.diagnostics[0].message)
"""


def names(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """All that is installed here but attndsl, by links."""
    folder = tmp_path_factory.mktemp("others")
    for path in (Path(place) for place in sys.path if Path(place).name == "site-packages"):
        for child in path.iterdir():
            if "attndsl" not in child.name and child.suffix != ".pth" and not (folder / child.name).exists():
                (folder / child.name).symlink_to(child)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist of this project, and the wheel of that."""
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(
        ROOT, folder / "source", ignore=shutil.ignore_patterns(".git", ".venv", ".*_cache", ".hypothesis")
    )
    build = ("-m", "build", "--no-isolation", "--outdir", folder, folder / "source")
    ran(sys.executable, *build, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def home(request, tmp_path_factory, others, built):
    """An environment with attndsl installed in one way, from a clone in a folder `attndsl`."""
    folder = tmp_path_factory.mktemp("home")
    clone, python = folder / "parent" / "attndsl", folder / "venv" / "bin" / "python"
    shutil.copytree(ROOT, clone, ignore=LEFT_OUT)
    (folder / "elsewhere").mkdir()
    ran(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(str(others))
    what = {"install .": ["."], "editable": ["--editable", "."], "wheel": [*built.glob("*.whl")]}[
        request.param
    ]
    before = names(clone)
    pip = (
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    )
    ran(sys.executable, *pip, *what, cwd=clone)
    assert names(clone) == before
    return folder


@pytest.mark.parametrize("home", WAYS, indirect=True)
@pytest.mark.parametrize(("place", "start"), FOUND)
def test_attndsl_is_found(home, place, start):
    cwd = {"root": home / "parent" / "attndsl", "parent": home / "parent", "elsewhere": home / "elsewhere"}[
        place
    ]
    programs = home / "venv" / "bin"
    if start == "import":
        assert ran(programs / "python", "-c", CODE, cwd=cwd) == "found\n"
    elif start == "notebook":
        (home / "kernel.py").write_text(KERNEL)
        assert ran(programs / "python", home / "kernel.py", cwd=cwd, text=CODE) == "found\n"
    else:
        command = [programs / "attndsl"] if start == "script" else [programs / "python", "-m", "attndsl"]
        assert ": proved: " in ran(*command, "check", "example:mistral", cwd=cwd)


@packaging
@pytest.mark.parametrize("home", ["wheel"], indirect=True)
def test_packaged_kernels_need_no_compiler(home, tmp_path):
    python, nowhere = home / "venv" / "bin" / "python", tmp_path / "cache"
    found = ran(python, "-c", WITHOUT_COMPILER, cwd=tmp_path, PATH=str(tmp_path), XDG_CACHE_HOME=str(nowhere))
    reason = f"the backend `cpu` declines: {build.MISSING}, and of the packaged kernels none has this score"
    assert found.splitlines() == [reason, reason]
    assert [*nowhere.rglob("*.so")] == []


@packaging
def test_a_wheel_with_kernels_is_of_its_platform(built):
    (wheel,) = built.glob("*.whl")
    platform = re.sub("[-.]", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert wheel.stat().st_size < 5e6


def test_a_wheel_is_built_without_a_compiler_too(tmp_path):
    (tmp_path / "bin").mkdir()
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT]
    environment = {**os.environ, "PATH": str(tmp_path / "bin")}
    done = subprocess.run(build, env=environment, capture_output=True, text=True, check=True)
    assert "without packaged kernels: there is no C++ compiler" in done.stderr
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_a_wheel_holds_the_grammar_the_plugins_and_the_examples(built):
    (wheel,) = built.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("attndsl/")}
    held -= {name for name in held if name.endswith(".so")}
    files = [
        path.relative_to(ROOT)
        for name in ("attndsl", "grammar", "plugins")
        for path in (ROOT / name).rglob("*.*")
    ]
    files += [path.relative_to(ROOT) for path in (ROOT / "examples").glob("*.attn")]
    ours = (str(path) for path in files if path.suffix != ".pyc")
    assert held == {name if name.startswith("attndsl/") else f"attndsl/{name}" for name in ours}


def test_the_description_has_no_links_that_a_package_index_breaks(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    message = message_from_bytes(archive.read(metadata))
    text = message.get_payload(decode=True).decode()
    assert message["Description-Content-Type"] == "text/markdown"
    assert text.startswith("# attndsl\n")
    assert "docs/analysis.md says what each number means" in text
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []


def test_tests_pass_in_an_sdist(built, tmp_path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    files = [f"tests/test_{name}.py" for name in ("architecture", "repository", "libraries")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    where = [sys.executable, "-c", "import attndsl; print(attndsl.__file__)"]
    assert Path(subprocess.check_output(where, cwd=root, text=True).strip()).is_relative_to(root)
