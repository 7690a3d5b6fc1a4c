"""What a user is told: what was expected, what was found, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from attndsl.errors import AttnError, Diagnostic, Span, fail
from attndsl.expr import Expr, Selected, nodes
from attndsl.language.values import Num, Pattern, Scope, SetOf, TableOf, Truth, Value, Vec, as_number, as_set
from attndsl.syntax import nodes as ast

REMEDIES = {
    ("a number", "a truth"): "join conditions with `and`; as a number it is `where({x}, 1, 0)`",
    (
        "a number",
        "a vector",
    ): "an inner product is a number, `Q @ {v}`, and so is `sum({x})`",
    ("a truth", "a vector of truths"): "it may be the condition of a `where` alone",
    ("a truth", "a number"): "compare it, as in `{x} != 0`",
    ("a truth", "a pattern"): "look it up: `{r}[q, k]`",
    ("a set", "a number"): "write `[{x}]`, or `a..b` with both ends",
    ("a pattern", "a truth"): "write `{{ q, k : {x} }}`",
    ("a pattern", "a set"): "write `columns({x})`, `rows({x})` or `global({x})`",
    ("a pattern", "a pattern of coordinates"): "write `grid(height, width, {x})`",
    ("a number", "an attention"): "attentions are added, each with a factor: `0.5 * {x} + ...`",
    ("an attention", "a number"): "it is a factor of an attention: `{x} * part`",
    ("an attention", "a pattern"): "write `attention part {{ mask {x} }}` and add that",
    ("a pattern", "an attention"): "name its mask as a `pattern` and use that",
}
"""What to write where one kind of value is expected and another found."""
PRELUDE = "prelude.attn"
IN_SCORES = "give the mask a number; `score`, `decay` and a sink may read what is learned"


def number_of(value: Value, e: ast.Expression, help: str = "") -> Expr:
    number = as_number(value)
    if isinstance(number, Num):
        return number.expr
    raise expected("a number", number, e, help)


def quantity_of(value: Value, e: ast.Expression, env: Scope, help: str = "") -> Expr:
    """A number or a vector."""
    return vector_of(value, e, env) if isinstance(as_number(value), Vec) else number_of(value, e, help)


def vector_of(value: Value, e: ast.Expression, env: Scope) -> Expr:
    vector = as_number(value)
    if not isinstance(vector, Vec):
        raise expected("a vector", vector, e)
    if env.integral:
        raise fail("a mask may not depend on vectors", e.span, "`score` and `decay` may")
    return vector.expr


def truth_of(value: Value, e: ast.Expression, env: Scope) -> Expr:
    truth = as_number(value)
    if isinstance(truth, Truth):
        return truth.expr
    position = "k" if "k" in env.names else next(reversed(list(env.names)), "q")
    help = f"ask for a member: `{position} in {quoted(e)}`" if isinstance(as_set(truth), SetOf) else ""
    raise expected("a truth", truth, e, help)


def chosen(value: Value, e: ast.Expression, env: Scope) -> str:
    """The help where a score or a `let` takes a pattern for a number."""
    if env.integral or not isinstance(value, Pattern):
        return ""
    return f"look it up: `where({quoted(e, tight=True)}[q, k], a, b)`"


def expected(noun: str, value: Value, e: ast.Expression, help: str = "") -> AttnError:
    if not (isinstance(value, TableOf) and value.left == 1 and value.table.dims[-1] != "D"):
        value = as_number(value)
    if noun == "a number" and isinstance(value, SetOf) and value.listed and isinstance(e, ast.Name):
        help = help or f"an entry of the list is `{e.id}[h]`, or `{e.id}[k]` of a key"
    if isinstance(value, TableOf):
        listed = isinstance(as_set(value), SetOf)
        if listed and (value.indices or noun == "a truth" or value.table.dtype == "bool"):
            value = as_set(value)
        elif listed and noun == "a pattern":
            name = quoted(e)
            own = f"write `within({name}, full)`: each key with those of its own label"
            lists = f"write `documents({name})`, or `columns({name})` for the keys it lists"
            help = help or (own if isinstance(value.table.origin, Selected) else lists)
    if isinstance(value, TableOf):
        left = value.left
        more = f"{quoted(e)}[{('q', 'q, k')[left - 1] if left <= 2 else '...'}]"
        if value.indices:
            help = help or f"it takes {left} more ind{'ex' if left == 1 else 'ices'}"
        elif noun == "a pattern":
            help = help or f"look it up: `{{ q, k : {more} }}`"
        size = value.table.dims[-1]
        if left == 1 and isinstance(size, int) and size <= 2:
            more = f"{quoted(e)}[0]"
        if noun == "a number" and left == 1 and isinstance(size, int) and size > 2:
            # an entry for each distance, as `relative` has them
            r = (size - 1) // 2
            far = f"clamp(k - q, -{r}, {r}) + {r}" if size % 2 else f"min(|q - k|, {size - 1})"
            more = f"{quoted(e)}[{far}]"
        help = help or f"look it up: `{more}`"
    remedy = REMEDIES.get((noun, value.noun), "")
    other = "K" if quoted(e) in ("Q", "K") else quoted(e, tight=True)
    help = help or remedy.format(x=quoted(e), r=quoted(e, tight=True), v=other)
    return fail(f"expected {noun}, and this is {value.noun}", e.span, help)


def not_integer(number: Expr, e: ast.Expression, help: str = "") -> AttnError:
    """`help` is for what there is no other help for."""
    for table in sorted(number.tables, key=lambda table: table.name):
        if table.learned:
            return fail(f"`{table.name}` is learned, and a mask may not depend on it", e.span, IN_SCORES)
        if table.dtype == "float":
            help = f"declare it `int`, or round it: `floor({quoted(e)})`"
            return fail(f"expected an integer, and `{table.name}` is a float table", e.span, help)
    powers = [x for x in ast.walk(e) if isinstance(x, ast.Binary) and x.op == "**"]
    if powers and all(arg.type == "int" for x in nodes(number) if x.op == "pow" for arg in x.args):
        bounded = f"bound the exponent: `max({quoted(powers[0].right)}, 0)`"
        return fail("a power is real where its exponent may be negative", powers[0].span, bounded)
    if isinstance(e, ast.Binary) and e.op == "/":
        return fail("`/` is real where an integer is needed", e.span, "write `//` to round down")
    if not help and isinstance(e, ast.Number):
        # a fraction of something is not meant to be none of it
        share = Fraction(str(e.value))
        times = "" if share.numerator == 1 else f" * {share.numerator}"
        help = f"write an integer: a share of n is `n{times} // {share.denominator}`"
        if not 0 < e.value < 1:
            help = f"write `{int(e.value)}`"
    help = help or f"round it down: `floor({quoted(e)})`"
    return fail("expected an integer, and this is a real number", e.span, help)


def out_of_place(
    name: ast.Name, units: tuple[int, int] | None = None, condition: Span | None = None, given: str = ""
) -> AttnError:
    """For a reserved name where it means nothing; `condition` is the whole one that it is part of, `given`
    the help where it is an argument."""
    if units and name.id in ("Q", "K"):
        return other_unit(name.id, name.span, units)
    if units and name.id in ("q", "k"):
        return fail(f"`{name.id}` is the position of a token, and this is a choice of blocks", name.span)
    if name.id in ("q", "k"):
        help = "write `{ q, k : ... }` around it"
        if condition is not None and len(condition.text) <= SHOWN and "\n" not in condition.text:
            help = f"write `{{ q, k : {condition.text} }}`"
        help = given or help
        return fail(f"`{name.id}` has no meaning outside a pattern or a score", name.span, help)
    if name.id == "stream":
        help = "an attention with `keys` may name it, and give it to a pattern as an argument"
        return fail("`stream` says which of its `keys` a key is of, and this has none", name.span, help)
    if name.id == "layer":
        help = "an attention is given what depends on it: `NAME(w = 8 * layer)` in the stack"
        return fail("`layer` has no meaning outside a stack of layers", name.span, help)
    if name.id == "s" and units:
        inner = "Q @ K" if units == (1, 1) else "Q @ mean(K)"
        return fail("`s` is the logit of a `score`, and keys are chosen here", name.span, f"write `{inner}`")
    what = {"s": "the logit", "Q": "the query's vector", "K": "the key's vector", "D": "the head dimension"}
    return fail(f"`{name.id}` is {what[name.id]}, and may be used in a `score` only", name.span)


def other_unit(vector: str, span: Span, units: tuple[int, int]) -> AttnError:
    """For `K` where a choice is of blocks, `mean(K)` where it is of keys, and the like."""
    if vector in ("Q", "K"):
        what = "a choice is made here for blocks of queries" if vector == "Q" else "blocks are chosen here"
        help = f"write `mean({vector})`, `min({vector})` or `max({vector})`"
        return fail(f"`{vector}` is of a token, and {what}", span, help)
    if "Q" in vector:
        help = "write `Q`, or put the choice inside `blocks(b, ...)`"
        return fail(f"`{vector}` is of a block, and a choice is made here for each query", span, help)
    # inside `blocks` a choice is of blocks already
    help = "write `K`, or choose blocks: `of = blocks(b, ...)`"
    return fail(f"`{vector}` is of a block, and keys are chosen here one by one", span, help)


SHOWN = 40
"""Characters of a program that a help repeats."""


def quoted(e: ast.Expression, tight: bool = False, most: int = SHOWN) -> str:
    """What was written, for a help line: without the parentheses around it, unless it is to stand `tight`."""
    text = written(e, most)
    loose = isinstance(e, ast.Nary | ast.Binary | ast.Unary | ast.Compare | ast.Range)
    bare = text[1:-1].strip() if loose and _enclosed(text) else text
    return f"({bare})" if loose and tight else bare


def written(e: ast.Expression, most: int = SHOWN) -> str:
    """The same with its parentheses."""
    text = e.span.text
    return "..." if len(text) > most or "\n" in text else text


def _enclosed(text: str) -> bool:
    depth = 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return i == len(text) - 1 and text[0] == "("
    return False


def blame(
    d: Diagnostic,
    definition: ast.Definition | ast.AttentionDef,
    given: Mapping[str, ast.Expression],
    span: Span,
) -> Diagnostic:
    """A mistake found in a definition that arguments were given to.

    In the prelude it is the caller's: told at the argument that the prelude stumbled over, if there is just
    one, else at the call. In a program's own definition it is told where it is, with the call as a help; or
    at the argument, where that is a text given from outside of the program.
    """
    inside = definition.span
    if d.span is None or d.span.source is not inside.source or not inside.start <= d.span.start < inside.end:
        return d
    outside = {name: e for name, e in given.items() if e.span.source is not span.source}
    if inside.source.name != PRELUDE and d.span.text not in outside:
        line, column = span.source.position(span.start)
        place = f"`{definition.name}` is given its arguments at {span.source.name}:{line}:{column}"
        return replace(d, help=place) if given and not outside and not d.help else d
    text, help = d.span.text, d.help
    if isinstance(definition, ast.Definition) and definition.word != "score" and re.search(r"\[[qk]\b", help):
        help = ""  # there are no positions where the call stands
    used = [e for name, e in given.items() if re.search(rf"\b{name}\b", text)]
    message = f"in `{definition.name}`: " + re.sub(r"^in `\w+`: ", "", d.message)
    if len(used) != 1:
        return replace(d, message=message, span=span, help="" if text in help else help)
    if outside and not help.startswith("round it down"):
        return replace(d, message=message, span=used[0].span)
    inner = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
    if (
        isinstance(used[0], ast.Number)
        and help.startswith("round it down")
        and float(used[0].value).is_integer()
    ):
        help = f"write `{int(used[0].value)}`"
    parts = help.split("`")
    parts[1::2] = [inner.sub(lambda _: quoted(used[0]), code) for code in parts[1::2]]
    return replace(d, message=message, span=used[0].span, help="`".join(parts))
