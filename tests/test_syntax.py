"""The syntax layer: text to tree, tree to text, and what is said about text that is neither."""

from __future__ import annotations

import re
import time
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lark import Lark

from attndsl.errors import AttnError, Source, Span
from attndsl.syntax import format, nodes, parse, parse_partial, render
from attndsl.syntax.parse import ERROR_LIMIT, NESTING_LIMIT, TEXT_LIMIT, chunks
from attndsl.syntax.tokens import CLAUSES, DEFINITIONS

FIXTURES = Path(__file__).parent / "fixtures"
SAMPLES = (FIXTURES / "syntax" / "samples.attn").read_text()
DEFINITION = [SAMPLES[chunk.start : chunk.end] for chunk in chunks(Source("", SAMPLES)) if chunk.item]
STEADY = settings(derandomize=True, deadline=None, database=None)
NOWHERE = Span(Source("", ""), 0, 0)


def expression(text: str) -> nodes.Expression:
    (item,) = parse(f"let x = {text}").items
    assert isinstance(item, nodes.Definition)
    return item.body


def messages(text: str) -> list[str]:
    return [diagnostic.message for diagnostic in parse_partial(Source("<text>", text))[1]]


def cases(path: Path) -> list[pytest.ParameterSet]:
    """Cases of a fixture: input and expectation, a line `----` between them, a line `====` between cases."""
    blocks = path.read_text().split("\n====\n")
    return [
        pytest.param(*block.strip("\n").split("\n----\n"), id=f"{path.stem}-{i}")
        for i, block in enumerate(blocks)
    ]


def test_grammar_is_strictly_lalr() -> None:
    Lark(
        files("attndsl.grammar").joinpath("attn.lark").read_text(), start="module", parser="lalr", strict=True
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [case for path in sorted((FIXTURES / "format").glob("*.attn")) for case in cases(path)],
)
def test_format_fixture(text: str, expected: str) -> None:
    assert format(text).rstrip("\n") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [case for path in sorted((FIXTURES / "syntax").glob("*.txt")) for case in cases(path)],
)
def test_diagnostics_fixture(text: str, expected: str) -> None:
    with pytest.raises(AttnError) as error:
        parse(text, "t.attn")
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a or b and not c == d", "a or (b and (not (c == d)))"),
        ("a in b..c", "a in (b..c)"),
        ("a | b & c..d | e", "(a | (b & c))..(d | e)"),
        ("a & b + c", "a & (b + c)"),
        ("a + b - c + d + e", "((a + b) - c) + d + e"),
        ("a - b - c", "(a - b) - c"),
        ("a * b / c // d mod e @ f", "((((a * b) / c) // d) mod e) @ f"),
        ("-a * b", "(-a) * b"),
        ("-a ** b", "-(a ** b)"),
        ("a ** b ** c", "a ** (b ** c)"),
        ("a ** -b", "a ** (-b)"),
        ("~a & b", "(~a) & b"),
        ("-f(x)[i]", "-((f(x))[i])"),
        ("|a - b| | |c|", "(|(a - b)|) | (|c|)"),
        ("||a| - b|", "|(|a|) - b|"),
        ("|q-k|>=3", "(|q - k|) >= 3"),
        ("k modl", None),
        ("[0, 5..9, n - 1]", "[0, (5..9), (n - 1)]"),
        ("0..3", "(0)..(3)"),
    ],
)
def test_precedence(text: str, same: str | None) -> None:
    if same is None:
        with pytest.raises(AttnError, match="side by side"):
            expression(text)
    else:
        assert expression(text) == expression(same)


def test_flat_and_chained_nodes() -> None:
    a, b, c = (nodes.Name(x, span=NOWHERE) for x in "abc")
    assert expression("a | b | c") == nodes.Nary("|", (a, b, c), span=NOWHERE)
    assert expression("(a | b) | c") != expression("a | b | c")
    for text in ("a - b + c", "(a + b) + c", "a + b - c", "a - (b - c)", "a * b @ c", "(-1) ** 2", "-1 ** 2"):
        assert render(expression(text)) == text
    assert expression("a < b in c") == nodes.Compare(("<", "in"), (a, b, c), span=NOWHERE)
    assert expression("1e-5") == nodes.Number(1e-5, span=NOWHERE)
    (item,) = parse("assert density(x) < 7%").items
    assert isinstance(item, nodes.Assert)
    assert isinstance(item.expr, nodes.Compare)
    assert item.expr.args[1] == nodes.Number(0.07, percent=True, span=NOWHERE)


