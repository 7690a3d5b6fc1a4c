"""The typed core: one kind of node, interned, so that equal expressions are one object.

An attention is elaborated into these nodes: the mask is a Boolean expression over the query position
`q` and the key position `k`, a score a real one over the current logit as well. Three evaluators read
them (pointwise.py, tiling.py, relation.py) and the backends' torch_eval.py a fourth time.

Which nodes are legal, and what they mean, stands in legal.py; anything else is a bug of the elaborator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail

Type = Literal["bool", "int", "real", "vec", "truths", "mat"]
"""`vec` is a vector of reals, `truths` what comparing one entry by entry gives, `mat` a matrix."""
INT64 = (-(2**63), 2**63 - 1)
DEPTH_LIMIT = 300
ENTRY_LIMIT = 2**20
"""Entries of a list of the text."""


@dataclass(frozen=True)
class Given:
    """The origin of a table that comes with the call."""


@dataclass(frozen=True)
class Learned:
    """The origin of a trainable parameter, with its first value; `serial` tells two of them apart."""

    init: float
    serial: int = 0


@dataclass(frozen=True)
class Drawn:
    """The origin of constants [m, D] that a hash draws once D is known (meaning/draws.py)."""

    kind: Literal["orthogonal", "gaussian_rows"]
    seed: int


@dataclass(frozen=True)
class Known:
    """The origin of a list of the text, which has one axis."""

    entries: tuple[int | float, ...]

    @functools.cached_property
    def array(self) -> NDArray[Any]:
        """float64 if an entry is real, else int64."""
        return np.array(self.entries, np.float64 if float in map(type, self.entries) else np.int64)


Argument: TypeAlias = "int | float | bool | str | Expr | Table | None"


@dataclass(frozen=True)
class Selected:
    """The origin of a choice: made of q and k in every call, before any backend runs.

    selection  the plugin that chooses, and its `arguments`
    of         of a list: which keys may be chosen, a truth over the row `q` and the unit `k`
    rows       of a list: how many queries share a row
    unit       of a list: how many keys one entry stands for
    """

    selection: str
    arguments: tuple[tuple[str, Argument], ...]
    of: Expr | None = None
    rows: int = 1
    unit: int = 1

    def __getitem__(self, name: str) -> Any:
        """An argument."""
        return dict(self.arguments)[name]


@dataclass(frozen=True)
class Table:
    """What expressions look up.

    `dims` are the axes: names bound by the tensor, or sizes. B and H, in that order, may stand first: the
    language leaves them out, and `implicit` are their indices. `origin` says where the content comes from,
    and so when it is known.
    """

    name: str
    dtype: Literal["int", "bool", "float"]
    dims: tuple[str | int, ...]
    origin: Given | Learned | Drawn | Known | Selected = Given()

    @staticmethod
    def listed(*parts: Sequence[int | float]) -> Table:
        """A list of the text, of these one after the other; of integers unless an entry is real."""
        if sum(map(len, parts)) > ENTRY_LIMIT:
            raise fail(f"a list that is looked up has at most {ENTRY_LIMIT:,} entries")
        entries = tuple(const(entry).value for part in parts for entry in part)
        shown = ", ".join([*map(str, entries[:4]), *["..."] * (len(entries) > 4)])
        origin = Known(cast("tuple[int | float, ...]", entries))
        dtype: Literal["int", "float"] = "float" if origin.array.dtype.kind == "f" else "int"
        return Table(f"[{shown}]", dtype, (len(entries),), origin)

    def __str__(self) -> str:
        """`doc : int[n]`, as a text declares it."""
        return f"{self.name} : {self.dtype}[{', '.join(map(str, self.dims))}]"

    @property
    def learned(self) -> bool:
        return isinstance(self.origin, Learned)

    @property
    def parameter(self) -> bool:
        """Whether it belongs to a module: learned, or a constant that is drawn."""
        return isinstance(self.origin, Learned | Drawn)

    @property
    def batched(self) -> bool:
        return "B" in self.dims

    @property
    def by_entry(self) -> bool:
        """Whether its row for a query is that query's place among the queries, not its position."""
        return isinstance(self.origin, Selected) and "nq" in self.dims

    @property
    def implicit(self) -> tuple[Expr, ...]:
        """Batch row and head, as far as the table has axes for them."""
        return tuple(var(name) for axis, name in (("B", "b"), ("H", "h")) if axis in self.dims)

    @property
    def explicit(self) -> tuple[str | int, ...]:
        """The axes that a text indexes."""
        return self.dims[("B" in self.dims) + ("H" in self.dims) :]

    @property
    def known(self) -> NDArray[Any] | None:
        """The entries, if they are known before a call."""
        return self.origin.array if isinstance(self.origin, Known) else None

    def content(self, given: Mapping[str, Any]) -> Any:
        """Its own entries, or what was given under its name; None if nothing was."""
        return given.get(self.name) if self.known is None else self.known


