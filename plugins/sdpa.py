"""The `sdpa` backend: torch's dense attention, for patterns that are full, causal or nearly so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.backend import Call, Kernel, Problem, weighed
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import (
    Env,
    affine_in_s,
    by_head,
    constant_scale,
    elements,
    evaluate,
    fused_rows,
    softmax,
    strained,
)
from attndsl.expr import Expr
from attndsl.tiles.blockmask import BlockMask, TileGrid

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Gradients = tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]

SECONDS = {
    "calls": 0.00073,
    "products": 3.13e-11,
    "masked": 3.11e-10,
    "written": 3.09e-09,
    "numbers": 2.07e-09,
    "nanoseconds": 8.65e-11,
}
"""Of two cores with AVX-512, by `python -m benchmarks.cost fit`."""
TRAINING = 3.5
"""Forward and backward beside forward: 5 matrix products to 2."""
CAUSAL_SLACK = 384
"""Keys of a row beyond the diagonal that the fused kernel computes: half a block of 256 queries and of 512
keys."""


def lowered(attention: Attention, head_dim: int) -> tuple[float, Expr | None] | str:
    """Scale of Q @ K and bias of the logits, or the reason why SDPA cannot do it."""
    if len(attention.groups) > 1:
        return "head groups: SDPA does the same for every head"
    group: HeadGroup = attention.groups[0]
    if group.norm.kind != "softmax":
        return f"norm {group.norm.kind}: SDPA has softmax only"
    if group.norm.sink is not None:
        return "a sink: SDPA has none"
    if group.decay is not None:
        return "decay or multiplicities: SDPA has a bias only"
    split = affine_in_s(group.score)
    if split is None:
        return "the score is not s * number + bias"
    scale = constant_scale(split[0], head_dim)
    if scale is None:
        return "the score scales s by something that varies"
    return scale / head_dim**0.5, None if ir.number(split[1]) == 0 else split[1]


def is_full(grid: TileGrid) -> bool:
    return grid.nnz == grid.nq * grid.n


def is_causal(grid: TileGrid) -> bool:
    """Exactly k <= q on a square."""
    rows = len(grid.run_ptr) - 1
    diagonal = np.arange(rows)
    ends = np.zeros(rows, np.int64)
    if grid.nq != grid.n or grid.nnz != grid.n * (grid.n + 1) // 2 or grid.run_start.any():
        return False
    ends[np.repeat(diagonal, np.diff(grid.run_ptr))] = grid.run_end
    if not np.array_equal(ends, diagonal) or not np.array_equal(grid.part_col, diagonal):
        return False
    inside = np.unpackbits(grid.masks, axis=2, bitorder="little").astype(bool)
    return not np.triu(inside, 1).any()


@dataclass(frozen=True, eq=False)
class Dense:
    """The kernel of one attention: softmax(Q @ K * scale + bias) over a dense mask."""

    scale: float
    bias: Expr | None
    masks: WeakKeyDictionary[BlockMask, Tensor]

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        return self.formula(call, call.q, call.k, call.v, call.tables)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        if call.q.device.type != "cpu" or 0 in (*call.q.shape, *call.k.shape):
            return self.formula(call, call.q, call.k, call.v, call.tables)
        causal, addend = self.addend(call)
        q, k, v = self.padded(call)
        out, lse = flash(q, k, v, is_causal=causal, attn_mask=addend, scale=self.scale)
        if addend is not None:
            lse = lse.masked_fill((addend == -torch.inf).all(-1), -torch.inf)
        return out[..., : call.v.shape[3]].contiguous(), lse.contiguous()

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        fused = call.q.device.type == "cpu" and 0 not in (*call.q.shape, *call.k.shape)
        if not fused or wanted or grad_lse is not None or strained(lse):
            tables = {name: call.tables[name] for name in wanted}
            _, pull = vjp(
                lambda q, k, v, t: self.formula(call, q, k, v, {**call.tables, **t}),
                call.q,
                call.k,
                call.v,
                tables,
            )
            slopes = grad_out.to(lse.dtype), torch.zeros_like(lse) if grad_lse is None else grad_lse
            grads: Gradients = pull(slopes)
            return grads
        causal, addend = self.addend(call)
        q, k, v = self.padded(call)
        out, grad_out = (fused_rows(x.to(q.dtype), q.shape[3]) for x in (out, grad_out))
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
        gq, gk, gv = flash_backward(
            grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=addend, scale=self.scale
        )
        share = (call.k.shape[1], -1)
        gk, gv = (x.unflatten(1, share).sum(2) for x in (gk, gv))
        d, dv = call.q.shape[3], call.v.shape[3]
        return gq[..., :d].contiguous(), gk[..., :d].contiguous(), gv[..., :dv].contiguous(), {}

    def addend(self, call: Call) -> tuple[bool, Tensor | None]:
        """Whether the mask is exactly causal, else mask and bias [B or 1, H or 1, nq, n] to add."""
        grids = call.block_mask.grids
        if self.bias is None and all(is_full(grid) for grid in grids):
            return False, None
        # the fused causal kernel of torch 2.13 on CPU gives NaN where the scale is not positive
        if self.bias is None and self.scale > 0 and all(is_causal(grid) for grid in grids):
            return True, None
        mask, bias = self.mask(call), self.bias_of(call, call.tables)
        return False, torch.where(mask, bias, -torch.inf).expand(-1, -1, *mask.shape[2:])

    def mask(self, call: Call) -> Tensor:
        known = self.masks.get(call.block_mask)
        if known is None:
            known = self.masks[call.block_mask] = torch.from_numpy(call.block_mask.to_dense()).to(
                call.q.device
            )
        return known

    def bias_of(self, call: Call, tables: Mapping[str, Tensor]) -> Tensor:
        q, device = call.q, call.q.device
        wide = torch.promote_types(q.dtype, torch.float32)
        if self.bias is None:
            return torch.zeros((1, 1, 1, 1), dtype=wide, device=device)
        per_row = [
            torch.tensor(x, device=device).view(-1, 1, 1, 1) for x in (call.q_offset, call.k_offset, call.n)
        ]
        heads = torch.arange(q.shape[1], device=device).view(1, -1, 1, 1)
        batch = torch.arange(q.shape[0], device=device).view(-1, 1, 1, 1)
        values = {
            "q": per_row[0] + torch.arange(q.shape[2], device=device)[:, None],
            "k": per_row[1] + torch.arange(call.k.shape[2], device=device),
            "n": per_row[2],
            "h": heads,
        }
        sizes = {"nq": q.shape[2], "H": q.shape[1], "D": q.shape[3]}
        values |= {name: torch.tensor(size, device=device) for name, size in sizes.items()}
        bias = evaluate(self.bias, Env(values, tables, batch, heads, wide), self.mask(call)).to(wide)
        return bias if bias.dim() == 4 else bias.view(1, 1, 1, 1)

    def padded(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As many key heads as query heads, and equal head dimensions, which the fused kernel wants."""
        width = max(call.q.shape[3], call.v.shape[3])
        share = call.q.shape[1] // call.k.shape[1]
        k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in (call.k, call.v))
        q, k, v = (fused_rows(x, width) for x in (call.q, k, v))
        return q, k, v

    def formula(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, tables: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same from matrix products: differentiable in everything, the log-sum-exp included."""
        wide = torch.promote_types(q.dtype, torch.float32)
        share = q.shape[1] // k.shape[1]
        q_, k_, v_ = (
            q.to(wide),
            k.to(wide).repeat_interleave(share, 1),
            v.to(wide).repeat_interleave(share, 1),
        )
        mask = self.mask(call)
        logit = q_ @ k_.transpose(-1, -2) * self.scale + self.bias_of(call, tables)
        weight, lse = softmax(torch.where(mask, logit, -torch.inf))
        return weight @ v_, lse.squeeze(-1)


def _checked(attention: Attention, head_dim: int) -> tuple[float, Expr | None]:
    """`lowered`, of an attention that is supported."""
    found = lowered(attention, head_dim)
    assert not isinstance(found, str), found
    return found


class Sdpa:
    """Registered as `sdpa`."""

    seconds = SECONDS

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        reason = lowered(attention, problem.head_dim)
        return reason if isinstance(reason, str) else None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float:
        seconds = weighed(SECONDS, self.counts(attention, problem, block_mask))
        return seconds * (TRAINING if problem.training else 1)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        """An addend of mask and bias is made at every call."""
        area = float(problem.length * problem.q_length)
        every = problem.batch * problem.heads * area
        scale, bias = _checked(attention, problem.head_dim)
        grids, masks = ((), 1) if block_mask is None else (block_mask.grids, block_mask.index.size)
        counts = {
            "calls": 1.0,
            "pairs": every,
            "masked": 0.0,
            "written": 0.0,
            "numbers": 0.0,
            "nanoseconds": 0.0,
        }
        if bias is None and scale > 0 and grids and all(is_causal(grid) for grid in grids):
            counts["pairs"] *= min(1.0, (problem.length + CAUSAL_SLACK) / max(1, 2 * problem.length))
        elif bias is not None or not all(is_full(grid) for grid in grids) or not grids:
            heads = problem.batch * problem.heads if bias is not None and by_head(bias) else masks
            counts["numbers"], counts["nanoseconds"] = elements(bias, area, problem.batch * problem.heads)
            counts |= {"masked": every, "written": area * heads}
        return counts | {"products": counts["pairs"] * problem.head_dim}

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        return Dense(*_checked(attention, problem.head_dim), WeakKeyDictionary())


backend = Sdpa()
