"""Reports side by side, as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from attndsl.analysis.report import Report
from attndsl.analysis.units import percent, scaled, seconds
from attndsl.errors import fail

PARTS = ["nnz", "cost", "reach", "kv_cache"]

Row = Mapping[str, Any]


def cases(sweeps: Sequence[str]) -> Iterator[dict[str, str]]:
    """The values of each column: every combination of those in `P=V,V,...`, where P is a parameter or n."""
    named = {}
    for sweep in sweeps:
        name, _, values = sweep.partition("=")
        if not (name and values):
            raise fail(
                f"`{sweep}` is not of the form name=value,value", help="such as n=1024,4096 or w=64,128"
            )
        if name in named:
            raise fail(f"`{name}` is swept twice")
        named[name] = values.split(",")
        if name == "n" and not all(value.strip().isdecimal() for value in named[name]):
            raise fail(f"`{values}` are no lengths", help="such as n=1024,4096")
    return (dict(zip(named, column, strict=True)) for column in product(*named.values()))


def row(report: Report, swept: Mapping[str, str]) -> dict[str, Any]:
    """What is compared, as numbers; None where it is not known."""
    reach, cache, count = report.reach, report.kv_cache, report.nnz
    return {
        "name": report.name,
        "length": report.length,
        **{name: value for name, value in swept.items() if name != "n"},
        "nnz": count and count.value,
        "density": report.density,
        "complexity": report.complexity,
        "flops": report.flops and report.flops.forward,
        "full_after": reach and reach.full_after,
        "diameter": report.diameter,
        "kv_cache": cache and cache.minimum,
        **{f"{name}_seconds": work.seconds_estimate for name, work in (report.lowerings or {}).items()},
        "reasons": dict(report.reasons) or None,
    }


SAID: dict[str, tuple[str, Callable[[Any], str]]] = {
    "length": ("keys, n", "{:,}".format),
    "nnz": ("live pairs", "{:,}".format),
    "density": ("density", percent),
    "complexity": ("complexity", str),
    "flops": ("FLOP forward", scaled),
    "full_after": ("sees all after", lambda layers: f"{layers:,} layer{'s' * (layers != 1)}"),
    "diameter": ("diameter", "{:,}".format),
    "kv_cache": ("KV cache", "{:,} keys".format),
}
"""Labels for people, and how the values are written."""


def said(name: str) -> tuple[str, Callable[[Any], str]]:
    if name.endswith("_seconds"):
        return name.removesuffix("_seconds"), seconds
    return SAID.get(name, (name, str))


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One column for each row, one line for each thing compared."""
    names = [key for key in {key: None for row in rows for key in row} if key not in ("name", "reasons")]
    lines = []
    for name in names:
        label, write = said(name)
        lines.append([label, *("-" if row.get(name) is None else write(row[name]) for row in rows)])
    return ["", *(str(row["name"]) for row in rows)], lines


def _reasons(rows: Sequence[Row]) -> list[str]:
    said = {f"{row['name']}: {part}: {why}" for row in rows for part, why in (row["reasons"] or {}).items()}
    return sorted(said)


def text(rows: Sequence[Row]) -> str:
    from tabulate import tabulate

    headers, lines = _cells(rows)
    aligned = ["left", *["right"] * len(rows)]
    found = tabulate(lines, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
    return "\n".join([found, *_reasons(rows)])


def markdown(rows: Sequence[Row]) -> str:
    from tabulate import tabulate

    headers, lines = _cells(rows)
    aligned = ["left", *["right"] * len(rows)]
    return str(tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=aligned))


def as_csv(rows: Sequence[Row]) -> str:
    """One line for each attention, numbers as they are."""
    names = list({key: None for row in rows for key in row if key != "reasons"})
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps({"rows": list(rows)}, indent=2)


FORMATS: dict[str, Callable[[Sequence[Row]], str]] = {
    "text": text,
    "markdown": markdown,
    "csv": as_csv,
    "json": as_json,
}
