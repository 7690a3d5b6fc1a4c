"""The `lowrank` backend: what stands in place of weights of pairs, as products of thin matrices.

Nystrom's is K1 Z (K3 V) from right to left, with the m landmarks as the queries and then as the keys of
torch's own attention: nothing of n x m numbers is written.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attndsl.attention import Approx, Attention
from attndsl.backend import Call, Features, Kernel, Problem, predicted
from attndsl.execution.torch_eval import FEATURES
from attndsl.expr import TRUE
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.queries import keys_read

SECONDS = {"cpu": {"calls": 1e-3, "products": 2.6e-11, "numbers": 1e-9}}
"""Of one core with AVX-512."""
TRAINING = 4.0
"""Forward and backward beside forward."""

Tokens = slice | Tensor


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
        approx, p = attention.approx, problem
        assert approx is not None
        heads, tokens = p.batch * p.heads, float(p.length + p.q_length)
        m = p.head_dim if approx.kind == "shen" else min(approx.landmarks, p.length)
        # of each iteration four products of m x m x m
        products = heads * (tokens * m * 2 * p.head_dim + 4 * approx.iterations * float(m) ** 3)
        if approx.kind == "shen":
            products = heads * tokens * m * p.head_dim
        return {
            "calls": 1,
            "pairs": products / (2 * p.head_dim),
            "products": products,
            "numbers": 2 * heads * tokens * p.head_dim,
            "written": 2 * heads * tokens * p.head_dim,
        }

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        approx, masked = attention.approx, attention.groups[0].relation.mask is not TRUE
        assert approx is not None
        return lambda call: attend(approx, masked, call)


def attend(approx: Approx, masked: bool, call: Call) -> tuple[Tensor, Tensor]:
    """Batch rows of which the mask leaves the same tokens together."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (call.q, call.k, call.v))
    lse = q.new_zeros(q.shape[:3])
    if not masked:
        return among(approx, q, k, v, slice(None)), lse
    live = keys_read(call.block_mask)[:, 0]
    kinds, which = np.unique(live, axis=0, return_inverse=True)
    which = np.broadcast_to(which, len(q))
    parts = []
    for i, kept in enumerate(kinds):
        rows = torch.from_numpy(np.flatnonzero(which == i)).to(q.device)
        some = (q, k, v) if len(kinds) == 1 else (x[rows] for x in (q, k, v))
        parts.append(among(approx, *some, tokens_of(kept, q.device)))
        if not kept.any():
            lse[rows] = -torch.inf
    if len(parts) == 1:
        return parts[0], lse
    back = np.argsort(np.argsort(which, kind="stable"), kind="stable")
    return torch.cat(parts)[torch.from_numpy(back).to(q.device)], lse


def tokens_of(kept: NDArray[np.bool_], device: torch.device) -> Tokens:
    """Neighbours as a slice, which copies nothing."""
    places = np.flatnonzero(kept)
    if not len(places) or places[-1] - places[0] == len(places) - 1:
        return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)
    return torch.from_numpy(places).to(device)


def among(approx: Approx, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens) -> Tensor:
    """[B, H, nq, Dv] of q [B, H, nq, D], k [B, Hkv, n, D] and v [B, Hkv, n, Dv], of some tokens."""
    own, k, v = q[:, :, tokens], k[:, :, tokens], v[:, :, tokens]
    if not k.shape[2]:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if approx.kind == "shen":
        return shared(lambda q, k, v: q.softmax(3) @ (k.softmax(2).mT @ v), q, k, v)
    if k.shape[2] <= approx.landmarks:
        return shared(sdpa, q, k, v)
    q_means, k_means = means(own, approx.landmarks), means(k, approx.landmarks)
    k_means = k_means.repeat_interleave(q.shape[1] // k.shape[1], 1)
    inner = (q_means @ k_means.mT / q.shape[3] ** 0.5).softmax(3)
    seen = pseudo_inverse(inner, approx.iterations) @ shared(sdpa, q_means, k, v)
    return sdpa(q, k_means, seen)


def shared(attention: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of query heads that share keys, as more queries of one head."""
    together = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    return attention(together, k, v).view(*q.shape[:3], v.shape[3])


def means(x: Tensor, m: int) -> Tensor:
    """[B, H, m, D] of segments of x [B, H, n, D], of floor(i m / n) at i."""
    n = x.shape[2]
    if n % m == 0:
        return x.unflatten(2, (m, n // m)).mean(3)
    segment = torch.arange(n, device=x.device) * m // n
    sums = x.new_zeros(*x.shape[:2], m, x.shape[3]).index_add(2, segment, x)
    return sums / segment.bincount(minlength=m)[:, None]


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Of a [.., m, m] whose rows sum to 1 (Razavi et al., 2014); each matrix has its own scale."""
    z = a.mT / a.sum(-2).amax(-1)[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


backend = LowRank()
