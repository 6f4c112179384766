"""The figures of an epoch, and of an evaluation; free of torch."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from core.config import Monitor

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
_MOST_COOLED = 200_000  # probabilities that choose a temperature: of 1,000 classes, 200 images
_Float = TypeVar("_Float", bound=np.floating[Any])


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """The figures of one epoch, taken after it; fractions are in [0, 1], times in seconds.

    Attributes:
        epoch: Counted from 1.
        train_loss: Mean cross-entropy over the training views as they were seen, nats.
        val_loss: Mean cross-entropy on the validation split, nats, without label smoothing.
        val_acc: Share of validation images classified correctly.
        val_balanced_acc: Mean over classes of the share of the class classified correctly.
        val_macro_f1: Mean over classes of the F1 score; a class never predicted counts 0.
        base_lr: Backbone's learning rate at the epoch's last step.
        head_lr: Head's learning rate at the epoch's last step.
        images_per_s: Training images per second of the training phase (data and steps).
        data_s: Time spent waiting for inputs.
        train_s: Forward, backward and optimizer.
        eval_s: Evaluation.
        peak_memory_bytes: Largest device memory so far (CUDA), or resident memory of the process.
        micro_batch_size: Images per forward pass; halved where memory ran out.
        is_best: The highest `score` so far, and so the epoch whose weights are kept.
        saved_s: Seconds that cached arrays saved: what making them had taken.
        cache_hits: Cached arrays that were read.
        cache_misses: Arrays that had to be made.
        score: What epochs and trials are ranked by, from `Reference.score`; None in the record of
            an older version, which ranked by `val_acc`.
    """

    epoch: int
    train_loss: float
    val_loss: float
    val_acc: float
    val_balanced_acc: float
    val_macro_f1: float
    base_lr: float
    head_lr: float
    images_per_s: float
    data_s: float
    train_s: float
    eval_s: float
    peak_memory_bytes: int
    micro_batch_size: int
    is_best: bool
    saved_s: float = 0.0
    cache_hits: int = 0
    cache_misses: int = 0
    score: float | None = None

    @property
    def ranked_by(self) -> float:
        """The score, or the accuracy where a record has none."""
        return self.val_acc if self.score is None else self.score


MEASURED = frozenset(
    {"images_per_s", "data_s", "train_s", "eval_s", "peak_memory_bytes", "saved_s"}
    | {"cache_hits", "cache_misses"}
)
"""Figures of clock, memory and cache: they differ between equal runs."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a network says about N images of K classes.

    Attributes:
        labels: True classes, (N,).
        log_probs: Natural logarithm of each class's probability, (N, K).
    """

    labels: IntArray
    log_probs: FloatArray

    @property
    def confusion(self) -> IntArray:
        """Images by true (row) and predicted (column) class, (K, K)."""
        n = self.log_probs.shape[1]
        return np.bincount(self.labels * n + self.predicted, minlength=n * n).reshape(n, n)

    @property
    def predicted(self) -> IntArray:
        """The most probable class of each image, (N,)."""
        return np.asarray(self.log_probs.argmax(axis=1), dtype=np.int64)

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats."""
        return float(-self.log_probs[np.arange(len(self.labels)), self.labels].mean())

    @property
    def temperature(self) -> float:
        """What the logits have to be divided by for the least cross-entropy.

        Found by bisection of the slope in log(1 / T).
        """
        # Few images may ask for more, by chance, and other images pay for it. Assumption.
        low, high = np.log(0.1), np.log(3.0)
        some = slice(None, None, math.ceil(self.log_probs.size / _MOST_COOLED))
        labels, log_probs = self.labels[some], self.log_probs[some].astype(np.float64)
        given = log_probs[np.arange(len(labels)), labels]
        for _ in range(30):
            middle = (low + high) / 2
            probs = np.exp(tempered(log_probs, np.exp(-middle)))
            slope = ((probs * log_probs).sum(axis=1) - given).mean()
            low, high = (middle, high) if slope < 0 else (low, middle)
        return float(np.exp(-(low + high) / 2))

    @property
    def calibrated_loss(self) -> float:
        """Mean cross-entropy at a temperature that is fitted on other images, nats.

        Each half of the images has the temperature of the other half: a trained network is
        often too sure of itself, which says little about the classes that it gives.
        """
        if len(self.labels) < 2:
            return self.loss
        halves = [Evaluation(self.labels[k::2], self.log_probs[k::2]) for k in (0, 1)]
        sums = 0.0
        for fitted, judged in (halves, halves[::-1]):
            cooled = tempered(judged.log_probs.astype(np.float64), fitted.temperature)
            sums -= float(cooled[np.arange(len(cooled)), judged.labels].sum())
        return sums / len(self.labels)

    @property
    def n_correct(self) -> int:
        """Images classified correctly."""
        return int((self.predicted == self.labels).sum())

    @property
    def acc(self) -> float:
        """Share of images classified correctly."""
        return self.n_correct / len(self.labels)

    @property
    def balanced_acc(self) -> float:
        """Mean over the classes that occur of the share classified correctly."""
        confusion = self.confusion
        truth = confusion.sum(axis=1)
        present = truth > 0
        return float((np.diag(confusion)[present] / truth[present]).mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur or are predicted."""
        confusion = self.confusion
        hits = np.diag(confusion)
        marked = confusion.sum(axis=0) + confusion.sum(axis=1)
        seen = marked > 0
        return float((2 * hits[seen] / marked[seen]).mean())


@dataclass(frozen=True, slots=True)
class Reference:
    """What turns figures of the validation split into estimates for all images but the test split.

    The validation split is one fold of several. A solved head has predictions for all of them, so
    that it says how much easier or harder this fold is than all; where a network starts from that
    head, the same factor is taken to hold for it.

    Attributes:
        loss: Loss of the solved head on all folds, divided by its loss on the validation split.
        error: The same of its share of wrong images.
    """

    loss: float = 1.0
    error: float = 1.0

    def score(self, evaluation: Evaluation, monitor: Monitor) -> float:
        """Return what epochs and trials are ranked by; higher is better.

        By `val_acc` the accuracy; by `val_loss` exp(-loss) at the best temperature: the geometric
        mean of the probability that the true class is given.
        """
        if monitor == "val_acc":
            return 1 - (1 - evaluation.acc) * self.error
        return float(np.exp(-evaluation.calibrated_loss * self.loss))


def tempered(log_probs: NDArray[_Float], temperature: float | FloatArray) -> NDArray[_Float]:
    """Return log-probabilities, (..., K), for logits that are divided by a temperature."""
    scaled = log_probs / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    total = np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
    return np.asarray(scaled - total, dtype=log_probs.dtype)


class Interrupted(Exception):
    """The caller asked a run to stop; its state file, if it has one, says where to continue."""


class TrainingDiverged(RuntimeError):
    """The loss is no longer a finite number; the run cannot recover."""
