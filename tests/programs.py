"""Random programs: texts of the language that together use all of it, and inputs that fit them.

Every expression is written with parentheses around its operands, so what binds tighter is left to the tests
of the grammar. Look-ups stay in range and products small: a program written here is legal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

import attndsl

TILE = 4
"""The block length of the tables with a `tiles` axis."""
POSITIONS = ("q", "k")


@dataclass(frozen=True)
class Input:
    """A declared table: its axes as written, and the values that its entries take."""

    name: str
    dtype: str
    axes: tuple[str, ...]
    low: int = 0
    high: int = 4

    def __str__(self) -> str:
        return f"{self.name} : {self.dtype}[{', '.join(self.axes)}]"

    def draw(self, rng: np.random.Generator, sizes: dict[str, int]) -> NDArray[Any]:
        shape = [int(axis) if axis.isdigit() else sizes[axis] for axis in self.axes]
        if self.dtype == "float":
            return rng.normal(size=shape)
        entries = rng.integers(self.low, self.high, shape)
        return entries > self.low if self.dtype == "bool" else entries


INTS = (
    Input("doc", "int", ("n",), -1, 3),
    Input("seq", "int", ("B", "n"), 0, 3),
    Input("pad", "int", ("B",), 0, 6),
    Input("lim", "int", ("H",), 0, 9),
    Input("labels", "int", ("4",), -2, 3),
    Input("cell", "int", ("H", "n", "3"), -3, 9),
)
BOOLS = (
    Input("keep", "bool", ("n",), 0, 4),
    Input("rel", "bool", ("n", "n"), 0, 3),
    Input("flag", "bool", ("B", "H", "n"), 0, 3),
)
CHOSEN = Input("chosen", "int", ("B", "H", "tiles", "top"), -1, 6)
FLOATS = (
    Input("z", "float", ("B", "H", "n", "n")),
    Input("bias", "float", ("n",)),
    Input("dist", "float", ("H", "9")),
    Input("vecs", "float", ("9", "D")),
    Input("keyed", "float", ("n", "D")),
    Input("gain", "float", ("B",)),
)


@dataclass(frozen=True)
class Program:
    """`text` defines an attention `main` for `heads` heads.

    integral  no table, draw or product of variables: an integer relation
    floats    float inputs and `learn` parameters stand in its scores
    """

    text: str
    heads: int
    inputs: tuple[Input, ...]
    integral: bool

    def tables(
        self, length: int, seed: int = 0, *, batch: int = 2, head_dim: int = 4
    ) -> dict[str, NDArray[Any]]:
        sizes = {
            "n": length,
            "B": batch,
            "H": self.heads,
            "D": head_dim,
            "top": 2,
            "tiles": -(-length // TILE),
        }
        rng = np.random.default_rng(seed)
        return {table.name: table.draw(rng, sizes) for table in self.inputs}

    @property
    def batched(self) -> bool:
        return any("B" in table.axes for table in self.inputs)


@dataclass(frozen=True)
class Scope:
    """What may be named: integers, those among them that stay inside every table, tables, and patterns.

    `uniform`: n is the same for all positions, so a divisor may depend on it.
    """

    numbers: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    tables: bool = False
    patterns: tuple[str, ...] = ()
    uniform: bool = False


@dataclass
class Writer:
    """A program being written. `budget` bounds the products and restricted draws, which are slow to test."""

    rng: Random
    integral: bool = False
    budget: int = 1
    inputs: dict[str, Input] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    definitions: dict[str, Callable[[Scope, int], str]] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)
    lets: list[str] = field(default_factory=list)
    lists: dict[str, int] = field(default_factory=dict)
    """With the numbers of their entries."""

    def pick(self, *options: Callable[[], str] | None) -> str:
        return self.rng.choice([option for option in options if option is not None])()

    def small(self, low: int = 0, high: int = 5) -> str:
        value = self.rng.randint(low, high)
        return str(value) if value >= 0 else f"(-{-value})"

    def table(self, *inputs: Input) -> Input:
        chosen = self.rng.choice(inputs)
        self.inputs[chosen.name] = chosen
        return chosen

    # numbers

    def number(self, scope: Scope, depth: int) -> str:
        def sub() -> str:
            return self.number(scope, depth - 1)

        def name() -> str:
            return self.rng.choice(scope.numbers) if scope.numbers else self.small()

        if depth <= 0:
            free = not self.integral
            return self.pick(
                name, name, self.small, lambda: self.size(), (lambda: self.entry(scope)) if free else None
            )
        leaf = name if self.rng.random() < 0.5 else lambda: self.number(scope, 0)
        return self.pick(
            leaf,
            lambda: f"({sub()} + {sub()})",
            lambda: f"({sub()} - {sub()})",
            lambda: f"({sub()} - {sub()} + {sub()})",
            lambda: f"({self.small(-3, 3)} * {sub()})",
            lambda: f"({sub()} // {self.divisor(scope)})",
            lambda: f"({sub()} mod {self.divisor(scope)})",
            lambda: f"-{sub()}",
            lambda: f"|{sub()}|",
            lambda: f"{self.rng.choice(('min', 'max'))}({sub()}, {sub()})",
            lambda: f"where({self.truth(scope, depth - 1)}, {sub()}, {sub()})",
            lambda: f"clamp({sub()}, {self.small(-2, 2)}, {self.small(2, 9)})",
            lambda: self.listed(scope, depth - 1),
            None if self.integral else lambda: self.curved(scope, depth - 1),
        )

    def size(self) -> str:
        """A number that is the same for all positions."""
        options = [self.small(), "n", "(n // 2)", "(n - 1)", "h", "(h + 1)", "(H - 1)", *self.lets]
        return self.rng.choice(
            options if self.integral else [*options, "isqrt(n)", "log2(n + 1)", "nq", "floor(0.25 * n)"]
        )

    def divisor(self, scope: Scope) -> str:
        constant = str(self.rng.randint(1, 6))
        options = [constant, constant, "(h + 1)", "H", *(["(1 + n // 3)"] if scope.uniform else [])]
        return constant if self.integral else self.rng.choice(options)

    def curved(self, scope: Scope, depth: int) -> str:
        """Integers that no integer relation holds."""

        def sub() -> str:
            return self.number(scope, depth)

        return self.pick(
            lambda: f"({self.number(scope, 0)} * {self.number(scope, 0)})",
            lambda: f"(({sub()}) mod 7) ** {self.rng.choice(('2', '3'))}",
            lambda: f"({sub()} mod 5 - 2) ** ({sub()} mod {self.rng.choice('34')})",
            lambda: f"2 ** log2(1 + |{sub()}|)",
            lambda: f"isqrt(|{sub()}|)",
            lambda: f"log2(1 + |{sub()}|)",
            lambda: f"floor(0.5 * {sub()})",
            lambda: f"floor(sqrt(1 + |{sub()}|))",
        )

    def listed(self, scope: Scope, depth: int) -> str:
        """A look-up in a list: of few entries, named, or in a program that is no relation of many."""
        sub = self.number(scope, depth)
        if self.integral or self.rng.random() < 0.7:
            named = [f"{name}[{sub} mod {count}]" for name, count in self.lists.items()]
            literal = f"[{self.small(-9, 9)}, {self.small(0, 4)}..{self.small(5, 6)}, 1][{sub} mod 3]"
            return self.rng.choice([literal, *named])
        return f"[{', '.join(self.small(-9, 9) for _ in range(70))}][{sub} mod 70]"

    def entry(self, scope: Scope) -> str:
        """A look-up in an int table."""
        if not scope.tables:
            return self.small()
        table = self.table(*(INTS if scope.inside else (INTS[2], INTS[3], INTS[4])))
        if table.name in ("pad", "lim"):
            return table.name
        if table.name == "labels":
            return f"labels[{self.number(scope, 1)} mod 4]"
        at = self.rng.choice(scope.inside)
        return f"cell[{at}, {self.small(0, 2)}]" if table.name == "cell" else f"{table.name}[{at}]"

    # truths

    def truth(self, scope: Scope, depth: int) -> str:
        def sub() -> str:
            return self.truth(scope, depth - 1)

        def number() -> str:
            return self.number(scope, depth - 1)

        def compare() -> str:
            signs = [
                self.rng.choice(("==", "!=", "<", "<=", ">", ">="))
                for _ in range(self.rng.choice((1, 1, 1, 2)))
            ]
            return f"({number()} " + " ".join(f"{sign} {number()}" for sign in signs) + ")"

        tables = scope.tables and not self.integral
        return self.pick(
            compare,
            lambda: f"({number()} in {self.members(scope, depth - 1)})",
            *(
                (
                    lambda: f"({sub()} and {sub()})",
                    lambda: f"({sub()} or {sub()} or {sub()})",
                    lambda: f"(not {sub()})",
                    lambda: f"where({sub()}, {sub()}, {sub()})",
                )
                if depth > 0
                else ()
            ),
            (lambda: f"({number()} <= {number()} in {self.members(scope, depth - 1)})")
            if depth > 0
            else None,
            (lambda: self.bit(scope)) if tables else None,
            (lambda: f"{self.rng.choice(scope.patterns)}[{number()}, {number()}]")
            if scope.patterns and scope.numbers and depth > 0
            else None,
            (lambda: f"{{ q, k : {self.truth(Scope(POSITIONS, POSITIONS), 1)} }}[{number()}, {number()}]")
            if depth > 1
            else None,
        )

    def bit(self, scope: Scope) -> str:
        table = self.table(*BOOLS)
        if table.name == "rel":
            return f"rel[{self.number(scope, 1)}, {self.number(scope, 0)}]"
        guarded = f"(0 <= {self.number(scope, 0)} - 3 < 1 and {table.name}[{self.number(scope, 1)}])"
        return self.rng.choice([f"{table.name}[{self.number(scope, 1)}]", guarded])

    # sets

    def members(self, scope: Scope, depth: int) -> str:
        def sub() -> str:
            return self.members(scope, depth - 1)

        def number() -> str:
            return self.number(scope, min(depth - 1, 1))

        tables = scope.tables and not self.integral
        inner = replace(scope, numbers=(*scope.numbers, "p"))
        return self.pick(
            lambda: f"({self.small(-4, 1)}..{number()})",
            lambda: f"[{number()}, {self.small(5, 7)}..{self.small(6, 9)}, n - 1]",
            lambda: "[" + ", ".join(str(self.rng.randint(0, 40)) for _ in range(9)) + "]",
            (lambda: self.rng.choice([*self.lists])) if self.lists else None,
            lambda: f"every({self.rng.randint(1, 5)})",
            (lambda: self.rng.choice(self.sets)) if self.sets else None,
            (lambda: self.table(BOOLS[0]).name) if tables else None,
            (lambda: f"{self.table(BOOLS[1]).name}[{number()}]") if tables else None,
            (lambda: f"{self.table(INTS[5]).name}[{self.rng.choice(scope.inside)}]")
            if tables and scope.inside
            else None,
            *(
                (
                    lambda: f"({sub()} | {sub()})",
                    lambda: f"({sub()} & {sub()})",
                    lambda: f"({sub()} - {sub()})",
                    lambda: f"(~{sub()})",
                    lambda: f"where({self.truth(scope, depth - 1)}, {sub()}, {sub()})",
                    lambda: f"{{ p : {self.truth(inner, depth - 1)} }}",
                )
                if depth > 0
                else ()
            ),
        )

    # patterns

    def builder(self, scope: Scope, depth: int) -> str:
        names = ("q", "k") if self.rng.random() < 0.8 else ("i", "j")
        inside = replace(scope, numbers=(*names, *scope.numbers), inside=names)
        if scope.patterns:
            inside = replace(inside, numbers=(*names, *names, *scope.numbers))
        return f"{{ {names[0]}, {names[1]} : {self.truth(inside, depth)} }}"

    def leaf(self, scope: Scope) -> str:
        size = self.size
        free = not self.integral
        seeds = ("0", "7", "h", *(("n",) if scope.uniform else ()))
        return self.pick(
            lambda: "causal",
            lambda: f"last({self.rng.randint(0, 9)})",
            lambda: f"radius({self.rng.choice(('1', '3', size()))})",
            lambda: f"band({self.members(Scope(), 0)}, step = {self.rng.randint(1, 4)})",
            lambda: f"block({self.rng.choice('23579')})",
            lambda: f"rows({self.members(scope, 1)})",
            lambda: f"columns({self.members(scope, 1)})",
            lambda: f"global({self.members(scope, 0)})",
            lambda: f"sinks({size()})",
            lambda: f"prefix_lm({size()})",
            lambda: f"strided({self.rng.randint(1, 6)})",
            lambda: "fixed(l = 5, c = 2)",
            lambda: "full",
            lambda: "none",
            lambda: self.builder(scope, 1),
            lambda: self.builder(scope, 2),
            (lambda: f"documents({self.table(INTS[0], INTS[1]).name})") if free and scope.tables else None,
            (lambda: f"random({self.rng.randint(0, 4)}, seed = {self.rng.choice(seeds)})") if free else None,
        )

    def pattern(self, scope: Scope, depth: int) -> str:
        if depth <= 0:
            return self.leaf(scope)

        def sub() -> str:
            return self.pattern(scope, depth - 1)

        def pieces() -> str:
            return self.pattern(replace(scope, uniform=False), depth - 1)

        def canvas() -> str:
            height, width = self.rng.randint(1, 9), self.rng.randint(1, 9)
            if self.rng.random() < 0.3:
                return f"natten({height + 3}, {width + 3}, 1, 2)"
            names = ("y", "x", "v", "u")
            if self.rng.random() < 0.3:
                names = (*names, "a", "b")
            half = len(names) // 2
            sizes = [str(height), str(width), *(["2"] if half == 3 else [])]
            if self.rng.random() < 0.3 and scope.uniform:
                sizes[0] = "(1 + n // 4)"
            axes = f"({', '.join(names[:half])}), ({', '.join(names[half:])})"
            return f"grid({', '.join(sizes)}, {{ {axes} : {self.truth(Scope(names), 2)} }})"

        def heavy() -> str:
            self.budget -= 1
            spent, self.budget = self.budget, 0
            text = self.pick(
                lambda: f"({sub()} @ {sub()})",
                (lambda: f"random({self.rng.randint(1, 3)}, of = {self.pattern(scope, 1)})")
                if scope.uniform
                else None,
            )
            self.budget = spent
            return text

        free = not self.integral
        lookups = replace(
            scope,
            patterns=tuple(
                self.rng.sample(("causal", "full", "T(causal)", "block(3)", "(last(2) - radius(0))"), 2)
            ),
        )
        return self.pick(
            lambda: self.leaf(scope),
            lambda: f"({sub()} | {sub()})",
            lambda: f"({sub()} | {sub()} | {sub()})",
            lambda: f"({sub()} & {sub()})",
            lambda: f"({sub()} - {sub()})",
            lambda: f"(~{sub()})",
            lambda: f"({sub()} + {sub()})",
            lambda: f"where({self.truth(scope, 1)}, {sub()}, {sub()})",
            lambda: f"T({sub()})",
            lambda: f"sym({sub()})",
            lambda: f"shift({self.small(-3, 3)}, {sub()})",
            lambda: f"dilate({self.rng.randint(1, 4)}, {sub()})",
            lambda: f"blocks({self.rng.choice((str(TILE), '1', '3', '5'))}, {sub()})",
            lambda: f"within({self.rng.choice(('1', '4', '7'))}, {pieces()})",
            lambda: self.builder(lookups, 2),
            canvas,
            *([lambda: self.use(scope, depth - 1)] * 2 if self.definitions else []),
            heavy if self.budget else None,
            (lambda: f"within({self.table(INTS[0], INTS[1]).name}, {pieces()})")
            if free and scope.tables
            else None,
            (lambda: f"blocks({TILE}, {{ q, k : k in {self.table(CHOSEN).name}[q] }})")
            if free and scope.tables
            else None,
            (lambda: f"blocks({self.rng.choice(('(1 + n // 5)', '(h + 1)'))}, {sub()})")
            if scope.uniform
            else None,
        )

    # definitions

    def use(self, scope: Scope, depth: int) -> str:
        return self.rng.choice(list(self.definitions.values()))(scope, depth)

    def define(self) -> str:
        """One definition more; later expressions may use it."""
        number = len(self.definitions) + len(self.sets) + len(self.lets) + len(self.lists)
        kind = self.rng.choice(("pattern", "pattern", "combinator", "set", "let", "list"))
        if kind == "list":
            count = self.rng.randint(1, 6)
            self.lists[f"list{number}"] = count
            return f"let list{number} = [{', '.join(self.small(-3, 9) for _ in range(count))}]"
        if kind == "set":
            text = f"let set{number} = {self.members(Scope(), 1)}"
            self.sets.append(f"set{number}")
            return text
        if kind == "let":
            text = f"let num{number} = {self.rng.choice(('3', 'n // 3', '2 * H', 'max(n - 4, 1)'))}"
            self.lets.append(f"num{number}")
            return text
        name = f"p{number}"
        if kind == "combinator":
            scope = Scope(POSITIONS, POSITIONS, patterns=("R",))
            body = self.rng.choice(
                (
                    f"{{ q, k : {self.truth(scope, 2)} }}",
                    "R | shift(w, R)",
                    "blocks(w + 1, R) & ~R",
                    "within(w + 2, R) | { q, k : q - k in set }",
                    "(R & causal) + columns(set)",
                )
            )

            def combined(scope: Scope, depth: int) -> str:
                text = self.pattern(replace(scope, uniform=False), depth)
                return self.rng.choice(
                    (
                        f"{name}({text})",
                        f"{name}({text}, {self.rng.randint(0, 3)})",
                        f"{name}(set = {self.members(Scope(), 1)}, R = {text})",
                    )
                )

            self.definitions[name] = combined
            return (
                f"pattern {name}(R, w = {self.rng.randint(1, 3)}, set = {self.members(Scope(), 0)}) = {body}"
            )
        body = self.pattern(Scope(("w",)), 2)
        self.definitions[name] = lambda scope, depth: self.rng.choice(
            (name, f"{name}({self.rng.randint(1, 6)})", f"{name}(w = {self.size()})")
        )
        return f"## pattern {name}\npattern {name}(w = {self.rng.randint(1, 5)}) = {body}"

    # scores

    def learn(self, shape: str, init: str) -> str:
        """The name of a new parameter."""
        name = f"l{len(self.parameters) + 1}"
        self.parameters.append(f"let {name} = learn[{shape}]({init})")
        return name

    def real(self, depth: int) -> str:
        """A smooth number of moderate size over one pair."""

        def sub() -> str:
            return self.real(depth - 1)

        distance = "(k - q)"
        if depth <= 0:
            return self.pick(
                lambda: "s",
                lambda: "s",
                lambda: "(Q @ K / sqrt(D))",
                lambda: f"{self.rng.choice(('0.5', '1.5', '0.25', '2'))}",
                lambda: f"0.1 * {distance}",
                lambda: f"log(1 + |{distance}|)",
                lambda: f"exp(-|{distance}| / 8)",
                lambda: "slope(h)",
                lambda: f"{self.learn('H', '0.3')}",
                lambda: f"{self.learn('3', '0.1')}[|{distance}| mod 3]",
                lambda: f"(Q @ {self.learn('H, 5, D', '0.2')}[clamp({distance}, -2, 2) + 2])",
                lambda: f"{self.table(FLOATS[0]).name}[q, k]",
                lambda: f"{self.table(FLOATS[1]).name}[k]",
                lambda: f"{self.table(FLOATS[2]).name}[clamp({distance}, -4, 4) + 4]",
                lambda: f"[0.5, -1.0, 0.25][|{distance}| mod 3]",
                lambda: f"(K @ {self.table(FLOATS[3]).name}[clamp({distance}, -4, 4) + 4])",
                lambda: f"(Q @ {self.table(FLOATS[4]).name}[k] / D)",
                lambda: self.table(FLOATS[5]).name,
            )
        return self.pick(
            lambda: f"({sub()} + {sub()})",
            lambda: f"({sub()} - {sub()})",
            lambda: f"(0.5 * {sub()})",
            lambda: f"tanh({sub()})",
            lambda: f"sigmoid({sub()})",
            lambda: f"sin({sub()})",
            lambda: f"cos({sub()})",
            lambda: f"exp(tanh({sub()}))",
            lambda: f"log(1.5 + tanh({sub()}))",
            lambda: f"sqrt(1.5 + sin({sub()}))",
            lambda: f"(1.5 + sigmoid({sub()})) ** 0.5",
            lambda: f"({sub()} / (1 + |{distance}|))",
            lambda: f"where({self.truth(Scope(POSITIONS, POSITIONS), 1)}, {sub()}, {sub()})",
            lambda: f"where(causal[q, k], {sub()}, {sub()})",
            lambda: f"(tanh({sub()}) * tanh({sub()}))",
            lambda: f"(sum(max(0.5 * Q, {sub()} - K)) / D)",
            lambda: f"(concat(Q, sin(K), 1) @ where(concat(K, 1, Q) > {sub()}, 0.1, -concat(Q, K, 2)) / D)",
            *[
                lambda: (
                    f"tanh(({self.table(FLOATS[3]).name} @ Q) @ ({self.table(FLOATS[3]).name} @ cos(K)) / D)"
                )
            ]
            * 2,
        )

    def score(self) -> str:
        return self.pick(
            lambda: self.real(2),
            lambda: f"(s + {self.real(1)})",
            lambda: f"(s + {self.real(2)})",
            lambda: "alibi",
            lambda: "sandwich",
            lambda: f"softcap({self.rng.choice(('2.0', '5'))})",
            lambda: f"relative({self.learn('H, 7', '0.1')}, 3)",
            lambda: f"shaw({self.learn('7, D', '0.1')}, 3)",
            lambda: f"t5({self.learn('H, 32', '0.1')})",
            lambda: f"t5_causal({self.learn('H, 32', '0.1')})",
            lambda: f"da({self.learn('H', '0.2')}, {self.learn('H', '0.4')})",
            lambda: f"kerple_log({self.learn('H', '0.5')}, {self.learn('H', '0.7')})",
            lambda: f"kerple_power({self.learn('H', '0.1')}, {self.learn('H', '0.7')})",
        )

    def clauses(self, scope: Scope, depth: int, scores: bool) -> list[str]:
        found = [f"mask {self.pattern(scope, depth)}"]
        if scores:
            found += [f"score {self.score()}" for _ in range(self.rng.choice((0, 1, 1, 2)))]
            if self.rng.random() < 0.3:
                found.append(
                    f"decay {self.rng.choice(('0.9 ** |q - k|', 'ramp(q - k, 3, 4)', 'exp(-|q - k| / 8)'))}"
                )
        return found

    def norm(self) -> str:
        return self.pick(
            lambda: "softmax",
            lambda: f"softmax(sink = {self.rng.choice((self.learn('H', '0.5'), '1.0', 'h / H'))})",
            lambda: "sigmoid",
            lambda: "relu",
            lambda: "none",
        )


def program(rng: Random, *, integral: bool = False, scores: bool = False, depth: int = 3) -> Program:
    """A random program with an attention `main`: another where one looks for a position below 0."""
    while True:
        drawn = _drawn(rng, integral, scores, depth)
        try:
            attndsl.parse(drawn.text)
        except attndsl.AttnError as refused:
            if all("is never negative" in told.message for told in refused.diagnostics):
                continue
        return drawn


def _drawn(rng: Random, integral: bool, scores: bool, depth: int) -> Program:
    writer = Writer(rng, integral)
    lines = [writer.define() for _ in range(rng.choice((0, 1, 2, 3)))]
    scope = Scope(tables=not integral, uniform=not integral)
    clauses = writer.clauses(scope, depth, scores)
    heads = rng.choice((1, 2, 3))
    if rng.random() < 0.3:
        clauses.append(f"mask {writer.pattern(scope, 1)}")
    if scores and rng.random() < 0.6:
        clauses.append(f"norm {writer.norm()}")
    elif rng.random() < 0.25:
        heads = 4
        own = [" ".join(writer.clauses(scope, 1, scores)) for _ in range(3)]
        norms = [f" norm {writer.norm()}" if scores else "" for _ in range(3)]
        which = rng.choice((("0", "2..3"), ("[1, 3]", "0"), ("{ p : 0 <= p and p mod 2 == 1 }", "0..0")))
        groups = [
            f"{heads_} {{ {text}{norm} }}"
            for heads_, text, norm in zip((*which, "else"), own, norms, strict=True)
        ]
        clauses.append("heads " + " ".join(groups))
    if rng.random() < 0.2:
        clauses.append("offset n - nq")
    declared = " ".join(map(str, writer.inputs.values()))
    body = [f"inputs {declared}"] * bool(declared) + clauses
    lines += writer.parameters
    lines.append("attention main {\n    " + "\n    ".join(body) + "\n}")
    return Program("\n".join(lines) + "\n", heads, tuple(writer.inputs.values()), integral)
