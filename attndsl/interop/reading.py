"""What symbols are: expressions of the core and tables, or why there are none.

An operation that the language has is written as an expression. Whatever else reads one position alone, or one
integer made of two, is computed at all its values by torch itself, and becomes a table. What is left is
refused: nothing is approximated. Of a score real operations are as exact as any rounding is.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attndsl import expr as ir
from attndsl.expr import Expr, Table
from attndsl.interop.holding import names_of
from attndsl.interop.rules import COMPARED, REAL_TYPES, RULES, as_elements, moved, operation, spread
from attndsl.interop.symbols import Place, Refusal, Settled, Symbol, computed, named, symbolic, symbols
from attndsl.language.vocabulary import BUILT_IN, RESERVED
from attndsl.meaning.intervals import Interval
from attndsl.meaning.intervals import bounds as interval
from attndsl.syntax.tokens import CLAUSES, DEFINITIONS, DTYPES
from attndsl.tiles.lowering import ARGUMENTS, SIZES

ELEMENTS = 1024
"""Of a row that is written out element by element."""
ENTRIES = 2**24
"""Of a table that is made."""
INFINITE = ir.make("var", (), "-inf", "real")
"""What a score is where a pair is masked."""
B, H, Q, K, S = (ir.var(name) for name in "bhqks")
WITHOUT = "a mod may read one position in any way, and several by what the language has"
GIVE = {"q": "length", "k": "length", "b": "batch", "h": "heads"}
TAKEN = (
    RESERVED
    | BUILT_IN
    | {*CLAUSES, *DEFINITIONS, *DTYPES, *ARGUMENTS, *SIZES}
    | set("and or not in mod else b v".split())
)
"""What no table is called."""


class Row(NamedTuple):
    """What is left of a tensor when its first axes are looked up."""

    tensor: Tensor
    indices: tuple[Expr, ...]


Value: TypeAlias = Expr | Row | NDArray[Any]
"""An expression where there are no axes, else an array of them."""


class Reader:
    """Reads the symbols of a mod, or of two that go together.

    sizes:    how many batch rows (`b`), heads, queries and keys there are, as far as that is known.
    trained:  tensors that were computed of trained ones inside.
    holders:  the mods, after whose tensors tables are named.
    tables:   what is looked up, by name, with the axes of its table.
    declared: these tables, in the order of their first use.
    """

    def __init__(self, sizes: Mapping[str, int], trained: Sequence[Tensor], holders: Sequence[Any]) -> None:
        self.sizes, self.trained, self.holders = sizes, trained, holders
        self.tables: dict[str, Tensor] = {}
        self.declared: dict[tuple[Any, ...], Table] = {}
        # symbols have no hash, and live as long as what was made of them
        self.values: dict[int, Value | Refusal] = {}
        self.below: dict[int, frozenset[Expr]] = {}
        # what stands for entries of tables
        self.entries: dict[Expr, Row] = {}
        # names of tensors that were computed, by the address of their storage
        self.made: dict[int, str] = {}
        self.finite: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        self.place: Place | None = None
        self.batch_read: Place | None = None
        # what reads one position is refused as a whole, and then computed as a whole
        self.whole = False

    def value(self, symbol: Symbol) -> Value:
        """Raises Refusal at the place of what is not read."""
        if id(symbol) not in self.values:
            outer, self.place = self.place, symbol.place
            try:
                self.values[id(symbol)] = self.read(symbol)
            except Refusal as refusal:
                refusal.place = refusal.place or symbol.place
                if self.whole:
                    raise
                self.values[id(symbol)] = refusal
            finally:
                self.place = outer
        found = self.values[id(symbol)]
        if isinstance(found, Refusal):
            raise found
        return found

    def expression(self, symbol: Symbol) -> Expr:
        """Of a symbol without axes."""
        value = self.value(symbol)
        return value if isinstance(value, Expr) else self.elements(symbol).item()

    def read(self, symbol: Symbol) -> Value:
        if symbol.name:
            return {"b": B, "h": H, "q": Q, "k": K, "s": S}[symbol.name]
        name, outer = operation(symbol), self.whole
        self.whole = positions(self.read_by(symbol)) <= 1
        try:
            if name == "getitem":
                return self.looked_up(symbol)
            if name not in RULES:
                raise Refusal(f"`{named(symbol.func).strip('_')}` of two positions is not read", WITHOUT)
            return RULES[name](self, symbol)
        except Refusal as refusal:
            refusal.place = refusal.place or symbol.place
            if refusal.mistake or isinstance(refusal, Settled) or (outer and self.whole):
                raise
            self.whole = False
            try:
                return self.entry(self.tabulated(symbol, refusal))
            except Refusal:
                if name not in COMPARED:
                    raise
                return self.ranked(symbol, name, refusal)
        finally:
            self.whole = outer

    def entry(self, row: Row) -> Value:
        """Itself where axes are left, else what is looked up."""
        return row if row.tensor.ndim > len(row.indices) else self.look_up(*row)

    def bounds(self, e: Expr) -> Interval:
        """Least and greatest value of an integer."""
        limits = {name: (0, size - 1) for name, size in self.sizes.items()}
        return interval(e, limits, self.tables)

    def within(self, e: Expr, size: int) -> bool:
        """Whether no value is beyond this or its negative."""
        low, high = self.bounds(e)
        return -size <= low and high <= size

    def elements(self, arg: Any) -> NDArray[Any]:
        """Of an argument, as an array of expressions with its axes. Raises Refusal for many."""
        found = np.empty((), object)
        if isinstance(arg, Symbol):
            value = self.value(arg)
            if value is B:
                self.batch_read = self.batch_read or self.place
            if isinstance(value, np.ndarray):
                return value
            if isinstance(value, Row):
                return self.written_out(value)
            found[()] = value
        elif isinstance(arg, Tensor):
            return self.written_out(Row(self.untrained(arg), ()))
        elif isinstance(arg, bool | int | float):
            found[()] = constant(arg)
        else:
            raise Refusal(f"{type(arg).__name__} is no number")
        return found

    def written_out(self, row: Row) -> NDArray[Any]:
        shape = tuple(row.tensor.shape[len(row.indices) :])
        if math.prod(shape) > ELEMENTS:
            raise Refusal(
                f"{math.prod(shape):,} entries are computed with at once",
                "look one up, or ask for a member: `(row == x).any()`",
            )
        found = np.empty(shape, object)
        for at in np.ndindex(shape):
            found[at] = self.look_up(row.tensor, (*row.indices, *map(ir.const, at)))
        return found

    def looked_up(self, symbol: Symbol) -> Value:
        """`x[i, ...]`"""
        base, index = symbol.args
        if not symbolic([index]):
            return moved(self, symbol)
        value = Row(self.untrained(base), ()) if isinstance(base, Tensor) else self.value(base)
        if isinstance(value, Row):
            return self.entry(self.row(value, index))
        if not (isinstance(value, np.ndarray) and isinstance(index, Symbol)) or index.value.ndim:
            raise Refusal("what is computed of positions is looked up at others", WITHOUT)
        at = self.inside(self.expression(index), len(value))
        return spread(functools.partial(one_of, at), [as_elements(member) for member in value])

    def row(self, row: Row, index: Any) -> Row:
        """What is left of it at an index in which positions are."""
        places = list(index) if isinstance(index, tuple) else [index]
        held = len(row.indices)
        free = row.tensor.ndim - held
        if Ellipsis in [place for place in places if not isinstance(place, Symbol | Tensor)]:
            at = next(i for i, place in enumerate(places) if place is Ellipsis)
            places[at : at + 1] = [slice(None)] * (free - sum(place is not None for place in places) + 1)
        places += [slice(None)] * (free - sum(place is not None for place in places))
        if any(place is None or isinstance(place, Tensor | bool | list) for place in places):
            raise Refusal("an index beside a position is no integer and no slice")
        tensor = row.tensor[(slice(None),) * held + tuple(
            slice(None) if isinstance(place, Symbol) else place for place in places
        )]  # fmt: skip
        kept = [place for place in places if not isinstance(place, int)]
        axes = [i for i, place in enumerate(kept) if isinstance(place, Symbol)]
        for i in axes:
            if kept[i].value.ndim or kept[i].value.dtype in (torch.bool, *REAL_TYPES):
                raise Refusal("an index that is no single integer")
        others = [i for i in range(len(kept)) if i not in axes]
        tensor = tensor.permute(*range(held), *(held + i for i in (*axes, *others)))
        indices = [self.expression(kept[i]) for i in axes]
        return Row(tensor, (*row.indices, *indices))

    def untrained(self, tensor: Tensor) -> Tensor:
        """Itself. Raises Refusal for what the mod computed of a tensor that is trained."""
        if tensor.requires_grad and any(tensor is one for one in self.trained):
            raise Refusal(
                "a tensor that is trained is computed with, and then looked up",
                "look the parameter up itself, and compute with what is found",
            )
        return tensor

    def look_up(self, tensor: Tensor, indices: tuple[Expr, ...]) -> Expr:
        """One entry."""
        if tensor.dtype in REAL_TYPES and not tensor.requires_grad:
            tensor, finite, masked = self.without_infinity(tensor)
            if masked is not None:
                return ir.where(self.look_up(masked, indices), INFINITE, self.look_up(finite, indices))
        if not tensor.ndim and tensor.requires_grad:
            tensor, indices = tensor.reshape(1), (ir.ZERO,)
        at = [self.inside(i, size) for i, size in zip(indices, tensor.shape, strict=True)]
        fixed = [ir.number(i) for i in at]
        if None not in fixed and not tensor.requires_grad:
            return constant(tensor[tuple([int(i or 0) for i in fixed])].item())
        table, order = self.table(tensor, tuple(at))
        return ir.lookup(table, *(at[i] for i in order))

    def without_infinity(self, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Itself, with 0 in place of -inf, and where that is; None if it is nowhere."""
        if id(tensor) not in self.finite:
            masked = torch.isneginf(tensor)
            if not bool((torch.isfinite(tensor) | masked).all()):
                raise Refusal("a table has an entry that is infinite or no number")
            some = bool(masked.any())
            filled = tensor.masked_fill(masked, 0.0) if some else tensor
            if some:
                self.made[masked.untyped_storage().data_ptr()] = f"no_{self.named(tensor)}"
                self.made[filled.untyped_storage().data_ptr()] = self.named(tensor)
            self.finite[id(tensor)] = tensor, filled, masked if some else None
        return self.finite[id(tensor)]

    def member(self, e: Expr, row: Symbol) -> Expr | None:
        """Whether an integer is an entry of a row that is looked up; None if that is none."""
        value = self.value(row)
        if not isinstance(value, Row) or value.tensor.ndim != len(value.indices) + 1:
            return None
        at = [self.inside(i, size) for i, size in zip(value.indices, value.tensor.shape, strict=False)]
        table, order = self.table(value.tensor, tuple(at))
        return ir.intable(e, table, *(at[i] for i in order))

    def vector(self, arg: Any) -> Expr | None:
        """A row of real numbers that is looked up, as one; None for another."""
        value = self.value(arg) if isinstance(arg, Symbol) else None
        if not isinstance(value, Row) or value.tensor.ndim != len(value.indices) + 1:
            return None
        if value.tensor.dtype not in REAL_TYPES or not bool(torch.isfinite(value.tensor).all()):
            return None
        at = [self.inside(i, size) for i, size in zip(value.indices, value.tensor.shape, strict=False)]
        table, order = self.table(value.tensor, tuple(at))
        return ir.lookup(table, *(at[i] for i in order))

    def inside(self, index: Expr, size: int) -> Expr:
        """Counted from the end where it is negative."""
        if index.op == "var" or self.bounds(index)[0] >= 0:
            return index
        return ir.where(ir.lt(index, ir.ZERO), ir.add(index, ir.const(size)), index)

    def table(self, tensor: Tensor, indices: tuple[Expr, ...]) -> tuple[Table, list[int]]:
        """The table whose first axes are looked up at `indices`, and the order in which it takes them: batch
        row and head first, which it has no more of than there are."""
        implicit = [indices.index(e) for e in (B, H) if e in indices]
        order = [*implicit, *(i for i in range(len(indices)) if i not in implicit)]
        for i in implicit:
            tensor = tensor.narrow(
                i, 0, min(tensor.shape[i], self.sizes.get(str(indices[i].value), tensor.shape[i]))
            )
        tensor = tensor.permute(*order, *range(len(indices), tensor.ndim))
        dims = [{B: "B", H: "H"}[indices[i]] for i in implicit]
        sizes = tensor.shape[len(dims) :]
        key = (*dims, located(tensor))
        if key not in self.declared:
            dtype = "bool" if tensor.dtype is torch.bool else "float" if tensor.dtype in REAL_TYPES else "int"
            name = self.new_name(tensor)
            self.declared[key] = Table(name, dtype, (*dims, *sizes))  # type: ignore[arg-type]
            self.tables[name] = tensor
        return self.declared[key], order

    @functools.cached_property
    def held(self) -> dict[int, str]:
        """Names of tensors."""
        return names_of(*self.holders)

    def named(self, tensor: Tensor) -> str:
        """As it is called where it comes from; `by_q` of what was computed."""
        storage = tensor.untyped_storage().data_ptr()
        found = self.made.get(storage) or self.held.get(storage, "")
        stem = re.sub(r"\W", "_", found).lstrip("_") or "table"
        return f"{stem}_" if stem in TAKEN or stem[0].isdigit() else stem

    def new_name(self, tensor: Tensor) -> str:
        """One that no other table has."""
        stem = self.named(tensor)
        names = itertools.chain([stem], (f"{stem}{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in self.tables)

    def atoms(self, symbol: Symbol) -> frozenset[Expr]:
        """Integers that it is a function of: positions, or one that is made of several, which is then the
        first that differs from it by a constant and perhaps its sign."""
        if id(symbol) in self.below:
            return self.below[id(symbol)]
        if symbol.name:
            found = frozenset({self.expression(symbol)})
        else:
            found = self.read_by(symbol)
            if positions(found) > 1 and not symbol.value.ndim:
                whole, self.whole = self.whole, False
                found = frozenset({atom}) if (atom := self.atom(symbol)) else found
                self.whole = whole
        self.below[id(symbol)] = found
        return found

    def atom(self, symbol: Symbol) -> Expr | None:
        """What is read of several positions and stands for itself: an integer, or a real entry of a table."""
        try:
            if symbol.value.dtype in REAL_TYPES:
                base, *index = symbol.args
                if operation(symbol) != "getitem" or not isinstance(base, Tensor) or base.requires_grad:
                    return None
                row = self.row(Row(base, ()), *index)
                # symbols that look the same entry up are one
                entry = ir.make("var", (), (located(row.tensor), row.indices), "real")
                self.entries[entry] = row
                return entry
            e = self.value(symbol)
        except Refusal:
            return None
        if not isinstance(e, Expr) or e.type != "int":
            return None
        known = {atom for atoms in self.below.values() for atom in atoms}
        return next((x for x in known if offset(e, x)), e)

    def read_by(self, symbol: Symbol) -> frozenset[Expr]:
        """The atoms of its arguments; of a position itself."""
        empty: frozenset[Expr] = frozenset()
        return empty.union(*(self.atoms(arg) for arg in arguments(symbol)))

    def tabulated(self, symbol: Symbol, refusal: Refusal) -> Row:
        """It at all values of its atoms. Raises the refusal where they are too many, or more than one."""
        atoms = self.read_by(symbol)
        if positions(atoms) > 1 or S in atoms or symbol.value.requires_grad:
            raise refusal
        if entry := next((atom for atom in atoms if atom in self.entries), None):
            if len(atoms) > 1:
                raise refusal
            return self.tabulated_by_entry(symbol, entry)
        needed = {name for atom in atoms for name in atom.free if name not in self.sizes}
        if needed:
            names = " and ".join(f"`{name}=`" for name in sorted({GIVE[name] for name in needed}))
            said = f"{refusal.message}; with lengths it is made a table"
            raise Settled(said, f"give {names}", refusal.place)
        inner = [atom for atom in (B, H) if atom in atoms] + [atom for atom in atoms if atom not in (B, H)]
        spans = [self.bounds(atom) for atom in inner]
        lengths = [int(high - low) + 1 for low, high in spans]
        if math.prod(lengths) * max(symbol.value.numel(), 1) > ENTRIES:
            raise refusal

        steps: dict[int, tuple[Expr, int, int]] = {}
        for arg in arguments(symbol):
            self.find_steps(arg, steps)

        def at(*values: Tensor) -> Any:
            return again(symbol, dict(zip(inner, values, strict=True)), steps, {})

        for i in reversed(range(len(inner))):
            at = torch.vmap(at, in_dims=tuple([0 if j == i else None for j in range(len(inner))]))
        ranges = [torch.arange(int(low), int(high) + 1, device=symbol.value.device) for low, high in spans]
        with getitem_by_index(), torch.no_grad():
            tensor = at(*ranges)
        by = "".join(str(atom.value) if atom.op == "var" else "d" for atom in inner)
        self.made[tensor.untyped_storage().data_ptr()] = f"by_{by}"
        shifted = (ir.sub(atom, ir.const(int(low))) for atom, (low, _) in zip(inner, spans, strict=True))
        return Row(tensor, tuple(shifted))

    def tabulated_by_entry(self, symbol: Symbol, entry: Expr) -> Row:
        """What is computed of an entry of a table, as another table."""
        tensor, indices = self.entries[entry]
        steps: dict[int, tuple[Expr, int, int]] = {}
        for arg in arguments(symbol):
            self.find_steps(arg, steps)
        at = torch.vmap(lambda value: again(symbol, {entry: value}, steps, {}))
        with getitem_by_index(), torch.no_grad():
            found = at(tensor.flatten())
        self.made[found.untyped_storage().data_ptr()] = f"by_{self.named(tensor)}"
        return Row(found.reshape(*tensor.shape, *found.shape[1:]), indices)

    def find_steps(self, symbol: Symbol, steps: dict[int, tuple[Expr, int, int]]) -> None:
        """What is an atom but for its sign and a constant, among what a symbol is made of and itself."""
        if id(symbol) in steps:
            return
        atoms = self.atoms(symbol)
        if symbol.name or (len(atoms) == 1 and positions(self.read_by(symbol)) > 1):
            (atom,) = atoms
            found = (1, 0) if atom in self.entries else offset(self.value(symbol), atom)
            assert found is not None
            steps[id(symbol)] = atom, *found
            return
        for arg in arguments(symbol):
            self.find_steps(arg, steps)

    def ranked(self, symbol: Symbol, op: str, refusal: Refusal) -> Expr:
        """A comparison of real numbers of one position each: by their ranks among all."""
        left, right = symbol.args
        if (
            not (isinstance(left, Symbol) and isinstance(right, Symbol))
            or left.value.ndim
            or right.value.ndim
        ):
            raise refusal
        dtype = torch.result_type(left.value, right.value)
        rows = [self.tabulated(side, refusal) for side in (left, right)]
        values = torch.cat([row.tensor.to(dtype).flatten() for row in rows])
        if bool(torch.isnan(values).any()):
            raise Refusal("a comparison of what is no number")
        ranks = torch.unique(values, return_inverse=True)[1].split([row.tensor.numel() for row in rows])
        a, b = (
            self.look_up(rank.reshape(row.tensor.shape), row.indices)
            for rank, row in zip(ranks, rows, strict=True)
        )
        return COMPARED[op](a, b)


def again(
    symbol: Symbol,
    values: Mapping[Expr, Tensor],
    steps: Mapping[int, tuple[Expr, int, int]],
    memo: dict[int, Any],
) -> Any:
    """Computed anew where atoms have these values."""
    if id(symbol) not in memo:
        if id(symbol) in steps:
            atom, sign, shift = steps[id(symbol)]
            memo[id(symbol)] = (values[atom] * sign + shift).to(symbol.value.dtype)
        else:
            memo[id(symbol)] = computed(symbol, lambda arg: again(arg, values, steps, memo))
    return memo[id(symbol)]


def arguments(symbol: Symbol) -> list[Symbol]:
    """What it is made of; of a position itself."""
    return [symbol] if symbol.name else [*symbols((*symbol.args, *symbol.kwargs.values()))]


def located(tensor: Tensor) -> tuple[Any, ...]:
    """What two views have in common that are the same."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def one_of(at: Expr, *members: Expr) -> Expr:
    """The member whose number this is."""
    if members[0].type == "bool":
        return ir.any_of(*(ir.all_of(ir.eq(at, ir.const(i)), e) for i, e in enumerate(members)))
    found = members[-1]
    for i, e in reversed([*enumerate(members[:-1])]):
        found = ir.where(ir.eq(at, ir.const(i)), e, found)
    return found


def positions(atoms: frozenset[Expr]) -> int:
    return len(atoms - {B, H})


def offset(e: Value, atom: Expr) -> tuple[int, int] | None:
    """1 or -1, and c, with e = ±atom + c."""
    if not isinstance(e, Expr) or e.type != "int":
        return None
    for sign in (1, -1):
        rest = ir.number(ir.sub(e, atom) if sign == 1 else ir.add(e, atom))
        if rest is not None:
            return sign, int(rest)
    return None


def constant(value: bool | int | float) -> Expr:
    if value == -math.inf:
        return INFINITE
    if isinstance(value, float) and not math.isfinite(value):
        raise Refusal(f"{value} is no finite number")
    # a number without a fraction is exact, whatever its type
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= 2**53
    return ir.const(int(value) if whole else value)


def getitem_by_index() -> Any:
    """What lets a tensor be looked up at what is mapped over."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()
