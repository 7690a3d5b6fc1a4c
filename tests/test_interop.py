"""Mods of FlexAttention against torch's own masks, and the errors of those that are not read."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import random_mods
import torch
from thin import thin
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, or_masks

import attndsl
from attndsl.errors import AttnError

B, H, Q, N = 2, 4, 29, 37
"""Batch rows, heads, queries and keys of the comparisons."""
random_ = torch.Generator().manual_seed(0)


def drawn(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(low, high, shape, generator=random_, dtype=dtype)


doc = drawn(0, 5, 64).sort().values
ids = drawn(0, 4, B, 64)
heads_of = drawn(0, 3, H, 64, dtype=torch.int32)
lengths = torch.tensor([20, 37])
windows = torch.tensor([3, 9, 1, 30])
weights = torch.randn(64, generator=random_)
seen = torch.rand(64, 64, generator=random_) < 0.4
chosen = drawn(0, 10, B, H, 8, 3)
few = torch.tensor([0, 7, 19])
bias = torch.randn(64, 64, generator=random_)
places = drawn(-9, 9, 64, dtype=torch.int32)
bytes_ = drawn(0, 250, 64, dtype=torch.uint8)


class Documents:
    """A mod that is an object."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.rows[q] == self.rows[k]


def decoded(x: Tensor) -> Tensor:
    """Every second bit."""
    x = x & 0x55555555
    x = (x | (x >> 1)) & 0x33333333
    return (x | (x >> 2)) & 0x0F0F0F0F


def windowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor, width: int = 5) -> Tensor:
    return (q - k).abs() <= width


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


