// Attention over tiles, forward and backward. Lanes are queries: of a block of 64 rows Q^T is packed once, with
// the scale in base 2 in it; then S^T = K Q^T, P^T = exp2(S^T - m), O^T += V^T P^T, keys and values being read row
// by row as broadcasts. So softmax runs down the columns, and a mask is one word of 64 bits for each key.
//
// What a score is at each pair is generated (score.h): it reads leaves, arrays with an entry for each query, key or
// distance, which were made before.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "pairs.h"

#define ROWS 64  // queries of a block
#define STEP 64  // keys at a time
#define VECS (ROWS / LANES)

static const real NONE = -INFINITY;

// 2^x: a polynomial of degree 6 in the fraction, |x - round(x)| <= 1/2; 0 below 2^-126, NaN stays NaN
#ifdef DOUBLE
INLINE vec weightv(vec x) { return exp2v(x); }
#else
INLINE vec weightv(vec x) {
    const float round = 12582912.0f;  // 1.5 * 2^23
    vec shifted = x + round, f = x - (shifted - round);
    ivec e = (ivec)shifted << 23;
    vec p = all(0.000153533285f);
    p = p * f + 0.0013398875f;
    p = p * f + 0.00961843785f;
    p = p * f + 0.0555033237f;
    p = p * f + 0.240226477f;
    p = p * f + 0.693147182f;
    p = p * f + 1.0f;
    return select(x < -126.0f, all(0.0f), (vec)((ivec)p + e));
}
#endif

