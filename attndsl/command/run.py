"""Commands that make a plan: compile, run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attndsl.attention import Attention
from attndsl.command import child, terminal
from attndsl.command.given import bound, echo_json, first_query, heads_of, tables, telling
from attndsl.command.options import JSON, PROBLEM, TARGET, Command
from attndsl.errors import fail
from attndsl.execution.choice import UNKNOWN
from attndsl.scores import never_negative
from attndsl.streams import described, listed

if TYPE_CHECKING:
    from attndsl.execution.plan import AnyPlan


@click.command(cls=Command)
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

    def work(stage: child.Stage) -> tuple[dict[str, Any], str]:
        plan = planned(stage, time_limit, attention, given, **problem)
        return of_plan(plan), plan_text(plan)

    found, text = child.run(work)
    if as_json:
        echo_json(found)
    else:
        click.echo(text)


@click.command(cls=Command)
@TARGET
@PROBLEM
@click.option("--backward", is_flag=True, help="Time the backward pass as well.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Take q, k and v from the bytes of this file, not from random numbers.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers.")
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

    def work(stage: child.Stage) -> tuple[dict[str, Any], str]:
        plan = planned(stage, time_limit, attention, given, training=backward, **problem)
        found = of_run(stage, plan, given, backward, text, seed)
        seen = plan_text(plan)
        if plan.block_masks is not None:
            first = first_query(attention, problem["length"], plan.block_masks.nq, problem["heads"])
            seen += f"\n\n{terminal.picture(plan.block_masks, terminal.width(), first)}"
            seen += f"\n{listed(attention.streams, problem['length'])}".rstrip("\n")
        return found, seen

    found, said = child.run(work)
    if as_json:
        echo_json(found)
    else:
        terminal.echo(f"{said}\n\n{result_text(found)}")


def of_plan(plan: AnyPlan) -> dict[str, Any]:
    """Tiles and nnz are over all batch rows and heads; None where they wait for tables or choices, and where
    `approx` stands in their place."""
    p, blocks = plan.problem, plan.block_masks
    found: dict[str, Any] = {
        "name": plan.attention.name,
        "length": p.length,
        "q_length": p.q_length,
        "block_size": p.block_size,
        "backend": plan.backend,
        "approx": None if plan.attention.approx is None else plan.attention.approx.kind,
        "rejected": {name: UNKNOWN if said is None else said for name, said in plan.rejected.items()},
        **dict.fromkeys(("tiles", "entries", "nnz", "density", "plan_bytes")),
        "compile_seconds": plan.compile_seconds,
    }
    if plan.attention.streams:
        found["keys"] = described(plan.attention.streams)
    if blocks is None:
        return found
    times = p.batch * p.heads // blocks.index.size
    full, partial, empty, unique = blocks.tiles
    counts = {"full": full * times, "partial": partial * times, "empty": empty * times}
    return found | {
        "tiles": {**counts, "unique_partial": unique},
        "entries": blocks.entries,
        "nnz": blocks.nnz * times,
        "density": blocks.density,
        "plan_bytes": blocks.nbytes,
    }


def _why(attention: Attention) -> str:
    if any(group.norm.kind == "linear" and not never_negative(group.score) for group in attention.groups):
        return "weights of both signs may add up to about 0, and what is divided by that is noise"
    return "this is a bug in that backend; another one may be right: --backend"


def of_run(
    stage: child.Stage,
    plan: AnyPlan,
    given: dict[str, Any],
    backward: bool,
    text: Path | None,
    seed: int,
) -> dict[str, Any]:
    """The plan's facts and what running it shows. Raises AttnError where `reference` disagrees."""
    from attndsl.command import trial

    stage("making q, k and v", None)
    problem = plan.problem
    q, k, v = trial.qkv(problem, text, seed)
    given = given | trial.memory(plan, seed)
    stage(f"running {plan.backend}", None)
    call = plan.module().requires_grad_(False)
    out = call(q, k, v, **given)
    stage("running reference", None)
    verified = trial.verify(plan, out, q, k, v, given)
    if verified is not None and not verified.error <= verified.tolerance:
        raise fail(
            f"`{plan.backend}` differs from `reference` by {verified.error:.3g}, "
            f"more than {verified.tolerance:.3g}, where outputs reach {verified.largest:.3g}",
            help=_why(plan.attention),
        )
    stage(f"timing {plan.backend} and dense attention", None)
    works = {
        "forward": lambda: call(q, k, v, **given),
        "backward": trial.backward(plan, (q, k, v), given) if backward else None,
        "dense": trial.dense(plan, q, k, v),
        "dense_masked": trial.dense_masked(plan, q, k, v, given),
    }
    seconds = trial.medians({name: work for name, work in works.items() if work}, problem.device)
    found = of_plan(plan)
    nnz = found["nnz"]
    return found | {
        "seconds": {name: seconds.get(name) for name in works},
        "dense_masked_work": trial.masked_work(plan),
        "gflops_live": None if nnz is None else 4 * nnz * problem.head_dim / seconds["forward"] / 1e9,
        "max_abs_error": None if verified is None else verified.error,
        "max_abs_output": None if verified is None else verified.largest,
        "verified_rows": 0 if verified is None else verified.rows,
    }


def planned(
    stage: child.Stage, time_limit: float, attention: Attention, given: dict[str, Any], **problem: Any
) -> AnyPlan:
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
    with telling():
        plan = attndsl.compile(attention, **problem)
    return plan.bind(**given) if given else plan


def plan_text(plan: AnyPlan) -> str:
    blocks = plan.block_masks
    held = ""
    if blocks is not None:
        entries = terminal.quantity(blocks.entries, "entry", "entries")
        held = f", {entries} in {terminal.quantity(blocks.nbytes, 'byte')}"
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
        if found["approx"] and key == "dense_masked":
            continue
        why = "too large"
        if key == "dense_masked" and found["tiles"] is None:
            why = "keys are chosen anew at every call"
        elif key == "dense_masked" and "keys" in found:
            why = "keys are made anew at every call"
        times = f"left out: {why}" if taken is None else f"{taken:.4g} s; forward is {ratio(taken, forward)}"
        lines.append((f"SDPA, {work}", times))
    which = "all" if rows == found["q_length"] else f"{rows:,} sampled"
    error = "not verified: the pattern depends on nq, and reference does not fit"
    if rows:
        error = f"{found['max_abs_error']:.3g} at most, outputs up to {found['max_abs_output']:.3g}, "
        error += f"on {which} rows of reference"
    lines.append(("error", error))
    if forward < BRIEF:
        lines.append(
            ("times", "below 1 ms they are those of calling, and tell little: take a greater length")
        )
    return "\n".join(f"  {title:17} {said}" for title, said in lines)


BRIEF = 1e-3
"""Seconds below which a forward pass is hardly more than what every call takes."""


def ratio(dense: float, ours: float) -> str:
    """Never below 1: the word says which of the two is faster."""
    return f"{dense / ours:.3g} x faster" if dense >= ours else f"{ours / dense:.3g} x slower"
