"""Session: the keys and values of sequences that grow, and attention of their new tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.analysis.lasting import kept
from attndsl.backend import DTYPES
from attndsl.errors import fail
from attndsl.tiles.lowering import checked_length

if TYPE_CHECKING:
    from attndsl.execution.plan import Plan

Array = NDArray[np.int64]
REWIND = 16


class Session:
    """A cache of keys and values, one sequence a batch row, that a plan attends to.

    What a step gives is what the plan gives for the last tokens of each sequence alone, without a cache.

    k, v     [B, Hkv, slots, D and Dv]. Position p of a row is slot p, for ever. Where it is proved that
             queries read only the first `first` keys and some last ones, and no table is over n, there are
             `ring` slots for all positions from `first` on: p has slot first + (p - first) mod ring, and
             sequences have no end
    lengths  tokens of each row
    reached  and how many it ever had: those behind may have taken the slots of earlier ones
    """

    def __init__(
        self, plan: Plan, batch: int, capacity: int, *, rewind: int, v_dim: int | None, dtype: str | None
    ) -> None:
        p, tables = plan.problem, (*plan.attention.inputs, *plan.attention.learned)
        for table in tables:
            if table.name in ("tokens", "chunk"):
                raise fail(
                    f"the table `{table.name}` has the name of an argument of a step", help="rename it"
                )
        batch, capacity = checked_length("batch", batch), checked_length("capacity", capacity)
        if checked_length("rewind", rewind) == 0:
            raise fail("`rewind` is 0, and must be positive")
        self.plan, self.rewind = plan, rewind
        self.first, self.ring = capacity, 0
        found = kept(plan.attention, p)
        if found is not None and not any("n" in table.dims for table in tables):
            first, last = found
            if first + last - 1 + rewind < capacity:
                self.first, self.ring = first, last - 1 + rewind
        if self.slots > p.length:
            raise fail(
                f"the cache has {self.slots} slots, and the plan serves up to {p.length} keys",
                help=f"compile with `length={self.slots}`",
            )
        self.at_once = min(p.q_length, max(rewind, p.length - self.slots) if self.ring else p.length)
        name = str(dtype or p.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise fail(f"`dtype` is {name}, and must be one of {', '.join(DTYPES)}")
        self.k, self.v = (
            torch.zeros(batch, p.kv_heads, self.slots, width, dtype=getattr(torch, name), device=p.device)
            for width in (p.head_dim, p.head_dim if v_dim is None else checked_length("v_dim", v_dim))
        )
        self.lengths = self.reached = (0,) * batch

    @property
    def slots(self) -> int:
        return self.first + self.ring

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        tokens: Any = None,
        learned: Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The next tokens of every row, q [B, H, m, D], k [B, Hkv, m, D], v [B, Hkv, m, Dv] -> [B, H, m, Dv].

        Where rows have fewer, `tokens` says how many each: what stands behind them is not read, and gives 0.
        `learned` and tables are as in a call of the plan, `n` being the length of the longest row then.
        Raises AttnError for what does not fit, also beyond the capacity; then no token has been added.
        """
        return self.prefill(q, k, v, tokens=tokens, learned=learned, **inputs)

    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        chunk: int | None = None,
        tokens: Any = None,
        learned: Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """As `step`, in chunks of so many tokens, by default of as many as the plan serves."""
        size = self.at_once if chunk is None else min(checked_length("chunk", chunk), self.at_once)
        if size == 0:
            raise fail("`chunk` is 0, and must be positive")
        if torch.is_autocast_enabled(self.k.device.type):
            q, k, v = self._cast(q, k, v)
        counts = np.array(self._counts(q, k, v, tokens), np.int64)
        n = int((np.array(self.lengths) + counts).max(initial=0))
        found = []
        for i in range(0, max(k.shape[2], 1), size):
            new = [x[:, :, i : i + size] for x in (q, k, v)]
            here = (counts - i).clip(0, new[0].shape[2])
            found.append(self._append(new[0], new[1], new[2], here, n, learned=learned, **inputs))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def copy(self) -> Session:
        """Another one that has its own memory."""
        made = copy.copy(self)
        made.k, made.v = self.k.clone(), self.v.clone()
        return made

    def reorder(self, rows: Any) -> None:
        """Row i becomes what row `rows[i]` was; as many rows as are named, some maybe more than once."""
        chosen = _integers("rows", rows)
        for row in chosen:
            if row >= len(self.lengths):
                raise fail(f"there is no row {row} of {len(self.lengths)}")
        at = torch.tensor(chosen, dtype=torch.int64, device=self.k.device)
        self.k, self.v = self.k[at], self.v[at]
        self.lengths, self.reached = (tuple([x[row] for row in chosen]) for x in (self.lengths, self.reached))

    def truncate(self, lengths: Any) -> None:
        """Only the first tokens are left, so many of each row, or one number for all.

        Where slots are used again, at most `rewind` back from the most that the row ever had. Raises
        AttnError beyond that, and for more tokens than there are.
        """
        wanted = self._each("lengths", lengths)
        for row, (new, old, most) in enumerate(zip(wanted, self.lengths, self.reached, strict=True)):
            if new > old:
                raise fail(f"row {row} has {old} tokens, and is to be truncated to {new}")
            if self.first < new < old and most > self.slots and most - new > self.rewind:
                raise fail(
                    f"row {row} had {most} tokens, and goes back to {most - self.rewind}, not to {new}",
                    help=f"make the session with `rewind={most - new}`",
                )
        self.lengths = wanted
        # where none but the first keys are left, what else the slots hold is never read
        self.reached = tuple(
            [new if new <= self.first else most for new, most in zip(wanted, self.reached, strict=True)]
        )

    def _cast(self, *new: Tensor) -> tuple[Tensor, ...]:
        """As autocast does for torch's own attention, which would convert the cache anew at every step."""
        dtype = torch.get_autocast_dtype(self.k.device.type)
        if dtype != self.k.dtype:
            raise fail(
                f"autocast asks for {dtype}, and the session holds {self.k.dtype}",
                help=f'make the session with `dtype="{str(dtype).removeprefix("torch.")}"`',
            )
        return tuple([x.to(dtype) for x in new])

    def _counts(self, q: Tensor, k: Tensor, v: Tensor, tokens: Any) -> tuple[int, ...]:
        """How many tokens of each row are new. Raises AttnError for what does not fit the cache."""
        for name, x, cache in (("k", k, self.k), ("v", v, self.v)):
            if not isinstance(x, Tensor):
                raise fail(f"`{name}` must be a torch tensor, and is of type {type(x).__name__}")
            here, there = [*x.shape], [*cache.shape]
            if [*here[:2], *here[3:]] != [*there[:2], *there[3:]]:
                there[2] = here[2] if len(here) == 4 else 1
                raise fail(f"`{name}` is {here}, and what the session holds is like {there}")
            if (x.dtype, x.device) != (cache.dtype, cache.device):
                held = f"{cache.dtype} on {cache.device}"
                raise fail(f"`{name}` is {x.dtype} on {x.device}, and the session holds {held}")
        if not q.shape[2:3] == k.shape[2:3] == v.shape[2:3]:
            raise fail("`q`, `k` and `v` are of the same tokens, and differ in length")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise fail("a session has no gradients", help="decode under `torch.no_grad()`")
        size = k.shape[2]
        counts = self._each("tokens", size if tokens is None else tokens)
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if count > size:
                raise fail(f"row {row} has {count} new tokens, and {size} are given")
            if not self.ring and length + count > self.slots:
                raise fail(
                    f"row {row} has {length} tokens and gets {count} more, and the capacity is {self.slots}"
                )
        return counts

    def _each(self, name: str, given: Any) -> tuple[int, ...]:
        """One number for each row; one may be given for all."""
        found = _integers(name, given)
        if len(found) not in (1, len(self.lengths)):
            raise fail(f"`{name}` has {len(found)} entries for {len(self.lengths)} rows")
        return found * len(self.lengths) if len(found) == 1 else found

    def _append(self, q: Tensor, k: Tensor, v: Tensor, counts: Array, n: int, **call: Any) -> Tensor:
        if not counts.any():
            return q.new_zeros(*q.shape[:3], v.shape[3])
        size, starts = k.shape[2], np.array(self.lengths, np.int64)
        ends = starts + counts
        whole = bool((counts == size).all())
        if whole and (starts == starts[0]).all():
            starts, ends = starts[:1], ends[:1]
        place: dict[str, Any] = {"q_offset": starts.tolist()}
        if not whole:
            # what stands behind the tokens of a row reads what the last of them reads
            last = np.maximum(ends - 1, 0)[:, None]
            place = {"q_positions": np.minimum(starts[:, None] + np.arange(size), last)}
        if not self.ring:
            place["n"] = n
        most, apart = int(ends.max()), self.ring and size > self.rewind and ends.max() > self.slots
        if apart:
            # the new keys would take the slots of what the first of them read
            held = min(int(starts.max()), self.slots)
            before, new = self._positions(starts)[:, :held], starts[:, None] + np.arange(size)
            before = np.where(before < starts[:, None], before, ends[:, None])
            place["k_positions"] = np.concatenate([before, new], 1)
            keys, values = (
                torch.cat([cache[:, :, :held], x], 2) if held else x
                for cache, x in ((self.k, k), (self.v, v))
            )
        else:
            self._write(k, v, starts, ends)
            keys, values = (cache[:, :, : min(most, self.slots)] for cache in (self.k, self.v))
            if most > self.slots:
                place["k_positions"] = self._positions(ends)
        out: Tensor = self.plan(q, keys, values, **place, **call)
        if apart:
            self._write(k, v, starts, ends)
        self.lengths = tuple(np.broadcast_to(ends, counts.shape).tolist())
        if not whole:
            behind = torch.from_numpy(np.arange(size) >= counts[:, None]).to(out.device)
            out = out.masked_fill(behind[:, None, :, None], 0.0)
        return out

    def _positions(self, lengths: Array) -> Array:
        """What each slot holds in rows of these lengths, int64 [rows, slots].

        The last that was written; in a slot without any the first that will be, which no query reads yet.
        """
        ring, last = np.arange(self.ring), lengths[:, None] - 1 - self.first
        held = last - (last - ring) % self.ring
        held = self.first + np.where(held < 0, held + self.ring, held)
        return np.concatenate([np.broadcast_to(np.arange(self.first), (len(lengths), self.first)), held], 1)

    def _write(self, k: Tensor, v: Tensor, starts: Array, ends: Array) -> None:
        """The new tokens, one row of starts and ends for all or one each, but those whose slots later ones
        of them take."""
        at = starts[:, None] + np.arange(k.shape[2])
        left = (at < ends[:, None]) & ((at < self.first) | (at >= ends[:, None] - self.ring))
        slots = np.where(at < self.first, at, self.first + (at - self.first) % max(self.ring, 1))[left]
        row, entry = left.nonzero()
        for cache, new in ((self.k, k), (self.v, v)):
            if len(starts) == 1:
                cache[:, :, _view(slots)] = new[:, :, _view(entry)]
            else:
                each = torch.from_numpy(row)
                cache[each, :, torch.from_numpy(slots)] = new[each, :, torch.from_numpy(entry)]
        self.reached = tuple(np.maximum(self.reached, ends).tolist())


def _view(entries: Array) -> slice | Tensor:
    """The index of a view, where they stand side by side."""
    if len(entries) and (np.diff(entries) == 1).all():
        return slice(int(entries[0]), int(entries[-1]) + 1)
    return torch.from_numpy(entries)


def _integers(name: str, given: Any) -> tuple[int, ...]:
    listed = given.tolist() if hasattr(given, "tolist") else given
    listed = listed if isinstance(listed, Sequence) else [listed]
    return tuple([checked_length(name, value) for value in listed])
