"""Choices by content: what they mean, that they are kept, and that they say where they may stand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from thin import thin
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import attndsl
from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.command.check import looking_ahead
from attndsl.conformance.selections import LENGTHS as SIZES
from attndsl.conformance.selections import check
from attndsl.execution import leaks
from attndsl.execution.selecting import drawn
from attndsl.meaning.normals import normals
from attndsl.plugins.torch import blocklists, slabs
from attndsl.tiles import lowering

TEXT = """
attention moba { mask causal & (block(16) | topk(2, of = blocks(16, causal - radius(0)), by = Q @ mean(K))) }
attention knn(r = 4) { mask topk(r, of = causal) }
attention tiles { mask causal & blocks(8, radius(0) | topk(2, of = causal - radius(0))) }
"""
LENGTHS = (1, 7, 16, 17, 48, 75)


def vectors(n: int, seed: int, nq: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 4, n if nq is None else nq, 8), (2, 2, n, 8), (2, 2, n, 8)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ v


def greatest(scores: Tensor, live: Tensor, r: int) -> Tensor:
    """Truths [.., rows, units] by sorting pairs in Python: greater score first, then lower place."""
    found = torch.zeros_like(live)
    rows = zip(scores.flatten(0, -2), live.flatten(0, -2), found.view(-1, live.shape[-1]), strict=True)
    for row, there, out in rows:
        places = [place for place in range(len(row)) if there[place]]
        places.sort(key=lambda place: (-row[place].item(), place))
        out[places[:r]] = True
    return found


def mean_of_blocks(x: Tensor, b: int) -> Tensor:
    return torch.stack([piece.mean(-2) for piece in x.split(b, -2)], -2)


def knn(q: Tensor, k: Tensor) -> Tensor:
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2)
    return greatest(scores, causal.expand(scores.shape), 4)


def moba(q: Tensor, k: Tensor) -> Tensor:
    n = k.shape[2]
    place = torch.arange(n)
    own, block = place[:, None] // 16, torch.arange((n + 15) // 16)
    scores = q @ mean_of_blocks(k.repeat_interleave(2, 1), 16).transpose(-1, -2)
    chosen = greatest(scores, (block < own).expand(scores.shape), 2)[..., place // 16]
    return (place[:, None] >= place) & ((own == place // 16) | chosen)


def tiles(q: Tensor, k: Tensor) -> Tensor:
    n = k.shape[2]
    place = torch.arange(n)
    block = torch.arange((n + 7) // 8)
    scores = mean_of_blocks(q, 8) @ mean_of_blocks(k.repeat_interleave(2, 1), 8).transpose(-1, -2)
    chosen = greatest(scores, (block < block[:, None]).expand(scores.shape), 2)
    chosen = (chosen | (block == block[:, None]))[..., place // 8, :][..., place // 8]
    return (place[:, None] >= place) & chosen


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("naive", [knn, moba, tiles], ids=lambda naive: naive.__name__)
@pytest.mark.parametrize("n", LENGTHS)
def test_a_choice_is_what_sorting_gives(naive, backend: str, n: int) -> None:
    plan = attndsl.compile(
        attndsl.parse(TEXT)[naive.__name__], length=80, heads=4, kv_heads=2, head_dim=8, dtype="float64",
        batch=2, backend=backend, training=True,
    )  # fmt: skip
    q, k, v = (x.requires_grad_() for x in vectors(n, seed=n))
    mask = naive(q.detach(), k.detach())
    wanted, got = dense(q, k, v, mask), plan(q, k, v)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    slope = torch.randn_like(wanted)
    grads = (torch.autograd.grad(out, (q, k, v), slope) for out in (got, wanted))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_row_is_chosen_for_where_it_stands(backend: str) -> None:
    """The last rows alone, and keys in a cache, choose as among all."""
    plan = attndsl.compile(
        attndsl.parse(TEXT)["knn"],
        length=64,
        heads=4,
        kv_heads=2,
        head_dim=8,
        dtype="float64",
        backend=backend,
    )
    q, k, v = vectors(64, seed=1)
    whole = plan(q, k, v)
    for rows in (1, 3, 20):
        torch.testing.assert_close(plan(q[:, :, -rows:], k, v), whole[:, :, -rows:], rtol=0, atol=1e-12)
    some = plan(q[:, :, 10:12], k[:, :, :40], v[:, :, :40], q_offset=10)
    torch.testing.assert_close(some, whole[:, :, 10:12], rtol=0, atol=1e-12)


def test_of_equal_scores_the_first_key_is_chosen() -> None:
    plan = attndsl.compile(attndsl.parse(TEXT)["knn"], length=12, head_dim=8, dtype="float64")
    q, k, v = (torch.ones(1, 1, 12, 8, dtype=torch.float64) for _ in range(3))
    v = torch.arange(12.0, dtype=torch.float64).view(1, 1, 12, 1).expand(1, 1, 12, 8)
    wanted = [sum(range(min(4, row + 1))) / min(4, row + 1) for row in range(12)]
    torch.testing.assert_close(plan(q, k, v)[0, 0, :, 0], torch.tensor(wanted, dtype=torch.float64))


def counts_of_chunks(labels: Tensor, chunk: int, wrap: bool) -> Tensor:
    """Multiplicities [n, n] of labels [rounds, n], slot by slot as in the published code: rounds end to end
    on one axis, each piece beside the one before it."""
    n = labels.shape[1]
    pieces = []
    for row in labels.tolist():
        order = sorted(range(n), key=lambda i: (row[i], i))
        pieces.append([order[start : start + chunk] for start in range(0, n, chunk)])
    found = torch.zeros(n, n, dtype=torch.int64)
    for j, of_round in enumerate(pieces):
        for i, piece in enumerate(of_round):
            before = of_round[i - 1] if i else pieces[j - 1][-1] if wrap else []
            for q in piece:
                for k in [*piece, *before]:
                    found[q, k] += 1
    return found


@pytest.mark.parametrize(("count", "wrap"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("n", [5, 16, 33, 64])
@pytest.mark.parametrize("rounds", [1, 3])
def test_an_order_relates_pieces(count: bool, wrap: bool, n: int, rounds: int) -> None:
    flags = f"count = {str(count).lower()}, wrap = {str(wrap).lower()}"
    text = f"attention a {{ mask lsh(rounds = {rounds}, chunk = 8, buckets = 4, {flags}) }}"
    bound = attndsl.parse(text)["a"]
    plan = attndsl.compile(bound, length=64, heads=4, kv_heads=2, head_dim=8, dtype="float64", batch=2)
    q, k, v = vectors(n, seed=n)
    chosen = {name: found.numpy() for name, found in plan.choices(q, k).items()}
    got = torch.from_numpy(bound.counts(n, heads=4, **chosen))
    rotation = torch.tensor(normals(0, rounds, 2, 8, 2))
    along = torch.einsum("bhnd,rhdm->bhrnm", k, rotation)
    labels = torch.cat([along, -along], -1).argmax(-1).repeat_interleave(2, 1)
    wanted = torch.stack([torch.stack([counts_of_chunks(x, 8, wrap) for x in row]) for row in labels])
    assert torch.equal(got, wanted if count else wanted.clamp_max(1))
    logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5 + got.double().log()
    exact = torch.softmax(logits, -1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(plan(q, k, v), exact, rtol=0, atol=1e-12)


def test_queries_and_keys_of_one_cluster_see_one_another() -> None:
    bound = attndsl.parse("attention a { inputs mu : float[H, 4, D]  mask cluster(mu, 6) }")["a"]
    plan = attndsl.compile(bound, length=40, heads=2, head_dim=8, dtype="float64")
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 40, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    mu = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    chosen = {name: found.numpy() for name, found in plan.choices(q, k, mu=mu).items()}
    wanted = torch.zeros(2, 40, 40, dtype=torch.bool)
    for h in range(2):
        for center in mu[h]:
            of_q, of_k = ((x[0, h] / x[0, h].norm(dim=-1, keepdim=True)) @ center for x in (q, k))
            for i in of_q.topk(6).indices:
                wanted[h, i, of_k.topk(6).indices] = True
    got = torch.from_numpy(bound.mask(40, heads=2, mu=mu.numpy(), **chosen))
    assert torch.equal(got.view(2, 40, 40), wanted)


LEAVES = [
    "mask topk(4, of = causal)",
    "mask topk(4, of = causal, share = kv)",
    "mask topk(1000000, of = last(40))",
    "mask causal & topk(2, of = blocks(4, causal - radius(0)), by = Q @ mean(K))",
    # the mean of 3 is rounded, and equal scores are equal no more
    "mask causal & blocks(2, radius(0) | topk(2, of = causal - radius(0)))",
    "inputs ids : int[B, n]  mask topk(4, of = documents(ids))",
    "mask causal & within(hash(8, seed = 3), last(4))",
    "mask causal & within(hash(128), full)",
    "inputs mu : float[H, 4, D]  mask causal & within(nearest(mu), last(8))",
    "mask causal & lsh(rounds = 2, chunk = 8)",
    "mask lsh(rounds = 3, chunk = 8, buckets = 6, seed = 5, count = true, wrap = true)",
    "inputs mu : float[H, 4, D]  mask causal & cluster(mu, 8)",
]


@pytest.mark.parametrize("n", thin(SIZES, 4))
@pytest.mark.parametrize("clauses", LEAVES)
def test_a_selection_conforms(clauses: str, n: int) -> None:
    check(clauses, n)


MISTAKES = {
    "mask topk(0, of = causal)": "`topk` chooses 0, and at least 1 must be chosen",
    "mask within(8, topk(2))": "may not stand here",
    "mask topk(2) @ causal": "may not stand here",
    "mask ~topk(2)": "may not stand here",
    "mask causal - topk(2)": "may not stand here",
    "mask T(topk(2))": "may not stand here",
    "mask grid(4, 4, { (y, x), (v, u) : topk(2)[y, v] })": "may not stand here",
    "score s + where(topk(2)[q, k], 1.0, 0.0)": "stands in a mask alone",
    "mask topk(2, by = learn[D] @ K)": "needs a name",
    "mask topk(2, of = topk(3))": "may not stand here",
    "mask topk(2, share = heads)": "`share` is heads",
    "mask topk(2, by = Q @ mean(K))": "`mean(K)` is of a block, and keys are chosen here one by one",
    "mask topk(2, off = causal)": "`topk` has no parameter `off`",
    "mask topk(of = causal)": "`topk` needs its argument `r`",
}


@pytest.mark.parametrize(("clauses", "said"), MISTAKES.items())
def test_a_choice_where_none_may_be_is_refused(clauses: str, said: str) -> None:
    with pytest.raises(attndsl.AttnError) as found:
        attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    assert said in str(found.value)
    assert "<text>:1:" in str(found.value)


LEAKS = {
    "mask causal & topk(8)": True,
    "mask topk(8, of = causal)": False,
    "mask causal & topk(2, of = blocks(8, causal))": True,
    "mask causal & topk(2, of = blocks(8, causal - radius(0)))": False,
    "mask causal & blocks(8, radius(0) | topk(2, of = causal - radius(0)))": True,
    "mask causal & lsh(rounds = 2, chunk = 8)": True,
    "mask causal & within(hash(8), last(4))": False,
    "mask causal & within(hash(4), { q, k : k == n - 1 })": True,
    "mask causal & within(hash(4), random(2))": True,
    "inputs mu : float[H, 4, D]  mask causal & cluster(mu, 8)": True,
    "inputs mu : float[H, 4, D]  mask causal & within(nearest(mu), last(4))": False,
    "mask within(hash(4), last(4))": False,
    "mask within(hash(4), last(n // 4))": True,
    "mask within(hash(4), { q, k : k <= q and k >= n - q })": True,
    # too many numbers at once to prove that it is causal: no choice shows a later key
    "mask within(hash(4), last(n // 4)) | within(hash(8, seed = 1), last(n // 4))": True,
}
"""Whether later tokens change what a query of a causal attention sees."""


def changed(attention: Attention, n: int, seed: int) -> list[int]:
    """Rows before the last whose keys change with the last token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = lowering.sizes(attention, n, n, attention.enough_heads())
    q, k, tables = leaks.random_call(attention, sizes, generator)
    before = leaks.seen(attention, sizes, q, k, tables)
    q, k = q.clone(), k.clone()
    q[:, :, -1], k[:, :, -1] = (4 * torch.randn(q.shape[3], generator=generator) for _ in range(2))
    differ = (before != leaks.seen(attention, sizes, q, k, tables)).any((0, 1, 3))[:-1]
    return [int(row) for row in np.flatnonzero(differ)]


