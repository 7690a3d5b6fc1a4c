"""A group of heads in one call, for kernels whose scores are code: what its leaves hold, and where what comes
back to leaves, rows and sinks goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import HeadGroup
from attndsl.backend import Call
from attndsl.emit.leaves import READS, Kind, Leaf, leaf_of
from attndsl.emit.score import AXES, Score
from attndsl.execution import sinks
from attndsl.execution.leaf_values import VECTORS, LeafValues, pair_environment, passes_gradients, sizes_of
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import Linear, decay_factor, evaluate, singles, within
from attndsl.expr import Expr, Table
from attndsl.meaning.intervals import stays_within
from attndsl.tiles.blockmask import BlockMask

NARROW = 2**23
"""Integers of pairs up to which reals divide them."""
FAR = 32.0
"""Beyond this the rounding of a log-sum-exp in float32 may double the errors that those of logits leave in
gradients, where a few keys take most of the weight; to do without it takes another forward pass."""


@dataclass(frozen=True)
class Fixed:
    """Integers and truths that a leaf holds in every call of a kind, and the least and the greatest."""

    values: Tensor
    ends: tuple[int, int]


KnownLeaves = WeakKeyDictionary[BlockMask, dict[tuple[object, ...], "Linear | Fixed | None"]]
Margins = Mapping[Kind, tuple[int, int]]
Tops = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class GroupCall:
    """One group of heads of a call whose vectors are in the dtype of the arithmetic, or narrower.

    heads    bool [H]: which they are
    margins  entries before and after those of a leaf, which no pair asks for but whole tiles of pairs hold
    known    what leaves are over tables, kept for the masks of other calls
    """

    call: Call
    group: HeadGroup
    score: Score
    heads: NDArray[np.bool_]
    margins: Margins
    known: KnownLeaves

    @cached_property
    def wide(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.promote_types(self.call.q.dtype, torch.float32)

    @cached_property
    def leaves(self) -> dict[Leaf, Tensor]:
        """What each holds, [B or 1, H or 1, entries], `wide` or int64, with margins; int32 where all
        integers of pairs stay small."""
        made, wide = LeafValues(self.call), self.wide
        found = {}
        for leaf, node in self.score.leaves.items():
            always = self.always(leaf)
            if isinstance(always, Fixed):
                x = always.values
            elif always is not None:
                x = made.flat(leaf.kind, always.values(self.call.tables, wide))
            else:
                x = made.of(leaf, self.call).to(wide if node.type == "real" else torch.int64)
            found[leaf] = torch.nn.functional.pad(x, self.margins[leaf.kind]).contiguous()
        if found and self.narrow(found):
            found = {leaf: x if x.dtype == wide else x.to(torch.int32) for leaf, x in found.items()}
        return found

    def always(self, leaf: Leaf) -> Linear | Fixed | None:
        """What a leaf is in every call of its kind: numbers, or what it is over tables."""
        call = self.call
        known = self.known.setdefault(call.block_mask, {})
        shapes = tuple([x.shape for x in call.tables.values()])
        sizes = call.n, call.q.shape[:3], call.k.shape[2]
        key = (leaf, call.q_at, call.k_at, *sizes, call.q.dtype, call.q.device, shapes)
        if key not in known:
            known[key] = self.fixed(leaf) or LeafValues(call).linear(leaf)
        return known[key]

    def fixed(self, leaf: Leaf) -> Fixed | None:
        of, call = leaf.of, self.call
        given = of.known is None if isinstance(of, Table) else not isinstance(of, Expr) or bool(of.tables)
        if given or self.score.leaves[leaf].type == "real" or (isinstance(of, Expr) and of.free & VECTORS):
            return None
        q, k, v = (torch.empty(1, dtype=x.dtype).expand(x.shape) for x in (call.q, call.k, call.v))
        here = replace(call, q=q, k=k, v=v)
        x = LeafValues(here).of(leaf, here).to(torch.int64)
        return Fixed(x.to(call.q.device), (int(x.min()), int(x.max())))

    def narrow(self, leaves: Mapping[Leaf, Tensor]) -> bool:
        """Whether integers of 32 bits suffice."""
        if self.wide == torch.float64 or not any(
            n.type == "int" for e in self.score.roots for n in ir.nodes(e)
        ):
            return False
        ends = {
            node: self.ends(leaf_of(node), leaves)
            for e in self.score.roots
            for node in ir.nodes(e)
            if node.op in READS and node.type != "real"
        }
        (nq, n) = self.call.q.shape[2], self.call.k.shape[2]
        ends |= {ir.make("entry", (), side, "int"): (0, size) for side, size in (("query", nq), ("key", n))}
        small = all(x.shape[2] < 2**31 for x in leaves.values())
        return small and all(stays_within(e, NARROW, ends) for e in self.score.roots)

    def ends(self, leaf: Leaf, leaves: Mapping[Leaf, Tensor]) -> tuple[int, int]:
        """The least and the greatest of integers, and the 0 of margins."""
        always, x = self.always(leaf), leaves[leaf]
        least, greatest = always.ends if isinstance(always, Fixed) else (int(x.min()), int(x.max()))
        return min(least, 0), max(greatest, 0)

    def sizes(self, leaf: Leaf) -> tuple[int, ...]:
        """Of the axes of a table; of a number -1, for its gradient is a sum over all pairs."""
        if not isinstance(leaf.of, Expr):
            sizes = sizes_of(leaf.of, self.call)
            return (*sizes, *(1,) * (AXES - len(sizes)))
        return (-1 if leaf.kind == "number" else 0,) * AXES

    @property
    def sinks(self) -> sinks.Groups:
        return () if self.group.norm.sink is None else ((self.group, self.heads),)

    @cached_property
    def sink(self) -> Tensor | None:
        """Of each batch row and head [B, H], as the kernels' logits are."""
        return (sinks.logits(self.sinks, self.call) / self.score.unit).contiguous() if self.sinks else None

    def refuse(self, pair: int) -> None:
        """Raises AttnError for a pair that has no value."""
        (batch, heads, nq, _), n = self.call.q.shape, self.call.k.shape[2]
        env = pair_environment(self.call, *map(int, np.unravel_index(pair, (batch, heads, nq, n))))
        live = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.call.q.device)
        evaluate(self.group.score, env, live)
        assert self.group.decay is not None
        decay_factor(self.group.decay, env, live)

    def rows(
        self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, tops: Tops | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of each row, contiguous: what is subtracted from logits, what weights are divided by if they are,
        and what is subtracted from what comes back to them.

        tops  a number near the greatest logit of each row, and the sum of weights over that; None where the
              log-sum-exp says it
        """
        score, shared = self.score, self.group.norm.kind in ("softmax", "linear")
        total: Tensor | None = None
        if tops is not None:
            top, total = tops
        elif score.softmax:
            top = lse / score.unit
        else:
            total = lse.exp()
        if not score.softmax:
            assert total is not None
            top, total = torch.zeros_like(lse), total.masked_fill(total == 0, torch.inf)
        delta = (grad_out * out).sum(-1) if shared else torch.zeros_like(lse)
        if grad_lse is not None:
            shift = grad_lse.masked_fill(lse == -torch.inf, 0.0)
            delta = delta - (shift if shared or total is None else shift / total)
        divided = total.contiguous() if shared and total is not None else None
        return top.contiguous(), divided, delta.contiguous()

    @property
    def own_heads(self) -> Tensor:
        """bool [H]"""
        return sinks.truths(tuple(self.heads.tolist()), self.call.q.device)

    def pull(
        self,
        slopes: Mapping[Leaf, Tensor],
        grads: tuple[Tensor, Tensor, Tensor],
        tables: Mapping[str, Tensor],
    ) -> None:
        """Adds what those of leaves [B, H, entries], with margins, give to those of q, k and tables."""
        if not slopes:
            return
        call, made = self.call, LeafValues(self.call)
        own = self.own_heads.view(-1, 1)

        def values(q: Tensor, k: Tensor, more: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            there = _with(replace(call, q=q, k=k), more)
            return tuple([made.of(leaf, there) for leaf in slopes])

        found, pull = vjp(values, call.q, call.k, singles(call.tables, tables))
        back = [
            (x.narrow(2, self.margins[leaf.kind][0], value.shape[2]) * own).sum_to_size(value.shape)
            for (leaf, x), value in zip(slopes.items(), found, strict=True)
        ]
        gq, gk, more = pull(tuple(back))
        grads[0].add_(gq)
        grads[1].add_(gk)
        for name, g in more.items():
            tables[name].add_(g)

    def sink_gradient(self, lse: Tensor, delta: Tensor, tables: Mapping[str, Tensor]) -> None:
        """Adds what comes through the sink."""
        sinks.add_gradients(self.sinks, self.call, lse, delta, tables)


def sloped(score: Score, tables: Set[str]) -> list[Leaf]:
    """The leaves from which a gradient goes to vectors or to tables of these names."""
    return [leaf for leaf, e in score.leaves.items() if e.type == "real" and passes_gradients(leaf, tables)]


def addresses(tensors: Sequence[Tensor | None], shape: Sequence[int]) -> NDArray[np.int64]:
    """Of each [..., entries], contiguous, whose leading axes are those of `shape` or 1, where the entries of
    each place begin: [*shape, tensors], 0 where there is no tensor."""
    found = np.zeros((*shape, max(len(tensors), 1)), np.int64)
    for i, x in enumerate(tensors):
        if x is not None:
            places = np.arange(math.prod(x.shape[:-1])).reshape(x.shape[:-1])
            found[..., i] = x.data_ptr() + places * x.shape[-1] * x.element_size()
    return found


def _with(call: Call, tables: Mapping[str, Tensor]) -> Call:
    return replace(call, tables={**call.tables, **tables})


def far(lse: Tensor) -> Tensor:
    """A truth: whether beside its greatest logit the log-sum-exp of some row has lost what tells weights
    apart, or is none, as of a negative sum."""
    return ((lse.abs() <= FAR) | (lse == -torch.inf)).all().logical_not()


def is_far(lse: Tensor) -> bool:
    """The same where numbers are at hand."""
    return not within(lse, FAR) and bool(far(lse))
