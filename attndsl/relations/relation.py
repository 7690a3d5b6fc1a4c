"""Masks as integer relations: exact for every n where a mask is quasi-affine, else bounded from both sides.

A number or truth that isl cannot hold (a table, a product of variables, a drawn link) is an *unknown term*:
a variable of its own beside q and k. This is sound because every question here is about one point at a time:
what holds at (n, q, k) for all values of its terms holds for those that the tables give. Where a bound
variable is projected out, so are the terms that depend on it: some values of them bound the truth from above,
all values from below. What is known of a term whatever the table (two reads of one entry agree) only narrows
the values. The converse fails: values of terms need not fit together into tables, so a point found proves
nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import islpy as isl
import numpy as np
from numpy.typing import NDArray

from attndsl.errors import AttnError, fail
from attndsl.expr import (
    ONE,
    TRUE,
    ZERO,
    Expr,
    IntSet,
    Table,
    add,
    all_of,
    any_of,
    const,
    eq,
    floordiv,
    le,
    lt,
    mul,
    negate,
    nodes,
    rebuild,
    sub,
    substitute,
    var,
)

DISJUNCTS = 300
"""Conjunctions in one union."""
DIVISIONS = 8
"""Roundings (`//` and `mod`) in one conjunction."""
PIECES = 64
"""Pieces of one number written with `min`, `max`, `where`, absolute values."""
PERIOD = 2**62
"""Least common multiple of the divisors in one comparison."""
RELATED_TERMS = 8
"""Unknown terms whose pairs are related to each other: more are left independent, which only proves less."""
OPERATIONS = 1_000_000
"""isl's own count for one question; it bounds no time, the limits above do."""

OTHER = {"rank_of": "count_of", "count_of": "rank_of"}
LEADING = ("n", "H", "h", "q", "k")
"""Dimensions in the order in which a counter-example is made small."""


@functools.cache
def domain(*names: str) -> Expr:
    """The range of these variables: positions in 0..n-1, any n, heads h of any H."""
    n, heads = var("n"), all_of(le(ZERO, var("h")), lt(var("h"), var("H")))
    ranges = {x: all_of(le(ZERO, var(x)), lt(var(x), n)) for x in "qk"}
    ranges |= {"n": le(ZERO, n), "nq": eq(var("nq"), n), "h": heads, "H": lt(ZERO, var("H"))}
    return all_of(*(ranges[name] for name in names if name in ranges))


@dataclass(frozen=True)
class Term:
    """An unknown number, or truth as 0 or 1, that the variable `name` stands for.

    `args` are its integer arguments, themselves abstracted: equal functions of equal arguments are equal.
    """

    name: str
    expr: Expr
    args: tuple[Expr, ...]

    @property
    def function(self) -> tuple[object, ...]:
        return self.expr.op, self.expr.value, *(self.expr.args[4:] if self.expr.op == "random" else ())

    @property
    def free(self) -> frozenset[str]:
        """The variables that its value depends on."""
        return self.expr.free


