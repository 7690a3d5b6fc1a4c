"""Every mask and score of attention-gym, written in the language, against the original."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import attndsl
from attndsl.execution.torch_eval import Env, evaluate

gym = pytest.importorskip("attn_gym.masks")
mods = pytest.importorskip("attn_gym.mods")
from attn_gym.masks.causal import create_causal_block_mask_fast  # noqa: E402
from attn_gym.masks.document_mask import length_to_offsets  # noqa: E402
from attn_gym.masks.vsa import generate_vsa_padding_mask_mod  # noqa: E402
from torch.nn.attention.flex_attention import create_block_mask, create_mask, noop_mask  # noqa: E402

pytestmark = pytest.mark.oracle


@dataclass(frozen=True)
class Case:
    """One of attention-gym's masks with its arguments, and `text`, which defines `m`.

    sizes: (q_length, length) of the comparisons; params and inputs are what `m` takes.
    """

    name: str
    text: str
    theirs: Callable[..., Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (7, 7), (16, 16), (33, 33))
    batch: int = 1
    heads: int = 1

    @property
    def ours(self) -> Any:
        return attndsl.parse(self.text)["m"](**self.params)


def square(*lengths: int) -> tuple[tuple[int, int], ...]:
    return tuple((n, n) for n in lengths)


DOC_LENGTHS = [3, 1, 5, 2, 4]
DOC = np.repeat(np.arange(5), DOC_LENGTHS)
OFFSETS = length_to_offsets(DOC_LENGTHS, "cpu")
PARENT = [0, 0, 2, 2, 2]
GLOBALS = [i in (0, 4, 11) for i in range(33)]
INTERVALS = [[0, 4], [2, 4], [5, 9]]
ANCESTORS = gym.build_tree_ancestor_matrix([-1, 0, 1, 1, 3, 3, 0], device="cpu")
CHOSEN = [[[[0, 3], [1, 1], [4, 2], [3, 0], [2, 4]], [[2, 0], [3, 4], [0, 1], [1, 2], [4, 0]]]]
TILE_SIZES = [4, 4, 3, 4, 1]

VSA = """attention m(t) {
    inputs chosen : int[B, H, tiles, top]  real : int[tiles]
    mask blocks(t, { q, k : k in chosen[q] }) & { q, k : k mod t < real[k // t] }
}"""

SPATIAL = """
pattern m(p, f, sink, w, c) =
    rows(0 .. p - 1) | columns(0 .. p + sink * f - 1) | radius(w * f // c * c - 1)
"""

STA = """
let left(x) = x // 2
let right(x) = (x - 1) // 2
let moved(p, c, x) = clamp(p, left(x), c - 1 - right(x))
let shown(p, c, x) = moved(p, c, x) - left(x) .. moved(p, c, x) + right(x)
pattern text(v, t) = { q, k : k < v + t and (q >= v or k >= v) }
"""

MASKS = [
    Case("causal_mask", "pattern m = causal", gym.causal_mask),
    Case("batchify_mask_mod", "pattern m(b) = within(b, causal)",
         gym.batchify_mask_mod(gym.causal_mask, 5), {"b": 5}),
    Case("batchify_mask_mod", "pattern m(b) = within(b, full)",
         gym.batchify_mask_mod(noop_mask, 4), {"b": 4}),
    Case("generate_block_diffusion_mask",
         """pattern m(l, b) = blocks(b, { q, k : q == k and k < l // b })
                | { q, k : k >= l and q mod l // b - k mod l // b >= 1 - q // l }""",
         gym.generate_block_diffusion_mask(12, 3), {"l": 12, "b": 3}, sizes=square(24)),
    Case("generate_block_diffusion_mask",
         """pattern m(l, b) = { q, k : q // l == k // l and q mod l // b == k mod l // b }
                | { q, k : k >= l and q mod l // b - k mod l // b >= 1 - q // l }""",
         gym.generate_block_diffusion_mask(11, 4), {"l": 11, "b": 4}, sizes=square(22)),
    Case("generate_dilated_sliding_window", "pattern m(w, d) = band(-w .. w, step = d)",
         gym.generate_dilated_sliding_window(6, 3), {"w": 6, "d": 3}),
    Case("generate_doc_mask_mod", "attention m { inputs doc : int[n]  mask within(doc, band(-2 .. 0)) }",
         gym.generate_doc_mask_mod(gym.generate_sliding_window(2), OFFSETS),
         inputs={"doc": DOC}, sizes=square(15)),
    Case("generate_packed_causal_doc_mask_mod",
         "attention m { inputs doc : int[n]  mask causal & documents(doc) }",
         gym.generate_packed_causal_doc_mask_mod(OFFSETS), inputs={"doc": DOC}, sizes=square(15)),
    Case("generate_vision_cross_attention_mask_mod",
         """attention m(t) {
                offset 0  inputs lo : int[images]  hi : int[images]
                mask { q, k : lo[k // t] <= q < hi[k // t] }
            }""",
         gym.generate_vision_cross_attention_mask_mod(torch.tensor(INTERVALS), 4), {"t": 4},
         {"lo": [lo for lo, _ in INTERVALS], "hi": [hi for _, hi in INTERVALS]},
         sizes=((9, 12), (12, 12), (13, 12))),
    Case("generate_global_sliding_window",
         "attention m(r) { inputs g : bool[n]  mask radius(r) | global(g) }",
         gym.generate_global_sliding_window(3, torch.tensor(GLOBALS)),
         {"r": 3}, {"g": GLOBALS}, sizes=square(33)),
    Case("generate_jetspec_tree_causal_mask_mod",
         """attention m(p) {
                offset 0  inputs ancestor : bool[nodes, nodes]
                mask { q, k : k < p or ancestor[q, k - p] }
            }""",
         gym.generate_jetspec_tree_causal_mask_mod(5, ANCESTORS), {"p": 5}, {"ancestor": ANCESTORS.numpy()},
         sizes=((7, 12), (3, 12), (7, 9))),
    Case("generate_jetspec_training_mask_mod",
         "attention m(p, b) { offset 0  mask { q, k : k < p or q // b == (k - p) // b and k - p <= q } }",
         gym.generate_jetspec_training_mask_mod(5, 4), {"p": 5, "b": 4}, sizes=((12, 17), (3, 8), (11, 16))),
    Case("generate_natten", "pattern m(side, a, b) = natten(side, side, a, b)",
         gym.generate_natten(6, 6, 3, 5), {"side": 6, "a": 1, "b": 2}, sizes=square(36, 31)),
    Case("generate_tiled_natten",
         """pattern m(h_, w_, a, b, th, tw) = grid(h_ // th, w_ // tw, th, tw, { (Y, X, y, x), (V, U, v, u) :
                near(V * th + v, Y * th + y, h_, a) == 1 and near(U * tw + u, X * tw + x, w_, b) == 1 })
            let near(v, y, side, a) = where(|v - clamp(y, a, side - 1 - a)| <= a, 1, 0)""",
         gym.generate_tiled_natten(W=6, H=8, K_W=5, K_H=3, T_W=3, T_H=2),
         {"h_": 8, "w_": 6, "a": 1, "b": 2, "th": 2, "tw": 3}, sizes=square(48, 37)),
    Case("generate_morton_natten",
         """let x(p) = p mod 2 + 2 * (p // 4 mod 2) + 4 * (p // 16 mod 2)
            let y(p) = x(p // 2)
            pattern m(side, a, b) = { q, k : |x(k) - clamp(x(q), a, side - 1 - a)| <= a
                                         and |y(k) - clamp(y(q), b, side - 1 - b)| <= b }""",
         gym.generate_morton_natten(8, 8, 5, 3), {"side": 8, "a": 2, "b": 1}, sizes=square(64, 63, 16)),
    Case("generate_prefix_lm_mask", "pattern m(p) = prefix_lm(p)", gym.generate_prefix_lm_mask(4), {"p": 4}),
    Case("generate_shared_prefix_mask_mod",
         """attention m {
                inputs doc : int[n]  parent : int[docs]
                mask causal & documents(doc) | { q, k : doc[k] == parent[doc[q]] and doc[k] != doc[q] }
            }""",
         gym.generate_shared_prefix_mask_mod(OFFSETS, torch.tensor(PARENT)),
         inputs={"doc": DOC, "parent": PARENT}, sizes=square(15)),
    Case("generate_sliding_window", "pattern m(w) = band(-w .. 0)", gym.generate_sliding_window(3), {"w": 3}),
    Case("generate_spatial_head_mask_mod", SPATIAL, gym.generate_spatial_head_mask_mod(3, 4, 5, 2, True, 4),
         {"p": 3, "f": 5, "sink": 1, "w": 2, "c": 4}),
    Case("generate_spatial_head_mask_mod", SPATIAL, gym.generate_spatial_head_mask_mod(2, 4, 7, 1, False, 3),
         {"p": 2, "f": 7, "sink": 0, "w": 1, "c": 3}),
    Case("generate_temporal_head_mask_mod",
         "pattern m(p, f, w) = global(0 .. p - 1) | { q, k : |(q - p) mod f - (k - p) mod f| < w }",
         gym.generate_temporal_head_mask_mod(3, 4, 7, 2), {"p": 3, "f": 7, "w": 2 * 7 // 4}),
    Case("generate_sta_mask_mod_2d",
         STA + """pattern m(t, h_, w_, a, b, tokens) = text(t * h_ * w_, tokens) | blocks(t, grid(h_, w_,
                { (y, x), (v, u) : v in shown(y, h_, a) and u in shown(x, w_, b) }))""",
         gym.generate_sta_mask_mod_2d((8, 10), (4, 6), (2, 2), 5),
         {"t": 4, "h_": 4, "w_": 5, "a": 2, "b": 3, "tokens": 5}, sizes=square(80, 88, 73)),
    Case("generate_sta_mask_mod_3d",
         STA + """pattern m(t, d, h_, w_, c, a, b, tokens) = text(t * d * h_ * w_, tokens)
                | blocks(t, grid(d, h_, w_, { (z, y, x), (i, v, u) :
                    i in shown(z, d, c) and v in shown(y, h_, a) and u in shown(x, w_, b) }))""",
         gym.generate_sta_mask_mod_3d((4, 4, 6), (2, 3, 4), (2, 1, 2), 3),
         {"t": 4, "d": 2, "h_": 4, "w_": 3, "c": 1, "a": 3, "b": 2, "tokens": 3}, sizes=square(96, 101, 85)),
    Case("generate_vsa_mask_mod",
         """attention m(t) {
                inputs chosen : int[B, H, tiles, top]
                mask blocks(t, { q, k : k in chosen[q] })
            }""",
         gym.generate_vsa_mask_mod(torch.tensor(CHOSEN), 4), {"t": 4}, {"chosen": CHOSEN},
         sizes=square(20, 17), heads=2),
    Case("generate_vsa_mask_mod", VSA,
         gym.generate_vsa_mask_mod(torch.tensor(CHOSEN), 4, torch.tensor(TILE_SIZES)),
         {"t": 4}, {"chosen": CHOSEN, "real": TILE_SIZES}, sizes=square(20), heads=2),
    Case("generate_vsa_padding_mask_mod",
         "attention m(t) { inputs real : int[tiles]  mask { q, k : k mod t < real[k // t] } }",
         generate_vsa_padding_mask_mod(torch.tensor(TILE_SIZES), 4),
         {"t": 4}, {"real": TILE_SIZES}, sizes=square(20, 19)),
]  # fmt: skip

BLOCK_MASKS = {
    "create_causal_block_mask_fast",
    "create_vsa_block_mask",
    "create_vsa_flash_block_mask",
}

SCORES = {
    "generate_alibi_bias",
    "generate_graphormer_edge_bias",
    "generate_graphormer_spatial_bias",
    "generate_mla_rope_score_mod",
    "generate_sandwich_bias",
    "generate_tanh_softcap",
}

NO_MASK_NOR_SCORE = {
    "main",
    # inputs of masks and scores
    "build_tree_ancestor_matrix", "length_to_offsets", "generate_random_lengths", "shortest_path_distances",
    "shortest_path_edge_types", "create_vsa_tile_metadata", "validate_vsa_block_mask_inputs",
    "vsa_topk_from_sparsity",
    # integers to bits and back
    "interleave_bits_32", "deinterleave_bits_32", "morton_encode", "morton_decode",
    # modules around an attention: what VSA selects, pools and mixes
    "tile_vsa_sequence", "untile_vsa_sequence", "pool_to_vsa_tiles", "compute_vsa_tile_scores",
    "force_self_into_topk", "compute_vsa_topk_indices", "compute_vsa_coarse_attention",
    "lift_vsa_tile_output", "vsa_additive_combine", "vsa_gated_mix",
    # another normaliser in the clothes of a score: what `norm` says here
    "generate_activation_score_mod", "undo_softmax",
}  # fmt: skip


def test_nothing_is_left_out() -> None:
    offered = {
        name
        for package in (gym, mods)
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + ".")
        for name, value in vars(import_module(module.name)).items()
        if inspect.isfunction(value) and value.__module__ == module.name and not name.startswith("_")
    }
    assert offered == {case.name for case in MASKS} | BLOCK_MASKS | SCORES | NO_MASK_NOR_SCORE


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_masks(case: Case) -> None:
    for nq, n in case.sizes:
        theirs = create_mask(case.theirs, case.batch, case.heads, nq, n, device="cpu").numpy()
        inputs = {name: value[:n] if name in ("doc", "g") else value for name, value in case.inputs.items()}
        ours = case.ours.mask(n, nq, q_offset=0, heads=case.heads, **inputs)
        assert ours.any()
        assert (np.broadcast_to(ours.reshape(-1, nq, n), theirs.shape[1:]) == theirs[0]).all()


@pytest.mark.parametrize("case", MASKS, ids=lambda case: case.name)
def test_masks_are_read(case: Case) -> None:
    """As `from_mask_mod` does: the same pairs, a text that says the same, and torch's lists of blocks."""
    batch, heads = (case.batch, case.heads) if case.heads > 1 else (2, 4)
    nq, n = case.sizes[-1]
    bound = attndsl.from_mask_mod(case.theirs, length=n, q_length=nq, batch=batch, heads=heads)
    assert attndsl.parse(str(bound))[bound.name].attention == bound.attention
    theirs = create_mask(case.theirs, batch, heads, nq, n, device="cpu").numpy()
    ours = bound.mask(n, nq, heads=heads)
    assert (np.broadcast_to(ours if ours.ndim == 4 else ours[None], theirs.shape) == theirs).all()
    arguments = (case.theirs, batch, heads, nq, n, "cpu", 8)
    made, expected = attndsl.create_block_mask(*arguments), create_block_mask(*arguments)
    for which in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        for name in (which, f"full_{which}"):
            assert torch.equal(getattr(made, name), getattr(expected, name))


def test_natten_on_a_canvas_that_is_not_square() -> None:
    """attention-gym divides an index by the width and clamps the row to the width: wrong off squares.
    Here the definition is what counts: as many keys for each query, nearest to it, on the canvas."""
    rows, columns = 5, 8
    mask = attndsl.parse("pattern m = natten(5, 8, 1, 2)")["m"].mask(rows * columns)[0]
    assert (mask.sum(1) == 3 * 5).all()
    y, x = np.divmod(np.arange(rows * columns), columns)
    top, left = np.clip(y - 1, 0, rows - 3)[:, None], np.clip(x - 2, 0, columns - 5)[:, None]
    assert (mask == ((top <= y) & (y < top + 3) & (left <= x) & (x < left + 5))).all()
    theirs = create_mask(gym.generate_natten(columns, rows, 5, 3), 1, 1, 40, 40, device="cpu")[0, 0].numpy()
    assert (theirs != mask).any(), "attention-gym mended it: compare with it above"


@pytest.mark.parametrize("n", [256, 300, 257])
def test_causal_block_mask(n: int) -> None:
    """Tiles of a last row that sticks out are full to attention-gym, partial to torch and attndsl."""
    ours, theirs = (
        attndsl.parse("")["causal"].block_mask(n, 64),
        create_causal_block_mask_fast(1, 1, n, n, "cpu", 64),
    )
    assert (ours.to_dense()[0, 0] == dense(theirs)).all()
    if n % 64 == 0:
        assert_same_tiles(ours, theirs)


def test_causal_block_mask_with_blocks_that_are_not_square() -> None:
    """attention-gym takes block i of the queries to end with block i of the keys, whatever their sizes."""
    theirs = create_causal_block_mask_fast(1, 1, 256, 256, "cpu", (128, 64))
    right = attndsl.parse("")["causal"].block_mask(256, 64).to_dense()[0, 0]
    assert (right == np.tri(256, dtype=bool)).all()
    assert (dense(theirs) != right).any(), "attention-gym mended it: compare with it above"


def test_vsa_block_masks() -> None:
    chosen, real = torch.tensor(CHOSEN), torch.tensor([16 * size for size in TILE_SIZES])
    ours = attndsl.parse(VSA)["m"](t=64).block_mask(320, 64, heads=2, chosen=CHOSEN, real=real.numpy())
    theirs = gym.create_vsa_block_mask(chosen.unique_consecutive(dim=-1), 64, 5, real)
    assert (ours.to_dense()[0] == np.stack([dense(theirs, head) for head in range(2)])).all()
    halves = gym.create_vsa_flash_block_mask(chosen, 64, 5, 32, real)
    assert (ours.to_dense()[0] == np.stack([dense(halves, head) for head in range(2)])).all()


def dense(mask: Any, head: int = 0) -> NDArray[np.bool_]:
    """What a BlockMask of torch says: full tiles, and partial ones under its mask_mod."""
    rows, columns = mask.seq_lengths
    found = np.zeros((rows, columns), bool)
    tall, wide = mask.BLOCK_SIZE
    mod = mask.mask_mod or noop_mask
    allowed = create_mask(mod, 1, head + 1, rows, columns, device="cpu")[0, head].numpy()
    for kinds, inside in (((mask.kv_num_blocks, mask.kv_indices), allowed),
                          ((mask.full_kv_num_blocks, mask.full_kv_indices), None)):  # fmt: skip
        counts, indices = (kind[0, head] for kind in kinds)
        for i, count in enumerate(counts.tolist()):
            for j in indices[i, :count].tolist():
                place = np.s_[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide]
                found[place] = True if inside is None else inside[place]
    return found


def assert_same_tiles(ours: Any, theirs: Any) -> None:
    mine = ours.to_flex()
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        assert rows_of(mine, counts, indices) == rows_of(theirs, counts, indices)


def rows_of(mask: Any, counts: str, indices: str) -> list[list[int]]:
    rows = zip(getattr(mask, counts)[0, 0].tolist(), getattr(mask, indices)[0, 0].tolist(), strict=True)
    return [sorted(row[:count]) for count, row in rows]


TILED = [case for case in MASKS if not case.inputs and case.sizes[0][0] == case.sizes[0][1]]


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
def test_tiles_are_those_of_torch(case: Case) -> None:
    """Partial and full tiles as `create_block_mask` finds them, ragged ends included."""
    for n, _ in case.sizes:
        theirs = create_block_mask(case.theirs, 1, 1, n, n, device="cpu", BLOCK_SIZE=8)
        assert_same_tiles(case.ours.block_mask(n, 8), theirs)


HEADS, LENGTH, DIM = 4, 13, 6


def their_logits(score_mod: Callable[..., Tensor], logits: Tensor) -> Tensor:
    """What FlexAttention makes of a score_mod: one number at a time."""
    batch, heads, nq, n = logits.shape
    for dims in (
        (0, None, None, None, 0),
        (0, None, None, 0, None),
        (0, None, 0, None, None),
        (0, 0, None, None, None),
    ):
        score_mod = torch.vmap(score_mod, in_dims=dims)
    places = (torch.arange(size) for size in (batch, heads, nq, n))
    return score_mod(logits, *places)


def our_logits(text: str, logits: Tensor, **tables: Tensor) -> Tensor:
    batch, heads, nq, n = logits.shape
    [group] = attndsl.parse(f"attention m {{ {text} }}")["m"].attention.groups
    sizes = {"n": n, "nq": nq, "H": heads, "D": DIM}
    values = {
        "s": logits,
        "q": torch.arange(nq).view(-1, 1),
        "k": torch.arange(n),
        "b": torch.arange(batch).view(-1, 1, 1, 1),
        "h": torch.arange(heads).view(-1, 1, 1),
    } | {name: torch.tensor(size) for name, size in sizes.items()}
    return evaluate(group.score, Env(values, tables, logits.dtype, logits.device)).expand(logits.shape)


@pytest.fixture
def logits() -> Tensor:
    return 5 * torch.randn(2, HEADS, LENGTH, LENGTH, dtype=torch.float64, generator=torch.manual_seed(0))


def test_alibi(logits: Tensor) -> None:
    theirs = their_logits(mods.generate_alibi_bias(HEADS), logits)
    torch.testing.assert_close(our_logits("score s + (k - q) * slope(h)", logits), theirs)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    torch.testing.assert_close(our_logits("score alibi", logits)[..., causal], theirs[..., causal])


def test_softcap(logits: Tensor) -> None:
    torch.testing.assert_close(
        our_logits("score softcap(3)", logits), their_logits(mods.generate_tanh_softcap(3), logits)
    )


def test_sandwich(logits: Tensor) -> None:
    theirs = their_logits(mods.generate_sandwich_bias(HEADS, LENGTH), logits)
    torch.testing.assert_close(our_logits("score sandwich", logits), theirs, rtol=1e-6, atol=1e-5)


def test_latent_attention(logits: Tensor) -> None:
    """Vectors have the head's dimension here: the rotary part of DeepSeek's, which is shorter, is padded."""
    q = torch.randn(2, HEADS, LENGTH, DIM, dtype=torch.float64)
    k = torch.randn(2, 1, LENGTH, DIM, dtype=torch.float64)
    theirs = their_logits(mods.generate_mla_rope_score_mod(q[..., :3], k[..., :3], HEADS, 0.5), logits)
    k[..., 3:] = 0
    text = "inputs qr : float[B, H, nq, D]  kr : float[B, n, D]  score s + 0.5 * (qr[q] @ kr[k])"
    torch.testing.assert_close(our_logits(text, logits, qr=q, kr=k[:, 0]), theirs)


def graph() -> Tensor:
    """Two paths and an isolated node."""
    adjacency = torch.zeros(2, LENGTH, LENGTH, dtype=torch.bool)
    for i in range(LENGTH - 2):
        if i != 6:
            adjacency[:, i, i + 1] = adjacency[:, i + 1, i] = True
    adjacency[1, 0, 5] = adjacency[1, 5, 0] = True
    return adjacency


def test_graphormer(logits: Tensor) -> None:
    distances = mods.shortest_path_distances(graph(), 4)
    bias = torch.randn(HEADS, 6, dtype=torch.float64)
    theirs = their_logits(mods.generate_graphormer_spatial_bias(bias, distances), logits)
    text = "inputs bias : float[H, distances]  d : int[B, n, n]  score s + bias[d[q, k]]"
    torch.testing.assert_close(our_logits(text, logits, bias=bias, d=distances), theirs)

    types = torch.randint(0, 3, (2, LENGTH, LENGTH), generator=torch.manual_seed(1))
    path, lengths = mods.shortest_path_edge_types(graph(), types, 2)
    weights = torch.randn(HEADS, 2, 3, dtype=torch.float64)
    theirs = their_logits(mods.generate_graphormer_edge_bias(weights, path, lengths), logits)
    text = """inputs w : float[H, steps, types]  path : int[B, n, n, steps]  hops : int[B, n, n]
              score s + (where(hops[q, k] > 0, w[0, path[q, k, 0]], 0.0)
                         + where(hops[q, k] > 1, w[1, path[q, k, 1]], 0.0)) / max(hops[q, k], 1)"""
    torch.testing.assert_close(our_logits(text, logits, w=weights, path=path, hops=lengths), theirs)
