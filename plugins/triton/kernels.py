# mypy: ignore-errors
"""The kernels: forward, dQ, dK and dV, of blocks of queries or keys over the tiles of a mask.

Of a line of tiles (layout.py) come first the full ones, where no pair is masked and no bound is looked at,
then the partial ones with a bit for each pair. What a score is at each pair is generated and comes as
functions (emit/triton.py): HELD, SCORE, SLOPES ... `held` is what there is of leaves, `leaves` and `slopes`
addresses of each, and of its gradient, for each batch row and head, `sizes` those of tables.

    Q [B, H, nq, D], K [B, Hkv, n, D], V [B, Hkv, n, DV] by their strides, features side by side
    OUT, GRAD_OUT [B, H, nq, DV], GQ [B, H, nq, D], GK, GV as K, V: contiguous
    LSE, LEVEL, SHARE, DELTA   [B, H, nq], of rows; SINK [B, H]
    GRID                   [B, H], which mask, -1 where nothing is asked of a head
    WRONG                  of each program the first pair [B, H, nq, n] without a value, or NEVER
    packed, unit           what Q @ K is multiplied with, and what slopes by that are
    BM, BN                 queries and keys of a tile
    WIDE_D, WIDE_DV        features, up to a power of two
"""

import triton
import triton.language as tl
from triton.knobs import runtime

INTERPRETED = tl.constexpr(runtime.interpret)
NEVER = tl.constexpr(2**62)
LN_2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(float("-inf"))
MARGIN = tl.constexpr(128)
"""Entries before and after those of leaves: what whole tiles reach."""


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    if INTERPRETED:
        # its products of bfloat16 are of the bits
        a, b = a.to(c.dtype), b.to(c.dtype)
    return tl.dot(a, b, c, input_precision=PRECISION, out_dtype=c.dtype)


