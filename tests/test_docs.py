"""What README, CONTRIBUTING and docs/ show is so: programs, code, commands, pictures, messages, limits."""

import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import tomllib

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
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")} | DOCS
FENCED = re.compile(r"^```([\w-]*)(.*)\n((?:(?!```).*\n)*)```$", re.M)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
BLOCKS = [(name, *block) for name, text in PAGES.items() for block in FENCED.findall(text)]
PROGRAMS = [(name, text) for name, kind, _, text in BLOCKS if kind == "attn"]
NOT_RUN = "not run: "
"""Begins, behind the language of a block, the reason why it is not run."""
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


@pytest.mark.parametrize("name", sorted({name for name, kind, *_ in BLOCKS if kind == "python"}))
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_code_runs(name, monkeypatch):
    """Block after block, as a reader would who goes through the page."""
    monkeypatch.chdir(ROOT)
    page = {"__name__": name}
    for of, kind, why, code in BLOCKS:
        if (of, kind) == (name, "python") and not why.strip().startswith(NOT_RUN):
            exec(compile(code, name, "exec"), page)


def test_every_block_is_of_a_kind_that_is_tested():
    kinds = {(name, kind) for name, kind, *_ in BLOCKS}
    assert {kind for _, kind in kinds if kind} <= {
        "python",
        "attn",
        "show",
        "prelude",
        "console",
        "toml",
        "text",
    }
    assert {name for name, kind in kinds if not kind} == {"api.md"}  # what Sphinx fills in
    assert {name for name, kind in kinds if kind == "text"} == {"language.md"}  # the clauses, as a sketch
    unrun = [why.strip().removeprefix(NOT_RUN) for *_, why, _ in BLOCKS if NOT_RUN in why]
    assert all(unrun)
    assert len(unrun) <= 3


def commands():
    """Lines of commands, and what is shown below; a line `...` stands for any others."""
    for name, kind, _, text in BLOCKS:
        if kind == "console":
            for shown in re.split(r"^\$ ", text, flags=re.M)[1:]:
                line, _, output = shown.partition("\n")
                yield name, line, output
    for name, text in PAGES.items():
        for block in INDENTED.findall(FENCED.sub("", text)):
            for line in block.strip("\n").split("\n"):
                yield name, re.split(r" {2,}", line.strip())[0], ""


COMMANDS = [*commands()]
PAIR = [(f"{name}.attn", "attention lm { mask causal & last(64) }") for name in "ab"]
FAST = ("check", "show", "fmt")
OURS = [
    pytest.param(line, shown, id=line, marks=[pytest.mark.slow] * (line.split()[1] not in FAST))
    for _, line, shown in COMMANDS
    if line.startswith("attndsl ")
]


def matches(output, shown):
    wanted = "".join(
        r"(?:.*\n)*" if line.strip() == "..." else re.escape(line) + "\n" for line in shown.splitlines()
    )
    return re.fullmatch(wanted, re.sub(r" +$", "", output, flags=re.M))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("line", "shown"), OURS)
def test_commands_run(line, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for file, text in [(of.strip(), text) for _, kind, of, text in BLOCKS if kind == "attn" and of] + PAIR:
        (tmp_path / file).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", *shlex.split(line)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout
    assert not shown or matches(done.stdout, shown), done.stdout


def test_other_commands_are_there():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for _, line, _ in COMMANDS:
        word, *rest = line.split()
        if word == "make":
            assert rest[0] in targets
        elif word == "attention":
            assert attndsl.parse(line).names
        else:
            assert word in ("attndsl", "pip") or (ROOT / word).exists()


@pytest.mark.parametrize("text", [text for _, kind, _, text in BLOCKS if kind == "toml"])
def test_tables_are_toml(text):
    assert tomllib.loads(text)


def test_refusals_are_raised_as_they_are_shown():
    """After another message: python docs/refused.py"""
    assert runpy.run_path(str(ROOT / "docs" / "refused.py"))["page"]() == DOCS["refused.md"]


@pytest.mark.parametrize("name", PAGES)
def test_links_inside_the_repository_lead_somewhere(name):
    text = re.sub(r"`[^`\n]+`", "code", FENCED.sub("", PAGES[name]))
    folder = ROOT / "docs" if name in DOCS else ROOT
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target:
            file, _, heading = target.partition("#")
            assert (folder / file).exists()
            if heading:
                assert heading in headings((folder / (file or name)).read_text(encoding="utf-8"))


def headings(text):
    """As they are named in links."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}
