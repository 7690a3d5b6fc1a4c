#define SOFTMAX 1
#define SHARED 1
#define PLAIN 0
#define FACTOR 0
#define LEAVES 1
INLINE vec slopes(struct Place *at, long row, long key, ivec live, vec s, struct Back back, vec *weight) {
    vec t0 = real_of_number(at, 0);
    vec t1 = (s / t0);
    vec t2 = tanhv(t1);
    vec t3 = (t0 * t2);
    vec gain, factor;
    *weight = weighed(back, t3, all(1), live, &gain, &factor);
    vec t6 = (gain * t0);
    vec t7 = (t2 * t2);
    vec t8 = (all((real)-0x1.0000000000000p+0) * t7);
    vec t9 = (t8 + all((real)0x1.0000000000000p+0));
    vec t10 = (t6 * t9);
    vec t11 = (t10 / t0);
    return t11;
}
