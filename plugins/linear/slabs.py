"""Problems that are full or causal in themselves, and the pieces in which they are walked through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.backend import Call
from attndsl.execution.torch_eval import Env, evaluate
from attndsl.expr import TRUE, Expr
from attndsl.features import LinearForm

CHUNK = 64
SLAB = 2**15
"""Numbers of a head that features are made of at once: few enough to stay in a cache."""
Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Rows:
    """Some batch rows, all heads.

    q, k     entries that take part, in the order of their positions; None: all as they are
    counts   of each query, how many of the keys it sees; they do not fall
    """

    batch: slice
    q: Tensor | None
    k: Tensor | None
    counts: Array


def rows_of(form: LinearForm, call: Call, env: Env, state: bool = False) -> Iterator[Rows]:
    """Queries that none has see nothing; with a `state` before the keys some see no more than that."""
    (batch, _, nq, _), n = call.q.shape, call.k.shape[2]
    # what segments read may be there only where a query or a key takes part
    live = [None if truth is TRUE else evaluate(truth, env) for truth in (form.queries, form.keys)]
    taking = _sides((form.queries, form.keys), [None, None], env, nq, n)
    segments = [_sides(pair, live, env, nq, n) for pair in form.segments]
    sizes = {len(x) for pair in (taking, *segments) for x in pair}
    sizes |= {len(axis.rows) for axis in (call.q_at, call.k_at)}
    step = max(batch, 1) if sizes == {1} else 1
    for start in range(0, batch, step):
        some = [np.flatnonzero(x[start % len(x)]) for x in taking]
        at = [axis.positions(start)[x] for axis, x in zip((call.q_at, call.k_at), some, strict=True)]
        label = [np.zeros(len(x), np.int64) for x in some]
        for pair in segments:
            both = [x[start % len(x)][there] for x, there in zip(pair, some, strict=True)]
            labelled = np.stack([np.concatenate(label), np.concatenate(both)])
            joined = np.unique(labelled, axis=1, return_inverse=True)[1].reshape(-1)
            label = [joined[: len(some[0])], joined[len(some[0]) :]]
        order = [np.lexsort(keys) for keys in zip(at, label, strict=True)]
        for segment in np.unique(label[0]):
            mine, other = (o[of[o] == segment] for o, of in zip(order, label, strict=True))
            counts = np.full(len(mine), len(other))
            if form.causal:
                counts = np.searchsorted(at[1][other], at[0][mine], side="right")
            if not state:
                mine, counts = mine[counts > 0], counts[counts > 0]
            if not len(mine):
                continue
            yield Rows(slice(start, start + step), _some(some[0][mine], nq), _some(some[1][other], n), counts)


def _sides(
    pair: tuple[Expr, Expr], live: list[Tensor | None], env: Env, nq: int, n: int
) -> tuple[Array, Array]:
    """What depends on the query alone and on the key alone: [1 or B, nq], [1 or B, n]."""
    values = (evaluate(e, env, where) for e, where in zip(pair, live, strict=True))
    mine, other = (
        x.reshape(len(x) if x.dim() else 1, -1).expand(-1, size).cpu().numpy()
        for x, size in zip(values, (nq, n), strict=True)
    )
    return mine, other


def _some(entries: Array, size: int) -> Tensor | None:
    return None if np.array_equal(entries, np.arange(size)) else torch.from_numpy(entries)


@dataclass(frozen=True, eq=False)
class Slab:
    """Keys, and the queries whose last key is among them, in `parts` of equal size; either may be missing.

    live     which keys of its part each query of it sees [queries, keys]; None: all
    counts   how many keys each query sees in all
    """

    keys: slice
    queries: slice
    parts: int
    live: Tensor | None
    counts: slice | Tensor


def slabs_of(counts: Array, chunk: int, features: int) -> Iterator[Slab]:
    """In parts of `chunk` keys where queries follow one another."""
    each = max(1, SLAB // features // chunk)
    size = each * chunk
    none, nq = int(np.searchsorted(counts, 0, side="right")), len(counts)
    yield from _queries(0, none, 0, size)
    if none == nq:
        return
    first, last = int(counts[none]), int(counts[-1])
    if first == last <= 2 * chunk:
        seen = torch.from_numpy(counts[none:])
        yield Slab(slice(0, last), slice(none, nq), 1, None, seen)
    elif (np.diff(counts[none:]) == 1).all():
        yield from _keys(0, first - 1, size)
        yield from _squares(first - 1, last, none - first + 1, chunk, each)
    elif first == last:
        yield from _keys(0, last, size)
        yield from _queries(none, nq, last, size)
    else:
        for start in range(0, last, chunk):
            stop = min(last, start + chunk)
            some = slice(*np.searchsorted(counts, (start, stop), side="right").tolist())
            seen = torch.from_numpy(counts[some])
            live = seen[:, None] > torch.arange(start, stop)
            yield Slab(slice(start, stop), some, 1, live, seen)


def _keys(start: int, stop: int, size: int) -> Iterator[Slab]:
    """Without queries."""
    for i in range(start, stop, size):
        yield Slab(slice(i, min(stop, i + size)), slice(0, 0), 1, None, slice(0, 0))


def _queries(start: int, stop: int, count: int, size: int) -> Iterator[Slab]:
    """That see the first `count` keys."""
    for i in range(start, stop, size):
        some = slice(i, min(stop, i + size))
        seen = torch.full((some.stop - i,), count)
        yield Slab(slice(count, count), some, 1, None, seen)


def _squares(start: int, stop: int, queries: int, chunk: int, each: int) -> Iterator[Slab]:
    """Keys each of which is the last of one query; that of key 0 would be number `queries`."""
    whole = (stop - start) // chunk
    sizes = [(min(each, whole - i), chunk) for i in range(0, whole, each)]
    for parts, size in (*sizes, (1, (stop - start) % chunk)):
        if size:
            end = start + parts * size
            live = torch.ones(size, size, dtype=torch.bool).tril()
            mine = slice(start + queries, end + queries)
            yield Slab(slice(start, end), mine, parts, live, slice(start + 1, end + 1))
            start = end
