"""A stack as an nn.Module that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.execution.plan import PlanModule, compile
from attndsl.keywords import by_name, checked_dtype
from attndsl.stacks import leaving, reversible
from attndsl.stacks.decoding import StackSession
from attndsl.stacks.layers import FFN, Mixer, Residual, Sizes, signalled
from attndsl.stacks.run import Exits, Record, Run, State
from attndsl.stacks.sizes import attentions, check_tables, head_dim_of, identity, plugin_of, remembered, words
from attndsl.stacks.tree import FeedForward, Layers, Reversible, Stack, Sublayer
from attndsl.stage import Decision, Seen

INITS = ("gpt2", "torch")
Depths = Tensor | Mapping[int, Tensor]
"""At which layer tokens leave, integers [B, n] from 1; of several exits by their numbers."""


class StackModule(nn.Module):
    """A stack that trains: `y, record = module(x, **tables)`.

    x, y: [B, n, width], n up to the `length` it was built for; x may be tokens [B, n] where it has `embed`.
    `tables` are the run-time inputs of its attentions, by name. `state` is what a call on the tokens before
    these left, `record.state`.
    Raises AttnError for an x or a state that does not fit, and a table that no attention has.
    """

    def __init__(
        self,
        stack: Stack,
        width: int,
        length: int,
        parts: dict[str, Residual],
        last: nn.Module,
        embed: nn.Module | None = None,
        readout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stack, self.width, self.length = stack, width, length
        self.identity = identity(stack)
        self.parts = nn.ModuleDict(parts)
        self.last = last
        self.embed, self.readout = embed, readout
        learned = {key: plugin_of(word).learned(word, width, turns) for key, word, turns in words(stack)}
        self.words = nn.ModuleDict({_dotless(key): one for key, one in learned.items() if one is not None})
        self.memories = {key: plugin_of(word) for key, word, _ in words(stack) if key.startswith("m.")}

    def forward(
        self, x: Tensor, *, state: State | None = None, depths: Depths | None = None, **tables: Any
    ) -> tuple[Tensor, Record]:
        """What it makes of `x` [B, n, width], behind the tokens of `state`, with `tables` by name, and what
        the run tells. At `depths` [B, n], counted from 1, tokens leave a stage with an exit; where there are
        several, by its number."""
        x = self.embedded(x)
        self._check(x, state, tables)
        seen, held = (state.seen, state.held) if state else (0, {})
        run = Run(self, tables, x.shape[1], seen, held, self._depths(x, depths))
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
            x = signalled(of, x, run.first, t)
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
        each = tuple(states) if self.training else ()
        run.exits[len(run.exits)] = Exits(each, tuple(sure), found.turns)
        return found.y

    def _reversible(self, run: Run, i: int, of: Reversible, x: Tensor) -> Tensor:
        every = [*of.sublayers(i)]
        steps = [reversible.Step(self.part(sublayer), run.near(place)) for place, sublayer in every]
        one, other, entered = reversible.run(steps, x, of.stages[0].memory != ())
        for (place, sublayer), states in zip(every, entered, strict=False):
            run.enter(place, sublayer, states)
        return (one + other) / 2

    def word(self, key: str) -> nn.Module | None:
        """What a word of the stack learns, by its `key` in `words` of `stacks.sizes`; None where nothing."""
        return dict(self.words.items()).get(_dotless(key))

    def logits(self, x: Tensor) -> Tensor:
        """What the readout makes of states `x` [B, n, width], as of the last ones: [B, n, tokens]."""
        assert self.readout is not None
        return cast(Tensor, self.readout(self.last(x)))

    def embedded(self, x: Tensor) -> Tensor:
        """`x` [B, n, width] as it is, or of tokens [B, n] what `embed` makes."""
        whole = x.ndim == 2 and not x.is_floating_point()
        return cast(Tensor, self.embed(x)) if whole and self.embed is not None else x

    def session(self, batch: int, capacity: int, state: State | None = None) -> StackSession:
        """A StackSession of `batch` rows of up to `capacity` tokens, behind those of `state`."""
        return StackSession(self, batch, capacity, state)

    def part(self, sublayer: Sublayer) -> Residual:
        """The module of a sublayer."""
        return cast(Residual, self.parts[key(sublayer)])

    def _check(self, x: Tensor, state: State | None, tables: Mapping[str, Any]) -> None:
        self.check_tokens(x, tables)
        if x.shape[1] > self.length:
            raise fail(f"x has {x.shape[1]:,} positions, and the stack is built for {self.length:,}")
        if state is not None:
            self.check_state(state, x.shape[0], x.dtype, x.device)

    def check_tokens(self, x: Tensor, tables: Mapping[str, Any]) -> None:
        """Raises AttnError for an `x` that is not [B, n, width] of its dtype, and `tables` that it does not
        take."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            help = "tokens are embedded first, by you or by `embed=` of `build`" if x.ndim == 2 else ""
            raise fail(f"x is [B, n, {self.width}], not {[*x.shape]}", help=help)
        own = next(self.parameters()).dtype
        # weights may be kept as integers, and autocast takes any real numbers
        of_one = own.is_floating_point and not torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point() or (of_one and x.dtype != own):
            name = str(own).removeprefix("torch.")
            raise fail(f"x is {x.dtype}, and the module {own}", help=f"write `x.to(torch.{name})`")
        check_tables(self.stack, tables)
        for inner in (cast(Residual, part).inner for part in self.parts.values()):
            for name in inner.made if isinstance(inner, Mixer) else ():
                if name in tables:
                    raise fail(f"`{name}` is made of x", help="leave it out of the call")

    def _depths(self, x: Tensor, depths: Depths | None) -> Mapping[int, Tensor]:
        exits = [stage for stage in self.stack.layers if stage.exit is not None]
        if depths is None:
            return {}
        found = depths if isinstance(depths, Mapping) else {0: depths}
        if not isinstance(depths, Mapping) and len(exits) != 1:
            raise fail(
                f"{self.stack!r} has {len(exits)} exits", help="`depths` goes by the number of the exit"
            )
        for number, given in found.items():
            if number not in range(len(exits)):
                raise fail(f"there is no exit {number}", help=f"there are {len(exits)}, counted from 0")
            most = len(exits[number].turns)
            if not isinstance(given, Tensor) or given.shape != x.shape[:2]:
                raise fail(f"depths are integers {[*x.shape[:2]]}")
            if given.is_floating_point() or bool(((given < 1) | (given > most)).any()):
                raise fail(f"depths are integers from 1 to {most}")
        return found

    def check_state(self, state: State, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raises AttnError for a `state` that no call of this stack left on as many `rows` of this `dtype`
        and `device`."""
        if not isinstance(state, State):
            raise fail(f"a state is what a call left, not {type(state).__name__}", help="give `record.state`")
        if state.stack != self.identity:
            raise fail(f"the state is of {state.stack}, and the module of {self.identity}")
        for place, kept in state.held.items():
            sizes = cast(Mixer, self.part(self.stack.sublayer(place)).inner).sizes
            for held in (one for one in kept if one is not None):
                wanted = 2 * sizes.kv_heads * sizes.head_dim if held.pairs else self.width
                if held.x.shape[0] != rows:
                    raise fail(f"the state is of {held.x.shape[0]} rows, and x of {rows}")
                if held.x.shape[2] != wanted:
                    said = f"{held.x.shape[2]} numbers a token, and the module of {wanted}"
                    raise fail(f"the state is of {said}")
                # of autocast keys and values are narrower than x
                other = held.x.dtype != dtype and not torch.is_autocast_enabled(device.type)
                if other or held.x.device != device:
                    said = f"the state is {held.x.dtype} on {held.x.device}, and x {dtype} on {device}"
                    raise fail(said, help="write `state.to(x)`")

    def extra_repr(self) -> str:
        """Its line in print(model)."""
        return f"{self.stack!r}, width={self.width}, length={self.length}"


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
    rotary: float | None = None,
    inputs: Mapping[str, Callable[[], nn.Module]] | None = None,
    embed: nn.Module | None = None,
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
    rotary    base of the angles by which queries and keys are turned by position (Su et al. 2021), 10000.0 in
              most models; not turned if not given
    inputs    what makes a run-time table of the normed x [B, n, width], by its name: a function that gives a
              module, called for every attention that has such an input
    embed     makes x [B, n, width] of tokens [B, n]; what asks for tokens is refused without
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
    for _, word, _ in words(stack):
        if getattr(plugin_of(word), "needs_logits", False) and readout is None:
            raise fail(f"`{word.name}` reads logits", word.written, "give `readout=` to `build`")
    if rotary is not None and (rotary <= 0 or head_dim % 2):
        raise fail(
            f"rotary {rotary} of {head_dim} numbers of a head", help="a positive base, and an even head_dim"
        )
    sizes, inputs = Sizes(heads, kv_heads or heads, head_dim), inputs or {}
    check_tables(stack, inputs)
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
            _check_sublayer(sublayer, sizes, inputs, stack.remembers)
            names = [table.name for table in sublayer.what.inputs if table.name in inputs]
            inner = Mixer(
                cast(PlanModule, plans[sublayer.what].module()), width, sizes, tied=sublayer.tied,
                own=dict(sublayer.own), made={name: inputs[name]() for name in names}, rotary=rotary,
            )  # fmt: skip
        parts[key(sublayer)] = Residual(inner, stage.norm, norm, width)
    last = nn.Identity() if stack.layers[-1].norm == "post" else norm(width)
    module = StackModule(stack, width, length, parts, last, embed, readout)
    if init == "gpt2":
        initialise(module)
    return module.to(device, getattr(torch, dtype))


def _check_sublayer(sublayer: Sublayer, sizes: Sizes, inputs: Collection[str], remembers: bool) -> None:
    """Raises AttnError for sizes and inputs that do not go with its words, or with a stack that remembers."""
    assert isinstance(sublayer.what, Attention)
    if sublayer.tied and sizes.heads != sizes.kv_heads:
        said = f"{sizes.heads} heads of queries and {sizes.kv_heads} of keys are not the same"
        raise fail(said, sublayer.written, "tied keys are the queries: leave out `kv_heads`")
    for table in sublayer.what.inputs:
        if table.name in inputs and remembers and "n" in table.dims:
            said = f"`{table.name}` is made of x, and has no entries for the segments before"
            raise fail(said, sublayer.written, "give it to calls, or leave `memory` out")


def initialise(module: StackModule) -> None:
    """As in GPT-2 (Radford et al. 2019, section 2.3)."""
    scale = 1 / math.sqrt(sum(len(turn) for turn in module.stack.turns))
    for part in module.parts.values():
        inner = cast(Residual, part).inner
        own = inner.own.values() if isinstance(inner, Mixer) else ()
        for name, child in (named for of in (inner, *own) for named in of.named_children()):
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=0.02 * (scale if name in ("o", "down") else 1))
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
