"""Arrows between modules run one way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parent.parent / "attndsl"
ROOMS = (
    "errors",  # diagnostics
    "shipped",  # where the examples lie
    "keywords",  # arguments by the names that they have elsewhere
    "expr",  # the typed core
    "legal",  # its nodes in a table
    "scores",  # what they depend on
    "axis",  # where queries and keys stand
    "streams",  # what keys are that are no tokens
    "attention",
    "features",  # weights that are inner products of features
    "selection",  # the contract of a selection
    "portable",
    "syntax",  # text to tree
    "meaning",  # pointwise evaluation, bounds, draws
    "relations",  # isl: relations and proofs
    "tiles",  # masks in tiles
    "pictures",
    "emit",  # scores as code
    "layers",  # what stacks of relations reach
    "language",  # tree to attention, assertions, warnings
    "highlight",  # for Pygments
    "sheets",  # what data sheets say of devices
    "backend",  # the contract of a backend
    "analysis.part",  # the contract of an analysis
    "stage",  # the contract of a stage of stacks
    "execution.registry",
    "execution.choice",  # what backends say of a problem
    "execution.selecting",  # what selections choose
    "execution.leaks",  # and whether later tokens change it
    "execution.torch_eval",  # expressions with torch
    "execution.leaf_values",  # what of them is known before pairs are
    "execution.flexing",  # what FlexAttention is given
    "analysis",  # one question a file
    "bound",  # what users hold
    "stacks.tree",  # layers of attentions
    "stacks.reading",
    "program",
    "examples",  # as programs
    "analysis.report",
    "execution",  # plans and the operator
    "interop",  # what is written for other libraries
    "stacks",  # as modules
    "spans",  # adaptive spans in training
    "html",
    "command",
    "torch",
    "conformance",
)
"""Where a module may import from: its own room and those before it; the longest name counts."""


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.parts[0] not in ("grammar", "plugins", "__init__.py", "__main__.py"):
            name = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module, known: dict[str, ast.Module]) -> Iterator[str]:
    """What runs, in functions too; names that only annotations need are left out."""
    typing = [
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(node) for block in typing for node in ast.walk(block)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        if node.module is None or not node.module.startswith("attndsl"):
            continue
        module = node.module.removeprefix("attndsl").removeprefix(".")
        for alias in node.names:
            deeper = f"{module}.{alias.name}".removeprefix(".")
            yield deeper if deeper in known else module


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    known = modules()
    arrows = ((name, other) for name, tree in known.items() for other in imports(tree, known))
    return nx.DiGraph([(a, b) for a, b in arrows if a != b and b])


def test_a_plugin_in_a_folder_imports_nothing_from_other_plugins() -> None:
    """The linter says nothing of imports of plugins inside their folders."""
    folder = PACKAGE.parent / "plugins"
    found = [(path, *other) for path in folder.rglob("*.py") for other in imported(path)]
    assert any(level == 1 for _, level, _ in found)
    assert [x for x in found if x[1] > 1 or x[2].startswith(("attndsl.plugins", "plugins"))] == []
    assert [x for x in found if x[1] and x[0].parent == folder] == []


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """How far up and what."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.level, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def room(module: str) -> int:
    """The number of its room."""
    within = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    return ROOMS.index(max(within, key=len))


def test_no_module_imports_itself_in_the_end(graph: nx.DiGraph) -> None:
    assert [sorted(circle) for circle in nx.strongly_connected_components(graph) if len(circle) > 1] == []


def test_modules_import_from_rooms_before_theirs(graph: nx.DiGraph) -> None:
    assert [(a, b) for a, b in graph.edges if room(b) > room(a)] == []


def test_the_checks_see_a_wrong_arrow(graph: nx.DiGraph) -> None:
    assert len(graph.edges) > 200
    assert room("analysis.report") > room("bound") > room("analysis.graph")
    assert nx.has_path(graph, "execution.plan", "expr")
