// Functions of the lanes of a vector: within 3 units in the last place of the exact result for all arguments. All
// floats were tried where a product and a sum are one operation; else, of doubles and of powers, samples. Results below the normal numbers are gradual; signed zeros,
// infinities and NaN come out as in C's functions. Angles beyond 2^19 are reduced lane by lane, which is slow.
// sqrtv is one instruction where the compiler is told -fno-math-errno, else a call for negative numbers.
// Where the error of a product is made up for later, the product is exact, its factors being short enough. So the
// bounds hold whether or not a compiler makes one operation of a product and a sum.
#pragma once
#include "vectors.h"

#ifdef DOUBLE
#define OF(single, twice) twice
typedef uint64_t word;
#else
#define OF(single, twice) single
typedef uint32_t word;
#endif
typedef word uvec __attribute__((vector_size(BYTES)));

#define MANTISSA OF(23, 52)
#define BIAS OF(127, 1023)
#define SIGN_BIT OF(31, 63)
#define SIGN ((lane)((word)1 << SIGN_BIT))
static const real INF = (real)__builtin_inf(), NO_NUMBER = (real)__builtin_nan("");
static const real NORMAL = OF(0x1p-126f, 0x1p-1022), GREATEST = OF(0x1.fffffep127f, 0x1.fffffffffffffp1023);
// the last bits of x + ROUND are the nearest whole number
static const real ROUND = OF(0x1.8p23f, 0x1.8p52);
static const real LN_2 = (real)0.69314718055994530942, LOG2_E = (real)1.4426950408889634074;
// whole numbers that are exponents times the first are exact
static const real LN_2_HIGH = OF(0x1.62e4p-1f, 0x1.62e42fefa38p-1);
static const real LN_2_LOW = OF(1.42860682e-6f, 5.4979230187083712e-14);

// Polynomials, highest power first, from benchmarks/polynomials.py. The greatest relative error of
// e^r = 1 + r + r^2 EXPONENTIAL(r), |r| < 0.348, is 2^-28 and 2^-57; of
// artanh(s) = s (1 + z / 3 + z^2 ARTANH(z) / 3), z = s^2, s < 0.1716, 2^-36 and 2^-66; of
// sin(r) = r (1 + z SINE(z)), z = r^2, |r| < 0.83, 2^-27 and 2^-56; of
// cos(r) = 1 - z / 2 + z^2 COSINE(z), 2^-32 and 2^-62.
#ifdef DOUBLE
static const real EXPONENTIAL[] = {2.4999581985569851e-8, 2.7630830481623413e-7, 2.7557590878033345e-6,
                                   2.480149159232267e-5,  1.9841269498235883e-4, 1.3888888944945023e-3,
                                   8.333333333499792e-3,  4.1666666666525787e-2, 1.6666666666666402e-1,
                                   5.0000000000000111e-1};
static const real ARTANH[] = {1.9795306729739446e-1, 1.9885141268036129e-1, 2.3080139557271286e-1,
                              2.7272676475802325e-1, 3.3333333780710966e-1, 4.2857142855144905e-1,
                              6.0000000000003393e-1};
static const real SINE[] = {1.5877236237737667e-10, -2.5050411013933485e-8, 2.7557311414340053e-6,
                            -1.9841269823074008e-4, 8.3333333333138048e-3,  -1.6666666666666597e-1};
static const real COSINE[] = {-1.1345327826540271e-11, 2.0875436814416874e-9,  -2.7557312169520886e-7,
                              2.4801587281656617e-5,   -1.3888888888861149e-3, 4.1666666666666522e-2};
#else
static const real EXPONENTIAL[] = {1.38140248e-3f, 8.36900062e-3f, 4.16684154e-2f, 1.66665183e-1f, 4.99999933e-1f};
static const real ARTANH[] = {3.51286744e-1f, 4.28206679e-1f, 6.00002286e-1f};
static const real SINE[] = {-1.94772725e-4f, 8.33187007e-3f, -1.66666498e-1f};
static const real COSINE[] = {2.43896676e-5f, -1.38869209e-3f, 4.16666372e-2f};
#endif

template <int N>
INLINE vec polynomial(const real (&c)[N], vec x) {
    vec sum = all(c[0]);
    for (int i = 1; i < N; i++) sum = sum * x + c[i];
    return sum;
}

