"""Tiles against pointwise evaluation at every pair, and against torch's own BlockMask."""

from __future__ import annotations

import random

import numpy as np
import pytest

from attndsl.errors import AttnError
from attndsl.expr import (
    FALSE,
    TRUE,
    Expr,
    IntSet,
    Table,
    absolute,
    add,
    all_of,
    any_of,
    call,
    const,
    count_of,
    eq,
    exists,
    floordiv,
    inset,
    intable,
    le,
    lookup,
    lt,
    maximum,
    minimum,
    mod,
    mul,
    negate,
    nodes,
    power,
    random_keys,
    rank_of,
    sub,
    substitute,
    var,
    where,
)
from attndsl.meaning import pointwise
from attndsl.meaning.links import absorb, sample
from attndsl.tiles import abstract, tiling
from attndsl.tiles.abstract import EMPTY, FULL, PARTIAL
from attndsl.tiles.blockmask import BlockMask, TileGrid, tile_codes
from attndsl.tiles.kinds import kinds
from attndsl.tiles.tiling import tile

Q, K = var("q"), var("k")

DOC = Table("doc", "int", (97,))
IDS = Table("ids", "int", (40,))
FLAGS = Table("flags", "bool", (50,))
CANVAS = Table("canvas", "bool", (30, 60))
ROUTES = Table("routes", "int", (20, 30))
ORDER = Table.listed([(37 * i + i * i) % 41 - 3 for i in range(320)])
CHOSEN = Table("chosen", "int", (40, 3))
CHOSEN_BY_TOKEN = Table("chosen_by_token", "int", (320, 2))
CHOSEN_BY_HEAD = Table("chosen_by_head", "int", (2, 40, 2))


def tables(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "doc": np.sort(rng.integers(0, 5, 97)),
        "ids": rng.integers(-5, 60, 40),
        "flags": rng.random(50) < np.repeat(rng.random(5), 10),
        "canvas": rng.random((30, 60)) < np.repeat(rng.random((30, 6)), 10, axis=1) ** 3,
        "routes": rng.integers(0, 4, (20, 30)),
        "chosen": rng.integers(-1, 40, (40, 3)),
        "chosen_by_token": rng.integers(-1, 320, (320, 2)),
        "chosen_by_head": rng.integers(0, 40, (2, 40, 2)),
    }


