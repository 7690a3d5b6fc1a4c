"""What undoing layers saves and costs: reversible stacks beside the same streams by ordinary autograd.

    python -m benchmarks.reversible

Live bytes: the most that tensors hold at once in a forward and a backward pass, above parameters and one copy
of their gradients; n = 8,192, width 128, 4 heads, windows of 128, feed-forward layers in 4 pieces, float32.
At 24 layers at most 1.2 times those at 4 are asked. Time: CPU seconds of one thread of both passes, in turn,
medians of three, n = 2,048, 24 layers; at most 1.6 times are asked.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attndsl
from attndsl.stacks import reversible

TEXT = """
attention local { mask causal & last(128)  score alibi }
stack deep(count = 4) { reversible { layers(count) { local  ffn(4, chunks = 4) } } }
"""
DEPTHS = (4, 24)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators make, while they live; views of `given` are none."""

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
    program, most = attndsl.parse(TEXT), dict[int, int]()
    for depth in DEPTHS:
        module = attndsl.build(program["deep"](count=depth), width=128, heads=4, length=8192)
        x = torch.randn(1, 8192, 128)
        pass_of(module, x[:, :256])()  # tiles and kernels are made once
        module.zero_grad()
        with Live() as live:
            pass_of(module, x)()
        parameters = sum(weight.nbytes for weight in module.parameters())
        most[depth] = live.most - parameters
        print(
            f"{depth} layers: {most[depth] / 2**20:.1f} MiB above {parameters / 2**20:.1f} MiB of gradients"
        )
    print(f"ratio: {most[DEPTHS[1]] / most[DEPTHS[0]]:.2f}")
    module = attndsl.build(program["deep"](count=24), width=128, heads=4, length=2048)
    both = pass_of(module, torch.randn(1, 2048, 128))
    seconds: dict[str, list[float]] = {"plain": [], "undone": []}
    for _ in range(3):
        for name in seconds:
            start = time.thread_time()
            if name == "plain":
                with plainly():
                    both()
            else:
                both()
            seconds[name].append(time.thread_time() - start)
    print(f"time: {statistics.median(seconds['undone']) / statistics.median(seconds['plain']):.2f} of plain")


if __name__ == "__main__":
    main()
