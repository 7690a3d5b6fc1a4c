"""Buckets of like keys: `hash(buckets, seed)` and `nearest(mu)`, as labels for `within`.

No other token changes the label of a key, so that these never look ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.expr import Selected, Table
from attndsl.meaning.normals import normals
from attndsl.selection import LABELS, Offered

if TYPE_CHECKING:
    from torch import Tensor

FACTORED = 64
"""Buckets from which on a label is a pair of two smaller ones: then products grow with the square root."""


def factors(buckets: int) -> tuple[int, ...]:
    """Of a number of buckets, which is even, and a power of 2 beyond FACTORED."""
    if buckets <= FACTORED:
        return (buckets,)
    power = buckets.bit_length() - 1
    return 2 ** (power // 2), 2 ** (power - power // 2)


def rotations(seed: int, rounds: int, kv_heads: int, width: int, buckets: int) -> list[Tensor]:
    """[rounds, Hkv, width, factor / 2] for each factor; one draw, cut."""
    import torch

    halves = [factor // 2 for factor in factors(buckets)]
    drawn = torch.tensor(normals(seed, rounds, kv_heads, width, sum(halves)))
    return list(torch.split(drawn, halves, -1))


def labels(k: Tensor, seed: int, rounds: int, buckets: int) -> Tensor:
    """[B, Hkv, rounds, n] of k [B, Hkv, n, D]: which of the vectors r, -r is nearest in angle (Kitaev et al.,
    Reformer, 2020, section 2; factors as in its code)."""
    import torch

    drawn = rotations(seed, rounds, k.shape[1], k.shape[3], buckets)
    # one product for all rounds, tokens last: then the greatest is told for many at a time
    rows = torch.cat([x.permute(1, 0, 3, 2) for x in drawn], 2).flatten(1, 2)
    along = (rows.to(k) @ k.transpose(-1, -2)).unflatten(2, (rounds, -1))  # type: ignore[no-untyped-call]
    found, scale = torch.zeros((), dtype=torch.int32, device=k.device), 1
    for part in torch.split(along, [x.shape[-1] for x in drawn], 3):
        found = found + nearest_of(part) * scale
        scale *= 2 * part.shape[3]
    return found


def nearest_of(along: Tensor) -> Tensor:
    """Of products [.., m, n] with m vectors, which of those and of their opposites is the greatest, int32
    [.., n]: of equal ones the first, 0 where there is NaN."""
    import torch

    count = along.shape[-2]
    top = torch.maximum(along.amax(-2), along.amin(-2).neg_())
    found = torch.zeros_like(top, dtype=torch.int32)
    for place in reversed(range(2 * count)):
        equal = along[..., place % count, :] == (top if place < count else -top)
        found.masked_fill_(equal, place)
    return found


def naive_label(key: Tensor, rotation: list[Tensor]) -> int:
    """Of one key, one product after the other."""
    found, scale = 0, 1
    for matrix in rotation:
        along = [float((key * column).sum()) for column in matrix.T]
        along += [-x for x in along]
        found += scale * max(range(len(along)), key=lambda i: (along[i], -i))
        scale *= len(along)
    return found


def check_buckets(buckets: int) -> None:
    if buckets < 2 or buckets % 2:
        raise fail(f"{buckets} buckets: a bucket has an opposite, so their number is even")
    if buckets > LABELS:
        raise fail(f"{buckets} buckets, and labels end at {LABELS - 1:,}")
    if buckets > FACTORED and buckets & (buckets - 1):
        raise fail(f"{buckets} buckets: more than {FACTORED} are a power of 2")


class Hash:
    """Registered as `hash`: `hash(buckets, seed = 0)`."""

    kind: Literal["labels"] = "labels"

    def signature(self, buckets: int, seed: int = 0) -> None: ...

    def check(self, origin: Selected) -> None:
        check_buckets(origin["buckets"])

    def rounds(self, origin: Selected) -> int:
        return int(origin["buckets"])

    def relates(self, origin: Selected) -> None:
        return None

    def reads(self, origin: Selected) -> Literal["past"]:
        return "past"

    def counts(self, origin: Selected, problem: Problem) -> dict[str, float]:
        keys = float(problem.batch * problem.kv_heads * problem.length)
        return {"products": keys * problem.head_dim * sum(factors(origin["buckets"])) / 2, "sorted": keys}

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        found = labels(offered.k, origin["seed"], 1, origin["buckets"])[:, :, 0]
        return found.repeat_interleave(offered.q.shape[1] // offered.k.shape[1], 1)

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        import torch

        k, share = offered.k, offered.q.shape[1] // offered.k.shape[1]
        rotation = rotations(origin["seed"], 1, k.shape[1], k.shape[3], origin["buckets"])
        found = torch.zeros(k.shape[:3], dtype=torch.int64)
        for b, h, i in torch.cartesian_prod(*map(torch.arange, k.shape[:3])).view(-1, 3).tolist():
            found[b, h, i] = naive_label(k[b, h, i], [matrix[0, h] for matrix in rotation])
        return found.repeat_interleave(share, 1)


class Nearest:
    """Registered as `nearest`: `nearest(mu)`, `mu` an input `float[c, D]` or `float[H, c, D]`: the center
    with the greatest product with the key; of equal ones the first (Roy et al., Routing Transformer, 2021,
    section 4.1, with each key in one cluster)."""

    kind: Literal["labels"] = "labels"

    def signature(self, mu: Table) -> None: ...

    def check(self, origin: Selected) -> None:
        check_centers(origin["mu"])

    def rounds(self, origin: Selected) -> int:
        centers = origin["mu"].dims[-2]
        return centers if isinstance(centers, int) else LABELS

    def relates(self, origin: Selected) -> None:
        return None

    def reads(self, origin: Selected) -> Literal["past"]:
        return "past"

    def counts(self, origin: Selected, problem: Problem) -> dict[str, float]:
        centers = origin["mu"].dims[-2]
        count = centers if isinstance(centers, int) else problem.length**0.5
        keys = float(problem.batch * problem.heads * problem.length)
        return {"products": keys * problem.head_dim * count, "sorted": keys}

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        along = products(offered.k, origin["mu"], offered)
        if along.shape[-2] > LABELS:
            raise fail(
                f"`{origin['mu'].name}` has {along.shape[-2]} centers, and labels end at {LABELS - 1:,}"
            )
        return along.argmax(-2)

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        import torch

        along = products(offered.k, origin["mu"], offered).transpose(-1, -2)
        rows = [max(range(len(row)), key=lambda i: (row[i].item(), -i)) for row in along.flatten(0, 2)]
        return torch.tensor(rows, dtype=torch.int64).view(along.shape[:3])


def check_centers(mu: Table) -> None:
    if mu.dtype != "float" or len(mu.explicit) != 2:
        raise fail("centers are vectors", help=f"declare them: `inputs {mu.name} : float[H, c, D]`")


def centers(mu: Table, offered: Offered) -> Tensor:
    """[B or nothing, H or 1, c, D]"""
    found = offered.tables[mu.name].to(offered.k)
    return found if "H" in mu.dims else found.unsqueeze(-3)


def products(x: Tensor, mu: Table, offered: Offered) -> Tensor:
    """[B, H, c, n] of the centers with x [B, H or Hkv, n, D]."""
    x = x.repeat_interleave(offered.q.shape[1] // x.shape[1], 1)
    return centers(mu, offered) @ x.transpose(-1, -2)


hashed = Hash()
nearest = Nearest()
