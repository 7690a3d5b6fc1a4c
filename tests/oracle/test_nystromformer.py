"""Nystrom attention against that of transformers, in float64.

Theirs takes the first scale of the inverse from all heads and rows of a batch; another option is one for
each, as here and in the paper.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl

pytest.importorskip("transformers")
from transformers import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

pytestmark = pytest.mark.oracle

HEADS, WIDTH, LENGTH, LANDMARKS = 4, 8, 96, 16


def theirs(landmarks: int = LANDMARKS, init: str = "original") -> NystromformerSelfAttention:
    config = NystromformerConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_landmarks=landmarks,
        segment_means_seq_len=LENGTH,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    module = NystromformerSelfAttention(config).double()
    for part in (module.query, module.key):
        part.weight.data *= 6.0
    module.init_option = init
    # a convolution of the values is added otherwise
    module.conv_kernel_size = None
    return module


def split(module: NystromformerSelfAttention, x: Tensor) -> list[Tensor]:
    parts = (module.query(x), module.key(x), module.value(x))
    return [part.view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for part in parts]


def ours(module: NystromformerSelfAttention, x: Tensor, backend: str, landmarks: int = LANDMARKS) -> Tensor:
    bound = attndsl.parse(f"attention a {{ approx nystrom({landmarks}) }}")["a"]
    plan = attndsl.compile(
        bound, length=LENGTH, heads=HEADS, head_dim=WIDTH, batch=len(x), dtype="float64", training=True,
        backend=backend,
    )  # fmt: skip
    return plan(*split(module, x)).transpose(1, 2).flatten(2)


def drawn(batch: int = 3) -> Tensor:
    x = torch.randn(batch, LENGTH, HEADS * WIDTH, generator=torch.Generator().manual_seed(1)).double()
    return x * torch.tensor([0.3, 1.0, 2.0])[:batch, None, None]


@pytest.mark.parametrize("backend", ["lowrank", "reference"])
def test_a_scale_of_each_head(backend: str) -> None:
    """With gradients of what projects."""
    module, x = theirs(init="each"), drawn()
    (wanted,) = module(x)
    got = ours(module, x, backend)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    slope = torch.randn_like(wanted)
    projections = [p for part in (module.query, module.key, module.value) for p in part.parameters()]
    grads = (torch.autograd.grad(out, projections, slope) for out in (got, wanted))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["lowrank", "reference"])
def test_one_head_of_one_row_alone_has_its_own_scale(backend: str) -> None:
    """Each head of theirs as it is by default, given alone."""
    module, x = theirs(), drawn()
    got = ours(module, x, backend).unflatten(2, (HEADS, WIDTH))
    for head in range(HEADS):
        one = theirs()
        one.num_attention_heads, one.all_head_size = 1, WIDTH
        rows = slice(head * WIDTH, (head + 1) * WIDTH)
        for part, whole in ((one.query, module.query), (one.key, module.key), (one.value, module.value)):
            part.weight.data, part.bias.data = whole.weight.data[rows], whole.bias.data[rows]
        for b in range(len(x)):
            (alone,) = one(x[b : b + 1])
            torch.testing.assert_close(got[b, :, head], alone[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_of_their_batches_influence_each_other_and_ours_do_not() -> None:
    module, x = theirs(), drawn()
    moved = []
    for attend in (lambda x: module(x)[0], lambda x: ours(module, x, "lowrank")):
        together, alone = attend(x), attend(x[:1])
        moved.append(float((together[:1] - alone).abs().max()))
    assert moved[0] > 1e-4
    assert moved[1] < 1e-14


def test_as_many_landmarks_as_tokens_are_full_attention() -> None:
    module, x = theirs(landmarks=LENGTH), drawn()
    torch.testing.assert_close(ours(module, x, "lowrank", LENGTH), module(x)[0], rtol=0, atol=1e-12)
