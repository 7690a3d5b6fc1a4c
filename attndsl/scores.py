"""What a score is, told from its expression: how it depends on the logit, on distances, pairs and heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
            return _sum(slopes), _sum(rests)
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
        return _sum(rests), tuple([term for some in terms for term in some])
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


def _sum(parts: tuple[Expr, ...]) -> Expr:
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
        else:
            done[node] = ir.rebuild(node, args)
    return None if {"q", "k"} & done[e].free else done[e]


@dataclass(frozen=True)
class FeatureForm:
    """A weight that is exp(log_q + log_k) * inner(phi_q, phi_k), without its norm.

    phi_q, log_q depend on no key, phi_k, log_k on no query; the logarithms are None where there are none.
    """

    phi_q: Expr
    phi_k: Expr
    log_q: Expr | None = None
    log_k: Expr | None = None


def feature_form(score: Expr, decay: Expr | None) -> FeatureForm | str:
    """Of a score that is a weight, with its decay; or why there is none.

    Factors of one side go into its features. `g ** x` is positive wherever its decay is that of a weight.
    """
    queries: list[Expr] = []
    keys: list[Expr] = []
    logs: list[tuple[Expr, Expr]] = []
    root = ir.inner(ir.div(ir.var("Q"), ir.call("sqrt", ir.var("D"))), ir.var("K"))
    vectors: list[Expr] = []
    for factor in _factors(ir.substitute(score, {"s": root}), vectors):
        if not _sort(factor, queries, keys, logs):
            return "the score is no inner product of features of the query and features of the key"
    if len(vectors) != 2 or not (sides := _sides(*vectors)):
        return "the score is no inner product of features of the query and features of the key"
    for factor in _factors(decay, []) if decay is not None else ():
        if not _sort(factor, queries, keys, logs):
            return "the decay is no product of factors of the query and factors of the key"
    phi_q, phi_k = sides
    for own in queries:
        phi_q = ir.mul(own, phi_q)
    for own in keys:
        phi_k = ir.mul(own, phi_k)
    if not logs:
        return FeatureForm(phi_q, phi_k)
    log_q, log_k = (_sum(part) for part in zip(*logs, strict=True))
    return FeatureForm(phi_q, phi_k, log_q, log_k)


def _factors(e: Expr, vectors: list[Expr]) -> list[Expr]:
    """Numbers whose product it is, together with the inner product of two vectors, which are put apart."""
    if e.op == "mul":
        return [factor for arg in e.args for factor in _factors(arg, vectors)]
    if e.op == "div" and e.type == "real":
        return [*_factors(e.args[0], vectors), ir.div(ir.const(1.0), e.args[1])]
    if e.op == "inner" and by_pair(e) and not vectors:
        return [number for arg in e.args for number in _bare(arg, vectors)]
    return [e]


def _bare(vector: Expr, vectors: list[Expr]) -> list[Expr]:
    """Numbers that a vector is multiplied with; the vector without them is put apart."""
    if vector.op == "mul" and (numbers := [arg for arg in vector.args if arg.type != "vec"]):
        (rest,) = (arg for arg in vector.args if arg.type == "vec")
        return [*numbers, *_bare(rest, vectors)]
    if vector.op == "div" and vector.args[0].type == "vec" and vector.args[1].type != "vec":
        return [ir.div(ir.const(1.0), vector.args[1]), *_bare(vector.args[0], vectors)]
    vectors.append(vector)
    return []


def _sides(a: Expr, b: Expr) -> tuple[Expr, Expr] | None:
    """The features of the query, then those of the key."""
    for one, other in ((a, b), (b, a)):
        if not one.free & BY_KEY and not other.free & BY_QUERY:
            return one, other
    return None


def _sort(factor: Expr, queries: list[Expr], keys: list[Expr], logs: list[tuple[Expr, Expr]]) -> bool:
    """Whether a factor belongs to the query, to the key, or is the exponential of a sum of both."""
    if not factor.free & BY_KEY:
        queries.append(factor)
    elif not factor.free & BY_QUERY:
        keys.append(factor)
    elif (parts := _logarithm(factor)) is not None:
        logs.append(parts)
    else:
        return False
    return True


def _logarithm(factor: Expr) -> tuple[Expr, Expr] | None:
    """That of a power, as a part of the query and a part of the key."""
    if factor.op == "exp":
        return _terms(factor.args[0])
    if factor.op != "pow" or factor.args[0].free & (BY_QUERY | BY_KEY):
        return None
    base, exponent = factor.args
    value = ir.number(base)
    found = _terms(exponent) if value is None or value > 0 else None
    return found and tuple(ir.mul(ir.call("log", base), part) for part in found)  # type: ignore[return-value]


def _terms(e: Expr) -> tuple[Expr, Expr] | None:
    """A part that depends on no key and one that depends on no query, whose sum it is."""
    zero = ir.const(0.0)
    if not e.free & BY_KEY:
        return e, zero
    if not e.free & BY_QUERY:
        return zero, e
    if e.op == "add":
        parts = [_terms(arg) for arg in e.args]
        if None in parts:
            return None
        one, other = zip(*(part for part in parts if part is not None), strict=True)
        return _sum(one), _sum(other)
    if e.op in ("mul", "div"):
        for i, scale in enumerate(e.args):
            if not scale.free & (BY_QUERY | BY_KEY) and (i == 1 or e.op == "mul"):
                found = _terms(e.args[1 - i])
                join = ir.mul if e.op == "mul" else ir.div
                return found and (join(found[0], scale), join(found[1], scale))
    return None
