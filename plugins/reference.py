"""The meaning of an attention: dense, slow and obvious, in the dtype of q."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attndsl.analysis.work import products
from attndsl.attention import Approx, Attention, HeadGroup
from attndsl.backend import Call, Kernel, Problem, predicted
from attndsl.execution.torch_eval import (
    FEATURES,
    Env,
    decay_factor,
    elements,
    environment,
    evaluate,
    gain,
    gained,
    softmax,
)
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.queries import keys_read

SECONDS = {
    "cpu": {
        "calls": 0.0005,
        "products": 1.74e-11,
        "formed": 1.71e-08,
        "masks": 8.96e-10,
        "numbers": 1.86e-09,
        "copied": 3e-09,
    }
}
"""Of two cores with AVX-512, by `python -m benchmarks.cost fit`."""
TRAINING = 3.4
"""Forward and backward beside forward."""
PASSES = 8
"""Arrays of a number for each pair that a group of heads writes, whatever its score."""


class Reference:
    """Registered as `reference`."""

    features = replace(
        FEATURES,
        clauses={"score", "decay", "count", "sink", "heads"},
        norms={"softmax", "sigmoid", "relu", "linear", "none"},
        approx={"nystrom", "shen"},
    )
    seconds = SECONDS

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        """Every group is formed at every head."""
        if attention.approx is not None:
            return approximate_counts(attention.approx, problem)
        heads, area = problem.batch * problem.heads, float(problem.length * problem.q_length)
        groups = len(attention.groups)
        made = [elements(e, area, heads) for g in attention.groups for e in (g.score, g.decay)]
        numbers, computed = (sum(column) for column in zip(*made, strict=True))
        return {
            "calls": groups,
            "pairs": heads * area,
            "products": heads * area * problem.head_dim * (1 + groups) / 2,
            "formed": heads * area * groups,
            "masks": area * groups * (1 if block_mask is None else block_mask.index.size),
            "numbers": numbers,
            "copied": 2.0 * heads * problem.length * problem.head_dim,
            "nanoseconds": computed,
            "written": PASSES * heads * area * groups + numbers,
        }

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        if attention.approx is not None:
            approx = attention.approx
            return lambda call: approximate(approx, call)
        return lambda call: attend(attention, call)


def attend(attention: Attention, call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as in `Kernel`; every pair is formed."""
    env = environment(call)
    q, k = call.q.to(env.dtype), call.k.to(env.dtype).repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    s = q @ k.transpose(-1, -2) / q.shape[3] ** 0.5
    env = replace(env, values={**env.values, "s": s, "Q": q, "K": k})
    out, lse = None, None
    for group in attention.groups:
        some, sums = attend_group(group, call, env)
        mine = evaluate(group.heads, env).expand(1, q.shape[1], 1, 1)
        out = some if out is None else torch.where(mine, some, out)
        lse = sums if lse is None else torch.where(mine.squeeze(-1), sums, lse)
    assert out is not None
    assert lse is not None
    return out.to(call.q.dtype), lse


def attend_group(group: HeadGroup, call: Call, env: Env) -> tuple[Tensor, Tensor]:
    """w = decay * g(score) on the related pairs; o = sum w v / Z."""
    here = evaluate(group.heads, env)
    mask = torch.from_numpy(call.block_mask.to_dense()).to(call.q.device) & here
    v = call.v.to(env.dtype).repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)
    score = evaluate(group.score, env, mask).to(env.dtype).expand(env.values["s"].shape)
    logit = torch.where(mask, score, -torch.inf)
    decay = mask.to(env.dtype) if group.decay is None else decay_factor(group.decay, env, mask)
    decay = decay.expand(score.shape)
    if group.norm.kind == "softmax":
        sink = group.norm.sink
        weight, lse = softmax(logit, decay, None if sink is None else evaluate(sink, env, here).to(env.dtype))
        return weight @ v, lse.squeeze(-1)
    weight, lse = gained(group.norm.kind, decay * gain(group.norm.kind, logit))
    return weight @ v, lse.squeeze(-1)


def approximate_counts(approx: Approx, problem: Problem) -> dict[str, float]:
    """Every head of every batch row is taken alone."""
    p = problem
    heads, tokens = p.batch * p.heads, p.length + p.q_length
    done = products(approx, heads, p.q_length, p.length, p.head_dim, p.head_dim)
    formed = float(heads * tokens * (min(approx.landmarks, p.length) or p.head_dim))
    return {
        **dict.fromkeys(("masks", "numbers", "copied", "nanoseconds"), 0.0),
        "calls": heads,
        "pairs": done / (2 * p.head_dim),
        "products": done,
        "formed": formed,
        "written": PASSES * formed,
    }


def approximate(approx: Approx, call: Call) -> tuple[Tensor, Tensor]:
    """Each head of each batch row of the tokens that its mask leaves."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    share = call.q.shape[1] // call.k.shape[1]
    live = keys_read(call.block_mask)
    out, lse = [], call.q.new_zeros(call.q.shape[:3], dtype=wide)
    for b, h in np.ndindex(call.q.shape[:2]):
        tokens = torch.from_numpy(np.flatnonzero(live[b % len(live), h % live.shape[1]])).to(call.q.device)
        q, k, v = (x.to(wide) for x in (call.q[b, h], call.k[b, h // share], call.v[b, h // share]))
        if not len(tokens):
            out.append(q.new_zeros(len(q), v.shape[1]))
            lse[b, h] = -torch.inf
        elif approx.kind == "nystrom":
            out.append(nystrom(approx, q, k, v, tokens))
        else:
            out.append(q.softmax(1) @ (k[tokens].softmax(0).T @ v[tokens]))
    found = torch.stack(out) if out else call.q.new_zeros(0, dtype=wide)
    return found.view(*call.q.shape[:3], call.v.shape[3]).to(call.q.dtype), lse


def nystrom(approx: Approx, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
    """[nq, Dv] of q [nq, D], k [n, D], v [n, Dv], where some tokens are left: each as good as a landmark, it
    is the attention that is approximated."""
    n, m = len(tokens), approx.landmarks
    scale: float = q.shape[1] ** -0.5
    own, k, v = q[tokens], k[tokens], v[tokens]
    if n <= m:
        return (scale * q @ k.T).softmax(1) @ v
    segment = torch.arange(n, device=q.device) * m // n
    mean = (segment == torch.arange(m, device=q.device)[:, None]).to(q.dtype)
    mean = mean / mean.sum(1, keepdim=True)
    kernels = ((q, mean @ k), (mean @ own, mean @ k), (mean @ own, k))
    first, inner, last = ((scale * left @ right.T).softmax(1) for left, right in kernels)
    return first @ (pseudo_inverse(inner, approx.iterations) @ (last @ v))


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Of a [m, m] whose rows sum to 1, by the iteration of Razavi et al., 2014."""
    z: Tensor = a.T / a.sum(0).max()
    one = torch.eye(len(a), dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


backend = Reference()
