"""Orders by their pieces, beside `reference`, which forms all pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.plugins.torch import orders

MASKS = {
    "set": "mask causal & lsh(rounds = 3, chunk = 8)",
    "not causal": "mask lsh(rounds = 2, chunk = 8)",
    "multiset": "mask lsh(rounds = 3, chunk = 8, count = true) - ~causal",
    "counts that `&` drops": "mask causal & lsh(rounds = 3, chunk = 8, count = true)",
    "set, wrapped": "mask causal & lsh(rounds = 3, chunk = 8, wrap = true)",
    "one round, wrapped": "mask lsh(rounds = 1, chunk = 8, wrap = true)",
    "multiset, wrapped": "mask lsh(rounds = 3, chunk = 8, wrap = true, count = true) - ~causal",
    "one round, wrapped, multiset": "mask lsh(rounds = 1, chunk = 8, wrap = true, count = true)",
    "documents": "inputs doc : int[n]  mask causal & documents(doc) & lsh(rounds = 2, chunk = 8)",
    "rows without a key": "mask { q, k : k < q - 2 } & lsh(rounds = 2, chunk = 4)",
    "clusters": "inputs mu : float[H, 5, D]  mask causal & cluster(mu, 9)",
    "near of one label": "mask causal & within(hash(4), last(5))",
    "near of one label, in documents": "inputs doc : int[n]  mask documents(doc) & within(hash(2), last(9))",
    "itself alone": "mask within(hash(4), last(1))",
    "nearest, longer than all": "inputs mu : float[H, 5, D]  mask causal & within(nearest(mu), last(70))",
    "more clusters than bits": "inputs mu : float[70, D]  mask cluster(mu, 6)",
}
SCORES = {
    "s": "",
    "shared": "score shared_qk",
    "scaled": "score 0.7 * s",
    "not affine": "score softcap(3.0)",
    "bias": "score alibi",
}
CASES = [(mask, "s") for mask in MASKS]
CASES += [
    (mask, score)
    for mask in ("set", "multiset, wrapped", "documents", "near of one label")
    for score in list(SCORES)[1:]
]
HEADS, KV_HEADS, WIDTH = 4, 2, 16


def plan_of(text: str, backend: str, dtype: str = "float64") -> attndsl.Plan:
    return attndsl.compile(
        attndsl.parse(f"attention a {{ {text} }}")["a"], length=64, heads=HEADS, kv_heads=KV_HEADS,
        head_dim=WIDTH, batch=2, dtype=dtype, backend=backend, training=True,
    )  # fmt: skip


def inputs(text: str, n: int, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed + n)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tables = {"doc": torch.arange(n) // 7}
    tables["mu"] = drawn(HEADS, 5, WIDTH) if "float[H" in text else drawn(70, WIDTH)
    vectors = [drawn(2, heads, n, WIDTH).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return vectors, {name: x for name, x in tables.items() if f"inputs {name}" in text}


def results(plan: attndsl.Plan, vectors: list[Tensor], tables: dict[str, Tensor]) -> tuple[Tensor, ...]:
    out, lse = plan(*vectors, return_lse=True, **tables)
    slopes = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out), torch.ones_like(lse)
    return out, lse, *torch.autograd.grad((out, lse), vectors, slopes)


@pytest.mark.parametrize("n", [8, 41])
@pytest.mark.parametrize(("mask", "score"), CASES)
def test_pieces_are_what_all_pairs_give(mask: str, score: str, n: int) -> None:
    text = f"{MASKS[mask]} {SCORES[score]}"
    assert orders.ordered_of(attndsl.parse(f"attention a {{ {text} }}")["a"].attention)
    given = inputs(text, n)
    got, wanted = (results(plan_of(text, backend), *given) for backend in ("torch", "reference"))
    for mine, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "mask causal & (lsh(rounds = 2, chunk = 8) | last(2))",
        "mask lsh(rounds = 2, chunk = 8) & lsh(rounds = 2, chunk = 4)",
        "mask causal & (within(hash(4), last(5)) | last(2))",
        "mask within(hash(4), radius(2))",
        "mask causal & within(hash(4), full)",
        "mask lsh(rounds = 2, chunk = 8)  decay 0.9 ** |q - k|",
        "mask lsh(rounds = 2, chunk = 8, count = true)  decay 0.9 ** |q - k|",
        "mask lsh(rounds = 2, chunk = 8)  norm sigmoid",
        "mask lsh(rounds = 2, chunk = 8)  norm softmax(sink = 0.5)",
        "mask lsh(rounds = 2, chunk = 8)  score s + K @ K",
    ],
)
def test_what_is_more_than_pieces_is_left_to_tiles(text: str) -> None:
    given = inputs(text, 24)
    got, wanted = (results(plan_of(text, backend), *given) for backend in ("torch", "reference"))
    for mine, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "heads 0..1 { mask causal & lsh(rounds = 2, chunk = 8) } else { mask causal & last(5) }",
        "inputs mu : float[H, 5, D]  heads 0 { mask cluster(mu, 9) } else { mask causal  norm sigmoid }",
        "heads 0 { mask causal & lsh(rounds = 2, chunk = 8)  score shared_qk } "
        "1 { mask topk(4, of = causal) } else { mask lsh(rounds = 2, chunk = 8, count = true) - ~causal }",
    ],
)
def test_heads_that_differ(text: str) -> None:
    assert None in orders.ordered_of(attndsl.parse(f"attention a {{ {text} }}")["a"].attention)
    given = inputs(text, 40)
    got, wanted = (results(plan_of(text, backend), *given) for backend in ("torch", "reference"))
    for mine, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


def test_a_bias_is_trained() -> None:
    text = "mask causal & lsh(rounds = 2, chunk = 8)  score relative(learn[H, 5], 2)"
    vectors, _ = inputs(text, 40)
    grads = []
    for backend in ("torch", "reference"):
        module = plan_of(text, backend).module().double()
        (bias,) = module.parameters()
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(0))
        module(*vectors).square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mask", ["set", "multiset, wrapped"])
def test_a_token_that_sees_itself_alone_weighs_one_in_float32(mask: str) -> None:
    """Its log-sum-exp is -1e5 and the logarithm of how often, which float32 rounds by a hundredth."""
    text = f"{MASKS[mask]} score shared_qk"
    vectors, _ = inputs(text, 33)
    narrow = [x.detach().float().requires_grad_() for x in vectors]
    wanted = results(plan_of(text, "reference"), [x.detach().double().requires_grad_() for x in narrow], {})
    got = results(plan_of(text, "torch", "float32"), narrow, {})
    for i, (mine, exact) in enumerate(zip(got, wanted, strict=True)):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=0.01 if i == 1 else 1e-5)


def test_nan_is_shown_where_it_is_seen_and_nowhere_else() -> None:
    plan, bound = plan_of(MASKS["set"], "torch"), attndsl.parse(f"attention a {{ {MASKS['set']} }}")["a"]
    (q, k, v), _ = inputs(MASKS["set"], 40)
    with torch.no_grad():
        q[0, 1, 7] = k[1, 0, 3] = torch.nan
    chosen = {name: x.numpy() for name, x in plan.choices(q, k).items()}
    seen = torch.from_numpy(bound.mask(40, heads=HEADS, **chosen))
    wanted = torch.zeros(2, HEADS, 40, dtype=torch.bool)
    wanted[0, 1, 7] = True
    wanted[1, :2] = seen[1, :2, :, 3]
    assert torch.equal(plan(q, k, v).isnan().any(-1), wanted)


def test_more_pieces_than_are_formed_at_once(monkeypatch) -> None:
    monkeypatch.setattr(orders, "AT_ONCE", 3 * 8 * 16)
    for mask in ("set, wrapped", "clusters"):
        given = inputs(MASKS[mask], 61)
        got = results(plan_of(MASKS[mask], "torch"), *given)
        for mine, exact in zip(got, results(plan_of(MASKS[mask], "reference"), *given), strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)
