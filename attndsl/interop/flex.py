"""What is written for FlexAttention, as an attention: its mask_mods and score_mods."""

from __future__ import annotations

import functools
import inspect
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup, Relation
from attndsl.bound import Bound
from attndsl.errors import AttnError, fail
from attndsl.expr import Expr, Table
from attndsl.interop.reading import INFINITE, TAKEN, B, Reader, S
from attndsl.interop.symbols import OURS, Place, Reading, Refusal, Symbol
from attndsl.interop.text import attention_text
from attndsl.keywords import by_name
from attndsl.meaning.intervals import never_negative
from attndsl.program import parse

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of batch row, head, query and key, whether they go together: FlexAttention's."""
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the scaled score and these the score that is taken."""
POSITIONS = "bhqk"


class Unread(AttnError):  # noqa: N818, of what was read it is no error
    """What torch evaluates and attndsl does not read."""


@by_name
def from_mask_mod(
    mask_mod: MaskMod,
    *,
    length: int | None = None,
    q_length: int | None = None,
    batch: int | None = None,
    heads: int | None = None,
    device: str = "cpu",
) -> Bound:
    """A mask_mod of FlexAttention as an attention: the same pairs at all positions, or an error.

    mask_mod  called once as `mask_mod(b, h, q_idx, kv_idx)`, with symbols
    length    keys; needed where an operation that the language does not have reads a position
    q_length  queries; as many as keys if not given
    batch     batch rows; needed where `b` is more than an index
    heads     query heads; needed where such an operation reads the head
    device    where the positions are, as tensors of the mod are

    Tensors that it looks up become `inputs`, and come with the attention: calls may give others by name.
    Positions count from 0, as torch counts them. Raises AttnError at the line of the mod that is not read.
    """
    return imported(mask_mod, None, sizes_of(length, q_length, batch, heads), device)


@by_name
def from_score_mod(
    score_mod: ScoreMod,
    *,
    mask_mod: MaskMod | None = None,
    length: int | None = None,
    q_length: int | None = None,
    batch: int | None = None,
    heads: int | None = None,
    device: str = "cpu",
) -> Bound:
    """A score_mod of FlexAttention as an attention, with a mask_mod or without.

    score_mod  called once as `score_mod(score, b, h, q_idx, kv_idx)`, with symbols; what it makes -inf is no
               pair of the mask
    mask_mod   which pairs there are; all if not given
    length     keys; needed where an operation that the language does not have reads a position
    q_length   queries; as many as keys if not given
    batch      batch rows; needed where `b` is more than an index
    heads      query heads; needed where such an operation reads the head
    device     where the positions are, as tensors of the mod are

    Real numbers are as exact as their rounding. A tensor that is trained and looked up is read at every call,
    and gets its gradient; what else a mod reads is as it was now. Raises AttnError as `from_mask_mod`.
    """
    return imported(mask_mod, score_mod, sizes_of(length, q_length, batch, heads), device)


def sizes_of(
    length: int | None, q_length: int | None, batch: int | None, heads: int | None
) -> dict[str, int]:
    """By the names of positions, those that are given."""
    q_length = length if q_length is None else q_length
    sizes = {"b": batch, "h": heads, "q": q_length, "k": length}
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise fail(f"there are {size!r} of `{name}`, and must be an integer from 1 on")
    return {name: size for name, size in sizes.items() if size is not None}


@dataclass(frozen=True)
class Read:
    """A mask, a score and the tables in them, with the axes that these have."""

    mask: Expr
    score: Expr
    tables: Mapping[Table, Tensor]

    @property
    def given(self) -> dict[str, Tensor]:
        """The tables by name."""
        return {table.name: tensor for table, tensor in self.tables.items()}

    def attention(self, name: str) -> Attention:
        """The same as an attention of its own."""
        groups = (HeadGroup(Relation(self.mask), self.score),)
        return Attention(name, groups, tuple(self.tables), offset=ir.ZERO)


def read(
    mask_mod: MaskMod | None,
    score_mod: ScoreMod | None,
    sizes: Mapping[str, int],
    device: str,
    named: bool = True,
) -> Read:
    """Tables are `named` as the mods name them, or anyhow. Raises AttnError for a mod that is wrong, and
    Unread for one that torch would take."""
    mods: dict[str, Any] = {"mask_mod": mask_mod, "score_mod": score_mod}
    mods = {kind: mod for kind, mod in mods.items() if mod is not None}
    try:
        reading = Reading()
        results = {kind: called(mod, kind, reading, device) for kind, mod in mods.items()}
        reader = Reader(sizes, reading.trained, [*mods.values()] if named else [])
        found = {kind: reader.elements(result).item() for kind, result in results.items()}
        live, score = ir.TRUE, S
        if score_mod is not None:
            live, score = masked(found["score_mod"], results["score_mod"])
        mask = ir.all_of(found.get("mask_mod", ir.TRUE), live)
        mask, score = by_batch(mask, reader), by_batch(score, reader)
    except Refusal as refusal:
        told = refusal.told()
        raise (told if refusal.mistake else Unread(*told.diagnostics)) from None
    used = mask.tables | score.tables
    return Read(mask, score, {t: reader.tables[t.name] for t in reader.declared.values() if t in used})


WRITTEN = {"mask_mod": ("b", "h", "q_idx", "kv_idx"), "score_mod": ("score", "b", "h", "q_idx", "kv_idx")}
"""What the mods are called with."""


def check_signature(mod: Any, kind: str) -> None:
    """Raises Refusal for what cannot be called as such a mod."""
    if not callable(mod):
        help = "its function is `block_mask.mask_mod`" if type(mod).__name__ == "BlockMask" else ""
        raise Refusal(f"expected a {kind}, not {type(mod).__name__}", help, None, mistake=True)
    fits = [name for name, arguments in WRITTEN.items() if takes(mod, arguments)]
    if kind not in fits:
        help = f"it is called as `{kind}({', '.join(WRITTEN[kind])})`"
        help = f"what takes these is read by `attndsl.from_{fits[0]}`" if fits else help
        raise Refusal(
            f"the {kind} does not take {len(WRITTEN[kind])} arguments", help, defined(mod), mistake=True
        )


def takes(mod: Callable[..., Any], arguments: tuple[str, ...]) -> bool:
    """Of what has no signature it is not known."""
    try:
        inspect.signature(mod).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def called(
    mod: Callable[..., Any], kind: Literal["mask_mod", "score_mod"] | str, reading: Reading, device: str
) -> Symbol | Tensor:
    """What a mod gives of symbols. Raises Refusal for what is no truth, or no real number, of one pair."""
    check_signature(mod, kind)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    arguments = [Symbol(zero, name=name) for name in POSITIONS]
    if kind == "score_mod":
        arguments.insert(0, Symbol(torch.zeros((), device=device), name="s"))
    drawn = torch.get_rng_state(), random.getstate()
    try:
        with reading, torch.enable_grad():
            result = mod(*arguments)
    except AttnError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        place = innermost(error) or defined(mod)
        raise Refusal(f"the {kind} raises {type(error).__name__}: {said}", "", place, mistake=True) from error
    if random.getstate() != drawn[1] or not torch.equal(torch.get_rng_state(), drawn[0]):
        raise Refusal(
            f"the {kind} draws random numbers",
            "draw them before, and look them up",
            defined(mod),
            mistake=True,
        )
    wanted = "a Boolean tensor" if kind == "mask_mod" else "a tensor of real numbers"
    place = result.place if isinstance(result, Symbol) else defined(mod)
    if not isinstance(result, Symbol | Tensor):
        raise Refusal(f"the {kind} returns {type(result).__name__}, not {wanted}", "", place, mistake=True)
    dtype = str(result.dtype).removeprefix("torch.")
    if not (dtype == "bool" if kind == "mask_mod" else result.dtype.is_floating_point):
        help = (
            "compare it, or write `.bool()`" if kind == "mask_mod" else "write `score + ...`, or `.float()`"
        )
        raise Refusal(f"the {kind} returns {dtype}, not {wanted}", help, place, mistake=True)
    if result.ndim:
        help = "look up with an index for each axis, or join what is left: `.any()`, `.all()`, `.sum()`"
        raise Refusal(
            f"the {kind} returns a tensor of {[*result.shape]} for one pair", help, place, mistake=True
        )
    return result


def defined(mod: Callable[..., Any]) -> Place | None:
    """Where a mod begins."""
    code = getattr(mod, "__code__", None)
    return Place(code, 0, code.co_firstlineno) if code else None


def innermost(error: BaseException) -> Place | None:
    """Where the user's code was when it came to it."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(OURS):
            found = Place(trace.tb_frame.f_code, trace.tb_lasti, trace.tb_lineno)
        trace = trace.tb_next
    return found


