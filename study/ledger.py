"""Optuna's side of a study: asked in memory, written to the database a trial at a time.

Optuna's own SQLite storage commits every suggested value and every report by itself. Here one
process at a time runs a study (the record holds that), so the sampler and the pruner can work on a
copy in memory, and the database gets each trial in one transaction: when it has been running for a
moment, so that dashboards see it, or at its end, if that comes first. The database stays an
ordinary Optuna study.

A paused trial is running there, since only running trials can be gone on with. In memory it looks
pruned: samplers learn from pruned trials and leave running ones out.
"""

import contextlib
import copy
import time
from collections.abc import Collection, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from study.optuna_storage import (
    drop_reports,
    open_optuna_storage,
    write_reports,
    write_trial,
    write_trials,
)
from study.samplers import Distributions, SeenTrials, quiet_experiments

RERUNS = "reruns"
"""What is noted of a trial whose process died: how often it, or its settings, were run again."""
_WRITE_AFTER_S = 0.5
_FIXED = "fixed_params"  # where Optuna keeps a queued trial's settings
_DIRECTION = StudyDirection.MAXIMIZE


class _Memory(InMemoryStorage):
    """Optuna's storage in memory, where a paused trial looks pruned to whoever lists trials.

    Attributes:
        paused: The paused trials by number, as they look.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused: dict[int, FrozenTrial] = {}

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """List the trials of the one study that there is."""
        if not self.paused or states == (TrialState.WAITING,):
            return super().get_all_trials(study_id, deepcopy, states)
        every = super().get_all_trials(study_id, deepcopy=False)
        shown = [self.paused.get(trial.number, trial) for trial in every]
        kept = [trial for trial in shown if states is None or trial.state in states]
        return copy.deepcopy(kept) if deepcopy else kept


@dataclass(slots=True)
class _Open:
    """What the database has of a trial under way, or paused.

    Attributes:
        key: Its key there; None where it is not there yet.
        written_at: When it was last written, by the monotonic clock.
        unwritten: Values by step that are not there yet.
    """

    key: int | None
    written_at: float
    unwritten: dict[int, float] = field(default_factory=dict)


class Ledger:
    """A study's trials as Optuna knows them.

    Args:
        storage: SQLAlchemy URL or path of an SQLite file.
        name: The study; made where there is none.
        pruner: Decides which trials stop early.
        write_after_s: A trial or a report reaches the database this soon; shorter trials are
            written when they end.
        paused: Trials of former runs that are paused, with the epochs that they have done: what
            the database has of a later epoch is dropped. Those that are not running there, or
            not there at all, are no paused trials.

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
        paused: Mapping[int, int] | None = None,
    ) -> None:
        self._database = open_optuna_storage(storage)
        self._kept = optuna.create_study(
            study_name=name, storage=self._database, direction=_DIRECTION, load_if_exists=True
        )
        self._kept_id = self._database.get_study_id_from_name(name)
        self._memory = _Memory()
        self.study = optuna.create_study(
            study_name=name, storage=self._memory, direction=_DIRECTION, pruner=pruner
        )
        self._memory_id = self._memory.get_study_id_from_name(name)
        for key, value in self._database.get_study_system_attrs(self._kept_id).items():
            if not key.startswith("study:"):
                self._memory.set_study_system_attr(self._memory_id, key, value)
        kept = self._database.get_all_trials(self._kept_id, deepcopy=False)
        waiting = dict(paused or {})
        self._open: dict[int, _Open] = {}
        for trial in kept:
            n_epochs = waiting.get(trial.number)
            if n_epochs is not None and trial.state is TrialState.RUNNING:
                trial = self._cut(trial, n_epochs)
            self._memory.create_new_trial(self._memory_id, template_trial=trial)
            if n_epochs is not None and trial.state is TrialState.RUNNING:
                self._show_paused(trial.number)
        # Counted here, since Optuna reads every trial of the study to count them.
        self._n_written = len(kept)
        self._attrs = self._memory.get_study_system_attrs(self._memory_id)
        self.seen = SeenTrials()
        self._write_after_s = write_after_s
        self._held: list[int] | None = None  # ended trials to be written together

    def _cut(self, trial: FrozenTrial, n_epochs: int) -> FrozenTrial:
        """Take a trial back to where it was paused."""
        drop_reports(self._database, trial._trial_id, n_epochs)
        cut = copy.copy(trial)
        values = trial.intermediate_values
        cut.intermediate_values = {k: v for k, v in values.items() if k <= n_epochs}
        return cut

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """List the trials, of the given states if any are given; not to be changed."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    @property
    def n_trials(self) -> int:
        """How many trials there are, those in line included."""
        return self._memory.get_n_trials(self._memory_id)

    def enqueue(self, params: Mapping[str, Any], user_attrs: Mapping[str, Any]) -> None:
        """Put a setting in line: it is asked for before the sampler is."""
        self._write_all_below(self.n_trials)
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
        self._open[trial.number] = _Open(None, time.monotonic())
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
        trial = Trial(self.study, key)
        self._open[trial.number] = _Open(None, time.monotonic())
        return trial

    def _start_queued(self, trial: Trial) -> None:
        """Start a trial that stands in line in the database already."""
        key = self._database_key(trial.number)
        self._database.set_trial_state_values(key, TrialState.RUNNING)
        for name, distribution in trial.distributions.items():
            value = distribution.to_internal_repr(trial.params[name])
            self._database.set_trial_param(key, name, value, distribution)
        self._open[trial.number].key = key

    def report(self, trial: Trial, value: float, step: int) -> bool:
        """Report a trial's value at a step (epochs done); return whether it is to stop.

        A step that was reported before, by a run that had to begin anew, was decided then.
        """
        if step in self._frozen(trial.number).intermediate_values:
            return False
        trial.report(value, step)
        written = self._open[trial.number]
        written.unwritten[step] = value
        is_due = time.monotonic() - written.written_at >= self._write_after_s
        if is_due and self._held is None:
            self._write(trial.number)
        with quiet_experiments():
            return trial.should_prune()

    def _write(self, number: int) -> None:
        """Bring the database up to date with a trial that has not ended."""
        written = self._open[number]
        if written.key is None:
            self._create(number)
        else:
            write_reports(self._database, written.key, written.unwritten)
        written.unwritten = {}
        written.written_at = time.monotonic()

    def _create(self, number: int) -> None:
        """Add a trial to the database, which numbers trials as they come."""
        self._write_all_below(number)
        self._n_written += 1
        self._open[number].key = write_trial(self._database, self._kept_id, self._frozen(number))

    def _write_all_below(self, number: int) -> None:
        missing = [n for n, written in self._open.items() if n < number and written.key is None]
        if missing:
            self._write(max(missing))

    def _frozen(self, number: int) -> FrozenTrial:
        return self._memory.get_trial(self._memory_key(number))

    def _memory_key(self, number: int) -> int:
        return self._memory.get_trial_id_from_study_id_trial_number(self._memory_id, number)

    def _database_key(self, number: int) -> int:
        return self._database.get_trial_id_from_study_id_trial_number(self._kept_id, number)

    def tell(self, trial: Trial, state: TrialState, value: float | None = None) -> None:
        """End a trial; a pruned one keeps its last report as its value, as Optuna does."""
        with quiet_experiments():
            self.study.tell(trial, value if state is TrialState.COMPLETE else None, state=state)
        if self._held is not None:
            self._held.append(trial.number)
            return
        if self._open[trial.number].key is None:
            self._create(trial.number)
        else:
            self._write_end(trial.number)
        self._write_attrs()
        del self._open[trial.number]

    def _write_end(self, number: int) -> None:
        """End a trial in the database that is there already."""
        frozen, written = self._frozen(number), self._open[number]
        assert written.key is not None, "it is there"
        write_reports(self._database, written.key, written.unwritten)
        for name, attr in frozen.system_attrs.items():
            self._database.set_trial_system_attr(written.key, name, attr)
        self._database.set_trial_state_values(written.key, frozen.state, frozen.values)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write the trials that end inside the block when it ends, all new ones at once.

        The new ones must follow each other in number. After an error none of them is written.
        """
        held: list[int] = []
        self._held = held
        try:
            yield
        finally:
            self._held = None
        new = [number for number in held if self._open[number].key is None]
        for number in held:
            if number not in new:  # it stood in line there
                self._write_end(number)
        if new:
            self._write_all_below(new[0])
            write_trials(self._database, self._kept_id, [self._frozen(n) for n in new])
            self._n_written += len(new)
        if held:
            self._write_attrs()
        for number in held:
            del self._open[number]

    @property
    def paused(self) -> Collection[int]:
        """Numbers of the paused trials."""
        return self._memory.paused.keys()

    def pause(self, trial: Trial) -> None:
        """Leave a trial where it is; the database has all of it when this returns."""
        self._write(trial.number)
        self._show_paused(trial.number)

    def _show_paused(self, number: int) -> None:
        shown = copy.copy(self._frozen(number))
        shown.state = TrialState.PRUNED
        last = shown.last_step
        shown.value = None if last is None else shown.intermediate_values[last]
        shown.datetime_complete = shown.datetime_start
        self._memory.paused[number] = shown

    def go_on(self, number: int) -> Trial:
        """Take up a paused trial."""
        del self._memory.paused[number]
        self._open.setdefault(number, _Open(self._database_key(number), time.monotonic()))
        return Trial(self.study, self._memory_key(number))

    def user_attrs(self, number: int) -> dict[str, Any]:
        """Return what was noted of a trial."""
        return dict(self._frozen(number).user_attrs)

    def note(self, number: int, name: str, value: int) -> None:
        """Note something of a trial that is in the database and has not ended."""
        self._memory.set_trial_user_attr(self._memory_key(number), name, value)
        self._database.set_trial_user_attr(self._database_key(number), name, value)

    def _write_attrs(self) -> None:
        """Keep what samplers note on the study, such as their place in a sequence."""
        attrs = self._memory.get_study_system_attrs(self._memory_id)
        for key, value in attrs.items():
            if self._attrs.get(key) != value:
                self._database.set_study_system_attr(self._kept_id, key, value)
        self._attrs = dict(attrs)

    def fail_open(self) -> list[FrozenTrial]:
        """Fail the trials that a killed process left running; return them as they were.

        Paused trials are not among them.
        """
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
