"""The `flex` backend: torch's FlexAttention, given tiles and a score_mod.

On a GPU it is compiled, one kernel for each score. On the CPU it is not, and forms all pairs: what it
compiles there gives no log-sum-exp, which a kernel owes, and takes no float64.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.backend import Call, Kernel, Problem, device_kind, predicted
from attndsl.emit.flex import score_over
from attndsl.execution.flexing import score_mod_of
from attndsl.execution.torch_eval import FEATURES, widened
from attndsl.expr import Expr
from attndsl.tiles.blockmask import BlockMask

if TYPE_CHECKING:
    from torch.nn.attention import flex_attention

SECONDS = {"cpu": {"calls": 0.012, "pairs": 1.5e-8}}
"""Measured beside `reference`, whose own are of two cores; what torch traces at a first call is not in it."""
TRAINING = 4.5
"""Forward and backward beside forward: 7 matrix products more to 2, for both passes form the scores."""
LEAST_WIDTH = 16
"""Features that its compiled kernels take."""
TILE = 128
"""Tokens on a side of a tile that all its kernels divide."""
LISTS = 5
"""Numbers of each tile, live or not: a code, and places in lists by rows and by columns."""
GRAPHS = 64
"""Of calls with one score, as many heads and features, and one dtype; torch's own limit is 8."""

Attend = Callable[..., tuple[Tensor, Any]]


class Flex:
    """Registered as `flex`."""

    # of a query, a key or a distance alone any operation is evaluated; which of a pair are, `supports` says
    features = replace(FEATURES, clauses={"score", "heads"})
    seconds = SECONDS
    remark = "forms all pairs on the CPU, and has not run on a GPU yet"

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        for adjacent in (True, False):
            if isinstance(score := score_over(attention, problem.head_dim, adjacent), str):
                return score
        if device_kind(problem) == "cpu":
            return "FlexAttention has no gradients on the CPU" if problem.training else None
        if problem.dtype == "float64":
            return "compiled FlexAttention takes no float64"
        if problem.head_dim < LEAST_WIDTH:
            return f"compiled FlexAttention takes {LEAST_WIDTH} features or more"
        if problem.block_size % TILE:
            return f"compiled FlexAttention takes tiles of a multiple of {TILE} tokens"
        return None

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        return predicted(SECONDS, self.counts(attention, problem, block_mask), problem, TRAINING)

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> dict[str, float]:
        """On the CPU all pairs; else those of tiles, and what is written of every tile."""
        p = problem
        area, lists = float(p.q_length * p.length), 0.0
        if device_kind(p) != "cpu":
            tiles = area / p.block_size**2
            if block_mask is not None:
                full, partial, empty, _ = block_mask.tiles
                tiles = float(full + partial + empty)
                area = p.block_size**2 * (full + partial) / block_mask.index.size
            lists = LISTS * tiles
        pairs = p.batch * p.heads * area
        return {"calls": 1.0, "pairs": pairs, "written": lists or pairs}

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        return Handed(attention)


@dataclass(frozen=True, eq=False)
class Handed:
    """The kernel of one attention."""

    attention: Attention
    masks: WeakKeyDictionary[BlockMask, flex_attention.BlockMask] = field(default_factory=WeakKeyDictionary)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        q, k, v = call.q, call.k, call.v
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        if not (q.numel() and k.numel()):
            return q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        score = score_over(self.attention, q.shape[3], call.adjacent)
        assert isinstance(score, Expr)
        if q.device.type == "cpu":
            call = widened(call)
        out, lse = self.run(call, score)
        lost = lse == -torch.inf
        if lost.any() and (lost := lost & ~empty_rows(call)).any():
            # to FlexAttention, which counts in powers of 2, a score near the least number is -inf; its half
            # is not, and tells the keys of such a row apart as well
            again, half = self.run(call, ir.mul(ir.const(0.5), score))
            lost &= half > -torch.inf
            double = (2 * half).clamp(min=torch.finfo(half.dtype).min)
            out, lse = torch.where(lost[..., None], again, out), torch.where(lost, double, lse)
        return out.to(dtype), lse.to(wide)

    def run(self, call: Call, score: Expr) -> tuple[Tensor, Tensor]:
        score_mod = score_mod_of(self.attention, call, score)
        vectors = [call.q, call.k, call.v]
        if not torch.is_grad_enabled():
            # of tensors that ask for gradients it would make a kernel that keeps more, and on the CPU none
            vectors = [x.detach() for x in vectors]
        alike = (score_mod and score_mod.__code__, *(x.shape[1::2] for x in vectors), call.q.dtype)
        # beyond the limit it is an error, for torch would take the dense formula without a word
        with _as_in_a_plain_call(), torch._dynamo.config.patch(recompile_limit=GRAPHS):
            out, aux = _attend(call.q.device.type, alike)(*vectors, score_mod, self.tiles(call))
        return out, aux.lse

    def tiles(self, call: Call) -> flex_attention.BlockMask:
        blocks = call.block_mask
        known = self.masks.get(blocks)
        if known is None:
            known = self.masks[blocks] = blocks.to_flex(str(call.q.device))
        return known


def empty_rows(call: Call) -> Tensor:
    """Whether a query has no keys [B or 1, H or 1, nq]."""
    return torch.from_numpy(call.block_mask.empty_rows()).to(call.q.device)


def _as_in_a_plain_call() -> AbstractContextManager[object]:
    """Below the dispatcher, where graphs call operators, torch knows of no vmap and traces nothing."""
    return torch._C._ForceDispatchKeyGuard(*_untouched())


@lru_cache(maxsize=1)
def _untouched() -> tuple[torch._C.DispatchKeySet, torch._C.DispatchKeySet]:
    """The keys that the dispatcher includes and excludes where nothing says otherwise: in a new thread."""
    with ThreadPoolExecutor(1) as thread:
        sets = (torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set)
        include, exclude = (thread.submit(get).result() for get in sets)
    return include, exclude


TEXT = """
from torch.nn.attention.flex_attention import AuxRequest, flex_attention


def attend(q, k, v, score_mod, block_mask):
    more = {"enable_gqa": q.shape[1] != k.shape[1], "return_aux": AuxRequest(lse=True)}
    return flex_attention(q, k, v, score_mod, block_mask, **more)
"""


@lru_cache(maxsize=256)
def _attend(device: str, alike: object) -> Attend:
    """A function of its own for calls that are `alike`: torch limits the graphs of each function, whoever
    calls it."""
    space: dict[str, Any] = {}
    exec(TEXT, space)
    return torch.compile(space["attend"], backend="eager" if device == "cpu" else "inductor", fullgraph=True)


backend = Flex()
