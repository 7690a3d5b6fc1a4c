"""`cluster(mu, width)`: the queries and the keys nearest to each center see one another.

Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, 2021, section 4.1. Its code
takes the mean of one softmax for each cluster that holds a token, which is no mask; the union of clusters is
what this relates, and the two are equal where each token is in one cluster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from attndsl.backend import Problem
from attndsl.errors import fail
from attndsl.expr import Selected, Table
from attndsl.selection import First, Offered

from .buckets import check_centers, products
from .topk import compared, greatest

if TYPE_CHECKING:
    from torch import Tensor


class Cluster:
    """Registered as `cluster`: `mu` an input `float[c, D]` or `float[H, c, D]`, c a number; `width` queries
    and as many keys are in a cluster."""

    kind: Literal["order"] = "order"

    def signature(self, mu: Table, width: int) -> None: ...

    def check(self, origin: Selected) -> None:
        check_centers(origin["mu"])
        if not isinstance(origin["mu"].dims[-2], int):
            raise fail(
                "how many clusters there are is a number here",
                help=f"declare it: `inputs {origin['mu'].name} : float[H, 16, D]`",
            )
        if origin["width"] <= 0:
            raise fail(f"a cluster has {origin['width']} keys, and needs at least 1")

    def rounds(self, origin: Selected) -> int:
        return 2 * int(origin["mu"].dims[-2])

    def relates(self, origin: Selected) -> First:
        return First(origin["width"])

    def reads(self, origin: Selected) -> Literal["future"]:
        return "future"

    def counts(self, origin: Selected, problem: Problem) -> dict[str, float]:
        n, rows = problem.length, problem.batch * problem.heads * self.rounds(origin)
        return {
            "products": float(rows * n * problem.head_dim),
            "sorted": rows * compared(n, origin["width"]),
        }

    def choose(self, origin: Selected, offered: Offered) -> Tensor:
        import torch

        if offered.q_at != offered.k_at:
            raise fail("`cluster` ranks all queries, and these are not those of all keys")
        scores, width = affinities(origin["mu"], offered), min(origin["width"], offered.k.shape[2])
        every = torch.ones((1, 1, 1), dtype=torch.bool, device=scores.device)
        members = greatest(scores.flatten(0, 1), every, slice(0, 0), width).view(*scores.shape[:-1], -1)
        return torch.full(scores.shape, origin["width"], device=scores.device).scatter_(-1, members, 0)

    def reference(self, origin: Selected, offered: Offered) -> Tensor:
        import torch

        scores = affinities(origin["mu"], offered)
        found = torch.full(scores.shape, origin["width"])
        for row, out in zip(scores.flatten(0, -2), found.view(-1, scores.shape[-1]), strict=True):
            placed = sorted(range(len(row)), key=lambda i: (-row[i].item(), i))
            out[torch.tensor(placed[: origin["width"]], dtype=torch.int64)] = 0
        return found


def affinities(mu: Table, offered: Offered) -> Tensor:
    """[B, H, 2 c, n]: of queries, then of keys, brought to length 1, with the centers."""
    import torch

    units = (torch.nn.functional.normalize(x, dim=-1) for x in (offered.q, offered.k))
    return torch.cat([products(x, mu, offered) for x in units], -2)


selection = Cluster()
