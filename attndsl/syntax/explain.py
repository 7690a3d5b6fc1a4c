"""What to say about text that the grammar refuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from difflib import get_close_matches

from lark import Token, UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from attndsl.errors import Diagnostic, Source, Span
from attndsl.syntax.prelude import takes, word_of
from attndsl.syntax.tokens import (
    CLAUSES,
    DEFINITIONS,
    ENDS,
    LOOSE,
    OPENERS,
    OPERATORS,
    STARTS,
    absolute_bars,
    extent,
)

LATER = ("stack",)
Cut = tuple[int, int]
"""Characters that are left out so that reading may go on."""
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
    (r"\.\.[=<]", "write `a..b`, both ends included"),
    (r"[-+*/|&]=", "there is no assignment: write the new value, as in `score s + 1`"),
)
ELSEWHERE = {
    "def": "a pattern is written `pattern NAME = { q, k : condition }`",
    "lambda": "a pattern is written `pattern NAME = { q, k : condition }`",
    "import": 'another file is read by `use "FILE.attn"`',
    "from": 'another file is read by `use "FILE.attn"`',
    "include": 'another file is read by `use "FILE.attn"`',
    "const": "write `let`",
    "var": "write `let`",
    "class": "write `attention NAME { ... }`",
    "mechanism": "write `attention NAME { ... }`",
    "attn": "write `attention`",
    "relation": "write `pattern`",
    "function": "write `let NAME(x) = ...`",
}
"""Words that begin definitions in other languages."""
DTYPES = ("int", "bool", "float")
TYPES = {
    **dict.fromkeys(("long", "int64", "int32", "int16", "int8", "integer", "index"), "int"),
    **dict.fromkeys(("float16", "float32", "float64", "bfloat16", "double", "half", "real"), "float"),
    **dict.fromkeys(("boolean", "mask"), "bool"),
}
MODULES = frozenset("torch math np numpy F jnp jax".split())
NO_CLAUSES = {
    "dropout": "leave it out: weights are not dropped, and `torch.nn.Dropout` is for the output",
    "scale": "write it into the score: `score Q @ K * 0.125`",
    "bias": "write it into the score: `score s + ...`",
    "softmax": "write `norm softmax`",
    "window": "write `mask causal & last(128)`",
    "head": "write `heads 0 { ... } else { ... }`",
    "input": "write `inputs`",
}
"""What stands in other tools where a clause does here."""

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
    source: Source, start: int, text: str, tokens: list[Token], error: UnexpectedInput, accepts: Set[str]
) -> tuple[Diagnostic, Cut | None]:
    """What is wrong after `tokens` in a text that stands at `start`; `accepts` could have followed.

    And what to leave out of the text so that the next mistake can be told; None for the whole clause.
    """
    end = extent(tokens[-1])[1] if tokens else 0

    def at(
        first: int, last: int, message: str, help: str = "", cut: Cut | None = None
    ) -> tuple[Diagnostic, Cut | None]:
        return Diagnostic(message, Span(source, start + first, start + last), help), cut

    if isinstance(error, UnexpectedToken):
        bad = error.token if error.token.type != "$END" else Token("$END", "", end, end_pos=end)
    else:
        assert isinstance(error, UnexpectedCharacters)
        position = error.pos_in_stream or 0
        bad = Token("", text[position], position, end_pos=position + 1)
    here, there = extent(bad)
    shown = f"`{bad if len(bad) <= SHOWN else bad[:SHOWN] + '...'}`"
    complete = "PLUS" in accepts
    clauses_due = "MASK" in accepts
    next_clause = following(text, here)

    if (comment := foreign_comment(text, tokens, bad)) is not None:
        mark, line_end = comment
        return at(
            mark,
            mark + 2,
            f"unexpected `{text[mark : mark + 2]}`",
            "a comment begins with `#`",
            (mark, line_end),
        )
    for operator, help in FOREIGN:
        for first in range(max(here - 2, 0), here + 1):
            match = re.compile(operator).match(text, first)
            if match and (match.end() > here or (match[0] == "%" and tokens[-1].type == "PERCENT")):
                cut = (first, match.end()) if match[0] == ";" else None
                return at(first, match.end(), f"unexpected `{match[0]}`", help, cut)
    bars, unclosed = absolute_bars(tokens)
    if unclosed is not None:
        bar, after = extent(tokens[unclosed])
        if text[bar - 1] == "|" and unclosed - 1 not in bars:
            return at(bar - 1, after, "unexpected `||`", dict(FOREIGN)[r"\|\|"])
        if bad.type in LOOSE and complete:
            return at(here, there, f"`{bad}` inside of `|x|`", "put parentheses around it: `|(...)|`")
        if complete and bad.type not in STARTS:
            return at(bar, after, "`|` is never closed")
    if bad == "." and (attribute := WORD.match(text, there)) and tokens and tokens[-1].type == "NAME":
        return at(
            here,
            attribute.end(),
            f"unexpected `.{attribute[0]}`",
            part_of(tokens[-1], attribute[0]),
        )
    if bad.type == "":
        return at(here, there, *strange(bad))
    if bad.type == "COLON" and (stray := stray_colon(text, tokens, here)):
        return at(*stray)
    if bad.type in ("ASSIGN", "COLON") and tokens and tokens[-1].type in CLAUSE_TYPES and not complete:
        return at(
            here,
            there,
            f"`{bad}` after `{tokens[-1]}`",
            f"leave it out: write `{tokens[-1]} ...`",
            (here, there),
        )
    if bad.type == "ASSIGN" and complete:
        return at(here, there, "unexpected `=`", "write `==` to compare")
    if bad.type == "ASSIGN" and tokens and tokens[-1].type == "ASSIGN" and end == here:
        return at(here - 1, there, "unexpected `==`", "a definition is written with `=`")
    if bad.type == "COMMA" and (clauses_due or (last_clause(tokens) == "heads" and complete)):
        if COMMA_CLAUSE.match(text, there):
            help = "leave it out: every clause begins with a word"
            return at(here, there, "`,` between clauses", help, (here, there))
        return at(
            here,
            there,
            "unexpected `,`",
            JOINED.get(last_clause(tokens), "join what stands here by an operator"),
        )
    if tokens and tokens[-1].type == "USE" and bad.type == "NAME" and (path := PATH.match(text, here)):
        return at(here, path.end(), 'expected a string in `"`', f'write `use "{path[0]}"`')
    if accepts == {"LSQB"} and tokens[-2].type == "COLON":
        name, kind = tokens[-3], tokens[-1]
        return at(
            *extent(kind),
            f"`{name}` has no axes",
            f"write `{name} : {TYPES.get(kind, kind if kind in DTYPES else 'int')}[n]`",
        )
    if accepts == {"COLON"} and bad.type in ("NAME", "ASSIGN") and tokens[-2].type in ("INPUTS", "RSQB"):
        help = f"a table is declared with its type and axes: `{tokens[-1]} : int[n]`"
        return at(here, there, f"expected `:`, not {shown}", help)
    if bad.type == "DOTS" and complete and "DOTS" in (before := same_level(tokens)):
        if "BAR" in before:
            return at(here, there, "`|` is tighter than `..`", "a union of ranges is a list: `[0..3, 8..9]`")
        return at(
            here, there, "a range has two ends", "with a step it is `{ p : p in a..b and p mod step == 0 }`"
        )

    first_on_line = not text[text.rfind("\n", 0, here) + 1 : here].strip()
    begins = not complete or (first_on_line and is_head(text, there))
    if bad.type == "NAME" and "$END" in accepts and begins:
        if word_of(source.text, bad) in ("pattern", "attention"):
            return at(here, there, f"{DEFINITION} {shown}", "a pattern is written `pattern NAME = ...`")
        if bad in CLAUSES:
            clause = f"a clause stands in the braces of an attention: `attention NAME {{ {bad} ... }}`"
            return at(here, there, f"{DEFINITION} {shown}", clause)
        if text[there:].lstrip()[:1] == "=":
            return at(here, there, f"{DEFINITION} {shown}", f"a value is defined by `let {bad} = ...`")
        return at(here, there, *unknown(DEFINITION, bad, shown, DEFINITIONS))
    if not tokens and "PATTERN" in accepts:
        if bad in CLAUSES:
            clause = f"a clause stands in the braces of an attention: `attention NAME {{ {bad} ... }}`"
            return at(here, there, "expected a definition", clause)
        return at(here, there, "expected a definition", listing(DEFINITIONS))
    if len(tokens) == 1 and tokens[0] in DEFINITIONS and bad.type == "LBRACE":
        return at(here, there, "expected a name, not `{`", f"write `{tokens[0]} NAME {{ ... }}`")
    if len(tokens) == 1 and tokens[0] in DEFINITIONS and bad.type in ("STRING", "INT", "FLOAT"):
        help = f"write `{tokens[0]} {bad[1:-1]}`" if bad.type == "STRING" else "a name begins with a letter"
        return at(here, there, f"expected a name, not {shown}", help)
    if len(tokens) == 2 and tokens[1].type == "NAME" and bad.type == "LSQB":
        help = f"parameters stand in parentheses: `{tokens[0]} {tokens[1]}(...)`"
        return at(here, there, "unexpected `[`", help)
    if bad.type == "LSQB" and tokens and tokens[-1].type == "RSQB" and last_clause(tokens) == "inputs":
        help = "all axes stand in one pair of brackets: `int[B, n]`"
        return at(here, there, "unexpected `[`", help)
    if bad.type == "COMMA" and complete and tokens[-1] == "q":
        return at(here, there, "unexpected `,`", "a pattern is written `{ q, k : condition }`")
    if len(tokens) == 2 and bad.type == "MINUS" and (rest := WORD.match(text, there)):
        joined = f"{tokens[1]}_{rest[0]}"
        return at(here, there, "a name is made of letters, digits and `_`", f"write `{joined}`")
    if clauses_due and bad.type == "NAME" and bad in CLAUSES and (colon := COLON.match(text, there)):
        mark = colon.end() - 1
        return at(mark, mark + 1, f"`:` after `{bad}`", f"leave it out: write `{bad} ...`", (mark, mark + 1))
    if clauses_due and bad.type == "NAME":
        called = word_of(source.text, bad)
        alone = ALONE.match(text, there) is not None
        argument = ARGUMENT.match(text, there)
        if called == "score" and (begins or argument or alone or text[there:].lstrip().startswith("(")):
            written = f"{bad}({argument[1]})" if argument else call_of(text, here)
            return at(
                here,
                there,
                f"the score {shown} without its clause",
                f"write `score {written}`",
                (here, next_clause),
            )
        if bad in NO_CLAUSES and not text[there:].lstrip().startswith("("):
            return at(here, there, f"unknown clause {shown}", NO_CLAUSES[bad], (here, next_clause))
        if begins or bad in LATER or close(bad, CLAUSES):
            return at(here, there, *unknown(CLAUSE, bad, shown, CLAUSES), (here, next_clause))
    if bad.type in ("LET", "PATTERN", "ATTENTION", "ASSERT", "USE") and (clauses_due or "RBRACE" in accepts):
        help = f"write `{bad}` before `{tokens[0]} {tokens[1]}`" if len(tokens) > 1 else ""
        return at(here, there, f"`{bad}` inside of an attention", help, (here, next_clause))
    if bad.type == "SCORE" and tokens and tokens[-1].type == "SCORE":
        return at(
            here,
            there,
            "`score` is the word of the clause",
            "the logit so far is `s`: write `score s ...`",
            (extent(tokens[-1])[0], next_clause),
        )
    if bad.lower() in CLAUSES and bad.type in CLAUSE_TYPES and (complete or clauses_due):
        if clauses_due:
            return at(here, there, f"`{bad}` cannot stand inside of `heads`")
        if last_clause(tokens) == "heads" and "LBRACE" in accepts:
            help = f"a group of heads has braces: write `heads 0..3 {{ {bad} ... }}`"
            return at(here, there, f"expected `{{`, not {shown}", help)
        return at(here, there, f"the clause `{bad}` stands only in the braces of an attention")
    if [token.type for token in tokens[-2:]] == ["HEADS", "LBRACE"] and bad in CLAUSES:
        help = "write `0..3 { ... }` or `else { ... }`"
        return at(*extent(tokens[-1]), "expected the heads of this group", help)
    if "NAME" in accepts and "INT" not in accepts and not clauses_due and WORD.fullmatch(bad):
        return at(here, there, f"{shown} is a reserved word", "choose another name")

    if [token.type for token in tokens[-3:-1]] == ["HEADS", "LBRACE"] and tokens[-1] in CLAUSES:
        return at(
            *extent(tokens[-2]),
            "expected the heads of this group",
            "write `0..3 { ... }` or `else { ... }`",
        )
    if in_builder_head(tokens) and bad.type != "$END":
        head = max(i for i, token in enumerate(tokens) if token.type == "LBRACE")
        if tokens[0].type == "ATTENTION" and tokens[head - 1].type == "ASSIGN" and "COLON" in accepts:
            sign = extent(tokens[head - 1])
            help = f"leave it out: write `attention {tokens[1]} {{ ... }}`"
            return at(*sign, "`=` before clauses", help, sign)
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
    if complete and bad.type in STARTS and tokens[-1] in CLAUSES and tokens[0].type == "ATTENTION":
        word, _ = extent(tokens[-1])
        if not text[text.rfind("\n", 0, word) + 1 : word].strip():
            about = clause_around(tokens, text, word)
            begun = about[0] if about else word
            message = f"expected an expression, not the clause `{tokens[-1]}`"
            return at(*extent(tokens[-1]), message, "", (begun, word))
    if complete and bad.type in STARTS:
        if tokens[-1].type == "INT" and bad.type == "NAME" and here == end:
            return at(
                extent(tokens[-1])[0], there, "a name cannot begin with a digit", numeral(tokens[-1], bad)
            )
        help = beside(source.text, tokens[-1], bad, clauses_due)
        cut = clause_around(tokens, text, here, by_line=True)
        return at(here, there, "two expressions side by side", help, cut)
    heads = last_clause(tokens) == "heads" and "LBRACE" in accepts and complete
    if heads and bad.type != "$END":
        help = "a group of heads is written `0..3 { mask ... }`"
        return at(here, there, f"expected {wanted(accepts)}, not {shown}", help)
    if bad.type == "$END":
        return at(here, there, f"expected {wanted(accepts)}, not the end")
    return at(here, there, f"expected {wanted(accepts)}, not {shown}")


COMMA_CLAUSE = re.compile(rf"\s*(?:\}}|(?:{'|'.join(CLAUSES)})\b)")
JOINED = {
    "mask": "join patterns by an operator: `&` for what all relate, `|` for what some do",
    "keys": "join streams by `++`",
    "heads": "several heads are a range or a list: `0..3` or `[0, 1]`",
}
"""What stands in place of a comma in a clause."""
WORDS = {
    "if": "write `where(condition, a, b)`",
    "then": "write `where(condition, a, b)`",
    "between": "write `a <= x <= b`",
    "is": "write `==`",
    "equals": "write `==`",
    "isin": "write `in`",
    "where": "join conditions by `and`, patterns by `&`",
    "when": "join conditions by `and`, patterns by `&`",
    "with": "join conditions by `and`, patterns by `&`",
    "subset": "write `<=`",
    "subsetof": "write `<=`",
    "implies": "write `not a or b`",
    "xor": "write `(a or b) and not (a and b)`",
    "to": "write `a..b`, both ends included",
}
"""Operators of other languages."""
PATH = re.compile(r"\S+")
COLON = re.compile(r"\s*:")
ALONE = re.compile(r"\s*(?:\}|$)")
ARGUMENT = re.compile(r"[ \t]+(-?[\w.]+)")
TYPE = re.compile(r"\s*[A-Za-z_]\w*(?:\[[^\]\n]*\])?")
CLAUSE_WORDS = re.compile(
    rf"\n|#[^\n]*|\"[^\"\n]*\"?|[(){{}}\[\]]|\b(?:{'|'.join(CLAUSES)})\b(?!\s*[:=,)\]])"
)
OPEN, CLOSE = "([{", ")]}"


def last_clause(tokens: list[Token]) -> str:
    return next((str(token) for token in reversed(tokens) if token.type in CLAUSE_TYPES), "")


def numeral(digits: str, rest: str) -> str:
    """What is written for digits with letters behind."""
    if re.fullmatch(r"(?:_\d+)+", rest):
        return f"write `{digits}{rest.replace('_', '')}`"
    if digits == "0" and re.fullmatch(r"x[0-9a-fA-F]+", rest):
        return f"write `{int(digits + rest, 16)}`"
    if rest.lower() in ("k", "m", "g"):
        return f"write `{int(digits) * 1024 ** ('kmg'.index(rest.lower()) + 1)}`"
    return "write `2 * x` for a product"


def beside(text: str, left: Token, right: Token, clauses_due: bool) -> str:
    """What is written where two expressions stand side by side."""
    if help := WORDS.get(right) or WORDS.get(left):
        return help
    if left == "lambda":
        return "a pattern is written `{ q, k : condition }`"
    if left == "forall":
        return "a claim is about all positions and lengths: write `A <= B`"
    if left.type in ("INT", "FLOAT") and right.type == "NAME":
        return f"write `{left} * {right}`"
    if (
        right.type == "NAME"
        and word_of(text, right) == "pattern"
        and not (takes(text, left) and not clauses_due)
    ):
        return f"join patterns by an operator: `& {right}`, `| {right}`"
    if left.type == "NAME" and right.type in ("INT", "FLOAT", "NAME") and takes(text, left) is not False:
        if takes(text, left):
            return f"an argument stands in parentheses: `{left}({right})`"
        return f"put an operator between them, or parentheses around an argument: `{left}({right})`"
    return "put an operator between them"


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
        elif match[0][0].isalpha() and level == 0 and match.start() > position:
            line = text.rfind("\n", 0, match.start()) + 1
            if not by_line or not text[line : match.start()].strip():
                return match.start()
    return len(text)


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


def foreign_comment(text: str, tokens: list[Token], bad: Token) -> Cut | None:
    """A comment as other languages write it: words after a mark on the line of the mistake; its extent."""
    here, _ = extent(bad)
    line = text.rfind("\n", 0, here) + 1
    line_end = text.find("\n", here)
    line_end = len(text) if line_end < 0 else line_end
    for match in re.compile(r"//|--|/\*").finditer(text, line, min(here + 2, line_end)):
        between = [token for token in tokens if extent(token)[0] >= match.end()]
        worded = all(token.type == "NAME" for token in between)
        closed = text.find("*/", match.end(), line_end)
        if match[0] == "/*" and closed >= 0:
            line_end = closed + 2
        after = text[match.end() : line_end].strip()
        if any(
            after.count(opener) != after.count(closer) for opener, closer in zip(OPEN, CLOSE, strict=True)
        ):
            continue
        starts = match.start() == here or bad.type in ("NAME", "") or not between
        if worded and starts and bad.type != "ASSIGN" and after[:1].isalpha():
            return match.start(), line_end
    return None


def part_of(name: str, part: str) -> str:
    if name in MODULES:
        return f"write `{TYPES.get(part, part)}`"
    if part == "T":
        return f"the transpose is `T({name})`"
    return "names have no attributes"


def stray_colon(
    text: str, tokens: list[Token], here: int
) -> tuple[int, int, str, str, Cut | None] | tuple[int, int, str, str] | None:
    """What is wrong with the `:` at `here`, where other languages have one: types, slices, blocks."""
    if not tokens or in_builder_head(tokens):
        return None
    kinds = [token.type for token in tokens]
    first, depth = tokens[-1], sum((kind in OPENERS) - (kind in OPENERS.values()) for kind in kinds)
    header = kinds[0] in ("PATTERN", "SCORE", "LET", "ATTENTION") and kinds[1:2] == ["NAME"]
    parameters = kinds[2:3] == ["LPAR"] and depth == 1 and "RPAR" not in kinds
    if (
        header
        and kinds[-1] == "NAME"
        and (len(kinds) == 2 or parameters)
        and (kinds[0] != "ATTENTION" or parameters)
    ):
        kind = TYPE.match(text, here + 1)
        if kind is None:
            return here, here + 1, "unexpected `:`", "a value is written with `=`"
        end = kind.end()
        what = "parameter" if parameters else "definition"
        return here, end, f"a {what} has no type", "leave it out: the value says what it is", (here, end)
    if header and kinds[0] == "ATTENTION" and depth == 0:
        return (
            here,
            here + 1,
            "unexpected `:`",
            f"write the clauses in braces: `attention {tokens[1]} {{ ... }}`",
        )
    last = re.compile(r"\s*(\d+)").match(text, here + 1)
    if first.type == "INT" and last:
        start, help = extent(first)[0], f"write `{first}..{int(last[1]) - 1}`, both ends included"
        return start, last.end(), f"unexpected `{text[start : last.end()]}`", help
    if first.type == "NAME" and kinds[-2:-1] in (["LPAR"], ["COMMA"]) and depth:
        return here, here + 1, "unexpected `:`", f"a named argument is written `{first} = ...`"
    if (first.type in ENDS and depth) or first.type == "LSQB":
        return here, here + 1, "unexpected `:`", "a range is written `a..b`, both ends included"
    return None


def same_level(tokens: list[Token]) -> list[str]:
    """The kinds of the tokens before, back to the bracket or comma that they stand after."""
    found, level = list[str](), 0
    for token in reversed(tokens):
        if token.type in OPENERS.values():
            level += 1
        elif token.type in OPENERS:
            level -= 1
        if level < 0 or (level == 0 and token.type in ("COMMA", "COLON", *CLAUSE_TYPES)):
            break
        if level == 0:
            found.append(token.type)
    return found


def call_of(text: str, position: int) -> str:
    """The name at `position`, with its arguments where they are short."""
    match = re.compile(r"\w+(?:\([^()\n]{0,30}\))?").match(text, position)
    assert match is not None
    return match[0]


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
    if kind == DEFINITION and word in ELSEWHERE:
        return f"{kind} {shown}", ELSEWHERE[word]
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
