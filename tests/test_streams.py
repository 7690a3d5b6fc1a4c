"""Streams of keys: every backend against formulas written by hand, in float64, with their gradients."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attndsl
from attndsl.attention import Attention
from attndsl.errors import AttnError
from attndsl.streams import memory

HEADS, KV_HEADS, WIDTH, BATCH = 4, 2, 6, 2
LENGTHS = (1, 13, 50)
"""Less than a tile, and several."""
BACKENDS = ("reference", "sdpa", "torch")
Entries = tuple[Tensor, Tensor, list[int | None], list[int]]
"""Keys and values by query head, positions and streams."""


def tokens(k: Tensor, v: Tensor, stream: int = 0, first: int = 0) -> Entries:
    return k, v, [first + i for i in range(k.shape[2])], [stream] * k.shape[2]


def pools(k: Tensor, v: Tensor, size: int, stride: int, by: Any, stream: int = 0, first: int = 0) -> Entries:
    """`by` makes one vector of [B, H, size, D]."""
    starts = range(0, k.shape[2] - size + 1, stride)
    made = [
        torch.stack([by(x[:, :, s : s + size]) for s in starts], 2) if len(starts) else x[:, :, :0]
        for x in (k, v)
    ]
    return made[0], made[1], [first + s + size - 1 for s in starts], [stream] * len(starts)


def projected(k: Tensor, v: Tensor, e: Tensor, f: Tensor, stream: int = 0) -> Entries:
    def sums(m: Tensor, x: Tensor) -> Tensor:
        return torch.stack(
            [sum(m[..., i, j, None] * x[:, :, j] for j in range(x.shape[2])) for i in range(m.shape[-2])], 2
        )

    return sums(e, k), sums(f, v), [None] * e.shape[-2], [stream] * e.shape[-2]


def joined(*parts: Entries) -> Entries:
    k, v = (torch.cat([part[i] for part in parts], 2) for i in range(2))
    return k, v, [at for part in parts for at in part[2]], [stream for part in parts for stream in part[3]]


Sees = Callable[[int, Any, int], bool]


def attend(
    q: Tensor, entries: Entries, sees: Sees, score: Callable[..., Any] = lambda s, q, k, i: s
) -> Tensor:
    """Softmax over the entries that each query sees, 0 where it sees none."""
    k, v, at, streams = entries
    n, rows = len(at), []
    for i in range(q.shape[2]):
        live = [j for j in range(n) if sees(i, at[j], streams[j])]
        if not live:
            rows.append(0 * (q[:, :, i] + v.sum(2)))
            continue
        logits = [
            score((q[:, :, i] * k[:, :, j]).sum(-1) / math.sqrt(WIDTH), i, at[j], streams[j]) for j in live
        ]
        weights = torch.stack(logits, -1).softmax(-1)
        rows.append(sum(weights[..., x, None] * v[:, :, j] for x, j in enumerate(live)))
    return torch.stack(rows, 2)


@dataclass(frozen=True)
class Mechanism:
    """A text, and what it means: of q, keys and values by query head, those of memory, and tables."""

    text: str
    formula: Callable[..., Tensor]
    tables: tuple[tuple[str, tuple[int | str, ...]], ...] = ()
    """Inputs by name, with their axes."""


def causal(q: int, k: int, stream: int) -> bool:
    return k <= q


def anyone(q: int, k: int, stream: int) -> bool:
    return True


def halves(m: Tensor | None, at: int) -> tuple[Tensor, Tensor]:
    assert m is not None
    return m[:, :, :at], m[:, :, at:]


def conv(w: Tensor, x: Tensor) -> Tensor:
    """[3, D, D] over [B, H, 3, D]"""
    return sum(x[:, :, i] @ w[i] for i in range(3))


MECHANISMS = {
    "compressed": Mechanism(
        "keys pool(4, stride = 2)  mask { q, k : k <= q }",
        lambda q, k, v, mk, mv, t: attend(q, pools(k, v, 4, 2, lambda x: x.mean(2)), causal),
    ),
    "greatest": Mechanism(
        "keys pool(3, by = max)  score s + 0.1 * (q - k)",
        lambda q, k, v, mk, mv, t: attend(
            q, pools(k, v, 3, 3, lambda x: x.max(2).values), anyone, lambda s, q, k, i: s + 0.1 * (q - k)
        ),
    ),
    "weighed": Mechanism(
        "keys pool(3, by = [0.25, 0.5, 0.25])  mask causal",
        lambda q, k, v, mk, mv, t: attend(
            q, pools(k, v, 3, 3, lambda x: 0.25 * x[:, :, 0] + 0.5 * x[:, :, 1] + 0.25 * x[:, :, 2]), causal
        ),
    ),
    "memory_compressed": Mechanism(
        "inputs W : float[3, D, D]  keys pool(3, by = W)  mask causal",
        lambda q, k, v, mk, mv, t: attend(q, pools(k, v, 3, 3, lambda x: conv(t["W"], x)), causal),
        (("W", (3, WIDTH, WIDTH)),),
    ),
    "learned_conv": Mechanism(
        "keys pool(2, by = learn[H, 2, D], values = learn[2]) ++ tokens  mask causal & last(5)",
        lambda q, k, v, mk, mv, t: attend(
            q,
            joined(
                (
                    pools(k, k, 2, 2, lambda x: (t["by"] * x).sum(2))[0],
                    *pools(v, v, 2, 2, lambda x: (t["values"][:, None] * x).sum(2))[1:],
                ),
                tokens(k, v, 1),
            ),
            lambda q, k, i: q - 4 <= k <= q,
        ),
    ),
    "linformer": Mechanism(
        "keys proj(learn[H, 4, n], learn[H, 4, n])",
        lambda q, k, v, mk, mv, t: attend(q, projected(k, v, t["E"], t["F"]), anyone),
    ),
    "linformer_kv": Mechanism(
        "keys proj(learn[4, n])",
        lambda q, k, v, mk, mv, t: attend(q, projected(k, v, t["E"], t["E"]), anyone),
    ),
    "linformer_given": Mechanism(
        "inputs E : float[B, 4, n]  keys proj(E)",
        lambda q, k, v, mk, mv, t: attend(q, projected(k, v, t["E"][:, None], t["E"][:, None]), anyone),
        (("E", (BATCH, 4, "n")),),
    ),
    "xl": Mechanism(
        "keys mem(9) ++ tokens  mask causal  score s - 0.1 * (q - k)",
        lambda q, k, v, mk, mv, t: attend(
            q, joined(tokens(mk, mv, 0, -9), tokens(k, v, 1)), causal, lambda s, q, k, i: s - 0.1 * (q - k)
        ),
    ),
    "compressive": Mechanism(
        "keys pool(3, of = mem(12)) ++ mem(5) ++ tokens  mask causal",
        lambda q, k, v, mk, mv, t: attend(
            q,
            joined(
                pools(halves(mk, 12)[0], halves(mv, 12)[0], 3, 3, lambda x: x.mean(2), 0, -17),
                tokens(halves(mk, 12)[1], halves(mv, 12)[1], 1, -5),
                tokens(k, v, 2),
            ),
            causal,
        ),
    ),
    "blockwise": Mechanism(
        "keys tokens ++ pool(4)"
        "  mask { q, k : stream == 1 and k // 4 < q // 4 or stream == 0 and k // 4 == q // 4 }"
        "  score s + where(stream == 1, 0.5, 0.0)  decay where(stream == 1, 0.25, 1.0)",
        lambda q, k, v, mk, mv, t: attend(
            q,
            joined(tokens(k, v, 0), pools(k, v, 4, 4, lambda x: x.mean(2), 1)),
            lambda q, k, i: k // 4 < q // 4 if i == 1 else k // 4 == q // 4,
            lambda s, q, k, i: s + (0.5 + math.log(0.25) if i == 1 else 0.0),
        ),
    ),
    "documents": Mechanism(
        "inputs doc : int[n]  keys mem(4) ++ tokens ++ pool(3)"
        "  mask causal & { q, k : stream == 0 or doc[q] == doc[k] }",
        lambda q, k, v, mk, mv, t: attend(
            q,
            joined(
                tokens(mk, mv, 0, -4), tokens(k, v, 1), pools(k, v, 3, 3, lambda x: x.mean(2), 2)
            ),
            lambda q, k, i: k <= q and (i == 0 or k // 7 == q // 7),
        ),
    ),
    "padded": Mechanism(
        "inputs pad : int[B]  keys mem(7) ++ tokens ++ proj(learn[2, n])"
        "  mask { q, k : stream == 2 or (k <= q and k >= pad) }",
        lambda q, k, v, mk, mv, t: torch.cat(
            [
                attend(
                    q[b : b + 1],
                    joined(
                        tokens(mk[b : b + 1], mv[b : b + 1], 0, -7),
                        tokens(k[b : b + 1], v[b : b + 1], 1),
                        projected(k[b : b + 1], v[b : b + 1], t["E"], t["E"], 2),
                    ),
                    lambda q, k, i, pad=pad: i == 2 or pad <= k <= q,
                )
                for b, pad in enumerate((-3, 2))
            ]
        ),
    ),
}  # fmt: skip


def program(text: str) -> attndsl.Bound:
    found = attndsl.parse(f"attention a {{ {text} }}")["a"]
    assert isinstance(found, attndsl.Bound)
    return found


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def shared(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // KV_HEADS, 1)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", MECHANISMS)
def test_backends_give_the_formula_and_its_gradients(name: str, n: int) -> None:
    mechanism, generator = MECHANISMS[name], torch.Generator().manual_seed(n)
    bound = program(mechanism.text)
    held, tables = memory(bound.attention.streams), {}
    q = normal(generator, BATCH, HEADS, n, WIDTH)
    k, v = (normal(generator, BATCH, KV_HEADS, n, WIDTH) for _ in range(2))
    remembered = [normal(generator, BATCH, KV_HEADS, held, WIDTH) for _ in range(2)] if held else []
    for table, shape in mechanism.tables:
        tables[table] = normal(generator, *(n if axis == "n" else int(axis) for axis in shape))
    sizes = {"H": HEADS, "D": WIDTH, "n": n + 3}
    learned = {
        t.name: normal(generator, *(sizes.get(axis, axis) for axis in t.dims))  # type: ignore[arg-type]
        for t in bound.attention.learned
    }
    whole = {"padded": {"pad": [-3, 2]}, "documents": {"doc": [i // 7 for i in range(n)]}}
    inputs: dict[str, Any] = {**tables, **whole.get(name, {})}
    leaves = [q, k, v, *remembered, *tables.values(), *learned.values()]
    by_head = [shared(x) for x in (k, v, *remembered)] + [None] * (2 if not held else 0)
    wanted = mechanism.formula(q, *by_head, {**tables, **learned})
    slope = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    slopes = torch.autograd.grad(wanted, leaves, slope, allow_unused=True, materialize_grads=True)
    sizes_of = {"length": n + 3, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "block_size": 16}
    told = attndsl.compile(bound, **sizes_of, dtype="float64", training=True).considered
    serving = [backend for backend in BACKENDS if not isinstance(told[backend], str)]
    for backend in serving:
        plan = attndsl.compile(bound, **sizes_of, dtype="float64", backend=backend, training=True)
        out = plan(q, k, v, memory=tuple(remembered) or None, learned=learned or None, **inputs)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(out, leaves, slope, allow_unused=True, materialize_grads=True)
        for got, grad in zip(grads, slopes, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-11, atol=1e-11)
    assert {"reference", "torch"} <= {*serving}


def compiled(text: str, length: int, **options: Any) -> attndsl.Plan:
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "dtype": "float64"}
    return attndsl.compile(program(text), length=length, **{**sizes, **options})


def qkv(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (normal(generator, BATCH, heads, n, WIDTH).detach() for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def test_what_is_learned_begins_where_it_can_train() -> None:
    """A pool as its mean, a projection with rows that differ."""
    q, k, v = qkv(12)
    means = compiled("keys pool(3)", 12)(q, k, v)
    for by in ("learn[3]", "learn[3, D]", "learn[H, 3, D, D]"):
        module = compiled(f"keys pool(3, by = {by})", 12).module()
        torch.testing.assert_close(module(q, k, v), means, rtol=1e-12, atol=1e-12)
    e = compiled("keys proj(learn[4, n])", 12).module().E
    assert e.shape == (4, 12)
    assert len(e[:, 0].unique()) == 4
    assert compiled("keys proj(learn[4, n](0.5))", 12).module().E.unique().item() == 0.5


def test_a_projection_by_the_identity_is_full_attention() -> None:
    q, k, v = qkv(20)
    plan = compiled("inputs E : float[20, n]  keys proj(E)", 20)
    torch.testing.assert_close(plan(q, k, v, E=torch.eye(20).double()), compiled("mask full", 20)(q, k, v))


def test_enough_memory_is_one_causal_run() -> None:
    n, part = 24, 8
    q, k, v = (x.requires_grad_() for x in qkv(n))
    wanted = compiled("mask causal", n, training=True)(q, k, v)
    segments = [compiled("mask causal", part, training=True)(*(x[:, :, :part] for x in (q, k, v)))]
    for start in range(part, n, part):
        plan = compiled(f"keys mem({start}) ++ tokens  mask causal", part, training=True)
        here = (x[:, :, start : start + part] for x in (q, k, v))
        segments.append(plan(*here, memory=(k[:, :, :start], v[:, :, :start])))
    found = torch.cat(segments, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(wanted)
    for got, grad in zip(*(torch.autograd.grad(x, (q, k, v), slope) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)


def test_best_of_a_memory_is_chosen_by_position() -> None:
    """All of it where as many are chosen, and the best one by hand."""
    q, k, v = qkv(9)
    held = tuple(x[:, :, :6] for x in qkv(9, seed=1)[1:])
    text = "keys mem(6) ++ tokens  mask causal & ({{ q, k : k >= 0 }} | topk({}, of = {{ q, k : k < 0 }}))"
    whole = compiled("keys mem(6) ++ tokens  mask causal", 9)(q, k, v, memory=held)
    torch.testing.assert_close(compiled(text.format(6), 9)(q, k, v, memory=held), whole)
    plan = compiled(text.format(1), 9)
    best = (q @ shared(held[0]).mT).argmax(-1) - 6
    assert torch.equal(plan.choices(q, k, memory=held)["topk#0"][..., 0], best)


class Truths(TorchDispatchMode):
    """The bytes of the largest tensor of truths that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.dtype == torch.bool:
            self.largest = max(self.largest, found.untyped_storage().nbytes())
        return found


