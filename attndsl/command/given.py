"""What a command is given: programs, tables and files; where it writes."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from attndsl import syntax
from attndsl.attention import Attention
from attndsl.bound import Bound, Unbound
from attndsl.errors import AttnError, Source, fail
from attndsl.program import Program, load, parse
from attndsl.shipped import PREFIX, elsewhere, located, names
from attndsl.stacks.tree import Stack
from attndsl.syntax.format import render

INSTANCE = "name it in the file: `attention wide = lm(w = 8)`"
"""Where a command takes no parameters."""


def columns() -> int | None:
    """Of what is told of mistakes; None where no terminal shows them."""
    return min(80, shutil.get_terminal_size().columns) if sys.stderr.isatty() else None


def program_of(file: str) -> Program:
    """The program of a file, or of stdin for `-`."""
    return parse(read(file), "<stdin>") if file == "-" else load(file)


def bound(file: str, name: str | None, params: dict[str, str] | None) -> Bound:
    """The attention that a command is about; `params` are None where it takes none."""
    return titled(file, name, params)[0]


@contextmanager
def telling() -> Iterator[None]:
    """Warnings of Python that are met inside are said as our own."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    for found in told:
        click.echo(f"warning: {found.message}", err=True)


def titled(file: str, name: str | None, params: dict[str, str] | None) -> tuple[Bound, str]:
    """The attention, and its name with the parameters that differ from the defaults."""
    found, shown = defined(file, name, params)
    if isinstance(found, Stack):
        own = dict.fromkeys(sub.name for turn in found.turns for sub in turn if sub.name != "ffn")
        raise fail(f"`{found.name}` is a stack", help=f"ask for one of its attentions: {', '.join(own)}")
    return found, shown


def defined(file: str, name: str | None, params: dict[str, str] | None) -> tuple[Bound | Stack, str]:
    """The attention or stack, and its name with the parameters that differ from the defaults.

    Without a name `file` may be FILE:NAME.
    """
    how = INSTANCE if params is None else "give them by `--set w=8`"
    inside, named = file_and_name(file)
    if name is None:
        file, name = inside, named
    elif named:
        raise fail(f"`{file}` names `{named}`, and `{name}` stands behind it", help="one name is enough")
    if "(" in (name or ""):
        raise fail(f"`{name}` has parameters behind the name", help=how)
    program = program_of(file)
    name = name or program.default()
    definition: Any = program[name]
    with telling():
        found = definition(**params) if params else definition
    if isinstance(found, Unbound):
        raise fail(str(found).strip("<>"), help=how)
    return found, title(program, name, params or {})


def names_stack(file: str, name: str | None) -> bool:
    """Whether a name of a file is a stack's; the parameters of it have no part in that."""
    program = program_of(file)
    return (name or program.default()) in program.stacks


def title(program: Program, name: str, params: dict[str, str]) -> str:
    item = program.stacks.get(name) or program.elaborator.definitions[name]
    defaults = {param.name: param.default for param in item.params}
    given = {param: render(syntax.parse_expression(Source("", text))) for param, text in params.items()}
    other = [
        f"{param} = {given[param]}"
        for param, default in defaults.items()
        if param in given and (default is None or render(default) != given[param])
    ]
    return f"{name}({', '.join(other)})" if other else name


def tables(inputs: dict[str, str]) -> dict[str, Any]:
    """The arrays in the files given as run-time tables."""
    import numpy as np

    found = {}
    for name, path in inputs.items():
        try:
            with open(path, "rb") as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
        except OSError as error:
            help = f"a table is a .npy file; a parameter is given by `--set {name}={path}`"
            raise unreadable(path, error, "" if path.endswith(".npy") else help) from None
        except (ValueError, EOFError):
            raise fail(f"`{path}` is no .npy file", help="write it with numpy.save") from None
    return found


def read(file: str) -> str:
    """The text of a file, or of stdin for `-`."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else located(file).read_bytes()
        return data.decode()
    except OSError as error:
        raise unreadable(file, error, elsewhere(file)) from None
    except UnicodeDecodeError:
        raise fail(f"`{'<stdin>' if file == '-' else file}` is not UTF-8 text") from None


def unreadable(file: str, error: OSError, help: str = "") -> AttnError:
    return fail(f"cannot read `{file}`: {(error.strerror or str(error)).lower()}", help=help)


def write(file: str, text: str | bytes) -> None:
    try:
        Path(file).write_bytes(text if isinstance(text, bytes) else text.encode())
    except OSError as error:
        raise fail(f"cannot write `{file}`: {error.strerror}") from None


def file_and_name(target: str) -> tuple[str, str | None]:
    """FILE:NAME or FILE, whose own name may have a colon, as that of an example has."""
    file, _, name = target.rpartition(":")
    if f"{file}:" == PREFIX:
        return target, None
    if f"{file}:" == f"{PREFIX[:-1]}s:" and name in names() and not Path(target).exists():
        raise fail(f"cannot read `{target}`", help=f"an example is `{PREFIX}{name}`")
    return (file, name or None) if file and not Path(target).exists() else (target, None)


def is_file(target: str) -> bool:
    """Whether a program is read from there: a file, an example, or stdin."""
    return target == "-" or target.startswith(PREFIX) or Path(target).is_file()


def bare_names(targets: Sequence[str]) -> list[str]:
    """Those behind the first that name something in a file, and not the file."""
    return [target for target in targets[1:] if target.isidentifier() and not is_file(target)]


def heads_of(attention: Attention, given: dict[str, Any], heads: int | None) -> int:
    """As many as are asked for; else as the attention and its tables speak of."""
    from attndsl.tiles import lowering

    tell_heads(attention, given, heads)
    return lowering.heads_of(attention, given) if heads is None else heads


def tell_heads(attention: Attention, given: dict[str, Any], heads: int | None) -> None:
    """Says how many heads are taken where none are asked for, and others would have other masks."""
    from attndsl.tiles import lowering

    if heads is None and differs(attention):
        taken = lowering.heads_of(attention, given)
        said = f"{taken} head{' is' if taken == 1 else 's are'} taken; `--heads` says how many there are"
        click.echo(f"note: the mask of `{attention.name}` differs from head to head: {said}", err=True)


def differs(attention: Attention) -> bool:
    """Whether a mask is told by the number of the head, or by how many there are. Tables of heads say it
    themselves."""
    masks = [group.relation.mask for group in attention.groups]
    if any("H" in table.dims for mask in masks for table in mask.tables):
        return False
    return any({"h", "H"} & mask.free for mask in masks)


def first_query(attention: Attention, length: int, nq: int, heads: int) -> int:
    """The position of query row 0."""
    from attndsl.tiles import lowering

    return lowering.sizes(attention, length, nq, heads).q.span(0)[0]


def echo_json(data: dict[str, Any]) -> None:
    import json

    click.echo(json.dumps(data, indent=2))
