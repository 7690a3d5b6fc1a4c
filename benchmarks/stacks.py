"""What halting saves: a loop whose tokens leave at depths that are forced, beside the loop without halting.

    python -m benchmarks.stacks

Forward alone, float32, one thread, n = 1,024, width 512, 8 heads; in a turn a causal attention and a window
of 128, each with a feed-forward layer; medians of five, in turn. Depths uniform in 1 .. 8, where 0.65 of the
time is asked, in 1 .. 4, where 0.4 is, and 8 of all, where both give the same. Measured: 0.64, 0.36, 1.00.
Tokens that run are gathered, and each turn finds the tiles of their positions; keys and values of the others
are kept.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time

import torch
from torch import Tensor, nn

import attndsl

TURNS, RUNS = 8, 5
BODY = "{ share { whole  ffn(4)  local  ffn(4) } }"
TEXT = f"""
attention local {{ mask causal & last(128) }}
attention whole {{ mask causal }}
stack plain {{ loop({TURNS}) {BODY} }}
stack halting {{ loop(act, max = {TURNS}) {BODY} }}
"""


class Forced(nn.Module):
    """In place of what makes the probability to halt: none before the turn that a token is to leave at."""

    def __init__(self, depths: Tensor) -> None:
        super().__init__()
        self.depths, self.turn = depths, 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn = self.turn % TURNS + 1
        return torch.where(self.depths <= self.turn, 100.0, -100.0)[..., None]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    program = attndsl.parse(TEXT)
    plain, halting = (
        attndsl.build(program[name], width=512, heads=8, length=1024) for name in ("plain", "halting")
    )
    halting.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 1024, 512)
    for most in (TURNS, TURNS // 2, 0):
        depths = torch.randint(1, most + 1, (1, 1024)) if most else torch.full((1, 1024), TURNS)
        seconds: dict[str, list[float]] = {"plain": [], "halting": []}
        with torch.no_grad():
            for _ in range(RUNS):
                for name, module in (("plain", plain), ("halting", halting)):
                    if name == "halting":
                        halting.words["0"] = Forced(depths)
                    start = time.thread_time()
                    module(x)
                    seconds[name].append(time.thread_time() - start)
            if not most:
                torch.testing.assert_close(plain(x)[0], halting(x)[0])
        ratio = statistics.median(seconds["halting"]) / statistics.median(seconds["plain"])
        print(f"mean depth {depths.float().mean() / TURNS:.2f} of {TURNS}: {ratio:.2f} of the time")


if __name__ == "__main__":
    main()
