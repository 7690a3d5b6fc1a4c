"""The command fmt."""

from __future__ import annotations

import click

from attndsl import syntax
from attndsl.command.given import read, write
from attndsl.command.options import FILE, Command, argument, whole
from attndsl.errors import Source


@click.command(cls=Command)
@argument("files", f"{FILE}.", metavar="FILE...", nargs=-1, required=True, callback=whole)
@click.option("--check", "only_check", is_flag=True, help="Change nothing; exit 1 if a file would change.")
def fmt(files: tuple[str, ...], only_check: bool) -> None:
    """Rewrite files in the one layout; what stdin has goes to stdout."""
    changed = False
    for file in files:
        text, shown = read(file), "<stdin>" if file == "-" else file
        formatted = syntax.format(Source(shown, text))
        if file == "-" and not only_check:
            click.echo(formatted.encode(), nl=False)
            continue
        if formatted == text:
            continue
        changed = True
        if not only_check:
            write(file, formatted)
        click.echo(f"{'would change' if only_check else 'changed'} {shown}")
    if changed and only_check:
        raise click.exceptions.Exit(1)
