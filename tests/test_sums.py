"""Sums of attentions: against dense formulas by hand, and what they refuse."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from shipped import example

import attndsl
from attndsl import portable
from attndsl.command.cli import main

PARTS = """
attention first { mask causal  norm softmax(sink = learn[H](0.5)) }
attention second { inputs pad : int[B]  mask causal & { q, k : k >= pad }  score s + 0.1 * (k - q) }
attention window { mask radius(3)  norm sigmoid }
attention bare { mask causal }
"""
TEXT = f"""{PARTS}
attention diff(l = learn[H](0.8)) = first - l * bare
attention nsa {{ inputs gate : float[B, H, 3, n] }} = gate[0, q] * first + gate[1][q] * second
    + sigmoid(gate[2, q]) * window
attention shared(w = learn[3](0.25)) = w[0] * bare + w[1] * second + (1 - w[2]) * window / 2
attention placed = (1 + q) / n * bare + h * window
attention double = 0.5 * (diff + bare)
"""
program = attndsl.parse(TEXT)
B, H, KV, D, DV = 2, 4, 2, 8, 5
PAD = torch.tensor([0, 3])


def tensors(nq, n, seed=0, width=DV):
    torch.manual_seed(seed)
    shapes = [(B, H, nq, D), (B, KV, n, D), (B, KV, n, width)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense(name, q, k, v, sink=None):
    """[B, H, nq, Dv], queries at the end of the keys."""
    nq, n = q.shape[2], k.shape[2]
    i, j = torch.arange(n - nq, n).double()[:, None], torch.arange(n).double()
    k, v = (x.repeat_interleave(H // KV, 1) for x in (k, v))
    s = q @ k.mT / D**0.5
    mask = {
        "first": j <= i,
        "second": (j <= i) & (j >= PAD[:, None, None, None]),
        "window": (i - j).abs() <= 3,
        "bare": j <= i,
        "local": ((i - j).abs() <= 2) & (i != 1),
        "global_": (i == 1).expand(nq, n),
    }[name]
    if name == "window":
        return (torch.sigmoid(s) * mask) @ v
    s = s + 0.1 * (j - i) if name == "second" else s
    weight = torch.exp(s - s.detach().amax(-1, keepdim=True)) * mask
    total = weight.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink[:, None, None] - s.detach().amax(-1, keepdim=True))
    return torch.where(total == 0, 0.0, weight / torch.where(total == 0, 1.0, total)) @ v


def added(name, q, k, v, **t):
    """The sums of TEXT by hand. Tables by name; `sink` of `first`."""
    nq, n = q.shape[2], k.shape[2]
    i = torch.arange(n - nq, n).double()
    made = {part: dense(part, q, k, v) for part in ("second", "window", "bare")}
    made["first"] = dense("first", q, k, v, t.get("sink"))
    if name == "diff":
        return made["first"] - t["l"][:, None, None] * made["bare"]
    if name == "nsa":
        gate = t["gate"][:, :, :, n - nq :, None]
        return (
            gate[:, :, 0] * made["first"]
            + gate[:, :, 1] * made["second"]
            + torch.sigmoid(gate[:, :, 2]) * made["window"]
        )
    if name == "shared":
        w = t["w"]
        return w[0] * made["bare"] + w[1] * made["second"] + (1 - w[2]) * made["window"] / 2
    if name == "placed":
        heads = torch.arange(H).double()[:, None, None]
        return ((1 + i) / n)[:, None] * made["bare"] + heads * made["window"]
    return 0.5 * (made["first"] - t["l"][:, None, None] * made["bare"] + made["bare"])


def plan_of(bound, n, nq=None, backend=None, dtype="float64"):
    return attndsl.compile(
        bound, length=n, q_length=nq, batch=B, heads=H, kv_heads=KV, head_dim=D, dtype=dtype, backend=backend,
        training=True,
    )  # fmt: skip


def tables_of(name, n):
    torch.manual_seed(1)
    found = {"pad": PAD} if name in ("nsa", "shared") else {}
    if name == "nsa":
        found["gate"] = torch.randn(B, H, 3, n, dtype=torch.float64, requires_grad=True)
    return found


@pytest.mark.parametrize("backend", [None, "reference", "torch"])
@pytest.mark.parametrize(("nq", "n"), [(37, 37), (5, 37), (1, 1), (150, 150)])
@pytest.mark.parametrize("name", ["diff", "nsa", "shared", "placed", "double"])
def test_a_sum_is_what_its_formula_gives(name, nq, n, backend):
    module = plan_of(program[name], n, nq, backend).module().double()
    q, k, v = tensors(nq, n)
    given = tables_of(name, n)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    learned = {key.removeprefix("first."): x for key, x in module.named_parameters()}
    out = module(q, k, v, **given)
    wanted = added(name, q, k, v, **given, **learned)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    leaves = [q, k, v, *(x for x in given.values() if x.requires_grad), *learned.values()]
    slope = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, leaves, slope, allow_unused=True) for x in (out, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-8, atol=1e-9)


def test_gates_and_second_projections_pass_gradcheck():
    mix = "attention mix(l = learn[H]) { inputs g : float[B, H, n] } = g[q] * window - l * g[q]**2 * bare"
    plan = plan_of(attndsl.parse(PARTS + mix)["mix"], 4)
    q, k, v = tensors(4, 4, width=2)
    second = tensors(4, 3, 2, width=2)
    gate = torch.randn(B, H, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(H, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, q2, k2, v2, gate, scale):
        return plan(q, k, v, window=(q2, k2, v2), g=gate, learned={"l": scale}, q_offset=0)

    assert torch.autograd.gradcheck(call, (q, k, v, *second, gate, scale))


def test_parts_with_their_own_q_k_v_and_rows_of_their_own():
    text = """
    attention local(g = [1]) { mask { q, k : not q in g } & radius(2) }
    attention global_(g = [1]) { mask rows(g) }
    attention longformer = local + global_
    """
    plan = plan_of(attndsl.parse(text)["longformer"], 11)
    mine, theirs = tensors(11, 11), tensors(11, 11, 3)
    out = plan(*mine, global_=theirs)
    wanted = dense("local", *mine) + dense("global_", *theirs)
    torch.testing.assert_close(out, wanted)
    grads = torch.autograd.grad(out.sum(), [*mine, *theirs])
    for a, b in zip(grads, torch.autograd.grad(wanted.sum(), [*mine, *theirs]), strict=True):
        torch.testing.assert_close(a, b)
    assert not plan.parts["global_"].block_masks.to_dense()[..., 0, :].any()


def test_positions_and_n_are_those_of_the_parts():
    """A gate stands where its query does."""
    n = 20
    plan = plan_of(program["placed"], n)
    q, k, v = tensors(n, n)
    whole = plan(q, k, v)
    at = torch.tensor([3, 17, 4])
    some = plan(q[:, :, at], k, v, q_positions=at)
    torch.testing.assert_close(some, whole[:, :, at])
    some = plan(q[:, :, 4:9], k, v, q_offset=[4, 4])
    torch.testing.assert_close(some, whole[:, :, 4:9])
    late = plan(q[:, :, :3], k, v, q_offset=25, k_offset=torch.tensor([10, 10]))
    last = plan(q[:, :, :3], k, v, q_offset=25, k_positions=np.arange(10, 30))
    torch.testing.assert_close(late, last)
    torch.testing.assert_close(late, plan(q[:, :, :3], k, v, q_offset=25, k_offset=[10, 10], n=30))
    assert plan(q[:, :, :0], k[:, :, :0], v[:, :, :0]).shape == (B, H, 0, DV)


def test_the_union_is_the_mask():
    bound = program["nsa"]
    q, k = np.arange(9)[:, None], np.arange(9)
    assert (bound.mask(9, pad=[0])[0] == ((k <= q) | (abs(q - k) <= 3))).all()
    assert bound.block_mask(9, 8, pad=[0]).nnz == int(((k <= q) | (abs(q - k) <= 3)).sum())
    assert [verdict.status for _, verdict in attndsl.parse(f"{TEXT}assert diff <= causal").check()] == [
        "proved"
    ]
    assert {table.name for table in program["nsa"].inputs} == {"gate", "pad"}
    assert [table.name for table in program["double"].learned] == ["l", "sink"]


def test_half_precision_adds_in_float32_and_autocast_converts():
    plan = plan_of(program["diff"], 64)
    q, k, v = (x.detach() for x in tensors(64, 64))
    module = plan.module().requires_grad_(False)
    wanted = module(q, k, v)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = module(*(x.to(dtype) for x in (q, k, v)))
        assert out.dtype == dtype
        assert (out.double() - wanted).abs().max() < 8 * torch.finfo(dtype).eps
    text = "attention a { mask causal } attention b { mask causal } attention c = 256 * a - 255 * b"
    plan = plan_of(attndsl.parse(text)["c"], 64)
    low = [x.to(torch.bfloat16) for x in (q, k, v)]
    assert torch.equal(plan(*low), plan.parts["a"](*low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(q.float(), k.float(), v.float()).dtype == torch.bfloat16


def test_in_torch():
    """One graph; export; copies; parameters that are shared are one."""
    n = 24
    module = plan_of(program["nsa"], n).module().double()
    q, k, v = tensors(n, n)
    given = tables_of("nsa", n)
    wanted = module(q, k, v, **given)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, **given)
    torch.testing.assert_close(out, wanted)
    leaves = [q, k, v, given["gate"], *module.parameters()]
    slope = torch.randn_like(out)
    mine = torch.autograd.grad(out, leaves, slope)
    for a, b in zip(mine, torch.autograd.grad(wanted, leaves, slope, retain_graph=True), strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(module, (q, k, v), given)
    torch.testing.assert_close(exported.module()(q, k, v, **given), wanted)
    parameters = dict(module.named_parameters())

    def total(q, gate):
        return torch.func.functional_call(module, parameters, (q, k, v), {**given, "gate": gate}).sum()

    found = torch.func.grad(total, argnums=(0, 1))(q, given["gate"])
    for a, b in zip(found, torch.autograd.grad(wanted.sum(), (q, given["gate"])), strict=True):
        torch.testing.assert_close(a, b)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(copied(q, k, v, **given), wanted)
    torch.testing.assert_close(module(q.to("meta"), k.to("meta"), v.to("meta"), **given).shape, wanted.shape)

    text = """
    let t = learn[4](0.5)
    attention a { mask last(4)  score s + t[q - k] }
    attention b { mask last(2)  score s - t[q - k] }
    attention both = a + t[0] * b
    """
    module = plan_of(attndsl.parse(text)["both"], n).module()
    assert [name for name, _ in module.named_parameters()] == ["t"]
    assert {*module.state_dict()} == {"t", "a.t", "b.t"}


def test_parts_may_have_heads_of_their_own():
    text = """
    attention a { heads 0..2 { mask causal } else { mask last(2) } }
    attention b { heads [0, 2] { mask radius(1) } else { mask none } }
    attention c = a + b
    assert c <= causal | radius(1)
    """
    program = attndsl.parse(text)
    assert [verdict.status for _, verdict in program.check()] == ["proved"]
    assert program["c"].attention.enough_heads() == 4
    masks = [program[name].mask(6, heads=H) for name in "abc"]
    assert (masks[2] == masks[0] | masks[1]).all()
    plan = plan_of(program["c"], 6)
    q, k, v = tensors(6, 6)
    torch.testing.assert_close(plan(q, k, v), plan.parts["a"](q, k, v) + plan.parts["b"](q, k, v))


def test_a_part_that_is_named_twice_is_one():
    text = """
    attention a(t = learn[4](0.5)) { mask last(4)  score s + t[q - k] }
    attention b { mask causal }
    attention one = 2 * a - b
    attention two = (one + a + 1.5 * b) / 3
    """
    first, second = attndsl.parse(text)["two"].attention.parts
    assert [part.attention.name for part in (first, second)] == ["a", "b"]
    assert first.gate.value == 1
    assert second.gate.value == pytest.approx(0.5 / 3)


def test_a_part_without_weights_of_pairs():
    text = """
    attention near { mask radius(2) }
    attention thin { approx shen }
    attention both = near + 0.5 * thin
    """
    bound = attndsl.parse(text)["both"]
    plan = plan_of(bound, 9)
    q, k, v = tensors(9, 9)
    parts = [part(q, k, v) for part in plan.parts.values()]
    torch.testing.assert_close(plan(q, k, v), parts[0] + 0.5 * parts[1])
    assert plan.block_masks is None
    found, _ = portable.read(portable.write(bound.attention).text, ())
    assert found.approximations == bound.attention.approximations != ()
    report = attndsl.analyze(bound, length=64)
    assert {report.reasons["cost"], report.reasons["nnz"]} == {"`shen` has no weights of pairs"}


def test_tables_are_bound_in_every_part():
    plan = plan_of(program["nsa"], 16)
    assert plan.block_masks is None
    given = tables_of("nsa", 16)
    q, k, v = tensors(16, 16)
    bound = plan.bind(pad=PAD)
    assert bound.block_masks is not None
    learned = {"first.sink": torch.zeros(H, dtype=torch.float64)}
    wanted = plan(q, k, v, **given, learned=learned)
    torch.testing.assert_close(bound(q, k, v, gate=given["gate"], learned=learned), wanted)
    whole = bound.bind(gate=given["gate"])
    torch.testing.assert_close(whole(q, k, v, learned=learned), wanted)
    assert "second: " in plan.backend
    assert str(plan).startswith("nsa: 3 parts, length 16")


def test_choices_are_each_parts_own():
    text = """
    attention near { mask last(2) }
    attention far { mask causal & topk(3, of = causal) }
    attention two = near + far
    """
    bound = attndsl.parse(text)["two"]
    plan = plan_of(bound, 12)
    q, k, v = tensors(12, 12)
    out = plan(q, k, v)
    torch.testing.assert_close(out, plan.parts["near"](q, k, v) + plan.parts["far"](q, k, v))
    (chosen,) = plan.choices(q, k).values()
    assert (chosen == next(iter(plan.parts["far"].choices(q, k).values()))).all()
    q2, k2, v2 = tensors(12, 12, 7)
    (others,) = plan.choices(q, k, far=(q2, k2, v2)).values()
    assert (others == next(iter(plan.parts["far"].choices(q2, k2).values()))).all()
    assert (others != chosen).any()

    text = text.replace("mask last(2)", "mask last(2) & topk(3, of = causal)")
    plan = plan_of(attndsl.parse(text)["two"], 12)
    assert len(plan.choices(q, k)) == 1
    with pytest.raises(attndsl.AttnError, match="`far` and a part before it choose alike"):
        plan.choices(q, k, far=(q2, k2, v2))


def test_a_sum_is_carried_as_text():
    for name in ("diff", "nsa", "shared", "double"):
        attention = program[name].attention
        written = portable.write(attention)
        found, _ = portable.read(written.text, written.constants)
        assert portable.write(found).text == written.text
        assert [part.attention.name for part in found.parts] == [p.attention.name for p in attention.parts]


DECODED = """
attention near { mask causal & last(4)  norm softmax(sink = learn[H](0.5)) }
attention far { mask causal  score alibi }
attention features { mask causal  score elu1(Q) @ elu1(K)  norm linear }
attention total(l = learn[H](0.8)) { inputs g : float[B, H, n]  w : float[H] } = l * near - g[q] * far
    + w * features / (1 + q)
