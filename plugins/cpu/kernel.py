"""The kernel of one attention: leaves, passes and gradients of each group of heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Gradients, Problem
from attndsl.emit.leaves import READS, Leaf, Products, leaf_of
from attndsl.execution.leaf_values import LeafValues, pair_environment, passes_gradients, sizes_of
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import Linear, decay_factor, environment, evaluate, singles
from attndsl.expr import Expr
from attndsl.meaning.intervals import stays_within
from attndsl.tiles.blockmask import BlockMask, Rows, TileGrid
from attndsl.tiles.lowering import head_groups
from attndsl.tiles.residues import Sorted, Steps

from .layout import ROWS, Layout, Layouts
from .passes import Function, Known, Masks, addresses, fields_of, function, run
from .score import AXES, Score

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
NARROW = 2**23
"""Integers of pairs up to which reals divide them."""
FAR = 32.0
"""Beyond this a log-sum-exp in float32 moves weights by more than two roundings of their own."""
MARGINS = {
    "number": (0, 0),
    "query": (0, ROWS),
    "key": (0, LANES),
    "distance": (LANES, ROWS),
    "table": (0, 1),
}
"""Entries beside those of a leaf, which no pair asks for but vectors of pairs hold."""

KnownLeaves = WeakKeyDictionary[BlockMask, dict[tuple[object, ...], "Linear | None"]]
score_of = lru_cache(maxsize=256)(Score.of)


def sloped(score: Score, tables: Set[str]) -> list[Leaf]:
    """Those from which a gradient goes to vectors or to tables of these names."""
    return [leaf for leaf, e in score.leaves.items() if e.type == "real" and passes_gradients(leaf, tables)]


def asked(attention: Attention, problem: Problem) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The libraries that a plan may ask for, as of `library`: with gradients of no table and of all."""
    double = ("DOUBLE",) * (problem.dtype == "float64")
    given = frozenset(t.name for t in (*attention.inputs, *attention.learned) if t.dtype == "float")
    for group in attention.groups:
        score = score_of(group, problem.head_dim, True)
        assert not isinstance(score, str)
        yield from ((score.code(None), name, double) for name in ("forward", "decode"))
        for tables in (frozenset(), given) if problem.training else ():
            yield score.code(sloped(score, tables)), "backward", double


@dataclass(frozen=True, eq=False)
class Group:
    """What one group of heads runs; `heads` bool [H] says which they are."""

    group: HeadGroup
    score: Score
    heads: NDArray[np.bool_]
    double: bool


@lru_cache(maxsize=256)
def _function(score: Score, name: str, wanted: frozenset[Leaf] | None, defined: tuple[str, ...]) -> Function:
    return function(score.code(wanted), name, defined)


@dataclass(frozen=True, eq=False)
class Compiled:
    """The kernel of one attention over tiles; `alone` as of `in_parts`, `steps` where tiles are of sorted
    entries."""

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
        """Leaves have an entry for each place, and so would vectors that they are made of."""
        plain = all(not part.score.leaves for part in self.parts(call))
        return replace(self, steps=one.steps) if one.steps is not None and plain else None

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
        gq, gk, gv = (torch.zeros(x.shape, dtype=x.dtype) for x in (call.q, call.k, call.v))
        tables = {name: torch.zeros_like(x) for name, x in singles(call.tables, wanted).items()}
        if gq.numel() and gk.numel():
            for part in self.parts(call):
                part.gradient(out, lse, grad_out.to(gq.dtype), grad_lse, (gq, gk, gv), tables)
        gq, gk, gv = (g.to(x.dtype) for g, x in zip((gq, gk, gv), (given.q, given.k, given.v), strict=True))
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

    def linear(self, call: Call, leaf: Leaf, made: LeafValues) -> Linear | None:
        """What a leaf is over tables, where that is so, and the same in every call of its kind."""
        known = self.leaves.setdefault(call.block_mask, {})
        shapes = tuple([x.shape for x in call.tables.values()])
        key = (leaf, call.q_at, call.k_at, call.n, call.q.shape[:3], call.q.dtype, shapes)
        if key not in known:
            known[key] = made.linear(leaf)
        return known[key]

    def layout(self, mask: TileGrid | Rows) -> Layout:
        found = self.layouts.get(mask)
        if found is None:
            made = Layout.of_rows(mask) if isinstance(mask, Rows) else Layout.of(mask)
            found = self.layouts[mask] = made
        return found


