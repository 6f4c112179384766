"""Optuna's side of a study: asked in memory, written to the database a trial at a time.

Optuna's own SQLite storage commits every suggested value and every report by itself. Here one
process at a time runs a study (the record holds that), so the sampler and the pruner can work on a
copy in memory, and the database gets each trial in one transaction: when it has been running for a
moment, so that dashboards see it, or at its end, if that comes first. The database stays an
ordinary Optuna study.
"""

import time
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from study.optuna_storage import open_optuna_storage, write_reports, write_trial
from study.samplers import Distributions, SeenTrials, quiet_experiments

_WRITE_AFTER_S = 0.5
_FIXED = "fixed_params"  # where Optuna keeps a queued trial's settings
_DIRECTION = StudyDirection.MAXIMIZE


class Ledger:
    """A study's trials as Optuna knows them.

    Args:
        storage: SQLAlchemy URL or path of an SQLite file.
        name: The study; made where there is none.
        pruner: Decides which trials stop early.
        write_after_s: A trial or a report reaches the database this soon; shorter trials are
            written when they end.

    Attributes:
        study: The copy in memory.
        seen: For `make_sampler`: what it remembers of the trials so far.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        pruner: optuna.pruners.BasePruner,
        *,
        write_after_s: float = _WRITE_AFTER_S,
    ) -> None:
        self._database = open_optuna_storage(storage)
        self._kept = optuna.create_study(
            study_name=name, storage=self._database, direction=_DIRECTION, load_if_exists=True
        )
        self._kept_id = self._database.get_study_id_from_name(name)
        self._memory = InMemoryStorage()
        self.study = optuna.create_study(
            study_name=name, storage=self._memory, direction=_DIRECTION, pruner=pruner
        )
        self._memory_id = self._memory.get_study_id_from_name(name)
        for key, value in self._database.get_study_system_attrs(self._kept_id).items():
            if not key.startswith("study:"):
                self._memory.set_study_system_attr(self._memory_id, key, value)
        kept = self._database.get_all_trials(self._kept_id, deepcopy=False)
        for trial in kept:
            self._memory.create_new_trial(self._memory_id, template_trial=trial)
        # Counted here, since Optuna reads every trial of the study to count them.
        self._n_written = len(kept)
        self._attrs = self._memory.get_study_system_attrs(self._memory_id)
        self.seen = SeenTrials()
        self._write_after_s = write_after_s
        self._key: int | None = None  # of the trial under way, in the database
        self._unwritten: dict[int, float] = {}
        self._last_write = 0.0

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """List the trials, of the given states if any are given; not to be changed."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    @property
    def n_trials(self) -> int:
        """How many trials there are, those in line included."""
        return self._memory.get_n_trials(self._memory_id)

    def enqueue(self, params: Mapping[str, Any], user_attrs: Mapping[str, Any]) -> None:
        """Put a setting in line: it is asked for before the sampler is."""
        for study in (self.study, self._kept):
            study.enqueue_trial(dict(params), user_attrs=dict(user_attrs))
        self._n_written += 1

    def enqueue_first(self, params: Mapping[str, Any], user_attrs: Mapping[str, Any]) -> None:
        """Put a setting at the head of the line.

        Optuna takes queued trials by number, so the settings in line move back by one trial each.
        """
        waiting = self.trials(TrialState.WAITING)
        line = [(dict(params), dict(user_attrs))]
        line += [(t.system_attrs[_FIXED], dict(t.user_attrs)) for t in waiting]
        self.enqueue(*line[-1])
        for trial, (moved, attrs) in zip(waiting, line[:-1], strict=True):
            number = trial.number
            for storage, key in (
                (self._memory, self._memory_key(number)),
                (self._database, self._database_key(number)),
            ):
                storage.set_trial_system_attr(key, _FIXED, moved)
                for name, value in attrs.items():
                    storage.set_trial_user_attr(key, name, value)

    def next_number(self) -> int:
        """Return the number of the trial that `ask` will give."""
        waiting = self.trials(TrialState.WAITING)
        return waiting[0].number if waiting else self.n_trials

    def ask(self, sampler: optuna.samplers.BaseSampler, space: Distributions) -> Trial:
        """Begin a trial with a value for every dimension."""
        self.study.sampler = sampler
        with quiet_experiments():
            trial = self.study.ask(dict(space))
        self._key = None
        self._unwritten = {}
        self._last_write = time.monotonic()
        if trial.number < self._n_written:
            self._start_queued(trial)
        return trial

    def start(
        self, params: Mapping[str, Any], space: Distributions, user_attrs: Mapping[str, Any]
    ) -> Trial:
        """Begin a trial whose settings are given; nothing is sampled."""
        running = create_trial(
            state=TrialState.RUNNING,
            params=dict(params),
            distributions=dict(space),
            user_attrs=dict(user_attrs),
        )
        key = self._memory.create_new_trial(self._memory_id, template_trial=running)
        self._key = None
        self._unwritten = {}
        self._last_write = time.monotonic()
        return Trial(self.study, key)

    def _start_queued(self, trial: Trial) -> None:
        """Start a trial that stands in line in the database already."""
        key = self._database_key(trial.number)
        self._database.set_trial_state_values(key, TrialState.RUNNING)
        for name, distribution in trial.distributions.items():
            value = distribution.to_internal_repr(trial.params[name])
            self._database.set_trial_param(key, name, value, distribution)
        self._key = key

    def report(self, trial: Trial, value: float, step: int) -> bool:
        """Report a trial's value at a step (epochs done); return whether it is to stop."""
        trial.report(value, step)
        self._unwritten[step] = value
        if time.monotonic() - self._last_write >= self._write_after_s:
            self._write(trial)
        with quiet_experiments():
            return trial.should_prune()

    def _write(self, trial: Trial) -> None:
        """Bring the database up to date with a running trial."""
        if self._key is None:
            self._key = self._create(self._frozen(trial))
        else:
            write_reports(self._database, self._key, self._unwritten)
        self._unwritten = {}
        self._last_write = time.monotonic()

    def _create(self, trial: FrozenTrial) -> int:
        self._n_written += 1
        return write_trial(self._database, self._kept_id, trial)

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self._memory.get_trial(self._memory_key(trial.number))

    def _memory_key(self, number: int) -> int:
        return self._memory.get_trial_id_from_study_id_trial_number(self._memory_id, number)

    def _database_key(self, number: int) -> int:
        return self._database.get_trial_id_from_study_id_trial_number(self._kept_id, number)

    def tell(self, trial: Trial, state: TrialState, value: float | None = None) -> None:
        """End a trial; a pruned one keeps its last report as its value, as Optuna does."""
        with quiet_experiments():
            self.study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
        frozen = self._frozen(trial)
        if self._key is None:
            self._create(frozen)
        else:
            write_reports(self._database, self._key, self._unwritten)
            for key, attr in frozen.system_attrs.items():
                self._database.set_trial_system_attr(self._key, key, attr)
            self._database.set_trial_state_values(self._key, state, frozen.values)
        self._write_attrs()
        self._key, self._unwritten = None, {}

    def _write_attrs(self) -> None:
        """Keep what samplers note on the study, such as their place in a sequence."""
        attrs = self._memory.get_study_system_attrs(self._memory_id)
        for key, value in attrs.items():
            if self._attrs.get(key) != value:
                self._database.set_study_system_attr(self._kept_id, key, value)
        self._attrs = dict(attrs)

    def fail_open(self) -> list[FrozenTrial]:
        """Fail the trials that a killed process left running; return them as they were."""
        left = self.trials(TrialState.RUNNING)
        for trial in left:
            key = self._database_key(trial.number)
            self._database.set_trial_state_values(key, TrialState.FAIL)
            self._memory.set_trial_state_values(self._memory_key(trial.number), TrialState.FAIL)
        return left

    def add_failed(self, params: Mapping[str, Any], space: Distributions) -> None:
        """Add a trial that was cut short before it reached Optuna's tables."""
        known = {name: value for name, value in params.items() if name in space}
        failed = create_trial(
            state=TrialState.FAIL,
            params=known,
            distributions={name: space[name] for name in known},
        )
        for study in (self.study, self._kept):
            study.add_trial(failed)
        self._n_written += 1
