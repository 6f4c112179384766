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

    def score(self, monitor: Monitor) -> float:
        """Return what epochs and trials are ranked by, in [0, 1]; higher is better.

        By `val_acc` the accuracy; by `val_loss` exp(-`loss`), the geometric mean of the
        probability that the true class is given.
        """
        return self.acc if monitor == "val_acc" else float(np.exp(-self.loss))

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
