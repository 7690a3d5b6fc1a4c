"""Every mask of transformers' masking_utils, T5's buckets, ALiBi's slopes and Longformer, against theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

import attndsl
from attndsl import expr as ir
from attndsl.execution.torch_eval import Env, evaluate
from attndsl.meaning import pointwise

hf = pytest.importorskip("transformers.masking_utils")
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model  # noqa: E402
from transformers.models.longformer.configuration_longformer import LongformerConfig  # noqa: E402
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention  # noqa: E402
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import (  # noqa: E402
    _apply_relative_key_position_encoding,
)

pytestmark = pytest.mark.oracle

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

PAD = [0, 3]
SEEN = np.arange(11) >= np.array(PAD)[:, None]
GROUP = np.array([[-1, 0, 0, 0, -1, 1, 1, -1, 2, 2, 2], [0, 0, 1, 1, 1, 1, -1, -1, 2, -1, 2]])
DOC = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2]])
RANK = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]])
GROUPS = "{ q, k : group[q] == group[k] and group[q] >= 0 }"


@dataclass(frozen=True)
class Case:
    """One mask function with its arguments, and `text`, which defines `m`. Tables are [2] or [2, 11]."""

    name: str
    text: str
    theirs: Callable[..., Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)

    def mask(self, nq: int, n: int, **offsets: int) -> NDArray[np.bool_]:
        """[B, nq, n]."""
        inputs = {name: np.asarray(value)[..., :n] for name, value in self.inputs.items()}
        found = attndsl.parse(self.text)["m"](**self.params).mask(n, nq, **offsets, **inputs)
        return np.broadcast_to(found.reshape(-1, nq, n), (2, nq, n))


MASKS = [
    Case("causal_mask_function", "pattern m = causal", hf.causal_mask_function),
    Case("bidirectional_mask_function", "pattern m = full", hf.bidirectional_mask_function),
    Case("sliding_window_overlay", "pattern m(w) = { q, k : k > q - w }",
         hf.sliding_window_overlay(3), {"w": 3}),
    Case("sliding_window_causal_mask_function", "pattern m(w) = last(w)",
         hf.sliding_window_causal_mask_function(3), {"w": 3}),
    Case("sliding_window_bidirectional_overlay", "pattern m(r) = radius(r)",
         hf.sliding_window_bidirectional_overlay(2), {"r": 2}),
    Case("sliding_window_bidirectional_mask_function", "pattern m(r) = radius(r)",
         hf.sliding_window_bidirectional_mask_function(4), {"r": 4}),
    Case("chunked_overlay",
         "attention m(c) { inputs pad : int[B]  mask { q, k : (q - pad) // c == (k - pad) // c } }",
         hf.chunked_overlay(4, torch.tensor(PAD)), {"c": 4}, {"pad": PAD}),
    Case("chunked_causal_mask_function",
         "attention m(c) { inputs pad : int[B]  mask causal & { q, k : (q - pad) // c == (k - pad) // c } }",
         hf.chunked_causal_mask_function(4, torch.tensor(PAD)), {"c": 4}, {"pad": PAD}),
    Case("blockwise_overlay", f"attention m {{ inputs group : int[B, n]  mask {GROUPS} }}",
         hf.blockwise_overlay(torch.tensor(GROUP)), inputs={"group": GROUP}),
    Case("padding_mask_function", "attention m { inputs seen : bool[B, n]  mask columns(seen) }",
         hf.padding_mask_function(torch.tensor(SEEN)), inputs={"seen": SEEN}),
    Case("packed_sequence_mask_function", "attention m { inputs doc : int[B, n]  mask documents(doc) }",
         hf.packed_sequence_mask_function(torch.tensor(DOC)), inputs={"doc": DOC}),
    Case("remap_positions_for_packed_sequence",
         "attention m(w) { inputs at : int[B, n]  mask { q, k : last(w)[at[q], at[k]] } }",
         hf.remap_positions_for_packed_sequence(
             hf.sliding_window_causal_mask_function(2), torch.tensor(RANK)),
         {"w": 2}, {"at": RANK}),
    Case("packed_sequence_compatibility_function",
         "attention m(w) { inputs doc : int[B, n]  mask within(doc, last(w)) }",
         hf.packed_sequence_compatibility_function(
             hf.sliding_window_causal_mask_function(2), torch.tensor(RANK), torch.tensor(DOC)),
         {"w": 2}, {"doc": DOC}),
    Case("and_masks", "pattern m = causal & radius(3)",
         hf.and_masks(hf.causal_mask_function, hf.sliding_window_bidirectional_overlay(3))),
    Case("or_masks", f"attention m {{ inputs group : int[B, n]  mask causal | {GROUPS} }}",
         hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(torch.tensor(GROUP))),
         inputs={"group": GROUP}),
]  # fmt: skip

MADE_OF_THEM = {
    "add_offsets_to_mask_function", "sdpa_mask", "eager_mask", "create_causal_mask",
    "create_bidirectional_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask",
    "create_bidirectional_sliding_window_mask", "create_masks_for_generate",
}  # fmt: skip

NO_MASK = {
    # two axes, for kernels and recurrent layers that know no pairs
    "flash_attention_mask", "create_recurrent_attention_mask",
    # a mask function handed to torch's create_block_mask, compiled
    "flex_attention_mask",
    # tables
    "prepare_padding_mask", "maybe_pad_block_sequence_ids", "find_packed_sequence_indices",
    "fast_all", "find_first_full_attention_index",
}  # fmt: skip


def test_nothing_is_left_out() -> None:
    offered = {
        name
        for name, value in vars(hf).items()
        if inspect.isfunction(value) and value.__module__ == hf.__name__ and not name.startswith("_")
    }
    assert offered == {case.name for case in MASKS} | MADE_OF_THEM | NO_MASK


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
@pytest.mark.parametrize("n", [1, 2, 6, 11])
def test_masks(case: Case, n: int) -> None:
    theirs = hf.sdpa_mask(2, n, n, mask_function=case.theirs, allow_is_causal_skip=False)
    assert (case.mask(n, n) == theirs.expand(2, 1, n, n)[:, 0].numpy()).all()
    eager = hf.eager_mask(2, n, n, mask_function=case.theirs)
    assert (case.mask(n, n) == (eager == 0).expand(2, 1, n, n)[:, 0].numpy()).all()


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
@pytest.mark.parametrize("n", [1, 6, 11])
def test_masks_are_read(case: Case, n: int) -> None:
    """As `from_mask_mod` does: the same pairs, and a text that says the same."""
    bound = attndsl.from_mask_mod(case.theirs, length=n, batch=2, heads=4)
    assert attndsl.parse(str(bound))[bound.name].attention == bound.attention
    theirs = create_mask(case.theirs, 2, 4, n, n, device="cpu").numpy()
    ours = bound.mask(n, heads=4)
    assert (np.broadcast_to(ours if ours.ndim == 4 else ours[None], theirs.shape) == theirs).all()


@pytest.mark.parametrize("case", [case for case in MASKS if not case.inputs], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("nq", "n", "q_offset", "k_offset"), [(1, 9, 8, 0), (3, 7, 6, 2), (4, 4, 11, 11), (5, 8, 0, 0)]
)
def test_offsets(case: Case, nq: int, n: int, q_offset: int, k_offset: int) -> None:
    theirs = hf.sdpa_mask(2, nq, n, q_offset, k_offset, case.theirs, allow_is_causal_skip=False)
    assert (case.mask(nq, n, q_offset=q_offset, k_offset=k_offset) == theirs[:, 0].numpy()).all()
    shifted = hf.add_offsets_to_mask_function(case.theirs, q_offset, k_offset)
    moved = hf.sdpa_mask(2, nq, n, mask_function=shifted, allow_is_causal_skip=False)
    assert (case.mask(nq, n, q_offset=q_offset, k_offset=k_offset) == moved[:, 0].numpy()).all()


CONFIG = SimpleNamespace(
    _attn_implementation="sdpa", is_causal=True, sliding_window=3, attention_chunk_size=4
)

MODELS = {
    "create_causal_mask": "mask causal",
    "create_sliding_window_causal_mask": "mask last(3)",
    "create_chunked_causal_mask": "mask causal & { q, k : (q - pad) // 4 == (k - pad) // 4 }",
    "create_bidirectional_mask": "",
    "create_bidirectional_sliding_window_mask": "mask radius(3)",
}


def skips_allowed(maker: str) -> dict[str, bool]:
    return {"allow_is_bidirectional_skip" if "bidirectional" in maker else "allow_is_causal_skip": False}


@pytest.mark.parametrize("maker", MODELS)
def test_left_padded_batches(maker: str) -> None:
    """What a model passes to its layers, from a batch that is padded on the left."""
    theirs = getattr(hf, maker)(
        CONFIG, torch.zeros(2, 11, 1), torch.tensor(SEEN), past_key_values=None, **skips_allowed(maker)
    )
    text = f"attention m {{ inputs pad : int[B]  {MODELS[maker]}  mask {{ q, k : k >= pad }} }}"
    assert (attndsl.parse(text)["m"].mask(11, pad=PAD)[:, 0] == theirs[:, 0].numpy()).all()


@pytest.mark.parametrize("maker", [maker for maker in MODELS if "bidirectional" not in maker])
def test_packed_documents_and_images(maker: str) -> None:
    """Positions that start anew begin a document; tokens of a group see each other, whatever the window."""
    embeddings, positions = torch.zeros(2, 11, 1), torch.tensor(RANK)
    make = getattr(hf, maker)
    theirs = make(CONFIG, embeddings, None, None, position_ids=positions)
    text = f"pattern R = {MODELS[maker].removeprefix('mask ').replace('pad', '0') or 'full'}"
    ours = attndsl.parse(text + "\nattention m { inputs doc : int[B, n]  mask within(doc, R) }")["m"]
    assert (ours.mask(11, doc=DOC)[:, 0] == theirs[:, 0].numpy()).all()
    theirs = make(CONFIG, embeddings, None, None, block_sequence_ids=torch.tensor(GROUP))
    ours = attndsl.parse(text + f"\nattention m {{ inputs group : int[B, n]  mask R | {GROUPS} }}")["m"]
    assert (ours.mask(11, group=GROUP)[:, 0] == theirs[:, 0].numpy()).all()


def test_masks_by_layer_type() -> None:
    config = SimpleNamespace(
        **vars(CONFIG), layer_types=["full_attention", "sliding_attention", "chunked_attention"]
    )
    config.get_text_config = lambda: config
    theirs = hf.create_masks_for_generate(config, torch.zeros(2, 11, 1), torch.tensor(SEEN), None)
    makers = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")
    for layer_type, maker in zip(config.layer_types, makers, strict=True):
        text = f"attention m {{ inputs pad : int[B]  {MODELS[maker]}  mask {{ q, k : k >= pad }} }}"
        assert (attndsl.parse(text)["m"].mask(11, pad=PAD)[:, 0] == theirs[layer_type][:, 0].numpy()).all()


def test_images() -> None:
    """In Gemma 3's local layers the window holds for images too; PaliGemma's image and prompt are a group."""
    program = attndsl.load(EXAMPLES / "paligemma.attn")
    theirs = create_masks_for_vision_model(
        CONFIG, torch.zeros(2, 11, 1), None, None, None, torch.tensor(GROUP)
    )
    for row in range(2):
        ours = program["gemma3_images"](w=3).mask(11, image=GROUP[row])
        assert (ours[0] == theirs["sliding_attention"][row, 0].numpy()).all()
    prefix = torch.where(torch.arange(11) < 7, 0, -1).expand(2, 11)
    theirs = hf.create_causal_mask(CONFIG, torch.zeros(2, 11, 1), None, None, block_sequence_ids=prefix)
    ours = program["paligemma"](images=4).mask(11, prompt=[3, 3])
    assert (ours == theirs.numpy()).all()


def numbers(text: str, n: int, **tables: Any) -> NDArray[Any]:
    [group] = attndsl.parse(f"attention m {{ {text} }}")["m"].attention.groups
    score = ir.substitute(group.score, {"s": ir.const(0.0)})
    at = {name: np.asarray(table) for name, table in tables.items()}
    return pointwise.evaluate(score, np.arange(n)[:, None], np.arange(n), at)


@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (64, 256), (16, 1000)])
def test_t5_buckets(buckets: int, far: int) -> None:
    """At every distance up to 1,000, in both directions."""
    distance = torch.arange(1001) - torch.arange(1001)[:, None]
    table = np.arange(float(buckets))
    for name, both in (("t5_bucket", True), ("t5_causal_bucket", False)):
        theirs = T5Attention._relative_position_bucket(distance, both, buckets, far)
        text = f"inputs table : float[buckets]  score s + table[{name}(k - q, {buckets}, {far})]"
        assert (numbers(text, 1001, table=table) == theirs.numpy()).all()


@pytest.mark.parametrize("heads", [8, 12, 16, 20])
def test_alibi_slopes(heads: int) -> None:
    """Bloom's bias counts from the first key, MPT's back from the last: the same once a row is normalised."""
    n = 9
    bloom = build_alibi_tensor(torch.ones(1, n), heads, torch.float32).view(heads, n).numpy()
    mpt = build_mpt_alibi_tensor(heads, n).view(heads, n).numpy()
    for head in range(heads):
        slope = numbers(f"score -slope({head}, base = 2 ** log2({heads})) * |q - k|", n)[-1]
        np.testing.assert_allclose(slope, bloom[head] - bloom[head, -1], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(slope, mpt[head] - mpt[head, -1], rtol=1e-6, atol=1e-6)


def test_relative_vectors() -> None:
    """Wav2Vec2-BERT's, by clipped distance: what they add to a logit that is 0."""
    n, heads, width = 90, 2, 6
    q, k, vectors = torch.randn(3, n, heads, width), torch.randn(3, n, heads, width), torch.randn(73, width)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    layer = SimpleNamespace(
        left_max_position_embeddings=64, right_max_position_embeddings=8, scaling=width**-0.5,
        distance_embedding=torch.nn.Embedding.from_pretrained(vectors),
    )  # fmt: skip
    _, theirs = _apply_relative_key_position_encoding(layer, q, k)
    [group] = attndsl.load(EXAMPLES / "wav2vec2_bert.attn")["wav2vec2_bert"].attention.groups
    values = {"q": torch.arange(n).view(-1, 1), "k": torch.arange(n), "D": torch.tensor(width)}
    values |= {"s": torch.zeros(()), "Q": q, "K": k}
    env = Env(values, {"table": vectors}, torch.float32, q.device)
    torch.testing.assert_close(evaluate(group.score, env), theirs)


