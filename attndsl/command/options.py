"""The options that commands share, and the kinds of their values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attndsl.command.given import INSTANCE, file_and_name, is_file
from attndsl.errors import suggest
from attndsl.keywords import HABITS, NICKNAMES, dtype_meant, renamed

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Function = Callable[..., Any]
WRITTEN = {
    **dict.fromkeys(("gpu", "cuda"), "--device cuda"),
    **dict.fromkeys(("png", "svg"), "-o mask.svg"),
    "format": "--json",
    **dict.fromkeys(("param", "params", "parameter", "arg", "args"), "--set w=4"),
    **dict.fromkeys(("half", "fp16"), "--dtype float16"),
    "bf16": "--dtype bfloat16",
    **dict.fromkeys(("training", "train", "backwards", "grad", "gradients"), "--backward"),
}
"""Options that are written otherwise."""
OF_COMMAND = {
    "check": {
        "set": "a claim gives it: `assert lm(w = 8) <= causal`",
        "length": "a claim gives it: `nnz(lm, n = 64)`",
    },
    "diff": {"set": INSTANCE},
}
"""What is written in place of options that other commands have."""


class Command(click.Command):
    """A command that says what is written in place of options and arguments that it does not have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, ctx.allow_extra_args = [*args], True
        try:
            super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            at = next((i for i, word in enumerate(given) if word.partition("=")[0] == name), len(given))
            value = given[at].partition("=")[2] if at < len(given) and "=" in given[at] else ""
            help = self.instead(ctx, name.lstrip("-"), value or next(iter(given[at + 1 :]), ""))
            ctx.fail(f"no option `{name}`" + (f": {help}" if help else ""))
        name = ctx.params.get("name") or ""
        if more := [name] * ("=" in name) + ctx.args:
            bindings = [word for word in more if "=" in word] if "--set" in self.long else []
            help = f": write `--set {bindings[0]}`" if bindings else ""
            ctx.fail(f"`{self.name}` takes no `{more[0]}` here{help}")
        return ctx.args

    @property
    def long(self) -> list[str]:
        return [name for param in self.params for name in param.opts if name.startswith("--")]

    def instead(self, ctx: click.Context, option: str, value: str) -> str:
        """The help for an option that there is not, which `value` stands behind."""
        name = option.replace("-", "_")
        known = [long[2:].replace("-", "_") for long in self.long]
        if here := renamed(name, known):
            return f"write `--{here.replace('_', '-')}`"
        written = WRITTEN.get(name, f"--{option}")
        there = written.split()[0]
        if there in [x for param in self.params for x in param.opts]:
            return f"write `{written}`"
        if help := OF_COMMAND.get(ctx.info_name or "", {}).get(name):
            return help
        if f"--{option}s" in self.long:
            return f"write `--{option}s{f' {value}' if value.isdecimal() else ''}`"
        if others := [f"`{other} {written}`" for other in self.others(ctx, there)]:
            return f"`{ctx.info_name}` takes none; there is {', '.join(others)}"
        if "--length" in self.long and name in HABITS:
            return HABITS[name]
        if name in ("o", "output") and "--output" not in self.long:
            return f"what it says goes to stdout: write `> {value or 'FILE'}`"
        if near := suggest(f"--{option}", self.long):
            return near
        number = value.strip("[]()").partition(",")[0].lstrip("-").replace(".", "", 1).isdigit()
        if "--set" in self.long and name.isidentifier() and number:
            return f"a parameter is given by `--set {name}={value}`"
        if "--input" in self.long and name.isidentifier() and value.endswith(".npy"):
            return f"a table is given by `--input {name}={value}`"
        return ""

    def others(self, ctx: click.Context, option: str) -> list[str]:
        """The commands beside it that have an option."""
        group = ctx.parent.command if ctx.parent else None
        if not isinstance(group, click.Group):
            return []
        found = {name: group.get_command(ctx, name) for name in group.list_commands(ctx)}
        return [name for name, other in found.items() if isinstance(other, Command) and option in other.long]


