"""The vector functions of CPU kernels: within 3 units in the last place, and no library is called."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from attndsl.plugins.cpu import build, compiling

Floats = NDArray[np.floating[Any]]
BOUND = 3.0
HERE = Path(__file__).parent
MACHINES = ("native", "x86-64-v2") if platform.machine() == "x86_64" else ("native",)
"""The second has no operation that is a product and a sum."""

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason=build.MISSING),
    pytest.mark.skipif(sys.platform != "linux", reason="the linker is asked in the words of GNU's"),
    # NaN, and powers of two beyond all numbers
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def sigmoid(x: Floats) -> Floats:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


UNARY: dict[str, tuple[Callable[[Floats], Floats], Callable[[mpmath.mpf], mpmath.mpf]]] = {
    "exp2": (np.exp2, lambda x: mpmath.power(2, x)),
    "exp": (np.exp, mpmath.exp),
    "log": (np.log, mpmath.log),
    "log2": (np.log2, lambda x: mpmath.log(x, 2)),
    "tanh": (np.tanh, mpmath.tanh),
    "sigmoid": (sigmoid, lambda x: 1 / (1 + mpmath.exp(-x))),
    "sqrt": (np.sqrt, mpmath.sqrt),
    "sin": (np.sin, mpmath.sin),
    "cos": (np.cos, mpmath.cos),
    "floor": (np.floor, mpmath.floor),
}


@cache
def library(dtype: type, machine: str) -> ctypes.CDLL:
    """Compiled without a warning, and linked to no library: a call of libm is an error."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "functions.so")
        flags = (
            f"-std=c++17 -O3 -march={machine} -fno-math-errno -Wno-psabi -Wall -Wextra -Werror -fPIC -shared"
        )
        linked = "-nostdlib -Wl,--no-undefined -lgcc"
        files = f"-I{compiling.SOURCES[0].parent}", str(HERE / "vector_functions.cpp"), "-o", str(made)
        double = ["-DDOUBLE"] * (dtype is np.float64)
        command = [str(build.compiler()), *flags.split(), *double, *files, *linked.split()]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not result.returncode, result.stderr
        return ctypes.CDLL(str(made))


