"""Few query rows: their keys as intervals, against pointwise evaluation; and how backends run them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from thin import pairwise

import attndsl
from attndsl.attention import Attention
from attndsl.errors import AttnError
from attndsl.execution import registry
from attndsl.expr import (
    Expr,
    IntSet,
    add,
    all_of,
    any_of,
    const,
    eq,
    floordiv,
    inset,
    le,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    negate,
    nodes,
    sub,
    substitute,
    var,
)
from attndsl.meaning import pointwise
from attndsl.plugins.torch import rows as few
from attndsl.tiles import lowering, tiling
from attndsl.tiles.blockmask import Rows
from attndsl.tiles.rows import HIGH, LOW, keys_of

POINTS = [{"n": 1, "nq": 1, "h": 0, "H": 1, "b": 0}, {"n": 61, "nq": 4, "h": 2, "H": 3, "b": 1}]
SEEDS = range(400)


class Masks:
    """Random truths; most are sets of intervals of k."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def fixed(self, depth: int) -> Expr:
        r = self.r
        if depth == 0:
            return r.choice([var("q"), var("n"), var("h"), var("nq"), const(r.randint(-9, 70))])
        x, y = self.fixed(depth - 1), self.fixed(depth - 1)
        steps = floordiv(x, const(r.randint(2, 9))), mod(x, const(r.randint(2, 9)))
        return r.choice([add(x, y), sub(x, y), mul(x, y), minimum(x, y), maximum(x, y), *steps])

    def moving(self, depth: int) -> Expr:
        r = self.r
        if depth == 0:
            return var("k")
        x, y = self.moving(depth - 1), self.fixed(depth - 1)
        steps = floordiv(x, const(r.randint(2, 9))), mul(const(r.choice([-3, -1, -1, 2])), x)
        rare = mod(x, const(5)) if r.random() < 0.2 else add(x, self.moving(depth - 1))
        return r.choice([add(x, y), sub(y, x), *steps, *steps, rare])

    def truth(self, depth: int) -> Expr:
        r = self.r
        if depth > 0 and r.random() < 0.6:
            parts = [self.truth(depth - 1) for _ in range(r.randint(1, 3))]
            return r.choice([all_of, any_of, lambda *p: negate(any_of(*p))])(*parts)
        x, y = self.moving(r.randint(0, 3)), self.fixed(r.randint(0, 2))
        x, y = r.choice([(x, y), (x, y), (y, x), (y, self.fixed(1))])
        listed = IntSet.of((p, p + r.randint(0, 9)) for p in r.sample(range(-90, 90), r.choice([5, 9])))
        return r.choice([le(x, y), lt(x, y), eq(x, y), inset(x, listed)])


