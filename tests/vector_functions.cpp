// The functions of plugins/cpu/functions.h over arrays, of a multiple of LANES numbers
#include "functions.h"

#define UNARY(name)                                                                                \
    extern "C" void lanes_##name(const real *x, const real *, real *out, int64_t n) {              \
        for (int64_t i = 0; i < n; i += LANES) store(out + i, name##v(load(x + i)));               \
    }

UNARY(exp2)
UNARY(exp)
UNARY(log)
UNARY(log2)
UNARY(tanh)
UNARY(sigmoid)
UNARY(sqrt)
UNARY(sin)
UNARY(cos)
UNARY(floor)

extern "C" void lanes_pow(const real *x, const real *y, real *out, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(out + i, powv(load(x + i), load(y + i)));
}
