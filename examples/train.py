"""Trains a stack as a language model of bytes: `python examples/train.py FILE:STACK -o out`.

The text is Moby Dick, if no other is given; its last twentieth is held out. The text runs in as many streams
as there are rows of a batch; each step takes the next segment of each, behind the state of the one before, if
the stack remembers. `out` gets `curve.png`, the loss by steps and bits per byte of the held-out text, and
`last.pt`, from which the same call goes on.
"""

from __future__ import annotations

import lzma
import math
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attndsl

BOOK = Path(__file__).parent / "data" / "moby-dick.txt.xz"
BYTES, HELD_OUT = 256, 20


def read(path: Path) -> bytes:
    """A text, compressed or not."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def streams(data: bytes, rows: int) -> Tensor:
    """int64 [rows, m]: as many pieces of the text, side by side."""
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return text[: len(text) // rows * rows].view(rows, -1)


def loss_of(model: attndsl.StackModule, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The mean cross entropy of each next byte of piece [rows, segment + 1], in nats, and the record."""
    y, record = model(piece[:, :-1], state=state)
    assert model.readout is not None
    return cross_entropy(model.readout(y).flatten(0, 1), piece[:, 1:].flatten()), record


@torch.no_grad()
def bits(model: attndsl.StackModule, text: Tensor, segment: int) -> float:
    """Bits per byte of the streams [rows, m], segment after segment, with the state that they leave."""
    model.eval()
    state, total, count = None, 0.0, 0
    for start in range(0, text.shape[1] - 1, segment):
        piece = text[:, start : start + segment + 1]
        loss, record = loss_of(model, piece, state)
        state, size = record.state, piece.shape[1] - 1
        total, count = total + float(loss) * size, count + size
    model.train()
    return total / count / math.log(2)


def made(stack: attndsl.Stack, width: int, heads: int, segment: int) -> attndsl.StackModule:
    """Bytes in, logits of bytes out."""
    embed, readout = nn.Embedding(BYTES, width), nn.Linear(width, BYTES)
    nn.init.normal_(embed.weight, std=0.02)
    return attndsl.build(stack, width=width, heads=heads, length=segment, embed=embed, readout=readout)


def trained(
    model: attndsl.StackModule,
    data: bytes,
    *,
    steps: int,
    segment: int,
    rows: int,
    rate: float,
    out: Path | None = None,
    ponder: float = 0.01,
) -> tuple[list[float], float]:
    """The loss of each step, in bits per byte, and that of the held-out text at the end."""
    cut = len(data) - len(data) // HELD_OUT
    text, held_out = streams(data[:cut], rows), streams(data[cut:], rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    state = None
    checkpoint = out / "last.pt" if out else None
    if checkpoint is not None and checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        losses, state = kept["losses"], kept["state"]
    turn = (text.shape[1] - 1) // segment
    with click.progressbar(range(len(losses), steps), label="training", show_pos=True) as bar:
        for step in bar:
            at = step % turn * segment
            loss, record = loss_of(model, text[:, at : at + segment + 1], state if at else None)
            state = record.state
            losses.append(float(loss.detach()) / math.log(2))
            for name, extra in record.losses.items():
                loss = loss + (ponder if name.startswith("ponder") else 1.0) * extra
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if checkpoint is not None and ((step + 1) % 100 == 0 or step + 1 == steps):
                kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                kept |= {"schedule": schedule.state_dict(), "losses": losses, "state": state}
                torch.save(kept, checkpoint)
    return losses, bits(model, held_out, segment)


def curve(losses: list[float], held_out: float, path: Path) -> None:
    """A picture of the losses, each the mean of a hundredth of the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="bits per byte")
    size = max(len(losses) // 100, 1)
    means = torch.tensor(losses[: len(losses) // size * size]).view(-1, size).mean(1)
    axes.plot([(i + 0.5) * size for i in range(len(means))], means.tolist(), label="training")
    axes.axhline(held_out, linestyle="--", label=f"held out: {held_out:.3f}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


@click.command()
@click.argument("target", metavar="FILE:STACK")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), default=BOOK, help="Another text.")
@click.option("--steps", type=int, default=2000, show_default=True)
@click.option("--segment", type=int, default=64, show_default=True, help="Bytes of a row and step.")
@click.option("--rows", type=int, default=16, show_default=True)
@click.option("--width", type=int, default=128, show_default=True)
@click.option("--heads", type=int, default=4, show_default=True)
@click.option("--rate", type=float, default=3e-3, show_default=True, help="The greatest learning rate.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    target: str, out: Path, text: Path, steps: int, segment: int, rows: int, width: int, heads: int,
    rate: float, seed: int,
) -> None:  # fmt: skip
    """Trains FILE:STACK as a language model of bytes."""
    file, _, name = target.rpartition(":")
    stack = attndsl.load(file)[name]
    assert isinstance(stack, attndsl.Stack), f"{name} is no stack"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = made(stack, width, heads, segment)
    losses, held_out = trained(model, read(text), steps=steps, segment=segment, rows=rows, rate=rate, out=out)
    curve(losses, held_out, out / "curve.png")
    click.echo(f"{held_out:.3f} bits per byte of the held-out text; the curve is in {out / 'curve.png'}")


if __name__ == "__main__":
    main()
