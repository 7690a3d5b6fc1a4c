"""The kernel of one attention: leaves, passes and gradients of each group of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Gradients, Problem
from attndsl.emit.leaves import Leaf, Products
from attndsl.emit.score import Score, score_of
from attndsl.execution.group_call import GroupCall, KnownLeaves, Margins, addresses, is_far, sloped
from attndsl.execution.torch_eval import singles, widened
from attndsl.tiles.blockmask import Rows, TileGrid
from attndsl.tiles.lowering import head_groups
from attndsl.tiles.residues import Sorted, Steps

from .layout import ROWS, Layout, Layouts
from .passes import Function, Known, Masks, Prepared, fields_of, function, run
from .score import code

PIECES = 8
"""Tasks of a backward pass at least, whatever the number of threads, so that sums have one order."""
ROOM = 2**26
"""Numbers that those of one head may take together; of longer sequences there are fewer tasks."""
LANES = 16
"""At most."""
FEW = 32
"""Rows of a key head up to which keys are lanes in place of queries."""
SEGMENT = 2048
"""Keys that one task goes through then."""
MARGINS: Margins = {
    "number": (0, 0),
    "query": (0, ROWS),
    "key": (0, LANES),
    "distance": (LANES, ROWS),
    "table": (0, 1),
}
"""Entries beside those of a leaf, which no pair asks for but vectors of pairs hold."""


def asked(attention: Attention, problem: Problem) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The libraries that a plan may ask for, as of `library`: with gradients of no table and of all."""
    double = ("DOUBLE",) * (problem.dtype == "float64")
    given = frozenset(t.name for t in (*attention.inputs, *attention.learned) if t.dtype == "float")
    for group in attention.groups:
        score = score_of(group, problem.head_dim, True)
        assert not isinstance(score, str)
        yield from ((code(score, None), name, double) for name in ("forward", "decode"))
        for tables in (frozenset(), given) if problem.training else ():
            yield code(score, sloped(score, tables)), "backward", double


def stands(scores: Iterable[Score], one: Sorted) -> bool:
    """Whether sorted entries are read where they stand: leaves have an entry for each place, and so would
    vectors that they are made of."""
    return one.steps is not None and not any(score.leaves for score in scores)


@dataclass(frozen=True, eq=False)
class Group:
    """What one group of heads runs; `heads` bool [H] says which they are."""

    group: HeadGroup
    score: Score
    heads: NDArray[np.bool_]
    double: bool

    @cached_property
    def alone(self) -> bool:
        """Whether there is no other group."""
        return bool(self.heads.all())


@lru_cache(maxsize=256)
def _function(score: Score, name: str, wanted: frozenset[Leaf] | None, defined: tuple[str, ...]) -> Function:
    return function(code(score, wanted), name, defined)