def test_spans_hold_their_parentheses() -> None:
    body = expression("((a) + b) * f(c)[d]")
    assert isinstance(body, nodes.Binary)
    assert body.span.text == "((a) + b) * f(c)[d]"
    assert body.left.span.text == "((a) + b)"
    assert body.right.span.text == "f(c)[d]"


def test_doc_is_the_last_run_of_lines_above() -> None:
    text = "## of the file\n\n## one\n##  two\n# not this\nlet a = 1  ## nor this\nlet b = 2\n"
    assert [item.doc for item in parse(text).items if isinstance(item, nodes.Definition)] == ["one\ntwo", ""]


def test_clause_words_are_names() -> None:
    for word in set(CLAUSES) - set(DEFINITIONS):
        parse(f"let {word}({word}) = {word} + {word}({word} = 1)")
        parse(f"attention {word}({word}) {{ inputs {word} : int[{word}]  mask {word}  decay {word}[q] }}")
    for word in (*DEFINITIONS, "or", "and", "not", "in", "mod", "else"):
        for text in (f"let {word} = 1", f"let f({word}) = 1", f"let f = g({word} = 1)", f"let a = {word}"):
            assert messages(text), text


def test_line_ends_tabs_and_byte_order_mark() -> None:
    assert parse("\ufeff" + SAMPLES.replace("\n", "\r\n").replace("  ", "\t")) == parse(
        SAMPLES.replace("  ", "\t")
    )
    assert parse(SAMPLES.replace("\n", "\r\n")).items == parse(SAMPLES).items


def test_one_mistake_costs_one_definition() -> None:
    for i, broken in enumerate(DEFINITION):
        before, after = DEFINITION[max(i - 2, 0) : i], DEFINITION[i + 1 : i + 3]
        head = re.sub(r"[(){}\[\]|]", "", broken.split("=")[0].split("{")[0])
        text = "".join([*before, head, " ** \n", *after])
        module, diagnostics = parse_partial(Source("<text>", text))
        assert len(diagnostics) == 1
        good = parse("".join([*before, *after])).items
        assert [item.span.text for item in module.items] == [item.span.text for item in good]


@pytest.mark.parametrize("missing", ["}", ")", "]"])
def test_unclosed_bracket_points_to_the_opening_and_stops_at_the_next_definition(missing: str) -> None:
    text = "attention x { mask f([0, 1]) }\nlet a = 1\nscore b = s\n"
    module, (diagnostic,) = parse_partial(Source("<text>", text.replace(missing, "", 1)))
    assert diagnostic.span
    assert diagnostic.span.text == {"}": "{", ")": "(", "]": "["}[missing]
    assert [item.name for item in module.items if isinstance(item, nodes.Definition)] == ["a", "b"]


@pytest.mark.parametrize("text", DEFINITION)
def test_comments_survive_in_every_gap(text: str) -> None:
    (chunk,) = (chunk for chunk in chunks(Source("", text)) if chunk.item)
    module = parse(text)
    for position, token in enumerate(chunk.tokens[1:]):
        comment = ("# c", "## c")[position % 2]
        assert token.start_pos is not None
        cut = chunk.start + token.start_pos
        gaps = f" {comment} 1\n", f"\n{comment} 1\n\n {comment} 2\n", f" {comment} 1\n {comment} 2\n"
        commented = text[:cut] + gaps[position % 3] + text[cut:]
        formatted = format(commented)
        assert parse(formatted) == module
        assert format(formatted) == formatted
        assert re.findall("#.*", formatted) == [line.rstrip() for line in re.findall("#.*", commented)]
        assert owners(formatted) == owners(commented)


def owners(text: str) -> list[tuple[int, bool]]:
    """How many characters other than spaces precede each comment, and whether it ends a line."""
    found = []
    for match in re.finditer("#.*", text):
        before = re.sub("#.*", "", text[: match.start()])
        found.append((len("".join(before.split())), bool(before.split("\n")[-1].strip())))
    return found


def test_format_of_the_samples_is_canonical() -> None:
    formatted = format(SAMPLES)
    assert parse(formatted) == parse(SAMPLES)
    assert format(formatted) == formatted
    assert format(format(SAMPLES.replace(" ", "  "))) == format(SAMPLES.replace(" ", "  "))
    for line in formatted.split("\n"):
        assert len(re.sub("  #.*", "", line)) <= 100


