"""The command line as a user meets it: output, exit codes, and where each goes."""

import contextlib
import json
import multiprocessing
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import attndsl
from attndsl.analysis import block_sizes
from attndsl.command import check, child, run, trial
from attndsl.command.cli import COMMANDS, main
from attndsl.errors import AttnError, fail
from attndsl.tiles import tiling

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GOOD = """pattern near(w = 3) = causal & last(w)
pattern far = causal
attention lm(w = 4) { mask near(w) }
attention packed { inputs doc : int[n]  mask causal & documents(doc) }
"""


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.attn", GOOD)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def attn(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "pytest", "attndsl.command.cli"])


def answer(sender, arguments):
    done = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    sender.send((done.exit_code, done.stdout, done.stderr))


def attn_process(*arguments):
    """In a process of its own that has torch loaded, but not run: its threads and forks do not mix."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=answer, args=(sender, arguments))
    process.start()
    sender.close()
    code, stdout, stderr = receiver.recv()
    process.join()
    return subprocess.CompletedProcess(arguments, code, stdout, stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "FILE", "--length", "8"], 1, "give the name of one"),
        (["show", "FILE", "lm2", "--length", "8"], 1, "did you mean `lm`?"),
        (["show", "FILE", "lm", "--length", "8", "--set", "v=1"], 1, "no parameter `v`"),
        (["show", "FILE", "lm", "--length", "8", "--set", "w=1 +"], 1, "error: "),
        (["show", "FILE", "packed", "--length", "8"], 1, "needs its input `doc`"),
        (["show", "FILE", "packed", "--length", "8", "--input", "doc=FILE"], 1, "is no .npy file"),
        (
            ["show", "FILE", "packed", "--length", "8", "--input", "doc=no.npy"],
            1,
            "read `no.npy`: no such file",
        ),
        (["show", "FILE", "lm"], 2, "--length"),
        (["show", "FILE", "lm", "--length", "0"], 2, "--length"),
        (["show", "FILE", "lm", "--length", "64k"], 2, "`--length` takes a whole number, such as 65536"),
        (
            ["show", "FILE", "lm", "--length", "8", "--heads", "2", "--head", "2"],
            1,
            "no head 2 among 2 heads",
        ),
        (["show", "FILE", "lm", "--length", "8", "--set", "w"], 2, "name=value"),
        (["show", "nowhere.attn", "--length", "8"], 1, "read `nowhere.attn`: no such file"),
        (["show", "FILE", "lm", "--length", "8", "--block-size", "12"], 1, "multiple of 8"),
        (["undo", "FILE"], 2, "no command is named `undo`"),
        (["show", "FILE", "lm", "--length", "8", "-o", "/nowhere/x"], 1, "cannot write `/nowhere/x`"),
        (["fmt", __file__ + "c"], 1, "no such file"),
        (["diff", "FILE:lm", "FILE:nothing"], 1, "defines no `nothing`"),
        (["check", "FILE", "--time-limit", "0"], 2, "--time-limit"),
        (["show", "longformer", "--length", "8"], 1, "help: an example is `example:longformer`"),
        (["check", "FILE:lm"], 2, "takes whole files, and no name in them: write `check FILE`"),
        (["fmt", "FILE", "lm"], 2, "takes whole files, and no name in them: write `fmt FILE`"),
        (["diff", "FILE", "lm", "far"], 2, "write `diff FILE:lm FILE:far`"),
        (["diff", "FILE"], 2, "write `diff FILE:NAME FILE:NAME`"),
        (["show", "FILE", "lm", "--seq-len", "8"], 2, "no option `--seq-len`: write `--length`"),
        (["show", "FILE", "lm", "-n", "8"], 2, "no option `-n`: write `--length`"),
        (["show", "FILE", "lm", "--w", "4"], 2, "a parameter is given by `--set w=4`"),
        (["show", "FILE", "lm", "--w=4"], 2, "a parameter is given by `--set w=4`"),
        (["show", "FILE", "lm", "w=8", "--length", "8"], 2, "write `--set w=8`"),
        (["compile", "FILE", "lm", "--num-heads", "4"], 2, "write `--heads`"),
        (["compile", "FILE", "lm", "--block", "8"], 2, "write `--block-size`"),
        (["compile", "FILE", "lm", "--dtype", "fp16"], 2, "`fp16` is no dtype: write `float16`"),
        (["analyze", "FILE", "lm", "--format", "json"], 2, "write `--json`"),
        (["compile", "FILE", "lm", "--gpu"], 2, "write `--device cuda`"),
        (["compile", "FILE", "lm", "--causal"], 2, "write it into the text: `mask causal`"),
        (["compare", "FILE:lm", "--length", "8", "--sweep", "w=4:16"], 1, "write each: `--sweep w=4,16`"),
        (["plot", "FILE", "lm"], 2, "no command is named `plot`: write `show`"),
        (["show", "FILE", "lm", "--length", "1k"], 2, "`--length` takes a whole number, such as 1024"),
        (
            ["analyze", "FILE", "lm", "--length", "8", "-o", "x"],
            2,
            "no option `-o`: what it says goes to stdout",
        ),
        (["report", "FILE", "lm", "--out", "x"], 2, "did you mean `--output`?"),
        (["report", "FILE", "lm", "-o", "x.pdf"], 1, "no page ends in .pdf"),
        (
            ["compare", "FILE", "lm", "far", "--length", "8"],
            2,
            "write `compare FILE:lm FILE:far`, or `diff FILE:lm FILE:far`",
        ),
        (
            ["compare", "FILE:lm", "far", "near", "--length", "8"],
            2,
            "write `compare FILE:lm FILE:far FILE:near`\n",
        ),
        (["show", "FILE", "lm", "--set", "w=8,c=4"], 2, "gives two: write `--set w=8 --set c=4`"),
        (["show", "FILE", "lm", "--set", "w=8 c=4"], 2, "gives two: write `--set w=8 --set c=4`"),
        (["show", "FILE:lm", "--length", "8", "w=8"], 2, "write `--set w=8`"),
        (["show", "FILE:lm", "lm", "--length", "8"], 1, "one name is enough"),
        (["show", "FILE:lm(8)", "--length", "8"], 1, "give them by `--set w=8`"),
        (["show", "FILE:packed", "--length", "8", "--set", "doc=a.npy"], 1, "`--input doc=FILE.npy`"),
        (["show", "FILE:lm", "--length", "8", "--input", "w=8"], 1, "a parameter is given by `--set w=8`"),
        (["show", "FILE:packed", "--length", "8", "--input", "doc.npy"], 2, "write `--input doc=...`"),
        (["show", "FILE:packed", "--length", "8", "--doc", "a.npy"], 2, "given by `--input doc=a.npy`"),
        (["show", "FILE:lm", "--head-dim", "64"], 2, "`show` takes none; there is `compile --head-dim`"),
        (["diff", "FILE:lm", "FILE:lm(8)"], 1, "name it in the file: `attention wide = lm(w = 8)`"),
        (["diff", "FILE:lm", "FILE:lm", "--set", "w=8"], 2, "`attention wide = lm(w = 8)`"),
        (["check", "FILE", "--set", "w=8"], 2, "a claim gives it: `assert lm(w = 8) <= causal`"),
        (["show", "causal & last(8)", "--length", "8"], 1, "`echo 'pattern p = causal & last(8)' | attn"),
        (["show", "causal", "--length", "8"], 1, "a name stands behind its file: `FILE.attn:causal`"),
        (["run", "FILE:lm", "--training"], 2, "write `--backward`"),
        (["compile", "FILE:lm", "--training"], 2, "`compile` takes none; there is `run --backward`"),
        (["compare", "FILE:lm", "--length", "8", "--sweep", "heads=4,8"], 1, "one for all: `--heads ...`"),
        (["compare", "FILE:lm", "--length", "8", "--sweep", "length=4,8"], 1, "`--sweep n=1024,4096`"),
        (["analyze", "FILE:lm", "--length", "8", "--in", "n"], 1, "a formula in n is told anyhow"),
        (["analyze", "FILE:lm", "--length", "8", "--in", "w,v"], 1, "`--in w --in v`"),
        (["analyze", "FILE:lm", "--length", "8", "--only", "flops"], 1, "it is in the part `cost`"),
        (["analyze", "FILE:lm", "--length", "8", "--only", "reach", "nnz"], 1, "commas: `--only reach,nnz`"),
        (["analyze", "FILE", "--length", "8", "--only", "reach", "nnz"], 1, "commas: `--only reach,nnz`"),
        (["analyze", "FILE", "--length", "8", "--only", "nnz,", "reach"], 1, "commas: `--only nnz,reach`"),
        (["run", "FILE:lm", "--head", "4"], 2, "no option `--head`: write `--heads 4`"),
        (
            ["compare", "FILE:lm", "--sweep", "n=64", "128"],
            2,
            "joined by commas, as in `--sweep n=1024,4096`",
        ),
        (["compare", "FILE:lm", "--set", "w=4", "w=8", "--length", "8"], 2, "as in `--sweep w=8,...`"),
        (["check", "examples:longformer"], 1, "help: an example is `example:longformer`"),
        (["show", "examples:longformer", "--length", "8"], 1, "help: an example is `example:longformer`"),
    ],
)
def test_a_mistake_is_said_on_stderr_without_a_traceback(good, arguments, code, said):
    done = attn(*(argument.replace("FILE", good) for argument in arguments))
    assert done.exit_code == code
    assert said.replace("FILE", good if good in done.stderr else "FILE") in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert isinstance(done.exception, SystemExit)


def test_check_reports_every_file_and_fails_on_one(good, tmp_path):
    bad = write(tmp_path / "bad.attn", "pattern p = causl\npattern q = 1 +\n")
    done = attn("check", good, bad)
    assert done.exit_code == 1
    assert f"{good}: fine" in done.stdout
    assert f"{bad}:1:13" in done.stderr
    assert f"{bad}:2" in done.stderr


def test_check_says_in_json_where_and_what(tmp_path):
    bad = write(tmp_path / "bad.attn", "pattern p = causl\n")
    done = attn("check", bad, tmp_path / "none.attn", "--json")
    assert (done.exit_code, done.stderr) == (1, "")
    first, second = (report["errors"] for report in json.loads(done.stdout)["files"])
    assert first == [
        {
            "file": bad,
            "line": 1,
            "column": 13,
            "severity": "error",
            "message": "unknown name `causl`",
            "help": "did you mean `causal`?",
        }
    ]
    assert [(error["line"], error["column"]) for error in second] == [(None, None)]
    warned = write(tmp_path / "warned.attn", "attention a { mask causal & ~causal }\n")
    done = attn("check", warned, "--json")
    (report,) = json.loads(done.stdout)["files"]
    assert (done.exit_code, done.stderr, report["errors"], report["fine"]) == (0, "", [], True)
    assert [(found["severity"], found["line"]) for found in report["warnings"]][:1] == [("warning", 1)]


def test_check_reads_stdin():
    done = CliRunner().invoke(main, ["check", "-"], input="pattern p = causal\nassert p <= full\n")
    assert (done.exit_code, done.stdout) == (0, "<stdin>:2: proved: p <= full\n")
    done = CliRunner().invoke(main, ["check", "-"], input="pattern p = causl\n")
    assert done.exit_code == 1
    assert "<stdin>:1:13" in done.stderr


def test_check_proves_and_refutes(tmp_path):
    text = GOOD + "assert lm <= causal\nassert causal <= lm\n"
    file = write(tmp_path / "claims.attn", text)
    done = attn("check", file)
    assert done.exit_code == 1
    first, second = done.stdout.splitlines()
    assert first == f"{file}:5: proved: lm <= causal"
    assert second.startswith(f"{file}:6: refuted: causal <= lm (n = 5, q = 4, k = 0")
    report = json.loads(attn("check", file, "--json").stdout)["files"][0]
    assert [found["status"] for found in report["assertions"]] == ["proved", "refuted"]
    assert report["assertions"][1]["counter_example"] == {"n": 5, "q": 4, "k": 0}
    assert not report["fine"]


@pytest.mark.parametrize(
    ("left", "right", "status", "pairs"),
    [
        ("near", "near", "equal", 0),
        ("near", "far", "subset", 1),
        ("far", "near", "superset", 1),
        ("lm", "T(far)", None, 2),
    ],
)
def test_diff_names_the_relation_and_a_pair_on_each_side(good, tmp_path, left, right, status, pairs):
    file = write(tmp_path / "two.attn", GOOD + f"pattern other = {right}\n")
    done = attn("diff", f"{file}:{left}", f"{file}:other", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["status"] == (status or "different")
    assert len(found["pairs"]) == pairs
    program = attndsl.load(file)
    said = attn("diff", f"{file}:{left}", f"{file}:other").stdout
    assert said.startswith(f"the mask{'s' if found['status'] in ('equal', 'different') else ''} of {file}:")
    for pair in found["pairs"]:
        masks = [program[name].mask(pair["n"])[0] for name in (left, "other")]
        mine = found["left"] == pair["only_in"]
        assert [mask[pair["q"], pair["k"]] for mask in masks] == [mine, not mine]


def test_diff_decides_at_one_length_what_is_undecided_for_all(tmp_path):
    file = write(
        tmp_path / "a.attn",
        "pattern a = random(4, of = causal)\n"
        "pattern b = a & { q, k : q * k != 1000000 }\n"
        "attention c { inputs doc : int[n]  mask causal & documents(doc) }\n"
        "pattern d = causal\n",
    )
    undecided = attn("diff", f"{file}:a", f"{file}:b")
    assert "help: at one length it is decided, such as `--length 256`" in undecided.stdout
    assert "are equal at n = 300" in attn("diff", f"{file}:a", f"{file}:b", "--length", 300).stdout
    np.save(tmp_path / "doc.npy", np.arange(300) // 299)
    tables = ("--input", f"doc={tmp_path / 'doc.npy'}")
    told = attn("diff", f"{file}:c", f"{file}:d", "--length", 300, *tables).stdout
    assert "is a subset of that of" in told
    assert "n = 300, q = 299, k = 0" in told
    assert attn("diff", f"{file}:c", f"{file}:d", *tables).exit_code == 2


def test_diff_says_nothing_of_scores(tmp_path):
    file = write(
        tmp_path / "two.attn", "attention a { mask causal }\nattention b { mask causal  score alibi }\n"
    )
    assert attn("diff", f"{file}:a", f"{file}:b").stdout == f"the masks of {file}:a and {file}:b are equal\n"


@pytest.mark.parametrize("command", ["show", "compile", "analyze", "compare", "report"])
def test_an_attention_is_named_after_a_colon_or_a_space(good, tmp_path, command):
    output = ["-o", tmp_path / "page.html"] if command == "report" else []
    colon, space = (
        attn(command, *target, "--length", 8, *output) for target in ([f"{good}:lm"], [good, "lm"])
    )
    assert colon.exit_code == 0, colon.output
    if command in ("show", "analyze"):
        assert colon.output == space.output
    wrong = attn(command, f"{good}:lm2", "--length", 8, *output)
    assert (wrong.exit_code, "did you mean `lm`?" in wrong.stderr) == (1, True)


def test_a_file_may_have_a_colon_in_its_name(tmp_path):
    file = write(tmp_path / "a:b.attn", "pattern p = causal")
    assert (
        attn("show", file, "--length", 8).exit_code == attn("show", f"{file}:p", "--length", 8).exit_code == 0
    )


def test_compare_sets_parameters_of_all(good):
    rows = json.loads(
        attn(
            "compare", f"{good}:lm", f"{good}:near", "--length", 8, "--set", "w=2", "--format", "json"
        ).stdout
    )["rows"]
    assert [row["nnz"] for row in rows] == [15, 15]
    both = attn("compare", f"{good}:lm", "--length", 8, "--set", "w=2", "--sweep", "w=1,2")
    assert (both.exit_code, "`w` is given by --set and by --sweep" in both.stderr) == (2, True)
    assert attn("compare", f"{good}:far", "--length", 8, "--set", "w=2").exit_code == 1


def test_a_number_that_leaves_no_pair_is_said(good):
    done = attn("show", f"{good}:lm", "--length", 8, "--set", "w=-4")
    assert (done.exit_code, done.stderr) == (
        0,
        "warning: `lm(w = -4)` relates no pair at any length: its output is 0\n",
    )
    swept = attn("compare", f"{good}:lm", "--length", 8, "--sweep", "w=0,1")
    assert (swept.exit_code, swept.stderr.count("`lm(w = 0)` relates no pair")) == (0, 1)


def test_heads_of_each_group_are_counted(tmp_path):
    file = write(tmp_path / "g.attn", "attention a { heads 0..H // 2 { mask causal } else { mask last(8) } }")
    shown = attn("show", file, "--length", 16, "--heads", 8)
    assert shown.stdout.endswith("heads 5 + 3, by group\n")
    planned = attn("compile", file, "--length", 16, "--heads", 8)
    assert "  heads     5 + 3, by group\n" in planned.stdout


def test_a_sweep_of_lists(tmp_path):
    file = write(tmp_path / "g.attn", "attention a(g = [0], w = 2) { mask columns(g) | last(w) }")
    done = attn(
        "compare", file, "--length", 16, "--sweep", "g=[0],[0, 8]", "--sweep", "w=1,2", "--format", "json"
    )
    rows = json.loads(done.stdout)["rows"]
    assert [(row["g"], row["w"]) for row in rows] == [
        ("[0]", "1"),
        ("[0]", "2"),
        ("[0, 8]", "1"),
        ("[0, 8]", "2"),
    ]
    assert [row["nnz"] for row in rows[::2]] == [16 + 15, 16 + 2 * 15]


def test_check_says_only_what_is_wrong_where_that_is_asked_for(good, tmp_path):
    claims = write(
        tmp_path / "c.attn", "pattern p = causal\nassert p <= causal\nassert every_row(p - last(1))\n"
    )
    loud, quiet = (attn("check", *options, good, claims) for options in ([], ["-q"]))
    assert (loud.exit_code, quiet.exit_code) == (1, 1)
    (refuted,) = quiet.stdout.splitlines()
    assert "refuted" in refuted
    assert refuted in loud.stdout.splitlines()
    fine = attn("check", "--quiet", good)
    assert (fine.exit_code, fine.output) == (0, "")


def test_the_readme_says_which_commands_take_what():
    section = README.partition("## From the command line")[2].partition("\n## ")[0]
    for said, option in (("take `--set ", "--set"), ("take `--set ", "--input"), ("take `--json`", "--json")):
        listed = re.search(rf"(?:^|\. )([^.]*?) {re.escape(said)}", section, re.M)[1]
        takes = {name for name in COMMANDS if option in " ".join(attn(name, "--help").output.split())}
        assert set(re.findall(r"`(\w+)`", listed)) | {"diff"} == takes | {"diff"}, option


def test_a_mistake_leaves_stdout_empty_with_json_too(good):
    for command in ("compile", "run", "analyze"):
        done = attn(command, good, "lm2", "--length", 8, "--json")
        assert (done.exit_code, done.stdout) == (1, "")
        assert "did you mean `lm`?" in done.stderr


def test_fmt_changes_once_and_check_only_tells(tmp_path):
    ugly = "pattern   p=causal&last( 3 )"
    file = write(tmp_path / "ugly.attn", ugly)
    assert attn("fmt", "--check", file).exit_code == 1
    assert Path(file).read_text() == ugly
    assert attn("fmt", file).exit_code == 0
    assert Path(file).read_text() != ugly
    done = attn("fmt", "--check", file)
    assert (done.exit_code, done.output) == (0, "")


def test_fmt_leaves_a_file_with_mistakes_alone(tmp_path):
    file = write(tmp_path / "bad.attn", "pattern p = (causal")
    done = attn("fmt", file)
    assert done.exit_code == 1
    assert Path(file).read_text() == "pattern p = (causal"


def test_fmt_reads_stdin_and_writes_stdout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["fmt", "-"], input="pattern   p=causal&last( 3 )  # 3 ≤ n")
    assert (done.exit_code, done.stdout) == (0, "pattern p = causal & last(3)  # 3 ≤ n\n")
    assert CliRunner().invoke(main, ["fmt", "-"], input=done.stdout).stdout == done.stdout
    told = CliRunner().invoke(main, ["fmt", "--check", "-"], input="pattern   p=causal")
    assert (told.exit_code, told.stdout) == (1, "would change <stdin>\n")
    assert not list(tmp_path.iterdir())


def test_diff_tells_heads_apart(tmp_path):
    """Both relate the same pairs in some head."""
    one = "attention one { heads 0 { mask causal } else { mask last(3) } }\n"
    two = "attention two { heads 0 { mask last(3) } else { mask causal } }\n"
    file = write(tmp_path / "heads.attn", one + two)
    found = json.loads(attn("diff", f"{file}:one", f"{file}:two", "--json").stdout)
    assert found["status"] == "different"
    assert [pair["h"] for pair in found["pairs"]] == [0, 1]


@pytest.mark.parametrize("command", [["fmt"], ["check"], ["show", "--length", 8]])
def test_a_file_that_is_no_text(tmp_path, command):
    file = tmp_path / "binary.attn"
    file.write_bytes(b"\xff\xfe\x00")
    done = attn(command[0], file, *command[1:])
    assert done.exit_code == 1
    assert "is not UTF-8 text" in done.stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--device=nothing", "no device `nothing`\n  help: cpu, or cuda"),
        ("--text=none.txt", "cannot read `none.txt`: no such file"),
        ("--head-dim=2000000000", "the limit is 65536"),
        ("--batch=100000000", "GiB"),
    ],
)
def test_run_refuses_what_the_machine_has_not(good, option, said):
    done = attn_process("run", good, "lm", "--length", 64, option)
    assert (done.returncode, done.stdout) == (1, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_parameters_and_tables_reach_the_mask(good, tmp_path):
    np.save(tmp_path / "doc.npy", np.array([0, 0, 1, 1, 1, 2]))
    done = attn("analyze", good, "packed", "--length", 6, "--input", f"doc={tmp_path / 'doc.npy'}", "--json")
    assert json.loads(done.stdout)["nnz"]["value"] == 3 + 6 + 1
    done = attn("analyze", good, "lm", "--length", 6, "--set", "w=2", "--json")
    assert json.loads(done.stdout)["nnz"]["value"] == 11


def test_analyze_agrees_with_the_mask(tmp_path):
    file = write(tmp_path / "p.attn", "pattern p = band(2..5) & columns(every(3))")
    found = json.loads(attn("analyze", file, "--length", 50, "--json").stdout)
    mask = attndsl.load(file)["p"].mask(50)[0]
    assert found["nnz"]["value"] == mask.sum()
    assert found["density"] == pytest.approx(mask.mean())
    assert found["empty_rows"] == (~mask.any(axis=1)).sum()
    assert found["causal"] is False
    at = found["not_causal_at"]
    assert at["k"] > at["q"]
    assert attndsl.load(file)["p"].mask(at["n"])[0, at["q"], at["k"]]


def test_analyze_says_which_block_sizes_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(block_sizes, "ENTRIES", 2000)
    file = write(tmp_path / "a.attn", "attention a { inputs z : float[n]  mask random(2)  score s + z[k] }")
    done = attn("analyze", file, "--length", 4096, "--only", "block_sizes")
    assert "not counted: below 128, where there may be more than 2,000 entries" in done.stdout
    monkeypatch.setattr(block_sizes, "ENTRIES", 10**9)
    assert "not counted" not in attn("analyze", file, "--length", 4096, "--only", "block_sizes").stdout


@pytest.fixture
def noise(tmp_path, monkeypatch):
    """A mask of more different tiles than the limits allow: nothing can be said of it."""
    monkeypatch.setattr(tiling, "BOX_LIMIT", 0)
    monkeypatch.setattr(tiling, "CONTENT_LIMIT", 0)
    body = "{ q, k : (q * k * 7919 + q * q * 31) mod 1009 < 500 }"
    return write(tmp_path / "noise.attn", f"attention noise {{ mask {body} }}")


UNKNOWN = "error: nothing is known of `noise`: the mask has 64 different partial boxes of 1024 x 1024"


CHOOSING = """attention near { mask block(4) & causal | topk(2, of = causal - block(4)) }
attention pieces { mask lsh(2, 8) & causal }
attention by_input { inputs w : float[D]  mask topk(2, of = causal, by = (w * Q) @ K) }
"""


@pytest.fixture
def choosing(tmp_path):
    return write(tmp_path / "choosing.attn", CHOOSING)


def test_a_plan_of_what_is_chosen_says_why_it_has_no_tiles(choosing):
    for command in ("compile", "run"):
        done = attn_process(command, choosing, "near", "--length", 64)
        assert (done.returncode, done.stderr) == (0, "")
        assert "  tiles     unknown: keys are chosen anew at every call\n" in done.stdout
    assert "  SDPA, this mask   left out: keys are chosen anew at every call\n" in done.stdout


def test_analyze_says_which_figures_are_of_one_choice(choosing):
    shown = attn("analyze", choosing, "pieces", "--length", 64).stdout
    lines = "  live pairs    288 to 1,472, whatever is chosen\n  empty rows    0, of one drawn choice\n"
    assert lines in shown
    headings = re.findall(r"\n\n(\S.*)", shown)
    about = [heading.partition(", of ")[2] for heading in headings]
    whole = ["all that may be chosen"] * 3
    assert about == [*["one drawn choice"] * 3, *whole, "one drawn choice"], headings
    assert (
        json.loads(attn("analyze", choosing, "pieces", "--length", 64, "--json").stdout)["choice"] == "drawn"
    )
    plain = write(Path(choosing).parent / "plain.attn", "attention plain { mask causal }")
    assert "cho" not in attn("analyze", plain, "--length", 64).stdout


def test_analyze_of_no_choice_says_what_is_missing(choosing):
    found = json.loads(attn("analyze", choosing, "by_input", "--length", 64, "--json").stdout)
    needed = "`by_input` needs its input `w`, float[D]"
    assert found["reasons"] == dict.fromkeys(["cost", "block_sizes", "machines", "graph"], needed)
    assert found["nnz"]["value"] == 2 * 64 - 1
    long = json.loads(
        attn("analyze", choosing, "near", "--length", 10000, "--only", "nnz,graph", "--json").stdout
    )
    assert long["reasons"] == {
        "graph": "a choice is drawn for 67,108,864 pairs of a query and a key at most, not 100,000,000"
    }
    assert long["nnz"]["whatever"] == "is chosen"
    done = attn("show", choosing, "near", "--length", 10000)
    assert (done.exit_code, done.stdout) == (1, "")
    assert long["reasons"]["graph"] in done.stderr


def test_compare_says_which_figures_are_of_one_choice(choosing, good):
    done = attn("compare", f"{choosing}:near", f"{choosing}:pieces", f"{good}:lm", "--length", 64)
    *_, first, second = done.stdout.splitlines()
    assert f"{first} {second}" == (
        "near, pieces: FLOP forward is of one drawn choice, sight and cache of all that may be chosen"
    )
    assert "choice" not in attn("compare", f"{good}:lm", "--length", 64).stdout


def test_an_input_that_nothing_has_is_refused(choosing, good, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(64))
    given = ["--length", 64, "--input", f"dco={tmp_path / 'x.npy'}"]
    done = attn("compare", f"{good}:packed", f"{choosing}:by_input", *given)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: no attention here has an input `dco`\n  help: their inputs: doc, w\n"
    for command in ("show", "compile", "run", "analyze", "report"):
        page = ["-o", tmp_path / "page.html"] if command == "report" else []
        done = attn_process(command, choosing, "near", *given, *page)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: `near` has no input `dco`\n  help: its inputs: none\n"


@pytest.mark.parametrize("only", [[], ["--only", "nnz,cost"]])
def test_analyze_fails_where_no_part_is_known(noise, only):
    done = attn("analyze", noise, "--length", 8192, *only)
    assert (done.exit_code, done.stderr.splitlines()) == (1, [f"{UNKNOWN}; the limit is 0"])
    assert "not known\n  nnz           the mask has 64 different" in done.stdout
    done = attn("analyze", noise, "--length", 8192, *only, "--json")
    assert (done.exit_code, done.stderr.splitlines()) == (1, [f"{UNKNOWN}; the limit is 0"])
    assert json.loads(done.stdout)["reasons"]["cost"] in UNKNOWN + "; the limit is 0"


def test_a_sole_reason_is_told_once(noise):
    done = attn("analyze", noise, "--length", 8192, "--only", "nnz")
    assert (done.stdout, done.stderr) == ("", f"{UNKNOWN}; the limit is 0\n")


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("packed", [], 0),
        ("packed", ["--only", "cost,graph"], 1),
        ("packed", ["--only", "nnz", "--q-length", 3], 1),
        ("packed", ["--only", "reach"], 0),  # undecided
        ("lm", ["--only", "parameters"], 0),
        ("lm", ["--only", "parameters,reach", "--q-length", 3], 1),
        ("lm", ["--only", "nnz,reach", "--q-length", 3], 0),
    ],
)
def test_one_known_part_is_enough_for_analyze(good, name, options, code):
    done = attn("analyze", good, name, "--length", 8, *options)
    assert (done.exit_code, bool(done.stderr)) == (code, bool(code))


def test_compare_fails_where_nothing_is_known_of_any(good, noise):
    alone = attn("compare", noise, "--length", 8192, "--format", "csv")
    assert (alone.exit_code, UNKNOWN in alone.stderr) == (1, True)
    assert alone.stdout.startswith("name,length,")
    both = attn("compare", noise, f"{good}:lm", "--length", 8192)
    assert (both.exit_code, both.stderr) == (0, "")


def test_report_fails_where_nothing_is_known(noise, tmp_path):
    page = tmp_path / "page.html"
    done = attn("report", noise, "--length", 8192, "-o", page)
    assert (done.exit_code, UNKNOWN in done.stderr) == (1, True)
    assert "different partial" in page.read_text(encoding="utf-8")


def test_show_writes_a_file(good, tmp_path):
    out = tmp_path / "picture.txt"
    assert attn("show", good, "lm", "--length", 16, "-o", out).stdout == ""
    assert out.read_text(encoding="utf-8") == attn("show", good, "lm", "--length", 16).stdout


def test_show_stands_the_queries_where_they_are(good):
    done = attn("show", good, "lm", "--length", 36, "--q-length", 4)
    assert "queries 32..35 down" in done.stdout


def test_show_names_the_parameters_that_were_changed(good):
    titles = [
        attn("show", good, "lm", "--length", 4, "--set", f"w={w}").stdout.splitlines()[0] for w in (1, 4)
    ]
    assert titles == ["lm(w = 1)  n = 4  25 % live", "lm  n = 4  62.5 % live"]


def test_show_draws_one_head(tmp_path):
    file = write(tmp_path / "many.attn", "attention a { mask causal & last(h + 1) }\npattern w = last(3)")
    done = attn("show", file, "a", "--length", 16, "--heads", 32, "--head", 2)
    title, *drawn = done.stdout.splitlines()
    assert title == "a, head 2  n = 16  17.6 % live"
    assert drawn == attn("show", file, "w", "--length", 16).stdout.splitlines()[1:]


def test_show_takes_as_many_heads_as_are_spoken_of(tmp_path):
    text = "attention a { inputs w : int[H] mask causal & { q, k : q - k < w } }"
    np.save(tmp_path / "w.npy", [1, 2, 3])
    file = write(tmp_path / "a.attn", text)
    done = attn("show", file, "--length", 8, "--input", f"w={tmp_path / 'w.npy'}")
    assert done.exit_code == 0, done.stderr
    for head in ("head 0", "head 1", "head 2"):
        assert head in done.stdout
    groups = write(tmp_path / "b.attn", "attention b { heads 0..1 { mask causal } 2 { mask last(2) } }")
    assert "heads 0..1" in attn("show", groups, "--length", 8).stdout


@pytest.mark.parametrize("command", ["show", "analyze", "compare", "compile"])
def test_taking_one_head_of_many_is_said(tmp_path, command):
    file = tmp_path / "a.attn"
    file.write_text("attention a { mask causal & last([16, 32, 64][h]) }\nattention b { mask causal }\n")
    run = attn_process if command == "compile" else attn
    told = (
        "note: the mask of `a` differs from head to head: 1 head is taken; `--heads` says how many there are"
    )
    assert run(command, f"{file}:a", "--length", 64).stderr == f"{told}\n"
    assert run(command, f"{file}:a", "--length", 64, "--heads", 3).stderr == ""
    assert run(command, f"{file}:b", "--length", 64).stderr == ""


def test_a_counter_example_shows_the_ends_of_a_table(tmp_path):
    text = """attention p { inputs doc : int[n] reg : bool[n]
        mask documents(doc) & (grid(64, 8, { (y, x), (v, u) : y == v }) | columns(reg)) }
    assert every_row(p)"""
    done = attn("check", write(tmp_path / "p.attn", text))
    assert done.exit_code == 1
    assert "n = 513, q = 512, doc = [0, 0, 0, ..., 0, 0, 0], reg = [False, False, False, ..." in done.stdout
    found = json.loads(attn("check", "--json", tmp_path / "p.attn").stdout)
    assert len(found["files"][0]["assertions"][0]["tables"]["doc"]) == 513


def test_show_draws_a_pattern_of_too_many_small_tiles_and_the_same_in_coarse_ones(tmp_path):
    file = write(tmp_path / "p.attn", "pattern p = causal & columns(every(6))")
    done = attn("show", file, "--length", 2**20)
    assert done.exit_code == 0, done.stderr
    drawn = [attn("show", file, "--length", 2**18, *size).stdout for size in ((), ("--block-size", 128))]
    assert drawn[0] == drawn[1]
    assert len(drawn[0].splitlines()) == 38


def test_progress_shows_on_a_terminal(tmp_path):
    file = write(tmp_path / "p.attn", "pattern p = causal & random(2)")
    command = ["-m", "attndsl", "show", file, "--length", str(2**20), "--time-limit", "2"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, *command])
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal so
        while part := os.read(terminal, 4096):
            shown += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert b"tiling ... 1 s" in shown
    assert b"tiling took longer than 2 s" in shown


def test_a_proof_that_takes_too_long_is_undecided_and_the_others_are_not(tmp_path, monkeypatch):
    def slow(assertion):
        time.sleep(10 * ("full" in assertion.text))
        return proved(assertion)

    proved = check.prove
    monkeypatch.setattr(check, "prove", slow)
    file = write(tmp_path / "a.attn", "pattern p = causal\nassert p <= full\nassert p == causal")
    done = attn("check", file, "--time-limit", 1, "--json")
    found = json.loads(done.stdout)["files"][0]["assertions"]
    assert [(row["status"], row["reason"]) for row in found] == [
        ("undecided", "proving p <= full took longer than 1 s"),
        ("proved", ""),
    ]


def test_plugins_names_owners():
    done = json.loads(attn("plugins", "--json").stdout)["plugins"]
    ours = {row["name"]: row for row in done if row["group"] == "backends" and row["owner"] == "attndsl"}
    assert ours.keys() == {"cpu", "flex", "linear", "lowrank", "reference", "sdpa", "torch", "triton"}
    assert not any(row["error"] for row in ours.values())


COMPILED = {
    "name", "length", "q_length", "block_size", "backend", "approx", "rejected", "tiles", "entries", "nnz",
    "density", "plan_bytes", "compile_seconds",
}  # fmt: skip


def test_compile_prints_one_object_or_the_plan(good):
    done = attn_process("compile", good, "lm", "--length", 256, "--block-size", 64, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == COMPILED
    mask = attndsl.load(good)["lm"].mask(256)[0]
    assert found["nnz"] == mask.sum()
    assert found["density"] == pytest.approx(mask.mean())
    assert found["tiles"] == {"full": 0, "partial": 7, "empty": 9, "unique_partial": 2}
    assert {found["backend"], *found["rejected"]} >= {"reference", "sdpa", "torch"}


def test_tables_may_come_later_for_compile_but_not_for_run(good):
    done = attn_process("compile", good, "packed", "--length", 64, "--json")
    assert json.loads(done.stdout)["tiles"] is None
    done = attn_process("run", good, "packed", "--length", 64)
    assert done.returncode == 1
    assert "needs its input `doc`" in done.stderr
    assert "Traceback" not in done.stderr


def test_run_verifies_and_times(good):
    sizes = ("--length", 200, "--heads", 2, "--kv-heads", 1, "--head-dim", 16)
    command = [sys.executable, "-m", "attndsl", "run", good, "lm", *map(str, sizes), "--backward", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == COMPILED | {
        "seconds",
        "gflops_live",
        "max_abs_error",
        "max_abs_output",
        "verified_rows",
        "dense_masked_work",
    }
    assert found["seconds"].keys() == {"forward", "backward", "dense", "dense_masked"}
    assert all(taken > 0 for taken in found["seconds"].values())
    assert found["verified_rows"] == 200
    assert 0 < found["max_abs_error"] < 1e-5 < found["max_abs_output"] < 10
    assert found["nnz"] == 2 * attndsl.load(good)["lm"].mask(200).sum()
    assert found["gflops_live"] == pytest.approx(4 * found["nnz"] * 16 / found["seconds"]["forward"] / 1e9)


LIAR = """
from attndsl.backend import Features
from attndsl.execution import registry

