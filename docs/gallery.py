"""Pages of the site that are made of other files: one for each example, with its picture, and one of all.

`make docs` writes them to docs/gallery/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import attndsl
from attndsl import pictures
from attndsl.analysis import units
from attndsl.analysis.report import Report
from attndsl.command.given import heads_of, title
from attndsl.command.show import chosen, drawable

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
LENGTH = 4096


@dataclass(frozen=True)
class Shown:
    """On what an example is drawn: a length, other parameters than the published, and tables."""

    length: int = LENGTH
    parameters: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    said: str = ""


def normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


CUBES = [[[[i, (5 * i + 3) % 16, (7 * i + 9) % 16] for i in range(16)]]]
DOCUMENTS = np.repeat(np.arange(5), [150, 60, 110, 32, 160])
SHOWN = {
    "adaptive_span": Shown(32_768),
    "block_diffusion": Shown(2048),
    "blockbert": Shown(512),
    "compressive": Shown(768),
    "dsa": Shown(
        256,
        {"top": "32"},
        {"iq": normal(1, 256, 64, 128), "ik": normal(1, 256, 128), "w": normal(1, 256, 64)},
        "a random indexer",
    ),
    "flamingo": Shown(256, {}, {"lo": [0, 48, 96, 180], "hi": [48, 96, 180, 256]}, "four images"),
    "gemma2": Shown(16_384),
    "knn": Shown(2048),
    "left_padding": Shown(256, {}, {"pad": [70]}, "70 keys that are not there"),
    "llama4_chunked": Shown(32_768),
    "log_sparse": Shown(256),
    "memorizing": Shown(512, {"m": "1024", "w": "128"}),
    "mistral": Shown(16_384),
    "modernbert": Shown(1024),
    "natten2d": Shown(3136),
    "nsa": Shown(4096, {}, {"gate": normal(1, 1, 3, 4096)}),
    "packed": Shown(512, {}, {"doc": DOCUMENTS}, "five documents"),
    "paligemma": Shown(512, {}, {"prompt": [40]}, "a prompt of 40 tokens"),
    "prefix_lm": Shown(256, {}, {"prefix": [90]}, "a prefix of 90 tokens"),
    "quest": Shown(2048, {"top": "16"}),
    "routing": Shown(1024, {}, {"mu": normal(5, 48, 64)}, "random centres"),
    "shared_prefix": Shown(512, {}, {"doc": DOCUMENTS, "parent": [0, 0, 0, 3, 3]}, "5 documents"),
    "streaming_llm": Shown(8192),
    "vsa": Shown(1024, {}, {"chosen": CUBES}, "three cubes chosen for each"),
}


@dataclass(frozen=True)
class Example:
    """What a page says of an example."""

    file: str
    name: str
    source: str
    text: str
    cost: str
    drawing: pictures.Drawing | None


def source(text: str) -> str:
    """The publication that the first comment of an example begins with."""
    comment = " ".join(line.lstrip("# ") for line in text.split("\n\n")[0].splitlines() if line[:1] == "#")
    found = re.match(r".*?\b(?:19|20)\d\d\b.*?(?=: |(?<! al)\. |\.$|$)", comment)
    assert found, f"no publication in: {comment}"
    return found[0]


def example(path: Path) -> Example:
    text = path.read_text(encoding="utf-8")
    program, shown = attndsl.load(path), SHOWN.get(path.stem, Shown())
    name = program.default()
    bound = program[name](**shown.parameters) if shown.parameters else program[name]
    heads = heads_of(bound.attention, shown.tables, None)
    sizes = {"length": shown.length, "q_length": None, "heads": heads, "block_size": None}
    named = title(program, name, shown.parameters)
    drawing = None
    if bound.attention.approx is None:
        tables = {**shown.tables, **chosen(bound.attention, shown.tables, sizes)}
        tiles = drawable(bound.attention, tables, **sizes)
        alt = f"The mask of {named} at n = {shown.length:,}: queries down, keys across"
        drawing = pictures.drawn(lambda dark: pictures.mask(tiles, named, dark=dark), alt)
    report = attndsl.analyze(bound, length=shown.length, heads=heads, parts=["nnz", "cost"], **shown.tables)
    return Example(path.stem, name, source(text), text, cost(report, shown), drawing)


def cost(report: Report, shown: Shown) -> str:
    """A sentence about live pairs and operations."""
    said = [f"n = {report.length:,}" + (f", {units.count(report.heads)} heads" if report.heads > 1 else "")]
    said += [shown.said] if shown.said else []
    found = report.findings
    if "nnz" in found and report.nnz.value is not None:
        density = f", {units.percent(report.density)}" if report.density is not None else ""
        said.append(f"{report.nnz.value:,} live pairs{density}")
    if "nnz" in found and report.nnz.formula:
        said.append(f"`{report.nnz.formula}` for {report.nnz.valid_for.removeprefix('for ')}")
    if "cost" in found and report.flops is not None:
        said.append(f"{units.scaled(float(report.flops.forward), 'FLOP')} forward with 64 features a head")
    return "; ".join(said)


def picture(shown: Example, target: str = "") -> str:
    """Two images, of which a style shows one; a click on it leads to `target`."""
    if shown.drawing is None:
        return "*It has no weights of pairs to draw.*\n"
    leads = f":target: {target}\n" if target else ""
    return "".join(
        f"```{{image}} {shown.file}-{kind}.svg\n:class: only-{kind}\n:alt: {shown.drawing.alt}\n{leads}```\n"
        for kind in ("light", "dark")
    )


def page(shown: Example) -> str:
    at = SHOWN.get(shown.file, Shown())
    words = ["attndsl report", f"examples/{shown.file}.attn:{shown.name}", f"--length {at.length}"]
    words += [f"--set {name}={value}" for name, value in at.parameters.items()]
    words += [f"--input {name}={name}.npy" for name in at.tables]
    command = " ".join([*words, f"-o {shown.file}.html"])
    return (
        f"# {shown.file}\n\n{shown.source}.\n\n{picture(shown)}\n{shown.cost}.\n\n"
        f"```attn\n{shown.text}```\n\nAll that the analyzer says of it, on one page:\n\n    {command}\n"
    )


OVERVIEW = """# Gallery

