"""What data sheets say of devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Machine:
    """Peak FLOP/s by dtype, and bytes per second to and from memory."""

    name: str
    flops: Mapping[str, float]
    bandwidth: float


def _machine(name: str, half: float, single: float, double: float, bandwidth: float) -> Machine:
    peaks = {"float16": half, "bfloat16": half, "float32": single, "float64": double}
    return Machine(name, MappingProxyType(peaks), bandwidth)


MACHINES = (
    # NVIDIA A100 80GB SXM data sheet (2022): 312, 156 (TF32), 19.5 (FP64 tensor core) TFLOPS; 2,039 GB/s
    _machine("A100", 312e12, 156e12, 19.5e12, 2.039e12),
    # NVIDIA H100 SXM data sheet (2023): 1,979, 989 (TF32), both with sparsity, which doubles them, and 67
    # (FP64 tensor core) TFLOPS; 3.35 TB/s
    _machine("H100", 989.5e12, 494.5e12, 67e12, 3.35e12),
    # NVIDIA H200 SXM data sheet (2024): as H100; 4.8 TB/s
    _machine("H200", 989.5e12, 494.5e12, 67e12, 4.8e12),
)
"""SXM modules: dense peaks of the tensor cores, float32 as TF32."""


def sheet_of(device: str) -> Machine | None:
    """Of a device by the name that its driver gives it, such as NVIDIA H100 80GB HBM3."""
    return next((machine for machine in MACHINES if machine.name in device), None)
