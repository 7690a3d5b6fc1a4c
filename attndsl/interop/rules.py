"""Operations of torch that the language has, each as an expression of its arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.expr import Expr, IntSet
from attndsl.interop.symbols import Refusal, Settled, Symbol, named
from attndsl.meaning.intervals import bounds as interval

if TYPE_CHECKING:
    from attndsl.interop.reading import Reader, Value

Rule: TypeAlias = "Callable[[Reader, Symbol], Value]"
Elements = NDArray[Any]

EXACT = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24, torch.float64: 2**53}
"""Integers up to here are numbers of a dtype."""
REAL_TYPES = frozenset(EXACT)
NARROW = frozenset((torch.uint8, torch.int8, torch.int16, torch.int32))
RUNS = 4
"""Runs of bits up to which an integer `&` a constant is written out."""


def number_of(e: Expr) -> Expr:
    """A truth as 0 or 1."""
    return ir.where(e, ir.ONE, ir.ZERO) if e.type == "bool" else e


def real(e: Expr) -> Expr:
    """A number as a real one."""
    value = ir.number(e)
    return (
        e if e.type == "real" else ir.const(float(value)) if value is not None else ir.add(e, ir.const(0.0))
    )


def truth(e: Expr) -> Expr:
    """Whether it is not 0."""
    if e.type == "bool":
        return e
    if e.type == "real" and "s" not in e.free:
        raise Refusal("a real number of positions is asked whether it is 0", EXACTLY)
    return ir.negate(ir.eq(e, ir.ZERO))


EXACTLY = "torch rounds it, and a mask is exact: compute with integers, as `//` does"


class Fitting:
    """Values of one symbol as in torch, which wraps integers and rounds real numbers: what torch holds as a
    real number and is an integer here is exact."""

    def __init__(self, reader: Reader, symbol: Symbol) -> None:
        self.reader, self.dtype = reader, symbol.value.dtype

    def __call__(self, e: Expr) -> Expr:
        if self.dtype in REAL_TYPES:
            return e if e.type == "real" or self.reader.within(e, EXACT[self.dtype]) else real(e)
        if self.dtype not in (torch.int64, torch.bool):
            info = torch.iinfo(self.dtype)
            low, high = self.reader.bounds(e)
            if low < info.min or high > info.max:
                least = ir.const(info.min)
                return ir.add(ir.mod(ir.sub(e, least), ir.const(2**info.bits)), least)
        return e

    def number(self, e: Expr) -> Expr:
        """An argument as a number of this type, before it is computed with."""
        return self(number_of(e)) if self.dtype in REAL_TYPES else number_of(e)


def elementwise(f: Callable[..., Expr], fits: bool = True) -> Rule:
    """f of the numbers of all arguments."""

    def rule(reader: Reader, symbol: Symbol) -> Value:
        plain(symbol)
        fit = Fitting(reader, symbol) if fits else None

        def one(*args: Expr) -> Expr:
            return fit(f(*map(fit.number, args))) if fit else f(*map(number_of, args))

        return spread(one, [reader.elements(arg) for arg in symbol.args])

    return rule


def plain(symbol: Symbol, *known: str) -> None:
    """Raises Refusal for keywords that are not `known`, and for numbers that torch would wrap."""
    given = (*symbol.args, *symbol.kwargs.values())
    for dtype in {arg.dtype for arg in given if isinstance(arg, Symbol | Tensor)} & NARROW:
        for arg in given:
            if isinstance(arg, int) and not torch.iinfo(dtype).min <= arg <= torch.iinfo(dtype).max:
                raise Refusal(
                    f"{arg} is beyond {str(dtype).removeprefix('torch.')}", "write `.long()` before it"
                )
    for name, value in symbol.kwargs.items():
        if name not in known and not (name == "inplace" and not value):
            raise Refusal(f"`{name}=` of `{named(symbol.func).strip('_')}` is not read")


def spread(f: Callable[..., Expr], arrays: Sequence[Elements]) -> Value:
    """f over elements, broadcast."""
    if all(array.ndim == 0 for array in arrays):
        return f(*(array.item() for array in arrays))
    joined = np.broadcast_arrays(*arrays)
    found = np.empty(joined[0].shape, object)
    for at in np.ndindex(found.shape):
        found[at] = f(*(array[at] for array in joined))
    return found


def swapped(rule: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    return lambda a, b: rule(b, a)


def arithmetic(f: Callable[[Expr, Expr], Expr], of_truths: Callable[[Expr, Expr], Expr]) -> Rule:
    """Of truths torch makes a truth."""
    numbers = elementwise(f)

    def rule(reader: Reader, symbol: Symbol) -> Value:
        if symbol.value.dtype is torch.bool:
            plain(symbol)
            return spread(of_truths, [reader.elements(arg) for arg in symbol.args])
        return numbers(reader, symbol)

    return rule


def times(a: Expr, b: Expr) -> Expr:
    """a * b, which is b where a is 1, also a real one."""
    if ir.number(a) == 1:
        return b
    return a if ir.number(b) == 1 else ir.mul(a, b)


def _divisor(b: Expr) -> int:
    value = ir.number(b)
    if value is None:
        raise Refusal("it divides by what differs from position to position", "divide by a constant")
    if value == 0:
        raise Refusal("it divides by 0", mistake=True)
    if value != int(value):
        raise Refusal("it divides by a real number and rounds", EXACTLY)
    return int(value)


def _whole(e: Expr) -> Expr:
    if e.type == "real":
        raise Refusal("it rounds a real number", EXACTLY)
    return e


def floordiv(a: Expr, b: Expr) -> Expr:
    c = _divisor(b)
    return ir.floordiv(_whole(a) if c > 0 else ir.neg(_whole(a)), ir.const(abs(c)))


def remainder(a: Expr, b: Expr) -> Expr:
    c = _divisor(b)
    return ir.mod(_whole(a), ir.const(c)) if c > 0 else ir.neg(ir.mod(ir.neg(_whole(a)), ir.const(-c)))


def truncated(a: Expr, b: Expr) -> Expr:
    c = _divisor(b)
    a = _whole(a) if c > 0 else ir.neg(_whole(a))
    size = ir.const(abs(c))
    return ir.where(ir.lt(a, ir.ZERO), ir.neg(ir.floordiv(ir.neg(a), size)), ir.floordiv(a, size))


def fmod(a: Expr, b: Expr) -> Expr:
    return ir.sub(a, ir.mul(ir.const(_divisor(b)), truncated(a, b)))


def divided(a: Expr, b: Expr) -> Expr:
    if ir.number(b) == 0:
        raise Refusal("it divides by 0", "guard it: `torch.where(x == 0, ..., y / x)` divides all the same")
    return ir.div(real(a), b)


def division(reader: Reader, symbol: Symbol) -> Value:
    plain(symbol, "rounding_mode")
    f = {None: divided, "floor": floordiv, "trunc": truncated}[symbol.kwargs.get("rounding_mode")]
    fit = Fitting(reader, symbol)
    arrays = [reader.elements(arg) for arg in symbol.args]
    return spread(lambda a, b: fit(f(fit.number(a), fit.number(b))), arrays)


def power(a: Expr, b: Expr) -> Expr:
    exponent = ir.number(b)
    if a.type == b.type == "int" and not (isinstance(exponent, int) and exponent >= 0):
        raise Refusal("an integer to a power that is no constant", EXACTLY)
    return ir.power(a, b)


def powers(swap: bool = False) -> Rule:
    def rule(reader: Reader, symbol: Symbol) -> Value:
        plain(symbol)
        fit = Fitting(reader, symbol)

        def one(a: Expr, b: Expr) -> Expr:
            a, b = (fit.number(x) for x in ((b, a) if swap else (a, b)))
            exponent = ir.number(b)
            whole = a.type == "int" and isinstance(exponent, int) and exponent >= 0
            return fit(power(a if whole or fit.dtype not in REAL_TYPES else real(a), b))

        return spread(one, [reader.elements(arg) for arg in symbol.args])

    return rule


def bits_and(x: Expr, c: int) -> Expr:
    """x & c, of runs of bits, also where x is negative: both are two's complements."""
    if c < 0:
        return ir.sub(x, bits_and(x, ~c))
    parts, low = [], 0
    while c >> low:
        if c >> low & 1:
            length = (~(c >> low) & (c >> low) + 1).bit_length() - 1
            run = ir.mod(ir.floordiv(x, ir.const(1 << low)), ir.const(1 << length))
            parts.append(ir.mul(ir.const(1 << low), run))
            low += length
        low += 1
    if len(parts) > RUNS:
        raise Refusal(f"a constant of `&` has {len(parts)} runs of bits")
    return ir.add(*parts)


