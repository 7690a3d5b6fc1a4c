"""The sublayers of a stack as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from attndsl.execution.plan import PlanModule
from attndsl.stacks.tree import FeedForward, Layers
from attndsl.stage import Held

Pair = tuple[Tensor, Tensor]
"""Keys and values, [B, n, kv_heads, head_dim]."""

At = int | Tensor
"""Positions of tokens: that of the first of them in a row, or of each, [B, n] or [n]."""


@dataclass(frozen=True)
class Sizes:
    """Of an attention: query heads, heads of keys and values, numbers of a head."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, eq=False)
class Near:
    """What a sublayer has beside its input.

    tables: run-time inputs of attentions, by name.
    first:  position of the first token.
    held:   what its memories hold of earlier ones, the oldest first.
    """

    tables: Mapping[str, Any]
    first: int = 0
    held: tuple[Held, ...] = ()

    def where(self, index: Tensor | None = None) -> At:
        """Where the tokens stand, or those of them that `index` [B, m] numbers."""
        return self.first if index is None else index + self.first

    def places(
        self, count: int, at: Tensor | None = None, device: torch.device | None = None
    ) -> dict[str, Any]:
        """Where the queries of `count` tokens and their keys stand, as a plan on a device takes it; `at`
        [B, m] are the queries that there are, all if not given."""
        if not self.first and not self.held:
            return {} if at is None else {"q_positions": at}
        where: dict[str, Any] = {"n": self.first + count}
        if at is None:
            where["q_offset"] = self.first
        else:
            where["q_positions"] = at + self.first
        oldest = self.oldest()
        if oldest is not None:
            return {**where, "k_offset": oldest}
        new = torch.arange(self.first, self.first + count, device=device)
        return {**where, "k_positions": torch.cat([*(held.at for held in self.held), new])}

    def oldest(self) -> int | None:
        """Where what is held begins, if nothing is missing between that and the first token."""
        end = self.first
        for held in reversed(self.held):
            if held.first is None or held.first + held.many != end:
                return None
            end = held.first
        return end


def signalled(stage: Layers, x: Tensor, first: int, turn: int) -> Tensor:
    """x [B, n, width], whose first token stands at `first`, as it enters a turn: where the stage says so with
    sines and cosines of position and turn, sin(p / 10000^(2 j / width)) + sin(t / 10000^(2 j / width)) at 2 j
    and the cosines at 2 j + 1; turns count from 1 (Dehghani et al. 2019, section 2.1)."""
    if not stage.signal:
        return x
    width = x.shape[-1]
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    rates = 10000 ** (-torch.arange(0, width, 2, device=x.device, dtype=real) / width)
    places = torch.arange(first, first + x.shape[1], device=x.device, dtype=real)[:, None] * rates
    turns = (turn + 1) * rates
    waves = torch.stack([places.sin() + turns.sin(), places.cos() + turns.cos()], -1).flatten(1)
    return x + waves[:, :width].to(x.dtype)


