"""Numbers that are not finite: a pair outside the relation touches nothing, one inside it is not hidden.

A kernel multiplies whole tiles, where a weight of 0 times NaN is NaN. So what is not finite is computed
again: keys and values that no pair reads, and what is not finite, are 0 in the second pass, and the results
that read the latter are made NaN. Where all is finite this costs one sum over the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.backend import Call
from attndsl.expr import Table
from attndsl.tiles import queries
from attndsl.tiles.blockmask import TileGrid

Results = tuple[Tensor, Tensor]
Slopes = tuple[Tensor, "Tensor | None"]
Gradients = tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]
Bool = NDArray[np.bool_]


def finite(tensors: Iterable[Tensor]) -> bool:
    """False where one holds NaN or an infinity; also for sums beyond float32, which costs a second look."""
    return all(
        math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item()) for x in tensors
    )


def forward(call: Call, run: Callable[[Call], Results]) -> Results:
    """What `run` gives. A row that reads a key with NaN or an infinity, or has such a query, is NaN as a
    whole; one that reads such a value in the features concerned, where infinities of one sign stay so."""
    out, lse = run(call)
    if finite([out]):
        return out, lse
    cleaned = clean(call)
    if cleaned is None:
        return out, lse
    out, lse = run(cleaned)
    empty = lse == -torch.inf
    lost = (_rows(call, ~_whole(call.k)) | ~_whole(call.q)) & ~empty
    out, lse = out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    for value in (torch.inf, -torch.inf, torch.nan):
        there = call.v.isnan() if math.isnan(value) else call.v == value
        keys, which = torch.unique(there.flatten(0, 2), dim=1, return_inverse=True)
        for i in keys.any(0).nonzero().flatten().tolist():
            rows = _rows(call, keys[:, i].view(call.v.shape[:3])) & ~empty
            out[..., which == i] += torch.where(rows, value, 0.0)[..., None]
    return out, lse


def gradient(
    call: Call,
    axes: Mapping[str, Table],
    results: Results,
    slopes: Slopes,
    run: Callable[[Call], Results],
    pull: Callable[[Call, Results, Slopes], Gradients],
) -> Gradients:
    """What `pull` gives; NaN for the query of a row that is not finite, for the keys and values that it
    reads, and for the entries of tables that belong to its batch row and head."""
    grads = pull(call, results, slopes)
    if finite([*grads[:3], *grads[3].values()]):
        return grads
    (out, lse), (grad_out, grad_lse) = results, slopes
    empty = lse == -torch.inf
    # where the weights of a row are lost, where its output is, and where what comes back is
    weights, values, back = ~(lse < torch.inf), ~_whole(out), ~_whole(grad_out)
    if grad_lse is not None:
        back = back | ~grad_lse.isfinite()
    lost = (weights | values | back) & ~empty
    cleaned = clean(call) or call
    if cleaned is call and not (lost | back).any():
        return grads

    def without(rows: Tensor) -> Gradients:
        zero = rows | empty
        some = grad_out.masked_fill(zero[..., None], 0.0)
        return pull(cleaned, again, (some, None if grad_lse is None else grad_lse.masked_fill(zero, 0.0)))

    again = run(cleaned)
    blind = (weights | back) & ~empty
    gq, gk, gv, tables = without(lost)
    if (values & ~blind).any():
        gv = without(blind)[2]
    gq = gq.masked_fill(lost[..., None], torch.nan)
    gk = gk.masked_fill(_keys(call, lost)[..., None], torch.nan)
    gv = gv.masked_fill(_keys(call, blind)[..., None], torch.nan)
    return gq, gk, gv, {name: _told(axes[name], grad, lost.any(-1)) for name, grad in tables.items()}


def clean(call: Call) -> Call | None:
    """The call with 0 in place of keys and values that no pair reads, of queries and keys that are not finite
    as a whole, and of numbers in values that are not; None where that changes nothing."""
    read = _keys(call, torch.ones(call.q.shape[:3], dtype=torch.bool, device=call.q.device))[..., None]
    sound = (_whole(call.q)[..., None], _whole(call.k)[..., None] & read, call.v.isfinite() & read)
    if all(bool(where.all()) for where in sound):
        return None
    q, k, v = (torch.where(where, x, 0.0) for x, where in zip((call.q, call.k, call.v), sound, strict=True))
    return replace(call, q=q, k=k, v=v)


def _whole(x: Tensor) -> Tensor:
    return x.isfinite().all(-1)


def _grid(call: Call, batch: int, head: int) -> TileGrid:
    index = call.block_mask.index
    return call.block_mask.grids[int(index[batch % len(index), head % index.shape[1]])]


def _rows(call: Call, keys: Tensor) -> Tensor:
    """The rows [B, H, nq] that read one of the keys [B, Hkv, n]."""
    share = call.q.shape[1] // call.k.shape[1]
    given, found = keys.numpy(force=True), np.zeros(call.q.shape[:3], bool)
    for b, h in np.ndindex(found.shape[:2]):
        found[b, h] = queries.rows_that_read(_grid(call, b, h), given[b, h // share])
    return torch.from_numpy(found).to(keys.device)


def _keys(call: Call, rows: Tensor) -> Tensor:
    """The keys [B, Hkv, n] that one of the rows [B, H, nq] reads."""
    share = call.q.shape[1] // call.k.shape[1]
    given, found = rows.numpy(force=True), np.zeros(call.k.shape[:3], bool)
    for b, h in np.ndindex(given.shape[:2]):
        found[b, h // share] |= queries.keys_read_by(_grid(call, b, h), given[b, h])
    return torch.from_numpy(found).to(rows.device)


def _told(table: Table, grad: Tensor, lost: Tensor) -> Tensor:
    """The gradient of a table with NaN for the batch rows and heads [B, H] that are lost."""
    lost = lost if table.batched else lost.any(0, keepdim=True)
    lost = lost if table.headed else lost.any(1, keepdim=True)
    shape = lost.shape[:1] * table.batched + lost.shape[1:] * table.headed
    return grad.masked_fill(lost.view(*shape, *[1] * (grad.dim() - len(shape))), torch.nan)
