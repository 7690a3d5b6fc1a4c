"""KV caches and sequence shards against their definitions, counted key by key."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import shipped
from numpy.typing import NDArray
from programs import program
from shipped import EXAMPLES

import attndsl
from attndsl.analysis import eviction
from attndsl.analysis.decode import kv_cache
from attndsl.analysis.holding import Cache
from attndsl.analysis.shards import SCHEMES, shards
from attndsl.attention import Attention
from attndsl.bound import Bound
from attndsl.errors import AttnError
from attndsl.expr import Table

RULES = {
    "adaptive_span": "keep the last 8193 keys",
    "alibi:alibi_lm": "keep everything",
    "alibi_blocks": "keep the current block of 64, restarting every 64 tokens",
    "alphafold": "keep everything",
    "bigbird": "keep everything",
    "bigbird:bigbird_etc": "keep the first 256 keys and from key 256 on the current block of 84 and "
    "the one before it",
    "block_diffusion": "keep all keys from 1024 on and the current block of 4",
    "blockbert": "keep the first 512 keys",
    "cosformer": "keep everything",
    "da_transformer": "keep everything",
    "differential": "keep everything",
    "duo_attention": "heads 0..7: keep everything; head 8: keep the first 64 keys and the last 256 keys",
    "etc": "keep the first 230 keys and the last 85 keys",
    "etc_projected": "keep the first 230 keys and the last 85 keys",
    "flamingo": "keep at most everything: it depends on the table `hi` and the table `lo`",
    "gemma2": "keep the last 4096 keys",
    "gemma3_local": "keep the last 1024 keys",
    "gpt_oss": "keep the last 128 keys",
    "graphormer": "keep everything",
    "kerple": "keep everything",
    "kerple:kerple_powers": "keep everything",
    "left_padding": "keep at most everything: it depends on the table `pad`",
    "linear_attention": "keep everything",
    "llama4_chunked": "keep the current block of 8192, restarting every 8192 tokens",
    "log_sparse": "keep at least the current key and at most everything: it depends on `log2` and a power",
    "longformer": "keep the first key and the last 257 keys",
    "longformer_projected": "keep the first key and the last 257 keys",
    "longformer_charlm": "heads 0..1: keep the last 2045 keys; head 2: keep the last 512 keys",
    "mistral": "keep the last 4096 keys",
    "modernbert": "keep the last 65 keys",
    "natten2d": "keep those of the last 343 keys that are still read",
    "packed": "keep at least the current key and at most everything: it depends on the table `doc`",
    "paligemma": "keep everything",
    "paligemma:gemma3_images": "keep the last 1024 keys",
    "performer": "keep everything",
    "performer:performer_relu": "keep everything",
    "prefix_lm": "keep everything",
    "retnet": "keep everything",
    "rfa": "keep everything",
    "rfa:gated_rfa": "keep everything",
    "sandwich:sandwich_lm": "keep everything",
    "shared_prefix": "keep at least the current key and at most everything: "
    "it depends on the table `doc` and the table `parent`",
    "sparse_transformer": "keep everything",
    "sparse_transformer:enwik8": "keep keys with k mod 128 >= 96 and the current block of 128",
    "streaming_llm": "keep the first 4 keys and the last 2044 keys",
    "t5": "keep everything",
    "t5:t5_decoder": "keep everything",
    "vsa": "keep at most everything: it depends on the table `chosen`",
    "wav2vec2_bert": "keep everything",
    "universal:block": "keep everything",
}
"""What decoding with each example keeps, for every n."""
SMALL = {
    "adaptive_span": "mask band(-9..-1)",
    "last": "mask causal & last(9)",
    "sinks": "mask causal & (sinks(4) | last(9))",
    "chunks": "mask causal & block(12)",
    "strided": "mask strided(8)",
    "fixed": "mask fixed(12, 3)",
    "gaps": "mask band(-24..0, step = 6)",
    "doubling": "mask {q, k : q == 2 * k}",
    "backwards": "mask {q, k : q + k == n - 1}",
    "roots": "mask causal & last(isqrt(n))",
    "drawn": "mask causal & (random(2, seed = h) | sinks(1))",
    "heads": "heads 0..1 { mask last(7) } 2 { mask causal & (block(5) | sinks(2)) } else { mask none }",
    "ahead": "mask radius(6) | global([3, n // 2])",
    "awaited": "mask causal & last(3) | {q, k : k == 0 and q >= 40}",
    "late": "mask causal & last(5) & {q, k : q >= 30}",
    "residues": "mask causal & {q, k : k mod 6 in [1, 2, 5] or k < 2}",
    "table": "inputs doc : int[B, n]  mask causal & documents(doc)",
    "by_head": "inputs lim : int[H]  mask causal & {q, k : q - k < lim}",
}
"""Masks whose structure shows at a few dozen tokens."""
Array = NDArray[Any]


def bound(text: str) -> Attention:
    return attndsl.parse(f"attention main {{ {text} }}")["main"].attention


def example(name: str) -> Attention:
    file, _, entry = name.partition(":")
    return shipped.example(file)[entry or file].attention


def every() -> list[Any]:
    """All examples and small masks, ready to be bound."""
    return [
        *(pytest.param(functools.partial(example, name), id=name) for name in RULES),
        *(pytest.param(functools.partial(bound, text), id=name) for name, text in SMALL.items()),
    ]


def heads_of(attention: Attention) -> int:
    return max(3 if attention.name == "main" else 1, attention.enough_heads())


def read_tables(attention: Attention) -> list[Table]:
    read = {table for group in attention.groups for table in group.relation.mask.tables}
    return sorted(read, key=lambda table: table.name)


def tables_for(attention: Attention, n: int, seed: int = 0) -> dict[str, Array]:
    """Inputs that the masks read, with two batch rows, drawn so that no look-up leaves its table."""
    rng = np.random.default_rng(seed)
    sizes = {"n": n, "B": 2, "H": heads_of(attention), "images": n // 64 + 1, "docs": 40}
    sizes |= {"cubes": n // 64 + 1, "top": 2}
    drawn = {}
    for table in read_tables(attention):
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in table.dims]
        values = rng.integers(0, max(1, min(n, 40)), shape)
        drawn[table.name] = np.sort(values, axis=-1) if table.name == "doc" or n > 2**16 else values
    return drawn


def masks_of(attention: Attention, n: int, heads: int, tables: dict[str, Array]) -> Array:
    """The meaning, bool [B or 1, H or 1, n, n]; inputs of scores do not matter to it."""
    scores = {table.name: table for table in attention.inputs if table.name not in tables}
    zeros = {
        name: np.zeros(
            [{"n": n, "H": heads}.get(str(axis), 1) for axis in t.dims],
            np.int64 if t.dtype == "int" else np.float64,
        )
        for name, t in scores.items()
    }
    found = Bound(attention).mask(n, heads=heads, **tables, **zeros)
    return found if found.ndim == 4 else found[None]


def held(mask: Array) -> Array:
    """Which keys are held at each step [q, k], by the definition."""
    n = len(mask)
    later = np.array([mask[q:].any(axis=0) for q in range(n)], bool).reshape(n, n)
    return later & np.tri(n, dtype=bool)


def peak(steps: Array) -> tuple[int, int]:
    """Most keys, and minus the first step, so that the greatest is what is asked for."""
    counts = steps.sum(axis=1)
    return (int(counts.max()), -int(counts.argmax())) if len(counts) else (0, 0)


def check_cache(cache: Cache, masks: Array) -> None:
    n = masks.shape[-1]
    steps = [[held(mask) for mask in row] for row in masks]
    by_head = [max(peak(s) for s in column) for column in zip(*steps, strict=True)]
    assert cache.per_head == tuple(most for most, _ in by_head)
    assert (cache.minimum, cache.full) == (max(cache.per_head), n)
    assert cache.at == (-max(by_head)[1] if cache.minimum else None)
    assert cache.union == max(peak(np.any(row, axis=0))[0] for row in steps)
    assert cache.causal == (not np.triu(masks, 1).any())
    check_growth(cache)


def check_growth(cache: Cache) -> None:
    """What is claimed of every n, at the one at hand."""
    if cache.formula == "n":
        assert cache.bounded is False
        assert cache.minimum == cache.full
    elif cache.formula is not None:
        assert cache.bounded
        start = 0 if cache.valid_for == "every n" else int(str(cache.valid_for).removeprefix("n >= "))
        assert (cache.minimum == int(cache.formula)) == (cache.full >= start)
        assert cache.minimum <= int(cache.formula)


@pytest.mark.parametrize("make", every())
def test_caches_hold_what_is_read(make: Callable[[], Attention]) -> None:
    attention = make()
    for n in (0, 1, 64):
        heads, tables = heads_of(attention), tables_for(attention, n)
        check_cache(kv_cache(attention, n, heads=heads, inputs=tables), masks_of(attention, n, heads, tables))


def test_caches_over_many_tiles() -> None:
    for text in (*SMALL.values(), "mask causal & (last(130) | {q, k : q mod 300 == 299})"):
        attention = bound(text)
        tables = tables_for(attention, 400)
        check_cache(kv_cache(attention, 400, heads=3, inputs=tables), masks_of(attention, 400, 3, tables))


@pytest.mark.parametrize("seed", range(40))
def test_caches_of_random_programs(seed: int) -> None:
    written = program(Random(seed), integral=seed % 2 == 0)
    attention = attndsl.parse(written.text)["main"].attention
    for n in (5, 64):
        given = written.tables(n, seed)
        tables = {table.name: given[table.name] for table in read_tables(attention)}
        try:
            masks = masks_of(attention, n, written.heads, tables)
        except AttnError:
            continue
        check_cache(kv_cache(attention, n, heads=written.heads, inputs=tables), masks)


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str) -> None:
    attention = example(name)
    tables = tables_for(attention, 512)
    assert kv_cache(attention, 512, heads=heads_of(attention), inputs=tables).rule == RULES[name]


def test_every_example_has_a_rule() -> None:
    told = (path for path in EXAMPLES.glob("*.attn") if not (without_pairs(path) or of_streams(path)))
    fixed = {path.stem for path in told if not chosen(path)}
    assert {name.partition(":")[0] for name in RULES} == fixed


def without_pairs(path: Path) -> bool:
    """Whether there are no weights of pairs, and so no decoding."""
    program = shipped.example(path.stem)
    return program[program.default()].attention.approx is not None


def chosen(path: Path) -> bool:
    """Whether keys are chosen by content, of which any may be."""
    program = shipped.example(path.stem)
    return bool(program[program.default()].attention.selected)


def of_streams(path: Path) -> bool:
    """Whether keys are no tokens, of which nothing is told."""
    program = shipped.example(path.stem)
    return bool(program[program.default()].attention.streams)


def test_what_may_be_chosen_is_kept() -> None:
    """No key of the past is evicted, whatever a drawn choice leaves out."""
    for path in EXAMPLES.glob("*.attn"):
        if not chosen(path):
            continue
        program = shipped.example(path.stem)
        bound = {name: program[name] for name in program.names}
        for name, attention in bound.items():
            if not isinstance(attention, Bound) or not attention.attention.selected:
                continue
            if attention.attention.of_streams:
                continue
            report = attndsl.analyze(attention, length=300, parts=["kv_cache"])
            assert report.kv_cache is not None
            # of the summaries alone where only those may be chosen
            assert report.kv_cache.minimum == (136 if name == "sparse_topk" else 300)


def kept(part: str) -> str:
    """A truth over q and k that says the same as part of a rule."""
    readings = (
        (r"everything", "True"),
        (r"nothing", "False"),
        (r"the current key", "k == q"),
        (r"the first key", "k == 0"),
        (r"the first (\d+) keys", "k < {0}"),
        (r"the last (\d+) keys", "q - k < {0}"),
        (r"key (\d+)", "k == {0}"),
        (r"keys (\d+)\.\.(\d+)", "({0} <= k) & (k <= {1})"),
        (r"all keys from (\d+) on", "k >= {0}"),
        (r"the current block of (\d+)(?:, restarting every \1 tokens)?", "q // {0} == k // {0}"),
        (r"the current block of (\d+) with the one before it", "q // {0} - k // {0} <= 1"),
        (r"the current block of (\d+) with the (\d+) before it", "q // {0} - k // {0} <= {1}"),
    )
    if part.startswith("keys with"):
        said = re.sub(r"k mod (\d+)", r"(k % \1)", part.removeprefix("keys with ")).split(" or ")
        # a chain of comparisons is one of Python's own, and not of arrays
        chains = (re.sub(r"(\d+) <= (\S+ % \d+\)) <= (\d+)", r"(\1 <= \2) & (\2 <= \3)", x) for x in said)
        return " | ".join(f"({x})" for x in chains)
    origin = re.fullmatch(r"from key (\d+) on (the current block .*)", part)
    if origin:
        moved = re.sub(r"\b([qk]) //", rf"(\1 - {origin[1]}) //", kept(origin[2]))
        return f"(k >= {origin[1]}) & ({moved})"
    for pattern, meaning in readings:
        found = re.fullmatch(pattern, part)
        if found:
            return meaning.format(*found.groups())
    raise AssertionError(part)


def rule_says(rule: str, n: int) -> Array:
    q, k = np.arange(n)[:, None], np.arange(n)[None, :]
    text = re.sub(r" and the (one|\d+) before it", r" with the \1 before it", rule.removeprefix("keep "))
    parts = [kept(part) for part in text.split(" and ")]
    total = np.zeros((n, n), bool)
    for part in parts:
        total |= np.broadcast_to(eval(part, {"q": q, "k": k}), (n, n))
    return total & np.tri(n, dtype=bool)


WORDED = {
    "mask band(-9..-1)": "the last 10 keys",
    "mask causal & (sinks(4) | last(9))": "the first 4 keys and the last 9 keys",
    "mask causal & block(12)": "the current block of 12, restarting every 12 tokens",
    "mask strided(8)": "everything",
    "mask fixed(12, 3)": "keys with k mod 12 >= 9 and the current block of 12",
    "mask band(-24..0, step = 6)": "the last 25 keys",
    "mask causal & (block(5) | sinks(2))": "the first 2 keys and the current block of 5",
    "mask causal & {q, k : k mod 6 in [1, 2, 5] or k < 2}": "the first key and keys with "
    "1 <= k mod 6 <= 2 or k mod 6 == 5",
    "mask causal & {q, k : k mod 4 == 1 or k mod 6 == 3}": "keys with k mod 12 == 1 or k mod 12 == 3 or "
    "k mod 12 == 5 or k mod 12 == 9",
    "mask causal & last(1)": "the current key",
    "mask none": "nothing",
    "mask {q, k : k <= q and (5 <= k <= 8 or k >= 20)}": "keys 5..8 and all keys from 20 on",
    "mask blocks(4, radius(1))": "the current block of 4 and the one before it",
    "mask blocks(4, radius(2))": "the current block of 4 and the 2 before it",
    "mask shift(3, blocks(5, radius(1))) | global(0..2)": "the first 3 keys and from key 3 on "
    "the current block of 5 and the one before it",
}


@pytest.mark.parametrize("text", WORDED)
def test_rules_say_what_is_held(text: str) -> None:
    """Of 240 rows the first steps: they see all later readers that matter."""
    attention = bound(text)
    rule = kv_cache(attention, 240).rule
    assert rule == f"keep {WORDED[text]}"
    assert (rule_says(rule, 240)[:60] == held(Bound(attention).mask(240)[0])[:60]).all()


def test_rules_that_leave_something_open() -> None:
    for text, rule in (
        ("mask {q, k : q == 2 * k}", "keep each key k until step 2k"),
        ("mask causal & last(5) & {q, k : q >= 30}", "keep those of the last 5 keys that are still read"),
        ("mask {q, k : q == k and q mod 2 == 0}", "keep the current key if it is read"),
        ("mask causal & last(isqrt(n))", "at n = 64: keep the last 8 keys"),
        (
            "mask causal & { q, k : q != n - 1 or k == q }",
            "at n = 64: keep those of the last 63 keys that are still read",
        ),
        ("mask {q, k : q + k == n - 1}", "at n = 64: keep those of the last 64 keys that are still read"),
        (
            SMALL["drawn"],
            "keep at least the first key and at most everything: it depends on which keys are drawn",
        ),
        (
            SMALL["heads"],
            "heads 0..1: keep the last 7 keys; head 2: keep the first 2 keys and the current block of 5",
        ),
    ):
        assert kv_cache(bound(text), 64, heads=3).rule == rule


def test_known_caches() -> None:
    assert kv_cache(bound("mask causal & last(513)"), 2048).minimum == 513
    assert kv_cache(bound("mask causal & (sinks(4) | last(100))"), 2048).minimum == 104
    assert kv_cache(bound("mask causal & block(96)"), 2048).minimum == 96
    streaming = kv_cache(example("streaming_llm"), 2**20)
    assert (streaming.minimum, streaming.at, streaming.bounded) == (2048, 2047, True)
    assert (streaming.formula, streaming.valid_for) == ("2048", "n >= 2048")
    strided = kv_cache(example("sparse_transformer"), 2**17)
    assert (strided.rule, strided.bounded) == ("keep everything", False)
    # its queries end: all keys before the last 128 steps, and the first of those
    assert (strided.minimum, strided.at) == (2**17 - 127, 2**17 - 128)


def test_reads_ahead_at_the_edge_of_a_tile() -> None:
    assert not kv_cache(bound("mask {q, k : q == 127 and k == 128}"), 256).causal
    assert not kv_cache(bound("mask {q, k : q < 128 <= k}"), 256).causal


def test_growth() -> None:
    assert kv_cache(bound("mask {q, k : q == 2 * k}"), 64).bounded is False
    assert (
        kv_cache(
            bound("mask causal & documents(doc)  inputs doc : int[n]"), 8, inputs={"doc": [0] * 8}
        ).bounded
        is None
    )
    assert kv_cache(
        bound("inputs doc : int[n]  mask last(9) & documents(doc)"), 8, inputs={"doc": [0] * 8}
    ).bounded
    natten = kv_cache(example("natten2d"), 4000)
    assert (natten.minimum, natten.formula) == (340, "340")


def test_openai_fixed_in_50_ms() -> None:
    """SAS, EuroSys 2026, table 7: the best published analysis takes 719 s for such a pattern."""
    attention, seconds = example("sparse_transformer:enwik8"), []
    for _ in range(5):
        eviction.eviction.cache_clear()
        start = time.process_time()
        cache = kv_cache(attention, 131_072)
        seconds.append(time.process_time() - start)
    assert cache.minimum == 32_864
    assert min(seconds) < 0.05


@pytest.mark.parametrize("name", RULES)
def test_a_million_tokens(name: str) -> None:
    """Well under a second of a core; the limits leave room for a slow one."""
    attention = example(name)
    tables = tables_for(attention, 2**20)
    start = time.process_time()
    cache = kv_cache(attention, 2**20, heads=heads_of(attention), inputs=tables)
    assert time.process_time() - start < 2
    check_growth(cache)
    if name in ("mistral", "longformer", "sparse_transformer:enwik8", "alibi_blocks"):
        start = time.process_time()
        shards(attention, 2**20, 8)
        assert time.process_time() - start < 3


def owners(scheme: str, n: int, ranks: int, block: int) -> list[int]:
    """The rank of each token, by the words of the definition."""
    size = -(-n // (2 * ranks if scheme == "zigzag" else ranks))
    if scheme == "contiguous":
        return [t // size for t in range(n)]
    if scheme == "zigzag":
        return [min(t // size, 2 * ranks - 1 - t // size) for t in range(n)]
    return [t % ranks if scheme == "striped" else t // block % ranks for t in range(n)]


def lacking(mask: Array, owner: list[int], rank: int) -> set[int]:
    """Keys of others that a query of `rank` reads."""
    here = np.array(owner, int) == rank
    return set(np.flatnonzero(mask[here].any(axis=0) & ~here).tolist())


def check_shards(attention: Attention, n: int, ranks: int, heads: int, kv_heads: int) -> None:
    tables = tables_for(attention, n)
    masks = masks_of(attention, n, heads, tables)
    full = np.broadcast_to(masks, (len(masks), heads, n, n))
    found = shards(
        attention,
        n,
        ranks,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=3,
        dtype="float16",
        block_size=8,
        inputs=tables,
    )
    assert [shard.scheme for shard in found] == list(SCHEMES)
    unit = 2 * 3 * 2
    everything = n * kv_heads * len(full) * unit
    for shard in found:
        owner = owners(shard.scheme, n, ranks, 8)
        by_rank = [[lacking(row.any(axis=0), owner, rank) for row in full] for rank in range(ranks)]
        assert shard.keys == tuple(sum(map(len, rows)) for rows in by_rank)
        shared = full.reshape(len(full), kv_heads, -1, n, n).any(axis=2)
        sent = [len(lacking(m, owner, rank)) for row in shared for m in row for rank in range(ranks)]
        assert shard.bytes == sum(sent) * unit
        hops = [(rank - owner[k]) % ranks for rank, rows in enumerate(by_rank) for keys in rows for k in keys]
        assert (shard.ring_hops, shard.ring) == (max(hops, default=0), max(hops, default=0) * everything)
        assert shard.all_gather == (ranks - 1) * everything
        assert shard.bytes <= shard.ring <= shard.all_gather + everything
        work = [masks[..., np.array(owner, int) == rank, :].sum() for rank in range(ranks)]
        assert shard.balance == pytest.approx(max(work) / np.mean(work) if any(work) else 1)


@pytest.mark.parametrize("make", every())
def test_shards(make: Callable[[], Attention]) -> None:
    attention = make()
    heads = heads_of(attention)
    for n, ranks in ((13, 1), (37, 2), (37, 3), (32, 4), (45, 8), (5, 8)):
        check_shards(attention, n, ranks, heads, 1 if ranks % 2 else heads)


def test_shards_over_many_tiles() -> None:
    for text in ("mask causal & (last(150) | sinks(3))", SMALL["fixed"], SMALL["drawn"], "mask full"):
        check_shards(bound(text), 270, 3, 2, 1)


def test_known_shards() -> None:
    window = {shard.scheme: shard for shard in shards(example("mistral"), 2**20, 8, dtype="bfloat16")}
    assert window["contiguous"].keys == (0, *[4095] * 7)
    assert window["contiguous"].bytes == 7 * 4095 * 2 * 64 * 2
    assert window["contiguous"].ring_hops == 1
    # nothing reads what comes after a rank's last token
    assert window["striped"].keys == tuple(7 * 2**17 - 7 + r for r in range(8))
    causal = {shard.scheme: shard for shard in shards(example("alibi:alibi_lm"), 2**20, 8)}
    assert causal["contiguous"].balance == pytest.approx(15 / 8, abs=1e-4)
    assert causal["zigzag"].balance == pytest.approx(1, abs=1e-4)
    assert causal["zigzag"].keys == tuple((14 - r) * 2**16 for r in range(8))
    assert causal["contiguous"].keys == tuple(r * 2**17 for r in range(8))
    assert causal["contiguous"].all_gather == 7 * 2**20 * 2 * 64 * 4


def test_no_tokens() -> None:
    for shard in shards(bound("mask causal"), 0, 4):
        assert (shard.keys, shard.bytes, shard.all_gather, shard.ring) == ((0,) * 4, 0, 0, 0)
        assert shard.balance == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kv_cache(bound("mask causal"), -1), "must not be negative"),
        (lambda: kv_cache(bound("mask causal"), 2**63), "lengths end at"),
        (lambda: kv_cache(bound("mask causal"), 2.5), "is an integer"),
        (lambda: kv_cache(bound("mask causal"), 8, heads=0), "there are 0 heads"),
        (lambda: kv_cache(bound("mask causal"), 8, inputs={"doc": [1]}), "no input `doc`"),
        (lambda: kv_cache(example("packed"), 8), "needs its input `doc`"),
        (lambda: kv_cache(example("packed"), 8, inputs={"doc": [1, 2]}), "has 2 entries"),
        (lambda: kv_cache(bound("offset 3  mask causal"), 8), "start at position 3"),
        (lambda: kv_cache(bound(SMALL["heads"]), 8), "speaks of head 2"),
        (lambda: shards(bound("mask causal"), 8, 0), "must be positive"),
        (lambda: shards(bound("mask causal"), 8, -2), "must not be negative"),
        (lambda: shards(bound("mask causal"), 2**30, 2**20), "the limit is"),
        (lambda: shards(bound("mask causal"), 8, 2, heads=4, kv_heads=3), "cannot share"),
        (lambda: shards(bound("mask causal"), 8, 2, kv_heads=0), "`kv_heads` is 0"),
        (lambda: shards(bound("mask causal"), 8, 2, dtype="int4"), "`dtype` is int4"),
        (lambda: shards(bound("mask causal"), 8, 2, block_size=12), "multiple of 8"),
        (lambda: shards(example("packed"), 8, 2), "needs its input `doc`"),
    ],
)
def test_mistakes(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AttnError, match=message):
        call()


def test_the_state_in_place_of_keys() -> None:
    """H m (D + 1) numbers, where sums over the keys are all that later queries need."""
    w = "inputs W : float[c, D]"
    for text, state in {
        "mask causal score elu1(Q) @ elu1(K) norm linear": 3 * 64 * 65,
        "mask causal score trig(Q, gaussian_rows(20)) @ trig(K, gaussian_rows(20)) norm none": 3 * 40 * 65,
        f"{w} mask causal score elu1(W @ Q) @ elu1(W @ K) norm linear": None,
        "inputs g : float[n] mask causal score Q @ K decay exp(g[q] - g[k]) norm none": None,
        "mask causal & last(9) score elu1(Q) @ elu1(K) norm linear": None,
        "score elu1(Q) @ elu1(K) norm linear": None,
        "mask causal": None,
    }.items():
        report = attndsl.analyze(bound(text), length=50, heads=3, parts=["kv_cache"])
        assert report.kv_cache.state == state
