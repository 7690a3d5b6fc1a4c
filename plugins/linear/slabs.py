"""Problems that are full or causal in themselves, and the pieces in which they are walked through."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

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
    """Some batch rows, all heads; queries and keys by segments, in these by their positions.

    q, k     entries that take part; None: all as they are
    counts   of each query, up to how many keys it sees; they do not fall
    starts   of each key, how many stand before its segment: a query sees those of the segment of the last;
             None for one segment
    """

    batch: slice
    q: Tensor | None
    k: Tensor | None
    counts: Array
    starts: Array | None


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
        some, at, label = ([x[o] for x, o in zip(pair, order, strict=True)] for pair in (some, at, label))
        begin, counts, starts = _seen(at, label, form.causal)
        if not state:
            seeing = counts > begin
            some[0], begin, counts = some[0][seeing], begin[seeing], counts[seeing]
        if not len(counts):
            continue
        # those that no query sees
        ends = (np.bincount(x, minlength=len(starts) + 1) for x in (begin, counts))
        wanted = np.cumsum(np.subtract(*ends))[: counts[-1]] > 0
        if not wanted.all():
            rank = np.concatenate([[0], np.cumsum(wanted)])
            some[1], counts, starts = (
                some[1][: len(wanted)][wanted],
                rank[counts],
                rank[starts[: len(wanted)][wanted]],
            )
        whole = not len(starts) or starts[0] == starts[-1]
        yield Rows(
            slice(start, start + step),
            _some(some[0], nq),
            _some(some[1], n),
            counts,
            None if whole else starts,
        )


def _seen(at: list[Array], label: list[Array], causal: bool) -> tuple[Array, Array, Array]:
    """Of sorted queries how many keys stand before the first and up to the last that they see; of keys how
    many stand before their segment."""
    both = np.concatenate(at)
    low, high = (both.min(), both.max()) if len(both) else (0, 0)
    first = [x * (high - low + 1) for x in label]
    here = [x + y - low for x, y in zip(first, at, strict=True)]
    last = here[0] if causal else first[0] + high - low
    begin, starts = (np.searchsorted(here[1], x) for x in first)
    return begin, np.searchsorted(here[1], last, side="right"), starts


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
class Piece:
    """Keys, and the queries whose last key is among them; either may be missing.

    keys, queries   of those of the slab
    live      which keys of it each query of it sees [queries, keys]; None: all
    entering  how many of its first queries see keys before it
    leaving   its first key that is of the segment of its last
    fresh     whether that segment begins in it
    square    whether each query sees one key more than the last
    """

    keys: slice
    queries: slice
    live: Tensor | None
    entering: int
    leaving: int
    fresh: bool
    square: bool


@dataclass(frozen=True, eq=False)
class Slab:
    """Some pieces; `counts` as in Rows, of its queries."""

    keys: slice
    queries: slice
    pieces: tuple[Piece, ...]
    counts: slice | Tensor

    @cached_property
    def edges(self) -> Tensor:
        """Where the keys of each piece begin, and where those of the last end."""
        ends = (self.keys.start + piece.keys.stop for piece in self.pieces)
        return torch.tensor([self.keys.start, *ends])

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Which piece each query, and which each key is of."""
        sizes = (
            [x.stop - x.start for x in side]
            for side in zip(*((p.queries, p.keys) for p in self.pieces), strict=True)
        )
        which = torch.arange(len(self.pieces))
        mine, other = (which.repeat_interleave(torch.tensor(x)) for x in sizes)
        return mine, other


Place = tuple[int, int, int, int]
"""Begin and end of keys and of queries."""


def slabs_of(rows: Rows, chunk: int, features: int) -> Iterator[Slab]:
    """In pieces of at most `chunk` keys where queries follow one another."""
    size = max(1, SLAB // features // chunk) * chunk
    ahead = int(rows.counts[0]) if (np.diff(rows.counts) == 1).all() else None
    triangles: dict[int, Tensor] = {}
    some: list[Place] = []
    for place in (*_places(rows.counts, chunk, size), None):
        if some and (place is None or max(place[1] - some[0][0], place[3] - some[0][2]) > size):
            (k0, _, q0, _), (_, k1, _, q1) = some[0], some[-1]
            counts: slice | Tensor = torch.from_numpy(rows.counts[q0:q1])
            if ahead is not None:
                counts = slice(ahead + q0, ahead + q1)
            pieces = tuple(_piece(rows, x, (k0, q0), ahead, triangles) for x in some)
            yield Slab(slice(k0, k1), slice(q0, q1), pieces, counts)
            some = []
        if place is not None:
            some.append(place)


def _places(counts: Array, chunk: int, size: int) -> Iterator[Place]:
    """Queries of which more than a few see the same keys come after these."""
    none = int(np.searchsorted(counts, 0, side="right"))
    for i in range(0, none, size):
        yield 0, 0, i, min(none, i + size)
    found, first = np.unique(counts[none:], return_index=True)
    ends, begins = found.tolist(), [*(none + first).tolist(), len(counts)]
    if len(ends) == 1 and ends[0] <= 2 * chunk:
        yield 0, ends[0], none, len(counts)
        return
    many = np.flatnonzero(np.diff(begins) > 4 * chunk).tolist()
    at = i = 0
    while i < len(ends):
        end, crowd = ends[i], bool(many) and many[0] == i
        if crowd or end - at > chunk:
            stop = end if crowd else end - 1
            for j in range(at, stop, size):
                yield j, min(stop, j + size), begins[i], begins[i]
            at = stop
            if crowd:
                for j in range(begins[i], begins[i + 1], size):
                    yield at, at, j, min(begins[i + 1], j + size)
                i = many.pop(0) + 1
            continue
        stop = min(at + chunk, ends[many[0] if many else -1])
        after = min(bisect_right(ends, stop, i), many[0] if many else len(ends))
        yield at, stop, begins[i], begins[after]
        at, i = stop, after


def _piece(
    rows: Rows, place: Place, origin: tuple[int, int], ahead: int | None, triangles: dict[int, Tensor]
) -> Piece:
    """Query i sees one key more than the last, the first of them `ahead`, where that is not None."""
    (k0, k1, q0, q1), starts, live = place, rows.starts, None
    square = ahead is not None and k1 - k0 == q1 - q0 and ahead + q0 == k0 + 1
    entering, leaving, fresh = q1 - q0, 0, False
    if starts is not None:
        first = starts[rows.counts[q0:q1] - 1]
        entering = int(np.searchsorted(first, k0))
        if k1 > k0:
            begin = int(starts[k1 - 1])
            leaving, fresh = max(0, begin - k0), begin >= k0
    if square and entering == q1 - q0:
        if q1 - q0 not in triangles:
            triangles[q1 - q0] = torch.ones(q1 - q0, q1 - q0, dtype=torch.bool).tril()
        live = triangles[q1 - q0]
    elif k1 > k0 and q1 > q0:
        keys = np.arange(k0, k1)
        seen = rows.counts[q0:q1, None] > keys
        if starts is not None:
            seen &= first[:, None] <= keys
        live = None if seen.all() else torch.from_numpy(seen)
    here, mine = slice(k0 - origin[0], k1 - origin[0]), slice(q0 - origin[1], q1 - origin[1])
    return Piece(here, mine, live, entering, leaving, fresh, square)
