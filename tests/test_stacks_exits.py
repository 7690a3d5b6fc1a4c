"""Tokens that leave: halting and exits beside the published equations, by hand and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attndsl
from attndsl.stacks import exits
from attndsl.stacks.calibration import hoeffding_bentkus
from attndsl.stacks.module import StackModule
from attndsl.stacks.reference import reference

Array = NDArray[np.float64]
ATTENTIONS = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention whole { mask causal }
attention far { mask causal & topk(2, of = causal, by = Q @ K) }
"""
BODY = "cycle { local  whole }  ffn(1)"


def made(stages: str, attentions: str = ATTENTIONS, **sizes: Any) -> StackModule:
    torch.manual_seed(0)
    stack: Any = attndsl.parse(f"{attentions} stack adaptive {{ {stages} }}")["adaptive"]
    given = {"width": 8, "heads": 2, "length": 24, "dtype": "float64", "init": "torch", **sizes}
    module = attndsl.build(stack, **given)
    for word in module.words.values():
        nn.init.normal_(word.weight, std=1.0)
    return module.eval()


def readout(width: int = 8, tokens: int = 7) -> nn.Module:
    torch.manual_seed(1)
    last = nn.Linear(width, tokens)
    nn.init.normal_(last.weight)
    return last


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def close(found: Tensor, meant: Tensor, within: float = 1e-12) -> None:
    torch.testing.assert_close(found, meant, rtol=0, atol=within)


RULES = [
    "exit(geometric)",
    "exit(geometric, threshold = 0.7, states = copy)",
    "exit(multinomial)",
    "exit(classifier, threshold = 0.6)",
    "exit(confidence, threshold = 0.6)",
    "exit(margin, threshold = 0.5)",
    "exit(margin, threshold = 0.5, decay = 4)",
    "exit(margin, threshold = 0.5, decay = 4, form = code)",
    "exit(margin, threshold = 0.3, batch = min)",
    "exit(state, threshold = 0.99)",
    "exit(entropy, threshold = 1.1)",
]
HALTS = [
    "loop(act, max = 5)",
    "loop(act(eps = 0.2), max = 5, signal = sinusoid)",
    "loop(act(basic = true, onward = true, rest = false), max = 5)",
    "loop(act(onward = true), max = 5, signal = sinusoid)",
]
STAGES = [
    *(f"layers(5) {{ {BODY}  {rule} }}" for rule in RULES),
    f"layers(2) {{ {BODY} }} layers(3, norm = post) {{ {BODY}  exit(geometric) }} layers(1) {{ whole }}",
    f"loop(5) {{ share {{ {BODY} }}  exit(geometric) }}",
    f"loop(5, signal = sinusoid) {{ share {{ {BODY} }}  exit(multinomial) }}",
    f"loop(4, signal = sinusoid) {{ share {{ {BODY} }} }}",
    *(f"{halts} {{ share {{ local  ffn(1)  whole }} }}" for halts in HALTS),
]
WHOLE = f"layers(5) {{ {BODY}  exit(multinomial(level = sequence)) }}"


def chancy(module: StackModule) -> StackModule:
    """Halting that takes some turns."""
    for word in module.words.values():
        if isinstance(word, nn.Linear) and module.stack.layers[0].halting:
            nn.init.constant_(word.bias, -1.0)
    return module


@pytest.mark.parametrize("stages", [*STAGES, WHOLE])
def test_tokens_leave_as_in_the_reference(stages: str) -> None:
    module = chancy(made(stages, readout=readout()))
    x = 2 * drawn(3, 19, 8)
    y, record = module(x)
    close(y, reference(module, x))
    if record.turns or record.exits:
        turns = record.turns[0] if record.turns else record.exits[0].turns
        assert len(turns.unique()) >= 2


@pytest.mark.parametrize("stages", STAGES)
def test_steps_are_those_of_the_whole_run(stages: str) -> None:
    module = chancy(made(stages, readout=readout()))
    x = 2 * drawn(3, 19, 8)
    session = module.session(3, 19)
    pieces = [session.step(piece) for piece in x.split([6, 1, 1, 4, 1, 1, 1, 1, 3], 1)]
    close(torch.cat(pieces, 1), module(x)[0])
    caches = [*session.sessions.values()]
    assert all(cache.lengths == (19, 19, 19) for cache in caches)
    assert len(caches) == sum(sub.name != "ffn" for turn in module.stack.turns for sub in turn)


