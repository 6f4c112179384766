"""Inference on paired differences: over seeds and images, or over folds of a cross-validation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from reports.intervals import Interval

Array = NDArray[np.float64]

_MOST_REPLICATES = 1000
_SMALL = 1e-12
# Added to variances, so that differences that are all equal have an interval of no width.
_TINY = 1e-30
_POWER = 0.8
ENOUGH_FOLDS = 4
"""From so many folds on, their scatter shows what is not that of the images. Simulated: with
three, error rates reach 7.6 % where 5 were asked."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the variance of a mean difference; at n replicates `shrinking / n + lasting`.

    Attributes:
        shrinking: What more replicates make smaller, times n.
        lasting: What stays however many there are.
        df: Degrees of freedom; None for n - 1.
    """

    shrinking: float
    lasting: float
    df: int | None = None


@dataclass(frozen=True, slots=True)
class Inference:
    """A mean difference and how uncertain it is.

    Attributes:
        n: Replicates.
        n_images: Different images.
        estimate: Mean difference, a fraction.
        parts: Of its variance; none where it is not known.
    """

    n: int
    n_images: int
    estimate: float
    parts: tuple[Part, ...] = ()

    def scatter(self, n: NDArray[np.int64] | int | None = None) -> tuple[Any, Any]:
        """Return the standard error and Satterthwaite's degrees of freedom, at n replicates.

        NaN for both where the variance is not known.

        References:
            Satterthwaite 1946, https://doi.org/10.2307/3002019.
        """
        n = self.n if n is None else n
        if not self.parts:
            return math.nan, math.nan
        variances = [part.shrinking / n + part.lasting for part in self.parts]
        own = [n - 1 if part.df is None else part.df for part in self.parts]
        total = sum(variances) + _TINY
        df = total**2 / (sum(v**2 / d for v, d in zip(variances, own, strict=True)) + _TINY**2)
        return np.sqrt(total), df

    def interval(self, confidence: float = 0.95) -> Interval:
        """Give the difference with Student's interval; NaN bounds where nothing is known."""
        error, df = self.scatter()
        half = float(stats.t.ppf(0.5 + confidence / 2, df)) * error
        return Interval(self.estimate, self.estimate - half, self.estimate + half)

    @property
    def p(self) -> float:
        """Return the two-sided p value of no difference; NaN where nothing is known."""
        return float(np.minimum(1.0, 2 * self._tail(abs(self.estimate))))

    def equivalence_p(self, margin: float) -> float:
        """Return the p value of two one-sided tests that the difference is within +-margin.

        References:
            Schuirmann 1987, https://doi.org/10.1007/BF01068419.
        """
        return self._tail(margin - abs(self.estimate))

    def _tail(self, distance: float) -> float:
        """Return the probability of an error of this size in one direction."""
        error, df = self.scatter()
        if error < _SMALL:
            return 0.5 if abs(distance) < _SMALL else float(distance < 0)
        return float(stats.t.sf(distance / error, df))


def crossed(differences: Array, *, has_seed: bool = True) -> Inference:
    """Judge differences of which every seed has one for every image: both are samples.

    The variance of the mean is (MS of seeds + MS of images - MS of the rest) / (R N), where a
    negative component counts as zero. So the interval holds for other seeds and other images of
    the same kind; the training images are fixed.

    Args:
        differences: Of correctness (a contrast of 0 and 1), shape (R, N).
        has_seed: Whether replicates differ by chance at all; where they do not, as with solved
            heads, images alone decide, and one replicate is enough.

    References:
        Baayen, Davidson & Bates 2008, https://doi.org/10.1016/j.jml.2007.12.005 (crossed effects).
    """
    n_seeds, n_images = differences.shape
    mean = float(differences.mean())
    if n_images < 2 or (has_seed and n_seeds < 2):
        return Inference(n_seeds, n_images, mean)
    by_image = differences.mean(axis=0)  # (N,)
    if not has_seed:
        part = Part(0.0, float(by_image.var(ddof=1)) / n_images, n_images - 1)
        return Inference(n_seeds, n_images, mean, (part,))
    by_seed = differences.mean(axis=1)  # (R,)
    rest = differences - by_image - by_seed[:, None] + mean
    ms_rest = float((rest**2).sum()) / ((n_seeds - 1) * (n_images - 1))
    ms_seeds = max(n_images * float(by_seed.var(ddof=1)), ms_rest)
    ms_images = max(n_seeds * float(by_image.var(ddof=1)), ms_rest)
    seeds = Part(ms_seeds / n_images, 0.0)
    images = Part(0.0, (ms_images - ms_rest) / (n_seeds * n_images), n_images - 1)
    return Inference(n_seeds, n_images, mean, (seeds, images))


