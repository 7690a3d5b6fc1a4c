"""Attention whose weights are inner products of features: found by its form, for what needs no pairs then."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from attndsl import expr as ir
from attndsl.attention import Attention
from attndsl.expr import Expr
from attndsl.scores import BY_KEY, BY_QUERY, by_pair, never_negative, total

Q, K = ir.var("q"), ir.var("k")
CAUSAL = ir.le(K, Q)


@dataclass(frozen=True)
class LinearForm:
    """What an attention asks for.

    features        of the query and of the key, or their logarithms where `powers` holds
    apart           numbers that stand beside those in the exponents
    log_q, log_k    of the decay, or None
    causal          whether a query sees keys up to itself, else all
    segments        pairs of integers of the query and of the key that are equal for what is related
    queries, keys   truths that hold for queries and keys that take part
    signs           numbers of the query and of the key whose product has the sign of the decay
    """

    features: tuple[Expr, Expr]
    powers: tuple[bool, bool]
    apart: tuple[Expr, Expr]
    log_q: Expr | None
    log_k: Expr | None
    causal: bool
    segments: tuple[tuple[Expr, Expr], ...]
    queries: Expr
    keys: Expr
    signs: tuple[Expr, Expr]

    @property
    def constant_state(self) -> bool:
        """Whether sums over the keys so far are all that later queries need."""
        return self.causal and not self.segments and self.queries is ir.TRUE

    def width(self, head_dim: int) -> int | None:
        """Of the features; None where a table tells it."""
        width = self.features[1].width
        assert width is not None
        found = ir.number(ir.substitute(width, {"D": ir.const(head_dim)}))
        return None if found is None else int(found)


@lru_cache(maxsize=256)
def form_of(attention: Attention) -> LinearForm | str:
    """Or why there is none."""
    if len(attention.groups) != 1:
        return "its groups of heads differ"
    (group,) = attention.groups
    if group.norm.kind not in ("linear", "none"):
        return f"its norm is {group.norm.kind}"
    found = feature_form(group.score, group.decay)
    if isinstance(found, str):
        return found
    if (found.log_q is not None and "Q" in found.log_q.free) or (
        found.log_k is not None and "K" in found.log_k.free
    ):
        return "its decay is of what is in q and k"
    mask = group.relation.mask
    parts = mask.args if mask.op == "and" else (mask,) if mask is not ir.TRUE else ()
    rest = [part for part in parts if part is not CAUSAL]
    segments, queries, keys = [], [], []
    for part in rest:
        if "q" not in part.free:
            keys.append(part)
        elif "k" not in part.free:
            queries.append(part)
        elif (pair := _segment(part)) is not None:
            segments.append(pair)
        else:
            return "its mask is neither full nor causal, nor that in segments"
    if any("h" in part.free for part in rest) or group.relation.count is not None:
        return "its mask differs from head to head"
    sides = found.phi_q, found.phi_k
    powers = (found.phi_q.op == "exp", found.phi_k.op == "exp")
    query, key = (
        _parted(phi.args[0]) if power else (phi, ir.ZERO) for phi, power in zip(sides, powers, strict=True)
    )
    return LinearForm(
        (query[0], key[0]), powers, (query[1], key[1]), found.log_q, found.log_k, len(rest) < len(parts),
        tuple(segments), ir.all_of(*queries), ir.all_of(*keys), found.signs,
    )  # fmt: skip


def _parted(e: Expr) -> tuple[Expr, Expr]:
    """A vector and a number whose sum it is."""
    if e.op == "add":
        vectors, numbers = [], []
        for arg in e.args:
            vector, number = _parted(arg) if arg.type == "vec" else (None, arg)
            vectors += [vector] if vector is not None else []
            numbers.append(number)
        return ir.add(*vectors), ir.add(*numbers)
    if e.op in ("mul", "div"):
        for i, scale in enumerate(e.args):
            if scale.type != "vec" and (i == 1 or e.op == "mul"):
                vector, number = _parted(e.args[1 - i])
                join = ir.mul if e.op == "mul" else ir.div
                if vector.op == "matvec":
                    # of the fewer numbers
                    matrix, x = vector.args
                    vector = ir.matvec(matrix, join(x, scale))
                else:
                    vector = join(vector, scale)
                return vector, ir.ZERO if number is ir.ZERO else join(number, scale)
    return e, ir.ZERO


def _segment(part: Expr) -> tuple[Expr, Expr] | None:
    if part.op != "eq" or any(arg.type != "int" for arg in part.args):
        return None
    for mine, other in (part.args, part.args[::-1]):
        if "k" not in mine.free and ir.substitute(mine, {"q": K}) is other:
            return mine, other
    return None


@dataclass(frozen=True)
class FeatureForm:
    """A weight that is exp(log_q + log_k) * inner(phi_q, phi_k), without its norm.

    phi_q, log_q depend on no key, phi_k, log_k on no query; the logarithms are None where there are none.
    `signs` as in LinearForm.
    """

    phi_q: Expr
    phi_k: Expr
    signs: tuple[Expr, Expr] = (ir.ONE, ir.ONE)
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
    before = len(queries), len(keys)
    for factor in _factors(decay, []) if decay is not None else ():
        if not _sort(factor, queries, keys, logs):
            return "the decay is no product of factors of the query and factors of the key"
    phi_q, phi_k = sides
    sign_q, sign_k = (_sign(own[i:]) for own, i in zip((queries, keys), before, strict=True))
    for own in queries:
        phi_q = ir.mul(own, phi_q)
    for own in keys:
        phi_k = ir.mul(own, phi_k)
    log_q, log_k = (total(part) for part in zip(*logs, strict=True)) if logs else (None, None)
    return FeatureForm(phi_q, phi_k, (sign_q, sign_k), log_q, log_k)


def _sign(factors: list[Expr]) -> Expr:
    found: Expr = ir.ONE
    for factor in factors:
        found = found if never_negative(factor) else ir.mul(found, factor)
    return found


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
        return total(one), total(other)
    if e.op in ("mul", "div"):
        for i, scale in enumerate(e.args):
            if not scale.free & (BY_QUERY | BY_KEY) and (i == 1 or e.op == "mul"):
                found = _terms(e.args[1 - i])
                join = ir.mul if e.op == "mul" else ir.div
                return found and (join(found[0], scale), join(found[1], scale))
    return None