def test_a_rectangle_of_candidates_costs_nothing_per_pair() -> None:
    """A memory is the same for all queries."""
    q, k, _ = qkv(30)
    held = tuple(x[:, :, :400] for x in qkv(400, seed=1)[1:])
    text = "keys mem(400) ++ tokens  mask causal & ({{ q, k : k >= 0 }} | topk(3, of = {}))"
    largest = []
    for of in ("{ q, k : k < 0 }", "{ q, k : k < 0 and (q + k) mod 2 == 0 }"):
        with Truths() as seen:
            compiled(text.format(of), 30).choices(q, k, memory=held)
        largest.append(seen.largest)
    assert largest[0] < 30 * 400 <= largest[1]


def test_queries_may_stand_elsewhere() -> None:
    q, k, v = qkv(30)
    plan = compiled(
        "keys pool(4, stride = 2) ++ tokens  mask { q, k : k <= q and (stream == 0 or q - k < 3) }", 30
    )
    whole = plan(q, k, v)
    torch.testing.assert_close(plan(q[:, :, 25:], k, v), whole[:, :, 25:])
    torch.testing.assert_close(plan(q[:, :, 3:5], k, v, q_offset=3), whole[:, :, 3:5])
    with pytest.raises(AttnError, match="are streams of all tokens"):
        plan(q, k, v, k_offset=2)


