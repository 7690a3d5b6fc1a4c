"""Which tiles each kernel takes on which architecture, and why a device or problem has none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

import torch

from attndsl.backend import Problem, device_kind

Kernel: TypeAlias = Literal[
    "forward", "backward_queries", "backward_keys", "backward_shared", "decode", "decode_paged"
]
"""`backward_shared` is `backward_keys` where several heads share keys, `decode_paged` `decode` of keys in
pages."""
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
Arithmetic: TypeAlias = Literal["half", "tf32", "tf32x3", "ieee"]
"""Products of 16 bits, of float32 in 10 bits of mantissa, of float32 in three of those, and of float32."""
SMALLEST, GREATEST = 16, 128
"""Queries and keys of a tile."""


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, warps of a program, and how many tiles ahead it loads."""

    queries: int
    keys: int
    warps: int
    stages: int


SHARED = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
}
"""Bytes of shared memory that a program may have, by architecture."""
Two = tuple[Config, Config]
"""Of scores that are computed at each pair, and of those that look something up there."""


def same(*of: int) -> Two:
    return Config(*of), Config(*of)


CONFIGS: dict[tuple[str, Arithmetic], dict[Kernel, dict[int, Two]]] = {
    ("sm_100", "half"): {
        "forward": dict.fromkeys((64, 128), (Config(64, 64, 8, 2), Config(128, 64, 8, 3))),
        "backward_queries": {
            64: (Config(64, 64, 8, 2), Config(128, 64, 8, 2)),
            128: (Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
        },
        "backward_keys": {64: same(64, 128, 8, 2), 128: same(32, 64, 8, 2)},
        "backward_shared": {64: same(32, 128, 8, 2), 128: same(32, 64, 8, 1)},
        "decode": {64: same(16, 64, 4, 3), 128: same(16, 64, 4, 3)},
        "decode_paged": {64: same(16, 64, 4, 3), 128: same(16, 64, 4, 3)},
    },
    ("sm_90", "half"): {
        "forward": {64: same(128, 64, 8, 3), 128: same(128, 64, 8, 3), 256: same(128, 32, 8, 2)},
        "backward_queries": {
            64: (Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
            128: (Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
            256: same(32, 64, 8, 1),
        },
        "backward_keys": {
            64: same(64, 128, 8, 2),
            128: (Config(32, 128, 8, 2), Config(32, 64, 8, 2)),
            256: same(64, 32, 8, 1),
        },
        "backward_shared": {
            64: same(32, 128, 8, 2),
            128: (Config(32, 64, 8, 1), Config(32, 32, 8, 2)),
            256: same(64, 32, 8, 1),
        },
        "decode": {64: same(16, 64, 4, 3), 128: same(16, 64, 4, 2), 256: same(16, 32, 8, 2)},
        "decode_paged": {64: same(16, 64, 4, 3), 128: same(16, 64, 4, 2), 256: same(16, 32, 8, 2)},
    },
    ("sm_90", "tf32"): {
        "forward": {64: same(128, 32, 8, 2), 128: same(64, 32, 8, 2), 256: same(32, 64, 8, 2)},
        "backward_queries": {
            64: same(64, 32, 8, 2),
            128: (Config(64, 16, 8, 2), Config(32, 32, 4, 1)),
            256: (Config(32, 64, 8, 1), Config(32, 32, 8, 2)),
        },
        "backward_keys": {
            64: (Config(32, 64, 8, 2), Config(32, 32, 8, 2)),
            128: same(32, 32, 8, 2),
            256: same(32, 32, 8, 1),
        },
        "backward_shared": {64: same(32, 32, 8, 2), 128: same(32, 32, 8, 2), 256: same(16, 32, 8, 1)},
        "decode": {64: same(16, 32, 4, 2), 128: same(16, 32, 4, 2), 256: same(16, 64, 8, 2)},
        "decode_paged": {64: same(16, 32, 8, 2), 128: same(16, 32, 4, 2), 256: same(16, 64, 8, 2)},
    },
    ("sm_90", "tf32x3"): {
        "forward": {64: same(64, 32, 4, 3), 128: same(16, 32, 4, 2)},
        "backward_queries": {64: (Config(32, 32, 4, 2), Config(32, 32, 4, 1)), 128: same(16, 32, 4, 2)},
        "backward_keys": {64: same(32, 32, 8, 1), 128: same(32, 16, 4, 1)},
        "backward_shared": {64: same(32, 32, 8, 1), 128: same(32, 16, 8, 1)},
        "decode": {64: same(16, 32, 4, 2), 128: same(16, 32, 4, 2)},
        "decode_paged": {64: same(16, 32, 4, 1), 128: same(16, 32, 4, 2)},
    },
    ("sm_80", "half"): {
        "forward": {
            64: same(128, 32, 4, 3),
            128: (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
            256: same(64, 64, 8, 2),
        },
        "backward_queries": {
            64: (Config(64, 64, 8, 2), Config(64, 32, 8, 2)),
            128: same(64, 64, 8, 2),
            256: same(64, 64, 8, 2),
        },
        "backward_keys": {64: same(32, 64, 8, 2), 128: same(64, 32, 8, 2), 256: same(32, 64, 8, 2)},
        "backward_shared": {
            64: same(32, 64, 8, 2),
            128: same(64, 32, 8, 2),
            256: (Config(32, 32, 8, 2), Config(32, 64, 8, 2)),
        },
        "decode": {64: same(16, 64, 4, 3), 128: same(16, 32, 4, 3), 256: same(16, 64, 8, 3)},
        "decode_paged": {64: same(16, 64, 4, 2), 128: same(16, 32, 4, 3), 256: same(16, 64, 8, 3)},
    },
    ("sm_80", "tf32"): {
        "forward": {64: same(64, 32, 8, 2), 128: same(64, 32, 8, 2), 256: same(32, 64, 8, 1)},
        "backward_queries": {
            64: (Config(32, 32, 4, 2), Config(32, 32, 8, 2)),
            128: same(64, 16, 8, 2),
            256: (Config(32, 32, 8, 2), Config(32, 32, 8, 1)),
        },
        "backward_keys": {
            64: (Config(32, 32, 4, 2), Config(32, 32, 8, 1)),
            128: same(32, 32, 8, 2),
            256: same(32, 32, 8, 1),
        },
        "backward_shared": {
            64: same(32, 32, 8, 2),
            128: same(32, 32, 8, 2),
            256: (Config(16, 16, 8, 1), Config(16, 32, 8, 1)),
        },
        "decode": {64: same(16, 32, 4, 2), 128: same(16, 32, 4, 2), 256: same(16, 64, 8, 2)},
        "decode_paged": {64: same(16, 32, 4, 2), 128: same(16, 32, 4, 2), 256: same(16, 64, 8, 2)},
    },
    ("sm_80", "tf32x3"): {
        "forward": {64: same(32, 64, 8, 2), 128: (Config(32, 32, 8, 1), Config(16, 32, 4, 2))},
        "backward_queries": {64: same(32, 64, 8, 2), 128: same(16, 32, 4, 2)},
        "backward_keys": {64: (Config(32, 32, 8, 2), Config(64, 32, 8, 1)), 128: same(32, 16, 8, 1)},
        "backward_shared": {64: same(32, 32, 8, 1), 128: same(32, 16, 8, 1)},
        "decode": {64: same(16, 32, 4, 2), 128: same(16, 32, 4, 2)},
        "decode_paged": {64: same(16, 32, 4, 2), 128: same(16, 32, 4, 2)},
    },
    ("gfx942", "half"): {
        "forward": {64: same(64, 64, 4, 1), 128: same(64, 32, 4, 1), 256: same(128, 32, 4, 1)},
        "backward_queries": {64: same(64, 64, 4, 1), 128: same(64, 32, 4, 1), 256: same(64, 32, 4, 1)},
        "backward_keys": {64: same(64, 64, 4, 1), 128: same(32, 64, 4, 1), 256: same(16, 64, 4, 1)},
        "backward_shared": {
            64: same(64, 64, 4, 1),
            128: same(32, 64, 4, 1),
            256: (Config(32, 16, 4, 1), Config(16, 64, 4, 1)),
        },
        "decode": {64: same(16, 64, 4, 2), 128: same(16, 64, 4, 2), 256: same(16, 32, 4, 2)},
        "decode_paged": {64: same(16, 64, 4, 2), 128: same(16, 64, 4, 2), 256: same(16, 32, 4, 2)},
    },
    ("gfx942", "ieee"): {
        "forward": {64: same(64, 64, 4, 1), 128: same(64, 32, 4, 1)},
        "backward_queries": {64: same(64, 64, 4, 1), 128: (Config(64, 32, 4, 1), Config(32, 16, 4, 1))},
        "backward_keys": {64: same(64, 32, 4, 1), 128: same(32, 32, 4, 1)},
        "backward_shared": {
            64: (Config(64, 32, 4, 1), Config(32, 64, 4, 1)),
            128: (Config(16, 32, 4, 1), Config(32, 32, 4, 1)),
        },
        "decode": {64: same(16, 64, 4, 2), 128: same(16, 64, 4, 1)},
        "decode_paged": {64: same(16, 64, 4, 2), 128: same(16, 64, 4, 1)},
    },
}
"""By the greater of the widths of queries and values, up to a power of two from 64 on: what spills nothing
when it is compiled ahead (compiled.csv)."""
CONFIGS |= {
    (name, "half"): {
        kernel: {width: two for width, two in widths.items() if width <= 128}
        for kernel, widths in CONFIGS["sm_80", "half"].items()
    }
    for name in ("sm_86", "sm_89")
}
SPILLS: dict[tuple[str, Arithmetic, int], int] = {
    ("sm_80", "tf32x3", 256): 374,
    ("sm_90", "tf32x3", 256): 372,
    ("gfx942", "ieee", 256): 1,
}
"""Widths that are left out since a kernel of dK and dV spills even with tiles of 16 x 16: the least of what
was tried, counted as in compiled.csv."""
INTERPRETED = Config(64, 64, 1, 1)


def interpreted() -> bool:
    """Whether Triton was started to run kernels in numpy, on tensors of the CPU."""
    from triton.knobs import runtime

    return bool(runtime.interpret)


@cache
def installed() -> bool:
    return find_spec("triton") is not None


def architecture(device: str) -> str:
    """As Triton's compilers name it."""
    at = torch.device(device)
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(at).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(at)
    return f"sm_{major}{minor}"


def arithmetics(name: str) -> tuple[Arithmetic, ...]:
    """Of an architecture: that of halves, and those of float32, from least to full precision. The tensor
    cores of AMD take float32 as it is."""
    return ("half", "ieee") if name.startswith("gfx") else ("half", "tf32", "tf32x3")


def arithmetic(dtype: torch.dtype) -> Arithmetic:
    """Of float32 what torch.set_float32_matmul_precision allows."""
    half, *single = arithmetics("gfx" if torch.version.hip else "sm")
    if dtype.itemsize < 4:
        return half
    return single[-1 if torch.get_float32_matmul_precision() == "highest" else 0]


def wide(width: int) -> int:
    """Up to a power of two that tiles can have."""
    return max(SMALLEST, 1 << (width - 1).bit_length())


def config(
    device: str, dtype: torch.dtype, kernel: Kernel, width: int, block_size: int, looks_up: bool
) -> Config | str:
    """For vectors that wide and a score that looks something up at pairs or not, with tiles that divide those
    of the mask; or why there is none."""
    found: Config | str = INTERPRETED
    if device_kind_of(device) != "cpu":
        found = compiled_for(architecture(device), arithmetic(dtype), kernel, width, looks_up)
    if isinstance(found, str):
        return found
    most = block_size & -block_size
    if most >= max(found.queries, found.keys):
        return found
    # smaller tiles are not worth as many warps
    return Config(min(found.queries, most), min(found.keys, most), min(found.warps, 4), found.stages)


def compiled_for(name: str, kind: Arithmetic, kernel: Kernel, width: int, looks_up: bool) -> Config | str:
    """On an architecture; or why there is none."""
    known = sorted({arch for arch, _ in CONFIGS})
    if name not in known:
        return f"nothing was compiled for {name}: it knows {', '.join(known)}"
    two = CONFIGS.get((name, kind), {}).get(kernel, {}).get(max(64, wide(width)))
    if two is not None:
        return two[looks_up]
    vectors = f"vectors of {width} numbers" + ("" if kind == "half" else " of float32")
    reason = f"nothing was compiled for {vectors} on {name}"
    if (name, kind, wide(width)) in SPILLS:
        reason = f"{vectors} do not fit its registers on {name}"
    if kind == "tf32x3" and isinstance(compiled_for(name, "tf32", kernel, width, looks_up), Config):
        return f"{reason} to full precision: torch.set_float32_matmul_precision('high') asks for less"
    return reason


MOST_SPLITS = 64
"""Parts of the keys of one step."""


def splits_of(device: torch.device, programs: int, units: int) -> int:
    """Parts that units of keys are split into, so that all processors have work and each part some units."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    )
    return max(1, min(MOST_SPLITS, 2 * processors // programs, units // 2))


def device_kind_of(device: str) -> str:
    return device.partition(":")[0]


def declined(problem: Problem) -> str | None:
    """Why there are no kernels for the problem, whatever the attention."""
    if not installed():
        return "triton is not installed"
    kind = device_kind(problem)
    if interpreted():
        if kind != "cpu":
            return "TRITON_INTERPRET is set: its kernels run on the CPU, for tests"
    elif kind == "cpu":
        return "its kernels run on GPUs"
    elif not torch.cuda.is_available():
        return "there is no GPU"
    elif problem.dtype == "float64":
        return "kernels in float64 have no tensor cores and do not fit the registers"
    if problem.block_size % SMALLEST:
        return f"tiles of {problem.block_size} tokens are no multiple of {SMALLEST}"
    keys: Kernel = "backward_keys" if problem.heads == problem.kv_heads else "backward_shared"
    kernels: tuple[Kernel, ...] = ("forward", "backward_queries", keys)
    for kernel in kernels if problem.training else kernels[:1]:
        dtype = getattr(torch, problem.dtype)
        found = config(problem.device, dtype, kernel, problem.head_dim, problem.block_size, True)
        if isinstance(found, str):
            return found
    return None
