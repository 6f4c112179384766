"""Run a search: ask Optuna, run the trial, tell it; stop and continue as the user wishes."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
from optuna.trial import TrialState

from core.metrics import EpochMetrics
from study.config.load import check_backbones
from study.config.search_space import ParamValue, apply_params, distributions, n_points, recipes
from study.config.study_config import StudyConfig
from study.execution.progress import REASON_KILLED, Counts, Progress, StudyStarted
from study.execution.recovery import MOST_RERUNS, RERUNS, recover
from study.execution.session import Session, corner_configs, open_session
from study.execution.trial_engine import (
    TrialEngine,
    TrialRequest,
    identity,
    reported_step,
)
from study.record.record import Record
from study.search.samplers import make_pruner, make_sampler, quiet_experiments

_ORIGIN, _QUEUED = "origin", "queued"
_COPY, _RECIPE, _IS_RECIPE = "same as ", "recipe:", "is_recipe"
HALTED = ("interrupted", "timeout")
"""A study that stopped for these can be continued as it is; else it is at its end."""


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
        n_val: Images of the validation split.
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
        progress: Who is told what happens.
        command: Command line, for the record.
        allow_changes: Continue a stored study although its configuration or images changed.
        take_over: Begin although a process of another machine has not signed off.

    Raises:
        ConfigError: The configuration differs from the stored one, or cannot be run.
        RecordError: The database is not ours, or another process runs the study.
        StudyHalted: The study cannot continue until the user has done something.
        ValueError: Images, weights, backbone or device cannot be used.
    """
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_backbones(config)
    with (
        Record.open(config.study.storage, create=True) as record,
        open_session(
            record,
            config,
            corner_configs(config, with_starts=True),
            progress=progress,
            command=command,
            allow_changes=allow_changes,
            take_over=take_over,
        ) as session,
    ):
        session.because = _Search(session, begin).run()
        return outcome_of(session, begin)


def outcome_of(session: Session, begin: float, *, with_best: bool = True) -> SearchOutcome:
    """Sum up a study after a run of it that began at `begin`, by the monotonic clock."""
    trials = session.record.trials(session.study_id)
    complete = [row for row in trials if row.state == "complete"] if with_best else []
    best = min(complete, key=lambda row: row.rank, default=None)
    return SearchOutcome(
        study_name=session.config.study.name,
        stopped_because=session.because,
        counts=Counts.of(trials),
        best_number=best.number if best else None,
        best_value=best.value if best else None,
        best_params=dict(best.params) if best else {},
        checkpoint=Path(best.checkpoint) if best and best.checkpoint else None,
        n_val=len(session.data.val),
        duration_s=time.monotonic() - begin,
    )


@dataclass(slots=True)
class _Standing:
    """What the stop rules look at; it follows from the study's finished trials in their order."""

    n_finished: int = 0
    n_since_best: int = 0
    best: float | None = None
    settings: set[str] = field(default_factory=set)

    def add(self, state: str, score: float | None, settings: str) -> None:
        self.n_finished += 1
        self.settings.add(settings)
        is_best = state == "complete" and (self.best is None or (score or 0.0) > self.best)
        self.n_since_best = 0 if is_best else self.n_since_best + 1
        self.best = (score or 0.0) if is_best else self.best