class Liar:
    features = Features()
    def supports(self, attention, problem):
        return None
    def cost(self, attention, problem, block_mask):
        return 1.0
    def lower(self, attention, problem):
        right = registry.plugin("backends", "reference").lower(attention, problem)
        def kernel(call):
            out, lse = right(call)
            out[-1, -1, -1, -1] LIE
            return out, lse
        return kernel

backend = Liar()
"""


@pytest.mark.parametrize(("lie", "error"), [("+= 1e-3", "0.001"), ("= float('nan')", "inf")])
def test_run_refuses_a_backend_that_is_wrong_in_one_number(good, register, lie, error):
    name = register(LIAR.replace("LIE", lie))
    done = attn_process("run", good, "lm", "--length", 200, "--heads", 2, "--backend", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"error: `{name}` differs from `reference` by {error}, more than " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("clauses", "work"),
    [
        ("mask causal", "this mask"),
        ("mask causal  score alibi", "mask + bias"),
        ("mask causal  norm softmax(sink = learn[H])", "mask only"),
        ("mask causal + causal", "mask only"),
    ],
)
def test_dense_attention_does_the_same_work_or_its_mask_alone(clauses, work):
    attention = attndsl.parse(f"attention a {{ {clauses} }}")["a"]
    assert trial.masked_work(attndsl.compile(attention, length=64)) == work


def test_run_says_where_a_score_is_not_finite(tmp_path):
    file = tmp_path / "a.attn"
    file.write_text("attention a { mask causal  score s + 1 / (q - k) }")
    done = CliRunner().invoke(main, ["run", str(file), "--length", "16"])
    assert done.exit_code == 1
    assert "error: the score of `a` is not finite at some pair: `(s + (1 / " in done.stderr


def test_run_says_what_dense_attention_did(tmp_path):
    file = write(tmp_path / "a.attn", "attention a { mask causal  score alibi }")
    done = attn_process("run", file, "--length", 128)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "SDPA, mask + bias" in line)
    assert re.search(r"forward is \d\S* x (faster|slower)$", line)


def test_dense_attention_with_bias_does_the_same_work():
    attention = attndsl.parse("attention a { mask causal  score alibi }")["a"]
    plan = attndsl.compile(attention, length=40, heads=2, backend="reference")
    q, k, v = trial.qkv(plan.problem, None)
    assert torch.allclose(trial.dense_masked(plan, q, k, v, {})(), plan(q, k, v), atol=1e-5)


def test_a_ratio_is_in_words():
    assert run.ratio(dense=2.4, ours=2.0) == "1.2 x faster"
    assert run.ratio(dense=1.0, ours=3.1) == "3.1 x slower"


def test_run_reads_a_text_and_shows_everything(good):
    text = Path(__file__).parent.parent / "examples/data/us-constitution.txt"
    done = attn_process("run", good, "lm", "--length", 100, "--text", text)
    assert done.returncode == 0, done.stderr
    for part in ("lm: length 100, heads 1", "┌──", "forward", "SDPA, this mask", "on all rows"):
        assert part in done.stdout
    short = attn_process("run", good, "lm", "--length", 10**6, "--text", text)
    assert (short.returncode, short.stdout) == (1, "")
    assert "45,345 bytes" in short.stderr


def sleeper(stage):
    stage("sleeping", 0.3)
    time.sleep(30)


def killed(stage):
    import os

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_child_gives_its_result_or_its_mistake():
    assert child.run(lambda stage: [1, 2]) == [1, 2]

    def mistake(stage):
        raise fail("no such thing", help="try another")

    with pytest.raises(AttnError, match=r"error: no such thing\n  help: try another"):
        child.run(mistake)


def test_a_stage_past_its_limit_is_stopped():
    start = time.monotonic()
    with pytest.raises(AttnError, match=r"sleeping took longer than 0.3 s"):
        child.run(sleeper)
    assert time.monotonic() - start < 20


def test_a_child_that_dies_is_reported():
    with pytest.raises(AttnError, match="stopped by signal 9"):
        child.run(killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_survives_a_signal(number):
    # where the tests run in the background, SIGINT is ignored from the start
    script = """
