"""Straight-line code: one statement for each node, however often it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from attndsl import expr as ir
from attndsl.expr import Expr


@dataclass(frozen=True)
class Target:
    """How a language spells what there is.

    spell    by op, the text of a node from those of its arguments
    declare  the statement that gives a new variable the value of a node, from its name and text
    convert  the text of an integer as a real
    """

    spell: Mapping[str, Callable[[Expr, list[str]], str]]
    declare: Callable[[Expr, str, str], str]
    convert: Callable[[str], str]


@dataclass
class Code:
    """Statements so far, and the name of each node."""

    target: Target
    names: dict[Expr, str]
    lines: list[str] = field(default_factory=list)

    def name(self, root: Expr) -> str:
        """The variable that holds it, with the statements that it takes."""
        for node in ir.nodes(root):
            if node not in self.names:
                text = self.target.spell[node.op](node, self.arguments(node))
                if node.op == "const":
                    self.names[node] = text
                    continue
                self.names[node] = f"t{len(self.lines)}"
                self.lines.append(self.target.declare(node, self.names[node], text))
        return self.names[root]

    def real(self, root: Expr) -> str:
        """The same, of an integer as a real."""
        found = self.name(root)
        return self.target.convert(found) if root.type == "int" else found

    def arguments(self, node: Expr) -> list[str]:
        """Integers as reals, but for what is looked up, where one is a real or the result is."""
        joint = node.op != "read" and "real" in (node.type, *(arg.type for arg in node.args))
        return [
            self.target.convert(self.names[arg]) if joint and arg.type == "int" else self.names[arg]
            for arg in node.args
        ]