The files of `examples/`, each from a publication: what it claims is proved, the published numbers are pinned,
and tests hold its mask to a definition in numpy. Pictures are of n = {length:,} where nothing else is said.

:::::{{container}} gallery
{cards}
:::::

## Packages

Distributions that add to attndsl:

{packages}

```{{toctree}}
:hidden:

{pages}
prelude
```
"""


def overview(shown: list[Example], packages: list[str]) -> str:
    """The page with all pictures."""
    cards = "\n".join(
        f"::::{{container}} card\n[{one.file}]({one.file}.md)\n\n"
        f"{picture(one, f'{one.file}.html')}\n{one.source}\n::::\n"
        for one in shown
    )
    listed = "\n".join(f"- [{name}]({name}.md)" for name in packages)
    pages = "\n".join([*(one.file for one in shown), *packages])
    return OVERVIEW.format(length=LENGTH, cards=cards, packages=listed, pages=pages)


def package(folder: Path) -> str:
    """The README of an example that is a distribution, and its files."""
    files = [folder / "pyproject.toml", *sorted(folder.glob("attndsl_*/*.*"))]
    kinds = {".py": "python", ".attn": "attn", ".toml": "toml"}
    shown = "\n".join(
        f"`{path.relative_to(folder)}`\n\n```{kinds[path.suffix]}\n{path.read_text(encoding='utf-8')}```\n"
        for path in files
        if path.suffix in kinds
    )
    return f"{(folder / 'README.md').read_text(encoding='utf-8')}\n## Its files\n\n{shown}"


def write(folder: Path) -> None:
    """All pages and pictures into a folder; what is as it was is not touched, and not built anew."""
    folder.mkdir(exist_ok=True)
    packages = [path.parent for path in sorted(EXAMPLES.glob("*/pyproject.toml"))]
    shown = [example(path) for path in sorted(EXAMPLES.glob("*.attn"))]
    prelude = (ROOT / "grammar" / "prelude.attn").read_text(encoding="utf-8")
    made = {"index.md": overview(shown, [path.name for path in packages])}
    made["prelude.md"] = f"# The text of the prelude\n\n```attn\n{prelude}```\n"
    made |= {f"{path.name}.md": package(path) for path in packages}
    for one in shown:
        made[f"{one.file}.md"] = page(one)
        if one.drawing is not None:
            made |= {f"{one.file}-light.svg": one.drawing.light, f"{one.file}-dark.svg": one.drawing.dark}
    for path in folder.iterdir():
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
