"""Signs and words of other languages, and what is written for them here."""

from __future__ import annotations

import re

LEARN = "write `learn[1](0.1)` for one number, `learn[H](0.1)` for one per head, `learn[65]` for a table"
OPERATORS = (
    (r"&&", "write `and` between truths, `&` between patterns"),
    (r"\|\|", "write `or` between truths, `|` between patterns"),
    (r"!(?!=)", "write `not` before a truth, `~` before a pattern"),
    (r"%", "write `mod`"),
    (r"\^", "a power is `a ** b`; of truths and patterns, what is in one of two: `(a | b) - (a & b)`"),
    (r";", "leave it out: nothing stands between clauses or definitions"),
    (r"'-?inf(?:inity)?'", "there is no infinity: `mask` takes pairs out, and a large number is `-1e9`"),
    (r"'", 'write a string in `"`'),
    (r"\?", "write `where(condition, a, b)`"),
    (r"=>", "write `>=`"),
    (r"=<", "write `<=`"),
    (r"<<", "write `a * 2 ** b`"),
    (r">>", "write `a // 2 ** b`"),
    (r"<>", "write `!=`"),
    (r"\.\.\.", "write `a..b`, both ends included"),
    (r"\.\.[=<]", "write `a..b`, both ends included"),
    (r"[-+*/|&]=", "there is no assignment: write the new value, as in `score s + 1`"),
)
CHOICE = "write `where(condition, a, b)`"
CONDITIONS = "join conditions by `and`, patterns by `&`"
WORDS = {
    **dict.fromkeys(("if", "then"), CHOICE),
    **dict.fromkeys(("where", "when", "with"), CONDITIONS),
    **dict.fromkeys(("is", "equals"), "write `==`"),
    **dict.fromkeys(("subset", "subsetof"), "write `<=`"),
    "isin": "write `in`",
    "between": "write `a <= x <= b`",
    "implies": "write `not a or b`",
    "xor": "write `(a or b) and not (a and b)`",
    "to": "write `a..b`, both ends included",
    "lambda": "a pattern is written `{ q, k : condition }`, a score `score s + 1`",
    "for": "leave it out: a condition is about every position, and a set of some is `{ p : condition }`",
    "forall": "a claim is about all positions and lengths: write `A <= B`",
}
"""Beside an expression."""
PATTERN = "a pattern is written `pattern NAME = { q, k : condition }`"
FILE = 'another file is read by `use "FILE.attn"`'
DEFINITIONS = {
    **dict.fromkeys(("def", "lambda"), PATTERN),
    **dict.fromkeys(("import", "from", "include"), FILE),
    **dict.fromkeys(("const", "var"), "write `let`"),
    **dict.fromkeys(("class", "mechanism"), "write `attention NAME { ... }`"),
    "attn": "write `attention`",
    "relation": "write `pattern`",
    "function": "write `let NAME(x) = ...`",
    "for": "heads that differ are a clause: `attention NAME { heads 0..3 { ... } else { ... } }`",
    "as": "leave it out: what is in a file that is used has its own names",
}
"""Where a definition begins."""
AT_CALL = "sizes are said at the call, as `attndsl.compile(..., heads=8)`, and are no part of a text"
CLAUSES = {
    "dropout": "leave it out: weights are not dropped, and `torch.nn.Dropout` is for the output",
    "scale": "write it into the score: `score Q @ K * 0.125`",
    "bias": "write it into the score: `score s + ...`",
    "softmax": "write `norm softmax`",
    **dict.fromkeys(("temperature", "temp", "tau"), "write it into the score: `score s / 2.0`"),
    "window": "write `mask causal & last(128)`",
    **dict.fromkeys(
        "kv_heads num_heads n_heads head_dim layers length batch dtype block_size".split(), AT_CALL
    ),
    **dict.fromkeys(
        ("sink", "sinks"), "write `norm softmax(sink = learn[H])`; first keys are `mask sinks(4)`"
    ),
    "head": "write `heads 0 { ... } else { ... }`",
    "input": "write `inputs`",
    **dict.fromkeys(("for", "if"), "write `heads 0..3 { ... } else { ... }`"),
    "qk_norm": "leave it out: q and k arrive ready, normalised before the call",
    "as": "leave it out: nothing is renamed, and streams of `keys` go by their numbers, as `stream == 0`",
}
"""Where a clause begins."""
COMMAS = {
    "mask": "join patterns by an operator: `&` for what all relate, `|` for what some do",
    "keys": "join streams by `++`",
    "heads": "several heads are a range or a list: `0..3` or `[0, 1]`",
}
"""What stands for a comma in a clause."""
TYPES = {
    **dict.fromkeys(("long", "int64", "int32", "int16", "int8", "integer", "index"), "int"),
    **dict.fromkeys(("float16", "float32", "float64", "bfloat16", "double", "half", "real"), "float"),
    **dict.fromkeys(("boolean", "mask"), "bool"),
}
MODULES = frozenset("torch math np numpy F jnp jax".split())
LOOKALIKES = {
    "\u2212": "-", "\u2013": "-", "\u00d7": "*", "\u00b7": "*", "\u2264": "<=", "\u2265": ">=",
    "\u2260": "!=", "\u2227": "and",
    "\u2228": "or", "\u00ac": "not", "\u2208": "in", "\u222a": "|", "\u2229": "&",
    "\u201c": '"', "\u201d": '"', "\u2026": "..",
}  # fmt: skip
OF_PATTERNS = {"and": "&", "or": "|", "not": "~"}


def attribute(name: str, part: str) -> str:
    """What is written for `name.part`."""
    if name in MODULES:
        return f"write `{TYPES.get(part, part)}`"
    if name in ("Q", "K") and part in ("T", "mT", "t", "transpose", "permute", "mH"):
        return "`s` is the logit, and `Q @ K` the inner product without its scale: nothing is transposed"
    return f"the transpose is `T({name})`" if part == "T" else "names have no attributes"


def numeral(digits: str, rest: str) -> str:
    """What is written for digits with letters behind."""
    if re.fullmatch(r"(?:_\d+)+", rest):
        return f"write `{digits}{rest.replace('_', '')}`"
    if digits == "0" and re.fullmatch(r"x[0-9a-fA-F]+", rest):
        return f"write `{int(digits + rest, 16)}`"
    if rest.lower() in ("k", "m", "g"):
        return f"write `{int(digits) * 1024 ** ('kmg'.index(rest.lower()) + 1)}`"
    return "write `2 * x` for a product"


def character(bad: str) -> tuple[str, str]:
    """What is said of a character that no token begins with, and what is written for it."""
    if bad == ".":
        return "`.` without digits on both sides", "write `0.5` or `2.0`"
    shown = f"`{bad}` (U+{ord(bad):04X})" if bad.isprintable() else f"U+{ord(bad):04X}"
    if bad == '"':
        return "control character in a string", ""
    if bad in LOOKALIKES:
        word = LOOKALIKES[bad]
        sign = f", for patterns `{OF_PATTERNS[word]}`" if word in OF_PATTERNS else ""
        return f"unknown character {shown}", f"write `{word}`{sign}"
    letters = "names are made of the letters a to z, digits and `_`" if bad.isalpha() else ""
    return f"unknown character {shown}", letters
