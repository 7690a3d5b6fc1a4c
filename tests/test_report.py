"""Reports: every example against the mask written out, and what the commands make of them."""

from __future__ import annotations

import csv
import json
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
from click.testing import CliRunner
from shipped import EXAMPLES, NAMES, example

import attndsl
from attndsl.analysis.report import usable
from attndsl.command.cli import main
from attndsl.execution import registry
from attndsl.execution.choice import UNKNOWN
from attndsl.execution.selecting import drawn
from attndsl.html.page import render
from attndsl.streams import Projection
from attndsl.tiles import lowering

ATTENTIONS = [
    (file, name)
    for file in NAMES
    for name in example(file).attentions
    if isinstance(example(file)[name], attndsl.Bound)
]
PAIRS = [(file, name) for file, name in ATTENTIONS if file not in ("efficient_attention", "nystromformer")]
"""Those that have weights of pairs."""
LENGTHS = (0, 1, 50, 97)


def run(*args: object) -> str:
    done = CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def random_tables(attention: attndsl.Bound, n: int) -> dict[str, Any]:
    """Tables in the ranges that the examples expect: small sorted numbers."""
    rng = np.random.default_rng(n)
    found = {}
    for table in attention.inputs:
        known = {"B": 1, "H": attention.attention.enough_heads(), "n": n, "nq": n}
        sizes = [axis if isinstance(axis, int) else known.get(axis, 8) for axis in table.dims]
        draw = {
            "int": lambda shape: np.sort(rng.integers(0, 3, shape), axis=-1) if shape else rng.integers(0, 3),
            "bool": lambda shape: rng.random(shape) < 0.5,
            "float": lambda shape: rng.normal(size=shape),
        }
        found[table.name] = draw[table.dtype](sizes)
    heads = attention.attention.enough_heads()
    at = lowering.sizes(attention.attention, n, n, heads)
    return found | drawn(attention.attention, at, heads, 8, found)


@pytest.mark.parametrize(
    ("file", "name", "n"), [(*pair, n) for i, pair in enumerate(PAIRS) for n in (LENGTHS[i % 3], LENGTHS[3])]
)
def test_counts_of_every_example(file: str, name: str, n: int) -> None:
    attention = example(file)[name]
    assert isinstance(attention, attndsl.Bound)
    heads = attention.attention.enough_heads()
    given = random_tables(attention, n)
    mask = attention.mask(n, heads=heads, **given)
    mask = np.broadcast_to(mask, (1, heads, n, mask.shape[-1]))
    report = attndsl.analyze(attention, length=n, parts=["nnz", "rows"], **given)
    assert report.nnz is not None
    assert report.nnz.value == mask.sum()
    assert report.density == pytest.approx(mask.mean() if mask.size else 0.0)
    assert report.empty_rows == (~mask.any(axis=-1)).sum()
    if report.causal and not attention.attention.streams:
        assert not np.triu(mask, 1).any()
    if report.nnz.formula and report.nnz.valid_for == "every n":
        assert sympy.sympify(report.nnz.formula).subs("n", n) == mask.sum()
    bare = attndsl.analyze(attention, length=n, parts=["nnz"]).nnz
    assert bare is not None
    if bare.bounds is not None:
        assert bare.bounds[0] <= mask.sum() <= bare.bounds[1]


@pytest.mark.parametrize(("file", "name"), ATTENTIONS)
def test_every_part_of_every_example(file: str, name: str) -> None:
    """A part is there, or there is a reason why not, and all is plain data."""
    attention = example(file)[name]
    assert isinstance(attention, attndsl.Bound)
    report = attndsl.analyze(attention, length=200, layers=3, **random_tables(attention, 200))
    data = json.loads(json.dumps(report.to_dict()))
    assert data["name"] == attention.name
    if (file, name) not in PAIRS:
        assert data["flops"]["forward"] > 0
        assert set(usable()) - set(report.reasons) == {"cost"}
        return
    streams = attention.attention.of_streams
    tokens = {"reach", "graph"} if attention.attention.held else set()
    projected = any(isinstance(stream, Projection) for stream in attention.attention.streams)
    # an encoder with slots reads ahead
    kept = {"kv_cache"} if projected or file == "pegasus_x" else set()
    assert report.reasons.keys() == (tokens | kept | {"shards"} if streams else set())
    assert tokens or len(data["reach"]["per_layer"]) == 3
    assert {"reference", "sdpa", "torch"} <= set(data["lowerings"])
    if not kept:
        assert data["kv_cache"]["minimum"] <= data["kv_cache"]["full"]
        assert streams or data["kv_cache"]["full"] == 200
    counts = [data["nnz"]] if data["parts"] is None else data["parts"].values()
    assert data["flops"]["forward"] == 256 * sum(count["value"] for count in counts)


