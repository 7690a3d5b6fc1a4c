"""Calls like an earlier one give what that would have given, and nothing passes for one that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.errors import AttnError
from attndsl.execution.lowered import KEPT, Recent
from attndsl.plugins.cpu import build
from attndsl.plugins.cpu.kernel import Compiled

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason=f"the backend `cpu` declines: {build.MISSING}"
)
CAUSAL = "mask causal"
HEADS, N = 4, 96


def plan_of(text: str = CAUSAL, backend: str = "cpu", **more: Any) -> Any:
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    more = {"length": N, "heads": HEADS, "kv_heads": 2, "head_dim": 16, "training": True} | more
    return attndsl.compile(attention, backend=backend, **more)


def vectors(
    seed: int, n: int = N, nq: int = N, batch: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, nq, 16), (2, n, 16), (2, n, 24)
    return [torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls of the kernel that were not prepared."""
    seen: list[object] = []
    call = Compiled.__call__
    monkeypatch.setattr(Compiled, "__call__", lambda self, given: seen.append(given) or call(self, given))
    return seen


@pytest.mark.parametrize(
    ("text", "prepares"),
    [
        (CAUSAL, True),
        ("heads 0..1 { mask causal } else { mask causal & last(7) score s / 2 }", True),
        ("mask causal score alibi", False),
        ("mask causal norm softmax(sink = 1.0)", False),
    ],
)
def test_numbers_are_those_of_the_call(text: str, prepares: bool, whole: list[object]) -> None:
    plan, exact = plan_of(text), plan_of(text, "reference")
    for seed in range(3):
        given = vectors(seed)
        for x, y in zip(plan(*given, return_lse=True), exact(*given, return_lse=True), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert len(whole) == (1 if prepares else 3)


def test_what_differs_is_another_call(whole: list[object]) -> None:
    """Lengths, strides, dtypes, batch rows, the number of threads."""
    plan, exact = plan_of(), plan_of(backend="reference")
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in vectors(1)]
    others = [
        vectors(0), vectors(2, n=70, nq=33), turned, vectors(3, batch=1), vectors(4, dtype=torch.float64),
        vectors(5, dtype=torch.bfloat16),
    ]  # fmt: skip
    for _ in range(2):
        for given in others:
            tolerance = 2e-2 if given[0].dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(plan(*given), exact(*given), rtol=tolerance, atol=tolerance)
    # halves are widened, for which nothing is prepared
    assert len(whole) == len(others) + 1
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        plan(*vectors(0))
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert len(whole) == len(others) + 2


def test_gradients(whole: list[object]) -> None:
    found = []
    for plan in (plan_of(), plan_of(backend="reference")):
        for seed in (1, 0):
            leaves = [x.requires_grad_() for x in vectors(seed)]
            out, lse = plan(*leaves, return_lse=True)
            grads = torch.autograd.grad((out * out).sum() + lse.sin().sum(), leaves)
        found.append([out, lse, *grads])
    assert len(whole) == 1
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def zeros(x: Tensor) -> Tensor:
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


@pytest.mark.parametrize("turned", [torch._neg_view, zeros])
@pytest.mark.parametrize("text", [CAUSAL, "mask causal score alibi"])
def test_numbers_that_do_not_stand_in_memory(text: str, turned: Callable[[Tensor], Tensor]) -> None:
    """Views that negate, as torch makes them of the imaginary part of a conjugate, and zeros of autograd."""
    found = []
    for plan, meant in ((plan_of(text), False), (plan_of(text, "reference"), True)):
        plan(*vectors(0))
        for at in range(4):
            given = [*vectors(1), torch.ones(2, HEADS, N, 24)]
            given[at] = turned(given[at])
            *leaves, back = (x.clone() for x in given) if meant else given
            leaves = [x.detach().requires_grad_() for x in leaves]
            out = plan(*leaves)
            found.append([out, *torch.autograd.grad(out, leaves, back)])
    for mine, wanted in zip(found[:4], found[4:], strict=True):
        for x, y in zip(mine, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


class Raced(dict[Any, Any]):
    """What another thread drops the oldest of just before."""

    def pop(self, key: Any, *default: Any) -> Any:
        super().pop(key, None)
        return super().pop(key, *default)


def test_what_is_known_is_dropped_by_any_thread() -> None:
    known: Recent[int] = Recent()
    known.values = Raced()
    for i in range(2 * KEPT):
        assert known.get((i,), lambda: i) == i  # noqa: B023
    assert [*known.values] == [(i,) for i in range(KEPT, 2 * KEPT)]


def test_what_is_not_finite() -> None:
    """Of a NaN behind a row that row knows nothing, which a kernel alone does not promise."""
    plan, exact = plan_of(), plan_of(backend="reference")
    plan(*vectors(0))
    q, k, v = vectors(1)
    k[:, :, 50, 3], v[:, 0, 20, 1] = torch.nan, torch.inf
    mine, wanted = plan(q, k, v), exact(q, k, v)
    assert mine[:, :, :20].isfinite().all()
    torch.testing.assert_close(mine[:, :, :20], wanted[:, :, :20], rtol=1e-5, atol=1e-5)
    assert mine[:, :, 50:].isnan().all()


def test_transforms_see_what_they_saw() -> None:
    plan, given = plan_of(), vectors(0)
    plain = plan(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert plan(*given).dtype == torch.bfloat16
    many = torch.vmap(plan)(*(torch.stack([x, x]) for x in given))
    torch.testing.assert_close(many[1], plain)
    compiled = torch.compile(lambda *x: plan(*x) + 1, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), plain + 1)
    with torch.profiler.profile() as seen:
        plan(*given)
    assert any(event.name == "attndsl::attend" for event in seen.events())


def test_what_is_refused_still_is() -> None:
    plan, (q, k, v) = plan_of(), vectors(0)
    plan(q, k, v)
    for wrong in ((q, k, v[:, :, 1:]), (q, k.double(), v), (q[0], k, v), (q, k, v.to_sparse())):
        with pytest.raises(AttnError):
            plan(*wrong)
    with pytest.raises(AttnError, match="no input"):
        plan(q, k, v, doc=torch.zeros(N))
