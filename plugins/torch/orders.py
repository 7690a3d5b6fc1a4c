"""Keys sorted anew at every call, `lsh`, `cluster` and labels: each query sees pieces of an order.

The pairs of an order lie all over the matrix, but side by side once tokens are sorted. So nothing is tiled:
each piece is a product of gathered queries and keys, and what else the mask says is decided there. What the
pieces of one query give is merged at the end, by an embedding bag over all of its places in the orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from attndsl import expr as ir
from attndsl.attention import Attention, HeadGroup, Relation
from attndsl.backend import Call
from attndsl.execution import registry
from attndsl.execution.operator import vjp
from attndsl.execution.torch_eval import STRAIN, Env, evaluate, of_heads, singles, strained
from attndsl.expr import Expr, Selected, Table
from attndsl.meaning.intervals import check_range
from attndsl.scores import affine_in_s, scale_and_bias
from attndsl.selection import Chunks, First, Selection, ordered
from attndsl.tiles.lowering import Sizes, head_groups, ranges
from attndsl.tiles.tiling import replaced

from .lists import K, Q, decided

LOG2_E = 1 / math.log(2.0)
AT_ONCE = 2**17
"""Weights that are formed at once: what a step writes the next finds in cache."""
LONGEST = 2**22
"""Tokens whose positions, and halves of them, are real numbers of 32 bits."""
BITS = 62
"""Clusters that one integer tells."""
SAME = ir.eq(ir.var("q"), ir.var("k"))
S, CAUSAL = ir.var("s"), ir.le(ir.var("k"), ir.var("q"))
OF_KEYS = {"K", "k", "n", "D", "h", "H"}


@dataclass(frozen=True)
class Near:
    """Tokens of one label, sorted by it, of which a query sees some of those before it: from `last` back to
    `first`, 0 being itself."""

    first: int
    last: int


How = Chunks | First | Near


@dataclass(frozen=True)
class Ordered:
    """A mask that is one leaf of an order and `rest`, with the score over `s` and, if `length` is given, keys
    divided by it, a number over K; `own` is the logit of a token and itself, where it is another. `table`
    tells ranks, or labels that are yet to be sorted."""

    table: Table
    how: How
    rest: Expr
    score: Expr
    length: Expr | None
    own: float | None

    @staticmethod
    def of(group: HeadGroup) -> Ordered | None:
        """None where the mask or the score is no such."""
        if group.norm.kind != "softmax" or group.norm.sink is not None:
            return None
        mask = group.relation.mask
        parts = mask.args if mask.op == "and" else (mask,)
        for table in mask.tables:
            how, rest, count = _how(table, parts)
            if how is None or not decided(rest):
                continue
            if group.decay is None:
                how = replace(how, count=False) if isinstance(how, Chunks) else how
            elif count is None or group.decay not in _counted(rest, count):
                return None
            score, length = _over_s(group.score)
            own = None
            if score.op == "where" and score.args[0] is SAME:
                own = ir.number(score.args[1])
                score = score if own is None else score.args[2]
            return None if score.free & {"Q", "K"} else Ordered(table, how, rest, score, length, own)
        return None

    @cached_property
    def slope(self) -> Expr | None:
        """What the score multiplies s with, if its derivative is such."""
        found = affine_in_s(self.score)
        return None if found is None else found[0]

    def scaled(self, head_dim: int) -> tuple[Ordered, float]:
        """The same with a score over products of K with scaled Q, and that scale."""
        found = scale_and_bias(self.score, head_dim)
        if isinstance(found, str) or found[1] is not None:
            return self, head_dim**-0.5
        return replace(self, score=S), found[0]

    def pieces(self, n: int) -> tuple[int, int, int]:
        """How many pieces there are of so many tokens, with how many queries and keys each."""
        if isinstance(self.how, Near):
            size = max(1, min(self.how.first, n))
            return -(-n // size), size, 2 * size
        rounds = self.table.explicit[0]
        assert isinstance(rounds, int)
        if isinstance(self.how, First):
            width = min(self.how.width, n)
            return rounds // 2, width, width
        size = max(1, min(self.how.size, n))
        return rounds * -(-n // size), size, 2 * size


def _how(table: Table, parts: tuple[Expr, ...]) -> tuple[How | None, Expr, Expr | None]:
    """How a table relates the pairs of a mask, what else its parts say, and the multiplicity of pairs."""
    if not isinstance(table.origin, Selected):
        return None, ir.TRUE, None
    selection: Selection = registry.plugin("selections", table.origin.selection)
    if selection.kind == "labels":
        return (*_near(table, parts), None)
    how = selection.relates(table.origin)
    if how is None:
        return None, ir.TRUE, None
    leaf = ordered(table, how, ir.var("q"), ir.var("k"), ir.var("n"))
    rest = ir.all_of(*(part for part in parts if part is not leaf.mask))
    return how if leaf.mask in parts else None, rest, leaf.count


def _near(labels: Table, parts: tuple[Expr, ...]) -> tuple[Near | None, Expr]:
    q, k = ([ir.var("b"), ir.var("h"), ir.var(side)] for side in "qk")
    same = ir.eq(ir.lookup(labels, *q), ir.lookup(labels, *k))
    ahead = ir.sub(ir.make("rank_of", tuple(k), labels, "int"), ir.make("rank_of", tuple(q), labels, "int"))
    ends = {part: part.args for part in parts if part.op == "le" and ahead in part.args}
    low = [ir.number(a) for a, b in ends.values() if b is ahead]
    high = [ir.number(b) for a, b in ends.values() if a is ahead]
    if same not in parts or len(low) != 1 or len(high) != 1:
        return None, ir.TRUE
    (low_,), (high_,) = low, high
    if low_ is None or high_ is None or not low_ <= high_ <= 0:
        return None, ir.TRUE
    # of one label ranks rise with positions
    told = {same, CAUSAL, *ends}
    return Near(int(-low_), int(-high_)), ir.all_of(*(part for part in parts if part not in told))


def _counted(rest: Expr, count: Expr) -> tuple[Expr, ...]:
    """Decays that are the multiplicity of pairs of which `rest` holds."""
    return tuple(ir.mul(ir.const(1.0), e) for e in (count, ir.where(rest, count, ir.ZERO)))


def _over_s(score: Expr) -> tuple[Expr, Expr | None]:
    """The score with `s` in place of the product of Q and K, or of Q and K / length."""
    product = ir.mul(ir.call("sqrt", ir.var("D")), ir.var("s"))
    inner = ir.inner(Q, K), ir.inner(K, Q)
    divided = [e for e in ir.nodes(score) if e.op == "div" and e.args[0] in inner]
    length = divided[0].args[1] if len(divided) == 1 else ir.ONE
    if "K" in length.free and length.free <= OF_KEYS and not length.tables:
        return replaced(score, {divided[0]: product}), length
    return replaced(score, dict.fromkeys(inner, product)), None


def ordered_of(attention: Attention) -> tuple[Ordered | None, ...] | None:
    """That of each group of heads, None of a group that has none; None where no group has one."""
    found = tuple(Ordered.of(group) for group in attention.groups)
    return found if any(found) else None


def fits(call: Call) -> bool:
    """Whether every key is a query too, as it is in all orders."""
    here = call.q.device.type == "cpu" and call.q_at == call.k_at
    return here and 0 < call.q.shape[2] <= LONGEST


def without_orders(attention: Attention, found: Sequence[Ordered | None]) -> Attention:
    """The others of its groups; those that go by an order relate nothing."""
    groups = [
        group if order is None else replace(group, relation=Relation(ir.FALSE), decay=None)
        for group, order in zip(attention.groups, found, strict=True)
    ]
    return replace(attention, groups=tuple(groups))


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of one head: which queries [P, a] see which keys [P, b], -1 where there is none, and the
    round of each.

    same      puts a number wherever a token meets itself
    free      of some pieces of one round the margin of pairs that count nowhere before, None where all are
    by_query  of each query its places in `queries`, one after the other, and where each query's begin;
    by_key    likewise of keys; the place after the last is that of nothing
    """

    queries: Tensor
    keys: Tensor
    rounds: int
    same: Callable[[Tensor, Tensor, Tensor, Tensor, float], None]
    free: Callable[[Tensor, Tensor, Tensor], Tensor | None]
    by_query: tuple[Tensor, Tensor]
    by_key: tuple[Tensor, Tensor]

    def some(self, which: Tensor) -> Iterator[Tensor]:
        """Pieces, in the order of their numbers, by rounds and as many as are formed at once."""
        count = max(1, AT_ONCE // (self.queries.shape[1] * self.keys.shape[1]))
        size = len(self.queries) // self.rounds
        for first in range(0, len(self.queries), size):
            here = which[(which >= first) & (which < first + size)]
            yield from torch.split(here, count) if len(here) else ()


def pieces_of(how: How, ranks: Tensor) -> Pieces:
    """Of the ranks [rounds, n] of one head, or of its labels [n]."""
    if isinstance(how, Near):
        return of_labels(ranks, how)
    return of_clusters(ranks, how.width) if isinstance(how, First) else of_chunks(ranks, how)


def of_chunks(ranks: Tensor, how: Chunks) -> Pieces:
    rounds, n = ranks.shape
    size = min(how.size, n)
    count = -(-n // size)
    tokens = torch.arange(n).expand(rounds, n)
    order = torch.full((rounds, count * size), -1).scatter_(1, ranks, tokens)
    before = order[:, -size:].roll(1, 0) if how.wrap else torch.full((rounds, size), -1)
    keys = torch.cat([before, order], 1).unfold(1, 2 * size, size).flatten(0, 1)
    own, of_round = ranks // size, torch.arange(rounds)[:, None]
    after = own + 1
    piece = of_round * count + after
    if how.wrap:
        piece = torch.where(after < count, piece, (of_round + 1) % rounds * count)
    place = ranks % size
    behind = torch.where((after < count) | how.wrap, piece * 2 * size + place, keys.numel())
    ahead = (of_round * count + own) * 2 * size + size + place
    free = _all if how.count else partial(_free_of_chunks, own.float(), how, size)
    return Pieces(
        order.view(-1, size),
        keys,
        rounds,
        partial(_put_in_chunks, how, size, count),
        free,
        _rectangle(ranks + of_round * count * size),
        _rectangle(torch.cat([ahead, behind])),
    )


def of_labels(labels: Tensor, how: Near) -> Pieces:
    places = torch.empty_like(labels).scatter_(0, labels.argsort(stable=True), torch.arange(len(labels)))
    size = max(1, min(how.first, len(labels)))
    found = of_chunks(places[None], Chunks(size, False, False))
    # a key in place b of a piece is so far before a query in place a, in the order
    back = (size + torch.arange(size)[:, None]) - torch.arange(2 * size)
    inside = margin((how.last <= back) & (back <= how.first))
    return replace(found, free=partial(_free_of_labels, labels.float(), inside))


def _free_of_labels(labels: Tensor, inside: Tensor, which: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    apart = (labels[queries][:, :, None] - labels[keys][:, None, :]).abs_()
    return torch.minimum(0.5 - apart, inside)


def _put_in_chunks(
    how: Chunks, size: int, count: int, which: Tensor, queries: Tensor, keys: Tensor, x: Tensor, value: float
) -> None:
    torch.diagonal(x, size, 1, 2).fill_(value)
    if how.wrap:
        for i in (which % count == 0).nonzero().flatten().tolist():
            x[i, :, :size].masked_fill_(queries[i, :, None] == keys[i, :size], value)


def _put(which: Tensor, queries: Tensor, keys: Tensor, x: Tensor, value: float) -> None:
    x.masked_fill_(queries[:, :, None] == keys[:, None, :], value)


def _all(which: Tensor, queries: Tensor, keys: Tensor) -> None:
    return None


def _rectangle(places: Tensor) -> tuple[Tensor, Tensor]:
    """Of places [m, n] of n tokens."""
    return places.T.flatten(), torch.arange(0, places.numel(), len(places))


def _free_of_chunks(
    own: Tensor, how: Chunks, size: int, which: Tensor, queries: Tensor, keys: Tensor
) -> Tensor | None:
    """Pairs that no earlier round holds; own [rounds, n], the piece of each token, as real numbers."""
    last = int(own[0].max())
    here = int(which[0]) // (last + 1)
    found = None
    for r in range(here):
        mine, theirs = own[r][queries][:, :, None], own[r][keys][:, None, :]
        # beyond 0 and 1, what one minus the other is, by a half
        found = both(found, ((mine - 0.5) - theirs).abs_().sub_(1.0))
        if how.wrap and bool((mine == 0).any()):
            found = both(found, apart(mine == 0, own[r - 1][keys][:, None, :] == last))
    mine = own[here][queries][:, :, None]
    if how.wrap and bool((mine == 0).any()):
        again = own[here][keys][:, None, :] == 0
        again[..., size:] = False
        found = both(found, apart(mine == 0, again))
    return found


def both(a: Tensor | None, b: Tensor) -> Tensor:
    """The margin of what holds where both do."""
    return b if a is None else torch.minimum(a, b)


def margin(truths: Tensor) -> Tensor:
    return truths.to(torch.float32).sub_(0.5)


def apart(a: Tensor, b: Tensor) -> Tensor:
    """The margin of what holds where not both do."""
    return margin((a & b).logical_not_())


def of_clusters(ranks: Tensor, width: int) -> Pieces:
    rounds, n = ranks.shape
    count = rounds // 2
    tokens = (ranks < width).nonzero()[:, 1].view(2, count, -1)
    members = [_members(x, n) for x in tokens]
    bags = [_bags(x.flatten(), n) for x in tokens]
    return Pieces(tokens[0], tokens[1], 1, _put, partial(_free_of_clusters, members), *bags)


def _members(tokens: Tensor, n: int) -> Tensor:
    """[words, n]: in which clusters [c, w] a token is, as bits."""
    words = torch.zeros((-(-len(tokens) // BITS), n), dtype=torch.int64)
    for word, some in zip(words, torch.split(tokens, BITS), strict=True):
        bits = torch.ones(1, dtype=torch.int64) << torch.arange(len(some))
        word.index_add_(0, some.flatten(), bits[:, None].expand(some.shape).flatten())
    return words


def _free_of_clusters(
    members: Sequence[Tensor], which: Tensor, queries: Tensor, keys: Tensor
) -> Tensor | None:
    """Pairs that no earlier cluster holds."""
    found = None
    for word in range(int(which[-1]) // BITS + 1):
        earlier = (torch.ones(1, dtype=torch.int64) << (which - word * BITS).clamp(0, BITS)) - 1
        mine = members[0][word][queries] & earlier[:, None]
        more = (mine[:, :, None] & members[1][word][keys][:, None, :]) == 0
        found = more if found is None else found.logical_and_(more)
    return None if found is None else margin(found)


def _bags(tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(tokens, minlength=n)
    return tokens.argsort(stable=True), counts.cumsum(0) - counts


@dataclass(frozen=True, eq=False)
class Formed:
    """Some pieces whose pairs are formed: places [P, a] of queries, and which are none; gathered q [P, a, D],
    scaled, k [P, b, D] and v; the margin of the pairs [P, a, b], None where all are live."""

    ordered: Ordered
    env: Env
    queries: Tensor
    none: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    margin: Tensor | None
    same: Callable[[Tensor, float], None]

    @cached_property
    def live(self) -> Tensor | None:
        return None if self.margin is None else self.margin[None] > 0

    @cached_property
    def bound(self) -> Tensor:
        """inf where a pair is live, else -inf."""
        assert self.margin is not None
        return (self.margin * torch.inf).to(self.q.dtype)

    def products(self) -> Tensor:
        return torch.bmm(self.q, self.k.transpose(1, 2))

    def score(self, s: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Of the products, `tables` in the place of the call's."""
        if self.ordered.score is S:
            return s
        env = replace(
            self.env, values={**self.env.values, "s": s[None]}, tables={**self.env.tables, **tables}
        )
        return self.real(self.ordered.score, env).expand(1, *s.shape)[0]

    def real(self, e: Expr, env: Env) -> Tensor:
        return evaluate(e, env, self.live).to(env.dtype)

    def closed(self, logit: Tensor) -> Tensor:
        """With the logit of a token and itself, put in place, and -inf where a pair is not live."""
        if self.ordered.own is not None:
            self.same(logit, self.ordered.own)
        if self.margin is None:
            return logit
        # masks that no one foresees take four times as long where each number is asked for its own
        found = torch.minimum(logit, self.bound)
        if bool(found.sum().isnan()):
            found = torch.where(self.bound > 0, logit, -torch.inf)
        return found

    def weights(self, logit: Tensor, *bases: Tensor) -> Tensor:
        """exp(logit - bases), these [P, a]: torch's exp2 takes a third of the time of its exp."""
        first, *more = (x[..., None] * -LOG2_E for x in bases)
        found = torch.add(first, logit, alpha=LOG2_E)
        for base in more:
            found += base
        return found.exp2_()


@dataclass(frozen=True, eq=False)
class Head:
    """One query head of one batch row: q [n, D] times `scale`, k [n, D] divided by its length if the score
    says so, v [n, Dv]."""

    ordered: Ordered
    env: Env
    pieces: Pieces
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def formed(self, which: Tensor) -> Formed:
        queries, keys = self.pieces.queries[which], self.pieces.keys[which]
        none, there = queries < 0, keys >= 0
        queries, keys = queries.clamp_min(0), keys.clamp_min(0)
        at = {"q": queries[None, :, :, None], "k": keys[None, :, None, :]}
        env = replace(self.env, values={**self.env.values, **at})
        found = self.pieces.free(which, queries, keys)
        if self.ordered.rest is CAUSAL:
            found = both(found, at["q"][0].float() - at["k"][0].float() + 0.5)
        elif self.ordered.rest is not ir.TRUE:
            found = both(found, margin(evaluate(self.ordered.rest, env)[0]))
        if not bool(there.all()):
            found = both(found, margin(there)[:, None, :])
        found = None if found is None else found.expand(*queries.shape, keys.shape[1])
        q, k, v = gathered(self.q, queries), gathered(self.k, keys), gathered(self.v, keys)
        return Formed(
            self.ordered, env, queries, none, q, k, v, found, partial(self.pieces.same, which, queries, keys)
        )

    def sums(self, which: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Some pieces at a time: which; of each query the sums of the weighed values and of the weights, and
        the logit that these are beyond."""
        for some in self.pieces.some(which):
            here = self.formed(some)
            logit = here.closed(here.score(here.products(), {}))
            top = logit.amax(-1)
            weight = here.weights(logit, top.masked_fill(top == -torch.inf, 0.0))
            yield some, torch.bmm(weight, here.v), weight.sum(-1), top

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output [n, Dv] and log-sum-exp [n]."""
        queries = self.pieces.queries
        values = self.v.new_empty((*queries.shape, self.v.shape[1]))
        totals, tops = self.v.new_empty(queries.shape), self.v.new_empty(queries.shape)
        for some, value, total, top in self.sums(torch.arange(len(queries))):
            here = slice(int(some[0]), int(some[-1]) + 1)
            values[here], totals[here], tops[here] = value, total, top
        top, beyond, share = merged(queries, len(self.q), totals, tops)
        out = bag(self.pieces.by_query, values.flatten(0, 1), share)
        return out, top + beyond

    def bases(self, lse: Tensor) -> tuple[Tensor, ...]:
        """What added up is the log-sum-exp [n], to all digits also where it is large; inf of an empty row."""
        top = lse.masked_fill(lse == -torch.inf, torch.inf)
        if not strained(lse):
            return (top,)
        beyond = torch.zeros_like(top)
        rows = ((lse.abs() > STRAIN) & (lse != -torch.inf)).nonzero().flatten()
        queries = self.pieces.queries
        which = torch.isin(queries, rows).any(1).nonzero().flatten()
        _, *found = (torch.cat(parts) for parts in zip(*self.sums(which), strict=True))
        exact, more, _ = merged(queries[which], len(lse), *found[1:])
        top[rows], beyond[rows] = exact[rows], more[rows]
        return top, beyond

    def gradient(
        self, lse: Tensor, grad_out: Tensor, delta: Tensor, tables: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v as they are here; those of `tables` are added in place."""
        pieces, bases = self.pieces, self.bases(lse)
        sides = (self.q, pieces.queries), (self.k, pieces.keys), (self.v, pieces.keys)
        # the last row is that of nothing
        totals = [x.new_empty((at.numel() + 1, x.shape[1])) for x, at in sides]
        for total in totals:
            total[-1] = 0.0
        for some in pieces.some(torch.arange(len(pieces.queries))):
            here = self.formed(some)
            s, slope_of_s = here.products(), self.ordered.slope
            if slope_of_s is None or tables:
                logit, pull = vjp(here.score, s, singles(self.env.tables, tables))
            else:
                logit, factor = here.score(s, {}), ir.number(slope_of_s)
            above = (x[here.queries].masked_fill_(here.none, torch.inf) for x in bases)
            weight = here.weights(here.closed(logit), *above)
            grad = gathered(grad_out, here.queries)
            slope = torch.baddbmm(-delta[here.queries][..., None], grad, here.v.transpose(1, 2)).mul_(weight)
            if self.ordered.own is not None:
                here.same(slope, 0.0)
            if slope_of_s is None or tables:
                slope, more = pull(slope)
                for name, g in more.items():
                    tables[name] += g
            elif factor != 1:
                slope *= here.real(slope_of_s, here.env)[0] if factor is None else factor
            ends = (slope, here.k), (slope.mT, here.q), (weight.mT, grad)
            for total, (_, at), (left, right) in zip(totals, sides, ends, strict=True):
                into = total[:-1].view(*at.shape, -1)[int(some[0]) : int(some[-1]) + 1]
                torch.bmm(left, right, out=into)
        by = pieces.by_query, pieces.by_key, pieces.by_key
        gq, gk, gv = (bag(places, total) for places, total in zip(by, totals, strict=True))
        return gq, gk, gv


def gathered(x: Tensor, at: Tensor) -> Tensor:
    return x.index_select(0, at.flatten()).view(*at.shape, x.shape[1])


def bag(places: tuple[Tensor, Tensor], values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of the values [m, D] at the places of each token, weighed."""
    which, starts = places
    weights = None if weights is None else weights[which]
    return embedding_bag(which, values, starts, mode="sum", per_sample_weights=weights)


def merged(queries: Tensor, n: int, totals: Tensor, tops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of sums of weights beyond a logit each [P, a]: the greatest logit of each query [n], the logarithm of
    all weights beyond that, and what the weights in each place are multiplied with."""
    at, tops = torch.where(queries < 0, n, queries).flatten(), tops.flatten()
    top = tops.new_full((n + 1,), -torch.inf).scatter_reduce_(0, at, tops, "amax")
    share = torch.exp(tops - top.masked_fill(top == -torch.inf, 0.0)[at])
    total = torch.zeros_like(top).index_add_(0, at, share * totals.flatten())
    share /= total.masked_fill(total == 0, 1.0)[at]
    return top[:n], total[:n].log(), share


def heads_of(
    attention: Attention, found: Sequence[Ordered | None], call: Call
) -> Iterator[tuple[int, int, Head]]:
    """Every batch row and query head that goes by an order."""
    (batch, heads, n, width), groups = call.q.shape, head_groups(attention, call.q.shape[1])
    share = heads // call.k.shape[1]
    scaled = [None if one is None else one.scaled(width) for one in found]
    sizes = Sizes(n, call.q_at, call.k_at, call.n)
    for b in range(batch):
        for h, group in enumerate(groups):
            here = scaled[group]
            if here is None:
                continue
            one, scale = here
            check_range(one.rest, ranges(sizes, b), call.tables)
            pieces = pieces_of(one.how, call.tables[one.table.name][b, h])
            k = call.k[b, h // share]
            k = k if one.length is None else divided(k, one.length, of_heads(call, b, [h], axes=3))
            env = of_heads(call, b, [h], axes=4)
            yield b, h, Head(one, env, pieces, call.q[b, h] * scale, k, call.v[b, h // share], scale)


def divided(k: Tensor, length: Expr, env: Env) -> Tensor:
    """Keys [n, D] divided by a number each."""
    at = torch.arange(len(k), device=k.device)[None, None, :]
    found = evaluate(length, replace(env, values={**env.values, "K": k[None], "k": at}))
    return k / found.to(k.dtype).expand(1, 1, len(k))[0, 0, :, None]


def attend(
    attention: Attention, found: Sequence[Ordered | None], call: Call, out: Tensor, lse: Tensor
) -> None:
    """Writes output and log-sum-exp of heads that go by an order, of a call with vectors of at least
    float32."""
    for b, h, head in heads_of(attention, found, call):
        out[b, h], lse[b, h] = head.forward()


def add_gradients(
    attention: Attention,
    found: Sequence[Ordered | None],
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    totals: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]],
) -> None:
    """Adds the gradients of these heads to those of q, k, v and tables, in at least float32."""
    gq, gk, gv, tables = totals
    out, grad_out, share = out.to(gq.dtype), grad_out.to(gq.dtype), call.q.shape[1] // call.k.shape[1]
    for b, h, head in heads_of(attention, found, call):
        delta = (grad_out[b, h] * out[b, h]).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse[b, h].masked_fill(lse[b, h] == -torch.inf, 0.0)
        of_q, of_k, of_v = head.gradient(lse[b, h], grad_out[b, h], delta, tables)
        length, kv_head = head.ordered.length, h // share
        if length is not None:
            whole = partial(divided, length=length, env=of_heads(call, b, [h], axes=3))
            (of_k,) = vjp(whole, call.k[b, kv_head])[1](of_k)
        gq[b, h] += of_q * head.scale
        gk[b, kv_head] += of_k
        gv[b, kv_head] += of_v
