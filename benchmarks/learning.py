"""What stacks learn on a CPU, in minutes: memory, pondering, spans, duplication.

    python -m benchmarks.learning memory ponder span duplicate

Each prints its figures; those measured are in RESULTS.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attndsl
from attndsl import spans

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


def ponder(steps: int = 400, costs: Sequence[float] = (0.0, 0.01, 0.1)) -> list[float]:
    """Parity of the last three bits; the mean depth by what a turn costs."""
    depths = []
    for cost in costs:
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


SPAN = """
attention adaptive(z = learn[H](0.9)) { mask causal & last(81)  decay ramp(q - k, 64 * z, 16) }
stack majority { layers(1) { adaptive  ffn(2) } }
"""


def span(steps: int = 300, costs: Sequence[float] = (0.0, 3e-3, 1e-2, 1e-1)) -> list[float]:
    """Whether most of the last 25 bits are 1; the mean span, of 64 at most, by what a position costs."""
    means = []
    for cost in costs:
        torch.manual_seed(0)
        model = attndsl.build(
            attndsl.parse(SPAN)["majority"],
            width=32,
            heads=4,
            length=96,
            embed=nn.Embedding(2, 32),
            readout=nn.Linear(32, 2),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(steps):
            bits = torch.randint(2, (16, 96))
            most = (bits.unfold(1, 25, 1).sum(2) > 12).long()
            y, _ = model(bits)
            logits = model.readout(y[:, 24:])
            loss = cross_entropy(logits.flatten(0, 1), most.flatten())
            optimizer.zero_grad()
            (loss + cost * spans.penalty(model, "z", longest=64)).backward()
            optimizer.step()
            spans.clamp(model, "z")
        means.append(float(spans.penalty(model, "z", longest=64).detach()))
        right = (logits.argmax(-1) == most).float().mean()
        print(f"cost {cost}: spans of {means[-1]:.1f}, {100 * right:.1f} % right")
    return means


DUPLICATE = """
attention hashed { mask causal & lsh(2, 16)  score shared_qk }
stack reformer { reversible { layers(1) { tied { hashed }  ffn(2) } } }
"""


class Placed(nn.Module):
    """Embeddings of symbols and of positions."""

    def __init__(self, symbols: int, length: int, width: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(length, width)
        for table in (self.symbols, self.places):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.symbols(x) + self.places.weight[: x.shape[1]]


def doubled(rows: int) -> Tensor:
    """[rows, 128] of 0w0w, w 63 symbols of 1 .. 15 (Kitaev et al. 2020, section 5)."""
    half = torch.randint(1, 16, (rows, 64))
    half[:, 0] = 0
    return half.repeat(1, 2)


def duplicate(steps: int = 1200, seed: int = 0) -> float:
    """The second w of 0w0w, in pieces of 16: the share of its symbols that are right, on fresh data."""
    torch.manual_seed(seed)
    model = attndsl.build(
        attndsl.parse(DUPLICATE)["reformer"],
        width=64,
        heads=2,
        length=128,
        embed=Placed(16, 128, 64),
        readout=nn.Linear(64, 16),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)

    def logits(x: Tensor) -> Tensor:
        return model.readout(model(x)[0][:, 64:-1])

    for _ in range(steps):
        x = doubled(16)
        loss = cross_entropy(logits(x).flatten(0, 1), x[:, 65:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x = doubled(128)
        right = float((logits(x).argmax(-1) == x[:, 65:]).float().mean())
    print(f"seed {seed}: {100 * right:.2f} % of 128 sequences right after {steps} steps")
    return right


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("memory", "ponder", "span", "duplicate"):
        print(f"{name}:")
        globals()[name]()


if __name__ == "__main__":
    main()