def found(name: str, machine: str, x: Floats, y: Floats | None = None) -> Floats:
    padded = [np.resize(a, -(-a.size // 16) * 16) for a in (x, x if y is None else y)]
    out = np.empty_like(padded[0])
    addresses = [ctypes.c_void_p(a.ctypes.data) for a in (*padded, out)]
    library(x.dtype.type, machine)[f"lanes_{name}"](*addresses, ctypes.c_int64(out.size))
    return out[: x.size]


def worst(out: Floats, exact: Floats) -> tuple[float, int]:
    """The greatest error in units of the last place of the exact result, and of which: infinite where one
    alone is NaN, or zero of another sign. Infinity counts as the first power of two that is no number."""
    info, wide = np.finfo(out.dtype), np.float64 if out.dtype == np.float32 else np.longdouble
    top = wide(2) ** info.maxexp
    a, b = (np.clip(x.astype(wide), -top, top) for x in (out, exact))
    exponent = np.clip(np.frexp(np.where(np.isnan(b), 0, b))[1] - 1, info.minexp, info.maxexp - 1)
    error = np.abs(a - b) / np.ldexp(wide(1), exponent - info.nmant)
    same = (np.isnan(a) & np.isnan(b)) | ((a == b) & ((a != 0) | (np.signbit(a) == np.signbit(b))))
    wrong = np.isnan(a) | np.isnan(b) | ((np.signbit(a) != np.signbit(b)) & ((a == 0) | (b == 0)))
    error = np.where(same, 0, np.where(wrong, np.inf, error))
    at = int(np.argmax(error))
    return float(error[at]), at


def of_bits(bits: NDArray[np.unsignedinteger[Any]], dtype: type) -> Floats:
    x: Floats = bits.view(dtype)
    return x


def ends(dtype: type) -> Floats:
    """Zeros, infinities, NaN, the first and last numbers of each kind, and where parts of functions begin."""
    info = np.finfo(dtype)
    sizes = [0, np.inf, info.smallest_subnormal, 3 * info.smallest_subnormal, info.tiny, info.max, info.eps]
    sizes += [0.5, 0.5**0.5, 1, 2**0.5, 2, 2.5, 3, 8.5, 9, 17, 88, 88.8, 102, 104, 126, 127, 150, 709, 710]
    sizes += [745, 746, 1023, 1075, 2**19, 2**19 + 1, 2**22 + 0.5, 2**23 - 0.5, 2**24 - 1, 2**52 - 0.5, 1e30]
    x = np.array(sizes, dtype)
    x = np.concatenate([x, np.nextafter(x, dtype(0)), np.nextafter(x, dtype(np.inf))])
    if dtype is np.float32:
        odd: NDArray[Any] = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    else:
        odd = np.array([0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF], np.uint64)
    return np.concatenate([x, -x, odd.view(dtype)])


def exact(name: str, x: Floats) -> Floats:
    return UNARY[name][0](x.astype(np.float64))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", UNARY)
def test_floats(name: str, machine: str) -> None:
    """Every 8191st of all bit patterns: 1024 numbers of each sign and exponent, subnormal ones and NaN. And
    numbers next to multiples of pi / 2."""
    every = of_bits(np.arange(0, 2**32, 8191, dtype=np.uint32), np.float32)
    turns = (np.arange(1, 400_000, 5) * (np.pi / 2)).astype(np.float32)
    x = np.concatenate([every, turns, ends(np.float32)])
    error, at = worst(found(name, machine, x), exact(name, x))
    assert error <= BOUND, float(x[at]).hex()


@pytest.mark.slow
@pytest.mark.parametrize("name", UNARY)
def test_more_floats(name: str) -> None:
    """Every 127th."""
    for start in range(0, 2**32, 2**27):
        x = of_bits(np.arange(start + start % 127, start + 2**27, 127, dtype=np.uint32), np.float32)
        error, at = worst(found(name, "native", x), exact(name, x))
        assert error <= BOUND, float(x[at]).hex()


def doubles(name: str) -> Floats:
    """Of any bits; of sizes from 2^-40 to 2^20; near 1; and near multiples of pi / 2."""
    random = np.random.default_rng(0)
    x = of_bits(random.integers(0, 2**64, 500, dtype=np.uint64), np.float64)
    near = 1 + (random.random(300) - 0.5) * 2.0 ** -random.integers(0, 52, 300)
    turns = random.integers(0, 10**6, 300) * (np.pi / 2)
    x = np.concatenate(
        [x, random.choice([-1, 1], 1200) * 2.0 ** (60 * random.random(1200) - 40), near, turns]
    )
    x = x[np.isfinite(x)]
    return np.abs(x) if name in ("log", "log2", "sqrt") else x


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", UNARY)
def test_doubles(name: str, machine: str) -> None:
    x = doubles(name)
    # 64 bits of mantissa hold what mpmath knows, to a 2048th of a unit
    error, at = worst(found(name, machine, x), of_mpmath(UNARY[name][1], x))
    assert error <= BOUND, float(x[at]).hex()
    x = ends(np.float64)
    # the C library of doubles is within a unit
    error, at = worst(found(name, machine, x), exact(name, x))
    assert error <= BOUND + 1, float(x[at]).hex()


def of_mpmath(function: Callable[..., mpmath.mpf], *arguments: Floats) -> Floats:
    """Two doubles of each result, added in more bits where the platform has them."""
    with mpmath.workprec(200):
        results = [function(*(mpmath.mpf(float(x)) for x in some)) for some in zip(*arguments, strict=True)]
        high = [float(result) for result in results]
        low = [float(r - h) if np.isfinite(h) else 0.0 for r, h in zip(results, high, strict=True)]
    return np.array(high, np.longdouble) + np.array(low, np.longdouble)


def bases_and_exponents(dtype: type, count: int) -> tuple[Floats, Floats]:
    """Of any bits; powers evenly among the exponents that there are, of any base and of bases near 1; whole
    exponents of bases of both signs."""
    random, info = np.random.default_rng(1), np.finfo(dtype)
    whole = np.uint32 if dtype is np.float32 else np.uint64
    x, y = (of_bits(random.integers(0, np.iinfo(whole).max, count, whole), dtype) for _ in range(2))
    wide = np.abs(of_bits(random.integers(0, np.iinfo(whole).max, count, whole), dtype))
    close = (1 + (random.random(count) - 0.5) * 2.0 ** -random.integers(0, info.nmant, count)).astype(dtype)
    exponents = (random.random((2, count)) * 2 - 1) * (info.maxexp + 30)
    powers = [e / np.log2(b.astype(np.float64)) for e, b in zip(exponents, (wide, close), strict=True)]
    signed = ((random.random(count) - 0.5) * 40).astype(dtype)
    bases = np.concatenate([x, wide, close, signed])
    return bases, np.concatenate([y, *powers, random.integers(-30, 30, count)]).astype(dtype)


@pytest.mark.parametrize("machine", MACHINES)
def test_powers_of_floats(machine: str) -> None:
    x, y = bases_and_exponents(np.float32, 100_000)
    wanted = np.power(x.astype(np.float64), y.astype(np.float64))
    error, at = worst(found("pow", machine, x, y), wanted)
    assert error <= BOUND, (x[at], y[at])


@pytest.mark.parametrize("machine", MACHINES)
def test_powers_of_doubles(machine: str) -> None:
    x, y = bases_and_exponents(np.float64, 500)
    kept = np.isfinite(x) & np.isfinite(y) & (x > 0)
    x, y = x[kept], y[kept]
    kept = np.abs(y * np.log2(x)) < 2000
    x, y = x[kept], y[kept]
    error, at = worst(found("pow", machine, x, y), of_mpmath(mpmath.power, x, y))
    assert x.size > 1000
    assert error <= BOUND, (x[at], y[at])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_ends_of_powers(dtype: type, machine: str) -> None:
    """Zeros, infinities, NaN, 1 and negative numbers, each to each, as in C."""
    x, y = (a.ravel() for a in np.meshgrid(ends(dtype), ends(dtype)))
    # a product is a quiet NaN: a signalling one to the power 0 is NaN in C
    wanted = np.power(x.astype(np.float64) * 1, y.astype(np.float64) * 1)
    error, at = worst(found("pow", machine, x, y), wanted)
    assert error <= BOUND, (x[at], y[at])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_exact_is_exact(dtype: type) -> None:
    whole: Floats = np.arange(-20, 20).astype(dtype)
    assert np.array_equal(found("exp2", "native", whole), np.exp2(whole))
    assert np.array_equal(found("log2", "native", np.exp2(whole)), whole)
    assert np.array_equal(found("pow", "native", whole, np.full_like(whole, 3)), whole**3)
    for name, value in (("exp", 1), ("cos", 1), ("sin", 0), ("tanh", 0), ("sigmoid", 0.5)):
        assert found(name, "native", np.zeros(1, dtype))[0] == value