def resampled(folds: Sequence[Array], n_folds: int) -> Inference:
    """Judge differences of the folds of a (repeated) cross-validation.

    Their variance is (1 / R + 1 / (K - 1)) times that of a fold's mean, since training sets
    overlap: that of its images, known from all of them, and what folds scatter beyond that. So
    the interval holds for other seeds, other training images and other validation images.

    Args:
        folds: Differences of correctness, image by image, of each fold; R of them, K times the
            repetitions.
        n_folds: K.

    References:
        Nadeau & Bengio 2003, https://doi.org/10.1023/A:1024068626366 (corrected resampled t).
    """
    n = len(folds)
    size = sum(map(len, folds)) / n
    n_images = round(size * min(n, n_folds))
    means = np.array([fold.mean() for fold in folds])
    mean = float(means.mean())
    if n < 2 or size < 2:
        return Inference(n, n_images, mean)
    of_images = 0.0
    if n >= ENOUGH_FOLDS:
        of_images = float(np.mean([fold.var(ddof=1) for fold in folds])) / size
    beyond = max(0.0, float(means.var(ddof=1)) - of_images)
    images = Part(of_images, of_images / (n_folds - 1), n_images - min(n, n_folds))
    return Inference(n, n_images, mean, (Part(beyond, beyond / (n_folds - 1)), images))


def seeds_only_p(means: Array, resolution: float) -> float:
    """Return the two-sided p value of the t-test over seeds, the images taken as they are.

    Args:
        means: Mean difference of each seed, shape (R,).
        resolution: One image's share: the scatter is at least that of rounding to it.
    """
    if len(means) < 2:
        return math.nan
    floor = resolution / math.sqrt(12)
    sd = max(float(means.std(ddof=1)), floor)
    t = abs(float(means.mean())) / (sd / math.sqrt(len(means)))
    return float(2 * stats.t.sf(t, len(means) - 1))


def holm(values: Sequence[float]) -> list[float]:
    """Correct p values by Holm's method; NaN (no test) stays and is not counted.

    References:
        Holm 1979, https://www.jstor.org/stable/4615733.
    """
    p = np.array(values, dtype=np.float64)
    known = np.argsort(p)[: np.isfinite(p).sum()]  # NaN sorts last
    steps = p[known] * np.arange(len(known), 0, -1)
    p[known] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in p]


def replicates_needed(inference: Inference, alpha: float, margin: float) -> int | None:
    """Return about how many replicates would settle an open question, the scatter as observed.

    That is where the test finds the observed difference, or finds it to be within the margin, with
    a power of 80 %. It is as uncertain as what was observed: a plan, not a promise.

    Returns:
        None where no number up to 1,000 would, as where the images alone leave more than that.
    """
    if not any(part.shrinking for part in inference.parts):
        return None
    n = np.unique(np.geomspace(2, _MOST_REPLICATES, 100).astype(np.int64))
    error, df = inference.scatter(n)
    effect = abs(inference.estimate)
    quantile = stats.t.ppf
    shows = error * (quantile(1 - alpha / 2, df) + quantile(_POWER, df)) <= effect
    excludes = error * (quantile(1 - alpha, df) + quantile((1 + _POWER) / 2, df))
    enough = np.flatnonzero(shows | (excludes <= margin - effect))
    return max(int(n[enough[0]]), inference.n + 1) if len(enough) else None


def images_needed(inference: Inference, alpha: float) -> int:
    """Return about how many images would show the observed difference with as many replicates.

    All of the variance is taken to fall with the number of images, which scatter between seeds
    does only in part: a lower bound.
    """
    quantiles = float(stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(_POWER))
    error, _ = inference.scatter()
    ratio = float(quantiles * error / abs(inference.estimate)) ** 2
    return math.ceil(ratio * inference.n_images)


def detectable(inference: Inference, alpha: float) -> float:
    """Return the difference that is found with a power of 80 % where the variance is this."""
    error, df = inference.scatter()
    return float(error * (stats.t.ppf(1 - alpha / 2, df) + stats.t.ppf(_POWER, df)))
