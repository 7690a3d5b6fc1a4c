"""The files under examples/: what they claim is proved, pins the published numbers, and agrees with numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from shipped import EXAMPLES, NAMES, example

import attndsl
from attndsl import expr as ir
from attndsl import syntax
from attndsl.errors import Source
from attndsl.execution.selecting import drawn
from attndsl.meaning import pointwise
from attndsl.program import Program
from attndsl.streams import memory
from attndsl.syntax import nodes as ast
from attndsl.tiles import lowering


def slowest(program: Program, head: int) -> float:
    """What RetNet keeps of a weight from one token to the next."""
    decay = program["retnet"].attention.groups[0].decay
    assert decay is not None
    at_head = ir.substitute(decay, {"h": ir.const(head)})
    return float(pointwise.evaluate(at_head, np.asarray(1), np.asarray(0), {}))


def rows(program: Program, *names: str) -> set[tuple[object, ...]]:
    """The axes of constants that are drawn."""
    return {table.dims for name in names for table in program[name].attention.learned}


def taken_off(program: Program) -> float:
    """The share of the second softmax where all products of the learned vectors are equal."""
    gate = program["differential"].attention.parts[1].gate
    zeros = {name: np.zeros(4) for name in "abcd"}
    inner = {node: ir.const(0.0) for node in ir.nodes(gate) if node.op == "inner"}
    for node, zero in inner.items():
        gate = swapped(gate, node, zero)
    return float(pointwise.evaluate(gate, np.asarray(0), np.asarray(0), zeros))


def each(bound: attndsl.Bound, n: int) -> list[int | None]:
    """Pairs of the parts of a sum, whatever is chosen."""
    found = attndsl.analyze(bound, length=n, heads=1, parts=["nnz"]).parts
    return [count.value for count in found.values()]


def live(bound: attndsl.Bound, n: int) -> int | None:
    """Pairs, whatever is chosen."""
    found = attndsl.analyze(bound, length=n, heads=1, parts=["nnz"]).nnz
    assert found is not None
    return found.value


def pairs(bound: attndsl.Bound, n: int, rows: int | None = None, heads: int = 1, **inputs: Any) -> int:
    """Of the last rows, as random q and k of 16 features choose."""
    sizes = lowering.sizes(bound.attention, n, rows or n, heads)
    chosen = drawn(bound.attention, sizes, heads, 16, inputs)
    return int(bound.counts(n, rows, heads=heads, **inputs, **chosen).sum())


def flops(bound: attndsl.Bound, n: int) -> int:
    """Forward, of one head of 64 features."""
    found = attndsl.analyze(bound, length=n, heads=1, head_dim=64, parts=["cost"]).flops
    assert found is not None
    return int(found.forward)


CENTERS = np.random.default_rng(0).standard_normal((5, 48, 16))

FACTS: dict[str, Callable[[Program], bool]] = {
    "flamingo": lambda p: p["flamingo"].mask(128, 3, lo=[0, 2, 9], hi=[2, 3, 9]).sum() == 3 * 64,
    "paligemma": lambda p: p["paligemma"].mask(300, prompt=[10])[0, 0, 0].sum() == 256 + 10,
    "reformer": lambda p: (
        (pairs(p["reformer"], 512), pairs(p["reformer_hf"], 512), pairs(p["reformer_safe"], 8000, 16))
        == (85_108, 132_138, 979)
    ),
    "routing": lambda p: (
        pairs(p["routing"], 600, heads=5, mu=CENTERS) == 841_753
        and pairs(p["routing_safe"], 20_000, 16, mu=CENTERS[:1]) == 3_735
    ),
    "moba": lambda p: live(p["moba"], 4096) == 5_769_216,
    "quest": lambda p: live(p["quest"], 4096) == 6_309_888,
    "dsa": lambda p: live(p["dsa"], 3000) == 2048 * 2049 // 2 + 952 * 2048,
    "knn": lambda p: (live(p["knn"], 1024), live(p["sparse_topk"], 1024)) == (63_520, 134_280),
    "nsa": lambda p: each(p["nsa"], 4096) == [518_415, 3_573_760, 1_966_336],
    "differential": lambda p: np.isclose(taken_off(p), -0.2),
    # products of 4096 tokens on both sides and of 64 landmarks with 64, 4 in each of 6 iterations
    "nystromformer": lambda p: (
        flops(p["nystromformer"], 4096)
        == flops(p["nystromformer_padded"], 4096)
        == 2 * ((2 * 4096 + 64) * 64 * 128 + 4 * 6 * 64**3)
    ),
    "efficient_attention": lambda p: flops(p["efficient_attention"], 4096) == 4 * 4096 * 64**2,
    "performer": lambda p: rows(p, "performer") == {(256, "D")},
    "rfa": lambda p: rows(p, "rfa") == rows(p, "gated_rfa") == {(64, "D")},
    "compressive": lambda p: memory(p["compressive"].attention.streams) == 768 + 3 * 1152 == 4224,
    "memorizing": lambda p: (
        p["memorizing"].attention.held == p["joint"].attention.held == 65_536
        and each(p["memorizing"], 4) == [4 * 32, 10]
        and pairs(p["joint"], 600, 16) == 16 * (512 + 32)
    ),
    "retnet": lambda p: [slowest(p, h) for h in range(8)] == [1 - 2.0 ** -(5 + h) for h in range(8)],
    "vsa": lambda p: (
        p["vsa"].mask(256, chosen=[[[[2, 0], [1, 1], [3, 0], [0, 2], [0, 0]]]])[0, 0, 0].sum() == 2 * 64
    ),
}
"""What assertions cannot say: tokens per image and per cube, which depend on tables, and what scores are."""

UNNOTICED = {
    ("longformer", "w", 1): "w // 2 keys on each side: published windows are even",
    ("longformer_projected", "w", 1): "likewise",
    ("modernbert", "w", 1): "likewise",
    ("blockbert", "length", 1): "length // parts positions in a block: published lengths are multiples",
}
"""Changes of a parameter by one that no claim notices, because they change nothing."""


def text_of(name: str) -> str:
    return (EXAMPLES / f"{name}.attn").read_text(encoding="utf-8")


def published(name: str) -> Iterator[tuple[str, int, int, int]]:
    """The numbers of an example: parameter or `let`, value, start and end in its text."""
    module, _ = syntax.parse_partial(Source(name, text_of(name)))
    for item in module.items:
        if isinstance(item, ast.Definition) and item.word == "let" and not item.params:
            yield from numbers(item.name, item.body)
        if isinstance(item, ast.Definition | ast.AttentionDef):
            for param in item.params:
                yield from numbers(param.name, param.default)


def numbers(name: str, e: ast.Expression | None) -> Iterator[tuple[str, int, int, int]]:
    if isinstance(e, ast.Number) and isinstance(e.value, int):
        yield name, e.value, e.span.start, e.span.end
    if isinstance(e, ast.SetList):
        for member in e.items:
            yield from numbers(name, member)


PUBLISHED = [(name, *number) for name in NAMES for number in published(name)]


def holds(text: str, name: str) -> bool:
    """Whether no claim about the example is refuted by this text, and it is not refused."""
    try:
        program = attndsl.parse(text, name)
    except attndsl.AttnError:
        return False
    facts = name not in FACTS or FACTS[name](program)
    return facts and all(attndsl.prove(assertion).status != "refuted" for assertion in program.assertions)


@pytest.mark.parametrize("name", NAMES)
def test_assertions_are_proved(name: str) -> None:
    program = example(name)
    assert {a.text: v for a in program.assertions if (v := attndsl.prove(a)).status != "proved"} == {}
    assert program.assertions or name in FACTS
    assert name not in FACTS or FACTS[name](program)
    assert program.default() in program.names


def test_examples_are_formatted() -> None:
    for name in NAMES:
        assert syntax.format(text_of(name)) == text_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_attention_names_its_source(name: str) -> None:
    assert any(year in text_of(name).split("\n\n")[0] for year in map(str, range(2017, 2027)))


@pytest.mark.parametrize("step", [-1, 1])
@pytest.mark.parametrize(("name", "parameter", "value", "start", "end"), PUBLISHED)
def test_published_numbers_are_pinned(
    name: str, parameter: str, value: int, start: int, end: int, step: int
) -> None:
    text = text_of(name)
    changed = f"{text[:start]}{value + step}{text[end:]}"
    assert holds(changed, name) == ((name, parameter, step) in UNNOTICED)


def test_enough_numbers_are_pinned() -> None:
    assert len(NAMES) >= 33
    assert len(PUBLISHED) >= 43


Grid = NDArray[np.int64]
DOC = [0, 0, 0, 1, 1, 4, 4, 4, 4, 2]
PARENT = [0, 0, 2, 3, 1]
IMAGE = [-1, -1, 0, 0, 0, -1, 1, 1, -1, -1]


def moved_inside(p: Grid, side: int, r: int) -> Grid:
    return np.clip(p, r, side - 1 - r)


def copies(q: Grid, k: Grid) -> NDArray[np.bool_]:
    """Block diffusion of 6 tokens in blocks of 2."""
    noise_q, noise_k, block_q, block_k = q < 6, k < 6, q % 6 // 2, k % 6 // 2
    return np.where(
        noise_q, np.where(noise_k, block_q == block_k, block_k < block_q), ~noise_k & (block_k <= block_q)
    )


Definition = Callable[[Grid, Grid, Grid], NDArray[np.bool_]]


def same_image(q: Grid, k: Grid, h: Grid) -> NDArray[np.bool_]:
    image_q, image_k = np.take(IMAGE, q), np.take(IMAGE, k)
    return (k > q - 2) & ((k <= q) | (image_q == image_k) & (image_q >= 0))


def own_or_parent(q: Grid, k: Grid, h: Grid) -> NDArray[np.bool_]:
    doc_q, doc_k = np.take(DOC, q), np.take(DOC, k)
    return (doc_q == doc_k) & (k <= q) | (doc_k == np.take(PARENT, doc_q)) & (doc_k != doc_q)


DEFINITIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Definition]] = {
    "longformer": (
        {"w": 6, "globals": [0, 5]}, {}, lambda q, k, h: (abs(q - k) <= 3) | (q % 5 == 0) | (k % 5 == 0)
    ),
    "bigbird_etc": (
        {"b": 2, "g": 3}, {}, lambda q, k, h: (q < 3) | (k < 3) | (abs((q - 3) // 2 - (k - 3) // 2) <= 1)
    ),
    "sparse_transformer": ({"l": 3}, {}, lambda q, k, h: (k <= q) & ((q - k < 3) | ((q - k) % 3 == 0))),
    "enwik8": ({"l": 4, "c": 1}, {}, lambda q, k, h: (k <= q) & ((q // 4 == k // 4) | (k % 4 == 3))),
    "blockbert": ({"parts": 5, "length": 10}, {}, lambda q, k, h: (q // 2 + h) % 5 == k // 2),
    "log_sparse": ({}, {}, lambda q, k, h: np.isin(q - k, [0, 1, 2, 4, 8])),
    "mistral": ({"w": 3}, {}, lambda q, k, h: (k <= q) & (q - k < 3)),
    "streaming_llm": ({"sink": 2, "w": 3}, {}, lambda q, k, h: (k <= q) & ((q - k < 3) | (k < 2))),
    "llama4_chunked": ({"c": 4}, {}, lambda q, k, h: (k <= q) & (q // 4 == k // 4)),
    "gemma3_local": ({"w": 3}, {}, lambda q, k, h: (k <= q) & (k > q - 3)),
    "gpt_oss": ({"w": 3}, {}, lambda q, k, h: (k <= q) & (k > q - 3)),
    "prefix_lm": ({}, {"prefix": [4]}, lambda q, k, h: (k <= q) | (k < 4)),
    "packed": ({}, {"doc": DOC}, lambda q, k, h: (k <= q) & (np.take(DOC, q) == np.take(DOC, k))),
    "left_padding": ({}, {"pad": [3]}, lambda q, k, h: (k <= q) & (k >= 3)),
    "adaptive_span": ({}, {}, lambda q, k, h: k < q),
    "duo_attention": ({"sink": 1, "w": 2}, {}, lambda q, k, h: (k <= q) & ((h < 8) | (k < 1) | (q - k < 2))),
    "paligemma": ({"images": 2}, {"prompt": [3]}, lambda q, k, h: (k <= q) | (k < 5)),
    "gemma3_images": ({"w": 2}, {"image": IMAGE}, same_image),
    "alibi_blocks": ({"b": 4}, {}, lambda q, k, h: (k <= q) & (q // 4 == k // 4)),
    "shared_prefix": ({}, {"doc": DOC, "parent": PARENT}, own_or_parent),
    "etc": ({"g": 2, "r": 1}, {}, lambda q, k, h: (q < 2) | (k < 2) | (abs(q - k) <= 1)),
    "longformer_projected": (
        {"w": 6, "globals": [0, 5]}, {}, lambda q, k, h: (abs(q - k) <= 3) | (q % 5 == 0) | (k % 5 == 0)
    ),
    "etc_projected": ({"g": 2, "r": 1}, {}, lambda q, k, h: (q < 2) | (k < 2) | (abs(q - k) <= 1)),
    "differential": ({}, {}, lambda q, k, h: k <= q),
    "modernbert": ({"w": 4}, {}, lambda q, k, h: abs(q - k) <= 2),
}  # fmt: skip
"""An attention or pattern, its parameters, its tables for 10 positions, and what q, k and h it relates."""


@functools.cache
def all_programs() -> dict[str, Program]:
    """By the names that they define."""
    programs = {name: example(name) for name in NAMES}
    return {name: program for program in programs.values() for name in program.names}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_masks_are_what_numpy_says(name: str) -> None:
    params, inputs, definition = DEFINITIONS[name]
    n, heads = 10, 12
    q, k, h = np.arange(n)[:, None], np.arange(n), np.arange(heads)[:, None, None]
    expected = np.broadcast_to(definition(q, k, h), (heads, n, n))
    found = all_programs()[name][name](**params).mask(n, heads=heads, **inputs)
    assert (np.broadcast_to(found.reshape(-1, n, n), expected.shape) == expected).all()


def test_masks_that_take_more_than_a_line() -> None:
    programs = all_programs()
    q, k = np.arange(35)[:, None], np.arange(35)
    near = abs(k // 5 - moved_inside(q // 5, 7, 1)) <= 1
    found = programs["natten2d"]["natten"](7, 5, 1, 2).mask(35)[0]
    assert (found == near & (abs(k % 5 - moved_inside(q % 5, 5, 2)) <= 2)).all()
    assert (programs["natten2d"]["natten2d"](side=5, r=1).mask(25)[0].sum(1) == 9).all()

    small = attndsl.parse(
        text_of("block_diffusion").split("\nassert")[0].replace("1024", "6").replace("b = 4", "b = 2")
    )
    q, k = np.arange(12)[:, None], np.arange(12)
    assert (small["block_diffusion"].mask(12)[0] == copies(q, k)).all()

    charlm = programs["longformer_charlm"]["longformer_charlm"].mask(600, heads=3)
    q, k = np.arange(600)[:, None], np.arange(600)
    assert (charlm[1] == ((k <= q) & ((q - k) % 4 == 0) & (q - k < 4 * 512))).all()
    assert (charlm[2] == ((k <= q) & (q - k < 512))).all()


def test_big_bird_draws_r_blocks_that_nothing_else_covers() -> None:
    mask = all_programs()["bigbird"]["bigbird"](b=2, r=3).mask(48, heads=3)
    blocks = mask[:, ::2, ::2]
    assert (mask == np.repeat(np.repeat(blocks, 2, 1), 2, 2)).all()
    fixed = np.zeros((24, 24), bool)
    i = np.arange(24)
    fixed |= abs(i[:, None] - i) <= 1
    fixed[[0, -1]] = fixed[:, [0, -1]] = True
    assert (blocks & fixed == fixed).all()
    assert ((blocks & ~fixed).sum(2) == np.minimum(3, (~fixed).sum(1))).all()
    assert (blocks[0] != blocks[1]).any()


def logits(
    program: Program, name: str, n: int, head: int, heads: int, **tables: object
) -> NDArray[np.float64]:
    """The score at every pair where s and the inner product are 0, of one head."""
    constants = {"s": ir.const(0.0), "h": ir.const(head), "H": ir.const(heads), "D": ir.const(64)}
    score = program[name].attention.groups[0].score
    product = next((node for node in ir.nodes(score) if node.op == "inner"), None)
    score = ir.substitute(swapped(score, product, ir.const(0.0)), constants)
    q, k = np.arange(n)[:, None], np.arange(n)
    return pointwise.evaluate(score, q, k, {name: np.asarray(table) for name, table in tables.items()})


def swapped(e: ir.Expr, old: ir.Expr | None, new: ir.Expr) -> ir.Expr:
    done: dict[ir.Expr, ir.Expr] = {}
    for node in ir.nodes(e):
        done[node] = new if node is old else ir.rebuild(node, tuple(done[arg] for arg in node.args))
    return done[e]


SLOPES = {
    8: [2.0**-i for i in range(1, 9)],
    12: [2.0**-i for i in range(1, 9)] + [2.0**-x for x in (0.5, 1.5, 2.5, 3.5)],
    16: [2.0 ** (-i / 2) for i in range(1, 17)],
    20: [2.0 ** (-i / 2) for i in range(1, 17)] + [2.0**-x for x in (0.25, 0.75, 1.25, 1.75)],
}


@pytest.mark.parametrize("heads", SLOPES)
def test_alibi_slopes(heads: int) -> None:
    program = example("alibi")
    distance = abs(np.arange(9)[:, None] - np.arange(9))
    for head, slope in enumerate(SLOPES[heads]):
        np.testing.assert_allclose(logits(program, "alibi_lm", 9, head, heads), -slope * distance, rtol=1e-15)


def test_t5_buckets() -> None:
    """Half exact, half logarithmic; the encoder has a half for each direction."""
    program = example("t5")
    n = 300
    back = np.arange(n)
    causal = np.minimum(
        31, np.where(back < 16, back, 16 + np.log(np.maximum(back, 1) / 16) / np.log(8) * 16).astype(int)
    )
    found = logits(program, "t5_decoder", n, 0, 1, table=np.arange(32.0)[None])
    assert (found[-1][::-1] == causal).all()
    both = np.minimum(
        15, np.where(back < 8, back, 8 + np.log(np.maximum(back, 1) / 8) / np.log(16) * 8).astype(int)
    )
    found = logits(program, "t5", n, 0, 1, table=np.arange(32.0)[None])
    assert (found[-1][::-1] == both).all()
    assert (found[0][1:] == both[1:] + 16).all()


def test_adaptive_span_falls_over_32_positions() -> None:
    decay = example("adaptive_span")["adaptive_span"].attention.groups[0].decay
    assert decay is not None
    first = ir.substitute(decay, {"h": ir.const(0)})
    found = pointwise.evaluate(first, np.arange(100), np.asarray(0), {"z": np.asarray([20 / 8192])})
    np.testing.assert_allclose(found, np.clip((32 + 20 - np.arange(100)) / 32, 0, 1), atol=1e-12)


@pytest.mark.parametrize(("a", "far"), [(-1.0, 0.0), (2.0, 1 + np.e)])
def test_da_transformer_weighs_distances_between_its_limits(a: float, far: float) -> None:
    """(1 + e^b) / (1 + e^(b - a |q - k|)): 1 at no distance, at a great one 0 or 1 + e^b."""
    score = example("da_transformer")["da_transformer"].attention.groups[0].score
    inner = next(node for node in ir.nodes(score) if node.op == "inner")
    halved = ir.substitute(swapped(score, inner, ir.const(8.0)), {"D": ir.const(64), "h": ir.const(0)})
    found = pointwise.evaluate(
        halved, np.asarray([0, 200]), np.asarray(0), {"a": np.asarray(a), "b": np.asarray(1.0)}
    )
    np.testing.assert_allclose(found, [1.0, far], atol=1e-12)
    clipped = ir.substitute(swapped(score, inner, ir.const(-8.0)), {"D": ir.const(64), "h": ir.const(0)})
    assert (
        pointwise.evaluate(clipped, np.asarray(3), np.asarray(0), {"a": np.asarray(a), "b": np.asarray(1.0)})
        == 0
    )
