"""`lsh(rounds, chunk, ...)`: keys sorted by bucket, in pieces (Kitaev et al., Reformer, 2020, section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.expr import Selected
from attndsl.selection import Chunks, Offered

from .buckets import check_buckets, factors, labels, naive_label, rotations

if TYPE_CHECKING:
    from torch import Tensor


class Lsh:
    """Registered as `lsh`.

    In each round keys are sorted by bucket and then by position, and cut into pieces of `chunk`: a query sees
    those of its piece and of the one before.

    buckets  2 (n // chunk) rounded down to a power of 2, if 0
    count    a pair that several rounds hold weighs as often
    wrap     the first piece of a round follows the last of the round before: the published code
    """

    kind: Literal["order"] = "order"

    def signature(
        self,
        rounds: int,
        chunk: int,
        seed: int = 0,
        buckets: int = 0,
        count: bool = False,
        wrap: bool = False,
    ) -> None: ...

    def check(self, origin: Selected) -> None:
        if origin["rounds"] <= 0:
            raise fail(f"`lsh` has {origin['rounds']} rounds, and needs at least 1")
        if origin["chunk"] <= 0:
            raise fail(f"`lsh` has pieces of {origin['chunk']} keys, and needs at least 1")
        if origin["buckets"]:
            check_buckets(origin["buckets"])

    def rounds(self, origin: Selected) -> int:
        return int(origin["rounds"])

    def relates(self, origin: Selected) -> Chunks:
        return Chunks(origin["chunk"], origin["wrap"], origin["count"])

    def reads(self, origin: Selected) -> Literal["future"]:
        return "future"

    def counts(self, origin: Selected, problem: Problem) -> dict[str, float]:
        keys = float(problem.batch * problem.kv_heads * problem.length) * origin["rounds"]
        buckets = buckets_at(origin, problem.length)
        return {"products": keys * problem.head_dim * sum(factors(buckets)) / 2, "sorted": keys}

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        import torch

        k = offered.k
        buckets = buckets_at(origin, k.shape[2])
        check_buckets(buckets)
        found = labels(k, origin["seed"], origin["rounds"], buckets).to(torch.int16)
        ranks = rank(found.argsort(dim=-1, stable=True))
        return ranks.repeat_interleave(offered.q.shape[1] // k.shape[1], 1)

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        import torch

        k, rounds = offered.k, origin["rounds"]
        (batch, kv_heads, n, width), share = k.shape, offered.q.shape[1] // offered.k.shape[1]
        rotation = rotations(origin["seed"], rounds, kv_heads, width, buckets_at(origin, n))
        found = torch.zeros((batch, kv_heads, rounds, n), dtype=torch.int64)
        for b in range(batch):
            for h in range(kv_heads):
                for j in range(rounds):
                    matrices = [matrix[j, h] for matrix in rotation]
                    placed = sorted((naive_label(k[b, h, i], matrices), i) for i in range(n))
                    for place, (_, i) in enumerate(placed):
                        found[b, h, j, i] = place
        return found.repeat_interleave(share, 1)


def buckets_at(origin: Selected, n: int) -> int:
    if origin["buckets"]:
        return int(origin["buckets"])
    return int(2 ** max(1, (2 * (n // origin["chunk"])).bit_length() - 1))


def rank(order: Tensor) -> Tensor:
    """The place of each position in an order of positions."""
    import torch

    places = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


selection = Lsh()
