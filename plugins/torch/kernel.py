"""The kernel: forward and backward over all lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.backend import BLOCK_SIZE, Call
from attndsl.execution.torch_eval import peak, singles, strained, widened
from attndsl.tiles.lowering import Sizes, as_array, block_mask, mask_tables

from . import lists, orders, rows
from .blocklists import BlockLists
from .chunks import Kept
from .gradient import Back, Rows, bias_gradient, part_gradient, room_of, sink_gradient, slopes_of
from .lanes import Lane, Simple, lanes
from .slabs import rooms
from .work import Work, normalise


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """The kernel of one attention; `exact` says that outputs are not rounded to 16 bits, for the sake of the
    backward pass, where their products with what comes back are differences of large sums; `simple` are the
    scores of the groups, if all are so."""

    attention: Attention
    exact: bool
    simple: Sequence[Simple] | None
    kept: Kept = field(default_factory=Kept)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        if (listed := self.lists_for(call)) is not None:
            return lists.attend(self.attention, listed, widened(call))
        if (ordered := self.orders_for(call)) is not None:
            call = widened(call)
            out, lse = self.others(call)
            orders.attend(self.attention, ordered, call, out, lse)
            return out, lse
        wide, blocks = torch.promote_types(call.q.dtype, torch.float32), self.blocks_for(call)
        if blocks is None and self.simple is not None and (call.q.dtype == wide or not self.exact):
            found = rows.attend(self.attention, self.simple, call)
            if found is not None:
                return found
        call = widened(call) if self.exact else call
        q = call.q
        out = q.new_empty((*q.shape[:3], call.v.shape[3]), dtype=wide)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        self.forward(call, blocks, out, lse)
        if blocks is not None and blocks.merged:
            lists.add(self.attention, blocks.beside, widened(call), out, lse)
            if strained(lse):
                self.forward(call, None, out, lse)
        return out, lse

    def forward(self, call: Call, blocks: BlockLists | None, out: Tensor, lse: Tensor) -> None:
        """Writes output and log-sum-exp, but for what is merged."""
        for lane in self.lanes(call, blocks):
            o, total = lane.queries(out), lane.queries(lse)
            self.run(self.work(call, lane, gradient=False), o, total)
            if lane.strained(total):
                _, top, exact, beyond = self.careful(call, lane)
                o.copy_(exact)
                torch.add(beyond, top, out=total)

    @cached_property
    def listed(self) -> tuple[lists.Listed, ...] | None:
        return lists.listed_of(self.attention)

    def lists_for(self, call: Call) -> tuple[lists.Listed, ...] | None:
        """The lists of keys to go by in place of tiles, if this call has such."""
        found = self.listed
        return found if found is not None and all(some.fits(call) for some in found) else None

    @cached_property
    def blocks(self) -> BlockLists | None:
        return BlockLists.of(self.attention)

    def blocks_for(self, call: Call) -> BlockLists | None:
        """The lists of blocks of keys to go by in place of tiles, if this call has such."""
        return self.blocks if self.blocks is not None and self.blocks.fits(call) else None

    @cached_property
    def ordered(self) -> tuple[orders.Ordered | None, ...] | None:
        return orders.ordered_of(self.attention)

    def orders_for(self, call: Call) -> tuple[orders.Ordered | None, ...] | None:
        """The orders that groups of heads go by in place of tiles, if this call has such."""
        found = self.ordered
        return found if found is not None and orders.fits(call) else None

    @cached_property
    def beside_orders(self) -> BlockSparse:
        """Of the groups of heads that go by none; nothing of the others."""
        assert self.ordered is not None
        return BlockSparse(orders.without_orders(self.attention, self.ordered), self.exact, None)

    def without_orders(self, call: Call) -> Call:
        """With the tiles of those groups."""
        attention = self.beside_orders.attention
        sizes = Sizes(call.q.shape[1], call.q_at, call.k_at, call.n)
        tables = {t.name: as_array(call.tables[t.name]) for t in mask_tables(attention)}
        return replace(call, tiles=lambda: block_mask(attention, sizes, tables, BLOCK_SIZE))

    def others(self, call: Call) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a call with vectors of at least float32, but of heads that go by an
        order."""
        assert self.ordered is not None
        if None in self.ordered:
            return self.beside_orders(self.without_orders(call))
        return call.q.new_empty((*call.q.shape[:3], call.v.shape[3])), call.q.new_empty(call.q.shape[:3])

    def lanes(self, call: Call, blocks: BlockLists | None) -> Iterator[Lane]:
        if blocks is not None:
            return blocks.lanes(call)
        batch, heads = call.q.shape[:2]
        return lanes(self.attention, call.block_mask, batch, heads, call.k.shape[1])

    def run(self, work: Work, out: Tensor, lse: Tensor) -> None:
        """Writes output and log-sum-exp of a lane."""
        out[:, work.schedule.empty] = 0.0
        lse[:, work.schedule.empty] = -torch.inf if work.lane.group.norm.kind == "softmax" else 0.0
        for chunk, addend in work.schedule.chunks:
            work.merge(chunk, out, lse, *work.part(chunk, addend))
        for slab, room in rooms(work.slabs, out):
            work.merge_slab(slab, room, out, lse)
        work.finish(out, lse)

    def totals(self, work: Work, lse: Tensor) -> Tensor:
        """Of every row what `Rows.total` is; summed again where a sum has no logarithm."""
        if work.lane.group.norm.kind == "softmax":
            return lse.masked_fill(lse == -torch.inf, torch.inf)
        total = lse.exp()
        if bool(total.isnan().any()):
            total = torch.zeros_like(lse)
            for chunk in work.chunks:
                q, k, v = work.sources(chunk)
                more = normalise(*work.weights(chunk, q, k, {}), v[..., :0], work.lane.group.norm.kind)[1]
                chunk.add_queries(total, more)
        return total.masked_fill(total == 0, torch.inf)

    def careful(self, call: Call, lane: Lane) -> tuple[Work, Tensor, Tensor, Tensor]:
        """Work whose logits are differences from the greatest of their row, which are exact; that greatest;
        its output; and its log-sum-exp, which says how many keys there are, however large they are."""
        # the chunks of the backward pass, which must round its logits as they are rounded here
        work = Work(call, lane, None, self.kept, gradient=True)
        top = torch.full(work.q.shape[:2], -torch.inf, dtype=work.wide, device=call.q.device)
        for chunk in work.chunks:
            q, k, _ = work.sources(chunk)
            found = peak(*work.weights(chunk, q, k, {})).squeeze(-1)
            chunk.put_queries(top, torch.maximum(chunk.queries(top), found))
        top.masked_fill_(top == -torch.inf, 0.0)
        if (sink := work.sink({})) is not None:
            torch.maximum(top, sink, out=top)
        work = replace(work, top=top)
        out, beyond = top.new_empty((*top.shape, call.v.shape[3])), torch.empty_like(top)
        self.run(work, out, beyond)
        return work, top, out, beyond

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        given, call = (call.q, call.k, call.v), widened(call)
        found = self.unrounded(call, wanted, out, lse, grad_out, grad_lse)
        gq, gk, gv = (total.to(x.dtype) for total, x in zip(found[:3], given, strict=True))
        return gq, gk, gv, {name: total.to(call.tables[name].dtype) for name, total in found[3].items()}

    def unrounded(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The gradients of a call with vectors of at least float32."""
        if (listed := self.lists_for(call)) is not None:
            found = lists.gradient(self.attention, listed, call, wanted, lse, grad_out, grad_lse)
        elif (ordered := self.orders_for(call)) is not None:
            if None in ordered:
                others = self.without_orders(call)
                found = self.beside_orders.unrounded(others, wanted, out, lse, grad_out, grad_lse)
            else:
                tables = {name: torch.zeros_like(x) for name, x in singles(call.tables, wanted).items()}
                gq, gk, gv = (torch.zeros_like(x) for x in (call.q, call.k, call.v))
                found = gq, gk, gv, tables
            orders.add_gradients(self.attention, ordered, call, out, lse, grad_out, grad_lse, found)
        else:
            blocks = self.blocks_for(call)
            blocks = None if blocks is not None and blocks.merged and strained(lse) else blocks
            found = self.over_lanes(call, blocks, wanted, out, lse, grad_out, grad_lse)
            if blocks is not None and blocks.merged:
                more = lists.gradient(
                    self.attention, blocks.beside, call, wanted, lse, grad_out, grad_lse, out.to(call.q.dtype)
                )
                for total, g in zip(found[:3], more[:3], strict=True):
                    total += g
                for name, g in more[3].items():
                    found[3][name] += g
        return found

    def over_lanes(
        self,
        call: Call,
        blocks: BlockLists | None,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """The gradients before they are rounded."""
        wide = call.q.dtype
        totals = [call.q.new_empty(call.q.shape), *(x.new_zeros(x.shape) for x in (call.k, call.v))]
        tables = {name: x.new_zeros(x.shape) for name, x in singles(call.tables, wanted).items()}
        shift = None if grad_lse is None else grad_lse.masked_fill(lse == -torch.inf, 0.0)
        for lane in self.lanes(call, blocks):
            work, over = self.work(call, lane, True, wanted), lane.queries(lse)
            if lane.strained(over):
                work, _, _, over = self.careful(call, lane)
            rows = Rows(
                lane.queries(grad_out.to(wide)),
                lane.queries(out.to(wide)),
                self.totals(work, over),
                None if shift is None else lane.queries(shift),
            )
            dq, dk, dv = lane.queries(totals[0]), lane.keys(totals[1]), lane.keys(totals[2])
            dq[:, work.schedule.empty] = 0.0
            back = Back(rows, dk, dv, tables, room_of(work), slopes := slopes_of(work, wanted))
            for chunk, addend in work.schedule.chunks:
                gq = part_gradient(work, chunk, addend, back)
                (chunk.put_queries if chunk.fresh else chunk.add_queries)(dq, gq)
            for slab, found in rooms(work.slabs, dq):
                for piece, some in slab.pieces():
                    found[:, some] = part_gradient(work, piece, None, back)[:, 0]
                dq[:, slab.rows] += slab.sums(found)
            bias_gradient(work, slopes, tables)
            sink_gradient(work, rows, tables)
        return totals[0], totals[1], totals[2], tables

    def work(self, call: Call, lane: Lane, gradient: bool, wanted: Sequence[str] = ()) -> Work:
        """Not simple where tables ask for gradients that differ from pair to pair."""
        simple = Simple.of(lane.group, call.q.shape[3])
        if simple is not None and (lane.chosen is not None or not call.adjacent):
            simple = replace(simple, by_distance=simple.bias is None)
        if simple is not None and simple.bias is not None and not simple.by_distance:
            asked = not {table.name for table in simple.bias.tables}.isdisjoint(wanted)
            simple = None if asked else simple
        return Work(call, lane, simple, self.kept, gradient)
