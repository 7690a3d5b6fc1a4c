"""The `lowrank` backend: what stands in place of weights of pairs, as products of thin matrices.

Nystrom's K1 Z K3 V is evaluated from the right: m landmarks as the queries, then as the keys of attention.
Forward nothing of n x m numbers is written; the backward pass forms those of one head at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attndsl.analysis.work import products
from attndsl.attention import Approx, Attention
from attndsl.backend import Call, Features, Gradients, Kernel, Problem, predicted
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import FEATURES
from attndsl.expr import TRUE
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.queries import keys_read

SECONDS = {"cpu": {"calls": 5e-4, "products": 2e-11, "written": 1.6e-9}}
"""Of one core with AVX-512, by benchmarks/approx.py."""
TRAINING = 4.0
"""Forward and backward beside forward."""

Some = slice | Tensor
Three = tuple[Tensor, Tensor, Tensor]
ALL, NONE = slice(None), slice(0, 0)


class LowRank:
    """Registered as `lowrank`."""

    features = Features(
        approx={"nystrom", "shen"}, modes={"training"}, dtypes=FEATURES.dtypes, devices=FEATURES.devices
    )
    seconds = SECONDS

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        if attention.approx is None:
            return "it has weights of pairs"
        if "h" in attention.groups[0].relation.mask.free:
            return "its mask differs from head to head"
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        """`pairs` are as many as take these products."""
        p = problem
        assert attention.approx is not None
        heads = p.batch * p.heads
        done = products(attention.approx, heads, p.q_length, p.length, p.head_dim, p.head_dim)
        written = 2.0 * heads * p.head_dim * (p.length + p.q_length)
        return {"calls": 1, "pairs": done / (2 * p.head_dim), "products": done, "written": written}

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        assert attention.approx is not None
        return LowRankKernel(attention.approx, attention.groups[0].relation.mask is not TRUE)


@dataclass(frozen=True, eq=False)
class LowRankKernel:
    """Batch rows of which the mask leaves the same tokens are taken together."""

    approx: Approx
    masked: bool

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        given, found = _wide(call), []
        lse = given[0].new_zeros(call.q.shape[:3])
        parts = self._parts(call)
        for rows, tokens in parts:
            q, k, v = (x[rows] for x in given)
            if tokens is NONE:
                lse[rows] = -torch.inf
                found.append(q.new_zeros(*q.shape[:3], v.shape[3]))
            else:
                found.append(among(self.approx, tokens, q, k, v))
        return _together(parts, found), lse

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        given, found = _wide(call), []
        parts = self._parts(call)
        for rows, tokens in parts:
            q, k, v = (x[rows] for x in given)
            back = grad_out[rows].to(q.dtype)
            means_enter = self.approx.kind == "nystrom" and k[:, :, tokens].shape[2] > self.approx.landmarks
            if tokens is NONE:
                slopes = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
            elif means_enter and back.is_cpu:
                slopes = nystrom_gradient(self.approx, tokens, q, k, v, out[rows].to(q.dtype), back)
            else:
                _, pull = vjp(partial(among, self.approx, tokens), q, k, v)
                slopes = pull(back)
            found.append(slopes)
        gq, gk, gv = (_together(parts, x).to(call.q.dtype) for x in zip(*found, strict=True))
        return gq, gk, gv, {}

    def _parts(self, call: Call) -> list[tuple[Some, Some]]:
        """Batch rows, and the tokens that their mask leaves."""
        if not self.masked or not call.q.shape[2]:
            return [(ALL, ALL if call.k.shape[2] else NONE)]
        live = keys_read(call.block_mask)[:, 0]
        kinds, which = np.unique(live, axis=0, return_inverse=True)
        rows = [torch.from_numpy(np.flatnonzero(which.ravel() == i)) for i in range(len(kinds))]
        device = call.q.device
        return [
            (ALL if len(kinds) == 1 else some.to(device), tokens_of(kept, device))
            for some, kept in zip(rows, kinds, strict=True)
        ]


def _together(parts: Sequence[tuple[Some, Some]], found: Sequence[Tensor]) -> Tensor:
    """What was found for the rows of each part, in the order of the rows."""
    if len(found) == 1:
        return found[0]
    whole = torch.cat(list(found))
    return whole[torch.argsort(torch.cat([rows for rows, _ in parts if isinstance(rows, Tensor)]))]


def _wide(call: Call) -> Three:
    wide = torch.promote_types(call.q.dtype, torch.float32)
    return call.q.to(wide), call.k.to(wide), call.v.to(wide)


def tokens_of(kept: NDArray[np.bool_], device: torch.device) -> Some:
    """Neighbours as a slice, which copies nothing."""
    places = np.flatnonzero(kept)
    if not len(places):
        return NONE
    if places[-1] - places[0] == len(places) - 1:
        return slice(int(places[0]), int(places[-1]) + 1)
    return torch.from_numpy(places).to(device)


def among(approx: Approx, tokens: Some, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, nq, Dv] of q [B, H, nq, D], k [B, Hkv, n, D] and v [B, Hkv, n, Dv], of some tokens."""
    k, v = k[:, :, tokens], v[:, :, tokens]
    if approx.kind == "shen":
        return shared(lambda q, k, v: q.softmax(3) @ (k.softmax(2).mT @ v), q, k, v)
    if k.shape[2] <= approx.landmarks:
        return shared(sdpa, q, k, v)
    q_means, k_means = means(q[:, :, tokens], approx.landmarks), means(k, approx.landmarks)
    return sdpa(q, _for_each(k_means, q), inverted(approx, q_means, k_means, shared(sdpa, q_means, k, v)))


