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
#ifdef __linux__
#include <sys/mman.h>
#endif

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

// lanes i and i ^ STEP_OF change places
template <int STEP_OF>
INLINE vec swapped(vec x) {
#ifdef __clang__
    vec found;
    for (int i = 0; i < LANES; i++) found[i] = x[i ^ STEP_OF];
    return found;
#else
    ivec near = {};
    for (int i = 0; i < LANES; i++) near[i] = i ^ STEP_OF;
    return __builtin_shuffle(x, near);
#endif
}

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

// sums that the registers hold: 32 of them, or 16. Of 113 GFLOP/s of a Zen 4 core 5 x 4 and 8 x 1 reach all,
// 4 x 4 no more than 88
#if BYTES == 64
#define TALL 5
#define WIDE 4
#define DEEP 8
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
    // as many as leave a multiple of 4
    long tall = rows / TALL;
    while (tall && (rows - tall * TALL) % 4) tall--;
    for (long j = 0; j < cols;) {
        long left = (cols - j) / LANES, r = 0;
        if (left >= WIDE) {
            for (; r < tall * TALL; r += TALL)
                product<TALL, WIDE, ADD>(c + r * cs + j, cs, a + r * ar, as, ar, b + j, bs, count);
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
    // of few rows alone: the keys from `low` on in `segments` of SEGMENT, and room for [batch, heads, nq] rows of each
    int64_t low, segments;
    real *parts;
    // Rows and columns of the mask. With a step they are places of sorted entries, so many of each remainder: place i
    // is entry i / width + step * (i % width), of keys with the remainder `shift` first.
    int64_t places, step, shift, q_width, k_width;
};

// Entries `first`, `first` + `step` ...
struct Entries {
    long first, step, count;
};

// the queries of the block that begins at this place
static struct Entries queries_at(const struct Call *c, long place) {
    long first = place, step = 1;
    if (c->step) step = c->step, first = place / c->q_width + place % c->q_width * step;
    long count = first < c->nq ? (c->nq - first + step - 1) / step : 0;
    return {first, step, count < ROWS ? count : ROWS};
}

static long key_at(const struct Call *c, long place) {
    if (!c->step) return place;
    return (place / c->k_width + c->shift) % c->step + place % c->k_width * c->step;
}

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
    vec slope = back.come * back.share;
    *gain = FACTOR ? slope * factor : slope, *by_factor = slope * logit;
    return select(live, (FACTOR ? logit * factor : logit) * back.share, all(0));
#endif
}

#if FACTOR
// what a logit, or a weight, becomes
INLINE vec factored(vec x, vec factor) {
    if (!SOFTMAX) return x * factor;
    return select(factor == 0, all(NONE), x + logv(select(factor == 0, all(1), factor)));
}
#endif

// C^T[rows][64] += A[keys, rows]^T P^T[keys][64], for what `some` says
static void add_columns(real *ct, long rows, const real *a, long as, const real *p, long keys, const uint32_t *some,
                        bool full) {
    if (full) {
        gemm<true>(ct, ROWS, rows, ROWS, a, as, 1, p, ROWS, keys);
        return;
    }
    for (int j = 0; j < VECS; j++)
        for (long base = 0, next; base < keys; base = next) {
            next = base + GROUP;
            if (!(some[base / GROUP] >> j & 1)) continue;
            while (next < keys && some[next / GROUP] >> j & 1) next += GROUP;
            long count = (next < keys ? next : keys) - base;
            column<true>(ct + j * LANES, ROWS, rows, a + base * as, as, 1, p + base * ROWS + j * LANES, ROWS, count);
        }
}

// x[i][j] and x[j][i] change places
template <int STEP_OF = LANES / 2>
INLINE void turn(vec *x) {
    ivec other = {};
    for (int i = 0; i < LANES; i++) other[i] = i & STEP_OF ? -1 : 0;
    for (int i = 0; i < LANES; i++) {
        if (i & STEP_OF) continue;
        vec a = x[i], b = x[i + STEP_OF], crossed = swapped<STEP_OF>(select(other, a, b));
        x[i] = select(other, crossed, a), x[i + STEP_OF] = select(other, b, crossed);
    }
    if constexpr (STEP_OF > 1) turn<STEP_OF / 2>(x);
}

