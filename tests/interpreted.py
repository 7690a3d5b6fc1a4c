"""The kernels of the backend `triton` in numpy, by the interpreter of Triton: a script, for that is asked for
before triton is imported, and a kernel that reads beyond its operands may end the process.

    python tests/interpreted.py KIND NAMES    a line of JSON for each name: [name, what is wrong]
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import attndsl
from attndsl.conformance import CASES, Case, check
from attndsl.errors import AttnError
from attndsl.execution import torch_eval
from attndsl.tiles import residues


@dataclass(frozen=True)
class Probe:
    """A mechanism on sizes, in float64 against `reference`, gradients too."""

    text: str
    nq: int
    n: int
    heads: int = 2
    kv_heads: int = 1
    d: int = 16
    dv: int = 16
    batch: int = 2
    block: int = 32
    training: bool = True
    tables: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)


ATTENTION = "attention a{} {{ {} }}"
PROBES = {
    "causal": Probe("mask causal", 70, 70, heads=4, kv_heads=2, d=24, dv=20, batch=1),
    # several runs of full tiles in a row, and in a column
    "runs": Probe("mask band(-180 .. -100) | band(-70 .. 3) | global([0])", 230, 230, d=8, batch=1),
    "rectangle": Probe("mask radius(30)", 70, 133, d=20, dv=33, block=64),
    "per head": Probe("mask { q, k : q - k <= 30 * h and k <= q }", 90, 90, heads=4, kv_heads=2, batch=1),
    "empty rows": Probe("mask { q, k : q mod 3 == 0 and k < q }", 70, 70),
    "none": Probe("mask none", 40, 40),
    "alibi": Probe("mask causal score s - slope * |q - k|", 80, 80, heads=4, kv_heads=2),
    "distances": Probe("mask radius(25) score s + table[clamp(q - k, -5, 5) + 5] * (q - k)", 70, 70),
    "softcap": Probe("mask causal & last(50) score softcap(3.0)", 80, 80),
    "look-up": Probe("mask causal score s * x[q] + z[q mod 3, k mod 2]", 70, 70),
    "sink": Probe("mask causal & last(30) norm softmax(sink = slope)", 70, 70),
    "decay": Probe("mask radius(40) score s - 1.5 decay max(3 * slope - |q - k| / 30, 0.0)", 80, 80),
    "sigmoid": Probe("mask causal score s - slope norm sigmoid", 70, 70),
    "counted": Probe("mask radius(8) + last(4) score s * slope norm sigmoid", 50, 50),
    "relu": Probe("mask radius(20) norm relu", 70, 70, heads=3, kv_heads=1),
    "groups": Probe("heads 0 { mask causal } else { mask radius(9) score softcap(2.0) }", 70, 70),
    "vectors": Probe("mask causal & last(20) score s + (K @ u + Q @ u) / 4", 70, 70),
    "step": Probe("mask causal & last(250) | global([0..3])", 1, 700, heads=4, training=False),
    "steps": Probe("mask causal score s - slope * |q - k| norm softmax(sink = slope)", 3, 500, heads=4,
                   kv_heads=2, d=24, training=False),
    # log-sum-exps have lost digits, or there are none
    "far": Probe("mask causal & last(30) score s - 1000000000.0", 50, 50),
    "far with a sink": Probe("heads 0 { mask radius(9) score s + 5000.0 norm softmax(sink = slope) }"
                             " else { mask causal }", 50, 50),
    "negative sums": Probe("mask causal norm linear", 50, 50),
    "negative weights": Probe("mask causal norm none", 50, 50),
    "unread": Probe("mask { q, k : k <= q and k mod 3 == 0 }", 50, 50),
    # tiles of sorted entries
    "strided": Probe("mask strided(16)", 180, 180, batch=1),
    "dilated": Probe("mask dilate(4, causal & last(20)) score alibi", 130, 150, heads=4, kv_heads=2, batch=1),
    "longnet": Probe("mask causal & { q, k : q // 64 == k // 64 and q mod 4 == h and k mod 4 == h }",
                     130, 130, heads=4, kv_heads=4, d=8, dv=8, batch=1),
    "shifted": Probe("mask causal & (last(9) | { q, k : (q - k) mod 24 == 7 }) score s - slope * |q - k|",
                     130, 130, batch=1),
    "strided sink": Probe("mask strided(16) norm softmax(sink = slope)", 180, 180, batch=1),
    "strided far": Probe("mask strided(16) score s - 1000000000.0", 180, 180, batch=1),
}  # fmt: skip
PARAMETERS = {"slope": "H", "table": "H, 11", "z": "3, 2", "u": "H, D", "x": ""}


def bound(probe: Probe) -> Any:
    words = probe.text.replace("[", " [ ").replace("*", " * ").replace(")", " ) ").split()
    learned = [f"{x} = learn[{axes}](0.3)" for x, axes in PARAMETERS.items() if x in words and x != "x"]
    inputs = "inputs x : float[B, n] " if "x" in words else ""
    return attndsl.parse(ATTENTION.format(f"({', '.join(learned)})" if learned else "", inputs + probe.text))[
        "a"
    ]


def results(
    backend: str,
    probe: Probe,
    dtype: torch.dtype = torch.float64,
    laid: Callable[[Tensor], Tensor] | None = None,
    lost: str = "",
) -> Iterator[tuple[str, Tensor]]:
    """Output, log-sum-exp and all gradients of both. `laid` says how keys and values lie in memory, `lost` of
    which tensor one number is NaN: q, k, v, or what comes back to the output."""
    random = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=dtype)

    p, attention = probe, bound(probe)
    plan = attndsl.compile(
        attention, length=p.n, q_length=p.nq, batch=p.batch, heads=p.heads, kv_heads=p.kv_heads, head_dim=p.d,
        dtype=str(dtype).removeprefix("torch."), block_size=p.block, training=p.training, backend=backend,
    )  # fmt: skip
    leaves = {
        "q": drawn(p.batch, p.heads, p.nq, p.d),
        "k": drawn(p.batch, p.kv_heads, p.n, p.d),
        "v": drawn(p.batch, p.kv_heads, p.n, p.dv),
    }
    learned = {table.name: plan.initial(table) for table in attention.learned}
    learned = {name: x + 0.1 * drawn(*x.shape) for name, x in learned.items()}
    given = {table.name: drawn(p.batch, p.n) for table in attention.inputs}
    if lost in leaves:
        leaves[lost][0, 0, 7, 3] = torch.nan
    if laid is not None:
        leaves |= {"k": laid(leaves["k"]), "v": laid(leaves["v"])}
    leaves = {name: x.requires_grad_(p.training) for name, x in (leaves | learned | given).items()}
    vectors = [leaves[name] if laid else guarded(leaves[name]) for name in "qkv"]
    out, lse = plan(
        *vectors, return_lse=True, learned={x: leaves[x] for x in learned}, **{x: leaves[x] for x in given}
    )
    yield from {"out": out, "lse": lse}.items()
    if p.training:
        ends = [out, torch.where(lse.isfinite(), lse, 0.0)]
        ends = [end for end in ends if end.requires_grad]
        slopes = [drawn(*end.shape) for end in ends]
        if lost == "out":
            slopes[0][0, 0, 7, 3] = torch.nan
        grads = torch.autograd.grad(
            ends, [*leaves.values()], slopes, materialize_grads=True, allow_unused=True
        )
        yield from zip(leaves, grads, strict=True)


def guarded(x: Tensor) -> Tensor:
    """The same numbers amid NaN."""
    wide = x.new_full((*x.shape[:2], x.shape[2] + 70, x.shape[3] + 16), torch.nan)
    return wide[:, :, 32 : 32 + x.shape[2], 8 : 8 + x.shape[3]].copy_(x)


def probed(name: str) -> str | None:
    """What is wrong with a probe. `sorted NAME`: where its mask is taken apart, however small; `elsewhere
    NAME`: where nobody may look at numbers of the device of the call."""
    if (probe := name.removeprefix("elsewhere ")) != name:
        with patch.object(torch_eval, "HERE", set()):
            return probed(probe)
    if (probe := name.removeprefix("sorted ")) != name:
        with patch.object(residues, "FEW", 0), patch.object(residues, "WORTH", 1.0):
            p = PROBES[probe]
            blocks = bound(p).block_mask(p.n, p.block, q_length=p.nq, heads=p.heads)
            return probed(probe) if residues.apart(blocks) is not None else "it is not taken apart"
    exact = dict(results("reference", PROBES[name]))
    for what, mine in results("triton", PROBES[name]):
        wanted, mine = exact[what].detach(), mine.detach()
        if not torch.equal(mine == -torch.inf, wanted == -torch.inf):
            return f"{what}: other rows are -inf"
        if not torch.equal(mine.isnan(), wanted.isnan()):
            return f"{what}: other rows are NaN"
        mine, wanted = (x.masked_fill(~x.isfinite(), 0.0) for x in (mine, wanted))
        error = float((mine - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
        if not error <= 1e-12:
            return f"{what}: error {error:.2e}"
    return None


PAGED = {
    "pages: full units": ("full", [700, 333, 0], 2, 16),
    "pages: window": ("sinks", [330, 37, 61], 1, 8),
    "pages: queries": ("capped", [200, 37], 16, 5),
    "pages: documents": ("documents", [70, 37, 70], 3, 64),
    "pages: batches": ("alibi", [37, 65, 70], 1, 32),
    "pages: empty rows": ("some rows empty", [41, 50], 1, 4),
}
"""A mechanism of test_paged, tokens of each row, queries, tokens of a page."""


def probed_in_pages(name: str) -> str | None:
    """What is wrong with rows that the kernel finds in pages amid NaN, of which those that are not read have
    no number."""
    import test_paged

    from attndsl.execution import paged

    mechanism, lens, new, size = PAGED[name]
    text, served = test_paged.TEXTS[mechanism], test_paged.Served(lens, new, size)
    sizes = {"length": 700, "block_size": 32}
    wanted = served.alone(test_paged.plan_of(text, "reference", **sizes))
    served.forget(text)

    def gathered(*_: Any) -> Any:
        raise AssertionError("its keys are gathered")

    attended, paged.attended = paged.attended, gathered
    try:
        test_paged.same(served.paged(test_paged.plan_of(text, "triton", **sizes)), wanted)
    except (AssertionError, AttnError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        paged.attended = attended
    return None


def spread(name: str) -> str | None:
    """What is wrong where one number is NaN and nobody may look: a row, key or entry that has it nowhere and
    should, or other numbers. NaN may be where none belongs, unless no query reads it."""

    def lost(x: Tensor) -> Tensor:
        return x.isnan().any(-1) if x.dim() == 4 else x.isnan()

    clear = ("k", "v") if name == "unread" else ()
    for where in ("q", "k", "v", "out"):
        with patch.object(torch_eval, "HERE", set()):
            mine = dict(results("triton", PROBES[name], lost=where))
        for what, wanted in results("reference", PROBES[name], lost=where):
            hidden = lost(wanted) & ~lost(mine[what])
            apart = ((mine[what] - wanted).abs() > 1e-12) & wanted.isfinite()
            if where in clear:
                apart = lost(mine[what]) & ~lost(wanted)
            if hidden.any() or apart.any():
                return f"{what}, NaN in {where}: {int(hidden.sum())} hidden, {int(apart.sum())} others"
    return None


def conforms(name: str) -> str | None:
    # some are there twice
    case = next(case for case in CASES if str(case) == name)
    try:
        reason = check("triton", case)
    except (AssertionError, AttnError) as error:
        return f"{type(error).__name__}: {error}"
    return f"declined: {reason}" if reason else None


def work(case: Case) -> float:
    """Steps of the interpreter, about: tiles of a forward and a backward pass, and programs."""
    tile = min(64, case.block_size)
    rows, columns = -(-case.nq // tile), -(-case.n // tile)
    return case.batch * case.heads * (rows * columns + rows + columns)


def small_cases(most: float) -> list[Case]:
    """Of each mechanism the cases of little work and some keys, in float64."""
    return [
        case
        for case in CASES
        if case.dtype == "float64" and not case.odd and work(case) <= most and min(case.nq, case.n) > 0
    ]


def far_apart(name: str) -> str | None:
    """Whether it matters that the third batch row lies 2^31 numbers from the first, in memory that nobody
    touches."""

    def laid(x: Tensor) -> Tensor:
        far = 2**30 + 64
        held = torch.empty(far * (len(x) - 1) + x[0].numel(), dtype=x.dtype)
        return held.as_strided(x.shape, (far, *x.stride()[1:])).copy_(x)

    probe = replace(PROBES[name], batch=3)
    near, far = (dict(results("triton", probe, torch.float32, how)) for how in (Tensor.clone, laid))
    return None if all(torch.equal(near[what], far[what]) for what in near) else "other results"


def refused(text: str) -> str | None:
    """What a call in which a pair has no value says."""
    attention = attndsl.parse(f"attention a {{ inputs z : float[m] {text} }}")["a"]
    plan = attndsl.compile(attention, length=40, heads=2, head_dim=16, block_size=32, backend="triton")
    x = torch.randn(1, 2, 40, 16)
    try:
        plan(x, x, x, z=torch.ones(20))
    except AttnError as error:
        return error.diagnostics[0].message
    return None


def halves(dtype: str) -> str | None:
    """What is wrong in 16 bits: bfloat16 is cut there and not rounded, so that twice the error is allowed."""
    q, k, v = torch.randn(3, 1, 2, 90, 32, generator=torch.Generator().manual_seed(0)).unbind()
    attention = attndsl.parse("attention a { mask causal & last(40) score softcap(2.0) }")["a"]
    sizes: Any = {"length": 90, "heads": 2, "head_dim": 32, "block_size": 32}
    of = getattr(torch, dtype)
    mine = attndsl.compile(attention, dtype=dtype, backend="triton", **sizes)(q.to(of), k.to(of), v.to(of))
    wanted = attndsl.compile(attention, dtype="float64", backend="reference", **sizes)(
        *(x.to(of).double() for x in (q, k, v))
    )
    error = float((mine.double() - wanted).abs().max())
    return None if error < 8 * torch.finfo(of).eps else f"error {error:.2e}"


KINDS = {
    "probes": lambda name: probed_in_pages(name) if name in PAGED else probed(name),
    "spread": spread,
    "conformance": conforms,
    "apart": far_apart,
    "refused": refused,
    "halves": halves,
}


def main(kind: str, *names: str) -> None:
    for name in names:
        sys.stdout.write(json.dumps([name, KINDS[kind](name)]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    main(*sys.argv[1:])