MODS: dict[str, Callable[..., Any]] = {
    "causal": causal,
    "window": lambda b, h, q, k: (q >= k) & (q - k < 8),
    "all": lambda b, h, q, k: q.new_ones((), dtype=torch.bool),
    "none": lambda b, h, q, k: torch.zeros_like(q, dtype=torch.bool),
    "partial": functools.partial(windowed, width=3),
    "joined": or_masks(and_masks(causal, windowed), lambda b, h, q, k: k < 2),
    "complement": lambda b, h, q, k: ~(q >= k) | (k == 0),
    "exclusive": lambda b, h, q, k: (q >= k) ^ (k % 3 == 0),
    "equal truths": lambda b, h, q, k: (q >= k) == (k > 4),
    "where of truths": lambda b, h, q, k: torch.where(h < 2, q >= k, q <= k),
    "where of numbers": lambda b, h, q, k: q - k < torch.where(h % 2 == 0, 3, 9),
    "logical": lambda b, h, q, k: torch.logical_or(torch.logical_and(q >= k, k % 4), torch.logical_not(q)),
    "blocks": lambda b, h, q, k: q // 8 == k // 8,
    "negative divisors": lambda b, h, q, k: (q // -3 == k // -3) | ((q - k) % -4 == -1),
    "truncated": lambda b, h, q, k: torch.div(k - q, 4, rounding_mode="trunc") == 0,
    "fmod": lambda b, h, q, k: torch.fmod(q - k, 3) == -1,
    "dilated": lambda b, h, q, k: ((q - k) % 3 == 0) & ((q - k).abs() <= 12),
    "clamped": lambda b, h, q, k: (k - q.clamp(3, 20)).abs() <= 2,
    "clamped by a tensor": lambda b, h, q, k: torch.clamp(k, min=q - 3, max=q) == k,
    "extremes": lambda b, h, q, k: torch.minimum(q, k) + 5 > torch.maximum(q, k),
    "bits": lambda b, h, q, k: (q & 6) == (k & 6),
    "other bits": lambda b, h, q, k: ((q | 4) ^ 1) == (k << 1) >> 1,
    "negative bits": lambda b, h, q, k: ((q - k) & 5) == 4,
    "many bits": lambda b, h, q, k: decoded(q) >= decoded(k >> 1),
    "bit of a byte": lambda b, h, q, k: ((bytes_[q].int() << (7 - k % 8)) & 128) == 128,
    "power of two": lambda b, h, q, k: ((q - k) & (q - k - 1)) == 0,
    "other way round": lambda b, h, q, k: ((q - k) ^ (k - q + 2)) > 3,
    "truths as numbers": lambda b, h, q, k: (q >= k).int() + (k < 5).long() + (h == 0) >= 2,
    "real window": lambda b, h, q, k: (q - k < 5 / 2) & (q.float() * 2 >= k),
    "half": lambda b, h, q, k: k >= q * 0.5 - 0.25,
    "rounded": lambda b, h, q, k: (q / 3).floor().int() == (k / 3).floor().int(),
    "logarithm": lambda b, h, q, k: torch.log2((q - k).abs() + 1.0).floor() == (q - k).abs().float().log2(),
    "sine": lambda b, h, q, k: torch.sin(q * 0.7) > torch.cos(k * 1.3),
    "ranks": lambda b, h, q, k: weights[q] >= weights[k],
    "weights": lambda b, h, q, k: (weights[k] > 0) & (q >= k),
    "documents": lambda b, h, q, k: (doc[q] == doc[k]) & (q >= k),
    "object": Documents(doc),
    "batched": lambda b, h, q, k: ids[b, q] == ids[b][k],
    "lengths": lambda b, h, q, k: (k < lengths[b]) & (q < lengths[b]),
    "window by head": lambda b, h, q, k: q - k < windows[h],
    "by head": lambda b, h, q, k: heads_of[h, k] <= heads_of[h, q],
    "half the batch": lambda b, h, q, k: torch.where(b == 0, q >= k, k - q < 3),
    "batch and head": lambda b, h, q, k: (q + b * 2 - k) % (3) == h % 3,
    "grouped heads": lambda b, h, q, k: heads_of[h // 2, q] == heads_of[h % 2, k],
    "pairs": lambda b, h, q, k: seen[q, k],
    "transposed pairs": lambda b, h, q, k: seen.T[q, k] | seen[k // 2, 5],
    "chosen": lambda b, h, q, k: (chosen[b, h, q // 8] == k // 4).any(),
    "chosen, an axis": lambda b, h, q, k: (k.unsqueeze(-1) == chosen[b, h, q // 8]).any(dim=-1),
    "not chosen": lambda b, h, q, k: (chosen[b, h, q // 8] != k // 4).all(-1),
    "counted": lambda b, h, q, k: (chosen[b, h, q // 8] < k // 4).sum() >= 2,
    "one of few": lambda b, h, q, k: (few == k).any() | torch.isin(q, few),
    "stacked": lambda b, h, q, k: torch.stack([q >= k, q - k < 5, k > 2]).all(),
    "three of a stack": lambda b, h, q, k: torch.stack([q, k, h]).amax() == q,
    "negative index": lambda b, h, q, k: places[k - 20] > places[q - q.clamp(max=5)],
    "narrow": lambda b, h, q, k: places[q].long() * 2 < places[k],
    "bytes, which wrap": lambda b, h, q, k: (bytes_[q] + bytes_[k] > 100) ^ ((q - k).to(torch.int8) * 90 < k),
    "one hot": lambda b, h, q, k: nn.functional.one_hot(doc, 5)[q][doc[k]] == 1,
    "sorted": lambda b, h, q, k: torch.searchsorted(few, k) == torch.bucketize(q, few),
    "table of one position": lambda b, h, q, k: doc.cumsum(0)[q] >= k,
    "sliced": lambda b, h, q, k: seen[:, 3][q] & seen[1, 2:][k] & seen[q, 2:9].any(),
    "filled": lambda b, h, q, k: (q >= k).masked_fill(k == 3, False),
    "halves, which round": lambda b, h, q, k: (q + 4000).half() == k + 4000,
    "singles, which round": lambda b, h, q, k: (q + 2**24) * 1.0 >= (k + 2**24).float(),
    "rounded before": lambda b, h, q, k: (q + 2**24) % 2.0 == k % 2,
    "shifted": lambda b, h, q, k: ((q - k) ^ ((k - 3) - q)) > ((q + 2) - k).float().sin(),
    "of an axis": lambda b, h, q, k: chosen[b, h, q // 8].max(dim=0).values > chosen[b, h, k // 8].min(0)[0],
    "member of a stack": lambda b, h, q, k: torch.stack([q >= k, q - k < 3, k < 2, q == k])[h],
    "real entry": lambda b, h, q, k: (bias[q, k] * 2).floor() == h,
    "scalar": lambda b, h, q, k: q - k < lengths[0],
}


def of_mod(mod: Callable[..., Any], nq: int = Q, n: int = N) -> attndsl.Bound:
    return attndsl.from_mask_mod(mod, length=n, q_length=nq, batch=B, heads=H)


def same_lists(ours: BlockMask, theirs: BlockMask) -> None:
    """In both orders, of the same types and shapes."""
    for full in ("", "full_"):
        for side in ("kv", "q"):
            for what in ("num_blocks", "indices"):
                a, b = (getattr(mask, f"{full}{side}_{what}") for mask in (ours, theirs))
                assert (a is None) == (b is None)
                if a is not None:
                    assert (a.dtype, a.shape, a.is_contiguous()) == (b.dtype, b.shape, b.is_contiguous())
                    assert torch.equal(a, b), f"{full}{side}_{what}"
    assert (ours.seq_lengths, ours.BLOCK_SIZE) == (theirs.seq_lengths, theirs.BLOCK_SIZE)
    assert ours.mask_mod is theirs.mask_mod


def equal(bound: attndsl.Bound, mod: Callable[..., Any], nq: int = Q, n: int = N) -> None:
    theirs = create_mask(mod, B, H, nq, n, "cpu").numpy()
    ours = bound.mask(n, nq, heads=H)
    assert (np.broadcast_to(ours if ours.ndim == 4 else ours[None], theirs.shape) == theirs).all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mod", MODS.values(), ids=MODS)
def test_a_mask_mod_says_the_same(mod: Callable[..., Any]) -> None:
    bound = of_mod(mod)
    equal(bound, mod)
    assert attndsl.parse(str(bound))[bound.name].attention == bound.attention


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mod", MODS.values(), ids=MODS)
def test_lists_of_blocks_are_torchs(mod: Callable[..., Any]) -> None:
    for size in (8, (16, 8)):
        arguments = (mod, B, H, Q, N, "cpu", size)
        same_lists(attndsl.create_block_mask(*arguments), create_block_mask(*arguments))


@pytest.mark.parametrize(
    ("nq", "n", "size"),
    [(300, 517, 128), (517, 300, 64), (1, 200, 128), (256, 256, (128, 64)), (99, 99, (32, 48))],
)
@pytest.mark.parametrize("name", ["window", "documents", "batched", "window by head", "chosen", "none"])
def test_lists_at_other_sizes(name: str, nq: int, n: int, size: Any) -> None:
    mod = MODS[name]

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mod(b, h, q % 64, k % 64)

    for separate in (True, False):
        arguments = (inside, B, H, nq, n, "cpu", size)
        ours = attndsl.create_block_mask(*arguments, separate_full_blocks=separate)
        same_lists(ours, create_block_mask(*arguments, separate_full_blocks=separate))


def test_without_rows_and_heads() -> None:
    same_lists(
        attndsl.create_block_mask(causal, None, None, 300, 300, device="cpu"),
        create_block_mask(causal, None, None, 300, 300, device="cpu"),
    )


def test_the_order_of_writes_is_torchs() -> None:
    arguments = (causal, 1, 1, 256, 256, "cpu")
    ours = attndsl.create_block_mask(*arguments, compute_dq_write_order=True)
    same_lists(ours, create_block_mask(*arguments))
    assert ours.dq_write_order is not None


def test_a_mask_needs_no_length_where_the_language_has_it() -> None:
    bound = attndsl.from_mask_mod(MODS["window"])
    assert str(bound) == "attention imported { offset 0  mask { q, k : k <= q and q - k < 8 } }"
    program = attndsl.parse(f"{bound}\nassert imported <= causal\nassert imported == last(8)")
    assert [verdict.status for _, verdict in program.check()] == ["proved", "proved"]


def test_what_a_text_of_documents_is_proved_of() -> None:
    bound = attndsl.from_mask_mod(MODS["documents"])
    assert [str(table) for table in bound.inputs] == ["doc : int[64]"]
    program = attndsl.parse(f"{bound}\nassert imported <= causal")
    assert [verdict.status for _, verdict in program.check()] == ["proved"]


def test_tables_come_along_and_may_be_others() -> None:
    bound, other = of_mod(MODS["documents"]), drawn(0, 3, 64).sort().values
    assert torch.equal(bound.tables["doc"], doc)
    assert (bound().mask(N) == bound.mask(N)).all()
    expected = create_mask(lambda b, h, q, k: (other[q] == other[k]) & (q >= k), 1, 1, N, N, "cpu")
    assert (bound.mask(N, doc=other) == expected[0].numpy()).all()
    assert (bound.block_mask(N, 8, doc=other).to_dense() == expected.numpy()).all()
    assert attndsl.analyze(bound, length=N, parts=["nnz"]).nnz.value == bound.mask(N).sum()
    assert len(bound.graph(N).edges) == bound.mask(N).sum()
    assert "<svg" in bound._repr_html_()


@pytest.mark.parametrize("name", ["documents", "chosen", "batched", "window by head", "power of two"])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", None])
def test_plans_of_imported_masks(name: str, backend: str | None) -> None:
    mod = MODS[name]
    bound = of_mod(mod, N, N)
    q, k, v = (torch.randn(B, H, N, 8, generator=random_) for _ in range(3))
    plan = attndsl.compile(bound, length=N, batch=B, heads=H, head_dim=8, backend=backend)
    assert plan.block_masks is not None
    expected = dense(q, k, v, lambda s, *at: s, mod)
    torch.testing.assert_close(plan(q, k, v), expected, rtol=1e-5, atol=1e-5)


def pairwise(mod: Callable[..., Any], *first: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Of all pairs, as FlexAttention asks."""
    sizes = first[0].shape if first else shape
    fn = mod
    for axis in (3, 2, 1, 0):
        own = tuple([0 if i == axis else None for i in range(4)])
        fn = torch.vmap(fn, in_dims=(*[0] * len(first), *own))
    with TransformGetItemToIndex():
        return fn(*first, *(torch.arange(size) for size in sizes))


def dense(
    q: Tensor, k: Tensor, v: Tensor, score_mod: Callable[..., Any], mask_mod: Callable[..., Any]
) -> Tensor:
    logits = pairwise(score_mod, q @ k.transpose(2, 3) / math.sqrt(q.shape[3]))
    logits = logits.masked_fill(~pairwise(mask_mod, shape=logits.shape), -math.inf)
    empty = (logits == -math.inf).all(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0) @ v


relative = torch.randn(H, 2 * N - 1, generator=random_)
holes = bias.masked_fill(seen, -math.inf)
rope = torch.randn(B, 64, 6, generator=random_)
SCORES: dict[str, Callable[..., Any]] = {
    "alibi": lambda s, b, h, q, k: s + torch.exp2(-(h + 1) * 8.0 / H) * (k - q),
    "softcap": lambda s, b, h, q, k: 20 * torch.tanh(s / 20),
    "bias": lambda s, b, h, q, k: s + bias[q, k],
    "relative": lambda s, b, h, q, k: s + relative[h, q - k + N - 1],
    "scaled": lambda s, b, h, q, k: s * weights[h] + 0.1 * lengths[b],
    "buckets": lambda s, b, h, q, k: s + weights[(q - k).abs().add(1).float().log2().int()],
    "erf of a position": lambda s, b, h, q, k: s + torch.erf(k / 9),
    "vectors": lambda s, b, h, q, k: s + 0.5 * torch.dot(rope[b, q], rope[b, k]),
    "vectors, summed": lambda s, b, h, q, k: s + (rope[b, q] * rope[b, k]).sum(-1),
    "minus infinity": lambda s, b, h, q, k: torch.where(q - k < 7, s, -float("inf")),
    "twice": lambda s, b, h, q, k: torch.where(
        k % 3 == 1, -float("inf"), 2 * torch.where(q < k, -math.inf, s) + 1
    ),
    "holes": lambda s, b, h, q, k: s + holes[q, k],
    "masked": lambda s, b, h, q, k: s.masked_fill(ids[b, q] != ids[b, k], -math.inf),
    "leaky": lambda s, b, h, q, k: torch.where(s > 0, s, 0.1 * s),
    "activation": lambda s, b, h, q, k: torch.log(torch.relu(s) + 1.0),
}


@pytest.mark.parametrize("mod", SCORES.values(), ids=SCORES)
def test_a_score_mod_says_the_same(mod: Callable[..., Any]) -> None:
    bound = attndsl.from_score_mod(mod, mask_mod=causal, length=N, batch=B, heads=H)
    assert attndsl.parse(str(bound))[bound.name].attention == bound.attention
    q, k, v = (torch.randn(B, H, N, 8, generator=random_, dtype=torch.float64) for _ in range(3))
    plan = attndsl.compile(
        bound, length=N, batch=B, heads=H, head_dim=8, dtype="float64", backend="reference"
    )
    torch.testing.assert_close(plan(q, k, v), dense(q, k, v, mod, causal), rtol=1e-5, atol=1e-5)


def test_what_is_trained_is_the_own_parameter() -> None:
    own = nn.Parameter(torch.randn(H, 2 * N - 1, generator=random_))

    def mod(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return s + own[h, q - k + N - 1]

    bound = attndsl.from_score_mod(mod, mask_mod=causal)
    q, k, v = (torch.randn(1, H, N, 8, generator=random_) for _ in range(3))
    plan = attndsl.compile(bound, length=N, heads=H, head_dim=8, training=True)
    for _ in range(2):
        gradients = []
        for out in (plan(q, k, v), dense_of_one(q, k, v, mod)):
            own.grad = None
            out.square().sum().backward()
            gradients.append(own.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            own.mul_(0.5)


def dense_of_one(q: Tensor, k: Tensor, v: Tensor, mod: Callable[..., Any]) -> Tensor:
    logits = pairwise(mod, q @ k.transpose(2, 3) / math.sqrt(q.shape[3]))
    return torch.softmax(logits.masked_fill(~torch.ones(N, N).tril().bool(), -math.inf), -1) @ v


def by_if(b, h, q, k):  # type: ignore[no-untyped-def]
    if q > k:
        return k > 0
    return q > 0


def printed(b, h, q, k):  # type: ignore[no-untyped-def]
    print(q)  # noqa: T201
    return q >= k


def changing(b, h, q, k):  # type: ignore[no-untyped-def]
    doc[q] = 1
    return q >= k


def changing_by_method(b, h, q, k):  # type: ignore[no-untyped-def]
    doc.add_(1)
    return q >= k


def three(b, h, q):  # type: ignore[no-untyped-def]
    return q >= h


trained = nn.Parameter(torch.randn(H, 2 * N))
REFUSED: dict[str, tuple[Callable[..., Any], str, str]] = {
    "if": (by_if, "is true", "q > k"),
    "chain": (lambda b, h, q, k: 3 < k <= q, "is true", "3 < k <= q"),
    "and": (lambda b, h, q, k: (q >= k) and (k > 3), "is true", "(q >= k) and (k > 3)"),
    "print": (printed, "for the text of a position", "print(q)"),
    "write": (changing, "`setitem` changes a tensor", "doc[q]"),
    "write by a method": (changing_by_method, "`add` changes a tensor", "doc.add_(1)"),
    "item": (lambda b, h, q, k: doc[q.item()] == k, "`item` asks for the value", "q.item()"),
    "range": (lambda b, h, q, k: sum(k == i for i in range(q)), "for the value of a position", "range(q)"),
    "numpy": (lambda b, h, q, k: np.maximum(q, 3) > k, "for the value of a position", "np.maximum(q, 3)"),
    "member": (lambda b, h, q, k: k in [1, 2], "is true", "k in [1, 2]"),
    "integers": (lambda b, h, q, k: q - k, "returns int64, not a Boolean tensor", "q - k"),
    "two": (lambda b, h, q, k: torch.stack([q > k, k > 3]), "a tensor of [2] for one pair", "torch.stack"),
    "row": (lambda b, h, q, k: ids[q] == ids[k], "a tensor of [64] for one pair", "ids[q] == ids[k]"),
    "bool": (lambda b, h, q, k: True, "returns bool, not a Boolean tensor", ""),
    "shape": (lambda b, h, q, k: ids[b, h, q] == 1, "too many indices", "ids[b, h, q]"),
    "name": (lambda b, h, q, k: nowhere > k, "raises NameError: name 'nowhere'", "nowhere"),  # noqa: F821
    "arguments": (three, "the mask_mod does not take 4 arguments", ""),
    "drawn": (lambda b, h, q, k: torch.rand(()) > 0.5, "draws random numbers", ""),
    "complement": (lambda b, h, q, k: (~q - k) == 0, "`~` of an integer", "~q"),
    "bits of one by the other": (
        lambda b, h, q, k: (q >> (k % 8)) % 2 == 1,
        "a shift by what is no constant from 0 to 62",
        "q >> (k % 8)",
    ),
    "bits of two": (lambda b, h, q, k: (q & k) == 0, "bits of two positions are joined", "q & k"),
    "real": (lambda b, h, q, k: q / (k + 1) > 0.4, "real numbers of positions are compared", "q / (k + 1)"),
    "divisor": (lambda b, h, q, k: q % (k + 1) == 0, "divides by what differs", "q % (k + 1)"),
}  # fmt: skip


def test_mods_are_told_apart_by_what_they_take() -> None:
    def pairs(b, h, q, k):  # type: ignore[no-untyped-def]
        return q >= k

    def scores(score, b, h, q, k):  # type: ignore[no-untyped-def]
        return score

    for read, mod, help in (
        (attndsl.from_mask_mod, scores, "`attndsl.from_score_mod`"),
        (attndsl.from_score_mod, pairs, "`attndsl.from_mask_mod`"),
        (attndsl.from_score_mod, three, "`score_mod(score, b, h, q_idx, kv_idx)`"),
        (attndsl.from_mask_mod, 3, ""),
    ):
        with pytest.raises(AttnError) as caught:
            read(mod)  # type: ignore[operator]
        (told,) = caught.value.diagnostics
        assert help in told.help
    assert attndsl.from_mask_mod(functools.partial(lambda w, b, h, q, k: q - k < w, 4)).mask(6).sum() == 33


@pytest.mark.parametrize(("mod", "said", "where"), REFUSED.values(), ids=REFUSED)
def test_one_line_says_what_is_not_read(mod: Callable[..., Any], said: str, where: str) -> None:
    with pytest.raises(AttnError) as caught:
        of_mod(mod)
    (told,) = caught.value.diagnostics
    assert said in told.message
    assert told.span is not None
    assert told.span.source.name == __file__
    assert (
        told.span.text.startswith(where)
        if where
        else "def" in told.span.text or "lambda" in str(caught.value)
    )


@pytest.mark.parametrize("name", ["if", "write", "integers", "two", "bool", "shape", "drawn"])
def test_a_block_mask_of_a_mistake_is_refused_too(name: str) -> None:
    with pytest.raises(AttnError):
        attndsl.create_block_mask(REFUSED[name][0], B, H, Q, N, device="cpu")


@pytest.mark.parametrize("name", ["complement", "bits of two", "real", "divisor"])
def test_what_torch_takes_is_asked_pair_by_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mod = REFUSED[name][0]
    for at_once in (2**24, 2**12):
        monkeypatch.setattr("attndsl.interop.blocks.AT_ONCE", at_once)
        arguments = (mod, B, H, Q, N, "cpu", 8)
        with pytest.warns(UserWarning, match="is asked for every pair, because it is not read"):
            ours = attndsl.create_block_mask(*arguments)
        same_lists(ours, create_block_mask(*arguments))


def test_blocks_of_other_sizes_are_asked_for() -> None:
    with pytest.warns(UserWarning, match="blocks of 20 x 12 are no tiles"):
        ours = attndsl.create_block_mask(causal, 1, 1, Q, N, "cpu", (20, 12))
    same_lists(ours, create_block_mask(causal, 1, 1, Q, N, "cpu", (20, 12)))
    with pytest.raises(AttnError, match="returns int64"):
        attndsl.create_block_mask(REFUSED["integers"][0], 1, 1, Q, N, "cpu", (20, 12))


def test_a_warning_comes_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            attndsl.create_block_mask(REFUSED["divisor"][0], 1, 1, Q, N, device="cpu")
    assert len(caught) == 1
    assert caught[0].filename == __file__


SCORES_REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "integer": (lambda s, b, h, q, k: q - k, "returns int64, not a tensor of real numbers"),
    "function": (lambda s, b, h, q, k: torch.erf(s), "`erf` of two positions is not read"),
    "infinite": (lambda s, b, h, q, k: torch.where(q > k, s, -math.inf).tanh(), "-inf is computed with"),
    "trained": (lambda s, b, h, q, k: s + torch.tanh(trained)[h, q], "trained is computed with"),
    "trained, erf": (lambda s, b, h, q, k: s + torch.erf(trained[h, q]), "`erf` of two positions"),
    "not a number": (lambda s, b, h, q, k: s + math.nan, "nan is no finite number"),
}


@pytest.mark.parametrize(("mod", "said"), SCORES_REFUSED.values(), ids=SCORES_REFUSED)
def test_what_is_no_score(mod: Callable[..., Any], said: str) -> None:
    with pytest.raises(AttnError) as caught:
        attndsl.from_score_mod(mod, length=N, batch=B, heads=H)
    (told,) = caught.value.diagnostics
    assert said in told.message
    assert told.span is not None


@pytest.mark.parametrize(
    ("name", "help"),
    [("many bits", "give `length=`"), ("half the batch", "give `batch=`"), ("sine", "give `length=`")],
)
def test_a_length_that_is_needed_is_asked_for(name: str, help: str) -> None:
    with pytest.raises(AttnError) as caught:
        attndsl.from_mask_mod(MODS[name])
    (told,) = caught.value.diagnostics
    assert told.help == help
    assert told.span is not None


def test_sizes_are_checked() -> None:
    with pytest.raises(AttnError, match="there are 0 of `q`"):
        attndsl.from_mask_mod(causal, length=0)


def test_a_mod_without_a_file_is_told_without_a_line() -> None:
    space: dict[str, Any] = {}
    exec("def mod(b, h, q, k):\n    return q - k", space)
    with pytest.raises(AttnError) as caught:
        attndsl.from_mask_mod(space["mod"])
    assert caught.value.diagnostics[0].span is None


def test_names_that_the_language_has_get_another() -> None:
    mask, nq = doc, doc.clone()

    def pattern(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (mask[q] == mask[k]) & (nq[q] >= 0)

    bound = attndsl.from_mask_mod(pattern)
    assert (bound.name, [*bound.tables]) == ("pattern_", ["mask_", "nq_"])
    assert attndsl.parse(str(bound))["pattern_"].attention == bound.attention


def test_the_package_stays_light() -> None:
    code = "import sys, attndsl; dir(attndsl); assert not {'torch', 'attndsl.interop'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("seeds", thin([range(i, i + 25) for i in range(0, 1000, 25)], 20))
def test_random_mask_mods(seeds: range) -> None:
    """Most are read, and none is wrong."""
    counts = Counter[str]()
    for seed in seeds:
        mod = random_mods.mask_mod(seed)
        sizes = (random_mods.B, random_mods.H, random_mods.Q, random_mods.N)
        try:
            theirs = create_mask(mod, *sizes, "cpu")
        except (RuntimeError, ValueError, IndexError):
            continue
        try:
            bound = attndsl.from_mask_mod(
                mod, length=sizes[3], q_length=sizes[2], batch=sizes[0], heads=sizes[1]
            )
        except AttnError:
            counts["refused"] += 1
            continue
        counts["read"] += 1
        ours = torch.from_numpy(bound.block_mask(sizes[3], 8, sizes[2], heads=sizes[1]).to_dense())
        assert torch.equal(ours.expand_as(theirs), theirs), mod.__code__.co_filename
    assert counts["read"] > 4 * counts["refused"]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("seeds", thin([range(i, i + 25) for i in range(0, 500, 25)], 20))
def test_random_score_mods(seeds: range) -> None:
    counts = Counter[str]()
    batch, heads, nq, n = random_mods.B, random_mods.H, random_mods.Q, random_mods.N
    q = torch.randn(batch, heads, nq, 4, generator=random_, dtype=torch.float64)
    k, v = (torch.randn(batch, heads, n, 4, generator=random_, dtype=torch.float64) for _ in range(2))
    for seed in seeds:
        mod = random_mods.score_mod(seed)
        try:
            expected = dense(q, k, v, mod, lambda b, h, q, k: q >= 0)
        except (RuntimeError, ValueError, IndexError):
            continue
        if expected.isnan().any():
            continue
        try:
            bound = attndsl.from_score_mod(mod, length=n, q_length=nq, batch=batch, heads=heads)
        except AttnError:
            counts["refused"] += 1
            continue
        counts["read"] += 1
        plan = attndsl.compile(
            bound, length=n, q_length=nq, batch=batch, heads=heads, head_dim=4, dtype="float64",
            backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(plan(q, k, v), expected, rtol=1e-5, atol=1e-5)
    assert counts["read"] > 4 * counts["refused"]