@dataclass(frozen=True)
class IntSet:
    """A constant set of integers as disjoint, sorted, non-adjacent inclusive intervals."""

    intervals: tuple[tuple[int, int], ...]

    @staticmethod
    def of(intervals: Iterable[tuple[int, int]]) -> IntSet:
        merged: list[tuple[int, int]] = []
        for lo, hi in sorted(pair for pair in intervals if pair[0] <= pair[1]):
            if merged and lo <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
            else:
                merged.append((lo, hi))
        return IntSet(tuple(merged))

    def __contains__(self, value: int) -> bool:
        return any(lo <= value <= hi for lo, hi in self.intervals)


class Expr:
    """An interned node; compare with `is` (`==` is identity too). Build with the functions below."""

    __slots__ = ("__weakref__", "args", "depth", "free", "op", "tables", "type", "value", "width")

    op: str
    args: tuple[Expr, ...]
    value: Hashable
    type: Type
    depth: int
    free: frozenset[str]
    """Names of the variables that occur free."""
    tables: frozenset[Table]
    """Tables that occur anywhere below and whose content is not known."""
    width: Expr | None
    """Of vectors how many numbers, over D and the names of axes; of a matrix those of a row."""

    def __repr__(self) -> str:
        return render(self)

    def __copy__(self) -> Expr:
        return self

    def __deepcopy__(self, memo: object) -> Expr:
        return self

    def __reduce__(self) -> tuple[Callable[..., Expr], tuple[object, ...]]:
        return make, (self.op, self.args, self.value, self.type)


_interned: WeakValueDictionary[tuple[object, ...], Expr] = WeakValueDictionary()


def make(op: str, args: tuple[Expr, ...], value: Hashable, type: Type) -> Expr:
    """The one node with these fields. Only the constructors below call it: they simplify."""
    key = (op, args, value, value.__class__, type)
    found = _interned.get(key)
    if found is not None:
        return found
    node = object.__new__(Expr)
    node.op, node.args, node.value, node.type = op, args, value, type
    node.depth = 1 + max((arg.depth for arg in args), default=0)
    if node.depth > DEPTH_LIMIT:
        raise fail(f"nested deeper than {DEPTH_LIMIT} operations once definitions are written out")
    free: frozenset[str] = frozenset().union(*(arg.free for arg in args))
    if op == "var":
        free = frozenset({str(value)})
    elif op == "exists":
        free = args[0].free | args[1].free | (args[2].free - {str(value)})
    elif op == "random":
        _, row, col = cast(tuple[int, str, str], value)
        free = frozenset().union(*(arg.free for arg in args[:4])) | (args[4].free - {row, col})
    node.free = free
    tables = frozenset().union(*(arg.tables for arg in args))
    node.tables = tables | {value} if isinstance(value, Table) and value.known is None else tables
    node.width = _width(node) if type in ("vec", "truths", "mat") else None
    _interned[key] = node
    return node


def _width(e: Expr) -> Expr | None:
    if e.op == "var":
        return var("D")
    if isinstance(e.value, Table):
        return _axis(e.value.dims[-1])
    if e.op == "matvec":
        return _axis(cast(Table, e.args[0].value).dims[-2])
    if e.op == "concat":
        return add(*(arg.width or ONE for arg in e.args))
    return next(arg.width for arg in e.args if arg.width)