class Masks:
    """Random expressions in which every node that a mask can hold occurs."""

    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def integer(self, depth: int) -> Expr:
        r = self.r
        if depth == 0 or r.random() < 0.15:
            return r.choice([Q, K, Q, K, const(r.randint(-9, 70))])
        x = self.integer(depth - 1)
        match r.randint(0, 15):
            case 0 | 1:
                return add(x, self.integer(depth - 1))
            case 2 | 3:
                return sub(x, self.integer(depth - 1))
            case 4:
                return mul(const(r.choice([-3, -1, 2, 5])), x)
            case 5 | 6:
                return floordiv(x, const(r.choice([2, 3, 8, 20, 64])))
            case 7 | 8:
                return mod(x, const(r.choice([2, 3, 7, 8, 16, 50, 128])))
            case 9:
                return minimum(x, self.integer(depth - 1))
            case 10:
                return maximum(x, self.integer(depth - 1))
            case 11:
                return absolute(x)
            case 12:
                return where(self.truth(depth - 1), x, self.integer(depth - 1))
            case 13:
                base = r.choice([const(r.randint(-3, 4)), sub(mod(x, const(7)), const(r.randint(0, 3)))])
                exponent = r.choice([mod(self.integer(depth - 1), const(5)), const(r.randint(0, 3))])
                squared = power(x, const(2))
                return r.choice([mul(x, self.integer(depth - 1)), squared, power(base, exponent, True)])
            case 14:
                return r.choice([call("isqrt", absolute(x)), call("log2", maximum(x, const(1)))])
            case _:
                return r.choice(
                    [
                        lookup(DOC, mod(x, const(97))),
                        lookup(ORDER, mod(x, const(r.choice([4, 97])))),
                        lookup(IDS, minimum(maximum(x, const(0)), const(39))),
                        lookup(ROUTES, mod(x, const(20)), mod(self.integer(depth - 1), const(30))),
                        rank_of(DOC, mod(x, const(97))),
                        count_of(DOC, mod(x, const(97))),
                    ]
                )

    def truth(self, depth: int) -> Expr:
        r = self.r
        if depth > 0 and r.random() < 0.5:
            parts = [self.truth(depth - 1) for _ in range(r.randint(2, 3))]
            return r.choice([all_of, any_of, lambda *p: negate(any_of(*p))])(*parts)
        x, y = self.integer(depth), self.integer(depth)
        match r.randint(0, 13):
            case 0 | 1 | 2:
                return le(x, y)
            case 3:
                return le(x, r.choice([mul(const(0.5), y), const(7.5)]))
            case 4 | 5:
                return eq(x, y)
            case 6:
                return lt(absolute(x), const(r.randint(1, 60)))
            case 7:
                return inset(x, IntSet.of((p, p + r.randint(0, 9)) for p in r.sample(range(-20, 300), 9)))
            case 8:
                return lookup(FLAGS, r.choice([x, Q, K, sub(Q, K)]))
            case 9:
                return lookup(CANVAS, r.choice([x, Q, K]), r.choice([y, Q, K]))
            case 10 | 11:
                return self.links()
            case 12:
                return all_of(le(const(0), x), lt(x, const(40)), eq(lookup(IDS, x), mod(y, const(20))))
            case _:
                b = const(r.choice([3, 8, 16, 30]))
                n = const(20)
                of = r.choice(
                    [TRUE, le(var("i"), var("j")), eq(mod(var("i"), const(3)), mod(var("j"), const(3)))]
                )
                rows = r.choice([(Q, K), (K, Q)])
                rows = r.choice([rows, rows, (mod(Q, const(11)), mod(K, const(12)))])
                return random_keys(
                    floordiv(rows[0], b),
                    floordiv(rows[1], b),
                    n,
                    const(r.randint(-2, 3)),
                    of,
                    r.randint(1, 4),
                    "i",
                    "j",
                )

    def links(self) -> Expr:
        r = self.r
        b, c = const(r.choice([8, 12, 16, 30])), const(r.choice([1, 3, 8, 16]))
        return r.choice(
            [
                intable(floordiv(K, b), CHOSEN, floordiv(Q, b)),
                intable(floordiv(Q, c), CHOSEN, floordiv(K, b)),
                intable(add(floordiv(add(K, const(5)), c), const(2)), CHOSEN, floordiv(Q, const(9))),
                intable(K, CHOSEN_BY_TOKEN, Q),
                eq(floordiv(K, b), lookup(ORDER, floordiv(Q, c))),
                eq(add(lookup(ORDER, Q), const(-2)), floordiv(K, c)),
                eq(lookup(CHOSEN_BY_TOKEN, K, const(1)), Q),
                intable(floordiv(K, b), CHOSEN_BY_HEAD, const(1), floordiv(Q, b)),
                intable(mod(K, const(20)), CHOSEN, mod(Q, const(40))),
            ]
        )


def dense(
    mask: Expr, nq: int, n: int, q_offset: int, k_offset: int, tables: dict[str, np.ndarray]
) -> np.ndarray:
    q, k = np.arange(nq)[:, None] + q_offset, np.arange(n)[None] + k_offset
    return np.asarray(pointwise.evaluate(mask, q, k, tables))


def check(mask: Expr, nq: int, n: int, size: int, q_offset: int = 0, k_offset: int = 0) -> TileGrid:
    data = tables()
    places = {"q": add(Q, const(q_offset)), "k": add(K, const(k_offset))}
    moved = substitute(mask, places)
    grid = tile(moved, nq, n, size, n=n + k_offset, tables=data)
    found = kinds(moved, nq, n, size, n=n + k_offset, tables=data)
    np.testing.assert_array_equal(found, np.array([EMPTY, FULL, PARTIAL])[np.minimum(tile_codes(grid, 0), 2)])
    expected = dense(mask, nq, n, q_offset, k_offset, data)
    np.testing.assert_array_equal(grid.to_dense(), expected)
    assert grid.nnz == expected.sum()
    np.testing.assert_array_equal(grid.row_counts(), expected.sum(axis=1))
    check_form(grid, expected)
    return grid