def test_weights_are_of_entries_in_the_order_of_the_text() -> None:
    q, k, v = qkv(8)
    plan = compiled("keys tokens ++ pool(4)  mask { q, k : stream == 1 or k == q }", 8)
    out, weights = plan(q, k, v, return_weights=True)
    assert weights.shape == (BATCH, HEADS, 8, 10)
    live = torch.cat([torch.eye(8), torch.ones(8, 2)], 1).bool()
    assert torch.equal(weights != 0, live.expand_as(weights))
    pooled = torch.cat([v, v.unflatten(2, (2, 4)).mean(3)], 2)
    torch.testing.assert_close(out, weights @ shared(pooled))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    plan = compiled(
        "keys proj(learn[4, n]) ++ mem(3) ++ tokens  mask { q, k : stream != 1 }", 16, dtype="float32"
    )
    q, k, v = qkv(16)
    held = tuple(x[:, :, :3] for x in (k, v))
    wanted = plan.module().double()(q, k, v, memory=held)
    found = plan.module()(*(x.to(dtype) for x in (q, k, v)), memory=tuple(x.to(dtype) for x in held))
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu"):
            cast = plan.module()(*(x.float() for x in (q, k, v)), memory=tuple(x.float() for x in held))
        torch.testing.assert_close(cast.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("by", ["learn[3]", "learn[H, 3]", "learn[H, 3, D, D]"])
def test_compiled_and_differentiated_per_sample(by: str) -> None:
    """What torch sees of it: one graph, and gradients under torch.func."""
    torch._dynamo.reset()
    plan = compiled(f"keys pool(3, by = {by}) ++ mem(4) ++ tokens  mask causal", 12, training=True)
    q, k, v = qkv(12)
    held = tuple(x[:, :, :4] for x in (k, v))
    module = plan.module()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v, memory=held).square().sum()

    wanted = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    for got, grad in zip(torch.autograd.grad(found, leaves), wanted, strict=True):
        torch.testing.assert_close(got, grad)


