"""Code for pairs: derivatives against torch's own, what is left of a score with what its leaves hold, and
which queries, keys and distances a mask has."""

from __future__ import annotations

import functools
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attndsl
from attndsl import expr as ir
from attndsl.backend import Call
from attndsl.emit.adjoints import adjoints
from attndsl.emit.leaves import Leaf, leaf_of, leaves, left_over
from attndsl.execution.leaf_values import LeafValues
from attndsl.execution.torch_eval import Env, environment, evaluate
from attndsl.expr import Expr, Table
from attndsl.tiles import shadows

X, Y, WHOLE = ir.make("var", (), "x", "real"), ir.make("var", (), "y", "real"), ir.make("var", (), "i", "int")


def drawn_expression(rng: Random, depth: int) -> Expr:
    if depth == 0:
        return rng.choice((X, Y, X, Y, WHOLE, ir.const(0.5), ir.const(2.0), ir.const(0.0)))
    a, b, c = (drawn_expression(rng, depth - 1) for _ in range(3))
    positive = ir.add(ir.absolute(a), ir.const(0.25))
    options = [
        lambda: ir.add(a, b, c),
        lambda: ir.mul(a, b),
        lambda: ir.sub(a, b),
        lambda: ir.div(a, positive),
        lambda: ir.power(positive, ir.call("tanh", b)),
        lambda: ir.power(a, ir.const(2)),
        lambda: ir.minimum(a, b),
        lambda: ir.maximum(a, b),
        lambda: ir.absolute(a),
        lambda: ir.where(ir.lt(a, b), a, ir.mul(b, c)),
        lambda: ir.where(ir.all_of(ir.le(a, b), ir.negate(ir.eq(b, c))), ir.call("sin", a), c),
        lambda: ir.mod(a, ir.const(0.75)),
        lambda: ir.call("exp", ir.call("tanh", a)),
        lambda: ir.call("log", positive),
        lambda: ir.call("log2", positive),
        lambda: ir.call("sqrt", positive),
        lambda: ir.call("sigmoid", a),
        lambda: ir.call("cos", a),
    ]
    return rng.choice(options)()


def at(values: dict[str, Tensor]) -> Env:
    return Env(values, {}, torch.float64, torch.device("cpu"))


POINTS = [(0.0, 0.0), (0.0, 1.5), (1.5, 1.5), (-0.5, 0.5), (0.3, -1.2), (2.0, 2.0), (-1.0, 0.0)]


