"""One plan on real data: its inputs, its error against `reference`, its times beside dense attention."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attndsl.attention import Attention, Norm
from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.execution.lowered import lower
from attndsl.execution.plan import AnyPlan, Plan, compile
from attndsl.execution.sums import SumPlan
from attndsl.expr import var
from attndsl.tiles import lowering

if TYPE_CHECKING:
    from torch import Tensor

PAIRS_VERIFIED = 2**29
"""Pairs, over batch rows and heads, up to which every row is verified; beyond, rows are sampled."""
PAIRS_AT_ONCE = 2**25
SAMPLES = 8
PAIRS_MASKED = 2**28
"""Pairs up to which the mask is expanded for dense attention."""
DENSE_FLOPS = 1e12
BUDGET = 5.0
"""Seconds of repetition for the timings of one run."""


def qkv(problem: Problem, text: Path | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, nq, D], k and v [B, Hkv, n, D]: normal numbers or, with a text, its bytes under a fixed
    random projection, one batch row after the other. The queries are the last nq bytes of a row."""
    import torch

    p = problem
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = 4 * p.batch * (p.heads * p.q_length + 2 * p.kv_heads * p.length) * p.head_dim
    if wanted > held:
        raise fail(f"q, k and v take {wanted / 2**30:,.0f} GiB, and this machine has {held / 2**30:,.0f}")
    generator = torch.Generator().manual_seed(seed)
    shapes = [(p.heads, p.q_length), (p.kv_heads, p.length), (p.kv_heads, p.length)]
    if text is None:
        tensors = [torch.randn(p.batch, *shape, p.head_dim, generator=generator) for shape in shapes]
    else:
        try:
            data = text.read_bytes()
        except OSError as error:
            raise fail(f"cannot read `{text}`: {(error.strerror or str(error)).lower()}") from None
        span = max(p.length, p.q_length)
        if len(data) < p.batch * span:
            raise fail(f"`{text}` has {len(data):,} bytes, and the problem takes {p.batch * span:,}")
        tokens = torch.tensor(list(data[: p.batch * span])).view(p.batch, span)
        tensors = []
        for heads, length in shapes:
            projection = torch.randn(256, heads * p.head_dim, generator=generator)
            rows = projection[tokens[:, -length:]].view(p.batch, length, heads, p.head_dim)
            tensors.append(rows.transpose(1, 2).contiguous())
    q, k, v = (tensor.to(p.device, getattr(torch, p.dtype)) for tensor in tensors)
    return q, k, v


def memory(plan: AnyPlan, seed: int = 0) -> dict[str, Any]:
    """What the plan takes of it, normal numbers."""
    import torch

    p, length = plan.problem, plan.attention.held
    generator = torch.Generator().manual_seed(seed + 1)
    shape, wide = (p.batch, p.kv_heads, length, p.head_dim), getattr(torch, p.dtype)
    pair = tuple(torch.randn(shape, generator=generator).to(p.device, wide) for _ in "kv")
    return {"memory": pair} if length else {}


@dataclass(frozen=True)
class Verified:
    """`rows` of the queries differ from `reference` in float64, whose greatest magnitude is `largest`, by at
    most `error`; `tolerance` is what rounding in the plan's dtype explains."""

    rows: int
    largest: float
    error: float
    tolerance: float


