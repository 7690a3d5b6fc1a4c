"""The Pygments lexer of .attn files, `attn`: words are told apart by the grammar itself.

Pygments finds it by its entry point. attndsl does not need Pygments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from lark import UnexpectedCharacters
from pygments import token as kinds
from pygments.lexer import Lexer

from attndsl.language.vocabulary import BUILT_IN, RESERVED
from attndsl.syntax.parse import grammar
from attndsl.syntax.tokens import CLAUSES, DEFINITIONS, LOOSE, OPERATORS, extent

KINDS = {
    **dict.fromkeys(map(str.upper, DEFINITIONS), kinds.Keyword.Declaration),
    **dict.fromkeys(map(str.upper, (*CLAUSES, "else")), kinds.Keyword),
    **dict.fromkeys(OPERATORS | LOOSE | {"TILDE", "ASSIGN"}, kinds.Operator),
    **dict.fromkeys(["_OR", "_AND", "NOT"], kinds.Operator.Word),
    **dict.fromkeys(["INT", "PERCENT"], kinds.Number.Integer),
    "FLOAT": kinds.Number.Float,
    "STRING": kinds.String,
    "COMMENT": kinds.Comment.Single,
    "SPACE": kinds.Whitespace,
    "NAME": kinds.Name,
}
"""Of terminals; any other is punctuation."""
DEFINING = frozenset(("PATTERN", "SCORE", "LET", "ATTENTION"))


class AttnLexer(Lexer):  # type: ignore[misc]  # Pygments has no types
    """Tokens of a text; what the grammar has no token for is an Error."""

    name = "attn"
    aliases: ClassVar = ["attn"]
    filenames: ClassVar = ["*.attn"]
    mimetypes: ClassVar = ["text/x-attn"]
    url = ""

    def get_tokens_unprocessed(self, text: str) -> Iterator[tuple[int, Any, str]]:
        start, previous = 0, ""
        while start < len(text):
            end = start
            try:
                for word in grammar().lex(text[start:], dont_ignore=True):
                    at, end = (start + place for place in extent(word))
                    yield at, _kind(word.type, str(word), previous), str(word)
                    previous = previous if word.type in ("SPACE", "COMMENT") else word.type
                return
            except UnexpectedCharacters:
                yield end, kinds.Error, text[end]
                start = end + 1


def _kind(terminal: str, word: str, previous: str) -> Any:
    if terminal == "COMMENT" and word.startswith("##"):
        return kinds.Comment.Special
    if terminal in ("COMPARE", "MULTIPLY") and word.isalpha():
        return kinds.Operator.Word
    if terminal == "NAME":
        if word in RESERVED:
            return kinds.Name.Builtin.Pseudo
        if word in BUILT_IN:
            return kinds.Name.Builtin
        if previous in DEFINING:
            return kinds.Name.Function
    return KINDS.get(terminal, kinds.Punctuation)
