"""Blocks of keys that queries choose: as `reference` has it, and no search for tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.execution import registry
from attndsl.execution.lowered import Lowered
from attndsl.plugins.torch import slabs

CHOSEN = "topk(2, of = blocks(16, causal - radius(0)), by = Q @ mean(K))"
OWN = f"mask causal & (block(16) | {CHOSEN})"
MASKS = {
    "own": OWN,
    "odd": OWN.replace("16", "12"),
    "long": OWN.replace("16", "80"),
    "alone": f"mask {CHOSEN}",
    "full": "mask topk(3, of = blocks(16, full), by = Q @ mean(K))",
    "quest": """mask causal & (sinks(4) | last(20)
        | topk(4, of = blocks(8, causal - radius(0)), by = Q @ max(K)))""",
    "tiles": "mask causal & blocks(16, radius(0) | topk(2, of = causal - radius(0)))",
    "documents": f"inputs ids : int[B, n] {OWN} & documents(ids)",
    "tokens": "mask causal & (last(9) | topk(6, of = { q, k : k <= q and k mod 10 >= 4 }))",
    "tokens of some heads": f"""heads [0] {{ mask causal & (sinks(2) | topk(6, of = causal)) }}
        else {{ {OWN} }} score s + slope * (k - q)""",
    "some heads": f"heads [0] {{ mask causal & last(9) }} else {{ {OWN} }}",
    "alibi": f"{OWN} score alibi",
    "learned": f"{OWN} score s + slope * (k - q)",
    "sink": f"{OWN} norm softmax(sink = learn[H])",
    "sigmoid": f"{OWN} norm sigmoid",
    "linear": f"{OWN} score exp(s) norm linear",
}
HEADS = 4


def tensors(n: int, kv_heads: int, nq: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = (HEADS, n if nq is None else nq, 16), (kv_heads, n, 16), (kv_heads, n, 24)
    return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def results(text: str, backend: str, given: list[Tensor], **tables: Any) -> list[Tensor]:
    """Output, log-sum-exp, and the gradients of both by all that has one."""
    module = attndsl.compile(
        attndsl.parse(f"attention a(slope = learn[H](0.1)) {{ {text} }}")["a"],
        length=300, heads=HEADS, kv_heads=given[1].shape[1],
        head_dim=16, dtype="float64", batch=2, backend=backend, training=True,
    ).module()  # fmt: skip
    leaves = [x.clone().requires_grad_() for x in given]
    out, lse = module(*leaves, return_lse=True, **tables)
    there = lse > -torch.inf
    loss = (out * torch.arange(24)).sin().sum() + (lse[there] * torch.arange(there.sum())).cos().sum()
    return [out, lse, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def refuse(*given: object) -> object:
    raise AssertionError("a search for tiles")


def check(monkeypatch: pytest.MonkeyPatch, text: str, given: list[Tensor], **tables: Any) -> None:
    wanted = results(text, "reference", given, **tables)
    with monkeypatch.context() as patched:
        patched.setattr(Lowered, "tiles", refuse)
        found = results(text, "torch", given, **tables)
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
def test_output_and_gradients(monkeypatch: pytest.MonkeyPatch, name: str, kv_heads: int) -> None:
    tables = {"ids": torch.arange(2 * 141).view(2, 141) // 37} if name == "documents" else {}
    check(monkeypatch, MASKS[name], tensors(141, kv_heads), **tables)


@pytest.mark.parametrize("n", [17, 79, 80, 81, 128, 240])
@pytest.mark.parametrize("name", ["own", "odd", "long", "full", "quest", "tiles"])
def test_lengths(monkeypatch: pytest.MonkeyPatch, name: str, n: int) -> None:
    check(monkeypatch, MASKS[name], tensors(n, 2))


def test_the_last_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, MASKS["quest"], tensors(141, 2, nq=30))


def test_slabs_of_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "PAIRS", 40)
    monkeypatch.setattr(slabs, "FORMED", 64)
    check(monkeypatch, MASKS["quest"], tensors(141, 2))


@pytest.mark.parametrize("name", ["own", "tokens"])
def test_large_logits(name: str) -> None:
    """Where a log-sum-exp does not tell how many keys it is of, parts are not merged by it."""
    given = tensors(141, 2)
    far, near = (
        results(f"{MASKS[name]} score {logit}", "torch", given)[0] for logit in ("0.0 - 1e16", "0.0")
    )
    torch.testing.assert_close(far, near)


def test_a_list_may_say_a_block_twice_or_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    topk = registry.plugin("selections", "topk")

    def choose(origin: Any, offered: Any) -> Tensor:
        drawn = torch.Generator().manual_seed(0)
        return torch.randint(-2, 14, (2, HEADS, offered.q.shape[2], 5), generator=drawn)

    monkeypatch.setattr(type(topk), "choose", lambda self, *given: choose(*given))
    text = "mask causal & (block(12) | topk(5, of = blocks(12, full), by = Q @ mean(K)))"
    check(monkeypatch, text, tensors(141, 2))


def test_what_is_not_finite_is_shown_where_it_is_read() -> None:
    given = tensors(141, 2)
    given[2][0, 1, 20] = torch.nan
    mine, right = (results(MASKS["own"], backend, given)[0] for backend in ("torch", "reference"))
    assert mine.isnan().any()
    torch.testing.assert_close(mine, right, equal_nan=True)