@pytest.mark.parametrize(("clauses", "leaks_"), LEAKS.items())
def test_what_looks_ahead_is_told_and_an_edit_shows_it(clauses: str, leaks_: bool) -> None:
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"].attention
    assert bool(leaks.unstable(attention)) == leaks_
    if leaks_:
        assert any(changed(attention, n, seed) for n in (48, 192, 768) for seed in range(20))


def test_a_width_that_counts_a_bucket_is_told_with_the_safe_one() -> None:
    program = attndsl.parse("attention a { mask within(hash(4), last(n // 4)) }")
    (warned,) = looking_ahead(program)
    assert warned.message == "`hash` looks ahead: later tokens may change what an earlier query sees"
    assert warned.help == "in `within` `n` counts the bucket, later tokens too: write a number, as `last(64)`"


def test_what_looks_ahead_is_told_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    told = [len([*looking_ahead(attndsl.load(f"example:{name}"))]) for name in ("routing", "reformer", "nsa")]
    assert told == [1, 2, 0]


def test_what_is_not_causal_looks_ahead_of_itself() -> None:
    for mask in ("topk(8)", "within(hash(4), blocks(4, causal))", "lsh(2, 8)"):
        assert not leaks.unstable(attndsl.parse(f"attention a {{ mask {mask} }}")["a"].attention)


