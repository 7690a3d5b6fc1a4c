"""What the leaves of generated code hold in a call (emit/leaves.py)."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.backend import Call
from attndsl.emit.leaves import Leaf
from attndsl.execution.torch_eval import Env, at_distances, environment, evaluate
from attndsl.expr import Expr, Table
from attndsl.meaning.pointwise import partial
from attndsl.tiles import shadows
from attndsl.tiles.blockmask import TileGrid


@dataclass(frozen=True, eq=False)
class LeafValues:
    """Of the sizes, positions and tiles of one call."""

    call: Call

    @cached_property
    def env(self) -> Env:
        """Axes [B, H, nq, n]."""
        return environment(self.call)

    def of(self, leaf: Leaf, call: Call) -> Tensor:
        """[B or 1, H or 1, entries], reals, int64 or bool, with the vectors and tables of `call`.

        One entry for a number, one for each query or key, of a distance those from 1 - n on, from the first
        query minus the last key; the entries of a table. Raises AttnError as `evaluate` does, where a live
        pair asks for the entry.
        """
        e = leaf.of
        if isinstance(e, Table):
            return self.entries(e, call)
        env, guarded = self.with_vectors(e, call), partial(e) or e.free & (ir.QUERY_VECTORS | ir.KEY_VECTORS)
        if leaf.kind == "distance":
            live = self.live(shadows.live_distances) if guarded else torch.ones(1, 1, 1, dtype=torch.bool)
            wide = live.expand(*live.shape[:2], self.distances.shape[-1])
            return at_distances(e, env, self.distances, wide)
        if leaf.kind == "number":
            any_pair = self.live(shadows.live_rows).any(-1)[..., None, None] if guarded else None
            return _flat(evaluate(e, env, any_pair), 1)
        queries = leaf.kind == "query"
        asked = None
        if guarded:
            live = self.live(shadows.live_rows if queries else shadows.live_keys)
            asked = live[..., None] if queries else live[:, :, None]
        return _flat(evaluate(e, env, asked), (call.q if queries else call.k).shape[2])

    def with_vectors(self, e: Expr, call: Call) -> Env:
        values = {**self.env.values}
        for name, x in (("Q", call.q), ("K", call.k)):
            if name in e.free:
                values[name] = x.to(self.env.dtype).repeat_interleave(call.q.shape[1] // x.shape[1], 1)
        return replace(self.env, values=values, tables=call.tables)

    def entries(self, table: Table, call: Call) -> Tensor:
        known, lead = table.known, len(table.implicit)
        values = call.tables[table.name] if known is None else torch.from_numpy(known)
        values = values.to(self.env.dtype) if table.dtype == "float" else values
        sizes = dict(zip(table.dims[:lead], values.shape[:lead], strict=True))
        return values.reshape(sizes.get("B", 1), sizes.get("H", 1), -1)

    @property
    def distances(self) -> Tensor:
        """[B or 1, 1, L]"""
        first_q, first_k = (np.array(axis.starts) for axis in (self.call.q_at, self.call.k_at))
        apart = torch.arange(1 - self.call.k.shape[2], self.call.q.shape[2])
        return torch.from_numpy(first_q - first_k).view(-1, 1, 1) + apart

    def live(self, shadow: Callable[[TileGrid], NDArray[np.bool_]]) -> Tensor:
        """[B or 1, H or 1, entries]"""
        blocks, heads = self.call.block_mask, self.call.q.shape[1]
        index = blocks.index
        if index.shape[1] > 1:
            index = index[:, np.arange(heads) % index.shape[1]]
        return torch.from_numpy(np.stack([shadow(grid) for grid in blocks.grids])[index])


def _flat(found: Tensor, entries: int) -> Tensor:
    """[.., nq, 1] or [.., 1, n] as [.., entries], also where all are the same."""
    found = found.reshape(*(1,) * (4 - found.dim()), *found.shape).flatten(2)
    return found.expand(*found.shape[:2], entries)


def sizes_of(table: Table, call: Call) -> tuple[int, ...]:
    """Of the axes that pairs index."""
    known = table.known
    shape = call.tables[table.name].shape if known is None else known.shape
    return tuple(shape[len(table.implicit) :])


def passes_gradients(leaf: Leaf, names: Set[str]) -> bool:
    """Whether what it holds is made of vectors or of tables of these names."""
    if isinstance(leaf.of, Table):
        return leaf.of.name in names
    vectors = ir.QUERY_VECTORS | ir.KEY_VECTORS
    return bool(leaf.of.free & vectors) or any(table.name in names for table in leaf.of.tables)


def pair_environment(call: Call, b: int, h: int, q: int, k: int) -> Env:
    """Of one query and key of entries, with s, Q and K: axes of size 1."""
    env = environment(call)
    row = b % len(env.values["q"])
    mine, other = call.q[b, h, q], call.k[b, h // (call.q.shape[1] // call.k.shape[1]), k]
    values = {
        "q": env.values["q"][row, 0, q, 0],
        "k": env.values["k"][b % len(env.values["k"]), 0, 0, k],
        "n": env.values["n"].flatten()[b % len(env.values["n"])],
        "b": torch.tensor(b),
        "h": torch.tensor(h),
        "s": (mine * other).sum() / call.q.shape[3] ** 0.5,
    }
    single = {name: value.view(1, 1, 1, 1) for name, value in values.items()}
    vectors = {"Q": mine.view(1, 1, 1, -1), "K": other.view(1, 1, 1, -1)}
    return replace(env, values={**env.values, **single, **vectors})
