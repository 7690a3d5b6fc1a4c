"""A program of a user that touches all that is public: tests run it, and hold it to mypy --strict."""

from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import attndsl
from attndsl import spans

TEXT = """
let z = learn[H](0.5)
attention lm(w = 4, m = 0) { mask causal & last(w)  decay clamp(1 - (q - k) / 64 + z, 0, 1) }
attention packed { inputs doc : int[n]  mask causal & documents(doc) }
attention best { mask topk(2, of = causal) }
attention both = 0.5 * lm + 0.5 * best
assert lm <= causal
"""


class Layer(nn.Module):
    def __init__(self, plan: attndsl.Plan | attndsl.SumPlan) -> None:
        super().__init__()
        self.project = nn.Linear(16, 3 * 16)
        self.attend = plan.module()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def main() -> str:
    program = attndsl.parse(TEXT)
    lm = assert_type(program["lm"](w=8), attndsl.Bound)
    mask = assert_type(lm.mask(16), NDArray[np.bool_])
    q, k, v = torch.randn(3, 1, 2, 16, 8).unbind()

    plan = attndsl.compile(program["lm"], length=16, heads=2, head_dim=8, training=False)
    assert_type(plan, attndsl.Plan | attndsl.SumPlan)
    out = assert_type(plan(q, k, v), Tensor)
    out, lse = assert_type(plan(q, k, v, return_lse=True), tuple[Tensor, Tensor])
    out, lse, weights = plan(q, k, v, return_lse=True, return_weights=True)

    layer = Layer(attndsl.compile(lm, length=16, heads=2, head_dim=8, training=True))
    loss = layer(torch.randn(1, 16, 16)).sum() + spans.penalty(layer, "z", longest=64)
    torch.autograd.backward(loss)
    spans.clamp(layer, "z")

    session = plan.session(batch=1, capacity=16)
    with torch.no_grad():
        step = assert_type(session.step(q[:, :, :1], k[:, :, :1], v[:, :, :1]), Tensor)

    report = attndsl.analyze(program["packed"], length=16, doc=np.arange(16) // 4, parts=["nnz", "rows"])
    verdicts = [attndsl.prove(assertion).status for assertion in program.assertions]
    tiles = lm.block_mask(256, heads=2)
    flex = tiles.to_flex()
    score_mod, flex = program["packed"].to_flex(256, heads=2, doc=np.arange(256) // 9)
    assert score_mod is None
    chosen = attndsl.compile(program["best"], length=16, heads=2, head_dim=8).choices(q, k)
    both = attndsl.compile(program["both"], length=16, heads=2, head_dim=8)(q, k, v)
    shapes = [list(x.shape) for x in (out, lse, weights, step, both, *chosen.values())]
    return f"{report}\n{verdicts} {tiles.nnz} {flex.shape} {mask.sum()} {shapes} {lm.graph(16)}"
