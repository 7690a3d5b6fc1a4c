"""Reports side by side, as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attndsl.analysis.report import Report
from attndsl.analysis.units import percent, scaled, seconds
from attndsl.errors import fail

PARTS = ["nnz", "cost", "reach", "kv_cache"]

Row = Mapping[str, Any]


def cases(sweep: str | None) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """Parameters and sizes of each column: those of `P=V,V,...`, where P is a parameter or n."""
    if sweep is None:
        yield {}, {}
        return
    name, _, values = sweep.partition("=")
    if not (name and values):
        raise fail(f"`{sweep}` is not of the form name=value,value", help="such as n=1024,4096 or w=64,128")
    for value in values.split(","):
        if name != "n":
            yield {name: value}, {}
        elif value.strip().isdecimal():
            yield {}, {"length": int(value)}
        else:
            raise fail(f"`{value}` is no length", help="such as n=1024,4096")


def row(report: Report) -> dict[str, Any]:
    """What is compared, as numbers; None where it is not known."""
    reach, cache, count = report.reach, report.kv_cache, report.nnz
    return {
        "name": report.name,
        "length": report.length,
        "live pairs": count and count.value,
        "density": report.density,
        "complexity": report.complexity,
        "FLOPs": report.flops and report.flops.forward,
        "full after": reach and reach.full_after,
        "diameter": report.diameter,
        "KV cache": cache and cache.minimum,
        **{name: work.seconds_estimate for name, work in (report.lowerings or {}).items()},
        "not known": dict(report.reasons) or None,
    }


SAID: dict[str, Callable[[Any], str]] = {
    "length": "{:,}".format,
    "live pairs": "{:,}".format,
    "density": percent,
    "complexity": str,
    "FLOPs": scaled,
    "full after": lambda layers: f"{layers} layer{'s' * (layers != 1)}",
    "diameter": str,
    "KV cache": "{:,} keys".format,
}
"""How numbers are written for people; the other columns are predicted seconds."""


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One column for each row, one line for each thing compared."""
    names = [key for key in {key: None for row in rows for key in row} if key not in ("name", "not known")]
    lines = [
        [name, *("-" if row.get(name) is None else SAID.get(name, seconds)(row[name]) for row in rows)]
        for name in names
    ]
    return ["", *(str(row["name"]) for row in rows)], lines


def _reasons(rows: Sequence[Row]) -> list[str]:
    said = {f"{row['name']}: {part}: {why}" for row in rows for part, why in (row["not known"] or {}).items()}
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
    names = list({key: None for row in rows for key in row if key != "not known"})
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
