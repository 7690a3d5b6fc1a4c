// One pass of plugins/cpu/kernel.cpp on operands drawn by a rule, for processors that Python is not here for: prints
// what it writes. INTEGERS, NUMBERS and TABLES say, by a bit for each leaf, what it holds.
#include <stdio.h>

#include <vector>

#include "kernel.cpp"

static uint32_t state = 1;
// between 0 and 1
static real drawn() {
    state = state * 1664525u + 1013904223u;
    return (real)(state >> 8) / (1 << 24);
}
static std::vector<real> reals_of(long count, real low) {
    std::vector<real> found(count);
    for (real &x : found) x = low + (1 - low) * drawn();
    return found;
}

static void print(const char *name, const std::vector<real> &found) {
    for (real x : found) printf("%s %.9g\n", name, (double)x);
}

int main() {
#ifdef DECODE
    const long nq = 3;
#else
    const long nq = 77;
#endif
    const long batch = 2, heads = 4, kv_heads = 2, n = 130, d = 17, dv = 33, pieces = 2, lines = batch * heads;
    auto q = reals_of(lines * nq * d, -1), k = reals_of(batch * kv_heads * n * d, -1);
    auto v = reals_of(batch * kv_heads * n * dv, -1);
    std::vector<uint64_t> masks(2 * (n - 64));
    for (uint64_t &word : masks)
        for (int i = 0; i < 64; i++) word |= (uint64_t)(drawn() < (real)0.4) << i;
    const int64_t first[] = {0, 2, 4}, words[] = {-1, 0, -1, n - 64};
    const int32_t start[] = {0, 64, 0, 64}, end[] = {64, n, 64, n};
    const Grid grid = {first, start, end, words, masks.data()};
    std::vector<int32_t> index(lines, 0);

    const long entries = 4096;
    std::vector<std::vector<real>> held(LEAVES), slopes;
    std::vector<std::vector<integer>> whole(LEAVES);
    std::vector<const void *> leaves(lines * LEAVES + 1);
    std::vector<void *> grads(lines * pieces * LEAVES + 1);
    std::vector<int64_t> sizes(LEAVES * AXES + 1);
    slopes.assign(lines * pieces * LEAVES, std::vector<real>(entries));
    for (int i = 0; i < LEAVES; i++) {
        held[i] = reals_of(entries, (real)0.1);
        for (long j = 0; j < entries; j++) whole[i].push_back((integer)(TRUTHS >> i & 1 ? drawn() * 2 : 1 + drawn() * 4));
        for (int j = 0; j < AXES; j++) sizes[i * AXES + j] = NUMBERS >> i & 1 ? -1 : TABLES >> i & 1 ? 5 : 0;
        for (long line = 0; line < lines; line++)
            leaves[line * LEAVES + i] = INTEGERS >> i & 1 ? (const void *)whole[i].data() : held[i].data();
    }
    for (size_t i = 0; i < slopes.size(); i++) grads[i] = slopes[i].data();

    Call c = {};
    c.q = q.data(), c.k = k.data(), c.v = v.data(), c.grids = &grid, c.index = index.data();
    c.batch = batch, c.heads = heads, c.kv_heads = kv_heads, c.nq = nq, c.n = n, c.d = d, c.dv = dv, c.places = nq;
    c.qs[0] = heads * nq * d, c.qs[1] = nq * d, c.qs[2] = d;
    c.ks[0] = kv_heads * n * d, c.ks[1] = n * d, c.ks[2] = d;
    c.vs[0] = kv_heads * n * dv, c.vs[1] = n * dv, c.vs[2] = dv;
    c.packed = 0.3, c.unit = 0.7, c.threads = 1;
    int64_t wrong = -1;
    c.leaves = leaves.data(), c.sizes = sizes.data(), c.origin = n - 1 + 16, c.wrong = &wrong;
    std::vector<real> out(lines * nq * dv), lse(lines * nq), sink = reals_of(lines, -1);
    c.out = out.data(), c.lse = lse.data(), c.sink = sink.data();
    int failed;
#if defined(FORWARD)
    failed = forward(&c);
    print("out", out), print("lse", lse);
#elif defined(DECODE)
    std::vector<real> parts(lines * nq * (dv + 2));
    c.segments = 1, c.parts = parts.data();
    failed = decode(&c);
    print("out", out), print("lse", lse);
#else
    auto top = reals_of(lines * nq, 0), sum = reals_of(lines * nq, (real)0.5), delta = reals_of(lines * nq, -1);
    auto slope = reals_of(lines * nq * dv, -1);
    c.dp = 32, c.dvp = 48, c.pieces = pieces;
    std::vector<real> gq(q.size()), gk(batch * kv_heads * pieces * n * c.dp), gv(batch * kv_heads * pieces * n * c.dvp);
    c.top = top.data(), c.sum = sum.data(), c.delta = delta.data(), c.grad_out = slope.data();
    c.gq = gq.data(), c.gk = gk.data(), c.gv = gv.data(), c.grads = grads.data();
    failed = backward(&c);
    print("gq", gq), print("gk", gk), print("gv", gv);
    for (auto &found : slopes) print("slopes", found);
#endif
    return failed;
}
