"""What undoing layers saves and costs: reversible stacks beside the same streams by ordinary autograd.

    python -m benchmarks.reversible

Live bytes: the most that tensors hold at once in a forward and a backward pass, above parameters and one copy
of their gradients; n = 8,192, width 128, 4 heads, feed-forward layers in 4 pieces, float32. At 24 layers at
most 1.2 times those at 4 are asked. `deep` has windows of 128; `hashed` has LSH of 2 rounds, tied keys and
norms that drop: choices and states of generators are told apart, and taken off. Time: CPU seconds of one
thread of both passes, in turn, medians of five, n = 2,048, 24 layers; at most 1.6 times are asked.

    deep     4 layers 72.0 MiB, 24 layers 72.0 MiB: 1.00 times
    hashed   4 layers 71.5 MiB, 24 layers 66.1 MiB: 0.92 times; choices 0.5 MiB a layer, states 5 KiB a draw
    time     1.30 of plain; 1.42 where feed-forward layers are in one piece
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attndsl
from attndsl.stacks import reversible
from attndsl.stacks.tree import Stack

TEXT = """
attention local { mask causal & last(128)  score alibi }
attention lsh_ { mask causal & lsh(2, 64)  score shared_qk }
stack deep(count = 4) { reversible { layers(count) { local  ffn(4, chunks = 4) } } }
stack hashed(count = 4) { reversible { layers(count) { tied { lsh_ }  ffn(4, chunks = 4) } } }
"""
DEPTHS = (4, 24)
MIB = 2**20


class Dropping(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.drop(self.norm(x)))


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators make, while they live; what is `given` counts for none."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held: dict[int, int] = {tensor.untyped_storage().data_ptr(): 0 for tensor in given}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, Tensor)
                and (storage := tensor.untyped_storage()).data_ptr() not in self.held
            ):
                self._noted(storage)
        return made

    def _noted(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        self.held[key] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.held.pop(key)


def apart(y: Tensor) -> tuple[int, int]:
    """Bytes of choices and of states of generators that are kept for a backward pass from y."""
    choices = states = 0
    nodes = [y.grad_fn]
    while nodes:
        node: Any = nodes.pop()
        for kept in getattr(node, "kept", ()):
            choices += sum(choice.nbytes for call in kept.choices for choice in call)
            states += sum(state.nbytes for state in kept.generators.values())
        nodes += [before for before, _ in node.next_functions if before is not None and not states + choices]
    return choices, states


def live(stack: Stack, norm: Callable[[int], nn.Module]) -> int:
    """Live bytes, what is kept apart."""
    module, x = attndsl.build(stack, width=128, heads=4, length=8192, norm=norm), torch.randn(1, 8192, 128)
    pass_of(module, x[:, :256])()  # tiles and kernels are made once
    module.zero_grad()
    parameters = sum(weight.nbytes for weight in module.parameters())
    choices, states = apart(module(x)[0])
    with Live(x, *module.parameters()) as counted:
        pass_of(module, x)()
    found: int = counted.most - parameters - choices - states
    print(
        f"{stack!r}: {found / MIB:.1f} MiB; apart from gradients {parameters / MIB:.1f}, "
        f"choices {choices / MIB:.1f}, states of generators {states / MIB:.2f}"
    )
    return found


@contextmanager
def plainly() -> Iterator[None]:
    """Streams by ordinary autograd."""
    undone = reversible.run

    def run(steps: Any, x: Tensor, entering: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        one, other = x, x
        for step in steps:
            one, other = other, one + step.made(other)
        return one, other, []

    reversible.run = run
    yield
    reversible.run = undone


def pass_of(module: attndsl.StackModule, x: Tensor) -> Callable[[], None]:
    def both() -> None:
        module.zero_grad()
        module(x)[0].square().mean().backward()

    return both


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    program = attndsl.parse(TEXT)
    deep, hashed = (cast(Stack, program[name]) for name in ("deep", "hashed"))
    for stack, norm in ((deep, nn.LayerNorm), (hashed, Dropping)):
        few, many = (live(stack(count=depth), norm) for depth in DEPTHS)
        print(f"  at 24 layers {many / few:.2f} times those at 4")
    module = attndsl.build(deep(count=24), width=128, heads=4, length=2048)
    both = pass_of(module, torch.randn(1, 2048, 128))
    seconds: dict[str, list[float]] = {"plain": [], "undone": []}
    for _ in range(5):
        for name, found in seconds.items():
            with plainly() if name == "plain" else nullcontext():
                start = time.thread_time()
                both()
                found.append(time.thread_time() - start)
    plain, undone = (statistics.median(found) for found in seconds.values())
    print(f"time: {undone:.2f} s, {undone / plain:.2f} of plain")


if __name__ == "__main__":
    main()
