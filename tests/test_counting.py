"""Closed forms against exact counts, and counts against the mask written out."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import sympy
from thin import thin

import attndsl
from attndsl.analysis import counting
from attndsl.analysis.live import Count
from attndsl.expr import Expr, const, substitute, var
from attndsl.meaning.pointwise import evaluate
from attndsl.tiles.lowering import quantifier_free
from attndsl.tiles.tiling import tile

RANDOM_LENGTHS = 50
LONG = 2**20


def mask_of(text: str) -> Expr:
    attention = attndsl.parse(f"pattern main = {text}")["main"]
    assert isinstance(attention, attndsl.Bound)
    (group,) = attention.attention.groups
    return quantifier_free(substitute(group.relation.mask, {"nq": var("n")}))


def exact(mask: Expr, n: int) -> int:
    """By tiles; they are held to the mask elsewhere, and here at small n."""
    closed = substitute(mask, {"n": const(n)})
    found = tile(closed, n, n, 128, n=n).nnz
    if n <= 300:
        at = np.arange(n)
        assert found == evaluate(closed, at[:, None], at[None, :]).sum()
    return found


class Writer:
    """Random affine programs that use no definition: builders with comparisons, and their algebra."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)

    def number(self, depth: int) -> str:
        rng = self.rng
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(["q", "k", "q", "k", "q - k", "n", str(rng.randint(-9, 40))])
        a, b = self.number(depth - 1), self.number(depth - 1)
        return rng.choice(
            [
                f"({a} + {b})",
                f"({a} - {b})",
                f"{rng.randint(2, 3)} * ({a})",
                f"({a}) // {rng.randint(2, 6)}",
                f"({a}) mod {rng.randint(2, 6)}",
                f"|{a}|",
                f"min({a}, {b})",
                f"max({a}, {b})",
            ]
        )

    def truth(self, depth: int) -> str:
        rng = self.rng
        if depth == 0 or rng.random() < 0.4:
            sign = rng.choice(["<=", "<", ">=", ">", "==", "!="])
            return f"({self.number(2)} {sign} {self.number(1)})"
        a, b = self.truth(depth - 1), self.truth(depth - 1)
        return rng.choice([f"({a} and {b})", f"({a} or {b})", f"(not {a})"])

    def pattern(self) -> str:
        rng = self.rng
        one, other = (f"{{ q, k : {self.truth(2)} }}" for _ in range(2))
        return rng.choice([one, one, f"{one} | {other}", f"{one} & {other}", f"{one} - {other}"])


PROGRAMS = [Writer(seed).pattern() for seed in range(100)]
PARTS = 5
NAMED = [
    "causal & last(5000)",
    "radius(256)",
    "strided(12)",
    "fixed(12, 5)",
    "causal & block(32)",
    "prefix_lm(40)",
    "radius(3) | global([0, 17])",
    "dilate(3, radius(2))",
    "{ q, k : k >= n - 10 or 2 * k <= q }",
    "(last(3) @ last(4)) & ~block(5)",
]


def check(text: str) -> bool:
    """Whether there is a closed form; if so it is right where it claims to be."""
    mask = mask_of(text)
    form = counting.closed_form(mask)
    if form is None:
        return False
    rng = Random(text)
    start = form.start
    lengths = [start, start + 1, 10 * start, *(start + rng.randrange(600) for _ in range(RANDOM_LENGTHS))]
    for n in lengths:
        assert form(n) == exact(mask, n), (text, n)
    assert form(LONG) == counting.count_at(mask, LONG)
    if form.formula is not None:
        assert symbolic(form.formula, lengths) == [form(n) for n in lengths], form.formula
    else:
        low, high = (symbolic(end, lengths) for end in form.bounds)
        assert all(a <= form(n) <= b for a, n, b in zip(low, lengths, high, strict=True))
    return True


def symbolic(formula: str, lengths: list[int]) -> list[int]:
    expression, n = sympy.sympify(formula), sympy.Symbol("n")
    return [expression.subs(n, length) for length in lengths]