def masked(score: Expr, result: Symbol | Tensor) -> tuple[Expr, Expr]:
    """Where a score is not -inf, and what it is there. Raises Refusal for -inf where it is not plain."""
    live: dict[Expr, Expr] = {}
    value: dict[Expr, Expr] = {}
    for node in ir.nodes(score):
        parts = [live[arg] for arg in node.args]
        live[node], value[node] = ir.TRUE, node
        if node is INFINITE:
            live[node], value[node] = ir.FALSE, ir.ZERO
            continue
        if all(part is ir.TRUE for part in parts):
            continue
        args = tuple([value[arg] for arg in node.args])
        if node.op == "where" and parts[0] is ir.TRUE:
            cond, a, b = args
            live[node] = ir.any_of(ir.all_of(cond, parts[1]), ir.all_of(ir.negate(cond), parts[2]))
            value[node] = b if parts[1] is ir.FALSE else a if parts[2] is ir.FALSE else ir.where(cond, a, b)
        elif node.op == "add" or scaled(node, parts, args):
            live[node] = ir.all_of(*parts)
            value[node] = ir.rebuild(node, args)
        else:
            help = "return it, as in `torch.where(seen, score, -inf)`, or add it"
            raise Refusal("-inf is computed with", help, result.place if isinstance(result, Symbol) else None)
    return live[score], value[score]


