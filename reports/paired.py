"""Statistics of paired differences: one number a replicate, level minus baseline."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reports.intervals import Interval

Array = NDArray[np.float64]

_MOST_NEEDED = 1000
_SMALL = 1e-12


@dataclass(frozen=True, slots=True)
class Spread:
    """Size and scatter of paired differences.

    Attributes:
        n: Pairs.
        mean: Mean difference.
        sd: Standard deviation of the differences (n - 1); NaN for one pair.
    """

    n: int
    mean: float
    sd: float

    @property
    def standard_error(self) -> float:
        """Return the standard error of the mean."""
        return self.sd / math.sqrt(self.n)


def spread(differences: Array, resolution: float = 0.0) -> Spread:
    """Measure paired differences.

    Args:
        differences: Level minus baseline, shape (n,), n >= 1.
        resolution: Step in which the metric moves (one image's share). The scatter is at least
            that of rounding, resolution / sqrt(12): an accuracy on 80 images cannot show less.
    """
    n = len(differences)
    mean = float(np.mean(differences))
    sd = float(np.std(differences, ddof=1)) if n > 1 else math.nan
    if n > 1:
        sd = max(sd if sd > _SMALL else 0.0, resolution / math.sqrt(12))
    return Spread(n, mean, sd)


def t_interval(found: Spread, confidence: float = 0.95) -> Interval:
    """Give the mean difference with Student's interval; NaN bounds for one pair."""
    if found.n < 2:
        return Interval(found.mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.5 + confidence / 2, found.n - 1)) * found.standard_error
    return Interval(found.mean, found.mean - half, found.mean + half)


def paired_t(found: Spread) -> float:
    """Return the two-sided p value of the paired t-test; NaN for one pair, 1 for all zeros."""
    if found.n < 2:
        return math.nan
    if found.sd == 0:
        return 1.0 if abs(found.mean) < _SMALL else 0.0
    return float(2 * stats.t.sf(abs(found.mean) / found.standard_error, found.n - 1))


def equivalence(found: Spread, margin: float) -> float:
    """Return the p value of two one-sided t-tests that the difference lies within +-margin.

    Args:
        found: The paired differences.
        margin: Half-width of what counts as equal, in their unit.

    References:
        Schuirmann 1987, https://doi.org/10.1007/BF01068419.
    """
    if found.n < 2:
        return math.nan
    if found.sd == 0:
        return 0.0 if abs(found.mean) < margin else 1.0
    df, se = found.n - 1, found.standard_error
    below = stats.t.sf((found.mean + margin) / se, df)
    above = stats.t.cdf((found.mean - margin) / se, df)
    return float(max(below, above))


def power(effect: float, sd: float, n: int, alpha: float) -> float:
    """Return the power of the two-sided paired t-test.

    Args:
        effect: True mean difference.
        sd: Standard deviation of the differences, > 0.
        n: Pairs, >= 2.
        alpha: Level of the test.
    """
    df, shift = n - 1, effect / sd * math.sqrt(n)
    critical = stats.t.ppf(1 - alpha / 2, df)
    # The lower tail by its mirror image: scipy's nct.cdf is NaN far out, its sf nowhere (tested).
    return float(stats.nct.sf(critical, df, shift) + stats.nct.sf(critical, df, -shift))


def equivalence_power(effect: float, sd: float, n: int, alpha: float, margin: float) -> float:
    """Return the power of two one-sided t-tests (a close lower bound by Bonferroni)."""
    df, root = n - 1, math.sqrt(n) / sd
    critical = stats.t.ppf(1 - alpha, df)
    above = stats.nct.sf(critical, df, (effect + margin) * root)
    below = stats.nct.sf(critical, df, (margin - effect) * root)
    return max(0.0, float(above + below - 1))


def replicates_needed(
    found: Spread, alpha: float, margin: float, wanted: float = 0.8
) -> int | None:
    """Return about how many pairs would settle an open question.

    The least n at which, were the observed mean and scatter the true ones, either the t-test would
    find a difference or the equivalence test would exclude one, with the wanted power. It is as
    uncertain as the observed scatter: a plan, not a promise.

    Args:
        found: The paired differences so far.
        alpha: Level of a single test after correction for many.
        margin: Half-width of what counts as equal.
        wanted: Power.

    Returns:
        None where more than 1,000 pairs were needed, or nothing can be said from one pair.
    """
    if found.n < 2 or not found.sd > 0:
        return None

    def is_enough(n: int) -> bool:
        return (
            power(found.mean, found.sd, n, alpha) >= wanted
            or equivalence_power(found.mean, found.sd, n, alpha, margin) >= wanted
        )

    low, high = 1, max(2, found.n)
    while not is_enough(high):
        low, high = high, high * 2
        if low > _MOST_NEEDED:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high if high <= _MOST_NEEDED else None
