"""Lists of keys for each query, new at every call: as brute force has it, and no search for tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl import AttnError
from attndsl.execution.lowered import Lowered
from attndsl.tiles import lowering

LISTED = "{ q, k : k in keys[q] }"
Rest = Callable[[int, int], bool]
RESTS: dict[str, tuple[str, Rest]] = {
    "alone": (LISTED, lambda q, k: True),
    "causal": (f"causal & {LISTED}", lambda q, k: k <= q),
    "after": (f"{LISTED} & radius(9)", lambda q, k: abs(q - k) <= 9),
    "others": (f"{LISTED} - strided(3)", lambda q, k: not (k <= q and (q - k < 3 or (q - k) % 3 == 0))),
}
N, HEADS, ENTRIES = 45, 4, 7


def brute_force(keys: Any, rest: Rest, n: int, nq: int, first: int = 0) -> Any:
    """bool [.., nq, n], row i being the query at first + i."""
    found = np.zeros((*keys.shape[:-2], nq, n), bool)
    for *lead, i in np.ndindex(found.shape[:-1]):
        for k in keys[(*lead, first + i)].tolist():
            if 0 <= k < n and rest(first + i, k):
                found[(*lead, i, k)] = True
    return found


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    live = torch.from_numpy(mask)
    s = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~live, -torch.inf)
    empty = ~live.any(-1, keepdim=True).expand(*s.shape[:3], 1)
    weight = s.masked_fill(empty, 0.0).softmax(-1).masked_fill(~live, 0.0)
    return weight @ v, s.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)


def drawn(lead: tuple[int, ...], n: int, entries: int = ENTRIES) -> Any:
    """With entries twice, numbers that are no keys, and a row without keys."""
    found = np.random.default_rng(0).integers(-2, n + 2, (*lead, n, entries))
    found[..., 2] = found[..., 0]
    found[..., 3, :] = -1
    return found


def tensors(batch: int, kv_heads: int, nq: int = N, n: int = N) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = (HEADS, nq, 16), (kv_heads, n, 16), (kv_heads, n, 24)
    return [torch.randn(batch, *size, dtype=torch.float64) for size in sizes]


def plan_of(clauses: str, dims: str = "n", **sizes: Any) -> attndsl.Plan:
    attention = attndsl.parse(f"attention a {{ inputs keys : int[{dims}, top]  {clauses} }}")["a"]
    given = {"length": N, "heads": HEADS, "head_dim": 16, "dtype": "float64", "backend": "torch"}
    return attndsl.compile(attention, **{**given, **sizes})


@pytest.fixture
def untiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> object:
        raise AssertionError("a search for tiles")

    monkeypatch.setattr(Lowered, "tiles", refuse)


@pytest.mark.usefixtures("untiled")
@pytest.mark.parametrize("dims", ["n", "B, n", "H, n", "B, H, n"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", RESTS)
def test_output_and_gradients(name: str, kv_heads: int, dims: str) -> None:
    text, rest = RESTS[name]
    plan = plan_of(f"mask {text}", dims, batch=2, kv_heads=kv_heads, training=True)
    keys = drawn(tuple({"B": 2, "H": HEADS}[axis] for axis in dims.split(", ")[:-1]), N)
    shaped = keys if "H" in dims else np.expand_dims(keys, -3)
    mask = np.broadcast_to(brute_force(shaped, rest, N, N), (2, HEADS, N, N)).copy()
    found, wanted = [], []
    for attend, results in (
        (lambda *x: plan(*x, keys=keys, return_lse=True), found),
        (lambda *x: dense(*x, mask), wanted),
    ):
        leaves = [x.requires_grad_() for x in tensors(2, kv_heads)]
        out, lse = attend(*leaves)
        there = lse > -torch.inf
        loss = (out * torch.arange(24)).sin().sum() + (lse[there] * torch.arange(there.sum())).cos().sum()
        results += [out, lse, *torch.autograd.grad(loss, leaves)]
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.usefixtures("untiled")
def test_new_lists_at_every_call_leave_nothing_behind() -> None:
    plan, (q, k, v) = plan_of(f"mask {LISTED}"), tensors(1, HEADS)
    for turn in range(3):
        keys = np.roll(drawn((), N), turn, axis=0)
        mask = brute_force(keys, lambda q, k: True, N, N)
        torch.testing.assert_close(plan(q, k, v, keys=keys), dense(q, k, v, mask)[0])


@pytest.mark.usefixtures("untiled")
@pytest.mark.parametrize(("nq", "first"), [(1, 17), (5, 40), (0, 3)])
def test_some_queries_of_a_longer_sequence(nq: int, first: int) -> None:
    plan, (q, k, v), keys = plan_of(f"mask causal & {LISTED}"), tensors(1, 2, nq), drawn((), N)
    plan = plan_of(f"mask causal & {LISTED}", kv_heads=2, q_length=max(nq, 1))
    mask = brute_force(keys, lambda q, k: k <= q, N, nq, first)
    torch.testing.assert_close(plan(q, k, v, keys=keys, q_offset=first), dense(q, k, v, mask)[0])


def test_a_key_that_nobody_reads_may_hold_anything() -> None:
    """Key 0 stands in where an entry is out, with weight 0, and 0 times NaN is NaN."""
    plan, keys = plan_of(f"mask causal & {LISTED}", training=True), drawn((), N)
    keys[keys == 0] = 1
    results = []
    for odd in (0.0, torch.nan):
        leaves = [x.requires_grad_() for x in tensors(1, HEADS)]
        held = torch.zeros(N, 1, dtype=torch.float64)
        held[0] = odd
        q, k, v = leaves
        out = plan(q, k + held, v - held, keys=keys)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for odd, right in zip(*results[::-1], strict=True):
        torch.testing.assert_close(odd, right)


def test_a_key_that_is_not_finite_spoils_those_who_read_it() -> None:
    plan, (q, k, v), keys = plan_of(f"mask causal & {LISTED}"), tensors(1, HEADS), drawn((), N)
    right = plan(q, k, v, keys=keys)
    for bad in (0, 5):
        reads = torch.from_numpy(brute_force(keys, lambda q, k: k <= q, N, N)[:, bad])
        assert 0 < reads.sum() < N
        spoiled = k.clone()
        spoiled[:, :, bad] = torch.nan
        found = plan(q, spoiled, v, keys=keys)
        assert found[:, :, reads].isnan().all()
        torch.testing.assert_close(found[:, :, ~reads], right[:, :, ~reads])


@pytest.fixture
def tilings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    made: list[object] = []
    tiles = lowering.block_mask
    monkeypatch.setattr(lowering, "block_mask", lambda *given: made.append(given) or tiles(*given))
    return made


@pytest.mark.parametrize(
    ("text", "entries", "why"),
    [
        (LISTED, N // 3, "long lists"),
        (f"{LISTED} | last(3)", ENTRIES, "a union"),
        (f"random(3) & {LISTED}", ENTRIES, "a search"),
        (f"{{ q, k : keys[q - q mod 2, 0] <= k }} & {LISTED}", ENTRIES, "a look-up at another place"),
        ("{ q, k : q in keys[k] }", ENTRIES, "lists of queries"),
    ],
)
def test_what_is_no_list_of_few_keys_is_tiled(
    text: str, entries: int, why: str, tilings: list[object]
) -> None:
    plan, (q, k, v), keys = plan_of(f"mask {text}"), tensors(1, HEADS), drawn((), N, entries)
    right = attndsl.parse(f"attention a {{ inputs keys : int[n, top]  mask {text} }}")["a"].mask(N, keys=keys)
    torch.testing.assert_close(plan(q, k, v, keys=keys), dense(q, k, v, right)[0])
    assert tilings, why


@pytest.mark.usefixtures("untiled")
def test_tables_of_every_position_are_looked_up_at_the_lists() -> None:
    plan, (q, k, v) = plan_of(f"odd : int[m]  mask {{ q, k : odd[k] == 1 }} & {LISTED}"), tensors(1, HEADS)
    keys, odd = drawn((), N), np.arange(N) % 2
    mask = brute_force(keys, lambda q, k: bool(odd[k]), N, N)
    torch.testing.assert_close(plan(q, k, v, keys=keys, odd=odd), dense(q, k, v, mask)[0])


def test_a_table_that_ends_before_the_keys_is_an_error_where_no_list_reads_beyond_it() -> None:
    plan, (q, k, v) = plan_of(f"odd : int[m]  mask {{ q, k : odd[k] == 1 }} & {LISTED}"), tensors(1, HEADS)
    with pytest.raises(AttnError, match="`odd` has 40 entries"):
        plan(q, k, v, keys=drawn((), N) % 40, odd=np.arange(40) % 2)


def test_a_plan_counts_on_lists() -> None:
    """The cost before tables are bound is that of the lists, not of all pairs."""
    text = f"attention a {{ inputs keys : int[n, 64]  mask {LISTED} }}"
    for n in (1024, 4096):
        considered = attndsl.compile(attndsl.parse(text)["a"], length=n, heads=8).considered
        assert considered["torch"] < considered["sdpa"] / 2
    once, twice = (
        attndsl.compile(attndsl.parse(text)["a"], length=n, heads=8).considered["torch"]
        for n in (8192, 16384)
    )
    assert twice < 2.1 * once