def test_queries_of_their_own() -> None:
    attention = attndsl.parse("pattern p = causal")["p"]
    report = attndsl.analyze(attention, length=100, q_length=10)
    assert report.nnz is not None
    assert (report.nnz.value, report.nnz.formula) == (sum(range(91, 101)), None)
    assert set(report.reasons) == {"reach", "kv_cache", "shards", "graph"}


MINE = """
from attndsl.analysis.part import Part
def found(subject):
    return {"twice": 2 * subject.problem.length, "list": [0.5, True]}
backend = Part(found, lambda found: ["mine"])
"""


@pytest.fixture
def registered(register: Callable[..., str]) -> Iterator[Callable[..., str]]:
    yield lambda source, name="": register(source, "analyses", name=name)
    registry.plugin.cache_clear()


def test_a_part_of_another_party(registered: Callable[..., str]) -> None:
    name = registered(MINE)
    attention = attndsl.parse("pattern p = causal")["p"]
    report = attndsl.analyze(attention, length=8)
    assert getattr(report, name) == report.to_dict()[name] == {"twice": 16, "list": [0.5, True]}
    assert (str(report).splitlines()[-1], report.reasons) == ("mine", {})
    assert pickle.loads(pickle.dumps(report)) == report
    page = render(report.to_dict())
    assert f'<data value="16" data-field="/{name}/twice">16</data>' in page
    assert f'<data value="true" data-field="/{name}/list/1">yes</data>' in page
    assert attndsl.analyze(attention, length=8, parts=["rows"]).to_dict()[name] is None


def test_the_analysis_that_is_shown(registered: Callable[..., str]) -> None:
    text = (EXAMPLES.parent / "docs/plugins.md").read_text(encoding="utf-8")
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Part(" in block)
    name = registered(source.replace("part = ", "backend = "))
    report = attndsl.analyze(attndsl.parse("pattern p = last(3)")["p"], length=8, parts=[name])
    assert getattr(report, name) == 3
    assert str(report).endswith("\n  most keys     3 for one query")
    assert f'<data value="3" data-field="/{name}">3</data>' in render(report.to_dict())


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import nowhere", "ModuleNotFoundError"),
        ("backend = print", "it is no `attndsl.analysis.part.Part`"),
        ("from attndsl.analysis.part import Part as backend", "it is a class: register an instance"),
    ],
)
def test_a_part_that_cannot_be_used_is_told_and_takes_no_other_down(
    source: str, error: str, registered: Callable[..., str]
) -> None:
    name = registered(source)
    rows = {row["name"]: row["error"] for row in json.loads(run("plugins", "--json"))["plugins"]}
    assert rows[name].startswith(error)
    report = attndsl.analyze(attndsl.parse("pattern p = causal")["p"], length=8)
    assert report.nnz.value == 36
    assert report.reasons.keys() == {name}
    assert error in report.reasons[name]
    assert f"  {name}" in str(report)


@pytest.mark.parametrize(
    ("name", "giver"),
    [("density", "the part `nnz`"), ("length", "the report itself"), ("to_dict", "the report itself")],
)
def test_a_field_that_is_given_twice_is_told_and_takes_no_other_down(
    name: str, giver: str, registered: Callable[..., str]
) -> None:
    registered(MINE, name)
    why = f"it gives the field `{name}`, and so does {giver}"
    rows = [row for row in json.loads(run("plugins", "--json"))["plugins"] if row["error"]]
    assert [(row["name"], row["owner"], row["error"]) for row in rows] == [(name, name, why)]
    report = attndsl.analyze(attndsl.parse("pattern p = causal")["p"], length=8)
    assert (report.nnz.value, report.density, report.length) == (36, 36 / 64, 8)
    assert report.reasons == {name: f"the plugin `{name}` of {name} cannot be used: {why}"}
    assert f"  {name}" in str(report)


def test_a_part_of_another_party_has_a_heading_in_a_report_of_many(registered: Callable[..., str]) -> None:
    attention = attndsl.parse("pattern p = causal")["p"]
    name = registered(MINE)
    registered(MINE.replace('["mine"]', '["\\nTheir own", "said"]'))
    sections = str(attndsl.analyze(attention, length=8)).split("\n\n")
    assert {f"{name}\nmine", "Their own\nsaid"} <= {*sections}
    assert str(attndsl.analyze(attention, length=8, parts=[name])).splitlines()[1:] == ["mine"]


