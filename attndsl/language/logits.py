"""Warnings about scores: a logit that is scaled or exponentiated twice, that masks or favours what is far, or
is no number at a pair that is seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup
from attndsl.errors import AttnError, Diagnostic, Span
from attndsl.expr import Expr, Table
from attndsl.language.arguments import score_call
from attndsl.language.elaborate import Elaborator
from attndsl.language.values import Scope
from attndsl.selection import lists_of
from attndsl.syntax import nodes as ast

POSITIONS = frozenset("q k n h H D".split())
LENGTHS = (1, 2, 3, 40)
"""Positions at which scores are looked at."""
HEADS = 8
"""And the most heads."""
HEAD_DIM = 64
HIDDEN = -1000
"""A logit that leaves no weight beside others."""
TRIES = 4
"""Logits and tables with which it has to be no number."""


def scaled_twice(
    group: HeadGroup, scores: Sequence[ast.Clause], elaborator: Elaborator
) -> Iterator[Diagnostic]:
    """`s`, which has 1 / sqrt(D) in it, is multiplied by another."""
    if not any(_by_root(node) for node in ir.nodes(group.score)):
        return
    clause = next((c for c in scores if {"s", "D"} <= names_in(c, elaborator)), scores[-1])
    yield Diagnostic(
        "`s` is Q @ K / sqrt(D) already: this divides by sqrt(D) once more",
        clause.value.span,
        "leave it out; or write `Q @ K / D` if it is meant",
        "warning",
    )


def _by_root(node: Expr) -> bool:
    """Whether it is the logit times what falls as 1 / sqrt(D)."""
    if node.op not in ("div", "mul"):
        return False
    pairs = [node.args] if node.op == "div" else [node.args, node.args[::-1]]
    for logit, by in pairs:
        if "s" in logit.free and by.free == {"D"} and not by.tables:
            try:
                small, large = (ir.number(ir.substitute(by, {"D": ir.const(size)})) for size in (16, 64))
            except AttnError:
                continue  # no number at one of them
            if small and large and math.isclose(large / small, 2 if node.op == "div" else 0.5):
                return True
    return False


def exponential(group: HeadGroup, scores: Sequence[ast.Clause]) -> Iterator[Diagnostic]:
    """`exp(s)`, of which a softmax takes the exponential."""
    inner = group.score
    while inner.op in ("mul", "div"):
        inner = next((factor for factor in inner.args if "s" in factor.free), ir.ZERO)
    if group.norm.kind == "softmax" and inner.op == "exp" and "s" in inner.free:
        help = "leave `exp` out, or write `norm linear`, which divides by the sum alone"
        yield Diagnostic("a softmax takes the exponential itself", scores[-1].value.span, help, "warning")


def saturated(group: HeadGroup, scores: Sequence[ast.Clause]) -> Iterator[Diagnostic]:
    """`c * tanh(s * c)`, where a cap is `c * tanh(s / c)`."""
    for node in ir.nodes(group.score):
        if node.op == "tanh" and node.args[0].op == "mul" and "s" in node.free:
            by = max((ir.number(arg) or 0 for arg in node.args[0].args), default=0)
            if by > 1:
                said = f"`tanh` is near 1 or -1 where `s` is beyond {round(2 / by, 2)}"
                help = f"a cap divides: `{by} * tanh(s / {by})` is `score softcap({float(by)})`"
                yield Diagnostic(said, scores[-1].value.span, help, "warning")


def decays(attention: Attention, group: HeadGroup, clauses: Sequence[ast.Clause]) -> Iterator[Diagnostic]:
    """Which are below 0, or take out each query itself without a word of it."""
    decay = group.decay
    if decay is None or any(node.op == "where" for node in ir.nodes(decay)):
        return
    span = next(c.value.span for c in reversed(clauses) if c.word == "decay")
    help = "write a number below 1 to the power `q - k`"
    values = _of_last(attention, group, decay) if decay.free <= POSITIONS and not decay.tables else ()
    if len(values) and min(values) < 0:
        yield Diagnostic("this decay is below 0: a weight may not be negative", span, help, "warning")
    elif _vanishes(ir.substitute(decay, {"k": ir.var("q")})):
        yield Diagnostic("this decay is 0 where a query meets itself", span, help, "warning")


def _vanishes(e: Expr) -> bool:
    factors = e.args if e.op == "mul" else e.args[:1] if e.op == "div" else ()
    return ir.number(e) == 0 or any(map(_vanishes, factors))


def far_first(attention: Attention, group: HeadGroup, clauses: Sequence[ast.Clause]) -> Iterator[Diagnostic]:
    """A bias or a decay by which each key before the query counts less than the one before that."""
    terms = group.score.args if group.score.op == "add" and ir.var("s") in group.score.args else ()
    bias = [term for term in terms if term.free & {"q", "k"} and term.free <= POSITIONS and not term.tables]
    decay = group.decay
    if bias and _falls(attention, group, ir.add(*bias)):
        span = next(c.value.span for c in reversed(clauses) if c.word == "score")
        help = "`k - q` is below 0 for keys before the query: exchange `q` and `k`, or turn the sign"
        yield Diagnostic("this bias grows with the distance: far keys count most", span, help, "warning")
    if decay is not None and decay.free <= POSITIONS and not decay.tables and _falls(attention, group, decay):
        span = next(c.value.span for c in reversed(clauses) if c.word == "decay")
        help = "write a number below 1 to the power `q - k`"
        yield Diagnostic("this decay grows with the distance: far keys count most", span, help, "warning")


def _falls(attention: Attention, group: HeadGroup, value: Expr) -> bool:
    """Whether it is the less, the later a key is of those that the last query sees before itself."""
    values = _of_last(attention, group, value)
    return len(values) > 2 and bool(np.all(np.diff(values) < 0))


def _of_last(attention: Attention, group: HeadGroup, value: Expr) -> NDArray[Any]:
    """What it is at the keys up to itself that the last query sees, in the first head; empty where that is
    not known."""
    from attndsl.meaning.pointwise import evaluate

    if attention.offset is not None or attention.of_streams or group.relation.mask.tables:
        return np.zeros(0)
    n = LENGTHS[-1]
    heads = attention.enough_heads()
    q, k = np.array([n - 1]), np.arange(n)
    for h in range(min(heads, HEADS)):
        at = {x: ir.const(size) for x, size in {"n": n, "nq": n, "h": h, "H": heads, "D": HEAD_DIM}.items()}
        if ir.substitute(group.heads, at) is not ir.TRUE:
            continue
        with np.errstate(all="ignore"):
            try:
                live = evaluate(ir.substitute(group.relation.mask, at), q, k)
                return np.asarray(evaluate(ir.substitute(value, at), q, k)[live & (k <= q)])
            except AttnError:
                return np.zeros(0)  # it is refused there, which is told elsewhere
    return np.zeros(0)


def masked_by_score(
    attention: Attention, group: HeadGroup, scores: Sequence[ast.Clause]
) -> Iterator[Diagnostic]:
    """A large negative number in place of a logit, for more pairs than one a query."""
    from attndsl.meaning.pointwise import evaluate

    mask, n = group.relation.mask, LENGTHS[-1]
    if attention.offset is not None or attention.of_streams or not mask.free <= {*"qkn"} or mask.tables:
        return
    (q, k), at = np.indices((n, n)), {"n": ir.const(n), "nq": ir.const(n)}
    for node in ir.nodes(group.score):
        if node.op != "where" or node.args[0].tables or not node.args[0].free <= {*"qkn"}:
            continue
        hidden = [(ir.number(value) or 0) <= HIDDEN for value in node.args[1:]]
        if sum(hidden) != 1:
            continue
        condition = node.args[0] if hidden[0] else ir.negate(node.args[0])
        try:
            many = int(evaluate(ir.substitute(ir.all_of(mask, condition), at), q, k).sum())
        except AttnError:
            continue  # it is refused there, which is told elsewhere
        if many > n:
            help = "write the condition into `mask`: what it takes out costs nothing"
            said = "these pairs are seen all the same, with a weight of about 0"
            yield Diagnostic(said, scores[-1].value.span, help, "warning")
            return


def no_numbers(
    attention: Attention, group: HeadGroup, scores: Sequence[ast.Clause], elaborator: Elaborator
) -> Iterator[Diagnostic]:
    """A score that is infinite or no number at a live pair, whatever the logit and tables are, because of
    what is computed of positions there. It is found by its meaning, and so never a false alarm."""
    doubtful = [node for node in ir.nodes(group.score) if _doubtful(node)]
    asked_elsewhere = attention.offset is not None or attention.of_streams or lists_of(group.relation.mask)
    if not doubtful or asked_elsewhere or any(isinstance(t.origin, ir.Selected) for t in group.score.tables):
        return
    heads = attention.enough_heads()
    for n in LENGTHS:
        for h in range(min(heads, HEADS)):
            found = _first(group, doubtful, n, h, heads)
            if found is None:
                continue
            q, k, node, value = found
            head = f", head {h}" if "h" in node.free else ""
            yield Diagnostic(
                f"the score of query {q} and key {k} is {value} at n = {n}{head}",
                _place(node, scores, elaborator),
                _mended(node),
                "warning",
            )
            return


def _doubtful(node: Expr) -> bool:
    """Whether it has no value at some numbers that are computed of positions alone."""
    match node.op:
        case "div":
            limited = node.args[1:]
        case "pow" if node.type == "real":
            limited = node.args
        case "log" | "log2" | "sqrt" if node.type == "real":
            limited = node.args
        case _:
            return False
    free = frozenset().union(*(arg.free for arg in limited))
    return bool(free) and free <= POSITIONS and not any(arg.tables for arg in limited)


def _without_value(node: Expr, at: dict[str, Expr], q: int, k: int) -> bool:
    from attndsl.meaning.pointwise import evaluate

    whole = ir.div(ir.const(1.0), node.args[1]) if node.op == "div" else node
    return not np.isfinite(evaluate(ir.substitute(whole, at), np.array([q]), np.array([k]))).all()


def _first(
    group: HeadGroup, doubtful: Sequence[Expr], n: int, h: int, heads: int
) -> tuple[int, int, Expr, float] | None:
    """The first live pair at which the score is finite with no logit, what is to blame, and the score."""
    from attndsl.meaning.pointwise import evaluate

    mask, (q, k) = group.relation.mask, np.indices((n, n))
    sizes = {"n": n, "nq": n, "h": h, "H": heads, "D": HEAD_DIM, "b": 0}
    at = {name: ir.const(size) for name, size in sizes.items()}
    bad, values = np.ones((n, n), bool), np.zeros((n, n))
    with np.errstate(all="ignore"):
        try:
            if ir.substitute(group.heads, at) is not ir.TRUE:
                return None
            for seed in range(TRIES):
                rng = np.random.default_rng(seed)
                tables = {t.name: _filled(t, sizes, rng) for t in {*group.score.tables, *mask.tables}}
                live = evaluate(ir.substitute(mask, at), q, k, tables)
                score = _without_vectors(ir.substitute(group.score, at), rng)
                values = evaluate(ir.substitute(score, {"s": ir.const(rng.normal())}), q, k, tables)
                bad &= live & ~np.isfinite(values)
            for row, column in np.argwhere(bad):
                for node in doubtful:
                    if _without_value(node, at, row, column):
                        return int(row), int(column), node, float(values[row, column])
        except AttnError:
            return None  # it is refused there, which is told elsewhere
    return None


def _filled(table: Table, sizes: dict[str, int], rng: np.random.Generator) -> NDArray[Any]:
    """Labels that are all alike, keys that are all kept, other numbers at random."""
    room = sizes | {"B": 1}
    shape = [axis if isinstance(axis, int) else room.get(axis, 4 * sizes["n"] + 64) for axis in table.dims]
    if table.dtype == "float":
        return rng.normal(size=shape)
    return np.zeros(shape, np.int64) if table.dtype == "int" else np.ones(shape, np.bool_)


def _without_vectors(root: Expr, rng: np.random.Generator) -> Expr:
    """With a number in place of each that is made of vectors."""
    done: dict[Expr, Expr] = {}
    for node in ir.nodes(root):
        of_vectors = any(arg.type in ("vec", "mat", "truths") for arg in node.args)
        if node.type in ("vec", "mat", "truths"):
            done[node] = node
        elif of_vectors:
            done[node] = ir.const(float(rng.normal()))
        else:
            done[node] = ir.rebuild(node, tuple(done[arg] for arg in node.args))
    return done[root]


def _place(node: Expr, scores: Sequence[ast.Clause], elaborator: Elaborator) -> Span:
    """Where it is written: the only such operation, else the score."""
    found: list[Span] = []
    for clause in scores:
        read = (*_read(clause, elaborator),)
        found += [e.span for e in ast.walk(read) if _is(e, node)]
    own = [span for span in found if span.source is scores[-1].span.source]
    return own[0] if len(own) == len(found) == 1 else scores[-1].value.span


def _is(e: ast.Node, node: Expr) -> bool:
    match e:
        case ast.Call(func=ast.Name(id=name)):
            return name == node.op
        case ast.Binary("/"):
            return node.op == "div"
        case ast.Binary("**"):
            return node.op == "pow"
    return False


def _mended(node: Expr) -> str:
    if node.op in ("log", "log2", "sqrt"):
        least = 0 if node.op == "sqrt" else 1
        shown = f"{node.op}(max(..., {least}))"
        return f"keep what is in it from {least} on, as in `{shown}`, or the pair out of the mask"
    return "choose beside it by `where(condition, a, b)`, or keep the pair out of the mask"


def _read(score: ast.Clause, elaborator: Elaborator) -> tuple[ast.Node, ...]:
    """A clause, and the body of the score that it calls."""
    called = score_call(score.value, elaborator.definitions, Scope({}))
    return (score.value,) if called is None else (score.value, called[0].body)


def names_in(score: ast.Clause, elaborator: Elaborator) -> set[str]:
    """The names in a clause, and in the body of the score that it calls."""
    return {name.id for name in ast.walk(_read(score, elaborator)) if isinstance(name, ast.Name)}
