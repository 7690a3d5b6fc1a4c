"""Parts of masks that relate nothing, or all but nothing, or take nothing away, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.errors import AttnError, Diagnostic
from attndsl.expr import Expr
from attndsl.language.arguments import meaning
from attndsl.language.elaborate import Elaborator
from attndsl.language.mistakes import quoted
from attndsl.language.values import TOKENS, K, Num, Q, Scope
from attndsl.language.vocabulary import BUILT_IN
from attndsl.streams import Projection, Streams
from attndsl.syntax import nodes as ast

Put = Callable[[ast.Expression], ast.Expression]
"""A part of a pattern as a pattern: what stands around it with nothing beside it."""

SLOT = ir.var("?slot")
SHORT = 16
"""A length at which most masks have a pair."""
PARTS = 64
"""Of one mask that are looked at."""
JOINED = 16
"""Operands up to which each is compared with all others."""
COVERED = frozenset("blocks within grid T sym shift dilate".split())
"""What relates nothing where its last argument does not."""
LISTED = frozenset("columns rows global".split())


@dataclass(frozen=True)
class Looked:
    """What parts are asked about; `scope` has parameters left open, `streams` are those of the keys.

    least  where those whose defaults are positive are so
    """

    elaborator: Elaborator
    scope: Scope
    streams: Streams = ()
    least: Expr = ir.TRUE

    def relation(self, e: ast.Expression) -> Expr | None:
        """The mask of a pattern, where all its names are known."""
        if not free(e) <= {*self.elaborator.definitions, *BUILT_IN, *self.scope.names, *"qknhH"}:
            return None
        self.elaborator.steps = 0
        try:
            return self.elaborator.pattern(e, self.scope, TOKENS).at(Q, K, TOKENS).mask
        except AttnError:
            return None  # what has to be a constant cannot be left open

    def mask(self, e: ast.Expression) -> Expr | None:
        """The same where it reads no table, over the slots of all streams where keys are those."""
        mask = self.relation(e)
        if mask is None or mask.tables:
            return None
        return ir.any_of(*self._slots(mask)) if self.streams else mask

    def _slots(self, mask: Expr) -> Iterator[Expr]:
        for i, stream in enumerate(self.streams):
            here = ir.substitute(mask, {"stream": ir.const(i)})
            if not isinstance(stream, Projection):
                here = ir.substitute(here, {"k": stream.position(SLOT)})
            yield ir.all_of(ir.le(ir.ZERO, SLOT), ir.lt(SLOT, stream.many), here)


def looked(elaborator: Elaborator, params: Iterable[ast.Param], streams: Streams = ()) -> Looked:
    """Parameters that are numbers are left open; of the others nothing is known."""
    numbers = [(p.name, p.default.value) for p in params if isinstance(p.default, ast.Number)]
    scope = Scope({name: Num(ir.var(f"?{name}")) for name, _ in numbers})
    least = ir.all_of(*(ir.le(ir.ONE, ir.var(f"?{name}")) for name, value in numbers if value >= 1))
    return Looked(elaborator, scope.bind(stream=Num(ir.var("stream"))) if streams else scope, streams, least)


def idle_parts(e: ast.Expression, looked: Looked) -> list[Diagnostic]:
    """The least parts of a pattern that relate nothing, intersections of distances with one in common, and
    operands that take nothing away."""
    found: list[Diagnostic] = []
    left = [PARTS]

    def visit(part: ast.Expression, put: Put) -> bool:
        """Whether something was found, here or below."""
        if left[0] <= 0:
            return False
        left[0] -= 1
        below = [visit(child, _within(put, around)) for child, around in _parts(part)]
        if any(below) or _turned_off(part, looked.elaborator):
            return any(below)
        mask = looked.mask(put(part))
        told = [] if mask is None else _told(part, put, mask, looked)
        told = told or [*_needless(part, put, looked)]
        found.extend(told)
        return bool(told)

    visit(e, alone)
    return found


def _within(put: Put, around: Put) -> Put:
    return lambda x: put(around(x))


def _told(part: ast.Expression, put: Put, mask: Expr, looked: Looked) -> list[Diagnostic]:
    joined = part.pred if isinstance(part, ast.Builder) else part
    crossed = ""
    if isinstance(joined, ast.Nary) and joined.op in ("&", "and"):
        crossed = _crossed([(child, put(around(child))) for child, around in _parts(part)], looked)
    if never(mask):
        help = crossed or _chained(part) or _meaning(part, looked)
        return [Diagnostic("no pair satisfies this", part.span, help, "warning")]
    if crossed:
        return [Diagnostic("each query has only itself in this", part.span, crossed, "warning")]
    return []


def _chained(part: ast.Expression) -> str:
    """What a chain says in which two numbers are compared, as in `q > 100 == 0`; empty for others."""
    for node in (node for node in ast.walk(part) if isinstance(node, ast.Compare)):
        pairs = [*zip(node.ops, node.args, node.args[1:], strict=False)]
        if any(isinstance(a, ast.Number) and isinstance(b, ast.Number) for _, a, b in pairs[1:]):
            return f"this is `{' and '.join(f'{quoted(a)} {op} {quoted(b)}' for op, a, b in pairs)}`"
    return ""


def _needless(part: ast.Expression, put: Put, looked: Looked) -> Iterator[Diagnostic]:
    """The first operand that all pairs of the others satisfy, or none where it is taken off. `causal` beside
    what is causal is no mistake, nor is a bound that all positions keep."""
    from attndsl.relations.proofs import follows

    joined = part.pred if isinstance(part, ast.Builder) else part
    off = isinstance(joined, ast.Binary) and joined.op == "-"
    met = isinstance(joined, ast.Nary) and joined.op in ("&", "and") and len(joined.args) <= JOINED
    if looked.streams or not (off or met):
        return  # a key has a position in each of the streams
    operands = [(arg, looked.mask(put(around(arg))), around(arg)) for arg, around in _parts(part)]
    if off and (last := operands[1][1]) is not None:
        operands[1] = (operands[1][0], ir.negate(last), operands[1][2])
    for i, (arg, mask, itself) in enumerate(operands):
        if mask is None or (off and i == 0):
            continue
        beside = [other for j, (_, other, _) in enumerate(operands) if other is not None and j != i]
        others = ir.all_of(looked.least, *beside)
        if not _takes_nothing(mask, others) or any(map(_is_a_side, (mask, looked.mask(itself)))):
            continue
        turned, help = _turned(mask), "leave it out"
        alike = _takes_nothing(turned, others) or follows(ir.all_of(turned, others), ir.eq(Q, K))
        if _of_distance(mask) and not alike:
            help = f"distances are k - q, below 0 for keys before the query: {_mirrored(arg)}"
        yield Diagnostic("this takes nothing away from what stands beside it", arg.span, help, "warning")
        return


def _takes_nothing(mask: Expr, others: Expr) -> bool:
    from attndsl.meaning.pointwise import partial
    from attndsl.relations.proofs import follows

    if not mask.free & {"q", "k"} or partial(mask) or partial(others):
        return False
    return follows(others, mask) and not follows(ir.TRUE, mask)


def _is_a_side(mask: Expr | None) -> bool:
    """Whether it says no more than that keys stand before or after the query."""
    from attndsl.relations.proofs import follows

    if mask is None:
        return False
    sides = ((ir.lt(K, Q), ir.le(K, Q)), (ir.lt(Q, K), ir.le(Q, K)))
    return any(follows(least, mask) and follows(mask, most) for least, most in sides)


def _turned(mask: Expr) -> Expr:
    return ir.substitute(mask, {"q": K, "k": Q})


def never(mask: Expr) -> bool:
    """Whether it is proved that no pair satisfies this at any length."""
    from attndsl.relations.proofs import follows
    from attndsl.relations.relation import domain

    return follows(ir.all_of(domain(*(x for x in ("h", "H") if x in mask.free)), mask), ir.FALSE)


def relates_nothing(attention: Attention) -> bool:
    """Whether it is proved that no query has a key, at any length, in any head."""
    from attndsl.meaning.pointwise import evaluate, partial

    keyed = attention.keyed()
    n = np.arange(SHORT)
    for mask, _ in keyed:
        # most have a pair early, and need no proof
        if mask.free <= {*"qkn"} and not partial(mask):
            at = ir.substitute(mask, {"n": ir.const(SHORT)})
            if evaluate(at, n[:, None], n[None, :]).any():
                return False
    return not any(mask.tables for mask, _ in keyed) and all(never(ir.all_of(*pair)) for pair in keyed)


def _crossed(operands: list[tuple[ast.Expression, ast.Expression]], looked: Looked) -> str:
    """The edit where two operands relate distances of which 0 alone, or none, is in both; each is given with
    the pattern that it is."""
    from attndsl.relations.proofs import follows

    itself = ir.eq(Q, K)
    masks = [(arg, looked.mask(pattern)) for arg, pattern in operands]
    by_distance = [(arg, mask) for arg, mask in masks if mask is not None and _of_distance(mask)]
    wide = [(arg, mask) for arg, mask in by_distance if not follows(mask, itself)]
    for (a, one), (b, other) in combinations(wide, 2):
        if not follows(ir.all_of(one, other), itself):
            continue
        # a definition that is named means what it says
        for arg, mask, against in sorted(((b, other, one), (a, one, other)), key=lambda x: _named(x[0])):
            if not follows(ir.all_of(_turned(mask), against), itself):
                return f"distances are k - q, below 0 for keys before the query: {_mirrored(arg)}"
    return ""


def _named(e: ast.Expression) -> bool:
    return isinstance(e, ast.Name)


def _of_distance(mask: Expr) -> bool:
    """Whether it is proved that positions matter by their distance alone."""
    from attndsl.relations.proofs import follows

    moved = ir.substitute(mask, {"q": ir.add(Q, SLOT), "k": ir.add(K, SLOT)})
    return not mask.free & {"h", "H", "n"} and follows(mask, moved)


def _mirrored(e: ast.Expression) -> str:
    match e:
        case ast.Call(ast.Name("band"), (ast.Argument("", ast.Range(lo, hi)), *_)):
            return f"write `band({_negative(hi)}..{_negative(lo)})`"
        case ast.Call(ast.Name("T"), (ast.Argument(value=turned),)):
            return f"write `{quoted(turned)}`"
        case ast.Builder(_, ast.Compare() as inner) | ast.Unary("~", inner):
            return _mirrored(inner)
        case ast.Compare() | ast.Unary("not") | ast.Nary("and" | "or") | ast.Index():
            return f"exchange query and key in `{quoted(e)}`"
    return f"write `T({quoted(e)})`"


def _negative(e: ast.Expression) -> str:
    match e:
        case ast.Number(value):
            return str(-value)
        case ast.Unary("-", arg):
            return quoted(arg)
    return f"-{quoted(e, tight=True)}"


def _turned_off(part: ast.Expression, elaborator: Elaborator) -> bool:
    """Whether it relates nothing on purpose, as a condition on a `let` may, or is told as an empty range."""
    match part:
        case ast.Name("none"):
            return True
        case ast.Nary("and", args):
            return any(free(arg) <= elaborator.definitions.keys() for arg in args)
        case ast.Compare() | ast.Unary("not"):
            return free(part) <= elaborator.definitions.keys()
    return any(map(_without_members, ast.walk(part)))


def _without_members(node: ast.Node) -> bool:
    match node:
        case ast.SetList(()):
            return True
        case ast.Range(ast.Number(lo), ast.Number(hi)):
            return lo > hi
    return False


def _parts(e: ast.Expression) -> Iterator[tuple[ast.Expression, Put]]:
    match e:
        case ast.Nary("&" | "|" | "+" | "and" | "or", args):
            yield from ((arg, alone) for arg in args)
        case ast.Binary("-" | "@", left, right):
            yield from ((left, alone), (right, alone))
        case ast.Unary("~" | "not", arg):
            yield arg, alone
        case ast.Builder(_, pred):
            for part, around in _parts(pred):
                yield part, _within(around_condition(e), around)
        case ast.Compare(("in",), (position, ast.SetList(items))):
            for item in items if len(items) > 1 else ():
                yield ast.SetList((item,), span=item.span), lambda x: replace(e, args=(position, x))
        case ast.Call(ast.Name(name), (*before, ast.Argument("" | "R", last) as final)) if name in COVERED:
            yield last, lambda x: replace(e, args=(*before, replace(final, value=x)))
        case ast.Call(ast.Name(name), (ast.Argument(value=ast.SetList(items)) as only,)) if name in LISTED:
            for item in items if len(items) > 1 else ():
                one = ast.SetList((item,), span=item.span)
                yield one, lambda x: replace(e, args=(replace(only, value=x),))


def alone(e: ast.Expression) -> ast.Expression:
    """The place of a part that nothing stands around."""
    return e


def around_condition(e: ast.Builder) -> Put:
    """The place of a part of its condition."""
    return lambda x: replace(e, pred=x)


def free(e: ast.Node) -> frozenset[str]:
    """The names that an expression leaves to what is around it."""
    if isinstance(e, ast.Builder):
        return free(e.pred) - {name.id for group in e.vars for name in group}
    if isinstance(e, ast.Name):
        return frozenset({e.id})
    return frozenset().union(*map(free, ast.children(e)))


def _meaning(e: ast.Expression, looked: Looked) -> str:
    """What the definition says that is called, in its own words, and which streams there are."""
    if "stream" in free(e):
        return f"the last of its keys is stream {len(looked.streams) - 1}"
    called = e.func if isinstance(e, ast.Call) else e
    definition = looked.elaborator.definitions.get(called.id) if isinstance(called, ast.Name) else None
    return meaning(definition) if definition is not None and definition.doc else ""