"""


def test_a_session_gives_what_the_plan_gives():
    """Rolling caches, whole ones and states, stepped together; a part with q, k and v of its own."""
    n = 60
    plan = plan_of(attndsl.parse(DECODED)["total"], n)
    module = plan.module().double()
    learned = {name: x.detach() for name, x in module.named_parameters()}
    (q, k, v), own = ([x.detach() for x in tensors(n, n, seed)] for seed in (0, 1))
    torch.manual_seed(3)
    g, w = torch.randn(B, H, n, dtype=torch.float64), torch.randn(H, dtype=torch.float64)
    with torch.no_grad():
        wanted = module(q, k, v, far=own, g=g, w=w)

    def taken(a, b, **more):
        new, others = ([x[:, :, a:b] for x in some] for some in ((q, k, v), own))
        return session.step(*new, far=others, g=g[:, :, :b], w=w, learned=learned, **more)

    with torch.no_grad():
        session = plan.session(B, n, v_dim=DV)
        torch.testing.assert_close(taken(0, 21, chunk=8), wanted[:, :, :21])
        for i in range(21, 40):
            torch.testing.assert_close(taken(i, i + 1), wanted[:, :, i : i + 1])
        other = session.copy()
        torch.testing.assert_close(taken(40, 43), wanted[:, :, 40:43])
        session = other
        assert session.lengths == (40, 40)
        out = taken(40, 44, tokens=[4, 1])
        torch.testing.assert_close(out[0], wanted[0, :, 40:44])
        torch.testing.assert_close(out[1, :, :1], wanted[1, :, 40:41])
        assert not out[1, :, 1:].any()
        session.truncate([43, 40])
        session.reorder([0])
        assert session.lengths == (43,)
        for part in session.parts.values():
            assert part.lengths == (43,)


def test_a_step_that_one_part_refuses_leaves_all_as_they_were():
    plan = plan_of(attndsl.parse(DECODED)["total"], 60)
    session = plan.session(B, 20)
    q, k, v = (x.detach() for x in tensors(9, 9, width=D))
    given = {"g": torch.zeros(B, H, 9, dtype=torch.float64), "w": torch.zeros(H)}
    learned = {"l": torch.zeros(H), "near.sink": torch.zeros(H)}
    with torch.no_grad():
        for wrong in ({"w": torch.zeros(H + 1)}, {"far": (q, k, v[:, :1])}, {"tokens": 10}):
            with pytest.raises(attndsl.AttnError):
                session.step(q, k, v, **{**given, "learned": learned, **wrong})
            assert {part.lengths for part in session.parts.values()} == {(0, 0)}
        session.step(q, k, v, **given, learned=learned)
        assert {part.lengths for part in session.parts.values()} == {(9, 9)}


def test_what_one_part_held_lasts_where_another_refuses():
    """Also where the new tokens would have taken the places of all that it held."""
    text = "attention near { mask causal & last(3) } attention slots { keys pool(4)  mask causal }"
    plan = plan_of(attndsl.parse(text + "attention both = near + slots")["both"], 40)
    q, k, v = (x.detach() for x in tensors(20, 20, width=D))
    wanted = plan(q, k, v)
    for size in (1, 2, 9):
        session = plan.session(B, 40, rewind=2)
        found = [session.step(*(x[:, :, :6] for x in (q, k, v)))]
        wrong = [torch.full_like(x[:, :, :size], 9.0) for x in (q, k, v)]
        with pytest.raises(attndsl.AttnError):
            session.step(*wrong, slots=(wrong[0], wrong[1], wrong[2][:, :1]))
        found.append(session.step(*(x[:, :, 6:] for x in (q, k, v))))
        torch.testing.assert_close(torch.cat(found, 2), wanted)


def softmax_of(mask, q, k, v):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = (q @ k.mT / q.shape[3] ** 0.5).masked_fill(~mask, -torch.inf)
    return torch.where(mask.any(-1, keepdim=True), s.softmax(-1), 0.0).nan_to_num() @ v


def test_differential_attention_by_hand():
    """Ye et al. 2024, equations 1 and 2: values are twice as wide, and one factor serves all heads."""
    bound = example("differential")["differential"](depth=3)
    module = plan_of(bound, 21).module().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.1)
    (q, k, v), (q2, k2, _) = tensors(21, 21, 0, 2 * D), tensors(21, 21, 5, 2 * D)
    causal = torch.ones(21, 21, dtype=torch.bool).tril()
    start = 0.8 - 0.6 * np.exp(-0.6)
    share = torch.exp(module.a @ module.b) - torch.exp(module.c @ module.d) + start
    wanted = softmax_of(causal, q, k, v) - share * softmax_of(causal, q2, k2, v)
    out = module(q, k, v, second=(q2, k2, v))
    torch.testing.assert_close(out, wanted)
    leaves = [q, k, v, q2, k2, *module.parameters()]
    slope = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, leaves, slope) for x in (out, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_native_sparse_attention_by_hand():
    """Gates by query and head; heads that share keys share the blocks, by the sum of what they give each."""
    n, b, top, w, size, stride = 61, 8, 2, 7, 6, 3
    bound = example("nsa")["nsa"](l=size, stride=stride, b=b, top=top, w=w)
    plan = plan_of(bound, n)
    q, k, v = tensors(n, n)
    gate = torch.rand(B, H, 3, n, dtype=torch.float64)
    i = torch.arange(n)
    own, blocks = i // b, torch.arange(-(-n // b))
    means = torch.stack([k[:, :, i[own == block]].mean(2) for block in blocks], 2)
    scores = torch.einsum("bghqd,bgmd->bgqm", q.unflatten(1, (KV, H // KV)), means)
    may = (blocks < own[:, None] - 1) & (blocks > 0)
    order = scores.masked_fill(~may, -torch.inf).topk(top).indices
    chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, order, True) & may
    near = (blocks == 0) | ((blocks <= own[:, None]) & (blocks >= own[:, None] - 1))
    live = (chosen | near)[..., own].repeat_interleave(H // KV, 1) & (i <= i[:, None])
    window = (i <= i[:, None]) & (i[:, None] - i < w)
    slots = [x.unfold(2, size, stride).mean(-1) for x in (k, v)]
    over = torch.arange(slots[0].shape[2]) * stride + size - 1 <= i[:, None]
    branches = softmax_of(over, q, *slots), softmax_of(live, q, k, v), softmax_of(window, q, k, v)
    wanted = sum(gate[:, :, j, :, None] * branch for j, branch in enumerate(branches))
    torch.testing.assert_close(plan(q, k, v, gate=gate), wanted)


def test_memorizing_transformers_by_hand():
    """Wu et al. 2022, section 3.2: the best keys of a memory and what is near, each in a softmax, and a gate
    of each head."""
    n, m, w, top = 21, 13, 4, 3
    bound = example("memorizing")["memorizing"](m=m, w=w, top=top)
    module = plan_of(bound, n).module().double()
    with torch.no_grad():
        module.b.normal_()
    (q, k, v), (_, mk, mv) = tensors(n, n), tensors(1, m, 5)
    scores = q @ mk.repeat_interleave(H // KV, 1).mT
    best = torch.zeros_like(scores).scatter(-1, scores.topk(top).indices, 1.0).bool()
    i, j = torch.arange(n)[:, None], torch.arange(n)
    gate = torch.sigmoid(module.b)[:, None, None]
    near = softmax_of((j <= i) & (i - j < w), q, k, v)
    wanted = gate * softmax_of(best, q, mk, mv) + (1 - gate) * near
    out = module(q, k, v, memory=(mk, mv))
    torch.testing.assert_close(out, wanted)
    leaves = [q, k, v, mk, mv, module.b]
    slope = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(x, leaves, slope) for x in (out, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, memory=(mk, mv)), out)


HELD = """
attention far(m) { keys mem(m) }
attention long = far(7)
attention short = far(3)
attention past { keys pool(2, of = mem(4)) ++ mem(2) ++ tokens  mask causal }
attention near { mask causal & last(2) }
attention all = long + 2 * short - past + near
"""


def test_parts_take_their_memory_together_or_by_name():
    """Of one pair the last keys, as far back as each goes."""
    n = 6
    plan = plan_of(attndsl.parse(HELD)["all"], n)
    q, k, v = tensors(n, n)
    _, mk, mv = tensors(1, 7, 8)
    held = {
        name: [x[:, :, 7 - m :] for x in (mk, mv)] for name, m in (("long", 7), ("short", 3), ("past", 6))
    }
    parts = {name: plan.parts[name](q, k, v, memory=held.get(name)) for name in plan.parts}
    wanted = parts["long"] + 2 * parts["short"] - parts["past"] + parts["near"]
    torch.testing.assert_close(parts["short"], softmax_of(torch.ones(n, 3).bool(), q, *held["short"]))
    torch.testing.assert_close(plan(q, k, v, memory=(mk, mv)), wanted)
    torch.testing.assert_close(plan(q, k, v, memory=held), wanted)
    other = {**held, "short": [x[:, :, :3] for x in (mk, mv)]}
    assert (plan(q, k, v, memory=other) - wanted).abs().max() > 0.01


def test_memory_is_no_token_in_a_sum(tmp_path):
    (tmp_path / "held.attn").write_text(
        HELD + "assert every_row(long)  assert every_row(all)  assert all <= causal"
    )
    done = attn("check", tmp_path / "held.attn")
    assert done.stdout.count(": proved: ") == 3
    assert done.stderr == ""
    program = attndsl.parse(HELD + "attention both = long + short")
    assert not program["both"].mask(5).any()
    told = attndsl.analyze(program["both"], length=5, heads=2)
    assert told.empty_rows == 0
    assert {name: count.value for name, count in told.parts.items()} == {"long": 70, "short": 30}
    assert told.reasons["reach"] == "`both` reads memory, which is no token here"
    ran = json.loads(
        attn("run", f"{tmp_path}/held.attn", "all", "--length", 9, "--backward", "--json").stdout
    )
    assert ran["verified_rows"] == 9


def test_one_attention_is_several_parts_by_names_of_their_own():
    text = """
    attention local(w, t = learn[3](0.5)) { mask causal & last(w)  score s + t[min(q - k, 2)] }
    attention first = local(5)
    attention second = local(w = 9)
    attention diff(l = learn[H](0.8)) = first - l * second
    """
    program = attndsl.parse(text)
    assert isinstance(plan_of(program["first"], 12), attndsl.Plan)
    plan = plan_of(program["diff"], 12)
    module = plan.module().double()
    assert [*module.state_dict()] == ["l", "first.t", "second.t"]
    mine, theirs = tensors(12, 12), tensors(12, 12, 3)
    with torch.no_grad():
        module.second.t.normal_()
    out = module(*mine, second=theirs)
    parts = [
        plan.parts[name](*own, learned={"t": getattr(module, name).t})
        for name, own in (("first", mine), ("second", theirs))
    ]
    torch.testing.assert_close(out, parts[0] - 0.8 * parts[1])
    i, j = torch.arange(12)[:, None], torch.arange(12)
    bias = module.second.t[(i - j).clamp(0, 2)]
    q, k, v = theirs
    s = q @ k.repeat_interleave(H // KV, 1).mT / D**0.5 + bias
    weights = s.masked_fill(~((j <= i) & (i - j < 9)), -torch.inf).softmax(-1)
    torch.testing.assert_close(parts[1], weights @ v.repeat_interleave(H // KV, 1))


def test_a_sum_under_another_name_is_that_sum():
    program = attndsl.parse(TEXT + "attention again = nsa")
    again = program["again"].attention
    assert [part.attention.name for part in again.parts] == ["first", "second", "window"]
    assert again.name == "again"
    assert {table.name for table in again.inputs} == {"gate", "pad"}


def test_choosing_of_all_parts_is_counted():
    """Also of what the union of parts does not read."""
    text = """
    attention near { mask causal }
    attention far { mask causal & topk(3, of = causal) }
    attention held { keys mem(5) ++ tokens  mask topk(2, of = { q, k : k < 0 }) | causal }
    attention all = near + far + held
    """
    program = attndsl.parse(text)
    told = {
        name: attndsl.analyze(program[name], length=16, heads=2, parts=["cost"]) for name in program.names
    }
    parts = [told[name].choosing["topk"] for name in ("far", "held")]
    assert parts == [2 * 2 * 16 * 16 * 64, 2 * 2 * 16 * 5 * 64]
    assert told["all"].choosing == {"topk": sum(parts)}
    seconds = [told[name].lowerings["reference"].seconds_estimate for name in ("all", "near", "far", "held")]
    assert seconds[0] == pytest.approx(sum(seconds[1:]))


def test_etc_with_its_own_projections_by_hand():
    bound = example("etc_projected")["etc_projected"](g=5, r=3)
    plan = plan_of(bound, 29)
    mine, own = tensors(29, 29), tensors(29, 29, 4)
    i, j = torch.arange(29)[:, None], torch.arange(29)
    long = (i >= 5) & ((j < 5) | ((i - j).abs() <= 3))
    wanted = softmax_of(long, *mine) + softmax_of((i < 5).expand(29, 29), *own)
    torch.testing.assert_close(plan(*mine, global_=own), wanted)


FILE = """
attention first { mask causal  norm softmax(sink = learn[H]) }
attention window { inputs pad : int[B]  mask last(4) & { q, k : k >= pad } }
attention diff(l = learn[H](0.8)) = first - l * window
attention local { mask ~rows([0]) & radius(2) }
attention rest { mask rows([0]) }
attention all = local + rest
assert diff <= causal
assert every_row(all)
assert nnz(all, n = 8) == 39
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "sums.attn").write_text(FILE)
    np.save(tmp_path / "pad.npy", np.array([1]))
    return f"{tmp_path}/sums.attn", f"pad={tmp_path}/pad.npy"