class Dtype(click.Choice[str]):
    """A dtype by its name here; others are told with it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name = str(value).removeprefix("torch.")
        if here := dtype_meant(name):
            self.fail(f"`{value}` is no dtype: write `{here}`", param, ctx)
        return super().convert(name, param, ctx)


SECOND = re.compile(r"[,;\s]+(?P<next>[A-Za-z_]\w*=(?!=))")
"""The next of several bindings, where one is due."""
BRACKETED = re.compile(r"\(.*\)|\[.*\]|\{.*\}")


def pair(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`name=value` options as a dictionary."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = (part.strip() for part in value.partition("="))
        if not (name and equals and rest):
            known = (
                f": write `{param.opts[0]} {Path(value).stem}=...`" if Path(value).stem.isidentifier() else ""
            )
            raise click.BadParameter(f"`{value}` is not of the form name=value{known}", ctx, param)
        if second := SECOND.search(BRACKETED.sub(lambda held: "_" * len(held[0]), value)):
            one, other = value[: second.start()].strip(), value[second.start("next") :]
            said = f"`{value}` gives two: write `{param.opts[0]} {one} {param.opts[0]} {other}`"
            raise click.BadParameter(said, ctx, param)
        if name in found:
            raise click.BadParameter(f"`{name}` is given twice", ctx, param)
        found[name] = rest
    return found


def options(*decorators: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def add(command: Function) -> Function:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    from attndsl.command import completion

    return completion.files(incomplete)


def argument(name: str, said: str, **settings: Any) -> Callable[[Function], Function]:
    """An argument that is a file, and a paragraph about it at the end of the command's help."""

    def add(command: Function) -> Function:
        command.__doc__ = f"{inspect.cleandoc(command.__doc__ or '')}\n\n{said}"
        return click.argument(name, shell_complete=files, **settings)(command)

    return add


def whole(ctx: click.Context, param: click.Parameter, paths: tuple[str, ...]) -> tuple[str, ...]:
    """Files, and no names of what is in them."""
    for before, path in zip((None, *paths), paths, strict=False):
        file, name = file_and_name(path)
        bare = before is not None and is_file(before) and path.isidentifier() and not is_file(path)
        if name or bare:
            said = f"{ctx.info_name} {before if bare else file}"
            ctx.fail(f"`{ctx.info_name}` takes whole files, and no name in them: write `{said}`")
    return paths


class Whole(click.IntRange):
    """A whole number, at least `least`; `example` stands in the message about what is none."""

    def __init__(self, least: int, example: int) -> None:
        super().__init__(min=least)
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(int(value), param, ctx)
        except ValueError:
            name = param.opts[0] if param else "this"
            said = f"`{name}` takes a whole number, such as {_meant(str(value)) or self.example}"
            raise click.UsageError(said, ctx) from None


def _meant(value: str) -> int | None:
    """1024 for `1k`."""
    thousands = re.fullmatch(r"(\d+)\s*[kK](?:i|ib)?", value)
    return int(thousands[1]) * 1024 if thousands else None


LENGTH = Whole(1, 65536)
COUNT = Whole(1, 64)
FILE = "FILE is a file of patterns, `-` for stdin, or `example:longformer` for one that comes with attndsl"
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
LIMIT = click.option(
    "--time-limit", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True,
    help="Seconds for symbolic work: proofs and tiling.",
)  # fmt: skip
INPUTS = click.option(
    "--input", "inputs", metavar="T=FILE.npy", multiple=True, callback=pair, help="A run-time table."
)
HEADS = click.option(
    "--heads", type=COUNT, help="Query heads; else as many as the attention and its tables speak of."
)
BATCH = click.option("--batch", type=COUNT, default=1, show_default=True, help="Sequences in a batch.")
SHAPE = options(
    click.option("--kv-heads", type=COUNT, help="Number of key heads, if not that of query heads."),
    click.option("--head-dim", type=COUNT, default=64, show_default=True, help="Features of a head."),
    click.option("--dtype", type=Dtype([*NICKNAMES]),
                 default="float32", show_default=True, help="Of q, k and v."),
)  # fmt: skip
SET = click.option(
    "--set", "params", metavar="P=V", multiple=True, callback=pair,
    help="A parameter, as the language writes it: 4, [0, 8], 0..3.",
)  # fmt: skip
TARGET = options(
    argument(
        "file",
        f"{FILE}, and NAME an attention or pattern in it: `FILE:NAME` or `FILE NAME`. It may be left out "
        "where the file has one attention, or one named like the file.",
        metavar="FILE[:NAME]",
    ),
    click.argument("name", required=False),
    SET,
    INPUTS,
)
SIZES = options(
    click.option("--length", type=LENGTH, required=True, help="Number of keys, n."),
    click.option("--q-length", type=LENGTH, help="Number of queries, if not n."),
    HEADS,
    BATCH,
    click.option("--block-size", type=COUNT, help="Tokens on the side of a tile."),
    LIMIT,
)  # fmt: skip
PROBLEM = options(
    SIZES,
    SHAPE,
    click.option("--device", default="cpu", show_default=True, help="Where it runs, as torch names it."),
    click.option("--backend", help="Take this one or fail; the default is the cheapest that can."),
)  # fmt: skip
ANALYSIS = options(
    click.option("--q-length", type=Whole(0, 65536), help="Number of queries, if not n."),
    HEADS,
    SHAPE,
    BATCH,
    click.option("--block-size", type=COUNT, default=128, show_default=True,
                 help="Tokens on the side of a tile."),
    click.option("--layers", type=COUNT, default=1, show_default=True, help="Layers that are stacked."),
    click.option("--ranks", type=COUNT, default=8, show_default=True,
                 help="Processes that the sequence is divided among."),
    LIMIT,
)  # fmt: skip
