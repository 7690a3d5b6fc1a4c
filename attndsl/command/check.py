"""Commands about what a text claims: check, diff.

A child has what was imported before it started: so proofs are, which both processes need.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import click
import numpy as np

from attndsl.attention import Attention
from attndsl.bound import Bound
from attndsl.command import child
from attndsl.command.given import bare_names, bound, columns, echo_json, file_and_name, program_of, tables
from attndsl.command.options import FILE, INPUTS, JSON, LENGTH, LIMIT, Command, argument, whole
from attndsl.errors import AttnError, Diagnostic, fail
from attndsl.expr import Expr, Selected, Table, all_of, any_of
from attndsl.language.assertions import Assertion, prove
from attndsl.program import Program
from attndsl.relations import proofs
from attndsl.relations.proofs import Verdict

BLOCK_SIZE = 128
ROWS = 256
"""Queries whose pairs are compared at once."""


@click.command(cls=Command)
@argument("paths", f"{FILE}.", metavar="FILE...", nargs=-1, required=True, callback=whole)
@click.option("-q", "--quiet", is_flag=True, help="Say only what is wrong.")
@JSON
@LIMIT
def check(paths: tuple[str, ...], quiet: bool, as_json: bool, time_limit: float) -> None:
    """Parse, type-check and prove the assertions of files.

    Exit 1 on any error or refuted assertion.
    """
    told = () if as_json else ("error", "warning") if quiet else ("error", "warning", "note")
    reports = [check_file(file, time_limit, told) for file in paths]
    if as_json:
        echo_json({"files": reports})
    elif lines := [line for report in reports for line in report_lines(report, quiet)]:
        click.echo("\n".join(lines))
    if not all(report["fine"] for report in reports):
        raise click.exceptions.Exit(1)


def report_lines(report: dict[str, Any], quiet: bool) -> list[str]:
    file = report["file"]
    if not report["assertions"]:
        said = f"{file}: {'fine' if report['fine'] else 'not checked further'}"
        return [] if quiet and report["fine"] else [said]
    return [
        f"{found['file']}:{found['line']}: {found['status']}: {found['assertion']}"
        + proofs.detail(found["at"], found["counter_example"], found["tables"], found["reason"])
        for found in report["assertions"]
        if not quiet or found["status"] == "refuted"
    ]


def check_file(file: str, time_limit: float, told: Collection[str]) -> dict[str, Any]:
    """Diagnostics of the severities in `told` are also said on stderr."""
    shown = "<stdin>" if file == "-" else file

    errors: Sequence[Diagnostic] = ()
    warned: Sequence[Diagnostic] = ()
    verdicts: Sequence[Verdict] = ()
    try:
        program = program_of(file)
        warned, verdicts = judged(program, time_limit)
    except AttnError as error:
        errors = error.diagnostics
    if said := [found.shown(columns()) for found in (errors or warned) if found.severity in told]:
        click.echo(("\n\n" if errors else "\n").join(said), err=True)
    assertions = [
        {
            "file": assertion.span.source.name,
            "line": assertion.span.source.position(assertion.span.start)[0],
            "assertion": assertion.text,
            **of_verdict(verdict),
        }
        for assertion, verdict in zip(() if errors else program.assertions, verdicts, strict=True)
    ]
    return {
        "file": shown,
        "fine": not errors and all(found["status"] != "refuted" for found in assertions),
        "errors": [of_diagnostic(found, shown) for found in errors],
        "warnings": [of_diagnostic(found, shown) for found in warned],
        "assertions": assertions,
    }


def of_diagnostic(found: Diagnostic, file: str) -> dict[str, Any]:
    """Line and column count from 1; None, in `file`, where a message is about no place in a text."""
    line = column = None
    if found.span is not None:
        file = found.span.source.name
        line, column = found.span.source.position(found.span.start)
    said = {"severity": found.severity, "message": found.message, "help": found.help}
    return {"file": file, "line": line, "column": column, **said}


def of_verdict(found: Verdict) -> dict[str, Any]:
    return {
        "status": found.status,
        "at": found.at,
        "counter_example": found.counter_example,
        "tables": {name: array.tolist() for name, array in found.tables.items()} if found.tables else None,
        "reason": found.reason,
    }


def judged(program: Program, time_limit: float) -> tuple[list[Diagnostic], list[Verdict]]:
    """Warnings, and a verdict on each assertion: in one child, or one each where a stage takes too long."""

    def warnings(stage: child.Stage) -> list[Diagnostic]:
        stage(f"looking for warnings in {program.name}", time_limit)
        return [*program.warnings, *looking_ahead(program)]

    def everything(stage: child.Stage) -> tuple[list[Diagnostic], list[Verdict]]:
        warned, verdicts = warnings(stage), []
        for assertion in program.assertions:
            stage(f"proving {assertion.text}", time_limit)
            verdicts.append(prove(assertion))
        return warned, verdicts

    try:
        return child.run(everything)
    except child.TimeLimitError:
        return child.run(warnings), [decided(assertion, time_limit) for assertion in program.assertions]


def looking_ahead(program: Program) -> Iterator[Diagnostic]:
    """Warnings of choices by content that later tokens change."""
    every = map(program.__getitem__, program.names if program.elaborator.leaves else ())
    choosing = [bound for bound in every if isinstance(bound, Bound) and bound.attention.selected]
    told: set[Table] = set()
    # a sum after its parts, of which more can be said
    for definition in sorted(choosing, key=lambda bound: len(bound.attention.parts)):
        from attndsl.execution import leaks

        parts = definition.attention.parts
        tables = [table for table in leaks.unstable(definition.attention) if not (parts and table in told)]
        told |= {*tables}
        for table in tables:
            origin = table.origin
            assert isinstance(origin, Selected)
            _, span = program.elaborator.leaves[origin]
            message = f"`{origin.selection}` looks ahead: later tokens may change what an earlier query sees"
            help = COUNTED if leaks.counted(table, definition.attention) else _safe(origin)
            yield Diagnostic(message, span, help, "warning")


COUNTED = "in `within` `n` counts the bucket, later tokens too: write a number, as `last(64)`"


def _safe(origin: Selected) -> str:
    """How what looks ahead is written so that it does not."""
    if origin.of is None:
        centers = [value.name for _, value in origin.arguments if isinstance(value, Table)]
        labels, group = (f"nearest({centers[0]})", "center") if centers else ("hash(...)", "bucket")
        return f"`within({labels}, last(w))` does not: no token changes the {group} of another"
    b = max(origin.rows, origin.unit)
    over = f"`{origin.selection}(..., of = blocks({b}, causal - radius(0)))`"
    if origin.rows > 1:
        return f"the mean of a block is of its last queries too: choose for each query, {over}"
    if origin.unit > 1:
        return f"choose among blocks that are over, and add the query's own: {over} and `block({b})`"
    return "choose among what is causal: `of = causal`"


def decided(assertion: Assertion, time_limit: float) -> Verdict:
    """A proof that takes too long is undecided."""

    def work(stage: child.Stage) -> Verdict:
        stage(f"proving {assertion.text}", time_limit)
        return prove(assertion)

    try:
        return child.run(work)
    except child.TimeLimitError as limit:
        return Verdict("undecided", reason=limit.diagnostics[0].message)


def two(ctx: click.Context, param: click.Parameter, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Two masks, each FILE:NAME."""
    file, name = file_and_name(targets[0])
    bare = bare_names(targets)
    if len(targets) != 2 or bare:
        names = [*filter(None, [name]), *bare, "NAME", "NAME"][:2]
        ctx.fail(f"two masks are compared: write `diff {file}:{names[0]} {file}:{names[1]}`")
    return targets


