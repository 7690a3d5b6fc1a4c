"""Report: what a pattern costs and what it can see, part by part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line
from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.bound import Bound
from attndsl.errors import AttnError, asking, fail, suggest
from attndsl.execution import registry
from attndsl.execution.selecting import drawn
from attndsl.keywords import by_name, missing
from attndsl.language.lookups import placed
from attndsl.pictures import notebook
from attndsl.program import bound_of
from attndsl.selection import bounds
from attndsl.tiles import lowering

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Report:
    """Counts are over all heads and batch rows.

    findings  by the name of the part. Fields of parts are attributes too, such as `report.nnz`: None where
              that was not asked for or is not known
    reasons   why not, by part
    choice    where keys are chosen by content, whose choice it is about; some parts are about all that may be
              chosen
    subject   what it is about, for the picture of it; a copy has none
    """

    name: str
    length: int
    q_length: int
    heads: int
    batch: int
    layers: int
    block_size: int
    choice: Literal["drawn", "given"] | None = None
    findings: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    subject: Subject | None = field(default=None, compare=False)

    def __getattr__(self, name: str) -> Any:
        known = {} if name.startswith("_") else self._fields()
        if name not in known:
            raise missing("a report", name, [*dir(Report), *known])
        return known[name]

    if not TYPE_CHECKING:  # a type checker is to tell that there is none

        def __getitem__(self, name):
            """A report is no dictionary: raises TypeError with how `name` is read."""
            raise TypeError(f"a report is no dictionary: write `report.{name}`, or `report.to_dict()`")

    def __repr__(self) -> str:
        known = f"; {', '.join(self.findings)}" if self.findings else ""
        unknown = f"; not known: {', '.join(self.reasons)}" if self.reasons else ""
        return f"<report {self._heading()}{known}{unknown}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "subject": None}

    def _repr_html_(self) -> str:
        try:
            drawn = [] if self.subject is None else [notebook.figures(self.subject.block_mask, self.name)]
        except AttnError:
            drawn = []
        return notebook.shown([*drawn, notebook.text(str(self))])

    def __str__(self) -> str:
        """All that is known, by part, then what is not and why."""
        return "\n".join(self._lines())

    def _heading(self) -> str:
        many = [f"{self.q_length:,} x {self.length:,}"]
        many += [f"{self.heads} heads"] * (self.heads > 1) + [f"batch {self.batch}"] * (self.batch > 1)
        return f"{self.name}: queries x keys = {', '.join(many)}"

    def _lines(self) -> Iterator[str]:
        yield self._heading()
        headed = False
        for name, part in usable().items():
            if name in self.findings:
                text = part.text(self.findings[name])
                if isinstance(text, str):
                    raise fail(f"`text` of the part `{name}` gives lines, not one text", help="`yield` it")
                lines = list(text)
                own = lines[:1] != [] and lines[0].startswith("\n")
                if headed and not own:
                    lines.insert(0, f"\n{part.title or name}")
                if lines[:1] and lines[0].startswith("\n"):
                    lines[0] += self._about(part)
                yield from lines
                headed = headed or own
        if self.reasons:
            yield "\nnot known"
            yield from (line(name, why) for name, why in self.reasons.items())

    def _about(self, part: Part) -> str:
        if self.choice is None:
            return ""
        return f", of one {self.choice} choice" if part.settled else ", of all that may be chosen"

    @property
    def known(self) -> bool:
        """Whether any part that was asked for is known."""
        return any(usable()[name].known(found) for name, found in self.findings.items())

    def _fields(self) -> dict[str, Any]:
        """All fields of all parts."""
        found: dict[str, Any] = {}
        for name, part in usable().items():
            found |= dict.fromkeys(part.names(name))
            if name in self.findings:
                found |= part.fields_of(name, self.findings[name])
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the fields of `analyze --json`."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NESTED}
        found: dict[str, Any] = plain(own | self._fields() | {"reasons": self.reasons})
        return found


NESTED = ("findings", "reasons", "subject")


def plain(value: Any) -> Any:
    """Numbers, texts, lists and dictionaries for JSON."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def usable() -> dict[str, Part]:
    """The parts that can be used, by name, as they follow one another."""
    found: dict[str, Part] = registry.usable("analyses")
    clashing = clashes(found)
    kept = {name: part for name, part in found.items() if name not in clashing}
    return dict(sorted(kept.items(), key=lambda item: item[1].place))


def clashes(parts: Mapping[str, Part]) -> dict[str, str]:
    """Why some cannot be used: they give a field of the report itself, of a part of ours, or of another one
    before them."""
    givers = {own: [""] for own in (*dir(Report), *(f.name for f in fields(Report)))}
    for name, part in parts.items():
        for given in part.names(name):
            givers.setdefault(given, []).append(name)
    found: dict[str, str] = {}
    for given, names in givers.items():
        if len(names) > 1:
            first, *others = sorted(names, key=_foreign)
            whose = f"the part `{first}`" if first else "the report itself"
            found |= dict.fromkeys(others, f"it gives the field `{given}`, and so does {whose}")
    return found


