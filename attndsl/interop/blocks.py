"""torch's `create_block_mask`, without asking every pair."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from attndsl.axis import Axis
from attndsl.errors import AttnError, Diagnostic
from attndsl.interop.flex import POSITIONS, MaskMod, Unread, called_as, read
from attndsl.interop.reading import getitem_by_index
from attndsl.tiles import lowering
from attndsl.tiles.abstract import EMPTY, FULL, PARTIAL
from attndsl.tiles.blockmask import columns
from attndsl.tiles.kinds import kinds

AT_ONCE = 2**24
"""Pairs that are asked together where a mod is not read."""
Shape: TypeAlias = tuple[int, int, int, int]
"""Batch rows, heads, queries, keys."""


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.types.Device = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
) -> BlockMask:
    """What `torch.nn.attention.flex_attention.create_block_mask` gives of these arguments, in a time that
    grows with the tiles and not with the pairs.

    mask_mod       called once, with symbols, and kept in the result as it is
    B, H           batch rows and heads that it differs for; None is 1
    Q_LEN, KV_LEN  queries and keys
    device         of the lists; torch's accelerator or else the CPU, if not given
    BLOCK_SIZE     tokens on a side of a block, or of queries and of keys
    _compile       nothing is compiled
    separate_full_blocks, compute_dq_write_order, dq_kv_order   as torch has them; torch does what the last
                   two ask for

    A mod that is not read (`from_mask_mod` says why) is asked for every pair, some rows at a time, and a
    warning says so. Raises AttnError for one that torch does not take either.
    """
    if compute_dq_write_order:
        return flex_attention.create_block_mask(
            mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE, False,
            separate_full_blocks, compute_dq_write_order, dq_kv_order,
        )  # fmt: skip
    place = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    size = (BLOCK_SIZE, BLOCK_SIZE) if isinstance(BLOCK_SIZE, int) else (BLOCK_SIZE[0], BLOCK_SIZE[1])
    shape = (B or 1, H or 1, Q_LEN, KV_LEN)
    try:
        found = tiled(mask_mod, shape, size, place)
    except Unread as error:
        said = f"`{called_as(mask_mod)}` is asked for every pair, because it is not read:\n{error}"
        warnings.warn(said, stacklevel=2)
        found = asked(mask_mod, shape, size, place)
    return listed(found, shape, size, mask_mod, place, separate_full_blocks)


class Kinds(NamedTuple):
    """EMPTY, FULL or PARTIAL of the blocks of different masks, int8 [U, rows, columns], and which one a batch
    row and head has, [B or 1, H or 1]."""

    kinds: NDArray[np.int8]
    which: NDArray[Any]


def tiled(mask_mod: MaskMod, shape: Shape, size: tuple[int, int], device: torch.device) -> Kinds:
    """Raises Unread for a mod that is not read, or whose tiles are too many."""
    _, heads, nq, n = shape
    mask = read(mask_mod, None, dict(zip(POSITIONS, shape, strict=True)), str(device), named=False)
    edge = math.gcd(*size)
    if edge % 8:
        raise Unread(Diagnostic(f"blocks of {size[0]} x {size[1]} are no tiles of a multiple of 8"))
    attention = mask.attention(called_as(mask_mod))
    sizes = lowering.sizes(attention, n, nq, heads, q=Axis.starting(nq, (0,)))
    try:
        tables = lowering.checked_tables(attention, mask.given, sizes)
        different, index = lowering.told_apart(attention, sizes, tables)
        found = [
            kinds(case.mask, nq, n, edge, n=case.n, query=case.query, tables=case.tables)
            for case in different
        ]
    except AttnError as error:
        raise Unread(*error.diagnostics) from None
    return Kinds(merged(np.stack(found), size[0] // edge, size[1] // edge), index)


def merged(kinds: NDArray[np.int8], tall: int, wide: int) -> NDArray[np.int8]:
    """Of blocks that are so many tiles tall and wide."""
    if (tall, wide) == (1, 1):
        return kinds
    many, rows, cols = kinds.shape
    padded = np.zeros((many, -(-rows // tall) * tall, -(-cols // wide) * wide), np.int8)
    padded[:, :rows, :cols] = kinds
    tiles = padded.reshape(many, -1, tall, padded.shape[2] // wide, wide)
    live, full = (tiles != EMPTY).any(axis=(2, 4)), (tiles == FULL).all(axis=(2, 4))
    return np.where(full, FULL, np.where(live, PARTIAL, EMPTY)).astype(np.int8)


def asked(mask_mod: MaskMod, shape: Shape, size: tuple[int, int], device: torch.device) -> Kinds:
    """By every pair, some rows of blocks at a time."""
    batch, heads, _, n = shape
    b, h, q, k = (torch.arange(length, device=device) for length in shape)
    mod = mask_mod
    for axis in (3, 2, 1, 0):
        mod = torch.vmap(mod, in_dims=tuple([0 if i == axis else None for i in range(4)]))
    step = max(1, AT_ONCE // (batch * heads * n * size[0])) * size[0]
    found = []
    with getitem_by_index():
        for rows in torch.split(q, step):
            live = mod(b, h, rows, k)
            ends = (0, -n % size[1], 0, -len(rows) % size[0])
            padded = torch.nn.functional.pad(live, ends)
            tiles = padded.reshape(batch, heads, -1, size[0], padded.shape[3] // size[1], size[1])
            found.append(tiles.sum(dim=(3, 5)).cpu().numpy())
    counts = np.concatenate(found, axis=2)
    counts = counts.reshape(batch * heads, *counts.shape[2:])
    kinds = np.where(counts == size[0] * size[1], FULL, np.where(counts > 0, PARTIAL, EMPTY)).astype(np.int8)
    return Kinds(kinds, np.arange(batch * heads).reshape(batch, heads))


def listed(
    found: Kinds, shape: Shape, size: tuple[int, int], mask_mod: MaskMod, device: torch.device, separate: bool
) -> BlockMask:
    """The lists of blocks, by query and by key."""
    lists: dict[str, Any] = {}
    live = found.kinds != EMPTY
    parts = (
        {"": found.kinds == PARTIAL, "full_": found.kinds == FULL} if separate else {"": live, "full_": None}
    )
    for which, blocks in parts.items():
        for side in ("kv", "q"):
            order = blocks if blocks is None or side == "kv" else blocks.swapaxes(1, 2)
            for what, of in (("num_blocks", counted), ("indices", columns)):
                each = None if order is None else of(order).astype(np.int32)[found.which]
                lists[f"{which}{side}_{what}"] = None if each is None else spread(each, shape, device)
    return BlockMask(seq_lengths=shape[2:], BLOCK_SIZE=size, mask_mod=mask_mod, **lists)


def counted(live: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Blocks of each row."""
    return np.asarray(live.sum(-1))


def spread(each: NDArray[np.int32], shape: Shape, device: torch.device) -> Tensor:
    """With a row for all batch rows and heads."""
    return torch.from_numpy(np.array(np.broadcast_to(each, (*shape[:2], *each.shape[2:])), order="C")).to(
        device
    )
