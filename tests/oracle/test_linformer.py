"""Linformer against PyPI's linformer, in float64, whole layers with their gradients.

Theirs shares a projection among heads always, as in our `linformer_headwise`; their `share_kv` drops the own
layer of values too, which is the caller's part here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attndsl

theirs = pytest.importorskip("linformer.linformer")
pytestmark = pytest.mark.oracle

BATCH, HEADS, WIDTH, LENGTH, SLOTS = 2, 4, 8, 40, 10
EXAMPLE = Path(__file__).parents[2] / "examples" / "linformer.attn"


@pytest.mark.parametrize("n", [LENGTH, 23])
@pytest.mark.parametrize("one_kv_head", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
def test_layers_agree(n: int, one_kv_head: bool, share_kv: bool) -> None:
    torch.manual_seed(n)
    layer = theirs.LinformerSelfAttention(
        HEADS * WIDTH, LENGTH, k=SLOTS, heads=HEADS, one_kv_head=one_kv_head, share_kv=share_kv
    ).double()
    x = torch.randn(BATCH, n, HEADS * WIDTH, dtype=torch.float64)
    text = EXAMPLE.read_text(encoding="utf-8").replace("let slots = 256", f"let slots = {SLOTS}")
    name = "linformer_kv" if share_kv else "linformer_headwise"
    kv_heads = 1 if one_kv_head else HEADS
    module = attndsl.compile(
        attndsl.parse(text)[name], length=LENGTH, heads=HEADS, kv_heads=kv_heads, head_dim=WIDTH,
        dtype="float64", training=True,
    ).module()  # fmt: skip
    tables = ["E"] if share_kv else ["E", "F"]
    with torch.no_grad():
        for table, projection in zip(tables, (layer.proj_k, getattr(layer, "proj_v", None)), strict=False):
            getattr(module, table).copy_(projection.T)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(2, (-1, WIDTH)).transpose(1, 2)

    k = layer.to_k(x)
    v = k if share_kv else layer.to_v(x)
    out = layer.to_out(module(heads(layer.to_q(x)), heads(k), heads(v)).transpose(1, 2).flatten(2))
    wanted = layer(x)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(wanted)
    shared = [layer.to_q.weight, layer.to_k.weight]
    projections = [layer.proj_k] if share_kv else [layer.proj_k, layer.proj_v]
    grads = torch.autograd.grad(wanted, [*shared, *projections], slope)
    found = torch.autograd.grad(out, [*shared, *(getattr(module, table) for table in tables)], slope)
    for i, (got, grad) in enumerate(zip(found, grads, strict=True)):
        torch.testing.assert_close(got if i < len(shared) else got.T, grad, rtol=1e-11, atol=1e-11)
