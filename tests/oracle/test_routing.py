"""Clusters against routing-transformer, in float64, with the same centers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl

pytest.importorskip("routing_transformer")
from routing_transformer.routing_transformer import KmeansAttention

pytestmark = pytest.mark.oracle

HEADS, HEAD_DIM, CLUSTERS, WIDTH = 2, 8, 4, 10


# Theirs is the mean of one softmax for each cluster that holds a query, with 1e-5 beside their number, so 0
# for a query in none. Products with centers are of vectors of length 1, logits of those that came. Padding
# takes places in a cluster, as later tokens do, and is hidden only then.


def theirs(mu: Tensor, **options: bool) -> KmeansAttention:
    found = KmeansAttention(CLUSTERS, WIDTH, HEADS, HEAD_DIM, **options).double().eval()
    found.kmeans.means.copy_(mu)
    # else the first call makes centers of what it sees
    found.kmeans.initted.fill_(True)
    return found


def ours(clauses: str, heads: int, centers: int, n: int, backend: str) -> attndsl.Plan:
    text = f"attention a {{ inputs mu : float[H, {centers}, D]  {clauses} }}"
    return attndsl.compile(
        attndsl.parse(text)["a"], length=n, heads=heads, head_dim=HEAD_DIM, batch=2, dtype="float64",
        backend=backend, training=True,
    )  # fmt: skip


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def vectors(n: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = drawn(3, 2, HEADS, n, HEAD_DIM)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def same(got: Tensor, wanted: Tensor, *of: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    slope = torch.randn_like(wanted)
    grads = (torch.autograd.grad(out, of, slope) for out in (got, wanted))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("aligned", [False, True])
def test_each_query_in_one_cluster(aligned: bool, backend: str) -> None:
    """Keys may be in several or in none, unless `aligned`, as queries are."""
    n = CLUSTERS * WIDTH
    mu = torch.eye(HEAD_DIM, dtype=torch.float64)[:CLUSTERS].expand(HEADS, -1, -1)
    near = 100 * mu[:, torch.randperm(n, generator=torch.Generator().manual_seed(0)) % CLUSTERS]
    q, k, v = (x.detach() for x in vectors(n))
    q, k, v = (x.requires_grad_() for x in (q + near, k + near * aligned, v))
    got = ours(f"mask cluster(mu, {WIDTH})", HEADS, CLUSTERS, n, backend)(q, k, v, mu=mu) / 1.00001
    same(got, theirs(mu)(q, k, v)[0], q, k, v)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("causal", "shared"), [(False, False), (False, True), (True, True), (True, False)])
@pytest.mark.parametrize("n", [7, 40, 61])
def test_any_number_of_clusters(causal: bool, shared: bool, backend: str, n: int) -> None:
    """Each cluster is a head of its own here."""
    (q, k, v), mu = vectors(n), drawn(HEADS, CLUSTERS, HEAD_DIM)
    attention, score = theirs(mu, causal=causal, shared_qk=shared), ""
    if shared:
        # keys have length 1, and one that is the query itself is seen where there is no other
        score, k = "score where(q == k, -50000.0, Q @ unit(K) / sqrt(D))", q
    plan = ours(f"mask {'causal & ' * causal}cluster(mu, {WIDTH}) {score}", HEADS * CLUSTERS, 1, n, backend)
    q_, k_, v_ = (x.repeat_interleave(CLUSTERS, 1) for x in (q, k, v))
    each = mu.view(-1, 1, HEAD_DIM)
    out, lse = plan(q_, k_, v_, return_lse=True, mu=each)
    [ranks] = plan.choices(q_, k_, mu=each).values()
    held = (ranks[:, :, 0] < WIDTH)[..., None]
    if causal and not shared:
        # a learned key and value of each cluster, that all of its queries see
        null_k, null_v = (x.flatten(0, 1) for x in (attention.mem_key, attention.mem_value))
        null = (q_ @ null_k.mT).squeeze(-1) / HEAD_DIM**0.5
        share = torch.sigmoid(lse - null)[..., None]
        out = torch.where(held, share * out + (1 - share) * null_v, 0.0)
    held, out = (x.unflatten(1, (HEADS, CLUSTERS)).sum(2) for x in (held.double(), out))
    same(out / (held + 1e-5), attention(q, k, v)[0], q, k, v)