@pytest.mark.parametrize("clauses", [clauses for clauses, leaks_ in LEAKS.items() if not leaks_])
def test_what_is_proved_stable_is_not_changed_by_20_edits(clauses: str) -> None:
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"].attention
    for n in (24, 65):
        assert not any(changed(attention, n, seed) for seed in range(20))


EVERY = {
    "topk": "mask causal & (last(3) | topk(4, of = causal))",
    "topk_kv": "mask causal & topk(4, of = causal, share = kv)  score alibi",
    "blocks": TEXT[TEXT.index("mask causal & (block(16)") : TEXT.index(" }\nattention knn")],
    "quest": "mask causal & (sinks(2) | last(5) | topk(2, of = blocks(8, causal - radius(0)),"
    " by = sum(max(Q * min(K), Q * max(K)))))",
    "both": "mask topk(2, of = blocks(8, full), by = Q @ mean(K)) | topk(3)",
    "tiles": "mask causal & blocks(8, radius(0) | topk(2, of = causal - radius(0)))",
    "all": "mask topk(1000000, of = causal)",
    "all blocks": "mask causal & (block(8) | topk(1000000, of = blocks(8, causal), by = Q @ mean(K)))",
    "documents": "inputs ids : int[B, n]  mask causal & topk(4, of = causal & documents(ids))",
    "buckets": "mask causal & within(hash(4), last(6))",
    "nearest": "inputs mu : float[H, 3, D]  mask within(nearest(mu), radius(2))",
    "lsh": "mask causal & lsh(rounds = 2, chunk = 8)  score shared_qk",
    "lsh_count": "mask causal & lsh(rounds = 3, chunk = 8, count = true, wrap = true)",
    "lsh_full": "mask lsh(rounds = 2, chunk = 8)  norm softmax(sink = 0.5)",
    "cluster": "inputs mu : float[H, 3, D]  mask causal & cluster(mu, 6)",
    "linear": "mask causal & topk(4, of = causal)  score (Q @ K) ** 2  norm linear",
}


