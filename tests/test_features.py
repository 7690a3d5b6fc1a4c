"""What nobody knows is declined by every backend, and what costs is unknown is taken after what is known."""

from __future__ import annotations

import dataclasses
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import attndsl
from attndsl import expr as ir
from attndsl.analysis import cost
from attndsl.attention import Attention, HeadGroup, Norm, Relation
from attndsl.backend import Features, Problem
from attndsl.command.run import of_plan
from attndsl.execution import choice, registry
from attndsl.expr import Expr, Table

ROOT = Path(__file__).parent.parent
s = ir.var("s")
PLAIN = HeadGroup(Relation(ir.TRUE), s)
P = Problem(8, 8)


def example(name: str) -> Any:
    """The backend of the example, or the one of this name in docs/plugins.md."""
    if name == "numpy-backend":
        return runpy.run_path(str(ROOT / "examples/numpy-backend/attndsl_numpy/__init__.py"))["backend"]
    text = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    (source,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if f"backend = {name}()" in block
    )
    found: dict[str, Any] = {}
    exec(source, found)
    return found["backend"]


BACKENDS: dict[str, Callable[[], Any]] = {
    **{
        name: lambda name=name: registry.plugin("backends", name)
        for name in ("cpu", "flex", "linear", "lowrank", "reference", "sdpa", "torch", "triton")
    },
    **{name: lambda name=name: example(name) for name in ("Tiny", "Scored", "numpy-backend")},
}


def attention(*groups: HeadGroup) -> Attention:
    return Attention("a", groups)


def extended(value: Any, **fields: Any) -> Any:
    """With fields that its class does not have."""
    kind = dataclasses.make_dataclass(
        type(value).__name__,
        [(name, object, dataclasses.field(default=None)) for name in fields],
        bases=(type(value),),
        frozen=True,
    )
    return kind(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, **fields)


def scored(score: Expr) -> Attention:
    return attention(replace(PLAIN, score=score))


STRANGE = Table("t", "float", ("n",))
UNKNOWN = {
    "norm": (attention(replace(PLAIN, norm=Norm("anything"))), P, "norm `anything`"),  # type: ignore[arg-type]
    "operation": (scored(ir.make("bessel", (s,), None, "real")), P, "operation `bessel`"),
    "operation in a sink": (
        attention(replace(PLAIN, norm=Norm("softmax", ir.make("bessel", (ir.ONE,), None, "real")))),
        P,
        "operation `bessel`",
    ),
    "field of a group": (attention(extended(PLAIN, gate=ir.ONE)), P, "clause `gate`"),
    "field of a norm": (attention(replace(PLAIN, norm=extended(Norm(), power=2))), P, "clause `power`"),
    "field of a relation": (
        attention(replace(PLAIN, relation=extended(Relation(ir.TRUE), soft=True))),
        P,
        "clause `soft`",
    ),
    "field of an attention": (extended(attention(PLAIN), memory=16), P, "clause `memory`"),
    "field of a problem": (attention(PLAIN), extended(P, dropout=0.1), "mode `dropout`"),
    "field of a table": (
        scored(ir.add(s, ir.lookup(extended(STRANGE, painted=True), ir.var("k")))), P, "table `painted`"
    ),
    "dtype of a table": (
        scored(ir.add(s, ir.make("lookup", (ir.var("k"),), Table("t", "complex", ("n",)), "real"))),  # type: ignore[arg-type]
        P,
        "table `complex`",
    ),
    "dtype": (attention(PLAIN), replace(P, dtype="float8"), "dtype `float8`"),
    "device": (attention(PLAIN), replace(P, device="abacus:0"), "device `abacus`"),
}  # fmt: skip


def of_its_norm(asked: Attention, knowing: Any) -> Attention:
    """With a norm that the backend knows."""
    kind = "softmax" if "softmax" in knowing.features.norms else min(knowing.features.norms)
    groups = (replace(group, norm=replace(group.norm, kind=kind)) for group in asked.groups)
    return replace(asked, groups=tuple(groups))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", UNKNOWN)
def test_what_nobody_knows_is_declined_by_its_name(backend: str, case: str) -> None:
    asked, problem, name = UNKNOWN[case]
    knowing = BACKENDS[backend]()
    if case != "norm":
        asked = of_its_norm(asked, knowing)
    within = choice.used(asked, problem).clauses & {"score", "sink"} - knowing.features.clauses
    wanted = f"clause `{min(within)}`" if within else name
    assert choice.declined(knowing, asked, problem) == f"it knows nothing of the {wanted}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_fields_as_they_are_by_default_ask_for_nothing(backend: str) -> None:
    unset = extended(attention(extended(PLAIN, gate=None)), memory=None)
    knowing = BACKENDS[backend]()
    unset = of_its_norm(unset, knowing)
    assert "knows nothing" not in str(choice.declined(knowing, unset, extended(P, dropout=None)))


