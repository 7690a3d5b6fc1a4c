"""What the leaves of generated code hold in a call (emit/leaves.py)."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.backend import Call
from attndsl.emit.leaves import Kind, Leaf, Products
from attndsl.execution.torch_eval import Env, Linear, environment, evaluate, listed
from attndsl.expr import Expr, Table
from attndsl.meaning.pointwise import LEAST, partial
from attndsl.scores import linear_in_tables
from attndsl.tiles import shadows
from attndsl.tiles.blockmask import BlockMask, TileGrid

VECTORS = ir.QUERY_VECTORS | ir.KEY_VECTORS


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
            return self.entries(e, call).flatten(2)
        if isinstance(e, Products):
            vectors = evaluate(e.vector, self.around("number", e.vector, call)).to(self.env.dtype)
            vectors = vectors.reshape(*(1,) * (5 - vectors.dim()), *vectors.shape).flatten(2, 3)
            rows = self.entries(e.table, call).flatten(2, -2)
            return (vectors @ rows.transpose(2, 3)).flatten(2)
        env = self.around(leaf.kind, e, call)
        return self.flat(leaf.kind, evaluate(e, env, self.asked(leaf.kind) if guarded(leaf) else None))

    def linear(self, leaf: Leaf) -> Linear | None:
        """What it is over tables, which is the same in every call of these sizes, positions and tiles."""
        if not isinstance(e := leaf.of, Expr) or e.type != "real" or linear_in_tables(e) is None:
            return None
        if e.free & VECTORS:
            return None
        live = (
            self.asked(leaf.kind)
            if guarded(leaf)
            else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.env.device)
        )
        return Linear.of(e, self.around(leaf.kind, e, self.call), live)

    def around(self, kind: Kind, e: Expr, call: Call) -> Env:
        """With the entries along the third or the fourth axis, and the vectors that are read."""
        values = dict(self.env.values)
        if kind == "distance":
            values |= {
                "q": self.distances[..., None],
                "k": torch.zeros((), dtype=torch.int64, device=self.env.device),
            }
        for name, x in (("Q", call.q), ("K", call.k)):
            if name in e.free:
                wide, share = x.to(self.env.dtype), call.q.shape[1] // x.shape[1]
                values[name] = wide if share == 1 else wide.repeat_interleave(share, 1)
        return replace(self.env, values=values, tables=call.tables)

    def asked(self, kind: Kind) -> Tensor:
        """Where a live pair asks for an entry."""
        if kind == "number":
            return self.live(shadows.live_rows).any(-1)[..., None, None]
        if kind == "distance":
            return self.live(shadows.live_distances)[..., None]
        if kind == "query":
            return self.live(shadows.live_rows)[..., None]
        return self.live(shadows.live_keys)[:, :, None]

    def flat(self, kind: Kind, found: Tensor) -> Tensor:
        """[.., entries, 1] or [.., 1, entries] as [.., entries], also where all are the same."""
        (nq, n) = self.call.q.shape[2], self.call.k.shape[2]
        entries = {"number": 1, "query": nq, "key": n, "distance": nq + n - 1}[kind]
        found = found.reshape(*(1,) * (4 - found.dim()), *found.shape).flatten(2)
        return found.expand(*found.shape[:2], entries)

    def entries(self, table: Table, call: Call) -> Tensor:
        """With axes of batch rows and heads."""
        lead, device = len(table.implicit), call.q.device
        values = call.tables[table.name] if table.known is None else listed(table, device)
        wide = torch.promote_types(call.q.dtype, torch.float32)
        values = values.to(wide) if table.dtype == "float" else values
        sizes = dict(zip(table.dims[:lead], values.shape[:lead], strict=True))
        return values.reshape(sizes.get("B", 1), sizes.get("H", 1), *values.shape[lead:])

    @property
    def distances(self) -> Tensor:
        """[B or 1, 1, L]"""
        call = self.call
        assert call.q_at.starts is not None
        assert call.k_at.starts is not None
        return _distances(call.q_at.starts, call.k_at.starts, call.q.shape[2], call.k.shape[2], call.q.device)

    def live(self, shadow: Shadow) -> Tensor:
        """[B or 1, H or 1, entries]"""
        blocks, heads = self.call.block_mask, self.call.q.shape[1]
        known = _known_live.setdefault(blocks, {})
        key = (shadow, heads, self.call.q.device)
        if key not in known:
            index = blocks.index
            if index.shape[1] > 1:
                index = index[:, np.arange(heads) % index.shape[1]]
            found = np.stack([shadow(grid) for grid in blocks.grids])[index]
            # what is kept serves calls of which some are differentiated
            with torch.inference_mode(False):
                known[key] = torch.from_numpy(found).to(self.call.q.device)
        return known[key]


Shadow = Callable[[TileGrid], NDArray[np.bool_]]
_known_live: WeakKeyDictionary[BlockMask, dict[tuple[Shadow, int, torch.device], Tensor]] = (
    WeakKeyDictionary()
)


@lru_cache(maxsize=16)
def _distances(
    q_starts: tuple[int, ...], k_starts: tuple[int, ...], nq: int, n: int, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        starts = torch.from_numpy(np.array(q_starts) - np.array(k_starts)).view(-1, 1, 1)
        return (starts + torch.arange(1 - n, nq)).to(device)


SINGULAR = frozenset({*LEAST, "exp", "log", "sqrt", "div"})
"""Operations that have no value, or no derivative, for some arguments."""


def guarded(leaf: Leaf) -> bool:
    """Whether entries that no live pair asks for may have no value or no derivative. What is the same for all
    of them has, or no pair has."""
    assert isinstance(leaf.of, Expr)
    if leaf.of.free & VECTORS or (leaf.kind == "number" and partial(leaf.of)):
        return True
    lacking = (node for node in ir.nodes(leaf.of) if isinstance(node.value, Table) or node.op in SINGULAR)
    return any(node.free & {"q", "k"} for node in lacking if node.op != "div" or node.args[1].op != "const")


def sizes_of(of: Table | Products, call: Call) -> tuple[int, ...]:
    """Of the axes that pairs index."""
    table = of.table if isinstance(of, Products) else of
    known = table.known
    shape = call.tables[table.name].shape if known is None else known.shape
    sizes = tuple(shape[len(table.implicit) :])
    if isinstance(of, Table):
        return sizes
    first = {"query": (call.q.shape[2],), "key": (call.k.shape[2],)}.get(of.of, ())
    return first + sizes[:-1]


def passes_gradients(leaf: Leaf, names: Set[str]) -> bool:
    """Whether what it holds is made of vectors or of tables of these names."""
    of = leaf.of
    if isinstance(of, Table):
        return of.name in names
    if isinstance(of, Products):
        return True
    return bool(of.free & VECTORS) or any(table.name in names for table in of.tables)


def pair_environment(call: Call, b: int, h: int, q: int, k: int) -> Env:
    """Of one query and key of entries, with s, Q and K: axes of size 1."""
    env = environment(call)
    row = b % len(env.values["q"])
    mine, other = call.q[b, h, q], call.k[b, h // (call.q.shape[1] // call.k.shape[1]), k]
    values = {
        "q": env.values["q"][row, 0, q, 0],
        "k": env.values["k"][b % len(env.values["k"]), 0, 0, k],
        "n": env.values["n"].flatten()[b % len(env.values["n"])],
        "b": torch.tensor(b, device=env.device),
        "h": torch.tensor(h, device=env.device),
        "s": (mine * other).sum() / call.q.shape[3] ** 0.5,
    }
    single = {name: value.view(1, 1, 1, 1) for name, value in values.items()}
    vectors = {"Q": mine.view(1, 1, 1, -1), "K": other.view(1, 1, 1, -1)}
    return replace(env, values={**env.values, **single, **vectors})
