"""A stack as an nn.Module that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from attndsl.errors import fail
from attndsl.execution.plan import PlanModule, compile
from attndsl.keywords import by_name, checked_dtype
from attndsl.stacks import halting
from attndsl.stacks.decoding import StackSession
from attndsl.stacks.layers import FFN, Mixer, Residual
from attndsl.stacks.sizes import attentions, check_tables, head_dim_of
from attndsl.stacks.tree import FeedForward, Stack, Sublayer

INITS = ("gpt2", "torch")


@dataclass(frozen=True)
class Record:
    """What a run of a stack tells besides its output.

    losses: what may be added to the loss, with a weight: `ponder.I` of the I-th loop that halts, counted
            from 0, the mean of the turns that a token takes and of what remained for the last of them.
    turns:  by that number, how many each token took, [B, n].
    """

    losses: Mapping[str, Tensor] = field(default_factory=dict)
    turns: Mapping[int, Tensor] = field(default_factory=dict)


class StackModule(nn.Module):
    """A stack that trains: `y, record = module(x, **tables)`.

    x, y: [B, n, width], n up to the `length` it was built for. `tables` are the run-time inputs of its
    attentions, by name. Raises AttnError for an x that does not fit and a table that no attention has.
    """

    def __init__(
        self, stack: Stack, width: int, length: int, parts: dict[str, Residual], last: nn.Module
    ) -> None:
        super().__init__()
        self.stack, self.width, self.length = stack, width, length
        self.parts = nn.ModuleDict(parts)
        self.last = last
        halts = [i for i, stage in enumerate(stack.stages) if stage.halting is not None]
        self.chances = nn.ModuleDict({str(i): halting.initial(width) for i in halts})

    def forward(self, x: Tensor, **tables: Any) -> tuple[Tensor, Record]:
        """What it makes of `x` [B, n, width], with `tables` by name, and what the run tells."""
        self._check(x, tables)
        losses: dict[str, Tensor] = {}
        turns: dict[int, Tensor] = {}
        for i, stage in enumerate(self.stack.stages):
            if stage.halting is not None:
                chance = cast(nn.Linear, self.chances[str(i)])
                found = halting.run(stage.turns, self.part, chance, stage.halting.eps, x, tables)
                losses[f"ponder.{len(turns)}"] = (found.turns + found.left).mean()
                x, turns[len(turns)] = found.y, found.turns
                continue
            for turn in stage.turns:
                for sublayer in turn:
                    x = self.part(sublayer)(x, tables)
        return self.last(x), Record(losses, turns)

    def session(self, batch: int, capacity: int) -> StackSession:
        """An empty StackSession of `batch` rows of up to `capacity` tokens."""
        return StackSession(self, batch, capacity)

    def part(self, sublayer: Sublayer) -> Residual:
        """The module of a sublayer."""
        return cast(Residual, self.parts[key(sublayer)])

    def _check(self, x: Tensor, tables: Mapping[str, Any]) -> None:
        if x.ndim != 3 or x.shape[-1] != self.width:
            help = "embed tokens first: `module(embedding(tokens))`" if x.ndim == 2 else ""
            raise fail(f"x is [B, n, {self.width}], not {[*x.shape]}", help=help)
        own = next(self.parameters()).dtype
        # weights may be kept as integers, and autocast takes any real numbers
        of_one = own.is_floating_point and not torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point() or (of_one and x.dtype != own):
            name = str(own).removeprefix("torch.")
            raise fail(f"x is {x.dtype}, and the module {own}", help=f"write `x.to(torch.{name})`")
        if x.shape[1] > self.length:
            raise fail(f"x has {x.shape[1]:,} positions, and the stack is built for {self.length:,}")
        check_tables(self.stack, tables)

    def extra_repr(self) -> str:
        """Its line in print(model)."""
        return f"{self.stack!r}, width={self.width}, length={self.length}"


def key(sublayer: Sublayer) -> str:
    """Under which its weights stand in a `state_dict`."""
    return f"{sublayer.weights}_{sublayer.name}"


@by_name
def build(
    stack: Stack,
    *,
    width: int,
    heads: int,
    length: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    batch: int = 1,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str | None = None,
    norm: Callable[[int], nn.Module] = nn.LayerNorm,
    init: str = "gpt2",
) -> StackModule:
    """A stack as an nn.Module: projections, norms and feed-forward are torch's own, attentions are plans.

    stack     one of a program, its parameters bound
    width     numbers of a position
    heads     query heads of every attention
    length    positions, the most of a call
    kv_heads  heads of keys and values, a divisor of `heads`; as many if not given
    head_dim  numbers of a head; width / heads if not given
    batch     batch rows that costs are predicted for
    dtype     of parameters and of x
    device    torch's name of it
    backend   of every attention; the cheapest of each if not given
    norm      makes a norm of so many numbers: nn.LayerNorm, nn.RMSNorm
    init      of weights: "gpt2", normal with deviation 0.02, what enters the residual stream divided by the
              square root of how often that happens (Radford et al. 2019, section 2.3); "torch": as torch does

    Raises AttnError for sizes that do not fit, an unknown `init`, and what a plan refuses.
    """
    if not isinstance(stack, Stack):
        raise fail(
            f"expected a stack, not {type(stack).__name__}", help="write `stack NAME { layers(N) { ... } }`"
        )
    head_dim, dtype = head_dim_of(width, heads, head_dim), checked_dtype(dtype)
    if isinstance(norm, nn.Module) or not callable(norm):
        help = "give the class, `norm=nn.RMSNorm`; where norms stand says the text, `layers(N, norm = post)`"
        raise fail("`norm` makes a norm of so many numbers", help=help)
    if init not in INITS:
        raise fail(f"unknown init `{init}`", help=f"there are {', '.join(INITS)}")
    plans = {
        what: compile(
            what, length=length, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            dtype=dtype, device=device, training=True, backend=backend,
        )
        for what in attentions(stack)
    }  # fmt: skip
    parts: dict[str, Residual] = {}
    for stage, sublayer in stack.sublayers:
        inner: Mixer | FFN
        if isinstance(sublayer.what, FeedForward):
            inner = FFN(sublayer.what, width)
        else:
            plan = cast(PlanModule, plans[sublayer.what].module())
            inner = Mixer(plan, width, heads, kv_heads or heads, head_dim)
        parts[key(sublayer)] = Residual(inner, stage.norm, norm, width)
    last = nn.Identity() if stack.stages[-1].norm == "post" else norm(width)
    module = StackModule(stack, width, length, parts, last).to(device, getattr(torch, dtype))
    if init == "gpt2":
        initialise(module)
    return module


def initialise(module: StackModule) -> None:
    """As in GPT-2 (Radford et al. 2019, section 2.3)."""
    scale = 1 / math.sqrt(sum(len(turn) for turn in module.stack.turns))
    for part in module.parts.values():
        inner = cast(Residual, part).inner
        for name, child in inner.named_children():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=0.02 * (scale if name in ("o", "down") else 1))
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
