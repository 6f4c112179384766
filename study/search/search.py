"""Run a search: ask Optuna for settings, run them, and stop or continue as the user wishes."""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import optuna
from optuna.trial import TrialState

from core.config import MAX_FREEZE_DEPTH
from core.metrics import EpochMetrics
from core.model import described
from study.config.errors import ConfigError
from study.config.formatting import describe_trial, format_duration
from study.config.search_space import (
    ParamValue,
    apply_params,
    distributions,
    fits,
    n_points,
    recipes,
)
from study.config.study_config import EXHAUSTIVE, StudyConfig
from study.execution.progress import Note, Progress, StudyState
from study.execution.recovery import MOST_RERUNS, RERUNS, recover
from study.execution.session import Session, corner_configs, open_session
from study.execution.trial_engine import TrialEngine, TrialRequest, identity, reported_step
from study.record.models import COPY, MODEL_FOLDER, REASON_KILLED, Counts, Trial, best_of
from study.record.record import Record
from study.search.choice import Choice
from study.search.final_model import FinalModel
from study.search.first_look import take_first_look
from study.search.plan import make_planner
from study.search.plan_file import PlannedTrial, read_plan, write_plan
from study.search.planner import LARGEST_SHARE_OF_LAST, RATES, SAMPLED, Planner, Step, stand_in
from study.search.samplers import make_pruner, make_sampler, quiet_experiments
from study.search.within_level import WithinLevel

_DROPPED = "Dropped are the settings of trial"
_OUTSIDE = "they lie outside the space, which has changed since"
_ORIGIN, _QUEUED, _RECIPE, _REPLAY = "origin", "queued", "recipe", "replay"
# A sampler that proposes so many settings in a row that were tried will hardly propose another.
# Assumption.
_MOST_COPIES = 100
# Seconds that are left for the last model, once trials have to stop. Assumption.
_RESERVE_S = 3.0
# A refit has all images but the test split, where its trial had four fifths. With a margin.
_REFIT_COST = 1.35
_LARGEST_SHARE_OF_REFITS = 0.35
_START_S = 15.0  # until a continued run has begun its first trial. Assumption.
# From half of its epochs on, a thawed trial below this share of the score of the head that it
# starts from is stopped. Runs that ended above it had been at 0.98 to 1.03 by then; one that was
# at 0.91 did not gain (flowers5 and textures10, EfficientNet-Lite0).
_LEAST_OF_HEAD = 0.95
HALTED = ("interrupted", "timeout", "no time")
"""A study that stopped for these can be continued as it is; else it is at its end."""


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """How a search ended.

    Attributes:
        stopped_because: `trials`, `timeout`, `patience`, `space exhausted`, `interrupted`; or of
            a plan `no gain`, where nothing promises one, `no time`, where nothing fits, and
            `plan`, where a given one is done.
        n_test: Images of the test split; 0 without one.
        duration_s: Wall time of this run.
        model: What the study's model is made of, if there is one.
        output: Folder of the study's model, checkpoints and report.
        images_per_s: What it classifies here, by a plan's measured forward passes.
        next_time: With which `resume` has the time for what was left out, as `--time` takes it.
    """

    stopped_because: str
    trials: list[Trial]
    n_val: int
    n_test: int
    duration_s: float
    model: Choice | None = None
    output: Path = Path()
    images_per_s: float | None = None
    next_time: str | None = None

    @property
    def counts(self) -> Counts:
        """Trials by state."""
        return Counts.of(self.trials)

    @property
    def best(self) -> Trial | None:
        """The best complete trial, by `train.monitor`, if any."""
        return best_of(self.trials)

    @property
    def n_first_look(self) -> int:
        """How many images the model of a first look has seen; 0 where trials gave one, or none."""
        return int(described(self.output / MODEL_FOLDER).get("n_images", 0))


