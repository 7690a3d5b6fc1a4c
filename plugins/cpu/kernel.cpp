// Attention over tiles, forward and backward. Lanes are queries: of a block of 64 rows Q^T is packed once, with
// the scale in base 2 in it; then S^T = K Q^T, P^T = exp2(S^T - m), O^T += V^T P^T, keys and values being read row
// by row as broadcasts. So softmax runs down the columns, and a mask is one word of 64 bits for each key.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define ROWS 64  // queries of a block
#define STEP 64  // keys at a time
#define VECS (ROWS / LANES)

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))
static const float NONE = -INFINITY;

INLINE vec all(float x) { return x - (vec){}; }
INLINE vec load(const float *p) { return *(const loose *)p; }
INLINE void store(float *p, vec x) { *(loose *)p = x; }
INLINE vec select(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }
INLINE vec larger(vec a, vec b) { return select(a > b, a, b); }

// 2^x: a polynomial of degree 6 in the fraction, |x - round(x)| <= 1/2; 0 below 2^-126, NaN stays NaN
INLINE vec exp2v(vec x) {
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

// C[R][N vectors] of rows `cs` apart (+)= sum over i < count of A[i * as + r * ar] (one number) * B[i * bs] (vectors)
template <int R, int N, bool ADD>
INLINE void product(float *c, long cs, const float *a, long as, long ar, const float *b, long bs, long count) {
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
            float *at = c + r * cs + n * LANES;
            store(at, ADD ? load(at) + sum[r][n] : sum[r][n]);
        }
}

// sums that the registers hold: 32 of them, or 16
#if LANES == 16
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
INLINE void column(float *c, long cs, long rows, const float *a, long as, long ar, const float *b, long bs, long count) {
    long r = 0;
    for (; r + DEEP <= rows; r += DEEP) product<DEEP, 1, ADD>(c + r * cs, cs, a + r * ar, as, ar, b, bs, count);
    for (; r < rows; r++) product<1, 1, ADD>(c + r * cs, cs, a + r * ar, as, ar, b, bs, count);
}

// as `product`, of any number of rows and a multiple of LANES columns
template <bool ADD>
static void gemm(float *c, long cs, long rows, long cols, const float *a, long as, long ar, const float *b, long bs,
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
    const float *q, *k, *v;
    float *out, *lse;
    const struct Grid *grids;  // of each batch row and head, by `index`
    const int32_t *index;
    int64_t batch, heads, kv_heads, nq, n, d, dv;
    int64_t qs[3], ks[3], vs[3];  // strides of batch row, head, token
    float scale;
    int32_t threads;
    // of each row a number near its greatest logit and the sum of 2^(logit - that), both in base 2: written by the
    // forward pass where asked, and what weights are made of in the backward pass
    float *top, *sum;
    // of the backward pass alone
    const float *grad_out, *delta;
    float *gq, *gk, *gv;
    int64_t pieces, dp, dvp;
};

INLINE bool is_full(const uint64_t *words, long keys) {
    uint64_t same = ~0ull;
    for (long i = 0; i < keys; i++) same &= words[i];
    return keys == STEP && same == ~0ull;
}

INLINE ivec lanes_of(uint64_t word, int j) {
    ivec bits, found;
    for (int i = 0; i < LANES; i++) bits[i] = 1 << i;
    found = ((int32_t)(word >> (j * LANES)) - (ivec){}) & bits;
    return found != 0;
}

#define GROUP 16
#define LANE_BITS (LANES == 64 ? ~0ull : (1ull << (LANES & 63)) - 1)

// logits of `keys` keys: all pairs, or of the groups of 16 keys and one vector of queries that hold a live one;
// `some` [groups] says which, a bit for each vector; what is not live is -inf
static void logits(float *s, const float *k, long ks, const float *qt, long d, long keys, const uint64_t *words,
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
            float *here = s + base * ROWS + j * LANES;
            column<false>(here, ROWS, count, k + base * ks, 1, ks, qt + j * LANES, ROWS, d);
            for (long i = 0; i < count; i++)
                store(here + i * ROWS, select(lanes_of(words[base + i], j), load(here + i * ROWS), all(NONE)));
        }
    }
}

