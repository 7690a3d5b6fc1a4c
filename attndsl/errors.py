"""Diagnostics: where in a source something is, and the one exception for a user's mistake."""

from __future__ import annotations

import bisect
import contextlib
import reprlib
import textwrap
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from typing import Literal


@dataclass(frozen=True)
class Source:
    """A named text that spans point into."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def line_starts(self) -> list[int]:
        return [0, *(i + 1 for i, char in enumerate(self.text) if char == "\n")]

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of a character offset, both counted from 1."""
        line = bisect.bisect_right(self.line_starts, offset) - 1
        return line + 1, offset - self.line_starts[line] + 1

    def line(self, number: int) -> str:
        start = self.line_starts[number - 1]
        end = self.text.find("\n", start)
        return self.text[start : end if end >= 0 else len(self.text)]


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a source."""

    source: Source
    start: int
    end: int

    def to(self, other: Span) -> Span:
        return Span(self.source, self.start, other.end)

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]


Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Diagnostic:
    """One terse message, the tightest span that shows it, and at most one help line."""

    message: str
    span: Span | None = None
    help: str = ""
    severity: Severity = "error"

    def __str__(self) -> str:
        return self.shown(None)

    def shown(self, width: int | None) -> str:
        """With message and help in lines of `width` columns, which break nothing in backticks."""
        parts = [wrapped(f"{self.severity}: ", self.message, width)]
        if self.span is not None:
            parts.append(excerpt(self.span))
        if self.help:
            parts.append(wrapped("  help: ", self.help, width))
        return "\n".join(parts)


def wrapped(label: str, text: str, width: int | None) -> str:
    """Text behind a label, further lines under the text. What stands in backticks stays on one line."""
    if width is None or len(label) + len(text) <= width:
        return label + text
    parts = text.split("`")
    parts[1::2] = [code.replace(" ", "\0") for code in parts[1::2]]
    lines = textwrap.wrap("`".join(parts), width - len(label), break_long_words=False, break_on_hyphens=False)
    return label + f"\n{' ' * len(label)}".join(lines).replace("\0", " ")


def excerpt(span: Span, width: int = 76) -> str:
    """The first line of the span with carets under it, cut to `width` columns around the carets."""
    line, column = span.source.position(span.start)
    text = span.source.line(line).removesuffix("\r")
    marked = max(1, min(span.end - span.start, len(text) - column + 1))
    gutter = len(str(line))
    room = width - gutter - 3
    cut = max(0, column - 1 + min(marked, room // 2) - room + 1) if len(text) > room else 0
    shown = "".join(char if char.isprintable() else " " for char in text[cut : cut + room])
    shown = "…" + shown[1:] if cut else shown
    shown = shown[:-1] + "…" if cut + room < len(text) else shown
    carets = "^" * max(1, min(marked, room - (column - 1 - cut)))
    return (
        f"{' ' * gutter}--> {span.source.name}:{line}:{column}\n"
        f"{line} | {shown}\n"
        f"{' ' * gutter} | {' ' * (column - 1 - cut)}{carets}"
    )


BETWEEN = ("attndsl", "IPython", "contextlib", "torch")
"""Packages whose frames tell a reader nothing of their mistake."""


class AttnError(Exception):
    """A user's mistake, of `Diagnostic`s. `str(error)` is their text, all that were found in one run.

    torch.compile follows the making of an exception only where that has no `__init__` of its own.
    """

    @property
    def diagnostics(self) -> tuple[Diagnostic, ...]:
        """All that is wrong: message, place and help of each."""
        return self.args

    def __str__(self) -> str:
        return self.shown(None)

    def shown(self, width: int | None) -> str:
        """All of them, each as `Diagnostic.shown` in lines of `width` columns; None breaks none."""
        return "\n\n".join(told.shown(width) for told in self.diagnostics)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: the way to the call through the reader's own code, then the text."""
        frames = [
            frame
            for frame in traceback.walk_tb(self.__traceback__)
            if frame[0].f_globals.get("__name__", "").partition(".")[0] not in BETWEEN
        ]
        way = traceback.StackSummary.extract(iter(frames)).format()
        return [*"".join(way).splitlines(), *str(self).splitlines()]


@contextlib.contextmanager
def asking(plugin: str) -> Iterator[None]:
    """What a plugin raises passes as it is; what is no AttnError gets a note that names the innermost one."""
    try:
        yield
    except AttnError:
        raise
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"raised by {plugin}")
        raise


def fail(message: str, span: Span | None = None, help: str = "") -> AttnError:
    """An AttnError of one diagnostic, to be raised by the caller."""
    return AttnError(Diagnostic(message, span, help))


def brief(value: object) -> str:
    """A value of a user's, of any size, in at most 60 characters."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def quantity(number: int, one: str, many: str = "") -> str:
    """`1 axis`, `2,048 axes`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def suggest(name: str, known: Iterable[str]) -> str:
    """A help line with the known name that was probably meant, or an empty one."""
    names = sorted(known)
    same = [other for other in names if other.lower() == name.lower()]
    near = same or get_close_matches(name, names, 3, cutoff=0.76)
    near.sort(key=lambda other: other[0] != name[:1])
    return f"did you mean `{near[0]}`?" if near else ""
