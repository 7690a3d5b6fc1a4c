"""What docs/ shows is so: its programs, pictures, limits, links and the list of the prelude."""

import re
import shlex
import textwrap

import pytest
from click.testing import CliRunner
from test_repository import ROOT

import attndsl
from attndsl import expr, program
from attndsl.analysis.report import usable
from attndsl.command.cli import main
from attndsl.language import elaborate
from attndsl.language.arguments import signature
from attndsl.layers import powers, reach
from attndsl.meaning import links
from attndsl.program import prelude
from attndsl.relations import relation
from attndsl.syntax.format import render
from attndsl.syntax.parse import ERROR_LIMIT, LONG, MISTAKES, NESTING_LIMIT, SIZE_LIMIT, TEXT_LIMIT
from attndsl.tiles import lowering, tiling

DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
FENCED = re.compile(r"^```(\w+)(.*)\n((?:(?!```).*\n)*)```$", re.M)
BLOCKS = [(name, *block) for name, text in DOCS.items() for block in FENCED.findall(text)]
PROGRAMS = [(name, text) for name, kind, _, text in BLOCKS if kind == "attn"]
LIMITS = {
    "characters of a text": TEXT_LIMIT,
    "words and signs of a definition": SIZE_LIMIT,
    "levels of brackets and operators": NESTING_LIMIT,
    "errors reported in one run": ERROR_LIMIT,
    "errors reported of one definition": MISTAKES,
    "characters of a definition of which more than one error is": LONG,
    "files of a program": program.FILE_LIMIT,
    "definitions of a program": program.DEFINITION_LIMIT,
    "definitions inside one another": elaborate.CALL_DEPTH,
    "steps to write a program out": elaborate.STEP_LIMIT,
    "operations inside one another, written out": expr.DEPTH_LIMIT,
    "entries of a list that is looked up": expr.ENTRY_LIMIT,
    "length of a sequence": lowering.LENGTH_LIMIT,
    "tiles along a side": 2**tiling.COLUMN_BITS,
    "different partial tiles": tiling.CONTENT_LIMIT,
    "different boxes of one size above the tiles": tiling.BOX_LIMIT,
    "pairs times n, for a product that is no integer relation": tiling.POINT_LIMIT,
    "keys that `random` draws for a query, if not all": links.KEYS_LIMIT,
    "keys that `random` draws together": links.DRAWN_LIMIT,
    "length up to which any diameter is measured": powers.DENSE_LENGTH,
    "distances that `reach` writes out": reach.LONGEST,
    "conjunctions of one relation, in a proof (else undecided)": relation.DISJUNCTS,
    "roundings of one conjunction, in a proof (else undecided)": relation.DIVISIONS,
    "pieces of one number, in a proof (else undecided)": relation.PIECES,
    "operations of the integer set library, in a proof (else undecided)": relation.OPERATIONS,
}


def listed_prelude():
    """Every definition with its `##` text, or with its body where it has none."""
    rows = [
        (item.word, signature(item), " ".join((item.doc or f"= {render(item.body)}").split()))
        for item in prelude().values()
    ]
    margin = max(len(name) for _, name, _ in rows) + 4
    lines = []
    for word in ("pattern", "let", "score"):
        lines.append(word)
        for _, name, text in (row for row in rows if row[0] == word):
            first, *others = textwrap.wrap(text, 110 - margin, break_on_hyphens=False)
            lines.append(f"  {name:{margin - 2}}{first}")
            lines += [" " * margin + line for line in others]
    return "\n".join(lines) + "\n"


def pictures():
    """Each picture with the program that stands before it and the arguments of `show`."""
    found, source = [], ""
    for _, kind, arguments, text in BLOCKS:
        if kind == "attn":
            source = text
        elif kind == "show":
            found.append(pytest.param(source, shlex.split(arguments), text, id=arguments.strip()))
    return found


@pytest.mark.parametrize(("name", "text"), PROGRAMS)
def test_programs_mean_something_and_claim_nothing_false(name, text):
    found = attndsl.parse(text, name)
    assert found.names or found.assertions
    assert {verdict.status for _, verdict in found.check()} <= {"proved"}


@pytest.mark.parametrize(("source", "arguments", "picture"), pictures())
def test_pictures_are_what_show_prints(source, arguments, picture, tmp_path):
    file = tmp_path / "page.attn"
    file.write_text(source, encoding="utf-8")
    done = CliRunner().invoke(main, ["show", str(file), *arguments])
    assert done.exit_code == 0, done.output
    assert done.stdout == picture


def test_the_list_of_the_prelude_is_what_the_prelude_says():
    (shown,) = (text for _, kind, _, text in BLOCKS if kind == "prelude")
    assert shown == listed_prelude()


def test_the_limits_are_those_of_the_code():
    section = DOCS["language.md"].partition("\n## Limits\n")[2].partition("\n## ")[0]
    assert dict(re.findall(r"^\| (.+?) \| ([\d,]+) \|$", section, re.M)) == {
        what: f"{limit:,}" for what, limit in LIMITS.items()
    }


def test_every_part_and_field_of_a_report_is_described():
    headings = " ".join(re.findall(r"^## (.*)$", DOCS["analysis.md"], re.M))
    for name, part in usable().items():
        assert re.search(rf"\b{name}\b", headings)
        assert [field for field in part.names(name) if f"`{field}" not in DOCS["analysis.md"]] in ([], [name])


def test_the_code_about_choices_runs():
    (code,) = (text for name, kind, _, text in BLOCKS if kind == "python" and "plan.choices" in text)
    exec(code, {})


def test_the_code_about_streams_runs():
    (code,) = (text for name, kind, _, text in BLOCKS if (name, kind) == ("streams.md", "python"))
    exec(code, {})


def test_the_code_about_sums_runs():
    codes = [text for name, kind, _, text in BLOCKS if (name, kind) == ("sums.md", "python")]
    assert len(codes) == 2
    for code in codes:
        exec(code, {})


@pytest.mark.parametrize("name", DOCS)
def test_links_inside_the_repository_lead_somewhere(name):
    text = re.sub(r"`[^`\n]+`", "code", FENCED.sub("", DOCS[name]))
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-")
        for line in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            assert (ROOT / "docs" / target).exists()
