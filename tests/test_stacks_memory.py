"""Memories of stacks: segments beside the reference, the whole run, and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attndsl
from attndsl.execution import registry
from attndsl.stacks.layers import Near
from attndsl.stacks.reference import reference
from attndsl.stacks.tree import Stack
from attndsl.stage import Held, Word

TEXT = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention whole { mask causal  score alibi }
attention first { mask causal }
attention second { mask causal & last(9) }
attention differential(l = learn[H](0.8)) = first - l * second
attention far { mask topk(50, of = causal & ~last(8), by = Q @ K) }
attention near { mask causal & last(8) }
attention gated(b = learn[H](0.3)) = sigmoid(b) * far + (1 - sigmoid(b)) * near
attention packed { inputs doc : int[n]  g : float[B, n]  mask causal & documents(doc)  score s * g[k] }
attention joint { mask causal & (last(8) | topk(50, of = causal & ~last(8), by = Q @ K)) }
stack recurrent(m = 90) { memory(xl(m)) { layers(2) { local  whole  ffn(2) } } }
stack compressive { memory(xl(5), compressed(3, rate = 3, by = conv)) { layers(2) { whole  ffn(2) } } }
stack memorizing(many = 90) { memory(store(many)) { layers(2) { joint  ffn(2) } } }
stack gating(many = 90) { memory(store(many)) { layers(2) { gated  ffn(2) } } }
stack packing { memory(xl(20)) { layers(2) { packed  ffn(1) } } }
stack once { memory(xl(4)) { layers(1) { whole } } }
stack plain { layers(1) { whole  ffn(1) } }
stack turning { memory(xl(7)) { loop(act(eps = 0.05), max = 4) { whole  ffn(1) } } }
stack undone {
    memory(xl(6)) {
        reversible { layers(3) { local  whole  ffn(2) } }
        layers(2) { own(second = qk) { differential } }
    }
}
stack document {
    memory(xl(8), compressed(4, rate = 2)) {
        layers(2) { local  ffn(2) }
        loop(act, max = 4) { share { whole  ffn(1) } }
    }
    layers(2) { local  ffn(2)  exit(margin, threshold = 0.2) }
}
"""
NAMES = ("recurrent", "compressive", "memorizing", "gating", "turning", "undone", "document")


def stack(name: str, text: str = TEXT) -> Stack:
    made: object = attndsl.parse(text)[name]
    assert isinstance(made, Stack)
    return made


def module(name: str, *arguments: int, **options: Any) -> attndsl.StackModule:
    torch.manual_seed(0)
    made = stack(name)
    of: dict[str, Any] = {
        "width": 16,
        "heads": 2,
        "length": 12,
        "dtype": "float64",
        "init": "torch",
    } | options
    module = attndsl.build(made(*arguments), **{"readout": nn.Linear(of["width"], 7)} | of).eval()
    for weight in module.words.parameters():
        nn.init.normal_(weight, std=0.5)
    return module


def segments(module: attndsl.StackModule, x: Tensor, size: int) -> tuple[Tensor, Any]:
    state, found, record = None, [], None
    for segment in x.split(size, 1):
        y, record = module(segment, state=state)
        found.append(y)
        state = record.state
    return torch.cat(found, 1), record


@pytest.mark.parametrize("name", NAMES)
def test_segments_are_what_they_mean(name: str) -> None:
    made, x = module(name), torch.randn(2, 47, 16, dtype=torch.float64)
    state = None
    for segment in x.split([12, 5, 12, 1, 12, 5], 1):
        meant = reference(made, segment, state)
        found, record = made(segment, state=state)
        torch.testing.assert_close(found, meant, rtol=0, atol=1e-12)
        state = record.state
    assert state is not None
    assert state.seen == 47


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_segments(name: str) -> None:
    """Of as many tokens as the module is built for; and no more keys are held, nor bytes of a row, than the
    analysis says."""
    made, x = module(name), torch.randn(2, 43, 16, dtype=torch.float64)
    meant, _ = segments(made, x, 12)
    session, found = made.session(2, 43), []
    costs = attndsl.depth(made.stack, length=12, width=16, heads=2, dtype="float64")
    for piece in x.split([7, 1, 1, 1, 20, 1, 1, 1, 10], 1):
        found.append(session.step(piece))
        assert session.keys <= sum(level.kept for level in costs.levels)
        assert session.segment is not None
        held = [one.x.untyped_storage().nbytes() for one in session.segment.caches.values()]
        assert sum(held) <= 2 * costs.bytes
    torch.testing.assert_close(torch.cat(found, 1), meant, rtol=0, atol=1e-12)
    _, record = made(x[:, :12])
    session = made.session(2, 43, record.state)
    torch.testing.assert_close(session.step(x[:, 12:19]), meant[:, 12:19], rtol=0, atol=1e-12)