def attn(*arguments):
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_check_proves_what_is_claimed_of_sums_and_warns_of_no_row_that_another_part_has(file):
    done = attn("check", file[0])
    assert done.stdout.count(": proved: ") == 3
    assert "has no key" not in done.stderr


def test_check_tells_once_of_a_choice_that_looks_ahead(tmp_path):
    text = """
    attention two = first + far
    attention first { mask causal }
    attention far { mask causal & topk(3) }
    """
    (tmp_path / "ahead.attn").write_text(text)
    told = attn("check", tmp_path / "ahead.attn").stderr
    assert told.count("looks ahead") == 1
    (tmp_path / "ahead.attn").write_text(text.replace("far {", "far(r) {").replace("+ far", "+ far(3)"))
    assert attn("check", tmp_path / "ahead.attn").stderr.count("looks ahead") == 1


def test_commands_take_sums(file):
    name, pad = file
    size = ("--length", 40, "--heads", 2)
    ran = json.loads(attn("run", name, "diff", *size, "--backward", "--input", pad, "--json").stdout)
    first = "cpu" if shutil.which("c++") else "torch"
    assert ran["backend"] == f"first: {first}, window: sdpa"
    assert {"first: sdpa", "window: reference"} <= {*ran["rejected"]}
    assert (ran["nnz"], ran["verified_rows"]) == (2 * 820, 40)
    assert ran["dense_masked_work"] == "mask only"
    compiled = attn("compile", name, "diff", *size).stdout
    assert "diff: 2 parts, length 40" in compiled
    assert "tiles     unknown until the tables are bound" in compiled
    assert attn("show", name, "all", "--length", 8).stdout.startswith("all  n = 8  60.9 % live")
    same = json.loads(attn("diff", f"{name}:diff", f"{name}:first", "--json").stdout)
    assert same["status"] == "equal"
    assert "all" in attn("compare", f"{name}:all", f"{name}:local", "--length", 40).stdout


