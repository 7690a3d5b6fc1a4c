"""Transformer-XL with its memory against transformers' XLNet, which has its score (Dai et al. 2019, section
3.3), in float64. XLNet with one direction of attention and without segments is Transformer-XL with a norm
after each sublayer.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import attndsl
from attndsl.stacks.run import State
from attndsl.stage import Held

pytest.importorskip("transformers")
from transformers import XLNetConfig, XLNetModel

pytestmark = pytest.mark.oracle

HEADS, WIDTH, LAYERS, SEGMENT, MEMORY, FAR = 3, 12, 2, 5, 8, 13
TEXT = """
attention relative(content = learn[H, D], place = learn[H, D], w = FAR) {
    inputs r : float[H, FAR, D]
    mask causal & last(w)
    score s + (content @ K + Q @ r[q - k] + place @ r[q - k]) / sqrt(D)
}
stack txl(w = FAR) { memory(xl(MEMORY)) { layers(2, norm = post) { relative(w = w)  ffn(2) } } }
"""


class Distances(nn.Module):
    """W_R of the sines and cosines of distances, [heads, FAR, numbers of a head]."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rates = 1 / 10000 ** (torch.arange(0, WIDTH, 2.0) / WIDTH)  # theirs are in float32 too
        angles = torch.arange(FAR * 1.0)[:, None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], 1).to(x)
        return cast(Tensor, self.map(waves)).unflatten(1, (HEADS, -1)).transpose(0, 1)


def pair(same_length: bool = False) -> tuple[XLNetModel, attndsl.StackModule]:
    """Theirs, and ours with the same weights."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=7, d_model=WIDTH, n_layer=LAYERS, n_head=HEADS, d_inner=2 * WIDTH, ff_activation="gelu",
        attn_type="uni", dropout=0.0, mem_len=MEMORY, same_length=same_length, layer_norm_eps=1e-5,
    )  # fmt: skip
    theirs = XLNetModel(config).double().eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.4)
    text = TEXT.replace("FAR", str(FAR)).replace("MEMORY", str(MEMORY))
    made: Any = attndsl.parse(text)["txl"]
    # they leave the query its own key beside as many as there are in the memory
    made = made(w=MEMORY + 1) if same_length else made
    ours = attndsl.build(
        made, width=WIDTH, heads=HEADS, length=SEGMENT, dtype="float64", inputs={"r": Distances}
    )
    with torch.no_grad():
        for i, layer in enumerate(theirs.layer):
            mixed, fed = (
                cast(Any, ours.parts[f"{2 * i + s}_{n}"]) for s, n in enumerate(("relative", "ffn"))
            )
            given, inner = layer.rel_attn, mixed.inner
            for name in "qkv":
                getattr(inner, name).weight.copy_(getattr(given, name).flatten(1).T)
            inner.o.weight.copy_(given.o.flatten(1))
            inner.made["r"].map.weight.copy_(given.r.flatten(1).T)
            learned = dict(inner.attention.named_parameters())
            learned["content"].copy_(given.r_w_bias)
            learned["place"].copy_(given.r_r_bias)
            mixed.after.load_state_dict(given.layer_norm.state_dict())
            fed.inner.up.load_state_dict(layer.ff.layer_1.state_dict())
            fed.inner.down.load_state_dict(layer.ff.layer_2.state_dict())
            fed.after.load_state_dict(layer.ff.layer_norm.state_dict())
    return theirs, ours


def test_segments_are_those_of_xlnet() -> None:
    theirs, ours = pair()
    state, mems = None, None
    for x in torch.randn(5, 2, SEGMENT, WIDTH, dtype=torch.float64):
        meant = theirs(inputs_embeds=x, mems=mems, use_mems=True)
        found, record = ours(x, state=state)
        torch.testing.assert_close(found, meant.last_hidden_state, rtol=0, atol=1e-12)
        state, mems = record.state, meant.mems
        for i, mem in enumerate(mems):
            (held,) = state.held[0, i, 0]
            torch.testing.assert_close(held.x, mem.transpose(0, 1), rtol=0, atol=1e-12)
        assert len(mem) == min(state.seen, MEMORY)


def test_same_length_is_a_mask() -> None:
    """Their memory is full from the first segment on."""
    theirs, ours = pair(same_length=True)
    x = torch.randn(2, SEGMENT, WIDTH, dtype=torch.float64)
    mems = [*torch.randn(LAYERS, MEMORY, 2, WIDTH, dtype=torch.float64)]
    at = torch.arange(MEMORY)
    held = {(0, i, 0): (Held(mem.transpose(0, 1), at, 0),) for i, mem in enumerate(mems)}
    found, _ = ours(x, state=State(ours.identity, MEMORY, held))
    meant = theirs(inputs_embeds=x, mems=mems, use_mems=True).last_hidden_state
    torch.testing.assert_close(found, meant, rtol=0, atol=1e-12)
    _, other = pair()
    less, _ = other(x, state=State(other.identity, MEMORY, held))
    assert not torch.allclose(less, meant)
