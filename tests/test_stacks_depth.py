"""What is said of a stack beside what is measured of its module."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attndsl
from attndsl import pictures
from attndsl.command.cli import main
from attndsl.stacks.tree import Stack

TEXT = """
attention local(w = 16) { mask causal & last(w)  score alibi }
attention whole { mask causal }
attention far { mask causal & topk(3, of = last(16), by = Q @ K) }
attention second { mask causal & last(9) }
attention differential(l = learn[H](0.8)) = whole - l * second
stack cycled { layers(4) { cycle { local  whole }  ffn(2.5) } }
stack posted { layers(2, norm = post) { tied { local }  ffn(4, chunks = 3) } }
stack between { layers(2, norm = sandwich) { whole  ffn(1) }  loop(3) { share { local  ffn(2) } } }
stack summed { layers(2) { own(second = qk) { differential } } }
stack undone { reversible { layers(4) { local  ffn(2) } } }
stack pieces { layers(1) { local }  reversible { layers(2) { local  ffn(2, chunks = 3) } } }
stack halting { layers(1) { local }  loop(act, max = 4) { share { whole  ffn(2) } } }
stack exiting { layers(4) { local  ffn(2)  exit(geometric) } }
stack coupled { layers(4) { local  ffn(2)  exit(state, threshold = 0.9, batch = min) } }
stack recurrent { memory(xl(16)) { layers(3) { local  ffn(2) } } }
stack slotted { memory(xl(8), compressed(4, rate = 2)) { layers(2) { local(12) } } }
"""
SIZES: dict[str, Any] = {"length": 64, "width": 32, "heads": 4}


def stack(name: str, text: str = TEXT) -> Stack:
    made = attndsl.parse(text)[name]
    assert isinstance(made, Stack)
    return made


def counted(module: attndsl.StackModule, x: Tensor, **call: Any) -> tuple[int, int]:
    """FLOPs of a forward pass and of both."""
    with FlopCounterMode(display=False) as forward:
        y, _ = module(x, **call)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(
    "name", ["cycled", "posted", "between", "summed", "undone", "pieces", "halting", "exiting", "recurrent"]
)
def test_flops_are_those_that_torch_counts(name: str) -> None:
    found = attndsl.depth(stack(name), **SIZES, kv_heads=2 if name == "cycled" else 4)
    module = attndsl.build(stack(name), **SIZES, kv_heads=2 if name == "cycled" else 4)
    for word in module.words.values():
        nn.init.constant_(word.bias, -50.0)  # type: ignore[arg-type]
    x, call = torch.randn(1, 64, 32, requires_grad=True), dict[str, Any]()
    if name == "recurrent":
        call["state"] = module(torch.randn(1, 64, 32))[1].state
    forward, backward = counted(module, x, **call)
    assert found.flops is not None
    if name == "exiting":  # how sure each layer is costs a linear map
        forward -= 4 * 2 * 64 * 32
    if name == "summed":  # a gate that is learned is an attention of one key, whose value is one number
        forward -= 2 * 64 * 4 * (2 * 8 + 2)
        backward -= 2 * 64 * 4 * (3 * 2 * 8 + 2 * 2)
    assert found.flops.forward == forward
    assert found.flops.backward == backward


def test_flops_fall_with_depth() -> None:
    """Of tokens that all leave at the same, where nothing is computed behind it but keys and values."""
    found, module = attndsl.depth(stack("exiting"), **SIZES), attndsl.build(stack("exiting"), **SIZES)
    x = torch.randn(1, 64, 32)
    for depth in (1, 2, 4):
        half = torch.full((1, 64), depth)
        half[:, ::64] = 4  # one goes on, so that the others are kept
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x, depths=half)
        mean = float(half.float().mean())
        assert found.flops_at(mean) == pytest.approx(counter.get_total_flops() - 4 * 2 * 64 * 32, rel=0.06)
    assert found.flops is not None
    assert found.flops_at(4) == found.flops.forward


@pytest.mark.parametrize("name", ["cycled", "between", "halting"])
def test_formulas_are_of_every_size(name: str) -> None:
    """Read by sympy, and asked of another length and width."""
    formulas = attndsl.depth(stack(name), **SIZES).formulas
    assert formulas is not None
    other = attndsl.depth(stack(name), length=96, width=48, heads=4)
    assert other.flops is not None
    values = {"n": 96, "width": 48, "depth": 4}
    symbols = {name: sympy.Symbol(name, positive=True) for name in values}
    at = {symbols[name]: value for name, value in values.items()}
    assert sympy.sympify(formulas["flops"], symbols).subs(at) == other.flops.forward
    assert sympy.sympify(formulas["parameters"], symbols).subs(at) == other.parameters


def saved(module: attndsl.StackModule, x: Tensor) -> int:
    own, kept = {weight.untyped_storage().data_ptr() for weight in module.parameters()}, dict[int, int]()
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


@pytest.mark.parametrize("name", ["cycled", "posted", "between", "summed", "undone"])
def test_activations_are_those_that_autograd_keeps(name: str) -> None:
    sizes = SIZES | {"length": 256, "width": 64}
    told = attndsl.depth(stack(name), **sizes).activations
    found = saved(attndsl.build(stack(name), **sizes), torch.randn(1, 256, 64, requires_grad=True))
    if name == "undone":  # two streams and the last norm
        assert found == pytest.approx(3 * 256 * 64 * 4, rel=0.05)
        assert found <= told.reversible < told.checkpointed < told.plain
    else:
        assert found == pytest.approx(told.plain, rel=0.05)


@pytest.mark.parametrize("name", ["cycled", "between", "halting", "exiting"])
def test_kept_keys_are_those_that_sessions_need(name: str) -> None:
    """All of them, and their bytes."""
    found, module = attndsl.depth(stack(name), **SIZES), attndsl.build(stack(name), **SIZES)
    session = module.session(1, 64)
    slots = sum(of.slots - (of.ring > 0) for of in session.sessions.values())
    assert sum(level.kept for level in found.levels) == slots + sum(
        of.ring > 0 for of in session.sessions.values()
    )
    held = sum(of.k[:, :, :1].nbytes + of.v[:, :, :1].nbytes for of in session.sessions.values())
    assert found.bytes * len(session.sessions) == sum(level.kept for level in found.levels) * held


MASKS = (
    "causal & last(3)",
    "radius(1)",
    "causal & { q, k : (q - k) mod 3 == 0 }",
    "band(1 .. 2)",
    "global([0])",
    "block(4)",
    "causal & topk(2, of = last(5), by = Q @ K)",
)


def changes(module: attndsl.StackModule, n: int, size: int) -> int:
    """Of how many tokens a change changes the last output."""
    x = torch.randn(1, n, 16, dtype=torch.float64)
    changed = x.repeat(n + 1, 1, 1)
    changed[range(n), range(n)] += torch.randn(n, 16, dtype=torch.float64)
    state: Any = None
    for segment in changed.split(size, 1):
        y, record = module(segment, state=state)
        state = record.state
    return int(((y[:n, -1] - y[n, -1]).abs().amax(-1) > 1e-13).sum())


@pytest.mark.parametrize("seed", range(10))
def test_what_is_seen_is_what_changes_the_output(seed: int) -> None:
    """Five draws of weights each; static patterns exactly, content and halting within their bounds."""
    draw = random.Random(seed)
    masks = draw.choices(MASKS[: 6 if seed % 2 else None], k=3)
    text = "".join(f"attention a{i} {{ mask {mask} }}\n" for i, mask in enumerate(masks))
    halts = seed % 3 == 2
    kind = "loop(act, max = 3)" if halts else "layers(1)"
    text += f"stack deep {{ layers(1) {{ a0  a1 }}  {kind} {{ a2  ffn(1) }} }}"
    found = attndsl.depth(stack("deep", text), length=15, width=16, heads=2).levels[-1].sees
    assert found is not None
    for weights in range(5):
        torch.manual_seed(weights)
        module = attndsl.build(
            stack("deep", text), width=16, heads=2, length=15, batch=16, dtype="float64", init="torch"
        )
        seen = changes(module, 15, 15)
        assert found[0] <= seen <= found[1]
        if not halts and not any("topk" in mask for mask in masks):
            assert found[0] == seen == found[1]


@pytest.mark.parametrize(("memory", "exact"), [("xl(5)", True), ("xl(4), compressed(2, rate = 2)", False)])
def test_memories_are_seen_through(memory: str, exact: bool) -> None:
    text = f"""
    attention a {{ mask causal & last(7) }}
    stack deep {{ memory({memory}) {{ layers(2) {{ a }} }} }}
    """
    found = attndsl.depth(stack("deep", text), length=6, width=16, heads=2).levels[-1].sees
    assert found is not None
    for weights in range(5):
        torch.manual_seed(weights)
        module = attndsl.build(
            stack("deep", text), width=16, heads=2, length=6, batch=31, dtype="float64", init="torch"
        )
        seen = changes(module, 30, 6)
        assert found[0] <= seen <= found[1]
        assert not exact or found[0] == seen == found[1]


def test_it_is_told_in_80_columns() -> None:
    for name in ("cycled", "halting", "coupled", "recurrent", "slotted", "summed"):
        told = str(attndsl.depth(stack(name), **SIZES))
        assert max(map(len, told.splitlines())) <= 80
    assert "those of a batch leave together" in str(attndsl.depth(stack("coupled"), **SIZES))
    assert "16 keys before the segment" in str(attndsl.depth(stack("recurrent"), **SIZES))


def test_commands_know_stacks(tmp_path: Path) -> None:
    file, page, picture = tmp_path / "deep.attn", tmp_path / "deep.html", tmp_path / "deep.svg"
    file.write_text(TEXT)

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(main, [*arguments], catch_exceptions=False)
        told = result.output.replace(f"{tmp_path}/", "")
        assert max(map(len, told.splitlines()), default=0) <= 80
        return told

    shown = said("show", f"{file}:cycled", "--length", "32")
    assert "layers 0, 2: local" in shown
    assert "layers 1, 3: whole" in shown
    compared = said("compare", f"{file}:cycled", f"{file}:halting", "--length", "64", "--heads", "2")
    assert "sees at least" in compared
    assert compared.splitlines()[0].split() == ["cycled", "halting"]
    mixed = said("compare", f"{file}:cycled", f"{file}:local", "--length", "64")
    assert "is a stack, and" in mixed
    said("report", f"{file}:cycled", "--length", "64", "-o", str(page))
    assert '<h2 id="layers">Layers</h2>' in page.read_text()
    said("show", f"{file}:cycled", "--length", "32", "-o", str(picture))
    assert picture.read_bytes().startswith(b"<?xml")
    assert "`--head` is of one attention" in said("show", f"{file}:cycled", "--length", "32", "--head", "1")


def test_turns_of_a_run_are_drawn() -> None:
    module = attndsl.build(stack("halting"), **SIZES)
    record = module(torch.randn(2, 64, 32))[1]
    assert pictures.render(pictures.turns(record.turns[0], "turns"), "png").startswith(b"\x89PNG")
    with pytest.raises(attndsl.AttnError, match=r"turns are \[B, n\], not \[64\]"):
        pictures.turns(record.turns[0][0])