def test_the_analyzer_adds_costs_and_joins_masks(file):
    name, _ = file
    asked = ("--only", "nnz,cost,block_sizes,machines,rows", "--json")
    told, *parts = (
        json.loads(attn("analyze", name, part, "--length", 40, *asked).stdout)
        for part in ("all", "local", "rest")
    )
    assert told["nnz"]["value"] == 231
    assert [told["parts"][name]["value"] for name in ("local", "rest")] == [
        part["nnz"]["value"] for part in parts
    ]
    assert told["flops"]["forward"] == sum(part["flops"]["forward"] for part in parts)
    assert told["bytes"]["backward"] == sum(part["bytes"]["backward"] for part in parts)
    assert told["empty_rows"] == 0
    assert parts[0]["parts"] is None
    (rows,) = zip(told["block_sizes"][:1], *(part["block_sizes"][:1] for part in parts), strict=True)
    assert rows[0]["pairs"] == rows[1]["pairs"] + rows[2]["pairs"]
    seconds = [part["lowerings"]["torch"]["seconds_estimate"] for part in (told, *parts)]
    assert seconds[0] == pytest.approx(sum(seconds[1:]))
    text = attn("analyze", name, "all", "--length", 40, "--only", "nnz").stdout
    assert "part rest     40 live pairs" in text