import os, signal, sys, time
from attndsl.command import child
signal.signal(signal.SIGINT, signal.default_int_handler)
def work(stage):
    print(os.getpid(), flush=True)
    time.sleep(60)
child.run(work)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(number)
        assert parent.wait(10) != 0
    assert not Path(f"/proc/{pid}").exists() or "zombie" in Path(f"/proc/{pid}/status").read_text()


STREAMS = """
attention xl { keys mem(6) ++ tokens  mask causal & last(7) }
attention pooled { keys tokens ++ pool(4, by = learn[4])  mask causal }
"""


def test_streams_are_run_and_listed(tmp_path):
    file = write(tmp_path / "streams.attn", STREAMS)
    ran = attn("run", file, "xl", "--length", 64, "--backward").stdout
    assert "keys 0..5 memory, 6..69 tokens\n" in ran
    assert "left out: keys are made anew at every call" in ran
    found = json.loads(attn("run", file, "pooled", "--length", 64, "--json").stdout)
    assert found["keys"] == "tokens, slots of 4 tokens"
    assert found["max_abs_error"] < 1e-5
    shown = attn("show", file, "pooled", "--length", 16).stdout
    assert shown.startswith("pooled  n = 16  ")
    assert shown.endswith("keys 0..15 tokens, 16..19 slots of 4 tokens\n")


