"""Tokens that leave: by published equations, by hand, beside the reference, and step by step."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attndsl
from attndsl.execution import registry
from attndsl.stacks import exits
from attndsl.stacks.leaving import Progress
from attndsl.stacks.reference import reference
from attndsl.stacks.run import Run
from attndsl.stacks.tree import Stack
from attndsl.stage import Seen, Word

TEXT = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention whole { mask causal  score alibi }
stack geometric_ { layers(4) { local  ffn(1)  exit(geometric) } }
stack multinomial_ { layers(4) { local  whole  ffn(1)  exit(multinomial) } }
stack sequence_ { layers(4) { local  exit(multinomial(of = sequence)) } }
stack margin_ { layers(4) { whole  ffn(1)  exit(margin, threshold = 0.15, decay = 4, batch = min) } }
stack scaled_ { loop(4) { share { whole  ffn(1) }  exit(margin, threshold = 0.3, decay = 4, scaled = true) } }
stack state_ { layers(4) { local  ffn(1)  exit(state, threshold = 0.96) } }
stack classifier_ { layers(4) { local  ffn(1)  exit(classifier, threshold = 0.6) } }
stack entropy_ { layers(4) { local  ffn(1)  exit(entropy, threshold = 1.1, batch = min) } }
stack confidence_ { layers(4) { local  ffn(1)  exit(confidence, threshold = 0.65) } }
stack signalled { loop(act, max = 5, signal = sinusoid) { share { local  ffn(1)  whole } } }
stack turning { loop(3, signal = sinusoid) { share { local  ffn(1) } } }
stack basic { loop(act(eps = 0.05, basic = true), max = 5) { share { local  ffn(1) } } }
stack onward { loop(act(onward = true), max = 5) { share { local  ffn(1) } } }
stack unpaid { loop(act(unpaid = true), max = 3) { share { local  ffn(1) } } }
stack kept { memory(xl(5)) { loop(act(onward = true), max = 4, signal = sinusoid) { share { whole } } } }
stack twice { layers(2) { local  exit(geometric) }  layers(3) { whole  exit(classifier, threshold = 0.6) } }
"""
NAMES = (
    *("geometric_", "multinomial_", "sequence_", "margin_", "scaled_", "state_", "classifier_", "entropy_"),
    *("confidence_", "signalled", "turning", "basic", "onward", "unpaid", "kept", "twice"),
)


