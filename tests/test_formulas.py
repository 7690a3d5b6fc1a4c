"""Programs composed at random, each together with its formula by hand, against the backends."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from thin import thin
from torch import Tensor

import attndsl
from attndsl.conformance import CASES, Case, check, declined
from attndsl.conformance.formula import Formula, Pairs, dot
from attndsl.conformance.mechanisms import Mechanism, integers, likely
from attndsl.execution import registry
from attndsl.execution.torch_eval import Env
from attndsl.expr import Expr

COUNT = 200


@dataclass(frozen=True)
class Pair:
    """A text of the language and what it means; `uses` names the operators and tables in it."""

    text: str
    of: Callable[[Pairs], Any]
    uses: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Operator:
    """A text with a place for each argument, and the function of their values. `kinds` are the arguments'."""

    text: str
    of: Callable[..., Any]
    kinds: str

    @property
    def name(self) -> str:
        return f"{self.text} of {self.kinds}"

    def __call__(self, *args: Pair) -> Pair:
        uses = frozenset({self.name}).union(*(arg.uses for arg in args))
        return Pair(
            self.text.format(*(arg.text for arg in args)), lambda p: self.of(*(a.of(p) for a in args)), uses
        )


def half(x: Tensor) -> Tensor:
    """log2 of an integer, rounded down."""
    return sum((x >= 2**i).long() for i in range(1, 40))  # type: ignore[return-value]


def root(x: Tensor) -> Tensor:
    return sum((x >= i * i).long() for i in range(1, 200))  # type: ignore[return-value]


def raised(x: Tensor, count: Tensor) -> Tensor:
    """x to a power of less than 5."""
    found = torch.ones_like(x + count)
    for i in range(1, 5):
        found = torch.where(count >= i, found * x, found)
    return found


