#pragma once
#include "vectors.h"
#define BY_LANE(name, f) INLINE vec name(vec x) { vec y; for (int i = 0; i < LANES; i++) y[i] = (real)f((double)x[i]); return y; }
BY_LANE(exp2v, exp2) BY_LANE(expv, exp) BY_LANE(logv, log) BY_LANE(log2v, log2) BY_LANE(tanhv, tanh)
BY_LANE(sqrtv, sqrt) BY_LANE(sinv, sin) BY_LANE(cosv, cos) BY_LANE(floorv, floor)
INLINE vec sigmoidv(vec x) { return 1 / (1 + expv(-x)); }
INLINE vec powv(vec x, vec z) { vec y; for (int i = 0; i < LANES; i++) y[i] = (real)pow((double)x[i], (double)z[i]); return y; }
