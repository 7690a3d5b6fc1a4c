"""Few query rows: a call of torch's fused kernel for each run of keys, all batch rows and heads at once.

Keys and values are views of the caller's. Query heads that share a key head are rows of one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.attention import Attention
from attndsl.backend import Call
from attndsl.execution.torch_eval import Env, environment, evaluate, fused_rows, strained
from attndsl.expr import Expr
from attndsl.tiles.blockmask import BlockMask, Rows, Run
from attndsl.tiles.lowering import head_groups

from .lanes import Simple
from .work import closing, flash, without_weights

SHORT, FEW = 256, 2
"""Keys of a run below which it is short; more than so many short ones are gathered."""
ALL = slice(None)


class Piece(NamedTuple):
    """Batch rows and heads with one mask and one group of the attention, and the key heads that they read."""

    group: int
    rows: Rows
    batch: slice
    heads: slice
    kv_heads: slice


def pieces(attention: Attention, blocks: BlockMask, heads: int, kv_heads: int) -> list[Piece]:
    """Every query head once; none for a mask that is not known by rows."""
    masks = blocks.rows or ()
    if masks and blocks.index.size == len(attention.groups) == 1:
        return [Piece(0, masks[0], ALL, ALL, ALL)]
    groups, share, found = head_groups(attention, heads), heads // kv_heads, []
    for b, row in enumerate(blocks.index.tolist() if masks else ()):
        kinds = [(groups[h], row[h % len(row)]) for h in range(heads)]
        edges = {h for h in range(1, heads) if kinds[h] != kinds[h - 1]}
        if any(h % share for h in edges):
            edges |= set(range(share, heads, share))
        batch = slice(b, b + 1) if len(blocks.index) > 1 else ALL
        for start, stop in pairwise([0, *sorted(edges), heads]):
            group, which = kinds[start]
            kv_heads_here = slice(start // share, -(-stop // share))
            found.append(Piece(group, masks[which], batch, slice(start, stop), kv_heads_here))
    return found


def attend(attention: Attention, simple: Sequence[Simple], call: Call) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp, `simple` being the groups' scores; None for a call that is not for this, or
    whose runs do not merge well."""
    q, v = call.q, call.v
    batch, heads, _, width = q.shape
    if not batch or v.shape[3] != width or not q.is_cpu:
        return None
    here = pieces(attention, call.block_mask, heads, v.shape[1])
    sinks = [group.norm.sink for group in attention.groups]
    needed = any(sinks[p.group] is not None or simple[p.group].bias is not None for p in here)
    # once for all pieces: it has the positions of every batch row
    env = environment(call) if needed else None
    found = [_attended(p, sinks[p.group], simple[p.group], call, env) for p in here]
    if not found or any(merged and strained(lse) for _, lse, merged in found):
        return None
    out, lse, _ = found[0]
    if len(found) > 1:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = out.new_empty(q.shape, dtype=wide), lse.new_empty(q.shape[:3])
        for piece, (o, total, _) in zip(here, found, strict=True):
            out[piece.batch, piece.heads], lse[piece.batch, piece.heads] = o, total
    return out, lse


