"""The canonical layout of a text: its own tokens and comments, only the white space between them is new."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lark import Token

from attndsl.errors import AttnError, Source
from attndsl.syntax.parse import Chunk, chunks
from attndsl.syntax.render import render as render
from attndsl.syntax.tokens import CLAUSES, ENDS, OPENERS, absolute_bars, extent

WIDTH = 100
INDENT = 4
COMMENT = re.compile(r"#[^\n]*")
CLAUSE_TYPES = frozenset(word.upper() for word in CLAUSES)
LEVELS = {
    level: position
    for position, levels in enumerate(
        (
            ["COMMA"],
            ["CONCAT"],
            ["_OR"],
            ["_AND"],
            ["COMPARE"],
            ["DOTS"],
            ["BAR"],
            ["AMP"],
            ["PLUS", "MINUS"],
            ["MULTIPLY"],
            ["POW"],
        )
    )
    for level in levels
}
"""How loosely a separator binds: a line is broken at the loosest first."""


@dataclass
class Comment:
    text: str
    blank: bool
    """Whether an empty line stands above."""


@dataclass
class Leaf:
    """A token as it is to be written: `gap` spaces before it, or at `indent` where it begins a line."""

    text: str
    type: str
    level: int | None = None
    gap: int = 1
    comments: list[Comment] = field(default_factory=list)
    """Comments on lines of their own above it."""
    trailing: str = ""
    blank: bool = False
    breaks: bool = False
    indent: int = 0


@dataclass
class Group:
    """What stands between two brackets. A block holds clauses."""

    open: Leaf
    items: list[Leaf | Group]
    close: Leaf
    block: bool


Items = list["Leaf | Group"]


def format(text: str | Source) -> str:
    """The canonical layout of a text. Raises AttnError where it cannot be parsed.

    `parse(format(text)) == parse(text)`, `format(format(text)) == format(text)`, and every comment stays
    between the same two tokens.
    """
    source = text if isinstance(text, Source) else Source("<text>", text)
    parsed = list(chunks(source))
    if errors := [error for chunk in parsed for error in chunk.errors]:
        raise AttnError(*errors)
    written: list[Leaf] = []
    for leaves, one_line in definitions(source, parsed):
        if leaves[0].type != "$END":
            lay_out(grouped(leaves), one_line)
        start_line(leaves[0], 0)
        written += leaves
    return emit(written)


def definitions(source: Source, parsed: list[Chunk]) -> Iterator[tuple[list[Leaf], bool]]:
    """The leaves of every definition, and whether it was written on one line; at last the end of the text."""
    position = 0
    previous: Leaf | None = None
    for chunk in parsed:
        leaves = [Leaf(str(token), token.type) for token in chunk.tokens]
        set_gaps(chunk.tokens, leaves)
        first = last = chunk.start
        for token, leaf in zip(chunk.tokens, leaves, strict=True):
            begin, stop = extent(token)
            attach(source.text[position : chunk.start + begin], previous, leaf)
            position = last = chunk.start + stop
            previous = leaf
        if leaves:
            yield leaves, "\n" not in source.text[first:last]
    end = Leaf("", "$END")
    attach(source.text[position:], previous, end)
    yield [end], True


def attach(space: str, before: Leaf | None, after: Leaf) -> None:
    """Give the comments in the space between two tokens to one of them."""
    position = 0
    for match in COMMENT.finditer(space):
        above = space[position : match.start()]
        text = match[0].rstrip()
        if before is not None and position == 0 and "\n" not in above:
            before.trailing = text
        else:
            after.comments.append(Comment(text, above.count("\n") > 1))
        position = match.end()
    after.blank = space.count("\n", position) > 1


def set_gaps(tokens: list[Token], leaves: list[Leaf]) -> None:
    """The space before each token where a line goes on, and the level of every binary operator."""
    bars, _ = absolute_bars(tokens)
    tight = True
    operand = False
    for position, leaf in enumerate(leaves):
        kind = leaf.type
        before = leaves[position - 1].type if position else ""
        opens = bars.get(position, False)
        closes = position in bars and not opens
        called = operand and before != "RBRACE" and kind in ("LPAR", "LSQB")
        leaf.gap = 0 if tight or closes or called or kind in ("COMMA", "RPAR", "RSQB") else 1
        stage = kind == "NAME" and operand and tokens[0].type == "STACK" and position > 1
        if (kind in CLAUSE_TYPES and before != "LBRACE") or (kind == "NAME" and before == "RSQB") or stage:
            leaf.gap = 2
        prefix = kind in ("MINUS", "TILDE") and not operand
        if position not in bars and not prefix:
            leaf.level = LEVELS.get(kind)
        tight = kind in ("LPAR", "LSQB") or opens or prefix
        operand = kind in ENDS or closes


def grouped(leaves: list[Leaf]) -> Items:
    """The leaves of a definition, nested by their brackets."""
    stack: list[tuple[Leaf | None, Items]] = [(None, [])]
    for leaf in leaves:
        if leaf.type in OPENERS:
            stack.append((leaf, []))
        elif leaf.type in OPENERS.values():
            opener, items = stack.pop()
            assert opener is not None
            tighten_ranges(items)
            stages = leaves[0].type == "STACK" and all(
                leaf is None or leaf.type == "LBRACE" for leaf, _ in stack
            )
            clauses = not items or stages or first_leaf(items).type in CLAUSE_TYPES
            stack[-1][1].append(Group(opener, items, leaf, opener.type == "LBRACE" and clauses))
        else:
            stack[-1][1].append(leaf)
    tighten_ranges(stack[0][1])
    return stack[0][1]


def tighten_ranges(items: Items) -> None:
    """`a..b` is written without spaces where neither end is a sum or a product."""
    for position, item in enumerate(items):
        if isinstance(item, Group) or item.type != "DOTS":
            continue
        before, after = items[:position], items[position + 1 :]
        if not composite(reversed(before)) and not composite(iter(after)):
            item.gap = first_leaf(after).gap = 0


def composite(items: Iterator[Leaf | Group]) -> bool:
    """Whether an operator that binds tighter than `..` comes before one that binds as loosely."""
    for item in items:
        if isinstance(item, Leaf):
            if item.type in ("ASSIGN", "COLON", *CLAUSE_TYPES) or (
                item.level is not None and item.level <= LEVELS["DOTS"]
            ):
                return False
            if item.level is not None:
                return True
    return False


def leaves_of(items: Items) -> Iterator[Leaf]:
    for item in items:
        if isinstance(item, Leaf):
            yield item
        else:
            yield item.open
            yield from leaves_of(item.items)
            yield item.close


def first_leaf(items: Items) -> Leaf:
    return items[0] if isinstance(items[0], Leaf) else items[0].open


def flat_width(items: Items) -> int | None:
    """The length of items on one line, without the space before them; None where a comment forbids it."""
    width = 0
    open_line = True
    for position, leaf in enumerate(leaves_of(items)):
        if not open_line or (position and leaf.comments):
            return None
        width += len(leaf.text) + (leaf.gap if position else 0)
        open_line = not leaf.trailing
    return width


def start_line(leaf: Leaf, indent: int) -> None:
    leaf.breaks, leaf.indent = True, indent


def lay_out(items: Items, one_line: bool) -> None:
    """Decide where the lines of one definition begin."""
    width = flat_width(items)
    block = items[-1] if isinstance(items[-1], Group) and items[-1].block else None
    if width is not None and width <= WIDTH and (one_line or block is None):
        return
    if first_leaf(items).type == "ATTENTION" and block is None:
        sign = next(i for i, item in enumerate(items) if isinstance(item, Leaf) and item.type == "ASSIGN")
        fill(items[:sign], 0, INDENT, 0, 0)
        start_line(first_leaf(items[sign:]), INDENT)
        fill(items[sign:], INDENT, 2 * INDENT, INDENT, 0)
    elif block is None:
        fill(items, 0, INDENT, 0, 0)
    else:
        fill(items[:-1], 0, INDENT, 0, len(" {"))
        lay_block(block, 0)


def lay_block(block: Group, indent: int) -> None:
    """One clause, or one stage, to a line."""
    block.open.indent = indent
    clauses = first_leaf(block.items).type in CLAUSE_TYPES
    for part in split(
        block.items, lambda leaf: leaf.type in CLAUSE_TYPES or (not clauses and leaf.type == "NAME")
    ):
        start_line(first_leaf(part), indent + INDENT)
        (lay_clause if clauses else lay_stage)(part, indent + INDENT)
    start_line(block.close, indent)


def lay_stage(stage: Items, indent: int) -> None:
    width, block = flat_width(stage), stage[-1]
    if width is not None and indent + width <= WIDTH:
        return
    if isinstance(block, Group) and block.block:
        fill(stage[:-1], indent, indent + INDENT, indent, len(" {"))
        lay_block(block, indent)
    else:
        fill(stage, indent, indent + INDENT, indent, 0)


def lay_clause(clause: Items, indent: int) -> None:
    word = first_leaf(clause)
    width = flat_width(clause)
    if width is not None and indent + width <= WIDTH:
        return
    if word.type == "HEADS":
        for group in head_groups(clause[1:]):
            start_line(first_leaf(group), indent + INDENT)
            width = flat_width(group)
            block = group[-1]
            if (width is None or indent + INDENT + width > WIDTH) and isinstance(block, Group):
                fill(group[:-1], indent + INDENT, indent + 2 * INDENT, indent + INDENT, len(" {"))
                lay_block(block, indent + INDENT)
    elif word.type == "INPUTS":
        column = indent
        for position, decl in enumerate(split(clause, lambda leaf: leaf.type == "NAME" and leaf.gap == 2)):
            if position:
                start_line(first_leaf(decl), indent + INDENT)
                column = indent + INDENT
            fill(decl, column, column + INDENT, column, 0)
    else:
        fill(clause, indent, indent + INDENT, indent, 0)


def head_groups(items: Items) -> Iterator[Items]:
    start = 0
    for position, item in enumerate(items):
        if isinstance(item, Group) and item.block:
            yield items[start : position + 1]
            start = position + 1


def fill(items: Items, base: int, after: int, column: int, tail: int) -> int:
    """Write items from `column` on and say at which column they end; `tail` more characters follow them.

    Lines that go on begin at `after`, closing brackets at `base`.
    """
    for leaf in leaves_of(items):
        if not leaf.breaks:
            leaf.indent = after
    width = flat_width(items)
    if width is not None and column + width + tail <= WIDTH:
        return column + width
    loosest = min(
        (item.level for item in items if isinstance(item, Leaf) and item.level is not None), default=None
    )
    if loosest is None:
        return fill_brackets(items, base, column, tail)
    # A comma ends a part, any other operator begins one.
    comma = loosest == LEVELS["COMMA"]
    first, *others = split(items, lambda leaf: leaf.level == loosest)
    column = fill(first, base, after + INDENT, column, 1 if comma else 0)
    for part in others:
        operator, operand = first_leaf(part), part[1:]
        if comma:
            start_line(first_leaf(operand), after)
            column = after
        else:
            start_line(operator, after)
            column = after + len(operator.text) + 1
        column = fill(operand, after, after + INDENT, column, 1 if comma else tail)
    return column


def fill_brackets(items: Items, base: int, column: int, tail: int) -> int:
    """Items without an operator between them: break inside of the brackets that do not fit."""
    for position, item in enumerate(items):
        space = first_leaf([item]).gap if position else 0
        if isinstance(item, Leaf):
            column += space + len(item.text)
            continue
        width = flat_width([item])
        if (width is not None and column + space + width + tail <= WIDTH) or not item.items:
            column += space + (width or 0)
            continue
        inner = item.items
        colon = next(
            (i for i, leaf in enumerate(inner) if isinstance(leaf, Leaf) and leaf.type == "COLON"), -1
        )
        start_line(first_leaf(inner[colon + 1 :]), base + INDENT)
        fill(inner[colon + 1 :], base + INDENT, base + INDENT, base + INDENT, 0)
        start_line(item.close, base)
        column = base + 1
    return column


def split(items: Items, begins: Callable[[Leaf], bool]) -> list[Items]:
    """Cut before every leaf that begins a part."""
    parts: list[Items] = []
    for item in items:
        if not parts or (isinstance(item, Leaf) and begins(item)):
            parts.append([])
        parts[-1].append(item)
    return parts


def emit(leaves: list[Leaf]) -> str:
    lines: list[str] = []
    previous = ""
    trailing = True
    for leaf in leaves:
        spaced = leaf.breaks and previous != "LBRACE" and leaf.type not in OPENERS.values()
        pad = " " * leaf.indent
        deeper = " " * INDENT if leaf.type in OPENERS.values() else ""
        for comment in leaf.comments:
            if comment.blank and spaced and lines:
                lines.append("")
            lines.append(pad + deeper + comment.text)
        if leaf.breaks or leaf.comments or trailing:
            if leaf.blank and spaced and lines:
                lines.append("")
            lines.append(pad + leaf.text)
        else:
            lines[-1] += " " * leaf.gap + leaf.text
        if leaf.trailing:
            lines[-1] += "  " + leaf.trailing
        previous, trailing = leaf.type, bool(leaf.trailing)
    return "\n".join(lines).rstrip("\n") + "\n" if any(lines) else ""
