"""Reports side by side, as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from attndsl.analysis.field import layers_said
from attndsl.analysis.report import Report
from attndsl.analysis.text import WIDTH
from attndsl.analysis.units import percent, scaled, seconds
from attndsl.errors import fail
from attndsl.stacks.depth import Depth

Row = Mapping[str, Any]


class Compared(NamedTuple):
    """One thing that is compared: how it is called, the part that finds it, it, and how it is written."""

    label: str
    part: str
    value: Callable[[Report], Any]
    write: Callable[[Any], str]


LINES = {
    "nnz": Compared("live pairs", "nnz", lambda r: r.nnz and r.nnz.value, "{:,}".format),
    "density": Compared("density", "nnz", lambda r: r.density, percent),
    "complexity": Compared("complexity", "nnz", lambda r: r.complexity, str),
    "flops": Compared("FLOP forward", "cost", lambda r: r.flops and r.flops.forward, scaled),
    "full_after": Compared("sees all after", "reach", lambda r: r.reach and r.reach.full_after, layers_said),
    "diameter": Compared("diameter", "reach", lambda r: r.diameter, "{:,}".format),
    "kv_cache": Compared(
        "KV cache", "kv_cache", lambda r: r.kv_cache and r.kv_cache.minimum, "{:,} keys".format
    ),
}
UNTOLD = ("name", "choice", "reasons")
"""What has no line in a table."""
PARTS = list(dict.fromkeys(line.part for line in LINES.values()))


STACKS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "layers": ("layers", "{:,}".format),
    "parameters": ("parameters", "{:,}".format),
    "flops": ("FLOP forward", scaled),
    "decode_flops": ("FLOP of a step", scaled),
    "kv_bytes": ("KV cache", partial(scaled, unit="B")),
    "activations": ("activations", partial(scaled, unit="B")),
    "sees_least": ("sees at least", "{:,} tokens".format),
    "sees_most": ("sees at most", "{:,} tokens".format),
}
"""What is compared of stacks, how it is called, and how it is written."""


def row_of_stack(found: Depth, name: str, heads: int, swept: Mapping[str, str]) -> dict[str, Any]:
    """As `row`, of a stack."""
    flops, sees = found.flops, found.levels[-1].sees
    return {
        "name": name,
        "length": found.length,
        "heads": heads,
        **{name: value for name, value in swept.items() if name != "n"},
        "layers": len(found.levels),
        "parameters": found.parameters,
        "flops": flops and flops.forward,
        "decode_flops": flops and flops.decode,
        "kv_bytes": found.bytes,
        "activations": found.activations.plain,
        "sees_least": sees and sees[0],
        "sees_most": sees and sees[1],
        "choice": None,
        "reasons": None,
    }


def columns(sweeps: Sequence[str]) -> Iterator[dict[str, str]]:
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
        if re.fullmatch(r"\s*\d+\s*(:|\.\.|-)\s*\d+\s*", values):
            ends = ",".join(re.findall(r"\d+", values))
            raise fail(f"`{values}` is no list of values", help=f"write each: `--sweep {name}={ends}`")
        named[name] = re.split(r",(?![^\[]*\])", values)  # what stands in brackets is one value
        if name == "n" and not all(value.strip().isdecimal() for value in named[name]):
            raise fail(f"`{values}` are no lengths", help="such as n=1024,4096")
    return (dict(zip(named, column, strict=True)) for column in product(*named.values()))


def row(report: Report, swept: Mapping[str, str]) -> dict[str, Any]:
    """What is compared, as numbers; None where it is not known."""
    return {
        "name": report.name,
        "length": report.length,
        "heads": report.heads,
        **{name: value for name, value in swept.items() if name != "n"},
        **{name: line.value(report) for name, line in LINES.items()},
        **{f"{name}_seconds": work.seconds_estimate for name, work in (report.lowerings or {}).items()},
        "choice": report.choice,
        "reasons": dict(report.reasons) or None,
    }


def said(name: str) -> tuple[str, Callable[[Any], str]]:
    """The label of a line for people, and how its values are written."""
    if name in LINES:
        return LINES[name].label, LINES[name].write
    if name in STACKS:
        return STACKS[name]
    if name == "length":
        return "keys, n", "{:,}".format
    return (name.removesuffix("_seconds"), seconds) if name.endswith("_seconds") else (name, str)


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """One column for each row, one line for each thing compared."""
    names = [key for key in {key: None for row in rows for key in row} if key not in UNTOLD]
    lines = []
    for name in names:
        label, write = said(name)
        lines.append([label, *("-" if row.get(name) is None else write(row[name]) for row in rows)])
    return ["", *(str(row["name"]) for row in rows)], lines


def _reasons(rows: Sequence[Row]) -> list[str]:
    said = {f"{row['name']}: {part}: {why}" for row in rows for part, why in (row["reasons"] or {}).items()}
    return sorted(said)


def _choices(rows: Sequence[Row]) -> list[str]:
    """What figures are about where keys are chosen by content."""
    names = ", ".join(dict.fromkeys(row["name"] for row in rows if row["choice"]))
    about = "FLOP forward is of one drawn choice, sight and cache of all that may be chosen"
    return textwrap.wrap(f"{names}: {about}", WIDTH) if names else []


def text(rows: Sequence[Row]) -> str:
    from tabulate import tabulate

    headers, lines = _cells(rows)
    aligned = ["left", *["right"] * len(rows)]
    found = tabulate(lines, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)
    return "\n".join([found, *_choices(rows), *_reasons(rows)])


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