def test_the_registered_ones_are_those_that_are_asked() -> None:
    assert set(registry.names("backends")) <= set(BACKENDS)


def used(text: str, **options: Any) -> Features:
    program = attndsl.parse(f"attention a {{ inputs doc : int[n] z : float[B, H, n] {text} }}")["a"]
    return choice.used(program.attention, replace(P, **options))


def test_a_mask_needs_nothing() -> None:
    assert used("mask documents(doc) & random(2)") == Features()


def test_what_is_used_is_told_from_the_attention() -> None:
    assert used("mask causal + last(2)", dtype="float64") == Features(
        clauses={"count", "decay"}, operations={"add", "and", "le", "mul", "where"}, dtypes={"float64"}
    )
    score = used("mask causal score s * tanh(z[k]) + doc[q] norm sigmoid", training=True, device="cuda:1")
    assert score == Features(
        clauses={"score"},
        norms={"sigmoid"},
        operations={"add", "lookup", "mul", "tanh"},
        tables={"given", "float", "int"},
        modes={"training"},
        devices={"cuda"},
    )
    assert used("heads 0..1 { mask causal norm softmax(sink = learn[H]) } else { mask full }") == Features(
        clauses={"heads", "sink"},
        operations={"and", "le", "lookup", "not"},
        tables={"learned", "float"},
    )


class Timed:
    """Says these seconds; counts or not."""

    features = Features(devices={"cpu", "cuda"})

    def __init__(self, seconds: float | None, work: float | None = None) -> None:
        self.said, self.seconds = seconds, {}
        if work is not None:
            self.counts = lambda attention, problem, blocks: {"pairs": work, "written": 1.0}

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        return None

    def cost(self, attention: Attention, problem: Problem, blocks: Any) -> float | None:
        return self.said

    def lower(self, attention: Attention, problem: Problem) -> Any:
        return registry.plugin("backends", "reference").lower(attention, problem)


def test_those_of_unknown_cost_come_after_the_known_by_what_they_count(monkeypatch: Any) -> None:
    them = {
        "silent": Timed(None),
        "much": Timed(None, 9.0),
        "little": Timed(None, 4.0),
        "also": Timed(None),
        "slow": Timed(1e9),
        "fast": Timed(1e-9),
        "sdpa": Timed(None, 5.0),
    }
    monkeypatch.setattr(registry, "names", lambda group: tuple(them))
    monkeypatch.setattr(registry, "plugin", lambda group, name: them[name])
    found = choice.considered(attention(PLAIN), P, None)
    assert list(found) == ["fast", "slow", "little", "sdpa", "much", "also", "silent"]
    assert choice.chosen(found, None) == "fast"
    assert choice.chosen({name: found[name] for name in list(found)[2:]}, None) == "little"


@pytest.mark.parametrize("clauses", ["mask full", "mask causal & last(16)"])
def test_no_backend_quotes_the_seconds_of_another_device(clauses: str) -> None:
    asked = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    problem = replace(P, length=4096, q_length=4096, device="cuda:0")
    blocks = asked.block_mask(4096)
    found = choice.considered(asked.attention, problem, blocks)
    assert "norm" in str(found.pop("linear"))
    assert found.pop("lowrank") == "it has weights of pairs"
    assert "device" in str(found.pop("cpu"))
    assert str(found.pop("triton")) in ("triton is not installed", "there is no GPU")
    assert found == {"flex": None, "reference": None, "sdpa": None, "torch": None}
    wanted = "sdpa flex torch reference" if clauses == "mask full" else "flex torch sdpa reference"
    assert list(found) == wanted.split()
    lowered = cost.lowerings(asked.attention, problem, blocks)
    del lowered["cpu"], lowered["linear"], lowered["lowrank"], lowered["triton"]
    assert {(x.seconds_estimate, x.reason) for x in lowered.values()} == {(None, "cost unknown")}
    assert all(x.flops is not None for x in lowered.values())


def test_a_plan_says_that_a_cost_is_unknown(register: Callable[[str], str]) -> None:
    name = register(DRY)
    plan = attndsl.compile(attndsl.parse("attention a { mask causal }")["a"], length=8)
    assert [other for other, said in plan.considered.items() if not isinstance(said, str)][-1] == name
    assert f"     {name:10} cost unknown" in str(plan)
    assert of_plan(plan)["rejected"][name] == "cost unknown"
    chosen = attndsl.compile(plan.attention, length=8, backend=name)
    assert chosen.backend == name
    assert f"  -> {name:10} cost unknown" in str(chosen)


DRY = """
from attndsl.backend import Features

class Mine:
    features = Features()
    def supports(self, attention, problem): return None
    def cost(self, attention, problem, block_mask): return None
    def lower(self, attention, problem): return lambda call: None

backend = Mine()
"""
