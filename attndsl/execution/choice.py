"""What each backend says of a problem, and which one is taken."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

from attndsl.attention import Attention
from attndsl.backend import Backend, Problem
from attndsl.errors import AttnError, fail
from attndsl.execution import registry
from attndsl.tiles.blockmask import BlockMask


def judged(name: str, attention: Attention, problem: Problem, blocks: BlockMask | None) -> float | str:
    """Predicted seconds, or the reason why the backend declines or cannot be used."""
    try:
        backend: Backend = registry.plugin("backends", name)
    except AttnError as error:
        return error.diagnostics[0].message
    reason: object = backend.supports(attention, problem)
    if reason is not None:
        said = isinstance(reason, str) and reason
        return said or f"its `supports` gave {reason!r}, which is neither None nor a reason"
    cost: object = backend.cost(attention, problem, blocks)
    if isinstance(cost, bool) or not isinstance(cost, numbers.Real) or not 0 <= float(cost) < math.inf:
        return f"its cost is not a number of seconds: {cost!r}"
    return float(cost)


def chosen(considered: Mapping[str, float | str], backend: str | None) -> str:
    """`backend`, or where that is None the one that predicts the least seconds.

    Raises AttnError where there is none.
    """
    if backend is not None:
        if backend not in considered:
            raise fail(f"no backend is named `{backend}`", help=f"there are {', '.join(considered)}")
        verdict = considered[backend]
        if isinstance(verdict, str):
            raise fail(
                f"the backend `{backend}` declines: {verdict}",
                help="leave `backend` out to let the cheapest that supports it be chosen",
            )
        return backend
    costs = {name: cost for name, cost in considered.items() if not isinstance(cost, str)}
    if not costs:
        reasons = "; ".join(f"{name}: {why}" for name, why in considered.items())
        raise fail(f"no backend supports this: {reasons}")
    return min(costs, key=lambda name: costs[name])
