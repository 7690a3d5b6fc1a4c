"""Report: what a pattern costs and what it can see, part by part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from attndsl.analysis import counting
from attndsl.attention import Attention
from attndsl.backend import Problem, check_problem
from attndsl.bound import Bound
from attndsl.errors import AttnError, fail
from attndsl.expr import FALSE, ZERO, Expr, const, exists, le, nodes, substitute, var
from attndsl.meaning.pointwise import evaluate
from attndsl.program import bound_of
from attndsl.relations import proofs
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.lowering import quantifier_free
from attndsl.tiles.tiling import replaced

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from attndsl.analysis.cost import BlockSize, Ideal, Lowering, Roofline, Steps
    from attndsl.analysis.decode import Cache
    from attndsl.analysis.field import Field
    from attndsl.analysis.graph import GraphMeasures
    from attndsl.analysis.shards import Shard

RESIDUES_SHOWN = 4096
"""Largest table of polynomials by residue that a report carries."""


@dataclass(frozen=True)
class Count:
    """Live pairs over all heads and batch rows.

    value      exactly, at the length given; None while tables are missing
    formula    in n, for what `valid_for` says; None where there is none in few pieces
    bounds     without the tables: the value is between; with them or without tables None
    expected   the mean over seeds, where keys are drawn at random
    around     polynomials in n below and above, where the formula has too many pieces
    residues   then twice the coefficients of f^2, f and 1, f = n // p, for each residue of n modulo p
    """

    value: int | None
    formula: str | None = None
    valid_for: str | None = None
    bounds: tuple[int, int] | None = None
    expected: float | None = None
    around: tuple[str, str] | None = None
    residues: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Report:
    """Counts are over all heads and batch rows; a field is None where it was not asked for or is not known,
    and then `reasons` says why, by part. `diameter`: layers after which nothing more is seen.
    """

    name: str
    length: int
    q_length: int
    heads: int
    batch: int
    layers: int
    block_size: int
    nnz: Count | None = None
    in_parameters: Mapping[str, counting.InParameter] | None = None
    density: float | None = None
    complexity: str | None = None
    empty_rows: int | None = None
    causal: bool | None = None
    not_causal_at: Mapping[str, int] | None = None
    flops: Steps | None = None
    bytes: Steps | None = None
    lowerings: Mapping[str, Lowering] | None = None
    block_sizes: tuple[BlockSize, ...] | None = None
    best_block_size: int | None = None
    machines: Mapping[str, Roofline] | None = None
    reach: Field | None = None
    diameter: int | None = None
    kv_cache: Cache | None = None
    shards: tuple[Shard, ...] | None = None
    graph: GraphMeasures | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        from attndsl.analysis.text import report_text

        return report_text(self)

    @property
    def known(self) -> bool:
        """Whether any part that was asked for is known."""
        reach = self.reach if self.reach is not None and self.reach.known else None
        parts = replace(self, reach=reach, in_parameters=self.in_parameters or None, reasons={})
        return parts != Report(
            self.name, self.length, self.q_length, self.heads, self.batch, self.layers, self.block_size
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the fields of `analyze --json`."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dictionaries for JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, eq=False)
class Subject:
    """An attention on one problem, with what was given of its tables and parameters left open."""

    bound: Bound
    problem: Problem
    layers: int
    ranks: int
    parameters: tuple[str, ...]
    inputs: Mapping[str, ArrayLike]

    @property
    def attention(self) -> Attention:
        return self.bound.attention

    @property
    def times(self) -> int:
        """Batch rows and heads for which each mask of `block_mask` stands."""
        return self.problem.batch * self.problem.heads // self.block_mask.index.size

    @property
    def open(self) -> bool:
        """Whether a mask reads a table that was not given."""
        return any(table.name not in self.inputs for table in lowering.mask_tables(self.attention))

    @cached_property
    def sizes(self) -> lowering.Sizes:
        p = self.problem
        return lowering.sizes(self.attention, p.length, p.q_length, p.heads)

    @cached_property
    def tables(self) -> dict[str, Any]:
        return lowering.checked_tables(self.attention, self.inputs, self.sizes, self.problem.batch)

    @cached_property
    def block_mask(self) -> BlockMask:
        return lowering.block_mask(self.attention, self.sizes, self.tables, self.problem.block_size)

    @cached_property
    def ideal(self) -> Ideal:
        from attndsl.analysis import cost

        return cost.ideal(self.block_mask, self.problem)

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same positions."""
        return self.problem.q_length == self.problem.length and self.sizes.q.starts == (0,)

    @property
    def one_sequence(self) -> Problem:
        """The problem, of queries and keys that are the same positions. Raises AttnError for another."""
        if not self.square:
            raise fail("queries and keys are not the same positions here")
        return self.problem

    @cached_property
    def masks(self) -> dict[Expr, int]:
        """The masks of the heads over q, k, n, and how many heads and batch rows have each."""
        return masks_of(self.attention, self.problem)


