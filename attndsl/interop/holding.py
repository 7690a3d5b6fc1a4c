"""What functions hold, by name: the tensors that a mod may look up."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor

DEPTH = 6
"""Functions that are made of functions."""


def names_of(*values: Any) -> dict[int, str]:
    """Names of the tensors that functions and objects hold, by the address of their storage."""
    found: dict[int, str] = {}
    for value in values:
        for name, tensor in tensors_of(value, "", DEPTH):
            found.setdefault(tensor.untyped_storage().data_ptr(), name)
    return found


def tensors_of(value: Any, name: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif depth and not isinstance(value, ModuleType | type | str | int | float):
        for inner, part in parts_of(value, name):
            yield from tensors_of(part, inner, depth - 1)


def parts_of(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What it is made of, each with its own name or that of the whole."""
    if isinstance(value, list | tuple):
        yield from ((name, part) for part in value)
    elif isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, functools.partial):
        yield from (("", value.func), ("", value.args), ("", value.keywords))
    elif isinstance(value, MethodType):
        yield from (("", value.__func__), ("", value.__self__))
    elif isinstance(value, FunctionType):
        code = value.__code__
        for free, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
            yield free, cell.cell_contents
        last = code.co_varnames[: code.co_argcount]
        yield from zip(reversed(last), reversed(value.__defaults__ or ()), strict=False)
        yield from ((free, value.__globals__[free]) for free in code.co_names if free in value.__globals__)
    elif hasattr(value, "__dict__"):
        yield from vars(value).items()
