"""Random masks over q, k, n, h, H and three tables, and their truth at small n by pointwise evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as x
from attndsl.expr import Expr, IntSet, Table, const, var
from attndsl.meaning.pointwise import evaluate

N = var("n")
DOC = Table("doc", "int", ("n",))
FLAG = Table("flag", "bool", ("n",))
CHOSEN = Table("chosen", "int", ("n", 2))
LIST, LONG = Table.listed([3, -1, 0, 2, 2]), Table.listed([3 * i * i % 7 for i in range(200)])
LENGTHS = range(8)


class Masks:
    """A source of masks; `unknown` is the chance of a leaf that is no integer relation."""

    def __init__(self, seed: int, unknown: float) -> None:
        self.rng, self.unknown, self.bound = Random(seed), unknown, 0

    def mask(self, depth: int = 3, variables: tuple[str, ...] = ("q", "k")) -> Expr:
        kind = self.rng.choice(["and", "or", "not", "leaf", "leaf"]) if depth else "leaf"
        if kind == "leaf":
            return self.leaf(depth, variables)
        a, b = self.mask(depth - 1, variables), self.mask(depth - 1, variables)
        return {"and": x.all_of(a, b), "or": x.any_of(a, b), "not": x.negate(a)}[kind]

    def leaf(self, depth: int, variables: tuple[str, ...]) -> Expr:
        def number() -> Expr:
            return self.number(min(depth, 2), variables)

        def position() -> Expr:
            return self.position(variables)

        if self.rng.random() < self.unknown:
            row, col = "row", "col"
            of = self.rng.choice([x.TRUE, x.le(var(col), var(row)), x.eq(x.mod(var(col), const(2)), x.ZERO)])
            return self.rng.choice(
                [
                    lambda: x.eq(x.lookup(DOC, position()), x.lookup(DOC, position())),
                    lambda: x.le(x.lookup(DOC, position()), number()),
                    lambda: x.lookup(FLAG, number()),
                    lambda: x.le(x.lookup(LONG, x.mod(number(), const(200))), number()),
                    lambda: x.intable(number(), CHOSEN, position()),
                    lambda: x.random_keys(position(), position(), N, x.ZERO, of, 2, row, col),
                    lambda: x.lt(x.mul(number(), number()), number()),
                    lambda: x.le(x.rank_of(DOC, position()), x.rank_of(DOC, position())),
                    lambda: x.lt(x.mul(const(0.5), position()), number()),
                ]
            )()
        if depth and self.bound < 3 and self.rng.random() < 0.3:
            self.bound += 1
            m = f"m{self.bound}"
            low, high = self.rng.choice([(x.ZERO, N), (number(), number())])
            return x.exists(m, low, high, self.mask(depth - 1, (*variables, m)))
        if self.rng.random() < 0.1:
            index = number()
            inside = x.all_of(x.le(x.ZERO, index), x.lt(index, const(5)))
            return x.all_of(inside, self.rng.choice([x.le, x.eq])(x.lookup(LIST, index), number()))
        if self.rng.random() < 0.1:
            return x.make(
                "inset", (number(),), IntSet.of((3 * i, 3 * i + i % 2) for i in range(-2, 5)), "bool"
            )
        return self.rng.choice([x.le, x.lt, x.eq])(number(), number())

    def position(self, variables: tuple[str, ...]) -> Expr:
        """A number in 0..n-1 wherever q and k are."""
        inside = var(self.rng.choice(variables[:2]))
        shifted = x.add(var(self.rng.choice(variables)), const(self.rng.randint(-1, 1)))
        clipped = x.maximum(x.ZERO, x.minimum(shifted, x.sub(N, x.ONE)))
        return self.rng.choice([inside, inside, clipped])

    def number(self, depth: int, variables: tuple[str, ...]) -> Expr:
        names = [*variables, *variables, "n", "h", "H"]
        if not depth or self.rng.random() < 0.4:
            return self.rng.choice([const(self.rng.randint(-3, 4)), var(self.rng.choice(names))])
        a, b = self.number(depth - 1, variables), self.number(depth - 1, variables)
        small = const(self.rng.randint(2, 4))
        choices = [x.add(a, b), x.sub(a, b), x.mul(small, a), x.floordiv(a, small), x.mod(a, small)]
        choices += [x.minimum(a, b), x.maximum(a, b), x.absolute(a)]
        choices.append(x.where(self.mask(0, variables), a, b))
        choices.append(x.lookup(LIST, x.mod(a, const(self.rng.randint(2, 5)))))
        return self.rng.choice(choices)


def tables(n: int, trial: int) -> dict[str, NDArray[Any]]:
    """At n = 0 bound variables may still read an entry."""
    rng, size = np.random.default_rng([n, trial]), max(n, 1)
    return {
        "doc": rng.integers(0, 3, size),
        "flag": rng.random(size) < 0.5,
        "chosen": rng.integers(0, size, (size, 2)),
    }


def truths(
    mask: Expr, lengths: Iterator[int] | range = LENGTHS
) -> Iterator[tuple[dict[str, int], NDArray[Any]]]:
    """n, H and h, and the mask there as a matrix: every head where h or H matters, two trials of tables."""
    for n in lengths:
        for heads in range(1, 4) if mask.free & {"h", "H"} else [1]:
            for h in range(heads) if "h" in mask.free else [0]:
                for trial in range(2 if mask.tables else 1):
                    point = {"n": n, "H": heads, "h": h}
                    closed = x.substitute(mask, {name: const(value) for name, value in point.items()})
                    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
                    yield point, evaluate(closed, q, k, tables(n, trial))
