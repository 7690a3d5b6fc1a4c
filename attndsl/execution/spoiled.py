"""Numbers that are not finite: a pair outside the relation touches nothing, one inside it is not hidden.

A kernel multiplies whole tiles, where a weight of 0 times NaN is NaN. So what is not finite is computed
again: keys and values that no pair reads, and what is not finite, are 0 in the second pass, and the results
that read the latter are made NaN. Where all is finite this costs one sum over the results.

Where nobody is to look (`Lowered.looks`) keys and values that no pair reads are 0 in the one pass there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from attndsl.backend import Call, Gradients
from attndsl.expr import Table
from attndsl.tiles import queries
from attndsl.tiles.blockmask import BlockMask, TileGrid

Results = tuple[Tensor, Tensor]
Slopes = tuple[Tensor, "Tensor | None"]


def finite(tensors: Iterable[Tensor]) -> bool:
    """False where one holds NaN or an infinity; also for sums beyond float32, which costs a second look."""
    return all(
        math.isfinite(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).item()) for x in tensors
    )


def cleared(call: Call) -> Call:
    """The call with 0 in place of keys and values that no pair reads, which may hold anything: by the mask
    alone, without a look at them."""
    (heads, kv_heads), blocks = (call.q.shape[1], call.k.shape[1]), call.block_mask
    known = _known_read.setdefault(blocks, {})
    key = heads, kv_heads, call.k.device
    if key not in known:
        found = queries.keys_read(blocks)
        of_heads = found[:, np.arange(heads) % found.shape[1]]
        read = np.any(of_heads.reshape(len(found), kv_heads, -1, found.shape[2], 1), axis=2)
        known[key] = None if read.all() else torch.from_numpy(read).to(call.k.device)
    mask = known[key]
    if mask is None:
        return call
    return replace(call, k=torch.where(mask, call.k, 0.0), v=torch.where(mask, call.v, 0.0))


_known_read: WeakKeyDictionary[BlockMask, dict[tuple[int, int, torch.device], Tensor | None]] = (
    WeakKeyDictionary()
)


def forward(call: Call, run: Callable[[Call], Results]) -> Results:
    """What `run` gives, where that is finite. Else a row that reads a key with NaN or an infinity, or has
    such a query, is NaN as a whole; one that reads such a value in the features concerned, where infinities
    of one sign stay so."""
    out, lse = run(call)
    if finite([out]):
        return out, lse
    sound = _sound(call)
    if all(bool(where.all()) for where in sound):
        return out, lse
    kept, first = _whole(out) & ~lse.isnan(), (out, lse)
    out, lse = run(_without(call, sound))
    lost = _rows(call, ~_whole(call.k)) | (~_whole(call.q) & _live(call))
    out, lse = out.masked_fill(lost[..., None], torch.nan), lse.masked_fill(lost, torch.nan)
    for value in (torch.inf, -torch.inf, torch.nan):
        there = call.v.isnan() if math.isnan(value) else call.v == value
        keys, which = torch.unique(there.flatten(0, 2), dim=1, return_inverse=True)
        for i in keys.any(0).nonzero().flatten().tolist():
            rows = _rows(call, keys[:, i].view(call.v.shape[:3]))
            out[..., which == i] += torch.where(rows, value, 0.0)[..., None]
    # a row that is finite has met nothing that is not: it does not depend on what is in the others
    return torch.where(kept[..., None], first[0], out), torch.where(kept, first[1], lse)


def gradient(
    call: Call,
    axes: Mapping[str, Table],
    results: Results,
    slopes: Slopes,
    run: Callable[[Call], Results],
    pull: Callable[[Call, Results, Slopes], Gradients],
) -> Gradients:
    """What `pull` gives; NaN for the query of a row that is not finite, and for the keys, the values and the
    entries of tables that it reads."""
    grads = pull(call, results, slopes)
    if finite([*grads[:3], *grads[3].values()]):
        return grads
    (out, lse), (grad_out, grad_lse) = results, slopes
    cleaned = replace(_without(call, _sound(call)), tables=_readable(call.tables, axes))
    again, live = run(cleaned), _live(call)
    # where the weights of a row are lost or are now others, where its output is, and what comes back
    weights = ~(lse < torch.inf) | ~torch.isclose(again[1], lse, rtol=1e-3, atol=1e-3)
    values, back = ~_whole(out), ~_whole(grad_out)
    if grad_lse is not None:
        back = back | ~grad_lse.isfinite()
    blind = (weights | back) & live
    lost = blind | (values & live)

    def without(rows: Tensor) -> Gradients:
        zero = rows | ~live
        some = grad_out.masked_fill(zero[..., None], 0.0)
        return pull(cleaned, again, (some, None if grad_lse is None else grad_lse.masked_fill(zero, 0.0)))

    gq, gk, gv, tables = without(lost)
    if (values & live & ~blind).any():
        gv = without(blind)[2]
    gq = gq.masked_fill(lost[..., None], torch.nan)
    gk = gk.masked_fill(_keys(call, lost)[..., None], torch.nan)
    gv = gv.masked_fill(_keys(call, blind)[..., None], torch.nan)
    if tables and lost.any():
        read = _entries(cleaned, lost, run, pull)
        tables = {name: grad.masked_fill(read[name], torch.nan) for name, grad in tables.items()}
    return gq, gk, gv, tables


def _entries(
    call: Call,
    lost: Tensor,
    run: Callable[[Call], Results],
    pull: Callable[[Call, Results, Slopes], Gradients],
) -> dict[str, Tensor]:
    """Which entries of tables the rows [B, H, nq] read: those that have a gradient when anything comes back
    from these rows, for logits of either sign, in the middle of their range or at its ends."""
    some = torch.Generator().manual_seed(0)
    shapes = call.q.shape, (*lost.shape, call.v.shape[3]), lost.shape
    q, out, lse = (torch.randn(shape, generator=some).to(call.q.device) for shape in shapes)
    found: dict[str, Tensor] = {}
    for scale in (1, -1, 4, -4):
        other = replace(call, q=torch.where(lost[..., None], (scale * q).to(call.q), call.q))
        results = run(other)
        slopes = out.to(call.q).masked_fill(~lost[..., None], 0.0), lse.to(results[1]).masked_fill(~lost, 0.0)
        for name, grad in pull(other, results, slopes)[3].items():
            found[name] = found.get(name, torch.zeros_like(grad, dtype=torch.bool)) | (grad != 0)
    return found


def _sound(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [..., 1] that are finite as a whole, numbers in values that are; of keys and values
    those that some pair reads."""
    read = _keys(call, torch.ones(call.q.shape[:3], dtype=torch.bool, device=call.q.device))[..., None]
    return _whole(call.q)[..., None], _whole(call.k)[..., None] & read, call.v.isfinite() & read


def _without(call: Call, sound: tuple[Tensor, Tensor, Tensor]) -> Call:
    """The call with 0 in place of what is not sound."""
    q, k, v = (torch.where(where, x, 0.0) for x, where in zip((call.q, call.k, call.v), sound, strict=True))
    return replace(call, q=q, k=k, v=v)


def _readable(tables: Mapping[str, Tensor], axes: Mapping[str, Table]) -> dict[str, Tensor]:
    """The tables with 0 in place of NaN and infinities, but for -inf in a bias, which takes a key out. A row
    that reads another is lost already: the look-ups of a forward pass touch no other."""
    found = dict(tables)
    for name, x in tables.items():
        if x.is_floating_point():
            bad = ~x.isfinite() if axes[name].dims[-1:] == ("D",) else ~(x < torch.inf)
            found[name] = x.masked_fill(bad, 0.0)
    return found


def _whole(x: Tensor) -> Tensor:
    return x.isfinite().all(-1)


def _live(call: Call) -> Tensor:
    """The rows [B, H, nq] that read some key."""
    return _rows(call, torch.ones(call.k.shape[:3], dtype=torch.bool, device=call.k.device))


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
