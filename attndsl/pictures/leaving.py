"""How many turns each token took of a stage that tokens may leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from attndsl.errors import fail
from attndsl.pictures.style import MARGIN, SMALL, WIDTH, high, sheet, styled, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEFT, RIGHT, ROW = 46, 60, 14


def turns(taken: ArrayLike, title: str = "", *, dark: bool = False) -> Figure:
    """Rows of a batch one below the other, tokens to the right, darker the later they left.

    taken: [B, n], `record.turns[i]` or `record.exits[i].turns`. Raises AttnError for another shape.
    """
    found = np.asarray(taken)
    if found.ndim != 2 or not found.size:
        raise fail(f"turns are [B, n], not {[*found.shape]}")
    rows = len(found)
    down, below = max(ROW * rows, 3 * ROW), MARGIN + 30
    colours = theme(dark)
    with styled():
        figure = sheet(title, [f"mean {found.mean():.3g} of {found.max()} turns"], down + below, colours)
        height = high(figure)
        axes = figure.add_axes(
            (LEFT / WIDTH, below / height, 1 - (LEFT + RIGHT) / WIDTH, down / height), facecolor="none"
        )
        image = axes.imshow(
            found, aspect="auto", interpolation="nearest", cmap="cividis", vmin=0.5, vmax=found.max() + 0.5
        )
        axes.set_xlabel("token", fontsize=SMALL, color=colours.ink)
        axes.set_ylabel("row", fontsize=SMALL, color=colours.ink)
        axes.set_yticks([0, rows - 1] if rows > 1 else [0])
        axes.tick_params(colors=colours.ink, labelsize=SMALL)
        beside = figure.add_axes(((WIDTH - RIGHT + 12) / WIDTH, below / height, 10 / WIDTH, down / height))
        bar = figure.colorbar(image, cax=beside, ticks=sorted({1, int(found.max())}))
        bar.ax.tick_params(colors=colours.ink, labelsize=SMALL)
    return figure
