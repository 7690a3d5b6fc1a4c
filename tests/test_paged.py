"""Keys and values in pages: rows give what they give alone, and what is not read may be anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from thin import thin
from torch import Tensor

import attndsl
from attndsl.errors import AttnError
from attndsl.tiles.lowering import mask_tables

HEADS, KV_HEADS, WIDTH, V_WIDTH, LENGTH = 4, 2, 8, 6, 96
TEXTS = {
    "causal": "mask causal",
    "alibi": "mask causal score alibi",
    "full": "mask full score s + 0.01 * k",
    "after": "mask { q, k : k >= q or k < 2 }",
    "last of all": "mask causal & last(5) | global([0, n - 1]) score s - 0.1 * n",
    "capped": "mask causal score softcap(2.0) norm softmax(sink = learn[H](0.5))",
    "window": "mask causal & last(7) score alibi",
    "sinks": "mask causal & (last(7) | sinks(3)) score alibi",
    "counted": "mask causal & last(9) + last(3)",
    "per head": "mask causal & (last(2 + 5 * h) | sinks(h)) decay 1.0 / (1 + q - k)",
    "strided": "mask strided(8)",
    "drawn": "mask random(5, seed = h, of = causal) | causal & last(3)",
    "none": "mask none",
    "some rows empty": "mask { q, k : q mod 2 == 0 and k < 3 and k <= q }",
    "documents": "inputs doc : int[B, n] mask causal & documents(doc)",
    "places in documents": "inputs doc : int[B, n] mask causal & within(doc, last(4)) score s - 0.1 * q",
    "biased": "inputs b : float[H, n] mask causal & last(12) score s + b[k]",
    "padded": "inputs pad : int[B] mask causal & { q, k : k >= pad }",
    "groups": "heads 0..1 { mask causal & last(4) } else { mask causal & (sinks(1) | last(9)) }",
    "linear": "mask causal score elu1(Q) @ elu1(K) norm linear",
}  # fmt: skip


def bound(text: str) -> Any:
    return attndsl.parse(f"attention a {{ {text} }}")["a"]


def plan_of(text: str, backend: str | None = None, **sizes: Any) -> Any:
    asked = {"length": LENGTH, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float64"}
    return attndsl.compile(bound(text), **{**asked, **sizes}, backend=backend)


class Served:
    """Rows of some lengths in pages in any order, amid NaN; `k` and `v` [B, H, n, D] hold their keys too."""

    def __init__(self, lens: Sequence[int], new: int, size: int, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        batch, most = len(lens), max(lens)
        self.lens, self.size = torch.tensor(lens, dtype=torch.int32), size
        self.q = drawn(batch, HEADS, new, WIDTH)
        self.k, self.v = drawn(batch, KV_HEADS, most, WIDTH), drawn(batch, KV_HEADS, most, V_WIDTH)
        pages = -(-most // size)
        numbers = torch.randperm(batch * pages + 3, generator=random)[: batch * pages]
        self.table = numbers.view(batch, pages).int()
        # of a tensor that holds pages of keys and of values by turns
        held = torch.full((batch * pages + 3, 2, size, KV_HEADS, WIDTH), torch.nan, dtype=torch.float64)
        self.pool = held[:, 0], held[:, 1, :, :, :V_WIDTH]
        for row, length in enumerate(lens):
            for at in range(length):
                page, entry = int(self.table[row, at // size]), at % size
                for pool, x in zip(self.pool, (self.k, self.v), strict=True):
                    pool[page, entry] = x[row, :, at]
        self.doc = torch.randint(0, 3, (batch, most), generator=random).sort(1).values
        self.bias, self.pad = drawn(HEADS, most), torch.arange(batch) % 3

    def tables(self, plan: Any, row: int | None = None) -> dict[str, Tensor]:
        """All of a call, or those of a row alone."""
        every = {"doc": self.doc, "b": self.bias, "pad": self.pad}
        if row is not None:
            n, here = int(self.lens[row]), slice(row, row + 1)
            every = {"doc": self.doc[here, :n], "b": self.bias[:, :n], "pad": self.pad[here]}
        return {table.name: every[table.name] for table in plan.attention.inputs}

    def paged(self, plan: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = plan.paged(
            self.q, self.pool, self.table, self.lens, return_lse=True, **self.tables(plan)
        )
        return found

    def alone(self, plan: Any) -> tuple[Tensor, Tensor]:
        """Of each row by itself, with its keys side by side."""
        new, found = self.q.shape[2], []
        for row, n in enumerate(self.lens.tolist()):
            here = slice(row, row + 1)
            if n == 0:
                found.append((torch.zeros(1, HEADS, new, V_WIDTH), torch.full((1, HEADS, new), -torch.inf)))
                continue
            k, v = (x[here, :, :n] for x in (self.k, self.v))
            more = self.tables(plan, row)
            found.append(plan(self.q[here], k, v, q_offset=n - new, return_lse=True, **more))
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs).to(self.q), torch.cat(lses).to(self.q)

    def forget(self, text: str) -> int:
        """Takes the pages away that hold no key that some query reads; how many they were."""
        plan, taken = plan_of(text), 0
        for row, n in enumerate(self.lens.tolist()):
            live, new = torch.zeros(self.table.shape[1] * self.size, dtype=torch.bool), self.q.shape[2]
            if n:
                read = {t.name for t in mask_tables(plan.attention)}
                tables = {name: x.numpy() for name, x in self.tables(plan, row).items() if name in read}
                mask = bound(text).mask(n, q_length=new, heads=HEADS, q_offset=n - new, **tables)
                live[:n] = torch.from_numpy(mask).flatten(0, -2).any(0)
            dead = ~live.view(-1, self.size).any(1)
            self.table[row, dead] = -1
            taken += int(dead.sum())
        return taken


def same(mine: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


BATCHES = ([37, 20, 0, 64], 1, 8), ([37, 37], 3, 5), ([5, 70, 33], 4, 16), ([96], 16, 96)
CASES = [
    *thin(product(TEXTS, range(len(BATCHES)), ("torch", "reference")), 13),
    *thin(product(TEXTS, range(len(BATCHES)), (None,)), len(TEXTS) * len(BATCHES)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_rows_give_what_they_give_alone(case: tuple[str, int, str | None]) -> None:
    """Also where pages of which no key is read have no number any more."""
    name, batch, backend = case
    text, (lens, new, size) = TEXTS[name], BATCHES[batch]
    plan, served = plan_of(text, backend), Served(lens, new, size)
    wanted = served.alone(plan)
    same(served.paged(plan), wanted)
    served.forget(text)
    same(served.paged(plan), wanted)


@pytest.mark.parametrize("name", ["full", "last of all"])
def test_a_row_ends_at_its_own_length(name: str) -> None:
    plan, served = plan_of(TEXTS[name], "torch"), Served([30, 17, 9], 2, 8)
    same(served.paged(plan), served.alone(plan))


def test_pages_outside_a_window_may_be_given_to_others() -> None:
    served = Served([96, 40], 1, 8)
    assert served.forget(TEXTS["sinks"]) == 10 + 10
    assert (served.table >= 0).sum(1).tolist() == [2, 2]


def test_what_is_read_and_is_not_finite_is_not_hidden() -> None:
    """One row and the heads that share its key."""
    plan, served = plan_of(TEXTS["window"]), Served([50, 40], 2, 8)
    served.pool[1][int(served.table[0, 49 // 8]), 49 % 8, 1] = torch.nan
    out, _ = served.paged(plan)
    lost = out.isnan().any(-1)
    assert lost[0, 2:, 1].all()
    assert lost.sum() == 2


def test_pools_of_other_layouts_and_tables_of_longs() -> None:
    plan, served = plan_of(TEXTS["sinks"]), Served([50, 40], 1, 8)
    wanted = served.paged(plan)
    k, v = (x.transpose(1, 2).contiguous() for x in served.pool)
    table, lens = served.table.long(), served.lens.long()
    found = plan.paged(served.q, (k.transpose(1, 2), v.transpose(1, 2)), table, lens, return_lse=True)
    same(found, wanted)
    assert torch.equal(plan.paged(served.q, served.pool, served.table, served.lens), wanted[0])


def test_parameters_are_those_of_the_module() -> None:
    served, text = Served([50, 40], 1, 8), TEXTS["capped"]
    plan, trained = plan_of(text), plan_of(text, training=True).module()
    first = served.paged(plan)[0]
    with torch.no_grad():
        (name,) = dict(trained.named_parameters())
        getattr(trained, name).add_(1.0)
    given = served.q, served.pool, served.table, served.lens
    assert (trained.paged(*given) - first).abs().max() > 1e-3
    same([trained.paged(*given)], [plan.paged(*given, learned=dict(trained.state_dict()))])
    with pytest.raises(AttnError, match="does not train"):
        trained.plan.paged(*given)


SUM = """
attention near { mask causal & last(7)  score alibi }
attention far { mask causal & sinks(9) }
attention a(g = learn[H](0.8)) { inputs w : float[n] } = g * near - (w[q] + n / 100) * far
"""


def test_a_sum_adds_what_its_parts_give() -> None:
    """With gates that depend on where queries stand and on the length of the row."""
    attention = attndsl.parse(SUM)["a"]
    sizes = {"length": LENGTH, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float64"}
    module = attndsl.compile(attention, **sizes).module()
    plan, served, w = module.plan, Served([50, 33, 0], 2, 8), torch.linspace(0, 2, 50, dtype=torch.float64)
    mine = module.paged(served.q, served.pool, served.table, served.lens, w=w)
    learned = dict(module.state_dict())
    for row, n in enumerate([50, 33]):
        q, k, v = served.q[row, None], served.k[row, None, :, :n], served.v[row, None, :, :n]
        wanted = plan(q, k, v, q_offset=n - 2, w=w[:n], learned=learned)
        same([mine[row, None]], [wanted])
    assert not mine[2].any()
    with pytest.raises(AttnError, match="in `near`: `lens` is"):
        plan.paged(served.q, served.pool, served.table, served.lens[:2], w=w, learned=learned)
    with pytest.raises(AttnError, match="has no input `far`"):
        plan.paged(served.q, served.pool, served.table, served.lens, w=w, far=(served.q,) * 3)


def test_rows_without_tokens_or_any_row() -> None:
    plan = plan_of("mask causal")
    served = Served([0, 0, 9], 1, 4)
    pool, table = served.pool, served.table
    out, lse = plan.paged(served.q[:2], pool, table[:2] - 100, served.lens[:2], return_lse=True)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert plan.paged(served.q[:0], pool, table[:0], served.lens[:0]).shape == (0, HEADS, 1, V_WIDTH)


def test_autocast_takes_pools_in_its_dtype() -> None:
    plan, served = plan_of("mask causal", dtype="float32"), Served([50, 40], 1, 8)
    pool = tuple([x.bfloat16() for x in served.pool])
    with torch.autocast("cpu", torch.bfloat16):
        out = plan.paged(served.q.float(), pool, served.table, served.lens)
        with pytest.raises(AttnError, match="`k_pool` is float64 on cpu, and `q` is bfloat16"):
            plan.paged(served.q.float(), served.pool, served.table, served.lens)
    assert out.dtype == torch.bfloat16


class Decoding(torch.nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *given: Any) -> Any:
        return self.attention.paged(*given)


@pytest.mark.slow
def test_compiled_graphs_see_one_operator() -> None:
    """Which reads the lengths itself."""
    served, plan = Served([30, 17], 1, 8), plan_of(TEXTS["capped"], "torch").module()
    given = served.q, served.pool, served.table

    def twice(lens: Tensor) -> Tensor:
        return 2 * plan.paged(*given, lens)  # type: ignore[no-any-return]

    compiled = torch.compile(twice, backend="eager", fullgraph=True)
    with torch.no_grad():
        for lens in (served.lens, served.lens - 1):
            assert torch.equal(compiled(lens), twice(lens))
        exported = torch.export.export(Decoding(plan), (*given, served.lens)).module()
        assert torch.equal(exported(*given, served.lens - 1), plan.paged(*given, served.lens - 1))
    lowered = plan.plan.lowered
    tensors = lowered.tensors(plan.plan._given(served.q, plan._learned(), {}))
    flat = served.q, *served.pool, served.table, served.lens, tensors, lowered.identity
    with torch.no_grad():
        torch.library.opcheck(torch.ops.attndsl.attend_paged, flat)


REFUSED = {
    "`q` has 17 tokens of a row": {"q": torch.zeros(2, HEADS, 17, WIDTH, dtype=torch.float64)},
    "`q` has 3 heads": {"q": torch.zeros(2, 3, 1, WIDTH, dtype=torch.float64)},
    "pass `pool.unbind(1)`": {"pool": torch.zeros(4, 2, 8, KV_HEADS, WIDTH)},
    "pass `pool.unbind(0)`": {"pool": torch.zeros(2, 4, 8, KV_HEADS, WIDTH)},
    "pass `k_pool.transpose(1, 2)`": {"pool": torch.zeros(2, 4, KV_HEADS, 8, WIDTH).unbind()},
    "`v_pool` must be a torch tensor": {"pool": (torch.zeros(4, 8, KV_HEADS, WIDTH).double(), None)},
    "`k_pool` is float32": {"pool": torch.zeros(2, 4, 8, KV_HEADS, WIDTH).unbind()},
    "`block_table` is [7, 2]": {"block_table": torch.zeros(7, 2, dtype=torch.int32)},
    "`block_table` is float32": {"block_table": torch.zeros(2, 2)},
    "`block_table[1, 3]` is 15, and the pool has 15 pages": {"block_table": 15},
    "`block_table[1, 3]` is -1": {"block_table": -1},
    "`lens` is [3]": {"lens": torch.tensor([1, 2, 3])},
    "`lens` must be a torch tensor": {"lens": [5, 6]},
    "row 1 has 49 tokens, and its 6 pages hold 48": {"lens": torch.tensor([3, 49])},
    "row 0 has -1 tokens in `lens`": {"lens": torch.tensor([-1, 4])},
    "has no input `doc`": {"doc": torch.zeros(2, 48)},
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused(said: str) -> None:
    served, change = Served([44, 40], 1, 8), dict(REFUSED[said])
    given = {"q": served.q, "pool": served.pool, "block_table": served.table, "lens": served.lens}
    if isinstance(number := change.get("block_table"), int):
        change["block_table"] = served.table.clone()
        change["block_table"][1, 3] = number
    with pytest.raises(AttnError, match=re.escape(said)):
        plan_of("mask causal").paged(**{**given, **change})


def test_queries_before_the_first_token_and_tokens_beyond_the_plan_are_refused() -> None:
    served = Served([44, 2], 2, 8)
    served.lens[1] = 1
    with pytest.raises(AttnError, match="row 1 has 1 token in `lens`, and 2 queries in `q`"):
        served.paged(plan_of("mask causal"))
    with pytest.raises(AttnError, match="row 0 has 44 tokens, and the plan serves up to 40"):
        served.paged(plan_of("mask causal", length=40))


def test_a_table_over_n_has_the_length_of_the_longest_row() -> None:
    plan, served = plan_of(TEXTS["documents"]), Served([44, 40], 1, 8)
    for n in (40, 43, 45):
        with pytest.raises(AttnError, match=f"`doc` has {n} entries"):
            plan.paged(
                served.q, served.pool, served.table, served.lens, doc=torch.zeros(2, n, dtype=torch.int64)
            )


UNSERVED = {
    "chooses keys by what all of them hold": "mask causal & topk(4)",
    "are made of tokens": "keys mem(4) ++ tokens mask causal",
    "computed of all tokens at once": "mask full approx shen",
    "the table `lens` has the name of an argument": "inputs lens : int[B] mask causal & { q, k : k < lens }",
}


@pytest.mark.parametrize("said", UNSERVED)
def test_what_pages_do_not_say_is_refused(said: str) -> None:
    served = Served([44, 40], 1, 8)
    with pytest.raises(AttnError, match=re.escape(said)):
        plan_of(UNSERVED[said]).paged(served.q, served.pool, served.table, served.lens)


def test_gradients_are_refused() -> None:
    served = Served([44, 40], 1, 8)
    served.q.requires_grad_()
    with pytest.raises(AttnError, match="attention to pages has no gradients"):
        served.paged(plan_of("mask causal"))
    with torch.no_grad():
        assert not served.paged(plan_of("mask causal"))[0].requires_grad
