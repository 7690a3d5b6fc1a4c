"""The clause `approx`: what is computed in place of weights of pairs, and what cannot stand beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from attndsl import expr as ir
from attndsl.attention import Approx, Relation
from attndsl.errors import fail, suggest
from attndsl.language.arguments import bind_arguments_of
from attndsl.language.values import TOKENS, Scope
from attndsl.relations.proofs import follows
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.language.elaborate import Elaborator

LANDMARKS, ITERATIONS = 4096, 100
"""The most of each."""
USAGE = "nystrom(landmarks, iterations = 6)"
BESIDE = {
    "score": "there is no logit of a pair that a score could change",
    "decay": "there is no weight of a pair that a decay could multiply",
    "norm": "its softmaxes are its own",
    "heads": "it is of all heads",
    "keys": "it is of tokens alone",
}
"""Clauses that mean nothing beside any approximation, and why."""

ELSEWHERE = {
    "linformer": "write `keys proj(learn[256, n])`",
    **dict.fromkeys(("performer", "favor"), "write `score favor(Q, W) @ favor(K, W)` and `norm linear`"),
    **dict.fromkeys(("linear", "elu"), "write `score elu1(Q) @ elu1(K)` and `norm linear`"),
    **dict.fromkeys(("reformer", "lsh"), "write `mask lsh(...)`"),
}
"""What other clauses say."""


def approx_of(el: Elaborator, e: ast.Expression, env: Scope) -> Approx:
    func, args = (e.func, e.args) if isinstance(e, ast.Call) else (e, ())
    kind = func.id if isinstance(func, ast.Name) else ""
    if kind == "shen":
        if args:
            raise fail("`shen` takes no arguments", args[0].span)
        return Approx("shen")
    if kind != "nystrom":
        help = ELSEWHERE.get(kind.lower()) or (suggest(kind, ("nystrom", "shen")) if kind else "")
        raise fail(f"an approximation is `{USAGE}` or `shen`", e.span, help)
    call = e if isinstance(e, ast.Call) else ast.Call(e, (), span=e.span)
    given = bind_arguments_of(kind, ("landmarks",), ("iterations",), call, USAGE)
    landmarks = _between(el, "landmarks", given["landmarks"], env, LANDMARKS)
    iterations = (
        _between(el, "iterations", given["iterations"], env, ITERATIONS) if "iterations" in given else 6
    )
    return Approx("nystrom", landmarks, iterations)


def _between(el: Elaborator, name: str, e: ast.Expression, env: Scope, most: int) -> int:
    found = el.constant(e, env, TOKENS, f"`{name}`")
    if not 0 < found <= most:
        raise fail(f"`{name}` is {found}, and must be 1 to {most:,}", e.span)
    return found


def refuse_beside(approx: Approx, clauses: Iterable[ast.Node]) -> None:
    """Raises AttnError for a clause that it gives no meaning to."""
    for clause in clauses:
        word = clause.word if isinstance(clause, ast.Clause) else type(clause).__name__.lower()
        if word in BESIDE:
            raise fail(f"`{approx.kind}` takes no `{word}`: {BESIDE[word]}", clause.span)
        if word == "offset" and approx.kind == "nystrom":
            why = "its landmarks are means of queries and keys of the same positions"
            raise fail(f"`nystrom` takes no `offset`: {why}", clause.span)


def refuse_mask(approx: Approx, relation: Relation, e: ast.Expression) -> None:
    """Raises AttnError for a mask that does not leave the same keys to all queries, each once."""
    what = "its landmarks are means" if approx.kind == "nystrom" else "its features of keys are normalised"
    if relation.count is not None:
        raise fail(f"`{approx.kind}` cannot count a key more than once: it has no weights of pairs", e.span)
    if "q" not in relation.mask.free:
        return
    if follows(relation.mask, ir.le(ir.var("k"), ir.var("q"))):
        raise fail(f"`{approx.kind}` cannot be causal: {what} over all positions, later ones too", e.span)
    raise fail(
        f"`{approx.kind}` leaves the same keys to all queries, and this mask depends on the query",
        e.span,
        help="a mask of keys alone is written `{ q, k : k < lengths }`",
    )
