"""Receptive fields against powers of Boolean matrices, and against published facts."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any, TypeGuard

import numpy as np
import programs
import pytest
from numpy.typing import NDArray
from shipped import EXAMPLES, example
from thin import thin

import attndsl
from attndsl import expr as x
from attndsl.analysis.field import Field, Hole, Seen, paths, receptive_field
from attndsl.attention import Attention
from attndsl.bound import Bound, Unbound
from attndsl.errors import AttnError
from attndsl.expr import IntSet, any_of, const, var
from attndsl.layers import powers, trees
from attndsl.layers.powers import Dense, Form, Hubs, Shifts, Trees
from attndsl.layers.reach import SAME, sums
from attndsl.meaning.pointwise import evaluate
from attndsl.selection import bounds
from attndsl.tiles.queries import keys_read_by

Matrix = NDArray[np.bool_]


def pattern(text: str, name: str = "main") -> Attention:
    found = attndsl.parse(f"attention {name} {{ mask {text} }}")[name]
    assert isinstance(found, Bound)
    return found.attention


def has_pairs(bound: Bound | Unbound) -> TypeGuard[Bound]:
    """Of tokens, and all its parameters."""
    if not isinstance(bound, Bound) or bound.attention.approx is not None:
        return False
    return not bound.attention.streams and not bound.attention.held


def attentions() -> dict[str, Attention]:
    """With all that may be chosen in the place of what is, but for those whose keys are streams, which
    test_streams.py looks at."""
    found = {}
    for path in sorted(EXAMPLES.glob("*.attn")):
        program = example(path.stem)
        bound = {name: program[name] for name in program.names}
        found |= {name: bounds(b.attention)[1] for name, b in bound.items() if has_pairs(b)}
    return found


ATTENTIONS = attentions()


def tables(name: str, n: int) -> dict[str, Any]:
    """Inputs of the masks of the examples, for one batch row of n positions."""
    doc, middle = np.arange(n) * 3 // max(n, 1), n // 2
    given: dict[str, dict[str, Any]] = {
        "flamingo": {"lo": [0, middle, n, n], "hi": [middle, n, n, n]},
        "left_padding": {"pad": [n // 3]},
        "packed": {"doc": doc},
        "paligemma": {"prompt": [n // 5]},
        "gemma3_images": {"image": np.where(doc == 1, 0, -1)},
        "prefix_lm": {"prefix": [n // 4]},
        "shared_prefix": {"doc": doc, "parent": [0, 0, 1]},
        "vsa": {"chosen": np.array([[3, 0], [1, 1], [0, 2], [2, 2]])[None, None, : -(-n // 64)]},
    }
    return given.get(name, {})


def union(attention: Attention, n: int, heads: int, given: dict[str, Any]) -> Matrix:
    rest = {
        t.name: np.zeros(
            [
                {"n": n, "H": heads, "B": 1}.get(axis, int(axis) if axis.isdecimal() else 2)
                for axis in axes(t)
            ],
            t.dtype,
        )
        for t in attention.inputs
        if t.name not in given
    }
    mask = Bound(attention).mask(n, heads=heads, **given, **rest)
    return mask.reshape(-1, n, n).any(axis=0) | np.eye(n, dtype=bool) if n else np.zeros((0, 0), bool)


def axes(table: x.Table) -> list[str]:
    return [*map(str, table.dims)]


def expected(steps: list[Matrix], causal: bool, alike: bool) -> tuple[list[Seen], int | None, Hole | None]:
    """By the definition: what is seen layer by layer, the layers to full reach, else the hole."""
    n = len(steps[0])
    due = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
    reached, rows = np.eye(n, dtype=bool), []
    full = 0 if (reached == due).all() else None
    for layer, step in enumerate(steps, 1):
        reached = step @ reached
        unseen = (due & ~reached).sum(axis=1)
        worst = max(range(n), key=lambda q: (unseen[q], q), default=None)
        rows.append(
            Seen(layer, int(reached[-1].sum()), int(reached[worst].sum()), worst, int(reached.sum()))
            if worst is not None
            else Seen(layer, pairs=0)
        )
        if full is None and (reached == due).all():
            full = layer
    layers = len(steps)
    while alike and full is None and not (reached == (more := steps[0] @ reached)).all():
        reached, layers = more, layers + 1
        full = layers if (reached == due).all() else None
    if full is not None:
        return rows, full, None
    q = int((due & ~reached).any(axis=1).argmax())
    keys = np.flatnonzero(due[q] & ~reached[q])
    return rows, None, Hole(q, int(keys[np.abs(keys - q).argmin()]))


def check(found: Field, steps: list[Matrix], alike: bool = True) -> None:
    assert found.undecided is None
    rows, full, hole = expected(steps, found.target == "causal", alike)
    assert list(found.per_layer) == rows
    assert found.full_after == full
    assert (found.hole and (found.hole.q, found.hole.k)) == (hole and (hole.q, hole.k))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_examples_are_the_powers(name: str) -> None:
    attention = ATTENTIONS[name]
    heads = attention.enough_heads()
    for n in (0, 1, 2, 65, 200):
        given = tables(name, n)
        step = union(attention, n, heads, given)
        check(receptive_field(attention, n, heads=heads, layers=3, inputs=given), [step] * 3)


PROGRAMS = [
    *(programs.program(Random(seed)) for seed in range(20)),
    *(programs.program(Random(seed), integral=True) for seed in range(20)),
]


@pytest.mark.parametrize("program", thin(PROGRAMS, 5))
def test_random_programs_are_the_powers(program: programs.Program) -> None:
    attention = attndsl.parse(program.text)["main"].attention
    for n in (3, 13, 70):
        given = program.tables(n, batch=1)
        step = union(attention, n, program.heads, given)
        found = receptive_field(attention, n, heads=program.heads, layers=4, inputs=given)
        check(found, [step] * 4)
        if found.target == "causal":
            assert not np.triu(step, 1).any()


def test_random_stacks_are_the_products() -> None:
    found = [p for p in PROGRAMS if p.heads == 1 and not p.inputs]
    for first, second in zip(found[::2], found[1::2], strict=False):
        layers = [attndsl.parse(p.text)["main"].attention for p in (first, second, second, first)]
        steps = [union(layer, 40, 1, {}) for layer in layers]
        check(receptive_field(layers, 40), steps, alike=False)


@pytest.mark.parametrize("kind", [Trees, Shifts, Hubs, Dense])
def test_each_form_holds_what_it_accepts(kind: Callable[..., Form]) -> None:
    """Two random steps, some made to fit the form: counts, rows, products and the power that settles."""
    done = 0
    for seed in range(60):
        rng = Random(seed)
        n = rng.choice([1, 2, 64, 65, 130, 200])
        q, k = np.arange(n)[:, None], np.arange(n)[None, :]
        steps = [fitted(kind, rng, n) for _ in range(2)]
        first, second = (np.broadcast_to(evaluate(mask, q, k, given), (n, n)) for mask, given in steps)
        try:
            form = kind(n, steps)
            product = form.product(*form.steps)
            count, closure = powers.settled(form, form.steps[0])
        except AttnError:
            continue
        done += 1
        assert (form.counts(form.steps[0]) == first.sum(axis=1)).all()
        assert (form.counts(product) == (first @ second).sum(axis=1)).all()
        for row in (0, n // 2, n - 1):
            assert (form.row(product, row) == (first @ second)[row]).all()
        power, layers = np.eye(n, dtype=bool), 0
        while not (power == (more := power @ first)).all():
            power, layers = more, layers + 1
        assert count == layers
        assert (form.counts(closure) == power.sum(axis=1)).all()
    assert done >= 20


CELLS = x.Table("cells", "bool", ("n", "n"))


def fitted(kind: Callable[..., Form], rng: Random, n: int) -> powers.Step:
    if kind is Shifts:
        some = sorted(rng.sample(range(-9, 10), rng.randint(1, 5)))
        ranges = [(d, d + rng.choice([0, 0, 3, n])) for d in some if d >= 0 or rng.random() < 0.3]
        distance = x.sub(var("q"), var("k"))
        return any_of(x.inset(distance, IntSet.of(ranges)), SAME), {}
    mask = any_of(x.lookup(CELLS, var("q"), var("k")), SAME)
    if kind is Hubs:
        hub = const(rng.choice([0, n - 1]))
        seen, seeing = x.eq(var("k"), hub), x.eq(var("q"), hub)
        mask = rng.choice([any_of(mask, seen, seeing), any_of(mask, seen, seeing), any_of(mask, seen)])
    cells = np.random.default_rng(rng.randrange(2**32)).random((n, n))
    return mask, {"cells": cells < rng.choice([0.2, 0.5, 1, 3]) / n}


def test_sums_of_distances() -> None:
    rng = np.random.default_rng(0)
    for length, density, spacing in [(1, 1.0, 1), (50, 0.1, 1), (300, 0.3, 3), (20_000, 0.4, 1)]:
        a, b = ((rng.random(length) < density) & (np.arange(length) % spacing == 0) for _ in range(2))
        convolved = np.convolve(a.astype(float), b.astype(float))[:length] > 0.5
        assert (sums(a, b) == convolved).all()


def test_images_of_rows() -> None:
    attention = pattern("random(3, seed = 5) | last(150) | columns([70])")
    for n in (1, 130, 300):
        grid = Bound(attention).block_mask(n, 64).grids[0]
        mask = Bound(attention).mask(n)[0]
        rng = np.random.default_rng(n)
        for density in (0.0, 0.02, 1.0):
            queries = rng.random(n) < density
            assert (keys_read_by(grid, queries) == mask[queries].any(axis=0)).all()
        assert (powers.column_counts(grid) == mask.sum(axis=0)).all()


# published facts: mechanisms of the papers named


def test_one_global_token_joins_all_in_two_layers() -> None:
    """Zaheer et al. 2020, section 3: a star has diameter 2."""
    for n in (2048, 1 << 20):
        found = receptive_field(pattern("radius(3) | global([0])"), n)
        assert (found.full_after, found.hole, found.settled_after) == (2, None, 2)
        assert found.for_every_n == "after 2 layers every query sees every key"
    # a sequence of 9 has no position 9 yet
    later = pattern("radius(1) | global([9])")
    assert receptive_field(later, 64).for_every_n is None
    assert (receptive_field(later, 9).full_after, receptive_field(later, 64).full_after) == (8, 2)


@pytest.mark.parametrize(("n", "r"), [(1, 3), (2, 3), (4096, 1), (4096, 64), (100_000, 333), (1 << 20, 64)])
def test_a_window_takes_as_many_layers_as_steps(n: int, r: int) -> None:
    """ceil((n - 1) / r): Beltagy et al. 2020, section 3.1."""
    for text in (f"radius({r})", f"last({r + 1})"):
        found = receptive_field(pattern(text), n)
        assert found.full_after == -(-(n - 1) // r)
        assert (found.for_every_n or "").startswith(f"after ceil((n - 1)/{r}) layers")
        assert found.formula == f"min(n, {r}*L + 1)"
        assert [seen.last_row for seen in found.per_layer] == [min(n, r * i + 1) for i in range(1, 13)]


def test_an_uneven_window_takes_the_steps_of_its_short_side() -> None:
    found = receptive_field(pattern("band(-9..3)"), 101)
    assert found.full_after == 34
    assert found.for_every_n == "after ceil((n - 1)/3) layers every query sees every key"


def test_a_dilated_window_never_sees_three_of_four_residues() -> None:
    """Beltagy et al. 2020, section 3.1, with gaps of 3 in every layer."""
    found = receptive_field(pattern("band(-2044..0, step = 4)"), 1 << 20)
    assert found.hole == Hole(1, 0, "q - k mod 4 in {1, 2, 3}")
    assert found.full_after is None
    assert found.for_every_n == "no number of layers joins positions whose distance is no multiple of 4"
    assert found.formula == "min(floor((n - 1)/4) + 1, 511*L + 1)"
    assert found.per_layer[-1].last_row == 12 * 511 + 1
    odd = receptive_field(pattern("band(-8..8, step = 2)"), 1000)
    assert odd.hole == Hole(0, 1, "keys at odd distances")


def test_both_factors_of_sparse_transformers_take_two_layers() -> None:
    """Child et al. 2019, section 4.3: strided and fixed reach every causal pair in two steps."""
    for text in ("strided(16)", "fixed(16, 4)"):
        found = receptive_field(pattern(text), 256)
        assert (found.target, found.full_after) == ("causal", 2)
        assert found.for_every_n == "after 2 layers every query sees every key up to it"
    assert receptive_field(pattern("strided(16)"), 256).formula == "n for L >= 2"
    window, stride = pattern("causal & last(16)"), pattern("causal & { q, k : (q - k) mod 16 == 0 }")
    for layers in ([window, stride], [stride, window]):
        assert receptive_field(layers, 256).full_after == 2
    # the summaries alone: positions before the first of them see nothing but themselves
    own, summaries = pattern("causal & block(16)"), pattern("causal & { q, k : k mod 16 >= 12 }")
    assert receptive_field([summaries, own], 256).hole is not None
    assert receptive_field([own, summaries], 256).full_after == 2


def test_interleaved_layers() -> None:
    """Gemma 3 report 2025, section 2: the global layer sees all; windows before it alone do not."""
    local, whole = pattern("causal & last(1024)"), pattern("causal")
    found = receptive_field([local] * 5 + [whole], 1 << 20)
    assert [seen.last_row for seen in found.per_layer] == [*(1023 * i + 1 for i in range(1, 6)), 1 << 20]
    assert (found.full_after, found.settled_after, found.formula) == (6, None, None)
    others = receptive_field([local] * 4 + [pattern("causal & last(1023)")], 1 << 20)
    assert others.hole == Hole(4 * 1023 + 1022 + 1, 0)


def test_a_formula_is_what_is_counted() -> None:
    texts = [
        "last(7)",
        "band(-12..0, step = 3)",
        "causal",
        "strided(4)",
        "causal & { q, k : (q - k) mod 3 == 0 }",
    ]
    texts += ["radius(2)", "{ q, k : q - k in [0, 2, 5] }", "block(4)", "{ q, k : k == q }", "band(-3..9)"]
    given = []
    for text in texts:
        for n in (1, 2, 17, 64):
            found = receptive_field(pattern(text), n, layers=6)
            given.append(found.formula)
            if found.formula is None:
                continue
            formula, _, least = found.formula.partition(" for L >= ")
            for seen in found.per_layer[int(least or 1) - 1 :]:
                values = {"n": n, "L": seen.layers, "min": min, "floor": int}
                assert eval(formula, values) == seen.last_row, (text, formula)
    assert given.count(None) == 4 * 2


def test_paths_are_counted() -> None:
    attention = pattern("causal & last(3)")
    assert paths(attention, 2, 4).tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 0], [2, 3, 2, 1]]
    found = paths(pattern("random(2, seed = h)"), 5, 60, heads=3)
    step = union(pattern("random(2, seed = h)"), 60, 3, {}).astype(object)
    assert (found == np.linalg.matrix_power(step, 5)).all()
    assert paths(attention, 0, 3).tolist() == np.eye(3).tolist()
    assert paths(attention, 7, 0).shape == (0, 0)
    for layers in (12, 5000):
        with pytest.raises(AttnError, match="64 bits"):
            paths(pattern("block(100)"), layers, 200)
    with pytest.raises(AttnError, match="512"):
        paths(attention, 2, 513)


def test_what_depends_on_a_missing_table() -> None:
    assert receptive_field(ATTENTIONS["packed"], 1 << 20).undecided == "it depends on the table `doc`"
    windowed = attndsl.parse(
        "attention a { inputs doc : int[n]\n mask causal & last(5) & documents(doc) }\n"
        "attention b { inputs doc : int[n]\n mask causal & block(16) & documents(doc) }\n"
        "attention c { inputs doc : int[n]\n mask band(-8..0, step = 2) & documents(doc) }\n"
        "attention d { inputs pad : int[B]\n mask { q, k : k >= pad } }\n"
    )
    found = receptive_field(windowed["a"].attention, 101, layers=3)
    assert "no less than 25 layers" in str(found.undecided)
    assert "at most 13 keys through 3" in str(found.undecided)
    assert receptive_field(windowed["b"].attention, 101).hole == Hole(16, 15)
    assert receptive_field(windowed["c"].attention, 101).hole == Hole(1, 0, "keys at odd distances")
    assert "batch row" in str(receptive_field(windowed["d"].attention, 4, inputs={"pad": [0, 1]}).undecided)
    assert receptive_field(windowed["d"].attention, 4, inputs={"pad": [1]}).hole == Hole(1, 0)


def test_scattered_links_without_a_hub_are_followed_from_the_last_query() -> None:
    attention = pattern("random(2, seed = 1) | last(4)")
    n = 9000
    found = receptive_field(attention, n, layers=4)
    assert found.undecided is not None
    assert (found.full_after, found.hole) == (None, None)
    grid = Bound(attention).block_mask(n).grids[0]
    keys = np.arange(n) == n - 1
    for seen in found.per_layer:
        keys = keys_read_by(grid, keys)
        assert seen.last_row == keys.sum()


def test_what_is_known_before_a_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = pattern("causal & (last(3) | { q, k : k mod 97 == 5 })")
    monkeypatch.setattr(powers, "DENSE_LENGTH", 100)
    whole = receptive_field(attention, 400)
    assert whole.undecided is None
    monkeypatch.setattr(trees, "PRODUCTS", 120)
    found = receptive_field(attention, 400)
    assert "120 products" in str(found.undecided)
    assert (found.full_after, found.hole) == (None, None)
    assert found.per_layer[0] == whole.per_layer[0]
    for known, seen in zip(found.per_layer, whole.per_layer, strict=True):
        assert known.pairs in (None, seen.pairs)
        assert known.last_row == seen.last_row
    assert any(known.pairs is None for known in found.per_layer)
    monkeypatch.setattr(powers, "DENSE_LENGTH", 400)
    assert receptive_field(attention, 400) == whole


def test_what_is_refused() -> None:
    attention = pattern("causal")
    for length in (-1, 2**63, 1.5):
        with pytest.raises(AttnError):
            receptive_field(attention, length)  # type: ignore[arg-type]
    huge = receptive_field(pattern("last(10)"), 2**31 - 1)
    assert "16,777,216" in str(huge.undecided)
    assert huge.formula == "min(n, 9*L + 1)"
    assert huge.for_every_n == "after ceil((n - 1)/9) layers every query sees every key up to it"
    with pytest.raises(AttnError, match="3 layers of 2"):
        receptive_field([attention] * 2, 8, layers=3)
    with pytest.raises(AttnError, match="0 attentions"):
        receptive_field([], 8)
    with pytest.raises(AttnError, match="no layer has an input `doc`"):
        receptive_field(attention, 8, inputs={"doc": [0] * 8})
    with pytest.raises(AttnError, match="speaks of head 7"):
        receptive_field(ATTENTIONS["duo_attention"], 8, heads=2)
    shifted = attndsl.parse("attention a { offset 3\n mask causal }")["a"].attention
    with pytest.raises(AttnError, match="stacked"):
        receptive_field(shifted, 8)


def test_a_million_tokens_take_seconds() -> None:
    """Every example through 12 layers, 2 s of one core each."""
    for name, attention in ATTENTIONS.items():
        start = time.process_time()
        found = receptive_field(attention, 1 << 20, heads=attention.enough_heads())
        assert time.process_time() - start < 2, name
        assert (found.full_after is not None) + (found.hole is not None) == (found.undecided is None), name
        reads = any(g.relation.mask.tables for g in attention.groups)
        assert (found.undecided is not None) == reads, name
