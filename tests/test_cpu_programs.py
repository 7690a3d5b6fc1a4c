"""The backend `cpu` against `reference`: random programs, and scores that are compiled once and then meet
many masks, tables and sizes."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from programs import Program, program
from test_cpu import compiled
from thin import thin
from torch import Tensor

import attndsl
from attndsl.errors import AttnError
from attndsl.plugins.cpu import build, kernel

pytestmark = [compiled, pytest.mark.usefixtures("quick")]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a call of an attention with H heads."""

    nq: int
    n: int
    heads: int
    kv_heads: int
    batch: int = 2
    d: int = 5
    dv: int = 3

    def of(self, axis: str) -> int:
        names = {"n": self.n, "m": self.n, "B": self.batch, "H": self.heads, "D": self.d}
        return int(axis) if axis.isdigit() else names[axis]


def spread(x: Tensor, kind: int) -> Tensor:
    """The same numbers in another layout; NaN lies in between."""
    if kind == 1:
        wide = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3] + 2), torch.nan)
        return wide[:, :, ::2, 1:-1].copy_(x)
    return x.transpose(1, 2).contiguous().transpose(1, 2) if kind == 2 else x


def results(
    backend: str, bound: Any, sizes: Sizes, tables: Mapping[str, Any], seed: int, **places: Any
) -> Named | str:
    """Output, log-sum-exp and all gradients of both, or the message of an error."""
    dtype = torch.float64
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype)

    q = drawn(sizes.batch, sizes.heads, sizes.nq, sizes.d)
    k, v = (drawn(sizes.batch, sizes.kv_heads, sizes.n, width) for width in (sizes.d, sizes.dv))
    if seed % 4 == 3:
        k = k[:1, :, :1].expand(k.shape)
    layout = seed % 3 if backend == "cpu" else 0
    leaves = {name: spread(x, layout).requires_grad_() for name, x in (("q", q), ("k", k), ("v", v))}
    given = {name: torch.as_tensor(x) for name, x in tables.items()}
    given = {
        name: x.double().clone().requires_grad_() if x.is_floating_point() else x for name, x in given.items()
    }
    learned = {}
    for table in bound.learned:
        shape = [int(size) if str(size).isdigit() else sizes.of(str(size)) for size in table.dims]
        # of a logarithm of less than 0 each backend has NaN somewhere else
        learned[table.name] = (0.3 + 0.2 * drawn(*shape)).abs().requires_grad_()
    try:
        plan = attndsl.compile(
            bound, length=sizes.n, q_length=sizes.nq, batch=sizes.batch, heads=sizes.heads,
            kv_heads=sizes.kv_heads, head_dim=sizes.d, dtype="float64", training=True, backend=backend,
        )  # fmt: skip
        out, lse = plan(*leaves.values(), learned=learned, return_lse=True, **places, **given)
    except AttnError as error:
        return str(error)
    found = {"out": out, "lse": lse}
    ends = [x for x in (out, torch.where(lse == -torch.inf, 0.0, lse)) if x.requires_grad]
    leaves |= learned | {name: x for name, x in given.items() if x.requires_grad}
    slopes = [drawn(*x.shape) for x in ends]
    grads = torch.autograd.grad(ends, [*leaves.values()], slopes, materialize_grads=True, allow_unused=True)
    return found | {f"gradient of {name}": x for name, x in zip(leaves, grads, strict=True)}


