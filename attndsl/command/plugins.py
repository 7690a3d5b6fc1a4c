"""The command plugins."""

from __future__ import annotations

import click

from attndsl.command.given import echo_json
from attndsl.command.options import JSON
from attndsl.execution.registry import listing


@click.command()
@JSON
def plugins(as_json: bool) -> None:
    """Everything registered, by whom, and what failed to load."""
    rows = listing()
    if as_json:
        echo_json({"plugins": [vars(row) for row in rows]})
        return
    for row in rows:
        state = f"  does not load: {row.error}" if row.error else ""
        click.echo(f"{row.group:10} {row.name:12} {row.owner:16} {row.target}{state}")
