"""The backend `cpu`: its kernels against the others, its threads, and how its library is made and kept."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_builds import built_with
from thin import thin
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attndsl
from attndsl.attention import HeadGroup, Relation
from attndsl.backend import Differentiable
from attndsl.conformance import Case, check, supported
from attndsl.conformance.cases import attention_of
from attndsl.emit.score import score_of
from attndsl.expr import TRUE, var
from attndsl.plugins import cpu as backend_cpu
from attndsl.plugins.cpu import build, compiling, families, passes
from attndsl.plugins.cpu.layout import Layout
from attndsl.plugins.cpu.score import code

REASON = "" if build.compiler() else build.MISSING
compiled = pytest.mark.skipif(bool(REASON), reason=f"the backend `cpu` declines: {REASON}")


CASES = supported("cpu")


def sources(case: Case) -> object:
    """What is compiled for it: mechanisms that differ in masks, lengths and tables share it."""
    scores = [score_of(group, case.head_dim, True) for group in attention_of(case.mechanism).attended.groups]
    return tuple([score if isinstance(score, str) else code(score, None) for score in scores])


FIRST = {sources(case): case for case in reversed(CASES)}.values()
"""One for each source; in the long run others too, as they are compiled for users."""


@compiled
@pytest.mark.parametrize("case", thin(FIRST, 2), ids=str)
def test_conforms(case: Case, quick: None) -> None:
    assert check("cpu", case) is None


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[::11], ids=str)
def test_conforms_as_it_is_shipped(case: Case) -> None:
    with built_with("-O3"):
        assert check("cpu", case) is None


@compiled
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_conforms_on_other_processors(level: str) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("these are of x86-64")
    if level not in build.levels():
        pytest.skip(f"this processor is below {level}")
    with built_with(f"-march={level}"):
        for case in CASES[::23]:
            assert check("cpu", case) is None, case


@compiled
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_conforms_built_by_clang() -> None:
    with built_with(compiler=shutil.which("clang++")):
        for case in CASES[::23]:
            assert check("cpu", case) is None, case


SANITIZED = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from cpu_builds import built_with
from attndsl.conformance import check, supported
from attndsl.plugins.cpu import build
build.platformdirs.user_cache_path = lambda _: pathlib.Path(sys.argv[2])
with built_with("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=signed-integer-overflow",
                "-fno-sanitize-recover=undefined", "-Wl,-z,lazy"):
    cases = supported("cpu")[::int(sys.argv[3])]
    for case in cases:
        print(case, flush=True)
        assert check("cpu", case) is None, case
print("all", len(cases))
"""