class Abstraction:
    """Expressions with each unknown term replaced by a variable; `terms` may hold some that none mentions."""

    def __init__(self, related: bool = True) -> None:
        self.related = related
        self.terms: dict[str, Term] = {}
        self.calls: dict[tuple[object, ...], Term] = {}
        self.done: dict[Expr, Expr] = {}

    def __call__(self, e: Expr) -> Expr:
        for node in nodes(e):
            if node not in self.done:
                self.done[node] = self.abstract(node)
        return self.done[e]

    def abstract(self, e: Expr) -> Expr:
        if e.op in ("const", "var"):
            return e
        if e.op == "random":
            q, k, n, _, of = e.args
            _, row, col = cast("tuple[int, str, str]", e.value)
            eligible = substitute(of, {row: q, col: k})
            return all_of(self.unknown(e, e.args[:4]), self(eligible), self(le(ZERO, k)), self(lt(k, n)))
        if any(arg.type not in ("int", "bool") for arg in e.args):
            return self.unknown(e, ())
        if e.op == "eq" and e.args[0].type == "bool":
            a, b = self(e.args[0]), self(e.args[1])
            return any_of(all_of(a, b), all_of(negate(a), negate(b)))
        args = [self.done[arg] for arg in e.args]
        truth = e.type == "bool" and not isinstance(e.value, Table)
        if not (truth or self.affine(e, args)):
            return self.unknown(e, e.args)
        if isinstance(e.value, IntSet) and len(e.value.intervals) > PIECES:
            return self.unknown(e, e.args)
        return rebuild(e, tuple(args))

    def affine(self, e: Expr, args: list[Expr]) -> bool:
        if e.op == "lookup" and isinstance(e.value, Table):
            known = e.value.known
            return known is not None and e.value.dtype == "int" and 0 < len(rises(known)) <= PIECES
        if e.op == "mul":
            return any(arg.op == "const" for arg in args)
        if e.op in ("floordiv", "mod"):
            return args[1].op == "const"
        if e.op == "where":
            # a condition that is only bounded from both sides would make the number a range
            condition = list(nodes(args[0]))
            return not (
                any(x.op == "exists" for x in condition) and any(x.value in self.terms for x in condition)
            )
        return e.op in ("add", "min", "max", "abs")

    def unknown(self, e: Expr, args: tuple[Expr, ...]) -> Expr:
        plain = tuple([self(arg) for arg in args]) if all(arg.type == "int" for arg in args) else ()
        if e.op == "mul":
            plain = tuple(sorted(plain, key=id))
        term = Term(f"?{len(self.terms)}", e, plain)
        if plain:
            term = self.calls.setdefault((term.function, plain), term)
        self.terms[term.name] = term
        name = var(term.name)
        return eq(name, ONE) if e.type == "bool" else name

    def scope(self, e: Expr) -> set[str]:
        """Names of the terms that `e` mentions, directly or as an argument of a term."""
        found: set[str] = set()
        todo = [e]
        while todo:
            new = (todo.pop().free & self.terms.keys()) - found
            found |= new
            todo += [arg for name in new for arg in self.terms[name].args]
        return found

    def facts(self, names: Iterable[str]) -> Iterator[Expr]:
        """What holds of terms whatever the tables."""
        terms = sorted((self.terms[name] for name in names), key=lambda term: term.name)
        for term in terms:
            yield from _facts(term)
        if len(terms) > RELATED_TERMS or not self.related:
            return
        for a, b in combinations(terms, 2):
            x, y = var(a.name), var(b.name)
            if a.args and a.function == b.function:
                differ = (negate(eq(i, j)) for i, j in zip(a.args, b.args, strict=True))
                yield any_of(*differ, eq(x, y))
            if (a.args, a.expr.value, a.expr.op) == (b.args, b.expr.value, OTHER.get(b.expr.op)):
                yield lt(x, y) if a.expr.op == "rank_of" else lt(y, x)
        yield from self._ranks(terms)

    def _ranks(self, terms: list[Term]) -> Iterator[Expr]:
        """Among equal entries of a table, ranks are in the order of the positions."""
        rows = {(t.expr.value, t.args): var(t.name) for t in terms if t.expr.op == "lookup"}
        ranks = [t for t in terms if t.expr.op == "rank_of"]
        for a, b in combinations(ranks, 2):
            i, j = rows.get((a.expr.value, a.args)), rows.get((b.expr.value, b.args))
            if a.function == b.function and a.args[:-1] == b.args[:-1] and i is not None and j is not None:
                x, y = sub(var(a.name), var(b.name)), sub(a.args[-1], b.args[-1])
                same = any_of(
                    all_of(le(ONE, x), le(x, y)),
                    all_of(eq(x, ZERO), eq(y, ZERO)),
                    all_of(le(y, x), lt(x, ZERO)),
                )
                yield any_of(negate(eq(i, j)), same)


def _facts(term: Term) -> Iterator[Expr]:
    x, op, table = var(term.name), term.expr.op, term.expr.value
    known = table.known if isinstance(table, Table) and op == "lookup" else None
    if term.expr.type == "bool":
        yield le(ZERO, x)
        yield le(x, ONE)
    elif known is not None and len(known):
        yield le(const(int(known.min())), x)
        yield le(x, const(int(known.max())))
    elif op in ("isqrt", "log2", "rank_of"):
        yield le(ZERO, x)
    elif op == "count_of":
        yield le(ONE, x)
    elif op == "mod" and term.args:
        yield le(ZERO, x)
        yield lt(x, term.args[1])
    if term.expr.op == "inset":
        members = term.expr.value
        assert isinstance(members, IntSet)
        low, high = members.intervals[0][0], members.intervals[-1][1]
        inside = all_of(le(const(low), term.args[0]), le(term.args[0], const(high)))
        yield any_of(eq(x, ZERO), inside)


