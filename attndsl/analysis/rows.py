"""rows: queries without a key, and whether any looks ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np

from attndsl.analysis import counting
from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line
from attndsl.expr import ZERO, const, exists, le, substitute, var
from attndsl.meaning.pointwise import evaluate
from attndsl.relations import proofs
from attndsl.tiles.lowering import quantifier_free


@dataclass(frozen=True)
class Rows:
    """empty_rows counts them over all heads and batch rows, None while tables are missing; `causal` is None
    where that is undecided, and `not_causal_at` a pair that refutes it. `choice`: as of a report."""

    empty_rows: int | None
    causal: bool | None
    not_causal_at: Mapping[str, int] | None
    choice: str | None = None


def rows(subject: Subject) -> Rows:
    causal = proofs.subset(subject.attention.any_head(), le(var("k"), var("q")))
    status = {"proved": True, "refuted": False, "undecided": None}[causal.status]
    empty = None if subject.open else _empty_rows(subject)
    return Rows(empty, status, causal.counter_example, subject.choice)


def _empty_rows(subject: Subject) -> int:
    """Over all heads and batch rows."""
    p = subject.problem
    if subject.attention.parts and subject.attention.held:
        # its tiles are of tokens alone
        empty = (part.block_mask.empty_rows() for part in subject.parts.values())
        return int(reduce(np.logical_and, empty, np.ones((p.batch, p.heads, p.q_length), bool)).sum())
    if (
        subject.attention.streams
        or not subject.square
        or not all(counting.is_exact(mask) for mask in subject.masks)
    ):
        return int(subject.block_mask.empty_rows().sum()) * subject.times
    n, total = p.length, 0
    for mask, times in subject.masks.items():
        some = substitute(quantifier_free(exists("k", ZERO, var("n"), mask)), {"n": const(n)})
        total += times * (n - int(evaluate(some, np.arange(n), np.arange(n)).sum()))
    return total


def _text(found: Rows) -> Iterator[str]:
    if found.empty_rows is not None:
        of = f", of one {found.choice} choice" if found.choice else ""
        yield line("empty rows", f"{found.empty_rows:,}{of}")
    if found.causal is not None:
        at = ", ".join(f"{name} = {value}" for name, value in (found.not_causal_at or {}).items())
        yield line("causal", "yes, for every n" if found.causal else f"no: {at}")


CARDS = """
{% call card("rows without a key") %}{{ fact("empty_rows") }}{% endcall %}
{% call card("causal") %}
{% if report.causal is none %}undecided{% elif report.causal %}yes<small>for every n</small>{% else %}no
{% if at("not_causal_at") %}
<small>
{%- for name, value in report.not_causal_at.items() %}{{ name }} = {{ value }}{{ ", " if not loop.last }}
{%- endfor %}</small>
{% endif %}
{% endif %}
{% endcall %}
"""

part = Part(
    rows, _text, ("empty_rows", "causal", "not_causal_at"),
    known=lambda found: (found.empty_rows, found.causal) != (None, None), place=30, section="", cards=CARDS,
    streams=True,
)  # fmt: skip
