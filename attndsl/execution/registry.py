"""What is registered, by whom: the entry points of installed distributions are the only registry."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from attndsl.analysis.part import Part
from attndsl.backend import Features, vocabulary
from attndsl.errors import AttnError, fail, suggest
from attndsl.selection import KINDS

GROUPS = {
    "backends": "backend",
    "analyses": "analysis",
    "selections": "selection",
    "libraries": "library",
    "stages": "stage",
}
"""And what one of each is called."""
METHODS = {"supports": 2, "cost": 3, "lower": 2}
"""What a backend is asked, and with how many arguments."""
SELECTION = {"check": 1, "rounds": 1, "relates": 1, "reads": 1, "counts": 2, "choose": 2, "reference": 2}
"""What a selection is asked."""


STAGE = {"check": 1, "parameters": 3, "learned": 3}
"""What a stage is asked, whatever its role, and by role:"""
ROLES = {
    "halting": {"decide": 3, "losses": 3},
    "exit": {"confidence": 3, "causal": 1},
    "memory": {"reach": 2, "remember": 5},
}
SAYS = {
    "halting": (),
    "exit": ("needs_logits", "needs_threshold", "falls", "each"),
    "memory": ("pairs",),
}
"""What it says of itself, true or false."""


@dataclass(frozen=True)
class Registered:
    """One entry point. `error` is why it cannot be used, if it cannot."""

    group: str
    name: str
    owner: str
    target: str
    error: str = ""


def _points(group: str) -> dict[str, list[EntryPoint]]:
    """Entry points of a group by name; several where distributions register one name."""
    # every `compile` asks, and a look at all distributions is milliseconds: again where a folder has changed
    return _found(group, tuple((place, _changed(place)) for place in sys.path))


def _changed(place: str) -> int:
    return os.stat(place or ".").st_mtime_ns if os.path.exists(place or ".") else 0


@functools.lru_cache(maxsize=16)
def _found(group: str, places: tuple[tuple[str, int], ...]) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"attndsl.{group}"):
        others = found.setdefault(point.name, [])
        # one distribution may be found by two ways; whose a point is takes reading a file
        if all((other.value, _owner(other)) != (point.value, _owner(point)) for other in others):
            others.append(point)
    return found


def _twice(points: list[EntryPoint]) -> str:
    """The reason why a name cannot be used that several registered, or ""."""
    if len(points) == 1:
        return ""
    owners = " and by ".join(map(_owner, points))
    return f"`{points[0].name}` is registered twice under {points[0].group}: by {owners}"


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


@functools.cache
def plugin(group: str, name: str) -> Any:
    """The registered object, of a library its folder. Raises AttnError for an unknown name, one that two
    distributions register, and a plugin that cannot be used."""
    points = _points(group)
    if name not in points:
        known = ", ".join(sorted(points)) or "none"
        raise fail(f"no {GROUPS[group]} is named `{name}`", help=f"there are {known}")
    if error := _twice(points[name]):
        raise fail(error, help="uninstall one of the two")
    loaded, error = _load(points[name][0])
    if error:
        raise refusal(group, name, error)
    return loaded


def refusal(group: str, name: str, error: str) -> AttnError:
    return fail(f"the plugin `{name}` of {owner(group, name)} cannot be used: {error}")


def owner(group: str, name: str) -> str:
    """The distribution that registers a name, the first found of two."""
    return _owner(_points(group)[name][0])


def names(group: str) -> tuple[str, ...]:
    return tuple(_points(group))


def usable(group: str) -> dict[str, Any]:
    """All of a group that can be used, by name."""
    loaded = {name: _load(points[0]) for name, points in _points(group).items() if not _twice(points)}
    return {name: found for name, (found, error) in loaded.items() if not error}


def listing() -> list[Registered]:
    """Everything registered, in the order of GROUPS, and what is under a group that is none of them."""
    rows = []
    for group in GROUPS:
        for name, points in _points(group).items():
            for point in points:
                error = _twice(points) or _load(point)[1]
                rows.append(Registered(group, name, _owner(point), point.value, error))
    for group in sorted(entry_points().groups):
        kind, _, rest = group.partition(".")
        if kind == "attndsl" and rest not in GROUPS:
            error = (
                f"attndsl reads no group `{group}`: {suggest(rest, GROUPS) or f'there are {_listed(GROUPS)}'}"
            )
            rows += [Registered(rest, p.name, _owner(p), p.value, error) for p in entry_points(group=group)]
    return rows


@functools.cache
def _load(point: EntryPoint) -> tuple[Any, str]:
    """The object, and why it cannot be used, or "". One bad plugin must not take the others down, so whatever
    its import raises is the reason, shown where plugins are listed."""
    group = point.group.removeprefix("attndsl.")
    if group == "libraries":
        folder = _folder(point.value)
        if folder is None:
            return None, f"`{point.value}` is not the name of a package that is installed"
        return folder, "" if any(folder.rglob("*.attn")) else f"`{point.value}` holds no .attn file"
    if not point.name.isidentifier():
        return None, "its name is not one of letters, digits and `_`"
    try:
        loaded = point.load()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    if isinstance(loaded, type):
        return loaded, "it is a class: register an instance"
    if group == "analyses":
        return loaded, "" if isinstance(loaded, Part) else "it is no `attndsl.analysis.part.Part`"
    if group == "selections":
        return loaded, _unsaid(loaded, "kind", KINDS) or _misses(loaded, SELECTION)
    if group == "stages":
        flaw = _unsaid(loaded, "role", ROLES)
        for name in () if flaw else SAYS[loaded.role]:
            flaw = flaw or ("" if isinstance(getattr(loaded, name, None), bool) else f"it has no `{name}`")
        return loaded, flaw or _misses(loaded, STAGE | ROLES[loaded.role])
    return loaded, _flaw(loaded)


def _folder(package: str) -> Path | None:
    """Where a package lies; it is not imported, for what a library holds is text."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    places = None if found is None else found.submodule_search_locations
    return Path(places[0]) if places else None


def _unsaid(loaded: object, name: str, known: Collection[Any]) -> str:
    """What a plugin with a `signature` does not say of itself, or ""."""
    said = getattr(loaded, name, None)
    if said not in known:
        return f"its `{name}` is {said!r}, and there are {_listed(known)}"
    return "" if callable(getattr(loaded, "signature", None)) else "it has no method `signature`"


def _flaw(loaded: object) -> str:
    features = getattr(loaded, "features", None)
    if not isinstance(features, Features):
        return "it has no `features` of type Features"
    known = vocabulary()
    for field in fields(Features):
        declared = getattr(features, field.name)
        if not (isinstance(declared, Set) and all(isinstance(name, str) for name in declared)):
            return f"its `{field.name}` are not a set of names: {declared!r}"
        new = sorted(declared - known.get(field.name, declared))
        if new:
            help = suggest(new[0], known[field.name]) or f"there are {_listed(known[field.name])}"
            return f"attndsl has no {field.name.removesuffix('s')} `{new[0]}`: {help}"
    return _misses(loaded, METHODS)


def _misses(loaded: object, methods: Mapping[str, int]) -> str:
    """Which method it does not have, or not with so many arguments, or ""."""
    for name, count in methods.items():
        method = getattr(loaded, name, None)
        if not callable(method):
            return f"it has no method `{name}`"
        try:
            inspect.signature(method).bind(*range(count))
        except TypeError as error:
            return f"its `{name}` does not take {count} arguments: {error}"
    return ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
