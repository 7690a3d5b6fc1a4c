"""Arguments and attributes that go by other names elsewhere, and what is said of those that there are not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Never, ParamSpec, TypeVar

from attndsl.errors import AttnError, brief, fail, suggest

P = ParamSpec("P")
R = TypeVar("R")

DROPPED = "weights are not dropped: leave it out"
WINDOW = "the window is in the text: `mask causal & last(w)`"
TEXT_MASK = "the mask is in the text; one given at each call is `inputs m : bool[n, n]`, read by `m[q, k]`"
CACHE = "a cache of keys and values is `plan.session(batch, capacity)`"
DOCUMENTS = "declare documents: `inputs doc : int[n]`, and write `mask causal & documents(doc)`"
PADDING = "declare it: `inputs keep : bool[B, n]`, and write `mask columns(keep)`"
PLANNED = {"device": '"cuda"', "training": "True", "backend": '"cpu"'}
HABITS = {
    **dict.fromkeys(
        ("scale", "softmax_scale", "sm_scale", "scaling"), "write it into the text: `score Q @ K * 0.125`"
    ),
    **dict.fromkeys(("is_causal", "causal"), "write it into the text: `mask causal`"),
    **dict.fromkeys(("dropout_p", "dropout", "attn_dropout", "p"), DROPPED),
    **dict.fromkeys(("attn_mask", "mask", "attention_mask", "block_mask"), TEXT_MASK),
    "mask_mod": "read it: `attndsl.from_mask_mod(mask_mod)` is an attention",
    "score_mod": "read it: `attndsl.from_score_mod(score_mod)` is an attention",
    "key_padding_mask": f"{PADDING}; where that of torch is True a key is left out: `keep=~key_padding_mask`",
    "padding_mask": PADDING,
    **dict.fromkeys(("attn_bias", "bias"), "write it into the text: `score s + bias[q, k]`, and declare it"),
    **dict.fromkeys(("softcap", "logit_cap"), "write it into the text: `score softcap(30.0)`"),
    **dict.fromkeys(("window_size", "window", "sliding_window"), WINDOW),
    "alibi_slopes": "write it into the text: `score alibi`",
    **dict.fromkeys(("past_key_value", "past_key_values", "use_cache", "cache", "kv_cache"), CACHE),
    **dict.fromkeys(("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seq_lens"), DOCUMENTS),
    **dict.fromkeys(
        ("position_ids", "cache_position", "positions"),
        "a session knows them; to a plan give `q_positions=p, k_positions=p`; if they begin anew in each "
        "document, write `mask causal & documents(doc)`",
    ),
    **dict.fromkeys(("max_seqlen", "max_seqlen_q", "max_seqlen_k"), "leave it out: shapes say it"),
    **{name: f"it is the plan's: `compile(..., {name}={value})`" for name, value in PLANNED.items()},
    "start_pos": "leave it out: a session knows where its tokens stand",
    "enable_gqa": "leave it out: `compile(..., kv_heads=...)` says how many heads k and v have",
}
"""What the text says, or nothing does."""
ELSEWHERE = {
    "q": "query queries hidden_states x",
    "k": "key keys",
    "v": "value values",
    "length": "seq_len seqlen seq_length max_length max_len max_seq_len n L kv_len kv_length context_length",
    "capacity": "length seq_len max_length max_len max_seq_len max_cache_len max_tokens cache_size",
    "tokens": "lengths seq_lens seqlens lens num_tokens",
    "chunk": "chunk_size chunks",
    "q_length": "q_len nq query_length",
    "heads": "num_heads n_heads nheads nhead n_head H",
    "kv_heads": "num_kv_heads num_key_value_heads n_kv_heads kv_head",
    "width": "d_model model_dim hidden_size embed_dim embedding_dim n_embd dim",
    "head_dim": "head_size d_head dim_head head_dimension D d dim d_k",
    "batch": "batch_size bsz B",
    "return_weights": "need_weights return_attn_probs output_attentions return_attn return_attention",
    "return_lse": "lse return_softmax_lse",
    "block_size": "BLOCK_SIZE tile_size block",
    "layers": "n_layers num_layers depth",
    "parts": "only part",
    "training": "train requires_grad",
    "q_offset": "offset start_pos past_length",
    "v_dim": "value_dim d_v head_dim_v",
}
"""What arguments are called elsewhere, by their names here."""


class NoCall(ModuleType):
    """A module that has the name of a function or of a dictionary elsewhere."""

    def __call__(self, *args: object, **more: object) -> Never:
        raise fail(f"`{self.__name__}` is a module", help=self._instead(args[0] if args else None))

    def __getitem__(self, name: object) -> Never:
        raise fail(f"`{self.__name__}` is a module", help=self._instead(name))

    def _instead(self, name: object) -> str:
        if self.__name__ == "attndsl.examples":
            return f"write `attndsl.examples.{name if isinstance(name, str) else 'NAME'}`"
        return ATTRIBUTES["attndsl"]["attention"]


def renamed(name: str, known: Iterable[str]) -> str:
    """The argument, one of `known`, that has this name elsewhere, or ""."""
    known = set(known)
    return next((here for here, names in ELSEWHERE.items() if here in known and name in names.split()), "")


def instead(name: str, known: Iterable[str]) -> str:
    """The help for an argument that there is not: its name here, where else it is said, or one like it."""
    known = set(known)
    if here := renamed(name, known):
        return f"write `{here}=`"
    return HABITS.get(name) or suggest(name, known - {name})


NICKNAMES = {
    "float16": "half fp16 f16",
    "bfloat16": "bf16",
    "float32": "float fp32 f32 single",
    "float64": "double fp64 f64",
}
"""What the dtypes of a plan are called elsewhere, by their names here."""


def dtype_meant(name: str) -> str:
    """The dtype that goes by this name elsewhere, or ""."""
    return next((here for here, names in NICKNAMES.items() if name in names.split()), "")


def checked_dtype(dtype: object) -> str:
    """The name of a dtype, one of NICKNAMES. Raises AttnError for another."""
    name = (dtype.__name__ if isinstance(dtype, type) else str(dtype)).removeprefix("torch.")
    if name in NICKNAMES:
        return name
    near = dtype_meant(name)
    help = f"write `{near}`" if near else suggest(name, NICKNAMES)
    raise fail(f"`dtype` is {brief(name)}, and must be one of {', '.join(NICKNAMES)}", help=help)


USUAL = {"heads": 8, "width": 512}
"""Sizes that a help writes, where not 4096."""
CALLED = {"__call__": "plan", "forward": "module"}
"""How a reader writes a call of what these are methods of."""


def by_name(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments that do not fit are told as an AttnError, with what is written instead."""
    parameters = inspect.signature(function).parameters.values()
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    places = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    needed = tuple(p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        left = [name for name in needed[len(args) :] if name not in kwargs]
        if left or len(args) > len(places) or not (open_ended or kwargs.keys() <= {*known}):
            raise _misfit(function.__name__, left, len(args) > len(places), kwargs, known, places, needed)
        return function(*args, **kwargs)

    return called


def _misfit(
    name: str,
    left: list[str],
    too_many: bool,
    given: Iterable[str],
    known: Sequence[str],
    places: Sequence[str],
    needed: Sequence[str],
) -> AttnError:
    known, places, needed = ([x for x in names if x != "self"] for names in (known, places, needed))
    name = CALLED.get(name, name)
    written = ", ".join(x if x in places else f"{x}={USUAL.get(x, 4096)}" for x in needed)
    if too_many:
        other = next((x for x in known if x not in places), "")
        help = f"write the others by their names, such as `{other}=...`" if other else ""
        if name == "session":
            help = "write `plan.session(batch, capacity)`, and `session.step(q, k, v)`"
        elif name == "bind":
            help = "write tables by their names: `bind(doc=...)`"
        elif places[-1:] == ["v"]:
            help = f"a table has a name: `{name}(q, k, v, doc=...)`; the mask is in the text"
        return fail(f"`{name}` takes {_listed(places) or 'nothing'} by place", help=help)
    unknown = [x for x in given if x not in known]
    if left:
        near = [f"{here}=" for x in unknown if (here := renamed(x, left))]
        help = f"write {_listed(near)}" if near else f"write `{name}({written})`"
        return fail(f"`{name}` needs {_listed(left)}", help=help)
    named = [x for x in known if x not in places] or known
    listed = f"there are {', '.join(f'`{x}`' for x in named)}" if named else "leave it out"
    help = instead(unknown[0], known) or listed
    if name == "compile" and help.startswith("there are"):
        help += "; parameters are bound before, as `attention(w=8)`, and tables are given to the plan"
    elif name == "parse":
        help = 'parameters are bound after: `attndsl.parse(text)["NAME"](w=8)`'
    return fail(f"`{name}` has no argument `{unknown[0]}`", help=help)


def _listed(names: Sequence[str]) -> str:
    return " and ".join(
        filter(None, (", ".join(f"`{x}`" for x in names[:-1]), *(f"`{x}`" for x in names[-1:])))
    )


def _each(names: str, said: str) -> dict[str, str]:
    return {name: said.format(name) for name in names.split()}


DRAWN = "a notebook draws the value itself, and `attndsl show FILE:NAME --length 64 -o mask.svg` a file"
TRAINED = (
    "named_parameters buffers state_dict load_state_dict train eval requires_grad_ zero_grad apply "
    "named_modules children register_forward_hook"
)
SIZES = "length q_length batch heads kv_heads head_dim dtype device block_size training"
BACKENDS = {
    "flex_attention": 'write `backend="flex"`',
    **dict.fromkeys(("dense", "eager", "math", "naive"), 'write `backend="reference"`'),
    **dict.fromkeys(("cuda", "gpu"), 'it is a device: `compile(..., device="cuda")`'),
}
"""What is written in place of backends of other libraries."""
ATTRIBUTES = {
    "attndsl": {
        **_each(
            "flex_attention scaled_dot_product_attention attention sdpa MultiheadAttention",
            "a plan is called: `attndsl.compile(attention, length=...)(q, k, v)`",
        ),
        **_each("from_file open read load_file", "a file is read by `attndsl.load`"),
        **_each("loads from_string from_text parse_text", "a text is read by `attndsl.parse`"),
        **_each("plan lower jit build make", "a plan is made by `attndsl.compile`"),
        **_each("mask block_mask", 'write `program["NAME"].{}(length)`'),
        **_each("run attend", 'call the plan: `attndsl.compile(program["NAME"], length=...)(q, k, v)`'),
        **_each("show plot draw", DRAWN),
        **_each("check", "write `program.check()`"),
        **_each("diff equal", "write an assertion, `assert a == b`, or use the command `attndsl diff`"),
        **_each("report", "write `attndsl.analyze`"),
    },
    "a program": {
        **_each("keys values items get list definitions", "write `program.names`, and `program[name]`"),
        **_each("compile analyze", 'write `attndsl.{}(program["NAME"], length=...)`'),
        **_each("mask counts block_mask graph inputs", 'write `program["NAME"].{}`'),
        **_each("show plot draw", DRAWN),
        **_each("prove", "write `program.check()`"),
    },
    "an attention": {
        **_each("compile analyze", "write `attndsl.{}(attention, length=...)`"),
        **_each("plan lower run session", "`attndsl.compile(attention, length=...)` makes a plan"),
        **_each("show plot draw save to_svg savefig", DRAWN),
        **_each("to_dense dense numpy to_numpy matrix", "write `attention.mask(length)`"),
        **_each("to_block_mask mask_mod score_mod", "FlexAttention's are in `attention.to_flex(length)`"),
        **_each("params args arguments", "write `attention.parameters`"),
        **_each("heads head_dim length batch", "write `attndsl.compile(attention, {}=...)`"),
        **_each(TRAINED, "`attndsl.compile(attention, length=...).module()` is an nn.Module, which has it"),
    },
    "a plan": {
        **_each(
            f"{TRAINED} parameters compile",
            "write `plan.module()`, an nn.Module, which has it",
        ),
        **_each(
            "to cuda cpu",
            'compile for another device: `compile(..., device="cuda")`; tensors may be of any dtype',
        ),
        **_each("half float double bfloat16", "leave it out: a plan takes tensors of any dtype"),
        **_each("forward run", "call it: `plan(q, k, v)`"),
        **_each("mask block_mask show plot draw", "its tiles are `plan.block_masks`"),
        **_each("mask_mod score_mod", "FlexAttention's are in `plan.to_flex()`"),
        **_each("step prefill decode generate cache kv_cache", CACHE),
        **_each(SIZES, "write `plan.problem.{}`"),
        **_each("name inputs", "write `plan.attention.{}`"),
        **_each("learned weight weights", "`plan.module()` owns what is learned"),
        **_each("explain why summary", "write `print(plan)`"),
        **_each("analyze", "write `attndsl.analyze(plan.attention, length=...)`"),
        **_each("backward", "call it on the loss"),
        **_each("save to_file dump", "a plan is made anew: `torch.save(plan.module().state_dict(), path)`"),
        **_each("nnz density flops", "write `attndsl.analyze(plan.attention, length=...).{}`"),
    },
    "a stack": {
        **_each("module to_module nn", "write `attndsl.build(stack, width=..., heads=..., length=...)`"),
        **_each("analyze cost report counts", "write `attndsl.depth(stack, length=..., ...)`"),
        **_each("mask block_mask show plot draw", 'an attention has it: `program["NAME"].mask(length)`'),
        **_each("session compile run forward", "write `attndsl.build(stack, ...)`, and use the module"),
        **_each("layers depth num_layers n_layers", "write `len(stack.turns)`"),
    },
    "a report": {
        **_each("flop", "write `report.flops.forward`"),
        **_each("sparsity", "write `1 - report.density`"),
        **_each("memory traffic", "write `report.bytes.forward`; of a cache `report.kv_cache`"),
        **_each("time seconds latency runtime", "write `report.lowerings`, predicted for each backend"),
        **_each("roofline rooflines", "write `report.machines`"),
        **_each("keys items values get to_json json as_dict dict", "write `report.to_dict()`"),
        **_each("save write html to_html", "a page is written by `attndsl report FILE -o page.html`"),
        **_each("show plot draw summary", "write `print(report)`"),
    },
    "a session": {
        **_each("reset clear empty", "write `session.truncate(0)`"),
        **_each("crop trim rollback pop rewind_to", "write `session.truncate(lengths)`"),
        **_each("clone fork", "write `session.copy()`"),
        **_each("append update add decode generate forward run", "write `session.step(q, k, v)`"),
        **_each("get_seq_length seq_len seq_length length position seen_tokens", "write `session.lengths`"),
        **_each("reorder_cache select index_select batch_select_indices", "write `session.reorder(rows)`"),
        **_each("capacity", "write `session.most`"),
        **_each(
            "to cuda cpu half float",
            'it is where the plan is: `compile(..., device="cuda")`, and has its dtype',
        ),
    },
    "a block mask": {
        **_each("numpy to_numpy dense to_torch to_tensor tensor", "write `block_mask.to_dense()`"),
        **_each("show plot draw", DRAWN),
    },
}
"""What is written in place of attributes that there are not, by what has them not."""


def missing(owner: str, name: str, known: Iterable[str]) -> AttributeError:
    """What is raised for an attribute that there is not, with what is written instead."""
    public = [other for other in known if not other.startswith("_")]
    help = "" if name.startswith("_") else ATTRIBUTES[owner].get(name) or suggest(name, public)
    return AttributeError(f"{owner} has no attribute `{name}`" + (f": {help}" if help else ""))
