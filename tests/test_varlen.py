"""Sequences one behind the other give what each gives alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import attndsl
from attndsl.errors import AttnError

HEADS, KV_HEADS, WIDTH, V_WIDTH = 4, 2, 8, 6
TEXTS = {
    "alibi": "mask causal & (last(9) | sinks(2)) score alibi",
    "length": "mask full score s - 0.01 * n * k",
    "padded": "inputs pad : int[B] mask causal & { q, k : k >= pad } norm softmax(sink = learn[H](0.5))",
    "chosen": "mask causal & topk(3)",
}
CU_Q, CU_K = [0, 5, 5, 12, 17], [0, 9, 12, 19, 28]


def plan_of(text: str) -> Any:
    sizes = {"length": 64, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float64"}
    bound = attndsl.parse(f"attention a {{ {text} }}")["a"]
    return attndsl.compile(bound, **sizes, training=True, backend="torch")


def given(queries: int, keys: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    shapes = (queries, HEADS, WIDTH), (keys, KV_HEADS, WIDTH), (keys, KV_HEADS, V_WIDTH)
    return tuple([torch.randn(x, generator=random, dtype=torch.float64, requires_grad=True) for x in shapes])


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("cu_k", [None, CU_K])
def test_sequences_give_what_they_give_alone(name: str, cu_k: list[int] | None) -> None:
    module = plan_of(TEXTS[name]).module()
    ends = cu_k or CU_Q
    q, k, v = given(CU_Q[-1], ends[-1])
    tables = {"pad": torch.tensor([0, 1, 2, 0])} if name == "padded" else {}
    out, lse = module.varlen(q, k, v, torch.tensor(CU_Q, dtype=torch.int32), cu_k, return_lse=True, **tables)
    wanted = [[], []]
    for i, (a, b, c, d) in enumerate(zip(CU_Q, CU_Q[1:], ends, ends[1:], strict=False)):
        if a < b:
            alone = [x[None].transpose(1, 2) for x in (q[a:b], k[c:d], v[c:d])]
            found = module(*alone, return_lse=True, **{x: t[i : i + 1] for x, t in tables.items()})
            for parts, x in zip(wanted, found, strict=True):
                parts.append(x[0].transpose(0, 1))
    for mine, parts in zip((out, lse), wanted, strict=True):
        torch.testing.assert_close(mine, torch.cat(parts), rtol=1e-12, atol=1e-12)
    come = torch.randn(out.shape, dtype=torch.float64)
    leaves = [q, k, v, *module.parameters()]
    grads = torch.autograd.grad(out, leaves, come)
    for mine, alone in zip(grads, torch.autograd.grad(torch.cat(wanted[0]), leaves, come), strict=True):
        torch.testing.assert_close(mine, alone, rtol=1e-12, atol=1e-12)


def test_a_sum_is_of_each_sequence() -> None:
    text = """
    attention near { mask causal & last(3) }
    attention a(g = learn[H](0.8)) { inputs w : float[B] } = g * near - (w + n / 10) * near
    """
    sizes = {"length": 64, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float64"}
    module = attndsl.compile(attndsl.parse(text)["a"], **sizes, training=True).module()
    q, k, v = given(17, 17)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    mine = module.varlen(q, k, v, CU_Q, w=w)
    for i, (a, b) in enumerate(pairwise(CU_Q)):
        if a < b:
            alone = module(*(x[None, a:b].transpose(1, 2) for x in (q, k, v)), w=w[i : i + 1])
            torch.testing.assert_close(mine[a:b], alone[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_no_queries_and_one_sequence() -> None:
    plan = plan_of("mask causal")
    q, k, v = given(7, 7)
    assert plan.varlen(q[:0], k, v, [0, 0], [0, 7]).shape == (0, HEADS, V_WIDTH)
    assert plan.varlen(q, k, v, [0, 7]).shape == (7, HEADS, V_WIDTH)


REFUSED: dict[str, dict[str, Any]] = {
    "`cu_q` rises from 0 to 7, the number of tokens, and was given as": {"cu_q": [0, 5, 6]},
    "`cu_q` rises from 0": {"cu_q": [0, 5, 4, 7]},
    "`cu_k` rises from 0": {"cu_k": [1, 5, 7]},
    "`cu_q` tells of 2 sequences, and `cu_k` of 1": {"cu_k": [0, 7]},
    "`cu_q` is a list of integers": {"cu_q": torch.tensor([0.0, 7.0])},
    "take no `q_offset`": {"q_offset": 3},
    "was given as .1, 4, 7, 8.": {"q": torch.zeros(1, HEADS, 7, WIDTH)},
    "has no input `doc`": {"doc": torch.zeros(7)},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused(said: str) -> None:
    q, k, v = given(7, 7)
    call = {"q": q, "k": k, "v": v, "cu_q": [0, 3, 7], **REFUSED[said]}
    with pytest.raises(AttnError, match=said):
        plan_of("mask causal").varlen(**call)
