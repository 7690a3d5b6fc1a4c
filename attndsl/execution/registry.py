"""What is registered, by whom: the entry points of installed distributions are the only registry."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from attndsl.analysis.part import Part
from attndsl.backend import Features
from attndsl.errors import fail

GROUPS = {"backends": "backend", "analyses": "analysis", "libraries": "library"}
"""And what one of each is called."""
METHODS = {"supports": 2, "cost": 3, "lower": 2}
"""What a backend is asked, and with how many arguments."""


@dataclass(frozen=True)
class Registered:
    """One entry point. `error` is why it cannot be used, if it cannot."""

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
        # whose it is takes reading a file
        if other is not point and (other.value, _owner(other)) != (point.value, _owner(point)):
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
    """The registered object, of a library its folder. Raises AttnError for an unknown name or a plugin that
    cannot be used."""
    points = _points(group)
    if name not in points:
        known = ", ".join(sorted(points)) or "none"
        raise fail(f"no {GROUPS[group]} is named `{name}`", help=f"there are {known}")
    loaded, error = _load(points[name])
    if error:
        raise fail(f"the plugin `{name}` of {_owner(points[name])} cannot be used: {error}")
    return loaded


def names(group: str) -> tuple[str, ...]:
    return tuple(_points(group))


def usable(group: str) -> dict[str, Any]:
    """All of a group that can be used, by name."""
    loaded = {name: _load(point) for name, point in _points(group).items()}
    return {name: found for name, (found, error) in loaded.items() if not error}


def listing() -> list[Registered]:
    """Everything registered, in the order of GROUPS."""
    rows = []
    for group in GROUPS:
        for name, point in _points(group).items():
            _, error = _load(point)
            rows.append(Registered(group, name, _owner(point), point.value, error))
    return rows


@functools.cache
def _load(point: EntryPoint) -> tuple[Any, str]:
    """The object, and why it cannot be used, or "". One bad plugin must not take the others down, so whatever
    its import raises is the reason, shown where plugins are listed."""
    group = point.group.removeprefix("attndsl.")
    if group == "libraries":
        folder = _folder(point.value)
        return folder, "" if folder else f"`{point.value}` is not the name of a package that is installed"
    try:
        loaded = point.load()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    if group == "analyses":
        return loaded, "" if isinstance(loaded, Part) else "it is no `attndsl.analysis.part.Part`"
    return loaded, _flaw(loaded)


def _folder(package: str) -> Path | None:
    """Where a package lies; it is not imported, for what a library holds is text."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    places = None if found is None else found.submodule_search_locations
    return Path(places[0]) if places else None


def _flaw(loaded: object) -> str:
    if not isinstance(getattr(loaded, "features", None), Features):
        return "it has no `features` of type Features"
    for name, count in METHODS.items():
        method = getattr(loaded, name, None)
        if not callable(method):
            return f"it has no method `{name}`"
        try:
            inspect.signature(method).bind(*range(count))
        except TypeError as error:
            return f"its `{name}` does not take {count} arguments: {error}"
    return ""
