"""What a forward pass does and how long that takes: the cost of the `torch` backend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup, Relation
from attndsl.backend import DTYPES, Problem, device_kind
from attndsl.execution.torch_eval import elements
from attndsl.expr import Expr
from attndsl.scores import by_head
from attndsl.tiles.blockmask import BlockMask, TileGrid
from attndsl.tiles.lowering import FEW_ROWS, head_groups, tiles_of

from .blocklists import BlockLists
from .chunks import Cut, equidistant
from .lanes import Simple, all_simple, cut_of, lanes
from .lists import listed_of, sparse
from .orders import Ordered, ordered_of, without_orders
from .parts import Gathered, Part, Strided
from .rows import pieces, reads
from .slabs import PAIRS
from .work import KEPT

SECONDS = {
    "cpu": {
        "runs": 0.000145,
        "lanes": 0.000177,
        "nodes": 3.2e-05,
        "tokens": 2.03e-09,
        "products": 3.2e-11,
        "narrow": 1.08e-11,
        "steps": 1.03e-06,
        "addends": 3.4e-10,
        "numbers": 1.7e-09,
        "copied": 7.2e-10,
        "merged": 3.49e-09,
        "listed": 2e-10,
        "blocks": 5e-05,
        "ordered": 1.3e-10,
        "scored": 6e-10,
        "few": 0.00025,
        "reads": 6e-05,
        "read": 2.9e-10,
        "sorted": 7e-10,
    }
}
"""Of two cores with AVX-512, by `python -m benchmarks.cost fit`; of lists by benchmarks/lists.py, of what is
chosen by benchmarks/selections.py."""
TRAINING = 4.0
"""Forward and backward beside forward: 5 matrix products more to 2, and wider windows."""
SAMPLED = 2**14
"""Entries of a BlockMask that are taken apart to predict what all take."""
EVERYTHING = Attention("everything", (HeadGroup(Relation(ir.TRUE), ir.var("s")),), offset=ir.ZERO)
ALL = np.ones((1, 1, 1), bool)
FUSED_K = 512
"""Keys at a time in torch's fused kernel."""


def counts(attention: Attention, problem: Problem, block_mask: BlockMask | None) -> dict[str, float]:
    """Of a large mask by a sample of its rows; without tiles every pair. Where lists take the place of tiles,
    of their entries, live or not."""
    listed = listed_of(attention)
    entries = [some.entries or problem.length for some in listed or ()]
    if entries and device_kind(problem) == "cpu" and all(sparse(r, problem.length) for r in entries):
        return _list_counts(attention, problem, entries)
    ordered = ordered_of(attention)
    if ordered and device_kind(problem) == "cpu" and problem.q_length == problem.length:
        return _order_counts(attention, problem, ordered)
    blocks = BlockLists.of(attention)
    few = problem.q_length <= FEW_ROWS
    if blocks is not None and device_kind(problem) == "cpu" and not few and blocks.sparse(problem.length):
        return _block_counts(blocks, problem)
    if block_mask is None:
        block_mask = tiles_of(EVERYTHING, problem.length, problem.block_size, problem.q_length)
    simple = all_simple(attention, problem.head_dim) if problem.device.startswith("cpu") else None
    if block_mask.rows and simple and (DTYPES[problem.dtype] >= 4 or not problem.training):
        return few_counts(attention, simple, block_mask, problem)
    total = _tile_counts(attention, block_mask, problem)
    return {**total, "runs": 1.0, "written": total["copied"] + total["addends"]}