@compiled
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_memory_and_arithmetic_are_defined(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Nothing is read or written beyond tensors, which malloc of the sanitizer surrounds with guards.

    All cases take an hour: `make sanitize`.
    """
    # errors of Python's pass through torch as exceptions of C++, which the sanitizer has to know first
    names = ("libasan.so", "libstdc++.so.6")
    asked = [[str(build.compiler()), f"-print-file-name={name}"] for name in names]
    libraries = [
        subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in asked
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("there is no libasan")
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED, str(Path(__file__).parent), str(tmp_path)]
    command.append(str(request.config.getoption("sanitized")))
    child = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=7100
    )
    assert child.returncode == 0, child.stdout[-300:] + child.stderr[-3000:]
    assert "all" in child.stdout


@compiled
@pytest.mark.parametrize(
    ("dtype", "level"),
    [
        ("float32", "-O0"),
        *(pytest.param(dtype, "-O3", marks=pytest.mark.slow) for dtype in ("float32", "float64")),
    ],
)
def test_nothing_beyond_operands_is_touched(dtype: str, level: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("guarded.py")), dtype, level]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-100:] + child.stderr[-3000:]
    assert child.stdout.endswith("all\n")


MASKS = (
    "causal",
    "causal & last(50)",
    "radius(37) | global([0, 133])",
    "band(-60 .. 60, step = 4)",
    "{ q, k : (k - q) mod 16 == 0 }",
    "full",
    "none",
    "{ q, k : q * k mod 7 == 3 }",
    "{ q, k : q > 10 and k < q - 10 }",
)


def results(backend: str, mask: str, nq: int, n: int, widths: tuple[int, int], kv_heads: int) -> list[Tensor]:
    """Output, log-sum-exp where there is one, and gradients of both."""
    attention = attndsl.parse(f"attention a {{ mask {mask}  score 1.5 * s }}")["a"]
    wide = torch.float32 if backend == "cpu" else torch.float64
    plan = attndsl.compile(
        attention, length=n, q_length=nq, batch=2, heads=4, kv_heads=kv_heads, head_dim=widths[0],
        dtype=str(wide), training=True, backend=backend,
    )  # fmt: skip
    random = torch.Generator().manual_seed(nq + n)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(wide).requires_grad_()

    qkv = drawn(2, 4, nq, widths[0]), drawn(2, kv_heads, n, widths[0]), drawn(2, kv_heads, n, widths[1])
    out, lse = plan(*qkv, return_lse=True)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    ends = (out * drawn(*out.shape)).sum() + (lse * drawn(*lse.shape)).sum()
    return [out, lse, *torch.autograd.grad(ends, qkv)]


@compiled
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("nq", "n", "widths", "kv_heads"),
    [(200, 200, (64, 64), 2), (77, 300, (17, 33), 4), (1, 129, (8, 5), 1), (63, 130, (48, 80), 2)],
)
def test_equals_the_reference(mask: str, nq: int, n: int, widths: tuple[int, int], kv_heads: int) -> None:
    mine, exact = (results(backend, mask, nq, n, widths, kv_heads) for backend in ("cpu", "reference"))
    for found, wanted in zip(mine, exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-5)


@compiled
@pytest.mark.parametrize("heads", [1, 4])
def test_the_same_for_any_number_of_threads(heads: int) -> None:
    attention = attndsl.parse("attention a { mask causal & (last(200) | sinks(3)) }")["a"]
    plan = attndsl.compile(attention, length=700, heads=heads, backend="cpu", training=True)
    qkv = [torch.randn(1, heads, 700, 64, requires_grad=True) for _ in range(3)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            out, lse = plan(*qkv, return_lse=True)
            # sums of torch's own depend on the threads
            slope = torch.ones_like(out), torch.ones_like(lse)
            found.append([out, lse, *torch.autograd.grad((out, lse), qkv, slope)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@compiled
def test_a_child_of_fork_goes_on_with_one_thread() -> None:
    attention = attndsl.parse("attention a { mask causal }")["a"]
    plan = attndsl.compile(attention, length=300, heads=2, backend="cpu")
    qkv = [torch.randn(1, 2, 300, 64) for _ in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        out = plan(*qkv)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(plan(*qkv), out) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


@compiled
def test_large_logits() -> None:
    attention = attndsl.parse("attention a { mask causal  score 300 * s }")["a"]
    qkv = [torch.randn(1, 1, 100, 64) for _ in range(3)]
    found = {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        plan = attndsl.compile(attention, length=100, backend=backend, dtype=str(dtype))
        found[backend] = plan(*(x.to(dtype) for x in qkv))
    torch.testing.assert_close(found["cpu"].double(), found["reference"], rtol=1e-3, atol=1e-3)


@compiled
@pytest.mark.parametrize("size", [100.0, 1e4, 3e8])
def test_weights_of_large_logits_sum_to_one_in_the_backward_pass(size: float) -> None:
    attention = attndsl.parse("attention a { mask full }")["a"]
    plan = attndsl.compile(attention, length=64, head_dim=1, training=True, backend="cpu")
    v = torch.zeros(1, 1, 64, 1, requires_grad=True)
    plan(torch.full((1, 1, 64, 1), size), 1 + torch.arange(64.0).view(1, 1, 64, 1) * 1e-3, v).sum().backward()
    assert v.grad is not None
    assert v.grad.sum().item() / 64 == pytest.approx(1, abs=1e-5)


@compiled
def test_few_keys_with_most_of_the_weight_have_exact_gradients() -> None:
    """Logits that are not scaled, as T5's, with log-sum-exps up to 80: torch's own errors, or little more."""
    torch.manual_seed(0)
    q, k, v, back = (torch.randn(1, 2, 256, 16) * size for size in (2.0, 2.0, 1.0, 1.0))
    attention = attndsl.parse("attention a { mask causal  score Q @ K }")["a"]
    plan = attndsl.compile(attention, length=256, heads=2, head_dim=16, backend="cpu", training=True)

    def gradient(run: Any, dtype: torch.dtype) -> Tensor:
        mine = v.to(dtype).requires_grad_()
        return torch.autograd.grad(run(q.to(dtype), k.to(dtype), mine), mine, back.to(dtype))[0].double()

    def math(*given: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True, scale=1.0)

    exact = gradient(math, torch.float64)
    errors = [(gradient(run, torch.float32) - exact).norm() for run in (plan, math)]
    assert errors[0] <= 2 * errors[1]


@compiled
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_results_may_come_back_in_any_layout(size: float) -> None:
    attention = attndsl.parse("attention a { mask causal }")["a"]
    lowered = attndsl.compile(attention, length=90, heads=3, head_dim=8, training=True, backend="cpu").lowered
    q, k, v, slope = torch.randn(4, 1, 3, 90, 8)
    q = q * size
    call = lowered.call_of(q, k, v, {}, lowered.sizes(q, k, (None,) * 5))
    out, lse = lowered.kernel(call)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (out, lse, slope)]
    assert isinstance(lowered.kernel, Differentiable)
    found, wanted = (lowered.kernel.gradient(call, (), *x, None)[:3] for x in (turned, (out, lse, slope)))
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_words_hold_the_pairs_of_a_mask() -> None:
    attention = attndsl.parse("attention a { mask radius(90) | global([3]) }")["a"]
    grid = attention.block_mask(500, 128).grids[0]
    layout, found = Layout.of(grid), np.zeros((512, 500), bool)
    for block in range(8):
        rows = slice(block * 64, block * 64 + 64)
        for e in range(layout.first[block], layout.first[block + 1]):
            keys = slice(layout.start[e], layout.end[e])
            if layout.words[e] < 0:
                found[rows, keys] = True
                continue
            words = layout.masks[layout.words[e] :][: keys.stop - keys.start]
            found[rows, keys] = (words[None] >> np.arange(64, dtype=np.uint64)[:, None]) & np.uint64(1)
    assert np.array_equal(found[:500], grid.to_dense())


@pytest.mark.parametrize(
    ("clauses", "sizes", "reason"),
    [
        ("norm linear  score exp(Q) @ exp(K)", {}, "the score computes `inner` at each pair"),
        ("decay where(random(3)[q, k], 1.0, 0.5)", {}, "the score computes `random` at each pair"),
        ("", {"block_size": 32}, "tiles of 32 tokens are no multiple of 64"),
    ],
)
def test_declines(clauses: str, sizes: dict[str, Any], reason: str) -> None:
    attention = attndsl.parse(f"attention a {{ mask causal {clauses} }}")["a"]
    with pytest.raises(attndsl.AttnError, match=reason):
        attndsl.compile(attention, **{"length": 64, "backend": "cpu", **sizes})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a library that has not been looked for."""
    monkeypatch.setattr(build.platformdirs, "user_cache_path", lambda _: tmp_path / "cache")
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(build, "_machine", build._machine.__wrapped__)
    return tmp_path


PLAIN = score_of(HeadGroup(Relation(TRUE), var("s")), 64, True)


def made() -> Any:
    """The library of a plain score, or why there is none."""
    assert not isinstance(PLAIN, str)
    return build.library(code(PLAIN, None), "forward")


def compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """One that does what a shell script says."""
    path = folder / "bin" / "c++"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo 'error: no' >&2; exit 1", "failed: error: no"), ("exec sleep 9", "took more than 1 seconds")],
)
def test_a_compiler_that_fails(home: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    compiler(home, monkeypatch, script)
    monkeypatch.setattr(compiling, "SECONDS", 1)
    found = made()
    assert isinstance(found, str)
    assert said in found


def test_no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert made() == build.MISSING
    attention = attndsl.parse("attention a { mask causal }")["a"]
    with pytest.raises(attndsl.AttnError, match="declines: there is no C"):
        attndsl.compile(attention, length=64, backend="cpu")
    assert attndsl.compile(attention, length=64).considered["cpu"] == build.MISSING


@compiled
def test_another_backend_is_taken_where_the_compiler_fails(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = attndsl.parse("attention a { mask causal & last(37)  score 1.25 * s }")["a"]
    before = attndsl.compile(attention, length=1024, heads=8)
    assert before.backend == "cpu"
    real = build.compiler()
    compiler(
        home, monkeypatch, f'case "$*" in *-dM*) exec {real} "$@";; esac; echo "error: no room" >&2; exit 1'
    )
    monkeypatch.setattr(passes, "library", build.library)
    monkeypatch.setattr(backend_cpu, "library", build.library)
    plan = attndsl.compile(attention, length=1023, heads=8)
    assert plan.backend != "cpu"
    assert "error: no room" in str(plan.considered["cpu"])
    assert "no room" in str(plan)


@compiled
def test_a_cache_that_cannot_be_made_or_that_others_write_to(home: Path) -> None:
    folder = home / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert made() == f"{folder} can be written to by others"
    folder.rmdir()
    folder.write_text("no folder")
    assert made() == f"{folder} cannot be made: File exists"


@compiled
def test_the_library_is_made_once_and_again_where_it_is_damaged(home: Path) -> None:
    assert not isinstance(made(), str)
    folder = home / "cache" / "kernels"
    (there,) = folder.glob("*.so")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    before, digest = there.stat().st_mtime_ns, hashlib.sha256(there.read_bytes()).hexdigest()
    assert not isinstance(made(), str)
    assert there.stat().st_mtime_ns == before
    damaged = home / "damaged"
    damaged.write_bytes(there.read_bytes()[:-1])
    damaged.replace(there)
    assert not isinstance(made(), str)
    assert hashlib.sha256(there.read_bytes()).hexdigest() == digest
    assert sorted(path.suffix for path in folder.iterdir()) == [".sha256", ".so"]


HALF = 'for last; do :; done; "{real}" "$@" || exit 1; case "$last" in *.so) {ruin} "$last";; esac'


@compiled
@pytest.mark.parametrize(
    ("ruin", "said"),
    [
        *((f"truncate -s {size}", "left half of a library") for size in (10, 6000)),
        ("echo no >", "cannot be loaded"),
    ],
)
def test_what_a_compiler_leaves_half_written_is_no_library(
    home: Path, monkeypatch: pytest.MonkeyPatch, ruin: str, said: str
) -> None:
    """It is said, and made again when the compiler is well."""
    with monkeypatch.context() as ill:
        compiler(home, ill, HALF.format(real=build.compiler(), ruin=ruin))
        found = made()
        assert isinstance(found, str)
        assert said in found
    assert not isinstance(made(), str)


def test_headers_of_packaged_scores_are_what_is_generated() -> None:
    """Else write them anew: `python -m attndsl.plugins.cpu.families`."""
    assert {path.name: path.read_text() for path in compiling.PACKAGED.glob("*.h")} == families.headers()


@pytest.mark.parametrize(
    ("family", "clauses"),
    [
        ("plain", "score 0.3 * s  norm softmax(sink = learn[H](0.5))"),
        ("distance", "score t5(learn[H, 32](0.1))"),
        ("distance", "score s / 2 - kerple(q - k)"),
        ("softcap", "score softcap(50.0)"),
        ("distance-softcap", "score relative(learn[7](0.1), 3)  score softcap(learn[H](5.0))"),
    ],
)
def test_scores_of_a_family_have_one_header(family: str, clauses: str) -> None:
    text = f"let kerple(x) = 0.2 * log(1 + 0.1 * |x|)\nattention a {{ mask causal  {clauses} }}"
    score = score_of(attndsl.parse(text)["a"].attention.groups[0], 80, True)
    assert not isinstance(score, str)
    assert code(score, None) == (compiling.PACKAGED / f"{family}-forward.h").read_text()


@compiled
def test_a_packaged_library_is_taken_before_the_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sources that it was made of alone; and the compiler where it cannot be loaded."""
    assert not isinstance(PLAIN, str)
    text = code(PLAIN, None)
    monkeypatch.setattr(compiling, "PACKAGED", home)
    monkeypatch.setattr(build, "PACKAGED", home)
    place = compiling.place("forward", text, build.levels()[0])
    command = [str(build.compiler()), *compiling.FLAGS, "-O0"]
    assert compiling.compiled(command, "forward", text, place) is None
    assert not isinstance(made(), str)
    assert not (home / "cache").exists()
    assert build.packaged(text, "forward", ("DOUBLE",)) is None
    assert build.packaged(text, "decode", ()) is None
    with monkeypatch.context() as changed:
        changed.setattr(compiling, "sources", lambda: (b"others",))
        assert build.packaged(text, "forward", ()) is None
    compiling.place("decode", text, build.levels()[0]).write_text("no library")
    assert not isinstance(build.library(text, "decode"), str)
    assert [*(home / "cache" / "kernels").glob("*.so")]
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert "cannot be loaded" in build.library(text, "decode")


@compiled
def test_a_digest_of_any_bytes_is_no_error(home: Path) -> None:
    assert not isinstance(made(), str)
    (digest,) = (home / "cache" / "kernels").glob("*.sha256")
    digest.write_bytes(b"\xff\xfe")
    assert not isinstance(made(), str)
    assert len(digest.read_bytes()) == 64


TOGETHER = """
import pathlib, sys
from attndsl.attention import HeadGroup, Relation
from attndsl.emit.score import score_of
from attndsl.expr import TRUE, var
from attndsl.plugins.cpu import build
from attndsl.plugins.cpu.score import code
build.platformdirs.user_cache_path = lambda _: pathlib.Path(sys.argv[1])
text = code(score_of(HeadGroup(Relation(TRUE), var("s")), 64, True), None)
made = build.library(text, "forward")
assert not isinstance(made, str), made
"""


@compiled
@pytest.mark.slow
def test_processes_that_build_the_same_at_once(tmp_path: Path) -> None:
    children = [subprocess.Popen([sys.executable, "-c", TOGETHER, str(tmp_path)]) for _ in range(4)]
    assert [child.wait(timeout=100) for child in children] == [0] * 4
    assert sorted(path.suffix for path in (tmp_path / "kernels").iterdir()) == [".sha256", ".so"]


@compiled
def test_threads_that_call_at_once() -> None:
    attention = attndsl.parse("attention a { mask causal }")["a"]
    plan = attndsl.compile(attention, length=200, heads=2, backend="cpu")
    inputs = [[torch.randn(1, 2, 200, 64) for _ in range(3)] for _ in range(4)]
    alone = [plan(*qkv) for qkv in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(lambda qkv: plan(*qkv), inputs), alone))
