#define SOFTMAX 1
#define SHARED 1
#define PLAIN 0
#define FACTOR 0
#define LEAVES 2
INLINE vec score(struct Place *at, long row, long key, ivec live, vec s, vec *factor) {
    vec t0 = real_of_number(at, 0);
    vec t1 = real_of_distance(at, 1, row, key);
    vec t2 = (s + t1);
    vec t3 = (t2 / t0);
    vec t4 = tanhv(t3);
    vec t5 = (t0 * t4);
    return t5;
}
