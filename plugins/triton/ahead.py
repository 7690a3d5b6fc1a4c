"""Kernels compiled ahead, without a GPU, and what they take: registers, spills, shared memory, tensor cores.

    python -m attndsl.plugins.triton.ahead [sm_90 ...]

compiles what of `matrix` is missing in compiled.csv or was made of another text, on these architectures or on
all. A row is the evidence for a configuration; `digest` is of everything that it was compiled from. The last
rows are of what is declined, with the reason that plans tell.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attndsl.emit.leaves import Leaf
from attndsl.emit.score import Score
from attndsl.emit.triton import Written
from attndsl.program import parse

from .configs import CONFIGS, KERNELS, Arithmetic, Config, arithmetics, compiled_for
from .source import functions, looks_up, score_of_pairs

FILE = Path(__file__).with_name("compiled.csv")
PINNED = "3.7.1"
"""Of Triton: spills move between versions."""
SCORES = {
    "plain": "attention a { mask causal }",
    "alibi": "attention a { mask causal score alibi }",
    "softcap": "attention a { mask causal score softcap(30.0) }",
    "distances": "attention a(table = learn[H, 32](0.1)) { mask causal score t5(table) }",
}
"""A table by distance is learned: its gradient is scattered."""
DTYPES: dict[Arithmetic, tuple[str, ...]] = {
    "half": ("bfloat16", "float16"),
    **dict.fromkeys(("tf32", "tf32x3", "ieee"), ("float32",)),
}
WIDTHS = (64, 128, 256)
WHOLE = ("sm_80", "sm_90", "gfx942")
GROUP = 4
"""Heads that share keys where some do."""
FUNCTIONS = {"backward_shared": "backward_keys", "decode_paged": "decode"}
"""The function of a kernel, where it has another name."""
PAGE = 16
"""Tokens of a page."""


@dataclass(frozen=True)
class Cell:
    """What is compiled. `merge` has no configuration: it is compiled with `decode`'s."""

    architecture: str
    kernel: str
    score: str
    dtype: str
    arithmetic: Arithmetic
    width: int

    @property
    def config(self) -> Config:
        kernel: Any = "decode" if self.kernel == "merge" else self.kernel
        return CONFIGS[self.architecture, self.arithmetic][kernel][self.width][looks_up(self.computed)]

    @property
    def computed(self) -> Score:
        return _computed(self.score, self.width)

    @property
    def wanted(self) -> frozenset[Leaf]:
        backward = self.kernel.startswith("backward") and self.score == "distances"
        return frozenset(self.computed.leaves) if backward else frozenset()

    @property
    def digest(self) -> str:
        """Of the text that is compiled, without comments, and all that it is compiled with."""
        written = Written(self.computed, self.wanted).text
        called = {x.id for x in ast.walk(ast.parse(written)) if isinstance(x, ast.Name)}
        texts = [_used({FUNCTIONS.get(self.kernel, self.kernel), *called}), written]
        return hashlib.sha256(
            "\n".join([*texts, repr(self), repr(self.config), PINNED]).encode()
        ).hexdigest()[:16]


@dataclass(frozen=True)
class Figures:
    """Per thread registers, and instructions that move spilled ones; bytes of shared memory; instructions of
    tensor cores."""

    registers: int
    spills: int
    shared: int
    tensor_core: int


def matrix() -> Iterator[Cell]:
    """Every kernel that has a configuration; `merge` sees no score and no halves. float16 differs from
    bfloat16 in one instruction, so that beyond WHOLE it is tried plain."""
    for (architecture, arithmetic), kernels in CONFIGS.items():
        dtypes = DTYPES[arithmetic]
        for kernel, widths in kernels.items():
            for dtype, width, score in itertools.product(dtypes, widths, SCORES):
                if dtype != "float16" or architecture in WHOLE or score == "plain":
                    yield Cell(architecture, kernel, score, dtype, arithmetic, width)
        for width in kernels["decode"]:
            yield Cell(architecture, "merge", "plain", dtypes[0], arithmetic, width)


def declined() -> dict[Cell, str]:
    """What has no configuration, with `every` score, and why."""
    found = {}
    for architecture in dict.fromkeys(name for name, _ in CONFIGS):
        for arithmetic in arithmetics(architecture):
            for kernel, dtype, width in itertools.product(KERNELS, DTYPES[arithmetic], WIDTHS):
                reason = compiled_for(architecture, arithmetic, kernel, width, False)
                if isinstance(reason, str):
                    found[Cell(architecture, kernel, "every", dtype, arithmetic, width)] = reason
    return found


@cache
def _computed(name: str, width: int) -> Score:
    (group,) = parse(SCORES[name])["a"].attention.groups
    score = score_of_pairs(group, width, True)
    assert isinstance(score, Score)
    return score


