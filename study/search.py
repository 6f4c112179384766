"""Run a search: ask Optuna, run the trial, tell it; stop and resume as the user wishes."""

import contextlib
import dataclasses
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial, TrialState

from core.config import TrainConfig
from core.metrics import EpochMetrics
from study.ahead import Trained, record_trained, save_trained, train_ahead
from study.config import StudyConfig, check_backbones
from study.cost import cost_model
from study.ledger import RERUNS, Ledger
from study.paused_trials import PausedTrials, find_paused
from study.progress import Counts, Progress
from study.promotion import Promotion
from study.roster import Roster
from study.runner import (
    RERUN_REASONS,
    Asked,
    TrialResult,
    Work,
    checkpoint_folder,
    continue_trial,
    identity,
    record_predictions,
    run_trial,
)
from study.samplers import make_pruner, make_sampler
from study.sections import FORESEEN
from study.session import corner_configs, end_killed, open_session
from study.space import ParamValue, apply_params, distributions, n_points, recipes
from study.store import Store, TrialRow
from study.thaw import Outlook

# A setting that took the process down with it this often is not tried again.
_MOST_RERUNS = 3
_ORIGIN = "origin"
_UNPRUNED = "unpruned"  # what is noted of a recipe, and of its retries
_COPY = "same as "
HALTED = ("interrupted", "timeout")
"""A study that stopped for these goes on where it was; for any other reason it is at its end."""

