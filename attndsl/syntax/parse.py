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
from attndsl.syntax.build import Build, place
from attndsl.syntax.explain import DEFINITION, explain
from attndsl.syntax.nodes import Argument, AttentionDef, Definition, Expression, Item, Module, Node
from attndsl.syntax.tokens import extent

TEXT_LIMIT = 2_000_000
SIZE_LIMIT = 100_000
"""Words and signs in one definition."""
NESTING_LIMIT = 100
ERROR_LIMIT = 100
STACK_LIMIT = 10 * NESTING_LIMIT
"""Entries on the parser's stack; a level of nesting takes fewer than ten."""

SCAN = re.compile(r'\n|#[^\n]*|"[^"\n]*"?|[(){}\[\]]|\b(?:pattern|score|let|attention|assert|use)\b')
NAMED = re.compile(r"\b(?:pattern|score|let|attention)\s+([A-Za-z_]\w*)")
GAP = re.compile(r"(?:\s|#[^\n]*+)*+")
CLOSER = {"(": ")", "[": "]", "{": "}"}


@dataclass
class Chunk:
    """Characters [start, end), from one definition word to the next.

    `doc` is the `##` text above it, `error` the first mistake in its brackets. `item` and `tokens` are what
    the parser made of it; positions of tokens count from `start`.
    """

    start: int
    end: int
    doc: str = ""
    error: Diagnostic | None = None
    item: Item | None = None
    tokens: list[Token] = field(default_factory=list)


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
        if chunk.error is not None:
            diagnostics.append(chunk.error)
            unread += NAMED.findall(source.text, chunk.start, chunk.end)
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
        assert isinstance(chunk.item, Definition | AttentionDef), chunk.error
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
    expression = read(source, chunk, "expr") if chunk.error is None else None
    if chunk.error is None and others:
        word = Span(source, others[0].start, others[0].start + 1)
        raise fail("expected an expression, not a definition", word)
    if not isinstance(expression, Expression):
        assert chunk.error is not None
        raise AttnError(chunk.error)
    return expression


def chunks(source: Source) -> Iterator[Chunk]:
    """The definitions of a text one after the other, parsed; ends with an error where a limit is reached."""
    if len(source.text) > TEXT_LIMIT:
        yield Chunk(0, 0, error=too_long(source))
        return
    errors = 0
    for chunk in cut(source):
        if chunk.error is None:
            parse_chunk(source, chunk)
        yield chunk
        errors += chunk.error is not None
        if errors == ERROR_LIMIT:
            yield Chunk(chunk.end, chunk.end, error=Diagnostic(f"stopped after {ERROR_LIMIT} errors"))
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


def parse_chunk(source: Source, chunk: Chunk) -> None:
    """Fill in `item`, `tokens` and `error`."""
    module = read(source, chunk, "module")
    if isinstance(module, Module):
        for item in module.items:
            chunk.item = item
            if chunk.doc and isinstance(item, Definition | AttentionDef):
                chunk.item = replace(item, doc=chunk.doc)


def read(source: Source, chunk: Chunk, start: str) -> Module | Expression | None:
    """What a chunk is by the rule `start`. Fills in `tokens`, and `error` where the result is None."""
    parser = grammar().parse_interactive(source.text[chunk.start : chunk.end], start)
    stack = parser.parser_state.value_stack
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
        (chunk.error,) = error.diagnostics
    except UnexpectedInput as error:
        if isinstance(error, UnexpectedToken) and chunk.tokens and error.token is chunk.tokens[-1]:
            chunk.tokens.pop()
        recover(source, chunk, start, error)
    finally:
        place.reset(outer)
    return None


def recover(source: Source, chunk: Chunk, start: str, error: UnexpectedInput) -> None:
    """Say what is wrong after the tokens of a chunk; keep what stands before an unknown definition."""
    # The refused token may have made the parser reduce, so that it wants less than it did before.
    parser = grammar().parse_interactive("", start)
    for token in chunk.tokens:
        parser.feed_token(token)
    accepts = parser.accepts()  # type: ignore[no-untyped-call]
    chunk.error = explain(source, chunk.start, chunk.tokens, error, accepts)
    if chunk.tokens and chunk.error.message.startswith(DEFINITION):
        complete = Chunk(chunk.start, token_span(source, chunk, chunk.tokens[-1]).end, chunk.doc)
        parse_chunk(source, complete)
        chunk.item = complete.item


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


def too_long(source: Source) -> Diagnostic:
    return Diagnostic(f"`{source.name}` has {len(source.text)} characters, the limit is {TEXT_LIMIT}")


def too_deep(span: Span) -> AttnError:
    return fail(f"nested too deeply, the limit is {NESTING_LIMIT} levels", span)


def cut(source: Source) -> Iterator[Chunk]:
    """The unparsed chunks of a text, their brackets checked.

    The words of definitions are reserved: one begins a definition wherever it stands outside of brackets, and
    inside of them where it begins a line, since then a bracket above was never closed. `score` is a clause
    too, and a definition word straight after another is a name badly chosen.
    """
    text = source.text
    chunk = Chunk(1 if text.startswith("\ufeff") else 0, len(text))
    brackets: list[tuple[str, int]] = []
    doc: list[str] = []
    line = chunk.start
    doc_end = word_end = -1

    def wrong(message: str, start: int, end: int, help: str = "") -> None:
        chunk.error = chunk.error or Diagnostic(message, Span(source, start, end), help)

    def unclosed(bracket: tuple[str, int]) -> None:
        wrong(f"`{bracket[0]}` is never closed", bracket[1], bracket[1] + 1)

    for match in SCAN.finditer(text, chunk.start):
        found, start, end = match[0], match.start(), match.end()
        if found == "\n":
            line = end
        elif found[0] == "#":
            if found.startswith("##") and (not (indent := text[line:start]) or indent.isspace()):
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
            elif chunk.error is None:
                (chunk.error,) = too_deep(Span(source, start, end)).diagnostics
        elif not found[0].isalpha():
            if found not in [CLOSER[bracket] for bracket, _ in brackets]:
                wrong(f"`{found}` closes nothing", start, end)
            else:
                while CLOSER[(bracket := brackets.pop())[0]] != found:
                    unclosed(bracket)
        else:
            blank = not (before := text[max(line, word_end) : start]) or before.isspace()
            named = blank and word_end > line
            clause = found == "score" and any(bracket == "{" for bracket, _ in brackets)
            if named or clause or (brackets and not blank):
                word_end = end
                continue
            if brackets:
                unclosed(brackets[-1])
                brackets.clear()
            chunk.end = start
            yield chunk
            documented = doc and (gap := GAP.match(text, doc_end)) and gap.end() == start
            chunk = Chunk(start, len(text), "\n".join(doc) if documented else "")
            doc.clear()
            doc_end, word_end = -1, end
    if brackets:
        unclosed(brackets[-1])
    yield chunk
