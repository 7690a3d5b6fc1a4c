"""Verdicts of the prover on random assertions, beside brute force."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from assertion_programs import Assertions, Claims, claims
from brute_force import Point
from meaning import AbsentError, Array
from programs import Input

import attndsl
from attndsl.errors import Source
from attndsl.syntax import nodes as ast
from attndsl.syntax.parse import parse_expression

LENGTHS = (*range(25), 31, 32, 40, 48, 57, 64)
FEW = (*range(7), 11, 20, 33, 64)
"""Where time is short."""
TRIALS = 3
"""Draws of the tables at one length."""
WRITTEN_OUT = 512
"""Longest sequence at which a counter-example is checked."""


class BeyondError(Exception):
    """A counter-example at a length that is not written out."""


@dataclass(frozen=True)
class Pair:
    """A program and one assertion about it, as written and as typed."""

    claims: Claims
    expr: ast.Expression
    assertion: attndsl.Assertion

    @property
    def key(self) -> tuple[str, str]:
        return self.claims.text, self.assertion.text

    @property
    def quantified(self) -> bool:
        """Over every length; else it compares numbers at one."""
        return not any(f"{kind}(" in self.assertion.text for kind in ("density", "nnz", "diameter"))

    def point(
        self, n: int, heads: int, tables: Mapping[str, Array], axes: Mapping[str, tuple[str, ...]]
    ) -> Point:
        return Point(definitions(self.claims.text), n, heads, tables, axes)


def pairs(seeds: range) -> Iterator[Pair]:
    """Those of these seeds that type."""
    seen = set()
    for seed in seeds:
        written = claims(seed)
        for pair in typed(written, seed):
            if pair.key not in seen:
                seen.add(pair.key)
                yield pair


@functools.lru_cache(maxsize=500)
def typed(written: Claims, seed: int) -> list[Pair]:
    texts = list(written.assertions)
    try:
        attndsl.parse(written.text)
        if not written.inputs:
            texts.append(quantity(written, seed))
    except attndsl.AttnError:
        return []
    first = written.text.count("\n") + 1
    try:
        program = attndsl.parse(with_assertions(written.text, texts))
    except attndsl.AttnError as error:
        wrong = {d.span.source.position(d.span.start)[0] - first for d in error.diagnostics if d.span}
        texts = [text for i, text in enumerate(texts) if i not in wrong]
        program = attndsl.parse(with_assertions(written.text, texts))
    exprs = (parse_expression(Source("<assertion>", text)) for text in texts)
    return [Pair(written, *pair) for pair in zip(exprs, program.assertions, strict=True)]


def with_assertions(text: str, assertions: list[str]) -> str:
    return text + "".join(f"assert {assertion}\n" for assertion in assertions)


@functools.lru_cache(maxsize=2)
def definitions(text: str) -> Mapping[str, ast.Definition | ast.AttentionDef]:
    return attndsl.parse(text).own


def quantity(written: Claims, seed: int) -> str:
    """An assertion about a number, near the true one."""

    def measure(text: str) -> tuple[int, int]:
        call = parse_expression(Source("<quantity>", text))
        assert isinstance(call, ast.Call)
        of, n, heads = (arg.value for arg in call.args)
        at = Point(definitions(written.text), n.value, heads.value, {}, {})  # type: ignore[attr-defined]
        kind = text.split("(")[0]
        if kind == "density":
            return int(at.measured("nnz", of)), max(1, at.heads * at.n**2)
        return int(at.measured(kind, of)), 1

    rng = Random(f"quantity {seed}")
    return Assertions(rng, True).quantity(measure, rng.choice(written.heads))


def contradiction(pair: Pair, verdict: attndsl.relations.proofs.Verdict, lengths: tuple[int, ...]) -> str:
    """How brute force disagrees with the verdict; empty where it does not."""
    if verdict.status == "undecided":
        return ""
    if not pair.quantified:
        assert isinstance(pair.expr, ast.Compare)
        true = pair.point(0, 1, {}, {}).compared(pair.expr)
        return "" if true == (verdict.status == "proved") else f"the comparison is {true}"
    if verdict.status == "refuted":
        return refuted_wrongly(pair, verdict)
    for n in lengths:
        for heads in pair.claims.heads:
            for trial in range(TRIALS if pair.claims.inputs else 1):
                try:
                    found = np.argwhere(tried(pair.claims, n, heads, trial).counter_examples(pair.expr))
                except AbsentError:
                    continue
                if len(found):
                    return f"it fails at n = {n}, H = {heads}, [h, q, k] = {found[0].tolist()}"
    return ""


@functools.lru_cache(maxsize=len(LENGTHS) * TRIALS * 3)
def tried(written: Claims, n: int, heads: int, trial: int) -> Point:
    """What all assertions about one program are tried at."""
    axes = {table.name: table.axes for table in written.inputs}
    return Point(definitions(written.text), n, heads, drawn(written.inputs, n, heads, trial), axes)


def refuted_wrongly(pair: Pair, verdict: attndsl.relations.proofs.Verdict) -> str:
    at, given = verdict.counter_example, verdict.tables or {}
    assert at is not None
    n, heads = at["n"], at.get("H", pair.claims.heads[0])
    if n > WRITTEN_OUT:
        raise BeyondError
    if heads < pair.claims.heads[0] and re.search(r"\b[ab]\b", pair.assertion.text):
        return f"{heads} heads are too few"
    tables = {**drawn(pair.claims.inputs, n, heads, 0), **given}
    axes = {table.name: table.axes for table in pair.claims.inputs}
    try:
        found = pair.point(n, heads, tables, axes).counter_examples(pair.expr)
    except AbsentError:
        return "its tables are read outside them"
    h, q, k = at.get("h", 0), at["q"], at.get("k", 0)
    inside = h < heads and q < n and k < found.shape[2]
    return "" if inside and found[h if "h" in at else slice(None), q, k].any() else f"{at} is none"


def drawn(inputs: tuple[Input, ...], n: int, heads: int, trial: int) -> dict[str, Array]:
    """One trial sorts positions, as documents are."""
    sizes = {"n": n, "B": 1, "H": heads, "D": 4, "top": 2, "tiles": -(-n // 4)}
    rng = np.random.default_rng([n, heads, trial])
    tables = {table.name: table.draw(rng, sizes) for table in inputs}
    return {name: np.sort(data) if trial == 1 else data for name, data in tables.items()}
