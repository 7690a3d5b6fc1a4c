"""The contract of a selection: what it says of itself, what it chooses from, and what comes of its choice.

A choice is data. It is made once per call, of q and k, and every backend sees it as a table that masks read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from attndsl import expr as ir
from attndsl.attention import Attention, Relation
from attndsl.axis import Axis
from attndsl.expr import Expr, Selected, Table

if TYPE_CHECKING:
    from torch import Tensor

    from attndsl.backend import Problem

KINDS = ("labels", "order", "list")
LABELS = 2**15
"""Labels are below this: they are sorted as 16-bit numbers."""


@dataclass(frozen=True)
class Chunks:
    """How an order relates positions: in some round the key's piece of `size` ranks is the query's or the one
    before it. With `wrap` the last piece of the round before stands before a round's first; with `count` a
    pair counts once for each round that holds it."""

    size: int
    wrap: bool = False
    count: bool = False


@dataclass(frozen=True)
class First:
    """How an order relates positions: in some round query and key both have a rank below `width`. The rounds
    of queries come first in the table, then as many of keys."""

    width: int


@dataclass(frozen=True, eq=False)
class Offered:
    """What a choice is made of.

    q [B, H, nq, D], k [B, Hkv, n, D]  as the call has them, detached, in at least float32
    tables       inputs by name, with the axes of their Table, real ones in the dtype of q
    q_at, k_at   where queries and keys stand, keys by rising position; n as in `Call`
    """

    q: Tensor
    k: Tensor
    tables: Mapping[str, Tensor]
    q_at: Axis
    k_at: Axis
    n: tuple[int, ...]


class Selection(Protocol):
    """Registered under the entry-point group `attndsl.selections`; its name there is its word in texts.

    Parameters and defaults are those of `signature`, by annotation: `int`, `bool`, `str` (a word), `Table`
    (an input), `Score` (an expression over Q and K of tokens, or over their `mean`, `min` and `max` of
    blocks; by default the inner product). A list has `of` beside, which is in its origin.
    """

    kind: Literal["labels", "order", "list"]

    def signature(self, *arguments: Any, **named: Any) -> None:
        """Never called: its `arguments`, and those `named`, are what a text gives. Raises nothing: `check`
        says what does not fit."""

    def check(self, origin: Selected) -> None:
        """Raises AttnError for arguments, rows or units of `origin` that make no sense."""

    def rounds(self, origin: Selected) -> int:
        """How many there are by `origin`. Of an order: rows of ranks. Of a list: entries of a row, if there
        are as many to choose among. Of labels: how many there are at most, LABELS where that is not known."""

    def relates(self, origin: Selected) -> Chunks | First | None:
        """Of an order: how ranks relate, by the arguments of `origin`."""

    def reads(self, origin: Selected) -> Literal["past", "of", "future"]:
        """On which keys the choice of a query by `origin` depends: those up to it, those that `of` holds, or
        any."""

    def counts(self, origin: Selected, problem: Problem) -> Mapping[str, float]:
        """What choosing by `origin` on a problem takes, over all heads and batch rows: `products`, of two
        numbers each, and `sorted`, numbers that are sorted, or among which the greatest are looked for."""

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        """What `origin` makes of what is `offered`. Integers: labels [B, H, n] or ranks [B, H, rounds, n] of
        the keys, or what is chosen for each row [B, H, rows, r], r at most the number of keys or blocks:
        places among the keys, or numbers of blocks, each once, -1 where `of` holds fewer. H are the query
        heads; those that share a key head have equal labels and ranks. Equal on equal input; of equal scores
        the first comes first; NaN is the largest score."""

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        """The same of `origin` and `offered` by the plainest code: what conformance checks `choose` against.
        It is offered float64 where `choose` is offered float32, so that what is not exact must be computed in
        float64 by both."""


def table(name: str, origin: Selected, kind: str, rounds: int) -> Table:
    """What holds the choices of one leaf."""
    dims: tuple[str | int, ...] = {
        "labels": ("B", "H", "n"),
        "order": ("B", "H", rounds, "n"),
        "list": ("B", "H", "nq" if origin.rows == 1 else f"blocks of {origin.rows}", rounds),
    }[kind]
    return Table(name, "int", dims, origin)


def listed(choices: Table, q: Expr, k: Expr, of: Expr) -> Relation:
    """Keys whose unit is chosen for the row of q."""
    return Relation(ir.all_of(of, ir.intable(k, choices, *choices.implicit, q)))


def ordered(choices: Table, how: Chunks | First, q: Expr, k: Expr, n: Expr) -> Relation:
    """Positions that are related in some round."""
    rounds = cast(int, choices.explicit[0])

    def rank(row: int, p: Expr) -> Expr:
        return ir.lookup(choices, *choices.implicit, ir.const(row), p)

    if isinstance(how, First):
        width, half = ir.const(how.width), rounds // 2
        return Relation(
            ir.any_of(
                *(
                    ir.all_of(ir.lt(rank(row, q), width), ir.lt(rank(half + row, k), width))
                    for row in range(half)
                )
            )
        )
    size, last = ir.const(how.size), ir.floordiv(ir.add(n, ir.const(-1)), ir.const(how.size))
    slots = []
    for row in range(rounds):
        mine, other = (ir.floordiv(rank(row, p), size) for p in (q, k))
        before = ir.sub(mine, other)
        slots.append(ir.any_of(ir.eq(before, ir.ZERO), ir.eq(before, ir.ONE)))
        if how.wrap:
            wrapped = ir.floordiv(rank((row - 1) % rounds, k), size)
            slots.append(ir.all_of(ir.eq(mine, ir.ZERO), ir.eq(wrapped, last)))
    if not how.count:
        return Relation(ir.any_of(*slots))
    return Relation(ir.any_of(*slots), ir.add(*(ir.where(slot, ir.ONE, ir.ZERO) for slot in slots)))


def lists_of(mask: Expr) -> list[Expr]:
    """The leaves of a mask that read a list of choices."""
    found = (node for node in ir.nodes(mask) if node.op == "intable" and isinstance(node.value, Table))
    return [
        node for node in found if isinstance(node.value, Table) and isinstance(node.value.origin, Selected)
    ]


def origin_of(leaf: Expr) -> Selected:
    """Where what a leaf reads comes from."""
    assert isinstance(leaf.value, Table)
    assert isinstance(leaf.value.origin, Selected)
    return leaf.value.origin


def widest(e: Expr) -> Expr:
    """A truth that holds wherever a mask does for some choice; it reads no choice."""
    return _without(e, ir.TRUE)


def narrowest(e: Expr) -> Expr:
    """A truth that holds only where a mask does for every choice."""
    return _without(e, ir.FALSE)


def somewhere(mask: Expr) -> Expr:
    """A truth over q that holds only where some key is in a mask, whatever is chosen.

    A row of a list holds one of its candidates where there are any. So where all of them satisfy the rest of
    the mask, whatever else is chosen, one that is chosen does.
    """
    key, unit = ir.var("?k"), ir.var("?u")

    def some(bound: Expr, truth: Expr) -> Expr:
        return ir.exists(str(bound.value), ir.ZERO, ir.var("n"), truth)

    found = [some(key, ir.substitute(narrowest(mask), {"k": key}))]
    for leaf in lists_of(mask):
        origin = origin_of(leaf)
        place, row = (
            ir.floordiv(ir.var(p), ir.const(size)) for p, size in (("k", origin.unit), ("q", origin.rows))
        )
        if (leaf.args[0], leaf.args[-1]) != (place, row):
            continue  # of a key or a query at another place
        begins = ir.lt(ir.mul(unit, ir.const(origin.unit)), ir.var("n"))
        candidate = ir.all_of(begins, ir.substitute(origin.of or ir.TRUE, {"q": row, "k": unit}))
        rest = narrowest(_chosen(mask, leaf))
        if origin.unit == 1:
            fits = ir.substitute(rest, {"k": unit})
        else:
            fits = some(key, ir.substitute(ir.all_of(ir.eq(place, unit), rest), {"k": key}))
        every = ir.negate(some(unit, ir.all_of(candidate, ir.negate(fits))))
        found.append(ir.all_of(some(unit, candidate), every))
    return ir.any_of(*found)


def _chosen(mask: Expr, leaf: Expr) -> Expr:
    """The mask where a leaf holds."""
    done: dict[Expr, Expr] = {leaf: ir.TRUE}
    for node in ir.nodes(mask):
        if node not in done:
            done[node] = ir.rebuild(node, tuple([done[arg] for arg in node.args]))
    return done[mask]


def _without(e: Expr, instead: Expr) -> Expr:
    if not any(isinstance(table.origin, Selected) for table in e.tables):
        return e
    if e.op in ("and", "or"):
        return ir.rebuild(e, tuple(_without(arg, instead) for arg in e.args))
    if e.op == "not":
        return ir.negate(_without(e.args[0], ir.negate(instead)))
    if e.op == "exists":
        return ir.rebuild(e, (*e.args[:2], _without(e.args[2], instead)))
    # a token is itself: in its own bucket, and in its own piece of an order
    if ir.substitute(e, {"k": ir.var("q")}) is ir.negate(instead):
        same = ir.eq(ir.var("q"), ir.var("k"))
        return ir.negate(same) if instead is ir.TRUE else same
    return instead


def bounds(attention: Attention) -> tuple[Attention, Attention]:
    """Without choices: what is related whatever is chosen, and all that may be."""

    def bounded(attention: Attention, bound: Callable[[Expr], Expr]) -> Attention:
        groups = (replace(group, relation=Relation(bound(group.relation.mask))) for group in attention.groups)
        parts = (replace(part, attention=bounded(part.attention, bound)) for part in attention.parts)
        return replace(attention, groups=tuple(groups), parts=tuple(parts))

    return bounded(attention, narrowest), bounded(attention, widest)