def check_form(grid: TileGrid, expected: np.ndarray) -> None:
    """Sorted, disjoint, merged runs; whole tiles full, and nothing that is full, empty or double stored."""
    size, (rows, cols) = grid.block_size, grid.shape
    padded = np.zeros((rows * size, cols * size), bool)
    padded[: grid.nq, : grid.n] = expected
    live = padded.reshape(rows, size, cols, size).sum(axis=(1, 3))
    assert (grid.tiles.full, grid.tiles.partial) == (
        (live == size**2).sum(),
        ((live > 0) & (live < size**2)).sum(),
    )
    for row in range(rows):
        run = slice(grid.run_ptr[row], grid.run_ptr[row + 1])
        part = slice(grid.part_ptr[row], grid.part_ptr[row + 1])
        assert (grid.run_start[run] < grid.run_end[run]).all()
        assert (grid.run_end[run][:-1] < grid.run_start[run][1:]).all()
        assert (np.diff(grid.part_col[part]) > 0).all()
    assert len({content.tobytes() for content in grid.masks}) == len(grid.masks)
    assert set(grid.part_mask.tolist()) == set(range(len(grid.masks)))
    arrays = (grid.run_ptr, grid.run_start, grid.run_end, grid.part_ptr, grid.part_col, grid.part_mask)
    assert all(array.dtype == np.int32 for array in arrays)
    assert (grid.run_ptr[-1], grid.part_ptr[-1]) == (len(grid.run_start), len(grid.part_col))


SHAPES = [
    (300, 300, 0, 0),
    (1, 300, 299, 0),
    (64, 200, 100, 0),
    (250, 77, 13, 40),
    (17, 33, 0, 5),
    (128, 256, 128, 0),
]
SEEDS = range(160)
OPERATORS = (
    "const var lookup count_of rank_of intable inset random add mul floordiv mod pow min max abs where "
    "log2 isqrt and or not le lt eq"
)


def random_mask(seed: int) -> Expr:
    return Masks(seed).truth(1 + seed % 3)


def many_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices are divided as often as large ones."""
    monkeypatch.setattr(tiling, "FIRST_FANOUT", 2)
    monkeypatch.setattr(tiling, "FEW_POINTS", 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_masks_equal_pointwise_evaluation(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = random.Random(seed)
    if r.random() < 0.7:
        many_levels(monkeypatch)
    nq, n, q_offset, k_offset = r.choice(SHAPES)
    check(random_mask(seed), nq, n, r.choice([8, 16, 24, 32, 64, 128]), q_offset, k_offset)


def test_the_random_masks_hold_every_operator() -> None:
    assert {node.op for seed in SEEDS for node in nodes(random_mask(seed))} >= set(OPERATORS.split())


def band(lo: int, hi: int) -> Expr:
    return all_of(le(const(lo), sub(K, Q)), le(sub(K, Q), const(hi)))


CAUSAL = le(K, Q)
NEIGHBOURS = all_of(
    le(
        absolute(sub(floordiv(K, const(20)), minimum(maximum(floordiv(Q, const(20)), const(2)), const(12)))),
        const(2),
    ),
    le(absolute(sub(mod(K, const(20)), minimum(maximum(mod(Q, const(20)), const(3)), const(16)))), const(3)),
)
PATTERNS = {
    "window": band(-25, 25),
    "longformer": any_of(band(-25, 25), eq(Q, const(0)), eq(K, const(0)), eq(K, const(150))),
    "streaming": all_of(CAUSAL, any_of(band(-40, 0), lt(K, const(4)))),
    "chunked": all_of(CAUSAL, eq(floordiv(Q, const(50)), floordiv(K, const(50)))),
    "dilated": all_of(band(-60, 60), eq(mod(sub(Q, K), const(4)), const(0))),
    "neighbourhood": NEIGHBOURS,
    "strided": all_of(CAUSAL, any_of(band(-31, 0), eq(mod(sub(Q, K), const(32)), const(0)))),
    "fixed": all_of(
        CAUSAL, any_of(eq(floordiv(Q, const(32)), floordiv(K, const(32))), le(const(28), mod(K, const(32))))
    ),
    "documents": all_of(CAUSAL, eq(lookup(DOC, minimum(Q, const(96))), lookup(DOC, minimum(K, const(96))))),
    "causal less random": all_of(CAUSAL, negate(random_keys(Q, K, const(300), const(1), TRUE, 30, "i", "j"))),
    "powers of a negative number": le(power(const(-3), mod(sub(Q, K), const(5)), True), const(-4)),
    "powers of both signs": eq(
        power(sub(mod(Q, const(5)), const(2)), floordiv(K, const(60)), True), mod(K, const(9))
    ),
    "log-sparse": all_of(lt(K, Q), eq(power(const(2), call("log2", sub(Q, K)), True), sub(Q, K))),
    "everything": TRUE,
    "nothing": FALSE,
    "contradiction": all_of(
        eq(mod(Q, const(2)), const(0)), eq(mod(add(Q, mul(const(2), K)), const(2)), const(1))
    ),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("nq", "n", "q_offset", "size"), [(300, 300, 0, 16), (300, 300, 0, 128), (44, 300, 256, 64)]
)
def test_patterns_equal_pointwise_evaluation(
    name: str, nq: int, n: int, q_offset: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(PATTERNS[name], nq, n, size, q_offset)
    many_levels(monkeypatch)
    check(PATTERNS[name], nq, n, size, q_offset)


@pytest.mark.parametrize("few", [2**17, 0])
@pytest.mark.parametrize(
    ("nq", "n", "size", "q_offset", "k_offset"),
    [
        (320, 320, 64, 0, 0),
        (160, 224, 64, 64, 96),
        (96, 288, 24, 0, 24),
        (300, 300, 40, 0, 0),
        (64, 96, 8, 16, 0),
    ],
)
def test_masks_of_cells_equal_pointwise_evaluation(
    nq: int, n: int, size: int, q_offset: int, k_offset: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells of 4 or 8, where the tiles and the matrix are whole cells or not."""
    monkeypatch.setattr(tiling, "FEW_POINTS", few)
    q, k = floordiv(Q, const(16)), floordiv(add(K, const(4)), const(8))
    near = all_of(le(const(-3), sub(k, mul(const(2), q))), le(sub(k, mul(const(2), q)), const(2)))
    drawn = random_keys(
        q, k, const((n + k_offset) // 8 + 2), const(1), negate(eq(var("j"), const(3))), 2, "i", "j"
    )
    for mask in (
        near,
        any_of(near, drawn),
        all_of(near, negate(drawn)),
        negate(any_of(eq(q, const(1)), drawn)),
    ):
        check(mask, nq, n, size, q_offset, k_offset)
    for first_q, first_k, side in ((0, 0, 4), (0, 4, 8), (8, 4, 8), (2, 4, 2)):
        moved = {"q": add(Q, const(first_q)), "k": add(K, const(first_k))}
        assert tiling.cell_size(substitute(near, moved), tiling.Frame(64, 64), 64) == side
    assert tiling.cell_size(all_of(near, CAUSAL), tiling.Frame(64, 64), 64) == 1


@pytest.mark.parametrize("nq", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17])
def test_tiny_sizes(nq: int, n: int) -> None:
    check(CAUSAL, nq, n, 8)
    check(TRUE, nq, n, 16)


