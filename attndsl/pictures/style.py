"""What all figures share: sizes in points, colours, and how a figure becomes bytes.

A figure is 360 points wide, so that on a phone its letters are about as high as text.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from attndsl.errors import fail

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

WIDTH = 360
DPI = 200
"""Of a PNG: 1,000 pixels across."""
TITLE, TEXT, SMALL = 13, 10.5, 9.5
"""Sizes of letters, in points."""
MARGIN = 12
HUNDREDTHS = re.compile(rb"(\.\d\d)\d+")
RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "svg.fonttype": "none",
    "svg.hashsalt": "attndsl",
}


@dataclass(frozen=True)
class Theme:
    """Colours. `levels` of a cell, empty to all live, ever darker (or lighter), so that grey shows them."""

    paper: str
    ink: str
    faint: str
    grid: str
    levels: tuple[str, str, str, str, str, str]
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1b1f24",
    faint="#57606a",
    grid="#8c959f",
    levels=("#eceff2", "#f9d28f", "#f9b25c", "#ec8a22", "#c8650b", "#123a6b"),
    series=("#0072b2", "#d55e00", "#009e73", "#b4548f", "#8a6d00", "#56a0d3"),
)
DARK = Theme(
    paper="#0d1117",
    ink="#e6edf3",
    faint="#9aa5b1",
    grid="#6e7781",
    levels=("#1f262f", "#70400f", "#a85a10", "#d07a1e", "#f7b058", "#d6ebff"),
    series=("#58b0f0", "#ff9a4d", "#3ecf9e", "#e59ac6", "#e3c44f", "#a9d4f5"),
)


def demand() -> None:
    """Raises AttnError where matplotlib is not installed: it comes with an extra."""
    if find_spec("matplotlib") is None:
        raise fail("drawing takes matplotlib: pip install 'attndsl[pictures]'")


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the reader's settings; they return afterwards."""
    demand()
    import matplotlib.style

    with matplotlib.style.context(["default", RC]):
        yield


def theme(dark: bool) -> Theme:
    return DARK if dark else LIGHT


def sheet(title: str, said: list[str], body: float, colours: Theme) -> Figure:
    """A figure with its heading, and `body` points free below that."""
    from matplotlib.figure import Figure

    heading = textwrap.wrap(title, 42, max_lines=3, placeholder=" …")
    height = body + 10 + 17 * len(heading) + 15 * len(said) + 6
    figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor=colours.paper)
    figure.suptitle(
        "\n".join(heading), x=MARGIN / WIDTH, y=1 - 10 / height, ha="left", va="top", linespacing=1.15,
        fontsize=TITLE, fontweight="bold", color=colours.ink,
    )  # fmt: skip
    for i, line in enumerate(reversed(said)):
        note(figure, line, body + 6 + 15 * i, TEXT, colours.faint)
    return figure


def note(figure: Figure, text: str, up: float, size: float, colour: str) -> None:
    """A line of text, `up` points above the lower edge."""
    figure.text(MARGIN / WIDTH, up / high(figure), text, va="bottom", fontsize=size, color=colour)


def legend(figure: Figure, handles: Sequence[Artist], up: float, columns: int, colours: Theme) -> None:
    """Keys to colours and lines, `up` points above the lower edge."""
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(MARGIN / WIDTH, up / high(figure)), ncols=columns,
        frameon=False, fontsize=SMALL, labelcolor=colours.ink, handleheight=1, handletextpad=0.4,
        columnspacing=1, labelspacing=0.3, borderpad=0, borderaxespad=0,
        handlelength=1 if columns > 2 else 2.5,
    )  # fmt: skip


def high(figure: Figure) -> float:
    """The height in points."""
    return 72 * figure.get_figheight()


def render(figure: Figure, form: Literal["svg", "png"], transparent: bool = False) -> bytes:
    """The file: the same bytes for the same figure. A transparent one has no background of its own."""
    title = figure.get_suptitle().replace("\n", " ")
    metadata = {"Date": None, "Creator": None, "Title": title} if form == "svg" else {"Software": None}
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format=form, dpi=DPI, metadata=metadata, transparent=transparent)
    data = file.getvalue()
    # hundredths of a point are enough, and half of the file
    return re.sub(rb' d="[^"]*"', lambda d: HUNDREDTHS.sub(rb"\1", d[0]), data) if form == "svg" else data


@dataclass(frozen=True)
class Drawing:
    """An SVG document for light and one for dark screens; `alt` says what is to be seen in words."""

    light: str
    dark: str
    alt: str
    caption: str = ""


def drawn(draw: Callable[[bool], Figure], alt: str, caption: str = "") -> Drawing:
    """What `draw(dark)` makes, light and dark."""
    light, dark = (render(draw(dark), "svg", transparent=True).decode() for dark in (False, True))
    return Drawing(light, dark, alt, caption)