@pytest.mark.parametrize("around", ["", "memory(xl(24))"])
def test_tokens_are_computed_on_though_none_runs(around: str) -> None:
    """Those to come attend to what became of them."""
    loop = "loop(act(onward = true), max = 5) { share { local  ffn(1)  whole } }"
    module = chancy(made(f"{around} {{ {loop} }}" if around else loop))
    x, pieces, state = 2 * drawn(1, 19, 8), [], None
    session = None if around else module.session(1, 19)
    for token in x.split(1, 1):
        if session is not None:
            pieces.append(session.step(token))
            continue
        y, record = module(token, state=state)
        pieces.append(y)
        state = record.state
    close(torch.cat(pieces, 1), module(x)[0])


def tokens_of(module: StackModule) -> Callable[[], int]:
    """How many tokens feed-forward layers have been given since."""
    seen = [0]

    def count(_: nn.Module, given: tuple[Tensor]) -> None:
        seen[0] += given[0].shape[0] * given[0].shape[1]

    for part in module.parts.values():
        if hasattr(part.inner, "up"):
            part.inner.register_forward_pre_hook(count)
    return lambda: seen[0]


def test_a_step_computes_no_token_that_has_left() -> None:
    module = made(f"layers(5) {{ {BODY}  exit(geometric) }}")
    x = drawn(1, 19, 8)
    depths = module(x)[1].exits[0].turns
    count = tokens_of(module)
    session = module.session(1, 19)
    for token in x.split(1, 1):
        session.step(token)
    assert count() == int(depths.sum()) < 5 * 19
    both = torch.cat([x, x.flip(1)])
    depths = module(both)[1].exits[0].turns
    before, session = count(), module.session(2, 19)
    for token in both.split(1, 1):
        session.step(token)
    assert count() - before == int(depths.sum())


KEPT_OTHERWISE = """
attention pooled { keys pool(2) ++ tokens  mask causal }
attention summed { score Q @ K  norm none  mask causal }
attention both(l = learn[H](0.5)) = local + l * whole
"""


@pytest.mark.parametrize(
    ("name", "session"),
    [("pooled", "StreamSession"), ("summed", "StateSession"), ("both", "SumSession"), ("far", "Session")],
)
def test_what_sessions_hold_is_given_all_tokens(name: str, session: str) -> None:
    """Where it is not keys that are simply kept."""
    backend = "linear" if name == "summed" else None
    stages = f"layers(4) {{ {name}  ffn(1)  exit(geometric) }}"
    module = made(stages, ATTENTIONS + KEPT_OTHERWISE, backend=backend, length=40)
    x = 2 * drawn(2, 9, 8)
    steps = module.session(2, 9)
    assert {type(held).__name__ for held in steps.sessions.values()} == {session}
    close(torch.cat([steps.step(token) for token in x.split(1, 1)], 1), module(x)[0])


@pytest.mark.parametrize("training", [False, True])
def test_depths_may_be_given(training: bool) -> None:
    module = made("layers(4) { cycle { far  local }  ffn(1)  exit(geometric) } layers(1) { whole }")
    module.train(training)
    x = drawn(2, 13, 8).requires_grad_()
    depths = torch.randint(1, 4, (2, 13), generator=torch.Generator().manual_seed(3))
    y, record = module(x, depths=depths)
    meant = reference(module, x, depths=depths)
    close(y, meant)
    assert torch.equal(record.exits[0].turns, depths)
    assert len(record.exits[0].states) == 4 * training
    ends, back = (x, *module.parameters()), drawn(2, 13, 8)
    found, wanted = (
        torch.autograd.grad(of, ends, back, allow_unused=True, materialize_grads=True) for of in (y, meant)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs, 1e-10)
    plain = made("layers(4) { cycle { far  local }  ffn(1) } layers(1) { whole }")
    plain.load_state_dict(module.state_dict(), strict=False)
    close(module(x, depths=torch.full_like(depths, 4))[0], plain(x)[0])


