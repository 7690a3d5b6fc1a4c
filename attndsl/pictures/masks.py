"""Masks as figures: queries run down, keys to the right, a cell is a token or a rectangle of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail
from attndsl.pictures.outlines import outlines
from attndsl.pictures.style import MARGIN, SMALL, TEXT, WIDTH, Theme, high, legend, note, sheet, styled, theme
from attndsl.tiles import cells
from attndsl.tiles.blockmask import BlockMask, TileGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path

EXACT = 512
"""Longest sequence of which each token is a cell, where one mask is drawn."""
CELLS = 256
"""Cells on a side of a longer one."""
PANELS = 4
LEGIBLE = 7.0
"""Least points between the lines of the tile grid."""
FULL, PARTIAL = cells.FULL, 3
"""Levels of tokens, by what their tile is."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One mask to draw and what stands above it."""

    label: str
    grid: TileGrid


@dataclass(frozen=True)
class Scale:
    """How the panels of one figure are drawn: tokens per cell, and whether lines part the tiles."""

    queries: int
    keys: int
    block_size: int
    lines: bool

    @property
    def exact(self) -> bool:
        return self.queries == self.keys == 1


def mask(
    block_mask: BlockMask,
    title: str = "",
    *,
    first: int = 0,
    by: Literal["token", "tile"] = "token",
    dark: bool = False,
) -> Figure:
    """The distinct masks of batch row 0, two beside each other, each under the heads that use it.

    Query row 0 stands at position `first`. By tile, a cell is one tile or a square of tiles. Raises AttnError
    for a mask without pairs.
    """
    distinct = cells.distinct(block_mask)
    alone = len(distinct) == 1
    panels = [Panel("" if alone else cells.heads(heads), grid) for heads, grid in distinct[:PANELS]]
    size = f"n = {block_mask.n:,}" + (f", nq = {block_mask.nq:,}" if block_mask.nq != block_mask.n else "")
    said = [f"{size}, {100 * block_mask.density:.3g} % live"]
    if len(distinct) > PANELS:
        said.append(f"{len(distinct) - PANELS:,} more masks are not drawn")
    return _sheet(panels, title, said, first, by, theme(dark))


def receptive_field(after: Mapping[int, TileGrid], title: str = "", *, dark: bool = False) -> Figure:
    """The masks after each number of layers, as small multiples, with the share of the pairs joined."""
    panels = [
        Panel(f"{layers} layer{'s' * (layers != 1)}: {100 * grid.nnz / (grid.nq * grid.n):.3g} %", grid)
        for layers, grid in sorted(after.items())
    ]
    said = [f"n = {panels[0].grid.n:,}, pairs joined through layers"]
    return _sheet(panels, title, said, 0, "token", theme(dark))


def layers(grids: Mapping[str, TileGrid], title: str = "", *, dark: bool = False) -> Figure:
    """The masks of layers as small multiples, each under its label."""
    panels = [Panel(label, grid) for label, grid in grids.items()]
    return _sheet(panels, title, [f"n = {panels[0].grid.n:,}"], 0, "token", theme(dark))


def level_image(grid: TileGrid, scale: Scale) -> NDArray[np.int8]:
    """The level of each cell. A token is shown by its tile: all live or not."""
    if not scale.exact:
        return cells.levels(cells.shares(grid, scale.queries, scale.keys))
    size = scale.block_size
    tiles = cells.shares(grid, size, size) == 1 if scale.lines else np.ones(grid.shape, bool)
    full = tiles.repeat(size, axis=0).repeat(size, axis=1)[: grid.nq, : grid.n]
    image: NDArray[np.int8] = np.where(full, FULL, PARTIAL).astype(np.int8) * grid.to_dense()
    return image


