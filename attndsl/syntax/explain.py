"""What to say about text that the grammar refuses."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from difflib import get_close_matches

from lark import Token, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from attndsl.errors import Diagnostic, Source, Span
from attndsl.syntax import habits
from attndsl.syntax.boundaries import (
    CLAUSE_TYPES,
    CLOSE,
    OPEN,
    Cut,
    clause_around,
    first_on_line,
    following,
    last_clause,
)
from attndsl.syntax.prelude import takes, word_of
from attndsl.syntax.tokens import (
    CLAUSES,
    DEFINITIONS,
    DTYPES,
    ENDS,
    LOOSE,
    OPENERS,
    OPERATORS,
    STARTS,
    absolute_bars,
    extent,
)

TWO_ENDS = "a range has two ends"
LOOSER = frozenset(["_OR", "_AND", "NOT", "COMPARE", "ASSIGN"])
"""Than `..`, and what stands before an expression."""
DEFINITION = "unknown definition"
CLAUSE = "unknown clause"
SHOWN = 40
"""Characters of a token that a message repeats."""
WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
HEAD = re.compile(r'\s*[A-Za-z_"]')
"""A name or a string, as after the word of a definition."""
CALL = re.compile(r"\w+(?:\([^()\n]{0,30}\))?")
PATH = re.compile(r"\S+")
COLON = re.compile(r"\s*:")
DIGITS = re.compile(r"\s*(\d+)")
NUMERAL = re.compile(r"\s*(-?\w+)")
ARGUMENT = re.compile(r"[ \t]+(-?[\w.]+)")
TYPE = re.compile(r"\s*[A-Za-z_]\w*(?:\[[^\]\n]*\])?")
ENDED = re.compile(rf"\s*(?:\}}|(?:{'|'.join(CLAUSES)})\b)")
"""The end of a clause."""
COMMENT = re.compile(r"//|--|/\*")

Explained = tuple[Diagnostic, Cut | None]
"""What is told, and what to leave out of the text to read on; None for the whole clause."""


@dataclass(frozen=True)
class Refused:
    """A text that stands at `start` of the source, and the token in it that could not follow those before it;
    `accepts` are kinds of those that could."""

    source: Source
    start: int
    text: str
    tokens: list[Token]
    bad: Token
    accepts: Set[str]

    @property
    def here(self) -> int:
        return extent(self.bad)[0]

    @property
    def there(self) -> int:
        return extent(self.bad)[1]

    @property
    def shown(self) -> str:
        return f"`{self.bad if len(self.bad) <= SHOWN else self.bad[:SHOWN] + '...'}`"

    @property
    def complete(self) -> bool:
        """Whether an expression may end here."""
        return "PLUS" in self.accepts

    @property
    def clauses_due(self) -> bool:
        return "MASK" in self.accepts

    @property
    def begins(self) -> bool:
        """Whether something new may have been meant to begin here."""
        return not self.complete or bool(
            first_on_line(self.text, self.here) and HEAD.match(self.text, self.there)
        )

    def kind(self, back: int) -> str:
        """Of the token so far back, 1 for the last; empty where there is none."""
        return self.tokens[-back].type if back <= len(self.tokens) else ""

    def at(self, first: int, last: int, message: str, help: str = "", cut: Cut | None = None) -> Explained:
        return Diagnostic(message, Span(self.source, self.start + first, self.start + last), help), cut

    def it(self, message: str, help: str = "", cut: Cut | None = None) -> Explained:
        """Of the refused token."""
        return self.at(self.here, self.there, message, help, cut)

    def without_it(self, message: str, help: str) -> Explained:
        return self.it(message, help, (self.here, self.there))

    def up_to_next_clause(self, message: str, help: str) -> Explained:
        return self.it(message, help, (self.here, following(self.text, self.here)))


def explain(
    source: Source, start: int, text: str, tokens: list[Token], error: UnexpectedInput, accepts: Set[str]
) -> Explained:
    """What is wrong after `tokens` in a text that stands at `start`; `accepts` could have followed."""
    if isinstance(error, UnexpectedToken):
        end = extent(tokens[-1])[1] if tokens else 0
        bad = error.token if error.token.type != "$END" else Token("$END", "", end, end_pos=end)
    else:
        assert isinstance(error, UnexpectedCharacters)
        position = error.pos_in_stream or 0
        bad = Token("", text[position], position, end_pos=position + 1)
    refused = Refused(source, start, text, tokens, bad, accepts)
    for rule in RULES:
        if (explained := rule(refused)) is not None:
            return explained
    return refused.it(f"expected {wanted(accepts)}, not {'the end' if bad.type == '$END' else refused.shown}")


def comment(r: Refused) -> Explained | None:
    """Words after a mark on the line of the mistake."""
    line_end = r.text.find("\n", r.here)
    line_end = len(r.text) if line_end < 0 else line_end
    for mark in COMMENT.finditer(r.text, r.text.rfind("\n", 0, r.here) + 1, min(r.here + 2, line_end)):
        between = [token for token in r.tokens if extent(token)[0] >= mark.end()]
        closed = r.text.find("*/", mark.end(), line_end) if mark[0] == "/*" else -1
        end = closed + 2 if closed >= 0 else line_end
        after = r.text[mark.end() : end].strip()
        paired = all(after.count(a) == after.count(b) for a, b in zip(OPEN, CLOSE, strict=True))
        worded = all(token.type == "NAME" for token in between) and after[:1].isalpha()
        if paired and worded and (r.bad.type in ("NAME", "") or not between) and r.bad.type != "ASSIGN":
            message, help = f"unexpected `{mark[0]}`", "a comment begins with `#`"
            return r.at(mark.start(), mark.end(), message, help, (mark.start(), end))
    return None


def operator(r: Refused) -> Explained | None:
    for sign, help in habits.OPERATORS:
        for first in range(max(r.here - 2, 0), r.here + 1):
            match = re.compile(sign).match(r.text, first)
            if match and (match.end() > r.here or (match[0] == "%" and r.kind(1) == "PERCENT")):
                cut = match.span() if match[0] == ";" else None
                return r.at(*match.span(), f"unexpected `{match[0]}`", help, cut)
    return None


def bar(r: Refused) -> Explained | None:
    bars, unclosed = absolute_bars(r.tokens)
    if unclosed is None:
        return None
    first, last = extent(r.tokens[unclosed])
    if r.text[first - 1] == "|" and unclosed - 1 not in bars:
        return r.at(first - 1, last, "unexpected `||`", dict(habits.OPERATORS)[r"\|\|"])
    if r.bad.type in LOOSE and r.complete:
        return r.it(f"`{r.bad}` inside of `|x|`", "put parentheses around it: `|(...)|`")
    if r.complete and r.bad.type not in STARTS:
        return r.at(first, last, "`|` is never closed")
    return None


def character(r: Refused) -> Explained | None:
    if r.bad == "." and r.kind(1) == "NAME" and (part := WORD.match(r.text, r.there)):
        file = rf'\buse\s+"(?:[^"]*[/:])?{r.tokens[-1]}(?:\.attn)?"'
        help = habits.attribute(r.tokens[-1], part[0])
        if re.search(file, r.source.text):
            help = f"what is in a file that is used has its own name: write `{part[0]}`"
        return r.at(r.here, part.end(), f"unexpected `.{part[0]}`", help)
    return r.it(*habits.character(r.bad)) if r.bad.type == "" else None


def colon(r: Refused) -> Explained | None:
    """Where other languages have one: types, slices, blocks, named arguments."""
    if r.bad.type != "COLON" or not r.tokens or in_builder_head(r.tokens):
        return None
    kinds = [token.type for token in r.tokens]
    depth = sum((kind in OPENERS) - (kind in OPENERS.values()) for kind in kinds)
    header = kinds[0] in ("PATTERN", "SCORE", "LET", "ATTENTION") and kinds[1:2] == ["NAME"]
    parameter = header and kinds[2:3] == ["LPAR"] and depth == 1 and "RPAR" not in kinds
    if header and kinds[0] == "ATTENTION" and depth == 0:
        return r.it("unexpected `:`", f"write the clauses in braces: `attention {r.tokens[1]} {{ ... }}`")
    if header and kinds[-1] == "NAME" and (len(kinds) == 2 or parameter):
        kind = TYPE.match(r.text, r.there)
        if kind is None:
            return r.it("unexpected `:`", "a value is written with `=`")
        message = f"a {'parameter' if parameter else 'definition'} has no type"
        cut = r.here, kind.end()
        return r.at(*cut, message, "leave it out: the value says what it is", cut)
    first, last = r.tokens[-1], DIGITS.match(r.text, r.there)
    if first.type == "INT" and last:
        negative = r.kind(2) == "MINUS" and r.kind(3) not in ENDS
        start = extent(r.tokens[-2] if negative else first)[0]
        help = f"write `{'-' * negative}{first}..{int(last[1]) - 1}`, both ends included"
        return r.at(start, last.end(), f"unexpected `{r.text[start : last.end()]}`", help)
    if last_clause(r.tokens) == "heads" and r.complete:
        return r.without_it("unexpected `:`", "leave it out: write `heads 0..3 { ... }`")
    opened = innermost(r.tokens)
    if opened is not None and kinds[opened + 1 :] == ["NAME", "COMMA", "NAME"] and kinds[opened] != "LBRACE":
        names = f"{r.tokens[-3]}, {r.tokens[-1]}"
        if kinds[opened] == "LSQB" or (str(r.tokens[-3]), str(r.tokens[-1])) == ("q", "k"):
            return r.it("unexpected `:`", f"a pattern is written `{{ {names} : condition }}`")
    if first.type == "NAME" and depth and r.kind(2) in ("LPAR", "COMMA"):
        return r.it("unexpected `:`", f"a named argument is written `{first} = ...`")
    if (first.type in ENDS and depth) or first.type == "LSQB":
        return r.it("unexpected `:`", "a range is written `a..b`, both ends included")
    return None


def sign_after_clause_word(r: Refused) -> Explained | None:
    if r.bad.type in ("ASSIGN", "COLON") and r.kind(1) in CLAUSE_TYPES and not r.complete:
        word = r.tokens[-1]
        return r.without_it(f"`{r.bad}` after `{word}`", f"leave it out: write `{word} ...`")
    if r.bad.type == "PLUS" and r.kind(1) == "SCORE" and (call := CALL.match(r.text, r.there + 1)):
        help = "the logit so far is `s`: write `score s + ...`"
        if word_of(r.source.text, call[0].partition("(")[0]) == "score":
            help = f"leave it out: a score goes on from the ones above it, `score {call[0]}`"
        return r.without_it("`+` after `score`", help)
    if r.bad.type == "NAME" and r.clauses_due and r.bad in CLAUSES and (sign := COLON.match(r.text, r.there)):
        cut = sign.end() - 1, sign.end()
        return r.at(*cut, f"`:` after `{r.bad}`", f"leave it out: write `{r.bad} ...`", cut)
    return None


def equals(r: Refused) -> Explained | None:
    if r.bad.type == "ASSIGN" and r.complete:
        return r.it("unexpected `=`", "write `==` to compare")
    if r.bad.type == "ASSIGN" and r.kind(1) == "ASSIGN" and extent(r.tokens[-1])[1] == r.here:
        return r.at(r.here - 1, r.there, "unexpected `==`", "a definition is written with `=`")
    return None


def comma(r: Refused) -> Explained | None:
    if r.bad.type == "COMMA" and r.kind(1) == "RSQB" and "NAME" in r.accepts:
        return r.without_it("`,` between tables", "leave it out: write `doc : int[n]  pad : bool[n]`")
    if r.bad.type != "COMMA" or not r.complete:
        return None
    word = last_clause(r.tokens)
    if r.clauses_due and ENDED.match(r.text, r.there):
        return r.without_it("`,` between clauses", "leave it out: every clause begins with a word")
    if r.clauses_due or word == "heads":
        return r.it("unexpected `,`", habits.COMMAS.get(word, "join what stands here by an operator"))
    if r.tokens[-1] == "q":
        return r.it("unexpected `,`", "a pattern is written `{ q, k : condition }`")
    return parenthesised(r)


def parenthesised(r: Refused) -> Explained | None:
    """A comma between parentheses that are of no call."""
    opened = innermost(r.tokens)
    end = following(r.text, r.here)
    if opened is None or r.tokens[opened].type != "LPAR" or r.text[end : end + 1] != ")":
        return None
    start = extent(r.tokens[opened])[0]
    inside = " ".join(r.text[start + 1 : end].split())
    shown = inside if len(inside) <= SHOWN else "a, b"
    help = f"a list is written `[{shown}]`"
    if [str(token) for token in r.tokens[opened - 2 : opened]] == ["grid", "("]:
        help = f"the sizes stand side by side: `grid({shown}, ...)`"
    return r.at(start, end + 1, "parentheses around several values", help)


def declaration(r: Refused) -> Explained | None:
    """Of a file and of a table."""
    if r.kind(1) == "USE" and r.bad.type == "NAME" and (path := PATH.match(r.text, r.here)):
        file = path[0] if "." in path[0] else f"{path[0]}.attn"
        return r.at(r.here, path.end(), 'expected a string in `"`', f'write `use "{file}"`')
    if r.accepts == {"LSQB"} and r.kind(2) == "COLON":
        name, dtype = r.tokens[-3], r.tokens[-1]
        meant = habits.TYPES.get(dtype, dtype if dtype in DTYPES else "int")
        return r.at(*extent(dtype), f"`{name}` has no axes", f"write `{name} : {meant}[n]`")
    if r.accepts == {"COLON"} and r.bad.type in ("NAME", "ASSIGN") and r.kind(2) in ("INPUTS", "RSQB"):
        help = f"a table is declared with its type and axes: `{r.tokens[-1]} : int[n]`"
        return r.it(f"expected `:`, not {r.shown}", help)
    if r.bad.type == "LSQB" and r.kind(1) == "RSQB" and last_clause(r.tokens) == "inputs":
        return r.it("unexpected `[`", "all axes stand in one pair of brackets: `int[B, n]`")
    return None


def dots(r: Refused) -> Explained | None:
    """A range without one of its ends, with a third one, or with a step."""
    before = list(itertools.takewhile(lambda token: token.type not in LOOSER, same_level(r.tokens)))
    kinds = [token.type for token in before]
    if kinds[:1] == ["DOTS"] and kinds[1:] and r.bad.type not in STARTS:
        start = r.text[extent(before[-1])[0] : extent(before[0])[0]].strip()
        return r.at(*extent(before[0]), TWO_ENDS, f"to the end it is `{start}..n - 1`")
    if r.bad.type == "DOTS" and not r.complete:
        end = NUMERAL.match(r.text, r.there)
        if end is None:
            every = "`{ p : p in a..b and p mod step == 0 }`"
            return r.it(TWO_ENDS, f"all is `0..n - 1`, and with a step it is {every}")
        start = "-n" if end[1] == "0" or end[1][0] == "-" else "0"
        return r.it(TWO_ENDS, f"from the beginning it is `{start}..{end[1]}`")
    if "DOTS" not in kinds or not r.complete:
        return None
    if r.bad.type == "DOTS" and "BAR" in kinds:
        return r.it("`|` is tighter than `..`", "a union of ranges is a list: `[0..3, 8..9]`")
    if r.bad.type == "DOTS":
        return r.it(TWO_ENDS, stepped(r, before))
    if r.bad in ("step", "by", "stride") or (r.bad.type == "COLON" and last_clause(r.tokens) != "heads"):
        return r.it("a range has no step", stepped(r, before))
    return None


def stepped(r: Refused, before: list[Token]) -> str:
    """How the range of the tokens `before`, the last one first, is written with the step that follows."""
    written = r.text[extent(before[-1])[0] : extent(before[0])[1]]
    number = NUMERAL.match(r.text, r.there)
    step = number[1] if number else "step"
    start, end = (part.strip() for part in written.split("..", 1))
    place = "p" if start == "0" else f"(p - {start})" if start.isalnum() else f"(p - ({start}))"
    help = f"write `{{ p : p in {written} and {place} mod {step} == 0 }}`"
    if start == "0" and end.replace(" ", "") in ("n", "n-1"):
        help = f"write `every({step})`"
    opened = innermost(r.tokens)
    if opened is None or r.tokens[opened].type != "LSQB":
        return help
    alone = r.tokens[opened + 1] is before[-1] and number and r.text[number.end() :].lstrip()[:1] == "]"
    return f"{help}, in place of the brackets" if alone else f"{help}, and join it to the list by `|`"


def empty_look_up(r: Refused) -> Explained | None:
    if r.bad.type != "RSQB" or r.kind(1) != "LSQB" or r.kind(2) != "NAME":
        return None
    name = r.tokens[-2]
    help = habits.LEARN if name == "learn" else f"name the entry: `{name}[q]`, `{name}[0]`"
    return r.at(extent(r.tokens[-1])[0], r.there, "a look-up of nothing", help)


def definition(r: Refused) -> Explained | None:
    in_braces = f"a clause stands in the braces of an attention: `attention NAME {{ {r.bad} ... }}`"
    if r.bad.type == "NAME" and "$END" in r.accepts and r.begins:
        if word_of(r.source.text, r.bad) in ("pattern", "attention"):
            return r.it(f"{DEFINITION} {r.shown}", "a pattern is written `pattern NAME = ...`")
        if r.bad in CLAUSES:
            return r.it(f"{DEFINITION} {r.shown}", in_braces)
        if r.text[r.there :].lstrip().startswith("="):
            return r.it(f"{DEFINITION} {r.shown}", f"a value is defined by `let {r.bad} = ...`")
        return r.it(*unknown(DEFINITION, r.bad, r.shown, DEFINITIONS))
    if not r.tokens and "PATTERN" in r.accepts:
        return r.it("expected a definition", in_braces if r.bad in CLAUSES else listing(DEFINITIONS))
    return None


def header(r: Refused) -> Explained | None:
    """The name of a definition, and what follows it."""
    if len(r.tokens) == 1 and r.tokens[0] in DEFINITIONS:
        word = r.tokens[0]
        helps = {
            "LBRACE": f"write `{word} NAME {{ ... }}`",
            "STRING": f"write `{word} {r.bad[1:-1]}`",
            **dict.fromkeys(("INT", "FLOAT"), "a name begins with a letter"),
        }
        if r.bad.type in helps:
            return r.it(f"expected a name, not {r.shown}", helps[r.bad.type])
    if r.bad.type == "$END" and [token.type for token in r.tokens] == ["SCORE", "NAME"]:
        help = f"a clause stands in the braces of an attention: `attention NAME {{ score {r.tokens[1]} }}`"
        return r.at(*extent(r.tokens[1]), "a score without its definition", help)
    if r.bad.type == "LBRACE" and "ASSIGN" in r.accepts and r.tokens[0].type == "PATTERN":
        head = r.text[extent(r.tokens[0])[0] : extent(r.tokens[-1])[1]]
        inside = " ".join(r.text[r.there :].strip().removesuffix("}").split())
        inside = inside.removeprefix("mask ")
        clauses = {*CLAUSES} & {*inside.split()}
        condition = inside and ":" not in inside and len(inside) <= SHOWN and not clauses
        body = "{ q, k : ... }" if not condition else inside
        if condition and re.search(r"[<>=]|\bin\b", inside):
            body = f"{{ q, k : {inside} }}"
        return r.it("expected `=`, not `{`", f"write `{head} = {body}`")
    if len(r.tokens) == 2 and r.bad.type == "LSQB" and r.kind(1) == "NAME":
        help = f"parameters stand in parentheses: `{r.tokens[0]} {r.tokens[1]}(...)`"
        return r.it("unexpected `[`", help)
    if len(r.tokens) == 2 and r.bad.type == "MINUS" and (rest := WORD.match(r.text, r.there)):
        joined = f"write `{r.tokens[1]}_{rest[0]}`"
        return r.it("a name is made of letters, digits and `_`", joined)
    return None


def clause(r: Refused) -> Explained | None:
    if r.clauses_due and r.bad.type in ("LBRACE", "TILDE") and not r.complete:
        return r.up_to_next_clause(f"expected a clause, not {r.shown}", f"write `mask {pattern_at(r)}`")
    if r.bad.type != "NAME" or not r.clauses_due:
        return None
    argument = ARGUMENT.match(r.text, r.there)
    if word_of(r.source.text, r.bad) == "attention" and not r.complete:
        help = f"attentions are added by `attention {r.tokens[1]} = {pattern_at(r)}`"
        return r.up_to_next_clause(f"the attention {r.shown} among clauses", help)
    if word_of(r.source.text, r.bad) == "score":
        written = CALL.match(r.text, r.here)
        assert written is not None
        meant = f"{r.bad}({argument[1]})" if argument else written[0]
        return r.up_to_next_clause(f"the score {r.shown} without its clause", f"write `score {meant}`")
    conditional = r.bad == "if" and r.complete
    if r.bad in habits.CLAUSES and not (conditional or r.text[r.there :].lstrip().startswith("(")):
        return r.up_to_next_clause(f"{CLAUSE} {r.shown}", habits.CLAUSES[r.bad])
    if not r.complete and word_of(r.source.text, r.bad) == "pattern":
        return r.up_to_next_clause(
            f"the pattern {r.shown} without its clause", f"write `mask {pattern_at(r)}`"
        )
    if r.begins or close(r.bad, CLAUSES):
        return r.up_to_next_clause(*unknown(CLAUSE, r.bad, r.shown, CLAUSES))
    return None


def pattern_at(r: Refused) -> str:
    """What stands from the mistake to the next clause, for a help line."""
    text = " ".join(r.text[r.here : following(r.text, r.here)].split())
    return text if len(text) <= SHOWN else f"{r.bad} ..."


def word_out_of_place(r: Refused) -> Explained | None:
    """Of definitions and clauses."""
    inside = len(r.tokens) > 1 and (r.clauses_due or "RBRACE" in r.accepts)
    if inside and r.bad.type in ("LET", "PATTERN", "ATTENTION", "ASSERT", "USE"):
        help = f"write `{r.bad}` before `{r.tokens[0]} {r.tokens[1]}`"
        return r.up_to_next_clause(f"`{r.bad}` inside of an attention", help)
    if r.bad.type == "SCORE" and r.kind(1) == "SCORE":
        cut = extent(r.tokens[-1])[0], following(r.text, r.here)
        return r.it("`score` is the word of the clause", "the logit so far is `s`: write `score s ...`", cut)
    if r.bad in CLAUSES and r.bad.type in CLAUSE_TYPES and (r.complete or r.clauses_due):
        if r.clauses_due:
            return r.it(f"`{r.bad}` cannot stand inside of `heads`")
        if last_clause(r.tokens) == "heads" and "LBRACE" in r.accepts:
            help = f"a group of heads has braces: write `heads 0..3 {{ {r.bad} ... }}`"
            return r.it(f"expected `{{`, not {r.shown}", help)
        return r.it(f"the clause `{r.bad}` stands only in the braces of an attention")
    return None


def stage(r: Refused) -> Explained | None:
    """In a stack, whose stages stand one behind the other."""
    if not r.tokens or r.tokens[0].type != "STACK":
        return None
    if r.bad.type == "INT" and r.kind(1) == "LBRACE" and not innermost(r.tokens[:-1]):
        return r.it("a stage begins with its word", f"write `layers({r.bad}) {{ ... }}`")
    if "LBRACE" not in r.accepts | {r.bad.type}:
        return None
    if r.bad.type == "ASSIGN" and "RBRACE" not in r.accepts:
        return r.it("expected `{`, not `=`", f"write `stack {r.tokens[1]} {{ layers(N) {{ ... }} }}`")
    if "RBRACE" not in r.accepts or r.kind(1) not in ("NAME", "RPAR"):
        return None
    if r.bad.type == "COMMA":
        return r.without_it("a comma between stages", "leave it out: each begins with a name")
    if r.bad.type == "INT" and r.kind(1) == "NAME":
        return r.it(f"expected `(`, not {r.shown}", f"write `{r.tokens[-1]}({r.bad})`")
    if r.bad.type == "ASSIGN":
        return r.it(
            "unexpected `=`",
            f"a parameter stands behind the name: `stack {r.tokens[1]}({r.tokens[-1]} = ...)`",
        )
    if r.bad.type == "PLUS":
        return r.without_it("a `+` between sublayers", "leave it out: they stand one behind the other")
    if r.bad.type in OPERATORS | {"LSQB"}:
        help = "give it a name, `attention NAME = ...`, and write that"
        return r.it("a sublayer is a name or a call, and no expression", help)
    return None


def clauses_of_sum(r: Refused) -> Explained | None:
    """Behind attentions that are added: clauses are those of the parts."""
    kinds = [token.type for token in r.tokens]
    if not r.complete or kinds[:1] != ["ATTENTION"] or "ASSIGN" not in kinds or "MASK" in r.accepts:
        return None
    word = WORD.search(r.text, r.here)
    if innermost(r.tokens) is not None or word is None or word[0] not in CLAUSES:
        return None
    if r.bad.type == "LBRACE" or r.bad in CLAUSES:
        written = r.text[word.start() : following(r.text, word.start())].strip()
        shown = written if len(written) <= SHOWN and "\n" not in written else f"{word[0]} ..."
        return r.it("a sum has no clauses of its own", f"its parts have: write `{shown}` into each")
    return None


def compared_heads(r: Refused) -> Explained | None:
    if r.bad.type != "COMPARE" or r.kind(1) != "HEADS":
        return None
    return r.without_it(
        f"unexpected `{r.bad}`", "heads are a number, a range or a list: `heads 0..3 { ... }`"
    )


def no_heads(r: Refused) -> Explained | None:
    """A clause straight after `heads {`: its word is refused, or read as the name of a position."""
    for tokens, word in ((r.tokens, r.bad), (r.tokens[:-1], r.tokens[-1] if r.tokens else r.bad)):
        if [token.type for token in tokens[-2:]] == ["HEADS", "LBRACE"] and word in CLAUSES:
            help = "write `0..3 { ... }` or `else { ... }`"
            return r.at(*extent(tokens[-1]), "expected the heads of this group", help)
    return None


def reserved(r: Refused) -> Explained | None:
    if "NAME" in r.accepts and "INT" not in r.accepts and not r.clauses_due and WORD.fullmatch(r.bad):
        return r.it(f"{r.shown} is a reserved word", "choose another name")
    return None


def builder(r: Refused) -> Explained | None:
    if not in_builder_head(r.tokens) or r.bad.type == "$END":
        return None
    brace = max(i for i, token in enumerate(r.tokens) if token.type == "LBRACE")
    before = r.tokens[brace - 1]
    if r.tokens[0].type == "ATTENTION" and before.type == "ASSIGN" and "COLON" in r.accepts:
        end = r.text.find("}", r.here) + 1
        if r.text[end:].lstrip()[:1] in ("+", "-", "*"):
            rest = extent(before)[1], len(r.text)
            return r.it("a part of a sum has a name", "write `attention part { ... }`, and add `part`", rest)
        help = f"leave it out: write `attention {r.tokens[1]} {{ ... }}`"
        return r.at(*extent(before), "`=` before clauses", help, extent(before))
    listed = "a list of positions is written `[0, 5..9]`"
    if "NAME" in r.accepts and r.bad.type in STARTS:
        return r.it("expected a bound name", listed)
    if "COLON" not in r.accepts:
        return None
    if r.bad.type == "COMMA":
        help = "write `{ q, k : ... }`: `h` may be read without being bound, and tables have their batch row"
        return r.it("a builder binds one position or two", help)
    both = "write `{ p : ... }` for a set, `{ q, k : ... }` for a pattern"
    return r.it("expected `:`", listed if r.bad.type == "RBRACE" else both)


def side_by_side(r: Refused) -> Explained | None:
    if not r.complete or r.bad.type not in STARTS:
        return None
    left, message = r.tokens[-1], "two expressions side by side"
    start, end = extent(left)
    if r.bad.type == "NOT":
        return r.it(message, "write `not (x in s)`")
    if left in CLAUSES and r.tokens[0].type == "ATTENTION" and first_on_line(r.text, start):
        # it was read as a name, since an operator before it lacks an operand
        begun, _ = clause_around(r.tokens, r.text, start) or (start, start)
        return r.at(start, end, f"expected an expression, not the clause `{left}`", "", (begun, start))
    if left.type == "INT" and r.bad.type == "NAME" and r.here == end:
        return r.at(start, r.there, "a name cannot begin with a digit", habits.numeral(left, r.bad))
    return r.it(message, between(r, left), clause_around(r.tokens, r.text, r.here, by_line=True))


def between(r: Refused, left: Token) -> str:
    """What is written between two expressions."""
    text, right = r.source.text, r.bad
    if r.tokens[0].type == "ASSERT" and right == "for":
        return habits.WORDS["forall"]
    if left == "every_row" and right.type == "NAME":
        return f"write `every_row({right})`"
    if help := habits.WORDS.get(right) or habits.WORDS.get(left):
        return help
    if left.type in ("INT", "FLOAT") and right.type == "NAME":
        return f"write `{left} * {right}`"
    if left == "softmax" and last_clause(r.tokens) == "norm":
        return "a sink stands in parentheses: `softmax(sink = learn[H])`"
    called = takes(text, left) if left.type == "NAME" else False
    number = NUMERAL.match(r.text, r.there)
    if right.type == "NAME" and r.clauses_due and number and number[1].isdecimal():
        return (
            f"join patterns by an operator, and an argument stands in parentheses: `& {right}({number[1]})`"
        )
    if right.type == "NAME" and word_of(text, right) == "pattern" and (r.clauses_due or not called):
        return f"join patterns by an operator: `& {right}`, `| {right}`"
    if called is False or right.type not in ("INT", "FLOAT", "NAME"):
        return "put an operator between them"
    if called:
        return f"an argument stands in parentheses: `{left}({right})`"
    return f"put an operator between them, or parentheses around an argument: `{left}({right})`"


def group_of_heads(r: Refused) -> Explained | None:
    if (
        last_clause(r.tokens) != "heads"
        or "LBRACE" not in r.accepts
        or not r.complete
        or r.bad.type == "$END"
    ):
        return None
    help = "a group of heads is written `0..3 { mask ... }`"
    if r.kind(2) == "HEADS" and r.kind(1) == "INT":
        help += f"; how many there are is said at the call, `heads={r.tokens[-1]}`"
    return r.it(f"expected {wanted(r.accepts)}, not {r.shown}", help)


Rule = Callable[[Refused], Explained | None]
RULES: tuple[Rule, ...] = (
    comment,
    operator,
    bar,
    character,
    dots,
    colon,
    sign_after_clause_word,
    equals,
    comma,
    declaration,
    empty_look_up,
    definition,
    header,
    clause,
    stage,
    clauses_of_sum,
    word_out_of_place,
    compared_heads,
    no_heads,
    reserved,
    builder,
    side_by_side,
    group_of_heads,
)
"""The first that has something to say does."""


def same_level(tokens: list[Token]) -> list[Token]:
    """The tokens before, the last one first, back to the bracket or comma that they stand after, but those in
    brackets of their own."""
    found, level = list[Token](), 0
    for token in reversed(tokens):
        if token.type in OPENERS.values():
            level += 1
        elif token.type in OPENERS:
            level -= 1
        if level < 0 or (level == 0 and token.type in ("COMMA", "COLON", *CLAUSE_TYPES)):
            break
        if level == 0:
            found.append(token)
    return found


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


def close(word: str, words: Iterable[str]) -> str:
    return next(iter(get_close_matches(word.lower(), words, 1)), "")


def unknown(kind: str, word: str, shown: str, words: tuple[str, ...]) -> tuple[str, str]:
    if kind == DEFINITION and word in habits.DEFINITIONS:
        return f"{kind} {shown}", habits.DEFINITIONS[word]
    return f"{kind} {shown}", f"did you mean `{near}`?" if (near := close(word, words)) else listing(words)


def listing(words: tuple[str, ...]) -> str:
    return f"the words are {', '.join(words[:-1])} and {words[-1]}"


def innermost(tokens: list[Token]) -> int | None:
    """The place of the bracket that was opened last and is not closed."""
    level = 0
    for i in range(len(tokens) - 1, -1, -1):
        level += (tokens[i].type in OPENERS.values()) - (tokens[i].type in OPENERS)
        if level < 0:
            return i
    return None


def in_builder_head(tokens: list[Token]) -> bool:
    """Whether the `{` of a builder is open whose `:` is still to come."""
    head = next(
        (token for token in reversed(tokens) if token.type not in ("NAME", "COMMA", "LPAR", "RPAR")), None
    )
    return head is not None and head.type == "LBRACE"
