"""Every learnable score can be learned: a student recovers what a teacher with known parameters does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import pytest
import torch
from thin import thin
from torch import Tensor

import attndsl
from attndsl import spans

HEADS, LENGTH, HEAD_DIM, STEPS = 2, 40, 8, 50
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """`text` defines one attention; the teacher's parameters are drawn by `teacher` for their shapes.

    The loss is the mean squared error in units of the mean square of what the teacher gives: it begins above
    `start` and ends below `end`, which are half and three times what was measured.
    """

    text: str
    start: float
    end: float
    teacher: Callable[[Shape], Tensor] = torch.randn
    rate: float = 0.1


def spread(low: float, high: float) -> Callable[[Shape], Tensor]:
    return lambda shape: torch.empty(shape).uniform_(low, high)


TASKS = {
    "t5": Task("attention a(table = learn[H, 32]) { score t5(table, far = 32) }", 0.1, 0.003),
    "t5_causal": Task(
        "attention a(table = learn[H, 32]) { mask causal score t5_causal(table, far = 32) }", 0.09, 0.001
    ),
    "relative": Task(
        "attention a(table = learn[H, 9]) { mask radius(6) score relative(table, 4) }", 0.1, 0.002
    ),
    "shaw": Task("attention a(table = learn[H, 9, D]) { mask last(12) score shaw(table, 4) }", 0.1, 0.002),
    "da": Task("attention a(a = learn[H], b = learn[H]) { score da(a, b) }", 0.2, 0.001, spread(-1.5, 1.5)),
    "kerple_log": Task(
        "attention a(a = learn[H], b = learn[H]) { mask causal score kerple_log(softplus(a), exp(b)) }",
        0.3,
        0.002,
        spread(1.0, 2.0),
    ),
    "kerple_power": Task(
        "attention a(a = learn[H], p = learn[H]) { mask causal score kerple_power(exp(a), 2 * sigmoid(p)) }",
        0.02,
        0.0002,
        spread(-1.0, 0.5),
    ),
    "alibi": Task(
        "attention a(slopes = learn[H](0.0)) { mask causal score s - exp(slopes) * |q - k| }",
        0.5,
        0.007,
        spread(-2.5, -1.0),
    ),
    "gaussian": Task(
        "attention a(sigma = learn[H](3)) { mask radius(12) score s + 4 * gaussian(|q - k|, sigma) }",
        0.2,
        0.003,
        spread(0.8, 1.2),
        0.2,
    ),
    "span": Task(
        "attention a(z = learn[H](0.1)) { mask causal decay ramp(q - k, 40 * z, 8) }",
        0.2,
        0.006,
        spread(0.4, 0.8),
        0.02,
    ),
    "sink": Task("attention a { mask last(6) norm softmax(sink = learn[H]) }", 0.4, 0.01, spread(1.5, 3.0)),
    "sigmoid": Task(
        "attention a(bias = learn[H](-2)) { mask causal score s + bias norm sigmoid }",
        0.3,
        0.01,
        spread(0.0, 1.0),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors are slower on many, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def data() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, HEADS, LENGTH, HEAD_DIM, generator=generator) for _ in range(3))


def module(task: Task) -> torch.nn.Module:
    attention = attndsl.parse(task.text)["a"]
    assert isinstance(attention, attndsl.Bound)
    sizes = {"length": LENGTH, "batch": 2, "heads": HEADS, "head_dim": HEAD_DIM}
    return attndsl.compile(attention, **sizes, training=True, backend="torch").module()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", thin(TASKS, 2))
def test_a_student_learns_what_the_teacher_does(name: str) -> None:
    task = TASKS[name]
    torch.manual_seed(1)
    teacher, student = module(task), module(task)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(task.teacher(tuple(parameter.shape)))
        target = teacher(*data())
    optimizer = torch.optim.Adam(student.parameters(), task.rate)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (student(*data()) - target).square().mean() / target.square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > task.start
    assert losses[-1] < task.end

    saved = BytesIO()
    torch.save(student.state_dict(), saved)
    saved.seek(0)
    reloaded = module(task)
    reloaded.load_state_dict(torch.load(saved))
    assert all(torch.equal(*pair) for pair in zip(reloaded.parameters(), student.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(reloaded(*data()), student(*data()))


SPAN = "attention a(z = learn[H](0.0)) { mask band(-40..-1)  decay ramp(q - k, 40 * z, 8) }"


def span_with(weight: float) -> Tensor:
    """What a head's span comes to beside a teacher whose heads see 12 and 24 positions."""
    teacher, student = module(Task(SPAN, 0, 0)), module(Task(SPAN, 0, 0))
    with torch.no_grad():
        teacher.z.copy_(torch.tensor([0.3, 0.6]))
        target = teacher(*data())
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        error = (student(*data()) - target).square().mean() / target.square().mean()
        loss = error + weight * spans.penalty(student, "z", longest=40)
        loss.backward()
        optimizer.step()
        spans.clamp(student, "z")
    found: Tensor = student.z.detach()
    assert ((found >= 0) & (found <= 1)).all()
    return found


def test_spans_shrink_as_their_penalty_rises() -> None:
    found = torch.stack([span_with(weight) for weight in (0.0, 0.02, 0.05, 1.0)])
    torch.testing.assert_close(found[0], torch.tensor([0.3, 0.6]), atol=0.12, rtol=0)
    assert (found.diff(dim=0) < 0).all()
    assert (found[-1] == 0).all()


def test_the_penalty_is_the_mean_span_of_each_layer() -> None:
    layers = torch.nn.ModuleList([module(Task(SPAN, 0, 0)), module(Task(SPAN, 0, 0))])
    with torch.no_grad():
        layers[0].z.copy_(torch.tensor([0.5, 1.5]))
        layers[1].z.copy_(torch.tensor([-0.25, 0.5]))
    assert spans.penalty(layers, "z", 40).item() == 40 * (1.0 + 0.125)
    spans.clamp(layers, "z")
    assert [layer.z.tolist() for layer in layers] == [[0.5, 1.0], [0.0, 0.5]]
    with pytest.raises(attndsl.AttnError, match="the module has no parameter `span`"):
        spans.penalty(layers, "span", 40)
