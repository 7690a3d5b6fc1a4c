"""Hostile programs: each ends soon and small, in an AttnError that names the limit or in the right answer."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

SECONDS = 10
"""Of one processor: 5 on a quiet machine."""
BYTES = 2**30
PRIMES = [p for p in range(2, 8000) if all(p % d for d in range(2, int(p**0.5) + 1))]


@dataclass(frozen=True)
class Bomb:
    """A text, what to do with it beyond parsing, and how it ends: part of the error, or the result.

    action: "parse"; "mask N" and "tiles N", the pairs of the last pattern or attention, pointwise and in
    tiles; "prove", the status of the assertion; "compile N", the backend.
    """

    text: str
    action: str
    expect: str


def lines(first: str, step: str, times: int) -> str:
    return "\n".join([first, *(step.format(i, i - 1) for i in range(1, times + 1))])


def doubled(first: str, step: str, action: str, expect: str) -> Bomb:
    """Definitions that use the one before twice, 60 times over."""
    return Bomb(lines(first, step, 60), action, expect)


def mask(body: str) -> str:
    return f"attention a {{ mask {body} }}"


def residues(count: int, joint: str, sign: str) -> str:
    return mask("{ q, k : " + joint.join(f"(q - k) mod {p} {sign} 0" for p in PRIMES[:count]) + " }")


STRIDES = "pattern r = " + " | ".join(f"{{ q, k : (q - k) mod {p} == 0 }}" for p in PRIMES[:20])
CALLS = " | ".join(f"rows([{i}])" for i in range(0, 30_000, 3))
ROWS = " | ".join(f"{{ q, k : q == {i} }}" for i in range(0, 27_000, 3))

BOMBS = {
    # depth
    "parentheses": Bomb(mask("(" * 20_000 + "causal" + ")" * 20_000), "parse", "nested"),
    "braces": Bomb(mask("{ q, k : " * 20_000), "parse", "nested"),
    "minus": Bomb(mask("{ q, k : q < " + "-" * 20_000 + "1 }"), "parse", "nested"),
    "complements": Bomb(mask("~" * 20_000 + "causal"), "parse", "nested"),
    "nots": Bomb(mask("{ q, k : " + "not " * 20_000 + "q < k }"), "parse", "nested"),
    "powers": Bomb(mask("{ q, k : q < " + "2 ** " * 20_000 + "1 }"), "parse", "nested"),
    "calls": Bomb(mask("T(" * 20_000 + "causal" + ")" * 20_000), "parse", "nested"),
    "look-ups": Bomb(mask("{ q, k : causal" + "[q, k" * 20_000 + "]" * 20_000 + " }"), "parse", "nested"),
    "bars": Bomb(mask("{ q, k : " + "|" * 20_000 + "q }"), "parse", "nested"),
    "sums": Bomb(mask("{ q, k : k < " + "q - " * 20_000 + "q }"), "parse", "nested"),
    "blocks in blocks": Bomb(mask("blocks(1, " * 400 + "causal" + ")" * 400), "parse", "nested"),
    "blocks in blocks, fewer": Bomb(mask("blocks(1, " * 40 + "causal" + ")" * 40), "tiles 1000", "500500"),
    "transposes": Bomb(lines("pattern a0 = causal", "pattern a{} = T(a{})", 50), "mask 10", "55"),
    "deep definitions": Bomb(lines("let a0 = 1", "let a{} = a{} + 1", 3000), "parse", "None"),
    # numbers
    "digits": Bomb(mask(f"last({'9' * 20_000})"), "parse", "64 bits"),
    "decimals": Bomb(f"attention a {{ score s * 0.{'9' * 20_000} }}", "parse", "None"),
    "exponent": Bomb("attention a { score s * 1e999999999 }", "parse", "limit"),
    "tower": Bomb(mask("last(9 ** 9 ** 9)"), "parse", "64-bit"),
    "real tower": Bomb("attention a { score s * 9.0 ** 9 ** 9 }", "parse", "not a number"),
    "tower of q": Bomb(mask("{ q, k : k < q ** 9 ** 9 }"), "mask 10", "64-bit"),
    "far window": Bomb(mask("last(2 ** 62)"), "tiles 1000", "500500"),
    "beyond far": Bomb(mask("last(2 ** 62 + 2 ** 62)"), "parse", "64-bit"),
    "overflow at run time": Bomb(mask("{ q, k : k < q * 2 ** 62 }"), "tiles 1000", "64-bit"),
    "overflow of a product": Bomb(
        mask("{ q, k : k < (q * 2 ** 31) * (k * 2 ** 31) }"), "mask 1000", "64-bit"
    ),
    "overflow of a floor": Bomb(mask("{ q, k : k < floor(2.0 ** q) }"), "tiles 1000", "64-bit"),
    "shift far": Bomb(mask("shift(2 ** 62, causal)"), "tiles 1000", "0"),
    "huge block": Bomb(mask("block(2 ** 62)"), "tiles 1000", "1000000"),
    "huge blocks": Bomb(mask("blocks(2 ** 62, causal)"), "tiles 1000", "1000000"),
    "huge canvas": Bomb(mask("grid(2 ** 40, 2 ** 40, { (y, x), (v, u) : y == v })"), "parse", "64-bit"),
    "huge dilation": Bomb(mask("dilate(2 ** 61, causal)"), "tiles 1000", "1000"),
    "huge set": Bomb(mask("columns(0..2 ** 62)"), "tiles 1000", "1000000"),
    # moduli
    "64 moduli": Bomb(residues(64, " and ", "!="), "tiles 2000", "423684"),
    "1,000 moduli": Bomb(residues(1000, " and ", "!="), "mask 20", "38"),
    "1,000 moduli in tiles": Bomb(residues(1000, " and ", "!="), "tiles 500", "998"),
    "64 moduli proved": Bomb(residues(64, " and ", "!=") + "\nassert a <= causal", "prove", "refuted"),
    "64 multiples proved": Bomb(residues(64, " or ", "==") + "\nassert ~a <= causal", "prove", "refuted"),
    "1,000 moduli proved": Bomb(residues(1000, " and ", "!=") + "\nassert every_row(a)", "prove", "refuted"),
    "20 strides": Bomb(
        STRIDES + "\nattention a { mask r @ r }\nassert a == full",
        "prove",
        "refuted",
    ),
    "20 strides in tiles": Bomb(
        STRIDES + "\nattention a { mask r @ r }",
        "tiles 500",
        "250000",
    ),
    # width
    "10,000 parts": Bomb(mask(CALLS), "mask 100", "3400"),
    "complement of 9,000 parts": Bomb(mask(f"~({ROWS})"), "mask 100", "6600"),
    "complement of 9,000 parts proved": Bomb(mask(f"~({ROWS})") + "\nassert a <= causal", "prove", ""),
    "set of 40,000": Bomb(
        mask(f"columns([{', '.join(map(str, range(0, 120_000, 3)))}])"), "tiles 1000", "334000"
    ),
    "50,000 definitions": Bomb(lines("let a0 = 1", "let a{} = 1", 50_000), "parse", "definitions"),
    "50,000 clauses": Bomb("attention a { " + "mask causal " * 50_000 + "}", "tiles 1000", "limit"),
    "50,000 errors": Bomb("attention a { } " + "mask " * 50_000, "parse", "expected a definition"),
    "a megabyte of blanks": Bomb(" \n" * 500_000 + mask("causal"), "mask 10", "55"),
    "a megabyte of one name": Bomb(mask("a" * 1_000_000), "parse", "unknown"),
    "20,000 inputs": Bomb(
        "attention a { inputs " + " ".join(f"t{i} : int[n]" for i in range(20_000)) + " }", "parse", "limit"
    ),
    # sharing
    "union doubled": doubled(
        "pattern a0 = causal", "pattern a{0} = a{1} | shift(1, a{1})", "tiles 1000", "500500"
    ),
    "union of itself": doubled("pattern a0 = causal", "pattern a{0} = a{1} | a{1}", "tiles 1000", "500500"),
    "transposed union": doubled(
        "pattern a0 = last(3)", "pattern a{0} = a{1} | T(a{1})", "tiles 1000", "4994"
    ),
    "product doubled": doubled("pattern a0 = last(2)", "pattern a{0} = a{1} @ a{1}", "tiles 300", ""),
    "sum doubled": doubled("pattern a0 = causal", "pattern a{0} = a{1} + a{1}", "mask 10", "55"),
    "blocks doubled": doubled(
        "pattern a0 = causal", "pattern a{0} = blocks(2, a{1}) | a{1}", "tiles 1000", "1000000"
    ),
    "within doubled": doubled(
        "pattern a0 = causal", "pattern a{0} = within(9, a{1}) | a{1}", "tiles 1000", "500500"
    ),
    "dilation doubled": doubled(
        "pattern a0 = causal", "pattern a{0} = dilate(2, a{1}) | a{1}", "mask 10", "55"
    ),
    "difference doubled": doubled(
        "pattern a0 = causal", "pattern a{0} = shift(1, a{1}) - shift(2, a{1})", "mask 10", "0"
    ),
    "argument doubled": Bomb(
        lines("pattern a0(R) = R | T(R)", "pattern a{0}(R) = a{1}(a{1}(R))", 30)
        + "\nattention a { mask a30(causal) }",
        "parse",
        "steps",
    ),
    "set doubled": doubled("let a0 = 0..3", "let a{0} = a{1} | {{ p : p + 1 in a{1} }}", "parse", "None"),
    "number doubled": doubled("let a0 = 1", "let a{0} = a{1} + a{1}", "parse", "None"),
    "number doubled, 80 times": Bomb(lines("let a0 = 1", "let a{0} = a{1} + a{1}", 63), "parse", "64-bit"),
    "where doubled": Bomb(
        lines("let a0(x) = x", "let a{0}(x) = where(x > {0}, a{1}(x) + 1, a{1}(x) * 2)", 30)
        + "\nattention a { mask { q, k : a30(q) < k } }",
        "mask 10",
        "9",
    ),
    "minimum doubled": Bomb(
        lines("let a0(x) = x", "let a{0}(x) = min(a{1}(x) + 1, |a{1}(-x)|)", 30)
        + "\nattention a { mask { q, k : a30(q) < k } }",
        "tiles 300",
        "53101",
    ),
    "score doubled": Bomb(
        lines("let a0(x) = tanh(x)", "let a{0}(x) = a{1}(x) * a{1}(x + 1)", 30)
        + "\nattention a { score a30(s) }",
        "parse",
        "None",
    ),
    "scores": Bomb("attention a { " + "score s * s + s " * 400 + "}", "parse", "nested"),
    "recursion": Bomb("pattern a = b\npattern b = a", "parse", "defined by itself"),
    "recursion through a parameter": Bomb(
        "pattern a(R = b) = R\npattern b = a", "parse", "defined by itself"
    ),
    # draws
    "many random keys": Bomb(mask("random(2 ** 40)"), "tiles 1000", "1000000"),
    "random keys of many": Bomb(mask("random(2, of = causal)"), "tiles 1048576", "limit"),
    "random keys of a random": Bomb(mask("random(2, of = random(9, of = causal))"), "tiles 20000", "39999"),
    "random keys of a product": Bomb(mask("random(2, of = causal @ random(2))"), "tiles 3000", "limit"),
    "random keys at a draw": Bomb(mask("random(1) @ random(1) @ random(1)"), "tiles 128", "128"),
    "a product that is searched": Bomb(mask("random(3) @ random(3)"), "tiles 100000", "limit"),
    # many distinct tiles
    "noise": Bomb(mask("{ q, k : (q * k * 7919 + q * q * 31) mod 1009 < 500 }"), "tiles 8192", "33293768"),
    "long noise": Bomb(
        mask("{ q, k : (q * k * 7919 + q * q * 31) mod 1009 < 500 }"), "tiles 1048576", "limit"
    ),
    "fine stripes": Bomb(mask("{ q, k : (3 * q + 5 * k) mod 1000003 < 500000 }"), "tiles 8192", "67108864"),
    "strided far": Bomb(mask("strided(3)"), "tiles 262144", "11453901480"),
    "far n": Bomb(mask("causal"), "tiles 2147483647", "more than"),
    "noise compiled": Bomb(mask("{ q, k : (q * k * 7919) mod 1009 < 500 }"), "compile 4096", "cpu"),
    "dense compiled": Bomb(mask("causal"), "compile 1048576", "sdpa"),
}

LONG = {
    "10,000 parts", "complement of 9,000 parts", "complement of 9,000 parts proved", "many random keys",
    "50,000 definitions", "50,000 clauses", "1,000 moduli in tiles", "union doubled", "within doubled",
    "random keys of many", "random keys of a random", "set of 40,000", "deep definitions",
}  # fmt: skip
"""Those of a second and a half or more."""


def ending(bomb: Bomb) -> str:
    """What the bomb does, as a text: the number of pairs, a verdict's status, or the error."""
    import attndsl

    try:
        program = attndsl.parse(bomb.text)
        verb, *size = bomb.action.split()
        if verb == "prove":
            return str(attndsl.prove(program.assertions[0]).status)
        if verb == "parse":
            return str(None)
        n, attention = int(size[0]), program[program.names[-1]]
        if verb == "mask":
            return str(int(attention.mask(n).sum()))  # type: ignore[union-attr]
        if verb == "tiles":
            return str(attention.block_mask(n).nnz)  # type: ignore[union-attr]
        return attndsl.compile(attention, length=n).backend
    except attndsl.AttnError as error:
        return str(error)[:2000]


def serve() -> None:
    """Each bomb that a line of stdin names in a child of its own: how it ended, its seconds and its peak of
    memory, a line of JSON."""
    import attndsl

    attndsl.parse("attention a { mask causal }")["a"].block_mask(300)  # type: ignore[union-attr]
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in map(str.strip, sys.stdin):
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            try:
                text = ending(BOMBS[name])
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"[:300]
            with os.fdopen(send, "w") as out:
                out.write(text)
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as read:
            text = read.read()
        _, status, usage = os.wait4(pid, 0)
        found = {
            "text": f"stopped by signal {status}" if status else text,
            "status": status,
            "seconds": usage.ru_utime + usage.ru_stime,
            "bytes": 1024 * max(0, usage.ru_maxrss - idle),
        }
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, __file__]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in BOMBS]
)
def test_it_does_not_go_off(name: str, server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(name + "\n")
    server.stdin.flush()
    found = json.loads(server.stdout.readline())
    assert found["status"] == 0, found["text"]
    assert found["seconds"] < SECONDS
    assert found["bytes"] < BYTES
    assert BOMBS[name].expect in found["text"].splitlines()[0]


if __name__ == "__main__":
    serve()