LISTED = torch.tensor([0, 2, 5, 6, 7, 9, 11, 14])
OPERATORS: dict[str, tuple[Operator, ...]] = {
    # r: a real, i: an integer, t: a truth, v: a vector, p: a pattern, as its multiplicities
    "r": (
        Operator("({} + {})", lambda a, b: a + b, "rr"),
        Operator("({} - {})", lambda a, b: a - b, "rr"),
        Operator("({} * {})", lambda a, b: a * b, "rr"),
        Operator("(-{})", lambda a: -a, "r"),
        Operator("({} / (1.5 + |({})|))", lambda a, b: a / (1.5 + abs(b)), "rr"),
        Operator("({} // 0.75)", lambda a: torch.floor(a / 0.75), "r"),
        Operator("({} mod 1.25)", lambda a: a - 1.25 * torch.floor(a / 1.25).detach(), "r"),
        Operator("((1.0 + |({})|) ** tanh({}))", lambda a, b: (1 + abs(a)) ** b.tanh(), "rr"),
        Operator("({} ** 2)", lambda a: a * a, "r"),
        Operator("min({}, {})", torch.minimum, "rr"),
        Operator("max({}, {})", torch.maximum, "rr"),
        Operator("|({})|", abs, "r"),
        Operator("where({}, {}, {})", torch.where, "trr"),
        Operator("exp(-|({})|)", lambda a: (-abs(a)).exp(), "r"),
        Operator("log(1 + |({})|)", lambda a: (1 + abs(a)).log(), "r"),
        Operator("log2(1.5 + |({})|)", lambda a: (1.5 + abs(a)).log2(), "r"),
        Operator("sqrt(({}) ** 2 + 1)", lambda a: (a * a + 1).sqrt(), "r"),
        Operator("tanh({})", torch.tanh, "r"),
        Operator("sigmoid({})", torch.sigmoid, "r"),
        Operator("sin({})", torch.sin, "r"),
        Operator("cos({})", torch.cos, "r"),
        Operator("(0.25 * ({} mod 7))", lambda i: 0.25 * (i % 7), "i"),
        Operator("[0.5, -1.25, 3][{} mod 3]", lambda i: torch.tensor([0.5, -1.25, 3]).double()[i % 3], "i"),
        Operator("(({} mod 5) / 4)", lambda i: i % 5 / 4, "i"),
        Operator("(sum({}) / 4)", lambda v: v.sum(-1) / 4, "v"),
        Operator("({} @ {} / 4)", lambda v, w: dot(v, w) / 4, "vv"),
        Operator(
            "(concat({}, 2 * {}) @ concat({}, {}) / 8)",
            lambda a, b, c, d: (dot(a, c) + 2 * dot(b, d)) / 8,
            "vvvv",
        ),
    ),
    "v": (
        Operator("({} + {})", lambda v, w: v + w, "vv"),
        Operator("({} - {})", lambda r, v: r[..., None] - v, "rv"),
        Operator("({} * {})", lambda v, w: v * w, "vv"),
        Operator("({} * {})", lambda r, v: r[..., None] * v, "rv"),
        Operator("(-{})", lambda v: -v, "v"),
        Operator("({} / (1.5 + |({})|))", lambda v, w: v / (1.5 + abs(w)), "vv"),
        Operator("min({}, {})", torch.minimum, "vv"),
        Operator("max({}, 0)", torch.relu, "v"),
        Operator("where({}, {}, {})", lambda t, v, w: torch.where(t[..., None], v, w), "tvv"),
        Operator("where(not {} > 0, {}, exp({}))", lambda v, w, x: torch.where(v > 0, x.exp(), w), "vvv"),
        Operator("sqrt(({}) ** 2 + 1)", lambda v: (v * v + 1).sqrt(), "v"),
        Operator("sin({})", torch.sin, "v"),
        Operator("tanh({})", torch.tanh, "v"),
    ),
    "i": (
        Operator("({} + {})", lambda a, b: a + b, "ii"),
        Operator("({} - {})", lambda a, b: a - b, "ii"),
        Operator("({} * {})", lambda a, b: a * b, "ii"),
        Operator("(-{})", lambda a: -a, "i"),
        Operator("({} // 3)", lambda a: torch.floor(a.double() / 3).long(), "i"),
        Operator("({} mod 4)", lambda a: a - 4 * torch.floor(a.double() / 4).long(), "i"),
        Operator("(({} mod 6) ** 3)", lambda a: (a % 6) * (a % 6) * (a % 6), "i"),
        Operator("(({} mod 4) ** ({} mod 5))", lambda a, b: raised(a % 4, b % 5), "ii"),
        Operator("[0, 2, -5, 6][{} mod 4]", lambda a: torch.tensor([0, 2, -5, 6])[a % 4], "i"),
        Operator("min({}, {})", torch.minimum, "ii"),
        Operator("max({}, {})", torch.maximum, "ii"),
        Operator("|({})|", abs, "i"),
        Operator("where({}, {}, {})", torch.where, "tii"),
        Operator("isqrt(|({})|)", lambda a: root(abs(a)), "i"),
        Operator("log2(1 + |({})|)", lambda a: half(1 + abs(a)), "i"),
        Operator("floor(3 * tanh({}))", lambda a: (3 * a.tanh()).floor().long(), "r"),
    ),
    "t": (
        Operator("({} < {})", lambda a, b: a < b, "ii"),
        Operator("({} <= {})", lambda a, b: a <= b, "ii"),
        Operator("({} > {})", lambda a, b: a > b, "ii"),
        Operator("({} >= {})", lambda a, b: a >= b, "ii"),
        Operator("({} == {})", lambda a, b: a == b, "ii"),
        Operator("({} != {})", lambda a, b: a != b, "ii"),
        Operator("(0 <= {} < 5)", lambda a: (a >= 0) & (a < 5), "i"),
        Operator("({} in [0, 2, 5..7, 9, 11, 14])", lambda a: torch.isin(a, LISTED), "i"),
        Operator("({} in 1..4)", lambda a: (a >= 1) & (a <= 4), "i"),
        Operator("({} < {})", lambda a, b: a < b, "rr"),
        Operator("({} and {})", lambda a, b: a & b, "tt"),
        Operator("({} or {})", lambda a, b: a | b, "tt"),
        Operator("(not {})", lambda a: ~a, "t"),
    ),
    "p": (
        Operator("({} | {})", torch.maximum, "pp"),
        Operator("({} & {})", torch.minimum, "pp"),
        Operator("({} - {})", lambda a, b: torch.where(b > 0, 0, a), "pp"),
        Operator("(~{})", lambda a: (a == 0).long(), "p"),
        Operator("({} + {})", lambda a, b: a + b, "pp"),
        Operator("{{ q, k : {} }}", lambda a: a.long(), "t"),
    ),
}


