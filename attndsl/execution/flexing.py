"""What FlexAttention is given in place of an attention: a score_mod, and tiles with a mask_mod."""

from __future__ import annotations

import hashlib
import linecache
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attndsl.attention import Attention
from attndsl.backend import Call
from attndsl.emit.flex import reads, score_mod_text, score_over
from attndsl.emit.leaves import Leaf, Products, leaf_of
from attndsl.emit.score import S
from attndsl.errors import fail
from attndsl.execution.leaf_values import VECTORS, LeafValues, sizes_of
from attndsl.execution.torch_eval import environment, evaluate, whole_log2, whole_power, whole_root
from attndsl.expr import Expr, make
from attndsl.meaning.intervals import Interval, bounds
from attndsl.tiles.blockmask import BlockMask
from attndsl.tiles.lowering import Sizes

if TYPE_CHECKING:
    from torch.nn.attention import flex_attention

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
PAIRS = 2**22
"""Evaluated at a time."""


class Flex(NamedTuple):
    """Arguments of `torch.nn.attention.flex_attention.flex_attention`, which come there behind q, k and v.

    score_mod   of the score and the numbers of batch row, head, query and key; None where scores stay
    block_mask  lists of tiles, and a mask_mod that reads their bits
    """

    score_mod: ScoreMod | None
    block_mask: flex_attention.BlockMask


def check_clauses(attention: Attention) -> None:
    """Raises AttnError for what FlexAttention alone does not compute, whatever the score is."""
    name = attention.name
    if attention.parts:
        raise fail(f"`{name}` is a sum", help="FlexAttention takes each of its parts, called by itself")
    if attention.of_streams:
        said = "FlexAttention takes tokens for keys, and these are streams"
        raise fail(f"{said} of `{name}`", help="its mask is `attention.block_mask(length).to_flex()`")
    for approx in attention.approximations:
        raise fail(f"`{approx.kind}` has no weights of pairs")
    for group in attention.groups:
        if group.norm.kind != "softmax":
            raise fail(f"FlexAttention has no norm but softmax, and that of `{name}` is `{group.norm.kind}`")
        if group.norm.sink is not None:
            help = "multiply what it returns without the sink by `(lse - sink).sigmoid()`"
            raise fail(f"FlexAttention has no sinks, and `{name}` has one", help=help)
        if group.decay is not None:
            raise fail(f"FlexAttention has no decays and multiplicities, and `{name}` has them")


def flex_of(
    attention: Attention,
    sizes: Sizes,
    blocks: BlockMask,
    tables: Mapping[str, Any],
    head_dim: int | None,
    dtype: torch.dtype,
    device: str,
) -> Flex:
    """For calls of these sizes, with their tiles and all tables, arrays or tensors; `dtype` is that of q, k
    and v. Raises AttnError where FlexAttention does not compute the attention."""
    check_clauses(attention)
    block_mask = blocks.to_flex(device)
    score = score_over(attention, head_dim, sizes.q.starts is not None and sizes.k.starts is not None)
    if isinstance(score, str):
        raise fail(f"`{attention.name}` has no score_mod: {score}")
    read = [leaf_of(node).of for node in reads(score)]
    if any(isinstance(of, Products) or (isinstance(of, Expr) and of.free & VECTORS) for of in read):
        said = "its score reads vectors of queries and keys, of which a score_mod sees the product alone"
        raise fail(f"`{attention.name}` has no score_mod: {said}")
    if head_dim is None and any("D" in of.free for of in read if isinstance(of, Expr)):
        raise fail(
            f"the score of `{attention.name}` depends on the number of features", help="give `head_dim=`"
        )
    given = {name: torch.as_tensor(x, device=device) for name, x in tables.items()}
    batched = (len(given[table.name]) for table in attention.inputs if table.batched and table.name in given)
    heads, width = sizes.heads, head_dim or 1
    # what is known before q and k are depends on their shapes alone
    nothing = torch.zeros((), dtype=dtype, device=device)
    q, k = (
        nothing.expand(max([1, sizes.rows, *batched]), heads, axis.length, width)
        for axis in (sizes.q, sizes.k)
    )
    call = Call(q, k, k, lambda: blocks, given, sizes.q, sizes.k, sizes.n)
    return Flex(score_mod_of(attention, call, score, content=False), block_mask)


