"""How much each of several classifiers counts in the mean of their probabilities."""

from dataclasses import dataclass

import numpy as np

from core.metrics import Evaluation, FloatArray, IntArray, tempered

# Images that each member is taken to have explained before any was seen. Near-equal members are
# so averaged, since their order by out-of-fold loss is mostly chance (right in 35 to 45 % of
# cases measured), and only a clearly worse one loses its share. Assumption.
_PRIOR_IMAGES = 20.0
_LEAST_WEIGHT = 0.05  # a member that counts less is not worth its time. Assumption.
_STEPS = 200


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean of classifiers' probabilities.

    Attributes:
        weights: (M,), which add up to 1; some may be 0.
        temperatures: What each one's logits are divided by before, (M,).
    """

    weights: FloatArray
    temperatures: FloatArray

    def log_probs(self, log_probs: FloatArray) -> FloatArray:
        """Return the logarithm of the mean, (N, K), of what each says, (M, N, K)."""
        cooled = tempered(log_probs, self.temperatures[:, None, None])
        return mean_log_probs(self.weights, cooled)


def fit_mean(labels: IntArray, log_probs: FloatArray) -> Mean:
    """Choose temperatures one by one, and then the weights, for the least cross-entropy."""
    found = np.array([Evaluation(labels, own).temperature for own in log_probs], dtype=np.float32)
    return Mean(mean_weights(labels, tempered(log_probs, found[:, None, None])), found)


def mean_weights(labels: IntArray, log_probs: FloatArray) -> FloatArray:
    """Choose weights of members by the cross-entropy of their weighted mean probabilities.

    Args:
        labels: True classes, (N,).
        log_probs: What each member says of images that it was not fitted on, (M, N, K).

    Returns:
        Weights, (M,), which add up to 1; some may be 0.
    """
    given = np.exp(log_probs[:, np.arange(len(labels)), labels].astype(np.float64))  # (M, N)
    weights = np.full(len(given), 1 / len(given))
    for _ in range(_STEPS):  # expectation maximisation, which never lowers the likelihood
        shares = weights[:, None] * given + 1e-12
        counts = (shares / shares.sum(axis=0)).sum(axis=1) + _PRIOR_IMAGES
        weights = counts / counts.sum()
    kept = np.where(weights < min(_LEAST_WEIGHT, 0.99 / len(weights)), 0, weights)
    return np.asarray(kept / kept.sum(), dtype=np.float32)


def mean_log_probs(weights: FloatArray, log_probs: FloatArray) -> FloatArray:
    """Return the logarithm of the weighted mean of probabilities, (N, K)."""
    mean = np.einsum("m,mnk->nk", weights, np.exp(log_probs))
    return np.asarray(np.log(np.maximum(mean, 1e-12)), dtype=np.float32)


def nested_log_probs(labels: IntArray, log_probs: FloatArray, fold_of: IntArray) -> FloatArray:
    """Return what the mean says of each fold when it is fitted on the others, (N, K)."""
    found: FloatArray = np.empty_like(log_probs[0])
    for fold in np.unique(fold_of):
        own = fold_of == fold
        found[own] = fit_mean(labels[~own], log_probs[:, ~own]).log_probs(log_probs[:, own])
    return found