def _axis(size: str | int) -> Expr:
    return const(size) if isinstance(size, int) else var(size)


def nodes(root: Expr) -> Iterator[Expr]:
    """Every distinct node below and including root, arguments before the nodes that use them."""
    seen: set[Expr] = set()
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args) if arg not in seen)


def const(value: bool | int | float) -> Expr:
    if isinstance(value, bool):
        return make("const", (), value, "bool")
    if isinstance(value, int):
        if not INT64[0] <= value <= INT64[1]:
            raise fail("integer overflow: a value leaves the 64-bit range")
        return make("const", (), value, "int")
    if not math.isfinite(value):
        raise fail("real overflow: a value is not a finite number")
    return make("const", (), value, "real")


TRUE, FALSE, ZERO, ONE = const(True), const(False), const(0), const(1)


def var(name: str) -> Expr:
    return make("var", (), name, variable_type(name))


AGGREGATES = ("min", "max", "mean")
"""What a block of vectors is summed up to, entry by entry."""
QUERY_VECTORS, KEY_VECTORS = (frozenset({x, *(f"{of}({x})" for of in AGGREGATES)}) for x in "QK")


def variable_type(name: str) -> Type:
    return "vec" if name in QUERY_VECTORS | KEY_VECTORS else "real" if name == "s" else "int"


def number(e: Expr) -> int | float | None:
    """The value of a constant number or truth, else None."""
    return e.value if e.op == "const" else None  # type: ignore[return-value]


def _joint(args: Iterable[Expr], least: Type = "int") -> Type:
    """Entry by entry: of a vector and a number a vector."""
    args = tuple(args)
    widths = {a.width: None for a in args if a.width}
    if len(widths) > 1:
        first, second, *_ = widths
        raise fail(f"vectors of {first} and of {second} numbers do not go together")
    return "vec" if widths else "real" if any(a.type == "real" for a in args) else least


def add(*args: Expr) -> Expr:
    flat: list[Expr] = []
    total: int | float = 0
    for arg in args:
        for part in arg.args if arg.op == "add" else (arg,):
            value = number(part)
            if value is None:
                flat.append(part)
            else:
                total += value
    type_ = _joint(args)
    coefficients: dict[Expr, int] = {}
    if type_ == "int":
        for part in flat:
            scale, base = _scaled(part)
            coefficients[base] = coefficients.get(base, 0) + scale
        flat = [mul(const(c), base) for base, c in coefficients.items() if c != 0]
    if total != 0 or not flat:
        flat.append(const(total if type_ == "int" else float(total)))
    return flat[0] if len(flat) == 1 and flat[0].type == type_ else make("add", tuple(flat), None, type_)


def _scaled(e: Expr) -> tuple[int, Expr]:
    """c and x such that e = c * x, c a constant integer."""
    if e.op == "mul" and len(e.args) == 2 and e.args[0].op == "const":
        return e.args[0].value, e.args[1]  # type: ignore[return-value]
    return 1, e


def mul(a: Expr, b: Expr) -> Expr:
    """Constants stand first; an integer constant distributes over a sum, so sums stay flat."""
    if b.op == "const":
        a, b = b, a
    x, y, type_ = number(a), number(b), _joint((a, b))
    if x is not None and y is not None:
        return const(x * y)
    if x is not None and type_ == "int":
        if x == 0:
            return ZERO
        if x == 1:
            return b
        scale, base = _scaled(b)
        if base is not b:
            return mul(const(x * scale), base)
        if b.op == "add":
            return add(*(mul(a, part) for part in b.args))
    return make("mul", (a, b), None, type_)


def neg(a: Expr) -> Expr:
    return mul(const(-1), a) if a.type == "int" else mul(const(-1.0), a)


def sub(a: Expr, b: Expr) -> Expr:
    return add(a, neg(b))


def _divisor(b: Expr) -> int | float | None:
    y = number(b)
    if y is not None and y <= 0:
        raise fail(f"the divisor is {y}, and must be positive")
    return y


