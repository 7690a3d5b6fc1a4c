"""graph: an edge leads from a key to each query that sees it, as information flows.

Its nodes are positions, or blocks of them. A position that sees itself has an edge to itself. Several heads
are one graph: an edge is there if some head has the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.decode import reads_ahead
from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line
from attndsl.analysis.units import percent
from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.layers.reach import packed, times
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import TileGrid, tile_codes
from attndsl.tiles.queries import column_counts
from attndsl.tiles.tiling import tile

if TYPE_CHECKING:
    import networkx as nx
    from numpy.typing import ArrayLike

Array = NDArray[Any]
Bits = NDArray[np.bool_]
Level = Literal["token", "block"]

TOKENS = 8192
"""Longest sequence whose graph has a node for each token: 64 MB as truths."""
BLOCKS = 2048
"""Most blocks of a graph."""
EDGES = 2**23
"""Most edges handed to networkx, which takes about 300 bytes for each."""
TOKEN_TILE = 64
BINS = 16
"""Most bars of a histogram."""
LONG, FEW = 32, 32
"""Paths longer than that, with no more edges per node than that, are searched from each node in turn."""
SOURCES = 256
"""Nodes whose paths are searched at once."""
DENSE = 1024
"""Nodes up to which the eigenvalue is computed from the whole matrix."""
ACCURACY, FINEST = 1e-5, 1e-13
"""Error of the eigenvalue of more nodes: relative to a bound of the gap, and of rounding."""


def default_block_size(length: int) -> int:
    """A power of two, 128 or more, that makes at most 1024 blocks."""
    return max(128, 1 << (-(-length // 1024) - 1).bit_length())


def level_of(length: int) -> Level:
    """By token up to TOKENS."""
    return "token" if length <= TOKENS else "block"


def tiles_of(
    attention: Attention,
    length: int,
    by: Level,
    block_size: int | None,
    heads: int,
    head: int | None,
    inputs: Mapping[str, ArrayLike],
) -> TileGrid:
    """The pairs of one head, or of any; tiles of a size of its own choice by token.

    Raises AttnError for more nodes than the level's limit, for batched tables of several rows, where query
    row 0 is not position 0, and where there are no weights of pairs.
    """
    attention.require_pairs()
    n = lowering.checked_length("length", length)
    if by not in ("token", "block"):
        raise fail(f"the nodes of a graph are by `token` or by `block`, not by {by!r}")
    if by == "token" and n > TOKENS:
        raise fail(
            f"a graph of {n:,} tokens exceeds the limit of {TOKENS:,} nodes",
            help='by="block" makes a node of each block of tokens',
        )
    if by == "token":
        block_size = TOKEN_TILE
    elif block_size is None:
        block_size = default_block_size(n)
    lowering.checked_block_size(block_size)
    if -(-n // block_size) > BLOCKS:
        raise fail(
            f"a graph of {-(-n // block_size):,} blocks exceeds the limit of {BLOCKS:,} nodes",
            help=f"block_size = {1 << (-(-n // BLOCKS) - 1).bit_length()} fits",
        )
    if lowering.checked_length("heads", heads) == 0:
        raise fail("a graph needs at least one head")
    if head is not None and lowering.checked_length("head", head) >= heads:
        raise fail(f"there is no head {head}: `heads` is {heads}")
    attention = attention.over_tokens
    sizes = lowering.sizes(attention, n, n, heads)
    if sizes.q.starts != (0,):
        raise fail(
            f"the queries of `{attention.name}` start at {sizes.q.span(0)[0]}: they are no keys' nodes"
        )
    tables = lowering.checked_tables(attention, inputs, sizes)
    rows = max((len(tables[t.name]) for t in lowering.mask_tables(attention) if t.batched), default=1)
    if rows > 1:
        raise fail(f"a graph is of one batch row, and the tables hold {rows}", help="pass one row of them")
    which = range(heads) if head is None else (head,)
    return tile(lowering.any_of_heads(attention, sizes, tables, which), n, n, block_size, n=n, tables=tables)


def unpacked(contents: Array) -> Bits:
    """Bits as truths, [U, B, B]."""
    return np.unpackbits(contents, axis=2, bitorder="little").astype(bool)


def pair_counts(grid: TileGrid) -> Array:
    """Live pairs of each tile, int64 [R, R]."""
    held = np.r_[0, grid.block_size**2, grid.live.sum(axis=1)].astype(np.int64)
    counts: Array = held[tile_codes(grid, 0)]
    return counts


def sizes_of(grid: TileGrid) -> Array:
    """Tokens in each block, int64 [R]."""
    return np.diff(np.minimum(np.arange(grid.shape[0] + 1) * grid.block_size, grid.n))


def selves(grid: TileGrid) -> Bits:
    """Which positions see themselves, [n]."""
    found = np.zeros((grid.shape[0], grid.block_size), bool)
    found[tile_codes(grid, 0).diagonal() == 1] = True
    at = grid.part_col == grid.part_row
    used, place = np.unique(grid.part_mask[at], return_inverse=True)
    found[grid.part_row[at]] = unpacked(grid.masks[used]).diagonal(axis1=1, axis2=2)[place]
    return found.ravel()[: grid.n]


def graph(grid: TileGrid, by: Level, name: str = "") -> nx.DiGraph:
    """For networkx. Nodes are numbered from 0; edges lead from key to query.

    By block, a node has its `first` and `last` token, an edge its number of live `pairs` and whether it is
    `full`, with every pair live. Raises AttnError for more than EDGES edges.
    """
    import networkx as nx

    counts = pair_counts(grid)
    edges = int(counts.sum() if by == "token" else np.count_nonzero(counts))
    if edges > EDGES:
        raise fail(
            f"a graph of {edges:,} edges exceeds the limit of {EDGES:,}",
            help='by="block" makes a node of each block of tokens',
        )
    made = nx.DiGraph(name=name, length=grid.n, by=by)
    if by == "token":
        made.add_nodes_from(range(grid.n))
        q, k = np.nonzero(grid.to_dense())
        made.add_edges_from(zip(k.tolist(), q.tolist(), strict=True))
        return made
    made.graph["block_size"] = grid.block_size
    sizes = sizes_of(grid)
    last = np.cumsum(sizes) - 1
    for i, (size, end) in enumerate(zip(sizes.tolist(), last.tolist(), strict=True)):
        made.add_node(i, first=end - size + 1, last=end)
    q, k = np.nonzero(counts)
    live = counts[q, k]
    full = live == sizes[q] * sizes[k]
    made.add_edges_from(
        (source, target, {"pairs": p, "full": f})
        for source, target, p, f in zip(k.tolist(), q.tolist(), live.tolist(), full.tolist(), strict=True)
    )
    return made


@dataclass(frozen=True)
class Degrees:
    """Numbers of edges at a node; `histogram`: (least, greatest degree, nodes) of each bar with nodes."""

    min: int
    max: int
    mean: float
    histogram: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class GraphMeasures:
    """What a graph tells about a pattern. A distance is the length of a shortest path from a node to another.

    By block, `diameter` to `largest_component` are those of the blocks. A path of tokens is one of blocks
    too: so blocks are no further apart than their tokens, and no fewer of them are joined. The other claims
    are about the tokens at both levels, and exact but for `spectral_gap`.

    by, block_size   `block_size` is None by token
    nodes, edges     of the graph, edges from a node to itself included
    in_degree        keys that a query sees, itself included
    out_degree       queries that see a key
    causal           no query sees a later key
    hubs             positions that see every other one and are seen by every other one
    star             some position is a hub and all others see themselves: the graph contains the star graph,
                     which makes a sparse encoder a universal approximator (Zaheer et al., "Big Bird",
                     NeurIPS 2020, definition 2 and theorem 1)
    two_hop          every position, or every earlier one where `causal`, reaches every other in at most two
                     steps; None where the blocks leave it open
    diameter         greatest distance among the nodes that are joined, 0 where none are; all are joined, and
                     it is the diameter in the usual sense, where `components` is 1
    average_shortest_path  mean distance over the ordered pairs of different nodes that are joined, or None
    joined           share of the ordered pairs of different nodes that are joined, or None
    components       strongly connected components
    largest_component  nodes of the largest one
    spectral_gap     second smallest eigenvalue of I - D^(-1/2) W D^(-1/2), W = A + A^T, D its row sums: the
                     normalised Laplacian (Chung, Spectral Graph Theory, 1997, section 1.2) of the graph of
                     tokens without directions; 0 where that is not connected, None for fewer than two
                     tokens. By block it is an upper bound, close where neighbours see alike: `smooth_walk`.
                     Random walks mix in O(log n / gap) steps, Big Bird's reason for random links (section 2)
    """

    by: Level
    block_size: int | None
    nodes: int
    edges: int
    in_degree: Degrees
    out_degree: Degrees
    causal: bool
    hubs: int
    star: bool
    two_hop: bool | None
    diameter: int
    average_shortest_path: float | None
    joined: float | None
    components: int
    largest_component: int
    spectral_gap: float | None


def measures(
    attention: Attention,
    length: int,
    by: Level | None = None,
    *,
    block_size: int | None = None,
    heads: int = 1,
    head: int | None = None,
    **inputs: ArrayLike,
) -> GraphMeasures:
    """The measures of `attention.graph` with the same arguments; unless told, by token up to TOKENS.

    Raises AttnError as `tiles_of` does.
    """
    level = by or level_of(lowering.checked_length("length", length))
    return measured(tiles_of(attention, length, level, block_size, heads, head, inputs), level)


def measured(grid: TileGrid, by: Level) -> GraphMeasures:
    sees = grid.to_dense() if by == "token" else tile_codes(grid, 0) > 0
    nodes = len(sees)
    steps, joined = distances(sees)
    others = nodes * (nodes - 1)
    reached = int(steps.sum())
    sizes = component_sizes(joined)
    seen, seers, itself = grid.row_counts(), column_counts(grid), selves(grid)
    hub = (seen - itself == grid.n - 1) & (seers - itself == grid.n - 1)
    alone = np.flatnonzero(~itself)
    star = bool(hub.any()) and (len(alone) == 0 or (len(alone) == 1 and bool(hub[alone[0]])))
    causal = not reads_ahead(grid)
    two_hop: bool | None = int(steps[:3].sum()) == (others // 2 if causal else others)
    if by == "block" and two_hop:
        due = grid.n * (grid.n - 1) // (2 if causal else 1)
        two_hop = True if hub.any() or int(seen.sum() - itself.sum()) == due else None
    return GraphMeasures(
        by=by,
        block_size=grid.block_size if by == "block" else None,
        nodes=nodes,
        edges=int(sees.sum()),
        in_degree=_degrees(seen),
        out_degree=_degrees(seers),
        causal=causal,
        hubs=int(hub.sum()),
        star=star,
        two_hop=two_hop,
        diameter=len(steps) - 1,
        average_shortest_path=float(steps @ np.arange(len(steps)) / reached) if reached else None,
        joined=reached / others if others else None,
        components=len(sizes),
        largest_component=max(sizes, default=0),
        spectral_gap=spectral_gap(grid, by, seen + seers, connected(joined)),
    )


def _degrees(degrees: Array) -> Degrees:
    if not len(degrees):
        return Degrees(0, 0, 0.0, ())
    low, high = int(degrees.min()), int(degrees.max())
    width = -(-(high - low + 1) // BINS)
    bars = np.bincount((degrees - low) // width)
    starts = low + width * np.flatnonzero(bars)
    histogram = tuple(
        (start, min(start + width - 1, high), count)
        for start, count in zip(starts.tolist(), bars[bars > 0].tolist(), strict=True)
    )
    return Degrees(low, high, float(degrees.mean()), histogram)


def distances(sees: Bits) -> tuple[Array, Bits]:
    """How many ordered pairs of different nodes are at distance 0, 1, 2, ..., and which node q is reached by
    which node k, itself included. `sees` [m, m]: q sees k.

    last(2) of 3 nodes: 1 sees 0 and 2 sees 1, at distance 1, and 2 sees 0 through 1: [0, 2, 1]
    All nodes take a step at once, by a product of matrices, until nothing is added.
    """
    m = len(sees)
    few = np.count_nonzero(sees) <= FEW * m
    loops = np.eye(m, dtype=bool)
    step, reached = times(packed(sees | loops)), packed(loops)
    totals = [m]
    while True:
        reached = step(reached)
        total = int(np.bitwise_count(reached).sum(dtype=np.int64))
        if total == totals[-1]:
            break
        totals.append(total)
        if few and len(totals) > LONG:
            return _searched(sees)
    joined = np.unpackbits(reached.view(np.uint8), axis=1, count=m, bitorder="little").astype(bool)
    return np.diff(totals, prepend=m), joined


def _searched(sees: Bits) -> tuple[Array, Bits]:
    """`distances` by breadth-first search from each node, whose cost does not grow with the distances."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import shortest_path

    m = len(sees)
    edges = csr_array(sees)
    joined = np.empty((m, m), bool)
    steps = np.zeros(1, np.int64)
    for start in range(0, m, SOURCES):
        rows = np.arange(start, min(start + SOURCES, m))
        found = shortest_path(edges, method="D", unweighted=True, indices=rows)
        joined[rows] = np.isfinite(found)
        here = np.bincount(found[joined[rows]].astype(np.int64))
        steps = np.pad(steps, (0, max(len(here) - len(steps), 0)))
        steps[: len(here)] += here
    steps[0] = 0
    return steps, joined


