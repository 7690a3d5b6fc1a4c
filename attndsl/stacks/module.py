"""A stack as an nn.Module that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.execution.plan import PlanModule, compile
from attndsl.keywords import by_name, checked_dtype
from attndsl.stacks import leaving
from attndsl.stacks.decoding import StackSession
from attndsl.stacks.layers import FFN, Mixer, Residual
from attndsl.stacks.run import Exits, Record, Run, State
from attndsl.stacks.sizes import attentions, check_tables, head_dim_of, plugin_of, remembered, words
from attndsl.stacks.tree import FeedForward, Layers, Reversible, Stack, Sublayer
from attndsl.stage import Decision, Seen

INITS = ("gpt2", "torch")
Depths = Tensor | Mapping[int, Tensor]


class StackModule(nn.Module):
    """A stack that trains: `y, record = module(x, **tables)`.

    x, y: [B, n, width], n up to the `length` it was built for. `tables` are the run-time inputs of its
    attentions, by name. `state` is what a call on the tokens before these left, `record.state`. `depths`,
    int64 [B, n], say after how many layers of the stage with an exit each token leaves, in training too; of
    several such stages they are given by number, `depths={1: ...}`.
    Raises AttnError for x, a state or depths that do not fit, and a table that no attention has.
    """

    def __init__(
        self,
        stack: Stack,
        width: int,
        length: int,
        parts: dict[str, Residual],
        last: nn.Module,
        readout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stack, self.width, self.length = stack, width, length
        self.parts = nn.ModuleDict(parts)
        self.last = last
        self.readout = readout
        learned = {key: plugin_of(word).learned(word, width, *of) for key, word, of in words(stack)}
        self.words = nn.ModuleDict({_dotless(key): one for key, one in learned.items() if one is not None})

    def forward(
        self, x: Tensor, *, state: State | None = None, depths: Depths | None = None, **tables: Any
    ) -> tuple[Tensor, Record]:
        """What it makes of `x` [B, n, width], behind the tokens of `state`, with `tables` by name, tokens
        leaving at `depths`, and what the run tells."""
        self._check(x, state, tables)
        first, before = (state.seen, state.held) if state else (0, {})
        run = Run(self, tables, x.shape[1], first, before, depths=depths_of(self.stack, depths, x))
        number = 0
        for each in self.stack.stages:
            if isinstance(each, Reversible):
                x = self._reversible(run, number, each, x)
                number += len(each.stages)
                continue
            x = self._layers(run, number, each, x)
            number += 1
        return self.last(x), run.record()

    def _layers(self, run: Run, i: int, of: Layers, x: Tensor) -> Tensor:
        if (word := of.halting) is not None:
            found = leaving.run(run, i, of, run.halting(i, word), x)
            for name, loss in plugin_of(word).losses(word, found.turns, found.carry).items():
                run.losses[f"{name}.{len(run.turns)}"] = loss
            run.turns[len(run.turns)] = found.turns
            return found.y
        if of.exit is not None:
            return self._exits(run, i, of, x)
        for t, turn in enumerate(of.turns):
            x = run.entered(i, t, x)
            for s, sublayer in enumerate(turn):
                run.enter((i, t, s), sublayer, x)
                x = self.part(sublayer)(x, run.near((i, t, s)))
        return x

    def _exits(self, run: Run, i: int, of: Layers, x: Tensor) -> Tensor:
        decide, sure, states = run.exit(i, of), list[Tensor](), list[Tensor]()

        def decided(seen: Seen) -> Decision:
            decision = decide(seen)
            assert decision.sure is not None
            sure.append(decision.sure)
            states.append(seen.x)
            return decision

        found = leaving.run(run, i, of, decided, x)
        states += states[-1:] * (len(of.turns) - len(states))  # where all have left none changes
        each = tuple(states) if self.training else ()
        run.exits[len(run.exits)] = Exits(each, tuple(sure), found.turns)
        return found.y

    def _reversible(self, run: Run, i: int, of: Reversible, x: Tensor) -> Tensor:
        streams = [x, x]
        for place, sublayer in of.sublayers(i):
            run.enter(place, sublayer, streams[1])
            made = self.part(sublayer).made(streams[1], run.near(place))
            streams = [streams[1], streams[0] + made]
        return (streams[0] + streams[1]) / 2

    def word(self, key: str) -> nn.Module | None:
        """What a word of the stack learns, by its `key` in `words` of `stacks.sizes`; None where nothing."""
        return dict(self.words.items()).get(_dotless(key))

    def logits(self, x: Tensor) -> Tensor:
        """What the readout makes of states `x` [B, n, width], as of the last ones: [B, n, tokens]."""
        assert self.readout is not None
        return cast(Tensor, self.readout(self.last(x)))

    def session(self, batch: int, capacity: int) -> StackSession:
        """An empty StackSession of `batch` rows of up to `capacity` tokens."""
        return StackSession(self, batch, capacity)

    def part(self, sublayer: Sublayer) -> Residual:
        """The module of a sublayer."""
        return cast(Residual, self.parts[key(sublayer)])

    def _check(self, x: Tensor, state: State | None, tables: Mapping[str, Any]) -> None:
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
        if state is not None:
            self._check_state(x, state)

    def _check_state(self, x: Tensor, state: State) -> None:
        if not isinstance(state, State):
            raise fail(f"a state is what a call left, not {type(state).__name__}", help="give `record.state`")
        if state.stack != self.stack:
            raise fail(f"the state is of {state.stack!r}, and the module of {self.stack!r}")
        for held in (one.x for kept in state.held.values() for one in kept if one is not None):
            if (held.shape[0], held.shape[2]) != (x.shape[0], self.width):
                raise fail(f"the state is of {held.shape[0]} rows, and x of {x.shape[0]}")
            if (held.dtype, held.device) != (x.dtype, x.device):
                raise fail(f"the state is {held.dtype} on {held.device}, and x {x.dtype} on {x.device}")

    def extra_repr(self) -> str:
        """Its line in print(model)."""
        return f"{self.stack!r}, width={self.width}, length={self.length}"


def depths_of(stack: Stack, given: Depths | None, x: Tensor) -> dict[int, Tensor]:
    """By the number of their stage among those with an exit. Raises AttnError for those that do not fit a
    call of x [B, n, width]."""
    turns = [len(stage.turns) for stage in stack.layers if stage.exit is not None]
    if given is None:
        return {}
    if not turns:
        raise fail(f"`depths` are of stages with an exit, and `{stack.name}` has none")
    if not isinstance(given, Mapping):
        if len(turns) > 1:
            raise fail(
                f"{len(turns)} stages have an exit", help="give `depths` by number: `{0: ..., 1: ...}`"
            )
        given = {0: given}
    for number, each in given.items():
        if number not in range(len(turns)):
            raise fail(f"no stage with an exit has the number {number}", help=f"there are {len(turns)}")
        shape = (each.dtype, [*each.shape]) if isinstance(each, Tensor) else (type(each).__name__, "")
        if shape != (torch.int64, [*x.shape[:2]]):
            raise fail(f"`depths` are torch.int64 {[*x.shape[:2]]}, not {shape[0]} {shape[1]}".rstrip())
        if each.numel() and not 1 <= int(each.min()) <= int(each.max()) <= turns[number]:
            raise fail(f"`depths` are from 1 to {turns[number]}, not {int(each.min())} .. {int(each.max())}")
    return {number: each.to(x.device) for number, each in given.items()}


def _dotless(key: str) -> str:
    return key.replace(".", "_")  # a name of a module has no dot


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
    readout: nn.Module | None = None,
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
    readout   makes logits of outputs, [B, n, width] to [B, n, tokens]; what asks for them is refused without

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
    for word in (stage.exit.rule for stage in stack.layers if stage.exit is not None):
        if plugin_of(word).leaving(word).logits and readout is None:
            raise fail(f"`{word.name}` reads logits", word.written, "give `readout=` to `build`")
    for table in (table for _, what in attentions(stack) for table in what.inputs):
        if table.name in ("state", "depths"):
            said = f"the table `{table.name}` has the name of an argument of a module"
            raise fail(said, help="rename it")
    behind: dict[Attention, int] = {}
    for memory, what in attentions(stack):
        behind[what] = max(behind.get(what, 0), remembered(memory))
    plans = {
        what: compile(
            what, length=length + behind[what], q_length=length, batch=batch, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, dtype=dtype, device=device, training=True, backend=backend,
        )
        for what in behind
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
    last = nn.Identity() if stack.layers[-1].norm == "post" else norm(width)
    module = StackModule(stack, width, length, parts, last, readout).to(device, getattr(torch, dtype))
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