@triton.jit
def vectors(X, first, lane, stride, many, WIDTH: tl.constexpr, WIDE: tl.constexpr, INSIDE: tl.constexpr):
    """Rows first + lane of X [many, WIDTH]; zeros beyond it. INSIDE: no row is."""
    feature = tl.arange(0, WIDE)
    at = X + first * stride + (lane[:, None] * stride + feature[None, :])
    if INSIDE:
        if WIDTH == WIDE:
            return tl.load(at)
        else:
            return tl.load(at, mask=feature[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(at, mask=(first + lane < many)[:, None] & (feature[None, :] < WIDTH), other=0.0)


@triton.jit
def keep(X, x, first, lane, many, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Stores rows first + lane of X [many, WIDTH]."""
    feature = tl.arange(0, WIDE)
    at = X + first * WIDTH + (lane[:, None] * WIDTH + feature[None, :])
    mask = (first + lane < many)[:, None] & (feature[None, :] < WIDTH)
    tl.store(at, x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def live_of(words, content, height, line, WIDTH: tl.constexpr):
    """The pairs of a partial tile at these lines of its `height`: a word for all of 32 is loaded once."""
    WORDS: tl.constexpr = (WIDTH + 31) // 32
    at = words + (content * height + line) * WORDS
    place = tl.arange(0, WIDTH)
    word = tl.load(at)[:, None]
    for i in tl.static_range(1, WORDS):
        word = tl.where((place // 32 == i)[None, :], tl.load(at + i)[:, None], word)
    return ((word >> (place % 32)[None, :]) & 1) != 0


@triton.jit
def noted(wrong, bad, rows, key, n):
    """The first pair without a value so far, of rows counted over all heads."""
    return tl.minimum(wrong, tl.min(tl.min(tl.where(bad, rows[:, None] * n + key, NEVER), 1), 0))


@triton.jit
def more_keys(
    acc, total, top, wrong, q, K, V, held, words, content, height, line, first, row, rows, n, kn, vn, packed,
    origin,
    SCORE: tl.constexpr, FULL: tl.constexpr, NORM: tl.constexpr, CHECKED: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, WIDE_D: tl.constexpr,
    DV: tl.constexpr, WIDE_DV: tl.constexpr, REAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What a tile of keys adds to the rows of a block of queries."""
    SOFTMAX: tl.constexpr = NORM[0]
    FACTOR: tl.constexpr = NORM[1]
    BASE: tl.constexpr = NORM[2]
    lane = tl.arange(0, BN)
    key = (first + lane).to(tl.int32)[None, :]
    k = vectors(K, first, lane, kn, n, D, WIDE_D, FULL)
    x = product(q, tl.trans(k), tl.zeros([BM, BN], REAL), PRECISION) * packed
    if FULL:
        live = tl.full([BM, BN], 1, tl.int1)
    else:
        live = live_of(words, content, height, line, BN)
    x, factor, bad = SCORE(x, row, key, live, held, origin, True, REAL, WHOLE)
    if FACTOR:
        bad = bad | (live & (factor < 0))
        if SOFTMAX:
            x = tl.where(factor > 0, x + tl.log(tl.where(factor > 0, factor, 1.0)), NONE)
        else:
            x = x * factor
    if CHECKED:
        wrong = noted(wrong, bad, rows, key, n)
    if SOFTMAX:
        if not FULL:
            x = tl.where(live, x, NONE)
        now = tl.maximum(top, tl.max(x, 1))
        base = tl.where(now == NONE, 0.0, now)
        weight = tl.exp2((x - base[:, None]) * BASE)
        shrunk = tl.exp2((top - base) * BASE)
        total = total * shrunk + tl.sum(weight, 1)
        acc = acc * shrunk[:, None]
        top = now
    else:
        weight = tl.where(live, x, 0.0)
        total += tl.sum(weight, 1)
    v = vectors(V, first, lane, vn, n, DV, WIDE_DV, FULL)
    acc = product(weight.to(v.dtype), v, acc, PRECISION)
    return acc, total, top, wrong


@triton.jit
def result(acc, total, top, sink, NORM: tl.constexpr, SINK: tl.constexpr):
    """The output, log-sum-exp, greatest logit and sum of weights over that, of whole rows."""
    SOFTMAX: tl.constexpr = NORM[0]
    BASE: tl.constexpr = NORM[2]
    SHARED: tl.constexpr = NORM[3]
    if SOFTMAX:
        empty = top == NONE
        if SINK:
            # a sink far above all keys would leave no number for them
            above = tl.where(empty, top, tl.maximum(top, sink))
            base = tl.where(empty, 0.0, above)
            shrunk = tl.exp2((top - base) * BASE)
            total = total * shrunk + tl.exp2((sink - base) * BASE)
            acc = acc * shrunk[:, None]
            top = above
        safe = tl.where(empty, 1.0, total)
        if BASE == 1.0:
            lse = (top + tl.log2(safe)) * LN_2
        else:
            lse = top + tl.log(safe)
    else:
        empty = total == 0
        safe = tl.where(empty, 1.0, total)
        lse = tl.where(empty, NONE, tl.log(safe))
    if SHARED:
        acc = acc * tl.where(empty, 0.0, 1.0 / safe)[:, None]
    return acc, lse, top, total


@triton.jit(do_not_specialize=["nq", "n", "lines", "heads", "share"])
def forward(
    Q, K, V, OUT, LSE, TOP, SUM,
    GRID, HEADS, order, run_ptr, run_start, run_end, part_ptr, part_at, part_content, words,
    leaves, sizes, SINK, WRONG,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, nq, n, lines, heads, share, packed,
    HELD: tl.constexpr, SCORE: tl.constexpr, LEAVES: tl.constexpr, NORM: tl.constexpr,
    CHECKED: tl.constexpr, SUNK: tl.constexpr, TOPS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, WIDE_D: tl.constexpr, DV: tl.constexpr,
    WIDE_DV: tl.constexpr, REAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head."""
    h, b = tl.load(HEADS + tl.program_id(1)).to(tl.int64), tl.program_id(2).to(tl.int64)
    of = b * heads + h
    grid = tl.load(GRID + of)
    block = tl.load(order + grid * lines + tl.program_id(0))
    line = grid * lines + block
    lane = tl.arange(0, BM)
    first = block.to(tl.int64) * BM
    row, rows = (first + lane).to(tl.int32)[:, None], of * nq + first + lane
    q = vectors(Q + b * qb + h * qh, first, lane, qn, nq, D, WIDE_D, False)
    K += b * kb + (h // share) * kh
    V += b * vb + (h // share) * vh
    held = HELD(leaves + of * LEAVES, sizes, row, REAL, WHOLE)
    acc, total = tl.zeros([BM, WIDE_DV], REAL), tl.zeros([BM], REAL)
    top, wrong = tl.full([BM], NONE, REAL), tl.full([], NEVER, tl.int64)
    for run in range(tl.load(run_ptr + line), tl.load(run_ptr + line + 1)):
        for tile in range(tl.load(run_start + run), tl.load(run_end + run)):
            acc, total, top, wrong = more_keys(
                acc, total, top, wrong, q, K, V, held, words, 0, BM, lane,
                (tl.zeros([], tl.int64) + tile) * BN, row, rows, n, kn, vn, packed, n - 1 + MARGIN, SCORE,
                True, NORM, CHECKED, PRECISION, BM, BN, D, WIDE_D, DV, WIDE_DV, REAL, WHOLE,
            )  # fmt: skip
    for part in range(tl.load(part_ptr + line), tl.load(part_ptr + line + 1)):
        acc, total, top, wrong = more_keys(
            acc, total, top, wrong, q, K, V, held, words, tl.load(part_content + part), BM, lane,
            tl.load(part_at + part).to(tl.int64) * BN, row, rows, n, kn, vn, packed, n - 1 + MARGIN, SCORE,
            False, NORM, CHECKED, PRECISION, BM, BN, D, WIDE_D, DV, WIDE_DV, REAL, WHOLE,
        )  # fmt: skip
    sink = tl.load(SINK + of) if SUNK else 0.0
    acc, lse, top, total = result(acc, total, top, sink, NORM, SUNK)
    inside = first + lane < nq
    keep(OUT + of * nq * DV, acc, first, lane, nq, DV, WIDE_DV)
    tl.store(LSE + rows, lse, mask=inside)
    if TOPS:
        tl.store(TOP + rows, top, mask=inside)
        tl.store(SUM + rows, total, mask=inside)
    if CHECKED:
        tl.store(WRONG + of * lines + block, wrong)


@triton.jit
def key_in_pages(table, key, PAGE: tl.constexpr):
    """The page that a key is in, and which one of it."""
    if PAGE:
        return tl.load(table + key // PAGE).to(tl.int64), key % PAGE
    else:
        return key, key


@triton.jit
def last_read(words, content, height, line, key, BN: tl.constexpr):
    """The keys of a partial tile, but in place of those that no row reads the last that one does."""
    read = tl.max(live_of(words, content, height, line, BN).to(tl.int32), 0) != 0
    return tl.where(read, key, tl.max(tl.where(read, key, 0), 0))


@triton.jit
def lying(X, page, entry, page_stride, stride, PAGE: tl.constexpr):
    """Where the vectors of keys lie: by their own places, one each [BN, 1], or by the first of all."""
    if PAGE:
        return X + (page * page_stride + entry * stride)[:, None]
    else:
        return X


@triton.jit(do_not_specialize=["nq", "n", "heads", "splits", "rows_of_all", "most_pages"])
def decode(
    Q, K, V, PARTS, TOP, SUM, GRID, TABLE, units, unit_at, words, leaves, sizes, WRONG,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, nq, n, heads, splits, rows_of_all, most_pages, packed,
    PAGE: tl.constexpr, HELD: tl.constexpr, SCORE: tl.constexpr, LEAVES: tl.constexpr, NORM: tl.constexpr,
    CHECKED: tl.constexpr, SHARED_BY: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, WIDE_D: tl.constexpr, DV: tl.constexpr, WIDE_DV: tl.constexpr,
    REAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The few queries of all heads that share keys, over one part of the units that they see: of each row the
    sum of weighted values, its greatest logit and the sum of weights over that. All of them have one mask.

    Where PAGE is not 0, K is [pages, Hkv, PAGE, D], V likewise, and TABLE [B, most_pages] has the pages of
    each batch row in their order."""
    split, kv, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    place = tl.arange(0, BM)
    inside = place < SHARED_BY * nq
    # rows beyond are the last one again
    place = tl.minimum(place, SHARED_BY * nq - 1)
    h, line = kv * SHARED_BY + place // nq, place % nq
    of, feature = b * heads + h, tl.arange(0, WIDE_D)
    rows, row = of * nq + line, line[:, None]
    at = Q + b * qb + (h * qh + line * qn)[:, None] + feature[None, :]
    q = tl.load(at, mask=(feature < D)[None, :], other=0.0)
    # of pages kb and vb are the strides, and each key has a place of its own
    K += kv * kh if PAGE else b * kb + kv * kh
    V += kv * vh if PAGE else b * vb + kv * vh
    TABLE += b * most_pages
    step_k, step_v = 0 if PAGE else kn, 0 if PAGE else vn
    lane = tl.arange(0, BN)
    held = HELD(leaves + (of * LEAVES)[:, None], sizes, row, REAL, WHOLE)
    unit = units + 4 * tl.load(GRID + b * heads + kv * SHARED_BY)
    first, full, many, content = tl.load(unit), tl.load(unit + 1), tl.load(unit + 2), tl.load(unit + 3)
    low, high = many * split // splits, many * (split + 1) // splits
    acc, total = tl.zeros([BM, WIDE_DV], REAL), tl.zeros([BM], REAL)
    top, wrong = tl.full([BM], NONE, REAL), tl.full([], NEVER, tl.int64)
    for i in range(tl.minimum(low, full), tl.minimum(high, full)):
        begin = tl.load(unit_at + first + i).to(tl.int64) * BN
        page, entry = key_in_pages(TABLE, begin + lane, PAGE)
        acc, total, top, wrong = more_keys(
            acc, total, top, wrong, q, lying(K, page, entry, kb, kn, PAGE),
            lying(V, page, entry, vb, vn, PAGE), held, words, 0, nq, line, begin, row, rows, n, step_k,
            step_v, packed, n - 1 + MARGIN, SCORE, True, NORM, CHECKED, PRECISION, BM, BN, D, WIDE_D, DV,
            WIDE_DV, REAL, WHOLE,
        )  # fmt: skip
    for i in range(tl.maximum(low, full), tl.maximum(high, full)):
        begin = tl.load(unit_at + first + i).to(tl.int64) * BN
        key = last_read(words, content + i - full, nq, line, begin + lane, BN) if PAGE else begin + lane
        page, entry = key_in_pages(TABLE, key, PAGE)
        acc, total, top, wrong = more_keys(
            acc, total, top, wrong, q, lying(K, page, entry, kb, kn, PAGE),
            lying(V, page, entry, vb, vn, PAGE), held, words, content + i - full, nq, line, begin, row, rows,
            n, step_k, step_v, packed, n - 1 + MARGIN, SCORE, False, NORM, CHECKED, PRECISION, BM, BN, D,
            WIDE_D, DV, WIDE_DV, REAL, WHOLE,
        )  # fmt: skip
    rows += split.to(tl.int64) * rows_of_all
    wide = tl.arange(0, WIDE_DV)
    tl.store(PARTS + rows[:, None] * DV + wide[None, :], acc, mask=inside[:, None] & (wide < DV)[None, :])
    tl.store(TOP + rows, top, mask=inside)
    tl.store(SUM + rows, total, mask=inside)
    if CHECKED:
        tl.store(WRONG + (b * tl.num_programs(1) + kv) * splits + split, wrong)


@triton.jit(do_not_specialize=["nq", "splits", "rows_of_all"])
def merge(
    PARTS, TOP, SUM, OUT, LSE, SINK, nq, splits, rows_of_all,
    NORM: tl.constexpr, SUNK: tl.constexpr, SPLITS: tl.constexpr, DV: tl.constexpr, WIDE_DV: tl.constexpr,
):  # fmt: skip
    """A row of what `decode` left in parts, of SPLITS at most."""
    row = tl.program_id(0).to(tl.int64)
    split, wide = tl.arange(0, SPLITS), tl.arange(0, WIDE_DV)
    rows, inside = row + split * rows_of_all, split < splits
    total = tl.load(SUM + rows, mask=inside, other=0.0)
    mask = inside[:, None] & (wide < DV)[None, :]
    acc = tl.load(PARTS + rows[:, None] * DV + wide[None, :], mask=mask, other=0.0)
    tops = tl.load(TOP + rows, mask=inside, other=NONE)
    top = tl.max(tops[None, :], 1)
    if NORM[0]:
        scale = tl.exp2((tops - tl.where(top == NONE, 0.0, top)) * NORM[2])
        total, acc = total * scale, acc * scale[:, None]
    sink = tl.load(SINK + row // nq) if SUNK else 0.0
    acc, lse, _, _ = result(tl.sum(acc, 0)[None, :], tl.sum(total[None, :], 1), top, sink, NORM, SUNK)
    one = tl.arange(0, 1)
    keep(OUT, acc, row, one, row + 1, DV, WIDE_DV)
    tl.store(LSE + row + one, lse)


@triton.jit
def measures(LEVEL, SHARE, DELTA, rows, inside, FULL: tl.constexpr, DIVIDED: tl.constexpr):
    """Of rows: what is subtracted from logits, what weights are multiplied with, and what is subtracted from
    what comes back to them."""
    if FULL:
        level, delta = tl.load(LEVEL + rows), tl.load(DELTA + rows)
    else:
        level = tl.load(LEVEL + rows, mask=inside, other=float("inf"))
        delta = tl.load(DELTA + rows, mask=inside, other=0.0)
    share = level
    if DIVIDED:
        share = tl.load(SHARE + rows, mask=inside, other=0.0)
    return level, share, delta


@triton.jit
def more_of_queries(
    gq, sums, q, grad, level, share, delta, K, V, held, grads, words, content, first, row, n, kn, vn, packed,
    origin, SLOPES: tl.constexpr, FULL: tl.constexpr, DIVIDED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, WIDE_D: tl.constexpr, DV: tl.constexpr,
    WIDE_DV: tl.constexpr, REAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BN)
    key = (first + lane).to(tl.int32)[None, :]
    k = vectors(K, first, lane, kn, n, D, WIDE_D, FULL)
    v = vectors(V, first, lane, vn, n, DV, WIDE_DV, FULL)
    s = product(q, tl.trans(k), tl.zeros([BM, BN], REAL), PRECISION) * packed
    come = product(grad, tl.trans(v), tl.zeros([BM, BN], REAL), PRECISION) - delta[:, None]
    if FULL:
        live = tl.full([BM, BN], 1, tl.int1)
    else:
        live = live_of(words, content, BM, tl.arange(0, BM), BN)
    back = (level[:, None], share[:, None], come)
    _, by_s, sums = SLOPES(s, row, key, live, back, held, sums, grads, origin, DIVIDED, True, REAL, WHOLE)
    if not FULL:
        by_s = tl.where(live, by_s, 0.0)
    return product(by_s.to(k.dtype), k, gq, PRECISION), sums


@triton.jit(do_not_specialize=["nq", "n", "lines", "heads", "share"])
def backward_queries(
    Q, K, V, GRAD_OUT, LEVEL, SHARE, DELTA, GQ,
    GRID, HEADS, order, run_ptr, run_start, run_end, part_ptr, part_at, part_content, words,
    leaves, sizes, slopes,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, nq, n, lines, heads, share, packed, unit,
    HELD: tl.constexpr, SLOPES: tl.constexpr, BEGIN: tl.constexpr, FINISH: tl.constexpr, LEAVES: tl.constexpr,
    DIVIDED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    WIDE_D: tl.constexpr, DV: tl.constexpr, WIDE_DV: tl.constexpr, REAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries of one head, and of leaves but for those of keys."""
    h, b = tl.load(HEADS + tl.program_id(1)).to(tl.int64), tl.program_id(2).to(tl.int64)
    of = b * heads + h
    grid = tl.load(GRID + of)
    block = tl.load(order + grid * lines + tl.program_id(0))
    line = grid * lines + block
    lane = tl.arange(0, BM)
    first = block.to(tl.int64) * BM
    row = (first + lane).to(tl.int32)[:, None]
    q = vectors(Q + b * qb + h * qh, first, lane, qn, nq, D, WIDE_D, False)
    grad = vectors(GRAD_OUT + of * nq * DV, first, lane, DV, nq, DV, WIDE_DV, False)
    rows, inside = of * nq + first + lane, first + lane < nq
    level, part_of, delta = measures(LEVEL, SHARE, DELTA, rows, inside, False, DIVIDED)
    K += b * kb + (h // share) * kh
    V += b * vb + (h // share) * vh
    held = HELD(leaves + of * LEAVES, sizes, row, REAL, WHOLE)
    grads = slopes + of * LEAVES
    gq, sums = tl.zeros([BM, WIDE_D], REAL), BEGIN(BM, REAL)
    for run in range(tl.load(run_ptr + line), tl.load(run_ptr + line + 1)):
        for tile in range(tl.load(run_start + run), tl.load(run_end + run)):
            gq, sums = more_of_queries(
                gq, sums, q, grad, level, part_of, delta, K, V, held, grads, words, 0,
                (tl.zeros([], tl.int64) + tile) * BN, row, n, kn, vn, packed, n - 1 + MARGIN, SLOPES, True,
                DIVIDED, PRECISION, BM, BN, D, WIDE_D, DV, WIDE_DV, REAL, WHOLE,
            )  # fmt: skip
    for part in range(tl.load(part_ptr + line), tl.load(part_ptr + line + 1)):
        gq, sums = more_of_queries(
            gq, sums, q, grad, level, part_of, delta, K, V, held, grads, words,
            tl.load(part_content + part), tl.load(part_at + part).to(tl.int64) * BN, row, n, kn, vn, packed,
            n - 1 + MARGIN, SLOPES, False, DIVIDED, PRECISION, BM, BN, D, WIDE_D, DV, WIDE_DV, REAL, WHOLE,
        )  # fmt: skip
    keep(GQ + of * nq * D, gq * (packed * unit), first, lane, nq, D, WIDE_D)
    FINISH(sums, grads, block, first + lane, REAL)


@triton.jit
def more_of_keys(
    gk, gv, sums, k, v, Q, GRAD_OUT, LEVEL, SHARE, DELTA, held, grads, words, content, first, key, nq, qn,
    packed, origin, SLOPES: tl.constexpr, FULL: tl.constexpr, DIVIDED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, WIDE_D: tl.constexpr, DV: tl.constexpr,
    WIDE_DV: tl.constexpr, REAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What a tile of queries gives to a block of keys: its pairs are [BN, BM]."""
    lane = tl.arange(0, BM)
    row = (first + lane).to(tl.int32)[None, :]
    q = vectors(Q, first, lane, qn, nq, D, WIDE_D, FULL)
    grad = vectors(GRAD_OUT, first, lane, DV, nq, DV, WIDE_DV, FULL)
    inside = first + lane < nq
    level, share, delta = measures(LEVEL, SHARE, DELTA, first + lane, inside, FULL, DIVIDED)
    s = product(k, tl.trans(q), tl.zeros([BN, BM], REAL), PRECISION) * packed
    come = product(v, tl.trans(grad), tl.zeros([BN, BM], REAL), PRECISION) - delta[None, :]
    if FULL:
        live = tl.full([BN, BM], 1, tl.int1)
    else:
        live = live_of(words, content, BN, tl.arange(0, BN), BM)
    back = (level[None, :], share[None, :], come)
    weight, by_s, sums = SLOPES(
        s, row, key, live, back, held, sums, grads, origin, DIVIDED, False, REAL, WHOLE
    )
    if not FULL:
        by_s = tl.where(live, by_s, 0.0)
    gv = product(weight.to(grad.dtype), grad, gv, PRECISION)
    gk = product(by_s.to(q.dtype), q, gk, PRECISION)
    return gk, gv, sums


@triton.jit(do_not_specialize=["nq", "n", "lines", "heads"])
def backward_keys(
    Q, K, V, GRAD_OUT, LEVEL, SHARE, DELTA, GK, GV,
    GRID, order, run_ptr, run_start, run_end, part_ptr, part_at, part_content, words,
    leaves, sizes, slopes,
    qb, qh, qn, kb, kh, kn, vb, vh, vn, nq, n, lines, heads, packed, unit,
    HELD: tl.constexpr, SLOPES: tl.constexpr, BEGIN: tl.constexpr, FINISH: tl.constexpr, LEAVES: tl.constexpr,
    SHARED_BY: tl.constexpr, DIVIDED: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, WIDE_D: tl.constexpr, DV: tl.constexpr, WIDE_DV: tl.constexpr,
    REAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, from all heads that share them, and of leaves of keys."""
    kv, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    grid = tl.maximum(tl.load(GRID + b * heads + kv * SHARED_BY), 0)
    block = tl.load(order + grid * lines + tl.program_id(0))
    lane = tl.arange(0, BN)
    first = block.to(tl.int64) * BN
    key = (first + lane).to(tl.int32)[:, None]
    k = vectors(K + b * kb + kv * kh, first, lane, kn, n, D, WIDE_D, False)
    v = vectors(V + b * vb + kv * vh, first, lane, vn, n, DV, WIDE_DV, False)
    gk, gv = tl.zeros([BN, WIDE_D], REAL), tl.zeros([BN, WIDE_DV], REAL)
    for i in range(SHARED_BY):
        h = kv * SHARED_BY + i
        of = b * heads + h
        grid = tl.load(GRID + of)
        if grid >= 0:
            line = grid * lines + block
            held = HELD(leaves + of * LEAVES, sizes, key, REAL, WHOLE)
            grads = slopes + of * LEAVES
            sums = BEGIN(BN, REAL)
            for run in range(tl.load(run_ptr + line), tl.load(run_ptr + line + 1)):
                for tile in range(tl.load(run_start + run), tl.load(run_end + run)):
                    gk, gv, sums = more_of_keys(
                        gk, gv, sums, k, v, Q + b * qb + h * qh, GRAD_OUT + of * nq * DV, LEVEL + of * nq,
                        SHARE + of * nq, DELTA + of * nq, held, grads, words, 0,
                        (tl.zeros([], tl.int64) + tile) * BM, key, nq, qn, packed, n - 1 + MARGIN, SLOPES,
                        True, DIVIDED, PRECISION, BM, BN, D, WIDE_D, DV, WIDE_DV, REAL, WHOLE,
                    )  # fmt: skip
            for part in range(tl.load(part_ptr + line), tl.load(part_ptr + line + 1)):
                gk, gv, sums = more_of_keys(
                    gk, gv, sums, k, v, Q + b * qb + h * qh, GRAD_OUT + of * nq * DV, LEVEL + of * nq,
                    SHARE + of * nq, DELTA + of * nq, held, grads, words, tl.load(part_content + part),
                    tl.load(part_at + part).to(tl.int64) * BM, key, nq, qn, packed, n - 1 + MARGIN, SLOPES,
                    False, DIVIDED, PRECISION, BM, BN, D, WIDE_D, DV, WIDE_DV, REAL, WHOLE,
                )  # fmt: skip
            FINISH(sums, grads, block, first + lane, REAL)
    keep(GK + (b * (heads // SHARED_BY) + kv) * n * D, gk * (packed * unit), first, lane, n, D, WIDE_D)
    keep(GV + (b * (heads // SHARED_BY) + kv) * n * DV, gv, first, lane, n, DV, WIDE_DV)
