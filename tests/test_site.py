"""What `make docs` builds: the lexer of its programs, and the site without a warning or a dead link."""

import re
import subprocess
import sys
from html import unescape
from importlib.util import find_spec
from urllib.parse import unquote

import pytest
from pygments.lexers import get_lexer_by_name, get_lexer_for_filename
from pygments.token import Comment, Error, Keyword, Name
from test_docs import PROGRAMS
from test_repository import ROOT

from attndsl.highlight import AttnLexer
from attndsl.program import prelude
from attndsl.syntax.tokens import CLAUSES, DEFINITIONS

FILES = sorted([*ROOT.glob("examples/**/*.attn"), *ROOT.glob("grammar/*.attn")])
TEXTS = [path.read_text(encoding="utf-8") for path in FILES] + [text for _, text in PROGRAMS]


def test_pygments_finds_the_lexer():
    assert isinstance(get_lexer_by_name("attn"), AttnLexer)
    assert isinstance(get_lexer_for_filename("mask.attn"), AttnLexer)


@pytest.mark.parametrize("text", TEXTS)
def test_every_program_is_lexed_whole(text):
    found = [*AttnLexer(stripnl=False, ensurenl=False).get_tokens(text)]
    assert "".join(word for _, word in found) == text
    assert Error not in {kind for kind, _ in found}


def test_words_are_told_apart():
    for word in (*DEFINITIONS, *CLAUSES, "else", "heads"):
        ((kind, _), *_) = AttnLexer().get_tokens(word)
        assert kind in Keyword
    found = [*AttnLexer().get_tokens("## of it\nattention lm { mask $ causal }")]
    assert (Comment.Special, "## of it") in found
    assert (Name.Function, "lm") in found
    assert (Error, "$") in found
    assert (Name, "causal") in found
    assert "causal" in prelude()


def links(page):
    """Files and anchors that a page of the site leads to."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', text):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = unquote(unescape(target)).partition("#")
            file = file.partition("?")[0]
            yield (page.parent / file).resolve() if file else page, anchor


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("sphinx") is None, reason="needs the extra `docs`")
def test_the_site_is_whole(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--quiet",
        "--conf-dir",
        "docs",
        ".",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    made = {path.stem for path in (tmp_path / "docs" / "gallery").glob("*.html")}
    assert {path.stem for path in ROOT.glob("examples/*.attn")} <= made
    assert (tmp_path / "index.html") in pages
    for page in pages:
        for file, anchor in links(page):
            assert file.exists(), (page.name, file)
            assert not anchor or f'id="{anchor}"' in file.read_text(encoding="utf-8"), (page.name, anchor)
