"""Sessions: whatever was cached, reordered and truncated, a row gives what its sequence gives alone."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from test_docs import DOCS
from thin import thin
from torch import Tensor

import attndsl
from attndsl.analysis.lasting import kept
from attndsl.backend import Problem
from attndsl.execution import statesession
from attndsl.execution.session import Session
from attndsl.execution.streamsession import StreamSession

HEADS, KV_HEADS, WIDTH, V_WIDTH, LENGTH = 4, 2, 8, 6, 96
TEXTS = {
    "causal": "mask causal",
    "alibi": "mask causal score alibi",
    "capped": "mask causal score softcap(2.0) norm softmax(sink = learn[H](0.5))",
    "twice": "mask causal + last(9)",
    "drawn": "mask random(5, seed = h, of = causal) | causal & last(3)",
    "per head": "mask causal & (last(5 + 20 * h) | sinks(2)) decay 1.0 / (1 + q - k)",
    "strided": "mask strided(8)",
    "documents": "inputs doc : int[B, n] mask causal & documents(doc)",
    "places in documents": "inputs doc : int[B, n] mask causal & within(doc, last(4)) score s - 0.1 * q",
    "biased": "inputs b : float[H, n] mask causal & last(12) score s + b[k]",
    "padded": "inputs pad : int[B] mask causal & { q, k : k >= pad }",
    "window": "mask causal & last(7)",
    "sinks": "mask causal & (last(7) | sinks(3)) score alibi",
    "awaited": "mask causal & last(3) | { q, k : k == 5 and q >= 20 } score s + 0.1 * k",
    "chunks": "mask causal & block(8)",
    "padded sinks": "inputs pad : int[B] mask causal & (last(6) | sinks(2)) & { q, k : k >= pad }",
    "groups": "heads 0..1 { mask causal & last(4) } else { mask causal & (sinks(1) | last(9)) }",
    "drawn window": "mask causal & last(8) & (random(3, of = causal) | last(2))",
}  # fmt: skip
STATES = {
    "elu": "mask causal  score elu1(Q) @ elu1(K)  norm linear",
    "retnet": "mask causal  score Q @ K  decay (1 - 2.0 ** (-5 - h)) ** (q - k)  norm none",
    "favor": "mask causal  score favor(Q, orthogonal(12)) @ favor(3 * K, orthogonal(12))  norm linear",
    "every other": "mask causal & { q, k : k mod 2 == 1 }  score elu1(Q) @ elu1(K)  norm linear",
    "padded": "inputs pad : int[B]  mask causal & { q, k : k >= pad }  score elu1(Q) @ exp(K)  norm linear",
    "learned": "mask causal  score elu1(Q) @ elu1(K) * sigmoid(0.01 * k)  decay 0.3 ** (q - k)  norm linear",
}
STREAMS = {
    "xl": "keys mem(9) ++ tokens  mask causal  score s - 0.1 * (q - k)",
    "held window": "keys mem(4) ++ tokens  mask causal & last(6)",
    "best held": "keys mem(7) ++ tokens  mask causal & ({ q, k : k >= 0 } | topk(2, of = { q, k : k < 0 }))",
    "memory alone": "keys mem(5)  mask topk(2, of = { q, k : k < 0 })",
    "compressive": "keys pool(3, of = mem(12)) ++ mem(5) ++ tokens  mask causal",
    "compressed": "keys pool(6, stride = 4)  mask causal",
    "greatest": "keys pool(3, by = max)  mask causal & last(20)",
    "pooled": "keys mem(3) ++ tokens ++ pool(4)"
    "  mask causal & { q, k : stream == 0 or stream == 2 or q // 4 == k // 4 }  score s + 0.1 * stream",
    "pools first": "keys pool(3) ++ pool(5, stride = 2) ++ tokens"
    "  mask causal & { q, k : stream < 2 or q - k < 3 }",
    "learned pools": "keys pool(3, by = learn[H, 3, D], values = learn[3])  mask causal",
    "mixed": "keys tokens ++ pool(2, by = learn[2, D, D], values = mean)  mask causal & last(9)",
    "documents of streams": "inputs doc : int[B, n]  keys mem(4) ++ tokens"
    "  mask causal & { q, k : stream == 0 or doc[q] == doc[k] }",
    "documents of slots": "inputs doc : int[B, n]  keys pool(4, stride = 2)"
    "  mask causal & { q, k : doc[q] == doc[k] }",
    "padded slots": "inputs pad : int[B]  keys mem(2) ++ tokens ++ pool(3)"
    "  mask causal & { q, k : k >= pad - 1 }",
}  # fmt: skip
ROLLING = {
    "per head": (2, 65),
    "window": (0, 7),
    "sinks": (3, 7),
    "awaited": (6, 3),
    "chunks": (0, 8),
    "padded sinks": (2, 6),
    "groups": (1, 9),
    "drawn window": (0, 8),
}
REWIND = 4
ROWS = 2


def bound(text: str) -> Any:
    return attndsl.parse(f"attention a {{ {text} }}")["a"]


def compiled(text: str, backend: str | None = None, dtype: str = "float64", length: int = LENGTH) -> Any:
    sizes = {"length": length, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": dtype}
    try:
        return attndsl.compile(bound(text), **sizes, backend=backend, block_size=16)
    except attndsl.AttnError as error:
        pytest.skip(str(error))


class Alone:
    """The sequences of a batch, kept whole, and what each gives without a cache."""

    def __init__(self, plan: Any, batch: int, dtype: torch.dtype = torch.float64) -> None:
        self.plan, self.dtype = plan, dtype
        empty = [torch.zeros(heads, 0, width, dtype=dtype) for heads, width in SHAPES]
        self.rows = [[*empty, []] for _ in range(batch)]
        self.bias = torch.from_numpy(np.random.default_rng(0).normal(size=(HEADS, LENGTH)))
        generator, held = torch.Generator().manual_seed(7), plan.attention.held
        self.memory = drawn(generator, batch, held, dtype)[1:] if held else None

    @property
    def lengths(self) -> list[int]:
        return [len(row[3]) for row in self.rows]

    def add(self, new: list[Tensor], documents: list[list[int]], counts: list[int]) -> None:
        for b, count in enumerate(counts):
            row = self.rows[b]
            grown = [torch.cat([x, y[b, :, :count]], 1) for x, y in zip(row[:3], new, strict=True)]
            self.rows[b] = [*grown, row[3] + documents[b][:count]]

    def truncate(self, lengths: list[int]) -> None:
        self.rows = [
            [*(x[:, :n] for x in row[:3]), row[3][:n]] for row, n in zip(self.rows, lengths, strict=True)
        ]

    def reorder(self, chosen: list[int]) -> None:
        self.rows = [self.rows[b] for b in chosen]
        self.memory = self.memory and [x[chosen] for x in self.memory]

    def tables(self, rows: list[int], n: int) -> dict[str, Tensor]:
        """Of these rows, as long as the longest; what stands behind a row is of no document."""
        docs = torch.tensor([self.rows[b][3] + [-1] * (n - len(self.rows[b][3])) for b in rows])
        every = {"doc": docs.view(len(rows), n), "b": self.bias[:, :n]}
        every["pad"] = torch.tensor([b % 2 * 4 for b in rows])
        return {table.name: every[table.name] for table in self.plan.attention.inputs}

    def given(self, b: int) -> Tensor:
        """[H, n, Dv]"""
        q, k, v, docs = self.rows[b]
        held = self.memory and [x[b : b + 1] for x in self.memory]
        more = {**self.tables([b], len(docs)), **({"memory": held} if held else {})}
        return self.plan(q[None], k[None], v[None], **more)[0]  # type: ignore[no-any-return]


SHAPES = ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, V_WIDTH))


def drawn(generator: torch.Generator, batch: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(batch, h, size, d, generator=generator, dtype=torch.float64).to(dtype) for h, d in SHAPES
    ]


def session_of(plan: Any, batch: int, dirty: bool = False) -> Session:
    made: Session = plan.session(batch, LENGTH, rewind=REWIND, v_dim=V_WIDTH)
    if dirty:
        made.k.fill_(torch.nan)
        made.v.fill_(torch.nan)
    return made


def close(found: Tensor, expected: Tensor) -> None:
    loose = {} if found.dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found, expected, **loose)  # type: ignore[arg-type]


def grow(
    s: Session, alone: Alone, random: Random, generator: torch.Generator, size: int, ragged: bool
) -> None:
    batch = len(alone.rows)
    new = drawn(generator, batch, size, alone.dtype)
    counts = [random.randint(0, size) for _ in range(batch)] if ragged else [size] * batch
    documents = [sorted(random.randint(n // 9, n // 9 + 1) for _ in range(size)) for n in alone.lengths]
    alone.add(new, documents, counts)
    tables = alone.tables(list(range(batch)), max(alone.lengths))
    if ragged:
        for b, count in enumerate(counts):
            for x in new:
                x[b, :, count:] = torch.nan
    call: dict[str, Any] = {"tokens": counts} if ragged else {}
    out = s.step(*new, **call, **tables) if size <= REWIND else s.prefill(*new, chunk=7, **call, **tables)
    assert list(s.lengths) == alone.lengths
    for b, count in enumerate(counts):
        if count:
            close(out[b, :, :count], alone.given(b)[:, -count:])
        assert not out[b, :, count:].any()


def furthest_back(s: Session, b: int) -> int:
    """The least length that row b goes back to."""
    return 0 if not s.ring or s.reached[b] <= s.slots else min(s.lengths[b], s.reached[b] - s.rewind)


CASES = [(name, (i + j) % 3) for i, name in enumerate(TEXTS) for j in range(2)]


@pytest.mark.parametrize("case", thin(CASES, 2), ids=lambda case: f"{case[0]}-{case[1]}")
def test_rows_give_what_their_sequences_give_alone(case: tuple[str, int]) -> None:
    name, seed = case
    random, generator = Random(f"{name} {seed}"), torch.Generator().manual_seed(seed)
    plan = compiled(TEXTS[name], ("reference", "torch", None)[seed])
    s, alone = session_of(plan, ROWS, dirty=seed > 0), Alone(plan, ROWS)
    assert (s.ring > 0) == (name in ROLLING)
    while max(alone.lengths) < LENGTH - 20:
        grow(s, alone, random, generator, random.choice([1, 1, 2, 4, 5, 15]), ragged=random.random() < 0.4)
        deed = random.choice(["truncate", "reorder", "copy", "", ""])
        if deed == "truncate":
            lengths = [random.randint(max(n - 4, furthest_back(s, b)), n) for b, n in enumerate(s.lengths)]
            s.truncate(lengths)
            alone.truncate(lengths)
        elif deed == "reorder" and "pad" not in TEXTS[name]:
            rows = [random.randrange(ROWS) for _ in range(ROWS)]
            s.reorder(torch.tensor(rows))
            alone.reorder(rows)
        elif deed == "copy":
            other = s.copy()
            s.k.fill_(torch.nan)
            s.v.fill_(torch.nan)
            s = other
    assert s.slots == (sum(ROLLING[name]) - 1 + REWIND if name in ROLLING else LENGTH)


@pytest.mark.parametrize("name", thin(STREAMS, 2))
def test_rows_of_streams_give_what_their_sequences_give_alone(name: str) -> None:
    random, generator = Random(name), torch.Generator().manual_seed(0)
    plan = compiled(STREAMS[name], ("reference", "torch", None)[len(name) % 3])
    alone = Alone(plan, ROWS)
    s = plan.session(ROWS, LENGTH, rewind=REWIND, v_dim=V_WIDTH, memory=alone.memory)
    assert isinstance(s, StreamSession)
    s.k.fill_(torch.nan)
    s.v.fill_(torch.nan)
    while max(alone.lengths) < LENGTH - 20:
        grow(s, alone, random, generator, random.choice([1, 1, 2, 4, 5, 15]), ragged=random.random() < 0.4)
        deed = random.choice(["truncate", "start anew", "reorder", "copy", "", ""])
        if deed == "truncate":
            lengths = [random.randint(max(n - 4, furthest_back(s, b)), n) for b, n in enumerate(s.lengths)]
            s.truncate(lengths)
            alone.truncate(lengths)
        elif deed == "start anew" and max(s.lengths) > 40:
            s.truncate([0, *s.lengths[1:]])
            alone.truncate([0, *alone.lengths[1:]])
        elif deed == "reorder" and "pad" not in STREAMS[name]:
            rows = [random.randrange(ROWS) for _ in range(ROWS)]
            s.reorder(torch.tensor(rows))
            alone.reorder(rows)
        elif deed == "copy":
            other = s.copy()
            for x in (s.k, s.v, *s.entries):
                x.fill_(torch.nan)
            s = other
    row = max(range(ROWS), key=lambda b: s.reached[b])
    back = s.reached[row] - REWIND
    lengths = [back - 1 if b == row else n for b, n in enumerate(s.lengths)]
    if s.ring:
        with pytest.raises(attndsl.AttnError, match=f"goes back to {back}, not to {back - 1}"):
            s.truncate(lengths)
    else:
        s.truncate(lengths)
        alone.truncate(lengths)
        grow(s, alone, random, generator, 5, ragged=False)


@pytest.mark.parametrize("name", ["compressed", "pooled", "pools first"])
def test_slots_are_made_again_where_a_draft_is_taken_back(name: str) -> None:
    """As far back as it goes, at every place in a slot."""
    plan, new = compiled(STREAMS[name]), drawn(torch.Generator().manual_seed(0), 2, 40, torch.float64)
    memory = Alone(plan, 2).memory
    wanted = plan(*new, memory=memory)
    for start in range(8, 22):
        s = plan.session(2, LENGTH, rewind=REWIND, v_dim=V_WIDTH, memory=memory)
        s.prefill(*(x[:, :, :start] for x in new))
        s.step(*(x[:, :, :REWIND] for x in new))
        s.truncate(start)
        close(s.step(*(x[:, :, start:] for x in new)), wanted[:, :, start:])


def test_a_session_of_pools_holds_slots_and_the_tokens_of_the_next() -> None:
    plan = compiled(STREAMS["compressed"], length=400)
    s = plan.session(2, 400, rewind=3)
    assert s.k.shape == s.v.shape == (2, KV_HEADS, 6 - 1 + 3, WIDTH)
    assert [x.shape for x in s.entries] == [(2, KV_HEADS, (400 - 6) // 4 + 1, WIDTH)] * 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("keys proj(learn[4, n])", "`E` makes keys of all tokens, later ones too"),
        ("keys pool(4)", "it is not proved that no query reads a key after it"),
        ("keys tokens ++ pool(4) mask { q, k : stream == 1 or k <= q }", "it is not proved that no query"),
        ("keys pool(4) mask causal & { q, k : k >= n - 9 }", "it is not proved that its mask stays"),
        ("keys pool(4) mask causal score s + 0.1 * (n - k)", "its scores depend on `n`"),
        ("keys mem(4) ++ tokens mask { q, k : k < 4 - n or k == q }", "it is not proved that its mask stays"),
        (
            "inputs R : bool[n, n] keys pool(4) mask causal & { q, k : R[q, k + 4] }",
            "an entry of `R` is read",
        ),
        (
            "inputs d : int[n] keys tokens ++ pool(4) mask causal & { q, k : d[k] == d[q] }",
            "its tables tell of",
        ),
        ("keys mem(4) ++ tokens mask causal & topk(3)", "what `topk` chooses may change with later tokens"),
    ],
)
def test_sessions_of_streams_are_refused_where_keys_do_not_last(text: str, why: str) -> None:
    plan = compiled(text)
    held = plan.attention.held
    memory = [torch.zeros(1, KV_HEADS, held, WIDTH, dtype=torch.float64)] * 2 if held else None
    with pytest.raises(attndsl.AttnError) as caught:
        plan.session(1, LENGTH, memory=memory)
    one_diagnostic(caught, f"`a` has no sessions: {why}")


@pytest.mark.parametrize("held", [3, 64])
@pytest.mark.parametrize("name", thin(STATES, 2))
def test_rows_with_a_state_give_what_their_sequences_give_alone(monkeypatch, name: str, held: int) -> None:
    monkeypatch.setattr(statesession, "HELD", held)
    random, generator = Random(f"{name} {held}"), torch.Generator().manual_seed(held)
    plan = compiled(STATES[name], "linear")
    s, alone = session_of(plan, ROWS), Alone(plan, ROWS)
    assert isinstance(s, statesession.StateSession)
    while max(alone.lengths) < LENGTH - 20:
        grow(s, alone, random, generator, random.choice([1, 1, 2, 4, 5, 15]), ragged=random.random() < 0.4)
        assert s.k.shape[2] <= s.slots == REWIND + held
        assert all(
            taken in range(most - REWIND + 1) or not taken
            for most, taken in zip(s.reached, s.taken, strict=True)
        )
        deed = random.choice(["truncate", "start anew", "reorder", "copy", "", ""])
        if deed == "truncate":
            lengths = [random.randint(max(n - 4, s.taken[b]), n) for b, n in enumerate(s.lengths)]
            s.truncate(lengths)
            alone.truncate(lengths)
        elif deed == "start anew" and max(s.lengths) > 40:
            lengths = [0, *s.lengths[1:]]
            s.truncate(lengths)
            alone.truncate(lengths)
        elif deed == "reorder" and "pad" not in STATES[name]:
            rows = [random.randrange(ROWS) for _ in range(ROWS)]
            s.reorder(torch.tensor(rows))
            alone.reorder(rows)
        elif deed == "copy":
            other = s.copy()
            s.step(*drawn(generator, ROWS, 1, torch.float64), **alone.tables([*range(ROWS)], LENGTH))
            s = other
    most = max(s.taken)
    row = s.taken.index(most)
    with pytest.raises(attndsl.AttnError, match=f"and goes back to {most}, not to 1"):
        s.truncate([1 if b == row else n for b, n in enumerate(s.lengths)])


def test_a_token_whose_features_overflow_spoils_no_row_before_it() -> None:
    text = "mask causal score concat(exp(Q), exp(-Q)) @ concat(exp(K), exp(-K)) norm linear"
    plan = compiled(text, "linear", dtype="float32")
    q, k, v = drawn(torch.Generator().manual_seed(0), 1, 40, torch.float32)
    k[:, :, 30] = 100
    found = session_of(plan, 1).prefill(q, k, v)
    assert found[:, :, 30:].isnan().all()
    torch.testing.assert_close(found, plan(q, k, v), equal_nan=True)


def test_a_step_with_a_state_is_as_quick_at_any_length() -> None:
    """Counted in keys that a step meets."""
    plan = compiled(STATES["elu"], "linear", length=400)
    s, met = plan.session(1, 400, v_dim=V_WIDTH), []
    s.prefill(*drawn(torch.Generator(), 1, 300, torch.float64))
    for _ in range(150):
        s.step(*drawn(torch.Generator(), 1, 1, torch.float64))
        met.append(s.k.shape[2])
    assert max(met) <= s.slots == 33
    assert [x.numel() for x in s.state] == [HEADS * WIDTH * V_WIDTH, HEADS * WIDTH, HEADS]


@pytest.mark.parametrize(
    "clauses",
    [
        "score elu1(w * Q) @ elu1(K)  decay sigmoid(slope) ** (q - k)  norm linear",
        "score s - slope * (q - k)",
    ],
)
def test_a_session_of_a_module_steps_with_its_parameters(clauses: str) -> None:
    text = f"let w = learn[D](1.0) let slope = learn[H](0.1) attention a {{ mask causal {clauses} }}"
    sizes = {"length": 96, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float64"}
    module = attndsl.compile(attndsl.parse(text)["a"], **sizes, training=True).module()
    new = drawn(torch.Generator().manual_seed(0), 1, 90, torch.float64)
    for x in module.parameters():
        x.data += 0.7
    s = module.session(1, 96, v_dim=V_WIDTH)
    with torch.no_grad():
        found = torch.cat([s.step(*(x[:, :, i : i + 1] for x in new)) for i in range(90)], 2)
        close(found, module(*new))


NO_GRADIENTS = {
    "cache": "mask causal  score s - slope * (q - k)",
    "state": "mask causal  score elu1(w * Q) @ elu1(K)  norm linear",
    "streams": "keys pool(4)  mask causal  score slope * s",
}


@pytest.mark.parametrize("clauses", [*NO_GRADIENTS.values(), "sum"], ids=[*NO_GRADIENTS, "sum"])
def test_steps_have_no_gradients(clauses: str) -> None:
    """Neither of a module's parameters where gradients are followed, nor of a tensor that asks for them."""
    text = "let w = learn[D](1.0) let slope = learn[H](0.1) "
    text += f"attention a {{ {'mask causal' if clauses == 'sum' else clauses} }}"
    if clauses == "sum":
        text += " attention b { mask causal score s * slope } attention c(g = learn[2]) = g[0] * a + g[1] * b"
    sizes = {"length": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float64"}
    name = "c" if clauses == "sum" else "a"
    module = attndsl.compile(attndsl.parse(text)[name], **sizes, training=True).module()
    assert all(x.requires_grad for x in module.parameters())
    s = module.session(1, 32)
    new = [torch.randn(1, heads, 12, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    assert not s.prefill(*new).requires_grad
    assert not s.step(*(x[:, :, :1] for x in new)).requires_grad
    assert module(*new).requires_grad
    with pytest.raises(attndsl.AttnError, match="no gradients"):
        s.step(new[0].requires_grad_(), *new[1:])


def test_a_table_that_asks_for_gradients_is_refused() -> None:
    s = compiled("inputs g : float[B, H, n]  mask causal  score s  decay g[k]").session(1, LENGTH)
    new = drawn(torch.Generator(), 1, 5, torch.float64)
    new = [new[0], new[1], torch.randn(1, 2, 5, 8, dtype=torch.float64)]
    with pytest.raises(attndsl.AttnError, match="no gradients"):
        s.step(*new, g=torch.ones(1, 4, 5, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("name", ["causal", "sinks", "documents", "drawn", "per head"])
def test_outputs_last(name: str) -> None:
    """What steps gave is what the finished sequence gives."""
    plan, generator = compiled(TEXTS[name]), torch.Generator().manual_seed(0)
    alone = Alone(plan, 1)
    new = drawn(generator, 1, 40, torch.float64)
    alone.add(new, [[i // 11 for i in range(40)]], [40])
    s = session_of(plan, 1)
    out = []
    for i in range(40):
        tables = {name: x[..., : i + 1] for name, x in alone.tables([0], 40).items()}
        out.append(s.step(*(x[:, :, i : i + 1] for x in new), **tables)[0])
    close(torch.cat(out, 1), alone.given(0))


@pytest.mark.parametrize("name", ["causal", "sinks", "alibi"])
def test_bfloat16(name: str) -> None:
    plan = compiled(TEXTS[name], dtype="bfloat16")
    s, alone = session_of(plan, 2), Alone(plan, 2, torch.bfloat16)
    random, generator = Random(0), torch.Generator().manual_seed(0)
    for size in (15, 1, 1, 4, 1):
        grow(s, alone, random, generator, size, ragged=size == 4)


def test_autocast_is_that_of_the_cache() -> None:
    plan, new = compiled(TEXTS["sinks"], dtype="float32"), drawn(torch.Generator(), 1, 20, torch.float32)
    s = plan.session(1, LENGTH, v_dim=V_WIDTH, dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = s.prefill(*new, chunk=3), plan(*new)
        with pytest.raises(attndsl.AttnError) as caught:
            session_of(plan, 1).prefill(*new)
    one_diagnostic(caught, "autocast asks for torch.bfloat16, and the session holds torch.float32")
    assert found.dtype == expected.dtype == torch.bfloat16
    close(found, expected)


VOCABULARY, DIM = 11, 24


class Model:
    """A language model of one layer: random embeddings, projections and positions."""

    def __init__(self, text: str) -> None:
        g = torch.Generator().manual_seed(3)
        self.plan = compiled(text)

        def made(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.tokens, self.places = made(VOCABULARY, DIM), made(LENGTH, DIM)
        self.projections = [made(DIM, heads, width) / 4 for heads, width in SHAPES]
        self.out = made(HEADS * V_WIDTH, VOCABULARY)

    def qkv(self, tokens: Tensor, starts: list[int]) -> list[Tensor]:
        at = torch.tensor(starts)[:, None] + torch.arange(tokens.shape[1])
        x = self.tokens[tokens] + self.places[at]
        return [torch.einsum("bnc,chd->bhnd", x, w) for w in self.projections]

    def logits(self, attended: Tensor) -> Tensor:
        """[B, n, vocabulary]"""
        return (attended.transpose(1, 2).flatten(2) @ self.out).log_softmax(-1)

    def alone(self, tokens: list[int]) -> Tensor:
        return self.logits(self.plan(*self.qkv(torch.tensor([tokens]), [0])))[0]

    def cached(self, s: Session, tokens: Tensor) -> Tensor:
        return self.logits(s.step(*self.qkv(tokens, list(s.lengths))))


MODELS = {"causal": "mask causal score alibi", "window with sinks": TEXTS["sinks"]}


@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS)
def test_beam_search(text: str) -> None:
    model, prompt, beams, steps = Model(text), [1, 5, 2, 7, 7], 3, 20
    expected: list[tuple[float, list[int]]] = [(0.0, prompt)]
    for _ in range(steps):
        scored = [
            (score + float(more), [*tokens, token])
            for score, tokens in expected
            for token, more in enumerate(model.alone(tokens)[-1])
        ]
        expected = sorted(scored, reverse=True)[:beams]

    s = session_of(model.plan, 1)
    logits = model.cached(s, torch.tensor([prompt]))[:, -1]
    found = torch.tensor([prompt])
    total, most = torch.zeros(1, dtype=torch.float64), []
    for _ in range(steps):
        total, best = (total[:, None] + logits).flatten().topk(beams)
        rows, token = best // VOCABULARY, best % VOCABULARY
        most.append(rows)
        found = torch.cat([found[rows], token[:, None]], 1)
        s.reorder(rows)
        logits = model.cached(s, token[:, None])[:, -1]
    assert found.tolist() == [tokens for _, tokens in expected]
    torch.testing.assert_close(total, torch.tensor([score for score, _ in expected], dtype=torch.float64))
    assert any(len(set(rows.tolist())) < beams for rows in most[1:])


@pytest.mark.parametrize("text", MODELS.values(), ids=MODELS)
def test_speculative_steps(text: str) -> None:
    model, end, drafted = Model(text), 60, 3
    prompts = [[1, 5, 2, 7, 7], [3, 9], [4, 4, 0, 8]]
    expected = [list(prompt) for prompt in prompts]
    for tokens in expected:
        while len(tokens) < end:
            tokens.append(int(model.alone(tokens)[-1].argmax()))

    random, s = Random(0), session_of(model.plan, 3)
    found = [list(prompt) for prompt in prompts]
    padded = torch.tensor([prompt + [0] * (5 - len(prompt)) for prompt in prompts])
    # all but the last token of each prompt, which comes with the first draft
    s.prefill(*model.qkv(padded, [0] * 3), tokens=[len(prompt) - 1 for prompt in prompts], chunk=2)
    accepted = []
    while min(map(len, found)) < end:
        # a draft that is mostly right, at first
        draft = [
            [t if random.random() < 0.7 else 0 for t in (*whole[len(row) : len(row) + drafted], 0, 0, 0)][
                :drafted
            ]
            for row, whole in zip(found, expected, strict=True)
        ]
        new = torch.tensor([[row[-1], *more] for row, more in zip(found, draft, strict=True)])
        taken = model.cached(s, new).argmax(-1).tolist()
        for row, more, said in zip(found, draft, taken, strict=True):
            right = next((i for i, token in enumerate(more) if token != said[i]), drafted)
            row += [*more[:right], said[right]]
            accepted.append(right)
        s.truncate([len(row) - 1 for row in found])
    assert [row[:end] for row in found] == [tokens[:end] for tokens in expected]
    assert {0, 1, 3} <= set(accepted)
    assert len({len(row) for row in found}) > 1


def test_a_rolling_cache_has_no_end() -> None:
    plan = compiled(TEXTS["sinks"], length=24)
    s, generator = plan.session(1, 10_000, rewind=2), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 500, WIDTH, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    out = s.prefill(q, k, v)
    assert s.slots == 3 + 7 - 1 + 2
    whole = compiled(TEXTS["sinks"], length=500)(q, k, v)
    torch.testing.assert_close(out, whole)


@pytest.mark.parametrize("name", ["causal", "sinks"])
def test_a_step_attends_to_the_cache_itself(name: str) -> None:
    s, seen = session_of(compiled(TEXTS[name]), 2), []
    plan = s.plan

    def spy(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        seen.append((k.data_ptr() == s.k.data_ptr(), v.data_ptr() == s.v.data_ptr(), k.shape[2]))
        return plan(q, k, v, **call)

    s.plan = spy  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    for size in (3, 1, 4, 1, 1, 4, 4):
        s.step(*drawn(generator, 2, size, torch.float64))
    assert all(k and v for k, v, _ in seen)
    assert [n for _, _, n in seen] == [min(n, s.slots) for n in (3, 4, 8, 9, 10, 14, 18)]


def test_rows_may_become_more() -> None:
    plan = compiled(TEXTS["sinks"])
    s, alone = session_of(plan, 1), Alone(plan, 1)
    random, generator = Random(0), torch.Generator().manual_seed(0)
    grow(s, alone, random, generator, 15, ragged=False)
    s.reorder([0, 0, 0])
    alone.reorder([0, 0, 0])
    grow(s, alone, random, generator, 3, ragged=True)
    s.truncate(0)
    alone.truncate([0, 0, 0])
    grow(s, alone, random, generator, 10, ragged=False)
    s.truncate(4)
    alone.truncate([4, 4, 4])
    grow(s, alone, random, generator, 15, ragged=True)


def test_parameters_of_a_module() -> None:
    plan = compiled(TEXTS["capped"])
    module, generator = plan.module(), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(module.get_parameter(plan.attention.learned[0].name))
    q, k, v = drawn(generator, 1, 9, torch.float64)
    s = session_of(plan, 1)
    out = s.prefill(q, k, v, chunk=4, learned=dict(module.named_parameters()))
    torch.testing.assert_close(out, module(q, k, v))
    with pytest.warns(UserWarning, match="first values of `.*`: call the module, or pass `learned=`"):
        assert not torch.equal(out, plan(q, k, v))
    s.step(*drawn(generator, 1, 1, torch.float64))  # told once


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_new_gives_nothing(size: int) -> None:
    s = session_of(compiled("mask causal"), 2)
    new = drawn(torch.Generator(), 2, size, torch.float64)
    assert not s.step(*new, tokens=0).any()
    assert s.lengths == (0, 0)
    assert s.step(*(x[:, :, :0] for x in new)).shape == (2, HEADS, 0, V_WIDTH)


REFUSED = {
    "full": ("mask full", "not proved that no query reads a key after it"),
    "prefix": ("inputs p : int[B] mask { q, k : k <= q or k < p }", "reads a key after it"),
    "blocks": ("mask blocks(4, causal)", "reads a key after it"),
    "roots": ("mask causal & last(isqrt(n))", "its mask stays as it is while `n` grows"),
    "end": ("mask causal & { q, k : k < n // 2 or k == q }", "its mask stays as it is while `n` grows"),
    "recent": ("mask causal & { q, k : k >= n - 9 }", "its mask stays as it is while `n` grows"),
    "table and end": ("inputs d : int[n] mask causal & { q, k : d[k] < 3 or k < n // 2 }", "while `n` grows"),
    "draws": ("mask causal & random(3)", "its mask stays as it is while `n` grows"),
    "counts": ("inputs d : int[n] mask causal & within(d, { q, k : q < n - 1 })", "how many entries"),
    "ahead": ("inputs f : bool[n] mask causal & { q, k : f[q + 1] }", "an entry of `f` is read"),
    "ahead of scores": ("inputs f : bool[n] mask causal score where(f[q + 1], s, 0.0)", "an entry of `f`"),
    "lists": ("inputs c : int[n, 4] mask causal & { q, k : k in c[2 * q] }", "an entry of `c` is read"),
    "score": ("mask causal score s * log(n)", "its scores depend on `n`"),
    "decay": ("mask causal decay 1.0 / n", "its scores depend on `n`"),
    "nq": ("mask causal score s + nq", "it depends on `nq`"),
    "table of nq": ("inputs z : float[nq, n] mask causal score s + z[q, k]", "it depends on `nq`"),
    "offset": ("offset 0 mask causal", "its `offset`"),
    "name": ("inputs tokens : int[n] mask causal & documents(tokens)", "name of an argument of a step"),
}  # fmt: skip


def one_diagnostic(caught: pytest.ExceptionInfo[attndsl.AttnError], message: str) -> None:
    assert message in str(caught.value)
    assert len(caught.value.diagnostics) == 1


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_later_tokens_change_is_refused(text: str, message: str) -> None:
    plan = compiled(text)
    with pytest.raises(attndsl.AttnError) as caught:
        plan.session(2, LENGTH)
    one_diagnostic(caught, message)


def test_bad_calls() -> None:
    s = session_of(compiled("mask causal"), 2)
    new = drawn(torch.Generator(), 2, 5, torch.float64)
    q, k, v = new
    rolling = session_of(compiled(TEXTS["sinks"]), 2)
    rolling.prefill(*drawn(torch.Generator(), 2, 60, torch.float64))
    cases = {
        "row 0 has 5 tokens and gets 92 more, and the capacity is 96": lambda: s.step(
            *drawn(torch.Generator(), 2, 92, torch.float64)
        ),
        "`k` is float32 on cpu": lambda: s.step(q, k.float(), v),
        "a step takes no `q_offset`": lambda: s.step(q, k, v, q_offset=3),
        "a step takes no `n`": lambda: s.prefill(q, k, v, n=3),
        "a step takes no `return_lse`": lambda: s.step(q, k, v, return_lse=True),
        "`q` is float32": lambda: s.step(q.float(), k, v),
        "`k` is [2, 4, 5, 8], and what the session holds is like [2, 2, 5, 8]": lambda: s.step(q, q, v),
        "`v` is [2, 2, 5, 8]": lambda: s.step(q, k, k),
        "`k` is [1, 2, 5, 8]": lambda: s.step(q, k[:1], v),
        "`k` must be a torch tensor": lambda: s.step(q, [1], v),  # type: ignore[arg-type]
        "`k` is [2, 2, 8]": lambda: s.step(q, k[:, :, 0], v),
        "differ in length": lambda: s.step(q[:, :, :4], k, v),
        "no gradients": lambda: s.step(q.requires_grad_(), k, v),
        "row 1 has 6 new tokens, and 5 are given": lambda: s.step(q.detach(), k, v, tokens=[1, 6]),
        "`tokens` has 1 entry for 2 rows": lambda: s.step(q.detach(), k, v, tokens=[5]),
        "write `4`, which is for all rows": lambda: s.truncate([4]),
        "has 1 entry for 2 rows": lambda: s.truncate(np.array([4])),
        "`tokens` has 3 entries for 2 rows": lambda: s.step(q.detach(), k, v, tokens=[1, 1, 1]),
        "`tokens` is -1": lambda: s.step(q.detach(), k, v, tokens=-1),
        "has no input `doc`": lambda: s.step(q.detach(), k, v, doc=[1]),
        "`chunk` is 0": lambda: s.prefill(q.detach(), k, v, chunk=0),
        "row 0 has 5 tokens, and is to be truncated to 6": lambda: s.truncate(6),
        "`lengths` has 3 entries": lambda: s.truncate([1, 1, 1]),
        "there is no row 2 of 2": lambda: s.reorder([0, 2]),
        "`rows` is -1": lambda: s.reorder([-1]),
        "row 1 had 60 tokens, and goes back to 56, not to 55": lambda: rolling.truncate([60, 55]),
        "`dtype` is int8": lambda: s.plan.session(2, 9, dtype="int8"),
        "`rewind` is 0": lambda: s.plan.session(2, 9, rewind=0),
        "the cache has 97 slots, and the plan serves up to 96": lambda: s.plan.session(2, 97),
    }
    s.step(*new)
    for message, case in cases.items():
        with pytest.raises(attndsl.AttnError) as caught:
            case()
        one_diagnostic(caught, message)
    assert s.lengths == (5, 5)


def test_the_page_about_decoding_runs() -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", DOCS["decoding.md"], re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["session"].lengths == (52, 53, 56, 36)
    assert names["session"].slots == 2 + 16 - 1 + 5


SMALL = {
    **TEXTS,
    "again": "mask causal & last(3) & { q, k : last(9)[q - 1, k] }",
    "composed": "mask causal & (last(3) @ last(4))",
    "canvas": "mask natten(5, 6, 1, 1) & causal",
    "blocks drawn": "mask causal & (last(2) | blocks(4, random(2, of = causal)))",
    "chosen": "inputs c : int[H, n, 3] mask causal & { q, k : k in c[q] }",
    "flags": "inputs f : bool[B, n] mask causal & { q, k : f[q] or f[k] }",
}


@pytest.mark.parametrize("name", SMALL)
def test_what_is_kept_is_enough_and_masks_last(name: str) -> None:
    found, most = bound(SMALL[name]), 40
    enough = kept(found.attention, Problem.of(found.attention, length=most, heads=HEADS))
    rng = np.random.default_rng(0)
    tables = {
        "doc": np.sort(rng.integers(0, 4, (1, most))),
        "pad": np.array([2]),
        "c": rng.integers(0, most, (HEADS, most, 3)),
        "f": rng.integers(0, 2, (1, most)).astype(bool),
    }
    read = {t.name: t for group in found.attention.groups for t in group.relation.mask.tables}

    def mask(n: int) -> Any:
        cut = {name: tables[name][..., :n, :] if name == "c" else tables[name][..., :n] for name in read}
        return np.broadcast_to(found.mask(n, heads=HEADS, **cut), (*[1] * bool(found.inputs), HEADS, n, n))

    whole = mask(most)
    for n in range(1, most):
        assert (mask(n) == whole[..., :n, :n]).all()
    q, k = np.arange(most)[:, None], np.arange(most)
    assert not (whole & (k > q)).any()
    if enough is not None:
        first, last = enough
        assert not (whole & (k >= first) & (q - k >= last)).any()
    assert enough == ROLLING.get(name, enough)