NAMES = st.sampled_from(["q", "k", "n", "causal", "mask", "sink", "modl", "f_1", "heads"])
COUNTS = st.integers(0, 2**63 - 1)
LEAVES = st.one_of(
    NAMES.map(lambda name: nodes.Name(name, span=NOWHERE)),
    COUNTS.map(lambda value: nodes.Number(value, span=NOWHERE)),
    st.floats(0, allow_infinity=False, allow_nan=False).map(
        lambda value: nodes.Number(abs(value), span=NOWHERE)
    ),
    st.text("ab #(", max_size=3).map(lambda value: nodes.Text(value, span=NOWHERE)),
)


def compound(inner: st.SearchStrategy[nodes.Expression]) -> st.SearchStrategy[nodes.Expression]:
    def node(
        kind: type[nodes.Node], *parts: st.SearchStrategy[object]
    ) -> st.SearchStrategy[nodes.Expression]:
        return st.builds(lambda *values: kind(*values, span=NOWHERE), *parts)  # type: ignore[arg-type,return-value]

    some = st.lists(inner, min_size=1, max_size=3).map(tuple)
    names = st.lists(NAMES.map(lambda name: nodes.Name(name, span=NOWHERE)), min_size=1, max_size=2).map(
        tuple
    )
    binary = node(nodes.Binary, st.sampled_from(["-", "*", "/", "//", "mod", "@", "**"]), inner, inner)
    chain = st.lists(
        st.tuples(st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "in"]), inner), min_size=1, max_size=2
    )
    argument = node(nodes.Argument, st.one_of(st.just(""), NAMES), inner)
    return st.one_of(
        node(nodes.Unary, st.sampled_from(["-", "~", "not"]), inner),
        binary,
        node(
            nodes.Nary,
            st.sampled_from(["|", "&", "+", "and", "or"]),
            st.lists(inner, min_size=2, max_size=3).map(tuple),
        ),
        st.builds(
            lambda first, rest: nodes.Compare(
                tuple(op for op, _ in rest), (first, *(arg for _, arg in rest)), span=NOWHERE
            ),
            inner,
            chain,
        ),
        node(nodes.Range, inner, inner),
        node(nodes.Abs, inner),
        node(nodes.SetList, st.lists(inner, max_size=3).map(tuple)),
        node(nodes.Call, inner, st.lists(argument, max_size=3).map(tuple)),
        node(nodes.Index, inner, some),
        node(nodes.Builder, st.lists(names, min_size=1, max_size=2).map(tuple), inner),
    )


@settings(STEADY, max_examples=150)
@given(st.recursive(LEAVES, compound, max_leaves=25))
def test_render_is_the_inverse_of_parse(tree: nodes.Expression) -> None:
    text = f"let x = {render(tree)}"
    assert expression(render(tree)) == tree
    formatted = format(text)
    assert parse(formatted) == parse(text)
    assert format(formatted) == formatted
    assert all(len(line) <= 100 for line in formatted.split("\n")) or len(text) > 100


@settings(STEADY, max_examples=100)
@given(st.recursive(LEAVES, compound, max_leaves=8))
def test_render_writes_no_needless_parentheses(tree: nodes.Expression) -> None:
    text = render(tree)
    for opening in re.finditer(r"\(", text):
        depth, end = 0, opening.start()
        for end in range(opening.start(), len(text)):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            if depth == 0:
                break
        bare = text[: opening.start()] + " " + text[opening.end() : end] + " " + text[end + 1 :]
        if '"' not in text and not messages(f"let x = {bare}"):
            assert expression(bare) != tree


SOUP = st.sampled_from(
    re.split(
        " ",
        "pattern score let attention assert use mask inputs heads else norm offset decay keys "
        "or and not in mod x q 1 0.5 7% "
        "99999999999999999999 1e999 ( ) [ ] { } | & + - * / // ** @ ~ == = != < <= > >= .. ... "
        ", : ; . ! ? % ^ && || => "
        '"a" " # ## \n \t \r \0 \ufeff \u00e9 \u2264 \U0001f600 \x1b \\ \' $ `',
    )
)


