"""The command show: a mask as a picture, coarse where it is large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from attndsl import pictures
from attndsl.attention import Attention
from attndsl.command import child, terminal
from attndsl.command.given import defined, first_query, heads_of, tables, write
from attndsl.command.options import SIZES, TARGET, Command, Whole
from attndsl.errors import fail
from attndsl.execution.selecting import drawn
from attndsl.expr import nodes
from attndsl.stacks.sizes import check_tables
from attndsl.stacks.tree import Stack
from attndsl.streams import listed
from attndsl.tiles import cells, lowering
from attndsl.tiles.blockmask import BlockMask, TileGrid

TILES = 1024
"""Tiles on a side of a mask to draw, about."""
DRAWN_WIDTH = 64
"""Features of the q and k that a choice is drawn of, where no table says how many."""
SUFFIXES: dict[str, Literal["term", "svg", "png"]] = {
    "": "term",
    ".txt": "term",
    ".svg": "svg",
    ".png": "png",
}
"""What a picture is, by the end of its file's name."""


@click.command(cls=Command)
@TARGET
@SIZES
@click.option("--head", type=Whole(0, 0), help="Show this head alone.")
@click.option("--format", "form", type=click.Choice(["term", "svg", "png"]),
              help="The default is what the name of the output ends in, or else term.")  # fmt: skip
@click.option("-o", "--output", help="Write to a file instead.")
def show(
    file: str,
    name: str | None,
    params: dict[str, str],
    inputs: dict[str, str],
    time_limit: float,
    head: int | None,
    form: Literal["term", "svg", "png"] | None,
    output: str | None,
    **sizes: Any,
) -> None:
    """The mask as a picture, in the terminal or in a file."""
    suffix = Path(output or "").suffix.lower()
    if form is None and suffix not in SUFFIXES:
        raise fail(f"no picture ends in {suffix}", help="give the output a name in .svg, .png or .txt")
    form = form or SUFFIXES[suffix]
    if form != "term" and output is None:
        raise fail(f"a picture in {form} does not go to the terminal", help=f"name a file: -o mask.{form}")
    if form != "term":
        pictures.demand()
    found, shown = defined(file, name, params)
    if isinstance(found, Stack):
        if head is not None:
            raise fail(f"`{found.name}` is a stack", help="`--head` is of one attention: name it instead")
        drawn = child.run(lambda stage: of_layers(stage, found, shown, tables(inputs), sizes, form))
        put(drawn, output)
        return
    attention, given = found.attention, tables(inputs)
    heads = sizes["heads"] = heads_of(attention, given, sizes["heads"])
    if head is not None and head >= heads:
        raise fail(f"no head {head:,} among {terminal.quantity(heads, 'head')}", help="more with --heads")

    def work(stage: child.Stage) -> str | bytes:
        stage("tiling", time_limit)
        here = {**chosen(attention, given, sizes), **given}
        block_mask = drawable(attention, here, **sizes)
        if head is not None:
            block_mask = of_head(block_mask, head)
        title = (
            shown
            + (", one drawn choice" if attention.selected else "")
            + ("" if head is None else f", head {head:,}")
        )
        first = first_query(attention, sizes["length"], block_mask.nq, heads)
        if form == "term":
            picture = terminal.picture(block_mask, terminal.width(), first)
            where = listed(attention.streams, sizes["length"])
            said = lowering.grouped(attention, heads)
            where += f"heads {said}, by group\n" if said else ""
            return f"{heading(title, block_mask, sizes['length'])}\n{picture}\n{where}"
        stage("drawing", None)
        return pictures.render(pictures.mask(block_mask, title, first=first), form, transparent=form == "svg")

    put(child.run(work), output)


def put(drawn: str | bytes, output: str | None) -> None:
    """To a file, or to the terminal."""
    if output is not None:
        write(output, drawn)
    elif isinstance(drawn, str):
        terminal.echo(drawn.removesuffix("\n"))


