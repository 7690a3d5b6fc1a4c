"""From a mask to its tiles, in time proportional to the tiles that are live.

The matrix is a tree of square boxes: each level divides a box into f x f, the level of the tiles is one of
them, and where there are many different tiles another lies below. A level holds each distinct key
(abstract.py) once, by one representative; only representatives are divided, and at the bottom only they
are evaluated point by point. Going back up, equal contents become one number, so what turns out all false
or all true is empty or full at every level. Expanding the tree from the root down then gives the tiles.

Sets of links (`k in chosen[q]`, `random`) are too scattered for that: the mask is tiled as if they were
empty, and the tiles that hold a link, found from the list of links, are tiled again with the whole mask.

A mask that asks for blocks only is constant over cells: where these are few, one position of each tells all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail
from attndsl.expr import FALSE, TRUE, Expr, Table, add, const, intable, nodes, rebuild, sub, substitute, var
from attndsl.meaning import pointwise
from attndsl.meaning.links import sample
from attndsl.tiles.abstract import (
    EMPTY,
    FULL,
    PARTIAL,
    Boxes,
    Frame,
    Leaves,
    Signatures,
    Truths,
    integer,
    pack,
    prepared,
    unique,
)
from attndsl.tiles.blockmask import TileGrid
from attndsl.tiles.linkset import ROW, contains, links_of, sorted_set, spread, stripe

Array = NDArray[Any]
Tables = Mapping[str, Array]

FANOUT = 8
FIRST_FANOUT = 32
"""The most boxes on a side that the matrix is divided into; each is divided into FANOUT x FANOUT."""
FEW_POINTS = 2**17
"""Positions that are evaluated in less time than it takes to tell equal boxes among them."""
CHUNK = 2**15
"""Boxes whose keys are computed at once, so that intermediate values stay in the cache."""
CONTENT_LIMIT = 2**22
CONTENT_BYTES = 2**31
BOX_LIMIT = 2**18
"""Different boxes of one size above the tiles; each is divided into 64."""
POINT_LIMIT = 2**30
"""Evaluations of what a product of patterns is made of."""
ENTRY_LIMIT = 2**24
"""Partial tiles and runs of one mask; writing them out takes about 60 bytes each."""
DRAWN_ROWS = 2**24
QUERY = var("q")
MEETINGS = 2**23
"""Tiles that the links of an equation meet, counted for each link; with more they are not scattered."""
COLUMN_BITS, CONTENT_BITS = 20, 22
LISTED = "where a term is no integer relation, list its values, as in `q - k in [1, 2, 4, 8]`"
"""Help where too many tiles differ."""


def tile(
    mask: Expr,
    nq: int,
    n_keys: int,
    block_size: int,
    *,
    n: int,
    query: Expr = QUERY,
    tables: Tables | None = None,
) -> TileGrid:
    """The tiles of a truth over `q` and `k`, the numbers of row and column; `query` is the position of one.

    Every other variable has been replaced by a constant. `tables` maps a name to its explicit axes.
    Raises AttnError where an int table is read out of its range, and where the mask has more tiles or more
    different ones than the limits allow. Unlike pointwise evaluation it does not look at a table in boxes
    that the rest of the mask decides: `causal | doc[k] == 3` never reads `doc` left of the diagonal.
    """
    if block_size % 8 or block_size < 8:
        raise fail(f"block_size {block_size} is not a positive multiple of 8")
    if max(nq, n_keys) > block_size << COLUMN_BITS:
        raise fail(f"{max(nq, n_keys)} positions are more than {1 << COLUMN_BITS} tiles of {block_size}")
    frame = Frame(nq, n_keys)
    if nq == 0 or n_keys == 0:
        nothing = np.zeros((2, 0), np.int64)
        return grid_of(frame, block_size, nothing, nothing, packed(0, block_size))
    defined = not pointwise.partial(mask)
    mask, tables = draw(mask, frame, query, tables or {})
    depth = searches(mask)
    points = nq * n_keys * n**depth
    if depth and points > POINT_LIMIT:
        raise fail(
            f"a product of patterns that is not an integer relation is searched pair by pair: "
            f"{points:,} steps at n = {n}, and the limit is {POINT_LIMIT:,}"
        )
    side = cell_size(mask, frame, block_size)
    if defined and side > 1 and not depth and points <= FEW_POINTS * side**2:
        return grid_of(frame, block_size, *tiles_of_cells(mask, frame, tables, side, block_size))
    links = {
        node: found
        for node in nodes(mask)
        if (found := links_of(node, frame, tables)) is not None
        and (node.op == "intable" or found.meetings(block_size) <= MEETINGS)
    }
    quiet = replaced(mask, dict.fromkeys(links, FALSE))
    parts, runs, masks = tiles_of(Evaluator(quiet, frame, tables), max(nq, n_keys), block_size)
    present = [leaf for leaf in links.values() if leaf.pairs.size]
    if present:
        at = sorted_set(np.concatenate([leaf.boxes(block_size) for leaf in present]))
        q, k = at // ROW * block_size, at % ROW * block_size
        live = {node: leaf if leaf.pairs.size else nowhere for node, leaf in links.items()}
        source = Evaluator(mask, frame, tables, live)
        numbers, _, more = descend(source, q[:, None, None], k[:, None, None], block_size, block_size)
        parts, runs = overlay(parts, runs, at, numbers.ravel(), len(masks))
        masks = np.concatenate([masks, more])
        used, content = unique(parts[1])
        masks, numbers = distinct(masks[parts[1][used]])
        parts = np.stack([parts[0], numbers[content + 2] - 2])
    return grid_of(frame, block_size, parts, runs, masks)


def cell_size(mask: Expr, frame: Frame, block_size: int) -> int:
    """A divisor of the size of a tile and of the matrix: cells of that size, side by side from the first
    position on, are each all live or all not."""
    sides = [block_size, frame.q, frame.k]
    open_, seen = [mask], {mask}
    while open_:
        node = open_.pop()
        found = stripe(node)
        if found is not None:
            sides += [found.width, found.shift]
            if found.width == 1:
                break
        else:
            open_ += [arg for arg in node.args if arg not in seen]
            seen.update(node.args)
    return math.gcd(*sides)


def tiles_of_cells(
    mask: Expr, frame: Frame, tables: Tables, side: int, block_size: int
) -> tuple[Array, Array, Array]:
    """As `tiles_of`, where one position of each cell is evaluated."""
    f = block_size // side
    (q, inside_q), (k, inside_k) = (first_of_cells(end, side, block_size) for end in (frame.q, frame.k))
    live = pointwise.evaluate(mask, q[:, None, :, None], k[None, :, None, :], tables)
    live = live & inside_q[:, None, :, None] & inside_k[None, :, None, :]
    high, wide = live.shape[2:]
    cells = live.reshape(f * f, high * wide)
    full = cells.all(axis=0)
    partial = np.flatnonzero(cells.any(axis=0) & ~full)
    contents, numbers = distinct(cells[:, partial].T.reshape(-1, f, f) * np.uint8(255))
    codes = full.astype(np.int32).reshape(1, high, wide)
    codes.flat[partial] = numbers[2:]
    parts, runs = expand([codes], 1)
    rows = np.packbits(contents.repeat(side, axis=2), axis=2, bitorder="little")
    return parts, runs, rows.repeat(side, axis=1)


def first_of_cells(end: int, side: int, block_size: int) -> tuple[Array, Array]:
    """The first position of cell i of tile t at [i, t], and whether it lies inside."""
    at = np.arange(0, block_size, side)[:, None] + np.arange(0, end, block_size)
    return np.minimum(at, end - 1), at < end


def searches(mask: Expr) -> int:
    """How deep products, and draws among the keys of another pattern, stand in one another."""
    depth: dict[Expr, int] = {}
    for node in nodes(mask):
        within = max((depth[arg] for arg in node.args), default=0)
        depth[node] = within + (node.op == "exists" or (node.op == "random" and within > 0))
    return depth[mask]


def tiles_of(source: Evaluator, extent: int, block_size: int) -> tuple[Array, Array, Array]:
    """Partial tiles, runs of full tiles, and contents, by one descent from the whole matrix."""
    levels, masks, width = tree_of(source, extent, block_size)
    limit(entries(levels, len(masks)), ENTRY_LIMIT, "tiles and runs of tiles")
    return *expand(levels, width), masks


def tree_of(source: Evaluator, extent: int, block_size: int) -> tuple[list[Array], Array, int]:
    """The distinct contents of each size, the first level being the one of the whole matrix, those of the
    tiles, and how many tiles wide the boxes of the first level are."""
    width = 1
    while width * block_size * FIRST_FANOUT < extent:
        width *= FANOUT
    size = width * block_size
    origin = np.array([0])
    top = divided(origin, origin, -(-extent // size), size)
    root, levels, masks = descend(source, *top, size, block_size)
    return [root, *levels], masks, width


def live_pairs(mask: Expr, n: int, block_size: int = 128) -> int:
    """The live pairs of a closed mask without tables, of n queries and n keys.

    Different boxes are counted, tiles are not written out, unless keys are drawn or products searched.
    """
    if n == 0 or any(node.op in ("random", "intable", "exists") for node in nodes(mask)):
        return tile(mask, n, n, block_size, n=n).nnz
    levels, masks, _ = tree_of(Evaluator(mask, Frame(n, n), {}), n, block_size)
    count, area = np.bitwise_count(masks).sum(axis=(1, 2), dtype=np.int64), block_size**2
    for children in reversed(levels):
        count = np.concatenate([[0, area], count])[children].sum(axis=(1, 2))
        area *= FANOUT**2
    return int(count[0])


def replaced(mask: Expr, done: dict[Expr, Expr]) -> Expr:
    """The mask with nodes replaced by others."""
    for node in nodes(mask):
        if node not in done:
            done[node] = rebuild(node, tuple(done[arg] for arg in node.args))
    return done[mask]


def nowhere(boxes: Boxes) -> Truths:
    return Truths(np.int8(EMPTY), ())


def draw(mask: Expr, frame: Frame, query: Expr, tables: Tables) -> tuple[Expr, Tables]:
    """`random` as look-ups in tables of the keys drawn, where n and the seed are constants."""
    done: dict[Expr, Expr] = {}
    drawn = dict(tables)
    searched = {node.value: node.args[1] for node in nodes(mask) if node.op == "exists"}
    for node in nodes(mask):
        if node.op != "random" or node.args[2].op != "const" or node.args[3].op != "const":
            continue
        r, row, col = cast(tuple[int, str, str], node.value)
        n, seed = integer(node.args[2]), integer(node.args[3])
        wide = widened(frame, [searched.get(name) for name in node.args[0].free - {"q", "k"}])
        bounds = Signatures(node.args[0], wide, tables, {}).bounds() if wide is not None else None
        if bounds is None or bounds[1] - bounds[0] >= DRAWN_ROWS:
            continue
        first, last = bounds
        rows = np.arange(first, last + 1)
        of = substitute(node.args[4], {row: var("q"), col: var("k")})
        counts = np.full(len(rows), n)
        if of is not TRUE:
            by_row = any(isinstance(x.value, Table) and "q" in x.free for x in nodes(of))
            if by_row and node.args[0] is query and not 0 <= first <= last < n:
                continue
            # other rows outside are guarded where the draw is looked up, so that tables need not hold them
            inside = np.flatnonzero((0 <= rows) & (rows < n)) if by_row else np.arange(len(rows))
            start = int(rows[inside[0]]) if len(inside) else 0
            counts = np.zeros(len(rows), np.int64)
            counts[inside], select = eligible(of, start, len(inside), n, tables)
        keys = sample(np.full(len(rows), seed), rows, counts, r)
        if of is not TRUE:
            at, slot = np.nonzero(keys >= 0)
            keys[at, slot] = select(at + first - start, keys[at, slot])
        keys[keys < 0] = np.iinfo(np.int64).min
        table = Table(f"random {len(drawn)}", "int", keys.shape)
        drawn[table.name] = keys
        done[node] = intable(node.args[1], table, sub(node.args[0], const(first)))
    return (replaced(mask, done), drawn) if done else (mask, tables)


def eligible(
    of: Expr, start: int, count: int, n: int, tables: Tables
) -> tuple[Array, Callable[[Array, Array], Array]]:
    """How many of n keys hold in each of `count` rows, and the key of a rank (from 0) in a row.

    Few pairs are evaluated one by one: tiling has its price.
    """
    searched = any(node.op in ("random", "exists") for node in nodes(of))
    if not 0 < count * n <= FEW_POINTS or searched or pointwise.partial(of):
        grid = tile(substitute(of, {"q": add(var("q"), const(start))}), count, n, 128, n=n, tables=tables)
        return grid.row_counts(), grid.select
    live = pointwise.evaluate(of, start + np.arange(count)[:, None], np.arange(n)[None, :], tables)
    counts = live.sum(axis=1)
    first, at = np.cumsum(counts) - counts, np.flatnonzero(live)
    return counts, lambda row, rank: at[first[row] + rank] % n


def widened(frame: Frame, ends: list[Expr | None]) -> Frame | None:
    """The frame with keys for the values of bound variables, which count from 0 to below `ends`; None
    where an end is not known."""
    if not all(end is not None and end.op == "const" for end in ends):
        return None
    return Frame(frame.q, max(frame.k, *(integer(end) for end in ends if end is not None))) if ends else frame


class Evaluator:
    """A mask, evaluated over boxes and over points."""

    def __init__(self, mask: Expr, frame: Frame, tables: Tables, leaves: Leaves | None = None) -> None:
        self.mask, self.frame, self.tables = mask, frame, tables
        self.signatures = Signatures(prepared(mask), frame, tables, leaves or {})

    def over(self, q: Array, k: Array, size: int) -> tuple[Array, list[Array]]:
        """Status int8 [U, f, f] of the boxes at q [U, f, 1], k [U, 1, f]; key columns of the partial ones."""
        parts = []
        step = max(1, CHUNK // q.shape[1] ** 2)
        for start in range(0, max(len(q), 1), step):
            cut = slice(start, start + step)
            parts.append(self.signatures(q[cut], k[cut], size))
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(key for _, key in parts), strict=True)
        return np.concatenate([status for status, _ in parts]), [np.concatenate(c) for c in columns]

    def at(self, q: Array, k: Array, size: int) -> Array:
        """Packed contents uint8 [boxes, size, size / 8], false outside the matrix."""
        result = np.empty((len(q), size, size // 8), np.uint8)
        step = max(1, CHUNK // size**2)
        offsets = np.arange(size)
        for start in range(0, len(q), step):
            rows = (q[start : start + step, None] + offsets)[:, :, None]
            cols = (k[start : start + step, None] + offsets)[:, None, :]
            inside = (rows < self.frame.q) & (cols < self.frame.k)
            rows, cols = np.minimum(rows, self.frame.q - 1), np.minimum(cols, self.frame.k - 1)
            live = pointwise.evaluate(self.mask, rows, cols, self.tables) & inside
            result[start : start + step] = np.packbits(live, axis=2, bitorder="little")
        return result


def descend(
    source: Evaluator, q: Array, k: Array, size: int, block_size: int
) -> tuple[Array, list[Array], Array]:
    """The contents of the boxes of `size` at q [U, f, 1], k [U, 1, f], by number: 0 empty, 1 full,
    v + 2 is content v.

    Gives the numbers int32 [U, f, f]; for each smaller size down to the tiles the distinct contents of the
    boxes divided, int32 [V, f, f] in numbers of that size; and the tile contents uint8 [V, B, B / 8].
    """
    top, q, k = interned(source, q, k, size)
    down = list[Array]()
    while size > block_size:
        limit(len(q), BOX_LIMIT, f"different partial boxes of {size} x {size}", LISTED)
        size //= FANOUT
        codes, q, k = interned(source, *divided(q, k, FANOUT, size), size)
        down.append(codes)
    limit(
        len(q),
        min(CONTENT_LIMIT, CONTENT_BYTES * 8 // block_size**2),
        f"different partial tiles of {size} x {size}",
        LISTED,
    )
    masks, numbers = distinct(tile_contents(source, q, k, block_size))
    levels = []
    for codes in reversed(down):
        children, numbers = distinct(numbers[codes])
        levels.append(children)
    return numbers[top], levels[::-1], masks


def divided(q: Array, k: Array, f: int, size: int) -> tuple[Array, Array]:
    """Positions of the f x f parts of each box: [U, f, 1] and [U, 1, f]."""
    offsets = np.arange(f) * size
    return (q[:, None] + offsets)[:, :, None], (k[:, None] + offsets)[:, None, :]


def interned(source: Evaluator, q: Array, k: Array, size: int) -> tuple[Array, Array, Array]:
    """A code for each box (0 empty, 1 full, 2 + number of its key) and one representative per key."""
    status, key = source.over(q, k, size)
    codes = (status == FULL).astype(np.int32)
    partial = nonzero(status == PARTIAL)
    first, number = unique(pack(key, len(partial[0])))
    codes[partial] = number + 2
    return codes, *(np.broadcast_to(x, status.shape)[tuple(p[first] for p in partial)] for x in (q, k))


def tile_contents(source: Evaluator, q: Array, k: Array, block_size: int) -> Array:
    """Packed contents of the tiles at (q, k), put together from smaller boxes of whole bytes.

    Few are evaluated whole, unless their number would then decide whether a look-up is in its range.
    """
    if len(q) * block_size**2 <= FEW_POINTS and not pointwise.partial(source.mask):
        return source.at(q, k, block_size)
    size = block_size // 4 if block_size % 32 == 0 else 8
    f = block_size // size
    result = packed(len(q), block_size)
    for start in range(0, len(q), CHUNK // 4):
        part = slice(start, start + CHUNK // 4)
        codes, child_q, child_k = interned(source, *divided(q[part], k[part], f, size), size)
        pieces = np.concatenate([packed(2, size), source.at(child_q, child_k, size)])
        pieces[1] = 255
        result[part] = pieces[codes].transpose(0, 1, 3, 2, 4).reshape(-1, block_size, block_size // 8)
    return result


def packed(count: int, size: int) -> Array:
    return np.zeros((count, size, size // 8), np.uint8)


def nonzero(truths: Array) -> tuple[Array, ...]:
    """As np.nonzero, which takes three times as long where there is more than one axis."""
    return np.unravel_index(np.flatnonzero(truths), truths.shape)


def limit(count: int, most: int, what: str, help: str = "") -> None:
    if count > most:
        raise fail(f"the mask has {count:,} {what}; the limit is {most:,}", help=help)


def distinct(contents: Array) -> tuple[Array, Array]:
    """Distinct partial contents, and numbers for what codes 0, 1, 2 + index mean: empty, full, content.

    Packed bits are full at 255, numbers at 1.
    """
    flat = contents.reshape(len(contents), contents.shape[1] * contents.shape[2])
    full = 255 if flat.dtype == np.uint8 else 1
    is_empty, is_full = ~flat.any(1), (flat == full).all(1)
    numbers = np.zeros(len(flat) + 2, np.int32)
    numbers[1] = 1
    numbers[2:][is_full] = 1
    partial = np.flatnonzero(~is_empty & ~is_full)
    rows = np.ascontiguousarray(flat[partial])
    words = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]
    _, first, index = np.unique(words, return_index=True, return_inverse=True)
    numbers[2:][partial] = index + 2
    return contents[partial[first]], numbers


def entries(levels: list[Array], contents: int) -> int:
    """How many partial tiles and runs `expand` would give, at most."""
    count, height = np.ones(contents, np.int64), 1
    for children in reversed(levels):
        below = np.concatenate([[0, 0], count])[children].sum(axis=(1, 2))
        runs = np.bincount(full_runs(children)[0], minlength=len(children))
        count, height = below + runs * height, height * FANOUT
    return int(count[0])


def expand(levels: list[Array], width: int) -> tuple[Array, Array]:
    """Partial tiles (position, content) and runs of full tiles (first position, one past its last).

    The first level has one content, of boxes `width` tiles wide.
    """
    # where it begins is 0 whatever its fanout
    at = what = np.zeros(1, np.int64)
    runs = list[Array]()
    for children in levels:
        owner, row, start, end = full_runs(children)
        count = np.bincount(owner, minlength=len(children))
        box, item = spread(count[what])
        item += (np.cumsum(count) - count)[what][box]
        first = (at[box] * FANOUT + row[item] * ROW + start[item]) * width
        length = (end - start)[item] * width
        first = first + np.arange(width)[:, None] * ROW
        runs.append(np.stack([first, first + length]).reshape(2, -1))
        owner, row, col = nonzero(children > 1)
        count = np.bincount(owner, minlength=len(children))
        box, item = spread(count[what])
        item += (np.cumsum(count) - count)[what][box]
        at = at[box] * FANOUT + (row * ROW + col)[item]
        what = children[owner, row, col][item] - 2
        width //= FANOUT
    return np.stack([at, what]), np.concatenate(runs, axis=1)


def full_runs(children: Array) -> tuple[Array, Array, Array, Array]:
    """Maximal runs of full children along each row: content, row, first column, one past the last."""
    full = children == 1
    edges = np.zeros((*full.shape[:2], full.shape[2] + 1), np.int8)
    edges[:, :, :-1] += full
    edges[:, :, 1:] -= full
    owner, row, start = nonzero(edges == 1)
    return owner, row, start, nonzero(edges == -1)[2]


def overlay(parts: Array, runs: Array, at: Array, numbers: Array, offset: int) -> tuple[Array, Array]:
    """The tiles `at` (sorted positions) replaced by contents `numbers`, which count from `offset`."""
    kept = parts[:, ~contains(at, parts[0])]
    partial = numbers > 1
    parts = np.concatenate([kept, np.stack([at[partial], numbers[partial] - 2 + offset])], axis=1)
    starts, ends = np.sort(runs, axis=1, kind="stable")
    inside = np.searchsorted(starts, at, side="right") > np.searchsorted(ends, at, side="right")
    cut, new = at[inside & (numbers != 1)], at[~inside & (numbers == 1)]
    # sorted, the k-th start belongs to the k-th end; a tile cut from a run ends it and starts another
    pieces = np.stack([np.sort(np.concatenate([starts, cut + 1])), np.sort(np.concatenate([ends, cut]))])
    pieces = pieces[:, pieces[0] < pieces[1]]
    return parts, np.concatenate([pieces, np.stack([new, new + 1])], axis=1)


def grid_of(frame: Frame, block_size: int, parts: Array, runs: Array, masks: Array) -> TileGrid:
    """Sorted arrays of a TileGrid from tiles and runs in any order; adjacent runs become one.

    The order is nearly the right one already, from which a merge sort profits ten times.
    """
    rows = -(-frame.q // block_size)
    starts, ends = np.sort(runs, axis=1, kind="stable")
    apart = starts[1:] != ends[:-1]
    starts = starts[np.concatenate([np.ones(len(starts[:1]), bool), apart])]
    ends = ends[np.concatenate([apart, np.ones(len(ends[:1]), bool)])]
    entries = (parts[0] // ROW << COLUMN_BITS | parts[0] % ROW) << CONTENT_BITS | parts[1]
    entries.sort(kind="stable")
    what, at = entries & (1 << CONTENT_BITS) - 1, entries >> CONTENT_BITS
    col = at & (1 << COLUMN_BITS) - 1
    bounds = np.arange(rows + 1)
    return TileGrid(
        frame.q, frame.k, block_size,
        np.searchsorted(starts, bounds * ROW).astype(np.int32),
        (starts % ROW).astype(np.int32),
        (ends - starts // ROW * ROW).astype(np.int32),
        np.searchsorted(at, bounds << COLUMN_BITS).astype(np.int32),
        col.astype(np.int32),
        what.astype(np.int32),
        masks,
    )  # fmt: skip
