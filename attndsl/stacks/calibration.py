"""From losses on held-out examples to a threshold of exits whose loss is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attndsl.errors import fail
from attndsl.keywords import by_name


@dataclass(frozen=True)
class Calibration:
    """What was found.

    threshold: the last that passed; None where the first did not.
    p:         of each threshold, how likely means as low as this are, at most, where its loss is above the
               one allowed.
    means:     of each threshold, over the examples.
    """

    threshold: float | None
    p: tuple[float, ...]
    means: tuple[float, ...]


@by_name
def calibrate(losses: Any, thresholds: Sequence[float], *, risk: float, error: float = 0.05) -> Calibration:
    """The last of `thresholds` whose expected loss is at most `risk`, but for a chance of `error` over draws
    of the examples: they are tested in their order, and the first that fails ends it, so that no correction
    for many tests is due (fixed sequence testing; Angelopoulos et al. 2021, Learn then Test; Schuster et al.
    2022, section 4).

    losses      [examples, thresholds], each from 0 to 1, of examples that are independent and alike
    thresholds  in the order of tests, the most cautious first, chosen without a look at the losses
    risk        the expected loss that is allowed, between 0 and 1
    error       the chance that it is exceeded all the same, between 0 and 1

    Raises AttnError for what is none of these.
    """
    of = np.asarray(losses, dtype=np.float64)
    if of.ndim != 2 or not len(of) or of.shape[1] != len(thresholds):
        raise fail(f"losses are [examples, {len(thresholds)}], not {[*of.shape]}")
    if not ((of >= 0) & (of <= 1)).all():
        raise fail("losses are from 0 to 1", help="divide them by the largest that there may be")
    for name, chance in (("risk", risk), ("error", error)):
        if not 0 < chance < 1:
            raise fail(f"`{name}` is {chance}, and must be between 0 and 1")
    means = of.mean(0)
    p = hoeffding_bentkus(means, len(of), risk)
    failed = np.flatnonzero(p > error)
    passed = int(failed[0]) if len(failed) else len(p)
    found = float(thresholds[passed - 1]) if passed else None
    return Calibration(found, tuple(p.tolist()), tuple(means.tolist()))


def hoeffding_bentkus(means: NDArray[np.float64], count: int, risk: float) -> NDArray[np.float64]:
    """How likely the mean of `count` losses from 0 to 1 is as low as each of `means`, at most, where they are
    expected to be above `risk`: the lesser of two bounds (Bates et al. 2021, section 3.1)."""
    from scipy.special import rel_entr
    from scipy.stats import binom

    below = np.minimum(means, risk)
    hoeffding = np.exp(-count * (rel_entr(below, risk) + rel_entr(1 - below, 1 - risk)))
    # a mean of k / count may be a little more in floating point
    bentkus = np.e * binom.cdf(np.ceil(np.round(count * means, 9)), count, risk)
    lesser: NDArray[np.float64] = np.minimum(np.minimum(hoeffding, bentkus), 1.0)
    return lesser