def run_search(
    config: StudyConfig,
    *,
    progress: Progress,
    command: str,
    allow_changes: bool = False,
    take_over: bool = False,
    begin: float | None = None,
    plan: Path | None = None,
) -> SearchOutcome:
    """Run or continue the study that a configuration names.

    The arguments, and what it raises, are those of `open_session`; its time counts from `begin`,
    as `time.monotonic` does, or from now. With `plan`, a file that another study left, a study
    that has not begun runs its trials and ends.
    """
    if config.data.judged_by != "val":
        raise ConfigError(
            "data.judged_by must be val in a search, which must not see the images that "
            f"data.ablation_fraction keeps apart, but got {config.data.judged_by}. Remove the key."
        )
    begin = time.monotonic() if begin is None else begin
    replayed = None if plan is None else read_plan(plan, config)
    seconds = config.study.seconds
    deadline = math.inf if seconds is None else begin + seconds - _RESERVE_S
    with Record(config.study.storage, create=True) as record:
        output = Path(record.usable_path(config.study.output)) / config.study.name
        text = f"Study {config.study.name} in {record.storage}, files in {output}"
        if seconds is not None and config.study.time is None:
            limit = format_duration(seconds)
            text += f"\nIt takes {limit}; choose with --time 1h, or --trials 30."
        progress.emit(Note(text))
        is_new = record.find_study(config.study.name) is None
        if is_new and seconds is not None and config.search.strategy == "plan":
            take_first_look(config, output, progress, lambda: time.monotonic() > deadline)
        with open_session(
            record,
            config,
            corner_configs(config, with_starts=True),
            progress=progress,
            command=command,
            allow_changes=allow_changes,
            take_over=take_over,
            deadline=deadline,
        ) as session:
            search = _Search(session, replayed, begin)
            session.because = search.run()
            return SearchOutcome(
                session.because,
                record.trials(session.study_id),
                len(session.data.val),
                len(session.data.test or ()),
                time.monotonic() - begin,
                search.model.choice,
                session.output,
                search.images_per_s(),
                search.next_time,
            )


