"""How stacks learn where tokens leave them, and how sure is sure enough."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy

from attndsl.errors import fail


def chances(sure: Sequence[Tensor]) -> Tensor:
    """[B, n, N]: how likely each layer is the last, of the chances to leave after each, N of [B, n].

    q(n) = sure(n) times the product of 1 - sure(m) over m < n; the last layer has what is left, so that they
    sum up to 1 (Elbayad et al. 2020, section 3.2).
    """
    stays, found = torch.ones_like(sure[0]), []
    for chance in sure[:-1]:
        found.append(stays * chance)
        stays = stays * (1 - chance)
    return torch.stack([*found, stays], -1)


def aligned(losses: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The mean of the losses of all layers, one for each of `record.exits[i].states`, weighted.

    weights: in proportion to the layer, 1, 2, ... N, if not given (Schuster et al. 2022, section 3.1); all
    alike in Elbayad et al. 2020, section 3.1.
    """
    weights = [*range(1, len(losses) + 1)] if weights is None else weights
    return sum((w * loss for w, loss in zip(weights, losses, strict=True)), start=torch.zeros(())) / sum(
        weights
    )


def oracle(scores: Tensor, penalty: float = 0.0, spread: float | None = None) -> Tensor:
    """int64 [B, n], counted from 1: where a token had best left.

    scores:  [B, n, N], how good each layer is for it: log-likelihoods of the next token, or 1 where it is the
             likeliest and 0 where not.
    penalty: what each layer costs.
    spread:  scores are sums over all tokens, weighted by exp(-(t - u)^2 / spread) of their distance; of each
             token alone if not given.

    Elbayad et al. 2020, section 3.2.
    """
    if spread is not None:
        at = torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
        near = torch.exp(-((at[:, None] - at) ** 2) / spread)
        scores = torch.einsum("tu,bun->btn", near, scores)
    cost = penalty * torch.arange(1, scores.shape[2] + 1, device=scores.device, dtype=scores.dtype)
    return (scores - cost).argmax(-1) + 1


def leaving(sure: Sequence[Tensor], depths: Tensor) -> Tensor:
    """The mean of -log q at `depths` int64 [B, n], where tokens had best left, of the chances to leave after
    each layer, N of [B, n] (Elbayad et al. 2020, section 3.2)."""
    total = torch.zeros_like(sure[0])
    for layer, chance in enumerate(sure[:-1], 1):
        # a chance may be 1 or 0 to rounding: its logarithm is held above -100 there
        told = binary_cross_entropy(chance, (depths == layer).to(chance.dtype), reduction="none")
        total = total + torch.where(depths >= layer, told, 0)
    return total.mean()


def calibrated(risks: Tensor, thresholds: Sequence[float], *, tolerance: float, error: float) -> float | None:
    """The last of the thresholds for which it is safe to say that the mean risk is at most `tolerance`; None
    where it is for none.

    risks:      [m, T], from 0 to 1: of m examples that the stack was not trained on, drawn as those to come
                will be, what is lost by each threshold.
    thresholds: T of them, those first that tokens leave the latest by. They are tested in this order, up to
                the first of which it cannot be said.
    error:      the chance that the answer is wrong, over the draw of the examples, is at most this.

    Learn then Test by a fixed sequence (Angelopoulos et al. 2021; Schuster et al. 2022, section 4), with
    p-values of Hoeffding and Bentkus (Bates et al. 2021, section 3.1).
    """
    if risks.ndim != 2 or risks.shape[1] != len(thresholds):
        raise fail(f"risks are [m, {len(thresholds)}], not {[*risks.shape]}")
    if not 0 < tolerance < 1 or not 0 < error < 1:
        raise fail(f"a tolerance of {tolerance} and an error of {error}", help="both are between 0 and 1")
    if bool(((risks < 0) | (risks > 1)).any()):
        raise fail("risks are from 0 to 1")
    found = None
    for threshold, mean in zip(thresholds, risks.double().mean(0).tolist(), strict=True):
        if p_value(mean, len(risks), tolerance) > error:
            break
        found = threshold
    return found


def p_value(mean: float, count: int, tolerance: float) -> float:
    """How likely a mean of `count` numbers from 0 to 1 is at most `mean`, if more than the `tolerance` is
    expected; a bound, the lesser of Hoeffding's and Bentkus's (Bates et al. 2021, section 3.1)."""
    least = min(mean, tolerance)
    relative = sum(p * math.log(p / q) for p, q in ((least, tolerance), (1 - least, 1 - tolerance)) if p)
    binomial = torch.distributions.Binomial(count, torch.tensor(tolerance, dtype=torch.float64))
    few = torch.arange(min(math.ceil(count * mean), count) + 1, dtype=torch.float64)
    bentkus = math.e * float(binomial.log_prob(few).logsumexp(0).exp())  # type: ignore[no-untyped-call]
    return min(math.exp(-count * relative), bentkus, 1.0)