def component_sizes(joined: Bits) -> list[int]:
    """Nodes in each strongly connected component, from which node is reached by which."""
    if not len(joined):
        return []
    first = (joined & joined.T).argmax(axis=1)
    return [int(size) for size in np.unique(first, return_counts=True)[1]]


def connected(joined: Bits) -> bool:
    """Whether all nodes are joined if directions are ignored."""
    if not len(joined):
        return True
    either = joined | joined.T
    found = either[0]
    while (more := either[found].any(axis=0)).sum() > found.sum():
        found = more
    return bool(found.all())


def spectral_gap(grid: TileGrid, by: Level, degrees: Array, connected: bool) -> float | None:
    """GraphMeasures.spectral_gap; `degrees` of the tokens and `connected` if directions are ignored."""
    if grid.n < 2:
        return None
    if not connected or not degrees.all():
        return 0.0
    if by == "token" and grid.n <= DENSE:
        sees = grid.to_dense().astype(float)
        scale = degrees**-0.5
        return gap(np.linalg.eigvalsh(scale[:, None] * (sees + sees.T) * scale))
    walk, function = smooth_walk(grid, degrees)
    if by == "block":
        return gap(np.linalg.eigvalsh(walk))
    values, vectors = np.linalg.eigh(walk)
    return _searched_gap(grid, degrees, gap(values), function(vectors[:, -2]))