INLINE vec absolute(vec x) { return (vec)((ivec)x & ~SIGN); }
INLINE vec signed_as(vec x, vec sign) { return (vec)((ivec)x | ((ivec)sign & SIGN)); }
// the higher half of the bits: the product of two such numbers is exact
INLINE vec short_of(vec x) { return (vec)((ivec)x & -((lane)1 << (MANTISSA / 2 + 1))); }

// x * 2^n of n + ROUND, 1/2 < x < 2, rounded once where n is beyond the exponents
INLINE vec scaled(vec x, vec n_and_round) {
    uvec n = (uvec)n_and_round, half = n >> 1;
    return x * (vec)((half + BIAS) << MANTISSA) * (vec)((n - half + BIAS) << MANTISSA);
}

INLINE vec exponential(vec r) { return r + r * r * polynomial(EXPONENTIAL, r); }

INLINE vec exp2v(vec x) {
    x = smaller(all(OF(130, 1026)), larger(all(OF(-152, -1077)), x));
    vec n = x + ROUND;
    return scaled(exponential((x - (n - ROUND)) * LN_2) + (real)1, n);
}

INLINE vec expv(vec x) {
    x = smaller(all(OF(90, 711)), larger(all(OF(-105, -747)), x));
    vec shifted = x * LOG2_E + ROUND, n = shifted - ROUND;
    return scaled(exponential(x - n * LN_2_HIGH - n * LN_2_LOW) + (real)1, shifted);
}

// e / (e + 2) of e = exp(2 |x|) - 1
INLINE vec tanhv(vec x) {
    vec twice = smaller(all(OF(20, 40)), absolute(x) * (real)2);
    vec shifted = twice * LOG2_E + ROUND, n = shifted - ROUND;
    vec power = (vec)(((uvec)shifted + BIAS) << MANTISSA);
    vec e = exponential(twice - n * LN_2_HIGH - n * LN_2_LOW) * power + (power - (real)1);
    return signed_as(e / (e + (real)2), x);
}

INLINE vec sigmoidv(vec x) {
    vec e = expv((vec)((ivec)x | SIGN));
    return select(x < (real)0, e, all(1)) / (e + (real)1);
}

// x > 0 is 2^e (1 + f), 1 + f between the roots of 1/2 and 2
INLINE vec fraction(vec x, vec *e) {
    const lane root = OF(0x3f3504f3, 0x3fe6a09e667f3bcd), one = (lane)BIAS << MANTISSA;
    ivec tiny = x < NORMAL;
    ivec bits = (ivec)select(tiny, x * OF(0x1p24f, 0x1p53), x) + (one - root);
    const real whole_bits = OF(0x1p23f, 0x1p52);
    vec bias = select(tiny, all(whole_bits + BIAS + MANTISSA + 1), all(whole_bits + BIAS));
    *e = (vec)(((uvec)bits >> MANTISSA) | (uvec)all(whole_bits)) - bias;
    return (vec)((bits & (((lane)1 << MANTISSA) - 1)) + root) - (real)1;
}

// what a logarithm is of 0, of infinity, of negative numbers and of NaN
INLINE vec logarithm(vec x, vec of_positive) {
    vec end = select(x == (real)0, all(-INF), all(NO_NUMBER));
    return select(x > (real)0, select(x > GREATEST, x, of_positive), end);
}

// log(1 + f) = 2 artanh(s) of s = f / (2 + f), which is f - h + s (h + (z + z^2 ARTANH) 2 / 3) of h = f^2 / 2
INLINE vec logv(vec x) {
    vec e, f = fraction(x, &e), h = f * f * (real)0.5, s = f / (f + (real)2), z = s * s;
    vec low = s * (h + (z + z * z * polynomial(ARTANH, z)) * (real)(2.0 / 3)) + e * LN_2_LOW;
    return logarithm(x, e * LN_2_HIGH - ((h - low) - f));
}

// log2(e) times f - h, in exact parts, and times the rest
INLINE vec log2v(vec x) {
    const real high = OF(0x1.714p+0f, 0x1.715476p+0), low = OF(3.12228389e-4f, 1.9259629911266175e-8);
    vec e, f = fraction(x, &e), h = f * f * (real)0.5, s = f / (f + (real)2), z = s * s;
    vec first = short_of(f - h);
    vec rest = (f - first) - h + s * (h + (z + z * z * polynomial(ARTANH, z)) * (real)(2.0 / 3));
    return logarithm(x, e + (first * high + (rest * high + (first + rest) * low)));
}

