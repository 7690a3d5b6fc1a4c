"""The contract of a backend: what it knows, the three questions that attndsl asks it, what a kernel receives
and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias, get_args, get_type_hints, runtime_checkable

from attndsl.attention import Approx, Attention, HeadGroup, Norm, Relation
from attndsl.axis import Axis
from attndsl.errors import fail
from attndsl.expr import Table
from attndsl.keywords import checked_dtype
from attndsl.legal import LEGAL
from attndsl.sheets import sheet_of
from attndsl.streams import Numbers
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

if TYPE_CHECKING:
    from torch import Tensor


BLOCK_SIZE = 128
DTYPES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""The dtypes of a problem, and their bytes."""


@dataclass(frozen=True)
class Problem:
    """Sizes that a plan is made for. dtype is torch's name without `torch.`, device torch's name."""

    length: int
    q_length: int
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    block_size: int = BLOCK_SIZE
    training: bool = False

    @staticmethod
    def of(
        attention: Attention,
        *,
        length: int,
        q_length: int | None = None,
        batch: int = 1,
        heads: int = 1,
        kv_heads: int | None = None,
        head_dim: int = 64,
        dtype: str = "float32",
        device: str = "cpu",
        block_size: int | None = None,
        training: bool = False,
    ) -> Problem:
        """As users write it: `q_length` is `length`, `kv_heads` is `heads`, `block_size` is BLOCK_SIZE if not
        given. `batch`, `head_dim`, `dtype`, `device` and `training` are as of `attndsl.compile`.

        Raises AttnError for what is no size, heads or lengths that do not fit one another or the attention,
        and a dtype that is none of DTYPES.
        """
        given = {
            "length": length,
            "q_length": length if q_length is None else q_length,
            "batch": batch,
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "head_dim": head_dim,
        }
        sizes = {name: lowering.checked_length(name, value) for name, value in given.items()}
        if not isinstance(training, bool):
            raise fail(f"`training` is True or False, not {training!r}")
        for name in ("heads", "kv_heads", "head_dim"):
            if sizes[name] == 0:
                raise fail(f"`{name}` is 0, and must be positive")
        if sizes["heads"] % sizes["kv_heads"]:
            said = f"{sizes['heads']} heads cannot share {sizes['kv_heads']} key heads evenly"
            raise fail(said, help="`kv_heads` divides `heads`")
        if head_dim > lowering.HEAD_DIM_LIMIT:
            raise fail(f"`head_dim` is {head_dim}, and the limit is {lowering.HEAD_DIM_LIMIT}")
        dtype = checked_dtype(dtype)
        lowering.head_groups(attention, sizes["heads"])
        lowering.check_places(attention, sizes["length"] == sizes["q_length"])
        block_size = lowering.checked_block_size(BLOCK_SIZE if block_size is None else block_size)
        return Problem(**sizes, dtype=dtype, device=str(device), block_size=block_size, training=training)

    def __str__(self) -> str:
        """Sizes as in print(plan): those that follow from others are left out."""
        own = {"q_length": self.length, "batch": 1, "heads": None, "kv_heads": self.heads, "head_dim": None}
        sizes = {"length": self.length} | {
            name: size for name, usual in own.items() if (size := getattr(self, name)) != usual
        }
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        return f"{listed}, {self.dtype} on {self.device}{', training' if self.training else ''}"

    def attended(self, attention: Attention) -> Problem:
        """What is left of it where keys of streams are made: that of `attention.attended`."""
        if not attention.streams:
            return self
        entries = Numbers.of(attention.streams).at(self.length)[1]
        return replace(self, length=entries, kv_heads=self.heads if attention.made_by_head else self.kv_heads)


@dataclass(frozen=True)
class Features:
    """What an attention on a problem asks of a kernel, or what a backend knows. Masks are tiles, and need
    nothing.

    clauses     fields of the attention, its groups and their norms that are set: `score`, `decay`, `sink`,
                `heads` (groups of heads that differ), `count` (multiplicities, which the decay holds)
    norms       kinds of Norm
    approx      kinds of Approx
    operations  ops of the expressions that a kernel evaluates, as in expr.py
    tables      what those read: `given`, `learned` or `known`; `int`, `bool`, `float`
    modes       fields of the problem that are set and no sizes: `training`
    dtypes, devices   of the problem; a device without its number
    """

    clauses: Set[str] = frozenset()
    norms: Set[str] = frozenset({"softmax"})
    approx: Set[str] = frozenset()
    operations: Set[str] = frozenset()
    tables: Set[str] = frozenset()
    modes: Set[str] = frozenset()
    dtypes: Set[str] = frozenset({"float32"})
    devices: Set[str] = frozenset({"cpu"})


