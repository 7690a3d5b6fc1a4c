"""What a score is, told from its expression: how it depends on the logit, on distances, pairs and heads."""

from __future__ import annotations

import math

from attndsl import expr as ir
from attndsl.expr import Expr

BY_QUERY, BY_KEY = {"q", "s", *ir.QUERY_VECTORS}, {"k", "s", *ir.KEY_VECTORS}


def by_pair(e: Expr) -> bool:
    """Whether the value differs along the queries and along the keys."""
    return bool(e.free & BY_QUERY and e.free & BY_KEY)


def by_head(e: Expr) -> bool:
    """Whether the value differs from head to head."""
    return bool(e.free & {"h", "s", *ir.QUERY_VECTORS, *ir.KEY_VECTORS})


def never_negative(e: Expr, known: frozenset[Expr] = frozenset()) -> bool:
    """Whether that is so by its form, of every entry of a vector; `known` are not negative."""
    if e in known or e.op in ("exp", "sigmoid", "abs", "sqrt"):
        return True
    if e.op in ("const", "var"):
        return e.value in ("n", "nq", "h", "H", "D") if e.op == "var" else e.value >= 0  # type: ignore[operator]
    if e.op == "where":
        cond, a, b = e.args
        above = cond.op in ("lt", "le") and never_negative(cond.args[0], known)
        return never_negative(a, known | {cond.args[1]} if above else known) and never_negative(b, known)
    if e.op == "max":
        return any(never_negative(arg, known) for arg in e.args)
    if e.op in ("mul", "inner") and e.args[0] is e.args[1]:
        return True
    if e.op == "pow" and ir.number(e.args[1]) in (2, 4):
        return True
    sums = ("add", "mul", "div", "min", "inner", "sum", "concat", "pow")
    return e.op in sums and all(never_negative(arg, known) for arg in e.args[: 1 if e.op == "pow" else None])


def scale_and_bias(score: Expr, head_dim: int) -> tuple[float, Expr | None] | str:
    """a and b with score = a * (Q @ K) + b, b free of s, Q and K and None where it is 0; or why there are
    none."""
    split = affine_in_s(score)
    if split is None:
        return "the score is not s * number + bias"
    slope, bias = split
    scale = ir.number(ir.substitute(slope, {"D": ir.const(head_dim)}))
    if scale is None or not math.isfinite(scale):
        return "the score scales s by something that varies"
    return scale / head_dim**0.5, None if ir.number(bias) == 0 else bias


def affine_in_s(score: Expr) -> tuple[Expr, Expr] | None:
    """A and B, free of s, Q and K, with score = A * s + B; inner(Q, K) counts as sqrt(D) * s."""
    content = frozenset({"s", "Q", "K"})
    zero, one = ir.const(0.0), ir.const(1.0)

    def split(e: Expr) -> tuple[Expr, Expr] | None:
        if e.free.isdisjoint(content):
            return zero, e
        if e.op == "var":
            return (one, zero) if e.value == "s" else None
        if e.op == "inner" and {a.value for a in e.args} == {"Q", "K"}:
            return ir.call("sqrt", ir.var("D")), zero
        parts = [split(arg) for arg in e.args]
        if None in parts:
            return None
        slopes, rests = zip(*(part for part in parts if part is not None), strict=True)
        if e.op == "add":
            return total(slopes), total(rests)
        if e.op == "mul" and (slopes[0] is zero or slopes[1] is zero):
            i = 0 if slopes[0] is zero else 1
            return _times(rests[i], slopes[1 - i]), _times(rests[i], rests[1 - i])
        if e.op == "div" and slopes[1] is zero:
            return ir.div(slopes[0], rests[1]), zero if rests[0] is zero else ir.div(rests[0], rests[1])
        if e.op == "where" and e.args[0].free.isdisjoint(content):
            return ir.where(e.args[0], slopes[1], slopes[2]), ir.where(e.args[0], rests[1], rests[2])
        return None

    return split(score)


def linear_in_tables(e: Expr) -> tuple[Expr, tuple[tuple[Expr, Expr], ...]] | None:
    """What reads no table of a call, and pairs of such a factor and a look-up: e is the first plus all
    products. None where it is no such."""
    if not any(table.known is None for table in e.tables):
        return e, ()
    if e.op == "lookup":
        plain = e.type == "real" and not any(arg.tables for arg in e.args)
        return (ir.const(0.0), ((ir.const(1.0), e),)) if plain else None
    parts = [linear_in_tables(arg) for arg in e.args]
    if None in parts:
        return None
    rests, terms = zip(*(part for part in parts if part is not None), strict=True)
    if e.op == "add":
        return total(rests), tuple([term for some in terms for term in some])
    if e.op == "mul" and not all(terms):
        i = 0 if terms[0] else 1
        if any(factor.type == rests[1 - i].type == "int" for factor, _ in terms[i]):
            return None  # as a real number the product has no range to leave
        scaled = [(_times(factor, rests[1 - i]), read) for factor, read in terms[i]]
        return _times(rests[i], rests[1 - i]), tuple(scaled)
    if e.op == "div" and not terms[1]:
        divided = [(ir.div(factor, rests[1]), read) for factor, read in terms[0]]
        return ir.div(rests[0], rests[1]), tuple(divided)
    return None


def total(parts: tuple[Expr, ...]) -> Expr:
    kept = [part for part in parts if ir.number(part) != 0]
    return ir.add(*kept) if kept else ir.const(0.0)


def _times(a: Expr, b: Expr) -> Expr:
    if ir.number(a) == 0 or ir.number(b) == 0:
        return ir.const(0.0)
    if ir.number(a) == 1:
        return b
    return a if ir.number(b) == 1 else ir.mul(a, b)


def by_distance(e: Expr) -> Expr | None:
    """The expression over `d` = q - k in place of q and k, or None if it depends on more than that."""
    shifted = {"q": ir.add(ir.var("k"), ir.var("d"))}
    done: dict[Expr, Expr] = {}
    for node in ir.nodes(e):
        args = tuple(done[arg] for arg in node.args)
        if node.op == "var":
            done[node] = shifted.get(str(node.value), node)
        elif node.op in ("le", "lt", "eq") and all(a.type == "int" for a in args):
            difference = ir.sub(args[1], args[0])
            done[node] = ir.REBUILD[node.op](ir.ZERO, difference)
        elif node.op == "add":
            # of integers among reals the positions cancel
            whole = [arg for arg in args if arg.type == "int"]
            others = [arg for arg in args if arg.type != "int"]
            done[node] = ir.add(*others, *([ir.add(*whole)] if whole else []))
        else:
            done[node] = ir.rebuild(node, args)
    return None if {"q", "k"} & done[e].free else done[e]
