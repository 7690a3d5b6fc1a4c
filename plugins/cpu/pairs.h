// What generated scores are written in: integers and truths of LANES pairs, which are queries of one key or, with
// DECODE defined, keys of one query, and what they read and add to.
#pragma once
#include "functions.h"

// NARROW is defined where all integers are below 2^23 and all tables have less than 2^31 entries
#if defined(NARROW) && !defined(DOUBLE)
typedef int32_t integer;
typedef uint32_t natural;
#else
typedef int64_t integer;
typedef uint64_t natural;
#endif
typedef integer whole __attribute__((vector_size(sizeof(integer) * LANES)));
typedef natural naturals __attribute__((vector_size(sizeof(natural) * LANES)));
typedef integer loose_whole __attribute__((vector_size(sizeof(integer) * LANES), aligned(sizeof(integer)), may_alias));

INLINE whole wholes(integer x) { return x - (whole){}; }
INLINE ivec truths(bool x) { return (ivec){} - (lane)x; }
INLINE vec reals(whole x) { return __builtin_convertvector(x, vec); }
INLINE ivec truth(ivec x) { return x; }
INLINE vec least(vec a, vec b) { return select((a <= b) | (a != a), a, b); }
INLINE vec greatest(vec a, vec b) { return select((a >= b) | (a != a), a, b); }
INLINE vec size(vec x) { return select(x < 0, -x, x); }
INLINE vec quotient(vec a, vec b) { return floorv(a / b); }
INLINE vec remainder(vec a, vec b) {
    vec found = a - b * floorv(a / b);
    found = select(found < 0, found + b, found);
    return select(found >= b, found - b, found);
}
#if !defined(DOUBLE) && !defined(NARROW)
INLINE ivec truth(whole x) { return __builtin_convertvector(x, ivec); }
#endif
INLINE whole select(ivec where, whole a, whole b) {
    whole here = __builtin_convertvector(where, whole);
    return (here & a) | (~here & b);
}
INLINE whole least(whole a, whole b) { return select(truth(a < b), a, b); }
INLINE whole greatest(whole a, whole b) { return select(truth(a > b), a, b); }
INLINE whole size(whole x) { return select(truth(x < 0), -x, x); }

INLINE whole quotient(whole a, whole b) {
    whole by = greatest(b, wholes(1));
#if defined(NARROW) && !defined(DOUBLE)
    // the quotient of reals is off by less than 1
    whole found = __builtin_convertvector(floorv(reals(a) / reals(by)), whole);
    found += select(truth((found + 1) * by <= a), wholes(1), wholes(0));
#else
    whole found = a / by;
#endif
    return found - select(truth(found * by > a), wholes(1), wholes(0));
}
INLINE whole remainder(whole a, whole b) { return a - quotient(a, b) * greatest(b, wholes(1)); }

INLINE whole rounded(vec x) {
    const real most = sizeof(integer) == 4 ? (real)0x1p30 : (real)0x1p62;
    vec within = select(x == x, least(greatest(floorv(x), all(-most)), all(most)), all(0));
    return __builtin_convertvector(within, whole);
}

// rounded down, of integers from 1 on
INLINE whole bits(whole x) {
    whole found;
    for (int i = 0; i < LANES; i++) found[i] = 63 - __builtin_clzll(x[i] < 1 ? 1 : x[i]);
    return found;
}

INLINE whole root(whole x) {
    whole found;
    for (int i = 0; i < LANES; i++) {
        int64_t y = x[i] < 0 ? 0 : x[i], r = (int64_t)__builtin_sqrt((double)y);
        r -= r * r > y;
        found[i] = (integer)r + ((r + 1) * (r + 1) <= y);
    }
    return found;
}

INLINE whole power(whole a, whole b) {
    whole found = wholes(1);
    for (int i = 0; i < LANES; i++)
        for (int64_t j = 0, x = a[i], y = b[i] < 0 ? 0 : b[i]; j < 64 && y; j++, y >>= 1, x *= x)
            if (y & 1) found[i] *= (integer)x;
    return found;
}

INLINE real total(vec x) {
    real found = 0;
    for (int i = 0; i < LANES; i++) found += x[i];
    return found;
}

#define AXES 5

// Of one batch row and head, for a block of queries: of each leaf where it begins, and its gradient, or NULL.
struct Place {
    const void *const *at;
    void *const *grad;
    const int64_t *sizes;  // of each leaf the sizes of its axes, if it is a table
    long origin;           // where a distance of entries 0 is kept
    long n;
    vec *sums;             // gradients of numbers
    int64_t wrong;         // a pair that reads beyond a table or has a negative decay, or -1
};

INLINE void note(struct Place *at, long row, long key, ivec where) {
    for (int i = 0; i < LANES; i++)
        if (where[i] && at->wrong < 0) {
#ifdef DECODE
            at->wrong = row * at->n + key + i;
#else
            at->wrong = (row + i) * at->n + key;
#endif
        }
}

