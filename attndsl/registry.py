"""What is registered, by whom: the entry points of installed distributions are the only registry."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from attndsl.errors import fail

GROUPS = ("backends", "patterns", "scores", "analyses")


@dataclass(frozen=True)
class Registered:
    """One entry point. `error` is what its import said, where it failed."""

    group: str
    name: str
    owner: str
    target: str
    error: str = ""


def _points(group: str) -> dict[str, EntryPoint]:
    """Entry points of a group by name. Raises AttnError where two distributions register one name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"attndsl.{group}"):
        other = found.setdefault(point.name, point)
        if (other.value, _owner(other)) != (point.value, _owner(point)):
            raise fail(
                f"`{point.name}` is registered twice under attndsl.{group}: "
                f"by {_owner(other)} and by {_owner(point)}",
                help="uninstall one of the two",
            )
    return found


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


@functools.cache
def plugin(group: str, name: str) -> Any:
    """The registered object. Raises AttnError for an unknown name or a plugin that does not import."""
    points = _points(group)
    if name not in points:
        known = ", ".join(sorted(points))
        raise fail(f"no {group.removesuffix('s')} is named `{name}`", help=f"there are {known}")
    loaded = _load(points[name])
    if isinstance(loaded, Exception):
        raise fail(f"the plugin `{name}` of {_owner(points[name])} does not import: {loaded}")
    return loaded


def names(group: str) -> tuple[str, ...]:
    return tuple(_points(group))


def listing() -> list[Registered]:
    """Everything registered, in the order of GROUPS."""
    rows = []
    for group in GROUPS:
        for name, point in _points(group).items():
            loaded = _load(point)
            error = str(loaded) if isinstance(loaded, Exception) else ""
            rows.append(Registered(group, name, _owner(point), point.value, error))
    return rows


@functools.cache
def _load(point: EntryPoint) -> Any:
    """The object, or the error of a plugin that does not import: shown where plugins are listed."""
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        return error
