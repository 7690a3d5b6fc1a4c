"""The kernel of one attention: what the library is called with."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.backend import Call, Gradients
from attndsl.tiles.blockmask import TileGrid

from .layout import Layout, Layouts

PIECES = 8
"""Tasks of a backward pass at least, whatever the number of threads, so that sums have one order."""
LANES = 16
FAR = 32.0
"""Beyond this a log-sum-exp in float32 moves weights by more than two roundings of their own."""


class _Grid(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("first", "start", "end", "words", "masks")]


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "grids", "index")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "nq", "n", "d", "dv")),
        *((name, ctypes.c_int64 * 3) for name in ("qs", "ks", "vs")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("top", "sum", "grad_out", "delta", "gq", "gk", "gv")),
        *((name, ctypes.c_int64) for name in ("pieces", "dp", "dvp")),
    ]


@dataclass(frozen=True, eq=False)
class Compiled:
    """softmax(Q @ K * scale) over the tiles, in float32."""

    library: ctypes.CDLL
    scale: float
    layouts: Layouts = field(default_factory=Layouts)

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        q, v = call.q, call.v
        out, lse = q.new_zeros((*q.shape[:3], v.shape[3])), q.new_full(q.shape[:3], -torch.inf)
        if out.numel() and v.shape[2]:
            self._run("forward", call, {"out": out, "lse": lse})
        return out, lse

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        (batch, _, _, d), (_, kv_heads, n, dv) = call.q.shape, call.v.shape
        gq = torch.zeros_like(call.q, memory_format=torch.contiguous_format)
        if not gq.numel() or not n:
            return gq, torch.zeros_like(call.k), torch.zeros_like(call.v), {}
        delta = (grad_out * out).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse.masked_fill(lse == -torch.inf, 0.0)
        if _far(lse):
            # beside its greatest logit the log-sum-exp of a row has lost what tells weights apart
            top, total, again = (lse.new_empty(lse.shape) for _ in range(3))
            unread = {"out": out.new_empty(out.shape), "lse": again}
            self._run("forward", call, {"top": top, "sum": total, **unread})
        else:
            top, total = lse / math.log(2), lse.new_ones(lse.shape)
        pieces = -(-PIECES // (batch * kv_heads))
        gk, gv = (call.k.new_zeros((batch, kv_heads, pieces, n, -(-w // LANES) * LANES)) for w in (d, dv))
        rows = {"top": top, "sum": total, "delta": delta, "grad_out": grad_out}
        rows = {name: x.contiguous() for name, x in rows.items()}
        sizes = {"pieces": pieces, "dp": gk.shape[4], "dvp": gv.shape[4]}
        self._run("backward", call, {**rows, "gq": gq, "gk": gk, "gv": gv}, **sizes)
        gk, gv = (x[:, :, 0] if pieces == 1 else x.sum(2) for x in (gk, gv))
        return gq, gk[..., :d].mul_(self.scale), gv[..., :dv], {}

    def _run(self, name: str, call: Call, tensors: Mapping[str, Tensor], **sizes: int) -> None:
        """A function of the library; beside q, k and v all tensors are contiguous."""
        q, k, v = (
            x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (call.q, call.k, call.v)
        )
        blocks, (batch, heads) = call.block_mask, q.shape[:2]
        layouts = [self._layout(grid) for grid in blocks.grids]
        grids = (_Grid * len(layouts))(
            *(_Grid(*(x.ctypes.data for x in (y.first, y.start, y.end, y.words, y.masks))) for y in layouts)
        )
        index = np.ascontiguousarray(
            np.broadcast_to(_over_heads(blocks.index, heads), (batch, heads)), np.int32
        )
        pointers = {"q": q, "k": k, "v": v, **tensors}
        asked = _Call(
            grids=ctypes.cast(grids, ctypes.c_void_p),
            index=index.ctypes.data,
            batch=batch, heads=heads, kv_heads=k.shape[1],
            nq=q.shape[2], n=k.shape[2], d=q.shape[3], dv=v.shape[3],
            scale=self.scale,
            threads=torch.get_num_threads(),
            **{name: x.data_ptr() for name, x in pointers.items()},
            **sizes,
        )  # fmt: skip
        for side, x in (("qs", q), ("ks", k), ("vs", v)):
            setattr(asked, side, (ctypes.c_int64 * 3)(*x.stride()[:3]))
        if getattr(self.library, name)(ctypes.byref(asked)):
            raise MemoryError(f"the {name} pass found no room for a block of queries")

    def _layout(self, grid: TileGrid) -> Layout:
        found = self.layouts.get(grid)
        if found is None:
            found = self.layouts[grid] = Layout.of(grid)
        return found


def _far(lse: Tensor) -> bool:
    """Whether the log-sum-exp of some row has lost digits that its weights need."""
    return bool(((lse.abs() > FAR) & (lse > -torch.inf)).any())


def _over_heads(index: NDArray[np.int32], heads: int) -> NDArray[np.int32]:
    """index [B or 1, H'] of head h mod H'."""
    return index[:, np.arange(heads) % index.shape[1]]
