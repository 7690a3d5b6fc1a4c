"""Text to syntax tree.

A text is cut at its definition words, then every definition is parsed on its own: one mistake costs one
definition, and all of them are reported in one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files

from lark import Lark, Token, UnexpectedInput, UnexpectedToken
from platformdirs import user_cache_path

from attndsl.errors import AttnError, Diagnostic, Source, Span, fail
from attndsl.syntax.boundaries import CLAUSE_WORDS, Cut, clause_around
from attndsl.syntax.build import Build, place
from attndsl.syntax.explain import DEFINITION, explain
from attndsl.syntax.nodes import Argument, AttentionDef, Definition, Expression, Item, Module, Node, StackDef
from attndsl.syntax.tokens import CLAUSES, extent

TEXT_LIMIT = 2_000_000
SIZE_LIMIT = 100_000
"""Words and signs in one definition."""
NESTING_LIMIT = 100
HALF_OPEN = re.compile(r"\[\s*(\w+)\s*,\s*(\w+)\s*\)")
"""A range that other notations write so, its end left out."""
ERROR_LIMIT = 100
MISTAKES = 10
"""That are told of one definition."""
LONG = 20_000
"""Characters of a definition of which the first mistake alone is told: each reads it again."""
STACK_LIMIT = 10 * NESTING_LIMIT
"""Entries on the parser's stack; a level of nesting takes fewer than ten."""

LINE = rf"^[ \t]*(?:else\b|(?:{'|'.join(CLAUSES)})\b(?=[ \t]+(?!(?:and|or|in|mod)\b)[A-Za-z{{~\d]))"
"""A clause, or the last group of heads, at the start of a line."""
SCAN = re.compile(
    rf'\n|#[^\n]*|"[^"\n]*"?|[(){{}}\[\]]|{LINE}|\b(?:pattern|score|let|attention|stack|assert|use)\b',
    re.MULTILINE,
)
BUILDER = re.compile(r"\{\s*\(?\s*[A-Za-z_]\w*\s*[,:]")
NAMED = re.compile(r"\b(?:pattern|score|let|attention|stack)\s+([A-Za-z_]\w*)")
INNER = re.compile(
    r"\b(?:pattern|let|attention|stack|score(?=\s+\w+\s*(?:\([^()]*\)\s*)?=(?!=)))\s+([A-Za-z_]\w*)"
)
"""A definition in the middle of a text: `score NAME` may be a clause there."""
ASSIGNED = re.compile(r"([A-Za-z_]\w*)\s*=(?!=)")
"""A name without its word, as in other languages."""
BEGUN = re.compile(r"[ \t]+[A-Za-z_]\w*[ \t]*[=({]")
GAP = re.compile(r"(?:\s|#[^\n]*+)*+")
CLOSER = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Chunk:
    """Characters [start, end), from one definition word to the next.

    `doc` is the `##` text above it, `errors` what is wrong, `left` the brackets that are open at its end.
    `item` and `tokens` are what the parser made of it, without the clauses that are wrong, which may have
    declared the names `lost`; positions of tokens count from `start`.
    """

    start: int
    end: int
    doc: str = ""
    errors: list[Diagnostic] = field(default_factory=list)
    left: str = ""
    item: Item | None = None
    tokens: list[Token] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def parse(text: str, name: str = "<text>") -> Module:
    """The module of a text. Raises AttnError with every mistake of it, at most ERROR_LIMIT."""
    module, diagnostics = parse_partial(Source(name, text))
    if diagnostics:
        raise AttnError(*diagnostics)
    return module


def parse_partial(source: Source) -> tuple[Module, list[Diagnostic]]:
    """The definitions that could be read, and what is wrong with the others."""
    items: list[Item] = []
    unread: list[str] = []
    diagnostics: list[Diagnostic] = []
    for chunk in chunks(source):
        if chunk.item is not None:
            items.append(chunk.item)
        if chunk.errors:
            diagnostics += chunk.errors
            named = NAMED.match(source.text, chunk.start)
            unread += [named[1]] if named else []
            unread += INNER.findall(source.text, chunk.start, chunk.end) + chunk.lost
            assigned = ASSIGNED.match(source.text, chunk.start)
            unread += [assigned[1]] if assigned else []
            unread += ["use"] * source.text.startswith("use", chunk.start)
    return Module(tuple(items), tuple(unread), source=source), diagnostics


