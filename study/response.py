"""The surrogate of a search: the final score over settings, from whole and cut learning curves.

A trial that was stopped early is worth what the trials that went on gained from there, with the
spread of that gain as its noise; then a Gaussian process is fitted to all.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.optimize import fmin_l_bfgs_b
from scipy.stats import norm

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int_]

# Accuracy that a trial cut at its start may still gain or lose, where no other tells, and how many
# trials this belief is worth. Assumptions.
_GAIN_SD, _GAIN_WEIGHT = 0.1, 3.0
# Settings are told apart by at least this share of the best one's error, so that a first trial,
# or several equal ones, do not make the surrogate certain of the rest. Assumption.
_LEAST_SPREAD = 0.15
# The kernel is fitted to so many trials, and so many enter the prediction: a draw then costs 0.04
# s at 200 trials and 0.1 s at 3,000 (measured, one core).
_FITTED, _KEPT = 64, 200
_MOST_STEPS = 25
# Log-normal priors (mean and standard deviation of the logarithm): amplitude squared and length,
# on inputs in [0, 1]; noise squared. With few trials the likelihood alone is not to be trusted
# (Hvarfner et al. 2024, https://arxiv.org/abs/2402.02229, on the prior of the length).
# Assumptions.
_AMPLITUDE, _LENGTH, _NOISE = (0.0, 0.5), (-0.5, 0.8), (-3.5, 1.5)


@dataclass(frozen=True, slots=True)
class Curve:
    """What is known of a trial's score: accuracy, or what it is ranked by.

    Attributes:
        reached: Best score up to each step (epochs done), of the steps reported.
        final: Its value, if it went to its end; fractions in [0, 1].
        share: How much of its full length it ran, in (0, 1].
    """

    reached: dict[int, float]
    final: float | None
    share: float


def final_scores(curves: Sequence[Curve]) -> tuple[FloatArray, FloatArray]:
    """Give every trial a final accuracy, and the variance of what is not known of it.

    A cut trial, last seen at step s with accuracy v, gets the regression of the final accuracy on
    that at step s over the trials that went to their end; its slope is shrunk to 1 (parallel
    curves) and kept in [0, 1]. Selection makes the references better than the cut ones, so that a
    free slope would not be trusted far below them.

    Returns:
        Scores and variances, (n,) each.
    """
    scores, variances = np.empty(len(curves)), np.zeros(len(curves))
    whole = [curve for curve in curves if curve.final is not None]
    for i, curve in enumerate(curves):
        if curve.final is not None:
            scores[i] = curve.final
            continue
        step = max(curve.reached)
        known = [(c.reached[step], c.final) for c in whole if step in c.reached]
        scores[i], variances[i] = _extrapolated(curve, np.array(known, dtype=float).reshape(-1, 2))
    return scores, variances


def _extrapolated(curve: Curve, known: FloatArray) -> tuple[float, float]:
    value = max(curve.reached.values())
    prior = (_GAIN_SD * (1 - curve.share)) ** 2
    if not len(known):
        return value, prior
    at, final = known[:, 0], known[:, 1]
    centred = at - at.mean()
    shrink = _GAIN_WEIGHT * _GAIN_SD**2
    gains = final - at
    slope = 1 + (centred @ (gains - gains.mean())) / (centred @ centred + shrink)
    slope = float(np.clip(slope, 0.0, 1.0))
    estimate = final.mean() + slope * (value - at.mean())
    rest = final - final.mean() - slope * centred
    n = len(known)
    variance = (_GAIN_WEIGHT * prior + rest @ rest) / (_GAIN_WEIGHT + n) * (1 + 1 / n)
    return float(np.clip(estimate, value, 1.0)), float(variance)


def half_ranked(scores: FloatArray) -> tuple[FloatArray, float, float]:
    """Pull in scores below the median, so that hopeless settings do not decide the scale.

    Scores from the median up are centred and scaled; those below get the normal quantile of their
    rank, so they keep their order and lose their distances.

    Returns:
        Warped scores, (n,); the median and the scale that undo it above the median.

    References:
        Song et al. 2024, https://arxiv.org/abs/2408.11527 (Vizier's half-rank warping).
    """
    middle = float(np.median(scores))
    good = scores[scores >= middle] - middle
    best = float(scores.max())
    spread = float(np.sqrt(np.mean(good**2))) if len(good) else 0.0
    scale = max(spread, _LEAST_SPREAD * (1 - best), 1e-3)
    warped = (scores - middle) / scale
    low = scores < middle
    ranks = np.searchsorted(np.unique(scores), scores[low])
    quantiles = norm.ppf((ranks + 0.5) / len(np.unique(scores)))
    warped[low] = np.minimum(0.0, np.maximum(warped[low], quantiles))
    return warped, middle, scale


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What is believed of n settings, in warped scores.

    Attributes:
        mean: Expected score, (n,).
        variance: Of the noise-free score, (n,).
        shared: Covariance with the setting that was asked for beside them, (n,).
    """

    mean: FloatArray
    variance: FloatArray
    shared: FloatArray