#define REALS(i) ((const real *)at->at[i])
#define WHOLES(i) ((const integer *)at->at[i])
INLINE whole load_whole(const integer *p) { return *(const loose_whole *)p; }
INLINE vec real_of_number(struct Place *at, int i) { return all(REALS(i)[0]); }
INLINE whole int_of_number(struct Place *at, int i) { return wholes(WHOLES(i)[0]); }
INLINE whole counted(integer first) {
    whole found;
    for (int i = 0; i < LANES; i++) found[i] = first + i;
    return found;
}
#ifdef DECODE
INLINE whole entry_of_query(long row) { return wholes((integer)row); }
INLINE whole entry_of_key(long key) { return counted((integer)key); }
INLINE vec real_of_query(struct Place *at, int i, long row) { return all(REALS(i)[row]); }
INLINE vec real_of_key(struct Place *at, int i, long key) { return load(REALS(i) + key); }
template <class V>
INLINE V reversed(V x) {
    V found;
    for (int j = 0; j < LANES; j++) found[j] = x[LANES - 1 - j];
    return found;
}
INLINE vec real_of_distance(struct Place *at, int i, long row, long key) {
    return reversed(load(REALS(i) + row - key + at->origin - (LANES - 1)));
}
INLINE whole int_of_query(struct Place *at, int i, long row) { return wholes(WHOLES(i)[row]); }
INLINE whole int_of_key(struct Place *at, int i, long key) { return load_whole(WHOLES(i) + key); }
INLINE whole int_of_distance(struct Place *at, int i, long row, long key) {
    return reversed(load_whole(WHOLES(i) + row - key + at->origin - (LANES - 1)));
}
#else
INLINE whole entry_of_query(long row) { return counted((integer)row); }
INLINE whole entry_of_key(long key) { return wholes((integer)key); }
INLINE vec real_of_query(struct Place *at, int i, long row) { return load(REALS(i) + row); }
INLINE vec real_of_key(struct Place *at, int i, long key) { return all(REALS(i)[key]); }
INLINE vec real_of_distance(struct Place *at, int i, long row, long key) {
    return load(REALS(i) + row - key + at->origin);
}
INLINE whole int_of_query(struct Place *at, int i, long row) { return load_whole(WHOLES(i) + row); }
INLINE whole int_of_key(struct Place *at, int i, long key) { return wholes(WHOLES(i)[key]); }
INLINE whole int_of_distance(struct Place *at, int i, long row, long key) {
    return load_whole(WHOLES(i) + row - key + at->origin);
}
#endif
INLINE ivec bool_of_number(struct Place *at, int i) { return truth(int_of_number(at, i) != 0); }
INLINE ivec bool_of_query(struct Place *at, int i, long row) { return truth(int_of_query(at, i, row) != 0); }
INLINE ivec bool_of_key(struct Place *at, int i, long key) { return truth(int_of_key(at, i, key) != 0); }
INLINE ivec bool_of_distance(struct Place *at, int i, long row, long key) {
    return truth(int_of_distance(at, i, row, key) != 0);
}

// where an entry of a table stands, and whether there is one; the first where there is none
template <class... Index>
INLINE whole entry(struct Place *at, int i, ivec *inside, Index... indices) {
    whole found = wholes(0);
    const int64_t *size = at->sizes + i * AXES;
    *inside = truths(true);
    const whole asked[] = {indices...};
    for (const whole &index : asked) {
        *inside &= truth((naturals)index < (naturals)wholes((integer)*size));
        found = found * (integer)*size++ + index;
    }
    return select(*inside, found, wholes(0));
}
template <class... Index>
INLINE whole checked(struct Place *at, int i, long row, long key, ivec live, Index... indices) {
    ivec inside;
    whole found = entry(at, i, &inside, indices...);
    if (any(live & ~inside)) note(at, row, key, live & ~inside);
    return found;
}
INLINE vec fetched(const real *from, whole where) {
#if SIXTEEN && defined(NARROW)
    return (vec)__builtin_ia32_gathersiv16sf((vec){}, from, where, (unsigned short)-1, 4);
#else
    vec found;
    for (int j = 0; j < LANES; j++) found[j] = from[where[j]];
    return found;
#endif
}
template <class... Index>
INLINE vec real_of_table(struct Place *at, int i, long row, long key, ivec live, Index... indices) {
    whole where = checked(at, i, row, key, live, indices...);
    return fetched(REALS(i), where);
}
template <class... Index>
INLINE whole int_of_table(struct Place *at, int i, long row, long key, ivec live, Index... indices) {
    whole where = checked(at, i, row, key, live, indices...), found;
    for (int j = 0; j < LANES; j++) found[j] = WHOLES(i)[where[j]];
    return found;
}
template <class... Index>
INLINE ivec bool_of_table(struct Place *at, int i, long row, long key, ivec live, Index... indices) {
    ivec inside;
    whole where = entry(at, i, &inside, indices...), found;
    for (int j = 0; j < LANES; j++) found[j] = WHOLES(i)[where[j]];
    return inside & truth(found != 0);
}

#define GRAD(i) ((real *)at->grad[i])
INLINE void add_number(struct Place *at, int i, vec x) { at->sums[i] += x; }
INLINE void add_query(struct Place *at, int i, long row, vec x) { store(GRAD(i) + row, load(GRAD(i) + row) + x); }
INLINE void add_key(struct Place *at, int i, long key, vec x) { GRAD(i)[key] += total(x); }
INLINE void add_distance(struct Place *at, int i, long row, long key, vec x) {
    real *to = GRAD(i) + row - key + at->origin;
    store(to, load(to) + x);
}
template <class... Index>
INLINE void add_table(struct Place *at, int i, vec x, Index... indices) {
    ivec inside;
    whole where = entry(at, i, &inside, indices...);
    for (int j = 0; j < LANES; j++) GRAD(i)[where[j]] += x[j];
}