def of_layers(
    stage: child.Stage,
    stack: Stack,
    title: str,
    given: dict[str, Any],
    sizes: dict[str, Any],
    form: Literal["term", "svg", "png"],
) -> str | bytes:
    """A picture of `layers_of`."""
    found = layers_of(stage, stack, given, sizes)
    if form == "term":
        return "\n\n".join(
            f"{heading(label, mask, sizes['length'])}\n{terminal.picture(mask, terminal.width())}"
            for label, mask in found.items()
        )
    stage("drawing", None)
    return pictures.render(pictures.layers(first_masks(found), title), form, transparent=form == "svg")


def layers_of(
    stage: child.Stage, stack: Stack, given: dict[str, Any], sizes: dict[str, Any]
) -> dict[str, BlockMask]:
    """The attentions of a stack, each once under the layers that have it."""
    stage("tiling", None)
    check_tables(stack, given)
    found: dict[str, BlockMask] = {}
    for attention, label in labelled(stack).items():
        own = {table.name: given[table.name] for table in attention.inputs if table.name in given}
        of = {**sizes, "heads": heads_of(attention, own, sizes["heads"])}
        found[label] = drawable(attention, {**chosen(attention, own, of), **own}, **of)
    if not found:
        raise fail(f"`{stack.name}` has no attention to draw")
    return found


def first_masks(found: Mapping[str, BlockMask]) -> dict[str, TileGrid]:
    """Of several masks of heads the first."""
    return {label: cells.distinct(mask)[0][1] for label, mask in found.items()}


def labelled(stack: Stack) -> dict[Attention, str]:
    """Each attention of a stack under its layers: `layers 0..4, 6: local`."""
    where: dict[Attention, dict[int, str]] = {}
    for i, turn in enumerate(stack.turns):
        for sub in turn:
            if isinstance(sub.what, Attention):
                where.setdefault(sub.what, {})[i] = sub.name
    return {
        what: cells.heads(np.array([*at])).replace("head", "layer") + f": {next(iter(at.values()))}"
        for what, at in where.items()
    }


def drawable(attention: Attention, given: dict[str, Any], **sizes: Any) -> BlockMask:
    """Tiles to draw, coarse where the mask is large."""
    attention.require_pairs()
    n, nq, heads = sizes["length"], sizes["q_length"], sizes["heads"]
    block_size = sizes["block_size"] or coarse(attention, min(n, nq or n))
    return lowering.tiles_of(attention, n, block_size, nq, heads=heads, inputs=given)


def chosen(attention: Attention, given: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """A choice to draw, where keys are chosen by content."""
    if not attention.selected:
        return {}
    found = lowering.sizes_of(attention, sizes["length"], sizes["q_length"], sizes["heads"])
    by_feature = [t.name for t in attention.inputs if t.dims[-1:] == ("D",) and t.name in given]
    shapes = (np.shape(given[name]) for name in by_feature)
    width = next((shape[-1] for shape in shapes if shape), DRAWN_WIDTH)
    return drawn(attention, found, sizes["heads"], width, given)


def coarse(attention: Attention, length: int) -> int:
    """About `TILES` tiles on a side, of a short sequence eight or more.

    Tables and `random` make many different ones, which cost their area.
    """
    if length < 8 * 128:
        return max(8, 1 << (length // 8).bit_length() >> 1)
    masks = [group.relation.mask for group in attention.groups]
    if any(mask.tables or any(node.op == "random" for node in nodes(mask)) for mask in masks):
        return 128
    return 1 << min(max(7, (length // TILES // 2).bit_length()), 12)


def of_head(block_mask: BlockMask, head: int) -> BlockMask:
    return replace(block_mask, index=block_mask.index[:, [head % block_mask.index.shape[1]]])


def heading(title: str, block_mask: BlockMask, n: int) -> str:
    size = f"n = {n:,}" + (f", nq = {block_mask.nq:,}" if block_mask.nq != n else "")
    return f"{title}  {size}  {100 * block_mask.density:.3g} % live"
