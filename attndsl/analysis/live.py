"""nnz: how many pairs are live, at this length and for every n."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from attndsl.analysis import counting
from attndsl.analysis.chosen import live_bounds
from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line
from attndsl.analysis.units import percent
from attndsl.expr import FALSE, Expr, add, all_of, const, lt, nodes, substitute, var
from attndsl.streams import K, Pool, Stretch, starts
from attndsl.tiles import lowering
from attndsl.tiles.tiling import replaced

RESIDUES_SHOWN = 4096
"""Largest table of polynomials by residue that a report carries."""


@dataclass(frozen=True)
class Count:
    """Live pairs over all heads and batch rows.

    value      exactly, at the length given; None while tables are missing
    formula    in n, for what `valid_for` says; None where there is none in few pieces
    bounds     without the tables: the value is between; with them or without tables None
    whatever   what it is then between for: "the tables", "is chosen" or "the tables and choices"
    expected   the mean over seeds, where keys are drawn at random
    around     polynomials in n below and above, where the formula has too many pieces
    residues   then twice the coefficients of f^2, f and 1, f = n // p, for each residue of n modulo p
    """

    value: int | None
    formula: str | None = None
    valid_for: str | None = None
    bounds: tuple[int, int] | None = None
    whatever: str | None = None
    expected: float | None = None
    around: tuple[str, str] | None = None
    residues: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Live:
    """Live pairs, and what follows from their number; None where it is not known. Of a sum those that some
    part relates, and `parts`: the live pairs of each."""

    nnz: Count
    density: float | None = None
    complexity: str | None = None
    parts: Mapping[str, Count] | None = None


def find(subject: Subject) -> Live:
    found = live(subject)
    if not subject.attention.parts:
        return found
    return replace(found, parts={name: live(part).nnz for name, part in subject.parts.items()})


def live(subject: Subject) -> Live:
    p = subject.problem
    pairs = p.batch * p.heads * subject.sizes.k.length * p.q_length
    if subject.attention.streams:
        return _of_streams(subject, pairs)
    if subject.drawn and subject.square and (found := live_bounds(subject)) is not None:
        low, high = found
        if low == high:
            return Live(Count(low), low / pairs if pairs else 0.0)
        return Live(Count(None, bounds=found, whatever="is chosen"))
    if subject.open and subject.square:
        ends = [
            (times, counting.bracket(mask, subject.problem.length)) for mask, times in subject.masks.items()
        ]
        low, high = (sum(times * end[i] for times, end in ends) for i in range(2))
        return Live(Count(None, bounds=(low, high), whatever=_whatever(subject)))
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
    complexity = CLASSES[form.degree] if form is not None else _growth(subject)
    return Live(count, value / pairs if pairs else 0.0, complexity)


def _of_streams(subject: Subject, pairs: int) -> Live:
    """A formula is of slots alone of which there are no more than tokens."""
    streams, value = subject.attention.streams, subject.block_mask.nnz * subject.times
    form = None
    few = all(s == Stretch() or (isinstance(s, Pool) and s.of == Stretch()) for s in streams)
    if few and subject.square and not any(mask.tables for mask in subject.masks):
        parts: dict[Expr, int] = {}
        for mask, times in subject.masks.items():
            for stream, start in zip(streams, starts(streams), strict=False):
                here = all_of(lt(K, stream.many), substitute(mask, {"k": add(start, K)}))
                parts[here] = parts.get(here, 0) + times
        form = closed_form(parts)
    count = Count(value)
    if form is not None and form.formula is not None and subject.problem.length >= form.start:
        count = replace(count, formula=form.formula, valid_for=form.valid_for)
    return Live(count, value / pairs if pairs else 0.0, CLASSES[form.degree] if form is not None else None)


def _whatever(subject: Subject) -> str:
    """What is not given of the tables that masks read."""
    missing = {table for table in lowering.mask_tables(subject.attention) if table.name not in subject.inputs}
    if missing.isdisjoint(subject.attention.selected):
        return "the tables"
    return "the tables and choices" if missing - {*subject.attention.selected} else "is chosen"


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


def closed_form(masks: Mapping[Expr, int]) -> counting.ClosedForm | None:
    """The number of pairs of all these masks, each as often as it says."""
    forms = []
    for mask, times in masks.items():
        form = counting.closed_form(mask)
        if form is None:
            return None
        forms.append(replace(form, doubled=form.doubled * times))
    return forms[0] if len(forms) == 1 else counting.combined(forms)


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


def _text(found: Live) -> Iterator[str]:
    count = found.nnz
    if count.value is not None:
        assert found.density is not None
        yield line("live pairs", f"{count.value:,}, {percent(found.density)}")
    if count.bounds is not None:
        low, high = count.bounds
        yield line("live pairs", f"{low:,} to {high:,}, whatever {count.whatever}")
    if count.formula is not None:
        yield line("formula", f"{count.formula}, for {count.valid_for}")
    if count.around is not None:
        ends = " and ".join(count.around)
        yield line("formula", f"between {ends}, for {count.valid_for}; by residue in --json")
    if count.expected is not None:
        yield line("over seeds", f"{count.expected:,.1f} live pairs in the mean")
    if found.complexity is not None:
        yield line("complexity", found.complexity)
    for name, count in (found.parts or {}).items():
        yield line(f"part {name}", _said(count))


def _said(count: Count) -> str:
    if count.value is not None:
        return f"{count.value:,} live pairs"
    assert count.bounds is not None
    return f"{count.bounds[0]:,} to {count.bounds[1]:,} live pairs, whatever {count.whatever}"


CARDS = """
{% call card("live pairs") %}
{% if at("nnz", "bounds") %}
{{ fact("nnz", "bounds", 0) }} – {{ fact("nnz", "bounds", 1) }}
<small>whatever {{ report.nnz.whatever }}</small>
{% else %}{{ fact("nnz", "value") }}{% endif %}
{% endcall %}
{% call card("density") %}{{ fact("density", unit="percent") }}{% endcall %}
{% if at("complexity") %}
{% call card("grows as") %}<span data-field="/complexity">{{ report.complexity | math }}</span>{% endcall %}
{% endif %}
"""

SECTION = """
{% set it = report.nnz %}
{% if at("nnz", "formula") %}
<div class="formula" data-field="/nnz/formula">{{ it.formula | math }}</div>
<p>for {{ it.valid_for | relation }}. As text: <code>{{ it.formula }}</code></p>
{% elif at("nnz", "around") %}
<div class="formula"><span data-field="/nnz/around/0">{{ it.around[0] | math }}</span> ≤ nnz ≤
<span data-field="/nnz/around/1">{{ it.around[1] | math }}</span></div>
<p>for {{ it.valid_for | relation }}. The exact polynomial differs with the residue of n
{%- if it.residues %} modulo {{ "{:,}".format(it.residues | length) }}{% endif %};
<code>analyze --json</code> lists them.</p>
{% elif at("nnz", "bounds") %}
<p>Between {{ fact("nnz", "bounds", 0) }} and {{ fact("nnz", "bounds", 1) }}, whatever {{ it.whatever }}.</p>
{% else %}
<p>{{ fact("nnz", "value") }}; no closed form in n is known.</p>
{% endif %}
{% for name in report.get("parts") or {} if at("parts", name, "value") is not none %}
<p>Part {{ name }}: {{ fact("parts", name, "value") }}.</p>
{% endfor %}
{% if at("nnz", "expected") is not none %}
<p>Links are drawn at random: {{ fact("nnz", "expected", unit="mean") }} live pairs are expected over all
seeds.</p>
{% endif %}
"""

part = Part(
    find, _text, ("nnz", "density", "complexity", "parts"),
    place=10, title="Live pairs", section=SECTION, cards=CARDS, streams=True,
)  # fmt: skip
