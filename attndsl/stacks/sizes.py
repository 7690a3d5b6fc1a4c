"""What a stack is built with, and what its width and length are asked of."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attndsl.attention import Attention
from attndsl.errors import fail
from attndsl.keywords import instead
from attndsl.stacks.tree import Stack
from attndsl.tiles import lowering


def head_dim_of(width: int, heads: int, head_dim: int | None) -> int:
    """The numbers of a head, whether they are given or not. Raises AttnError for what is no size, and where
    they are no whole number."""
    for name, size in (("width", width), ("heads", heads)):
        if lowering.checked_length(name, size) == 0:
            raise fail(f"`{name}` is 0, and must be positive")
    if head_dim is not None:
        return head_dim
    if width % heads:
        raise fail(f"a width of {width} is no multiple of {heads} heads", help="give `head_dim`")
    return width // heads


def attentions(stack: Stack) -> Iterator[Attention]:
    """Every attention of a stack, each once."""
    seen = {sub.what: None for turn in stack.turns for sub in turn if isinstance(sub.what, Attention)}
    return iter(seen)


def check_tables(stack: Stack, given: Collection[str]) -> None:
    """Raises AttnError for a name that is no input of any of its attentions."""
    if not given:
        return
    known = {table.name for what in attentions(stack) for table in what.inputs}
    for name in given:
        if name not in known:
            help = instead(name, known)
            raise fail(f"no attention of `{stack.name}` has an input `{name}`", help=help)
