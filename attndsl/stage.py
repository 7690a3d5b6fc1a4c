"""The contract of a stage: words of stacks by which tokens leave layers, or by which layers remember.

A word is frozen data in a stack. What it learns is a module, and what it does is asked of its plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attndsl.errors import Span

if TYPE_CHECKING:
    from torch import Tensor, nn

Role = Literal["halting", "exit", "memory"]
Argument = int | float | bool | str
Logits = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Word:
    """A word as a stack has it, with all its arguments; `word["eps"]` is one of them.

    written: where it stands.
    """

    name: str
    arguments: tuple[tuple[str, Argument], ...] = ()
    written: Span | None = field(default=None, compare=False)

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments)[name]


@dataclass(frozen=True, eq=False)
class Seen:
    """What a word sees of the tokens after a turn.

    x, before  [B, n, width], states after the turn and before it; of a token that has left its last
    running    bool [B, n], those that have not left
    turn       the number of the turn, counted from 0, of `turns`
    first      position of the first token
    carry      what the word left after the turn before, empty before the first
    logits     of states [B, n, width] what the readout makes of them, [B, n, tokens]; None where a stack is
               built without
    """

    x: Tensor
    before: Tensor
    running: Tensor
    turn: int
    turns: int
    first: int = 0
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Logits | None = None

    @property
    def last(self) -> bool:
        """Whether no turn follows."""
        return self.turn == self.turns - 1


@dataclass(frozen=True, eq=False)
class Decision:
    """What a turn meant for tokens that ran in it; of others it is not read.

    halts   bool [B, n], whether it was their last
    weight  [B, n], of their state in the output; None where that is their last state alone
    carry   for the turn after, of all tokens
    sure    [B, n], of an exit the confidence that it goes by
    kept    [B, n], what the sum of their states before is multiplied by; None where by 1
    onward  whether tokens that have left are computed on, for others to attend to: their output stays
    """

    halts: Tensor
    weight: Tensor | None = None
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    sure: Tensor | None = None
    kept: Tensor | None = None
    onward: bool = False


@dataclass(frozen=True)
class Leaving:
    """What an exit reads, and what a text may say of it.

    logits     whether it reads what the readout makes of states
    threshold  whether a text gives one
    between    what a threshold may be
    falls      whether a threshold that falls lets later tokens leave sooner
    once       whether it decides after the first layer, for all, so that layers share what it learns
    whole      whether it reads all tokens of a row, those to come too
    """

    logits: bool = False
    threshold: Literal["no", "maybe", "yes"] = "yes"
    between: tuple[float, float] = (0.0, 1.0)
    falls: bool = True
    once: bool = False
    whole: bool = False


@dataclass(frozen=True, eq=False)
class Held:
    """States that a memory holds of an attention, the oldest first.

    x   [B, m, width], as they entered it, before its norm
    at  their m positions, rising
    """

    x: Tensor
    at: Sequence[int]


class Stage(Protocol):
    """Registered under the entry-point group `attndsl.stages`; its name there is its word in stacks.

    Parameters and defaults are those of `signature`, by annotation: `int`, `float`, `bool`, `str` (a word).
    `role` says where the word stands, and which one of `Halting`, `Exit` and `Memory` it is:

    halting  `loop(WORD(...), max = N) { ... }`
    exit     `exit(WORD(...), threshold = ...)`
    memory   `memory(WORD(...)) { ... }`
    """

    role: Role

    def signature(self, *arguments: Any, **named: Any) -> None:
        """Never called: its `arguments`, and those `named`, are what a text gives. Raises nothing: `check`
        says what does not fit."""

    def check(self, word: Word) -> None:
        """Raises AttnError for arguments of `word` that make no sense."""

    def parameters(self, word: Word, width: int) -> int:
        """How many numbers `word` learns at a `width`."""

    def learned(self, word: Word, width: int) -> nn.Module | None:
        """What holds them, at their first values; None where there are none."""


class Halting(Stage, Protocol):
    """How tokens leave a loop; what they become is a sum of their states, or their last."""

    def decide(self, word: Word, learned: Any, seen: Seen) -> Decision:
        """After a turn; `learned` is the module of `word`. After the last turn all tokens leave, whatever is
        decided."""

    def losses(self, word: Word, turns: Tensor, carry: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What may be added to the loss, by name: of how many `turns` each token took, [B, n], and of what
        `word` carried after its last one."""


class Exit(Stage, Protocol):
    """How sure a layer is, so that tokens may leave after it in their state."""

    def leaving(self, word: Word) -> Leaving:
        """What it reads, and what a text may say of it."""

    def parameters(self, word: Word, width: int, turns: int = 1) -> int:
        """How many numbers are learned by one of the modules that `learned` makes."""

    def learned(self, word: Word, width: int, turns: int = 1) -> nn.Module | None:
        """Of each layer one, or one of all `turns` of a loop or where it decides `once`."""

    def decide(self, word: Word, learned: Any, seen: Seen, threshold: Tensor | None) -> Decision:
        """After a turn; `threshold` [n] is each token's, None where a text gives none. `halts` is read where
        tokens leave of their own accord, and `sure` always."""


class Memory(Stage, Protocol):
    """What stays of the tokens of a segment for those of the next."""

    def reach(self, word: Word, behind: int) -> tuple[int, int]:
        """How many keys it holds, and how far behind the first token of a segment they reach, where what it
        is given is `behind` already."""

    def remember(
        self, word: Word, learned: Any, held: Held | None, new: Held
    ) -> tuple[Held | None, Held | None, Mapping[str, Tensor]]:
        """What it holds once states are `new` to it: those of a segment, or what the word before it lets go;
        what it lets go itself, the oldest; and losses by name."""
