"""The commands that make reports: analyze, compare, report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial, reduce
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import click

from attndsl import pictures
from attndsl.analysis.part import Subject
from attndsl.analysis.report import Report, blank, chosen, extended, subject_of, usable
from attndsl.command import child, comparison
from attndsl.command.given import (
    bare_names,
    bound,
    defined,
    echo_json,
    file_and_name,
    is_file,
    names_stack,
    read,
    tables,
    tell_heads,
    write,
)
from attndsl.command.options import (
    ANALYSIS,
    FILE,
    INPUTS,
    JSON,
    LENGTH,
    SET,
    TARGET,
    Command,
    Whole,
    argument,
)
from attndsl.command.show import first_masks, layers_of
from attndsl.errors import AttnError, Diagnostic, fail, suggest
from attndsl.execution.registry import names
from attndsl.html.masks import Mask, masks
from attndsl.html.page import render
from attndsl.html.stack import of_stack
from attndsl.pictures import Drawing
from attndsl.stacks.depth import Depth, depth
from attndsl.stacks.tree import Stack

T = TypeVar("T")


class Only(click.Option):
    """Its help names what is registered when that is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = f"Some parts: {', '.join(sorted(names('analyses')))}."
        return super().get_help_record(ctx)


@click.command(cls=Command)
@TARGET
@click.option("--length", type=Whole(0, 65536), required=True, help="Number of keys, n.")
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
    """What the attention costs and sees, exactly, and for every n where that can be had; of a stack layer by
    layer, as wide as its heads together."""
    parts = [part.strip() for part in only.split(",") if part.strip()] if only else None
    with joining(parts, name):
        attention, shown = defined(file, name, params)
    given = tables(inputs)
    if isinstance(attention, Stack):
        told = replace(stacked(attention, sizes, given), name=shown)
        if as_json:
            echo_json(asdict(told))
        else:
            click.echo(told)
        return
    tell_heads(attention.attention, given, sizes["heads"])
    subject = subject_of(attention, parameters=parameters, inputs=given, **sizes)
    (report,) = analyzed([(subject, shown)], parts, time_limit)
    if as_json:
        echo_json(report.to_dict())
    elif report.known or len(report.reasons) != 1:  # the only reason is the error's
        click.echo(report)
    demand_known([report])


def stacked(stack: Stack, sizes: dict[str, Any], given: dict[str, Any]) -> Depth:
    """Of these sizes of attentions."""
    heads = sizes["heads"] or 1
    of = {name: sizes[name] for name in ("length", "kv_heads", "head_dim", "dtype")}
    return depth(stack, width=heads * sizes["head_dim"], heads=heads, **of, **given)


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
    left = chosen(parts)
    begun = [(subject, replace(blank(subject), name=shown)) for subject, shown in named]

    def more(stage: child.Stage, subject: Subject, report: Report, part: str) -> Report:
        stage(f"analysing {part}", time_limit)
        return extended(report, part, subject)

    def apart(subject: Subject, report: Report, part: str) -> Report:
        try:
            return child.run(partial(more, subject=subject, report=report, part=part))
        except child.TimeLimitError as limit:
            return replace(report, reasons={**report.reasons, part: limit.diagnostics[0].message})

    try:
        return child.run(
            lambda stage: [reduce(partial(more, stage, subject), left, report) for subject, report in begun]
        )
    except child.TimeLimitError:
        return [reduce(partial(apart, subject), left, report) for subject, report in begun]