def test_depths_of_several_stages_have_numbers() -> None:
    module = made(2 * f"layers(3) {{ {BODY}  exit(geometric) }} ")
    x, ones = drawn(1, 5, 8), torch.ones(1, 5, dtype=torch.long)
    _, record = module(x, depths={1: 2 * ones})
    assert torch.equal(record.exits[1].turns, 2 * ones)
    assert not torch.equal(record.exits[0].turns, 2 * ones)
    plain = made(f"layers(2) {{ {BODY} }}")
    for of, depths, said in (
        (module, ones, "2 stages have an exit"),
        (module, {2: ones}, "no stage with an exit has the number 2"),
        (module, {0: ones.int()}, r"`depths` are torch.int64 \[1, 5\], not torch.int32 \[1, 5\]"),
        (module, {0: ones[:, :3]}, r"`depths` are torch.int64 \[1, 5\], not torch.int64 \[1, 3\]"),
        (module, {0: [1]}, r"`depths` are torch.int64 \[1, 5\], not list"),
        (module, {0: 4 * ones}, r"`depths` are from 1 to 3, not 4 .. 4"),
        (plain, ones, "`depths` are of stages with an exit, and `adaptive` has none"),
    ):
        with pytest.raises(attndsl.AttnError, match=said):
            of(x, depths=depths)