def test_a_contradiction_leaves_no_tile() -> None:
    assert check(PATTERNS["contradiction"], 300, 300, 32).entries == 0


EVEN = lt(mod(Q, const(8)), const(4))
KEYS = {
    "which branch was taken": le(where(lt(Q, const(64)), Q, K), const(40)),
    "the key of the second branch": le(where(lt(Q, const(64)), Q, mod(K, const(10))), const(4)),
    "how far the branches are apart": le(where(EVEN, K, const(40)), K),
    "the second edge of a set": inset(Q, IntSet(((0, 0), (20, 24), (36, 42), (70, 70), (100, 101)))),
    "whether a connective is decided": any_of(
        all_of(EVEN, lt(Q, const(64))), all_of(EVEN, lt(mod(add(Q, K), const(8)), const(3)))
    ),
}


@pytest.mark.parametrize("part", KEYS)
def test_each_part_of_a_key_is_needed(part: str) -> None:
    """Masks with tiles that differ in this part of their key alone."""
    check(KEYS[part], 128, 128, 16)


def test_contents_do_not_grow_with_n() -> None:
    for name in ("window", "streaming", "dilated", "strided", "fixed"):
        short, long = (tile(PATTERNS[name], n, n, 64, n=n) for n in (2**12, 2**16))
        assert len(short.masks) == len(long.masks), name