def masks_of(attention: Attention, problem: Problem) -> dict[Expr, int]:
    found: dict[Expr, int] = {}
    for h, group in enumerate(lowering.head_groups(attention, problem.heads)):
        mask = attention.groups[group].relation.mask
        known = {"b": ZERO, "h": const(h), "H": const(problem.heads), "nq": var("n")}
        here = quantifier_free(lowering.alone(substitute(mask, known)))
        found[here] = found.get(here, 0) + problem.batch
    return found


def closed_form(masks: Mapping[Expr, int]) -> counting.ClosedForm | None:
    """The number of pairs of all these masks, each as often as it says."""
    forms = []
    for mask, times in masks.items():
        form = counting.closed_form(mask)
        if form is None:
            return None
        forms.append(replace(form, doubled=form.doubled * times))
    return forms[0] if len(forms) == 1 else counting.combined(forms)


def counted(subject: Subject) -> dict[str, Any]:
    """nnz, density, complexity."""
    pairs = subject.problem.batch * subject.problem.heads * subject.problem.length * subject.problem.q_length
    if subject.open and subject.square:
        ends = [
            (times, counting.bracket(mask, subject.problem.length)) for mask, times in subject.masks.items()
        ]
        low, high = (sum(times * end[i] for times, end in ends) for i in range(2))
        return {"nnz": Count(None, bounds=(low, high))}
    form = closed_form(subject.masks) if subject.square else None
    holds = form is not None and subject.problem.length >= form.start
    if form and holds:
        value = form(subject.problem.length)
    elif subject.square and not any(mask.tables for mask in subject.masks):
        value = sum(t * counting.count_at(mask, subject.problem.length) for mask, t in subject.masks.items())
    else:
        value = subject.block_mask.nnz * subject.times
    count = Count(value)
    if form is not None:
        count = replace(count, formula=form.formula, valid_for=form.valid_for)
        if count.formula is None:
            rows = tuple(tuple(int(x) for x in row) for row in form.doubled.T)
            count = replace(count, around=form.bounds, residues=rows if len(rows) <= RESIDUES_SHOWN else None)
    if subject.square:
        count = replace(count, expected=_expected(subject))
    return {
        "nnz": count,
        "density": value / pairs if pairs else 0.0,
        "complexity": CLASSES[form.degree] if form is not None else _growth(subject),
    }


def _expected(subject: Subject) -> float | None:
    n, total = subject.problem.length, 0.0
    if not any(e.op == "random" for mask in subject.masks for e in nodes(mask)):
        return None
    for mask, times in subject.masks.items():
        mean = counting.expected(substitute(mask, {"n": const(n)}), n)
        if mean is None:
            return None
        total += times * mean
    return total


def in_parameters(subject: Subject) -> dict[str, Any]:
    """in_parameters. Raises AttnError where the count is no such polynomial."""
    found: dict[str, counting.InParameter] = {}
    for name in subject.parameters:
        # a name of its own: the parameter may be called as a variable is
        masks = masks_of(subject.bound(**{name: var(f"?{name}")}).attention, subject.problem)
        if len(masks) > 1:
            raise fail(f"the heads differ: there is no one formula in `{name}`")
        ((mask, times),) = masks.items()
        form = counting.in_parameter(mask, f"?{name}", times)
        if form is None:
            raise fail(f"the count is not known as one polynomial in n and `{name}`", help="give it a value")
        found[name] = form
    return {"in_parameters": found}


CLASSES = {0: "O(1)", 1: "O(n)", 2: "O(n^2)"}
GROWTHS: dict[str, Callable[[float], float]] = {
    "O(n)": lambda n: n,
    "O(n*sqrt(n))": lambda n: n * math.sqrt(n),
    "O(n^2)": lambda n: n * n,
}
SAMPLED = (2**16, 2**20, 2**24)
NEAR = 0.02
"""How far the exponent between two lengths may be off that of its class."""