def floordiv(a: Expr, b: Expr) -> Expr:
    """Floor division; `b` positive."""
    x, y = number(a), _divisor(b)
    if x is not None and y is not None:
        return const(x // y)
    return a if y == 1 and a.type == "int" else make("floordiv", (a, b), None, _joint((a, b)))


def mod(a: Expr, b: Expr) -> Expr:
    """The remainder in 0..b-1; `b` positive."""
    x, y = number(a), _divisor(b)
    if x is not None and y is not None:
        return const(x % y)
    return ZERO if y == 1 and a.type == "int" else make("mod", (a, b), None, _joint((a, b)))


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "log2": math.log2,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x)),
    "sin": math.sin,
    "cos": math.cos,
}
"""Real functions of one number. `isqrt`, `floor` and, of an integer, `log2` (rounded down) give integers."""


def call(op: str, a: Expr) -> Expr:
    """One of FUNCTIONS, `isqrt` or `floor`."""
    if a.type == "vec":
        return make(op, (a,), None, "vec")
    integral = op in ("isqrt", "floor") or (op == "log2" and a.type == "int")
    if op == "floor" and a.type == "int":
        return a
    x = number(a)
    if x is None:
        return make(op, (a,), None, "int" if integral else "real")
    if op == "isqrt":
        return const(math.isqrt(_within(op, x, 0)))
    if op == "floor" and math.isfinite(x):
        return const(math.floor(x))
    if op == "floor":
        raise fail(f"floor({x}) is not a number")
    if op == "log2" and integral:
        return const(_within(op, x, 1).bit_length() - 1)
    try:
        return const(float(FUNCTIONS[op](x)))
    except (ValueError, OverflowError):
        raise fail(f"{op}({x}) is not a number") from None


def _within(op: str, x: float, least: int) -> int:
    if x < least:
        raise fail(f"{op}({x}) is not a number")
    return int(x)


def power(a: Expr, b: Expr, integral: bool = False) -> Expr:
    """An integer if both are and `b` is a constant from 0 on, or as `integral` says: both are, and `b` is not
    negative wherever the value matters."""
    x, y = number(a), number(b)
    integral = integral or (a.type == b.type == "int" and y is not None and y >= 0)
    if x is None or y is None or (integral and y < 0):
        return make("pow", (a, b), None, "int" if integral else _joint((a, b), "real"))
    if integral:
        if abs(x) > 1 and y * math.log2(abs(x)) > 64:
            raise fail("integer overflow: a power leaves the 64-bit range")
        return const(x**y)
    try:
        result = float(x) ** float(y)
    except (ZeroDivisionError, OverflowError):
        raise fail(f"{x} ** {y} is not a number") from None
    if isinstance(result, complex):
        raise fail(f"{x} ** {y} is not a real number")
    return const(result)


def div(a: Expr, b: Expr) -> Expr:
    x, y = number(a), number(b)
    if y == 0:
        raise fail("division by zero")
    if x is not None and y is not None:
        return const(x / y)
    return make("div", (a, b), None, _joint((a, b), "real"))


def _extreme(op: str, a: Expr, b: Expr) -> Expr:
    x, y = number(a), number(b)
    if a is b:
        return a
    if x is not None and y is not None:
        best = min(x, y) if op == "min" else max(x, y)
        return const(float(best) if _joint((a, b)) == "real" else best)
    return make(op, (a, b), None, _joint((a, b)))


def minimum(a: Expr, b: Expr) -> Expr:
    return _extreme("min", a, b)


def maximum(a: Expr, b: Expr) -> Expr:
    return _extreme("max", a, b)


def absolute(a: Expr) -> Expr:
    x = number(a)
    return make("abs", (a,), None, a.type) if x is None else const(abs(x))


def where(cond: Expr, a: Expr, b: Expr) -> Expr:
    if cond.op == "const":
        return a if cond.value else b
    if a is b and (a.width or not cond.width):
        return a
    return make("where", (cond, a, b), None, _joint((cond, a, b) if cond.width else (a, b)))


