"""The model that a search leaves: the best of its trials so far, alone or averaged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.cache import ArrayCache
from core.config import TrainConfig
from core.fit import refit
from core.metrics import Interrupted, TrainingDiverged
from core.model import described, save_model
from core.training.checkpoint import PREDICTIONS_FILE, REFIT_FILE
from study.execution.session import Session
from study.record.models import MODEL_FOLDER, Trial
from study.search.choice import Choice, choose


class FinalModel:
    """Keeps the model folder of a study at the best that its trials so far can give.

    Attributes:
        choice: What the folder holds; None before the first complete trial.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._settings = session.config.study
        self._folder = session.output / MODEL_FOLDER
        study = session.record.study(self._settings.name)
        self._study = {"study": study.name, "created_at": study.created_at.isoformat()}
        self.choice: Choice | None = None

    def update(self) -> None:
        """Replace the model if the trials give a better one, or have been refitted.

        Better is what scores higher, or is a mean of more trials; see `choose`.
        """
        # Which checkpoints are kept stands in the record alone.
        rows = self._session.record.trials(self._session.study_id)
        complete = (row for row in rows if row.state == "complete" and row.weights_hash)
        kept = [row for row in complete if (Path(str(row.checkpoint)) / PREDICTIONS_FILE).exists()]
        if not kept:
            return
        self.choice = self.choice or self._saved(kept)
        found = choose(kept, self._settings.finish, self._session.config.train.monitor)
        if (
            self.choice is not None
            and self.choice.score > found.score
            and len(self.choice.trials) >= len(found.trials)
            and all(row.number in {other.number for other in kept} for row in self.choice.trials)
        ):
            found = self.choice
        refitted = tuple(self._settings.refit and has_refit(row) for row in found.trials)
        self.choice = found = replace(found, refitted=refitted)
        facts: dict[str, Any] = {
            **self._study,
            "trials": [row.number for row in found.trials],
            "score": found.score,
            "val_acc": found.val_acc,
            "weights_hashes": [row.weights_hash for row in found.trials],
            "refitted": list(refitted),
        }
        there = described(self._folder)
        if any(there.get(key) != value for key, value in facts.items()):
            folders = [Path(str(row.checkpoint)) for row in found.trials]
            members = list(zip(folders, found.weights, found.temperatures, strict=True))
            save_model(self._folder, members, facts, use_refits=self._settings.refit)

    def _saved(self, kept: Sequence[Trial]) -> Choice | None:
        """Return what an earlier process left in the folder, if these trials still give it."""
        by_number = {row.number: row for row in kept}
        facts = described(self._folder)
        try:
            rows = [by_number[number] for number in facts["trials"]]
            own = {**self._study, "weights_hashes": [row.weights_hash for row in rows]}
            is_other = any(facts[key] != value for key, value in own.items())
            if is_other or (self._settings.finish == "single" and len(rows) > 1):
                return None
            weights = tuple(float(member["weight"]) for member in facts["members"])
            temperatures = tuple(float(member["temperature"]) for member in facts["members"])
            return Choice(tuple(rows), weights, temperatures, facts["score"], facts["val_acc"])
        except (LookupError, TypeError, ValueError):
            return None  # none, another study's, or a damaged one

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
