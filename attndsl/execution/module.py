"""The nn.Module of a plan: it owns what is learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attndsl.errors import fail

if TYPE_CHECKING:
    from attndsl.execution.plan import Plan


class PlanModule(nn.Module):
    """Attention with trainable parameters, under the names they are bound to.

    `forward` takes what `Plan.__call__` takes.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        for table in plan.attention.learned:
            if hasattr(self, table.name):
                raise fail(
                    f"the learned parameter `{table.name}` has the name of an attribute of nn.Module",
                    help="bind it to another name",
                )
            self.register_parameter(table.name, nn.Parameter(plan.initial(table)))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: int | tuple[int, ...] | None = None,
        k_offset: int | tuple[int, ...] | None = None,
        return_lse: bool = False,
        **inputs: Any,
    ) -> Any:
        learned = {table.name: self.get_parameter(table.name) for table in self.plan.attention.learned}
        return self.plan.run(q, k, v, q_offset, k_offset, return_lse, inputs, learned)
