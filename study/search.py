"""Run a search: ask Optuna, run the trial, tell it; stop and resume as the user wishes."""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

from core.config import TrainConfig
from study.config.load import check_backbones
from study.config.search_space import ParamValue, apply_params, distributions, n_points, recipes
from study.config.study_config import StudyConfig
from study.progress import Counts, Progress
from study.record.models import Trial
from study.record.record import Record
from study.roster import Roster
from study.runner import (
    RERUN_REASONS,
    Asked,
    Work,
    checkpoint_folder,
    identity,
    record_predictions,
    run_trial,
)
from study.samplers import make_pruner, make_sampler, quiet_experiments
from study.session import close_killed, corner_configs, open_session

# A setting that took the process down with it this often is not tried again.
_MOST_RERUNS = 3
_ORIGIN = "origin"
_RERUNS, _QUEUED = "reruns", "queued"
_COPY = "same as "
_RECIPE = "recipe:"
HALTED = ("interrupted", "timeout")
"""A study that stopped for these goes on where it was; for any other reason it is at its end."""


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """How a search ended.

    Attributes:
        study_name: The study.
        stopped_because: `trials`, `timeout`, `patience`, `space exhausted` or `interrupted`.
        counts: Trials of the study by state.
        best_number: The best complete trial, by `train.monitor`, if any.
        best_value: Its validation accuracy, in [0, 1].
        best_params: Its values of the searched settings.
        checkpoint: Its checkpoint folder, if it is still there.
        n_val: Pictures of the validation split.
        duration_s: Wall time of this run.
    """

    study_name: str
    stopped_because: str
    counts: Counts
    best_number: int | None
    best_value: float | None
    best_params: dict[str, ParamValue]
    checkpoint: Path | None
    n_val: int
    duration_s: float


def run_search(
    config: StudyConfig,
    *,
    progress: Progress,
    command: str,
    allow_changes: bool = False,
    take_over: bool = False,
) -> SearchOutcome:
    """Run or continue the study that a configuration names.

    Args:
        config: The resolved configuration.
        progress: What the user sees.
        command: Command line, for the record.
        allow_changes: Continue a stored study although its configuration or pictures changed.
        take_over: Begin although a process of another machine has not signed off.

    Raises:
        ConfigError: The configuration differs from the stored one, or cannot be run.
        RecordError: The database is not ours, or the study is being run elsewhere.
        ValueError: Pictures, weights, backbone or device cannot be used.
    """
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_backbones(config)
    with (
        Record.open(config.study.storage, create=True) as store,
        open_session(
            store,
            config,
            corner_configs(config, with_starts=True),
            progress=progress,
            command=command,
            allow_changes=allow_changes,
            take_over=take_over,
        ) as session,
    ):
        search = _Search(session.work, config, begin)
        session.because = search.run()
        outcome = search.outcome(session.because)
        progress.study_ended(outcome)
        return outcome


