"""What a reader sees in a REPL, a notebook and an editor."""

import functools
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import user
from torch import nn

import attndsl
from attndsl.errors import AttnError
from attndsl.pictures.style import DARK, LIGHT

ROOT = Path(__file__).parent.parent
TEXT = """
let g = learn[H](0.3)
score scaled(g) = g * s
attention lm(w = 4) { mask causal & last(w) }
attention best { mask topk(2, of = causal) }
attention learns { inputs doc : int[n]  mask causal & documents(doc)  score scaled(g) }
attention both = lm + g * best
attention long(w) { mask last(w) }
pattern wide(b = 2) = radius(b)
assert lm <= causal
assert causal <= lm
"""


@pytest.fixture(scope="module")
def program():
    return attndsl.parse(TEXT, "some.attn")


def test_the_package_lists_what_it_has():
    assert re.fullmatch(r"\d+\.\d+\.\d+", attndsl.__version__)
    assert {"compile", "spans", "__version__", "Session"} <= {*dir(attndsl)}
    assert all(getattr(attndsl, name) is not None for name in dir(attndsl))
    with pytest.raises(AttributeError, match=r"no attribute `complie`: did you mean `compile`\?"):
        attndsl.complie  # noqa: B018


def test_an_attribute_that_a_program_does_not_have_says_what_to_write(program):
    with pytest.raises(AttributeError, match=re.escape('write `program["lm"]`')):
        program.lm  # noqa: B018
    assert not hasattr(program, "nothing")
    assert pickle.loads(pickle.dumps(attndsl.examples.longformer["longformer"]))


@pytest.mark.parametrize(
    ("made", "name", "said"),
    [
        (lambda p: attndsl, "loads", "`attndsl.parse`"),
        (lambda p: p, "keys", "`program.names`"),
        (lambda p: p["lm"], "compile", "`attndsl.compile(attention, length=...)`"),
        (lambda p: p["lm"], "w", '`attention.parameters["w"]`'),
        (lambda p: compiled(p, "lm"), "parameters", "`plan.module()`"),
        (lambda p: compiled(p, "both"), "to", '`compile(..., device="cuda")`'),
        (lambda p: compiled(p, "both"), "lm", '`plan.parts["lm"]`'),
        (lambda p: p["lm"], "score_mod", "`attention.to_flex(length)`"),
        (lambda p: compiled(p, "lm"), "heads", "`plan.problem.heads`"),
        (lambda p: compiled(p, "lm"), "sesion", "`session`"),
        (lambda p: compiled(p, "lm").session(1, 8), "reset", "`session.truncate(0)`"),
        (lambda p: compiled(p, "both").session(1, 8), "append", "`session.step(q, k, v)`"),
        (lambda p: compiled(p, "lm"), "save", "`torch.save(plan.module().state_dict(), path)`"),
        (lambda p: p["lm"], "state_dict", "`attndsl.compile(attention, length=...).module()`"),
        (lambda p: analyzed(p), "flop", "`report.flops.forward`"),
        (lambda p: analyzed(p), "densty", "`density`"),
        (lambda p: p["lm"].block_mask(64), "numpy", "`block_mask.to_dense()`"),
    ],
)
def test_an_attribute_of_another_library_says_what_to_write(program, made, name, said):
    with pytest.raises(AttributeError, match=f"no attribute `{name}`: .*{re.escape(said)}"):
        getattr(made(program), name)


def test_names_of_attentions_are_completed(program):
    keys = program._ipython_key_completions_()
    assert keys == ["lm", "best", "learns", "both", "long", "wide"]
    assert all(program[name] for name in keys)


def test_a_report_is_no_dictionary(program):
    with pytest.raises(TypeError, match=re.escape("write `report.nnz`, or `report.to_dict()`")):
        analyzed(program)["nnz"]


def analyzed(program):
    return attndsl.analyze(program["lm"], length=64, parts=["nnz"])


def compiled(program, name, **sizes):
    return attndsl.compile(program[name], length=64, heads=2, head_dim=8, **sizes)


