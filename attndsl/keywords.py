"""Arguments of calls that go by other names elsewhere, and what is said of those that there are not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from attndsl.errors import AttnError, fail, suggest

P = ParamSpec("P")
R = TypeVar("R")

DROPPED = "weights are not dropped: leave it out"
WINDOW = "the window is in the text: `mask causal & last(w)`"
TEXT_MASK = "the mask is in the text; one given at each call is `inputs m : bool[n, n]`, read by `m[q, k]`"
PADDING = "declare it: `inputs keep : bool[B, n]`, and write `mask columns(keep)`"
HABITS = {
    **dict.fromkeys(
        ("scale", "softmax_scale", "sm_scale", "scaling"), "write it into the text: `score Q @ K * 0.125`"
    ),
    **dict.fromkeys(("is_causal", "causal"), "write it into the text: `mask causal`"),
    **dict.fromkeys(("dropout_p", "dropout", "attn_dropout"), DROPPED),
    **dict.fromkeys(("attn_mask", "mask", "attention_mask", "block_mask", "mask_mod"), TEXT_MASK),
    **dict.fromkeys(("key_padding_mask", "padding_mask"), PADDING),
    **dict.fromkeys(
        ("attn_bias", "bias", "score_mod"), "write it into the text: `score s + bias[q, k]`, and declare it"
    ),
    **dict.fromkeys(("softcap", "logit_cap"), "write it into the text: `score softcap(30.0)`"),
    **dict.fromkeys(("window_size", "window", "sliding_window"), WINDOW),
    "alibi_slopes": "write it into the text: `score alibi`",
    "enable_gqa": "leave it out: `compile(..., kv_heads=...)` says how many heads k and v have",
}
"""What the text says, or nothing does."""
RENAMED = {
    **dict.fromkeys(
        ("seq_len", "seqlen", "max_length", "max_seq_len", "n", "L", "kv_len", "kv_length"), "length"
    ),
    **dict.fromkeys(("q_len", "nq", "query_length"), "q_length"),
    **dict.fromkeys(("num_heads", "n_heads", "nheads", "nhead", "n_head", "H"), "heads"),
    **dict.fromkeys(("num_kv_heads", "num_key_value_heads", "n_kv_heads", "kv_head"), "kv_heads"),
    **dict.fromkeys(
        ("head_size", "d_head", "dim_head", "head_dimension", "D", "d", "dim", "d_k"), "head_dim"
    ),
    **dict.fromkeys(("batch_size", "bsz", "B"), "batch"),
    **dict.fromkeys(("need_weights", "return_attn_probs", "output_attentions"), "return_weights"),
    **dict.fromkeys(("lse", "return_softmax_lse"), "return_lse"),
    **dict.fromkeys(("BLOCK_SIZE", "tile_size", "block"), "block_size"),
    **dict.fromkeys(("n_layers", "num_layers", "depth"), "layers"),
    **dict.fromkeys(("only", "part"), "parts"),
    "train": "training",
}
"""Arguments that have another name here."""


def instead(name: str, known: Iterable[str]) -> str:
    """The help for an argument that there is not: its name here, where else it is said, or one like it."""
    known = set(known)
    if RENAMED.get(name) in known:
        return f"write `{RENAMED[name]}=`"
    return HABITS.get(name) or suggest(name, known - {name})


def by_name(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments that do not fit are told as an AttnError, with what is written instead."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    places = len(signature.parameters) - len(named) - open_ended

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > places or not (open_ended or kwargs.keys() <= signature.parameters.keys()):
            raise _misfit(function.__name__, len(args) > places, kwargs, signature.parameters, named)
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in kwargs:
                near = next((f"write `{p.name}=`" for x in kwargs if RENAMED.get(x) == p.name), "")
                help = near or f"write `{function.__name__}(attention, {p.name}=4096)`"
                raise fail(f"`{function.__name__}` needs `{p.name}`", help=help)
        return function(*args, **kwargs)

    return called


def _misfit(
    name: str, too_many: bool, given: Iterable[str], known: Iterable[str], named: list[str]
) -> AttnError:
    if too_many:
        help = f"write `{name}(attention, {named[0]}=...)`"
        return fail(f"`{name}` takes sizes by their names", help=help)
    unknown = next(x for x in given if x not in known)
    help = instead(unknown, known) or f"there are {', '.join(f'`{x}`' for x in named)}"
    return fail(f"`{name}` has no argument `{unknown}`", help=help)
