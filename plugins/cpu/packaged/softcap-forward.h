#define SOFTMAX 1
#define SHARED 1
#define PLAIN 0
#define FACTOR 0
#define LEAVES 1
INLINE vec score(struct Place *at, long row, long key, ivec live, vec s, vec *factor) {
    vec t0 = real_of_number(at, 0);
    vec t1 = (s / t0);
    vec t2 = tanhv(t1);
    vec t3 = (t0 * t2);
    return t3;
}
