"""What stacks learn on a CPU, in minutes: memory, pondering, spans, duplication.

    python -m benchmarks.learning memory ponder span duplicate

Each prints its figures; those measured are in RESULTS.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attndsl

TRAIN = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "train.py"))
SEEDS = (0, 1, 2)

MEMORY = """
attention whole { mask causal  score alibi }
attention recent { mask causal & last(96)  score alibi }
stack short { layers(3) { whole  ffn(2) } }
stack recurrent { memory(xl(64)) { layers(3) { recent  ffn(2) } } }
"""


def memory(steps: int = 800) -> None:
    """Bits per byte of the held-out end of Moby Dick, by the same model with memory and without: segments of
    32 bytes, three layers, width 96."""
    program, data = attndsl.parse(MEMORY), TRAIN["read"](TRAIN["BOOK"])
    for seed in SEEDS:
        found = {}
        for name in ("short", "recurrent"):
            torch.manual_seed(seed)
            model = TRAIN["made"](program[name], 96, 4, 32)
            _, found[name] = TRAIN["trained"](model, data, steps=steps, segment=32, rows=16, rate=3e-3)
        without, behind = found["short"], found["recurrent"]
        print(f"seed {seed}: {without:.3f} without, {behind:.3f} with memory, {without - behind:.3f} less")


PONDER = """
attention recent { mask causal & last(3) }
stack ut { loop(act, max = 8) { share { recent  ffn(4) } } }
"""


def parity(rows: int, length: int, most: int) -> tuple[Tensor, Tensor]:
    """Sequences of 0 and 1, and of each token whether of the last `most` an odd number is 1."""
    bits = torch.randint(2, (rows, length))
    sums = bits.cumsum(1)
    sums[:, most:] -= bits.cumsum(1)[:, :-most]
    return bits, sums % 2


def ponder(steps: int = 400) -> list[float]:
    """Parity of the last three bits; the mean depth by what a turn costs."""
    depths = []
    for cost in (0.0, 0.01, 0.1):
        torch.manual_seed(0)
        model = attndsl.build(
            attndsl.parse(PONDER)["ut"],
            width=32,
            heads=4,
            length=16,
            embed=nn.Embedding(2, 32),
            readout=nn.Linear(32, 2),
        )
        nn.init.constant_(model.words["0"].bias, -2.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps):
            bits, odd = parity(32, 16, 3)
            y, record = model(bits)
            loss = (
                cross_entropy(model.readout(y).flatten(0, 1), odd.flatten())
                + cost * record.losses["ponder.0"]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            bits, odd = parity(128, 16, 3)
            y, record = model(bits)
            right = (model.readout(y).argmax(-1) == odd).float().mean()
        depths.append(float(record.turns[0].float().mean()))
        print(f"cost {cost}: {depths[-1]:.2f} turns, {100 * right:.1f} % right")
    return depths


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("memory", "ponder", "span", "duplicate"):
        print(f"{name}:")
        globals()[name]()


if __name__ == "__main__":
    main()
