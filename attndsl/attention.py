"""The typed, immutable attention that elaboration produces and everything else reads."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field, replace
from typing import Literal

from attndsl.errors import Span, fail
from attndsl.expr import (
    TRUE,
    ZERO,
    Expr,
    Selected,
    Table,
    all_of,
    any_of,
    const,
    exists,
    maximum,
    mul,
    substitute,
    var,
)
from attndsl.keywords import NoCall
from attndsl.streams import Numbers, Streams, described, memory, some_key, tokens_read

HEADS_TRIED = 256


@dataclass(frozen=True)
class Relation:
    """A pattern: which (q, k) are related and, where `+` was used, how many times.

    `mask` is a truth over q, k, n, nq, b, h, H and tables; `count` an integer that is positive exactly where
    the mask holds, or None where every multiplicity is one.
    """

    mask: Expr
    count: Expr | None = None


@dataclass(frozen=True)
class Norm:
    """`softmax` (with an optional sink logit per head), `sigmoid`, `relu`, or the score itself as a weight:
    `linear` divides by the sum of the row, `none` does not."""

    kind: Literal["softmax", "sigmoid", "relu", "linear", "none"] = "softmax"
    sink: Expr | None = None


@dataclass(frozen=True)
class Approx:
    """What is computed in place of a weight for each pair, from all tokens that the mask leaves.

    `nystrom` softmax attention by way of means of queries and keys over `landmarks` segments, its
              pseudo-inverse by so many `iterations` (Xiong et al., 2021, algorithm 1)
    `shen`    features of queries that sum to 1, and of keys that sum to 1 over positions (Shen et al., 2021)
    """

    kind: Literal["nystrom", "shen"]
    landmarks: int = 0
    iterations: int = 0


@dataclass(frozen=True)
class HeadGroup:
    """What one set of query heads does.

    score:  the logit, a real over s (= Q @ K / sqrt(D)), Q, K, q, k, n, b, h, H, D and tables; `var("s")`
            itself where no score was given. `Q @ K` written out appears as inner(Q, K).
    decay:  a real factor of the weight with the multiplicity already in it, or None.
    heads:  a truth over h and H; the groups of one attention hold each head exactly once.
    """

    relation: Relation
    score: Expr
    decay: Expr | None = None
    norm: Norm = Norm()
    heads: Expr = TRUE


@dataclass(frozen=True)
class Summand:
    """An attention of a sum; `gate` multiplies its output, a real over q, n, nq, b, h, H, D and tables."""

    attention: Attention
    gate: Expr


@dataclass(frozen=True)
class Attention:
    """The meaning of one attention, or of a pattern standing alone, with its parameters bound.

    inputs:   run-time tables, in the order of their declaration.
    learned:  parameters, trainable ones and constants that are drawn, in the order of their first use.
    offset:   position of query row 0 over n and nq; None means n - nq, which must not be negative.
    approx:   what stands in place of weights of pairs, with one group that has nothing but a mask of keys.
    least_heads: how many heads there are at least: one more than the last that a range or list names.
    parts:    of a sum of attentions. Its one group then says what some part relates, its inputs are theirs
              too, and learned are parameters of gates alone.
    streams:  what the keys are, where they are not the tokens alone: `k` in the expressions is then the
              number of an entry, as streams.py says.
    numbered: of such an attention without its streams: which numbers entries have. Where they stand is all
              in its expressions.
    written:  where its definition is, and
    parameters: what that takes, for what is told of it later; no part of what it is.
    """

    name: str
    groups: tuple[HeadGroup, ...]
    inputs: tuple[Table, ...] = ()
    learned: tuple[Table, ...] = ()
    offset: Expr | None = None
    least_heads: int = 1
    approx: Approx | None = None
    parts: tuple[Summand, ...] = ()
    streams: Streams = ()
    numbered: Numbers | None = None
    written: Span | None = field(default=None, compare=False, repr=False)
    parameters: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @staticmethod
    def of_pattern(name: str, relation: Relation) -> Attention:
        """A pattern as an attention of its own, called `name`: `relation`, no score, one group of heads."""
        decay = None if relation.count is None else mul(const(1.0), relation.count)
        return Attention(name, (HeadGroup(relation, var("s"), decay),))

    @staticmethod
    def of_sum(
        name: str,
        parts: tuple[Summand, ...],
        inputs: tuple[Table, ...],
        learned: tuple[Table, ...],
    ) -> Attention:
        """A sum of parts, which have one offset; `name`, `inputs` and `learned` are as the fields."""
        some = any_of(
            *(
                all_of(group.heads, tokens_read(part.attention.streams, group.relation.mask))
                for part in parts
                for group in part.attention.groups
            )
        )
        least = max(part.attention.least_heads for part in parts)
        offset = parts[0].attention.offset
        return Attention(
            name, (HeadGroup(Relation(some), var("s")),), inputs, learned, offset, least, parts=parts
        )

    def __repr__(self) -> str:
        return f"<attention {self.name}{self.described}>"

    @property
    def described(self) -> str:
        """What there is beside a mask and a softmax: `: score, sink; inputs doc : int[n]`."""
        first = self.groups[0]
        beside = {
            f"sum of {', '.join(part.attention.name for part in self.parts)}": self.parts,
            "" if self.approx is None else f"approx {self.approx.kind}": self.approx,
            f"keys {described(self.streams)}": self.streams,
            f"{len(self.groups)} groups of heads": len(self.groups) > 1,
            "score": any(group.score is not var("s") for group in self.groups),
            "weights counted or decayed": any(group.decay is not None for group in self.groups),
            f"norm {first.norm.kind}": first.norm.kind != "softmax",
            "sink": any(group.norm.sink is not None for group in self.groups),
        }
        chosen = (t.origin.selection for t in self.selected if isinstance(t.origin, Selected))
        listed = {
            "": [name for name, there in beside.items() if there],
            "chosen by ": dict.fromkeys(chosen),
            "inputs ": map(str, self.inputs),
            "learned ": [str(table) for table in self.learned if table.learned],
        }
        said = [what + ", ".join(names) for what, each in listed.items() if (names := [*each])]
        return f": {'; '.join(said)}" if said else ""

    def require_pairs(self) -> None:
        """Raises AttnError where there are no weights of pairs."""
        for approx in self.approximations:
            raise fail(f"`{approx.kind}` has no weights of pairs")

    @property
    def approximations(self) -> tuple[Approx, ...]:
        """What stands in place of weights of pairs, its own and that of its parts."""
        each = (self, *(part.attention for part in self.parts))
        return tuple(attention.approx for attention in each if attention.approx is not None)

    @property
    def of_streams(self) -> bool:
        """Whether keys are streams, its own or those of a part."""
        return bool(self.streams) or any(part.attention.streams for part in self.parts)

    @property
    def held(self) -> int:
        """How many keys of memory a call is given, for itself or the part that has most."""
        return max([memory(self.streams), *(part.attention.held for part in self.parts)])

    @functools.cached_property
    def selected(self) -> tuple[Table, ...]:
        """The tables of its choices and of its parts', by name."""
        of_parts = (table for part in self.parts for table in part.attention.selected)
        found = {*of_parts, *(table for table in self.read if isinstance(table.origin, Selected))}
        return tuple(sorted(found, key=lambda table: table.name))

    @functools.cached_property
    def read(self) -> frozenset[Table]:
        """The tables in its expressions, without those that choices and streams are made by."""
        read: set[Table] = set()
        for group in self.groups:
            parts = (group.relation.mask, group.relation.count, group.score, group.decay, group.norm.sink)
            read |= {table for part in parts if part is not None for table in part.tables}
        return frozenset(read)

    @functools.cached_property
    def counts_queries(self) -> bool:
        """Whether expressions or inputs depend on `nq`, how many queries a call has; without its choices."""
        each = (e for g in self.groups for e in (g.relation.mask, g.score, g.decay, g.norm.sink))
        return any(e is not None and "nq" in e.free for e in each) or any("nq" in t.dims for t in self.inputs)

    @property
    def made_by_head(self) -> bool:
        """Whether keys of a stream are made for each query head."""
        return any("H" in table.dims for stream in self.streams for table in stream.tables)

    @functools.cached_property
    def attended(self) -> Attention:
        """What is left when the keys of its streams are made: of these, as they come."""
        if not self.streams:
            return self
        made = {table for stream in self.streams for table in stream.tables} - self.read
        inputs, learned = (
            tuple(table for table in tables if table not in made) for tables in (self.inputs, self.learned)
        )
        return replace(self, inputs=inputs, learned=learned, streams=(), numbered=Numbers.of(self.streams))

    @functools.cached_property
    def over_tokens(self) -> Attention:
        """The same with relations of queries and the tokens that they read. Raises AttnError where a query
        reads memory, which is no token."""
        if self.held:
            raise fail(f"`{self.name}` reads memory, which is no token here")
        if not self.streams:
            return self
        groups = tuple(
            replace(group, relation=Relation(tokens_read(self.streams, group.relation.mask)))
            for group in self.groups
        )
        return replace(self, groups=groups, streams=())

    def keyed(self) -> tuple[tuple[Expr, Expr], ...]:
        """What holds just where a query has a key, of any stream, with the heads of which that is said. Of a
        sum it is a key of some part."""
        if not self.parts:
            return tuple([(some_key(self.streams, g.relation.mask), g.heads) for g in self.groups])
        some = (all_of(mask, heads) for part in self.parts for mask, heads in part.attention.keyed())
        return ((any_of(*some), TRUE),)

    def enough_heads(self) -> int:
        """The least number of heads at which every group holds one; claims are about that many or more."""
        heads = max([self.least_heads, *(part.attention.enough_heads() for part in self.parts)])
        while not all(self._holds_one(group, heads) for group in self.groups):
            heads += 1
            if heads > self.least_heads + HEADS_TRIED:
                raise fail(f"a group of heads of `{self.name}` holds no head")
        return heads

    def _holds_one(self, group: HeadGroup, heads: int) -> bool:
        return any(substitute(group.heads, {"h": const(h), "H": const(heads)}) is TRUE for h in range(heads))

    def any_head(self) -> Expr:
        """What some head relates, where every group holds a head: queries and the tokens that they read.

        The head is bound under a name that no text has: what it is looked up at may read h.
        """
        heads = maximum(var("H"), const(self.enough_heads()))
        found = []
        for group in self.groups:
            mask = tokens_read(self.streams, group.relation.mask)
            which = substitute(all_of(group.heads, mask), {"h": var("?h")})
            found.append(exists("?h", ZERO, heads, which) if "h" in mask.free else mask)
        return any_of(*found)


sys.modules[__name__].__class__ = NoCall