def agree(bound: Any, sizes: Sizes, tables: Mapping[str, Any], seed: int = 0, **places: Any) -> None:
    mine, exact = (results(backend, bound, sizes, tables, seed, **places) for backend in ("cpu", "reference"))
    if isinstance(mine, str) and "declines" in mine:
        pytest.skip(mine)
    if isinstance(exact, str) or isinstance(mine, str):
        # which of the entries beyond a table is named is left open
        assert re.sub(r"\d+", "", str(mine)) == re.sub(r"\d+", "", str(exact))
        return
    for name, wanted in exact.items():
        scale = (
            max(1.0, float(wanted.detach().masked_fill(~wanted.isfinite(), 0.0).abs().max()))
            if wanted.numel()
            else 1
        )
        torch.testing.assert_close(
            mine[name],
            wanted,
            rtol=0,
            atol=1e-9 * scale,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A source takes half a second to compile: `make test` tries every eighth of 36, `make programs` 300."""
    if metafunc.function is test_random_programs:
        metafunc.parametrize("number", thin(range(metafunc.config.getoption("programs")), 8))


def test_random_programs(number: int) -> None:
    chosen: Program = program(Random(1000 + number), scores=True, depth=1 + number % 2)
    rng = Random(number)
    n = rng.choice((1, 7, 33, 70, 140))
    nq = n if "[q]" in chosen.text or "q, k]" in chosen.text else rng.choice((1, 3, 16, 32, 65, n))
    nq = min(nq, n)
    kv = rng.choice([kv for kv in (1, 2, 3, 4) if chosen.heads % kv == 0])
    sizes = Sizes(nq, n, chosen.heads, kv, d=rng.choice((1, 4, 9, 16)), dv=rng.choice((1, 3, 17)))
    tables = chosen.tables(n, number, batch=2, head_dim=sizes.d)
    agree(attndsl.parse(chosen.text)["main"], sizes, tables, number)


SCORES = {
    "look-ups under conditions": (
        "inputs z : float[H, 6] t : int[B, n] x : float[n]",
        "s + where(q - k < 6 and t[q] == t[k], z[q - k] * x[k], -0.5 * s)",
    ),
    "integers": (
        "inputs t : int[B, n]",
        "s + 0.1 * where(t[q] > t[k], log2(t[q] - t[k]) - isqrt(t[k] * t[q]), t[q] * t[k] // 2 - t[k] mod 3)",
    ),
    "extremes": ("inputs x : float[B, H, n]", "min(max(s, x[q] * x[k]), |x[k] + s|) + x[q]"),
    "sizes": ("inputs x : float[B, H, n, n]", "s + x[q, k]"),
    "functions": (
        "inputs x : float[n]",
        "tanh(s) * sigmoid(x[q]) + log(1.5 + sin(s * x[k])) + sqrt(2 + cos(s)) + exp(-|x[q] - x[k]|)",
    ),
    "powers": ("inputs x : float[n]", "s + (0.1 + |x[q] * x[k]|) ** (0.5 + sigmoid(x[k])) + s ** 2"),
}  # fmt: skip
MASKS = (
    "causal",
    "full",
    "none",
    "radius(9) | global([0])",
    "{ q, k : (q + k) mod 5 == 1 and q > 8 }",
    "band(-40 .. -3)",
)
LENGTHS = ((70, 70), (1, 70), (5, 33), (32, 140), (130, 130), (64, 128), (0, 9), (3, 0))
NORMS = ("softmax", "softmax(sink = 0.5)", "sigmoid", "relu", "none", "linear")
BIG = (None, 1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf)


def drawn_table(table: Any, sizes: Sizes, random: torch.Generator, big: float | None) -> Tensor:
    shape = [sizes.of(str(axis)) for axis in table.dims]
    if table.dtype != "float":
        return torch.randint(0, 5, shape, generator=random)
    found = torch.randn(shape, generator=random, dtype=torch.float64)
    return found if big is None else torch.where(found > 0.8, big, found)


def tried(score: str, norm: str, count: int, seed: int) -> None:
    inputs, text = SCORES[score]
    rng, random = Random(seed), torch.Generator().manual_seed(seed)
    for mask, (nq, n) in itertools.islice(
        itertools.product(MASKS, LENGTHS), seed % 5, None, max(1, 48 // count)
    ):
        decay = rng.choice(("", "decay 0.9 ** |q - k|")) if norm != "relu" and seed % 2 else ""
        bound = attndsl.parse(f"attention a {{ {inputs} mask {mask} score {text} {decay} norm {norm} }}")["a"]
        heads, kv_heads = rng.choice(((1, 1), (2, 1), (4, 2)))
        sizes = Sizes(nq, n, heads, kv_heads)
        big = rng.choice(BIG) if score == "sizes" else None
        agree(
            bound,
            sizes,
            {t.name: drawn_table(t, sizes, random, big) for t in bound.inputs},
            rng.randrange(99),
        )


@pytest.mark.parametrize(("number", "score"), [*enumerate(SCORES)])
def test_scores_over_masks(number: int, score: str) -> None:
    tried(score, NORMS[number], 6, number)


@pytest.mark.slow
@pytest.mark.parametrize("turn", [1, 3])
@pytest.mark.parametrize(("number", "score"), [*enumerate(SCORES)])
def test_scores_over_more_masks(number: int, score: str, turn: int) -> None:
    """What becomes of a logit knows nothing of how it was made: each score meets some of the norms."""
    norm = NORMS[(number + turn) % len(NORMS)]
    tried(score, norm, 24, len(score) + len(norm))


SMALL = Sizes(40, 40, 2, 1)
DRAWN: Mapping[str, Callable[[torch.Generator, tuple[int, ...]], Tensor]] = {
    "x": lambda random, shape: torch.rand(shape, generator=random, dtype=torch.float64) + 0.5,
    "z": lambda random, shape: torch.randn(shape, generator=random, dtype=torch.float64),
    "t": lambda random, shape: torch.randint(1, 4, shape, generator=random),
    "g": lambda random, shape: torch.randn(shape, generator=random, dtype=torch.float64),
    "zero": lambda random, shape: torch.zeros(shape, dtype=torch.float64),
    "keep": lambda random, shape: torch.rand(shape, generator=random) > 0.5,
}  # fmt: skip
MENDED = [
    # a condition keeps a look-up from being asked for by rows whose pairs it leaves out
    "inputs z : float[5] mask causal score s + where(q - k < 3 and q < 5, z[q], 0.0)",
    "inputs z : float[5] mask causal score s + where(q - k < 3 and k + q < 9, z[q - k], 0.0)",
    # nor is there a slope of log at 0
    "inputs zero : float[n] mask causal score s + where(q - k < 3 and q < 0, log(zero[q]), 0.0)",
    "mask causal score s + where(q - k < 3 and s < 9, log(Q @ Q), 0.0)",
    # integers
    "inputs t : int[n] mask causal score s + where(t[q] > t[k], log2(t[q] - t[k]), 0)",
    "inputs t : int[n] mask causal score t[q] * t[k]",
    "mask causal score k - q",
    "inputs t : int[n] mask causal score s decay t[q] * t[k]",
    "mask causal score s + where(s > -99, ((q - k) * 1000003) mod 8388607 mod 7, 0)",
    # decays that are negative
    "mask causal score s decay 1.0 - 0.1 * (q - k) norm sigmoid",
    "mask causal score s decay 1.0 - 0.1 * (q - k) norm none",
    "inputs x : float[n] mask causal score s decay x[q] * x[k] - 0.3",
    # sums below 0
    "inputs z : float[n, n] mask causal score s + z[q, k] norm linear",
    "inputs g : float[H] mask causal heads 0 { norm softmax(sink = g) } else { norm none }",
    # powers of 0
    "inputs zero : float[n] mask causal score s + (zero[q] * s) ** zero[k]",
    # beyond tables
    "inputs t : int[n] z : float[4] mask full score s + z[t[q] + t[k] - 2]",
    "inputs t : int[n] z : float[5] mask full score s + z[t[q] + t[k] - 2]",
    "inputs keep : bool[7] z : float[n] mask full score s + where(keep[q * k], z[k], 0.0)",
    # a sum that no leaf may hold where its condition is another's
    "inputs z : float[n] mask causal score where(k mod 3 < q mod 3, s, s + exp(z[q]) + 1.0)",
    # NaN in a condition is in the value
    "inputs z : float[n] mask causal score where(s * z[q] < 0, s, log(1 + s * z[q]))",
]  # fmt: skip


@pytest.mark.parametrize("clauses", MENDED)
def test_what_was_wrong_once(clauses: str) -> None:
    bound, random = attndsl.parse(f"attention a {{ {clauses} }}")["a"], torch.Generator().manual_seed(0)
    tables = {
        t.name: DRAWN[t.name](random, tuple(SMALL.of(str(axis)) for axis in t.dims)) for t in bound.inputs
    }
    agree(bound, SMALL, tables)


@pytest.mark.parametrize("nq", [4, 40])
def test_values_without_width(nq: int) -> None:
    agree(attndsl.parse("attention a { mask causal }")["a"], Sizes(nq, 40, 2, 1, dv=0), {})


def test_tables_of_many_axes_are_declined() -> None:
    axes = ", ".join(["2"] * 6)
    bound = attndsl.parse(
        f"attention a {{ inputs z : float[{axes}] score s + z[q, k, (q + 1), (q * k), 0, 1] }}"
    )["a"]
    with pytest.raises(AttnError, match="a pair chooses an entry of a table by more than 5 numbers"):
        attndsl.compile(bound, length=8, backend="cpu")


@pytest.mark.parametrize("nq", [3, 70])
def test_positions_that_are_not_adjacent(nq: int) -> None:
    bound = attndsl.parse(
        "attention a { inputs x : float[300] mask causal & last(90) score s - 0.1 * (q - k) + x[q] * x[k] }"
    )["a"]
    sizes = Sizes(nq, 80, 2, 2)
    x = torch.randn(300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = torch.arange(300)[torch.randperm(300, generator=torch.Generator().manual_seed(2))]
    agree(bound, sizes, {"x": x}, q_positions=at[:nq].sort().values, k_positions=at[:80].sort().values)


def test_masks_lengths_and_constants_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the text of a source holds no name of a program."""
    codes: dict[tuple[str, str], str] = {}
    genuine = build.library.__wrapped__

    @functools.cache
    def counted(score: str, name: str, double: bool) -> Any:
        codes[score, name] = score
        return genuine(score, name, double)

    monkeypatch.setattr(kernel, "_function", kernel._function.__wrapped__)
    monkeypatch.setattr("attndsl.plugins.cpu.passes.library", counted)
    monkeypatch.setattr("attndsl.plugins.cpu.library", counted)
    for mask, constant, n in (
        ("causal", 0.3, 40),
        ("radius(5)", 0.7, 90),
        ("{ q, k : k in [1, 7] }", 1.3, 41),
    ):
        text = (
            f"let unlikely = learn[H, 9](0.1)\nattention a {{ inputs improbable : float[n] mask {mask} "
            f"score s + {constant} * improbable[q] * improbable[k] + unlikely[clamp(q * k, 0, 8)] "
            f"+ where(q * k > {int(constant * 50)}, {constant}, s * {constant + 1}) }}"
        )
        bound, sizes = attndsl.parse(text)["a"], Sizes(n, n, 2, 1)
        found = results("cpu", bound, sizes, {"improbable": torch.randn(n, dtype=torch.float64)}, 0)
        assert not isinstance(found, str), found
    assert sorted(name for _, name in codes) == ["backward", "forward"]
    assert not any(name in code for code in codes.values() for name in ("unlikely", "improbable"))


def test_beyond_float_precision_of_positions() -> None:
    """A distance of far positions is exact in float32."""
    bound = attndsl.parse("attention a { mask causal score s + (k - q) }")["a"]
    q, k, v = torch.randn(3, 1, 1, 70, 8, generator=torch.Generator().manual_seed(0)).unbind()
    plans = [
        attndsl.compile(bound, length=70, head_dim=8, backend=backend) for backend in ("cpu", "reference")
    ]
    at = torch.arange(70) + 3_000_000
    mine, exact = (plan(q, k, v, q_positions=at, k_positions=at) for plan in plans)
    assert math.isclose(float((mine - exact).abs().max()), 0, abs_tol=1e-4)
