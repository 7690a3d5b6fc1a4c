"""Where clauses begin and end in a text that cannot be read."""

from __future__ import annotations

import re

from lark import Token

from attndsl.syntax.tokens import CLAUSES, OPENERS, extent

Cut = tuple[int, int]
"""Characters that are left out so that reading may go on."""
CLAUSE_TYPES = frozenset(word.upper() for word in CLAUSES)
CLAUSE_WORDS = re.compile(
    rf"\n|#[^\n]*|\"[^\"\n]*\"?|[(){{}}\[\]]|\b(?:{'|'.join(CLAUSES)})\b(?!\s*[:=,)\]])"
)
OPEN, CLOSE = "([{", ")]}"


def first_on_line(text: str, position: int) -> bool:
    return not text[text.rfind("\n", 0, position) + 1 : position].strip()


def following(text: str, position: int, level: int = 0, by_line: bool = False) -> int:
    """Where the next clause begins after `position` or the brace around these clauses is closed; `level`
    brackets that are open there end before. With `by_line` the clause begins a line."""
    for match in CLAUSE_WORDS.finditer(text, position):
        if match[0] in OPEN:
            level += 1
        elif match[0] in CLOSE:
            level -= 1
            if level < 0:
                return match.start()
        elif level or match.start() == position or not match[0][0].isalpha():
            continue
        elif not by_line or first_on_line(text, match.start()):
            return match.start()
    return len(text)


def last_clause(tokens: list[Token]) -> str:
    """The word of the clause that these tokens end in; empty where they end in none."""
    return next((str(token) for token in reversed(tokens) if token.type in CLAUSE_TYPES), "")


def clause_around(tokens: list[Token], text: str, position: int, by_line: bool = False) -> Cut | None:
    """The clause that a mistake at `position` is in, up to the next as in `following`; None where that is in
    no clause of an attention."""
    level, begun = 0, dict[int, int]()
    for token in tokens:
        if token.type in OPENERS:
            level += 1
            if level == 1 and tokens[0].type == "ATTENTION" and token.type == "LBRACE":
                begun[1] = extent(token)[1]
        elif token.type in OPENERS.values():
            begun.pop(level, None)
            level -= 1
        elif token.type in CLAUSE_TYPES and level:
            begun[level] = extent(token)[0]
    if not begun or tokens[0].type != "ATTENTION":
        return None
    inner = max(begun)
    word = CLAUSE_WORDS.match(text, position)
    if word and word[0][0].isalpha() and level == inner and position > begun[inner]:
        return begun[inner], position
    return begun[inner], following(text, position, level - inner, by_line)