class Translation:
    """Sets over one space: leading variables, other variables, unknown terms, each a set dimension.

    `known` holds of the free variables of every expression translated. `related` says whether pairs of terms
    are related to each other: without, less is proved, sooner.
    """

    def __init__(self, root: Expr, known: Expr = TRUE, related: bool = True) -> None:
        self.abstraction = Abstraction(related)
        # whatever holds for every table holds for every batch row
        root = substitute(root, {"b": ZERO})
        self.root = self.abstraction(root)
        self.terms = self.abstraction.scope(self.root)
        used = known.free | {str(x.value) for x in nodes(self.root) if x.op == "var"}
        used |= {str(x.value) for x in nodes(self.root) if x.op == "exists"}
        used |= {v for name in self.terms for arg in self.abstraction.terms[name].args for v in arg.free}
        self.free = root.free | known.free
        leading = [x for x in LEADING if x in used & self.free]
        self.names = leading + sorted(used - {*leading})
        self.position = {name: i for i, name in enumerate(self.names)}
        self.tables = root.tables
        self.space = isl.Space.set_alloc(isl.DEFAULT_CONTEXT, 0, len(self.names))
        self.local = isl.LocalSpace.from_space(self.space)
        self.numbers: dict[Expr, isl.PwAff] = {}
        self.projections: dict[tuple[Expr, bool], isl.Set] = {}
        self.base = self.meet(isl.Set.universe(self.space), known, True, True)

    @property
    def exact(self) -> bool:
        return not self.terms

    def meet(self, context: isl.Set, e: Expr, positive: bool, upper: bool) -> isl.Set:
        """The part of `context` where `e` holds (or fails, if not `positive`), from above or from below."""
        if context.plain_is_empty():
            return context
        if e.op == "not":
            return self.meet(context, e.args[0], not positive, upper)
        if e.op == "const":
            return context if e.value == positive else isl.Set.empty(self.space)
        if e.op in ("and", "or"):
            parts = sorted(e.args, key=lambda part: part.depth)
            if (e.op == "and") == positive:
                for part in parts:
                    context = self.meet(context, part, positive, upper)
                return context
            union = isl.Set.empty(self.space)
            for part in parts:
                union = limited(union.union(self.meet(context, part, positive, upper)))
            return union.coalesce()
        if e.op == "exists":
            found = self.projection(e, upper == positive)
            return limited(context.intersect(found) if positive else context.subtract(found))
        return limited(context.intersect(self.comparison(e, positive)))

    def comparison(self, e: Expr, positive: bool) -> isl.Set:
        divisors = {x for x in nodes(e) if x.op in ("floordiv", "mod")}
        if len(divisors) > DIVISIONS:
            raise _beyond(f"{len(divisors)} roundings in one comparison", DIVISIONS)
        if math.lcm(*(int(x.args[1].value) for x in divisors)) > PERIOD:  # type: ignore[call-overload]
            raise _beyond("the common period of the divisors in one comparison", PERIOD)
        if e.op == "inset":
            assert isinstance(e.value, IntSet)
            return self.member(self.number(e.args[0]), e.value if positive else _gaps(e.value))
        a, b = self.number(e.args[0]), self.number(e.args[1])
        if e.op == "le":
            return a.le_set(b) if positive else a.gt_set(b)
        if e.op == "lt":
            return a.lt_set(b) if positive else a.ge_set(b)
        assert e.op == "eq", e
        return a.eq_set(b) if positive else a.ne_set(b)

    def member(self, a: isl.PwAff, members: list[tuple[int | None, int | None]] | IntSet) -> isl.Set:
        union = isl.Set.empty(self.space)
        for lo, hi in members.intervals if isinstance(members, IntSet) else members:
            part = isl.Set.universe(self.space)
            if lo is not None:
                part = part.intersect(a.ge_set(self.constant(lo)))
            if hi is not None:
                part = part.intersect(a.le_set(self.constant(hi)))
            union = union.union(part)
        return union

    def constant(self, value: int) -> isl.PwAff:
        return isl.PwAff.from_aff(isl.Aff.val_on_domain(self.local, _val(value)))

    def number(self, e: Expr) -> isl.PwAff:
        if e not in self.numbers:
            result = self.arithmetic(e)
            if result.n_piece() > PIECES:
                raise _beyond("pieces of one number", PIECES)
            self.numbers[e] = result
        return self.numbers[e]

    def arithmetic(self, e: Expr) -> isl.PwAff:
        if e.op == "const":
            return self.constant(int(e.value))  # type: ignore[call-overload]
        if e.op == "var":
            position = self.position[str(e.value)]
            return isl.PwAff.from_aff(isl.Aff.var_on_domain(self.local, isl.dim_type.set, position))
        if e.op == "where":
            yes = self.meet(isl.Set.universe(self.space), e.args[0], True, True)
            no = isl.Set.universe(self.space).subtract(yes)
            a, b = self.number(e.args[1]).intersect_domain(yes), self.number(e.args[2]).intersect_domain(no)
            return a.union_add(b)
        a = self.number(e.args[0])
        if isinstance(e.value, Table):
            pieces = isl.PwAff.empty(a.get_space())
            assert e.value.known is not None
            for first, last, step in rises(e.value.known):
                at = a.ge_set(self.constant(first)).intersect(a.le_set(self.constant(last)))
                start = int(e.value.known[first]) - step * first
                value = a.scale_val(_val(step)).add(self.constant(start))
                pieces = pieces.union_add(value.intersect_domain(at))
            return pieces
        if e.op == "abs":
            return a.max(a.neg())
        if e.op == "mul":
            return self.number(e.args[1]).scale_val(_val(e.args[0].value))
        if e.op == "floordiv":
            return a.scale_down_val(_val(e.args[1].value)).floor()
        if e.op == "mod":
            return a.mod_val(_val(e.args[1].value))
        for arg in e.args[1:]:
            b = self.number(arg)
            a = a.add(b) if e.op == "add" else a.min(b) if e.op == "min" else a.max(b)
        return a

    def projection(self, e: Expr, upper: bool) -> isl.Set:
        """Where some value of the bound variable makes the body true, from above or from below."""
        if (e, upper) not in self.projections:
            m, (lo, hi, body) = str(e.value), e.args
            scope = self.abstraction.scope(e) | self.abstraction.scope(body)
            hidden = {name for name in scope if m in self.abstraction.terms[name].free}
            domain = self.meet(self.base, all_of(le(lo, var(m)), lt(var(m), hi)), True, True)
            facts = all_of(*(f for f in self.abstraction.facts(scope) if f.free & hidden))
            if upper or not hidden:
                inside = self.meet(self.meet(domain, body, True, upper), facts, True, True)
            else:
                outside = self.meet(self.meet(domain, body, False, True), facts, True, True)
                inside = limited(domain.subtract(self.hide(outside, hidden)))
            self.projections[e, upper] = self.hide(inside, {m, *hidden})
        return self.projections[e, upper]

    def hide(self, s: isl.Set, names: Iterable[str]) -> isl.Set:
        """Projected along these dimensions, which stay in the space."""
        for name in names:
            if name in self.position:
                s = s.eliminate(isl.dim_type.set, self.position[name], 1)
        return limited(s.coalesce())

    def outside(self, e: Expr, context: isl.Set) -> isl.Set:
        """The part of `context` where `e` has no meaning: it reads a list beyond its entries."""
        found = isl.Set.empty(self.space)
        if not any(isinstance(node.value, Table) for node in nodes(e)):
            return found
        if e.op == "exists":
            m, (lo, hi, body) = str(e.value), e.args
            inside = self.meet(context, all_of(le(lo, var(m)), lt(var(m), hi)), True, True)
            return self.hide(self.outside(body, inside), [m])
        for arg in e.args:
            found = limited(found.union(self.outside(arg, context)))
            if e.op == "and":
                context = self.meet(context, arg, True, True)
        if isinstance(e.value, Table):
            a, end = self.number(e.args[0]), int(e.value.dims[0])
            beyond = a.lt_set(self.constant(0)).union(a.ge_set(self.constant(end)))
            found = limited(found.union(context.intersect(beyond)))
        return found

    def expression(self, s: isl.Set) -> Expr:
        """The truth of being in `s`, without bound variables."""
        parts = s.compute_divs().coalesce().get_basic_sets()
        return any_of(*(self.conjunction(part) for part in parts))

    def conjunction(self, part: isl.BasicSet) -> Expr:
        variables = [var(name) for name in self.names]
        local = part.get_local_space()
        roundings: list[Expr] = []
        for i in range(part.dim(isl.dim_type.div)):
            inner, denominator = _linear(local.get_div(i), variables, roundings)
            roundings.append(floordiv(inner, const(denominator)))
        truths = []
        for constraint in part.get_constraints():
            value, _ = _linear(constraint.get_aff(), variables, roundings)
            truths.append(eq(value, ZERO) if constraint.is_equality() else le(ZERO, value))
        return all_of(*truths)

    def where(self, positive: bool) -> isl.Set:
        """Over-approximation, terms included, of where the root holds or fails, inside `known`.

        Where a list is read beyond its entries it does neither; that is left in beside unknown terms.
        """
        found = self.meet(self.base, self.root, positive, True)
        if self.exact:
            found = limited(found.subtract(self.outside(self.root, self.base)))
        for fact in self.abstraction.facts(self.terms):
            if found.is_empty():
                return found
            found = self.meet(found, fact, True, True)
        return found


