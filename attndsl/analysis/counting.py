"""How many pairs are live: a closed form in n, with the lengths from which it holds.

The live pairs of an affine mask are the integer points of polygons whose sides move linearly with n. Where
no three sides meet any more, the count is a quasi-polynomial of degree 2: for each residue of n modulo some
p one polynomial (Ehrhart; Clauss, ICS 1996). Both that length and p are read off the sides, so three exact
counts per residue determine it: nothing is guessed from samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, cast

import islpy as isl
import numpy as np
from numpy.typing import NDArray

from attndsl.errors import AttnError, fail
from attndsl.expr import (
    FALSE,
    ONE,
    TRUE,
    ZERO,
    Expr,
    add,
    all_of,
    const,
    le,
    lt,
    mul,
    negate,
    nodes,
    number,
    sub,
    substitute,
    var,
)
from attndsl.meaning.pointwise import evaluate
from attndsl.relations.relation import around, is_affine, quota, to_set, whole
from attndsl.tiles.lowering import quantifier_free
from attndsl.tiles.tiling import live_pairs, replaced, tile

if TYPE_CHECKING:
    import sympy

Counts = NDArray[Any]

PIECES = 4
"""Pieces in the residue that a formula may have."""
RESIDUES = 2**16
"""Largest period: so many polynomials are fitted."""
LONGEST = 2**22
"""Most lengths counted in one pass, where n only bounds the positions."""
TRIED = 600
"""Most lengths counted one at a time."""
DESCENT = 64
"""Most lengths then looked at below the first, to see from where the form holds."""
SIDES = 48
"""Directions of sides: each three of them are looked at."""


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """c(n) = (a[r] f^2 + b[r] f + c[r]) / 2 with f = n // p and r = n mod p, for every n >= start.

    doubled: Python integers [3, p], the rows a, b and c.
    causal, p = 1:                  1 | 1 | 0            (f^2 + f) / 2,  f = n
    causal, every other key, p = 2: 2 2 | 2 4 | 0 2      f^2 + f for n = 2 f,  f^2 + 2 f + 1 for n = 2 f + 1
    """

    start: int
    period: int
    doubled: Counts

    def __call__(self, n: int) -> int:
        f, r = divmod(n, self.period)
        a, b, c = self.doubled[:, r]
        return int((a * f * f + b * f + c) // 2)

    @property
    def degree(self) -> int:
        """2, 1 or 0: the growth with n."""
        return max((d for d in (2, 1) if self.doubled[2 - d].any()), default=0)

    @cached_property
    def pieces(self) -> tuple[int, list[int]]:
        """An origin o, and where the pieces in the residue of n - o begin: the fewest that were found."""
        first = _segments(self.doubled)
        origins = [0, *first[1:]] if len(first) > 1 else [0]
        found = [(o, _segments(_moved(self.doubled, o))) for o in origins[: 4 * PIECES]]
        return min(found, key=lambda pair: len(pair[1]))

    @cached_property
    def formula(self) -> str | None:
        """One expression in n, `floor` and `Mod`, which sympy reads; None where it has too many pieces."""
        origin, starts = self.pieces
        if len(starts) > PIECES:
            return None
        import sympy

        n, moved = sympy.Symbol("n"), _moved(self.doubled, origin)
        shifted = n - origin
        quotient, residue = sympy.floor(shifted / self.period), sympy.Mod(shifted, self.period)
        parts = [
            _polynomial(moved, start, end)
            for start, end in zip(starts, [*starts[1:], self.period], strict=True)
        ]
        if self.period == 1:
            return str(_shortest(parts[0].subs({"f": n, "r": 0})))
        f, r = sympy.symbols("f r")
        written = []
        for part in parts:
            by_quotient = sympy.expand(part.subs(r, shifted - self.period * f)).subs(f, quotient)
            by_residue = sympy.expand(part.subs(f, (shifted - r) / self.period)).subs(r, residue)
            written.append(min((by_quotient, by_residue), key=lambda e: len(str(e))))
        if len(written) == 1:
            return str(written[0])
        cases = [(e, residue < end) for e, end in zip(written, starts[1:], strict=False)]
        return str(sympy.Piecewise(*cases, (written[-1], True), evaluate=False))

    @property
    def bounds(self) -> tuple[str, str]:
        """Polynomials in n, the least and the greatest that differ from the count in lower terms alone."""
        import sympy

        n = sympy.Symbol("n")
        by_residue = [_in_n(self.doubled[:, r], r, self.period) for r in range(self.period)]
        ends = []
        for choose in (min, max):
            a, b, c = (choose(row[i] for row in by_residue) for i in range(3))
            ends.append(str(sympy.Rational(a) * n**2 + sympy.Rational(b) * n + sympy.Rational(c)))
        return ends[0], ends[1]

    @property
    def valid_for(self) -> str:
        return f"n >= {self.start}" if self.start else "every n"


def _in_n(doubled: Counts, r: int, p: int) -> tuple[Fraction, Fraction, Fraction]:
    """The coefficients of n^2, n and 1."""
    a, b, c = (Fraction(int(x), 2) for x in doubled)
    return a / p**2, b / p - 2 * a * r / p**2, c - b * r / p + a * r**2 / p**2


def _moved(doubled: Counts, origin: int) -> Counts:
    """The polynomials in f = (n - origin) // p, by the residue of n - origin."""
    rolled = np.roll(doubled, -origin, axis=1)
    a, b, c = rolled.copy()
    # residues that wrapped around have a quotient one larger than before
    late = np.arange(doubled.shape[1]) >= doubled.shape[1] - origin
    c[late], b[late] = (a + b + c)[late], (2 * a + b)[late]
    return np.stack([a, b, c])


