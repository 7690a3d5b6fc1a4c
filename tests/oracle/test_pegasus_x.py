"""PEGASUS-X's attention of tokens and global tokens against transformers', in float64, with the gradients.

Theirs pads to whole blocks and moves every second layer's by half a block before the layer; ours moves the
relation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import attndsl

theirs = pytest.importorskip("transformers.models.pegasus_x.modeling_pegasus_x")
pytestmark = pytest.mark.oracle

BATCH, HEADS, WIDTH, BLOCK, GLOBALS = 2, 2, 4, 6, 3
PADDED = torch.tensor([0, 5])
"""Tokens at the end of each row that are none."""
EXAMPLE = Path(__file__).parents[2] / "examples" / "pegasus_x.attn"


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)


def plan(name: str, n: int, text: str, **params: int) -> attndsl.Plan:
    bound = attndsl.parse(text)[name](g=GLOBALS, **params)
    q_length = GLOBALS if name == "pegasus_x_global" else n
    found = attndsl.compile(
        bound, length=n, q_length=q_length, batch=BATCH, heads=HEADS, head_dim=WIDTH, dtype="float64",
        training=True,
    )  # fmt: skip
    assert isinstance(found, attndsl.Plan)
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("staggered", [False, True])
def test_layers_agree(staggered: bool, padded: bool) -> None:
    n = 4 * BLOCK
    torch.manual_seed(n)
    layer = theirs.PegasusXGlobalLocalAttention(HEADS * WIDTH, HEADS, BLOCK).double()
    x, beside = (torch.randn(BATCH, size, HEADS * WIDTH, dtype=torch.float64) for size in (n, GLOBALS))
    x, beside = x.requires_grad_(), beside.requires_grad_()
    seen = torch.arange(n) < n - padded * PADDED[:, None]
    least = torch.finfo(torch.float64).min
    closed = torch.zeros(BATCH, n, dtype=torch.float64).masked_fill(~seen, least)
    half = BLOCK // 2 if staggered else 0
    given = torch.nn.functional.pad(x, (0, 0, half, half))
    mask = torch.nn.functional.pad(closed, (half, half), value=least)
    wanted, wanted_beside, _ = layer(given, beside, mask)
    wanted = wanted[:, half : half + n]

    text = EXAMPLE.read_text(encoding="utf-8").split("\nassert")[0]
    text = text.replace("keys", "inputs seen : bool[B, n]  keys").replace(
        "mask {", "mask { q, k : stream == 0 or seen[k] } & {"
    )
    text = text.replace("++ tokens }", "++ tokens  mask { q, k : stream == 0 or seen[k] } }")
    name = "pegasus_x_staggered" if staggered else "pegasus_x"
    q, k, v = (heads(project(x)) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    of_q, of_k, of_v = (heads(project(beside)) for project in (layer.q_proj, layer.k_proj, layer.v_proj))
    found = [
        plan(name, n, text, b=BLOCK)(q, k, v, memory=(of_k, of_v), seen=seen),
        plan("pegasus_x_global", n, text)(of_q, k, v, memory=(of_k, of_v), seen=seen, q_offset=0),
    ]
    found = [layer.out_proj(out.transpose(1, 2).flatten(2)) for out in found]
    for mine, other in zip(found, (wanted, wanted_beside), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    slopes = [torch.randn_like(out) for out in found]
    leaves = [x, beside, *layer.parameters()]
    grads, exact = (torch.autograd.grad(outs, leaves, slopes) for outs in (found, (wanted, wanted_beside)))
    for got, grad in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-11, atol=1e-11)