def rises(entries: NDArray[Any]) -> list[tuple[int, int, int]]:
    """The entries first..last that rise by a step, piece by piece; beyond PIECES only that there are more."""
    # Python's integers: steps may leave 64 bits
    steps = np.diff(entries.astype(object))
    turns = np.flatnonzero(np.diff(steps)) + 1
    found, first = list[tuple[int, int, int]](), 0
    while first < len(entries) and len(found) <= PIECES:
        turn = np.searchsorted(turns, first, side="right")
        last = int(turns[turn]) if turn < len(turns) else len(steps)
        found.append((first, last, steps[first] if last > first else 0))
        first = last + 1
    return found


def limited(s: isl.Set) -> isl.Set:
    if s.n_basic_set() > DISJUNCTS:
        s = s.coalesce()
    if s.n_basic_set() > DISJUNCTS:
        raise _beyond("cases to tell apart", DISJUNCTS)
    if max((part.dim(isl.dim_type.div) for part in s.get_basic_sets()), default=0) > DIVISIONS:
        raise _beyond("roundings in one conjunction", DIVISIONS)
    return s


def _beyond(what: str, limit: int) -> AttnError:
    return fail(f"too large to decide for every n: {what}, limit {limit}")


def _val(value: object) -> isl.Val:
    return isl.Val(str(value))


