// Vectors as wide as the registers: of floats, or with DOUBLE defined of half as many doubles
#pragma once
#include <stdint.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

#ifdef DOUBLE
#define LANES (BYTES / 8)
typedef double real;
typedef int64_t lane;
#else
#define LANES (BYTES / 4)
typedef float real;
typedef int32_t lane;
#endif

typedef real vec __attribute__((vector_size(BYTES)));
typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
typedef lane ivec __attribute__((vector_size(BYTES)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec all(real x) { return x - (vec){}; }
INLINE vec load(const real *p) { return *(const loose *)p; }
INLINE void store(real *p, vec x) { *(loose *)p = x; }
INLINE vec select(ivec where, vec a, vec b) { return where ? a : b; }
// of a NaN and a number: b
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
INLINE vec smaller(vec a, vec b) { return a < b ? a : b; }
#if defined(__AVX512F__) && !defined(__clang__) && !defined(DOUBLE)
// what compilers do not make of loops over 16 lanes
#define SIXTEEN 1
#endif
INLINE bool any(ivec where) {
#if SIXTEEN
    return __builtin_ia32_ptestmd512(where, where, (unsigned short)-1);
#else
    // by the smallest registers: compilers take lanes out one at a time
    typedef int64_t pair __attribute__((vector_size(16)));
    pair parts[BYTES / 16], found = {};
    __builtin_memcpy(parts, &where, BYTES);
    for (pair part : parts) found |= part;
    return (found[0] | found[1]) != 0;
#endif
}
