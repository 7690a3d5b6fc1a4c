"""A report as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from attndsl.analysis.cost import BLOCK_SIZES, ENTRIES, Steps
from attndsl.analysis.units import percent, scaled, seconds

if TYPE_CHECKING:
    from attndsl.analysis.report import Report

WIDTH = 80
LABEL = 14


def line(label: str, said: object) -> str:
    """A label and what is said, over as many lines as it needs."""
    indent = " " * (LABEL + 2)
    wrapped = textwrap.wrap(
        str(said), WIDTH, initial_indent=indent, subsequent_indent=indent, break_long_words=False
    )
    return "\n".join([f"  {label:<{LABEL}}" + (wrapped[0][LABEL + 2 :] if wrapped else ""), *wrapped[1:]])


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    from tabulate import tabulate

    text = tabulate(
        rows,
        headers,
        tablefmt="plain",
        disable_numparse=True,
        colalign=["left", *["right"] * (len(headers) - 1)],
    )
    return textwrap.indent(text, "  ")


def predicted(value: float | None) -> str:
    return "-" if value is None else seconds(value)


def report_text(report: Report) -> str:
    """All that is known, by part, then what is not and why."""
    parts = [
        _heading(report),
        *_counts(report),
        *_costs(report),
        *_reach(report),
        *_cache(report),
        *_shards(report),
        *_graph(report),
    ]
    if report.reasons:
        parts += ["\nnot known", *(line(name, why) for name, why in report.reasons.items())]
    return "\n".join(parts)


def _heading(report: Report) -> str:
    many = [f"{report.q_length:,} x {report.length:,}"]
    many += [f"{report.heads} heads"] * (report.heads > 1) + [f"batch {report.batch}"] * (report.batch > 1)
    return f"{report.name}: queries x keys = {', '.join(many)}"


def _counts(report: Report) -> Iterator[str]:
    count = report.nnz
    if count is not None:
        if count.value is not None:
            assert report.density is not None
            yield line("live pairs", f"{count.value:,}, {percent(report.density)}")
        if count.bounds is not None:
            low, high = count.bounds
            yield line("live pairs", f"{low:,} to {high:,}, whatever the tables")
        if count.formula is not None:
            yield line("formula", f"{count.formula}, for {count.valid_for}")
        if count.around is not None:
            ends = " and ".join(count.around)
            yield line("formula", f"between {ends}, for {count.valid_for}; by residue in --json")
        if count.expected is not None:
            yield line("over seeds", f"{count.expected:,.1f} live pairs in the mean")
    for name, form in (report.in_parameters or {}).items():
        yield line(f"in {name}", f"{form.formula}, for {form.valid_for}")
    if report.complexity is not None:
        yield line("complexity", report.complexity)
    if report.empty_rows is not None:
        yield line("empty rows", f"{report.empty_rows:,}")
    if report.causal is not None:
        at = ", ".join(f"{name} = {value}" for name, value in (report.not_causal_at or {}).items())
        yield line("causal", "yes, for every n" if report.causal else f"no: {at}")


def _costs(report: Report) -> Iterator[str]:
    if report.flops is not None and report.bytes is not None:
        yield from _work(report, report.flops, report.bytes)
    if report.block_sizes:
        yield "\ntiles that a kernel would compute whole, by block size"
        yield table(
            ["", "full tiles", "partial", "pairs in them", "of live", ""],
            [
                [
                    str(row.block_size),
                    f"{row.tiles.full:,}",
                    f"{row.tiles.partial:,}",
                    f"{row.pairs:,}",
                    f"{row.waste:.3g} x",
                    "recommended" if row.block_size == report.best_block_size else "",
                ]
                for row in report.block_sizes
            ],
        )
        least = report.block_sizes[0].block_size
        if least > min(BLOCK_SIZES):
            yield f"  not counted: below {least}, where there may be more than {ENTRIES:,} entries"
    if report.machines:
        yield "\nroofline of the live pairs"
        yield table(
            ["", "forward", "backward", "decode", "bound by"],
            [
                [
                    name,
                    seconds(m.seconds.forward),
                    seconds(m.seconds.backward),
                    seconds(m.seconds.decode),
                    m.bound,
                ]
                for name, m in report.machines.items()
            ],
        )


def _work(report: Report, flops: Steps, moved: Steps) -> Iterator[str]:
    ideal = [scaled(flops.forward), scaled(flops.backward), scaled(moved.forward), ""]
    rows = [["live pairs alone", *ideal]]
    for name, work in (report.lowerings or {}).items():
        done = [scaled(work.flops.forward), scaled(work.flops.backward)] if work.flops else ["-", "-"]
        traffic = scaled(work.bytes.forward) if work.bytes else "-"
        rows.append([name, *done, traffic, predicted(work.seconds_estimate)])
    yield "\ncost"
    yield table(["", "FLOP forward", "backward", "bytes forward", "predicted"], rows)
    for name, work in (report.lowerings or {}).items():
        if work.reason:
            yield line(name, work.reason)
    yield line("decode step", f"{scaled(flops.decode, 'FLOP')}, {scaled(moved.decode, 'B')}")


def _reach(report: Report) -> Iterator[str]:
    found = report.reach
    if found is None:
        return
    target = {"causal": "every key up to itself", "full": "every key"}[found.target]
    yield "\nreceptive field"
    if found.full_after is not None:
        yield line("full after", f"{_layers(found.full_after)}: every query then sees {target}")
    if found.hole is not None:
        missed = f"query {found.hole.q:,} never sees key {found.hole.k:,}"
        yield line("hole", missed + (f": {found.hole.residues}" if found.hole.residues else ""))
    if found.for_every_n:
        yield line("for every n", found.for_every_n)
    if found.formula:
        keys, _, where = found.formula.partition(" for ")
        after = f", where {where}" if where else ""
        yield line("last query", f"sees {keys} keys after L layers{after}")
    if report.diameter is not None:
        yield line("diameter", f"{report.diameter:,}")
    shown = [row for row in found.per_layer if row.last_row is not None or row.worst_row is not None]
    if len(shown) > 1 and found.settled_after is not None:
        shown = shown[: max(1, found.settled_after)]
    if shown:
        yield table(
            ["after", "last query sees", "worst query sees"],
            [
                [
                    _layers(row.layers),
                    _number(row.last_row),
                    f"{_number(row.worst_row)} (query {_number(row.worst_at)})",
                ]
                for row in shown
            ],
        )
    if found.undecided:
        yield line("undecided", found.undecided)


def _layers(count: int) -> str:
    return f"{count:,} layer{'s' * (count != 1)}"


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _cache(report: Report) -> Iterator[str]:
    found = report.kv_cache
    if found is None:
        return
    yield "\nKV cache when decoding"
    yield line("keys", f"{found.minimum:,} at most, of {found.full:,}")
    yield line("rule", found.rule)
    if found.bounded is not None:
        yield line("bounded", "yes, for every n" if found.bounded else "no, it grows with n")
    if len(found.per_head) > 1:
        yield line("by head", ", ".join(f"{keys:,}" for keys in found.per_head))
    if not found.causal:
        yield line("note", "reads of keys after the query are left out: decoding cannot do them")


def _shards(report: Report) -> Iterator[str]:
    if not report.shards:
        return
    yield f"\n{report.shards[0].ranks} ranks"
    yield table(
        ["", "fetched", "sent", "all-gather", "ring", "load max/mean"],
        [
            [
                s.scheme,
                f"{max(s.keys):,}",
                scaled(s.bytes, "B"),
                scaled(s.all_gather, "B"),
                scaled(s.ring, "B"),
                f"{s.balance:.3g}",
            ]
            for s in report.shards
        ],
    )


def _graph(report: Report) -> Iterator[str]:
    found = report.graph
    if found is None:
        return
    yield f"\ngraph of {'tokens' if found.by == 'token' else f'blocks of {found.block_size}'}"
    yield line("size", f"{found.nodes:,} nodes, {found.edges:,} edges")
    if found.by == "block":
        yield line("note", "paths are those of the blocks, degrees those of the tokens")
    degrees = (f"{d.min:,} to {d.max:,}, mean {d.mean:.4g}" for d in (found.in_degree, found.out_degree))
    for label, said in zip(("keys seen", "seen by"), degrees, strict=True):
        yield line(label, said)
    if found.average_shortest_path is not None:
        yield line("distances", f"{found.average_shortest_path:.4g} in the mean, {found.diameter} at most")
    if found.joined is not None:
        yield line("joined", f"{percent(found.joined)} of the pairs")
    yield line("components", f"{found.components:,}, the largest of {found.largest_component:,}")
    if found.spectral_gap is not None:
        yield line("spectral gap", f"{found.spectral_gap:.4g}")
    known = {"star": found.star, "two hops": found.two_hop}
    for label, holds in known.items():
        yield line(label, {True: "yes", False: "no", None: "undecided"}[holds])
