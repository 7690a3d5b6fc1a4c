"""Figures that papers and their code publish, or that follow from their definitions, against the analyzer."""

from __future__ import annotations

import numpy as np
import pytest
import shipped

import attndsl
from attndsl.analysis.field import receptive_field


def example(file: str, name: str) -> attndsl.Bound:
    found = shipped.example(file)[name]
    assert isinstance(found, attndsl.Bound)
    return found


def nnz(attention: attndsl.Bound, length: int, heads: int | None = None) -> int:
    """Live pairs, which the formula must give as well where it holds."""
    count = attndsl.analyze(attention, length=length, heads=heads, parts=["nnz"]).nnz
    assert count is not None
    assert count.value is not None
    return count.value


@pytest.mark.parametrize(("globals_", "pairs"), [([], 2_035_456), ([0], 2_043_134), (range(64), 2_522_816)])
def test_longformer(globals_: object, pairs: int) -> None:
    """Beltagy et al. 2020, section 3.1, w = 512 at n = 4096, with 0, 1 and 64 global tokens."""
    assert nnz(example("longformer", "longformer")(globals=globals_), 4096) == pairs


@pytest.mark.parametrize(("length", "blocks"), [(1024, 142), (2048, 302), (3072, 462), (4096, 622)])
def test_big_bird(length: int, blocks: int) -> None:
    """Zaheer et al. 2020, section 2 and the base model's table: distinct blocks of 64."""
    assert nnz(example("bigbird", "bigbird"), length, heads=1) == blocks * 64 * 64


@pytest.mark.parametrize(
    ("name", "length", "pairs"),
    [
        ("sparse_transformer", 3072, 420_416),
        ("sparse_transformer", 12288, 2_148_416),
        ("sparse_transformer", 16384, 3_129_408),
        ("enwik8", 3072, 1_328_640),
        ("enwik8", 12288, 19_470_336),
        ("enwik8", 16384, 34_349_056),
    ],
)
def test_sparse_transformer(name: str, length: int, pairs: int) -> None:
    """Child et al. 2019, section 4.3: both factors united, strided with l = 128, fixed with c = 32."""
    assert nnz(example("sparse_transformer", name), length) == pairs


@pytest.mark.parametrize(
    ("first", "second", "complete"),
    [
        ("last(16)", "{ q, k : k <= q and (q - k) mod 16 == 0 }", True),
        ("{ q, k : k <= q and (q - k) mod 16 == 0 }", "last(16)", True),
        ("causal & block(16)", "{ q, k : k <= q and k mod 16 >= 12 }", False),
    ],
)
def test_two_hops(first: str, second: str, complete: bool) -> None:
    """The factors in layers of their own, without a residual: strided is complete in either order; fixed is
    not, for queries before the first summary have no key there (Child et al. 2019, section 4.3)."""
    text = f"assert causal <= ({second}) @ ({first})"
    ((_, verdict),) = attndsl.parse(text).check()
    assert (verdict.status == "proved") is complete
    assert (verdict.status == "refuted") is not complete


@pytest.mark.parametrize("name", ["sparse_transformer", "enwik8"])
def test_the_united_factors_are_complete_in_two_layers(name: str) -> None:
    found = receptive_field(example("sparse_transformer", name).attention, 12288)
    assert (found.target, found.full_after) == ("causal", 2)
    assert found.for_every_n is not None


def test_etc() -> None:
    """Ainslie et al. 2020, section 3.1: 230 global tokens before 4,096, radius 84."""
    report = attndsl.analyze(example("etc", "etc"), length=4326, parts=["nnz", "reach"])
    assert report.nnz is not None
    assert report.nnz.value == 2_622_144
    assert report.density == pytest.approx(0.140, abs=5e-4)
    assert report.diameter == 2


@pytest.mark.parametrize("length", [1, 2, 24, 96, 2**12, 2**20])
def test_log_sparse(length: int) -> None:
    """Li et al. 2019, section 4.2: a position sees itself and those a power of two before it."""
    pairs = length + sum(position.bit_length() for position in range(length))
    assert nnz(example("log_sparse", "log_sparse"), length) == pairs


@pytest.mark.parametrize(("parts", "length"), [(2, 512), (3, 510), (4, 512)])
def test_blockbert(parts: int, length: int) -> None:
    """Qiu et al. 2020, section 3: a head has N^2 / n of the pairs."""
    attention = example("blockbert", "blockbert")(parts=parts, length=length)
    for heads in (1, parts):
        assert nnz(attention, length, heads) == heads * length**2 // parts


def test_blocks_in_a_given_order() -> None:
    """Qiu et al. 2020, section 3: query block i sees the key block that a permutation gives it, here among
    16,384 blocks."""
    order = np.random.default_rng(0).permutation(2**14)
    pattern = attndsl.parse("pattern p(order) = blocks(64, { q, k : order[q] == k })")["p"](order=order)
    (grid,) = pattern.block_mask(2**20, 64).grids
    assert (grid.run_start == order).all()
    assert (grid.run_end == order + 1).all()
    assert grid.nnz == 2**20 * 64
    halves = pattern.block_mask(2**20)
    assert halves.nnz == 2**20 * 64
    assert len(halves.grids[0].masks) < 16


@pytest.mark.parametrize(("radius", "length"), [(1, 9), (3, 100), (256, 4096)])
def test_diameters(radius: int, length: int) -> None:
    """A global token makes any pattern two layers deep; a window alone takes ceil((n - 1) / r)."""
    program = attndsl.parse("pattern alone(r = 1) = radius(r)  pattern hub(r = 1) = radius(r) | global([5])")
    alone, hub = (
        attndsl.analyze(program[name](r=radius), length=length, parts=["reach"]).diameter
        for name in ("alone", "hub")
    )
    assert alone == -(-(length - 1) // radius)
    assert hub == 2


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("last(4096)", 4096),
        ("last(2044) | causal & sinks(4)", 2048),
        ("causal & block(8192)", 8192),
        ("strided(128)", None),
        ("fixed(128, 32)", 32_864),
    ],
)
def test_keys_that_decoding_holds(pattern: str, keys: int | None) -> None:
    """At n = 131,072: w; s + w (Xiao et al. 2024, section 3.2); the chunk; everything; and for the fixed
    pattern of Child et al. 2019 its summaries and the block."""
    length = 131_072
    attention = attndsl.parse(f"pattern p = {pattern}")["p"]
    cache = attndsl.analyze(attention, length=length, parts=["kv_cache"]).kv_cache
    assert cache is not None
    if keys is None:
        assert cache.rule == "keep everything"
        assert cache.minimum > length - 128
    else:
        assert cache.minimum == keys


def test_density_is_what_the_mask_says() -> None:
    mask = example("bigbird", "bigbird").mask(500)
    report = attndsl.analyze(example("bigbird", "bigbird"), length=500, heads=1, parts=["nnz"])
    assert report.density == pytest.approx(np.mean(mask))
