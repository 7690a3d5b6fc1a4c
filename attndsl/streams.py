"""Streams: what the keys of an attention are where they are not the tokens, and where those stand.

Keys of several streams are one list, in the order of the text. An entry of it has a number, and masks and
scores are written over that: tokens have their positions, what is before them the numbers below 0, what is
behind them those from n on. Where there are no tokens, the last memory ends at -1, as it does before tokens;
without memory too, numbers begin at 0.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from attndsl.expr import (
    FALSE,
    TRUE,
    ZERO,
    Expr,
    Table,
    add,
    all_of,
    any_of,
    const,
    exists,
    floordiv,
    le,
    lt,
    maximum,
    mul,
    neg,
    nodes,
    number,
    rebuild,
    sub,
    substitute,
    var,
    where,
)

K, N, SLOT = var("k"), var("n"), var("?slot")
"""SLOT is a slot of a stream, a name that no text has."""


@dataclass(frozen=True)
class Stretch:
    """Keys that are given: tokens, whose `length` is None, or memory, from position `first` on."""

    first: int = 0
    length: int | None = None

    @property
    def many(self) -> Expr:
        return N if self.length is None else const(self.length)

    @property
    def tables(self) -> tuple[Table, ...]:
        return ()

    def position(self, slot: Expr) -> Expr:
        return add(slot, const(self.first))

    def sources(self, slot: Expr) -> tuple[Expr, Expr]:
        """The first and the last position of the keys that a slot is made of."""
        return self.position(slot), self.position(slot)


@dataclass(frozen=True)
class Pool:
    """A slot for every `stride` keys of a stretch, made of `size` of them; it stands at the last. Keys that
    fill none at the end are in none.

    by, values  `mean`, `max` or numbers [size], [size, D] or [size, D, D]: for keys, and for values
    """

    of: Stretch
    size: int
    stride: int
    by: Literal["mean", "max"] | Table
    values: Literal["mean", "max"] | Table

    @property
    def made_by(self) -> tuple[Literal["mean", "max"] | Table, ...]:
        """Of keys, and of values."""
        return self.by, self.values

    @property
    def many(self) -> Expr:
        found = maximum(add(self.of.many, const(self.stride - self.size)), ZERO)
        return floordiv(found, const(self.stride))

    @property
    def tables(self) -> tuple[Table, ...]:
        return tuple(x for x in self.made_by if isinstance(x, Table))

    def position(self, slot: Expr) -> Expr:
        return self.sources(slot)[1]

    def sources(self, slot: Expr) -> tuple[Expr, Expr]:
        first = add(mul(const(self.stride), slot), const(self.of.first))
        return first, add(first, const(self.size - 1))


@dataclass(frozen=True)
class Projection:
    """Slots that are sums of all tokens, [m, n] times keys and [m, n] times values; they stand nowhere."""

    keys: Table
    values: Table

    @property
    def made_by(self) -> tuple[Table, Table]:
        """Of keys, and of values."""
        return self.keys, self.values

    @property
    def slots(self) -> int:
        return int(self.keys.explicit[0])

    @property
    def many(self) -> Expr:
        return const(self.slots)

    @property
    def tables(self) -> tuple[Table, ...]:
        return self.made_by

    def sources(self, slot: Expr) -> tuple[Expr, Expr]:
        return ZERO, sub(N, const(1))


Stream = Stretch | Pool | Projection
Streams = tuple[Stream, ...]


def many_at(stream: Stream, n: int) -> int:
    """How many entries it has where there are n tokens."""
    many = number(substitute(stream.many, {"n": const(n)}))
    assert isinstance(many, int)
    return many


def starts(streams: Streams) -> list[Expr]:
    """The number of the first entry of each stream, and the one behind the last."""
    ends = [i + 1 for i, stream in enumerate(streams) if isinstance(stream, Stretch)]
    before = streams[: streams.index(Stretch()) if Stretch() in streams else max(ends, default=0)]
    found = [neg(add(*(s.many for s in before))) if before else ZERO]
    for stream in streams:
        found.append(add(found[-1], stream.many))
    return found


@dataclass(frozen=True)
class Numbers:
    """The number of the first entry, and how many entries there are, over n."""

    first: Expr
    count: Expr

    @staticmethod
    def of(streams: Streams) -> Numbers:
        found = starts(streams)
        return Numbers(found[0], sub(found[-1], found[0]))

    def at(self, n: int) -> tuple[int, int]:
        first, count = (number(substitute(e, {"n": const(n)})) for e in (self.first, self.count))
        assert isinstance(first, int)
        assert isinstance(count, int)
        return first, count

    def tokens(self, entries: int, least: int) -> int:
        """The fewest from `least` on that make as many entries; `least` where no number of tokens does."""
        if self.count.op == "const":
            return least
        most = max(least, 1)
        while self.at(most)[1] < entries:
            most *= 2
        return least + bisect_left(range(least, most), entries, key=lambda n: self.at(n)[1])


def memory(streams: Streams) -> int:
    """How many keys of memory they read."""
    return -min([0, *[stretch.first for stretch in stretches(streams)]])


def stretches(streams: Streams) -> Iterator[Stretch]:
    for stream in streams:
        if isinstance(stream, Pool):
            yield stream.of
        elif isinstance(stream, Stretch):
            yield stream


def over(streams: Streams, e: Expr) -> list[Expr]:
    """An expression over the position `k` of a key and its `stream`, for the entries of each one. Of slots
    that stand nowhere `k` is left in it where it is asked for."""
    found = []
    for i, (stream, start) in enumerate(zip(streams, starts(streams), strict=False)):
        here = substitute(e, {"stream": const(i)})
        if not isinstance(stream, Projection):
            here = substitute(here, {"k": stream.position(sub(K, start))})
        found.append(here)
    return found


def numbered(streams: Streams, e: Expr) -> Expr:
    """The same over the number `k` of an entry."""
    ends: list[tuple[Expr, Expr]] = []
    for start, here in zip(starts(streams), over(streams, e), strict=False):
        if not ends or ends[-1][1] is not here:
            ends.append((start, here))
    if e.type != "bool" or len(ends) == 1:
        found = ends[-1][1]
        for (start, _), (_, here) in zip(ends[:0:-1], ends[-2::-1], strict=True):
            found = where(lt(K, start), here, found)
        return found
    parts = []
    for i, (start, here) in enumerate(ends):
        last = i + 1 == len(ends)
        inside = (le(start, K) if i else TRUE, TRUE if last else lt(K, ends[i + 1][0]))
        parts.append(all_of(*inside, here))
    return any_of(*parts)


def of_stream(streams: Streams, e: Expr, i: int) -> Expr:
    """Of an expression over the number `k` of an entry what it is for those of stream i, over `k` as their
    slot: where streams begin, which `numbered` asks for, is decided."""
    begins = starts(streams)
    known = {le(start, K): TRUE if j <= i else FALSE for j, start in enumerate(begins)}
    known |= {lt(K, start): TRUE if j > i else FALSE for j, start in enumerate(begins)}
    for node in nodes(e):
        if node not in known:
            known[node] = rebuild(node, tuple([known[arg] for arg in node.args]))
    return substitute(known[e], {"k": add(begins[i], K)})


def at_slots(streams: Streams, mask: Expr) -> Iterator[tuple[Stream, Expr]]:
    """Each stream with the mask at its slot SLOT."""
    for stream, start in zip(streams, starts(streams), strict=False):
        yield stream, substitute(mask, {"k": add(start, SLOT)})


def tokens_read(streams: Streams, mask: Expr) -> Expr:
    """Which tokens `k` a query reads, in its keys or in what these are made of. `mask` is over entries, and
    is itself what is read where keys are the tokens."""
    return any_of(*read_by_each(streams, mask)) if streams else mask


def read_by_each(streams: Streams, mask: Expr) -> list[Expr]:
    """The same of each stream, none of memory."""
    found = []
    for stream, here in at_slots(streams, mask):
        if stream == Stretch():
            found.append(mask)
        elif isinstance(stream, Projection) or Stretch() in stretches((stream,)):
            first, last = stream.sources(SLOT)
            made = all_of(le(first, K), le(K, last), here)
            found.append(exists("?slot", ZERO, stream.many, made))
        else:
            found.append(FALSE)
    return found


def some_key(streams: Streams, mask: Expr) -> Expr:
    """Whether a query has a key in `mask`, which is over entries: a relation that holds one where it does,
    and `mask` itself where keys are the tokens."""
    if not streams:
        return mask
    return any_of(*(exists("?slot", ZERO, s.many, here) for s, here in at_slots(streams, mask)))


def described(streams: Sequence[Stream]) -> str:
    """In words, with the number of those that have one."""
    return ", ".join(map(_described, streams))


def listed(streams: Streams, n: int) -> str:
    """In words, with the places of their entries: a line, and none where there are no streams."""
    parts, place = [], 0
    for stream in streams:
        many = many_at(stream, n)
        if many:
            parts.append(f"{place:,}..{place + many - 1:,} {_kind(stream)}")
        place += many
    return f"keys {', '.join(parts)}\n" if parts else ""


def _described(stream: Stream) -> str:
    match stream:
        case Stretch(length=int(length)):
            return f"{length:,} of memory"
        case Projection():
            return f"{stream.slots:,} projected"
    return _kind(stream)


def _kind(stream: Stream) -> str:
    match stream:
        case Stretch(length=length):
            return "tokens" if length is None else "memory"
        case Projection():
            return "projected"
    of = "tokens" if stream.of.length is None else f"of {stream.of.length:,} of memory"
    every = "" if stream.size == stream.stride else f", one every {stream.stride}"
    return f"slots of {stream.size} {of}{every}"