def test_confidences_are_those_of_the_papers() -> None:
    x, last = drawn(2, 7, 8), readout()

    def seen(rule: str) -> tuple[StackModule, list[Array], list[Array]]:
        module = made(f"layers(3) {{ {BODY}  exit({rule}, threshold = 0.5) }}", readout=last).train()
        told = module(x)[1].exits[0]
        return module, [one.detach().numpy() for one in told.states], [s.detach().numpy() for s in told.sure]

    module, states, margins = seen("margin")
    for state, margin in zip(states, margins, strict=True):
        logits = module.logits(torch.from_numpy(state)).detach().numpy()
        p = np.sort(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(margin, p[..., -1] - p[..., -2], rtol=0, atol=1e-12)
    ordered = [np.exp(module.logits(torch.from_numpy(s)).detach().numpy()) for s in states]
    shares = [e / e.sum(-1, keepdims=True) for e in ordered]
    np.testing.assert_allclose(seen("confidence")[2], [p.max(-1) for p in shares], rtol=0, atol=1e-12)
    entropies = [-(p * np.log(p)).sum(-1) for p in shares]
    np.testing.assert_allclose(seen("entropy")[2], entropies, rtol=0, atol=1e-12)
    before = [x.numpy(), *states[:-1]]
    cosines = [
        (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
        for a, b in zip(before, states, strict=True)
    ]
    np.testing.assert_allclose(seen("state")[2], cosines, rtol=0, atol=1e-12)
    module, states, chances = seen("classifier")
    for layer, (state, chance) in enumerate(zip(states, chances, strict=True)):
        told: Any = module.words[f"0_{layer}"]
        logit = state @ told.weight.detach().numpy()[0] + told.bias.item()
        np.testing.assert_allclose(chance, 1 / (1 + np.exp(-logit)), rtol=0, atol=1e-12)


def test_chances_to_leave_sum_up_to_one() -> None:
    x = drawn(2, 7, 8)
    for rule in ("geometric", "multinomial", "multinomial(level = sequence)"):
        module = made(f"layers(4) {{ {BODY}  exit({rule}) }}").train()
        told = module(x)[1].exits[0]
        q = exits.distribution(told.sure)
        close(q.sum(-1), torch.ones_like(q[..., 0]))
        assert (q >= 0).all()
        if rule != "geometric":
            map: Any = module.words["0"]
            first = told.states[0]
            meant = map(first.mean(1, keepdim=True) if "level" in rule else first).softmax(-1)
            close(q, meant.expand_as(q))
            taken = module.eval()(x)[1].exits[0].turns
            assert torch.equal(taken, q.argmax(-1) + 1)


def toy(stages: str, **sizes: Any) -> StackModule:
    """Of two numbers a token, without norms, whose states are their logits."""
    module = made(
        stages, width=2, heads=1, length=8, norm=lambda _: nn.Identity(), readout=nn.Identity(), **sizes
    )
    for weight in module.parameters():
        nn.init.zeros_(weight)
    return module


@pytest.mark.parametrize(
    ("options", "depths"),
    [
        ("threshold = 0.75", [2, 2, 2, 2]),  # tanh(1/2) = .462, tanh(1) = .762, tanh(3/2) = .905
        ("threshold = 0.81", [3, 3, 3, 3]),
        ("threshold = 0.81, decay = 4", [3, 3, 3, 2]),  # .829, .790, .766, .751
        ("threshold = 0.81, decay = 4, form = code", [3, 3, 2, 2]),  # .810, .778, .759, .747
        ("threshold = 1, decay = 0", [4, 4, 4, 4]),  # .9 + .1
    ],
)
def test_a_toy_leaves_where_its_threshold_says(options: str, depths: list[int]) -> None:
    """Each layer adds (1, 0) to the logits: the margin after l of them is tanh(l / 2)."""
    module = toy(f"layers(4) {{ ffn(1)  exit(margin, {options}) }}")
    for part in module.parts.values():
        inner: Any = part.inner
        inner.down.bias.data[0] = 1
    y, record = module(torch.zeros(1, 4, 2, dtype=torch.float64))
    assert record.exits[0].turns.tolist() == [depths]
    close(y[0, :, 0], torch.tensor(depths, dtype=torch.float64))


def test_a_toy_reads_states_as_they_left() -> None:
    """Each layer adds the mean of the states so far. The first token, of 3, leaves with 6 after one layer;
    the second is 0, 1.5, 1.5 + (6 + 1.5) / 2 = 5.25, and 5.25 + (6 + 5.25) / 2 = 10.875."""
    module = toy("layers(3) { whole  exit(margin, threshold = 0.99) }")
    for part in module.parts.values():
        inner: Any = part.inner
        inner.v.weight.data.copy_(torch.eye(2))
        inner.o.weight.data.copy_(torch.eye(2))
    x = torch.tensor([[[3.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    y, record = module(x)
    assert record.exits[0].turns.tolist() == [[1, 3]]
    assert y[0, :, 0].tolist() == pytest.approx([6, 10.875])
    assert [s[0, 1].item() for s in record.exits[0].sure] == pytest.approx(
        [math.tanh(v / 2) for v in (1.5, 5.25, 10.875)]
    )


def test_rows_leave_together_with_the_least_sure() -> None:
    module = toy("layers(4) { ffn(1)  exit(margin, threshold = 0.75, batch = min) }")
    for part in module.parts.values():
        inner: Any = part.inner
        inner.down.bias.data[0] = 1
    x = torch.zeros(2, 3, 2, dtype=torch.float64)
    x[1, 1, 0] = -1.0  # a token that starts behind
    assert module(x)[1].exits[0].turns.tolist() == [[2, 3, 2]] * 2


def test_aligned_training_is_the_weighted_mean_of_layers() -> None:
    module = made(f"layers(3) {{ {BODY}  exit(geometric) }}", readout=readout()).train()
    x, targets = drawn(2, 7, 8), torch.arange(14).reshape(2, 7) % 7
    states = module(x)[1].exits[0].states
    each = [cross_entropy(module.logits(s).flatten(0, 1), targets.flatten()) for s in states]
    found = exits.aligned(states, module.logits, targets, [1, 2, 3])
    close(found, (each[0] + 2 * each[1] + 3 * each[2]) / 6)
    close(exits.aligned(states, module.logits, targets), sum(each) / torch.tensor(3.0))
    with pytest.raises(attndsl.AttnError, match="2 weights of 3 layers"):
        exits.aligned(states, module.logits, targets, [1, 2])


def test_mixed_training_is_the_mean_over_paths() -> None:
    module = made(f"layers(3) {{ {BODY}  exit(geometric) }}", readout=readout()).train()
    x, targets = drawn(2, 7, 8), torch.arange(14).reshape(2, 7) % 7
    found = exits.mixed(module, x, targets, 2, torch.Generator().manual_seed(5))
    generator, each = torch.Generator().manual_seed(5), []
    for _ in range(2):
        depths = exits.sampled((2, 7), 3, generator)
        assert depths.min() >= 1
        logits = module.readout(reference(module, x, depths=depths))  # type: ignore[misc]
        each.append(cross_entropy(logits.flatten(0, 1), targets.flatten()))
    close(found, torch.stack(each).mean())
    for other in (made(f"layers(3) {{ {BODY} }}"), made(f"layers(3) {{ {BODY}  exit(geometric) }}")):
        with pytest.raises(attndsl.AttnError, match="mixed training is of one stage with an exit"):
            exits.mixed(other, x, targets)


def test_oracles_weigh_what_layers_say_against_their_number() -> None:
    module = made(f"layers(3) {{ {BODY}  exit(geometric) }}", readout=readout()).train()
    x, targets = drawn(2, 6, 8), torch.arange(12).reshape(2, 6) % 7
    states = module(x)[1].exits[0].states
    logs = [module.logits(s).log_softmax(-1) for s in states]
    likely = exits.likelihoods(states, module.logits, targets)
    right = exits.correct(states, module.logits, targets)
    same = exits.consistent(states, module.logits)
    for b in range(2):
        for t in range(6):
            of = [log[b, t] for log in logs]
            close(likely[b, t], torch.stack([log[targets[b, t]] for log in of]))
            guessed = [int(log.argmax()) for log in of]
            assert right[b, t].tolist() == [guess == targets[b, t] for guess in guessed]
            assert same[b, t].tolist() == [guess == guessed[-1] for guess in guessed]
    wide = exits.smoothed(likely, 2.0)
    close(wide[1, 4], sum((math.exp(-((4 - u) ** 2) / 2.0) * likely[1, u] for u in range(6)), torch.zeros(3)))
    assert exits.smoothed(likely, 0) is likely
    scores = torch.tensor([[[-3.0, -1.0, -0.9], [-1.0, -1.0, -2.0]]])
    assert exits.oracle(scores).tolist() == [[3, 1]]
    assert exits.oracle(scores, 0.2).tolist() == [[2, 1]]
    assert exits.oracle(scores, 5.0).tolist() == [[1, 1]]
    assert exits.oracle(scores.sum(1, keepdim=True)).tolist() == [[2]]


def test_losses_of_exits() -> None:
    sure = [torch.full((1, 4), p, dtype=torch.float64) for p in (0.2, 0.5, 0.9)]
    depths = torch.tensor([[1, 2, 3, 3]])
    close(exits.distribution(sure)[0, 0], torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64))
    meant = -(math.log(0.2) + math.log(0.8 * 0.5) + 2 * math.log(0.8 * 0.5)) / 4
    assert exits.exit_loss(sure, depths).item() == pytest.approx(meant)
    wanted = torch.tensor([[[1.0, 0.0, 1.0]] * 4], dtype=torch.float64)
    meant = -(math.log(0.2) + math.log(0.5)) / 2
    assert exits.classifier_loss(sure, wanted).item() == pytest.approx(meant)


def test_classifiers_learn_what_the_last_layer_will_say() -> None:
    module = made(f"layers(3) {{ {BODY}  exit(classifier, threshold = 0.5) }}", readout=readout()).train()
    module.requires_grad_(False)
    module.words.requires_grad_(True)
    learned = [*module.words.parameters()][:-2]  # nobody asks for the last layer
    x = drawn(4, 20, 8)
    told = module(x)[1].exits[0]
    wanted = exits.consistent(told.states, module.logits)
    first = exits.classifier_loss(told.sure, wanted).item()
    maps = [module.words[f"0_{layer}"] for layer in range(3)]
    for _ in range(150):  # states are as they were: all but the classifiers is frozen
        sure = [map(state)[..., 0].sigmoid() for map, state in zip(maps, told.states, strict=True)]
        slopes = torch.autograd.grad(exits.classifier_loss(sure, wanted), learned)
        with torch.no_grad():
            for weight, slope in zip(learned, slopes, strict=True):
                weight -= slope
    loss = exits.classifier_loss(module(x)[1].exits[0].sure, wanted)
    assert loss.item() < first - 0.3
    base = wanted[..., :-1].mean().item()
    assert loss.item() < -base * math.log(base) - (1 - base) * math.log(1 - base)


class Published:
    """A loop that halts as Graves (2016) and Dehghani et al. (2019) write it, or as tensor2tensor does it, in
    numpy: one head of causal attention and a feed-forward layer, before which states are normed."""

    def __init__(self, module: StackModule) -> None:
        self.weights = {name: weight.numpy() for name, weight in module.state_dict().items()}

    def by(self, name: str, x: Array) -> Array:
        found: Array = x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)
        return found

    @staticmethod
    def normed(x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        found: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return found

    def turn(self, x: Array) -> Array:
        here = self.normed(x)
        q, k, v = (self.by(f"parts.0_whole.inner.{name}", here) for name in "qkv")
        logits = np.where(np.tri(len(x), dtype=bool), q @ k.T / np.sqrt(q.shape[-1]), -np.inf)
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        x = x + self.by("parts.0_whole.inner.o", shares / shares.sum(-1, keepdims=True) @ v)
        up = self.by("parts.1_ffn.inner.up", self.normed(x))
        gelu = up * (1 + np.vectorize(math.erf)(up / math.sqrt(2))) / 2
        return x + self.by("parts.1_ffn.inner.down", gelu)

    def chance(self, x: Array) -> Array:
        found: Array = 1 / (1 + np.exp(-self.by("words.0", x)[:, 0]))
        return found

    @staticmethod
    def signal(count: int, turn: int, width: int) -> Array:
        found = np.zeros((count, width))
        for i in range(count):
            for j in range(width):
                rate = 10_000 ** (2 * (j // 2) / width)
                wave = math.cos if j % 2 else math.sin
                found[i, j] = wave((i + 1) / rate) + wave((turn + 1) / rate)
        return found

    def halting(self, x: Array, eps: float, most: int, signal: bool) -> tuple[Array, Array, Array]:
        """y, N and R of each token: those that have halted are copied."""
        n, width = x.shape
        y, total, turns, rest = np.zeros_like(x), np.zeros(n), np.zeros(n, dtype=int), np.zeros(n)
        running = np.ones(n, dtype=bool)
        for t in range(most):
            new = self.turn(x + self.signal(n, t, width) if signal else x)
            x = np.where(running[:, None], new, x)
            p = self.chance(x)
            for i in np.flatnonzero(running):
                turns[i] += 1
                if total[i] + p[i] >= 1 - eps or t == most - 1:
                    rest[i] = 1 - total[i]
                    y[i] += rest[i] * x[i]
                    running[i] = False
                else:
                    total[i] += p[i]
                    y[i] += p[i] * x[i]
        return y, turns, rest

    def tensor2tensor(self, x: Array, eps: float, most: int) -> tuple[Array, Array, Array]:
        """The same of its `basic` loop, in its own variables; the chance is one of the state after a turn."""
        n = len(x)
        halting, remainders, updates = np.zeros(n), np.zeros(n), np.zeros(n, dtype=int)
        state, new_state = x, np.zeros_like(x)
        while updates.max() < most and (halting < 1 - eps).any():
            state = self.turn(state)
            p = self.chance(state)
            still = halting < 1.0
            new_halted = (halting + p * still > 1 - eps) & still
            still &= halting + p * still <= 1 - eps
            halting = halting + p * still
            remainders = remainders + new_halted * (1 - halting)
            halting = halting + new_halted * remainders
            updates = updates + still + new_halted
            weights = (p * still + new_halted * remainders)[:, None]
            new_state = state * weights + new_state * (1 - weights)
        return new_state, updates, remainders


def ut(halts: str) -> StackModule:
    def norm(width: int) -> nn.Module:
        return nn.LayerNorm(width, elementwise_affine=False)

    return chancy(made(f"{halts} {{ share {{ whole  ffn(2) }} }}", width=6, heads=1, norm=norm, length=40))


@pytest.mark.parametrize("signal", [False, True])
def test_halting_is_as_published(signal: bool) -> None:
    module = ut(f"loop(act(eps = 0.05), max = 6{', signal = sinusoid' * signal})")
    x = 2 * drawn(1, 40, 6)
    with torch.no_grad():
        y, record = module(x)
    last = Published.normed
    meant, turns, rest = Published(module).halting(x[0].numpy(), 0.05, 6, signal)
    np.testing.assert_allclose(y[0].numpy(), last(meant), rtol=0, atol=1e-11)
    assert record.turns[0][0].tolist() == turns.tolist()
    assert len(set(turns)) >= 4
    assert record.losses["ponder.0"].item() == pytest.approx((turns + rest).mean())


def test_halting_is_as_in_tensor2tensor() -> None:
    module = ut("loop(act(eps = 0.05, basic = true, onward = true, rest = false), max = 6)")
    x = 2 * drawn(1, 40, 6)
    with torch.no_grad():
        y, record = module(x)
    meant, turns, rest = Published(module).tensor2tensor(x[0].numpy(), 0.05, 6)
    np.testing.assert_allclose(y[0].numpy(), Published.normed(meant), rtol=0, atol=1e-11)
    assert record.turns[0][0].tolist() == turns.tolist()
    assert record.losses["ponder.0"].item() == pytest.approx((turns + rest).mean())
    assert (rest == 0).any()


def test_basic_weights_are_those_of_no_sum() -> None:
    """Of chances .3, .3 and .5 they are .126, .18 and .4."""
    from attndsl.execution import registry
    from attndsl.stacks.leaving import Progress
    from attndsl.stage import Seen, Word

    act = registry.plugin("stages", "act")
    word = Word("act", (("eps", 0.01), ("basic", True), ("onward", False), ("rest", True)))
    found = Progress.begun(torch.zeros(1, 1, 3))
    for turn, chance in enumerate((0.3, 0.3, 0.5)):
        x = torch.eye(3)[turn][None, None]
        seen = Seen(x, x, found.running, turn, 5, carry=found.carry)
        decision = act.decide(word, lambda x, p=chance: torch.full_like(x[..., :1], p).logit(), seen)
        found = found.after(x, decision, seen.last)
    assert found.y.flatten().tolist() == pytest.approx([0.126, 0.18, 0.4])


def test_what_a_loop_learns_is_of_no_number_of_turns() -> None:
    for stages in (
        "loop(act, max = {0}, signal = sinusoid) {{ share {{ local  ffn }} }}",
        "loop({0}) {{ share {{ local  ffn }}  exit(geometric) }}",
        "loop({0}) {{ share {{ local  ffn }}  exit(classifier, threshold = 0.5) }}",
    ):
        sizes = {sum(w.numel() for w in made(stages.format(turns)).parameters()) for turns in (1, 3, 7)}
        assert len(sizes) == 1


@pytest.mark.parametrize("rule", ["geometric", "multinomial", "multinomial(level = sequence)"])
@pytest.mark.parametrize("word", ["layers", "loop"])
def test_costs_count_what_exits_learn(rule: str, word: str) -> None:
    module = made(f"{word}(3) {{ {BODY}  exit({rule}) }}")
    found = attndsl.depth(module.stack, length=24, width=8, heads=2)
    assert found.parameters == sum(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize(
    "stages",
    [
        "loop(act(eps = 0.2), max = 3, signal = sinusoid) { share { whole  ffn(1) } }",
        "loop(act(basic = true, onward = true, rest = false), max = 3) { share { whole } }",
        "layers(3) { whole  exit(geometric) }",
        "layers(3) { whole  exit(margin, threshold = 0.2) }",
    ],
)
def test_gradients_are_those_of_differences(stages: str) -> None:
    module = chancy(made(stages, width=4, heads=1, readout=readout(4, 3)))
    x = drawn(1, 5, 4).requires_grad_()
    depths = torch.tensor([[1, 3, 2, 1, 3]])

    def run(x: Tensor) -> tuple[Tensor, ...]:
        y, record = module(x, depths=depths) if module.stack.layers[0].exit else module(x)
        sure = record.exits[0].sure if record.exits else ()
        return (y, *record.losses.values(), *sure)

    assert torch.autograd.gradcheck(run, x)


def test_segments_have_the_signal_of_where_they_stand() -> None:
    module = made("memory(xl(24)) { loop(act(eps = 0.2), max = 3, signal = sinusoid) { share { whole } } }")
    x = 2 * drawn(2, 15, 8)
    whole, pieces, state = module(x)[0], [], None
    for piece in x.split([4, 6, 5], 1):
        y, record = module(piece, state=state)
        pieces.append(y)
        state = record.state
    close(torch.cat(pieces, 1), whole)


def test_an_exit_that_reads_whole_rows_looks_ahead() -> None:
    module = made(WHOLE)
    with pytest.raises(attndsl.AttnError, match="`multinomial` reads all tokens of a row, those to come too"):
        module.session(1, 8)
    turns = module(2 * drawn(3, 9, 8))[1].exits[0].turns
    assert (turns == turns[:, :1]).all()
    program = attndsl.parse(f"{ATTENTIONS} stack adaptive {{ {WHOLE} }} assert reach(adaptive) <= causal")
    assert [verdict.status for _, verdict in program.check()] == ["refuted"]
    assert attndsl.depth(module.stack, length=9, width=8, heads=2).levels[0].sees == 9


def test_names_of_arguments_are_no_tables() -> None:
    attentions = "attention doc { inputs depths : int[n]  mask causal & documents(depths) }"
    with pytest.raises(attndsl.AttnError, match="`depths` has the name of an argument of a module"):
        made("layers(3) { doc  exit(geometric) }", attentions)


@pytest.mark.parametrize("norm", ["pre", "post", "sandwich"])
def test_halves_are_put_back_among_wholes(norm: str) -> None:
    """Under autocast states, norms and projections differ in their numbers."""
    for stages in (
        f"loop(act, max = 4, norm = {norm}) {{ share {{ local  ffn(1)  whole }} }}",
        f"layers(4, norm = {norm}) {{ {BODY}  exit(margin, threshold = 0.5) }}",
    ):
        module = chancy(made(stages, dtype="float32", readout=readout().float()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(2 * drawn(2, 13, 8).bfloat16())[0].isfinite().all()


def test_tokens_are_generated_with_exits() -> None:
    last = readout()
    module = made(f"layers(4) {{ {BODY}  exit(margin, threshold = 0.4, decay = 4) }}", readout=last)
    embedding = nn.Embedding(7, 8, dtype=torch.float64)
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = attndsl.generate(module, prompt, 9, embed=embedding, readout=last)
    tokens = prompt
    for _ in range(9):
        following = last(module(embedding(tokens))[0][:, -1]).argmax(-1)
        tokens = torch.cat([tokens, following[:, None]], 1)
    assert torch.equal(found, tokens)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)])
def test_nothing_leaves_nothing(shape: tuple[int, ...]) -> None:
    module = made(f"layers(3) {{ {BODY}  exit(margin, threshold = 0.4, batch = min) }}", readout=readout())
    y, record = module(torch.zeros(shape, dtype=torch.float64))
    assert y.shape == shape
    assert record.exits[0].turns.shape == shape[:2]


def test_bounds_of_calibration_hold_exactly() -> None:
    """Of losses that are 0 or 1 with as large a chance as is allowed: over all outcomes."""
    for count, risk in ((20, 0.1), (50, 0.3), (200, 0.05)):
        outcomes = np.arange(count + 1)
        p = hoeffding_bentkus(outcomes / count, count, risk)
        chances = binom.pmf(outcomes, count, risk)
        for error in (0.01, 0.05, 0.1, 0.3):
            assert chances[p <= error].sum() <= error
        assert (np.diff(p) >= 0).all()
        assert (p > 0).all()
        assert p[-1] == 1


def test_the_bounds_are_those_of_the_paper() -> None:
    """Of 100 losses with a mean of .05 where .1 is allowed, and of .02 where .04 is."""
    found = hoeffding_bentkus(np.array([0.05]), 100, 0.1), hoeffding_bentkus(np.array([0.02]), 100, 0.04)
    at_most = sum(math.comb(100, i) * 0.1**i * 0.9 ** (100 - i) for i in range(6))
    apart = 0.05 * math.log(0.05 / 0.1) + 0.95 * math.log(0.95 / 0.9)
    assert found[0][0] == pytest.approx(min(math.e * at_most, math.exp(-100 * apart)))
    assert math.e * at_most < math.exp(-100 * apart)
    apart = 0.02 * math.log(0.02 / 0.04) + 0.98 * math.log(0.98 / 0.96)
    assert found[1][0] == pytest.approx(math.exp(-100 * apart))


def test_calibration_keeps_its_promise() -> None:
    """Expected losses rise from threshold to threshold; what is found exceeds 0.2 in at most a tenth of the
    draws, and is not the most cautious."""
    thresholds = np.linspace(1, 0, 21)
    expected = 0.02 + 0.4 * np.linspace(0, 1, 21) ** 1.5
    draw = np.random.default_rng(0)
    found = []
    for _ in range(400):
        level = draw.random((150, 1))  # an example that is hard is so at all thresholds
        losses = (level < expected).astype(float)
        found.append(attndsl.calibrate(losses, thresholds, risk=0.2, error=0.1).threshold)
    reached = [-1.0 if one is None else expected[np.argmin(abs(thresholds - one))] for one in found]
    assert np.mean(np.array(reached) > 0.2) <= 0.1
    assert np.median(reached) > 0.1


def test_calibration_stops_at_the_first_that_fails() -> None:
    losses = np.zeros((100, 4))
    losses[:, 2] = 1
    found = attndsl.calibrate(torch.from_numpy(losses), [0.9, 0.8, 0.7, 0.6], risk=0.1)
    assert found.threshold == 0.8
    assert found.means == (0, 0, 1, 0)
    assert found.p[2] == 1
    assert found.p[3] < 0.05
    assert attndsl.calibrate(losses[:5], [0.9, 0.8, 0.7, 0.6], risk=0.1).threshold is None


@pytest.mark.parametrize(
    ("losses", "sizes", "said"),
    [
        (np.zeros((3, 2)), {"risk": 0.1}, r"losses are \[examples, 1\], not \[3, 2\]"),
        (np.full((3, 1), 2.0), {"risk": 0.1}, "losses are from 0 to 1"),
        (np.full((3, 1), np.nan), {"risk": 0.1}, "losses are from 0 to 1"),
        (np.zeros((3, 1)), {"risk": 0}, "`risk` is 0, and must be between 0 and 1"),
        (np.zeros((3, 1)), {"risk": 0.1, "error": 1}, "`error` is 1, and must be between 0 and 1"),
    ],
)
def test_calibration_refuses_what_is_no_loss(losses: Any, sizes: dict[str, float], said: str) -> None:
    with pytest.raises(attndsl.AttnError, match=said):
        attndsl.calibrate(losses, [0.5], **sizes)  # type: ignore[arg-type]
