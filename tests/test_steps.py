"""Decoding and prefill as torch sees them: graphs, what is copied of a cache, and threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attndsl
from attndsl.execution import operator

HEADS, WIDTH = 8, 16
MASKS = ["causal", "causal & last(20)", "causal & (last(20) | sinks(4))", "strided(32)"]


def compiled(clauses: str, length: int, **sizes: Any) -> attndsl.Plan:
    found = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    return attndsl.compile(found, **{"length": length, "heads": HEADS, "head_dim": WIDTH, **sizes})


@pytest.fixture
def counted() -> Callable[[Callable[..., Any]], tuple[Callable[..., Any], CompileCounter]]:
    """A function under torch.compile, and how many graphs it was."""
    torch._dynamo.reset()

    def made(function: Callable[..., Any]) -> tuple[Callable[..., Any], CompileCounter]:
        graphs = CompileCounter()
        return torch.compile(function, backend=graphs, fullgraph=True), graphs

    return made


@pytest.mark.parametrize("mask", MASKS[:3])
@pytest.mark.parametrize("given", ["tensors", "integers", "growing"])
def test_graphs_of_a_hundred_steps(mask: str, given: str, counted: Any) -> None:
    plan = compiled(f"mask {mask}", 256, q_length=1, kv_heads=2)
    keys, values = torch.randn(2, 1, 2, 256, WIDTH)

    def offset(q: Tensor, new: Tensor, at: Any) -> Any:
        place = at if isinstance(at, Tensor) else slice(at, at + 1)
        keys[:, :, place], values[:, :, place] = new
        return plan(q, keys, values, q_offset=at)

    def growing(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return plan(q, k, v)

    fast, graphs = counted(growing if given == "growing" else offset)
    for i in range(100, 200):
        q, new = torch.randn(1, HEADS, 1, WIDTH), torch.randn(2, 1, 2, 1, WIDTH)
        if given == "growing":
            keys[:, :, i : i + 1], values[:, :, i : i + 1] = new
            out = fast(q, keys[:, :, : i + 1], values[:, :, : i + 1])
        else:
            out = fast(q, new, torch.tensor([i]) if given == "tensors" else i)
        torch.testing.assert_close(out, plan(q, keys[:, :, : i + 1], values[:, :, : i + 1]))
        assert torch.equal(keys[:, :, i], new[0, :, :, 0])
    assert graphs.frame_count == (1 if given == "tensors" else 2)


class Copies(TorchDispatchMode):
    """Of these tensors: how many numbers operators made of them, by operator, views and the steps of the
    kernels that attend aside."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()
        self.places = {x.untyped_storage().data_ptr() for x in watched}
        self.found: Counter[str] = Counter()

    def of_ours(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage().data_ptr() in self.places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.attndsl.attend.default:
            with self:
                return operator.attend._init_fn(*args, **kwargs or {})
        out = func(*args, **kwargs or {})
        if any(map(self.of_ours, tree_leaves((args, kwargs)))):
            for made in tree_leaves(out):
                if isinstance(made, Tensor) and not self.of_ours(made) and "flash" not in str(func):
                    self.found[str(func)] += made.numel()
        return out


@pytest.mark.parametrize("clauses", [*(f"mask {mask}" for mask in MASKS), "mask causal score alibi"])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_a_step_copies_nothing_of_the_cache(clauses: str, kv_heads: int) -> None:
    length, most = 1024, 4
    session = compiled(clauses, length, kv_heads=kv_heads).session(1, length, rewind=most)
    first = torch.randn(1, HEADS, 1000, WIDTH), *torch.randn(2, 1, kv_heads, 1000, WIDTH)
    session.prefill(*first)
    k, v = torch.randn(2, 1, kv_heads, length, WIDTH)  # one storage
    for nq in (1, most):
        plan = compiled(clauses, length, q_length=nq, kv_heads=kv_heads)
        new = torch.randn(1, HEADS, nq, WIDTH), *torch.randn(2, 1, kv_heads, nq, WIDTH)
        with torch.no_grad(), Copies(k) as of_plan, Copies(session.k, session.v) as of_session:
            plan(new[0], k[:, :, :1000], v[:, :, :1000])
            session.step(*new)
        # few keys that stand apart, or that some of the queries see, are gathered
        bound = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
        seen = int(bound.mask(1000, nq).any((0, 1)).sum()) + most
        some = seen < 256 and (nq > 1 or "strided" in clauses)
        gathered = 2 * seen * kv_heads * WIDTH if some else 0
        assert of_plan.found.total() <= gathered
        # several queries read a ring where it wraps
        ring = 2 * session.k.numel() if session.ring and nq > 1 else 0
        assert of_session.found.total() <= max(gathered, ring)


@pytest.mark.parametrize("clauses", ["mask causal", "mask causal & last(20)", "mask full"])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_a_dense_prefill_copies_keys_and_values_once(clauses: str, kv_heads: int) -> None:
    plan = compiled(clauses, 500, kv_heads=kv_heads, backend="sdpa")
    q, cache = torch.randn(1, HEADS, 500, WIDTH), torch.randn(2, 1, kv_heads, 600, WIDTH)
    with torch.no_grad(), Copies(cache) as copies:
        plan(q, *cache[:, :, :, :500])
    once = 2 * q.numel() if kv_heads < HEADS and "full" not in clauses else 0
    assert copies.found.total() == once


@pytest.mark.parametrize("mask", ["causal", "causal & last(300)", "causal & (last(200) | sinks(4))", "full"])
@pytest.mark.parametrize("length", [250, 256, 500, 2000])
def test_a_prefill_on_tiles_copies_keys_and_values_at_most_once(mask: str, length: int) -> None:
    plan = compiled(f"mask {mask}", length, backend="torch")
    q, cache = torch.randn(1, HEADS, length, WIDTH), torch.randn(2, 1, HEADS, length + 100, WIDTH)
    with torch.no_grad(), Copies(cache) as copies:
        plan(q, *cache[:, :, :, :length])
    assert copies.found.total() <= 2 * q.numel()


TABLES = "inputs doc : int[B, n] mask causal & documents(doc)"


def test_threads_share_a_plan_of_tables_and_lengths() -> None:
    plan, lengths = compiled(TABLES, 64, batch=2), (64, 50, 33, 17)
    torch.manual_seed(0)
    cases = []
    for i in range(32):
        n = lengths[i % 4]
        q, k, v = torch.randn(3, 2, HEADS, n, WIDTH)
        doc = torch.randint(0, 3, (2, n)).sort().values
        nq = 1 + i % 5 if i % 3 else n
        cases.append((q[:, :, -nq:], k, v, doc))

    def expected(q: Tensor, k: Tensor, v: Tensor, doc: Tensor) -> Tensor:
        n = k.shape[2]
        live = (doc[:, :, None] == doc[:, None]) & (torch.arange(n)[:, None] >= torch.arange(n))
        live = live[:, None, -q.shape[2] :]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=live)

    def worker(start: int) -> list[tuple[int, Tensor]]:
        order = [(start * 5 + i * 7) % len(cases) for i in range(60)]
        return [(i, plan(*cases[i][:3], doc=cases[i][3])) for i in order]

    right = [expected(*case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(worker, range(8)):
            for i, out in results:
                torch.testing.assert_close(out, right[i])
