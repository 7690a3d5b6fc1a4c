"""The sparsity graph and its measures, against networkx and the mask itself."""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import networkx as nx
import numpy as np
import programs
import pytest
from numpy.typing import NDArray
from shipped import EXAMPLES, example

import attndsl
from attndsl import AttnError
from attndsl.analysis import graph as measuring
from attndsl.analysis.graph import GraphMeasures, tiles_of
from attndsl.bound import Bound
from attndsl.execution.selecting import drawn
from attndsl.tiles import lowering

PROGRAMS = [programs.program(Random(seed)) for seed in range(100, 140)]
PATTERNS = [
    "full", "none", "causal", "T(causal)", "radius(0)", "radius(2)", "last(2)", "last(9)", "random(1)",
    "strided(5)", "band([-7, 7])", "global([3])", "radius(1) | global([0])", "within(6, radius(1))",
    "radius(1) | columns([4])", "radius(1) | random(2)", "rows([0]) | columns([0])", "block(8) | last(2)",
    "{ q, k : (q + k) mod 2 == 1 }", "{ q, k : q < n // 2 <= k }", "~radius(0)",
]  # fmt: skip


def pattern(text: str) -> Bound:
    found = attndsl.parse(f"attention main {{ mask {text} }}")["main"]
    assert isinstance(found, Bound)
    return found


def documents(n: int) -> NDArray[np.int64]:
    return np.arange(n) * 5 // max(n, 1)