def _growth(subject: Subject) -> str | None:
    """The class of masks without a formula, where it is known.

    Draws that add a constant number of keys a row do not count beside O(n) or more. Where sizes follow
    isqrt(n), the growth from each of some lengths to the next must agree, and for a constant in its place a
    formula must hold from the first of them on: then no rarer pairs come later.
    """
    masks = subject.masks
    ops = {node.op for mask in masks for node in nodes(mask)}
    if not subject.square or any(mask.tables for mask in masks):
        return None
    if "random" in ops:
        if not all(map(_adds_few, masks)):
            return None
        form = closed_form({undrawn(mask): times for mask, times in masks.items()})
        return CLASSES[form.degree] if form is not None and form.degree else None
    form = closed_form({_rooted(mask): times for mask, times in masks.items()}) if "isqrt" in ops else None
    if form is None or form.start > SAMPLED[0]:
        return None
    counts = [sum(t * counting.count_at(mask, n) for mask, t in masks.items()) for n in SAMPLED]
    if not all(counts):
        return None
    for name, size in GROWTHS.items():
        steps = pairwise(zip(SAMPLED, counts, strict=True))
        off = [math.log(b / a * size(m) / size(n), n / m) for (m, a), (n, b) in steps]
        if max(map(abs, off)) < NEAR:
            return name
    return None


def _rooted(mask: Expr) -> Expr:
    """The mask with isqrt(n) as it is at the first of the lengths."""
    roots = (node for node in nodes(mask) if node.op == "isqrt" and node.args[0] is var("n"))
    return replaced(mask, {node: const(math.isqrt(SAMPLED[0])) for node in roots})


def _adds_few(mask: Expr) -> bool:
    """Whether draws only add pairs, and a key that a row of queries draws is a constant number of keys."""
    if mask.op in ("and", "or"):
        return all(map(_adds_few, mask.args))
    if mask.op != "random":
        return all(node.op != "random" for node in nodes(mask))
    row, key = mask.args[:2]
    blocks = key.op == "floordiv" and key.args[1].op == "const"
    return row.free <= {"q"} and (key.args[0] if blocks else key) is var("k")


def undrawn(mask: Expr) -> Expr:
    """The mask with no key drawn."""
    return replaced(mask, {node: FALSE for node in nodes(mask) if node.op == "random"})


def causality(subject: Subject) -> dict[str, Any]:
    """empty_rows, causal."""
    causal = proofs.subset(subject.attention.any_head(), le(var("k"), var("q")))
    return {
        "empty_rows": None if subject.open else _empty_rows(subject),
        "causal": {"proved": True, "refuted": False, "undecided": None}[causal.status],
        "not_causal_at": causal.counter_example,
    }


def _empty_rows(subject: Subject) -> int:
    """Over all heads and batch rows."""
    if not subject.square or not all(counting.is_exact(mask) for mask in subject.masks):
        return int(subject.block_mask.empty_rows().sum()) * subject.times
    n, total = subject.problem.length, 0
    for mask, times in subject.masks.items():
        some = substitute(quantifier_free(exists("k", ZERO, var("n"), mask)), {"n": const(n)})
        total += times * (n - int(evaluate(some, np.arange(n), np.arange(n)).sum()))
    return total


def costs(subject: Subject) -> dict[str, Any]:
    """flops, bytes, lowerings."""
    from attndsl.analysis import cost

    lowerings = cost.lowerings(subject.attention, subject.problem, subject.block_mask)
    return {"flops": subject.ideal.flops, "bytes": subject.ideal.bytes, "lowerings": lowerings}


def tiled(subject: Subject) -> dict[str, Any]:
    """block_sizes, best_block_size."""
    from attndsl.analysis import cost

    sizes = cost.block_sizes(subject.attention, subject.problem, subject.tables)
    return {"block_sizes": sizes, "best_block_size": cost.best_block_size(sizes)}


def bounded(subject: Subject) -> dict[str, Any]:
    """machines."""
    from attndsl.analysis import cost

    machines = (*cost.MACHINES, cost.this_machine())
    return {"machines": {m.name: cost.roofline(m, subject.ideal, subject.problem.dtype) for m in machines}}


def stacked(subject: Subject) -> dict[str, Any]:
    """reach, diameter."""
    from attndsl.analysis.field import receptive_field

    p = subject.one_sequence
    found = receptive_field(
        subject.attention, p.length, heads=p.heads, layers=subject.layers, inputs=subject.inputs
    )
    return {"reach": found, "diameter": found.settled_after}


def cached(subject: Subject) -> dict[str, Any]:
    """kv_cache."""
    from attndsl.analysis.decode import kv_cache

    p = subject.one_sequence
    return {"kv_cache": kv_cache(subject.attention, p.length, heads=p.heads, inputs=subject.inputs)}


def divided(subject: Subject) -> dict[str, Any]:
    """shards."""
    from attndsl.analysis.shards import shards

    p = subject.one_sequence
    found = shards(
        subject.attention, p.length, subject.ranks, heads=p.heads, kv_heads=p.kv_heads, head_dim=p.head_dim,
        dtype=p.dtype, block_size=p.block_size, inputs=subject.inputs,
    )  # fmt: skip
    # batch rows with one mask are counted once
    alike = not any(table.batched for table in lowering.mask_tables(subject.attention))
    rows = p.batch if alike else 1
    return {"shards": tuple([shard.times(rows) for shard in found])}


