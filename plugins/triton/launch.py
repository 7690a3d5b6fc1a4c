"""Launches: which programs a kernel has, and what each argument is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.tiles.blockmask import BlockMask

from .configs import Config
from .layout import Layout, Stack

FARTHEST = 2**23
"""Numbers between the rows of a tensor up to which those of a tile are counted in 32 bits."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """The masks of a call on its device.

    arrays  those of a Stack, by name
    grid    int32 [B, H], which mask; -1 for heads of other groups
    heads   int32, those of the group
    """

    lines: int
    arrays: Mapping[str, Tensor]
    grid: Tensor
    heads: Tensor

    @staticmethod
    def of(
        blocks: BlockMask,
        heads: NDArray[np.bool_],
        batch: int,
        tile: Config,
        by_keys: bool,
        device: torch.device,
    ) -> Tiles:
        layouts = [Layout.of(grid, tile.queries, tile.keys) for grid in blocks.grids]
        stack = Stack.of([y.transposed() for y in layouts] if by_keys else layouts)
        index = np.broadcast_to(
            blocks.index[:, np.arange(len(heads)) % blocks.index.shape[1]], (batch, len(heads))
        )
        arrays = {name: on(device, x) for name, x in vars(stack).items() if name != "lines"}
        grid = np.where(heads, index, -1).astype(np.int32)
        return Tiles(
            stack.lines, arrays, on(device, grid), on(device, np.flatnonzero(heads).astype(np.int32))
        )

    def where(self, asked: Tensor) -> Tiles:
        """The same where a truth on the device holds, else lines without tiles."""
        kept = {name: x * asked if name.endswith("ptr") else x for name, x in self.arrays.items()}
        return replace(self, arrays=kept)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"GRID": self.grid, "lines": self.lines, **self.arrays}


KnownTiles = WeakKeyDictionary[BlockMask, dict[tuple[object, ...], Tiles]]


def on(device: torch.device, x: NDArray[Any]) -> Tensor:
    """With an entry at least: kernels take no pointers to nothing."""
    return torch.from_numpy(np.ascontiguousarray(x if x.size else np.zeros(1, x.dtype))).to(device)


@lru_cache(maxsize=64)
def listed(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 [rows, ...], kept where they are: to send them there is to wait for it."""
    with torch.inference_mode(False):
        return on(device, np.array(rows, np.int64))


def addresses(tensors: Sequence[Tensor | None], shape: Sequence[int], device: torch.device) -> Tensor:
    """Of each [..., entries], contiguous, whose leading axes are those of `shape` or 1, where the entries of
    each place begin: int64 [*shape, tensors], 0 where there is no tensor. Nothing is sent to the device."""
    columns = [torch.zeros(tuple(shape), dtype=torch.int64, device=device)]
    for x in tensors:
        if x is None:
            columns.append(columns[0])
        else:
            places = torch.arange(math.prod(x.shape[:-1]), device=device).view(x.shape[:-1])
            columns.append((places * (x.shape[-1] * x.element_size()) + x.data_ptr()).expand(tuple(shape)))
    return torch.stack(columns[1:] or columns, -1)


def strided(x: Tensor) -> Tensor:
    """With features side by side, and rows that are not too far apart."""
    near = x.stride(3) == 1 and x.stride(2) < FARTHEST
    return x if near else x.contiguous()


def run(kernel: Any, programs: Sequence[int], tile: Config, device: torch.device, **arguments: Any) -> None:
    """Starts a kernel over tiles."""
    sizes = {"BM": tile.queries, "BN": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}
    start(kernel, programs, device, **arguments, **sizes)


def start(kernel: Any, programs: Sequence[int], device: torch.device, **arguments: Any) -> None:
    """Nobody waits for it."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # what is multiplied and added may be so in one rounding
        kernel[tuple(programs)](**arguments, enable_fp_fusion=True)
