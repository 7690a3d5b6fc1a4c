"""The page of `attndsl report`, read back from a real browser that has no network."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import sympy

import attndsl
from attndsl.html.masks import SIDES, Mask, masks
from attndsl.html.page import render
from attndsl.html.typeset import mathml
from attndsl.pictures import Drawing

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PHONE, DESKTOP = 360, 1280
EVIL = '</script><script>document.title = "taken"</script><img src=x onerror="document.title = \'taken\'">'
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1" fill="{}"/></svg>'


def seconds(forward):
    return {"forward": forward, "backward": 2.5 * forward, "decode": forward / 4096}


def degrees(most):
    return {"min": 258, "max": most, "mean": 498.8, "histogram": []}


REPORT = {
    "name": f"longformer {EVIL}", "length": 4096, "q_length": 4096, "heads": 12, "batch": 1, "layers": 3,
    "block_size": 128,
    "nnz": {
        "value": 24517608, "formula": "6180*n - 795672", "valid_for": "n >= 257", "bounds": None,
        "expected": None, "around": None, "residues": None,
    },
    "in_parameters": {"r": {"formula": "n*(2*r + 1) - r*(r + 1)", "valid_for": "n >= r"}},
    "density": 2043134 / 4096**2, "complexity": "O(n*sqrt(n))", "empty_rows": 0, "causal": False,
    "not_causal_at": {"n": 2, "q": 0, "k": 1},
    "flops": {"forward": 6276507648, "backward": 15691269120, "decode": 1572864},
    "bytes": {"forward": 50331648, "backward": 150994944, "decode": 786432},
    "lowerings": {
        "torch": {
            "seconds_estimate": 0.0312, "reason": None,
            "flops": {"forward": 7549747200, "backward": 18874368000},
            "bytes": {"forward": 61331648, "backward": 180994944},
        },
        "reference": {"seconds_estimate": None, "reason": EVIL, "flops": None, "bytes": None},
    },
    "block_sizes": [
        {"block_size": 64, "tiles": {"full": 400, "partial": 250}, "pairs": 2662400, "waste": 1.303},
        {"block_size": 128, "tiles": {"full": 94, "partial": 118}, "pairs": 3473408, "waste": 1.7},
    ],
    "best_block_size": 64,
    "machines": {
        "H100": {"intensity": 124.7, "bound": "memory", "seconds": seconds(1.9e-5)},
        "this CPU": {"intensity": 124.7, "bound": "compute", "seconds": seconds(2.1e-2)},
    },
    "reach": {
        "length": 4096, "target": "full", "full_after": 2, "hole": None, "settled_after": 2,
        "for_every_n": f"after 2 layers {EVIL}", "formula": "min(n, 256*L + 1) for L >= 2", "undecided": None,
        "per_layer": [
            {"layers": 1, "last_row": 258, "worst_row": 257, "worst_at": 300, "pairs": 2043134},
            {"layers": 2, "last_row": 4096, "worst_row": 4095, "worst_at": 4095, "pairs": 16777215},
        ],
    },
    "diameter": 2,
    "kv_cache": {
        "minimum": 4095, "full": 4096, "at": 4095, "rule": f"keep {EVIL}", "per_head": [4095], "union": 4095,
        "causal": False, "bounded": False, "formula": "n - 1", "valid_for": "every n", "state": None,
        "by_stream": {"tokens": 4000, "memory": 95},
    },
    "shards": [
        {"scheme": scheme, "ranks": 3, "keys": [1, keys, 2], "bytes": 10752 * keys, "all_gather": 44040192,
         "ring": 44040193, "ring_hops": 7, "balance": balance}
        for scheme, keys, balance in (("contiguous", 1024, 1.0021), ("striped", 4096, 1.0))
    ],
    "graph": {
        "by": "token", "block_size": None, "nodes": 4096, "edges": 2043134, "in_degree": degrees(4096),
        "out_degree": degrees(4095), "causal": False, "hubs": 1, "star": True, "two_hop": None, "diameter": 2,
        "average_shortest_path": 1.878, "joined": 1.0, "components": 1, "largest_component": 4096,
        "spectral_gap": 0.0123,
    },
    "reasons": {"rows": EVIL},
}  # fmt: skip


def drawn(text, length, block_size=128, first=0, **sizes):
    return masks(
        attndsl.parse(f"attention a {{ {text} }}")["a"].block_mask(length, block_size, **sizes), first
    )


LOOK = "return [...document.querySelectorAll('data')].map(d => [d.dataset.field, d.value, d.textContent])"
LONGFORMER = drawn("mask radius(256) | global([0])", 4096)


@pytest.fixture(scope="module")
def chromium():
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no Chromium here: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(chromium, tmp_path):
    """A function that shows a page, on a screen of some width and scheme."""

    def open_page(html, width=DESKTOP, scheme="light", media=""):
        chromium.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE},
        )
        chromium.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        chromium.get(file.as_uri())
        return chromium

    return open_page


def full_page():
    figures = {
        name: Drawing(SVG.format("white"), SVG.format("black"), f"{name} {EVIL}")
        for name in ("cost", "reach")
    }
    return render(REPORT, masks=LONGFORMER, figures=figures, source=EVIL)


def text(element):
    return element.get_property("textContent")


def at(data, pointer):
    for step in pointer.split("/")[1:]:
        data = data[int(step)] if isinstance(data, list) else data[step]
    return data


def leaves(data, pointer=""):
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list):
        items = enumerate(data)
    else:
        return {pointer: data}
    return {place: leaf for key, item in items for place, leaf in leaves(item, f"{pointer}/{key}").items()}


def read_number(written):
    """The number that a person reads, with its relative precision."""
    digits, _, unit = written.partition(" ")
    scale = {"": 1, "%": 0.01, "×": 1, "FLOP": 1, "B": 1, "s": 1}.get(unit)
    if scale is None:
        scale = {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit[0]]
    return float(digits.replace(",", "")) * scale


@pytest.mark.slow
def test_every_number_on_the_page_is_that_of_the_report(opened):
    driver = opened(full_page())
    shown = {}
    for place, exact, written in driver.execute_script(LOOK):
        value = json.loads(exact)
        assert value == at(REPORT, place), place
        if isinstance(value, bool):
            assert written == ("yes" if value else "no")
        else:
            assert read_number(written) == pytest.approx(value, rel=0.005), place
            assert not isinstance(value, int) or value > 9999 or read_number(written) == value
        shown[place] = written
    assert shown["/nnz/value"] == "24,517,608"
    assert shown["/density"] == "12.2 %"
    assert shown["/flops/forward"] == "6.277 GFLOP"
    numbers = {place for place, leaf in leaves(REPORT).items() if isinstance(leaf, int | float)}
    not_told = re.compile(
        "/(batch|block_size|causal|not_causal_at|shards/./keys/[02]|reach/(length|settled_after)"
        "|reach/per_layer/./(worst_at|pairs)|kv_cache/(per_head|union|causal|bounded)|graph/(causal|diameter))"
    )
    assert {place for place in numbers - shown.keys() if not not_told.match(place)} == set()


@pytest.mark.slow
def test_the_page_of_a_file_says_what_analyze_says(chromium, tmp_path):
    file, page = "examples/longformer.attn", tmp_path / "page.html"
    sizes = "--length 640 --heads 2 --layers 3 --set w=64".split()
    command = [sys.executable, "-m", "attndsl", "report", file, *sizes, "-o", str(page)]
    subprocess.run(command, check=True)
    chromium.get(page.as_uri())
    attention = attndsl.load(file)["longformer"](w=64)
    report = attndsl.analyze(attention, length=640, heads=2, layers=3).to_dict()
    shown = chromium.execute_script(LOOK)
    assert len(shown) > 60
    for place, exact, _ in shown:
        assert json.loads(exact) == at(report, place), place
    formula = chromium.find_element("css selector", "[data-field='/nnz/formula']")
    assert sympy.expand(read_formula(formula) - sympy.sympify(report["nnz"]["formula"])) == 0
    assert text(chromium.find_element("tag name", "h1")) == "longformer(w = 64)"
    assert text(chromium.find_element("tag name", "pre")) == Path(file).read_text(encoding="utf-8")
    assert len(chromium.find_elements("tag name", "img")) == 4


def read_formula(element):
    """The formula that stands in a <math> element, as an expression."""

    def read(node):
        inner = [read(child) for child in node]
        match node.tag.rpartition("}")[2]:
            case "mfrac":
                return f"(({inner[0]})/({inner[1]}))"
            case "msup":
                return f"({inner[0]})**({inner[1]})"
            case "mn":
                return node.text.replace(",", "")
        said = (node.text or "") + "".join(inner)
        return said.replace("−", "-").replace("\u2062", "*")

    (math,) = element.find_elements("tag name", "math")
    return sympy.sympify(read(ElementTree.fromstring(math.get_property("outerHTML"))))


@pytest.mark.slow
def test_the_formulas_on_the_page_are_those_of_the_report(opened):
    driver = opened(full_page())
    for place in ("/nnz/formula", "/in_parameters/r/formula", "/kv_cache/formula", "/reach/formula"):
        element = driver.find_element("css selector", f"[data-field='{place}']")
        assert (
            sympy.expand(read_formula(element) - sympy.sympify(at(REPORT, place).partition(" for ")[0])) == 0
        )
    grows = text(driver.find_element("css selector", "[data-field='/complexity']"))
    assert re.sub(r"\W", "", grows) in ("Onn", "Onsqrtn")
    assert "6180*n - 795672" in [text(code) for code in driver.find_elements("tag name", "code")]


@pytest.mark.slow
def test_a_tile_under_the_mouse_tells_its_queries_keys_and_live_pairs(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    driver = opened(full_page())
    dense = attndsl.parse("pattern p = radius(256) | global([0])")["p"].mask(4096)[0]
    svg = driver.find_element("css selector", ".mask svg")
    tip = driver.find_element("css selector", ".mask .tip")
    assert not tip.is_displayed()
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    width, height = svg.size["width"], svg.size["height"]
    for row, column in ((0, 0), (1, 0), (9, 11), (9, 12), (31, 31), (31, 2)):
        across, down = ((column + 0.5) / 32 - 0.5) * width, ((row + 0.5) / 32 - 0.5) * height
        ActionChains(driver, duration=0).move_to_element_with_offset(svg, int(across), int(down)).perform()
        q, k = 128 * row, 128 * column
        live = dense[q : q + 128, k : k + 128].sum()
        assert (
            text(tip) == f"queries {q:,}–{q + 127:,}, keys {k:,}–{k + 127:,}:\n{live:,} of 16,384 pairs live"
        )
        assert tip.is_displayed()
        box, frame = tip.rect, svg.rect
        assert box["x"] >= frame["x"] - 1
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
    ActionChains(driver, duration=0).move_to_element(driver.find_element("tag name", "h1")).perform()
    assert not tip.is_displayed()


@pytest.mark.slow
def test_the_arrow_keys_and_a_finger_reach_the_tiles_too(opened):
    from selenium.webdriver.common.keys import Keys

    driver = opened(full_page(), PHONE)
    svg = driver.find_element("css selector", ".mask svg")
    tip = driver.find_element("css selector", ".mask .tip")
    svg.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ARROW_UP)
    assert text(tip).startswith("queries 0–127, keys 256–383:")
    svg.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", svg)
    seen_from = driver.execute_script("return visualViewport.offsetTop")
    point = {"x": box["x"] + 5.5 / 32 * box["width"], "y": box["y"] + 6.5 / 32 * box["height"] - seen_from}
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    assert text(tip) == "queries 768–895, keys 640–767:\n16,384 of 16,384 pairs live"


@pytest.mark.slow
def test_the_page_asks_for_nothing_and_runs_no_text_of_a_user(opened):
    driver = opened(full_page())
    for kind in ("performance", "browser"):
        driver.get_log(kind)
    driver.refresh()
    asked = [
        message["params"]["request"]["url"]
        for message in (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [driver.current_url]
    assert driver.get_log("browser") == []
    assert driver.title == f"longformer {EVIL} · attndsl"
    assert text(driver.find_element("css selector", "pre")) == EVIL
    assert text(driver.find_element("css selector", "h1")) == f"longformer {EVIL}"
    assert driver.find_element("css selector", "figure img").get_attribute("alt") == f"cost {EVIL}"
    loaded = "return [...document.images].map(image => image.naturalWidth > 0)"
    assert driver.execute_script(loaded) == 4 * [True]


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_the_page_fits_the_screen(opened, width):
    driver = opened(full_page(), width)
    look = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    needed, there = driver.execute_script(look)
    assert needed <= there <= width


def contrast(*colours):
    """As WCAG 2.2 defines it, of two colours `rgb(r, g, b)`."""
    light = []
    for colour in colours:
        channels = np.array([float(x) for x in re.findall(r"[\d.]+", colour)[:3]]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        light.append(linear @ (0.2126, 0.7152, 0.0722))
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.slow
def test_screens_may_be_light_or_dark_and_paper_is_light(opened):
    def colours(selector, **settings):
        driver = opened(full_page(), **settings)
        look = "const s = getComputedStyle(document.querySelector(arguments[0]))"
        return driver.execute_script(f"{look}; return [s.backgroundColor, s.color]", selector)

    light, dark = colours("html", scheme="light"), colours("html", scheme="dark")
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] != light[0]
    assert colours("html", scheme="dark", media="print") == light
    shown = "return [...document.images].filter(image => image.offsetWidth > 0).map(image => image.className)"
    for settings in ({"scheme": "light"}, {"scheme": "dark"}, {"scheme": "dark", "media": "print"}):
        which = "on-dark" if settings == {"scheme": "dark"} else "on-light"
        assert opened(full_page(), **settings).execute_script(shown) == [which, which]
    for scheme, (paper, ink) in (("light", light), ("dark", dark)):
        assert contrast(paper, ink) > 7
        assert contrast(paper, colours("header p", scheme=scheme)[1]) > 4.5
        assert contrast(*colours(".mark", scheme=scheme)) > 4.5


@pytest.mark.slow
def test_paper_shows_no_hints_for_a_mouse(opened):
    driver = opened(full_page(), media="print")
    assert not driver.find_element("css selector", ".screen").is_displayed()
    assert driver.execute_cdp_cmd("Page.printToPDF", {})["data"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "length", "sizes", "first", "said"),
    [
        ("causal", 3, {}, 0, "query 0, key 0:\nlive"),
        ("causal", 4096, {"q_length": 1}, 4095, "query 4,095, keys 0–127:\n128 of 128 pairs live"),
        ("causal", 2**20, {"block_size": 2048}, 0, "queries 0–16,383, keys 0–16,383:\n"
         "134,225,920 of 268,435,456 pairs live"),
        ("full - full", 100, {}, 0, "queries 0–1, keys 0–1:\n0 of 4 pairs live"),
    ],
)  # fmt: skip
def test_masks_of_any_size(opened, mask, length, sizes, first, said):
    from selenium.webdriver.common.keys import Keys

    report = {
        "name": "a",
        "length": length,
        "q_length": sizes.get("q_length", length),
        "nnz": {"value": None},
    }
    driver = opened(render(report, masks=drawn(f"mask {mask}", length, first=first, **sizes)))
    driver.find_element("css selector", ".mask svg").send_keys(Keys.ARROW_LEFT)
    assert text(driver.find_element("css selector", ".mask .tip")) == said
    assert driver.get_log("browser") == []


@pytest.mark.parametrize(
    ("text", "length", "block_size", "sizes"),
    [
        ("mask radius(9) | global([0])", 200, 64, {}),
        ("mask causal & random(3, seed = 1)", 300, 16, {}),
        ("mask causal", 250, 32, {"q_length": 17}),
        ("heads 0 { mask causal } else { mask full }", 130, 24, {"heads": 3}),
    ],
)
def test_cells_hold_the_pairs_of_their_rectangles(text, length, block_size, sizes):
    attention = attndsl.parse(f"attention a {{ {text} }}")["a"]
    found = masks(attention.block_mask(length, block_size, **sizes))
    dense = attention.mask(length, **sizes)
    assert [mask.label for mask in found] in (["every head"], ["head 0", "heads 1..2"])
    for mask, wanted in zip(found, dense[[0, -1]], strict=False):
        down, across = np.arange(0, mask.nq, mask.queries), np.arange(0, mask.n, mask.keys)
        for cells, pairs in ((mask.live, wanted), (mask.pairs, np.ones_like(wanted))):
            sums = np.add.reduceat(np.add.reduceat(pairs.astype(int), down, axis=0), across, axis=1)
            assert (cells == sums).all()


@pytest.mark.parametrize("count", SIDES)
def test_the_worst_masks_make_a_small_page(count):
    side = SIDES[count]
    live = np.random.default_rng(0).integers(0, 128**2 + 1, (side, side))
    panels = [Mask(f"head {h}", 0, 128 * side, 128 * side, 128, 128, 128, live) for h in range(count)]
    report = {"name": "a", "length": 128 * side, "q_length": 128 * side, "nnz": {"value": None}}
    assert len(render(report, masks=panels)) < 200_000


@pytest.mark.parametrize(
    ("formula", "read"),
    [
        ("513*n - 65792", "513 n − 65,792"),
        ("Mod(n, 4) + 1", "( n mod 4 ) + 1"),
        ("n*Mod(n, 4)", "n ( n mod 4 )"),
        ("floor(n/128)", "⌊ n 128 ⌋"),
        ("Piecewise((n, Mod(n, 4) < 2), (5, True))", "{ n if ( n mod 4 ) < 2 5 otherwise"),
        ("O(n^2)", "O ( n 2 )"),
    ],
)
def test_formulas_are_typeset(formula, read):
    import html

    said = html.unescape(re.sub(r"<[^>]*>", " ", mathml(formula))).replace("\u2062", " ")
    assert " ".join(said.split()) == read


def test_a_report_of_which_nothing_is_known_is_a_page():
    empty = dict.fromkeys(REPORT) | {"name": "a", "length": 8, "q_length": 8, "reasons": {"nnz": "why not"}}
    page = render(empty)
    assert "why not" in page
    assert "None" not in page