def _tile_counts(attention: Attention, block_mask: BlockMask, problem: Problem) -> Counter[str]:
    batch = len(block_mask.index)
    alike = Counter(
        (lane.group, lane.grid, lane.heads.stop - lane.heads.start)
        for lane in lanes(attention, block_mask, batch, problem.heads, problem.kv_heads)
    )
    total = Counter(dict.fromkeys((*SECONDS["cpu"], "pairs"), 0.0))
    for (group, grid, heads), times in alike.items():
        counts = lane_counts(group, grid, heads, problem, max(256, SAMPLED // len(alike)))
        total.update({name: times * problem.batch / batch * count for name, count in counts.items()})
    return total


def _block_counts(blocks: BlockLists, problem: Problem) -> dict[str, float]:
    """As if every list were full; of what tables say beside, that it holds."""
    n, nq, width = problem.length, problem.q_length, problem.head_dim
    static = blocks.related([_without_tables(split.static) for split in blocks.splits])
    total = _tile_counts(static, tiles_of(static, n, blocks.block_size, nq, problem.heads), problem)
    total["lanes"] = problem.batch * problem.heads
    for i, heads in Counter(head_groups(static, problem.heads)).items():
        split, group = blocks.splits[i], static.groups[i]
        if split.table is None:
            continue
        if split.unit == 1:
            total.update(_entry_counts(group, heads, split.entries, problem))
            continue
        simple = Simple.of(group, width)
        count = -(-n // split.unit)
        pairs = nq * min(split.entries, count)
        calls = min(pairs, count * -(-pairs // PAIRS))
        part = Gathered(
            np.zeros(calls, np.int64),
            -(-pairs // calls),
            split.unit,
            np.zeros((calls, 1), np.int64),
            None,
            ALL,
        )
        found = _part_counts(part, cut_of(simple, 1, width, gradient=False), simple, group, 1, width)
        found |= {"blocks": calls, "merged": pairs * width}
        total.update({name: problem.batch * heads * more for name, more in found.items()})
    return {**total, "runs": 1.0, "written": total["copied"] + total["addends"]}


def _without_tables(mask: Expr) -> Expr:
    parts = mask.args if mask.op == "and" else (mask,)
    return ir.all_of(*(part for part in parts if not part.tables))


def _list_counts(attention: Attention, problem: Problem, entries: Sequence[int]) -> dict[str, float]:
    """By groups of heads, which have lists of so many entries."""
    total = Counter(dict.fromkeys((*SECONDS["cpu"], "pairs"), 0.0))
    for i, heads in Counter(head_groups(attention, problem.heads)).items():
        total.update(_entry_counts(attention.groups[i], heads, entries[i], problem))
    return {**total, "runs": 1.0, "written": total["numbers"]}


def _entry_counts(group: HeadGroup, heads: int, entries: int, problem: Problem) -> dict[str, float]:
    area = problem.batch * problem.q_length * entries
    numbers = sum(elements(e, area, heads)[0] for e in (group.score, group.decay))
    more = {"lanes": problem.batch, "pairs": heads * area, "numbers": numbers}
    return more | {"listed": heads * area * problem.head_dim}


def _order_counts(
    attention: Attention, problem: Problem, ordered: Sequence[Ordered | None]
) -> dict[str, float]:
    """Of whole pieces, whatever else the mask says; groups of heads that go by no order have tiles."""
    total = Counter(dict.fromkeys((*SECONDS["cpu"], "pairs"), 0.0))
    if None in ordered:
        others = without_orders(attention, ordered)
        groups = (replace(g, relation=Relation(_without_tables(g.relation.mask))) for g in others.groups)
        others = replace(others, groups=tuple(groups))
        n, size = problem.length, problem.block_size
        total.update(_tile_counts(others, tiles_of(others, n, size, n, problem.heads), problem))
    for i, heads in Counter(head_groups(attention, problem.heads)).items():
        one = ordered[i]
        if one is None:
            continue
        count, queries, keys = one.pieces(problem.length)
        area, heads = count * queries * keys, heads * problem.batch
        numbers, _ = elements(one.score, area, heads)
        more = {"pairs": heads * area, "ordered": heads * area * problem.head_dim, "scored": numbers}
        total.update(more | {"lanes": heads, "merged": heads * count * queries * problem.head_dim})
    return {**total, "runs": 1.0, "written": total["merged"] + total["copied"] + total["addends"]}


def few_counts(
    attention: Attention, simple: Sequence[Simple], block_mask: BlockMask, problem: Problem
) -> dict[str, float]:
    """Of the path for few query rows."""
    nq, width, size = problem.q_length, problem.head_dim, DTYPES[problem.dtype] / 4
    total = dict.fromkeys((*SECONDS["cpu"], "pairs", "nanoseconds"), 0.0)
    for piece in pieces(attention, block_mask, problem.heads, problem.kv_heads):
        heads, kv_heads = (
            len(range(*part.indices(count)))
            for part, count in ((piece.heads, problem.heads), (piece.kv_heads, problem.kv_heads))
        )
        batch, bias = problem.batch / len(block_mask.index), simple[piece.group].bias
        for keys, _ in reads(piece.rows):
            count = keys.stop - keys.start if isinstance(keys, slice) else len(keys)
            pairs, moved = batch * heads * nq * count, 2 * batch * kv_heads * count * width * size
            numbers, computed = elements(bias, batch * nq * count, heads)
            found = {"reads": 1.0, "read": moved, "pairs": pairs, "nodes": float(size_of(bias))}
            found |= dict.fromkeys(("products", "narrow"), pairs * width)
            found |= {"numbers": numbers, "nanoseconds": computed}
            for name, more in (found | {"copied": 0.0 if isinstance(keys, slice) else moved}).items():
                total[name] += more
    return {**total, "few": 1.0, "written": total["copied"]}


def sampled(grid: TileGrid, entries: int) -> tuple[TileGrid, float]:
    """Rows of tiles from the middle that hold about so many entries, and how many times all that is."""
    (rows, _), block = grid.shape, grid.block_size
    if grid.entries <= entries:
        return grid, 1.0
    count = max(1, rows * entries // grid.entries)
    first = (rows - count) // 2
    runs, parts = (p[first : first + count + 1] for p in (grid.run_ptr, grid.part_ptr))
    run, part = slice(runs[0], runs[-1]), slice(parts[0], parts[-1])
    some = replace(
        grid,
        nq=count * block,
        run_ptr=runs - runs[0],
        run_start=grid.run_start[run],
        run_end=grid.run_end[run],
        part_ptr=parts - parts[0],
        part_col=grid.part_col[part],
        part_mask=grid.part_mask[part],
    )
    return some, rows / count


def lane_counts(group: HeadGroup, grid: TileGrid, heads: int, problem: Problem, entries: int) -> Counter[str]:
    """What the forward pass of a lane of so many heads does, `entries` of the grid being looked at."""
    width = problem.head_dim
    simple = Simple.of(group, width) if problem.device.startswith("cpu") else None
    cut = cut_of(simple, heads, width, gradient=False)
    some, times = sampled(grid, entries)
    counts: Counter[str] = Counter()
    rows = 0
    for part in cut.parts(some):
        rows += len(part.rows) * part.q_len if isinstance(part, Gathered) else part.count * part.q_len
        counts.update(_part_counts(part, cut, simple, group, heads, width))
    counts["merged"] = heads * width * max(0, rows - some.nq)
    if simple is not None and simple.bias is not None and simple.by_distance:
        numbers, computed = elements(simple.bias, grid.nq + grid.n, heads)
        more = {"numbers": numbers, "nanoseconds": computed, "nodes": size_of(simple.bias)}
        counts.update({name: count / times for name, count in more.items()})
    return Counter(
        {
            "lanes": 1,
            "tokens": heads * grid.nq * width,
            **{name: times * count for name, count in counts.items()},
        }
    )


def size_of(e: Expr | None) -> int:
    """Nodes."""
    return 0 if e is None else sum(1 for _ in ir.nodes(e))


def _part_counts(
    part: Part, cut: Cut, simple: Simple | None, group: HeadGroup, heads: int, width: int
) -> dict[str, float]:
    if isinstance(part, Strided):
        count, k_len, masked, strided = part.count, part.k_len, part.mask is not None, True
        alike = simple is not None and simple.by_distance and equidistant(part)
    else:
        count, k_len, masked = len(part.rows), part.cols.shape[1] * part.block, part.contents is not None
        alike = strided = False
    calls = -(-count // cut.problems(part))
    area = float(count * part.q_len * k_len)
    moved = heads * width * count * (part.q_len + 2 * k_len)
    counts = {"calls": calls, "pairs": heads * area, "products": heads * area * width}
    if simple is None:
        made = [elements(e, area, heads) for e in (group.score, group.decay)]
        numbers, computed = (sum(column) for column in zip(*made, strict=True))
        nodes = calls * (size_of(group.score) + size_of(group.decay))
        made_here = {"numbers": numbers, "nanoseconds": computed, "nodes": nodes}
        return counts | made_here | {"formed": heads * area, "copied": moved}
    step = 256 if part.q_len >= 768 else 64 if part.q_len >= 192 else 32
    biased = area * calls / count if alike else area
    numbers, computed = (0.0, 0.0) if simple.by_distance else elements(simple.bias, biased, heads)
    addends = (area * calls / count if strided else area) if masked else 0.0
    if simple.bias is not None:
        addends = max(addends, biased) * (heads if by_head(simple.bias) else 1)
    elif addends / calls <= KEPT:
        addends = 0.0
    return counts | {
        "narrow": counts["products"] if step == 32 else 0.0,
        "steps": heads * count * -(-part.q_len // step) * -(-k_len // FUSED_K),
        "masked": heads * area if masked or simple.bias is not None else 0.0,
        "addends": addends,
        "numbers": numbers,
        "nanoseconds": computed,
        "nodes": 0.0 if simple.by_distance else calls * size_of(simple.bias),
        "copied": 0.0 if strided else moved,
    }
