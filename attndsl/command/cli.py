"""The command line. Each command gathers plain data, then prints it as text or as one JSON object."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from attndsl.errors import AttnError, Diagnostic, fail

if TYPE_CHECKING:
    from attndsl.analysis.part import Subject
    from attndsl.analysis.report import Report
    from attndsl.attention import Attention
    from attndsl.bound import Bound
    from attndsl.command.child import Stage
    from attndsl.execution.plan import Plan
    from attndsl.expr import Expr
    from attndsl.html.masks import Mask
    from attndsl.language.assertions import Assertion
    from attndsl.pictures import Drawing
    from attndsl.program import Program
    from attndsl.relations.proofs import Verdict
    from attndsl.tiles.blockmask import BlockMask

Command = Callable[..., Any]
T = TypeVar("T")

TILES = 1024
"""Tiles on a side of a mask to draw or to count in, about."""


class Commands(click.Group):
    """A user's mistake is its diagnostics on stderr and exit code 1; wrong usage is click's, with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttnError as error:
            click.echo(str(error), err=True)
            ctx.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="attndsl")
def main() -> None:
    """Attention patterns as text: run, inspect and check them."""


def pair(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`name=value` options as a dictionary."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            raise click.BadParameter(f"`{value}` is not of the form name=value", ctx, param)
        if name in found:
            raise click.BadParameter(f"`{name}` is given twice", ctx, param)
        found[name] = rest
    return found


def options(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def add(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


class Count(click.IntRange):
    """A whole number, at least `least`; `example` stands in the message about what is none."""

    def __init__(self, least: int, example: int) -> None:
        super().__init__(min=least)
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(int(value), param, ctx)
        except ValueError:
            name = param.opts[0] if param else "this"
            raise click.UsageError(f"`{name}` takes a whole number, such as {self.example}", ctx) from None


LENGTH = Count(1, 65536)
COUNT = Count(1, 64)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
LIMIT = click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True,
    help="Seconds for symbolic work: proofs and tiling.",
)  # fmt: skip
INPUTS = click.option(
    "--input", "inputs", metavar="T=FILE.npy", multiple=True, callback=pair, help="A run-time table."
)
HEADS = click.option(
    "--heads", type=COUNT, help="Query heads; else as many as the attention and its tables speak of."
)
SHAPE = options(
    click.option("--kv-heads", type=COUNT, help="Number of key heads, if not that of query heads."),
    click.option("--head-dim", type=COUNT, default=64, show_default=True),
    click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
                 default="float32", show_default=True),
)  # fmt: skip
TARGET = options(
    click.argument("file"),
    click.argument("name", required=False),
    click.option("--set", "params", metavar="P=V", multiple=True, callback=pair,
                 help="A parameter, as the language writes it: 4, [0, 8], 0..3."),
    INPUTS,
)  # fmt: skip
SIZES = options(
    click.option("--length", type=LENGTH, required=True, help="Number of keys, n."),
    click.option("--q-length", type=LENGTH, help="Number of queries, if not n."),
    HEADS,
    click.option("--batch", type=COUNT, default=1, show_default=True),
    click.option("--block-size", type=COUNT, help="Tokens on the side of a tile."),
    LIMIT,
)  # fmt: skip
PROBLEM = options(
    SIZES,
    SHAPE,
    click.option("--device", default="cpu", show_default=True),
    click.option("--backend", help="Take this one or fail; the default is the cheapest that can."),
)  # fmt: skip


def program_of(file: str) -> Program:
    """The program of a file, or of stdin for `-`."""
    import attndsl

    return attndsl.parse(read(file), "<stdin>") if file == "-" else attndsl.load(file)


def bound(file: str, name: str | None, params: dict[str, str]) -> Bound:
    """The attention that a command is about."""
    return titled(file, name, params)[0]


def titled(file: str, name: str | None, params: dict[str, str]) -> tuple[Bound, str]:
    """The attention, and its name with the parameters that differ from the defaults."""
    from attndsl.bound import Bound

    program = program_of(file)
    name = name or program.default()
    definition = program[name]
    attention = definition(**params) if params else definition
    if not isinstance(attention, Bound):
        raise fail(str(attention).strip("<>"), help="give them with --set name=value")
    return attention, title(program, name, params)


def title(program: Program, name: str, params: dict[str, str]) -> str:
    from attndsl import syntax
    from attndsl.errors import Source
    from attndsl.syntax.format import render

    defaults = {param.name: param.default for param in program.elaborator.definitions[name].params}
    given = {param: render(syntax.parse_expression(Source("", text))) for param, text in params.items()}
    other = [
        f"{param} = {given[param]}"
        for param, default in defaults.items()
        if param in given and (default is None or render(default) != given[param])
    ]
    return f"{name}({', '.join(other)})" if other else name


def tables(inputs: dict[str, str]) -> dict[str, Any]:
    """The arrays in the files given as run-time tables."""
    import numpy as np

    found = {}
    for name, path in inputs.items():
        try:
            with open(path, "rb") as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
        except OSError as error:
            raise unreadable(path, error) from None
        except (ValueError, EOFError):
            raise fail(f"`{path}` is no .npy file", help="write it with numpy.save") from None
    return found


def read(file: str) -> str:
    """The text of a file, or of stdin for `-`."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise unreadable(file, error) from None
    except UnicodeDecodeError:
        raise fail(f"`{'<stdin>' if file == '-' else file}` is not UTF-8 text") from None


def unreadable(file: str, error: OSError) -> AttnError:
    return fail(f"cannot read `{file}`: {(error.strerror or str(error)).lower()}")


def write(file: str, text: str | bytes) -> None:
    try:
        Path(file).write_bytes(text if isinstance(text, bytes) else text.encode())
    except OSError as error:
        raise fail(f"cannot write `{file}`: {error.strerror}") from None


def apart(work: Callable[[Stage], T]) -> T:
    """What the work finds, found in a child process."""
    from attndsl.command import child

    return child.run(work)


def picture(attention: Attention, block_mask: BlockMask, heads: int) -> str:
    from attndsl.command import show

    return show.picture(block_mask, width(), first_query(attention, block_mask, heads))


def first_query(attention: Attention, block_mask: BlockMask, heads: int) -> int:
    """The position of query row 0."""
    from attndsl.tiles import lowering

    return lowering.sizes(attention, block_mask.n, block_mask.nq, heads).q.span(0)[0]


def width() -> int:
    return max(60, min(80, shutil.get_terminal_size().columns))


def echo_picture(text: str) -> None:
    from attndsl.command import show

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    click.echo(show.coloured(text) if colour else text)


def echo_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(data, indent=2))


@main.command()
@click.argument("files", nargs=-1, required=True)
@JSON
@LIMIT
def check(files: tuple[str, ...], as_json: bool, time_limit: float) -> None:
    """Parse, type-check and prove the assertions of FILES (`-`: stdin).

    Exit 1 on any error or refuted assertion.
    """
    reports = [check_file(file, time_limit, as_json) for file in files]
    if as_json:
        echo_json({"files": reports})
    else:
        click.echo("\n".join(line for report in reports for line in report_lines(report)))
    if not all(report["fine"] for report in reports):
        raise click.exceptions.Exit(1)


def report_lines(report: dict[str, Any]) -> list[str]:
    file = report["file"]
    if not report["assertions"]:
        return [f"{file}: {'fine' if report['fine'] else 'not checked further'}"]
    return [
        f"{found['file']}:{found['line']}: {found['status']}: {found['assertion']}{detail(found)}"
        for found in report["assertions"]
    ]


def check_file(file: str, time_limit: float, quiet: bool) -> dict[str, Any]:
    """What is wrong is also said on stderr, unless `quiet`."""
    from attndsl.command import facts

    shown = "<stdin>" if file == "-" else file

    errors: Sequence[Diagnostic] = ()
    warned: Sequence[Diagnostic] = ()
    verdicts: Sequence[Verdict] = ()
    try:
        program = program_of(file)
        warned, verdicts = judged(program, time_limit)
    except AttnError as error:
        errors = error.diagnostics
    if not quiet and (errors or warned):
        click.echo("\n\n".join(map(str, errors)) or "\n".join(map(str, warned)), err=True)
    assertions = [
        {
            "file": assertion.span.source.name,
            "line": assertion.span.source.position(assertion.span.start)[0],
            "assertion": assertion.text,
            **facts.of_verdict(verdict),
        }
        for assertion, verdict in zip(() if errors else program.assertions, verdicts, strict=True)
    ]
    return {
        "file": shown,
        "fine": not errors and all(found["status"] != "refuted" for found in assertions),
        "errors": [facts.of_diagnostic(found, shown) for found in errors],
        "warnings": [facts.of_diagnostic(found, shown) for found in warned],
        "assertions": assertions,
    }


def judged(program: Program, time_limit: float) -> tuple[list[Diagnostic], list[Verdict]]:
    """Warnings, and a verdict on each assertion: in one child, or one each where a stage takes too long."""
    from attndsl.command.child import TimeLimitError
    from attndsl.language.assertions import prove

    def warnings(stage: Stage) -> list[Diagnostic]:
        stage(f"looking for warnings in {program.name}", time_limit)
        return program.warnings

    def everything(stage: Stage) -> tuple[list[Diagnostic], list[Verdict]]:
        warned, verdicts = warnings(stage), []
        for assertion in program.assertions:
            stage(f"proving {assertion.text}", time_limit)
            verdicts.append(prove(assertion))
        return warned, verdicts

    try:
        return apart(everything)
    except TimeLimitError:
        return apart(warnings), [decided(assertion, time_limit) for assertion in program.assertions]


def decided(assertion: Assertion, time_limit: float) -> Verdict:
    """A proof that takes too long is undecided."""
    from attndsl.command.child import TimeLimitError
    from attndsl.language.assertions import prove
    from attndsl.relations.proofs import Verdict

    def work(stage: Stage) -> Verdict:
        stage(f"proving {assertion.text}", time_limit)
        return prove(assertion)

    try:
        return apart(work)
    except TimeLimitError as limit:
        return Verdict("undecided", reason=limit.diagnostics[0].message)


def detail(found: dict[str, Any]) -> str:
    """What there is to say about a verdict besides its status."""
    tables = {name: elided(entries) for name, entries in (found["tables"] or {}).items()}
    point = {**(found["counter_example"] or {}), **tables}
    parts = [found["at"], ", ".join(f"{name} = {value}" for name, value in point.items()), found["reason"]]
    said = "; ".join(part for part in parts if part)
    return f" ({said})" if said else ""


def elided(entries: Any) -> str:
    """A table on one line: of a long one the first and last entries."""
    import numpy as np

    text = np.array2string(
        np.asarray(entries), separator=", ", threshold=12, edgeitems=3, max_line_width=10**9
    )
    return " ".join(text.split())


@main.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--check", "only_check", is_flag=True, help="Change nothing; exit 1 if a file would change.")
def fmt(files: tuple[str, ...], only_check: bool) -> None:
    """Rewrite FILES in the one layout."""
    from attndsl import syntax
    from attndsl.errors import Source

    changed = False
    for file in files:
        text = read(file)
        formatted = syntax.format(Source(file, text))
        if formatted == text:
            continue
        changed = True
        if not only_check:
            write(file, formatted)
        click.echo(f"{'would change' if only_check else 'changed'} {file}")
    if changed and only_check:
        raise click.exceptions.Exit(1)


@main.command()
@JSON
def plugins(as_json: bool) -> None:
    """Everything registered, by whom, and what failed to load."""
    from attndsl.execution.registry import listing

    rows = listing()
    if as_json:
        echo_json({"plugins": [vars(row) for row in rows]})
        return
    for row in rows:
        state = f"  does not load: {row.error}" if row.error else ""
        click.echo(f"{row.group:10} {row.name:12} {row.owner:16} {row.target}{state}")


SUFFIXES: dict[str, Literal["term", "svg", "png"]] = {
    "": "term",
    ".txt": "term",
    ".svg": "svg",
    ".png": "png",
}
"""What a picture is, by the end of its file's name."""


@main.command()
@TARGET
@SIZES
@click.option("--head", type=Count(0, 0), help="Show this head alone.")
@click.option("--format", "form", type=click.Choice(["term", "svg", "png"]),
              help="The default is what the name of the output ends in, or else term.")  # fmt: skip
@click.option("-o", "--output", help="Write to a file instead.")
def show(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    head: int | None,
    form: Literal["term", "svg", "png"] | None,
    output: str | None,
    **sizes: Any,
) -> None:
    """The mask as a picture, in the terminal or in a file."""
    suffix = Path(output or "").suffix.lower()
    if form is None and suffix not in SUFFIXES:
        raise fail(f"no picture ends in {suffix}", help="give the output a name in .svg, .png or .txt")
    form = form or SUFFIXES[suffix]
    if form != "term" and output is None:
        raise fail(f"a picture in {form} does not go to the terminal", help=f"name a file: -o mask.{form}")
    found, shown = titled(file, name, params)
    attention, given = found.attention, tables(inputs)
    heads = sizes["heads"] = heads_of(attention, given, sizes["heads"])
    if head is not None and head >= heads:
        raise fail(f"no head {head:,} among {counted(heads, 'head')}", help="more with --heads")

    def work(stage: Stage) -> str | bytes:
        stage("tiling", time_limit)
        block_mask = tiled(attention, given, **sizes)
        if head is not None:
            block_mask = of_head(block_mask, head)
        title = shown + ("" if head is None else f", head {head:,}")
        if form == "term":
            return f"{heading(title, block_mask)}\n{picture(attention, block_mask, heads)}\n"
        stage("drawing", None)
        from attndsl import pictures

        first = first_query(attention, block_mask, heads)
        return pictures.render(pictures.mask(block_mask, title, first=first), form)

    drawn = apart(work)
    if output is not None:
        write(output, drawn)
    elif isinstance(drawn, str):
        echo_picture(drawn.removesuffix("\n"))


def heads_of(attention: Attention, given: dict[str, Any], heads: int | None) -> int:
    from attndsl.tiles import lowering

    return lowering.heads_of(attention, given) if heads is None else heads


def tiled(attention: Attention, given: dict[str, Any], **sizes: Any) -> BlockMask:
    """Tiles to draw or to count in, coarse where the mask is large."""
    from attndsl.tiles import lowering

    n, nq, heads = sizes["length"], sizes["q_length"], sizes["heads"]
    block_size = sizes["block_size"] or coarse(attention, min(n, nq or n))
    return lowering.tiles_of(attention, n, block_size, nq, heads=heads, inputs=given)


def coarse(attention: Attention, length: int) -> int:
    """About `TILES` tiles on a side, of a short sequence eight or more.

    Tables and `random` make many different ones, which cost their area.
    """
    from attndsl.expr import nodes

    if length < 8 * 128:
        return max(8, 1 << (length // 8).bit_length() >> 1)
    masks = [group.relation.mask for group in attention.groups]
    if any(mask.tables or any(node.op == "random" for node in nodes(mask)) for mask in masks):
        return 128
    return 1 << min(max(7, (length // TILES // 2).bit_length()), 12)


def of_head(block_mask: BlockMask, head: int) -> BlockMask:
    return replace(block_mask, index=block_mask.index[:, [head % block_mask.index.shape[1]]])


def counted(number: int, one: str, many: str = "") -> str:
    from attndsl.command import show

    return show.counted(number, one, many)


def heading(title: str, block_mask: BlockMask) -> str:
    size = f"n = {block_mask.n:,}" + (f", nq = {block_mask.nq:,}" if block_mask.nq != block_mask.n else "")
    return f"{title}  {size}  {100 * block_mask.density:.3g} % live"


@main.command()
@TARGET
@PROBLEM
@JSON
def compile(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    as_json: bool,
    **problem: Any,
) -> None:
    """The plan: the backend chosen and why, tiles, bytes, time."""
    attention = bound(file, name, params).attention
    given = tables(inputs)
    problem["heads"] = heads_of(attention, given, problem["heads"])

    def work(stage: Stage) -> tuple[dict[str, Any], str]:
        from attndsl.command import facts

        plan = planned(stage, time_limit, attention, given, **problem)
        return facts.of_plan(plan), plan_text(plan)

    found, text = apart(work)
    if as_json:
        echo_json(found)
    else:
        click.echo(text)


@main.command()
@TARGET
@PROBLEM
@click.option("--backward", is_flag=True, help="Time the backward pass as well.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Take q, k and v from the bytes of this file, not from random numbers.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@JSON
def run(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    backward: bool,
    text: Path | None,
    seed: int,
    as_json: bool,
    **problem: Any,
) -> None:
    """Run the plan, compare it with `reference`, time it beside dense attention."""
    attention = bound(file, name, params).attention
    given = tables(inputs)
    problem["heads"] = heads_of(attention, given, problem["heads"])

    def work(stage: Stage) -> tuple[dict[str, Any], str]:
        from attndsl.command import facts

        plan = planned(stage, time_limit, attention, given, training=backward, **problem)
        found = facts.of_run(stage, plan, given, backward, text, seed)
        seen = plan_text(plan)
        if plan.block_masks is not None:
            seen += f"\n\n{picture(attention, plan.block_masks, problem['heads'])}"
        return found, seen

    found, said = apart(work)
    if as_json:
        echo_json(found)
    else:
        echo_picture(f"{said}\n\n{result_text(found)}")


def planned(
    stage: Stage, time_limit: float, attention: Attention, given: dict[str, Any], **problem: Any
) -> Plan:
    """The plan, its tables bound if they were given."""
    stage("loading torch", None)
    import torch

    import attndsl

    try:
        torch.empty(0, device=problem["device"])
    except (RuntimeError, AssertionError):
        help = "cpu, or cuda where there is one"
        raise fail(f"no device `{problem['device']}`", help=help) from None
    stage("tiling", time_limit)
    plan = attndsl.compile(attention, **problem)
    return plan.bind(**given) if given else plan


def plan_text(plan: Plan) -> str:
    blocks = plan.block_masks
    held = ""
    if blocks is not None:
        held = f", {counted(blocks.entries, 'entry', 'entries')} in {counted(blocks.nbytes, 'byte')}"
    return f"{plan}\n  compiled  in {plan.compile_seconds:.3g} s{held}"


def result_text(found: dict[str, Any]) -> str:
    seconds, rows = found["seconds"], found["verified_rows"]
    forward = seconds["forward"]
    speed = f"  {found['gflops_live']:.3g} GFLOP/s on live pairs" if found["gflops_live"] else ""
    lines = [("forward", f"{forward:.4g} s{speed}")]
    if seconds["backward"] is not None:
        lines.append(("backward", f"{seconds['backward']:.4g} s"))
    for key, work in (("dense", "no mask"), ("dense_masked", found["dense_masked_work"])):
        taken = seconds[key]
        times = (
            "left out: too large" if taken is None else f"{taken:.4g} s; forward is {ratio(taken, forward)}"
        )
        lines.append((f"SDPA, {work}", times))
    which = "all" if rows == found["q_length"] else f"{rows:,} sampled"
    error = "not verified: the pattern depends on nq, and reference does not fit"
    if rows:
        error = f"{found['max_abs_error']:.3g} at most, against reference in float64 on {which} rows"
    lines.append(("error", error))
    return "\n".join(f"  {title:17} {said}" for title, said in lines)


def ratio(dense: float, ours: float) -> str:
    """Never below 1: the word says which of the two is faster."""
    return f"{dense / ours:.3g} x faster" if dense >= ours else f"{ours / dense:.3g} x slower"


class Only(click.Option):
    """Its help names what is registered when that is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from attndsl.execution.registry import names

        self.help = f"Some parts: {', '.join(sorted(names('analyses')))}."
        return super().get_help_record(ctx)


ANALYSIS = options(
    click.option("--q-length", type=Count(0, 65536), help="Number of queries, if not n."),
    HEADS,
    SHAPE,
    click.option("--batch", type=COUNT, default=1, show_default=True),
    click.option("--block-size", type=COUNT, default=128, show_default=True,
                 help="Tokens on the side of a tile."),
    click.option("--layers", type=COUNT, default=1, show_default=True, help="Layers that are stacked."),
    click.option("--ranks", type=COUNT, default=8, show_default=True,
                 help="Processes that the sequence is divided among."),
    LIMIT,
)  # fmt: skip


@main.command()
@TARGET
@click.option("--length", type=Count(0, 65536), required=True, help="Number of keys, n.")
@ANALYSIS
@click.option("--only", metavar="PART,...", cls=Only)
@click.option(
    "--in",
    "parameters",
    metavar="P",
    multiple=True,
    help="Leave a parameter open: the count as a polynomial in it.",
)
@JSON
def analyze(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    only: str | None,
    parameters: tuple[str, ...],
    as_json: bool,
    **sizes: Any,
) -> None:
    """What the attention costs and sees, exactly, and for every n where that can be had."""
    from attndsl.analysis.report import subject_of

    attention, shown = titled(file, name, params)
    subject = subject_of(attention, parameters=parameters, inputs=tables(inputs), **sizes)
    (report,) = analyzed([(subject, shown)], only.split(",") if only else None, time_limit)
    if as_json:
        echo_json(report.to_dict())
    else:
        click.echo(report)
    demand_known([report])


def demand_known(reports: Sequence[Report]) -> None:
    """Raises AttnError where no part of any report is known; what is printed before has all the reasons."""
    if any(report.known or not report.reasons for report in reports):
        return
    said = {report.name: next(iter(report.reasons.values())) for report in reports}
    raise AttnError(*(Diagnostic(f"nothing is known of `{name}`: {why}") for name, why in said.items()))


def analyzed(named: list[tuple[Subject, str]], parts: list[str] | None, time_limit: float) -> list[Report]:
    """The reports, with the names that they are to have.

    All in one child, unless a part of one takes too long: then each part in its own, and what takes too long
    is left out, with the reason.
    """
    from attndsl.analysis import report as analysis
    from attndsl.command.child import TimeLimitError

    left = analysis.chosen(parts)

    def work(stage: Stage) -> list[Report]:
        reports = []
        for subject, shown in named:
            report = replace(analysis.blank(subject), name=shown)
            for part in left:
                stage(f"analysing {part}", time_limit)
                report = analysis.extended(report, part, subject)
            reports.append(report)
        return reports

    try:
        return apart(work)
    except TimeLimitError:
        return [one_by_one(subject, shown, left, time_limit) for subject, shown in named]


def one_by_one(subject: Subject, shown: str, parts: list[str], time_limit: float) -> Report:
    from attndsl.analysis import report as analysis
    from attndsl.command.child import TimeLimitError

    report = replace(analysis.blank(subject), name=shown)
    for part in parts:

        def work(stage: Stage, report: Report = report, part: str = part) -> Report:
            stage(f"analysing {part}", time_limit)
            return analysis.extended(report, part, subject)

        try:
            report = apart(work)
        except TimeLimitError as limit:
            report = replace(report, reasons={**report.reasons, part: limit.diagnostics[0].message})
    return report


@main.command()
@click.argument("targets", metavar="FILE[:NAME]...", nargs=-1, required=True)
@click.option("--length", type=Count(0, 65536), help="Number of keys, n.")
@click.option(
    "--sweep",
    "sweeps",
    metavar="P=V,V,...",
    multiple=True,
    help="Values of a parameter, or of n: each is a column.",
)
@INPUTS
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "json"]),
    default="text",
    show_default=True,
)
@ANALYSIS
def compare(
    targets: tuple[str, ...],
    sweeps: tuple[str, ...],
    inputs: dict[str, str],
    form: str,
    time_limit: float,
    **sizes: Any,
) -> None:
    """Attentions side by side: density, FLOPs, reach, KV cache, predicted seconds."""
    from attndsl.analysis.report import subject_of
    from attndsl.command import comparison

    columns = list(comparison.cases(sweeps))
    if (sizes["length"] is None) != ("n" in columns[0]):
        raise click.UsageError("give one of --length N and --sweep n=N,N")
    given = tables(inputs)
    named, swept = [], []
    for target in targets:
        file, name = divided(target)
        for column in columns:
            attention = bound(file, name, {key: value for key, value in column.items() if key != "n"})
            own = {table.name: given[table.name] for table in attention.inputs if table.name in given}
            length = int(column["n"]) if "n" in column else sizes["length"]
            one = subject_of(attention, parameters=(), inputs=own, **{**sizes, "length": length})
            named.append((one, attention.name))
            swept.append(column)
    reports = analyzed(named, comparison.PARTS, time_limit)
    rows = [comparison.row(report, column) for report, column in zip(reports, swept, strict=True)]
    click.echo(comparison.FORMATS[form](rows))
    demand_known(reports)


@main.command()
@TARGET
@click.option("--length", type=LENGTH, default=4096, show_default=True, help="Number of keys, n.")
@ANALYSIS
@click.option("-o", "--output", required=True, help="The page to write.")
def report(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    output: str,
    **sizes: Any,
) -> None:
    """All of `analyze` and the pictures as one HTML page that stands alone."""
    from attndsl.analysis.report import subject_of
    from attndsl.html.page import render

    attention, shown = titled(file, name, params)
    subject = subject_of(attention, parameters=(), inputs=tables(inputs), **sizes)
    (found,) = analyzed([(subject, shown)], None, time_limit)
    masks, drawings, undrawn = illustrated(subject, found, time_limit)
    found = replace(found, reasons={**found.reasons, **undrawn})
    source = None if file == "-" else read(file)
    write(output, render(found.to_dict(), masks=masks, figures=drawings, source=source))
    if not (masks or drawings):
        demand_known([found])


def illustrated(
    subject: Subject, report: Report, time_limit: float
) -> tuple[list[Mask], dict[str, Drawing], dict[str, str]]:
    """Masks, and drawings by part, each made in a child of its own, and why others are missing."""
    from attndsl.analysis.report import usable
    from attndsl.html.masks import masks

    made: dict[str, Any] = {}
    undrawn = {}
    draws: dict[str, Callable[[], Any]] = {
        "masks": lambda: masks(subject.block_mask, subject.sizes.q.span(0)[0])
    }
    for name, part in usable().items():
        if part.draw and name in report.findings:
            draws[name] = partial(part.draw, subject, report.findings[name])
    for what, make in draws.items():

        def work(stage: Stage, what: str = what, make: Callable[[], Any] = make) -> Any:
            stage(f"drawing {what}", time_limit)
            return make()

        try:
            made[what] = apart(work)
        except AttnError as error:
            undrawn[f"picture of {what}"] = error.diagnostics[0].message
    return made.pop("masks", []), made, undrawn


@main.command()
@click.argument("left", metavar="FILE:NAME")
@click.argument("right", metavar="FILE:NAME")
@JSON
@LIMIT
def diff(left: str, right: str, as_json: bool, time_limit: float) -> None:
    """Whether two patterns are equal, one a subset of the other, or a pair that differs."""
    mine, other = each_head(left), each_head(right)

    def work(stage: Stage) -> list[Verdict]:
        from attndsl.relations import proofs

        stage("comparing", time_limit)
        return [proofs.subset(mine, other), proofs.subset(other, mine)]

    inside, outside = apart(work)
    refuted = [found for found in (inside, outside) if found.status == "refuted"]
    if len(refuted) == 2:
        status, said = "different", f"{left} and {right} differ"
    elif "undecided" in (inside.status, outside.status):
        status, said = "undecided", "undecided"
    elif inside.status == outside.status:
        status, said = "equal", f"{left} and {right} are equal"
    elif inside.status == "proved":
        status, said = "subset", f"{left} is a subset of {right}"
    else:
        status, said = "superset", f"{right} is a subset of {left}"
    pairs = [
        {"only_in": side, **(found.counter_example or {})}
        for side, found in ((left, inside), (right, outside))
        if found.status == "refuted"
    ]
    reason = next((found.reason for found in (inside, outside) if found.reason), "")
    if as_json:
        echo_json({"left": left, "right": right, "status": status, "pairs": pairs, "reason": reason})
        return
    click.echo(said + (f": {reason}" if status == "undecided" else ""))
    for pair in pairs:
        where = ", ".join(f"{name} = {value}" for name, value in pair.items() if name != "only_in")
        click.echo(f"  only in {pair['only_in']}: {where}")


def divided(target: str) -> tuple[str, str | None]:
    """FILE:NAME or FILE."""
    file, _, name = target.rpartition(":") if ":" in target else (target, "", "")
    return file, name or None


def each_head(target: str) -> Expr:
    """The mask of FILE:NAME at head `h`."""
    from attndsl.expr import all_of, any_of

    attention = bound(*divided(target), {}).attention
    return any_of(*(all_of(group.heads, group.relation.mask) for group in attention.groups))
