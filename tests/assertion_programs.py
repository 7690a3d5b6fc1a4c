"""Random assertions over random programs (programs.py), many of them nearly true: laws of the algebra, tight
bounds, a pattern beside itself with one number or operator changed. Some do not type: those are left out by
whoever parses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from programs import Input, Scope, Writer

ASSERTIONS = 8
"""Tried for each program."""


@dataclass(frozen=True)
class Claims:
    """`text` defines two patterns or attentions `a` and `b` and a pattern `c`, which `assertions` are about.

    affine  no table, draw or product of variables: integer relations
    heads   numbers of heads for which the text has a meaning
    """

    text: str
    assertions: tuple[str, ...]
    inputs: tuple[Input, ...]
    affine: bool
    heads: tuple[int, ...]


SWAPS = (
    ("<=", "<"), ("<", "<="), (">=", ">"), ("==", "<="), ("==", "!="), ("<=", "=="), ("|", "&"), ("&", "|"),
    ("-", "&"), ("and", "or"), ("or", "and"), ("+", "-"), ("@", "&"), ("@", "|"),
)  # fmt: skip


def mutated(rng: Random, text: str) -> str:
    """The text with a number one more or less, or another operator in one place."""
    changes = [
        (m.start(), m.end(), str(int(m[0]) + step))
        for m in re.finditer(r"(?<![\w.])\d+(?![\w%]|\.\d)|(?<=\.\.)\d+", text)
        for step in (-1, 1)
        if int(m[0]) + step >= 0
    ]
    for old, new in SWAPS:
        changes += [(m.start(1), m.end(1), new) for m in re.finditer(f" ({re.escape(old)}) ", text)]
    changes += [(m.start(), m.end(), "T(causal)") for m in re.finditer("causal", text)]
    if not changes:
        return f"~{text}"
    start, end, new = rng.choice(changes)
    changed = text[:start] + new + text[end:]
    # divisors stay positive
    return text if re.search(r"\(h - 1|\(h \+ 0\)|\(0 \+ n|\(1 - n", changed) else changed


def wide(rng: Random) -> str:
    """A pattern that shows itself only at lengths beyond a handful."""
    w, m = rng.randint(4, 48), rng.randint(2, 12)
    return rng.choice(
        (
            f"last({w})",
            f"radius({w})",
            f"sinks({w})",
            f"block({w})",
            f"columns([{m}, {w}])",
            f"strided({m})",
            f"fixed(l = {m + 3}, c = {m})",
            f"{{ q, k : q - k < {w} }}",
            f"{{ q, k : n <= {w} or k <= q }}",
            f"{{ q, k : q + k != {w} }}",
            f"dilate({m}, last({w // 4}))",
            f"{{ q, k : q - k < [{w}, {m}, {w - m}][q mod 3] }}",
            f"{{ q, k : q < 4 and [2, 0, 3, 1][min(q, 3)] == k or k < {m} }}",
            f"within({w}, causal)",
            f"(causal & (last({m}) | columns(every({m}))))",
            f"band(-{w}..{m}, step = {rng.randint(1, 4)})",
        )
    )


@dataclass
class Assertions:
    """A source of assertions about `a`, `b` and `c`.

    spaces   they may stand in blocks and pieces too
    by_head  assertions may read h
    """

    rng: Random
    spaces: bool
    by_head: bool = False

    def side(self) -> str:
        x, y = self.rng.choice("abc"), self.rng.choice("abc")
        return self.rng.choice(
            (
                x,
                x,
                f"({x} | {y})",
                f"({x} & {y})",
                f"({x} - {y})",
                f"~{x}",
                f"T({x})",
                f"sym({x})",
                f"({x} & causal)",
            )
        )

    def claim(self) -> str:
        kind = self.rng.choice(
            (self.law, self.law, self.law, self.beside, self.beside, self.rows, self.far, self.near)
        )
        text = kind()
        if self.rng.random() < 0.5:
            text = mutated(self.rng, text)
        if self.rng.random() < 0.05:
            text = f"{text} and {self.law()}"
        return text

    def beside(self) -> str:
        return self.rng.choice(
            (
                "a <= b",
                "b <= a",
                "a == b",
                f"a & {wide(self.rng)} <= b",
                f"a - b <= {wide(self.rng)}",
                "a & c <= b & c",
                "a | c == b | c",
                "a - b == none",
                "(a - b) | (b - a) <= ~c",
                f"{self.side()} <= {self.side()}",
                f"{self.side()} == {self.side()}",
            )
        )

    def law(self) -> str:
        x, y, z = (self.side() for _ in range(3))
        o, m = self.rng.choice((-3, -2, -1, 1, 2, 3)), self.rng.randint(1, 4)
        laws = [
            f"{x} & {y} <= {x}",
            f"{x} <= {x} | {y}",
            f"{x} - {y} == {x} & ~{y}",
            f"~({x} | {y}) == ~{x} & ~{y}",
            f"{x} & ({y} | {z}) == {x} & {y} | {x} & {z}",
            f"({x} | {y}) - {z} == ({x} - {z}) | ({y} - {z})",
            f"{x} == T(T({x}))",
            f"T({x} & {y}) == T({x}) & T({y})",
            f"sym({x}) == T(sym({x}))",
            f"{x} <= sym({x})",
            f"shift({o}, {x} | {y}) == shift({o}, {x}) | shift({o}, {y})",
            f"shift({o}, shift({-o}, {x})) <= {x}",
            f"shift({o}, {x}) <= rows({abs(o)}..n) | ~rows(0..n - 1 - {abs(o)})",
            f"dilate({m}, {x} & {y}) == dilate({m}, {x}) & dilate({m}, {y})",
            f"dilate({m}, {x}) <= {{ q, k : (q - k) mod {m} == 0 }}",
            f"{x} + {y} == {x} | {y}",
            f"{x} @ radius(0) == {x}",
            f"{x} <= {x} @ full",
            f"{x} & radius(0) <= {x} @ {x}",
            f"({x} & causal) @ last({m}) <= causal",
            f"{x} & {{ q, k : q - k < {m} }} <= {wide(self.rng)} | last({m})",
        ]
        if self.spaces:
            laws += [
                f"blocks({m}, {x} | {y}) == blocks({m}, {x}) | blocks({m}, {y})",
                f"blocks({m}, T({x})) == T(blocks({m}, {x}))",
                f"within({m + 2}, {x}) <= block({m + 2})",
                f"within({m + 2}, {x} & {y}) == within({m + 2}, {x}) & within({m + 2}, {y})",
                f"within({m}, {x}) <= blocks({m}, radius(0))",
                f"{x} @ ({y} | {z}) == {x} @ {y} | {x} @ {z}",
                f"T({x} @ {y}) == T({y}) @ T({x})",
                f"({x} & {y}) @ {z} <= {x} @ {z} & {y} @ {z}",
            ]
        if self.by_head:
            laws += [
                f"shift(h, {x} & {y}) == shift(h, {x}) & shift(h, {y})",
                f"shift(h, {x}) & sinks(h) == none",
                f"{x} & {{ q, k : {y}[q, k + h] }} <= {{ q, k : k + h < n }}",
                f"{{ q, k : {x}[q, k - h] }} == {{ q, k : {x}[q, k - h] and k >= h }}",
            ]
        return self.rng.choice(laws)

    def rows(self) -> str:
        x, m = self.side(), self.rng.randint(1, 5)
        return "every_row({})".format(
            self.rng.choice(
                (
                    x,
                    f"{x} | radius(0)",
                    f"{x} | ~{x}",
                    f"sinks({m}) - {x} | last({m})",
                    f"{x} | columns({m}..{m + 20})",
                    f"{x} | block({m})",
                    f"{x} & causal | rows([0, {m}]) | shift(1, radius(0))",
                    f"shift({m}, full) | {x} | sinks(1)",
                    "a",
                    "b",
                    "c",
                )
            )
        )

    def far(self) -> str:
        x = self.rng.choice("abcabc")
        i, j, layers = self.rng.randint(1, 6), self.rng.randint(1, 6), self.rng.randint(0, 4)
        both = f"band([-{i}, 0, {j}])"
        return self.rng.choice(
            (
                f"reach({x}, layers = 1) == {x} | radius(0)",
                f"reach({x}, layers = {layers % 3}) <= reach({x}, layers = {layers % 3 + 1})",
                f"reach(c, layers = {layers}) <= reach(c, layers = {layers + 1})",
                f"reach(c & causal, layers = {layers + 1}) <= causal",
                f"reach({x} & causal, layers = 2) <= causal",
                "reach(c, layers = 2) == (c | radius(0)) @ (c | radius(0))",
                f"reach(last({i}), layers = {layers}) == last({layers * (i - 1) + 1})",
                f"reach(radius({i}), layers = {layers}) == radius({layers * i})",
                f"reach(band(-{i}..{j}), layers = {layers}) == band(-{layers * i}..{layers * j})",
                f"reach(band([-{i}, {j}]), layers = 2) == {both} @ {both}",
                f"reach(band([-{i}, {j}]), layers = 3) == {both} @ {both} @ {both}",
                f"reach(band(-{i}..0, step = {j}), layers = {layers}) <= band(-{layers * i}..0, step = {j})",
                f"reach(causal & (last({i}) | c), layers = {layers % 3}) <= causal",
                f"reach(strided({i}), layers = 2) == causal",
                f"reach(fixed(l = {i + 2}, c = {min(i, j)}), layers = 2) == causal",
                f"reach(radius({i}) | global([{j}]), layers = 2) == full",
            )
        )

    def near(self) -> str:
        """Windows, strides and their products, tight."""
        i, j, x = self.rng.randint(1, 9), self.rng.randint(1, 9), self.rng.choice("abc")
        return self.rng.choice(
            (
                f"last({i}) @ last({j}) == last({i + j - 1})",
                f"radius({i}) @ radius({j}) == radius({i + j})",
                f"band(-{i}..{j}) @ band(-{j}..{i}) == radius({i + j})",
                f"strided({i}) @ strided({i}) == causal",
                f"{x} & last({i}) <= radius({i - 1})",
                f"{x} & block({i}) <= band(-{i - 1}..{i - 1})",
                f"{x} & block({i}) & causal <= last({i})",
                f"block({i}) @ ({x} & block({i})) <= block({i})",
                f"blocks({i}, last({j})) & {x} <= {{ q, k : q - k < {i * j} }}",
                f"last({i}) - {x} <= blocks({j}, radius({(i + j - 2) // j}))",
                f"dilate({i}, last({j})) == band(-{i * (j - 1)}..0, step = {i})",
                f"block({i * j}) & {x} <= blocks({i}, block({j}))",
                f"{x} & columns({i}..{i + j}) <= ~sinks({i})",
                f"{x} & {{ q, k : [{i}, {j}][k mod 2] <= q - k }} <= ~last({min(i, j)})",
                f"{x} & {{ q, k : {i} * q < {j} * k }} <= {{ q, k : q < {j} * k // {i} + 1 }}",
            )
        )

    def quantity(self, measure: Callable[[str], tuple[int, int]], heads: int) -> str:
        """A comparison beside the true value: `measure` gives it over its denominator."""
        kind, n = self.rng.choice(("density", "nnz", "nnz", "diameter")), self.rng.randint(0, 48)
        text = f"{kind}({self.rng.choice('abc')}, n = {n}, heads = {heads})"
        value, whole = measure(text)
        value = max(value + self.rng.choice((-1, 0, 0, 1)), 0)
        op = self.rng.choice(("==", "<=", "<", ">=", ">", "!="))
        return f"{text} {op} {value}" + (f" / {whole}" if whole > 1 else "")


def claims(seed: int) -> Claims:
    rng = Random(seed)
    affine = rng.random() < 0.65
    writer = Writer(rng, affine, budget=rng.random() < 0.25)
    lines = [writer.define() for _ in range(rng.choice((0, 0, 1, 2)))]
    scope = Scope(tables=not affine, uniform=not affine)
    depth = rng.choice((0, 1, 1, 2))
    a = wide(rng) if rng.random() < 0.2 else writer.pattern(scope, depth)
    b = mutated(rng, a) if rng.random() < 0.6 else writer.pattern(scope, rng.choice((0, 1)))
    groups = rng.random() < 0.15
    plain = affine and not groups
    if plain:
        lines += [f"pattern a = {a}", f"pattern b = {b}"]
    else:
        declared = " ".join(map(str, writer.inputs.values()))
        inputs = f"inputs {declared}" if declared else ""
        for name, mask in (("a", a), ("b", b)):
            split = f"heads 0 {{ mask {writer.leaf(Scope())} }} else {{ mask {wide(rng)} }}" if groups else ""
            lines.append(f"attention {name} {{ {inputs} mask {mask} {split} }}")
    lines.append(f"pattern c = {wide(rng)}")
    text = "\n".join(lines) + "\n"
    heads = (2, 3) if groups else (1, 2, 3) if re.search(r"\b[hH]\b", text) else (1,)
    source = Assertions(rng, plain, len(heads) > 1)
    assertions = tuple(dict.fromkeys(source.claim() for _ in range(ASSERTIONS)))
    return Claims(text, assertions, tuple(writer.inputs.values()), affine, heads)
