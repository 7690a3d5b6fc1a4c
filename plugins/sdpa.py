"""The `sdpa` backend: torch's dense attention, for patterns that are full, causal or nearly so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.backend import DTYPES, Call, Gradients, Kernel, Problem, predicted
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import (
    FEATURES,
    Env,
    Linear,
    along_diagonals,
    elements,
    environment,
    evaluate,
    from_diagonals,
    fused_rows,
    of_distances,
    singles,
    softmax,
    strained,
)
from attndsl.expr import Expr
from attndsl.scores import by_distance, by_head, linear_in_tables, scale_and_bias
from attndsl.tiles.blockmask import BlockMask

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

SECONDS = {
    "cpu": {
        "calls": 0.0001,
        "products": 3.13e-11,
        "masked": 3.11e-10,
        "written": 2.0e-09,
        "numbers": 1.4e-09,
        "nanoseconds": 8.65e-11,
        "read": 2.9e-10,
    }
}
"""Of two cores with AVX-512, by `python -m benchmarks.cost fit`."""
TRAINING = 3.5
"""Forward and backward beside forward: 5 matrix products to 2."""
ADDED, FORMED, KEPT, SMALL = 2**21, 2**19, 2**24, 2**20
"""Numbers of an addend, and of weights, that are formed at once; pairs of a mask that is kept; numbers of an
addend that is kept."""
ALONG, PAIRS = "along diagonals", "at pairs"
"""No tables' names."""
NEW = 6.0
"""Calls that one takes whose few rows have a mask or bias, which is another at every step of decoding."""
CAUSAL_SLACK = 384
"""Keys of a row beyond the diagonal that the fused kernel computes: half a block of 256 queries and of 512
keys."""


