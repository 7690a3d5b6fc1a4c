"""Cost against length, on two logarithmic axes, where O(n) and O(n^2) are straight lines."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attndsl.errors import fail
from attndsl.pictures.masks import tokens
from attndsl.pictures.style import MARGIN, SMALL, TEXT, WIDTH, Theme, high, legend, sheet, styled, theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[ArrayLike, ArrayLike]
DOWN, LEFT, RIGHT = 240, 62, 40
MARKERS = "osD^v*"
ROOM = 1.5
"""What the axes reach beyond the data, as a factor."""


def cost(
    curves: Mapping[str, Curve],
    ideal: Curve | None = None,
    title: str = "",
    *,
    unit: str = "seconds",
    dark: bool = False,
) -> Figure:
    """One curve for each lowering, a dashed one for the ideal, and guides for O(n) and O(n^2).

    A curve is lengths and costs, two arrays of one shape; what is not positive is left out. Curves differ in
    their markers too. Raises AttnError where nothing is left.
    """
    drawn = {name: _positive(curve) for name, curve in curves.items()}
    least = None if ideal is None else _positive(ideal)
    points = np.concatenate([*drawn.values(), *([] if least is None else [least])], axis=1)
    if not points.size:
        raise fail("no cost is positive: there is nothing to draw")
    colours = theme(dark)
    columns = 2
    entries = len(drawn) + (least is not None)
    below = MARGIN + 15 * -(-entries // columns) + 40
    with styled():
        figure = sheet(title, [], DOWN + below, colours)
        height = high(figure)
        axes = figure.add_axes(
            (LEFT / WIDTH, below / height, 1 - (LEFT + RIGHT) / WIDTH, DOWN / height),
            facecolor="none", xscale="log", yscale="log",
        )  # fmt: skip
        (start, bottom), (end, top) = points.min(axis=1), points.max(axis=1)
        axes.set_xlim(start / ROOM, end * ROOM)
        axes.set_ylim(bottom / ROOM, top * ROOM)
        base = points[1, points[0] == start].min()
        for power, name in ((1, "O(n)"), (2, "O(n²)")):
            far = min(end, start * (top / base) ** (1 / power))
            reached = base * (far / start) ** power
            axes.plot([start, far], [base, reached], color=colours.faint, linewidth=1, linestyle=":")
            axes.annotate(
                name, (far, reached), (4, 0), textcoords="offset points", va="center", fontsize=SMALL,
                color=colours.faint, annotation_clip=False,
            )  # fmt: skip
        looks = zip(itertools.cycle(colours.series), itertools.cycle(MARKERS), strict=False)
        lines: list[Any] = []
        for (name, curve), (colour, marker) in zip(drawn.items(), looks, strict=False):
            lines += axes.plot(*curve, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
        if least is not None:
            lines += axes.plot(*least, color=colours.ink, linestyle="--", linewidth=1.2, label="ideal")
        _label(axes, unit, start, end, colours)
        legend(figure, lines, MARGIN, columns, colours)
    return figure


def _positive(curve: Curve) -> NDArray[np.float64]:
    """The points [2, m] whose length and cost are positive, by rising length."""
    points = np.stack([np.asarray(values, dtype=np.float64) for values in curve])
    points = points[:, (points > 0).all(axis=0)]
    return points[:, np.argsort(points[0], kind="stable")]


def _label(axes: Axes, unit: str, start: float, end: float, colours: Theme) -> None:
    """Lengths are marked at powers of two, at most seven."""
    from matplotlib.ticker import LogLocator, NullLocator

    powers = np.arange(np.ceil(np.log2(start)), np.floor(np.log2(end)) + 1)
    places = [2 ** int(power) for power in powers[:: -(-len(powers) // 7) or 1]]
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_ticks(places, [tokens(place) for place in places])
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("n", fontsize=TEXT, color=colours.ink)
    axes.set_ylabel(unit, fontsize=TEXT, color=colours.ink)
    axes.grid(color=colours.levels[0], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, length=3, width=0.6, color=colours.faint, labelcolor=colours.faint)
    axes.spines[:].set_visible(False)