def vocabulary() -> dict[str, Set[str]]:
    """All names that each field of Features may have; devices are torch's own."""
    parts = (Attention, HeadGroup, Relation, Norm)
    table = get_type_hints(Table)
    return {
        "clauses": {field.name for part in parts for field in fields(part)},
        "norms": {*get_args(get_type_hints(Norm)["kind"])},
        "approx": {*get_args(get_type_hints(Approx)["kind"])},
        "operations": LEGAL.keys(),
        "tables": {*get_args(table["dtype"]), *(kind.__name__.lower() for kind in get_args(table["origin"]))},
        "modes": {field.name for field in fields(Problem)},
        "dtypes": DTYPES.keys(),
    }


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a kernel; everything in it has been checked.

    q  [B, H, nq, D], k [B, Hkv, n, D], v [B, Hkv, n, Dv], H a multiple of Hkv; query head h reads
       key head h // (H // Hkv). All of one dtype and device.
    tiles       gives `block_mask`, the tiles of this very problem (lengths, offsets and tables of this call).
                They are made when a kernel first asks: one that goes by a table alone spares the search.
    tables      inputs and learned parameters by name, with the axes of their Table; learned ones never have
                B. Float ones may require gradients.
    q_at, k_at  where the queries and the keys stand: the values of `q` and `k` in expressions. Keys of
                streams are numbered (streams.py): some below 0, some from n on.
    n           what `n` means in expressions, one for all batch rows or one each.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tiles: Callable[[], BlockMask]
    tables: Mapping[str, Tensor]
    q_at: Axis
    k_at: Axis
    n: tuple[int, ...]

    @property
    def block_mask(self) -> BlockMask:
        """The tiles of this call."""
        return self.tiles()

    @property
    def adjacent(self) -> bool:
        """Whether queries stand beside one another, and keys too: what depends on the distance alone is then
        equal along the diagonals of the matrix."""
        return self.q_at.starts is not None and self.k_at.starts is not None


Kernel = Callable[[Call], "tuple[Tensor, Tensor]"]
"""Gives the output [B, H, nq, Dv] in q's dtype or, to spare the backward pass its rounding, in float32, and
the log-sum-exp [B, H, nq] in float32 (float64 for float64), natural logarithm, -inf for an empty row, the
sink included. For `sigmoid` and `relu`, where no sum is formed, the second is log of the sum of weights. Of
`approx` it is 0, or -inf for an empty row, and no number that is not finite is made good."""


Gradients: TypeAlias = "tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]"
"""Of q, k, v and, by name, of tables."""


@runtime_checkable
class Differentiable(Protocol):
    """A kernel that gives its own gradients; any other is differentiated by running it again."""

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a call, as `Kernel`."""

    def gradient(
        self,
        call: Call,
        wanted: Sequence[str],
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
    ) -> Gradients:
        """Gradients of q, k, v and, by name, of the `wanted` tables.

        call            the same as in the forward pass
        out, lse        what that gave
        grad_out        gradient of the output, [B, H, nq, Dv]
        grad_lse        gradient of the log-sum-exp, [B, H, nq]; None where nothing depends on it
        """


@runtime_checkable
class Repeatable(Protocol):
    """A kernel that is told what to prepare for calls like one that it had."""

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a call, as `Kernel`."""

    def repeated(self, call: Call) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """What gives as much of other q, k and v of the same shapes, strides and dtypes and with as many
        threads, all else being as in this call, whose vectors it does not keep; the call reads no table. None
        where there is nothing to prepare."""


State: TypeAlias = "tuple[Tensor, ...]"
"""What a kernel keeps of earlier keys: tensors whose first axis is the batch."""


