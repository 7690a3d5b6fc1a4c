"""Assertions: what a pattern file claims of its patterns, typed, then proved or refuted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Literal

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import AttnError, Span, fail
from attndsl.expr import Expr, Table
from attndsl.language.arguments import bind_arguments_of
from attndsl.language.elaborate import Elaborator
from attndsl.language.mistakes import quoted
from attndsl.language.values import TOKENS, AttentionOf, K, Pattern, Q, Scope
from attndsl.streams import tokens_read
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.relations.proofs import Verdict


@dataclass(frozen=True)
class PerHead:
    """A relation per group of heads: mask and the truth over h and H that says which heads."""

    groups: tuple[tuple[Expr, Expr], ...]


@dataclass(frozen=True)
class Reach:
    """What layers reach, the residual stream included: the product of all (R | radius(0)).

    steps  masks, from the input on, each of so many layers
    heads  the truth over H that it is about
    """

    steps: tuple[tuple[Expr, int], ...]
    heads: Expr


@dataclass(frozen=True)
class Included:
    """`left <= right`, or `==`; `united` are the attentions that stand for all of their heads together."""

    left: PerHead | Reach
    right: PerHead | Reach
    equal: bool
    names: tuple[str, str]
    united: tuple[str, ...]


@dataclass(frozen=True)
class EveryRow:
    """No query is without a key; `united` as above."""

    of: PerHead
    united: tuple[str, ...]


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
        of = _arguments(e)["of"]
        attention = _attention(of, elaborator)
        if attention is None:
            return [EveryRow(_heads(of, elaborator), _united(of, elaborator))]
        enough = _enough(of, elaborator)
        return [
            EveryRow(PerHead(tuple([(m, ir.all_of(enough, heads)) for m, heads in attention.keyed()])), ())
        ]
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
        names, united = (left.span.text, right.span.text), _united(e, elaborator)
        return Included(relations[0], relations[1], op == "==", names, united)
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
    for side, other, at in ((a, b, right), (b, a, left)):
        if isinstance(side, Quantity) and side.kind == "density" and isinstance(other, float) and other > 1:
            help = f"write `{quoted(at)}%`" if other <= 100 and quoted(at).isdecimal() else ""
            raise fail("a density is at most 100 %", at.span, help)
    return Compared(op, a, b)


def _side(e: ast.Expression, elaborator: Elaborator) -> PerHead | Reach | Quantity | float:
    name = _called(e)
    if name == "reach":
        assert isinstance(e, ast.Call)
        if (masks := elaborator.layers_of(e)) is not None:
            return Reach(tuple((mask, len([*same])) for mask, same in groupby(masks)), ir.TRUE)
        args = _arguments(e)
        layers = elaborator.constant(args["layers"], Scope({}), TOKENS, "the number of layers")
        if layers < 0:
            raise fail(f"the number of layers is {layers}, and must not be negative", args["layers"].span)
        of = elaborator.pattern(args["of"], Scope({}, claims=True), TOKENS)
        return Reach(((of.at(Q, K, TOKENS).mask, layers),), _enough(args["of"], elaborator))
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
    elif _by_head(attention):
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
    return max((attention.enough_heads() for attention in _named(e, elaborator)), default=1)


def _named(e: ast.Expression, elaborator: Elaborator) -> Iterator[Attention]:
    parts = list(ast.walk(e))
    bound = {name.id for x in parts if isinstance(x, ast.Builder) for group in x.vars for name in group}
    called = {id(x.func) for x in parts if isinstance(x, ast.Call)}
    names = (
        x
        for x in parts
        if isinstance(x, ast.Call) or (isinstance(x, ast.Name) and id(x) not in called and x.id not in bound)
    )
    attentions = (_attention(x, elaborator) for x in names)
    yield from (attention for attention in attentions if attention is not None)


def _united(e: ast.Expression, elaborator: Elaborator) -> tuple[str, ...]:
    """The attentions with heads that differ, inside of what is more than their name."""
    sides = e.args if isinstance(e, ast.Compare) else (e,)
    inside = (side for side in sides if _attention(side, elaborator) is None)
    found = (attention for side in inside for attention in _named(side, elaborator))
    return tuple(dict.fromkeys(attention.name for attention in found if _by_head(attention)))


def _by_head(attention: Attention) -> bool:
    return len(attention.groups) > 1 or any({"h", "H"} & g.relation.mask.free for g in attention.groups)


def _enough(e: ast.Expression, elaborator: Elaborator) -> Expr:
    """Claims are about this many heads or more."""
    least = _least_heads(e, elaborator)
    return ir.le(ir.const(least), ir.var("H")) if least > 1 else ir.TRUE


def _heads(e: ast.Expression, elaborator: Elaborator) -> PerHead:
    attention, enough = _attention(e, elaborator), _enough(e, elaborator)
    if attention is not None:
        return PerHead(
            tuple(
                (tokens_read(attention.streams, group.relation.mask), ir.all_of(enough, group.heads))
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
        raise fail(
            f"an assertion of a program is proved, not {type(assertion).__name__}",
            help="write `assert a <= b` into the text: `program.assertions` has it",
        )
    verdicts = [_verdict(claim) for claim in assertion.claims]
    for status in ("refuted", "undecided"):
        for verdict in verdicts:
            if verdict.status == status:
                return verdict
    return verdicts[0]


def _verdict(claim: Claim) -> Verdict:
    found = _decided(claim)
    if found.status != "refuted" or isinstance(claim, Compared) or not claim.united:
        return found
    names = " and ".join(f"`{name}`" for name in claim.united)
    said = f"{names} stand{'s' * (len(claim.united) == 1)} for all heads together"
    return replace(found, reason=f"{found.reason}; {said}" if found.reason else said)


def _decided(claim: Claim) -> Verdict:
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
    mine, other = _measured(claim.left), _measured(claim.right)
    if mine is None or other is None:
        return proofs.Verdict("undecided", reason=_because(claim))
    stated = "; ".join(
        f"{side.kind} is {_shown(side.kind, ends)} at n = {side.n}"
        for side, ends in ((claim.left, mine), (claim.right, other))
        if isinstance(side, Quantity)
    )
    truths = {OPERATORS[claim.op](a, b) for a in mine for b in other}
    overlap = mine[0] <= other[1] and other[0] <= mine[1]
    if len(truths) > 1 or (claim.op in ("==", "!=") and overlap and len({*mine, *other}) > 1):
        return proofs.Verdict("undecided", reason=f"{stated}: {_because(claim)}")
    return proofs.Verdict("proved" if truths == {True} else "refuted", reason=stated)


def _because(claim: Compared) -> str:
    from attndsl.relations import proofs

    read = {table for side in (claim.left, claim.right) for table in _read(side)}
    return "it depends on " + " and ".join(sorted(map(proofs.said_of, read)))


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
    from attndsl.layers.reach import through

    return ((through(side.steps), side.heads),)


def _measured(side: Quantity | float) -> tuple[float, float] | None:
    """The least and the greatest value, whatever is chosen by content; None where it is not known."""
    if not isinstance(side, Quantity):
        return side, side
    if side.kind == "diameter":
        if _read(side):
            return None
        from attndsl.layers.powers import diameter

        found = diameter(side.of.any_head(), side.n, side.heads)
        return found, found
    from attndsl.tiles import lowering
    from attndsl.tiles.chosen import live_bounds

    if not _read(side):
        blocks = lowering.tiles_of(side.of, side.n, heads=side.heads)
        pairs = blocks.nnz * (side.heads // max(1, blocks.index.shape[1]))
        low, high, area = pairs, pairs, side.heads * blocks.nq * blocks.n
    elif not side.of.streams and (
        ends := live_bounds(side.of, lowering.sizes(side.of, side.n, side.n, side.heads), {})
    ):
        (low, high), area = ends, side.heads * side.n**2
    else:
        return None
    return (low, high) if side.kind == "nnz" else (low / max(1, area), high / max(1, area))


def _read(side: Quantity | float) -> frozenset[Table]:
    """The tables in the masks of what is measured."""
    groups = side.of.groups if isinstance(side, Quantity) else ()
    return frozenset[Table]().union(*(group.relation.mask.tables for group in groups))


def _shown(kind: str, ends: tuple[float, float]) -> str:
    low, high = (f"{100 * x:.4g} %" if kind == "density" else f"{x:,.0f}" for x in ends)
    return low if ends[0] == ends[1] else f"{low} to {high}"


OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}