// to[j][i] = from[i][j] * scale[i], or that of j where `by_column`, of rows i and columns j
INLINE void transposed(real *to, long ts, const real *from, long fs, long rows, long columns, const real *scale,
                       bool by_column) {
    for (long i = 0; i < rows; i += LANES)
        for (long j = 0; j < columns; j += LANES) {
            if (i + LANES <= rows && j + LANES <= columns) {
                vec x[LANES];
                for (int l = 0; l < LANES; l++) x[l] = load(from + (i + l) * fs + j) * (by_column ? load(scale + j) : all(scale[i + l]));
                turn(x);
                for (int l = 0; l < LANES; l++) store(to + (j + l) * ts + i, x[l]);
                continue;
            }
            for (long r = i; r < rows && r < i + LANES; r++)
                for (long c = j; c < columns && c < j + LANES; c++) to[c * ts + r] = from[r * fs + c] * scale[by_column ? c : r];
        }
}

// x [rows][d] to xt [d][64] times scale, 0 beyond `rows`
static void packed(real *xt, const real *x, long xs, long rows, long d, real scale) {
    real each[ROWS];
    for (int i = 0; i < ROWS; i++) each[i] = scale;
    if (rows < ROWS) memset(xt, 0, sizeof(real) * d * ROWS);
    transposed(xt, ROWS, x, xs, rows, d, each, false);
}

// xt [d][64] to x, rows of d that are `xs` apart, times the scale of each row
static void unpacked(real *x, long xs, const real *xt, long rows, long d, const real *scale) {
    transposed(x, xs, xt, ROWS, d, rows, scale, true);
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
    struct Entries mine = queries_at(c, row);
    long rows = mine.count, ks = mine.step * c->ks[2], vs = mine.step * c->vs[2];
    const real *q = c->q + b * c->qs[0] + h * c->qs[1] + mine.first * c->qs[2];
    const real *k = c->k + b * c->ks[0] + h / share * c->ks[1], *v = c->v + b * c->vs[0] + h / share * c->vs[1];
    const struct Grid *grid = c->grids + c->index[line];
    real *qt = room, *s = qt + d * ROWS, *ot = s + STEP * ROWS;
    vec top[VECS], sum[VECS];
    uint32_t some[STEP / GROUP];
    struct Place place = {c->leaves + line * LEAVES, NULL, c->sizes, c->origin, c->n, NULL, -1}, *at = &place;
    packed(qt, q, mine.step * c->qs[2], rows, d, (real)c->packed);
    memset(ot, 0, sizeof(real) * dv * ROWS);
    for (int j = 0; j < VECS; j++) top[j] = all(NONE), sum[j] = all(0);
    struct Steps steps = {grid, grid->first[block], grid->first[block + 1], -1};
    long key, keys;
    const uint64_t *words;
    while (next(&steps, &key, &keys, &words)) {
        long at_key = key_at(c, key);
        products(s, k + at_key * c->ks[2], ks, qt, d, keys, words, some);
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
                        if (any(negative)) note(at, row + j * LANES, key + i, negative);
                        x = factored(x, factor);
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
            if (any(grown)) {
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
        add_columns(ot, dv, v + at_key * c->vs[2], vs, s, keys, some, !words);
    }
    long start = line * c->nq + mine.first;
    real *out = c->out + start * dv, *lse = c->lse + start;
    real scale[ROWS];
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
            c->top[start + i * mine.step] = (real)m;
            c->sum[start + i * mine.step] = (real)l;
        }
        if (SOFTMAX) lse[i * mine.step] = empty ? NONE : (real)(PLAIN ? (m + log2(l)) * 0.69314718055994531 : m + log(l));
        else lse[i * mine.step] = empty ? NONE : (real)log(l);
        if (SHARED) inverse = empty ? 0 : inverse / l;
        scale[i] = (real)inverse;
    }
    unpacked(out, mine.step * dv, ot, rows, dv, scale);
    report(c, at, line);
}

