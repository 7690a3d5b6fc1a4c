"""The conformance suite of selections, ours or a third party's.

    import pytest
    from attndsl.conformance.selections import LENGTHS, check

    @pytest.mark.parametrize("n", LENGTHS)
    def test_mine(n):
        check("mask causal & mine(4, of = causal)", n)

`check` takes the clauses of an attention whose mask holds the leaf, and holds what is chosen to the
`reference` of the same selection in float64: exactly where all numbers are small integers, ties and all, and
in float32 but for rows in which two scores are next to equal. It looks whether equal calls choose equally,
whether heads of a group share what is chosen by key, and whether tokens that a choice does not read change
it, as `reads` says. A list holds what `of` holds, each once, and fewer than `rounds` only where those are
fewer; ranks are those of an order; `reads`, `counts` and `relates` say what can be said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import attndsl
from attndsl.attention import Attention
from attndsl.backend import Problem
from attndsl.execution import registry
from attndsl.execution.selecting import choices, integers
from attndsl.execution.torch_eval import environment, evaluate
from attndsl.expr import Selected, Table
from attndsl.program import bound_of
from attndsl.selection import LABELS, Chunks, Offered, Selection
from attndsl.tiles import lowering

LENGTHS = (1, 2, 15, 16, 17, 40, 64, 65)
"""Around multiples of what pieces are long."""
SEEDS = 10
BATCH, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 8
FLIPS = 0.002
"""Of all entries those that rounding to float32 may change."""


def check(clauses: str, n: int) -> None:
    """Raises AssertionError where a selection in these clauses is not what it says, AttnError where it cannot
    be used."""
    attention = bound_of(attndsl.parse(f"attention checked {{ {clauses} }}")["checked"]).attention
    assert attention.selected, "the mask chooses nothing"
    for table in attention.selected:
        _says(table, Problem(n, n, BATCH, HEADS, KV_HEADS, WIDTH))
    for seed in range(SEEDS):
        for whole in (True, False):
            generator = torch.Generator().manual_seed(seed)
            q, k, tables = _inputs(attention, n, whole, generator)
            _as_reference(attention, q, k, tables, whole)
        _stays(attention, q, k, tables, generator)


def _says(table: Table, problem: Problem) -> None:
    """Raises AssertionError for what no selection of its kind may say of itself."""
    plugin, origin = _plugin(table), _origin(table)
    reads, relates, counts = plugin.reads(origin), plugin.relates(origin), plugin.counts(origin, problem)
    known = ("past", "of", "future") if plugin.kind == "list" else ("past", "future")
    assert reads in known, f"{table.name}: `reads` gives {reads!r}, which is none of {', '.join(known)}"
    assert plugin.kind == "order" or relates is None, (
        f"{table.name}: `relates` gives {relates!r}, and there are no ranks: it must be None"
    )
    assert isinstance(counts, Mapping), f"{table.name}: `counts` gives {counts!r}, which is no mapping"
    assert counts.keys() == {"products", "sorted"}, (
        f"{table.name}: `counts` gives {sorted(counts)}, and must give `products` and `sorted`"
    )
    for name, count in counts.items():
        assert isinstance(count, int | float), (
            f"{table.name}: `counts` gives {count!r} as `{name}`, which is no number"
        )
        assert 0 <= count < math.inf, f"{table.name}: `counts` gives {count} as `{name}`"


def _may_be_chosen(table: Table, found: Tensor, offered: Offered) -> None:
    """Raises AssertionError for labels, ranks or a list that cannot be, whatever the scores are."""
    plugin, origin = _plugin(table), _origin(table)
    if plugin.kind == "list":
        return _may_be_listed(table, found, offered)
    places = torch.arange(found.shape[-1])
    if isinstance(plugin.relates(origin), Chunks):
        assert (found.sort(-1).values == places).all(), f"{table.name}: `choose` gives ranks of no order"
    end = min(plugin.rounds(origin), LABELS) if plugin.kind == "labels" else math.inf
    for wrong in found[(found < 0) | (found >= end)].tolist():
        raise AssertionError(f"{table.name}: `choose` gives {wrong}, which is none of its {plugin.kind}")
    return None


def _may_be_listed(table: Table, found: Tensor, offered: Offered) -> None:
    origin = _origin(table)
    count = -(-offered.k.shape[2] // origin.unit)
    for wrong in found[(found < -1) | (found >= count)].tolist():
        raise AssertionError(f"{table.name}: `choose` gives {wrong}, and there are {count} to choose among")
    placed = found.sort(-1).values
    for twice in placed[..., 1:][(placed[..., 1:] == placed[..., :-1]) & (placed[..., 1:] >= 0)].tolist():
        raise AssertionError(f"{table.name}: `choose` gives {twice} twice in a row")
    env, rows = environment(offered), torch.arange(found.shape[2]).view(1, 1, -1, 1)
    at = {**env.values, "q": rows, "k": torch.arange(count).view(1, 1, 1, -1)}
    assert origin.of is not None
    live = evaluate(origin.of, replace(env, values=at)).expand(*found.shape[:3], count)
    for wrong in found[(found >= 0) & ~live.gather(-1, found.clamp_min(0))].tolist():
        raise AssertionError(f"{table.name}: `choose` gives {wrong}, which `of` does not hold")
    # what is counted of an attention relies on it
    most = live.sum(-1).clamp_max(found.shape[-1])
    assert ((found >= 0).sum(-1) == most).all(), f"{table.name}: `choose` gives fewer than `of` holds"


def _inputs(
    attention: Attention, n: int, whole: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Vectors of float32, of small integers with every second key doubled if `whole`."""

    def drawn(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-2, 3, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    sizes = {"B": BATCH, "H": HEADS, "n": n, "nq": n, "D": WIDTH}
    tables = {}
    for table in attention.inputs:
        shape = [sizes.get(axis, 4) if isinstance(axis, str) else axis for axis in table.dims]
        tables[table.name] = drawn(*shape)
        if table.dtype != "float":
            tables[table.name] = (
                (tables[table.name] > 0).long() if table.dtype == "int" else tables[table.name] > 0
            )
    q, k = drawn(BATCH, HEADS, n, WIDTH), drawn(BATCH, KV_HEADS, n, WIDTH)
    if whole:
        k[:, :, 1::2] = k[:, :, : n - 1 : 2] if n > 1 else k[:, :, 1::2]
    return q, k, tables


def _sizes(attention: Attention, q: Tensor, k: Tensor) -> lowering.Sizes:
    return lowering.sizes(attention, k.shape[2], q.shape[2], q.shape[1])


def _as_reference(
    attention: Attention, q: Tensor, k: Tensor, tables: Mapping[str, Tensor], whole: bool
) -> None:
    sizes = _sizes(attention, q, k)
    made = choices(attention, q, k, tables, sizes)
    again = choices(attention, q.clone(), k.clone(), tables, sizes)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in tables.items()}
    offered = Offered(q.double(), k.double(), wide, sizes.q, sizes.k, sizes.n)
    for table in attention.selected:
        found, plugin = made[table.name], _plugin(table)
        _may_be_chosen(table, found, offered)
        assert torch.equal(found, again[table.name]), f"{table.name}: equal calls choose differently"
        with torch.no_grad():
            exact = integers(plugin.reference(_origin(table), offered), "reference", table, offered)
        if plugin.kind == "list":
            found, exact = found.sort(-1).values, exact.sort(-1).values
        elif not any("H" in t.dims for t in attention.inputs):
            shared = found.unflatten(1, (KV_HEADS, -1))  # type: ignore[no-untyped-call]
            assert (shared == shared[:, :, :1]).all(), f"{table.name}: heads of a group choose differently"
        if whole and plugin.kind == "order":
            continue  # equal scores of unequal vectors are told apart by roundings
        off = (found != exact).double().mean().item() if found.numel() else 0.0
        allowed = 0.0 if whole and plugin.kind == "list" else FLIPS
        assert off <= allowed, f"{table.name}: {100 * off:.2g} % of what is chosen is not as in `reference`"


def _origin(table: Table) -> Selected:
    assert isinstance(table.origin, Selected)
    return table.origin


def _plugin(table: Table) -> Selection:
    selection: Selection = registry.plugin("selections", _origin(table).selection)
    return selection


def _stays(
    attention: Attention, q: Tensor, k: Tensor, tables: Mapping[str, Tensor], generator: torch.Generator
) -> None:
    """What stands before the last token does not change with it, where a selection says so."""
    from attndsl.execution.leaks import stable

    if not all(stable(table, attention) for table in attention.selected):
        return
    seen: list[NDArray[np.bool_]] = []
    for _ in range(2):
        sizes = _sizes(attention, q, k)
        given: dict[str, Any] = {name: x.numpy() for name, x in tables.items()}
        given |= {name: x.numpy() for name, x in choices(attention, q, k, tables, sizes).items()}
        seen.append(lowering.dense(attention, sizes, given)[:, :, :-1])
        q, k = q.clone(), k.clone()
        q[:, :, -1], k[:, :, -1] = (4 * torch.randn(WIDTH, generator=generator) for _ in range(2))
    assert (seen[0] == seen[1]).all(), "a choice that is proved to read the past alone reads the last token"
