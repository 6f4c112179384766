"""The model that a search leaves: the best of its trials so far, alone or averaged."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.cache import ArrayCache
from core.config import Monitor, TrainConfig
from core.fit import Interrupted, refit
from core.heads.ensemble import fit_mean, nested_log_probs
from core.metrics import Evaluation, FloatArray, Reference
from core.model import described, save_model
from core.training.checkpoint import PREDICTIONS_FILE, REFIT_FILE
from study.execution.files import model_members
from study.execution.session import Session
from study.record.models import MODEL_FOLDER, Trial

# A mean has to score higher than the best of its members by this share: it costs as many forward
# passes as it has members. Assumption.
_LEAST_GAIN = 0.001


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model is made of.

    Attributes:
        trials: Its members.
        weights: Their shares of the mean.
        temperatures: What their logits are divided by.
        score: As trials are ranked; a mean's is measured on images that did not choose it.
        val_acc: Accuracy on the validation split, measured in the same way.
    """

    trials: tuple[Trial, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    score: float
    val_acc: float

    @property
    def refitted(self) -> tuple[bool, ...]:
        """Whether each member was fitted again on all images but the test split."""
        return tuple((Path(str(row.checkpoint)) / REFIT_FILE).exists() for row in self.trials)


class FinalModel:
    """Keeps the model folder of a study at the best that its trials so far can give.

    Args:
        session: The study that this process works on.

    Attributes:
        choice: What the folder holds; None before the first complete trial.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._settings = session.config.study
        self._folder = session.output / MODEL_FOLDER
        self.choice: Choice | None = None

    def update(self, rows: Sequence[Trial]) -> None:
        """Replace the model if these trials give one that scores higher, or have been refitted."""
        kept = [row for row in rows if row.state == "complete" and row.weights_hash]
        if not kept:
            return
        found = choose(kept, self._settings.finish, self._session.config.train.monitor)
        if (
            self.choice is not None
            and self.choice.score > found.score
            and all(row.number in {other.number for other in kept} for row in self.choice.trials)
        ):
            found = self.choice
        self.choice = found
        checkpoints = [Path(str(row.checkpoint)) for row in self.choice.trials]
        members = list(
            zip(checkpoints, self.choice.weights, self.choice.temperatures, strict=True)
        )
        facts: dict[str, Any] = {
            "study": self._settings.name,
            "created_at": self._session.created_at,
            "trials": [row.number for row in self.choice.trials],
            "score": self.choice.score,
            "val_acc": self.choice.val_acc,
            "weights_hashes": [row.weights_hash for row in self.choice.trials],
            "refitted": list(self.choice.refitted),
        }
        if not self._is_there(facts):
            save_model(self._folder, members, facts)

    def _is_there(self, facts: dict[str, Any]) -> bool:
        """Return whether the folder holds just this model."""
        found = described(self._folder)
        return all(found.get(key) == value for key, value in facts.items())

    def to_refit(self) -> list[Trial]:
        """Return the members whose settings have not been fitted to all images yet."""
        if self.choice is None or not self._settings.refit:
            return []
        pairs = zip(self.choice.trials, self.choice.refitted, strict=True)
        return [row for row, is_refitted in pairs if not is_refitted]

    def refit(self, row: Trial) -> bool:
        """Fit a member's settings to all images but the test split; return whether it was."""
        session = self._session
        try:
            refit(
                TrainConfig(**row.config),
                session.data,
                Path(str(row.checkpoint)),
                cache=session.cache or ArrayCache(session.output, 0),
                should_stop=lambda: session.halted() is not None,
            )
        except Interrupted:
            return False
        return True


def choose(rows: Sequence[Trial], finish: str, monitor: Monitor) -> Choice:
    """Choose the best trial, or the mean of several where that scores higher.

    Of each network the best head and the best thawed trial can be members.
    """
    members = model_members(rows)
    best = members[0]
    evaluations = [_evaluation(row) for row in members]
    labels = evaluations[0].labels
    log_probs = np.stack([evaluation.log_probs for evaluation in evaluations])
    own = evaluations[0].temperature
    single = Choice((best,), (1.0,), (own,), best.ranked_by or 0.0, best.value or 0.0)
    if finish == "single" or len(members) < 2:
        return single
    fold_of = np.arange(len(labels)) % 2
    fitted = fit_mean(labels, log_probs)
    nested = Evaluation(labels, nested_log_probs(labels, log_probs, fold_of))
    reference = _mean_reference(members, evaluations, fitted.weights)
    # Its temperatures are nested, too: it is not calibrated a second time.
    is_acc = monitor == "val_acc"
    score = reference.score(nested, monitor) if is_acc else np.exp(-nested.loss * reference.loss)
    if score < single.score * (1 + _LEAST_GAIN):
        return single
    kept = [k for k, weight in enumerate(fitted.weights) if weight > 0]
    return Choice(
        tuple(members[k] for k in kept),
        tuple(float(fitted.weights[k]) for k in kept),
        tuple(float(fitted.temperatures[k]) for k in kept),
        float(score),
        nested.acc,
    )


def _evaluation(row: Trial) -> Evaluation:
    with np.load(Path(str(row.checkpoint)) / PREDICTIONS_FILE) as saved:
        log_probs = np.log(np.maximum(saved["probabilities"], 1e-12))
        return Evaluation(saved["labels"], log_probs)


def _mean_reference(
    rows: Sequence[Trial], evaluations: Sequence[Evaluation], weights: FloatArray
) -> Reference:
    """Return how much harder all images are than the validation split, as members' scores say."""
    losses, errors = [], []
    for row, evaluation in zip(rows, evaluations, strict=True):
        score = min(max(row.ranked_by or 0.0, 1e-12), 1.0)
        losses.append(-np.log(score) / max(evaluation.calibrated_loss, 1e-9))
        errors.append((1 - score) / max(1 - evaluation.acc, 1 / len(evaluation.labels)))
    return Reference(float(weights @ np.array(losses)), float(weights @ np.array(errors)))