def test_plans_are_copied_and_exported() -> None:
    plan = compiled("keys pool(3, by = learn[3, D, D]) ++ mem(4) ++ tokens  mask causal", 12)
    q, k, v = qkv(12)
    held = tuple(x[:, :, :4] for x in (k, v))
    module = plan.module()
    wanted = module(q, k, v, memory=held)
    assert torch.equal(pickle.loads(pickle.dumps(plan)).module()(q, k, v, memory=held), wanted)
    assert torch.equal(copy.deepcopy(module)(q, k, v, memory=held), wanted)
    exported = torch.export.export(module, (q, k, v), {"memory": held}).module()
    torch.testing.assert_close(exported(q, k, v, memory=held), wanted)


def test_attention_without_its_streams_is_read_back() -> None:
    from attndsl import portable

    bound = program("inputs E : float[4, n]  keys proj(E) ++ pool(4, stride = 2) ++ mem(5)")
    left = bound.attention.attended
    again, _ = portable.read(portable.write(left).text, ())
    assert again == left
    assert isinstance(again, Attention)
    assert again.inputs == ()


TEXT = """
attention compressed(b = 6, stride = 3) { keys pool(b, stride = stride)  mask causal }
attention blockwise(b = 4) { keys tokens ++ pool(b)  mask causal & { q, k : q//b == k//b or stream == 1 } }
attention greedy { keys pool(4) ++ tokens  mask { q, k : stream == 0 or k == q } }
attention linformer { keys proj(learn[3, n]) }
attention xl(m = 5) { keys mem(m) ++ tokens  mask causal & last(9) }
attention mixed { keys pool(3, of = mem(12)) ++ mem(5) ++ tokens ++ pool(5)  mask causal }
"""
PROGRAM = attndsl.parse(TEXT)


