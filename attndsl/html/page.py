"""The report of an attention as one HTML page that stands alone: no network, no files beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis import units
from attndsl.analysis.part import Part
from attndsl.analysis.report import usable
from attndsl.html.masks import Mask
from attndsl.html.typeset import mathml
from attndsl.pictures.style import DARK, LIGHT, Drawing
from attndsl.tiles.cells import LEVELS

LINES = 48
"""Tiles on a side up to which lines between them help."""

MACROS = '{% from "macros.jinja" import card, heads, listed, table %}\n'


def render(
    report: Mapping[str, Any],
    *,
    masks: Sequence[Mask] = (),
    figures: Mapping[str, Drawing] | None = None,
    source: str | None = None,
) -> str:
    """The page for the fields of `analyze --json`; what is missing or None is left out or shown as a dash.

    masks    drawn by us, with a tooltip on each cell
    figures  by the part in whose section each is put
    source   the text of the .attn file
    """
    import jinja2
    from markupsafe import Markup

    files = {file.name: file for file in resources.files("attndsl.html").iterdir()}
    style, script = (files[f"page.{kind}"].read_text("utf-8") for kind in ("css", "js"))
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files[name].read_text("utf-8")),
    )  # fmt: skip

    def at(*path: str | int) -> Any:
        return look_up(report, path)

    def fact(*path: str | int, unit: str = "count") -> Markup:
        """The number at a path of the report; it keeps its exact value and its place as JSON pointer."""
        value = look_up(report, path)
        if value is None:
            return Markup('<span class="none" title="not known">—</span>')
        exact = f"{value:,}" if isinstance(value, int) and unit in ("flops", "bytes") else ""
        return Markup('<data value="{}" data-field="{}"{}>{}</data>').format(
            json.dumps(value),
            "/".join(["", *map(str, path)]),
            Markup(' title="{}"').format(exact) if exact else "",
            UNITS[unit](value),
        )

    environment.filters.update(
        UNITS, math=lambda formula: Markup(mathml(formula)), relation=relation, cheapest=cheapest
    )
    environment.globals.update(at=at, fact=fact)

    def written(template: str, name: str, part: Part) -> Markup:
        told = {field: report[field] for field in part.names(name) if report.get(field) is not None}
        made = environment.from_string(MACROS + template).render(report=report, told=told) if told else ""
        return Markup(made)

    parts = usable().items()
    bodies = [
        (part.title or name.replace("_", " "), name, written(part.section, name, part))
        for name, part in parts
    ]
    sections = groupby(filter(itemgetter(2), bodies), key=itemgetter(0))
    return environment.get_template("page.html.jinja").render(
        report=report,
        panels=[panel(mask) for mask in masks],
        figures={name: images(figure) for name, figure in (figures or {}).items()},
        source=source,
        cards=[written(part.cards, name, part) for name, part in parts],
        sections=[(title, list(under)) for title, under in sections],
        levels=LEVELS,
        light=LIGHT,
        dark=DARK,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def cheapest(lowerings: Mapping[str, Any]) -> str | None:
    """The backend that `compile` takes."""
    costs = {name: found["seconds_estimate"] for name, found in lowerings.items()}
    known = {name: seconds for name, seconds in costs.items() if seconds is not None}
    return min(known, key=known.__getitem__, default=None)


def look_up(data: Any, path: Sequence[str | int]) -> Any:
    """What stands at a path of dictionaries and lists, None where it ends before."""
    for step in path:
        if isinstance(data, Mapping):
            data = data.get(step)
        elif isinstance(data, Sequence) and not isinstance(data, str):
            data = data[int(step)]
        else:
            return None
    return data


def panel(mask: Mask) -> dict[str, Any]:
    """A mask as what the template draws: a path for each class of cells, and the counts as runs."""
    rows, columns = mask.live.shape
    return {
        "label": mask.label,
        "rows": rows,
        "columns": columns,
        "unit": mask.unit,
        "nnz": int(mask.live.sum()),
        "pairs": mask.nq * mask.n,
        "paths": [strokes(mask.levels == level) for level in range(1, len(LEVELS) + 1)],
        "lines": lines(mask),
        "data": {
            "first": mask.first,
            "nq": mask.nq,
            "n": mask.n,
            "queries": mask.queries,
            "keys": mask.keys,
            "columns": columns,
            "live": [[x for run in runs(row) for x in run] for row in mask.live],
        },
    }


def runs(row: NDArray[Any]) -> list[tuple[int, int]]:
    """(length, value) of each stretch of equal values."""
    starts = np.flatnonzero(np.diff(row, prepend=row[0] + 1))
    lengths = np.diff(np.append(starts, len(row)))
    return list(zip(lengths.tolist(), row[starts].tolist(), strict=True))


def strokes(cells: NDArray[np.bool_]) -> str:
    """The cells as strokes of width 1 along the middles of their rows."""
    drawn = []
    for y, row in enumerate(cells):
        pen, x = f"M0 {y}.5", 0
        for length, here in runs(row):
            if here:
                drawn.append(f"{pen}m{x} 0h{length}")
                pen, x = "", 0
            else:
                x = length
    return "".join(drawn)


def lines(mask: Mask) -> str:
    """Lines between tiles, or between cells where these are larger; none where there are too many."""
    rows, columns = mask.live.shape
    down, across = (
        np.arange(step, extent, step) / cell
        for extent, cell, step in (
            (mask.nq, mask.queries, max(mask.queries, mask.block_size)),
            (mask.n, mask.keys, max(mask.keys, mask.block_size)),
        )
    )
    if max(len(down), len(across)) >= LINES:
        return ""
    return "".join([*(f"M0 {y:g}h{columns}" for y in down), *(f"M{x:g} 0v{rows}" for x in across)])


def images(figure: Drawing) -> dict[str, str]:
    """As addresses that hold the picture: two SVG documents in one page would share their ids."""
    light, dark = (
        "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
        for svg in (figure.light, figure.dark)
    )
    return {"light": light, "dark": dark, "alt": figure.alt, "caption": figure.caption}


def relation(text: str) -> str:
    """`n >= 256` with the signs that print uses."""
    return text.replace(">=", "≥").replace("<=", "≤").replace("!=", "≠").replace("==", "=")


UNITS: dict[str, Callable[[Any], str]] = {
    "count": units.count,
    "mean": lambda value: f"{value:,.1f}",
    "percent": units.percent,
    "flops": lambda value: units.scaled(value, "FLOP"),
    "bytes": lambda value: units.scaled(value, "B"),
    "seconds": units.seconds,
    "truth": lambda value: "yes" if value else "no",
    "times": lambda value: f"{value:.3g} ×",
    "ratio": lambda value: f"{value:.3g}",
}