STREAMS = """
attention compressed { keys pool(4, stride = 2)  mask { q, k : k <= q } }
attention selected { mask causal & (block(4) | topk(2, of = blocks(4, causal - radius(0)))) }
attention window { mask causal & last(6) }
attention nsa { inputs gate : float[B, H, 3, n] } = gate[0, q] * compressed + gate[1, q] * selected
    + gate[2, q] * window
attention projected { keys proj(learn[H, 5, n], learn[H, 5, n]) }
attention two(l = learn[H](0.5)) = projected + l * window
attention few = compressed + window
assert nsa <= causal
assert window <= few
"""


def test_parts_have_keys_of_their_own():
    bound = attndsl.parse(STREAMS)["nsa"]
    plan = attndsl.compile(bound, length=32, heads=H, kv_heads=KV, head_dim=D, dtype="float64", training=True)
    qkv = tensors(32, 32, width=D)
    gate = torch.rand(B, H, 3, 32, dtype=torch.float64, requires_grad=True)
    out = plan(*qkv, gate=gate)
    q, k, v = qkv
    keys, values = (x.repeat_interleave(H // KV, 1).unfold(2, 4, 2).mean(-1) for x in (k, v))
    live = 2 * torch.arange(15) + 3 <= torch.arange(32)[:, None]
    weights = torch.softmax((q @ keys.mT / D**0.5).masked_fill(~live, -torch.inf), -1).nan_to_num(0)
    rest = [plan.parts[name](*qkv) for name in ("selected", "window")]
    wanted = sum(g[..., None] * x for g, x in zip(gate.unbind(2), [weights @ values, *rest], strict=True))
    torch.testing.assert_close(out, wanted)
    slope = torch.randn_like(out)
    found = torch.autograd.grad(out, (*qkv, gate), slope)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, (*qkv, gate), slope))


