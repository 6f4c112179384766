"""Pruning within one freeze level and schedule: only trials that learn alike are compared."""

from collections.abc import Container
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

# A network that is thawed further learns more slowly and ends higher; four epochs of a cosine are
# not the beginning of ten; and a larger image's accuracy is another one.
_KEYS = ("freeze_depth", "epochs", "schedule", "image_size")


class WithinLevel(BasePruner):
    """Lets a pruner see only trials of the same freeze level, schedule and image size.

    `storage` is that of the study; trials are read through the study, which keeps ended ones.
    """

    def __init__(self, pruner: BasePruner, storage: BaseStorage) -> None:
        self._pruner, self._storage = pruner, storage

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether a trial is to stop."""
        alike: Any = _Alike(self._storage, study, trial)
        shown = optuna.load_study(
            study_name=study.study_name, storage=alike, sampler=study.sampler, pruner=self._pruner
        )
        return self._pruner.prune(shown, trial)


class _Alike:
    """A study's storage that lists only trials like one of them."""

    get_best_trial = BaseStorage.get_best_trial  # of those that are listed

    def __init__(self, storage: BaseStorage, study: optuna.Study, trial: FrozenTrial) -> None:
        self._storage, self._study, self._own = storage, study, self._level(trial.params)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """List the trials, as `BaseStorage` does."""
        trials = self._study.get_trials(deepcopy=deepcopy, states=states)
        return [trial for trial in trials if self._level(trial.params) == self._own]

    @staticmethod
    def _level(params: dict[str, Any]) -> list[Any]:
        return [params.get(key) for key in _KEYS]