class Addend(NamedTuple):
    """What is added to the logits of all rows, and which rows have nothing else than -inf."""

    causal: bool
    addend: Tensor | None = None
    dead: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """The kernel of one attention: softmax(Q @ K * scale + bias) over a dense mask, some rows at a time."""

    scale: float
    bias: Expr | None
    masks: WeakKeyDictionary[BlockMask, Tensor] = field(default_factory=WeakKeyDictionary)
    near: WeakKeyDictionary[BlockMask, Tensor] = field(default_factory=WeakKeyDictionary)
    small: WeakKeyDictionary[BlockMask, dict[object, Addend]] = field(default_factory=WeakKeyDictionary)
    lines: WeakKeyDictionary[BlockMask, dict[object, Linear]] = field(default_factory=WeakKeyDictionary)

    @cached_property
    def by_distance(self) -> bool:
        return self.bias is not None and by_distance(self.bias) is not None

    @cached_property
    def linear(self) -> bool:
        """Whether it is more, and linear in tables."""
        return self.bias is not None and not self.constant and linear_in_tables(self.bias) is not None

    @cached_property
    def read(self) -> tuple[str, ...]:
        """The tables of calls that the bias reads."""
        return tuple(sorted(table.name for table in self.bias.tables)) if self.bias is not None else ()

    @cached_property
    def constant(self) -> bool:
        """Whether what is added to logits is the same in every call of one mask at one place."""
        return self.bias is None or (not self.bias.tables and "b" not in self.bias.free)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        whole = self.whole(call)
        if whole is not None and not whole.causal and whole.addend is None:
            return all_pairs(call, self.scale)
        if whole is not None:
            q, k, v = padded(call, not whole.causal)
            out, lse = by_key_head(q, k, v, whole.causal, whole.addend, self.scale)
            if whole.dead is not None:
                lse = lse.masked_fill(whole.dead, -torch.inf)
            return out[..., : call.v.shape[3]], lse
        q, fused = call.q, is_fused(call)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty((*q.shape[:3], call.v.shape[3]), dtype=q.dtype if fused else wide)
        lse = q.new_empty(q.shape[:3], dtype=wide)
        made = self.made(call, {})
        # written in place: what is kept of each piece would scatter over the memory that the next ones need
        if not fused:
            for rows in self.formed_blocks(call):
                piece = self.formula(call, rows, q[:, :, rows], call.k, call.v, made)
                out[:, :, rows], lse[:, :, rows] = piece
            return out, lse
        q, k, v = padded(call, True)
        for rows in self.fused_blocks(call):
            causal, addend = self.addend(call, rows, made)
            o, total = by_key_head(q[:, :, rows], k, v, causal, addend, self.scale)
            out[:, :, rows] = o[..., : call.v.shape[3]]
            lse[:, :, rows] = total
            if addend is not None:
                lse[:, :, rows].masked_fill_(addend.amax(-1) == -torch.inf, -torch.inf)
        return out, lse

    def whole(self, call: Call) -> Addend | None:
        """What all rows take at once, where it is kept from an earlier call or made for later ones."""
        if not is_fused(call):
            return None
        causal = self.plain(call)
        if causal is not None:
            return Addend(causal)
        batch, heads, nq, _ = call.q.shape
        lead = call.block_mask.index.size if self.bias is None else batch * heads
        if lead * nq * call.k.shape[2] > SMALL:
            return None
        if not self.constant:
            if self.line(call) is None:
                return None
            _, addend = self.addend(call, slice(0, nq), self.made(call, {}))
            assert addend is not None
            return Addend(False, addend, addend.amax(-1) == -torch.inf)
        place = (call.q.dtype, None if self.bias is None else (call.q_at, call.k_at, call.n))
        known = self.small.setdefault(call.block_mask, {})
        found = known.get(place)
        if found is None:
            _, addend = self.addend(call, slice(0, nq), self.made(call, {}))
            assert addend is not None
            addend = addend.contiguous()
            dead = addend.amax(-1) == -torch.inf
            found = Addend(False, addend, dead if bool(dead.any()) else None)
            known.clear()
            known[place] = found
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
        if not is_fused(call) or wanted or grad_lse is not None or strained(lse):
            slopes = grad_out.to(lse.dtype), torch.zeros_like(lse) if grad_lse is None else grad_lse
            return self.formula_gradient(call, wanted, lse, *slopes)
        q, k, v = padded(call)
        out, grad_out = (fused_rows(x.to(q.dtype), q.shape[3]) for x in (out, grad_out))
        whole = self.whole(call)
        if whole is None or whole.dead is not None:
            lse = lse.masked_fill(lse == -torch.inf, 0.0)

        pulled = partial(flash_backward, dropout_p=0.0, scale=self.scale)
        if whole is not None:
            some = {"is_causal": whole.causal, "attn_mask": whole.addend}
            gq, gk, gv = pulled(grad_out, q, k, v, out, lse, **some)
        else:
            gq, made = torch.empty_like(q), self.made(call, {})
            gk, gv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
            for rows in self.fused_blocks(call):
                causal, addend = self.addend(call, rows, made)
                here = grad_out[:, :, rows], q[:, :, rows], k, v, out[:, :, rows], lse[:, :, rows]
                gq[:, :, rows], *more = pulled(*here, is_causal=causal, attn_mask=addend)
                for total, g in zip((gk, gv), more, strict=True):
                    total += g
        d, dv = call.q.shape[3], call.v.shape[3]
        gk, gv = (summed(total, call.k.shape[1]).to(q.dtype) for total in (gk, gv))
        return gq[..., :d], gk[..., :d], gv[..., :dv], {}

    def formula_gradient(
        self, call: Call, wanted: Sequence[str], lse: Tensor, grad_out: Tensor, grad_lse: Tensor
    ) -> Gradients:
        empty = lse == -torch.inf
        some_empty = bool(empty.any())
        wide, share = grad_lse.dtype, call.q.shape[1] // call.k.shape[1]
        k, v = (shared(x.to(wide), share) for x in (call.k, call.v))
        tables = singles(call.tables, wanted)
        line, pull_made, pull = self.line(call), None, None
        if wanted and line is None:
            made, pull_made = vjp(lambda tables: self.made(call, tables), tables)
        else:
            made = self.made(call, {})
        gq, totals = torch.empty_like(call.q), None
        slopes = {name: x.new_zeros(x.shape) for name, x in made.items()} if wanted else {}
        for rows in self.formed_blocks(call):
            q, slope, mask = call.q[:, :, rows].to(wide), grad_out[:, :, rows], self.mask(call, rows)
            q = q * self.scale
            if wanted and made.keys().isdisjoint((ALONG, PAIRS)):
                bias, pull = vjp(
                    lambda made, rows=rows, mask=mask: self.bias_of(call, rows, mask, made), made
                )
            else:
                bias = self.bias_of(call, rows, mask, made)
            addend = torch.where(mask, bias, -torch.inf)
            weight = (q @ k.mT).add_(addend).softmax(-1)
            if some_empty:
                weight.masked_fill_(empty[:, :, rows, None], 0.0)
            back = slope @ v.mT
            delta = (weight * back).sum(-1, keepdim=True) - grad_lse[:, :, rows, None]
            logit = back.sub_(delta).mul_(weight)
            gq[:, :, rows] = (logit @ k).mul_(self.scale)
            here = logit.mT @ q, weight.mT @ slope
            totals = here if totals is None else (totals[0].add_(here[0]), totals[1].add_(here[1]))
            if wanted:
                logit = logit.sum_to_size(bias.shape)
            if pull is not None:
                (more,) = pull(logit)
                for name, g in more.items():
                    slopes[name] += g
            elif PAIRS in slopes:
                slopes[PAIRS][:, :, rows] += logit
            elif ALONG in slopes:
                self.along(call, rows, slopes[ALONG]).add_(along_diagonals(logit).sum(-2))
        if line is not None and wanted:
            named = {name: x.new_zeros(x.shape) for name, x in tables.items()}
            line.add_gradients(slopes[PAIRS] if PAIRS in slopes else slopes[ALONG][..., None], named)
        else:
            (named,) = pull_made(slopes) if pull_made else ({},)
        named = {name: g.to(call.tables[name].dtype) for name, g in named.items()}
        assert totals is not None
        gk, gv = (summed(x, y.shape[1]).to(y.dtype) for x, y in zip(totals, (call.k, call.v), strict=True))
        return gq, gk, gv, named

    def fused_blocks(self, call: Call) -> list[slice]:
        """All at once where no addend is made; of less than 192 the fused kernel takes 32 at a time."""
        batch, heads, nq, _ = call.q.shape
        if self.plain(call) is not None:
            return [slice(0, nq)]
        lead = call.block_mask.index.size if self.bias is None else batch * heads
        return blocks(nq, lead * call.k.shape[2], ADDED, 192)

    def formed_blocks(self, call: Call) -> list[slice]:
        batch, heads, nq, _ = call.q.shape
        return blocks(nq, batch * heads * call.k.shape[2], FORMED, 32)

    def plain(self, call: Call) -> bool | None:
        """Whether the mask is exactly causal, where that or its being full is all there is to add."""
        if self.bias is None and call.block_mask.is_full:
            return False
        # the fused causal kernel of torch 2.13 on CPU gives NaN where the scale is not positive
        if self.bias is None and self.scale > 0 and all(grid.is_causal for grid in call.block_mask.grids):
            return True
        return None

    def addend(self, call: Call, rows: slice, made: Mapping[str, Tensor]) -> tuple[bool, Tensor | None]:
        """`plain`, or mask and bias [B or 1, H or 1, rows, n] to add."""
        causal = self.plain(call)
        if causal is not None:
            return causal, None
        mask = self.mask(call, rows)
        bias = self.bias_of(call, rows, mask, made)
        return False, torch.where(mask, bias, -torch.inf).expand(-1, -1, *mask.shape[2:])

    def mask(self, call: Call, rows: slice) -> Tensor:
        known, device = self.masks.get(call.block_mask), call.q.device
        if known is None:
            blocks = call.block_mask
            if blocks.nq * blocks.n * blocks.index.size > KEPT:
                return torch.from_numpy(blocks.to_dense(rows.start, rows.stop)).to(device)
            known = self.masks[blocks] = torch.from_numpy(blocks.to_dense()).to(device)
        return known[:, :, rows]

    def diagonals(self, call: Call) -> Tensor:
        """Whether some pair is live at each key minus query [B or 1, H or 1, nq + n - 1]."""
        known = self.near.get(call.block_mask)
        if known is None:
            (nq, n), shape = (call.q.shape[2], call.k.shape[2]), call.block_mask.index.shape
            known = torch.zeros((*shape, nq + n - 1), dtype=torch.bool, device=call.q.device)
            for rows in blocks(nq, math.prod(shape) * n, ADDED, 1):
                live = along_diagonals(self.mask(call, rows)).any(-2)
                known[..., nq - rows.stop : nq - rows.start + n - 1] |= live
            self.near[call.block_mask] = known
        return known

    def made(self, call: Call, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the bias of any rows is made of: tables that take the place of the call's, or its values at
        all PAIRS [B or 1, H or 1, nq, n] or ALONG all diagonals [B or 1, H or 1, nq + n - 1]."""
        nq, n = call.q.shape[2], call.k.shape[2]
        if (line := self.line(call)) is not None:
            found = line.values({**call.tables, **tables}, torch.promote_types(call.q.dtype, torch.float32))
            lead = found.shape[:2] if found.dim() == 4 else (1, 1)
            if self.diagonal(call):
                return {ALONG: found.expand(*lead, nq + n - 1, 1)[..., 0]}
            return {PAIRS: found.expand(*lead, nq, n)}
        if not self.diagonal(call):
            return dict(tables)
        assert self.bias is not None
        env = replace(environment(call), tables={**call.tables, **tables})
        return {ALONG: of_distances(self.bias, env, distances(env, nq, n), self.diagonals(call))}

    def diagonal(self, call: Call) -> bool:
        """Whether the bias is the same along the diagonals."""
        return self.by_distance and call.adjacent and 0 not in (call.q.shape[2], call.k.shape[2])

    def line(self, call: Call) -> Linear | None:
        """The bias at all diagonals [.., nq + n - 1, 1], or at all pairs [.., nq, n], where it is linear in
        tables and not much; kept for the places of the last call of a mask."""
        (batch, heads, nq, _), n = call.q.shape, call.k.shape[2]
        diagonal = self.diagonal(call)
        if not self.linear or 0 in (nq, n) or (not diagonal and batch * heads * nq * n > SMALL):
            return None
        shapes = tuple([call.tables[name].shape for name in self.read])
        place = (call.q.dtype, batch, call.q_at, call.k_at, call.n, shapes)
        known = self.lines.setdefault(call.block_mask, {})
        found = known.get(place)
        if found is None:
            env = environment(call)
            if diagonal:
                at = {"q": distances(env, nq, n)[..., None], "k": env.values["q"].new_zeros(())}
                env, live = replace(env, values={**env.values, **at}), self.diagonals(call)[..., None]
            else:
                live = self.mask(call, slice(0, nq))
            assert self.bias is not None
            found = Linear.of(self.bias, env, live)
            known.clear()
            known[place] = found
        return found

    def along(self, call: Call, rows: slice, x: Tensor) -> Tensor:
        """What some rows have of something along all diagonals."""
        nq, n = call.q.shape[2], call.k.shape[2]
        return x[..., nq - rows.stop : nq - rows.start + n - 1]

    def bias_of(self, call: Call, rows: slice, mask: Tensor, made: Mapping[str, Tensor]) -> Tensor:
        """Of these query rows: [B or 1, H or 1, rows or 1, n or 1]."""
        if ALONG in made:
            return from_diagonals(self.along(call, rows, made[ALONG]), call.k.shape[2])
        if PAIRS in made:
            return made[PAIRS][:, :, rows]
        env = replace(environment(call), tables={**call.tables, **made})
        if self.bias is None or not mask.numel():
            return torch.zeros((1, 1, 1, 1), dtype=env.dtype, device=env.device)
        values = {**env.values, "q": env.values["q"][:, :, rows]}
        bias = evaluate(self.bias, replace(env, values=values), mask).to(env.dtype)
        return bias if bias.dim() == 4 else bias.view(1, 1, 1, 1)

    def formula(
        self, call: Call, rows: slice, q: Tensor, k: Tensor, v: Tensor, made: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The same from matrix products: differentiable in everything, the log-sum-exp included."""
        wide = torch.promote_types(q.dtype, torch.float32)
        k, v = (shared(x.to(wide), q.shape[1] // k.shape[1]) for x in (k, v))
        mask = self.mask(call, rows)
        logit = q.to(wide) @ k.transpose(-1, -2) * self.scale + self.bias_of(call, rows, mask, made)
        weight, lse = softmax(torch.where(mask, logit, -torch.inf))
        return weight @ v, lse.squeeze(-1)


def is_fused(call: Call) -> bool:
    """Whether torch's fused kernel can run."""
    return call.q.device.type == "cpu" and 0 not in (*call.q.shape, *call.k.shape)


def all_pairs(call: Call, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp where every pair is live: query heads that share a key head are rows of one
    product, so that nothing of k and v is copied."""
    (batch, heads, _, d), dv, q = call.q.shape, call.v.shape[3], call.q
    if heads != call.k.shape[1]:
        q = q.reshape(batch, call.k.shape[1], -1, d)
    out, lse = flash(*(fused_rows(x, max(d, dv)) for x in (q, call.k, call.v)), scale=scale)
    out = out if d <= dv else out[..., :dv]
    return (out, lse) if q is call.q else (out.reshape(*call.q.shape[:3], dv), lse.reshape(call.q.shape[:3]))


def padded(call: Call, together: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Equal head dimensions, which the fused kernel wants, and as many key heads as query heads, unless these
    may go `together` and what is then added has fewer numbers than the keys would be repeated by."""
    nq, d, width = *call.q.shape[2:], max(call.q.shape[3], call.v.shape[3])
    share = 1 if together and nq < d else call.q.shape[1] // call.k.shape[1]
    k, v = (shared(x, share) for x in (call.k, call.v))
    q, k, v = (fused_rows(x, width) for x in (call.q, k, v))
    return q, k, v


def by_key_head(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, addend: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """torch's kernel, for query heads that share a key head as rows of one product."""
    (batch, heads, nq, _), kv_heads = q.shape, k.shape[1]
    if heads == kv_heads:
        return flash(q, k, v, is_causal=causal, attn_mask=addend, scale=scale)  # type: ignore[no-any-return]
    assert addend is not None
    mask = addend.expand(-1, heads, -1, -1).reshape(len(addend), kv_heads, -1, k.shape[2])
    q = q.reshape(batch, kv_heads, -1, q.shape[3])
    out, lse = flash(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, nq, -1), lse.reshape(batch, heads, nq)


def shared(x: Tensor, share: int) -> Tensor:
    """Key heads, each for so many query heads."""
    return x if share == 1 else x.repeat_interleave(share, 1)


def summed(x: Tensor, heads: int) -> Tensor:
    """The other way round, of gradients."""
    return x if x.shape[1] == heads else x.view(len(x), heads, x.shape[1] // heads, *x.shape[2:]).sum(2)


def distances(env: Env, nq: int, n: int) -> Tensor:
    """q - k on each diagonal [B or 1, 1, nq + n - 1]."""
    first_q, first_k = env.values["q"][..., :1, 0], env.values["k"][..., 0, :1]
    return first_q - first_k - torch.arange(1 - nq, n, device=env.device)


def blocks(rows: int, numbers: int, most: int, least: int) -> list[slice]:
    """Rows of so many numbers each, at most so many numbers at a time but at least so many rows; one block if
    there are none."""
    step = max(least, most // max(1, numbers))
    return [slice(first, min(first + step, rows)) for first in range(0, max(1, rows), step)]


def scale_and_bias_of(attention: Attention, head_dim: int) -> tuple[float, Expr | None]:
    """Scale of Q @ K and bias of the logits, of an attention that is supported."""
    found = scale_and_bias(attention.groups[0].score, head_dim)
    assert not isinstance(found, str), found
    return found


class Sdpa:
    """Registered as `sdpa`."""

    features = replace(FEATURES, clauses={"score"})
    seconds = SECONDS

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        reason = scale_and_bias(attention.groups[0].score, problem.head_dim)
        return reason if isinstance(reason, str) else None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        """An addend of mask and bias is made at every call."""
        area = float(problem.length * problem.q_length)
        every = problem.batch * problem.heads * area
        scale, bias = scale_and_bias_of(attention, problem.head_dim)
        grids, masks = ((), 1) if block_mask is None else (block_mask.grids, block_mask.index.size)
        each = DTYPES[problem.dtype] / 4 * problem.batch * problem.length * problem.head_dim
        counts = {
            "calls": 1.0,
            "pairs": every,
            "masked": 0.0,
            "written": 0.0,
            "numbers": 0.0,
            "nanoseconds": 0.0,
            "read": 2 * each * problem.kv_heads,
        }
        if bias is None and scale > 0 and grids and all(grid.is_causal for grid in grids):
            counts["pairs"] *= min(1.0, (problem.length + CAUSAL_SLACK) / max(1, 2 * problem.length))
        elif bias is not None or block_mask is None or not block_mask.is_full:
            heads = problem.batch * problem.heads if bias is not None and by_head(bias) else masks
            by_pair = bias is None or by_distance(bias) is None
            formed = area if by_pair else float(problem.length + problem.q_length)
            counts["numbers"], counts["nanoseconds"] = elements(bias, formed, problem.batch * problem.heads)
            counts |= {"masked": every, "written": area * heads}
            if block_mask is not None and block_mask.rows and problem.q_length < problem.length:
                counts["calls"] = NEW
        return counts | {"products": counts["pairs"] * problem.head_dim}

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        return Dense(*scale_and_bias_of(attention, problem.head_dim))


backend = Sdpa()
