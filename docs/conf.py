"""What Sphinx reads: the site is README.md, docs/, CONTRIBUTING.md, CHANGELOG.md one page an example."""

from __future__ import annotations

import re
import shutil
import sys
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pygments.lexers.special import TextLexer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import docstrings  # noqa: E402
import gallery  # noqa: E402

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project, version, author, copyright = "attndsl", version_of("attndsl"), "", ""
extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["*.md", "docs/**"]
exclude_patterns = [".*", "build", "examples", "attndsl", "plugins", "tests", "benchmarks", "grammar"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 90
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "attndsl"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False

NAVIGATION = {
    "Use": ["strings", "modules", "decoding", "packed", "flex", "torch", "refused"],
    "The language": ["language", "selections", "streams", "sums", "stacks", "gallery/index"],
    "Reference": ["api", "analysis"],
    "The project": ["/CONTRIBUTING", "/CHANGELOG"],
}
"""The pages in the order of the side bar; what is named nowhere stands with the reference."""
NAMED = {name for names in NAVIGATION.values() for name in names}
NAVIGATION["Reference"] += sorted({path.stem for path in HERE.glob("*.md")} - NAMED)
MADE = [
    (r"(?:\.\./)?examples/(\w+)\.attn", r"gallery/\1.md"),
    (r"(?:\.\./)?examples/([\w-]+)", r"gallery/\1.md"),
    (r"(?:\.\./)?examples", "gallery/index.md"),
    (r"(?:\.\./)?grammar/prelude\.attn", "gallery/prelude.md"),
]
"""Links to files that have a page on the site."""


def linked(app: Sphinx, page: str, text: list[str]) -> None:
    """The text of a page with links that lead to pages, and with the side bar on the first."""
    folder = "docs/" if "/" not in page else ""
    for file, target in MADE:
        text[0] = re.sub(rf"(?<=\]\(){file}(?=\))", folder + target, text[0])
    if page == root_doc:
        for caption, names in NAVIGATION.items():
            entries = "\n".join(name if name[0] == "/" else f"docs/{name}" for name in names)
            text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def first_page(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")


def setup(app: Sphinx) -> dict[str, Any]:
    for kind in ("show", "prelude"):
        app.add_lexer(kind, TextLexer)
    app.connect("builder-inited", lambda app: gallery.write(HERE / "gallery"))
    app.connect("source-read", linked)
    app.connect("autodoc-process-docstring", docstrings.processed)
    app.connect("autodoc-process-signature", docstrings.unsigned)
    app.connect("build-finished", first_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
