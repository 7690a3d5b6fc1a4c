#define SOFTMAX 1
#define SHARED 1
#define PLAIN 0
#define FACTOR 0
#define LEAVES 1
INLINE vec score(struct Place *at, long row, long key, ivec live, vec s, vec *factor) {
    vec t0 = real_of_distance(at, 0, row, key);
    vec t1 = (s + t0);
    return t1;
}