SHOWN = {
    "program": ("<program some.attn: lm, best, learns, both, long, wide>", lambda p: p),
    "bound": ("<attention lm(w = 9)>", lambda p: p["lm"](w=9)),
    "pattern": ("<attention wide(b = 2)>", lambda p: p["wide"]),
    "list": ("<attention wide(b = [1, 2, 3, 4, 5, 6, ...])>", lambda p: attndsl.parse(
        "pattern wide(b = [0]) = { q, k : k in b }")["wide"](list(range(1, 99)))),
    "attention": ("<attention lm>", lambda p: p["lm"].attention),
    "chosen": ("<attention best: chosen by topk>", lambda p: p["best"]),
    "tables": (
        "<attention learns: score; inputs doc : int[n]; learned g : float[H]>", lambda p: p["learns"]
    ),
    "sum": ("<attention both: sum of lm, best; chosen by topk; learned g : float[H]>", lambda p: p["both"]),
    "unbound": ("<long needs parameters: long(w)>", lambda p: p["long"]),
    "plan": (
        "<plan lm: reference, length 64, heads 2, head_dim 8, float32 on cpu>",
        lambda p: compiled(p, "lm", backend="reference"),
    ),
    "sizes": (
        "<plan lm: reference, length 64, q_length 16, batch 3, heads 2, kv_heads 1, head_dim 8, "
        "float64 on cpu, training>",
        lambda p: compiled(p, "lm", q_length=16, batch=3, kv_heads=1, dtype="float64", training=True,
                           backend="reference"),
    ),
    "plan of a sum": (
        "<plan both: lm: reference, best: reference; length 64, heads 2, head_dim 8, float32 on cpu>",
        lambda p: compiled(p, "both", backend="reference"),
    ),
    "session": (
        "<session of lm: 2 rows of 0, 0 tokens, the last 4 kept, float32 on cpu>",
        lambda p: compiled(p, "lm").session(2, 32),
    ),
    "session of a sum": (
        "<session of both: <session of lm: 1 row of 0 tokens, the last 4 kept, float32 on cpu>, "
        "<session of best: 1 row of 0 tokens, capacity 32, float32 on cpu>>",
        lambda p: compiled(p, "both").session(1, 32),
    ),
    "state": (
        "<session of a: 1 row of 0 tokens, a state in place of keys, float32 on cpu>",
        lambda p: attndsl.compile(
            attndsl.parse("attention a { mask causal  norm linear  score elu1(Q) @ elu1(K) }")["a"],
            length=256, backend="linear",
        ).session(1, 32),
    ),
    "report": (
        "<report lm: queries x keys = 64 x 64; nnz, rows>",
        lambda p: attndsl.analyze(p["lm"], length=64, parts=["nnz", "rows"]),
    ),
    "assertion": ("<assert causal <= lm>", lambda p: p.assertions[1]),
    "proved": ("<proved>", lambda p: attndsl.prove(p.assertions[0])),
    "refuted": ("<refuted (n = 5, q = 4, k = 0)>", lambda p: attndsl.prove(p.assertions[1])),
    "block mask": (
        "<block mask 64 x 64, density 6.1 %; tiles of 16: 0 full, 7 partial (2 distinct), 9 empty; "
        "164 bytes>",
        lambda p: p["lm"].block_mask(64, 16),
    ),
    "tile grid": (
        "<tile grid 64 x 64; tiles of 16: 0 full, 7 partial (2 distinct)>",
        lambda p: p["lm"].block_mask(64, 16).grids[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("said", "made"), SHOWN.values(), ids=SHOWN)
def test_a_value_is_shown_on_one_line(program, said, made):
    assert repr(made(program)) == said


def squares(html):
    """The level of each cell of the pictures in an output, by the outlines."""
    for columns, rows, drawn in re.findall(r'<svg viewBox="0 0 (\d+) (\d+)".*?>(.*?)</svg>', html):
        found = np.zeros((int(rows), int(columns)), int)
        for level, d in re.findall(r'<path class="l(\d)" .*? d="(.*?)"', drawn):
            inside = np.zeros_like(found)
            for x, y, sides in re.findall(r"M(\d+) (\d+)(.*?)z", d):
                at, steps = [int(x), int(y)], re.findall(r"([hv])(-?\d+)", sides)
                down = sum(int(step) for side, step in steps if side == "v")
                for side, step in [*steps, ("v", -down)]:
                    at[side == "v"] += int(step)
                    if side == "v":
                        low, high = sorted((at[1], at[1] - int(step)))
                        inside[low:high, : at[0]] += 1 if int(step) > 0 else -1
            found[inside == 1] = int(level)
        yield found


@pytest.mark.parametrize("name", ["lm", "wide"])
def test_a_notebook_draws_the_mask(program, name):
    bound = program[name]
    (drawn,) = squares(bound._repr_html_())
    assert (drawn == 5 * bound.mask(64)[0]).all()
    for other in (attndsl.compile(bound, length=64), attndsl.analyze(bound, length=64, parts=["nnz"])):
        (again,) = squares(other._repr_html_())
        assert (again == drawn).all()
        assert str(other).splitlines()[1] in other._repr_html_()
        # JupyterLab gives a <pre> the letters of its own text
        assert "monospace!important" in other._repr_html_()


def test_a_notebook_draws_a_program(program):
    html = program._repr_html_()
    assert len([*squares(html)]) == 4
    assert "needs its input `doc`" in html
    assert "long needs parameters" in html
    assert "one drawn choice" in html
    assert "<img" not in attndsl.parse("pattern a = causal", "<img src=x>")._repr_html_()


def test_a_picture_ends_where_the_mask_does():
    (drawn,) = squares(attndsl.parse("pattern a = { q, k : q < 96 and k < 96 }")["a"]._repr_html_())
    assert drawn[-1].any()


def test_a_notebook_tells_light_from_dark(program):
    html = program["lm"]._repr_html_()
    for page, theme in (('[data-jp-theme-light="true"]', LIGHT), ('[data-jp-theme-light="false"]', DARK)):
        (rule,) = re.findall(rf"{re.escape(page)} .attndsl[^{{]*{{(.*?)}}", html)
        assert f"--attndsl-0:{theme.levels[0]}" in rule


def test_a_copy_of_a_report_is_as_good(program):
    report = attndsl.analyze(program["lm"], length=64, parts=["nnz"])
    again = pickle.loads(pickle.dumps(report))
    assert again == report
    assert "<svg" not in again._repr_html_()
    assert "live pairs" in again._repr_html_()


def test_a_report_says_what_it_assumes(program):
    wide = str(attndsl.analyze(program["wide"], length=64, parts=["kv_cache", "block_sizes", "cost"]))
    told = " ".join(wide.split())
    assert "what would be kept if no query read a key after it" in told
    assert "recommended 64: fewest pairs, where starting a tile costs as much as 4,096 of them" in told
    assert "the last query alone" in told
    assert all(len(line) <= 80 for line in wide.splitlines())
    assert "would be kept" not in str(attndsl.analyze(program["lm"], length=64, parts=["kv_cache"]))


def test_ipython_shows_the_own_way_of_the_reader_and_carets_under_the_mistake():
    def mine():
        attndsl.parse("pattern a = causal & lst(3)")

    with pytest.raises(AttnError) as caught:
        mine()
    lines = caught.value._render_traceback_()
    assert not any("attndsl/program.py" in line for line in lines)
    assert any(line.endswith("in mine") for line in lines)
    text = next(line for line in lines if line.startswith("1 |"))
    carets = lines[lines.index(text) + 1]
    assert text[carets.index("^") : carets.rindex("^") + 1] == "lst"


def test_a_long_program_is_shown_short():
    many = attndsl.parse("\n".join(f"pattern p{i} = causal" for i in range(100)))
    assert len(repr(many)) < 200


def test_a_module_says_what_it_computes_and_owns(program):
    model = nn.ModuleDict(
        {"a": compiled(program, "learns").module(), "b": compiled(program, "both").module()}
    )
    assert "(a): PlanModule(learns, " in str(model)
    assert "length 64, heads 2, head_dim 8, float32 on cpu, g=[2])" in str(model)
    assert "both, lm: " in str(model)


def test_what_needs_parameters_says_so_whatever_is_asked(program):
    with pytest.raises(AttnError, match=r"`long` needs parameters\n  help: call it with them: `long\(w\)`"):
        program["long"].block_mask(64)
    with pytest.raises(AttributeError, match="no attribute `nothing`"):
        program["long"].nothing  # noqa: B018


def test_the_program_of_a_user_runs():
    assert "['proved']" in user.main()


@pytest.mark.slow
def test_the_program_of_a_user_is_typed():
    command = [sys.executable, "-m", "mypy", "--strict", "tests/user.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Success: no issues found in 1 source file\n")


def reachable():
    """All that a user calls or reads: of the package, of the classes of what its functions give, and of what
    plugins are written against."""
    from attndsl import backend, conformance, selection
    from attndsl.bound import Unbound
    from attndsl.execution.statesession import StateSession
    from attndsl.execution.sums import SumModule, SumSession
    from attndsl.tiles.blockmask import Rows, TileGrid

    classes = [Unbound, StateSession, SumModule, SumSession, Rows, TileGrid]
    for name in attndsl.__all__:
        value = getattr(attndsl, name)
        if isinstance(value, type):
            classes.append(value)
        else:
            yield name, value
    for module in (backend, selection):
        own = [
            value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
        ]
        classes += [value for value in own if isinstance(value, type)]
    yield from ((name, getattr(conformance, name)) for name in ("check", "supported", "declined"))
    yield from (("spans.penalty", attndsl.spans.penalty), ("spans.clamp", attndsl.spans.clamp))
    for cls in classes:
        yield cls.__name__, cls
        for owner in cls.__mro__:
            if not owner.__module__.startswith("attndsl"):
                continue
            for name, value in vars(owner).items():
                if not name.startswith("_") or name in ("__call__", "__getitem__"):
                    yield f"{cls.__name__}.{name}", getattr(value, "__func__", value)


DOCUMENTED = dict(reachable())


@pytest.mark.parametrize("value", DOCUMENTED.values(), ids=DOCUMENTED)
def test_help_explains_every_argument(value):
    if isinstance(value, functools.cached_property):
        value = value.func
    if not (callable(value) or isinstance(value, property)):
        return
    said = value.__doc__ or ""
    assert said.strip()
    if inspect.isfunction(value):
        named = [
            p.name for p in inspect.signature(value).parameters.values() if p.kind not in (p.VAR_POSITIONAL,)
        ]
        missing = [name for name in named if name != "self" and not re.search(rf"\b{name}\b", said)]
        assert not missing


def test_a_choice_is_drawn_without_tables_that_it_does_not_read():
    text = "attention a { inputs bias : float[n]  mask topk(2, of = causal)  score s + bias[k] }"
    bound = attndsl.parse(text)["a"]
    assert "<svg" in bound._repr_html_()
    assert attndsl.analyze(bound, length=64, parts=["block_sizes"]).best_block_size == 64