class _Search:
    """One process's part in a study, from its first ask to its last tell."""

    def __init__(self, work: Work, config: StudyConfig, begin: float) -> None:
        self.work = work
        self.config = config
        self.begin = begin
        self.distributions = distributions(config.space)
        self.study = work.store.optuna_study(work.study_id)
        self.study.pruner = make_pruner(config.search.pruner, config.train.epochs)
        self.roster = Roster(work)

    def run(self) -> str:
        """Run trials until something says stop; return what did."""
        close_killed(self.work)
        self.roster.reload()
        self._queue_again()
        self._enqueue_recipes()
        self.work.progress.study_started(
            self.config.study.name,
            self.config.study.trials,
            self.roster.counts(),
            self.roster.best(),
        )
        while True:
            because = self._reason_to_stop()
            if because is not None:
                break
            self._one_trial()
        self._tidy_checkpoints()
        return because

    def _queue_again(self) -> None:
        """Queue the settings of trials that were cut short, unless that was done before.

        Settings that keep taking the process down are given up.
        """
        trials = self.study.get_trials(deepcopy=False)
        queued = {trial.user_attrs.get(_ORIGIN) for trial in trials}
        for trial in trials:
            row = self.roster.rows.get(trial.number)  # None: it was asked for, but never begun
            is_cut = row is None or row.reason in RERUN_REASONS
            if trial.state is not TrialState.FAIL or not is_cut:
                continue
            # The queued ones, since its process may have died before Optuna had taken them over.
            params = trial.user_attrs.get(_QUEUED, trial.params)
            origin = f"retry of {trial.number}"
            reruns = int(trial.user_attrs.get(_RERUNS, 0)) + 1
            is_whole = set(params) == set(self.distributions)
            if is_whole and reruns <= _MOST_RERUNS and origin not in queued:
                self._enqueue(params, origin, reruns)

    def _enqueue(self, params: Mapping[str, ParamValue], origin: str, reruns: int = 0) -> None:
        attrs = {_ORIGIN: origin, _RERUNS: reruns, _QUEUED: dict(params)}
        self.study.enqueue_trial(dict(params), user_attrs=attrs)

    def _enqueue_recipes(self) -> None:
        """Queue the recipes in a study that has not begun."""
        trials = self.study.get_trials(deepcopy=False)
        if any(trial.state is not TrialState.WAITING for trial in trials):
            return
        queued = {trial.user_attrs.get(_ORIGIN) for trial in trials}
        wanted = self.config.search.recipe_names
        for name, params in recipes(self.config.space, self.config.train, wanted).items():
            if f"{_RECIPE}{name}" not in queued:
                self._enqueue(params, f"{_RECIPE}{name}")

    def _reason_to_stop(self) -> str | None:
        """Return why the study is to stop."""
        settings = self.config.study
        if self.work.stop.is_set():
            return "interrupted"
        if len(self.roster.finished()) >= settings.trials:
            return "trials"
        if settings.timeout is not None and time.monotonic() - self.begin > settings.timeout:
            return "timeout"
        if settings.patience is not None and self.roster.since_best() >= settings.patience:
            return "patience"
        size = n_points(self.config.space)
        if size is not None and self.roster.n_settings() >= size:
            return "space exhausted"
        return None

    def _one_trial(self) -> None:
        """Ask for the next trial, run it, and tell how it did."""
        trial = self._ask()
        origin = str(trial.user_attrs.get(_ORIGIN, "sampler"))
        try:
            config = apply_params(self.config.train, trial.params)
        except ValueError as err:
            self._refused(trial, origin, err)
            return
        known = self.work.store.find_finished(self.work.study_id, identity(config))
        if known is not None:
            self._repeat(trial, config, known)
            return
        result = run_trial(
            self.work, Asked(trial, origin), config, lambda: self._should_stop(trial, origin)
        )
        self.roster.reload(trial.number)
        if result.state == "complete":
            self._keep_best(trial.number)
        elif result.reason in RERUN_REASONS:
            self._queue_again()

    def _ask(self) -> optuna.Trial:
        settings = self.config
        trials = self.study.get_trials(deepcopy=False)
        waiting = (trial.number for trial in trials if trial.state is TrialState.WAITING)
        number = next(waiting, len(trials))
        with quiet_experiments():
            self.study.sampler = make_sampler(
                settings.search.sampler, settings.study.seed, number, self.distributions
            )
            return self.study.ask(self.distributions)

    def _should_stop(self, trial: optuna.Trial, origin: str) -> bool:
        """Ask the pruner; a recipe is what the others are compared with, so it runs to its end."""
        with quiet_experiments():
            return trial.should_prune() and not origin.startswith(_RECIPE)

    def _refused(self, trial: optuna.Trial, origin: str, err: ValueError) -> None:
        """Record a combination of settings that the rules forbid; it is not trained."""
        self._record_untrained(
            trial, self.config.train, origin, "failed", f"not allowed: {err}", None
        )

    def _repeat(self, trial: optuna.Trial, config: TrainConfig, known: Trial) -> None:
        """Take over the result of an equal trial instead of training it again."""
        for metrics in self.work.store.epochs(known.id):
            trial.report(metrics.val_acc, metrics.epoch + 1)
        origin = f"{_COPY}{known.number}"
        self._record_untrained(trial, config, origin, known.state, known.reason, known)

    def _record_untrained(
        self,
        trial: optuna.Trial,
        config: TrainConfig,
        origin: str,
        state: str,
        reason: str | None,
        known: Trial | None,
    ) -> None:
        store, progress = self.work.store, self.work.progress
        row = Trial(
            study_id=self.work.study_id,
            number=trial.number,
            run_id=self.work.run_id,
            origin=origin,
            config=dataclasses.asdict(config),
            config_hash=identity(config),
            device="none",
        )
        trial_id = store.begin_trial(row)
        value, score = (known.value, known.score) if known else (None, None)
        progress.trial_started(trial.number, origin, trial.params, config.epochs)
        store.end_trial(
            trial_id,
            state,
            reason=reason,
            value=value,
            best_epoch=known.best_epoch if known else None,
            epochs_done=0,
            duration_s=0.0,
            checkpoint=None,
            score=score,
        )
        progress.trial_ended(trial.number, state, value, reason, 0.0, score)
        self.roster.reload(trial.number)

    def _keep_best(self, number: int) -> None:
        """Record what the new best trial got wrong, and drop checkpoints that fell behind."""
        if self.roster.ranking()[0].number == number:
            record_predictions(self.work, number)
        self._tidy_checkpoints()

    def _tidy_checkpoints(self) -> None:
        kept = [row for row in self.roster.ranking() if row.checkpoint]
        for row in kept[self.config.study.keep_checkpoints :]:
            self.work.store.set_checkpoint(row.id, None)
            shutil.rmtree(checkpoint_folder(self.work.output, row.number), ignore_errors=True)
            self.roster.reload(row.number)

    def outcome(self, because: str) -> SearchOutcome:
        """Sum up the study after this run."""
        ranking = self.roster.ranking()
        best = ranking[0] if ranking else None
        return SearchOutcome(
            study_name=self.config.study.name,
            stopped_because=because,
            counts=self.roster.counts(),
            best_number=best.number if best else None,
            best_value=best.value if best else None,
            best_params=dict(best.params) if best else {},
            checkpoint=Path(best.checkpoint) if best and best.checkpoint else None,
            n_val=len(self.work.data.val),
            duration_s=time.monotonic() - self.begin,
        )
