"""Plan: an attention lowered for one problem by one backend, ready to run."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import torch
from torch import Tensor, nn

from attndsl.attention import Attention
from attndsl.axis import Axis
from attndsl.backend import DTYPES, Problem, Repeatable, State, device_kind
from attndsl.bound import Bound
from attndsl.errors import AttnError, brief, fail, quantity
from attndsl.execution import choice, varlen
from attndsl.execution.choosing import chosen
from attndsl.execution.flexing import Flex, check_clauses, flex_of
from attndsl.execution.lowered import At, Lowered, Places, taken
from attndsl.execution.operator import check_tangents, refuse_script, run, step
from attndsl.execution.paged import attend, check_attention, checked_pages
from attndsl.execution.repeats import Repeats, likeness
from attndsl.execution.session import REWIND, Session
from attndsl.execution.statesession import StateSession, stateful
from attndsl.execution.streaming import Pair, begun, held_of, keys_and_values
from attndsl.execution.streamsession import StreamSession
from attndsl.execution.sums import Parts, SumPlan, check_learned, gate_of, of_part, refuse_learned
from attndsl.expr import Learned, Table
from attndsl.keywords import by_name, missing
from attndsl.language.lookups import beyond_heads, placed
from attndsl.pictures import notebook
from attndsl.program import bound_of
from attndsl.streams import described
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@by_name
def compile(
    attention: Bound | Attention,
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
) -> AnyPlan:
    """The attention lowered by the cheapest backend that supports it, or by `backend` alone; a sum of
    attentions part by part.

    attention   one of a program, its parameters bound
    length      keys, in tokens: the most of a call
    q_length    queries, the most of a call; `length` if not given
    batch       batch rows that costs are predicted for; a call may have any number
    heads       query heads H
    kv_heads    heads of keys and values Hkv, a divisor of `heads`; as many if not given
    head_dim    features D of queries and keys; values may have more or fewer
    dtype       of q, k and v: float16, bfloat16, float32 or float64
    device      torch's name of it, such as cpu, cuda or cuda:1
    block_size  tokens on a side of a tile, a multiple of 8; 128 if not given
    backend     the only one to be taken; if not given the cheapest, in seconds that are predicted
    training    whether gradients are asked for: what has none declines, and costs are of both passes

    A plan serves every length up to `length` without recompiling. Raises AttnError for sizes that do not
    fit, an unknown backend, or a `backend` that declines: then no other is tried. Warns of a list or table
    that is read by the head and has more entries than there are heads.
    """
    start = time.perf_counter()
    bound = bound_of(attention)
    attention = bound.attention
    problem = Problem.of(
        attention, length=length, q_length=q_length, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, dtype=dtype, device=device, block_size=block_size, training=training,
    )  # fmt: skip
    if not isinstance(backend, str | None):
        raise fail(
            f"`backend` is the name of one, not {type(backend).__name__}",
            help="leave it out: the cheapest that can is taken",
        )
    names = [("table", table.name) for table in (*attention.inputs, *attention.learned)]
    for what, name in [*names, *(("part", part.attention.name) for part in attention.parts)]:
        if name in inspect.signature(Plan.__call__).parameters:
            raise fail(f"the {what} `{name}` has the name of an argument of the call", help="rename it")
    _check_device(problem.device)
    # tensors of a mod of FlexAttention may be those of more heads
    for said in () if bound.tables else beyond_heads(attention, problem.heads):
        warnings.warn(said, stacklevel=3)
    if attention.parts:
        return _added(attention, problem, backend)
    blocks = _tiled(attention, problem, bound.tables)
    seconds = time.perf_counter() - start
    left = attention.attended, problem.attended(attention)
    lowered, considered = taken(*left, choice.considered(*left, blocks), backend)
    plan = Plan(attention, problem, lowered, considered, blocks, seconds, asked=backend is not None)
    return replace(plan, tables=plan._held(bound.tables)) if bound.tables else plan


def _tiled(attention: Attention, problem: Problem, tables: Mapping[str, Any]) -> BlockMask | None:
    """The tiles at full length, if these tables are all that the mask needs."""
    needed = lowering.mask_tables(attention)
    if attention.approx is not None or not all(table.name in tables for table in needed):
        return None
    sizes = lowering.sizes(attention, problem.length, problem.q_length, problem.heads)
    given = lowering.checked_tables(attention, tables, sizes, head_dim=problem.head_dim)
    with placed(attention, problem.heads):
        return lowering.block_mask(attention, sizes, given, problem.block_size)


def _added(attention: Attention, problem: Problem, backend: str | None) -> SumPlan:
    asked = vars(problem)
    wide = "float64" if problem.dtype == "float64" else "float32"
    parts: dict[str, Any] = Parts()
    gates: dict[str, Any] = {}
    for part in attention.parts:
        name, gate = part.attention.name, gate_of(attention, part)
        try:
            parts[name] = compile(part.attention, **asked, backend=backend)
        except AttnError as error:
            raise of_part(name, error) from None
        gates[name] = gate
        if isinstance(gate, Attention):
            gates[name] = compile(gate, **{**asked, "kv_heads": 1, "dtype": wide}, backend="reference")
    return SumPlan(attention, problem, parts, gates)


def _check_device(name: str) -> None:
    kind, _, index = name.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not count or (index and not (index.isdecimal() and int(index) < count)):
        there = "cpu and cuda" if torch.cuda.is_available() else "cpu alone"
        raise fail(f"there is no device `{brief(name)}`", help=f"there is {there}")


@dataclass(frozen=True, eq=False)
class Plan:
    """What was chosen and why, and the call.

    attention, problem   what the plan is of
    lowered          what attends to the keys that are made of streams, or to those given: the chosen backend
                     and its kernel
    considered       every backend in the order in which they are taken: predicted seconds, None where the
                     cost is unknown, or why it declined
    block_masks      the tiles at full length; None until the tables that they need are bound, where keys are
                     chosen by content, and where `approx` stands in place of pairs
    compile_seconds  from the typed attention to the finished tiles
    tables           what is bound
    asked            whether the backend was asked for by its name
    """

    attention: Attention
    problem: Problem
    lowered: Lowered = field(repr=False)
    considered: Mapping[str, choice.Verdict]
    block_masks: BlockMask | None = field(repr=False)
    compile_seconds: float
    tables: Mapping[str, Any] = field(default_factory=dict, repr=False)
    asked: bool = False
    others: dict[tuple[str, str], Lowered] = field(default_factory=dict, repr=False)
    """What was lowered for calls in other dtypes, and by `reference` for weights."""
    owned: set[str] = field(default_factory=set, repr=False)
    """Parameters that a module has, of which a call with their first values is still to be told."""
    repeats: Repeats = field(default_factory=Repeats, repr=False)

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            raise missing("a plan", name, dir(Plan))

    __prepare_scriptable__ = refuse_script

    @property
    def backend(self) -> str:
        """The name of the chosen one."""
        return self.lowered.backend

    @property
    def rejected(self) -> dict[str, choice.Verdict]:
        """The other backends: seconds, or why not."""
        return {name: verdict for name, verdict in self.considered.items() if name != self.backend}

    @cached_property
    def _bare(self) -> bool:
        """Whether a call needs nothing but q, k and v, and may be prepared by one like it."""
        attention = self.attention
        beside = attention.inputs or attention.learned or attention.selected or attention.streams
        return not (beside or attention.approx) and isinstance(self.lowered.kernel, Repeatable)

    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: Offset = None,
        k_offset: Offset = None,
        q_positions: ArrayLike | Tensor | None = None,
        k_positions: ArrayLike | Tensor | None = None,
        n: int | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        learned: Mapping[str, Tensor] | None = None,
        return_lse: Literal[False] = False,
        return_weights: Literal[False] = False,
        **inputs: Any,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        return_lse: Literal[True],
        return_weights: Literal[True],
        **call: Any,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **call: Any
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_weights: Literal[True], **call: Any
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **call: Any
    ) -> Tensor | tuple[Tensor, ...]: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_weights: bool, **call: Any
    ) -> Tensor | tuple[Tensor, ...]: ...
    @by_name
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: Offset = None,
        k_offset: Offset = None,
        q_positions: ArrayLike | Tensor | None = None,
        k_positions: ArrayLike | Tensor | None = None,
        n: int | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        learned: Mapping[str, Tensor] | None = None,
        return_lse: bool = False,
        return_weights: bool = False,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attention of q [B, H, nq, D], k [B, Hkv, n, D], v [B, Hkv, n, Dv] -> [B, H, nq, Dv], all of one of
        DTYPES; autocast converts them as it does for torch's own attention.

        Where queries stand is `q_offset`, an int or one per batch row, or `q_positions` [nq] or [B, nq], in
        any order; if neither is given, as the text says or else from n - nq on. Keys likewise by `k_offset`,
        0 if not given, or `k_positions`. Tensors of them are on q's device, and are read inside the operator,
        once. `n`, which positions end at, is the greatest of a key + 1 where it is not given; of an offset
        only the first query has to stand below it.

        Where keys are streams, k and v are those of the tokens, and `memory` the keys [B, Hkv, m, D] and
        values [B, Hkv, m, Dv] before them, the oldest first.

        With `return_lse` also the log-sum-exp [B, H, nq], -inf for an empty row. With `return_weights` then
        also what each value is multiplied by, [B, H, nq, n], 0 for pairs that are not related: the output,
        them, and gradients of both are those of `reference`, which forms all pairs, and B H n max(nq, n) is
        at most WEIGHTS. Where `approx` stands in place of pairs there is no log-sum-exp, and weights are what
        each value is multiplied by all the same. `learned` are the values of parameters, by name, which
        `module` owns; without it they have their first ones. `inputs` are run-time tables by name, arrays or
        tensors with the axes that they are declared with; those that are bound may be left out. Raises
        AttnError for tensors, positions and tables that do not fit the plan, and where parameters without
        values are to be trained; warns where they are not, and gradients are asked for.
        """
        like = None
        beside = (q_offset, k_offset, q_positions, k_positions, n, memory, learned)
        more = inputs or return_weights or [x for x in beside if x is not None]
        if not (more or torch.compiler.is_compiling()) and self._bare:
            like = likeness(q, k, v)
            found = None if like is None else self.repeats.results(like, q, k, v)
            if found is not None:
                return found if return_lse else found[0]
        self._tell_untrained(learned, q, k, v)
        if return_lse and self.attention.approx is not None:
            raise fail(f"`{self.attention.approx.kind}` has no log-sum-exp: it sums no weights of pairs")
        held = held_of(self.attention, memory)
        if isinstance(q, Tensor) and not q.is_meta and torch.is_autocast_enabled(q.device.type):
            narrow = torch.get_autocast_dtype(q.device.type)
            q, k, v = (x.to(narrow) for x in (q, k, v))
            held = held and (held[0].to(narrow), held[1].to(narrow))
        self._check(q, k, v)
        lowered = self._served(q.dtype, "reference" if return_weights else self.backend)
        given = self._given(q, learned, inputs)
        check_tangents(q, k, v, *(held or ()), *given.values())
        places: Places = (
            *_placed("q", q, q_offset, q_positions),
            *_placed("k", k, k_offset, k_positions),
            None if n is None else lowering.checked_length("n", n),
        )
        k, v, places = self._keys(k, v, held, given, places)
        values = _beside_identity(q, v) if return_weights else v
        out, lse = run(lowered, q, k, values, lowered.tensors(given), places)
        if like is not None:
            self.repeats.keep(like, lowered, q, k, v)
        if not return_weights:
            return (out, lse) if return_lse else out
        out, weights = out[..., : v.shape[3]], out[..., v.shape[3] :]
        return (out, lse, weights) if return_lse else (out, weights)

    @overload
    def paged(
        self,
        q: Tensor,
        pool: tuple[Tensor, Tensor],
        block_table: Tensor,
        lens: Tensor,
        *,
        learned: Mapping[str, Tensor] | None = None,
        return_lse: Literal[False] = False,
        **inputs: Any,
    ) -> Tensor: ...
    @overload
    def paged(
        self,
        q: Tensor,
        pool: tuple[Tensor, Tensor],
        block_table: Tensor,
        lens: Tensor,
        *,
        return_lse: Literal[True],
        **call: Any,
    ) -> tuple[Tensor, Tensor]: ...
    @by_name
    def paged(
        self,
        q: Tensor,
        pool: tuple[Tensor, Tensor],
        block_table: Tensor,
        lens: Tensor,
        *,
        learned: Mapping[str, Tensor] | None = None,
        return_lse: bool = False,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the last tokens of each row to keys in pages, q [B, H, m, D] -> [B, H, m, Dv].

        q            of m tokens, 1 to 16, at the positions len - m to len - 1 of their row
        pool         keys [pages, page_size, Hkv, D] and values [pages, page_size, Hkv, Dv] in q's dtype, by
                     any strides: vLLM's layout, and NHD of FlashInfer, whose HND is `x.transpose(1, 2)`
        block_table  int32 or int64 [B, most pages]: position p of a row is entry p % page_size of the page
                     block_table[row, p // page_size]
        lens         int32 or int64 [B], the tokens of each row, the new ones included; a row of none gives 0
        learned      values of parameters by name, as in a call
        return_lse   whether the log-sum-exp [B, H, m] comes beside the output
        inputs       run-time tables by name; `n` is the length of the longest row, and what stands behind a
                     shorter one is not read

        What a row gives is what the plan gives for it alone, with its keys side by side. Keys that no query
        reads are not touched, and pages that hold no other may have any number. Raises AttnError for what
        does not fit, keys that are chosen by content or made of tokens, and gradients.
        """
        self._tell_untrained(learned)
        check_attention(self.attention)
        if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
            q = q.to(torch.get_autocast_dtype(q.device.type))
        p = self.problem
        self._check_vectors({"q": (q, p.heads, p.q_length, p.head_dim)}, q)
        pages = checked_pages(p, q, pool, block_table, lens)
        given = self._given(q, learned, inputs)
        lowered = self._served(q.dtype, self.backend)
        with torch.no_grad():
            out, lse = attend(lowered, q, pages, lens, lowered.tensors(given))
        return (out, lse) if return_lse else out

    @by_name
    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any = None, **call: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of sequences one behind the other, each to itself alone, [total, H, D] -> [total, H, Dv].

        q, k, v  [total, H, D], [total, Hkv, D] and [total, Hkv, Dv]
        cu_q     integers [sequences + 1]: where the queries of each begin, from 0 on, and the end of the last
        cu_k     the same of keys and values; `cu_q` if not given
        call     `learned`, `return_lse` and run-time tables, as in a call: of those with an axis B each
                 sequence has a row. The log-sum-exp is [total, H]

        What a sequence gives is what a call gives of it, gradients too: sequences of one length go into one
        call. Raises AttnError as a call does, and for tokens that `cu_q` and `cu_k` do not tell of.
        """
        found: Tensor | tuple[Tensor, Tensor] = varlen.attend(
            self, self.attention, (q, k, v), cu_q, cu_k, call
        )
        return found

    def _step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_at: Axis,
        k_at: Axis,
        state: State | None,
        *,
        learned: Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, State]:
        """For a StateSession: the output of a call whose keys come after those that `state` stands for, and
        the state after those that the last query of each row sees. The kernel is `Stateful`."""
        self._check(q, k, v)
        lowered = self._served(q.dtype, self.backend)
        given = self._given(q, learned, inputs)
        sizes = lowered.sizes(q, k, (None, q_at, None, k_at, None))
        return step(lowered, q, k, v, lowered.tensors(given), sizes, state)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        made: Callable[[Mapping[str, Tensor]], Pair],
        q_at: Axis,
        n: int,
        *,
        learned: Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The output of q at `q_at`, where the keys and values of its streams are those that `made` gives of
        the tables of the call, the first of them where there are `n` tokens: what sessions of streams call.
        k and v are those that came; `learned` and `inputs` are as in a call."""
        self._check(q, k, v)
        lowered = self._served(q.dtype, self.backend)
        given = self._given(q, learned, inputs)
        keys, values = made(given)
        out, _ = run(lowered, q, keys, values, lowered.tensors(given), (None, q_at, None, None, n))
        return out

    def _tell_untrained(self, learned: Mapping[str, Tensor] | None, *given: Tensor) -> None:
        """Where parameters have their first values: raises AttnError if gradients were asked for at compile,
        and warns if they are at a call of `given`."""
        if learned is not None or not any(table.learned for table in self.attention.learned):
            return
        names = ", ".join(f"`{table.name}`" for table in self.attention.learned if table.learned)
        if self.problem.training:
            said = f"a call of the plan does not train {names}"
            raise fail(said, help=f"use plan.module(), which owns {names}")
        asked = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given)
        if asked and not torch.compiler.is_compiling():
            self.owned.clear()
            said = (
                f"a call of the plan has no gradients for {names}: call `plan.module()`, or pass `learned=`"
            )
            warnings.warn(said, stacklevel=4)

    def _given(
        self, q: Tensor, learned: Mapping[str, Tensor] | None, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """All tables of a call by name."""
        if not (inputs or learned is not None or self.attention.inputs or self.attention.learned):
            return {}
        return self._tensors({**self.tables, **inputs}, q) | self._learned(learned)

    @by_name
    def choices(
        self,
        q: Tensor,
        k: Tensor,
        *,
        q_offset: Offset = None,
        k_offset: Offset = None,
        q_positions: ArrayLike | Tensor | None = None,
        k_positions: ArrayLike | Tensor | None = None,
        n: int | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """What a call with these arguments chooses by content: int64 tensors by the names of their tables,
        which `mask`, `block_mask` and `analyze` take as they take inputs.

        q, k          [B, H, nq, D] and [B, Hkv, n, D]
        q_offset, k_offset, q_positions, k_positions, n, memory   as in a call
        inputs        run-time tables by name

        Raises AttnError as a call does.
        """
        self._check(q, k, k)
        lowered = self._served(q.dtype, self.backend)
        given = self._tensors({**self.tables, **inputs}, q) | self._learned(None)
        places: Places = (
            *_placed("q", q, q_offset, q_positions),
            *_placed("k", k, k_offset, k_positions),
            None if n is None else lowering.checked_length("n", n),
        )
        held = held_of(self.attention, memory)
        if not lowered.selected:
            return {}
        # no value is read: those without features are made of nothing
        k, _, places = self._keys(k, k[..., :0], held and (held[0], held[0][..., :0]), given, places)
        found = chosen(lowered, q, k, lowered.tensors(given), places, watched=False)
        return {table.name: x for table, x in zip(lowered.selected, found, strict=True)}

    @by_name
    def bind(self, **inputs: Any) -> Plan:
        """The plan with these tables in place, tiled once if the mask needs them: `n` is then its length.

        inputs  run-time tables by name, arrays or tensors; a call may give another in place of one

        Raises AttnError for a table that it does not have, and one that does not fit its axes.
        """
        start = time.perf_counter()
        self._refuse_made(inputs)
        lowering.check_names(self.attention, inputs)
        bound = self._held(inputs)
        blocks = self.block_masks
        if lowering.mask_tables(self.attention):
            blocks = _tiled(self.attention, self.problem, bound) or blocks
        seconds = self.compile_seconds + time.perf_counter() - start
        return replace(self, tables=bound, block_masks=blocks, compile_seconds=seconds)

    def _held(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is bound, these among it. It stays as it is; a tensor that learns is the caller's own."""
        given = {
            table.name: self._tensor(table, inputs[table.name])
            for table in self.attention.inputs
            if table.name in inputs
        }
        return {**self.tables, **{k: v if v.requires_grad else v.clone() for k, v in given.items()}}

    @by_name
    def to_flex(self, *, learned: Mapping[str, Tensor] | None = None, **inputs: Any) -> Flex:
        """The plan for FlexAttention at its full length, where that stands for its backend:
        `flex_attention(q, k, v, *plan.to_flex())`, with `enable_gqa=True` where there are fewer key heads.

        learned  values of parameters by name, through which gradients pass; the first ones if not given
        inputs   run-time tables by name, as in a call; choices too, as `choices` gives them

        Raises AttnError for an attention that FlexAttention does not compute, and tables that do not fit.
        """
        attention, p = self.attention, self.problem
        check_clauses(attention)
        for table in attention.learned:
            if table.name in inputs:
                self._refuse_made(inputs)
        sizes = lowering.sizes(attention, p.length, p.q_length, p.heads)
        read = [table for table in (*attention.inputs, *attention.selected) if table in attention.read]
        given = lowering.checked_tables(attention, {**self.tables, **inputs}, sizes, None, p.head_dim, read)
        with placed(attention, p.heads):
            blocks = lowering.block_mask(attention, sizes, given, p.block_size)
            values = {**given, **self._learned(learned)}
            return flex_of(attention, sizes, blocks, values, p.head_dim, getattr(torch, p.dtype), p.device)

    @by_name
    def session(
        self,
        batch: int,
        capacity: int,
        *,
        rewind: int = REWIND,
        v_dim: int | None = None,
        dtype: str | None = None,
        memory: Pair | None = None,
    ) -> Session:
        """An empty cache of keys and values, see `Session`.

        batch     sequences, one a batch row
        capacity  the most tokens of one
        rewind    how many tokens `truncate` can take back where the cache is used round and round
        v_dim     features of values; as many as of keys if not given
        dtype     of what is kept; the plan's if not given
        memory    that of a call

        Raises AttnError for an attention where later tokens could change what earlier ones give, for a
        capacity that the plan does not serve, and for memory that does not fit.

        Where the kernel keeps a state in place of keys (`linear`) it is a StateSession, which does not grow,
        and where keys are streams a StreamSession.
        """
        held = held_of(self.attention, memory)
        if self.attention.streams:
            return StreamSession(self, batch, capacity, rewind=rewind, v_dim=v_dim, dtype=dtype, held=held)
        kind = StateSession if stateful(self, rewind) else Session
        return kind(self, batch, capacity, rewind=rewind, v_dim=v_dim, dtype=dtype)

    @by_name
    def module(self) -> PlanModule:
        """An nn.Module that owns the learned parameters under the names they are bound to."""
        self.owned.update(table.name for table in self.attention.learned if table.learned)
        return PlanModule(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """A kernel may hold anything, so another process compiles anew, with the same backend."""
        return _again, (self.attention, self.problem, self.backend, dict(self.tables), self.asked)

    def _served(self, dtype: torch.dtype, backend: str) -> Lowered:
        """What runs in this dtype, by this backend; where the plan's own was not asked for and declines the
        dtype, by the cheapest that takes it. Raises AttnError where that declines too."""
        name = str(dtype).removeprefix("torch.")
        if name == self.problem.dtype and backend == self.backend:
            return self.lowered
        if (name, backend) not in self.others:
            if torch.compiler.is_compiling():
                raise fail(
                    f"the plan is for {self.problem.dtype} by `{self.backend}`, and was not called in {name} "
                    f"by `{backend}` yet",
                    help="call it so once before torch.compile",
                )
            attention, problem = self.lowered.attention, replace(self.lowered.problem, dtype=name)
            considered = choice.considered(attention, problem, self.block_masks)
            left_open = backend == self.backend and not self.asked and isinstance(considered[backend], str)
            lowered, _ = taken(attention, problem, considered, None if left_open else backend)
            self.others[name, backend] = lowered
        return self.others[name, backend]

    def _keys(
        self, k: Tensor, v: Tensor, held: Pair | None, given: Mapping[str, Tensor], places: Places
    ) -> tuple[Tensor, Tensor, Places]:
        """What is attended to, and where it stands. Raises AttnError for memory that does not fit."""
        attention, n = self.attention, k.shape[2]
        if not attention.streams:
            return k, v, places
        q_offset, q_at, *placed = places
        if any(place is not None for place in placed):
            raise fail(
                f"the keys of `{attention.name}` are streams of all tokens, which stand from position 0 on",
                help="leave `k_offset`, `k_positions` and `n` out",
            )
        k, v = keys_and_values(attention, self.problem.heads, k, v, held, given)
        return k, v, (q_offset, q_at, None, None, n)

    def _refuse_made(self, given: Mapping[str, Any]) -> None:
        for table in self.attention.selected:
            if table.name in given:
                raise fail(f"`{table.name}` is chosen at every call, and no input of `{self.attention.name}`")
        for table in self.attention.learned:
            if table.name in given:
                raise fail(
                    f"`{table.name}` is learned, and no input of `{self.attention.name}`",
                    help=f"plan.module() owns `{table.name}`",
                )

    def _learned(self, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The values of the parameters; constants are as drawn unless they are given. Raises AttnError for
        one that is missing, unknown or does not fit."""
        tables = {table.name: table for table in self.attention.learned}
        if given is not None:
            check_learned(tables, given)
        elif self.owned and not torch.compiler.is_compiling():
            names = ", ".join(f"`{name}`" for name in sorted(self.owned))
            self.owned.clear()
            said = f"`plan` itself has the first values of {names}: call the module, or pass `learned=`"
            warnings.warn(said, stacklevel=5)
        first = {t.name: self.initial(t) for t in tables.values() if given is None or not t.learned}
        given = {**first, **(given or {})}
        for name, table in tables.items():
            if [*given[name].shape] != self._shape(table):
                raise fail(f"`{name}` is {self._shape(table)}, and was given as {[*given[name].shape]}")
        return given

    def initial(self, table: Table) -> Tensor:
        """A parameter's first value, with the axes of its table."""
        if table.name in self.lowered.drawn:
            return self.lowered.drawn[table.name].to(self._table_dtype())
        assert isinstance(table.origin, Learned)
        shape, device = self._shape(table), self.problem.device
        if table.origin.init == 0.0 and (found := begun(self.attention, table, shape)) is not None:
            return found.to(device, self._table_dtype())
        return torch.full(shape, table.origin.init, dtype=self._table_dtype(), device=device)

    def _shape(self, table: Table) -> list[int]:
        sizes = {"H": self.problem.heads, "D": self.problem.head_dim, "n": self.problem.length}
        return [size if isinstance(size, int) else sizes[size] for size in table.dims]

    def _table_dtype(self) -> torch.dtype:
        """Of parameters and of tables that come without one: scores are computed in no less."""
        return torch.promote_types(getattr(torch, self.problem.dtype), torch.float32)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        p = self.problem
        wanted = {
            "q": (q, p.heads, p.q_length, p.head_dim),
            "k": (k, p.kv_heads, p.length, p.head_dim),
            "v": (v, p.kv_heads, p.length, None),
        }
        self._check_vectors(wanted, q)
        if k.shape[2] != v.shape[2]:
            raise fail(f"`k` has length {k.shape[2]}, and `v` has {v.shape[2]}")

    def _check_vectors(self, wanted: Mapping[str, tuple[Tensor, int, int, int | None]], q: Tensor) -> None:
        """Raises AttnError for tensors that are not [batch, heads, length, features], by name, or not like
        q."""
        p = self.problem
        for name, (tensor, heads, length, width) in wanted.items():
            if not isinstance(tensor, torch.Tensor):
                raise _no_tensor(name, tensor)
            _check_strided(name, tensor)
            shape = tensor.shape
            if len(shape) != 4:
                help = _four_axes(name, shape, heads, width)
                said = f"`{name}` has {quantity(len(shape), 'axis', 'axes')}, and needs 4"
                raise fail(f"{said}: [batch, heads, length, head_dim]", help=help)
            if shape[1] != heads:
                size = "heads" if name == "q" else "kv_heads"
                help = f"compile with `{size}={shape[1]}`" if name != "v" else "there are as many as of `k`"
                if shape[2] == heads:
                    help = f"the axes are [batch, heads, length, head_dim]: pass `{name}.transpose(1, 2)`"
                said = quantity(shape[1], "head")
                raise fail(f"`{name}` has {said}, and the plan is for {heads}", help=help)
            if width is not None and shape[3] != width:
                help = f"compile with `head_dim={shape[3]}`"
                if shape[2] == width:
                    help = f"the axes are [batch, heads, length, head_dim]: pass `{name}.transpose(2, 3)`"
                raise fail(f"`{name}` has head_dim {shape[3]}, and the plan is for {width}", help=help)
            if shape[2] > length:
                size = "q_length" if name == "q" and p.q_length != p.length else "length"
                help = f"compile with `{size}={shape[2]}`"
                raise fail(f"`{name}` has length {shape[2]}, and the plan serves up to {length}", help=help)
            if tensor.dtype not in FLOATS:
                dtype = str(tensor.dtype).removeprefix("torch.")
                said = f"`{name}` is {dtype}, and must be one of {', '.join(DTYPES)}"
                raise fail(said, help="" if tensor.is_complex() else f"pass `{name}.float()`")
            if tensor.dtype != q.dtype:
                here, of_q = (str(x.dtype).removeprefix("torch.") for x in (tensor, q))
                raise fail(f"`{name}` is {here}", help=f"`q` is {of_q}: pass `{name}.to(q.dtype)`")
            if tensor.device.type not in (device_kind(p), "meta"):
                help = f"pass `{name}.to('{p.device}')`, or compile with `device='{tensor.device}'`"
                raise fail(f"`{name}` is on {tensor.device}, and the plan is for {p.device}", help=help)
            if tensor.is_meta != q.is_meta:
                raise fail(f"`{name}` is on {tensor.device}, and `q` is on {q.device}")
            if shape[0] != q.shape[0]:
                help = f"pass `{name}.expand({q.shape[0]}, -1, -1, -1)`" if shape[0] == 1 else ""
                said = f"`{name}` has {quantity(shape[0], 'batch row')}, and `q` has {q.shape[0]}"
                raise fail(said, help=help)

    def _tensors(self, given: Mapping[str, Any], q: Tensor) -> dict[str, Tensor]:
        """The inputs on the device, in the dtype of their kind; one batch row serves all."""
        batch = len(q)
        self._refuse_made(given)
        lowering.check_names(self.attention, given, self.attention.inputs)
        tensors = {t.name: self._tensor(t, given[t.name], q.dtype) for t in self.attention.inputs}
        for table in self.attention.inputs:
            x = tensors[table.name]
            if table.batched and x.dim() and len(x) == 1:
                tensors[table.name] = x.expand(batch, *x.shape[1:])
        return tensors

    def _tensor(self, table: Table, value: Any, beside: torch.dtype | None = None) -> Tensor:
        array = _array_like(table.name, value)
        lowering.check_kind(table, array)
        if isinstance(array, torch.Tensor):
            tensor = array.to(self.problem.device)
            return tensor.long() if table.dtype == "int" else tensor
        # a copy: the caller may fill the array anew before the backward pass
        wide = "float64" if torch.float64 in (self._table_dtype(), beside) else "float32"
        dtype = {"int": "int64", "bool": "bool", "float": wide}[table.dtype]
        return torch.from_numpy(np.array(array, dtype, order="C")).to(self.problem.device)

    def __repr__(self) -> str:
        return f"<plan {self.attention.name}: {self.backend}, {self.problem}>"

    def _repr_html_(self) -> str:
        blocks = self.block_masks
        drawn = [] if blocks is None else [notebook.figures(blocks, self.attention.name)]
        return notebook.shown([*drawn, notebook.text(str(self))])

    def __str__(self) -> str:
        """What was chosen and why, on some lines."""
        p, blocks = self.problem, self.block_masks
        lines = [f"{self.attention.name}: {p}"]
        if self.attention.approx is not None:
            lines.append(f"  tiles     none: `{self.attention.approx.kind}` has no weights of pairs")
        elif blocks is None and self.attention.selected:
            lines.append("  tiles     unknown: keys are chosen anew at every call")
        elif blocks is None:
            lines.append("  tiles     unknown until the tables are bound")
        else:
            full, partial, empty, distinct = blocks.tiles
            lines.append(
                f"  tiles     {full:,} full, {partial:,} partial ({distinct:,} distinct), {empty:,} empty; "
                f"{p.block_size} tokens a side"
            )
            pairs = blocks.nnz * (p.heads // max(1, blocks.index.shape[1]))
            lines.append(f"  density   {100 * blocks.density:.3g} % ({pairs:,} pairs)")
        if said := lowering.grouped(self.attention, p.heads):
            lines.append(f"  heads     {said}, by group")
        if self.attention.streams:
            lines.insert(1, f"  keys      {described(self.attention.streams)}")
        for name, verdict in self.considered.items():
            mark = "->" if name == self.backend else "  "
            lines.append(f"  {mark} {name:10} {choice.said(name, verdict, p)}")
        return "\n".join(lines)


AnyPlan: TypeAlias = "Plan | SumPlan"


class PlanModule(nn.Module):
    """Attention with trainable parameters, under the names they are bound to, and constants that are drawn as
    buffers.

    `forward` takes what `Plan.__call__` takes.
    """

    if TYPE_CHECKING:
        __call__: Plan
        """What it takes and gives is what the plan does."""

    __prepare_scriptable__ = refuse_script

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        for table in plan.attention.learned:
            if hasattr(self, table.name):
                raise fail(
                    f"the learned parameter `{table.name}` has the name of an attribute of nn.Module",
                    help="bind it to another name",
                )
            if table.learned:
                self.register_parameter(table.name, nn.Parameter(plan.initial(table)))
            else:
                self.register_buffer(table.name, plan.initial(table).clone())

    @by_name
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        """The plan's call of q, k and v, with the parameters as they are; `call` is what else that takes."""
        refuse_learned(call)
        return self.plan(q, k, v, learned=self._learned() or None, **call)

    @by_name
    def paged(
        self, q: Tensor, pool: tuple[Tensor, Tensor], block_table: Tensor, lens: Tensor, **call: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `Plan.paged` of `q`, `pool`, `block_table` and `lens`, with the parameters as they are; `call`
        is what else that takes."""
        refuse_learned(call)
        found: Tensor | tuple[Tensor, Tensor] = self.plan.paged(
            q, pool, block_table, lens, learned=self._learned(), **call
        )
        return found

    @by_name
    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any = None, **call: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `Plan.varlen` of `q`, `k`, `v`, `cu_q`, `cu_k` and `call`, with the parameters as they are."""
        refuse_learned(call)
        found: Tensor | tuple[Tensor, Tensor] = varlen.attend(
            self, self.plan.attention, (q, k, v), cu_q, cu_k, call
        )
        return found

    def extra_repr(self) -> str:
        """Its line in print(model)."""
        owned = "".join(f", {name}={[*x.shape]}" for name, x in self._learned().items())
        return f"{self.plan.attention.name}, {self.plan.backend}, {self.plan.problem}{owned}"

    def _learned(self) -> dict[str, Tensor]:
        # by attribute: parametrizations and functional_call put plain tensors there
        return {table.name: getattr(self, table.name) for table in self.plan.attention.learned}

    @by_name
    def session(self, batch: int, capacity: int, **more: Any) -> Session:
        """As `Plan.session` of `batch`, `capacity` and `more`: `rewind`, `v_dim`, `dtype`. A step takes the
        parameters as they are then."""
        made = self.plan.session(batch, capacity, **more)
        made.learned = self._learned
        return made


def _again(attention: Attention, problem: Problem, backend: str, tables: dict[str, Any], asked: bool) -> Plan:
    made = compile(attention, **vars(problem), backend=backend).bind(**tables)
    assert isinstance(made, Plan)
    return replace(made, asked=asked)


FLOATS = {getattr(torch, name) for name in DTYPES}


WEIGHTS = 2**24
"""Numbers that the weights of a call may have, if there were a query for every key."""


def _beside_identity(q: Tensor, v: Tensor) -> Tensor:
    """v and behind it ones on the diagonal, of which attention gives the weights themselves."""
    (batch, heads, nq), n = q.shape[:3], v.shape[2]
    if batch * heads * n * max(nq, n) > WEIGHTS:
        raise fail(
            f"weights of {batch} batch rows, {heads} heads, {nq:,} queries and {n:,} keys are too many: "
            f"batch x heads x keys x the greater length may be {WEIGHTS:,}",
            help="ask for one batch row at a time, or for fewer keys",
        )
    one = torch.eye(n, dtype=v.dtype, device=v.device)
    return torch.cat([v, one.expand(*v.shape[:2], n, n)], 3)


Offset: TypeAlias = "int | Sequence[int] | Tensor | None"


def _placed(side: str, x: Tensor, offset: Any, positions: Any) -> tuple[list[int] | None, At]:
    """Where the entries of x [B, H, n, D] stand, as in `Places`; what a tensor holds is not read, and an Axis
    is of a session, which knows what it holds.

    Raises AttnError for what is no position, or does not fit x.
    """
    if positions is None:
        name = f"{side}_offset"
        if not isinstance(offset, Tensor):
            return None if offset is None else list(lowering.offsets(name, offset)), None
        _check_place(name, offset, x)
        if offset.dim() > 1 or offset.numel() not in (1, len(x)):
            raise fail(f"`{name}` has the shape {list(offset.shape)}, and there are {len(x)} batch rows")
        return None, offset.reshape(-1)
    name = f"{side}_positions"
    if offset is not None:
        raise fail(f"`{side}_offset` and `{name}` are given: one says it all")
    if isinstance(positions, Axis):
        return None, positions
    if isinstance(positions, Tensor):
        _check_place(name, positions, x)
    else:
        positions = torch.from_numpy(np.array(_array_like(name, positions)))
    lowering.check_positions(name, str(positions.dtype), positions.shape, x.shape[2])
    positions = positions if positions.dim() == 2 else positions[None]
    if len(positions) not in (1, len(x)):
        raise fail(f"`{name}` has {len(positions)} rows, and there are {len(x)} batch rows")
    return None, positions


def _check_place(name: str, at: Tensor, x: Tensor) -> None:
    if at.is_floating_point() or at.is_complex() or at.dtype in (torch.bool, torch.uint64):
        raise fail(f"`{name}` holds positions, and was given as {str(at.dtype).removeprefix('torch.')}")
    if at.device != x.device:
        raise fail(f"`{name}` is on {at.device}, and the queries and keys are on {x.device}")


def _four_axes(name: str, shape: Sequence[int], heads: int, width: int | None) -> str:
    """How a tensor of other than four axes is given, where its sizes tell."""
    if len(shape) == 5 and shape[0] == 3:
        return "q, k and v are three tensors: `plan(*qkv)`"
    if len(shape) != 3:
        return ""
    if heads > 1 and width is not None and shape[2] == heads * width:
        return f"heads side by side: pass `{name}.unflatten(2, ({heads}, {width})).transpose(1, 2)`"
    if shape[0] != heads and shape[0] % heads == 0:
        return f"batch rows and heads in one: pass `{name}.unflatten(0, (-1, {heads}))`"
    return f"one batch row: pass `{name}[None]`"


def _no_tensor(name: str, value: object) -> AttnError:
    made = isinstance(value, list | tuple) or hasattr(value, "__array__")
    help = f"pass `torch.as_tensor({name})`" if made else ""
    return fail(f"`{name}` must be a torch tensor, and is of type {type(value).__name__}", help=help)


def _check_strided(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise fail(
            f"`{name}` is a nested tensor",
            help=f"give `{name}.values()` as one row of documents: docs/torch.md shows how",
        )
    if tensor.layout is not torch.strided:
        raise fail(f"`{name}` is a sparse tensor", help=f"give `{name}.to_dense()`")


def _array_like(name: str, value: Any) -> Any:
    """What has a dtype and a shape. Raises AttnError for what is no array of numbers or truths."""
    if isinstance(value, torch.Tensor):
        _check_strided(name, value)
        if value.is_meta:
            raise fail(f"`{name}` is a tensor without data, on the device meta")
        return value
    if isinstance(value, nn.Module):
        help = f"give its numbers: `{name}.weight`" if "weight" in dict(value.named_parameters()) else ""
        raise fail(f"`{name}` is no tensor, but {type(value).__name__}", help=help)
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
        raise fail(f"`{name}` is a list of tensors", help="give `torch.stack(...)` of them")
    try:
        array = np.asarray(value)
    except ValueError:
        raise fail(f"`{name}` is no array: its rows differ in length") from None
    if array.dtype.kind not in "biufc":
        raise fail(f"`{name}` is no array of numbers or truths, but {type(value).__name__}")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