def linked(subject: Subject) -> dict[str, Any]:
    """graph."""
    from attndsl.analysis.graph import level_of, measured, pairs_of

    p = subject.one_sequence
    level = level_of(p.length)
    pairs = pairs_of(subject.attention, p.length, level, None, p.heads, None, subject.inputs)
    return {"graph": measured(pairs, level)}


Part = Callable[[Subject], Mapping[str, Any]]
PARTS: dict[str, Part] = {
    "nnz": counted,
    "parameters": in_parameters,
    "rows": causality,
    "cost": costs,
    "block_sizes": tiled,
    "machines": bounded,
    "reach": stacked,
    "kv_cache": cached,
    "shards": divided,
    "graph": linked,
}
"""What there is to know, by name; each gives some fields of a report."""


def analyze(
    attention: Bound | Attention,
    *,
    length: int,
    q_length: int | None = None,
    batch: int = 1,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: str = "float32",
    block_size: int = 128,
    layers: int = 1,
    ranks: int = 8,
    parts: Iterable[str] | None = None,
    parameters: Iterable[str] = (),
    **inputs: ArrayLike,
) -> Report:
    """What `attention` costs and sees at `length` keys, and where it can be had for every n.

    heads       as many as the attention speaks of, if not given
    layers      how many of it are stacked
    ranks       processes that a sequence is divided among
    parts       of PARTS; all if not given
    parameters  names of parameters to leave open: the count as a polynomial in each
    inputs      tables; what depends on one that is missing stays unknown, with its reason

    Raises AttnError for sizes, names or tables that do not fit.
    """
    subject = subject_of(
        attention, length=length, q_length=q_length, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, dtype=dtype, block_size=block_size, layers=layers, ranks=ranks,
        parameters=tuple(parameters), inputs=inputs,
    )  # fmt: skip
    report = blank(subject)
    for name in chosen(parts):
        report = extended(report, name, subject)
    return report


def chosen(parts: Iterable[str] | None) -> list[str]:
    if isinstance(parts, str):
        raise fail("`parts` is a list of names", help=f"write `parts=[{parts!r}]`")
    named = list(PARTS) if parts is None else list(parts)
    for name in named:
        if name not in PARTS:
            raise fail(f"there is no part `{name}`", help=f"the parts are {', '.join(PARTS)}")
    return named


def blank(subject: Subject) -> Report:
    p = subject.problem
    return Report(
        subject.attention.name, p.length, p.q_length, p.heads, p.batch, subject.layers, p.block_size
    )


def extended(report: Report, name: str, subject: Subject) -> Report:
    """The report with one part more, or with the reason why it is not known."""
    try:
        return replace(report, **PARTS[name](subject))
    except AttnError as error:
        return replace(report, reasons={**report.reasons, name: error.diagnostics[0].message})


def subject_of(
    value: Bound | Attention, *, length: int, q_length: int | None, batch: int, heads: int | None,
    kv_heads: int | None, head_dim: int, dtype: str, block_size: int, layers: int, ranks: int,
    parameters: tuple[str, ...], inputs: Mapping[str, ArrayLike],
) -> Subject:  # fmt: skip
    bound = bound_of(value)
    attention = bound.attention
    heads = lowering.heads_of(attention, inputs) if heads is None else heads
    problem = Problem(
        length=lowering.checked_length("length", length),
        q_length=lowering.checked_length("q_length", length if q_length is None else q_length),
        batch=lowering.checked_length("batch", batch),
        heads=lowering.checked_length("heads", heads),
        kv_heads=lowering.checked_length("kv_heads", heads if kv_heads is None else kv_heads),
        head_dim=lowering.checked_length("head_dim", head_dim),
        dtype=dtype,
        block_size=lowering.checked_block_size(block_size),
    )
    check_problem(problem)
    lowering.head_groups(attention, problem.heads)
    for name in parameters:
        if name not in bound.parameters:
            takes = ", ".join(bound.parameters) or "none"
            raise fail(f"`{attention.name}` has no parameter `{name}`", help=f"it takes {takes}")
    for name, count in (("layers", layers), ("ranks", ranks)):
        if lowering.checked_length(name, count) == 0:
            raise fail(f"`{name}` is 0, and must be positive")
    subject = Subject(bound, problem, layers, ranks, parameters, dict(inputs))
    lowering.checked_tables(attention, inputs, subject.sizes, problem.batch, needed=())
    return subject
