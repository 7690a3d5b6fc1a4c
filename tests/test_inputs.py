"""What a call may be given: tables and offsets of every kind that Python has for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attndsl
from attndsl.meaning.links import sample

TEXT = "attention a { inputs doc : int[n] mask causal & documents(doc) }"
Q, K, V = (torch.randn(2, 1, 16, 8) for _ in "qkv")


def plan(text: str = TEXT) -> attndsl.Plan:
    return attndsl.compile(attndsl.parse(text)["a"], length=16, head_dim=8)


@pytest.mark.parametrize(
    "table",
    [
        np.full(16, 0.5),
        torch.ones(16),
        torch.ones(16, dtype=torch.complex64),
        np.ones(16, bool),
        None,
        "abc",
        [[0], [0, 1]],
        [2**70] * 16,
        torch.zeros(16, dtype=torch.int64).to_sparse(),
        np.zeros(3, int),
    ],
    ids=lambda table: type(table).__name__,
)
def test_a_table_of_another_kind_is_refused_by_call_and_bind(table: Any) -> None:
    with pytest.raises(attndsl.AttnError, match="`doc`"):
        plan()(Q, K, V, doc=table)
    with pytest.raises(attndsl.AttnError, match="`doc`"):
        plan().bind(doc=table)


def test_integers_of_any_width_and_order_mean_the_same() -> None:
    doc = np.arange(16) // 5
    expected = plan()(Q, K, V, doc=doc)
    for same in (doc.astype(">i8"), doc.astype(np.uint8), doc.tolist(), torch.from_numpy(doc).int()):
        assert torch.equal(plan()(Q, K, V, doc=same), expected)


def test_what_is_bound_stays_as_it_was() -> None:
    doc = np.arange(16) // 4
    bound = plan().bind(doc=doc)
    before = bound(Q, K, V)
    doc[:] = 0
    assert torch.equal(bound(Q, K, V), before)


@pytest.mark.parametrize("offset", [[1.9, 2.9], (), True, 1.5, "ab", 10**30, [1, 2, 3]])
def test_an_offset_is_an_integer_or_one_per_batch_row(offset: Any) -> None:
    with pytest.raises(attndsl.AttnError, match="`q_offset`"):
        plan("attention a { mask causal }")(Q[:, :, :1], K, V, q_offset=offset)


def test_offsets_of_every_integer_type() -> None:
    causal, q = plan("attention a { mask causal }"), Q[:, :, :1]
    expected = causal(q, K, V, q_offset=3)
    for same in (np.int64(3), torch.tensor(3), [3, 3], np.array([3, 3]), torch.tensor([3, 3])):
        assert torch.equal(causal(q, K, V, q_offset=same), expected)


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(attndsl.AttnError, match="no device"):
        attndsl.compile(attndsl.parse(TEXT)["a"], length=16, device=device)


def test_a_program_in_a_notebook() -> None:
    program = attndsl.parse("attention a { mask causal } let w = 3 pattern b = last(w)")
    assert list(program) == ["a", "b"]
    assert ("a" in program, "w" in program, len(program)) == (True, False, 2)
    assert "a, b" in repr(program)
    assert program["b"]().mask(4).sum() == 9


def test_a_range_is_not_walked() -> None:
    attention = attndsl.parse("attention a(where_ = [0]) { mask columns(where_) }")["a"]
    assert attention(where_=range(10**12)).mask(4).all()
    with pytest.raises(attndsl.AttnError, match="members"):
        attention(where_=range(0, 10**12, 2))


def test_a_mask_too_large_to_write_out() -> None:
    with pytest.raises(attndsl.AttnError, match="block_mask"):
        attndsl.parse("attention a { mask causal }")["a"].mask(2**31 - 1)


BIASED = """attention a {
    inputs doc : int[B, n] kind : int[n] bias : float[B, kinds]
    mask causal & documents(doc)
    score s + bias[kind[k]]
}"""


@pytest.mark.parametrize("backend", ["reference", "sdpa", "torch"])
def test_one_batch_row_of_a_table_serves_all(backend: str) -> None:
    given = {"doc": np.arange(16)[None] // 5, "kind": np.arange(16) % 3, "bias": torch.randn(1, 3)}
    every = given | {"doc": given["doc"].repeat(2, 0), "bias": given["bias"].repeat(2, 1)}
    one = attndsl.compile(attndsl.parse(BIASED)["a"], length=16, head_dim=8, backend=backend, training=True)
    assert torch.equal(one(Q, K, V, **given), one(Q, K, V, **every))
    assert torch.equal(one.bind(**given)(Q, K, V), one(Q, K, V, **every))
    leaves = [given["bias"].clone().requires_grad_(), every["bias"].clone().requires_grad_()]
    for tables, leaf in zip((given, every), leaves, strict=True):
        one(Q, K, V, **{**tables, "bias": leaf}).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad.sum(0, keepdim=True))
    assert leaves[0].grad.abs().min() > 0
    with pytest.raises(attndsl.AttnError, match="`doc` has 3 entries on its axis `B`"):
        one(Q, K, V, **{**given, "doc": given["doc"].repeat(3, 0)})


P = torch.arange(16)
S = Q @ K.mT / 8**0.5
TWO = torch.randn(2, 16, 16)
READING = {
    "mask": (
        "inputs t : int[n]  mask causal & documents(t)",
        (P // 4, P // 5),
        lambda t: torch.where(t[:, None] == t, S, -torch.inf),
    ),
    "score": ("inputs t : float[n, n]  mask causal  score s + t[q, k]", TWO, lambda t: S + t),
    "score by distance": (
        "inputs t : float[n]  mask causal  score s + t[q - k]",
        TWO[:, 0],
        lambda t: S + t[(P[:, None] - P).clamp(0)],
    ),
    "score that is no sum": (
        "inputs t : float[n, n]  mask causal  score tanh(s + t[q, k])",
        TWO,
        lambda t: torch.tanh(S + t),
    ),
}
"""A table that is read, two contents for it, and the logits where the keys are live."""


@pytest.mark.parametrize(
    ("reading", "backend"),
    [
        *((reading, backend) for reading in READING for backend in ("reference", "torch")),
        *((reading, "sdpa") for reading in READING if reading != "score that is no sum"),
    ],
)
def test_each_call_reads_its_table_anew(reading: str, backend: str) -> None:
    """Of one shape, in a tensor of its own or in the place of the last."""
    clauses, (first, second), logits = READING[reading]
    one = attndsl.compile(
        attndsl.parse(f"attention a {{ {clauses} }}")["a"], length=16, head_dim=8, backend=backend
    )
    same = first.clone()
    for contents in (first, second, first):
        same.copy_(contents)
        logit = torch.where(P <= P[:, None], logits(contents), -torch.inf)
        for table in (contents, same):
            torch.testing.assert_close(one(Q, K, V, t=table), torch.softmax(logit, -1) @ V)


DRAWN = "random(1, of = columns(keep))"


@pytest.mark.parametrize(
    ("clauses", "others", "backends"),
    [
        (f"mask {DRAWN}", 0, ["reference", "sdpa", "torch"]),
        (f"mask causal + {DRAWN}", 1, ["reference", "torch"]),
    ],
)
def test_draws_over_a_table_for_more_queries_than_keys(
    clauses: str, others: int, backends: list[str]
) -> None:
    n, nq, rng = 12, 40, np.random.default_rng(0)
    attention = attndsl.parse(f"attention a {{ inputs keep : bool[B, n]  offset 0  {clauses} }}")["a"]
    keep = rng.random((2, n)) < 0.5
    times = np.zeros((2, 1, nq, n), np.int64) + others * np.tri(nq, n, dtype=np.int64)
    for row, query in np.ndindex(2, nq):
        eligible = np.flatnonzero(keep[row])
        ((rank,),) = sample(np.array([0]), np.array([query]), np.array([len(eligible)]), 1)
        times[row, 0, query, eligible[rank]] += 1
    assert (attention.counts(n, nq, keep=keep) == times).all()
    assert (attention.mask(n, nq, keep=keep) == (times > 0)).all()
    assert (attention.block_mask(n, 8, nq, keep=keep).to_dense() == (times > 0)).all()
    q, k, v = (torch.from_numpy(rng.normal(size=(2, 1, length, 8))) for length in (nq, n, n))
    weight = torch.from_numpy(times) * torch.exp(q @ k.mT / 8**0.5)
    expected = weight / weight.sum(-1, keepdim=True) @ v
    sizes = {"length": n, "q_length": nq, "batch": 2, "head_dim": 8, "dtype": "float64", "block_size": 8}
    for backend in backends:
        found = attndsl.compile(attention, **sizes, backend=backend)(q, k, v, keep=keep)
        torch.testing.assert_close(found, expected)


def test_a_mask_asks_for_its_own_tables_alone() -> None:
    attention, doc = attndsl.parse(BIASED)["a"], np.arange(16)[None] // 5
    pairs = 3 * 15 + 1
    assert attention.mask(16, doc=doc).sum() == pairs
    assert attention.block_mask(16, 8, doc=doc).nnz == pairs
    assert attention.graph(16, doc=doc).number_of_edges() == pairs
    bound = attndsl.compile(attention, length=16, head_dim=8).bind(doc=doc)
    assert bound.block_masks is not None
    assert bound.block_masks.nnz == pairs
    with pytest.raises(attndsl.AttnError, match=r"needs its input `kind`, int\[n\]"):
        bound(Q, K, V)
    with pytest.raises(attndsl.AttnError, match="needs its input `doc`"):
        attention.mask(16)


def test_counts_ask_for_more_tables_than_the_mask() -> None:
    twice = attndsl.parse("attention a { inputs doc : int[n] mask full + documents(doc) }")["a"]
    assert twice.mask(4).all()
    assert twice.counts(4, doc=np.array([0, 0, 1, 1])).sum() == 16 + 8
    with pytest.raises(attndsl.AttnError, match="needs its input `doc`"):
        twice.counts(4)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_entry_that_is_not_there_is_named(backend: str) -> None:
    kind = np.arange(16) % 3
    kind[3] = 7
    one = attndsl.compile(attndsl.parse(BIASED)["a"], length=16, head_dim=8, backend=backend)
    with pytest.raises(
        attndsl.AttnError, match=r"(?s)`bias` has 3 entries on axis 0, but entry 7.*mend `kind`"
    ):
        one(Q, K, V, doc=np.zeros((1, 16), int), kind=kind, bias=torch.randn(1, 3))


def test_q_k_and_v_of_different_dtypes() -> None:
    with pytest.raises(
        attndsl.AttnError, match=r"(?s)`k` is float16.*`q` is float32: pass `k\.to\(q\.dtype\)`"
    ):
        plan()(Q, K.half(), V, doc=np.zeros(16, int))