def test_an_int_table_out_of_its_range_is_refused_unless_guarded() -> None:
    data = {"ids": np.arange(40)}
    with pytest.raises(AttnError, match="ids"):
        tile(le(lookup(IDS, Q), const(100)), 64, 64, 16, n=64, tables=data)
    with pytest.raises(AttnError, match="ids"):
        tile(le(mod(lookup(IDS, Q), const(2)), const(5)), 64, 64, 16, n=64, tables=data)
    with pytest.raises(AttnError, match="chosen"):
        tile(intable(K, CHOSEN, Q), 64, 64, 16, n=64, tables=tables())
    check(all_of(lt(Q, const(40)), le(lookup(IDS, Q), K)), 64, 64, 16)
    check(all_of(lt(Q, const(40)), intable(K, CHOSEN, Q)), 64, 64, 16)
    outside = mod(lookup(ROUTES, const(99), Q), const(3))
    check(all_of(lt(K, const(0)), eq(outside, const(1))), 64, 64, 16)


def test_a_negative_exponent_is_refused_unless_guarded() -> None:
    exponent = sub(mod(Q, const(16)), const(3))
    raised = eq(power(const(2), exponent, True), add(K, const(1000)))
    with pytest.raises(AttnError, match="a power to -3 is no integer"):
        tile(raised, 3, 64, 64, n=64)
    check(all_of(le(const(0), exponent), raised), 14, 64, 64)


def test_a_look_up_is_not_read_in_boxes_within_a_tile_that_are_decided() -> None:
    mask = any_of(le(const(32), K), lt(lookup(IDS, K), const(5)))
    for n in (128, 2048):
        assert tile(mask, n, n, 128, n=n, tables={"ids": np.arange(40)}).nnz == n * (n - 32 + 5)


def test_a_draw_among_a_table_is_guarded_where_its_row_lies_outside() -> None:
    row = sub(Q, const(2))
    of = eq(lookup(DOC, var("i")), lookup(DOC, var("j")))
    drawn = random_keys(row, K, const(97), const(0), of, 2, "i", "j")
    inside = all_of(le(const(0), row), lt(row, const(97)))
    assert check(all_of(inside, drawn), 97, 97, 8).nnz == 2 * 95


def test_a_product_of_relations_is_searched_up_to_a_limit() -> None:
    step = all_of(le(mul(var("m"), var("m")), Q), eq(mod(add(var("m"), K), const(7)), const(0)))
    mask = exists("m", const(0), const(40), step)
    check(mask, 40, 40, 8)
    with pytest.raises(AttnError, match="the limit is 1,073,741,824"):
        tile(mask, 2000, 2000, 128, n=2000)


@pytest.mark.parametrize(("longest", "known"), [(0, 1), (2, 40), (2, 2**22)])
def test_numbered_keys_equal_pointwise_evaluation(
    longest: int, known: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abstract, "KEY_LIMIT", longest)
    monkeypatch.setattr(abstract, "KNOWN_LIMIT", known)
    monkeypatch.setattr(tiling, "CHUNK", 64)
    many_levels(monkeypatch)
    for mask in (*map(random_mask, range(0, 160, 7)), *KEYS.values()):
        check(mask, 250, 77, 16, 13, 40)


def test_keys_of_many_columns_still_tell_equal_boxes() -> None:
    combs = any_of(*(eq(mod(sub(Q, K), const(512)), const(7 * i)) for i in range(70)))
    assert len(tile(combs, 2**17, 2**17, 64, n=2**17).masks) == 8


def test_shared_parts_do_not_double_keys() -> None:
    plus, minus = Q, mul(const(-1), Q)
    for _ in range(40):
        plus, minus = (
            minimum(add(plus, const(1)), absolute(minus)),
            minimum(add(minus, const(1)), absolute(plus)),
        )
    check(le(plus, K), 150, 150, 32)


