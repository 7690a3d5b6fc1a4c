"""The kernel of one attention: leaves, launches and gradients of each group of heads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.backend import Call, Gradients, Pages, Problem
from attndsl.emit.leaves import Leaf, Products
from attndsl.emit.score import Score
from attndsl.errors import fail
from attndsl.execution.apart import Sums
from attndsl.execution.group_call import GroupCall, KnownLeaves, Margins, Tops, far, sloped
from attndsl.execution.torch_eval import at_hand, singles
from attndsl.expr import KEY_VECTORS, Table
from attndsl.tiles.lowering import head_groups

from .configs import GREATEST, Config, Kernel, arithmetic, config, splits_of, wide
from .launch import KnownTiles, Tiles, addresses, listed, on, run, start, strided
from .layout import Units
from .source import Functions, functions, looks_up, score_of_pairs, unordered

MARGINS: Margins = {
    "number": (0, 0),
    "query": (0, GREATEST),
    "key": (0, GREATEST),
    "distance": (GREATEST, GREATEST),
    "table": (0, 1),
}
"""Entries beside those of a leaf, which no pair asks for but whole tiles hold."""
FEW = 64
"""Queries of all heads that share keys up to which their keys are split among programs."""
NEVER = 2**62
"""Of a pair that is none."""


@dataclass(frozen=True, eq=False)
class Compiled:
    """The kernel of one attention over tiles; `alone` where it is of all keys of the rows: of some gradients
    are not rounded, and the log-sum-exp of all comes back."""

    attention: Attention
    problem: Problem
    alone: bool = True
    tiles: KnownTiles = field(default_factory=KnownTiles)
    leaves: KnownLeaves = field(default_factory=KnownLeaves)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        q, v = call.q, call.v
        # the backward pass sees no rounding of the output
        wide = torch.promote_types(q.dtype, torch.float32)
        dtype = wide if self.problem.training else q.dtype
        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=dtype)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        if not (q.numel() and call.k.numel()):
            return out.zero_(), lse.fill_(-torch.inf)
        for part in self.parts(call):
            part.decode(out, lse) if part.few else part.forward(out, lse)
        if not at_hand(lse):
            # where no logit is a number none is the greatest
            lse = torch.where((lse == -torch.inf) & out[..., :1].isnan().any(-1), torch.nan, lse)
        return out, lse

    def paged(self, call: Call, pages: Pages) -> tuple[Tensor, Tensor] | None:
        """As `Paged`; None also for a pair without a value, which is told where keys are at hand."""
        part, *others = self.parts(call, pages)
        beside = any(x.stride(3) != 1 for x in (pages.k, pages.v))
        if others or beside or not part.few or part.reads_keys:
            return None
        wide_dtype = torch.promote_types(call.q.dtype, torch.float32)
        out = call.q.new_empty((*call.q.shape[:3], pages.v.shape[3]))
        lse = call.q.new_empty(call.q.shape[:3], dtype=wide_dtype)
        wrong = part.decode(out, lse)
        return (out, lse) if wrong is None or int(wrong.min()) == NEVER else None

    def summed(self, call: Call) -> Sums:
        """Output, top and sum of weights as a part of other keys; the norm is softmax."""
        q, v = call.q, call.v
        out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.promote_types(q.dtype, torch.float32))
        lse, top, total = (out.new_empty(q.shape[:3]) for _ in range(3))
        tops = torch.empty_like(top, dtype=torch.float64)
        for part in self.parts(call):
            part.forward(out, lse, top, total)
            tops = torch.where(part.own.own_heads[:, None], part.score.unit * top.double(), tops)
        return out, tops, total

    def evened(
        self, call: Call, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What comes back to the rows of a softmax, times what makes weights right: the log-sum-exp that they
        are measured by has lost digits where it is far from 0. A device is not asked whether it is so: it
        goes through tiles that are none where it is not."""
        asked, parts = far(lse), [part for part in self.parts(call) if part.score.softmax]
        if not parts or (at_hand(lse) and not asked):
            return grad_out, grad_lse
        times = torch.ones_like(lse)
        for part in parts:
            top, total = part.tops(asked)
            own = torch.exp((lse / part.score.unit - top) * part.score.unit) / total
            times = torch.where(part.own.own_heads[:, None], own, times)
        # a row without keys has nothing to be measured
        times = torch.where(asked & (lse != -torch.inf), times, 1.0)
        grad_out = (grad_out * times[..., None]).to(grad_out.dtype)
        return grad_out, None if grad_lse is None else grad_lse * times

    def parts(self, call: Call, pages: Pages | None = None) -> list[Part]:
        """One for each group of heads."""
        (_, heads, _, d) = call.q.shape
        which, found = np.array(head_groups(self.attention, heads)), []
        for i, group in enumerate(self.attention.groups):
            score = score_of_pairs(group, d, call.adjacent)
            if isinstance(score, str):
                raise fail(f"the backend `triton` declines: {score}")
            if (which == i).any():
                own = GroupCall(call, group, score, which == i, MARGINS, self.leaves)
                found.append(Part(own, self, pages))
        return found

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        gq, gk, gv = (
            torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (call.q, call.k, call.v)
        )
        tables = {name: torch.zeros_like(x) for name, x in singles(call.tables, wanted).items()}
        if call.q.numel() and call.k.numel():
            if self.alone:
                grad_out, grad_lse = self.evened(call, lse, grad_out, grad_lse)
            for part in self.parts(call):
                part.gradient(out, lse, grad_out, grad_lse, (gq, gk, gv), tables)
        if self.alone:
            gq, gk, gv = (g.to(x.dtype) for g, x in ((gq, call.q), (gk, call.k), (gv, call.v)))
        return gq, gk, gv, {name: g.to(call.tables[name].dtype) for name, g in tables.items()}