def test_modules_own_what_makes_keys_of_a_part():
    bound = attndsl.parse(STREAMS)["two"]
    module = attndsl.compile(bound, length=32, heads=H, kv_heads=KV, head_dim=D, training=True).module()
    assert [*module.state_dict()] == ["l", "projected.E", "projected.F"]
    q, k, v = (x.detach().float() for x in tensors(32, 32))
    out = module(q, k, v)
    out.sum().backward()
    assert all(x.grad.abs().max() > 0 for x in module.parameters())
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(q, k, v), out)


def test_what_a_sum_relates_are_the_tokens_that_keys_are_made_of():
    program = attndsl.parse(STREAMS)
    assert [verdict.status for _, verdict in program.check()] == ["proved", "proved"]
    mask = program["few"].mask(12)[0]
    q, k = np.indices((12, 12))
    some = [(2 * m <= k) & (k <= 2 * m + 3) & (2 * m + 3 <= q) for m in range(5)]
    np.testing.assert_array_equal(mask, ((k <= q) & (q - k < 6)) | np.any(some, 0))


def test_the_analyzer_tells_of_sums_with_keys_of_their_own():
    program = attndsl.parse(STREAMS)
    told, part = (attndsl.analyze(program[name], length=64, heads=H) for name in ("few", "compressed"))
    assert {*told.reasons} == {*part.reasons} == {"shards"}
    assert told.kv_cache.by_stream == {"tokens": 6, "slots of 4 tokens, one every 2": 31}
    assert told.parts["compressed"] == part.nnz
    assert told.making == part.making
    (other,) = (attndsl.analyze(program[name], length=64, heads=H) for name in ("window",))
    assert told.flops.forward == part.flops.forward + other.flops.forward


