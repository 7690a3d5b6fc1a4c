"""Derivatives of expressions, as expressions: reverse accumulation over the shared nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from attndsl import expr as ir
from attndsl.expr import Expr

ZERO, HALF, ONE, TWO = (ir.const(x) for x in (0.0, 0.5, 1.0, 2.0))


def adjoints(slopes: Mapping[Expr, Expr], targets: Collection[Expr]) -> dict[Expr, Expr]:
    """Of a sum of some expressions, each times its slope, the derivative by each target; targets that it does
    not depend on are left out. The slopes count as constant.

    As torch has it: of `min` and `max` halves where both are equal, of `abs` 0 at 0; of what is rounded none.
    """
    order = dict.fromkeys(node for root in slopes for node in ir.nodes(root))
    active: set[Expr] = set()
    for node in order:
        if node in targets or any(arg in active for arg in node.args):
            active.add(node)
    found: dict[Expr, list[Expr]] = {}
    for root, slope in slopes.items():
        found.setdefault(root, []).append(slope)
    for node in reversed(order):
        if node not in found or node in targets:
            continue
        slope = ir.add(*found.pop(node))
        for arg, part in zip(node.args, _PARTS.get(node.op, _none)(node, slope), strict=False):
            if part is not None and arg in active and arg.type == "real":
                found.setdefault(arg, []).append(part)
    return {target: ir.add(*found[target]) for target in targets if target in found}


Parts = tuple[Expr | None, ...]


def _none(e: Expr, slope: Expr) -> Parts:
    return ()


def _where(e: Expr, slope: Expr) -> Parts:
    cond = e.args[0]
    return None, ir.where(cond, slope, ZERO), ir.where(cond, ZERO, slope)


def _div(e: Expr, slope: Expr) -> Parts:
    return ir.div(slope, e.args[1]), ir.neg(ir.div(ir.mul(slope, e), e.args[1]))


def _pow(e: Expr, slope: Expr) -> Parts:
    a, b = e.args
    y = ir.number(b)
    if y == 2:
        return ir.mul(slope, ir.mul(TWO, a)), None
    less = ir.mul(b, ir.power(a, ir.const(float(y - 1)) if y is not None else ir.add(b, ir.const(-1.0))))
    if y is None:
        # a power of 0 has no slope
        less = ir.where(ir.eq(b, ZERO), ZERO, less)
    # of 0 ** b nothing goes back to b
    rest = ir.where(ir.eq(a, ZERO), ZERO, ir.mul(e, ir.call("log", ir.where(ir.eq(a, ZERO), ONE, a))))
    return ir.mul(slope, less), ir.mul(slope, rest)


def _extreme(e: Expr, slope: Expr) -> Parts:
    a, b = e.args
    less, more = (b, a) if e.op == "max" else (a, b)
    half = ir.where(ir.eq(a, b), ir.mul(HALF, slope), ZERO)
    return ir.where(ir.lt(less, more), slope, half), ir.where(ir.lt(more, less), slope, half)


def _abs(e: Expr, slope: Expr) -> Parts:
    (a,) = e.args
    return (ir.where(ir.lt(ZERO, a), slope, ir.where(ir.lt(a, ZERO), ir.neg(slope), ZERO)),)


def _mod(e: Expr, slope: Expr) -> Parts:
    return slope, ir.neg(ir.mul(slope, ir.floordiv(*e.args)))


_PARTS: dict[str, Callable[[Expr, Expr], Parts]] = {
    "add": lambda e, slope: (slope,) * len(e.args),
    "mul": lambda e, slope: (ir.mul(slope, e.args[1]), ir.mul(slope, e.args[0])),
    "div": _div,
    "pow": _pow,
    "min": _extreme,
    "max": _extreme,
    "abs": _abs,
    "where": _where,
    "mod": _mod,
    "exp": lambda e, slope: (ir.mul(slope, e),),
    "log": lambda e, slope: (ir.div(slope, e.args[0]),),
    "log2": lambda e, slope: (ir.div(slope, ir.mul(ir.const(math.log(2.0)), e.args[0])),),
    "sqrt": lambda e, slope: (ir.div(ir.mul(HALF, slope), e),),
    "tanh": lambda e, slope: (ir.mul(slope, ir.sub(ONE, ir.mul(e, e))),),
    "sigmoid": lambda e, slope: (ir.mul(slope, ir.mul(e, ir.sub(ONE, e))),),
    "sin": lambda e, slope: (ir.mul(slope, ir.call("cos", e.args[0])),),
    "cos": lambda e, slope: (ir.neg(ir.mul(slope, ir.call("sin", e.args[0]))),),
}
