"""The command line. Each command gathers plain data, then prints it as text or as one JSON object."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from attndsl.errors import AttnError, fail

if TYPE_CHECKING:
    from attndsl.attention import Attention
    from attndsl.blockmask import BlockMask
    from attndsl.child import Stage
    from attndsl.expr import Expr
    from attndsl.plan import Plan
    from attndsl.program import Program
    from attndsl.prove import Verdict
    from attndsl.syntax.nodes import Assert

Command = Callable[..., Any]
T = TypeVar("T")


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


FILE = click.Path(exists=True, dir_okay=False)
POSITIVE = click.IntRange(min=1)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
LIMIT = click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True,
    help="Seconds for symbolic work: proofs and tiling.",
)  # fmt: skip
TARGET = options(
    click.argument("file", type=FILE),
    click.argument("name", required=False),
    click.option("--set", "params", metavar="P=V", multiple=True, callback=pair,
                 help="A parameter, as the language writes it: 4, [0, 8], 0..3."),
    click.option("--input", "inputs", metavar="T=FILE.npy", multiple=True, callback=pair,
                 help="A run-time table."),
)  # fmt: skip
SIZES = options(
    click.option("--length", type=POSITIVE, required=True, help="Number of keys, n."),
    click.option("--q-length", type=POSITIVE, help="Number of queries, if not n."),
    click.option("--heads", type=POSITIVE, default=1, show_default=True),
    click.option("--batch", type=POSITIVE, default=1, show_default=True),
    click.option("--block-size", type=POSITIVE, help="Tokens on the side of a tile."),
    LIMIT,
)  # fmt: skip
PROBLEM = options(
    SIZES,
    click.option("--kv-heads", type=POSITIVE, help="Number of key heads, if not that of query heads."),
    click.option("--head-dim", type=POSITIVE, default=64, show_default=True),
    click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
                 default="float32", show_default=True),
    click.option("--device", default="cpu", show_default=True),
    click.option("--backend", help="Take this one or fail; the default is the cheapest that can."),
)  # fmt: skip


def bound(file: str, name: str | None, params: dict[str, str]) -> Attention:
    """The attention that a command is about; warnings go to stderr."""
    import attndsl
    from attndsl.attention import Attention

    program = attndsl.load(file)
    warn(program)
    definition = program[name or program.default()]
    attention = definition(**params) if params else definition
    if not isinstance(attention, Attention):
        raise fail(str(attention).strip("<>"), help="give them with --set name=value")
    return attention


def warn(program: Program) -> None:
    for diagnostic in program.diagnostics:
        click.echo(str(diagnostic), err=True)


def tables(inputs: dict[str, str]) -> dict[str, Any]:
    """The arrays in the files given as run-time tables."""
    import numpy as np

    found = {}
    for name, path in inputs.items():
        try:
            found[name] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise fail(f"cannot read `{path}` as a .npy file: {error}") from None
    return found


def apart(work: Callable[[Stage], T]) -> T:
    """What the work finds, found in a child process."""
    from attndsl import child

    return child.run(work)


def picture(block_mask: BlockMask) -> str:
    from attndsl import show

    return show.picture(block_mask, width())


def width() -> int:
    return max(60, min(80, shutil.get_terminal_size().columns))


def echo_picture(text: str) -> None:
    from attndsl import show

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    click.echo(show.coloured(text) if colour else text)


def echo_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps(data, indent=2))


@main.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@JSON
@LIMIT
def check(files: tuple[str, ...], as_json: bool, time_limit: float) -> None:
    """Parse, type-check and prove the assertions of FILES; exit 1 on any error or refuted assertion."""
    reports = [check_file(file, time_limit) for file in files]
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
        f"{file}:{found['line']}: {found['status']}: {found['assertion']}{detail(found)}"
        for found in report["assertions"]
    ]


def check_file(file: str, time_limit: float) -> dict[str, Any]:
    import attndsl

    try:
        program = attndsl.load(file)
    except AttnError as error:
        click.echo(str(error), err=True)
        return {"file": file, "fine": False, "error": str(error), "assertions": []}
    warn(program)

    def work(stage: Stage) -> dict[str, Any]:
        stage(f"proving the assertions of {file}", time_limit)
        return {"verdicts": [verdict(item, found) for item, found in program.check()]}

    assertions = apart(work)["verdicts"] if program.assertions else []
    fine = all(found["status"] != "refuted" for found in assertions)
    return {"file": file, "fine": fine, "error": None, "assertions": assertions}


def verdict(item: Assert, found: Verdict) -> dict[str, Any]:
    tables = {name: array.tolist() for name, array in (found.tables or {}).items()}
    return {
        "line": item.span.source.position(item.span.start)[0],
        "assertion": item.span.text,
        "status": found.status,
        "at": found.at,
        "counter_example": found.counter_example,
        "tables": tables or None,
        "reason": found.reason,
    }


def detail(found: dict[str, Any]) -> str:
    """What there is to say about a verdict besides its status."""
    point = {**(found["counter_example"] or {}), **(found["tables"] or {})}
    parts = [found["at"], ", ".join(f"{name} = {value}" for name, value in point.items()), found["reason"]]
    said = "; ".join(part for part in parts if part)
    return f" ({said})" if said else ""


@main.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("--check", "only_check", is_flag=True, help="Change nothing; exit 1 if a file would change.")
def fmt(files: tuple[str, ...], only_check: bool) -> None:
    """Rewrite FILES in the one layout."""
    from attndsl import syntax
    from attndsl.errors import Source

    changed = False
    for file in files:
        text = Path(file).read_text(encoding="utf-8")
        formatted = syntax.render(syntax.parse(Source(file, text)))
        if formatted == text:
            continue
        changed = True
        click.echo(f"{'would change' if only_check else 'changed'} {file}")
        if not only_check:
            Path(file).write_text(formatted, encoding="utf-8")
    if changed and only_check:
        raise click.exceptions.Exit(1)


@main.command()
@JSON
def plugins(as_json: bool) -> None:
    """Everything registered, by whom, and what failed to load."""
    from attndsl.registry import listing

    rows = listing()
    if as_json:
        echo_json({"plugins": [vars(row) for row in rows]})
        return
    for row in rows:
        state = f"  does not load: {row.error}" if row.error else ""
        click.echo(f"{row.group:10} {row.name:12} {row.owner:16} {row.target}{state}")


@main.command()
@TARGET
@SIZES
@click.option("--format", "form", type=click.Choice(["term"]), default="term", show_default=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write to a file instead.")
def show(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    form: str,
    output: str | None,
    **sizes: Any,
) -> None:
    """The mask as a picture in the terminal."""
    attention = bound(file, name, params)
    given = tables(inputs)

    def work(stage: Stage) -> str:
        stage("tiling", time_limit)
        block_mask = tiled(attention, given, **sizes)
        return f"{heading(attention, block_mask)}\n{picture(block_mask)}"

    text = apart(work)
    if output is None:
        echo_picture(text)
    else:
        Path(output).write_text(text + "\n", encoding="utf-8")


def tiled(attention: Attention, given: dict[str, Any], **sizes: Any) -> BlockMask:
    return attention.block_mask(
        sizes["length"], sizes["block_size"] or 128, sizes["q_length"], heads=sizes["heads"], **given
    )


def heading(attention: Attention, block_mask: BlockMask) -> str:
    size = f"n = {block_mask.n:,}" + (f", nq = {block_mask.nq:,}" if block_mask.nq != block_mask.n else "")
    return f"{attention.name}  {size}  {100 * block_mask.density:.3g} % live"


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
    attention = bound(file, name, params)
    given = tables(inputs)

    def work(stage: Stage) -> tuple[dict[str, Any], str]:
        plan = planned(stage, time_limit, attention, given, **problem)
        return plan_facts(plan), plan_text(plan)

    facts, text = apart(work)
    if as_json:
        echo_json(facts)
    else:
        click.echo(text)


@main.command()
@TARGET
@PROBLEM
@click.option("--backward", is_flag=True, help="Time the backward pass as well.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
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
    attention = bound(file, name, params)
    given = tables(inputs)

    def work(stage: Stage) -> tuple[dict[str, Any], str]:
        plan = planned(stage, time_limit, attention, given, training=backward, **problem)
        facts = plan_facts(plan) | tried(stage, plan, given, backward, text, seed)
        seen = "" if plan.block_masks is None else f"\n\n{picture(plan.block_masks)}"
        return facts, plan_text(plan) + seen

    facts, said = apart(work)
    if as_json:
        echo_json(facts)
    else:
        echo_picture(f"{said}\n\n{result_text(facts)}")


def planned(
    stage: Stage, time_limit: float, attention: Attention, given: dict[str, Any], **problem: Any
) -> Plan:
    """The plan, its tables bound if they were given."""
    stage("loading torch", None)
    import torch  # noqa: F401

    import attndsl

    stage("tiling", time_limit)
    plan = attndsl.compile(attention, **problem)
    return plan.bind(**given) if given else plan


def plan_facts(plan: Plan) -> dict[str, Any]:
    """What `compile --json` prints. Tiles and nnz are over all batch rows and heads."""
    p, blocks = plan.problem, plan.block_masks
    facts: dict[str, Any] = {
        "name": plan.attention.name,
        "length": p.length,
        "q_length": p.q_length,
        "block_size": p.block_size,
        "backend": plan.backend,
        "rejected": {name: why for name, why in plan.considered.items() if name != plan.backend},
    }
    if blocks is None:
        unknown = ("tiles", "entries", "nnz", "density", "plan_bytes")
        return facts | dict.fromkeys(unknown) | {"compile_seconds": plan.compile_seconds}
    times = p.batch * p.heads // blocks.index.size
    full, partial, empty, unique = blocks.tiles
    return facts | {
        "tiles": {
            "full": full * times,
            "partial": partial * times,
            "empty": empty * times,
            "unique_partial": unique,
        },
        "entries": blocks.entries,
        "nnz": blocks.nnz * times,
        "density": blocks.density,
        "plan_bytes": blocks.nbytes,
        "compile_seconds": plan.compile_seconds,
    }


def plan_text(plan: Plan) -> str:
    blocks = plan.block_masks
    held = f", {blocks.entries:,} entries in {blocks.nbytes:,} bytes" if blocks is not None else ""
    return f"{plan}\n  compiled  in {plan.compile_seconds:.3g} s{held}"


def tried(
    stage: Stage, plan: Plan, given: dict[str, Any], backward: bool, text: Path | None, seed: int
) -> dict[str, Any]:
    """What `run --json` prints beyond the plan. Raises AttnError where `reference` disagrees."""
    from attndsl import trial

    stage("making q, k and v", None)
    problem = plan.problem
    q, k, v = trial.qkv(problem, text, seed)
    stage(f"running {plan.backend}", None)
    out = plan(q, k, v, **given)
    stage("running reference", None)
    verified = trial.verify(plan, out, q, k, v, given)
    if verified is not None and not verified.error <= verified.tolerance:
        error, most = verified.error, verified.tolerance
        raise fail(
            f"`{plan.backend}` differs from `reference` by {error:.3g}, more than {most:.3g}",
            help="this is a bug in that backend; another one may be right: --backend",
        )
    stage("timing the forward pass", None)
    forward = trial.seconds(lambda: plan(q, k, v, **given), problem.device)
    if backward:
        stage("timing the backward pass", None)
    backwards = trial.backward_seconds(plan, (q, k, v), given) if backward else None
    stage("timing dense attention", None)
    facts = plan_facts(plan)
    flops = None if facts["nnz"] is None else 4 * facts["nnz"] * problem.head_dim
    return {
        "seconds": {
            "forward": forward,
            "backward": backwards,
            "dense": trial.dense_seconds(plan, q, k, v, masked=False),
            "dense_masked": trial.dense_seconds(plan, q, k, v, masked=True),
        },
        "gflops_live": None if flops is None else flops / forward / 1e9,
        "max_abs_error": None if verified is None else verified.error,
        "verified_rows": 0 if verified is None else verified.rows,
    }


def result_text(facts: dict[str, Any]) -> str:
    seconds, rows = facts["seconds"], facts["verified_rows"]
    speed = f"  {facts['gflops_live']:.3g} GFLOP/s on live pairs" if facts["gflops_live"] else ""
    lines = [("forward", f"{seconds['forward']:.4g} s{speed}")]
    if seconds["backward"] is not None:
        lines.append(("backward", f"{seconds['backward']:.4g} s"))
    for key, title in (("dense", "SDPA, no mask"), ("dense_masked", "SDPA, this mask")):
        taken = seconds[key]
        ratio = (
            "would not fit, left out"
            if taken is None
            else f"{taken:.4g} s  {taken / seconds['forward']:.3g} x"
        )
        lines.append((title, ratio))
    which = "all" if rows == facts["q_length"] else f"{rows:,} sampled"
    error = f"{facts['max_abs_error']:.3g} at most, against reference in float64 on {which} rows"
    lines.append(("error", error if rows else "not verified: the pattern depends on nq and is too large"))
    return "\n".join(f"  {title:16} {said}" for title, said in lines)


@main.command()
@TARGET
@SIZES
@JSON
def analyze(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Facts about the mask: live pairs, empty rows, causality."""
    attention = bound(file, name, params)
    given = tables(inputs)

    def work(stage: Stage) -> dict[str, Any]:
        stage("tiling", time_limit)
        block_mask = tiled(attention, given, **sizes)
        stage("proving causality", time_limit)
        return mask_facts(attention, block_mask)

    facts = apart(work)
    if as_json:
        echo_json(facts)
        return
    for key, value in facts.items():
        click.echo(f"  {key:12} {value}")


