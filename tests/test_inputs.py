"""What a call may be given: tables and offsets of every kind that Python has for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attndsl

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
