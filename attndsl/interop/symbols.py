"""Symbols: what stands for the positions of a mask_mod while it is called.

Whatever the mod does to a symbol gives another one, which remembers the function and its arguments and holds
the value at batch row 0, head 0, query 0 and key 0. So dtypes, shapes and mistakes are torch's own, and any
part of the mod can be computed again at other positions.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import attndsl
from attndsl.errors import AttnError, Source, Span, fail

OURS = tuple(os.path.dirname(str(package.__file__)) + os.sep for package in (attndsl, torch))
CONDITION = "write `&`, `|`, `~` and `torch.where`; a chain `a <= b < c` is `(a <= b) & (b < c)`"
AT_A_POSITION = "a mod is read once for all positions: none has a value in Python"


class Place(NamedTuple):
    """An instruction of the user's code."""

    code: CodeType
    instruction: int
    line: int


class Refusal(BaseException):
    """Why a mod is not read, raised through the user's code, whose `except Exception` is not to take it.

    mistake: whether torch would not take it either.
    """

    def __init__(self, message: str, help: str = "", place: Place | None = None, mistake: bool = False):
        super().__init__(message)
        self.message, self.help, self.place, self.mistake = message, help, place, mistake

    def told(self) -> AttnError:
        """The same as a diagnostic at the user's line."""
        return fail(self.message, span_of(self.place), self.help)