def tables(name: str, n: int) -> dict[str, Any]:
    images = np.array([0, n // 2])
    return {
        "alphafold": {"z": np.zeros((1, 1, n, n))},
        "flamingo": {"lo": images, "hi": np.append(images[1:], n)},
        "graphormer": {"bias": np.zeros((1, 4)), "path": np.zeros((1, n, n), int)},
        "left_padding": {"pad": [5]},
        "packed": {"doc": documents(n)},
        "paligemma": {"prompt": [3]},
        "gemma3_images": {"image": documents(n) % 3 - 1},
        "prefix_lm": {"prefix": [9]},
        "shared_prefix": {"doc": documents(n), "parent": [0, 0, 0, 1, 2]},
        "vsa": {"chosen": np.arange(2 * -(-n // 64)).reshape(1, 1, -1, 2) % 3},
    }.get(name, {})


def examples() -> list[Any]:
    """But for those whose keys are streams, which test_streams.py looks at."""
    found = []
    for path in sorted(EXAMPLES.glob("*.attn")):
        program = example(path.stem)
        bound = {name: program[name] for name in program.names if name != "earlier"}
        found += [
            pytest.param(b, id=name)
            for name, b in bound.items()
            if isinstance(b, Bound)
            and b.attention.approx is None
            and not b.attention.streams
            and not b.attention.held
        ]
    return found


def measures(found: Bound, *args: Any, **options: Any) -> GraphMeasures:
    return measuring.measures(found.attention, *args, **options)


def union(attention: Bound, n: int, heads: int, **inputs: Any) -> NDArray[np.bool_]:
    mask = attention.mask(n, heads=heads, **inputs)
    return mask.reshape((-1, n, n) if n else (1, 0, 0)).any(axis=0)


def dense(made: nx.DiGraph) -> NDArray[np.bool_]:
    """[q, k]"""
    found: NDArray[np.bool_] = nx.to_numpy_array(made, nodelist=range(len(made)), weight=None).T > 0
    return found


def undirected(sees: NDArray[np.bool_]) -> nx.Graph:
    """The weights W = A + A^T, so that networkx, too, counts an edge from a node to itself twice."""
    return nx.from_numpy_array((sees.astype(int) + sees.T).astype(float))


def by_networkx(made: nx.DiGraph, tokens: NDArray[np.bool_]) -> dict[str, Any]:
    """The measures, from their definitions."""
    n = len(tokens)
    lengths = {
        (u, v): d for u, found in nx.all_pairs_shortest_path_length(made) for v, d in found.items() if u != v
    }
    parts = [len(part) for part in nx.strongly_connected_components(made)]
    ones = np.ones(n, bool)
    hubs = [i for i in range(n) if all(tokens[i, j] and tokens[j, i] for j in range(n) if j != i)]
    star = [i for i in hubs if all(tokens[j, j] for j in range(n) if j != i)]
    causal = not np.triu(tokens, 1).any()
    twice = tokens | (tokens.astype(int) @ tokens > 0) | np.diag(ones)
    others = len(made) * (len(made) - 1)
    return {
        "nodes": len(made),
        "edges": made.number_of_edges(),
        "causal": causal,
        "hubs": len(hubs),
        "star": bool(star),
        "two_hop": bool((twice | ~np.tri(n, dtype=bool)).all() if causal else twice.all()),
        "diameter": max(lengths.values(), default=0),
        "average_shortest_path": pytest.approx(np.mean(list(lengths.values()))) if lengths else None,
        "joined": pytest.approx(len(lengths) / others) if others else None,
        "components": len(parts),
        "largest_component": max(parts, default=0),
        "spectral_gap": pytest.approx(
            max(0, sorted(nx.normalized_laplacian_spectrum(undirected(tokens)))[1]), abs=1e-10
        )
        if n > 1
        else None,
    }


def check(attention: Bound, n: int, heads: int = 1, **inputs: Any) -> None:
    tokens = union(attention, n, heads, **inputs)
    made = attention.graph(n, heads=heads, **inputs)
    assert sorted(made) == list(range(n))
    assert (dense(made) == tokens).all()
    found = measures(attention, n, heads=heads, **inputs)
    expected = by_networkx(made, tokens)
    assert {name: getattr(found, name) for name in expected} == expected
    for degrees, counts in ((found.in_degree, tokens.sum(1)), (found.out_degree, tokens.sum(0))):
        check_degrees(degrees, counts)
    if n:
        assert found.in_degree.max == max(degree for _, degree in made.in_degree())

    made = attention.graph(n, "block", block_size=8, heads=heads, **inputs)
    blocks = measures(attention, n, "block", block_size=8, heads=heads, **inputs)
    check_blocks(made, tokens)
    expected = by_networkx(made, tokens)
    whole, bound = expected.pop("two_hop"), expected.pop("spectral_gap")
    assert {name: getattr(blocks, name) for name in expected} == expected
    assert blocks.two_hop in (whole, None)
    assert bound is None or blocks.spectral_gap == pytest.approx(smooth_gap(tokens, 8), abs=1e-10)
    assert bound is None or blocks.spectral_gap >= found.spectral_gap - 1e-10
    assert (blocks.in_degree, blocks.out_degree) == (found.in_degree, found.out_degree)


def check_degrees(degrees: measuring.Degrees, counts: NDArray[np.int64]) -> None:
    if not len(counts):
        assert degrees == measuring.Degrees(0, 0, 0.0, ())
        return
    assert (degrees.min, degrees.max) == (counts.min(), counts.max())
    assert degrees.mean == pytest.approx(counts.mean())
    assert len(degrees.histogram) <= 16
    bars = [(low, high) for low, high, _ in degrees.histogram]
    assert all(a <= b < c for (a, b), (c, _) in itertools.pairwise(bars))
    assert [nodes for *_, nodes in degrees.histogram] == [
        ((a <= counts) & (counts <= b)).sum() for a, b in bars
    ]
    assert sum(nodes for *_, nodes in degrees.histogram) == len(counts)


def check_blocks(made: nx.DiGraph, tokens: NDArray[np.bool_], size: int = 8) -> None:
    n = len(tokens)
    spans = [(start, min(start + size, n) - 1) for start in range(0, n, size)]
    assert [(data["first"], data["last"]) for _, data in sorted(made.nodes(data=True))] == spans
    expected = {}
    for i, (first, last) in enumerate(spans):
        for j, (start, end) in enumerate(spans):
            tile = tokens[first : last + 1, start : end + 1]
            if tile.any():
                expected[j, i] = {"pairs": tile.sum(), "full": tile.all()}
    assert {(u, v): data for u, v, data in made.edges(data=True)} == expected


def smooth_gap(tokens: NDArray[np.bool_], size: int) -> float:
    """`GraphMeasures.spectral_gap` by block: the same problem over an explicit basis."""
    n = len(tokens)
    weights = tokens.astype(float) + tokens.T
    degrees = weights.sum(axis=1)
    blocks = nx.from_numpy_array(
        np.add.reduceat(np.add.reduceat(weights, range(0, n, size)), range(0, n, size), 1)
    )
    if not degrees.all() or not nx.is_connected(blocks):
        return 0.0
    basis = np.zeros((n, 2 * -(-n // size)))
    basis[np.arange(n), np.arange(n) // size * 2] = 1
    basis[np.arange(n), np.arange(n) // size * 2 + 1] = np.arange(n) % size
    basis = basis[:, basis.any(axis=0)] * degrees[:, None] ** 0.5
    basis = np.linalg.qr(basis)[0]
    return 1 - np.linalg.eigvalsh(basis.T @ (weights / np.sqrt(np.outer(degrees, degrees))) @ basis)[-2]


@pytest.mark.parametrize("text", PATTERNS)
def test_patterns(text: str) -> None:
    for n in (0, 1, 2, 3, 8, 17, 40):
        check(pattern(text), n)


@pytest.mark.parametrize("program", PROGRAMS)
def test_random_programs(program: programs.Program) -> None:
    attention = attndsl.parse(program.text)["main"]
    for n in (0, 1, 5, 30):
        check(attention, n, program.heads, **program.tables(n, batch=1))


def given_to(bound: Bound, n: int) -> dict[str, Any]:
    """Tables of the masks, and a choice where keys are chosen."""
    found, attention = tables(bound.name, n), bound.attention
    if not attention.selected:
        return found
    sizes = {"B": 1, "H": attention.enough_heads(), "n": n, "D": 8}
    rest = {
        t.name: np.random.default_rng(0).normal(size=[sizes.get(axis, axis) for axis in t.dims])
        for t in attention.inputs
    }
    at = lowering.sizes(attention, n, n, attention.enough_heads())
    return found | rest | drawn(attention, at, attention.enough_heads(), 8, rest)


@pytest.mark.parametrize("attention", examples())
def test_examples(attention: Bound) -> None:
    check(attention, 64, attention.attention.enough_heads(), **given_to(attention, 64))


@pytest.mark.parametrize("attention", examples()[::4])
def test_examples_over_several_tiles(attention: Bound) -> None:
    check(attention, 200, attention.attention.enough_heads(), **given_to(attention, 200))


def test_one_head_and_any() -> None:
    attention = attndsl.parse(
        "attention main { heads 0 { mask last(3) } 1 { mask T(last(2)) } else { mask none } }"
    )
    attention = attention["main"]
    masks = attention.mask(20, heads=3)
    for head in range(3):
        assert (dense(attention.graph(20, heads=3, head=head)) == masks[head]).all()
        assert measures(attention, 20, heads=3, head=head).edges == masks[head].sum()
    assert (dense(attention.graph(20, heads=3)) == masks.any(axis=0)).all()
    same = pattern("last(3)")
    assert (dense(same.graph(20, heads=3, head=2)) == same.mask(20)[0]).all()


def test_edges_lead_from_key_to_query() -> None:
    assert set(pattern("last(2)").graph(3).edges) == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)}


def test_a_full_union_of_partial_tiles_is_full() -> None:
    both = attndsl.parse("attention main { heads 0 { mask causal } else { mask ~causal } }")["main"]
    found = tiles_of(both.attention, 64, "block", 16, 2, None, {})
    assert found.tiles == (16, 0, 0, 0)


@pytest.mark.parametrize("n", [50, 64, 200])
def test_known_diameters(n: int) -> None:
    for r in (1, 3, 8):
        assert measures(pattern(f"radius({r})"), n).diameter == -(-(n - 1) // r)
        assert measures(pattern(f"last({r + 1})"), n).diameter == -(-(n - 1) // r)
        assert measures(pattern(f"radius({r}) | global([7])"), n).diameter == 2


def test_published_claims() -> None:
    def shipped(name: str, n: int) -> GraphMeasures:
        return measures(example(name)[name], n)

    longformer = shipped("longformer", 2048)
    assert (longformer.diameter, longformer.hubs, longformer.star) == (2, 1, True)
    bigbird = shipped("bigbird", 1024)
    assert bigbird.star
    assert bigbird.two_hop
    assert bigbird.hubs == 2 * 64
    assert shipped("sparse_transformer", 2048).two_hop
    assert not shipped("streaming_llm", 4096).two_hop


def test_a_star_needs_all_others_to_see_themselves() -> None:
    hub = "rows([0]) | columns([0])"
    assert not measures(pattern(hub), 9).star
    assert measures(pattern(hub), 9).hubs == 1
    assert measures(pattern(f"{hub} | radius(0)"), 9).star
    assert measures(pattern(f"({hub} | radius(0)) - {{ q, k : q == 0 and k == 0 }}"), 9).star
    assert not measures(pattern(f"({hub} | radius(0)) - {{ q, k : q == 4 and k == 4 }}"), 9).star


def test_both_ways_of_finding_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for n, density in [(1, 0), (70, 0.02), (200, 0.01), (300, 0.004), (300, 0.02), (300, 0.5)]:
        sees = rng.random((n, n)) < density
        steps, joined = measuring.distances(sees)
        monkeypatch.setattr(measuring, "SOURCES", 64)
        others, same = measuring._searched(sees)
        assert steps.tolist() == others.tolist()
        assert (joined == same).all()
    assert measuring.distances(np.eye(300, k=1, dtype=bool))[0].tolist() == [0, *range(299, 0, -1)]


@pytest.mark.parametrize("text", [*PATTERNS, "radius(3) | random(2)", "within(100, full) | radius(1)"])
def test_gap_of_more_tokens(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measures(pattern(text), 300).spectral_gap
    monkeypatch.setattr(measuring, "DENSE", 0)
    assert measures(pattern(text), 300).spectral_gap == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_gap_of_a_cycle_and_a_complete_graph() -> None:
    n = 120
    cycle = measures(pattern("{ q, k : (q - k) mod 120 == 1 }"), n)
    assert cycle.spectral_gap == pytest.approx(1 - np.cos(2 * np.pi / n))
    assert measures(pattern("~radius(0)"), n).spectral_gap == pytest.approx(n / (n - 1))


def test_blocks_of_a_long_sequence_bound_the_gap_closely() -> None:
    tokens, blocks = (measures(pattern("radius(40)"), 2048, by).spectral_gap for by in ("token", "block"))
    assert tokens <= blocks <= 1.01 * tokens


def test_long_sequences() -> None:
    n = 1 << 17
    found = measures(example("longformer")["longformer"], n, block_size=256)
    assert (found.by, found.block_size, found.nodes) == ("block", 256, 512)
    assert (found.star, found.two_hop, found.hubs, found.diameter) == (True, True, 1, 2)
    assert (found.in_degree.min, found.in_degree.max) == (258, n)
    assert (
        found.in_degree.mean
        == found.out_degree.mean
        == pytest.approx((513 * n - 256 * 257 + 2 * (n - 257)) / n)
    )
    # a random walk with steps of variance s on a line of n: s pi^2 / (2 n^2)
    window = measures(pattern("radius(100)"), n, block_size=256)
    assert window.spectral_gap == pytest.approx((100 * 101 / 3) * np.pi**2 / (2 * n**2), rel=1e-2)
    assert (window.two_hop, window.diameter) == (False, 511)
    assert measuring.default_block_size(n) == 128
    assert measuring.default_block_size(n + 1) == 256


def test_what_has_no_graph() -> None:
    window = pattern("last(3)")
    with pytest.raises(AttnError, match=r"8,193 tokens(?s:.*)by=\"block\""):
        window.graph(8193)
    with pytest.raises(AttnError, match=r"16,384 blocks(?s:.*)block_size = 64"):
        window.graph(1 << 17, "block", block_size=8)
    with pytest.raises(AttnError, match="16,777,216 edges"):
        pattern("full").graph(4096)
    with pytest.raises(AttnError, match="`length` is -1"):
        window.graph(-1)
    with pytest.raises(AttnError, match="lengths end at"):
        measures(window, 2**63)
    with pytest.raises(AttnError, match="multiple of 8"):
        window.graph(64, "block", block_size=12)
    with pytest.raises(AttnError, match="by 'tile'"):
        window.graph(64, "tile")  # type: ignore[arg-type]
    with pytest.raises(AttnError, match="at least one head"):
        window.graph(64, heads=0)
    with pytest.raises(AttnError, match="no head 2"):
        window.graph(64, heads=2, head=2)
    with pytest.raises(AttnError, match="start at 4"):
        attndsl.parse("attention main { mask last(3) offset 4 }")["main"].graph(64)
    padded = example("left_padding")["left_padding"]
    with pytest.raises(AttnError, match="one batch row"):
        padded.graph(64, pad=[1, 2])
    with pytest.raises(AttnError, match="needs its input `pad`"):
        padded.graph(64)
