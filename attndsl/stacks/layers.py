"""The sublayers of a stack as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attndsl.execution.plan import PlanModule
from attndsl.stacks.tree import FeedForward
from attndsl.stage import Held

Pair = tuple[Tensor, Tensor]
"""Keys and values, [B, n, kv_heads, head_dim]."""


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

    def places(self, count: int, at: Tensor | None = None) -> dict[str, Any]:
        """Where the queries of `count` tokens and their keys stand, as a plan takes it; `at` [B, m] are the
        queries that there are, all if not given."""
        if not self.first and not self.held:
            return {} if at is None else {"q_positions": at}
        behind = [place for held in self.held for place in held.at]
        where: dict[str, Any] = {"n": self.first + count}
        if at is None:
            where["q_offset"] = self.first
        else:
            where["q_positions"] = at + self.first
        if behind == [*range(self.first - len(behind), self.first)]:
            return {**where, "k_offset": self.first - len(behind)}
        return {**where, "k_positions": torch.tensor([*behind, *range(self.first, self.first + count)])}


class Mixer(nn.Module):
    """Attention of x [B, n, width] with projections of its own; layers of one attention share a plan.

    placed: whether queries may be any of the tokens, and get what they get among all.
    """

    def __init__(self, plan: PlanModule, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.k = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o = nn.Linear(heads * head_dim, width, bias=False)
        self.attention = plan
        attention = plan.plan.attention
        others = attention.streams or attention.selected or attention.parts or attention.approx
        self.placed = not (others or attention.counts_queries)

    def queries(self, x: Tensor) -> Tensor:
        """[B, n, heads, head_dim]."""
        return _headed(self.q(x), self.heads)

    def keys(self, x: Tensor) -> Pair:
        """Of x [B, n, width]."""
        return _headed(self.k(x), self.kv_heads), _headed(self.v(x), self.kv_heads)

    def given(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the tables that the attention has."""
        names = [table.name for table in self.attention.plan.attention.inputs]
        return {name: tables[name] for name in names if name in tables}

    def mixed(self, q: Tensor, keys: Pair, tables: Mapping[str, Any], places: Mapping[str, Any]) -> Tensor:
        """[B, m, width] of queries that stand at `places`, among keys."""
        q, k, v = (x.transpose(1, 2) for x in (q, *keys))
        out = self.attention(q, k, v, **places, **self.given(tables))
        return cast(Tensor, self.o(out.transpose(1, 2).flatten(2)))


def _headed(x: Tensor, heads: int) -> Tensor:
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads)


class FFN(nn.Module):
    """`FeedForward` of x [B, n, width]."""

    def __init__(self, what: FeedForward, width: int) -> None:
        super().__init__()
        inner = round(what.times * width)
        self.chunks = what.chunks
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        pieces = [self.down(nn.functional.gelu(self.up(piece))) for piece in x.chunk(self.chunks, 1)]
        return torch.cat(pieces, 1) if len(pieces) > 1 else cast(Tensor, pieces[0])


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

    def forward(self, x: Tensor, near: Near) -> Tensor:
        return self.added(x, self.made(x, near))

    def made(self, x: Tensor, near: Near) -> Tensor:
        """What is added to the stream, made of x."""
        inner, normed = self.inner, self.before(x)
        if not isinstance(inner, Mixer):
            return cast(Tensor, self.behind(inner(normed)))
        return self.mixed(inner.queries(normed), inner.keys(normed), near)

    def mixed(self, q: Tensor, keys: Pair, near: Near, at: Tensor | None = None) -> Tensor:
        """Of queries at `at` [B, m], or of all tokens, among keys of all tokens and what is held."""
        assert isinstance(self.inner, Mixer)
        count = keys[0].shape[1]
        if near.held:
            held = self.inner.keys(self.before(torch.cat([held.x for held in near.held], 1)))
            keys = torch.cat([held[0], keys[0]], 1), torch.cat([held[1], keys[1]], 1)
        return cast(Tensor, self.behind(self.inner.mixed(q, keys, near.tables, near.places(count, at))))

    def added(self, x: Tensor, made: Tensor) -> Tensor:
        """x with what was made of it."""
        return cast(Tensor, self.after(x + made))
