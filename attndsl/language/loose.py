"""Unions that let a query see later keys past a `causal` that binds closer: `causal & A | C`."""

from __future__ import annotations

from collections.abc import Iterator

from attndsl import expr as ir
from attndsl.errors import AttnError, Diagnostic
from attndsl.expr import Expr
from attndsl.language.arguments import input_table
from attndsl.language.elaborate import Elaborator
from attndsl.language.idle import PARTS, Looked, alone, around_condition
from attndsl.language.mistakes import written
from attndsl.language.values import TOKENS, K, Q, Scope, TableOf, Value
from attndsl.syntax import nodes as ast

CLOSER = {"|": "&", "or": "and"}
CAUSAL, BEFORE = ir.le(K, Q), ir.lt(K, Q)


def loosened(e: ast.Expression, looked: Looked) -> Iterator[Diagnostic]:
    """Of a mask or the body of a pattern: where an operand of its `|` is cut by `causal`, and one right of it
    is not and reaches later keys. Brackets around the first say that it is meant; names mean what `looked`
    says."""
    union, put = (e.pred, around_condition(e)) if isinstance(e, ast.Builder) else (e, alone)
    if not isinstance(union, ast.Nary) or union.op not in CLOSER:
        return
    closer = CLOSER[union.op]
    for i, cut in enumerate(union.args[:PARTS]):
        joined = _joined(cut, closer)
        causal = next((arg for arg in joined if _is_causal(put(arg), looked)), None)
        if causal is None:
            continue
        bare = (other for other in union.args[i + 1 : PARTS] if not _joined(other, closer))
        pairs = ((other, _later(put(other), looked)) for other in bare)
        for other, pair in ((other, pair) for other, pair in pairs if pair):
            kept = f" {closer} ".join(written(arg) for arg in joined if arg is not causal)
            others = f" {union.op} ".join(map(written, union.args[i + 1 :]))
            inside = f"{written(causal)} {closer} ({kept} {union.op} {others})"
            meant = f"({written(cut)}) {union.op} {others}"
            yield Diagnostic(
                f"`{closer}` binds closer than `{union.op}`, so nothing keeps this from later keys: {pair}",
                other.span,
                f"write `{inside}`, or `{meant}` if it is meant",
                "warning",
            )
            return


def ahead(e: ast.Expression, looked: Looked) -> Iterator[Diagnostic]:
    """Of a mask without brackets: first keys, or others that are listed, beside what is causal alone."""
    masks = [(arg, looked.mask(arg)) for arg in _joined(e, "|")[:PARTS]]
    listed = [arg for arg, mask in masks if mask is not None and mask.free == {"k"}]
    causal = [
        arg for arg, mask in masks if mask is not None and {"q", "k"} <= mask.free and not _later(arg, looked)
    ]
    if not causal or len(listed) + len(causal) < len(masks):
        return
    for arg, pair in ((arg, _later(arg, looked)) for arg in listed):
        if pair:
            said = f"what stands beside this is causal, and it is not: {pair}"
            yield Diagnostic(said, arg.span, f"write `causal & ({written(e)})`", "warning")
            return


def named(
    elaborator: Elaborator, params: tuple[ast.Param, ...], clauses: tuple[ast.Node, ...] = ()
) -> Looked:
    """What names mean with the defaults of the parameters, and with the inputs of these clauses."""
    names: dict[str, Value] = {}
    for param in params:
        if param.default is not None:
            try:
                names[param.name] = elaborator.value(param.default, Scope(names, binding=param.name), TOKENS)
            except AttnError:
                continue  # of what reads it nothing is said
    decls = (decl for clause in clauses if isinstance(clause, ast.Inputs) for decl in clause.decls)
    return Looked(elaborator, Scope(names | {decl.name: TableOf(input_table(decl)) for decl in decls}))


def _joined(e: ast.Expression, op: str) -> tuple[ast.Expression, ...]:
    """What it joins by this operator, without brackets around."""
    bare = isinstance(e, ast.Nary) and e.op == op and e.span.start == e.args[0].span.start
    return e.args if isinstance(e, ast.Nary) and bare else ()


def _is_causal(e: ast.Expression, looked: Looked) -> bool:
    """Whether it is there to keep a query from later keys, and says nothing else."""
    from attndsl.relations.proofs import follows

    mask = looked.mask(e)
    return mask is not None and _plain(mask) and follows(mask, CAUSAL) and follows(BEFORE, mask)


def _later(e: ast.Expression, looked: Looked) -> str:
    """A pair of a query and a later key, where it relates one."""
    from attndsl.relations.proofs import subset

    mask = looked.relation(e)
    if mask is None or not _plain(mask):
        return ""
    at = subset(mask, CAUSAL).counter_example
    sees = "may see" if mask.tables else "sees"
    return f"query {at['q']} {sees} key {at['k']} at n = {at['n']}" if at else ""


def _plain(mask: Expr) -> bool:
    return mask.free <= {*"qkn"}
