"""The spelling of Triton, over tiles of pairs; what it calls stands beside the kernels, in pairs.py.

`held` is a tuple with what there is of each leaf: a number itself, else a pointer; of what is fixed for a
program, its queries or its keys, the entries; behind a table the sizes of its axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, cast

from attndsl import expr as ir
from attndsl.emit.adjoints import adjoints
from attndsl.emit.code import Code, Target
from attndsl.emit.leaves import READS, Leaf, leaf_of
from attndsl.emit.score import AXES, FACTOR, GAIN, LOG2_E, S, Score
from attndsl.expr import Expr, IntSet

Side: TypeAlias = Literal["query", "key"]
"""Of what a program has a block: the rest comes tile by tile."""
CARRIED: Mapping[Side, tuple[str, ...]] = {"query": ("number", "query"), "key": ("key",)}
"""Leaves whose gradients a program adds up alone, by its side."""
SCATTERED = ("distance", "table")
"""Those to which many programs add, in passes over queries."""
INDEX = {"number": "0", "query": "row", "key": "key", "distance": "row - key + origin"}
Spelling = Callable[[Expr, list[str]], str]


def _joined(sign: str) -> Spelling:
    return lambda e, args: f"({f' {sign} '.join(args)})"


def _called(name: str) -> Spelling:
    return lambda e, args: f"{name}({', '.join(args)})"


def _of_type(whole: str, real: str) -> Spelling:
    return lambda e, args: f"{whole if e.type == 'int' else real}({', '.join(args)})"


def _const(e: Expr, args: list[str]) -> str:
    if e.type != "real":
        return f"({e.value!r})"
    value = repr(e.value) if math.isfinite(cast(float, e.value)) else f'float("{e.value}")'
    # a number of Python's would be float32 among such alone
    return f"tl.full([], {value}, REAL)"


def _inset(e: Expr, args: list[str]) -> str:
    parts = [f"(({low} <= {args[0]}) & ({args[0]} <= {high}))"
             for low, high in cast(IntSet, e.value).intervals]  # fmt: skip
    return f"({' | '.join(parts)})"


def _pow(e: Expr, args: list[str]) -> str:
    if e.type == "real" and e.args[1].op == "const" and e.args[1].value == 2:
        return f"({args[0]} * {args[0]})"
    return _of_type("power", "power_of_reals")(e, args)


SPELL: dict[str, Spelling] = {
    "const": _const,
    "entry": lambda e, args: "row" if e.value == "query" else "key",
    "add": _joined("+"), "mul": _joined("*"), "div": _joined("/"),
    "and": _joined("&"), "or": _joined("|"), "not": lambda e, args: f"({args[0]} == 0)",
    "le": _joined("<="), "lt": _joined("<"), "eq": _joined("=="),
    "where": _called("tl.where"), "min": _called("least"), "max": _called("greatest"),
    "abs": _called("tl.abs"), "floordiv": _of_type("quotient", "quotient_of_reals"),
    "mod": _of_type("remainder", "remainder_of_reals"), "inset": _inset, "pow": _pow,
    "floor": lambda e, args: f"rounded({args[0]}, WHOLE)", "isqrt": _called("root"),
    "log2": _of_type("bits", "tl.log2"),
    "tanh": _called("tanh"), "sigmoid": _called("tl.sigmoid"),
    **{name: _called(f"tl.{name}") for name in ("exp", "log", "sqrt", "sin", "cos")},
}  # fmt: skip
"""By op, but for READS."""


@dataclass(frozen=True)
class Written:
    """The functions of one score, for programs over blocks of queries and over blocks of keys.

    wanted  the leaves whose gradients are asked for
    """

    score: Score
    wanted: frozenset[Leaf] = frozenset()

    @cached_property
    def places(self) -> dict[Leaf, int]:
        """Of each leaf its number."""
        return {leaf: i for i, leaf in enumerate(self.score.leaves)}

    @cached_property
    def slots(self) -> dict[Leaf, int]:
        """Of each leaf where in `held` it begins."""
        sizes = [1 + self.axes(leaf) for leaf in self.places]
        return dict(zip(self.places, (sum(sizes[:i]) for i in range(len(sizes))), strict=True))

    def axes(self, leaf: Leaf) -> int:
        """Of a table, else 0."""
        node = self.score.leaves[leaf]
        return len(node.args) - 1 if leaf.kind == "table" else 0

    def carried(self, side: Side) -> list[Leaf]:
        return [leaf for leaf in self.places if leaf in self.wanted and leaf.kind in CARRIED[side]]

    @cached_property
    def text(self) -> str:
        """All functions."""
        parts = [self.score_text]
        for side in CARRIED:
            parts += [self.held(side), self.slopes(side), self.begin(side), self.finish(side)]
        return "\n\n".join(parts)

    def held(self, side: Side) -> str:
        """What there is of each leaf, in a block of queries (`row`) or of keys (`key`)."""
        parts = []
        for leaf, node in self.score.leaves.items():
            kind = "REAL" if node.type == "real" else "WHOLE"
            base = f"pointer(at, {self.places[leaf]}, {kind})"
            fixed = leaf.kind in ("number", side)
            parts.append(f"tl.load({base} + {INDEX[leaf.kind]})" if fixed else base)
            first = self.places[leaf] * AXES
            parts += [f"tl.load(sizes + {first + i})" for i in range(self.axes(leaf))]
        head = f"held_{side}(at, sizes, {'row' if side == 'query' else 'key'}, REAL, WHOLE)"
        return _function(head, [], f"({''.join(f'{part}, ' for part in parts)})", ("REAL", "WHOLE"))

    @property
    def score_text(self) -> str:
        code = Code(self.target, {S: "s"})
        names = [f"tl.broadcast_to({code.real(root)}, live.shape)" for root in self.score.roots]
        head = "score(s, row, key, live, held, origin, QUERIES, REAL, WHOLE)"
        lines = [*self.unharmed, *code.lines]
        last = f"{names[0]}, {names[1] if len(names) > 1 else 's'}, {'bad' if self.checked else 'live'}"
        return _function(head, lines, last, ("QUERIES", "REAL", "WHOLE"))

    @property
    def checked(self) -> bool:
        """Whether a pair may have no value."""
        reads = (node for root in self.score.roots for node in ir.nodes(root) if node.op == "read")
        return self.score.factor is not None or any(node.type != "bool" for node in reads)

    @property
    def unharmed(self) -> list[str]:
        return ["bad = live ^ live"] if self.checked else []

    @property
    def norm(self) -> tuple[bool, bool, float, bool]:
        """What kernels are told of it: whether weights are powers, whether they have factors, what logits
        are multiplied with to be exponents of 2, and whether weights are divided by their sum."""
        score = self.score
        shared = score.norm in ("softmax", "linear")
        return score.softmax, score.factor is not None, 1.0 if score.plain else LOG2_E, shared

    def slopes(self, side: Side) -> str:
        """Weights, slopes by `s`, and the sums of the slopes by what is carried."""
        code = Code(self.target, {S: "s", GAIN: "gain", FACTOR: "by_factor"})
        names = [f"tl.broadcast_to({code.real(root)}, live.shape)" for root in self.score.roots]
        factor = names[1] if len(names) > 1 else "s"
        told = ", ".join(map(repr, self.norm[:3]))
        weighed = f"weighed({names[0]}, {factor}, live, back, DIVIDED, {told})"
        code.lines.append(f"weight, gain, by_factor = {weighed}")
        reads = [node for root in self.score.roots for node in ir.nodes(root) if node.op in READS]
        mine = [*CARRIED[side], *(SCATTERED if side == "query" else ())]
        asked = [
            node
            for node in dict.fromkeys(reads)
            if leaf_of(node) in self.wanted and leaf_of(node).kind in mine
        ]
        found = adjoints(dict(zip(self.score.roots, (GAIN, FACTOR), strict=False)), [S, *asked])
        carried = self.carried(side)
        sums = {leaf: f"sums[{i}]" for i, leaf in enumerate(carried)}
        for node in filter(found.__contains__, asked):
            leaf = leaf_of(node)
            slope = f"tl.where(live, {code.name(found[node])}, 0.0)"
            if leaf in sums:
                sums[leaf] = f"({sums[leaf]} + tl.sum({slope}, 1))"
            else:
                code.lines.append(self.scattered(node, slope, code.names))
        end = code.name(found[S]) if S in found else "tl.where(live, 0.0, 0.0).to(REAL)"
        carry = f"({''.join(f'{x}, ' for x in sums.values())})"
        constants = ("DIVIDED", "QUERIES", "REAL", "WHOLE")
        given = ", ".join(["s, row, key, live, back, held, sums, grads, origin", *constants])
        lines = [*self.unharmed, *code.lines]
        return _function(f"slopes_{side}({given})", lines, f"weight, {end}, {carry}", constants)

    def scattered(self, node: Expr, slope: str, names: Mapping[Expr, str]) -> str:
        leaf = leaf_of(node)
        to = f"pointer(grads, {self.places[leaf]}, REAL)"
        if leaf.kind == "distance":
            return f"scatter({to}, row - key + origin, {slope}, live)"
        indices, sizes = self.indices(node, [names[arg] for arg in node.args])
        return f"scatter_table({to}, {indices}, {sizes}, {slope}, live)"

    def begin(self, side: Side) -> str:
        zeros = "tl.zeros([BLOCK], REAL), " * len(self.carried(side))
        return _function(f"begin_{side}(BLOCK, REAL)", [], f"({zeros})", ("BLOCK", "REAL"))

    def finish(self, side: Side) -> str:
        """Stores what was carried: of a number one sum for each block."""
        lines = []
        for i, leaf in enumerate(self.carried(side)):
            to = f"pointer(grads, {self.places[leaf]}, REAL)"
            value = f"tl.sum(sums[{i}], 0)" if leaf.kind == "number" else f"sums[{i}]"
            lines.append(f"tl.store({to} + {'block' if leaf.kind == 'number' else 'entry'}, {value})")
        head = f"finish_{side}(sums, grads, block, entry, REAL)"
        return _function(head, lines or ["pass"], "", ("REAL",))

    def indices(self, node: Expr, args: Sequence[str]) -> tuple[str, str]:
        """Of a look-up what it asks for and the sizes of the axes, as tuples."""
        first = self.slots[leaf_of(node)] + 1
        asked = "".join(f"{arg}, " for arg in args[1:])
        return f"({asked})", f"({''.join(f'held[{first + i}], ' for i in range(len(args) - 1))})"

    @cached_property
    def target(self) -> Target:
        def read(e: Expr, args: list[str]) -> str:
            leaf = leaf_of(e)
            there = f"held[{self.slots[leaf]}]"
            if leaf.kind == "table":
                indices, sizes = self.indices(e, args)
                asked = f"{there}, {indices}, {sizes}, live & {args[0]}"
                return f"truth_of_table({asked})" if e.type == "bool" else f"of_table({asked}, bad)"
            found = there
            if leaf.kind == "query":
                found = f"of_row({there}, row, QUERIES)"
            elif leaf.kind == "key":
                found = f"of_key({there}, key, QUERIES)"
            elif leaf.kind == "distance":
                found = f"tl.load({there} + (row - key + origin))"
            return f"({found} != 0)" if e.type == "bool" else found

        def declare(e: Expr, name: str, text: str) -> str:
            checked = e.op == "read" and leaf_of(e).kind == "table" and e.type != "bool"
            return f"{name}, bad = {text}" if checked else f"{name} = {text}"

        return Target({**SPELL, "leaf": read, "read": read}, declare, _as_real)


def _as_real(text: str) -> str:
    return f"tl.full([], {text}, REAL)" if text.startswith("(") else f"{text}.to(REAL)"


def _function(head: str, lines: Collection[str], result: str, constants: Collection[str]) -> str:
    name, _, arguments = head.removesuffix(")").partition("(")
    typed = [f"{x}: tl.constexpr" if x in constants else x for x in arguments.split(", ")]
    body = [f"    {line}" for line in (*lines, *([f"return {result}"] if result else []))]
    return "\n".join(["@triton.jit", f"def {name}({', '.join(typed)}):", *body, ""])
