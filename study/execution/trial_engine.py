"""Run trials: the only caller of `core.fit`, and the only writer of trials to the record."""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from core.config import TrainConfig
from core.device import choose_device, describe_device
from core.fit import Interrupted, fit
from core.metrics import EpochMetrics, TrainingDiverged
from core.models.builder import count_parameters
from core.training.no_effect import without_effect
from core.training.resume import epochs_in_state
from study.config.search_space import ParamValue
from study.execution.checkpoints import Checkpoints
from study.execution.progress import REASON_KILLED, EpochEnded, Note, TrialEnded, TrialStarted
from study.execution.session import Session, StudyHalted, outside_cause
from study.record.models import Trial
from study.record.record import config_hash, params_of

# These settings do not change what a trial learns, so they do not tell two trials apart.
_NOT_IDENTITY = ("device", "workers")
# So many equal failures in a row have a cause that the next settings will not remove. Assumption.
_MOST_EQUAL_FAILURES = 3

MOST_RERUNS = 3
"""Settings that took the process down with them this often are not run again."""
RERUNS, VAL_SEED = "reruns", "val_seed"
"""User attributes of a trial: how often its settings ran before, and the seed of its split."""
REASON_DIVERGED = "diverged"
REASON_OUT_OF_MEMORY = "out of memory"
REASON_ERROR = "error"
REASON_STOPPED = "interrupted"


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """A trial that is to be run; plain data.

    Attributes:
        number: Its number in the study; it is running for Optuna.
        config: What to train.
        origin: Where its settings came from: a recipe, the sampler, an ablation's cell.
        params: The hyperparameters that were chosen, to be shown.
        val_seed: Seed of its own validation split; None for the study's split.
        factor: What an ablation varies in it; None for a search.
        level: Its setting of the factor.
        replicate: Which of the equal runs.
        identity: Equal for equal settings, seed and split; None for that of `config`.
        is_continued: An earlier process began it, and left its training state.
    """

    number: int
    config: TrainConfig
    origin: str
    params: Mapping[str, ParamValue]
    val_seed: int | None = None
    factor: str | None = None
    level: str | None = None
    replicate: int | None = None
    identity: str | None = None
    is_continued: bool = False


@dataclass(frozen=True, slots=True)
class TrialResult:
    """How a trial ended; plain data.

    Attributes:
        number: Its number in the study.
        state: `complete`, `pruned`, `failed`, or `stopped`: the next start continues it.
        value: Validation accuracy of its best epoch, in [0, 1]; None if no epoch was finished.
        score: Score of that epoch, as in `EpochMetrics`.
        reason: Why it ended so; None for a complete trial.
        duration_s: Wall time, in all processes.
    """

    number: int
    state: str
    value: float | None
    score: float | None
    reason: str | None
    duration_s: float


def identity(config: TrainConfig) -> str:
    """Return the hash by which two trials are the same setting under the same seed."""
    settings = dataclasses.asdict(config)
    return config_hash({k: v for k, v in settings.items() if k not in _NOT_IDENTITY})


def is_settled(row: Trial) -> bool:
    """Return whether equal settings need not run again: complete, or failed because of them.

    Settings that diverge or do not fit into memory do so every time; that is their result.
    """
    if row.state == "complete":
        return True
    own = (REASON_DIVERGED, REASON_OUT_OF_MEMORY)
    return row.state == "failed" and (row.reason or "").startswith(own)


def _never(metrics: EpochMetrics) -> bool:
    return False


@dataclass(slots=True)
class _Course:
    """A trial under way: its key in the record, and what earlier processes and this one did."""

    trial_id: int
    begin: float
    spent_s: float = 0.0
    epochs: list[EpochMetrics] = field(default_factory=list)

    @property
    def best(self) -> EpochMetrics | None:
        return next((m for m in reversed(self.epochs) if m.is_best), None)

    @property
    def duration_s(self) -> float:
        return self.spent_s + time.perf_counter() - self.begin


