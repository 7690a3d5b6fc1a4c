"""Figures, read back: cells against brute force, colours from the rendered pixels, text from the SVG."""

import io
import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib
import matplotlib.image
import matplotlib.style
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.colors import to_rgb
from shipped import EXAMPLES, NAMES, example

import attndsl
from attndsl import pictures
from attndsl.command.cli import main
from attndsl.command.show import coarse
from attndsl.errors import AttnError
from attndsl.execution.selecting import drawn
from attndsl.pictures.masks import FULL, PARTIAL, ticks, tokens
from attndsl.pictures.outlines import outlines
from attndsl.pictures.style import DARK, LIGHT
from attndsl.tiles import cells, lowering

TABLES = {
    "alphafold": lambda n: {"z": np.zeros((1, 1, n, n), np.float32)},
    "flamingo": lambda n: {"lo": np.arange(n // 64) * 9, "hi": np.arange(n // 64) * 9 + 8},
    "graphormer": lambda n: {"bias": np.zeros((1, 4), np.float32), "path": np.zeros((1, n, n), int)},
    "left_padding": lambda n: {"pad": [n // 8]},
    "packed": lambda n: {"doc": np.arange(n) * 7 // n},
    "paligemma": lambda n: {"prompt": [n // 8]},
    "prefix_lm": lambda n: {"prefix": [n // 4]},
    "shared_prefix": lambda n: {"doc": np.arange(n) * 5 // n, "parent": [0, 0, 1, 1, 2]},
    "vsa": lambda n: {"chosen": np.arange(n // 64)[:, None][None, None] // 2},
}


def block_mask(text, length, block_size=16, **sizes):
    source = text if text.startswith("attention") else f"pattern p = {text}"
    program = attndsl.parse(source)
    return program[program.default()].block_mask(length, block_size, **sizes)


def random_mask(nq, n, block_size, density, seed):
    """Blocks and single tokens, so that tiles of every kind occur."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((-(-nq // 16), -(-n // 16))).repeat(16, 0).repeat(16, 1)[:nq, :n]
    table = np.where(coarse < 0.4, rng.random((nq, n)) < density, coarse < 0.7)
    source = "attention a { inputs m : bool[nq, n]  mask { q, k : m[q - (n - nq), k] } offset n - nq }"
    found = block_mask(source, n, block_size, q_length=nq, m=table)
    assert (found.to_dense()[0, 0] == table).all()
    return found, table


@pytest.mark.parametrize("block_size", [8, 24, 32])
@pytest.mark.parametrize(("nq", "n"), [(64, 64), (41, 59), (1, 50)])
def test_cells_are_what_brute_force_counts(nq, n, block_size):
    (grid,), table = (lambda mask, table: (mask.grids, table))(*random_mask(nq, n, block_size, 0.3, n))
    sides = cells.sides(block_size, n)
    for queries, keys in itertools.product(sides, sides):
        live, pairs = (
            [
                [part[i : i + queries, j : j + keys].sum() for j in range(0, n, keys)]
                for i in range(0, nq, queries)
            ]
            for part in (table, np.ones_like(table))
        )
        live, pairs = np.array(live), np.array(pairs)
        assert (cells.sums(grid, queries, keys) == live).all()
        levels = cells.levels(cells.shares(grid, queries, keys))
        assert ((levels > 0) == (live > 0)).all()
        assert ((levels > 1) == (100 * live >= pairs)).all()
        assert ((levels > 2) == (10 * live >= pairs)).all()
        assert ((levels > 3) == (2 * live >= pairs)).all()
        assert ((levels == 5) == (live == pairs)).all()


@pytest.mark.parametrize("block_size", [8, 24, 128])
def test_a_side_is_the_smallest_that_leaves_room(block_size):
    for length, room in itertools.product([1, 7, 256, 257, 5000, 2**20], [1, 60, 256]):
        side = cells.side(length, room, block_size)
        allowed = cells.sides(block_size, length)
        assert length <= side * room
        assert all(length > other * room for other in allowed if other < side)
        assert all(block_size % side == 0 or side % block_size == 0 for side in allowed)


def image(figure, panel=0):
    """The level of each cell, read off the polygons, which lie on one another."""
    ground, *regions = figure.axes[panel].patches
    theme = next(t for t in (LIGHT, DARK) if to_rgb(t.levels[0]) == ground.get_facecolor()[:3])
    known = [to_rgb(level) for level in theme.levels]
    rows, columns = ground.get_height(), ground.get_width()
    centres = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) + 0.5
    found = np.zeros(rows * columns, int)
    for region in regions:
        inside = region.get_path().contains_points(centres)
        found[inside] = known.index(region.get_facecolor()[:3])
    return found.reshape(rows, columns)


def pixels(figure, panel=0):
    """The colours in the middle of each cell of a panel, as they are in the PNG file."""
    file = io.BytesIO(pictures.render(figure, "png"))
    drawn = matplotlib.image.imread(file)[:, :, :3]
    box, (rows, columns) = figure.axes[panel].get_position(), image(figure, panel).shape
    x = box.x0 + (np.arange(columns) + 0.5) / columns * box.width
    y = 1 - box.y1 + (np.arange(rows) + 0.5) / rows * box.height
    return drawn[np.ix_((y * drawn.shape[0]).astype(int), (x * drawn.shape[1]).astype(int))]


def levels_of(colours, theme):
    known = np.array([to_rgb(level) for level in theme.levels])
    distance = np.abs(colours[:, :, None] - known).max(-1)
    assert distance.min(-1).max() < 0.01
    return distance.argmin(-1)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "text", ["last(9) | global([0])", "causal & random(5, seed = 1)", "blocks(16, causal)"]
)
def test_at_64_tokens_the_pixels_are_the_mask(text, dark):
    mask = block_mask(text, 64, 8)
    dense = mask.to_dense()[0, 0]
    tiles = dense.reshape(8, 8, 8, 8).all((1, 3)).repeat(8, 0).repeat(8, 1)
    figure = pictures.mask(mask, dark=dark)
    wanted = np.where(dense, np.where(tiles, FULL, PARTIAL), 0)
    assert (levels_of(pixels(figure), DARK if dark else LIGHT) == wanted).all()


def test_one_tile_has_one_colour():
    mask = block_mask("last(9)", 64, 128)
    assert (image(pictures.mask(mask)) == FULL * mask.to_dense()[0, 0]).all()


@pytest.mark.parametrize(("length", "q_length"), [(300, None), (4096, None), (4096, 100), (777, 31)])
def test_longer_masks_are_drawn_by_their_cells(length, q_length):
    mask = block_mask("last(40) | global([0])", length, 32, q_length=q_length)
    drawn, dense = image(pictures.mask(mask)), mask.to_dense()[0, 0]
    queries, keys = (-(-size // shape) for size, shape in zip(dense.shape, drawn.shape, strict=True))
    queries, keys = (1 << (side - 1).bit_length() for side in (queries, keys))
    padded = np.pad(
        dense, [(0, -size % side) for size, side in zip(dense.shape, (queries, keys), strict=True)]
    )
    live = padded.reshape(drawn.shape[0], queries, drawn.shape[1], keys).any((1, 3))
    assert ((drawn > 0) == live).all()


def test_by_tile_a_cell_is_a_tile():
    mask = block_mask("last(40)", 200, 8)
    drawn = image(pictures.mask(mask, by="tile"))
    assert drawn.shape == mask.grids[0].shape
    assert ((drawn > 0).sum(), (drawn == FULL).sum()) == (sum(mask.tiles[:2]), mask.tiles.full)


def test_a_narrow_window_is_visible_at_a_million_tokens():
    drawn = image(pictures.mask(block_mask("last(3)", 2**20, 1024)))
    assert drawn.shape == (256, 256)
    assert drawn.diagonal().all()
    assert not np.triu(drawn, 1).any()
    assert not np.tril(drawn, -2).any()


def said(figure, form="svg"):
    """The text of the SVG, and its title."""
    tree = ET.fromstring(pictures.render(figure, form))
    return [node.text for node in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_a_picture_says_what_it_shows():
    text = said(pictures.mask(block_mask("causal", 2**20, 1024), "causal(w = 4)"))
    assert {"causal(w = 4)", "n = 1,048,576, 50 % live", "query", "key", "0", "512k", "1M"} <= set(text)
    assert "one cell is 4,096 × 4,096 tokens, its colour the share that is live" in text
    assert set(cells.LEVELS) <= set(text)
    text = said(pictures.mask(block_mask("causal", 64, 16, q_length=4), first=60))
    assert "one cell is one token; lines part tiles of 16" in text
    assert {"n = 64, nq = 4, 97.7 % live", "60", "64"} <= set(text)


def test_each_distinct_mask_stands_under_its_heads():
    source = "attention a { heads 0..5 { mask causal } [6, 8] { mask last(9) } else { mask full } }"
    mask = block_mask(source, 64, heads=10)
    figure = pictures.mask(mask)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["heads 0..5", "heads 6, 8", "heads 7, 9"]
    for panel, head in enumerate([0, 6, 7]):
        assert ((image(figure, panel) > 0) == mask.to_dense()[0, head]).all()
    many = pictures.mask(block_mask("attention a { mask causal & last(h + 1) }", 64, heads=32))
    assert len(many.axes) == 4
    assert any("28 more masks" in line for line in said(many))


def test_layers_stand_beside_each_other():
    masks = {layers: block_mask(f"last({layers * 8 + 1})", 64).grids[0] for layers in (4, 1, 2)}
    figure = pictures.receptive_field(masks, "window")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [title.partition(":")[0] for title in titles] == ["1 layer", "2 layers", "4 layers"]
    for panel, layers in enumerate(sorted(masks)):
        assert ((image(figure, panel) > 0) == masks[layers].to_dense()).all()
        assert titles[panel].endswith(f"{100 * masks[layers].to_dense().mean():.3g} %")


def test_costs_are_drawn_where_they_are_positive():
    n = np.array([4096, 1024, 2048])
    figure = pictures.cost(
        {"a": (n, n * 2.0), "b": (n, [0.0, 5.0, 6.0])}, (n, n * 1.0), "costs", unit="FLOPs"
    )
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in figure.axes[0].lines}
    assert lines["a"].tolist() == [[1024, 2048], [2048, 4096], [4096, 8192]]
    assert lines["b"].tolist() == [[1024, 5], [2048, 6]]
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert {"FLOPs", "n", "a", "b", "ideal", "O(n)", "O(n²)", "1k", "4k"} <= set(said(figure))
    with pytest.raises(AttnError, match="no cost is positive"):
        pictures.cost({"a": (n, n * 0)})


def test_nothing_is_refused():
    with pytest.raises(AttnError, match="nothing to draw"):
        pictures.mask(block_mask("causal", 0))


@pytest.mark.parametrize(
    ("first", "count", "most", "wanted"),
    [
        (0, 64, 5, [0, 16, 32, 48, 64]),
        (0, 2**20, 3, [0, 2**19, 2**20]),
        (0, 100, 5, [0, 32, 64, 96]),
        (60, 4, 5, [60, 61, 62, 63, 64]),
        (0, 1, 5, [0, 1]),
    ],
)
def test_ticks_are_multiples_of_a_power_of_two(first, count, most, wanted):
    assert ticks(first, count, most) == wanted


def test_positions_are_short():
    named = {0: "0", 512: "512", 1000: "1,000", 1024: "1k", 1536: "1.5k", 2**19: "512k", 3 * 2**19: "1.5M"}
    assert {position: tokens(position) for position in named} == named


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_levels_are_told_apart_in_grey(theme):
    grey = [np.dot(to_rgb(level), [0.299, 0.587, 0.114]) for level in theme.levels]
    steps = np.diff(grey) * np.sign(grey[-1] - grey[0])
    assert (steps > 0.08).all()


@pytest.mark.parametrize("form", ["svg", "png"])
def test_the_same_mask_is_the_same_file_whatever_the_settings(form):
    mask = block_mask("last(9)", 300, 16)
    once = pictures.render(pictures.mask(mask, "last"), form)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        assert pictures.render(pictures.mask(mask, "last"), form) == once
        assert dict(matplotlib.rcParams) == before
    assert not re.search(rb"<dc:date>|20\d\d-\d\d", once)


def test_outlines_hold_the_cells_and_nothing_else():
    rng = np.random.default_rng(0)
    for shape in itertools.product(range(1, 9), repeat=2):
        mask = rng.random(shape) < rng.random()
        found = outlines(mask)
        sides = [(a, b) for one in found for a, b in zip(one, np.roll(one, -1, 0), strict=True)]
        turns = np.zeros(shape, int)
        for (x, top), (_, low) in (side for side in sides if side[0][0] == side[1][0]):
            # what stands to the left of an upright side is wound around by it
            turns[min(top, low) : max(top, low), :x] += 1 if low > top else -1
        assert (turns == mask).all()


def test_a_transparent_picture_has_no_background():
    figure = pictures.mask(block_mask("last(9)", 64))
    corners = [
        matplotlib.image.imread(io.BytesIO(pictures.render(figure, "png", transparent)))[0, 0]
        for transparent in (False, True)
    ]
    assert [corner[3] for corner in corners] == [1, 0]


def test_pyplot_stays_out():
    code = (
        "import sys, attndsl; from attndsl import pictures; "
        "m = attndsl.parse('pattern p = causal')['p'].block_mask(64); "
        "[pictures.render(pictures.mask(m), form) for form in ('svg', 'png')]; "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_example_is_drawn(name):
    program = example(name)
    attention = program[program.default()]
    chosen = bool(attention.attention.selected)
    for length in (512, 4096, 2**20)[: 1 if attention.inputs or chosen else 3]:
        heads = attention.attention.enough_heads()
        given = TABLES[name](length) if attention.inputs and not chosen else {}
        if chosen:
            sizes = {"B": 1, "H": heads, "n": length, "D": 16}
            given = {
                t.name: np.random.default_rng(0).normal(size=[sizes.get(axis, axis) for axis in t.dims])
                for t in attention.inputs
            }
            at = lowering.sizes(attention.attention, length, length, heads)
            given |= drawn(attention.attention, at, heads, 16, given)
        mask = attention.block_mask(length, coarse(attention.attention, length), heads=heads, **given)
        svg = pictures.render(pictures.mask(mask, name, dark=length == 512), "svg")
        assert len(svg) < (2_000_000 if chosen or name == "bigbird" else 400_000)
        assert b"<image" not in svg


PROGRAM = "attention lm(w = 4) { mask causal & last(w) }\n"


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "lm.attn"
    file.write_text(PROGRAM, encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("name", "arguments", "start"),
    [
        ("a.svg", [], b"<?xml"),
        ("a.PNG", [], b"\x89PNG"),
        ("a.svg", ["--format", "png"], b"\x89PNG"),
        ("a.svg", ["--format", "term"], b"lm  n = 64"),
        ("a.txt", [], b"lm  n = 64"),
    ],
)
def test_show_writes_the_format_that_is_meant(program, tmp_path, name, arguments, start):
    out = tmp_path / name
    done = CliRunner().invoke(main, ["show", program, "--length", "64", "-o", str(out), *arguments])
    assert (done.exit_code, done.output) == (0, "")
    assert out.read_bytes().startswith(start)


def test_show_draws_vectors_without_a_ground(program, tmp_path):
    out = tmp_path / "a.svg"
    assert CliRunner().invoke(main, ["show", program, "--length", "512", "-o", str(out)]).exit_code == 0
    text = out.read_text(encoding="utf-8")
    assert "<image" not in text
    assert LIGHT.paper not in text
    assert "one cell is one token" in text


def test_show_chooses_among_centres_of_any_width(tmp_path):
    centres = tmp_path / "mu.npy"
    np.save(centres, np.random.default_rng(0).normal(size=(2, 48, 24)).astype(np.float32))
    file = str(EXAMPLES / "routing.attn")
    sizes = ["--length", "64", "--set", "w=16", "--input", f"mu={centres}"]
    done = CliRunner().invoke(main, ["show", file, "routing_safe", *sizes])
    assert (done.exit_code, done.output.count("┌")) == (0, 2)


def test_show_titles_the_picture(program, tmp_path):
    out = tmp_path / "a.svg"
    sizes = ["--length", "64", "--q-length", "16", "--heads", "2", "--head", "1", "--set", "w=9"]
    assert CliRunner().invoke(main, ["show", program, *sizes, "-o", str(out)]).exit_code == 0
    text = [node.text for node in ET.parse(out).iter("{http://www.w3.org/2000/svg}text")]
    assert {"lm(w = 9), head 1", "n = 64, nq = 16, 14.1 % live", "48", "60"} <= set(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "svg"], "name a file: -o mask.svg"),
        (["--format", "png"], "name a file: -o mask.png"),
        (["-o", "/nowhere/a.svg"], "cannot write `/nowhere/a.svg`"),
    ],
)
def test_a_picture_needs_a_file(program, arguments, message):
    done = CliRunner().invoke(main, ["show", program, "--length", "64", *arguments])
    assert done.exit_code == 1
    assert message in done.output
