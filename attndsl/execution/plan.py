"""Plan: an attention lowered for one problem by one backend, ready to run."""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from attndsl.attention import Attention
from attndsl.backend import DTYPES, Backend, Call, Kernel, Problem, check_problem
from attndsl.errors import AttnError, fail
from attndsl.execution import registry
from attndsl.expr import Table
from attndsl.language.arguments import signature
from attndsl.program import Program, Unbound
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK_SIZE = 128
MASKS_KEPT = 8


def compile(
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
    backend: str | None = None,
    training: bool = False,
) -> Plan:
    """The attention lowered by the cheapest backend that supports it, or by `backend` alone.

    A plan serves every length up to `length` without recompiling. Raises AttnError for sizes that do not
    fit, an unknown backend, or a `backend` that declines: then no other is tried.
    """
    start = time.perf_counter()
    problem = _problem(
        attention,
        Problem(
            length=lowering.checked_length("length", length),
            q_length=lowering.checked_length("q_length", length if q_length is None else q_length),
            batch=lowering.checked_length("batch", batch),
            heads=lowering.checked_length("heads", heads),
            kv_heads=lowering.checked_length("kv_heads", heads if kv_heads is None else kv_heads),
            head_dim=lowering.checked_length("head_dim", head_dim),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            block_size=lowering.checked_block_size(BLOCK_SIZE if block_size is None else block_size),
            training=training,
        ),
    )
    blocks = None
    if not lowering.mask_tables(attention):
        sizes = lowering.sizes(attention, problem.length, problem.q_length, problem.heads)
        blocks = lowering.block_mask(attention, sizes, {}, problem.block_size)
    seconds = time.perf_counter() - start
    considered = {name: judged(name, attention, problem, blocks) for name in registry.names("backends")}
    chosen = _chosen(considered, backend)
    kernel = registry.plugin("backends", chosen).lower(attention, problem)
    if not callable(kernel):
        raise fail(f"the backend `{chosen}` returned no kernel: its `lower` gave {type(kernel).__name__}")
    return Plan(attention, problem, chosen, considered, kernel, blocks, seconds)


def _problem(attention: object, problem: Problem) -> Problem:
    if isinstance(attention, Unbound):
        written = signature(attention.definition)
        raise fail(f"`{attention.name}` needs parameters", help=f"call it with them: `{written}`")
    if isinstance(attention, Program):
        names = ", ".join(attention.names)
        raise fail("a program is compiled one attention at a time", help=f'write program["..."]: {names}')
    if not isinstance(attention, Attention):
        raise fail(f"expected an attention, not {type(attention).__name__}")
    check_problem(problem)
    lowering.head_groups(attention, problem.heads)
    _check_device(problem.device)
    return problem


def _check_device(name: str) -> None:
    import torch

    kind, _, index = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not count or (index and not (index.isdecimal() and int(index) < count)):
        there = "cpu and cuda" if torch.cuda.is_available() else "cpu alone"
        raise fail(f"there is no device `{name}`", help=f"there is {there}")


def judged(name: str, attention: Attention, problem: Problem, blocks: BlockMask | None) -> float | str:
    """Predicted seconds, or the reason why the backend declines or cannot be used."""
    try:
        backend: Backend = registry.plugin("backends", name)
    except AttnError as error:
        return error.diagnostics[0].message
    reason: object = backend.supports(attention, problem)
    if reason is not None:
        said = isinstance(reason, str) and reason
        return said or f"its `supports` gave {reason!r}, which is neither None nor a reason"
    cost: object = backend.cost(attention, problem, blocks)
    if isinstance(cost, bool) or not isinstance(cost, numbers.Real) or not 0 <= float(cost) < math.inf:
        return f"its cost is not a number of seconds: {cost!r}"
    return float(cost)


def _chosen(considered: Mapping[str, float | str], backend: str | None) -> str:
    if backend is not None:
        if backend not in considered:
            raise fail(f"no backend is named `{backend}`", help=f"there are {', '.join(considered)}")
        verdict = considered[backend]
        if isinstance(verdict, str):
            raise fail(
                f"the backend `{backend}` declines: {verdict}",
                help="leave `backend` out to let the cheapest that supports it be chosen",
            )
        return backend
    costs = {name: cost for name, cost in considered.items() if not isinstance(cost, str)}
    if not costs:
        reasons = "; ".join(f"{name}: {why}" for name, why in considered.items())
        raise fail(f"no backend supports this: {reasons}")
    return min(costs, key=lambda name: costs[name])