def given_to(bound: attndsl.Bound, n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    sizes = {"B": 2, "H": 4, "n": n, "D": 8}
    return {
        t.name: torch.arange(n).expand(2, n) * 3 // max(n, 1)
        if t.dtype == "int"
        else torch.randn([sizes.get(axis, axis) for axis in t.dims], generator=generator, dtype=torch.float64)
        for t in bound.inputs
    }


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("n", thin([23, 1, 8, 50], 2))
def test_backends_agree_on_what_is_chosen(name: str, n: int) -> None:
    """Output, log-sum-exp and gradients, each backend that takes it against `reference`."""
    bound = attndsl.parse(f"attention a {{ {EVERY[name]} }}")["a"]
    sizes = {"length": 64, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float64", "batch": 2}
    plans = {
        backend: attndsl.compile(bound, **sizes, backend=backend, training=True)
        for backend, verdict in attndsl.compile(bound, **sizes, training=True).considered.items()
        if not isinstance(verdict, str)
    }
    assert {"reference", "torch"} <= plans.keys()
    tables, found = given_to(bound, n), {}
    for backend, plan in plans.items():
        q, k, v = (x.requires_grad_() for x in vectors(n, seed=n))
        out, lse = plan(q, k, v, return_lse=True, **tables)
        slopes = [
            torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double() for x in (out, lse)
        ]
        ends = torch.where(lse.isfinite(), lse, 0.0)
        found[backend] = out, lse, *torch.autograd.grad((out, ends), (q, k, v), slopes)
    for backend, results in found.items():
        for mine, exact in zip(results, found["reference"], strict=True):
            torch.testing.assert_close(mine, exact, rtol=0, atol=1e-10, msg=lambda m, b=backend: f"{b}: {m}")


TRANSFORMED = ["topk", "all", "blocks", "tiles", "buckets", "lsh_count", "cluster"]


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, None) for name in TRANSFORMED), ("topk", "reference"), ("buckets", "reference")],
)
def test_transforms_choose_as_plain_calls_do(name: str, backend: str | None) -> None:
    bound = attndsl.parse(f"attention a {{ {EVERY[name]} }}")["a"]
    plan = attndsl.compile(
        bound, length=64, heads=4, kv_heads=2, head_dim=8, batch=2, training=True, backend=backend
    )
    tables = {key: x.float() if x.is_floating_point() else x for key, x in given_to(bound, 40).items()}
    q, k, v = (x.float().requires_grad_() for x in vectors(40, seed=3))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plan(q, k, v, **tables)

    plain = call(q, k, v)
    exact = torch.autograd.grad(plain.square().sum(), (q, k, v))
    # each plan is a graph of its own
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    kept = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=False)
    for out in (compiled, kept):
        torch.testing.assert_close(out, plain)
        for mine, wanted in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), exact, strict=True):
            torch.testing.assert_close(mine, wanted)
    grads = torch.func.grad(lambda *x: call(*x).square().sum(), argnums=(0, 1, 2))(q, k, v)
    for mine, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(mine, wanted)
    stacked = torch.func.vmap(call)(*(torch.stack([x, x.flip(0)]) for x in (q, k, v)))
    torch.testing.assert_close(stacked[0], plain)
    with torch.no_grad():
        exported = torch.export.export(Called(plan, tables), (q, k, v))
        torch.testing.assert_close(exported.module()(q, k, v), plain)
    with torch.autocast("cpu", torch.bfloat16):
        half = call(q, k, v)
    again = call(*(x.bfloat16() for x in (q, k, v)))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, again)


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_a_list_is_no_longer_than_what_there_is(backend: str | None) -> None:
    bound = attndsl.parse("""attention a {
        mask topk(1000000, of = causal) | topk(1000000, of = blocks(6, causal), by = Q @ mean(K))
            | blocks(4, topk(1000000))
    }""")["a"]
    plan = attndsl.compile(bound, length=16, heads=4, kv_heads=2, head_dim=8, backend=backend)
    q, k, v = (x.float() for x in vectors(16, seed=5))
    chosen = plan.choices(q, k)
    assert [[*x.shape] for x in chosen.values()] == [[2, 4, 16, 16], [2, 4, 16, 3], [2, 4, 4, 4]]
    assert bound.mask(16, heads=4, **{name: x.numpy() for name, x in chosen.items()}).all()
    torch.testing.assert_close(plan(q, k, v), dense(q, k, v, torch.ones(16, 16, dtype=torch.bool)))
    assert plan(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (2, 4, 0, 8)


def test_one_graph_serves_lengths_on_both_sides_of_a_list() -> None:
    plan = attndsl.compile(
        attndsl.parse(TEXT)["knn"](r=20), length=64, heads=4, kv_heads=2, head_dim=8, dtype="float64"
    )
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plan, fullgraph=True, dynamic=True, backend=graphs)
    for n in (10, 40, 20):
        q, k, v = vectors(n, seed=n)
        torch.testing.assert_close(compiled(q, k, v), plan(q, k, v))
    assert graphs.frame_count == 1


class Called(torch.nn.Module):
    def __init__(self, plan: attndsl.Plan, tables: dict[str, Tensor]) -> None:
        super().__init__()
        self.plan, self.tables = plan, tables

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.plan(q, k, v, **self.tables)


def test_a_nan_is_seen() -> None:
    """It is the greatest score, so its key is chosen wherever it may be."""
    plan = attndsl.compile(
        attndsl.parse(TEXT)["knn"], length=32, heads=4, kv_heads=2, head_dim=8, dtype="float64"
    )
    q, k, v = vectors(32, seed=0)
    k[:, :, 5] = torch.nan
    out = plan(q, k, v)
    assert out[:, :, 5:].isnan().all()
    assert not out[:, :, :5].isnan().any()


