"""What each backend says of a problem, and which one is taken."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from attndsl.attention import Attention
from attndsl.backend import Backend, Counting, Features, Problem, Remarking, device_kind, weighed
from attndsl.errors import AttnError, asking, brief, fail, suggest
from attndsl.execution import registry
from attndsl.expr import Expr, Selected, Table, nodes, var
from attndsl.keywords import BACKENDS
from attndsl.tiles.blockmask import BlockMask

Verdict: TypeAlias = float | str | None
"""Predicted seconds, None where the cost is unknown, or why the backend declines or cannot be used."""
UNKNOWN = "cost unknown"
"""None in words."""


def considered(attention: Attention, problem: Problem, blocks: BlockMask | None) -> dict[str, Verdict]:
    """Every backend, in the order in which they are taken: by predicted seconds; where the cost is unknown by
    the numbers that they say they form and write, those that do not say last; and by name."""

    def turn(name: str) -> tuple[int, float]:
        verdict = verdicts[name]
        if verdict is not None:
            return (0, verdict) if isinstance(verdict, float) else (2, 0.0)
        backend = registry.plugin("backends", name)
        if not isinstance(backend, Counting):
            return 1, math.inf
        with asking(f"the backend `{name}`"):
            counts = backend.counts(attention, problem, blocks)
        return 1, counts["pairs"] + counts["written"]

    verdicts = {name: judged(name, attention, problem, blocks) for name in sorted(registry.names("backends"))}
    return {name: verdicts[name] for name in sorted(verdicts, key=turn)}


def said(name: str, verdict: Verdict, problem: Problem) -> str:
    """A verdict in words."""
    if isinstance(verdict, str):
        return verdict
    backend = registry.plugin("backends", name)
    cost = UNKNOWN if verdict is None else f"{verdict:.3g} s predicted"
    if verdict is not None and isinstance(backend, Counting) and device_kind(problem) not in backend.seconds:
        cost += ", not fitted"
    return f"{cost}; {backend.remark}" if isinstance(backend, Remarking) else cost


def judged(name: str, attention: Attention, problem: Problem, blocks: BlockMask | None) -> Verdict:
    try:
        backend: Backend = registry.plugin("backends", name)
    except AttnError as error:
        return error.diagnostics[0].message
    with asking(f"the backend `{name}`"):
        reason: object = declined(backend, attention, problem)
    if reason is not None:
        said = isinstance(reason, str) and reason
        return said or f"its `supports` gave {reason!r}, which is neither None nor a reason"
    with asking(f"the backend `{name}`"):
        cost: object = backend.cost(attention, problem, blocks)
    if cost is None:
        return None
    if isinstance(cost, bool) or not isinstance(cost, numbers.Real) or not 0 <= float(cost) < math.inf:
        return f"its cost is not a number of seconds: {cost!r}"
    return float(cost) + choosing(attention, problem)


CHOOSING = {"calls": 7e-4, "products": 5.2e-11, "sorted": 1.7e-8}
"""Seconds of one core of what comes before a backend, where keys are chosen by content; by `python -m
benchmarks.choosing`."""


def choosing(attention: Attention, problem: Problem) -> float:
    """0 for a device that nothing is known of."""
    if device_kind(problem) != "cpu":
        return 0.0
    return sum(weighed(CHOOSING, {"calls": 1.0, **counts}) for _, counts in choices(attention, problem))


def choices(attention: Attention, problem: Problem) -> Iterator[tuple[str, Mapping[str, float]]]:
    """What each choice takes, and by which selection."""
    for table in attention.selected:
        origin = table.origin
        assert isinstance(origin, Selected)
        with asking(f"the selection `{origin.selection}`"):
            counts = registry.plugin("selections", origin.selection).counts(origin, problem)
        yield origin.selection, counts


def declined(backend: Backend, attention: Attention, problem: Problem) -> str | None:
    """What the backend does not know, or else its own reason, as it gave it."""
    asked = used(attention, problem)
    for field in dataclasses.fields(Features):
        new = sorted(getattr(asked, field.name) - getattr(backend.features, field.name))
        if new:
            kind = field.name if len(new) > 1 else field.name.removesuffix("s")
            return f"it knows nothing of the {kind} {', '.join(f'`{name}`' for name in new)}"
    return backend.supports(attention, problem)


def used(attention: Attention, problem: Problem) -> Features:
    """What a kernel must know. Whatever is added to an attention, a table or a problem is a feature that
    nobody knows until backends say so."""
    clauses = list(_clauses(attention))
    expressions = [value for _, value in clauses if isinstance(value, Expr)]
    sizes = "length q_length batch heads kv_heads head_dim block_size dtype device"
    return Features(
        clauses={name for name, _ in clauses},
        norms={group.norm.kind for group in attention.groups},
        approx=frozenset() if attention.approx is None else {attention.approx.kind},
        operations={node.op for e in expressions for node in nodes(e)} - {"const", "var"},
        tables={
            kind
            for e in expressions
            for node in nodes(e)
            if isinstance(node.value, Table)
            for kind in _kinds(node.value)
        },
        modes={name for name, _ in _set(problem, sizes)},
        dtypes={problem.dtype},
        devices={device_kind(problem)},
    )


def _clauses(attention: Attention) -> Iterator[tuple[str, Any]]:
    yield from _set(
        attention, "name groups inputs learned offset least_heads approx streams numbered written parameters"
    )
    for group in attention.groups:
        yield from _set(group, "relation norm")
        yield from _set(group.relation, "mask")
        yield from _set(group.norm, "kind")


def _set(value: Any, rest: str) -> Iterator[tuple[str, Any]]:
    """The fields that are not as they are by default, but for the rest, which are told otherwise or need
    nothing of a kernel."""
    for field in dataclasses.fields(value):
        plain = var("s") if field.name == "score" else field.default
        here = getattr(value, field.name)
        if field.name not in rest.split() and here != plain:
            yield field.name, here


def _kinds(table: Table) -> Iterator[str]:
    yield type(table.origin).__name__.lower()
    yield table.dtype
    yield from (name for name, _ in _set(table, "name dtype dims origin"))


def chosen(considered: Mapping[str, Verdict], backend: str | None) -> str:
    """`backend`, or where that is None the first that does not decline.

    Raises AttnError where there is none.
    """
    if backend is not None:
        if backend not in considered:
            help = (
                BACKENDS.get(backend)
                or suggest(backend, considered)
                or f"there are {', '.join(sorted(considered))}"
            )
            raise fail(f"no backend is named `{brief(backend)}`", help=help)
        registry.plugin("backends", backend)  # one that cannot be used says so itself
        verdict = considered[backend]
        if isinstance(verdict, str):
            raise fail(
                f"the backend `{backend}` declines: {verdict}",
                help="leave `backend` out to let the cheapest that supports it be chosen",
            )
        return backend
    taken = next((name for name, verdict in considered.items() if not isinstance(verdict, str)), None)
    if taken is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in considered.items())
        raise fail(f"no backend supports this: {reasons}")
    return taken