def at_length(left: Attention, right: Attention, length: int, given: dict[str, Any]) -> list[Verdict]:
    """Whether each is a subset of the other at one length, by their pairs; `given` are tables."""
    from attndsl.tiles import lowering

    for name in given:
        lowering.check_names(right if name in {t.name for t in right.inputs} else left, {name: given[name]})
    heads = max(lowering.heads_of(attention, given) for attention in (left, right))
    tiled = []
    for attention in (left, right):
        own = {table.name: given[table.name] for table in attention.inputs if table.name in given}
        tiled.append(lowering.tiles_of(attention, length, BLOCK_SIZE, heads=heads, inputs=own))
    found: list[Verdict | None] = [None, None]
    for start in range(0, length, ROWS):
        masks = [block_mask.to_dense(start, min(start + ROWS, length)) for block_mask in tiled]
        for i, (mine, other) in enumerate((masks, masks[::-1])):
            outside = np.argwhere(mine & ~other)
            if found[i] is None and len(outside):
                *_, h, q, k = map(int, outside[0])
                point = {"n": length, **({"h": h} if heads > 1 else {}), "q": start + q, "k": k}
                found[i] = Verdict("refuted", point)
    return [verdict or Verdict("proved") for verdict in found]


@click.command(cls=Command)
@argument(
    "targets", f"{FILE}, and NAME an attention or pattern in it.",
    metavar="FILE:NAME FILE:NAME", nargs=-1, required=True, callback=two,
)  # fmt: skip
@click.option("--length", type=LENGTH, help="Compare at this number of keys alone, pair by pair.")
@INPUTS
@JSON
@LIMIT
def diff(
    targets: tuple[str, str], length: int | None, inputs: dict[str, str], as_json: bool, time_limit: float
) -> None:
    """Whether two masks are equal, one a subset of the other, or a pair that differs.

    For every length, unless one is given.
    """
    left, right = targets
    mine, other = (bound(*file_and_name(target), None).attention for target in targets)
    if inputs and length is None:
        raise click.UsageError("tables are compared at one length: give --length too")
    given = tables(inputs)

    def work(stage: child.Stage) -> list[Verdict]:
        stage("comparing", time_limit)
        if length is not None:
            return at_length(mine, other, length, given)
        masks = each_head(mine), each_head(other)
        return [proofs.subset(*masks), proofs.subset(*masks[::-1])]

    inside, outside = child.run(work)
    refuted = [found for found in (inside, outside) if found.status == "refuted"]
    if len(refuted) == 2:
        status, said = "different", f"the masks of {left} and {right} differ"
    elif "undecided" in (inside.status, outside.status):
        status, said = "undecided", "undecided"
    elif inside.status == outside.status:
        status, said = "equal", f"the masks of {left} and {right} are equal"
    elif inside.status == "proved":
        status, said = "subset", f"the mask of {left} is a subset of that of {right}"
    else:
        status, said = "superset", f"the mask of {right} is a subset of that of {left}"
    pairs = [
        {"only_in": side, **(found.counter_example or {})}
        for side, found in ((left, inside), (right, outside))
        if found.status == "refuted"
    ]
    reason = next((found.reason for found in (inside, outside) if found.reason), "")
    if as_json:
        echo_json({"left": left, "right": right, "status": status, "pairs": pairs, "reason": reason})
        return
    if length is not None:
        said += f" at n = {length}"
    click.echo(said + (f": {reason}" if status == "undecided" else ""))
    if status == "undecided":
        click.echo("  help: at one length it is decided, such as `--length 256`")
    for pair in pairs:
        where = ", ".join(f"{name} = {value}" for name, value in pair.items() if name != "only_in")
        click.echo(f"  only in {pair['only_in']}: {where}")


def each_head(attention: Attention) -> Expr:
    """The mask at head `h`."""
    if attention.streams:
        raise fail(f"the keys of `{attention.name}` are streams, and relations of tokens are compared")
    return any_of(*(all_of(group.heads, group.relation.mask) for group in attention.groups))