def scaled(node: Expr, live: list[Expr], args: tuple[Expr, ...]) -> bool:
    """Whether it is what may be -inf, by a number that is positive."""
    if node.op not in ("mul", "div"):
        return False
    factor = 1 if node.op == "div" or live[1] is ir.TRUE else 0
    e, value = args[factor], ir.number(args[factor])
    positive = value > 0 if value is not None else e.type == "int" and never_negative(ir.sub(e, ir.ONE))
    return live[factor] is ir.TRUE and positive


def by_batch(e: Expr, reader: Reader) -> Expr:
    """With `b`, where it is more than the row of a table, looked up as the number of a batch row."""
    if "b" not in e.free:
        return e
    done: dict[Expr, Expr] = {}
    for node in ir.nodes(e):
        args = list(node.args)
        first = int(node.op == "intable")
        implied = len(node.value.implicit) if isinstance(node.value, Table) else 0
        for i, arg in enumerate(args):
            if arg is not B or not (first <= i < first + implied):
                args[i] = batch_rows(reader) if arg is B else done[arg]
        done[node] = ir.rebuild(node, tuple(args))
    return batch_rows(reader) if e is B else done[e]


def batch_rows(reader: Reader) -> Expr:
    if "b" not in reader.sizes:
        raise Refusal(
            "`b` is more than an index, and how many batch rows there are is not known",
            "give `batch=`",
            reader.batch_read,
        )
    rows = torch.arange(reader.sizes["b"])
    return reader.look_up(rows, (B,))


def imported(
    mask_mod: MaskMod | None, score_mod: ScoreMod | None, sizes: Mapping[str, int], device: str
) -> Bound:
    """The attention of a text that is written of the mods."""
    found = read(mask_mod, score_mod, sizes, device)
    name = called_as(score_mod or mask_mod)
    bound = parse(attention_text(name, tuple(found.tables), found.mask, found.score, 0), f"<{name}>")[name]
    return bound.carrying(found.given)


def called_as(mod: Any) -> str:
    """What the attention of a mod is called."""
    while isinstance(mod, functools.partial):
        mod = mod.func
    name = re.sub(r"\W", "_", getattr(mod, "__name__", type(mod).__name__)).strip("_")
    if not re.match(r"[A-Za-z]\w*$", name) or name == "lambda":
        name = "imported"
    return f"{name}_" if name in TAKEN else name
