#define SOFTMAX 1
#define SHARED 1
#define PLAIN 0
#define FACTOR 0
#define LEAVES 1
INLINE vec slopes(struct Place *at, long row, long key, ivec live, vec s, struct Back back, vec *weight) {
    vec t0 = real_of_distance(at, 0, row, key);
    vec t1 = (s + t0);
    vec gain, factor;
    *weight = weighed(back, t1, all(1), live, &gain, &factor);
    return gain;
}
