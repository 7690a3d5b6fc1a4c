"""`attndsl.create_block_mask` beside torch's eager one, for masks that others have written.

    python -m benchmarks.drop_in [--length 16384] [name part ...]

Masks of attention-gym and transformers at sizes of use. Equal lists in both orders are checked first, at an
odd length too; runs alternate, ours are the median of five, warm. Torch forms all pairs, gigabytes of them:
from 16,384 tokens on it runs once, for one batch row and head.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import attn_gym.masks as gym
import torch
import transformers.masking_utils as hf
from attn_gym.masks.document_mask import length_to_offsets
from attn_gym.masks.vsa import generate_vsa_padding_mask_mod
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import attndsl

LONG = 16_384
REQUIRED = {4096: (20, 8), LONG: (50, 8)}
"""Of the median, and of each."""
LISTS = [
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
]


class Case(NamedTuple):
    name: str
    mod: Callable[..., Any]
    batch: int = 1
    heads: int = 1
    queries: int | None = None


def lengths(n: int, mean: int) -> list[int]:
    """Of documents, n tokens together."""
    cuts = (
        torch.randperm(n - 1, generator=torch.Generator().manual_seed(0))[: n // mean - 1].sort().values + 1
    )
    edges = [0, *cuts.tolist(), n]
    return [b - a for a, b in itertools.pairwise(edges)]


def cases(n: int) -> Iterator[Case]:
    """Of n tokens, a power of 4."""
    side, documents = math.isqrt(n), lengths(n, 256)
    offsets = length_to_offsets(documents, "cpu")
    drawn = torch.Generator().manual_seed(1)
    yield Case("causal", gym.causal_mask)
    yield Case("sliding window", gym.generate_sliding_window(256))
    yield Case("prefix lm", gym.generate_prefix_lm_mask(1000))
    yield Case("dilated window", gym.generate_dilated_sliding_window(1024, 4))
    yield Case("batchified causal", gym.batchify_mask_mod(gym.causal_mask, n // 4))
    yield Case("documents, causal", gym.generate_doc_mask_mod(gym.causal_mask, offsets))
    yield Case("documents, window", gym.generate_doc_mask_mod(gym.generate_sliding_window(64), offsets))
    yield Case("packed documents", gym.generate_packed_causal_doc_mask_mod(offsets))
    parents = torch.arange(len(documents)) // 4 * 4
    yield Case("shared prefix", gym.generate_shared_prefix_mask_mod(offsets, parents))
    is_global = torch.zeros(n, dtype=torch.bool)
    is_global[torch.randint(0, n, (8,), generator=drawn)] = True
    yield Case("global window", gym.generate_global_sliding_window(256, is_global))
    yield Case("natten", gym.generate_natten(side, side, 13, 13))
    yield Case("tiled natten", gym.generate_tiled_natten(side, side, 13, 13, 8, 8))
    yield Case("morton natten", gym.generate_morton_natten(side, side, 13, 13))
    starts = torch.arange(0, n, 256)
    intervals = torch.stack([starts, starts + 256], 1)
    yield Case("vision cross attention", gym.generate_vision_cross_attention_mask_mod(intervals, 256))
    tree = gym.build_tree_ancestor_matrix([-1, *((i - 1) // 2 for i in range(1, 4096))], device="cpu")
    yield Case("jetspec tree", gym.generate_jetspec_tree_causal_mask_mod(n - 4096, tree), queries=4096)
    yield Case("jetspec training", gym.generate_jetspec_training_mask_mod(n // 2, 64))
    yield Case("block diffusion", gym.generate_block_diffusion_mask(n // 2, 32))
    yield Case("spatial heads", gym.generate_spatial_head_mask_mod(226, 13, n // 16, 2, True))
    yield Case("temporal heads", gym.generate_temporal_head_mask_mod(226, 13, n // 16, 2))
    yield Case("sta 2d", gym.generate_sta_mask_mod_2d((side, side), (24, 24), (8, 8)))
    yield Case("sta 3d", gym.generate_sta_mask_mod_3d((16, side // 4, side), (12, 24, 24), (4, 8, 8)))
    chosen = torch.rand(2, 4, n // 64, n // 64, generator=drawn).topk(8).indices
    yield Case("vsa", gym.generate_vsa_mask_mod(chosen, 64), 2, 4)
    sizes = torch.randint(32, 65, (n // 64,), generator=drawn)
    yield Case("vsa padding", generate_vsa_padding_mask_mod(sizes, 64))
    yield Case("hf causal", hf.causal_mask_function)
    yield Case("hf sliding", hf.sliding_window_causal_mask_function(512))
    yield Case("hf bidirectional sliding", hf.sliding_window_bidirectional_mask_function(512))
    pad = torch.tensor([0, n // 5])
    yield Case("hf chunked", hf.chunked_causal_mask_function(1024, pad), 2)
    seen = torch.arange(n) >= pad[:, None]
    yield Case("hf causal, padded", hf.and_masks(hf.causal_mask_function, hf.padding_mask_function(seen)), 2)
    rows = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents)).repeat(2, 1)
    packed = hf.and_masks(hf.causal_mask_function, hf.packed_sequence_mask_function(rows))
    yield Case("hf packed", packed, 2)
    groups = torch.where(rows % 3 == 0, rows, -1)
    yield Case("hf images", hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(groups)), 2)
    ranks = torch.cat([torch.arange(length) for length in documents]).repeat(2, 1)
    window = hf.sliding_window_causal_mask_function(64)
    yield Case("hf packed window", hf.packed_sequence_compatibility_function(window, ranks, rows), 2)


def same(ours: BlockMask, theirs: BlockMask) -> None:
    for name in LISTS:
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def seconds(work: Callable[[], BlockMask]) -> tuple[float, BlockMask]:
    start = time.perf_counter()
    made = work()
    return time.perf_counter() - start, made


def compared(case: Case, n: int) -> float:
    """Their time by ours."""
    arguments = (case.mod, *((1, 1) if n >= LONG else (case.batch, case.heads)))

    def theirs(n: int = n) -> BlockMask:
        return create_block_mask(*arguments, case.queries or n, n, device="cpu")

    def ours(n: int = n) -> BlockMask:
        return attndsl.create_block_mask(*arguments, case.queries or n, n, device="cpu")

    same(ours(999), theirs(999))
    first, expected = seconds(theirs)
    same(ours(), expected)
    times = [first]
    while len(times) < (1 if n >= LONG else 2):
        times.append(seconds(theirs)[0])
    pairs = [(spent, statistics.median(seconds(ours)[0] for _ in range(5))) for spent in times]
    ratio = statistics.median(spent / own for spent, own in pairs)
    print(
        f"{case.name:26} torch {pairs[-1][0] * 1e3:8.1f} ms, attndsl {pairs[-1][1] * 1e3:7.2f} ms,"
        f" ratio {ratio:6.0f}",
        flush=True,
    )
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    ratios = [
        compared(case, given.length)
        for case in cases(given.length)
        if not given.names or any(part in case.name for part in given.names)
    ]
    middle, least = statistics.median(ratios), min(ratios)
    print(f"{len(ratios)} masks at n = {given.length}: median {middle:.0f}, least {least:.0f}")
    median, each = REQUIRED.get(given.length, (0, 0))
    if middle < median or least < each:
        raise SystemExit(f"BELOW {median} of the median or {each} of each")


if __name__ == "__main__":
    main()
