"""Every node that elaboration makes is one of the legal ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import programs
import pytest

import attndsl
from attndsl import expr as x
from attndsl.attention import Attention
from attndsl.conformance.cases import attention_of
from attndsl.conformance.mechanisms import MECHANISMS
from attndsl.expr import Expr, Table, make, var
from attndsl.legal import LEGAL, flaws
from attndsl.tiles.lowering import quantifier_free

EXAMPLES = Path(__file__).parent.parent / "examples"


def attentions() -> Iterator[Attention]:
    yield from map(attention_of, MECHANISMS)
    for path in sorted(EXAMPLES.glob("*.attn")):
        program = attndsl.load(path)
        found = (program[name] for name in program.names)
        yield from (bound.attention for bound in found if isinstance(bound, attndsl.Bound))
    for seed in range(60):
        bound = attndsl.parse(programs.program(Random(seed), scores=seed % 2 == 0).text)["main"]
        assert isinstance(bound, attndsl.Bound)
        yield bound.attention


def expressions(attention: Attention) -> Iterator[Expr]:
    for group in attention.groups:
        parts = (group.relation.mask, group.relation.count, group.score, group.decay, group.norm.sink)
        yield from (e for e in (*parts, group.heads) if e is not None)
        yield quantifier_free(group.relation.mask)
    yield attention.any_head()
    for part in attention.parts:
        yield part.gate
        yield from expressions(part.attention)


def test_only_legal_nodes_and_all_of_them() -> None:
    seen: set[str] = set()
    for attention in attentions():
        for e in expressions(attention):
            assert flaws(e) == [], attention.name
            seen |= {node.op for node in x.nodes(e)}
    assert seen == set(LEGAL)


DOC, ROWS = Table("doc", "int", ("n",)), Table("rows", "float", ("n", "D"))
WRONG = {
    "op": make("xor", (x.TRUE, x.TRUE), None, "bool"),
    "argument": make("and", (x.TRUE, var("q")), None, "bool"),
    "arguments": make("mul", (var("q"), var("k"), var("n")), None, "int"),
    "value": make("inset", (var("q"),), 3, "bool"),
    "type": make("add", (var("q"), var("s")), None, "int"),
    "truth of a number": make("const", (), 1, "bool"),
    "too many indices": make("lookup", (var("q"), var("k")), DOC, "int"),
    "too few": make("lookup", (), DOC, "vec"),
    "a number of a vector": make("lookup", (var("q"),), ROWS, "real"),
    "an index in the place of the last axis": make("intable", (var("k"), var("q")), DOC, "bool"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_legal_is_told(name: str) -> None:
    assert len(flaws(WRONG[name])) == 1
