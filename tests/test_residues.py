"""Masks with k = q mod l, sorted by remainders: the same pairs, fewer tiles, equal results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl import expr as ir
from attndsl.backend import Problem
from attndsl.execution import registry
from attndsl.execution.apart import InParts
from attndsl.meaning.pointwise import evaluate
from attndsl.tiles import residues
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.lowering import block_mask, sizes_of

SHIFTED = "{ q, k : (q - k) mod 24 == 7 }"
LONGNET = "{ q, k : q // 128 == k // 128 and q mod 4 == h mod 4 and k mod 4 == h mod 4 }"
MASKS = {
    "strided": "mask strided(32)",
    "sink": "mask strided(32) norm softmax(sink = learn[H])",
    "sinks of heads": (
        "heads 0..1 { mask dilate(5, radius(12)) norm softmax(sink = learn[H]) } "
        "else { mask strided(48) norm softmax(sink = -1.5) }"
    ),
    "sink of a head": (
        "inputs z : float[B, H] heads [2] { mask dilate(4, causal & last(50)) norm softmax(sink = z) } "
        "else { mask causal & last(40) }"
    ),
    "sink of some rows": (
        f"mask causal & (last(9) & {{ q, k : q > 200 }} | {SHIFTED}) norm softmax(sink = learn[H])"
    ),
    "dilated": "mask dilate(4, causal & last(50))",
    "alibi": "mask dilate(3, radius(20)) score alibi",
    "learned": "mask causal & (last(20) | { q, k : (k - q) mod 16 == 0 }) score s + slope * |k - q|",
    "shifted": f"mask causal & (last(9) | {SHIFTED})",
    "segments": f"mask causal & {LONGNET}",
    "heads": "heads 0..1 { mask dilate(5, radius(12)) } else { mask strided(48) }",
    "some heads": "heads [0] { mask causal & last(40) } else { mask strided(24) }",
    "less is more": "mask causal & { q, k : (q - k) mod 2 == 0 and not (q > 400 and (q - k) mod 2 == 0) }",
    "two": "mask { q, k : (k - q) mod 32 == 0 or (k - q) mod 48 == 0 }",
    "listed": "mask { q, k : q - k in [0, 32, 64, 96, 128] and (q - k) mod 32 == 0 }",
    "empty rows": "mask { q, k : q mod 16 == 3 and k mod 16 == 3 and k < q }",
}
HEADS = 4


@pytest.fixture(autouse=True)
def _even_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residues, "FEW", 0)
    monkeypatch.setattr(residues, "WORTH", 1.0)


def attention_of(text: str) -> Any:
    return attndsl.parse(f"attention a(slope = learn[H](-0.1)) {{ {text} }}")["a"]


def tiles_of(text: str, n: int, nq: int, size: int) -> BlockMask:
    attention = attention_of(text).attention
    return block_mask(attention, sizes_of(attention, n, nq, HEADS), {}, size)


def pairs(mask: BlockMask | None) -> int:
    return 0 if mask is None else (mask.tiles.full + mask.tiles.partial) * mask.block_size**2


@pytest.mark.parametrize(("n", "nq"), [(517, 517), (421, 90)])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", MASKS)
def test_parts_are_the_mask(name: str, size: int, n: int, nq: int) -> None:
    """Each pair once, at places of its own."""
    mask = tiles_of(MASKS[name], n, nq, size)
    found = residues.apart(mask)
    if found is None:
        return
    dense = mask.to_dense()
    count = np.zeros(dense.shape, np.int64) if found.rest is None else found.rest.to_dense().astype(np.int64)
    for one in found.classes:
        there = one.block_mask.to_dense()
        q, k = one.q_order, one.k_order
        assert not there[:, :, q < 0].any()
        assert not there[..., k < 0].any()
        np.testing.assert_array_equal(q[one.q_place], np.arange(nq))
        np.testing.assert_array_equal(k[one.k_place], np.arange(n))
        count += there[:, :, one.q_place][..., one.k_place]
        for grid in one.block_mask.grids:
            assert grid.tiles.partial == len(grid.part_mask)
            ends = np.minimum((grid.part_row + 1) * size, grid.nq)
            assert (ends <= grid.nq).all()
    np.testing.assert_array_equal(count, dense)


def test_most_of_them_are_taken_apart() -> None:
    """What the other tests look at."""
    found = {name: residues.apart(tiles_of(text, 517, 517, 32)) for name, text in MASKS.items()}
    assert {name for name, apart in found.items() if apart is None} == {"two"}
    parts = {name: (apart.rest is not None, len(apart.classes)) for name, apart in found.items() if apart}
    assert parts["dilated"] == (False, 1)
    assert parts["heads"] == (True, 2)


def results(
    text: str, backend: str, n: int, nq: int, kv_heads: int, dtype: str = "float64", scale: float = 1.0
) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of both."""
    module = attndsl.compile(
        attention_of(text), length=n, q_length=nq, heads=HEADS, kv_heads=kv_heads, head_dim=16,
        batch=2, dtype=dtype, backend=backend, training=True, block_size=64,
    ).module()  # fmt: skip
    for name, parameter in module.named_parameters():
        if name == "sink":
            parameter.data.copy_(torch.tensor([-torch.inf, 8.0, -1.0, 0.5]))
    generator = torch.Generator().manual_seed(n)
    shapes = (HEADS, nq, 16), (kv_heads, n, 16), (kv_heads, n, 24)
    leaves = [
        (scale * torch.randn(2, *shape, generator=generator)).to(getattr(torch, dtype)).requires_grad_()
        for shape in shapes
    ]
    sinks = torch.linspace(-2, 6, 2 * HEADS, dtype=leaves[0].dtype).view(2, HEADS).requires_grad_()
    given = {"z": sinks} if "z :" in text else {}
    out, lse = module(*leaves, return_lse=True, **given)
    over = torch.linspace(-1, 1, nq)
    loss = (out * over[:, None]).sum() + (lse * over)[lse > -torch.inf].sum()
    return [out, lse, *torch.autograd.grad(loss, [*leaves, *module.parameters(), *given.values()])]


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("n", "nq", "kv_heads"), [(517, 517, 2), (700, 300, 4)])
@pytest.mark.parametrize("name", MASKS)
def test_results(name: str, n: int, nq: int, kv_heads: int, backend: str) -> None:
    assert (residues.apart(tiles_of(MASKS[name], n, nq, 64)) is None) == (name == "two")
    mine, exact = (results(MASKS[name], each, n, nq, kv_heads) for each in (backend, "reference"))
    for x, y in zip(mine, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    ("dtype", "scale", "allowed"),
    [("float32", 30.0, 1e-4), ("float32", 7.0, 2e-4), ("bfloat16", 1.0, 2e-2)],
    ids=["far", "apart", "narrow"],
)
def test_few_digits(dtype: str, scale: float, allowed: float, backend: str) -> None:
    """Where a log-sum-exp of parts has lost digits, or the parts of a row are far from another, and where
    outputs are rounded to 16 bits."""
    given = MASKS["strided"], 517, 517, 4, dtype, scale
    mine, exact = (results(given[0], each, *given[1:]) for each in (backend, "reference"))
    for x, y in zip(mine, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=allowed, atol=allowed * float(y.detach().abs().max()))