def verify(
    plan: AnyPlan, out: Tensor, q: Tensor, k: Tensor, v: Tensor, tables: Mapping[str, Any]
) -> Verified | None:
    """None where the meaning depends on the number of queries and all rows at once would not fit."""
    import torch

    p = plan.problem
    width = max(1, p.batch * p.heads * p.length)
    at_once = max(1, PAIRS_AT_ONCE // width)
    if plan.attention.approximations:
        starts, rows = [0], p.q_length
    elif _depends_on_nq(plan.attention):
        if p.q_length > at_once:
            return None
        starts, rows = [0], p.q_length
    elif p.q_length * width <= PAIRS_VERIFIED:
        rows = min(at_once, p.q_length)
        starts = list(range(0, p.q_length, rows))
    else:
        rows = min(at_once, 64)
        starts = [i * (p.q_length - rows) // (SAMPLES - 1) for i in range(SAMPLES)]
    reference = compile(
        plan.attention,
        length=p.length,
        q_length=rows,
        batch=p.batch,
        heads=p.heads,
        kv_heads=p.kv_heads,
        head_dim=p.head_dim,
        dtype="float64",
        device=p.device,
        backend="reference",
    )
    first, _ = lowering.sizes(plan.attention, p.length, p.q_length, p.heads).q.span(0)
    keys, values = k.double(), v.double()
    if "memory" in tables:
        tables = {**tables, "memory": tuple(x.double() for x in tables["memory"])}
    error = largest = 0.0
    covered: set[int] = set()
    for start in starts:
        part = slice(start, start + rows)
        wanted = reference(q[:, :, part].double(), keys, values, q_offset=first + start, **tables)
        if not wanted.isfinite().all():
            raise fail(
                f"the score of `{plan.attention.name}` is not finite at some pair: "
                + (" or ".join(f"`{score}`" for score in _scored(plan.attention)) or "`s`"),
                help="leave such pairs out of the mask, or guard what is divided by",
            )
        gap = (out[:, :, part].double() - wanted).abs()
        error = max(error, float(torch.where(gap.isnan(), torch.inf, gap).max()))
        largest = max(largest, float(wanted.abs().max()))
        covered.update(range(start, min(start + rows, p.q_length)))
    return Verified(len(covered), largest, error, 64 * torch.finfo(out.dtype).eps * max(1.0, largest))


def _scored(attention: Attention) -> list[str]:
    """What is written for scores, but where that is `s` alone."""
    own = [str(group.score) for group in attention.groups if group.score is not var("s")]
    return list(dict.fromkeys([*own, *(x for part in attention.parts for x in _scored(part.attention))]))


def _depends_on_nq(attention: Attention) -> bool:
    masks = [group.relation.mask for group in attention.groups]
    scores = [e for group in attention.groups for e in (group.score, group.decay) if e is not None]
    gates = [part.gate for part in attention.parts]
    return (
        any("nq" in e.free for e in masks + scores + gates)
        or any("nq" in t.dims for t in attention.inputs)
        or any(_depends_on_nq(part.attention) for part in attention.parts)
    )


Work = Callable[[], object]


def medians(works: Mapping[str, Work], device: str) -> dict[str, float]:
    """Seconds of each, taken in turns: a first round, then up to 7, fewer where they would go over BUDGET."""
    first = sum(once(work, device) for work in works.values())
    rounds = range(max(1, min(7, int(BUDGET / first))))
    taken = [{name: once(work, device) for name, work in works.items()} for _ in rounds]
    return {name: statistics.median(row[name] for row in taken) for name in works}


def once(work: Work, device: str) -> float:
    import torch

    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def backward(plan: AnyPlan, qkv: tuple[Tensor, ...], tables: Mapping[str, Any]) -> Work:
    """The backward pass alone."""
    import torch

    q, k, v = (tensor.detach().requires_grad_() for tensor in qkv)
    out = plan.module()(q, k, v, **tables)
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)


def dense(plan: AnyPlan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Work | None:
    """torch's scaled_dot_product_attention on the same tensors; None where it would not fit."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    p = plan.problem
    if 4 * p.batch * p.heads * p.q_length * p.length * p.head_dim > DENSE_FLOPS:
        return None
    gqa = p.heads != p.kv_heads
    return lambda: sdpa(q, k, v, attn_mask=mask, enable_gqa=gqa)


MaskedWork = Literal["this mask", "mask + bias", "mask only"]


def masked_work(plan: AnyPlan) -> MaskedWork:
    """What dense attention can do of the plan's work: all, as it has but a mask; all, with a bias made at
    every call as the plan does; or its mask alone, which is less work."""
    if isinstance(plan, SumPlan):
        return "mask only"
    plain = (var("s"), None, Norm())
    if plan.attention.approx is None and all(
        (group.score, group.decay, group.norm) == plain for group in plan.attention.groups
    ):
        return "this mask"
    return "mask + bias" if not isinstance(plan.considered["sdpa"], str) else "mask only"


def dense_masked(plan: AnyPlan, q: Tensor, k: Tensor, v: Tensor, tables: Mapping[str, Any]) -> Work | None:
    """Dense attention under the plan's mask, doing `masked_work`; None where it would not fit."""
    import torch

    p, blocks, work = plan.problem, plan.block_masks, masked_work(plan)
    expanded = p.batch * p.heads if work == "mask + bias" else 0 if blocks is None else blocks.index.size
    if plan.attention.streams or blocks is None or expanded * p.q_length * p.length > PAIRS_MASKED:
        return None
    if work != "mask + bias":
        return dense(plan, q, k, v, torch.from_numpy(blocks.to_dense()).to(p.device))
    assert isinstance(plan, Plan)
    by_sdpa = replace(plan, lowered=lower(plan.lowered.attention, plan.lowered.problem, "sdpa"))
    return dense(plan, q, k, v) and (lambda: by_sdpa.module().requires_grad_(False)(q, k, v, **tables))
