"""Assertions: what a pattern file claims of its patterns, typed, then proved or refuted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import AttnError, Span, fail
from attndsl.expr import Expr, Table
from attndsl.language.arguments import bind_arguments_of
from attndsl.language.elaborate import Elaborator
from attndsl.language.mistakes import quoted
from attndsl.language.values import TOKENS, AttentionOf, K, Pattern, Q, Scope
from attndsl.streams import Streams, some_key, tokens_read
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.relations.proofs import Verdict


@dataclass(frozen=True)
class PerHead:
    """A relation per group of heads: mask and the truth over h and H that says which heads."""

    groups: tuple[tuple[Expr, Expr], ...]


@dataclass(frozen=True)
class Reach:
    """What `layers` layers of the mask reach, the residual stream included: (R | radius(0)) ** layers.

    heads  the truth over H that it is about
    """

    of: Expr
    layers: int
    heads: Expr


@dataclass(frozen=True)
class Included:
    """`left <= right`, or `==`."""

    left: PerHead | Reach
    right: PerHead | Reach
    equal: bool
    names: tuple[str, str]


@dataclass(frozen=True)
class EveryRow:
    """No query is without a key."""

    of: PerHead


@dataclass(frozen=True)
class Quantity:
    """A number that an attention has at one length."""

    kind: Literal["density", "nnz", "diameter"]
    of: Attention
    n: int
    heads: int


@dataclass(frozen=True)
class Compared:
    """`left op right` between quantities and constants."""

    op: str
    left: Quantity | float
    right: Quantity | float


Claim = Included | EveryRow | Compared
PARAMETERS = {
    "every_row": ("of",),
    "density": ("of", "n", "heads"),
    "nnz": ("of", "n", "heads"),
    "diameter": ("of", "n", "heads"),
    "reach": ("of", "layers"),
}


@dataclass(frozen=True, eq=False)
class Assertion:
    """One `assert` with its meaning; `claims` hold together."""

    span: Span
    claims: tuple[Claim, ...]

    def __repr__(self) -> str:
        return f"<assert {self.text}>"

    @property
    def text(self) -> str:
        """As it is written, on one line."""
        return " ".join(self.span.text.split())


def typed(e: ast.Expression, elaborator: Elaborator) -> Assertion:
    """The meaning of an assertion. Raises AttnError where it has none."""
    return Assertion(e.span, tuple(_claims(e, elaborator)))


def _claims(e: ast.Expression, elaborator: Elaborator) -> list[Claim]:
    if isinstance(e, ast.Nary) and e.op == "and":
        return [claim for arg in e.args for claim in _claims(arg, elaborator)]
    if _called(e) == "every_row":
        return [EveryRow(_heads(_arguments(e)["of"], elaborator, some_key))]
    if isinstance(e, ast.Compare):
        return [
            _compared(op, left, right, e, elaborator)
            for op, left, right in zip(e.ops, e.args, e.args[1:], strict=False)
        ]
    raise fail(
        "an assertion compares patterns or quantities, or is every_row(...)",
        e.span,
        help="write `A <= B`, `A == B` or `density(A, n = 4096) < 1%`",
    )


def _called(e: ast.Expression) -> str:
    return e.func.id if isinstance(e, ast.Call) and isinstance(e.func, ast.Name) else ""


def _arguments(e: ast.Expression) -> dict[str, ast.Expression]:
    assert isinstance(e, ast.Call)
    name = _called(e)
    params = PARAMETERS[name]
    required = tuple(p for p in params if p != "heads")
    return bind_arguments_of(name, required, ("heads",) if "heads" in params else (), e, _usage(name))


def _usage(name: str) -> str:
    return f"{name}({', '.join(p if p == 'of' else f'{p} = ...' for p in PARAMETERS[name])})"


def _compared(
    op: str, left: ast.Expression, right: ast.Expression, e: ast.Compare, elaborator: Elaborator
) -> Claim:
    sides = [_side(side, elaborator) for side in (left, right)]
    relations = [side for side in sides if isinstance(side, PerHead | Reach)]
    if len(relations) == 2:
        if op not in ("<=", "=="):
            help = "write `<=`: every pair of the left is in the right" if op == "<" else ""
            raise fail(f"patterns are compared with `<=` and `==`, not `{op}`", e.span, help)
        return Included(relations[0], relations[1], op == "==", (left.span.text, right.span.text))
    if relations:
        at = left if isinstance(sides[0], PerHead | Reach) else right
        raise fail(
            "a pattern is compared with a number",
            at.span,
            help=f"compare a quantity of it, as `nnz({quoted(at)}, n = 4096)` or `density(...)`",
        )
    if op == "in":
        raise fail("a quantity is compared with `==`, `<`, `<=`, `>` or `>=`", e.span)
    a, b = sides
    assert isinstance(a, Quantity | float)
    assert isinstance(b, Quantity | float)
    return Compared(op, a, b)


def _side(e: ast.Expression, elaborator: Elaborator) -> PerHead | Reach | Quantity | float:
    name = _called(e)
    if name == "reach":
        args = _arguments(e)
        layers = elaborator.constant(args["layers"], Scope({}), TOKENS, "the number of layers")
        if layers < 0:
            raise fail(f"the number of layers is {layers}, and must not be negative", args["layers"].span)
        of = elaborator.pattern(args["of"], Scope({}, claims=True), TOKENS)
        return Reach(of.at(Q, K, TOKENS).mask, layers, _enough(args["of"], elaborator))
    if name in ("density", "nnz", "diameter"):
        return _quantity(name, e, elaborator)  # type: ignore[arg-type]
    try:
        value = elaborator.value(e, Scope({}, integral=False, claims=True), TOKENS)
    except AttnError:
        if _attention(e, elaborator) is None:
            raise
    else:
        if not isinstance(value, Pattern | AttentionOf):
            number = ir.number(elaborator.num(e, Scope({}, integral=False), TOKENS))
            if number is None:
                raise fail("an assertion compares with a constant", e.span)
            return float(number)
    return _heads(e, elaborator)


def _quantity(
    kind: Literal["density", "nnz", "diameter"], e: ast.Expression, elaborator: Elaborator
) -> Quantity:
    args = _arguments(e)
    attention = _attention(args["of"], elaborator)
    if attention is None:
        pattern = elaborator.pattern(args["of"], Scope({}, claims=True), TOKENS)
        attention = Attention.of_pattern(args["of"].span.text, pattern.at(Q, K, TOKENS))
    if attention.approx is not None and kind != "diameter":
        raise fail(f"`{attention.approx.kind}` has no weights of pairs to count", args["of"].span)
    n = elaborator.constant(args["n"], Scope({}), TOKENS, "n")
    if n < 0:
        raise fail(f"n is {n}, and must not be negative", args["n"].span)
    heads = 1
    if "heads" in args:
        heads = elaborator.constant(args["heads"], Scope({}), TOKENS, "the number of heads")
        least = _least_heads(args["of"], elaborator)
        if heads < least:
            raise fail(f"{quoted(args['of'])} has {least} heads or more", args["heads"].span)
    elif len(attention.groups) > 1 or any({"h", "H"} & g.relation.mask.free for g in attention.groups):
        raise fail(f"the {kind} depends on the heads", args["of"].span, help=f"write {kind}(..., heads = 12)")
    return Quantity(kind, attention, n, heads)


def _attention(e: ast.Expression, elaborator: Elaborator) -> Attention | None:
    name = e.id if isinstance(e, ast.Name) else _called(e)
    if not isinstance(elaborator.definitions.get(name), ast.AttentionDef):
        return None
    value = elaborator.value(e, Scope({}, integral=False), TOKENS)
    assert isinstance(value, AttentionOf)
    return value.attention


def _least_heads(e: ast.Expression, elaborator: Elaborator) -> int:
    """At which every group of every attention that `e` names holds a head; 1 where it names none."""
    parts = list(ast.walk(e))
    bound = {name.id for x in parts if isinstance(x, ast.Builder) for group in x.vars for name in group}
    called = {id(x.func) for x in parts if isinstance(x, ast.Call)}
    names = (
        x
        for x in parts
        if isinstance(x, ast.Call) or (isinstance(x, ast.Name) and id(x) not in called and x.id not in bound)
    )
    attentions = (_attention(x, elaborator) for x in names)
    return max((attention.enough_heads() for attention in attentions if attention is not None), default=1)


def _enough(e: ast.Expression, elaborator: Elaborator) -> Expr:
    """Claims are about this many heads or more."""
    least = _least_heads(e, elaborator)
    return ir.le(ir.const(least), ir.var("H")) if least > 1 else ir.TRUE


def _heads(
    e: ast.Expression, elaborator: Elaborator, relates: Callable[[Streams, Expr], Expr] = tokens_read
) -> PerHead:
    """`relates` makes a relation of tokens of a mask."""
    attention, enough = _attention(e, elaborator), _enough(e, elaborator)
    if attention is not None:
        return PerHead(
            tuple(
                (relates(attention.streams, group.relation.mask), ir.all_of(enough, group.heads))
                for group in attention.groups
            )
        )
    return PerHead(((elaborator.pattern(e, Scope({}, claims=True), TOKENS).at(Q, K, TOKENS).mask, enough),))


def prove(assertion: Assertion) -> Verdict:
    """Proved for every n, head and table, refuted at the smallest point found, or undecided.

    `assertion` is one of `program.assertions`. Quantities are stated at one n and simply computed. Raises
    AttnError for what is no assertion.
    """
    if not isinstance(assertion, Assertion):
        raise fail(f"an assertion of a program is proved, not {type(assertion).__name__}")
    verdicts = [_verdict(claim) for claim in assertion.claims]
    for status in ("refuted", "undecided"):
        for verdict in verdicts:
            if verdict.status == status:
                return verdict
    return verdicts[0]


def _verdict(claim: Claim) -> Verdict:
    from attndsl.relations import proofs

    if isinstance(claim, EveryRow):
        return _worst([proofs.every_row(mask, heads) for mask, heads in claim.of.groups])
    if isinstance(claim, Included):
        left, right = (_per_head(side) for side in (claim.left, claim.right))
        found = [proofs.subset(a, b, ir.all_of(ha, hb)) for a, ha in left for b, hb in right]
        if claim.equal:
            found = [_only_in(verdict, claim.names) for verdict in found]
            back = [proofs.subset(b, a, ir.all_of(ha, hb)) for a, ha in left for b, hb in right]
            found += [_only_in(verdict, claim.names[::-1]) for verdict in back]
        return _worst(found)
    left_value, right_value = (_measured(side) for side in (claim.left, claim.right))
    if left_value is None or right_value is None:
        read = {t for side in (claim.left, claim.right) for t in _read(side)}
        reason = "it depends on " + " and ".join(sorted(map(proofs.said_of, read)))
        return proofs.Verdict("undecided", reason=reason)
    holds = OPERATORS[claim.op](left_value, right_value)
    stated = "; ".join(
        f"{side.kind} is {_shown(side.kind, value)} at n = {side.n}"
        for side, value in ((claim.left, left_value), (claim.right, right_value))
        if isinstance(side, Quantity)
    )
    return proofs.Verdict("proved" if holds else "refuted", reason=stated)


def _only_in(verdict: Verdict, names: tuple[str, str]) -> Verdict:
    if verdict.status != "refuted":
        return verdict
    return replace(verdict, reason=f"in {names[0]}, not in {names[1]}")


def _worst(verdicts: list[Verdict]) -> Verdict:
    """The one that settles the claim: of counter-examples the smallest."""
    order = {"refuted": 0, "undecided": 1, "proved": 2}

    def key(verdict: Verdict) -> tuple[int, ...]:
        at = verdict.counter_example or {}
        return order[verdict.status], *(at.get(name, 0) for name in ("n", "q", "k"))

    return min(verdicts, key=key)


def _per_head(side: PerHead | Reach) -> tuple[tuple[Expr, Expr], ...]:
    if isinstance(side, PerHead):
        return side.groups
    from attndsl.layers.reach import reach

    return ((reach(side.of, side.layers), side.heads),)


def _measured(side: Quantity | float) -> float | None:
    if not isinstance(side, Quantity):
        return side
    if _read(side):
        return None
    if side.kind == "diameter":
        from attndsl.layers.powers import diameter

        return diameter(side.of.any_head(), side.n, side.heads)
    from attndsl.tiles.lowering import tiles_of

    blocks = tiles_of(side.of, side.n, heads=side.heads)
    pairs = blocks.nnz * (side.heads // max(1, blocks.index.shape[1]))
    return float(pairs) if side.kind == "nnz" else pairs / max(1, side.heads * blocks.nq * blocks.n)


def _read(side: Quantity | float) -> frozenset[Table]:
    """The tables in the masks of what is measured."""
    groups = side.of.groups if isinstance(side, Quantity) else ()
    return frozenset[Table]().union(*(group.relation.mask.tables for group in groups))


def _shown(kind: str, value: float) -> str:
    return f"{100 * value:.4g} %" if kind == "density" else f"{value:,.0f}"


OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