def test_entries_are_counted_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    expand, counted = tiling.expand, []

    def counting(levels: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
        parts, runs = expand(levels, width)
        contents = max(int(level.max(initial=0)) for level in levels)
        count = tiling.entries(levels, contents)
        counted.append((count, parts.shape[1] + runs.shape[1]))
        return parts, runs

    monkeypatch.setattr(tiling, "expand", counting)
    for mask in (*map(random_mask, range(20)), *PATTERNS.values()):
        check(mask, 300, 300, 8)
    assert len(counted) > 30
    assert all(count == written for count, written in counted)


def test_limits_are_named() -> None:
    with pytest.raises(AttnError, match="tiles and runs of tiles; the limit is 16,777,216"):
        tile(all_of(CAUSAL, eq(mod(sub(Q, K), const(3)), const(0))), 2**20, 2**20, 128, n=2**20)
    with pytest.raises(AttnError, match="random draws 5,000 keys"):
        tile(random_keys(Q, K, const(10_000), const(0), TRUE, 5000, "i", "j"), 10_000, 10_000, 128, n=10_000)
    with pytest.raises(AttnError, match="limit"):
        tile(eq(mod(mul(Q, K), const(1_000_003)), const(0)), 2**20, 2**20, 128, n=2**20)
    with pytest.raises(AttnError, match="multiple of 8"):
        tile(CAUSAL, 64, 64, 12, n=64)


def test_the_hash_of_random_is_splitmix64() -> None:
    state = np.zeros(1, np.uint64)
    assert absorb(state, np.array([0]))[0] == 0xE220A8397B1DCDAF


def test_drawn_numbers_are_distinct_rising_and_in_range() -> None:
    candidates = np.array([0, 1, 3, 4, 5, 50, 2**40])
    drawn = sample(np.full(7, 3), np.arange(7), candidates, 4)
    for row, c in zip(drawn, candidates, strict=True):
        found = row[row >= 0]
        assert len(found) == min(4, c)
        assert (np.diff(found) > 0).all()
        assert (found < c).all()
        assert (row[len(found) :] == -1).all()


def test_draws_are_uniform_and_do_not_depend_on_other_rows() -> None:
    rows = np.arange(20_000)
    drawn = sample(np.zeros(20_000, int), rows, np.full(20_000, 10), 3)
    share = np.bincount(drawn.ravel(), minlength=10) / 60_000
    assert abs(share - 0.1).max() < 0.01
    np.testing.assert_array_equal(sample(np.array([0]), np.array([777]), np.array([10]), 3)[0], drawn[777])


def test_select_inverts_rank() -> None:
    grid = check(PATTERNS["streaming"], 300, 300, 16)
    row, col = np.nonzero(grid.to_dense())
    rank = np.arange(len(row)) - np.repeat(
        np.cumsum(grid.row_counts()) - grid.row_counts(), grid.row_counts()
    )
    np.testing.assert_array_equal(grid.select(row, rank), col)


def flex_lists(mask: object, row: int) -> tuple[set[int], set[int]]:
    parts = mask.kv_indices[0, 0, row][: mask.kv_num_blocks[0, 0, row]]  # type: ignore[attr-defined]
    full = mask.full_kv_indices[0, 0, row][: mask.full_kv_num_blocks[0, 0, row]]  # type: ignore[attr-defined]
    return set(parts.tolist()), set(full.tolist())


@pytest.mark.parametrize(
    "name", ["window", "longformer", "strided", "neighbourhood", "everything", "nothing"]
)
@pytest.mark.parametrize(("nq", "n"), [(256, 256), (300, 300), (100, 333)])
def test_tiles_equal_those_of_torch(name: str, nq: int, n: int) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_block_mask, create_mask

    expected = torch.from_numpy(np.array(dense(PATTERNS[name], nq, n, 0, 0, tables())))
    grid = tile(PATTERNS[name], nq, n, 32, n=n)
    ours = BlockMask(nq, n, 32, (grid,), np.zeros((1, 1), np.int32)).to_flex()
    theirs = create_block_mask(lambda b, h, q, k: expected[q, k], None, None, nq, n, "cpu", BLOCK_SIZE=32)
    assert ours.shape == theirs.shape
    for row in range(grid.shape[0]):
        assert flex_lists(ours, row) == flex_lists(theirs, row)
    assert torch.equal(create_mask(ours.mask_mod, 1, 1, nq, n, "cpu")[0, 0], expected)


def test_a_block_mask_sums_over_batch_rows_and_heads() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.attention.flex_attention import create_mask

    grids = tuple(tile(PATTERNS[name], 100, 100, 16, n=100) for name in ("window", "strided"))
    mask = BlockMask(100, 100, 16, grids, np.array([[0, 1, 1], [1, 1, 0]], np.int32))
    whole = mask.to_dense()
    assert whole.shape == (2, 3, 100, 100)
    assert mask.nnz == whole.sum()
    assert mask.density == whole.mean()
    assert sum(mask.tiles[:3]) == 6 * 49
    np.testing.assert_array_equal(mask.row_counts(), whole.sum(axis=-1))
    np.testing.assert_array_equal(mask.empty_rows(), ~whole.any(axis=-1))
    flex = create_mask(mask.to_flex().mask_mod, 2, 3, 100, 100, "cpu")
    assert torch.equal(flex, torch.from_numpy(np.ascontiguousarray(whole)))
