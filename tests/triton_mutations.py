"""Changes of one token, each of which the interpreted probes or the laws of layouts must see:

TRITON_INTERPRET=1 python tests/triton_mutations.py    a line of JSON for each: [number, what saw it]
"""

from __future__ import annotations

import json
import linecache
import os
import sys
import types
from pathlib import Path

import interpreted
import numpy as np
import test_triton

import attndsl.plugins.triton as plugin
from attndsl.plugins.triton import kernel, launch, layout, source

FOLDER = Path(plugin.__file__).parent
MUTATIONS = (
    # a row beyond the last is read
    (
        "kernels.py", "< many)[:, None] & (feature[None, :] < WIDTH), other",
        "<= many)[:, None] & (feature[None, :] < WIDTH), other", "causal",
    ),
    ("kernels.py", "(word >> (place % 32)[None, :])", "(word >> (place % 31)[None, :])", "causal"),
    ("kernels.py", "(place // 32 == i)", "(place // 32 != i)", "rectangle"),
    (
        "kernels.py", "base = tl.where(now == NONE, 0.0, now)",
        "base = tl.where(now == NONE, now, now)", "empty rows",
    ),
    (
        "kernels.py", "total = total * shrunk + tl.sum(weight, 1)",
        "total = total + tl.sum(weight, 1)", "empty rows",
    ),
    # the second run of a row
    (
        "kernels.py", "range(tl.load(run_ptr + line), tl.load(run_ptr + line + 1))",
        "range(tl.load(run_ptr + line + 1) - 1, tl.load(run_ptr + line + 1))",
        "runs",
    ),
    ("kernels.py", "h = kv * SHARED_BY + i\n", "h = kv * SHARED_BY\n", "relu"),
    ("kernels.py", "PRECISION) - delta[:, None]", "PRECISION) + delta[:, None]", "empty rows"),
    ("kernels.py", "PRECISION) - delta[None, :]", "PRECISION) + delta[None, :]", "empty rows"),
    ("kernels.py", "tl.where(factor > 0, x + tl.log(", "tl.where(factor > 0, x - tl.log(", "decay"),
    ("kernels.py", "tl.exp2((sink - base) * BASE)", "tl.exp2((sink + base) * BASE)", "sink"),
    ("kernels.py", "many * (split + 1) // splits", "many * (split + 1) // (splits + 1)", "step"),
    ("kernels.py", "place // nq, place % nq", "place // nq, place % 1", "steps"),
    ("kernels.py", "scale = tl.exp2((tops - ", "scale = tl.exp2((tops + ", "steps"),
    ("kernels.py", ".to(tl.int64), key % PAGE", ".to(tl.int64), key % 3", "pages: window"),
    ("kernels.py", "page * page_stride + entry", "page + entry", "pages: window"),
    ("kernels.py", "TABLE += b * most_pages", "TABLE += b", "pages: full units"),
    # what no query reads
    ("kernels.py", "tl.where(read, key, tl.max(", "tl.where(key >= 0, key, tl.max(", "pages: window"),
    ("kernels.py", "if PAGE else begin + lane", "if not PAGE else begin + lane", "pages: queries"),
    ("pairs.py", "found = found * sizes[i] + indices[i]", "found = found + indices[i]", "look-up"),
    ("pairs.py", "come = come * factor", "come = come", "counted"),
    (
        "pairs.py", "by_factor = tl.where(none, weight, weight / ",
        "by_factor = tl.where(none, weight, weight * ", "decay",
    ),
    ("layout.py", "_words(bits.swapaxes(1, 2))", "_words(bits)", "laws"),
    ("layout.py", "own[1][full] + 1]", "own[1][full] + 2]", "laws"),
    ("layout.py", "(line[1:] != line[:-1]) |", "(line[1:] == line[:-1]) |", "laws"),
    ("layout.py", "level != 0, np.diff(col, append=0)", "level > 0, np.diff(col, append=0)", "laws"),
)  # fmt: skip
"""File, old text, new text, and which probe is to see it."""


def mutated(file: str, old: str, new: str) -> types.ModuleType:
    """The module of the changed text, where its users find it."""
    text = (FOLDER / file).read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {file}"
    text, name = text.replace(old, new), file.removesuffix(".py")
    made = types.ModuleType(f"{plugin.__name__}.{name}")
    place = f"<{name} {hash(text)}>"
    linecache.cache[place] = len(text), None, text.splitlines(True), place
    # dataclasses look their module up
    sys.modules[made.__name__] = made
    exec(compile(text, place, "exec"), vars(made))
    return made


def seen(file: str, old: str, new: str, probe: str) -> str | None:
    """What is wrong after a change; None where nothing is."""
    made = mutated(file, old, new)
    try:
        if file == "layout.py":
            return lawful(made)
        setattr(plugin, file.removesuffix(".py"), made)
        return interpreted.KINDS["probes"](probe)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def lawful(of: types.ModuleType) -> str | None:
    """Whether layouts, by rows and by columns, have the pairs of their masks."""
    for mask in ("radius(10) | global([0, 77])", "causal", "band(-90 .. -40) | band(-30 .. 60)"):
        grid = test_triton.grid_of(mask, 200, 200, 64)
        made = of.Layout.of(grid, 32, 16)
        found = test_triton.times(made, 32)
        if not np.array_equal(found[:200, :200], grid.to_dense()):
            return "other pairs"
        if not np.array_equal(test_triton.times(made.transposed(), 16), found.T):
            return "other pairs by columns"
    return None


def main() -> None:
    for i, mutation in enumerate(MUTATIONS):
        said = seen(*mutation)
        sys.stdout.write(json.dumps([i, said]) + "\n")
        sys.stdout.flush()
        for module in (kernel, launch, layout, source):
            sys.modules[module.__name__] = module
        for name in ("kernels", "pairs"):
            vars(plugin).pop(name, None)
            sys.modules.pop(f"{plugin.__name__}.{name}", None)
        source.functions.cache_clear()


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main()
