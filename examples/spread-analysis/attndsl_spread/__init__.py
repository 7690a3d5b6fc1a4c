"""spread: how many keys a query sees, over all queries, heads and batch rows."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attndsl.analysis.part import Part, Subject
from attndsl.analysis.text import line
from attndsl.errors import fail


@dataclass(frozen=True)
class Spread:
    fewest: int
    median: float
    most: int


def spread(subject: Subject) -> Spread:
    keys = subject.block_mask.row_counts()
    if not keys.size:
        raise fail("there is no query")
    return Spread(int(keys.min()), float(np.median(keys)), int(keys.max()))


def text(found: Spread) -> Iterator[str]:
    yield line(
        "spread", f"a query sees {found.fewest:,} to {found.most:,} keys, {found.median:,g} in the middle"
    )


part = Part(spread, text, title="Keys of a query")
