"""reach: the receptive field, which keys a query sees through several layers, the residual stream counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line, table
from attndsl.attention import Attention
from attndsl.errors import AttnError, fail
from attndsl.expr import TRUE, Expr, Table, all_of, any_of, const, le, lookup, substitute, var
from attndsl.layers.powers import TILE, Counts, Form, Step, computed, settled
from attndsl.layers.reach import SAME, Distances, common_divisor, joined, reach, sides
from attndsl.pictures import Drawing, drawn
from attndsl.relations.proofs import follows
from attndsl.relations.relation import around
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import TileGrid
from attndsl.tiles.queries import keys_read_by
from attndsl.tiles.tiling import tile

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Target = Literal["causal", "full"]
GOALS: dict[Target, Expr] = {"causal": le(var("k"), var("q")), "full": TRUE}
WORDS: dict[Target, str] = {
    "causal": "every query sees every key up to it",
    "full": "every query sees every key",
}

LONGEST = 2**24
"""Most positions: numbers for each of them take 128 MB."""
LAYERS = 12
MOST_LAYERS = 4096
FEW_LAYERS = 4
"""Layers up to which a proof for every n is tried."""
FEW = 8
"""Residues or distances that are listed one by one."""
FOLLOWED = 2**21
"""Tiles, counted once for each layer, through which the last query is followed."""
PATHS_LENGTH = 512
DRAWN, PANELS = 4096, 4
"""Longest sequence whose field is drawn, and after how many numbers of layers."""


@dataclass(frozen=True)
class Seen:
    """What queries see after `layers` layers; None where it is not known, or there is no query.

    last_row   keys that the last query sees
    worst_row  keys that query `worst_at` sees: the one with the most keys of the target unseen, the last such
    pairs      of a query and a key that it sees
    """

    layers: int
    last_row: int | None = None
    worst_row: int | None = None
    worst_at: int | None = None
    pairs: int | None = None


@dataclass(frozen=True)
class Hole:
    """A key of the target that query q never sees: of those of the first such query the nearest.

    residues  where all distances have a common divisor: the distances never seen, whatever n
    """

    q: int
    k: int
    residues: str | None = None


@dataclass(frozen=True)
class Field:
    """What is seen at one length, layer by layer from the first.

    target         "causal" if no layer sees the future: all keys up to the query; else "full": all keys
    full_after     the least number of layers after which every query sees its target: of as many as it takes
                   where all layers are alike, else of those given
    hole           where there is no such number
    settled_after  layers after which nothing more is seen, where all layers are alike
    for_every_n    what is proved of every length, in words
    formula        keys seen by the last query of n >= 1, over n and the number of layers L >= 1
    undecided      why neither `full_after` nor `hole` is known, or not the whole of `per_layer`
    """

    length: int
    target: Target
    per_layer: tuple[Seen, ...]
    full_after: int | None = None
    hole: Hole | None = None
    settled_after: int | None = None
    for_every_n: str | None = None
    formula: str | None = None
    undecided: str | None = None

    @property
    def known(self) -> bool:
        """Whether it says more than why it is undecided."""
        return replace(self, undecided=None) != _blank(self.length, self.target, len(self.per_layer))


def receptive_field(
    attentions: Attention | Sequence[Attention],
    length: int,
    *,
    heads: int = 1,
    layers: int | None = None,
    inputs: Mapping[str, ArrayLike] = lowering.NO_TABLES,
) -> Field:
    """What each query sees through a stack of layers: of one attention, or of one for each layer. Of keys
    that are made of tokens, as of pools, it sees these.

    `layers` is 12, or the number of attentions. Tables of one batch row; a table that a mask reads and that
    is not given leaves the field undecided. Raises AttnError for a table that is unknown or does not fit, for
    fewer heads than an attention speaks of, and for other layers than attentions.
    """
    stack = [attentions] if isinstance(attentions, Attention) else list(attentions)
    n = lowering.checked_length("length", length)
    heads = lowering.checked_length("heads", heads)
    depth = lowering.checked_length("layers", layers) if layers is not None else max(len(stack), 1)
    if layers is None and len(stack) == 1:
        depth = LAYERS
    if len(stack) not in (1, depth) or depth > MOST_LAYERS:
        raise fail(
            f"{depth} layers of {len(stack)} attentions",
            help=f"give one attention, or one for each layer, and at most {MOST_LAYERS} layers",
        )
    kinds = list(dict.fromkeys(attention.over_tokens for attention in stack))
    order = [kinds.index(a.over_tokens) for a in stack] if len(stack) > 1 else [0] * depth
    masks = [substitute(a.any_head(), {"H": const(heads), "nq": var("n")}) for a in kinds]
    target: Target = "full"
    if all(follows(mask, GOALS["causal"]) for mask in masks):
        target = "causal"
    unknown = set(inputs).difference(*([t.name for t in a.inputs] for a in kinds))
    if unknown:
        raise fail(f"no layer has an input `{min(unknown)}`")
    missing = {t.name for a in kinds for t in lowering.mask_tables(a)} - set(inputs)
    if n > LONGEST:
        found = replace(_blank(n, target, depth), undecided=f"a field is measured up to n = {LONGEST:,}")
    elif missing:
        found = _whatever(masks, order, n, target, min(missing))
    else:
        found = _at_length(kinds, order, n, heads, target, inputs)
    mask = any_of(*masks)
    divisor = common_divisor(mask) if n > 1 and found.full_after is None else 1
    if divisor > 1:
        q, k = (found.hole.q, found.hole.k) if found.hole else (1, 0) if target == "causal" else (0, 1)
        found = replace(found, hole=Hole(q, k, _residues(divisor)))
    if len(kinds) > 1:
        return found
    try:
        held = sides(joined(mask))
        formula = None if held is None else _formula(held[0])
        return replace(found, formula=formula, for_every_n=_for_every_n(mask, held, found, divisor))
    except AttnError:
        # beyond the limits of what is decided for every n
        return found


def _at_length(
    kinds: list[Attention],
    order: list[int],
    n: int,
    heads: int,
    target: Target,
    inputs: Mapping[str, ArrayLike],
) -> Field:
    """All but what is said of every length; layer i is of kinds[order[i]]."""
    blank = _blank(n, target, len(order))
    if any(t.batched and np.shape(inputs[t.name])[:1] > (1,) for a in kinds for t in lowering.mask_tables(a)):
        return replace(blank, undecided="each batch row has a field of its own: give the tables of one")
    steps = [step_of(a, n, heads, inputs) for a in kinds]
    tried: list[list[Seen]] = [[]]
    try:
        return computed(n, steps, lambda form: _measured(form, order, n, target, tried))
    except AttnError as error:
        reason = error.diagnostics[0].message
    known = max(tried, key=len)
    return replace(blank, per_layer=(*known, *_followed(n, steps, order)[len(known) :]), undecided=reason)


def _blank(n: int, target: Target, depth: int) -> Field:
    return Field(n, target, tuple([Seen(i + 1) for i in range(depth)]))


def _whatever(masks: list[Expr], order: list[int], n: int, target: Target, table: str) -> Field:
    """What holds whatever a missing table says: no more is seen than through masks around those given."""
    found = replace(_blank(n, target, len(order)), undecided=f"it depends on the table `{table}`")
    try:
        wide = [substitute(all_of(around(mask)[1], GOALS[target]), {"n": const(n)}) for mask in masks]
        steps: list[Step] = [(any_of(mask, SAME), {}) for mask in wide]
        best = computed(n, steps, lambda form: _measured(form, order, n, target, []))
    except AttnError:
        return found
    if best.full_after is None or best.full_after <= 1:
        return replace(found, hole=best.hole, full_after=0 if best.full_after == 0 else None)
    most = f"; in any case no less than {best.full_after} layers"
    if best.per_layer and best.per_layer[-1].last_row != n:
        most += f", and the last query sees at most {best.per_layer[-1].last_row} keys through {len(order)}"
    return replace(found, undecided=f"{found.undecided}{most}")


def step_of(attention: Attention, n: int, heads: int, inputs: Mapping[str, ArrayLike]) -> Step:
    """What one layer joins: the union over heads, and radius(0)."""
    own = replace(attention, inputs=lowering.mask_tables(attention))
    sizes = lowering.sizes(own, n, n, heads)
    if sizes.q.starts != (0,):
        raise fail(f"`{own.name}` has its queries at other positions than its keys: layers cannot be stacked")
    given = lowering.checked_tables(own, {t.name: inputs[t.name] for t in own.inputs}, sizes)
    return any_of(SAME, lowering.any_of_heads(own, sizes, given, range(heads))), given


def _measured(form: Form, order: list[int], n: int, target: Target, tried: list[list[Seen]]) -> Field:
    """The field by one form; its rows are put into `tried` while they are found, for it may meet a limit."""
    due = np.arange(1, n + 1) if target == "causal" else np.full(n, n)
    reached, counts = form.same, np.ones(n, np.int64)
    seen, rows = _seen(counts, due), list[Seen]()
    tried.append(rows)
    full_after = 0 if _full(counts, due) else None
    for layer, kind in enumerate(order, 1):
        more = form.product(form.steps[kind], reached)
        if not form.equal(more, reached):
            reached, counts = more, form.counts(more)
            seen = _seen(counts, due)
            if full_after is None and _full(counts, due):
                full_after = layer
        rows.append(replace(seen, layers=layer))
    settled_after = None
    if len(form.steps) == 1 and full_after is None:
        settled_after, reached = settled(form, form.steps[0])
        counts = form.counts(reached)
        full_after = settled_after if _full(counts, due) else None
    elif len(form.steps) == 1:
        settled_after = full_after
    hole = None if full_after is not None else _hole(form, reached, counts, due)
    return Field(n, target, tuple(rows), full_after, hole, settled_after)


def _full(counts: Counts, due: Counts) -> bool:
    return np.array_equal(counts, due)


def _seen(counts: Counts, due: Counts) -> Seen:
    if not len(counts):
        return Seen(0, pairs=0)
    worst = len(counts) - 1 - int((due - counts)[::-1].argmax())
    return Seen(0, int(counts[-1]), int(counts[worst]), worst, int(counts.sum()))


def _hole(form: Form, reached: Any, counts: Counts, due: Counts) -> Hole:
    q = int((counts < due).argmax())
    unseen = np.flatnonzero(~form.row(reached, q)[: due[q]])
    return Hole(q, int(unseen[np.abs(unseen - q).argmin()]))


def _followed(n: int, steps: Sequence[Step], order: list[int]) -> tuple[Seen, ...]:
    """The last row alone, where whole relations are beyond the limits: from the last query down."""
    try:
        grids = [tile(mask, n, n, TILE, n=n, tables=tables) for mask, tables in steps]
    except AttnError:
        grids = []
    if not grids or max(grid.entries for grid in grids) * len(order) > FOLLOWED:
        return tuple([Seen(layer + 1) for layer in range(len(order))])
    rows = []
    for layer in range(len(order)):
        keys = np.arange(n) == n - 1
        for kind in order[layer::-1]:
            keys = keys_read_by(grids[kind], keys)
        rows.append(Seen(layer + 1, int(keys.sum())))
    return tuple(rows)


def _residues(divisor: int) -> str:
    if divisor == 2:
        return "keys at odd distances"
    listed = ", ".join(map(str, range(1, divisor))) if divisor <= FEW else f"1, ..., {divisor - 1}"
    return f"q - k mod {divisor} in {{{listed}}}"


def _formula(before: Distances) -> str | None:
    """Keys of the last query after L layers, where they are in arithmetic progression at last."""
    for layers in range(1, FEW_LAYERS + 1):
        sums = before.times(layers)
        spacing, count = _progression(sums)
        if spacing and (layers == 1 or count is None):
            every = "n" if spacing == 1 else f"floor((n - 1)/{spacing}) + 1"
            if count == 0:
                return "1"
            if count is not None:
                return f"min({every}, {count}*L + 1)"
            return every if layers == 1 else f"{every} for L >= {layers}"
    return None


def _progression(distances: Distances) -> tuple[int, int | None]:
    """g and m where these are 0, g, ..., m * g, or without end if m is None; g = 0 where they are not.

    {0, 2, 4}         2, 2
    {0, 3, 6, ...}    3, None
    {0, 1, 5}         0, None
    """
    bits, tail = distances.bits, distances.bits[distances.start :]
    members = np.flatnonzero(bits)
    spacing = int(members[1]) if len(members) > 1 else max(distances.period, 1) if tail.any() else 1
    if not tail.any():
        regular = np.array_equal(members, np.arange(len(members)) * spacing)
        return (spacing, len(members) - 1) if regular else (0, None)
    shown = distances.unrolled(len(bits) + spacing)
    regular = distances.period % spacing == 0 and (shown == (np.arange(len(shown)) % spacing == 0)).all()
    return (spacing, None) if regular else (0, None)


def _for_every_n(
    mask: Expr, held: tuple[Distances, Distances] | None, found: Field, divisor: int
) -> str | None:
    """A sentence that is proved of every length. Raises AttnError beyond a limit."""
    goal, words = GOALS[found.target], WORDS[found.target]
    if divisor > 1:
        return f"no number of layers joins positions whose distance is no multiple of {divisor}"
    if found.settled_after == 1 and found.hole is not None:
        alone = follows(reach(mask, 2), reach(mask, 1))
        return "more layers than one see nothing more" if alone else None
    layers = found.full_after or 0
    if 1 <= layers <= FEW_LAYERS and follows(goal, reach(mask, layers)):
        return f"after {layers} layer{'s' * (layers > 1)} {words}"
    widths = (
        [] if held is None else [_progression(side) for side in held[: 1 if found.target == "causal" else 2]]
    )
    ends = [count for spacing, count in widths if spacing == 1 and count is not None]
    if held is None or any(spacing != 1 for spacing, _ in widths) or not ends or min(ends) < 1:
        return None
    return f"after ceil((n - 1)/{min(ends)}) layers {words}"


def paths(
    attention: Attention, layers: int, length: int, heads: int = 1, **inputs: ArrayLike
) -> NDArray[np.int64]:
    """How many ways lead from key k through `layers` layers to query q, int64 [n, n].

    A layer passes a position on to itself, or to what attends to it in some head: one way, not one for each.
    Raises AttnError for more than PATHS_LENGTH positions, and where a number may leave 64 bits.
    """
    n, layers = lowering.checked_length("length", length), lowering.checked_length("layers", layers)
    if n > PATHS_LENGTH:
        raise fail(f"paths are counted up to n = {PATHS_LENGTH}, not {n}")
    mask, tables = step_of(attention, n, lowering.checked_length("heads", heads), inputs)
    grid = tile(mask, n, n, TILE, n=n, tables=tables).to_dense()
    with np.errstate(over="ignore", invalid="ignore"):
        most = np.linalg.matrix_power(grid.astype(np.float64), layers).max(initial=0)
    # too many for a float even are inf, or nan: neither is less
    if not most < 2.0**62:
        raise fail(f"the paths through {layers} layers are too many for 64 bits")
    return np.asarray(np.linalg.matrix_power(grid.astype(np.int64), layers))


@dataclass(frozen=True)
class Reached:
    """The receptive field; `diameter`: layers after which nothing more is seen. Where keys are chosen by
    content it is of all that may be chosen, and `reach_fixed` of what is related whatever is chosen."""

    reach: Field
    diameter: int | None
    reach_fixed: Field | None = None


def _find(subject: Subject) -> Reached:
    p = subject.one_sequence
    found = receptive_field(
        subject.attention, p.length, heads=p.heads, layers=subject.layers, inputs=subject.inputs
    )
    fixed = None
    if subject.fixed is not None:
        fixed = receptive_field(
            subject.fixed, p.length, heads=p.heads, layers=subject.layers, inputs=subject.inputs
        )
    return Reached(found, found.settled_after, fixed)


def _text(reached: Reached) -> Iterator[str]:
    found = reached.reach
    target = {"causal": "every key up to itself", "full": "every key"}[found.target]
    yield "\nreceptive field"
    if reached.reach_fixed is not None and reached.reach_fixed.per_layer:
        (least, *_) = reached.reach_fixed.per_layer
        seen = f"{_number(least.last_row)} key{'s' * (least.last_row != 1)}"
        yield line("at least", f"{seen} for the last query after 1 layer: what is fixed")
    if found.full_after is not None:
        yield line("full after", f"{layers_said(found.full_after)}: every query then sees {target}")
    if found.hole is not None:
        missed = f"query {found.hole.q:,} never sees key {found.hole.k:,}"
        yield line("hole", missed + (f": {found.hole.residues}" if found.hole.residues else ""))
    if found.for_every_n:
        yield line("for every n", found.for_every_n)
    if found.formula:
        keys, _, where = found.formula.partition(" for ")
        after = f", where {where}" if where else ""
        yield line("last query", f"sees {keys} keys after L layers{after}")
    if reached.diameter is not None:
        yield line("diameter", f"{reached.diameter:,}")
    shown = [row for row in found.per_layer if row.last_row is not None or row.worst_row is not None]
    if len(shown) > 1 and found.settled_after is not None:
        shown = shown[: max(1, found.settled_after)]
    if shown:
        rows = [
            [
                layers_said(row.layers),
                _number(row.last_row),
                f"{_number(row.worst_row)} (query {_number(row.worst_at)})",
            ]
            for row in shown
        ]
        yield table(["after", "last query sees", "worst query sees"], rows)
    if found.undecided:
        yield line("undecided", found.undecided)


def layers_said(count: int) -> str:
    return f"{count:,} layer{'s' * (count != 1)}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _draw(subject: Subject, reached: Reached) -> Drawing:
    """What is reached after 1, 2, 4, ... layers, until nothing more is.

    Raises AttnError for longer sequences than `DRAWN`, where layers cannot be stacked, and where the
    relations are beyond all limits.
    """
    from attndsl import pictures

    n = subject.one_sequence.length
    if n > DRAWN:
        raise fail(f"receptive fields are drawn up to {DRAWN:,} tokens")
    if reached.reach.undecided is not None:
        raise fail(reached.reach.undecided)
    last = reached.reach.settled_after or 2**PANELS
    layers = sorted({min(2**i, last) for i in range(PANELS)})
    written = Table("reached", "bool", (n, n))
    at = lookup(written, var("q"), var("k"))

    def after(form: Form) -> dict[int, TileGrid]:
        (step,), found, reached = form.steps, {}, form.same
        for layer in range(1, layers[-1] + 1):
            reached = form.product(step, reached)
            if layer in layers:
                rows = np.stack([form.row(reached, q) for q in range(n)]).astype(bool)
                found[layer] = tile(at, n, n, subject.problem.block_size, n=n, tables={written.name: rows})
        return found

    grids = computed(n, [step_of(subject.attention, n, subject.problem.heads, subject.inputs)], after)
    return drawn(
        lambda dark: pictures.receptive_field(grids, dark=dark),
        f"Which keys each query sees after {', '.join(map(str, layers))} layers",
    )


CARDS = """
{% call card("sees everything after") %}
{% if report.reach.full_after is not none %}
{{ fact("reach", "full_after") }} {{ "layer" if report.reach.full_after == 1 else "layers" }}
{% else %}{{ "never" if report.reach.hole else "undecided" }}{% endif %}
{% endcall %}
"""

SECTION = """
{% set it = report.reach %}
<p>
{% if it.full_after is not none %}
Every query sees every key{{ " up to it" if it.target == "causal" }} after
{{ fact("reach", "full_after") }} {{ "layer" if it.full_after == 1 else "layers" }}.
{% elif it.hole %}
Query {{ fact("reach", "hole", "q") }} never sees key {{ fact("reach", "hole", "k") }}
{%- if at("reach", "hole", "residues") %}: what is never seen is
<span data-field="/reach/hole/residues">{{ it.hole.residues }}</span>{% endif %}.
{% elif it.undecided %}
Undecided: <span data-field="/reach/undecided">{{ it.undecided }}</span>.
{% else %}
Not everything is seen within these layers.
{% endif %}
{% if it.full_after is none and it.settled_after is not none %}
Nothing more is seen after {{ fact("reach", "settled_after") }}
{{ "layer" if it.settled_after == 1 else "layers" }}.
{% endif %}
{% if at("diameter") is not none %}The diameter is {{ fact("diameter") }}.{% endif %}
</p>
{% if it.for_every_n %}
<p>For every n: <span data-field="/reach/for_every_n">{{ it.for_every_n }}</span>.</p>
{% endif %}
{% if it.formula %}
{% set formula, _, where = it.formula.partition(" for ") %}
<p>After <var>L</var> layers the last query sees
<span class="inline" data-field="/reach/formula">{{ formula | math }}</span> keys
{%- if where %}, for {{ where | relation }}{% endif %}.</p>
{% endif %}
{% if it.per_layer %}
{% call table("Keys seen after each layer", "narrow") %}
{{ heads(["layers", "by the last query", "by the query that misses most"]) }}
<tbody>
{% for row in it.per_layer if it.settled_after is none or row.layers <= [1, it.settled_after] | max %}
{% set i = loop.index0 %}
{% set worst = row.worst_at + 1 if it.target == "causal" and row.worst_at is not none else it.length %}
<tr><th scope="row">{{ fact("reach", "per_layer", i, "layers") }}</th>
{% for field, due in (("last_row", it.length), ("worst_row", worst)) %}
<td>{{ fact("reach", "per_layer", i, field) }}
{%- if row[field] is not none and due %}<span class="bar" style="--share: {{ row[field] / due }}"></span>
{%- endif %}</td>
{% endfor %}</tr>
{% endfor %}
</tbody>
{% endcall %}
{% endif %}
"""

part = Part(
    _find, _text, ("reach", "diameter", "reach_fixed"), known=lambda found: found.reach.known, settled=False,
    place=70, title="What it sees", streams=True, section=SECTION, cards=CARDS, draw=_draw,
)  # fmt: skip