// C^T[rows][64] += A[keys, rows]^T P^T[keys][64], for what `some` says
static void add_columns(float *ct, long rows, const float *a, long as, const float *p, long keys, const uint32_t *some,
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
static void transposed(float *xt, const float *x, long xs, long rows, long d, float scale) {
    for (long j = 0; j < d; j++)
        for (long i = 0; i < ROWS; i++) xt[j * ROWS + i] = i < rows ? x[i * xs + j] * scale : 0.0f;
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

static void forward_block(const struct Call *c, long b, long h, long block, float *room) {
    long share = c->heads / c->kv_heads, row = block * ROWS, d = c->d, dv = c->dv;
    long rows = c->nq - row < ROWS ? c->nq - row : ROWS;
    const float *q = c->q + b * c->qs[0] + h * c->qs[1] + row * c->qs[2];
    const float *k = c->k + b * c->ks[0] + h / share * c->ks[1], *v = c->v + b * c->vs[0] + h / share * c->vs[1];
    const struct Grid *grid = c->grids + c->index[b * c->heads + h];
    float *qt = room, *s = qt + d * ROWS, *ot = s + STEP * ROWS;
    vec top[VECS], sum[VECS];
    uint32_t some[STEP / GROUP];
    transposed(qt, q, c->qs[2], rows, d, c->scale * 1.44269504f);
    memset(ot, 0, sizeof(float) * dv * ROWS);
    for (int j = 0; j < VECS; j++) top[j] = all(NONE), sum[j] = all(0.0f);
    struct Steps at = {grid, grid->first[block], grid->first[block + 1], -1};
    long key, keys;
    const uint64_t *words;
    while (next(&at, &key, &keys, &words)) {
        logits(s, k + key * c->ks[2], c->ks[2], qt, d, keys, words, some);
        long groups = (keys + GROUP - 1) / GROUP;
        for (int j = 0; j < VECS; j++) {
            vec most = all(NONE);
            for (long g = 0; g < groups; g++)
                if (some[g] >> j & 1)
                    for (long i = g * GROUP; i < keys && i < (g + 1) * GROUP; i++)
                        most = larger(load(s + i * ROWS + j * LANES), most);
            // the greatest moves only where it has grown much: sums are scaled seldom
            ivec grown = most > top[j] + 8.0f;
            grown |= (top[j] == NONE) & (most > NONE);
            bool moved = false;
            for (int i = 0; i < LANES; i++) moved |= grown[i] != 0;
            if (moved) {
                vec now = select(grown, most, top[j]);
                vec factor = select(top[j] == NONE, all(0.0f), exp2v(top[j] - now));
                factor = select(grown, factor, all(1.0f));
                top[j] = now;
                sum[j] *= factor;
                for (long r = 0; r < dv; r++) {
                    float *o = ot + r * ROWS + j * LANES;
                    store(o, load(o) * factor);
                }
            }
            vec base = select(top[j] == NONE, all(0.0f), top[j]), total = all(0.0f);
            for (long g = 0; g < groups; g++)
                if (some[g] >> j & 1)
                    for (long i = g * GROUP; i < keys && i < (g + 1) * GROUP; i++) {
                        vec p = exp2v(load(s + i * ROWS + j * LANES) - base);
                        store(s + i * ROWS + j * LANES, p);
                        total += p;
                    }
            sum[j] += total;
        }
        add_columns(ot, dv, v + key * c->vs[2], c->vs[2], s, keys, some, !words);
    }
    float *out = c->out + ((b * c->heads + h) * c->nq + row) * dv, *lse = c->lse + (b * c->heads + h) * c->nq + row;
    for (long i = 0; i < rows; i++) {
        float l = sum[i / LANES][i % LANES], m = top[i / LANES][i % LANES];
        bool empty = m == NONE && l == 0.0f;
        if (c->top) {
            c->top[(b * c->heads + h) * c->nq + row + i] = m;
            c->sum[(b * c->heads + h) * c->nq + row + i] = l;
        }
        lse[i] = empty ? NONE : (float)(((double)m + log2((double)l)) * 0.69314718055994531);
        float inverse = empty ? 0.0f : 1.0f / l;
        for (long r = 0; r < dv; r++) out[i * dv + r] = ot[r * ROWS + i] * inverse;
    }
}

static long forward_room(const struct Call *c) { return (c->d + STEP + c->dv) * ROWS; }

// dQ of a block of rows, added to the dK and dV of a piece
static void backward_block(const struct Call *c, long b, long h, long block, float *gk, float *gv, float *room) {
    long share = c->heads / c->kv_heads, row = block * ROWS, d = c->d, dv = c->dv, dp = c->dp, dvp = c->dvp;
    long rows = c->nq - row < ROWS ? c->nq - row : ROWS, line = (b * c->heads + h) * c->nq + row;
    const float *q = c->q + b * c->qs[0] + h * c->qs[1] + row * c->qs[2];
    const float *k = c->k + b * c->ks[0] + h / share * c->ks[1], *v = c->v + b * c->vs[0] + h / share * c->vs[1];
    const struct Grid *grid = c->grids + c->index[b * c->heads + h];
    const float *slope = c->grad_out + line * dv;
    float *qt = room, *s = qt + d * ROWS, *ds = s + STEP * ROWS, *slopet = ds + STEP * ROWS;
    float *gqt = slopet + dv * ROWS, *qr = gqt + d * ROWS, *sr = qr + ROWS * dp, *level = sr + ROWS * dvp;
    float *delta = level + ROWS, *share_of = delta + ROWS;
    uint32_t some[STEP / GROUP];
    transposed(qt, q, c->qs[2], rows, d, c->scale * 1.44269504f);
    transposed(slopet, slope, dv, rows, dv, 1.0f);
    memset(gqt, 0, sizeof(float) * d * ROWS);
    memset(qr, 0, sizeof(float) * ROWS * (dp + dvp));
    for (long i = 0; i < rows; i++) {
        memcpy(qr + i * dp, q + i * c->qs[2], sizeof(float) * d);
        memcpy(sr + i * dvp, slope + i * dv, sizeof(float) * dv);
    }
    for (long i = 0; i < ROWS; i++) {
        float m = i < rows ? c->top[line + i] : NONE;
        // an empty row has no weights
        level[i] = m == NONE ? INFINITY : m;
        share_of[i] = m == NONE ? 1.0f : 1.0f / c->sum[line + i];
        delta[i] = i < rows ? c->delta[line + i] : 0.0f;
    }
    struct Steps at = {grid, grid->first[block], grid->first[block + 1], -1};
    long key, keys;
    const uint64_t *words;
    while (next(&at, &key, &keys, &words)) {
        const float *ka = k + key * c->ks[2], *va = v + key * c->vs[2];
        logits(s, ka, c->ks[2], qt, d, keys, words, some);
        if (!words) gemm<false>(ds, ROWS, keys, ROWS, va, 1, c->vs[2], slopet, ROWS, dv);
        for (long base = 0; base < keys; base += GROUP) {
            long count = keys - base < GROUP ? keys - base : GROUP;
            for (int j = 0; j < VECS; j++) {
                float *p = s + base * ROWS + j * LANES, *g = ds + base * ROWS + j * LANES;
                if (!(some[base / GROUP] >> j & 1)) {
                    for (long i = 0; i < count; i++) store(p + i * ROWS, all(0.0f)), store(g + i * ROWS, all(0.0f));
                    continue;
                }
                if (words)
                    column<false>(g, ROWS, count, va + base * c->vs[2], 1, c->vs[2], slopet + j * LANES, ROWS, dv);
                vec l = load(level + j * LANES), de = load(delta + j * LANES), o = load(share_of + j * LANES);
                for (long i = 0; i < count; i++) {
                    vec w = exp2v(load(p + i * ROWS) - l) * o;
                    store(p + i * ROWS, w);
                    store(g + i * ROWS, w * (load(g + i * ROWS) - de));
                }
            }
        }
        gemm<true>(gv + key * dvp, dvp, keys, dvp, s, 1, ROWS, sr, dvp, ROWS);
        gemm<true>(gk + key * dp, dp, keys, dp, ds, 1, ROWS, qr, dp, ROWS);
        add_columns(gqt, d, ka, c->ks[2], ds, keys, some, !words);
    }
    float *gq = c->gq + line * d;
    for (long i = 0; i < rows; i++)
        for (long r = 0; r < d; r++) gq[i * d + r] = gqt[r * ROWS + i] * c->scale;
}

static long backward_room(const struct Call *c) {
    return (2 * c->d + c->dv + 2 * STEP + c->dp + c->dvp + 3) * ROWS;
}

static float *reserved(long numbers) {
    void *found = NULL;
    return posix_memalign(&found, 64, sizeof(float) * numbers) ? NULL : (float *)found;
}

extern "C" int forward(const struct Call *c) {
    long blocks = (c->nq + ROWS - 1) / ROWS, all_blocks = c->batch * c->heads * blocks;
    int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
    {
        float *room = reserved(forward_room(c));
        failed |= !room;
#pragma omp for schedule(dynamic)
        for (long i = 0; i < all_blocks; i++)
            if (room) forward_block(c, i / blocks / c->heads, i / blocks % c->heads, i % blocks, room);
        free(room);
    }
    return failed;
}

// Of each batch row and key head a fixed number of pieces, each with gradients of keys and values of its own, which
// the caller adds up in order: the same for any number of threads.
extern "C" int backward(const struct Call *c) {
    long blocks = (c->nq + ROWS - 1) / ROWS, share = c->heads / c->kv_heads;
    long tasks = c->batch * c->kv_heads * c->pieces;
    int failed = 0;
#pragma omp parallel num_threads(c->threads) reduction(| : failed)
    {
        float *room = reserved(backward_room(c));
        failed |= !room;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tasks; task++) {
            long piece = task % c->pieces, kv = task / c->pieces % c->kv_heads, b = task / c->pieces / c->kv_heads;
            float *gk = c->gk + task * c->n * c->dp, *gv = c->gv + task * c->n * c->dvp;
            for (long h = kv * share; room && h < (kv + 1) * share; h++)
                for (long block = piece; block < blocks; block += c->pieces)
                    backward_block(c, b, h, block, gk, gv, room);
        }
        free(room);
    }
    return failed;
}