def ticks(first: int, count: int, most: int) -> list[int]:
    """Positions in first .. first + count, at most `most`, that are multiples of one power of two."""
    step = 1
    while (first + count) // step - -(-first // step) + 1 > most:
        step *= 2
    return list(range(-(-first // step) * step, first + count + 1, step))


def tokens(position: int) -> str:
    """`512`, `4k`, `1.5M`: a k is 1,024, as in the names of models."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if position >= unit and 4 * position % unit == 0:
            return f"{position / unit:g}{letter}"
    return f"{position:,}"


def _sheet(
    panels: list[Panel], title: str, said: list[str], first: int, by: Literal["token", "tile"], colours: Theme
) -> Figure:
    """The panels in one or two columns, under the heading and over the legend; all lengths are in points."""
    grid = panels[0].grid
    if not grid.nq * grid.n:
        raise fail(f"a mask of {grid.nq:,} x {grid.n:,} has nothing to draw")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    labels = [tokens(tick) for tick in ticks(first, grid.nq, 5)]
    left, right, gap = 26 + 6.5 * max(map(len, labels)), 14, 22
    across = (WIDTH - left - right - gap * (columns - 1)) / columns
    down = across * min(max(grid.nq / grid.n, 0.125), 1.5)
    scale = _scale(grid, across, down, columns, by)
    notes = _notes(scale)
    named = 18 if panels[0].label else 0
    key = MARGIN + 14 * len(notes)
    below = key + 18 + 36
    with styled():
        figure = sheet(title, said, rows * (named + down) + 14 * (rows - 1) + below, colours)
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            x, y = left + column * (across + gap), below + (rows - 1 - row) * (named + down + 14)
            height = high(figure)
            axes = figure.add_axes((x / WIDTH, y / height, across / WIDTH, down / height))
            outer = column == 0, i + columns >= len(panels)
            _draw(axes, panel, scale, first, outer, 5 if columns == 1 else 3, colours)
        _legend(figure, scale, key, colours)
        for i, line in enumerate(reversed(notes)):
            note(figure, line, MARGIN - 2 + 14 * i, SMALL, colours.faint)
    return figure


def _scale(grid: TileGrid, across: float, down: float, columns: int, by: Literal["token", "tile"]) -> Scale:
    size = grid.block_size
    room = CELLS // columns
    queries, keys = (
        cells.side(length, room * share, size) for length, share in ((grid.nq, down / across), (grid.n, 1))
    )
    if max(grid.nq, grid.n) <= EXACT // columns:
        queries = keys = 1
    if by == "tile":
        queries, keys = max(queries, size), max(keys, size)
    width = min(across * size / grid.n, down * size / grid.nq)
    fits = LEGIBLE <= width and size < max(grid.nq, grid.n)
    return Scale(queries, keys, size, lines=fits and (queries < size or by == "tile"))


def _notes(scale: Scale) -> list[str]:
    """What a cell and the lines stand for."""
    lines = f"lines part tiles of {scale.block_size:,}"
    if scale.exact:
        return [f"one cell is one token; {lines}" if scale.lines else "one cell is one token"]
    cell = f"one cell is {scale.queries:,} × {scale.keys:,} tokens, its colour the share that is live"
    return [cell, lines] if scale.lines else [cell]


def _draw(
    axes: Axes,
    panel: Panel,
    scale: Scale,
    first: int,
    outer: tuple[bool, bool],
    most: int,
    colours: Theme,
) -> None:
    """One mask; labels of an axis where it is the outer one."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.transforms import Affine2D

    grid = panel.grid
    image = level_image(grid, scale)
    rows, columns = image.shape
    cell = Affine2D().scale(scale.keys, scale.queries).translate(0, first) + axes.transData
    axes.add_artist(Rectangle((0, 0), columns, rows, linewidth=0, color=colours.levels[0], transform=cell))
    for level in np.unique(image[image > 0]):
        # each lies on the one below it: no gap shows between two
        region = _region(image >= level)
        patch = PathPatch(region, linewidth=0, color=colours.levels[level], transform=cell, snap=True)
        axes.add_artist(patch)
    axes.set_xlim(0, grid.n)
    axes.set_ylim(first + grid.nq, first)
    if scale.lines:
        size = scale.block_size
        upright = [((x, first), (x, first + grid.nq)) for x in range(size, grid.n, size)]
        level = [((0, y), (grid.n, y)) for y in range(first + size, first + grid.nq, size)]
        axes.add_collection(LineCollection(upright + level, colors=colours.grid, linewidths=0.4, alpha=0.4))
    for axis, start, count, shown, name in (
        (axes.xaxis, 0, grid.n, outer[1], "key"),
        (axes.yaxis, first, grid.nq, outer[0], "query"),
    ):
        places = ticks(start, count, most)
        axis.set_ticks(places, [tokens(place) for place in places] if shown else [])
        if shown:
            axis.set_label_text(name, fontsize=TEXT, color=colours.ink)
    axes.tick_params(labelsize=SMALL, length=3, width=0.6, color=colours.faint, labelcolor=colours.faint)
    axes.spines[:].set_visible(False)
    if panel.label:
        axes.set_title(panel.label, loc="left", fontsize=TEXT, color=colours.ink, pad=4)


def _region(cells: NDArray[np.bool_]) -> Path:
    """The outlines of the cells."""
    from matplotlib.path import Path

    found = outlines(cells)
    codes = [code for one in found for code in (Path.MOVETO, *[Path.LINETO] * (len(one) - 1), Path.CLOSEPOLY)]
    return Path(np.concatenate([part for one in found for part in (one, one[:1])]), codes)


def _legend(figure: Figure, scale: Scale, up: float, colours: Theme) -> None:
    from matplotlib.patches import Patch

    if not scale.exact:
        shown = list(enumerate(cells.LEVELS, 1))[::-1]
    elif scale.lines:
        shown = [(FULL, "live, in a full tile"), (PARTIAL, "live, in a partial tile")]
    else:
        shown = [(FULL, "live")]
    handles = [Patch(facecolor=colours.levels[level], label=label) for level, label in shown]
    legend(figure, handles, up, 4, colours)
