"""StreamSession: a session of an attention whose keys are streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.analysis.lasting import kept, over_length
from attndsl.axis import Axis
from attndsl.errors import fail
from attndsl.execution.session import Session, following, picked
from attndsl.execution.streaming import Pair, checked_memory, made_of
from attndsl.keywords import by_name
from attndsl.streams import Pool, Stream, Stretch, many_at, memory

if TYPE_CHECKING:
    from attndsl.execution.plan import Plan

Array = NDArray[np.int64]


class StreamSession(Session):
    """A session that makes each key of a stream once, when the last token of it comes.

    k, v     [B, Hkv, ring, D and Dv], the last tokens of each row, of which slots are still to be made: the
             one at position p is entry p mod `ring`. Without pools of tokens there are none
    entries  [B, Hkv or H, entries, D and Dv], what queries read, a stream after the other, and each as long
             as for `capacity` tokens
    firsts   of each stream the first of its entries
    grown    whether tokens to come leave entries in their places: all but the last stream have one length
    held     memory, until the first step makes keys of it
    """

    def __init__(self, plan: Plan, batch: int, capacity: int, *, held: Pair | None, **more: Any) -> None:
        attention, p = plan.attention, plan.problem
        self.streams = attention.streams
        super().__init__(plan, batch, capacity, **more)
        if capacity > p.length:
            raise fail(
                f"the capacity is {capacity}, and the plan serves up to {p.length} tokens",
                help=f"compile with `length={capacity}`",
            )
        self.most, self.at_once = capacity, min(p.q_length, p.length)
        self.grown = all("n" not in stream.many.free for stream in self.streams[:-1])
        if over_length(attention) and not self.grown:
            raise fail(
                f"`{attention.name}` has no sessions: its tables tell of every token, and keys of more than "
                "one stream come with these"
            )
        self.firsts = [0, *accumulate(many_at(stream, capacity) for stream in self.streams)]
        self.held = held and checked_memory(attention, self.k, self.v, held)
        heads = p.heads if attention.made_by_head else p.kv_heads
        keys, values = (x.new_zeros(batch, heads, self.firsts[-1], x.shape[3]) for x in (self.k, self.v))
        self.entries: Pair = keys, values

    def _places(self, capacity: int) -> tuple[int, int]:
        kept(self.plan.attention, self.plan.problem)
        sizes = [stream.size for stream in self._pools()]
        return 0, max(sizes) - 1 + self.rewind if sizes else 0

    def _pools(self) -> Iterator[Pool]:
        """Those of tokens."""
        for stream in self.streams:
            if isinstance(stream, Pool) and stream.of == Stretch():
                yield stream

    @by_name
    def copy(self) -> StreamSession:
        made = super().copy()
        assert isinstance(made, StreamSession)
        made.entries = self.entries[0].clone(), self.entries[1].clone()
        return made

    def _take(self, rows: Sequence[int], at: Tensor) -> None:
        super()._take(rows, at)
        self.entries = self.entries[0][at], self.entries[1][at]
        self.held = self.held and (self.held[0][at], self.held[1][at])

    def _back(self, row: int) -> int:
        return super()._back(row) if self.ring else 0

    def _append(
        self, q: Tensor, k: Tensor, v: Tensor, counts: tuple[int, ...], n: int, **call: Any
    ) -> Tensor:
        if not any(counts):
            return q.new_zeros(*q.shape[:3], v.shape[3])
        size, starts = k.shape[2], np.array(self.lengths)
        ends = starts + np.array(counts)
        # what stands behind the tokens of a row reads what the last of them reads
        at = np.minimum(following(starts, size), np.maximum(ends - 1, 0)[:, None])

        def made(tables: Mapping[str, Tensor]) -> Pair:
            for stream, first in zip(self.streams, self.firsts, strict=False):
                self._make(stream, first, (k, v), starts, ends, tables)
            self.held = None
            last, first = self.streams[-1], self.firsts[-2]
            there = first + many_at(last, int(ends.max()))
            return self.entries[0][:, :, :there], self.entries[1][:, :, :there]

        assert self.most is not None
        out = self.plan.attend(q, k, v, made, Axis.of(at), n if self.grown else self.most, **call)
        self.reached = tuple([max(pair) for pair in zip(self.reached, ends.tolist(), strict=True)])
        if self.ring:
            alike = len({*zip(self.lengths, counts, strict=True)}) == 1
            one = slice(1 if alike else None)
            self._write(k, v, starts[one].tolist(), ends[one].tolist())
        self.lengths = tuple(ends.tolist())
        behind = torch.tensor(counts)[:, None] <= torch.arange(size)
        return out.masked_fill(behind.to(out.device)[:, None, :, None], 0.0) if behind.any() else out

    def _make(
        self,
        stream: Stream,
        first: int,
        new: Pair,
        starts: Array,
        ends: Array,
        tables: Mapping[str, Tensor],
    ) -> None:
        """Writes the entries of a stream that these tokens, the last ones of each row up to `ends`, make."""
        attention, heads = self.plan.attention, self.plan.problem.heads
        if memory((stream,)):
            if self.held is not None:
                keys, values = made_of(stream, attention, heads, self.held, self.held, tables)
                self._put(first, (keys, values), 0 * starts, 0 * starts + keys.shape[2])
            return
        if isinstance(stream, Pool):
            starts, ends, new = self._unfinished(stream, new, starts, ends)
        if (ends > starts).any():
            self._put(first, made_of(stream, attention, heads, new, None, tables), starts, ends)

    def _unfinished(self, pool: Pool, new: Pair, starts: Array, ends: Array) -> tuple[Array, Array, Pair]:
        """The slots that are over with these tokens, from the first to before the last of each row, and the
        tokens that they are made of."""
        before, after = (
            np.maximum(lengths + pool.stride - pool.size, 0) // pool.stride for lengths in (starts, ends)
        )
        most = max(int((after - before).max()), 1)
        at = pool.stride * before[:, None] + np.arange((most - 1) * pool.stride + pool.size)
        late = self.ring + np.minimum(at - starts[:, None], new[0].shape[2] - 1)
        at = np.where(at < starts[:, None], at % self.ring, late)
        k, v = (picked(torch.cat(x, 2), at) for x in zip((self.k, self.v), new, strict=True))
        return before, after, (k, v)

    def _put(self, first: int, new: Pair, starts: Array, ends: Array) -> None:
        """Of each row the first of the new entries, at places `starts` to before `ends` of a stream."""
        counts = ends - starts
        if len({*zip(starts.tolist(), counts.tolist(), strict=True)}) == 1:
            start, count = first + int(starts[0]), int(counts[0])
            for cache, x in zip(self.entries, new, strict=True):
                cache[:, :, start : start + count] = x[:, :, :count].detach()
            return
        rows = np.repeat(np.arange(len(counts)), counts)
        at = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        row, source, place = (
            torch.from_numpy(x).to(new[0].device) for x in (rows, at, first + starts[rows] + at)
        )
        for cache, x in zip(self.entries, new, strict=True):
            cache[row, :, place] = x[row, :, source].detach()