def test_streams_are_not_compared(tmp_path):
    file = write(tmp_path / "streams.attn", STREAMS)
    done = attn("diff", f"{file}:xl", f"{file}:pooled")
    assert done.exit_code != 0
    assert "the keys of `xl` are streams, and relations of tokens are compared" in done.stderr


def test_an_example_stands_wherever_a_file_may(tmp_path):
    page = tmp_path / "page.html"
    for command in (
        ["check", "example:mistral"],
        ["fmt", "--check", "example:mistral"],
        ["show", "example:mistral", "--length", 8],
        ["show", "example:bigbird", "sparse", "--length", 8],
        ["analyze", "example:mistral:mistral", "--length", 8, "--only", "nnz"],
        ["compare", "example:mistral", "example:longformer:longformer", "--length", 8],
        ["diff", "example:mistral:mistral", "example:longformer:longformer"],
        ["report", "example:mistral", "--length", 8, "-o", page],
    ):
        done = attn(*command)
        assert (done.exit_code, done.stderr) == (0, ""), command
    assert "Jiang et al." in page.read_text(encoding="utf-8")
    assert attn("check", "example:mistral").stdout.startswith("example:mistral:")


@pytest.mark.parametrize(
    "command", ["check", "fmt", "show", "compile", "run", "analyze", "compare", "report"]
)
def test_a_misspelt_example_is_one_line_with_the_nearest(command, tmp_path):
    more = [] if command in ("check", "fmt") else ["--length", 8]
    done = attn(
        command, "example:longfromer", *more, *(["-o", tmp_path / "x"] if command == "report" else [])
    )
    assert done.exit_code == 1
    assert done.stderr == "error: no example `longfromer`: did you mean `longformer`?\n"


