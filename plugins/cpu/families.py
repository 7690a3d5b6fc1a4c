"""Writes the headers of common scores, whose libraries are packaged: what differs in masks, lengths, sinks,
tables and numbers shares one.

python -m attndsl.plugins.cpu.families
"""

from __future__ import annotations

import attndsl
from attndsl.emit.score import Score, score_of

from .compiling import PACKAGED
from .score import code

FAMILIES = {
    "plain": "",
    "distance": "score alibi",
    "softcap": "score softcap(30)",
    "distance-softcap": "score alibi  score softcap(30)",
}


def headers() -> dict[str, str]:
    """By name of the file: of the forward pass, and of the backward pass without and with slopes by
    distance."""
    found = {}
    for name, clauses in FAMILIES.items():
        (group,) = attndsl.parse(f"attention a {{ {clauses} }}")["a"].attention.groups
        score = score_of(group, 64, True)
        assert isinstance(score, Score)
        found[f"{name}-forward.h"] = code(score, None)
        found[f"{name}-backward.h"] = code(score, ())
        if distances := [leaf for leaf in score.leaves if leaf.kind == "distance"]:
            found[f"{name}-backward-learned.h"] = code(score, distances)
    return found


if __name__ == "__main__":
    PACKAGED.mkdir(exist_ok=True)
    for name, text in headers().items():
        (PACKAGED / name).write_text(text)
