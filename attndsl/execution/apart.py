"""A kernel over tiles that runs masks apart (tiles/residues.py): once for what keeps its order, once for each
sort, and the parts of a row merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import NamedTuple, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.axis import Axis
from attndsl.backend import Call, Differentiable, Gradients, Paged, Pages, Problem
from attndsl.execution import sinks
from attndsl.execution.sinks import without_sinks
from attndsl.execution.torch_eval import singles, strained, widened
from attndsl.tiles import residues
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.lowering import quantifier_free
from attndsl.tiles.residues import Apart, Sorted

Counts = Callable[[Attention, Problem, BlockMask | None], Mapping[str, float]]
Standing = Callable[[Attention, Problem, Sorted], bool]
SORTED = "sorted"
"""The count of numbers that go through memory to be sorted and merged."""


def divides(attention: Attention) -> bool:
    """Whether masks of the attention may be taken apart at all."""
    softmax = all(group.norm.kind == "softmax" for group in attention.groups)
    masks = (quantifier_free(group.relation.mask) for group in attention.groups)
    return softmax and attention.approx is None and any(map(residues.possible, masks))


def in_parts(
    attention: Attention, whole: Differentiable, part: Callable[[Attention], Differentiable]
) -> Differentiable:
    """The kernel `whole` of an attention; where the mask is better taken apart, what `part` makes of it
    without sinks runs the parts: a kernel that takes the log-sum-exp given to its backward pass for that of
    more keys than its own. A sink counts once in a row, and comes in when the parts are merged."""
    return InParts(attention, whole, part(without_sinks(attention))) if divides(attention) else whole


def always_sorted(attention: Attention, problem: Problem, one: Sorted) -> bool:
    """That of a kernel that is not `InPlace`."""
    return False


def counted(counts: Counts, in_place: Standing = always_sorted) -> Counts:
    """The counts of a kernel `in_parts`, of those of the kernel; `in_place` says whether that reads the
    entries of a part where they stand."""

    def of(attention: Attention, problem: Problem, block_mask: BlockMask | None) -> Mapping[str, float]:
        apart = residues.apart(block_mask) if block_mask is not None and divides(attention) else None
        if apart is None:
            return {**counts(attention, problem, block_mask), SORTED: 0.0}
        left = without_sinks(attention)
        each = ([apart.rest] if apart.rest is not None else []) + [part.block_mask for part in apart.classes]
        total: dict[str, float] = {}
        for part in each:
            found = counts(left, replace(problem, q_length=part.nq, length=part.n), part)
            total = {name: total.get(name, 0.0) + count for name, count in found.items()}
        queries, keys = problem.heads * problem.q_length, problem.kv_heads * problem.length
        copies = sum([not in_place(left, problem, part) for part in apart.classes])
        merges = 3 * (len(each) - 1) + (left != attention)
        moved = copies * 2 * (queries + keys) + merges * queries
        total[SORTED] = float(problem.batch * moved * problem.head_dim)
        return total

    return of


class Places(NamedTuple):
    """Of sorted entries: where they stand, which of the call's are at each place, and the place of each."""

    q_at: Axis
    k_at: Axis
    queries: Tensor
    keys: Tensor
    q_places: Tensor
    k_places: Tensor


@runtime_checkable
class InPlace(Protocol):
    """A kernel that may read sorted entries where they stand."""

    def in_place(self, call: Call, one: Sorted) -> Differentiable | None:
        """What takes the call as it is, but for the tiles, which are those of `one`; None where entries have
        to be sorted first."""


Sums = tuple[Tensor, Tensor, Tensor]
"""Of rows: the output, in float32 or wider, a number near the greatest logit, in float64, and the sum of
weights over that: all digits that parts are merged by."""