def test_a_text_that_is_one_string_is_refused(registered: Callable[..., str]) -> None:
    name = registered(MINE.replace('["mine"]', '"mine"'))
    report = attndsl.analyze(attndsl.parse("pattern p = causal")["p"], length=8)
    with pytest.raises(attndsl.AttnError) as caught:
        str(report)
    said = f"error: `text` of the part `{name}` gives lines, not one text\n  help: `yield` it"
    assert str(caught.value) == said


def test_a_report_has_no_other_fields() -> None:
    report = attndsl.analyze(attndsl.parse("pattern p = causal")["p"], length=8, parts=["rows"])
    assert (report.empty_rows, report.nnz) == (0, None)
    with pytest.raises(AttributeError, match="no attribute `nzz`"):
        _ = report.nzz


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"length": -1}, "negative"),
        ({"length": 2**63}, "lengths end at"),
        ({"length": 8, "parts": ["cost of"]}, "no part"),
        ({"length": 8, "layers": 0}, "`layers` is 0"),
        ({"length": 8, "ranks": 0}, "`ranks` is 0"),
        ({"length": 8, "doc": [1]}, "no input `doc`"),
        ({"length": 8, "block_size": 12}, "multiple of 8"),
        ({"length": 8, "heads": 1, "kv_heads": 0}, "kv_heads"),
        ({"length": 8, "dtype": "int8"}, "dtype"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(attndsl.AttnError, match=said):
        attndsl.analyze(attndsl.parse("pattern p = causal")["p"], **given)


def test_no_row_has_a_key() -> None:
    report = attndsl.analyze(attndsl.parse("pattern p = none")["p"], length=20)
    assert report.nnz is not None
    assert (report.nnz.value, report.empty_rows, report.reasons) == (0, 20, {})


@pytest.mark.parametrize("file", ["longformer", "streaming_llm", "bigbird", "duo_attention", "packed"])
def test_text_fits_a_terminal(file: str) -> None:
    name = ["bigbird"] if file == "bigbird" else []
    text = run("analyze", EXAMPLES / f"{file}.attn", *name, "--length", 1000, "--layers", 3)
    assert max(map(len, text.splitlines())) <= 80
    data = json.loads(run("analyze", EXAMPLES / f"{file}.attn", *name, "--length", 1000, "--json"))
    if data["nnz"]["value"] is not None:
        assert f"{data['nnz']['value']:,}" in text


def test_a_part_that_takes_too_long_is_left_out() -> None:
    text = run("analyze", EXAMPLES / "longformer.attn", "--length", 4096, "--time-limit", 0.001)
    assert "took longer than" in text


def test_an_open_parameter() -> None:
    file = EXAMPLES / "mistral.attn"
    found = json.loads(run("analyze", file, "--length", 64, "--in", "w", "--only", "parameters", "--json"))
    assert found["in_parameters"]["w"]["formula"] == "n*w - w*(w - 1)/2"


def test_compare_in_each_format() -> None:
    files = [EXAMPLES / "longformer.attn", EXAMPLES / "mistral.attn"]
    rows = json.loads(run("compare", *files, "--length", 1024, "--format", "json"))["rows"]
    assert [row["name"] for row in rows] == ["longformer", "mistral"]
    assert rows[0]["nnz"] == 515 * 1024 - 66306
    read = list(csv.DictReader(run("compare", *files, "--length", 1024, "--format", "csv").splitlines()))
    assert [int(row["nnz"]) for row in read] == [row["nnz"] for row in rows]
    markdown = run("compare", *files, "--length", 1024, "--format", "markdown").splitlines()
    assert markdown[0].split("|")[2].strip() == "longformer"
    assert set(markdown[1]) <= set("|-: ")
    text = run("compare", *files, "--length", 1024)
    assert f"{rows[0]['nnz']:,}" in text


def test_compare_sweeps() -> None:
    file = EXAMPLES / "mistral.attn"
    rows = json.loads(run("compare", file, "--sweep", "n=64,128", "--format", "json"))["rows"]
    assert [row["length"] for row in rows] == [64, 128]
    rows = json.loads(run("compare", file, "--length", 64, "--sweep", "w=4,8", "--format", "json"))["rows"]
    assert [row["nnz"] for row in rows] == [4 * 64 - 6, 8 * 64 - 28]
    assert [(row["name"], row["w"]) for row in rows] == [("mistral", "4"), ("mistral", "8")]
    both = run("compare", file, "--sweep", "w=4,8", "--sweep", "n=16,32", "--format", "json")
    assert [(row["w"], row["length"]) for row in json.loads(both)["rows"]] == [
        ("4", 16), ("4", 32), ("8", 16), ("8", 32)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["ranks", "layers", "heads", "length", "block_size", "by"])
def test_a_table_may_be_called_anything(name: str, tmp_path: Path) -> None:
    file = tmp_path / "p.attn"
    file.write_text(f"attention p {{ inputs {name} : int[n]  mask causal & documents({name}) }}", "utf-8")
    np.save(tmp_path / "t.npy", np.arange(20) // 5)
    given = f"{name}={tmp_path / 't.npy'}"
    found = json.loads(run("analyze", file, "--length", 20, "--input", given, "--json"))
    assert (found["nnz"]["value"], found["reasons"]) == (60, {})


@pytest.mark.parametrize(
    ("pattern", "complexity"),
    [
        ("causal & last(400 + isqrt(n))", None),
        ("causal & last(isqrt(isqrt(n)))", None),
        ("causal & last(isqrt(n) * log2(n))", None),
        ("causal & { q, k : (q - k) mod 1500000 < 3 }", None),
        ("causal & last(isqrt(n))", "O(n*sqrt(n))"),
        ("last(8) | random(4)", "O(n)"),
        ("causal & random(4)", None),
        ("causal | random(4)", "O(n^2)"),
        ("last(2) & ~random(2, of = last(2))", None),
        ("radius(0) @ random(2) | last(3)", None),
        ("causal & (last(isqrt(n)) | { q, k : (q - k) mod 33554432 == 0 })", None),
    ],
)
def test_a_class_is_known_or_not_given(pattern: str, complexity: str | None) -> None:
    report = attndsl.analyze(attndsl.parse(f"pattern p = {pattern}")["p"], length=64, parts=["nnz"])
    assert report.reasons == {}
    assert report.complexity == complexity


def test_draws_and_tables_together() -> None:
    text = "attention p { inputs doc : int[n]  mask documents(doc) & random(2) }"
    attention = attndsl.parse(text)["p"]
    doc = np.arange(16) // 4
    report = attndsl.analyze(attention, length=16, parts=["nnz", "rows"], doc=doc)
    mask = attention.mask(16, doc=doc)
    assert report.nnz is not None
    assert (report.nnz.value, report.reasons) == (mask.sum(), {})
    assert report.empty_rows == (~mask.any(axis=-1)).sum()


def test_shards_need_no_tiles_of_the_whole_mask() -> None:
    attention = example("sparse_transformer")["sparse_transformer"]
    assert isinstance(attention, attndsl.Bound)
    report = attndsl.analyze(attention, length=2**20, parts=["shards"])
    assert report.reasons == {}
    assert report.shards is not None


def test_a_batch_counts_in_every_part() -> None:
    attention = attndsl.parse("pattern p = last(9)")["p"]
    one, four = (attndsl.analyze(attention, length=100, batch=batch) for batch in (1, 4))
    assert one.shards is not None
    assert four.shards is not None
    assert [s.bytes for s in four.shards] == [4 * s.bytes for s in one.shards]
    assert one.bytes is not None
    assert four.bytes is not None
    assert four.bytes.forward == 4 * one.bytes.forward


def test_backends_cost_what_they_do_where_keys_are_chosen():
    """The plan knows nothing of which; here it is all of them, and tiles would be those of `causal`."""
    attention = attndsl.parse("attention a { mask topk(64, of = causal) }")["a"]
    found = attndsl.analyze(attention, length=64, parts=["cost"]).lowerings
    considered = attndsl.compile(attention, length=64).considered
    assert found["sdpa"].seconds_estimate == considered["sdpa"]
    told = {name: UNKNOWN if verdict is None else verdict for name, verdict in considered.items()}
    assert {name: work.seconds_estimate or work.reason for name, work in found.items()} == told


def test_the_page_says_what_is_of_one_choice():
    attention = attndsl.parse("attention a { mask causal & lsh(2, 8) }")["a"]
    page = render(attndsl.analyze(attention, length=64, parts=["nnz", "rows"]).to_dict())
    assert "are of one drawn choice" in page
    assert "<small>whatever is chosen</small>" in page
    plain = attndsl.parse("attention a { mask causal }")["a"]
    assert "choice" not in render(attndsl.analyze(plain, length=64, parts=["nnz", "rows"]).to_dict())