def _attended(
    piece: Piece, sink: Expr | None, simple: Simple, call: Call, env: Env | None
) -> tuple[Tensor, Tensor, bool]:
    """Output, log-sum-exp, and whether anything has been merged."""
    q, k, v = call.q, call.k, call.v
    if piece.heads is not ALL:
        q, k, v = q[piece.batch, piece.heads], *(x[piece.batch, piece.kv_heads] for x in (k, v))
    (batch, heads, nq, width), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    share, merged, masked = heads // k.shape[1], False, False
    stacked = q if share == 1 else q.reshape(batch, -1, share * nq, width)
    stacked, k, v = (fused_rows(x, width) for x in (stacked, k, v))
    env = None if env is None else _of_piece(env, piece)
    out = lse = None
    for keys, mask in reads(piece.rows):
        addend = dead = None
        if mask is not None or simple.bias is not None:
            addend, dead = closing(mask, _bias(simple.bias, env, keys, mask, nq, wide))
        some = [_taken(x, keys) for x in (k, v)]
        folded = None if addend is None else _folded(addend, share)
        o, more = flash(stacked, *some, attn_mask=folded, scale=simple.scale)
        if share > 1:
            o, more = o.reshape(q.shape), more.reshape(q.shape[:3])
        if dead is not None:
            more, masked = more.masked_fill(dead, -torch.inf), True
        told = without_weights(more, stacked, some[0], folded, simple.scale)
        more, masked = told, masked or told is not more
        if out is None or lse is None:
            out, lse = o, more
        else:
            both, part = torch.logaddexp(lse, more), (more - lse).sigmoid_()
            if masked:
                part = part.masked_fill(both == -torch.inf, 0.0)
            out, lse, merged = out.to(wide).lerp(o.to(wide), part.unsqueeze(-1)), both, True
    if out is None or lse is None:
        out, lse = q.new_zeros(q.shape, dtype=wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    if sink is None or env is None:
        return out, lse, merged
    out, more = out.to(wide), evaluate(sink, env).to(wide).expand(*lse.shape[:2], 1, 1)[..., 0]
    total = torch.logaddexp(lse, more).masked_fill(lse == -torch.inf, -torch.inf)
    return out * torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))[..., None], total, True


def _taken(x: Tensor, keys: slice | Tensor) -> Tensor:
    if isinstance(keys, slice):
        return x.narrow(2, keys.start, keys.stop - keys.start)
    return x.index_select(2, keys)


def reads(rows: Rows) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Keys, and which of them each row sees, bool [1, nq, keys] or None for all: views of runs, but the keys
    of many short ones together."""
    short = [run for run in rows.runs if run.stop - run.start < SHORT]
    gathered = short if len(short) > FEW else []
    for run in rows.runs:
        if not gathered or run.stop - run.start >= SHORT:
            yield slice(run.start, run.stop), None if run.mask is None else torch.from_numpy(run.mask)[None]
    if gathered:
        keys = np.concatenate([np.arange(run.start, run.stop) for run in gathered])
        mask = None
        if any(run.mask is not None for run in gathered):
            live = np.concatenate([_live(run, len(rows.spans)) for run in gathered], axis=1)
            mask = torch.from_numpy(live)[None]
        yield torch.from_numpy(keys), mask


def _live(run: Run, nq: int) -> NDArray[np.bool_]:
    return np.ones((nq, run.stop - run.start), bool) if run.mask is None else run.mask


def _of_piece(env: Env, piece: Piece) -> Env:
    """Of the piece: axes [B, H, nq, n]."""
    values = {name: x[piece.batch] if x.dim() and len(x) > 1 else x for name, x in env.values.items()}
    return replace(env, values={**values, "h": env.values["h"][:, piece.heads]})


def _bias(
    bias: Expr | None, env: Env | None, keys: slice | Tensor, mask: Tensor | None, nq: int, wide: torch.dtype
) -> Tensor:
    """[B or 1, H or 1, nq, keys], or 0 if there is none."""
    if bias is None or env is None:
        return torch.zeros((), dtype=wide)
    here = env.values["k"][..., keys]
    value = evaluate(bias, replace(env, values={**env.values, "k": here}), mask).to(wide)
    lead = value.shape[:2] if value.dim() == 4 else (1, 1)
    return value.expand(*lead, nq, here.shape[3])


def _folded(x: Tensor, share: int) -> Tensor:
    """[B, H or 1, nq, K] -> [B, H / share or 1, share * nq, K]"""
    batch, heads, nq, keys = x.shape
    if share == 1 or heads == nq == 1:
        return x
    return x.expand(-1, max(heads, share), -1, -1).reshape(batch, -1, share * nq, keys)