def whole(value: isl.Val) -> int:
    """The integer that isl holds."""
    text = value.to_str()
    if text is None:
        raise isl.Error("the quota ended while it was written")
    return int(text)


def _linear(a: isl.Aff, variables: list[Expr], roundings: list[Expr]) -> tuple[Expr, int]:
    """x and c such that `a` is x / c: an integer sum and a positive denominator."""
    scale = whole(a.get_denominator_val())
    a = a.scale_val(_val(scale))
    total = [const(whole(a.get_constant_val()))]
    for kind, values in ((isl.dim_type.in_, variables), (isl.dim_type.div, roundings)):
        for i, value in enumerate(values):
            total.append(mul(const(whole(a.get_coefficient_val(kind, i))), value))
    return add(*total), scale


def _gaps(members: IntSet) -> list[tuple[int | None, int | None]]:
    ends = [None, *(hi + 1 for _, hi in members.intervals)]
    starts = [*(lo - 1 for lo, _ in members.intervals), None]
    return list(zip(ends, starts, strict=True))


@contextmanager
def quota() -> Iterator[None]:
    """isl under a limit on its operations, one for all questions nested inside: beyond it, AttnError."""
    context = isl.DEFAULT_CONTEXT
    outermost = context.get_max_operations() == 0
    if outermost:
        context.set_max_operations(OPERATIONS)
    try:
        yield
    except isl.Error:
        raise fail("too large to decide for every n: the integer set library gave up") from None
    finally:
        if outermost:
            context.set_max_operations(0)
            context.reset_operations()


