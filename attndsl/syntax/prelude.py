"""The prelude as text: what kind of definition a name is, for what is said of texts that cannot be read."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

HEAD = r"^[ \t]*(pattern|score|let|attention|stack)[ \t]+([A-Za-z_]\w*)(\(?)"


@cache
def prelude_text() -> str:
    return files("attndsl.grammar").joinpath("prelude.attn").read_text(encoding="utf-8")


@cache
def prelude_words() -> dict[str, str]:
    """The names that the prelude defines, each with its word: `score` for `alibi`."""
    return {name: word for word, name, _ in re.findall(HEAD, prelude_text(), re.MULTILINE)}


def word_of(text: str, name: str) -> str:
    """The word that defines a name in a text or, if it does not, in the prelude; empty if neither does."""
    own = {found: word for word, found, _ in re.findall(HEAD, text, re.MULTILINE)}
    return own.get(name) or prelude_words().get(name, "")


def takes(text: str, name: str) -> bool | None:
    """Whether what is defined so has parameters; None for a name that neither defines."""
    for source in (text, prelude_text()):
        for _, found, parameters in re.findall(HEAD, source, re.MULTILINE):
            if found == name:
                return bool(parameters)
    return None
