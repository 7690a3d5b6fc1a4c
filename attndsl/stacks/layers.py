"""The sublayers of a stack as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from attndsl.execution.plan import PlanModule
from attndsl.stacks.tree import FeedForward


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

    def forward(self, x: Tensor, tables: Mapping[str, Any]) -> Tensor:
        return self.mixed(self.queries(x), *self.keys(x), tables)

    def queries(self, x: Tensor) -> Tensor:
        """[B, n, heads, head_dim]."""
        return _headed(self.q(x), self.heads)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, [B, n, kv_heads, head_dim]."""
        return _headed(self.k(x), self.kv_heads), _headed(self.v(x), self.kv_heads)

    def given(self, tables: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the tables that the attention has."""
        names = [table.name for table in self.attention.plan.attention.inputs]
        return {name: tables[name] for name in names if name in tables}

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, tables: Mapping[str, Any], at: Tensor | None = None
    ) -> Tensor:
        """[B, m, width] of queries that stand at `at` [B, m], or are those of all tokens."""
        given = self.given(tables)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = (
            self.attention(q, k, v, **given)
            if at is None
            else self.attention(q, k, v, q_positions=at, **given)
        )
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

    def forward(self, x: Tensor, tables: Mapping[str, Any]) -> Tensor:
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

    def forward(self, x: Tensor, tables: Mapping[str, Any]) -> Tensor:
        return self.added(x, self.inner(self.before(x), tables))

    def added(self, x: Tensor, made: Tensor) -> Tensor:
        """x with what `inner` made of it."""
        return cast(Tensor, self.after(x + self.behind(made)))
