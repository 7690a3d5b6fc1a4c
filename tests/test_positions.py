"""Where queries and keys stand: offsets, shards, evicted caches, as numbers and as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import attndsl

N, BATCH, HEADS, WIDTH = 96, 2, 2, 8
TEXTS = {
    "window": "mask causal & last(20)",
    "biased": "inputs b : float[H, n] mask causal score s + b[k] - 0.1 * (q - k)",
    "alibi": "mask causal score s - 0.1 * (q - k)",
    "documents": "inputs doc : int[B, n] mask { q, k : doc[q] == doc[k] } & causal",
    "from the end": "mask { q, k : k >= n - 30 or k mod 7 == q mod 7 }",
    "drawn": "mask random(5, seed = 3) | causal & last(3)",
    "per head": "mask causal & last(5 + 20 * h) decay 1.0 / (1 + q - k)",
    "twice": "mask causal + last(9)",
}
BACKENDS = ("reference", "torch", "sdpa")


def attention(name: str) -> attndsl.Bound:
    found = attndsl.parse(f"attention a {{ {TEXTS[name]} }}")["a"]
    assert isinstance(found, attndsl.Bound)
    return found


def compiled(name: str, backend: str | None = None) -> Any:
    sizes = {"length": N, "batch": BATCH, "heads": HEADS, "head_dim": WIDTH, "dtype": "float64"}
    try:
        return attndsl.compile(attention(name), **sizes, block_size=16, backend=backend)  # type: ignore[arg-type]
    except attndsl.AttnError as error:
        pytest.skip(str(error))


def inputs(name: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    made = {
        "biased": {"b": torch.from_numpy(rng.normal(size=(HEADS, N)))},
        "documents": {"doc": torch.from_numpy(np.sort(rng.integers(0, 4, (BATCH, N))))},
    }
    return made.get(name, {})


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, N, WIDTH, dtype=torch.float64, generator=rng) for _ in range(3))
    return q, k, v


def merged(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    lse = torch.stack([lse for _, lse in parts])
    total = lse.logsumexp(0)
    share = torch.exp(lse - total.masked_fill(total == -torch.inf, 0.0))
    return sum(s[..., None] * out for s, (out, _) in zip(share, parts, strict=True))  # type: ignore[return-value]


def zigzag(ranks: int) -> list[Tensor]:
    pieces = torch.arange(N).chunk(2 * ranks)
    return [torch.cat([pieces[r], pieces[2 * ranks - 1 - r]]) for r in range(ranks)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_shards_of_both_ends_give_the_whole(name: str, backend: str) -> None:
    plan, (q, k, v), tables = compiled(name, backend), tensors(), inputs(name)
    expected = plan(q, k, v, **tables)
    for mine in zigzag(3):
        parts = [
            plan(
                q[:, :, mine], k[:, :, theirs], v[:, :, theirs],
                q_positions=mine, k_positions=theirs, n=N, return_lse=True, **tables,
            )
            for theirs in zigzag(3)
        ]  # fmt: skip
        torch.testing.assert_close(merged(parts), expected[:, :, mine])


@pytest.mark.parametrize("name", TEXTS)
def test_an_evicted_cache_is_what_is_left_of_the_columns(name: str) -> None:
    rng = np.random.default_rng(1)
    left = [np.r_[np.sort(rng.permutation(N - 1)[:40]), N - 1] for _ in range(BATCH)]
    plan, (q, k, v), tables = compiled(name), tensors(), inputs(name)
    mask = attention(name).mask(N, heads=HEADS, **tables)
    mask = torch.from_numpy(np.broadcast_to(mask, (BATCH, HEADS, N, N)).copy())
    kept = torch.zeros(BATCH, 1, 1, N, dtype=torch.bool)
    for row, keys in enumerate(left):
        kept[row, :, :, keys] = True
    rows = torch.stack([torch.from_numpy(keys) for keys in left])[:, None, :, None]
    some = [x.gather(2, rows.expand(BATCH, HEADS, -1, WIDTH)) for x in (k, v)]
    found = plan(q[:, :, -2:], *some, k_positions=np.stack(left), **tables)
    tiles = attention(name).block_mask(41, 16, 2, k_positions=np.stack(left), heads=HEADS, **tables)
    there = np.broadcast_to(tiles.to_dense(), (BATCH, HEADS, 2, 41))
    for row, keys in enumerate(left):
        assert (there[row] == mask[row, :, -2:][:, :, keys].numpy()).all()
    if name in ("window", "documents", "from the end", "drawn"):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, -2:], k, v, attn_mask=(mask & kept)[:, :, -2:]
        )
        torch.testing.assert_close(found, torch.nan_to_num(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TEXTS)
def test_positions_side_by_side_are_an_offset(name: str, backend: str) -> None:
    plan, (q, k, v), tables = compiled(name, backend), tensors(), inputs(name)
    expected = plan(q[:, :, :5], k, v, q_offset=31, **tables)
    for place in (
        {"q_positions": range(31, 36)},
        {"q_positions": torch.arange(31, 36).expand(BATCH, 5)},
        {"q_offset": torch.tensor(31)},
        {
            "q_offset": torch.tensor([31, 31], dtype=torch.int32),
            "k_offset": torch.zeros(1, dtype=torch.int64),
        },
        {"q_offset": np.array([31, 31]), "n": N},
    ):
        torch.testing.assert_close(plan(q[:, :, :5], k, v, **place, **tables), expected)


@pytest.mark.parametrize("name", ["window", "biased", "twice"])
def test_any_order(name: str) -> None:
    plan, (q, k, v), tables = compiled(name), tensors(), inputs(name)
    order = torch.from_numpy(np.random.default_rng(2).permutation(N))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    found = plan(
        q[:, :, order], k[:, :, order], v[:, :, order], q_positions=order, k_positions=order, **tables
    )
    expected = plan(q, k, v, **tables)[:, :, order]
    torch.testing.assert_close(found, expected)
    weight = torch.randn(expected.shape, dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad(out, (q, k, v), weight) for out in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


READING = ("tolist", "item", "numpy", "cpu", "__array__", "__bool__", "__int__", "__index__")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """How what a tensor holds was read, by where it lies."""
    found: dict[int, list[str]] = {}

    def watched(name: str, real: Any) -> Any:
        def read(x: Tensor, *args: Any) -> Any:
            found.setdefault(x.data_ptr(), []).append(name)
            return real(x, *args)

        return read

    for name in READING:
        monkeypatch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_positions_are_read_once_and_tables_of_scores_never(
    backend: str, reads: dict[int, list[str]]
) -> None:
    plan, (q, k, v), tables = compiled("biased", backend), tensors(), inputs("biased")
    for name, place in (("q_offset", torch.tensor([31, 31])), ("q_positions", torch.arange(31, 36))):
        reads.clear()
        plan(q[:, :, :5], k, v, **{name: place}, **tables)
        assert reads[place.data_ptr()] == ["tolist"]
        assert tables["b"].data_ptr() not in reads
    documents = inputs("documents")
    compiled("documents", "torch")(q, k, v, **documents)
    assert "cpu" in reads[documents["doc"].data_ptr()]


def test_one_graph_serves_all_offsets_and_positions() -> None:
    plan, (q, k, v) = compiled("window"), tensors()
    graphs = CompileCounter()

    def step(q: Tensor, at: Tensor, keys: Tensor) -> Tensor:
        return plan(q, k[:, :, :50], v[:, :, :50], q_offset=at, k_positions=keys)  # type: ignore[no-any-return]

    fast = torch.compile(step, backend=graphs, fullgraph=True)
    for start in (40, 60, 90):
        at, keys = torch.tensor(start), torch.arange(50) + start - 45 + (start > 45)
        keys = keys.clamp_min(0)
        torch.testing.assert_close(fast(q[:, :, :1], at, keys), step(q[:, :, :1], at, keys))
    assert graphs.frame_count == 1


def test_an_exported_program_takes_positions() -> None:
    plan, (q, k, v) = compiled("window"), tensors()

    class Step(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, keys: Tensor) -> Tensor:
            return plan(q, k, v, q_offset=at, k_positions=keys, n=N)  # type: ignore[no-any-return]

    some = torch.arange(0, N, 2)
    given = q[:, :, :1], k[:, :, some], v[:, :, some], torch.tensor([50]), some
    program = torch.export.export(Step(), given)
    for at, keys in ((50, some), (31, some + 1)):
        again = (*given[:3], torch.tensor([at]), keys)
        torch.testing.assert_close(program.module()(*again), Step()(*again))


BAD = {
    "real offset": ({"q_offset": torch.tensor(1.0)}, "`q_offset` holds positions, and was given as float32"),
    "truths": ({"k_positions": torch.ones(N, dtype=torch.bool)}, "`k_positions` holds positions"),
    "real positions": ({"q_positions": np.linspace(0, 1, 5)}, "`q_positions` are integers"),
    "elsewhere": ({"q_offset": torch.tensor(1, device="meta")}, "`q_offset` is on meta"),
    "too few": ({"q_positions": [1, 2]}, "`q_positions` is [5] or [B, 5], and was given as [2]"),
    "batch": ({"q_positions": np.zeros((3, 5), int)}, "`q_positions` has 3 rows"),
    "offsets": ({"q_offset": torch.tensor([1, 2, 3])}, "`q_offset` has the shape [3]"),
    "many offsets": ({"q_offset": [1, 2, 3]}, "`q_offset` has 3 entries for 2 batch rows"),
    "negative": ({"q_positions": [0, 1, -2, 3, 4]}, "`q_positions` is -2, and must not be negative"),
    "negative tensor": ({"q_offset": torch.tensor(-1)}, "`q_offset` is -1, and must not be negative"),
    "both": ({"q_offset": 1, "q_positions": range(5)}, "`q_offset` and `q_positions` are given"),
    "n": ({"n": 50}, "`n` is 50, and a key stands at 95"),
    "beyond": ({"q_positions": range(95, 100)}, "a query stands at 99, and n is 96"),
    "offset beyond": ({"q_offset": 96}, "a query stands at 96, and n is 96"),
    "one offset beyond": ({"q_offset": [95, 97]}, "a query stands at 97, and n is 96"),
    "tensor beyond": ({"q_offset": torch.tensor([400])}, "a query stands at 400, and n is 96"),
    "beyond its n": ({"q_offset": 95, "n": 97}, "a query stands at 99, and n is 97"),
    "no n": ({"n": -1}, "`n` is -1, and must not be negative"),
    "no list": ({"q_positions": "abc"}, "`q_positions` is no array"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_places(name: str) -> None:
    place, message = BAD[name]
    plan, (q, k, v) = compiled("window"), tensors()
    with pytest.raises(attndsl.AttnError) as caught:
        plan(q[:, :, :5], k, v, **place)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert len(caught.value.diagnostics) == 1


def test_cross_attention_begins_among_the_keys() -> None:
    """Where its first query does, others may stand beyond them; without queries an offset is anywhere."""
    plan, (q, k, v) = compiled("window"), tensors()
    found = plan(q[:, :, :5], k[:, :, :20], v[:, :, :20], q_offset=18)
    torch.testing.assert_close(found[:, :, :2], plan(q[:, :, :2], k[:, :, :20], v[:, :, :20]))
    assert plan(q[:, :, :0], k[:, :, :20], v[:, :, :20], q_offset=20).shape == (BATCH, HEADS, 0, WIDTH)
    with pytest.raises(attndsl.AttnError, match="a query stands at 20, and n is 20"):
        attention("window").mask(20, 1, q_offset=20)
    streams = attndsl.parse("attention a { keys tokens ++ pool(4)  mask causal }")["a"]
    with pytest.raises(attndsl.AttnError, match=r"a query stands at 20, and n is 20$"):
        attndsl.compile(streams, length=20, heads=HEADS, head_dim=WIDTH, dtype="float64")(
            q[:, :, :1], k[:, :, :20], v[:, :, :20], q_offset=20
        )


def test_a_mask_at_positions() -> None:
    found = attention("window")
    whole, at = found.mask(N), np.array([3, 90, 41])
    assert (found.mask(N, 3, q_positions=at) == whole[:, at]).all()
    assert (found.counts(3, 3, q_positions=at, k_positions=at) == whole[:, at][:, :, at]).all()
    with pytest.raises(attndsl.AttnError, match="name of an argument of the call"):
        attndsl.compile(
            attndsl.parse("attention a { inputs q_offset : int[n] mask { q, k : q_offset[k] == 0 } }")["a"],
            length=8,
        )
