"""SumPlan: a plan for each part of a sum of attentions, and their outputs added."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Never, NoReturn, overload

import numpy as np
import torch
from torch import Tensor, nn

from attndsl.attention import Attention, HeadGroup, Norm, Relation, Summand
from attndsl.backend import Problem
from attndsl.errors import AttnError, fail, suggest
from attndsl.execution import choice, varlen
from attndsl.execution.operator import refuse_script
from attndsl.execution.session import STEP, check_step, following, refuse_gradients
from attndsl.execution.streaming import held_of_parts
from attndsl.expr import TRUE, Given, Table, number
from attndsl.keywords import by_name, instead, missing
from attndsl.tiles import lowering
from attndsl.tiles.blockmask import BlockMask

if TYPE_CHECKING:
    from attndsl.execution.plan import Plan


def gate_of(attention: Attention, part: Summand) -> Attention | float:
    """A part's gate, as a number or as an attention whose only weight it is: of one key, with a value of 1,
    the output is the gate. So it is computed, trained and exported as every attention is."""
    known = number(part.gate)
    if known is not None:
        return float(known)
    tables = sorted(part.gate.tables, key=lambda table: table.name)
    group = HeadGroup(Relation(TRUE), part.gate, norm=Norm("none"))
    given = tuple(table for table in attention.inputs if table in tables)
    learned = tuple(table for table in tables if table.origin != Given())
    return Attention(attention.name, (group,), given, learned, attention.offset)


class Parts(dict[str, "Plan"]):
    """The plan of each part, by name."""

    def __missing__(self, name: object) -> Never:
        help = suggest(str(name), self) or f"its parts: {', '.join(self)}"
        raise fail(f"there is no part `{name}`", help=help)


@dataclass(frozen=True, eq=False)
class SumPlan:
    """A sum of attentions for one problem.

    parts  the plan of each, by name
    gates  what each output is multiplied by: a number, or the plan of `gate_of`
    """

    attention: Attention
    problem: Problem
    parts: Mapping[str, Plan] = field(repr=False)
    gates: Mapping[str, Plan | float] = field(repr=False)

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            if name in vars(self).get("parts", ()):
                raise AttributeError(f'a plan has no attribute `{name}`: write `plan.parts["{name}"]`')
            raise missing("a plan", name, dir(SumPlan))

    __prepare_scriptable__ = refuse_script

    @property
    def plans(self) -> dict[str, Plan]:
        """Of parts, and of the gates that are no numbers as `name*`."""
        gates = {f"{name}*": gate for name, gate in self.gates.items() if not isinstance(gate, float)}
        return {**self.parts, **gates}

    @property
    def backend(self) -> str:
        """The chosen one of each part."""
        return ", ".join(f"{name}: {plan.backend}" for name, plan in self.parts.items())

    @property
    def learned_tables(self) -> dict[str, Table]:
        """The parameters of gates by name, and those of parts as `part.name`."""
        gates = {table.name: table for table in self.attention.learned}
        return gates | {
            f"{name}.{table.name}": table for name, p in self.parts.items() for table in p.attention.learned
        }

    @property
    def rejected(self) -> dict[str, choice.Verdict]:
        """As of a Plan, of each part."""
        return {
            f"{name}: {backend}": verdict
            for name, plan in self.parts.items()
            for backend, verdict in plan.rejected.items()
        }

    @property
    def compile_seconds(self) -> float:
        """Seconds that making all its plans took."""
        return sum(plan.compile_seconds for plan in self.plans.values())

    @property
    def tables(self) -> dict[str, Any]:
        """What is bound."""
        return {name: table for plan in self.plans.values() for name, table in plan.tables.items()}

    @cached_property
    def block_masks(self) -> BlockMask | None:
        """The tiles of what some part relates, at full length; None as of a Plan."""
        p, tables = self.problem, self.tables
        missing = any(table.name not in tables for table in lowering.mask_tables(self.attention))
        if missing or self.attention.approximations:
            return None
        sizes = lowering.sizes(self.attention, p.length, p.q_length, p.heads)
        checked = lowering.checked_tables(self.attention, tables, sizes, head_dim=p.head_dim)
        return lowering.block_mask(self.attention, sizes, checked, p.block_size)

    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **call: Any
    ) -> NoReturn: ...
    @overload
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_weights: Literal[True], **call: Any
    ) -> NoReturn: ...
    @overload
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: Any = None,
        k_offset: Any = None,
        q_positions: Any = None,
        k_positions: Any = None,
        n: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
        return_lse: bool = False,
        return_weights: bool = False,
        **given: Any,
    ) -> Tensor: ...
    @by_name
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: Any = None,
        k_offset: Any = None,
        q_positions: Any = None,
        k_positions: Any = None,
        n: int | None = None,
        memory: Any = None,
        learned: Mapping[str, Tensor] | None = None,
        return_lse: bool = False,
        return_weights: bool = False,
        **given: Any,
    ) -> Tensor:
        """The sum, [B, H, nq, Dv], of what each part gives of q, k and v, or of three tensors of its own that
        are given under its name: `plan(q, k, v, global_=(q2, k2, v2))`. Of those q2 has the batch rows and
        queries of q, and all outputs are equally wide; k2 and v2 may be longer or shorter than k and v.

        `memory` is one pair for all parts that have some, of which a part that has less takes the last keys,
        or a pair of each by its name: `memory={"far": (keys, values)}`.

        Inputs go to all that have them, and all else (`q_offset`, `k_offset`, `q_positions`, `k_positions`,
        `n`) is as in a call of a Plan, once for all parts; `given` are inputs and parts by name. `learned`
        are parameters of gates by name, and those of parts as `part.name`. There is no log-sum-exp of a sum,
        and no weights: AttnError is raised for `return_lse` and `return_weights`, and as by a Plan.
        """
        for name, asked in (("return_lse", return_lse), ("return_weights", return_weights)):
            if asked:
                first = next(iter(self.parts))
                what = "log-sum-exp" if name == "return_lse" else "weights over keys of its own"
                help = f"ask a part: `plan.parts[{first!r}](q, k, v, {name}=True)`"
                raise fail(f"`{self.attention.name}` is a sum, and has no {what}", help=help)
        for name, x in (("q", q), ("k", k)):
            if not isinstance(x, Tensor):
                raise fail(f"`{name}` must be a torch tensor, and is of type {type(x).__name__}")
        self.check_names(given)
        if learned is not None:
            check_learned(self.learned_tables, learned)
        places = {
            "q_offset": q_offset,
            "k_offset": k_offset,
            "q_positions": q_positions,
            "k_positions": k_positions,
            "n": n,
        }
        held = held_of_parts(self.attention, memory)

        def outputs() -> Iterator[tuple[str, Tensor]]:
            for name, plan in self.parts.items():
                mine = {
                    "learned": None if learned is None else under(name, learned),
                    "memory": held.get(name),
                }
                tensors = own(name, given[name]) if name in given else (q, k, v)
                yield name, _told(name, plan, tensors, {**places, **of(plan, given), **mine})

        def weight(gate: Plan) -> Tensor | float:
            return self.gate(gate, q, k.shape[2], places, learned, given) if k.shape[2] else 1.0

        return self.added(q, outputs(), weight)

    @by_name
    def paged(
        self,
        q: Tensor,
        pool: tuple[Tensor, Tensor],
        block_table: Tensor,
        lens: Tensor,
        *,
        learned: Mapping[str, Tensor] | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The sum, [B, H, m, Dv], of what each part gives of q [B, H, m, D] and of keys and values in pages.

        `pool`, `block_table` and `lens` are as of `Plan.paged`, and all parts have them; `learned` are
        parameters, with the names of a call, and `inputs` run-time tables by name. Raises AttnError as
        `Plan.paged` does.
        """
        lowering.check_names(self.attention, inputs)
        if learned is not None:
            check_learned(self.learned_tables, learned)

        def outputs() -> Iterator[tuple[str, Tensor]]:
            for name, plan in self.parts.items():
                mine = {**of(plan, inputs), "learned": None if learned is None else under(name, learned)}
                yield name, _told(name, plan.paged, (q, pool, block_table, lens), mine)

        def weight(gate: Plan) -> Tensor:
            places = dict.fromkeys(("q_positions", "k_positions", "n")) | {
                "q_offset": (lens - q.shape[2]).clamp(min=0),
                "k_offset": (lens - 1).clamp(min=0),
            }
            return self.gate(gate, q, 1, places, learned, inputs)

        with torch.no_grad():
            return self.added(q, outputs(), weight if len(q) else lambda gate: 1.0)

    @by_name
    def varlen(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any = None, **call: Any) -> Tensor:
        """As `Plan.varlen` of `q`, `k`, `v`, `cu_q` and `cu_k`: the sum for each sequence alone; `call` are
        `learned` and inputs, as in a call."""
        found: Tensor = varlen.attend(self, self.attention, (q, k, v), cu_q, cu_k, call)
        return found

    def added(
        self, q: Tensor, outputs: Iterable[tuple[str, Tensor]], weight: Callable[[Plan], Tensor | float]
    ) -> Tensor:
        """What parts gave for q, `outputs` by name, each times its gate; `weight` gives those that are no
        numbers."""
        total: Tensor | None = None
        wanted: tuple[list[int], torch.dtype] | None = None
        for name, out in outputs:
            gate, wanted = self.gates[name], wanted or ([*q.shape[:3], out.shape[3]], out.dtype)
            if ([*out.shape], out.dtype) != wanted:
                given_by = _described([*out.shape], out.dtype)
                raise fail(f"`{name}` gives {given_by}, and is added to {_described(*wanted)}")
            out = out.to(torch.promote_types(out.dtype, torch.float32))
            factor = gate if isinstance(gate, float) else weight(gate)
            if total is None:
                total = out if isinstance(factor, float) and factor == 1 else out * factor
            elif isinstance(factor, float):
                total = torch.add(total, out, alpha=factor)
            else:
                # without an intermediate of the size of an output, whose memory is new
                total = torch.addcmul(total, out, factor)
        assert total is not None
        assert wanted is not None
        return total.to(wanted[1])

    def gate(
        self,
        gate: Plan,
        q: Tensor,
        keys: int,
        places: Mapping[str, Any],
        learned: Mapping[str, Tensor] | None,
        given: Mapping[str, Any],
    ) -> Tensor:
        """The values of `gate` for q, [B, H, nq, 1], in float32 or wider. One key stands for all `keys`,
        where the last does: so n is as for the parts. `places` say where they are, `learned` and `given` are
        those of the call."""
        wide = q.detach().to(torch.promote_types(q.dtype, torch.float32))
        key, value = wide.new_zeros(len(q), 1, 1, q.shape[3]), wide.new_ones(len(q), 1, 1, 1)
        names = [table.name for table in gate.attention.learned]
        mine = None if learned is None else {name: learned[name] for name in names if name in learned}
        found: Tensor = gate(
            wide, key, value, **{**places, **_last(places, keys), **of(gate, given)}, learned=mine
        )
        return found

    def choices(self, q: Tensor, k: Tensor, **call: Any) -> dict[str, Tensor]:
        """What parts choose by content of q and k, as `Plan.choices`; `call` is what else that takes, and a
        part's own (q, k, v) under its name. Raises AttnError where two parts make the same choice of other q
        and k: one name would stand for both."""
        placed = {name: x for name, x in call.items() if name in lowering.ARGUMENTS}
        given = {name: x for name, x in call.items() if name not in placed}
        held = held_of_parts(self.attention, placed.pop("memory", None))
        self.check_names(given)
        found: dict[str, Tensor] = {}
        for name, plan in self.parts.items():
            own_q, own_k, _ = own(name, given[name]) if name in given else (q, k, None)
            call = {**placed, "memory": held.get(name), **of(plan, given)}
            for choice_name, made in plan.choices(own_q, own_k, **call).items():
                if not torch.equal(found.setdefault(choice_name, made), made):
                    help = f"ask each part: `plan.parts[{name!r}].choices(q, k)`"
                    raise fail(f"`{name}` and a part before it choose alike, of other q and k", help=help)
        return found

    @by_name
    def bind(self, **inputs: Any) -> SumPlan:
        """The plan with these tables in place, in every part that has them; `inputs` as of `Plan.bind`."""
        lowering.check_names(self.attention, inputs)
        return replace(
            self,
            parts=Parts({name: plan.bind(**of(plan, inputs)) for name, plan in self.parts.items()}),
            gates={
                name: gate if isinstance(gate, float) else gate.bind(**of(gate, inputs))
                for name, gate in self.gates.items()
            },
        )

    @by_name
    def to_flex(self, **inputs: Any) -> Never:
        """Raises AttnError, whatever `inputs` are: FlexAttention takes the parts, each of which has it."""
        raise fail(
            f"`{self.attention.name}` is a sum",
            help="each part has its own: `plan.parts[NAME].to_flex()`",
        )

    @by_name
    def session(self, batch: int, capacity: int, **options: Any) -> SumSession:
        """A session for each part, as of `Plan.session`, of `batch` rows and up to `capacity` tokens each;
        `options` are `rewind`, `v_dim`, `dtype` and `memory`, which is that of a call. Raises AttnError as
        that does, and for a gate that depends on the number of tokens."""
        return SumSession(self, batch, capacity, **options)

    @by_name
    def module(self) -> SumModule:
        """An nn.Module that owns what is learned: gates under their names, and for each part that learns a
        module of its own under the part's."""
        for gate in self.gates.values():
            if not isinstance(gate, float):
                gate.owned.update(table.name for table in gate.attention.learned if table.learned)
        return SumModule(self)

    def initial(self, table: Table) -> Tensor:
        """The first value of a gate's parameter, `table`."""
        plan = next(plan for plan in self.plans.values() if table in plan.attention.learned)
        return plan.initial(table)

    def check_names(self, given: Mapping[str, Any], beside: Sequence[str] = lowering.ARGUMENTS) -> None:
        """Raises AttnError where `given` names what is no part and no input; other arguments are those of
        `beside`."""
        inputs = [table.name for table in self.attention.inputs]
        for name in given:
            if name not in (*inputs, *self.parts):
                near = instead(name, {*inputs, *self.parts, *beside})
                if name in self.learned_tables:
                    near = f"it is learned: plan.module() owns `{name}`"
                listed = f"its parts: {', '.join(self.parts)}; its inputs: {', '.join(inputs) or 'none'}"
                raise fail(f"`{self.attention.name}` has no part or input `{name}`", help=near or listed)

    def __repr__(self) -> str:
        return f"<plan {self.attention.name}: {self.backend}; {self.problem}>"

    def __str__(self) -> str:
        """What was chosen and why, part by part."""
        count = f"{len(self.parts)} part{'s' * (len(self.parts) > 1)}"
        return "\n".join([f"{self.attention.name}: {count}, {self.problem}", *map(str, self.parts.values())])


