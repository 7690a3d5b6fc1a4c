"""What to say about text that the grammar refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from difflib import get_close_matches

from lark import Token, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from attndsl.errors import Diagnostic, Source, Span
from attndsl.syntax.tokens import CLAUSES, DEFINITIONS, LOOSE, OPERATORS, STARTS, absolute_bars, extent

LATER = ("stack", "approx")
FOREIGN = (
    (r"&&", "write `and` between truths, `&` between patterns"),
    (r"\|\|", "write `or` between truths, `|` between patterns"),
    (r"!(?!=)", "write `not` before a truth, `~` before a pattern"),
    (r"%", "write `mod`"),
    (r"\^", "write `**` for a power"),
    (r";", "leave it out: nothing stands between clauses or definitions"),
    (r"'", 'write a string in `"`'),
    (r"\?", "write `where(condition, a, b)`"),
    (r"=>", "write `>=`"),
    (r"=<", "write `<=`"),
    (r"<>", "write `!=`"),
    (r"\.\.\.", "write `a..b`, both ends included"),
)
LOOKALIKES = {
    "\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00b7": "*", "\u2264": "<=", "\u2265": ">=",
    "\u2260": "!=", "\u2227": "and",
    "\u2228": "or", "\u00ac": "not", "\u2208": "in", "\u222a": "|", "\u2229": "&",
    "\u201c": '"', "\u201d": '"', "\u2026": "..",
}  # fmt: skip
OF_PATTERNS = {"and": "&", "or": "|", "not": "~"}
DEFINITION = "unknown definition"
CLAUSE = "unknown clause"
SHOWN = 40
"""Characters of a token that a message repeats."""
WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


def explain(
    source: Source, start: int, tokens: list[Token], error: UnexpectedInput, accepts: Set[str]
) -> Diagnostic:
    """What is wrong after `tokens`, whose positions count from `start`; `accepts` could have followed."""
    text = source.text
    end = extent(tokens[-1])[1] if tokens else 0

    def at(first: int, last: int, message: str, help: str = "") -> Diagnostic:
        return Diagnostic(message, Span(source, start + first, start + last), help)

    if isinstance(error, UnexpectedToken):
        bad = error.token if error.token.type != "$END" else Token("$END", "", end, end_pos=end)
    else:
        assert isinstance(error, UnexpectedCharacters)
        position = error.pos_in_stream or 0
        bad = Token("", text[start + position], position, end_pos=position + 1)
    here, there = extent(bad)
    shown = f"`{bad if len(bad) <= SHOWN else bad[:SHOWN] + '...'}`"
    complete = "PLUS" in accepts
    clauses_due = "MASK" in accepts

    for operator, help in FOREIGN:
        for first in range(max(here - 2, 0), here + 1):
            match = re.compile(operator).match(text, start + first)
            if match and (match.end() > start + here or (match[0] == "%" and tokens[-1].type == "PERCENT")):
                return at(first, first + len(match[0]), f"unexpected `{match[0]}`", help)
    bars, unclosed = absolute_bars(tokens)
    if unclosed is not None:
        bar, after = extent(tokens[unclosed])
        if text[start + bar - 1] == "|" and unclosed - 1 not in bars:
            return at(bar - 1, after, "unexpected `||`", dict(FOREIGN)[r"\|\|"])
        if bad.type in LOOSE and complete:
            return at(here, there, f"`{bad}` inside of `|x|`", "put parentheses around it: `|(...)|`")
        if complete and bad.type not in STARTS:
            return at(bar, after, "`|` is never closed")
    if bad.type == "":
        return at(here, there, *strange(bad))
    if bad.type == "ASSIGN" and complete:
        return at(here, there, "unexpected `=`", "write `==` to compare")
    if bad.type == "COMMA" and clauses_due:
        return at(here, there, "`,` between clauses", "leave it out: every clause begins with a word")

    first_on_line = not text[text.rfind("\n", 0, start + here) + 1 : start + here].strip()
    begins = not complete or (first_on_line and is_head(text, start + there))
    if bad.type == "NAME" and "$END" in accepts and begins:
        return at(here, there, *unknown(DEFINITION, bad, shown, DEFINITIONS))
    if not tokens and "PATTERN" in accepts:
        return at(here, there, "expected a definition", listing(DEFINITIONS))
    if clauses_due and bad.type == "NAME" and (begins or bad in LATER or close(bad, CLAUSES)):
        return at(here, there, *unknown(CLAUSE, bad, shown, CLAUSES))
    if bad.lower() in CLAUSES and bad.type in CLAUSE_TYPES and (complete or clauses_due):
        if clauses_due:
            return at(here, there, f"`{bad}` cannot stand inside of `heads`")
        return at(here, there, f"the clause `{bad}` stands only in the braces of an attention")
    if "NAME" in accepts and "INT" not in accepts and not clauses_due and WORD.fullmatch(bad):
        return at(here, there, f"{shown} is a reserved word", "choose another name")

    if [token.type for token in tokens[-3:-1]] == ["HEADS", "LBRACE"] and tokens[-1] in CLAUSES:
        return at(
            *extent(tokens[-2]),
            "expected the heads of this group",
            "write `0..3 { ... }` or `else { ... }`",
        )
    if in_builder_head(tokens) and bad.type != "$END":
        if "NAME" in accepts and bad.type in STARTS:
            return at(here, there, "expected a bound name", "a list of positions is written `[0, 5..9]`")
        if "COLON" in accepts:
            if bad.type == "COMMA":
                return at(here, there, "a builder binds one position or two")
            if bad.type == "RBRACE":
                return at(here, there, "expected `:`", "a list of positions is written `[0, 5..9]`")
            return at(
                here, there, "expected `:`", "write `{ p : ... }` for a set, `{ q, k : ... }` for a pattern"
            )
    if complete and bad.type == "NOT":
        return at(here, there, "two expressions side by side", "write `not (x in s)`")
    if complete and bad.type in STARTS:
        if tokens[-1].type == "INT" and bad.type == "NAME" and here == end:
            return at(here, there, "a name cannot begin with a digit", "write `2 * x` for a product")
        help = "put an operator between them"
        if "if" in (bad, tokens[-1]):
            help = "write `where(condition, a, b)`"
        elif tokens[-1] == "lambda":
            help = "a pattern is written `{ q, k : condition }`"
        return at(here, there, "two expressions side by side", help)
    if bad.type == "$END":
        return at(here, there, f"expected {wanted(accepts)}, not the end")
    return at(here, there, f"expected {wanted(accepts)}, not {shown}")


CLAUSE_TYPES = frozenset(word.upper() for word in CLAUSES)
PHRASES = {
    "NAME": "a name", "STRING": 'a string in `"`', "ASSIGN": "`=`", "COLON": "`:`", "COMMA": "`,`",
    "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`", "LBRACE": "`{`", "RBRACE": "`}`",
    "BAR": "`|`", "INT": "an integer",
}  # fmt: skip


def wanted(accepts: Set[str]) -> str:
    """What could stand here, in a few words."""
    rest = set(accepts)
    phrases = []
    if STARTS - {"NOT"} <= rest:
        phrases.append("an expression")
        rest -= STARTS
    if "PLUS" in rest:
        phrases.append("an operator")
        rest -= OPERATORS | {"LPAR", "LSQB"}
    if "MASK" in rest:
        phrases.append("a clause")
    if "PATTERN" in rest and not phrases:
        phrases.append("a definition")
    phrases += [phrase for terminal, phrase in PHRASES.items() if terminal in rest]
    return " or ".join([", ".join(phrases[:-1]), phrases[-1]]) if len(phrases) > 1 else phrases[0]


def strange(bad: str) -> tuple[str, str]:
    if bad == ".":
        return "`.` without digits on both sides", "write `0.5` or `2.0`"
    shown = f"`{bad}` (U+{ord(bad):04X})" if bad.isprintable() else f"U+{ord(bad):04X}"
    if bad == '"':
        return "control character in a string", ""
    if bad in LOOKALIKES:
        word = LOOKALIKES[bad]
        sign = f", for patterns `{OF_PATTERNS[word]}`" if word in OF_PATTERNS else ""
        return f"unknown character {shown}", f"write `{word}`{sign}"
    return (
        f"unknown character {shown}",
        "names are made of the letters a to z, digits and `_`" if bad.isalpha() else "",
    )


def close(word: str, words: Iterable[str]) -> str:
    return next(iter(get_close_matches(word.lower(), words, 1)), "")


def unknown(kind: str, word: str, shown: str, words: tuple[str, ...]) -> tuple[str, str]:
    if word in LATER:
        return f"`{word}` is not supported yet", ""
    return f"{kind} {shown}", f"did you mean `{near}`?" if (near := close(word, words)) else listing(words)


def listing(words: tuple[str, ...]) -> str:
    return f"the words are {', '.join(words[:-1])} and {words[-1]}"


def is_head(text: str, position: int) -> bool:
    """Whether a name or a string follows, as after the word of a definition."""
    return re.compile(r'\s*[A-Za-z_"]').match(text, position) is not None


def in_builder_head(tokens: list[Token]) -> bool:
    """Whether the `{` of a builder is open whose `:` is still to come."""
    head = next(
        (token for token in reversed(tokens) if token.type not in ("NAME", "COMMA", "LPAR", "RPAR")), None
    )
    return head is not None and head.type == "LBRACE"
