"""Reversible stacks: gradients beside those of autograd, and a second run that is the first again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import attndsl
from attndsl.execution import choosing
from attndsl.stacks import layers, reversible
from attndsl.stacks.reference import reference
from attndsl.stacks.tree import FeedForward, Stack

TEXT = """
attention local(w = 4) { mask causal & last(w)  score alibi }
attention whole { mask causal }
attention hashed { mask causal & lsh(2, 4)  score shared_qk }
attention far { mask causal & topk(3, of = causal, by = Q @ K) }
attention tabled(z = learn[H](0.1)) { inputs t : float[n, n]  mask causal  score s + t[q, k] + z }
stack mixed {
    reversible { layers(24) { cycle { local  whole  tabled  far  tied { hashed } }  share { ffn(2) } } }
}
stack two {
    layers(1) { whole }
    reversible { layers(2, norm = sandwich) { local  ffn(1) }  loop(2) { share { whole } } }
}
stack kept { memory(xl(8)) { reversible { layers(3) { local  whole } }  layers(1) { local } } }
stack plain(count = 3) { reversible { layers(count) { local  ffn(1) } } }
stack single { reversible { layers(1) { local  ffn(1) } } }
stack choosing { reversible { layers(3) { far  ffn(1) } } }
"""


def module(name: str, **options: Any) -> attndsl.StackModule:
    torch.manual_seed(0)
    made = attndsl.parse(TEXT)[name]
    assert isinstance(made, Stack)
    return attndsl.build(
        made, width=16, heads=2, length=40, **{"dtype": "float64", "init": "torch"} | options
    )


class Noisy(nn.Module):
    """A norm that drops."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.drop(self.norm(x))
        return dropped


class Running(nn.Module):
    """A norm by running statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return normed


class First(nn.Module):
    """The output of a stack alone."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.of(x)[0]
        return y


@contextmanager
def plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By ordinary autograd."""
    with monkeypatch.context() as patched:
        patched.setattr(reversible._Undone, "apply", None)
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def gradients(made: attndsl.StackModule, x: Tensor, **tables: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(7)
    ends = [x, *tables.values(), *made.parameters()]
    return torch.autograd.grad(made(x, **tables)[0].square().sum(), ends, allow_unused=True)


def compared(found: tuple[Tensor, ...], meant: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(found, meant, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mixed", "two", "kept"])
def test_gradients_are_those_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that drop and that choose by content too; the global generator goes on as it would."""
    made = module(name, norm=Noisy)
    x = torch.randn(2, 33, 16, dtype=torch.float64, requires_grad=True)
    tables = {"t": torch.randn(33, 33, dtype=torch.float64, requires_grad=True)} if name == "mixed" else {}
    found, after = gradients(made, x, **tables), torch.get_rng_state()
    with plainly(monkeypatch):
        meant = gradients(made, x, **tables)
    assert torch.equal(after, torch.get_rng_state())
    compared(found, meant)


@pytest.mark.parametrize("name", ["two", "kept"])
def test_outputs_are_what_they_mean(name: str) -> None:
    made, x = module(name), torch.randn(2, 33, 16, dtype=torch.float64)
    torch.testing.assert_close(made(x)[0], reference(made, x), rtol=0, atol=1e-12)


def test_gradcheck() -> None:
    made = module("plain")
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: made(x)[0], (x,), fast_mode=True)


