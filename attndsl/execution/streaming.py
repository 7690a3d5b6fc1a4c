"""The keys and values of a call's streams, made of those that are given before anything attends to them.

All by torch's own operations, so that what is pooled, projected and learned has its gradients.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.expr import Table
from attndsl.meaning.normals import normals
from attndsl.streams import Pool, Stream, Stretch, memory

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


def keys_and_values(
    attention: Attention, heads: int, k: Tensor, v: Tensor, held: Pair | None, tables: Mapping[str, Tensor]
) -> Pair:
    """Of k [B, Hkv, n, D], v [B, Hkv, n, Dv] and what is `held` in memory, a pair of [B, Hkv, m, D] and
    [B, Hkv, m, Dv], the entries [B, Hkv or H, entries, D and Dv]. Raises AttnError for memory of another
    length, and tables that do not fit."""
    remembered = held and checked_memory(attention, k, v, held)
    made = [made_of(stream, attention, heads, (k, v), remembered, tables) for stream in attention.streams]
    keys, values = zip(*made, strict=True)
    return (keys[0], values[0]) if len(made) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def held_of(attention: Attention, given: object) -> Pair | None:
    """What is given as memory. Raises AttnError where it is no pair, missing, or for none."""
    length = memory(attention.streams)
    if given is None and length:
        help = f"give `memory=(keys, values)`, the {length:,} before the first token, the oldest first"
        raise fail(f"`{attention.name}` needs its memory", help=help)
    if given is None:
        return None
    if not length:
        raise fail(f"`{attention.name}` has no memory", help="write `keys mem(m) ++ tokens`")
    if not isinstance(given, tuple | list) or [isinstance(x, Tensor) for x in given] != [True, True]:
        raise fail("`memory` is a pair of tensors, keys and values")
    k, v = given
    return k, v


def held_of_parts(attention: Attention, given: object) -> dict[str, Any]:
    """Of a sum what its parts are given as memory, by name: pairs of their own, or the last keys and values
    of one pair, which is as long as the longest. Raises AttnError for parts that have none."""
    lengths = {p.attention.name: p.attention.held for p in attention.parts if p.attention.held}
    if given is None:
        return {}
    if not lengths:
        raise fail(f"`{attention.name}` has no part with memory", help="write `keys mem(m) ++ tokens` in one")
    if isinstance(given, Mapping):
        for name in given:
            if name not in lengths:
                listed = ", ".join(f"`{part}`" for part in lengths)
                raise fail(f"`{attention.name}` has no part `{name}` with memory", help=f"there is {listed}")
        return dict(given)
    pair = given if isinstance(given, tuple | list) else ()
    if not (pair and all(isinstance(x, Tensor) and x.dim() == 4 for x in pair)):
        return dict.fromkeys(lengths, given)
    most = max(lengths.values())
    return {
        name: [x[:, :, most - length :] if x.shape[2] == most else x for x in pair]
        for name, length in lengths.items()
    }


def checked_memory(attention: Attention, k: Tensor, v: Tensor, held: Pair) -> Pair:
    """What is held, if it is memory of such keys and values. Raises AttnError."""
    length = memory(attention.streams)
    for name, x, beside in (("keys", held[0], k), ("values", held[1], v)):
        wanted = [*beside.shape[:2], length, beside.shape[3]]
        if x.dim() == 4 and x.shape[2] != length:
            raise fail(
                f"`memory` has {name} of {x.shape[2]:,} tokens, and `{attention.name}` has {length:,}",
                help="where fewer are held, put zeros before them and leave these out by `mask`",
            )
        if [*x.shape] != wanted:
            raise fail(f"the {name} of `memory` are {[*x.shape]}, and must be {wanted}")
        if x.dtype != beside.dtype or x.device != beside.device:
            here, there = (f"{str(t.dtype).removeprefix('torch.')} on {t.device}" for t in (x, beside))
            raise fail(f"the {name} of `memory` are {here}, and the {name} of the call {there}")
    return held


def made_of(
    stream: Stream,
    attention: Attention,
    heads: int,
    given: Pair,
    held: Pair | None,
    tables: Mapping[str, Tensor],
) -> Pair:
    """The keys and values of one stream, of those that are given and held: for each of the `heads` where some
    stream is made so, else for each key head."""
    keys, values = _made(stream, attention, heads, given, held, tables)
    return (_repeated(keys, heads), _repeated(values, heads)) if attention.made_by_head else (keys, values)


def _made(
    stream: Stream,
    attention: Attention,
    heads: int,
    given: Pair,
    held: Pair | None,
    tables: Mapping[str, Tensor],
) -> Pair:
    """Of each key head, or of each of the `heads`."""
    if isinstance(stream, Stretch):
        return _of(stream, attention, given, held)
    if isinstance(stream, Pool):
        k, v = _of(stream.of, attention, given, held)
        return _pooled(k, stream, stream.by, heads, tables), _pooled(v, stream, stream.values, heads, tables)
    k, v = given
    return _projected(k, stream.keys, heads, tables), _projected(v, stream.values, heads, tables)


def _of(stretch: Stretch, attention: Attention, given: Pair, held: Pair | None) -> Pair:
    if stretch.length is None:
        return given
    assert held is not None
    start = stretch.first + memory(attention.streams)
    k, v = (x[:, :, start : start + stretch.length] for x in held)
    return k, v


def _pooled(x: Tensor, pool: Pool, by: str | Table, heads: int, tables: Mapping[str, Tensor]) -> Tensor:
    if x.shape[2] < pool.size:
        return x[:, :, :0]
    if isinstance(by, Table) and "H" in by.dims:
        x = _repeated(x, heads)
    if by == "mean" and pool.stride < pool.size and pool.size % pool.stride == 0:
        # of what overlaps every number is read once, and its gradient is not added up number by number
        pieces = _windows(x, replace(pool, size=pool.stride))
        sums = pieces.sum(3, dtype=torch.promote_types(x.dtype, torch.float32))
        return (sums.unfold(2, pool.size // pool.stride, 1).sum(4) / pool.size).to(x.dtype)
    windows = _windows(x, pool)
    if not isinstance(by, Table):
        return windows.mean(3) if by == "mean" else windows.amax(3)
    w = _content(by, x, heads, tables)
    if w.shape[-1] != x.shape[3] and len(by.explicit) > 1:
        raise fail(f"`{by.name}` is of {w.shape[-1]} features, and there are {x.shape[3]}")
    wide = torch.promote_types(x.dtype, w.dtype)
    windows, w = windows.to(wide), w.to(wide)
    if len(by.explicit) == 3:
        lead = "".join(axis.lower() for axis in "BH" if axis in by.dims)
        return torch.einsum(f"bhmic,{lead}icd->bhmd", windows, w).to(x.dtype)
    for place, axis in enumerate("BH"):
        w = w if axis in by.dims else w.unsqueeze(place)
    # einsum would make a product of matrices for each feature, in ten times the time
    w = w.unsqueeze(2) if len(by.explicit) == 2 else w[:, :, None, :, None]
    return (windows * w).sum(3).to(x.dtype)


def _windows(x: Tensor, pool: Pool) -> Tensor:
    """What slots are made of [B, H, m, b, D], a view."""
    if pool.stride < pool.size:
        return x.unfold(2, pool.size, pool.stride).mT
    # the gradient of what overlaps is added up, which takes longer
    whole = x.shape[2] // pool.size
    return x[:, :, : whole * pool.size].view(*x.shape[:2], whole, pool.size, x.shape[3])


def _projected(x: Tensor, table: Table, heads: int, tables: Mapping[str, Tensor]) -> Tensor:
    e, n = _content(table, x, heads, tables), x.shape[2]
    if e.shape[-1] < n or (e.shape[-1] != n and table.dims[-1] == "n" and not table.learned):
        raise fail(
            f"`{table.name}` projects {e.shape[-1]:,} tokens, and there are {n:,}",
            help=f"give it as [{table.explicit[0]}, {n}]" if table.dims[-1] == "n" else "",
        )
    wide = torch.promote_types(x.dtype, e.dtype)
    # a slice of all has gradients that are copied
    e = e if e.shape[-1] == n else e[..., :n]
    form = "b" * ("B" in table.dims)
    if "H" not in table.dims:
        return torch.einsum(f"{form}mn,bhnd->bhmd", e.to(wide), x.to(wide)).to(x.dtype)
    # by key head, and the heads that share it
    e = e.view(*e.shape[:-3], x.shape[1], heads // x.shape[1], *e.shape[-2:])
    return torch.einsum(f"{form}hsmn,bhnd->bhsmd", e.to(wide), x.to(wide)).flatten(1, 2).to(x.dtype)


def _content(table: Table, x: Tensor, heads: int, tables: Mapping[str, Tensor]) -> Tensor:
    """Raises AttnError where it is given with other axes."""
    if table.known is not None:
        return torch.from_numpy(table.known).to(x)
    found = tables[table.name]
    if found.dim() != len(table.dims):
        shape, axes = ", ".join(map(str, table.dims)), [*found.shape]
        raise fail(f"`{table.name}` is float[{shape}], and was given as {axes}")
    sizes = {"B": x.shape[0], "H": heads}
    for axis, size in zip(table.dims, found.shape, strict=True):
        wanted = axis if isinstance(axis, int) else sizes.get(axis, size)
        if size != wanted:
            which = f"an axis of {axis}" if isinstance(axis, int) else f"its axis `{axis}`, which is {wanted}"
            raise fail(f"`{table.name}` has {size} entries on {which}")
    return found


def begun(attention: Attention, table: Table, shape: list[int]) -> Tensor | None:
    """The first value of what makes keys: of a pool its mean, of a projection normal numbers of the variance
    1 / n, equal for equal names, for of equal rows the slopes would be equal for ever. None for others."""
    for stream in attention.streams:
        if table in stream.tables and isinstance(stream, Pool):
            mean = torch.tensor(1 / stream.size, dtype=torch.float64)
            return (
                (mean if len(table.explicit) < 3 else mean * torch.eye(shape[-1], dtype=mean.dtype))
                .expand(shape)
                .clone()
            )
        if table in stream.tables:
            numbers = normals(zlib.crc32(table.name.encode()), *shape) / math.sqrt(shape[-1])
            return torch.from_numpy(numbers)
    return None
