"""Session: the keys and values of sequences that grow, and attention of their new tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl.analysis.lasting import kept, over_length
from attndsl.axis import Axis, joined
from attndsl.errors import fail, quantity
from attndsl.keywords import by_name, checked_dtype, missing
from attndsl.tiles.lowering import ARGUMENTS, check_names, checked_length

if TYPE_CHECKING:
    from attndsl.execution.plan import Plan

Array = NDArray[np.int64]
REWIND = 1
STEP = ("chunk", "tokens", "learned")
"""Beside which steps take tables."""


class Session:
    """A cache of keys and values, one sequence a batch row, that a plan attends to.

    What a step gives is what the plan gives for the last tokens of each sequence alone, without a cache.

    k, v     [B, Hkv, slots, D and Dv]. Position p of a row is slot p, for ever. Where it is proved that
             queries read only the first `first` keys and some last ones, and no table is over n, there are
             `ring` slots for all positions from `first` on: p has slot first + (p - first) mod ring, and
             sequences have no end
    most     tokens that a row may have; None: as many as come
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
        self.first, self.ring = self._places(capacity)
        if self.slots > p.length:
            raise fail(
                f"the cache has {self.slots} slots, and the plan serves up to {p.length} keys",
                help=f"compile with `length={self.slots}`",
            )
        self.most = None if self.ring else self.slots
        self.at_once = min(p.q_length, max(rewind, p.length - self.slots) if self.ring else p.length)
        name = checked_dtype(dtype or p.dtype)
        self.k, self.v = (
            torch.zeros(batch, p.kv_heads, self.slots, width, dtype=getattr(torch, name), device=p.device)
            for width in (p.head_dim, p.head_dim if v_dim is None else checked_length("v_dim", v_dim))
        )
        self.lengths = self.reached = (0,) * batch
        self.wanting = [f"`{x.name}`" for x in plan.attention.learned if x.learned and p.training]
        self.learned: Callable[[], Mapping[str, Tensor]] | None = None
        """Of the module that made it."""

    def _places(self, capacity: int) -> tuple[int, int]:
        """`first` and `ring`."""
        found = kept(self.plan.attention, self.plan.problem)
        if found is not None and not over_length(self.plan.attention):
            first, last = found
            if first + last - 1 + self.rewind < capacity:
                return first, last - 1 + self.rewind
        return capacity, 0

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            raise missing("a session", name, dir(Session))

    def __repr__(self) -> str:
        rows = f"{len(self.lengths)} row{'s' * (len(self.lengths) != 1)}"
        listed = ", ".join([*map(str, self.lengths[:8]), *["..."] * (len(self.lengths) > 8)])
        dtype = str(self.k.dtype).removeprefix("torch.")
        held = f"{rows} of {listed or 'no'} tokens, {self._room()}, {dtype} on {self.k.device}"
        return f"<session of {self.plan.attention.name}: {held}>"

    def _room(self) -> str:
        """How many keys there is room for."""
        first = f"the first {self.first} and " if self.first else "the "
        return f"{first}last {self.ring} kept" if self.ring else f"capacity {self.slots}"

    @property
    def slots(self) -> int:
        """Keys that there is room for."""
        return self.first + self.ring

    @by_name
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
        `learned` and `inputs` are as in a call of the plan, `n` being the length of the longest row then.
        Raises AttnError for what does not fit, also beyond the capacity; then no token has been added.
        """
        return self.prefill(q, k, v, tokens=tokens, learned=learned, **inputs)

    @by_name
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
        """As `step`, of many tokens at once.

        q, k, v  [B, H, m, D], [B, Hkv, m, D] and [B, Hkv, m, Dv] -> [B, H, m, Dv]
        chunk    tokens that are attended to at a time; as many as the plan serves if not given
        tokens   how many there are of each row, or one number for all; m if not given
        learned  values of parameters by name; `inputs` run-time tables by name

        Raises AttnError as `step`.
        """
        check_step(inputs)
        if inputs:
            check_names(self.plan.attention, inputs, beside=STEP)
        size = self.at_once if chunk is None else min(checked_length("chunk", chunk), self.at_once)
        if size == 0:
            raise fail("`chunk` is 0, and must be positive")
        refuse_gradients(q, k, v, *inputs.values())
        if learned is None and self.learned is not None:
            learned = self.learned()
        if learned is None and self.wanting:
            raise fail(
                f"a session of a plan for training has no values of {', '.join(self.wanting)}",
                help="make it of the module: `module.session(batch, capacity)`",
            )
        if torch.is_autocast_enabled(self.k.device.type):
            q, k, v = self._cast(q, k, v)
        counts = self._counts(q, k, v, tokens)
        n = max((length + count for length, count in zip(self.lengths, counts, strict=True)), default=0)
        if inputs:
            self._check_tables(inputs, k.shape[2], n)
        found = []
        # parameters would have gradients that a cache knows nothing of
        with torch.no_grad():
            for i in range(0, max(k.shape[2], 1), size):
                new = [x[:, :, i : i + size] for x in (q, k, v)]
                here = tuple([min(max(count - i, 0), size) for count in counts])
                found.append(self._append(new[0], new[1], new[2], here, n, learned=learned, **inputs))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def hold(self, k: Tensor, v: Tensor) -> None:
        """The next tokens of every row, k [B, Hkv, m, D], v [B, Hkv, m, Dv], which ask nothing themselves.

        Raises AttnError as `step`.
        """
        refuse_gradients(k, v)
        counts = self._counts(k, k, v, None)
        starts = self.lengths
        self.lengths = tuple(start + count for start, count in zip(starts, counts, strict=True))
        self.reached = tuple(map(max, self.reached, self.lengths))
        if any(counts):
            alike = slice(0, 1 if len(set(starts)) == 1 else None)
            self._write(k, v, starts[alike], self.lengths[alike])

    def _check_tables(self, inputs: Mapping[str, Any], new: int, n: int) -> None:
        """Raises AttnError for a table of the new tokens alone, where there were others before them."""
        for table in self.plan.attention.inputs:
            if table.name in inputs and "n" in table.dims and new != n:
                shape = np.shape(inputs[table.name])
                if len(shape) == len(table.dims) and shape[table.dims.index("n")] == new:
                    said = f"`{table.name}` has {quantity(new, 'entry', 'entries')}, and there are {n} tokens"
                    raise fail(said, help="give the entries of all tokens so far, not of the new ones alone")

    @by_name
    def copy(self) -> Session:
        """Another one that has its own memory."""
        made = copy.copy(self)
        made.k, made.v = self.k.clone(), self.v.clone()
        return made

    @by_name
    def reorder(self, rows: Any) -> None:
        """Row i becomes what row `rows[i]` was; as many rows as are named, some maybe more than once."""
        chosen = _integers("rows", rows)
        chosen = (chosen,) if isinstance(chosen, int) else chosen
        for row in chosen:
            if row >= len(self.lengths):
                raise fail(f"there is no row {row} of {len(self.lengths)}")
        self._take(chosen, torch.tensor(chosen, dtype=torch.int64, device=self.k.device))

    def _take(self, rows: Sequence[int], at: Tensor) -> None:
        self.k, self.v = self.k[at], self.v[at]
        self.lengths, self.reached = (tuple([x[row] for row in rows]) for x in (self.lengths, self.reached))

    @by_name
    def truncate(self, lengths: Any) -> None:
        """Only the first tokens are left: `lengths` of them, one number for each row or one for all.

        Where slots are used again, at most `rewind` back from the most that the row ever had. Raises
        AttnError beyond that, and for more tokens than there are.
        """
        wanted = self._each("lengths", lengths)
        for row, (new, old, most) in enumerate(zip(wanted, self.lengths, self.reached, strict=True)):
            if new > old:
                raise fail(f"row {row} has {old} tokens, and is to be truncated to {new}")
            if self.first < new < old and new < (back := self._back(row)):
                raise fail(
                    f"row {row} had {most} tokens, and goes back to {back}, not to {new}",
                    help=f"make the session with `rewind={most - new}`",
                )
        self.lengths = wanted
        # where none but the first keys are left, what else the slots hold is never read
        self.reached = tuple(
            [new if new <= self.first else most for new, most in zip(wanted, self.reached, strict=True)]
        )

    def _back(self, row: int) -> int:
        """The least length that a row goes back to."""
        most = self.reached[row]
        return most - self.rewind if most > self.slots else 0

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
                rows = f"a session of {quantity(here[0], 'row')} is `plan.session({here[0]}, capacity)`"
                help = rows if here[1:] == there[1:] else ""
                raise fail(f"`{name}` is {here}, and what the session holds is like {there}", help=help)
            if (x.dtype, x.device) != (cache.dtype, cache.device):
                dtype, held = (str(y.dtype).removeprefix("torch.") for y in (x, cache))
                help = f'make the session with `dtype="{dtype}"`'
                if x.device != cache.device:
                    help = f"pass `{name}.to('{cache.device}')`"
                said = f"`{name}` is {dtype} on {x.device}"
                raise fail(f"{said}, and the session holds {held} on {cache.device}", help=help)
        if not q.shape[2:3] == k.shape[2:3] == v.shape[2:3]:
            help = "give those of new tokens alone: the session holds the others"
            raise fail("`q`, `k` and `v` are of the same tokens, and differ in length", help=help)
        size = k.shape[2]
        counts = self._each("tokens", size if tokens is None else tokens)
        for row, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            if count > size:
                raise fail(f"row {row} has {count} new tokens, and {size} are given")
            if self.most is not None and length + count > self.most:
                raise fail(
                    f"row {row} has {length} tokens and gets {count} more, and the capacity is {self.most}"
                )
        return counts

    def _each(self, name: str, given: Any) -> tuple[int, ...]:
        """A list has one number for each row; a number is for all."""
        rows, found = len(self.lengths), _integers(name, given)
        if isinstance(found, int):
            return (found,) * rows
        if len(found) != rows:
            help = f"write `{found[0]}`, which is for all rows" if len(found) == 1 else ""
            entries = quantity(len(found), "entry", "entries")
            raise fail(f"`{name}` has {entries} for {quantity(rows, 'row')}", help=help)
        return found

    def _append(
        self, q: Tensor, k: Tensor, v: Tensor, counts: tuple[int, ...], n: int, **call: Any
    ) -> Tensor:
        if not any(counts):
            return q.new_zeros(*q.shape[:3], v.shape[3])
        size, starts = k.shape[2], self.lengths
        grown = tuple([start + count for start, count in zip(starts, counts, strict=True)])
        padded, ends = min(counts) < size, grown
        if not padded and len(set(starts)) == 1:
            # one row stands for all
            starts, ends = starts[:1], ends[:1]
        place: dict[str, Any] = {"q_offset": list(starts)}
        if padded:
            # what stands behind the tokens of a row reads what the last of them reads
            last = np.maximum(np.array(ends) - 1, 0)[:, None]
            place = {"q_positions": np.minimum(following(starts, size), last)}
        if not self.ring:
            place["n"] = n
        # also where the call fails, slots have been taken
        self.reached = tuple(map(max, self.reached, grown))
        most = max(ends)
        apart = self.ring and size > self.rewind and most > self.slots
        if apart:
            # the new keys would take the slots of what the first of them read
            held = min(max(starts), self.slots)
            there = self._held(starts)
            before = np.stack([there.positions(row) for row in range(len(starts))])[:, :held]
            before = np.where(before < np.array(starts)[:, None], before, np.array(ends)[:, None])
            place["k_positions"] = np.concatenate([before, following(starts, size)], 1)
            keys, values = (
                torch.cat([cache[:, :, :held], x], 2) if held else x
                for cache, x in ((self.k, k), (self.v, v))
            )
        else:
            self._write(k, v, starts, ends)
            keys, values = (cache[:, :, : min(most, self.slots)] for cache in (self.k, self.v))
            if most > self.slots:
                place["k_positions"] = self._held(ends)
        out: Tensor = self.plan(q, keys, values, **place, **call)
        if apart:
            self._write(k, v, starts, ends)
        self.lengths = grown
        if padded:
            behind = torch.tensor(counts)[:, None] <= torch.arange(size)
            out = out.masked_fill(behind.to(out.device)[:, None, :, None], 0.0)
        return out

    def _held(self, lengths: Sequence[int]) -> Axis:
        """What each slot holds in rows of these lengths: the last that was written; in a slot without any the
        first that will be, which no query reads yet."""
        rows = []
        for length in lengths:
            turns, end = divmod(max(length - 1 - self.first, 0), self.ring)
            starts = {0: 0, self.first: turns, self.first + end + 1: max(turns - 1, 0)}
            pieces = [(slot, slot + turn * self.ring) for slot, turn in starts.items() if slot < self.slots]
            rows.append(joined(pieces))
        return Axis(self.slots, tuple(rows))

    def _write(self, k: Tensor, v: Tensor, starts: Sequence[int], ends: Sequence[int]) -> None:
        """The new tokens, one row of starts and ends for all or one each, but those whose slots later ones
        of them take."""
        pairs = (self.k, k), (self.v, v)
        if len(starts) == 1:
            for slot, entry, size in self._runs(starts[0], ends[0]):
                for cache, new in pairs:
                    cache[:, :, slot : slot + size] = new[:, :, entry : entry + size]
            return
        taken = [
            (row, slot + i, entry + i)
            for row, (start, end) in enumerate(zip(starts, ends, strict=True))
            for slot, entry, size in self._runs(start, end)
            for i in range(size)
        ]
        rows, slots, entries = torch.tensor(taken).unbind(1)
        for cache, new in pairs:
            cache[rows, :, slots] = new[rows, :, entries]

    def _runs(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Of the tokens at positions start..end - 1 those that stay: slot and number of the first, and how
        many stand side by side."""
        if start < self.first:
            yield start, 0, min(end, self.first) - start
        at = max(start, self.first, end - self.ring)
        while at < end:
            slot = (at - self.first) % self.ring
            size = min(end - at, self.ring - slot)
            yield self.first + slot, at - start, size
            at += size