DENSE = TEXT.replace("topk(50, of = causal & ~last(8), by = Q @ K)", "causal & ~last(8)")


@pytest.mark.parametrize(("name", "size"), [("recurrent", 7), ("memorizing", 9), ("gating", 11)])
def test_segments_with_memory_enough_are_the_whole_run(name: str, size: int) -> None:
    """As many chosen keys as there are in the store are all of them: attention is dense."""
    x = torch.randn(2, 47, 16, dtype=torch.float64)
    found, _ = segments(module(name), x, size)
    whole = module(name, length=47)
    torch.testing.assert_close(found, whole(x)[0], rtol=0, atol=1e-12)
    if name != "recurrent":
        other = attndsl.build(stack(name, DENSE), width=16, heads=2, length=47, dtype="float64")
        other.load_state_dict(whole.state_dict(), strict=False)
        torch.testing.assert_close(found, other(x)[0], rtol=0, atol=1e-12)
    less, _ = segments(module(name, 3), x, size)
    assert not torch.allclose(found, less)


def test_gradients_stop_at_memory() -> None:
    made, x = module("recurrent"), torch.randn(1, 24, 16, dtype=torch.float64, requires_grad=True)
    found, _ = segments(made, x, 12)
    (grad,) = torch.autograd.grad(found[:, 12:].square().sum(), x)
    assert not grad[:, :12].any()
    assert grad[:, 12:].any()


def held(x: Tensor, first: int = 0) -> Held:
    return Held(x, torch.arange(first, first + x.shape[1]), first)


def test_slots_are_those_of_the_states_in_turn() -> None:
    """Of 2 states each, 3 of them; what fills none stands as it is; the oldest goes."""
    plugin = registry.plugin("stages", "compressed")
    x = torch.arange(11.0).reshape(1, 11, 1)
    for by, first in (("mean", 0.5), ("max", 1.0)):
        word = Word("compressed", (("n", 3), ("rate", 2), ("by", by)))
        now, gone, _ = plugin.remember(word, None, None, held(x[:, :5]), None)
        assert (now.x.flatten().tolist(), now.at.tolist(), now.loose) == ([first, first + 2, 4], [1, 3, 4], 1)
        assert gone is None or not gone.many
        now, gone, _ = plugin.remember(word, None, now, held(x[:, 5:6], 5), None)
        assert (now.x.flatten().tolist(), now.at.tolist(), now.loose) == (
            [first, first + 2, first + 4],
            [1, 3, 5],
            0,
        )
        now, gone, _ = plugin.remember(word, None, now, held(x[:, 6:], 6), None)
        assert (now.x.flatten().tolist(), now.at.tolist()) == (
            [first + 4, first + 6, first + 8, 10],
            [5, 7, 9, 10],
        )
        assert (gone.x.flatten().tolist(), gone.at.tolist()) == ([first, first + 2], [1, 3])