@pytest.mark.parametrize("part", thin(range(PARTS), PARTS))
def test_closed_forms_of_random_programs(part: int) -> None:
    texts = PROGRAMS[part::PARTS]
    assert sum(map(check, texts)) >= 0.8 * len(texts)


def test_nine_of_ten_random_programs_have_a_closed_form() -> None:
    assert sum(counting.closed_form(mask_of(text)) is not None for text in PROGRAMS) >= 90


@pytest.mark.parametrize("text", NAMED)
def test_closed_forms_of_what_people_write(text: str) -> None:
    assert check(text)


@pytest.mark.parametrize(
    ("text", "formula", "valid_for"),
    [
        ("radius(256)", "513*n - 65792", "n >= 256"),
        ("causal", "n*(n + 1)/2", "every n"),
        ("causal & last(5000)", "5000*n - 12497500", "n >= 4999"),
        ("last(4) | causal & sinks(2)", "6*n - 15", "n >= 5"),
    ],
)
def test_formulas(text: str, formula: str, valid_for: str) -> None:
    form = counting.closed_form(mask_of(text))
    assert form is not None
    assert (form.formula, form.valid_for) == (formula, valid_for)
    if form.start:
        assert form(form.start - 1) != exact(mask_of(text), form.start - 1)


def test_many_pieces_are_bounds_and_a_table() -> None:
    text = "causal & { q, k : (q mod 11) in [1, 4, 5, 9] or k mod 7 == 3 }"
    form = counting.closed_form(mask_of(text))
    assert form is not None
    assert (form.period, form.formula) == (77, None)
    assert form(1000) == exact(mask_of(text), 1000)
    report = attndsl.analyze(attndsl.parse(f"pattern p = {text}")["p"], length=1000, parts=["nnz"])
    assert report.nnz is not None
    assert report.nnz.around == form.bounds
    assert len(report.nnz.residues or ()) == 77


@pytest.mark.parametrize("text", ["strided(128)", "fixed(128, 32)", "causal & block(8192)"])
def test_long_lengths(text: str) -> None:
    form = counting.closed_form(mask_of(text))
    assert form is not None
    # 2^20 + 1 rows and columns fewer than 2^20 + 1: the difference is the last row and column
    mask = substitute(mask_of(text), {"q": const(LONG)})
    at = np.arange(LONG + 1)
    assert form(LONG + 1) - form(LONG) == evaluate(mask, at, at).sum()


@pytest.mark.parametrize(
    ("text", "name", "formula"),
    [
        ("pattern main(r = 3) = radius(r)", "r", "n*(2*r + 1) - r*(r + 1)"),
        ("pattern main(w = 3) = last(w)", "w", "n*w - w*(w - 1)/2"),
        (
            "pattern main(w = 4) = radius(w // 2)",
            "w",
            "Piecewise((n*(w + 1) - w*(w + 2)/4, Eq(Mod(w, 2), 0)), (n*w - (w - 1)*(w + 1)/4, True))",
        ),
        ("pattern main(c = 3) = last(20) | causal & sinks(c)", "c", "n*(c + 20) - (c + 19)*(c + 20)/2"),
    ],
)
def test_in_a_parameter(text: str, name: str, formula: str) -> None:
    attention = attndsl.parse(text)["main"]
    report = attndsl.analyze(attention, length=64, parts=["parameters"], parameters=[name])
    assert report.in_parameters is not None
    found = report.in_parameters[name]
    assert found.formula == formula
    for value in (1, 5, 19):
        count = attndsl.analyze(attention(**{name: value}), length=64, parts=["nnz"]).nnz
        assert count is not None
        assert sympy.sympify(found.formula).subs({"n": 64, name: value}) == count.value


def test_a_parameter_that_is_a_divisor_is_refused() -> None:
    attention = attndsl.parse("pattern main(l = 3) = strided(l)")["main"]
    report = attndsl.analyze(attention, length=64, parts=["parameters"], parameters=["l"])
    assert report.in_parameters is None
    assert "polynomial" in report.reasons["parameters"]


