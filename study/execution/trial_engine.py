"""Run trials: the only caller of `core.fit`, and the only writer of trials to the record."""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch

from core.config import TrainConfig
from core.device import choose_device, describe_device
from core.fit import fit
from core.metrics import EpochMetrics, Interrupted, TrainingDiverged
from core.models.builder import count_parameters
from core.training.no_effect import without_effect
from study.config.search_space import ParamValue
from study.execution.files import TrialFiles
from study.execution.progress import EpochEnded, Note, StepDone, TrialEnded, TrialStarted
from study.execution.session import Session, StudyHalted, outside_cause
from study.record.models import Trial
from study.record.record import config_hash

# So many equal failures in a row have a cause that the next settings will not remove. Assumption.
_MOST_EQUAL_FAILURES = 3

FOLD = "fold"
"""The user attribute that holds a trial's fold: folds, seed, and which one."""
PAUSED = "paused"
"""The user attribute of a stopped trial, which `resume` continues; Optuna, which has no state for
that, holds it for running."""
REASON_DIVERGED = "diverged"
REASON_OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """A trial that is to be run; plain data. What is not explained here is so for `Trial`.

    Attributes:
        number: Its number in the study; it is running for Optuna.
        params: The hyperparameters that were chosen, to be shown.
        fold: Folds, their seed, and which one it validates on; None for the study's split.
        identity: Equal for equal settings, seed and split; None for that of `config`.
        is_continued: An earlier process began it, and left its training state.
    """

    number: int
    config: TrainConfig
    origin: str
    params: Mapping[str, ParamValue]
    fold: tuple[int, int, int] | None = None
    factor: str | None = None
    level: str | None = None
    replicate: int | None = None
    identity: str | None = None
    is_continued: bool = False


def identity(config: TrainConfig) -> str:
    """Return the hash by which two trials are the same setting under the same seed.

    Settings that change nothing beside the others do not tell two trials apart.
    """
    idle = without_effect(config) - {"seed", "monitor"}
    return config_hash({k: v for k, v in dataclasses.asdict(config).items() if k not in idle})


def reported_step(config: TrainConfig, metrics: EpochMetrics) -> int:
    """Return how many epochs an accuracy counts for with a pruner.

    A solved head is at its end at once: it counts as a run of all epochs, so that no network is
    compared with it after its first one.
    """
    return config.epochs if config.is_solved else metrics.epoch


def is_settled(row: Trial) -> bool:
    """Return whether equal settings need not run again: complete, or failed because of them.

    Settings that diverge or do not fit into memory do so every time; that is their result.
    """
    if row.state == "complete":
        return True
    own = (REASON_DIVERGED, REASON_OUT_OF_MEMORY)
    return row.state == "failed" and (row.reason or "").startswith(own)


