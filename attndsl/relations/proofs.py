"""Verdicts: proved for every n, every head and every table, or refuted at a point, or undecided.

A proof is an empty over-approximation of the counter-examples (relation.py). A refutation is a point at which
the pointwise evaluation, which shares no code with the proof, confirms it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import islpy as isl
import numpy as np
from numpy.typing import NDArray

from attndsl.errors import AttnError, fail
from attndsl.expr import (
    TRUE,
    ZERO,
    Expr,
    Selected,
    Table,
    all_of,
    const,
    exists,
    negate,
    nodes,
    substitute,
    var,
)
from attndsl.meaning.pointwise import evaluate
from attndsl.relations.relation import LEADING, Translation, domain, limited, quota, whole
from attndsl.selection import lists_of, narrowest, somewhere

SEARCH_LENGTH = 16
SEARCH_HEADS = 3
SEARCH_TABLES = 4
SEARCH_WORK = 10_000
"""Nodes evaluated at one length, those below a bound variable once per value."""
TABLE_ENTRIES = 1 << 24
"""Entries of one table of a counter-example that is taken from a relation."""

DTYPES = {"int": np.int64, "bool": np.bool_, "float": np.float64}

Point = dict[str, int]
Tables = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Verdict:
    """`counter_example` gives n, H, h, q and k where they matter, the smallest found; `tables` go with it.

    `reason` says why nothing was decided. `at` is "at n = 4096" for a verdict about given parameters alone.
    """

    status: Literal["proved", "refuted", "undecided"]
    counter_example: Point | None = None
    tables: Tables | None = None
    reason: str = ""
    at: str = ""

    def __repr__(self) -> str:
        return f"<{self.status}{detail(self.at, self.counter_example, self.tables, self.reason)}>"


def detail(at: str, point: Point | None, tables: Mapping[str, Any] | None, reason: str) -> str:
    """What there is to say about a verdict besides its status, in brackets."""
    told = {**(point or {}), **{name: _elided(entries) for name, entries in (tables or {}).items()}}
    parts = [at, ", ".join(f"{name} = {value}" for name, value in told.items()), reason]
    said = "; ".join(part for part in parts if part)
    return f" ({said})" if said else ""


def _elided(entries: Any) -> str:
    """A table on one line: of a long one the first and last entries."""
    text = np.array2string(
        np.asarray(entries), separator=", ", threshold=12, edgeitems=3, max_line_width=10**9
    )
    return " ".join(text.split())


def subset(left: Expr, right: Expr, assuming: Expr = TRUE, given: Mapping[str, int] | None = None) -> Verdict:
    """Whether `left` implies `right` wherever `assuming` holds; `given` fixes n or H."""
    return _never(all_of(assuming, left, negate(right)), ("n", "q", "k"), given or {})


def follows(left: Expr, right: Expr) -> bool:
    """Whether `left` is proved to imply `right`: as `subset`, without the search for a counter-example.

    Both are over n, q and k.
    """
    values = {"nq": var("n")}
    formula = substitute(all_of(left, negate(right)), values)
    for related in (False, True):
        try:
            with quota():
                space = Translation(formula, domain("n", "q", "k"), related)
                if space.where(True).is_empty():
                    return True
                if space.exact:
                    return False
        except AttnError:
            return False
    return False


def equal(left: Expr, right: Expr, assuming: Expr = TRUE, given: Mapping[str, int] | None = None) -> Verdict:
    """Whether two masks agree; of two counter-examples the smaller."""
    verdicts = [subset(left, right, assuming, given), subset(right, left, assuming, given)]
    refuted = [v for v in verdicts if v.status == "refuted"]
    if refuted:
        return min(refuted, key=lambda v: [(v.counter_example or {}).get(x, 0) for x in LEADING])
    return next((v for v in verdicts if v.status == "undecided"), verdicts[0])


def every_row(mask: Expr, assuming: Expr = TRUE, given: Mapping[str, int] | None = None) -> Verdict:
    """Whether each query has a key."""
    key = var("?k")
    some = exists("?k", ZERO, var("n"), substitute(mask, {"k": key}))
    found = _never(all_of(assuming, negate(some)), ("n", "q"), given or {})
    if found.status != "undecided" or not lists_of(mask):
        return found
    chosen = _never(all_of(assuming, negate(somewhere(mask))), ("n", "q"), given or {})
    # where that is refuted a key may be chosen all the same
    return chosen if chosen.status == "proved" else found


def _never(formula: Expr, names: tuple[str, ...], given: Mapping[str, int]) -> Verdict:
    """The verdict on "no point of the domain satisfies `formula`"."""
    names = (
        *names,
        *(x for x in ("H", "h") if x in formula.free),
        *(["H"] if "h" in formula.free else []),
    )
    values = {"b": ZERO} | {name: const(value) for name, value in given.items()}
    values["nq"] = values.get("n", var("n"))
    formula, known = substitute(formula, values), substitute(domain(*names), values)
    at = "at " + ", ".join(f"{name} = {value}" for name, value in given.items()) if given else ""
    # what a choice of keys is cannot be made up: a counter-example is one whatever is chosen
    sure = narrowest(formula)
    reason, candidates = "", list[tuple[Point, Tables]]()
    # terms related to each other prove more, but slowly: where there are any, a search stands before
    for related in (False, True):
        try:
            with quota():
                space = Translation(formula, known, related)
                found = space.where(True)
                if found.is_empty():
                    return Verdict("proved", at=at)
                terms = sorted({said(space.abstraction.terms[name].expr) for name in space.terms})
                reason = "it depends on " + " and ".join(terms)
                unknown = [space.abstraction.terms[name].expr for name in space.terms]
                if any(e.op == "pow" and e.free <= {"h", "H"} for e in unknown):
                    reason += "; a list of its values can be proved: `[1, 2, 4][h // 4]`"
                if related or space.exact:
                    candidates = [_candidate(space, found)]
        except AttnError as error:
            terms, reason = [], error.diagnostics[0].message
        for point, tables in candidates or _search(sure, names, given):
            if _confirmed(sure, point, tables):
                shown = {x: {**point, **given}[x] for x in LEADING if x in names}
                return Verdict("refuted", shown, tables or None, at=at)
        if not terms:
            break
    return Verdict("undecided", reason=reason, at=at)


def said(term: Expr) -> str:
    """What a reader of the pattern file knows an unknown term as."""
    if isinstance(term.value, Table) and term.value.known is None:
        return said_of(term.value)
    kinds = {
        "random": "which keys are drawn",
        "mul": "a product of positions",
        "pow": "a power",
        "inset": "a long list",
        "lookup": "a long list",
    }
    kinds |= {"floordiv": "a division by what is no constant", "mod": "a division by what is no constant"}
    return kinds.get(term.op, f"`{term.op}`")


def said_of(table: Table) -> str:
    if isinstance(table.origin, Selected):
        return f"what `{table.origin.selection}` chooses"
    return f"the table `{table.name}`"


def _candidate(space: Translation, found: isl.Set) -> tuple[Point, Tables]:
    """The least point of an over-approximation, and tables that the sampled values of its terms suggest."""
    leading = [name for name in LEADING if name in space.position and name in space.free]
    assert leading == space.names[: len(leading)]
    rest = len(space.names) - len(leading)
    least = found.project_out(isl.dim_type.set, len(leading), rest).lexmin().sample_point()
    for i in range(len(leading)):
        found = found.fix_val(isl.dim_type.set, i, least.get_coordinate_val(isl.dim_type.set, i))
    model = _coordinates(space, limited(found).sample_point())
    point = {name: model[name] for name in leading}
    entries: dict[str, dict[tuple[int, ...], int]] = {}
    values = {name: const(value) for name, value in model.items()}
    for name in space.terms:
        term = space.abstraction.terms[name]
        index = tuple([substitute(arg, values).value for arg in term.args])
        if term.expr.op == "lookup" and all(isinstance(i, int) and i >= 0 for i in index):
            assert isinstance(term.expr.value, Table)
            entries.setdefault(term.expr.value.name, {})[index] = model[name]  # type: ignore[index]
    tables: Tables = {}
    for table in sorted(space.tables, key=lambda table: table.name):
        known = entries.get(table.name, {})
        needed = [1 + max((index[i] for index in known), default=0) for i in range(len(table.dims))]
        shape = [
            max(size, low) if isinstance(dim, str) and dim not in ("n", "H") else size
            for dim, size, low in zip(table.dims, _shape(table, point), needed, strict=True)
        ]
        if math.prod(shape) > TABLE_ENTRIES:
            raise fail(f"a counter-example has a table of more than {TABLE_ENTRIES:,} entries")
        data: NDArray[Any] = np.zeros(shape, DTYPES[table.dtype])
        for index, value in known.items():
            if all(i < size for i, size in zip(index, shape, strict=True)):
                data[index] = value
        tables[table.name] = data
    return point, tables


def _coordinates(space: Translation, point: isl.Point) -> Point:
    return {name: whole(point.get_coordinate_val(isl.dim_type.set, i)) for i, name in enumerate(space.names)}


def _confirmed(formula: Expr, point: Point, tables: Tables) -> bool:
    return _first(formula, point, tables, np.array([point["q"]]), np.array([point.get("k", 0)])) is not None


def _first(formula: Expr, point: Point, tables: Tables, q: NDArray[Any], k: NDArray[Any]) -> Point | None:
    """The first point with these positions, and the other values of `point`, where `formula` holds."""
    others = {x: const(v) for x, v in point.items() if x not in ("q", "k")}
    try:
        hits = np.argwhere(evaluate(substitute(formula, others), q[:, None], k[None, :], tables))
    except AttnError:
        # the pattern does not accept these tables: they refute nothing
        return None
    return point | {"q": int(q[hits[0][0]]), "k": int(k[hits[0][1]])} if len(hits) else None


def _search(
    formula: Expr, names: tuple[str, ...], given: Mapping[str, int]
) -> Iterator[tuple[Point, Tables]]:
    """Points found by trying small n, few heads and random tables."""
    size, nesting = sum(1 for _ in nodes(formula)), _nesting(formula)
    for n in [given["n"]] if "n" in given else range(SEARCH_LENGTH + 1):
        if n > SEARCH_LENGTH * 10 or size * n**nesting > SEARCH_WORK:
            return
        positions = np.arange(n)
        keys = positions if "k" in names else np.zeros(1, np.int64)
        for heads in [given["H"]] if "H" in given else range(1, SEARCH_HEADS + 1) if "H" in names else [1]:
            for h in range(heads) if "h" in names else [0]:
                for trial in range(SEARCH_TABLES if formula.tables else 1):
                    at = {"n": n, "H": heads, "h": h}
                    tables = _random_tables(formula, at, trial)
                    point = _first(formula, at, tables, positions, keys)
                    if point is not None:
                        yield point, tables


def _nesting(formula: Expr) -> int:
    """How many bound variables stand inside one another at most."""
    depth: dict[Expr, int] = {}
    for e in nodes(formula):
        depth[e] = max((depth[arg] for arg in e.args), default=0) + (e.op == "exists")
    return depth[formula]


def _random_tables(formula: Expr, at: Point, trial: int) -> Tables:
    rng = np.random.default_rng([at["n"], trial])
    tables: Tables = {}
    for table in sorted(formula.tables, key=lambda table: table.name):
        shape = _shape(table, at)
        if table.dtype == "float":
            tables[table.name] = rng.normal(size=shape)
        elif table.dtype == "bool":
            tables[table.name] = rng.random(shape) < trial / (SEARCH_TABLES - 1)
        else:
            tables[table.name] = _integers(rng, shape, trial)
    return tables


def _shape(table: Table, at: Point) -> list[int]:
    """Sizes with room for an entry per position where the text leaves them open."""
    named = {"B": 1, "H": at.get("H", 1), "n": at.get("n", 0)}
    return [size if isinstance(size, int) else named.get(size, max(named["n"], 4)) for size in table.dims]


def _integers(rng: np.random.Generator, shape: list[int], trial: int) -> NDArray[Any]:
    """All zero, sorted as documents are, then unordered."""
    values = rng.integers(0, (1, 2, 3, 4)[trial], shape)
    return np.sort(values, axis=0) if shape and trial % 2 else values
