"""Evaluate a network on views of a split: predictions first, figures from them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from core.config import Monitor

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
Double = NDArray[np.float64]
# Newton's method: the loss is flat at its minimum, so this is exact to some 1e-7.
_LOG_FACTORS, _MOST_STEPS, _CLOSE = (-4.0, 4.0), 30, 1e-3


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a network says about N pictures of K classes.

    Attributes:
        labels: True classes, (N,).
        log_probs: Natural logarithm of each class's probability, (N, K).
        confusion: Pictures by true (row) and predicted (column) class, (K, K).
    """

    labels: IntArray
    log_probs: FloatArray
    confusion: IntArray

    @property
    def predicted(self) -> IntArray:
        """The most probable class of each picture, (N,)."""
        return np.asarray(self.log_probs.argmax(axis=1), dtype=np.int64)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""
        return float(-self.log_probs[np.arange(len(self.labels)), self.labels].mean())

    @property
    def scaled_loss(self) -> float:
        """Mean cross-entropy, nats, with the logits multiplied by the one factor that suits best.

        So it says how well pictures are told apart, whether the network is too sure of itself or
        not sure enough. The factor's logarithm has a normal prior of deviation 1 that weighs as
        much as one picture: a few pictures that are all told right do not make it infinite.

        References:
            Guo et al. 2017, https://arxiv.org/abs/1706.04599 (temperature scaling); Berta et al.
            2025, https://arxiv.org/abs/2501.19195 (choosing a model by the loss behind it).
        """
        logits = self.log_probs.astype(np.float64)
        n = len(logits)
        true = logits[np.arange(n), self.labels].mean()
        at = 0.0  # logarithm of the factor
        for _ in range(_MOST_STEPS):
            factor = np.exp(at)
            log_norms, means, squares = _moments(logits, factor)
            slope = factor * (means.mean() - true) + at / n
            bend = factor**2 * (squares - means**2).mean() + slope - at / n + 1 / n
            # Far from the minimum the curve may bend down: then a step in the right direction.
            step = -slope / bend if bend > 0 else -np.sign(slope)
            at = float(np.clip(at + np.clip(step, -1, 1), *_LOG_FACTORS))
            if abs(step) < _CLOSE:
                break
        factor = np.exp(at)
        return float((_moments(logits, factor)[0] - factor * true).mean())

    def score(self, monitor: Monitor) -> float:
        """Return what epochs and trials are ranked by, in [0, 1]; higher is better.

        By `val_acc` the accuracy; by `val_loss` exp(-`scaled_loss`), the geometric mean of the
        probability that the true class is given.
        """
        return self.acc if monitor == "val_acc" else float(np.exp(-self.scaled_loss))

    @property
    def n_correct(self) -> int:
        """Pictures classified rightly."""
        return int(np.trace(self.confusion))

    @property
    def acc(self) -> float:
        """Share of pictures classified rightly."""
        return self.n_correct / len(self.labels)

    @property
    def balanced_acc(self) -> float:
        """Mean over the classes that occur of the share classified rightly."""
        truth = self.confusion.sum(axis=1)
        present = truth > 0
        return float((np.diag(self.confusion)[present] / truth[present]).mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur or are predicted."""
        hits = np.diag(self.confusion)
        marked = self.confusion.sum(axis=0) + self.confusion.sum(axis=1)
        seen = marked > 0
        return float((2 * hits[seen] / marked[seen]).mean())


def _moments(logits: Double, factor: float) -> tuple[Double, Double, Double]:
    """Return what the loss of logits times a factor and its derivatives are made of.

    Returns:
        Of each picture, (N,): log-sum-exp, and mean and mean square of the plain logits under the
        probabilities.
    """
    scaled = factor * logits
    top = scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled - top)
    total = weights.sum(axis=1, keepdims=True)
    weights /= total
    weighted = weights * logits
    log_norms = (top + np.log(total))[:, 0]
    return log_norms, weighted.sum(axis=1), (weighted * logits).sum(axis=1)


def count_confusion(labels: IntArray, predicted: IntArray, n_classes: int) -> IntArray:
    """Count pictures by true (row) and predicted (column) class, (K, K)."""
    flat = np.bincount(labels * n_classes + predicted, minlength=n_classes**2)
    return flat.reshape(n_classes, n_classes).astype(np.int64)


def evaluate(model: nn.Module, batches: Iterable[Any], labels: IntArray) -> Evaluation:
    """Evaluate a network in eval mode; its mode is the caller's to restore.

    Args:
        model: Network; gives logits (N, K).
        batches: Ready inputs, together in the order of `labels`.
        labels: True classes, (N,).
    """
    model.eval()
    with torch.inference_mode():
        logits = [model(images).float() for images in batches]
        log_probs = torch.cat(logits).log_softmax(dim=1).cpu().numpy()  # the one transfer
    predicted = log_probs.argmax(axis=1).astype(np.int64)
    confusion = count_confusion(labels, predicted, log_probs.shape[1])
    return Evaluation(labels, log_probs, confusion)
