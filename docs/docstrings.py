"""Docstrings of the code as reStructuredText: their paragraphs, their lists of names, their code."""

from __future__ import annotations

import re
import textwrap
from typing import Any

ENTRY = re.compile(r"([\w`.]+(?:, [\w`.]+)*)(?::\s+|\s{2,})(\S.*)")
CONSTRUCTED = ("attndsl.backend", "attndsl.analysis.part")


def processed(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Sphinx's hook: the lines are changed in place."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    lines[:] = "\n\n".join(map(block, blocks)).split("\n")


def unsigned(app: object, what: str, name: str, obj: Any, *rest: object) -> tuple[str, None] | None:
    """Sphinx's hook: no signature for classes that nobody but attndsl constructs."""
    return ("", None) if what in ("class", "exception") and obj.__module__ not in CONSTRUCTED else None


def block(text: str) -> str:
    """What stands between two blank lines: code, a list of names, or a paragraph."""
    if all(line.startswith(" ") for line in text.split("\n")):
        return f"::\n\n{textwrap.indent(textwrap.dedent(text), '    ')}"
    entries = re.split(r"\n(?! )", text)
    found = [ENTRY.fullmatch(" ".join(line.strip() for line in entry.split("\n"))) for entry in entries]
    if all(found):
        return "\n\n".join(f"``{e[1].replace('`', '')}``\n    {inline(e[2])}" for e in found if e)
    return inline(" ".join(line.strip() for line in text.split("\n")))


def inline(text: str) -> str:
    """Text between backticks is code; nothing else is markup."""
    parts = text.split("`")
    plain = [re.sub(r"([\\*|_])|^(?=[-+=>#:.])", r"\\\1", part) for part in parts[::2]]
    code = [f"``{part}``" for part in parts[1::2]]
    return "\\ ".join(piece for pair in zip(plain, [*code, ""], strict=False) for piece in pair if piece)
