"""Run as a program: kernels of the backend `cpu` on tensors that end, or begin, at a page that nobody may
touch, with NaN on their other side. A wild access ends the process; NaN that was read shows in results, which
are those on tensors of torch's own, bit by bit."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from cpu_builds import built_with
from torch import Tensor

import attndsl

LIBC = ctypes.CDLL(None, use_errno=True)

SCORES = {
    "plain": "mask causal",
    "distances": "mask last(40) & causal score s + slopes * (q - k)",
    "tables": "mask { q, k : (q + k) mod 3 > 0 } score s + x[q] + y[k] + z[t[q], t[k]]",
    "weights": "mask radius(30) decay exp(-|x[q]|) norm sigmoid",
}
INPUTS = "inputs slopes : float[H] x : float[B, n] y : float[n] t : int[B, n] z : float[H, 4, 4]"
# queries, keys, heads, key heads, width of keys and of values
SIZES = (
    (1, 1, 1, 1, 1, 1),
    (1, 70, 4, 2, 17, 3),
    (3, 33, 4, 1, 64, 16),
    (5, 2051, 2, 2, 8, 33),
    (65, 129, 2, 1, 16, 64),
    (77, 77, 2, 2, 5, 3),
    (66, 130, 1, 1, 48, 17),
)


def placed(shape: Any, dtype: torch.dtype, after: bool) -> Tensor:
    """An empty tensor whose end, or beginning, is that of the pages around which none may be touched."""
    shape = torch.Size(shape)
    size = shape.numel() * dtype.itemsize
    inner = max(1, math.ceil(size / mmap.PAGESIZE)) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inner + 2 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + mmap.PAGESIZE + inner):
        if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=inner, offset=mmap.PAGESIZE)
    # a NaN of each float, and an integer beyond all tables
    whole.fill_(0x7F)
    if dtype.is_floating_point:
        whole.view(dtype).fill_(torch.nan)
    mine = whole[inner - size :] if after else whole[:size]
    return mine.view(dtype).view(shape)


def moved(x: Tensor, after: bool) -> Tensor:
    return placed(x.shape, x.dtype, after).copy_(x)


def guarding(patch: pytest.MonkeyPatch, after: bool) -> None:
    """All that kernels read and write is placed so, but masks."""

    def wrapped(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given, **named: moved(make(*given, **named), after)

    for name in ("new_empty", "new_zeros", "contiguous"):
        patch.setattr(Tensor, name, wrapped(getattr(Tensor, name)))
    for name in ("zeros_like", "empty"):
        patch.setattr(torch, name, wrapped(getattr(torch, name)))


def results(
    plan: Any, operands: list[Tensor], tables: dict[str, Tensor], place: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Output, log-sum-exp and gradients of both, of vectors and of tables."""
    mine = [place(x).requires_grad_() for x in operands]
    given = {name: place(x) for name, x in tables.items()}
    sloped = [x.requires_grad_() for x in given.values() if x.is_floating_point()]
    out, lse = plan(*mine, return_lse=True, **given)
    ends = [out, lse.masked_fill(lse == -torch.inf, 0.0)]
    slopes = [place(torch.ones_like(x)) for x in ends]
    return [out, lse, *torch.autograd.grad(ends, [*mine, *sloped], slopes, allow_unused=True)]


def main(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype)

    for (name, clauses), (nq, n, heads, kv_heads, d, dv) in product(SCORES.items(), SIZES):
        bound = attndsl.parse(f"attention a {{ {INPUTS} {clauses} }}")["a"]
        plan = attndsl.compile(
            bound, length=n, q_length=nq, batch=2, heads=heads, kv_heads=kv_heads, head_dim=d,
            dtype=str(dtype), training=True, backend="cpu",
        )  # fmt: skip
        operands = [drawn(2, heads, nq, d), drawn(2, kv_heads, n, d), drawn(2, kv_heads, n, dv)]
        tables = {
            "slopes": drawn(heads), "x": drawn(2, n), "y": drawn(n), "z": drawn(heads, 4, 4),
            "t": torch.randint(0, 4, (2, n), generator=random),
        }  # fmt: skip
        tables = {table.name: tables[table.name] for table in bound.inputs}
        wanted = results(plan, operands, tables, lambda x: x.clone())
        for after in (True, False):
            sys.stdout.write(f"{name} {nq, n, heads, kv_heads, d, dv} {after}\n")
            sys.stdout.flush()
            with pytest.MonkeyPatch.context() as patch:
                guarding(patch, after)
                found = results(plan, operands, tables, partial(moved, after=after))
            for a, b in zip(found, wanted, strict=True):
                assert (a is None and b is None) or torch.equal(a.nan_to_num(7), b.nan_to_num(7))
                assert a is None or not a.isnan().any()
    sys.stdout.write("all\n")


if __name__ == "__main__":
    with built_with(*sys.argv[2:]):
        main(getattr(torch, sys.argv[1]))
