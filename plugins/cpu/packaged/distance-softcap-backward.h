#define SOFTMAX 1
#define SHARED 1
#define PLAIN 0
#define FACTOR 0
#define LEAVES 2
INLINE vec slopes(struct Place *at, long row, long key, ivec live, vec s, struct Back back, vec *weight) {
    vec t0 = real_of_number(at, 0);
    vec t1 = real_of_distance(at, 1, row, key);
    vec t2 = (s + t1);
    vec t3 = (t2 / t0);
    vec t4 = tanhv(t3);
    vec t5 = (t0 * t4);
    vec gain, factor;
    *weight = weighed(back, t5, all(1), live, &gain, &factor);
    vec t8 = (gain * t0);
    vec t9 = (t4 * t4);
    vec t10 = (all((real)-0x1.0000000000000p+0) * t9);
    vec t11 = (t10 + all((real)0x1.0000000000000p+0));
    vec t12 = (t8 * t11);
    vec t13 = (t12 / t0);
    return t13;
}
