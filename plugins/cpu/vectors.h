// Vectors of reals and of integers of their width. LANES of them are as wide as a register; -DDOUBLE makes reals double.
#pragma once
#include <math.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#ifdef DOUBLE
typedef double real;
typedef int64_t lane;
#define LANES (BYTES / 8)
#else
typedef float real;
typedef int32_t lane;
#define LANES (BYTES / 4)
#endif

typedef real vec __attribute__((vector_size(BYTES)));
typedef real loose __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
typedef lane ivec __attribute__((vector_size(BYTES)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec all(real x) { return x - (vec){}; }
INLINE vec load(const real *p) { return *(const loose *)p; }
INLINE void store(real *p, vec x) { *(loose *)p = x; }
INLINE vec select(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }
INLINE vec larger(vec a, vec b) { return select(a > b, a, b); }
