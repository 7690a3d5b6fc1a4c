"""What attentions of a stack are given beside their text: projections, tables made of x, positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attndsl
from attndsl.stacks.layers import turned
from attndsl.stacks.reference import reference
from attndsl.stacks.tree import Stack

TEXT = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention whole { mask causal }
attention hashed { mask causal & lsh(2, 4)  score shared_qk }
attention first { mask causal }
attention second { mask causal & last(9) }
attention differential(l = learn[H](0.8)) = first - l * second
attention gated { inputs gate : float[B, H, n] }
    = sigmoid(gate[q]) * local(3) + (1 - sigmoid(gate[q])) * whole
stack tied_ { layers(2) { tied { hashed }  tied { cycle { whole  local } }  ffn(1) } }
stack parted { layers(2) { own(second = qk) { differential }  own(whole) { gated } } }
stack remembered { memory(xl(40)) { layers(2) { own(second = qk) { differential }  whole } } }
stack halting { loop(act, max = 3) { share { own(second = qk) { differential }  gated  local  ffn(1) } } }
"""


class Gate(nn.Module):
    """A gate of each head."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x).transpose(1, 2)


def stack(name: str) -> Stack:
    found = attndsl.parse(TEXT)[name]
    assert isinstance(found, Stack)
    return found


def module(name: str) -> attndsl.StackModule:
    inputs = {"gate": Gate} if name in ("parted", "halting") else None
    made = attndsl.build(
        stack(name), width=16, heads=2, length=40, dtype="float64", init="torch", rotary=100.0, inputs=inputs
    )
    for word in made.words.values():
        nn.init.normal_(word.weight, std=0.5)
    return made


@pytest.mark.parametrize("name", ["tied_", "parted", "remembered", "halting"])
def test_modules_are_what_they_mean(name: str) -> None:
    torch.manual_seed(0)
    made, x = module(name), torch.randn(2, 33, 16, dtype=torch.float64, requires_grad=True)
    found, meant = made(x)[0], reference(made, x)
    torch.testing.assert_close(found, meant, rtol=0, atol=1e-12)
    ends, back = (x, *made.parameters()), torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, ends, back), torch.autograd.grad(meant, ends, back), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["parted", "halting"])
def test_steps_are_the_last_tokens_of_the_whole_run(name: str) -> None:
    """Tables made of x grow with the tokens, and positions go on."""
    torch.manual_seed(0)
    made, x = module(name), torch.randn(2, 20, 16, dtype=torch.float64)
    session = made.session(2, 20)
    steps = torch.cat([session.step(piece) for piece in x.split([7, 1, 1, 4, 7], 1)], 1)
    torch.testing.assert_close(steps, made(x)[0], rtol=0, atol=1e-12)


def test_segments_are_the_whole_run() -> None:
    torch.manual_seed(0)
    made, x = module("remembered"), torch.randn(2, 33, 16, dtype=torch.float64)
    state, found = None, []
    for segment in x.split([7, 9, 1, 10, 6], 1):
        y, record = made(segment, state=state)
        found.append(y)
        state = record.state
    torch.testing.assert_close(torch.cat(found, 1), made(x)[0], rtol=0, atol=1e-12)


def test_what_is_turned_depends_on_distances() -> None:
    """And on nothing else; at position 0 nothing is turned."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()
    products = [(turned(q, a, 50.0) * turned(k, b, 50.0)).sum() for a, b in ((5, 3), (12, 10))]
    torch.testing.assert_close(*products)
    torch.testing.assert_close(turned(q, 0, 50.0), q)
    assert not torch.allclose(turned(q, 1, 50.0), q)


@pytest.mark.parametrize("name", ["tied_", "remembered"])
def test_numbers_of_projections_are_counted(name: str) -> None:
    made = module(name)
    found = attndsl.depth(stack(name), length=40, width=16, heads=2)
    assert found.parameters == sum(weight.numel() for weight in made.parameters())


def test_what_does_not_go_together_is_refused() -> None:
    sizes = {"width": 16, "heads": 4, "length": 8}
    for name, options, said in (
        ("tied_", {"kv_heads": 2}, "4 heads of queries and 2 of keys are not the same"),
        ("parted", {"rotary": 0.0}, "rotary 0.0 of 4 numbers of a head"),
        ("parted", {"inputs": {"gait": Gate}}, "has an input `gait`"),
    ):
        with pytest.raises(attndsl.AttnError, match=said):
            attndsl.build(stack(name), **sizes, **options)  # type: ignore[arg-type]
    text = TEXT + "stack kept { memory(xl(4)) { layers(2) { gated } } }"
    with pytest.raises(
        attndsl.AttnError, match="`gate` is made of x, and has no entries for the segments before"
    ):
        attndsl.build(attndsl.parse(text)["kept"], **sizes, inputs={"gate": Gate})  # type: ignore[arg-type]
    with pytest.raises(attndsl.AttnError, match="`gate` is made of x"):
        module("parted")(torch.zeros(1, 4, 16, dtype=torch.float64), gate=torch.zeros(1, 2, 4))


def test_tokens_are_embedded_where_there_is_what_embeds_them() -> None:
    made = attndsl.build(stack("tied_"), width=16, heads=2, length=40, embed=nn.Embedding(5, 16))
    tokens = torch.randint(5, (2, 9))
    torch.testing.assert_close(made(tokens)[0], made(made.embed(tokens))[0])
