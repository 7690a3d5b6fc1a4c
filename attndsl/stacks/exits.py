"""Training of stages with an exit: losses of the states after each layer, and where tokens should leave.

N is how many layers the stage has, V how many tokens there are to predict. States and confidences are those
of `record.exits[i]` of a module in training, whose tokens leave nowhere unless `depths` are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, cross_entropy

from attndsl.errors import fail
from attndsl.stage import Logits

if TYPE_CHECKING:
    from attndsl.stacks.module import StackModule


def distribution(sure: Sequence[Tensor]) -> Tensor:
    """[B, n, N], with what chance a token leaves after each layer, of the chances `sure` to leave for one
    that has not, N of [B, n]: the last takes the rest, so that they sum up to 1 (Elbayad et al. 2020, section
    3.2)."""
    left, found = torch.ones_like(sure[0]), []
    for chance in sure[:-1]:
        found.append(left * chance)
        left = left * (1 - chance)
    return torch.stack([*found, left], -1)


def aligned(
    states: Sequence[Tensor], logits: Logits, targets: Tensor, weights: Sequence[float] | None = None
) -> Tensor:
    """The mean over layers of the cross-entropy of each, as if all tokens left there (Elbayad et al. 2020,
    section 2.2; of CALM, whose weights rise with the layer, Schuster et al. 2022, section 3.3).

    states   N of [B, n, width]
    logits   of states, [B, n, V]: `module.logits`
    targets  int64 [B, n]; -100 where there is none
    weights  of layers; all alike if not given

    Raises AttnError for another number of weights.
    """
    weights = [1.0] * len(states) if weights is None else weights
    if len(weights) != len(states):
        raise fail(f"{len(weights)} weights of {len(states)} layers")
    losses = [cross_entropy(logits(x).flatten(0, 1), targets.flatten()) for x in states]
    total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    return cast(Tensor, total / sum(weights))


def sampled(shape: Sequence[int], layers: int, generator: torch.Generator | None = None) -> Tensor:
    """Depths of `shape`, int64, uniform in 1 .. `layers`, drawn by a `generator`."""
    return torch.randint(1, layers + 1, tuple(shape), generator=generator)


def mixed(
    module: StackModule,
    x: Tensor,
    targets: Tensor,
    paths: int = 2,
    generator: torch.Generator | None = None,
    **tables: Any,
) -> Tensor:
    """The mean over `paths` of the cross-entropy where each token leaves at a depth that is drawn, and others
    read of it what it left (Elbayad et al. 2020, section 2.2).

    module     one with a stage that has an exit, and a readout
    x          [B, n, width]
    targets    int64 [B, n]; -100 where there is none
    paths      how many times depths are drawn
    generator  draws them on the CPU; torch's own if not given
    tables     run-time inputs of attentions, by name

    Raises AttnError where `module` has no readout, no exit or several.
    """
    turns = [len(stage.turns) for stage in module.stack.layers if stage.exit is not None]
    if len(turns) != 1 or module.readout is None:
        help = "give `readout=` to `build`" if len(turns) == 1 else "draw `sampled` depths for each yourself"
        raise fail("mixed training is of one stage with an exit and a readout", help=help)
    losses = []
    for _ in range(paths):
        depths = sampled(x.shape[:2], turns[0], generator)
        y, _ = module(x, depths=depths, **tables)
        losses.append(cross_entropy(module.readout(y).flatten(0, 1), targets.flatten()))
    return torch.stack(losses).mean()


@torch.no_grad()
def likelihoods(states: Sequence[Tensor], logits: Logits, targets: Tensor) -> Tensor:
    """[B, n, N], the logarithm of the probability that each layer gives to `targets` int64 [B, n]; states and
    `logits` as for `aligned`."""
    return torch.stack([logits(x).log_softmax(-1).gather(-1, targets[..., None])[..., 0] for x in states], -1)


@torch.no_grad()
def correct(states: Sequence[Tensor], logits: Logits, targets: Tensor) -> Tensor:
    """[B, n, N] of 1 and 0, whether the likeliest token of each layer is that of `targets` int64 [B, n];
    states and `logits` as for `aligned`."""
    return torch.stack([(logits(x).argmax(-1) == targets).to(x.dtype) for x in states], -1)


@torch.no_grad()
def consistent(states: Sequence[Tensor], logits: Logits) -> Tensor:
    """[B, n, N] of 1 and 0, whether the likeliest token of each layer is that of the last: what a
    `classifier` is to say (Schuster et al. 2022, section 3.5); states and `logits` as for `aligned`."""
    likeliest = torch.stack([logits(x).argmax(-1) for x in states], -1)
    return (likeliest == likeliest[..., -1:]).to(states[0].dtype)


def smoothed(scores: Tensor, width: float) -> Tensor:
    """Scores [B, n, N] summed over neighbours, exp(-(t - u)^2 / `width`) of the one at u for the one at t;
    those of a width of 0 are as they were (Elbayad et al. 2020, section 3.2)."""
    if width == 0:
        return scores
    at = torch.arange(scores.shape[1], dtype=scores.dtype, device=scores.device)
    return torch.exp(-((at[:, None] - at) ** 2) / width) @ scores


def oracle(scores: Tensor, penalty: float = 0.0) -> Tensor:
    """Where tokens should leave, int64 [B, n] from 1 to N: at the best of the scores [B, n, N] less `penalty`
    a layer, the first of equal ones (Elbayad et al. 2020, section 3.2). Of whole rows it is the one of
    `scores.sum(1, keepdim=True)`."""
    layers = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    return (scores - penalty * layers).argmax(-1) + 1


def exit_loss(sure: Sequence[Tensor], depths: Tensor) -> Tensor:
    """The mean of -log of the chance to leave at `depths`, int64 [B, n], where `sure` are the chances to
    leave for a token that has not, N of [B, n] (Elbayad et al. 2020, section 3.2; the geometric-like
    objective of Schuster et al. 2022, section 3.5, where depths are the first that are consistent)."""
    total = torch.zeros_like(sure[0])
    for layer, chance in enumerate(sure[:-1], 1):
        told = binary_cross_entropy(chance, (depths == layer).to(chance.dtype), reduction="none")
        total = total + torch.where(depths >= layer, told, 0)
    return total.mean()


def classifier_loss(sure: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """The mean cross-entropy of confidences `sure`, N of [B, n], with what each layer but the last is to say,
    `wanted` [B, n, N] of 1 and 0, each on its own (Schuster et al. 2022, section 3.5)."""
    return binary_cross_entropy(torch.stack([*sure[:-1]], -1), wanted[..., :-1])
