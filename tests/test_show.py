"""The terminal picture, read back character by character."""

import re
import time

import numpy as np
import pytest

import attndsl
from attndsl.command import terminal

HALF = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}
PATTERNS = {
    "window": "radius(3) | global([0])",
    "causal": "causal",
    "random": "causal & random(2, seed = 1)",
    "strided": "{ q, k : (q - k) mod 5 == 0 }",
    "nothing": "full - full",
}


def block_mask(text, length, block_size=16, **sizes):
    return attndsl.parse(f"pattern p = {text}")["p"].block_mask(length, block_size, **sizes)


def body(picture):
    """The lines inside the frames, without them; side by side masks stay on one line."""
    return [line[1:-1] for line in picture.splitlines() if line.startswith("│")]


@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(("length", "q_length"), [(64, None), (78, 77), (40, 1), (1, 1), (33, 20)])
def test_up_to_a_token_per_column_the_picture_is_the_mask(text, length, q_length):
    mask = block_mask(text, length, q_length=q_length)
    read = np.array([[HALF[char] for char in line] for line in body(terminal.picture(mask))])
    rows = read.swapaxes(1, 2).reshape(-1, length)
    dense = mask.to_dense()[0, 0]
    assert (rows[: len(dense)] == dense).all()
    assert not rows[len(dense) :].any()


def shade(share):
    below = {"·": 0.01, "░": 0.1, "▒": 0.5, "▓": 1}
    return " " if share == 0 else next((shade for shade, end in below.items() if share < end), "█")


@pytest.mark.parametrize("block_size", [16, 24, 128])
@pytest.mark.parametrize("text", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(("length", "q_length"), [(300, None), (511, 17), (1000, 999)])
def test_a_character_is_the_share_of_its_rectangle(block_size, text, length, q_length):
    mask = block_mask(text, length, block_size, q_length=q_length)
    drawn = terminal.picture(mask)
    keys, queries = (int(x) for x in re.search(r"= (\d+) keys x (\d+) queries", drawn).groups())
    dense = mask.to_dense()[0, 0]
    wanted = [
        "".join(shade(dense[i : i + queries, j : j + keys].mean()) for j in range(0, length, keys))
        for i in range(0, len(dense), queries)
    ]
    assert body(drawn) == wanted


def test_a_narrow_window_is_visible_at_a_million_tokens():
    mask = block_mask("last(3)", 2**20, block_size=128)
    start = time.process_time()
    lines = body(terminal.picture(mask))
    assert time.process_time() - start < 1
    assert len(lines) == 32
    assert all(line.strip() == "·" * len(line.strip()) for line in lines)
    assert all(line[2 * i : 2 * i + 2] == "··" for i, line in enumerate(lines))


def test_each_distinct_mask_stands_under_its_heads():
    mask = attndsl.parse(
        "attention a { heads 0..5 { mask causal } [6, 8] { mask last(9) } else { mask full } }"
    )["a"].block_mask(64, 16, heads=10)
    drawn = terminal.picture(mask)
    names = [name.strip() for name in re.findall(r"heads [\d., ]+", drawn)]
    assert names == ["heads 0..5", "heads 6, 8", "heads 7, 9"]
    assert drawn.count("┌") == 3


@pytest.mark.parametrize(("length", "heads"), [(64, 1), (70, 10), (4000, 1), (2**20, 10)])
@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_wider_than_the_terminal(length, heads, width):
    groups = "heads 0..0 { mask causal } else { mask last(50) }" if heads > 1 else "mask causal"
    mask = attndsl.parse(f"attention a {{ {groups} }}")["a"].block_mask(length, heads=heads)
    assert max(map(len, terminal.picture(mask, width).splitlines())) <= width


@pytest.mark.parametrize(
    ("n", "nq", "first", "said"),
    [
        (36, 4, 32, "queries 32..35 down, keys 0..35 across"),
        (36, 1, 35, "query 35 down, keys 0..35 across"),
        (1, 1, 0, "query 0 down, key 0 across"),
        (5000, 5000, 0, "queries 0..4,999 down, keys 0..4,999 across"),
    ],
)
def test_positions_are_those_of_the_pattern(n, nq, first, said):
    assert said in terminal.picture(block_mask("causal", n, q_length=nq), first=first).splitlines()


def test_numbers_agree_with_their_words():
    drawn = terminal.picture(block_mask("causal", 300, q_length=1))
    assert "one character = 4 keys x 1 query" in drawn
    assert terminal.quantity(0, "key") == "0 keys"


def test_of_many_masks_a_few_are_drawn():
    mask = attndsl.parse("attention a { mask causal & last(h + 1) }")["a"].block_mask(64, 16, heads=32)
    drawn = terminal.picture(mask).splitlines()
    assert len(drawn) < 80
    assert sum(line.count("┌") for line in drawn) == 4
    assert any(line.startswith("head 0 ") for line in drawn)
    assert any(line.startswith("and 28 more") for line in drawn)


def test_a_block_mask_says_how_thin_it_is():
    said = str(block_mask("last(2)", 2**17, block_size=128))
    assert "131,072 x 131,072, density 0.00153 %" in said


def test_colour_changes_no_character():
    drawn = terminal.picture(block_mask("causal", 500))
    assert re.sub("\x1b\\[\\d+m", "", terminal.coloured(drawn)) == drawn
    assert terminal.coloured(drawn) != drawn