def leaf(text: str, of: Callable[[Pairs], Any]) -> Pair:
    return Pair(text, of, frozenset({text}))


def equals(p: Pairs) -> Tensor:
    return p.tables["int__n"][p.q] == p.tables["int__n"][p.k]


CONTENT = (
    leaf("s", lambda p: p.s),
    leaf("(Q @ K / 8)", lambda p: dot(p.Q, p.K) / 8),
    leaf("(Q @ Q / 8)", lambda p: dot(p.Q, p.Q) / 8),
    leaf("(K @ K / 8)", lambda p: dot(p.K, p.K) / 8),
)
"""Reals that depend on what queries and keys are."""
NUMBERS = (
    leaf("q", lambda p: p.q),
    leaf("k", lambda p: p.k),
    leaf("(k - q)", lambda p: p.k - p.q),
    leaf("n", lambda p: p.n),
    leaf("nq", lambda p: torch.tensor(p.nq)),
    leaf("h", lambda p: p.h),
    leaf("H", lambda p: torch.tensor(p.H)),
    leaf("3", lambda p: torch.tensor(3)),
)
PATTERNS = (
    leaf("causal", lambda p: (p.k <= p.q).long()),
    leaf("last(3)", lambda p: ((p.k <= p.q) & (p.q - p.k < 3)).long()),
    leaf("radius(2)", lambda p: (abs(p.q - p.k) <= 2).long()),
    leaf("full", lambda p: torch.tensor(1)),
    leaf("block(4)", lambda p: (p.q // 4 == p.k // 4).long()),
    leaf("blocks(3, causal)", lambda p: (p.k // 3 <= p.q // 3).long()),
    leaf("within(5, radius(1))", lambda p: ((p.q // 5 == p.k // 5) & (abs(p.q - p.k) <= 1)).long()),
    leaf("(last(2) @ last(3))", lambda p: ((p.k <= p.q) & (p.q - p.k < 4)).long()),
    leaf("random(2)", lambda p: p.drawn("mask random(2)", p.q, p.k, p.n).long()),
    Pair("documents(int__n)", lambda p: equals(p).long(), frozenset({"int__n"})),
    Pair("within(int__n, causal)", lambda p: (equals(p) & (p.k <= p.q)).long(), frozenset({"int__n"})),
    Pair("columns(bool_B_n)", lambda p: p.tables["bool_B_n"][p.b, p.k].long(), frozenset({"bool_B_n"})),
)
LOOKED_UP = (
    leaf("last(3)[q, k]", lambda p: (p.k <= p.q) & (p.q - p.k < 3)),
    leaf("causal[k, q]", lambda p: p.q <= p.k),
)


@dataclass(frozen=True)
class Shape:
    """A table as it is declared, and an entry of it. A `D` that is left makes a vector."""

    dtype: str
    lead: str
    axes: str
    index: str
    entry: Callable[[Pairs], tuple[Any, ...]]

    @property
    def name(self) -> str:
        return f"{self.dtype}_{self.lead}_{self.axes}".replace(", ", "")

    @property
    def declared(self) -> str:
        axes = [*self.lead, *filter(None, self.axes.split(", "))]
        return f"{self.dtype}[{', '.join(axes)}]"

    def pair(self) -> Pair:
        def of(p: Pairs) -> Tensor:
            index = (
                *([p.b] if "B" in self.lead else []),
                *([p.h] if "H" in self.lead else []),
                *self.entry(p),
            )
            return p.tables[self.name][index]

        return Pair(self.name + self.index, of, frozenset({self.name}))


ENTRIES: dict[str, tuple[str, Callable[[Pairs], tuple[Any, ...]]]] = {
    "": ("", lambda p: ()),
    "n": ("[k]", lambda p: (p.k,)),
    "n, n": ("[q, k]", lambda p: (p.q, p.k)),
    "5": ("[(q + k) mod 5]", lambda p: ((p.q + p.k) % 5,)),
    "m, n": ("[q mod 3, k]", lambda p: (p.q % 3, p.k)),
    "3, 2": ("[q mod 3, k mod 2]", lambda p: (p.q % 3, p.k % 2)),
    "D": ("", lambda p: ()),
    "n, D": ("[q]", lambda p: (p.q,)),
    "5, D": ("[(q - k) mod 5]", lambda p: ((p.q - p.k) % 5,)),
    "3, n, D": ("[q mod 3, k]", lambda p: (p.q % 3, p.k)),
    "n, 3": ("[q]", lambda p: (p.q,)),
}


def shapes(dtype: str, leads: list[str], axes: list[str]) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, lead, own, *ENTRIES[own])
        for lead, own in itertools.product(leads, axes)
        if (lead or own) and not (dtype == "learn" and own == "" and lead != "H")
    )


LEADS = ["", "B", "H", "BH"]
SHAPES = {
    "r": (
        *shapes("float", LEADS, ["", "n", "n, n", "5", "m, n"]),
        *shapes("learn", ["", "H"], ["", "5", "3, 2"]),
    ),
    "i": shapes("int", LEADS, ["", "n", "n, n", "5", "m, n"]),
    "t": shapes("bool", LEADS, ["", "n", "n, n", "5", "m, n"]),
    "v": (
        *shapes("float", LEADS, ["D", "n, D", "5, D", "3, n, D"]),
        *shapes("learn", ["", "H"], ["D", "5, D"]),
    ),
}
SHAPES["set"] = shapes("int", LEADS, ["n, 3"])
BY_NAME = {shape.name: shape for group in SHAPES.values() for shape in group}


VECTORS = tuple(shape.pair() for shape in SHAPES["v"])
WITH_CONTENT = tuple(
    Pair(text.format(v.text), lambda p, v=v, own=own: dot(getattr(p, own), v.of(p)) / 4, v.uses | {text})
    for v in VECTORS
    for text, own in (("(Q @ {} / 4)", "Q"), ("({} @ K / 4)", "K"))
)
BOTH = Operator("({} @ {} / 4)", lambda a, b: dot(a, b) / 4, "vv")
AMONG_TABLES = tuple(BOTH(v, w) for v, w in itertools.pairwise(VECTORS))
PLAIN = {kind: tuple(shape.pair() for shape in SHAPES[kind]) for kind in "rit"}
MEMBERS = tuple(
    Pair(f"(k in {v.text})", lambda p, v=v: (v.of(p) == p.k[..., None]).any(-1), v.uses | {"k in"})
    for v in (shape.pair() for shape in SHAPES["set"])
)
D = leaf("D", lambda p: torch.tensor(p.D))
SIDES = (leaf("Q", lambda p: p.Q), leaf("K", lambda p: p.K))
LEAVES = {
    ("v", "score"): (*SIDES * 9, *VECTORS),
    ("v", "bias"): VECTORS,
    ("r", "score"): (*CONTENT * 5, *WITH_CONTENT, *AMONG_TABLES, *PLAIN["r"]),
    ("r", "bias"): (*AMONG_TABLES, *PLAIN["r"]),
    ("i", "score"): (*NUMBERS, D, *PLAIN["i"]),
    ("i", "bias"): (*NUMBERS, D, *PLAIN["i"]),
    ("i", "mask"): (*NUMBERS, *PLAIN["i"]),
    ("t", "score"): (*LOOKED_UP, *MEMBERS, *PLAIN["t"]),
    ("t", "bias"): (*LOOKED_UP, *MEMBERS, *PLAIN["t"]),
    ("t", "mask"): (*LOOKED_UP, *MEMBERS, *PLAIN["t"]),
    ("p", "mask"): PATTERNS,
}
"""What stands in a mask, in a bias that neither queries nor keys decide, and in any score."""


class Grower:
    """Trees of pairs. Operators and leaves are taken in turn, so that none is left out."""

    def __init__(self) -> None:
        self.rng = random.Random(5)
        self.turns: dict[tuple[Any, ...], Iterator[Any]] = {}

    def turn(self, items: tuple[Any, ...]) -> Any:
        if items not in self.turns:
            self.turns[items] = itertools.cycle(self.rng.sample(items, len(items)))
        return next(self.turns[items])

    def tree(self, kind: str, depth: int, where: str) -> Pair:
        if depth == 0 or (depth < 3 and self.rng.random() < 0.15):
            found: Pair = self.turn(LEAVES[kind, where])
            return found
        # a mask is made of integers
        allowed = tuple(o for o in OPERATORS[kind] if where != "mask" or "r" not in o.kinds)
        operator: Operator = self.turn(allowed)
        return operator(*(self.tree(arg, depth - 1, where) for arg in operator.kinds))


def squashed(text: str, of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Pair], Pair]:
    """A score in which x stands bounded, that weights do not hide what x is."""
    return lambda x: Pair(text.format(x.text), lambda p: of(p.s, x.of(p)), x.uses | {text})


SCORES = {
    "bias": (
        squashed("s + 2 * tanh({})", lambda s, x: s + 2 * x.tanh()),
        squashed("s / 2 - 3 * sigmoid({})", lambda s, x: s / 2 - 3 * x.sigmoid()),
    ),
    "score": (
        squashed("3 * tanh({} / 3)", lambda s, x: 3 * (x / 3).tanh()),
        squashed("s * (1 + sigmoid({}))", lambda s, x: s * (1 + x.sigmoid())),
    ),
}
DECAYS = (
    Operator("0.25 + sigmoid({})", lambda x: 0.25 + x.sigmoid(), "r"),
    Operator("where({}, 0.0, 0.5 + |tanh({})|)", lambda t, x: torch.where(t, 0.0, 0.5 + abs(x.tanh())), "tr"),
)
SINKS = tuple(
    Pair(f"{t.text} + 0.25 * h", lambda p, t=t: t.of(p) + 0.25 * p.h, t.uses | {"sink"})
    for t in (BY_NAME[name].pair() for name in ("float_B_", "float_H_", "float_BH_", "learn_H_"))
)
NORMS = ("softmax", "sink", "sigmoid", "softmax", "relu", "linear", "softmax", "none")


@dataclass(frozen=True)
class Program:
    case: Case
    uses: frozenset[str]

    def __str__(self) -> str:
        return self.case.mechanism.name


def program(i: int, grower: Grower) -> Program:
    rng, where, norm = grower.rng, ("bias", "score", "score")[i % 3], NORMS[i % len(NORMS)]
    score = grower.turn(SCORES[where])(grower.tree("r", 3, where))
    if norm in ("relu", "linear", "none"):
        # the logarithm of a sum near 0 is off by more than its terms
        bare = score
        score = replace(bare, text=f"0.5 + |({bare.text})|", of=lambda p: 0.5 + abs(bare.of(p)))
    mask = PATTERNS[0] if i % 9 == 0 else grower.tree("p", 3, "mask")
    decay = None
    if i % 9 and rng.random() < 0.5:
        factor: Operator = grower.turn(DECAYS)
        decay = factor(*(grower.tree(kind, 2, "bias") for kind in factor.kinds))
    sink = grower.turn(SINKS) if norm == "sink" else None
    uses = frozenset({norm}).union(*(part.uses for part in (score, mask, decay, sink) if part))
    tables = [BY_NAME[name] for name in sorted(uses & BY_NAME.keys())]
    given = [f"{t.name} : {t.declared}" for t in tables if t.dtype != "learn"]
    learned = [f"{t.name} = {t.declared}(0.1)" for t in tables if t.dtype == "learn"]
    clauses = [
        f"inputs {' '.join(given)}" if given else "",
        f"mask {mask.text} score {score.text}",
        f"decay {decay.text}" if decay else "",
        f"norm softmax(sink = {sink.text})" if sink else f"norm {norm}",
    ]
    formula = Formula(
        lambda p: mask.of(p) > 0,
        score.of,
        decay and decay.of,
        mask.of,
        sink and sink.of,
        "softmax" if sink else norm,  # type: ignore[arg-type]
    )
    mechanism = Mechanism(
        f"program-{i}",
        "\n".join(clauses),
        (formula,),
        params=f"({', '.join(learned)})" if learned else "",
        tables={
            t.name: integers(-3, 7) if t.dtype == "int" else likely(0.5)
            for t in tables
            if t.dtype in ("int", "bool")
        },
        sizes=lambda n: {"m": 3},
    )
    n = rng.randint(5, 12)
    heads, kv_heads = rng.choice([(2, 2), (3, 3), (2, 1), (4, 2)])
    sizes = {"n": n, "nq": rng.choice([n, n, n - 3]), "batch": rng.randint(1, 3), "block_size": 8}
    sizes |= {"heads": heads, "kv_heads": kv_heads}
    sizes |= {"head_dim": rng.choice([4, 8]), "v_dim": rng.choice([4, 8])}
    plain = replace(CASES[0], loud=False, with_lse=True, layouts=("plain",) * 5, dtype="float64")
    return Program(replace(plain, mechanism=mechanism, q_offset=None, k_offset=None, **sizes), uses)


def programs() -> tuple[Program, ...]:
    grower = Grower()
    return tuple(program(i, grower) for i in range(COUNT))


PROGRAMS = programs()


@pytest.mark.parametrize("program", thin(PROGRAMS, 3), ids=str)
def test_a_program_is_its_formula(program: Program) -> None:
    for backend in ("reference", "torch"):
        assert check(backend, program.case) is None
    check("sdpa", program.case)


def test_the_programs_use_everything() -> None:
    operators = {o.name for group in (*OPERATORS.values(), DECAYS, (BOTH,)) for o in group}
    leaves = {name for group in LEAVES.values() for pair in group for name in pair.uses}
    wanted = operators | leaves | {*BY_NAME, *NORMS} | {name for sink in SINKS for name in sink.uses}
    assert not wanted - {name for program in PROGRAMS for name in program.uses}
    assert sum(declined("sdpa", program.case) is None for program in PROGRAMS) > 10


def at_head_0(evaluate: Any) -> Any:
    """Vectors that each head has for itself are read at head 0."""

    def faulty(expr: Expr, env: Env, live: Tensor | None = None) -> Tensor:
        tables = dict(env.tables)
        for table in expr.tables:
            if "H" in table.dims and table.dims[-1:] == ("D",):
                x, axis = tables[table.name], int(table.batched)
                tables[table.name] = x.narrow(axis, 0, 1).expand(x.shape)
        return evaluate(expr, replace(env, tables=tables), live)

    return faulty


FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Any], None]] = {
    "vectors at head 0": lambda patch, reference: patch.setattr(
        reference, "evaluate", at_head_0(reference.evaluate)
    ),
    "mod of another sign": lambda patch, reference: patch.setattr(torch, "remainder", torch.fmod),
    "no multiplicity": lambda patch, reference: patch.setattr(
        reference, "decay_factor", lambda decay, env, live: live.to(env.dtype)
    ),
}


def check_all() -> None:
    """But for programs that the fault sends outside of a table, which is refused."""
    for program in PROGRAMS:
        with contextlib.suppress(attndsl.AttnError):
            check("reference", program.case)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_yardstick_finds_a_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch, sys.modules[type(registry.plugin("backends", "reference")).__module__])
    with pytest.raises(AssertionError):
        check_all()