class Definitions(Mapping[str, Definition | AttentionDef]):
    """The definitions of a text that is right, by name, each parsed when it is first asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.chunks = {
            named[1]: chunk for chunk in cut(source) if (named := NAMED.match(source.text, chunk.start))
        }

    def __getitem__(self, name: str) -> Definition | AttentionDef:
        chunk = self.chunks[name]
        if chunk.item is None:
            parse_chunk(self.source, chunk)
        assert isinstance(chunk.item, Definition | AttentionDef), chunk.errors
        return chunk.item

    def __iter__(self) -> Iterator[str]:
        return iter(self.chunks)

    def __len__(self) -> int:
        return len(self.chunks)

    def __contains__(self, name: object) -> bool:
        return name in self.chunks


def parse_expression(source: Source) -> Expression:
    """The expression that a source is."""
    if len(source.text) > TEXT_LIMIT:
        raise AttnError(too_long(source))
    chunk, *others = cut(source)
    expression = None if chunk.errors else read(source, chunk, source.text[chunk.start : chunk.end], "expr")
    if not chunk.errors and others:
        word = Span(source, others[0].start, others[0].start + 1)
        raise fail("expected an expression, not a definition", word)
    if isinstance(expression, Expression):
        return expression
    if isinstance(expression, Mistake):
        chunk.errors.append(expression.told)
    raise AttnError(*chunk.errors)


def chunks(source: Source) -> Iterator[Chunk]:
    """The definitions of a text one after the other, parsed; ends with an error where a limit is reached."""
    if len(source.text) > TEXT_LIMIT:
        yield Chunk(0, 0, errors=[too_long(source)])
        return
    errors = 0
    for chunk in cut(source):
        parse_chunk(source, chunk)
        chunk.errors = chunk.errors[: ERROR_LIMIT - errors]
        yield chunk
        errors += len(chunk.errors)
        if errors == ERROR_LIMIT:
            yield Chunk(chunk.end, chunk.end, errors=[Diagnostic(f"stopped after {ERROR_LIMIT} errors")])
            return


@cache
def grammar() -> Lark:
    text = files("attndsl.grammar").joinpath("attn.lark").read_text(encoding="utf-8")
    tables = user_cache_path("attndsl") / "grammar.lark-cache"
    # Lark reads its tables from here in a tenth of the time that it takes to make them; where the
    # folder cannot be written to it makes them each time
    with suppress(OSError):
        tables.parent.mkdir(parents=True, exist_ok=True)
    return Lark(
        text,
        start=["module", "expr"],
        parser="lalr",
        maybe_placeholders=False,
        transformer=Build(),
        cache=str(tables),
    )


@dataclass(frozen=True)
class Mistake:
    """What is told of a text, and what is left out of it to read on; None where nothing helps."""

    told: Diagnostic
    cut: Cut | None = None


def parse_chunk(source: Source, chunk: Chunk) -> None:
    """Fill in `item` and `errors`. What is wrong is told and left out, and the rest is read again."""
    text = source.text[chunk.start : chunk.end]
    if chunk.errors:
        text = mended(chunk, text)
    for _ in range(MISTAKES):
        if not text:
            return
        tree = read(source, chunk, text, "module")
        if isinstance(tree, Module):
            for item in tree.items:
                chunk.item = item
                if chunk.doc and isinstance(item, Definition | AttentionDef | StackDef):
                    chunk.item = replace(item, doc=chunk.doc)
            return
        assert isinstance(tree, Mistake)
        span = tree.told.span
        # that a text ends too early, or a bracket put there is refused, follows from what was told before
        if not chunk.errors or span is None or (span.start < chunk.end and span.text):
            chunk.errors.append(tree.told)
        if len(text) > LONG:
            return
        text = without(chunk, text, tree.cut)


def without(chunk: Chunk, text: str, cut: Cut | None) -> str:
    """The text with blanks for what is cut out of it; empty where there is nothing to cut."""
    if cut is None or not text[cut[0] : cut[1]].strip():
        return ""
    gone = text[cut[0] : cut[1]]
    if gone.startswith("inputs"):
        chunk.lost += re.findall(r"[A-Za-z_]\w*", gone)
    if gone.startswith("keys"):
        chunk.lost.append("stream")
    return text[: cut[0]] + re.sub(r"[^\n]", " ", gone) + text[cut[1] :]


def mended(chunk: Chunk, text: str) -> str:
    """A text whose brackets are wrong without the clause where they are, or with those that lack at its end;
    empty where that does not help."""
    if chunk.left:
        text += "".join(CLOSER[bracket] for bracket in reversed(chunk.left))
        return text if balanced(text) else ""
    (error,) = chunk.errors
    assert error.span is not None
    at = error.span.start - chunk.start
    if text[at] == ")" and error.help:
        text = f"{text[:at]}]{text[at + 1 :]}"  # of a range without its end
        return text if balanced(text) else ""
    if text[at] in CLOSER.values():
        return without(chunk, text, (at, at + 1))
    if text[at] == "{" and not BUILDER.match(text, at):
        return ""  # of a group of heads: what is in it cannot be told from what is not
    words = [match.start() for match in CLAUSE_WORDS.finditer(text) if match[0] in CLAUSES]
    start = max((word for word in words if word <= at), default=None)
    if start is None:
        return ""
    end = min((word for word in words if word > at), default=text.rfind("}"))
    text = without(chunk, text, (start, max(start, end)))
    return text if balanced(text) else ""


def balanced(text: str) -> bool:
    brackets: list[str] = []
    for match in SCAN.finditer(text):
        if match[0] in CLOSER:
            brackets.append(CLOSER[match[0]])
        elif match[0] in CLOSER.values() and (not brackets or brackets.pop() != match[0]):
            return False
    return not brackets


def read(source: Source, chunk: Chunk, text: str, start: str) -> Module | Expression | Mistake:
    """What the text of a chunk is by the rule `start`. Fills in `tokens`."""
    parser = grammar().parse_interactive(text, start)
    stack = parser.parser_state.value_stack
    chunk.tokens = []
    outer = place.set((source, chunk.start))
    try:
        for token in parser.iter_parse():
            if len(stack) > STACK_LIMIT:
                raise too_deep(token_span(source, chunk, token))
            if len(chunk.tokens) == SIZE_LIMIT:
                raise fail(
                    f"the definition is too long, the limit is {SIZE_LIMIT} words and signs",
                    token_span(source, chunk, token),
                )
            chunk.tokens.append(token)
        tree: Module | Expression = parser.feed_eof()  # type: ignore[no-untyped-call]
        check(source, chunk, tree)
        return tree
    except AttnError as error:
        (told,) = error.diagnostics
        return Mistake(told, _clause(chunk, text, told))
    except UnexpectedInput as error:
        if isinstance(error, UnexpectedToken) and chunk.tokens and error.token is chunk.tokens[-1]:
            chunk.tokens.pop()
        return refused(source, chunk, text, start, error)
    finally:
        place.reset(outer)


def refused(source: Source, chunk: Chunk, text: str, start: str, error: UnexpectedInput) -> Mistake:
    """What is wrong after the tokens of a chunk; an unknown definition goes on to its end."""
    # The refused token may have made the parser reduce, so that it wants less than it did before.
    parser = grammar().parse_interactive("", start)
    for token in chunk.tokens:
        parser.feed_token(token)
    accepts = parser.accepts()  # type: ignore[no-untyped-call]
    told, cut = explain(source, chunk.start, text, chunk.tokens, error, accepts)
    if chunk.tokens and told.message.startswith(DEFINITION):
        return Mistake(told, (extent(chunk.tokens[-1])[1], len(text)))
    return Mistake(told, cut or _clause(chunk, text, told))


def _clause(chunk: Chunk, text: str, told: Diagnostic) -> Cut | None:
    if told.span is None or not chunk.tokens:
        return None
    return clause_around(chunk.tokens, text, min(told.span.start - chunk.start, len(text)))


def token_span(source: Source, chunk: Chunk, token: Token) -> Span:
    start, end = extent(token)
    return Span(source, chunk.start + start, chunk.start + end)


def check(source: Source, chunk: Chunk, tree: Module | Expression) -> None:
    """What the grammar does not say: percentages only in assertions, bounded depth, `2let` is no `2 let`."""
    if isinstance(tree, Module) and len(tree.items) > 1:
        start = tree.items[1].span.start
        raise fail("a name cannot begin with a digit", Span(source, start - 1, start))
    for token in chunk.tokens:
        if token.type == "PERCENT" and chunk.tokens[0].type != "ASSERT":
            raise fail("a percentage stands only in an assertion", token_span(source, chunk, token))
    # A node has a token of its own, so that a short definition cannot be deep.
    if len(chunk.tokens) > NESTING_LIMIT:
        for root in tree.items if isinstance(tree, Module) else [tree]:
            check_depth(root)


def check_depth(root: Node) -> None:
    stack: list[tuple[Node, int]] = [(root, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > NESTING_LIMIT:
            raise too_deep(node.span)
        below = depth if isinstance(node, Argument) else depth + 1
        values = list(vars(node).values())
        while values:
            value = values.pop()
            if isinstance(value, Node):
                stack.append((value, below))
            elif isinstance(value, tuple):
                values.extend(value)


def _before(end: str) -> str:
    """The last integer below `end`."""
    return str(int(end) - 1) if end.isdecimal() else f"{end} - 1"


def too_long(source: Source) -> Diagnostic:
    return Diagnostic(f"`{source.name}` has {len(source.text)} characters, the limit is {TEXT_LIMIT}")


def too_deep(span: Span) -> AttnError:
    return fail(f"nested too deeply, the limit is {NESTING_LIMIT} levels", span)


def cut(source: Source) -> Iterator[Chunk]:
    """The unparsed chunks of a text, their brackets checked.

    The words of definitions are reserved: one begins a definition wherever it stands outside of brackets, and
    inside of them where it begins a line no further right than the one before, since then a bracket above was
    never closed. `score` is a clause too, a definition word straight after another is a name badly chosen,
    and words after `//` are a comment of another language.
    """
    text = source.text
    chunk = Chunk(1 if text.startswith("\ufeff") else 0, len(text))
    brackets: list[tuple[str, int]] = []
    doc: list[str] = []
    line = chunk.start
    doc_end = word_end = -1
    indent = 0

    def wrong(message: str, start: int, end: int, help: str = "") -> None:
        if not chunk.errors:
            chunk.errors.append(Diagnostic(message, Span(source, start, end), help))

    def unclosed(bracket: tuple[str, int]) -> None:
        wrong(f"`{bracket[0]}` is never closed", bracket[1], bracket[1] + 1)

    def ended() -> None:
        if brackets:
            # where a bracket was wrong before, these may be right
            chunk.left = "" if chunk.errors else "".join(bracket for bracket, _ in brackets)
            unclosed(brackets[-1])
            brackets.clear()

    for match in SCAN.finditer(text, chunk.start):
        found, end = match[0].lstrip(" \t"), match.end()
        start = end - len(found)
        if found == "\n":
            line = end
        elif found[0] == "#":
            if found.startswith("##") and (not (before := text[line:start]) or before.isspace()):
                if text[doc_end:start].count("\n") != 1 or not text[doc_end:start].isspace():
                    doc.clear()
                doc.append(found[2:].strip())
                doc_end = end
        elif found[0] == '"':
            if len(found) == 1 or found[-1] != '"':
                wrong(
                    "the string is never closed",
                    start,
                    start + len(found.rstrip()),
                    'end it with `"` on its line',
                )
        elif found in CLOSER:
            if len(brackets) < NESTING_LIMIT:
                brackets.append((found, start))
            elif not chunk.errors:
                chunk.errors += too_deep(Span(source, start, end)).diagnostics
        elif found in CLAUSES and brackets and text.startswith("attention", chunk.start):
            # a clause begins a line: what is open besides the braces around clauses was never closed
            word_end = end
            while len(brackets) > 1 and (brackets[-1][0] != "{" or BUILDER.match(text, brackets[-1][1])):
                unclosed(brackets.pop())
        elif found == "else":
            while len(brackets) > 1:
                unclosed(brackets.pop())
        elif found in CLAUSES and found != "score":
            continue
        elif not found[0].isalpha():
            if found not in [CLOSER[bracket] for bracket, _ in brackets]:
                half = HALF_OPEN.match(text, brackets[-1][1]) if brackets and found == ")" else None
                wrong(
                    f"`{found}` closes nothing",
                    start,
                    end,
                    f"write `{half[1]}..{_before(half[2])}`" if half else "",
                )
            else:
                while CLOSER[(bracket := brackets.pop())[0]] != found:
                    unclosed(bracket)
        else:
            blank = not (before := text[max(line, word_end) : start]) or before.isspace()
            named = blank and word_end > line
            clause = found == "score" and any(bracket == "{" for bracket, _ in brackets)
            # with more space before it than the definition has it is written inside of it
            nested = found == "attention" and BEGUN.match(text, end)
            inside = brackets and not nested and (not blank or start - line > indent)
            remark = before.lstrip().startswith(("//", "--", "/*")) and not BEGUN.match(text, end)
            imported = found == "use" and before.lstrip().startswith(("from ", "import "))
            if named or clause or inside or remark or imported:
                word_end = end
                continue
            ended()
            chunk.end = start
            yield chunk
            documented = doc and (gap := GAP.match(text, doc_end)) and gap.end() == start
            chunk = Chunk(start, len(text), "\n".join(doc) if documented else "")
            indent = start - line
            doc.clear()
            doc_end, word_end = -1, end
    ended()
    yield chunk