def module(name: str, **options: Any) -> attndsl.StackModule:
    torch.manual_seed(0)
    made = attndsl.parse(TEXT)[name]
    assert isinstance(made, Stack)
    of: dict[str, Any] = {
        "width": 16,
        "heads": 2,
        "length": 40,
        "dtype": "float64",
        "init": "torch",
    } | options
    readout = nn.Linear(16, 6)
    nn.init.normal_(readout.weight, std=0.6)
    module = attndsl.build(made, **of, readout=readout).eval()
    for weight in module.words.parameters():
        nn.init.normal_(weight, std=0.5)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_modules_are_what_they_mean(name: str) -> None:
    made, x = module(name), torch.randn(3, 33, 16, dtype=torch.float64, requires_grad=True)
    found, record = made(x)
    meant = reference(made, x)
    torch.testing.assert_close(found, meant, rtol=0, atol=1e-12)
    turns = [*record.turns.values(), *(exit.turns for exit in record.exits.values())]
    if name not in ("turning", "sequence_"):
        assert all(len(taken.unique()) > 1 for taken in turns)
    ends, back = (x, *made.parameters()), torch.randn_like(found)
    for mine, theirs in zip(
        torch.autograd.grad(found, ends, back, allow_unused=True),
        torch.autograd.grad(meant, ends, back, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sequence_"])
def test_steps_are_the_last_tokens_of_the_whole_run(name: str) -> None:
    """One row, for `batch = min` lets rows leave together, whatever the piece."""
    made, x = module(name), torch.randn(1, 33, 16, dtype=torch.float64)
    session = made.session(1, 33)
    found = torch.cat([session.step(piece) for piece in x.split([7, 1, 1, 1, 9, 1, 1, 12], 1)], 1)
    torch.testing.assert_close(found, made(x)[0], rtol=0, atol=1e-12)


def test_what_has_left_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step, where no token goes on: keys and values are made, and nothing else."""
    made, x = module("geometric_"), torch.randn(2, 4, 16, dtype=torch.float64)
    for word in made.words.values():
        nn.init.constant_(word.bias, 50.0)  # type: ignore[arg-type]
    calls: list[str] = []
    for name, part in made.parts.items():
        part.inner.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[union-attr]
        if hasattr(part.inner, "o"):
            part.inner.o.register_forward_hook(lambda *_, name=name: calls.append(name))  # type: ignore[union-attr]
    session = made.session(2, 8)
    session.step(x)
    assert calls == ["0_local", "1_ffn"]
    assert all(of.lengths == (4, 4) for of in session.sessions.values())


def test_rows_that_go_on_are_gathered() -> None:
    """A step of several rows gives feed-forward layers those tokens alone that have not left."""
    made, x = module("geometric_"), 2 * torch.randn(3, 12, 16, dtype=torch.float64)
    depths, seen, session = made(x)[1].exits[0].turns, [0], made.session(3, 12)
    for part in made.parts.values():
        if hasattr(part.inner, "up"):
            part.inner.up.register_forward_hook(  # type: ignore[union-attr]
                lambda of, given, out: seen.append(given[0].shape[:-1].numel())
            )
    for token in x.split(1, 1):  # type: ignore[no-untyped-call]
        session.step(token)
    assert sum(seen) == int(depths.sum())
    assert (depths != depths[:1]).any()


def test_depths_are_forced() -> None:
    """In training too; the states of those that left are what upper layers read."""
    made, x = module("geometric_").train(), torch.randn(2, 9, 16, dtype=torch.float64)
    depths = torch.randint(1, 5, (2, 9))
    found, record = made(x, depths=depths)
    assert torch.equal(record.exits[0].turns, depths)
    torch.testing.assert_close(found, reference(made, x, depths={0: depths}), rtol=0, atol=1e-12)
    whole = made(x)[1].exits[0]
    assert len(whole.states) == 4
    torch.testing.assert_close(made.last(whole.states[-1]), made(x)[0])
    both = module("twice")
    two = {1: torch.full((2, 9), 2)}
    assert set(both(x, depths=two)[1].exits[1].turns.flatten().tolist()) == {2}
    for module_, given, said in (
        (made, torch.zeros(2, 9, dtype=torch.long), "depths are integers from 1 to 4"),
        (made, depths[:1], r"depths are integers \[2, 9\]"),
        (made, {1: depths}, "there is no exit 1"),
        (both, depths, "has 2 exits"),
    ):
        with pytest.raises(attndsl.AttnError, match=said):
            module_(x, depths=given)


def test_halting_by_the_published_equations() -> None:
    """Graves 2016, section 2.1: N is the first by which h sum up to 1 - eps, R what is left before it."""
    rng = np.random.default_rng(0)
    chances, states = rng.uniform(0, 0.6, (7, 50)), rng.normal(size=(7, 50, 3))
    taken, rest, output = np.zeros(50), np.zeros(50), np.zeros((50, 3))
    for i in range(50):
        total, n = 0.0, 0
        while n < 7:
            n += 1
            if total + chances[n - 1, i] >= 1 - 0.01 or n == 7:
                break
            output[i] += chances[n - 1, i] * states[n - 1, i]
            total += chances[n - 1, i]
        taken[i], rest[i] = n, 1 - total
        output[i] += rest[i] * states[n - 1, i]
    act = registry.plugin("stages", "act")
    word = Word("act", (("eps", 0.01), ("basic", False), ("onward", False), ("unpaid", False)))
    found = Progress.begun(torch.zeros(1, 50, 3, dtype=torch.float64))
    for turn in range(7):
        x, p = torch.tensor(states[None, turn]), torch.tensor(chances[None, turn, :, None])
        seen = Seen(x, x, found.running, turn, 7, carry=found.carry)
        found = found.after(x, act.decide(word, lambda x, p=p: p.logit(), seen), seen.last)
    np.testing.assert_allclose(found.y[0], output, atol=1e-12)
    np.testing.assert_array_equal(found.turns[0], taken)
    ponder = act.losses(word, found.turns, found.carry)["ponder"]
    assert float(ponder) == pytest.approx((taken + rest).mean())


@pytest.mark.parametrize(
    ("options", "weights", "turns"),
    [
        ({}, (0.3, 0.3, 0.4), 3),
        ({"basic": True}, (0.126, 0.18, 0.4), 3),
        ({"unpaid": True, "eps": 0.001}, (0.3, 0.3, 0.35), 3),
        ({"eps": 0.001}, (0.3, 0.3, 0.4), 3),
    ],
)
def test_weights_of_the_published_variants(
    options: dict[str, Any], weights: tuple[float, ...], turns: int
) -> None:
    """p = (.3, .3, .5); the last of three turns without remainder is (.3, .3, .35)."""
    act = registry.plugin("stages", "act")
    given = {"eps": 0.01, "basic": False, "onward": False, "unpaid": False} | options
    chances = (0.3, 0.3, 0.35) if options.get("unpaid") else (0.3, 0.3, 0.5)
    found = Progress.begun(torch.zeros(1, 1, 3))
    for turn, p in enumerate(chances):
        x = torch.eye(3)[None, turn : turn + 1]
        seen = Seen(x, x, found.running, turn, 3, carry=found.carry)
        decision = act.decide(
            Word("act", tuple(given.items())), lambda x, p=p: torch.full((1, 1, 1), p).logit(), seen
        )
        found = found.after(x, decision, seen.last)
    torch.testing.assert_close(found.y.flatten(), torch.tensor(weights))
    assert found.turns.item() == turns


def test_traces_of_confidences_by_hand() -> None:
    """Tokens of a vocabulary of three, whose logits are their states."""

    def sure(name: str, x: Tensor, before: Tensor | None = None) -> list[float]:
        plugin = registry.plugin("stages", name)
        running = torch.ones(x.shape[:2], dtype=torch.bool)
        seen = Seen(x, x if before is None else before, running, 0, 4, logits=lambda x: x)
        return plugin.confidence(Word(name), None, seen)[0].flatten().tolist()  # type: ignore[no-any-return]

    x = torch.tensor([[[0.5, 0.3, 0.2], [0.9, 0.06, 0.04], [1 / 3] * 3]], dtype=torch.float64).log()
    assert sure("margin", x) == pytest.approx([0.2, 0.84, 0])
    assert sure("confidence", x) == pytest.approx([0.5, 0.9, 1 / 3])
    entropies = [-sum(p * math.log(p) for p in ps) for ps in x.exp()[0].tolist()]
    assert sure("entropy", x) == pytest.approx(entropies)
    one, other = torch.tensor([[[3.0, 4.0, 0.0]]]), torch.tensor([[[4.0, 3.0, 0.0]]])
    assert sure("state", one, other) == pytest.approx([24 / 25])


def test_thresholds_fall_as_published() -> None:
    """0.9 l + 0.1 exp(-4 t / N), and in the code 0.9 l + 0.1 l exp(-4 t / N); tokens just above leave."""
    for name, threshold, scale in (("margin_", 0.15, 1.0), ("scaled_", 0.3, 0.3)):
        made = module(name)
        of = made.stack.layers[0]
        for above in (True, False):
            at = torch.arange(40, dtype=torch.float64)
            least = 0.9 * threshold + 0.1 * scale * torch.exp(-4 * at / 40)
            given = (least + (1e-9 if above else -1e-9))[None]
            seen = Seen(given[..., None], given[..., None], given > -1, 0, 4)
            assert Run(made, {}, 40)._leaves(of, given, seen).all() == above


def test_chances_sum_up_to_one() -> None:
    for name in ("geometric_", "multinomial_", "sequence_"):
        record = module(name).train()(torch.randn(2, 9, 16, dtype=torch.float64))[1]
        found = exits.chances(record.exits[0].sure)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, 9, dtype=torch.float64))
        depths = torch.randint(1, 5, (2, 9))
        loss = exits.leaving(record.exits[0].sure, depths)
        torch.testing.assert_close(loss, -found.gather(-1, depths[..., None] - 1).log().mean())
    made, x = module("multinomial_").train(), torch.randn(1, 5, 16, dtype=torch.float64)
    record = made(x)[1]
    scores = made.words["0"](record.exits[0].states[0])
    torch.testing.assert_close(exits.chances(record.exits[0].sure), scores.softmax(-1))


def test_tokens_leave_after_the_likeliest_layer() -> None:
    """Whether the chance of those left is a half or not: of .2, .35, .25 and .2 the second is .44."""
    for name in ("multinomial_", "sequence_"):
        made, x = module(name), torch.randn(2, 40, 16, dtype=torch.float64)
        chances = exits.chances(made.train()(x)[1].exits[0].sure)
        assert torch.equal(made.eval()(x)[1].exits[0].turns, chances.argmax(-1) + 1)


def test_oracles_by_hand() -> None:
    scores = torch.tensor([[[0.0, 1.0, 1.1], [2.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])
    assert exits.oracle(scores).tolist() == [[3, 1, 3]]
    assert exits.oracle(scores, penalty=0.2).tolist() == [[2, 1, 3]]
    near = [[math.exp(-((t - u) ** 2) / 0.5) for u in range(3)] for t in range(3)]
    smooth = [
        [sum(near[t][u] * float(scores[0, u, n]) for u in range(3)) for n in range(3)] for t in range(3)
    ]
    meant = [max(range(3), key=lambda n: smooth[t][n] - 0.2 * n) + 1 for t in range(3)]
    assert exits.oracle(scores, penalty=0.2, spread=0.5).tolist() == [meant]
    losses = [torch.tensor(float(i)) for i in (3, 2, 1)]
    assert float(exits.aligned(losses)) == pytest.approx((3 + 4 + 3) / 6)
    assert float(exits.aligned(losses, [1, 1, 1])) == pytest.approx(2)


def test_calibration_keeps_its_promise() -> None:
    """Of 400 draws the mean risk of what is chosen exceeds the tolerance in at most as many as the error."""
    torch.manual_seed(0)
    thresholds = [0.9, 0.7, 0.5, 0.3, 0.1]
    means = torch.tensor([0.02, 0.05, 0.08, 0.12, 0.3])
    chosen = []
    for _ in range(400):
        risks = (torch.rand(300, 5) < means).float()
        chosen.append(exits.calibrated(risks, thresholds, tolerance=0.1, error=0.1))
    wrong = sum(found is not None and found < 0.5 for found in chosen) / 400
    assert wrong <= 0.1
    assert sum(found in (0.7, 0.5) for found in chosen) > 300
    assert exits.calibrated(torch.ones(50, 5), thresholds, tolerance=0.1, error=0.1) is None
    with pytest.raises(attndsl.AttnError, match=r"risks are \[m, 5\], not \[3\]"):
        exits.calibrated(torch.ones(3), thresholds, tolerance=0.1, error=0.1)


def test_p_values_by_hand() -> None:
    """Of a mean of 0 of 10 numbers, tolerance 0.2: exp(-10 log(1 / 0.8)) = 0.8^10, less than e 0.8^10."""
    assert exits.p_value(0.0, 10, 0.2) == pytest.approx(0.8**10)
    binomial = sum(math.comb(10, k) * 0.2**k * 0.8 ** (10 - k) for k in range(2))
    kl = 0.1 * math.log(0.1 / 0.2) + 0.9 * math.log(0.9 / 0.8)
    assert exits.p_value(0.1, 10, 0.2) == pytest.approx(min(math.e * binomial, math.exp(-10 * kl)))


def test_parameters_of_a_loop_are_those_of_one_turn() -> None:
    stack = "stack ut(turns = 2) { loop(act, max = turns) { share { whole  ffn(2) } } }"
    ut: Any = attndsl.parse(f"attention whole {{ mask causal }} {stack}")["ut"]
    few, many = (
        sum(weight.numel() for weight in attndsl.build(ut(turns), width=8, heads=2, length=8).parameters())
        for turns in (2, 9)
    )
    assert few == many


@pytest.mark.parametrize("name", ["signalled", "basic", "geometric_"])
def test_gradcheck(name: str) -> None:
    made = module(name, length=6)
    made.train()
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: made(x)[0], (x,), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_is_counted(name: str) -> None:
    made = module(name)
    own = sum(weight.numel() for key, weight in made.named_parameters() if not key.startswith("readout"))
    assert attndsl.depth(made.stack, length=40, width=16, heads=2).parameters == own


@pytest.mark.slow
def test_pondering_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer turns where they cost more, of a task that is learned."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    learning = importlib.import_module("benchmarks.learning")
    free, dear = learning.ponder(steps=60, costs=(0.0, 0.1))
    assert dear < free - 0.5


def test_chances_of_one_have_slopes() -> None:
    """The sigmoid of 20 is 1 to rounding, and the chance of what comes after it 0."""
    given = torch.tensor([[20.0]], requires_grad=True)
    sure = [given.sigmoid(), torch.full((1, 1), 0.3), torch.full((1, 1), 0.5)]
    for depth, meant in ((1, 0.0), (2, 100 - np.log(0.3))):
        loss = exits.leaving(sure, torch.tensor([[depth]]))
        assert loss.item() == pytest.approx(meant, abs=1e-5)
        (slope,) = torch.autograd.grad(loss, given, retain_graph=True)
        assert slope.isfinite().all()


def test_an_exit_that_reads_whole_rows_looks_ahead() -> None:
    text = "attention near { mask causal & last(4) }"
    for of, status in (("token", "proved"), ("sequence", "refuted")):
        stack = f"stack rows {{ layers(3) {{ near  exit(multinomial(of = {of})) }} }}"
        program = attndsl.parse(f"{text} {stack} assert reach(rows) <= causal")
        assert [verdict.status for _, verdict in program.check()] == [status]


def test_no_rows_leave_together() -> None:
    stack: Any = attndsl.parse(
        "attention near { mask causal }"
        "stack rows { layers(2) { near  exit(margin, threshold = 0.5, batch = min) } }"
    )["rows"]
    module = attndsl.build(stack, width=8, heads=2, length=8, readout=torch.nn.Linear(8, 5)).eval()
    assert module(torch.zeros(0, 4, 8))[0].shape == (0, 4, 8)


def test_what_is_not_paid_is_no_loss() -> None:
    """Of three turns with a chance of .2 the first two add, and nothing remains to be paid."""
    act = registry.plugin("stages", "act")
    for unpaid, ponder in ((True, 3.0), (False, 3.6)):
        word = Word("act", (("eps", 0.01), ("basic", False), ("onward", False), ("unpaid", unpaid)))
        found, x = Progress.begun(torch.zeros(1, 1, 1)), torch.ones(1, 1, 1)
        for turn in range(3):
            seen = Seen(x, x, found.running, turn, 3, carry=found.carry)
            decision = act.decide(word, lambda x: torch.full_like(x, 0.2).logit(), seen)
            found = found.after(x, decision, seen.last)
        assert act.losses(word, found.turns, found.carry)["ponder"].item() == pytest.approx(ponder)