def test_sessions_of_sums_whose_parts_have_streams():
    """NSA, and a memory beside what is near: step by step what the whole gives; other rows, and back."""
    n = 40
    text = """
    attention far { keys pool(3, of = mem(6)) ++ mem(2) }
    attention best { keys mem(5)  mask topk(2, of = { q, k : k < 0 }) }
    attention held(l = learn[H](0.3)) = far - l * best + window
    """
    program = attndsl.parse(STREAMS + text)
    q, k, v = (x.detach() for x in tensors(n, n))
    _, mk, mv = (x.detach() for x in tensors(1, 8, 9))
    gate = torch.rand(B, H, 3, n, dtype=torch.float64)
    for name, tables, memory in (("nsa", {"gate": gate}, None), ("held", {}, (mk, mv))):
        module = plan_of(program[name], n).module().double()
        with torch.no_grad():
            wanted = module(q, k, v, memory=memory, **tables)
            session = module.session(B, n, rewind=3, v_dim=DV, memory=memory)

            def taken(a, b, session=session, tables=tables, **more):
                given = {name: x[..., :b] for name, x in tables.items()}
                return session.step(*(x[:, :, a:b] for x in (q, k, v)), **given, **more)

            torch.testing.assert_close(taken(0, 17, chunk=5), wanted[:, :, :17])
            for i in range(17, 30):
                torch.testing.assert_close(taken(i, i + 1), wanted[:, :, i : i + 1])
            other = session.copy()
            draft = {name: x[..., :33] for name, x in tables.items()}
            session.step(*(x[:, :, :3] for x in (q, v.new_zeros(k.shape), v)), **draft)
            session.truncate(30)
            torch.testing.assert_close(taken(30, n), wanted[:, :, 30:])
            other.reorder([1, 0])
            swapped = {name: x.flip(0) for name, x in tables.items()}
            new = (x[:, :, 30:].flip(0) for x in (q, k, v))
            torch.testing.assert_close(other.step(*new, **swapped), wanted[:, :, 30:].flip(0))


def test_commands_take_sums_with_keys_of_their_own(tmp_path):
    (tmp_path / "streams.attn").write_text(STREAMS)
    name = tmp_path / "streams.attn"
    ran = json.loads(attn("run", name, "few", "--length", 40, "--heads", 2, "--backward", "--json").stdout)
    assert ran["verified_rows"] == 40
    assert attn("check", name).stdout.count(": proved: ") == 2


def test_a_session_of_a_module_steps_with_its_parameters() -> None:
    text = """attention first { mask causal  norm softmax(sink = learn[H](0.1)) }
        attention second { mask last(3) }
        attention diff(l = learn[H](0.8)) = first - l * second"""
    module = plan_of(attndsl.parse(text)["diff"], 20).module()
    for x in module.parameters():
        x.data += 0.7
    q, k, v = tensors(20, 20)
    session = module.session(len(q), 20, v_dim=v.shape[3])
    with torch.no_grad():
        steps = [session.step(*(x[:, :, i : i + 1] for x in (q, k, v))) for i in range(20)]
        torch.testing.assert_close(torch.cat(steps, 2), module(q, k, v))
