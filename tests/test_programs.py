"""Laws that every program obeys, tried on random ones: programs.py writes them, meaning.py evaluates them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from random import Random

import islpy as isl
import meaning
import numpy as np
import programs
import pytest
import torch
from numpy.typing import NDArray

import attndsl
from attndsl import expr
from attndsl.errors import Source
from attndsl.execution import registry
from attndsl.meaning import pointwise
from attndsl.relations import relation
from attndsl.syntax import nodes as ast
from attndsl.syntax.format import format, render
from attndsl.syntax.parse import parse, parse_expression
from attndsl.tiles import lowering

MASKS = [
    *(programs.program(Random(seed)) for seed in range(60)),
    *(programs.program(Random(seed), integral=True) for seed in range(30)),
]
SCORES = [programs.program(Random(seed), scores=True, depth=2) for seed in range(54)]


@functools.cache
def parsed(text: str) -> attndsl.Program:
    return attndsl.parse(text)


def elaborated(program: programs.Program) -> attndsl.Bound:
    attention = parsed(program.text)["main"]
    assert isinstance(attention, attndsl.Bound)
    return attention


def batched(mask: NDArray[np.generic]) -> NDArray[np.generic]:
    """[B or 1, H or 1, nq, n]"""
    return mask if mask.ndim == 4 else mask[None]


def each(found: list[programs.Program], step: int = 1) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", found[::step])


def roots(program: programs.Program) -> Iterator[expr.Expr]:
    for group in elaborated(program).attention.groups:
        parts = (
            group.relation.mask,
            group.relation.count,
            group.score,
            group.decay,
            group.norm.sink,
            group.heads,
        )
        yield from (part for part in parts if part is not None)


def test_the_programs_use_the_whole_language() -> None:
    """Tokens of the grammar, clause words, built-in names and operations of the typed core."""
    text = re.sub(r"#.*", "", "\n".join(program.text for program in (*MASKS, *SCORES)))
    words = set(re.findall(r"[A-Za-z_]\w*|//|\*\*|\.\.|[<>=!]=|[-+*/@~&|<>\[\]{}(),:=]", text))
    operators = "or and not in mod | & + - * / // @ ~ ** .. == != < <= > >= [ ] { } ( ) , : =".split()
    clauses = "inputs mask score decay norm offset heads else int bool float B H D".split()
    functions = "min max sum concat where log2 isqrt floor exp log sqrt tanh sigmoid sin cos".split()
    names = (
        "pattern let attention blocks within grid random seed of learn sink softmax relu s Q K n nq h".split()
    )
    assert {*operators, *clauses, *functions, *names} - words == set()
    found = {node.op for program in (*MASKS, *SCORES) for root in roots(program) for node in expr.nodes(root)}
    others = "const var lookup count_of rank_of intable inset random exists isqrt floor".split()
    assert {*others, *expr.REBUILD, *expr.FUNCTIONS} - found == set()


@each(MASKS)
@pytest.mark.parametrize(("n", "nq", "at_once"), [(5, 3, 1), (11, 11, 500)])
def test_mask_and_counts_are_what_the_text_says(
    program: programs.Program, n: int, nq: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "AT_ONCE", at_once)
    tables = program.tables(n)
    axes = {table.name: table.axes for table in program.inputs}
    expected = meaning.Problem(parsed(program.text).own, n, nq, program.heads, tables, axes).mask()
    attention = elaborated(program)
    counts = batched(attention.counts(n, nq, heads=program.heads, **tables))
    np.testing.assert_array_equal(np.broadcast_to(counts, expected.shape), expected)
    mask = batched(attention.mask(n, nq, heads=program.heads, **tables))
    np.testing.assert_array_equal(np.broadcast_to(mask, expected.shape), expected > 0)


@pytest.mark.parametrize("at_once", [1, 7, 100, 2**16])
@pytest.mark.parametrize(
    "mask",
    [
        "random(2, of = { q, k : q * q <= k } @ radius(1)) @ last(2)",
        "causal & ({ q, k : t[k] == 0 } @ full)",
        "(random(1, of = none) @ causal | last(2)) @ radius(1)",
    ],
)
def test_a_bound_variable_may_be_all_that_varies(
    mask: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "AT_ONCE", at_once)
    program = attndsl.parse(f"attention main {{ inputs t : int[n] mask {mask} }}")
    tables = {"t": np.arange(23) % 5}
    expected = meaning.Problem(program.own, 23, 23, 1, tables, {"t": ("n",)}).mask()[0]
    np.testing.assert_array_equal(program["main"].mask(23, **tables), expected > 0)
    assert expected.any()


def test_heads_draw_from_keys_of_their_own() -> None:
    drawn = attndsl.parse("pattern p = random(1, of = { q, k : k mod 3 == h })")["p"]
    assert isinstance(drawn, attndsl.Bound)
    closed = expr.substitute(
        drawn.attention.any_head(), {x: expr.const(9 if x == "n" else 3) for x in ("n", "H")}
    )
    found = pointwise.evaluate(closed, np.arange(9)[:, None], np.arange(9)[None])
    np.testing.assert_array_equal(found, drawn.mask(9, heads=3).any(0))
    assert found.sum() == 27


LENGTHS = [(0, 0), (3, 3), (33, 20), (64, 64), (130, 130), (300, 77), (299, 299)]


@each(MASKS)
def test_tiles_are_the_mask(program: programs.Program) -> None:
    rng = Random(program.text)
    # a product or a restricted draw that is no integer relation is searched pair by pair
    searched = "@" in program.text or "of =" in program.text
    n, nq = rng.choice(LENGTHS[:3] if searched else LENGTHS)
    tables = program.tables(n)
    attention = elaborated(program)
    tiles = attention.block_mask(n, rng.choice((8, 16, 64, 128)), nq, heads=program.heads, **tables)
    mask = batched(attention.mask(n, nq, heads=program.heads, **tables))
    np.testing.assert_array_equal(tiles.to_dense(), mask)
    assert tiles.nnz == mask.sum()


def members(found: isl.Set, sizes: dict[str, int]) -> NDArray[np.bool_]:
    """The positions of a set { [q, k] } with its parameters given, as a matrix."""
    for name, value in sizes.items():
        at = found.find_dim_by_name(isl.dim_type.param, name)
        if at >= 0:
            found = found.fix_val(isl.dim_type.param, at, isl.Val(value))
    dense = np.zeros((sizes["n"], sizes["n"]), bool)

    def mark(point: isl.Point) -> None:
        q, k = (point.get_coordinate_val(isl.dim_type.set, axis).to_python() for axis in (0, 1))
        dense[q, k] = True

    found.project_out(isl.dim_type.param, 0, found.dim(isl.dim_type.param)).foreach_point(mark)
    return dense


@each(MASKS, step=3)
def test_relations_bound_the_mask(program: programs.Program) -> None:
    """Whatever the tables: nothing outside the upper bound, everything in the lower; equal if affine."""
    n = 6
    attention = elaborated(program)
    mask = batched(attention.mask(n, heads=program.heads, **program.tables(n)))
    groups = lowering.head_groups(attention.attention, program.heads)
    for g, group in enumerate(attention.attention.groups):
        affine = relation.is_affine(group.relation.mask)
        assert affine or not program.integral
        try:
            under, over = relation.bounds(group.relation.mask)
        except attndsl.AttnError:
            # beyond the limits of what is decided for every n
            continue
        for h in range(mask.shape[1]):
            if groups[h] != g:
                continue
            sizes = {"n": n, "nq": n, "h": h, "H": program.heads}
            lower, upper = members(under, sizes), members(over, sizes)
            for row in mask[:, h]:
                assert not (lower & ~row).any()
                assert not (row & ~upper).any()
            assert not affine or (lower == upper).all()


Results = dict[str, torch.Tensor]


def problem_of(
    program: programs.Program, plan: attndsl.Plan, n: int, nq: int, learned: Results
) -> meaning.Problem:
    axes = {table.name: table.axes for table in program.inputs}
    axes |= {t.name: tuple(map(str, t.dims)) for t in plan.attention.learned}
    own, values = parsed(program.text).own, {name: value.numpy() for name, value in learned.items()}
    return meaning.Problem(own, n, nq, program.heads, program.tables(n), axes, values, HEAD_DIM)


HEAD_DIM, BATCH = 4, 2


def plan_of(program: programs.Program, backend: str, n: int, nq: int) -> attndsl.Plan:
    return attndsl.compile(
        elaborated(program), length=n, q_length=nq, batch=BATCH, heads=program.heads, head_dim=HEAD_DIM,
        dtype="float64", backend=backend, block_size=32, training=True,
    )  # fmt: skip


def drawn(program: programs.Program, plan: attndsl.Plan, n: int, nq: int) -> tuple[Results, Results, Results]:
    """Inputs, tables and learned parameters, all of them with gradients where they are real."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    qkv = {
        name: draw(BATCH, program.heads, length, HEAD_DIM)
        for name, length in zip("qkv", (nq, n, n), strict=True)
    }
    tables = {name: torch.from_numpy(table) for name, table in program.tables(n).items()}
    learned = {t.name: plan.initial(t) + 0.3 * draw(plan.initial(t).shape) for t in plan.attention.learned}
    for tensor in (*qkv.values(), *tables.values(), *learned.values()):
        tensor.requires_grad_(tensor.is_floating_point())
    return qkv, tables, learned


