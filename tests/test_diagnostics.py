"""Malformed programs and calls against the exact diagnostics they must get: fixtures/diagnostics/README."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest

import attndsl
from attndsl.errors import Diagnostic
from attndsl.language.idle import idle_parts, looked

FOLDER = Path(__file__).parent / "fixtures" / "diagnostics"


@dataclass(frozen=True)
class Fixture:
    kind: str
    input: str
    files: dict[str, str]
    python: str
    expect: str


def read(path: Path) -> list[Fixture]:
    fixtures = []
    for block in re.split(r"^=== kind: ", path.read_text(), flags=re.MULTILINE)[1:]:
        kind, *sections = re.split(r"^--- (.+)\n", block, flags=re.MULTILINE)
        parts = dict(zip(sections[::2], sections[1::2], strict=True))
        files = {name[5:]: text for name, text in parts.items() if name.startswith("file ")}
        fixture = Fixture(
            kind.strip(), parts.get("input", ""), files, parts.get("python", ""), parts["expect"].strip()
        )
        fixtures.append(fixture)
    return fixtures


def cases(*stems: str) -> list[object]:
    return [
        pytest.param(fixture, id=f"{stem}-{number}-{fixture.kind.replace(' ', '_')}")
        for stem in stems
        for number, fixture in enumerate(read(FOLDER / f"{stem}.txt"), 1)
    ]


STATIC = sorted({path.stem for path in FOLDER.glob("*.txt")} - {"api", "warnings"})


def problems(text: str) -> tuple[Diagnostic, ...]:
    """Those of a text that is refused, none of one that is legal."""
    try:
        attndsl.parse(text, name="test.attn")
    except attndsl.AttnError as error:
        return error.diagnostics
    return ()


@pytest.mark.parametrize("fixture", cases(*STATIC))
def test_errors(fixture: Fixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"test.attn": fixture.input, **fixture.files}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(attndsl.AttnError) as caught:
        attndsl.load("test.attn")
    assert str(caught.value) == fixture.expect


PIECES = (
    *("causal", "last", "last(4)", "alibi", "slope(h)", "documents", "band", "blocks"),
    *("doc", "doc[q]", "z[q, k]"),
    *("q", "k", "h", "n", "D", "s", "Q", "0", "-1", "2.5", "[0]", "0..3", "50%", "learn[H](0.1)", "softmax"),
    *("{ q, k : q >= k }", "{ p : p < 4 }", "{ (y, x), (v, u) : y == v }", "random(2)", "causal[q, k]"),
    *("&", "|", "-", "+", "*", "/", "//", "mod", "@", "**", "and", "==", "<=", "in", ".."),
)
"""What mutations put in place of a token."""


@pytest.mark.parametrize("stem", [stem for stem in STATIC if stem != "uses"])
def test_mutations_are_legal_or_refused_where_they_were_written(stem: str) -> None:
    """No other exception, no error without a place, and none placed in the prelude."""
    rng = random.Random(stem)
    for fixture in read(FOLDER / f"{stem}.txt"):
        tokens = re.findall(r"\w+|\s+|\S", fixture.input)
        for _ in range(6):
            mutated = list(tokens)
            mutated[rng.randrange(len(tokens))] = rng.choice(PIECES)
            for diagnostic in problems("".join(mutated)):
                assert diagnostic.span is not None, (diagnostic, mutated)
                assert diagnostic.span.source.name == "test.attn", (diagnostic, mutated)


EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.attn"))
SIGNS = (
    *(
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        ":",
        "=",
        ",",
        ";",
        ".",
        "..",
        "//",
        "#",
        '"',
        "&&",
        "|",
        "\n",
        "@",
        "%",
        "\\",
    ),
    *(
        " let ",
        " mask ",
        " score ",
        "attention",
        "heads ",
        "inputs ",
        "keys ",
        " else ",
        "use ",
        "0:4",
        "1.",
        "x y",
    ),
)


@pytest.mark.parametrize("seed", range(3))
def test_examples_while_they_are_edited_are_legal_or_refused_where_they_were_written(seed: int) -> None:
    """Characters deleted, put in, turned round and doubled, ends cut off: as in an editor."""
    rng = random.Random(seed)
    for _ in range(100):
        text = rng.choice(EXAMPLES).read_text()
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(text) + 1)
            end = min(len(text), start + rng.randint(1, 12))
            text = rng.choice(
                (
                    text[:start] + text[end:],
                    text[:start] + rng.choice(SIGNS) + text[start:],
                    text[:start] + rng.choice(SIGNS) + text[end:],
                    text[:start] + text[start:end][::-1] + text[end:],
                    text[:end] + text[start:],
                    text[:start],
                )
            )
        for diagnostic in problems(text):
            assert diagnostic.span is not None, (diagnostic, text)
            assert diagnostic.span.source.name == "test.attn", (diagnostic, text)
            code = re.findall(r"`[^`]*`", f"{diagnostic.message} {diagnostic.help}")
            assert all(piece in diagnostic.shown(40) for piece in code), diagnostic


def test_what_a_terminal_shows_is_as_wide_as_it_and_breaks_no_code() -> None:
    told = Diagnostic(
        "refused `a b c`, and no less " * 8, None, "write `where(condition, a, b)` instead " * 6
    )
    for width in (50, 80, 120):
        shown = told.shown(width)
        assert max(map(len, shown.split("\n"))) <= width
        assert shown.count("`where(condition, a, b)`") == 6
        assert " ".join(shown.split()) == " ".join(str(told).split())


@pytest.mark.parametrize("fixture", cases("warnings"))
def test_warnings(fixture: Fixture) -> None:
    program = attndsl.parse(fixture.input, name="test.attn")
    assert "\n\n".join(map(str, program.warnings)) == fixture.expect


CONDITIONS = (
    *(
        "k <= q",
        "q < k",
        "k - q in 0..3",
        "q - k == 2",
        "k == n",
        "k == q - 9",
        "q mod 3 == 3",
        "k mod 4 == 1",
    ),
    *(
        "k < q // 2",
        "q + k < 0",
        "n < 3",
        "h == 1",
        "h >= H",
        "|q - k| < 0",
        "k in [1, 4]",
        "k * 2 == q * 2 + 1",
    ),
)


def written(rng: random.Random, depth: int) -> str:
    """A pattern at random, whose parts may relate nothing."""

    def condition(depth: int) -> str:
        form = rng.choice(("{} and {}", "{} or {}", "not {}", "")) if depth else ""
        return (
            "(" + form.format(condition(depth - 1), condition(depth - 1)) + ")"
            if form
            else rng.choice(CONDITIONS)
        )

    forms = ("{} & {}", "{} | {}", "{} - {}", "~{}", "{} @ {}", "blocks(2, {})", "shift(1, {})", "T({})", "")
    form = rng.choice(forms) if depth else ""
    return (
        f"({form.format(written(rng, depth - 1), written(rng, depth - 1))})"
        if form
        else f"{{ q, k : {condition(2)} }}"
    )


@pytest.mark.parametrize("seed", range(60))
def test_parts_that_relate_nothing_may_be_left_out(seed: int) -> None:
    """In their place stands what is never true, and the mask is the same at every length and head."""
    text = f"pattern p = {written(random.Random(seed), 3)}"
    program = attndsl.parse(text)
    definition = program.own["p"]
    told = idle_parts(definition.body, looked(program.elaborator, ()))
    for found in (found for found in told if found.message == "no pair satisfies this"):
        start, end = found.span.start, found.span.end
        for false in ("none", "(0 == 1)"):
            replaced = text[:start] + false + text[end:]
            if not problems(replaced):
                other = attndsl.parse(replaced)["p"]
                assert all(
                    (program["p"].mask(n, heads=3) == other.mask(n, heads=3)).all() for n in range(1, 8)
                )
                break
        else:
            raise AssertionError(found)
    if not told:
        assert program["p"].mask(40, heads=3).any()


@pytest.mark.parametrize("fixture", cases("api"))
def test_calls(fixture: Fixture) -> None:
    """The last line of the snippet raises; `…` in the expected text stands for anything on its line."""
    torch = pytest.importorskip("torch")
    names = {
        "attndsl": attndsl,
        "numpy": numpy,
        "torch": torch,
        "zeros": torch.zeros,
        "program": attndsl.parse(fixture.input, name="test.attn"),
    }
    *before, last = fixture.python.strip().split("\n")
    exec("\n".join(before), names)
    with pytest.raises(attndsl.AttnError) as caught:
        exec(last, names)
    expected = re.escape(fixture.expect).replace("…", ".+")
    assert re.fullmatch(expected, str(caught.value)), str(caught.value)
