"""Which trials the model is made of: the best one, or the mean of several where that is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.config import Monitor
from core.heads.ensemble import fit_mean, mean_log_probs, mean_weights, nested_log_probs
from core.metrics import Evaluation, FloatArray, IntArray, tempered
from core.training.checkpoint import PREDICTIONS_FILE
from study.execution.files import model_members
from study.record.models import Trial

# A mean has to score higher than its members do on average by this share: equal ones add nothing
# but forward passes. Assumption.
_LEAST_GAIN = 0.001
# A thawed network becomes a member where it lowers the heads' loss by so many standard errors. Of
# four sets (80 to 380 test images, EfficientNet-Lite0) it did so on flowers5 alone (1.7), where
# the test loss fell by 0.013; on the others, at -1.5 to 1.2, it rose by 0.00 to 0.03. Being the
# best of several thawed trials, it is overrated, too: on another fold of flowers5 one that scored
# higher than its mean with the heads had a test loss of 0.315, the mean 0.281, the heads 0.295.
_SURE = 1.5


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model is made of.

    Attributes:
        trials: Its members.
        weights: Their shares of the mean.
        temperatures: What their logits are divided by.
        score: As trials are ranked; a mean's is measured on images that did not choose it.
        val_acc: Accuracy on the validation split, measured in the same way.
        refitted: Whether each member is fitted again on all images but the test split.
    """

    trials: tuple[Trial, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    score: float
    val_acc: float
    refitted: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class _Predicted:
    """What a trial says of the validation images and, by folds, of all but the test split."""

    paths: list[str]
    val: Evaluation
    everything: Evaluation | None


@dataclass(frozen=True, slots=True)
class _Mean:
    """Members with their weights and temperatures, and what they say of images unseen by both.

    Attributes:
        val: Predictions for the validation split, by a mean that was fitted on other images.
        everything: The same for all images but the test split, by the heads alone; where there are
            none, for the validation split.
        loss: Of all images but the test split, in the measure of `_losses`.
    """

    members: tuple[Trial, ...]
    weights: FloatArray
    temperatures: FloatArray
    val: Evaluation
    everything: Evaluation
    loss: float


def choose(rows: Sequence[Trial], finish: str, monitor: Monitor) -> Choice:
    """Choose the mean of several trials, unless the best one is better beyond doubt.

    For the best of many is overrated. Of each backbone the best head and the best thawed trial can
    be members. The heads' weights are chosen by their predictions for all images but the test
    split. A thawed trial has some for the validation split alone, and joins them where it lowers
    the loss there beyond doubt.
    """
    members = model_members(rows)
    best, known = members[0], {row.number: _predicted(row) for row in members}
    own = known[best.number]
    # Where the study's images were changed, others were evaluated on other ones.
    members = [row for row in members if known[row.number].paths == own.paths]
    if finish == "single" or len(members) < 2:
        return _single(best, own)
    heads = [row for row in members if known[row.number].everything is not None]
    thawed = [row for row in members if row not in heads]
    if heads:
        mean = _mean_of_heads([(row, known[row.number]) for row in heads], monitor)
    else:
        first, found = thawed[0], known[thawed[0].number].val
        one = np.ones(1, dtype=np.float32)
        val = Evaluation(found.labels, tempered(found.log_probs, found.temperature))
        loss = _loss_of(first.ranked_by or 0.0, monitor)
        mean = _Mean((first,), one, one * found.temperature, val, val, loss)
    for row in thawed if heads else thawed[1:]:
        mean = _joined(mean, row, known[row.number].val, monitor)
    if heads and best in thawed and best not in mean.members:
        # Its score is that of one fold, and it is the best of several there.
        best = heads[0]
    single = _single(best, known[best.number])
    if len(mean.members) < 2:
        return single
    score, alone, others = _score_of(mean.loss, monitor), known[best.number].val, mean.val
    if best in heads:
        alone, others = known[best.number].everything or alone, mean.everything
    scores = [row.ranked_by or 0 for row in mean.members if row in heads or not heads] or [0]
    own_losses = _losses(alone.labels, tempered(alone.log_probs, alone.temperature), monitor)
    is_worse = _is_sure(_losses(alone.labels, others.log_probs, monitor) - own_losses)
    if is_worse or score < np.mean(scores) * (1 + _LEAST_GAIN):
        return single
    return Choice(
        mean.members,
        tuple(map(float, mean.weights)),
        tuple(map(float, mean.temperatures)),
        score,
        mean.val.acc,
    )


def _single(row: Trial, found: _Predicted) -> Choice:
    temperature = (found.everything or found.val).temperature
    return Choice((row,), (1.0,), (temperature,), row.ranked_by or 0, row.value or 0)


def _predicted(row: Trial) -> _Predicted:
    with np.load(Path(str(row.checkpoint)) / PREDICTIONS_FILE) as saved:
        val = _evaluation(saved["labels"], saved["probabilities"])
        everything = None
        if "train_labels" in saved:
            rest = _evaluation(saved["train_labels"], saved["train_probabilities"])
            labels = np.concatenate([val.labels, rest.labels])
            everything = Evaluation(labels, np.concatenate([val.log_probs, rest.log_probs]))
        return _Predicted(saved["paths"].tolist(), val, everything)


def _evaluation(labels: IntArray, probabilities: FloatArray) -> Evaluation:
    return Evaluation(labels, np.log(np.maximum(probabilities.astype(np.float32), 1e-7)))


def _mean_of_heads(heads: Sequence[tuple[Trial, _Predicted]], monitor: Monitor) -> _Mean:
    """Average heads by their predictions for all images, which come in one order."""
    found = [(row, p.everything) for row, p in heads if p.everything is not None]
    labels = found[0][1].labels
    # Training images may have changed where the validation images have not.
    found = [item for item in found if np.array_equal(item[1].labels, labels)]
    log_probs = np.stack([evaluation.log_probs for _, evaluation in found])
    fitted = fit_mean(labels, log_probs)
    nested = nested_log_probs(labels, log_probs, np.arange(len(labels)) % 2)
    n_val = len(heads[0][1].val.labels)
    kept = np.flatnonzero(fitted.weights)
    return _Mean(
        tuple(found[k][0] for k in kept),
        fitted.weights[kept],
        fitted.temperatures[kept],
        Evaluation(labels[:n_val], nested[:n_val]),
        Evaluation(labels, nested),
        float(_losses(labels, nested, monitor).mean()),
    )


def _joined(mean: _Mean, row: Trial, found: Evaluation, monitor: Monitor) -> _Mean:
    """Return a mean with one more member where that lowers the loss beyond doubt."""
    labels, both = found.labels, np.stack([mean.val.log_probs, found.log_probs])
    if len(labels) < 2:
        return mean
    nested = np.empty_like(found.log_probs)
    half = np.arange(len(labels)) % 2
    for part in (half == 0, half == 1):
        weights, temperature = _weigh(labels[~part], both[:, ~part])
        nested[part] = mean_log_probs(weights, _with_tempered(both[:, part], temperature))
    before = _losses(labels, mean.val.log_probs, monitor)
    gain = before - _losses(labels, nested, monitor)
    if not _is_sure(gain):
        return mean
    weights, temperature = _weigh(labels, both)
    others = mean.weights * weights[0]
    members, temperatures = (*mean.members, row), np.append(mean.temperatures, temperature)
    kept = np.append(others, weights[1]) > 0
    # One more wrong image in each: few images may all be right.
    one = 1.0 if monitor == "val_acc" else 0.0
    ratio = (before.sum() - gain.sum() + one) / (before.sum() + one)
    return _Mean(
        tuple(member for member, is_kept in zip(members, kept, strict=True) if is_kept),
        np.append(others, weights[1])[kept],
        temperatures[kept],
        Evaluation(labels, nested),
        mean.everything,
        mean.loss * float(ratio),
    )


def _is_sure(gain: FloatArray) -> bool:
    """Return whether images' losses, (N,), fall beyond doubt."""
    return bool(gain.mean() > _SURE * gain.std(ddof=1) / len(gain) ** 0.5)


def _weigh(labels: IntArray, both: FloatArray) -> tuple[FloatArray, float]:
    """Weigh a mean and a network, whose temperature is chosen first; see `mean_weights`."""
    temperature = Evaluation(labels, both[1]).temperature
    return mean_weights(labels, _with_tempered(both, temperature)), temperature


def _with_tempered(both: FloatArray, temperature: float) -> FloatArray:
    return tempered(both, np.array([[[1.0]], [[temperature]]], dtype=np.float32))


def _losses(labels: IntArray, log_probs: FloatArray, monitor: Monitor) -> FloatArray:
    """Return what each image adds to the loss by which trials are ranked, (N,)."""
    if monitor == "val_acc":
        return np.asarray(log_probs.argmax(axis=1) != labels, dtype=np.float32)
    return -log_probs[np.arange(len(labels)), labels]


def _score_of(loss: float, monitor: Monitor) -> float:
    return 1 - loss if monitor == "val_acc" else float(np.exp(-loss))


def _loss_of(score: float, monitor: Monitor) -> float:
    return 1 - score if monitor == "val_acc" else float(-np.log(max(score, 1e-12)))
