"""The clauses of an attention, put together group by group."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, get_args, get_type_hints

import numpy as np

from attndsl import expr as ir
from attndsl.attention import Approx, Attention, HeadGroup, Norm, Relation
from attndsl.errors import AttnError, fail, suggest
from attndsl.expr import Expr, Table
from attndsl.language.approx import approx_of, refuse_beside, refuse_mask
from attndsl.language.arguments import bind_arguments, input_table, name_span, score_call
from attndsl.language.mistakes import expected, number_of, quoted
from attndsl.language.streams import over_entries, streams_of
from attndsl.language.sums import sum_of
from attndsl.language.values import (
    TOKENS,
    K,
    Num,
    Pattern,
    Q,
    Scope,
    SetOf,
    TableOf,
    Truth,
    Value,
    Vec,
    as_number,
    as_set,
    intersection,
)
from attndsl.language.vocabulary import BUILT_IN, RESERVED
from attndsl.meaning.pointwise import evaluate
from attndsl.streams import Streams
from attndsl.syntax import nodes as ast

if TYPE_CHECKING:
    from attndsl.language.elaborate import Elaborator

HEAD_LIMIT = 4096
ONE_MORE = "write `norm softmax(sink = 0.0)`: exp(0) is the 1 that is added to the sum"
LINEAR = "write `norm linear`, which divides by the sum; features are in the score, as `elu1(Q) @ elu1(K)`"
A_SINK = "a sink is a number for each head: `learn[H]`, or `inputs z : float[H]`"
OF_VECTORS = "q and k arrive ready: they are normalised before the call"
NORMS = {
    **dict.fromkeys("softmax_one softmax1 softmax_1 softmax_plus_one quiet_softmax".split(), ONE_MORE),
    **dict.fromkeys(("l1", "sum", "mean", "elu", "exp", "kernel"), LINEAR),
    **dict.fromkeys(
        ("layer", "layernorm", "layer_norm", "rms", "rmsnorm", "rms_norm", "l2", "qk_norm"), OF_VECTORS
    ),
    **dict.fromkeys(("identity", "no", "off", "false"), "write `norm none`: the score is the weight"),
    "sink": "write `norm softmax(sink = learn[H])`",
}
"""What other tools call norms, in lower case."""


def attention_of(elaborator: Elaborator, definition: ast.AttentionDef, env: Scope) -> Attention:
    """Its tables declared, then its clauses; `env` holds the parameters."""
    inputs: dict[str, Table] = {}
    for clause in definition.clauses:
        if isinstance(clause, ast.Inputs):
            for decl in clause.decls:
                if decl.name in inputs:
                    raise fail(f"`{decl.name}` is declared twice", name_span(decl))
                if decl.name in env.names:
                    raise fail(f"`{decl.name}` is a parameter and a table", name_span(decl), "rename one")
                if decl.name in RESERVED or decl.name in BUILT_IN:
                    what = "reserved" if decl.name in RESERVED else "built in"
                    raise fail(f"`{decl.name}` is {what}", name_span(decl), "choose another name")
                inputs[decl.name] = input_table(decl)
    env = env.bind(**{name: TableOf(table) for name, table in inputs.items()})
    tables = tuple(inputs.values())
    if definition.sum is not None:
        found = sum_of(elaborator, definition, env, tables)
    else:
        found = AttentionBuilder(elaborator, definition, env).build(tables)
    return replace(found, written=definition.span)


class AttentionBuilder:
    """The clauses of one attention, put together group by group."""

    def __init__(self, elaborator: Elaborator, definition: ast.AttentionDef, env: Scope) -> None:
        self.elaborator, self.definition = elaborator, definition
        self.mask_env = replace(env, integral=True, binding="")
        self.env = replace(env, integral=False, binding="")
        # where positions have no meaning they are in sight all the same: the clause says what it depends on
        self.placed = self.mask_env.bind(q=Num(Q), k=Num(K))
        self.learned: dict[str, Table] = {}
        self.failed: list[AttnError] = []
        self.approx: Approx | None = None
        self.streams: Streams = ()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """A mistake in one clause does not hide those in others."""
        try:
            yield
        except AttnError as error:
            self.failed.append(error)

    def build(self, inputs: tuple[Table, ...]) -> Attention:
        clauses = self.definition.clauses
        heads = [clause for clause in clauses if isinstance(clause, ast.Heads)]
        if len(heads) > 1:
            raise fail("an attention has one `heads` clause", heads[1].span)
        offset = None
        with self.going_on():
            self.once("offset", [c for c in clauses if isinstance(c, ast.Clause)])
        with self.going_on():
            self.once("approx", [c for c in clauses if isinstance(c, ast.Clause)])
        for clause in clauses:
            if isinstance(clause, ast.Clause) and clause.word == "approx":
                with self.going_on():
                    self.approx = approx_of(self.elaborator, clause.value, self.placed)
                    refuse_beside(self.approx, clauses)
            if isinstance(clause, ast.Clause) and clause.word == "offset":
                with self.going_on():
                    offset = self.elaborator.integer(clause.value, self.placed, TOKENS)
                    if not offset.free <= {"n", "nq"} or offset.tables:
                        raise fail("`offset` depends on n and nq alone", clause.value.span)
        self.keys([clause for clause in clauses if isinstance(clause, ast.Keys)])
        groups = self.groups(heads[0]) if heads else [(ir.TRUE, ())]
        built = tuple(self.group(which, own) for which, own in groups)
        with self.going_on():
            built = tuple(
                over_entries(self.streams, group, self.clauses(own))
                for group, (_, own) in zip(built, groups, strict=True)
            )
        if self.failed:
            raise AttnError(*dict.fromkeys(d for error in self.failed for d in error.diagnostics))
        last = (max(listed_heads(which), default=0) for which, _ in groups)
        # `else` and rules such as parity go on for ever
        least = 1 + max((head for head in last if head < HEAD_LIMIT - 2), default=0)
        return Attention(
            self.definition.name,
            built,
            inputs,
            tuple(self.learned.values()),
            offset,
            least,
            self.approx,
            streams=self.streams,
        )

    def keys(self, clauses: list[ast.Keys]) -> None:
        if len(clauses) > 1:
            raise fail("`keys` is given twice", clauses[1].span, "join streams by `++`")
        for clause in clauses:
            with self.going_on():
                self.streams = streams_of(self.elaborator, clause, self.env)
                for table in (table for stream in self.streams for table in stream.tables):
                    if table.parameter:
                        self.declare(table, clause)
            self.env, self.mask_env = (
                env.bind(stream=Num(ir.var("stream"))) for env in (self.env, self.mask_env)
            )

    def groups(self, heads: ast.Heads) -> list[tuple[Expr, tuple[ast.Clause, ...]]]:
        h = ir.var("h")
        found: list[tuple[Expr, tuple[ast.Clause, ...]]] = []
        taken: set[int] = set()
        for i, group in enumerate(heads.groups):
            if group.which is None:
                if i != len(heads.groups) - 1:
                    raise fail("`else` comes last", group.span)
                which = ir.negate(ir.any_of(*(earlier for earlier, _ in found)))
            else:
                which = ir.FALSE
                with self.going_on():
                    which = self.head_set(group.which, h)
                    listed = listed_heads(which)
                    if taken & listed:
                        raise fail(f"head {min(taken & listed)} is in two groups", group.which.span)
                    taken |= listed
            found.append((which, group.clauses))
        return found

    def head_set(self, e: ast.Expression, h: Expr) -> Expr:
        value = as_set(as_number(self.elaborator.value(e, self.placed, TOKENS)))
        if isinstance(value, SetOf):
            which = value.contains(h, TOKENS)
        elif isinstance(value, Num) and value.expr.type == "int":
            which = ir.eq(h, value.expr)
        else:
            listed = quoted(e.args[-1]) if isinstance(e, ast.Compare) and e.ops == ("in",) else "0..5"
            help = f"write `{listed}` or `[0, 2]`"
            if isinstance(value, Truth) and value.expr.free == {"h"} and listed == "0..5":
                rule = re.sub(r"\bh\b", "p", quoted(e))
                help = f"write `{{ p : {rule} }}`" if rule != "..." else "write `{ p : ... }`"
            raise expected("a set of heads", value, e, help)
        if not which.free <= {"h", "H"} or which.tables:
            raise fail("a set of heads depends on h and H alone", e.span)
        if "H" not in which.free and not listed_heads(which):
            help = ""
            if isinstance(e, ast.Binary) and e.op == "-":
                help = f"write `{quoted(e.left)}..{quoted(e.right)}`"
            elif isinstance(value, Num):
                self.elaborator.demand_position(h, value.expr, value.expr, e.span)
            raise fail("this set of heads is empty", e.span, help)
        return which

    def once(self, word: str, clauses: list[ast.Clause]) -> None:
        found = [clause for clause in clauses if clause.word == word]
        if len(found) > 1:
            raise fail(f"`{word}` is given twice", found[1].span)

    def clauses(self, own: tuple[ast.Clause, ...]) -> list[ast.Clause]:
        """Of a group: its own stand where `heads` does."""
        found: list[ast.Clause] = []
        for clause in self.definition.clauses:
            if isinstance(clause, ast.Clause):
                found.append(clause)
            elif isinstance(clause, ast.Heads):
                found.extend(own)
        return found

    def group(self, heads: Expr, own: tuple[ast.Clause, ...]) -> HeadGroup:
        clauses = self.clauses(own)
        for clause in own:
            if clause.word not in ("mask", "score", "decay", "norm"):
                raise fail(f"`{clause.word}` cannot stand inside `heads`", clause.span)
        with self.going_on():
            self.once("norm", clauses)
        relations: list[Relation] = []
        score, norm = ir.var("s"), Norm()
        decays: list[Expr] = []
        for clause in clauses:
            env = replace(self.env, clause=clause)
            with self.going_on():
                if clause.word == "mask":
                    relations.append(self.mask(clause).at(Q, K, TOKENS))
                    if self.approx is not None:
                        refuse_mask(self.approx, relations[-1], clause.value)
                elif clause.word == "score":
                    score = self.score(clause.value, score, env)
                elif clause.word == "decay":
                    decays.append(self.decay(clause.value, env.bind(q=Num(Q), k=Num(K))))
                elif clause.word == "norm":
                    norm = self.norm(clause.value, env.bind(q=Num(Q), k=Num(K)))
        joined = intersection(relations) if relations else Relation(ir.TRUE)
        if joined.count is not None:
            decays.append(ir.mul(ir.const(1.0), joined.count))
        decay = None
        for factor in decays:
            decay = factor if decay is None else ir.mul(decay, factor)
        return HeadGroup(joined, score, decay, norm, heads)

    def mask(self, clause: ast.Clause) -> Pattern:
        e = clause.value
        if isinstance(e, ast.Name) and e.id in self.elaborator.definitions:
            definition = self.elaborator.definitions[e.id]
            if isinstance(definition, ast.Definition) and definition.word == "score":
                raise fail(f"expected a pattern, and `{e.id}` is a score", e.span, f"write `score {e.id}`")
        return self.elaborator.pattern(e, replace(self.mask_env, clause=clause), TOKENS)

    def score(self, e: ast.Expression, current: Expr, env: Scope) -> Expr:
        named: dict[str, Value] = {
            "s": Num(current),
            "q": Num(Q),
            "k": Num(K),
            "Q": Vec(ir.var("Q")),
            "K": Vec(ir.var("K")),
        }
        if "s" in self.env.names:
            for node in ast.walk(e):
                if isinstance(node, ast.Name) and node.id == "s":
                    what = f"`s` is a parameter of `{self.definition.name}`, and the logit in a score"
                    raise fail(what, node.span, help="give the parameter another name")
        env = env.bind(**named)
        call = score_call(e, self.elaborator.definitions, env)
        if call is None:
            return self.real(e, env)
        definition, name, args = call
        values = self.elaborator.arguments(definition, args, env, TOKENS)
        given = bind_arguments(definition, args)
        result = self.elaborator.instance(definition, values, env, name.span, named, given)
        return self.number(result, definition.body)

    def real(self, e: ast.Expression, env: Scope) -> Expr:
        if isinstance(e, ast.Builder) and isinstance(env.clause, ast.Clause):
            word = env.clause.word
            help = f"`q` and `k` are in sight: write `{word} {quoted(e.pred)}`"
            raise fail(f"a {word} is a number, and this is written as a pattern", e.span, help)
        sink = A_SINK if env.binding == "sink" else ""
        return self.number(self.elaborator.no_vector(e, env, TOKENS, sink), e, sink)

    def decay(self, e: ast.Expression, env: Scope) -> Expr:
        factor = self.real(e, env)
        value = ir.number(factor)
        if value is not None and value < 0:
            raise fail(f"a decay is {value}, and a weight may not be negative", e.span)
        return factor

    def number(self, value: Value, e: ast.Expression, help: str = "") -> Expr:
        if isinstance(value, Pattern):
            help = f"a pattern goes into `mask`; look it up: `where({quoted(e, tight=True)}[q, k], a, b)`"
        if isinstance(as_number(value), Truth):
            help = f"a condition goes into `mask`: `{{ q, k : {quoted(e)} }}`"
        result = number_of(value, e, help)
        for table in sorted(result.tables, key=lambda table: table.name):
            if table.parameter:
                if "n" in table.dims:
                    axes = ", ".join(map(str, table.dims))
                    help = f"declare `inputs {table.name} : float[{axes}]`, and give a parameter of yours"
                    raise fail(f"`{table.name}` has as many numbers as there are tokens", e.span, help)
                self.declare(table, e)
        return result

    def declare(self, table: Table, e: ast.Node) -> None:
        known = self.learned.setdefault(table.name, table)
        if known != table:
            raise fail(
                f"two learned parameters are named `{table.name}`",
                e.span,
                help="bind them to different names, or share one through a `let`",
            )

    def norm(self, e: ast.Expression, env: Scope) -> Norm:
        func, args = (e.func, e.args) if isinstance(e, ast.Call) else (e, ())
        if not isinstance(func, ast.Name) or func.id not in get_args(get_type_hints(Norm)["kind"]):
            kinds = get_args(get_type_hints(Norm)["kind"])
            name = func.id if isinstance(func, ast.Name) else ""
            raise fail(
                "a norm is `softmax`, `softmax(sink = ...)`, `sigmoid`, `relu`, `linear` or `none`",
                e.span,
                NORMS.get(name.lower()) or suggest(name, kinds),
            )
        for arg in args:
            if func.id != "softmax":
                raise fail(f"`{func.id}` takes no arguments", arg.span, help="only `softmax` has a sink")
            if arg.name != "sink" or len(args) > 1:
                meant = suggest(arg.name, ("sink",))
                help = meant or "leave it out: the softmax is over the keys of a query"
                if not arg.name and {"s", "Q", "K"} & {
                    x.id for x in ast.walk(arg.value) if isinstance(x, ast.Name)
                }:
                    help = f"it is of the score: write `score {quoted(arg.value)}`"
                elif not arg.name and len(args) == 1:
                    help = f"write `softmax(sink = {quoted(arg.value)})`"
                raise fail("`softmax` takes one argument, `sink = ...`", arg.span, help)
            sink = self.real(arg.value, replace(env, binding="sink"))
            if not sink.free <= {"b", "h", "H", "n", "nq", "D"}:
                raise fail("a sink is one logit per head", arg.value.span)
            return Norm("softmax", sink)
        return Norm(func.id)  # type: ignore[arg-type]


def listed_heads(which: Expr) -> set[int]:
    """The heads below HEAD_LIMIT in a set; none where it depends on H."""
    if "H" in which.free:
        return set()
    heads = np.arange(HEAD_LIMIT)
    held = evaluate(ir.substitute(which, {"h": Q}), heads[:, None], np.zeros((1, 1), np.int64))
    return {*heads[held[:, 0]].tolist()}
