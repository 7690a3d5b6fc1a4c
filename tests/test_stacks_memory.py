"""Memories of stacks: segments beside the reference, the whole run, and steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attndsl
from attndsl.execution import registry
from attndsl.stacks.reference import reference
from attndsl.stacks.run import State
from attndsl.stacks.tree import Stack
from attndsl.stage import Held, Word

TEXT = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention whole { mask causal  score alibi }
attention first { mask causal }
attention second { mask causal & last(9) }
attention differential(l = learn[H](0.8)) = first - l * second
attention joint { mask causal & (last(8) | topk(50, of = causal & ~last(8), by = Q @ K)) }
stack recurrent(m = 90) { memory(xl(m)) { layers(3) { local  whole  ffn(2) } } }
stack compressive { memory(xl(5), compressed(3, rate = 3, by = conv)) { layers(3) { whole  ffn(2) } } }
stack memorizing(many = 90) { memory(store(many)) { layers(2) { joint  ffn(2) } } }
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
NAMES = ("recurrent", "compressive", "memorizing", "undone", "document")


def module(name: str, *arguments: int, **options: Any) -> attndsl.StackModule:
    torch.manual_seed(0)
    made = attndsl.parse(TEXT)[name]
    assert isinstance(made, Stack)
    of: dict[str, Any] = {
        "width": 16,
        "heads": 2,
        "length": 12,
        "dtype": "float64",
        "init": "torch",
    } | options
    module = attndsl.build(made(*arguments), **of, readout=nn.Linear(16, 7)).eval()
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
    """Of as many tokens as the module is built for; and no more keys are held than these and the memory."""
    made, x = module(name), torch.randn(2, 43, 16, dtype=torch.float64)
    meant, _ = segments(made, x, 12)
    session, found = made.session(2, 43), []
    most = sum(
        12
        + sum(
            plugin.reach(word, 0)[0]
            for word in stage.memory
            for plugin in [registry.plugin("stages", word.name)]
        )
        for stage in made.stack.layers
        for turn in stage.turns
        for sublayer in turn
        if sublayer.name != "ffn"
    )
    for piece in x.split([7, 1, 1, 1, 20, 1, 1, 1, 10], 1):
        found.append(session.step(piece))
        assert session.keys <= most
    torch.testing.assert_close(torch.cat(found, 1), meant, rtol=0, atol=1e-12)
    _, record = made(x[:, :12])
    session = made.session(2, 43, record.state)
    torch.testing.assert_close(session.step(x[:, 12:19]), meant[:, 12:19], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "size"), [("recurrent", 7), ("memorizing", 9)])
def test_segments_with_memory_enough_are_the_whole_run(name: str, size: int) -> None:
    """As many chosen keys as there are in the store are all of them: attention is dense."""
    x = torch.randn(2, 47, 16, dtype=torch.float64)
    found, _ = segments(module(name), x, size)
    whole = module(name, length=47)
    torch.testing.assert_close(found, whole(x)[0], rtol=0, atol=1e-12)
    if name == "memorizing":
        dense = attndsl.parse(
            TEXT.replace("(last(8) | topk(50, of = causal & ~last(8), by = Q @ K))", "last(58)")
        )
        other = attndsl.build(dense["memorizing"], width=16, heads=2, length=47, dtype="float64")
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
    return Held(x, range(first, first + x.shape[1]))


def test_slots_are_those_of_the_states_in_turn() -> None:
    """Of 2 states each, 3 of them; what fills none stands as it is; the oldest goes."""
    plugin = registry.plugin("stages", "compressed")
    x = torch.arange(11.0).reshape(1, 11, 1)
    for by, first in (("mean", 0.5), ("max", 1.0)):
        word = Word("compressed", (("n", 3), ("rate", 2), ("by", by)))
        now, gone, _ = plugin.remember(word, None, None, held(x[:, :5]), None)
        assert (now.x.flatten().tolist(), now.at, now.loose) == ([first, first + 2, 4], [1, 3, 4], 1)
        assert gone is None or not gone.at
        now, gone, _ = plugin.remember(word, None, now, held(x[:, 5:6], 5), None)
        assert (now.x.flatten().tolist(), now.at, now.loose) == ([first, first + 2, first + 4], [1, 3, 5], 0)
        now, gone, _ = plugin.remember(word, None, now, held(x[:, 6:], 6), None)
        assert (now.x.flatten().tolist(), now.at) == ([first + 4, first + 6, first + 8, 10], [5, 7, 9, 10])
        assert (gone.x.flatten().tolist(), gone.at) == ([first, first + 2], [1, 3])


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


def test_states_are_values(tmp_path: Any) -> None:
    made, x = module("compressive"), torch.randn(2, 24, 16, dtype=torch.float64)
    _, record = made(x[:, :12])
    meant = made(x[:, 12:], state=record.state)[0]
    torch.testing.assert_close(made(x[:, 12:], state=record.state)[0], meant)
    assert isinstance(record.state, State)
    low = module("compressive", dtype="float32")
    assert low(x[:, 12:].float(), state=record.state.to(torch.float32))[0].isfinite().all()


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
    wide = module("recurrent", width=32)
    with pytest.raises(attndsl.AttnError, match="the state is of 16 numbers a token, and the module of 32"):
        wide(torch.zeros(2, 12, 32, dtype=torch.float64), state=state)
    ahead = attndsl.parse("stack ahead { memory(xl(4)) { layers(1) { radius(2) } } }")["ahead"]
    with pytest.raises(attndsl.AttnError, match="`radius` has no sessions"):
        attndsl.build(ahead, width=16, heads=2, length=12).session(1, 20)
