"""The contract of a stage: words of stacks by which tokens leave layers, or by which layers remember.

A word is frozen data in a stack. What it learns is a module, and what it does is asked of its plugin.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attndsl.errors import Span

if TYPE_CHECKING:
    from torch import Tensor, nn

Role = Literal["halting", "exit", "memory"]
Argument = int | float | bool | str
Logits = Callable[["Tensor"], "Tensor"]
Read = Callable[["Tensor"], "Tensor"]
"""What queries of a segment get, [B, n, H, D], of keys made of states [B, m, width], wherever these stand:
softmax(Q K^T / sqrt(D)) V. Gradients go to the states alone."""


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
    keeps   [B, n], what the sum of states before is multiplied by; None where it stays
    onward  whether states of tokens that have left still change, though what they are in the output does not
    carry   for the turn after, of all tokens
    sure    of an exit the confidence that it goes by
    """

    halts: Tensor
    weight: Tensor | None = None
    keeps: Tensor | None = None
    onward: bool = False
    carry: Mapping[str, Tensor] = field(default_factory=dict)
    sure: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Held:
    """What a memory holds of an attention, the oldest first.

    x      [B, m, width], states as they entered it, before its norm; or [B, m, 2 Hkv D], keys and values
    at     int64 [m], their positions, rising
    first  the first of them, if none is missing between them
    loose  how many of the last are to be made into something else with states to come
    pairs  whether x are keys and values
    """

    x: Tensor
    at: Tensor
    first: int | None = None
    loose: int = 0
    pairs: bool = False

    @property
    def many(self) -> int:
        """How many there are."""
        return self.x.shape[1]


def joined(held: Held | None, new: Held) -> Held:
    """What is held, and behind it what is new; none of it loose."""
    import torch

    if held is None:
        return replace(new, loose=0)
    close = held.first is not None and new.first is not None and held.first + held.many == new.first
    x, at = torch.cat([held.x, new.x], 1), torch.cat([held.at, new.at])
    return replace(new, x=x, at=at, first=held.first if close else None, loose=0)


def last(many: int, held: Held) -> tuple[Held, Held | None]:
    """The last `many` of what is held, and those before, None where there are none."""
    goes = max(held.many - many, 0)
    first = None if held.first is None else held.first + goes
    kept = replace(held, x=held.x[:, goes:], at=held.at[goes:], first=first)
    return kept, replace(held, x=held.x[:, :goes], at=held.at[:goes], loose=0) if goes else None


class Stage(Protocol):
    """Registered under the entry-point group `attndsl.stages`; its name there is its word in stacks. What
    stands here with a value is inherited.

    Parameters and defaults are those of `signature`, by annotation: `int`, `float`, `bool`, `str` (a word).
    `role` says where the word stands, and which one of `decide`, `confidence` and `remember` is asked:

    halting  `loop(WORD(...), max = N) { ... }`
    exit     `exit(WORD(...), threshold = ...)`
    memory   `memory(WORD(...)) { ... }`
    """

    role: Role

    def signature(self, *arguments: Any, **named: Any) -> None:
        """Never called: its `arguments`, and those `named`, are what a text gives; nothing if it is not
        written. Raises nothing: `check` says what does not fit."""
        return

    def check(self, word: Word) -> None:
        """Raises AttnError for arguments of `word` that make no sense."""
        return

    def parameters(self, word: Word, width: int, turns: int) -> int:
        """How many numbers `word` learns at a `width`, in a stage of so many `turns`."""
        return 0

    def learned(self, word: Word, width: int, turns: int) -> nn.Module | None:
        """What holds them, at their first values; None where there are none."""
        return None


class Halting(Stage, Protocol):
    """How tokens leave a loop; what they become is a sum of their states, or their last."""

    role: Role = "halting"

    @abstractmethod
    def decide(self, word: Word, learned: Any, seen: Seen) -> Decision:
        """After a turn; `learned` is the module of `word`. After the last turn all tokens leave, whatever is
        decided."""

    @abstractmethod
    def losses(self, word: Word, turns: Tensor, carry: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What may be added to the loss, by name: of how many `turns` each token took, [B, n], and of what
        `word` carried after its last one."""


class Exit(Stage, Protocol):
    """How sure a layer is, so that tokens may leave after it in their state.

    needs_logits: whether it reads what the readout makes of states.
    needs_threshold: whether a text has to say how sure is sure.
    falls: whether less of it is surer.
    each: whether every layer learns its own; turns of a loop share theirs.
    """

    role: Role = "exit"
    needs_logits: bool = False
    needs_threshold: bool = True
    falls: bool = False
    each: bool = False

    def causal(self, word: Word) -> bool:
        """Whether how sure `word` is of a token has nothing of later ones."""
        return True

    @abstractmethod
    def confidence(self, word: Word, learned: Any, seen: Seen) -> tuple[Tensor, Mapping[str, Tensor]]:
        """[B, n] of each token after a turn, and what `word` carries to the turn after. Without a threshold
        it is the chance to leave now of one that has not left, from 0 to 1, and tokens leave where it is a
        half, or where what is carried as `leaves`, bool [B, n], says so."""


class Memory(Stage, Protocol):
    """What stays of the tokens of a segment for those of the next.

    pairs: whether it holds keys and values as they were made, and not states.
    """

    role: Role = "memory"
    pairs: bool = False

    @abstractmethod
    def reach(self, word: Word, behind: int) -> tuple[int, int]:
        """How many keys it holds, and how far behind the first token of a segment they reach, where what it
        is given is `behind` already."""

    @abstractmethod
    def remember(
        self, word: Word, learned: Any, held: Held | None, new: Held, read: Read
    ) -> tuple[Held | None, Held | None, Mapping[str, Tensor]]:
        """What it holds once states are `new` to it: those of a segment, or what the word before it lets go;
        what it lets go itself, the oldest; and losses by name. `read` is how the attention reads states."""
