"""cost: FLOPs and bytes of the live pairs and of what each backend makes of them, and predicted seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from attndsl.analysis.decode import state_of
from attndsl.analysis.machines import roofline, this_machine
from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line, table
from attndsl.analysis.units import scaled, seconds
from attndsl.analysis.work import BACKWARD, Ideal, Passes, Steps, ideal, pair_flops, thin, total
from attndsl.attention import Attention
from attndsl.backend import DTYPES, Counting, Problem
from attndsl.errors import asking, fail
from attndsl.execution import choice, registry
from attndsl.expr import Table
from attndsl.pictures import Drawing, drawn
from attndsl.streams import Projection, Stretch, described, many_at
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

LENGTHS = 7
"""Lengths at which cost is drawn, each half of the next."""
SHORTEST = 64


@dataclass(frozen=True)
class Lowering:
    """What one backend makes of it: predicted seconds of a forward pass (of both where the problem is
    training), or the reason why there are none: it declines, or its cost is unknown; FLOPs and bytes where it
    tells them (`Counting`)."""

    seconds_estimate: float | None
    reason: str | None
    flops: Passes | None
    bytes: Passes | None


def lowerings(attention: Attention, problem: Problem, block_mask: BlockMask | None) -> dict[str, Lowering]:
    """Every registered backend on this problem.

    FLOPs are those of the pairs that it computes, live or not. Bytes: q, out and their gradients once, keys
    and values once for every `block_size` queries that meet them, and twice what it writes in between; in the
    backward pass what it writes has a gradient of its own.
    """
    found = {}
    for name in registry.names("backends"):
        verdict = choice.judged(name, attention, problem, block_mask)
        if isinstance(verdict, str):
            found[name] = Lowering(None, verdict, None, None)
            continue
        backend = registry.plugin("backends", name)
        work = None
        if isinstance(backend, Counting):
            with asking(f"the backend `{name}`"):
                counts = backend.counts(attention, problem, block_mask)
            work = _work(counts, problem)
        unknown = choice.UNKNOWN if verdict is None else None
        found[name] = Lowering(verdict, unknown, *(work or (None, None)))
    return found


def _work(counts: Mapping[str, float], problem: Problem) -> tuple[Passes, Passes]:
    p, item = problem, DTYPES[problem.dtype]
    forward = round(pair_flops(p.head_dim) * counts["pairs"])
    rows = p.batch * p.heads * p.q_length * p.head_dim * item
    keys = p.batch * p.kv_heads * p.length * p.head_dim * item
    reloads = round(counts["pairs"] / max(1, min(p.block_size, p.q_length)) * 2 * p.head_dim * item)
    written = round(2 * item * counts["written"])
    moved = Passes(2 * rows + reloads + written, 4 * rows + 2 * keys + reloads + 2 * written)
    return Passes(forward, round(BACKWARD * forward)), moved


@dataclass(frozen=True)
class Costs:
    """The work on the live pairs alone, or on the matrices in their place, and on what each backend computes;
    `choosing` are FLOPs of a forward pass that come before, by selection, where keys are chosen by content,
    and `making` those of keys and values that are made, by stream."""

    flops: Passes
    bytes: Passes
    lowerings: Mapping[str, Lowering]
    choosing: Mapping[str, float]
    making: Mapping[str, float] = field(default_factory=dict)


def _least(subject: Subject) -> Ideal:
    found = ideal(subject.block_mask, subject.problem.attended(subject.attention))
    state = state_of(subject.attention, subject.problem)
    if state is None:
        return found
    # each number of it is multiplied and added to, and read so
    item, batch = DTYPES[subject.problem.dtype], subject.problem.batch
    flops = replace(found.flops, decode=4 * batch * state)
    return replace(found, flops=flops, bytes=replace(found.bytes, decode=2 * item * batch * state))


def _find(subject: Subject) -> Costs:
    approx = subject.attention.approx
    if approx is not None:
        flops, moved = thin(approx, subject.problem)
        return Costs(flops, moved, lowerings(subject.attention, subject.problem, None), {})
    parts = subject.parts
    least = total([_least(part) for part in parts.values()])
    by_part = {name: _lowerings(part) for name, part in parts.items()}
    found = {
        name: _added({part: by_part[part][name] for part in parts}) for name in registry.names("backends")
    }
    chosen, made = Counter[str](), Counter[str]()
    for part in parts.values():
        chosen.update(choosing(part.attention.attended, part.problem.attended(part.attention)))
        made.update(making(part.attention, part.problem))
    return Costs(least.flops, least.bytes, found, dict(chosen), dict(made))


def _lowerings(part: Subject) -> dict[str, Lowering]:
    # a plan knows no tiles of what is chosen at every call
    blocks = None if part.attention.selected else part.block_mask
    return lowerings(part.attention.attended, part.problem.attended(part.attention), blocks)


def _added(parts: Mapping[str, Lowering]) -> Lowering:
    """What one backend makes of all parts of a sum."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    reason = next((f"{name}: {work.reason}" for name, work in parts.items() if work.reason), None)
    seconds = [work.seconds_estimate for work in parts.values() if work.seconds_estimate is not None]
    flops, moved = ([getattr(work, kind) for work in parts.values()] for kind in ("flops", "bytes"))
    return Lowering(sum(seconds) if reason is None else None, reason, _passes(flops), _passes(moved))


def _passes(parts: Sequence[Passes | None]) -> Passes | None:
    known = [passes for passes in parts if passes is not None]
    if len(known) < len(parts):
        return None
    return Passes(sum(passes.forward for passes in known), sum(passes.backward for passes in known))