def here() -> Place | None:
    """The innermost instruction that runs and is the user's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else Place(frame.f_code, frame.f_lasti, frame.f_lineno)


class Settled(Refusal):
    """One that holds though the values could be computed."""


def wrong(message: str, help: str = "") -> Refusal:
    """A mistake at what runs."""
    return Refusal(message, help, here(), mistake=True)


def span_of(place: Place | None) -> Span | None:
    """Where it is written, if its file can be read."""
    if place is None:
        return None
    name = place.code.co_filename
    lines = linecache.getlines(name)
    positions = [*place.code.co_positions()][place.instruction // 2]
    if not lines or None in positions:
        return None
    first, last, start, end = (int(part or 0) for part in positions)
    offsets = [0]
    for line in lines:
        offsets.append(offsets[-1] + len(line))

    def at(line: int, column: int) -> int:
        return offsets[line - 1] + len(lines[line - 1].encode()[:column].decode(errors="ignore"))

    source = Source(name, "".join(lines))
    if (first, start) == (last, end):
        # where a function begins stands no instruction: all of its line is meant
        return Span(source, offsets[first - 1], offsets[first] - 1)
    return Span(source, at(first, start), at(last, end))


class Symbol:
    """A tensor of the mod: what made it, and its value at the first positions.

    name:  of a position (`b`, `h`, `q`, `k`) or the score (`s`); else "".
    place: where it was made.
    """

    __slots__ = ("args", "func", "kwargs", "name", "place", "value")

    def __init__(
        self,
        value: Tensor,
        func: Callable[..., Any] | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        name: str = "",
    ) -> None:
        self.value, self.func, self.args, self.kwargs, self.name = value, func, args, kwargs, name
        self.place = here()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return applied(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"):
            return getattr(self.value, name)
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a tensor of a mod has no attribute `{name}`")
        method = getattr(torch.Tensor, name)
        if not callable(method):
            return applied(attribute(name), (self,), {})
        return lambda *args, **kwargs: applied(method, (self, *args), kwargs)

    def __repr__(self) -> str:
        return f"<symbol {self.name or named(self.func)}>"

    def _no_condition(self) -> NoReturn:
        raise wrong("Python asks whether a position, or what is made of it, is true", CONDITION)

    def _no_number(self, *_: Any) -> NoReturn:
        raise wrong("Python asks for the value of a position", AT_A_POSITION)

    def _no_text(self, *_: Any) -> NoReturn:
        raise wrong("Python asks for the text of a position", f"{AT_A_POSITION}: leave `print` out")

    __bool__ = __contains__ = _no_condition
    __int__ = __float__ = __index__ = __len__ = __hash__ = _no_number
    __iter__ = __array__ = __floor__ = __ceil__ = __round__ = __trunc__ = _no_number
    __str__ = __format__ = _no_text


def attribute(name: str) -> Callable[[Tensor], Any]:
    """What gives it, by its name."""

    def given(x: Tensor) -> Any:
        return getattr(x, name)

    given.__name__ = name
    return given


OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow and rand or ror "
    "xor rxor lshift rlshift rshift rrshift lt le gt ge eq ne neg pos invert abs getitem matmul"
)


def _operator(name: str) -> Callable[..., Any]:
    method = getattr(torch.Tensor, name)
    return lambda self, *args: applied(method, (self, *args), {})


for _name in OPERATORS.split():
    setattr(Symbol, f"__{_name}__", _operator(f"__{_name}__"))

ASKS_SHAPE = frozenset(
    "size dim numel stride is_floating_point is_complex is_contiguous element_size ndimension".split()
)
"""Methods whose answer is the same at all positions."""


def named(func: Callable[..., Any] | None) -> str:
    return getattr(func, "__name__", "")


def symbols(args: Any) -> Iterator[Symbol]:
    """Those among arguments."""
    for arg in args:
        if isinstance(arg, Symbol):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from symbols(arg)


def symbolic(args: Any) -> bool:
    """Whether a symbol is among arguments."""
    return next(symbols(args), None) is not None


def replaced(arg: Any, value: Callable[[Symbol], Any]) -> Any:
    """The argument with symbols replaced, those in lists too."""
    if isinstance(arg, Symbol):
        return value(arg)
    if isinstance(arg, list | tuple) and symbolic(arg):
        return type(arg)([replaced(part, value) for part in arg])
    return arg


def computed(symbol: Symbol, value: Callable[[Symbol], Any]) -> Any:
    """What made it, of arguments with other values."""
    assert symbol.func is not None
    args = [replaced(arg, value) for arg in symbol.args]
    return symbol.func(*args, **{name: replaced(arg, value) for name, arg in symbol.kwargs.items()})


def applied(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a function of torch gives of symbols: symbols, or tensors where no position has a say."""
    name = named(func)
    refuse_mutation(name, kwargs)
    made = Symbol.__new__(Symbol)
    made.func, made.args, made.kwargs, made.name, made.place = func, args, kwargs, "", here()
    try:
        with torch._C.DisableTorchFunction():
            result = computed(made, lambda symbol: symbol.value)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        said = str(error).strip().splitlines()[0]
        raise wrong(f"torch refuses `{name.strip('_')}` here: {said}") from None
    if (name.startswith("new_") or name.endswith("_like")) and not symbolic((*args[1:], *kwargs.values())):
        return result
    if isinstance(result, tuple) and all(isinstance(part, Tensor) for part in result):
        return type(result)([_part(made, i, part) for i, part in enumerate(result)])
    if isinstance(result, Tensor):
        made.value = result
        return made
    if name in ASKS_SHAPE:
        return result
    raise wrong(f"`{name.strip('_')}` asks for the value of a position", AT_A_POSITION)


def _part(whole: Symbol, number: int, value: Tensor) -> Symbol:
    func, name = whole.func, named(whole.func)
    assert func is not None

    def part(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)[number]

    part.__name__ = f"{name}[{number}]"
    made = Symbol(value, part, whole.args, whole.kwargs)
    made.place = whole.place
    return made


def refuse_mutation(name: str, kwargs: Mapping[str, Any]) -> None:
    inplace = name.endswith("_") and not name.endswith("__")
    if inplace or name in MUTATORS or kwargs.get("out") is not None:
        raise wrong(
            f"`{name.strip('_')}` changes a tensor, and a mod only reads",
            "change it before, or make a new one: `x = x + 1`",
        )


IN_PLACE = "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"
MUTATORS = frozenset(f"__{name}__" for name in IN_PLACE.split())


class Reading(TorchFunctionMode):
    """What holds while a mod is called: functions of symbols are written down, others run.

    trained: tensors that were computed of trained ones meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if symbolic((*args, *kwargs.values())):
            return applied(func, args, kwargs)
        refuse_mutation(named(func), kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and result.requires_grad:
            self.trained.append(result)
        return result
