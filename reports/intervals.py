"""Intervals of observed shares: one share, and the difference of two."""

import math
from dataclasses import dataclass

from scipy.stats import binomtest


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with the bounds of its interval, all in the same unit."""

    estimate: float
    low: float
    high: float


def wilson_interval(n_correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Give a share and its Wilson score interval, which stays in [0, 1] even at 0 and at n.

    The interval says what other images of the same kind would give; it knows nothing of the
    choosing that happened before, so that of a search's best trial is still optimistic.

    Args:
        n_correct: Images classified rightly, 0 to n.
        n: Images looked at, at least 1.
        confidence: Share of such intervals that hold the true value.

    References:
        Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
    """
    bounds = binomtest(n_correct, n).proportion_ci(confidence, method="wilson")
    return Interval(n_correct / n, float(bounds.low), float(bounds.high))


def difference_interval(first: Interval, second: Interval) -> Interval:
    """Give the difference of two independent shares, first minus second, with its interval.

    Newcombe's hybrid score interval (his method 10), from the two Wilson intervals.

    References:
        Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I.
    """
    difference = first.estimate - second.estimate
    below = math.hypot(first.estimate - first.low, second.high - second.estimate)
    above = math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(difference, difference - below, difference + above)