def _widened(call: Call) -> Call:
    """With vectors of at least float32, each of adjacent numbers."""
    vectors = (call.q, call.k, call.v)
    wide = torch.promote_types(call.q.dtype, torch.float32)
    if all(x.dtype == wide and x.stride(3) == 1 for x in vectors):
        return call
    q, k, v = (
        x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (x.to(wide) for x in vectors)
    )
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
        (batch, heads, nq, _), dv, blocks = call.q.shape, call.v.shape[3], call.block_mask
        few = "top" not in tensors and nq * (heads // call.k.shape[1]) <= FEW and blocks.rows is not None
        masks = self.kernel.masks(call, self.own, few)
        fields: dict[str, int] = {name: x.data_ptr() for name, x in tensors.items()}
        if few:
            low, high = masks.span
            segments = -(-(high - low) // SEGMENT)
            parts = call.q.new_empty((segments, batch, heads, nq, dv + 2))
            fields |= {"low": low, "segments": segments, "parts": parts.data_ptr()}
        if (sink := self.sink) is not None:
            fields["sink"] = sink.data_ptr()
        self.run("decode" if few else "forward", masks, fields)

    def run(
        self,
        name: str,
        masks: Masks,
        fields: Mapping[str, int | float],
        wanted: frozenset[Leaf] | None = None,
    ) -> None:
        call, score = self.call, self.score
        made = _function(score, name, wanted, self.defined)
        asked = {
            **fields_of(call.q, call.k, call.v),
            **masks.fields,
            **fields,
            "packed": score.packed,
            "unit": score.unit,
            "places": call.block_mask.nq,
        }
        if self.kernel.steps is not None:
            asked |= self.kernel.steps._asdict()
        if not score.leaves:
            run(made, asked)
            return
        leaves = addresses([*self.leaves.values()], call.q.shape[:2])
        sizes = np.array([self.sizes(leaf) for leaf in self.leaves], np.int64)
        wrong = np.array(-1, np.int64)
        pointers = {"leaves": leaves, "sizes": sizes, "wrong": wrong}
        asked |= {name: x.ctypes.data for name, x in pointers.items()}
        asked["origin"] = call.k.shape[2] - 1 + MARGINS["distance"][0]
        run(made, asked)
        if wrong >= 0:
            self.refuse(int(wrong))

    @cached_property
    def leaves(self) -> dict[Leaf, Tensor]:
        """What each holds, [B or 1, H or 1, entries] real or int64, with margins."""
        made, wide = LeafValues(self.call), self.call.q.dtype
        found = {}
        for leaf, node in self.score.leaves.items():
            if (linear := self.kernel.linear(self.call, leaf, made)) is not None:
                x = made.flat(leaf.kind, linear.values(self.call.tables, wide))
            else:
                x = made.of(leaf, self.call).to(wide if node.type == "real" else torch.int64)
            found[leaf] = torch.nn.functional.pad(x, MARGINS[leaf.kind]).contiguous()
        if found and self.narrow(found):
            found = {leaf: x if x.dtype == wide else x.to(torch.int32) for leaf, x in found.items()}
        return found

    def narrow(self, leaves: Mapping[Leaf, Tensor]) -> bool:
        """Whether integers of 32 bits suffice."""
        if self.own.double or not any(node.type == "int" for e in self.score.roots for node in ir.nodes(e)):
            return False
        ends = {
            node: (int(leaves[leaf_of(node)].min()), int(leaves[leaf_of(node)].max()))
            for e in self.score.roots
            for node in ir.nodes(e)
            if node.op in READS and node.type != "real"
        }
        (nq, n) = self.call.q.shape[2], self.call.k.shape[2]
        ends |= {ir.make("entry", (), side, "int"): (0, size) for side, size in (("query", nq), ("key", n))}
        small = all(x.shape[2] < 2**31 for x in leaves.values())
        return small and all(stays_within(e, NARROW, ends) for e in self.score.roots)

    @cached_property
    def defined(self) -> tuple[str, ...]:
        """What the library is compiled with."""
        narrow = any(x.dtype == torch.int32 for x in self.leaves.values())
        return ("DOUBLE",) * self.own.double + ("NARROW",) * narrow

    def sizes(self, leaf: Leaf) -> tuple[int, ...]:
        """Of the axes of a table; of a number -1, for its gradient is a sum over all pairs."""
        if not isinstance(leaf.of, Expr):
            sizes = sizes_of(leaf.of, self.call)
            return (*sizes, *(1,) * (AXES - len(sizes)))
        return (-1 if leaf.kind == "number" else 0,) * AXES

    @cached_property
    def sink(self) -> Tensor | None:
        """Of each batch row and head [B, H], as the kernels' logits are."""
        if self.own.group.norm.sink is None:
            return None
        return (self.sink_of(self.call) / self.score.unit).contiguous()

    def sink_of(self, call: Call) -> Tensor:
        assert self.own.group.norm.sink is not None
        env = replace(environment(self.call), tables=call.tables)
        found = evaluate(self.own.group.norm.sink, env).to(self.call.q.dtype)
        return found.expand(*call.q.shape[:2], 1, 1).flatten(1)

    def refuse(self, pair: int) -> None:
        """Raises AttnError for a pair that has no value."""
        (batch, heads, nq, _), n = self.call.q.shape, self.call.k.shape[2]
        env = pair_environment(self.call, *map(int, np.unravel_index(pair, (batch, heads, nq, n))))
        live = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        evaluate(self.own.group.score, env, live)
        assert self.own.group.decay is not None
        decay_factor(self.own.group.decay, env, live)

    def gradient(
        self,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        grads: tuple[Tensor, Tensor, Tensor],
        tables: Mapping[str, Tensor],
    ) -> None:
        """Adds to those of q, k and v and of tables."""
        call, score = self.call, self.score
        (batch, heads, _, d), (_, kv_heads, n, dv) = call.q.shape, call.v.shape
        rows = self.rows(out, lse, grad_out, grad_lse)
        pieces = self.pieces
        gk, gv = (call.k.new_zeros((batch, kv_heads, pieces, n, -(-w // LANES) * LANES)) for w in (d, dv))
        asked = {leaf: self.slope(leaf, pieces) for leaf in sloped(score, tables.keys())}
        slopes = addresses([asked.get(leaf) for leaf in score.leaves], (batch, heads, pieces))
        gq = grads[0] if self.own.heads.all() else torch.zeros_like(grads[0])
        tensors = {**rows, "grad_out": grad_out.contiguous(), "gq": gq, "gk": gk, "gv": gv}
        fields = {
            **{name: x.data_ptr() for name, x in tensors.items()},
            "grads": slopes.ctypes.data, "pieces": pieces, "dp": gk.shape[4], "dvp": gv.shape[4],
        }  # fmt: skip
        masks = self.kernel.masks(call, self.own, few=False)
        self.run("backward", masks, fields, frozenset(asked))
        gk, gv = (x[:, :, 0] if pieces == 1 else x.sum(2) for x in (gk, gv))
        if gq is not grads[0]:
            grads[0].add_(gq)
        grads[1].add_(gk[..., :d], alpha=score.packed * score.unit)
        grads[2].add_(gv[..., :dv])
        self.pull({leaf: x.sum(2) for leaf, x in asked.items()}, grads, tables)
        if tables and self.own.group.norm.sink is not None:
            self.sink_gradient(lse, rows["delta"], tables)

    def rows(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, Tensor]:
        """Of each row, contiguous: what is subtracted from logits, what weights are divided by, and what is
        subtracted from what comes back to weights."""
        score, shared = self.score, self.own.group.norm.kind in ("softmax", "linear")
        if self.kernel.alone and _far(lse):
            # beside its greatest logit the log-sum-exp of a row has lost what tells weights apart, and of a
            # negative sum there is none
            top, total, again = (torch.empty(lse.shape, dtype=lse.dtype) for _ in range(3))
            unread = torch.empty(out.shape, dtype=out.dtype)
            self.forward({"top": top, "sum": total, "out": unread, "lse": again})
        elif score.softmax:
            top, total = lse / score.unit, torch.ones_like(lse)
        else:
            total = lse.exp()
        if not score.softmax:
            top, total = torch.zeros_like(lse), total.masked_fill(total == 0, torch.inf)
        delta = (grad_out * out).sum(-1) if shared else torch.zeros_like(lse)
        if grad_lse is not None:
            shift = grad_lse.masked_fill(lse == -torch.inf, 0.0)
            delta = delta - (shift if shared else shift / total)
        if not shared:
            total = torch.ones_like(lse)
        return {"top": top.contiguous(), "sum": total.contiguous(), "delta": delta.contiguous()}

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

    def pull(
        self,
        slopes: Mapping[Leaf, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
        tables: Mapping[str, Tensor],
    ) -> None:
        """Adds what those of leaves [B, H, entries] give to those of q, k and tables."""
        if not slopes:
            return
        call, made = self.call, LeafValues(self.call)
        own = torch.from_numpy(self.own.heads).view(-1, 1)

        def values(q: Tensor, k: Tensor, more: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            there = _with(replace(call, q=q, k=k), more)
            return tuple([made.of(leaf, there) for leaf in slopes])

        found, pull = vjp(values, call.q, call.k, singles(call.tables, tables))
        back = [
            (x.narrow(2, MARGINS[leaf.kind][0], value.shape[2]) * own).sum_to_size(value.shape)
            for (leaf, x), value in zip(slopes.items(), found, strict=True)
        ]
        gq, gk, more = pull(tuple(back))
        grads[0].add_(gq)
        grads[1].add_(gk)
        for name, g in more.items():
            tables[name].add_(g)

    def sink_gradient(self, lse: Tensor, delta: Tensor, tables: Mapping[str, Tensor]) -> None:
        """It is a key with the sink for a logit and a value of zeros."""
        call = self.call
        value, pull = vjp(lambda more: self.sink_of(_with(call, more)), singles(call.tables, tables))
        weight = torch.exp(value[..., None] - lse.masked_fill(lse == -torch.inf, torch.inf))
        slope = -(weight * delta).sum(-1)
        (found,) = pull(torch.where(torch.from_numpy(self.own.heads), slope, 0.0))
        for name, g in found.items():
            tables[name].add_(g)


def _with(call: Call, tables: Mapping[str, Tensor]) -> Call:
    return replace(call, tables={**call.tables, **tables})


def _far(lse: Tensor) -> bool:
    """Whether the log-sum-exp of some row has lost digits that its weights need, or is none."""
    return not bool(((lse.abs() <= FAR) | (lse == -torch.inf)).all())
