"""The cases: a mechanism on sizes, offsets and memory layouts that are drawn together, and its tensors."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import attndsl
from attndsl.attention import Attention
from attndsl.bound import Bound
from attndsl.conformance.formula import Inputs
from attndsl.conformance.mechanisms import MECHANISMS, STREAMS, WIDE, Mechanism, normal
from attndsl.expr import Learned, Table

Named = dict[str, Tensor]
Odd = Literal["", "unreached", "q", "k", "v"]
Apart = Literal["", "evicted", "shards"]
LENGTHS, SHORT = (0, 1, 3, 127, 300), (0, 1, 3, 40, 130)


@dataclass(frozen=True)
class Case:
    """One mechanism on one draw.

    q_offset, k_offset   what the call gives, or None
    apart     positions are given instead: of keys some are gone, or they are shards from both ends
    layouts   how q, k, v, grad_out and all tables lie in memory: names in LAYOUTS
    loud      large logits
    with_lse  gradients come in through the log-sum-exp as well
    left_out  none come in through rows that are wholly masked
    odd       where NaN and infinities stand: nowhere, wherever no live pair reaches, or in one live q, k or v
    """

    mechanism: Mechanism
    dtype: str
    nq: int
    n: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    q_offset: tuple[int, ...] | None
    k_offset: tuple[int, ...] | None
    loud: bool
    with_lse: bool
    left_out: bool
    odd: Odd
    block_size: int
    layouts: tuple[str, ...]
    apart: Apart = ""

    def __str__(self) -> str:
        sizes = f"{self.nq}x{self.n}-b{self.batch}h{self.heads}-{self.kv_heads}d{self.head_dim}-{self.v_dim}"
        extras = "-loud" * self.loud + "-lse" * self.with_lse + "-left-out" * self.left_out
        extras += f"-odd.{self.odd}" if self.odd else ""
        extras += f"-at{self.q_offset}" if self.q_offset else ""
        extras += f"-from{self.k_offset}" if self.k_offset else ""
        extras += f"-{self.apart}" if self.apart else ""
        extras += f"-memory{self.mechanism.memory}" if self.mechanism.memory else ""
        laid = "".join(f"-{x}.{lay}" for x, lay in zip(LAID, self.layouts, strict=True) if lay != "plain")
        return f"{self.mechanism.name}-{self.dtype}-{sizes}{extras}-B{self.block_size}{laid}"

    @property
    def longest(self) -> int:
        """The greatest n of a batch row."""
        return max(self.k_offset or (0,)) + self.tokens + (AWAY if self.apart else 0)

    @property
    def tokens(self) -> int:
        """Keys that stand at positions from 0 on."""
        return self.n - self.mechanism.memory

    @property
    def positions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the queries [B, nq] and of the keys [B, n], and n [B]."""
        if self.apart:
            rng = np.random.default_rng(zlib.crc32(str(self).encode()))
            q, k = (
                torch.from_numpy(
                    np.stack([_apart(self.apart, self.longest, size, rng) for _ in range(self.batch)])
                )
                for size in (self.nq, self.n)
            )
            return q, k, torch.full((self.batch,), self.longest)
        keys = torch.tensor(_for_each(self.k_offset or (-self.mechanism.memory,), self.batch))
        ends = keys + self.n
        starts = [self.mechanism.start(end, self.nq) for end in ends.tolist()]
        queries = torch.tensor(_for_each(self.q_offset, self.batch) if self.q_offset else starts)
        return queries[:, None] + torch.arange(self.nq), keys[:, None] + torch.arange(self.n), ends

    @property
    def places(self) -> dict[str, Any]:
        """What the call gives of them."""
        if not self.apart:
            return {"q_offset": self.q_offset, "k_offset": self.k_offset}
        q, k, _ = self.positions
        return {"q_positions": q, "k_positions": k.numpy(), "n": self.longest}

    def layout(self, name: str) -> Callable[[Tensor], Tensor]:
        return LAYOUTS[self.layouts[LAID.index(name if name in LAID else "tables")]]


AWAY = 40
"""Positions at which no key stands, where they are apart."""