def bitwise(of_truths: Callable[[Expr, Expr], Expr], of_bits: Callable[[Expr, int], Expr]) -> Rule:
    def one(a: Expr, b: Expr) -> Expr:
        if a.type == b.type == "bool":
            return of_truths(a, b)
        a, b = number_of(a), number_of(b)
        if a.op == "const":
            a, b = b, a
        if b.op != "const":
            raise Refusal("bits of two positions are joined", "compare them first: `&` and `|` join truths")
        return of_bits(a, b.value)  # type: ignore[arg-type]

    def rule(reader: Reader, symbol: Symbol) -> Value:
        plain(symbol)
        fit = Fitting(reader, symbol)
        return spread(lambda a, b: fit(one(a, b)), [reader.elements(arg) for arg in symbol.args])

    return rule


def both(a: Expr, b: Expr) -> Expr:
    return ir.all_of(a, b)


def either(a: Expr, b: Expr) -> Expr:
    return ir.any_of(a, b)


def differ(a: Expr, b: Expr) -> Expr:
    return ir.any_of(ir.all_of(a, ir.negate(b)), ir.all_of(ir.negate(a), b))


def same(a: Expr, b: Expr) -> Expr:
    return ir.any_of(ir.all_of(a, b), ir.all_of(ir.negate(a), ir.negate(b)))


