"""machines: the least time that the live pairs take by the roofline of named machines and of this one."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import table
from attndsl.analysis.units import seconds
from attndsl.analysis.work import Ideal, ideal, total
from attndsl.backend import DTYPES
from attndsl.sheets import MACHINES, Machine


@dataclass(frozen=True)
class Seconds:
    forward: float
    backward: float
    decode: float


@dataclass(frozen=True)
class Roofline:
    """FLOPs per byte and what bounds the forward pass; the least seconds of each pass
    (Williams, Waterman, Patterson, Roofline, 2009)."""

    intensity: float
    bound: Literal["compute", "memory"]
    seconds: Seconds


def roofline(machine: Machine, cost: Ideal, dtype: str) -> Roofline:
    """max(FLOPs / peak, bytes / bandwidth)"""
    peak = machine.flops[dtype]

    def seconds(flops: int, moved: int) -> float:
        return max(flops / peak, moved / machine.bandwidth)

    f, b = cost.flops, cost.bytes
    intensity = f.forward / b.forward if b.forward else 0.0
    return Roofline(
        intensity,
        "compute" if intensity > peak / machine.bandwidth else "memory",
        Seconds(seconds(f.forward, b.forward), seconds(f.backward, b.backward), seconds(f.decode, b.decode)),
    )


SIDE, STREAMED = 512, 2**24
"""Of the matrices and the numbers that the micro-benchmark multiplies and copies."""


def this_machine(cache: Path | None = None) -> Machine:
    """This CPU with torch's number of threads, measured in under a second the first time and kept in `cache`
    (the user's cache folder)."""
    import platformdirs
    import torch

    path = cache or Path(platformdirs.user_cache_dir("attndsl")) / "machines.json"
    key = f"{_cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    kept = _kept(path)
    if key not in kept:
        kept[key] = benchmarked()
        # where the folder cannot be written to it is measured in every process
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(kept), encoding="utf-8")
            draft.replace(path)
    found = dict(kept[key])
    bandwidth = found.pop("bandwidth")
    return Machine("this CPU", MappingProxyType(found), bandwidth)


def _kept(path: Path) -> dict[str, dict[str, float]]:
    """What the file holds of the right form: a file of another version or a broken one is measured anew."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    wanted = {*DTYPES, "bandwidth"}
    return {
        key: rates
        for key, rates in (kept.items() if isinstance(kept, dict) else ())
        if isinstance(rates, dict)
        and rates.keys() == wanted
        and all(isinstance(rate, float) and rate > 0 for rate in rates.values())
    }


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def benchmarked() -> dict[str, float]:
    """FLOP/s of a matrix product by dtype, and bytes per second of a copy as `bandwidth`."""
    import torch

    def rate(dtype: str, side: int) -> float:
        a, b = (torch.randn(side, side).to(getattr(torch, dtype)) for _ in range(2))
        return 2.0 * side**3 / _best(lambda: a @ b)

    # a dtype without instructions of its own can be 100 times slower
    rates = {d: rate(d, SIDE if d in ("float32", "float64") else SIDE // 4) for d in DTYPES}
    source = torch.zeros(STREAMED)
    target = torch.empty_like(source)
    rates["bandwidth"] = 2.0 * source.nbytes / _best(lambda: target.copy_(source))
    return rates


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of four calls after one to warm up."""
    work()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _find(subject: Subject) -> dict[str, Roofline]:
    parts = subject.parts.values()
    least = total([ideal(part.block_mask, part.problem.attended(part.attention)) for part in parts])
    return {m.name: roofline(m, least, subject.problem.dtype) for m in (*MACHINES, this_machine())}


def _text(found: Mapping[str, Roofline]) -> Iterator[str]:
    yield "\nroofline of the live pairs"
    rows = [
        [name, *map(seconds, (m.seconds.forward, m.seconds.backward, m.seconds.decode)), m.bound]
        for name, m in found.items()
    ]
    yield table(["", "forward", "backward", "decode", "bound by"], rows)


SECTION = """
{% call table("Least time by the roofline of a machine") %}
{{ heads(["", "forward", "backward", "decode step", "FLOP per byte", "bound by"]) }}
<tbody>
{% for name, it in report.machines.items() %}
<tr><th scope="row">{{ name }}</th>
{% for pass in ("forward", "backward", "decode") %}
<td>{{ fact("machines", name, "seconds", pass, unit="seconds") }}</td>
{% endfor %}
<td>{{ fact("machines", name, "intensity", unit="ratio") }}</td><td>{{ it.bound or "—" }}</td></tr>
{% endfor %}
</tbody>
{% endcall %}
"""

part = Part(_find, _text, place=60, title="Cost", section=SECTION, streams=True)
