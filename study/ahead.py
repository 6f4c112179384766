"""Head-only trials that are trained ahead of their turn, many in one pass.

A trial of a head alone takes less time than its own records. Where the next settings are known
whatever the earlier trials give (a random or exhaustive sampler, an ablation's cells), those that
look at the same features are trained as a cohort; then each takes its turn, is judged by the
pruner and recorded as if it had been trained just then. What a pruner stops is cut off: its later
epochs were computed, and count for nothing. So a study has the same trials, figures and stops
either way.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.cohort import Cohort, stream_key
from core.config import TrainConfig
from core.data.splits import ImageData
from core.metrics import EpochMetrics
from study.runner import (
    REASON_DIVERGED,
    Asked,
    Course,
    TrialResult,
    Work,
    begin_record,
    checkpoint_folder,
)

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Trained:
    """A trial that was trained ahead.

    Attributes:
        cohort: Where it was trained.
        index: Its place there.
    """

    cohort: Cohort
    index: int

    @property
    def epochs(self) -> Sequence[EpochMetrics]:
        """Its epochs' figures."""
        return self.cohort.results[self.index].epochs

    @property
    def failure(self) -> str | None:
        """Why it ended early."""
        error = self.cohort.results[self.index].error
        return None if error is None else f"{REASON_DIVERGED}: {error}"


def train_ahead(
    work: Work, configs: Mapping[Key, TrainConfig], data: ImageData
) -> dict[Key, Trained]:
    """Train those of some coming trials together that look at the same features.

    Args:
        work: What the trials share.
        configs: The coming trials by any key.
        data: Their pictures.

    Returns:
        What was trained; none where fewer than two trials look at the same features, where the
        user stops the study, or where a cohort cannot be trained: such trials take their turn
        like any other, and tell what is wrong.
    """
    groups: dict[Hashable, list[Key]] = {}
    for key, config in configs.items():
        stream = stream_key(config)
        if stream is not None:
            groups.setdefault(stream, []).append(key)
    found: dict[Key, Trained] = {}
    for keys in groups.values():
        if len(keys) > 1:
            found |= _train(work, {key: configs[key] for key in keys}, data)
    return found


def _train(work: Work, configs: Mapping[Key, TrainConfig], data: ImageData) -> dict[Key, Trained]:
    try:
        cohort = Cohort(list(configs.values()), data, work.cache)
        for _ in cohort.epochs():
            if work.stop.is_set():
                return {}
    except (ValueError, RuntimeError):  # out of memory, too: each trial meets it by itself
        return {}
    return {key: Trained(cohort, k) for k, key in enumerate(configs)}


def record_trained(
    work: Work,
    asked: Asked,
    config: TrainConfig,
    trained: Trained,
    should_stop: Callable[[EpochMetrics], bool],
) -> TrialResult:
    """Record a trial that was trained ahead, as `run_trial` records one; it keeps no checkpoint.

    Args:
        work: What the trials share.
        asked: Its number and where it comes from.
        config: What it trained.
        trained: Its figures.
        should_stop: Asked after every epoch; True prunes the trial.
    """
    begin = time.perf_counter()
    trial_id = begin_record(work, asked, config)
    course = Course(trial_id, asked.number)
    state, reason, spent = "complete", None, 0.0
    for metrics in trained.epochs:
        spent += metrics.data_s + metrics.train_s + metrics.eval_s
        course.add(metrics)
        work.store.add_epoch(trial_id, metrics, spent)
        work.progress.epoch(asked.number, metrics)
        if should_stop(metrics) and metrics.epoch < config.epochs - 1:
            state, reason = "pruned", f"pruned after epoch {metrics.epoch + 1}"
            break
    else:
        if trained.failure is not None:
            state, reason = "failed", trained.failure
    return course.end(work, state, reason, spent + time.perf_counter() - begin, None)


def save_trained(work: Work, number: int, trained: Trained) -> None:
    """Write the checkpoint of a trial that was trained ahead, and note it."""
    folder = checkpoint_folder(work.output, number)
    trained.cohort.save(trained.index, folder)
    work.store.set_checkpoint(work.store.trial(work.study_id, number).id, str(folder))


def record_trained_answers(work: Work, number: int, trained: Trained) -> None:
    """Put what a trial that was trained ahead says of every validation picture into the record."""
    best = trained.cohort.results[trained.index].best
    assert best is not None, "a complete trial has a best epoch"
    evaluation = best[1]
    trial = work.store.trial(work.study_id, number)
    labels, predicted = evaluation.labels.tolist(), evaluation.predicted.tolist()
    work.store.add_predictions(trial.id, "val", labels, predicted)