def _connective(op: str, args: Iterable[Expr], unit: Expr, zero: Expr) -> Expr:
    flat: dict[Expr, None] = {}
    for arg in args:
        for part in arg.args if arg.op == op else (arg,):
            if part is zero:
                return zero
            if part is not unit:
                flat[part] = None
    if any(part.op == "not" and part.args[0] in flat for part in flat):
        return zero
    return next(iter(flat), unit) if len(flat) < 2 else make(op, tuple(flat), None, "bool")


def all_of(*args: Expr) -> Expr:
    return _connective("and", args, TRUE, FALSE)


def any_of(*args: Expr) -> Expr:
    return _connective("or", args, FALSE, TRUE)


def negate(a: Expr) -> Expr:
    if a.op == "const":
        return const(not a.value)
    if a.op == "not":
        return a.args[0]
    if a.op == "lt":
        return make("le", (a.args[1], a.args[0]), None, a.type)
    if a.op == "le":
        return make("lt", (a.args[1], a.args[0]), None, a.type)
    return make("not", (a,), None, a.type)


def _comparison(op: str, a: Expr, b: Expr, holds: Callable[[float, float], bool]) -> Expr:
    if _joint((a, b)) == "vec":
        return make(op, (a, b), None, "truths")
    if a is b:
        return const(op != "lt")
    x, y = number(a), number(b)
    if x is None or y is None:
        if a.type == b.type == "int":
            difference = number(sub(a, b))
            if difference is not None:
                return const(holds(difference, 0))
        return make(op, (a, b), None, "bool")
    return const(holds(x, y))


def le(a: Expr, b: Expr) -> Expr:
    return _comparison("le", a, b, lambda x, y: x <= y)


def lt(a: Expr, b: Expr) -> Expr:
    return _comparison("lt", a, b, lambda x, y: x < y)


def eq(a: Expr, b: Expr) -> Expr:
    return _comparison("eq", a, b, lambda x, y: x == y)


def inset(e: Expr, members: IntSet) -> Expr:
    value = number(e)
    if value is not None:
        return const(int(value) in members)
    if len(members.intervals) <= 4:
        return any_of(*(_between(e, lo, hi) for lo, hi in members.intervals))
    return make("inset", (e,), members, "bool")


def _between(e: Expr, lo: int, hi: int) -> Expr:
    return eq(e, const(lo)) if lo == hi else all_of(le(const(lo), e), le(e, const(hi)))


def lookup(table: Table, *indices: Expr) -> Expr:
    types: dict[str, Type] = {"int": "int", "bool": "bool", "float": "real"}
    left_over = len(table.dims) - len(indices)
    if isinstance(table.origin, Known):
        place, entries = number(indices[0]), table.origin.entries
        if place is not None and 0 <= place < len(entries):
            return const(entries[int(place)])
    return make("lookup", indices, table, ("vec", "mat")[left_over - 1] if left_over else types[table.dtype])


def intable(e: Expr, table: Table, *indices: Expr) -> Expr:
    return make("intable", (e, *indices), table, "bool")


def rank_of(table: Table, *indices: Expr) -> Expr:
    return make("rank_of", indices, table, "int")


def count_of(table: Table, *indices: Expr) -> Expr:
    return make("count_of", indices, table, "int")


def inner(a: Expr, b: Expr) -> Expr:
    _joint((a, b))
    return make("inner", (a, b), None, "real")


def matvec(matrix: Expr, x: Expr) -> Expr:
    _joint((matrix, x))
    return make("matvec", (matrix, x), None, "vec")


def total(x: Expr) -> Expr:
    """The sum of the entries of a vector."""
    if x.op == "mul":
        a, b = x.args
        if a.type == b.type == "vec":
            return inner(a, b)
        return mul(b, total(a)) if a.type == "vec" else mul(a, total(b))
    if x.op == "div" and x.args[1].type != "vec":
        return div(total(x.args[0]), x.args[1])
    if (ends := _between_bounds(x)) is not None:
        u, low, high = ends
        falls, rises = minimum(u, const(0.0)), maximum(u, const(0.0))
        first, other = (falls, rises) if x.op == "max" else (rises, falls)
        return add(inner(first, low), inner(other, high))
    return make("sum", (x,), None, "real")