def choosing(attention: Attention, problem: Problem) -> dict[str, float]:
    """FLOPs of the products that choices take, by selection."""
    found: dict[str, float] = {}
    for name, counts in choice.choices(attention, problem):
        found[name] = found.get(name, 0.0) + 2 * counts["products"]
    return found


def making(attention: Attention, problem: Problem) -> dict[str, float]:
    """FLOPs of making keys and values, by stream: products with what is learned or given, and sums."""
    p, found = problem.attended(attention), dict[str, float]()
    for stream in attention.streams:
        if isinstance(stream, Stretch):
            continue
        slots = many_at(stream, problem.length)
        vector = 0
        for by in stream.made_by:
            if isinstance(stream, Projection):
                vector += 2 * problem.length
            else:
                mixed = isinstance(by, Table) and len(by.explicit) == 3
                vector += stream.size * (1 if not isinstance(by, Table) else 2 * (p.head_dim if mixed else 1))
        name = described((stream,))
        found[name] = found.get(name, 0.0) + float(p.batch * p.kv_heads * slots * p.head_dim * vector)
    return found


def _text(found: Costs) -> Iterator[str]:
    flops, moved = found.flops, found.bytes
    what = "live pairs alone" if isinstance(flops, Steps) else "products alone"
    rows = [[what, scaled(flops.forward), scaled(flops.backward), scaled(moved.forward), ""]]
    for name, work in found.lowerings.items():
        done = [scaled(work.flops.forward), scaled(work.flops.backward)] if work.flops else ["-", "-"]
        traffic = scaled(work.bytes.forward) if work.bytes else "-"
        predicted = "-" if work.seconds_estimate is None else seconds(work.seconds_estimate)
        rows.append([name, *done, traffic, predicted])
    yield "\ncost"
    yield table(["", "FLOP forward", "backward", "bytes", "predicted"], rows)
    for label, before in (("choosing", found.choosing), ("making", found.making)):
        for name, work_before in before.items():
            yield line(label, f"{name}: {scaled(work_before, 'FLOP')} before each forward pass")
    for name, work in found.lowerings.items():
        if work.reason:
            yield line(name, work.reason)
    if isinstance(flops, Steps) and isinstance(moved, Steps):
        yield line(
            "decode step",
            f"{scaled(flops.decode, 'FLOP')}, {scaled(moved.decode, 'B')}: the last query alone",
        )


def _draw(subject: Subject, found: Costs) -> Drawing:
    """Predicted seconds of each backend against n, up to the length in question, or further if it is short.

    Raises AttnError where queries are not the keys' positions, or tables tie the attention to one length.
    """
    from attndsl import pictures

    whole = subject.one_sequence
    subject.attention.require_pairs()
    if subject.attention.inputs or subject.attention.selected:
        raise fail("its tables have one length")
    if subject.attention.streams:
        raise fail("keys that are made are not drawn against n")
    if subject.attention.parts:
        raise fail("it is a sum, of which every part has curves of its own")
    last = max(whole.length, SHORTEST << LENGTHS - 1)
    lengths = [last >> i for i in reversed(range(LENGTHS))]
    machine = this_machine()
    curves: dict[str, tuple[list[int], list[float]]] = {}
    least = []
    for n in lengths:
        problem = replace(whole, length=n, q_length=n)
        sizes = lowering.sizes(subject.attention, n, n, whole.heads)
        block_mask = lowering.block_mask(subject.attention, sizes, {}, whole.block_size)
        least.append(roofline(machine, ideal(block_mask, problem), whole.dtype).seconds.forward)
        for name, work in lowerings(subject.attention, problem, block_mask).items():
            if work.seconds_estimate is not None:
                at, predicted = curves.setdefault(name, ([], []))
                at.append(n)
                predicted.append(work.seconds_estimate)
    return drawn(
        lambda dark: pictures.cost(curves, (lengths, least), dark=dark),
        f"Predicted seconds of a forward pass against n, for {', '.join(curves)} and the ideal",
        "Predicted seconds of a forward pass on this CPU; ideal is its roofline for the live pairs.",
    )


SECTION = """
{% set passes = {"forward": "forward", "backward": "backward", "decode": "decode step, the last query"} %}
{% set pairs = at("flops", "decode") is not none %}
{% call table("Live pairs only" if pairs else "Products only") %}
{{ heads(["", "work", "memory moved"]) }}
<tbody>
{% for pass in passes if pairs or pass != "decode" %}
<tr><th scope="row">{{ passes[pass] }}</th>
{% for kind in ("flops", "bytes") %}<td>{{ fact(kind, pass, unit=kind) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
{% endcall %}
{% call table("Backends") %}
{{ heads(["", "estimate", "work forward", "backward", "memory forward", "backward", ""]) }}
<tbody>
{% set chosen = report.lowerings | cheapest %}
{% for name, it in report.lowerings.items() %}
<tr><th scope="row">{{ name }}{% if name == chosen %} <em class="mark">chosen</em>{% endif %}</th>
<td>{{ fact("lowerings", name, "seconds_estimate", unit="seconds") }}</td>
{% for kind in ("flops", "bytes") %}{% for pass in ("forward", "backward") %}
<td>{{ fact("lowerings", name, kind, pass, unit=kind) }}</td>
{% endfor %}{% endfor %}
<td class="text">{{ it.reason or "" }}</td></tr>
{% endfor %}
</tbody>
{% endcall %}
"""

part = Part(
    _find,
    _text,
    ("flops", "bytes", "lowerings", "choosing", "making"),
    place=40,
    title="Cost",
    pairs=False,
    section=SECTION,
    draw=_draw,
    streams=True,
)