@runtime_checkable
class Exact(Protocol):
    """A kernel that takes vectors as they are, and of which nobody has to look how far a log-sum-exp is from
    0. Its gradients as a part are in float32 or wider."""

    def summed(self, call: Call) -> Sums:
        """As a part."""

    def evened(
        self, call: Call, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What comes back, times what makes the weights exp(logit - lse) right where `lse` lacks digits."""


Part = tuple[Differentiable, Call, "Places | None"]
"""What runs, on what, and where the entries of that stand; None where they stand as they were given."""


@dataclass(frozen=True, eq=False)
class InParts:
    """The kernel of an attention, or in parts `part`, which knows no sinks."""

    attention: Attention
    kernel: Differentiable
    part: Differentiable
    known: WeakKeyDictionary[Sorted, dict[tuple[object, ...], Places]] = field(
        default_factory=WeakKeyDictionary
    )

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        apart = residues.apart(call.block_mask)
        if apart is None:
            return self.kernel(call)
        if isinstance(exact := self.part, Exact):
            each = ((exact.summed(part), places) for _, part, places in self.parts(apart, call))
            rows = ([_taken(x, places and places.q_places) for x in sums] for sums, places in each)
            sums = reduce(_joined, ((out, top, total) for out, top, total in rows))
            if groups := self.sinks(call):
                sums = _joined(sums, sinks.as_part(groups, call, sums[2]))
            out, top, total = sums
            return out, (top + total.log()).to(out.dtype)
        found: tuple[Tensor, Tensor] | None = None
        for kernel, part, places in self.parts(apart, widened(call)):
            out, lse = (_taken(x, places and places.q_places) for x in kernel(part))
            found = (out, lse) if found is None else _merged(found, (out, lse))
        assert found is not None
        out, lse = found
        if groups := self.sinks(call):
            lse = sinks.merge(groups, call, out, lse)
        # far from 0 a log-sum-exp has lost what parts are merged by
        return self.kernel(call) if strained(lse) else (out, lse)

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        apart, taken = residues.apart(call.block_mask), call
        if apart is not None and isinstance(self.kernel, Exact):
            grad_out, grad_lse = self.kernel.evened(call, lse, grad_out, grad_lse)
        elif apart is None or strained(lse):
            return self.kernel.gradient(call, wanted, out, lse, grad_out, grad_lse)
        else:
            taken = widened(call)
        tables = {name: torch.zeros_like(x) for name, x in singles(call.tables, wanted).items()}
        totals = [torch.zeros_like(x, dtype=lse.dtype) for x in (call.q, call.k, call.v)]
        for kernel, part, places in self.parts(apart, taken):
            own_out, own_lse, back = (_taken(x, places and places.queries) for x in (out, lse, grad_out))
            shift = None if grad_lse is None else _taken(grad_lse, places and places.queries)
            gq, gk, gv, more = kernel.gradient(part, wanted, own_out, own_lse, back, shift)
            if places is not None:
                gq, gk, gv = (_taken(gq, places.q_places), *(_taken(x, places.k_places) for x in (gk, gv)))
            for total, x in zip(totals, (gq, gk, gv), strict=True):
                total += x
            for name, x in more.items():
                tables[name] += x
        if groups := self.sinks(call):
            delta = (grad_out * out).sum(-1)
            if grad_lse is not None:
                delta -= grad_lse.masked_fill(lse == -torch.inf, 0.0)
            sinks.add_gradients(groups, call, lse, delta, tables)
        gq, gk, gv = (x.to(given.dtype) for x, given in zip(totals, (call.q, call.k, call.v), strict=True))
        return gq, gk, gv, tables

    def paged(self, call: Call, pages: Pages) -> tuple[Tensor, Tensor] | None:
        """Few queries are not taken apart."""
        return self.kernel.paged(call, pages) if isinstance(self.kernel, Paged) else None

    def sinks(self, call: Call) -> sinks.Groups:
        return sinks.groups_of(self.attention, call.q.shape[1])

    def parts(self, apart: Apart, call: Call) -> Iterator[Part]:
        kernel = self.part
        if (rest := apart.rest) is not None:
            yield kernel, replace(call, tiles=_given(rest)), None
        for one in apart.classes:
            ready = kernel.in_place(call, one) if isinstance(kernel, InPlace) else None
            if ready is not None:
                yield ready, replace(call, tiles=_given(one.block_mask)), None
                continue
            places = self.places(one, call)
            q, k, v = (
                _taken(x, at)
                for x, at in ((call.q, places.queries), (call.k, places.keys), (call.v, places.keys))
            )
            yield kernel, Call(q, k, v, _given(one.block_mask), call.tables, *places[:2], call.n), places

    def places(self, one: Sorted, call: Call) -> Places:
        known = self.known.setdefault(one, {})
        key = (call.q_at, call.k_at, call.q.device)
        if key not in known:
            orders = one.q_order, one.k_order, one.q_place, one.k_place
            tensors = [torch.from_numpy(np.maximum(order, 0)).to(call.q.device) for order in orders]
            known[key] = Places(one.at(call.q_at, one.q_order), one.at(call.k_at, one.k_order), *tensors)
        return known[key]


def _given(tiles: BlockMask) -> Callable[[], BlockMask]:
    return lambda: tiles


def _taken(x: Tensor, entries: Tensor | None) -> Tensor:
    """[B, H, entries, ...]"""
    return x if entries is None else x.index_select(2, entries)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of rows whose keys were in two parts, in the memory of those: to get as much
    afresh would take half as long again."""
    total = torch.logaddexp(one[1], other[1])
    over = total.masked_fill(total == -torch.inf, torch.inf)
    for out, lse in (one, other):
        out.mul_(torch.exp(lse - over)[..., None])
    return one[0].add_(other[0]), total


def _joined(one: Sums, other: Sums) -> Sums:
    """Of rows whose keys were in two parts."""
    top = torch.maximum(one[1], other[1])
    base = top.masked_fill(top == -torch.inf, 0.0)
    sums = [total * torch.exp(own - base) for _, own, total in (one, other)]
    total = sums[0] + sums[1]
    over = total.masked_fill(total == 0, torch.inf)
    mine, its = (
        (x * (sum_ / over)[..., None].to(x.dtype)) for (x, _, _), sum_ in zip((one, other), sums, strict=True)
    )
    return mine + its, top, total