class _Search:
    """One process's part in a study, from its first ask to its last tell."""

    def __init__(self, session: Session, begin: float) -> None:
        self.session = session
        self.config = session.config
        self.begin = begin
        self.distributions = distributions(self.config.space)
        self.study = session.record.optuna_study(session.study_id)
        self.study.pruner = make_pruner(self.config.search.pruner, self.config.train.epochs)
        self.engine = TrialEngine(session, keep_best=self.config.study.keep_checkpoints)
        self.standing = _Standing()

    def run(self) -> str:
        """Run trials until something says stop; return what did."""
        continued = recover(self.engine)
        self._queue_again()
        self._enqueue_recipes()
        rows = self.session.record.trials(self.session.study_id)
        for row in rows:
            if row.ended_at is not None and row.reason != REASON_KILLED:
                self.standing.add(row.state, row.ranked_by, row.config_hash)
        complete = [row for row in rows if row.state == "complete"]
        best = min(complete, key=lambda row: row.rank, default=None)
        self.session.progress.emit(
            StudyStarted(
                self.config.study.name,
                self.config.study.trials,
                Counts.of(rows),
                best.value if best else None,
                best.ranked_by if best else None,
            )
        )
        while (because := self._reason_to_stop()) is None:
            if continued:
                self._continue(continued.pop(0))
            else:
                self._one_trial()
        return because

    def _queue_again(self) -> None:
        """Queue the settings of trials that were killed, unless that was done before."""
        record = self.session.record
        trials = self.study.get_trials(deepcopy=False)
        reasons = {row.number: row.reason for row in record.trials(self.session.study_id)}
        queued = {trial.user_attrs.get(_ORIGIN) for trial in trials}
        for trial in trials:
            # One that is not in the record was asked for, but never begun.
            is_cut = reasons.get(trial.number, REASON_KILLED) == REASON_KILLED
            if trial.state is not TrialState.FAIL or not is_cut:
                continue
            # The queued ones, since its process may have died before Optuna had taken them over.
            params = trial.user_attrs.get(_QUEUED, trial.params)
            origin = f"retry of {trial.number}"
            reruns = int(trial.user_attrs.get(RERUNS, 0)) + 1
            is_whole = set(params) == set(self.distributions)
            if is_whole and reruns <= MOST_RERUNS and origin not in queued:
                is_recipe = trial.user_attrs.get(_IS_RECIPE, False)
                self._enqueue(params, origin, reruns, is_recipe=is_recipe)

    def _enqueue(
        self,
        params: Mapping[str, ParamValue],
        origin: str,
        reruns: int = 0,
        *,
        is_recipe: bool = False,
    ) -> None:
        attrs = {
            _ORIGIN: origin,
            RERUNS: reruns,
            _QUEUED: dict(params),
            _IS_RECIPE: is_recipe,
        }
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
                self._enqueue(params, f"{_RECIPE}{name}", is_recipe=True)

    def _reason_to_stop(self) -> str | None:
        """Return why the study is to stop."""
        settings, standing = self.config.study, self.standing
        if self.session.stop.is_set():
            return "interrupted"
        if standing.n_finished >= settings.trials:
            return "trials"
        if settings.timeout is not None and time.monotonic() - self.begin > settings.timeout:
            return "timeout"
        if settings.patience is not None and standing.n_since_best >= settings.patience:
            return "patience"
        size = n_points(self.config.space)
        if size is not None and len(standing.settings) >= size:
            return "space exhausted"
        return None

    def _continue(self, request: TrialRequest) -> None:
        """Continue a trial that an earlier process began."""
        record, study_id = self.session.record, self.session.study_id
        self._run(request, record.take_up_trial(study_id, request.number))

    def _one_trial(self) -> None:
        """Ask for the next trial, and run it."""
        trial = self._ask()
        origin = str(trial.user_attrs.get(_ORIGIN, "sampler"))
        request = TrialRequest(trial.number, self.config.train, origin, trial.params)
        try:
            request = replace(request, config=apply_params(self.config.train, trial.params))
        except ValueError as err:  # a combination of settings that the rules forbid
            self.engine.record_untrained(request, "failed", f"not allowed: {err}", None)
            self.standing.add("failed", None, identity(request.config))
            return
        own = identity(request.config)
        equal = self.session.record.find_finished(self.session.study_id, own)
        if equal is None:
            self._run(request, trial)
            return
        for metrics in self.session.record.epochs(equal.id):
            trial.report(metrics.val_acc, reported_step(request.config, metrics))
        copy = replace(request, origin=f"{_COPY}{equal.number}")
        self.engine.record_untrained(copy, equal.state, equal.reason, equal)
        self.standing.add(equal.state, equal.ranked_by, own)

    def _run(self, request: TrialRequest, trial: optuna.Trial) -> None:
        is_recipe = trial.user_attrs.get(_IS_RECIPE, False)  # or the retry of one

        def should_prune(_: EpochMetrics) -> bool:
            if request.config.is_solved:
                return False  # nor do others' rungs hold it
            # Asked for a recipe, too: others are compared with it. It is never pruned.
            with quiet_experiments():
                return trial.should_prune() and not is_recipe

        result = self.engine.run(request, should_prune, trial)
        if result.state != "stopped":
            self.standing.add(result.state, result.score, identity(request.config))

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