INLINE vec sqrtv(vec x) {
    for (int i = 0; i < LANES; i++) x[i] = OF(__builtin_sqrtf, __builtin_sqrt)(x[i]);
    return x;
}

INLINE vec floorv(vec x) {
    const real whole_from = OF(0x1p23f, 0x1p52);
    vec size = absolute(x), nearest = signed_as((size + whole_from) - whole_from, x);
    nearest = select(nearest > x, nearest - (real)1, nearest);
    return select(size < whole_from, nearest, x);
}

// x^y where x is negative, 0, infinite or NaN, or y is, of the power of |x|
INLINE vec power_ends(vec x, vec y, vec power) {
    vec size = absolute(x);
    ivec negative = (ivec)x < 0, end = (size == (real)0) | (size > GREATEST);
    ivec odd = (floorv(y) == y) & (floorv(y * (real)0.5) * (real)2 != y);
    power = select(end, select((size == (real)0) == (y < (real)0), all(INF), all(0)), power);
    power = select(negative & odd, -power, power);
    power = select(negative & ~end & (floorv(y) != y), all(NO_NUMBER), power);
    power = select((x != x) | (y != y), all(NO_NUMBER), power);
    return select((x == (real)1) | (y == (real)0), all(1), power);
}

#ifdef DOUBLE
// The logarithm to base 2 is a sum of two numbers, the first of half of the bits, and so are on the way to it the s of
// 2 artanh(s) and 3 + z + z^2 ARTANH
INLINE vec power(vec x, vec y) {
    const real by = 0.96179669392597560491, by_high = 0x1.ec709d8p-1, by_low = 7.8726995428948977e-9;  // 2 / (3 ln 2)
    vec e, f = fraction(x, &e), sum = f + 2.0, inverse = 1.0 / sum, s = f * inverse;
    vec s1 = short_of(s), sum1 = short_of(sum), sum2 = f - (sum1 - 2.0);
    vec s2 = ((f - s1 * sum1) - s1 * sum2) * inverse;
    vec z = s * s, z1 = s1 * s1, rest = z * z * polynomial(ARTANH, z) + s2 * (s1 + s);
    vec t1 = short_of(z1 + 3.0 + rest), t2 = rest - ((t1 - 3.0) - z1);
    vec p1 = s1 * t1, p2 = s2 * t1 + t2 * s;
    vec q1 = short_of(p1 + p2), q2 = p2 - (q1 - p1);
    vec l1 = by_high * q1, l2 = by_low * q1 + by * q2;
    vec high = short_of(l1 + l2 + e), low = l2 - ((high - e) - l1);
    vec y1 = short_of(y), r1 = y1 * high, r2 = (y - y1) * high + y * low;
    r2 = select(absolute(r1) < 1200.0, r2, all(0));
    r1 = smaller(all(1200), larger(all(-1200), r1));
    vec n = (r1 + r2) + ROUND;
    return scaled(exponential(((r1 - (n - ROUND)) + r2) * LN_2) + 1.0, n);
}
#else
INLINE vec power(vec x, vec y) {
    typedef double wide __attribute__((vector_size(2 * BYTES)));
    const double by = 0.96179669392597560491;  // 2 / (3 ln 2)
    vec e, fractions = fraction(x, &e);
    wide f = __builtin_convertvector(fractions, wide), s = f / (f + 2.0), z = s * s;
    wide artanh = s * (z * z * ((ARTANH[0] * z + ARTANH[1]) * z + ARTANH[2]) + (z + 3.0));
    wide r = (artanh * by + __builtin_convertvector(e, wide)) * __builtin_convertvector(y, wide);
    vec n = smaller(all(200), larger(all(-200), __builtin_convertvector(r, vec))) + ROUND;
    vec left = __builtin_convertvector(r - __builtin_convertvector(n - ROUND, wide), vec);
    left = smaller(all(1), larger(all(-1), left));
    return scaled(exponential(left * LN_2) + 1.0f, n);
}
#endif

INLINE vec powv(vec x, vec y) {
    // so large an exponent has no finite power but of 1
    const real far = OF(0x1p32f, 0x1p64);
    vec found = power(absolute(x), smaller(all(far), larger(all(-far), y)));
    if (__builtin_expect(any(~((x > (real)0) & (x <= GREATEST) & (absolute(y) <= GREATEST))), 0))
        found = power_ends(x, y, found);
    return found;
}

static const double QUARTER_PARTS[] = {0x1.921fb544p+0, OF(0x1.0b4611a626331p-34, 0x1.0b4611a6p-34), 0x1.3198a2ep-69,
                                       0x1.b839a252049c1p-104};  // pi / 2
