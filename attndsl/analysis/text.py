"""How parts write what they found for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
LABEL = 14


def line(label: str, said: object) -> str:
    """A label and what is said, over as many lines as it needs."""
    indent = " " * (LABEL + 2)
    wrapped = textwrap.wrap(
        str(said), WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False
    )
    return "\n".join([f"  {label:<{LABEL}}" + (wrapped[0][LABEL + 2 :] if wrapped else ""), *wrapped[1:]])


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    from tabulate import tabulate

    text = tabulate(
        rows,
        headers,
        tablefmt="plain",
        disable_numparse=True,
        colalign=["left", *["right"] * (len(headers) - 1)],
    )
    return textwrap.indent(text, "  ")
