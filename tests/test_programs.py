"""Laws that every program obeys, tried on random ones: programs.py writes them, meaning.py says what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from random import Random

import islpy as isl
import meaning
import numpy as np
import programs
import pytest
from numpy.typing import NDArray

import attndsl
from attndsl import expr, lowering, relation
from attndsl.errors import Source
from attndsl.syntax import nodes as ast
from attndsl.syntax.format import format, render
from attndsl.syntax.parse import parse, parse_expression

MASKS = [
    *(programs.program(Random(seed)) for seed in range(120)),
    *(programs.program(Random(seed), integral=True) for seed in range(60)),
]
SCORES = [programs.program(Random(seed), scores=True, depth=2) for seed in range(100)]


@cache
def parsed(text: str) -> attndsl.Program:
    return attndsl.parse(text)


def elaborated(program: programs.Program) -> attndsl.Attention:
    attention = parsed(program.text)["main"]
    assert isinstance(attention, attndsl.Attention)
    return attention


def batched(mask: NDArray[np.generic]) -> NDArray[np.generic]:
    """[B or 1, H or 1, nq, n]"""
    return mask if mask.ndim == 4 else mask[None]


def each(found: list[programs.Program], step: int = 1) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", found[::step])


def roots(program: programs.Program) -> Iterator[expr.Expr]:
    for group in elaborated(program).groups:
        parts = (group.relation.mask, group.relation.count, group.score, group.decay, group.norm.sink, group.heads)
        yield from (part for part in parts if part is not None)


def test_the_programs_use_the_whole_language() -> None:
    """Tokens of the grammar, clause words, built-in names and operations of the typed core."""
    text = re.sub(r"#.*", "", "\n".join(program.text for program in (*MASKS, *SCORES)))
    words = set(re.findall(r"[A-Za-z_]\w*|//|\*\*|\.\.|[<>=!]=|[-+*/@~&|<>\[\]{}(),:=]", text))
    operators = "or and not in mod | & + - * / // @ ~ ** .. == != < <= > >= [ ] { } ( ) , : =".split()
    clauses = "inputs mask score decay norm offset heads else int bool float B H D".split()
    functions = "min max where log2 isqrt floor exp log sqrt tanh sigmoid sin cos".split()
    names = "pattern let attention blocks within grid random seed of learn sink softmax relu s Q K n nq h".split()
    assert {*operators, *clauses, *functions, *names} - words == set()
    found = {node.op for program in (*MASKS, *SCORES) for root in roots(program) for node in expr.nodes(root)}
    others = "const var lookup count_of rank_of intable inset random exists isqrt floor".split()
    assert {*others, *expr.REBUILD, *expr.FUNCTIONS} - found == set()


@each(MASKS)
@pytest.mark.parametrize(("n", "nq"), [(1, 1), (5, 3), (11, 11)])
def test_mask_and_counts_are_what_the_text_says(program: programs.Program, n: int, nq: int) -> None:
    tables = program.tables(n)
    axes = {table.name: table.axes for table in program.inputs}
    expected = meaning.mask(parsed(program.text).own, "main", n, nq, program.heads, tables, axes)
    attention = elaborated(program)
    counts = batched(attention.counts(n, nq, heads=program.heads, **tables))
    np.testing.assert_array_equal(np.broadcast_to(counts, expected.shape), expected)
    mask = batched(attention.mask(n, nq, heads=program.heads, **tables))
    np.testing.assert_array_equal(np.broadcast_to(mask, expected.shape), expected > 0)


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


@each(MASKS, step=2)
def test_relations_bound_the_mask(program: programs.Program) -> None:
    """Whatever the tables: nothing outside the upper bound, everything in the lower; equal if affine."""
    n = 6
    attention = elaborated(program)
    mask = batched(attention.mask(n, heads=program.heads, **program.tables(n)))
    groups = lowering.head_groups(attention, program.heads)
    for g, group in enumerate(attention.groups):
        affine = relation.is_affine(group.relation.mask)
        assert affine or not program.integral
        try:
            under, over = relation.bounds(group.relation.mask)
        except attndsl.AttnError as error:
            assert not affine
            assert str(error).startswith("error: too large to decide for every n")
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