def test_examples_in_python(tmp_path, monkeypatch):
    names = dir(attndsl.examples)
    assert names == sorted(path.stem for path in (ROOT / "examples").glob("*.attn"))
    assert attndsl.examples.longformer.names == attndsl.load("example:longformer").names
    with pytest.raises(AttributeError, match="no example `longfromer`: did you mean `longformer`"):
        _ = attndsl.examples.longfromer
    with pytest.raises(AttnError, match=f"no example `x`: there are {', '.join(names)}"):
        attndsl.load("example:x")
    monkeypatch.chdir(tmp_path)
    Path("example:mistral").write_text("pattern p = causal", encoding="utf-8")
    assert attndsl.load("./example:mistral").names == attndsl.load(Path("example:mistral")).names == ("p",)


def test_every_argument_and_option_is_explained():
    for name in COMMANDS:
        command = main.get_command(None, name)
        said = " ".join(attn(name, "--help").stdout.split())
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help or "--only" in param.opts, (name, param.opts)
            else:
                words = re.findall("FILE|NAME", param.human_readable_name.upper())
                assert all(f"{word} " in said for word in words), (name, param.name)


def test_the_version_is_said_once():
    assert attn("--version").stdout == f"attndsl, version {attndsl.__version__}\n"


def test_drawing_without_matplotlib_names_the_extra(good, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = "drawing takes matplotlib: pip install 'attndsl[pictures]'\n"
    done = attn("show", good, "lm", "--length", 8, "-o", tmp_path / "mask.svg")
    assert (done.exit_code, done.stderr) == (1, f"error: {said}")
    done = attn("report", good, "lm", "--length", 8, "-o", tmp_path / "page.html")
    assert (done.exit_code, done.stderr) == (0, f"note: not all is drawn: {said}")


def completed(line, tmp_path, shell="bash"):
    """What bash, with its words ended at colons, or another shell is given."""
    words = re.findall("[:=]|[^ :=]+|(?<= )$", line) if shell == "bash" else line.split(" ")
    joined = ("\n" if shell == "bash" else " ").join(words)
    told = {"COMP_WORDS": joined, "COMP_CWORD": str(len(words) - 1), "_ATTNDSL_COMPLETE": f"{shell}_complete"}
    if shell == "fish":
        told["COMP_CWORD"] = words[-1]
    with contextlib.chdir(tmp_path):
        done = CliRunner().invoke(main, [], prog_name="attndsl", env=told)
    return done.stdout.split()


def test_names_of_examples_complete(tmp_path):
    write(tmp_path / "exam.attn", "pattern p = causal")
    assert completed("attndsl sho", tmp_path) == ["plain,show"]
    assert completed("attndsl show example:mis", tmp_path) == ["plain,mistral"]
    assert completed("attndsl show --set w=3 example:mis", tmp_path) == ["plain,mistral"]
    assert len(completed("attndsl check example:mistral example:", tmp_path)) == len(dir(attndsl.examples))
    assert completed("attndsl show exa", tmp_path) == ["file,exa"]
    assert completed("attndsl show ", tmp_path) == ["file,"]
    assert "plain,example:mistral" in completed("attndsl show exampl", tmp_path)
    assert completed("attndsl show example:mis", tmp_path, "fish") == ["plain,example:mistral"]
    assert completed("attndsl show example:mis", tmp_path, "zsh") == ["plain", "example:mistral", "_"]


def test_bash_itself_completes_the_name_of_an_example(tmp_path):
    source = (
        CliRunner().invoke(main, [], prog_name="attndsl", env={"_ATTNDSL_COMPLETE": "bash_source"}).stdout
    )
    words = (
        "COMP_WORDS=(attndsl show example : mis); COMP_CWORD=4; _attndsl_completion attndsl; echo $COMPREPLY"
    )
    folder = Path(sys.executable).parent
    run = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", f"{source}\n{words}"], env=run, capture_output=True, text=True, check=False
    )
    assert done.stdout == "mistral\n"


def test_blanks_around_a_value_and_between_parts_mean_nothing(good):
    said = attn("analyze", f"{good}:lm", "--length", "8", "--set", "w = 2", "--only", "nnz, reach")
    assert said.exit_code == 0
    assert (
        said.stdout
        == attn("analyze", f"{good}:lm", "--length", "8", "--set", "w=2", "--only", "nnz,reach").stdout
    )


def test_a_list_that_is_too_short_for_the_heads_is_named_by_analyze(tmp_path):
    path = write(tmp_path / "short.attn", "attention a(w = [2, 4]) { mask causal & last(w[h]) }")
    said = attn("analyze", str(path), "--length", "8", "--heads", "4", "--only", "nnz")
    assert said.exit_code == 1
    assert "nothing is known of `a`: `w` has 2 entries for 4 heads" in said.stderr