def entries(name: str, n: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The mask [n, entries] by its description in words, and the tokens that each entry is made of: first and
    last, none of memory."""
    q = np.arange(n)[:, None]
    tokens = [(p, p) for p in range(n)]

    def slots(b: int, stride: int) -> list[tuple[int, int]]:
        return [(first, first + b - 1) for first in range(0, n - b + 1, stride)]

    def over(made: list[tuple[int, int]]) -> np.ndarray:
        return np.array([last for _, last in made], int).reshape(1, -1) <= q

    match name:
        case "compressed":
            return over(slots(6, 3)), slots(6, 3)
        case "blockwise":
            own = over(tokens) & (q // 4 == q.T // 4)
            return np.hstack([own, over(slots(4, 4))]), tokens + slots(4, 4)
        case "greedy":
            return np.hstack([np.ones((n, n // 4), bool), q == q.T]), slots(4, 4) + tokens
        case "linformer":
            return np.ones((n, 3), bool), [(0, n - 1)] * 3
        case "xl":
            k = np.arange(-5, n)[None]
            return (k <= q) & (k > q - 9), [(0, -1)] * 5 + tokens
    made = tokens + slots(5, 5)
    return np.hstack([np.ones((n, 9), bool), over(made)]), [(0, -1)] * 9 + made


def held(live: np.ndarray, made: list[tuple[int, int]], n: int) -> list[int]:
    """How many tokens, slots and memories that are there at each step are needed then or later."""
    readers = [np.flatnonzero(column).max(initial=-1) for column in live.T]
    counts = []
    for step in range(n):
        tokens, others = set(), 0
        for (first, last), reader in zip(made, readers, strict=True):
            if first == last:
                tokens |= {first} if first <= step <= reader else set()
            elif last < first or last <= step:
                others += step <= reader
            if first < last and step <= last <= reader:
                tokens |= {*range(first, step + 1)}
        counts.append(len(tokens) + others)
    return counts


@pytest.mark.parametrize("n", [1, 5, 14, 60, 300])
@pytest.mark.parametrize("name", PROGRAM.names)
def test_analyses_are_of_entries_and_of_the_tokens_in_them(name: str, n: int) -> None:
    live, made = entries(name, n)
    bound = PROGRAM[name]
    assert isinstance(bound, attndsl.Bound)
    assert np.array_equal(bound.mask(n)[0], live)
    assert np.array_equal(bound.block_mask(n, 16).to_dense()[0, 0], live)
    found = attndsl.analyze(bound, length=n, heads=2)
    assert found.nnz.value == 2 * live.sum()
    assert found.density == pytest.approx(live.mean() if live.size else 0.0)
    assert found.empty_rows == 2 * (~live.any(1)).sum()
    assert found.causal == (name not in ("greedy", "linformer"))
    if found.nnz.formula is not None:
        assert name in ("compressed", "blockwise", "greedy")
        values = {"n": sympy.Integer(n)}
        assert sympy.sympify(found.nnz.formula, locals=values) == found.nnz.value
    read = np.zeros((n, n), bool)
    for (first, last), column in zip(made, live.T, strict=True):
        read[column, first : last + 1] = True
    if name in ("xl", "mixed"):
        assert "memory" in found.reasons["reach"]
    else:
        reached = read | np.eye(n, dtype=bool)
        assert found.reach.per_layer[0].pairs == reached.sum()
        assert {*bound.graph(n).edges} == {(k, q) for q, k in np.argwhere(read).tolist()}
    assert found.reasons["shards"] == f"ranks hold tokens, and the keys of `{name}` are streams"
    if found.causal:
        assert found.kv_cache.minimum == found.kv_cache.union == max(held(live, made, n))
        assert sum(found.kv_cache.by_stream.values()) == found.kv_cache.minimum
        assert found.kv_cache.bounded == (name == "xl")
    else:
        assert found.reasons["kv_cache"] in (
            "`E` makes keys of all tokens, later ones too",
            "it is not proved that no query of `greedy` reads a key after it",
        )


def test_what_is_kept_is_told_by_stream() -> None:
    text = """
    attention near(w) { keys pool(4) ++ mem(6) ++ tokens  mask causal & last(w) }
    attention short = near(10)
    attention best { keys mem(5)  mask topk(2, of = { q, k : k < 0 }) }
    attention by_head { keys tokens ++ pool(4)  mask causal & { q, k : stream == 1 or q - k < 3 + 4 * h } }
    attention all = short + best + by_head
    """
    program, told = attndsl.parse(text), {}
    for name in ("short", "best", "by_head", "all"):
        report = attndsl.analyze(program[name], length=50, heads=2, parts=["kv_cache"])
        told[name] = report.kv_cache
        assert "of these" in str(report)
    assert told["short"].by_stream == {"tokens": 10, "slots of 4 tokens": 3}
    assert told["short"].rule == (
        "tokens: keep the last 10 keys; slots of 4 tokens: those in the last 10 tokens; "
        "tokens of a slot that is not over: at most 3; memory: until step 8"
    )
    assert told["best"].by_stream == {"memory": 5}
    assert (told["by_head"].per_head, told["by_head"].union) == ((16, 19), 19)
    assert told["all"].by_stream == {"tokens": 10, "slots of 4 tokens": 12, "memory": 5}
    assert [told[name].bounded for name in told] == [True, True, False, False]


def test_costs_are_of_what_is_made_too() -> None:
    n, d = 64, 16
    found = attndsl.analyze(PROGRAM["linformer"], length=n, heads=4, kv_heads=2, head_dim=d, parts=["cost"])
    assert found.making == {"3 projected": 2 * 2 * (2 * 3 * n * d)}  # key heads, keys and values
    assert found.flops.forward == 4 * (4 * n * 3 * d)
    pooled = attndsl.analyze(PROGRAM["compressed"], length=n, heads=4, head_dim=d, parts=["cost"])
    assert pooled.making == {"slots of 6 tokens, one every 3": 4 * 2 * (20 * 6 * d)}
    assert attndsl.analyze(PROGRAM["xl"], length=n, heads=4, parts=["cost"]).making == {}


CLAIMS = """
assert compressed <= causal
assert blockwise == causal
assert linformer == full
assert xl == causal & last(9)
assert every_row(xl)
assert every_row(mixed)
assert nnz(xl, n = 300) == 300 * 9 - 6
assert density(linformer, n = 10) == 1
assert reach(compressed, layers = 2) <= causal
"""
REFUTED = """
assert greedy <= causal
assert every_row(compressed)
assert compressed == causal
assert xl == causal
"""


def test_claims_are_about_the_tokens_that_are_read() -> None:
    def statuses(claims: str) -> set[str]:
        return {verdict.status for _, verdict in attndsl.parse(TEXT + claims).check()}

    assert statuses(CLAIMS) == {"proved"}
    assert statuses(REFUTED) == {"refuted"}


def test_a_pattern_takes_the_stream_as_an_argument() -> None:
    text = "keys tokens ++ pool(4)  mask causal & {}"
    near = program(text.format("{ q, k : stream == 1 or q - k < 3 }"))
    given = attndsl.parse(
        f"pattern near(i) = {{ q, k : i == 1 or q - k < 3 }} attention a {{ {text.format('near(stream)')} }}"
    )
    assert given["a"] == near


def test_tokens_alone_are_no_streams() -> None:
    assert program("keys tokens  mask causal").attention == program("mask causal").attention
    assert program("keys tokens  mask causal & { q, k : stream == 0 }").attention.streams == ()


@pytest.mark.parametrize("name", PROGRAM.names)
def test_tokens_are_found_by_the_number_of_entries(name: str) -> None:
    """What backends go by that look at an attention whose keys are made."""
    bound = PROGRAM[name]
    assert isinstance(bound, attndsl.Bound)
    numbers = bound.attention.attended.numbered
    assert numbers is not None
    for n in (0, 1, 7, 100):
        made = numbers.at(n)[1]
        found = numbers.tokens(made, 0)
        assert numbers.at(found)[1] == made
        assert found == min((m for m in range(n + 1) if numbers.at(m)[1] == made), default=0)
        assert numbers.tokens(made, n) == n