def score_mod_of(attention: Attention, call: Call, score: Expr, content: bool = True) -> ScoreMod | None:
    """The score over leaves, as `score_over` gives it, as a score_mod of the call; it reads tensors that hold
    what was known before. Gradients pass through them. `content` says whether q and k are known.

    Raises AttnError where a live pair looks up beyond a table.
    """
    if score is S:
        return None
    made, wide = LeafValues(call), torch.promote_types(call.q.dtype, torch.float32)
    nodes = reads(score)
    held = {leaf: made.of(leaf, call) for leaf in dict.fromkeys(map(leaf_of, nodes))}
    lasts = {leaf: _last(leaf, call) for leaf in held if leaf.kind == "table"}
    if doubtful := _beyond(call, nodes, held, lasts):
        if not content and any("s" in node.free for node in doubtful):
            raise fail(f"whether `{attention.name}` looks up beyond a table depends on q and k")
        _evaluate(attention, call)
    tensors, axes, seen = [], [], set()
    for node in nodes:
        leaf = leaf_of(node)
        x, by = _squeezed(leaf, held[leaf], call)
        x = x if node.type == "bool" else x.to(wide if node.type == "real" else torch.int64)
        # FlexAttention has one gradient for each tensor that is looked up
        tensors.append((x.clone() if leaf in seen else x).contiguous())
        axes.append(by)
        seen.add(leaf)
    ends = [lasts[leaf_of(node)] for node in nodes if leaf_of(node).kind == "table"]
    origin = torch.tensor([call.k.shape[2] - 1], device=call.q.device)
    text = score_mod_text(score, tuple(axes), str(wide).removeprefix("torch."))
    found: ScoreMod = written(text)["bind"](*tensors, *ends, origin)
    return found


@lru_cache(maxsize=256)
def written(text: str) -> dict[str, Any]:
    """What a text defines. `inspect` finds it."""
    name = f"<attndsl {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = len(text), None, text.splitlines(True), name
    space: dict[str, Any] = {
        function.__name__: function for function in (entry, truth, whole_log2, whole_power, whole_root)
    }
    space["torch"] = torch
    exec(compile(text, name, "exec"), space)
    return space


def entry(table: Tensor, last: Tensor, lead: tuple[Tensor, ...], indices: tuple[Tensor, ...]) -> Tensor:
    """Of a table with leading axes, the entry at these indices or the nearest; `last` are the greatest."""
    near = (torch.minimum(_tensor(i, last), last[axis]).clamp(min=0) for axis, i in enumerate(indices))
    return table[(*lead, *near)]


def truth(table: Tensor, last: Tensor, lead: tuple[Tensor, ...], indices: tuple[Tensor, ...]) -> Tensor:
    """The same of truths, False where there is no entry."""
    found = entry(table, last, lead, indices)
    for axis, i in enumerate(indices):
        found = found & (i >= 0) & (i <= last[axis])
    return found


def _tensor(index: Tensor | int, like: Tensor) -> Tensor:
    return torch.full_like(like[0], index) if isinstance(index, int) else index


def _last(leaf: Leaf, call: Call) -> Tensor:
    assert not isinstance(leaf.of, Expr)
    return torch.tensor(sizes_of(leaf.of, call), device=call.q.device) - 1


def _squeezed(leaf: Leaf, x: Tensor, call: Call) -> tuple[Tensor, tuple[bool, bool]]:
    """Without axes of batch rows and heads along which it is the same; and whether it has them."""
    by_batch, by_head = (size > 1 for size in x.shape[:2])
    if not isinstance(leaf.of, Expr):
        sizes = sizes_of(leaf.of, call)
        if not math.prod(sizes):
            # no live pair asks for an entry, but a kernel reads one
            sizes = (1,) * len(sizes)
            x = x.new_zeros(*x.shape[:2], 1)
        x = x.reshape(*x.shape[:2], *sizes)
    elif leaf.kind == "number" and (by_batch or by_head):
        x = x[..., 0]
    x = x if by_head else x[:, 0]
    return (x if by_batch else x[0]), (by_batch, by_head)


def _beyond(
    call: Call, nodes: Sequence[Expr], held: Mapping[Leaf, Tensor], lasts: Mapping[Leaf, Tensor]
) -> list[Expr]:
    """Look-ups of numbers that are not proved to stay within their tables at all pairs."""
    found: dict[Expr, Interval] = {
        make("entry", (), side, "int"): (0, size - 1)
        for side, size in (("query", call.q.shape[2]), ("key", call.k.shape[2]))
    }
    for node in nodes:
        if node.type == "int" and (x := held[leaf_of(node)]).numel():
            found[node] = x.min().item(), x.max().item()

    def within(node: Expr) -> bool:
        ends = (bounds(index, {}, {}, found) for index in node.args[1:])
        each = zip(ends, lasts[leaf_of(node)].tolist(), strict=True)
        return all(0 <= low and high <= last for (low, high), last in each)

    tables = (node for node in nodes if leaf_of(node).kind == "table" and node.type != "bool")
    return [node for node in tables if not within(node)]


def _evaluate(attention: Attention, call: Call) -> None:
    """At all live pairs, which raises AttnError for what has no value."""
    env = environment(call)
    batch, heads, nq, width = call.q.shape
    k = call.k.to(env.dtype).repeat_interleave(heads // call.k.shape[1], 1)
    step = max(1, PAIRS // max(1, batch * heads * call.k.shape[2]))
    for start in range(0, nq, step):
        rows = slice(start, start + step)
        q = call.q[:, :, rows].to(env.dtype)
        some = {"q": env.values["q"][:, :, rows], "s": q @ k.mT / width**0.5, "Q": q, "K": k}
        dense = call.block_mask.to_dense(start, min(start + step, nq))
        live = torch.from_numpy(dense).to(call.q.device)
        here = replace(env, values={**env.values, **some})
        for group in attention.groups:
            evaluate(group.score, here, live & evaluate(group.heads, here))
