"""What kernels compute at each pair of a group of heads, over its leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from attndsl import expr as ir
from attndsl.attention import HeadGroup
from attndsl.emit.leaves import Leaf, leaves, left_over
from attndsl.expr import Expr
from attndsl.scores import affine_in_s

LOG2_E = 1 / math.log(2.0)
S = ir.var("s")
GAIN, FACTOR = (ir.make("var", (), name, "real") for name in ("gain", "factor"))
"""The slopes of the two roots of a score."""
NOTHING = ir.make("const", (), -math.inf, "real")
"""A logit that says that there is no weight."""
AXES = 5
"""Of a table that pairs index, at most."""
COMPUTED = 8
"""Operations up to which a score is computed at each pair and not looked up by distance, where they are some
of these: a look-up takes as long as many of them, and more registers."""
LIGHT = frozenset("const var leaf add mul abs min max where le lt eq and or not".split())


@dataclass(frozen=True)
class Score:
    """What the kernels compute at each pair.

    packed  what Q @ K is multiplied with; `s` below is that product
    logit   under a softmax; for other norms the weight before its factor
    factor  of the weight, or None
    norm    kind of Norm
    """

    packed: float
    logit: Expr
    factor: Expr | None
    norm: str

    @staticmethod
    def of(group: HeadGroup, head_dim: int, adjacent: bool) -> Score | str:
        """Or why there is none. `adjacent` as of `left_over`."""
        sizes = {"D": ir.const(head_dim)}
        score = ir.substitute(over_s(group.score), sizes)
        packed, factor, kind = 1 / head_dim**0.5, group.decay, group.norm.kind
        if kind == "softmax":
            packed, score = _scaled(score, packed)
            # in base 2 nothing is left to multiply; a bias of -1e38 would not be a number there
            packed *= LOG2_E if score is S and factor is None else 1.0
        logit = left_over(score, adjacent)
        weighed = None if factor is None else left_over(ir.substitute(factor, sizes), adjacent)
        if isinstance(logit, str) or isinstance(weighed, str):
            return logit if isinstance(logit, str) else str(weighed)
        made = Score(packed, _gain(kind, logit), weighed, kind)
        if any(node.op == "read" and len(node.args) - 1 > AXES for node in made.leaves.values()):
            return f"a pair chooses an entry of a table by more than {AXES} numbers"
        return made

    @cached_property
    def leaves(self) -> dict[Leaf, Expr]:
        """In the order of their numbers, with a node that reads each."""
        return leaves(self.roots)

    @property
    def roots(self) -> tuple[Expr, ...]:
        return (self.logit,) if self.factor is None else (self.logit, self.factor)

    @property
    def softmax(self) -> bool:
        return self.norm == "softmax"

    @cached_property
    def plain(self) -> bool:
        return self.roots == (S,) and self.softmax

    @cached_property
    def unit(self) -> float:
        """What slopes by `s` are multiplied with: a natural logarithm over a logit."""
        return math.log(2.0) if self.plain else 1.0


score_of = lru_cache(maxsize=256)(Score.of)


def light(roots: Iterable[Expr]) -> bool:
    """Whether what is left of a score for each pair takes less than a look-up by distance."""
    ops = [node.op for root in roots for node in ir.nodes(root)]
    return LIGHT.issuperset(ops) and len([op for op in ops if op not in ("const", "var", "leaf")]) <= COMPUTED


def over_s(e: Expr) -> Expr:
    """With Q @ K written as s, and inner products of sums as sums."""
    done: dict[Expr, Expr] = {}
    for node in ir.nodes(e):
        args = tuple(done[arg] for arg in node.args)
        done[node] = _product(*args) if node.op == "inner" else ir.rebuild(node, args)
    return done[e]


def _product(a: Expr, b: Expr) -> Expr:
    if {a.value, b.value} == {"Q", "K"}:
        return ir.mul(ir.call("sqrt", ir.var("D")), S)
    for one, other in ((a, b), (b, a)):
        if one.op == "add" and all(arg.type == "vec" for arg in one.args):
            return ir.add(*(_product(arg, other) for arg in one.args))
        if one.op == "mul" and (numbers := [arg for arg in one.args if arg.type != "vec"]):
            (vector,) = (arg for arg in one.args if arg.type == "vec")
            return ir.mul(numbers[0], _product(vector, other))
        if one.op == "div" and one.args[1].type != "vec":
            return ir.div(_product(one.args[0], other), one.args[1])
    return ir.inner(a, b)


def _scaled(score: Expr, packed: float) -> tuple[float, Expr]:
    """A number that s comes multiplied with, and the score over the product."""
    found = affine_in_s(score)
    if found is None or (slope := ir.number(found[0])) is None or not math.isfinite(slope) or slope == 0:
        return packed, score
    return packed * slope, S if ir.number(found[1]) == 0 else ir.add(S, found[1])


def _gain(kind: str, score: Expr) -> Expr:
    if kind == "sigmoid":
        return ir.call("sigmoid", score)
    if kind == "relu":
        return ir.where(ir.le(score, ir.const(0.0)), ir.const(0.0), score)
    return score if kind == "softmax" else ir.where(ir.eq(score, NOTHING), ir.const(0.0), score)