class TrialEngine:
    """Runs the trials of one process, and keeps their record.

    Args:
        session: The study that the process works on.
        keep_best: Checkpoints to keep: those of the best trials; None for all, 0 for none.
    """

    def __init__(self, session: Session, keep_best: int | None = None) -> None:
        self.session = session
        self._record = session.record
        self._checkpoints = Checkpoints(session, keep_best)
        self._failures: list[str | None] = []

    def recover(self) -> list[TrialRequest]:
        """Deal with every trial that an earlier process left running.

        One that ended in our tables is reported to Optuna; one with a usable training state is to
        be continued; any other is failed, so that its settings run again.

        Returns:
            The trials to be continued.
        """
        record, study_id = self._record, self.session.study_id
        rows = {row.number: row for row in record.trials(study_id)}
        running = record.optuna_study(study_id).get_trials(False, states=(TrialState.RUNNING,))
        continued = []
        for trial in running:
            row = rows.get(trial.number)
            if row is None:  # asked for, but never begun
                record.tell(study_id, trial.number, "failed")
            elif row.ended_at is not None:
                record.tell(study_id, row.number, row.ended_as, row.value)
            elif (request := self._continuation(row, trial)) is not None:
                continued.append(request)
            else:
                self._fail_killed(row)
        self._checkpoints.load(rows.values())
        states = {self._state_file(request.number) for request in continued}
        for file in self.session.output.glob("state/*"):
            if file not in states:
                file.unlink(missing_ok=True)
        return continued

    def run(
        self,
        request: TrialRequest,
        on_epoch: Callable[[EpochMetrics], bool] = _never,
        trial: optuna.Trial | None = None,
    ) -> TrialResult:
        """Train one configuration and keep its record.

        Args:
            request: What to train.
            on_epoch: Asked after each epoch; True prunes the trial.
            trial: Optuna's side of it, to which each accuracy is reported; None takes it up.

        Raises:
            StudyHalted: The same failure came three times in a row.
            Exception: A failure that has nothing to do with the trial, as `outside_cause` names
                it: the trial stays running, for the next start to continue or repeat.
        """
        session, number = self.session, request.number
        if trial is None:
            trial = self._record.take_up_trial(session.study_id, number)
        course = self._begin(request)
        state, reason = "complete", None
        try:
            with contextlib.closing(self._epochs(request, course, trial)) as epochs:
                for metrics in epochs:
                    if on_epoch(metrics) and metrics.epoch + 1 < request.config.n_epochs:
                        state, reason = "pruned", f"pruned after epoch {metrics.epoch + 1}"
                        break
        except Interrupted:
            state, reason = "stopped", REASON_STOPPED
        except TrainingDiverged as err:
            state, reason = "failed", f"{REASON_DIVERGED}: {err}"
        except torch.OutOfMemoryError as err:
            state = "failed"
            reason = f"{REASON_OUT_OF_MEMORY}: even one image at a time does not fit ({err})"
        except Exception as err:  # one broken setting must not end a night's search
            if outside_cause(err) is not None:
                raise
            state, reason = "failed", f"{REASON_ERROR}: {_described(err)}"
        result = self._end(request, course, state, reason)
        self._halt_on_equal_failures(result)
        return result

    def record_untrained(
        self, request: TrialRequest, state: str, reason: str | None, equal: Trial | None
    ) -> None:
        """Record a trial that is not trained: refused, or with the result of an equal one."""
        trial_id = self._enter(request, "none", None, None)
        self._emit_started(request)
        value, score = (equal.value, equal.score) if equal else (None, None)
        best_epoch = equal.best_epoch if equal else None
        self._close(trial_id, state, reason, value=value, best_epoch=best_epoch, score=score)
        self.session.progress.emit(TrialEnded(request.number, state, value, reason, 0.0, score))

    def _begin(self, request: TrialRequest) -> _Course:
        """Enter a trial as running, or take up the record of one that is continued."""
        session, begin = self.session, time.perf_counter()
        if request.is_continued:
            row = self._record.trial(session.study_id, request.number)
            epochs = self._record.epochs(row.id)
            course = _Course(row.id, begin, _spent_s(epochs), epochs)
            session.progress.emit(
                Note(f"Trial {request.number} is continued after epoch {len(epochs)}.")
            )
        else:
            # An earlier study of this name may have left one.
            self._state_file(request.number).unlink(missing_ok=True)
            config = request.config
            trained, total = count_parameters(
                config.backbone,
                config.weights,
                config.image_size,
                config.freeze_depth,
                len(session.data.classes),
            )
            device = describe_device(choose_device(config.device))
            course = _Course(self._enter(request, device, trained, total), begin)
        self._emit_started(request)
        return course

    def _emit_started(self, request: TrialRequest) -> None:
        self.session.progress.emit(
            TrialStarted(request.number, request.origin, request.params, request.config.n_epochs)
        )

    def _enter(
        self, request: TrialRequest, device: str, trained: int | None, total: int | None
    ) -> int:
        config = request.config
        return self._record.begin_trial(
            Trial(
                study_id=self.session.study_id,
                number=request.number,
                run_id=self.session.run_id,
                origin=request.origin,
                config=dataclasses.asdict(config),
                config_hash=request.identity or identity(config),
                device=device,
                trained_parameters=trained,
                total_parameters=total,
                without_effect=list(without_effect(config)),
                factor=request.factor,
                level=request.level,
                replicate=request.replicate,
            )
        )

    def _epochs(
        self, request: TrialRequest, course: _Course, trial: optuna.Trial
    ) -> Generator[EpochMetrics]:
        """Give each epoch once it is recorded and reported; first the last of earlier ones.

        Of that one an earlier process may have neither reported the accuracy nor asked the
        pruner. A state older than the record gives recorded epochs again, which are equal.
        """
        session, number = self.session, request.number
        n_known = len(course.epochs)
        if n_known:
            last = course.epochs[-1]
            trials = self._record.optuna_study(session.study_id).get_trials(deepcopy=False)
            if n_known not in trials[number].intermediate_values:
                trial.report(last.val_acc, n_known)
            yield last
        run = fit(
            request.config,
            session.images(request.val_seed),
            cache=session.cache,
            checkpoint_dir=self._checkpoints.folder(number),
            state_file=self._state_file(number),
            should_stop=session.stop.is_set,
        )
        with contextlib.closing(run):
            for metrics in run:
                if metrics.epoch < n_known:
                    continue
                self._record.add_epoch(course.trial_id, metrics, course.duration_s)
                course.epochs.append(metrics)
                trial.report(metrics.val_acc, metrics.epoch + 1)  # a pruner counts from 1
                session.progress.emit(EpochEnded(number, metrics))
                yield metrics

    def _end(
        self, request: TrialRequest, course: _Course, state: str, reason: str | None
    ) -> TrialResult:
        """Close a trial's record, unless it is to be continued."""
        session, number, best = self.session, request.number, course.best
        value, score = (best.val_acc, best.ranked_by) if best else (None, None)
        checkpoint = None
        if state == "complete":
            checkpoint = self._checkpoints.record(course.trial_id, number, score or 0.0)
        duration_s = course.duration_s
        if state != "stopped":
            self._close(
                course.trial_id,
                state,
                reason,
                value=value,
                best_epoch=best.epoch if best else None,
                epochs_done=len(course.epochs),
                duration_s=duration_s,
                checkpoint=checkpoint,
            )
            self._state_file(number).unlink(missing_ok=True)
        if state == "complete":
            self._checkpoints.keep(course.trial_id, number, score or 0.0)
        session.progress.emit(TrialEnded(number, state, value, reason, duration_s, score))
        return TrialResult(number, state, value, score, reason, duration_s)

    def _halt_on_equal_failures(self, result: TrialResult) -> None:
        """Stop a study whose trials keep failing for the same reason.

        Raises:
            StudyHalted: They do.
        """
        reason = result.reason if result.state == "failed" else None
        if reason is not None and reason.startswith(REASON_DIVERGED):
            reason = None
        self._failures = [*self._failures, reason][-_MOST_EQUAL_FAILURES:]
        if reason is not None and self._failures == [reason] * _MOST_EQUAL_FAILURES:
            self.session.because = "halted"
            raise StudyHalted(
                f"{_MOST_EQUAL_FAILURES} trials in a row failed for the same reason: {reason} "
                f"Correct the cause, then continue: {self.session.resume}"
            )

    # What an earlier process left

    def _state_file(self, number: int) -> Path:
        return self.session.output / "state" / f"trial-{number:04d}.pt"

    def _continuation(self, row: Trial, trial: FrozenTrial) -> TrialRequest | None:
        """Return the request that continues a trial; None where that cannot be.

        Trials whose process was killed are continued a few times only: they may be the cause.
        """
        session = self.session
        runs = self._record.runs(session.study_id)
        was_killed = len(runs) > 1 and runs[-2].ended_at is None
        reruns = int(trial.user_attrs.get(RERUNS, 0)) + was_killed
        request = TrialRequest(
            number=row.number,
            config=TrainConfig(**row.config),
            origin=row.origin,
            params=params_of(trial),
            val_seed=trial.user_attrs.get(VAL_SEED),
            factor=row.factor,
            level=row.level,
            replicate=row.replicate,
            identity=row.config_hash,
            is_continued=True,
        )
        data = session.images(request.val_seed)
        n_done = epochs_in_state(self._state_file(row.number), request.config, data)
        if n_done is None and not was_killed and not row.epochs_done:
            n_done = 0  # stopped by the user before there was anything to save
        if reruns > MOST_RERUNS or n_done is None or n_done > len(self._record.epochs(row.id)):
            return None
        if was_killed:
            taken_up = self._record.take_up_trial(session.study_id, row.number)
            taken_up.set_user_attr(RERUNS, reruns)
        return request

    def _fail_killed(self, row: Trial) -> None:
        self._close(
            row.id,
            "failed",
            REASON_KILLED,
            best_epoch=row.best_epoch,
            epochs_done=row.epochs_done,
            duration_s=_spent_s(self._record.epochs(row.id)),
        )
        note = f"Trial {row.number} was cut short when its process died; its settings run again."
        self.session.progress.emit(Note(note))

    def _close(self, trial_id: int, state: str, reason: str | None, **figures: Any) -> None:
        """End a trial in the record, then for Optuna; figures that are not given are none."""
        none = {"value": None, "best_epoch": None, "epochs_done": 0, "duration_s": 0.0}
        self._record.end_trial(
            trial_id, state, reason=reason, **{**none, "checkpoint": None, **figures}
        )


def _spent_s(epochs: list[EpochMetrics]) -> float:
    return sum(m.data_s + m.train_s + m.eval_s for m in epochs)


def _described(err: Exception) -> str:
    """Describe a user's fault in its own words, and a fault of ours with where it happened."""
    if isinstance(err, ValueError):
        return str(err)
    where = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__}: {err} ({Path(where.filename).name}:{where.lineno})"