def gap(values: Array) -> float:
    """From the rising eigenvalues of the walk D^(-1/2) W D^(-1/2); rounding may leave the second above 1."""
    return max(0.0, 1 - float(values[-2]))


def smooth_walk(grid: TileGrid, degrees: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The walk among the vectors x for which D^(-1/2) x is, in each block, a linear function of the position:
    its matrix in an orthonormal basis of them, and how coefficients become x.

    Its second largest eigenvalue is at most that among all vectors (Courant and Fischer), which gives the
    upper bound of the spectral gap.
    """
    blocks, size = grid.shape[0], grid.block_size
    place = np.linspace(-1, 1, size)
    here = np.pad(degrees.astype(float), (0, blocks * size - grid.n)).reshape(blocks, -1)
    mass = here.sum(axis=1)
    centre = here @ place / mass
    # on each block 1 and place - centre, which are orthogonal there, each made of length 1
    norm = np.r_[mass, (here * (place - centre[:, None]) ** 2).sum(axis=1)] ** 0.5
    q, k = centre[:, None], centre[None, :]
    ones, by_q, by_k, by_both = moments(grid, place)
    by_both = by_both - q * by_k - k * by_q + q * k * ones
    walk = np.block([[ones, by_k - k * ones], [by_q - q * ones, by_both]])
    kept = norm > 1e-9 * norm.max()
    walk = (walk + walk.T)[np.ix_(kept, kept)] / np.outer(norm[kept], norm[kept])

    def function(coefficients: Array) -> Array:
        found = np.zeros(2 * blocks)
        found[kept] = coefficients / norm[kept]
        level, slope = found[:blocks, None], found[blocks:, None]
        x: Array = (level + slope * (place - centre[:, None])).ravel()[: grid.n] * degrees**0.5
        return x

    return walk, function


def moments(grid: TileGrid, place: Array) -> Array:
    """For each tile the sums over its live pairs (i, j) of 1, x[i], x[j], x[i] x[j]: [4, R, R]; x is `place`.

    A tile with the pairs (0, 0) and (1, 0), and x = -1, 1:  2,  x[0] + x[1] = 0,  2 x[0] = -2,  1 - 1 = 0
    """
    blank = np.zeros((1, grid.block_size, grid.block_size // 8), np.uint8)
    contents = np.concatenate([blank, ~blank, grid.masks])
    found = []
    for part in np.array_split(contents, 1 + contents.nbytes // 2**20):
        bits = unpacked(part).astype(float)
        rows, columns = bits.sum(axis=2), bits.sum(axis=1)
        found.append([rows.sum(axis=1), rows @ place, columns @ place, bits @ place @ place])
    of_tiles: Array = np.concatenate(found, axis=1)[:, tile_codes(grid, 0)]
    return of_tiles


def _searched_gap(grid: TileGrid, degrees: Array, bound: float, start: Array) -> float:
    """The gap of more tokens, to within ACCURACY of `bound` or FINEST, by Lanczos' method from `start`.

    W is applied as the partial tiles, which are written out, and the full ones, which only need the sums of
    blocks. The eigenvector of the walk's eigenvalue 1 is known, D^(1/2), and sent to -1.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import LinearOperator, eigsh

    none = np.zeros_like(grid.run_ptr)
    partial = replace(grid, run_ptr=none, run_start=grid.run_start[:0], run_end=grid.run_end[:0])
    part = csr_array(partial.to_dense(), dtype=float)
    full = csr_array(tile_codes(grid, 0) == 1, dtype=float)
    part, full = part + part.T, full + full.T
    starts, sizes = np.arange(grid.shape[0]) * grid.block_size, sizes_of(grid)
    scale, known = degrees**-0.5, np.sqrt(degrees / degrees.sum())

    def walk(x: Array) -> Array:
        x = x.ravel()
        scaled: Array = scale * x
        seen: Array = part @ scaled + np.repeat(full @ np.add.reduceat(scaled, starts), sizes)
        reflected: Array = scale * seen - 2 * known * (known @ x)
        return reflected

    found = eigsh(
        LinearOperator((grid.n, grid.n), matvec=walk, dtype=float),
        k=1,
        which="LA",
        ncv=64,
        v0=start,
        tol=max(ACCURACY * bound, FINEST),
        return_eigenvectors=False,
    )
    return gap(np.r_[found, 1.0])


def _find(subject: Subject) -> GraphMeasures:
    p = subject.one_sequence
    level = level_of(p.length)
    return measured(tiles_of(subject.attention, p.length, level, None, p.heads, None, subject.tables), level)


def _text(found: GraphMeasures) -> Iterator[str]:
    yield f"\ngraph of {'tokens' if found.by == 'token' else f'blocks of {found.block_size}'}"
    yield line("size", f"{found.nodes:,} nodes, {found.edges:,} edges")
    if found.by == "block":
        yield line("note", "paths are those of the blocks, degrees those of the tokens")
    for label, d in (("keys seen", found.in_degree), ("seen by", found.out_degree)):
        yield line(label, f"{d.min:,} to {d.max:,}, mean {d.mean:,.4g}")
    if found.average_shortest_path is not None:
        yield line("distances", f"{found.average_shortest_path:.4g} in the mean, {found.diameter} at most")
    if found.joined is not None:
        yield line("joined", f"{percent(found.joined)} of the pairs")
    yield line("components", f"{found.components:,}, the largest of {found.largest_component:,}")
    if found.spectral_gap is not None:
        yield line("spectral gap", f"{found.spectral_gap:.4g}")
    for label, holds in (("star", found.star), ("two hops", found.two_hop)):
        yield line(label, {True: "yes", False: "no", None: "undecided"}[holds])


SECTION = """
{% set measures = {
  "diameter": ("diameter", "count"),
  "average_shortest_path": ("mean shortest path", "count"),
  "joined": ("pairs that are joined", "percent"),
  "components": ("strongly connected components", "count"),
  "largest_component": ("nodes of the largest", "count"),
  "spectral_gap": ("spectral gap", "ratio"),
  "hubs": ("hubs", "count"),
  "star": ("contains the star graph", "truth"),
  "two_hop": ("all within two steps", "truth"),
} %}
<dl class="facts">
{% for field in ("nodes", "edges") %}
<div><dt>{{ field }}</dt><dd>{{ fact("graph", field) }}</dd></div>
{% endfor %}
{% for field, label in {"in_degree": "keys a query sees", "out_degree": "queries that see a key"}.items() %}
<div><dt>{{ label }}</dt><dd>
{{ fact("graph", field, "min") }} to {{ fact("graph", field, "max") }},
{{ fact("graph", field, "mean") }} on average
</dd></div>
{% endfor %}
{% for field, (label, unit) in measures.items() if report.graph[field] is not none %}
<div><dt>{{ label }}</dt><dd>{{ fact("graph", field, unit=unit) }}</dd></div>
{% endfor %}
</dl>
{% if report.graph.block_size is not none %}
<p class="hint">Distances, components and the spectral gap are those of blocks of
{{ fact("graph", "block_size") }} tokens.</p>
{% endif %}
"""

part = Part(_find, _text, place=100, title="Graph", section=SECTION, streams=True)
