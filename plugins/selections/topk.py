"""`topk(r, of = R, by = E)`: for each query the r keys, or blocks of keys, with the greatest scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.expr import Expr, Selected
from attndsl.meaning.pointwise import evaluate as pointwise
from attndsl.meaning.pointwise import partial
from attndsl.scores import by_head, by_pair
from attndsl.selection import Offered

if TYPE_CHECKING:
    from torch import Tensor

    from attndsl.execution.torch_eval import Env

Score = Expr | None
ALL = slice(None)
SLAB, SCORES = 64, 2**20
"""Rows whose scores are made at once, or as many as have so many scores: those are still in cache when they
are compared."""
SAMPLED = 8
"""Slabs that tell how many units all look at."""
GROUP, ALIGNED = 8, 16
"""Members of a group whose greatest stands for it, and of how many there are groups a multiple: those of a
cache line take a third less."""


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
        if share == "kv" and origin.of is not None and "h" in origin.of.free:
            raise fail("`share = kv` makes one choice for some heads, and `of` differs from head to head")

    def rounds(self, origin: Selected) -> int:
        return int(origin["r"])

    def relates(self, origin: Selected) -> None:
        return None

    def reads(self, origin: Selected) -> Literal["of"]:
        return "of"

    def counts(self, origin: Selected, problem: Problem) -> dict[str, float]:
        """Of the units from the first to the last that some row of a slab may choose."""
        of, by = origin.of, origin["by"]
        assert of is not None
        heads = problem.heads if by_head(by) or "h" in of.free else 1
        rows = problem.batch * heads * math.ceil(problem.q_length / origin.rows)
        units = looked_at(of, origin.rows, origin.unit, problem.q_length, problem.length)
        return {
            "products": rows * units * multiplied(by, problem.head_dim),
            "sorted": rows * compared(units, origin["r"]),
        }

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        import torch

        from attndsl.execution.torch_eval import broadcast_shapes, evaluate

        env, of, by = units(origin, offered), origin.of, origin["by"]
        (batch, heads), kv_heads = offered.q.shape[:2], offered.k.shape[1]
        rows, count = env.values["q"].shape[2], env.values["k"].shape[3]
        r = min(self.rounds(origin), count)
        found = torch.full((batch, heads, rows, r), -1, device=offered.q.device)
        assert of is not None
        # a choice that no head makes in its own way is made once
        apart = by_head(by) or "h" in of.free
        together = heads // kv_heads if apart and origin["share"] == "kv" else 1
        deep = depth(by, offered.q.shape[3])
        for some in slabs(rows, max(1, SLAB // deep, SCORES // max(1, count * deep))):
            here = part(env, rows=some)
            # axes of size 1 stay: what holds for a rectangle is not asked pair by pair
            live = evaluate(of, here)
            live = live.expand(broadcast_shapes(live.shape, (1, 1, 1, count)))
            columns = span(live)
            here, live = part(here, columns=columns), live[..., columns]
            shape = some.stop - some.start, columns.stop - columns.start
            hidden = span(~live)
            if not shape[1]:
                continue
            at_once = max(1, SCORES // (math.prod(shape) * together)) * together
            for b, few in product(range(batch), slabs(heads if apart else 1, at_once)):
                there = cut(live, {0: slice(b, b + 1), 1: few})
                partly = there if hidden.stop else None
                scores = evaluate(by, part(here, b, few), partly).to(env.dtype)
                scores = scores.expand(1, few.stop - few.start, *shape).squeeze(0)
                if together > 1:
                    scores = scores.view(-1, together, *scores.shape[1:]).sum(1)
                    there = cut(there, {1: slice(None, None, together)})
                places = greatest(scores, there.squeeze(0), hidden, r).repeat_interleave(together, 0)
                mine = few if apart else ALL
                found[b, mine, some] = torch.where(places < 0, -1, places + columns.start)
        return found

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        from attndsl.execution.torch_eval import evaluate

        by = origin["by"]
        env = units(origin, replace(offered, q=offered.q.double(), k=offered.k.double()))
        rows, count = env.values["q"].shape[2], env.values["k"].shape[3]
        shape = (*offered.q.shape[:2], rows, count)
        assert origin.of is not None
        live = evaluate(origin.of, env).expand(shape)
        scores = evaluate(by, env, live).to(env.dtype).expand(shape)
        if origin["share"] == "kv":
            groups = scores.view(shape[0], offered.k.shape[1], -1, rows, count)
            scores = groups.sum(2, keepdim=True).expand(groups.shape).flatten(1, 2)
        return best(scores, live, min(self.rounds(origin), count))


@lru_cache(maxsize=256)
def looked_at(of: Expr, rows: int, unit: int, nq: int, n: int) -> float:
    """Units that are scored for a row, in the mean; of slabs here and there. What tables say, or a search, is
    left out. Keys below 0, of memory, count where no others may be chosen."""
    known = ir.substitute(of, {"n": ir.const(n), "nq": ir.const(nq)})
    parts = known.args if known.op == "and" else (known,)
    known = ir.all_of(*(part for part in parts if part.free <= {"q", "k"} and not partial(part)))
    if any(node.op == "exists" for node in ir.nodes(known)):
        known = ir.TRUE
    first, last, units = max(0, n - nq) // rows, math.ceil(n / rows), math.ceil(n / unit)
    slabs = [
        np.unique([start, min(start + SLAB, last) - 1])
        for start in np.linspace(first, max(first, last - SLAB), SAMPLED, dtype=np.int64)
    ]

    def width(keys: NDArray[np.int64], ends: NDArray[np.int64]) -> int:
        live = np.flatnonzero(pointwise(known, ends[:, None], keys[None]).any(0))
        return int(live[-1] - live[0]) + 1 if len(live) else 0

    widths = [width(np.arange(units), ends) for ends in slabs]
    if not any(widths):
        widths = [width(np.arange(nq - n, 0), ends) for ends in slabs]
    return float(np.mean(widths))


def compared(width: float, r: int) -> float:
    """Numbers of a row among which `greatest` looks for the greatest."""
    if width <= r:
        return 0.0
    size = math.isqrt(int(width) // (r + 1))
    return width if size < 2 else width / size + (r + 1) * size


def multiplied(by: Expr, head_dim: int) -> float:
    """Products of two numbers that the score of a pair takes."""

    def width(vector: Expr) -> float:
        found = ir.number(ir.substitute(vector.width, {"D": ir.const(head_dim)})) if vector.width else None
        return float(found or head_dim)

    total = 0.0
    for node in filter(by_pair, ir.nodes(by)):
        if node.op == "inner":
            total += width(node.args[0])
        elif node.op == "matvec":
            total += width(node) * width(node.args[1])
    return total


def depth(by: Expr, head_dim: int) -> int:
    """Numbers that stand behind the score of a pair at once: of its widest vector that no matrix product
    makes."""
    widths = [
        ir.number(ir.substitute(node.width, {"D": ir.const(head_dim)}))
        for node in ir.nodes(by)
        if node.type == "vec" and node.width is not None and by_pair(node)
    ]
    return max([1, *(int(width or head_dim) for width in widths)])


def greatest(scores: Tensor, live: Tensor, hidden: slice, r: int) -> Tensor:
    """As `best` in any order, of scores [X, rows, units], which may be overwritten, and live [X or 1, rows,
    units]; what is not is among the units `hidden`."""
    import torch

    width = scores.shape[-1]
    if width <= r:
        every = torch.arange(width, device=scores.device)
        every = torch.where(live, every, -1).expand_as(scores)
        return torch.nn.functional.pad(every, (0, r - width), value=-1)
    scores = scores.contiguous()
    scores[..., hidden].masked_fill_(~live[..., hidden], -torch.inf)
    # one more than are chosen tells whether the last is equal to it: then the first of all equal ones count
    values, places = most(scores, r + 1)
    tied = ~(values[..., r] < values[..., r - 1])
    places = places[..., :r].masked_fill(values[..., :r] == -torch.inf, -1)
    if tied.any():
        places[tied] = best(scores[tied], live.expand_as(scores)[tied], r)
    return places


def most(scores: Tensor, count: int, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """The greatest along the last axis, and their places; of equal ones any.

    Each of them is in one of as many groups that have the greatest maxima.
    """
    import torch

    width = scores.shape[-1]
    balanced = math.isqrt(width // count)
    if balanced < 2:
        return scores.topk(count, sorted=sorted)
    size = min(GROUP, balanced)
    groups = width // size
    if size < balanced:
        groups -= groups % ALIGNED
    maxima = scores[..., : size * groups].reshape(*scores.shape[:-1], size, groups).amax(-2)
    found = most(maxima, count, sorted=False) if size < balanced else maxima.topk(count, sorted=False)
    members = torch.arange(0, size * groups, groups, device=scores.device)[:, None]
    places = (found[1][..., None, :] + members).flatten(-2)
    left = torch.arange(size * groups, width, device=scores.device).expand(*places.shape[:-1], -1)
    places = torch.cat([places, left], -1)
    values, which = scores.gather(-1, places).topk(count, sorted=sorted)
    return values, places.gather(-1, which)


def best(scores: Tensor, live: Tensor, r: int) -> Tensor:
    """The places of the r greatest along the last axis that are live, -1 where there are fewer. NaN is the
    greatest; of equal ones the first come first."""
    import torch

    # a stable sort of those that are live, then of those by score, so that no score need be below all others
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    dead = torch.sort(~live.gather(-1, order), dim=-1, stable=True)
    found = torch.where(dead.values, -1, order.gather(-1, dead.indices))[..., :r]
    return torch.nn.functional.pad(found, (0, r - found.shape[-1]), value=-1)


def units(origin: Selected, offered: Offered) -> Env:
    """Every row and unit: axes [B, H, rows, units]; vectors are those of tokens, or what stands for those of
    a block."""
    import torch

    from attndsl.execution.torch_eval import environment

    env = environment(offered)
    values = dict(env.values)
    for name, place, x, axis, size in (
        ("Q", "q", offered.q, offered.q_at, origin.rows),
        ("K", "k", offered.k, offered.k_at, origin.unit),
    ):
        share = offered.q.shape[1] // x.shape[1]
        if size == 1:
            values[name] = by_query_head(x, share)
            continue
        if axis.starts != (0,):
            raise fail("blocks are chosen among keys from position 0 on")
        for how in ("mean", "min", "max"):
            if f"{how}({name})" in origin["by"].free:
                values[f"{how}({name})"] = by_query_head(pooled(x, size, how), share)
        count = (x.shape[2] + size - 1) // size
        values[place] = torch.arange(count, device=x.device).view(
            (1, 1, -1, 1) if place == "q" else (1, 1, 1, -1)
        )
    return replace(env, values=values)


def by_query_head(x: Tensor, share: int) -> Tensor:
    return x if share == 1 else x.repeat_interleave(share, 1)


def part(env: Env, b: int | None = None, heads: slice = ALL, rows: slice = ALL, columns: slice = ALL) -> Env:
    """Of some batch rows, heads, rows and units; what is the same for all stays."""
    batch = ALL if b is None else slice(b, b + 1)
    vectors = {"Q": rows, "K": columns}
    values = {}
    for name, x in env.values.items():
        own = next((some for vector, some in vectors.items() if vector in name), None)
        axes = {2: rows, 3: columns} if own is None else {2: own}
        values[name] = cut(x, {0: batch, 1: heads} | axes) if x.dim() == 4 else x
    return replace(env, values=values)


def cut(x: Tensor, axes: Mapping[int, slice]) -> Tensor:
    """Some of x along axes on which it is not one for all."""
    return x[tuple(axes.get(i, ALL) if size > 1 else ALL for i, size in enumerate(x.shape))]


def span(truths: Tensor) -> slice:
    """From the first to the last unit for which some is true."""
    import torch

    # of bytes the greatest takes a fortieth of the time of `any`
    found = truths.flatten(0, -2).view(torch.uint8).amax(0).nonzero().flatten().tolist()
    return slice(found[0], found[-1] + 1) if found else slice(0, 0)


def slabs(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def pooled(x: Tensor, size: int, how: str) -> Tensor:
    """The mean, min or max [.., n / size, D] of pieces of x [.., n, D]; the last has what is there."""
    import torch

    n = x.shape[-2]
    missing = -n % size
    fill = {"mean": 0.0, "min": torch.inf, "max": -torch.inf}[how]
    padded = torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill) if missing else x
    pieces = padded.reshape(*x.shape[:-2], -1, size, x.shape[-1])
    if how == "min":
        return pieces.amin(-2)
    if how == "max":
        return pieces.amax(-2)
    counts = x.new_full((pieces.shape[-3], 1), size)
    counts[-1:] -= missing
    return pieces.sum(-2) / counts


selection = TopK()
