#define SOFTMAX 1
#define SHARED 1
#define PLAIN 1
#define FACTOR 0
#define LEAVES 0
INLINE vec slopes(struct Place *at, long row, long key, ivec live, vec s, struct Back back, vec *weight) {
    vec gain, factor;
    *weight = weighed(back, s, all(1), live, &gain, &factor);
    return gain;
}
