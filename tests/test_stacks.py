"""Stacks: their layers, what these reach, and their modules beside the reference."""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attndsl
from attndsl.command.cli import main
from attndsl.execution import registry
from attndsl.expr import Expr, const, substitute
from attndsl.layers.reach import through
from attndsl.meaning.pointwise import evaluate
from attndsl.stacks.leaving import Progress
from attndsl.stacks.reference import reference
from attndsl.stage import Seen, Word

TEXT = """
let windows = [2, 3, 5]
attention local(w = 4, step = 1) { mask causal & band(1 - w * step .. 0, step = step)  score alibi }
attention packed(z = learn[H](0.1)) { inputs doc : int[n]  mask causal & documents(doc)  score s + z }
attention whole { mask causal }
stack cycled(w = 2) { layers(5) { cycle { local(w)  local(w + 1)  whole }  ffn(4) } }
stack growing { layers(3) { local(w = windows[layer], step = [1, 2, 1][layer])  ffn(2, chunks = 3) } }
stack turning { loop(4) { share { local  ffn(2) } } }
stack fed { layers(2) { ffn(2) } }
stack mixed {
    layers(2) { local  share { ffn(1.5) } }
    layers(2, norm = post) { packed  ffn }
    loop(2, norm = sandwich) { share { packed  ffn(1) } }
}
"""


@pytest.fixture(scope="module")
def program() -> attndsl.Program:
    return attndsl.parse(TEXT)


def stack(program: attndsl.Program, name: str) -> attndsl.Stack:
    found: object = program[name]
    assert isinstance(found, attndsl.Stack)
    return found


def test_every_layer_is_written_out(program: attndsl.Program) -> None:
    cycled = stack(program, "cycled")
    assert [turn[0].name for turn in cycled.turns] == ["local", "local", "whole", "local", "local"]
    first, second, *_ = cycled.turns
    assert first[0].what == program["local"](2).attention
    assert second[0].what == program["local"](3).attention
    assert cycled(w=3).turns[0][0].what == second[0].what
    assert str(cycled).startswith("stack cycled(w = 2) {")
    assert repr(cycled(3)) == "<stack cycled(w = 3): 5 layers>"


def test_shared_turns_have_one_set_of_weights(program: attndsl.Program) -> None:
    turning, mixed = stack(program, "turning"), stack(program, "mixed")
    assert [[sub.weights for sub in turn] for turn in turning.turns] == [[0, 1]] * 4
    assert [[sub.weights for sub in turn] for turn in mixed.turns[:2]] == [[0, 1], [2, 1]]
    sizes = {count: numbers(attndsl.parse(TEXT.replace("loop(4)", f"loop({count})"))) for count in (1, 4)}
    assert sizes[1] == sizes[4]


def numbers(program: attndsl.Program) -> int:
    module = attndsl.build(stack(program, "turning"), width=8, heads=2, length=8)
    return sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("name", ["cycled", "growing", "turning", "mixed"])
def test_modules_do_what_the_reference_says(program: attndsl.Program, name: str) -> None:
    torch.manual_seed(0)
    module = attndsl.build(
        stack(program, name), width=12, heads=4, kv_heads=2, length=24, dtype="float64", init="torch"
    )
    x = torch.randn(2, 19, 12, dtype=torch.float64, requires_grad=True)
    tables = {"doc": torch.arange(19) // 7} if name == "mixed" else {}
    found, record = module(x, **tables)
    meant = reference(module, x, **tables)
    assert record.losses == {}
    torch.testing.assert_close(found, meant, rtol=0, atol=1e-12)
    ends = (x, *module.parameters())
    back = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, ends, back), torch.autograd.grad(meant, ends, back), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_the_reference_is_the_formula() -> None:
    """One layer of one head by hand."""
    one = attndsl.parse("stack one { layers(1) { causal  ffn(2) } }")
    torch.manual_seed(1)
    module = attndsl.build(stack(one, "one"), width=4, heads=1, length=5, dtype="float64", init="torch")
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    weights = {name: weight.numpy() for name, weight in module.state_dict().items()}

    def normed(x: NDArray[np.float64]) -> NDArray[np.float64]:
        centred = x - x.mean(-1, keepdims=True)
        scaled: NDArray[np.float64] = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled

    def by(name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        made: NDArray[np.float64] = x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)
        return made

    y = x[0].numpy()
    q, k, v = (by(f"parts.0_causal.inner.{name}", normed(y)) for name in "qkv")
    logits = np.where(np.tri(5, dtype=bool), q @ k.T / 2, -np.inf)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    y = y + by("parts.0_causal.inner.o", shares @ v)
    wide = torch.nn.functional.gelu(torch.from_numpy(by("parts.1_ffn.inner.up", normed(y)))).numpy()
    y = normed(y + by("parts.1_ffn.inner.down", wide))
    np.testing.assert_allclose(reference(module, x)[0].detach().numpy(), y, rtol=0, atol=1e-12)


