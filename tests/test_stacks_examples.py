"""The stacks under examples/stacks: what they claim is proved, their figures fail when a number changes."""

from __future__ import annotations

import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attndsl
from attndsl import syntax
from attndsl.execution.selecting import drawn
from attndsl.stacks.tree import Stack
from attndsl.tiles import lowering

FOLDER = Path(__file__).parent.parent / "examples" / "stacks"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.attn")))
WIDTHS = {
    "calm": (1024, 512),
    "compressive_transformer": (768, 1024),
    "depth_adaptive": (512, 512),
    "document": (512, 512),
    "gemma3": (1536, 2560),
    "longformer_lm": (2048, 512),
    "memorizing_transformer": (512, 1024),
    "reformer": (4096, 1024),
    "revnet": (1024, 512),
    "sparse_transformer": (512, 512),
    "transformer_xl": (150, 410),
    "universal_transformer": (512, 1024),
}
"""Length, or that of a segment, and width, as published where that does not take long."""

FIGURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "calm": {
        "calm": (25203712, 4198400, 8192, 0, (0.9, 4.0, "each")),
        "calm_batch": (25203712, 4198400, 8192, 0, (0.9, 4.0, "min")),
    },
    "compressive_transformer": {
        "compressive_transformer": (377735168, 42513408, 64560, 1922, (768, 1152, 3, "conv")),
    },
    "depth_adaptive": {
        "depth_adaptive": (18905094, 787968, 3072, 0, (None, None, "each")),
        "depth_adaptive_sequence": (18905094, 787968, 3072, 0, ("sequence", None, None, "each")),
    },
    "document": {
        "document": (
            28354561,
            1327616,
            14336,
            512,
            (512, 0.01, False, False, False, 512, 512, 0.2, None, "each"),
        ),
    },
    "gemma3": {
        "gemma3": (2675005440, 36325632, 37376, 0, ()),
        "gemma3_first": (393387520, 5245440, 5120, 0, ()),
    },
    "longformer_lm": {
        "longformer_lm": (37805056, 18143616, 7860, 0, ()),
    },
    "memorizing_transformer": {
        "memorizing_transformer": (151107584, 3162112, 77312, 65536, (512, 65536, 512)),
    },
    "reformer": {
        "reformer": (144816128, None, 25344, 0, ()),
        "hashed": (85108,),
    },
    "revnet": {
        "revnet": (37805056, 6297600, 12288, 0, ()),
    },
    "sparse_transformer": {
        "sparse_transformer": (94511104, 895680, 3840, 0, ()),
        "sparse_pair": (2100224, 59712, 256, 0, ()),
    },
    "transformer_xl": {
        "transformer_xl": (32334240, 362400, 4800, 150, (150,)),
    },
    "universal_transformer": {
        "universal_transformer": (12593153, 1575936, 6144, 0, (0.01, False, False, False)),
    },
}
"""What `figures` finds."""

LONG = ("calm", "gemma3", "memorizing_transformer", "sparse_transformer", "transformer_xl")
UNNOTICED = {("reformer", "8")}
"""Numbers that change no figure: feed-forward layers in more pieces are the same."""


@cache
def text_of(name: str) -> str:
    return (FOLDER / f"{name}.attn").read_text(encoding="utf-8")


def said(stack: Stack) -> tuple[Any, ...]:
    """The arguments of its words."""
    told = list[Any]()
    for stage in stack.layers:
        words = (stage.halting, stage.exit and stage.exit.rule, *stage.memory)
        told += [value for word in words if word is not None for _, value in word.arguments]
        if (leaves := stage.exit) is not None:
            told += [leaves.threshold, leaves.decay, leaves.batch]
    return tuple(told)