def ran(program: programs.Program, backend: str, n: int, nq: int) -> Results:
    """Output, log-sum-exp and every gradient."""
    plan = plan_of(program, backend, n, nq)
    qkv, tables, learned = drawn(program, plan, n, nq)
    out, lse = plan(*qkv.values(), learned=learned, return_lse=True, **tables)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    (out * weight).sum().backward()
    inputs = {**qkv, **tables, **learned}
    zero = {name: torch.zeros_like(x) for name, x in inputs.items() if x.requires_grad}
    return {"out": out.detach(), "lse": lse.detach()} | {
        name: zero[name] if inputs[name].grad is None else inputs[name].grad for name in zero
    }  # type: ignore[return-value]


SIZES = [(1, 1), (9, 5), (33, 33)]


@each(SCORES)
def test_the_reference_computes_what_the_text_says(program: programs.Program) -> None:
    n, nq = Random(program.text).choice(SIZES[1:])
    plan = plan_of(program, "reference", n, nq)
    with torch.no_grad():
        qkv, tables, learned = drawn(program, plan, n, nq)
        out = plan(*qkv.values(), learned=learned, **tables)
        expected = problem_of(program, plan, n, nq, learned).output(*(x.numpy() for x in qkv.values()))
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)


@each(SCORES)
@pytest.mark.parametrize("backend", [name for name in registry.names("backends") if name != "reference"])
def test_backends_agree(program: programs.Program, backend: str) -> None:
    """In float64 only roundings tell them apart: forward, log-sum-exp, gradients of everything real."""
    n, nq = Random(program.text).choice(SIZES)
    declined = plan_of(program, "reference", n, nq).considered[backend]
    if isinstance(declined, str):
        pytest.skip(declined)
    expected, found = ran(program, "reference", n, nq), ran(program, backend, n, nq)
    for name, value in expected.items():
        # of a sum below 0 there is no logarithm
        torch.testing.assert_close(
            found[name], value, rtol=1e-8, atol=1e-10, equal_nan=name == "lse", msg=name
        )


@each(SCORES, step=8)
def test_gradients_are_derivatives(program: programs.Program) -> None:
    plan = plan_of(program, "reference", 3, 3)
    groups = drawn(program, plan, 3, 3)
    names = [name for group in groups for name, x in group.items() if x.requires_grad]

    def output(*values: torch.Tensor) -> torch.Tensor:
        qkv, tables, learned = ({**group} for group in groups)
        for name, value in zip(names, values, strict=True):
            next(group for group in (qkv, tables, learned) if name in group)[name] = value
        return plan(*qkv.values(), learned=learned, **tables)

    values = {**groups[0], **groups[1], **groups[2]}
    assert torch.autograd.gradcheck(output, tuple(values[name] for name in names), fast_mode=True)


@each([*MASKS, *SCORES])
def test_format_changes_no_meaning(program: programs.Program) -> None:
    formatted = format(program.text)
    assert parse(formatted) == parse(program.text)
    assert format(formatted) == formatted


@each(MASKS)
def test_expressions_are_rendered_as_they_are_read(program: programs.Program) -> None:
    for item in parse(program.text).items:
        if isinstance(item, ast.Definition):
            assert parse_expression(Source("<text>", render(item.body))) == item.body
