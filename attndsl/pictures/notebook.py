"""What notebooks show: masks as small vector pictures, light or dark as the page around them is."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from attndsl.pictures.outlines import path
from attndsl.pictures.style import DARK, LIGHT, Theme
from attndsl.tiles import cells
from attndsl.tiles.blockmask import BlockMask

CELLS = 96
"""On a side of a picture, at most."""
PANELS = 4


def _colours(theme: Theme) -> str:
    return "".join(f"--attndsl-{i}:{colour};" for i, colour in enumerate(theme.levels))


LIGHT_PAGES = ('[data-jp-theme-light="true"]', ".vscode-light", '[data-theme="light"]', '[theme="light"]')
DARK_PAGES = ('[data-jp-theme-light="false"]', ".vscode-dark", '[data-theme="dark"]', '[theme="dark"]')
"""How JupyterLab, VS Code, Sphinx and Colab tell their theme. Where none does, the screen decides."""
STYLE = (
    f".attndsl{{{_colours(LIGHT)}display:flex;flex-wrap:wrap;gap:1em 1.5em}}"
    f"@media(prefers-color-scheme:dark){{.attndsl{{{_colours(DARK)}}}}}"
    f"{','.join(f'{page} .attndsl' for page in LIGHT_PAGES)}{{{_colours(LIGHT)}}}"
    f"{','.join(f'{page} .attndsl' for page in DARK_PAGES)}{{{_colours(DARK)}}}"
    ".attndsl figure{margin:0;width:16em;max-width:100%}"
    ".attndsl figcaption{line-height:1.35;margin-bottom:.4em;overflow-wrap:anywhere}"
    ".attndsl svg{display:block;width:100%}"
    ".attndsl pre{margin:0;max-width:100%;overflow-x:auto;white-space:pre;line-height:1.25;"
    "font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace!important}"
    + "".join(f".attndsl .l{i}{{fill:var(--attndsl-{i})}}" for i in range(len(LIGHT.levels)))
)


def shown(parts: Iterable[str]) -> str:
    """One output of a cell: figures and texts beside one another."""
    return f'<div class="attndsl"><style>{STYLE}</style>{"".join(parts)}</div>'


def text(said: str) -> str:
    """A text as it is, letter under letter."""
    return f"<pre>{escape(said)}</pre>"


def figures(block_mask: BlockMask, title: str, note: str = "") -> str:
    """The distinct masks of batch row 0, the first four of them, each under its heads."""
    distinct = cells.distinct(block_mask)
    nq, n = block_mask.nq, block_mask.n
    if not nq * n:
        return text(f"{title}: {nq:,} x {n:,}")
    size = f"n = {n:,}" + (f", nq = {nq:,}" if nq != n else "")
    queries, keys = (cells.side(length, CELLS, block_mask.block_size) for length in (nq, n))
    cell = "token" if queries == keys == 1 else f"{queries:,} × {keys:,} tokens"
    drawn = []
    for users, grid in distinct[:PANELS]:
        heads = "" if len(distinct) == 1 else f", {cells.heads(users)}"
        live = 100 * grid.nnz / (nq * n)
        said = f"{size}{heads}, {live:.3g} % live{note}; a cell is {'a ' * (cell == 'token')}{cell}"
        levels = cells.levels(cells.shares(grid, queries, keys))
        rows, columns = levels.shape
        # where a page takes the style away, the colours of the light theme are left
        regions = "".join(
            f'<path class="l{i}" fill="{LIGHT.levels[i]}" d="{path(levels >= i)}"/>'
            for i in sorted({*levels[levels > 0].tolist()})
        )
        drawn.append(
            f"<figure><figcaption><b>{escape(title)}</b><br><small>{escape(said)}</small></figcaption>"
            f'<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img" '
            f'style="aspect-ratio:{columns}/{max(rows, columns / 8):g}" '
            f'aria-label="Mask of {escape(title)}, queries down and keys across: {escape(said)}">'
            f'<rect class="l0" fill="{LIGHT.levels[0]}" width="{columns}" height="{rows}"/>'
            f"{regions}</svg></figure>"
        )
    more = len(distinct) - PANELS
    return "".join(drawn) + (text(f"and {more:,} more masks") if more > 0 else "")