def test_what_is_lost_by_slots_is_a_loss_of_the_convolution_alone() -> None:
    """The mean of squares between what queries read of the slots and of the states, by hand."""
    made = module("compressive")
    x = torch.randn(2, 24, 16, dtype=torch.float64, requires_grad=True)
    _, record = segments(made, x, 12)
    loss = record.losses["reconstruction"]
    grads = torch.autograd.grad(loss, [x, *made.parameters()], allow_unused=True)
    named = [name for name, _ in made.named_parameters()]
    assert {name for name, grad in zip(named, grads[1:], strict=True) if grad is not None} == {
        name for name in named if name.startswith("words")
    }
    assert grads[0] is None
    _, first = made(x[:, :12])
    _, second = made(x[:, 12:], state=first.state)
    place = (0, 0, 0)
    part: Any = made.part(made.stack.sublayer(place))
    old = torch.cat([first.state.held[place][1].x[:, -1:], first.state.held[place][0].x, x[:, 12:19]], 1)[
        :, :12
    ]
    convolution: Any = made.words["m_0_1"]
    slots = torch.stack(
        [
            sum(old[:, 3 * i + j] @ convolution.weight[:, :, j].T for j in range(3)) + convolution.bias
            for i in range(4)
        ],
        1,
    )

    def read(states: Tensor) -> Tensor:
        q, k, v = (
            made.unflatten(-1, (2, 8))
            for made in (
                part.inner.q(part.before(x[:, 12:])),
                part.inner.k(part.before(states)),
                part.inner.v(part.before(states)),
            )
        )
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)

    one_layer = (read(slots) - read(old)).square().mean()
    assert one_layer < second.losses["reconstruction"]
    alone = registry.plugin("stages", "compressed").remember(
        made.stack.layers[0].memory[1],
        convolution,
        None,
        held(old),
        lambda states: part.read(x[:, 12:], states),
    )[2]["reconstruction"]
    torch.testing.assert_close(alone, one_layer)


@pytest.mark.parametrize("name", ["compressive", "memorizing"])
def test_states_are_values(name: str, tmp_path: Path) -> None:
    """No call writes to one, and none holds what is not its own; it is saved, moved, and of equal stacks."""
    made, x = module(name), torch.randn(2, 24, 16, dtype=torch.float64)
    entering = x[:, :12].clone()
    _, record = made(entering)
    entering.zero_()
    tensors = [one.x for kept in record.state.held.values() for one in kept if one is not None]
    assert all(one.untyped_storage().nbytes() == one.nbytes and not one.requires_grad for one in tensors)
    before = [one.clone() for one in tensors]
    meant = made(x[:, 12:], state=record.state)[0]
    made.session(2, 24, record.state).step(x[:, 12:])
    assert all(map(torch.equal, tensors, before))
    torch.testing.assert_close(meant, segments(made, x, 12)[0][:, 12:], rtol=0, atol=0)
    torch.save(record.state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    again = attndsl.build(
        stack(name, "# moved\n" + TEXT),
        width=16,
        heads=2,
        length=12,
        dtype="float64",
        readout=nn.Linear(16, 7),
    ).eval()
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(x[:, 12:], state=loaded)[0], meant, rtol=0, atol=0)
    low = module(name, dtype="float32")
    found = low(x[:, 12:].float(), state=record.state.to(torch.float32))[0]
    torch.testing.assert_close(found, meant.float(), rtol=1e-3, atol=1e-4)


def test_states_are_moved_with_their_positions() -> None:
    _, record = module("compressive")(torch.randn(1, 12, 16, dtype=torch.float64))
    moved = [one for kept in record.state.to("meta").held.values() for one in kept if one is not None]
    assert {tensor.device.type for one in moved for tensor in (one.x, one.at)} == {"meta"}
    near = Near({}, 12, (replace(moved[0], first=None),))
    assert near.places(3, device=torch.device("meta"))["k_positions"].is_meta


@pytest.mark.parametrize(("name", "first"), [("recurrent", 0), ("memorizing", 0), ("compressive", None)])
def test_keys_without_holes_begin_at_an_offset(name: str, first: int | None) -> None:
    _, record = segments(module(name), torch.randn(1, 36, 16, dtype=torch.float64), 12)
    held = tuple(one for one in reversed(record.state.held[0, 0, 0]) if one is not None)
    assert Near({}, 36, held).places(12).get("k_offset") == first


