"""How parts write what they found for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 80
LABEL = 14


def line(label: str, said: object) -> str:
    """A label and what is said, over as many lines as it needs."""
    start = f"  {label:<{LABEL - 1}} "
    return textwrap.fill(
        str(said), WIDTH, initial_indent=start, subsequent_indent=" " * (LABEL + 2), break_long_words=False
    ).rstrip()


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