def _between_bounds(x: Expr) -> tuple[Expr, Expr, Expr] | None:
    """u, min(K) and max(K) of max(u * min(K), u * max(K)), which the sign of u decides: so Quest's bound is
    two matrix products."""
    if x.op not in ("max", "min") or any(arg.op != "mul" for arg in x.args):
        return None
    sides = [{*arg.args} for arg in x.args]
    if len(common := sides[0] & sides[1]) != 1:
        return None
    ends = {end.value: end for side in sides for end in side - common if end.op == "var"}
    for of in "KQ":
        if ends.keys() == {f"min({of})", f"max({of})"}:
            return common.pop(), ends[f"min({of})"], ends[f"max({of})"]
    return None


def concat(*vectors: Expr) -> Expr:
    """One vector of all entries; a number is one."""
    return make("concat", vectors, None, "vec")


def random_keys(q: Expr, k: Expr, n: Expr, seed: Expr, of: Expr, r: int, row: str, col: str) -> Expr:
    return FALSE if r == 0 else make("random", (q, k, n, seed, of), (r, row, col), "bool")


def exists(m: str, lo: Expr, hi: Expr, body: Expr) -> Expr:
    return FALSE if body is FALSE else make("exists", (lo, hi, body), m, "bool")


REBUILD: dict[str, Callable[..., Expr]] = {
    "add": add,
    "mul": mul,
    "div": div,
    "floordiv": floordiv,
    "mod": mod,
    "min": minimum,
    "max": maximum,
    "abs": absolute,
    "where": where,
    "inner": inner,
    "matvec": matvec,
    "sum": total,
    "concat": concat,
    "and": all_of,
    "or": any_of,
    "not": negate,
    "le": le,
    "lt": lt,
    "eq": eq,
}


def rebuild(node: Expr, args: tuple[Expr, ...]) -> Expr:
    """The node with other arguments, simplified again."""
    if args == node.args:
        return node
    if node.op in REBUILD:
        return REBUILD[node.op](*args)
    if node.op == "pow":
        return power(args[0], args[1], node.type == "int")
    if node.op == "inset":
        return inset(args[0], node.value)  # type: ignore[arg-type]
    if node.op == "exists":
        return exists(str(node.value), *args)
    if node.op in FUNCTIONS or node.op in ("isqrt", "floor"):
        return call(node.op, args[0])
    if node.op == "lookup":
        return lookup(node.value, *args)  # type: ignore[arg-type]
    return make(node.op, args, node.value, node.type)


def substitute(root: Expr, values: dict[str, Expr]) -> Expr:
    """Free variables replaced by expressions that contain none of root's bound variables."""
    names = frozenset(values)
    done: dict[Expr, Expr] = {}
    for node in nodes(root):
        if not node.free & names:
            done[node] = node
        elif node.op == "var":
            done[node] = values[str(node.value)]
        elif node.op == "exists" and node.value in names:
            low, high, body = node.args
            unbound = {name: value for name, value in values.items() if name != node.value}
            done[node] = rebuild(node, (done[low], done[high], substitute(body, unbound)))
        else:
            done[node] = rebuild(node, tuple(done[arg] for arg in node.args))
    return done[root]


SYMBOLS = {"add": " + ", "and": " and ", "or": " or ", "mul": " * ", "floordiv": " // ", "mod": " mod "} | {
    "div": " / ", "pow": " ** ", "le": " <= ", "lt": " < ", "eq": " == ", "inner": " @ ", "matvec": " @ "
}  # fmt: skip


def render(e: Expr) -> str:
    """A readable text, fully parenthesised; shared nodes are written out, long ones cut."""

    def text(e: Expr, depth: int) -> str:
        if depth > 12:
            return "…"
        parts = [text(arg, depth + 1) for arg in e.args]
        if e.op in ("const", "var"):
            return str(e.value).lower() if isinstance(e.value, bool) else str(e.value)
        if e.op in SYMBOLS:
            return "(" + SYMBOLS[e.op].join(parts) + ")"
        if isinstance(e.value, Table):
            return f"{e.op if e.op != 'lookup' else ''}{e.value.name}[{', '.join(parts)}]"
        return f"{e.op}({', '.join(parts)})"

    return text(e, 0)