def _segments(doubled: Counts) -> list[int]:
    """Where, by rising residue, one polynomial of degree 2 in quotient and residue gives way to another."""
    a, b, c = doubled
    breaks = [np.flatnonzero(np.diff(row, order)) for order, row in ((1, a), (2, b), (3, c))]
    starts = [0]
    while True:
        # a difference of order d at position i breaks residue i + d off
        ends = [
            int(at[i]) + order
            for order, at in enumerate(breaks, 1)
            if (i := int(np.searchsorted(at, starts[-1]))) < len(at)
        ]
        if not ends:
            return starts
        starts.append(min(ends))


def _polynomial(doubled: Counts, start: int, end: int) -> sympy.Expr:
    """The polynomial in f and r that these residues share."""
    import sympy

    f, r = sympy.symbols("f r")
    total = sympy.Integer(0)
    for power, row in zip((2, 1, 0), doubled, strict=True):
        known = [int(x) for x in row[start : min(end, start + 3)]]
        total += f**power * sympy.interpolate([(start + i, x) for i, x in enumerate(known)], r) / 2
    return sympy.expand(total)


def _shortest(e: Any) -> Any:
    import sympy

    return min((sympy.expand(e), sympy.factor(e)), key=lambda form: len(str(form)))


def is_exact(mask: Expr) -> bool:
    """Whether a mask is an integer relation, and reads no table even in what never matters."""
    return not mask.tables and all(node.op != "random" for node in nodes(mask)) and is_affine(mask)


@lru_cache(maxsize=256)
def closed_form(mask: Expr) -> ClosedForm | None:
    """The number of live pairs of `mask`, over q, k and n, at n queries and n keys; None where the mask is no
    integer relation or the form is beyond the limits."""
    mask = quantifier_free(substitute(mask, {"nq": var("n")}))
    if not mask.free <= {"q", "k", "n"} or not is_exact(mask):
        return None
    try:
        with quota():
            shape = _shape(to_set(mask), ("n",))
        return _fitted(mask, _threshold(shape), shape.period)
    except AttnError:
        return None


