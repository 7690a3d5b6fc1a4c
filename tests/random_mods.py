"""Random mods of FlexAttention, as texts of Python over positions and drawn tensors."""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch

B, H, Q, N = 2, 3, 13, 17
"""Batch rows, heads, queries and keys."""
_random = torch.Generator().manual_seed(1)


def _integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=_random, dtype=dtype)


def _reals(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=_random)


TENSORS = {
    "doc": _integers(0, 4, 20),
    "neg": _integers(-9, 9, 20, dtype=torch.int32),
    "byte": _integers(0, 200, 20, dtype=torch.uint8),
    "by_row": _integers(0, 4, B, 20),
    "by_head": _integers(0, 9, H, 20),
    "length": _integers(3, 17, B),
    "rows": _integers(0, 17, 20, 3),
    "x": _reals(20),
    "slope": _reals(H),
    "flag": _reals(20) < 0,
    "seen": _reals(20, 20) < 0,
    "bias": _reals(20, 20),
    "holes": _reals(20, 20).masked_fill(_reals(20, 20) < -0.5, -math.inf),
    "relative": _reals(H, 60),
    "zero": torch.zeros((), dtype=torch.int64),
}


class Mods:
    """A source of expressions."""

    def __init__(self, seed: int) -> None:
        self.r = Random(seed)

    def one(self, *texts: Callable[[], str]) -> str:
        return self.r.choice(texts)()

    def among(self, *choices: Any) -> str:
        return str(self.r.choice(choices))

    def integer(self, depth: int) -> str:
        among = self.among
        if not depth:
            number = self.r.randint(-3, 20)
            return among(
                "q", "k", "q", "k", "h", "b", number, "doc[k]", "doc[q]", "neg[q]", "neg[k]", "by_row[b, q]",
                "by_head[h, k]", "length[b]", "byte[k]",
            )  # fmt: skip

        def i() -> str:
            return self.integer(depth - 1)

        def tensor() -> str:
            return f"(zero + {i()})"

        def t() -> str:
            return self.truth(depth - 1)

        return self.one(
            lambda: f"({i()} + {i()})",
            lambda: f"({i()} - {i()})",
            lambda: f"({i()} * {among(-3, -1, 2, 4)})",
            lambda: f"({i()} // {among(1, 2, 3, 5, -2)})",
            lambda: f"({i()} % {among(1, 2, 3, 5, -3)})",
            lambda: f"torch.where({t()}, {i()}, {i()})",
            lambda: f"{tensor()}.clamp({among(-3, 0, 2)}, {among(3, 9)})",
            lambda: f"({i()} & {among(1, 2, 3, 6, 5, -4)})",
            lambda: f"({i()} | {among(1, 2, 8)})",
            lambda: f"({i()} ^ {among(1, 3)})",
            lambda: f"({i()} >> {among(0, 1, 2)})",
            lambda: f"({i()} << {among(0, 1, 2)})",
            lambda: f"torch.minimum({tensor()}, {tensor()})",
            lambda: f"abs({i()})",
            lambda: f"-({i()})",
            lambda: f"({i()}) ** 2",
            lambda: f"({t()}).int()",
            lambda: f"({t()} * {i()})",
            lambda: f"doc[{tensor()}.clamp(-20, 19)]",
            lambda: f"neg[({i()}) % 20]",
            lambda: f"({self.real(depth - 1)}).int()",
            lambda: f"torch.div({i()}, {among(2, 3, -3)}, rounding_mode='trunc')",
            lambda: f"torch.fmod({tensor()}, {among(2, 3, -3)})",
            lambda: f"torch.sign({tensor()})",
            lambda: f"({i()} == rows[q]).sum()",
            lambda: f"{tensor()}.to(torch.{among('int8', 'uint8', 'int32')})",
            lambda: f"torch.stack([{tensor()}, {tensor()}, {tensor()}]).max()",
        )

    def real(self, depth: int) -> str:
        if not depth:
            return self.among(
                "x[q]", "x[k]", "slope[h]", "q.float()", "k / 3", "(q - k) * 0.5", "q.float() * 2.0"
            )

        def x() -> str:
            return self.real(depth - 1)

        return self.one(
            lambda: f"({x()} + {x()})",
            lambda: f"({x()} * {self.among(0.5, 2.0, -1.5)})",
            lambda: f"torch.floor({x()})",
            lambda: f"({self.integer(depth - 1)} * 0.3)",
            lambda: f"torch.sin(zero + {x()})",
            lambda: f"torch.where({self.truth(depth - 1)}, {x()}, 1.0)",
            lambda: f"torch.log2(abs({x()}) + 1)",
            lambda: f"(zero + {self.integer(depth - 1)}).float()",
            lambda: f"({self.integer(depth - 1)}) / 4",
        )

    def truth(self, depth: int) -> str:
        if not depth:
            return self.among(
                "(q >= k)", "(k < 5)", "flag[k]", "flag[q]", "seen[q, k]", "(doc[q] == doc[k])",
                "(k == rows[q]).any()", "(h > 0)", "(k < length[b])", "torch.isin(zero + k, doc[:2])",
            )  # fmt: skip

        def i() -> str:
            return self.integer(depth - 1)

        def t() -> str:
            return self.truth(depth - 1)

        compared = self.among("<", "<=", ">", ">=", "==", "!=")
        return self.one(
            lambda: f"({i()} {compared} {i()})",
            lambda: f"({t()} & {t()})",
            lambda: f"({t()} | {t()})",
            lambda: f"(~({t()}))",
            lambda: f"({t()} ^ {t()})",
            lambda: f"torch.where({t()}, {t()}, {t()})",
            lambda: f"({t()} == {t()})",
            lambda: f"({self.real(depth - 1)} {compared} {self.real(depth - 1)})",
            lambda: f"({self.real(depth - 1)} > {self.among(0, 1, 0.5)})",
            lambda: f"(({i()}) == rows[q]).any()",
            lambda: f"(zero + {i()}).bool()",
            lambda: f"(({t()}).int() + ({t()}).int() >= 1)",
            lambda: f"torch.logical_and({t()}, zero + {i()})",
            lambda: f"({i()} < {self.among(2.5, 3.0, -0.5)})",
            lambda: f"seen[(zero + {i()}).clamp(0, 19), k]",
            lambda: f"({t()}).masked_fill({t()}, False)",
        )

    def score(self, depth: int) -> str:
        if not depth:
            return self.among(
                "s", "s", "s + bias[q, k]", "s + relative[h, q - k + 25]", "s * 0.5", "s + holes[q, k]"
            )

        def s() -> str:
            return self.score(depth - 1)

        return self.one(
            lambda: f"({s()} + {self.real(1)})",
            lambda: f"({s()} + {self.integer(1)} * 0.1)",
            lambda: f"torch.where({self.truth(1)}, {s()}, -inf)",
            lambda: f"torch.where({self.truth(1)}, {s()}, {s()})",
            lambda: f"({s()} * 2.0)",
            lambda: f"5 * torch.tanh((s + {self.real(1)}) / 5)",
            lambda: f"({s()} - torch.log1p(abs(zero + {self.integer(1)}).float()))",
            lambda: f"({s()} + torch.exp2(-(h + 1.0)) * (k - q))",
            lambda: f"({s()}).masked_fill({self.truth(1)}, -inf)",
            lambda: f"torch.sigmoid(s) * {self.real(1)}",
            lambda: f"({s()} / (h + 1))",
            lambda: f"torch.maximum(s, zero + {self.real(1)})",
            lambda: "s.clamp(-1, 0.5)",
            lambda: f"({s()} + torch.cos((zero + {self.integer(1)}) / 3))",
        )


def function_of(arguments: str, text: str) -> Callable[..., Any]:
    """A function that has a source to be shown."""
    source, name = f"def drawn({arguments}):\n    return {text}\n", f"<{text}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    space: dict[str, Any] = {"torch": torch, "inf": math.inf, **TENSORS}
    exec(compile(source, name, "exec"), space)
    found: Callable[..., Any] = space["drawn"]
    return found


def mask_mod(seed: int) -> Callable[..., Any]:
    mods = Mods(seed)
    return function_of("b, h, q, k", f"{mods.truth(1 + seed % 4)} & (q >= 0)")


def score_mod(seed: int) -> Callable[..., Any]:
    mods = Mods(seed)
    return function_of("s, b, h, q, k", f"{mods.score(1 + seed % 3)} + 0.0 * h")
