"""Boolean matrices as trees of boxes: exact products at lengths where no matrix can be written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail
from attndsl.expr import Expr, eq, nodes, var
from attndsl.tiles.abstract import Frame
from attndsl.tiles.tiling import FANOUT, Evaluator, descend

Bits = NDArray[Any]
Counts = NDArray[np.int64]
Box = tuple[int, int, int, int] | int

BOX = 64
"""Positions on a side of the smallest boxes."""
BYTES = BOX * BOX // 8
ALL = (1 << BOX * BOX) - 1
"""The bits of a full one, row after row."""
BOXES = 300_000
PRODUCTS = 1_000_000
"""Different boxes that one computation may make, and products of two that it may take: about 10 seconds."""


class Trees:
    """Matrices divided in four again and again; equal boxes are one number, and known products are reused.

    Box 0 is empty and box 1 full, of any size; any other is four boxes of half the size, by rows, or, of
    BOX positions on a side, an integer of BOX x BOX bits, by rows. Along a band all boxes on a diagonal are
    one, so that a product takes about as many steps as a window has different boxes.
    """

    def __init__(self, n: int, steps: Sequence[tuple[Expr, Mapping[str, Bits]]]) -> None:
        """Raises AttnError for masks of links, which are too scattered, and of more boxes than the limits."""
        self.n, self.size = n, BOX
        while self.size < n:
            self.size *= FANOUT
        self.boxes: list[Box] = [(0,) * 4, (1,) * 4]
        self.numbers: dict[Box, int] = {(0,) * 4: 0, (1,) * 4: 1, 0: 0, ALL: 1}
        self.products: dict[tuple[int, int], int] = {}
        self.unions: dict[tuple[int, int], int] = {}
        self.same = self.element(eq(var("q"), var("k")), {})
        self.steps = [self.element(*step) for step in steps]

    def element(self, mask: Expr, tables: Mapping[str, Bits]) -> int:
        kinds = {e.op for e in nodes(mask)}
        if kinds & {"random", "intable"}:
            raise fail("keys drawn or listed one by one are too scattered to be followed at this length")
        if "exists" in kinds:
            raise fail("a product of patterns that is no integer relation is searched pair by pair")
        if self.n == 0:
            return 0
        corner = np.zeros((1, 1, 1), np.int64)
        source = Evaluator(mask, Frame(self.n, self.n), tables)
        top, levels, contents = descend(source, corner, corner, self.size, BOX)
        known = [0, 1, *(self.number(int.from_bytes(bits.tobytes(), "little")) for bits in contents)]
        for children in reversed(levels):
            known = [0, 1, *(self.divided([[known[i] for i in row] for row in box]) for box in children)]
        return known[int(top.item())]

    def divided(self, boxes: list[list[int]]) -> int:
        """The box that consists of these."""
        if len(boxes) == 1:
            return boxes[0][0]
        half = len(boxes) // 2
        rows, columns = (boxes[:half], boxes[half:]), (slice(0, half), slice(half, None))
        a, b, c, d = (self.divided([line[cut] for line in part]) for part in rows for cut in columns)
        return self.number((a, b, c, d))

    def number(self, box: Box) -> int:
        found = self.numbers.setdefault(box, len(self.boxes))
        if found == len(self.boxes):
            self.boxes.append(box)
            if found > BOXES:
                raise fail(f"the pairs reached fall into more than {BOXES:,} different boxes")
        return found

    def bits(self, x: int) -> int:
        """Of a box of BOX positions."""
        return (0, ALL)[x] if x < 2 else cast(int, self.boxes[x])

    def union(self, x: int, y: int) -> int:
        if x == y or y == 0 or x == 1:
            return x
        if x == 0 or y == 1:
            return y
        if (x, y) in self.unions:
            return self.unions[x, y]
        a, b = self.boxes[x], self.boxes[y]
        if isinstance(a, int) or isinstance(b, int):
            found = self.number(self.bits(x) | self.bits(y))
        else:
            a0, a1, a2, a3 = a
            b0, b1, b2, b3 = b
            join = self.union
            found = self.number((join(a0, b0), join(a1, b1), join(a2, b2), join(a3, b3)))
        self.unions[x, y] = self.unions[y, x] = found
        return found

    def product(self, upper: int, lower: int) -> int:
        if upper == 0 or lower == 0:
            return 0
        if upper == lower == 1:
            return 1
        if (upper, lower) in self.products:
            return self.products[upper, lower]
        if len(self.products) > PRODUCTS:
            raise fail(f"the pairs reached take more than {PRODUCTS:,} products of boxes")
        a, b = self.boxes[upper], self.boxes[lower]
        if isinstance(a, int) or isinstance(b, int):
            found = self.number(bit_product(self.bits(upper), self.bits(lower)))
        else:
            a0, a1, a2, a3 = a
            b0, b1, b2, b3 = b
            join, times = self.union, self.product
            found = self.number(
                (
                    join(times(a0, b0), times(a1, b2)),
                    join(times(a0, b1), times(a1, b3)),
                    join(times(a2, b0), times(a3, b2)),
                    join(times(a2, b1), times(a3, b3)),
                )
            )
        self.products[upper, lower] = found
        return found

    def equal(self, a: int, b: int) -> bool:
        return a == b

    def counts(self, a: int) -> Counts:
        known: dict[tuple[int, int], NDArray[np.int32]] = {}

        def count(x: int, size: int) -> NDArray[np.int32]:
            if x < 2:
                return np.full(size, x * size, np.int32)
            if (x, size) not in known:
                box = self.boxes[x]
                if isinstance(box, int):
                    rows = np.frombuffer(box.to_bytes(BYTES, "little"), np.uint64)
                    known[x, size] = np.bitwise_count(rows).astype(np.int32)
                else:
                    halves = []
                    for left, right in (box[:2], box[2:]):
                        parts = [count(y, size // 2) for y in (left, right) if y]
                        halves.append(sum(parts[1:], parts[0]) if parts else np.zeros(size // 2, np.int32))
                    known[x, size] = np.concatenate(halves)
            return known[x, size]

        return count(a, self.size)[: self.n].astype(np.int64)

    def row(self, a: int, q: int) -> Bits:
        def line(x: int, size: int, q: int) -> Bits:
            if x < 2:
                return np.full(size, x == 1)
            box = self.boxes[x]
            if isinstance(box, int):
                data = np.frombuffer(box.to_bytes(BYTES, "little"), np.uint8)
                return np.unpackbits(data.reshape(BOX, -1)[q], bitorder="little").astype(bool)
            below, place = divmod(q, size // 2)
            return np.concatenate([line(y, size // 2, place) for y in (box[2 * below], box[2 * below + 1])])

        return line(a, self.size, q)[: self.n]


def bit_product(a: int, b: int) -> int:
    """The Boolean product of two matrices of BOX x BOX bits, by rows."""
    cells = np.unpackbits(np.frombuffer(a.to_bytes(BYTES, "little"), np.uint8), bitorder="little")
    rows = np.frombuffer(b.to_bytes(BYTES, "little"), np.uint64)
    found = np.bitwise_or.reduce(cells.reshape(BOX, BOX) * rows, axis=1)
    return int.from_bytes(found.tobytes(), "little")