static long forward_room(const struct Call *c) { return (c->d + STEP + c->dv) * ROWS; }
#endif

#ifdef BACKWARD
// dQ of a block of rows, added to the dK, dV and gradients of leaves of a piece
static void backward_block(const struct Call *c, long b, long h, long piece, long block, real *gk, real *gv,
                           real *room) {
    long share = c->heads / c->kv_heads, row = block * ROWS, d = c->d, dv = c->dv, dp = c->dp, dvp = c->dvp;
    struct Entries mine = queries_at(c, row);
    long rows = mine.count, of = b * c->heads + h, line = of * c->nq + mine.first, apart = mine.step;
    long ks = c->ks[2] * apart, vs = c->vs[2] * apart;
    const real *q = c->q + b * c->qs[0] + h * c->qs[1] + mine.first * c->qs[2];
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
    packed(qt, q, apart * c->qs[2], rows, d, (real)c->packed);
    packed(slopet, slope, apart * dv, rows, dv, 1);
    memset(gqt, 0, sizeof(real) * d * ROWS);
    memset(qr, 0, sizeof(real) * ROWS * (dp + dvp));
    for (long i = 0; i < rows; i++) {
        memcpy(qr + i * dp, q + i * apart * c->qs[2], sizeof(real) * d);
        memcpy(sr + i * dvp, slope + i * apart * dv, sizeof(real) * dv);
    }
    for (long i = 0; i < ROWS; i++) {
        real m = i < rows ? c->top[line + i * apart] : NONE;
        // an empty row has no weights
        level[i] = m == NONE ? INFINITY : m;
        share_of[i] = m == NONE ? 1 : 1 / c->sum[line + i * apart];
        delta[i] = i < rows ? c->delta[line + i * apart] : 0;
    }
    struct Steps steps = {grid, grid->first[block], grid->first[block + 1], -1};
    long key, keys;
    const uint64_t *words;
    while (next(&steps, &key, &keys, &words)) {
        long at_key = key_at(c, key);
        const real *ka = k + at_key * c->ks[2], *va = v + at_key * c->vs[2];
        products(s, ka, ks, qt, d, keys, words, some);
        if (!words) gemm<false>(ds, ROWS, keys, ROWS, va, 1, vs, slopet, ROWS, dv);
        for (long base = 0; base < keys; base += GROUP) {
            long count = keys - base < GROUP ? keys - base : GROUP;
            for (int j = 0; j < VECS; j++) {
                real *p = s + base * ROWS + j * LANES, *g = ds + base * ROWS + j * LANES;
                if (!(some[base / GROUP] >> j & 1)) {
                    for (long i = 0; i < count; i++) store(p + i * ROWS, all(0)), store(g + i * ROWS, all(0));
                    continue;
                }
                if (words)
                    column<false>(g, ROWS, count, va + base * vs, 1, vs, slopet + j * LANES, ROWS, dv);
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
        gemm<true>(gv + at_key * dvp, apart * dvp, keys, dvp, s, 1, ROWS, sr, dvp, ROWS);
        gemm<true>(gk + at_key * dp, apart * dp, keys, dp, ds, 1, ROWS, qr, dp, ROWS);
        add_columns(gqt, d, ka, ks, ds, keys, some, !words);
    }
    real scale[ROWS];
    for (int i = 0; i < ROWS; i++) scale[i] = (real)(c->packed * c->unit);
    unpacked(c->gq + line * d, apart * d, gqt, rows, d, scale);
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

// To touch fresh memory in pages of 4 KiB takes 7 % of the time of a window of 513 keys.
static void in_large_pages(real *x, long numbers) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, first = ((uintptr_t)x + page - 1) & -page, last = (uintptr_t)(x + numbers) & -page;
    if (first < last) madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
}

#ifdef FORWARD
extern "C" int forward(const struct Call *c) {
    long blocks = (c->places + ROWS - 1) / ROWS, all_blocks = c->batch * c->heads * blocks;
    int failed = 0;
    in_large_pages(c->out, c->batch * c->heads * c->nq * c->dv);
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
    long blocks = (c->places + ROWS - 1) / ROWS, share = c->heads / c->kv_heads;
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

#ifdef DECODE
#define SEGMENT 2048

// lanes whose bit HALF is not set: sums of two of a's, the others: of b's
template <int HALF>
INLINE vec joined(vec a, vec b) {
    ivec other = {};
    for (int i = 0; i < LANES; i++) other[i] = i & HALF ? -1 : 0;
    return select(other, b, a) + swapped<HALF>(select(other, a, b));
}

// of each lane the sum of the vector of that number, of which two and two are joined
template <int HALF>
INLINE vec sums_of(const vec *x) {
    if constexpr (HALF == 1) return x[0];
    else return joined<HALF>(sums_of<HALF / 2>(x), sums_of<HALF / 2>(x + HALF / 2));
}

INLINE vec first_of(const real *p, long count) {
    vec found = all(0);
    for (long i = 0; i < count; i++) found[i] = p[i];
    return found;
}

// s[r][LANES] = q[r] @ k[i] of R rows, `qs` apart, and LANES keys, of which the last stands for those from `keys` on.
// LANES vectors from `ahead` on, `as` apart, are asked for meanwhile: all at once would wait for memory.
template <int R>
INLINE void dots(real *s, const real *q, long qs, const real *k, long ks, long keys, long d, const real *ahead, long as) {
    vec pairs[R][LANES / 2];
    // more keys at once are read out of order, of which memory is slow: 16 take 1.8 times as long, of 16,384 keys
    for (int base = 0; base < LANES; base += 2) {
        const real *first = k + (base < keys ? base : keys - 1) * ks;
        const real *second = k + (base + 1 < keys ? base + 1 : keys - 1) * ks;
        vec sum[R][2] = {};
        long j = 0;
        for (; j + LANES <= d; j += LANES) {
            vec y = load(first + j), z = load(second + j);
            __builtin_prefetch(ahead + base * as + j, 0, 3), __builtin_prefetch(ahead + (base + 1) * as + j, 0, 3);
            for (int r = 0; r < R; r++) {
                vec x = load(q + r * qs + j);
                sum[r][0] += x * y, sum[r][1] += x * z;
            }
        }
        if (j < d) {
            vec y = first_of(first + j, d - j), z = first_of(second + j, d - j);
            for (int r = 0; r < R; r++) {
                vec x = load(q + r * qs + j);
                sum[r][0] += x * y, sum[r][1] += x * z;
            }
        }
        for (int r = 0; r < R; r++) pairs[r][base / 2] = joined<1>(sum[r][0], sum[r][1]);
    }
    for (int r = 0; r < R; r++) store(s + r * STEP, sums_of<LANES / 2>(pairs[r]));
}

INLINE real greatest_of(vec x) {
    real found = x[0];
    for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
    return found;
}

// o[r][dv] += p[r][keys] v[keys][dv]
static void add_rows(real *o, long os, long rows, const real *p, const real *v, long vs, long keys, long dv) {
    long whole_d = dv / LANES * LANES, r = 0;
    if (rows >= 4) {
        r = rows / 4 * 4;
        gemm<true>(o, os, r, whole_d, p, 1, STEP, v, vs, keys);
    }
    for (; r < rows; r++) {
        // values are read once, in the order of memory
        long j = 0;
        for (; j + 8 * LANES <= whole_d; j += 8 * LANES)
            product<1, 8, true>(o + r * os + j, os, p + r * STEP, 1, STEP, v + j, vs, keys);
        for (; j + 4 * LANES <= whole_d; j += 4 * LANES)
            product<1, 4, true>(o + r * os + j, os, p + r * STEP, 1, STEP, v + j, vs, keys);
        for (; j < whole_d; j += LANES) product<1, 1, true>(o + r * os + j, os, p + r * STEP, 1, STEP, v + j, vs, keys);
    }
    for (r = 0; r < rows; r++)
        for (long j = whole_d; j < dv; j++)
            for (long i = 0; i < keys; i++) o[r * os + j] += p[r * STEP + i] * v[i * vs + j];
}

// The rows of some heads of one key head, which have one mask, over a segment of keys: of each its greatest logit, the
// sum of its weights over that and what they sum up to.
static void decode_segment(const struct Call *c, long b, long h0, long heads, long low, long high, real *parts,
                           real *room) {
    long nq = c->nq, d = c->d, dv = c->dv, rows = heads * nq, dp = (d + LANES - 1) / LANES * LANES, width = dv + 2;
    long share = c->heads / c->kv_heads, line = b * c->heads + h0;
    const real *k = c->k + b * c->ks[0] + h0 / share * c->ks[1], *v = c->v + b * c->vs[0] + h0 / share * c->vs[1];
    real *q = room, *s = q + rows * dp;
    struct Steps steps = {c->grids + c->index[line], 0, 0, -1};
    steps.entry = steps.grid->first[0], steps.last = steps.grid->first[1];
    struct Place place = {NULL, NULL, c->sizes, c->origin, c->n, NULL, -1}, *at = &place;
    memset(q, 0, sizeof(real) * rows * dp);
    for (long r = 0; r < rows; r++) {
        const real *from = c->q + b * c->qs[0] + (h0 + r / nq) * c->qs[1] + r % nq * c->qs[2];
        for (long j = 0; j < d; j++) q[r * dp + j] = from[j] * (real)c->packed;
        parts[r * width] = NONE;
        memset(parts + r * width + 1, 0, sizeof(real) * (dv + 1));
    }
    long key, keys;
    const uint64_t *words;
    while (next(&steps, &key, &keys, &words)) {
        long skipped = key < low ? low - key : 0;
        if (skipped >= keys) continue;
        if (key >= high) break;
        key += skipped, keys -= skipped;
        if (words) words += skipped;
        if (key + keys > high) keys = high - key;
        const real *ka = k + key * c->ks[2], *va = v + key * c->vs[2];
        for (long i = 0; i < keys; i += LANES) {
            // what comes next is asked for while this is computed with: values, and the keys after these
            const real *at = ka + i * c->ks[2], *next[] = {va + i * c->vs[2], at + LANES * c->ks[2]};
            long r = 0, apart[] = {c->vs[2], c->ks[2]};
            for (; r + 4 <= rows; r += 4)
                dots<4>(s + r * STEP + i, q + r * dp, dp, at, c->ks[2], keys - i, d, next[r / 4 % 2], apart[r / 4 % 2]);
            for (; r + 2 <= rows; r += 2)
                dots<2>(s + r * STEP + i, q + r * dp, dp, at, c->ks[2], keys - i, d, next[r / 2 % 2], apart[r / 2 % 2]);
            if (r < rows) dots<1>(s + r * STEP + i, q + r * dp, dp, at, c->ks[2], keys - i, d, next[0], apart[0]);
        }
        for (long r = 0; r < rows; r++) {
            real *sr = s + r * STEP, *part = parts + r * width;
            long row = r % nq;
            place.at = c->leaves + (line + r / nq) * LEAVES, place.wrong = -1;
            vec most = all(NONE), more = all(0);
            for (long i = 0; i < keys; i += LANES) {
                ivec live = truths(true);
                if (words || i + LANES > keys)
                    for (int j = 0; j < LANES; j++)
                        live[j] = i + j < keys && (!words || words[i + j] >> row & 1) ? -1 : 0;
                vec x = load(sr + i);
#if !PLAIN
                vec factor;
                x = score(at, row, key + i, live, x, &factor);
#if FACTOR
                ivec negative = live & (factor < 0);
                if (any(negative)) note(at, row, key + i, negative);
                x = factored(x, factor);
#endif
#endif
                x = select(live, x, all(SOFTMAX ? NONE : 0));
                store(sr + i, x);
                if (SOFTMAX) most = larger(x, most);
                else more += x;
            }
            if (place.wrong >= 0) report(c, at, line + r / nq);
#if SOFTMAX
            real top = part[0], found = greatest_of(most);
            if (found > top) {
                real factor = top == NONE ? 0 : weightv(all((top - found) * BASE))[0];
                for (long j = 1; j < width; j++) part[j] *= factor;
                part[0] = top = found;
            }
            for (long i = 0; i < keys; i += LANES) {
                // a row without a key has no number to subtract
                vec p = weightv((load(sr + i) - (top == NONE ? 0 : top)) * BASE);
                store(sr + i, p);
                more += p;
            }
#endif
            part[1] += total(more);
        }
        add_rows(parts + 2, width, rows, s, va, c->vs[2], keys, dv);
    }
}

static void decode_row(const struct Call *c, long line, long row) {
    long dv = c->dv, width = dv + 2, each = c->batch * c->heads * c->nq * width;
    const real *parts = c->parts + (line * c->nq + row) * width;
    double most = NONE, sum = 0;
    for (long i = 0; SOFTMAX && i < c->segments; i++) most = parts[i * each] > most ? parts[i * each] : most;
    bool empty = SOFTMAX && most == NONE;
    // a NaN is no greatest logit, and no empty row
    for (long i = 0; i < c->segments; i++) empty &= parts[i * each + 1] == 0;
    real *out = c->out + (line * c->nq + row) * dv;
    memset(out, 0, sizeof(real) * dv);
    if (SOFTMAX && c->sink && !empty && c->sink[line] > most) most = c->sink[line];
    for (long i = 0; i < c->segments && !empty; i++) {
        const real *part = parts + i * each;
        double factor = SOFTMAX ? exp2((part[0] - most) * BASE) : 1;
        sum += part[1] * factor;
        for (long j = 0; j < dv; j++) out[j] += part[2 + j] * (real)factor;
    }
    if (SOFTMAX && c->sink && !empty) sum += exp2((c->sink[line] - most) * BASE);
    if (!SOFTMAX) empty = sum == 0;
    c->lse[line * c->nq + row] =
        empty ? NONE : (real)(!SOFTMAX ? log(sum) : PLAIN ? (most + log2(sum)) * 0.69314718055994531 : most + log(sum));
    for (long j = 0; SHARED && j < dv; j++) out[j] = empty ? 0 : (real)(out[j] / sum);
}

// Few rows: lanes are keys, or numbers of a vector. Query heads that share a key head are rows of one product where
// they have one mask.
extern "C" int decode(const struct Call *c) {
    long share = c->heads / c->kv_heads, lines = c->batch * c->heads, dp = (c->d + LANES - 1) / LANES * LANES;
    long tasks = c->segments * c->batch * c->kv_heads, width = c->dv + 2;
    int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
    {
        real *room = reserved(share * c->nq * (dp + STEP));
        failed |= !room;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) {
            long kv = task % c->kv_heads, b = task / c->kv_heads % c->batch, segment = task / c->kv_heads / c->batch;
            long low = c->low + segment * SEGMENT, first = b * c->heads + kv * share;
            for (long h = 0, next_h; room && h < share; h = next_h) {
                for (next_h = h + 1; next_h < share && c->index[first + next_h] == c->index[first + h];) next_h++;
                if (c->index[first + h] < 0) continue;
                real *parts = c->parts + (segment * lines + first + h) * c->nq * width;
                decode_segment(c, b, kv * share + h, next_h - h, low, low + SEGMENT, parts, room);
            }
        }
        free(room);
#pragma omp for
        for (long i = 0; i < lines * c->nq; i++)
            if (c->index[i / c->nq] >= 0) decode_row(c, i / c->nq, i % c->nq);
    }
    return failed;
}
#endif
