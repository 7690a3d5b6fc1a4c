"""LSH attention against transformers' Reformer, in float64, with the same random rotations."""

from __future__ import annotations

import pytest
import torch

import attndsl
from attndsl.meaning.normals import normals

pytest.importorskip("transformers")
from transformers.models.reformer.configuration_reformer import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

pytestmark = pytest.mark.oracle

HEADS, HEAD_DIM, CHUNK = 4, 8, 8


def theirs(rounds: int, buckets: int | list[int], decoder: bool) -> LSHSelfAttention:
    config = ReformerConfig(
        attention_head_size=HEAD_DIM,
        num_attention_heads=HEADS,
        hidden_size=HEADS * HEAD_DIM,
        lsh_attn_chunk_length=CHUNK,
        lsh_attention_probs_dropout_prob=0.0,
        num_hashes=rounds,
        num_buckets=buckets,
        is_decoder=decoder,
    )
    found = LSHSelfAttention(config).double()
    found.query_key, found.value = torch.nn.Identity(), torch.nn.Identity()
    # what is one input of theirs are two of ours
    found.value.forward = lambda x: x.flip(-1)
    return found


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize(("buckets", "factors"), [(16, 16), (128, [8, 16])])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_reformer(monkeypatch, rounds: int, buckets: int, factors, decoder: bool, backend: str) -> None:
    n = 64
    # theirs divides by a length that is never 0
    text = f"""attention a {{
        mask lsh({rounds}, {CHUNK}, buckets = {buckets}, count = true, wrap = true){" - ~causal" * decoder}
        score where(q == k, -100000.0, Q @ K / sqrt(K @ K + D * 0.000001))
    }}"""
    plan = attndsl.compile(
        attndsl.parse(text)["a"], length=n, heads=HEADS, head_dim=HEAD_DIM, batch=2, dtype="float64",
        backend=backend, training=True,
    )  # fmt: skip
    x = torch.randn(2, n, HEADS * HEAD_DIM, dtype=torch.float64, requires_grad=True)
    q, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (x, x.flip(-1)))
    got = plan(q, q, v).transpose(1, 2).flatten(2)
    halves = (sum(factors) if isinstance(factors, list) else factors) // 2
    drawn = torch.tensor(normals(0, rounds, HEADS, HEAD_DIM, halves)).permute(1, 2, 0, 3)
    attention = theirs(rounds, factors, decoder)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **_: drawn.reshape(*shape))
        wanted = attention(x).hidden_states
    # a token that sees itself alone has the log-sum-exp -1e5, whose rounding is in their weights
    exact_to = 1e5 * 2**-52 if decoder else 1e-11
    torch.testing.assert_close(got, wanted, rtol=0, atol=exact_to)
    slope = torch.randn_like(wanted)
    mine, exact = (torch.autograd.grad(out, x, slope)[0] for out in (got, wanted))
    torch.testing.assert_close(mine, exact, rtol=0, atol=2 * exact_to)
