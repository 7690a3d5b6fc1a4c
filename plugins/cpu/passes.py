"""How a pass of the library is called."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.errors import fail
from attndsl.tiles.blockmask import BlockMask

from .build import library
from .layout import Layout

Function = Callable[[bytes], int]

FIELDS = {
    "q k v out lse grids index": "P",
    "batch heads kv_heads nq n d dv": "q",
    "qb qh qn kb kh kn vb vh vn": "q",
    "packed": "d",
    "threads": "q",
    "leaves sizes": "P",
    "origin": "q",
    "wrong sink top sum grad_out delta gq gk gv grads": "P",
    "unit": "d",
    "pieces dp dvp low segments": "q",
    "parts": "P",
    "places step shift q_width k_width": "q",
}
"""Of `struct Call`, in order."""
NAMES = " ".join(FIELDS).split()
PACKING = struct.Struct("".join(kind * len(names.split()) for names, kind in FIELDS.items()))
VECTORS = struct.Struct("5P")
"""Those of the first five."""
NONE = dict.fromkeys(NAMES, 0)


def function(code: str, name: str, defined: tuple[str, ...]) -> Function:
    """As `library`. Raises AttnError where it cannot be compiled."""
    made = library(code, name, defined)
    if isinstance(made, str):
        raise fail(f"the backend `cpu` cannot be compiled: {made}")
    made.argtypes = [ctypes.c_char_p]
    return made  # type: ignore[no-any-return]


def run(made: Function, fields: Mapping[str, int | float]) -> None:
    """Pointers, sizes and numbers by name; what is not named is 0."""
    _run(made, PACKING.pack(*{**NONE, **fields}.values()))


def _run(made: Function, packed: bytes) -> None:
    if made(packed):
        raise MemoryError("there is no room for a block of queries")


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of a call as the library reads them; `index` int32 [B, H], -1 for heads of other groups."""

    layouts: tuple[Layout, ...]
    grids: NDArray[np.uint64]
    index: NDArray[np.int32]

    @staticmethod
    def of(
        layouts: tuple[Layout, ...], index: NDArray[np.int32], batch: int, heads: NDArray[np.bool_]
    ) -> Masks:
        grids = np.array([y.addresses for y in layouts], np.uint64).reshape(-1, 5)
        index = np.broadcast_to(index[:, np.arange(len(heads)) % index.shape[1]], (batch, len(heads)))
        return Masks(layouts, grids, np.ascontiguousarray(np.where(heads, index, -1), np.int32))

    @cached_property
    def fields(self) -> dict[str, int]:
        return {"grids": self.grids.ctypes.data, "index": self.index.ctypes.data}

    @property
    def span(self) -> tuple[int, int]:
        """The first key of any, and one past the last."""
        starts = [int(y.start[0]) for y in self.layouts if len(y.start)]
        return min(starts, default=0), max([int(y.end[-1]) for y in self.layouts if len(y.end)], default=0)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A forward pass of vectors that are yet to come; `rest` is what comes behind their addresses, some of it
    addresses of the masks."""

    made: Function
    masks: Masks
    rest: bytes

    @staticmethod
    def of(made: Function, masks: Masks, fields: Mapping[str, int | float]) -> Prepared:
        return Prepared(made, masks, PACKING.pack(*{**NONE, **fields}.values())[VECTORS.size :])

    def __call__(self, *vectors: Tensor) -> None:
        """q, k, v, out and lse of the sizes and strides that the fields say."""
        _run(self.made, VECTORS.pack(*[x.data_ptr() for x in vectors]) + self.rest)


Known = WeakKeyDictionary[BlockMask, dict[tuple[object, ...], Masks]]


def fields_of(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """Pointers, sizes and strides of vectors of adjacent numbers, and threads."""
    (batch, heads, nq, d), (_, kv_heads, n, dv) = q.shape, v.shape
    (qb, qh, qn, _), (kb, kh, kn, _), (vb, vh, vn, _) = q.stride(), k.stride(), v.stride()
    return {
        "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(),
        "batch": batch, "heads": heads, "kv_heads": kv_heads, "nq": nq, "n": n, "d": d, "dv": dv,
        "qb": qb, "qh": qh, "qn": qn, "kb": kb, "kh": kh, "kn": kn, "vb": vb, "vh": vh, "vn": vn,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