@dataclass(frozen=True, eq=False)
class Part:
    """What one group of heads does in one call, whose keys and values may be in pages."""

    own: GroupCall
    kernel: Compiled
    pages: Pages | None

    @property
    def call(self) -> Call:
        return self.own.call

    @property
    def score(self) -> Score:
        return self.own.score

    @property
    def device(self) -> torch.device:
        return self.call.q.device

    def tile(self, kernel: Kernel) -> Config:
        call, problem = self.call, self.kernel.problem
        width = max(call.q.shape[3], call.v.shape[3])
        found = config(
            str(self.device), call.q.dtype, kernel, width, problem.block_size, looks_up(self.score)
        )
        if isinstance(found, str):
            raise fail(f"the backend `triton` declines: {found}")
        return found

    def tiles(self, tile: Config, by_keys: bool = False) -> Tiles:
        """As kernels with these tiles read them."""
        batch, blocks = self.call.q.shape[0], self.call.block_mask
        known = self.kernel.tiles.setdefault(blocks, {})
        key = (batch, self.own.heads.tobytes(), tile.queries, tile.keys, by_keys, self.device)
        if key not in known:
            known[key] = Tiles.of(blocks, self.own.heads, batch, tile, by_keys, self.device)
        return known[key]

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of pages keys and values are [pages, Hkv, size, features], and nothing is copied."""
        if self.pages is not None:
            return strided(self.call.q), self.pages.k.transpose(1, 2), self.pages.v.transpose(1, 2)
        q, k, v = (strided(x) for x in (self.call.q, self.call.k, self.call.v))
        return q, k, v

    @property
    def reads_keys(self) -> bool:
        """Whether something beside products with queries is computed of keys."""
        return any(
            leaf.of.of == "key" if isinstance(leaf.of, Products) else bool(leaf.of.free & KEY_VECTORS)
            for leaf in self.score.leaves
            if not isinstance(leaf.of, Table)
        )

    @cached_property
    def leaves(self) -> Tensor:
        """Where each is, int64 [B, H, leaves]."""
        return addresses([*self.own.leaves.values()], self.call.q.shape[:2], self.device)

    @cached_property
    def sizes(self) -> Tensor:
        """Of the axes of tables, int64 [leaves, AXES]."""
        return listed(tuple([self.own.sizes(leaf) for leaf in self.score.leaves]), self.device)

    @cached_property
    def few(self) -> bool:
        """Whether the queries of all heads that share keys are one tile, and have one mask."""
        blocks, (_, heads, nq, _) = self.call.block_mask, self.call.q.shape
        index = blocks.index[:, np.arange(heads) % blocks.index.shape[1]]
        grouped = index.reshape(len(index), self.call.k.shape[1], -1)
        rows, same = nq * grouped.shape[2], bool((grouped == grouped[..., :1]).all())
        return blocks.rows is not None and rows <= FEW and same and bool(self.own.heads.all())

    def decode(self, out: Tensor, lse: Tensor) -> Tensor | None:
        """As `forward`, of few queries: the keys are split among programs, by what is live. Of keys in pages
        it gives the first pairs without a value, if there may be any."""
        from . import kernels

        q, _, v = self.vectors
        (batch, heads, nq, _), kv_heads, dv = q.shape, self.call.k.shape[1], v.shape[3]
        share, blocks = heads // kv_heads, self.call.block_mask
        tile = self.tile("decode" if self.pages is None else "decode_paged")
        tile = replace(tile, queries=wide(nq * share))
        units = Units.of(blocks.rows or (), tile.keys)
        index = np.broadcast_to(blocks.index[:, np.arange(heads) % blocks.index.shape[1]], (batch, heads))
        splits = splits_of(self.device, batch * kv_heads, int(units.heads[:, 2].max()))
        parts = q.new_empty((splits, batch, heads, nq, dv), dtype=self.own.wide)
        top, total = (parts.new_empty(parts.shape[:4]) for _ in range(2))
        made, sink = functions(self.score), self.own.sink
        checked = made.written.checked
        wrong = torch.full((batch * kv_heads * splits if checked else 1,), NEVER, device=self.device)
        sizes = {"nq": nq, "splits": splits, "rows_of_all": batch * heads * nq}
        norm = {"NORM": made.written.norm, "TOP": top, "SUM": total, "PARTS": parts}
        common = {**self.common, **sizes, **norm}
        grid = on(self.device, index.astype(np.int32))
        table = grid if self.pages is None else self.pages.table.contiguous()
        run(
            kernels.decode, (splits, kv_heads, batch), tile, self.device, **common,
            GRID=grid, TABLE=table, most_pages=table.shape[1],
            PAGE=0 if self.pages is None else self.pages.size, units=on(self.device, units.heads),
            unit_at=on(self.device, units.at), words=on(self.device, units.words), WRONG=wrong,
            HELD=made["held_query"], SCORE=made["score"], CHECKED=checked, SHARED_BY=share,
        )  # fmt: skip
        start(
            kernels.merge, (batch * heads * nq,), self.device, **sizes, **norm, OUT=out, LSE=lse,
            SINK=lse if sink is None else sink, SUNK=sink is not None, SPLITS=wide(splits), DV=dv,
            WIDE_DV=wide(dv), num_warps=4,
        )  # fmt: skip
        if checked and self.pages is None:
            self.look(wrong)
        return wrong if checked else None

    @cached_property
    def common(self) -> dict[str, Any]:
        """Arguments of every kernel over tiles."""
        import triton.language as tl

        q, k, v = self.vectors
        (_, heads, nq, d), n, dv = q.shape, self.call.k.shape[2], v.shape[3]
        names = [f"{x}{axis}" for x in "qkv" for axis in "bhn"]
        strides = dict(zip(names, (s for x in (q, k, v) for s in x.stride()[:3]), strict=True))
        kind = arithmetic(q.dtype)
        leaves = self.own.leaves.values()
        return {
            "Q": q, "K": k, "V": v, "leaves": self.leaves, "sizes": self.sizes, **strides, "nq": nq, "n": n,
            "heads": heads, "packed": self.score.packed,
            "LEAVES": max(1, len(self.score.leaves)),
            "PRECISION": "ieee" if kind == "half" or q.dtype == torch.float64 else kind,
            "D": d, "WIDE_D": wide(d), "DV": dv, "WIDE_DV": wide(dv),
            "REAL": tl.float64 if q.dtype == torch.float64 else tl.float32,
            "WHOLE": tl.int64 if any(x.dtype == torch.int64 for x in leaves) else tl.int32,
        }  # fmt: skip

    def forward(
        self,
        out: Tensor,
        lse: Tensor,
        top: Tensor | None = None,
        total: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> None:
        """Fills contiguous tensors: the output, the log-sum-exp and, where they are given, of each row a
        number near its greatest logit and the sum of weights over that. Where the truth `asked` does not hold
        there are no tiles, and so nothing of worth."""
        from . import kernels

        tile = self.tile("forward")
        tiles, made = self.tiles(tile), functions(self.score)
        batch, heads = self.call.q.shape[:2]
        checked, sink = made.written.checked, self.own.sink
        wrong = torch.full((batch * heads * tiles.lines if checked else 1,), NEVER, device=self.device)
        run(
            kernels.forward, (tiles.lines, len(tiles.heads), batch), tile, self.device,
            **self.common, **(tiles if asked is None else tiles.where(asked)).arguments, HEADS=tiles.heads,
            OUT=out, LSE=lse, TOP=lse if top is None else top, SUM=lse if total is None else total,
            SINK=lse if sink is None else sink, WRONG=wrong, HELD=made["held_query"],
            SCORE=made["score"], NORM=made.written.norm, CHECKED=checked,
            SUNK=sink is not None, TOPS=top is not None, share=heads // self.call.k.shape[1],
        )  # fmt: skip
        if checked:
            self.look(wrong)

    def look(self, wrong: Tensor) -> None:
        """Raises AttnError for a pair without a value; another device fails later, and does not say which."""
        if not at_hand(wrong):
            said = "a decay is negative at a related pair, or a look-up asks for an entry beyond its table"
            torch._assert_async((wrong == NEVER).all(), said)
        elif (pair := int(wrong.min())) < NEVER:
            self.own.refuse(pair)

    def tops(self, asked: Tensor) -> Tops:
        """Of each row a number near its greatest logit, and the sum of weights over that; nothing of worth
        where `asked` does not hold."""
        (batch, heads, nq, _), dv = self.call.q.shape, self.call.v.shape[3]
        top, total, lse = (
            torch.full((batch, heads, nq), -torch.inf, dtype=self.own.wide, device=self.device)
            for _ in range(3)
        )
        out = self.call.q.new_empty((batch, heads, nq, dv))
        self.forward(out, lse, top, total, None if at_hand(lse) else asked)
        return top, total

    def sums(self, lse: Tensor, grad_lse: Tensor | None) -> Tops | None:
        """Of rows of another norm than softmax, as `tops`; None where the log-sum-exp says it, or nothing
        depends on sums."""
        asked, norm = far(lse), self.own.group.norm.kind
        if self.score.softmax or (norm != "linear" and grad_lse is None) or (at_hand(lse) and not asked):
            return None
        top, total = self.tops(asked)
        return top, torch.where(asked, total, lse.exp())

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
        from . import kernels

        call, own, score = self.call, self.own, self.score
        if reason := unordered(score, tables.keys()):
            if not torch.is_deterministic_algorithms_warn_only_enabled():
                raise fail(f"the backend `triton` declines: {reason}", help='compile with `backend="torch"`')
            warnings.warn(f"the backend `triton`: {reason}", stacklevel=2)
        asked = sloped(score, tables.keys())
        made = functions(score, frozenset(asked))
        level, total, delta = own.rows(out, lse, grad_out, grad_lse, self.sums(lse, grad_lse))
        # an empty row has no weights
        level = level.masked_fill(level == -torch.inf, torch.inf)
        share = call.q.shape[1] // call.k.shape[1]
        by_queries = self.tile("backward_queries")
        by_keys = self.tile("backward_keys" if share == 1 else "backward_shared")
        tiles = self.tiles(by_queries)
        slopes = {leaf: self.slope(leaf, tiles.lines) for leaf in asked}
        at = addresses([slopes.get(leaf) for leaf in score.leaves], call.q.shape[:2], self.device)
        back = {
            "GRAD_OUT": grad_out.to(call.q.dtype).contiguous(), "LEVEL": level, "DELTA": delta,
            "SHARE": level if total is None else torch.where(level == torch.inf, 0.0, 1 / total),
            "DIVIDED": total is not None, "slopes": at, "unit": score.unit,
        }  # fmt: skip
        # other groups of heads add theirs
        alone = own.heads.all()
        gq, gk, gv = grads if alone else (torch.zeros_like(x) for x in grads)
        batch, kv_heads = call.q.shape[0], call.k.shape[1]
        run(
            kernels.backward_queries, (tiles.lines, len(tiles.heads), batch), by_queries, self.device,
            **self.common, **tiles.arguments, **back, HEADS=tiles.heads, GQ=gq, share=share,
            **_functions(made, "query"),
        )  # fmt: skip
        tiles = self.tiles(by_keys, by_keys=True)
        run(
            kernels.backward_keys, (tiles.lines, kv_heads, batch), by_keys, self.device,
            **self.common, **tiles.arguments, **back, GK=gk, GV=gv, SHARED_BY=share,
            **_functions(made, "key"),
        )  # fmt: skip
        if not alone:
            for total, mine in zip(grads, (gq, gk, gv), strict=True):
                total.add_(mine)
        summed = {leaf: x.sum(2, keepdim=True) if leaf.kind == "number" else x for leaf, x in slopes.items()}
        own.pull(summed, grads, tables)
        own.sink_gradient(lse, delta, tables)

    def slope(self, leaf: Leaf, lines: int) -> Tensor:
        """Where kernels add up the gradient of a leaf: [B, H, entries], of a number one for each line."""
        x = self.own.leaves[leaf]
        return x.new_zeros((*self.call.q.shape[:2], lines if leaf.kind == "number" else x.shape[2]))


def _functions(made: Functions, side: str) -> dict[str, Any]:
    return {name.upper(): made[f"{name}_{side}"] for name in ("held", "slopes", "begin", "finish")}