@pytest.mark.parametrize("name", ["recurrent", "compressive", "memorizing", "document"])
def test_rows_and_tokens_may_be_none(name: str) -> None:
    made, x = module(name), torch.randn(2, 19, 16, dtype=torch.float64)
    _, first = made(x[:, :7])
    none, between = made(x[:, 7:7], state=first.state)
    assert none.shape == (2, 0, 16)
    torch.testing.assert_close(
        made(x[:, 7:], state=between.state)[0], made(x[:, 7:], state=first.state)[0], rtol=0, atol=0
    )
    _, empty = made(x[:0, :7])
    assert made(x[:0, 7:], state=empty.state)[0].shape == (0, 12, 16)
    session = made.session(2, 19)
    assert session.step(x[:, :0]).shape == (2, 0, 16)
    same = x[:1].expand(2, -1, -1)
    rows, _ = segments(made, same, 7)
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-12)


def test_keys_of_autocast_are_narrow() -> None:
    made, x = module("memorizing", dtype="float32"), torch.randn(1, 24, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, record = segments(made, x, 12)
    assert {one.x.dtype for kept in record.state.held.values() for one in kept} == {torch.bfloat16}
    torch.testing.assert_close(found, segments(made, x, 12)[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["recurrent", "compressive", "memorizing"])
def test_gradients_are_those_of_differences(name: str) -> None:
    made = module(name, width=4, length=5, readout=nn.Linear(4, 2))
    x = torch.randn(1, 10, 4, dtype=torch.float64)
    _, record = made(x[:, :5])
    if name == "compressive":
        _, record = made(x[:, :5], state=record.state)
    tensors = [x[:, 5:].clone().requires_grad_(), *made.parts.parameters()]
    torch.autograd.gradcheck(lambda x, *_: made(x, state=record.state)[0], tensors, fast_mode=True)
    if name == "compressive":
        learned = [*made.words.parameters()]
        torch.autograd.gradcheck(
            lambda *_: made(x[:, 5:], state=record.state)[1].losses["reconstruction"], learned, fast_mode=True
        )


def test_generated_tokens_are_those_of_segments() -> None:
    """Each is the likeliest behind the segments before, of as many tokens as the module is built for."""
    embed, readout = nn.Embedding(11, 16), nn.Linear(16, 11)
    made = module("compressive", length=5, embed=embed, readout=readout)
    prompt = torch.randint(11, (2, 8))
    found = attndsl.generate(made, prompt, 12)
    tokens = prompt
    for _ in range(12):
        y, _ = segments(made, made.embedded(tokens), 5)
        tokens = torch.cat([tokens, readout(y[:, -1]).argmax(-1)[:, None]], 1)
    assert torch.equal(found, tokens)


def test_steps_cut_tables_at_segments_and_add_all_tokens_or_none() -> None:
    made, x = module("packing"), torch.randn(2, 29, 16, dtype=torch.float64)
    doc, weight = torch.arange(29) // 9, torch.rand(2, 29, dtype=torch.float64) + 0.5
    meant, state = [], None
    for end, segment in zip((12, 24, 29), x.split(12, 1), strict=True):
        y, record = made(segment, state=state, doc=doc[:end], g=weight[:, :end])
        meant.append(y)
        state = record.state
    session = made.session(2, 29)
    found = [session.step(x[:, :5], doc=doc[:5], g=weight[:, :5])]
    with pytest.raises(attndsl.AttnError, match="`doc`"):
        session.step(x[:, 5:], doc=doc[:20], g=weight)
    with pytest.raises(attndsl.AttnError, match="has an input `docs`"):
        session.step(x[:, 5:], docs=doc)
    assert session.length == 5
    found.append(session.step(x[:, 5:], doc=doc.numpy(), g=weight))
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(meant, 1), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_segments_are_traced_whole_and_once() -> None:
    """One graph before there is memory, one while it grows, and one behind that."""
    torch.compiler.reset()
    torch.manual_seed(0)
    made = attndsl.build(stack("once"), width=8, heads=2, length=4)
    graphs = []

    def counted(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    traced = torch.compile(lambda x, state: made(x, state=state), backend=counted, fullgraph=True)
    state = None
    for x in torch.randn(7, 1, 4, 8):
        meant = made(x, state=state)[0]
        found, record = traced(x, state)
        torch.testing.assert_close(found, meant)
        state = record.state
    assert len(graphs) <= 3


def test_columns_and_reach_are_those_of_the_published_model() -> None:
    """On enwik8: 2,688 columns of a segment of 768, and 4,224 steps back (Rae et al. 2020, section 4.2); what
    fills no slot is none there, segments being multiples of its rate."""
    (words,) = {stage.memory for stage in stack("published", PUBLISHED).layers}
    behind = columns = 0
    for word in words:
        many, behind = registry.plugin("stages", word.name).reach(word, behind)
        columns += many
    loose = 3 - 1
    assert (768 + columns - loose, behind - loose) == (2688, 4224)


PUBLISHED = """
attention lm { mask causal }
stack published { memory(xl(768), compressed(1152, rate = 3)) { layers(24) { lm  ffn(4) } } }
"""


def test_states_that_do_not_fit_are_refused() -> None:
    made, x = module("recurrent"), torch.randn(2, 12, 16, dtype=torch.float64)
    state = made(x)[1].state
    other = module("undone")(x)[1].state
    for given, entering, said in (
        (other, x, "the state is of <stack undone"),
        (state, x[:1], "the state is of 2 rows, and x of 1"),
        (state.to(torch.float32), x, r"the state is torch\.float32 on cpu, and x torch\.float64 on cpu"),
        ({}, x, "a state is what a call left, not dict"),
    ):
        with pytest.raises(attndsl.AttnError, match=said):
            made(entering, state=given)
        with pytest.raises(attndsl.AttnError, match=said):
            made.session(len(entering), 20, given)
    alike, sizes = stack("memorizing", DENSE), {"width": 16, "heads": 2, "length": 12, "dtype": "float64"}
    with pytest.raises(attndsl.AttnError, match=r"is of <stack memo.* \w{16}, and the module of <stack memo"):
        attndsl.build(alike, **sizes)(x, state=module("memorizing")(x)[1].state)
    same = attndsl.build(stack("recurrent")(m=8), width=16, heads=2, length=12, dtype="float64")
    for one in (same, module("plain")):
        with pytest.raises(attndsl.AttnError, match="the state is of <stack recurrent"):
            one(x, state=state)
    with pytest.raises(attndsl.AttnError, match="the state is of <stack recurrent"):
        module("plain").session(2, 20, state)
    grouped = module("memorizing", kv_heads=1)
    with pytest.raises(attndsl.AttnError, match="the state is of 32 numbers a token, and the module of 16"):
        grouped(x, state=module("memorizing")(x)[1].state)
    with pytest.raises(attndsl.AttnError, match=r"x is \[2, m, 16\], not \[1, 3, 16\]"):
        made.session(2, 20).step(x[:1, :3])
    with pytest.raises(attndsl.AttnError, match=r"x is torch\.float32, and the module torch\.float64"):
        made.session(2, 20).step(x.float())
    wide = module("recurrent", width=32)
    with pytest.raises(attndsl.AttnError, match="the state is of 16 numbers a token, and the module of 32"):
        wide(torch.zeros(2, 12, 32, dtype=torch.float64), state=state)
    ahead = stack("ahead", "stack ahead { memory(xl(4)) { layers(1) { radius(2) } } }")
    # a table that a module makes of x has entries for a segment, wherever it is in such a stack
    beside = """attention told { inputs g : float[n]  mask causal  score s + g[k] }
stack beside { layers(1) { told }  memory(xl(4)) { layers(1) { causal } } }"""
    with pytest.raises(
        attndsl.AttnError, match="`g` is made of x, and has no entries for the segments before"
    ):
        attndsl.build(stack("beside", beside), **sizes, inputs={"g": nn.Identity})
    with pytest.raises(attndsl.AttnError, match="`radius` has no sessions"):
        attndsl.build(ahead, width=16, heads=2, length=12).session(1, 20)