@pytest.mark.parametrize("seed", range(20))
def test_derivatives_are_those_of_torch(seed: int) -> None:
    """Also where two are equal, at 0 and of integers."""
    rng = Random(seed)
    for _ in range(20):
        try:
            roots = {drawn_expression(rng, rng.randint(1, 3)): ir.const(slope) for slope in (1.0, -0.7)}
        except attndsl.AttnError:
            continue  # a constant without a value
        roots = {root: slope for root, slope in roots.items() if root.free and root.type == "real"}
        mine = adjoints(roots, [X, Y])
        x, y = (
            torch.tensor(column, dtype=torch.float64).requires_grad_() for column in zip(*POINTS, strict=True)
        )
        env = at({"x": x, "y": y, "i": torch.tensor(2)})
        values = [evaluate(root, env).expand(len(POINTS)) for root in roots]
        total = sum((value.sum() * float(s.value) for value, s in zip(values, roots.values(), strict=True)))  # type: ignore[arg-type]
        if not isinstance(total, Tensor) or not total.requires_grad:
            continue
        wanted = torch.autograd.grad(total, (x, y), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for target, slope in zip((X, Y), wanted, strict=True):
                found = (
                    evaluate(mine[target], env).expand(len(POINTS))
                    if target in mine
                    else torch.zeros(len(POINTS))
                )
                torch.testing.assert_close(found.double(), slope, equal_nan=True)


@pytest.mark.parametrize(
    ("e", "x", "y", "by_x", "by_y"),
    [
        (ir.power(X, Y), 0.0, 0.0, 0.0, 0.0),
        (ir.power(X, Y), 0.0, 2.0, 0.0, 0.0),
        (ir.power(X, Y), 3.0, 0.0, 0.0, float(np.log(3.0))),
        (ir.maximum(X, Y), 1.0, 1.0, 0.5, 0.5),
        (ir.minimum(X, Y), 1.0, 2.0, 1.0, 0.0),
        (ir.absolute(X), 0.0, 0.0, 0.0, 0.0),
    ],
)
def test_derivatives_at_corners(e: Expr, x: float, y: float, by_x: float, by_y: float) -> None:
    env = at({name: torch.tensor(value, dtype=torch.float64) for name, value in (("x", x), ("y", y))})
    found = adjoints({e: ir.const(1.0)}, [X, Y])
    assert [float(evaluate(found[z], env)) if z in found else 0.0 for z in (X, Y)] == [by_x, by_y]


LEFT = [
    "s + 0.1 * (k - q) + x[q] * x[k] + 0.7",
    "where(q - k < 6, z[clamp(q - k, 0, 5)] * x[k], s * x[q])",
    "where(q - k < 6 and x[q] * x[k] > 0, z[q - k] + log(x[q] * x[k]), 0.25)",
    "where(x[q] * x[k] > 0 or q == k, sqrt(|x[q] * x[k]|), log2(1 + t[q] * t[k]) - isqrt(t[k] + t[q]))",
    "s * (t[q] mod 3) // 2 + z[(t[q] * t[k]) mod 6] + tanh(s) * max(s, x[k])",
    "where(not (t[q] in [0, 2]) and (t[q] + t[k]) in [1, 3..5], s, -s) + (Q @ K) * sum(Q * Q)",
]


def call_of(bound: Any, clauses_length: int) -> Call:
    n, random = clauses_length, torch.Generator().manual_seed(0)
    lowered = attndsl.compile(
        bound, length=n, heads=2, batch=2, head_dim=4, backend="reference", dtype="float64"
    ).lowered
    q, k, v = torch.randn(3, 2, 2, n, 4, generator=random, dtype=torch.float64).unbind()
    tables = {
        "x": torch.randn(n, generator=random, dtype=torch.float64),
        "z": torch.randn(2, 6, generator=random, dtype=torch.float64),
        "t": torch.randint(0, 5, (2, n), generator=random),
    }
    tables = {table.name: tables[table.name] for table in bound.inputs}
    return lowered.call_of(q, k, v, tables, lowered.sizes(q, k, (None,) * 5))


def of_leaves(root: Expr, call: Call, env: Env) -> tuple[Expr, Env]:
    """With a variable in place of each leaf, and its values at every pair; look-ups of tables stay."""
    made, values, done = LeafValues(call), dict(env.values), {}
    (_, _, nq, _), n = call.q.shape, call.k.shape[2]
    apart = torch.arange(nq)[:, None] - torch.arange(n) + n - 1
    for node in ir.nodes(root):
        if node.op == "leaf":
            found = leaf_of(node)
            x = made.of(found, call)
            assert x.dtype == {"real": torch.float64, "int": torch.int64, "bool": torch.bool}[node.type]
            name = f"leaf{len(values)}"
            as_pairs = {"query": x[..., None], "number": x[..., None], "key": x[..., None, :]}
            values[name] = as_pairs[found.kind] if found.kind in as_pairs else x[..., apart]
            done[node] = ir.make("var", (), name, node.type)
        elif node.op == "read":
            table = leaf_of(node).of
            assert isinstance(table, Table)
            lead = table.implicit
            done[node] = ir.lookup(table, *lead, *(done[arg] for arg in node.args[1:]))
        else:
            done[node] = ir.rebuild(node, tuple(done[arg] for arg in node.args))
    return done[root], replace(env, values=values)


@pytest.mark.parametrize("adjacent", [True, False])
@pytest.mark.parametrize("score", LEFT)
def test_what_is_left_means_the_same(score: str, adjacent: bool) -> None:
    known = {"x": "float[n]", "z": "float[H, 6]", "t": "int[B, n]"}
    inputs = [f"{name} : {kind}" for name, kind in known.items() if f"{name}[" in score]
    declared = f"inputs {' '.join(inputs)}" if inputs else ""
    bound = attndsl.parse(f"attention a {{ {declared} mask causal score {score} }}")["a"]
    call, root = call_of(bound, 19), ir.substitute(bound.attention.groups[0].score, {"D": ir.const(4)})
    rest = left_over(root, adjacent)
    if isinstance(rest, str):
        assert rest == "the score computes `inner` at each pair"
        return
    env = environment(call)
    s = torch.randn(2, 2, 19, 19, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    env = replace(env, values={**env.values, "s": s, "Q": call.q, "K": call.k})
    live = torch.ones(19, 19, dtype=torch.bool).tril().expand(2, 2, 19, 19)
    wanted = evaluate(root, env, live)
    found = evaluate(*of_leaves(rest, call, env), live)
    for x in (wanted, found):
        assert x.isfinite().any()
    torch.testing.assert_close(
        found.broadcast_to(s.shape)[live].double(), wanted.broadcast_to(s.shape)[live].double()
    )


def test_constants_are_leaves() -> None:
    """So another has the same code, whole or not; the few that stand in it cost nothing."""
    rests = [left_over(ir.mul(ir.var("s"), ir.const(c)), True) for c in (0.3, 0.7, 30)]
    assert all(isinstance(rest, Expr) for rest in rests)
    assert [{*leaves([rest])} for rest in rests] == [{Leaf("number", ir.const(c))} for c in (0.3, 0.7, 30.0)]  # type: ignore[list-item]


@functools.cache
def grids() -> tuple[Any, ...]:
    masks = (
        "causal",
        "band(-70 .. -3)",
        "{ q, k : (q * k) mod 11 == 3 and q > 20 }",
        "none",
        "full",
        "global([77])",
    )
    return tuple(
        attndsl.parse(f"attention a {{ mask {mask} }}")["a"].block_mask(n, size).grids[0]
        for mask in masks for n, size in ((1, 64), (130, 64), (200, 128), (90, 16))
    )  # fmt: skip


def test_shadows_are_those_of_the_dense_mask() -> None:
    for grid in grids():
        dense = np.asarray(grid.to_dense(), bool)
        assert np.array_equal(shadows.live_rows(grid), dense.any(1))
        assert np.array_equal(shadows.live_keys(grid), dense.any(0))
        rows, columns = np.nonzero(dense)
        live = np.zeros(sum(dense.shape) - 1, bool)
        live[rows - columns + dense.shape[1] - 1] = True
        assert np.array_equal(shadows.live_distances(grid), live)