@dataclass(frozen=True, eq=False)
class Compiled:
    """The kernel of one attention over tiles; `alone` where the log-sum-exp that comes back is that of
    the keys of the call, `steps` where tiles are of sorted entries."""

    attention: Attention
    alone: bool = True
    steps: Steps | None = None
    layouts: Layouts = field(default_factory=Layouts)
    known: Known = field(default_factory=Known)
    leaves: KnownLeaves = field(default_factory=KnownLeaves)
    groups: dict[tuple[object, ...], tuple[Group, ...]] = field(default_factory=dict)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        call = _widened(call)
        q, v = call.q, call.v
        if not (q.numel() and call.k.numel()):
            return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -torch.inf)
        out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])
        for part in self.parts(call):
            part.forward({"out": out, "lse": lse})
        return out, lse

    def in_place(self, call: Call, one: Sorted) -> Compiled | None:
        """As `apart.InPlace`."""
        stand = stands([part.score for part in self.parts(call)], one)
        return replace(self, steps=one.steps) if stand else None

    def repeated(self, call: Call) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """As `Repeatable`: where all but the addresses of vectors is known."""
        parts, shape = self.parts(call), (*call.q.shape[:3], call.v.shape[3])
        if _widened(call) is not call or not all(part.bare for part in parts):
            return None
        prepared = [part.prepared() for part in parts]

        def again(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = q.new_empty(shape), q.new_empty(shape[:3])
            for one in prepared:
                one(q, k, v, out, lse)
            return out, lse

        return again

    def parts(self, call: Call) -> list[Part]:
        """One for each group of heads."""
        (_, heads, _, d), double = call.q.shape, call.q.dtype == torch.float64
        key = (heads, d, call.adjacent, double)
        groups = self.groups.get(key)
        if groups is None:
            which, found = np.array(head_groups(self.attention, heads)), []
            for i, group in enumerate(self.attention.groups):
                score = score_of(group, d, call.adjacent)
                assert not isinstance(score, str)
                found.append(Group(group, score, which == i, double))
            groups = self.groups[key] = tuple([group for group in found if group.heads.any()])
        return [Part(call, group, self) for group in groups]

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        given, call = call, _widened(call)
        tables = {name: torch.zeros_like(x) for name, x in singles(call.tables, wanted).items()}
        if call.q.numel() and call.k.numel():
            back = out, lse, grad_out.to(call.q.dtype), grad_lse
            first, *others = [part.gradient(*back, tables) for part in self.parts(call)]
            for more in others:
                for total, x in zip(first, more, strict=True):
                    total += x
            gq, gk, gv = first
        else:
            gq, gk, gv = (torch.zeros(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
        if call is not given:
            vectors = zip((gq, gk, gv), (given.q, given.k, given.v), strict=True)
            gq, gk, gv = (g.to(x.dtype) for g, x in vectors)
        return gq, gk, gv, {name: g.to(given.tables[name].dtype) for name, g in tables.items()}

    def masks(self, call: Call, group: Group, few: bool) -> Masks:
        """As the library reads them."""
        blocks = call.block_mask
        known = self.known.setdefault(blocks, {})
        key = (call.q.shape[0], group, few)
        if key not in known:
            masks: Sequence[Rows | TileGrid] = (blocks.rows or ()) if few else blocks.grids
            layouts = tuple([self.layout(mask) for mask in masks])
            known[key] = Masks.of(layouts, blocks.index, call.q.shape[0], group.heads)
        return known[key]

    def layout(self, mask: TileGrid | Rows) -> Layout:
        found = self.layouts.get(mask)
        if found is None:
            made = Layout.of_rows(mask) if isinstance(mask, Rows) else Layout.of(mask)
            found = self.layouts[mask] = made
        return found


def _widened(call: Call) -> Call:
    """With vectors of at least float32, each of adjacent numbers."""
    call = widened(call)
    if call.q.stride(3) == call.k.stride(3) == call.v.stride(3) == 1:
        return call
    q, k, v = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


@dataclass(frozen=True, eq=False)
class Part:
    """What one group of heads does in one call."""

    call: Call
    own: Group
    kernel: Compiled

    @property
    def score(self) -> Score:
        return self.own.score

    def forward(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes the contiguous tensors `out` and `lse` and, where they are there, `top` and `sum`."""
        call = self.call
        (batch, heads, nq, _), dv = call.q.shape, call.v.shape[3]
        few = "top" not in tensors and self.few
        masks = self.kernel.masks(call, self.own, few)
        fields: dict[str, int] = {name: x.data_ptr() for name, x in tensors.items()}
        if few:
            low, high = masks.span
            segments = -(-(high - low) // SEGMENT)
            parts = call.q.new_empty((segments, batch, heads, nq, dv + 2))
            fields |= {"low": low, "segments": segments, "parts": parts.data_ptr()}
        sink = self.host.sink if self.own.group.norm.sink is not None else None
        if sink is not None:
            fields["sink"] = sink.data_ptr()
        self.run("decode" if few else "forward", masks, fields)

    @property
    def few(self) -> bool:
        """Whether keys are lanes in place of queries."""
        (_, heads, nq, _), kv_heads = self.call.q.shape, self.call.k.shape[1]
        return nq * (heads // kv_heads) <= FEW and self.call.block_mask.rows is not None

    @property
    def bare(self) -> bool:
        """Whether there is a forward pass, and it reads nothing but vectors and tiles."""
        there = self.call.q.numel() and self.call.k.numel()
        return bool(there) and not (self.score.leaves or self.own.group.norm.sink is not None or self.few)

    def prepared(self) -> Prepared:
        """A forward pass, if it is `bare`."""
        masks = self.kernel.masks(self.call, self.own, few=False)
        return Prepared.of(_function(self.score, "forward", None, self.defined), masks, self.fields(masks))

    def fields(self, masks: Masks) -> dict[str, int | float]:
        """What every pass is told."""
        call, score, steps = self.call, self.score, self.kernel.steps
        return {
            **fields_of(call.q, call.k, call.v),
            **masks.fields,
            "packed": score.packed,
            "unit": score.unit,
            "places": call.block_mask.nq,
            **({} if steps is None else steps._asdict()),
        }

    def run(
        self,
        name: str,
        masks: Masks,
        fields: Mapping[str, int | float],
        wanted: frozenset[Leaf] | None = None,
    ) -> None:
        call, score = self.call, self.score
        made = _function(score, name, wanted, self.defined)
        asked = {**self.fields(masks), **fields}
        if not score.leaves:
            run(made, asked)
            return
        leaves = addresses([*self.leaves.values()], call.q.shape[:2])
        sizes = np.array([self.host.sizes(leaf) for leaf in self.leaves], np.int64)
        wrong = np.array(-1, np.int64)
        pointers = {"leaves": leaves, "sizes": sizes, "wrong": wrong}
        asked |= {name: x.ctypes.data for name, x in pointers.items()}
        asked["origin"] = call.k.shape[2] - 1 + MARGINS["distance"][0]
        run(made, asked)
        if wrong >= 0:
            self.host.refuse(int(wrong))

    @cached_property
    def host(self) -> GroupCall:
        """What there is beside the library."""
        own, known = self.own, self.kernel.leaves
        return GroupCall(self.call, own.group, own.score, own.heads, MARGINS, known)

    @property
    def leaves(self) -> dict[Leaf, Tensor]:
        return self.host.leaves if self.score.leaves else {}

    @property
    def defined(self) -> tuple[str, ...]:
        """What the library is compiled with."""
        narrow = any(x.dtype == torch.int32 for x in self.leaves.values())
        return ("DOUBLE",) * self.own.double + ("NARROW",) * narrow

    def gradient(
        self,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        tables: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of q, k and v; adds to those of tables."""
        call, score = self.call, self.score
        (batch, heads, _, d), (_, kv_heads, n, dv) = call.q.shape, call.v.shape
        tops = self.tops() if self.kernel.alone and is_far(lse) else None
        top, total, delta = self.host.rows(out, lse, grad_out, grad_lse, tops)
        rows = {"top": top, "sum": torch.ones_like(top) if total is None else total, "delta": delta}
        pieces = self.pieces
        shape = (batch, kv_heads, n) if pieces == 1 else (batch, kv_heads, pieces, n)
        gk, gv = (call.k.new_zeros((*shape, -(-w // LANES) * LANES)) for w in (d, dv))
        asked = {leaf: self.slope(leaf, pieces) for leaf in sloped(score, tables.keys())}
        slopes = addresses([asked.get(leaf) for leaf in score.leaves], (batch, heads, pieces))
        # each row of a head of its own is written
        gq = call.q.new_empty(call.q.shape) if self.own.alone else call.q.new_zeros(call.q.shape)
        tensors = {**rows, "grad_out": grad_out.contiguous(), "gq": gq, "gk": gk, "gv": gv}
        fields = {
            **{name: x.data_ptr() for name, x in tensors.items()},
            "grads": slopes.ctypes.data, "pieces": pieces, "dp": gk.shape[-1], "dvp": gv.shape[-1],
        }  # fmt: skip
        masks = self.kernel.masks(call, self.own, few=False)
        self.run("backward", masks, fields, frozenset(asked))
        if pieces > 1:
            gk, gv = gk.sum(2), gv.sum(2)
        gk, gv = (x if x.shape[3] == w else x[..., :w].contiguous() for x, w in ((gk, d), (gv, dv)))
        gk *= score.packed * score.unit
        self.host.pull({leaf: x.sum(2) for leaf, x in asked.items()}, (gq, gk, gv), tables)
        self.host.sink_gradient(lse, delta, tables)
        return gq, gk, gv

    def tops(self) -> tuple[Tensor, Tensor]:
        """Of each row a number near its greatest logit, and the sum of weights over that."""
        (batch, heads, nq, _), dv = self.call.q.shape, self.call.v.shape[3]
        top, total, again = (self.call.q.new_empty((batch, heads, nq)) for _ in range(3))
        self.forward({"top": top, "sum": total, "out": top.new_empty((batch, heads, nq, dv)), "lse": again})
        return top, total

    @property
    def pieces(self) -> int:
        """Of the queries of a key head: each has gradients of keys, values and leaves of its own."""
        (batch, kv_heads, n, d), dv = self.call.k.shape, self.call.v.shape[3]
        numbers = n * (d + dv) + sum([x.shape[2] for x in self.leaves.values()])
        return max(1, min(-(-PIECES // (batch * kv_heads)), ROOM // numbers))

    def slope(self, leaf: Leaf, pieces: int) -> Tensor:
        """Where the library adds up the gradient of a leaf, [B, H, pieces, entries]."""
        # the queries of pieces are others
        by_query = leaf.kind == "query" or (isinstance(leaf.of, Products) and leaf.of.of == "query")
        shape = (*self.call.q.shape[:2], 1 if by_query else pieces)
        return self.leaves[leaf].new_zeros((*shape, self.leaves[leaf].shape[2]))
