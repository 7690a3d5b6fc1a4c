"""The command plugins."""

from __future__ import annotations

from dataclasses import replace

import click

from attndsl.analysis.report import clashes
from attndsl.command.given import echo_json
from attndsl.command.options import JSON, Command
from attndsl.execution.registry import listing, usable


@click.command(cls=Command)
@JSON
def plugins(as_json: bool) -> None:
    """Everything registered, by whom, and why something cannot be used."""
    clashing = clashes(usable("analyses"))
    rows = [
        replace(row, error=clashing[row.name]) if row.group == "analyses" and row.name in clashing else row
        for row in listing()
    ]
    if as_json:
        echo_json({"plugins": [vars(row) for row in rows]})
        return
    columns = [
        [f"{cell:{max(map(len, column))}}" for cell in column]
        for column in zip(*((row.group, row.name, row.owner) for row in rows), strict=True)
    ]
    for row, *cells in zip(rows, *columns, strict=True):
        state = f"  cannot be used: {row.error}" if row.error else ""
        click.echo(f"{'  '.join(cells)}  {row.target}{state}")