class SumModule(nn.Module):
    """A sum with trainable parameters; a parameter that several parts share is one.

    `forward` takes what `SumPlan.__call__` takes.
    """

    if TYPE_CHECKING:
        __call__: SumPlan
        """What it takes and gives is what the plan does."""

    __prepare_scriptable__ = refuse_script

    def __init__(self, plan: SumPlan) -> None:
        super().__init__()
        self.plan = plan
        learning = {name: part for name, part in plan.parts.items() if part.attention.learned}
        for name in (*(table.name for table in plan.attention.learned), *learning):
            if hasattr(self, name) or (name in learning and self._gated(name)):
                raise fail(
                    f"`{name}` has the name of an attribute of the module", help="give it another name"
                )
        shared: dict[Table, nn.Parameter] = {}
        for table in plan.attention.learned:
            if table.learned:
                shared[table] = nn.Parameter(plan.initial(table))
                self.register_parameter(table.name, shared[table])
            else:
                self.register_buffer(table.name, plan.initial(table).clone())
        for name, part in learning.items():
            module = part.module()
            for table in part.attention.learned:
                if table.learned:
                    one = shared.setdefault(table, getattr(module, table.name))
                    module.register_parameter(table.name, one)
            self.add_module(name, module)

    def extra_repr(self) -> str:
        """Its line in print(model)."""
        owned = "".join(f", {t.name}={[*getattr(self, t.name).shape]}" for t in self.plan.attention.learned)
        return f"{self.plan.attention.name}, {self.plan.backend}, {self.plan.problem}{owned}"

    def _gated(self, name: str) -> bool:
        return any(table.name == name for table in self.plan.attention.learned)

    @by_name
    def forward(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Any:
        """The plan's call of q, k and v, with the parameters as they are; `call` is what else that takes."""
        refuse_learned(call)
        return self.plan(q, k, v, learned=self._learned(), **call)

    @by_name
    def paged(
        self, q: Tensor, pool: tuple[Tensor, Tensor], block_table: Tensor, lens: Tensor, **inputs: Any
    ) -> Tensor:
        """As `SumPlan.paged` of `q`, `pool`, `block_table`, `lens` and `inputs`, with the parameters as they
        are."""
        refuse_learned(inputs)
        found: Tensor = self.plan.paged(q, pool, block_table, lens, learned=self._learned(), **inputs)
        return found

    @by_name
    def varlen(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any = None, **inputs: Any) -> Tensor:
        """As `SumPlan.varlen` of `q`, `k`, `v`, `cu_q`, `cu_k` and `inputs`, with the parameters as they
        are."""
        refuse_learned(inputs)
        found: Tensor = varlen.attend(self, self.plan.attention, (q, k, v), cu_q, cu_k, inputs)
        return found

    def _learned(self) -> dict[str, Tensor]:
        learned = {table.name: getattr(self, table.name) for table in self.plan.attention.learned}
        for name, part in self.plan.parts.items():
            for table in part.attention.learned:
                learned[f"{name}.{table.name}"] = getattr(getattr(self, name), table.name)
        return learned

    @by_name
    def session(self, batch: int, capacity: int, **options: Any) -> SumSession:
        """As `SumPlan.session` of `batch`, `capacity` and `options`; a step takes the parameters as they are
        then."""
        made = self.plan.session(batch, capacity, **options)
        made.learned = self._learned
        return made


class SumSession:
    """The sessions of all parts, which step together; `parts` are they, by name.

    What a step gives is what the plan gives for the last tokens, and its methods are those of a Session: q, k
    and v of new tokens, and three tensors of its own for a part under its name.
    """

    def __init__(
        self, plan: SumPlan, batch: int, capacity: int, *, memory: Any = None, **options: Any
    ) -> None:
        held = held_of_parts(plan.attention, memory)
        for name, gate in plan.gates.items():
            if not isinstance(gate, float) and gate.attention.groups[0].score.free & {"n", "nq"}:
                said = f"the gate of `{name}` depends on the number of tokens"
                raise fail(f"`{plan.attention.name}` has no sessions: {said}")
        self.plan = plan
        self.learned: Callable[[], Mapping[str, Tensor]] | None = None
        self.parts = {
            name: part.session(batch, capacity, memory=held.get(name), **options)
            for name, part in plan.parts.items()
        }

    if not TYPE_CHECKING:  # a type checker is to tell what is no attribute

        def __getattr__(self, name):
            raise missing("a session", name, dir(SumSession))

    def __repr__(self) -> str:
        return f"<session of {self.plan.attention.name}: {', '.join(map(repr, self.parts.values()))}>"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return next(iter(self.parts.values())).lengths

    @by_name
    def step(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        """The next tokens of every row, q [B, H, m, D], k [B, Hkv, m, D], v [B, Hkv, m, Dv] ->
        [B, H, m, Dv]; `call` as of `prefill`."""
        return self.prefill(q, k, v, **call)

    @by_name
    def prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        chunk: int | None = None,
        tokens: Any = None,
        learned: Mapping[str, Tensor] | None = None,
        **given: Any,
    ) -> Tensor:
        """As `step`, of many tokens: `chunk`, `tokens` and `learned` as of a Session, the last with the names
        of `SumPlan.__call__`; `given` are inputs, and (q, k, v) of a part under its name. Raises AttnError as
        a Session does; then no part has got a token."""
        refuse_gradients(q, k, v, *given.values())
        if learned is None and self.learned is not None:
            learned = self.learned()
        check_step(given)
        self.plan.check_names(given, STEP)
        if learned is not None:
            check_learned(self.plan.learned_tables, learned)
        starts = self.lengths
        new = {name: own(name, given[name]) if name in given else (q, k, v) for name in self.parts}
        sizes = [x.shape[2] for _, x, _ in new.values() if isinstance(x, Tensor) and x.dim() == 4]
        with self._together(max(sizes, default=0)):
            found = {}
            for name, session in self.parts.items():
                mine = None if learned is None else under(name, learned)
                tables = of(session.plan, given)
                found[name] = session.prefill(*new[name], chunk=chunk, tokens=tokens, learned=mine, **tables)
            at = following(starts, q.shape[2])
            at = np.minimum(at, np.maximum(np.array(self.lengths) - 1, 0)[:, None])

            def weight(gate: Plan) -> Tensor:
                size = max(gate.problem.q_length, 1)
                places = dict.fromkeys(("q_offset", "k_offset", "k_positions")) | {"n": max(self.lengths)}
                pieces = [
                    self.plan.gate(
                        gate, q[:, :, i : i + size], 1, {**places, "q_positions": at[:, i : i + size]},
                        learned, given,
                    )
                    for i in range(0, q.shape[2], size)
                ]  # fmt: skip
                return torch.cat(pieces, 2)

            some = q.shape[2] and max(self.lengths, default=0)
            with torch.no_grad():
                return self.plan.added(q, found.items(), weight if some else lambda gate: 1.0)

    @by_name
    def copy(self) -> SumSession:
        """Another one that has its own memory."""
        made = copy.copy(self)
        made.parts = {name: session.copy() for name, session in self.parts.items()}
        return made

    @by_name
    def reorder(self, rows: Any) -> None:
        """Row i becomes what row `rows[i]` was, in every part."""
        with self._together():
            for session in self.parts.values():
                session.reorder(rows)

    @by_name
    def truncate(self, lengths: Any) -> None:
        """Only the first `lengths` tokens are left, one number for each row or one for all. Raises AttnError
        as a Session does; then all is as before."""
        with self._together():
            for session in self.parts.values():
                session.truncate(lengths)

    @contextmanager
    def _together(self, tokens: int = 0) -> Iterator[None]:
        """Where one part refuses, all are as before. New tokens may have taken the places of earlier ones, of
        as many as a session goes back; where more come, what it held is put by."""
        before = [
            (s, dict(vars(s.copy() if s.ring and tokens > s.rewind else s))) for s in self.parts.values()
        ]
        try:
            yield
        except AttnError:
            for session, fields in before:
                reached = session.reached if fields["k"] is session.k and tokens else fields["reached"]
                vars(session).update(fields, reached=reached)
            raise


def check_learned(tables: Mapping[str, Table], given: object) -> None:
    """Raises AttnError where `given` is no dictionary that has, for each of these parameters, a floating
    tensor by its name; constants that are drawn may be left out."""
    if not isinstance(given, Mapping):
        help = f'write `learned={{"{next(iter(tables))}": ...}}`' if tables else ""
        raise fail(f"`learned` is a dictionary of tensors by name, not {type(given).__name__}", help=help)
    for name in given:
        if name not in tables:
            there = ", ".join(f"`{name}`" for name in sorted(tables)) or "none"
            raise fail(f"`learned` has `{name}`, and there are {there}")
    for name, table in tables.items():
        if name in given and not isinstance(given[name], Tensor):
            shape = ", ".join(map(str, table.dims))
            said = f"`{name}` is learned, and was given as {type(given[name]).__name__}"
            raise fail(said, help=f"give a torch tensor of [{shape}]")
        if name in given and not given[name].is_floating_point():
            dtype = str(given[name].dtype).removeprefix("torch.")
            help = "" if given[name].is_complex() else f"pass `{name}.float()`"
            raise fail(f"`{name}` is learned, and was given as {dtype}", help=help)
    if lacking := [f"`{name}`" for name, table in tables.items() if table.learned and name not in given]:
        help = "give the value of each, or leave `learned` out: `plan.module()` owns them"
        raise fail(f"`learned` lacks {', '.join(lacking)}", help=help)


def refuse_learned(call: Mapping[str, Any]) -> None:
    """Raises AttnError where a module is called with values of its own parameters."""
    if "learned" in call:
        help = "set them by `load_state_dict`, or call `module.plan`, which takes `learned`"
        raise fail("a module has the values of its parameters: it takes no `learned`", help=help)


def of(plan: Plan, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that this plan has."""
    return {table.name: given[table.name] for table in plan.attention.inputs if table.name in given}


def under(name: str, learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(name) + 1 :]: x for key, x in learned.items() if key.startswith(f"{name}.")}


def own(name: str, given: Any) -> tuple[Any, Any, Any]:
    if not isinstance(given, tuple | list) or len(given) != 3:
        said = f"{len(given)} tensors" if isinstance(given, tuple | list) else type(given).__name__
        help = f"write `{name}=(q, k, v)`"
        raise fail(f"`{name}` is a part, and takes (q, k, v), not {said}", help=help)
    q, k, v = given
    return q, k, v


def of_part(name: str, error: AttnError) -> AttnError:
    """What is wrong with one part, with its name."""
    return AttnError(*[replace(d, message=f"in `{name}`: {d.message}") for d in error.diagnostics])


def _told(name: str, plan: Callable[..., Any], own: Sequence[Any], call: Mapping[str, Any]) -> Tensor:
    """A call of a part. What is wrong with it names the part."""
    try:
        found: Tensor = plan(*own, **call)
    except AttnError as error:
        raise of_part(name, error) from None
    return found


def _described(shape: list[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{shape}"


def _last(places: Mapping[str, Any], keys: int) -> dict[str, Any]:
    """Where the last of so many keys stands."""
    offset, positions = places["k_offset"], places["k_positions"]
    if isinstance(positions, Tensor):
        return {"k_positions": positions.amax(-1, keepdim=True)}
    if positions is not None:
        return {"k_positions": np.asarray(positions).max(-1, keepdims=True)}
    if isinstance(offset, list | tuple):
        return {"k_offset": [start + keys - 1 for start in offset]}
    return {"k_offset": (0 if offset is None else offset) + keys - 1}
