# mypy: ignore-errors
"""What the kernels and generated scores are written in: functions of tiles of pairs, and how leaves are read.

Divisions and remainders of integers are those of the language, rounded down; Triton's are those of C.
"""

import triton
import triton.language as tl


@triton.jit
def least(a, b):
    return tl.where((a <= b) | (a != a), a, b)


@triton.jit
def greatest(a, b):
    return tl.where((a >= b) | (a != a), a, b)


@triton.jit
def quotient(a, b):
    by = tl.maximum(b, 1)
    found = a // by
    return tl.where(found * by > a, found - 1, found)


@triton.jit
def remainder(a, b):
    return a - quotient(a, b) * tl.maximum(b, 1)


@triton.jit
def quotient_of_reals(a, b):
    return tl.floor(a / b)


@triton.jit
def remainder_of_reals(a, b):
    found = a - b * tl.floor(a / b)
    found = tl.where(found < 0, found + b, found)
    return tl.where(found >= b, found - b, found)


@triton.jit
def rounded(x, WHOLE: tl.constexpr):
    most: tl.constexpr = 2.0**30 if WHOLE == tl.int32 else 2.0**62
    within = tl.minimum(tl.maximum(tl.floor(x), -most), most)
    return tl.where(x == x, within, 0.0).to(WHOLE)


@triton.jit
def bits(x):
    """log2 rounded down, of integers from 1 on."""
    left, found = tl.maximum(x, 1).to(tl.int64), tl.zeros_like(x)
    for i in tl.static_range(6):
        step: tl.constexpr = 32 >> i
        high = left >> step
        found = tl.where(high > 0, found + step, found)
        left = tl.where(high > 0, high, left)
    return found


@triton.jit
def root(x):
    """The square root rounded down."""
    of = tl.maximum(x, 0)
    found = tl.sqrt(of.to(tl.float64)).to(of.dtype)
    found = tl.where(found * found > of, found - 1, found)
    return tl.where((found + 1) * (found + 1) <= of, found + 1, found)


@triton.jit
def power(a, b):
    """Of integers: a factor for each bit of the exponent."""
    left = tl.maximum(b, 0) + tl.zeros_like(a + b)
    base, found = a + tl.zeros_like(left), tl.zeros_like(left) + 1
    for _ in range(63):
        found = tl.where(left % 2 == 1, found * base, found)
        base, left = base * base, left // 2
    return found


@triton.jit
def power_of_reals(a, b):
    size = tl.abs(a)
    found = tl.exp2(b * tl.log2(tl.where(size == 0, 1.0, size)))
    whole = tl.floor(b) == b
    odd = whole & (tl.floor(b / 2) * 2 != b)
    found = tl.where(a < 0, tl.where(whole, tl.where(odd, -found, found), float("nan")), found)
    of_nothing = tl.where(b == 0, 1.0, tl.where(b < 0, float("inf"), 0.0))
    return tl.where(a == 0, of_nothing, found)


@triton.jit
def tanh(x):
    # the library's is not there where kernels are interpreted
    left = tl.exp(-2 * tl.abs(x))
    found = (1 - left) / (1 + left)
    return tl.where(x < 0, -found, found)


@triton.jit
def pointer(at, place: tl.constexpr, KIND: tl.constexpr):
    """To the leaf of that number; `at` are addresses of bytes."""
    return tl.load(at + place).to(tl.pointer_type(KIND))


@triton.jit
def of_row(held, row, QUERIES: tl.constexpr):
    """Of a leaf with an entry for each query; programs over queries hold theirs."""
    if QUERIES:
        return held
    else:
        return tl.load(held + row)


@triton.jit
def of_key(held, key, QUERIES: tl.constexpr):
    if QUERIES:
        return tl.load(held + key)
    else:
        return held


@triton.jit
def placed(indices, sizes, like):
    """Where an entry of a table stands, and whether there is one; the first where there is none."""
    inside, found = like | True, 0
    for i in tl.static_range(len(indices)):
        inside = inside & (indices[i] >= 0) & (indices[i] < sizes[i])
        found = found * sizes[i] + indices[i]
    return tl.where(inside, found, 0), inside


@triton.jit
def of_table(held, indices, sizes, live, bad):
    """The entry, and where there are pairs without one: those that were, and these."""
    found, inside = placed(indices, sizes, live)
    return tl.load(held + found), bad | (live & (inside == 0))


@triton.jit
def truth_of_table(held, indices, sizes, live):
    found, inside = placed(indices, sizes, live)
    return inside & (tl.load(held + found) != 0)


@triton.jit
def scatter(to, place, x, live):
    tl.atomic_add(to + place, x, mask=live, sem="relaxed")


@triton.jit
def scatter_table(to, indices, sizes, x, live):
    found, inside = placed(indices, sizes, live)
    scatter(to, found, x, live & inside)


@triton.jit
def weighed(
    logit, factor, live, back,
    DIVIDED: tl.constexpr, SOFTMAX: tl.constexpr, FACTOR: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """The weight, from the logit and its factor, and the slopes by both; without a softmax the first is the
    weight itself. `back`: what logits of each row are measured by, what weights are multiplied with if they
    are DIVIDED, and what comes back."""
    level, share, come = back
    if SOFTMAX:
        if FACTOR:
            none = factor == 0
            more = logit - level + tl.log(tl.where(none, 1.0, factor))
            weight = tl.exp2(tl.minimum(more, 64.0) * BASE)
        else:
            weight = tl.exp2((logit - level) * BASE)
        if DIVIDED:
            weight = weight * share
        if FACTOR:
            by_factor = tl.where(none, weight, weight / tl.where(none, 1.0, factor)) * come
            weight = tl.where(live & (factor != 0), weight, 0.0)
        else:
            weight = tl.where(live, weight, 0.0)
            by_factor = weight
        return weight, weight * come, by_factor
    else:
        weight = logit
        if FACTOR:
            weight = logit * factor
        if DIVIDED:
            weight = weight * share
            come = come * share
        by_factor = come * logit
        if FACTOR:
            come = come * factor
        return tl.where(live, weight, 0.0), come, by_factor
