"""`use "package:file.attn"`: what a library may give, and every way in which that goes wrong."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

import attndsl
from attndsl.execution import registry


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs a library of these files, and gives its folder."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, **files: str) -> Path:
        folder = tmp_path / f"{name}_files"
        folder.mkdir()
        for stem, text in files.items():
            (folder / f"{stem}.attn").write_text(text)
        info = tmp_path / f"{name}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[attndsl.libraries]\n{name} = {name}_files\n")
        importlib.invalidate_caches()
        registry.plugin.cache_clear()
        registry._load.cache_clear()
        return folder

    return install


def refused(text: str) -> tuple[str, str, str]:
    """The one diagnostic of a text: where, message, help."""
    with pytest.raises(attndsl.AttnError) as caught:
        attndsl.parse(text, "main.attn")
    (found,) = caught.value.diagnostics
    assert found.span is not None
    line, _ = found.span.source.position(found.span.start)
    return f"{found.span.source.name}:{line}", found.message, found.help


def test_a_file_of_a_library_and_those_that_it_uses(library: Callable[..., Path]) -> None:
    library("bands", near='use "wide.attn"\npattern near = wide & last(2)', wide="pattern wide = causal")
    library("others", far='use "bands:near.attn"\npattern far = causal - near')
    program = attndsl.parse('use "others:far.attn"\nuse "bands:wide.attn"\nassert far <= wide')
    assert (program["far"].mask(6) == attndsl.parse("pattern p = causal - last(2)")["p"].mask(6)).all()
    assert [verdict.status for _, verdict in program.check()] == ["proved"]


def test_nothing_is_read_without_a_use(library: Callable[..., Path]) -> None:
    library("bands", near="pattern causal = full\npattern near = last(2)")
    assert not attndsl.parse("pattern p = causal")["p"].mask(3).all()
    with pytest.raises(attndsl.AttnError, match="unknown name `near`"):
        attndsl.parse("pattern p = near")


def test_the_package_of_a_library_is_not_run(library: Callable[..., Path]) -> None:
    folder = library("bands", near="pattern near = last(2)")
    (folder / "__init__.py").write_text("raise RuntimeError('this ran')")
    assert attndsl.parse('use "bands:near.attn"').attentions == ()
    assert {row.name: row.error for row in registry.listing() if row.group == "libraries"} == {"bands": ""}


def test_bad_uses(library: Callable[..., Path]) -> None:
    folder = library("bands", near="pattern near = last(2)", far="pattern far = full")
    (folder.parent / "outside.attn").write_text("pattern p = full")
    (folder / "link.attn").symlink_to("../outside.attn")
    alone = "`use` reaches files in `bands` alone"
    for use, message, help in [
        ("band:near.attn", "no library `band` is installed", "did you mean `bands`?"),
        ("x:near.attn", "no library `x` is installed", "there are bands"),
        (":near.attn", "no library `` is installed", "there are bands"),
        ("bands:neat.attn", "the library `bands` has no file `neat.attn`", "did you mean `near.attn`?"),
        ("bands:x", "the library `bands` has no file `x`", "it has far.attn, link.attn, near.attn"),
        (
            "bands:",
            "the library `bands` is named, and none of its files",
            "it has far.attn, link.attn, near.attn",
        ),
        ("bands:../outside.attn", alone, ""),
        (f"bands:{folder}/near.attn", alone, ""),
        ("bands:link.attn", alone, ""),
    ]:
        assert refused(f'pattern p = full\nuse "{use}"') == ("main.attn:2", message, help), use


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('use "own.attn"', "`own.attn` uses itself in the end"),
        ('use "bands:own.attn"', "`bands:own.attn` uses itself in the end"),
        ('use "../main.attn"', "`use` reaches files in `bands` alone"),
        ('use "main.attn"', "the library `bands` has no file `main.attn`"),
        ("pattern p = lst(2)", "unknown name `lst`"),
    ],
)
def test_a_mistake_in_a_library_is_placed_there(
    text: str, message: str, library: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "main.attn").write_text('use "bands:own.attn"')
    library("bands", own=f"\n{text}")
    with pytest.raises(attndsl.AttnError) as caught:
        attndsl.load(tmp_path / "main.attn")
    (found,) = caught.value.diagnostics
    assert found.span is not None
    assert (found.span.source.name, found.message) == ("bands:own.attn", message)


def test_a_name_that_two_distributions_register(library: Callable[..., Path], tmp_path: Path) -> None:
    library("bands", near="pattern near = last(2)")
    info = tmp_path / "other-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[attndsl.libraries]\nbands = other_files\n")
    where, message, help = refused('use "bands:near.attn"')
    assert (where, help) == ("main.attn:1", "uninstall one of the two")
    assert message.startswith("`bands` is registered twice under attndsl.libraries: by ")


def test_a_package_that_is_gone(library: Callable[..., Path]) -> None:
    folder = library("bands")
    folder.rmdir()
    message = "the plugin `bands` of bands cannot be used: `bands_files` is not the name of a package"
    where, said, _ = refused('use "bands:near.attn"')
    assert (where, said.removesuffix(" that is installed")) == ("main.attn:1", message)