@cache
def _definitions() -> dict[str, ast.stmt]:
    """What the kernels' files define, by name."""
    found: dict[str, ast.stmt] = {}
    for name in ("kernels.py", "pairs.py"):
        for node in ast.parse(FILE.with_name(name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                node.body = [x for x in node.body if not _is_text(x)] or [ast.Pass()]
                found[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _used(names: set[str]) -> str:
    """The text of functions and of all that they use."""
    known, seen = _definitions(), set[str]()
    waiting = sorted(names)
    while waiting:
        name = waiting.pop()
        if name in known and name not in seen:
            seen.add(name)
            waiting += [x.id for x in ast.walk(known[name]) if isinstance(x, ast.Name)]
    return "\n".join(ast.unparse(known[name]) for name in sorted(seen))


POINTERS = {
    "*{dtype}": ("Q", "K", "V", "GRAD_OUT"),
    "*fp32": ("OUT", "GQ", "GK", "GV", "LSE", "TOP", "SUM", "SINK", "LEVEL", "SHARE", "DELTA", "PARTS"),
    "*i64": ("leaves", "sizes", "slopes", "WRONG"),
    "*i32": (
        "GRID", "HEADS", "TABLE", "order", "words", "run_ptr", "run_start", "run_end", "part_ptr", "part_at",
        "part_content", "units", "unit_at",
    ),
    "fp32": ("packed", "unit"),
}  # fmt: skip
"""Arguments by their type; the others are i32. Pointers and strides are multiples of 16."""


def signature(cell: Cell, kernel: Any) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Of the function of a cell: types of arguments, those that are constants, and which are aligned."""
    import triton.language as tl

    made, tile = functions(cell.computed, cell.wanted), cell.config
    side = "key" if kernel.__name__ == "backward_keys" else "query"
    named = {name.upper(): f"{name}_{side}" for name in ("held", "slopes", "begin", "finish")}
    constants: dict[str, Any] = {
        "LEAVES": max(1, len(cell.computed.leaves)), "DIVIDED": False, "CHECKED": made.written.checked,
        "SUNK": False, "TOPS": False, "NORM": made.written.norm, "SPLITS": 16,
        "PAGE": PAGE if cell.kernel == "decode_paged" else 0,
        "SHARED_BY": 1 if cell.kernel == "backward_keys" else GROUP,
        "PRECISION": "ieee" if cell.arithmetic == "half" else cell.arithmetic,
        "BM": tile.queries, "BN": tile.keys, "D": cell.width, "WIDE_D": cell.width, "DV": cell.width,
        "WIDE_DV": cell.width, "REAL": tl.float32, "WHOLE": tl.int32,
        "SCORE": made["score"], **{name: made[function] for name, function in named.items()},
    }  # fmt: skip
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[cell.dtype]
    types = {name: kind.format(dtype=dtype) for kind, names in POINTERS.items() for name in names}
    names = kernel.arg_names
    found = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if found[name][0] == "*" or re.fullmatch("[qkv][bhn]", name)]
    return found, {name: x for name, x in constants.items() if name in names}, aligned


def compiled(cell: Cell) -> Figures:
    """Compiles a cell, which takes seconds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from . import kernels

    kernel, tile = getattr(kernels, FUNCTIONS.get(cell.kernel, cell.kernel)), cell.config
    types, constants, aligned = signature(cell, kernel)
    hints = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, types, constexprs=constants, attrs=hints)
    hip = cell.architecture.startswith("gfx")
    target = (
        GPUTarget("hip", cell.architecture, 64) if hip else GPUTarget("cuda", int(cell.architecture[3:]), 32)
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    done = triton.compile(source, target=target, options=options)
    return _of_amd(done) if hip else _of_nvidia(done, Path(triton.__file__).parent)


def _of_amd(done: Any) -> Figures:
    text = done.asm["amdgcn"]
    registers, spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    return Figures(registers, spills, done.metadata.shared, text.count("v_mfma"))


def _of_nvidia(done: Any, folder: Path) -> Figures:
    tools = folder / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run(
                [tools / name, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for name, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    products = sum(done.asm["ptx"].count(name) for name in ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Figures(int(registers[1]), spills, done.metadata.shared, products)


def read() -> tuple[dict[Cell, tuple[Figures, str]], dict[Cell, str]]:
    """What was compiled, with the digest of its time, and what is declined, with the reason."""
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    done = {_made(Cell, row): (_made(Figures, row), row["digest"]) for row in rows if row["digest"]}
    return done, {_made(Cell, row): row["declined"] for row in rows if row["declined"]}


def _made(kind: Any, row: Mapping[str, str]) -> Any:
    return kind(**{x.name: int(row[x.name]) if x.type == "int" else row[x.name] for x in fields(kind)})


def write(found: Mapping[Cell, tuple[Figures, str]]) -> None:
    names = [[x.name for x in fields(kind)] for kind in (Cell, Config, Figures)]
    with FILE.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow([*itertools.chain(*names), "digest", "declined"])
        for cell, (figures, digest) in found.items():
            out.writerow(
                [*vars(cell).values(), *vars(cell.config).values(), *vars(figures).values(), digest, ""]
            )
        blank = [""] * (len(names[1]) + len(names[2]) + 1)
        for cell, reason in declined().items():
            out.writerow([*vars(cell).values(), *blank, reason])


def main(architectures: list[str]) -> None:
    assert version("triton") == PINNED, f"figures are of triton {PINNED}"
    cells, known = list(matrix()), read()[0]
    found = {cell: known[cell] for cell in cells if cell in known}
    stale = [cell for cell in cells if cell not in found or found[cell][1] != cell.digest]
    asked = [cell for cell in stale if not architectures or cell.architecture in architectures]
    with ProcessPoolExecutor() as pool:
        for cell, figures in zip(asked, pool.map(compiled, asked), strict=True):
            print(cell, figures, flush=True)  # noqa: T201
            found[cell] = figures, cell.digest
            write({cell: found[cell] for cell in cells if cell in found})
    write({cell: found[cell] for cell in cells if cell in found})


if __name__ == "__main__":
    main(sys.argv[1:])
