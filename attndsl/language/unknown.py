"""What an unknown name was meant to be: a word of other tools, or what its place in the text asks for."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping

from attndsl.errors import Span
from attndsl.language.arguments import signature
from attndsl.language.mistakes import quoted
from attndsl.language.vocabulary import BUILT_IN, FUNCTIONS
from attndsl.selection import Selection
from attndsl.syntax import nodes as ast

Definition = ast.Definition | ast.AttentionDef
Selections = Callable[[str], Selection | None]

LOGIT = "the logit so far is `s`"
QUERY = "the query's position is `q`"
KEY = "the key's position is `k`"
HEAD_DIM = "the head dimension is `D`"
LENGTH = "the number of positions is `n`"
HEADS = "the number of heads is `H`"
BATCH = "the batch is an axis of `inputs` alone, the first: `int[B, n]`; its index is left out"
OUT = "a pair is taken out by `mask`, or by `decay where(condition, 1.0, 0.0)`"
INNER = "the inner product of two vectors is `Q @ K`"
ROTARY = "rotary embedding is done before the call: q and k arrive ready"
WINDOW = "write `last(w)` for w keys up to the query, `radius(r)` for r on each side, or `band(a..b)`"
PADDING = "declare it: `inputs keep : bool[B, n]`, and write `columns(keep)`"
STREAM = "`stream` says of which of the `keys` a key is: `stream == 0` for the first"
CASTS = "round down by `floor(x)`; `x * 1.0` is real"
HABITS = {
    **dict.fromkeys(("window", "sliding_window", "sliding", "local"), WINDOW),
    "abs": "write `|x|`",
    **dict.fromkeys(("b", "batch"), BATCH),
    "even": "every second is `{ p : p mod 2 == 0 }`",
    "odd": "every second is `{ p : p mod 2 == 1 }`",
    "true": "write `0 == 0`, or the pattern `full`",
    "false": "write `0 == 1`, or the pattern `none`",
    **dict.fromkeys(("inf", "infinity", "neg_inf", "nan", "masked_fill"), OUT),
    "softmax": "write the clause `norm softmax`; features that are softmaxes are `approx shen`",
    "dropout": "leave it out: weights are not dropped",
    **dict.fromkeys(
        ("logit", "logits", "score", "scores", "attn", "attn_scores", "qk", "sim", "dots"), LOGIT
    ),
    **dict.fromkeys(("q_idx", "query_idx", "q_pos", "i", "row"), QUERY),
    **dict.fromkeys(("kv_idx", "k_idx", "key_idx", "k_pos", "j", "col"), KEY),
    **dict.fromkeys(("head", "head_idx", "h_idx"), "the query head is `h`"),
    **dict.fromkeys(("head_dim", "d_k", "dk", "d_head", "dim", "head_size"), HEAD_DIM),
    **dict.fromkeys(("seq_len", "seqlen", "length", "kv_len", "l", "len", "size"), LENGTH),
    **dict.fromkeys(("q_len", "num_queries"), "the number of queries is `nq`"),
    **dict.fromkeys(("num_heads", "n_heads", "nheads", "heads"), HEADS),
    **dict.fromkeys(("causal_mask", "is_causal", "lower_triangular", "autoregressive"), "write `causal`"),
    "tril": "write `causal`, and for another diagonal d `band(-n..d)`",
    "triu": "write `T(causal)`, and for another diagonal d `band(d..n)`",
    **dict.fromkeys(("rand", "bernoulli", "randint"), "write `random(r)`: r keys for each query"),
    **dict.fromkeys(("and_masks", "intersection", "intersect"), "write `A & B`"),
    **dict.fromkeys(("or_masks", "union"), "write `A | B`"),
    **dict.fromkeys(("key_padding_mask", "padding_mask", "attention_mask", "padding", "pad_mask"), PADDING),
    "sparsity": "write `density(A, n = 4096) < 1%`",
    **dict.fromkeys(("ones", "all", "everything", "dense"), "write `full`"),
    **dict.fromkeys(("zeros", "empty", "nothing"), "write `none`"),
    **dict.fromkeys(("eye", "diag", "diagonal", "identity"), "write `radius(0)`"),
    **dict.fromkeys(("range", "arange"), "write `a..b`, both ends included"),
    **dict.fromkeys(("int", "float", "round"), CASTS),
    "ceil": "write `-floor(-x)`, of integers `-(-a // b)`",
    **dict.fromkeys(("clip", "clamp_"), "write `clamp(x, lo, hi)`"),
    **dict.fromkeys(("pow", "power"), "write `a ** b`"),
    "if": "write `where(condition, a, b)`",
    **dict.fromkeys(("block_diag", "block_diagonal", "blockwise", "chunk", "chunked"), "write `block(64)`"),
    **dict.fromkeys(("v", "value", "values"), "values have no part in a mask or a score"),
    **dict.fromkeys(("matmul", "dot", "einsum", "bmm"), INNER),
    "transpose": "write `T(R)`",
    "cat": "write `concat(x, y)`",
    **dict.fromkeys(("rope", "rotary", "apply_rotary", "rotary_emb"), ROTARY),
    "pi": "write `3.141592653589793`",
    **dict.fromkeys(("pool", "mem", "proj", "tokens"), STREAM),
    "elu": "write `elu1(x)`, which is elu(x) + 1",
}
"""Names of other tools, in lower case, and what is written here."""


NUMBERS = {"number": "128", "real": "0.5", "gate": "learn[H](0.5)"}
"""Kinds of numbers, each with one."""


def habit(name: str) -> str:
    """What is written in place of a word of other tools; empty for others."""
    return HABITS.get(name) or HABITS.get(name.lower(), "")


def wanted(
    name: ast.Name, inside: Definition, definitions: Mapping[str, Definition], selection: Selections
) -> str:
    """What a name is to be where it stands in a definition: a type with its axes, `pattern`, `attention`, one
    of NUMBERS, where it is called `pattern(x)` or `let(x)`; empty where that is not known."""
    path = _path(inside, name)
    if len(path) < 2:
        return ""
    if isinstance(path[-2], ast.Call) and path[-2].func is name:
        return "pattern(x)" if _kind(path[:-1], "", definitions, selection, 8) == "pattern" else "let(x)"
    return _kind(path, name.id, definitions, selection, 8)


def remedy(name: str, kind: str, inside: Definition) -> str:
    """How a name that nothing defines is declared in a definition where it is to be of a kind."""
    if not kind:
        return ""
    if kind.endswith("(x)"):
        return f"define it: `{kind[:-3]} {name}(x) = ...`"
    if isinstance(inside, ast.Definition):
        params = ", ".join([*(param.name for param in inside.params), name])
        return f"make it a parameter: `{inside.word} {inside.name}({params}) = ...`"
    if kind == "pattern":
        return f"define it: `pattern {name} = ...`"
    if kind == "attention":
        return f"define it: `attention {name} {{ ... }}`"
    if kind in NUMBERS:
        return f"make it a parameter: `{_with(inside, f'{name} = {NUMBERS[kind]}')}`"
    if inside.sum is not None:
        return f"declare the gate: `attention {inside.name} {{ inputs {name} : {kind} }} = ...`"
    return f"declare the table: `inputs {name} : {kind}`"


def fitting(kind: str, definitions: Mapping[str, Definition]) -> Callable[[str], bool]:
    """Whether a known name may be meant where something of a kind is wanted."""

    def fits(name: str) -> bool:
        definition = definitions.get(name)
        word = definition.word if isinstance(definition, ast.Definition) else ""
        if kind.startswith("pattern"):
            return word in ("pattern", "") and name not in FUNCTIONS
        if kind == "attention":
            return isinstance(definition, ast.AttentionDef)
        if kind.endswith("]"):
            return word in ("let", "") and name not in BUILT_IN
        return True

    return fits


def condition_around(name: ast.Name, inside: Definition) -> Span | None:
    """The whole condition around a position, without patterns beside it; None where there is none."""
    found: Span | None = None
    for node in reversed(_path(inside, name)[:-1]):
        match node:
            case ast.Compare(_, args):
                first, last = args[0], args[-1]
                # `causal & q < 3`: the comparison is looser than `&`
                first = first.args[-1] if isinstance(first, ast.Nary) and first.op in "&|" else first
                last = last.args[0] if isinstance(last, ast.Nary) and last.op in "&|" else last
                found = first.span.to(last.span)
            case ast.Nary("and" | "or") | ast.Unary("not"):
                found = node.span
            case ast.Index() if found is None:
                found = node.span
            case ast.Call(ast.Name("where")):
                return None  # what it chooses between is no part of a condition
            case _ if found is not None:
                break
    return found


def argument_around(
    name: ast.Name, inside: Definition, definitions: Mapping[str, Definition], selection: Selections
) -> str:
    """The help for a position in what a call is given in place of a table or of a number; empty elsewhere."""
    path = _path(inside, name)
    for i in range(len(path) - 2, 0, -1):
        match path[i - 1], path[i], path[i + 1]:
            case _, ast.Index() | ast.Binary() | ast.Nary("+") | ast.Unary("-") | ast.Abs(), _:
                pass
            case ast.Call(ast.Name(called)), ast.Argument(_, value), _:
                if called in FUNCTIONS or _is_function(definitions.get(called)):
                    continue
                kind = _kind(path[: i + 2], name.id, definitions, selection, 8)
                if kind == "pattern":
                    return ""
                if "[" not in kind:
                    return "a number is wanted here that is the same for every query and key"
                return (
                    f"the whole table is given: `{quoted(value.base)}`"
                    if isinstance(value, ast.Index)
                    else ""
                )
            case _, ast.Call(), _:
                pass
            case _:
                return ""
    return ""


def _is_function(definition: Definition | None) -> bool:
    return isinstance(definition, ast.Definition) and definition.word != "pattern"


def _with(inside: ast.AttentionDef, param: str) -> str:
    known = signature(inside)
    return f"attention {known[:-1]}, {param})" if known.endswith(")") else f"attention {known}({param})"


def _path(root: ast.Node, name: ast.Name) -> tuple[ast.Node, ...]:
    """The nodes from `root` down to a name, that name last."""
    if root is name:
        return (name,)
    for child in ast.children(root):
        if path := _path(child, name):
            return (root, *path)
    return ()


def _kind(
    path: tuple[ast.Node, ...],
    name: str,
    definitions: Mapping[str, Definition],
    selection: Selections,
    depth: int,
) -> str:
    """As `wanted`, of the last of a path."""
    parents = [node for node in reversed(path[:-1]) if not isinstance(node, ast.Argument)]
    parent = parents[0] if parents else None
    match parent:
        case ast.Index(base) if base is path[-1]:
            chain = list(itertools.takewhile(lambda node: isinstance(node, ast.Index), parents))
            axes = [_axis(index) for node in chain if isinstance(node, ast.Index) for index in node.indices]
            return f"{_entry(path, parents[len(chain) :])}[{', '.join(axes)}]"
        case ast.HeadClauses():
            return ""
        case ast.AttentionDef():
            return "attention"
        case ast.Nary("+") | ast.Binary("-") | ast.Binary("*", ast.Number()) if _in_sum(path):
            return "attention"
        case ast.Compare(ops, args) if args[-1] is path[-1] and ops[-1] == "in":
            return "bool[n]"
        case ast.Binary("@", left) if _of_vectors(parent, path[0]):
            inner = isinstance(parents[1], ast.Binary | ast.Call) and left is path[-1]
            return "float[m, D]" if inner and _wants_vector(parents[1]) else "float[D]"
        case ast.Nary("|" | "&") | ast.Unary("~"):
            return "pattern"
        case ast.Clause("mask") | ast.Definition("pattern"):
            return "pattern"
        case ast.Nary("and" | "or") | ast.Unary("not") | ast.Builder():
            return "bool[n]"
        case ast.Call(ast.Name(called), args) if depth:
            position = next((i for i, arg in enumerate(args) if arg.value is path[-1]), None)
            if position is not None:
                named = args[position].name
                argument = _argument(called, named, position, definitions, selection, depth)
                return argument or _number(path)
    return _number(path)


def _number(path: tuple[ast.Node, ...]) -> str:
    if _in_sum(path):
        return "gate"
    words = [node.word for node in path if isinstance(node, ast.Clause)]
    return "real" if set(words) & {"score", "decay", "norm"} else "number"


def _argument(
    called: str,
    named: str,
    position: int,
    definitions: Mapping[str, Definition],
    selection: Selections,
    depth: int,
) -> str:
    """What is wanted as an argument of what is called so; empty for a number."""
    if called == "within" and position == 0:
        return "int[n]"
    if called == "proj":
        return "float[8, n]"
    if (called in ("blocks", "within", "grid") and position) or named in ("of", "R"):
        return "pattern"
    if (chosen := selection(called)) is not None:
        parameters = inspect.signature(chosen.signature).parameters
        names = [*parameters]
        wanted = named or (names[position] if position < len(names) else "")
        taken = str(parameters[wanted].annotation) if wanted in parameters else ""
        return "float[H, 8, D]" if taken == "Table" else ""
    definition = definitions.get(called)
    if not isinstance(definition, ast.Definition) or position >= len(definition.params):
        return ""
    param = named or definition.params[position].name
    uses = [node for node in ast.walk(definition.body) if isinstance(node, ast.Name) and node.id == param]
    kinds = [_kind(_path(definition, use), param, definitions, selection, depth - 1) for use in uses]
    return next((kind for kind in kinds if kind not in NUMBERS), "")


def _entry(path: tuple[ast.Node, ...], above: list[ast.Node]) -> str:
    """Of what type the entries of a table are that is looked up so."""
    if any(isinstance(node, ast.Clause) and node.word != "mask" for node in path) or (
        isinstance(path[0], ast.AttentionDef) and path[0].sum is not None
    ):
        return "float"
    match above[0] if above else None:
        case ast.Nary("and" | "or") | ast.Unary("not") | ast.Builder():
            return "bool"
    return "int"


def _in_sum(path: tuple[ast.Node, ...]) -> bool:
    return isinstance(path[0], ast.AttentionDef) and path[0].sum is not None


def _axis(index: ast.Expression) -> str:
    match index:
        case ast.Name("h"):
            return "H"
        case ast.Number(value):
            return str(int(value) + 1)
        case ast.Name("D"):
            return "D"
    return "n"


def _of_vectors(product: ast.Binary, root: ast.Node) -> bool:
    """Whether `@` is between vectors: with `Q` or `K`, or in the text of a function, as of `favor(x, W)`."""
    named = {node.id for node in ast.walk(product) if isinstance(node, ast.Name)}
    return bool(named & {"Q", "K"}) or (isinstance(root, ast.Definition) and root.word != "pattern")


def _wants_vector(node: ast.Node) -> bool:
    match node:
        case ast.Binary("@"):
            return True
        case ast.Call(ast.Name(name)):
            return name in ("exp", "sin", "cos", "concat", "tanh", "sigmoid", "sum")
        case ast.Binary("/" | "*"):
            return True
    return False
