"""What decoding keeps of keys that are streams: memory, slots, and tokens that slots are to be made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.eviction import eviction
from attndsl.analysis.holding import (
    Cache,
    by_head_of,
    first_most,
    last_reads,
    mask_tiles,
    masks_by_head,
    peak,
)
from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.expr import ZERO, Expr, all_of, any_of, const, eq, floordiv, le, lt, mod, sub, substitute, var
from attndsl.relations.proofs import follows
from attndsl.streams import K, Pool, Projection, Stream, Stretch, described, many_at, of_stream

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Array = NDArray[Any]
CAUSAL = le(K, var("q"))
TOKENS = Stretch()


def cache_of_streams(attention: Attention, length: int, heads: int, inputs: Mapping[str, ArrayLike]) -> Cache:
    """Of one attention, or of a sum whose parts are given the same keys, values and memory. Raises AttnError
    where it is not proved that no query reads a key after it."""
    parts = [part.attention for part in attention.parts] or [attention]
    for part in parts:
        for stream in part.streams:
            if isinstance(stream, Projection):
                raise fail(f"`{stream.keys.name}` makes keys of all tokens, later ones too")
        if not follows(part.any_head(), CAUSAL):
            raise fail(f"it is not proved that no query of `{part.name}` reads a key after it")
    held = Held.of(parts, length, heads, inputs)
    start, last = np.concatenate([*held.start.values()]), held.joined()
    rows = last.reshape(-1, last.shape[2])
    peaks = [peak(start, row) for row in rows]
    by_head = [max(peaks[head :: last.shape[1]], key=first_most) for head in range(last.shape[1])]
    widest = max(by_head, key=first_most)
    at = (start <= widest[1]) & (widest[1] <= rows[peaks.index(widest)])
    names, ends = [_name(stream) for stream in held.start], np.cumsum([len(x) for x in held.start.values()])
    by_stream: dict[str, int] = {}
    for name, here in zip(names, np.split(at, ends[:-1]), strict=True):
        if here.any():
            by_stream[name] = by_stream.get(name, 0) + int(here.sum())
    rules, bounded = zip(*(_rule(parts, held, length, heads, head) for head in range(heads)), strict=True)
    return Cache(
        widest[0],
        len(start),
        widest[1] if widest[0] else None,
        by_head_of(list(rules)),
        tuple(most for most, _ in by_head),
        max(peak(start, row)[0] for row in last.max(axis=1)),
        True,
        False if False in bounded else None if None in bounded else True,
        by_stream=by_stream,
    )


@dataclass(frozen=True)
class Held:
    """How long keys are held, by stream, all memory as one: from which step on, [keys], and until which one
    in each batch row and head, [B or 1, H or 1, keys]; -1 where no query reads them."""

    start: dict[Stream, Array]
    last: dict[Stream, Array]

    @staticmethod
    def of(parts: Sequence[Attention], length: int, heads: int, inputs: Mapping[str, ArrayLike]) -> Held:
        most = max(part.held for part in parts)
        start: dict[Stream, Array] = {TOKENS: np.arange(length)}
        if most:
            start[Stretch(-most, most)] = np.zeros(most, np.int64)
        last = {stream: np.full((1, 1, len(steps)), -1) for stream, steps in start.items()}
        for part in parts:
            given = {table.name: inputs[table.name] for table in part.inputs if table.name in inputs}
            tiles = mask_tiles(part, length, heads, given)
            reads, first = np.stack([last_reads(grid) for grid in tiles.grids])[tiles.index], 0
            for stream in part.streams or (TOKENS,):
                many = many_at(stream, length)
                read, first = reads[..., first : first + many], first + many
                if isinstance(stream, Stretch) and stream.length is not None:
                    before = np.full((*read.shape[:2], most + stream.first), -1)
                    behind = np.full((*read.shape[:2], -stream.first - many), -1)
                    stream, read = Stretch(-most, most), np.concatenate([before, read, behind], 2)
                if isinstance(stream, Pool):
                    start[stream] = np.zeros(many, np.int64)
                    if stream.of == TOKENS:
                        start[stream] = np.arange(many) * stream.stride + stream.size - 1
                        needed = _tokens_of(stream, start[stream], read, length)
                        last[TOKENS] = np.maximum(last[TOKENS], needed)
                last[stream] = np.maximum(last.get(stream, -1), read)
        return Held(start, last)

    def joined(self) -> Array:
        """[B or 1, H or 1, keys of all streams]"""
        shape = np.broadcast_shapes(*(x.shape[:2] for x in self.last.values()))
        return np.concatenate(
            [np.broadcast_to(self.last[s], (*shape, len(steps))) for s, steps in self.start.items()], 2
        )


def _tokens_of(pool: Pool, made: Array, read: Array, length: int) -> Array:
    """Until which step tokens are needed to make the slots that are read."""
    until = np.full((*read.shape[:2], length), -1)
    steps = np.where(read >= made, made, -1)
    for i in range(pool.size if len(made) else 0):
        here = until[..., i : i + pool.stride * (len(made) - 1) + 1 : pool.stride]
        np.maximum(here, steps, out=here)
    return until


def _rule(
    parts: Sequence[Attention], held: Held, length: int, heads: int, head: int
) -> tuple[str, bool | None]:
    """Which keys a head keeps, in words, and whether their number is bounded."""
    tokens: list[Expr] = []
    said: dict[str, bool | None] = {}
    for part in parts:
        streams = part.streams or (TOKENS,)
        mask = [*masks_by_head(part, heads)][head]
        for i, stream in enumerate(streams):
            here = of_stream(streams, mask, i) if part.streams else mask
            if stream == TOKENS:
                tokens.append(here)
            elif isinstance(stream, Pool) and stream.of == TOKENS:
                words, bounded = _slots(stream, here)
                said[f"{_name(stream)}: {words}"] = bounded
                said[f"tokens of a slot that is not over: at most {stream.size - 1}"] = True
    for stream in held.start:
        if TOKENS in (stream, *([stream.of] if isinstance(stream, Pool) else [])):
            continue
        last = held.last[stream][:, min(head, held.last[stream].shape[1] - 1)].max(initial=-1)
        words = "keep everything" if last == length - 1 else f"until step {last}"
        said[f"{_name(stream)}: {words if last >= 0 else 'nothing'}"] = True
    if tokens:
        mask = any_of(*tokens)
        found = eviction(mask, length if "n" in mask.free else 0)
        said = {f"tokens: {found.rule}": found.bounded, **said}
    growth = {*said.values()}
    return "; ".join(said), False if False in growth else None if None in growth else True


def _slots(pool: Pool, mask: Expr) -> tuple[str, bool | None]:
    """Of a mask over q and the slot `k`."""
    over = all_of(lt(K, pool.many), le(pool.position(K), var("q")))
    if follows(over, mask):
        return "keep everything", False
    place = sub(K, const(pool.size - 1))
    whole = all_of(le(ZERO, place), eq(mod(place, const(pool.stride)), ZERO))
    at = all_of(whole, substitute(mask, {"k": floordiv(place, const(pool.stride))}))
    found = eviction(at, 0)
    if "n" in mask.free or found.enough is None:
        return "each until its last reader", None if "n" in mask.free else found.bounded
    first, last = found.enough
    parts = [f"that end in the first {first} tokens"] * (first > 0) + [f"in the last {last} tokens"] * (
        last > 0
    )
    return f"those {' and '.join(parts)}" if parts else "nothing", True


def _name(stream: Stream) -> str:
    return "memory" if isinstance(stream, Stretch) and stream.length is not None else described((stream,))