// a number of quarters has 20 bits up to here, and its product with a part 53
static const real FAR = 524288;

// 64 zeros and the bits of 1 / pi after the point
static const uint64_t INVERSE_PI[] = {
    0,
    0x517CC1B727220A94, 0xFE13ABE8FA9A6EE0, 0x6DB14ACC9E21C820, 0xFF28B1D5EF5DE2B0, 0xDB92371D2126E970,
    0x0324977504E8C90E, 0x7F0EF58E5894D39F, 0x74411AFA975DA242, 0x74CE38135A2FBF20, 0x9CC8EB1CC1A99CFA,
    0x4E422FC5DEFC941D, 0x8FFC4BFFEF02CC07, 0xF79788C5AD05368F, 0xB69B3F6793E584DB, 0xA7A31FB34F2FF516,
    0xBA93DD63F5F2F8BD, 0x9E839CFBC5294975, 0x35FDAFD88FC6AE84, 0x2B0198237E3DB5D5};

// x > 2^19 less the nearest multiple n pi / 2; adds n to `quarters`. x / pi is a product of integers, of which the bits
// from the unit on are kept (M. H. Payne, R. N. Hanek, 1983).
static inline __attribute__((noinline, cold)) double far_angle(double x, word *quarters) {
    __extension__ typedef unsigned __int128 wide;
    uint64_t bits, m[3];
    __builtin_memcpy(&bits, &x, 8);
    int exponent = bits >> 52;
    if (exponent == 2047) return x - x;
    uint64_t integer = (bits & ((1ull << 52) - 1)) | 1ull << 52;
    int from = exponent - 1075 + 63, skip = from % 64;
    for (int i = 0; i < 3; i++) {
        const uint64_t *at = INVERSE_PI + from / 64 + i;
        m[i] = skip ? at[0] << skip | at[1] >> (64 - skip) : at[0];
    }
    // two bits of quarters before the point and 126 behind it; a half is added, and taken again
    const wide half = (wide)1 << 125;
    wide turns = ((wide)(integer * m[0]) << 64) + (wide)integer * m[1] + ((wide)integer * m[2] >> 64) + half;
    *quarters += (word)(turns >> 126);
    turns = (turns << 2 >> 2) - half;
    bool negative = turns >> 127;
    if (negative) turns = -turns;
    uint64_t high = turns >> 64;
    int zeros = high ? __builtin_clzll(high) : 64 + __builtin_clzll((uint64_t)turns | 1);
    double size = (double)(uint64_t)(turns << zeros >> 64) * 0x1p-63 * 3.14159265358979323846;
    bits = (uint64_t)(1023 - zeros) << 52;
    double scale;
    __builtin_memcpy(&scale, &bits, 8);
    return (negative ? -size : size) * scale;
}

// +- sin(r) or cos(r) of r = |x| - n pi / 2
INLINE vec sine(vec x, bool cosine) {
    vec size = absolute(x), shifted = size * (real)0.63661977236758134308 + ROUND, n = shifted - ROUND, r = size;
    uvec quarters = (uvec)shifted + (cosine ? 1 : 0);
#ifdef DOUBLE
    for (double part : QUARTER_PARTS) r -= n * part;
#else
    typedef double wide __attribute__((vector_size(2 * BYTES)));
    wide turns = __builtin_convertvector(n, wide);
    wide angle = __builtin_convertvector(size, wide) - turns * QUARTER_PARTS[0] - turns * QUARTER_PARTS[1];
    r = __builtin_convertvector(angle, vec);
#endif
    ivec far = size > FAR;
    if (__builtin_expect(any(far), 0))
        for (int i = 0; i < LANES; i++)
            if (far[i]) {
                word count = cosine;
                r[i] = (real)far_angle(size[i], &count);
                quarters[i] = count;
            }
    vec z = r * r;
    vec cos = (real)1 - (z * (real)0.5 - z * z * polynomial(COSINE, z)), sin = r + r * z * polynomial(SINE, z);
    uvec sign = (quarters >> 1) << SIGN_BIT;
    if (!cosine) sign ^= (uvec)x & SIGN;
    return (vec)((uvec)select((quarters & 1) != 0, cos, sin) ^ sign);
}

INLINE vec sinv(vec x) { return sine(x, false); }
INLINE vec cosv(vec x) { return sine(x, true); }