@pytest.mark.parametrize(
    "text",
    [
        "last(5) | random(3, seed = {})",
        "blocks(8, radius(1) | random(2, seed = {}, of = ~radius(1)))",
        "causal & ~random(2, seed = {})",
    ],
)
def test_expected_over_seeds(text: str) -> None:
    n, seeds = 45, 100
    closed = substitute(mask_of(text.format(0)), {"n": const(n)})
    mean = counting.expected(closed, n)
    drawn = [exact(mask_of(text.format(seed)), n) for seed in range(seeds)]
    assert mean is not None
    assert abs(np.mean(drawn) - mean) <= 4 * np.std(drawn) / seeds**0.5


def test_a_draw_at_a_bound_position_has_no_mean_here() -> None:
    text = "pattern p = random(1) @ causal"
    count = attndsl.analyze(attndsl.parse(text)["p"], length=8, parts=["nnz"]).nnz
    assert count is not None
    assert count.value == attndsl.parse(text)["p"].mask(8).sum()
    assert count.expected is None


def test_tables_bound_the_count_and_then_give_it() -> None:
    text = "attention main { inputs doc : int[n]  mask causal & documents(doc) }"
    attention = attndsl.parse(text)["main"]
    count = attndsl.analyze(attention, length=100, parts=["nnz"]).nnz
    assert count == Count(None, bounds=(100, 5050), whatever="the tables")
    doc = np.arange(100) // 10
    count = attndsl.analyze(attention, length=100, parts=["nnz"], doc=doc).nnz
    assert count is not None
    assert count.value == 550


def test_heads_add_up() -> None:
    text = "attention main { heads 0..1 { mask last(4) } else { mask causal } }"
    report = attndsl.analyze(attndsl.parse(text)["main"], length=50, heads=5, batch=2)
    assert report.nnz is not None
    assert report.nnz.value == 2 * (2 * (4 * 50 - 6) + 3 * 1275)
    assert report.nnz.formula == "3*n**2 + 19*n - 24"


def test_growth_with_n_in_a_size() -> None:
    text = "strided(isqrt(n) + 1)"
    report = attndsl.analyze(attndsl.parse(f"pattern main = {text}")["main"], length=4096, parts=["nnz"])
    assert report.complexity == "O(n*sqrt(n))"
    assert report.nnz is not None
    assert report.nnz.formula is None
    assert report.nnz.value == exact(mask_of(text), 4096)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_no_length_is_too_short(length: int) -> None:
    report = attndsl.analyze(attndsl.parse("pattern main = causal")["main"], length=length)
    assert report.nnz is not None
    assert report.nnz.value == length * (length + 1) // 2


@pytest.mark.parametrize("length", [-1, 2**63])
def test_lengths_that_are_none(length: int) -> None:
    with pytest.raises(attndsl.AttnError, match="length"):
        attndsl.analyze(attndsl.parse("pattern main = causal")["main"], length=length)


def test_lists_that_are_read_inside_have_a_formula_and_others_end() -> None:
    program = attndsl.parse(
        "pattern inside = { q, k : [2, 0, 1][q mod 3] == k mod 3 }\n"
        "pattern ends = { q, k : [2, 0, 1][q] == k }\n"
        "pattern twice = ends @ ends"
    )
    counts = [attndsl.analyze(program["inside"], length=n, parts=["nnz"]).nnz for n in (6, 31)]
    assert [c and c.value for c in counts] == [6 * 2, 11 * 10 + 10 * 11 + 10 * 10]
    assert all(c is not None and c.formula for c in counts)
    assert exact(mask_of("{ q, k : q < 3 and [2, 0, 1][q] == k }"), 2**20) == 3
    three, four = (attndsl.analyze(program["ends"], length=n, parts=["nnz"]) for n in (3, 4))
    assert three.nnz is not None
    assert (three.nnz.value, three.nnz.formula) == (3, None)
    assert four.nnz is None
    assert "3 entries" in str(four)
    twice = program["twice"]
    assert isinstance(twice, attndsl.Bound)
    assert np.argwhere(twice.mask(3)[0]).tolist() == [[0, 1], [1, 2], [2, 0]]
    with pytest.raises(attndsl.AttnError, match="3 entries"):
        twice.mask(4)