def each(ctx: click.Context, param: click.Parameter, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Attentions, each FILE:NAME."""
    for target in targets:
        if re.fullmatch(r"\d[\d,]*", target) and not is_file(target):
            ctx.fail(f"`{target}` is no file: values are joined by commas, as in `--sweep n=1024,4096`")
        if re.fullmatch(r"\w+=[^=]+", target) and not is_file(target):
            ctx.fail(f"`{target}` is no file: several values are joined, as in `--sweep {target},...`")
    if bare := bare_names(targets):
        file, name = file_and_name(targets[0])
        written = " ".join(f"{file}:{other}" for other in [*filter(None, [name]), *bare])
        help = f", or `diff {written}` for the masks alone" if len(written.split()) == 2 else ""
        ctx.fail(f"each is named with its file: write `compare {written}`{help}")
    return targets


@click.command(cls=Command)
@argument(
    "targets",
    f"{FILE}, and NAME an attention or pattern in it.",
    metavar="FILE[:NAME]...",
    nargs=-1,
    required=True,
    callback=each,
)
@click.option("--length", type=Whole(0, 65536), help="Number of keys, n.")
@click.option(
    "--sweep",
    "sweeps",
    metavar="P=V,V,...",
    multiple=True,
    help="Values of a parameter, or of n: each is a column.",
)
@SET
@INPUTS
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "markdown", "csv", "json"]),
    default="text",
    show_default=True,
    help="How the table is written.",
)
@ANALYSIS
def compare(
    targets: tuple[str, ...],
    sweeps: tuple[str, ...],
    params: dict[str, str],
    inputs: dict[str, str],
    form: str,
    time_limit: float,
    **sizes: Any,
) -> None:
    """Attentions side by side: density, FLOPs, reach, KV cache, predicted seconds."""
    columns = list(comparison.columns(sweeps))
    if (sizes["length"] is None) != ("n" in columns[0]):
        raise click.UsageError("give one of --length N and --sweep n=N,N")
    if both := sorted(params.keys() & columns[0].keys()):
        raise click.UsageError(f"`{both[0]}` is given by --set and by --sweep")
    given = tables(inputs)
    stacks = [target for target in targets if names_stack(*file_and_name(target))]
    if stacks and len(stacks) < len(targets):
        other = next(target for target in targets if target not in stacks)
        raise fail(f"`{stacks[0]}` is a stack, and `{other}` an attention", help="compare two of a kind")
    if stacks:
        rows = []
        for target, column in product(targets, columns):
            with sweeping(sizes):
                stack, shown = defined(*file_and_name(target), params | own_of(column))
            length = int(column["n"]) if "n" in column else sizes["length"]
            assert isinstance(stack, Stack)
            told = stacked(stack, {**sizes, "length": length}, given)
            rows.append(comparison.row_of_stack(told, shown, sizes["heads"] or 1, column))
        click.echo(comparison.FORMATS[form](rows))
        return
    named, swept = [], []
    for target in targets:
        file, name = file_and_name(target)
        for column in columns:
            with sweeping(sizes):
                attention = bound(file, name, params | own_of(column))
            own = {table.name: given[table.name] for table in attention.inputs if table.name in given}
            length = int(column["n"]) if "n" in column else sizes["length"]
            if column is columns[0]:
                tell_heads(attention.attention, own, sizes["heads"])
            one = subject_of(attention, parameters=(), inputs=own, **{**sizes, "length": length})
            named.append((one, attention.name))
            swept.append(column)
    held = {table.name for subject, _ in named for table in subject.attention.inputs}
    for name in given:
        if name not in held:
            help = suggest(name, held) or f"their inputs: {', '.join(sorted(held)) or 'none'}"
            raise fail(f"no attention here has an input `{name}`", help=help)
    reports = analyzed(named, comparison.PARTS, time_limit)
    rows = [comparison.row(report, column) for report, column in zip(reports, swept, strict=True)]
    click.echo(comparison.FORMATS[form](rows))
    demand_known(reports)


def own_of(column: dict[str, str]) -> dict[str, str]:
    """The parameters of a column."""
    return {key: value for key, value in column.items() if key != "n"}


@contextmanager
def joining(parts: list[str] | None, name: str | None) -> Iterator[None]:
    """A part that stands behind `--only` with a blank is read as the name of an attention."""
    try:
        yield
    except AttnError as error:
        if not parts or name not in names("analyses"):
            raise
        help = f"parts are joined by commas: `--only {','.join([*parts, name])}`"
        raise AttnError(*(replace(told, help=help) for told in error.diagnostics)) from None


@contextmanager
def sweeping(sizes: Iterable[str]) -> Iterator[None]:
    """A size that is swept, and is no parameter, is told with its option."""
    try:
        yield
    except AttnError as error:
        (told, *_) = error.diagnostics
        for name in sizes:
            if told.message.endswith(f"has no parameter `{name}`"):
                help = f"it is a size, and one for all: `--{name.replace('_', '-')} ...`"
                if name == "length":
                    help = "lengths are swept by `--sweep n=1024,4096`"
                raise AttnError(replace(told, help=help)) from None
        raise


@click.command(cls=Command)
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
    suffix = Path(output).suffix.lower()
    if suffix not in ("", ".html", ".htm"):
        raise fail(f"no page ends in {suffix}", help="give the output a name in .html")
    attention, shown = defined(file, name, params)
    given = tables(inputs)
    if isinstance(attention, Stack):
        told = stacked(attention, sizes, given)
        of = {key: sizes[key] for key in ("length", "heads", "block_size")} | {"q_length": None}
        found_layers = first_masks(child.run(lambda stage: layers_of(stage, attention, given, of)))
        drawing = pictures.drawn(
            lambda dark: pictures.layers(found_layers, shown, dark=dark), "masks of the layers"
        )
        path = file if name else file_and_name(file)[0]
        write(output, of_stack(replace(told, name=shown), drawing, None if path == "-" else read(path)))
        return
    tell_heads(attention.attention, given, sizes["heads"])
    subject = subject_of(attention, parameters=(), inputs=given, **sizes)
    (found,) = analyzed([(subject, shown)], None, time_limit)
    shown_masks, drawings, undrawn = illustrated(subject, found, time_limit)
    found = replace(found, reasons={**found.reasons, **undrawn})
    path = file if name else file_and_name(file)[0]
    source = None if path == "-" else read(path)
    write(output, render(found.to_dict(), masks=shown_masks, figures=drawings, source=source))
    for why in dict.fromkeys(undrawn.values()):
        click.echo(f"note: not all is drawn: {why}", err=True)
    if not (shown_masks or drawings):
        demand_known([found])


def illustrated(
    subject: Subject, report: Report, time_limit: float
) -> tuple[list[Mask], dict[str, Drawing], dict[str, str]]:
    """Masks, and drawings by part, each made in a child of its own, and why others are missing."""
    undrawn: dict[str, str] = {}

    def made(what: str, make: Callable[[], T]) -> T | None:
        def work(stage: child.Stage) -> T:
            stage(f"drawing {what}", time_limit)
            return make()

        try:
            return child.run(work)
        except AttnError as error:
            undrawn[f"picture of {what}"] = error.diagnostics[0].message
            return None

    shown = made("masks", lambda: masks(subject.block_mask, subject.sizes.q.span(0)[0])) or []
    drawings = {
        name: made(name, partial(part.draw, subject, report.findings[name]))
        for name, part in usable().items()
        if part.draw and name in report.findings
    }
    return shown, {name: drawing for name, drawing in drawings.items() if drawing}, undrawn
