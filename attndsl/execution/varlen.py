"""Sequences one behind the other, as kernels for ragged batches take them: each is attended to alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.errors import fail, quantity
from attndsl.tiles.lowering import ARGUMENTS


def attend(
    run: Callable[..., Any],
    attention: Attention,
    tensors: tuple[Tensor, Tensor, Tensor],
    cu_q: Any,
    cu_k: Any,
    call: Mapping[str, Any],
) -> Any:
    """What `run`, a plan or a module, gives of each sequence, one behind the other; see `Plan.varlen`.

    tensors     q [total, H, D], k [total, Hkv, D] and v [total, Hkv, Dv]
    cu_q, cu_k  where the sequences of queries and of keys begin, and the end; `cu_q` for both if not given
    call        what else `run` takes; of tables with an axis B each sequence has a row
    """
    for name in call:
        if name in ARGUMENTS and name not in ("learned", "return_lse"):
            help = "queries are the last tokens of their sequence, whose keys begin with position 0"
            raise fail(f"sequences one behind the other take no `{name}`", help=help)
    for name, x in zip("qkv", tensors, strict=True):
        if not isinstance(x, Tensor) or x.dim() != 3:
            given = f"{[*x.shape]}" if isinstance(x, Tensor) else type(x).__name__
            raise fail(f"`{name}` is [tokens, heads, features], and was given as {given}")
    q, k, v = tensors
    ends_q = _ends("cu_q", cu_q, len(q))
    ends_k = _ends("cu_q", cu_q, len(k)) if cu_k is None else _ends("cu_k", cu_k, len(k))
    if len(ends_q) != len(ends_k):
        many = quantity(len(ends_q) - 1, "sequence")
        raise fail(f"`cu_q` tells of {many}, and `cu_k` of {len(ends_k) - 1}")
    spans = [*zip(pairwise(ends_q), pairwise(ends_k), strict=True)]
    alike: dict[tuple[int, int], list[int]] = {}
    for row, ((a, b), (c, d)) in enumerate(spans):
        if b > a:
            alike.setdefault((b - a, d - c), []).append(row)
    found: dict[int, tuple[Tensor, ...]] = {}
    for rows in alike.values():
        own = [_stacked(x, [spans[row][side] for row in rows]) for side, x in ((0, q), (1, k), (1, v))]
        results = run(*own, **_of_rows(attention, call, rows))
        results = results if isinstance(results, tuple) else (results,)
        found |= zip(rows, zip(*(x.transpose(1, 2) for x in results), strict=True), strict=True)
    if not found:
        empty = q.new_zeros(0, q.shape[1], v.shape[2])
        return (empty, empty[..., 0]) if call.get("return_lse") else empty
    joined = tuple([torch.cat(parts) for parts in zip(*(found[row] for row in sorted(found)), strict=True)])
    return joined if len(joined) > 1 else joined[0]


def _stacked(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """The sequences, equally long, as [B, heads, length, features]; of one a view."""
    if len(spans) == 1:
        return x[slice(*spans[0])].transpose(0, 1)[None]
    return torch.stack([x[slice(*span)] for span in spans]).transpose(1, 2)


def _ends(name: str, given: Any, total: int) -> list[int]:
    ends = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(ends, list) or not ends or not all(type(x) is int for x in ends):
        raise fail(f"`{name}` is a list of integers: where each sequence begins, and the end of the last")
    if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in pairwise(ends)):
        raise fail(f"`{name}` rises from 0 to {total}, the number of tokens, and was given as {ends}")
    return ends


def _of_rows(attention: Attention, call: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    """The tables of these sequences; a single row is for all."""
    found = dict(call)
    for table in attention.inputs:
        if table.batched and table.name in call:
            x = call[table.name]
            x = x if isinstance(x, Tensor) else np.asarray(x)
            found[table.name] = x[rows] if len(x) > 1 else x
    return found