def _foreign(name: str) -> bool:
    return bool(name) and registry.owner("analyses", name) != "attndsl"


@by_name
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

    length      keys n, in tokens
    q_length    queries; `length` if not given
    batch       batch rows
    heads       query heads; as many as the attention speaks of, if not given
    kv_heads    heads of keys and values; as many if not given
    head_dim    features D of queries, keys and values
    dtype       float16, bfloat16, float32 or float64: bytes and rooflines go by it
    block_size  tokens on a side of a tile, a multiple of 8
    layers      how many of it are stacked
    ranks       processes that a sequence is divided among
    parts       their names; all if not given
    parameters  names of parameters to leave open: the count as a polynomial in each
    inputs      tables; what depends on one that is missing stays unknown, with its reason

    Raises AttnError for sizes, names or tables that do not fit.
    """
    if isinstance(parameters, str):
        raise fail("`parameters` is a list of names", help=f"write `parameters=[{parameters!r}]`")
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
    """Names of parts, where that is None of all: those that cannot be used come last."""
    if isinstance(parts, str):
        raise fail("`parts` is a list of names", help=f"write `parts=[{parts!r}]`")
    if not isinstance(parts, Iterable | None):
        raise fail(f"`parts` is a list of names, not {type(parts).__name__}")
    known = list(dict.fromkeys([*usable(), *registry.names("analyses")]))
    named = known if parts is None else list(parts)
    for name in named:
        if name not in known:
            giving = [part for part, found in usable().items() if name in found.names(part)]
            help = f"it is in the part `{giving[0]}`" if giving else suggest(name, known)
            help = help or f"the parts are {', '.join(known)}"
            raise fail(f"there is no part `{name}`", help=help)
    return named


def blank(subject: Subject) -> Report:
    p = subject.problem
    return Report(
        subject.attention.name,
        p.length,
        p.q_length,
        p.heads,
        p.batch,
        subject.layers,
        p.block_size,
        subject.choice,
        subject=subject,
    )


def extended(report: Report, name: str, subject: Subject) -> Report:
    """The report with one part more, or with the reason why it is not known."""
    try:
        if why := clashes(registry.usable("analyses")).get(name):
            raise registry.refusal("analyses", name, why)
        part: Part = registry.plugin("analyses", name)
        if part.pairs:
            subject.attention.require_pairs()
        if subject.attention.of_streams and not part.streams:
            raise fail("it is about keys that are tokens, and here they are streams")
        if not part.settled and subject.attention.selected:
            fixed, wide = bounds(subject.attention)
            given = {t.name: subject.inputs[t.name] for t in wide.inputs if t.name in subject.inputs}
            whole = replace(subject.bound, attention=wide)
            subject = replace(subject, bound=whole, inputs=given, fixed=fixed)
        with placed(subject.attention, subject.problem.heads), asking(f"the analysis `{name}`"):
            found = part.find(subject)
        return replace(report, findings={**report.findings, name: found})
    except AttnError as error:
        return replace(report, reasons={**report.reasons, name: error.diagnostics[0].message})


def subject_of(
    value: Bound | Attention, *, length: int, q_length: int | None, batch: int, heads: int | None,
    kv_heads: int | None, head_dim: int, dtype: str, block_size: int, layers: int, ranks: int,
    parameters: tuple[str, ...], inputs: Mapping[str, ArrayLike],
) -> Subject:  # fmt: skip
    bound = bound_of(value)
    attention, inputs = bound.attention, {**bound.tables, **inputs}
    heads = lowering.heads_of(attention, inputs) if heads is None else heads
    problem = Problem.of(
        attention, length=length, q_length=q_length, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, dtype=dtype, block_size=block_size,
    )  # fmt: skip
    for name in parameters:
        if name not in bound.parameters:
            help = f"it takes {', '.join(bound.parameters) or 'none'}"
            if name == "n":
                help = f"a formula in n is told anyhow; {help}"
            elif "," in name:
                help = f"each is given by itself: `--in {name.replace(',', ' --in ')}`"
            raise fail(f"`{attention.name}` has no parameter `{name}`", help=help)
    for name, count in (("layers", layers), ("ranks", ranks)):
        if lowering.checked_length(name, count) == 0:
            raise fail(f"`{name}` is 0, and must be positive")
    subject = Subject(bound, problem, layers, ranks, parameters, dict(inputs))
    lowering.checked_tables(attention, inputs, subject.sizes, problem.batch, needed=())
    if all(table.name in inputs for table in attention.selected):
        return subject
    chosen: dict[str, Any] = {}
    try:
        # keys are other ones in each part
        for part in subject.parts.values():
            chosen |= drawn(part.attention, part.sizes, problem.kv_heads, head_dim, part.inputs)
    except AttnError as error:
        return replace(subject, drawn=True, undrawn=error)
    return replace(subject, inputs={**chosen, **inputs}, drawn=True)