def test_nothing_else_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables, draws, and few pairs."""
    texts = [
        "mask causal & last(9)",
        "inputs doc : int[n] mask dilate(4, causal & last(50)) & documents(doc)",
        "mask strided(32) | random(2)",
    ]
    assert not any(residues.possible(attention_of(t).attention.groups[0].relation.mask) for t in texts)
    monkeypatch.setattr(residues, "FEW", 2**20)
    assert residues.apart(tiles_of(MASKS["strided"], 300, 300, 64)) is None


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("strided(128)", 2.0),
        ("dilate(16, causal & last(512))", 1.3),
        ("dilate(2, causal & last(512))", 1.3),
    ],
)
def test_pairs_at_length(text: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of an n that is no small one."""
    monkeypatch.undo()
    mask = tiles_of(f"mask {text}", 16_384, 16_384, 64)
    found = residues.apart(mask)
    assert found is not None
    computed = pairs(found.rest) + sum(pairs(one.block_mask) for one in found.classes)
    assert computed < most * mask.nnz < pairs(mask)
    attention = attention_of(f"mask {text}").attention
    problem = Problem.of(attention, length=16_384, block_size=64)
    for name in ("torch", "cpu", "triton"):
        counts = registry.plugin("backends", name).counts(attention, problem, mask)
        assert counts["pairs"] < 1.5 * most * mask.nnz
        assert (counts["sorted"] > 0) == (name in ("torch", "triton") or found.rest is not None)


@pytest.mark.parametrize("name", ["dilated", "alibi", "strided", "sinks of heads"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_what_is_counted_as_sorted_is_sorted(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, sorts = 517, []
    places = InParts.places
    monkeypatch.setattr(
        InParts, "places", lambda self, one, call: sorts.append(one) or places(self, one, call)
    )
    plan = attndsl.compile(
        attention_of(MASKS[name]), length=n, heads=HEADS, head_dim=16, backend=backend, block_size=64
    )
    plan(*torch.randn(3, 1, HEADS, n, 16))
    counts = registry.plugin("backends", backend).counts(plan.attention, plan.problem, plan.block_masks)
    apart = residues.apart(plan.block_masks)
    assert apart is not None
    parts = len(apart.classes) + (apart.rest is not None)
    merges = 3 * (parts - 1) + ("sink" in name)
    assert counts["sorted"] == (4 * len(sorts) + merges) * HEADS * n * 16


@pytest.mark.parametrize("name", MASKS)
def test_a_class_is_the_mask_there(name: str) -> None:
    rng = np.random.default_rng(0)
    mask = attention_of(MASKS[name]).attention.groups[-1].relation.mask
    values = {"n": 500, "nq": 500, "h": 1, "H": 4}
    mask = ir.substitute(mask, {name: ir.const(value) for name, value in values.items()})
    for step, q, k in ((4, 1, 3), (16, 5, 0), (24, 7, 0), (5, 2, 2)):
        own = residues._of_class(mask, step, q, k)
        at = rng.integers(0, 500 // step, (2, 400))
        there = evaluate(mask, step * at[0] + q, step * at[1] + k, {})
        np.testing.assert_array_equal(np.broadcast_to(evaluate(own, *at, {}), there.shape), there)


def test_equal_classes_are_tiled_once() -> None:
    strided = attention_of(MASKS["strided"]).attention.groups[0].relation.mask
    assert len({residues._of_class(strided, 32, r, r) for r in range(32)}) == 1