@dataclass(frozen=True, eq=False)
class Plan:
    """What was chosen and why, and the call.

    backend          the chosen one
    considered       every backend: predicted seconds, or why it declined
    block_masks      the tiles at full length; None until the tables that they need are bound
    compile_seconds  from the typed attention to the finished tiles
    """

    attention: Attention
    problem: Problem
    backend: str
    considered: Mapping[str, float | str]
    kernel: Kernel = field(repr=False)
    block_masks: BlockMask | None = field(repr=False)
    compile_seconds: float
    tables: Mapping[str, Any] = field(default_factory=dict, repr=False)
    runner: Any = field(init=False, repr=False)
    handle: int = field(init=False, repr=False)
    _kept: dict[tuple[object, ...], BlockMask] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        from attndsl.execution.operator import Runner, register

        names = tuple(t.name for t in (*self.attention.inputs, *self.attention.learned))
        runner = Runner(self.kernel, names, self.call_of, self.backend, self.untrainable)
        object.__setattr__(self, "runner", runner)
        object.__setattr__(self, "handle", register(self.runner))

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: int | tuple[int, ...] | None = None,
        k_offset: int | tuple[int, ...] | None = None,
        return_lse: bool = False,
        **inputs: Any,
    ) -> Any:
        """Attention of q [B, H, nq, D], k [B, Hkv, n, D], v [B, Hkv, n, Dv] -> [B, H, nq, Dv].

        Offsets are an int or one per batch row. With `return_lse` also the log-sum-exp [B, H, nq], -inf
        for an empty row. Raises AttnError for tensors and tables that do not fit the plan, and where
        parameters are to be trained: `module` owns them, here they have their initial values.
        """
        if self.problem.training and self.attention.learned:
            names = ", ".join(f"`{table.name}`" for table in self.attention.learned)
            raise fail(
                f"a call of the plan does not train {names}", help=f"use plan.module(), which owns {names}"
            )
        return self.run(q, k, v, q_offset, k_offset, return_lse, inputs, self._initial())

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_offset: int | tuple[int, ...] | None,
        k_offset: int | tuple[int, ...] | None,
        return_lse: bool,
        inputs: Mapping[str, Any],
        learned: Mapping[str, Tensor],
    ) -> Any:
        """As `__call__`, with values of the learned parameters; everything that is no tensor or size stays
        behind one operator, so that torch.compile sees a single node."""
        from attndsl.execution.operator import attend

        self._check(q, k, v)
        self._refuse_learned(inputs)
        given = self._tensors({**self.tables, **inputs}, len(q))
        tensors = [*given, *(learned[table.name] for table in self.attention.learned)]
        starts = _listed("q_offset", q_offset), _listed("k_offset", k_offset)
        out, lse = attend(q, k, v, tensors, *starts, self.handle)
        return (out, lse) if return_lse else out

    def call_of(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tables: Mapping[str, Tensor],
        q_offset: list[int],
        k_offset: list[int],
    ) -> Call:
        """The checked call with its tiles; no offset means the attention's own."""
        sizes = lowering.sizes(
            self.attention,
            k.shape[2],
            q.shape[2],
            self.problem.heads,
            tuple(q_offset) or None,
            tuple(k_offset) or None,
        )
        for name, offsets in (("q_offset", sizes.q_offset), ("k_offset", sizes.k_offset)):
            if len(offsets) not in (1, len(q)):
                raise fail(f"`{name}` has {len(offsets)} entries for {len(q)} batch rows")
        blocks = self._tiles(sizes, {t.name: tables[t.name] for t in self.attention.inputs}, len(q))
        return Call(q, k, v, blocks, tables, sizes.q_offset, sizes.k_offset, sizes.n)

    def bind(self, **inputs: Any) -> Plan:
        """The plan with these tables in place, tiled once if the mask needs them: `n` is then its length."""
        start = time.perf_counter()
        self._refuse_learned(inputs)
        lowering.check_names(self.attention, inputs)
        given = {
            table.name: self._tensor(table, inputs[table.name])
            for table in self.attention.inputs
            if table.name in inputs
        }
        # what is bound stays as it is; a tensor that learns is the caller's own
        bound = {**self.tables, **{k: v if v.requires_grad else v.clone() for k, v in given.items()}}
        blocks = self.block_masks
        needed = lowering.mask_tables(self.attention)
        if needed and all(table.name in bound for table in needed):
            sizes = lowering.sizes(
                self.attention, self.problem.length, self.problem.q_length, self.problem.heads
            )
            arrays = {name: _array(value) for name, value in bound.items()}
            tables = lowering.checked_tables(self.attention, arrays, sizes, head_dim=self.problem.head_dim)
            blocks = lowering.block_mask(self.attention, sizes, tables, self.problem.block_size)
        seconds = self.compile_seconds + time.perf_counter() - start
        return replace(self, tables=bound, block_masks=blocks, compile_seconds=seconds, _kept={})

    def module(self) -> nn.Module:
        """An nn.Module that owns the learned parameters under the names they are bound to."""
        from attndsl.execution.module import PlanModule

        return PlanModule(self)

    def untrainable(self) -> str | None:
        """Why the backend has no gradients, or None."""
        backend: Backend = registry.plugin("backends", self.backend)
        return backend.supports(self.attention, replace(self.problem, training=True))

    def __reduce__(self) -> tuple[Any, ...]:
        """A kernel may hold anything, so another process compiles anew, with the same backend."""
        return _again, (self.attention, self.problem, self.backend, dict(self.tables))

    def _refuse_learned(self, given: Mapping[str, Any]) -> None:
        for table in self.attention.learned:
            if table.name in given:
                raise fail(
                    f"`{table.name}` is learned, and no input of `{self.attention.name}`",
                    help=f"plan.module() owns `{table.name}`",
                )

    def _initial(self) -> dict[str, Tensor]:
        return {table.name: self.initial(table) for table in self.attention.learned}

    def initial(self, table: Table) -> Tensor:
        """A learned parameter's first value, [H] if it has one per head, then its axes."""
        import torch

        p = self.problem
        dims = [p.head_dim if size == "D" else int(size) for size in table.dims]
        shape = [p.heads, *dims] if table.headed else dims
        return torch.full(shape, table.init or 0.0, dtype=getattr(torch, p.dtype), device=p.device)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        import torch

        p = self.problem
        wanted = {
            "q": (q, p.heads, p.q_length, p.head_dim),
            "k": (k, p.kv_heads, p.length, p.head_dim),
            "v": (v, p.kv_heads, p.length, None),
        }
        for name, (tensor, heads, length, width) in wanted.items():
            if not isinstance(tensor, torch.Tensor):
                raise fail(f"`{name}` must be a torch tensor, and is of type {type(tensor).__name__}")
            shape = tuple(tensor.shape)
            if len(shape) != 4:
                raise fail(f"`{name}` has {len(shape)} axes, and needs 4: [batch, heads, length, head_dim]")
            if shape[1] != heads:
                raise fail(f"`{name}` has {shape[1]} heads, and the plan is for {heads}")
            if width is not None and shape[3] != width:
                raise fail(f"`{name}` has head_dim {shape[3]}, and the plan is for {width}")
            if shape[2] > length:
                size = "q_length" if name == "q" and p.q_length != p.length else "length"
                help = f"compile with `{size}={shape[2]}`"
                raise fail(f"`{name}` has length {shape[2]}, and the plan serves up to {length}", help=help)
            if tensor.dtype != getattr(torch, p.dtype):
                dtype = str(tensor.dtype).removeprefix("torch.")
                help = f'compile with `dtype="{dtype}"`' if dtype in DTYPES else ""
                if name != "q":
                    help = f"`q` is {p.dtype}: pass `{name}.to(q.dtype)`"
                raise fail(f"`{name}` is {dtype}, and the plan is for {p.dtype}", help=help)
            if tensor.device.type != p.device.split(":")[0]:
                raise fail(f"`{name}` is on {tensor.device}, and the plan is for {p.device}")
            if shape[0] != q.shape[0]:
                raise fail(f"`{name}` has {shape[0]} batch rows, and `q` has {q.shape[0]}")
        if k.shape[2] != v.shape[2]:
            raise fail(f"`k` has length {k.shape[2]}, and `v` has {v.shape[2]}")

    def _tensors(self, given: Mapping[str, Any], batch: int) -> list[Tensor]:
        """The inputs in the order of their declaration, on the device, in the dtype of their kind; one batch
        row serves all."""
        lowering.check_names(self.attention, given, self.attention.inputs)
        tensors = [self._tensor(table, given[table.name]) for table in self.attention.inputs]
        return [
            x.expand(batch, *x.shape[1:]) if table.batched and x.dim() and len(x) == 1 else x
            for table, x in zip(self.attention.inputs, tensors, strict=True)
        ]

    def _tensor(self, table: Table, value: Any) -> Tensor:
        import torch

        array = _array_like(table.name, value)
        lowering.check_kind(table, array)
        tensor = torch.as_tensor(array, device=self.problem.device)
        if table.dtype == "int":
            return tensor.long()
        if table.dtype == "float" and not isinstance(value, torch.Tensor):
            return tensor.to(getattr(torch, self.problem.dtype))
        return tensor

    def _tiles(self, sizes: lowering.Sizes, given: Mapping[str, Any], batch: int) -> BlockMask:
        """The tiles of one call, kept for the last few."""
        arrays = {name: _array(value) for name, value in given.items()}
        tables = lowering.checked_tables(self.attention, arrays, sizes, batch, self.problem.head_dim)
        used = (tables[table.name] for table in lowering.mask_tables(self.attention))
        key = (sizes, *((array.shape, array.tobytes()) for array in used))
        found = self._kept.get(key)
        if found is None:
            found = lowering.block_mask(self.attention, sizes, tables, self.problem.block_size)
            while len(self._kept) >= MASKS_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = found
        return found

    def __str__(self) -> str:
        p, blocks = self.problem, self.block_masks
        lines = [
            f"{self.attention.name}: length {p.length:,}, q_length {p.q_length:,}, heads {p.heads}, "
            f"head_dim {p.head_dim}, {p.dtype} on {p.device}"
        ]
        if blocks is None:
            lines.append("  tiles     unknown until the tables are bound")
        else:
            full, partial, empty, distinct = blocks.tiles
            lines.append(
                f"  tiles     {full:,} full, {partial:,} partial ({distinct:,} distinct), {empty:,} empty; "
                f"{p.block_size} tokens a side"
            )
            pairs = blocks.nnz * (p.heads // max(1, blocks.index.shape[1]))
            lines.append(f"  density   {100 * blocks.density:.3g} % ({pairs:,} pairs)")
        for name, verdict in self.considered.items():
            mark = "->" if name == self.backend else "  "
            said = verdict if isinstance(verdict, str) else f"{verdict:.3g} s predicted"
            lines.append(f"  {mark} {name:10} {said}")
        return "\n".join(lines)


def _again(attention: Attention, problem: Problem, backend: str, tables: dict[str, Any]) -> Plan:
    return compile(attention, **vars(problem), backend=backend).bind(**tables)


def _listed(name: str, offset: Any) -> list[int]:
    """An integer, one per batch row, or None for the attention's own. Raises AttnError for anything else."""
    if offset is None:
        return []
    if isinstance(offset, int):
        return [lowering.checked_length(name, offset)]
    items = offset.tolist() if hasattr(offset, "tolist") else offset
    items = items if isinstance(items, list | tuple) else [items]
    if not items:
        raise fail(f"`{name}` is empty", help="leave it out, or give one position per batch row")
    return [lowering.checked_length(name, item) for item in items]


def _array_like(name: str, value: Any) -> Any:
    """What has a dtype and a shape. Raises AttnError for what is no array of numbers or truths."""
    if hasattr(value, "detach"):
        if value.is_sparse:
            raise fail(f"`{name}` is a sparse tensor", help=f"give `{name}.to_dense()`")
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        raise fail(f"`{name}` is no array: its rows differ in length") from None
    if array.dtype.kind not in "biufc":
        raise fail(f"`{name}` is no array of numbers or truths, but {type(value).__name__}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _array(value: Any) -> Any:
    """A tensor, or whatever numpy reads, as an array; bfloat16 has no numpy type and only floats do."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value)