// C[R][N vectors] of rows `cs` apart (+)= sum over i < count of A[i * as + r * ar] (one number) * B[i * bs] (vectors)
template <int R, int N, bool ADD>
INLINE void product(real *c, long cs, const real *a, long as, long ar, const real *b, long bs, long count) {
    vec sum[R][N] = {};
    for (long i = 0; i < count; i++) {
        vec x[N];
        for (int n = 0; n < N; n++) x[n] = load(b + i * bs + n * LANES);
        for (int r = 0; r < R; r++) {
            vec y = all(a[i * as + r * ar]);
            for (int n = 0; n < N; n++) sum[r][n] += y * x[n];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            real *at = c + r * cs + n * LANES;
            store(at, ADD ? load(at) + sum[r][n] : sum[r][n]);
        }
}

// sums that the registers hold: 32 of them, or 16
#if BYTES == 64
#define TALL 4
#define WIDE 4
#define DEEP 16
#else
#define TALL 6
#define WIDE 2
#define DEEP 8
#endif

// as `gemm`, of one vector of columns
template <bool ADD>
INLINE void column(real *c, long cs, long rows, const real *a, long as, long ar, const real *b, long bs, long count) {
    long r = 0;
    for (; r + DEEP <= rows; r += DEEP) product<DEEP, 1, ADD>(c + r * cs, cs, a + r * ar, as, ar, b, bs, count);
    for (; r < rows; r++) product<1, 1, ADD>(c + r * cs, cs, a + r * ar, as, ar, b, bs, count);
}

// as `product`, of any number of rows and a multiple of LANES columns
template <bool ADD>
static void gemm(real *c, long cs, long rows, long cols, const real *a, long as, long ar, const real *b, long bs,
                 long count) {
    for (long j = 0; j < cols;) {
        long left = (cols - j) / LANES, r = 0;
        if (left >= WIDE) {
            for (; r + TALL <= rows; r += TALL)
                product<TALL, WIDE, ADD>(c + r * cs + j, cs, a + r * ar, as, ar, b + j, bs, count);
            if (TALL > 4)
                for (; r + 4 <= rows; r += 4)
                    product<4, WIDE, ADD>(c + r * cs + j, cs, a + r * ar, as, ar, b + j, bs, count);
            for (; r < rows; r++) product<1, WIDE, ADD>(c + r * cs + j, cs, a + r * ar, as, ar, b + j, bs, count);
            j += WIDE * LANES;
        } else {
            column<ADD>(c + j, cs, rows, a, as, ar, b + j, bs, count);
            j += LANES;
        }
    }
}

struct Grid {
    const int64_t *first;      // of each block of rows its entries
    const int32_t *start, *end;  // keys of each entry
    const int64_t *words;      // where its words begin, -1 where all pairs are live
    const uint64_t *masks;     // a word for each key, bit i for row i of the block
};

struct Call {
    const real *q, *k, *v;
    real *out, *lse;
    const struct Grid *grids;  // of each batch row and head, by `index`
    const int32_t *index;      // -1: nothing is asked of it
    int64_t batch, heads, kv_heads, nq, n, d, dv;
    int64_t qs[3], ks[3], vs[3];  // strides of batch row, head, token
    double packed;                // what Q @ K is multiplied with
    int64_t threads;
    const void *const *leaves;  // of each batch row and head
    const int64_t *sizes;
    int64_t origin;
    int64_t *wrong;         // the first pair that reads beyond a table or has a negative decay, or -1
    const real *sink;       // of each batch row and head a logit, or NULL
    // of each row a number near its greatest logit and the sum of weights over its own: written by the
    // forward pass where asked, and what weights are made of in the backward pass
    real *top, *sum;
    // of the backward pass alone
    const real *grad_out, *delta;
    real *gq, *gk, *gv;
    void *const *grads;  // of each batch row, head and piece
    double unit;         // what slopes by q and k are multiplied with
    int64_t pieces, dp, dvp;
};

INLINE bool is_full(const uint64_t *words, long keys) {
    uint64_t same = ~0ull;
    for (long i = 0; i < keys; i++) same &= words[i];
    return keys == STEP && same == ~0ull;
}

INLINE ivec lanes_of(uint64_t word, int j) {
    ivec bits;
    for (int i = 0; i < LANES; i++) bits[i] = (lane)1 << i;
    return (((lane)(word >> (j * LANES)) - (ivec){}) & bits) != 0;
}

#define GROUP 16
#define LANE_BITS ((1ull << LANES) - 1)

// Q @ K of `keys` keys: all pairs, or of the groups of 16 keys and one vector of queries that hold a live one; `some`
// [groups] says which, a bit for each vector
static void products(real *s, const real *k, long ks, const real *qt, long d, long keys, const uint64_t *words,
                     uint32_t *some) {
    long groups = (keys + GROUP - 1) / GROUP;
    if (!words) {
        for (long g = 0; g < groups; g++) some[g] = (1u << VECS) - 1;
        gemm<false>(s, ROWS, keys, ROWS, k, 1, ks, qt, ROWS, d);
        return;
    }
    for (long g = 0; g < groups; g++) {
        long base = g * GROUP, count = keys - base < GROUP ? keys - base : GROUP;
        uint64_t any = 0;
        for (long i = 0; i < count; i++) any |= words[base + i];
        some[g] = 0;
        for (int j = 0; j < VECS; j++) {
            if (!((any >> (j * LANES)) & LANE_BITS)) continue;
            some[g] |= 1u << j;
            column<false>(s + base * ROWS + j * LANES, ROWS, count, k + base * ks, 1, ks, qt + j * LANES, ROWS, d);
        }
    }
}

// what a weight is divided by, how the slope of one is formed, and what comes back to it
struct Back {
    vec level, share, come;
};

INLINE vec weighed(struct Back back, vec logit, vec factor, ivec live, vec *gain, vec *by_factor);

#include "score.h"

// logits are powers of 2 where nothing is added to them, else of e
#define BASE ((real)(PLAIN ? 1 : 1.4426950408889634))

// The weight, from the logit and its factor, and the slopes by both; without a softmax the first is the
// weight itself.
INLINE vec weighed(struct Back back, vec logit, vec factor, ivec live, vec *gain, vec *by_factor) {
#if SOFTMAX
#if FACTOR
    ivec none = factor == 0;
    vec size = logv(select(none, all(1), factor)), more = least(logit - back.level + size, all(64));
    vec bare = weightv(more * BASE) * back.share;
    vec weight = select(live & ~none, bare, all(0));
    *by_factor = select(none, bare, bare / factor) * back.come;
#else
    vec weight = select(live, weightv((logit - back.level) * BASE) * back.share, all(0));
#endif
    *gain = weight * back.come;
    return weight;
#else
    *gain = back.come * back.share;
    return select(live, logit * back.share, all(0));
#endif
}

// C^T[rows][64] += A[keys, rows]^T P^T[keys][64], for what `some` says
static void add_columns(real *ct, long rows, const real *a, long as, const real *p, long keys, const uint32_t *some,
                        bool full) {
    if (full) {
        gemm<true>(ct, ROWS, rows, ROWS, a, as, 1, p, ROWS, keys);
        return;
    }
    for (long base = 0; base < keys; base += GROUP) {
        long count = keys - base < GROUP ? keys - base : GROUP;
        for (int j = 0; j < VECS; j++)
            if (some[base / GROUP] >> j & 1)
                column<true>(ct + j * LANES, ROWS, rows, a + base * as, as, 1, p + base * ROWS + j * LANES, ROWS, count);
    }
}

// x [rows][d] to xt [d][64] times scale, 0 beyond `rows`
static void transposed(real *xt, const real *x, long xs, long rows, long d, real scale) {
    for (long j = 0; j < d; j++)
        for (long i = 0; i < ROWS; i++) xt[j * ROWS + i] = i < rows ? x[i * xs + j] * scale : 0;
}

struct Steps {
    const struct Grid *grid;
    long entry, last, key;
};

// the next keys of a block of rows: the first and how many; their words, or NULL where all pairs are live
static bool next(struct Steps *at, long *key, long *keys, const uint64_t **words) {
    for (; at->entry < at->last; at->entry++, at->key = -1) {
        const struct Grid *g = at->grid;
        long start = g->start[at->entry], end = g->end[at->entry];
        if (at->key < 0) at->key = start;
        while (at->key < end) {
            long here = at->key, count = end - here < STEP ? end - here : STEP;
            at->key += count;
            *key = here, *keys = count, *words = NULL;
            if (g->words[at->entry] < 0) return true;
            const uint64_t *w = g->masks + g->words[at->entry] + (here - start);
            uint64_t any = 0;
            for (long i = 0; i < count; i++) any |= w[i];
            if (!any) continue;
            if (!is_full(w, count)) *words = w;
            return true;
        }
    }
    return false;
}

static void report(const struct Call *c, const struct Place *at, long line) {
    if (at->wrong < 0) return;
    int64_t pair = line * c->nq * c->n + at->wrong;
#pragma omp critical
    if (*c->wrong < 0 || pair < *c->wrong) *c->wrong = pair;
}

#ifdef FORWARD
static void forward_block(const struct Call *c, long b, long h, long block, real *room) {
    long share = c->heads / c->kv_heads, row = block * ROWS, d = c->d, dv = c->dv, line = b * c->heads + h;
    long rows = c->nq - row < ROWS ? c->nq - row : ROWS;
    const real *q = c->q + b * c->qs[0] + h * c->qs[1] + row * c->qs[2];
    const real *k = c->k + b * c->ks[0] + h / share * c->ks[1], *v = c->v + b * c->vs[0] + h / share * c->vs[1];
    const struct Grid *grid = c->grids + c->index[line];
    real *qt = room, *s = qt + d * ROWS, *ot = s + STEP * ROWS;
    vec top[VECS], sum[VECS];
    uint32_t some[STEP / GROUP];
    struct Place place = {c->leaves + line * LEAVES, NULL, c->sizes, c->origin, c->n, NULL, -1}, *at = &place;
    transposed(qt, q, c->qs[2], rows, d, (real)c->packed);
    memset(ot, 0, sizeof(real) * dv * ROWS);
    for (int j = 0; j < VECS; j++) top[j] = all(NONE), sum[j] = all(0);
    struct Steps steps = {grid, grid->first[block], grid->first[block + 1], -1};
    long key, keys;
    const uint64_t *words;
    while (next(&steps, &key, &keys, &words)) {
        products(s, k + key * c->ks[2], c->ks[2], qt, d, keys, words, some);
        long groups = (keys + GROUP - 1) / GROUP;
        for (int j = 0; j < VECS; j++) {
            vec most = all(NONE), more = all(0);
            for (long g = 0; g < groups; g++)
                if (some[g] >> j & 1)
                    for (long i = g * GROUP; i < keys && i < (g + 1) * GROUP; i++) {
                        real *here = s + i * ROWS + j * LANES;
                        vec x = load(here);
                        ivec live = words ? lanes_of(words[i], j) : truths(true);
#if !PLAIN
                        vec factor;
                        x = score(at, row + j * LANES, key + i, live, x, &factor);
#if FACTOR
                        ivec negative = live & (factor < 0);
                        if (some_of(negative)) note(at, row + j * LANES, key + i, negative);
                        x = select(factor == 0, all(NONE), x + logv(select(factor == 0, all(1), factor)));
#endif
#endif
                        if (words) x = select(live, x, all(SOFTMAX ? NONE : 0));
                        if (words || !PLAIN) store(here, x);
                        if (SOFTMAX) most = larger(x, most);
                        else more += x;
                    }
#if SOFTMAX
            // the greatest moves only where it has grown much: sums are scaled seldom
            ivec grown = most > top[j] + 8 / BASE;
            grown |= (top[j] == NONE) & (most > NONE);
            if (some_of(grown)) {
                vec now = select(grown, most, top[j]);
                vec factor = select(top[j] == NONE, all(0), weightv((top[j] - now) * BASE));
                factor = select(grown, factor, all(1));
                top[j] = now;
                sum[j] *= factor;
                for (long r = 0; r < dv; r++) {
                    real *o = ot + r * ROWS + j * LANES;
                    store(o, load(o) * factor);
                }
            }
            vec base = select(top[j] == NONE, all(0), top[j]);
            for (long g = 0; g < groups; g++)
                if (some[g] >> j & 1)
                    for (long i = g * GROUP; i < keys && i < (g + 1) * GROUP; i++) {
                        vec p = weightv((load(s + i * ROWS + j * LANES) - base) * BASE);
                        store(s + i * ROWS + j * LANES, p);
                        more += p;
                    }
#endif
            sum[j] += more;
        }
        add_columns(ot, dv, v + key * c->vs[2], c->vs[2], s, keys, some, !words);
    }
    real *out = c->out + (line * c->nq + row) * dv, *lse = c->lse + line * c->nq + row;
    for (long i = 0; i < rows; i++) {
        double l = sum[i / LANES][i % LANES], m = top[i / LANES][i % LANES], inverse = 1;
        bool empty = SOFTMAX ? m == NONE && l == 0 : l == 0;
        if (SOFTMAX && c->sink && !empty) {
            // a sink far above all keys would leave no number for them
            double sink = c->sink[line], above = sink > m ? sink : m;
            inverse = exp2((m - above) * BASE);
            l = l * inverse + exp2((sink - above) * BASE), m = above;
        }
        if (c->top) {
            c->top[line * c->nq + row + i] = (real)m;
            c->sum[line * c->nq + row + i] = (real)l;
        }
        if (SOFTMAX) lse[i] = empty ? NONE : (real)(PLAIN ? (m + log2(l)) * 0.69314718055994531 : m + log(l));
        else lse[i] = empty ? NONE : (real)log(l);
        if (SHARED) inverse = empty ? 0 : inverse / l;
        for (long r = 0; r < dv; r++) out[i * dv + r] = ot[r * ROWS + i] * (real)inverse;
    }
    report(c, at, line);
}

static long forward_room(const struct Call *c) { return (c->d + STEP + c->dv) * ROWS; }
#endif

#ifdef BACKWARD
// dQ of a block of rows, added to the dK, dV and gradients of leaves of a piece
static void backward_block(const struct Call *c, long b, long h, long piece, long block, real *gk, real *gv,
                           real *room) {
    long share = c->heads / c->kv_heads, row = block * ROWS, d = c->d, dv = c->dv, dp = c->dp, dvp = c->dvp;
    long rows = c->nq - row < ROWS ? c->nq - row : ROWS, of = b * c->heads + h, line = of * c->nq + row;
    const real *q = c->q + b * c->qs[0] + h * c->qs[1] + row * c->qs[2];
    const real *k = c->k + b * c->ks[0] + h / share * c->ks[1], *v = c->v + b * c->vs[0] + h / share * c->vs[1];
    const struct Grid *grid = c->grids + c->index[of];
    const real *slope = c->grad_out + line * dv;
    real *qt = room, *s = qt + d * ROWS, *ds = s + STEP * ROWS, *slopet = ds + STEP * ROWS;
    real *gqt = slopet + dv * ROWS, *qr = gqt + d * ROWS, *sr = qr + ROWS * dp, *level = sr + ROWS * dvp;
    real *delta = level + ROWS, *share_of = delta + ROWS;
    uint32_t some[STEP / GROUP];
    vec sums[LEAVES + 1] = {};
    void *const *grads = c->grads + (of * c->pieces + piece) * LEAVES;
    struct Place place = {c->leaves + of * LEAVES, grads, c->sizes, c->origin, c->n, sums, -1}, *at = &place;
    transposed(qt, q, c->qs[2], rows, d, (real)c->packed);
    transposed(slopet, slope, dv, rows, dv, 1);
    memset(gqt, 0, sizeof(real) * d * ROWS);
    memset(qr, 0, sizeof(real) * ROWS * (dp + dvp));
    for (long i = 0; i < rows; i++) {
        memcpy(qr + i * dp, q + i * c->qs[2], sizeof(real) * d);
        memcpy(sr + i * dvp, slope + i * dv, sizeof(real) * dv);
    }
    for (long i = 0; i < ROWS; i++) {
        real m = i < rows ? c->top[line + i] : NONE;
        // an empty row has no weights
        level[i] = m == NONE ? INFINITY : m;
        share_of[i] = m == NONE ? 1 : 1 / c->sum[line + i];
        delta[i] = i < rows ? c->delta[line + i] : 0;
    }
    struct Steps steps = {grid, grid->first[block], grid->first[block + 1], -1};
    long key, keys;
    const uint64_t *words;
    while (next(&steps, &key, &keys, &words)) {
        const real *ka = k + key * c->ks[2], *va = v + key * c->vs[2];
        products(s, ka, c->ks[2], qt, d, keys, words, some);
        if (!words) gemm<false>(ds, ROWS, keys, ROWS, va, 1, c->vs[2], slopet, ROWS, dv);
        for (long base = 0; base < keys; base += GROUP) {
            long count = keys - base < GROUP ? keys - base : GROUP;
            for (int j = 0; j < VECS; j++) {
                real *p = s + base * ROWS + j * LANES, *g = ds + base * ROWS + j * LANES;
                if (!(some[base / GROUP] >> j & 1)) {
                    for (long i = 0; i < count; i++) store(p + i * ROWS, all(0)), store(g + i * ROWS, all(0));
                    continue;
                }
                if (words)
                    column<false>(g, ROWS, count, va + base * c->vs[2], 1, c->vs[2], slopet + j * LANES, ROWS, dv);
                vec l = load(level + j * LANES), de = load(delta + j * LANES), o = load(share_of + j * LANES);
                for (long i = 0; i < count; i++) {
                    struct Back back = {l, o, load(g + i * ROWS) - de};
                    ivec live = words ? lanes_of(words[base + i], j) : truths(true);
                    vec x = load(p + i * ROWS), weight;
#if PLAIN
                    vec by_s, unused;
                    weight = weighed(back, x, all(1), live, &by_s, &unused);
#else
                    vec by_s = slopes(at, row + j * LANES, key + base + i, live, x, back, &weight);
#endif
                    store(p + i * ROWS, weight);
                    if (words) by_s = select(live, by_s, all(0));
                    store(g + i * ROWS, by_s);
                }
            }
        }
        gemm<true>(gv + key * dvp, dvp, keys, dvp, s, 1, ROWS, sr, dvp, ROWS);
        gemm<true>(gk + key * dp, dp, keys, dp, ds, 1, ROWS, qr, dp, ROWS);
        add_columns(gqt, d, ka, c->ks[2], ds, keys, some, !words);
    }
    real *gq = c->gq + line * d, unit = (real)(c->packed * c->unit);
    for (long i = 0; i < rows; i++)
        for (long r = 0; r < d; r++) gq[i * d + r] = gqt[r * ROWS + i] * unit;
    for (int i = 0; i < LEAVES; i++)
        if (grads[i] && c->sizes[i * AXES] < 0) *(real *)grads[i] += total(sums[i]);
}

static long backward_room(const struct Call *c) {
    return (2 * c->d + c->dv + 2 * STEP + c->dp + c->dvp + 3) * ROWS;
}
#endif

static real *reserved(long numbers) {
    void *found = NULL;
    return posix_memalign(&found, 64, sizeof(real) * numbers) ? NULL : (real *)found;
}

#ifdef FORWARD
extern "C" int forward(const struct Call *c) {
    long blocks = (c->nq + ROWS - 1) / ROWS, all_blocks = c->batch * c->heads * blocks;
    int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
    {
        real *room = reserved(forward_room(c));
        failed |= !room;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < all_blocks; i++)
            if (room && c->index[i / blocks] >= 0)
                forward_block(c, i / blocks / c->heads, i / blocks % c->heads, i % blocks, room);
        free(room);
    }
    return failed;
}
#endif

#ifdef BACKWARD
// Of each batch row and key head a fixed number of pieces, each with gradients of its own, which the caller adds up in
// order: the same for any number of threads.
extern "C" int backward(const struct Call *c) {
    long blocks = (c->nq + ROWS - 1) / ROWS, share = c->heads / c->kv_heads;
    long tasks = c->batch * c->kv_heads * c->pieces;
    int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
    {
        real *room = reserved(backward_room(c));
        failed |= !room;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) {
            long piece = task % c->pieces, kv = task / c->pieces % c->kv_heads, b = task / c->pieces / c->kv_heads;
            real *gk = c->gk + task * c->n * c->dp, *gv = c->gv + task * c->n * c->dvp;
            for (long h = kv * share; room && h < (kv + 1) * share; h++)
                for (long block = piece; block < blocks && c->index[b * c->heads + h] >= 0; block += c->pieces)
                    backward_block(c, b, h, piece, block, gk, gv, room);
        }
        free(room);
    }
    return failed;
}
#endif
