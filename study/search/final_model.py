"""The model that a search leaves: the best of its trials so far, alone or averaged."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.cache import ArrayCache
from core.config import Monitor, TrainConfig
from core.fit import Interrupted, refit
from core.heads.ensemble import fit_mean, nested_log_probs
from core.metrics import Evaluation, FloatArray, Reference, TrainingDiverged
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
        refitted: Whether each member is fitted again on all images but the test split.
    """

    trials: tuple[Trial, ...]
    weights: tuple[float, ...]
    temperatures: tuple[float, ...]
    score: float
    val_acc: float
    refitted: tuple[bool, ...] = ()


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
        self.choice = self.choice or self._saved(kept)
        found = choose(kept, self._settings.finish, self._session.config.train.monitor)
        if (
            self.choice is not None
            and self.choice.score > found.score
            and all(row.number in {other.number for other in kept} for row in self.choice.trials)
        ):
            found = self.choice
        refitted = tuple(self._settings.refit and has_refit(row) for row in found.trials)
        self.choice = found = replace(found, refitted=refitted)
        facts: dict[str, Any] = {
            "study": self._settings.name,
            "created_at": self._session.created_at,
            "trials": [row.number for row in found.trials],
            "score": found.score,
            "val_acc": found.val_acc,
            "weights_hashes": [row.weights_hash for row in found.trials],
            "refitted": list(refitted),
        }
        if not self._is_there(facts):
            folders = [Path(str(row.checkpoint)) for row in found.trials]
            members = list(zip(folders, found.weights, found.temperatures, strict=True))
            save_model(self._folder, members, facts, use_refits=self._settings.refit)

    def _saved(self, kept: Sequence[Trial]) -> Choice | None:
        """Return what an earlier process left in the folder, if these trials still give it."""
        by_number = {row.number: row for row in kept}
        facts = described(self._folder)
        own: dict[str, Any] = {"study": self._settings.name}
        own["created_at"] = self._session.created_at
        try:
            rows = [by_number[number] for number in facts["trials"]]
            own["weights_hashes"] = [row.weights_hash for row in rows]
            is_other = any(facts[key] != value for key, value in own.items())
            if is_other or (self._settings.finish == "single" and len(rows) > 1):
                return None
            weights = tuple(float(member["weight"]) for member in facts["members"])
            temperatures = tuple(float(member["temperature"]) for member in facts["members"])
            return Choice(tuple(rows), weights, temperatures, facts["score"], facts["val_acc"])
        except (LookupError, TypeError, ValueError):
            return None  # none, another study's, or a damaged one

    def _is_there(self, facts: dict[str, Any]) -> bool:
        """Return whether the folder holds just this model."""
        found = described(self._folder)
        return all(found.get(key) == value for key, value in facts.items())

    def to_refit(self) -> list[Trial]:
        """Return the members whose settings have not been fitted to all images yet."""
        if self.choice is None or not self._settings.refit:
            return []
        return [row for row in self.choice.trials if not has_refit(row)]

    def refit(self, row: Trial) -> str | None:
        """Fit a member's settings to all images but the test split; return what prevented it."""
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
            return session.halted()
        except (TrainingDiverged, torch.OutOfMemoryError, ValueError) as err:
            return str(err)
        return None


def has_refit(row: Trial) -> bool:
    """Return whether a trial's settings were fitted to all images but the test split, too."""
    return (Path(str(row.checkpoint)) / REFIT_FILE).exists()


def choose(rows: Sequence[Trial], finish: str, monitor: Monitor) -> Choice:
    """Choose the best trial, or the mean of several where that scores higher.

    Of each network the best head and the best thawed trial can be members.
    """
    best = min(rows, key=lambda row: row.rank)
    images = _predicted(best)[0]
    # Where the study's images were changed, others were evaluated on other ones.
    members = [row for row in model_members(rows) if _predicted(row)[0] == images]
    evaluations = [_predicted(row)[1] for row in members]
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


def _predicted(row: Trial) -> tuple[list[str], Evaluation]:
    """Return the validation images that a trial was evaluated on, and what it says of them."""
    with np.load(Path(str(row.checkpoint)) / PREDICTIONS_FILE) as saved:
        log_probs = np.log(np.maximum(saved["probabilities"], 1e-12))
        return saved["paths"].tolist(), Evaluation(saved["labels"], log_probs)


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