@pytest.mark.parametrize("seed", SEEDS)
def test_intervals_are_where_the_mask_holds(seed: int) -> None:
    mask = Masks(seed).truth(seed % 4)
    keys = keys_of(mask)
    for point in POINTS if keys is not None else ():
        n = point["n"]
        closed = substitute(mask, {name: const(value) for name, value in point.items()})
        for q, low in ((0, 0), (n // 2, -7), (n - 1, 0), (n + 5, -3)):
            spans = keys({**point, "q": q, LOW: low, HIGH: n})
            live = pointwise.evaluate(closed, np.array([q]), np.arange(low, n))
            entries = Rows.of_dense(np.broadcast_to(live, (1, n - low)), 8).spans[0]
            assert spans == tuple((low + start, low + stop) for start, stop in entries)


def test_nearly_all_of_these_masks_are_intervals() -> None:
    masks = [Masks(seed).truth(seed % 4) for seed in SEEDS]
    known = [mask for mask in masks if keys_of(mask) is not None]
    assert len(known) > 0.7 * len(masks)
    assert {node.op for mask in known for node in nodes(mask)} >= set(
        "and or not le lt eq inset add mul floordiv mod min max".split()
    )


def attention_of(clauses: str) -> Attention:
    return attndsl.parse(f"attention a {{ {clauses} offset 0 }}")["a"].attention


MASKS = [
    "causal",
    "causal & (last(40) | sinks(4))",
    "~causal",
    "radius(3) | global([0, 9, 17, 33, 55, 80])",
    "blocks(16, radius(1) | global([0, n - 1]))",
    "causal & block(32)",
    "strided(16)",
    "{ q, k : q * k < 1000 and q > 2 }",
    "{ q, k : q == k or q > k and 2 ** log2(q - k) == q - k }",
    "{ q, k : 6 * h + k <= q }",
    "{ q, k : 6 * (h // 3) + k <= q }",
    "{ q, k : q mod 2 == 0 and (k < 5 or k > 50) }",
]
CALLS: list[tuple[int, int, dict[str, Any]]] = [
    (300, 1, {"q_offset": 299}),
    (257, 16, {}),
    (129, 3, {"q_offset": [5, 100, 60]}),
    (40, 4, {"q_positions": [60, 3, 70, 5], "k_positions": [*range(5), *range(40, 75)], "n": 90}),
    (40, 4, {"q_positions": [60, 3, 70, 5], "k_positions": [*range(0, 80, 2)], "n": 90}),
    (4, 2, {"q_offset": 7, "k_positions": [6, 7, 2, 3]}),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block_size", [8, 128])
def test_rows_their_runs_and_their_tiles_are_the_mask(mask: str, block_size: int) -> None:
    attention = attention_of(f"mask {mask}")
    for n, nq, places in CALLS:
        sizes = lowering.sizes_of(attention, n, nq, 4, **places)
        blocks = lowering.block_mask(attention, sizes, {}, block_size)
        assert blocks.rows is not None
        dense = np.broadcast_to(lowering.dense(attention, sizes, {}), (*blocks.index.shape, nq, n))
        np.testing.assert_array_equal(blocks.to_dense(), dense)
        assert (blocks.nnz, blocks.is_full) == (dense.sum(), dense.all())
        np.testing.assert_array_equal(blocks.row_counts(), dense.sum(-1))
        for rows in blocks.rows:
            times, live = np.zeros((nq, n), int), rows.grid.to_dense()
            for run in rows.runs:
                times[:, run.start : run.stop] += 1 if run.mask is None else run.mask
                assert run.mask is None or (run.mask.any(0).all() and not run.mask.all())
            np.testing.assert_array_equal(times, live)
            assert rows.nnz == live.sum()


@pytest.mark.parametrize("mask", ["causal & documents(doc)", "causal & random(4)"])
@pytest.mark.parametrize("block_size", [8, 128])
def test_what_reads_tables_or_draws_is_tiled_first(mask: str, block_size: int) -> None:
    inputs = "inputs doc : int[n] " if "doc" in mask else ""
    attention = attention_of(f"{inputs}mask {mask}")
    tables = {"doc": np.arange(300) // 7} if inputs else {}
    sizes = lowering.sizes_of(attention, 300, 10, 1, q_offset=250)
    assert lowering.by_rows(attention, sizes, block_size) is None
    blocks = lowering.block_mask(attention, sizes, tables, block_size)
    assert blocks.rows is not None
    np.testing.assert_array_equal(blocks.to_dense(), lowering.dense(attention, sizes, tables))


def test_a_score_out_of_range_is_refused_at_the_first_length_that_reaches_it() -> None:
    attention = attention_of("mask causal score s - 1.0 * (q * q * q * q)")
    lowering.tiles_of(attention, 40_000, q_length=1)
    with pytest.raises(AttnError, match="64-bit"):
        lowering.block_mask(
            attention, lowering.sizes_of(attention, 9, 1, 1, q_offset=60_000, n=60_001), {}, 128
        )


@pytest.mark.parametrize("mask", MASKS)
def test_a_hundred_steps_are_not_tiled(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attndsl.parse(f"attention a {{ mask {mask} }}")["a"]
    plan = attndsl.compile(attention, length=200, q_length=1, heads=2, head_dim=8)
    monkeypatch.setattr(tiling, "tree_of", None)
    monkeypatch.setattr(tiling, "tile", None)
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 200, 8), torch.randn(1, 2, 200, 8)
    for n in range(50, 150):
        plan(q, k[:, :, :n], v[:, :, :n])


BODIES = ["", "score alibi", "norm softmax(sink = learn[H])", "score alibi norm softmax(sink = learn[H])"]
SHAPES = [(1, 8, 8, 1), (1, 8, 2, 3), (5, 8, 2, 2), (16, 4, 4, 2), (3, 6, 2, 1)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 0.03}


@pytest.mark.parametrize(("mask", "body", "dtype"), pairwise(MASKS[1:], BODIES, [*TOLERANCE]))
def test_few_rows_equal_the_reference(mask: str, body: str, dtype: str) -> None:
    attention = attndsl.parse(f"attention a {{ mask {mask} {body} }}")["a"]
    torch.manual_seed(0)
    for nq, heads, kv_heads, batch in SHAPES:
        sizes = {"length": 90, "q_length": nq, "heads": heads, "kv_heads": kv_heads, "head_dim": 16}
        places = {} if batch == 1 else {"q_offset": [90 - nq - 7 * b for b in range(batch)]}
        q = torch.randn(batch, heads, nq, 16, dtype=getattr(torch, dtype))
        k, v = torch.randn(2, batch, 120, kv_heads, 16, dtype=q.dtype).transpose(2, 3)[:, :, :, :90]
        ours, theirs = (
            attndsl.compile(attention, **sizes, dtype=dtype, backend=backend)(
                q, k, v, return_lse=True, **places
            )
            for backend in ("torch", "reference")
        )
        for a, b in zip(ours, theirs, strict=True):
            assert ((a - b).abs().nan_to_num(0.0) <= TOLERANCE[dtype]).all()
            assert (a.isinf() == b.isinf()).all()


@pytest.mark.parametrize("mask", [*MASKS[1:3], MASKS[-1]])
@pytest.mark.parametrize("body", BODIES[:2])
def test_gradients_of_few_rows_equal_those_of_the_reference(mask: str, body: str) -> None:
    attention = attndsl.parse(f"attention a {{ mask {mask} {body} }}")["a"]
    for nq in (1, 5):
        given = torch.randn(2, 4, nq, 16), *torch.randn(2, 2, 2, 90, 16)
        found = []
        for backend in ("torch", "reference"):
            plan = attndsl.compile(
                attention, length=90, q_length=nq, heads=4, kv_heads=2, head_dim=16, training=True,
                backend=backend,
            )  # fmt: skip
            leaves = [x.clone().requires_grad_() for x in given]
            out, lse = plan(*leaves, return_lse=True)
            (out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()).backward()
            found.append([x.grad for x in leaves])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["slice of a cache", "heads after keys"])
def test_keys_are_read_where_they_stand(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attndsl.parse("attention a { mask causal & (last(300) | sinks(4)) }")["a"]
    plan = attndsl.compile(
        attention, length=1000, q_length=1, heads=8, kv_heads=2, head_dim=16, backend="torch"
    )
    cache = torch.randn(2, 3, 2, 1000, 16)
    if layout == "heads after keys":
        cache = torch.randn(2, 3, 1000, 2, 16).transpose(2, 3)
    k, v = cache[:, :, :, :900]
    seen = []

    def fused(q: Any, k: Any, v: Any, **options: Any) -> Any:
        seen.append((tuple(q.shape), {x.untyped_storage().data_ptr() for x in (k, v)}, k.shape[2]))
        return flash(q, k, v, **options)

    flash = few.flash
    monkeypatch.setattr(few, "flash", fused)
    plan(torch.randn(3, 8, 1, 16), k, v)
    there = {cache.untyped_storage().data_ptr()}
    assert seen == [((3, 2, 4, 16), there, 4), ((3, 2, 4, 16), there, 300)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_few_rows_compute_what_is_counted(mask: str, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = attndsl.parse(f"attention a {{ mask {mask} }}")["a"]
    plan = attndsl.compile(
        attention, length=200, q_length=3, batch=2, heads=8, kv_heads=kv_heads, head_dim=16, backend="torch"
    )
    made = []

    def fused(q: Any, k: Any, v: Any, **options: Any) -> Any:
        made.append((1, q.shape[:3].numel() * k.shape[2], k.numel() + v.numel()))
        return flash(q, k, v, **options)

    flash = few.flash
    monkeypatch.setattr(few, "flash", fused)
    plan(torch.randn(2, 8, 3, 16), *torch.randn(2, 2, kv_heads, 200, 16))
    found = registry.plugin("backends", "torch").counts(plan.attention, plan.problem, plan.block_masks)
    reads, pairs, read = map(sum, zip(*made, strict=True))
    assert (found["reads"], found["pairs"], found["read"]) == (reads, pairs, read)


@pytest.mark.parametrize("mask", ["causal", "causal & (last(4096) | sinks(4))", "causal & last(100)"])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_single_rows_are_not_given_to_what_copies_or_forms_all(mask: str, kv_heads: int) -> None:
    attention = attndsl.parse(f"attention a {{ mask {mask} }}")["a"]
    for n in (64, 1024, 16384):
        plan = attndsl.compile(attention, length=n, q_length=1, heads=8, kv_heads=kv_heads)
        assert next(iter(plan.considered)) != "reference"
        if "last" in mask and n > 4096:
            assert plan.backend in ("cpu", "torch")
