"""The spelling of FlexAttention: scores as text of a `score_mod`, which torch traces.

What a call knows before its pairs comes in tensors, so that another constant, another table or another length
is the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import cast

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.emit.code import Code, Target
from attndsl.emit.leaves import READS, leaf_of, left_over
from attndsl.emit.score import S, light, over_s
from attndsl.expr import Expr, IntSet

Spelling = Callable[[Expr, list[str]], str]
PLACES = {"query": "q_idx", "key": "kv_idx", "distance": "q_idx - kv_idx + origin[0]", "number": "0"}
"""The entry of a leaf that a pair reads."""


@lru_cache(maxsize=256)
def score_over(attention: Attention, head_dim: int | None, adjacent: bool) -> Expr | str:
    """The logit of all groups of heads over `s` and leaves, or why there is none. `adjacent` as of
    `left_over`; a score may need no `head_dim`."""
    score: Expr | None = None
    for group in attention.groups:
        mine = over_s(group.score)
        if head_dim is not None:
            mine = ir.substitute(mine, {"D": ir.const(head_dim)})
        score = mine if score is None else ir.where(group.heads, mine, score)
    assert score is not None
    computed = left_over(score, False)
    if not adjacent or (isinstance(computed, Expr) and light((computed,))):
        return computed
    return left_over(score, True)


def _joined(sign: str) -> Spelling:
    return lambda e, args: f"({f' {sign} '.join(args)})"


def _called(name: str) -> Spelling:
    return lambda e, args: f"{name}({', '.join(args)})"


def _of_type(whole: str, real: str) -> Spelling:
    return lambda e, args: f"{whole if e.type == 'int' else real}({', '.join(args)})"


def _between(name: str) -> Spelling:
    """Of two tensors."""

    def spelling(e: Expr, args: list[str]) -> str:
        one, other = args
        if e.args[0].op == "const":
            one = f"torch.full_like({other}, {one})"
        elif e.args[1].op == "const":
            other = f"torch.full_like({one}, {other})"
        return f"torch.{name}({one}, {other})"

    return spelling


def _inset(e: Expr, args: list[str]) -> str:
    parts = [f"(({low} <= {args[0]}) & ({args[0]} <= {high}))"
             for low, high in cast(IntSet, e.value).intervals]  # fmt: skip
    return f"({' | '.join(parts)})"


SPELL: dict[str, Spelling] = {
    "const": lambda e, args: f"({e.value!r})",
    "entry": lambda e, args: PLACES[str(e.value)],
    "add": _joined("+"), "mul": _joined("*"), "div": _joined("/"),
    "and": _joined("&"), "or": _joined("|"), "not": lambda e, args: f"(~{args[0]})",
    "le": _joined("<="), "lt": _joined("<"), "eq": _joined("=="),
    "where": _called("torch.where"), "min": _between("minimum"), "max": _between("maximum"),
    "abs": _called("torch.abs"), "floordiv": _joined("//"), "mod": _joined("%"), "inset": _inset,
    "pow": _of_type("whole_power", "torch.pow"), "floor": lambda e, args: f"torch.floor({args[0]}).long()",
    "isqrt": _called("whole_root"), "log2": _of_type("whole_log2", "torch.log2"),
    **{name: _called(f"torch.{name}") for name in ("exp", "log", "sqrt", "tanh", "sigmoid", "sin", "cos")},
}  # fmt: skip
"""By op, but for READS."""


@dataclass(frozen=True)
class Written:
    """The score_mod of one score: see `score_mod_text`."""

    score: Expr
    axes: tuple[tuple[bool, bool], ...]
    real: str

    @cached_property
    def names(self) -> dict[Expr, str]:
        """What is read, and what its tensor is called."""
        return {node: f"{leaf_of(node).kind}{i}" for i, node in enumerate(reads(self.score))}

    @property
    def text(self) -> str:
        code = Code(self.target, {S: "s"})
        result = code.real(self.score)
        if self.score.op == "const":
            result = f"torch.full_like(s, {result})"
        lasts = [f"last_{name}" for node, name in self.names.items() if leaf_of(node).kind == "table"]
        lines = [
            f"def bind({', '.join([*self.names.values(), *lasts, 'origin'])}):",
            "    def score_mod(score, b, h, q_idx, kv_idx):",
            f"        s = score.to(torch.{self.real})",
            *(f"        {line}" for line in code.lines),
            f"        return {result}",
            "",
            "    return score_mod",
        ]
        return "\n".join([*lines, ""])

    @property
    def target(self) -> Target:
        axes = dict(zip(self.names, self.axes, strict=True))

        def read(e: Expr, args: list[str]) -> str:
            leaf, name = leaf_of(e), self.names[e]
            lead = [axis for axis, there in zip("bh", axes[e], strict=True) if there]
            if leaf.kind == "number" and lead:
                return f"{name}[{', '.join(lead)}]"
            if leaf.kind != "table":
                return f"{name}[{', '.join([*lead, PLACES[leaf.kind]])}]"
            asked = (f"({''.join(f'{x}, ' for x in some)})" for some in (lead, args[1:]))
            return f"{'truth' if e.type == 'bool' else 'entry'}({name}, last_{name}, {', '.join(asked)})"

        def declare(e: Expr, name: str, text: str) -> str:
            return f"{name} = {text}"

        return Target({**SPELL, "leaf": read, "read": read}, declare, self.as_real)

    def as_real(self, text: str) -> str:
        return text if text.startswith("(") else f"{text}.to(torch.{self.real})"


@lru_cache(maxsize=256)
def score_mod_text(score: Expr, axes: tuple[tuple[bool, bool], ...], real: str) -> str:
    """A function `bind`, which gives the score_mod, of the tensors in the order of `reads`, then of the last
    entries of the axes of each table (`last_table0`), and of the entry of the distance 0 (`origin`).

    score  over `s` and leaves
    axes   of each node that reads, whether its tensor has axes of batch rows and of heads
    real   torch's name of the dtype of reals
    """
    return Written(score, axes, real).text


def reads(score: Expr) -> list[Expr]:
    """The nodes that read a leaf, in one order."""
    return [node for node in ir.nodes(score) if node.op in READS]