def is_affine(mask: Expr) -> bool:
    """Whether `mask` is an integer relation, exact for every n, and reads no list beyond its entries."""
    abstraction = Abstraction()
    if abstraction.scope(abstraction(mask)):
        return False
    if not any(isinstance(node.value, Table) for node in nodes(mask)):
        return True
    try:
        with quota():
            space = Translation(mask, domain("n", "q", "k", *mask.free))
            return bool(space.outside(space.root, space.base).is_empty())
    except AttnError:
        return False


def bounds(mask: Expr) -> tuple[isl.Set, isl.Set]:
    """Sets { [q, k] } over the parameters n and what else `mask` mentions, such that, whatever the tables,
    the first lies inside the mask and the second around it; equal where the mask is affine.

    Positions are in 0..n-1, heads in 0..H-1. Raises AttnError beyond a limit.
    """
    with quota():
        space = Translation(mask, domain("n", "q", "k", *mask.free))
        over = space.hide(space.where(True), space.terms)
        under = (
            over if space.exact else limited(space.base.subtract(space.hide(space.where(False), space.terms)))
        )
        return _over_positions(under, space), _over_positions(over, space)


def around(mask: Expr) -> tuple[Expr, Expr]:
    """Affine masks that are inside and around `mask` for positions in 0..n-1, whatever the tables.

    Raises AttnError beyond a limit.
    """
    with quota():
        space = Translation(mask, domain("n", "q", "k", *mask.free))
        held, failed = (space.hide(space.where(positive), space.terms) for positive in (True, False))
        return negate(space.expression(failed)), space.expression(held)


def to_set(mask: Expr) -> isl.Set:
    """The set of an affine mask, as in `bounds`."""
    if not is_affine(mask):
        raise fail("the pattern is not an integer relation")
    return bounds(mask)[1]


def _over_positions(s: isl.Set, space: Translation) -> isl.Set:
    """The dimensions q and k of a set of `space`, its other free variables as parameters."""
    names = list(space.names)
    for position, name in reversed(list(enumerate(space.names))):
        if name in ("q", "k"):
            continue
        if name in space.free:
            s = s.set_dim_name(isl.dim_type.set, position, name)
            s = s.move_dims(isl.dim_type.param, 0, isl.dim_type.set, position, 1)
        else:
            s = s.project_out(isl.dim_type.set, position, 1)
        names.remove(name)
    return s.set_dim_name(isl.dim_type.set, 0, "q").set_dim_name(isl.dim_type.set, 1, "k")


def distances(mask: Expr, known: Expr) -> Expr | None:
    """A truth over d = k - q that `mask` equals wherever `known` holds, if there is one within limits."""
    if not is_affine(mask) or not mask.free <= {"n", "q", "k"}:
        return None
    apart = sub(var("k"), var("q"))
    try:
        with quota():
            space = Translation(all_of(mask, eq(var("d"), apart)), known)
            others = [name for name in space.names if name != "d"]
            held = space.expression(space.hide(space.where(True), others))
            beyond = Translation(all_of(substitute(held, {"d": apart}), negate(mask)), known)
            return held if beyond.where(True).is_empty() else None
    except AttnError:
        return None


POSITIONS = domain("n", "k")


def eliminate(mask: Expr, known: Expr = POSITIONS) -> Expr:
    """`mask` with its `exists` written without a bound variable where they are affine and within limits.

    n stays symbolic. The result agrees with `mask` wherever `known`, a truth over its free variables, holds.
    """
    done: dict[Expr, Expr] = {}

    def visit(e: Expr) -> Expr:
        if e not in done:
            done[e] = (_projected(e, known) if e.op == "exists" else None) or rebuild(
                e, tuple([visit(arg) for arg in e.args])
            )
        return done[e]

    with quota():
        return visit(mask)


def _projected(e: Expr, known: Expr) -> Expr | None:
    """`e` without its bound variable; None beyond a limit: slower to tile with it, no less right."""
    if not is_affine(e):
        return None
    try:
        with quota():
            space = Translation(e, known)
            if space.root.op != "exists":
                return space.root
            found = space.projection(space.root, True)
            return space.expression(found.intersect(space.base).coalesce().gist(space.base))
    except AttnError:
        return None
