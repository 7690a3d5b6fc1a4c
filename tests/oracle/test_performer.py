"""FAVOR+ against performer-pytorch, in float64, with our random features as its projection."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.expr import Drawn
from attndsl.meaning import draws

pytest.importorskip("performer_pytorch")
with warnings.catch_warnings():
    # of distutils
    warnings.simplefilter("ignore", DeprecationWarning)
    from performer_pytorch.performer_pytorch import FastAttention

pytestmark = pytest.mark.oracle

HEADS, HEAD_DIM, FEATURES = 2, 8, 20

# Theirs divides exponentials of a query by the greatest of its features and those of keys by the greatest of
# all keys, later ones too, and adds 0.0001 to what is left: so both maxima are in the result, as inputs here.
# Its ReLU is of vectors that are scaled and projected; in the JAX code that it transcribes they are neither
# by default, as in the prelude.
KERNELS = {
    "softmax": (
        "inputs above : float[B, H, n]  most : float[B, H]",
        "favor(Q, orthogonal(20)) * exp(-above[q]) + 0.0001",
        "favor(K, orthogonal(20)) * exp(-most) + 0.0001",
    ),
    "relu": (
        "",
        "relu_features(orthogonal(20) @ Q / D ** 0.25)",
        "relu_features(orthogonal(20) @ K / D ** 0.25)",
    ),
}


def theirs(kernel: str, causal: bool) -> FastAttention:
    found = FastAttention(HEAD_DIM, FEATURES, causal=causal, generalized_attention=kernel == "relu").double()
    found.projection_matrix.copy_(rows())
    return found


def rows() -> Tensor:
    return torch.tensor(draws.drawn(Drawn("orthogonal", 0), FEATURES, HEAD_DIM))


def maxima(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, n] of the projections of each query, and [B, H] of those of all keys."""
    of_q, of_k = (x.detach() @ rows().T / HEAD_DIM**0.25 for x in (q, k))
    return of_q.amax(-1), of_k.amax((-2, -1))


def vectors(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    shape = 2, HEADS, n, HEAD_DIM
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("backend", ["linear", "reference"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 40, 300])
def test_performer(kernel: str, causal: bool, backend: str, n: int) -> None:
    """Causal, theirs adds 0.000001 to the sums of features of keys, but not to those times values: so does a
    first key that has this for each feature, and the value 0."""
    inputs, of_q, of_k = KERNELS[kernel]
    if causal:
        # their softmax features are divided by the root of how many there are, which cancels elsewhere
        eps = 1e-6 * (FEATURES**0.5 if kernel == "softmax" else 1)
        of_k = f"where(k == 0, {eps:.20f}, {of_k})"
    text = f"attention a {{ {inputs} {'mask causal' * causal} score ({of_q}) @ ({of_k}) norm linear }}"
    plan = attndsl.compile(
        attndsl.parse(text)["a"], length=n + causal, heads=HEADS, head_dim=HEAD_DIM, batch=2,
        dtype="float64", backend=backend, training=True,
    )  # fmt: skip

    def led(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :, :1]), x], 2) if causal else x

    q, k, v = vectors(n)
    above, most = maxima(q, k)
    tables = {"above": led(above), "most": most} if inputs else {}
    got = plan(led(q), led(k), led(v), **tables)[:, :, int(causal) :]
    wanted = theirs(kernel, causal)(q, k, v)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    slope = torch.randn_like(wanted)
    grads = (torch.autograd.grad(out, (q, k, v), slope) for out in (got, wanted))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-10)