_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


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
        StoreError: The database is not ours, or the study is being run elsewhere.
        ValueError: Pictures, weights, backbone or device cannot be used.
    """
    begin = time.monotonic()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    check_backbones(config)
    with (
        Store.open(config.study.storage, create=True) as store,
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
        n_train, n_val = len(work.data.train), len(work.data.val)
        self.scores = work.store.scores(work.study_id)
        self.outlook = Outlook(
            config.train.epochs,
            n_val if config.train.monitor == "val_acc" else None,
            cost_model(config.train, n_train, n_val, is_cached=work.cache is not None),
            {key: getattr(config.train, key) for key in config.space},
            counts_seconds=config.study.timeout is not None,
            scores=self.scores,
        )
        pruner = make_pruner(config.search.pruner, config.train.epochs, self.scores)
        found = find_paused(work)
        self.ledger = Ledger(config.study.storage, config.study.name, pruner, paused=found)
        self.can_pause = isinstance(pruner, Promotion)
        self.paused = PausedTrials(
            work, self.ledger, pruner if isinstance(pruner, Promotion) else None
        )
        self.left_paused = found
        self.asked: deque[Trial] = deque()  # for their turn
        self.ahead: dict[int, Trained] = {}  # by number
        self.roster = Roster(work)
        for row in self.roster.rows.values():
            if row.origin.startswith(_COPY):
                known = int(row.origin.removeprefix(_COPY))
                self.scores[row.number] = self.scores.get(known, {})

    def run(self) -> str:
        """Run trials until something says stop; return what did."""
        self._recover()
        if self.ledger.n_trials == 0:
            self._enqueue_recipes()
        self.work.progress.study_started(
            self.config.study.name,
            self.config.study.trials,
            self.roster.counts(),
            self.roster.best(),
        )
        while True:
            promoted = self.paused.next_number()
            because = self._reason_to_stop(may_begin=promoted is None)
            if because is not None:
                break
            if promoted is None:
                self._one_trial()
            else:
                self._continue(promoted)
        if because not in HALTED:
            because = self._end_paused() or because
        self._tidy_checkpoints()
        return because

    def _recover(self) -> None:
        """Close the trials that a killed process left open, and put their settings in line."""
        store, ledger = self.work.store, self.ledger
        cut = {trial.number: trial for trial in ledger.fail_open()}
        for row in store.trials(self.work.study_id):
            if row.number >= ledger.n_trials:  # it died before Optuna's tables had it
                ledger.add_failed(row.params, self.distributions)
        for row in self.paused.recover(self.left_paused, _MOST_RERUNS):
            self._again(row.number, row.params, ledger.user_attrs(row.number))
        for row in store.stale_trials(self.work.study_id):
            end_killed(self.work, row)
            known = cut.pop(row.number, None)
            self._again(row.number, row.params, dict(known.user_attrs) if known else {})
        for number, trial in cut.items():  # asked for, but never entered in the record
            self._again(number, dict(trial.params), dict(trial.user_attrs))
        self.roster.reload()

    def _again(self, number: int, params: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
        """Put a cut trial's settings in line, unless they keep taking the process down."""
        reruns = int(attrs.get(RERUNS, 0)) + 1
        if set(params) == set(self.distributions) and reruns <= _MOST_RERUNS:
            retry = {_ORIGIN: f"retry of {number}", RERUNS: reruns}
            self.ledger.enqueue_first(params, {**attrs, **retry})

    def _enqueue_recipes(self) -> None:
        wanted = self.config.search.recipe_names
        for name, params in recipes(self.config.space, self.config.train, wanted).items():
            origin = {_ORIGIN: f"recipe:{name}", RERUNS: 0}
            self.ledger.enqueue(params, {**origin, _UNPRUNED: True})

    def _reason_to_stop(self, *, may_begin: bool) -> str | None:
        """Return why the study is to stop.

        Args:
            may_begin: Whether a new trial would be next; while a paused one goes on, none of the
                reasons against new ones counts.
        """
        settings = self.config.study
        if self.work.stop.is_set():
            return "interrupted"
        if may_begin and len(self.roster.finished()) >= settings.trials:
            return "trials"
        if settings.timeout is not None and time.monotonic() - self.begin > settings.timeout:
            return "timeout"
        if not may_begin:
            return None
        if settings.patience is not None and self.roster.since_best() >= settings.patience:
            return "patience"
        size = n_points(self.config.space)
        if size is not None and self.roster.n_settings() >= size:
            return "space exhausted"
        return None

    def _one_trial(self) -> None:
        """Run the next trial, or all next ones whose heads were trained together."""
        if not self.asked:
            self._ask()
        if self.asked[0].number not in self.ahead:
            self._take_turn()
            return
        with self.ledger.together(), self.work.store.together():
            while self.asked and self.asked[0].number in self.ahead:
                self._take_turn()
                if self._reason_to_stop(may_begin=True) is not None:
                    return

    def _ask(self) -> None:
        """Ask for the next trial; for several where a cohort may come of them."""
        ledger, settings = self.ledger, self.config
        in_line = ledger.next_number() < ledger.n_trials
        self.asked.append(self._asked_one())
        is_foreseen = settings.search.sampler in FORESEEN and self.work.cache is not None
        if in_line or self.can_pause or not is_foreseen:
            return
        size = n_points(settings.space)
        left = settings.study.trials - len(self.roster.finished())
        if size is not None:
            left = min(left, size - self.roster.n_settings())
        while len(self.asked) < min(settings.search.cohort, left):
            self.asked.append(self._asked_one())
        coming = {}
        for trial in self.asked:
            with contextlib.suppress(ValueError):  # told when its turn comes
                coming[trial.number] = apply_params(settings.train, trial.params)
        self.ahead = train_ahead(self.work, coming, self.work.data)

    def _asked_one(self) -> Trial:
        settings, ledger = self.config, self.ledger
        sampler = make_sampler(
            settings.search.sampler,
            settings.study.seed,
            ledger.next_number(),
            self.distributions,
            ledger.seen,
            self.outlook,
        )
        return ledger.ask(sampler, self.distributions)

    def _take_turn(self) -> None:
        trial = self.asked.popleft()
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
        asked = Asked(trial.number, trial.params, origin)
        ask = self._should_stop(trial)
        trained = self.ahead.pop(trial.number, None)
        if trained is None:
            result = run_trial(self.work, asked, config, ask, can_pause=self.can_pause)
        else:
            result = record_trained(self.work, asked, config, trained, ask)
        self._close(trial, result, trained)

    def _continue(self, number: int, *, to_the_end: bool = False) -> None:
        """Go on with a paused trial."""
        row, here = self.roster.rows[number], self.config.train
        config = dataclasses.replace(
            TrainConfig(**row.config), device=here.device, workers=here.workers
        )
        trial = self.ledger.go_on(number)
        ask = self._should_stop(trial, to_the_end=to_the_end)
        self._close(trial, continue_trial(self.work, row, config, ask))

    def _should_stop(
        self, trial: Trial, *, to_the_end: bool = False
    ) -> Callable[[EpochMetrics], bool]:
        """Return what tells Optuna a trial's figures, and says whether it is to stop.

        Recipes never are: after an epoch a head alone leads, whatever the others come to.
        """
        is_whole = to_the_end or trial.user_attrs.get(_UNPRUNED, False)

        def ask(metrics: EpochMetrics) -> bool:
            stops = self._report(trial, metrics)
            if is_whole or not stops:
                return False
            if self.can_pause:
                # Before its state is on disk: what is found there, Optuna's tables know of.
                self.ledger.pause(trial)
            return True

        return ask

    def _report(self, trial: Trial, metrics: EpochMetrics) -> bool:
        """Tell an epoch's figures to Optuna, and to what ranks by score."""
        done = metrics.epoch + 1  # a pruner counts epochs done (its resource)
        self.scores.setdefault(trial.number, {})[done] = metrics.ranked_by
        return self.ledger.report(trial, metrics.val_acc, done)

    def _close(self, trial: Trial, result: TrialResult, trained: Trained | None = None) -> None:
        """Tell how a trial stopped, and drop from disk what is not needed any more."""
        if result.state == "paused":
            self.ledger.pause(trial)
        else:
            self._tell(trial, result)
        self.roster.reload(trial.number)
        if trained is not None and result.state == "complete":
            ranking = [row.number for row in self.roster.ranking()]
            if trial.number in ranking[: self.config.study.keep_checkpoints]:
                save_trained(self.work, trial.number, trained)
                self.roster.reload(trial.number)
        if result.state == "complete":
            self._keep_best(trial.number)
        if self.can_pause:
            self.paused.keep_states(self.config.study.trials)

    def _end_paused(self) -> str | None:
        """Leave no trial paused; return what halted this, if anything did.

        A study shall have a best model: where no trial is complete, the best of the paused ones
        is trained to its end.
        """
        while not self.roster.ranking() and (standings := self.paused.standings()):
            if self.work.stop.is_set():
                return "interrupted"
            self._continue(standings[0].number, to_the_end=True)
        for number in self.paused.give_up():
            self.roster.reload(number)
        self.paused.keep_states(0)
        return None

    def _tell(self, trial: Trial, result: TrialResult) -> None:
        self.ledger.tell(trial, _STATES[result.state], result.value)
        if result.reason in RERUN_REASONS:
            self._again(trial.number, trial.params, trial.user_attrs)

    def _refused(self, trial: Trial, origin: str, err: ValueError) -> None:
        """Record a combination of settings that the rules forbid; it is not trained."""
        self._record_untrained(
            trial, self.config.train, origin, "failed", f"not allowed: {err}", None
        )
        self.ledger.tell(trial, TrialState.FAIL)

    def _repeat(self, trial: Trial, config: TrainConfig, known: TrialRow) -> None:
        """Take over the result of an equal trial instead of training it again."""
        reason = f"same settings and seed as trial {known.number}"
        origin = f"{_COPY}{known.number}"
        # Of a paused trial there is but one to go on with.
        state = "pruned" if known.state == "paused" else known.state
        self._record_untrained(trial, config, origin, state, reason, known)
        for metrics in self.work.store.epochs(known.id):
            self._report(trial, metrics)
        self.ledger.tell(trial, _STATES[state], known.value)

    def _record_untrained(
        self,
        trial: Trial,
        config: TrainConfig,
        origin: str,
        state: str,
        reason: str,
        known: TrialRow | None,
    ) -> None:
        store, progress = self.work.store, self.work.progress
        trial_id = store.begin_trial(
            self.work.study_id,
            trial.number,
            self.work.run_id,
            origin=origin,
            params=trial.params,
            config=dataclasses.asdict(config),
            config_hash=identity(config),
            seed=config.seed,
            backbone=config.backbone,
            freeze_depth=config.freeze_depth,
            device="none",
        )
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