class _Search:
    """One process's part in a study."""

    def __init__(
        self, session: Session, replayed: list[PlannedTrial] | None, begin: float
    ) -> None:
        self.session, self.begin = session, begin
        self.record, self.study_id = session.record, session.study_id
        self.config = session.config
        self.is_planned = self.config.search.strategy == "plan"
        self.replayed = replayed
        self.distributions = distributions(self.config.space)
        self.study = self.record.optuna_study(self.study_id)
        self.is_replay = replayed is not None or _REPLAY in self.study.user_attrs
        pruner = "none" if self.is_planned else self.config.search.pruner
        made = make_pruner(pruner, self.config.train.epochs)
        self.study.pruner = WithinLevel(made, self.record.optuna_storage)
        self.model = FinalModel(session)
        self.planner: Planner | None = None
        self.engine = TrialEngine(session, keep_best=self.config.study.keep_checkpoints)
        self.forecasts: dict[int, float] = {}
        self.next_time: str | None = None
        self.rows: list[Trial] = []  # those that ended by themselves, in their order
        self.dropped: list[Trial] = []  # those that ended the process too often

    def run(self) -> str:
        """Run trials until something says stop; return what did."""
        continued = recover(self.engine)
        self._queue_again()
        if self.replayed is not None:
            self._enqueue_plan(self.replayed)
        elif not self.is_planned and self.config.search.has_recipes:
            found = recipes(self.config.space, self.config.train)
            self._enqueue_all({f"recipe:{name}": params for name, params in found.items()})
        rows = self.record.trials(self.study_id)
        self.rows = [row for row in rows if row.ended_at and row.reason != REASON_KILLED]
        self._show(rows)
        while (because := self._reason_to_stop()) is None:
            if continued:
                request = continued.pop(0)
                trial = self.record.take_up_trial(self.study_id, request.number)
                self._train(request, trial)
            else:
                step = self._next_step()
                if isinstance(step, str):
                    return self._finish(step)
                trial = self._ask(step)
                self._train_or_copy(trial)
            row = self.record.trial(self.study_id, trial.number)
            if row.ended_at:
                self.rows.append(row)
                self.model.update()
                ran = [row for row in self.rows if not _is_copy(row)]
                write_plan(self.session.output, ran, self.forecasts)
                self._show(self.rows)
        return self._finish(because)

    def _next_step(self) -> Step | str | None:
        """Return what is planned next, or why nothing is; None where a trial waits or is drawn."""
        if self._waiting():
            return None
        if self.is_replay:
            return "plan"
        if not self.is_planned:
            return None
        if self.planner is None:
            self.planner = make_planner(self.config, self.session.data, self.session.run_id)
        left = self._left_s()
        refits_s = sum(map(_refit_s, self.model.to_refit()))
        refits_s = min(refits_s, _LARGEST_SHARE_OF_REFITS * left)
        rows = [*self.rows, *self.dropped]
        return self.planner.next(rows, left, self.config.study.seconds, refits_s)

    def images_per_s(self) -> float | None:
        """Return how many images the model classifies per second; None where nothing is known."""
        if self.planner is None or self.model.choice is None:
            return None
        return 1 / sum(self.planner.forward_s(row) for row in self.model.choice.trials)

    def _left_s(self) -> float:
        return self.session.deadline - time.monotonic()

    def _finish(self, because: str) -> str:
        """Refit the model's members, as far as the time allows; return why the study ended."""
        self.model.update()
        for row in self.model.to_refit():
            if self.session.halted() or _refit_s(row) > self._left_s():
                continue
            self._note(f"Trial {row.number} is fitted again on all images but the test split.")
            if why := self.model.refit(row):
                self._note(f"It was not, so the model has it as it is: {why}.")
            else:
                self.model.update()
        if because == "no time" and self.planner and self.planner.left_out:
            self._say_what_is_left_out(self.planner.left_out[0])
        return "interrupted" if self.session.stop.is_set() else because

    def _say_what_is_left_out(self, step: Step) -> None:
        seconds = step.forecast_s / LARGEST_SHARE_OF_LAST + _START_S
        minutes = math.ceil((seconds + sum(map(_refit_s, self.model.to_refit()))) / 60)
        drawn = RATES if step.is_sampled else ()
        params = {key: value for key, value in step.params.items() if key not in drawn}
        what = describe_trial(f"plan: {step.reason}", params)
        self.next_time = f"{minutes}m"
        self._note(
            f"Left out: {what}, of about {format_duration(step.forecast_s)}; resume with "
            f"--time {self.next_time} has the time for it."
        )

    def _show(self, rows: list[Trial]) -> None:
        settings = self.config.study
        times = time.monotonic() - self.begin, settings.seconds
        self.session.progress.emit(StudyState.of(settings.name, settings.trials, rows, *times))

    def _queue_again(self) -> None:
        """Queue the settings of trials that were killed, unless that was done before."""
        trials = self.study.get_trials(deepcopy=False)
        rows = {row.number: row for row in self.record.trials(self.study_id)}
        queued = {trial.user_attrs.get(_ORIGIN) for trial in trials}
        for trial in trials:
            # One that is not in the record was asked for, but never begun.
            row = rows.get(trial.number)
            is_cut = row is None or row.reason == REASON_KILLED
            if trial.state is not TrialState.FAIL or not is_cut:
                continue
            # The queued ones, since its process may have died before Optuna had taken them over.
            params = trial.user_attrs.get(_QUEUED, trial.params)
            origin = f"retry of {trial.number}"
            reruns = int(trial.user_attrs.get(RERUNS, 0)) + 1
            if origin in queued:
                continue
            if reruns > MOST_RERUNS:
                self._note(f"{_DROPPED} {trial.number}: they ended the process {reruns} times.")
                config = apply_params(self.config.train, params)
                self.dropped.append(row or stand_in(trial.number, config, params, "failed"))
            elif not fits(self.config.space, params):
                self._note(f"{_DROPPED} {trial.number}: {_OUTSIDE}.")
            else:
                is_recipe = trial.user_attrs.get(_RECIPE, False)
                self._enqueue(params, origin, is_recipe=is_recipe, reruns=reruns)
                self._note(f"The settings of trial {trial.number} run again.")

    def _note(self, text: str) -> None:
        self.session.progress.emit(Note(text))

    def _enqueue(
        self, params: Mapping[str, ParamValue], origin: str, *, is_recipe: bool, reruns: int = 0
    ) -> None:
        attrs = {_ORIGIN: origin, RERUNS: reruns, _QUEUED: dict(params), _RECIPE: is_recipe}
        self.study.enqueue_trial(dict(params), user_attrs=attrs)

    def _enqueue_plan(self, planned: list[PlannedTrial]) -> None:
        """Queue the trials of a plan; refuse a study that has begun with other ones."""
        trials = self.study.get_trials(deepcopy=False)
        if not trials:  # before the first one: a kill must not make a plan of a replay
            self.study.set_user_attr(_REPLAY, True)
        self._enqueue_all({f"{t.origin} ({k})": t.params for k, t in enumerate(planned)})
        trials = self.study.get_trials(deepcopy=False)
        known = [trial.user_attrs.get(_QUEUED, trial.params) for trial in trials]
        if not all(trial.params in known for trial in planned):
            name = self.config.study.name
            raise ConfigError(
                f"--plan must begin a study, but {name} has other trials. Use another --name."
            )

    def _enqueue_all(self, found: Mapping[str, Mapping[str, ParamValue]]) -> None:
        """Queue settings by their origin in a study that has not begun."""
        trials = self.study.get_trials(deepcopy=False)
        if any(trial.state is not TrialState.WAITING for trial in trials):
            return
        queued = {trial.user_attrs.get(_ORIGIN) for trial in trials}
        for origin, params in found.items():
            if origin not in queued:
                self._enqueue(params, origin, is_recipe=True)

    def _reason_to_stop(self) -> str | None:
        """Return why the study is to stop; trials that copy a result do not count."""
        settings = self.config.study
        counted = [row for row in self.rows if not _is_copy(row)]
        if because := self.session.halted():
            return because
        if settings.trials is not None and len(counted) >= settings.trials:
            return "trials"
        best = best_of(counted)
        n_since_best = sum(best is None or row.number > best.number for row in counted)
        if settings.patience is not None and n_since_best >= settings.patience:
            return "patience"
        tried = {frozenset(row.params.items()) for row in self.rows}
        n_copies = len(list(itertools.takewhile(_is_copy, reversed(self.rows))))
        if n_copies >= _MOST_COPIES or len(tried) >= (n_points(self.config.space) or math.inf):
            return "space exhausted"
        return None

    def _train_or_copy(self, trial: optuna.Trial) -> None:
        """Train a trial, unless its settings are not allowed or their result is known."""
        origin = str(trial.user_attrs.get(_ORIGIN, SAMPLED))
        request = TrialRequest(trial.number, self.config.train, origin, trial.params)
        try:
            request = replace(request, config=apply_params(self.config.train, trial.params))
        except ValueError as err:  # a combination of settings that the rules forbid
            self.engine.record_untrained(request, "failed", f"not allowed: {err}", None)
            return
        own, known = identity(request.config), ("complete", "pruned")
        alike = (row for row in self.rows if row.config_hash == own and row.state in known)
        equal = next(alike, None)
        if equal is None:
            self._train(request, trial)
            return
        for metrics in self.record.epochs(equal.id):
            trial.report(metrics.val_acc, reported_step(request.config, metrics))
        copy = replace(request, origin=f"{COPY}{equal.number}")
        self.engine.record_untrained(copy, equal.state, equal.reason, equal)

    def _train(self, request: TrialRequest, trial: optuna.Trial) -> None:
        is_recipe = trial.user_attrs.get(_RECIPE, False)  # or the retry of one

        def should_prune(metrics: EpochMetrics) -> bool:
            if request.config.is_solved:
                return False  # nor do others' rungs hold it
            if self.is_planned:
                return self._falls_behind(request, metrics)
            # Asked for a recipe, too: others are compared with it. It is never pruned.
            with quiet_experiments():
                return trial.should_prune() and not is_recipe

        self.engine.run(request, should_prune, trial)

    def _falls_behind(self, request: TrialRequest, metrics: EpochMetrics) -> bool:
        """Return whether a thawed trial is far below the head that it started from."""
        config = request.config
        same = [
            row.ranked_by or 0.0
            for row in self.rows
            if row.state == "complete"
            and row.freeze_depth == MAX_FREEZE_DEPTH
            and row.config["features"] == "last"
            and (row.backbone, row.config["image_size"]) == (config.backbone, config.image_size)
        ]
        is_early = 2 * metrics.epoch < config.epochs
        return not is_early and metrics.ranked_by < _LEAST_OF_HEAD * max(same, default=-math.inf)

    def _waiting(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _ask(self, step: Step | None) -> optuna.Trial:
        """Begin the next trial: one that waits, a planned one, or one that the sampler draws."""
        if step is not None and not step.is_sampled:
            self._enqueue(step.params, f"plan: {step.reason}", is_recipe=True)
        waiting = self._waiting()
        while waiting and not fits(self.config.space, waiting[0].user_attrs[_QUEUED]):
            dropped = self.study.ask().number  # the first that waits, without drawing anything
            self.record.tell(self.study_id, dropped, "failed")
            self._note(f"{_DROPPED} {waiting.pop(0).number}: {_OUTSIDE}.")
        number = waiting[0].number if waiting else len(self.study.get_trials(deepcopy=False))
        sampler, seed = self.config.search.sampler, self.config.study.seed
        if self.rows and _is_copy(self.rows[-1]) and sampler not in EXHAUSTIVE:
            sampler = "random"  # the own one might propose the same settings forever
        if step is not None:
            self.forecasts[number] = step.forecast_s
        with quiet_experiments():
            self.study.sampler = make_sampler(sampler, seed, number, self.distributions)
            if step is not None and step.is_sampled:
                fixed = {key: value for key, value in step.params.items() if key not in RATES}
                self.study.sampler = optuna.samplers.PartialFixedSampler(fixed, self.study.sampler)
            return self.study.ask(self.distributions)


def _refit_s(row: Trial) -> float:
    """Forecast the seconds of fitting a trial's settings again."""
    return _REFIT_COST * (row.duration_s or 0.0)


def _is_copy(row: Trial) -> bool:
    return row.origin.startswith(COPY)