def _apart(how: str, n: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rising positions below n, so many."""
    half = size // 2
    ends = np.concatenate([np.arange(half), np.arange(n - (size - half), n)])
    return ends if how == "shards" else np.sort(rng.permutation(n)[:size])


def _for_each(starts: tuple[int, ...], batch: int) -> list[int]:
    return list(starts) * (1 if len(starts) == batch else batch)


LAID = ("q", "k", "v", "grad_out", "tables")


def _cut(x: Tensor, *where: slice) -> Tensor:
    """x in the place of something longer where its last axes are cut, which is NaN elsewhere."""
    sizes = list(x.shape)
    for axis, cut in zip(range(-len(where), 0), where, strict=True):
        sizes[axis] = (cut.start or 0) + sizes[axis] * (cut.step or 1) + 3
    around = x.new_full(sizes, torch.nan) if x.is_floating_point() else x.new_zeros(sizes)
    place: Any = (..., *where)
    return around[place][tuple(map(slice, x.shape))].copy_(x)


def _reversed(x: Tensor) -> Tensor:
    """Axes stored from the last to the first."""
    axes = tuple(range(x.dim()))[::-1]
    return x.permute(axes).contiguous().permute(axes)


EVERY = slice(None)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "reversed": _reversed,
    "by-position": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x,
    "one-row": lambda x: x[:1].expand(x.shape),
    "one-head": lambda x: x[:, :1].expand(x.shape) if x.dim() > 1 else x,
    "in-a-cache": lambda x: _cut(x, slice(3, None), EVERY) if x.dim() > 1 else x,
    "in-features": lambda x: _cut(x, slice(4, None)),
    "every-second": lambda x: _cut(x, slice(None, None, 2), EVERY) if x.dim() > 1 else x,
    "one-number": lambda x: x[(slice(1),) * x.dim()].expand(x.shape),
}
"""A tensor of the same shape that lies in memory in another way. Those that begin with one- repeat what they
hold, without memory for it; the others have the same values."""


def _draw(mechanism: Mechanism, dtype: str, turn: int = 0, odd: Odd = "", apart: Apart = "") -> Case:
    """Sizes that differ from case to case and from run to run never."""
    rng = random.Random(zlib.crc32(f"{mechanism.name} {dtype} {turn} {odd}".encode()))
    if mechanism.memory or mechanism.made:
        n = rng.choice([1, 60, 300])
        heads, kv_heads = rng.choice([(2, 2), (4, 2), (3, 1)])
        return Case(
            mechanism, dtype, nq=1 if turn else n, n=n + mechanism.memory, batch=2, heads=heads,
            kv_heads=kv_heads, head_dim=16, v_dim=8, q_offset=None, k_offset=None, loud=False,
            with_lse=rng.random() < 0.5, left_out=False, odd="", block_size=32,
            layouts=("plain",) * len(LAID),
        )  # fmt: skip
    small = mechanism in WIDE or bool(odd)
    middle = bool(odd) or mechanism.exact or (turn == 0 and (dtype == "float32" or not small))
    lengths = SHORT if small else LENGTHS
    n = rng.choice(lengths)
    if middle:
        n = 70 if odd else 127
    cross = mechanism.start(0, 1) == 0
    square = mechanism.exact or rng.random() < 0.5
    nq = n if square else rng.choice([size for size in lengths[middle:] if size <= n or cross])
    heads, kv_heads = rng.choice([(2, 2), (4, 2), (2, 1)] if small else [(2, 2), (4, 2), (3, 1), (4, 4)])
    batch = rng.choice([1, 2] if small else [1, 2, 3])
    q_offset = k_offset = None
    if not square and rng.random() < 0.4:
        k_offset = tuple(rng.randint(0, 20) for _ in range(rng.choice([1, batch])))
    if not square and rng.random() < 0.5:
        most = max(min(k_offset or (0,)) + n - nq, 0)
        q_offset = tuple(rng.randint(0, most) for _ in range(rng.choice([1, batch])))
    left_out = mechanism.exact and turn == 1
    plain = rng.random() < 0.3 or bool(odd) or left_out
    if apart:
        q_offset = k_offset = None
    return Case(
        mechanism,
        dtype,
        nq,
        n,
        batch,
        heads,
        kv_heads,
        head_dim=16 if mechanism.exact else rng.choice([8, 16, 24]),
        v_dim=rng.choice([8, 16, 24]),
        q_offset=q_offset,
        k_offset=k_offset,
        loud=not mechanism.exact and not odd and rng.random() < 0.25,
        with_lse=rng.random() < 0.7,
        left_out=left_out,
        odd=odd,
        block_size=rng.choice([16, 32, 64]),
        layouts=tuple("plain" if plain or rng.random() < 0.3 else rng.choice(list(LAYOUTS)) for _ in LAID),
        apart=apart,
    )


ODD: dict[str, tuple[Odd, ...]] = {
    "causal": ("unreached", "q", "k", "v"),
    "window": ("unreached", "q", "k", "v"),
    "causal-window": ("unreached", "q", "v"),
    "empty-rows": ("unreached", "k"),
    "none": ("unreached",),
    "longformer": ("unreached", "k"),
    "per-head": ("unreached", "q"),
    "head-groups": ("unreached", "v"),
    "documents": ("unreached", "q"),
    "padding": ("unreached", "k"),
    "chosen": ("unreached", "v"),
    "listed": ("unreached", "q", "k", "v"),
    "listed-by-head": ("unreached", "k"),
    "listed-by-row": ("unreached", "v"),
    "listed-sigmoid": ("unreached", "q"),
    "alibi": ("unreached", "k"),
    "softcap": ("unreached", "q"),
    "shaw": ("unreached", "q", "v"),
    "bias": ("unreached", "k"),
    "multiset": ("unreached", "v"),
    "sink": ("unreached", "q"),
    "linear": ("unreached", "v"),
    "linear-windowed": ("unreached",),
    "elu-of-vectors": ("unreached", "q", "k"),
    "waves-of-a-matrix": ("unreached",),
    "sigmoid": ("unreached", "k"),
    "relu": ("unreached", "q"),
    "u-HD-twice": ("unreached", "k"),
    "x-BHnD": ("unreached", "q"),
    "decay-power": ("unreached", "v"),
    "random-decay": ("unreached", "k"),
    "bool-Bn": ("unreached", "v"),
    "cross": ("unreached", "q"),
    "infinite-outside": ("unreached", "k"),
    "t5": ("unreached", "q"),
    "transformer-xl": ("unreached", "q"),
    "x-nD": ("unreached", "k"),
    "x-BnD": ("unreached", "v"),
    "x-HnD": ("unreached",),
    "y-Bn": ("unreached", "q"),
    "z-nn": ("unreached", "k"),
    "relative": ("unreached", "v"),
    "look-up-in-a-part": ("unreached", "q"),
    "adaptive": ("unreached",),
    "decay-to-nothing": ("unreached",),
    "decay-of-vectors": ("unreached", "k"),
    "sink-BH": ("unreached", "k"),
    "groups-of-all-kinds": ("unreached", "q"),
    "cross-tables": ("unreached", "k"),
}
"""What is odd, by mechanism."""
WITH_MEMORY = "causal window empty-rows head-groups alibi softcap shaw sink multiset sigmoid linear".split()
"""Mechanisms that are tried with keys before position 0 too."""
ODD_NUMBERS = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)


CASES = (
    tuple(
        _draw(mechanism, dtype, turn)
        for mechanism in MECHANISMS
        for dtype, turn in (("float32", 0), ("float32", 1), ("float64", 0), ("bfloat16", 0))
        if mechanism not in WIDE or mechanism.exact or turn == 0
    )
    + tuple(
        _draw(mechanism, dtype, odd=odd)
        for mechanism in MECHANISMS
        for odd, dtype in zip(
            ODD.get(mechanism.name, ()), ("float32", "float32", "bfloat16", "float64"), strict=False
        )
    )
    + tuple(
        _draw(mechanism, "float32", turn=1, apart="shards" if i % 2 else "evicted")
        for i, mechanism in enumerate(MECHANISMS)
        if not mechanism.exact and mechanism not in WIDE
    )
    + tuple(
        _draw(replace(mechanism, memory=37), dtype, turn)
        for mechanism in MECHANISMS
        if mechanism.name in WITH_MEMORY
        for dtype, turn in (("float32", 0), ("float64", 1))
    )
    + tuple(
        _draw(mechanism, dtype, turn)
        for mechanism in STREAMS
        for dtype, turn in (("float32", 0), ("float64", 1))
    )
)


def inputs_of(attention: Attention, case: Case) -> Named:
    """q, k, v, gradients of the results, tables and parameters: float64, rounded to the case's dtype."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    c, dtype = case, getattr(torch, case.dtype)
    shapes = {
        "q": (c.batch, c.heads, c.nq, c.head_dim),
        "k": (c.batch, c.kv_heads, c.n, c.head_dim),
        "v": (c.batch, c.kv_heads, c.n, c.v_dim),
        "grad_out": (c.batch, c.heads, c.nq, c.v_dim),
        "grad_lse": (c.batch, c.heads, c.nq),
    }
    drawn: dict[str, Any] = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if case.loud:
        drawn["q"] *= 20
    if case.mechanism.exact:
        drawn |= {name: np.clip(np.round(64 * drawn[name]) / 64, -3.5, 3.5) for name in "qk"}
    for table in (*attention.inputs, *attention.learned):
        shape = _shape(table, case, one_row=bool(rng.integers(2)))
        if isinstance(table.origin, Learned):
            drawn[table.name] = table.origin.init + 0.1 * rng.standard_normal(shape)
        else:
            drawn[table.name] = case.mechanism.tables.get(table.name, normal)(rng, shape, case)
    tensors = {name: torch.as_tensor(value) for name, value in drawn.items()}
    rounded = {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in tensors.items()}
    return {name: x if name == "grad_lse" else case.layout(name)(x) for name, x in rounded.items()}


def _shape(table: Table, case: Case, one_row: bool) -> tuple[int, ...]:
    sizes = {"n": case.longest, "nq": case.nq, "D": case.head_dim} | case.mechanism.sizes(case.longest)
    sizes |= {"B": 1 if one_row else case.batch, "H": case.heads}
    return tuple([sizes[size] if isinstance(size, str) else size for size in table.dims])


def leaves_of(inputs: Named, case: Case, dtype: torch.dtype) -> Named:
    """The inputs in a dtype and as they lie in memory; reals ask for gradients."""
    leaves = {}
    for name, x in inputs.items():
        cast = x.to(dtype) if x.is_floating_point() else x
        laid = cast if name == "grad_lse" else case.layout(name)(cast)
        leaves[name] = laid.detach().requires_grad_(x.is_floating_point())
    return leaves


def keys_reached(case: Case, mask: Tensor) -> Tensor:
    """The keys [B, Hkv, n] in some pair of a mask [B, H, nq, n]."""
    share = case.heads // case.kv_heads
    return mask.view(case.batch, case.kv_heads, share, case.nq, case.n).any(3).any(2)


def make_odd(inputs: Named, case: Case, mask: Tensor, slopes: Named) -> Named:
    """The inputs with NaN and infinities, as the case says, for a mask [B, H, nq, n]. What has no slope in a
    table is read by no live pair."""
    mine = {name: inputs[name].clone() for name in ("q", "k", "v", *slopes)}
    reached = keys_reached(case, mask)
    if case.odd == "unreached":
        dead = {"q": ~mask.any(-1), "k": ~reached, "v": ~reached}
        for name, where in (dead | {name: slope == 0 for name, slope in slopes.items()}).items():
            x = mine[name]
            x[where] = ODD_NUMBERS[torch.arange(x[where].numel()) % 3].view(x[where].shape)
    elif case.odd:
        places = (mask.any(-1) if case.odd == "q" else reached).nonzero()
        for b, h, i in places[len(places) // 2 :][:1].tolist():
            mine[case.odd][b, h, i, 1] = torch.nan
    return inputs | mine


def given_of(attention: Attention, case: Case, inputs: Named) -> Inputs:
    arithmetic = torch.promote_types(getattr(torch, case.dtype), torch.float32)
    tables = {}
    for table in (*attention.inputs, *attention.learned):
        x = inputs[table.name]
        tables[table.name] = x.expand(case.batch, *x.shape[1:]) if table.batched else x
    q_at, k_at, n = case.positions
    keys = inputs["k"], inputs["v"], k_at
    k, v, k_at = case.mechanism.made(*keys, tables) if case.mechanism.made else keys
    return Inputs(inputs["q"], k, v, tables, q_at, k_at, n, arithmetic)


def attention_of(mechanism: Mechanism) -> Attention:
    found = attndsl.parse(mechanism.text)["a"]
    assert isinstance(found, Bound)
    return found.attention
