"""Adaptive spans in training: Sukhbaatar et al. 2019, Adaptive Attention Span in Transformers, section 2.2.

    loss = loss + weight * spans.penalty(model, "z", longest=8192)
    loss.backward()
    optimizer.step()
    spans.clamp(model, "z")

`z` is what the attention learns for each head, `z = learn[H](0.0)`, a share of the longest span.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attndsl.errors import fail


def penalty(module: nn.Module, name: str, longest: float) -> Tensor:
    """The mean span of a head in positions, added up over layers: `longest` times the mean of each parameter
    of this name in the module or below. Raises AttnError where there is none."""
    return longest * torch.stack([span.mean() for span in _spans(module, name)]).sum()


def clamp(module: nn.Module, name: str) -> None:
    """The parameters of this `name` in the `module` or below put back into 0..1, where a step took them out.
    Raises AttnError as `penalty`."""
    with torch.no_grad():
        for span in _spans(module, name):
            span.clamp_(0.0, 1.0)


def _spans(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    found = [x for path, x in module.named_parameters() if path.rpartition(".")[2] == name]
    if not found:
        raise fail(f"the module has no parameter `{name}`", help="give the name that `learn` is bound to")
    yield from found