HALTING = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention packed { inputs doc : int[n]  mask causal & documents(doc) }
attention far { mask causal & topk(2, of = causal, by = Q @ K) }
stack shared {
    loop(act(eps = 0.05), max = 6) { share { local  ffn(2)  packed  ffn(1) } }
    layers(1) { causal }
}
stack own { loop(act, max = 5, norm = post) { local  ffn(2)  share { causal } } }
stack changing { loop(act, max = 6) { cycle { local  ffn(2)  causal } } }
stack back { loop(act, max = 6) { share { cycle { local  ffn(2)  ffn(1) } } } }
stack longer { loop(act, max = 6) { cycle { share { ffn(2) }  causal }  share { cycle { local  ffn(1) } } } }
attention counted { offset n - nq  mask causal & { q, k : k > q - nq // 4 }  score s * nq / 9.0 }
stack counting { loop(act, max = 4) { share { counted  ffn(1) } } }
attention nystrom_like { approx nystrom(4) }
stack landmarks { loop(act, max = 4) { share { nystrom_like  ffn(1) } } }
stack choosing { loop(act(eps = 0.1), max = 4, norm = sandwich) { share { far  ffn(1) } } }
"""


@pytest.mark.parametrize(
    "name", ["shared", "own", "changing", "back", "longer", "choosing", "counting", "landmarks"]
)
def test_halted_tokens_are_attended_to_as_they_were(name: str) -> None:
    torch.manual_seed(0)
    made = stack(attndsl.parse(HALTING), name)
    module = attndsl.build(made, width=16, heads=2, length=40, dtype="float64", init="torch")
    torch.nn.init.normal_(module.words["0"].weight, std=0.5)
    torch.nn.init.constant_(module.words["0"].bias, -1.0)
    x = torch.randn(3, 33, 16, dtype=torch.float64, requires_grad=True)
    tables = {"doc": torch.arange(33) // 9} if name == "shared" else {}
    found, record = module(x, **tables)
    meant = reference(module, x, **tables)
    torch.testing.assert_close(found, meant, rtol=0, atol=1e-12)
    assert len(record.turns[0].unique()) >= 3
    ends = (x, *module.parameters())
    back = torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, ends, back), torch.autograd.grad(meant, ends, back), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_the_published_numbers_of_halting() -> None:
    """p = (.3, .3, .5), eps = .01: three turns, .4 remains for the last, and the weights are (.3, .3, .4)."""
    act, word = (
        registry.plugin("stages", "act"),
        Word("act", (("eps", 0.01), ("basic", False), ("onward", False), ("unpaid", False))),
    )
    found = Progress.begun(torch.zeros(1, 1, 1))
    for turn, chance in enumerate((0.3, 0.3, 0.5)):
        assert bool(found.running)
        x = torch.full((1, 1, 1), 10.0**turn)
        seen = Seen(x, x, found.running, turn, 5, carry=found.carry)
        decision = act.decide(word, lambda x, p=chance: torch.full_like(x, p).logit(), seen)
        found = found.after(x, decision, seen.last)
    assert not bool(found.running)
    assert found.turns.item() == 3
    assert found.carry["left"].item() == pytest.approx(0.4)
    assert found.y.item() == pytest.approx(0.3 * 1 + 0.3 * 10 + 0.4 * 100)


def test_pondering_is_a_loss_that_shortens_it() -> None:
    torch.manual_seed(0)
    made = stack(attndsl.parse(HALTING), "choosing")
    module = attndsl.build(made, width=8, heads=2, length=16)
    torch.nn.init.constant_(module.words["0"].bias, -1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    x = torch.randn(2, 16, 8)
    first = module(x)[1].turns[0].float().mean()
    for _ in range(8):
        optimizer.zero_grad()
        module(x)[1].losses["ponder.0"].backward()
        optimizer.step()
    assert module(x)[1].turns[0].float().mean() < first - 0.5


CAUSAL = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention whole { mask causal }
stack plain { layers(4) { cycle { local  whole }  ffn(2) } }
stack posted { layers(2, norm = post) { local  ffn(1) }  loop(2) { share { whole  ffn(1) } } }
stack halting { loop(act(eps = 0.05), max = 5) { share { local  ffn(1)  whole } }  layers(1) { whole } }
"""


def test_loops_that_halt_are_counted() -> None:
    local = "attention local { mask causal & last(4) }"
    loop = "loop(act, max = 3) { share { local } }"
    program = attndsl.parse(
        f"{local} stack late {{ layers(1) {{ local }}  {loop}  layers(1) {{ ffn(2) }}  {loop} }}"
    )
    _, record = attndsl.build(stack(program, "late"), width=8, heads=2, length=8)(torch.randn(1, 8, 8))
    assert [*record.losses] == ["ponder.0", "ponder.1"]
    assert [*record.turns] == [0, 1]


@pytest.mark.parametrize("name", ["plain", "posted", "halting"])
def test_steps_are_the_last_tokens_of_the_whole_run(name: str) -> None:
    torch.manual_seed(0)
    made = stack(attndsl.parse(CAUSAL), name)
    module = attndsl.build(made, width=8, heads=2, length=20, dtype="float64", init="torch")
    for chance in module.words.values():
        torch.nn.init.normal_(chance.weight, std=0.5)
        torch.nn.init.constant_(chance.bias, -1.0)
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    session = module.session(2, 17)
    pieces = [session.step(piece) for piece in x.split([6, 1, 1, 4, 1, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), module(x)[0], rtol=0, atol=1e-12)
    assert repr(session).endswith("17 tokens in 2 rows>")


def test_generated_tokens_are_those_of_the_whole_run() -> None:
    torch.manual_seed(0)
    made = stack(attndsl.parse(CAUSAL), "plain")
    embed, readout = nn.Embedding(11, 8), nn.Linear(8, 11)
    module = attndsl.build(
        made, width=8, heads=2, length=24, dtype="float64", init="torch", embed=embed, readout=readout
    )
    prompt = torch.randint(11, (2, 5))
    found = attndsl.generate(module, prompt, 9)
    tokens = prompt
    for _ in range(9):
        following = readout(module(embed(tokens))[0][:, -1]).argmax(-1)
        tokens = torch.cat([tokens, following[:, None]], 1)
    assert torch.equal(found, tokens)


def test_stacks_that_look_ahead_do_not_generate() -> None:
    made = stack(attndsl.parse("stack both { layers(2) { radius(2)  ffn } }"), "both")
    tokens, sizes = torch.zeros(1, 3, dtype=torch.long), {"width": 8, "heads": 2, "length": 24}
    module = attndsl.build(made, **sizes, embed=nn.Embedding(5, 8), readout=nn.Linear(8, 5))
    with pytest.raises(attndsl.AttnError, match="`radius` has no sessions"):
        attndsl.generate(module, tokens, 2)
    with pytest.raises(attndsl.AttnError, match="the module has no `embed`"):
        attndsl.generate(attndsl.build(made, **sizes), tokens, 2)


@pytest.mark.parametrize(("text", "name"), [(TEXT, "cycled"), (TEXT, "growing"), (HALTING, "own")])
def test_costs_are_those_that_torch_counts(text: str, name: str) -> None:
    made = stack(attndsl.parse(text), name)
    module = attndsl.build(made, width=16, heads=4, kv_heads=2, length=40)
    for chance in module.words.values():
        torch.nn.init.constant_(chance.bias, -50.0)
    found = attndsl.depth(made, length=40, width=16, heads=4, kv_heads=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.randn(1, 40, 16))
    assert found.flops is not None
    assert found.flops.forward == counter.get_total_flops()
    assert found.parameters == sum(weight.numel() for weight in module.parameters())
    assert f"{found.parameters:,}" in str(found)
    session = module.session(1, 40)
    session.step(torch.randn(1, 40, 16))
    assert found.bytes <= sum(held.k.nbytes + held.v.nbytes for held in session.sessions.values())


def test_costs_count_all_that_is_learned() -> None:
    """Vectors, and what the parts of a sum learn."""
    made = stack(attndsl.parse(LEARNED), "learned")
    module = attndsl.build(made, width=16, heads=4, head_dim=6, length=8)
    found = attndsl.depth(made, length=8, width=16, heads=4, head_dim=6)
    assert found.parameters == sum(weight.numel() for weight in module.parameters())


LEARNED = """
attention sunk(z = learn[D](0.1)) { mask causal  score s + Q @ z  norm softmax(sink = learn[H](0.2)) }
attention whole { mask causal }
attention less(l = learn[H](0.5)) = sunk - l * whole
stack learned { layers(2) { sunk  share { less } } }
"""


def test_depth_says_what_the_last_query_sees(program: attndsl.Program) -> None:
    """That is, what changes its output: a change in one token, of each of them."""
    made = stack(program, "growing")
    found = attndsl.depth(made, length=24, width=8, heads=2)
    module = attndsl.build(made, width=8, heads=2, length=24, dtype="float64", init="torch")
    x = torch.randn(1, 24, 8, dtype=torch.float64)
    changed = x.repeat(24, 1, 1)
    changed[range(24), range(24), 0] += 1
    ends = module(changed)[0][:, -1] - module(x)[0][:, -1]
    changes = int((ends.abs().amax(-1) > 1e-12).sum())
    assert found.levels[-1].sees == (changes, changes)
    assert [level.sees for level in found.levels] == [(2, 2), (6, 6), (10, 10)]


def test_layers_of_one_attention_share_a_plan(program: attndsl.Program) -> None:
    module = attndsl.build(stack(program, "cycled"), width=8, heads=2, length=8)
    plans = {
        id(part.inner.attention.plan) for part in module.parts.values() if hasattr(part.inner, "attention")
    }
    assert len(plans) == 3


def test_chunks_change_nothing(program: attndsl.Program) -> None:
    chunked = stack(program, "growing")
    whole = stack(attndsl.parse(TEXT.replace("ffn(2, chunks = 3)", "ffn(2)")), "growing")
    module, other = (attndsl.build(one, width=8, heads=2, length=16) for one in (chunked, whole))
    other.load_state_dict(module.state_dict())
    x = torch.randn(1, 16, 8)
    torch.testing.assert_close(module(x)[0], other(x)[0])


MASKS = (
    "causal & last(3)",
    "radius(1)",
    "causal & { q, k : (q - k) mod 3 == 0 }",
    "causal & { q, k : (q - k) mod 4 <= 1 and q - k < 9 }",
    "band(1 .. 2)",
    "global([0])",
    "block(4)",
)


@pytest.mark.parametrize("seed", range(8))
def test_reach_is_the_product_of_the_layers(seed: int) -> None:
    chosen = random.Random(seed).choices(MASKS[: 4 if seed < 4 else None], k=3)
    masks = [attndsl.parse(f"attention a {{ mask {mask} }}")["a"].attention.any_head() for mask in chosen]
    n = 17
    steps = [matrix(mask, n) | np.eye(n, dtype=bool) for mask in masks]
    meant = functools.reduce(
        lambda lower, upper: (upper @ lower).astype(bool), (s.astype(int) for s in steps)
    )
    found = matrix(through([(mask, 1) for mask in masks]), n)
    np.testing.assert_array_equal(found, meant.astype(bool), str(chosen))


def matrix(mask: Expr, n: int) -> NDArray[np.bool_]:
    q, k = np.mgrid[:n, :n]
    return evaluate(substitute(mask, {"n": const(n)}), q, k).astype(bool)


def test_assertions_are_about_all_layers() -> None:
    text = TEXT + "\n".join(
        f"assert {claim}"
        for claim in (
            "reach(cycled) == causal",
            "reach(growing) == causal & last(1 + 1 + 4 + 4)",
            "reach(growing) <= causal & last(9)",
            "reach(turning) == causal & last(13)",
            "reach(cycled(w = 5)) <= causal",
            "reach(mixed) <= causal",
        )
    )
    verdicts = [verdict.status for _, verdict in attndsl.parse(text).check()]
    assert verdicts == ["proved", "proved", "refuted", "proved", "proved", "proved"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"width": 10, "heads": 4, "length": 8}, "a width of 10 is no multiple of 4 heads"),
        ({"width": 8, "heads": 0, "length": 8}, "`heads` is 0, and must be positive"),
        ({"width": 8, "heads": 4, "length": 8, "dtype": "int8"}, "`dtype` is int8"),
        ({"width": 8, "heads": 4, "kv_heads": 3, "length": 8}, "heads"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    program: attndsl.Program, call: dict[str, object], said: str
) -> None:
    for function in (attndsl.build, attndsl.depth):
        for name in ("cycled", "fed") if "kv_heads" not in call else ("cycled",):
            with pytest.raises(attndsl.AttnError, match=said):
                function(stack(program, name), **call)  # type: ignore[operator]


def test_inits_are_known(program: attndsl.Program) -> None:
    with pytest.raises(attndsl.AttnError, match="unknown init `xavier`"):
        attndsl.build(stack(program, "cycled"), width=8, heads=4, length=8, init="xavier")


def test_calls_that_do_not_fit_are_refused(program: attndsl.Program) -> None:
    module = attndsl.build(stack(program, "cycled"), width=8, heads=2, length=8)
    for given, said in (
        (torch.zeros(1, 9, 8), "x has 9 positions, and the stack is built for 8"),
        (torch.zeros(1, 4, 6), r"x is \[B, n, 8\], not \[1, 4, 6\]"),
        (torch.zeros(4, 8), r"x is \[B, n, 8\], not \[4, 8\]"),
    ):
        with pytest.raises(attndsl.AttnError, match=said):
            module(given)
    with pytest.raises(attndsl.AttnError, match="no attention of `cycled` has an input `doc`"):
        module(torch.zeros(1, 4, 8), doc=torch.zeros(4))
    with pytest.raises(attndsl.AttnError, match="no attention of `cycled` has an input `doc`"):
        attndsl.depth(stack(program, "cycled"), length=8, width=8, heads=2, doc=torch.zeros(4))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_nothing_is_made_of_nothing(shape: tuple[int, ...]) -> None:
    module = attndsl.build(stack(attndsl.parse(HALTING), "own"), width=8, heads=2, length=8)
    found, record = module(torch.zeros(shape))
    assert found.shape == shape
    assert record.turns[0].shape == shape[:2]


def test_modules_are_compiled_whole_and_cast(program: attndsl.Program) -> None:
    module = attndsl.build(stack(program, "turning"), width=8, heads=2, length=8)
    x = torch.randn(1, 8, 8)
    whole = torch.compile(lambda x: module(x)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), module(x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.bfloat16())[0].isfinite().all()
    with pytest.raises(attndsl.AttnError, match=r"x is torch\.float64, and the module torch\.float32"):
        module(x.double())


def test_stacks_are_shown_and_say_what_they_have_not(program: attndsl.Program) -> None:
    assert "stack cycled, stack growing" in repr(program)
    with pytest.raises(AttributeError, match=r"a stack has no attribute `module`: write `attndsl.build\("):
        stack(program, "cycled").module  # type: ignore[attr-defined]  # noqa: B018
    assert copy.copy(stack(program, "cycled")) == stack(program, "cycled")


def test_stacks_are_no_attentions(program: attndsl.Program, tmp_path: Path) -> None:
    with pytest.raises(attndsl.AttnError, match="`cycled` is a stack, and no attention"):
        attndsl.compile(program["cycled"], length=8)
    with pytest.raises(attndsl.AttnError, match="expected a stack, not Bound"):
        attndsl.build(program["local"], width=8, heads=2, length=8)  # type: ignore[arg-type]
    file = tmp_path / "model.attn"
    file.write_text(TEXT, encoding="utf-8")
    shown = CliRunner().invoke(main, ["show", f"{file}:cycled", "--length", "8"]).output
    assert "layers 0, 3: local" in shown
    told = CliRunner().invoke(main, ["analyze", f"{file}:cycled", "--length", "8", "--heads", "2"]).output
    assert "cycled: 5 layers at 8 tokens" in told


def test_stacks_without_choices_are_exported(program: attndsl.Program) -> None:
    module = attndsl.build(stack(program, "cycled"), width=8, heads=2, length=8).eval()

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.module(x)[0]
            return y

    x = torch.randn(1, 8, 8)
    exported = torch.export.export(Output(), (x,))
    torch.testing.assert_close(exported.module()(x), module(x)[0])