class TrialEngine:
    """Runs the trials of one process, and keeps their record; `keep_best` is for `TrialFiles`."""

    def __init__(self, session: Session, keep_best: int | None = None) -> None:
        self.session = session
        self.files = TrialFiles(session, keep_best)
        self._record = session.record
        self._failures: list[str] = []

    def run(
        self,
        request: TrialRequest,
        on_epoch: Callable[[EpochMetrics], bool] = lambda metrics: False,
        trial: optuna.Trial | None = None,
    ) -> TrialEnded:
        """Train one configuration and keep its record; return how it ended, as it was shown.

        `on_epoch` is asked after each epoch; True prunes the trial. `trial` is Optuna's side of
        it, to which each accuracy is reported; None takes it up.

        Raises:
            StudyHalted: The same failure came three times in a row.
            Exception: A failure that has nothing to do with the trial, as `outside_cause` names
                it: the trial stays running, for the next start to continue or repeat.
        """
        if trial is None:
            trial = self._record.take_up_trial(self.session.study_id, request.number)
        begin = time.perf_counter()
        row, known = self._begin(request)
        if PAUSED in trial.user_attrs:
            trial.set_user_attr(PAUSED, False)
        begin -= training_s(known)  # when it would have begun in one process
        state, reason = "complete", None
        try:
            with contextlib.closing(self._epochs(request, row, known, begin, trial)) as epochs:
                for metrics in epochs:
                    if on_epoch(metrics) and metrics.epoch < request.config.n_epochs:
                        state, reason = "pruned", f"pruned after epoch {metrics.epoch}"
                        break
        except Interrupted:
            state, reason = "stopped", self.session.halted() or "interrupted"
            trial.set_user_attr(PAUSED, True)
        except TrainingDiverged as err:
            state, reason = "failed", f"{REASON_DIVERGED}: {err}"
        except torch.OutOfMemoryError as err:
            state, reason = "failed", f"{REASON_OUT_OF_MEMORY}: {err}"
        except Exception as err:  # one broken setting must not end a night's search
            if outside_cause(err) is not None:
                raise
            state, reason = "failed", f"error: {_described(err)}"
        row.reason = reason
        ended = self._end(row, state, begin)
        self._halt_on_equal_failures(ended)
        return ended

    def record_untrained(
        self, request: TrialRequest, state: str, reason: str | None, equal: Trial | None
    ) -> None:
        """Record a trial that is not trained: refused, or with the result of an equal one."""
        row = self._enter(request, "none", None, None)
        self.session.progress.emit(_started(request))
        row.reason, row.duration_s = reason, 0.0
        if equal is not None:
            row.value, row.score, row.best_epoch = equal.value, equal.score, equal.best_epoch
        self._record.end_trial(row, state)
        self.session.progress.emit(_ended(row, state))

    def _begin(self, request: TrialRequest) -> tuple[Trial, list[EpochMetrics]]:
        """Enter a trial as running; or take up one that is continued, with its epochs so far."""
        session, config = self.session, request.config
        epochs: list[EpochMetrics] = []
        if request.is_continued:
            row = self._record.trial(session.study_id, request.number)
            epochs = self._record.epochs(row.id)
            # The last epoch may not have been reported, so Optuna may not know the best value.
            row.value = next((m.val_acc for m in reversed(epochs) if m.is_best), None)
            note = f"Trial {request.number} is continued after epoch {len(epochs)}."
            session.progress.emit(Note(note))
        else:
            # An earlier study of this name may have left one.
            self.files.state(request.number).unlink(missing_ok=True)
            trained, total = count_parameters(config, len(session.data.classes))
            device = describe_device(choose_device(config.device))
            row = self._enter(request, device, trained, total)
        session.progress.emit(_started(request))
        return row, epochs

    def _enter(
        self, request: TrialRequest, device: str, trained: int | None, total: int | None
    ) -> Trial:
        config = request.config
        row = Trial(
            study_id=self.session.study_id,
            number=request.number,
            run_id=self.session.run_id,
            origin=request.origin,
            config=dataclasses.asdict(config),
            config_hash=request.identity or identity(config),
            device=device,
            trained_parameters=trained,
            total_parameters=total,
            without_effect=sorted(without_effect(config)),
            factor=request.factor,
            level=request.level,
            replicate=request.replicate,
        )
        self._record.save(row)
        return row

    def _epochs(
        self,
        request: TrialRequest,
        row: Trial,
        known: list[EpochMetrics],
        begin: float,
        trial: optuna.Trial,
    ) -> Generator[EpochMetrics]:
        """Give each epoch once it is recorded and reported; first the last of earlier ones.

        Of that one an earlier process may have neither reported the accuracy nor asked the
        pruner. A state older than the record gives recorded epochs again, which are equal.
        """
        session, number = self.session, request.number
        if known:
            trials = self._record.optuna_study(session.study_id).get_trials(deepcopy=False)
            step = reported_step(request.config, known[-1])
            if step not in trials[number].intermediate_values:
                trial.report(known[-1].val_acc, step)
            yield known[-1]
        run = fit(
            request.config,
            session.images(request.fold),
            cache=session.cache,
            checkpoint_dir=self.files.checkpoint(number),
            state_file=self.files.state(number),
            should_stop=lambda: session.halted() is not None,
            on_step=lambda epochs: session.progress.emit(StepDone(number, epochs)),
        )
        with contextlib.closing(run):
            for metrics in run:
                if metrics.epoch <= len(known):
                    continue
                self._record.add_epoch(row, metrics, time.perf_counter() - begin)
                trial.report(metrics.val_acc, reported_step(request.config, metrics))
                session.progress.emit(EpochEnded(number, metrics))
                yield metrics

    def _end(self, row: Trial, state: str, begin: float) -> TrialEnded:
        """Close a trial's record, unless it is to be continued."""
        if state == "complete":
            row.weights_hash = self.files.record(row)
            if row.replicate is None:  # an ablation's runs are compared in its report
                self.files.attach(row)
        row.duration_s = time.perf_counter() - begin
        if state != "stopped":
            self._record.end_trial(row, state)
            self.files.state(row.number).unlink(missing_ok=True)
        if state == "complete":
            self.files.keep(row)
        ended = _ended(row, state)
        self.session.progress.emit(ended)
        return ended

    def _halt_on_equal_failures(self, ended: TrialEnded) -> None:
        """Stop a study whose trials keep failing for the same reason."""
        reason = ended.reason or ""
        is_fault = ended.state == "failed" and not reason.startswith(REASON_DIVERGED)
        self._failures = [*self._failures, reason] if is_fault else []
        if self._failures[-_MOST_EQUAL_FAILURES:] == [reason] * _MOST_EQUAL_FAILURES:
            self.session.because = "halted"
            raise StudyHalted(
                f"{_MOST_EQUAL_FAILURES} trials in a row failed for the same reason: {reason} "
                f"Correct the cause, then continue: {self.session.resume}"
            )


def training_s(epochs: list[EpochMetrics]) -> float:
    """Return the seconds that epochs took."""
    return sum(m.data_s + m.train_s + m.eval_s for m in epochs)


def _started(request: TrialRequest) -> TrialStarted:
    idle = without_effect(request.config)
    params = {key: value for key, value in request.params.items() if key not in idle}
    return TrialStarted(request.number, request.origin, params, request.config.n_epochs)


def _ended(row: Trial, state: str) -> TrialEnded:
    return TrialEnded(row.number, state, row.value, row.reason, row.duration_s or 0.0)


def _described(err: Exception) -> str:
    """Describe a user's fault in its own words, and a fault of ours with where it happened."""
    if isinstance(err, ValueError):
        return str(err)
    where = traceback.extract_tb(err.__traceback__)[-1]
    return f"{type(err).__name__}: {err} ({Path(where.filename).name}:{where.lineno})"