@pytest.mark.parametrize("backend", ["reference", "torch", None])
@pytest.mark.parametrize("globals_", [[], [0], [0, 9, 30]])
def test_longformer(backend: str | None, globals_: list[int]) -> None:
    """Its global tokens given the projections of all others: one mask, one softmax."""
    n, window, heads, width = 48, 8, 2, 16
    config = LongformerConfig(
        hidden_size=heads * width, num_attention_heads=heads, attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = LongformerSelfAttention(config, layer_id=0).eval()
    for part in ("query", "key", "value"):
        getattr(layer, f"{part}_global").load_state_dict(getattr(layer, part).state_dict())
    hidden = 2 * torch.randn(2, n, heads * width)
    is_global = torch.zeros(2, n, dtype=torch.bool)
    is_global[:, globals_] = True
    theirs = layer(
        hidden, attention_mask=10_000.0 * is_global, is_index_masked=torch.zeros_like(is_global),
        is_index_global_attn=is_global, is_global_attn=bool(globals_),
    )[0]  # fmt: skip

    q, k, v = (
        getattr(layer, part)(hidden).view(2, n, heads, width).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    attention = attndsl.load(EXAMPLES / "longformer.attn")["longformer"](w=window, globals=globals_)
    plan = attndsl.compile(attention, length=n, batch=2, heads=heads, head_dim=width, backend=backend)
    ours = plan(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def projected(layer: LongformerSelfAttention, hidden: Tensor, role: str) -> list[Tensor]:
    """q, k and v [2, H, n, D] of a layer, by one of its two sets of projections."""
    named = (getattr(layer, f"{part}{role}")(hidden) for part in ("query", "key", "value"))
    return [x.view(2, -1, layer.num_heads, layer.head_dim).transpose(1, 2) for x in named]


WHOLE = LongformerConfig(
    hidden_size=32, num_attention_heads=2, attention_window=[8], attention_probs_dropout_prob=0.0
)


@pytest.mark.parametrize("backend", [None, "reference", "torch"])
def test_longformer_whole(backend: str | None) -> None:
    """With projections of its own for global tokens, which differ by batch row as padding does."""
    torch.manual_seed(0)
    layer = LongformerSelfAttention(WHOLE, layer_id=0).eval()
    hidden = 2 * torch.randn(2, 48, 32)
    among, seen = torch.zeros(2, 48, dtype=torch.bool), torch.ones(2, 48, dtype=torch.bool)
    among[0, [0, 17, 30]] = among[1, 0] = True
    seen[1, 41:] = False
    theirs = layer(
        hidden, attention_mask=10_000.0 * among.float() - 10_000.0 * (~seen).float(),
        is_index_masked=~seen, is_index_global_attn=among, is_global_attn=True,
    )[0]  # fmt: skip
    text = """
    pattern given(seen) = rows(seen) & columns(seen)
    attention local(w) {
        inputs among : bool[B, n]  seen : bool[B, n]
        mask ~rows(among) & given(seen) & (radius(w // 2) | columns(among))
    }
    attention global_ { inputs among : bool[B, n]  seen : bool[B, n]  mask rows(among) & given(seen) }
    attention longformer(w) = local(w) + global_
    """
    plan = attndsl.compile(
        attndsl.parse(text)["longformer"](w=8), length=48, batch=2, heads=2, head_dim=16, backend=backend
    )
    mine, own = (projected(layer, hidden, role) for role in ("", "_global"))
    ours = plan(*mine, global_=own, among=among, seen=seen)
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2), theirs, rtol=1e-5, atol=1e-5)


def test_the_example_with_projections_is_longformer_whole() -> None:
    torch.manual_seed(1)
    layer = LongformerSelfAttention(WHOLE, layer_id=0).eval()
    hidden = 2 * torch.randn(2, 48, 32)
    among = torch.zeros(2, 48, dtype=torch.bool)
    among[:, [0, 17]] = True
    theirs = layer(
        hidden, attention_mask=10_000.0 * among, is_index_masked=torch.zeros_like(among),
        is_index_global_attn=among, is_global_attn=True,
    )[0]  # fmt: skip
    program = attndsl.load(EXAMPLES / "longformer_projected.attn")
    bound = program["longformer_projected"](w=8, globals=[0, 17])
    plan = attndsl.compile(bound, length=48, batch=2, heads=2, head_dim=16)
    mine, own = (projected(layer, hidden, role) for role in ("", "_global"))
    ours = plan(*mine, global_=own).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (plan(*mine).transpose(1, 2).flatten(2) - theirs).abs().max() > 1e-2