def test_a_session_chooses_as_the_whole() -> None:
    for text in ("mask topk(4, of = causal)", "mask causal & within(hash(4), last(6))", f"{EVERY['blocks']}"):
        bound = attndsl.parse(f"attention a {{ {text} }}")["a"]
        plan = attndsl.compile(bound, length=64, heads=4, kv_heads=2, head_dim=8, dtype="float64")
        q, k, v = vectors(40, seed=2)
        session = plan.session(2, 64)
        parts = [session.prefill(q[:, :, :20], k[:, :, :20], v[:, :, :20])]
        parts += [session.step(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(20, 40)]
        torch.testing.assert_close(torch.cat(parts, 2), plan(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("clauses", ["mask topk(4, of = causal)", "mask last(3) | topk(3, of = last(9))"])
def test_a_choice_is_of_positions_wherever_keys_stand(clauses: str, backend: str) -> None:
    """Moved along, in any order, with gaps, each batch row for itself; ties too."""
    bound = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    sizes = {"length": 40, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float64", "backend": backend}
    plan = attndsl.compile(bound, **sizes)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    tied = (torch.ones(2, 4, 20, 8).double(), torch.ones(2, 2, 20, 8).double(), vectors(20, seed=1)[2])
    for q, k, v in (vectors(20, seed=0), tied):
        whole = plan(q, k, v)
        moved = plan(q, k, v, q_offset=[3, 7], k_offset=[3, 7])
        torch.testing.assert_close(moved, whole, rtol=0, atol=1e-12)
        mixed = plan(q, k[:, :, order], v[:, :, order], k_positions=order, q_offset=0)
        torch.testing.assert_close(mixed, whole, rtol=0, atol=1e-12)
    q, k, v = vectors(20, seed=2)
    places = torch.tensor([0, 1, 2, 4, 5, 6, 7, 9, 11, 12, 13, 15, 16, 17, 18, 19])
    here = {"k_positions": places, "q_offset": 0, "n": 20}
    chosen = plan.choices(q, k[:, :, places], **here)
    assert all(torch.isin(x, torch.cat([places, torch.tensor([-1])])).all() for x in chosen.values())
    mask = torch.from_numpy(bound.mask(20, heads=4, **{name: x.numpy() for name, x in chosen.items()}))
    gone = plan(q, k[:, :, places], v[:, :, places], **here)
    wanted = dense(q, k[:, :, places], v[:, :, places], mask[..., places])
    torch.testing.assert_close(gone, wanted, rtol=0, atol=1e-12)


ROLLING = {
    "mask last(9) & topk(4, of = last(8))": 8,
    "mask topk(4, of = last(9))": 9,
    "mask last(8) & topk(4, of = causal)": 64,
    "mask last(9) & within(hash(4), last(3))": 64,
    "mask last(20) & topk(2, of = blocks(4, causal - radius(0)), by = Q @ mean(K))": 64,
}
"""Keys that a session keeps: those that take part in a choice, chosen or not."""


@pytest.mark.parametrize(("clauses", "slots"), ROLLING.items())
def test_a_session_keeps_what_takes_part_in_a_choice(clauses: str, slots: int) -> None:
    bound = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    plan = attndsl.compile(bound, length=64, heads=4, kv_heads=2, head_dim=8, dtype="float64")
    session, (q, k, v) = plan.session(2, 64), vectors(40, seed=4)
    steps = [session.step(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(40)]
    assert session.k.shape[2] == slots
    torch.testing.assert_close(torch.cat(steps, 2), plan(q, k, v), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("clauses", "said"),
    [
        ("mask causal & topk(4)", "what `topk` chooses may change with later tokens"),
        ("mask causal & lsh(2, 4)", "what `lsh` chooses may change with later tokens"),
        (
            "mask topk(4, of = causal, by = Q @ K * where(n mod 2 == 0, 1.0, -1.0))",
            "its scores depend on `n`",
        ),
    ],
)
def test_no_session_where_later_tokens_change_a_choice(clauses: str, said: str) -> None:
    plan = attndsl.compile(attndsl.parse(f"attention a {{ {clauses} }}")["a"], length=64)
    with pytest.raises(attndsl.AttnError, match=said):
        plan.session(1, 64)


def test_heads_that_choose_together_choose_among_the_same() -> None:
    for of in ("{ q, k : k mod 2 == h mod 2 }", "{ q, k : k >= lo }"):
        with pytest.raises(attndsl.AttnError, match="`of` differs from head to head"):
            attndsl.parse(f"attention a {{ inputs lo : int[H]  mask topk(2, of = {of}, share = kv) }}")["a"]


@pytest.mark.parametrize(
    ("mask", "exact"),
    [
        ("topk(4, of = causal)", True),
        ("causal & (block(4) | topk(2, of = blocks(4, causal - radius(0)), by = Q @ mean(K)))", True),
        ("last(3) | topk(4, of = causal - last(3))", True),
        ("blocks(4, radius(0) | topk(2, of = causal - radius(0)))", False),
        ("causal & topk(4)", False),
        ("last(3) & topk(2, of = causal)", False),
        ("topk(4, of = causal) - radius(0)", False),
        ("sinks(5) & topk(2, of = blocks(4, last(7)), by = Q @ min(K))", False),
        ("blocks(3, topk(1, of = causal)) | blocks(8, topk(1, of = causal))", False),
        ("topk(3, of = documents(ids))", False),
    ],
)
@pytest.mark.parametrize("n", [17, 48])
def test_pairs_are_counted_whatever_is_chosen(mask: str, exact: bool, n: int) -> None:
    bound = attndsl.parse(f"attention a {{ inputs ids : int[B, n]  mask {mask} }}")["a"]
    given = {"ids": (np.arange(n) * 3 // n)[None]}
    found = attndsl.analyze(bound, length=n, **given)
    assert found.reasons == {}
    at = lowering.sizes(bound.attention, n, n, 1)
    for seed in range(5):
        pairs = int(bound.mask(n, **given, **drawn(bound.attention, at, 1, 8, given, seed)).sum())
        low, high = found.nnz.bounds or (found.nnz.value, found.nnz.value)
        assert low <= pairs <= high
    assert not exact or low == high


def test_a_claim_is_refuted_by_what_holds_whatever_is_chosen() -> None:
    program = attndsl.parse("""
        attention t { mask topk(4, of = causal) }
        attention w { mask last(5) | topk(2, of = causal) }
        pattern near = last(3)
        assert every_row(t)
        assert t <= near
        assert w <= near
        assert t <= causal
        assert every_row(w)
    """)
    found = [attndsl.prove(assertion).status for assertion in program.assertions]
    assert found == ["proved", "undecided", "refuted", "proved", "proved"]


ROWS = {
    "topk(3, of = causal)": "proved",
    "causal & topk(1, of = causal)": "proved",
    "topk(2)": "proved",
    "causal & topk(4)": "undecided",
    "topk(2, of = causal - radius(0))": "refuted",
    "(last(2) - radius(0)) | topk(1, of = causal)": "proved",
    "causal & topk(1, of = blocks(4, causal), by = Q @ mean(K))": "proved",
    "{ q, k : k mod 4 == 1 } & topk(1, of = blocks(4, causal), by = Q @ mean(K))": "refuted",
    "last(6) & topk(1, of = blocks(4, causal), by = Q @ mean(K))": "undecided",
    "causal & blocks(4, topk(1, of = causal))": "proved",
    "documents(ids) & topk(3, of = causal & documents(ids))": "proved",
    "documents(ids) & topk(3, of = causal)": "undecided",
    "within(hash(4), last(3))": "proved",
    "causal & lsh(2, 4)": "proved",
    "topk(1, of = last(2)) & topk(1, of = causal)": "undecided",
}
"""Whether every query has a key, whatever is chosen."""


@pytest.mark.parametrize(("mask", "status"), ROWS.items())
def test_a_row_of_a_list_holds_a_candidate(mask: str, status: str) -> None:
    text = f"attention a {{ inputs ids : int[B, n]  mask {mask} }} assert every_row(a)"
    program = attndsl.parse(text)
    ((_, verdict),) = program.check()
    assert verdict.status == status
    bound, seen = program["a"], True
    for n in (1, 6, 11):
        given = {"ids": (np.arange(n) * 3 // n)[None]}
        at = lowering.sizes(bound.attention, n, n, 1)
        for seed in range(5):
            rows = bound.mask(n, **given, **drawn(bound.attention, at, 1, 8, given, seed)).any(-1)
            seen &= bool(rows.all())
    assert seen or status != "proved"


def test_a_quantity_is_claimed_of_every_choice() -> None:
    text = """pattern t = topk(2, of = causal)  pattern w = within(hash(4), last(2))
        assert nnz(t, n = 8, heads = 2) == 30  assert nnz(t, n = 8, heads = 2) < 30
        assert density(t, n = 100, heads = 1) < 2%  assert nnz(w, n = 8, heads = 2) >= 16
        assert nnz(w, n = 8, heads = 2) == 15  assert nnz(w, n = 8, heads = 2) != 17
        assert density(t | w, n = 0, heads = 1) == 0"""
    found = [(verdict.status, verdict.reason) for _, verdict in attndsl.parse(text).check()]
    assert found == [
        ("proved", "nnz is 30 at n = 8"),
        ("refuted", "nnz is 30 at n = 8"),
        ("proved", "density is 1.99 % at n = 100"),
        ("proved", "nnz is 16 to 128 at n = 8"),
        ("refuted", "nnz is 16 to 128 at n = 8"),
        ("undecided", "nnz is 16 to 128 at n = 8: it depends on what `hash` chooses"),
        ("proved", "density is 0 % at n = 0"),
    ]


PAIRS = {
    "within(hash(4), full)": (4 * 6**2, 24**2),
    "causal & within(hash(4), full)": (4 * 21, 300),
    "within(hash(4), last(3))": (4 * 15, 24 * 3 - 3),
    "within(nearest(mu), radius(1))": (3 * 22, 24 * 3 - 2),
    "within(hash(4), last(n))": (0, 24**2),
    "last(2) & within(hash(4), full)": (24, 47),
    "lsh(1, 8)": (3 * 64 + 2 * 64, 3 * 64 + 2 * 64),
    "causal & lsh(1, 8)": (3 * 36, 3 * 36 + 2 * 64),
    "lsh(1, 10, count = true, wrap = true)": (216 + 140, 216 + 140 + 40),
    "lsh(3, 5)": (4 * 25 + 16 + 3 * 25 + 20, 24**2),
    "cluster(mu, 8)": (64, 3 * 64),
    "causal & cluster(mu, 8)": (0, 3 * 64),
}
"""The least and the greatest number of pairs of one head at n = 24, whatever is chosen."""


@pytest.mark.parametrize("mask", PAIRS)
def test_pairs_of_buckets_and_pieces_are_bounded(mask: str) -> None:
    bound = attndsl.parse(f"attention a {{ inputs mu : float[3, D]  mask {mask} }}")["a"]
    generator, at = torch.Generator().manual_seed(0), lowering.sizes(bound.attention, 24, 24, 2)
    given = {"mu": torch.randn(3, 8, generator=generator).numpy()}
    found = attndsl.analyze(bound, length=24, heads=2, head_dim=8, parts=["nnz"], **given).nnz
    low, high = PAIRS[mask]
    assert (found.bounds or (found.value, found.value)) == (2 * low, 2 * high)
    for seed in range(10):
        chosen = drawn(bound.attention, at, 2, 8, given, seed)
        assert 2 * low <= bound.mask(24, heads=2, **given, **chosen).sum() <= 2 * high


@pytest.mark.parametrize("by", ["w[q] @ max(iq[q] @ ik[k], 0.0)", "ik[q] @ ik[k] + 0.01 * (q - k)"])
@pytest.mark.parametrize("share", ["", ", share = kv"])
@pytest.mark.parametrize("r", [3, 30])
def test_heads_that_choose_alike_choose_once(by: str, share: str, r: int) -> None:
    text = "inputs iq : float[B, n, 3, 5]  ik : float[B, n, 5]  w : float[B, n, 3]"
    check(f"{text} mask topk({r}, of = causal, by = {by}{share})", 17)


@pytest.mark.parametrize("score", ["", "score alibi"])
def test_heads_that_choose_alike_attend_together(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four heads, whose logits differ all the same; some of a chosen block is out of reach."""
    chosen = "topk(2, of = blocks(8, causal - radius(0)), by = Q @ mean(K))"
    bound = attndsl.parse(f"attention a {{ mask causal & last(70) & (block(8) | {chosen}) {score} }}")["a"]
    sizes = {"length": 150, "heads": 4, "kv_heads": 1, "head_dim": 8, "dtype": "float64", "training": True}
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 150, 8, dtype=torch.float64, generator=generator) for h in (4, 1, 1))
    q[:, 1] = 2 * q[:, 0]
    leaves, slope = [x.requires_grad_() for x in (q, k, v)], torch.randn(q.shape, dtype=torch.float64)
    together = []
    monkeypatch.setattr(
        blocklists, "Chosen", lambda *given: together.append(given[3]) or slabs.Chosen(*given)
    )
    found = []
    for backend in ("reference", "torch"):
        out = attndsl.compile(bound, **sizes, backend=backend)(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, slope)])
    assert together == [2, 1, 1] * 2
    for mine, exact in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("how", ["max", "min"])
def test_a_bound_over_blocks_is_two_products(how: str) -> None:
    """As Quest's authors write it, entry by entry."""
    text = f"mask causal & topk(2, of = blocks(4, causal), by = sum({how}(Q * min(K), max(K) * Q)))"
    bound = attndsl.parse(f"attention a {{ {text} }}")["a"]
    (table,) = bound.attention.selected
    assert {node.op for node in ir.nodes(table.origin["by"])} >= {"inner"}
    assert "sum" not in {node.op for node in ir.nodes(table.origin["by"])}
    plan = attndsl.compile(bound, length=24, heads=2, head_dim=8, dtype="float64")
    q, k = (torch.randn(1, 2, 24, 8, dtype=torch.float64) for _ in range(2))
    pages = k.unflatten(2, (6, 4))
    ends = [q[:, :, :, None] * x[:, :, None] for x in (pages.amin(3), pages.amax(3))]
    scores = (torch.maximum if how == "max" else torch.minimum)(*ends).sum(-1)
    scores = scores.masked_fill(torch.arange(6) * 4 > torch.arange(24)[:, None], -torch.inf)
    chosen = plan.choices(q, k)[table.name]
    wanted = scores.topk(2).indices.where(scores.topk(2).values > -torch.inf, -1)
    assert torch.equal(chosen.sort(-1).values, wanted.sort(-1).values)


@pytest.mark.parametrize(
    "mask", ["topk(2, of = causal)", "causal & within(hash(4), last(2))", "causal & lsh(2, 4)"]
)
def test_a_batch_of_none_chooses_nothing(mask: str) -> None:
    bound = attndsl.parse(f"attention a {{ mask {mask} }}")["a"]
    plan = attndsl.compile(bound, length=16, heads=2, head_dim=8, training=True)
    q, k, v = (torch.zeros(0, 2, 5, 8, requires_grad=True) for _ in range(3))
    out = plan(q, k, v)
    assert out.shape == (0, 2, 5, 8)
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_inputs_of_a_choice_are_checked_before_it_is_made() -> None:
    text = "attention a { inputs mu : float[H, 4, D]  mask causal & within(nearest(mu), last(4)) }"
    plan, q = (
        attndsl.compile(attndsl.parse(text)["a"], length=8, heads=2, head_dim=8),
        torch.zeros(1, 2, 8, 8),
    )
    for shape in ((3, 4, 8), (2, 4, 6), (2, 5, 8)):
        with pytest.raises(attndsl.AttnError, match="`mu` has"):
            plan(q, q, q, mu=torch.zeros(shape))


@pytest.mark.parametrize("watched", [False, True])
def test_inputs_of_a_choice_are_checked_once(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; the mask reads one of them itself."""
    text = "inputs ids : int[B, n]  mask causal & documents(ids) & topk(4, of = causal & documents(ids))"
    bound = attndsl.parse(f"attention a {{ {text} }}")["a"]
    plan = attndsl.compile(bound, length=16, heads=4, kv_heads=2, head_dim=8, training=True)
    q, k, v = (x.float().requires_grad_() for x in vectors(16, seed=0))
    call = torch.compile(plan, backend="aot_eager") if watched else plan
    call(q, k, v, **given_to(bound, 16))
    checks, checked = [], lowering.checked_tables
    monkeypatch.setattr(lowering, "checked_tables", lambda *x, **y: checks.append(x) or checked(*x, **y))
    call(q, k, v, **given_to(bound, 16)).sum().backward()
    assert len(checks) == 1


def test_the_choice_is_part_of_what_is_predicted() -> None:
    bound = attndsl.parse("attention a { mask topk(8, of = causal) }")["a"]
    plan = attndsl.compile(bound, length=4096, heads=8)
    seconds = plan.considered["torch"]
    assert isinstance(seconds, float)
    assert 0.2 < seconds < 5


def test_labels_end() -> None:
    plan = attndsl.compile(attndsl.parse("attention a { mask causal & lsh(1, 1) }")["a"], length=2**15)
    q = torch.zeros(1, 1, 2**15, 64)
    with pytest.raises(attndsl.AttnError, match="labels end at 32,767"):
        plan.choices(q, q)
    text = "attention a { inputs mu : float[c, D]  mask causal & within(nearest(mu), last(4)) }"
    plan, q = attndsl.compile(attndsl.parse(text)["a"], length=8, head_dim=2), torch.zeros(1, 1, 8, 2)
    with pytest.raises(attndsl.AttnError, match="labels end at 32,767"):
        plan.choices(q, q, mu=torch.zeros(2**15 + 1, 2))


BAD = {
    "kind = 'lists'": "its `kind` is 'lists', and there are `labels`, `list`, `order`",
    "signature = None": "it has no method `signature`",
    "kind = None": "its `kind` is None",
    "def rounds(self, origin): return None": "`rounds` of the selection `{name}` gives None, not a number",
    "def rounds(self, origin): return 0": "`rounds` of the selection `{name}` gives 0, not a number",
    "def relates(self, origin): return 3": "`relates` gives 3, and there are no ranks",
    "def reads(self, origin): return None": "`reads` gives None, which is none of past, of, future",
    "def reads(self, origin): return 'some'": "`reads` gives 'some', which is none of past, of, future",
    "def counts(self, origin, problem): return None": "`counts` gives None, which is no mapping",
    "def counts(self, origin, problem): return {'products': 1}": "`counts` gives ['products'], and must give",
    "def counts(self, origin, problem): return {'products': -1, 'sorted': 0}": "gives -1 as `products`",
    "def counts(self, origin, problem): return {'products': 1, 'sorted': float('nan')}": "nan as `sorted`",
    "def counts(self, origin, problem): return {'products': '1', 'sorted': 0}": "which is no number",
    "def choose(self, origin, offered): return None": "`choose` of the selection `{name}` returned NoneType",
    "def choose(self, *a): return super().choose(*a).double()": "returned torch.float64[2, 4, 15, 3]",
    "def choose(self, *a): return super().choose(*a) > 0": "returned torch.bool[2, 4, 15, 3]",
    "def choose(self, *a): return super().choose(*a)[..., :1]": "returned torch.int64[2, 4, 15, 1]",
    "def choose(self, *a): return super().choose(*a).fill_(14)": "`choose` gives 14 twice in a row",
    "def choose(self, *a): return super().choose(*a) + 1": "`choose` gives 15, and there are 15",
    "def choose(self, *a): return super().choose(*a) - 2": "`choose` gives -2, and there are 15",
    "def choose(self, *a): return super().choose(*a).flip(2)": "which `of` does not hold",
    "def choose(self, *a): return super().choose(*a).index_fill(3, ZERO, -1)": "gives fewer than `of`",
    "def reference(self, origin, offered): return None": "`reference` of the selection `{name}` returned",
    "def reference(self, *a): return super().reference(*a).float()": "returned torch.float32[2, 4",
}
"""Lines of a `topk` of another party."""
BAD_ORDERS = {
    "def relates(self, origin): return None": "`relates` of the selection `{name}` gives None, not how ranks",
    "def reads(self, origin): return 'of'": "`reads` gives 'of', which is none of past, future",
    "def choose(self, *a): return super().choose(*a) * 0": "`choose` gives ranks of no order",
    "def choose(self, *a): return super().choose(*a) - 1": "`choose` gives ranks of no order",
}
BAD_LABELS = {
    "def choose(self, *a): return super().choose(*a) - 1": "gives -1, which is none of its labels",
    "def choose(self, *a): return super().choose(*a) + 2**15": "`choose` gives 327",
}


@pytest.mark.parametrize(
    ("base", "line", "said"),
    [
        (base, line, said)
        for base, lines in (("topk.TopK", BAD), ("lsh.Lsh", BAD_ORDERS), ("buckets.Hash", BAD_LABELS))
        for line, said in lines.items()
    ],
)
def test_the_suite_refuses_what_breaks_a_rule(register, base: str, line: str, said: str) -> None:
    """Where what chooses is the reference too."""
    module, _, parent = base.partition(".")
    name = register(
        f"import torch\nfrom attndsl.plugins.selections.{module} import {parent}\nZERO = torch.tensor([0])\n"
        f"class Mine({parent}):\n    {line}\n    {'reference = choose' * line.startswith('def choose')}\n"
        "selection = Mine()\n",
        "selections",
        ":selection",
    )
    mask = {"Lsh": f"{name}(2, 4)", "Hash": f"within({name}(4), full)"}.get(parent, f"{name}(3, of = causal)")
    with pytest.raises((AssertionError, attndsl.AttnError)) as found:
        check(f"mask causal & {mask}", 15)
    assert said.format(name=name) in str(found.value)
    assert name in str(found.value)


def test_a_claim_of_a_pattern_that_chooses_is_about_every_choice() -> None:
    text = """pattern p = topk(2, of = causal)  pattern w = within(hash(4), last(2))
        assert p <= causal  assert p == causal  assert last(1) <= w
        assert nnz(p | w, n = 8, heads = 2) < 36"""
    verdicts = [verdict for _, verdict in attndsl.parse(text).check()]
    assert [(verdict.status, verdict.reason) for verdict in verdicts] == [
        ("proved", ""),
        ("undecided", "it depends on what `topk` chooses"),
        ("proved", ""),
        ("undecided", "nnz is 16 to 128 at n = 8: it depends on what `hash` chooses and what `topk` chooses"),
    ]


def test_a_plan_takes_no_choice() -> None:
    plan = attndsl.compile(attndsl.parse("attention a { mask topk(2, of = causal) }")["a"], length=8, heads=1)
    q = torch.randn(1, 1, 8, 64)
    given = plan.choices(q, q)
    said = "`topk#0` is chosen at every call, and no input of `a`"
    for call in (
        lambda: plan.bind(**given),
        lambda: plan(q, q, q, **given),
        lambda: plan.choices(q, q, **given),
    ):
        with pytest.raises(attndsl.AttnError, match=said):
            call()


def test_a_name_that_two_register_takes_no_other_down(register) -> None:
    source = "from attndsl.plugins.selections.topk import TopK\nselection = TopK()\n"
    names = [register(source, "selections", ":selection") for _ in range(2)]
    for name in names:
        points = register.folder / f"{name}-0.1.dist-info" / "entry_points.txt"
        points.write_text(f"[attndsl.selections]\ntwin = {name}:selection\n")
    for mask in ("twin(2)", "causal & twin"):
        with pytest.raises(attndsl.AttnError) as found:
            attndsl.parse(f"attention a {{ mask {mask} }}")
        assert "`twin` is registered twice under attndsl.selections: by " in str(found.value)
        assert all(name in str(found.value) for name in names)
        assert "<text>:1:" in str(found.value)
    assert attndsl.parse("attention a { mask topk(2, of = causal) }")["a"].attention.selected