def _fitted(mask: Expr, start: int, period: int) -> ClosedForm | None:
    first = -(-start // period) * period
    longest = first + 3 * period
    if period > RESIDUES:
        return None
    growing = _growing(mask)
    if growing is not None and longest <= LONGEST:
        counted = counts_below(growing, longest)
        return tightened(first, period, counted.__getitem__, first)
    if 3 * period > TRIED:
        return None
    return tightened(first, period, lambda n: count_at(mask, n), DESCENT)


def tightened(first: int, period: int, count: Callable[[int], int], tries: int) -> ClosedForm:
    """The quasi-polynomial that equals `count` from `first` on, with the least period and start.

    `first` is a multiple of `period`; `tries` shorter lengths are looked at, at most.
    """
    known = {n: int(count(n)) for n in range(first, first + 3 * period)}
    form = _through(known, first, period)
    for smaller in range(1, period):
        if period % smaller == 0:
            shorter = _through(known, first, smaller)
            if all(shorter(n) == value for n, value in known.items()):
                form = shorter
                break
    start = first
    while start > max(0, first - tries) and form(start - 1) == int(count(start - 1)):
        start -= 1
    return ClosedForm(start, form.period, form.doubled)


def _through(known: dict[int, int], first: int, p: int) -> ClosedForm:
    """The polynomials through the counts at f0, f0 + 1 and f0 + 2, where first = p * f0."""
    f0 = first // p
    c0, c1, c2 = (np.array([known[first + i * p + r] for r in range(p)], dtype=object) for i in range(3))
    step, bend = c1 - c0, c2 - 2 * c1 + c0
    doubled = [bend, 2 * step - bend * (2 * f0 + 1), 2 * c0 - 2 * step * f0 + bend * (f0 * (f0 + 1))]
    return ClosedForm(first, p, np.stack(doubled))


def combined(forms: Sequence[ClosedForm]) -> ClosedForm | None:
    """The sum."""
    period = math.lcm(*(form.period for form in forms))
    if period > RESIDUES:
        return None
    start = max(form.start for form in forms)
    first = -(-start // period) * period
    return tightened(first, period, lambda n: sum(form(n) for form in forms), first - start)


def _growing(mask: Expr) -> Expr | None:
    """The mask, or itself seen from the end, if n does nothing but bound its positions."""
    last = sub(var("n"), ONE)
    turned = substitute(mask, {"q": sub(last, var("q")), "k": sub(last, var("k"))})
    return next((m for m in (mask, turned) if "n" not in m.free), None)


def counts_below(mask: Expr, length: int) -> Counts:
    """The live pairs with both positions below n, for n = 0 .. length: int64 [length + 1].

    A longer sequence adds one row and one column.
    """
    swapped = substitute(mask, {"q": var("k"), "k": var("q")})
    row = tile(all_of(mask, le(var("k"), var("q"))), length, length, 128, n=length).row_counts()
    column = tile(all_of(swapped, lt(var("k"), var("q"))), length, length, 128, n=length).row_counts()
    return np.concatenate([[0], np.cumsum(row + column)])


def count_at(mask: Expr, n: int) -> int:
    """The live pairs at length n."""
    return live_pairs(substitute(mask, {"n": const(n)}), n)


@dataclass(frozen=True)
class Side:
    """alpha q + beta k + slopes . parameters + c >= 0, whole and without common divisor, low <= c <= high."""

    alpha: int
    beta: int
    slopes: tuple[int, ...]
    low: Fraction
    high: Fraction


@dataclass(frozen=True)
class Shape:
    """The sides of all conjunctions, those that differ by a constant as one, and the period of the count."""

    sides: tuple[Side, ...]
    period: int


def _shape(pairs: isl.Set, parameters: Sequence[str]) -> Shape:
    """Positions of one residue modulo the roundings' common period form a lattice on which every rounding is
    linear, so that sides have whole coefficients; their constants are known up to what was rounded."""
    period, pool = 1, dict[tuple[int, int, tuple[int, ...]], Side]()
    for part in pairs.compute_divs().make_disjoint().get_basic_sets():
        lattice, sides = _sides(part, parameters)
        corners = (s.alpha * t.beta - s.beta * t.alpha for s, t in combinations(sides, 2))
        period = math.lcm(period, lattice * math.lcm(*(abs(d) for d in corners if d)))
        for side in sides:
            key = side.alpha, side.beta, side.slopes
            known = pool.get(key, side)
            pool[key] = Side(*key, min(known.low, side.low), max(known.high, side.high))
    if len(pool) > SIDES:
        raise fail(f"a closed form with over {SIDES} directions of sides is not looked for")
    return Shape(tuple(pool.values()), period)


Linear = tuple[tuple[Fraction, ...], Fraction, Fraction]
"""Coefficients of q, k and the parameters, and the least and greatest constant."""


def _sides(part: isl.BasicSet, parameters: Sequence[str]) -> tuple[int, list[Side]]:
    """The lattice on which a conjunction is convex, and its sides."""
    local = part.get_local_space()
    named = [part.get_dim_name(isl.dim_type.param, i) for i in range(part.dim(isl.dim_type.param))]
    roundings = list[Linear]()
    lattice = 1

    def linear(a: isl.Aff) -> Linear:
        low = high = _fraction(a.get_constant_val())
        total = [_fraction(a.get_coefficient_val(isl.dim_type.in_, i)) for i in range(2)]
        known = {x: a.get_coefficient_val(isl.dim_type.param, i) for i, x in enumerate(named)}
        total += [_fraction(known[name]) if name in known else Fraction(0) for name in parameters]
        for i, (inner, least, most) in enumerate(roundings):
            scale = _fraction(a.get_coefficient_val(isl.dim_type.div, i))
            total = [x + scale * y for x, y in zip(total, inner, strict=True)]
            ends = sorted((scale * least, scale * most))
            low, high = low + ends[0], high + ends[1]
        return tuple(total), low, high

    for i in range(part.dim(isl.dim_type.div)):
        a = local.get_div(i)
        m = whole(a.get_denominator_val())
        inner, low, high = linear(a)
        # a rounding inside another is constant on the product of their lattices
        nested = any(_fraction(a.get_coefficient_val(isl.dim_type.div, j)) for j in range(i))
        lattice = lattice * m if nested else math.lcm(lattice, m)
        roundings.append((inner, low - Fraction(m - 1, m), high))
    sides = []
    for constraint in part.get_constraints():
        coefficients, low, high = linear(constraint.get_aff())
        if not any(coefficients):
            continue
        on_lattice = [int(x * lattice) for x in coefficients]
        common = math.gcd(*on_lattice)
        scale, lost = Fraction(lattice, common), Fraction(common - 1, common)
        alpha, beta, *slopes = (x // common for x in on_lattice)
        # what is left over on the lattice is rounded down: less than one step of 1 / common
        sides.append(Side(alpha, beta, tuple(slopes), low * scale - lost, high * scale))
        if constraint.is_equality():
            turned = tuple(-x for x in slopes)
            sides.append(Side(-alpha, -beta, turned, -high * scale - lost, -low * scale))
    return lattice, sides


def _fraction(value: isl.Val) -> Fraction:
    return Fraction(value.to_str())


def _walls(sides: Sequence[Side]) -> Iterator[Side]:
    """Where two parallel sides coincide, or a side passes through a corner of two others: conditions on the
    parameters alone, strictly beyond which the polygons keep their form."""
    for s in sides:
        if not s.alpha and not s.beta:
            yield s
    for s, t in combinations(sides, 2):
        if s.alpha * t.beta == s.beta * t.alpha:
            x, y = (s.alpha, t.alpha) if s.alpha or t.alpha else (s.beta, t.beta)
            yield _sum((y, s), (-x, t))
    for s, t, u in combinations(sides, 3):
        x = t.alpha * u.beta - t.beta * u.alpha
        y = u.alpha * s.beta - u.beta * s.alpha
        z = s.alpha * t.beta - s.beta * t.alpha
        yield _sum((x, s), (y, t), (z, u))


def _sum(*terms: tuple[int, Side]) -> Side:
    """The sum of factors times sides, whose q and k cancel."""
    slopes = tuple(
        sum(f * x for (f, _), x in zip(terms, column, strict=True))
        for column in zip(*(s.slopes for _, s in terms), strict=True)
    )
    ends = [sorted((f * s.low, f * s.high)) for f, s in terms]
    return Side(0, 0, slopes, sum((e[0] for e in ends), Fraction(0)), sum((e[1] for e in ends), Fraction(0)))


def _threshold(shape: Shape) -> int:
    """The length from which the count is a quasi-polynomial."""
    roots = (max(-w.low / w.slopes[0], -w.high / w.slopes[0]) for w in _walls(shape.sides) if w.slopes[0])
    return max(0, math.floor(max(roots, default=Fraction(-1))) + 1)


@dataclass(frozen=True)
class InParameter:
    """The count as a polynomial in n and a parameter, for what `valid_for` says of both."""

    formula: str
    valid_for: str


@lru_cache(maxsize=256)
def in_parameter(mask: Expr, name: str, times: int = 1) -> InParameter | None:
    """`times` the live pairs of a mask over q, k, n and the variable `name` (`?w` is written w).

    Where both are large and n the larger; None unless that is one polynomial, or one for each of a few
    residues of the parameter.
    """
    mask = quantifier_free(substitute(mask, {"nq": var("n")}))
    if not {"q", "k", name} <= mask.free <= {"q", "k", "n", name} or not is_exact(mask):
        return None
    try:
        with quota():
            period = _shape(to_set(mask), ("n", name)).period
    except AttnError:
        return None
    if period > PIECES:
        return None
    import sympy

    r = sympy.Symbol(name.removeprefix("?"))
    found, walls, least = [], set[sympy.Expr](), 0
    for residue in range(period):
        step = add(mul(const(period), var(name)), const(residue))
        one = _in_both(substitute(mask, {name: step}), name, times)
        if one is None:
            return None
        back = {r: (r - residue) / period}
        found.append(_by_length(one.count.subs(back), r))
        walls |= {sympy.expand(wall.subs(back)) for wall in one.walls}
        least = max(least, one.least * period + residue)
    count = found[0]
    if any(sympy.expand(count - other) for other in found[1:]):
        cases = [(e, sympy.Eq(sympy.Mod(r, period), residue)) for residue, e in enumerate(found[:-1])]
        count = sympy.Piecewise(*cases, (found[-1], True), evaluate=False)
    lengths = sorted(map(str, walls))
    said = f"n > {lengths[0]}" if len(lengths) == 1 else f"n > Max({', '.join(lengths)})"
    return InParameter(str(count), f"{said}, {r} >= {least}" if lengths else f"{r} >= {least}")


@dataclass(frozen=True)
class Polynomial:
    """The count in n and the parameter, where n is above all `walls` and the parameter at least `least`."""

    count: sympy.Expr
    walls: frozenset[sympy.Expr]
    least: int


def _in_both(mask: Expr, name: str, times: int) -> Polynomial | None:
    import sympy

    with quota():
        shape = _shape(to_set(mask), ("n", name))
    if shape.period != 1:
        return None
    least, ends = 0, set[tuple[Fraction, Fraction]]()
    for wall in _walls(shape.sides):
        slope, other = wall.slopes
        if slope:
            ends |= {(Fraction(-other, slope), -c / slope) for c in (wall.low, wall.high)}
        elif other:
            least = max(least, *(math.floor(-c / other) + 1 for c in (wall.low, wall.high)))
    # of walls that rise no faster and stand no higher than another one nothing is to be said
    ends = {
        (a, b) for a, b in ends
        if not any(c >= a and c * least + d >= a * least + b for c, d in ends - {(a, b)})
    }  # fmt: skip

    def length(r: int) -> int:
        return max([0, *(math.floor(a * r + b) + 1 for a, b in ends)])

    def count(n: int, r: int) -> int:
        return times * count_at(substitute(mask, {name: const(r)}), n)

    n, r = sympy.Symbol("n"), sympy.Symbol(name.removeprefix("?"))
    powers = [n**i * r**j for i in range(3) for j in range(3 - i)]
    start = length(least + 2)
    # six points of a triangle determine a polynomial of degree 2; one more can only confirm it
    points = [(start + i, least + j) for i in range(3) for j in range(3 - i)]
    rows = [[power.subs({n: x, r: y}) for power in powers] for x, y in points]
    solved = sympy.Matrix(rows).LUsolve(sympy.Matrix([count(*point) for point in points]))
    total = sum((c * power for c, power in zip(solved, powers, strict=True)), sympy.Integer(0))
    far = (2 * length(least + 9) + 1, least + 9)
    assert total.subs({n: far[0], r: far[1]}) == count(*far), (total, far)
    walls = [(sympy.Rational(a) * r + sympy.Rational(b)) for a, b in ends if a > 0 or b >= 0]
    return Polynomial(total, frozenset(walls), least)


def _by_length(polynomial: sympy.Expr, r: sympy.Symbol) -> sympy.Expr:
    """By falling powers of n, each with a factored coefficient."""
    import sympy

    n = sympy.Symbol("n")
    terms = sympy.Poly(polynomial, n, r).as_expr()
    coefficients = sympy.Poly(terms, n).terms()
    return sum((sympy.factor(c) * n**i for (i,), c in coefficients), sympy.Integer(0))


def expected(mask: Expr, n: int) -> float | None:
    """The mean over seeds of the live pairs at length n of a closed mask with at most one draw; None for
    another.

    A row draws min(r, c) of its c eligible keys, each with the same probability.
    """
    draws = [e for e in nodes(mask) if e.op == "random"]
    if len(draws) > 1 or mask.tables:
        return None
    if not draws:
        return float(live_pairs(mask, n))
    q, k, size, _, of = draws[0].args
    r, row, col = cast("tuple[int, str, str]", draws[0].value)
    length = number(size)
    if length is None or not (q.free <= {"q"} and k.free <= {"q", "k"} and of.free <= {row, col}):
        return None
    drawn, left = (replaced(mask, {draws[0]: truth}) for truth in (TRUE, FALSE))
    eligible = all_of(substitute(of, {row: q, col: k}), le(ZERO, k), lt(k, size))
    of = substitute(of, {row: var("q"), col: var("k")})
    keys = tile(of, int(length), int(length), 128, n=int(length)).row_counts()
    rows = evaluate(q, np.arange(n), np.zeros(1, np.int64))
    chance = (np.minimum(r, keys) / np.maximum(keys, 1))[np.clip(rows, 0, len(keys) - 1)]
    more, fewer = (
        tile(all_of(a, negate(b), eligible), n, n, 128, n=n).row_counts()
        for a, b in ((drawn, left), (left, drawn))
    )
    return live_pairs(left, n) + float(chance @ (more - fewer))


def bracket(mask: Expr, n: int) -> tuple[int, int]:
    """The least and the greatest number of live pairs at length n that any tables could give, from what is
    known of every table: bounds, which tables need not reach."""
    under, over = (substitute(e, {"n": const(n)}) for e in around(mask))
    return live_pairs(under, n), live_pairs(over, n)
