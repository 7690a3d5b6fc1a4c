"""An attention as text that another process reads back: what an exported program carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl import expr as ir
from attndsl.attention import Approx, Attention, HeadGroup, Norm, Relation, Summand
from attndsl.errors import fail
from attndsl.expr import Argument, Drawn, Expr, Given, IntSet, Known, Learned, Selected, Table
from attndsl.streams import Numbers

FORMAT = 5
LONG = 64
"""Intervals or entries of a constant from which it stands outside of the text, which keeps its digest."""

Constant = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Portable:
    """`text` is JSON, equal for equal attentions; `constants` are what is long in it: the intervals of a set,
    int64 [m, 2], and the integers of a list, int64 [m]."""

    text: str
    constants: tuple[Constant, ...]


def write(attention: Attention, **beside: Any) -> Portable:
    """The attention, which has no streams, and numbers, texts or dicts `beside` it, which are read back as
    they are."""
    writer = _Writer()
    body = {
        "attndsl": FORMAT,
        **beside,
        **writer.attention(attention),
        "tables": writer.written,
        "nodes": writer.nodes,
    }
    return Portable(json.dumps(body, separators=(",", ":")), tuple(writer.constants))


def read(text: str, constants: Sequence[Any]) -> tuple[Attention, dict[str, Any]]:
    """The attention and what stood beside it; `constants` are arrays or tensors, others may follow them.

    Raises AttnError for a text of another format.
    """
    body = json.loads(text)
    if body["attndsl"] != FORMAT:
        raise fail(
            f"this program was saved in format {body['attndsl']} of attndsl, and this version reads {FORMAT}",
            help="save it again with this version",
        )
    nodes: list[Expr] = []
    made: dict[int, Table] = {}

    def table(place: int) -> Table:
        # a choice is made of expressions, which stand before those that read it
        if place not in made:
            made[place] = _table(body["tables"][place], constants, nodes, table)
        return made[place]

    for op, kind, value, *args in body["nodes"]:
        arguments = tuple(nodes[i] for i in args)
        nodes.append(ir.make(op, arguments, _value(value, table, constants), kind))

    def node(place: int | None) -> Expr | None:
        return None if place is None else nodes[place]

    def attention(body: dict[str, Any]) -> Attention:
        groups = tuple(
            HeadGroup(
                Relation(nodes[g["mask"]], node(g["count"])),
                nodes[g["score"]],
                node(g["decay"]),
                Norm(g["norm"], node(g["sink"])),
                nodes[g["heads"]],
            )
            for g in body["groups"]
        )
        numbered = body["numbered"]
        return Attention(
            body["name"],
            groups,
            tuple(map(table, body["inputs"])),
            tuple(map(table, body["learned"])),
            node(body["offset"]),
            body["least_heads"],
            None if body["approx"] is None else Approx(**body["approx"]),
            tuple(Summand(attention(part), nodes[part["gate"]]) for part in body["parts"]),
            numbered=numbered and Numbers(*(nodes[place] for place in numbered)),
        )

    return attention(body), body


class _Writer:
    """Nodes by place, arguments before the nodes that use them."""

    def __init__(self) -> None:
        self.nodes: list[list[Any]] = []
        self.places: dict[Expr, int] = {}
        self.tables: list[Table] = []
        self.written: list[dict[str, Any]] = []
        self.constants: list[Constant] = []

    def attention(self, attention: Attention) -> dict[str, Any]:
        groups = [
            {
                "mask": self.place(group.relation.mask),
                "count": self.place(group.relation.count),
                "score": self.place(group.score),
                "decay": self.place(group.decay),
                "norm": group.norm.kind,
                "sink": self.place(group.norm.sink),
                "heads": self.place(group.heads),
            }
            for group in attention.groups
        ]
        numbered = attention.numbered
        return {
            "name": attention.name,
            "inputs": [self.table(table) for table in attention.inputs],
            "learned": [self.table(table) for table in attention.learned],
            "offset": self.place(attention.offset),
            "least_heads": attention.least_heads,
            "approx": None if attention.approx is None else vars(attention.approx),
            "numbered": numbered and [self.place(numbered.first), self.place(numbered.count)],
            "groups": groups,
            "parts": [
                {**self.attention(part.attention), "gate": self.place(part.gate)} for part in attention.parts
            ],
        }

    def place(self, root: Expr | None) -> int | None:
        if root is None:
            return None
        for node in ir.nodes(root):
            if node not in self.places:
                written = [
                    node.op,
                    node.type,
                    self.value(node.value),
                    *(self.places[arg] for arg in node.args),
                ]
                self.places[node] = len(self.nodes)
                self.nodes.append(written)
        return self.places[root]

    def table(self, table: Table) -> int:
        """Its place. Names are unique in an attention, serials are not the same in every process."""
        if isinstance(table.origin, Learned):
            table = replace(table, origin=replace(table.origin, serial=0))
        if table not in self.tables:
            written = self.fields(table)
            self.tables.append(table)
            self.written.append(written)
        return self.tables.index(table)

    def value(self, value: object) -> Any:
        match value:
            case Table():
                return {"table": self.table(value)}
            case IntSet(intervals) if len(intervals) < LONG:
                return {"set": intervals}
            case IntSet(intervals):
                return self.long(np.array(intervals, np.int64))
            case tuple():
                return {"draw": value}
        return value

    def argument(self, value: Argument) -> Any:
        match value:
            case Expr():
                return {"node": self.place(value)}
            case Table():
                return {"table": self.table(value)}
        return value

    def long(self, constant: Constant) -> dict[str, Any]:
        self.constants.append(constant)
        return {
            "long": len(self.constants) - 1,
            "digest": hashlib.sha256(constant.tobytes()).hexdigest(),
        }

    def fields(self, table: Table) -> dict[str, Any]:
        written = {field.name: getattr(table, field.name) for field in fields(table)}
        match table.origin:
            case Learned(init):
                return written | {"origin": {"learned": init}}
            case Drawn(kind, seed):
                return written | {"origin": {"drawn": [kind, seed]}}
            case Known(entries) if table.dtype == "int" and len(entries) >= LONG:
                return written | {"origin": self.long(table.origin.array)}
            case Known(entries):
                return written | {"origin": {"known": entries}}
            case Selected(selection, arguments, of, rows, unit):
                said = [[name, self.argument(value)] for name, value in arguments]
                return written | {"origin": {"selection": [selection, said, self.place(of), rows, unit]}}
        assert isinstance(table.origin, Given)
        return written | {"origin": "given"}


def _table(
    fields: dict[str, Any], constants: Sequence[Any], nodes: Sequence[Expr], table: Callable[[int], Table]
) -> Table:
    origin: Given | Learned | Drawn | Known | Selected = Given()
    match fields["origin"]:
        case {"learned": init}:
            origin = Learned(init)
        case {"drawn": [kind, seed]}:
            origin = Drawn(kind, seed)
        case {"long": place}:
            origin = Known(tuple(constants[place].tolist()))
        case {"known": entries}:
            origin = Known(tuple(entries))
        case {"selection": [selection, said, of, rows, unit]}:
            arguments = tuple((name, _argument(value, nodes, table)) for name, value in said)
            origin = Selected(selection, arguments, None if of is None else nodes[of], rows, unit)
    return Table(**{**fields, "dims": tuple(fields["dims"]), "origin": origin})


def _argument(value: Any, nodes: Sequence[Expr], table: Callable[[int], Table]) -> Argument:
    match value:
        case {"node": place}:
            return nodes[int(place)]
        case {"table": place}:
            return table(place)
    said: Argument = value
    return said


def _value(value: Any, table: Callable[[int], Table], constants: Sequence[Any]) -> Any:
    match value:
        case {"table": place}:
            return table(place)
        case {"set": intervals}:
            return IntSet(tuple(map(tuple, intervals)))
        case {"long": place}:
            return IntSet(tuple(map(tuple, constants[place].tolist())))
        case {"draw": parts}:
            return tuple(parts)
    return value