def test_near_ties_are_not_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens are alike, so that the first attention chooses among equals, and after its inversion among
    what rounding made of them: chosen anew, other tokens get the gradients."""
    made = module("choosing")
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 33, 16).clone().requires_grad_()
    calls: list[int] = []
    chosen = choosing._made

    def counted(*args: Any) -> list[Tensor]:
        calls.append(1)
        return chosen(*args)

    monkeypatch.setattr(choosing, "_made", counted)
    found = gradients(made, x)
    assert len(calls) == 3
    with plainly(monkeypatch):
        meant = gradients(made, x)
    compared(found, meant)
    monkeypatch.setattr(reversible, "remaking", lambda kept: nullcontext())
    assert (gradients(made, x)[0] - meant[0]).abs().max() > 1e-6


def test_choices_are_forgotten_after_an_error() -> None:
    made, x = module("choosing"), torch.randn(1, 33, 16, dtype=torch.float64, requires_grad=True)
    y = made(x)[0]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = made.parts["0_far"].inner.o.register_forward_hook(stop)  # type: ignore[union-attr,operator]
    for run in (lambda: y.sum().backward(), lambda: made(x)):
        with pytest.raises(KeyboardInterrupt):
            run()
    hook.remove()
    assert choosing.KEPT.get() is choosing.REMADE.get() is None
    shorter = torch.randn(1, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(made(shorter)[0], reference(made, shorter), rtol=0, atol=1e-12)


def saved(made: attndsl.StackModule, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    own, kept = {weight.data_ptr() for weight in made.parameters()}, dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = made(x)[0]
    assert y.requires_grad
    return sum(kept.values())


def test_what_is_kept_does_not_grow_with_depth() -> None:
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    made = attndsl.parse(TEXT)["plain"]
    assert isinstance(made, Stack)
    few, many = (
        saved(attndsl.build(made(count), width=16, heads=2, length=40, dtype="float64"), x)
        for count in (2, 12)
    )
    assert few == many


def test_pieces_are_kept_one_at_a_time() -> None:
    """Of the inside of a feed-forward layer, whose gradients are those of the whole."""
    x = torch.randn(2, 37, 16, dtype=torch.float64, requires_grad=True)
    pieces, whole = (layers.FFN(FeedForward(4, chunks), 16).double() for chunks in (5, 1))
    whole.load_state_dict(pieces.state_dict())
    found, meant = (
        torch.autograd.grad(of(x).square().sum(), [x, *of.parameters()]) for of in (pieces, whole)
    )
    compared(found, meant)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: sizes.append(y.shape[-1]) or y, lambda y: y):
        y = pieces(x)
    assert y.requires_grad
    assert max(sizes, default=0) <= 16


def test_modules_are_used_as_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("plain")
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    with plainly(monkeypatch):
        meant = gradients(made, x)
    ends = [x, *made.parameters()]
    y: Any = checkpoint(lambda x: made(x)[0], x, use_reentrant=False)
    compared(torch.autograd.grad(y.square().sum(), ends), meant)
    weights = dict(made.named_parameters())
    replaced = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    y = torch.func.functional_call(made, replaced, (x,))[0]
    compared(torch.autograd.grad(y.square().sum(), [x, *replaced.values()]), meant)
    by_transform = torch.func.grad(lambda w: torch.func.functional_call(made, w, (x,))[0].square().sum())(
        weights
    )
    compared(tuple(by_transform.values()), meant[1:])
    seen: list[str] = []
    for name, part in made.parts.items():
        part.register_full_backward_hook(lambda *_, name=name: seen.append(name))
    made(x)[0].sum().backward()
    assert seen == list(made.parts)[::-1]
    frozen = module("plain").requires_grad_(False)
    compared(torch.autograd.grad(frozen(x)[0].square().sum(), [x]), meant[:1])
    with torch.no_grad():
        torch.testing.assert_close(made(x)[0], frozen(x)[0])


def test_weights_are_those_of_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given for a call, also where no gradient goes to them; made of one another; hooks tell them once."""
    made = module("plain")
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in made.named_parameters()]

    def found(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y = torch.func.functional_call(made, given, (x,))[0]
        return torch.autograd.grad(y.square().sum(), [x, *made.parameters()], allow_unused=True)

    def of_one_another() -> dict[str, Tensor]:
        given = {name: weight * 2 for name, weight in made.named_parameters()}
        return given | {"parts.2_local.inner.q.weight": given["parts.0_local.inner.q.weight"].sin()}

    frozen = {name: torch.randn_like(made.get_parameter(name)) / 4 for name in names}
    with plainly(monkeypatch):
        meant = found(frozen)[:1], found(of_one_another())
    compared(found(frozen)[:1], meant[0])
    compared(found(of_one_another()), meant[1])
    weight = made.get_parameter("parts.0_local.inner.q.weight")
    told: list[Tensor] = []
    hook = weight.register_hook(told.append)
    compared((gradients(made, x)[1 + names.index("parts.0_local.inner.q.weight")],), (told[0],))
    assert len(told) == 1
    hook.remove()


def test_tables_may_be_made_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("mixed")
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    weight = made.get_parameter("parts.0_local.inner.q.weight")

    def found() -> tuple[Tensor, ...]:
        y = made(x, t=weight[:9, :9].sin())[0]
        return torch.autograd.grad(y.square().sum(), [x, *made.parameters()])

    with plainly(monkeypatch):
        meant = found()
    compared(found(), meant)


def test_a_backward_pass_can_be_had_twice() -> None:
    made, x = module("choosing"), torch.randn(1, 33, 16, dtype=torch.float64, requires_grad=True)
    loss, ends = made(x)[0].square().sum(), [x, *made.parameters()]
    compared(torch.autograd.grad(loss, ends, retain_graph=True), torch.autograd.grad(loss, ends))


def test_gradients_are_reduced_as_others(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/at", rank=0, world_size=1)
    made, x = module("plain"), torch.randn(2, 9, 16, dtype=torch.float64)
    meant = gradients(made, x.clone().requires_grad_())[1:]
    DistributedDataParallel(made)(x)[0].square().sum().backward()
    torch.distributed.destroy_process_group()
    compared(tuple(weight.grad for weight in made.parameters() if weight.grad is not None), meant)


def test_compiled_modules_give_the_same() -> None:
    made = module("single")
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    whole = torch.compile(lambda x: made(x)[0], backend="aot_eager", fullgraph=True)
    ends = [x, *made.parameters()]
    compared(torch.autograd.grad(whole(x).square().sum(), ends), gradients(made, x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_give_the_same() -> None:
    made = module("single")
    x, other = torch.randn(2, 2, 9, 16, dtype=torch.float64)
    traced = torch.jit.trace(First(made), x)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(traced(other), made(other)[0])


def test_what_would_be_wrong_is_refused() -> None:
    made = module("plain")
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    y = made(x)[0]
    made.parts["0_local"].before.eval()  # type: ignore[union-attr,operator]
    with pytest.raises(attndsl.AttnError, match=r"changed between train\(\) and eval\(\)"):
        y.sum().backward()
    for trains in (True, False):
        y = made.requires_grad_(trains)(x)[0]
        with torch.no_grad():
            made.parts["0_local"].inner.q.weight.mul_(2)  # type: ignore[union-attr,operator]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    tabled, t = module("mixed"), torch.randn(9, 9, dtype=torch.float64)
    y = tabled(x, t=t)[0]
    t.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    with pytest.raises(attndsl.AttnError, match="calls each layer twice"):
        module("plain", norm=Running)(x)
    (grad,) = torch.autograd.grad(made(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_is_replayed() -> None:
    made = module("plain", dtype="float32")
    x = torch.randn(1, 9, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)[0]
    found = torch.autograd.grad(y.square().sum(), [x, *made.parameters()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = reference_streams(made, x)
    meant = torch.autograd.grad(y.square().sum(), [x, *made.parameters()])
    for mine, theirs in zip(found, meant, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def reference_streams(made: attndsl.StackModule, x: Tensor) -> Tensor:
    """The streams as the paper writes them, layer by layer, by ordinary autograd."""
    one, other = x, x
    parts: Any = [*made.parts.values()]
    near = reversible.Near({})
    for f, g in zip(parts[::2], parts[1::2], strict=True):
        one = one + f.made(other, near)
        other = other + g.made(one, near)
    last: Tensor = made.last((one + other) / 2)
    return last


def test_streams_are_those_of_the_paper() -> None:
    made = module("plain")
    x = torch.randn(1, 9, 16, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(made(x)[0], reference_streams(made, x))
    meant = torch.autograd.grad(reference_streams(made, x).square().sum(), [x, *made.parameters()])
    compared(gradients(made, x), meant)