def figures(name: str, text: str) -> dict[str, tuple[Any, ...]]:
    """Of each stack: parameters, live pairs of all layers, None where content decides, keys kept in decoding,
    how far memory reaches, and what its words are given."""
    program, (length, width) = attndsl.parse(text, name), WIDTHS[name]
    heads = 4 if name == "longformer_lm" else 1
    found = dict[str, tuple[Any, ...]]()
    for each in program.stacks:
        stack = program[each]
        assert isinstance(stack, Stack)
        depth = attndsl.depth(stack, length=length, width=width, heads=heads)
        pairs = [level.pairs for level in depth.levels]
        every = None if None in pairs else sum(count or 0 for count in pairs)
        kept = sum(level.kept for level in depth.levels)
        found[each] = (depth.parameters, every, kept, depth.memory, said(stack))
    if name == "reformer":  # of its choices, one draw
        hashed = program["hashed"]
        assert isinstance(hashed, attndsl.Bound)
        chosen = drawn(hashed.attention, lowering.sizes(hashed.attention, 512, 512, 1), 1, 16, {})
        found["hashed"] = (int(hashed.counts(512, heads=1, **chosen).sum()),)
    return found


def numbers(name: str) -> list[tuple[int, int]]:
    """Where numbers stand in a text, but those of comments, assertions, lists and the first of some heads."""
    code = re.sub(
        r"#.*|^assert.*|\[.*?\]|0 \.\. 1", lambda found: " " * len(found[0]), text_of(name), flags=re.M
    )
    return [found.span() for found in re.finditer(r"(?<![\w.])\d+(?:\.\d+)?", code)]


@pytest.mark.parametrize("name", NAMES)
def test_claims_are_proved(name: str) -> None:
    program = attndsl.load(FOLDER / f"{name}.attn")
    assert [attndsl.prove(each).status for each in program.assertions] != []
    assert {each.text for each in program.assertions if attndsl.prove(each).status != "proved"} == set()
    assert syntax.format(text_of(name)) == text_of(name)
    assert re.search(r"\b20[12]\d\b", text_of(name).split("\n\n")[0])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NAMES]
)
def test_figures(name: str) -> None:
    assert figures(name, text_of(name)) == FIGURES[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start", "end"), [(name, *at) for name in NAMES if name not in LONG for at in numbers(name)]
)
def test_figures_fail_when_a_number_changes(name: str, start: int, end: int) -> None:
    text = text_of(name)
    number = text[start:end]
    changed = f"{text[:start]}{float(number) / 2 if '.' in number else int(number) + 1}{text[end:]}"
    try:
        same = figures(name, changed) == FIGURES[name]
    except attndsl.AttnError:
        same = False
    assert same == ((name, number) in UNNOTICED)


def test_there_are_twelve() -> None:
    assert set(NAMES) == set(FIGURES)
    assert len(NAMES) >= 12


@pytest.mark.slow
def test_spans_shrink_where_they_cost() -> None:
    """The shortest of what stacks learn in `benchmarks/learning.py`."""
    learning = runpy.run_path(str(FOLDER.parent.parent / "benchmarks" / "learning.py"))
    free, dear = learning["span"](200, (0.0, 1e-1))
    assert dear < 5 < free


REFUSED = {
    "reformer": "has no sessions: what `lsh` chooses may change",
    "depth_adaptive_sequence": "`multinomial` is sure by later tokens too, and has no sessions",
}
"""Files and stacks that are not generated from, and why."""


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_those_of_the_whole_run(name: str) -> None:
    """Of every stack of the examples whose attentions are proved causal and stable; others say why not. One
    row, as `batch = min` goes in lockstep."""
    program = attndsl.load(FOLDER / f"{name}.attn")
    for each in program.stacks:
        stack = program[each]
        assert isinstance(stack, Stack)
        heads = 4 if name == "longformer_lm" else 2
        torch.manual_seed(0)
        module = attndsl.build(
            stack, width=8 * heads, heads=heads, length=24, dtype="float64", readout=nn.Linear(8 * heads, 5)
        ).eval()
        x = torch.randn(1, 48 if stack.remembers else 24, 8 * heads, dtype=torch.float64)
        reason = REFUSED.get(each) or REFUSED.get(name)
        if reason is not None:
            with pytest.raises(attndsl.AttnError, match=reason):
                module.session(1, 24)
            continue
        session = module.session(1, 24)
        found = torch.cat([session.step(piece) for piece in x.split([9, 1, 1, 13 + x.shape[1] - 24], 1)], 1)
        state, meant = None, []
        for segment in x.split(24, 1):
            y, record = module(segment, state=state)
            state = record.state
            meant.append(y)
        torch.testing.assert_close(found, torch.cat(meant, 1), rtol=0, atol=1e-11)
