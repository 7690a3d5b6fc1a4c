"""The score of a group of heads as code of the kernels."""

from __future__ import annotations

from collections.abc import Collection

from attndsl import expr as ir
from attndsl.emit.adjoints import adjoints
from attndsl.emit.code import Code
from attndsl.emit.cpp import added, spelling
from attndsl.emit.leaves import READS, Leaf, leaf_of
from attndsl.emit.score import FACTOR, GAIN, S, Score


def code(score: Score, wanted: Collection[Leaf] | None) -> str:
    """The header of a forward pass or, with leaves whose gradients are `wanted`, of a backward pass."""
    places = {found: i for i, found in enumerate(score.leaves)}
    written = Code(spelling(places), {S: "s", GAIN: "gain", FACTOR: "factor"})
    names = [written.real(root) for root in score.roots]
    if wanted is None:
        signature, results = "score", "vec *factor"
        written.lines += [f"*factor = {names[1]};"] if len(names) > 1 else []
        end = names[0]
    else:
        signature, results = "slopes", "struct Back back, vec *weight"
        given = f"{names[0]}, {names[1] if len(names) > 1 else 'all(1)'}"
        written.lines += ["vec gain, factor;", f"*weight = weighed(back, {given}, live, &gain, &factor);"]
        reads = [node for root in score.roots for node in ir.nodes(root) if node.op in READS]
        asked = [node for node in dict.fromkeys(reads) if leaf_of(node) in wanted]
        found = adjoints(dict(zip(score.roots, (GAIN, FACTOR), strict=False)), [S, *asked])
        for node in filter(found.__contains__, asked):
            slope = f"select(live, {written.name(found[node])}, all(0))"
            written.lines.append(added(node, places, written.names, slope))
        end = written.name(found[S]) if S in found else "all(0)"
    head = f"INLINE vec {signature}(struct Place *at, long row, long key, ivec live, vec s, {results}) {{"
    body = [f"    {line}" for line in (*written.lines, f"return {end};")]
    return "\n".join([*defined(score), head, *body, "}", ""])


def defined(score: Score) -> list[str]:
    said = {
        "SOFTMAX": score.softmax,
        "SHARED": score.norm in ("softmax", "linear"),
        "PLAIN": score.plain,
        "FACTOR": score.factor is not None,
        "LEAVES": len(score.leaves),
    }
    return [f"#define {name} {int(value)}" for name, value in said.items()]