@runtime_checkable
class Stateful(Protocol):
    """A kernel whose later queries need no earlier keys: a state stands for all of them."""

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a call, as `Kernel`."""

    def step(self, call: Call, state: State | None) -> tuple[Tensor, Tensor, State]:
        """What the call gives if the keys of `state` came before its own, none where it is None, and the
        state after those that the last query of each row sees. `state` stays as it is."""


@dataclass(frozen=True, eq=False)
class Pages:
    """Keys and values in pages of a pool: what stands at position p of batch row b is entry p % size of the
    page that `table[b, p // size]` is the number of.

    k, v   [pages, size, Hkv, D] and [pages, size, Hkv, Dv], by any strides
    table  int32 or int64 [B, most pages], on the same device; what no live key is in may be no number of a
           page, and such a page holds anything
    """

    k: Tensor
    v: Tensor
    table: Tensor

    @property
    def size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[1]


@runtime_checkable
class Paged(Protocol):
    """A kernel that finds keys and values in pages by itself; for any other they are gathered."""

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a call, as `Kernel`."""

    def paged(self, call: Call, pages: Pages) -> tuple[Tensor, Tensor] | None:
        """The same of few queries whose keys, from position 0 on, stand in pages; None where it cannot.

        call   k and v are on the device `meta`: they have shapes alone
        pages  what stands at keys that no pair reads is not to be multiplied with anything
        """


class Backend(Protocol):
    """A lowering, registered under the entry-point group `attndsl.backends` by an object like this."""

    @property
    def features(self) -> Features:
        """What it knows; whatever asks for more is declined, and it is not asked."""

    def supports(self, attention: Attention, problem: Problem) -> str | None:
        """None, or the reason why it declines this attention on this problem, all of whose features it
        knows."""

    def cost(self, attention: Attention, problem: Problem, block_mask: BlockMask | None) -> float | None:
        """Estimated seconds of one forward pass of the attention (and backward, if the problem is training),
        None where it knows none of the device; `block_mask` is None where tables are not bound yet, then an
        upper bound."""

    def lower(self, attention: Attention, problem: Problem) -> Kernel:
        """The kernel of an attention. It must be differentiable by torch's autograd where
        `problem.training`."""


@runtime_checkable
class Counting(Protocol):
    """What a backend may have beside, and ours do: its cost of a forward pass is `weighed` counts.

    From them the analyzer tells what a lowering computes, and benchmarks/cost.py fits the seconds.
    """

    @property
    def seconds(self) -> Mapping[str, Mapping[str, float]]:
        """By device what one of each count takes; counts that are not named take nothing."""

    def counts(
        self, attention: Attention, problem: Problem, block_mask: BlockMask | None
    ) -> Mapping[str, float]:
        """What a forward pass of the attention on the problem does, over all heads and batch rows;
        `block_mask` is None as of `cost`. Among others `pairs`: the (q, k) that are computed, live or not;
        `written`: numbers that go through memory in between, such as weights."""


@runtime_checkable
class Remarking(Protocol):
    """What a backend may have beside: something that users are to know where it is chosen or could be."""

    @property
    def remark(self) -> str:
        """In a few words, which stand in print(plan)."""


@runtime_checkable
class Spreading(Protocol):
    """What a backend may have beside: its results are NaN wherever something that is not finite may have
    reached them, if not there alone. On a device that one would have to wait for nobody looks at them then,
    unless the mask reads tables, for which one waits anyway. What no query reads is 0 then."""

    @property
    def spreads(self) -> bool:
        """Whether it is so."""


def weighed(seconds: Mapping[str, float], counts: Mapping[str, float]) -> float:
    return sum(second * counts[name] for name, second in seconds.items())


def predicted(
    seconds: Mapping[str, Mapping[str, float]],
    counts: Mapping[str, float],
    problem: Problem,
    training: float,
) -> float | None:
    """Seconds of a forward pass, times `training` where the problem is: fitted ones, or by the data sheet of
    a device that has one; None for another."""
    here = seconds.get(device_kind(problem))
    found = by_sheet(counts, problem) if here is None else weighed(here, counts)
    return None if found is None else found * (training if problem.training else 1)


def by_sheet(counts: Mapping[str, float], problem: Problem) -> float | None:
    """Seconds of both products of each pair at the peak of the device, and of what is written, once there and
    once back, at its bandwidth."""
    machine = None if device_kind(problem) != "cuda" else sheet_of(_name(problem.device))
    if machine is None:
        return None
    products = 4 * counts["pairs"] * problem.head_dim
    moved = 2 * counts["written"] * DTYPES[problem.dtype]
    return products / machine.flops[problem.dtype] + moved / machine.bandwidth


def _name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""


def device_kind(problem: Problem) -> str:
    """Without its number."""
    return problem.device.partition(":")[0]