class Response:
    """A Gaussian process (Matern 5/2, a length for each column) given some trials.

    Args:
        inputs: Settings as `Axes.inputs` gives them, (n, columns).
        scores: Final accuracies, known or estimated, (n,).
        variances: Of each score: the binomial's, and what the rest of a cut curve adds, (n,).
        order: Rows by importance: the first ones fit the kernel.

    Attributes:
        scale: Accuracy that a unit of the predictions above the median stands for.
    """

    def __init__(
        self,
        inputs: FloatArray,
        scores: FloatArray,
        variances: FloatArray,
        order: NDArray[np.int_],
    ) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        warped, self.middle, self.scale = half_ranked(scores)
        alpha = variances / self.scale**2 + 1e-6
        n_columns = inputs.shape[1]
        self._prior = np.array([_AMPLITUDE, *[_LENGTH] * n_columns, _NOISE])
        fresh = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(
            np.full(n_columns, np.exp(_LENGTH[0])), (0.02, 50.0), nu=2.5
        ) + WhiteKernel(float(np.exp(_NOISE[0])), (1e-5, 4.0))
        some, kept = order[:_FITTED], order[:_KEPT]
        process = GaussianProcessRegressor(fresh, alpha=alpha[some], optimizer=self._most_likely)
        # The mean far from all trials: what a middling trial had.
        with warnings.catch_warnings():
            # A parameter at its bound, such as noise where there is none, is nothing to tell.
            warnings.simplefilter("ignore", ConvergenceWarning)
            kernel = process.fit(inputs[some], warped[some]).kernel_
        if len(kept) > len(some):
            process = GaussianProcessRegressor(kernel, alpha=alpha[kept], optimizer=None)
            process.fit(inputs[kept], warped[kept])
        self._process = process
        self._white = float(np.exp(kernel.theta[-1]))

    def _most_likely(
        self, likelihood: Callable[..., Any], start: FloatArray, bounds: FloatArray
    ) -> tuple[FloatArray, float]:
        """Maximise likelihood times prior over the kernel's logarithms."""
        mean, sd = self._prior.T

        def loss(theta: Any) -> tuple[float, FloatArray]:
            value, gradient = likelihood(theta, eval_gradient=True)
            z = (theta - mean) / sd
            return float(value) + 0.5 * float(z @ z), np.asarray(gradient) + z / sd

        theta, value, _ = fmin_l_bfgs_b(loss, start, bounds=bounds.tolist(), maxiter=_MOST_STEPS)
        return np.asarray(theta), float(value)

    def predict(self, inputs: FloatArray, at: FloatArray | None = None) -> Prediction:
        """Predict the noise-free score of settings.

        Args:
            inputs: Settings, (n, columns).
            at: One setting more, (columns,): what a trial of each says of the difference to it.
        """
        process = self._process
        kernel = process.kernel_.k1  # without the noise
        cross = kernel(inputs, process.X_train_)  # (n, trials)
        mean = cross @ process.alpha_
        solved = solve_triangular(process.L_, cross.T, lower=True)  # (trials, n)
        variance = np.maximum(kernel.diag(inputs) - np.einsum("ij,ij->j", solved, solved), 1e-10)
        shared = np.zeros_like(mean)
        if at is not None:
            other = kernel(at[None], process.X_train_)
            solved_at = solve_triangular(process.L_, other.T, lower=True)[:, 0]
            shared = kernel(inputs, at[None])[:, 0] - solved_at @ solved
        return Prediction(mean, variance, shared)

    def noise(self, mean: FloatArray, n_val: int | None) -> FloatArray:
        """Return the variance of a new trial's score about its mean, warped, (n,)."""
        p = np.clip(self.middle + self.scale * mean, 0.0, 1.0)
        binomial = p * (1 - p) / n_val / self.scale**2 if n_val else np.zeros_like(mean)
        return np.asarray(binomial + self._white + 1e-6)


def by_importance(scores: FloatArray, rng: Generator) -> IntArray:
    """Order trials: best, latest and any others in turn, each once."""
    n = len(scores)
    by_score = np.argsort(-scores, kind="stable")
    ways = np.stack([by_score, np.arange(n)[::-1], rng.permutation(n)], axis=1).ravel()
    _, first = np.unique(ways, return_index=True)
    return ways[np.sort(first)]


def log_improvement(z: FloatArray) -> FloatArray:
    """Return log(phi(z) + z Phi(z)), which for z far below 0 no difference of floats gives.

    References:
        Ament et al. 2023, https://arxiv.org/abs/2310.20708 (LogEI).
    """
    near = np.maximum(z, -5.0)
    direct = np.log(norm.pdf(near) + near * norm.cdf(near))
    # phi(z) / z^2 to first order of the tail.
    far = norm.logpdf(z) - 2 * np.log(np.maximum(-z, 1.0)) + np.log1p(-3 / np.maximum(z**2, 25.0))
    return np.asarray(np.where(z > -5.0, direct, far))
