"""Part: one question about an attention, and all that is shown of the answer. One file is one part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.errors import AttnError, fail
from attndsl.expr import ZERO, Expr, const, substitute, var
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from attndsl.bound import Bound
    from attndsl.pictures.style import Drawing


@dataclass(frozen=True, eq=False)
class Subject:
    """An attention on one problem, with what was given of its tables and parameters left open."""

    bound: Bound
    problem: Problem
    layers: int
    ranks: int
    parameters: tuple[str, ...]
    inputs: Mapping[str, ArrayLike]
    drawn: bool = False
    """Whether no choice of keys was given: among the inputs is one that was drawn."""
    undrawn: AttnError | None = None
    """Or why there is none."""
    fixed: Attention | None = None
    """Where keys are chosen by content, and this is about all that may be chosen: what is related whatever is
    chosen."""

    @property
    def attention(self) -> Attention:
        return self.bound.attention

    @cached_property
    def parts(self) -> dict[str, Subject]:
        """Of a sum its parts, each as it would be alone; of any other attention itself."""
        found = {}
        for part in self.attention.parts:
            held = {table.name for table in (*part.attention.inputs, *part.attention.selected)}
            given = {name: table for name, table in self.inputs.items() if name in held}
            alone = replace(self.bound, attention=part.attention)
            found[part.attention.name] = replace(self, bound=alone, inputs=given)
        return found or {self.attention.name: self}

    @property
    def choice(self) -> Literal["drawn", "given"] | None:
        """Where keys are chosen by content, whose choice is among the inputs."""
        if not self.attention.selected:
            return None
        return "drawn" if self.drawn else "given"

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
        if self.undrawn is not None and self.attention.selected:
            raise self.undrawn
        return lowering.checked_tables(self.attention, self.inputs, self.sizes, self.problem.batch)

    @cached_property
    def block_mask(self) -> BlockMask:
        """The tiles. Raises AttnError where tables are missing, and where there are no weights of pairs."""
        self.attention.require_pairs()
        return lowering.block_mask(self.attention, self.sizes, self.tables, self.problem.block_size)

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
        here = lowering.quantifier_free(lowering.alone(substitute(mask, known)))
        found[here] = found.get(here, 0) + problem.batch
    return found


@dataclass(frozen=True)
class Part:
    """One analysis, registered under the entry-point group `attndsl.analyses`; its name there is the part's.

    find     the finding: a frozen value that can be pickled, of numbers, texts, lists, dictionaries and
             dataclasses of these. What raises AttnError is left out of the report, which tells why
    text     lines about a finding for a terminal of 80 columns, as `text.line` and `text.table` write them
    fields   attributes of a finding that are fields of the report and of `--json`; where there are none
             the finding is one itself, under the part's name
    known    whether a finding says anything; others do not count as known
    place    a report shows parts by rising place
    title    the heading of its section on the page, else its name
    section  the section: a Jinja template over the fields of `--json` that may use what html/macros.jinja
             defines. Left out, all fields are listed
    cards    likewise, for "At a glance"
    streams  whether it knows keys that are no tokens: of an attention with `keys` others are left out
    settled  whether it is about one choice of keys, drawn, where keys are chosen by content; else it is told
             of an attention to all that might be chosen
    pairs    whether it is about weights of pairs, and not known where `approx` stands in their place
    draw     a picture for the section. Raises AttnError where there is none
    """

    find: Callable[[Subject], Any]
    text: Callable[[Any], Iterable[str]]
    fields: tuple[str, ...] = ()
    known: Callable[[Any], bool] = lambda finding: True
    place: int = 1000
    title: str = ""
    section: str = "{{ listed(told) }}"
    cards: str = ""
    streams: bool = False
    settled: bool = True
    pairs: bool = True
    draw: Callable[[Subject, Any], Drawing] | None = None

    def names(self, name: str) -> tuple[str, ...]:
        """The fields of the report that the part of this name gives."""
        return self.fields or (name,)

    def fields_of(self, name: str, finding: Any) -> dict[str, Any]:
        """And what it found as these."""
        return {field: getattr(finding, field) for field in self.fields} or {name: finding}