@main.command()
@click.argument("left", metavar="FILE:NAME")
@click.argument("right", metavar="FILE:NAME")
@JSON
@LIMIT
def diff(left: str, right: str, as_json: bool, time_limit: float) -> None:
    """Whether two patterns are equal, one a subset of the other, or a pair that differs."""
    mine, other = whole_mask(left), whole_mask(right)

    def work(stage: Stage) -> list[Verdict]:
        from attndsl import prove

        stage("comparing", time_limit)
        return [prove.subset(mine, other), prove.subset(other, mine)]

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


def whole_mask(target: str) -> Expr:
    """The mask of FILE:NAME over all its head groups."""
    file, _, name = target.rpartition(":") if ":" in target else (target, "", "")
    return joined(bound(file, name or None, {}))


def joined(attention: Attention) -> Expr:
    from attndsl.expr import all_of, any_of

    return any_of(*(all_of(group.heads, group.relation.mask) for group in attention.groups))


def mask_facts(attention: Attention, block_mask: BlockMask) -> dict[str, Any]:
    from attndsl import prove
    from attndsl.expr import le, var

    causal = prove.subset(joined(attention), le(var("k"), var("q")))
    nnz = {"value": block_mask.nnz, "formula": None, "valid_for": f"n = {block_mask.n}"}
    return {
        "name": attention.name,
        "length": block_mask.n,
        "q_length": block_mask.nq,
        "nnz": nnz,
        "density": block_mask.density,
        "empty_rows": int(block_mask.empty_rows().sum()),
        "causal": {"proved": True, "refuted": False, "undecided": None}[causal.status],
        "not_causal_at": causal.counter_example,
    }
