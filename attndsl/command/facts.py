"""What the commands find, as plain data: the fields of `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attndsl.errors import Diagnostic, fail
from attndsl.relations import proofs

if TYPE_CHECKING:
    from attndsl.command.child import Stage
    from attndsl.execution.plan import Plan


def of_diagnostic(found: Diagnostic, file: str) -> dict[str, Any]:
    """Line and column count from 1; None, in `file`, where a message is about no place in a text."""
    line = column = None
    if found.span is not None:
        file = found.span.source.name
        line, column = found.span.source.position(found.span.start)
    said = {"severity": found.severity, "message": found.message, "help": found.help}
    return {"file": file, "line": line, "column": column, **said}


def of_verdict(found: proofs.Verdict) -> dict[str, Any]:
    return {
        "status": found.status,
        "at": found.at,
        "counter_example": found.counter_example,
        "tables": {name: array.tolist() for name, array in found.tables.items()} if found.tables else None,
        "reason": found.reason,
    }


def of_plan(plan: Plan) -> dict[str, Any]:
    """Tiles and nnz are over all batch rows and heads; None where they wait for tables."""
    from attndsl.execution.choice import UNKNOWN

    p, blocks = plan.problem, plan.block_masks
    found: dict[str, Any] = {
        "name": plan.attention.name,
        "length": p.length,
        "q_length": p.q_length,
        "block_size": p.block_size,
        "backend": plan.backend,
        "rejected": {
            name: UNKNOWN if said is None else said
            for name, said in plan.considered.items()
            if name != plan.backend
        },
        **dict.fromkeys(("tiles", "entries", "nnz", "density", "plan_bytes")),
        "compile_seconds": plan.compile_seconds,
    }
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


def of_run(
    stage: Stage, plan: Plan, given: dict[str, Any], backward: bool, text: Path | None, seed: int
) -> dict[str, Any]:
    """The plan's facts and what running it shows. Raises AttnError where `reference` disagrees."""
    from attndsl.command import trial

    stage("making q, k and v", None)
    problem = plan.problem
    q, k, v = trial.qkv(problem, text, seed)
    stage(f"running {plan.backend}", None)
    call = plan.module().requires_grad_(False)
    out = call(q, k, v, **given)
    stage("running reference", None)
    verified = trial.verify(plan, out, q, k, v, given)
    if verified is not None and not verified.error <= verified.tolerance:
        raise fail(
            f"`{plan.backend}` differs from `reference` by {verified.error:.3g}, "
            f"more than {verified.tolerance:.3g}",
            help="this is a bug in that backend; another one may be right: --backend",
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
        "verified_rows": 0 if verified is None else verified.rows,
    }
