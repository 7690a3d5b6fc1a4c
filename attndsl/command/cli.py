"""The command line. Each command gathers plain data, then prints it as text or as one JSON object."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import click

from attndsl import __version__
from attndsl.command.given import columns
from attndsl.errors import AttnError, suggest

COMMANDS = {
    "check": "check",
    "fmt": "fmt",
    "plugins": "plugins",
    "show": "show",
    "compile": "run",
    "run": "run",
    "analyze": "analyze",
    "compare": "analyze",
    "report": "analyze",
    "diff": "check",
}
"""And the modules where they are; only the one that is called for is imported: a check is to feel instant."""
HABITS = {
    "format": "write `fmt`",
    **dict.fromkeys(("plot", "draw", "print", "mask", "view"), "write `show`"),
    **dict.fromkeys(("bench", "benchmark", "time", "test", "verify"), "write `run`"),
    **dict.fromkeys(("lint", "validate", "prove", "parse"), "write `check`"),
    **dict.fromkeys(("cost", "stats", "info", "analyse"), "write `analyze`"),
    **dict.fromkeys(("backends", "list-backends"), "write `plugins`"),
    "help": "write `attndsl --help`",
    **dict.fromkeys(
        ("examples", "list", "ls"),
        "an example stands for a file, `attndsl show example:longformer --length 64`; `example:?` lists them",
    ),
}
"""What is written in place of commands that there are not."""


class Commands(click.Group):
    """A user's mistake is its diagnostics on stderr and exit code 1; wrong usage is click's, with 2."""

    def main(self, *args: Any, **settings: Any) -> Any:
        if "_ATTNDSL_COMPLETE" in os.environ:  # click's own; what it needs is slow to import
            from click.shell_completion import add_completion_class

            from attndsl.command.completion import Bash

            add_completion_class(Bash)
        return super().main(*args, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except AttnError as error:
            click.echo(error.shown(columns()), err=True)
            ctx.exit(1)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            help = HABITS.get(args[0]) or suggest(args[0], COMMANDS) or f"there are {', '.join(COMMANDS)}"
            ctx.fail(f"no command is named `{args[0]}`: {help}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"attndsl.command.{COMMANDS[name]}"), name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="attndsl")
def main() -> None:
    """Attention patterns as text: run, inspect and check them."""