def shift(f: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    def rule(a: Expr, b: Expr) -> Expr:
        low, high = interval(b, {}, {})
        # a divisor is the same at all positions, a factor need not be
        if b.type != "int" or low < 0 or high > 62 or (f is ir.floordiv and low < high):
            raise Refusal("a shift by what is no constant from 0 to 62")
        return f(a, ir.power(ir.const(2), b, True))

    return rule


def logical(f: Callable[..., Expr]) -> Rule:
    def rule(reader: Reader, symbol: Symbol) -> Value:
        plain(symbol)
        return spread(lambda *args: f(*map(truth, args)), [reader.elements(arg) for arg in symbol.args])

    return rule


def complement(reader: Reader, symbol: Symbol) -> Value:
    if symbol.value.dtype is not torch.bool:
        raise Settled(
            "`~` of an integer is `-x - 1`, and no truth",
            "for what is not so compare first: `~(x == y)`; for the number write `-x - 1`",
        )
    return spread(ir.negate, [reader.elements(symbol.args[0])])


def compared(op: str) -> Rule:
    def rule(reader: Reader, symbol: Symbol) -> Value:
        plain(symbol)
        left, right = symbol.args
        values = [arg.value if isinstance(arg, Symbol) else arg for arg in (left, right)]
        dtype = torch.result_type(*values)
        one = functools.partial(comparison, reader, op, dtype)
        return spread(one, [reader.elements(arg) for arg in (left, right)])

    return rule


COMPARED: dict[str, Callable[[Expr, Expr], Expr]] = {
    "lt": ir.lt, "le": ir.le, "gt": swapped(ir.lt), "ge": swapped(ir.le), "eq": ir.eq,
    "ne": lambda a, b: ir.negate(ir.eq(a, b)),
}  # fmt: skip


def comparison(reader: Reader, op: str, dtype: torch.dtype, a: Expr, b: Expr) -> Expr:
    if dtype is torch.bool and op in ("eq", "ne"):
        return (same if op == "eq" else differ)(a, b)
    a, b = number_of(a), number_of(b)
    if a.op == "const" and b.op != "const":
        mirrored = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
        return comparison(reader, mirrored.get(op, op), dtype, b, a)
    if dtype not in REAL_TYPES:
        return COMPARED[op](a, b)
    if "s" in a.free | b.free:
        return COMPARED[op](a, b)
    if a.type == "real" or (b.type == "real" and b.op != "const"):
        raise Refusal("real numbers of positions are compared", EXACTLY)
    if b.op != "const":
        if not (reader.within(a, EXACT[dtype]) and reader.within(b, EXACT[dtype])):
            raise Refusal(
                "real numbers of positions are compared, and of long sequences torch rounds them",
                "compare integers, or say how long the sequence is: `length=`",
            )
        return COMPARED[op](a, b)
    # torch rounds both, which moves no integer past a number that is far below where rounding begins
    bound = torch.tensor(b.value, dtype=dtype).item()
    if abs(bound) > EXACT[dtype] // 2:
        raise Refusal("a position is compared with a large real number", EXACTLY)
    low, high = math.floor(bound), math.ceil(bound)
    if low != high and op in ("eq", "ne"):
        return ir.const(op == "ne")
    return COMPARED[op](a, ir.const(high if op in ("lt", "ge") else low))


def where(reader: Reader, symbol: Symbol) -> Value:
    plain(symbol, "input", "other")
    if len(symbol.args) + len(symbol.kwargs) != 3:
        raise Refusal("`where` of a condition alone lists positions")
    others = [symbol.kwargs[name] for name in ("input", "other") if name in symbol.kwargs]
    arrays = [reader.elements(arg) for arg in (*symbol.args, *others)]
    return spread(functools.partial(chosen, Fitting(reader, symbol)), arrays)


def chosen(fit: Fitting, cond: Expr, a: Expr, b: Expr) -> Expr:
    cond = truth(cond)
    if fit.dtype is torch.bool:
        return ir.any_of(ir.all_of(cond, a), ir.all_of(ir.negate(cond), b))
    return ir.where(cond, fit.number(a), fit.number(b))


def filled(reader: Reader, symbol: Symbol) -> Value:
    plain(symbol)
    x, mask, value = (reader.elements(arg) for arg in symbol.args)
    fit = Fitting(reader, symbol)
    return spread(lambda x, mask, value: chosen(fit, mask, value, x), [x, mask, value])


def clamped(reader: Reader, symbol: Symbol) -> Value:
    plain(symbol, "min", "max")
    x, *ends = symbol.args
    low, high = (*ends, None, None)[:2]
    low, high = symbol.kwargs.get("min", low), symbol.kwargs.get("max", high)
    fit, found = Fitting(reader, symbol), reader.elements(x)
    for end, f in ((low, ir.maximum), (high, ir.minimum)):
        if end is not None:
            found = as_elements(
                spread(lambda a, b, f=f: fit(f(fit.number(a), fit.number(b))), [found, reader.elements(end)])
            )
    return found.item() if found.ndim == 0 else found


def as_elements(value: Value) -> Elements:
    if isinstance(value, Expr):
        found = np.empty((), object)
        found[()] = value
        return found
    return np.asarray(value, object)


def extreme(f: Callable[[Expr, Expr], Expr]) -> Rule:
    """Of two tensors, or the one of a tensor."""
    pairs = elementwise(f)

    def rule(reader: Reader, symbol: Symbol) -> Value:
        if len(symbol.args) == 2 and isinstance(symbol.args[1], Symbol | Tensor):
            return pairs(reader, symbol)
        return reduced(f)(reader, symbol)

    return rule


def reduced(f: Callable[..., Expr], of_truths: bool = False) -> Rule:
    """f over some axes, or all."""

    def rule(reader: Reader, symbol: Symbol) -> Value:
        x, *rest = symbol.args
        dim = symbol.kwargs.get("dim", symbol.kwargs.get("axis", rest[0] if rest else None))
        elements = reader.elements(x)
        if elements.ndim == 0:
            return elements.item() if not of_truths else truth(elements.item())
        axes = range(elements.ndim) if dim in (None, ()) else [dim] if isinstance(dim, int) else dim
        moved = np.moveaxis(elements, list(axes), range(len(axes)))
        rows = moved.reshape(math.prod(moved.shape[: len(axes)]), -1)
        if not len(rows):
            raise Refusal("a row without entries")
        fit = Fitting(reader, symbol)
        ready: Callable[[Expr], Expr] = truth if of_truths else fit.number
        found = np.empty(rows.shape[1], object)
        for i, column in enumerate(rows.T):
            parts = [ready(e) for e in column]
            found[i] = f(*parts) if of_truths else fit(functools.reduce(f, parts))
        shaped = found.reshape(tuple(symbol.value.shape))
        return shaped.item() if shaped.ndim == 0 else shaped

    return rule


def dot(reader: Reader, symbol: Symbol) -> Value:
    plain(symbol)
    return inner(reader, *symbol.args)


def summed(reader: Reader, symbol: Symbol) -> Value:
    """`(x * y).sum()` is an inner product."""
    x = symbol.args[0]
    if isinstance(x, Symbol) and operation(x) == "mul" and x.value.ndim == 1 and x.value.dtype in REAL_TYPES:
        return inner(reader, *x.args)
    return reduced(ir.add)(reader, symbol)


def inner(reader: Reader, *sides: Any) -> Value:
    """Of two rows that are looked up as that of vectors, else number by number."""
    a, b = (reader.vector(side) for side in sides)
    if a is not None and b is not None:
        return ir.inner(a, b)
    parts = np.broadcast_arrays(*(reader.elements(side) for side in sides))
    return ir.add(
        *(ir.mul(number_of(a), number_of(b)) for a, b in zip(*(part.flat for part in parts), strict=True))
    )


def some(reader: Reader, symbol: Symbol) -> Value:
    """`(row == x).any()` is a member of a set."""
    found = member_of(reader, symbol, "eq")
    return reduced(ir.any_of, of_truths=True)(reader, symbol) if found is None else found


def every(reader: Reader, symbol: Symbol) -> Value:
    found = member_of(reader, symbol, "ne")
    return reduced(ir.all_of, of_truths=True)(reader, symbol) if found is None else ir.negate(found)


def member_of(reader: Reader, symbol: Symbol, op: str) -> Expr | None:
    x = symbol.args[0]
    if not isinstance(x, Symbol) or symbol.value.ndim or operation(x) != op or x.value.ndim != 1:
        return None
    for row, one in (x.args, x.args[::-1]):
        if at_origin(one).numel() == 1 and at_origin(row).ndim == 1:
            return membership(reader, one, row)
    return None


def at_origin(arg: Any) -> Tensor:
    return arg.value if isinstance(arg, Symbol) else torch.as_tensor(arg)


def membership(reader: Reader, one: Any, row: Any) -> Expr | None:
    """Whether an integer is among a row of integers, if the row is looked up or known."""
    if any(at_origin(arg).dtype in (torch.bool, *REAL_TYPES) for arg in (one, row)):
        return None
    (e,) = reader.elements(one).flat
    if not isinstance(row, Symbol):
        return ir.inset(e, IntSet.of((v, v) for v in row.flatten().tolist()))
    return reader.member(e, row)


def is_in(reader: Reader, symbol: Symbol) -> Value:
    plain(symbol, "test_elements", "elements", "assume_unique", "invert")
    one, row = (*symbol.args, symbol.kwargs.get("test_elements"))[:2]
    found = None
    if isinstance(one, Symbol) and one.value.ndim == 0 and isinstance(row, Symbol | Tensor):
        found = membership(reader, one, row)
    if found is None:
        raise Refusal("`isin` of what are no integers in one row")
    return ir.negate(found) if symbol.kwargs.get("invert") else found


def cast(reader: Reader, symbol: Symbol) -> Value:
    """To another dtype, or none."""
    dtype, fit = symbol.value.dtype, Fitting(reader, symbol)

    def one(e: Expr) -> Expr:
        if dtype is torch.bool:
            return truth(e)
        e = number_of(e)
        if e.type == "real" and dtype not in REAL_TYPES:
            raise Refusal("it rounds a real number to an integer", EXACTLY)
        return fit(e)

    return spread(one, [reader.elements(symbol.args[0])])


def rounded(reader: Reader, symbol: Symbol) -> Value:
    plain(symbol)

    def one(e: Expr) -> Expr:
        if e.type != "real":
            return e
        if named(symbol.func) == "floor" and "s" in e.free:
            return real(ir.call("floor", e))
        raise Refusal("it rounds a real number", EXACTLY)

    return spread(one, [reader.elements(symbol.args[0])])


def function(name: str) -> Rule:
    return elementwise(lambda x: ir.call(name, real(x)), fits=False)


def of_real(f: Callable[[Expr], Expr]) -> Rule:
    return elementwise(lambda x: f(real(x)), fits=False)


def moved(reader: Reader, symbol: Symbol) -> Value:
    """The same entries in other places: told by what torch does to their numbers."""
    parts: list[Elements] = []

    def numbers(arg: Any) -> Any:
        if isinstance(arg, Symbol | Tensor):
            elements = reader.elements(arg)
            first = sum(part.size for part in parts)
            parts.append(elements)
            return torch.arange(first, first + elements.size).reshape(elements.shape)
        if isinstance(arg, list | tuple) and any(isinstance(x, Symbol | Tensor) for x in arg):
            return type(arg)([numbers(x) for x in arg])
        return arg

    first, *rest = symbol.args
    assert symbol.func is not None
    places = symbol.func(numbers(first), *rest, **symbol.kwargs)
    entries = np.concatenate([part.ravel() for part in parts])
    found: Value = entries[places.numpy()]
    return found


def operation(symbol: Symbol) -> str:
    """The name of what made it, as in RULES."""
    name = named(symbol.func)
    bare = name.strip("_")
    return ALIASES.get(bare, bare)


ALIASES = {
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne",
    "subtract": "sub", "multiply": "mul", "true_divide": "div", "divide": "div", "truediv": "div",
    "floor_divide": "floordiv", "remainder": "mod", "negative": "neg", "invert": "bitwise_not",
    "absolute": "abs", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "clip": "clamp", "bitwise_left_shift": "lshift", "bitwise_right_shift": "rshift", "concat": "cat",
    "concatenate": "cat", "rtruediv": "rdiv", "special_exp2": "exp2", "special_expit": "sigmoid",
    "expit": "sigmoid", "fix": "trunc", "special_log1p": "log1p", "type_as": "to", "type": "to",
}  # fmt: skip


def softplus(x: Expr) -> Expr:
    tail = ir.call("log", ir.add(ir.const(1.0), ir.call("exp", ir.neg(ir.absolute(x)))))
    return ir.add(ir.maximum(x, ir.const(0.0)), tail)


def sign(x: Expr) -> Expr:
    if x.type == "real" and "s" not in x.free:
        raise Refusal("the sign of a real number of positions", EXACTLY)
    return ir.where(ir.lt(ir.ZERO, x), ir.ONE, ir.where(ir.lt(x, ir.ZERO), ir.const(-1), ir.ZERO))


RULES: dict[str, Rule] = {
    "add": arithmetic(ir.add, either), "radd": arithmetic(ir.add, either),
    "mul": arithmetic(times, both), "rmul": arithmetic(times, both),
    "sub": elementwise(ir.sub), "rsub": elementwise(swapped(ir.sub)),
    "div": division, "rdiv": elementwise(swapped(divided)),
    "floordiv": elementwise(floordiv), "rfloordiv": elementwise(swapped(floordiv)),
    "mod": elementwise(remainder), "rmod": elementwise(swapped(remainder)), "fmod": elementwise(fmod),
    "pow": powers(), "rpow": powers(swap=True), "float_power": powers(),
    "square": elementwise(lambda x: ir.mul(x, x)), "neg": elementwise(ir.neg),
    "pos": elementwise(lambda x: x),
    "abs": elementwise(ir.absolute), "sign": elementwise(sign),
    "bitwise_and": bitwise(both, bits_and), "rand": bitwise(both, bits_and),
    "bitwise_or": bitwise(either, lambda x, c: ir.sub(ir.add(x, ir.const(c)), bits_and(x, c))),
    "bitwise_xor": bitwise(
        differ, lambda x, c: ir.sub(ir.add(x, ir.const(c)), ir.mul(ir.const(2), bits_and(x, c)))
    ),
    "bitwise_not": complement,
    "lshift": elementwise(shift(ir.mul)), "rshift": elementwise(shift(ir.floordiv)),
    "logical_and": logical(both), "logical_or": logical(either), "logical_xor": logical(differ),
    "logical_not": logical(ir.negate),
    "where": where, "masked_fill": filled, "clamp": clamped,
    "clamp_min": elementwise(ir.maximum), "clamp_max": elementwise(ir.minimum),
    "minimum": elementwise(ir.minimum), "maximum": elementwise(ir.maximum),
    "min": extreme(ir.minimum), "max": extreme(ir.maximum),
    "min[0]": reduced(ir.minimum), "max[0]": reduced(ir.maximum),
    "amin": reduced(ir.minimum), "amax": reduced(ir.maximum), "sum": summed,
    "dot": dot, "vdot": dot, "inner": dot,
    "any": some, "all": every, "isin": is_in,
    **{name: compared(name) for name in COMPARED},
    **dict.fromkeys("to bool int long short float double half bfloat16".split(), cast),
    **dict.fromkeys("clone contiguous detach cpu cuda".split(), cast),
    **dict.fromkeys("floor ceil round trunc".split(), rounded),
    **{name: function(name) for name in ("exp", "log", "log2", "sqrt", "tanh", "sigmoid", "sin", "cos")},
    "exp2": of_real(lambda x: ir.power(ir.const(2.0), x)),
    "log10": of_real(lambda x: ir.mul(ir.const(1 / math.log(10)), ir.call("log", x))),
    "log1p": of_real(lambda x: ir.call("log", ir.add(ir.const(1.0), x))),
    "expm1": of_real(lambda x: ir.sub(ir.call("exp", x), ir.const(1.0))),
    "rsqrt": of_real(lambda x: ir.div(ir.const(1.0), ir.call("sqrt", x))),
    "reciprocal": of_real(lambda x: ir.div(ir.const(1.0), x)),
    "relu": elementwise(lambda x: ir.maximum(x, ir.const(0) if x.type == "int" else ir.const(0.0))),
    "silu": of_real(lambda x: ir.mul(x, ir.call("sigmoid", x))),
    "softplus": of_real(softplus), "logsigmoid": of_real(lambda x: ir.neg(softplus(ir.neg(x)))),
    **dict.fromkeys(
        "unsqueeze squeeze view reshape expand permute transpose flatten select narrow stack cat flip roll "
        "broadcast_to repeat tile T mT swapaxes movedim view_as expand_as".split(),
        moved,
    ),
}  # fmt: skip
RULES |= {"ror": RULES["bitwise_or"], "rxor": RULES["bitwise_xor"],
          "rlshift": elementwise(swapped(shift(ir.mul))),
          "rrshift": elementwise(swapped(shift(ir.floordiv)))}  # fmt: skip