def never_crashes(text: str) -> None:
    module, diagnostics = parse_partial(Source("<text>", text))
    for diagnostic in diagnostics:
        assert str(diagnostic).isprintable() or "\n" in str(diagnostic)
        assert diagnostic.span is None or 0 <= diagnostic.span.start <= diagnostic.span.end <= len(text)
    if diagnostics:
        with pytest.raises(AttnError):
            format(text)
    else:
        formatted = format(text)
        assert parse(formatted) == module
        assert format(formatted) == formatted


@settings(STEADY, max_examples=120)
@given(st.lists(SOUP, max_size=25), st.sampled_from(["", " "]))
def test_token_soup(words: list[str], glue: str) -> None:
    never_crashes(glue.join(words))
    never_crashes("attention a { mask x " + glue.join(words))
    never_crashes("let x = " + glue.join(words))


@settings(STEADY, max_examples=120)
@given(st.data())
def test_mutations_of_programs(data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(DEFINITION), min_size=1, max_size=2)))
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(text)))
        end = min(len(text), begin + data.draw(st.integers(0, 6)))
        text = (
            text[:begin] + data.draw(st.one_of(st.just(""), SOUP, st.sampled_from(DEFINITION))) + text[end:]
        )
    never_crashes(text)


N = 20_000
BOMBS = {
    **{f"nested {c}": ("let a = " + c * N, "levels") for c in "([{"},
    "nested and closed": ("let a = " + "(" * N + "1" + ")" * N, "levels"),
    "mixed closers": ("let a = " + "(" * N + "]" * N, "levels"),
    "calls": ("let a = " + "f(" * N + "1" + ")" * N, "levels"),
    "minus": ("let a = " + "- " * 10 * N + "1", "levels"),
    "not": ("let a = " + "not " * 10 * N + "1", "levels"),
    "tilde": ("let a = " + "~" * 10 * N + "1", "levels"),
    "bars": ("let a = " + "|-" * N + "1", "levels"),
    "power": ("let a = " + "2 ** " * N + "1", "levels"),
    "differences": ("let a = 0" + " - 1" * 10_000, "levels"),
    "long": ("let a = 0" + " - 1" * (TEXT_LIMIT // 4 - 4), "100000 words"),
    "look-ups": ("let a = t" + "[0]" * N, "levels"),
    "alternating": ("let a = 0" + " - 1 + 1" * 10_000, "levels"),
    "integer": ("let a = " + "9" * N, "64 bits"),
    "percentage": ("assert a < " + "9" * N + "%", "1.8e308"),
    "text": ("x" * (TEXT_LIMIT + 1), f"the limit is {TEXT_LIMIT}"),
    "words": ("let " * (TEXT_LIMIT // 4), "reserved word"),
    "lines of words": ("let\n" * (TEXT_LIMIT // 4), f"stopped after {ERROR_LIMIT} errors"),
    "bodies": ("let a = b c " * (TEXT_LIMIT // 12), f"stopped after {ERROR_LIMIT} errors"),
    "quotes": ('"' * (TEXT_LIMIT - 1), "never closed"),
    "unclosed": ("let a = (\n" * (TEXT_LIMIT // 10), f"stopped after {ERROR_LIMIT} errors"),
}


@pytest.mark.parametrize(("text", "limit"), BOMBS.values(), ids=BOMBS.keys())
def test_bombs_name_their_limit(text: str, limit: str) -> None:
    start = time.process_time()
    with pytest.raises(AttnError) as error:
        parse(text)
    assert limit in str(error.value)
    assert time.process_time() - start < 5


def test_limits_are_not_hit_below_them() -> None:
    depth = NESTING_LIMIT - 1
    parse("let a = " + "(" * NESTING_LIMIT + "1" + ")" * NESTING_LIMIT)
    for text in (
        "- " * depth + "1",
        "not " * depth + "1",
        "2 ** " * depth + "1",
        "1" + " - 1" * depth,
        "f" + "(x)" * depth,
    ):
        assert render(expression(text))
        assert messages("let a = (" + text + ") - 1" if text[0] != "n" else "let a = not not " + text)
    for op in ("|", "&", "+", " or ", " and "):
        tree = expression(op.join(["x"] * 3_000))
        assert isinstance(tree, nodes.Nary)
        assert len(tree.args) == 3_000
        hash(tree), repr(tree), render(tree)
    expression(str(2**63 - 1))


def test_many_definitions() -> None:
    text = "\n".join(f"pattern p{i} = causal" for i in range(10_000))
    start = time.process_time()
    assert len(parse(text).items) == 10_000
    assert time.process_time() - start < 2.5
