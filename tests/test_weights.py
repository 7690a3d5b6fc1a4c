"""The weights that a call returns, beside a dense formula written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.execution.plan import WEIGHTS

N, HEADS, KV_HEADS, WIDTH = 12, 4, 2, 8
Q, K, H = torch.arange(N)[:, None], torch.arange(N), torch.arange(HEADS)[:, None, None]
SINK = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
DOC = torch.arange(N) // 5


class Case(NamedTuple):
    """An attention, which pairs are related, and the weights of logits that are -inf at all others."""

    text: str
    live: Tensor
    weigh: Callable[[Tensor], Tensor]


def rows(s: Tensor) -> Tensor:
    return torch.nan_to_num(s.softmax(-1))


def with_sink(s: Tensor) -> Tensor:
    sink = SINK[:, None, None].expand(*s.shape[:-1], 1)
    return torch.cat([s, sink], -1).softmax(-1)[..., :-1]


def counted(s: Tensor) -> Tensor:
    twice = (1 + (Q - K < 3)) * torch.exp(s)
    return twice / twice.sum(-1, keepdim=True)


CASES = {
    "window": Case("mask causal & last(5)", (K <= Q) & (Q - K < 5), rows),
    "empty rows": Case("mask { q, k : k < q and q mod 3 != 0 }", (K < Q) & (Q % 3 != 0), rows),
    "sink": Case("mask causal norm softmax(sink = sink)", K <= Q, with_sink),
    "score": Case("mask causal score s - 0.1 * (q - k)", K <= Q, lambda s: rows(s - 0.1 * (Q - K))),
    "sigmoid": Case("mask causal norm sigmoid", K <= Q, torch.sigmoid),
    "twice": Case("mask causal + last(3)", K <= Q, counted),
    "heads": Case(
        "heads 0..1 { mask causal } else { mask causal & last(2) }", (K <= Q) & ((H < 2) | (Q - K < 2)), rows
    ),
    "documents": Case("inputs doc : int[B, n] mask { q, k : doc[q] == doc[k] }", DOC[:, None] == DOC, rows),
}


def compiled(name: str, **options: Any) -> attndsl.Plan:
    text, sizes = CASES[name].text, {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "batch": 2}
    found = attndsl.parse(f"attention a(sink = learn[H](0.0)) {{ {text} }}")["a"]
    return attndsl.compile(found, **({"length": N, "dtype": "float64"} | sizes | options))


def given(name: str) -> dict[str, Any]:
    made: dict[str, Any] = {"sink": {"learned": {"sink": SINK}}, "documents": {"doc": DOC.expand(2, N)}}
    return made.get(name, {})  # type: ignore[no-any-return]


def tensors() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, 6)
    return [torch.randn(2, h, N, d, generator=g, dtype=torch.float64).requires_grad_() for h, d in shapes]


def formula(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    weights = case.weigh((q @ k.mT / WIDTH**0.5).masked_fill(~case.live, -torch.inf))
    return weights @ v, weights


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("name", CASES)
def test_weights_and_their_gradients_are_those_of_the_formula(name: str, backend: str | None) -> None:
    plan, qkv, case = compiled(name, backend=backend), tensors(), CASES[name]
    found, expected = plan(*qkv, return_weights=True, **given(name)), formula(case, *qkv)
    slopes = [torch.randn_like(x) for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not found[1][:, (~case.live).expand(HEADS, N, N)].any()
    torch.testing.assert_close(found[0], plan(*qkv, **given(name)))
    # without infinities, of which the formula has no gradients
    if name != "empty rows":
        grads = [torch.autograd.grad(results, qkv, slopes) for results in (found, expected)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_rows_without_keys_have_no_gradients() -> None:
    plan, (q, k, v) = compiled("empty rows"), tensors()
    _, weights = plan(q, k, v, return_weights=True)
    grads = torch.autograd.grad(weights.square().sum(), (q, k))
    assert all(x.isfinite().all() for x in grads)
    assert not grads[0][:, :, ::3].any()
    assert grads[0].any()


def test_of_some_queries_and_beside_the_log_sum_exp() -> None:
    plan, (q, k, v) = compiled("window"), tensors()
    out, lse, weights = plan(q, k, v, return_lse=True, return_weights=True)
    torch.testing.assert_close(lse, plan(q, k, v, return_lse=True)[1])
    last = plan(q[:, :, -2:], k, v, return_weights=True, q_offset=torch.tensor(N - 2))
    torch.testing.assert_close(last, (out[:, :, -2:], weights[:, :, -2:]))
    positions = [3, 7]
    some = plan(q[:, :, positions], k, v, return_weights=True, q_positions=positions)[1]
    torch.testing.assert_close(some, weights[:, :, positions])


def test_a_module_vmap_and_a_compiled_function_give_them() -> None:
    plan = compiled("sink", training=True)
    module, qkv = plan.module(), tensors()
    torch.nn.init.normal_(module.get_parameter("sink"))
    values = {"sink": module.get_parameter("sink")}
    expected = plan(*qkv, return_weights=True, learned=values)
    torch.testing.assert_close(module(*qkv, return_weights=True), expected)
    many = torch.func.vmap(lambda q, k, v: plan(q, k, v, return_weights=True, learned=values))
    torch.testing.assert_close(many(*(x[None] for x in qkv))[1][0], expected[1])
    fast = torch.compile(lambda *qkv: module(*qkv, return_weights=True), backend="eager", fullgraph=True)
    torch.testing.assert_close(fast(*qkv), expected)


def test_in_half_precision_they_are_rounded_once() -> None:
    plan, qkv = compiled("window"), [x.detach().bfloat16() for x in tensors()]
    found = plan(*qkv, return_weights=True)[1]
    exact = formula(CASES["window"], *(x.double() for x in qkv))[1]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, atol=0, rtol=2**-8)


def test_of_many_pairs_they_are_refused() -> None:
    n = 1 + int((WEIGHTS / HEADS) ** 0.5)
    plan = compiled("window", length=n, dtype="bfloat16", batch=1)
    q, k = (torch.zeros(1, h, n, WIDTH, dtype=torch.bfloat16) for h in (HEADS, KV_HEADS))
    with pytest.raises(attndsl.AttnError, match=f"may be {WEIGHTS:,}") as caught:
        plan(q, k, k, return_weights=True)
    assert len(caught.value.diagnostics) == 1
    with pytest.raises(attndsl.AttnError, match="are too many"):
        plan(q[:, :, :1], k, k, return_weights=True)


def test_choices_by_content_are_those_of_the_call() -> None:
    found = attndsl.parse("attention a { mask topk(3, of = causal) }")["a"]
    plan = attndsl.compile(found, length=N, heads=HEADS, kv_heads=KV_HEADS, head_dim=WIDTH, dtype="float64")
    q, k, v = tensors()
    mask = found.mask(N, heads=HEADS, **plan.choices(q, k))
    weights = plan(q, k, v, return_weights=True)[1]
    assert np.array_equal((weights > 0).numpy(), np.broadcast_to(mask, weights.shape))
