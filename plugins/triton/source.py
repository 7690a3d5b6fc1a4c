"""Generated scores as functions that kernels call."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from attndsl.attention import HeadGroup
from attndsl.emit.leaves import Leaf
from attndsl.emit.score import Score, light, score_of
from attndsl.emit.triton import SCATTERED, Written
from attndsl.execution.group_call import sloped


@lru_cache(maxsize=256)
def score_of_pairs(group: HeadGroup, head_dim: int, adjacent: bool) -> Score | str:
    """As `score_of`, by distance only where that spares something."""
    computed = score_of(group, head_dim, False)
    if not adjacent or isinstance(computed, str):
        return score_of(group, head_dim, adjacent)
    return computed if light(computed.roots) else score_of(group, head_dim, True)


def looks_up(score: Score) -> bool:
    """Whether something is looked up at each pair."""
    return any(leaf.kind in ("distance", "table") for leaf in score.leaves)


def unordered(score: Score, tables: Set[str]) -> str | None:
    """What torch, as it is set now, forbids of gradients of these tables, or is to warn of; None for nothing.
    Programs add up in any order what a table gets that is looked up by distance or pair."""
    scattered = any(leaf.kind in SCATTERED for leaf in sloped(score, tables))
    if not scattered or not torch.are_deterministic_algorithms_enabled():
        return None
    return (
        "gradients of tables that are looked up by distance or pair are added up in no fixed order, and "
        "torch.use_deterministic_algorithms asks for one"
    )


@dataclass(frozen=True, eq=False)
class Functions:
    """Of one score, by the names in its text."""

    written: Written
    text: str
    by_name: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.by_name[name]


@lru_cache(maxsize=256)
def functions(score: Score, wanted: frozenset[Leaf] = frozenset()) -> Functions:
    """With gradients of the `wanted` leaves. Triton finds their text by a file name of its own, and keeps
    what it compiles by the text: equal scores are compiled once on a machine."""
    import triton
    import triton.language

    from . import pairs

    written = Written(score, wanted)
    text = written.text
    name = f"<attndsl score {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = len(text), None, text.splitlines(True), name
    space: dict[str, Any] = {
        **vars(pairs),
        "triton": triton,
        "tl": triton.language,
        "__name__": pairs.__name__,
    }
    exec(compile(text, name, "exec"), space)
    return Functions(written, text, space)