def refuse_gradients(*given: Any) -> None:
    """Raises AttnError for a tensor whose gradient would be lost; parameters have theirs from calls."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
        raise fail("a session has no gradients", help="decode under `torch.no_grad()`")


def check_step(given: Mapping[str, Any]) -> None:
    """Raises AttnError for arguments of a call that are none of a step."""
    for name in filter(ARGUMENTS.__contains__, given):
        help = "a session knows where its tokens stand, and gives their output alone"
        if name == "memory":
            help = "give it at the start: `plan.session(batch, capacity, memory=(keys, values))`"
        raise fail(f"a step takes no `{name}`", help=help)


def following(starts: Sequence[int] | Array, size: int) -> Array:
    """int64 [rows, size]"""
    return np.array(starts)[:, None] + np.arange(size)


def picked(x: Tensor, entries: Array) -> Tensor:
    """Of each batch row [B, H, n, D]; those beyond the last are never read."""
    first, size = entries[0], entries.shape[1]
    if (entries == first).all() and (np.diff(first) == 1).all():
        start = int(first[0]) if size else 0
        return x[:, :, start : start + size].clone()
    at = torch.from_numpy(np.minimum(entries, x.shape[2] - 1)).to(x.device)
    return x.gather(2, at[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _integers(name: str, given: Any) -> tuple[int, ...] | int:
    listed = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(listed, str | bytes):
        raise fail(f"`{name}` is an integer or a list of them, not {type(listed).__name__}")
    if not isinstance(listed, Sequence):
        return checked_length(name, listed)
    if any(isinstance(value, Sequence) for value in listed):
        help = f"write `{listed[0]}`" if len(listed) == 1 else ""
        raise fail(f"`{name}` is a list of lists, and has one number for each row", help=help)
    return tuple([checked_length(name, value) for value in listed])
