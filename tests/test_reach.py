from __future__ import annotations

import numpy as np
import pytest
from random_masks import DOC, Masks, truths

from attndsl import expr as x
from attndsl.errors import AttnError
from attndsl.expr import Expr, all_of, any_of, const, eq, le, lt, negate, sub, var
from attndsl.layers.powers import diameter
from attndsl.layers.reach import common_divisor, matrix_product, packed, product, reach
from attndsl.meaning.pointwise import evaluate
from attndsl.relations.proofs import equal, subset

Q, K, N = var("q"), var("k"), var("n")
CAUSAL = le(K, Q)


def band(low: int, high: int, step: int = 1) -> Expr:
    distance = sub(K, Q)
    return all_of(
        le(const(low), distance), le(distance, const(high)), eq(x.mod(distance, const(step)), x.ZERO)
    )


def rows_and_columns(*positions: int) -> Expr:
    return any_of(*(any_of(eq(Q, const(p)), eq(K, const(p))) for p in positions))


STRIDED = all_of(CAUSAL, any_of(lt(sub(Q, K), const(4)), band(-(2**40), 0, 4)))
BLOCKS = eq(x.floordiv(Q, const(3)), x.floordiv(K, const(3)))
PATTERNS = {
    "window": band(-2, 0),
    "two-sided": band(-1, 2),
    "dilated": band(-6, 0, 3),
    "strided": STRIDED,
    "every second": eq(x.mod(sub(Q, K), const(2)), x.ZERO),
    "both signs": any_of(eq(sub(K, Q), const(3)), eq(sub(K, Q), const(-5))),
    "uneven sides": any_of(band(-(2**40), 0, 2), band(0, 3)),
    "future": all_of(lt(Q, K), eq(x.mod(sub(K, Q), const(3)), x.ONE)),
    "global": any_of(band(-1, 1), rows_and_columns(0)),
    "blocks": BLOCKS,
    "nothing": x.FALSE,
    "links": x.random_keys(Q, K, N, x.ZERO, le(var("col"), var("row")), 2, "row", "col"),
    "links among window": any_of(band(-1, 0), x.random_keys(Q, K, N, x.ZERO, x.TRUE, 1, "row", "col")),
    "an offset per head": eq(x.mod(sub(Q, K), const(3)), x.mod(var("h"), const(2))),
}


def union(mask: Expr, n: int, heads: int = 2) -> np.ndarray:
    """The pairs that some head relates, and each position with itself."""
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    closed = [x.substitute(mask, {"n": const(n), "h": const(h), "H": const(heads)}) for h in range(heads)]
    return np.any([evaluate(e, q, k) for e in closed], axis=0) | np.eye(n, dtype=bool)


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("name", PATTERNS)
def test_reach_is_the_power(name: str, layers: int) -> None:
    far = reach(PATTERNS[name], layers)
    bound = any(e.op == "exists" for e in x.nodes(far))
    for n in (0, 1, 5) if bound else (0, 1, 5, 9, 14):
        power = np.linalg.matrix_power(union(PATTERNS[name], n).astype(object), layers) > 0
        assert (union(far, n) == power).all(), (n, far)


@pytest.mark.parametrize("n", [1, 2, 7, 70])
@pytest.mark.parametrize("name", PATTERNS)
def test_diameter_is_where_the_powers_stop(name: str, n: int) -> None:
    step = union(PATTERNS[name], n)
    count, power = 0, np.eye(n, dtype=bool)
    while not (power == (more := power @ step)).all():
        count, power = count + 1, more
    assert diameter(PATTERNS[name], n, heads=2) == count


def test_products_of_random_matrices() -> None:
    rng = np.random.default_rng(0)
    for n, density in [(1, 0.5), (63, 0.1), (64, 0.5), (200, 0.02), (300, 0.5)]:
        a, b = (rng.random((n, n)) < density for _ in range(2))
        found = matrix_product(packed(a), packed(b))
        bits = np.unpackbits(found.view(np.uint8), axis=1, count=n, bitorder="little").astype(bool)
        assert (bits == a @ b).all()


def test_products_of_random_masks() -> None:
    for seed in range(20):
        source = Masks(seed, 0.0)
        a, b = source.mask(1), source.mask(1)
        if {"h", "H"} & (a.free | b.free):
            continue
        both = product(a, b)
        for n in range(7):
            left, right, found = (next(truths(e, range(n, n + 1)))[1] for e in (a, b, both))
            assert (found == (left @ right)).all(), (a, b, n)


def test_published_reach() -> None:
    far = reach(band(-3, 0), 12)
    assert equal(far, band(-36, 0)).status == "proved"
    assert equal(far, band(-35, 0)).counter_example == {"n": 37, "q": 36, "k": 0}
    assert equal(reach(band(-2044, 0, 4), 2), band(-4088, 0, 4)).status == "proved"
    strided = all_of(CAUSAL, any_of(band(-127, 0), eq(x.mod(sub(Q, K), const(128)), x.ZERO)))
    assert equal(reach(strided, 2), CAUSAL).status == "proved"
    assert equal(reach(any_of(band(-256, 256), rows_and_columns(0)), 2), x.TRUE).status == "proved"
    groups = [all_of(lt(var("h"), const(2)), band(-1, 0)), all_of(le(const(2), var("h")), CAUSAL)]
    assert subset(reach(any_of(*groups), 4), CAUSAL).status == "proved"
    documents = all_of(CAUSAL, eq(x.lookup(DOC, Q), x.lookup(DOC, K)))
    assert subset(reach(documents, 12), CAUSAL).status == "proved"
    assert subset(reach(any_of(documents, negate(CAUSAL)), 2), CAUSAL).status == "refuted"


def test_published_diameters() -> None:
    longformer = any_of(band(-256, 256), rows_and_columns(0))
    assert diameter(longformer, 2048) == 2
    assert diameter(band(-3, 0), 4096) == 1365
    assert diameter(band(-256, 256), 1 << 20) == 4096
    assert diameter(BLOCKS, 1 << 20) == 1
    assert diameter(all_of(CAUSAL, any_of(band(-1023, 0), band(-(2**40), 0, 1024))), 1 << 20) == 2
    apart = sub(Q, K)
    squares = all_of(CAUSAL, eq(x.power(x.call("isqrt", apart), const(2)), apart))
    assert diameter(squares, 1 << 16) == 4  # Lagrange: of four squares every number is the sum
    powers = eq(x.power(const(2), x.call("log2", apart), True), apart)
    assert diameter(all_of(lt(K, Q), powers), 1 << 15) == 15


def test_common_divisors() -> None:
    assert common_divisor(band(-8, 0, 4)) == 4
    assert common_divisor(any_of(band(-8, 0, 4), eq(sub(K, Q), const(6)))) == 2
    assert common_divisor(all_of(band(-(2**40), 0, 128), eq(x.lookup(DOC, Q), x.lookup(DOC, K)))) == 128
    assert common_divisor(CAUSAL) == common_divisor(eq(Q, K)) == 1


def test_what_has_no_diameter() -> None:
    with pytest.raises(AttnError, match="table `doc`"):
        diameter(eq(x.lookup(DOC, Q), x.lookup(DOC, K)), 16)
    with pytest.raises(AttnError, match="heads H"):
        diameter(lt(sub(Q, K), var("H")), 16)
    with pytest.raises(AttnError, match="too scattered"):
        diameter(PATTERNS["links"], 1 << 14, heads=1)