def inverted(approx: Approx, q_means: Tensor, k_means: Tensor, seen: Tensor) -> Tensor:
    """What stands at each landmark: the inverse of how landmarks see one another, times what they see."""
    inner = (q_means @ _for_each(k_means, q_means).mT / q_means.shape[3] ** 0.5).softmax(3)
    return pseudo_inverse(inner, approx.iterations) @ seen


def shared(attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of query heads that share keys, as more queries of one head."""
    together = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    return attention(together, k, v).reshape(*q.shape[:3], v.shape[3])


def _for_each(keys: Tensor, q: Tensor) -> Tensor:
    # repeat_interleave has no derivative below the dispatcher
    share = q.shape[1] // keys.shape[1]
    return keys.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2)


def segments(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each of n positions, and how many are in each [m, 1]."""
    found = torch.arange(n, device=device) * m // n
    return found, found.bincount(minlength=m)[:, None]


def means(x: Tensor, m: int) -> Tensor:
    """[B, H, m, D] of the segments of x [B, H, n, D]."""
    n = x.shape[2]
    if n % m == 0:
        return x.reshape(*x.shape[:2], m, n // m, x.shape[3]).mean(3)
    segment, sizes = segments(n, m, x.device)
    return x.new_zeros(*x.shape[:2], m, x.shape[3]).index_add_(2, segment, x) / sizes


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Of a [.., m, m] whose rows sum to 1 (Razavi et al., 2014); each matrix has its own scale."""
    z: Tensor = a.mT / a.sum(-2).amax(-1)[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def nystrom_gradient(
    approx: Approx, tokens: Some, q: Tensor, k: Tensor, v: Tensor, out: Tensor, back: Tensor
) -> Three:
    """Of q, k and v, as in `among`, where more tokens are left than there are landmarks."""
    m, share, scale = approx.landmarks, q.shape[1] // k.shape[1], q.shape[3] ** -0.5
    some_k, some_v = k[:, :, tokens], v[:, :, tokens]
    q_means, k_means = means(q[:, :, tokens], m), means(some_k, m)
    seen = shared(sdpa, q_means, some_k, some_v)
    values, pull = vjp(partial(inverted, approx), q_means, k_means, seen)
    gq, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, some_k, some_v))
    g_values, g_keys = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (values, q_means))
    g_few = torch.empty_like(g_keys)
    for b, h in np.ndindex(q.shape[:2]):
        sides = q[b, h], k_means[b, h // share], values[b, h]
        _slopes(scale, sides, out[b, h], back[b, h], (gq[b, h], g_keys[b, h], g_values[b, h]))
    g_q_means, g_k_means, g_seen = pull(g_values)
    for b, h in np.ndindex(k.shape[:2]):
        heads = slice(h * share, (h + 1) * share)
        few, result, slope, g = (x[b, heads].flatten(0, 1) for x in (q_means, seen, g_seen, g_few))
        _slopes(scale, (few, some_k[b, h], some_v[b, h]), result, slope, (g, gk[b, h], gv[b, h]))
    g_q_means = g_q_means + g_few
    g_k_means = g_k_means + g_keys.view(*k.shape[:2], share, m, -1).sum(2)
    _spread(gk, g_k_means)
    own = gq[:, :, tokens]
    _spread(own, g_q_means)
    if tokens is ALL:
        return gq, gk, gv
    whole_k, whole_v = torch.zeros_like(k), torch.zeros_like(v)
    gq[:, :, tokens], whole_k[:, :, tokens], whole_v[:, :, tokens] = own, gk, gv
    return gq, whole_k, whole_v


def _spread(into: Tensor, slopes: Tensor) -> None:
    """Adds what the slopes of `means` [B, H, m, D] give to its positions [B, H, n, D]."""
    n, m = into.shape[2], slopes.shape[2]
    if n % m == 0:
        into.view(*into.shape[:2], m, n // m, -1).add_(slopes.unsqueeze(3), alpha=m / n)
    else:
        _, sizes = segments(n, m, into.device)
        into += (slopes / sizes).repeat_interleave(sizes[:, 0], 2)


def _slopes(scale: float, sides: Three, out: Tensor, back: Tensor, into: Three) -> None:
    """Writes gradients of softmax attention of q [nq, D], k [n, D] and v [n, Dv]."""
    q, k, v = sides
    g_q, g_k, g_v = into
    # the shorter side is the one that is scaled: nothing else passes over the longer
    few = q.shape[0] < k.shape[0]
    q, k = (scale * q, k) if few else (q, scale * k)
    weight = (q @ k.T).softmax(1)
    torch.mm(weight.T, back, out=g_v)
    slope = (back @ v.T).sub_((back * out).sum(1, keepdim=True)).mul_(weight)
    torch.mm(slope, k, out=g_q)
    torch.mm(slope.T, q, out=g_k)
    (g_q if few else g_k).mul_(scale)


backend = LowRank()
