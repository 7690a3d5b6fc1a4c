"""Selecting: every choice of an attention, of given or of drawn q and k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.attention import Attention
from attndsl.axis import Axis
from attndsl.errors import asking, fail
from attndsl.execution import registry
from attndsl.expr import Drawn, Expr, Selected, Table
from attndsl.meaning import draws
from attndsl.selection import Offered, Selection
from attndsl.tiles import lowering
from attndsl.tiles.lowering import Sizes

if TYPE_CHECKING:
    from torch import Tensor

DRAWN_PAIRS = 2**26
"""Queries times keys times heads up to which a choice is drawn to show what one looks like."""


def drawn(
    attention: Attention, sizes: Sizes, kv_heads: int, head_dim: int, tables: Mapping[str, Any], seed: int = 0
) -> dict[str, NDArray[np.int64]]:
    """What is chosen of normal q and k, equal for equal seeds, by name of the table, one batch row.

    Raises AttnError where an input is missing, and where it would take long.
    """
    import torch

    lowering.check_names(attention, tables, [t for t in attention.inputs if t in _read(attention)])
    pairs = sizes.q.length * sizes.k.length * sizes.heads
    if pairs > DRAWN_PAIRS:
        raise fail(
            f"a choice is drawn for {DRAWN_PAIRS:,} pairs of a query and a key at most, not {pairs:,}",
            help="take a shorter length",
        )
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((1, sizes.heads, sizes.q.length, head_dim), generator=generator)
    k = torch.randn((1, kv_heads, sizes.k.length, head_dim), generator=generator)
    given = {name: torch.as_tensor(np.asarray(array)) for name, array in tables.items()}
    return {name: found.numpy() for name, found in choices(attention, q, k, given, sizes).items()}


def choices(
    attention: Attention, q: Tensor, k: Tensor, tables: Mapping[str, Tensor], sizes: Sizes
) -> dict[str, Tensor]:
    """What is chosen for q [B, H, nq, D] of k [B, Hkv, n, D], by name of the table.

    Raises AttnError where positions are not such as the kind of a choice needs.
    """
    import torch

    wide = torch.promote_types(q.dtype, torch.float32)
    read = {t for table in attention.selected for e in parts(table) for t in e.tables}
    constants = {
        t.name: torch.tensor(draws.drawn(t.origin, int(t.dims[0]), q.shape[3]), dtype=wide, device=q.device)
        for t in read
        if isinstance(t.origin, Drawn)
    }
    k, k_at = _in_order(k.detach().to(wide), sizes.k)
    offered = Offered(q.detach().to(wide), k, {**tables, **constants}, sizes.q, k_at, sizes.n)
    # autocast would round the scores, which are in float32 on purpose
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return {table.name: _choice(table, offered) for table in attention.selected}


def _in_order(k: Tensor, at: Axis) -> tuple[Tensor, Axis]:
    """Keys by rising position, for among equals the first is chosen."""
    import torch

    places = [at.positions(row) for row in range(len(at.rows))]
    if all((place[1:] > place[:-1]).all() for place in places):
        return k, at
    orders = [torch.from_numpy(place.argsort(kind="stable")).to(k.device) for place in places]
    rows = [k[b].index_select(1, orders[b % len(orders)]) for b in range(len(k))]
    return torch.stack(rows) if rows else k, Axis.of(np.sort(places))


def parts(table: Table) -> list[Expr]:
    """The scores that a choice goes by."""
    assert isinstance(table.origin, Selected)
    return [value for _, value in table.origin.arguments if isinstance(value, Expr)]


def _read(attention: Attention) -> set[Table]:
    """What its choices look up."""
    origins = [table.origin for table in attention.selected if isinstance(table.origin, Selected)]
    given = [x for origin in origins for x in (*(value for _, value in origin.arguments), origin.of)]
    looked_up = (x.tables if isinstance(x, Expr) else [x] if isinstance(x, Table) else [] for x in given)
    return {table for tables in looked_up for table in tables}


def _choice(table: Table, offered: Offered) -> Tensor:
    origin = table.origin
    assert isinstance(origin, Selected)
    selection: Selection = registry.plugin("selections", origin.selection)
    if selection.kind != "list":
        _check_keys(origin.selection, offered)
    elif origin.rows > 1 and not (offered.q_at.starts == offered.k_at.starts == (0,)):
        raise fail(f"`{origin.selection}` chooses for whole blocks of queries, which begin at position 0")
    with asking(f"the selection `{origin.selection}`"):
        found = selection.choose(origin, offered)
    found = integers(found, "choose", table, offered)
    return _placed(found, offered.k_at) if selection.kind == "list" and origin.unit == 1 else found


def integers(found: object, method: str, table: Table, offered: Offered) -> Tensor:
    """What a method of a selection gave for a table. Raises AttnError unless it is integers of its shape."""
    import torch

    wanted, origin = shape(table, offered.q, offered.k), table.origin
    assert isinstance(origin, Selected)
    if isinstance(found, torch.Tensor):
        other = found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool
        if not other and [*found.shape] == wanted:
            return found.long()
        given = f"{found.dtype}{[*found.shape]}"
    else:
        given = type(found).__name__
    raise fail(f"`{method}` of the selection `{origin.selection}` returned {given}, not integers {wanted}")


def _placed(entries: Tensor, at: Axis) -> Tensor:
    """The positions [B, H, rows, r] of keys by their place among them, -1 where there is none."""
    import torch

    if at.starts == (0,):
        return entries
    places = np.stack([at.positions(row) for row in range(len(at.rows))])
    listed = torch.from_numpy(places).to(entries.device)
    row = torch.arange(len(entries), device=entries.device).view(-1, 1, 1, 1) % len(listed)
    return torch.where(entries < 0, -1, listed[row, entries.clamp_min(0)])


def _check_keys(name: str, offered: Offered) -> None:
    """Raises AttnError where keys are not all there from position 0 on, or a query has none at its place."""
    batch = range(max(len(offered.q_at.rows), len(offered.k_at.rows)))
    if offered.k_at.length and offered.k_at.starts != (0,):
        raise fail(f"`{name}` sorts all keys, and these are not those from position 0 on")
    if offered.q_at.length and any(offered.q_at.span(row)[1] >= offered.k_at.length for row in batch):
        raise fail(
            f"`{name}` needs a key at the place of each query",
            help="for cross attention choose by `topk`",
        )


def shape(table: Table, q: Tensor, k: Tensor) -> list[int]:
    """Of a choice; sizes may be symbols."""
    import torch

    origin = table.origin
    assert isinstance(origin, Selected)
    sizes: dict[str | int, Any] = {
        "B": q.shape[0],
        "H": q.shape[1],
        "nq": q.shape[2],
        "n": k.shape[2],
        f"blocks of {origin.rows}": (q.shape[2] + origin.rows - 1) // origin.rows,
    }
    found = [sizes.get(axis, axis) for axis in table.dims]
    if origin.of is not None:
        units = (k.shape[2] + origin.unit - 1) // origin.unit
        found[-1] = torch.sym_min(found[-1], units)  # type: ignore[no-untyped-call]
    return found
