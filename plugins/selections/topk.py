"""`topk(r, of = R, by = E)`: for each query the r keys, or blocks of keys, with the greatest scores."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.execution.torch_eval import Env, environment, evaluate
from attndsl.expr import Expr, Selected
from attndsl.selection import Offered

Score = Expr | None


class TopK:
    """Registered as `topk`.

    r      how many are chosen; all that `of` holds where those are fewer
    by     the score, over Q and K of tokens, over their `mean`, `min` and `max` of blocks; Q @ K by default
    share  `kv`: the heads of a group choose together, by the sum of their scores
    """

    kind: Literal["list"] = "list"

    def signature(self, r: int, by: Score = None, share: str = "none") -> None: ...

    def check(self, origin: Selected) -> None:
        r, share = origin["r"], origin["share"]
        if r <= 0:
            raise fail(f"`topk` chooses {r}, and at least 1 must be chosen")
        if share not in ("none", "kv"):
            raise fail(f"`share` is {share}", help="write `share = kv`, or leave it out")

    def rounds(self, origin: Selected) -> int:
        return int(origin["r"])

    def relates(self, origin: Selected) -> None:
        return None

    def reads(self, origin: Selected) -> Literal["of"]:
        return "of"

    def counts(self, origin: Selected, problem: Problem) -> dict[str, float]:
        scores = (
            problem.batch * problem.heads * (problem.q_length / origin.rows) * problem.length / origin.unit
        )
        return {"products": scores * problem.head_dim, "sorted": scores}

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        return self.reference(origin, offered)

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        by, r = origin["by"], self.rounds(origin)
        env = units(origin, replace(offered, q=offered.q.double(), k=offered.k.double()))
        rows, count = env.values["q"].shape[2], env.values["k"].shape[3]
        shape = (*offered.q.shape[:2], rows, count)
        assert origin.of is not None
        live = evaluate(origin.of, env).expand(shape)
        scores = evaluate(by, env, live).to(env.dtype).expand(shape)
        if origin["share"] == "kv":
            groups = scores.view(shape[0], offered.k.shape[1], -1, rows, count)
            scores = groups.sum(2, keepdim=True).expand(groups.shape).flatten(1, 2)
        return best(scores, live, r)


def best(scores: Tensor, live: Tensor, r: int) -> Tensor:
    """The places of the r greatest along the last axis that are live, -1 where there are fewer. NaN is the
    greatest; of equal ones the first come first."""
    # a stable sort of those that are live, then of those by score, so that no score need be below all others
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    dead = torch.sort(~live.gather(-1, order), dim=-1, stable=True)
    found = torch.where(dead.values, -1, order.gather(-1, dead.indices))[..., :r]
    return torch.nn.functional.pad(found, (0, r - found.shape[-1]), value=-1)


def units(origin: Selected, offered: Offered) -> Env:
    """Every row and unit: axes [B, H, rows, units]; vectors are those of tokens, or what stands for those of
    a block."""
    env = environment(offered)
    share = offered.q.shape[1] // offered.k.shape[1]
    values = dict(env.values)
    for name, place, x, axis, size in (
        ("Q", "q", offered.q, offered.q_at, origin.rows),
        ("K", "k", offered.k.repeat_interleave(share, 1), offered.k_at, origin.unit),
    ):
        if size == 1:
            values[name] = x
            continue
        if axis.starts != (0,):
            raise fail("blocks are chosen among keys from position 0 on")
        for mean, reduced in pooled(x, size).items():
            values[f"{mean}({name})"] = reduced
        count = (x.shape[2] + size - 1) // size
        values[place] = torch.arange(count, device=x.device).view(
            (1, 1, -1, 1) if place == "q" else (1, 1, 1, -1)
        )
    return replace(env, values=values)


def pooled(x: Tensor, size: int) -> dict[str, Tensor]:
    """Mean, min and max [.., n / size, D] of pieces of x [.., n, D]; the last has what is there."""
    n = x.shape[-2]
    missing = -n % size
    counts = x.new_full((n // size + (missing > 0), 1), size)
    if missing:
        counts[-1] = size - missing

    def pieces(fill: float) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill)
        return padded.view(*x.shape[:-2], -1, size, x.shape[-1])

    return {
        "mean": pieces(0.0).sum(-2) / counts,
        "min": pieces(torch.inf).amin(-2),
        "max": pieces(-torch.inf).amax(-2),
    }


selection = TopK()
