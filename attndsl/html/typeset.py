"""Formulas as presentation MathML, which browsers set themselves."""

from __future__ import annotations

import functools
import re
from typing import Any

GROWTH = re.compile(r"O\((.*)\)")
GROWN = '<mi>O</mi><mo stretchy="false">(</mo>{}<mo stretchy="false">)</mo>'


@functools.cache
def mathml(formula: str) -> str:
    """A formula that `sympy.sympify` reads, as a <math> element; `O(...)` stays around its argument."""
    from sympy import Mod, sympify, true
    from sympy.printing.mathml import MathMLPresentationPrinter

    class Printer(MathMLPresentationPrinter):  # type: ignore[misc]
        """Thousands are marked off; residues and cases are written as people do."""

        def element(self, tag: str, *children: Any, **attributes: str) -> Any:
            made = self.dom.createElement(tag)
            for child in children:
                made.appendChild(self.dom.createTextNode(child) if isinstance(child, str) else child)
            for name, value in attributes.items():
                made.setAttribute(name, value)
            return made

        def row(self, *children: Any) -> Any:
            """Text is an operator, the rest is printed."""
            printed = [self.element("mo", c) if isinstance(c, str) else self._print(c) for c in children]
            return self.element("mrow", *printed)

        def _print_Integer(self, expr: Any) -> Any:  # noqa: N802
            return self.element("mn", f"{int(expr):,}")

        def _print_Mod(self, expr: Any) -> Any:  # noqa: N802
            number, modulus = expr.args
            return self.row("(", number, "mod", modulus, ")")

        def parenthesize(self, item: Any, level: int, strict: bool = False) -> Any:
            return self._print(item) if isinstance(item, Mod) else super().parenthesize(item, level, strict)

        def _print_Piecewise(self, expr: Any) -> Any:  # noqa: N802
            rows = []
            for value, where in expr.args:
                condition = ["otherwise"] if where is true else ["if\u00a0", self._print(where)]
                said = [self.element("mtext", condition[0]), *condition[1:]]
                rows.append(
                    self.element(
                        "mtr", *(self.element("mtd", *cell) for cell in ([self._print(value)], said))
                    )
                )
            return self.element("mrow", self.element("mo", "{"), self.element("mtable", *rows))

    growth = GROWTH.fullmatch(formula)
    expression = sympify(growth[1], evaluate=False) if growth else sympify(formula)
    body = Printer().doprint(expression).replace("<mo><", "<mo>&lt;").replace("<mo>-<", "<mo>−<")
    return f"<math>{GROWN.format(body) if growth else body}</math>"
