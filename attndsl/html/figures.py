"""What the page shows of an analysis besides its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.report import Report, Subject
from attndsl.errors import fail
from attndsl.html.masks import Mask, masks
from attndsl.html.page import Figure
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import TileGrid

if TYPE_CHECKING:
    import matplotlib.figure

LENGTHS = 7
"""Lengths at which cost is predicted, each half of the next."""
SHORTEST = 64
DRAWN = 4096
"""Longest sequence whose receptive field is drawn."""
PANELS = 4


def drawn(draw: Callable[..., matplotlib.figure.Figure], alt: str, caption: str = "") -> Figure:
    """What `draw` makes, light and dark."""
    from attndsl import pictures

    light, dark = (
        pictures.render(draw(dark=dark), "svg", transparent=True).decode() for dark in (False, True)
    )
    return Figure(light, dark, alt, caption)


def shown(subject: Subject, report: Report) -> list[Mask]:
    """The masks in tiles of the block size. Raises AttnError where tables are missing."""
    return masks(subject.block_mask, subject.sizes.q.span(0)[0])


def cost(subject: Subject, report: Report) -> Figure:
    """Predicted seconds of each backend against n, up to the length in question, or further if it is short.

    Raises AttnError where queries are not the keys' positions, or tables tie the attention to one length.
    """
    from attndsl import pictures
    from attndsl.analysis import cost as costs

    whole = subject.one_sequence
    if subject.attention.inputs:
        raise fail("its tables have one length")
    last = max(whole.length, SHORTEST << LENGTHS - 1)
    lengths = [last >> i for i in reversed(range(LENGTHS))]
    machine = costs.this_machine()
    curves: dict[str, tuple[list[int], list[float]]] = {}
    least = []
    for n in lengths:
        problem = replace(whole, length=n, q_length=n)
        sizes = lowering.sizes(subject.attention, n, n, whole.heads)
        block_mask = lowering.block_mask(subject.attention, sizes, {}, whole.block_size)
        least.append(costs.roofline(machine, costs.ideal(block_mask, problem), whole.dtype).seconds.forward)
        for name, found in costs.lowerings(subject.attention, problem, block_mask).items():
            if found.seconds_estimate is not None:
                at, seconds = curves.setdefault(name, ([], []))
                at.append(n)
                seconds.append(found.seconds_estimate)
    return drawn(
        lambda dark: pictures.cost(curves, (lengths, least), dark=dark),
        f"Predicted seconds of a forward pass against n, for {', '.join(curves)} and the ideal",
        "Predicted seconds of a forward pass on this CPU; ideal is its roofline for the live pairs.",
    )


def reach(subject: Subject, report: Report) -> Figure:
    """What is reached after 1, 2, 4, ... layers, until nothing more is.

    Raises AttnError for longer sequences than `DRAWN`, where layers cannot be stacked, and where the
    relations are beyond all limits.
    """
    from attndsl import pictures
    from attndsl.analysis.field import step_of
    from attndsl.layers.powers import Form, computed

    n = subject.one_sequence.length
    if n > DRAWN:
        raise fail(f"receptive fields are drawn up to {DRAWN:,} tokens")
    field = report.reach
    if field is None or field.undecided is not None:
        raise fail((field and field.undecided) or "the receptive field is not known")
    last = field.settled_after or 2**PANELS
    layers = sorted({min(2**i, last) for i in range(PANELS)})

    def after(form: Form) -> Mapping[int, TileGrid]:
        (step,), found, reached = form.steps, {}, form.same
        for layer in range(1, layers[-1] + 1):
            reached = form.product(step, reached)
            if layer in layers:
                rows = np.stack([form.row(reached, q) for q in range(n)]).astype(bool)
                found[layer] = tiled(rows, subject.problem.block_size)
        return found

    grids = computed(n, [step_of(subject.attention, n, subject.problem.heads, subject.inputs)], after)
    return drawn(
        lambda dark: pictures.receptive_field(grids, dark=dark),
        f"Which keys each query sees after {', '.join(map(str, layers))} layers",
    )


def tiled(mask: NDArray[np.bool_], size: int) -> TileGrid:
    """A mask that is written out, each tile with a live pair as a partial one."""
    nq, n = mask.shape
    rows, columns = -(-nq // size), -(-n // size)
    padded = np.pad(mask, ((0, rows * size - nq), (0, columns * size - n)))
    tiles = padded.reshape(rows, size, columns, size).swapaxes(1, 2)
    live = tiles.any(axis=(2, 3))
    nothing = np.zeros(0, np.int32)
    return TileGrid(
        nq,
        n,
        size,
        run_ptr=np.zeros(rows + 1, np.int32),
        run_start=nothing,
        run_end=nothing,
        part_ptr=np.concatenate([[0], live.sum(axis=1).cumsum()]).astype(np.int32),
        part_col=np.nonzero(live)[1].astype(np.int32),
        part_mask=np.arange(live.sum(), dtype=np.int32),
        masks=np.packbits(tiles[live], axis=2, bitorder="little"),
    )


DRAWINGS: Mapping[str, Callable[[Subject, Report], Any]] = {"masks": shown, "cost": cost, "reach": reach}
