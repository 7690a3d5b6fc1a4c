"""A block mask as text for a terminal.

Where one token fits a column the picture is exact, two rows of tokens to a line. Above that a character
stands for a rectangle of tokens and its shade says how much of it is live; any live pair leaves a mark,
so a narrow window stays visible at any length. Nothing of size n x n is made unless that is small.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from itertools import zip_longest

import click
import numpy as np
from numpy.typing import NDArray

from attndsl.errors import quantity as quantity
from attndsl.tiles import cells
from attndsl.tiles.blockmask import BlockMask

PANELS = 4
HALVES = np.array([" ", "▄", "▀", "█"])
SHADES = np.array([" ", "·", "░", "▒", "▓", "█"])
LEGEND = ", ".join(f"{shade} {level}" for shade, level in zip(SHADES[1:], cells.LEVELS, strict=True))


def picture(block_mask: BlockMask, width: int = 80, first: int = 0) -> str:
    """The distinct masks of batch row 0, each under the heads that use it, two beside each other.

    Queries run down from position `first`, keys to the right; the last lines say what a character
    stands for.
    """
    distinct = cells.distinct(block_mask)
    shown = distinct[:PANELS]
    alone = len(shown) == 1
    room = width - 2 if alone else (width - 2) // 2 - 2
    queries, keys = cell(block_mask, room)
    exact = queries == keys == 1
    frames = [
        framed(_exact(grid.to_dense()) if exact else _shaded(cells.shares(grid, queries, keys)))
        for _, grid in shown
    ]
    if alone:
        lines = frames[0]
    else:
        named = [
            [cells.heads(users)[: room + 2], *frame] for (users, _), frame in zip(shown, frames, strict=True)
        ]
        pairs = zip_longest(named[::2], named[1::2], fillvalue=list[str]())
        rows = [row for pair in pairs for row in zip_longest(*pair, fillvalue="")]
        lines = [f"{left:{room + 2}}  {right}".rstrip() for left, right in rows]
    if len(distinct) > PANELS:
        lines.append(f"and {len(distinct) - PANELS:,} more: `show --head` shows one")
    down, across = span("query", "queries", first, block_mask.nq), span("key", "keys", 0, block_mask.n)
    lines.append(f"{down} down, {across} across")
    if exact:
        lines.append("one character = 1 key x 2 queries")
    else:
        size = f"{quantity(keys, 'key')} x {quantity(queries, 'query', 'queries')}"
        lines += [f"one character = {size}", *textwrap.wrap(LEGEND, width)]
    return "\n".join(lines)


def span(one: str, many: str, first: int, count: int) -> str:
    """`key 0`, `keys 0..2,047`."""
    return f"{one} {first:,}" if count == 1 else f"{many} {first:,}..{first + count - 1:,}"


def coloured(text: str) -> str:
    """Full characters in cyan, partial ones in magenta."""
    return re.sub("[·░▒▓]+", "\x1b[35m\\g<0>\x1b[0m", re.sub("[█▀▄]+", "\x1b[36m\\g<0>\x1b[0m", text))


def cell(block_mask: BlockMask, room: int) -> tuple[int, int]:
    """Queries and keys that one character stands for, (1, 1) where the picture is exact.

    A character is about twice as high as wide.
    """
    nq, n = block_mask.nq, block_mask.n
    keys = cells.side(n, room, block_mask.block_size)
    if keys == 1 and nq <= room:
        return 1, 1
    sides = cells.sides(block_mask.block_size, max(nq, 2 * keys))
    queries = next(side for side in sides if side >= max(2 * keys, nq / room))
    while queries > 1 and nq < 8 * queries:
        queries = sides[sides.index(queries) - 1]
    return queries, keys


def framed(body: list[str]) -> list[str]:
    rule = "─" * len(body[0])
    return [f"┌{rule}┐", *(f"│{line}│" for line in body), f"└{rule}┘"]


def _exact(mask: NDArray[np.bool_]) -> list[str]:
    padded = np.pad(mask, ((0, len(mask) % 2), (0, 0))).astype(np.int8)
    return ["".join(row) for row in HALVES[2 * padded[::2] + padded[1::2]]]


def _shaded(shares: NDArray[np.float64]) -> list[str]:
    return ["".join(row) for row in SHADES[cells.levels(shares)]]


def width() -> int:
    """Columns of a picture on this terminal."""
    return max(60, min(80, shutil.get_terminal_size().columns))


def echo(text: str) -> None:
    """Prints a picture, in colours where the terminal shows them."""
    click.echo(coloured(text) if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text)