class Projections(nn.Module):
    """Queries, keys and values of x [B, n, width]; without `v` the values are those of others, tied to keys
    are the queries.

    rotary: base of the angles by which queries and keys are turned; None where they are not.
    """

    def __init__(
        self,
        width: int,
        sizes: Sizes,
        *,
        tied: bool = False,
        values: bool = True,
        rotary: float | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.rotary = sizes, rotary
        self.q = nn.Linear(width, sizes.heads * sizes.head_dim, bias=False)
        self.k = None if tied else nn.Linear(width, sizes.kv_heads * sizes.head_dim, bias=False)
        self.v = nn.Linear(width, sizes.kv_heads * sizes.head_dim, bias=False) if values else None

    def queries(self, x: Tensor, at: At) -> Tensor:
        """[B, n, heads, head_dim] of x [B, n, width], whose tokens stand `at` positions."""
        return self._turned(_headed(self.q(x), self.sizes.heads), at)

    def keys(self, x: Tensor, at: At) -> Tensor:
        """[B, n, kv_heads, head_dim], likewise."""
        return self._turned(_headed((self.k or self.q)(x), self.sizes.kv_heads), at)

    def values(self, x: Tensor) -> Tensor:
        """[B, n, kv_heads, head_dim] of x [B, n, width]."""
        assert self.v is not None
        return _headed(self.v(x), self.sizes.kv_heads)

    def _turned(self, x: Tensor, at: At) -> Tensor:
        return x if self.rotary is None else turned(x, at, self.rotary)


def turned(x: Tensor, at: At, base: float) -> Tensor:
    """x [B, n, heads, head_dim] with the pairs (i, i + head_dim / 2) turned by p base^(-2 i / head_dim) at
    position p (Su et al. 2021, section 3.2.2; pairs as in GPT-NeoX)."""
    half = x.shape[-1] // 2
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    places = at if isinstance(at, Tensor) else torch.arange(at, at + x.shape[1], device=x.device)
    rates = base ** (-torch.arange(half, device=x.device, dtype=real) / half)
    angles = (places[..., None].to(real) * rates)[..., None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


class Mixer(Projections):
    """Attention of x [B, n, width] with projections of its own; layers of one attention share a plan.

    own:    parts of a sum with projections of their own, by name.
    made:   what makes run-time tables of x, by name.
    placed: whether queries may be any of the tokens, and get what they get among all.
    """

    def __init__(
        self,
        plan: PlanModule,
        width: int,
        sizes: Sizes,
        *,
        tied: bool = False,
        own: Mapping[str, bool] | None = None,
        made: Mapping[str, nn.Module] | None = None,
        rotary: float | None = None,
    ) -> None:
        super().__init__(width, sizes, tied=tied, rotary=rotary)
        self.o = nn.Linear(sizes.heads * sizes.head_dim, width, bias=False)
        self.own = nn.ModuleDict(
            {name: Projections(width, sizes, values=v, rotary=rotary) for name, v in (own or {}).items()}
        )
        self.made = nn.ModuleDict(made or {})
        self.attention = plan
        attention = plan.plan.attention
        others = attention.streams or attention.selected or attention.parts or attention.approx
        self.placed = not (others or attention.counts_queries or self.made)

    def pair(self, x: Tensor, at: At, q: Tensor | None = None) -> Pair:
        """Keys and values of x [B, n, width] `at` positions, whose queries are `q`."""
        k = self.keys(x, at) if q is None or self.k is not None else q
        return k, self.values(x)

    def beside(
        self, x: Tensor, at: At, tables: Mapping[str, Any], held: tuple[Tensor, At] | None
    ) -> dict[str, Any]:
        """What the attention takes beside q, k and v: those of `tables` that are its inputs, what is made of
        x, and what parts have of their own, of x and behind what is `held`."""
        names = [table.name for table in self.attention.plan.attention.inputs]
        given = {name: tables[name] for name in names if name in tables}
        given |= {name: maker(x) for name, maker in self.made.items()}
        for name, own in self.own.items():
            assert isinstance(own, Projections)
            q, k = own.queries(x, at), own.keys(x, at)
            k = k if held is None else torch.cat([own.keys(*held), k], 1)
            v = None
            if own.v is not None:
                v = own.values(x) if held is None else torch.cat([own.values(held[0]), own.values(x)], 1)
            given[name] = tuple(part.transpose(1, 2) for part in (q, k, v) if part is not None)
        return given

    def mixed(self, q: Tensor, pair: Pair, beside: Mapping[str, Any], places: Mapping[str, Any]) -> Tensor:
        """[B, m, width] of queries that stand at `places`, among keys."""
        q, k, v = (x.transpose(1, 2) for x in (q, *pair))
        out = self.attention(q, k, v, **places, **shared(beside, v))
        return cast(Tensor, self.o(out.transpose(1, 2).flatten(2)))


def flat(pair: Pair) -> Tensor:
    """Keys and values as one, [B, n, 2 kv_heads head_dim]."""
    return torch.cat([made.flatten(2) for made in pair], 2)


def shared(beside: Mapping[str, Any], v: Tensor) -> dict[str, Any]:
    """With the values of all for parts that have none of their own."""
    return {
        name: (*given, v) if isinstance(given, tuple) and len(given) == 2 else given
        for name, given in beside.items()
    }


def _headed(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


def traced() -> bool:
    """Whether torch compiles, traces or transforms what runs, and so decides itself what is kept of it."""
    whole = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return whole or torch._C._are_functorch_transforms_active()


class FFN(nn.Module):
    """`FeedForward` of x [B, n, width]. Where there are pieces, a backward pass makes the inside of each
    again, and none is kept; where it is `traced` all are."""

    def __init__(self, what: FeedForward, width: int) -> None:
        super().__init__()
        inner = round(what.times * width)
        self.chunks = what.chunks
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.chunks == 1:
            return self._inside(x)
        again = torch.is_grad_enabled() and not traced()
        return torch.cat(
            [self._again(piece) if again else self._inside(piece) for piece in x.chunk(self.chunks, 1)], 1
        )

    def _inside(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down(nn.functional.gelu(self.up(x))))

    def _again(self, x: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self._inside, x, use_reentrant=False, preserve_rng_state=False))


class Residual(nn.Module):
    """What one sublayer adds to x, with the norms around it."""

    def __init__(
        self, inner: Mixer | FFN, norm: str, make_norm: Callable[[int], nn.Module], width: int
    ) -> None:
        super().__init__()
        self.inner = inner
        self.before = make_norm(width) if norm in ("pre", "sandwich") else nn.Identity()
        self.behind = make_norm(width) if norm == "sandwich" else nn.Identity()
        self.after = make_norm(width) if norm == "post" else nn.Identity()

    def forward(self, x: Tensor, near: Near, alone: bool = False) -> Tensor:
        """x with what is made of it, or that alone."""
        made = self.made(x, near)
        return made if alone else self.added(x, made)

    def made(self, x: Tensor, near: Near) -> Tensor:
        """What is added to the stream, made of x."""
        inner, normed = self.inner, self.before(x)
        if not isinstance(inner, Mixer):
            return cast(Tensor, self.behind(inner(normed)))
        at = near.where()
        q = inner.queries(normed, at)
        return self.mixed(q, inner.pair(normed, at, q), near, normed)

    def mixed(self, q: Tensor, pair: Pair, near: Near, normed: Tensor, index: Tensor | None = None) -> Tensor:
        """Of queries of the tokens at `index` [B, m], or of all, among keys of all tokens and what is held;
        `normed` [B, n, width] are all tokens, of no use where an attention is `placed`."""
        inner, count = self.inner, pair[0].shape[1]
        held: tuple[Tensor, At] | None = None
        assert isinstance(inner, Mixer)
        if near.held:
            old = [self._pair(held) for held in near.held]
            pair = (
                torch.cat([*(k for k, _ in old), pair[0]], 1),
                torch.cat([*(v for _, v in old), pair[1]], 1),
            )
            if inner.own:
                held = self._normed(near.held)
        beside = inner.beside(normed, near.where(), near.tables, held)
        return cast(Tensor, self.behind(inner.mixed(q, pair, beside, near.places(count, index, q.device))))

    def _pair(self, held: Held) -> Pair:
        """Keys and values of what is held."""
        assert isinstance(self.inner, Mixer)
        if not held.pairs:
            return self.inner.pair(*self._normed([held]))
        k, v = held.x.chunk(2, 2)
        return _headed(k, self.inner.sizes.kv_heads), _headed(v, self.inner.sizes.kv_heads)

    def _normed(self, held: Sequence[Held]) -> tuple[Tensor, Tensor]:
        """The normed states of what is held, and where they stand."""
        x = self.before(torch.cat([one.x for one in held], 1))
        return x, torch.cat([one.at for one in held])

    def paired(self, x: Tensor, at: Tensor) -> Tensor:
        """Keys and values of states x [B, n, width] `at` positions, `flat` and detached."""
        assert isinstance(self.inner, Mixer)
        with torch.no_grad():
            return flat(self.inner.pair(self.before(x), at))

    def read(self, x: Tensor, states: Tensor) -> Tensor:
        """What queries of states x [B, n, width] get of others [B, m, width], [B, n, heads, head_dim], by
        softmax(Q K^T / sqrt(D)) V; gradients go to the others alone."""
        inner = self.inner
        assert isinstance(inner, Mixer)
        assert inner.v is not None
        norm = {name: weight.detach() for name, weight in self.before.named_parameters()}
        q = inner.q(self.before(x)).detach()
        normed = functional_call(self.before, norm, (states,))
        k, v = (nn.functional.linear(normed, of.weight.detach()) for of in (inner.k or inner.q, inner.v))
        headed = (_headed(q, inner.sizes.heads), *(_headed(made, inner.sizes.kv_heads) for made in (k, v)))
        q, k, v = (made.transpose(1, 2) for made in headed)
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)

    def added(self, x: Tensor, made: Tensor) -> Tensor:
        """x with what was made of it."""
        return cast(Tensor, self.after(x + made))
